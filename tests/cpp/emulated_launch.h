// What the kernels' <<<>>> becomes where they run on the emulator.

#ifndef SELECT_ATTN_OPS_TESTS_EMULATED_LAUNCH_H_
#define SELECT_ATTN_OPS_TESTS_EMULATED_LAUNCH_H_

#include <cstdint>
#include <functional>

#include "select_attn_ops/common.h"

namespace select_attn::ascend {

// Runs the kernel on every core of a launch.
void LaunchOnEmulator(uint32_t num_cores, const std::function<void()>& kernel);

template <typename Arguments>
void EmulateLaunch(void (*entry)(Arguments), const Arguments& arguments, uint32_t num_cores,
                   Stream /*stream*/) {
  LaunchOnEmulator(num_cores, [&] { entry(arguments); });
}

}  // namespace select_attn::ascend

#endif  // SELECT_ATTN_OPS_TESTS_EMULATED_LAUNCH_H_
