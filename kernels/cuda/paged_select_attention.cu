// CUDA backend of paged_select_attention, in one launch.
//
// The tokens that a row of selected_indices could list, k * block_size places, are cut into chunks,
// where depends on k and block_size alone. An item of work is a chunk for up to 8 query heads that
// share a KV head: groups of threads, a thread of which has one or two vectors of channels, take
// its tokens in turn, each with a running maximum of its own. What the groups found is put together
// in shared memory, what the chunks found in the workspace, by the thread block that is done last;
// both in a fixed order, so that results do not depend on who that is. Floors: the bytes of keys
// and values over the bandwidth; per key and head two multiply-adds per channel, shared by the
// query heads, over the rate of those, several times lower for up to 8 heads.
//
// Workspace: a counter of finished chunks per (request, KV head, tile of query heads), then what
// was found per (request, query head, chunk). All of it is zero between calls, so that the next one
// may have other shapes.

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "cuda/backend.h"
#include "cuda/block_scan.cuh"
#include "cuda/clamped_ranges.h"
#include "cuda/elements.cuh"
#include "cuda/launch.h"
#include "cuda/limits.h"
#include "select_attn_ops/paged_select_attention.h"

namespace select_attn::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMostChunks = 64;
constexpr int kAlignment = 16;
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
constexpr float kInfinity = HUGE_VALF;

// How the selected tokens of a row are cut.
struct Chunks {
  int64_t places;  // of tokens, per chunk: a multiple of kThreads
  int64_t count;
};

__host__ __device__ inline Chunks ChunksFor(int64_t k, int64_t block_size) {
  const int64_t all = k * block_size;
  int64_t places = kThreads;
  if (all > kMostChunks * places) {
    places = ((all - 1) / kMostChunks / kThreads + 1) * kThreads;
  }
  return {places, all > places ? (all - 1) / places + 1 : 1};
}

struct Arguments {
  PagedSelectAttentionParams p;
  Chunks chunks;
  int64_t tiles;  // of the query heads of a KV head
  float scale;    // of the dot products, for powers of 2
  uint32_t* chunks_done;
  float* found;  // [batch, num_heads, chunks, kFoundHead + head_dim]
};

// Before the sums over the values in `found`: the maximum of the logits and the sum of the weights,
// which is negative where there is no token.
constexpr int kFoundHead = 2;
constexpr float kNoTokens = -1.0f;

// By how much what was summed up below a maximum `from` counts below a maximum `to` >= from, both
// as powers of 2. Sums below -inf are zero, or NaN, which stays.
__device__ inline float Rescale(float from, float to) {
  return from == -kInfinity ? 0.0f : exp2f(from - to);
}

// The weight of a logit below a maximum that is at least as large.
__device__ inline float Weight(float logit, float maximum) {
  return exp2f(logit - (maximum == -kInfinity ? 0.0f : maximum));
}

// The groups of kLanes threads that share a token, for kHeads query heads, kVectors vectors of
// channels per thread.
template <class ElementType, int kLanesPerToken, int kVectorsPerLane, int kHeadsPerTile,
          bool kRowsAligned>
struct Attention {
  using Element = ElementType;
  using Bits = typename Element::Bits;
  static constexpr int kLanes = kLanesPerToken;
  static constexpr int kVectors = kVectorsPerLane;
  static constexpr int kHeads = kHeadsPerTile;
  static constexpr int kGroups = kThreads / kLanes;
  static constexpr int kChannels = kVectors * kPerVector<Element>;  // of a thread
  static constexpr int kTokensInFlight = 16 / kHeads;  // of a group: as registers allow

  struct Shared {
    const Bits* keys[kThreads];  // of the tokens at hand; null where there is none
    const Bits* values[kThreads];
    float maximum[kHeads][kGroups];
    float weights[kHeads][kGroups];
    float sums[kHeads][kGroups][kLanes * kChannels];
    bool has_tokens;
    bool is_last;
  };

