// CUDA backend of quest_block_select_paged, in one launch.
//
// An item of work is a tile of rows of one KV head: about 32 KiB of metadata, a few rows per group
// of threads, a thread of which has one or two vectors of channels. A tile's scores go to the
// workspace as keys; the thread block that finishes the last tile of a (request, KV head) selects.
// Which one that is does not matter to the result, nor does where the tiles are cut. Floors: the
// bytes of the metadata over the bandwidth; per channel two widenings, two products, a maximum and
// an addition over the rate of those, several times lower.
//
// Workspace: a counter of finished tiles per (request, KV head), then a key per (request, KV head,
// KV block that the tables can describe). All of it is zero between calls, so that the next one may
// have other shapes, and its counters where keys were.

#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/backend.h"
#include "cuda/batch_walk.cuh"
#include "cuda/clamped_ranges.h"
#include "cuda/elements.cuh"
#include "cuda/launch.h"
#include "cuda/limits.h"
#include "cuda/top_k.cuh"
#include "select_attn_ops/quest_block_select_paged.h"

namespace select_attn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsInFlight = 4;  // of a group of threads
constexpr int kAlignment = 16;

struct Arguments {
  QuestBlockSelectPagedParams p;
  int64_t most_scored;  // KV blocks of a request that can have scores
  uint32_t* tiles_done;
  uint32_t* keys;
};

using Selector = TopK<kThreads, kMostK>;

struct Shared {
  BatchWalk<kThreads>::Storage walk;
  Selector::Storage top_k;
  bool is_last;
};

// The groups of kLanes threads that share a row, kVectors vectors per thread.
template <class ElementType, int kLanesPerRow, int kVectorsPerLane, bool kAligned>
struct Scorer {
  using Element = ElementType;
  using Bits = typename Element::Bits;
  static constexpr int kLanes = kLanesPerRow;
  static constexpr int kVectors = kVectorsPerLane;
  static constexpr int kGroups = kThreads / kLanes;
  static constexpr int kTileRows = kGroups * kRowsInFlight;

  // The mean query of KV head n of request b, at this thread's channels; 0 beyond head_dim.
  __device__ static void LoadMeanQuery(const QuestBlockSelectPagedParams& p, int64_t b, int64_t n,
                                       float (&q)[kVectors][kPerVector<Element>]) {
    const int64_t heads = p.num_heads / p.num_kv_heads;
    const Bits* head =
        static_cast<const Bits*>(p.query) + b * p.query_strides[0] + n * heads * p.query_strides[1];
    for (int v = 0; v < kVectors; ++v) {
      for (float& channel : q[v]) channel = 0.0f;
      const int channel = Channel(v);
      if (channel >= p.head_dim) continue;
      for (int64_t h = 0; h < heads; ++h) {
        float widened[kPerVector<Element>];
        Widen(LoadVector<Element, kAligned>(head + h * p.query_strides[1] + channel), widened);
        for (int i = 0; i < kPerVector<Element>; ++i) {
          q[v][i] = h == 0 ? widened[i] : q[v][i] + widened[i];
        }
      }
      for (float& mean : q[v]) mean /= static_cast<float>(heads);
    }
  }

  // The key of the score of each of kRowsInFlight rows, in all threads of the group. Rows without
  // an address are not read.
  __device__ static void Score(const QuestBlockSelectPagedParams& p, const Bits* const* max,
                               const Bits* const* min,
                               const float (&q)[kVectors][kPerVector<Element>], uint32_t* keys) {
    Words max_words[kRowsInFlight][kVectors];
    Words min_words[kRowsInFlight][kVectors];
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        max_words[r][v] = min_words[r][v] = {};
        if (max[r] == nullptr || Channel(v) >= p.head_dim) continue;
        max_words[r][v] = LoadVector<Element, kAligned>(max[r] + Channel(v));
        min_words[r][v] = LoadVector<Element, kAligned>(min[r] + Channel(v));
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
      float sum = 0.0f;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        float highest[kPerVector<Element>];
        float lowest[kPerVector<Element>];
        Widen(max_words[r][v], highest);
        Widen(min_words[r][v], lowest);
#pragma unroll
        for (int i = 0; i < kPerVector<Element>; ++i) {
          sum += MaxOrNaN(q[v][i] * highest[i], q[v][i] * lowest[i]);
        }
      }
      // Both halves add the same two numbers, so all threads of the group get the same bits.
      for (int distance = kLanes / 2; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(kWholeWarp, sum, distance);
      }
      keys[r] = max[r] == nullptr ? kNoScore : ScoreKey(sum);
    }
  }

  // The first channel of a thread's vector v.
  __device__ static int Channel(int v) {
    return (static_cast<int>(threadIdx.x) % kLanes + v * kLanes) * kPerVector<Element>;
  }

 private:
  __device__ static void Widen(const Words& words, float (&floats)[kPerVector<Element>]) {
#pragma unroll
    for (int w = 0; w < kWordsPerVector; ++w) {
      Element::Widen(words.word[w], floats + w * Element::kPerWord);
    }
  }
};

