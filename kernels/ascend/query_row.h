// The query of a KV head, and the score of rows of metadata by it.
//
// score = sum_d max(q[d] * max[d], q[d] * min[d]). Where q[d] is neither zero nor infinite nor NaN,
// the larger product is q[d] times the larger of the two bounds if q[d] > 0, of the smaller if
// q[d] < 0, to the last bit and for any bounds. So a query all of whose channels are such takes the
// bounds apart by masks before it multiplies:
//
//   vector repeats per row of 128            float16  bfloat16  float32
//   larger and smaller bounds, masked            2        4         4
//   cast to float32                              2        4         -
//   product with q, 64 channels onto 64          2        2         2
//   sum of 64                                    1        1         1
//                                                7       11         7
//
// Any other query forms both products, with 12, 12 and 8 repeats. Which way is taken depends on the
// query alone, so scores of a row of the result compare.

#ifndef SELECT_ATTN_OPS_ASCEND_QUERY_ROW_H_
#define SELECT_ATTN_OPS_ASCEND_QUERY_ROW_H_

#include <cstdint>
#include <type_traits>

#include "ascend/arguments.h"
#include "ascend/clamped_ranges.h"
#include "kernel_operator.h"

namespace select_attn::ascend {

// T is half, bfloat16_t or float.
template <typename T>
class QueryRow {
 public:
  static constexpr bool kIsFloat32 = std::is_same_v<T, float>;
  // Elements of a tile of maxima, and of minima: 16 KiB each.
  static constexpr int64_t kTileElements = int64_t{16} * 1024 / static_cast<int64_t>(sizeof(T));
  static constexpr int64_t kMostTileRows = 128;

  __aicore__ inline QueryRow() {}

  // Rows per tile, a multiple of 8, so that scores stay aligned.
  __aicore__ static inline int64_t TileRows(int64_t head_dim) {
    return Smaller(kMostTileRows, kTileElements / head_dim / 8 * 8);
  }

  __aicore__ inline void Init(AscendC::TPipe* pipe, int64_t head_dim) {
    dim_ = static_cast<int32_t>(head_dim);
    pipe->InitBuffer(query_buffer_, kMostHeadDim * sizeof(float));
    pipe->InitBuffer(divisor_buffer_, kMostHeadDim * sizeof(float));
    if constexpr (!kIsFloat32) pipe->InitBuffer(wide_buffer_, kTileElements * sizeof(float));
    pipe->InitBuffer(sums_buffer_, kMostTileRows * kLanes * sizeof(float));
  }

  // Adds the query heads in their order. The first call of a KV head sets, the others add.
  __aicore__ inline void AddHeads(const AscendC::LocalTensor<T>& heads, int64_t count,
                                  bool is_first) {
    const AscendC::LocalTensor<float> query = query_buffer_.template Get<float>();
    AscendC::LocalTensor<float> wide;
    if constexpr (kIsFloat32) {
      wide = heads;
    } else {
      wide = wide_buffer_.template Get<float>();
      AscendC::Cast(wide, heads, AscendC::RoundMode::CAST_NONE,
                    static_cast<uint32_t>(count * dim_));
      AscendC::PipeBarrier<PIPE_V>();
    }
    for (int32_t h = 0; h < static_cast<int32_t>(count); ++h) {
      if (is_first && h == 0) {
        AscendC::Muls(query, wide, 1.0f, dim_);
      } else {
        AscendC::Add(query, query, wide[h * dim_], dim_);
      }
      AscendC::PipeBarrier<PIPE_V>();
    }
  }

  // Divides by the number of heads and looks at the signs.
  __aicore__ inline void Finish(int64_t num_heads) {
    const AscendC::LocalTensor<float> query = query_buffer_.template Get<float>();
    if (num_heads > 1) {
      const AscendC::LocalTensor<float> divisor = divisor_buffer_.template Get<float>();
      AscendC::Duplicate(divisor, static_cast<float>(num_heads), dim_);
      AscendC::PipeBarrier<PIPE_V>();
      AscendC::Div(query, query, divisor, dim_);
    }
    AscendC::PipeBarrier<PIPE_ALL>();
    const AscendC::LocalTensor<uint32_t> bits = query.template ReinterpretCast<uint32_t>();
    is_regular_ = true;
    for (int32_t c = 0; c < kMostChunks; ++c) positive_[c] = negative_[c] = 0;
    for (int32_t d = 0; d < dim_; ++d) {
      const uint32_t channel = bits.GetValue(static_cast<uint32_t>(d));
      const uint32_t magnitude = channel & 0x7FFFFFFFu;
      if (magnitude == 0 || magnitude >= 0x7F800000u) is_regular_ = false;
      const uint64_t lane = uint64_t{1} << (d % kLanes);
      uint64_t* signs = (channel >> 31) != 0 ? negative_ : positive_;
      signs[d / kLanes] |= lane;
    }
  }

