#include "cpu/pool_order.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <mutex>
#include <numeric>
#include <random>
#include <tuple>
#include <vector>

#include "select_attn_ops/runtime.h"

namespace select_attn::cpu {
namespace {

using Visit = std::tuple<int64_t, int64_t, int64_t>;  // place, request, number

struct Batch {
  std::vector<BlockRange> ranges;
  std::vector<std::vector<int32_t>> tables;

  PoolOrder Order() const {
    return PoolOrder(
        static_cast<int64_t>(ranges.size()),
        [this](int64_t b) { return ranges[static_cast<size_t>(b)]; },
        [this](int64_t b) { return tables[static_cast<size_t>(b)].data(); });
  }
};

std::vector<int32_t> Shuffled(int32_t first, int32_t count, unsigned seed) {
  std::vector<int32_t> numbers(static_cast<size_t>(count));
  std::iota(numbers.begin(), numbers.end(), first);
  std::shuffle(numbers.begin(), numbers.end(), std::mt19937(seed));
  return numbers;
}

// Every block once, and within a turn in the order of the pool.
void ExpectInPoolOrder(const Batch& batch) {
  std::vector<Visit> expected;
  for (size_t b = 0; b < batch.ranges.size(); ++b) {
    for (int64_t j = batch.ranges[b].begin; j < batch.ranges[b].end; ++j) {
      expected.emplace_back(batch.tables[b][static_cast<size_t>(j)], b, j);
    }
  }
  std::sort(expected.begin(), expected.end());
  const PoolOrder order = batch.Order();
  ASSERT_TRUE(order.pays());
  for (const int threads : {1, 3}) {
    SetNumThreads(threads);
    for (const int64_t grain : {1, 7, 100000}) {
      std::mutex mutex;
      std::vector<Visit> visits;
      order.ParallelForEach(grain, [&](const std::vector<PoolOrder::Block>& blocks) {
        const std::lock_guard<std::mutex> lock(mutex);
        EXPECT_TRUE(std::is_sorted(blocks.begin(), blocks.end(),
                                   [](const auto& a, const auto& b) { return a.place < b.place; }));
        for (const auto& block : blocks) {
          visits.emplace_back(block.place, block.request, block.number);
        }
      });
      std::sort(visits.begin(), visits.end());
      EXPECT_EQ(visits, expected);
    }
  }
}

TEST(PoolOrderTest, OneRequest) { ExpectInPoolOrder({{{0, 1000}}, {Shuffled(0, 1000, 1)}}); }

TEST(PoolOrderTest, PartOfATable) { ExpectInPoolOrder({{{300, 900}}, {Shuffled(5000, 1000, 2)}}); }

TEST(PoolOrderTest, RequestsWithoutBlocks) {
  ExpectInPoolOrder({{{0, 0}, {3, 3}, {0, 400}, {2, 1}, {10, 300}, {0, 0}},
                     {{}, {}, Shuffled(0, 400, 3), {}, Shuffled(400, 300, 4), {}}});
}

TEST(PoolOrderTest, SharedBlocks) {
  ExpectInPoolOrder({{{0, 400}, {0, 400}, {100, 400}},
                     {Shuffled(7, 400, 5), Shuffled(7, 400, 6), std::vector<int32_t>(400, 33)}});
}

TEST(PoolOrderTest, DoesNotPay) {
  const std::vector<int32_t> shuffled = Shuffled(0, 1000, 7);
  std::vector<int32_t> ascending = shuffled;
  std::sort(ascending.begin(), ascending.end());
  std::vector<int32_t> sparse = shuffled;
  for (int32_t& number : sparse) number *= 1000;
  EXPECT_FALSE((Batch{{}, {}}).Order().pays());
  EXPECT_FALSE((Batch{{{0, 0}}, {{}}}).Order().pays());
  EXPECT_FALSE((Batch{{{0, 30}}, {shuffled}}).Order().pays()) << "few blocks";
  EXPECT_FALSE((Batch{{{0, 1000}}, {ascending}}).Order().pays()) << "in order already";
  EXPECT_FALSE((Batch{{{0, 1000}}, {sparse}}).Order().pays()) << "far apart";
}

}  // namespace
}  // namespace select_attn::cpu
