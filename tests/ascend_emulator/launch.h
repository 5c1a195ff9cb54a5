// Runs a kernel on emulated cores.

#ifndef SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_LAUNCH_H_
#define SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_LAUNCH_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "counters.h"

namespace ascend_emulator {

struct LaunchOptions {
  // Dependent vector instructions need a barrier between them. Compilers for this chip put it
  // themselves by default.
  bool strict_vector_order = true;
  // Cores run one after the other: in their order, or in a random one.
  std::optional<uint64_t> seed;
  // One core must not touch what another one writes, but to write the same.
  bool finds_races = true;
};

struct Report {
  std::vector<std::string> errors;  // at most one per core, and races
  std::vector<Counters> cores;
  std::vector<Trace> traces;
};

Report LaunchCores(const LaunchOptions& options, int num_cores,
                   const std::function<void()>& kernel);

template <typename Kernel, typename... Args>
Report Launch(const LaunchOptions& options, int num_cores, const Kernel& kernel, Args... args) {
  return LaunchCores(options, num_cores, [&] { kernel(args...); });
}
template <typename Kernel, typename... Args>
Report Launch(int num_cores, const Kernel& kernel, Args... args) {
  return Launch(LaunchOptions(), num_cores, kernel, args...);
}

}  // namespace ascend_emulator

#endif  // SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_LAUNCH_H_
