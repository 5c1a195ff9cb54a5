// What a backend is to the rest of the library: a table of functions. The CPU's is part of the core
// library; any other is a shared object libselect_attn_ops_<name>.so beside it, which exports one C
// symbol that returns its table. Nothing throws across that boundary.

#ifndef SELECT_ATTN_OPS_CORE_BACKEND_H_
#define SELECT_ATTN_OPS_CORE_BACKEND_H_

#include <dlpack/dlpack.h>

#include <cstdint>
#include <string>

#include "core/device.h"
#include "core/read_device_memory.h"
#include "select_attn_ops/common.h"
#include "select_attn_ops/error.h"
#include "select_attn_ops/paged_select_attention.h"
#include "select_attn_ops/quest_block_select_paged.h"
#include "select_attn_ops/quest_prefill_metadata.h"
#include "select_attn_ops/selected_block_tables.h"

namespace select_attn {

// One operator of a backend, on one of its devices, whatever the thread's current one is. Texts
// stay valid until the calling thread's next call.
template <typename Params>
struct BackendOperator {
  // The limit that `params` exceeds, or null. Null pointer: the backend has no limits here.
  const char* (*unsupported)(const Params& params, DLDevice device);
  // Bytes of scratch, from shapes alone. Null pointer: none.
  int64_t (*workspace_size)(const Params& params, DLDevice device);
  // Queues the work and returns null, or what went wrong. Null pointer: no such operator.
  const char* (*run)(const Params& params, DLDevice device, Stream stream);
};

struct BackendTable {
  // The boundary has no other guard: raise the version whenever this table or a Params changes.
  static constexpr int64_t kVersion = 3;

  int64_t version;
  const char* (*description)();  // what the backend runs on, for people
  BackendOperator<QuestPrefillMetadataParams> quest_prefill_metadata;
  BackendOperator<QuestBlockSelectPagedParams> quest_block_select_paged;
  BackendOperator<SelectedBlockTablesParams> selected_block_tables;
  BackendOperator<PagedSelectAttentionParams> paged_select_attention;
  BackendOperator<ReadDeviceMemoryParams> read_device_memory;  // a diagnostic
};

// The symbol of a shared backend, and its type. It returns null, with a reason in *why, where the
// backend cannot run (no driver, no device).
inline constexpr char kBackendSymbol[] = "select_attn_ops_backend";
using BackendEntry = const BackendTable* (*)(const char** why);

// The table for a device. Throws Error (kNotImplementedError) naming `op` and the device if there
// is none, or if it lacks the operator.
const BackendTable& BackendFor(DLDevice device, const char* op);
[[noreturn]] void ThrowNoOperator(DLDevice device, const char* op);

// The operator `member` of the device's backend, once the backend has agreed to the Params.
template <typename Params>
const BackendOperator<Params>& OperatorFor(DLDevice device, const char* op,
                                           BackendOperator<Params> BackendTable::* member,
                                           const Params& params) {
  const BackendOperator<Params>& found = BackendFor(device, op).*member;
  if (found.run == nullptr) ThrowNoOperator(device, op);
  const char* limit = found.unsupported == nullptr ? nullptr : found.unsupported(params, device);
  if (limit != nullptr) {
    throw Error(ErrorKind::kNotImplementedError, std::string(op) + ": " + limit);
  }
  return found;
}

// Bytes of scratch that an operator needs.
template <typename Params>
int64_t WorkspaceSize(const BackendOperator<Params>& found, DLDevice device, const Params& params) {
  return found.workspace_size == nullptr ? 0 : found.workspace_size(params, device);
}

// Throws Error (kValueError) where the Params have less of it.
template <typename Params>
void CheckWorkspace(const BackendOperator<Params>& found, DLDevice device, const Params& params) {
  const int64_t needed = WorkspaceSize(found, device, params);
  if (params.workspace_bytes >= needed) return;
  throw Error(ErrorKind::kValueError, "workspace must have at least " + std::to_string(needed) +
                                          " bytes, got " + std::to_string(params.workspace_bytes));
}

// Runs an operator whose arguments are checked, but for the values in its tables and lengths:
// `check_values` does that where the host can read them.
template <typename Params>
void RunOperator(const BackendOperator<Params>& found, DLDevice device, const char* op,
                 const Params& params, Stream stream, void (*check_values)(const Params&)) {
  if (IsHost(device)) check_values(params);
  if (const char* failure = found.run(params, device, stream)) {
    throw Error(ErrorKind::kRuntimeError, std::string(op) + ": " + failure);
  }
}

}  // namespace select_attn

#endif  // SELECT_ATTN_OPS_CORE_BACKEND_H_
