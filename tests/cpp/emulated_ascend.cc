#include "emulated_ascend.h"

#include <string>
#include <utility>

#include "ascend/device.h"
#include "ascend/limits.h"
#include "emulated_launch.h"

namespace select_attn::ascend {

EmulatedDevice emulated_device = {/*num_cores=*/1, /*seed=*/0, /*launches=*/{}};

namespace {

std::string errors;

}  // namespace

void LaunchOnEmulator(uint32_t num_cores, const std::function<void()>& kernel) {
  ascend_emulator::LaunchOptions options;
  options.seed = emulated_device.seed;
  ascend_emulator::Report report =
      ascend_emulator::LaunchCores(options, static_cast<int>(num_cores), kernel);
  for (const std::string& error : report.errors) errors += error + "\n";
  emulated_device.launches.push_back(std::move(report));
}

int64_t NumVectorCores(DLDevice /*device*/) { return emulated_device.num_cores; }

const char* RunOn(DLDevice /*device*/, void (*launch)(const void* context), const void* context) {
  emulated_device.launches.clear();
  errors.clear();
  launch(context);
  return errors.empty() ? nullptr : Keep(errors);
}

}  // namespace select_attn::ascend
