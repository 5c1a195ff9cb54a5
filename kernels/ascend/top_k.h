// The best k of any number of scores, in the order of the contract: by decreasing score, equal
// scores by increasing index, NaN above all, -0 equal to +0.
//
// Scores are taken in chunks. A chunk is sorted by Sort32 and MrgSort and merged into the running
// list of the best, so the number of scores has no bound. Both put equal scores in the order of
// their places, and a list's indices are below those of the chunks behind it: ties need no more.
// A pair is a score and an index in 8 bytes; a list is written as floats, two to a pair.

#ifndef SELECT_ATTN_OPS_ASCEND_TOP_K_H_
#define SELECT_ATTN_OPS_ASCEND_TOP_K_H_

#include <cstdint>

#include "ascend/arguments.h"
#include "ascend/clamped_ranges.h"
#include "kernel_operator.h"

namespace select_attn::ascend {

class TopK {
 public:
  static constexpr int32_t kChunk = 512;  // scores sorted at once
  static constexpr int32_t kFloatsPerPair = 2;

  __aicore__ inline TopK() {}

  // Sort32 needs what it reads aligned to 128 bytes, what it writes to 256: every buffer taken
  // before these must be a multiple of 256 bytes, as they are.
  __aicore__ inline void Init(AscendC::TPipe* pipe, int32_t k) {
    k_ = k;
    pipe->InitBuffer(scores_buffer_, kChunk * sizeof(float));
    pipe->InitBuffer(places_buffer_, kChunk * sizeof(int32_t));
    pipe->InitBuffer(indices_buffer_, kChunk * sizeof(int32_t));
    pipe->InitBuffer(bits_buffer_, 2 * sizeof(float) * kChunk);
    pipe->InitBuffer(sorted_buffer_, kChunk * kPairBytes);
    pipe->InitBuffer(merged_buffer_, kChunk * kPairBytes);
    pipe->InitBuffer(best_buffer_, 2 * kMostPairs * kPairBytes);
    AscendC::CreateVecIndex(places_buffer_.Get<int32_t>(), int32_t{0}, uint32_t{kChunk});
    AscendC::PipeBarrier<PIPE_V>();
  }

  // Before the first chunk of a row.
  __aicore__ inline void Clear() { num_best_ = 0; }

  // Where a chunk's scores go, by the vector unit. What lies behind the last is not looked at.
  __aicore__ inline AscendC::LocalTensor<float> BeginChunk() {
    const AscendC::LocalTensor<float> scores = scores_buffer_.Get<float>();
    AscendC::Duplicate(scores, -kInfinity, kChunk);
    AscendC::PipeBarrier<PIPE_V>();
    return scores;
  }

  // Merges the chunk's first `count` scores, whose indices are first_index and those behind it.
  __aicore__ inline void EndChunk(int32_t count, int32_t first_index) {
    const int32_t padded = (count + kLists * kSorted - 1) / (kLists * kSorted) * kLists * kSorted;
    MakeComparable(padded);
    const AscendC::LocalTensor<int32_t> indices = indices_buffer_.Get<int32_t>();
    AscendC::Adds(indices, places_buffer_.Get<int32_t>(), first_index, padded);
    AscendC::PipeBarrier<PIPE_V>();
    const AscendC::LocalTensor<float> list = SortChunk(padded);
    Merge(list, static_cast<int32_t>(Smaller(count, k_)));
  }

  // Merges a list that is in order and ranks behind the best among equals.
  __aicore__ inline void Merge(const AscendC::LocalTensor<float>& list, int32_t count) {
    if (count == 0) return;
    const int32_t other = 1 - which_;
    if (num_best_ == 0) {
      // In whole blocks: what comes along behind the list is never looked at.
      AscendC::DataCopy(
          Half(other), list,
          (count + kPairsPerBlock - 1) / kPairsPerBlock * kPairsPerBlock * kFloatsPerPair);
    } else {
      MergeLists(Half(other), Half(which_), num_best_, list, count);
    }
    AscendC::PipeBarrier<PIPE_V>();
    which_ = other;
    num_best_ = static_cast<int32_t>(Smaller(num_best_ + count, k_));
  }

  __aicore__ inline int32_t num_best() const { return num_best_; }
  __aicore__ inline AscendC::LocalTensor<float> best() { return Half(which_); }

  // A list of at most kMostK pairs from elsewhere may lie here until it is merged.
  __aicore__ inline AscendC::LocalTensor<float> scratch() { return sorted_buffer_.Get<float>(); }

 private:
  static constexpr int32_t kPairBytes = 8;
  static constexpr int32_t kPairsPerBlock = 4;
  static constexpr int32_t kSorted = 32;  // scores that Sort32 sorts at once
  static constexpr int32_t kLists = 4;    // lists that MrgSort merges at once
  static constexpr int32_t kMostPairs = static_cast<int32_t>(kMostK) + kChunk;
  static constexpr int32_t kInfinityBits = 0x7F800000;
  static_assert(kMostK <= kChunk, "a chunk must fill the best list");

  static constexpr float kInfinity = __builtin_inff();
  static constexpr float kLargestNumber = 3.40282347e+38f;

  // Of best_buffer_: one has the best, the other is where a merge writes.
  __aicore__ inline AscendC::LocalTensor<float> Half(int32_t which) {
    return best_buffer_.Get<float>()[which * kMostPairs * kFloatsPerPair];
  }

