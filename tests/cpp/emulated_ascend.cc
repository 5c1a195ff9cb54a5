#include "emulated_ascend.h"

#include <string>
#include <utility>

#include "ascend/device.h"
#include "ascend/launch.h"
#include "ascend/limits.h"
#include "ascend/quest_block_select_paged.h"
#include "ascend/quest_prefill_metadata.h"
#include "ascend/selected_block_tables.h"
#include "kernel_operator.h"
#include "launch.h"

namespace select_attn::ascend {

EmulatedDevice emulated_device = {/*num_cores=*/1, /*seed=*/0, /*launches=*/{}};

namespace {

std::string errors;

template <typename Kernel, typename Arguments>
void Launch(const Arguments& arguments, uint32_t num_cores) {
  ascend_emulator::LaunchOptions options;
  options.seed = emulated_device.seed;
  ascend_emulator::Report report =
      ascend_emulator::LaunchCores(options, static_cast<int>(num_cores), [&] {
        AscendC::TPipe pipe;
        Kernel kernel(arguments, &pipe);
        kernel.Run();
      });
  for (const std::string& error : report.errors) errors += error + "\n";
  emulated_device.launches.push_back(std::move(report));
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
  emulated_device.launches.clear();
  errors.clear();
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
