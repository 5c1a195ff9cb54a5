// What calls on an Ascend 910B4 would cost: the calibration of the model, and a table of the
// kernels that ship, which is printed and held against what their design promises.

#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <cstdio>
#include <iostream>
#include <numeric>
#include <random>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "ascend/backend.h"
#include "calibration.h"
#include "cost_table.h"
#include "emulated_ascend.h"
#include "global_memory.h"
#include "kernel_calls.h"
#include "measurements.h"
#include "tile_metadata.h"
#include "tile_selection.h"

namespace select_attn::ascend {
namespace {

using ascend_calibration::kHeadDim;
using ascend_calibration::kTileElements;
using ascend_calibration::kTileRows;
using ascend_calibration::Measurement;
using ascend_emulator::Cost;
using ascend_emulator::CostParameters;
using ascend_emulator::GlobalMemory;

constexpr DLDevice kDevice = {kDLExtDev, 0};
constexpr int64_t kCores = ascend_calibration::kCores;
// The sanitizer makes the large calls take minutes; what they run, others run too.
#ifdef __SANITIZE_ADDRESS__
constexpr bool kSkipsLargeCalls = true;
#else
constexpr bool kSkipsLargeCalls = false;
#endif

template <typename T>
T FromFloat(float value) {
  if constexpr (std::is_same_v<T, bfloat16_t>) {
    return AscendC::ToBfloat16(value);
  } else {
    return T(value);
  }
}

template <typename T>
float Wide(T value) {
  if constexpr (std::is_same_v<T, bfloat16_t>) {
    return AscendC::ToFloat(value);
  } else {
    return static_cast<float>(value);
  }
}

class CalibrationKernelsTest : public testing::Test {
 protected:
  template <typename T>
  void Fill(GlobalMemory<T>& memory, int low, int high) {
    std::uniform_int_distribution<int> number(low, high);
    for (size_t i = 0; i < memory.size(); ++i) {
      memory[i] = FromFloat<T>(static_cast<float>(number(random_)));
    }
  }
  void Shuffle(GlobalMemory<int32_t>& table) {
    std::iota(table.data(), table.data() + table.size(), 0);
    std::shuffle(table.data(), table.data() + table.size(), random_);
  }

  template <typename T>
  void CheckSelection();

