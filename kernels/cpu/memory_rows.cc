#include "cpu/memory_rows.h"

#include <string>
#include <vector>

#include "core/arguments.h"
#include "core/device.h"

namespace select_attn::cpu {
namespace {

struct Extent {
  int64_t count;
  int64_t stride;  // bytes
};

// Merges neighbours that lie in memory like one dimension. Largest stride first, before and after.
std::vector<Extent> Merged(const std::vector<Extent>& extents) {
  std::vector<Extent> merged;
  for (const Extent& extent : extents) {
    if (!merged.empty() && merged.back().stride == extent.count * extent.stride) {
      merged.back() = {merged.back().count * extent.count, extent.stride};
    } else {
      merged.push_back(extent);
    }
  }
  return merged;
}

}  // namespace

MemoryRows MemoryRows::Of(const DLTensor& tensor) {
  if (!IsHost(tensor.device)) {
    ThrowValueError("memory to be read must be on the CPU, got " + DeviceText(tensor.device));
  }
  const int64_t item_bytes = int64_t{tensor.dtype.bits} * tensor.dtype.lanes / 8;
  MemoryRows rows;
  rows.data = static_cast<const uint8_t*>(Data(tensor));
  std::vector<Extent> extents;
  for (int i = 0; i < tensor.ndim; ++i) {
    const int64_t count = tensor.shape[i];
    if (count == 0) {
      rows.outer_count = 0;
      return rows;
    }
    if (count > 1) extents.push_back({count, Stride(tensor, i) * item_bytes});
  }
  std::sort(extents.begin(), extents.end(),
            [](const Extent& a, const Extent& b) { return a.stride > b.stride; });
  extents.push_back({item_bytes, 1});
  for (size_t i = 0; i + 1 < extents.size(); ++i) {
    if (extents[i].stride < extents[i + 1].count * extents[i + 1].stride) {
      ThrowValueError("memory to be read must have no elements that overlap");
    }
  }
  std::vector<Extent> levels = Merged(extents);
  rows.row_bytes = levels.back().count;
  levels.pop_back();
  if (levels.size() > 2) {
    ThrowValueError("memory to be read must reduce to rows in at most 2 nested levels, got " +
                    std::to_string(levels.size()));
  }
  if (!levels.empty()) {
    rows.inner_count = levels.back().count;
    rows.inner_stride = levels.back().stride;
    levels.pop_back();
  }
  if (!levels.empty()) {
    rows.outer_count = levels.back().count;
    rows.outer_stride = levels.back().stride;
  }
  return rows;
}

}  // namespace select_attn::cpu
