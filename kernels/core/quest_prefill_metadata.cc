#include "select_attn_ops/quest_prefill_metadata.h"

#include "core/arguments.h"
#include "core/backend.h"
#include "core/block_ranges.h"

namespace select_attn {
namespace {

constexpr char kName[] = "quest_prefill_metadata";

QuestPrefillMetadataParams Check(const DLTensor& k_cache, const DLTensor& block_tables,
                                 const DLTensor& seq_lens, const DLTensor& metadata_block_tables,
                                 const DLTensor& maxblocks, const DLTensor& minblocks,
                                 const DLTensor* metadata_seq_lens) {
  const ArgumentChecker extents({
      {"k_cache",
       &k_cache,
       ElementType::kFloat,
       {Dim::kKvBlocks, Dim::kBlockSize, Dim::kKvHeads, Dim::kHeadDim}},
      {"block_tables", &block_tables, ElementType::kInt32, {Dim::kBatch, Dim::kMaxKvBlocks}},
      {"seq_lens", &seq_lens, ElementType::kInt32, {Dim::kBatch}},
      {"metadata_block_tables",
       &metadata_block_tables,
       ElementType::kInt32,
       {Dim::kBatch, Dim::kMaxMetadataBlocks}},
      {"maxblocks",
       &maxblocks,
       ElementType::kFloat,
       {Dim::kMetadataBlocks, Dim::kRows, Dim::kKvHeads, Dim::kHeadDim},
       Access::kWriteAmongKeys},
      {"minblocks",
       &minblocks,
       ElementType::kFloat,
       {Dim::kMetadataBlocks, Dim::kRows, Dim::kKvHeads, Dim::kHeadDim},
       Access::kWriteAmongKeys},
      {"metadata_seq_lens", metadata_seq_lens, ElementType::kInt32, {Dim::kBatch}},
  });
  if (Data(maxblocks) == Data(minblocks) && extents[Dim::kMetadataBlocks] > 0) {
    ThrowValueError(
        "maxblocks and minblocks are written and must not share memory, got the same address for "
        "both");
  }
  return {
      /*batch=*/extents[Dim::kBatch],
      /*num_kv_heads=*/extents[Dim::kKvHeads],
      /*head_dim=*/extents[Dim::kHeadDim],
      /*block_size=*/extents[Dim::kBlockSize],
      /*rows_per_metadata_block=*/extents[Dim::kRows],
      /*num_kv_blocks=*/extents[Dim::kKvBlocks],
      /*num_metadata_blocks=*/extents[Dim::kMetadataBlocks],
      /*max_kv_blocks_per_request=*/extents[Dim::kMaxKvBlocks],
      /*max_metadata_blocks_per_request=*/extents[Dim::kMaxMetadataBlocks],
      /*dtype=*/extents.dtype(),
      /*k_cache=*/Data(k_cache),
      /*k_cache_strides=*/{Stride(k_cache, 0), Stride(k_cache, 1), Stride(k_cache, 2)},
      /*block_tables=*/static_cast<const int32_t*>(Data(block_tables)),
      /*block_tables_stride=*/Stride(block_tables, 0),
      /*seq_lens=*/static_cast<const int32_t*>(Data(seq_lens)),
      /*metadata_seq_lens=*/DataOr<const int32_t>(metadata_seq_lens, nullptr),
      /*metadata_block_tables=*/static_cast<const int32_t*>(Data(metadata_block_tables)),
      /*metadata_block_tables_stride=*/Stride(metadata_block_tables, 0),
      /*maxblocks=*/Data(maxblocks),
      /*maxblocks_strides=*/{Stride(maxblocks, 0), Stride(maxblocks, 1), Stride(maxblocks, 2)},
      /*minblocks=*/Data(minblocks),
      /*minblocks_strides=*/{Stride(minblocks, 0), Stride(minblocks, 1), Stride(minblocks, 2)},
  };
}

void CheckValues(const QuestPrefillMetadataParams& p) {
  const int64_t kv_capacity = SaturatingProduct(p.max_kv_blocks_per_request, p.block_size);
  const int64_t metadata_capacity = SaturatingProduct(
      SaturatingProduct(p.max_metadata_blocks_per_request, p.rows_per_metadata_block),
      p.block_size);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t seq_len = p.seq_lens[b];
    CheckLength("seq_lens", b, seq_len, kv_capacity, ", what block_tables holds");
    CheckLength("seq_lens", b, seq_len, metadata_capacity, ", what metadata_block_tables holds");
    if (p.metadata_seq_lens != nullptr) {
      CheckLength("metadata_seq_lens", b, p.metadata_seq_lens[b], seq_len,
                  ", the request's length");
    }
    const BlockRange range = BlocksToUpdate(p, b);
    if (range.empty()) continue;
    CheckTableEntries("block_tables", p.block_tables + b * p.block_tables_stride, b, range.begin,
                      range.end, p.num_kv_blocks);
    CheckTableEntries("metadata_block_tables",
                      p.metadata_block_tables + b * p.metadata_block_tables_stride, b,
                      range.begin / p.rows_per_metadata_block,
                      (range.end - 1) / p.rows_per_metadata_block + 1, p.num_metadata_blocks);
  }
}

}  // namespace

void QuestPrefillMetadata(const DLTensor& k_cache, const DLTensor& block_tables,
                          const DLTensor& seq_lens, const DLTensor& metadata_block_tables,
                          const DLTensor& maxblocks, const DLTensor& minblocks,
                          const DLTensor* metadata_seq_lens, Stream stream) {
  const QuestPrefillMetadataParams params =
      Check(k_cache, block_tables, seq_lens, metadata_block_tables, maxblocks, minblocks,
            metadata_seq_lens);
  RunOperator(OperatorFor(k_cache.device, kName, &BackendTable::quest_prefill_metadata, params),
              k_cache.device, kName, params, stream, CheckValues);
}

}  // namespace select_attn
