// The unified buffer: its bytes, which of them are defined, and who touched them last.

#ifndef SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_UNIFIED_BUFFER_H_
#define SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_UNIFIED_BUFFER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "ordering.h"

namespace ascend_emulator {

constexpr uint32_t kUnifiedBufferBytes = 192 * 1024;
constexpr uint32_t kBlockBytes = 32;
constexpr uint32_t kRepeatBytes = 256;
constexpr int kMostBuffers = 64;  // of a kernel

// An instruction that is being carried out.
struct Access {
  int pipe;
  uint32_t number;  // among those of its pipe
  const char* name;
};

class UnifiedBuffer {
 public:
  explicit UnifiedBuffer(const Ordering& ordering);

  uint8_t* data() { return bytes_.data() + padding_; }

  // Space from the front for one buffer; throws when there is none left.
  uint32_t Take(uint32_t bytes);
  uint32_t bytes_taken() const { return taken_; }

  // Throw where the access is not ordered behind an earlier one that it conflicts with.
  void Write(const Access& access, uint32_t address, uint32_t bytes);
  void Read(const Access& access, uint32_t address, uint32_t bytes);
  // As Read, of bytes that may be undefined: what only moves them does not use them.
  void ReadAny(const Access& access, uint32_t address, uint32_t bytes);

  // Whether an instruction wrote any of the bytes itself.
  bool WroteAny(const Access& access, uint32_t address, uint32_t bytes) const;

  // Without recording an access.
  void MakeUndefined(uint32_t address, uint32_t bytes);
  void CopyDefined(uint32_t to, uint32_t from, uint32_t bytes);

 private:
  // Accesses are recorded for 2 bytes at a time.
  static constexpr uint32_t kCellBytes = 2;
  static constexpr uint32_t kCells = kUnifiedBufferBytes / kCellBytes;

  struct Cell {
    uint32_t written;       // number of the last instruction that wrote it; 0: none
    uint32_t read[kPipes];  // of the last ones that read it
    uint8_t writer;         // pipe
  };

  [[noreturn]] void Conflict(const Access& access, const char* what, const char* earlier_what,
                             int earlier_pipe, uint32_t earlier_number, uint32_t cell) const;
  void CheckRange(const Access& access, uint32_t address, uint32_t bytes) const;
  void Remember(const Access& access);

  const Ordering& ordering_;
  std::vector<uint8_t> bytes_;
  size_t padding_;
  std::vector<uint8_t> defined_;  // 0 or 1 for each byte
  std::vector<Cell> cells_;
  std::vector<const char*> names_[kPipes];  // of instructions, by number
  uint32_t taken_ = 0;
  int num_buffers_ = 0;
};

}  // namespace ascend_emulator

#endif  // SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_UNIFIED_BUFFER_H_
