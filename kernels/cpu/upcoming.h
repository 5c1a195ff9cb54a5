// Work that is taken a little before its turn, so that its memory can be asked for in time.

#ifndef SELECT_ATTN_OPS_CPU_UPCOMING_H_
#define SELECT_ATTN_OPS_CPU_UPCOMING_H_

#include <algorithm>
#include <cstdint>

namespace select_attn::cpu {

// The item that is at work, and those that come after it. Calls nothing back, since code that is
// compiled for a SIMD target cannot be inlined here.
template <typename Item>
class Upcoming {
 public:
  static constexpr int64_t kMostAhead = 15;

  // Keeps `ahead` items besides the one at work, at most kMostAhead, at least one.
  explicit Upcoming(int64_t ahead) : ahead_(std::clamp<int64_t>(ahead, 1, kMostAhead)) {}

  // Whether an item is to be taken now: to be pushed, or else the end to be told.
  bool wants_more() const { return !is_end_ && end_ <= now_ + ahead_; }
  void Push(const Item& item) { items_[end_++ % kSize] = item; }
  void End() { is_end_ = true; }

  // Whether there is none to work at.
  bool empty() const { return now_ == end_; }

  // Goes on to the next item.
  void Advance() { ++now_; }

  // The item that comes `ahead` later than the one at work, or else the last that is known. Not
  // when empty.
  const Item& operator[](int64_t ahead) const {
    return items_[std::min(now_ + ahead, end_ - 1) % kSize];
  }

 private:
  static constexpr int64_t kSize = kMostAhead + 1;  // a power of two: a remainder of it is cheap

  const int64_t ahead_;
  Item items_[kSize];
  int64_t now_ = 0;  // counted from the first item of all
  int64_t end_ = 0;
  bool is_end_ = false;
};

}  // namespace select_attn::cpu

#endif  // SELECT_ATTN_OPS_CPU_UPCOMING_H_
