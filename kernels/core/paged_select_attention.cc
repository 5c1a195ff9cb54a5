#include "select_attn_ops/paged_select_attention.h"

#include <cmath>
#include <cstdio>
#include <limits>
#include <string>

#include "core/arguments.h"
#include "core/backend.h"
#include "core/block_ranges.h"

namespace select_attn {
namespace {

constexpr char kName[] = "paged_select_attention";

// Kernels multiply by scale * log2(e) in float32.
constexpr double kMaxScale = std::numeric_limits<float>::max() / 1.4426950408889634;

PagedSelectAttentionParams Check(const DLTensor& query, const DLTensor& k_cache,
                                 const DLTensor& v_cache, const DLTensor& block_tables,
                                 const DLTensor& seq_lens, const DLTensor& selected_indices,
                                 const DLTensor& out, const PagedSelectAttentionOptions& options) {
  const ArgumentChecker extents({
      {"query", &query, ElementType::kFloat, {Dim::kBatch, Dim::kHeads, Dim::kHeadDim}},
      {"k_cache",
       &k_cache,
       ElementType::kFloat,
       {Dim::kKvBlocks, Dim::kBlockSize, Dim::kKvHeads, Dim::kHeadDim}},
      {"v_cache",
       &v_cache,
       ElementType::kFloat,
       {Dim::kKvBlocks, Dim::kBlockSize, Dim::kKvHeads, Dim::kHeadDim}},
      {"block_tables", &block_tables, ElementType::kInt32, {Dim::kBatch, Dim::kMaxKvBlocks}},
      {"seq_lens", &seq_lens, ElementType::kInt32, {Dim::kBatch}},
      {"selected_indices",
       &selected_indices,
       ElementType::kInt32,
       {Dim::kBatch, Dim::kKvHeads, Dim::kK}},
      {"out", &out, ElementType::kFloat, {Dim::kBatch, Dim::kHeads, Dim::kHeadDim}, Access::kWrite},
      {"lse", options.lse, ElementType::kFloat32, {Dim::kBatch, Dim::kHeads}, Access::kWrite},
      {"workspace", options.workspace, ElementType::kUInt8, {Dim::kBytes}, Access::kWrite},
  });
  if (extents[Dim::kHeads] % extents[Dim::kKvHeads] != 0) {
    ThrowValueError("query must have a multiple of the " + std::to_string(extents[Dim::kKvHeads]) +
                    " KV heads of k_cache, got " + std::to_string(extents[Dim::kHeads]) + " heads");
  }
  const double scale =
      options.scale.value_or(1 / std::sqrt(static_cast<double>(extents[Dim::kHeadDim])));
  if (!(std::abs(scale) <= kMaxScale)) {
    char text[32];
    std::snprintf(text, sizeof(text), "%g", scale);
    ThrowValueError(std::string("scale must be finite in float32, got ") + text);
  }
  return {
      /*batch=*/extents[Dim::kBatch],
      /*num_heads=*/extents[Dim::kHeads],
      /*num_kv_heads=*/extents[Dim::kKvHeads],
      /*head_dim=*/extents[Dim::kHeadDim],
      /*block_size=*/extents[Dim::kBlockSize],
      /*num_kv_blocks=*/extents[Dim::kKvBlocks],
      /*max_kv_blocks_per_request=*/extents[Dim::kMaxKvBlocks],
      /*k=*/extents[Dim::kK],
      /*scale=*/scale,
      /*dtype=*/extents.dtype(),
      /*query=*/Data(query),
      /*query_strides=*/{Stride(query, 0), Stride(query, 1)},
      /*k_cache=*/Data(k_cache),
      /*k_cache_strides=*/{Stride(k_cache, 0), Stride(k_cache, 1), Stride(k_cache, 2)},
      /*v_cache=*/Data(v_cache),
      /*v_cache_strides=*/{Stride(v_cache, 0), Stride(v_cache, 1), Stride(v_cache, 2)},
      /*block_tables=*/static_cast<const int32_t*>(Data(block_tables)),
      /*block_tables_stride=*/Stride(block_tables, 0),
      /*seq_lens=*/static_cast<const int32_t*>(Data(seq_lens)),
      /*selected_indices=*/static_cast<const int32_t*>(Data(selected_indices)),
      /*selected_indices_strides=*/{Stride(selected_indices, 0), Stride(selected_indices, 1)},
      /*out=*/Data(out),
      /*out_strides=*/{Stride(out, 0), Stride(out, 1)},
      /*lse=*/DataOr<float>(options.lse, nullptr),
      /*lse_stride=*/options.lse == nullptr ? 0 : Stride(*options.lse, 0),
      /*workspace=*/DataOr<void>(options.workspace, nullptr),
      /*workspace_bytes=*/options.workspace == nullptr ? 0 : extents[Dim::kBytes],
  };
}

void CheckValues(const PagedSelectAttentionParams& p) {
  const int64_t capacity = SaturatingProduct(p.max_kv_blocks_per_request, p.block_size);
  for (int64_t b = 0; b < p.batch; ++b) {
    CheckLength("seq_lens", b, p.seq_lens[b], capacity, ", what block_tables holds");
    const int64_t num_blocks = NumKvBlocks(p.seq_lens[b], p.block_size);
    const int32_t* table = p.block_tables + b * p.block_tables_stride;
    for (int64_t n = 0; n < p.num_kv_heads; ++n) {
      const int32_t* selected = p.selected_indices + b * p.selected_indices_strides[0] +
                                n * p.selected_indices_strides[1];
      CheckSelectedIndices(selected, b, n, p.k, num_blocks);
      for (int64_t i = 0; i < p.k; ++i) {
        const int64_t j = selected[i];
        if (j >= 0) CheckTableEntries("block_tables", table, b, j, j + 1, p.num_kv_blocks);
      }
    }
  }
}

}  // namespace

void PagedSelectAttention(const DLTensor& query, const DLTensor& k_cache, const DLTensor& v_cache,
                          const DLTensor& block_tables, const DLTensor& seq_lens,
                          const DLTensor& selected_indices, const DLTensor& out,
                          const PagedSelectAttentionOptions& options, Stream stream) {
  const PagedSelectAttentionParams params =
      Check(query, k_cache, v_cache, block_tables, seq_lens, selected_indices, out, options);
  const auto& op = OperatorFor(query.device, kName, &BackendTable::paged_select_attention, params);
  CheckWorkspace(op, query.device, params);
  RunOperator(op, query.device, kName, params, stream, CheckValues);
}

int64_t PagedSelectAttentionWorkspaceSize(const DLTensor& query, const DLTensor& k_cache,
                                          const DLTensor& v_cache, const DLTensor& block_tables,
                                          const DLTensor& seq_lens,
                                          const DLTensor& selected_indices, const DLTensor& out,
                                          const PagedSelectAttentionOptions& options) {
  const PagedSelectAttentionParams params =
      Check(query, k_cache, v_cache, block_tables, seq_lens, selected_indices, out, options);
  return WorkspaceSize(
      OperatorFor(query.device, kName, &BackendTable::paged_select_attention, params), query.device,
      params);
}

}  // namespace select_attn
