// Asking for memory before it is needed.

#ifndef SELECT_ATTN_OPS_CPU_PREFETCH_H_
#define SELECT_ATTN_OPS_CPU_PREFETCH_H_

#include <cstdint>

namespace select_attn::cpu {

constexpr int64_t kCacheLine = 64;  // bytes that a prefetch brings

// Into the second-level cache. Prefetches into the first level share its few line-fill buffers with
// the loads that they are meant to help; on the machines measured they gained nothing.
inline void PrefetchToL2(const void* address) { __builtin_prefetch(address, 0, 2); }

}  // namespace select_attn::cpu

#endif  // SELECT_ATTN_OPS_CPU_PREFETCH_H_
