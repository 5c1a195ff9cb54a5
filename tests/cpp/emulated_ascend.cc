#include "emulated_ascend.h"

#include <algorithm>
#include <string>

#include "ascend/device.h"
#include "ascend/launch.h"
#include "ascend/limits.h"
#include "ascend/quest_block_select_paged.h"
#include "ascend/quest_prefill_metadata.h"
#include "ascend/selected_block_tables.h"
#include "kernel_operator.h"
#include "launch.h"

namespace select_attn::ascend {

EmulatedDevice emulated_device = {/*num_cores=*/1, /*seed=*/0, /*counts=*/{}};

namespace {

std::string errors;
bool is_first_launch;

template <typename Kernel, typename Arguments>
void Launch(const Arguments& arguments, uint32_t num_cores) {
  ascend_emulator::LaunchOptions options;
  options.seed = emulated_device.seed;
  const ascend_emulator::Report report =
      ascend_emulator::LaunchCores(options, static_cast<int>(num_cores), [&] {
        AscendC::TPipe pipe;
        Kernel kernel(arguments, &pipe);
        kernel.Run();
      });
  for (const std::string& error : report.errors) errors += error + "\n";
  EmulatedCounts& counts = emulated_device.counts;
  for (const ascend_emulator::Counters& core : report.cores) {
    counts.vector_repeats += core.vector_repeats();
    counts.bytes_read += core.bytes_read;
    counts.bytes_written += core.bytes_written;
    counts.copies_in_flight = std::max(counts.copies_in_flight, core.most_tensors_in_queue);
    if (is_first_launch && core.bytes_read > 0) ++counts.cores_busy;
  }
  is_first_launch = false;
}

template <template <typename> class Kernel, typename Arguments>
void LaunchFor(DType dtype, const Arguments& arguments, uint32_t num_cores) {
  switch (dtype) {
    case DType::kFloat16:
      return Launch<Kernel<half>>(arguments, num_cores);
    case DType::kBFloat16:
      return Launch<Kernel<bfloat16_t>>(arguments, num_cores);
    case DType::kFloat32:
      return Launch<Kernel<float>>(arguments, num_cores);
  }
}

}  // namespace

int64_t NumVectorCores(DLDevice /*device*/) { return emulated_device.num_cores; }

const char* RunOn(DLDevice /*device*/, void (*launch)(const void* context), const void* context) {
  emulated_device.counts = {};
  errors.clear();
  is_first_launch = true;
  launch(context);
  return errors.empty() ? nullptr : Keep(errors);
}

void LaunchQuestPrefillMetadata(const QuestPrefillMetadataArguments& arguments, DType dtype,
                                uint32_t num_cores, Stream /*stream*/) {
  LaunchFor<QuestPrefillMetadataKernel>(dtype, arguments, num_cores);
}

void LaunchQuestBlockSelectPaged(const QuestBlockSelectPagedArguments& arguments, DType dtype,
                                 uint32_t num_cores, Stream /*stream*/) {
  LaunchFor<QuestBlockSelectPagedKernel>(dtype, arguments, num_cores);
}

void LaunchQuestBlockSelectMerge(const QuestBlockSelectPagedArguments& arguments,
                                 uint32_t num_cores, Stream /*stream*/) {
  Launch<QuestBlockSelectMergeKernel>(arguments, num_cores);
}

void LaunchSelectedBlockTables(const SelectedBlockTablesArguments& arguments, uint32_t num_cores,
                               Stream /*stream*/) {
  Launch<SelectedBlockTablesKernel>(arguments, num_cores);
}

}  // namespace select_attn::ascend
