// Where host code meets kernels: queues a kernel on `num_cores` vector cores of the current device.
// launch.asc, which only the Ascend compiler reads, has the definitions.

#ifndef SELECT_ATTN_OPS_ASCEND_LAUNCH_H_
#define SELECT_ATTN_OPS_ASCEND_LAUNCH_H_

#include <cstdint>

#include "ascend/arguments.h"
#include "select_attn_ops/common.h"

namespace select_attn::ascend {

void LaunchQuestPrefillMetadata(const QuestPrefillMetadataArguments& arguments, DType dtype,
                                uint32_t num_cores, Stream stream);
void LaunchQuestBlockSelectPaged(const QuestBlockSelectPagedArguments& arguments, DType dtype,
                                 uint32_t num_cores, Stream stream);
void LaunchQuestBlockSelectMerge(const QuestBlockSelectPagedArguments& arguments,
                                 uint32_t num_cores, Stream stream);
void LaunchSelectedBlockTables(const SelectedBlockTablesArguments& arguments, uint32_t num_cores,
                               Stream stream);

}  // namespace select_attn::ascend

#endif  // SELECT_ATTN_OPS_ASCEND_LAUNCH_H_
