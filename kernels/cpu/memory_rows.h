// The memory of a strided tensor, as a reader of its bytes sees it.

#ifndef SELECT_ATTN_OPS_CPU_MEMORY_ROWS_H_
#define SELECT_ATTN_OPS_CPU_MEMORY_ROWS_H_

#include <dlpack/dlpack.h>

#include <algorithm>
#include <cstdint>

namespace select_attn::cpu {

// A tensor's bytes in the order of their addresses: rows without gaps, in two nested levels.
struct MemoryRows {
  // Throws Error (kValueError) where a tensor is not on the CPU, has elements that share memory, or
  // needs more levels.
  static MemoryRows Of(const DLTensor& tensor);

  int64_t size() const { return outer_count * inner_count * row_bytes; }

  // A place not behind `position`, a count of bytes without gaps, where they may be cut in two so
  // that no short row is cut, nor a cache line of a long one that starts with a cache line.
  int64_t CutBefore(int64_t position) const {
    if (position >= size()) return size();
    const int64_t in_row = position % row_bytes;
    return position - (row_bytes <= kPiece ? in_row : in_row % kPiece);
  }

  bool IsLike(const MemoryRows& other) const {
    return row_bytes == other.row_bytes && inner_count == other.inner_count &&
           inner_stride == other.inner_stride && outer_count == other.outer_count &&
           outer_stride == other.outer_stride;
  }

  static constexpr int64_t kPiece = 4096;

  const uint8_t* data = nullptr;
  int64_t row_bytes = 1;
  int64_t inner_count = 1;   // rows in a group
  int64_t inner_stride = 0;  // bytes from row to row
  int64_t outer_count = 1;   // groups
  int64_t outer_stride = 0;  // bytes from group to group
};

// Walks along a part of MemoryRows, run by run.
class MemoryCursor {
 public:
  MemoryCursor() = default;

  // For the bytes [begin, end), counted without the gaps. `rows` must outlive the cursor.
  MemoryCursor(const MemoryRows& rows, int64_t begin, int64_t end)
      : rows_(&rows), left_(end - begin) {
    if (left_ == 0) return;
    const int64_t row = begin / rows.row_bytes;
    const int64_t in_row = begin % rows.row_bytes;
    const int64_t in_group = row % rows.inner_count;
    group_ = rows.data + row / rows.inner_count * rows.outer_stride;
    row_ = group_ + in_group * rows.inner_stride;
    rows_left_ = rows.inner_count - in_group;
    at_ = row_ + in_row;
    run_ = std::min(rows.row_bytes - in_row, left_);
  }

  const uint8_t* at() const { return at_; }
  int64_t run() const { return run_; }  // bytes from at() to the next gap; 0 at the end

  // Not beyond the run.
  void Advance(int64_t bytes) {
    at_ += bytes;
    run_ -= bytes;
    left_ -= bytes;
    if (run_ > 0 || left_ == 0) return;
    if (--rows_left_ > 0) {
      row_ += rows_->inner_stride;
    } else {
      rows_left_ = rows_->inner_count;
      group_ += rows_->outer_stride;
      row_ = group_;
    }
    at_ = row_;
    run_ = std::min(rows_->row_bytes, left_);
  }

 private:
  const MemoryRows* rows_ = nullptr;
  const uint8_t* group_ = nullptr;
  const uint8_t* row_ = nullptr;
  const uint8_t* at_ = nullptr;
  int64_t rows_left_ = 0;  // in the group, the current one included
  int64_t run_ = 0;        // bytes
  int64_t left_ = 0;       // bytes
};

}  // namespace select_attn::cpu

#endif  // SELECT_ATTN_OPS_CPU_MEMORY_ROWS_H_
