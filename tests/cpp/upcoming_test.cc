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
      const auto fill = [&] {
        while (upcoming.wants_more()) {
          if (taken < count) {
            upcoming.Push(taken++);
          } else {
            upcoming.End();
          }
        }
      };
      int64_t now = 0;
      for (fill(); !upcoming.empty(); upcoming.Advance(), fill(), ++now) {
        ASSERT_EQ(taken, std::min(now + known_ahead + 1, count));
        for (int64_t n = 0; n <= known_ahead + 2; ++n) {
          ASSERT_EQ(upcoming[n], std::min(now + n, taken - 1)) << "of " << count;
        }
      }
      EXPECT_EQ(now, count);
    }
  }
}

}  // namespace
}  // namespace select_attn::cpu
