// Which instructions are known to be complete before which: vector clocks of the pipes.
//
// Instructions of a pipe are numbered from 1. A pipe knows, of every pipe, up to which number its
// instructions are complete before the next one of its own starts. A flag carries what the pipe
// that sets it knows, and all that this pipe has done, to the one that waits.

#ifndef SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_ORDERING_H_
#define SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_ORDERING_H_

#include <array>
#include <cstdint>
#include <optional>

#include "device_language.h"

namespace ascend_emulator {

using Clocks = std::array<uint32_t, kPipes>;

class Ordering {
 public:
  // Who set a flag. Queues leave that of a buffer given back for the next who takes it.
  enum class Setter { kKernel, kQueueFilled, kQueueFreed };

  explicit Ordering(bool strict_vector_order) : strict_vector_order_(strict_vector_order) {}

  // The number of the pipe's next instruction, which becomes its last.
  uint32_t Begin(int pipe) { return ++issued_[static_cast<size_t>(pipe)]; }

  // Of `of`, the instructions up to this one are complete before pipe `pipe` goes on.
  uint32_t Complete(int pipe, int of) const;

  void SetFlag(AscendC::HardEvent event, int id, Setter setter);
  void WaitFlag(AscendC::HardEvent event, int id);
  void Barrier(pipe_t pipe);

  // Ids that TPipe hands out, to kernels and to queues.
  int AllocateId(AscendC::HardEvent event);
  int FirstFreeId(AscendC::HardEvent event) const;
  void ReleaseId(AscendC::HardEvent event, int id);

  // Throws for flags that nobody waited for.
  void CheckEnd() const;

 private:
  static constexpr int kEvents = static_cast<int>(AscendC::HardEvent::V_V) + 1;

  struct Flag {
    Clocks clocks;
    Setter setter;
  };

  std::optional<Flag>& FlagAt(AscendC::HardEvent event, int id) {
    return flags_[static_cast<size_t>(event)][static_cast<size_t>(id)];
  }
  void Join(int pipe, const Clocks& clocks);

  bool strict_vector_order_;
  Clocks issued_ = {};
  std::array<Clocks, kPipes> known_ = {};
  std::array<std::array<std::optional<Flag>, kEventIds>, kEvents> flags_;
  std::array<std::array<bool, kEventIds>, kEvents> taken_ = {};
};

}  // namespace ascend_emulator

#endif  // SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_ORDERING_H_
