// A read of memory and nothing else: the ceiling that the benchmark measures the kernels against.
// A diagnostic, no operator, and no part of the library's contract.

#ifndef SELECT_ATTN_OPS_CPU_READ_MEMORY_H_
#define SELECT_ATTN_OPS_CPU_READ_MEMORY_H_

#include <dlpack/dlpack.h>

#include <cstdint>
#include <vector>

#include "select_attn_ops/common.h"

namespace select_attn {

// One way to read. Which one is the fastest depends on the machine, on how many threads read, and
// on what else goes on: a ceiling is the best of many.
struct ReadVariant {
  int64_t streams;             // 1, 2, 4 or 8: places that a thread reads from side by side
  int64_t prefetch_bytes;      // how far ahead of each it prefetches, gaps counted; 0: not at all
  int64_t far_prefetch_bytes;  // besides, for the second-level cache; 0: not at all
  int64_t chunk_bytes;         // what a thread takes at a time; 0: its whole share
  bool side_by_side;           // the streams are dealt over the tensors, not over each in turn
};

// Reads every byte of `tensors` once, on NumThreads() threads, and returns the OR of all bytes, so
// that nothing is optimised away and a test can tell that nothing was left out. Vectors are of the
// SIMD target in use, loads are aligned.
//
// Tensors are read in the order of their memory. They may have any strides that reduce to rows of
// contiguous bytes in at most two nested levels. To be read side by side they must be alike in
// shape and strides, and the streams a multiple of their number. Throws Error (kValueError).
SELECT_ATTN_EXPORT uint8_t ReadMemory(const std::vector<const DLTensor*>& tensors,
                                      const ReadVariant& variant);

}  // namespace select_attn

#endif  // SELECT_ATTN_OPS_CPU_READ_MEMORY_H_
