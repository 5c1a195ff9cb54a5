// The emulator of an Ascend vector core: instructions against plain loops, and kernels that are
// wrong on purpose, which it must reject with a message that says why.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "cost_model.h"
#include "cost_table.h"
#include "global_memory.h"
#include "kernel_operator.h"
#include "launch.h"

namespace ascend_emulator {
namespace {

using namespace AscendC;  // NOLINT: as kernels do

using InQueue = TQue<TPosition::VECIN, 2>;
using OutQueue = TQue<TPosition::VECOUT, 2>;

std::vector<std::string> ErrorsOf(const std::function<void()>& kernel, int cores = 1) {
  return Launch(cores, kernel).errors;
}

// What a kernel must be rejected for.
void ExpectError(const std::string& message, const std::function<void()>& kernel, int cores = 1) {
  const std::vector<std::string> errors = ErrorsOf(kernel, cores);
  ASSERT_FALSE(errors.empty()) << "not rejected; expected: " << message;
  EXPECT_NE(errors.front().find(message), std::string::npos) << errors.front();
}

void ExpectNoErrors(const std::vector<std::string>& errors) {
  for (const std::string& error : errors) ADD_FAILURE() << error;
}

// Elements in the unified buffer, written by the scalar unit and fit for any pipe.
template <typename T>
LocalTensor<T> Local(TPipe& pipe, const std::vector<T>& values) {
  TBuf<> buffer;
  pipe.InitBuffer(buffer, static_cast<uint32_t>(values.size() * sizeof(T)));
  const LocalTensor<T> tensor = buffer.Get<T>();
  for (size_t i = 0; i < values.size(); ++i) tensor.SetValue(static_cast<uint32_t>(i), values[i]);
  PipeBarrier<PIPE_ALL>();
  return tensor;
}

template <typename T>
std::vector<T> Values(const LocalTensor<T>& tensor, size_t count) {
  PipeBarrier<PIPE_ALL>();
  std::vector<T> values;
  for (size_t i = 0; i < count; ++i) values.push_back(tensor.GetValue(static_cast<uint32_t>(i)));
  PipeBarrier<PIPE_ALL>();
  return values;
}

class AscendEmulatorTest : public testing::Test {
 protected:
  int Random(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }
  template <typename T>
  std::vector<T> RandomValues(size_t count, int low = -50, int high = 50) {
    std::vector<T> values(count);
    for (T& value : values) value = static_cast<T>(Random(low, high));
    return values;
  }

