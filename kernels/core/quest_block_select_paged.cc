#include "select_attn_ops/quest_block_select_paged.h"

#include <string>

#include "core/arguments.h"
#include "core/backend.h"
#include "core/block_ranges.h"

namespace select_attn {
namespace {

constexpr char kName[] = "quest_block_select_paged";

QuestBlockSelectPagedParams Check(const DLTensor& query, const DLTensor& maxblocks,
                                  const DLTensor& minblocks, const DLTensor& metadata_block_tables,
                                  const DLTensor& seq_lens, const DLTensor& selected_indices,
                                  const QuestBlockSelectPagedOptions& options) {
  // The Python function calls its output `out`, the original's calls it `selected_indices`.
  const ArgumentChecker extents({
      {"query", &query, ElementType::kFloat, {Dim::kBatch, Dim::kHeads, Dim::kHeadDim}},
      {"maxblocks",
       &maxblocks,
       ElementType::kFloat,
       {Dim::kMetadataBlocks, Dim::kRows, Dim::kKvHeads, Dim::kHeadDim}},
      {"minblocks",
       &minblocks,
       ElementType::kFloat,
       {Dim::kMetadataBlocks, Dim::kRows, Dim::kKvHeads, Dim::kHeadDim}},
      {"metadata_block_tables",
       &metadata_block_tables,
       ElementType::kInt32,
       {Dim::kBatch, Dim::kMaxMetadataBlocks}},
      {"seq_lens", &seq_lens, ElementType::kInt32, {Dim::kBatch}},
      {"selected_indices (out)",
       &selected_indices,
       ElementType::kInt32,
       {Dim::kBatch, Dim::kKvHeads, Dim::kK},
       Access::kWrite},
      {"metadata_seq_lens", options.metadata_seq_lens, ElementType::kInt32, {Dim::kBatch}},
      {"workspace", options.workspace, ElementType::kUInt8, {Dim::kBytes}, Access::kWrite},
  });
  if (extents[Dim::kHeads] % extents[Dim::kKvHeads] != 0) {
    ThrowValueError("query must have a multiple of the " + std::to_string(extents[Dim::kKvHeads]) +
                    " KV heads of maxblocks, got " + std::to_string(extents[Dim::kHeads]) +
                    " heads");
  }
  if (options.tokens_since_metadata_update < -1) {
    ThrowValueError("tokens_since_metadata_update must be at least -1, got " +
                    std::to_string(options.tokens_since_metadata_update));
  }
  if (options.tokens_since_metadata_update >= 0 && options.metadata_seq_lens != nullptr) {
    ThrowValueError("expected tokens_since_metadata_update or metadata_seq_lens, got both");
  }
  if (options.block_size.value_or(1) < 1) {
    ThrowValueError("block_size must be at least 1, got " + std::to_string(*options.block_size));
  }
  if (!options.block_size.has_value() && extents[Dim::kRows] == 1) {
    ThrowValueError(
        "block_size must be given where metadata blocks have one row, got none for maxblocks of "
        "R == 1 (quest_block_select_paged takes one)");
  }
  return {
      /*batch=*/extents[Dim::kBatch],
      /*num_heads=*/extents[Dim::kHeads],
      /*num_kv_heads=*/extents[Dim::kKvHeads],
      /*head_dim=*/extents[Dim::kHeadDim],
      /*block_size=*/options.block_size.value_or(extents[Dim::kRows]),
      /*rows_per_metadata_block=*/extents[Dim::kRows],
      /*num_metadata_blocks=*/extents[Dim::kMetadataBlocks],
      /*max_metadata_blocks_per_request=*/extents[Dim::kMaxMetadataBlocks],
      /*k=*/extents[Dim::kK],
      /*tokens_since_metadata_update=*/options.tokens_since_metadata_update,
      /*dtype=*/extents.dtype(),
      /*query=*/Data(query),
      /*query_strides=*/{Stride(query, 0), Stride(query, 1)},
      /*maxblocks=*/Data(maxblocks),
      /*maxblocks_strides=*/{Stride(maxblocks, 0), Stride(maxblocks, 1), Stride(maxblocks, 2)},
      /*minblocks=*/Data(minblocks),
      /*minblocks_strides=*/{Stride(minblocks, 0), Stride(minblocks, 1), Stride(minblocks, 2)},
      /*metadata_block_tables=*/static_cast<const int32_t*>(Data(metadata_block_tables)),
      /*metadata_block_tables_stride=*/Stride(metadata_block_tables, 0),
      /*seq_lens=*/static_cast<const int32_t*>(Data(seq_lens)),
      /*metadata_seq_lens=*/DataOr<const int32_t>(options.metadata_seq_lens, nullptr),
      /*selected_indices=*/static_cast<int32_t*>(Data(selected_indices)),
      /*selected_indices_strides=*/{Stride(selected_indices, 0), Stride(selected_indices, 1)},
      /*workspace=*/DataOr<void>(options.workspace, nullptr),
      /*workspace_bytes=*/options.workspace == nullptr ? 0 : extents[Dim::kBytes],
  };
}

void CheckValues(const QuestBlockSelectPagedParams& p) {
  const int64_t rows = p.rows_per_metadata_block;
  const int64_t capacity = SaturatingProduct(p.max_metadata_blocks_per_request, rows);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t seq_len = p.seq_lens[b];
    if (seq_len < 0) ThrowBadValue("seq_lens", b, -1, "at least 0", seq_len);
    if (p.metadata_seq_lens != nullptr) {
      CheckLength("metadata_seq_lens", b, p.metadata_seq_lens[b], seq_len,
                  ", the request's length");
    }
    const RankedBlocks ranked = RankBlocks(seq_len, MetadataLength(p, b), p.block_size);
    if (ranked.num_scored() <= 0) continue;
    if (ranked.scored_end > capacity) {
      ThrowBadValue("seq_lens", b, -1,
                    "at most " + std::to_string(SaturatingProduct(capacity, p.block_size)) +
                        " outside the window, what metadata_block_tables holds",
                    seq_len);
    }
    CheckTableEntries(
        "metadata_block_tables", p.metadata_block_tables + b * p.metadata_block_tables_stride, b,
        ranked.scored_begin / rows, (ranked.scored_end - 1) / rows + 1, p.num_metadata_blocks);
  }
}

}  // namespace