  std::mt19937 random_{17};
};

constexpr int32_t kBatch = 2;
constexpr int32_t kKvHeads = 3;

// Element d of row `row` of KV head n in a block of a pool.
size_t PoolIndex(int64_t block, int64_t row, int64_t n, int64_t d) {
  return static_cast<size_t>(((block * kTileRows + row) * kKvHeads + n) * kHeadDim + d);
}

template <typename T>
void CalibrationKernelsTest::CheckSelection() {
  constexpr int32_t kGroup = 2;
  constexpr int32_t kTiles = 2;
  constexpr int32_t kK = 16;
  constexpr size_t kHeads = size_t{kBatch} * kKvHeads;
  GlobalMemory<T> query(kHeads * kGroup * kHeadDim);
  GlobalMemory<T> maxblocks(kHeads * kTiles * kTileElements);
  GlobalMemory<T> minblocks(maxblocks.size());
  GlobalMemory<int32_t> table(size_t{kBatch} * kTiles);
  GlobalMemory<int32_t> selected(kHeads * kK);
  // Sums are small integers, exact in half.
  Fill(query, -1, 1);
  Fill(maxblocks, 0, 4);
  Fill(minblocks, -4, 0);
  Shuffle(table);
  const ascend_calibration::TileSelectionArguments<T> arguments = {query.data(),
                                                                   maxblocks.data(),
                                                                   minblocks.data(),
                                                                   table.data(),
                                                                   selected.data(),
                                                                   kBatch,
                                                                   kKvHeads,
                                                                   kGroup,
                                                                   kTiles,
                                                                   kK,
                                                                   2};
  const ascend_emulator::Report report = ascend_emulator::LaunchCores({}, 2, [&] {
    AscendC::TPipe pipe;
    ascend_calibration::TileSelectionKernel<T> kernel(arguments, &pipe);
    kernel.Run();
  });
  ASSERT_EQ(report.errors, std::vector<std::string>());
  for (int64_t head = 0; head < int64_t{kBatch} * kKvHeads; ++head) {
    const int64_t b = head / kKvHeads;
    const int64_t n = head % kKvHeads;
    std::vector<std::pair<float, int64_t>> ranked;  // minus the score, the row
    for (int64_t row = 0; row < int64_t{kTiles} * kTileRows; ++row) {
      const int64_t block = table[static_cast<size_t>(b * kTiles + row / kTileRows)];
      float score = 0.0f;
      for (int64_t d = 0; d < kHeadDim; ++d) {
        float mean = 0.0f;
        for (int64_t h = 0; h < kGroup; ++h) {
          mean += Wide(query[static_cast<size_t>((head * kGroup + h) * kHeadDim + d)]) / kGroup;
        }
        const size_t i = PoolIndex(block, row % kTileRows, n, d);
        score += std::max(mean * Wide(maxblocks[i]), mean * Wide(minblocks[i]));
      }
      ranked.emplace_back(-score, row);
    }
    std::sort(ranked.begin(), ranked.end());
    for (int64_t i = 0; i < kK; ++i) {
      ASSERT_EQ(selected[static_cast<size_t>(head * kK + i)], ranked[static_cast<size_t>(i)].second)
          << "head " << head << ", rank " << i;
    }
  }
}

TEST_F(CalibrationKernelsTest, SelectionInHalf) { CheckSelection<half>(); }
TEST_F(CalibrationKernelsTest, SelectionInBFloat16) { CheckSelection<bfloat16_t>(); }

TEST_F(CalibrationKernelsTest, Metadata) {
  constexpr int32_t kTiles = kTileRows;
  constexpr size_t kHeads = size_t{kBatch} * kKvHeads;
  GlobalMemory<half> keys(kHeads * kTiles * kTileElements);
  GlobalMemory<half> maxblocks(kHeads * kTileElements);
  GlobalMemory<half> minblocks(maxblocks.size());
  GlobalMemory<int32_t> table(size_t{kBatch} * kTiles);
  GlobalMemory<int32_t> metadata_table(kBatch);
  Fill(keys, -1000, 1000);
  Shuffle(table);
  Shuffle(metadata_table);
  const ascend_calibration::TileMetadataArguments arguments = {keys.data(),
                                                               maxblocks.data(),
                                                               minblocks.data(),
                                                               table.data(),
                                                               metadata_table.data(),
                                                               kBatch,
                                                               kKvHeads,
                                                               kTiles,
                                                               4};
  const ascend_emulator::Report report = ascend_emulator::LaunchCores({}, 4, [&] {
    AscendC::TPipe pipe;
    ascend_calibration::TileMetadataKernel kernel(arguments, &pipe);
    kernel.Run();
  });
  ASSERT_EQ(report.errors, std::vector<std::string>());
  for (int64_t b = 0; b < kBatch; ++b) {
    for (int64_t tile = 0; tile < kTiles; ++tile) {
      for (int64_t n = 0; n < kKvHeads; ++n) {
        for (int64_t d = 0; d < kHeadDim; ++d) {
          float highest = -kInfinity;
          float lowest = kInfinity;
          for (int64_t row = 0; row < kTileRows; ++row) {
            const int64_t block = table[static_cast<size_t>(b * kTiles + tile)];
            const auto key = static_cast<float>(keys[PoolIndex(block, row, n, d)]);
            highest = std::max(highest, key);
            lowest = std::min(lowest, key);
          }
          const size_t i = PoolIndex(metadata_table[static_cast<size_t>(b)], tile, n, d);
          ASSERT_EQ(static_cast<float>(maxblocks[i]), highest);
          ASSERT_EQ(static_cast<float>(minblocks[i]), lowest);
        }
      }
    }
  }
}

class AscendCalibrationTest : public testing::Test {
 protected:
  static void SetUpTestSuite() { measurements_ = ascend_calibration::RunMeasurements(); }
  static void TearDownTestSuite() { measurements_.clear(); }

