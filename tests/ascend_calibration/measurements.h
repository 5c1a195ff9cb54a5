// The measurements that the cost model is calibrated with, and what a core did in each of them.
//
// Published with the original kernels: on a 910B4, with a torch-npu event around repeated calls on
// fresh inputs; bandwidth counts every byte of the operator's tensors once. For the metadata the
// shape is known, the best of its table. For the selection only the benchmark's grid is known
// (10 to 32 requests, 8 KV heads of 4 query heads, 1 to 6 metadata blocks): a shape is assumed, the
// longest requests and as many as give every core the same work, where fixed costs matter least.

#ifndef SELECT_ATTN_OPS_TESTS_ASCEND_CALIBRATION_MEASUREMENTS_H_
#define SELECT_ATTN_OPS_TESTS_ASCEND_CALIBRATION_MEASUREMENTS_H_

#include <string>
#include <vector>

#include "launch.h"

namespace ascend_calibration {

constexpr int kCores = 40;  // vector cores of a 910B4

// In bytes per second.
constexpr double kMeasuredSelectionFloat16 = 0.585e12;
constexpr double kMeasuredSelectionBFloat16 = 0.352e12;
constexpr double kMeasuredMetadata = 0.566e12;  // float16; bfloat16 reached the same

struct Measurement {
  std::string what;
  double bandwidth;                // measured
  double bytes;                    // of the call, as its benchmark counts
  double rows;                     // of one core: metadata rows, or key rows
  ascend_emulator::Report report;  // of one core; each of kCores has the same work
};

// Runs one core's share of each on the emulator.
std::vector<Measurement> RunMeasurements();

}  // namespace ascend_calibration

#endif  // SELECT_ATTN_OPS_TESTS_ASCEND_CALIBRATION_MEASUREMENTS_H_