  // Scores `rows` rows of bounds. `Release` gives the tile's buffer back as soon as it is read.
  template <typename Release>
  __aicore__ inline void Score(const AscendC::LocalTensor<T>& highest,
                               const AscendC::LocalTensor<T>& lowest, int32_t rows,
                               const AscendC::LocalTensor<float>& scores, const Release& release) {
    if (is_regular_) {
      ScoreByBounds(highest, lowest, rows, scores, release);
    } else {
      ScoreByProducts(highest, lowest, rows, scores, release);
    }
  }

 private:
  static constexpr int32_t kLanes = 64;  // floats of a repeat
  static constexpr int32_t kBlockFloats = 8;
  static constexpr int32_t kMostChunks = static_cast<int32_t>(kMostHeadDim) / kLanes;

  __aicore__ inline int32_t ChunkLanes(int32_t first) const {
    return dim_ - first < kLanes ? dim_ - first : kLanes;
  }

  // In place: `highest` takes the bound that makes the larger product.
  template <typename U>
  __aicore__ inline void TakeBounds(const AscendC::LocalTensor<U>& highest,
                                    const AscendC::LocalTensor<U>& lowest, int32_t rows) {
    constexpr auto kBytes = static_cast<int32_t>(sizeof(U));
    constexpr int32_t kChunks = 4 / kBytes;  // of 64 channels, in a repeat
    const auto row_blocks = static_cast<uint8_t>(dim_ * kBytes / 32);
    const AscendC::BinaryRepeatParams by_row(1, 1, 1, row_blocks, row_blocks, row_blocks);
    const auto repeats = static_cast<uint8_t>(rows);
    for (int32_t first = 0; first < dim_; first += kChunks * kLanes) {
      const int32_t c = first / kLanes;
      uint64_t up[2] = {positive_[c], kChunks == 2 ? positive_[c + 1] : 0};
      uint64_t down[2] = {negative_[c], kChunks == 2 ? negative_[c + 1] : 0};
      const AscendC::LocalTensor<U> to = highest[first];
      if ((up[0] | up[1]) != 0) AscendC::Max(to, to, lowest[first], up, repeats, by_row);
      AscendC::PipeBarrier<PIPE_V>();  // the same blocks, though not the same lanes
      if ((down[0] | down[1]) != 0) AscendC::Min(to, to, lowest[first], down, repeats, by_row);
      AscendC::PipeBarrier<PIPE_V>();
    }
  }

  // Multiplies rows by the query in place.
  __aicore__ inline void MultiplyRows(const AscendC::LocalTensor<float>& values, int32_t rows) {
    const AscendC::LocalTensor<float> query = query_buffer_.template Get<float>();
    const auto row_blocks = static_cast<uint8_t>(dim_ / kBlockFloats);
    for (int32_t first = 0; first < dim_; first += kLanes) {
      AscendC::Mul(values[first], values[first], query[first],
                   static_cast<uint64_t>(ChunkLanes(first)), static_cast<uint8_t>(rows),
                   AscendC::BinaryRepeatParams(1, 1, 1, row_blocks, row_blocks, 0));
    }
    AscendC::PipeBarrier<PIPE_V>();
  }

  template <typename Release>
  __aicore__ inline void ScoreByBounds(const AscendC::LocalTensor<T>& highest,
                                       const AscendC::LocalTensor<T>& lowest, int32_t rows,
                                       const AscendC::LocalTensor<float>& scores,
                                       const Release& release) {
    const AscendC::LocalTensor<float> sums = sums_buffer_.template Get<float>();
    const auto count = static_cast<uint32_t>(rows * dim_);
    if constexpr (kIsFloat32) {
      TakeBounds(highest, lowest, rows);
      SumProducts(sums, highest, rows);
      release();
    } else {
      const AscendC::LocalTensor<float> wide = wide_buffer_.template Get<float>();
      if constexpr (std::is_same_v<T, half>) {
        TakeBounds(highest, lowest, rows);
        AscendC::Cast(wide, highest, AscendC::RoundMode::CAST_NONE, count);
        AscendC::PipeBarrier<PIPE_V>();
      } else {
        AscendC::Cast(wide, highest, AscendC::RoundMode::CAST_NONE, count);
        AscendC::Cast(sums, lowest, AscendC::RoundMode::CAST_NONE, count);
        AscendC::PipeBarrier<PIPE_V>();
        TakeBounds(wide, sums, rows);
      }
      release();
      SumProducts(sums, wide, rows);
    }
    SumLanes(scores, sums, rows, kLanes / kBlockFloats);
  }

