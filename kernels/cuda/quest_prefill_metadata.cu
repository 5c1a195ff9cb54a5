// CUDA backend of quest_prefill_metadata.
//
// An item of work is a KV head of one or several consecutive KV blocks. The threads of a thread
// block are cut into groups, a thread of which has one vector of channels; a KV block's tokens are
// dealt over one group or several, whose maxima and minima then meet in shared memory. Floors: the
// bytes of the keys and rows over the bandwidth, and two packed comparisons per word over the rate
// of those, a few times lower.

#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/backend.h"
#include "cuda/batch_walk.cuh"
#include "cuda/clamped_ranges.h"
#include "cuda/elements.cuh"
#include "cuda/launch.h"
#include "cuda/limits.h"
#include "select_attn_ops/quest_prefill_metadata.h"

namespace select_attn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTokensInFlight = 8;  // vectors that a thread asks for before it looks at the first

// How the threads share an item; it depends on shapes alone.
struct Shares {
  int vectors;           // of a row: threads of a group
  int groups_per_block;  // that share the tokens of a KV block
  int blocks_per_item;
};

__host__ __device__ inline Shares SharesFor(int vectors, int64_t block_size) {
  const int groups = kThreads / vectors;
  int groups_per_block = 1;
  while (2 * groups_per_block <= groups && groups_per_block * kTokensInFlight < block_size) {
    groups_per_block *= 2;
  }
  return {vectors, groups_per_block, groups / groups_per_block};
}

struct Arguments {
  QuestPrefillMetadataParams p;
  Shares shares;
};

struct Shared {
  BatchWalk<kThreads>::Storage walk;
  Words max[kThreads];
  Words min[kThreads];
};

// The maximum and minimum of the keys of tokens first, first + step, ... of a KV block with
// num_tokens > 0, at one vector of channels. A token beyond the last counts as the last.
template <class Element, bool kAligned>
__device__ void Reduce(const typename Element::Bits* keys, int64_t stride, int64_t num_tokens,
                       int first, int step, Words& max, Words& min) {
  const auto load = [&](int64_t token) {
    return LoadVector<Element, kAligned>(keys + Smaller(token, num_tokens - 1) * stride);
  };
  const auto merge = [&](const Words& vector) {
    for (int w = 0; w < kWordsPerVector; ++w) {
      max.word[w] = Element::Max(max.word[w], vector.word[w]);
      min.word[w] = Element::Min(min.word[w], vector.word[w]);
    }
  };
  int64_t token = first;
  max = min = load(token);
  if (num_tokens >= int64_t{kTokensInFlight} * step) {
    Words vectors[kTokensInFlight - 1];
#pragma unroll
    for (int i = 1; i < kTokensInFlight; ++i) vectors[i - 1] = load(token + i * step);
#pragma unroll
    for (int i = 1; i < kTokensInFlight; ++i) merge(vectors[i - 1]);
    token += kTokensInFlight * step;
    for (; token - first + kTokensInFlight * step <= num_tokens; token += kTokensInFlight * step) {
      Words more[kTokensInFlight];
#pragma unroll
      for (int i = 0; i < kTokensInFlight; ++i) more[i] = load(token + i * step);
#pragma unroll
      for (int i = 0; i < kTokensInFlight; ++i) merge(more[i]);
    }
  } else {
    token += step;
  }
  for (; token < num_tokens; token += step) merge(load(token));
}

// A row of metadata, or null where the table's entry is bad.
template <class Bits>
__device__ Bits* RowOrNull(const QuestPrefillMetadataParams& p, void* blocks,
                           const int64_t* strides, int64_t b, int64_t j, int64_t n) {
  const int64_t rows = p.rows_per_metadata_block;
  const int64_t block = p.metadata_block_tables[b * p.metadata_block_tables_stride + j / rows];
  if (block < 0 || block >= p.num_metadata_blocks) return nullptr;
  return static_cast<Bits*>(blocks) + block * strides[0] + j % rows * strides[1] + n * strides[2];
}

// Zeroes what lies behind the request's last row in its metadata block, of KV head n.
template <class Element, bool kAligned>
__device__ void ClearRowsBehind(const QuestPrefillMetadataParams& p, const Update& update,
                                int64_t b, int64_t n) {
  using Bits = typename Element::Bits;
  const int64_t last = update.blocks.end - 1;
  const int64_t row = last % p.rows_per_metadata_block;
  if (last - row < update.blocks.begin) return;
  Bits* max = RowOrNull<Bits>(p, p.maxblocks, p.maxblocks_strides, b, last, n);
  Bits* min = RowOrNull<Bits>(p, p.minblocks, p.minblocks_strides, b, last, n);
  if (max == nullptr) return;
  const int64_t words = p.head_dim / Element::kPerWord;
  const int64_t behind = p.rows_per_metadata_block - 1 - row;
  for (int64_t i = threadIdx.x; i < behind * words; i += kThreads) {
    const int64_t down = i / words + 1;
    const int64_t across = i % words * Element::kPerWord;
    StoreWord<Element, kAligned>(max + down * p.maxblocks_strides[1] + across, 0);
    StoreWord<Element, kAligned>(min + down * p.minblocks_strides[1] + across, 0);
  }
}

