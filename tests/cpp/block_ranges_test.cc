#include "core/block_ranges.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "core/rank_key.h"

namespace select_attn {
namespace {

TEST(NumKvBlocksTest, RoundsUpWithoutOverflow) {
  EXPECT_EQ(NumKvBlocks(0, 16), 0);
  EXPECT_EQ(NumKvBlocks(1, 16), 1);
  EXPECT_EQ(NumKvBlocks(16, 16), 1);
  EXPECT_EQ(NumKvBlocks(17, 16), 2);
  EXPECT_EQ(NumKvBlocks(std::numeric_limits<int32_t>::max(), std::numeric_limits<int64_t>::max()),
            1);
}

// The ranking spelled out: what is listed before any score is looked at, and what is scored.
std::vector<int64_t> Forced(const RankedBlocks& ranked) {
  std::vector<int64_t> blocks;
  for (int64_t i = 0; i < ranked.num_forced(); ++i) blocks.push_back(ranked.Forced(i));
  return blocks;
}

TEST(RankBlocksTest, WithoutMetadataLengthEverythingIsScored) {
  const RankedBlocks ranked = RankBlocks(40, -1, 16);
  EXPECT_EQ(ranked.scored_begin, 0);
  EXPECT_EQ(ranked.scored_end, 3);
  EXPECT_TRUE(Forced(ranked).empty());
}

TEST(RankBlocksTest, WindowIsWhatLacksCompleteMetadataNewestFirstThenTheSink) {
  EXPECT_EQ(Forced(RankBlocks(40, 40, 16)), (std::vector<int64_t>{2, 0}));
  EXPECT_EQ(Forced(RankBlocks(48, 48, 16)), (std::vector<int64_t>{0}));  // no partial block
  EXPECT_EQ(Forced(RankBlocks(49, 48, 16)), (std::vector<int64_t>{3, 0}));
  EXPECT_EQ(Forced(RankBlocks(49, 47, 16)), (std::vector<int64_t>{3, 2, 0}));
  const RankedBlocks ranked = RankBlocks(49, 47, 16);
  EXPECT_EQ(ranked.scored_begin, 1);
  EXPECT_EQ(ranked.scored_end, 2);
}

TEST(RankBlocksTest, ASinkInTheWindowIsListedOnce) {
  EXPECT_EQ(Forced(RankBlocks(40, 15, 16)), (std::vector<int64_t>{2, 1, 0}));
  EXPECT_EQ(Forced(RankBlocks(40, 0, 16)), (std::vector<int64_t>{2, 1, 0}));
  EXPECT_EQ(RankBlocks(40, 15, 16).num_scored(), 0);
  EXPECT_EQ(Forced(RankBlocks(16, 16, 16)), (std::vector<int64_t>{0}));
  EXPECT_TRUE(Forced(RankBlocks(0, 0, 16)).empty());
}

TEST(RankKeyTest, OrdersScoresThenNumbers) {
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float denormal = std::numeric_limits<float>::denorm_min();
  const std::vector<float> increasing = {-inf,     -1e30f, -1.0f, -denormal, 0.0f,
                                         denormal, 1.0f,   1e30f, inf,       nan};
  for (size_t i = 1; i < increasing.size(); ++i) {
    EXPECT_LT(ScoreKey(increasing[i - 1]), ScoreKey(increasing[i])) << i;
  }
  EXPECT_EQ(ScoreKey(-0.0f), ScoreKey(0.0f));
  EXPECT_EQ(ScoreKey(std::copysign(nan, -1.0f)), ScoreKey(nan));
  EXPECT_GT(ScoreKey(-inf), 0u);

  EXPECT_GT(RankKey(ScoreKey(2.0f), 7), RankKey(ScoreKey(1.0f), 3));
  EXPECT_GT(RankKey(ScoreKey(1.0f), 3), RankKey(ScoreKey(1.0f), 4));
  for (const int64_t block : {int64_t{0}, int64_t{5}, int64_t{0x7FFFFFFF}}) {
    EXPECT_EQ(BlockOfRankKey(RankKey(ScoreKey(-3.5f), block)), block);
  }
}

}  // namespace
}  // namespace select_attn
