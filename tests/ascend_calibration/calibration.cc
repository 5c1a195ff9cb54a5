#include "calibration.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace ascend_calibration {
namespace {

using ascend_emulator::CostParameters;

constexpr double kRepeatStep = 0.25;
constexpr int kRepeatSteps = 32;
constexpr double kInstructionStep = 10.0;
constexpr int kInstructionSteps = 25;

}  // namespace

double PredictedBandwidth(const Measurement& measurement, const CostParameters& parameters) {
  const ascend_emulator::CoreTime time =
      ascend_emulator::PredictCore(measurement.report.traces[0], parameters, kCores);
  return measurement.bytes / time.total_seconds;
}

double WorstError(const std::vector<Measurement>& measurements, const CostParameters& parameters) {
  double worst = 0.0;
  for (const Measurement& measurement : measurements) {
    const double ratio = PredictedBandwidth(measurement, parameters) / measurement.bandwidth;
    worst = std::max(worst, std::fabs(ratio - 1.0));
  }
  return worst;
}

Calibration Calibrate(const std::vector<Measurement>& measurements, const CostParameters& fixed) {
  Calibration calibration = {fixed, {}};
  double least = std::numeric_limits<double>::infinity();
  for (int r = 1; r <= kRepeatSteps; ++r) {
    for (int i = 0; i <= kInstructionSteps; ++i) {
      CostParameters parameters = fixed;
      parameters.cycles_per_repeat = r * kRepeatStep;
      parameters.cycles_per_vector_instruction = i * kInstructionStep;
      const double error = WorstError(measurements, parameters);
      if (error < least) {
        least = error;
        calibration.best = parameters;
      }
      if (error <= kTolerance) calibration.fitting.push_back(parameters);
    }
  }
  return calibration;
}

}  // namespace ascend_calibration
