// The CPU kernels' threads behind one function.

#ifndef SELECT_ATTN_OPS_CPU_PARALLEL_H_
#define SELECT_ATTN_OPS_CPU_PARALLEL_H_

#include <cstdint>
#include <type_traits>

namespace select_attn::cpu {

// A piece of work on the items [begin, end).
using RangeFunction = void (*)(void* context, int64_t begin, int64_t end);

// See ParallelFor.
void ParallelForRanges(int64_t count, int64_t grain, RangeFunction function, void* context);

// Calls fn(begin, end) on disjoint ranges of at most `grain` items that cover [0, count), on the
// calling thread and on up to NumThreads() - 1 others, of torch's OpenMP team (cpu/openmp.h) or
// else of a pool, and returns when all calls have. Which thread gets which range is left to chance,
// so fn's result must not depend on it. An exception out of fn ends the work early and is thrown
// again here. Not to be nested.
//
// May be called from several threads at once, and in a forked child.
template <typename F>
void ParallelFor(int64_t count, int64_t grain, F&& fn) {
  using Function = std::remove_reference_t<F>;
  ParallelForRanges(
      count, grain,
      [](void* context, int64_t begin, int64_t end) {
        (*static_cast<Function*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&fn)));
}

}  // namespace select_attn::cpu

#endif  // SELECT_ATTN_OPS_CPU_PARALLEL_H_
