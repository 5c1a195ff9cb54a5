// CPU backend of quest_prefill_metadata, compiled once per SIMD target by foreach_target.h.
//
// Keys are compared as integers: the bits of a float, mapped so that their order as signed integers
// is that of the floats. One code path thus serves all dtypes, 16-bit keys are never widened, and
// NaN, which the map puts beyond both infinities, is found in the result instead of at every key.

#include "select_attn_ops/quest_prefill_metadata.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "core/block_ranges.h"
#include "cpu/backend.h"
#include "cpu/parallel.h"
#include "cpu/pool_order.h"
#include "cpu/prefetch.h"
#include "cpu/tiles.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/quest_prefill_metadata.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// After foreach_target.h
#include "hwy/cache_control.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace select_attn::cpu {
namespace HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

// Storage of a dtype and its bit patterns. Those of -inf and NaN follow from +inf.
struct Float16 {
  using Bits = int16_t;
  static constexpr Bits kInfinity = 0x7C00;
  static constexpr Bits kNaN = 0x7E00;
};
struct BFloat16 {
  using Bits = int16_t;
  static constexpr Bits kInfinity = 0x7F80;
  static constexpr Bits kNaN = 0x7FC0;
};
struct Float32 {
  using Bits = int32_t;
  static constexpr Bits kInfinity = 0x7F800000;
  static constexpr Bits kNaN = 0x7FC00000;
};

// Between the bits of a float and the integer that orders it; its own inverse.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Ordered(D d, V bits) {
  const auto magnitude = hn::Set(d, std::numeric_limits<hn::TFromD<D>>::max());
  return hn::Xor(bits, hn::And(hn::BroadcastSignBit(bits), magnitude));
}

// Calls fn(d, i) such that vectors at the i cover [0, count). The last one may overlap the one
// before it: fn must not mind to see an element twice. Rows too short for a full vector get shorter
// ones.
template <typename Bits, typename F>
HWY_INLINE void ForEachVector(int64_t count, F&& fn) {
  const auto for_each = [&](auto d) HWY_ATTR {
    const auto lanes = static_cast<int64_t>(hn::Lanes(d));
    if (count < lanes) return false;
    for (int64_t i = 0; i + lanes <= count; i += lanes) fn(d, i);
    if (count % lanes != 0) fn(d, count - lanes);
    return true;
  };
  for_each(hn::ScalableTag<Bits>()) || for_each(hn::CappedTag<Bits, 8>()) ||
      for_each(hn::CappedTag<Bits, 1>());
}

// Asks for the cache lines that the vector at element i of a row covers or begins.
template <class D, typename Prefetch>
HWY_INLINE void PrefetchVector(D d, int64_t i, const hn::TFromD<D>* at, Prefetch prefetch) {
  constexpr auto kLine = static_cast<int64_t>(kCacheLine / sizeof(hn::TFromD<D>));
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  if (lanes < kLine && i % kLine != 0) return;
  for (int64_t line = 0; line < lanes; line += kLine) prefetch(at + line);
}

// Merges kTokens rows of `count` keys, each `stride` after the one before, into max and min, which
// hold ordered integers. Asks for the same places of to_l1 and to_l2, which are rows that come
// later, or the rows themselves where there are none.
template <int kTokens, typename Bits>
HWY_INLINE void MergeTokens(const Bits* HWY_RESTRICT keys, const Bits* to_l1, const Bits* to_l2,
                            int64_t stride, int64_t count, Bits* HWY_RESTRICT max,
                            Bits* HWY_RESTRICT min) {
  ForEachVector<Bits>(count, [&](auto d, int64_t i) HWY_ATTR {
    auto vmax = hn::LoadU(d, max + i);
    auto vmin = hn::LoadU(d, min + i);
    for (int t = 0; t < kTokens; ++t) {
      const int64_t place = t * stride + i;
      PrefetchVector(d, i, to_l1 + place, PrefetchToL1);
      PrefetchVector(d, i, to_l2 + place, PrefetchToL2);
      const auto key = Ordered(d, hn::LoadU(d, keys + place));
      vmax = hn::Max(vmax, key);
      vmin = hn::Min(vmin, key);
    }
    hn::StoreU(vmax, d, max + i);
    hn::StoreU(vmin, d, min + i);
  });
}

