// The CPU backend as the rest of the library sees it, and the kernels that its table lists.

#ifndef SELECT_ATTN_OPS_CPU_BACKEND_H_
#define SELECT_ATTN_OPS_CPU_BACKEND_H_

#include "core/backend.h"

namespace select_attn::cpu {

// Throws Error (kValueError) if an environment variable of the CPU backend makes no sense.
const BackendTable& Backend();

void PagedSelectAttention(const PagedSelectAttentionParams& p);
void QuestPrefillMetadata(const QuestPrefillMetadataParams& p);
void QuestBlockSelectPaged(const QuestBlockSelectPagedParams& p);
void SelectedBlockTables(const SelectedBlockTablesParams& p);

}  // namespace select_attn::cpu

#endif  // SELECT_ATTN_OPS_CPU_BACKEND_H_
