// Finds what the cost model does not know from documents: the two costs of a vector instruction.

#ifndef SELECT_ATTN_OPS_TESTS_ASCEND_CALIBRATION_CALIBRATION_H_
#define SELECT_ATTN_OPS_TESTS_ASCEND_CALIBRATION_CALIBRATION_H_

#include <vector>

#include "cost_model.h"
#include "measurements.h"

namespace ascend_calibration {

constexpr double kTolerance = 0.15;  // on a bandwidth

// That the model predicts for a measured call, in bytes per second.
double PredictedBandwidth(const Measurement& measurement,
                          const ascend_emulator::CostParameters& parameters);

// The largest relative error on the measurements.
double WorstError(const std::vector<Measurement>& measurements,
                  const ascend_emulator::CostParameters& parameters);

struct Calibration {
  ascend_emulator::CostParameters best;
  // All of the grid that keep every error within kTolerance: how little three figures say.
  std::vector<ascend_emulator::CostParameters> fitting;
};

// Searches a grid; all other parameters stay as they are in `fixed`.
Calibration Calibrate(const std::vector<Measurement>& measurements,
                      const ascend_emulator::CostParameters& fixed);

}  // namespace ascend_calibration

#endif  // SELECT_ATTN_OPS_TESTS_ASCEND_CALIBRATION_CALIBRATION_H_
