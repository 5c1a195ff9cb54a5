// Ascend kernel of quest_prefill_metadata.
//
// An item of work is one KV block of some KV heads: all that fit where heads are side by side in
// memory and there are items enough for every core, else one. Its tokens come in tiles, each copied
// once, the next one while the vector unit works on the last. Half a tile's rows meet the other
// half in running extremes, which are folded to one row when the item ends: so a maximum or minimum
// costs one repeat per 256 bytes of keys, and few instructions.
//
// float16 and float32 are compared as they are. bfloat16, for which this chip has no arithmetic, is
// compared as int16: the largest and smallest of those and the largest magnitude among the negative
// give the maximum and minimum exactly, for 5 repeats per 256 bytes where a cast to float32 and two
// extremes cost 6. NaN is found by its magnitude there. For the other types NaN propagates if the
// chip's Max and Min propagate it.
//
// The rows of zeros behind requests are dealt evenly, too.

#ifndef SELECT_ATTN_OPS_ASCEND_QUEST_PREFILL_METADATA_H_
#define SELECT_ATTN_OPS_ASCEND_QUEST_PREFILL_METADATA_H_

#include <cstdint>
#include <type_traits>

#include "ascend/arguments.h"
#include "ascend/clamped_ranges.h"
#include "ascend/core_share.h"
#include "ascend/global_memory.h"
#include "kernel_operator.h"

namespace select_attn::ascend {

// T is half, bfloat16_t or float.
template <typename T>
class QuestPrefillMetadataKernel {
 public:
  __aicore__ inline QuestPrefillMetadataKernel(const QuestPrefillMetadataArguments& arguments,
                                               AscendC::TPipe* pipe)
      : a_(arguments) {
    pipe->InitBuffer(tiles_, kTilesInFlight, kTileBytes);
    pipe->InitBuffer(max_rows_, kRowsInFlight, kRowBytes);
    pipe->InitBuffer(min_rows_, kRowsInFlight, kRowBytes);
    pipe->InitBuffer(largest_buffer_, kExtremesBytes);
    pipe->InitBuffer(smallest_buffer_, kExtremesBytes);
    pipe->InitBuffer(zero_buffer_, kZeroBytes);
    if constexpr (kIsBFloat16) {
      pipe->InitBuffer(negative_buffer_, kExtremesBytes);
      pipe->InitBuffer(folded_buffer_, 3 * kRowBytes);
      pipe->InitBuffer(magnitude_buffer_, kBlockBytes);
    }
  }

  __aicore__ inline void Run() {
    int64_t num_blocks = 0;
    int64_t num_rows_behind = 0;
    for (int64_t b = 0; b < a_.batch; ++b) {
      const Update update = ClampedUpdate(a_, b);
      num_blocks += BlocksOf(update);
      num_rows_behind += RowsBehind(update);
    }
    if (num_blocks == 0) return;
    const auto core = static_cast<int64_t>(AscendC::GetBlockIdx());
    const auto num_cores = static_cast<int64_t>(AscendC::GetBlockNum());
    heads_per_item_ = HeadsPerItem(num_blocks, num_cores);
    items_per_block_ = (a_.num_kv_heads - 1) / heads_per_item_ + 1;
    share_ = ShareOf(core, num_cores, num_blocks * items_per_block_);
    const Share rows_behind = ShareOf(core, num_cores, num_rows_behind);
    if (share_.empty() && rows_behind.empty()) return;
    PrepareConstants();
    StoreZerosBehind(rows_behind);
    if (share_.empty()) return;

    Tile tile;
    bool has_tile = FirstTile(tile);
    Tile ahead = tile;  // the next to be copied
    bool has_ahead = has_tile;
    for (int i = 0; i < kTilesInFlight && has_ahead; ++i) has_ahead = LoadNext(ahead);
    while (has_tile) {
      Process(tile);
      if (has_ahead) has_ahead = LoadNext(ahead);
      has_tile = NextTile(tile);
    }
  }

 private:
  static constexpr bool kIsBFloat16 = std::is_same_v<T, bfloat16_t>;
  // What comparisons see.
  using Element = std::conditional_t<kIsBFloat16, int16_t, T>;

