// Work that is taken before its turn: everything once, in order, and no further ahead than asked.

#include "cpu/upcoming.h"

#include <algorithm>
#include <cstdint>

#include "gtest/gtest.h"

namespace select_attn::cpu {
namespace {

TEST(Upcoming, GivesEverythingInOrderAndKnowsWhatComes) {
  for (int64_t count = 0; count <= 40; ++count) {
    for (int64_t ahead = -1; ahead <= 20; ++ahead) {
      const int64_t known_ahead = std::clamp<int64_t>(ahead, 1, Upcoming<int64_t>::kMostAhead);
      Upcoming<int64_t> upcoming(ahead);
      int64_t taken = 0;
      int64_t refused = 0;
      const auto take = [&](int64_t& item) {
        if (taken == count) {
          ++refused;
          return false;
        }
        item = taken++;
        return true;
      };
      int64_t now = 0;
      for (; upcoming.Fill(take); upcoming.Advance(), ++now) {
        ASSERT_EQ(taken, std::min(now + known_ahead + 1, count));
        for (int64_t n = 0; n <= known_ahead + 2; ++n) {
          ASSERT_EQ(upcoming[n], std::min(now + n, taken - 1)) << "of " << count;
        }
      }
      EXPECT_EQ(now, count);
      EXPECT_EQ(refused, 1);  // a queue is not asked again
    }
  }
}

}  // namespace
}  // namespace select_attn::cpu