// Merges num_tokens rows of `count` keys, as MergeTokens, in strips of a few vectors whose max and
// min stay in registers. Asks for the same places of the rows that are next.
template <typename Bits>
HWY_INLINE void ReduceStrips(const Bits* HWY_RESTRICT keys, const Bits* next, int64_t stride,
                             int64_t num_tokens, int64_t count, Bits* HWY_RESTRICT max,
                             Bits* HWY_RESTRICT min) {
  constexpr int kVectors = 4;
  const hn::ScalableTag<Bits> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + kVectors * lanes <= count; i += kVectors * lanes) {
    auto max0 = hn::LoadU(d, max + i);
    auto max1 = hn::LoadU(d, max + i + lanes);
    auto max2 = hn::LoadU(d, max + i + 2 * lanes);
    auto max3 = hn::LoadU(d, max + i + 3 * lanes);
    auto min0 = hn::LoadU(d, min + i);
    auto min1 = hn::LoadU(d, min + i + lanes);
    auto min2 = hn::LoadU(d, min + i + 2 * lanes);
    auto min3 = hn::LoadU(d, min + i + 3 * lanes);
    for (int64_t t = 0; t < num_tokens; ++t) {
      const int64_t place = t * stride + i;
      const auto merge = [&](int64_t vector, auto& vmax, auto& vmin) HWY_ATTR {
        // A strip is made of whole lines, so its own offset makes no difference.
        PrefetchVector(d, vector * lanes, next + place + vector * lanes, PrefetchToL2);
        const auto key = Ordered(d, hn::LoadU(d, keys + place + vector * lanes));
        vmax = hn::Max(vmax, key);
        vmin = hn::Min(vmin, key);
      };
      merge(0, max0, min0);
      merge(1, max1, min1);
      merge(2, max2, min2);
      merge(3, max3, min3);
    }
    hn::StoreU(max0, d, max + i);
    hn::StoreU(max1, d, max + i + lanes);
    hn::StoreU(max2, d, max + i + 2 * lanes);
    hn::StoreU(max3, d, max + i + 3 * lanes);
    hn::StoreU(min0, d, min + i);
    hn::StoreU(min1, d, min + i + lanes);
    hn::StoreU(min2, d, min + i + 2 * lanes);
    hn::StoreU(min3, d, min + i + 3 * lanes);
  }
  if (i == count) return;
  for (int64_t t = 0; t < num_tokens; ++t) {
    const Bits* row = keys + t * stride + i;
    const Bits* later = next + t * stride + i;
    MergeTokens<1>(row, row, later, stride, count - i, max + i, min + i);
  }
}

// Turns ordered integers back into floats; both are NaN if a NaN was among the keys.
template <typename Type, class D, class V = hn::Vec<D>>
HWY_INLINE void ToFloats(D d, V& max, V& min) {
  const auto infinity = hn::Set(d, Type::kInfinity);
  const auto is_nan = hn::Or(hn::Gt(max, infinity), hn::Lt(min, hn::Not(infinity)));
  const auto nan = hn::Set(d, Type::kNaN);
  max = hn::IfThenElse(is_nan, nan, Ordered(d, max));
  min = hn::IfThenElse(is_nan, nan, Ordered(d, min));
}