// Writes the row of the result for KV head n of request b, whose keys are complete, and zeroes
// them.
__device__ void SelectRow(Selector::Storage& storage, const QuestBlockSelectPagedParams& p,
                          const Ranking& ranking, uint32_t* keys, int64_t b, int64_t n) {
  int32_t* out =
      p.selected_indices + b * p.selected_indices_strides[0] + n * p.selected_indices_strides[1];
  const int64_t num_forced = Smaller(ranking.blocks.num_forced(), p.k);
  const int64_t wanted = Smaller(p.k - num_forced, ranking.num_scored);
  int num_best = 0;
  if (wanted > 0) {
    num_best = Selector::Select(storage, keys, ranking.num_scored, ranking.blocks.scored_begin,
                                static_cast<int>(wanted));
    for (int64_t i = threadIdx.x; i < ranking.num_scored; i += kThreads) keys[i] = 0;
  }
  for (int64_t i = threadIdx.x; i < p.k; i += kThreads) {
    int64_t block = -1;
    if (i < num_forced) {
      block = ranking.blocks.Forced(i);
    } else if (i < num_forced + num_best) {
      block = BlockOfRankKey(storage.candidates[i - num_forced]);
    }
    out[i] = static_cast<int32_t>(block);
  }
}

template <class Score>
__global__ void __launch_bounds__(kThreads) SelectBlocks(const Arguments arguments) {
  using Bits = typename Score::Bits;
  __shared__ Shared shared;
  const QuestBlockSelectPagedParams& p = arguments.p;
  const int thread = static_cast<int>(threadIdx.x);
  const int group = thread / Score::kLanes;

  // One tile at least, to write the row of a request without scores.
  const auto num_tiles = [&](int64_t b) {
    const int64_t scored = ClampedRanking(p, b).num_scored;
    return scored == 0 ? int64_t{1} : (scored - 1) / Score::kTileRows + 1;
  };
  const auto num_items = [&](int64_t b) { return num_tiles(b) * p.num_kv_heads; };
  BatchWalk<kThreads> walk(shared.walk, p.batch);
  for (BatchWalk<kThreads>::Item item; walk.Next(num_items, item);) {
    const int64_t b = item.request;
    const int64_t n = item.number % p.num_kv_heads;
    const int64_t first_row = item.number / p.num_kv_heads * Score::kTileRows;
    const int64_t row_of_result = b * p.num_kv_heads + n;
    const Ranking ranking = ClampedRanking(p, b);
    uint32_t* keys = arguments.keys + row_of_result * arguments.most_scored;

    if (ranking.num_scored > 0) {
      const Bits* max[kRowsInFlight];
      const Bits* min[kRowsInFlight];
      for (int r = 0; r < kRowsInFlight; ++r) {
        max[r] = min[r] = nullptr;
        const int64_t row = first_row + r * Score::kGroups + group;
        if (row >= ranking.num_scored) continue;
        const int64_t j = ranking.blocks.scored_begin + row;
        const int64_t inside = j % p.rows_per_metadata_block;
        const int64_t block = p.metadata_block_tables[b * p.metadata_block_tables_stride +
                                                      j / p.rows_per_metadata_block];
        if (block < 0 || block >= p.num_metadata_blocks) continue;
        max[r] = static_cast<const Bits*>(p.maxblocks) + block * p.maxblocks_strides[0] +
                 inside * p.maxblocks_strides[1] + n * p.maxblocks_strides[2];
        min[r] = static_cast<const Bits*>(p.minblocks) + block * p.minblocks_strides[0] +
                 inside * p.minblocks_strides[1] + n * p.minblocks_strides[2];
      }
      float q[Score::kVectors][kPerVector<typename Score::Element>] = {};
      Score::LoadMeanQuery(p, b, n, q);
      uint32_t found[kRowsInFlight];
      Score::Score(p, max, min, q, found);
      for (int r = 0; r < kRowsInFlight; ++r) {
        const int64_t row = first_row + r * Score::kGroups + group;
        if (thread % Score::kLanes == 0 && row < ranking.num_scored) keys[row] = found[r];
      }
    }

    __syncthreads();  // the tile's keys are written
    if (thread == 0) {
      const auto tiles = static_cast<uint32_t>(num_tiles(b));
      __threadfence();
      shared.is_last = atomicAdd(arguments.tiles_done + row_of_result, 1u) + 1 == tiles;
      __threadfence();
      if (shared.is_last) arguments.tiles_done[row_of_result] = 0;  // ready for the next call
    }
    __syncthreads();
    // What is shared is overwritten only behind the next item's first barrier.
    if (shared.is_last) SelectRow(shared.top_k, p, ranking, keys, b, n);
  }
}

