// The Python face: the only code that knows tvm-ffi. It converts values, maps errors and exports
// one symbol per operator; tensors, checks and devices are the library's business.
//
// Only DLTensor*, integers, floats and optionals of these cross the boundary. Texts go through
// plain C functions, for ctypes.

#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "core/read_device_memory.h"
#include "cpu/read_memory.h"
#include "cpu/stopwatch.h"
#include "select_attn_ops/error.h"
#include "select_attn_ops/paged_select_attention.h"
#include "select_attn_ops/quest_block_select_paged.h"
#include "select_attn_ops/quest_prefill_metadata.h"
#include "select_attn_ops/runtime.h"
#include "select_attn_ops/selected_block_tables.h"

namespace select_attn {
namespace {
namespace ffi = tvm::ffi;

// Without this, tvm-ffi would report every exception of ours as a Python RuntimeError.
template <typename F>
auto MapErrors(F&& call) {
  const Lap lap(Phase::kCall);
  try {
    return call();
  } catch (const Error& error) {
    throw ffi::Error(error.KindName(), error.what(), TVMFFIBacktrace(__FILE__, __LINE__, "", 0));
  }
}

// Python passes the stream of an NPU, for which tvm-ffi would report the null stream. For CUDA it
// passes none unless the user did, and tvm-ffi knows the framework's current one.
Stream StreamFor(const DLTensor& tensor, ffi::Optional<int64_t> stream) {
  if (stream.has_value()) return reinterpret_cast<Stream>(*stream);
  if (tensor.device.device_type == kDLCPU) return nullptr;
  return TVMFFIEnvGetStream(tensor.device.device_type, tensor.device.device_id);
}

const DLTensor* OrNull(ffi::Optional<DLTensor*> tensor) {
  return tensor.has_value() ? *tensor : nullptr;
}

QuestBlockSelectPagedOptions SelectOptions(int64_t tokens_since_metadata_update,
                                           ffi::Optional<DLTensor*> metadata_seq_lens,
                                           ffi::Optional<int64_t> block_size,
                                           ffi::Optional<DLTensor*> workspace) {
  QuestBlockSelectPagedOptions options;
  options.tokens_since_metadata_update = tokens_since_metadata_update;
  options.metadata_seq_lens = OrNull(metadata_seq_lens);
  if (block_size.has_value()) options.block_size = *block_size;
  options.workspace = OrNull(workspace);
  return options;
}

void ExportQuestPrefillMetadata(DLTensor* k_cache, DLTensor* block_tables, DLTensor* seq_lens,
                                DLTensor* metadata_block_tables, DLTensor* maxblocks,
                                DLTensor* minblocks, ffi::Optional<DLTensor*> metadata_seq_lens,
                                ffi::Optional<int64_t> stream) {
  MapErrors([&] {
    QuestPrefillMetadata(*k_cache, *block_tables, *seq_lens, *metadata_block_tables, *maxblocks,
                         *minblocks, OrNull(metadata_seq_lens), StreamFor(*k_cache, stream));
  });
}

void ExportQuestBlockSelectPaged(DLTensor* query, DLTensor* maxblocks, DLTensor* minblocks,
                                 DLTensor* metadata_block_tables, DLTensor* seq_lens,
                                 DLTensor* selected_indices, int64_t tokens_since_metadata_update,
                                 ffi::Optional<DLTensor*> metadata_seq_lens,
                                 ffi::Optional<int64_t> block_size,
                                 ffi::Optional<DLTensor*> workspace,
                                 ffi::Optional<int64_t> stream) {
  MapErrors([&] {
    QuestBlockSelectPaged(
        *query, *maxblocks, *minblocks, *metadata_block_tables, *seq_lens, *selected_indices,
        SelectOptions(tokens_since_metadata_update, metadata_seq_lens, block_size, workspace),
        StreamFor(*query, stream));
  });
}

int64_t ExportQuestBlockSelectPagedWorkspaceSize(DLTensor* query, DLTensor* maxblocks,
                                                 DLTensor* minblocks,
                                                 DLTensor* metadata_block_tables,
                                                 DLTensor* seq_lens, DLTensor* selected_indices,
                                                 ffi::Optional<int64_t> block_size) {
  return MapErrors([&] {
    return QuestBlockSelectPagedWorkspaceSize(*query, *maxblocks, *minblocks,
                                              *metadata_block_tables, *seq_lens, *selected_indices,
                                              SelectOptions(-1, {}, block_size, {}));
  });
}

void ExportSelectedBlockTables(DLTensor* selected_indices, DLTensor* block_tables,
                               DLTensor* seq_lens, int64_t block_size, DLTensor* tables,
                               DLTensor* lens, ffi::Optional<int64_t> stream) {
  MapErrors([&] {
    SelectedBlockTables(*selected_indices, *block_tables, *seq_lens, block_size, *tables, *lens,
                        StreamFor(*selected_indices, stream));
  });
}

PagedSelectAttentionOptions AttentionOptions(ffi::Optional<double> scale,
                                             ffi::Optional<DLTensor*> lse,
                                             ffi::Optional<DLTensor*> workspace) {
  PagedSelectAttentionOptions options;
  if (scale.has_value()) options.scale = *scale;
  options.lse = OrNull(lse);
  options.workspace = OrNull(workspace);
  return options;
}

void ExportPagedSelectAttention(DLTensor* query, DLTensor* k_cache, DLTensor* v_cache,
                                DLTensor* block_tables, DLTensor* seq_lens,
                                DLTensor* selected_indices, DLTensor* out,
                                ffi::Optional<double> scale, ffi::Optional<DLTensor*> lse,
                                ffi::Optional<DLTensor*> workspace, ffi::Optional<int64_t> stream) {
  MapErrors([&] {
    PagedSelectAttention(*query, *k_cache, *v_cache, *block_tables, *seq_lens, *selected_indices,
                         *out, AttentionOptions(scale, lse, workspace), StreamFor(*query, stream));
  });
}

int64_t ExportPagedSelectAttentionWorkspaceSize(DLTensor* query, DLTensor* k_cache,
                                                DLTensor* v_cache, DLTensor* block_tables,
                                                DLTensor* seq_lens, DLTensor* selected_indices,
                                                DLTensor* out) {
  return MapErrors([&] {
    return PagedSelectAttentionWorkspaceSize(*query, *k_cache, *v_cache, *block_tables, *seq_lens,
                                             *selected_indices, *out);
  });
}

int64_t ExportNumThreads() { return MapErrors(NumThreads); }

void ExportSetNumThreads(int64_t count) {
  MapErrors([&] { SetNumThreads(count); });
}

// A SIMD target crosses the boundary as its place in SimdTargets(), -1 for the best.
int64_t ExportSimdTarget() {
  return MapErrors([] {
    const std::vector<std::string> names = SimdTargets();
    return int64_t{std::find(names.begin(), names.end(), SimdTarget()) - names.begin()};
  });
}

void ExportSetSimdTarget(int64_t target) {
  MapErrors(
      [&] { SetSimdTarget(target < 0 ? "" : SimdTargets().at(static_cast<size_t>(target))); });
}

// Up to three tensors, all that an operator reads and writes.
int64_t ExportReadMemory(DLTensor* first, ffi::Optional<DLTensor*> second,
                         ffi::Optional<DLTensor*> third, int64_t streams, int64_t prefetch_bytes,
                         int64_t far_prefetch_bytes, int64_t chunk_bytes, bool side_by_side) {
  return MapErrors([&] {
    std::vector<const DLTensor*> tensors{first};
    for (const DLTensor* tensor : {OrNull(second), OrNull(third)}) {
      if (tensor != nullptr) tensors.push_back(tensor);
    }
    return int64_t{ReadMemory(
        tensors, {streams, prefetch_bytes, far_prefetch_bytes, chunk_bytes, side_by_side})};
  });
}

// Up to three tensors again. They and `bits` are on one device.
void ExportReadDeviceMemory(ffi::Optional<DLTensor*> first, ffi::Optional<DLTensor*> second,
                            ffi::Optional<DLTensor*> third, DLTensor* bits, int64_t threads,
                            int64_t loads, int64_t vector_bytes, bool streaming) {
  MapErrors([&] {
    std::vector<const DLTensor*> tensors;
    for (const DLTensor* tensor : {OrNull(first), OrNull(second), OrNull(third)}) {
      if (tensor != nullptr) tensors.push_back(tensor);
    }
    ReadDeviceMemory(tensors, {threads, loads, vector_bytes, streaming}, *bits,
                     StreamFor(*bits, {}));
  });
}

void ExportSetStopwatch(bool on) { SetStopwatch(on); }
void ExportSetReadsOnly(bool on) { SetReadsOnly(on); }

// Nanoseconds, by the phase's number in kernels/cpu/stopwatch.h.
int64_t ExportStopwatchTime(int64_t phase) { return StopwatchTime(static_cast<Phase>(phase)); }

// For texts that ctypes reads: kept until the calling thread asks for the next one.
const char* Keep(std::string text) {
  thread_local std::string kept;
  kept = std::move(text);
  return kept.c_str();
}

}  // namespace
}  // namespace select_attn