  // The first channel of a thread's vector v.
  __device__ static int Channel(int v) {
    return (static_cast<int>(threadIdx.x) % kLanes + v * kLanes) * kPerVector<Element>;
  }

  // A thread's channels of a row; zeros beyond head_dim, and of no row.
  __device__ static void Load(const Bits* row, int64_t head_dim, Words (&words)[kVectors]) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      words[v] = {};
      if (row == nullptr || Channel(v) >= head_dim) continue;
      words[v] = LoadVector<Element, kRowsAligned>(row + Channel(v));
    }
  }

  __device__ static void Widen(const Words (&words)[kVectors], float (&floats)[kChannels]) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int w = 0; w < kWordsPerVector; ++w) {
        Element::Widen(words[v].word[w], floats + v * kPerVector<Element> + w * Element::kPerWord);
      }
    }
  }

  // Where the keys and values of place `place` of row (b, n) are, null where no token is selected.
  __device__ static void Find(const PagedSelectAttentionParams& p, int64_t b, int64_t n,
                              int64_t place, const Bits*& key, const Bits*& value) {
    key = value = nullptr;
    if (place >= p.k * p.block_size) return;
    const int64_t j = p.selected_indices[b * p.selected_indices_strides[0] +
                                         n * p.selected_indices_strides[1] + place / p.block_size];
    const int64_t seq_len = Clamp(p.seq_lens[b], 0, INT32_MAX);
    const int64_t token = place % p.block_size;
    if (j < 0 || j >= p.max_kv_blocks_per_request || j * p.block_size + token >= seq_len) return;
    const int64_t block = p.block_tables[b * p.block_tables_stride + j];
    if (block < 0 || block >= p.num_kv_blocks) return;
    key = static_cast<const Bits*>(p.k_cache) + block * p.k_cache_strides[0] +
          token * p.k_cache_strides[1] + n * p.k_cache_strides[2];
    value = static_cast<const Bits*>(p.v_cache) + block * p.v_cache_strides[0] +
            token * p.v_cache_strides[1] + n * p.v_cache_strides[2];
  }

  // What a group of threads has seen; of the sums a thread has its channels.
  struct State {
    float maximum[kHeads];
    float weights[kHeads];
    float sums[kHeads][kChannels];
  };

  // Takes kTokensInFlight tokens, kGroups apart from `first` of those at hand.
  __device__ static void Take(const Shared& shared, int first, int64_t head_dim, float scale,
                              const float (&q)[kHeads][kChannels], State& state) {
    Words keys[kTokensInFlight][kVectors];
    Words values[kTokensInFlight][kVectors];
#pragma unroll
    for (int t = 0; t < kTokensInFlight; ++t) {
      Load(shared.keys[first + t * kGroups], head_dim, keys[t]);
    }
#pragma unroll
    for (int t = 0; t < kTokensInFlight; ++t) {
      Load(shared.values[first + t * kGroups], head_dim, values[t]);
    }
    float weights[kTokensInFlight][kHeads];
#pragma unroll
    for (int t = 0; t < kTokensInFlight; ++t) {
      float key[kChannels];
      Widen(keys[t], key);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float dot = 0.0f;
#pragma unroll
        for (int i = 0; i < kChannels; ++i) dot += q[h][i] * key[i];
        // Both halves add the same two numbers, so all threads of the group get the same bits.
#pragma unroll
        for (int distance = kLanes / 2; distance > 0; distance /= 2) {
          dot += __shfl_xor_sync(kWholeWarp, dot, distance);
        }
        weights[t][h] = shared.keys[first + t * kGroups] == nullptr ? -kInfinity : dot * scale;
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float maximum = state.maximum[h];
#pragma unroll
      for (int t = 0; t < kTokensInFlight; ++t) maximum = fmaxf(maximum, weights[t][h]);
      const float rescale = Rescale(state.maximum[h], maximum);
      state.maximum[h] = maximum;
      state.weights[h] *= rescale;
#pragma unroll
      for (int t = 0; t < kTokensInFlight; ++t) {
        weights[t][h] = Weight(weights[t][h], maximum);
        state.weights[h] += weights[t][h];
      }
#pragma unroll
      for (int i = 0; i < kChannels; ++i) state.sums[h][i] *= rescale;
    }
#pragma unroll
    for (int t = 0; t < kTokensInFlight; ++t) {
      float value[kChannels];
      Widen(values[t], value);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
#pragma unroll
        for (int i = 0; i < kChannels; ++i) state.sums[h][i] += weights[t][h] * value[i];
      }
    }
  }

  // Writes channel `d` of query head `h`, and of its first channel the log-sum-exp.
  __device__ static void Write(const PagedSelectAttentionParams& p, int64_t b, int64_t h, int d,
                               float maximum, float weights, float sum) {
    const bool is_empty = weights == kNoTokens;
    static_cast<Bits*>(p.out)[b * p.out_strides[0] + h * p.out_strides[1] + d] =
        Element::Narrow(is_empty ? 0.0f : sum / weights);
    if (d == 0 && p.lse != nullptr) {
      p.lse[b * p.lse_stride + h] =
          is_empty ? -kInfinity : (maximum == -kInfinity ? 0.0f : maximum * kLn2) + logf(weights);
    }
  }
};

