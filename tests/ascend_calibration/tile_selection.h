// Selection in the design of the kernels that were measured on a 910B4, to calibrate the cost model
// with: a core per KV head of a request, whole tiles of 128 rows of 128 channels, copies and
// arithmetic in turns, two products and their maximum for every channel, then a sum per row.
// bfloat16 casts whole tiles and sums in two stages; half is in half precision throughout.
//
// For calibration only. What ships is in kernels/ascend.

#ifndef SELECT_ATTN_OPS_TESTS_ASCEND_CALIBRATION_TILE_SELECTION_H_
#define SELECT_ATTN_OPS_TESTS_ASCEND_CALIBRATION_TILE_SELECTION_H_

#include <cstdint>
#include <type_traits>

#include "kernel_operator.h"

namespace ascend_calibration {

constexpr int32_t kTileRows = 128;
constexpr int32_t kHeadDim = 128;
constexpr int32_t kTileElements = kTileRows * kHeadDim;

template <typename T>
struct TileSelectionArguments {
  T* query;           // [batch, num_kv_heads * group, kHeadDim]
  T* maxblocks;       // [tiles of all requests, kTileRows, num_kv_heads, kHeadDim]
  T* minblocks;       // the same
  int32_t* table;     // [batch, num_tiles]
  int32_t* selected;  // [batch, num_kv_heads, k]
  int32_t batch;
  int32_t num_kv_heads;
  int32_t group;      // query heads per KV head
  int32_t num_tiles;  // per request
  int32_t k;          // a multiple of 8
  int32_t num_cores;  // of the device: heads of a core are as many apart
};

template <typename T>
class TileSelectionKernel {
 public:
  __aicore__ inline TileSelectionKernel(const TileSelectionArguments<T>& arguments,
                                        AscendC::TPipe* pipe)
      : a_(arguments), pipe_(pipe) {
    const int32_t num_rows = a_.num_tiles * kTileRows;
    pipe->InitBuffer(max_tile_, 1, kTileElements * sizeof(T));
    if constexpr (kIsWide) {
      pipe->InitBuffer(wide_max_, kTileElements * sizeof(float));
      pipe->InitBuffer(wide_min_, kTileElements * sizeof(float));
    } else {
      pipe->InitBuffer(min_tile_, 1, kTileElements * sizeof(T));
    }
    pipe->InitBuffer(query_, kHeadDim * sizeof(Compute));
    pipe->InitBuffer(scores_, num_rows * sizeof(Compute));
    pipe->InitBuffer(places_, num_rows * sizeof(int32_t));
    pipe->InitBuffer(sorted_, num_rows * kPairBytes);
    pipe->InitBuffer(sort_scratch_, num_rows * kPairBytes);
    pipe->InitBuffer(sorted_scores_, num_rows * sizeof(Compute));
    pipe->InitBuffer(result_, 1, num_rows * sizeof(int32_t));
    AscendC::CreateVecIndex(places_.Get<int32_t>(), int32_t{0}, static_cast<uint32_t>(num_rows));
  }

  __aicore__ inline void Run() {
    for (auto head = static_cast<int32_t>(AscendC::GetBlockIdx());
         head < a_.batch * a_.num_kv_heads; head += a_.num_cores) {
      LoadQuery(head);
      for (int32_t tile = 0; tile < a_.num_tiles; ++tile) {
        const int32_t block = a_.table[head / a_.num_kv_heads * a_.num_tiles + tile];
        const uint64_t first =
            static_cast<uint64_t>(block) * kTileElements * static_cast<uint64_t>(a_.num_kv_heads) +
            static_cast<uint64_t>(head % a_.num_kv_heads) * kHeadDim;
        const AscendC::LocalTensor<Compute> scores =
            scores_.Get<Compute>()[static_cast<uint32_t>(tile * kTileRows)];
        if constexpr (kIsWide) {
          ScoreWide(first, scores);
        } else {
          ScoreHalf(first, scores);
        }
      }
      StoreBest(head);
    }
  }

 private:
  static constexpr bool kIsWide = std::is_same_v<T, bfloat16_t>;
  // What arithmetic is in.
  using Compute = std::conditional_t<kIsWide, float, half>;

