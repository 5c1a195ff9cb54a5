// Global memory that the cores of a launch touch, and who touches what another one writes.

#ifndef SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_MEMORY_RACES_H_
#define SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_MEMORY_RACES_H_

#include <cstdint>
#include <string>
#include <vector>

namespace ascend_emulator {

struct Interval {
  uintptr_t begin;
  uintptr_t end;
};

// Of one core.
class GlobalAccesses {
 public:
  void Read(const void* address, uint64_t bytes) { Add(reads_, address, bytes); }
  void Write(const void* address, uint64_t bytes) { Add(writes_, address, bytes); }

  const std::vector<Interval>& reads() const { return reads_; }
  const std::vector<Interval>& writes() const { return writes_; }

 private:
  static void Add(std::vector<Interval>& intervals, const void* address, uint64_t bytes);

  std::vector<Interval> reads_;
  std::vector<Interval> writes_;
};

// A message for each pair of cores of which one writes what the other reads or writes.
std::vector<std::string> FindRaces(const std::vector<GlobalAccesses>& cores);

}  // namespace ascend_emulator

#endif  // SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_MEMORY_RACES_H_
