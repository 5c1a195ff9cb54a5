// The KV blocks of a batch in the order in which they lie in the pool. A table of blocks that were
// freed and taken again jumps about in memory; where the work on a block depends on no other, it
// may as well be done in the order in which memory is fast.

#ifndef SELECT_ATTN_OPS_CPU_POOL_ORDER_H_
#define SELECT_ATTN_OPS_CPU_POOL_ORDER_H_

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/block_ranges.h"
#include "cpu/parallel.h"

namespace select_attn::cpu {

class PoolOrder {
 public:
  struct Block {
    int64_t request;
    int64_t number;  // within the request
    int64_t place;   // in the pool
  };

  // Request b has the KV blocks range(b), block j of them at table(b)[j] in the pool.
  template <typename Range, typename Table>
  PoolOrder(int64_t batch, Range&& range, Table&& table) {
    if (!Pays(batch, range, table)) return;
    first_.assign(static_cast<size_t>(end_ - begin_), -1);
    next_.reserve(static_cast<size_t>(count_));
    for (int64_t b = 0; b < batch; ++b) {
      const BlockRange blocks = range(b);
      origins_.push_back(static_cast<int64_t>(next_.size()));
      numbers_.push_back(blocks.begin);
      for (int64_t j = blocks.begin; j < blocks.end; ++j) {
        int32_t& first = first_[static_cast<size_t>(table(b)[j] - begin_)];
        next_.push_back(first);
        first = static_cast<int32_t>(next_.size() - 1);
      }
    }
  }

  // Whether the tables jump about in the pool.
  bool jumps() const { return jumps_; }

  // Whether they do, and the order of the pool is likely to be faster. If not, there is nothing to
  // go through.
  bool pays() const { return !next_.empty(); }

  // Calls fn(blocks) in parallel, with the blocks of `grain` places of the pool at a time, in the
  // order of the pool.
  template <typename F>
  void ParallelForEach(int64_t grain, F&& fn) const {
    ParallelFor(end_ - begin_, grain, [&](int64_t begin, int64_t end) {
      std::vector<Block> blocks;
      for (int64_t place = begin; place < end; ++place) {
        for (int32_t i = first_[static_cast<size_t>(place)]; i >= 0;
             i = next_[static_cast<size_t>(i)]) {
          const auto above = std::upper_bound(origins_.begin(), origins_.end(), i);
          const auto b = above - origins_.begin() - 1;
          blocks.push_back(
              {b, numbers_[static_cast<size_t>(b)] + i - *(above - 1), begin_ + place});
        }
      }
      fn(blocks);
    });
  }

 private:
  // Fewer blocks are not worth the sorting.
  static constexpr int64_t kFew = 256;

  // Beyond so many places per block, neighbours in the pool are not neighbours in memory either.
  static constexpr int64_t kPlacesPerBlock = 4;

  template <typename Range, typename Table>
  bool Pays(int64_t batch, const Range& range, const Table& table) {
    int64_t jumps = 0;
    int64_t lowest = std::numeric_limits<int64_t>::max();
    int64_t highest = 0;
    for (int64_t b = 0; b < batch; ++b) {
      const BlockRange blocks = range(b);
      if (blocks.empty()) continue;
      count_ += blocks.end - blocks.begin;
      const int32_t* numbers = table(b);
      int64_t expected = -1;
      for (int64_t j = blocks.begin; j < blocks.end; ++j) {
        const int64_t number = numbers[j];
        lowest = std::min(lowest, number);
        highest = std::max(highest, number);
        jumps += static_cast<int64_t>(number != expected);
        expected = number + 1;
      }
    }
    begin_ = std::min(lowest, highest);
    end_ = highest + 1;
    return count_ >= kFew && count_ <= std::numeric_limits<int32_t>::max() && jumps > count_ / 4 &&
           end_ - begin_ <= kPlacesPerBlock * count_;
  }

  bool jumps_ = false;

  // Blocks are counted through the whole batch.
  int64_t count_ = 0;
  int64_t begin_ = 0;  // the part of the pool that has them
  int64_t end_ = 0;
  std::vector<int32_t> first_;    // [end_ - begin_], the first block at a place; -1: none
  std::vector<int32_t> next_;     // [count_], another block at the same place; -1: none
  std::vector<int64_t> origins_;  // [batch], count of the request's first block
  std::vector<int64_t> numbers_;  // [batch], its number within the request
};

}  // namespace select_attn::cpu

#endif  // SELECT_ATTN_OPS_CPU_POOL_ORDER_H_