  std::mt19937 random_{2024};
};

template <typename T>
class ElementwiseTest : public AscendEmulatorTest {};

using Arithmetic = testing::Types<float, half, int16_t, int32_t>;
TYPED_TEST_SUITE(ElementwiseTest, Arithmetic);

TYPED_TEST(ElementwiseTest, BinaryInstructionsOfTheFirstElements) {
  using T = TypeParam;
  for (int round = 0; round < 20; ++round) {
    const auto count = static_cast<size_t>(this->Random(1, 700));
    const std::vector<T> a = this->template RandomValues<T>(704);
    const std::vector<T> b = this->template RandomValues<T>(704);
    ExpectNoErrors(ErrorsOf([&] {
      TPipe pipe;
      const LocalTensor<T> x = Local(pipe, a);
      const LocalTensor<T> y = Local(pipe, b);
      const LocalTensor<T> to = Local(pipe, b);
      const auto n = static_cast<int32_t>(count);
      const auto check = [&](const std::function<T(T, T)>& expected) {
        const std::vector<T> got = Values(to, a.size());
        for (size_t i = 0; i < count; ++i) ASSERT_EQ(got[i], expected(a[i], b[i])) << i;
        PipeBarrier<PIPE_ALL>();
      };
      Add(to, x, y, n);
      check([](T p, T q) { return static_cast<T>(p + q); });
      Sub(to, x, y, n);
      check([](T p, T q) { return static_cast<T>(p - q); });
      Mul(to, x, y, n);
      check([](T p, T q) { return static_cast<T>(p * q); });
      Max(to, x, y, n);
      check([](T p, T q) { return p < q ? q : p; });
      Min(to, x, y, n);
      check([](T p, T q) { return p < q ? p : q; });
      Adds(to, x, static_cast<T>(3), n);
      check([](T p, T) { return static_cast<T>(p + static_cast<T>(3)); });
      Muls(to, x, static_cast<T>(-2), n);
      check([](T p, T) { return static_cast<T>(p * static_cast<T>(-2)); });
      Maxs(to, x, static_cast<T>(7), n);
      check([](T p, T) { return p < static_cast<T>(7) ? static_cast<T>(7) : p; });
      Mins(to, x, static_cast<T>(7), n);
      check([](T p, T) { return p < static_cast<T>(7) ? p : static_cast<T>(7); });
      Duplicate(to, static_cast<T>(11), n);
      check([](T, T) { return static_cast<T>(11); });
      const std::vector<T> got = Values(to, a.size());
      Add(to, x, y, n);
      const std::vector<T> after = Values(to, a.size());
      for (size_t i = count; i < a.size(); ++i) ASSERT_EQ(got[i], after[i]) << "past the count";
    }));
  }
}

TYPED_TEST(ElementwiseTest, MasksAndStrides) {
  using T = TypeParam;
  constexpr int kLanes = 256 / static_cast<int>(sizeof(T));
  constexpr int kPerBlock = 32 / static_cast<int>(sizeof(T));
  for (int round = 0; round < 30; ++round) {
    const int mask = this->Random(1, kLanes);
    const int repeats = this->Random(1, 5);
    const int block[3] = {this->Random(1, 2), this->Random(1, 2), this->Random(0, 2)};
    const int repeat[3] = {16, this->Random(0, 16), this->Random(0, 16)};
    const size_t size = size_t{6} * 16 * kPerBlock;
    const std::vector<T> a = this->template RandomValues<T>(size);
    const std::vector<T> b = this->template RandomValues<T>(size);
    const std::vector<T> before = this->template RandomValues<T>(size);
    std::vector<T> expected = before;
    for (int r = 0; r < repeats; ++r) {
      for (int i = 0; i < mask; ++i) {
        const auto at = [&](int operand) {
          const int at_block = r * repeat[operand] + i / kPerBlock * block[operand];
          const int element = at_block * kPerBlock + i % kPerBlock;
          return static_cast<size_t>(element);
        };
        expected[at(0)] = static_cast<T>(a[at(1)] + b[at(2)]);
      }
    }
    ExpectNoErrors(ErrorsOf([&] {
      TPipe pipe;
      const LocalTensor<T> x = Local(pipe, a);
      const LocalTensor<T> y = Local(pipe, b);
      const LocalTensor<T> to = Local(pipe, before);
      const auto u8 = [](int value) { return static_cast<uint8_t>(value); };
      Add(to, x, y, static_cast<uint64_t>(mask), u8(repeats),
          BinaryRepeatParams(u8(block[0]), u8(block[1]), u8(block[2]), u8(repeat[0]), u8(repeat[1]),
                             u8(repeat[2])));
      EXPECT_EQ(Values(to, size), expected);
    }));
  }
}

TEST_F(AscendEmulatorTest, BitMasksPickLanes) {
  const std::vector<float> a = RandomValues<float>(128);
  ExpectNoErrors(ErrorsOf([&] {
    TPipe pipe;
    const LocalTensor<float> x = Local(pipe, a);
    const LocalTensor<float> to = Local(pipe, std::vector<float>(128, 99.0f));
    const uint64_t mask[2] = {0xF0F0, 0};
    Add(to, x, x, mask, 2, BinaryRepeatParams());
    const std::vector<float> got = Values(to, 128);
    for (size_t i = 0; i < 128; ++i) {
      const bool is_active = i % 64 < 16 && (0xF0F0u >> i % 64 & 1) != 0;
      EXPECT_EQ(got[i], is_active ? 2 * a[i] : 99.0f) << i;
    }
    // The mask register, for an instruction that does not set it.
    SetVectorMask<float>(0, 1);
    Add<float, false>(to, x, x, MASK_PLACEHOLDER, 1, BinaryRepeatParams());
    EXPECT_EQ(Values(to, 2)[0], 2 * a[0]);
    EXPECT_EQ(Values(to, 2)[1], 99.0f);
  }));
}

TEST_F(AscendEmulatorTest, BitsShiftsAndAbsolutes) {
  const std::vector<int16_t> a = RandomValues<int16_t>(256, -30000, 30000);
  const std::vector<int16_t> b = RandomValues<int16_t>(256, -30000, 30000);
  const std::vector<float> f = RandomValues<float>(128);
  ExpectNoErrors(ErrorsOf([&] {
    TPipe pipe;
    const LocalTensor<int16_t> x = Local(pipe, a);
    const LocalTensor<int16_t> y = Local(pipe, b);
    const LocalTensor<int16_t> to = Local(pipe, a);
    const auto check = [&](const std::function<int(int, int)>& expected) {
      const std::vector<int16_t> got = Values(to, 256);
      for (size_t i = 0; i < 256; ++i) {
        ASSERT_EQ(got[i], static_cast<int16_t>(expected(a[i], b[i]))) << i;
      }
      PipeBarrier<PIPE_ALL>();
    };
    And(to, x, y, 256);
    check([](int p, int q) { return p & q; });
    Or(to, x, y, 256);
    check([](int p, int q) { return p | q; });
    Not(to, x, 256);
    check([](int p, int) { return ~p; });
    ShiftRight(to, x, int16_t{3}, 256);
    check([](int p, int) { return p >> 3; });
    ShiftLeft(to, x, int16_t{3}, 256);
    check([](int p, int) { return p * 8; });
    const LocalTensor<uint16_t> bits = to.ReinterpretCast<uint16_t>();
    ShiftRight(bits, x.ReinterpretCast<uint16_t>(), uint16_t{3}, 256);
    check([](int p, int) { return static_cast<uint16_t>(p) >> 3; });
    const LocalTensor<float> g = Local(pipe, f);
    Abs(g, g, 128);
    const std::vector<float> got = Values(g, 128);
    for (size_t i = 0; i < 128; ++i) EXPECT_EQ(got[i], std::fabs(f[i]));
  }));
}

TEST_F(AscendEmulatorTest, MultiplyAndAdd) {
  const std::vector<half> a = RandomValues<half>(200);
  const std::vector<half> b = RandomValues<half>(200);
  const std::vector<float> c = RandomValues<float>(200);
  ExpectNoErrors(ErrorsOf([&] {
    TPipe pipe;
    const LocalTensor<half> x = Local(pipe, std::vector<half>(a));
    const LocalTensor<half> y = Local(pipe, std::vector<half>(b));
    const LocalTensor<float> sum = Local(pipe, c);
    MulAddDst(sum, x, y, 200);
    std::vector<float> got = Values(sum, 200);
    for (size_t i = 0; i < 200; ++i) EXPECT_EQ(got[i], a[i] * b[i] + c[i]) << i;
    Axpy(sum, x, half(2), 200);
    got = Values(sum, 200);
    for (size_t i = 0; i < 200; ++i) EXPECT_EQ(got[i], a[i] * b[i] + c[i] + 2 * a[i]) << i;
  }));
}

TEST_F(AscendEmulatorTest, HalfAndBFloat16RoundAsDocumented) {
  // Every half is a float, and comes back as it was.
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half_bits = static_cast<uint16_t>(bits);
    const float wide = HalfBitsToFloat(half_bits);
    if (std::isnan(wide)) continue;
    ASSERT_EQ(FloatToHalfBits(wide, RoundMode::CAST_RINT), half_bits);
    ASSERT_EQ(FloatToHalfBits(wide, RoundMode::CAST_TRUNC), half_bits);
    if (!std::isnan(BFloat16BitsToFloat(half_bits))) {
      ASSERT_EQ(FloatToBFloat16Bits(BFloat16BitsToFloat(half_bits), RoundMode::CAST_CEIL),
                half_bits);
    }
  }
  // Halfway between 1 and the next half, and on both sides of that.
  const auto rounded = [](float value, RoundMode mode) {
    return HalfBitsToFloat(FloatToHalfBits(value, mode));
  };
  constexpr float kStep = 0x1p-10f;
  EXPECT_EQ(rounded(1 + kStep / 2, RoundMode::CAST_RINT), 1.0f);
  EXPECT_EQ(rounded(1 + 3 * kStep / 2, RoundMode::CAST_RINT), 1 + 2 * kStep);
  EXPECT_EQ(rounded(1 + kStep / 2, RoundMode::CAST_ROUND), 1 + kStep);
  EXPECT_EQ(rounded(-1 - kStep / 4, RoundMode::CAST_FLOOR), -1 - kStep);
  EXPECT_EQ(rounded(-1 - kStep / 4, RoundMode::CAST_CEIL), -1.0f);
  EXPECT_EQ(rounded(1 + kStep / 4, RoundMode::CAST_ODD), 1 + kStep);
  EXPECT_EQ(rounded(0x1p-25f, RoundMode::CAST_RINT), 0.0f);
  EXPECT_EQ(rounded(0x1.8p-25f, RoundMode::CAST_RINT), 0x1p-24f);
  EXPECT_EQ(rounded(1e6f, RoundMode::CAST_RINT), std::numeric_limits<float>::infinity());
  EXPECT_EQ(rounded(1e6f, RoundMode::CAST_TRUNC), 65504.0f);
  EXPECT_EQ(ToFloat(ToBfloat16(1 + 0x1p-8f)), 1.0f);
  EXPECT_EQ(ToFloat(ToBfloat16(1 + 0x3p-8f)), 1 + 0x4p-8f);
}

TEST_F(AscendEmulatorTest, CastsGoThereAndBack) {
  for (int round = 0; round < 20; ++round) {
    const auto count = static_cast<size_t>(Random(1, 300));
    const std::vector<float> a = RandomValues<float>(304);
    ExpectNoErrors(ErrorsOf([&] {
      TPipe pipe;
      const auto n = static_cast<uint32_t>(count);
      const LocalTensor<float> x = Local(pipe, a);
      const LocalTensor<half> h = Local(pipe, std::vector<half>(304, half(0)));
      const LocalTensor<bfloat16_t> b = Local(pipe, std::vector<bfloat16_t>(304));
      const LocalTensor<int32_t> i32 = Local(pipe, std::vector<int32_t>(304));
      const LocalTensor<float> to = Local(pipe, std::vector<float>(304, 0.5f));
      std::vector<float> expected(304, 0.5f);
      std::copy_n(a.begin(), count, expected.begin());
      Cast(h, x, RoundMode::CAST_RINT, n);
      Cast(b, x, RoundMode::CAST_RINT, n);
      Cast(i32, x, RoundMode::CAST_RINT, n);
      PipeBarrier<PIPE_V>();
      Cast(to, h, RoundMode::CAST_NONE, n);
      EXPECT_EQ(Values(to, 304), expected);
      PipeBarrier<PIPE_ALL>();
      Cast(to, b, RoundMode::CAST_NONE, n);
      EXPECT_EQ(Values(to, 304), expected);
      PipeBarrier<PIPE_ALL>();
      Cast(to, i32, RoundMode::CAST_NONE, n);
      EXPECT_EQ(Values(to, 304), expected);
    }));
  }
  ExpectError("needs a rounding mode", [] {
    TPipe pipe;
    const LocalTensor<float> x = Local(pipe, std::vector<float>(64, 1.0f));
    const LocalTensor<bfloat16_t> b = Local(pipe, std::vector<bfloat16_t>(64));
    Cast(b, x, RoundMode::CAST_NONE, 64);
  });
}

TEST_F(AscendEmulatorTest, CastOfRepeatsHasTheLanesOfTheWiderType) {
  const std::vector<float> a = RandomValues<float>(256);
  ExpectNoErrors(ErrorsOf([&] {
    TPipe pipe;
    const LocalTensor<float> x = Local(pipe, a);
    const LocalTensor<half> h = Local(pipe, std::vector<half>(256, half(0)));
    Cast(h, x, RoundMode::CAST_RINT, 64, 4, UnaryRepeatParams(1, 1, 4, 8));
    const std::vector<half> got = Values(h, 256);
    for (size_t i = 0; i < 256; ++i) EXPECT_EQ(static_cast<float>(got[i]), a[i]) << i;
  }));
}

TEST_F(AscendEmulatorTest, Reductions) {
  const std::vector<float> a = RandomValues<float>(256);
  ExpectNoErrors(ErrorsOf([&] {
    TPipe pipe;
    const LocalTensor<float> x = Local(pipe, a);
    const LocalTensor<float> to = Local(pipe, std::vector<float>(256, 0.0f));
    const auto row = [&](int i) { return a.begin() + int64_t{i} * 64; };
    WholeReduceSum(to, x, 60, 4, 1, 1, 8);
    std::vector<float> got = Values(to, 4);
    for (int i = 0; i < 4; ++i) {
      EXPECT_EQ(got[static_cast<size_t>(i)], std::accumulate(row(i), row(i) + 60, 0.0f));
    }
    PipeBarrier<PIPE_ALL>();
    RepeatReduceSum(to, x, 4, 64, 0, 1, 1, 8);
    got = Values(to, 4);
    EXPECT_EQ(got[3], std::accumulate(row(3), row(3) + 64, 0.0f));
    PipeBarrier<PIPE_ALL>();
    WholeReduceMax(to, x, 64, 4, 1, 1, 8);
    got = Values(to, 8);
    for (int i = 0; i < 4; ++i) {
      const auto best = std::max_element(row(i), row(i) + 64);
      EXPECT_EQ(got[static_cast<size_t>(2 * i)], *best);
      EXPECT_EQ(BitCast<uint32_t>(got[static_cast<size_t>(2 * i + 1)]), best - row(i));
    }
    PipeBarrier<PIPE_ALL>();
    WholeReduceMin(to, x, 64, 4, 1, 1, 8, ReduceOrder::ORDER_ONLY_VALUE);
    got = Values(to, 4);
    EXPECT_EQ(got[2], *std::min_element(row(2), row(2) + 64));
    PipeBarrier<PIPE_ALL>();
    BlockReduceMax(to, x, 4, 64, 1, 1, 8);
    got = Values(to, 32);
    for (int i = 0; i < 32; ++i) {
      EXPECT_EQ(got[static_cast<size_t>(i)],
                *std::max_element(a.begin() + int64_t{i} * 8, a.begin() + int64_t{i} * 8 + 8));
    }
    PipeBarrier<PIPE_ALL>();
    BlockReduceSum(to, x, 4, 64, 1, 1, 8);
    got = Values(to, 32);
    EXPECT_EQ(got[31], std::accumulate(a.end() - 8, a.end(), 0.0f));
    PipeBarrier<PIPE_ALL>();
    PairReduceSum(to, x, 4, 64, 1, 1, 8);
    got = Values(to, 128);
    for (size_t i = 0; i < 128; ++i) EXPECT_EQ(got[i], a[2 * i] + a[2 * i + 1]);
    PipeBarrier<PIPE_ALL>();
    const LocalTensor<float> work = Local(pipe, std::vector<float>(64, 0.0f));
    ReduceMax(to, x, work, 200, true);
    got = Values(to, 2);
    const auto best = std::max_element(a.begin(), a.begin() + 200);
    EXPECT_EQ(got[0], *best);
    EXPECT_EQ(BitCast<uint32_t>(got[1]), best - a.begin());
  }));
}

TEST_F(AscendEmulatorTest, CompareSelectBroadcastAndGather) {
  const std::vector<float> a = RandomValues<float>(128, -3, 3);
  const std::vector<float> b = RandomValues<float>(128, -3, 3);
  ExpectNoErrors(ErrorsOf([&] {
    TPipe pipe;
    const LocalTensor<float> x = Local(pipe, a);
    const LocalTensor<float> y = Local(pipe, b);
    const LocalTensor<float> to = Local(pipe, std::vector<float>(128, 0.0f));
    const LocalTensor<uint8_t> bits = Local(pipe, std::vector<uint8_t>(32));
    Compare(bits, x, y, CMPMODE::LE, 128);
    PipeBarrier<PIPE_V>();
    Select(to, bits, x, y, SELMODE::VSEL_TENSOR_TENSOR_MODE, 128);
    std::vector<float> got = Values(to, 128);
    for (size_t i = 0; i < 128; ++i) EXPECT_EQ(got[i], std::min(a[i], b[i]));
    PipeBarrier<PIPE_ALL>();
    CompareScalar(bits, x, 1.0f, CMPMODE::GT, 128);
    PipeBarrier<PIPE_V>();
    Select(to, bits, x, -9.0f, SELMODE::VSEL_TENSOR_SCALAR_MODE, 128);
    got = Values(to, 128);
    for (size_t i = 0; i < 128; ++i) EXPECT_EQ(got[i], a[i] > 1 ? a[i] : -9.0f);
    PipeBarrier<PIPE_ALL>();
    Brcb(to, x, 2, BrcbRepeatParams(1, 8));
    got = Values(to, 128);
    for (size_t i = 0; i < 128; ++i) EXPECT_EQ(got[i], a[i / 8]);
    PipeBarrier<PIPE_ALL>();
    std::vector<uint32_t> offsets(128);
    for (size_t i = 0; i < 128; ++i) offsets[i] = static_cast<uint32_t>(4 * (127 - i));
    Gather(to, x, Local(pipe, offsets), 0, 128);
    got = Values(to, 128);
    for (size_t i = 0; i < 128; ++i) EXPECT_EQ(got[i], a[127 - i]);
    const LocalTensor<int32_t> numbers = Local(pipe, std::vector<int32_t>(128));
    ArithProgression(numbers, 5, 3, 100);
    EXPECT_EQ(Values(numbers, 100)[99], 5 + 3 * 99);
  }));
}

// Pairs of a score and an index.
std::vector<std::pair<float, uint32_t>> Pairs(const LocalTensor<float>& tensor, size_t count) {
  const std::vector<float> words = Values(tensor, 2 * count);
  std::vector<std::pair<float, uint32_t>> pairs;
  for (size_t i = 0; i < count; ++i) {
    pairs.emplace_back(words[2 * i], BitCast<uint32_t>(words[2 * i + 1]));
  }
  return pairs;
}

TEST_F(AscendEmulatorTest, SortsAndMergesStably) {
  const std::vector<float> scores = RandomValues<float>(128, 0, 20);
  std::vector<uint32_t> indices(128);
  std::iota(indices.begin(), indices.end(), 100u);
  std::vector<std::pair<float, uint32_t>> expected;
  for (size_t i = 0; i < 128; ++i) expected.emplace_back(scores[i], indices[i]);
  std::stable_sort(expected.begin(), expected.end(),
                   [](const auto& p, const auto& q) { return p.first > q.first; });
  ExpectNoErrors(ErrorsOf([&] {
    TPipe pipe;
    const LocalTensor<float> x = Local(pipe, scores);
    const LocalTensor<uint32_t> index = Local(pipe, indices);
    const LocalTensor<float> sorted = Local(pipe, std::vector<float>(256, 0.0f));
    const LocalTensor<float> merged = Local(pipe, std::vector<float>(256, 0.0f));
    Sort32(sorted, x, index, 4);
    PipeBarrier<PIPE_V>();
    const MrgSortSrcList<float> lists(sorted, sorted[64], sorted[128], sorted[192]);
    const uint16_t lengths[4] = {32, 32, 32, 32};
    MrgSort(merged, lists, MrgSort4Info(lengths, false, 15, 1));
    EXPECT_EQ(Pairs(merged, 128), expected);

    // With suspension: until one list is used up.
    PipeBarrier<PIPE_ALL>();
    uint32_t used[4];
    MrgSort<float, true>(merged, lists, lengths, used, 3, 1);
    EXPECT_TRUE(used[0] == 32 || used[1] == 32);
    EXPECT_TRUE(used[0] < 32 || used[1] < 32);
    EXPECT_EQ(used[2], 0u);

    PipeBarrier<PIPE_ALL>();
    const LocalTensor<float> tmp = Local(pipe, std::vector<float>(256, 0.0f));
    LocalTensor<float> concat;
    Concat(concat, x, tmp, 8);
    Sort<float, true>(merged, concat, index, tmp, 4);
    EXPECT_EQ(Pairs(merged, 128), expected);
    PipeBarrier<PIPE_ALL>();
    Extract(x, index, merged, 4);
    const std::vector<uint32_t> order = Values(index, 128);
    for (size_t i = 0; i < 128; ++i) EXPECT_EQ(order[i], expected[i].second);
  }));
}

TEST_F(AscendEmulatorTest, CopiesWithStridesAndPadding) {
  for (int round = 0; round < 30; ++round) {
    const auto rows = static_cast<uint16_t>(Random(1, 6));
    const auto width = static_cast<uint32_t>(Random(1, 40));
    const auto gap = static_cast<uint32_t>(Random(0, 9));
    const uint32_t padded = (width * 2 + 31) / 32 * 16;
    GlobalMemory<int16_t> from(size_t{rows} * (width + gap));
    GlobalMemory<int16_t> to(size_t{rows} * (width + gap));
    for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<int16_t>(Random(1, 30000));
    ExpectNoErrors(ErrorsOf([&] {
      TPipe pipe;
      TBuf<TPosition::VECIN> buffer;
      pipe.InitBuffer(buffer, rows * padded * 2);
      const LocalTensor<int16_t> local = buffer.Get<int16_t>();
      GlobalTensor<int16_t> source;
      GlobalTensor<int16_t> target;
      source.SetGlobalBuffer(from.data(), from.size());
      target.SetGlobalBuffer(to.data(), to.size());
      DataCopyPad(
          local, source, DataCopyExtParams(rows, width * 2, gap * 2, 0, 0),
          DataCopyPadExtParams<int16_t>(true, 0, static_cast<uint8_t>(padded - width), int16_t{7}));
      PipeBarrier<PIPE_ALL>();
      if (width < padded) {
        EXPECT_EQ(local.GetValue(width), 7);
        PipeBarrier<PIPE_ALL>();
      }
      DataCopyPad(target, local, DataCopyExtParams(rows, width * 2, 0, gap * 2, 0));
    }));
    for (size_t i = 0; i < to.size(); ++i) {
      ASSERT_EQ(to[i], i % (width + gap) < width ? from[i] : 0) << i;
    }
  }
}

TEST_F(AscendEmulatorTest, OffsetsBeyond32Bits) {
  constexpr size_t kElements = (size_t{1} << 32) + 64;
  GlobalMemory<float> memory(kElements);
  memory[kElements - 64] = 5.0f;
  ExpectNoErrors(ErrorsOf([&] {
    TPipe pipe;
    TBuf<> buffer;
    pipe.InitBuffer(buffer, 256);
    GlobalTensor<float> all;
    all.SetGlobalBuffer(memory.data(), memory.size());
    DataCopy(buffer.Get<float>(), all[kElements - 64], 64);
    PipeBarrier<PIPE_ALL>();
    EXPECT_EQ(buffer.Get<float>().GetValue(0), 5.0f);
    DataCacheCleanAndInvalid<float, CacheLine::ENTIRE_DATA_CACHE, DcciDst::CACHELINE_OUT>(all);
    EXPECT_EQ(all.GetValue(kElements - 64), 5.0f);
  }));
}

TEST_F(AscendEmulatorTest, SixteenBitsSaturateUntilToldNotTo) {
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<half> values = {half(infinity), half(-infinity),
                                    half(std::numeric_limits<float>::quiet_NaN()), half(3.0f)};
  const auto maxima = [&](bool keeps_infinities) {
    std::vector<half> result;
    ExpectNoErrors(ErrorsOf([&] {
      TPipe pipe;
      if (keeps_infinities) AscendCUtils::SetOverflow(1);
      const LocalTensor<half> x = Local(pipe, values);
      const LocalTensor<half> y = Local(pipe, std::vector<half>(4));
      Max(y, x, x, 4);
      result = Values(y, 4);
    }));
    return result;
  };
  const std::vector<half> saturated = maxima(false);
  ASSERT_EQ(saturated.size(), 4u);
  EXPECT_EQ(static_cast<float>(saturated[0]), 65504.0f);
  EXPECT_EQ(static_cast<float>(saturated[1]), -65504.0f);
  EXPECT_EQ(saturated[2].bits, 0);
  EXPECT_EQ(static_cast<float>(saturated[3]), 3.0f);
  const std::vector<half> kept = maxima(true);
  ASSERT_EQ(kept.size(), 4u);
  EXPECT_EQ(static_cast<float>(kept[0]), infinity);
  EXPECT_EQ(static_cast<float>(kept[1]), -infinity);
  EXPECT_TRUE(std::isnan(static_cast<float>(kept[2])));
  EXPECT_EQ(static_cast<float>(kept[3]), 3.0f);
}

TEST_F(AscendEmulatorTest, SortsPutMinusZeroBehindZero) {
  ExpectNoErrors(ErrorsOf([&] {
    TPipe pipe;
    std::vector<float> scores(32, -1.0f);
    scores[3] = -0.0f;
    scores[7] = 0.0f;
    std::vector<uint32_t> places(32);
    std::iota(places.begin(), places.end(), 0);
    const LocalTensor<float> x = Local(pipe, scores);
    const LocalTensor<uint32_t> index = Local(pipe, places);
    const LocalTensor<float> sorted = Local(pipe, std::vector<float>(64));
    Sort32(sorted, x, index, 1);
    const std::vector<uint32_t> pairs = Values(sorted.ReinterpretCast<uint32_t>(), 4);
    EXPECT_EQ(pairs[1], 7u);
    EXPECT_EQ(pairs[3], 3u);
  }));
}

// Doubles a row in tiles, as kernels should.
void Double(float* from, float* to, uint32_t tiles, uint8_t buffers) {
  constexpr uint64_t kTile = 4096;
  TPipe pipe;
  InQueue in;
  OutQueue out;
  pipe.InitBuffer(in, buffers, kTile * 4);
  pipe.InitBuffer(out, buffers, kTile * 4);
  GlobalTensor<float> source;
  GlobalTensor<float> target;
  const auto first = static_cast<uint64_t>(GetBlockIdx()) * tiles * kTile;
  source.SetGlobalBuffer(from + first, tiles * kTile);
  target.SetGlobalBuffer(to + first, tiles * kTile);
  const auto load = [&](uint32_t tile) {
    LocalTensor<float> x = in.AllocTensor<float>();
    DataCopy(x, source[tile * kTile], kTile);
    in.EnQue(x);
  };
  load(0);
  for (uint32_t tile = 0; tile < tiles; ++tile) {
    if (buffers > 1 && tile + 1 < tiles) load(tile + 1);
    LocalTensor<float> x = in.DeQue<float>();
    LocalTensor<float> y = out.AllocTensor<float>();
    Add(y, x, x, kTile);
    out.EnQue(y);
    in.FreeTensor(x);
    y = out.DeQue<float>();
    DataCopy(target[tile * kTile], y, kTile);
    out.FreeTensor(y);
    if (buffers == 1 && tile + 1 < tiles) load(tile + 1);
  }
}

TEST_F(AscendEmulatorTest, AcceptsARightKernel) {
  constexpr int kCores = 3;
  constexpr uint32_t kTiles = 5;
  constexpr size_t kSize = size_t{kCores} * kTiles * 4096;
  GlobalMemory<float> from(kSize);
  GlobalMemory<float> to(kSize);
  for (size_t i = 0; i < kSize; ++i) from[i] = static_cast<float>(i % 1000);
  for (uint64_t seed = 0; seed < 4; ++seed) {
    LaunchOptions options;
    options.seed = seed;
    const Report report =
        Launch(options, kCores, Double, from.data(), to.data(), kTiles, uint8_t{2});
    ExpectNoErrors(report.errors);
    for (size_t i = 0; i < kSize; ++i) ASSERT_EQ(to[i], 2 * from[i]);
    for (const Counters& core : report.cores) {
      EXPECT_EQ(core.bytes_read, kTiles * 4096 * 4);
      EXPECT_EQ(core.bytes_written, kTiles * 4096 * 4);
      EXPECT_EQ(core.copies_in, kTiles);
      EXPECT_EQ(core.vector_repeats(), kTiles * 64);
      EXPECT_EQ(core.vector.at("Add").instructions, kTiles);
      EXPECT_EQ(core.buffer_bytes, 4 * 4096 * 4);
      EXPECT_EQ(core.most_tensors_in_queue, 2);
    }
  }
}

TEST_F(AscendEmulatorTest, TwoBuffersHideTheCopy) {
  constexpr uint32_t kTiles = 50;
  GlobalMemory<float> from(size_t{kTiles} * 4096);
  GlobalMemory<float> to(size_t{kTiles} * 4096);
  CostParameters parameters;
  parameters.most_bytes_per_second_per_core = 20e9;
  parameters.copy_latency_seconds = 0;
  parameters.cycles_per_vector_instruction = 0;
  // As long as a copy takes.
  parameters.cycles_per_repeat = 256 / 20e9 * parameters.clock_hz;
  const double copies = kTiles * 4096 * 4 / 20e9;
  const Report one = Launch(1, Double, from.data(), to.data(), kTiles, uint8_t{1});
  const Report two = Launch(1, Double, from.data(), to.data(), kTiles, uint8_t{2});
  ExpectNoErrors(one.errors);
  ExpectNoErrors(two.errors);
  const CoreTime time = PredictCore(two.traces[0], parameters, 1);
  EXPECT_NEAR(time.copy_in_seconds / copies, 1, 1e-6);
  EXPECT_NEAR(time.vector_seconds / copies, 1, 1e-6);
  EXPECT_LT(PredictLaunch(two, parameters).total_seconds, 1.1 * copies);
  EXPECT_GT(PredictLaunch(one, parameters).total_seconds, 1.9 * copies);
  // Two cores share the bandwidth.
  parameters.bytes_per_second = 20e9;
  EXPECT_NEAR(PredictCore(two.traces[0], parameters, 2).copy_in_seconds / copies, 2, 1e-6);
}

TEST_F(AscendEmulatorTest, CostsAreThoseOfAllCoresAndLaunches) {
  constexpr int kCores = 3;
  constexpr uint32_t kTiles = 5;
  constexpr double kBytes = kCores * kTiles * 4096.0 * 4;
  GlobalMemory<float> from(size_t{kCores} * kTiles * 4096);
  GlobalMemory<float> to(from.size());
  const Report report = Launch(kCores, Double, from.data(), to.data(), kTiles, uint8_t{2});
  const Report empty = Launch(kCores, [] {});
  const CostParameters parameters;
  const Cost cost =
      CostOf({"twice", kCores * kTiles, kBytes / 2, kBytes, 1e9}, {report, empty}, parameters);
  EXPECT_EQ(cost.bytes_read, kBytes);
  EXPECT_EQ(cost.bytes_written, kBytes);
  EXPECT_NEAR(cost.bytes_ratio(), 4.0 / 3, 1e-9);
  EXPECT_EQ(cost.repeats_per_row(), 64);
  EXPECT_EQ(cost.flags, 4 * kCores * kTiles);  // a buffer filled and given back, in and out
  EXPECT_EQ(cost.barriers, 0);
  EXPECT_EQ(cost.buffer_bytes, 4 * 4096 * 4);
  EXPECT_EQ(cost.copies_in_flight, 2);
  EXPECT_EQ(cost.cores_busy, kCores);
  EXPECT_EQ(cost.num_cores, kCores);
  const CoreTime time = PredictCore(report.traces[0], parameters, kCores);
  EXPECT_EQ(cost.seconds, time.total_seconds);
  EXPECT_EQ(cost.copy_seconds, time.copy_in_seconds);
  EXPECT_EQ(cost.vector_seconds, time.vector_seconds);
  EXPECT_GT(cost.overlap_ratio(), 1.0);
  EXPECT_EQ(CostOf(cost.shape, {report, report}, parameters).seconds, 2 * cost.seconds);

  std::ostringstream text;
  PrintCosts(text, {cost});
  EXPECT_NE(text.str().find("| twice | 0.23 (2.000) | 0.23 (1.000) | 64.00 | 60 | 0 | 64.0 | 2 "
                            "| 3 of 3 |"),
            std::string::npos)
      << text.str();
  EXPECT_NE(text.str().find("| 0.001 |\n"), std::string::npos) << text.str();
}

// Kernels that are wrong on purpose.

struct Fixture {
  explicit Fixture(float* memory, uint64_t size = 256) {
    pipe.InitBuffer(first, 1024);
    pipe.InitBuffer(second, 1024);
    global.SetGlobalBuffer(memory, size);
    x = first.Get<float>();
    y = second.Get<float>();
  }

