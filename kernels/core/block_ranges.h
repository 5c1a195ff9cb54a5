// Which blocks of a request an operator reads, lists or writes: the arithmetic of the contract, for
// the checks and for every backend. Lengths are in tokens, ranges in KV blocks.

#ifndef SELECT_ATTN_OPS_CORE_BLOCK_RANGES_H_
#define SELECT_ATTN_OPS_CORE_BLOCK_RANGES_H_

#include <cstdint>

// Where a backend's compiler needs another word, the backend defines it first.
#ifndef SELECT_ATTN_HOST_DEVICE
#ifdef __CUDACC__
#define SELECT_ATTN_HOST_DEVICE __host__ __device__
#else
#define SELECT_ATTN_HOST_DEVICE
#endif
#endif

namespace select_attn {

// T: the number of KV blocks that hold seq_len tokens.
SELECT_ATTN_HOST_DEVICE inline int64_t NumKvBlocks(int64_t seq_len, int64_t block_size) {
  return seq_len / block_size + (seq_len % block_size != 0 ? 1 : 0);
}

// Valid tokens of KV block j of request b: the last block of a request may be partial.
template <typename Params>
SELECT_ATTN_HOST_DEVICE int64_t NumTokens(const Params& p, int64_t b, int64_t j) {
  const int64_t left = p.seq_lens[b] - j * p.block_size;
  return left < p.block_size ? left : p.block_size;
}

struct BlockRange {
  int64_t begin;
  int64_t end;

  SELECT_ATTN_HOST_DEVICE bool empty() const { return begin >= end; }
};

// KV blocks of request b whose metadata a call of quest_prefill_metadata recomputes.
template <typename Params>
SELECT_ATTN_HOST_DEVICE BlockRange BlocksToUpdate(const Params& p, int64_t b) {
  const int64_t metadata_len = p.metadata_seq_lens == nullptr ? 0 : p.metadata_seq_lens[b];
  return {metadata_len / p.block_size, NumKvBlocks(p.seq_lens[b], p.block_size)};
}

// How the KV blocks 0 .. num_blocks - 1 of a request rank: the window [scored_end, num_blocks) from
// the newest down, then the sink 0 if scored_begin == 1, then [scored_begin, scored_end) by score.
struct RankedBlocks {
  int64_t scored_begin;
  int64_t scored_end;
  int64_t num_blocks;

  SELECT_ATTN_HOST_DEVICE int64_t num_scored() const { return scored_end - scored_begin; }
  SELECT_ATTN_HOST_DEVICE int64_t num_forced() const { return num_blocks - num_scored(); }

  // The forced block of rank i, 0 <= i < num_forced().
  SELECT_ATTN_HOST_DEVICE int64_t Forced(int64_t i) const {
    const int64_t window = num_blocks - scored_end;
    return i < window ? num_blocks - 1 - i : 0;
  }
};

// `metadata_len` tokens have complete metadata; negative: all blocks are scored, none is forced.
SELECT_ATTN_HOST_DEVICE inline RankedBlocks RankBlocks(int64_t seq_len, int64_t metadata_len,
                                                       int64_t block_size) {
  const int64_t num_blocks = NumKvBlocks(seq_len, block_size);
  if (metadata_len < 0 || num_blocks == 0) return {0, num_blocks, num_blocks};
  const int64_t window_begin = metadata_len / block_size;
  // With block 0 in the window there is no sink apart from it, and nothing to score.
  if (window_begin == 0) return {0, 0, num_blocks};
  return {1, window_begin, num_blocks};
}

// The metadata length of request b for a select operator's Params; -1 where nothing is forced.
template <typename Params>
SELECT_ATTN_HOST_DEVICE int64_t MetadataLength(const Params& p, int64_t b) {
  if (p.metadata_seq_lens != nullptr) return p.metadata_seq_lens[b];
  if (p.tokens_since_metadata_update < 0) return -1;
  const int64_t length = p.seq_lens[b] - p.tokens_since_metadata_update;
  return length > 0 ? length : 0;
}

}  // namespace select_attn

#endif  // SELECT_ATTN_OPS_CORE_BLOCK_RANGES_H_
