// The operators that the Ascend backend lists in its table.

#ifndef SELECT_ATTN_OPS_ASCEND_BACKEND_H_
#define SELECT_ATTN_OPS_ASCEND_BACKEND_H_

#include "core/backend.h"

namespace select_attn::ascend {

BackendOperator<QuestPrefillMetadataParams> QuestPrefillMetadata();
BackendOperator<QuestBlockSelectPagedParams> QuestBlockSelectPaged();
BackendOperator<SelectedBlockTablesParams> SelectedBlockTables();

}  // namespace select_attn::ascend

#endif  // SELECT_ATTN_OPS_ASCEND_BACKEND_H_
