// Which blocks of a request a kernel reads, lists or writes, whatever its lengths hold: a device
// cannot refuse them, so it makes do with what the tables hold. On lengths that are right these are
// the ranges of core/block_ranges.h.

#ifndef SELECT_ATTN_OPS_CUDA_CLAMPED_RANGES_H_
#define SELECT_ATTN_OPS_CUDA_CLAMPED_RANGES_H_

#include <cstdint>

#include "core/block_ranges.h"
#include "select_attn_ops/quest_block_select_paged.h"
#include "select_attn_ops/quest_prefill_metadata.h"
#include "select_attn_ops/selected_block_tables.h"

namespace select_attn::cuda {

// No request has more KV blocks, since lengths are int32.
constexpr int64_t kMostKvBlocks = int64_t{1} << 31;

SELECT_ATTN_HOST_DEVICE inline int64_t Smaller(int64_t a, int64_t b) { return a < b ? a : b; }

SELECT_ATTN_HOST_DEVICE inline int64_t Clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : Smaller(value, high);
}

// KV blocks that a row of a metadata table describes, none beyond kMostKvBlocks counted.
SELECT_ATTN_HOST_DEVICE inline int64_t DescribedBlocks(int64_t columns, int64_t rows) {
  return columns > kMostKvBlocks / rows ? kMostKvBlocks : columns * rows;
}

// Of a call of quest_prefill_metadata.
struct Update {
  BlockRange blocks;  // to recompute
  int64_t seq_len;

  // Valid tokens of KV block j.
  SELECT_ATTN_HOST_DEVICE int64_t NumTokens(int64_t j, int64_t block_size) const {
    return Smaller(seq_len - j * block_size, block_size);
  }
};

SELECT_ATTN_HOST_DEVICE inline Update ClampedUpdate(const QuestPrefillMetadataParams& p,
                                                    int64_t b) {
  const int64_t capacity =
      Smaller(p.max_kv_blocks_per_request,
              DescribedBlocks(p.max_metadata_blocks_per_request, p.rows_per_metadata_block));
  const int64_t seq_len = Clamp(p.seq_lens[b], 0, INT32_MAX);
  const int64_t known =
      p.metadata_seq_lens == nullptr ? 0 : Clamp(p.metadata_seq_lens[b], 0, seq_len);
  return {{known / p.block_size, Smaller(NumKvBlocks(seq_len, p.block_size), capacity)}, seq_len};
}

// Of a call of a select operator.
struct Ranking {
  RankedBlocks blocks;
  int64_t num_scored;  // of those that would be, the first so many have rows in the tables; none
                       // where forced blocks fill the result
};

SELECT_ATTN_HOST_DEVICE inline Ranking ClampedRanking(const QuestBlockSelectPagedParams& p,
                                                      int64_t b) {
  const int64_t seq_len = Clamp(p.seq_lens[b], 0, INT32_MAX);
  int64_t known = -1;
  if (p.metadata_seq_lens != nullptr) {
    known = Clamp(p.metadata_seq_lens[b], 0, seq_len);
  } else if (p.tokens_since_metadata_update >= 0) {
    known = Clamp(seq_len - p.tokens_since_metadata_update, 0, seq_len);
  }
  const RankedBlocks blocks = RankBlocks(seq_len, known, p.block_size);
  if (blocks.num_forced() >= p.k) return {blocks, 0};
  const int64_t capacity =
      DescribedBlocks(p.max_metadata_blocks_per_request, p.rows_per_metadata_block);
  const int64_t end = Smaller(blocks.scored_end, capacity);
  return {blocks, end > blocks.scored_begin ? end - blocks.scored_begin : 0};
}

// Of a call of selected_block_tables: valid tokens of a selected block; 0 if it is to be left out.
SELECT_ATTN_HOST_DEVICE inline int64_t SelectedTokens(const SelectedBlockTablesParams& p, int64_t b,
                                                      int64_t j) {
  const int64_t seq_len = Clamp(p.seq_lens[b], 0, INT32_MAX);
  const int64_t end = Smaller(NumKvBlocks(seq_len, p.block_size), p.max_kv_blocks_per_request);
  if (j < 0 || j >= end || p.block_tables[b * p.block_tables_stride + j] < 0) return 0;
  return Smaller(seq_len - j * p.block_size, p.block_size);
}

}  // namespace select_attn::cuda

#endif  // SELECT_ATTN_OPS_CUDA_CLAMPED_RANGES_H_
