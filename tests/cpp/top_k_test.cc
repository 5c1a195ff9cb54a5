// The top-k against a full sort, on every SIMD target.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "top_k_test.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// After foreach_target.h
#include "cpu/top_k-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace select_attn::cpu {
namespace HWY_NAMESPACE {
namespace {

std::vector<int32_t> Select(const std::vector<float>& scores, int64_t k, int64_t first) {
  TopK top_k;
  std::vector<int32_t> out;
  for (int round = 0; round < 2; ++round) {  // a second use starts over
    out.assign(static_cast<size_t>(k), -9);
    const auto count = static_cast<int64_t>(scores.size());
    out.resize(static_cast<size_t>(top_k.Select(scores.data(), count, first, k, out.data())));
  }
  return out;
}

}  // namespace
// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace select_attn::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "select_attn_ops/runtime.h"

namespace select_attn::cpu {
namespace {

HWY_EXPORT(Select);

// The order in words of its own: NaN first, then by decreasing score, equal scores by number.
std::vector<int32_t> Sorted(const std::vector<float>& scores, int64_t k, int64_t first) {
  std::vector<int32_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    const float x = scores[static_cast<size_t>(a)];
    const float y = scores[static_cast<size_t>(b)];
    if (std::isnan(x) || std::isnan(y)) return std::isnan(x) && !std::isnan(y);
    return x > y;
  });
  order.resize(std::min(scores.size(), static_cast<size_t>(k)));
  for (int32_t& block : order) block += static_cast<int32_t>(first);
  return order;
}

class TopKTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { SetSimdTarget(GetParam()); }
  void TearDown() override { SetSimdTarget(""); }

  void ExpectSorted(const std::vector<float>& scores) {
    for (const int64_t k : {1, 2, 8, 63, 300, 5000}) {
      EXPECT_EQ(HWY_DYNAMIC_DISPATCH(Select)(scores, k, 3), Sorted(scores, k, 3))
          << scores.size() << " scores, k = " << k;
    }
  }
};

TEST_P(TopKTest, RandomScores) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (const size_t size : {0, 1, 15, 16, 17, 255, 1000, 9000}) {
    std::vector<float> scores(size);
    for (float& score : scores) score = normal(random);
    ExpectSorted(scores);
  }
}

TEST_P(TopKTest, Ties) {
  std::mt19937 random(2);
  std::vector<float> scores(4000);
  for (float& score : scores) score = static_cast<float>(random() % 5) - 2.0f;
  ExpectSorted(scores);
  ExpectSorted(std::vector<float>(4000, 1.0f));
}

TEST_P(TopKTest, SortedScores) {  // a few groups hold all the best ones
  std::vector<float> scores(5000);
  std::iota(scores.begin(), scores.end(), -100.0f);
  ExpectSorted(scores);
  std::reverse(scores.begin(), scores.end());
  ExpectSorted(scores);
}

TEST_P(TopKTest, SpecialValues) {
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> values = {0.0f,
                                     -0.0f,
                                     inf,
                                     -inf,
                                     nan,
                                     -nan,
                                     1.0f,
                                     -1.0f,
                                     std::numeric_limits<float>::denorm_min(),
                                     std::numeric_limits<float>::max()};
  std::mt19937 random(3);
  std::vector<float> scores(3000);
  for (float& score : scores) score = values[random() % values.size()];
  ExpectSorted(scores);
  ExpectSorted(std::vector<float>(700, -inf));
  ExpectSorted(std::vector<float>(700, nan));
}

// NaN comes first, but must not keep others out, wherever it lies.
TEST_P(TopKTest, FewerNaNThanAreSelected) {
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  for (const size_t num_nan : {1, 5, 7, 30, 50, 250}) {
    for (int draw = 0; draw < 8; ++draw) {
      std::vector<float> scores(3072);  // whole vectors
      for (float& score : scores) score = normal(random);
      std::fill_n(scores.begin(), num_nan, std::nanf(""));
      std::shuffle(scores.begin(), scores.end() - 1, random);
      std::swap(scores.back(), *std::find_if(scores.begin(), scores.end(),
                                             [](float score) { return std::isnan(score); }));
      ExpectSorted(scores);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, TopKTest, testing::ValuesIn(SimdTargets()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace select_attn::cpu

#endif  // HWY_ONCE
