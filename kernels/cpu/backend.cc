#include "cpu/backend.h"

#include <exception>
#include <new>
#include <string>

#include "cpu/openmp.h"
#include "cpu/stopwatch.h"
#include "select_attn_ops/runtime.h"

namespace select_attn::cpu {
namespace {

// A text for across the boundary: valid until the thread's next one.
const char* Keep(std::string text) {
  thread_local std::string kept;
  kept.swap(text);
  return kept.c_str();
}

// A kernel fails only by running out of memory.
template <typename Params, void (*kKernel)(const Params&)>
const char* Run(const Params& params, DLDevice /*device*/, Stream /*stream*/) {
  try {
    const Lap lap(Phase::kKernel);
    kKernel(params);
    return nullptr;
  } catch (const std::bad_alloc&) {
    return "out of memory";
  } catch (const std::exception& exception) {
    return Keep(exception.what());
  }
}

const char* Description() {
  return Keep(SimdTarget() + ", " + std::to_string(NumThreads()) + " threads");
}

BackendTable MakeTable() {
  // Asked for here so that a wrong environment variable is reported by the first call.
  SimdTarget();
  NumThreads();
  CheckParallelSetting();
  BackendTable table = {};
  table.version = BackendTable::kVersion;
  table.description = Description;
  table.quest_prefill_metadata.run = Run<QuestPrefillMetadataParams, QuestPrefillMetadata>;
  table.quest_block_select_paged.run = Run<QuestBlockSelectPagedParams, QuestBlockSelectPaged>;
  table.selected_block_tables.run = Run<SelectedBlockTablesParams, SelectedBlockTables>;
  table.paged_select_attention.run = Run<PagedSelectAttentionParams, PagedSelectAttention>;
  return table;
}

}  // namespace

const BackendTable& Backend() {
  static const BackendTable table = MakeTable();
  return table;
}

}  // namespace select_attn::cpu
