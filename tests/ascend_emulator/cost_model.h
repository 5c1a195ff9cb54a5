// How long a launch would take: the pipes' timelines, from the trace of the emulator.
//
// An instruction starts when its pipe is free and the flags and barriers before it in its pipe are
// met. So copies and arithmetic overlap where the kernel's own synchronisation lets them.

#ifndef SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_COST_MODEL_H_
#define SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_COST_MODEL_H_

#include <cstdint>
#include <map>
#include <string_view>

#include "launch.h"

namespace ascend_emulator {

// Of an Ascend 910B4. The clock is that of the platform description in CANN.
struct CostParameters {
  double clock_hz = 1.5e9;
  double bytes_per_second = 0.80e12;  // of global memory, shared by the cores that are busy
  double most_bytes_per_second_per_core = 0.80e12;
  double copy_latency_seconds = 0.5e-6;  // from its last byte to when others may use it
  double cycles_per_repeat = 1.0;        // to be calibrated
  double cycles_per_vector_instruction = 0.0;
  std::map<std::string_view, double> cycles_per_repeat_of;  // exceptions, by instruction
};

struct CoreTime {
  double total_seconds = 0.0;
  double copy_in_seconds = 0.0;  // that the pipe is busy; likewise the others
  double copy_out_seconds = 0.0;
  double vector_seconds = 0.0;
};

CoreTime PredictCore(const Trace& trace, const CostParameters& parameters, int busy_cores);

// Of the slowest core. Cores that copy nothing leave their bandwidth to the others.
double PredictSeconds(const Report& report, const CostParameters& parameters);

}  // namespace ascend_emulator

#endif  // SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_COST_MODEL_H_
