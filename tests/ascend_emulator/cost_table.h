// What a call of an operator costs, from the emulator's counters and the model of time: a line of a
// table per call.

#ifndef SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_COST_TABLE_H_
#define SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_COST_TABLE_H_

#include <cstdint>
#include <iosfwd>
#include <string>
#include <vector>

#include "cost_model.h"
#include "launch.h"

namespace ascend_emulator {

// What the emulator cannot know of a call.
struct CallShape {
  std::string what;
  double rows;        // of keys or of metadata
  double least_read;  // bytes of global memory that the operator needs; likewise written
  double least_written;
  double measured;  // bandwidth of the original on a 910B4, bytes per second; 0: not known
};

// Sums are over all cores and launches.
struct Cost {
  CallShape shape;
  double bytes_read = 0.0;  // of global memory, by MTE2; likewise written, by MTE3
  double bytes_written = 0.0;
  double vector_repeats = 0.0;
  int64_t flags = 0;  // set, by kernels and queues
  int64_t barriers = 0;
  int64_t buffer_bytes = 0;      // of the unified buffer, the most of any core
  int64_t copies_in_flight = 0;  // tensors in one queue, the most of any core
  int64_t cores_busy = 0;        // that copied anything in, in the first launch
  int64_t num_cores = 0;         // of the first launch
  // Predicted: the pipe's time on the core where it is busiest, summed over launches.
  double copy_seconds = 0.0;
  double vector_seconds = 0.0;
  double seconds = 0.0;  // of the slowest core, summed over launches

  double repeats_per_row() const { return vector_repeats / shape.rows; }
  // Over the least.
  double bytes_ratio() const {
    return (bytes_read + bytes_written) / (shape.least_read + shape.least_written);
  }
  // Of the least bytes, which is what the original's benchmark counts.
  double bandwidth() const { return (shape.least_read + shape.least_written) / seconds; }
  // Of the predicted time over that of the busier pipe, which is the least it could be.
  double overlap_ratio() const;
};

Cost CostOf(const CallShape& shape, const std::vector<Report>& launches,
            const CostParameters& parameters);

// As a table in Markdown.
void PrintCosts(std::ostream& out, const std::vector<Cost>& costs);

}  // namespace ascend_emulator

#endif  // SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_COST_TABLE_H_
