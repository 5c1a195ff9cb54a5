// What no caller can see from outside, for the benchmark: where a call's time goes. A diagnostic,
// and no part of the library's contract. While it is off, a lap costs a look at one flag.

#ifndef SELECT_ATTN_OPS_CPU_STOPWATCH_H_
#define SELECT_ATTN_OPS_CPU_STOPWATCH_H_

#include <chrono>
#include <cstdint>

#include "select_attn_ops/common.h"

namespace select_attn {

enum class Phase : int32_t {
  kCall,       // a call of the library: checks, dispatch and kernel
  kKernel,     // the kernel alone
  kScoring,    // of a selection: the scores of all blocks
  kSelection,  // of a selection: the best of them
  kCount,
};

// Starts the stopwatch, with all times at zero, or stops it. For the whole process.
SELECT_ATTN_EXPORT void SetStopwatch(bool on);
SELECT_ATTN_EXPORT bool StopwatchIsOn();

// Nanoseconds of all laps of a phase, those of threads that ran side by side added up.
SELECT_ATTN_EXPORT int64_t StopwatchTime(Phase phase);
SELECT_ATTN_EXPORT void AddLap(Phase phase, int64_t nanoseconds);

// Makes the selection and attention of the CPU read what they always read, in the same order and
// with the same prefetches, but compute nothing: their results mean nothing then. For the whole
// process. The difference in time is what the arithmetic costs that the memory does not hide.
SELECT_ATTN_EXPORT void SetReadsOnly(bool on);
SELECT_ATTN_EXPORT bool ReadsOnly();

// Times its own life. Within the lap of another phase, that is not charged for it.
class Lap {
 public:
  explicit Lap(Phase phase, Phase within = Phase::kCount)
      : phase_(phase), within_(within), on_(StopwatchIsOn()) {
    if (on_) start_ = std::chrono::steady_clock::now();
  }
  ~Lap() {
    if (!on_) return;
    const auto time = std::chrono::steady_clock::now() - start_;
    const int64_t taken = std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
    AddLap(phase_, taken);
    if (within_ != Phase::kCount) AddLap(within_, -taken);
  }
  Lap(const Lap&) = delete;
  Lap& operator=(const Lap&) = delete;

 private:
  const Phase phase_;
  const Phase within_;
  const bool on_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace select_attn

#endif  // SELECT_ATTN_OPS_CPU_STOPWATCH_H_