  static double RepeatsPerRow(const Measurement& measurement,
                              const std::vector<std::string_view>& names) {
    const ascend_emulator::Counters& core = measurement.report.cores[0];
    int64_t repeats = 0;
    for (const std::string_view name : names) repeats += core.vector.at(name).repeats;
    return static_cast<double>(repeats) / measurement.rows;
  }

  static std::vector<Measurement> measurements_;
};
std::vector<Measurement> AscendCalibrationTest::measurements_;

TEST_F(AscendCalibrationTest, KernelsHaveTheCountsOfTheOriginal) {
  for (const Measurement& measurement : measurements_) {
    EXPECT_EQ(measurement.report.errors, std::vector<std::string>());
  }
  // Casts of the query come on top, and sorting.
  EXPECT_NEAR(
      RepeatsPerRow(measurements_[0], {"Cast", "Mul", "Max", "RepeatReduceSum", "PairReduceSum"}),
      12.03, 0.02);
  EXPECT_NEAR(RepeatsPerRow(measurements_[1], {"Mul", "Max", "RepeatReduceSum"}), 4, 1e-9);
  EXPECT_NEAR(RepeatsPerRow(measurements_[2], {"DataCopy", "Max", "Min"}), 4, 1e-9);
  EXPECT_EQ(measurements_[0].report.cores[0].most_tensors_in_queue, 1);
}

// The model's constants are those that the search finds, and they are good enough.
TEST_F(AscendCalibrationTest, FindsTheParameters) {
  const CostParameters parameters;
  const ascend_calibration::Calibration found =
      ascend_calibration::Calibrate(measurements_, parameters);
  EXPECT_EQ(found.best.cycles_per_repeat, parameters.cycles_per_repeat);
  EXPECT_EQ(found.best.cycles_per_vector_instruction, parameters.cycles_per_vector_instruction);
  const auto [least, most] =
      std::minmax_element(found.fitting.begin(), found.fitting.end(),
                          [](const CostParameters& x, const CostParameters& y) {
                            return x.cycles_per_repeat < y.cycles_per_repeat;
                          });
  ASSERT_NE(least, found.fitting.end());
  std::printf(
      "calibration: %.2f cycles per repeat, %.0f per vector instruction; within %.0f %% from %.2f "
      "with %.0f to %.2f with %.0f\n",
      parameters.cycles_per_repeat, parameters.cycles_per_vector_instruction,
      100 * ascend_calibration::kTolerance, least->cycles_per_repeat,
      least->cycles_per_vector_instruction, most->cycles_per_repeat,
      most->cycles_per_vector_instruction);
  for (const Measurement& measurement : measurements_) {
    const double predicted = ascend_calibration::PredictedBandwidth(measurement, parameters);
    std::printf("calibration: %s: %.3f TB/s predicted, %.3f measured, %+.1f %%\n",
                measurement.what.c_str(), predicted / 1e12, measurement.bandwidth / 1e12,
                100 * (predicted / measurement.bandwidth - 1));
    EXPECT_NEAR(predicted / measurement.bandwidth, 1.0, ascend_calibration::kTolerance)
        << measurement.what;
  }
}

// Calls of the kernels that ship; prints a line for each.
class AscendCostTest : public testing::TestWithParam<DType>, protected RandomCalls {
 protected:
  static void SetUpTestSuite() {
    costs_.clear();
    ranges_.clear();
    fitting_ = ascend_calibration::Calibrate(ascend_calibration::RunMeasurements(), {}).fitting;
  }
  static void TearDownTestSuite() {
    ascend_emulator::PrintCosts(std::cout, costs_);
    std::cout << "over all parameters that fit:\n" << ranges_;
  }

  void Fill(Pool& pool, float scale = 1.0f) {
    for (float& value : pool.values) value = scale * SmallInteger();
  }

  // Of the last call.
  static const Cost& Record(const ascend_emulator::CallShape& shape) {
    costs_.push_back(ascend_emulator::CostOf(shape, emulated_device.launches, {}));
    return costs_.back();
  }

