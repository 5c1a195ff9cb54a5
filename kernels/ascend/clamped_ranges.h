// Which blocks of a request a kernel reads, lists or writes, whatever its lengths hold: a device
// cannot refuse them, so it makes do with what the tables hold. On lengths that are right these are
// the ranges of core/block_ranges.h.

#ifndef SELECT_ATTN_OPS_ASCEND_CLAMPED_RANGES_H_
#define SELECT_ATTN_OPS_ASCEND_CLAMPED_RANGES_H_

#include <cstdint>

#include "ascend/arguments.h"
#include "ascend/global_memory.h"
#include "core/block_ranges.h"

namespace select_attn::ascend {

// No request has more KV blocks, since lengths are int32.
constexpr int64_t kMostKvBlocks = int64_t{1} << 31;

__aicore__ inline int64_t Smaller(int64_t a, int64_t b) { return a < b ? a : b; }

__aicore__ inline int64_t Larger(int64_t a, int64_t b) { return a < b ? b : a; }

__aicore__ inline int64_t Clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : Smaller(value, high);
}

// KV blocks that a row of a metadata table describes, none beyond kMostKvBlocks counted.
__aicore__ inline int64_t DescribedBlocks(int64_t columns, int64_t rows) {
  return columns > kMostKvBlocks / rows ? kMostKvBlocks : columns * rows;
}

__aicore__ inline int64_t ClampedLength(uint64_t seq_lens, int64_t b) {
  return Larger(ReadInt32(seq_lens, b), 0);
}

// Of a call of quest_prefill_metadata.
struct Update {
  BlockRange blocks;  // to recompute
  int64_t seq_len;
};

__aicore__ inline Update ClampedUpdate(const QuestPrefillMetadataArguments& a, int64_t b) {
  const int64_t capacity =
      Smaller(a.block_tables.columns,
              DescribedBlocks(a.metadata_block_tables.columns, a.rows_per_metadata_block));
  const int64_t seq_len = ClampedLength(a.seq_lens, b);
  const int64_t known =
      a.metadata_seq_lens == 0 ? 0 : Clamp(ReadInt32(a.metadata_seq_lens, b), 0, seq_len);
  return {{known / a.block_size, Smaller(NumKvBlocks(seq_len, a.block_size), capacity)}, seq_len};
}

// Of a call of a select operator.
struct Ranking {
  RankedBlocks blocks;
  int64_t num_scored;  // of those that would be, the first so many have rows in the tables; none
                       // where forced blocks fill the result
};

__aicore__ inline Ranking ClampedRanking(const QuestBlockSelectPagedArguments& a, int64_t b) {
  const int64_t seq_len = ClampedLength(a.seq_lens, b);
  int64_t known = -1;
  if (a.metadata_seq_lens != 0) {
    known = Clamp(ReadInt32(a.metadata_seq_lens, b), 0, seq_len);
  } else if (a.tokens_since_metadata_update >= 0) {
    known = Clamp(seq_len - a.tokens_since_metadata_update, 0, seq_len);
  }
  const RankedBlocks blocks = RankBlocks(seq_len, known, a.block_size);
  if (blocks.num_forced() >= a.k) return {blocks, 0};
  const int64_t capacity =
      DescribedBlocks(a.metadata_block_tables.columns, a.rows_per_metadata_block);
  const int64_t end = Smaller(blocks.scored_end, capacity);
  return {blocks, end > blocks.scored_begin ? end - blocks.scored_begin : 0};
}

}  // namespace select_attn::ascend

#endif  // SELECT_ATTN_OPS_ASCEND_CLAMPED_RANGES_H_
