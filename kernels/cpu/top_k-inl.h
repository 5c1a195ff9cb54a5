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

// Finds the k best of a row of scores in two passes. The first takes the best of each of a few k
// groups of blocks: k groups have a block at least as good as the k-th best of these, so no worse
// block can be among the k best. The second collects the few blocks that reach this bar, and only
// those are ranked. An object keeps its buffers from row to row.
class TopK {
 public:
  // `scores` belong to the blocks first, first + 1, ... Writes the numbers of the k best, or of all
  // if there are fewer, in the order of rank, and returns how many. k >= 1.
  int64_t Select(const float* HWY_RESTRICT scores, int64_t count, int64_t first, int64_t k,
                 int32_t* HWY_RESTRICT out) {
    Collect(scores, count, first, Bar(scores, count, k));
    const int64_t num_selected = std::min(k, static_cast<int64_t>(candidates_.size()));
    const auto end = candidates_.begin() + num_selected;
    if (end != candidates_.end()) {
      std::nth_element(candidates_.begin(), end - 1, candidates_.end(), std::greater<>());
    }
    std::sort(candidates_.begin(), end, std::greater<>());
    std::transform(candidates_.begin(), end, out,
                   [](uint64_t key) { return static_cast<int32_t>(BlockOfRankKey(key)); });
    return num_selected;
  }

 private:
  using DF = hn::ScalableTag<float>;

  // Groups per block that is wanted: more of them bring the bar nearer to the k-th best score.
  static constexpr int64_t kGroupsPerBlock = 4;

  // A score key that at least k scores reach, or 0, which all do.
  uint32_t Bar(const float* HWY_RESTRICT scores, int64_t count, int64_t k) {
    const DF df;
    const hn::RebindToUnsigned<DF> du;
    const auto lanes = static_cast<int64_t>(hn::Lanes(df));
    // A group is a lane of every `num_vectors`-th vector. A tail of less than a vector is left out.
    const int64_t num_vectors = std::min((kGroupsPerBlock * k + lanes - 1) / lanes, count / lanes);
    if (num_vectors * lanes < k) return 0;
    best_.resize(static_cast<size_t>(num_vectors * lanes));
    for (int64_t group = 0; group < num_vectors * lanes; group += lanes) {
      auto best = hn::Zero(du);
      for (int64_t i = group; i + lanes <= count; i += num_vectors * lanes) {
        best = hn::Max(best, ScoreKeys(df, hn::LoadU(df, scores + i)));
      }
      hn::StoreU(best, du, best_.data() + group);
    }
    std::nth_element(best_.begin(), best_.begin() + (k - 1), best_.end(), std::greater<>());
    return best_[static_cast<size_t>(k - 1)];
  }

  // Leaves the rank keys of the scores that reach the bar in candidates_.
  void Collect(const float* HWY_RESTRICT scores, int64_t count, int64_t first, uint32_t bar) {
    const DF df;
    const hn::RebindToUnsigned<DF> du;
    const auto lanes = static_cast<int64_t>(hn::Lanes(df));
    HWY_ALIGN uint32_t keys[hn::MaxLanes(DF())];
    candidates_.clear();
    const auto offer = [&](uint32_t key, int64_t i) {
      if (key >= bar) candidates_.push_back(RankKey(key, first + i));
    };
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) {
      const auto key = ScoreKeys(df, hn::LoadU(df, scores + i));
      if (hn::AllTrue(du, hn::Gt(hn::Set(du, bar), key))) continue;
      hn::Store(key, du, keys);
      for (int64_t lane = 0; lane < lanes; ++lane) offer(keys[lane], i + lane);
    }
    for (; i < count; ++i) offer(ScoreKey(scores[i]), i);
  }

  std::vector<uint32_t> best_;  // score key of the best block of every group
  std::vector<uint64_t> candidates_;
};

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace select_attn::cpu
HWY_AFTER_NAMESPACE();

#endif  // SELECT_ATTN_OPS_CPU_TOP_K_INL_H_
