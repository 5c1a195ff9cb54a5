// How the thread blocks of a persistent grid share the items of a ragged batch, whose sizes only
// the device knows: item i goes to thread block i % gridDim.x, so that a long request spreads over
// the whole GPU and thousands of short ones cost no launch each.

#ifndef SELECT_ATTN_OPS_CUDA_BATCH_WALK_CUH_
#define SELECT_ATTN_OPS_CUDA_BATCH_WALK_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/block_scan.cuh"

namespace select_attn::cuda {

// The first of `count` increasing `ends` that is above `item`.
__host__ __device__ inline int FirstAbove(const int64_t* ends, int count, int64_t item) {
  int low = 0;
  while (count > 0) {
    const int half = count / 2;
    if (ends[low + half] > item) {
      count = half;
    } else {
      low += half + 1;
      count -= half + 1;
    }
  }
  return low;
}

// Requests are looked at kThreads at a time, so that memory does not grow with the batch. All
// threads of a thread block of kThreads call everything together, and see the same.
template <int kThreads>
class BatchWalk {
 public:
  struct Storage {
    int64_t ends[kThreads];  // of the requests looked at: items up to and with each
    BlockScanStorage<int64_t, kThreads> scan;
  };

  struct Item {
    int64_t request;
    int64_t number;  // within the request
  };

  __device__ BatchWalk(Storage& storage, int64_t batch)
      : storage_(storage), batch_(batch), item_(blockIdx.x) {}

  // Goes to the next item of this thread block; false if there is none. count(b) says how many
  // request b has.
  template <typename Count>
  __device__ bool Next(const Count& count, Item& item) {
    while (item_ >= items_before_ + items_here_) {
      if (next_request_ >= batch_) return false;
      items_before_ += items_here_;
      const int64_t request = next_request_ + threadIdx.x;
      const int64_t own = request < batch_ ? count(request) : 0;
      __syncthreads();  // nobody reads the storage any more
      storage_.ends[threadIdx.x] = InclusiveScan<kThreads>(own, storage_.scan);
      __syncthreads();
      items_here_ = storage_.ends[kThreads - 1];
      next_request_ += kThreads;
    }
    const int64_t here = item_ - items_before_;
    const int place = FirstAbove(storage_.ends, kThreads, here);
    item.request = next_request_ - kThreads + place;
    item.number = here - (place == 0 ? 0 : storage_.ends[place - 1]);
    item_ += gridDim.x;
    return true;
  }

 private:
  Storage& storage_;
  const int64_t batch_;
  int64_t item_;              // of the whole batch
  int64_t items_before_ = 0;  // of requests before those looked at
  int64_t items_here_ = 0;    // of those looked at
  int64_t next_request_ = 0;  // behind those looked at
};

}  // namespace select_attn::cuda

#endif  // SELECT_ATTN_OPS_CUDA_BATCH_WALK_CUH_
