// The query of a KV head, and the score of rows of metadata by it.
//
// score = sum_d max(q[d] * max[d], q[d] * min[d]). Where q[d] is neither zero nor infinite nor NaN,
// the larger product is q[d] times the larger of the two bounds if q[d] > 0, of the smaller if
// q[d] < 0, to the last bit and for any bounds. Such channels are regular; their bounds are taken
// apart by masks before anything is multiplied:
//
//   vector repeats per row of 128            float16  bfloat16  float32
//   larger and smaller bounds, masked            2        4         4
//   cast to float32                              2        4         -
//   product with q, 64 channels onto 64          2        2         2
//   sum of 64                                    1        1         1
//                                                7       11         7
//
// On the other channels both products are formed, since zero times infinity is NaN. In float16 they
// come first: 0, infinity and NaN, and so the products, are the same there; 2 repeats more. Else in
// the 64 channels around: two products and their maximum cost what two bounds and a product do, but
// those of a second 64 need an addition, 1 repeat more. What is done depends on the query alone, so
// scores of a row of the result compare.

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
  static constexpr bool kIsHalf = std::is_same_v<T, half>;
  static constexpr bool kIsBFloat16 = std::is_same_v<T, bfloat16_t>;
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
    if constexpr (kIsBFloat16) pipe->InitBuffer(wide_lowest_buffer_, kTileElements * sizeof(float));
    if constexpr (kIsHalf) pipe->InitBuffer(irregular_buffer_, kMostHeadDim * sizeof(T));
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

  // Divides by the number of heads and looks at the channels.
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
    for (int32_t c = 0; c < kMostChunks; ++c) positive_[c] = negative_[c] = irregular_[c] = 0;
    is_regular_ = true;
    for (int32_t d = 0; d < dim_; ++d) {
      const uint32_t channel = bits.GetValue(static_cast<uint32_t>(d));
      const uint32_t magnitude = channel & kMagnitude;
      const uint64_t lane = uint64_t{1} << (d % kLanes);
      if (magnitude == 0 || magnitude >= kInfinity) {
        irregular_[d / kLanes] |= lane;
        is_regular_ = false;
        if constexpr (kIsHalf) SetAside(d, channel);
      } else if (channel == magnitude) {
        positive_[d / kLanes] |= lane;
      } else {
        negative_[d / kLanes] |= lane;
      }
    }
    if (kIsHalf && !is_regular_) AscendC::PipeBarrier<PIPE_ALL>();  // behind SetAside
  }

  // Scores `rows` rows of bounds, which it overwrites. `Release` gives the tile's buffer back as
  // soon as it is read.
  template <typename Release>
  __aicore__ inline void Score(const AscendC::LocalTensor<T>& highest,
                               const AscendC::LocalTensor<T>& lowest, uint8_t rows,
                               const AscendC::LocalTensor<float>& scores, const Release& release) {
    if constexpr (kIsFloat32) {
      ScoreFloats(highest, lowest, rows, scores);
      release();
    } else {
      const AscendC::LocalTensor<float> wide = wide_buffer_.template Get<float>();
      const auto count = static_cast<uint32_t>(rows * dim_);
      if constexpr (kIsHalf) {
        for (int32_t c = 0; c < NumChunks(); c += kChunksOf<T>) {
          if (!is_regular_) FormProducts(highest, lowest, rows, c);
          TakeBounds(highest, lowest, rows, c);
        }
        AscendC::Cast(wide, highest, AscendC::RoundMode::CAST_NONE, count);
        AscendC::PipeBarrier<PIPE_V>();
        release();
        for (int32_t c = 0; c < NumChunks(); ++c) AddProducts(wide, wide, rows, c, c == 0);
        SumLanes(scores, wide, rows);
      } else {
        const AscendC::LocalTensor<float> wide_lowest = wide_lowest_buffer_.template Get<float>();
        AscendC::Cast(wide, highest, AscendC::RoundMode::CAST_NONE, count);
        AscendC::Cast(wide_lowest, lowest, AscendC::RoundMode::CAST_NONE, count);
        AscendC::PipeBarrier<PIPE_V>();
        release();
        ScoreFloats(wide, wide_lowest, rows, scores);
      }
    }
  }

 private:
  static constexpr int32_t kLanes = 64;  // floats of a repeat, channels of a chunk
  static constexpr int32_t kMostChunks = static_cast<int32_t>(kMostHeadDim) / kLanes;
  static constexpr uint32_t kMagnitude = 0x7FFFFFFF;
  static constexpr uint32_t kInfinity = 0x7F800000;  // as float32, the next as half
  static constexpr uint32_t kHalfInfinity = 0x7C00;
  static constexpr uint32_t kHalfNaN = 0x7E00;

  // In a repeat.
  template <typename U>
  static constexpr int32_t kChunksOf = 4 / static_cast<int32_t>(sizeof(U));

  __aicore__ inline int32_t NumChunks() const { return (dim_ - 1) / kLanes + 1; }
  __aicore__ inline uint64_t ChunkLanes(int32_t c) const {
    return static_cast<uint64_t>(Smaller(dim_ - c * kLanes, kLanes));
  }
  template <typename U>
  __aicore__ inline uint8_t RowBlocks() const {
    return static_cast<uint8_t>(dim_ * static_cast<int32_t>(sizeof(U)) / 32);
  }
  // A binary instruction on rows, in place or onto others of the same stride.
  template <typename U>
  __aicore__ inline AscendC::BinaryRepeatParams ByRow() const {
    return AscendC::BinaryRepeatParams(1, 1, 1, RowBlocks<U>(), RowBlocks<U>(), RowBlocks<U>());
  }
  // The second operand is the same for all rows.
  template <typename U>
  __aicore__ inline AscendC::BinaryRepeatParams ByRowAndQuery() const {
    return AscendC::BinaryRepeatParams(1, 1, 1, RowBlocks<U>(), RowBlocks<U>(), 0);
  }

  // An irregular channel: its bounds will be products in half already, to be multiplied by 1.
  __aicore__ inline void SetAside(int32_t d, uint32_t channel) {
    const uint32_t magnitude = channel & kMagnitude;
    uint32_t value = channel >> 31 << 15;
    if (magnitude > kInfinity) value |= kHalfNaN;
    if (magnitude == kInfinity) value |= kHalfInfinity;
    const auto place = static_cast<uint32_t>(d);
    irregular_buffer_.template Get<uint16_t>().SetValue(place, static_cast<uint16_t>(value));
    query_buffer_.template Get<float>().SetValue(place, 1.0f);
    positive_[d / kLanes] |= uint64_t{1} << (d % kLanes);
  }

  // In place: half bounds become products on the irregular channels of chunks c and c + 1.
  __aicore__ inline void FormProducts(const AscendC::LocalTensor<T>& highest,
                                      const AscendC::LocalTensor<T>& lowest, uint8_t rows,
                                      int32_t c) {
    uint64_t lanes[2] = {irregular_[c], c + 1 < kMostChunks ? irregular_[c + 1] : 0};
    if ((lanes[0] | lanes[1]) == 0) return;
    const auto first = static_cast<uint32_t>(c * kLanes);
    const AscendC::LocalTensor<T> query = irregular_buffer_.template Get<T>()[first];
    AscendC::Mul(highest[first], highest[first], query, lanes, rows, ByRowAndQuery<T>());
    AscendC::Mul(lowest[first], lowest[first], query, lanes, rows, ByRowAndQuery<T>());
    AscendC::PipeBarrier<PIPE_V>();
  }

  // In place: `highest` takes the bound that makes the larger product, in the chunks of a repeat.
  template <typename U>
  __aicore__ inline void TakeBounds(const AscendC::LocalTensor<U>& highest,
                                    const AscendC::LocalTensor<U>& lowest, uint8_t rows,
                                    int32_t c) {
    constexpr bool kTwo = kChunksOf<U> == 2;
    uint64_t up[2] = {positive_[c], kTwo ? positive_[c + 1] : 0};
    uint64_t down[2] = {negative_[c], kTwo ? negative_[c + 1] : 0};
    const auto first = static_cast<uint32_t>(c * kLanes);
    const AscendC::LocalTensor<U> to = highest[first];
    if ((up[0] | up[1]) != 0) AscendC::Max(to, to, lowest[first], up, rows, ByRow<U>());
    AscendC::PipeBarrier<PIPE_V>();  // the same blocks, though not the same lanes
    if ((down[0] | down[1]) != 0) AscendC::Min(to, to, lowest[first], down, rows, ByRow<U>());
    AscendC::PipeBarrier<PIPE_V>();
  }

  // Sums take the lanes of a chunk of full width, one with irregular channels if there is any: the
  // maximum of its products is the first addend.
  __aicore__ inline int32_t ChunkOfSums() const {
    for (int32_t c = 0; c < NumChunks(); ++c) {
      if (irregular_[c] != 0 && ChunkLanes(c) == ChunkLanes(0)) return c;
    }
    return 0;
  }

  __aicore__ inline void ScoreFloats(const AscendC::LocalTensor<float>& highest,
                                     const AscendC::LocalTensor<float>& lowest, uint8_t rows,
                                     const AscendC::LocalTensor<float>& scores) {
    const int32_t first = ChunkOfSums();
    const AscendC::LocalTensor<float> sums = highest[static_cast<uint32_t>(first * kLanes)];
    AddChunk(sums, highest, lowest, rows, first, true);
    for (int32_t c = 0; c < NumChunks(); ++c) {
      if (c != first) AddChunk(sums, highest, lowest, rows, c, false);
    }
    SumLanes(scores, sums, rows);
  }

  __aicore__ inline void AddChunk(const AscendC::LocalTensor<float>& sums,
                                  const AscendC::LocalTensor<float>& highest,
                                  const AscendC::LocalTensor<float>& lowest, uint8_t rows,
                                  int32_t c, bool is_first) {
    if (irregular_[c] == 0) {
      TakeBounds(highest, lowest, rows, c);
      AddProducts(sums, highest, rows, c, is_first);
      return;
    }
    const auto place = static_cast<uint32_t>(c * kLanes);
    const AscendC::LocalTensor<float> query = query_buffer_.template Get<float>()[place];
    const AscendC::LocalTensor<float> products = highest[place];
    const AscendC::LocalTensor<float> others = lowest[place];
    const uint64_t lanes = ChunkLanes(c);
    AscendC::Mul(products, products, query, lanes, rows, ByRowAndQuery<float>());
    AscendC::Mul(others, others, query, lanes, rows, ByRowAndQuery<float>());
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Max(products, products, others, lanes, rows, ByRow<float>());
    AscendC::PipeBarrier<PIPE_V>();
    if (is_first) return;  // they are the sums
    AscendC::Add(sums, sums, products, lanes, rows, ByRow<float>());
    AscendC::PipeBarrier<PIPE_V>();
  }

  // The products of a chunk with the query, onto the sums or, of the first chunk, as the sums.
  __aicore__ inline void AddProducts(const AscendC::LocalTensor<float>& sums,
                                     const AscendC::LocalTensor<float>& values, uint8_t rows,
                                     int32_t c, bool is_first) {
    const auto place = static_cast<uint32_t>(c * kLanes);
    const AscendC::LocalTensor<float> query = query_buffer_.template Get<float>()[place];
    if (is_first) {
      AscendC::Mul(sums, values[place], query, ChunkLanes(c), rows, ByRowAndQuery<float>());
    } else {
      AscendC::MulAddDst(sums, values[place], query, ChunkLanes(c), rows, ByRowAndQuery<float>());
    }
    AscendC::PipeBarrier<PIPE_V>();
  }

  // The sum of 64 floats of every row, or of all where there are fewer.
  __aicore__ inline void SumLanes(const AscendC::LocalTensor<float>& scores,
                                  const AscendC::LocalTensor<float>& sums, uint8_t rows) {
    // CANN 9.1 calls it ReduceRepeat and keeps this name, the only one before.
    AscendC::WholeReduceSum(scores, sums, static_cast<int32_t>(ChunkLanes(0)), rows, 1, 1,
                            RowBlocks<float>());
    AscendC::PipeBarrier<PIPE_V>();
  }

  int32_t dim_ = 0;
  bool is_regular_ = true;
  // Channels by their kind, 64 to a word.
  uint64_t positive_[kMostChunks] = {};
  uint64_t negative_[kMostChunks] = {};
  uint64_t irregular_[kMostChunks] = {};
  AscendC::TBuf<AscendC::TPosition::VECCALC> query_buffer_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> divisor_buffer_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> wide_buffer_;         // float16 and bfloat16
  AscendC::TBuf<AscendC::TPosition::VECCALC> wide_lowest_buffer_;  // bfloat16
  AscendC::TBuf<AscendC::TPosition::VECCALC> irregular_buffer_;    // float16
};

}  // namespace select_attn::ascend

#endif  // SELECT_ATTN_OPS_ASCEND_QUERY_ROW_H_
