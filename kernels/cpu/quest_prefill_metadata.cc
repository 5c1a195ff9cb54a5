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
#include "cpu/upcoming.h"

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

// Merges the vector at element i of a row of keys into max and min, which hold ordered integers.
// Asks for the same place of to_l1 and, if twice, to_l2, which are rows that come later, or the row
// itself.
template <Ask kAsk, class D, class T = hn::TFromD<D>>
HWY_INLINE void MergeVector(D d, int64_t i, const T* keys, const T* to_l1, const T* to_l2,
                            hn::Vec<D>& max, hn::Vec<D>& min) {
  PrefetchVector(d, i, to_l1 + i, PrefetchToL1);
  if constexpr (kAsk == Ask::kTwice) PrefetchVector(d, i, to_l2 + i, PrefetchToL2);
  const auto key = Ordered(d, hn::LoadU(d, keys + i));
  max = hn::Max(max, key);
  min = hn::Min(min, key);
}

// Merges kTokens rows of `count` keys, each `stride` after the one before, into max and min, which
// hold ordered integers. Asks for the same places of to_l1 and, if twice, to_l2, which are rows
// that come later, or the rows themselves where there are none.
template <int kTokens, Ask kAsk, typename Bits>
HWY_INLINE void MergeTokens(const Bits* HWY_RESTRICT keys, const Bits* to_l1, const Bits* to_l2,
                            int64_t stride, int64_t count, Bits* HWY_RESTRICT max,
                            Bits* HWY_RESTRICT min) {
  ForEachVector<Bits>(count, [&](auto d, int64_t i) HWY_ATTR {
    auto vmax = hn::LoadU(d, max + i);
    auto vmin = hn::LoadU(d, min + i);
    for (int t = 0; t < kTokens; ++t) {
      const int64_t row = t * stride;
      MergeVector<kAsk>(d, i, keys + row, to_l1 + row, to_l2 + row, vmax, vmin);
    }
    hn::StoreU(vmax, d, max + i);
    hn::StoreU(vmin, d, min + i);
  });
}

// A strip: so many vectors of the rows of so many tokens, whose max and min stay in registers.
constexpr int kVectorsPerStrip = 4;
constexpr int64_t kTokensPerStrip = 16;

// Keys of a row that make a strip; the last of a row may have fewer.
template <typename Bits>
HWY_INLINE int64_t StripSize() {
  return kVectorsPerStrip * static_cast<int64_t>(hn::Lanes(hn::ScalableTag<Bits>()));
}

