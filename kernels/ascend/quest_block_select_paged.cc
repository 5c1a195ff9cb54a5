// Host side of quest_block_select_paged on Ascend: one launch that scores, one that merges.

#include "select_attn_ops/quest_block_select_paged.h"

#include "ascend/backend.h"
#include "ascend/device.h"
#include "ascend/host_arguments.h"
#include "ascend/launch.h"
#include "ascend/limits.h"

namespace select_attn::ascend {
namespace {

constexpr int64_t kAlignment = 32;
constexpr int64_t kPairBytes = 8;  // of a score and an index

const char* Unsupported(const QuestBlockSelectPagedParams& p, DLDevice /*device*/) {
  const char* limit = UnsupportedHeadDim(p.head_dim);
  return limit != nullptr ? limit : UnsupportedK(p.k);
}

int64_t PartialListBytes(int64_t k) {
  const int64_t bytes = kPartialHeaderBytes + k * kPairBytes;
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// With room to align the whole. What a call leaves in it is never read by another.
int64_t WorkspaceSize(const QuestBlockSelectPagedParams& p, DLDevice device) {
  return kAlignment - 1 + NumVectorCores(device) * kPartialLists * PartialListBytes(p.k);
}

const char* Run(const QuestBlockSelectPagedParams& p, DLDevice device, Stream stream) {
  if (p.batch == 0) return nullptr;
  const int64_t num_cores = NumVectorCores(device);
  if (num_cores == 0) return "the device does not say how many vector cores it has";
  const QuestBlockSelectPagedArguments arguments = {
      /*batch=*/p.batch,
      /*num_heads=*/p.num_heads,
      /*num_kv_heads=*/p.num_kv_heads,
      /*head_dim=*/p.head_dim,
      /*block_size=*/p.block_size,
      /*rows_per_metadata_block=*/p.rows_per_metadata_block,
      /*num_metadata_blocks=*/p.num_metadata_blocks,
      /*k=*/p.k,
      /*tokens_since_metadata_update=*/p.tokens_since_metadata_update,
      /*query=*/AddressOf(p.query),
      /*query_request_stride=*/p.query_strides[0],
      /*query_head_stride=*/p.query_strides[1],
      /*maxblocks=*/PoolOf(p.maxblocks, p.maxblocks_strides),
      /*minblocks=*/PoolOf(p.minblocks, p.minblocks_strides),
      /*metadata_block_tables=*/
      TableOf(p.metadata_block_tables, p.metadata_block_tables_stride,
              p.max_metadata_blocks_per_request),
      /*seq_lens=*/AddressOf(p.seq_lens),
      /*metadata_seq_lens=*/AddressOf(p.metadata_seq_lens),
      /*selected_indices=*/AddressOf(p.selected_indices),
      /*selected_request_stride=*/p.selected_indices_strides[0],
      /*selected_head_stride=*/p.selected_indices_strides[1],
      /*workspace=*/(AddressOf(p.workspace) + kAlignment - 1) / kAlignment * kAlignment,
      /*partial_list_bytes=*/PartialListBytes(p.k),
      /*num_cores=*/num_cores,
  };
  return RunOn(device, [&] {
    const auto cores = static_cast<uint32_t>(num_cores);
    LaunchQuestBlockSelectPaged(arguments, p.dtype, cores, stream);
    if (cores > 1) LaunchQuestBlockSelectMerge(arguments, cores, stream);
  });
}

}  // namespace

BackendOperator<QuestBlockSelectPagedParams> QuestBlockSelectPaged() {
  return {Unsupported, WorkspaceSize, Run};
}

}  // namespace select_attn::ascend
