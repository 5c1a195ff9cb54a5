// The best of a row of scores by one thread block, exactly, in the order of core/rank_key.h: a
// radix selection of the score that the last of them has, byte by byte, then those that reach it,
// sorted.

#ifndef SELECT_ATTN_OPS_CUDA_TOP_K_CUH_
#define SELECT_ATTN_OPS_CUDA_TOP_K_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "core/rank_key.h"
#include "cuda/block_scan.cuh"

namespace select_attn::cuda {

// In place of a score's key, for a block that is not to be listed. ScoreKey returns no 0.
constexpr uint32_t kNoScore = 0;

// Where the digits of the keys put the `wanted` best of them, once those in use are looked at.
struct Threshold {
  uint32_t key;    // the digits known so far, zeros behind
  uint32_t known;  // a mask of them
  int wanted;      // of the keys that have these digits; all with larger ones are wanted

  __host__ __device__ bool IsAbove(uint32_t other) const { return (other & known) > key; }
  __host__ __device__ bool HasDigits(uint32_t other) const { return (other & known) == key; }
};

template <int kThreads, int kMost>
class TopK {
  static constexpr int kDigitBits = 8;
  static constexpr int kDigits = 1 << kDigitBits;
  static constexpr int kKept = 4096;  // keys that stay in shared memory from pass to pass
  static_assert(kThreads == kDigits, "a thread per digit");

 public:
  struct Storage {
    uint32_t keys[kKept];
    int histogram[kDigits];
    uint64_t candidates[kMost];
    int num_candidates;
    Threshold threshold;
    bool is_exact;
    BlockScanStorage<int, kThreads> scan;
  };

  // keys[i], written by any thread block and visible, belongs to block first + i. Leaves the best
  // `wanted` <= kMost, fewer if there are fewer with a score, in storage.candidates as RankKeys,
  // best first, and returns how many. All threads call it together; afterwards none reads keys.
  __device__ static int Select(Storage& storage, const uint32_t* keys, int64_t count, int64_t first,
                               int wanted) {
    const bool kept = count <= kKept;
    if (kept) {
      for (int64_t i = threadIdx.x; i < count; i += kThreads) storage.keys[i] = __ldcg(keys + i);
    }
    const auto key_at = [&](int64_t i) { return kept ? storage.keys[i] : __ldcg(keys + i); };
    const Threshold threshold = FindThreshold(storage, key_at, count, wanted);
    Collect(storage, key_at, count, first, threshold);
    Sort(storage);
    return storage.num_candidates;
  }

 private:
  template <typename KeyAt>
  __device__ static Threshold FindThreshold(Storage& storage, const KeyAt& key_at, int64_t count,
                                            int wanted) {
    Threshold threshold = {0, 0, static_cast<int>(count < wanted ? count : wanted)};
    for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
      storage.histogram[threadIdx.x] = 0;
      __syncthreads();
      // Whole warps go round, because they count together.
      for (int64_t begin = 0; begin < count; begin += kThreads) {
        const int64_t i = begin + threadIdx.x;
        const bool counts = i < count && threshold.HasDigits(key_at(i));
        const unsigned digit = counts ? key_at(i) >> shift & (kDigits - 1) : kDigits;
        // Scores are alike: most of a warp would wait for the same counter.
        const unsigned same = __match_any_sync(kWholeWarp, digit);
        const bool speaks = threadIdx.x % kWarp == static_cast<unsigned>(__ffs(same) - 1);
        if (counts && speaks) atomicAdd(&storage.histogram[digit], __popc(same));
      }
      __syncthreads();
      // From the largest digit down: the one at which the wanted are complete.
      const int digit = kDigits - 1 - static_cast<int>(threadIdx.x);
      const int own = storage.histogram[digit];
      const int up_to = InclusiveScan<kThreads>(own, storage.scan);
      if (up_to - own < threshold.wanted && threshold.wanted <= up_to) {
        storage.threshold.key = threshold.key | static_cast<uint32_t>(digit) << shift;
        storage.threshold.known = threshold.known | static_cast<uint32_t>(kDigits - 1) << shift;
        storage.threshold.wanted = threshold.wanted - (up_to - own);
        storage.is_exact = up_to == threshold.wanted;
      }
      __syncthreads();
      threshold = storage.threshold;
      if (storage.is_exact) break;  // all that have these digits are wanted
    }
    return threshold;
  }

  template <typename KeyAt>
  __device__ static void Collect(Storage& storage, const KeyAt& key_at, int64_t count,
                                 int64_t first, const Threshold& threshold) {
    const bool takes_all = storage.is_exact;
    __syncthreads();
    if (threadIdx.x == 0) storage.num_candidates = 0;
    __syncthreads();
    int tied_before = 0;  // with the threshold's key, of which the first `wanted` are taken
    for (int64_t begin = 0; begin < count; begin += kThreads) {
      const int64_t i = begin + threadIdx.x;
      const uint32_t key = i < count ? key_at(i) : kNoScore;
      const bool tied = key != kNoScore && threshold.HasDigits(key);
      bool taken = key != kNoScore && (threshold.IsAbove(key) || (tied && takes_all));
      if (!takes_all && tied_before < threshold.wanted) {
        const int tied_up_to = tied_before + InclusiveScan<kThreads>(tied ? 1 : 0, storage.scan);
        taken = taken || (tied && tied_up_to <= threshold.wanted);
        tied_before += BlockSum(storage);
      }
      if (taken) {
        // Bounded, because keys that somebody else changes meanwhile must not lead out of the
        // array.
        const int place = atomicAdd(&storage.num_candidates, 1);
        if (place < kMost) storage.candidates[place] = RankKey(key, first + i);
      }
    }
    __syncthreads();
    if (threadIdx.x == 0 && storage.num_candidates > kMost) storage.num_candidates = kMost;
    __syncthreads();
  }

  // Of the values that InclusiveScan was last given; its storage is free again afterwards.
  __device__ static int BlockSum(Storage& storage) {
    int sum = 0;
    for (int warp = 0; warp < kThreads / kWarp; ++warp) sum += storage.scan.warp_sums[warp];
    __syncthreads();
    return sum;
  }

  // A bitonic network, down; 0, which no candidate is, fills it up to a power of two.
  __device__ static void Sort(Storage& storage) {
    const int count = storage.num_candidates;
    int size = 1;
    while (size < count) size *= 2;
    for (int i = count + static_cast<int>(threadIdx.x); i < size; i += kThreads) {
      storage.candidates[i] = 0;
    }
    __syncthreads();
    for (int sorted = 2; sorted <= size; sorted *= 2) {
      for (int distance = sorted / 2; distance > 0; distance /= 2) {
        for (int i = static_cast<int>(threadIdx.x); i < size; i += kThreads) {
          const int other = i ^ distance;
          if (other <= i) continue;
          const uint64_t a = storage.candidates[i];
          const uint64_t b = storage.candidates[other];
          const bool down = (i & sorted) == 0;
          if (down == (a < b)) {
            storage.candidates[i] = b;
            storage.candidates[other] = a;
          }
        }
        __syncthreads();
      }
    }
  }
};

}  // namespace select_attn::cuda

#endif  // SELECT_ATTN_OPS_CUDA_TOP_K_CUH_
