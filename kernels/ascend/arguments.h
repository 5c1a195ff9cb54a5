// What the host tells a kernel: plain numbers, by value. An address is one in global memory, a
// stride is in elements, and lengths, tables and their values are for the kernel to read and clamp.

#ifndef SELECT_ATTN_OPS_ASCEND_ARGUMENTS_H_
#define SELECT_ATTN_OPS_ASCEND_ARGUMENTS_H_

#include <cstdint>

namespace select_attn::ascend {

// Limits of the kernels' buffers. 16 elements of 2 bytes fill one block of the unified buffer.
constexpr int64_t kHeadDimStep = 16;
constexpr int64_t kMostHeadDim = 256;
constexpr int64_t kMostK = 512;
constexpr int64_t kMostBlocksPerRequest = int64_t{1} << 24;  // of selected_block_tables

// Rows of head_dim elements, [blocks, rows, heads].
struct PoolArguments {
  uint64_t address;
  int64_t block_stride;
  int64_t row_stride;
  int64_t head_stride;
};

struct TableArguments {
  uint64_t address;  // int32, [batch, columns]
  int64_t stride;    // of a request
  int64_t columns;
};

struct QuestPrefillMetadataArguments {
  int64_t batch;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t block_size;               // tokens
  int64_t rows_per_metadata_block;  // R
  int64_t num_kv_blocks;
  int64_t num_metadata_blocks;
  PoolArguments k_cache;
  PoolArguments maxblocks;
  PoolArguments minblocks;
  TableArguments block_tables;
  TableArguments metadata_block_tables;
  uint64_t seq_lens;           // int32, [batch]
  uint64_t metadata_seq_lens;  // int32, [batch]; 0: recompute everything
};

struct QuestBlockSelectPagedArguments {
  int64_t batch;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t block_size;               // tokens
  int64_t rows_per_metadata_block;  // R
  int64_t num_metadata_blocks;
  int64_t k;
  int64_t tokens_since_metadata_update;  // -1: see metadata_seq_lens
  uint64_t query;                        // [batch, num_heads, head_dim]
  int64_t query_request_stride;
  int64_t query_head_stride;
  PoolArguments maxblocks;
  PoolArguments minblocks;
  TableArguments metadata_block_tables;
  uint64_t seq_lens;           // int32, [batch]
  uint64_t metadata_seq_lens;  // int32, [batch]; 0: tokens_since_metadata_update says
  uint64_t selected_indices;   // int32, [batch, num_kv_heads, k]
  int64_t selected_request_stride;
  int64_t selected_head_stride;
  uint64_t workspace;          // kPartialLists lists per core, from an address that 32 divides
  int64_t partial_list_bytes;  // a multiple of 32
  int64_t num_cores;           // of the launch, the same for both kernels
};

struct SelectedBlockTablesArguments {
  int64_t batch;
  int64_t num_kv_heads;
  int64_t k;
  int64_t block_size;         // tokens
  uint64_t selected_indices;  // int32, [batch, num_kv_heads, k]
  int64_t selected_request_stride;
  int64_t selected_head_stride;
  TableArguments block_tables;
  uint64_t seq_lens;  // int32, [batch]
  uint64_t tables;    // int32, [batch, num_kv_heads, k]
  int64_t tables_request_stride;
  int64_t tables_head_stride;
  uint64_t lens;  // int32, [batch, num_kv_heads]
  int64_t lens_stride;
};

// A core leaves at most two lists for the merge: of a request's head that another core began, and
// of one that another core goes on with.
constexpr int64_t kPartialLists = 2;
constexpr int64_t kPartialHeaderBytes = 32;  // the number of pairs, as int32; then the pairs

}  // namespace select_attn::ascend

#endif  // SELECT_ATTN_OPS_ASCEND_ARGUMENTS_H_
