// What the memory moves at a time.

#ifndef SELECT_ATTN_OPS_CPU_CACHE_LINE_H_
#define SELECT_ATTN_OPS_CPU_CACHE_LINE_H_

#include <cstdint>

namespace select_attn::cpu {

constexpr int64_t kCacheLine = 64;  // bytes

// Asks for a cache line, into the second-level cache. Prefetches into the first level share its few
// line-fill buffers with the loads that they are meant to help; on the machines measured they
// gained nothing.
inline void PrefetchToL2(const void* address) {
  __builtin_prefetch(address, 0, 2);
  // GCC takes functions that only prefetch for functions that do nothing, and drops the calls.
  asm volatile("");
}

}  // namespace select_attn::cpu

#endif  // SELECT_ATTN_OPS_CPU_CACHE_LINE_H_