// Merges num_tokens rows of `count` keys, at most a strip, as MergeTokens. Asks twice, because
// what is read in strips is short or has gaps.
template <typename Bits>
HWY_INLINE void ReduceStrip(const Bits* HWY_RESTRICT keys, const Bits* to_l1, const Bits* to_l2,
                            int64_t stride, int64_t num_tokens, int64_t count,
                            Bits* HWY_RESTRICT max, Bits* HWY_RESTRICT min) {
  const hn::ScalableTag<Bits> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  if (count < kVectorsPerStrip * lanes) {
    for (int64_t t = 0; t < num_tokens; ++t) {
      const int64_t row = t * stride;
      MergeTokens<1, Ask::kTwice>(keys + row, to_l1 + row, to_l2 + row, stride, count, max, min);
    }
    return;
  }
  auto max0 = hn::LoadU(d, max);
  auto max1 = hn::LoadU(d, max + lanes);
  auto max2 = hn::LoadU(d, max + 2 * lanes);
  auto max3 = hn::LoadU(d, max + 3 * lanes);
  auto min0 = hn::LoadU(d, min);
  auto min1 = hn::LoadU(d, min + lanes);
  auto min2 = hn::LoadU(d, min + 2 * lanes);
  auto min3 = hn::LoadU(d, min + 3 * lanes);
  for (int64_t t = 0; t < num_tokens; ++t) {
    const Bits* row = keys + t * stride;
    const Bits* near = to_l1 + t * stride;
    const Bits* far = to_l2 + t * stride;
    MergeVector<Ask::kTwice>(d, 0, row, near, far, max0, min0);
    MergeVector<Ask::kTwice>(d, lanes, row, near, far, max1, min1);
    MergeVector<Ask::kTwice>(d, 2 * lanes, row, near, far, max2, min2);
    MergeVector<Ask::kTwice>(d, 3 * lanes, row, near, far, max3, min3);
  }
  hn::StoreU(max0, d, max);
  hn::StoreU(max1, d, max + lanes);
  hn::StoreU(max2, d, max + 2 * lanes);
  hn::StoreU(max3, d, max + 3 * lanes);
  hn::StoreU(min0, d, min);
  hn::StoreU(min1, d, min + lanes);
  hn::StoreU(min2, d, min + 2 * lanes);
  hn::StoreU(min3, d, min + 3 * lanes);
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
  explicit MetadataPass(const QuestPrefillMetadataParams& p)
      : p_(p), piece_size_(p.num_kv_heads * p.head_dim) {
    int64_t num_blocks = 0;
    for (int64_t b = 0; b < p.batch; ++b) num_blocks += NumBlocks(b);
    past_caches_ = num_blocks > kBytesOfALargePass / block_bytes();
    if (p.num_kv_heads > 1 && p.k_cache_strides[2] != p.head_dim) {
      num_pieces_ = p.num_kv_heads;
      piece_size_ = p.head_dim;
      piece_stride_ = p.k_cache_strides[2];
    }
    near_ = PositionAfter(kAheadToL1);
    far_ = PositionAfter(kAheadToL2);
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

  // The blocks that are read.
  PoolOrder BlocksInPool() const {
    return PoolOrder(
        p_.batch, [this](int64_t b) { return BlocksToUpdate(p_, b); },
        [this](int64_t b) { return p_.block_tables + b * p_.block_tables_stride; });
  }

  struct Block {
    int64_t b;  // request
    int64_t j;  // KV block within it
    const Bits* keys;
  };

  // A place in the keys of the upcoming blocks, in the order in which Advance goes.
  struct Position {
    int64_t block = 0;  // after the one at work
    int64_t token = 0;
    int64_t piece = 0;
    int64_t key = 0;  // of the piece
  };

  // Goes on by the keys of some tokens in a strip: through the pieces of these tokens first, which
  // are neighbours in many caches.
  void Advance(Position& at) const {
    at.key += StripSize<Bits>();
    if (at.key < piece_size_) return;
    at.key = 0;
    if (++at.piece < num_pieces_) return;
    at.piece = 0;
    at.token += kTokensPerStrip;
    if (at.token < p_.block_size) return;
    at.token = 0;
    ++at.block;
  }

  // About so many bytes behind the beginning of a block, at least a strip. Counted in full strips.
  Position PositionAfter(int64_t bytes) const {
    const int64_t tokens = std::min(p_.block_size, kTokensPerStrip);
    const int64_t keys = std::min(piece_size_, StripSize<Bits>());
    const int64_t strips = bytes / (tokens * keys * int64_t{sizeof(Bits)});
    Position at;
    for (int64_t i = 0; i < std::max<int64_t>(strips, 1); ++i) Advance(at);
    return at;
  }

  const Bits* KeysAt(const Upcoming<Block>& upcoming, const Position& at) const {
    return upcoming[at.block].keys + at.token * p_.k_cache_strides[1] + at.piece * piece_stride_ +
           at.key;
  }

  // Block j of request b.
  Block BlockOf(int64_t b, int64_t j) const {
    const int64_t place = p_.block_tables[b * p_.block_tables_stride + j];
    return {b, j, static_cast<const Bits*>(p_.k_cache) + place * p_.k_cache_strides[0]};
  }

  void RunInTiles() const {
    const Tiles tiles(p_.batch, block_bytes(), [this](int64_t b) { return NumBlocks(b); });
    tiles.ParallelTake([&](Tiles::Queue& queue) {
      Tiles::Tile tile = {0, 0, 0};
      UpdateBlocks([&](Block& block) {
        if (tile.begin == tile.end && !queue.Take(tile)) return false;
        block = BlockOf(tile.b, BlocksToUpdate(p_, tile.b).begin + tile.begin);
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
        block = BlockOf(in_pool.request, in_pool.number);
        return true;
      });
    });
  }

  // Writes the metadata of every block that take(block) gives, until it gives none.
  template <typename Take>
  void UpdateBlocks(Take&& take) const {
    Upcoming<Block> upcoming(kAheadToL2 / block_bytes());
    Accumulators accumulators(p_.num_kv_heads * p_.head_dim);
    for (;; upcoming.Advance()) {
      while (upcoming.wants_more()) {
        Block block;
        if (take(block)) {
          upcoming.Push(block);
        } else {
          upcoming.End();
        }
      }
      if (upcoming.empty()) break;
      ReduceBlock(upcoming, accumulators);
      const Block& block = upcoming[0];
      StoreBlock(block, accumulators);
      const BlockRange range = BlocksToUpdate(p_, block.b);
      if (block.j == range.end - 1) ClearRowsBehind(block.b, range);
    }
    if (past_caches_) hwy::FlushStream();
  }

  // Leaves the maxima and minima of the keys of a block in `accumulators`, and asks for those of
  // blocks to come.
  void ReduceBlock(const Upcoming<Block>& upcoming, Accumulators& accumulators) const {
    accumulators.Reset();
    Bits* max = accumulators.max.data();
    Bits* min = accumulators.min.data();
    const int64_t num_tokens = NumTokens(p_, upcoming[0].b, upcoming[0].j);
    if (ReduceParts(upcoming, num_tokens, max, min)) return;
    Position near = near_;
    Position far = far_;
    for (Position at; at.block == 0 && at.token < num_tokens; Advance(at)) {
      const int64_t first = at.piece * piece_size_ + at.key;
      ReduceStrip(KeysAt(upcoming, at), KeysAt(upcoming, near), KeysAt(upcoming, far),
                  p_.k_cache_strides[1], std::min(kTokensPerStrip, num_tokens - at.token),
                  std::min(StripSize<Bits>(), piece_size_ - at.key), max + first, min + first);
      Advance(near);
      Advance(far);
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

  // Reduces a block in parts that are read side by side, so that max and min are loaded and stored
  // once for a token of each. False, and nothing done, for a block that is better read in strips.
  bool ReduceParts(const Upcoming<Block>& upcoming, int64_t num_tokens, Bits* max,
                   Bits* min) const {
    const bool has_gaps = p_.k_cache_strides[1] > piece_size_;
    if (has_gaps && num_pieces_ > 1) return false;
    for (int64_t piece = 0; piece < num_pieces_; ++piece) {
      const Bits* keys = upcoming[0].keys + piece * piece_stride_;
      const Bits* next = piece + 1 < num_pieces_ ? keys + piece_stride_ : upcoming[1].keys;
      // Dense pieces of a few pages are too short for eight parts.
      const bool done =
          (!has_gaps && ReducePiece<8, Ask::kOnce>(keys, next, num_tokens, max, min)) ||
          ReducePiece<4, Ask::kTwice>(keys, next, num_tokens, max, min);
      if (!done) return false;  // at the first, since all have one shape
      max += piece_size_;
      min += piece_size_;
    }
    return true;
  }

  // Reduces a piece of a block in kParts parts, and asks for `next`, the piece that comes after it.
  // False, and nothing done, where parts would lie within a page: hardware prefetches a few long
  // streams, but loses track of streams that share a page.
  template <int kParts, Ask kAsk>
  bool ReducePiece(const Bits* keys, const Bits* next, int64_t num_tokens, Bits* max,
                   Bits* min) const {
    constexpr int64_t kPageBytes = 4096;
    const int64_t count = piece_size_;
    const int64_t stride = p_.k_cache_strides[1];
    const int64_t part = num_tokens / kParts;
    if (part * stride * int64_t{sizeof(Bits)} < kPageBytes) return false;
    // What is read in the first part so many bytes after row t, which may be in the first part of
    // the next piece; the other parts are like it. Rows with gaps between them are counted whole.
    const auto ahead = [&](int64_t t, int64_t bytes) {
      const int64_t elements = bytes / (kParts * int64_t{sizeof(Bits)});
      const bool is_dense = stride == count;
      const int64_t row = t + (is_dense ? elements / count : (elements - 1) / count + 1);
      const Bits* from =
          row < part ? keys + row * stride : next + std::min(row - part, part - 1) * stride;
      return from + (is_dense ? elements % count : 0);
    };
    for (int64_t t = 0; t < part; ++t) {
      MergeTokens<kParts, kAsk>(keys + t * stride, ahead(t, kAheadToL1), ahead(t, kAheadToL2),
                                part * stride, count, max, min);
    }
    for (int64_t t = part * kParts; t < num_tokens; ++t) {
      const Bits* row = keys + t * stride;
      MergeTokens<1, kAsk>(row, row, row, stride, count, max, min);
    }
    return true;
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
  // The keys of a token lie side by side in pieces: one for all heads, or one for each.
  int64_t num_pieces_ = 1;
  int64_t piece_size_;
  int64_t piece_stride_ = 0;
  Position near_;  // what to ask for when a block begins
  Position far_;
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
