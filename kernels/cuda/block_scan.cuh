// Prefix sums over the threads of a thread block.

#ifndef SELECT_ATTN_OPS_CUDA_BLOCK_SCAN_CUH_
#define SELECT_ATTN_OPS_CUDA_BLOCK_SCAN_CUH_

#include <cuda_runtime.h>

namespace select_attn::cuda {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

template <typename T, int kThreads>
struct BlockScanStorage {
  T warp_sums[kThreads / kWarp];
};

// The sum of `own` over this thread and those before it. All kThreads threads call it together; the
// storage is free again after the next __syncthreads().
template <int kThreads, typename T>
__device__ T InclusiveScan(T own, BlockScanStorage<T, kThreads>& storage) {
  static_assert(kThreads % kWarp == 0, "whole warps");
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const T other = __shfl_up_sync(kWholeWarp, own, distance);
    if (lane >= distance) own += other;
  }
  if (lane == kWarp - 1) storage.warp_sums[warp] = own;
  __syncthreads();
  for (int before = 0; before < warp; ++before) own += storage.warp_sums[before];
  return own;
}

}  // namespace select_attn::cuda

#endif  // SELECT_ATTN_OPS_CUDA_BLOCK_SCAN_CUH_
