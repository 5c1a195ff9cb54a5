// The CPU kernels' threads behind one function.

#ifndef SELECT_ATTN_OPS_CPU_PARALLEL_H_
#define SELECT_ATTN_OPS_CPU_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

namespace select_attn::cpu {

struct Range {
  int64_t begin;
  int64_t end;
};

// The items [0, count) in ranges of at most `grain`, which threads take one after the other.
class RangeQueue {
 public:
  RangeQueue(int64_t count, int64_t grain) : count_(count), grain_(grain) {}

  // The next range for the calling thread; false, and `range` as it was, if none is left. A thread
  // may take a range before it is through with the one before.
  bool Take(Range& range) {
    const int64_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
    if (begin >= count_) return false;
    range = {begin, std::min(begin + grain_, count_)};
    return true;
  }

  // Leaves nothing to take.
  void Clear() { next_.store(count_, std::memory_order_relaxed); }

 private:
  const int64_t count_;
  const int64_t grain_;
  std::atomic<int64_t> next_{0};
};

// A thread's share of some work: what it takes from the queue.
using ShareFunction = void (*)(void* context, RangeQueue& queue);

// See ParallelTake.
void ParallelTakeRanges(int64_t count, int64_t grain, ShareFunction function, void* context);

// Calls fn(queue) with a RangeQueue on the calling thread and on up to NumThreads() - 1 others, of
// torch's OpenMP team (cpu/openmp.h) or else of a pool, and returns when all calls have. fn must
// take ranges until none is left, and may find none at all. Which thread gets which range is left
// to chance, so the result must not depend on it. An exception out of fn ends the work early and is
// thrown again here. Not to be nested.
//
// May be called from several threads at once, and in a forked child.
template <typename F>
void ParallelTake(int64_t count, int64_t grain, F&& fn) {
  using Function = std::remove_reference_t<F>;
  ParallelTakeRanges(
      count, grain,
      [](void* context, RangeQueue& queue) { (*static_cast<Function*>(context))(queue); },
      const_cast<void*>(static_cast<const void*>(&fn)));
}

// Calls fn(begin, end) on every range, as ParallelTake hands them out.
template <typename F>
void ParallelFor(int64_t count, int64_t grain, F&& fn) {
  ParallelTake(count, grain, [&](RangeQueue& queue) {
    for (Range range; queue.Take(range);) fn(range.begin, range.end);
  });
}

}  // namespace select_attn::cpu

#endif  // SELECT_ATTN_OPS_CPU_PARALLEL_H_
