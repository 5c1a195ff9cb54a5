// An Ascend device for tests: launches of the backend's kernels run on the emulator.

#ifndef SELECT_ATTN_OPS_TESTS_EMULATED_ASCEND_H_
#define SELECT_ATTN_OPS_TESTS_EMULATED_ASCEND_H_

#include <cstdint>

namespace select_attn::ascend {

// Of all cores and launches of one call of an operator.
struct EmulatedCounts {
  int64_t vector_repeats;
  int64_t bytes_read;  // of global memory, by copies; likewise written
  int64_t bytes_written;
  int64_t copies_in_flight;  // tensors in one queue, at most
  int64_t cores_busy;        // that copied anything in, in the first launch
};

struct EmulatedDevice {
  int64_t num_cores;
  uint64_t seed;          // of the order in which cores run
  EmulatedCounts counts;  // of the last call
};

extern EmulatedDevice emulated_device;

}  // namespace select_attn::ascend

#endif  // SELECT_ATTN_OPS_TESTS_EMULATED_ASCEND_H_