  // Makes NaN +inf, +inf the largest number and -0 +0, so that the order of numbers is that of the
  // contract. NaN is found by its bits, whatever the chip's comparisons do with it.
  __aicore__ inline void MakeComparable(int32_t count) {
    const AscendC::LocalTensor<float> scores = scores_buffer_.Get<float>();
    const AscendC::LocalTensor<int32_t> magnitude = bits_buffer_.Get<int32_t>();
    const AscendC::LocalTensor<int32_t> not_nan = magnitude[kChunk];
    const AscendC::LocalTensor<uint32_t> magnitude_bits = magnitude.ReinterpretCast<uint32_t>();

    // All ones where the magnitude is at most infinity's, else zero.
    AscendC::ShiftLeft(magnitude_bits, scores.ReinterpretCast<uint32_t>(), uint32_t{1}, count);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::ShiftRight(magnitude_bits, magnitude_bits, uint32_t{1}, count);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Adds(not_nan, magnitude, -kInfinityBits - 1, count);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::ShiftRight(not_nan, not_nan, int32_t{31}, count);
    AscendC::PipeBarrier<PIPE_V>();

    // NaN to 0, then to infinity: the larger of 0 and infinity; of a number and -infinity itself.
    const AscendC::LocalTensor<int16_t> score_halves = scores.ReinterpretCast<int16_t>();
    AscendC::And(score_halves, score_halves, not_nan.ReinterpretCast<int16_t>(), 2 * count);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Mins(scores, scores, kLargestNumber, count);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Adds(scores, scores, 0.0f, count);
    const AscendC::LocalTensor<uint32_t> floor_bits = not_nan.ReinterpretCast<uint32_t>();
    AscendC::ShiftLeft(floor_bits, floor_bits, uint32_t{31}, count);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Adds(not_nan, not_nan, kInfinityBits, count);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Max(scores, scores, not_nan.ReinterpretCast<float>(), count);
    AscendC::PipeBarrier<PIPE_V>();
  }

  // `count` is a multiple of the scores that two rounds of sorting need.
  __aicore__ inline AscendC::LocalTensor<float> SortChunk(int32_t count) {
    const AscendC::LocalTensor<float> sorted = sorted_buffer_.Get<float>();
    const AscendC::LocalTensor<float> merged = merged_buffer_.Get<float>();
    AscendC::Sort32(sorted, scores_buffer_.Get<float>(), indices_buffer_.Get<uint32_t>(),
                    count / kSorted);
    AscendC::PipeBarrier<PIPE_V>();
    const int32_t groups = count / (kLists * kSorted);
    AscendC::MrgSort(merged, ListsIn(sorted, kSorted),
                     Info(kSorted, kSorted, kSorted, kSorted, kLists, groups));
    AscendC::PipeBarrier<PIPE_V>();
    if (groups == 1) return merged;
    constexpr int32_t kGroup = kLists * kSorted;
    const auto needed = static_cast<uint16_t>(Smaller(kGroup, k_));
    AscendC::MrgSort(
        sorted, ListsIn(merged, kGroup),
        Info(needed, needed, groups > 2 ? needed : 0, groups > 3 ? needed : 0, groups, 1));
    AscendC::PipeBarrier<PIPE_V>();
    return sorted;
  }

  // Lists `length` pairs apart.
  __aicore__ static inline AscendC::MrgSortSrcList<float> ListsIn(
      const AscendC::LocalTensor<float>& pairs, int32_t length) {
    const int32_t step = length * kFloatsPerPair;
    // Lists beyond those that the chunk has are not read, and must lie inside the buffer.
    constexpr int32_t kLast = kChunk * kFloatsPerPair;
    const int32_t third = 2 * step < kLast ? 2 * step : 0;
    const int32_t fourth = 3 * step < kLast ? 3 * step : 0;
    return AscendC::MrgSortSrcList<float>(pairs, pairs[step], pairs[third], pairs[fourth]);
  }

  __aicore__ static inline AscendC::MrgSort4Info Info(uint16_t a, uint16_t b, uint16_t c,
                                                      uint16_t d, int32_t lists, int32_t repeats) {
    const uint16_t lengths[kLists] = {a, b, c, d};
    return AscendC::MrgSort4Info(lengths, false, static_cast<uint16_t>((1 << lists) - 1),
                                 static_cast<uint16_t>(repeats));
  }

  __aicore__ static inline void MergeLists(const AscendC::LocalTensor<float>& to,
                                           const AscendC::LocalTensor<float>& x, int32_t x_count,
                                           const AscendC::LocalTensor<float>& y, int32_t y_count) {
    AscendC::MrgSort(
        to, AscendC::MrgSortSrcList<float>(x, y, x, y),
        Info(static_cast<uint16_t>(x_count), static_cast<uint16_t>(y_count), 0, 0, 2, 1));
  }

  int64_t k_ = 0;
  int32_t num_best_ = 0;
  int32_t which_ = 0;  // the half with the best
  AscendC::TBuf<AscendC::TPosition::VECCALC> scores_buffer_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> places_buffer_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> indices_buffer_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> bits_buffer_;
  AscendC::TBuf<AscendC::TPosition::VECIN> sorted_buffer_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> merged_buffer_;
  AscendC::TBuf<AscendC::TPosition::VECOUT> best_buffer_;
};

}  // namespace select_attn::ascend

#endif  // SELECT_ATTN_OPS_ASCEND_TOP_K_H_
