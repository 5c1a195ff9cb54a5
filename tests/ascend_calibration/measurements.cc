#include "measurements.h"

#include <cstddef>
#include <numeric>

#include "global_memory.h"
#include "kernel_operator.h"
#include "tile_metadata.h"
#include "tile_selection.h"

namespace ascend_calibration {
namespace {

using ascend_emulator::GlobalMemory;

constexpr int32_t kKvHeads = 8;

template <typename Kernel, typename Arguments>
ascend_emulator::Report LaunchOneCore(const Arguments& arguments) {
  return ascend_emulator::LaunchCores({}, 1, [&] {
    AscendC::TPipe pipe;
    Kernel kernel(arguments, &pipe);
    kernel.Run();
  });
}

double RowsOfCore(size_t num_heads, size_t num_tiles) {
  const size_t heads_of_core = num_heads / kCores;
  return static_cast<double>(heads_of_core * num_tiles * kTileRows);
}

void Number(GlobalMemory<int32_t>& table) {
  std::iota(table.data(), table.data() + table.size(), 0);
}

// 98,304 tokens per request. Costs do not depend on values, which are zero.
template <typename T>
Measurement MeasureSelection(const std::string& what, double bandwidth) {
  constexpr int32_t kBatch = 20;
  constexpr int32_t kGroup = 4;
  constexpr int32_t kTiles = 6;
  constexpr int32_t kK = 8;
  constexpr size_t kHeads = size_t{kBatch} * kKvHeads;
  GlobalMemory<T> query(kHeads * kGroup * kHeadDim);
  GlobalMemory<T> maxblocks(kHeads * kTiles * kTileElements);
  GlobalMemory<T> minblocks(maxblocks.size());
  GlobalMemory<int32_t> table(size_t{kBatch} * kTiles);
  Number(table);
  GlobalMemory<int32_t> selected(kHeads * kK);
  const TileSelectionArguments<T> arguments = {
      query.data(), maxblocks.data(), minblocks.data(), table.data(), selected.data(), kBatch,
      kKvHeads,     kGroup,           kTiles,           kK,           kCores};
  const auto bytes =
      static_cast<double>((query.size() + maxblocks.size() + minblocks.size()) * sizeof(T) +
                          (table.size() + kBatch + selected.size()) * sizeof(int32_t));
  return {what, bandwidth, bytes, RowsOfCore(kHeads, kTiles),
          LaunchOneCore<TileSelectionKernel<T>>(arguments)};
}

// 16,384 tokens per request.
Measurement MeasureMetadata() {
  constexpr int32_t kBatch = 10;
  constexpr int32_t kTiles = 128;
  constexpr size_t kHeads = size_t{kBatch} * kKvHeads;
  GlobalMemory<half> keys(kHeads * kTiles * kTileElements);
  GlobalMemory<half> maxblocks(kHeads * kTileElements);
  GlobalMemory<half> minblocks(maxblocks.size());
  GlobalMemory<int32_t> table(size_t{kBatch} * kTiles);
  Number(table);
  GlobalMemory<int32_t> metadata_table(kBatch);
  Number(metadata_table);
  const TileMetadataArguments arguments = {
      keys.data(), maxblocks.data(), minblocks.data(), table.data(), metadata_table.data(),
      kBatch,      kKvHeads,         kTiles,           kCores};
  const auto bytes =
      static_cast<double>((keys.size() + maxblocks.size() + minblocks.size()) * sizeof(half) +
                          table.size() * sizeof(int32_t));
  return {"metadata, float16", kMeasuredMetadata, bytes, RowsOfCore(kHeads, kTiles),
          LaunchOneCore<TileMetadataKernel>(arguments)};
}

}  // namespace

std::vector<Measurement> RunMeasurements() {
  std::vector<Measurement> measurements;
  measurements.reserve(3);
  measurements.push_back(
      MeasureSelection<bfloat16_t>("selection, bfloat16", kMeasuredSelectionBFloat16));
  measurements.push_back(MeasureSelection<half>("selection, float16", kMeasuredSelectionFloat16));
  measurements.push_back(MeasureMetadata());
  return measurements;
}

}  // namespace ascend_calibration
