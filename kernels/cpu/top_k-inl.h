// The best of a row of scores, in the order of core/rank_key.h. Included once per SIMD target,
// hence the toggle.

#if defined(SELECT_ATTN_OPS_CPU_TOP_K_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SELECT_ATTN_OPS_CPU_TOP_K_INL_H_
#undef SELECT_ATTN_OPS_CPU_TOP_K_INL_H_
#else
#define SELECT_ATTN_OPS_CPU_TOP_K_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "core/rank_key.h"
#include "cpu/row-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace select_attn::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// For each lane of `own`, how many of `count` others are greater.
template <class D, class V = hn::Vec<D>>
HWY_INLINE hn::Vec<hn::RebindToSigned<D>> CountGreater(D d,
                                                       const hn::TFromD<D>* HWY_RESTRICT others,
                                                       int64_t count, V own) {
  const hn::RebindToSigned<D> di;
  auto greater = hn::Zero(di);
  for (int64_t i = 0; i < count; ++i) {
    const auto is_greater = hn::RebindMask(di, hn::Gt(hn::Set(d, others[i]), own));
    greater = hn::Sub(greater, hn::VecFromMask(di, is_greater));
  }
  return greater;
}

// Finds the k best of a row of scores in two passes. The first takes the best of each of a few k
// groups of blocks: k groups have a block at least as good as the k-th best of these, so no worse
// block can be among the k best. The second collects the few blocks that reach this bar, and only
// those are ranked. Few numbers are ranked by counting, for each, those above it: no branch
// depends on a score then, where sorting would mispredict at every other comparison. An object
// keeps its buffers from row to row.
class TopK {
 public:
  // `scores` belong to the blocks first, first + 1, ... Writes the numbers of the k best, or of all
  // if there are fewer, in the order of rank, and returns how many. k >= 1.
  int64_t Select(const float* HWY_RESTRICT scores, int64_t count, int64_t first, int64_t k,
                 int32_t* HWY_RESTRICT out) {
    Collect(scores, count, first, Bar(scores, count, k));
    const auto num_candidates = static_cast<int64_t>(candidates_.size());
    const int64_t num_selected = std::min(k, num_candidates);
    if (num_candidates <= kFew) {
      RankByCounting(num_candidates);
    } else {
      RankBySorting(num_candidates, num_selected);
    }
    std::copy_n(ranked_.begin(), num_selected, out);
    return num_selected;
  }

 private:
  using DI64 = hn::ScalableTag<int64_t>;

  // Groups per block that is wanted: more of them bring the bar nearer to the k-th best score, and
  // cost more to rank.
  static constexpr int64_t kGroupsPerBlock = 2;

  // Numbers up to which counting, which is quadratic, beats sorting.
  static constexpr int64_t kFew = 64;

  static constexpr int64_t kWordBytes = 8;
  static constexpr uint64_t kTopBit = uint64_t{1} << 63;
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();

  // A score that at least k of these reach, where NaN reaches any; -infinity if need be.
  float Bar(const float* HWY_RESTRICT scores, int64_t count, int64_t k) {
    const DF df;
    const auto lanes = static_cast<int64_t>(hn::Lanes(df));
    // A group is a lane of every `num_vectors`-th vector. A tail of less than a vector is left out.
    const int64_t num_vectors = std::min((kGroupsPerBlock * k + lanes - 1) / lanes, count / lanes);
    const int64_t num_groups = num_vectors * lanes;
    if (num_groups < k) return -kInfinity;
    best_.resize(static_cast<size_t>(num_groups));
    for (int64_t group = 0; group < num_groups; group += lanes) {
      auto best = hn::Set(df, -kInfinity);
      for (int64_t i = group; i + lanes <= count; i += num_groups) {
        best = MaxOrSecond(hn::LoadU(df, scores + i), best);  // passes over NaN
      }
      hn::StoreU(best, df, best_.data() + group);
    }
    return num_groups <= kFew ? KthBestByCounting(k) : KthBestBySorting(k);
  }

  // The k-th best of best_, whose size is a multiple of the lanes: the least that fewer than k
  // exceed.
  float KthBestByCounting(int64_t k) const {
    const DF df;
    const hn::RebindToSigned<DF> di;
    const auto size = static_cast<int64_t>(best_.size());
    const auto bound = hn::Set(di, static_cast<int32_t>(k));
    auto kth_best = hn::Set(df, kInfinity);
    for (int64_t i = 0; i < size; i += static_cast<int64_t>(hn::Lanes(df))) {
      const auto own = hn::LoadU(df, best_.data() + i);
      const auto is_among = hn::Lt(CountGreater(df, best_.data(), size, own), bound);
      kth_best = hn::Min(kth_best, hn::IfThenElse(hn::RebindMask(df, is_among), own, kth_best));
    }
    return hn::GetLane(hn::MinOfLanes(df, kth_best));
  }

