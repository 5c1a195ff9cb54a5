// CUDA backend of selected_block_tables: a thread block per row sorts its selection.

#include <cuda_runtime.h>

#include "cuda/backend.h"
#include "cuda/block_scan.cuh"
#include "cuda/clamped_ranges.h"
#include "cuda/launch.h"
#include "cuda/limits.h"
#include "select_attn_ops/selected_block_tables.h"

namespace select_attn::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int32_t kLeftOut = INT32_MAX;  // sorts behind every block

// Sorts `size` numbers, a power of two, up, by a bitonic network.
__device__ void Sort(int32_t* numbers, int size) {
  for (int sorted = 2; sorted <= size; sorted *= 2) {
    for (int distance = sorted / 2; distance > 0; distance /= 2) {
      for (int i = static_cast<int>(threadIdx.x); i < size; i += kThreads) {
        const int other = i ^ distance;
        if (other <= i) continue;
        const int32_t a = numbers[i];
        const int32_t b = numbers[other];
        const bool up = (i & sorted) == 0;
        if (up == (a > b)) {
          numbers[i] = b;
          numbers[other] = a;
        }
      }
      __syncthreads();
    }
  }
}

__global__ void __launch_bounds__(kThreads) WriteRows(const SelectedBlockTablesParams p) {
  __shared__ int32_t blocks[kMostK];
  __shared__ BlockScanStorage<int64_t, kThreads> scan;
  int size = 1;
  while (size < p.k) size *= 2;
  for (int64_t row = blockIdx.x; row < p.batch * p.num_kv_heads; row += gridDim.x) {
    const int64_t b = row / p.num_kv_heads;
    const int64_t n = row % p.num_kv_heads;
    const int32_t* selected =
        p.selected_indices + b * p.selected_indices_strides[0] + n * p.selected_indices_strides[1];
    int64_t num_tokens = 0;
    for (int i = static_cast<int>(threadIdx.x); i < size; i += kThreads) {
      const int32_t j = i < p.k ? selected[i] : -1;
      const int64_t tokens = SelectedTokens(p, b, j);
      blocks[i] = tokens > 0 ? j : kLeftOut;
      num_tokens += tokens;
    }
    const int64_t up_to = InclusiveScan<kThreads>(num_tokens, scan);
    if (threadIdx.x == kThreads - 1) {
      p.lens[b * p.lens_stride + n] = static_cast<int32_t>(up_to);
    }
    __syncthreads();
    Sort(blocks, size);
    const int32_t* table = p.block_tables + b * p.block_tables_stride;
    int32_t* out = p.tables + b * p.tables_strides[0] + n * p.tables_strides[1];
    for (int i = static_cast<int>(threadIdx.x); i < p.k; i += kThreads) {
      out[i] = blocks[i] == kLeftOut ? -1 : table[blocks[i]];
    }
    __syncthreads();  // before the next row overwrites what is shared
  }
}

const char* Unsupported(const SelectedBlockTablesParams& p, DLDevice device) {
  const char* limit = UnsupportedDevice(device);
  return limit != nullptr ? limit : UnsupportedK(p.k);
}

const char* Run(const SelectedBlockTablesParams& p, DLDevice device, Stream stream) {
  return Launch<WriteRows, kThreads>(p, p.batch * p.num_kv_heads, device, stream);
}

}  // namespace

BackendOperator<SelectedBlockTablesParams> SelectedBlockTables() {
  return {Unsupported, nullptr, Run};
}

}  // namespace select_attn::cuda