  static constexpr int32_t kPairBytes = 8;
  static constexpr int32_t kSorted = 32;  // scores that Sort32 sorts at once
  static constexpr int32_t kLanes = 256 / static_cast<int32_t>(sizeof(Compute));
  static constexpr int32_t kRowBlocks = kHeadDim * static_cast<int32_t>(sizeof(Compute)) / 32;
  static constexpr int32_t kRowParts = kHeadDim / kLanes;  // repeats of a row

  // The mean of the query heads.
  __aicore__ inline void LoadQuery(int32_t head) {
    AscendC::GlobalTensor<T> all;
    all.SetGlobalBuffer(a_.query);
    const int32_t count = a_.group * kHeadDim;
    AscendC::LocalTensor<T> heads = max_tile_.template AllocTensor<T>();
    AscendC::DataCopy(heads, all[static_cast<uint64_t>(head) * static_cast<uint64_t>(count)],
                      static_cast<uint32_t>(count));
    max_tile_.EnQue(heads);
    heads = max_tile_.template DeQue<T>();
    AscendC::LocalTensor<Compute> wide;
    if constexpr (kIsWide) {
      wide = wide_max_.Get<float>();
      AscendC::Cast(wide, heads, AscendC::RoundMode::CAST_NONE, static_cast<uint32_t>(count));
      AscendC::PipeBarrier<PIPE_V>();
    } else {
      wide = heads;
    }
    const AscendC::LocalTensor<Compute> query = query_.Get<Compute>();
    AscendC::DataCopy(query, wide, uint32_t{kHeadDim});
    AscendC::PipeBarrier<PIPE_V>();
    for (int32_t h = 1; h < a_.group; ++h) {
      AscendC::Add(query, query, wide[static_cast<uint32_t>(h * kHeadDim)], kHeadDim);
      AscendC::PipeBarrier<PIPE_V>();
    }
    AscendC::Muls(query, query, static_cast<Compute>(1.0f / static_cast<float>(a_.group)),
                  kHeadDim);
    AscendC::PipeBarrier<PIPE_V>();
    max_tile_.FreeTensor(heads);
  }

  template <typename Queue>
  __aicore__ inline void LoadTile(Queue& queue, T* pool, uint64_t first) {
    AscendC::GlobalTensor<T> rows;
    rows.SetGlobalBuffer(pool + first);
    constexpr auto kBlocks = static_cast<uint16_t>(kHeadDim * sizeof(T) / 32);
    const auto gap = static_cast<uint16_t>((a_.num_kv_heads - 1) * kBlocks);
    const AscendC::LocalTensor<T> tile = queue.template AllocTensor<T>();
    AscendC::DataCopy(tile, rows, AscendC::DataCopyParams(kTileRows, kBlocks, gap, 0));
    queue.EnQue(tile);
  }

  __aicore__ inline void MultiplyRows(const AscendC::LocalTensor<Compute>& rows) {
    const AscendC::LocalTensor<Compute> query = query_.Get<Compute>();
    const AscendC::BinaryRepeatParams by_row(1, 1, 1, kRowBlocks, 0, kRowBlocks);
    for (int32_t part = 0; part < kRowParts; ++part) {
      const auto first = static_cast<uint32_t>(part * kLanes);
      AscendC::Mul(rows[first], query[first], rows[first], uint64_t{kLanes}, kTileRows, by_row);
    }
    AscendC::PipeBarrier<PIPE_V>();
  }

  __aicore__ inline void ScoreWide(uint64_t first, const AscendC::LocalTensor<float>& scores) {
    const AscendC::LocalTensor<float> highest = wide_max_.Get<float>();
    const AscendC::LocalTensor<float> lowest = wide_min_.Get<float>();
    CastTile(highest, a_.maxblocks, first);
    // Minima are copied while the maxima are multiplied: the one overlap of the design.
    LoadTile(max_tile_, a_.minblocks, first);
    MultiplyRows(highest);
    CastLoaded(lowest);
    MultiplyRows(lowest);
    AscendC::Max(highest, highest, lowest, kTileElements);
    AscendC::PipeBarrier<PIPE_V>();
    for (int32_t part = 0; part < kRowParts; ++part) {
      AscendC::RepeatReduceSum(lowest[static_cast<uint32_t>(part * kTileRows)],
                               highest[static_cast<uint32_t>(part * kTileElements / kRowParts)],
                               kTileRows, kLanes, 0, 1, 1, 8);
    }
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::PairReduceSum(scores, lowest, kRowParts * kTileRows / kLanes, kLanes, 1, 1, 8);
    AscendC::PipeBarrier<PIPE_V>();
    TakeTurns();
  }

