#include "launch.h"

#include <algorithm>
#include <numeric>
#include <random>

#include "memory_races.h"
#include "vector_core.h"

namespace ascend_emulator {
namespace {

// Names the core that runs on this thread.
class RunningCore {
 public:
  explicit RunningCore(VectorCore& core) {
    Check(running_core == nullptr, "Launch inside a kernel");
    running_core = &core;
  }
  ~RunningCore() { running_core = nullptr; }
  RunningCore(const RunningCore&) = delete;
  RunningCore& operator=(const RunningCore&) = delete;
};

}  // namespace

Report LaunchCores(const LaunchOptions& options, int num_cores,
                   const std::function<void()>& kernel) {
  const auto count = static_cast<size_t>(num_cores);
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (options.seed) {
    std::mt19937_64 random(*options.seed);
    std::shuffle(order.begin(), order.end(), random);
  }

  Report report;
  report.cores.resize(count);
  report.traces.resize(count);
  std::vector<std::string> errors(count);
  std::vector<GlobalAccesses> accesses(count);
  for (const int index : order) {
    const auto i = static_cast<size_t>(index);
    VectorCore core(index, num_cores, options.strict_vector_order);
    const RunningCore running(core);
    try {
      kernel();
      core.ordering.CheckEnd();
    } catch (const KernelError& error) {
      errors[i] = "core " + std::to_string(index) + ": " + error.what();
    }
    report.cores[i] = std::move(core.counters);
    report.traces[i] = std::move(core.trace);
    accesses[i] = std::move(core.global);
  }
  std::copy_if(errors.begin(), errors.end(), std::back_inserter(report.errors),
               [](const std::string& error) { return !error.empty(); });
  if (options.finds_races) {
    const std::vector<std::string> races = FindRaces(accesses, order);
    report.errors.insert(report.errors.end(), races.begin(), races.end());
  }
  return report;
}

}  // namespace ascend_emulator