void QuestBlockSelectPaged(const DLTensor& query, const DLTensor& maxblocks,
                           const DLTensor& minblocks, const DLTensor& metadata_block_tables,
                           const DLTensor& seq_lens, const DLTensor& selected_indices,
                           const QuestBlockSelectPagedOptions& options, Stream stream) {
  const QuestBlockSelectPagedParams params = Check(
      query, maxblocks, minblocks, metadata_block_tables, seq_lens, selected_indices, options);
  const auto& op =
      OperatorFor(query.device, kName, &BackendTable::quest_block_select_paged, params);
  CheckWorkspace(op, query.device, params);
  RunOperator(op, query.device, kName, params, stream, CheckValues);
}

int64_t QuestBlockSelectPagedWorkspaceSize(const DLTensor& query, const DLTensor& maxblocks,
                                           const DLTensor& minblocks,
                                           const DLTensor& metadata_block_tables,
                                           const DLTensor& seq_lens,
                                           const DLTensor& selected_indices,
                                           const QuestBlockSelectPagedOptions& options) {
  const QuestBlockSelectPagedParams params = Check(
      query, maxblocks, minblocks, metadata_block_tables, seq_lens, selected_indices, options);
  return WorkspaceSize(
      OperatorFor(query.device, kName, &BackendTable::quest_block_select_paged, params),
      query.device, params);
}

}  // namespace select_attn