  __aicore__ inline void CastTile(const AscendC::LocalTensor<float>& to, T* pool, uint64_t first) {
    LoadTile(max_tile_, pool, first);
    CastLoaded(to);
  }
  __aicore__ inline void CastLoaded(const AscendC::LocalTensor<float>& to) {
    const AscendC::LocalTensor<T> tile = max_tile_.template DeQue<T>();
    AscendC::Cast(to, tile, AscendC::RoundMode::CAST_NONE, uint32_t{kTileElements});
    AscendC::PipeBarrier<PIPE_V>();
    max_tile_.FreeTensor(tile);
  }

  __aicore__ inline void ScoreHalf(uint64_t first, const AscendC::LocalTensor<half>& scores) {
    LoadTile(max_tile_, a_.maxblocks, first);
    LoadTile(min_tile_, a_.minblocks, first);
    const AscendC::LocalTensor<half> highest = max_tile_.template DeQue<half>();
    MultiplyRows(highest);
    const AscendC::LocalTensor<half> lowest = min_tile_.template DeQue<half>();
    MultiplyRows(lowest);
    AscendC::Max(highest, highest, lowest, kTileElements);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::RepeatReduceSum(scores, highest, kTileRows, kHeadDim, 0, 1, 1, 8);
    AscendC::PipeBarrier<PIPE_V>();
    max_tile_.FreeTensor(highest);
    min_tile_.FreeTensor(lowest);
    TakeTurns();
  }

  // The next copy starts when all arithmetic is done.
  __aicore__ inline void TakeTurns() {
    const AscendC::TEventID id = pipe_->AllocEventID<AscendC::HardEvent::V_MTE2>();
    AscendC::SetFlag<AscendC::HardEvent::V_MTE2>(id);
    AscendC::WaitFlag<AscendC::HardEvent::V_MTE2>(id);
    pipe_->ReleaseEventID<AscendC::HardEvent::V_MTE2>(id);
  }

  // Sorts all scores of the head.
  __aicore__ inline void StoreBest(int32_t head) {
    const int32_t repeats = a_.num_tiles * kTileRows / kSorted;
    const AscendC::LocalTensor<Compute> sorted = sorted_.Get<Compute>();
    AscendC::Sort<Compute, true>(sorted, scores_.Get<Compute>(), places_.Get<uint32_t>(),
                                 sort_scratch_.Get<Compute>(), repeats);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::LocalTensor<int32_t> best = result_.template AllocTensor<int32_t>();
    AscendC::Extract(sorted_scores_.Get<Compute>(), best.ReinterpretCast<uint32_t>(), sorted,
                     repeats);
    result_.EnQue(best);
    best = result_.template DeQue<int32_t>();
    AscendC::GlobalTensor<int32_t> selected;
    selected.SetGlobalBuffer(a_.selected + static_cast<int64_t>(head) * a_.k);
    AscendC::DataCopy(selected, best, static_cast<uint32_t>(a_.k));
    result_.FreeTensor(best);
  }

  const TileSelectionArguments<T>& a_;
  AscendC::TPipe* pipe_;
  AscendC::TQue<AscendC::TPosition::VECIN, 1> max_tile_;
  AscendC::TQue<AscendC::TPosition::VECIN, 1> min_tile_;  // of half only
  AscendC::TBuf<AscendC::TPosition::VECCALC> wide_max_;   // of bfloat16 only
  AscendC::TBuf<AscendC::TPosition::VECCALC> wide_min_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> query_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> scores_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> places_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> sorted_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> sort_scratch_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> sorted_scores_;
  AscendC::TQue<AscendC::TPosition::VECOUT, 1> result_;
};

}  // namespace ascend_calibration

#endif  // SELECT_ATTN_OPS_TESTS_ASCEND_CALIBRATION_TILE_SELECTION_H_
