// How long a launch would take: the pipes' timelines, from the trace of the emulator.
//
// An instruction starts when its pipe is free and the flags and barriers before it in its pipe are
// met. So copies and arithmetic overlap where the kernel's own synchronisation lets them.

#ifndef SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_COST_MODEL_H_
#define SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_COST_MODEL_H_

#include <cstdint>

#include "launch.h"

namespace ascend_emulator {

// Of an Ascend 910B4.
struct CostParameters {
  // As CANN's platform description of the chip has them (Ascend910B4.ini): the clock, and 32 bytes
  // per cycle from global memory to a core.
  double clock_hz = 1.5e9;
  double most_bytes_per_second_per_core = 32 * 1.5e9;
  // Of global memory, shared by the cores that are busy: nine tenths of the nominal 0.80 TB/s. No
  // less, since 0.707 TB/s have been measured; no memory gives all.
  double bytes_per_second = 0.9 * 0.80e12;
  // From a copy's last byte to when others may use it. Assumed: 300 cycles.
  double copy_latency_seconds = 0.2e-6;
  // Found by calibration (tests/ascend_calibration): of the multiples of 0.25 and of 10, those
  // whose worst error on three measured kernels is least. The fixed cost is that of an instruction
  // which waits for the one before, as almost all do.
  double cycles_per_repeat = 2.5;
  double cycles_per_vector_instruction = 110.0;
};

struct CoreTime {
  double total_seconds = 0.0;
  double copy_in_seconds = 0.0;  // that the pipe is busy; likewise the others
  double copy_out_seconds = 0.0;
  double vector_seconds = 0.0;
};

CoreTime PredictCore(const Trace& trace, const CostParameters& parameters, int busy_cores);

// Each of the core where it is longest.
struct LaunchTime {
  double total_seconds = 0.0;
  double copy_seconds = 0.0;  // of the busier of the two copying pipes
  double vector_seconds = 0.0;
};

// Cores that copy nothing leave their bandwidth to the others.
LaunchTime PredictLaunch(const Report& report, const CostParameters& parameters);

}  // namespace ascend_emulator

#endif  // SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_COST_MODEL_H_