template <typename Type, typename Bits = typename Type::Bits>
HWY_INLINE void StoreRow(const Bits* HWY_RESTRICT max, const Bits* HWY_RESTRICT min, int64_t count,
                         Bits* HWY_RESTRICT max_out, Bits* HWY_RESTRICT min_out) {
  ForEachVector<Bits>(count, [&](auto d, int64_t i) HWY_ATTR {
    auto vmax = hn::LoadU(d, max + i);
    auto vmin = hn::LoadU(d, min + i);
    ToFloats<Type>(d, vmax, vmin);
    hn::StoreU(vmax, d, max_out + i);
    hn::StoreU(vmin, d, min_out + i);
  });
}

// As StoreRow, past the caches.
// False, and nothing stored, unless they are made of whole cache lines. FlushStream makes the
// stores visible to other threads.
template <typename Type, typename Bits = typename Type::Bits>
HWY_INLINE bool StreamRow(const Bits* HWY_RESTRICT max, const Bits* HWY_RESTRICT min, int64_t count,
                          Bits* HWY_RESTRICT max_out, Bits* HWY_RESTRICT min_out) {
  constexpr uintptr_t kLine = static_cast<uintptr_t>(kCacheLine);
  const auto address = reinterpret_cast<uintptr_t>(max_out) | reinterpret_cast<uintptr_t>(min_out);
  if ((address | static_cast<uintptr_t>(count) * sizeof(Bits)) % kLine != 0) return false;
  const hn::CappedTag<Bits, kCacheLine / sizeof(Bits)> d;
  for (int64_t i = 0; i < count; i += static_cast<int64_t>(hn::Lanes(d))) {
    auto vmax = hn::LoadU(d, max + i);
    auto vmin = hn::LoadU(d, min + i);
    ToFloats<Type>(d, vmax, vmin);
    hn::Stream(vmax, d, max_out + i);
    hn::Stream(vmin, d, min_out + i);
  }
  return true;
}

template <typename Type>
class MetadataPass {
  using Bits = typename Type::Bits;

 public:
  explicit MetadataPass(const QuestPrefillMetadataParams& p) : p_(p) {
    int64_t num_blocks = 0;
    for (int64_t b = 0; b < p.batch; ++b) num_blocks += NumBlocks(b);
    past_caches_ = num_blocks > kBytesOfALargePass / block_bytes();
  }

  void Run() const {
    const PoolOrder order = block_bytes() <= kShortBlockBytes ? BlocksInPool() : PoolOrder();
    if (order.pays()) {
      RunInPoolOrder(order);
    } else {
      RunInTiles();
    }
  }

 private:
  // Beyond so much that is read, rows are stored past the caches, which saves to read what they
  // overwrite: most have left the caches by the end of the call.
  static constexpr int64_t kBytesOfALargePass = int64_t{16} << 20;

  struct Accumulators {  // [num_kv_heads, head_dim], ordered integers
    explicit Accumulators(int64_t size)
        : max(static_cast<size_t>(size)), min(static_cast<size_t>(size)) {}

    void Reset() {
      std::fill(max.begin(), max.end(), std::numeric_limits<Bits>::min());
      std::fill(min.begin(), min.end(), std::numeric_limits<Bits>::max());
    }

    std::vector<Bits> max;
    std::vector<Bits> min;
  };

  // Row j of request b.
  Bits* Row(void* blocks, const int64_t* strides, int64_t b, int64_t j) const {
    const int64_t rows = p_.rows_per_metadata_block;
    const int64_t block = p_.metadata_block_tables[b * p_.metadata_block_tables_stride + j / rows];
    return static_cast<Bits*>(blocks) + block * strides[0] + j % rows * strides[1];
  }
  Bits* MaxRow(int64_t b, int64_t j) const { return Row(p_.maxblocks, p_.maxblocks_strides, b, j); }
  Bits* MinRow(int64_t b, int64_t j) const { return Row(p_.minblocks, p_.minblocks_strides, b, j); }

  int64_t NumBlocks(int64_t b) const {
    const BlockRange range = BlocksToUpdate(p_, b);
    return std::max<int64_t>(range.end - range.begin, 0);
  }

