#include "select_attn_ops/selected_block_tables.h"

#include <limits>
#include <string>

#include "core/arguments.h"
#include "core/backend.h"
#include "core/block_ranges.h"

namespace select_attn {
namespace {

constexpr char kName[] = "selected_block_tables";

SelectedBlockTablesParams Check(const DLTensor& selected_indices, const DLTensor& block_tables,
                                const DLTensor& seq_lens, int64_t block_size,
                                const DLTensor& tables, const DLTensor& lens) {
  const ArgumentChecker extents({
      {"selected_indices",
       &selected_indices,
       ElementType::kInt32,
       {Dim::kBatch, Dim::kKvHeads, Dim::kK}},
      {"block_tables", &block_tables, ElementType::kInt32, {Dim::kBatch, Dim::kMaxKvBlocks}},
      {"seq_lens", &seq_lens, ElementType::kInt32, {Dim::kBatch}},
      {"out", &tables, ElementType::kInt32, {Dim::kBatch, Dim::kKvHeads, Dim::kK}, Access::kWrite},
      {"lens_out", &lens, ElementType::kInt32, {Dim::kBatch, Dim::kKvHeads}, Access::kWrite},
  });
  if (block_size < 1) {
    ThrowValueError("block_size must be at least 1, got " + std::to_string(block_size));
  }
  return {
      /*batch=*/extents[Dim::kBatch],
      /*num_kv_heads=*/extents[Dim::kKvHeads],
      /*k=*/extents[Dim::kK],
      /*block_size=*/block_size,
      /*max_kv_blocks_per_request=*/extents[Dim::kMaxKvBlocks],
      /*selected_indices=*/static_cast<const int32_t*>(Data(selected_indices)),
      /*selected_indices_strides=*/{Stride(selected_indices, 0), Stride(selected_indices, 1)},
      /*block_tables=*/static_cast<const int32_t*>(Data(block_tables)),
      /*block_tables_stride=*/Stride(block_tables, 0),
      /*seq_lens=*/static_cast<const int32_t*>(Data(seq_lens)),
      /*tables=*/static_cast<int32_t*>(Data(tables)),
      /*tables_strides=*/{Stride(tables, 0), Stride(tables, 1)},
      /*lens=*/static_cast<int32_t*>(Data(lens)),
      /*lens_stride=*/Stride(lens, 0),
  };
}

void CheckRow(const SelectedBlockTablesParams& p, int64_t b, int64_t n, int64_t num_blocks) {
  const int32_t* selected =
      p.selected_indices + b * p.selected_indices_strides[0] + n * p.selected_indices_strides[1];
  const int32_t* table = p.block_tables + b * p.block_tables_stride;
  CheckSelectedIndices(selected, b, n, p.k, num_blocks);
  int64_t num_tokens = 0;
  for (int64_t i = 0; i < p.k; ++i) {
    const int64_t j = selected[i];
    if (j < 0) continue;
    if (table[j] < 0) ThrowBadValue("block_tables", b, j, "at least 0", table[j]);
    num_tokens += NumTokens(p, b, j);
  }
  if (num_tokens > std::numeric_limits<int32_t>::max()) {
    ThrowValueError("selected_indices[" + std::to_string(b) + ", " + std::to_string(n) +
                    "] must hold fewer than 2^31 tokens, got " + std::to_string(num_tokens));
  }
}

void CheckValues(const SelectedBlockTablesParams& p) {
  const int64_t capacity = SaturatingProduct(p.max_kv_blocks_per_request, p.block_size);
  for (int64_t b = 0; b < p.batch; ++b) {
    CheckLength("seq_lens", b, p.seq_lens[b], capacity, ", what block_tables holds");
    const int64_t num_blocks = NumKvBlocks(p.seq_lens[b], p.block_size);
    for (int64_t n = 0; n < p.num_kv_heads; ++n) CheckRow(p, b, n, num_blocks);
  }
}

}  // namespace

void SelectedBlockTables(const DLTensor& selected_indices, const DLTensor& block_tables,
                         const DLTensor& seq_lens, int64_t block_size, const DLTensor& tables,
                         const DLTensor& lens, Stream stream) {
  const SelectedBlockTablesParams params =
      Check(selected_indices, block_tables, seq_lens, block_size, tables, lens);
  RunOperator(
      OperatorFor(selected_indices.device, kName, &BackendTable::selected_block_tables, params),
      selected_indices.device, kName, params, stream, CheckValues);
}

}  // namespace select_attn
