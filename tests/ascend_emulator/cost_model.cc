#include "cost_model.h"

#include <algorithm>
#include <array>
#include <map>
#include <utility>

namespace ascend_emulator {
namespace {

class Timeline {
 public:
  Timeline(const CostParameters& parameters, int busy_cores)
      : parameters_(parameters),
        bytes_per_second_(std::min(parameters.bytes_per_second / std::max(busy_cores, 1),
                                   parameters.most_bytes_per_second_per_core)) {}

  void Take(const Step& step) {
    const auto pipe = static_cast<size_t>(step.pipe);
    switch (step.kind) {
      case Step::Kind::kCopy: {
        const double seconds = static_cast<double>(step.amount) / bytes_per_second_;
        Run(pipe, seconds, parameters_.copy_latency_seconds);
        (pipe == PIPE_MTE2 ? time_.copy_in_seconds : time_.copy_out_seconds) += seconds;
        break;
      }
      case Step::Kind::kVector: {
        const double seconds = VectorSeconds(step);
        Run(pipe, seconds, 0.0);
        time_.vector_seconds += seconds;
        break;
      }
      case Step::Kind::kSetFlag:
        // A pipe sets a flag when all that it did before is complete.
        flags_[{step.event, step.id}] = std::max(complete_[pipe], free_[pipe]);
        break;
      case Step::Kind::kWaitFlag:
        WaitUntil(pipe, flags_[{step.event, step.id}]);
        break;
      case Step::Kind::kBarrier:
        if (step.pipe == PIPE_ALL) {
          const double all = *std::max_element(complete_.begin(), complete_.end());
          WaitUntil(PIPE_S, all);
        } else {
          free_[pipe] = std::max(free_[pipe], complete_[pipe]);
        }
        break;
    }
  }

  CoreTime End() {
    time_.total_seconds = *std::max_element(complete_.begin(), complete_.end());
    return time_;
  }

 private:
  double VectorSeconds(const Step& step) const {
    return (parameters_.cycles_per_vector_instruction +
            static_cast<double>(step.amount) * parameters_.cycles_per_repeat) /
           parameters_.clock_hz;
  }
  void Run(size_t pipe, double seconds, double latency) {
    free_[pipe] += seconds;
    complete_[pipe] = std::max(complete_[pipe], free_[pipe] + latency);
  }
  // While the scalar unit waits, no pipe is given work.
  void WaitUntil(size_t pipe, double time) {
    if (pipe == PIPE_S) {
      for (double& pipe_free : free_) pipe_free = std::max(pipe_free, time);
    } else {
      free_[pipe] = std::max(free_[pipe], time);
    }
  }

  const CostParameters& parameters_;
  double bytes_per_second_;
  std::array<double, kPipes> free_ = {};      // when the pipe can start its next instruction
  std::array<double, kPipes> complete_ = {};  // when all that it did is complete
  std::map<std::pair<AscendC::HardEvent, int>, double> flags_;
  CoreTime time_;
};

}  // namespace

CoreTime PredictCore(const Trace& trace, const CostParameters& parameters, int busy_cores) {
  Timeline timeline(parameters, busy_cores);
  for (const Step& step : trace) timeline.Take(step);
  return timeline.End();
}

LaunchTime PredictLaunch(const Report& report, const CostParameters& parameters) {
  const auto busy = std::count_if(report.cores.begin(), report.cores.end(),
                                  [](const Counters& c) { return c.copies_in + c.copies_out > 0; });
  LaunchTime longest;
  for (const Trace& trace : report.traces) {
    const CoreTime time = PredictCore(trace, parameters, static_cast<int>(busy));
    longest.total_seconds = std::max(longest.total_seconds, time.total_seconds);
    longest.copy_seconds =
        std::max({longest.copy_seconds, time.copy_in_seconds, time.copy_out_seconds});
    longest.vector_seconds = std::max(longest.vector_seconds, time.vector_seconds);
  }
  return longest;
}

}  // namespace ascend_emulator