template <class Element, bool kAligned>
__global__ void __launch_bounds__(kThreads, 2) UpdateMetadata(const Arguments arguments) {
  using Bits = typename Element::Bits;
  __shared__ Shared shared;
  const QuestPrefillMetadataParams& p = arguments.p;
  const Shares& shares = arguments.shares;
  const int thread = static_cast<int>(threadIdx.x);
  const int group = thread / shares.vectors;
  const int vector = thread % shares.vectors;
  const int block_of_group = group / shares.groups_per_block;
  const bool takes_part = block_of_group < shares.blocks_per_item;
  const int words = shares.vectors * kWordsPerVector;

  const auto num_items = [&](int64_t b) {
    const BlockRange blocks = ClampedUpdate(p, b).blocks;
    if (blocks.empty()) return int64_t{0};
    return ((blocks.end - blocks.begin - 1) / shares.blocks_per_item + 1) * p.num_kv_heads;
  };
  BatchWalk<kThreads> walk(shared.walk, p.batch);
  for (BatchWalk<kThreads>::Item item; walk.Next(num_items, item);) {
    const int64_t b = item.request;
    const int64_t n = item.number % p.num_kv_heads;
    const Update update = ClampedUpdate(p, b);
    const int64_t begin =
        update.blocks.begin + item.number / p.num_kv_heads * shares.blocks_per_item;
    const int num_blocks =
        static_cast<int>(Smaller(shares.blocks_per_item, update.blocks.end - begin));

    if (takes_part && block_of_group < num_blocks) {
      const int64_t j = begin + block_of_group;
      const int64_t block = p.block_tables[b * p.block_tables_stride + j];
      Words max = {};
      Words min = {};
      if (block >= 0 && block < p.num_kv_blocks) {
        const Bits* keys = static_cast<const Bits*>(p.k_cache) + block * p.k_cache_strides[0] +
                           n * p.k_cache_strides[2] + vector * kPerVector<Element>;
        Reduce<Element, kAligned>(keys, p.k_cache_strides[1], update.NumTokens(j, p.block_size),
                                  group % shares.groups_per_block, shares.groups_per_block, max,
                                  min);
      }
      shared.max[thread] = max;
      shared.min[thread] = min;
    }
    __syncthreads();

    // One word of one row at a time: what the groups of its KV block found there.
    for (int task = thread; task < 2 * num_blocks * words; task += kThreads) {
      const bool is_max = task % (2 * words) < words;
      const int of_item = task / (2 * words);
      const int word = task % words;
      const Words* found = (is_max ? shared.max : shared.min) +
                           of_item * shares.groups_per_block * shares.vectors +
                           word / kWordsPerVector;
      uint32_t result = found->word[word % kWordsPerVector];
      for (int other = 1; other < shares.groups_per_block; ++other) {
        const uint32_t theirs = found[other * shares.vectors].word[word % kWordsPerVector];
        result = is_max ? Element::Max(result, theirs) : Element::Min(result, theirs);
      }
      Bits* row = RowOrNull<Bits>(p, is_max ? p.maxblocks : p.minblocks,
                                  is_max ? p.maxblocks_strides : p.minblocks_strides, b,
                                  begin + of_item, n);
      if (row != nullptr) {
        StoreWord<Element, kAligned>(row + word * Element::kPerWord, result);
      }
    }
    if (begin + num_blocks == update.blocks.end)
      ClearRowsBehind<Element, kAligned>(p, update, b, n);
    __syncthreads();  // before the next item overwrites what is shared
  }
}

const char* Unsupported(const QuestPrefillMetadataParams& p, DLDevice device) {
  const char* limit = UnsupportedDevice(device);
  return limit != nullptr ? limit : UnsupportedHeadDim(p.head_dim);
}

template <class Element>
const char* RunFor(const QuestPrefillMetadataParams& p, DLDevice device, Stream stream) {
  const Arguments arguments = {
      p, SharesFor(static_cast<int>(p.head_dim) / kPerVector<Element>, p.block_size)};
  const int64_t capacity =
      Smaller(p.max_kv_blocks_per_request,
              DescribedBlocks(p.max_metadata_blocks_per_request, p.rows_per_metadata_block));
  if (p.batch == 0 || capacity == 0) return nullptr;
  // At most as many items as the tables could name; a grid needs no exact number.
  const double items = static_cast<double>(p.batch) * static_cast<double>(p.num_kv_heads) *
                       static_cast<double>(capacity);
  const auto most = static_cast<int64_t>(std::min(items, 1e9));
  const int64_t keys[] = {p.num_kv_blocks, p.block_size, p.num_kv_heads};
  const int64_t rows[] = {p.num_metadata_blocks, p.rows_per_metadata_block, p.num_kv_heads};
  const bool aligned = RowsAreAligned<Element>(p.k_cache, keys, p.k_cache_strides) &&
                       RowsAreAligned<Element>(p.maxblocks, rows, p.maxblocks_strides) &&
                       RowsAreAligned<Element>(p.minblocks, rows, p.minblocks_strides);
  return aligned
             ? Launch<UpdateMetadata<Element, true>, kThreads>(arguments, most, device, stream)
             : Launch<UpdateMetadata<Element, false>, kThreads>(arguments, most, device, stream);
}

const char* Run(const QuestPrefillMetadataParams& p, DLDevice device, Stream stream) {
  return ForElement(p.dtype,
                    [&](auto element) { return RunFor<decltype(element)>(p, device, stream); });
}

}  // namespace

BackendOperator<QuestPrefillMetadataParams> QuestPrefillMetadata() {
  return {Unsupported, nullptr, Run};
}

}  // namespace select_attn::cuda
