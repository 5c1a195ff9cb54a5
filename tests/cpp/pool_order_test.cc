#include "cpu/pool_order.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <mutex>
#include <numeric>
#include <random>
#include <tuple>
#include <vector>

#include "cpu/prefetch.h"
#include "cpu/tiles.h"
#include "select_attn_ops/runtime.h"

namespace select_attn::cpu {
namespace {

using Visit = std::tuple<int64_t, int64_t, int64_t>;  // place, request, number

struct Batch {
  std::vector<BlockRange> ranges;
  std::vector<std::vector<int32_t>> tables;

  int64_t Place(size_t b, int64_t j) const { return tables[b][static_cast<size_t>(j)]; }

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

// What a queue gives of a range: the parts of a run in the order of the pool, a block of each in
// turn.
void ExpectPartsInTurn(const std::vector<Visit>& range, const std::vector<Visit>& in_pool) {
  std::vector<Visit> run;
  for (size_t part = 0; part < kPlacesInTurn; ++part) {
    for (size_t i = part; i < range.size(); i += kPlacesInTurn) run.push_back(range[i]);
  }
  const auto begin = std::lower_bound(in_pool.begin(), in_pool.end(), run.front());
  ASSERT_LE(static_cast<std::ptrdiff_t>(run.size()), in_pool.end() - begin);
  EXPECT_TRUE(std::equal(run.begin(), run.end(), begin));
}

// Every block once, and range by range in the order of the pool.
void ExpectInPoolOrder(const Batch& batch) {
  std::vector<Visit> expected;
  for (size_t b = 0; b < batch.ranges.size(); ++b) {
    for (int64_t j = batch.ranges[b].begin; j < batch.ranges[b].end; ++j) {
      expected.emplace_back(batch.Place(b, j), b, j);
    }
  }
  std::sort(expected.begin(), expected.end());
  const PoolOrder order = batch.Order();
  ASSERT_TRUE(order.pays());
  for (const int threads : {1, 3}) {
    SetNumThreads(threads);
    for (const int64_t block_bytes : {1, 4096, 1 << 20}) {
      std::mutex mutex;
      std::vector<Visit> visits;
      order.ParallelTake(block_bytes, [&](PoolOrder::Queue& queue) {
        std::vector<Visit> share;
        for (PoolOrder::Block block; queue.Take(block);) {
          const auto b = static_cast<size_t>(block.request);
          share.emplace_back(batch.Place(b, block.number), b, block.number);
        }
        const auto count = static_cast<int64_t>(expected.size());
        const auto size = static_cast<size_t>(BlocksPerTile(count, block_bytes));
        for (size_t i = 0; i < share.size(); i += size) {
          const auto range = share.begin() + static_cast<std::ptrdiff_t>(i);
          const size_t length = std::min(size, share.size() - i);
          ExpectPartsInTurn({range, range + static_cast<std::ptrdiff_t>(length)}, expected);
          EXPECT_TRUE(i == 0 || share[i - 1] < *range);
        }
        PoolOrder::Block none;
        EXPECT_FALSE(queue.Take(none));
        const std::lock_guard<std::mutex> lock(mutex);
        visits.insert(visits.end(), share.begin(), share.end());
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

TEST(PoolOrderTest, InOrderAlready) {
  std::vector<int32_t> ascending(1000);
  std::iota(ascending.begin(), ascending.end(), 3);
  Batch batch{{{0, 1000}}, {ascending}};
  EXPECT_FALSE(batch.Order().pays());
  batch = {{}, {}};  // many requests of one block, one behind the other
  for (int32_t b = 0; b < 1000; ++b) {
    batch.ranges.push_back({0, 1});
    batch.tables.push_back({b});
  }
  std::reverse(batch.tables.begin(), batch.tables.end());
  ExpectInPoolOrder(batch);
}

TEST(PoolOrderTest, JumpsButDoesNotPay) {
  const Batch few{{{0, 30}}, {Shuffled(0, 1000, 7)}};
  EXPECT_FALSE(few.Order().pays());
  Batch sparse{{{0, 1000}}, {Shuffled(0, 1000, 8)}};
  for (int32_t& number : sparse.tables[0]) number *= 1000;
  EXPECT_FALSE(sparse.Order().pays());
}

TEST(PoolOrderTest, Nothing) {
  for (const PoolOrder& order :
       {PoolOrder(), Batch{{}, {}}.Order(), Batch{{{0, 0}}, {{}}}.Order()}) {
    EXPECT_FALSE(order.pays());
  }
}

}  // namespace
}  // namespace select_attn::cpu
