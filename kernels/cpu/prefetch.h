// Asking for memory ahead of time. A processor runs ahead of its loads only as far as it has room
// for the instructions that wait for them: with arithmetic behind every load that is not far enough
// to keep the memory busy, and hardware that prefetches knows neither block tables nor what is
// beyond a page.

#ifndef SELECT_ATTN_OPS_CPU_PREFETCH_H_
#define SELECT_ATTN_OPS_CPU_PREFETCH_H_

#include <cstdint>

namespace select_attn::cpu {

constexpr int64_t kCacheLine = 64;  // bytes that the memory moves at a time

// How often a kernel asks for a cache line before it uses it. Where long runs of rows follow each
// other, once, for the first-level cache: hardware has seen the stream and brings what comes next
// into the second level, where more requests would only be in its way. Rows with gaps between them
// it does not bring; so they are asked for early as well, for the second level, which takes many
// requests at once: the few line-fill buffers of the first would be taken up for too long if all
// had to wait for the memory.
enum class Ask { kOnce, kTwice };

// Places that a kernel reads in turn, each of them two tensors: with eight streams the memory
// delivers more than with four.
constexpr int64_t kPlacesInTurn = 4;

// Bytes that a kernel reads between asking for a cache line and using it.
constexpr int64_t kAheadToL1 = int64_t{2} << 10;
constexpr int64_t kAheadToL2 = int64_t{12} << 10;

// The empty assembly stands for an effect: GCC drops calls of functions that only prefetch.
inline void PrefetchToL1(const void* address) {
  __builtin_prefetch(address, 0, 3);
  asm volatile("");
}
inline void PrefetchToL2(const void* address) {
  __builtin_prefetch(address, 0, 2);
  asm volatile("");
}

}  // namespace select_attn::cpu

#endif  // SELECT_ATTN_OPS_CPU_PREFETCH_H_
