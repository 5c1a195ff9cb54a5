// Host side of selected_block_tables on Ascend.

#include "select_attn_ops/selected_block_tables.h"

#include "ascend/backend.h"
#include "ascend/device.h"
#include "ascend/host_arguments.h"
#include "ascend/launch.h"
#include "ascend/limits.h"

namespace select_attn::ascend {
namespace {

const char* Unsupported(const SelectedBlockTablesParams& p, DLDevice /*device*/) {
  const char* limit = UnsupportedK(p.k);
  return limit != nullptr ? limit : UnsupportedBlocks(p.max_kv_blocks_per_request);
}

const char* Run(const SelectedBlockTablesParams& p, DLDevice device, Stream stream) {
  if (p.batch == 0) return nullptr;
  const int64_t num_cores = NumVectorCores(device);
  if (num_cores == 0) return "the device does not say how many vector cores it has";
  const SelectedBlockTablesArguments arguments = {
      /*batch=*/p.batch,
      /*num_kv_heads=*/p.num_kv_heads,
      /*k=*/p.k,
      /*block_size=*/p.block_size,
      /*selected_indices=*/AddressOf(p.selected_indices),
      /*selected_request_stride=*/p.selected_indices_strides[0],
      /*selected_head_stride=*/p.selected_indices_strides[1],
      /*block_tables=*/TableOf(p.block_tables, p.block_tables_stride, p.max_kv_blocks_per_request),
      /*seq_lens=*/AddressOf(p.seq_lens),
      /*tables=*/AddressOf(p.tables),
      /*tables_request_stride=*/p.tables_strides[0],
      /*tables_head_stride=*/p.tables_strides[1],
      /*lens=*/AddressOf(p.lens),
      /*lens_stride=*/p.lens_stride,
  };
  return RunOn(device, [&] {
    LaunchSelectedBlockTables(arguments, static_cast<uint32_t>(num_cores), stream);
  });
}

}  // namespace

BackendOperator<SelectedBlockTablesParams> SelectedBlockTables() {
  return {Unsupported, nullptr, Run};
}

}  // namespace select_attn::ascend