  float KthBestBySorting(int64_t k) {
    std::nth_element(best_.begin(), best_.begin() + (k - 1), best_.end(), std::greater<>());
    return best_[static_cast<size_t>(k - 1)];
  }

  // Leaves the rank keys, less 2^63, of the scores that reach the bar, or are NaN, in candidates_.
  // First marks them all in a row of bits, then looks at the bits 64 at a time: a branch per vector
  // would be mispredicted at every other one.
  void Collect(const float* HWY_RESTRICT scores, int64_t count, int64_t first, float bar) {
    const DF df;
    const auto lanes = static_cast<int64_t>(hn::Lanes(df));
    const int64_t lanes_per_byte = std::min<int64_t>(lanes, 8);
    const auto vbar = hn::Set(df, bar);
    reaching_.assign(static_cast<size_t>(count / lanes_per_byte + kWordBytes), 0);
    uint8_t* mark = reaching_.data();
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) {
      const auto is_below = hn::Lt(hn::LoadU(df, scores + i), vbar);
      mark += hn::StoreMaskBits(df, hn::Not(is_below), mark);
    }
    candidates_.clear();
    const auto add = [&](int64_t place) {
      const uint64_t key = RankKey(ScoreKey(scores[place]), first + place);
      candidates_.push_back(static_cast<int64_t>(key ^ kTopBit));
    };
    static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bytes of a word in order");
    for (int64_t byte = 0; byte * lanes_per_byte < i; byte += kWordBytes) {
      uint64_t word;
      std::memcpy(&word, reaching_.data() + byte, kWordBytes);
      for (; word != 0; word &= word - 1) {
        const auto bit = static_cast<int64_t>(hwy::Num0BitsBelowLS1Bit_Nonzero64(word));
        add((byte + bit / 8) * lanes_per_byte + bit % 8);
      }
    }
    for (; i < count; ++i) {
      if (!(scores[i] < bar)) add(i);
    }
  }

  static int32_t Block(int64_t candidate) {
    return static_cast<int32_t>(BlockOfRankKey(static_cast<uint64_t>(candidate) ^ kTopBit));
  }

  // Leaves the blocks of all candidates in ranked_.
  void RankByCounting(int64_t num_candidates) {
    const DI64 d;
    const auto lanes = static_cast<int64_t>(hn::Lanes(d));
    HWY_ALIGN int64_t places[hn::MaxLanes(d)];
    ranked_.resize(static_cast<size_t>(num_candidates));
    candidates_.resize(candidates_.size() + static_cast<size_t>(lanes));  // whole vectors are read
    for (int64_t i = 0; i < num_candidates; i += lanes) {
      const auto own = hn::LoadU(d, candidates_.data() + i);
      hn::Store(CountGreater(d, candidates_.data(), num_candidates, own), d, places);
      const int64_t count = std::min(lanes, num_candidates - i);
      for (int64_t lane = 0; lane < count; ++lane) {
        ranked_[static_cast<size_t>(places[lane])] =
            Block(candidates_[static_cast<size_t>(i + lane)]);
      }
    }
  }

  // Leaves the blocks of the best candidates in ranked_.
  void RankBySorting(int64_t num_candidates, int64_t num_selected) {
    const auto end = candidates_.begin() + num_selected;
    if (num_selected < num_candidates) {
      std::nth_element(candidates_.begin(), end - 1, candidates_.end(), std::greater<>());
    }
    std::sort(candidates_.begin(), end, std::greater<>());
    ranked_.resize(static_cast<size_t>(num_selected));
    std::transform(candidates_.begin(), end, ranked_.begin(), Block);
  }

  std::vector<float> best_;          // best score of every group, NaN left out
  std::vector<uint8_t> reaching_;    // bits: which scores reach the bar
  std::vector<int64_t> candidates_;  // rank key, less 2^63, of those that do
  std::vector<int32_t> ranked_;      // blocks in the order of rank
};

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace select_attn::cpu
HWY_AFTER_NAMESPACE();

#endif  // SELECT_ATTN_OPS_CPU_TOP_K_INL_H_