template <class Attend>
__global__ void __launch_bounds__(kThreads) AttendToSelected(const Arguments arguments) {
  using Bits = typename Attend::Bits;
  constexpr int kHeads = Attend::kHeads;
  __shared__ typename Attend::Shared shared;
  const PagedSelectAttentionParams& p = arguments.p;
  const int thread = static_cast<int>(threadIdx.x);
  const int group = thread / Attend::kLanes;
  const int head_dim = static_cast<int>(p.head_dim);
  const int64_t heads_per_kv_head = p.num_heads / p.num_kv_heads;
  const int64_t found_stride = kFoundHead + p.head_dim;

  const int64_t items = p.batch * p.num_kv_heads * arguments.tiles * arguments.chunks.count;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t chunk = item % arguments.chunks.count;
    const int64_t row_tile = item / arguments.chunks.count;
    const int64_t tile = row_tile % arguments.tiles;
    const int64_t n = row_tile / arguments.tiles % p.num_kv_heads;
    const int64_t b = row_tile / arguments.tiles / p.num_kv_heads;
    const int64_t first_head = n * heads_per_kv_head + tile * kHeads;
    const int num_heads = static_cast<int>(Smaller(heads_per_kv_head - tile * kHeads, kHeads));

    float q[kHeads][Attend::kChannels];
    typename Attend::State state;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      Words words[Attend::kVectors];
      const Bits* head = static_cast<const Bits*>(p.query) + b * p.query_strides[0] +
                         (first_head + h) * p.query_strides[1];
      Attend::Load(h < num_heads ? head : nullptr, p.head_dim, words);
      Attend::Widen(words, q[h]);
      state.maximum[h] = -kInfinity;
      state.weights[h] = 0.0f;
      for (float& sum : state.sums[h]) sum = 0.0f;
    }

    if (thread == 0) shared.has_tokens = false;
    const int64_t begin = chunk * arguments.chunks.places;
    const int64_t end = Smaller(begin + arguments.chunks.places, p.k * p.block_size);
    for (int64_t place = begin; place < end; place += kThreads) {
      __syncthreads();  // nobody is at the tokens before
      Attend::Find(p, b, n, place + thread, shared.keys[thread], shared.values[thread]);
      if (shared.keys[thread] != nullptr) shared.has_tokens = true;
      __syncthreads();
      for (int first = group; first < kThreads;
           first += Attend::kTokensInFlight * Attend::kGroups) {
        Attend::Take(shared, first, p.head_dim, arguments.scale, q, state);
      }
    }

    for (int h = 0; h < kHeads; ++h) {
      if (thread % Attend::kLanes == 0) {
        shared.maximum[h][group] = state.maximum[h];
        shared.weights[h][group] = state.weights[h];
      }
      for (int i = 0; i < Attend::kChannels; ++i) {
        const int d = Attend::Channel(i / kPerVector<typename Attend::Element>) +
                      i % kPerVector<typename Attend::Element>;
        shared.sums[h][group][d] = state.sums[h][i];
      }
    }
    __syncthreads();
    for (int task = thread; task < num_heads * head_dim; task += kThreads) {
      const int h = task / head_dim;
      const int d = task % head_dim;
      float maximum = -kInfinity;
      for (int g = 0; g < Attend::kGroups; ++g) maximum = fmaxf(maximum, shared.maximum[h][g]);
      float weights = 0.0f;
      float sum = 0.0f;
      for (int g = 0; g < Attend::kGroups; ++g) {
        const float rescale = Rescale(shared.maximum[h][g], maximum);
        // Zero as they are, weights and sums of logits of -inf may yet be NaN.
        weights += rescale * shared.weights[h][g];
        sum += rescale * shared.sums[h][g][d];
      }
      if (!shared.has_tokens) weights = kNoTokens;
      const int64_t head = first_head + h;
      if (arguments.chunks.count == 1) {
        Attend::Write(p, b, head, d, maximum, weights, sum);
        continue;
      }
      float* found = arguments.found +
                     ((b * p.num_heads + head) * arguments.chunks.count + chunk) * found_stride;
      if (d == 0) {
        found[0] = maximum;
        found[1] = weights;
      }
      found[kFoundHead + d] = sum;
    }

    if (arguments.chunks.count > 1) {
      __syncthreads();  // what the chunk found is written
      if (thread == 0) {
        const auto chunks = static_cast<uint32_t>(arguments.chunks.count);
        __threadfence();
        shared.is_last = atomicAdd(arguments.chunks_done + row_tile, 1u) + 1 == chunks;
        __threadfence();
        if (shared.is_last) arguments.chunks_done[row_tile] = 0;  // ready for the next call
      }
      __syncthreads();
      if (shared.is_last) {
        float* found_first = arguments.found +
                             (b * p.num_heads + first_head) * arguments.chunks.count * found_stride;
        for (int task = thread; task < num_heads * head_dim; task += kThreads) {
          const int h = task / head_dim;
          const int d = task % head_dim;
          const float* found = found_first + h * arguments.chunks.count * found_stride;
          float maximum = -kInfinity;
          for (int64_t c = 0; c < arguments.chunks.count; ++c) {
            maximum = fmaxf(maximum, __ldcg(found + c * found_stride));
          }
          float weights = kNoTokens;
          float sum = 0.0f;
          for (int64_t c = 0; c < arguments.chunks.count; ++c) {
            const float* of_chunk = found + c * found_stride;
            const float its_weights = __ldcg(of_chunk + 1);
            if (its_weights == kNoTokens) continue;
            const float rescale = Rescale(__ldcg(of_chunk), maximum);
            weights = (weights == kNoTokens ? 0.0f : weights) + rescale * its_weights;
            sum += rescale * __ldcg(of_chunk + kFoundHead + d);
          }
          Attend::Write(p, b, first_head + h, d, maximum, weights, sum);
        }
        __syncthreads();  // everything found is read
        const int64_t size = num_heads * arguments.chunks.count * found_stride;
        for (int64_t i = thread; i < size; i += kThreads) found_first[i] = 0.0f;
      }
    }
    __syncthreads();  // before the next item overwrites what is shared
  }
}