const char* Unsupported(const QuestBlockSelectPagedParams& p, DLDevice device) {
  const char* limit = UnsupportedDevice(device);
  if (limit == nullptr) limit = UnsupportedHeadDim(p.head_dim);
  return limit != nullptr ? limit : UnsupportedK(p.k);
}

int64_t MostScored(const QuestBlockSelectPagedParams& p) {
  return Smaller(DescribedBlocks(p.max_metadata_blocks_per_request, p.rows_per_metadata_block),
                 NumKvBlocks(INT32_MAX, p.block_size));
}

int64_t CounterBytes(const QuestBlockSelectPagedParams& p) {
  const int64_t bytes = p.batch * p.num_kv_heads * int64_t{sizeof(uint32_t)};
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// With room to align the whole.
int64_t WorkspaceSize(const QuestBlockSelectPagedParams& p, DLDevice /*device*/) {
  return kAlignment - 1 + CounterBytes(p) +
         p.batch * p.num_kv_heads * MostScored(p) * int64_t{sizeof(uint32_t)};
}

template <class Score>
const char* LaunchWith(const Arguments& arguments, DLDevice device, Stream stream) {
  const QuestBlockSelectPagedParams& p = arguments.p;
  const int64_t tiles = arguments.most_scored / Score::kTileRows + 1;
  return Launch<SelectBlocks<Score>, kThreads>(
      arguments, Smaller(p.batch * p.num_kv_heads, int64_t{1} << 30) * tiles, device, stream);
}

template <class Element, bool kAligned>
const char* RunFor(const QuestBlockSelectPagedParams& p, DLDevice device, Stream stream) {
  auto address = reinterpret_cast<uintptr_t>(p.workspace);
  address += -address % kAlignment;
  auto* counters = reinterpret_cast<uint32_t*>(address);
  const Arguments arguments = {p, MostScored(p), counters,
                               counters + CounterBytes(p) / int64_t{sizeof(uint32_t)}};
  const int64_t vectors = p.head_dim / kPerVector<Element>;
  if (vectors <= 8) return LaunchWith<Scorer<Element, 8, 1, kAligned>>(arguments, device, stream);
  if (vectors <= 16) return LaunchWith<Scorer<Element, 16, 1, kAligned>>(arguments, device, stream);
  if (vectors <= 32) return LaunchWith<Scorer<Element, 32, 1, kAligned>>(arguments, device, stream);
  if constexpr (kPerVector<Element> * 32 < kMostHeadDim) {
    return LaunchWith<Scorer<Element, 32, 2, kAligned>>(arguments, device, stream);
  }
  return "unknown head dim";
}

template <class Element>
const char* RunFor(const QuestBlockSelectPagedParams& p, DLDevice device, Stream stream) {
  const int64_t heads[] = {p.batch, p.num_heads};
  const int64_t rows[] = {p.num_metadata_blocks, p.rows_per_metadata_block, p.num_kv_heads};
  const bool aligned = RowsAreAligned<Element>(p.query, heads, p.query_strides) &&
                       RowsAreAligned<Element>(p.maxblocks, rows, p.maxblocks_strides) &&
                       RowsAreAligned<Element>(p.minblocks, rows, p.minblocks_strides);
  return aligned ? RunFor<Element, true>(p, device, stream)
                 : RunFor<Element, false>(p, device, stream);
}

const char* Run(const QuestBlockSelectPagedParams& p, DLDevice device, Stream stream) {
  return ForElement(p.dtype,
                    [&](auto element) { return RunFor<decltype(element)>(p, device, stream); });
}

}  // namespace

BackendOperator<QuestBlockSelectPagedParams> QuestBlockSelectPaged() {
  return {Unsupported, WorkspaceSize, Run};
}

}  // namespace select_attn::cuda