  int64_t block_bytes() const {
    return p_.block_size * p_.num_kv_heads * p_.head_dim * int64_t{sizeof(Bits)};
  }

  // Of block j of request b, the first token's first head.
  const Bits* Keys(int64_t b, int64_t j) const {
    const int64_t block = p_.block_tables[b * p_.block_tables_stride + j];
    return static_cast<const Bits*>(p_.k_cache) + block * p_.k_cache_strides[0];
  }

  // The blocks that are read.
  PoolOrder BlocksInPool() const {
    return PoolOrder(
        p_.batch, [this](int64_t b) { return BlocksToUpdate(p_, b); },
        [this](int64_t b) { return p_.block_tables + b * p_.block_tables_stride; });
  }

  struct Block {
    int64_t b;  // request
    int64_t j;  // KV block within it
  };

  void RunInTiles() const {
    const Tiles tiles(p_.batch, block_bytes(), [this](int64_t b) { return NumBlocks(b); });
    tiles.ParallelTake([&](Tiles::Queue& queue) {
      Tiles::Tile tile = {0, 0, 0};
      UpdateBlocks([&](Block& block) {
        if (tile.begin == tile.end && !queue.Take(tile)) return false;
        block = {tile.b, BlocksToUpdate(p_, tile.b).begin + tile.begin};
        ++tile.begin;
        return true;
      });
    });
  }

  void RunInPoolOrder(const PoolOrder& order) const {
    order.ParallelTake(block_bytes(), [this](PoolOrder::Queue& queue) {
      UpdateBlocks([&](Block& block) {
        PoolOrder::Block in_pool;
        if (!queue.Take(in_pool)) return false;
        block = {in_pool.request, in_pool.number};
        return true;
      });
    });
  }

  // Writes the metadata of every block that take(block) gives, until it gives none. Each is taken
  // before the one before it is read, so that its keys can be asked for in time.
  template <typename Take>
  void UpdateBlocks(Take&& take) const {
    Block block;
    bool more = take(block);
    if (!more) return;
    Accumulators accumulators(p_.num_kv_heads * p_.head_dim);
    while (more) {
      Block next = block;
      more = take(next);
      ReduceBlock(block, next, accumulators);
      StoreBlock(block, accumulators);
      const BlockRange range = BlocksToUpdate(p_, block.b);
      if (block.j == range.end - 1) ClearRowsBehind(block.b, range);
      block = next;
    }
    if (past_caches_) hwy::FlushStream();
  }

  // Leaves the maxima and minima of the keys of a block in `accumulators`, and asks for those of
  // the next one.
  void ReduceBlock(const Block& block, const Block& next, Accumulators& accumulators) const {
    const int64_t num_tokens = NumTokens(p_, block.b, block.j);
    const Bits* keys = Keys(block.b, block.j);
    const Bits* next_keys = Keys(next.b, next.j);
    accumulators.Reset();
    Bits* max = accumulators.max.data();
    Bits* min = accumulators.min.data();
    const int64_t head_stride = p_.k_cache_strides[2];
    if (head_stride == p_.head_dim || p_.num_kv_heads == 1) {
      ReduceTokens(keys, next_keys, num_tokens, p_.num_kv_heads * p_.head_dim, max, min);
      return;
    }
    for (int64_t n = 0; n < p_.num_kv_heads; ++n) {
      const Bits* head = keys + n * head_stride;
      const bool is_last = n == p_.num_kv_heads - 1;
      ReduceTokens(head, is_last ? next_keys : head + head_stride, num_tokens, p_.head_dim,
                   max + n * p_.head_dim, min + n * p_.head_dim);
    }
  }

