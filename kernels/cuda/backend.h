// The operators that the CUDA backend lists in its table.

#ifndef SELECT_ATTN_OPS_CUDA_BACKEND_H_
#define SELECT_ATTN_OPS_CUDA_BACKEND_H_

#include "core/backend.h"

namespace select_attn::cuda {

BackendOperator<QuestPrefillMetadataParams> QuestPrefillMetadata();
BackendOperator<QuestBlockSelectPagedParams> QuestBlockSelectPaged();
BackendOperator<SelectedBlockTablesParams> SelectedBlockTables();
BackendOperator<PagedSelectAttentionParams> PagedSelectAttention();
BackendOperator<ReadDeviceMemoryParams> ReadDeviceMemory();

}  // namespace select_attn::cuda

#endif  // SELECT_ATTN_OPS_CUDA_BACKEND_H_
