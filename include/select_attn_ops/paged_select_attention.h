// paged_select_attention: attention of one query token per request over selected KV blocks only.
//
// For request b, query head h and its KV head n = h / (H / N), let S be the valid tokens of the KV
// blocks in selected_indices[b, n], in that order, -1 left out: of block j those of physical block
// block_tables[b, j] that lie before seq_lens[b]. Then
//
//   logit(t)  = scale * dot(query[b, h], key(t, n))         for t in S
//   out[b, h] = sum_t exp(logit(t)) * value(t, n) / sum_t exp(logit(t))
//   lse[b, h] = log(sum_t exp(logit(t)))
//
// With every block of the request selected this is dense attention. A block listed twice counts
// twice. Where nothing is selected, out is 0 and lse is -inf. Logits of NaN or +inf make out and
// lse NaN; where all are -inf, out is NaN and lse -inf, as 0 / 0 and log(0) are. A weight that is 0
// makes NaN of an infinite or NaN value. Nothing outside S is read: what it holds does not matter.

#ifndef SELECT_ATTN_OPS_PAGED_SELECT_ATTENTION_H_
#define SELECT_ATTN_OPS_PAGED_SELECT_ATTENTION_H_

#include <dlpack/dlpack.h>

#include <cstdint>
#include <optional>

#include "select_attn_ops/common.h"

namespace select_attn {

// Checked arguments in the form every backend takes. Strides are in elements; the last dimension of
// every tensor is contiguous.
struct PagedSelectAttentionParams {
  int64_t batch;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t block_size;                 // tokens per KV block
  int64_t num_kv_blocks;              // in the pool
  int64_t max_kv_blocks_per_request;  // MKBPR, the columns of block_tables
  int64_t k;                          // slots per KV head
  double scale;                       // of the dot products, at most 2e38 in magnitude
  DType dtype;                        // of query, k_cache, v_cache and out

  const void* query;         // [batch, num_heads, head_dim]
  int64_t query_strides[2];  // of request, head

  const void* k_cache;         // [num_kv_blocks, block_size, num_kv_heads, head_dim]
  int64_t k_cache_strides[3];  // of block, token, head
  const void* v_cache;         // as k_cache
  int64_t v_cache_strides[3];

  const int32_t* block_tables;  // [batch, max_kv_blocks_per_request], physical KV blocks
  int64_t block_tables_stride;  // of a request

  const int32_t* seq_lens;  // [batch], in tokens

  const int32_t* selected_indices;      // [batch, num_kv_heads, k], blocks within the request
  int64_t selected_indices_strides[2];  // of request, KV head

  void* out;               // [batch, num_heads, head_dim], written in full
  int64_t out_strides[2];  // of request, head
  float* lse;              // [batch, num_heads], written in full, or null
  int64_t lse_stride;      // of a request

  void* workspace;  // [workspace_bytes], or null where the backend needs none
  int64_t workspace_bytes;
};

// Options that most calls leave alone.
struct PagedSelectAttentionOptions {
  std::optional<double> scale;          // default: 1 / sqrt(D)
  const DLTensor* lse = nullptr;        // [B, H] float32, written
  const DLTensor* workspace = nullptr;  // [bytes] uint8, see the workspace size below
};

// query and out [B, H, D], k_cache and v_cache [num_kv_blocks, block_size, N, D], block_tables
// [B, MKBPR], seq_lens [B], selected_indices [B, N, k], as quest_block_select_paged writes them.
// Query, caches and out are float16, bfloat16 or float32, all the same; tables, lengths and indices
// int32. H is a multiple of N. Strides and offsets are free as long as the last dimension is
// contiguous: caches are used as they are, K and V interleaved or heads outside tokens. Only table
// entries of selected blocks are read. Arithmetic is float32.
//
// Runs on the device that holds `query`, on `stream`, and returns once the work is queued; on the
// CPU, once it is done. Device backends neither allocate nor synchronize. The result for a request
// depends neither on the batch around it nor on the number of threads.
//
// Throws Error before anything is written:
//   kTypeError            a dtype is not as listed
//   kValueError           a rank, device, shape or layout is not as listed; H % N != 0; a scale
//                         that is not finite in float32; an output overlaps itself or another
//                         argument; the workspace is too small; on the CPU also: a length is
//                         negative or beyond what block_tables holds, a selected number is below -1
//                         or does not exist in its request, or a block table entry that is read
//                         lies outside the pool (devices clamp lengths and leave such blocks out)
//   kNotImplementedError  no backend for the device, or a limit of it
//   kRuntimeError         the device failed, or memory ran out
SELECT_ATTN_EXPORT void PagedSelectAttention(const DLTensor& query, const DLTensor& k_cache,
                                             const DLTensor& v_cache, const DLTensor& block_tables,
                                             const DLTensor& seq_lens,
                                             const DLTensor& selected_indices, const DLTensor& out,
                                             const PagedSelectAttentionOptions& options = {},
                                             Stream stream = nullptr);

// Bytes of workspace that a call with these arguments needs; it depends on shapes alone. Zero on
// the CPU. The workspace is zero-filled by the caller before its first use, is left ready for the
// next call, and serves one stream at a time. Throws as the call itself does.
SELECT_ATTN_EXPORT int64_t PagedSelectAttentionWorkspaceSize(
    const DLTensor& query, const DLTensor& k_cache, const DLTensor& v_cache,
    const DLTensor& block_tables, const DLTensor& seq_lens, const DLTensor& selected_indices,
    const DLTensor& out, const PagedSelectAttentionOptions& options = {});

}  // namespace select_attn

#endif  // SELECT_ATTN_OPS_PAGED_SELECT_ATTENTION_H_