  // Two hide the copies of the tiles of an item; the third those of the next while it ends.
  static constexpr int kTilesInFlight = 3;
  static constexpr int kRowsInFlight = 1;  // stored long before the next item ends
  static constexpr int64_t kTileBytes = int64_t{32} * 1024;
  static constexpr int64_t kExtremesBytes = kTileBytes / 2;
  static constexpr int64_t kRowBytes = int64_t{4} * 1024;  // a token of the heads of an item
  static constexpr int64_t kZeroBytes = int64_t{4} * 1024;
  static constexpr int64_t kBlockBytes = 32;
  static constexpr int64_t kRepeatBytes = 256;
  static constexpr auto kElementBytes = static_cast<int64_t>(sizeof(Element));
  static constexpr int16_t kInfinity = 0x7F80;  // as bfloat16

  // Tokens of one item. An item without keys, because its table entry is bad, is one tile without
  // tokens.
  struct Tile {
    int64_t item;
    int64_t b;
    int64_t j;           // KV block of the request
    int64_t first_item;  // of the request
    Update update;
    int64_t first_head;
    int64_t num_heads;
    int64_t kv_block;
    int64_t metadata_block;
    int64_t first_token;
    int64_t num_tokens;
    int64_t item_tokens;
  };

  __aicore__ static inline int64_t BlocksOf(const Update& update) {
    return update.blocks.empty() ? 0 : update.blocks.end - update.blocks.begin;
  }

  // Rows of the last block's metadata block that the call makes zero: if it writes row 0, those
  // behind the last block's.
  __aicore__ inline int64_t RowsBehind(const Update& update) const {
    if (update.blocks.empty()) return 0;
    const int64_t row = (update.blocks.end - 1) % a_.rows_per_metadata_block;
    if (update.blocks.end - 1 - row < update.blocks.begin) return 0;
    return a_.rows_per_metadata_block - row - 1;
  }

  // Wide rows are read at a better rate; few items leave cores idle.
  __aicore__ inline int64_t HeadsPerItem(int64_t num_blocks, int64_t num_cores) const {
    const bool side_by_side = a_.k_cache.head_stride == a_.head_dim;
    if (a_.num_kv_heads == 1 || !side_by_side) return 1;
    const int64_t heads = Smaller(a_.num_kv_heads, kRowBytes / kElementBytes / a_.head_dim);
    const int64_t items = num_blocks * ((a_.num_kv_heads - 1) / heads + 1);
    return items >= kItemsPerCore * num_cores ? heads : 1;
  }
  static constexpr int64_t kItemsPerCore = 4;

  __aicore__ inline void PrepareConstants() {
    AscendC::Duplicate(zero_buffer_.template Get<Element>(), static_cast<Element>(0),
                       static_cast<int32_t>(kZeroBytes / kElementBytes));
    if constexpr (kIsBFloat16) {
      AscendC::Duplicate(magnitude_buffer_.template Get<Element>(), int16_t{0x7FFF},
                         static_cast<int32_t>(kBlockBytes / kElementBytes));
    }
    AscendC::PipeBarrier<PIPE_ALL>();
  }

  // The first tile of the share; false if no item of it writes anything.
  __aicore__ inline bool FirstTile(Tile& tile) {
    tile.item = share_.begin;
    tile.b = 0;
    tile.first_item = 0;
    tile.update = ClampedUpdate(a_, 0);
    return ResolveItem(tile);
  }

  __aicore__ inline bool NextTile(Tile& tile) {
    tile.first_token += tile.num_tokens;
    if (tile.first_token < tile.item_tokens) {
      SizeTile(tile);
      return true;
    }
    ++tile.item;
    return ResolveItem(tile);
  }

  // From tile.item on, the first item of the share that writes; false if there is none.
  __aicore__ inline bool ResolveItem(Tile& tile) {
    for (; tile.item < share_.end; ++tile.item) {
      while (tile.item - tile.first_item >= BlocksOf(tile.update) * items_per_block_) {
        tile.first_item += BlocksOf(tile.update) * items_per_block_;
        ++tile.b;
        tile.update = ClampedUpdate(a_, tile.b);
      }
      const int64_t number = tile.item - tile.first_item;
      tile.j = tile.update.blocks.begin + number / items_per_block_;
      tile.first_head = number % items_per_block_ * heads_per_item_;
      tile.num_heads = Smaller(heads_per_item_, a_.num_kv_heads - tile.first_head);
      tile.metadata_block = MetadataBlock(tile.b, tile.j);
      if (tile.metadata_block < 0 || tile.metadata_block >= a_.num_metadata_blocks) continue;
      tile.kv_block = ReadInt32(a_.block_tables.address, tile.b * a_.block_tables.stride + tile.j);
      const bool has_keys = tile.kv_block >= 0 && tile.kv_block < a_.num_kv_blocks;
      tile.item_tokens =
          has_keys ? Smaller(tile.update.seq_len - tile.j * a_.block_size, a_.block_size) : 0;
      tile.first_token = 0;
      SizeTile(tile);
      return true;
    }
    return false;
  }

