// quest_block_select_paged: the k KV blocks of each request that matter most to its query.
//
// For request b and KV head n, let q be the float32 mean of the query heads that share n, those h
// with h / (H / N) == n. KV block j, whose keys lie channel-wise between min_j and max_j, scores
//
//   score(j) = sum_d max(q[d] * max_j[d], q[d] * min_j[d])  >=  dot(q, key) for every key in j
//
// (Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", ICML 2024).
// The result lists block numbers *within the request* (0 .. T(b) - 1, where T(b) =
// ceil(seq_lens[b] / block_size)) by decreasing rank:
//
//   1. the window, newest block first: KV blocks from metadata_len / block_size on, whose metadata
//      is stale or missing and is not read
//   2. the sink: KV block 0
//   3. all others by decreasing score, equal scores by increasing number; NaN, all equal, above
//      +inf; -0 equal to +0
//
// Without a metadata length nothing is forced: every block is ranked by its score. Every listed
// block exists, none is listed twice, slots left over hold -1.

#ifndef SELECT_ATTN_OPS_QUEST_BLOCK_SELECT_PAGED_H_
#define SELECT_ATTN_OPS_QUEST_BLOCK_SELECT_PAGED_H_

#include <dlpack/dlpack.h>

#include <cstdint>
#include <optional>

#include "select_attn_ops/common.h"

namespace select_attn {

// Checked arguments in the form every backend takes. Strides are in elements; the last dimension of
// every tensor is contiguous.
struct QuestBlockSelectPagedParams {
  int64_t batch;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t block_size;                       // tokens per KV block
  int64_t rows_per_metadata_block;          // R
  int64_t num_metadata_blocks;              // in the pool
  int64_t max_metadata_blocks_per_request;  // MMBPR, the columns of metadata_block_tables
  int64_t k;                                // blocks to select
  int64_t tokens_since_metadata_update;     // -1: see metadata_seq_lens
  DType dtype;                              // of query, maxblocks and minblocks

  const void* query;         // [batch, num_heads, head_dim]
  int64_t query_strides[2];  // of request, head

  const void* maxblocks;         // [num_metadata_blocks, R, num_kv_heads, head_dim]
  int64_t maxblocks_strides[3];  // of metadata block, row, head
  const void* minblocks;         // as maxblocks
  int64_t minblocks_strides[3];

  const int32_t* metadata_block_tables;  // [batch, max_metadata_blocks_per_request]
  int64_t metadata_block_tables_stride;  // of a request

  const int32_t* seq_lens;           // [batch], in tokens
  const int32_t* metadata_seq_lens;  // [batch], in tokens; null: tokens_since_metadata_update says

  int32_t* selected_indices;            // [batch, num_kv_heads, k], written in full
  int64_t selected_indices_strides[2];  // of request, KV head

  void* workspace;  // [workspace_bytes], or null where the backend needs none
  int64_t workspace_bytes;
};

// Options that most calls leave alone.
struct QuestBlockSelectPagedOptions {
  int64_t tokens_since_metadata_update = -1;    // t >= 0: the metadata length is seq_lens[b] - t
  const DLTensor* metadata_seq_lens = nullptr;  // [B] int32: the metadata length of each request
  std::optional<int64_t> block_size;            // default: R; required when R == 1
  const DLTensor* workspace = nullptr;          // [bytes] uint8, see the workspace size below
};

// query [B, H, D], maxblocks and minblocks [num_meta_blocks, R, N, D], metadata_block_tables
// [B, MMBPR], seq_lens [B], selected_indices [B, N, k]. Queries and metadata are float16, bfloat16
// or float32, all the same; the rest int32. H is a multiple of N. Strides and offsets are free as
// long as the last dimension is contiguous. Only table entries of blocks that are scored are read.
//
// Runs on the device that holds `query`, on `stream`, and returns once the work is queued; on the
// CPU, once it is done. Device backends neither allocate nor synchronize. The result for a request
// depends neither on the batch around it nor on the number of threads.
//
// Throws Error before anything is written:
//   kTypeError            a dtype is not as listed
//   kValueError           a rank, device, shape or layout is not as listed; H % N != 0; k < 1;
//                         tokens_since_metadata_update < -1, or both it and metadata_seq_lens; no
//                         block_size where R == 1; the output overlaps itself or another argument;
//                         the workspace is too small; on the CPU also: a length is negative,
//                         metadata_seq_lens[b] is not in [0, seq_lens[b]], a block to be scored is
//                         beyond what the tables hold, or a table entry that is read lies outside
//                         the pool (devices clamp or skip instead)
//   kNotImplementedError  no backend for the device, or a limit of it
//   kRuntimeError         the device failed, or memory ran out
SELECT_ATTN_EXPORT void QuestBlockSelectPaged(const DLTensor& query, const DLTensor& maxblocks,
                                              const DLTensor& minblocks,
                                              const DLTensor& metadata_block_tables,
                                              const DLTensor& seq_lens,
                                              const DLTensor& selected_indices,
                                              const QuestBlockSelectPagedOptions& options = {},
                                              Stream stream = nullptr);

// Bytes of workspace that a call with these arguments needs; it depends on shapes alone. Zero on
// the CPU. The workspace is zero-filled by the caller before its first use, is left ready for the
// next call, and serves one stream at a time. Throws as the call itself does.
SELECT_ATTN_EXPORT int64_t QuestBlockSelectPagedWorkspaceSize(
    const DLTensor& query, const DLTensor& maxblocks, const DLTensor& minblocks,
    const DLTensor& metadata_block_tables, const DLTensor& seq_lens,
    const DLTensor& selected_indices, const QuestBlockSelectPagedOptions& options = {});

}  // namespace select_attn

#endif  // SELECT_ATTN_OPS_QUEST_BLOCK_SELECT_PAGED_H_