  // Products of a row's channels with the query, those of all chunks added onto the first 64.
  __aicore__ inline void SumProducts(const AscendC::LocalTensor<float>& sums,
                                     const AscendC::LocalTensor<float>& values, int32_t rows) {
    const AscendC::LocalTensor<float> query = query_buffer_.template Get<float>();
    const AscendC::BinaryRepeatParams by_row(1, 1, 1, kLanes / kBlockFloats,
                                             static_cast<uint8_t>(dim_ / kBlockFloats), 0);
    const auto repeats = static_cast<uint8_t>(rows);
    AscendC::Mul(sums, values, query, static_cast<uint64_t>(ChunkLanes(0)), repeats, by_row);
    AscendC::PipeBarrier<PIPE_V>();
    for (int32_t first = kLanes; first < dim_; first += kLanes) {
      AscendC::MulAddDst(sums, values[first], query[first],
                         static_cast<uint64_t>(ChunkLanes(first)), repeats, by_row);
      AscendC::PipeBarrier<PIPE_V>();
    }
  }

  template <typename Release>
  __aicore__ inline void ScoreByProducts(const AscendC::LocalTensor<T>& highest,
                                         const AscendC::LocalTensor<T>& lowest, int32_t rows,
                                         const AscendC::LocalTensor<float>& scores,
                                         const Release& release) {
    const int32_t count = rows * dim_;
    AscendC::LocalTensor<float> products;
    AscendC::LocalTensor<float> other_products;
    if constexpr (kIsFloat32) {
      products = highest;
      other_products = lowest;
    } else {
      products = wide_buffer_.template Get<float>();
      other_products = sums_buffer_.template Get<float>();
      AscendC::Cast(products, highest, AscendC::RoundMode::CAST_NONE, static_cast<uint32_t>(count));
      AscendC::Cast(other_products, lowest, AscendC::RoundMode::CAST_NONE,
                    static_cast<uint32_t>(count));
      AscendC::PipeBarrier<PIPE_V>();
      release();
    }
    MultiplyRows(products, rows);
    MultiplyRows(other_products, rows);
    AscendC::Max(products, products, other_products, count);
    AscendC::PipeBarrier<PIPE_V>();
    const auto row_blocks = static_cast<uint8_t>(dim_ / kBlockFloats);
    for (int32_t first = kLanes; first < dim_; first += kLanes) {
      AscendC::Add(products, products, products[first], static_cast<uint64_t>(ChunkLanes(first)),
                   static_cast<uint8_t>(rows),
                   AscendC::BinaryRepeatParams(1, 1, 1, row_blocks, row_blocks, row_blocks));
      AscendC::PipeBarrier<PIPE_V>();
    }
    SumLanes(scores, products, rows, row_blocks);
    if constexpr (kIsFloat32) release();
  }

  // The sum of the first 64 floats of every row, or of all where there are fewer.
  __aicore__ inline void SumLanes(const AscendC::LocalTensor<float>& scores,
                                  const AscendC::LocalTensor<float>& values, int32_t rows,
                                  int32_t row_blocks) {
    AscendC::WholeReduceSum(scores, values, ChunkLanes(0), rows, 1, 1, row_blocks);
    AscendC::PipeBarrier<PIPE_V>();
  }

  int32_t dim_ = 0;
  bool is_regular_ = true;
  // Channels by the sign of the query, 64 to a word.
  uint64_t positive_[kMostChunks] = {};
  uint64_t negative_[kMostChunks] = {};
  AscendC::TBuf<AscendC::TPosition::VECCALC> query_buffer_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> divisor_buffer_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> wide_buffer_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> sums_buffer_;
};

}  // namespace select_attn::ascend

#endif  // SELECT_ATTN_OPS_ASCEND_QUERY_ROW_H_
