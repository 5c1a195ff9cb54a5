// CPU backend of quest_block_select_paged, compiled once per SIMD target by foreach_target.h.
//
// Three passes over the batch: the mean query of every KV head; the scores of all blocks, in tiles
// over which the threads share even a single request; the selection of every (request, KV head).

#include "select_attn_ops/quest_block_select_paged.h"

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "core/block_ranges.h"
#include "cpu/backend.h"
#include "cpu/parallel.h"
#include "cpu/stopwatch.h"
#include "cpu/tiles.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/quest_block_select_paged.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// After foreach_target.h
#include "cpu/row-inl.h"
#include "cpu/top_k-inl.h"
#include "hwy/aligned_allocator.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace select_attn::cpu {
namespace HWY_NAMESPACE {
namespace {

// Mean of `group` query heads, sum in head order, one division. The result is in the order of
// RowLoader<T>, up to a multiple of LoadSize(), with zeros behind head_dim.
template <typename T>
void MeanQuery(const T* HWY_RESTRICT heads, int64_t head_stride, int64_t group, int64_t head_dim,
               float* HWY_RESTRICT mean) {
  const DF df;
  const int64_t step = LoadSize();
  const auto divisor = hn::Set(df, static_cast<float>(group));
  for (int64_t d = 0; d < head_dim; d += step) {
    auto sum_a = hn::Zero(df);
    auto sum_b = hn::Zero(df);
    for (int64_t h = 0; h < group; ++h) {
      const T* from = heads + h * head_stride + d;
      VF a;
      VF b;
      if (d + step <= head_dim) {
        RowLoader<T>::Load(from, a, b);
      } else {
        LoadTail(from, head_dim - d, a, b);
      }
      sum_a = hn::Add(sum_a, a);
      sum_b = hn::Add(sum_b, b);
    }
    hn::StoreU(hn::Div(sum_a, divisor), df, mean + d);
    hn::StoreU(hn::Div(sum_b, divisor), df, mean + d + step / 2);
  }
}

// NaN if either is. What Max alone returns then depends on the target.
HWY_INLINE VF MaxOrNaN(VF a, VF b) {
#if HWY_ARCH_X86 && HWY_TARGET != HWY_SCALAR && HWY_TARGET != HWY_EMU128
  const auto larger = hn::Max(a, b);  // b if either is NaN
#else
  const auto larger = hn::IfThenElse(hn::Gt(a, b), a, b);
#endif
  return hn::IfThenElse(hn::IsNaN(a), a, larger);
}

// The Quest score: an upper bound on the dot product of the query with any key between min and max.
struct MinMaxScore {
  static HWY_INLINE VF Term(VF q, VF max, VF min) {
    return MaxOrNaN(hn::Mul(q, max), hn::Mul(q, min));
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

// Sum of Score::Term over a row of head_dim elements, spread over the lanes. Two sums, because one
// would wait on its own latency.
template <class Score, typename T>
HWY_INLINE VF LaneSums(const ScoredRow<T>& row, int64_t head_dim) {
  const DF df;
  const int64_t step = LoadSize();
  const float* HWY_RESTRICT q = row.q;
  const T* HWY_RESTRICT max = row.max;
  const T* HWY_RESTRICT min = row.min;
  auto sum_a = hn::Zero(df);
  auto sum_b = hn::Zero(df);
  VF max_a;
  VF max_b;
  VF min_a;
  VF min_b;
  int64_t d = 0;
  for (; d + step <= head_dim; d += step) {
    RowLoader<T>::Load(max + d, max_a, max_b);
    RowLoader<T>::Load(min + d, min_a, min_b);
    sum_a = hn::Add(sum_a, Score::Term(hn::LoadU(df, q + d), max_a, min_a));
    sum_b = hn::Add(sum_b, Score::Term(hn::LoadU(df, q + d + step / 2), max_b, min_b));
  }
  if (d < head_dim) {
    LoadTail(max + d, head_dim - d, max_a, max_b);
    LoadTail(min + d, head_dim - d, min_a, min_b);
    sum_a = hn::Add(sum_a, Score::Term(hn::LoadU(df, q + d), max_a, min_a));
    sum_b = hn::Add(sum_b, Score::Term(hn::LoadU(df, q + d + step / 2), max_b, min_b));
  }
  return hn::Add(sum_a, sum_b);
}

constexpr int kRowsAtOnce = 4;

// The sums over the lanes of four vectors, in one. Summing them together takes a third of the
// instructions that four SumOfLanes do.
#if HWY_HAVE_SCALABLE || HWY_TARGET == HWY_SCALAR
HWY_INLINE void StoreSums(const VF* HWY_RESTRICT v, float* HWY_RESTRICT sums) {
  for (int i = 0; i < kRowsAtOnce; ++i) sums[i] = hn::GetLane(hn::SumOfLanes(DF(), v[i]));
}
#else
template <class D, class V>
HWY_INLINE hn::Vec<hn::Full128<float> > SumOfBlocks(D /*d*/, V v) {
  if constexpr (hn::MaxLanes(D()) == 4) {
    return v;
  } else {
    const hn::Half<D> half;
    return SumOfBlocks(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)));
  }
}

HWY_INLINE void StoreSums(const VF* HWY_RESTRICT v, float* HWY_RESTRICT sums) {
  const DF df;
  const hn::Repartition<double, DF> dd;
  const auto pair = [df](VF a, VF b) HWY_ATTR {
    return hn::Add(hn::InterleaveLower(df, a, b), hn::InterleaveUpper(df, a, b));
  };
  const auto low = hn::BitCast(dd, pair(v[0], v[1]));
  const auto high = hn::BitCast(dd, pair(v[2], v[3]));
  const auto blocks = hn::Add(hn::BitCast(df, hn::InterleaveLower(dd, low, high)),
                              hn::BitCast(df, hn::InterleaveUpper(dd, low, high)));
  hn::StoreU(SumOfBlocks(df, blocks), hn::Full128<float>(), sums);
}
#endif

// Scores up to kRowsAtOnce rows. A row's score does not depend on those beside it.
template <class Score, typename T>
HWY_INLINE void ScoreRows(const ScoredRow<T>* HWY_RESTRICT rows, int count, int64_t head_dim) {
  float scores[kRowsAtOnce];
  if (count == kRowsAtOnce) {
    const VF sums[kRowsAtOnce] = {
        LaneSums<Score>(rows[0], head_dim), LaneSums<Score>(rows[1], head_dim),
        LaneSums<Score>(rows[2], head_dim), LaneSums<Score>(rows[3], head_dim)};
    StoreSums(sums, scores);
  } else {
    VF sums[kRowsAtOnce];
    for (int i = 0; i < kRowsAtOnce; ++i) {
      sums[i] = i < count ? LaneSums<Score>(rows[i], head_dim) : hn::Zero(DF());
    }
    StoreSums(sums, scores);
  }
  for (int i = 0; i < count; ++i) *rows[i].score = scores[i];
}

template <typename T>
class Selection {
 public:
  explicit Selection(const QuestBlockSelectPagedParams& p)
      : p_(p), query_size_((p.head_dim + LoadSize() - 1) / LoadSize() * LoadSize()) {
    int64_t num_scores = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      ranked_.push_back(RankBlocks(p.seq_lens[b], MetadataLength(p, b), p.block_size));
      first_score_.push_back(num_scores);
      num_scores += p.num_kv_heads * ranked_.back().num_scored();
      longest_ = std::max(longest_, ranked_.back().num_scored());
    }
    // Not zeroed: every element is written before it is read. A query is read once per row, and
    // loads that straddle cache lines would take twice as long.
    const int64_t size = p.batch * p.num_kv_heads * query_size_;
    // Highway refuses to allocate nothing, which is what an empty batch needs.
    queries_ = hwy::AllocateAligned<float>(static_cast<size_t>(std::max<int64_t>(size, 1)));
    if (queries_ == nullptr) throw std::bad_alloc();
    scores_.reset(new float[static_cast<size_t>(num_scores)]);
  }

