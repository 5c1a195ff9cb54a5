// CPU backend of quest_block_select_paged, compiled once per SIMD target by foreach_target.h.
//
// Passes over the batch: the mean query of every KV head; the scores of all blocks, in tiles over
// which the threads share even a single request, or in the order of the pool; the selection of
// every (request, KV head), for requests with few scores while others are still being scored. This
// file says what is done in which order; metadata_strand-inl.h walks through the metadata,
// row_pipeline-inl.h asks for it in time, score-inl.h and top_k-inl.h have the arithmetic.

#include "select_attn_ops/quest_block_select_paged.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "core/block_ranges.h"
#include "cpu/backend.h"
#include "cpu/parallel.h"
#include "cpu/pool_order.h"
#include "cpu/prefetch.h"
#include "cpu/stopwatch.h"
#include "cpu/tiles.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/quest_block_select_paged.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// After foreach_target.h
#include "cpu/metadata_strand-inl.h"
#include "cpu/row_pipeline-inl.h"
#include "cpu/score-inl.h"
#include "cpu/top_k-inl.h"
#include "hwy/aligned_allocator.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace select_attn::cpu {
namespace HWY_NAMESPACE {
namespace {

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

    const PoolOrder order = HasShortMetadataBlocks() ? MetadataBlocksInPool() : PoolOrder();
    if (order.pays()) {
      ScoreInPoolOrder(order);
    } else {
      ScoreInTiles();
    }

    std::vector<int64_t> requests;  // that are not selected yet
    for (int64_t b = 0; b < p_.batch; ++b) {
      if (order.pays() || !SelectsAtOnce(b)) requests.push_back(b);
    }
    const int64_t heads = p_.num_kv_heads;
    const auto select = [&](int64_t begin, int64_t end) {
      const Lap lap(Phase::kSelection);
      TopK top_k;  // once for all: it keeps its buffers from row to row
      for (int64_t i = begin; i < end; ++i) {
        SelectRow(requests[i / heads] * heads + i % heads, top_k);
      }
    };
    ParallelFor(static_cast<int64_t>(requests.size()) * heads, RowsPerRange(longest_ + 16 * p_.k),
                select);
  }

 private:
  using Strand = MetadataStrand<T>;

  // Rows of `cost` operations or so that make a range worth handing over.
  static int64_t RowsPerRange(int64_t cost) { return std::max<int64_t>(32768 / cost, 1); }

  // Bytes of metadata per KV block.
  int64_t RowBytes() const { return 2 * p_.num_kv_heads * p_.head_dim * int64_t{sizeof(T)}; }

  float* Query(int64_t row) const { return queries_.get() + row * query_size_; }

  // Score of the first scored block of a request; the others follow, head after head.
  float* Scores(int64_t b, int64_t n) const {
    return scores_.get() + first_score_[b] + n * ranked_[b].num_scored();
  }

  ScoredRequest Scored(int64_t b) const {
    const RankedBlocks& ranked = ranked_[b];
    return {p_.metadata_block_tables + b * p_.metadata_block_tables_stride,
            Query(b * p_.num_kv_heads),
            query_size_,
            ranked.scored_begin,
            Scores(b, 0),
            ranked.num_scored()};
  }

  void ComputeQuery(int64_t row) {
    const int64_t group = p_.num_heads / p_.num_kv_heads;
    const int64_t b = row / p_.num_kv_heads;
    const int64_t h = row % p_.num_kv_heads * group;
    const T* heads =
        static_cast<const T*>(p_.query) + b * p_.query_strides[0] + h * p_.query_strides[1];
    MeanQuery(heads, p_.query_strides[1], group, p_.head_dim, Query(row));
  }

  // Short metadata blocks in any order are asked for once too: twice gained nothing.
  Ask ask() const {
    return HasGaps(p_.maxblocks_strides) || HasGaps(p_.minblocks_strides) ? Ask::kTwice
                                                                          : Ask::kOnce;
  }

  // Whether there is anything between the rows of a metadata block. Those that go backwards count
  // as dense.
  bool HasGaps(const int64_t* strides) const {
    const int64_t rows = p_.rows_per_metadata_block;
    const int64_t span = (rows - 1) * strides[1] + (p_.num_kv_heads - 1) * strides[2] + p_.head_dim;
    return span > rows * p_.num_kv_heads * p_.head_dim;
  }

  bool HasShortMetadataBlocks() const {
    return p_.rows_per_metadata_block * RowBytes() <= 2 * kShortBlockBytes;
  }

  // The metadata blocks that are scored.
  PoolOrder MetadataBlocksInPool() const {
    const Lap lap(Phase::kScoring);
    const int64_t rows = p_.rows_per_metadata_block;
    return PoolOrder(
        p_.batch,
        [&](int64_t b) {
          const RankedBlocks& ranked = ranked_[b];
          if (ranked.num_scored() == 0) return BlockRange{0, 0};
          return BlockRange{ranked.scored_begin / rows, (ranked.scored_end - 1) / rows + 1};
        },
        [&](int64_t b) { return p_.metadata_block_tables + b * p_.metadata_block_tables_stride; });
  }