  // The table's entry for KV block j.
  __aicore__ inline int64_t MetadataBlock(int64_t b, int64_t j) const {
    return ReadInt32(a_.metadata_block_tables.address,
                     b * a_.metadata_block_tables.stride + j / a_.rows_per_metadata_block);
  }

  __aicore__ inline void SizeTile(Tile& tile) const {
    tile.num_tokens =
        Smaller(tile.item_tokens - tile.first_token, kTileBytes / kElementBytes / Width(tile));
  }

  __aicore__ inline int64_t Width(const Tile& tile) const { return tile.num_heads * a_.head_dim; }

  // Asks for a tile and goes on to the next one; false if there is none.
  __aicore__ inline bool LoadNext(Tile& tile) {
    Load(tile);
    return NextTile(tile);
  }

  __aicore__ inline void Load(const Tile& tile) {
    if (tile.num_tokens == 0) return;
    AscendC::LocalTensor<Element> keys = tiles_.template AllocTensor<Element>();
    LoadRows(keys,
             {a_.k_cache.address,
              tile.kv_block * a_.k_cache.block_stride + tile.first_token * a_.k_cache.row_stride +
                  tile.first_head * a_.k_cache.head_stride,
              a_.k_cache.row_stride, tile.num_tokens, Width(tile)});
    tiles_.EnQue(keys);
  }

  __aicore__ inline void Process(const Tile& tile) {
    if (tile.item_tokens == 0) {
      StoreZeros(tile, tile.j % a_.rows_per_metadata_block, 1);
      return;
    }
    AscendC::LocalTensor<Element> keys = tiles_.template DeQue<Element>();
    Take(keys, static_cast<int32_t>(tile.num_tokens), static_cast<int32_t>(Width(tile)),
         tile.first_token == 0);
    tiles_.FreeTensor(keys);
    if (tile.first_token + tile.num_tokens < tile.item_tokens) return;
    max_row_ = max_rows_.template AllocTensor<Element>();
    min_row_ = min_rows_.template AllocTensor<Element>();
    Finish(static_cast<int32_t>(Width(tile)));
    max_rows_.EnQue(max_row_);
    min_rows_.EnQue(min_row_);
    StoreItem(tile);
  }

  template <bool kMax>
  __aicore__ static inline void Compare(const AscendC::LocalTensor<Element>& to,
                                        const AscendC::LocalTensor<Element>& x,
                                        const AscendC::LocalTensor<Element>& y, int32_t count) {
    if constexpr (kMax) {
      AscendC::Max(to, x, y, count);
    } else {
      AscendC::Min(to, x, y, count);
    }
    AscendC::PipeBarrier<PIPE_V>();
  }

  // Rows of keys, which it may overwrite, into the extremes of their item.
  __aicore__ inline void Take(const AscendC::LocalTensor<Element>& keys, int32_t rows,
                              int32_t width, bool is_first) {
    if (is_first) num_extremes_ = rows > 1 ? rows / 2 : 1;
    TakeExtremes<true>(largest_buffer_.template Get<Element>(), keys, rows, width, is_first);
    TakeExtremes<false>(smallest_buffer_.template Get<Element>(), keys, rows, width, is_first);
    if constexpr (kIsBFloat16) {
      AscendC::Mins(keys, keys, int16_t{0}, rows * width);
      AscendC::PipeBarrier<PIPE_V>();
      ClearSigns(keys, rows * width);
      TakeExtremes<true>(negative_buffer_.template Get<Element>(), keys, rows, width, is_first);
    }
  }

  // The first tile of an item has the most rows, and sets num_extremes_ rows; others meet those.
  template <bool kMax>
  __aicore__ inline void TakeExtremes(const AscendC::LocalTensor<Element>& extremes,
                                      const AscendC::LocalTensor<Element>& keys, int32_t rows,
                                      int32_t width, bool is_first) const {
    int32_t done = 0;
    if (is_first) {
      const AscendC::LocalTensor<Element> others =
          keys[static_cast<uint32_t>((rows - num_extremes_) * width)];
      Compare<kMax>(extremes, keys, others, num_extremes_ * width);
      // With an odd number the row in the middle is left.
      done = rows > 1 && rows % 2 != 0 ? num_extremes_ : rows;
      rows = done < rows ? done + 1 : rows;
    }
    while (done < rows) {
      const int32_t now = static_cast<int32_t>(Smaller(num_extremes_, rows - done));
      Compare<kMax>(extremes, extremes, keys[static_cast<uint32_t>(done * width)], now * width);
      done += now;
    }
  }

