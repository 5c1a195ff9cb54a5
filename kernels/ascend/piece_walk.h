// How the rows of a selection are dealt to cores: which core scores what, and where it leaves the
// best of a head that another core has a part of.

#ifndef SELECT_ATTN_OPS_ASCEND_PIECE_WALK_H_
#define SELECT_ATTN_OPS_ASCEND_PIECE_WALK_H_

#include <cstdint>

#include "ascend/arguments.h"
#include "ascend/clamped_ranges.h"
#include "ascend/core_share.h"
#include "kernel_operator.h"

namespace select_attn::ascend {

// A part of the rows of one KV head of a request: its rows [first, end) of `num_rows`.
struct Piece {
  int64_t b;
  int64_t n;
  int64_t first;
  int64_t end;
  int64_t num_rows;

  __aicore__ inline bool is_whole() const { return first == 0 && end == num_rows; }
};

// The pieces of a core's share, in order. A request without scores has one row per KV head all the
// same, for the core that writes its result.
class PieceWalk {
 public:
  __aicore__ inline explicit PieceWalk(const QuestBlockSelectPagedArguments& arguments)
      : a_(arguments) {
    for (int64_t b = 0; b < a_.batch; ++b) total_ += RowsOf(b) * a_.num_kv_heads;
  }

  __aicore__ inline Share ShareOfCore(int64_t core) const {
    return ShareOf(core, a_.num_cores, total_);
  }

  __aicore__ inline void Begin(int64_t core) {
    share_ = ShareOfCore(core);
    position_ = share_.begin;
    first_of_request_ = 0;
    b_ = 0;
    rows_ = a_.batch > 0 ? RowsOf(0) : 0;
  }

  __aicore__ inline bool Next(Piece& piece) {
    if (position_ >= share_.end) return false;
    while (position_ >= first_of_request_ + rows_ * a_.num_kv_heads) {
      first_of_request_ += rows_ * a_.num_kv_heads;
      ++b_;
      rows_ = RowsOf(b_);
    }
    const int64_t inside = position_ - first_of_request_;
    const int64_t n = inside / rows_;
    const int64_t first = inside % rows_;
    const int64_t end = Smaller(rows_, first + share_.end - position_);
    piece = {b_, n, first, end, rows_};
    position_ += end - first;
    return true;
  }

  // Behind Next: where the piece's KV head ends in the row of all.
  __aicore__ inline int64_t EndOfHead(const Piece& piece) const {
    return position_ + piece.num_rows - piece.end;
  }

 private:
  __aicore__ inline int64_t RowsOf(int64_t b) const {
    return Larger(ClampedRanking(a_, b).num_scored, 1);
  }

  const QuestBlockSelectPagedArguments& a_;
  int64_t total_ = 0;
  Share share_ = {0, 0};
  int64_t position_ = 0;
  int64_t first_of_request_ = 0;
  int64_t b_ = 0;
  int64_t rows_ = 0;
};

// Where a core leaves the best of a piece. Of a cut head, the first piece is its core's last and
// the others are the first of theirs.
__aicore__ inline uint64_t PartialAddress(const QuestBlockSelectPagedArguments& a, int64_t core,
                                          bool is_first_of_head) {
  const int64_t list = core * kPartialLists + (is_first_of_head ? 1 : 0);
  return a.workspace + static_cast<uint64_t>(list * a.partial_list_bytes);
}

}  // namespace select_attn::ascend

#endif  // SELECT_ATTN_OPS_ASCEND_PIECE_WALK_H_