  // Scores all blocks in the order of the pool, several metadata blocks side by side.
  void ScoreInPoolOrder(const PoolOrder& order) {
    const int64_t rows = p_.rows_per_metadata_block;
    order.ParallelTake(rows * RowBytes(), [&](PoolOrder::Queue& queue) {
      const Lap lap(Phase::kScoring);
      RowPipeline<T> pipeline(p_.head_dim, ask());
      Strand strands[kPlacesInTurn];
      bool more = true;
      for (bool found = true; found;) {
        found = false;
        for (Strand& strand : strands) {
          PoolOrder::Block block;
          if (strand.done() && more && (more = queue.Take(block))) {
            const RankedBlocks& ranked = ranked_[block.request];
            const int64_t begin = std::max(block.number * rows, ranked.scored_begin);
            const int64_t end = std::min((block.number + 1) * rows, ranked.scored_end);
            strand = Strand(p_, Scored(block.request), begin, end);
          }
          if (strand.done()) continue;
          pipeline.Push(strand.Next());
          found = true;
        }
      }
      pipeline.Finish();
    });
  }

  // Scores all blocks, request by request, and selects those of requests that can be at once.
  void ScoreInTiles() {
    const Tiles tiles(p_.batch, RowBytes(), [&](int64_t b) { return ranked_[b].num_scored(); });
    std::vector<std::atomic<int64_t>> tiles_left(static_cast<size_t>(p_.batch));
    for (int64_t b = 0; b < p_.batch; ++b) tiles_left[b] = tiles.count(b);
    tiles.ParallelTake([&](Tiles::Queue& queue) {
      const Lap lap(Phase::kScoring);
      TileScorer scorer(*this, tiles_left);
      for (Tiles::Tile tile; queue.Take(tile);) scorer.Score(tile);
      scorer.Finish();
    });
  }

  // What one thread does in ScoreInTiles. The memory is kept busy from tile to tile: the last rows
  // of a tile are scored, and the request selected that it completes, while the next is under way.
  class TileScorer {
   public:
    TileScorer(Selection& selection, std::vector<std::atomic<int64_t>>& tiles_left)
        : selection_(selection),
          tiles_left_(tiles_left),
          pipeline_(selection.p_.head_dim, selection.ask()) {}

    void Score(const Tiles::Tile& tile) {
      const QuestBlockSelectPagedParams& p = selection_.p_;
      const ScoredRequest request = selection_.Scored(tile.b);
      const int64_t begin = request.first_block + tile.begin;
      const int64_t end = request.first_block + tile.end;
      Strand strands[kPlacesInTurn];
      int64_t from = begin;
      for (int64_t i = 0; i < kPlacesInTurn; ++i) {
        // Not quite equal parts: streams a power of two apart would share the same few lines of a
        // cache. None is longer than the last, with which the loop below ends.
        const int64_t to =
            begin + (end - begin) * (i + 1) / kPlacesInTurn - (kPlacesInTurn - 1 - i);
        strands[i] = Strand(p, request, from, std::max(from, to));
        from = std::max(from, to);
      }
      while (!strands[kPlacesInTurn - 1].done()) {
        for (Strand& strand : strands) {
          if (!strand.done()) pipeline_.Push(strand.Next());
        }
        if (HWY_UNLIKELY(pipeline_.num_scored() >= next_work_)) Work();
      }
      pushed_.push_back({tile.b, pipeline_.num_pushed()});
      PlanWork();
    }

    void Finish() {
      pipeline_.Finish();
      CountScoredTiles();
      SelectAll();
    }

   private:
    struct PushedTile {
      int64_t b;
      uint64_t end;  // rows that the pipeline had got with its last one
    };

    static constexpr uint64_t kNever = std::numeric_limits<uint64_t>::max();
    // Rows to score between two selections: about as long as a selection takes the memory works on
    // with what it has been asked for.
    static constexpr uint64_t kRowsBetween = 8;

    void Work() {
      CountScoredTiles();
      if (!unselected_.empty()) SelectNext();
      PlanWork();
    }

    void PlanWork() {
      if (!unselected_.empty()) {
        next_work_ = pipeline_.num_scored() + kRowsBetween;
      } else {
        next_work_ = pushed_.empty() ? kNever : pushed_.front().end;
      }
    }

    // A request whose tiles are all scored, by whichever threads, is there to be selected.
    void CountScoredTiles() {
      while (!pushed_.empty() && pushed_.front().end <= pipeline_.num_scored()) {
        const int64_t b = pushed_.front().b;
        pushed_.pop_front();
        if (--tiles_left_[b] > 0 || !selection_.SelectsAtOnce(b)) continue;
        SelectAll();  // of the request before
        const int64_t heads = selection_.p_.num_kv_heads;
        unselected_ = {b * heads, (b + 1) * heads};
      }
    }

    void SelectAll() {
      while (!unselected_.empty()) SelectNext();
    }

    void SelectNext() {
      const Lap lap(Phase::kSelection, /*within=*/Phase::kScoring);
      selection_.SelectRow(unselected_.begin++, top_k_);
    }

    Selection& selection_;
    std::vector<std::atomic<int64_t>>& tiles_left_;
    RowPipeline<T> pipeline_;
    std::deque<PushedTile> pushed_;   // whose last rows are in the pipeline
    BlockRange unselected_ = {0, 0};  // rows of the result whose scores are complete
    TopK top_k_;                      // once for all: it keeps its buffers from row to row
    uint64_t next_work_ = kNever;     // rows that are scored when there is something to do
  };

  // Whether a request's scores are so few that they are still in the cache of the thread that
  // computed the last of them, and not worth sharing out.
  bool SelectsAtOnce(int64_t b) const {
    constexpr int64_t kFewScores = 16384;
    const int64_t num_scores = ranked_[b].num_scored() * p_.num_kv_heads;
    return num_scores > 0 && num_scores <= kFewScores;
  }

  void SelectRow(int64_t row, TopK& top_k) {
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