  // The item's row of the metadata.
  __aicore__ inline void Finish(int32_t width) {
    const AscendC::LocalTensor<Element> largest = largest_buffer_.template Get<Element>();
    const AscendC::LocalTensor<Element> smallest = smallest_buffer_.template Get<Element>();
    if constexpr (kIsBFloat16) {
      const auto row = static_cast<uint32_t>(width);
      const AscendC::LocalTensor<Element> folded = folded_buffer_.template Get<Element>();
      Fold<true>(folded, largest, width);
      Fold<false>(folded[row], smallest, width);
      Fold<true>(folded[2 * row], negative_buffer_.template Get<Element>(), width);
      CombineBits(folded, width);
    } else {
      Fold<true>(max_row_, largest, width);
      Fold<false>(min_row_, smallest, width);
    }
  }

  // Folds the extremes in place, the last two rows into `result`. The upper half meets the lower
  // one; with an odd number a row in the middle waits.
  template <bool kMax>
  __aicore__ inline void Fold(const AscendC::LocalTensor<Element>& result,
                              const AscendC::LocalTensor<Element>& extremes, int32_t width) const {
    int32_t rows = num_extremes_;
    while (rows > 2) {
      const int32_t half = rows / 2;
      Compare<kMax>(extremes, extremes, extremes[static_cast<uint32_t>((rows - half) * width)],
                    half * width);
      rows -= half;
    }
    Compare<kMax>(result, extremes, extremes[static_cast<uint32_t>((rows - 1) * width)], width);
  }

  __aicore__ inline void ClearSigns(const AscendC::LocalTensor<int16_t>& bits, int32_t count) {
    constexpr auto kLanes = static_cast<int32_t>(kRepeatBytes / kElementBytes);
    const AscendC::LocalTensor<int16_t> magnitude = magnitude_buffer_.template Get<int16_t>();
    const AscendC::BinaryRepeatParams one_block(1, 1, 0, 8, 8, 0);  // for every repeat
    const int32_t repeats = count / kLanes;
    if (repeats > 0) {
      AscendC::And(bits, bits, magnitude, static_cast<uint64_t>(kLanes),
                   static_cast<uint8_t>(repeats), one_block);
    }
    if (count % kLanes != 0) {
      const AscendC::LocalTensor<int16_t> rest = bits[repeats * kLanes];
      AscendC::And(rest, rest, magnitude, static_cast<uint64_t>(count % kLanes), 1, one_block);
    }
    AscendC::PipeBarrier<PIPE_V>();
  }

  // Of three rows, the largest and the smallest int16 and the largest magnitude of the negative,
  // the bits of the float maximum are the largest if that is not negative, else the smallest: among
  // negative numbers the order is reversed. The minimum is the negative number of the largest
  // magnitude if there is one, else the smallest. So both are the row behind where a row is
  // negative. Both are NaN if a magnitude is above infinity's. Signs are spread over all bits, so
  // that they select.
  __aicore__ inline void CombineBits(const AscendC::LocalTensor<int16_t>& rows, int32_t width) {
    const auto row = static_cast<uint32_t>(width);
    const AscendC::LocalTensor<int16_t> negative = rows[2 * row];
    // The extremes are folded, their buffers free.
    const AscendC::LocalTensor<int16_t> is_nan = negative_buffer_.template Get<int16_t>();
    const AscendC::LocalTensor<int16_t> signs = smallest_buffer_.template Get<int16_t>();
    const AscendC::LocalTensor<int16_t> chosen = signs[2 * row];
    static_assert(kExtremesBytes >= 4 * kRowBytes, "no room for signs and chosen");

    AscendC::Max(is_nan, rows, negative, width);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Muls(is_nan, is_nan, int16_t{-1}, width);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Adds(is_nan, is_nan, kInfinity, width);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::ShiftRight(is_nan, is_nan, int16_t{15}, width);  // all bits set are a NaN

    AscendC::Adds(negative, negative, int16_t{-0x7FFF - 1}, width);  // sets the sign
    AscendC::ShiftRight(signs, rows, int16_t{15}, 2 * width);
    AscendC::PipeBarrier<PIPE_V>();
    // The row behind, then the row itself.
    AscendC::And(chosen, rows[row], signs, 2 * width);
    AscendC::Not(signs, signs, 2 * width);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::And(signs, signs, rows, 2 * width);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Or(chosen, chosen, signs, 2 * width);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Or(max_row_, chosen, is_nan, width);
    AscendC::Or(min_row_, chosen[row], is_nan, width);
    AscendC::PipeBarrier<PIPE_V>();
  }

