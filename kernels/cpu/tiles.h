// The blocks of a ragged batch cut into tiles, so that one long request keeps every thread busy and
// a thousand short ones cost no thousand hand-overs.

#ifndef SELECT_ATTN_OPS_CPU_TILES_H_
#define SELECT_ATTN_OPS_CPU_TILES_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/parallel.h"
#include "select_attn_ops/runtime.h"

namespace select_attn::cpu {

// How many of `count` blocks of `block_bytes` bytes each a thread takes at a time: as many as it
// can, because every tile starts a stream that the hardware has to notice first, and few enough
// that the last ones to finish leave no thread idle for long.
inline int64_t BlocksPerTile(int64_t count, int64_t block_bytes) {
  constexpr int64_t kMinTileBytes = int64_t{64} << 10;
  constexpr int64_t kMaxTileBytes = int64_t{1} << 20;
  constexpr int64_t kTilesPerThread = 16;
  const int64_t shortest = std::max<int64_t>(kMinTileBytes / block_bytes, 1);
  const int64_t longest = std::max<int64_t>(kMaxTileBytes / block_bytes, 1);
  return std::clamp(count / (kTilesPerThread * NumThreads()), shortest, longest);
}

class Tiles {
 public:
  // Request b has the blocks [0, num_blocks(b)), of `block_bytes` bytes each.
  template <typename F>
  Tiles(int64_t batch, int64_t block_bytes, F&& num_blocks) : first_(batch + 1, 0) {
    int64_t total = 0;
    for (int64_t b = 0; b < batch; ++b) {
      num_blocks_.push_back(num_blocks(b));
      total += num_blocks_.back();
    }
    tile_ = BlocksPerTile(total, block_bytes);
    for (int64_t b = 0; b < batch; ++b) {
      first_[b + 1] = first_[b] + (num_blocks_[b] + tile_ - 1) / tile_;
    }
  }

  // Tiles of request b.
  int64_t count(int64_t b) const { return first_[b + 1] - first_[b]; }

  // Blocks [begin, end) of request b.
  struct Tile {
    int64_t b;
    int64_t begin;
    int64_t end;
  };

  // The tiles that a thread takes, one after the other.
  class Queue {
   public:
    Queue(const Tiles& tiles, RangeQueue& numbers) : tiles_(tiles), numbers_(numbers) {}

    // As RangeQueue::Take.
    bool Take(Tile& tile) {
      Range number;
      if (!numbers_.Take(number)) return false;
      tile = tiles_.At(number.begin);
      return true;
    }

   private:
    const Tiles& tiles_;
    RangeQueue& numbers_;
  };

  // Calls fn(queue) as cpu::ParallelTake does, with a Queue of tiles that cover the blocks of every
  // request.
  template <typename F>
  void ParallelTake(F&& fn) const {
    cpu::ParallelTake(first_.back(), 1, [&](RangeQueue& numbers) {
      Queue queue(*this, numbers);
      fn(queue);
    });
  }

 private:
  Tile At(int64_t number) const {
    const int64_t b = std::upper_bound(first_.begin(), first_.end(), number) - first_.begin() - 1;
    const int64_t begin = (number - first_[b]) * tile_;
    return {b, begin, std::min(begin + tile_, num_blocks_[b])};
  }

  int64_t tile_;                     // blocks per tile
  std::vector<int64_t> first_;       // [batch + 1], number of each request's first tile
  std::vector<int64_t> num_blocks_;  // [batch]
};

}  // namespace select_attn::cpu

#endif  // SELECT_ATTN_OPS_CPU_TILES_H_
