// The KV blocks of a batch in the order in which they lie in the pool. A table of blocks that were
// freed and taken again jumps about in memory; where the work on a block depends on no other, it
// may as well be done in the order in which memory is fast.

#ifndef SELECT_ATTN_OPS_CPU_POOL_ORDER_H_
#define SELECT_ATTN_OPS_CPU_POOL_ORDER_H_

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "core/block_ranges.h"
#include "cpu/parallel.h"
#include "cpu/prefetch.h"
#include "cpu/tiles.h"

namespace select_attn::cpu {

// Bytes of a block in one tensor up to which the order of the blocks makes a difference: a shorter
// one is over before the hardware has noticed that it is being read.
constexpr int64_t kShortBlockBytes = int64_t{64} << 10;

class PoolOrder {
 public:
  struct Block {
    int32_t request;
    int32_t number;  // within the request
  };

  // Of no blocks.
  PoolOrder() = default;

  // Request b has the KV blocks range(b), block j of them at place table(b)[j] of the pool.
  template <typename Range, typename Table>
  PoolOrder(int64_t batch, Range&& range, Table&& table) {
    const Places places = Survey(batch, range, table);
    if (!AreWorthSorting(batch, places)) return;
    std::vector<int32_t> next(static_cast<size_t>(places.end - places.begin));
    const auto for_each = [&](auto&& fn) {
      for (int64_t b = 0; b < batch; ++b) {
        const BlockRange numbers = range(b);
        const int32_t* in_pool = table(b);
        for (int64_t j = numbers.begin; j < numbers.end; ++j) {
          fn(b, j, static_cast<size_t>(in_pool[j] - places.begin));
        }
      }
    };
    for_each([&](int64_t /*b*/, int64_t /*j*/, size_t place) { ++next[place]; });
    std::exclusive_scan(next.begin(), next.end(), next.begin(), 0);
    blocks_.resize(static_cast<size_t>(places.blocks));
    for_each([&](int64_t b, int64_t j, size_t place) {
      blocks_[static_cast<size_t>(next[place]++)] = {static_cast<int32_t>(b),
                                                     static_cast<int32_t>(j)};
    });
  }

  // Whether the tables jump about in the pool, and its order is likely to be faster. If not, there
  // is nothing to go through.
  bool pays() const { return !blocks_.empty(); }

  // The blocks that a thread takes, range by range of the pool. Those of a range come from several
  // parts of it in turn.
  class Queue {
   public:
    Queue(const std::vector<Block>& blocks, RangeQueue& ranges)
        : blocks_(blocks), ranges_(ranges) {}

    // As RangeQueue::Take.
    bool Take(Block& block) {
      if (taken_ == range_.end - range_.begin) {
        if (!ranges_.Take(range_)) return false;
        taken_ = 0;
      }
      const int64_t size = range_.end - range_.begin;
      // The first size % kPlacesInTurn parts are a block longer than the others.
      const int64_t part = taken_ % kPlacesInTurn;
      const int64_t first = part * (size / kPlacesInTurn) + std::min(part, size % kPlacesInTurn);
      block = blocks_[static_cast<size_t>(range_.begin + first + taken_ / kPlacesInTurn)];
      ++taken_;
      return true;
    }

   private:
    const std::vector<Block>& blocks_;
    RangeQueue& ranges_;
    Range range_ = {0, 0};
    int64_t taken_ = 0;  // blocks of the range
  };

  // Calls fn(queue) as cpu::ParallelTake does, with a Queue of the blocks, of `block_bytes` bytes
  // each, of which a thread takes ranges in the order of the pool.
  template <typename F>
  void ParallelTake(int64_t block_bytes, F&& fn) const {
    const auto count = static_cast<int64_t>(blocks_.size());
    cpu::ParallelTake(count, BlocksPerTile(count, block_bytes), [&](RangeQueue& ranges) {
      Queue queue(blocks_, ranges);
      fn(queue);
    });
  }

 private:
  // What the tables say about a batch.
  struct Places {
    int64_t blocks = 0;
    int64_t jumps = 0;  // blocks that do not lie behind the one before them
    int64_t begin = std::numeric_limits<int64_t>::max();  // the part of the pool that has them all
    int64_t end = 0;
  };

  template <typename Range, typename Table>
  static Places Survey(int64_t batch, const Range& range, const Table& table) {
    Places places;
    int64_t expected = -1;
    for (int64_t b = 0; b < batch; ++b) {
      const BlockRange numbers = range(b);
      if (numbers.empty()) continue;
      places.blocks += numbers.end - numbers.begin;
      const int32_t* in_pool = table(b);
      for (int64_t j = numbers.begin; j < numbers.end; ++j) {
        const int64_t place = in_pool[j];
        places.begin = std::min(places.begin, place);
        places.end = std::max(places.end, place + 1);
        places.jumps += static_cast<int64_t>(place != expected);
        expected = place + 1;
      }
    }
    return places;
  }

  static bool AreWorthSorting(int64_t batch, const Places& places) {
    constexpr int64_t kFew = 256;
    // Beyond so many places per block, neighbours in the pool are not neighbours in memory either.
    constexpr int64_t kPlacesPerBlock = 4;
    constexpr int64_t kMany = std::numeric_limits<int32_t>::max();
    return places.jumps > places.blocks / 4 && places.blocks >= kFew &&
           std::max(places.blocks, batch) <= kMany &&
           places.end - places.begin <= kPlacesPerBlock * places.blocks;
  }

  std::vector<Block> blocks_;  // sorted by place
};

}  // namespace select_attn::cpu

#endif  // SELECT_ATTN_OPS_CPU_POOL_ORDER_H_
