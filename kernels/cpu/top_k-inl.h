// The best of a row of scores, in the order of core/rank_key.h. Included once per SIMD target,
// hence the toggle.

#if defined(SELECT_ATTN_OPS_CPU_TOP_K_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SELECT_ATTN_OPS_CPU_TOP_K_INL_H_
#undef SELECT_ATTN_OPS_CPU_TOP_K_INL_H_
#else
#define SELECT_ATTN_OPS_CPU_TOP_K_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "core/rank_key.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace select_attn::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// ScoreKey of core/rank_key.h, a vector at a time.
template <class D, class V = hn::Vec<D>>
HWY_INLINE hn::Vec<hn::RebindToUnsigned<D>> ScoreKeys(D df, V scores) {
  const hn::RebindToUnsigned<D> du;
  const hn::RebindToSigned<D> di;
  const auto no_negative_zero = hn::Add(scores, hn::Zero(df));
  const auto sign = hn::BroadcastSignBit(hn::BitCast(di, no_negative_zero));
  const auto flip = hn::Or(hn::BitCast(du, sign), hn::Set(du, 0x80000000u));
  const auto keys = hn::Xor(hn::BitCast(du, no_negative_zero), flip);
  const auto is_nan = hn::RebindMask(du, hn::IsNaN(scores));
  return hn::IfThenElse(is_nan, hn::Set(du, 0xFFFFFFFFu), keys);
}

// Keeps the k best of a stream of scored blocks. Candidates gather in a buffer of a few k; when it
// is full, the k best stay and the worst of them becomes the bar for all that follow, which most
// blocks of a long request then do not pass.
class TopK {
 public:
  // Starts over, to keep the k best.
  void Start(int64_t k) {
    k_ = k;
    capacity_ = k + std::max<int64_t>(k, 256);
    bar_ = 0;
    candidates_.clear();
    candidates_.reserve(static_cast<size_t>(capacity_));
  }

  // Takes blocks first, first + 1, ... by increasing number.
  HWY_INLINE void Add(const float* HWY_RESTRICT scores, int64_t count, int64_t first) {
    const DF df;
    const hn::RebindToUnsigned<DF> du;
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
    HWY_ALIGN uint32_t keys[hn::MaxLanes(DF())];
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) {
      const auto key = ScoreKeys(df, hn::LoadU(df, scores + i));
      if (hn::AllFalse(du, hn::Gt(key, hn::Set(du, bar_)))) continue;
      hn::Store(key, du, keys);
      for (int64_t lane = 0; lane < lanes; ++lane) Offer(keys[lane], first + i + lane);
    }
    for (; i < count; ++i) Offer(ScoreKey(scores[i]), first + i);
  }

  // Writes the k best, or as many as there are, and returns how many.
  int64_t Take(int32_t* HWY_RESTRICT out) {
    KeepBest();
    std::sort(candidates_.begin(), candidates_.end(), std::greater<>());
    std::transform(candidates_.begin(), candidates_.end(), out,
                   [](uint64_t key) { return static_cast<int32_t>(BlockOfRankKey(key)); });
    return static_cast<int64_t>(candidates_.size());
  }

 private:
  using DF = hn::ScalableTag<float>;

  // A block at the bar loses to those that set it, whose numbers are smaller.
  void Offer(uint32_t score_key, int64_t block) {
    if (score_key <= bar_) return;
    candidates_.push_back(RankKey(score_key, block));
    if (static_cast<int64_t>(candidates_.size()) < capacity_) return;
    KeepBest();
    bar_ = static_cast<uint32_t>(candidates_.back() >> 32);
  }

  // Leaves the worst of the k best at the end.
  void KeepBest() {
    if (static_cast<int64_t>(candidates_.size()) <= k_) return;
    std::nth_element(candidates_.begin(), candidates_.begin() + (k_ - 1), candidates_.end(),
                     std::greater<>());
    candidates_.resize(static_cast<size_t>(k_));
  }

  int64_t k_ = 0;
  int64_t capacity_ = 0;
  uint32_t bar_ = 0;  // below every score key
  std::vector<uint64_t> candidates_;
};

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace select_attn::cpu
HWY_AFTER_NAMESPACE();

#endif  // SELECT_ATTN_OPS_CPU_TOP_K_INL_H_