  // Rows from `row` on of the item's metadata block, in one pool, from rows side by side.
  __aicore__ inline void StoreHeads(const PoolArguments& pool, const Tile& tile, int64_t row,
                                    int64_t count, const AscendC::LocalTensor<Element>& from) {
    const int64_t offset = tile.metadata_block * pool.block_stride + row * pool.row_stride +
                           tile.first_head * pool.head_stride;
    if (tile.num_heads == 1 || pool.head_stride == a_.head_dim) {
      StoreRows({pool.address, offset, pool.row_stride, count, Width(tile)}, from);
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      StoreRows({pool.address, offset + i * pool.row_stride, pool.head_stride, tile.num_heads,
                 a_.head_dim},
                from[static_cast<uint32_t>(i * Width(tile))]);
    }
  }

  __aicore__ inline void StoreItem(const Tile& tile) {
    const int64_t row = tile.j % a_.rows_per_metadata_block;
    AscendC::LocalTensor<Element> highest = max_rows_.template DeQue<Element>();
    StoreHeads(a_.maxblocks, tile, row, 1, highest);
    max_rows_.FreeTensor(highest);
    AscendC::LocalTensor<Element> lowest = min_rows_.template DeQue<Element>();
    StoreHeads(a_.minblocks, tile, row, 1, lowest);
    min_rows_.FreeTensor(lowest);
  }

  __aicore__ inline void StoreZeros(const Tile& tile, int64_t row, int64_t count) {
    const AscendC::LocalTensor<Element> zeros = zero_buffer_.template Get<Element>();
    const int64_t rows_of_zeros = kZeroBytes / kElementBytes / Width(tile);
    for (int64_t done = 0; done < count; done += rows_of_zeros) {
      const int64_t now = Smaller(count - done, rows_of_zeros);
      StoreHeads(a_.maxblocks, tile, row + done, now, zeros);
      StoreHeads(a_.minblocks, tile, row + done, now, zeros);
    }
  }

  // A share of the rows behind all requests, in order.
  __aicore__ inline void StoreZerosBehind(const Share& share) {
    int64_t first = 0;
    for (int64_t b = 0; b < a_.batch && first < share.end; ++b) {
      const Update update = ClampedUpdate(a_, b);
      const int64_t count = RowsBehind(update);
      const int64_t begin = Larger(share.begin - first, 0);
      const int64_t end = Smaller(share.end - first, count);
      first += count;
      if (begin >= end) continue;
      const int64_t last = update.blocks.end - 1;
      Tile tile = {};
      tile.metadata_block = MetadataBlock(b, last);
      if (tile.metadata_block < 0 || tile.metadata_block >= a_.num_metadata_blocks) continue;
      for (int64_t n = 0; n < a_.num_kv_heads; n += heads_per_item_) {
        tile.first_head = n;
        tile.num_heads = Smaller(heads_per_item_, a_.num_kv_heads - n);
        StoreZeros(tile, last % a_.rows_per_metadata_block + 1 + begin, end - begin);
      }
    }
  }

  const QuestPrefillMetadataArguments& a_;
  int64_t heads_per_item_ = 1;
  int64_t items_per_block_ = 1;
  Share share_ = {0, 0};
  AscendC::LocalTensor<Element> max_row_;
  AscendC::LocalTensor<Element> min_row_;
  AscendC::TQue<AscendC::TPosition::VECIN, kTilesInFlight> tiles_;
  AscendC::TQue<AscendC::TPosition::VECOUT, kRowsInFlight> max_rows_;
  AscendC::TQue<AscendC::TPosition::VECOUT, kRowsInFlight> min_rows_;
  // Of the item in hand: rows of the largest and smallest elements so far.
  int32_t num_extremes_ = 0;
  AscendC::TBuf<AscendC::TPosition::VECCALC> largest_buffer_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> smallest_buffer_;
  AscendC::TBuf<AscendC::TPosition::VECOUT> zero_buffer_;
  // bfloat16 only.
  AscendC::TBuf<AscendC::TPosition::VECCALC> negative_buffer_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> folded_buffer_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> magnitude_buffer_;
};

}  // namespace select_attn::ascend

#endif  // SELECT_ATTN_OPS_ASCEND_QUEST_PREFILL_METADATA_H_
