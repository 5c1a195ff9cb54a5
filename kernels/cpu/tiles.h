// The blocks of a ragged batch cut into tiles, so that one long request keeps every thread busy and
// a thousand short ones cost no thousand hand-overs.

#ifndef SELECT_ATTN_OPS_CPU_TILES_H_
#define SELECT_ATTN_OPS_CPU_TILES_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/parallel.h"

namespace select_attn::cpu {

class Tiles {
 public:
  // Request b has the blocks [0, num_blocks(b)), of `block_bytes` bytes each.
  template <typename F>
  Tiles(int64_t batch, int64_t block_bytes, F&& num_blocks)
      : tile_(std::max<int64_t>(kTileBytes / block_bytes, 1)), first_(batch + 1, 0) {
    for (int64_t b = 0; b < batch; ++b) {
      first_[b + 1] = first_[b] + (num_blocks(b) + tile_ - 1) / tile_;
      num_blocks_.push_back(num_blocks(b));
    }
  }

  // Calls fn(b, begin, end) in parallel on tiles that cover the blocks of every request b.
  template <typename F>
  void ParallelForEach(F&& fn) const {
    ParallelFor(first_.back(), 1, [&](int64_t tile, int64_t end_tile) {
      for (; tile < end_tile; ++tile) {
        const int64_t b = std::upper_bound(first_.begin(), first_.end(), tile) - first_.begin() - 1;
        const int64_t begin = (tile - first_[b]) * tile_;
        fn(b, begin, std::min(begin + tile_, num_blocks_[b]));
      }
    });
  }

 private:
  // Long enough to stream, short enough that a few dozen tiles balance the threads.
  static constexpr int64_t kTileBytes = int64_t{64} << 10;

  int64_t tile_;                     // blocks per tile
  std::vector<int64_t> first_;       // [batch + 1], number of each request's first tile
  std::vector<int64_t> num_blocks_;  // [batch]
};

}  // namespace select_attn::cpu

#endif  // SELECT_ATTN_OPS_CPU_TILES_H_