  void Run() {
    const int64_t num_rows = p_.batch * p_.num_kv_heads;
    const int64_t group = p_.num_heads / p_.num_kv_heads;
    ParallelFor(num_rows, RowsPerRange(group * p_.head_dim), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) ComputeQuery(row);
    });

    const int64_t block_bytes = 2 * p_.num_kv_heads * p_.head_dim * int64_t{sizeof(T)};
    const Tiles tiles(p_.batch, block_bytes, [&](int64_t b) { return ranked_[b].num_scored(); });
    tiles.ParallelForEach([&](int64_t b, int64_t begin, int64_t end) {
      const Lap lap(Phase::kScoring);
      ComputeScores(b, ranked_[b].scored_begin + begin, ranked_[b].scored_begin + end);
    });

    ParallelFor(num_rows, RowsPerRange(longest_ + 16 * p_.k), [&](int64_t begin, int64_t end) {
      const Lap lap(Phase::kSelection);
      TopK top_k;  // once per range: its buffer is kept from row to row
      for (int64_t row = begin; row < end; ++row) Select(row, top_k);
    });
  }

 private:
  // Rows of `cost` operations or so that make a range worth handing over.
  static int64_t RowsPerRange(int64_t cost) { return std::max<int64_t>(32768 / cost, 1); }

  float* Query(int64_t row) { return queries_.get() + row * query_size_; }

  // Score of the first scored block of a request; the others follow, head after head.
  float* Scores(int64_t b, int64_t n) {
    return scores_.get() + first_score_[b] + n * ranked_[b].num_scored();
  }

  void ComputeQuery(int64_t row) {
    const int64_t group = p_.num_heads / p_.num_kv_heads;
    const int64_t b = row / p_.num_kv_heads;
    const int64_t h = row % p_.num_kv_heads * group;
    const T* heads =
        static_cast<const T*>(p_.query) + b * p_.query_strides[0] + h * p_.query_strides[1];
    MeanQuery(heads, p_.query_strides[1], group, p_.head_dim, Query(row));
  }

  // Scores KV blocks [begin, end) of request b for all KV heads, in the order they lie in memory.
  void ComputeScores(int64_t b, int64_t begin, int64_t end) {
    const int32_t* table = p_.metadata_block_tables + b * p_.metadata_block_tables_stride;
    const int64_t rows = p_.rows_per_metadata_block;
    for (int64_t j = begin; j < end;) {
      const int64_t block = table[j / rows];
      const int64_t row = j % rows;
      const int64_t count = std::min(rows - row, end - j);
      const T* max = static_cast<const T*>(p_.maxblocks) + block * p_.maxblocks_strides[0] +
                     row * p_.maxblocks_strides[1];
      const T* min = static_cast<const T*>(p_.minblocks) + block * p_.minblocks_strides[0] +
                     row * p_.minblocks_strides[1];
      const int64_t first = j - ranked_[b].scored_begin;
      const ScoredRow<T> origin = {Query(b * p_.num_kv_heads), max, min, Scores(b, 0) + first};
      const Steps row_steps = {count, 0, p_.maxblocks_strides[1], p_.minblocks_strides[1], 1};
      const Steps head_steps = {p_.num_kv_heads, query_size_, p_.maxblocks_strides[2],
                                p_.minblocks_strides[2], ranked_[b].num_scored()};
      if (p_.maxblocks_strides[2] <= p_.maxblocks_strides[1]) {
        ScoreGrid(origin, row_steps, head_steps);
      } else {
        ScoreGrid(origin, head_steps, row_steps);
      }
      j += count;
    }
  }

  // From one row to the next of `count`, in elements.
  struct Steps {
    int64_t count;
    int64_t q;
    int64_t max;
    int64_t min;
    int64_t score;

    void Advance(ScoredRow<T>& row) const {
      row.q += q;
      row.max += max;
      row.min += min;
      row.score += score;
    }
  };

  // Scores a grid of rows, `inner` by `inner`.
  void ScoreGrid(ScoredRow<T> start, const Steps& outer, const Steps& inner) {
    ScoredRow<T> rows[kRowsAtOnce];
    int filled = 0;
    for (int64_t i = 0; i < outer.count; ++i, outer.Advance(start)) {
      ScoredRow<T> row = start;
      for (int64_t k = 0; k < inner.count; ++k, inner.Advance(row)) {
        rows[filled++] = row;
        if (filled < kRowsAtOnce) continue;
        ScoreRows<MinMaxScore>(rows, kRowsAtOnce, p_.head_dim);
        filled = 0;
      }
    }
    if (filled != 0) ScoreRows<MinMaxScore>(rows, filled, p_.head_dim);
  }

  void Select(int64_t row, TopK& top_k) {
    const int64_t b = row / p_.num_kv_heads;
    const int64_t n = row % p_.num_kv_heads;
    const RankedBlocks& ranked = ranked_[b];
    int32_t* out = p_.selected_indices + b * p_.selected_indices_strides[0] +
                   n * p_.selected_indices_strides[1];
    const int64_t num_forced = std::min(ranked.num_forced(), p_.k);
    for (int64_t i = 0; i < num_forced; ++i) out[i] = static_cast<int32_t>(ranked.Forced(i));
    int64_t num_selected = num_forced;
    const int64_t wanted = std::min(p_.k - num_forced, ranked.num_scored());
    if (wanted > 0) {
      num_selected += top_k.Select(Scores(b, n), ranked.num_scored(), ranked.scored_begin, wanted,
                                   out + num_forced);
    }
    std::fill(out + num_selected, out + p_.k, -1);
  }

  const QuestBlockSelectPagedParams& p_;
  const int64_t query_size_;                    // floats of a mean query
  int64_t longest_ = 0;                         // most scored blocks of a request
  std::vector<RankedBlocks> ranked_;            // [batch]
  std::vector<int64_t> first_score_;            // [batch], index of the request's first score
  hwy::AlignedFreeUniquePtr<float[]> queries_;  // [batch * num_kv_heads, query_size_]
  std::unique_ptr<float[]> scores_;             // per request [num_kv_heads, scored blocks]
};

void Run(const QuestBlockSelectPagedParams& p) {
  switch (p.dtype) {
    case DType::kFloat16:
      return Selection<hwy::float16_t>(p).Run();
    case DType::kBFloat16:
      return Selection<hwy::bfloat16_t>(p).Run();
    case DType::kFloat32:
      return Selection<float>(p).Run();
  }
}

}  // namespace
// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace select_attn::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace select_attn::cpu {

HWY_EXPORT(Run);

// Dispatches once per call, so the choice of target costs nothing inside the loops.
void QuestBlockSelectPaged(const QuestBlockSelectPagedParams& p) { HWY_DYNAMIC_DISPATCH(Run)(p); }

}  // namespace select_attn::cpu
#endif  // HWY_ONCE
