// What a core did, for the model of its cost.

#ifndef SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_COUNTERS_H_
#define SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_COUNTERS_H_

#include <cstdint>
#include <map>
#include <string_view>
#include <vector>

#include "device_language.h"

namespace ascend_emulator {

struct VectorCount {
  int64_t instructions = 0;
  int64_t repeats = 0;  // of 256 bytes of the widest operand
};

struct Counters {
  int64_t bytes_read = 0;  // of global memory, by MTE2
  int64_t copies_in = 0;
  int64_t bytes_written = 0;  // to global memory, by MTE3
  int64_t copies_out = 0;
  std::map<std::string_view, VectorCount> vector;  // by instruction
  int64_t scalar_global_reads = 0;
  int64_t scalar_global_writes = 0;
  int64_t barriers = 0;
  int64_t flags = 0;        // set by the kernel itself
  int64_t queue_flags = 0;  // set by queues
  int64_t most_tensors_in_queue = 0;
  int64_t buffer_bytes = 0;  // of the unified buffer

  int64_t vector_repeats() const {
    int64_t sum = 0;
    for (const auto& [name, count] : vector) sum += count.repeats;
    return sum;
  }
  int64_t vector_instructions() const {
    int64_t sum = 0;
    for (const auto& [name, count] : vector) sum += count.instructions;
    return sum;
  }
};

// What the pipes of a core did, in the order in which the scalar unit issued it.
struct Step {
  enum class Kind : uint8_t { kCopy, kVector, kSetFlag, kWaitFlag, kBarrier };

  Kind kind;
  pipe_t pipe;               // of kCopy, kVector and kBarrier
  AscendC::HardEvent event;  // of flags
  int id;                    // of flags
  int64_t amount;            // bytes of kCopy, repeats of kVector
  std::string_view name;     // of kVector
};

using Trace = std::vector<Step>;

}  // namespace ascend_emulator

#endif  // SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_COUNTERS_H_
