// Global memory that the cores of a launch touch, and who touches what another one writes. Cores
// may write the same bytes to the same place: whichever comes last, it holds them.

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
  // Before the bytes are written.
  void Write(const void* address, const void* data, uint64_t bytes);

  const std::vector<Interval>& reads() const { return reads_; }
  // Those that left memory as it was, and the others.
  const std::vector<Interval>& repeats() const { return repeats_; }
  const std::vector<Interval>& changes() const { return changes_; }

 private:
  static void Add(std::vector<Interval>& intervals, const void* address, uint64_t bytes);

  std::vector<Interval> reads_;
  std::vector<Interval> repeats_;
  std::vector<Interval> changes_;
};

// A message for each pair of cores of which one writes what the other reads, or writes otherwise.
// `order` has the cores' numbers in the order in which they ran.
std::vector<std::string> FindRaces(const std::vector<GlobalAccesses>& cores,
                                   const std::vector<int>& order);

}  // namespace ascend_emulator

#endif  // SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_MEMORY_RACES_H_
