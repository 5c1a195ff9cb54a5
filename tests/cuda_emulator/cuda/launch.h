// In place of the CUDA backend's header of the same name: launches on the emulator.

#ifndef SELECT_ATTN_OPS_TESTS_CUDA_EMULATOR_LAUNCH_H_
#define SELECT_ATTN_OPS_TESTS_CUDA_EMULATOR_LAUNCH_H_

#include <dlpack/dlpack.h>

#include <algorithm>
#include <cstdint>

#include "cuda_runtime.h"
#include "select_attn_ops/common.h"

namespace select_attn::cuda {

// What a test chooses.
struct EmulatedDevice {
  int64_t resident_blocks = 4;
  unsigned seed = 0;
  const char* unsupported = nullptr;  // why no kernel can run on it
};
inline EmulatedDevice emulated_device;

inline const char* UnsupportedDevice(DLDevice /*device*/) { return emulated_device.unsupported; }

template <auto kKernel, int kThreads, typename Params>
const char* Launch(const Params& params, int64_t most_blocks, DLDevice /*device*/,
                   Stream /*stream*/) {
  if (most_blocks <= 0) return nullptr;
  cuda_emulator::RunGrid(
      static_cast<unsigned>(std::min(most_blocks, emulated_device.resident_blocks)), kThreads,
      emulated_device.seed, [&] { kKernel(params); });
  return nullptr;
}

}  // namespace select_attn::cuda

#endif  // SELECT_ATTN_OPS_TESTS_CUDA_EMULATOR_LAUNCH_H_
