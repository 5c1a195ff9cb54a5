// Host side of quest_prefill_metadata on Ascend.

#include "select_attn_ops/quest_prefill_metadata.h"

#include "ascend/backend.h"
#include "ascend/device.h"
#include "ascend/host_arguments.h"
#include "ascend/launch.h"
#include "ascend/limits.h"

namespace select_attn::ascend {
namespace {

const char* Unsupported(const QuestPrefillMetadataParams& p, DLDevice /*device*/) {
  return UnsupportedHeadDim(p.head_dim);
}

const char* Run(const QuestPrefillMetadataParams& p, DLDevice device, Stream stream) {
  if (p.batch == 0) return nullptr;
  const int64_t num_cores = NumVectorCores(device);
  if (num_cores == 0) return "the device does not say how many vector cores it has";
  const QuestPrefillMetadataArguments arguments = {
      /*batch=*/p.batch,
      /*num_kv_heads=*/p.num_kv_heads,
      /*head_dim=*/p.head_dim,
      /*block_size=*/p.block_size,
      /*rows_per_metadata_block=*/p.rows_per_metadata_block,
      /*num_kv_blocks=*/p.num_kv_blocks,
      /*num_metadata_blocks=*/p.num_metadata_blocks,
      /*k_cache=*/PoolOf(p.k_cache, p.k_cache_strides),
      /*maxblocks=*/PoolOf(p.maxblocks, p.maxblocks_strides),
      /*minblocks=*/PoolOf(p.minblocks, p.minblocks_strides),
      /*block_tables=*/TableOf(p.block_tables, p.block_tables_stride, p.max_kv_blocks_per_request),
      /*metadata_block_tables=*/
      TableOf(p.metadata_block_tables, p.metadata_block_tables_stride,
              p.max_metadata_blocks_per_request),
      /*seq_lens=*/AddressOf(p.seq_lens),
      /*metadata_seq_lens=*/AddressOf(p.metadata_seq_lens),
  };
  return RunOn(device, [&] {
    LaunchQuestPrefillMetadata(arguments, p.dtype, static_cast<uint32_t>(num_cores), stream);
  });
}

}  // namespace

BackendOperator<QuestPrefillMetadataParams> QuestPrefillMetadata() {
  return {Unsupported, nullptr, Run};
}

}  // namespace select_attn::ascend
