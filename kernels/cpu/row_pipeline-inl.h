// Rows of metadata on their way from the walk through memory to their scores: a row is scored when
// enough others have come behind it, so that what those lie on can be asked for in time, wherever
// in memory they are. Included once per SIMD target, hence the toggle.

#if defined(SELECT_ATTN_OPS_CPU_ROW_PIPELINE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SELECT_ATTN_OPS_CPU_ROW_PIPELINE_INL_H_
#undef SELECT_ATTN_OPS_CPU_ROW_PIPELINE_INL_H_
#else
#define SELECT_ATTN_OPS_CPU_ROW_PIPELINE_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include "cpu/prefetch.h"
#include "cpu/score-inl.h"
#include "cpu/stopwatch.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace select_attn::cpu {
namespace HWY_NAMESPACE {

template <typename T>
class RowPipeline {
 public:
  RowPipeline(int64_t head_dim, Ask ask)
      : head_dim_(head_dim),
        ask_(ask),
        to_l1_(RowsIn(kAheadToL1, head_dim)),
        to_l2_(to_l1_ + (ask == Ask::kTwice ? RowsIn(kAheadToL2 - kAheadToL1, head_dim) : 0)) {}

  // Takes a row, and scores some of those before it if enough have come.
  HWY_INLINE void Push(const ScoredRow<T>& row) {
    rows_[pushed_ % kCapacity] = row;
    ++pushed_;
    if (pushed_ == scored_ + to_l2_ + kRowsAtOnce) {
      ScoreOldest(Row(scored_ + to_l1_), Row(scored_ + to_l2_));
    }
  }

  // Scores all rows that it has.
  void Finish() {
    while (scored_ < pushed_) {
      // Fills up to whole groups with a row that is scored twice then.
      for (; pushed_ % kRowsAtOnce != 0; ++pushed_) *Row(pushed_) = *Row(pushed_ - 1);
      ScoreOldest(Row(scored_), Row(scored_));
    }
  }

  // Rows since the beginning, those that Finish filled up with included: of all that were pushed,
  // so many of the first are scored.
  uint64_t num_pushed() const { return pushed_; }
  uint64_t num_scored() const { return scored_; }

 private:
  static constexpr uint64_t kCapacity = 64;

  // In whole groups, so that the rows of one lie side by side. Twice the most leave room for the
  // rows that are scored.
  static uint64_t RowsIn(int64_t bytes, int64_t head_dim) {
    constexpr int64_t kMostGroups = (kCapacity / kRowsAtOnce - 1) / 2;
    const int64_t groups = bytes / (head_dim * 2 * kRowsAtOnce * int64_t{sizeof(T)});
    return static_cast<uint64_t>(kRowsAtOnce * std::clamp<int64_t>(groups, 1, kMostGroups));
  }

  ScoredRow<T>* Row(uint64_t number) { return rows_ + number % kCapacity; }

  HWY_NOINLINE void ScoreOldest(const ScoredRow<T>* HWY_RESTRICT to_l1,
                                const ScoredRow<T>* HWY_RESTRICT to_l2) {
    if (ask_ == Ask::kOnce) {
      Score<Ask::kOnce>(to_l1, to_l2);
    } else {
      Score<Ask::kTwice>(to_l1, to_l2);
    }
    scored_ += kRowsAtOnce;
  }

  template <Ask kAsk>
  HWY_INLINE void Score(const ScoredRow<T>* HWY_RESTRICT to_l1,
                        const ScoredRow<T>* HWY_RESTRICT to_l2) {
    if (HWY_UNLIKELY(reads_only_)) {
      ReadRows<kAsk>(Row(scored_), to_l1, to_l2, head_dim_);
    } else {
      ScoreRows<MinMaxScore, kAsk>(Row(scored_), to_l1, to_l2, head_dim_);
    }
  }

  const int64_t head_dim_;
  const Ask ask_;
  const bool reads_only_ = ReadsOnly();
  const uint64_t to_l1_;  // rows from one that is scored to those that are asked for
  const uint64_t to_l2_;
  uint64_t pushed_ = 0;
  uint64_t scored_ = 0;
  ScoredRow<T> rows_[kCapacity] = {};
};

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace select_attn::cpu
HWY_AFTER_NAMESPACE();

#endif  // SELECT_ATTN_OPS_CPU_ROW_PIPELINE_INL_H_
