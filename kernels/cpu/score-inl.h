// The arithmetic of quest_block_select_paged: mean queries and scores. Included once per SIMD
// target, hence the toggle.

#if defined(SELECT_ATTN_OPS_CPU_SCORE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SELECT_ATTN_OPS_CPU_SCORE_INL_H_
#undef SELECT_ATTN_OPS_CPU_SCORE_INL_H_
#else
#define SELECT_ATTN_OPS_CPU_SCORE_INL_H_
#endif

#include <cstdint>

#include "cpu/prefetch.h"
#include "cpu/row-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace select_attn::cpu {
namespace HWY_NAMESPACE {

// Mean of `group` query heads, sum in head order, one division. The result is in the order of
// RowLoader<T>, up to a multiple of LoadSize(), with zeros behind head_dim.
template <typename T>
HWY_INLINE void MeanQuery(const T* HWY_RESTRICT heads, int64_t head_stride, int64_t group,
                          int64_t head_dim, float* HWY_RESTRICT mean) {
  const DF df;
  const int64_t step = LoadSize();
  const int64_t half = step / 2;
  const auto divisor = hn::Set(df, static_cast<float>(group));
  for (int64_t h = 0; h < group; ++h) {  // outside, because so they lie in memory
    const T* from = heads + h * head_stride;
    for (int64_t d = 0; d < head_dim; d += step) {
      VF a;
      VF b;
      if (d + step <= head_dim) {
        RowLoader<T>::Load(from + d, a, b);
      } else {
        LoadTail(from + d, head_dim - d, a, b);
      }
      if (h > 0) {
        a = hn::Add(hn::LoadU(df, mean + d), a);
        b = hn::Add(hn::LoadU(df, mean + d + half), b);
      }
      if (h == group - 1) {
        a = hn::Div(a, divisor);
        b = hn::Div(b, divisor);
      }
      hn::StoreU(a, df, mean + d);
      hn::StoreU(b, df, mean + d + half);
    }
  }
}

// The Quest score: an upper bound on the dot product of the query with any key between min and max.
struct MinMaxScore {
  // Adds max(q * max, q * min) to `sum`, as the larger of the two sums, which rounds alike. That is
  // right unless a product or a sum is not finite. Returns the sum with max: only where that or
  // `sum` is NaN may `sum` be wrong.
  static HWY_INLINE VF Add(VF q, VF max, VF min, VF& sum) {
    const auto with_max = hn::MulAdd(q, max, sum);
    sum = MaxOrSecond(with_max, hn::MulAdd(q, min, sum));
    return with_max;
  }

  // The same, and right in any case: NaN where a product is, or where the larger product and the
  // sum so far are infinities that cancel.
  static HWY_INLINE void AddCarefully(VF q, VF max, VF min, VF& sum) {
    const auto with_max = hn::MulAdd(q, max, sum);
    const auto with_min = hn::MulAdd(q, min, sum);
    const auto by_max = hn::Mul(q, max);
    const auto by_min = hn::Mul(q, min);
    const auto term = hn::IfThenElse(hn::IsNaN(by_max), by_max, MaxOrSecond(by_max, by_min));
    const auto is_special = hn::Or(hn::IsNaN(with_max), hn::IsNaN(with_min));
    sum = hn::IfThenElse(is_special, hn::Add(sum, term), MaxOrSecond(with_max, with_min));
  }
};

// Where a row of metadata lies, what it is scored against and where its score goes.
template <typename T>
struct ScoredRow {
  const float* q;  // as MeanQuery leaves it
  const T* max;
  const T* min;
  float* score;
};

// Asks for what belongs to the elements that one Load at d reads, in the rows that come later.
template <Ask kAsk, typename T>
HWY_INLINE void PrefetchRows(const ScoredRow<T>& to_l1, const ScoredRow<T>& to_l2, int64_t d) {
  ForEachLine<T>(d, [&](int64_t line) HWY_ATTR {
    PrefetchToL1(to_l1.max + line);
    PrefetchToL1(to_l1.min + line);
    if constexpr (kAsk == Ask::kTwice) {
      PrefetchToL2(to_l2.max + line);
      PrefetchToL2(to_l2.min + line);
    }
  });
}

// Rows whose terms are added up side by side, so that the sums of one need not wait for their own
// latency.
constexpr int kRowsSideBySide = 2;

// Sums of a row's terms, spread over the lanes, those of both vectors of a load apart.
template <class Score, bool kCarefully>
class RowSums {
 public:
  HWY_INLINE RowSums() : a_(hn::Zero(DF())), b_(hn::Zero(DF())), probe_(hn::Zero(DF())) {}

  // Adds the terms that LoadSize() elements make.
  HWY_INLINE void Add(VF q_a, VF q_b, VF max_a, VF max_b, VF min_a, VF min_b) {
    if constexpr (kCarefully) {
      Score::AddCarefully(q_a, max_a, min_a, a_);
      Score::AddCarefully(q_b, max_b, min_b, b_);
    } else {
      const auto probe_a = Score::Add(q_a, max_a, min_a, a_);
      const auto probe_b = Score::Add(q_b, max_b, min_b, b_);
      // NaN once either was, in one instruction; a NaN for another reason costs no more than time.
      probe_ = hn::MulAdd(probe_a, probe_b, probe_);
    }
  }

  HWY_INLINE VF Total() const { return hn::Add(a_, b_); }

  // NaN if Total() may be wrong.
  HWY_INLINE VF Probe() const { return hn::Add(probe_, Total()); }