  TPipe pipe;
  TBuf<TPosition::VECIN> first;
  TBuf<TPosition::VECIN> second;
  GlobalTensor<float> global;
  LocalTensor<float> x;
  LocalTensor<float> y;
};

class RejectionTest : public testing::Test {
 protected:
  void Reject(const std::string& message, const std::function<void(Fixture&)>& kernel) {
    ExpectError(message, [&] {
      Fixture fixture(memory_.data());
      kernel(fixture);
    });
  }

  GlobalMemory<float> memory_{256};
};

TEST_F(RejectionTest, MissingSynchronisation) {
  Reject("Adds (V) reads what DataCopy (MTE2) wrote, byte 0", [](Fixture& f) {
    DataCopy(f.x, f.global, 64);
    Adds(f.y, f.x, 1.0f, 64);
  });
  Reject("MTE2_V is missing", [](Fixture& f) {
    DataCopy(f.x, f.global, 64);
    Adds(f.y, f.x, 1.0f, 64);
  });
  Reject("DataCopy (MTE3) reads what Duplicate (V) wrote", [](Fixture& f) {
    Duplicate(f.x, 1.0f, 64);
    DataCopy(f.global, f.x, 64);
  });
  Reject("Duplicate (V) overwrites what DataCopy (MTE3) reads", [](Fixture& f) {
    Duplicate(f.x, 1.0f, 64);
    SetFlag<HardEvent::V_MTE3>(EVENT_ID0);
    WaitFlag<HardEvent::V_MTE3>(EVENT_ID0);
    DataCopy(f.global, f.x, 64);
    PipeBarrier<PIPE_V>();
    Duplicate(f.x, 2.0f, 64);
  });
  Reject("DataCopy (MTE2) overwrites what Adds (V) reads", [](Fixture& f) {
    Duplicate(f.x, 1.0f, 64);
    PipeBarrier<PIPE_ALL>();
    Adds(f.y, f.x, 1.0f, 64);
    DataCopy(f.x, f.global, 64);
  });
  Reject("DataCopy (MTE2) overwrites what DataCopy (MTE2) wrote", [](Fixture& f) {
    DataCopy(f.x, f.global, 64);
    DataCopy(f.x, f.global, 64);
  });
  Reject("LocalTensor::GetValue (S) reads what Duplicate (V) wrote", [](Fixture& f) {
    Duplicate(f.x, 1.0f, 64);
    f.x.GetValue(0);
  });
  Reject("Adds (V) reads what LocalTensor::SetValue (S) wrote", [](Fixture& f) {
    f.x.SetValue(0, 1.0f);
    Adds(f.y, f.x, 1.0f, 1);
  });
  Reject("PipeBarrier<PIPE_V> is missing", [](Fixture& f) {
    Duplicate(f.x, 1.0f, 64);
    Adds(f.y, f.x, 1.0f, 64);
  });
}

TEST_F(RejectionTest, FlagsOrderThePipesTheyName) {
  ExpectNoErrors(ErrorsOf([&] {
    Fixture f(memory_.data());
    DataCopy(f.x, f.global, 64);
    SetFlag<HardEvent::MTE2_V>(EVENT_ID3);
    WaitFlag<HardEvent::MTE2_V>(EVENT_ID3);
    Adds(f.y, f.x, 1.0f, 64);
    SetFlag<HardEvent::V_MTE3>(EVENT_ID3);
    WaitFlag<HardEvent::V_MTE3>(EVENT_ID3);
    DataCopy(f.global, f.y, 64);
    SetFlag<HardEvent::V_S>(EVENT_ID0);
    WaitFlag<HardEvent::V_S>(EVENT_ID0);
    EXPECT_EQ(f.y.GetValue(0), memory_[0]);
  }));
  // A flag says nothing of what its pipe does after it.
  Reject("MTE2_V is missing", [](Fixture& f) {
    DataCopy(f.x, f.global, 64);
    SetFlag<HardEvent::MTE2_V>(EVENT_ID0);
    DataCopy(f.y, f.global, 64);
    WaitFlag<HardEvent::MTE2_V>(EVENT_ID0);
    Adds(f.x, f.y, 1.0f, 64);
  });
}

TEST_F(RejectionTest, VectorOrderIsTheCompilersIfAskedFor) {
  LaunchOptions options;
  options.strict_vector_order = false;
  const Report report = Launch(options, 1, [&] {
    Fixture f(memory_.data());
    Duplicate(f.x, 1.0f, 64);
    Adds(f.y, f.x, 1.0f, 64);
  });
  ExpectNoErrors(report.errors);
}

TEST_F(RejectionTest, Flags) {
  Reject("WaitFlag<MTE2_V>(2) without a SetFlag: it would hang",
         [](Fixture&) { WaitFlag<HardEvent::MTE2_V>(EVENT_ID2); });
  Reject("SetFlag<V_MTE3>(1) without a WaitFlag",
         [](Fixture&) { SetFlag<HardEvent::V_MTE3>(EVENT_ID1); });
  Reject("is set already", [](Fixture&) {
    SetFlag<HardEvent::V_MTE3>(EVENT_ID1);
    SetFlag<HardEvent::V_MTE3>(EVENT_ID1);
  });
  Reject("event id out of range", [](Fixture&) { SetFlag<HardEvent::V_MTE3>(8); });
  Reject("a queue that uses the same id", [](Fixture& f) {
    InQueue queue;
    f.pipe.InitBuffer(queue, 1, 256);
    const LocalTensor<float> x = queue.AllocTensor<float>();
    DataCopy(x, f.global, 64);
    queue.EnQue(x);
    SetFlag<HardEvent::MTE2_V>(EVENT_ID0);
  });
}

TEST_F(RejectionTest, Queues) {
  const auto reject = [&](const std::string& message,
                          const std::function<void(Fixture&, InQueue&)>& kernel) {
    Reject(message, [&](Fixture& f) {
      InQueue queue;
      f.pipe.InitBuffer(queue, 2, 256);
      kernel(f, queue);
    });
  };
  reject("DeQue of an empty queue", [](Fixture&, InQueue& q) { q.DeQue<float>(); });
  reject("FreeTensor of a tensor that is free", [](Fixture&, InQueue& q) {
    const LocalTensor<float> x = q.AllocTensor<float>();
    q.FreeTensor(x);
    q.FreeTensor(x);
  });
  reject("FreeTensor of a tensor that is queued", [](Fixture&, InQueue& q) {
    const LocalTensor<float> x = q.AllocTensor<float>();
    q.EnQue(x);
    q.FreeTensor(x);
  });
  reject("all buffers of the queue are in use", [](Fixture&, InQueue& q) {
    for (int i = 0; i < 3; ++i) q.AllocTensor<float>();
  });
  reject("EnQue of a tensor that this queue did not allocate",
         [](Fixture& f, InQueue& q) { q.EnQue(f.x); });
  reject("EnQue without a DeQue at the end of the kernel",
         [](Fixture&, InQueue& q) { q.EnQue(q.AllocTensor<float>()); });
  reject("which nobody wrote", [](Fixture& f, InQueue& q) {
    // A buffer that comes again holds nothing.
    for (int i = 0; i < 3; ++i) {
      LocalTensor<float> x = q.AllocTensor<float>();
      if (i < 2) DataCopy(x, f.global, 64);
      q.EnQue(x);
      x = q.DeQue<float>();
      Adds(f.y[static_cast<uint32_t>(i) * 64], x, 1.0f, 64);
      q.FreeTensor(x);
    }
  });
}

TEST_F(RejectionTest, BoundsAndAlignment) {
  Reject("InitBuffer: more than 64 buffers", [](Fixture& f) {
    for (int i = 0; i < 63; ++i) {
      TBuf<> small;
      f.pipe.InitBuffer(small, 32);
    }
  });
  Reject("DataCopyPad: a tensor of VECCALC, it must be of VECIN or VECOUT", [](Fixture& f) {
    TBuf<> buffer;
    f.pipe.InitBuffer(buffer, 32);
    DataCopyPad(buffer.Get<float>(), f.global, DataCopyExtParams(1, 20, 0, 0, 0),
                DataCopyPadExtParams<float>(false, 0, 0, 0));
  });
  Reject("DataCopyPad: a tensor of VECCALC, it must be of VECIN or VECOUT", [](Fixture& f) {
    TBuf<> buffer;
    f.pipe.InitBuffer(buffer, 32);
    DataCopyPad(f.global, buffer.Get<float>(), DataCopyExtParams(1, 20, 0, 0, 0));
  });
  Reject("Sort32: dst is not aligned to 256 bytes, its address is 32",
         [](Fixture& f) { Sort32(f.x[8], f.y, f.y.ReinterpretCast<uint32_t>(), 1); });
  Reject("Sort32: src0 is not aligned to 128 bytes",
         [](Fixture& f) { Sort32(f.x, f.y[8], f.y.ReinterpretCast<uint32_t>(), 1); });
  Reject("Sort32: src1 is not aligned to 128 bytes",
         [](Fixture& f) { Sort32(f.x, f.y, f.y[8].ReinterpretCast<uint32_t>(), 1); });
  Reject("MrgSort: dst and src overlap", [](Fixture& f) {
    Duplicate(f.x, 1.0f, 256);
    PipeBarrier<PIPE_V>();
    const uint16_t lengths[4] = {8, 8, 0, 0};
    MrgSort(f.x, MrgSortSrcList<float>(f.x, f.x[16], f.x, f.x), MrgSort4Info(lengths, false, 3, 1));
  });
  Reject("the unified buffer is full: 2048 of 196608 bytes are taken", [](Fixture& f) {
    TBuf<> large;
    f.pipe.InitBuffer(large, 192 * 1024 - 1024);
  });
  Reject("dst is not aligned to 32 bytes, its address is 4",
         [](Fixture& f) { DataCopy(f.x[1], f.global, 8); });
  Reject("28 bytes are not whole blocks", [](Fixture& f) { DataCopy(f.x, f.global, 7); });
  Reject("byte 255 is past the end of a global tensor of 224 bytes",
         [](Fixture& f) { DataCopy(f.x, f.global[200], 64); });
  Reject("1088 bytes in a tensor of 1024", [this](Fixture& f) {
    f.global.SetGlobalBuffer(memory_.data());
    DataCopy(f.x, f.global, 272);
  });
  Reject("blockCount is 4096", [](Fixture& f) {
    DataCopyPad(f.x, f.global, DataCopyExtParams(4096, 4, 0, 0, 0),
                DataCopyPadExtParams<float>(false, 0, 0, 0));
  });
  Reject("dst reaches byte 1279 of a tensor of 1024 bytes",
         [](Fixture& f) { Duplicate(f.x, 1.0f, 320); });
  Reject("LocalTensor::GetValue: 256 in a tensor of 256 elements",
         [](Fixture& f) { f.x.GetValue(256); });
  Reject("Adds: dst is not aligned", [](Fixture& f) {
    Duplicate(f.x, 1.0f, 64);
    PipeBarrier<PIPE_V>();
    Adds(f.y[1], f.x, 1.0f, 8);
  });
}

TEST_F(RejectionTest, StaleDataCache) {
  Reject("GlobalTensor::GetValue: the data cache may have what the memory held before the launch",
         [](Fixture& f) { f.global.GetValue(0); });
}

TEST_F(RejectionTest, MasksAndRepeats) {
  Reject("mask is 65, it must be 1 to 64",
         [](Fixture& f) { Add(f.x, f.y, f.y, 65, 1, BinaryRepeatParams()); });
  Reject("mask is 0", [](Fixture& f) { Add(f.x, f.y, f.y, uint64_t{0}, 1, BinaryRepeatParams()); });
  Reject("256 repeats, there may be 0 to 255",
         [](Fixture& f) { Add(f.x, f.y, f.y, 64, 256, BinaryRepeatParams()); });
  Reject("count is 0", [](Fixture& f) { Add(f.x, f.y, f.y, 0); });
  Reject("a repeat reads what an earlier one wrote, through src", [](Fixture& f) {
    Duplicate(f.x, 1.0f, 256);
    PipeBarrier<PIPE_V>();
    Adds(f.x[64], f.x, 1.0f, 192);
  });
  Reject("dst and src overlap in part", [](Fixture& f) {
    Duplicate(f.x, 1.0f, 256);
    PipeBarrier<PIPE_V>();
    Adds(f.x[8], f.x, 1.0f, 64);
  });
  // Documented: sums over repeats, through the second source.
  ExpectNoErrors(ErrorsOf([&] {
    Fixture f(memory_.data());
    Duplicate(f.x, 1.0f, 256);
    Duplicate(f.y, 1.0f, 64);
    PipeBarrier<PIPE_V>();
    Add(f.y, f.x, f.y, 64, 4, BinaryRepeatParams(1, 1, 1, 0, 8, 0));
    EXPECT_EQ(Values(f.y, 1)[0], 5.0f);
  }));
}

TEST_F(RejectionTest, UndefinedBytes) {
  Reject("Adds reads byte 256 of the unified buffer, which nobody wrote", [](Fixture& f) {
    Duplicate(f.x, 1.0f, 64);
    PipeBarrier<PIPE_V>();
    Adds(f.y, f.x, 1.0f, 72);
  });
  Reject("DataCopy reads byte 0 of the unified buffer, which nobody wrote",
         [](Fixture& f) { DataCopy(f.global, f.x, 64); });
  // What lies behind a row that does not fill its last block.
  Reject("reads byte 20 of the unified buffer", [](Fixture& f) {
    DataCopyPad(f.x, f.global, DataCopyExtParams(1, 20, 0, 0, 0),
                DataCopyPadExtParams<float>(false, 0, 0, 0));
    PipeBarrier<PIPE_ALL>();
    Adds(f.y, f.x, 1.0f, 8);
  });
  // It may be moved, and stays undefined.
  Reject("Adds reads byte 1024", [](Fixture& f) {
    DataCopy(f.y, f.x, 8);
    PipeBarrier<PIPE_V>();
    Adds(f.x, f.y, 1.0f, 8);
  });
}

TEST_F(RejectionTest, RacesOfCores) {
  const auto writes = [&](uint64_t offset, float value = 0.0f) {
    Fixture f(memory_.data());
    Duplicate(f.x, value != 0.0f ? value : static_cast<float>(GetBlockIdx() + 1), 8);
    PipeBarrier<PIPE_ALL>();
    DataCopyPad(f.global[offset], f.x, DataCopyExtParams(1, 8, 0, 0, 0));
  };
  ExpectError("core 0 writes global memory that core 1 writes", [&] { writes(4); }, 2);
  ExpectError(
      "writes global memory that core", [&] { writes(static_cast<uint64_t>(GetBlockIdx())); }, 2);
  ExpectNoErrors(ErrorsOf([&] { writes(2 * static_cast<uint64_t>(GetBlockIdx())); }, 8));
  // The same bytes, whichever core comes first, and whatever the memory held.
  for (int i = 0; i < 2; ++i) ExpectNoErrors(ErrorsOf([&] { writes(20, 5.0f); }, 3));
  ExpectError(
      "core 0 writes global memory that core 1 writes",
      [&] { writes(20, GetBlockIdx() == 0 ? 5.0f : 6.0f); }, 2);
  ExpectError(
      "core 1 writes global memory that core 0 reads",
      [&] {
        if (GetBlockIdx() == 1) return writes(40);
        Fixture f(memory_.data());
        DataCopy(f.x, f.global, 64);
      },
      2);
}

TEST_F(RejectionTest, AnErrorEndsItsCoreOnly) {
  const Report report = Launch(3, [&] {
    Fixture f(memory_.data());
    Check(GetBlockIdx() != 1, "only this one");
    DataCopy(f.x, f.global, 64);
  });
  ASSERT_EQ(report.errors.size(), 1u);
  EXPECT_EQ(report.errors[0], "core 1: only this one");
  EXPECT_EQ(report.cores[2].copies_in, 1);
}

}  // namespace
}  // namespace ascend_emulator
