#include "cost_table.h"

#include <algorithm>
#include <iomanip>
#include <ostream>
#include <sstream>

namespace ascend_emulator {
namespace {

std::string Fixed(double value, int digits) {
  std::ostringstream text;
  text << std::fixed << std::setprecision(digits) << value;
  return text.str();
}

std::string Bytes(double moved, double least) {
  return Fixed(moved / (1 << 20), 2) + " (" + Fixed(moved / least, 3) + ")";
}

std::string TeraBytes(double bytes_per_second) {
  return bytes_per_second > 0 ? Fixed(bytes_per_second / 1e12, 3) : "-";
}

}  // namespace

double Cost::overlap_ratio() const { return seconds / std::max(copy_seconds, vector_seconds); }

Cost CostOf(const CallShape& shape, const std::vector<Report>& launches,
            const CostParameters& parameters) {
  Cost cost;
  cost.shape = shape;
  for (size_t i = 0; i < launches.size(); ++i) {
    for (const Counters& core : launches[i].cores) {
      cost.bytes_read += static_cast<double>(core.bytes_read);
      cost.bytes_written += static_cast<double>(core.bytes_written);
      cost.vector_repeats += static_cast<double>(core.vector_repeats());
      cost.flags += core.flags + core.queue_flags;
      cost.barriers += core.barriers;
      cost.buffer_bytes = std::max(cost.buffer_bytes, core.buffer_bytes);
      cost.copies_in_flight = std::max(cost.copies_in_flight, core.most_tensors_in_queue);
      if (i == 0 && core.bytes_read > 0) ++cost.cores_busy;
    }
    const LaunchTime time = PredictLaunch(launches[i], parameters);
    cost.copy_seconds += time.copy_seconds;
    cost.vector_seconds += time.vector_seconds;
    cost.seconds += time.total_seconds;
  }
  if (!launches.empty()) cost.num_cores = static_cast<int64_t>(launches[0].cores.size());
  return cost;
}

void PrintCosts(std::ostream& out, const std::vector<Cost>& costs) {
  out << "| call | read, MiB (of least) | written, MiB (of least) | repeats per row | flags "
         "| barriers | buffer, KiB | in flight | cores busy | copy, us | vector, us "
         "| predicted, us | predicted, TB/s | original, TB/s |\n"
         "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n";
  for (const Cost& cost : costs) {
    out << "| " << cost.shape.what << " | " << Bytes(cost.bytes_read, cost.shape.least_read)
        << " | " << Bytes(cost.bytes_written, cost.shape.least_written) << " | "
        << Fixed(cost.repeats_per_row(), 2) << " | " << cost.flags << " | " << cost.barriers
        << " | " << Fixed(static_cast<double>(cost.buffer_bytes) / 1024, 1) << " | "
        << cost.copies_in_flight << " | " << cost.cores_busy << " of " << cost.num_cores << " | "
        << Fixed(cost.copy_seconds * 1e6, 1) << " | " << Fixed(cost.vector_seconds * 1e6, 1)
        << " | " << Fixed(cost.seconds * 1e6, 1) << " | " << TeraBytes(cost.bandwidth()) << " | "
        << TeraBytes(cost.shape.measured) << " |\n";
  }
}

}  // namespace ascend_emulator