  void StoreBlock(const Block& block, const Accumulators& accumulators) const {
    Bits* max_row = MaxRow(block.b, block.j);
    Bits* min_row = MinRow(block.b, block.j);
    for (int64_t n = 0; n < p_.num_kv_heads; ++n) {
      const Bits* max = accumulators.max.data() + n * p_.head_dim;
      const Bits* min = accumulators.min.data() + n * p_.head_dim;
      Bits* max_out = max_row + n * p_.maxblocks_strides[2];
      Bits* min_out = min_row + n * p_.minblocks_strides[2];
      if (!past_caches_ || !StreamRow<Type>(max, min, p_.head_dim, max_out, min_out)) {
        StoreRow<Type>(max, min, p_.head_dim, max_out, min_out);
      }
    }
  }

  // The parts of a block are read side by side, so that max and min are loaded and stored once for
  // a token of each. Hardware prefetches a few long streams, but loses track of streams that share
  // a page: blocks with so little memory are read in one go.
  void ReduceTokens(const Bits* keys, const Bits* next, int64_t num_tokens, int64_t count,
                    Bits* max, Bits* min) const {
    constexpr int kParts = 4;
    constexpr int64_t kPageBytes = 4096;
    const int64_t stride = p_.k_cache_strides[1];
    const int64_t part = num_tokens / kParts;
    if (part * stride * int64_t{sizeof(Bits)} < kPageBytes) {
      ReduceStrips(keys, next, stride, num_tokens, count, max, min);
      return;
    }
    // What is read in the first part so many bytes after row t, which may be in the first part of
    // the next block; the other parts are like it. Rows with gaps between them are counted whole.
    const auto ahead = [&](int64_t t, int64_t bytes) {
      const int64_t elements = bytes / (kParts * int64_t{sizeof(Bits)});
      const bool is_dense = stride == count;
      const int64_t row = t + (is_dense ? elements / count : (elements - 1) / count + 1);
      const Bits* from =
          row < part ? keys + row * stride : next + std::min(row - part, part - 1) * stride;
      return from + (is_dense ? elements % count : 0);
    };
    for (int64_t t = 0; t < part; ++t) {
      MergeTokens<kParts>(keys + t * stride, ahead(t, kAheadToL1), ahead(t, kAheadToL2),
                          part * stride, count, max, min);
    }
    for (int64_t t = part * kParts; t < num_tokens; ++t) {
      const Bits* row = keys + t * stride;
      MergeTokens<1>(row, row, row, stride, count, max, min);
    }
  }

  // Zeroes the rows behind the last one in its metadata block, if the call writes row 0 of that.
  void ClearRowsBehind(int64_t b, BlockRange range) const {
    const int64_t rows = p_.rows_per_metadata_block;
    const int64_t last = range.end - 1;
    if (last - last % rows < range.begin) return;
    const auto bytes = static_cast<size_t>(p_.head_dim) * sizeof(Bits);
    for (int64_t i = 1; i < rows - last % rows; ++i) {
      for (int64_t n = 0; n < p_.num_kv_heads; ++n) {
        std::memset(MaxRow(b, last) + i * p_.maxblocks_strides[1] + n * p_.maxblocks_strides[2], 0,
                    bytes);
        std::memset(MinRow(b, last) + i * p_.minblocks_strides[1] + n * p_.minblocks_strides[2], 0,
                    bytes);
      }
    }
  }

  const QuestPrefillMetadataParams& p_;
  bool past_caches_ = false;  // whether rows are stored past the caches
};

void Run(const QuestPrefillMetadataParams& p) {
  switch (p.dtype) {
    case DType::kFloat16:
      return MetadataPass<Float16>(p).Run();
    case DType::kBFloat16:
      return MetadataPass<BFloat16>(p).Run();
    case DType::kFloat32:
      return MetadataPass<Float32>(p).Run();
  }
}

}  // namespace
// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace select_attn::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace select_attn::cpu {

HWY_EXPORT(Run);

// Dispatches once per call, so the choice of target costs nothing inside the loops.
void QuestPrefillMetadata(const QuestPrefillMetadataParams& p) { HWY_DYNAMIC_DISPATCH(Run)(p); }

}  // namespace select_attn::cpu
#endif  // HWY_ONCE
