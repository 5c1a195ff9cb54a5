// Work that is taken a little before its turn, so that its memory can be asked for in time.

#ifndef SELECT_ATTN_OPS_CPU_UPCOMING_H_
#define SELECT_ATTN_OPS_CPU_UPCOMING_H_

#include <algorithm>
#include <cstdint>

namespace select_attn::cpu {

// The item that is at work, and those that come after it.
template <typename Item>
class Upcoming {
 public:
  static constexpr int64_t kMostAhead = 15;

  // Keeps `ahead` items besides the one at work, at most kMostAhead, at least one.
  explicit Upcoming(int64_t ahead) : ahead_(std::clamp<int64_t>(ahead, 1, kMostAhead)) {}

  // Takes items, by take(item), which is false if there are no more, until enough of them are
  // known; false if there is none to work at.
  template <typename Take>
  bool Fill(Take&& take) {
    while (more_ && end_ <= now_ + ahead_) {
      more_ = take(items_[end_ % kSize]);
      if (more_) ++end_;
    }
    return now_ < end_;
  }

  // Goes on to the next item.
  void Advance() { ++now_; }

  // The item that comes `ahead` later than the one at work, or else the last that is known.
  const Item& operator[](int64_t ahead) const {
    return items_[std::min(now_ + ahead, end_ - 1) % kSize];
  }

 private:
  static constexpr int64_t kSize = kMostAhead + 1;  // a power of two: a remainder of it is cheap

  const int64_t ahead_;
  Item items_[kSize];
  int64_t now_ = 0;  // counted from the first item of all
  int64_t end_ = 0;
  bool more_ = true;
};

}  // namespace select_attn::cpu

#endif  // SELECT_ATTN_OPS_CPU_UPCOMING_H_