const char* Unsupported(const PagedSelectAttentionParams& p, DLDevice device) {
  const char* limit = UnsupportedDevice(device);
  return limit != nullptr ? limit : UnsupportedHeadDim(p.head_dim);
}

// Query heads that an item of work takes.
int HeadsPerTile(const PagedSelectAttentionParams& p) {
  return p.num_heads / p.num_kv_heads > 4 ? 8 : 4;
}

int64_t Tiles(const PagedSelectAttentionParams& p) {
  return (p.num_heads / p.num_kv_heads - 1) / HeadsPerTile(p) + 1;
}

int64_t CounterBytes(const PagedSelectAttentionParams& p) {
  const int64_t bytes = p.batch * p.num_kv_heads * Tiles(p) * int64_t{sizeof(uint32_t)};
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// With room to align the whole.
int64_t WorkspaceSize(const PagedSelectAttentionParams& p, DLDevice /*device*/) {
  const int64_t chunks = ChunksFor(p.k, p.block_size).count;
  if (chunks == 1) return 0;
  return kAlignment - 1 + CounterBytes(p) +
         p.batch * p.num_heads * chunks * (kFoundHead + p.head_dim) * int64_t{sizeof(float)};
}

template <class Attend>
const char* LaunchWith(const Arguments& arguments, DLDevice device, Stream stream) {
  const PagedSelectAttentionParams& p = arguments.p;
  const int64_t rows = Smaller(p.batch * p.num_kv_heads * arguments.tiles, int64_t{1} << 30);
  return Launch<AttendToSelected<Attend>, kThreads>(arguments, rows * arguments.chunks.count,
                                                    device, stream);
}

// The order of the sums depends on the lanes, so these must not depend on the alignment.
template <class Element, int kHeads, bool kAligned>
const char* RunWith(const Arguments& arguments, DLDevice device, Stream stream) {
  const int64_t vectors = arguments.p.head_dim / kPerVector<Element>;
  if (vectors <= 8) {
    return LaunchWith<Attention<Element, 8, 1, kHeads, kAligned>>(arguments, device, stream);
  }
  if (vectors <= 16) {
    return LaunchWith<Attention<Element, 16, 1, kHeads, kAligned>>(arguments, device, stream);
  }
  if (vectors <= 32) {
    return LaunchWith<Attention<Element, 32, 1, kHeads, kAligned>>(arguments, device, stream);
  }
  if constexpr (kPerVector<Element> * 32 < kMostHeadDim) {
    return LaunchWith<Attention<Element, 32, 2, kHeads, kAligned>>(arguments, device, stream);
  }
  return "unknown head dim";
}

template <class Element>
const char* RunFor(const PagedSelectAttentionParams& p, DLDevice device, Stream stream) {
  auto address = reinterpret_cast<uintptr_t>(p.workspace);
  address += -address % kAlignment;
  auto* counters = reinterpret_cast<uint32_t*>(address);
  const Arguments arguments = {
      p,        ChunksFor(p.k, p.block_size),
      Tiles(p), static_cast<float>(p.scale * double{kLog2E}),
      counters, reinterpret_cast<float*>(counters + CounterBytes(p) / int64_t{sizeof(uint32_t)})};
  const int64_t heads[] = {p.batch, p.num_heads};
  const int64_t rows[] = {p.num_kv_blocks, p.block_size, p.num_kv_heads};
  const bool aligned = RowsAreAligned<Element>(p.query, heads, p.query_strides) &&
                       RowsAreAligned<Element>(p.k_cache, rows, p.k_cache_strides) &&
                       RowsAreAligned<Element>(p.v_cache, rows, p.v_cache_strides);
  const bool has_many_heads = HeadsPerTile(p) == 8;
  if (aligned) {
    return has_many_heads ? RunWith<Element, 8, true>(arguments, device, stream)
                          : RunWith<Element, 4, true>(arguments, device, stream);
  }
  return has_many_heads ? RunWith<Element, 8, false>(arguments, device, stream)
                        : RunWith<Element, 4, false>(arguments, device, stream);
}

const char* Run(const PagedSelectAttentionParams& p, DLDevice device, Stream stream) {
  return ForElement(p.dtype,
                    [&](auto element) { return RunFor<decltype(element)>(p, device, stream); });
}

}  // namespace

BackendOperator<PagedSelectAttentionParams> PagedSelectAttention() {
  return {Unsupported, WorkspaceSize, Run};
}

}  // namespace select_attn::cuda
