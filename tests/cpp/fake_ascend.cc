// A backend for the loader's test: some operators, a limit, a need for scratch, a failure.

#include "core/backend.h"

namespace select_attn {
namespace {

const char* Description() { return "a fake"; }

const char* Unsupported(const QuestBlockSelectPagedParams& p, DLDevice /*device*/) {
  return p.head_dim > 8 ? "head_dim must be at most 8 on this device" : nullptr;
}

int64_t WorkspaceSize(const QuestBlockSelectPagedParams& p, DLDevice /*device*/) {
  return p.batch * 100;
}

// Succeeds only if Params, device and stream arrive.
const char* Select(const QuestBlockSelectPagedParams& p, DLDevice device, Stream stream) {
  if (device.device_type != kDLExtDev || device.device_id != 1) return "the device is gone";
  if (stream != reinterpret_cast<Stream>(uintptr_t{42})) return "the stream is gone";
  if (p.workspace_bytes < 100 || p.workspace == nullptr) return "the workspace is gone";
  return p.k == 3 ? "error 507: the chip is on fire" : nullptr;
}

BackendTable MakeTable() {
  BackendTable table = {};
  table.version = BackendTable::kVersion;
  table.description = Description;
  table.quest_block_select_paged = {Unsupported, WorkspaceSize, Select};
  return table;
}

}  // namespace
}  // namespace select_attn

extern "C" SELECT_ATTN_EXPORT const select_attn::BackendTable* select_attn_ops_backend(
    const char** /*why*/) {
  static const select_attn::BackendTable table = select_attn::MakeTable();
  return &table;
}
