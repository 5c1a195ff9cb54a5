// The walk of quest_block_select_paged through the metadata of a request: row after row as they lie
// in memory, whatever the layout, each with the query it is scored against and the place of its
// score. Included once per SIMD target, hence the toggle.

#if defined(SELECT_ATTN_OPS_CPU_METADATA_STRAND_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SELECT_ATTN_OPS_CPU_METADATA_STRAND_INL_H_
#undef SELECT_ATTN_OPS_CPU_METADATA_STRAND_INL_H_
#else
#define SELECT_ATTN_OPS_CPU_METADATA_STRAND_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include "cpu/score-inl.h"
#include "hwy/highway.h"
#include "select_attn_ops/quest_block_select_paged.h"

HWY_BEFORE_NAMESPACE();
namespace select_attn::cpu {
namespace HWY_NAMESPACE {

// What belongs to a request, head after head.
struct ScoredRequest {
  const int32_t* table;  // of its metadata blocks
  const float* queries;  // of its KV heads
  int64_t query_stride;
  int64_t first_block;  // the KV block that scores[0] belongs to
  float* scores;
  int64_t scores_stride;
};

template <typename T>
class MetadataStrand {
 public:
  // Of no rows.
  MetadataStrand() = default;

  // KV blocks [begin, end) of `request`, all heads.
  MetadataStrand(const QuestBlockSelectPagedParams& p, const ScoredRequest& request, int64_t begin,
                 int64_t end)
      : p_(&p), request_(request), next_(begin), end_(end) {
    if (begin < end) EnterMetadataBlock();
  }

  bool done() const { return inner_left_ == 0; }

  ScoredRow<T> Next() {
    const ScoredRow<T> row = row_;
    if (--inner_left_ > 0) {
      inner_.Advance(row_);
    } else if (--outer_left_ > 0) {
      outer_.Advance(first_);
      row_ = first_;
      inner_left_ = inner_count_;
    } else if (next_ < end_) {
      EnterMetadataBlock();
    }
    return row;
  }

 private:
  // From one row to the next, in bytes: GCC would multiply all four by the size of their elements
  // at every row.
  struct Step {
    int64_t q;
    int64_t max;
    int64_t min;
    int64_t score;

    HWY_INLINE void Advance(ScoredRow<T>& row) const {
      row.q = Behind(row.q, q);
      row.max = Behind(row.max, max);
      row.min = Behind(row.min, min);
      row.score = Behind(row.score, score);
    }

   private:
    template <typename E>
    static HWY_INLINE E* Behind(E* from, int64_t bytes) {
      return reinterpret_cast<E*>(reinterpret_cast<uintptr_t>(from) + bytes);
    }
  };

  // Turns to the rows of KV block next_ and of those behind it in the same metadata block.
  // Not inlined, so that the loop over the rows keeps its registers.
  HWY_NOINLINE void EnterMetadataBlock() {
    const int64_t* max = p_->maxblocks_strides;
    const int64_t* min = p_->minblocks_strides;
    const int64_t column = next_ / p_->rows_per_metadata_block;
    const int64_t row = next_ % p_->rows_per_metadata_block;
    const int64_t count = std::min(p_->rows_per_metadata_block - row, end_ - next_);
    const int64_t block = request_.table[column];
    first_ = {request_.queries,
              static_cast<const T*>(p_->maxblocks) + block * max[0] + row * max[1],
              static_cast<const T*>(p_->minblocks) + block * min[0] + row * min[1],
              request_.scores + (next_ - request_.first_block)};
    row_ = first_;
    constexpr int64_t kItem = sizeof(T);
    constexpr int64_t kFloat = sizeof(float);
    const Step next_row = {0, max[1] * kItem, min[1] * kItem, kFloat};
    const Step next_head = {request_.query_stride * kFloat, max[2] * kItem, min[2] * kItem,
                            request_.scores_stride * kFloat};
    const bool heads_inside = p_->num_kv_heads > 1 && max[2] <= max[1];
    inner_ = heads_inside ? next_head : next_row;
    outer_ = heads_inside ? next_row : next_head;
    inner_count_ = heads_inside ? p_->num_kv_heads : count;
    inner_left_ = inner_count_;
    outer_left_ = heads_inside ? count : p_->num_kv_heads;
    next_ += count;
  }

  const QuestBlockSelectPagedParams* p_ = nullptr;
  ScoredRequest request_ = {};
  int64_t next_ = 0;  // KV block behind those of the rows below
  int64_t end_ = 0;
  ScoredRow<T> row_ = {};    // the next one
  ScoredRow<T> first_ = {};  // of the inner ones
  Step inner_ = {};
  Step outer_ = {};
  int64_t inner_count_ = 0;
  int64_t inner_left_ = 0;
  int64_t outer_left_ = 0;
};

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace select_attn::cpu
HWY_AFTER_NAMESPACE();

#endif  // SELECT_ATTN_OPS_CPU_METADATA_STRAND_INL_H_