extern "C" {

SELECT_ATTN_EXPORT const char* select_attn_ops_version() { return select_attn::Version(); }

// One name a line, best first.
SELECT_ATTN_EXPORT const char* select_attn_ops_simd_targets() {
  std::string text;
  for (const std::string& name : select_attn::SimdTargets()) text += name + "\n";
  return select_attn::Keep(text);
}

// Three lines a backend: name, "available" or "not available", description.
SELECT_ATTN_EXPORT const char* select_attn_ops_backends() {
  std::string text;
  try {
    for (const select_attn::BackendInfo& backend : select_attn::Backends()) {
      text += backend.name + "\n" + (backend.available ? "available" : "not available") + "\n" +
              backend.description + "\n";
    }
  } catch (const select_attn::Error& error) {
    return select_attn::Keep(std::string("cpu\nnot available\n") + error.what() + "\n");
  }
  return select_attn::Keep(text);
}

}  // extern "C"

TVM_FFI_DLL_EXPORT_TYPED_FUNC(quest_prefill_metadata, select_attn::ExportQuestPrefillMetadata);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(quest_block_select_paged, select_attn::ExportQuestBlockSelectPaged);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(quest_block_select_paged_workspace_size,
                              select_attn::ExportQuestBlockSelectPagedWorkspaceSize);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(selected_block_tables, select_attn::ExportSelectedBlockTables);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(paged_select_attention, select_attn::ExportPagedSelectAttention);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(paged_select_attention_workspace_size,
                              select_attn::ExportPagedSelectAttentionWorkspaceSize);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(read_memory, select_attn::ExportReadMemory);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(read_device_memory, select_attn::ExportReadDeviceMemory);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_stopwatch, select_attn::ExportSetStopwatch);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_reads_only, select_attn::ExportSetReadsOnly);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(stopwatch_time, select_attn::ExportStopwatchTime);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(num_threads, select_attn::ExportNumThreads);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_num_threads, select_attn::ExportSetNumThreads);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(simd_target, select_attn::ExportSimdTarget);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_simd_target, select_attn::ExportSetSimdTarget);
