// quest_prefill_metadata: the channel-wise maximum and minimum of the keys of every KV block.
//
// For request b, KV head n and KV block j < T(b) = ceil(seq_lens[b] / block_size), with tokens t
// over the block's *valid* tokens only (the last block may be partial):
//
//   maxblocks[metadata_block_tables[b, j / R], j % R, n, d] = max_t key(t, n, d)
//   minblocks[metadata_block_tables[b, j / R], j % R, n, d] = min_t key(t, n, d)
//
// (Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", ICML 2024).
// R metadata rows are stored together as one metadata block. NaN propagates, as in torch.maximum;
// the sign of a zero and the payload of a NaN are unspecified.

#ifndef SELECT_ATTN_OPS_QUEST_PREFILL_METADATA_H_
#define SELECT_ATTN_OPS_QUEST_PREFILL_METADATA_H_

#include <dlpack/dlpack.h>

#include <cstdint>

#include "select_attn_ops/common.h"

namespace select_attn {

// Checked arguments in the form every backend takes. Strides are in elements; the last dimension of
// every tensor is contiguous.
struct QuestPrefillMetadataParams {
  int64_t batch;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t block_size;                       // tokens per KV block
  int64_t rows_per_metadata_block;          // R
  int64_t num_kv_blocks;                    // in the pool
  int64_t num_metadata_blocks;              // in the pool
  int64_t max_kv_blocks_per_request;        // MKBPR, the columns of block_tables
  int64_t max_metadata_blocks_per_request;  // MMBPR, the columns of metadata_block_tables
  DType dtype;                              // of k_cache, maxblocks and minblocks

  const void* k_cache;         // [num_kv_blocks, block_size, num_kv_heads, head_dim]
  int64_t k_cache_strides[3];  // of block, token, head

  const int32_t* block_tables;  // [batch, max_kv_blocks_per_request], physical KV blocks
  int64_t block_tables_stride;  // of a request

  const int32_t* seq_lens;           // [batch], in tokens
  const int32_t* metadata_seq_lens;  // [batch], in tokens; null: recompute everything

  const int32_t* metadata_block_tables;  // [batch, max_metadata_blocks_per_request]
  int64_t metadata_block_tables_stride;  // of a request

  void* maxblocks;               // [num_metadata_blocks, R, num_kv_heads, head_dim], written
  int64_t maxblocks_strides[3];  // of metadata block, row, head
  void* minblocks;               // as maxblocks
  int64_t minblocks_strides[3];
};

// k_cache [num_kv_blocks, block_size, N, D], block_tables [B, MKBPR], seq_lens [B],
// metadata_block_tables [B, MMBPR], maxblocks and minblocks [num_meta_blocks, R, N, D]; with
// metadata_seq_lens [B] (null: all zero) only KV blocks from metadata_seq_lens[b] / block_size on
// are recomputed. Keys and metadata are float16, bfloat16 or float32, all the same; the rest int32.
// Strides and offsets are free as long as the last dimension is contiguous.
//
// In a metadata block whose row 0 the call writes, the rows behind the request's last KV block
// become zero; an update that starts later writes only the rows it recomputes. A request with
// nothing in its range writes nothing. maxblocks and minblocks may alias k_cache and its V cache
// (one pool) if no metadata block is also one of the KV blocks read. Two requests may share a
// metadata block if R == 1 and it describes the same KV block with the same valid tokens; any other
// sharing leaves unspecified values in it.
//
// Runs on the device that holds k_cache, on `stream`, and returns once the work is queued; on the
// CPU, once it is done. Device backends neither allocate nor synchronize.
//
// Throws Error before anything is written:
//   kTypeError            a dtype is not as listed
//   kValueError           a rank, device, shape or layout is not as listed; an output overlaps
//                         itself, a table or lengths; on the CPU also: a length is negative or
//                         beyond what the tables hold, metadata_seq_lens[b] is not in [0,
//                         seq_lens[b]], or a table entry that is read lies outside its pool
//                         (devices clamp or skip instead)
//   kNotImplementedError  no backend for the device, or a limit of it
//   kRuntimeError         the device failed, or memory ran out
SELECT_ATTN_EXPORT void QuestPrefillMetadata(const DLTensor& k_cache, const DLTensor& block_tables,
                                             const DLTensor& seq_lens,
                                             const DLTensor& metadata_block_tables,
                                             const DLTensor& maxblocks, const DLTensor& minblocks,
                                             const DLTensor* metadata_seq_lens = nullptr,
                                             Stream stream = nullptr);

}  // namespace select_attn

#endif  // SELECT_ATTN_OPS_QUEST_PREFILL_METADATA_H_