  // The last call, whichever of the parameters that fit are the chip's, or at least with the best.
  static void ExpectFasterThanMeasured(const Cost& cost, bool whichever) {
    double low = cost.bandwidth();
    double high = low;
    for (const CostParameters& parameters : fitting_) {
      const double bandwidth =
          ascend_emulator::CostOf(cost.shape, emulated_device.launches, parameters).bandwidth();
      low = std::min(low, bandwidth);
      high = std::max(high, bandwidth);
    }
    EXPECT_GT(whichever ? low : cost.bandwidth(), cost.shape.measured);
    ranges_ += cost.shape.what + ": " + std::to_string(low / 1e12) + " to " +
               std::to_string(high / 1e12) + " TB/s\n";
  }

  static void ExpectHiddenCopies(const Cost& cost) {
    EXPECT_LE(cost.bytes_ratio(), 1.02);
    EXPECT_GE(cost.copies_in_flight, 2);
    EXPECT_EQ(cost.cores_busy, kCores);
    EXPECT_LE(cost.buffer_bytes, 184 * 1024);  // CANN may keep the last 8 KiB to itself
    EXPECT_LE(cost.overlap_ratio(), 1.1);
  }

  // The contract's result, too.
  Cost Select(const std::string& what, const Batch& c, int64_t group, int64_t k, double measured,
              const std::vector<int64_t>& zero_channels = {}) {
    Pool query(GetParam(), c.batch, 1, c.heads * group, c.dim);
    Pool max(GetParam(), c.metadata_blocks, c.rows, c.heads, c.dim);
    Pool min(GetParam(), c.metadata_blocks, c.rows, c.heads, c.dim);
    Fill(max);
    Fill(min);
    Fill(query);
    // Of equal heads the mean is exact and without zeros.
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t h = 0; h < c.heads * group; ++h) {
        for (int64_t d = 0; d < c.dim; ++d) {
          query.At(b, 0, h, d) = query.At(b, 0, h - h % group, d);
        }
        for (const int64_t d : zero_channels) query.At(b, 0, h, d) = 0.0f;
      }
    }
    for (Pool* pool : {&query, &max, &min}) pool->Store();
    emulated_device.num_cores = kCores;
    std::vector<int32_t> out;
    QuestBlockSelectPagedParams p = SelectParams(c, GetParam(), group, k, query, max, min, out);
    std::vector<uint8_t> workspace(
        static_cast<size_t>(QuestBlockSelectPaged().workspace_size(p, kDevice)));
    p.workspace = workspace.data();
    p.workspace_bytes = static_cast<int64_t>(workspace.size());
    EXPECT_STREQ(QuestBlockSelectPaged().run(p, kDevice, nullptr), nullptr);
    EXPECT_EQ(out, ExpectedSelection(c, p, query, max, min));
    const auto rows = static_cast<double>(c.batch * c.heads * c.kv_columns);
    const auto row_bytes = static_cast<double>(c.dim * ElementBytes(GetParam()));
    const auto query_rows = static_cast<double>(p.batch * p.num_heads);
    return Record({what + ", " + DTypeText(), rows, (2.0 * rows + query_rows) * row_bytes,
                   static_cast<double>(out.size() * sizeof(int32_t)), measured});
  }

