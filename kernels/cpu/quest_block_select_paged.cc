// CPU backend of quest_block_select_paged, compiled once per SIMD target by foreach_target.h.
//
// Three passes over the batch: the mean query of every KV head; the scores of all blocks, in tiles
// over which the threads share even a single request; the selection of every (request, KV head).

#include "select_attn_ops/quest_block_select_paged.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "core/block_ranges.h"
#include "cpu/backend.h"
#include "cpu/parallel.h"
#include "cpu/tiles.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/quest_block_select_paged.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// After foreach_target.h
#include "cpu/row-inl.h"
#include "cpu/top_k-inl.h"
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

// NaN if either is. Max alone may return the other one, depending on the target.
HWY_INLINE VF MaxOrNaN(VF a, VF b) {
  const auto max = hn::IfThenElse(hn::IsNaN(b), b, hn::Max(a, b));
  return hn::IfThenElse(hn::IsNaN(a), a, max);
}

// The Quest score: an upper bound on the dot product of the query with any key between min and max.
struct MinMaxScore {
  static HWY_INLINE VF Term(VF q, VF max, VF min) {
    return MaxOrNaN(hn::Mul(q, max), hn::Mul(q, min));
  }
};

// Sum of Score::Term over a row of head_dim elements; q as MeanQuery leaves it. Two sums, because
// one would wait on its own latency.
template <class Score, typename T>
HWY_INLINE float ScoreRow(const float* HWY_RESTRICT q, const T* HWY_RESTRICT max,
                          const T* HWY_RESTRICT min, int64_t head_dim) {
  const DF df;
  const int64_t step = LoadSize();
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
  return hn::GetLane(hn::SumOfLanes(df, hn::Add(sum_a, sum_b)));
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
    // Not zeroed: every element is written before it is read.
    queries_.reset(new float[static_cast<size_t>(p.batch * p.num_kv_heads * query_size_)]);
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
      ComputeScores(b, ranked_[b].scored_begin + begin, ranked_[b].scored_begin + end);
    });

    ParallelFor(num_rows, RowsPerRange(longest_ + 16 * p_.k), [&](int64_t begin, int64_t end) {
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
      if (p_.maxblocks_strides[2] <= p_.maxblocks_strides[1]) {
        for (int64_t r = 0; r < count; ++r) {
          for (int64_t n = 0; n < p_.num_kv_heads; ++n) ScoreOne(b, n, first, r, max, min);
        }
      } else {
        for (int64_t n = 0; n < p_.num_kv_heads; ++n) {
          for (int64_t r = 0; r < count; ++r) ScoreOne(b, n, first, r, max, min);
        }
      }
      j += count;
    }
  }

  // `max` and `min` are head 0 of the metadata row whose score has the index `first`; scores the
  // r-th row after it.
  HWY_INLINE void ScoreOne(int64_t b, int64_t n, int64_t first, int64_t r, const T* max,
                           const T* min) {
    max += r * p_.maxblocks_strides[1] + n * p_.maxblocks_strides[2];
    min += r * p_.minblocks_strides[1] + n * p_.minblocks_strides[2];
    Scores(b, n)[first + r] =
        ScoreRow<MinMaxScore>(Query(b * p_.num_kv_heads + n), max, min, p_.head_dim);
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
      top_k.Start(wanted);
      top_k.Add(Scores(b, n), ranked.num_scored(), ranked.scored_begin);
      num_selected += top_k.Take(out + num_forced);
    }
    std::fill(out + num_selected, out + p_.k, -1);
  }

  const QuestBlockSelectPagedParams& p_;
  const int64_t query_size_;          // floats of a mean query
  int64_t longest_ = 0;               // most scored blocks of a request
  std::vector<RankedBlocks> ranked_;  // [batch]
  std::vector<int64_t> first_score_;  // [batch], index of the request's first score
  std::unique_ptr<float[]> queries_;  // [batch * num_kv_heads, query_size_]
  std::unique_ptr<float[]> scores_;   // per request [num_kv_heads, scored blocks]
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
