#include "cpu/parallel.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cfenv>
#include <chrono>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/tiles.h"
#include "select_attn_ops/error.h"
#include "select_attn_ops/runtime.h"

namespace select_attn::cpu {
namespace {

class ParallelTest : public testing::TestWithParam<int> {
 protected:
  void SetUp() override { SetNumThreads(GetParam()); }
};

// Whether every item of [0, count) is seen once, in ranges of at most `grain`.
bool CoversOnce(int64_t count, int64_t grain) {
  std::vector<std::atomic<int>> seen(static_cast<size_t>(count));
  std::atomic<bool> fine{true};
  ParallelFor(count, grain, [&](int64_t begin, int64_t end) {
    if (begin >= end || end - begin > grain) fine = false;
    for (int64_t i = begin; i < end; ++i) ++seen[static_cast<size_t>(i)];
  });
  for (const std::atomic<int>& times : seen) {
    if (times != 1) fine = false;
  }
  return fine;
}

TEST_P(ParallelTest, SeesEveryItemOnce) {
  for (const int64_t count : {0, 1, 2, 7, 1000}) {
    for (const int64_t grain : {1, 3, 1000, 5000}) {
      EXPECT_TRUE(CoversOnce(count, grain)) << count << " by " << grain;
    }
  }
}

TEST_P(ParallelTest, ThreadsMayTakeARangeBeforeTheyAreThroughWithTheLast) {
  std::vector<std::atomic<int>> seen(1000);
  ParallelTake(1000, 7, [&](RangeQueue& queue) {
    Range range;
    for (bool more = queue.Take(range); more;) {
      const Range current = range;
      more = queue.Take(range);
      for (int64_t i = current.begin; i < current.end; ++i) ++seen[static_cast<size_t>(i)];
    }
    EXPECT_FALSE(queue.Take(range));
  });
  for (const std::atomic<int>& times : seen) EXPECT_EQ(times, 1);
}

TEST_P(ParallelTest, ThrowsWhatTheWorkThrows) {
  std::atomic<int> calls{0};
  const auto work = [&](int64_t begin, int64_t) {
    ++calls;
    if (begin == 40) throw std::runtime_error("at 40");
    // Without this the others might be through with all of it before a slow throw is caught.
    if (begin > 40) std::this_thread::sleep_for(std::chrono::microseconds(50));
  };
  EXPECT_THROW(ParallelFor(100000, 1, work), std::runtime_error);
  EXPECT_LT(calls, 100000);
  EXPECT_TRUE(CoversOnce(100, 1));
}

TEST_P(ParallelTest, ServesSeveralCallersAtOnce) {
  std::atomic<bool> fine{true};
  std::vector<std::thread> callers;
  callers.reserve(4);
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&] {
      for (int round = 0; round < 50; ++round) {
        if (!CoversOnce(200, 7)) fine = false;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_TRUE(fine);
}

TEST_P(ParallelTest, WorksInAForkedChild) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "ThreadSanitizer does not follow threads into a forked child";
#endif
  ASSERT_TRUE(CoversOnce(1000, 1));
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) _exit(CoversOnce(1000, 1) ? 0 : 1);
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

TEST_P(ParallelTest, ComputesWithDefaultArithmeticAndLeavesTheCallersAlone) {
  const int before = std::fegetround();
  std::fesetround(FE_UPWARD);
  std::atomic<bool> fine{true};
  ParallelFor(64, 1, [&](int64_t, int64_t) {
    if (std::fegetround() != FE_TONEAREST) fine = false;
  });
  EXPECT_TRUE(fine);
  EXPECT_EQ(std::fegetround(), FE_UPWARD);
  std::fesetround(before);
}

TEST_P(ParallelTest, UsesNoMoreThreadsThanSet) {
  std::mutex mutex;
  std::set<std::thread::id> threads;
  ParallelFor(64, 1, [&](int64_t, int64_t) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    const std::lock_guard<std::mutex> lock(mutex);
    threads.insert(std::this_thread::get_id());
  });
  EXPECT_LE(static_cast<int>(threads.size()), GetParam());
  EXPECT_EQ(threads.count(std::this_thread::get_id()), 1u);
  EXPECT_EQ(threads.size() > 1, GetParam() > 1);
}

INSTANTIATE_TEST_SUITE_P(Threads, ParallelTest, testing::Values(1, 2, 5));

TEST(NumThreadsTest, RejectsWhatIsNoCount) {
  const int64_t before = NumThreads();
  for (const int64_t count : {int64_t{0}, int64_t{-1}, int64_t{65537}, int64_t{1} << 40}) {
    EXPECT_THROW(SetNumThreads(count), Error) << count;
  }
  EXPECT_EQ(NumThreads(), before);
}

TEST(TilesTest, AreEnoughToShareOutEvenly) {
  for (const int threads : {1, 3, 64}) {
    SetNumThreads(threads);
    for (const int64_t block_bytes : {4096, 1 << 20}) {
      EXPECT_GE(10000 / BlocksPerTile(10000, block_bytes), 4 * threads);
    }
  }
}

TEST(TilesTest, CoverEveryBlockOfEveryRequestOnce) {
  SetNumThreads(3);
  const std::vector<int64_t> num_blocks = {0, 1, 1000, 0, 0, 17, 64, 65, 0};
  for (const int64_t block_bytes : {int64_t{1}, int64_t{1024}, int64_t{1} << 20}) {
    std::vector<std::vector<std::atomic<int>>> seen;
    seen.reserve(num_blocks.size());
    for (const int64_t count : num_blocks) {
      seen.emplace_back(std::vector<std::atomic<int>>(static_cast<size_t>(count)));
    }
    const Tiles tiles(static_cast<int64_t>(num_blocks.size()), block_bytes,
                      [&](int64_t b) { return num_blocks[static_cast<size_t>(b)]; });
    tiles.ParallelTake([&](Tiles::Queue& queue) {
      for (Tiles::Tile tile; queue.Take(tile);) {
        for (int64_t j = tile.begin; j < tile.end; ++j) {
          ++seen[static_cast<size_t>(tile.b)][static_cast<size_t>(j)];
        }
      }
    });
    for (const auto& request : seen) {
      for (const std::atomic<int>& times : request) EXPECT_EQ(times, 1);
    }
  }
}

}  // namespace
}  // namespace select_attn::cpu