  // As the table has it, in lower case.
  static std::string DTypeText() {
    std::string text = DTypeName(GetParam());
    std::transform(text.begin(), text.end(), text.begin(),
                   [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    return text;
  }

  double MeasuredSelection() const {
    return GetParam() == DType::kFloat16    ? ascend_calibration::kMeasuredSelectionFloat16
           : GetParam() == DType::kBFloat16 ? ascend_calibration::kMeasuredSelectionBFloat16
                                            : 0.0;
  }

  static std::vector<Cost> costs_;
  static std::vector<CostParameters> fitting_;
  static std::string ranges_;
};
std::vector<Cost> AscendCostTest::costs_;
std::vector<CostParameters> AscendCostTest::fitting_;
std::string AscendCostTest::ranges_;

TEST_P(AscendCostTest, MetadataIsCheap) {
  if (kSkipsLargeCalls) GTEST_SKIP();
  // 10,240 tokens a request, 4 KV blocks of all heads for each core.
  const Batch c = Uniform(2, 8, 80, 128);
  Pool keys(GetParam(), c.kv_blocks, c.block_size, c.heads, c.dim);
  Pool max(GetParam(), c.metadata_blocks, c.rows, c.heads, c.dim);
  Pool min(GetParam(), c.metadata_blocks, c.rows, c.heads, c.dim);
  Fill(keys);
  keys.Store();
  emulated_device.num_cores = kCores;
  const QuestPrefillMetadataParams p = MetadataParams(c, GetParam(), false, keys, max, min);
  ASSERT_STREQ(QuestPrefillMetadata().run(p, kDevice, nullptr), nullptr);
  ExpectMetadata(c, false, keys, max, min);
  ASSERT_NO_FATAL_FAILURE(ExpectStored(max, "max"));
  ASSERT_NO_FATAL_FAILURE(ExpectStored(min, "min"));

  const auto rows = static_cast<double>(c.kv_blocks * c.block_size * c.heads);
  const auto row_bytes = static_cast<double>(c.dim * ElementBytes(GetParam()));
  const auto written_rows = static_cast<double>(2 * c.metadata_blocks * c.rows * c.heads);
  const bool is_float32 = GetParam() == DType::kFloat32;
  const Cost& cost =
      Record({"metadata, " + DTypeText(), rows, rows * row_bytes, written_rows * row_bytes,
              is_float32 ? 0.0 : ascend_calibration::kMeasuredMetadata});
  ExpectHiddenCopies(cost);
  // bfloat16 needs more repeats than the original, which compares it as float16.
  ExpectFasterThanMeasured(cost, GetParam() != DType::kBFloat16);
  // The original needs 4 for float16.
  EXPECT_LE(cost.repeats_per_row(), GetParam() == DType::kFloat16 ? 0.6 * 4 : 5.5);
}

TEST_P(AscendCostTest, SelectionIsCheap) {
  if (kSkipsLargeCalls) GTEST_SKIP();
  // As the original is assumed to have been measured, 98,304 tokens a request.
  const Cost cost = Select("selection", Uniform(20, 8, 768, 128), 4, 8, MeasuredSelection());
  ExpectHiddenCopies(cost);
  ExpectFasterThanMeasured(cost, true);
  EXPECT_LE(cost.repeats_per_row(), 12.0);
}

// B * N = 8: fewer heads than cores. Lists of the cores are bytes on top.
TEST_P(AscendCostTest, SelectionOfFewHeadsKeepsAllCoresBusy) {
  const Batch c = Uniform(2, 4, 768, 128);
  const Cost cost = Select("selection, B N = 8", c, 1, 64, 0.0);
  EXPECT_EQ(cost.cores_busy, kCores);
  EXPECT_LE(cost.bytes_ratio(), 1.02);
  EXPECT_LE(cost.repeats_per_row(), 12.0);
}

TEST_P(AscendCostTest, ZerosInTheQueryAreCheap) {
  const Batch c = Uniform(2, 4, 768, 128);
  const Cost one = Select("selection, B N = 8, a zero in the query", c, 1, 64, 0.0, {5});
  EXPECT_LE(one.repeats_per_row(), 12.0);
  // In both halves of the channels.
  const Cost two = Select("selection, B N = 8, zeros in both halves", c, 1, 64, 0.0, {5, 100});
  // Exact products of bfloat16 take 12 without the sorting.
  EXPECT_LE(two.repeats_per_row(), GetParam() == DType::kBFloat16 ? 13.0 : 12.0);
}

INSTANTIATE_TEST_SUITE_P(DTypes, AscendCostTest,
                         testing::Values(DType::kFloat16, DType::kBFloat16, DType::kFloat32),
                         [](const auto& info) { return DTypeName(info.param); });

}  // namespace
}  // namespace select_attn::ascend