 private:
  VF a_;
  VF b_;
  VF probe_;
};

// Adds up the terms of the first kRowsSideBySide rows of three arrays. With kSameQuery all have the
// query of the first, which is loaded once.
template <class Score, bool kCarefully, bool kSameQuery, Ask kAsk, typename T>
HWY_INLINE void SumRows(const ScoredRow<T>* HWY_RESTRICT rows,
                        const ScoredRow<T>* HWY_RESTRICT to_l1,
                        const ScoredRow<T>* HWY_RESTRICT to_l2, int64_t head_dim,
                        VF* HWY_RESTRICT totals, VF& probe) {
  RowSums<Score, kCarefully> sums[kRowsSideBySide];
  const int64_t step = LoadSize();
  const auto add = [&](int64_t d) HWY_ATTR {
    VF q_a;
    VF q_b;
    for (int r = 0; r < kRowsSideBySide; ++r) {
      if (r == 0 || !kSameQuery) {
        q_a = LoadOnce(rows[r].q + d);
        q_b = LoadOnce(rows[r].q + d + step / 2);
      }
      VF max_a;
      VF max_b;
      VF min_a;
      VF min_b;
      RowLoader<T>::Load(rows[r].max + d, max_a, max_b);
      RowLoader<T>::Load(rows[r].min + d, min_a, min_b);
      sums[r].Add(q_a, q_b, max_a, max_b, min_a, min_b);
    }
  };
  const auto prefetch = [&](int64_t d) HWY_ATTR {
    if constexpr (!kCarefully) {
      for (int r = 0; r < kRowsSideBySide; ++r) PrefetchRows<kAsk>(to_l1[r], to_l2[r], d);
    }
  };
  int64_t d = 0;
  constexpr auto kLine = static_cast<int64_t>(kCacheLine / sizeof(T));
  if (step < kLine) {  // a line at a time
    for (; d + kLine <= head_dim; d += kLine) {
      prefetch(d);
      for (int64_t i = 0; i < kLine; i += step) add(d + i);
    }
  }
  for (; d + step <= head_dim; d += step) {
    prefetch(d);
    add(d);
  }
  for (int r = 0; r < kRowsSideBySide; ++r) {
    if (d < head_dim) {
      VF max_a;
      VF max_b;
      VF min_a;
      VF min_b;
      LoadTail(rows[r].max + d, head_dim - d, max_a, max_b);
      LoadTail(rows[r].min + d, head_dim - d, min_a, min_b);
      sums[r].Add(LoadOnce(rows[r].q + d), LoadOnce(rows[r].q + d + step / 2), max_a, max_b, min_a,
                  min_b);
    }
    totals[r] = sums[r].Total();
    probe = hn::Add(probe, sums[r].Probe());
  }
}

// Writes the score of each of four rows; false if they may be wrong, which kCarefully they never
// are.
template <class Score, bool kCarefully, Ask kAsk, typename T>
HWY_INLINE bool TryScoreRows(const ScoredRow<T>* HWY_RESTRICT rows,
                             const ScoredRow<T>* HWY_RESTRICT to_l1,
                             const ScoredRow<T>* HWY_RESTRICT to_l2, int64_t head_dim,
                             float* HWY_RESTRICT scores) {
  const DF df;
  auto probe = hn::Zero(df);
  VF sums[kRowsAtOnce];
  static_assert(kRowsSideBySide == 2);
  for (int i = 0; i < kRowsAtOnce; i += kRowsSideBySide) {
    if (rows[i].q == rows[i + 1].q) {
      SumRows<Score, kCarefully, true, kAsk>(rows + i, to_l1 + i, to_l2 + i, head_dim, sums + i,
                                             probe);
    } else {
      SumRows<Score, kCarefully, false, kAsk>(rows + i, to_l1 + i, to_l2 + i, head_dim, sums + i,
                                              probe);
    }
  }
  StoreSums(sums, scores);
  return hn::AllFalse(df, hn::IsNaN(probe));
}

// Scores four rows, and asks for four or two times four that come later. The score of a row does
// not depend on those beside it.
template <class Score, Ask kAsk, typename T>
HWY_INLINE void ScoreRows(const ScoredRow<T>* HWY_RESTRICT rows,
                          const ScoredRow<T>* HWY_RESTRICT to_l1,
                          const ScoredRow<T>* HWY_RESTRICT to_l2, int64_t head_dim) {
  float scores[kRowsAtOnce];
  const bool done = TryScoreRows<Score, false, kAsk>(rows, to_l1, to_l2, head_dim, scores);
  if (HWY_UNLIKELY(!done)) TryScoreRows<Score, true, kAsk>(rows, to_l1, to_l2, head_dim, scores);
  for (int i = 0; i < kRowsAtOnce; ++i) *rows[i].score = scores[i];
}

// What a diagnostic run does in place of ScoreRows: reads the same, but for what is left behind
// whole Loads, and leaves scores that mean nothing.
template <Ask kAsk, typename T>
HWY_INLINE void ReadRows(const ScoredRow<T>* HWY_RESTRICT rows,
                         const ScoredRow<T>* HWY_RESTRICT to_l1,
                         const ScoredRow<T>* HWY_RESTRICT to_l2, int64_t head_dim) {
  auto bits = hn::Zero(DF());
  for (int i = 0; i < kRowsAtOnce; i += kRowsSideBySide) {
    for (int64_t d = 0; d + LoadSize() <= head_dim; d += LoadSize()) {
      for (int r = i; r < i + kRowsSideBySide; ++r) {
        PrefetchRows<kAsk>(to_l1[r], to_l2[r], d);
        ReadOnly(rows[r].max + d, bits);
        ReadOnly(rows[r].min + d, bits);
      }
    }
  }
  for (int i = 0; i < kRowsAtOnce; ++i) *rows[i].score = hn::GetLane(bits);
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace select_attn::cpu
HWY_AFTER_NAMESPACE();

#endif  // SELECT_ATTN_OPS_CPU_SCORE_INL_H_
