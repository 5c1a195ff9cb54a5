// selected_block_tables: a selection as the block tables that paged attention kernels take.
//
// For request b and KV head n, let S be the block numbers in selected_indices[b, n], -1 left out,
// by increasing number (so that a partial last block comes last). Then
//
//   tables[b, n, i] = block_tables[b, S[i]]  for i < |S|, and -1 behind
//   lens[b, n]      = the tokens in those blocks
//
// A block listed twice stays listed twice and its tokens count twice.

#ifndef SELECT_ATTN_OPS_SELECTED_BLOCK_TABLES_H_
#define SELECT_ATTN_OPS_SELECTED_BLOCK_TABLES_H_

#include <dlpack/dlpack.h>

#include <cstdint>

#include "select_attn_ops/common.h"

namespace select_attn {

// Checked arguments in the form every backend takes. Strides are in elements; the last dimension of
// every tensor is contiguous.
struct SelectedBlockTablesParams {
  int64_t batch;
  int64_t num_kv_heads;
  int64_t k;
  int64_t block_size;                 // tokens per KV block
  int64_t max_kv_blocks_per_request;  // MKBPR, the columns of block_tables

  const int32_t* selected_indices;      // [batch, num_kv_heads, k]
  int64_t selected_indices_strides[2];  // of request, KV head

  const int32_t* block_tables;  // [batch, max_kv_blocks_per_request], physical KV blocks
  int64_t block_tables_stride;  // of a request

  const int32_t* seq_lens;  // [batch], in tokens

  int32_t* tables;            // [batch, num_kv_heads, k], written in full
  int64_t tables_strides[2];  // of request, KV head
  int32_t* lens;              // [batch, num_kv_heads], in tokens, written in full
  int64_t lens_stride;        // of a request
};

// selected_indices [B, N, k], block_tables [B, MKBPR], seq_lens [B], tables [B, N, k], lens [B, N],
// all int32. Strides and offsets are free as long as the last dimension is contiguous.
//
// Runs on the device that holds selected_indices, on `stream`, and returns once the work is queued;
// on the CPU, once it is done. Device backends neither allocate nor synchronize.
//
// Throws Error before anything is written:
//   kTypeError            a dtype is not int32
//   kValueError           a rank, device, shape or layout is not as listed; block_size < 1; an
//                         output overlaps itself or another argument; on the CPU also: a length is
//                         negative or beyond what block_tables holds, a selected number is below -1
//                         or does not exist in its request, a block table entry that is read is
//                         negative (devices leave such blocks out), a row of more than 2^31 - 1
//                         tokens (devices write an unspecified length)
//   kNotImplementedError  no backend for the device, or a limit of it
//   kRuntimeError         the device failed, or memory ran out
SELECT_ATTN_EXPORT void SelectedBlockTables(const DLTensor& selected_indices,
                                            const DLTensor& block_tables, const DLTensor& seq_lens,
                                            int64_t block_size, const DLTensor& tables,
                                            const DLTensor& lens, Stream stream = nullptr);

}  // namespace select_attn

#endif  // SELECT_ATTN_OPS_SELECTED_BLOCK_TABLES_H_
