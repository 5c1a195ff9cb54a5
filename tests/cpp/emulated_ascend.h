// An Ascend device for tests: launches of the backend's kernels run on the emulator.

#ifndef SELECT_ATTN_OPS_TESTS_EMULATED_ASCEND_H_
#define SELECT_ATTN_OPS_TESTS_EMULATED_ASCEND_H_

#include <cstdint>
#include <vector>

#include "launch.h"

namespace select_attn::ascend {

struct EmulatedDevice {
  int64_t num_cores;
  uint64_t seed;                                  // of the order in which cores run
  std::vector<ascend_emulator::Report> launches;  // of the last call of an operator
};

extern EmulatedDevice emulated_device;

}  // namespace select_attn::ascend

#endif  // SELECT_ATTN_OPS_TESTS_EMULATED_ASCEND_H_
