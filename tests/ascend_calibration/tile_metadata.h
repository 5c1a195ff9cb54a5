// Metadata in the design of the kernel that was measured on a 910B4, to calibrate the cost model
// with: a core per KV head of a request, a KV block per tile, which the vector unit copies twice,
// once to fold it to its maximum and once to its minimum. Two tiles are in flight.
//
// For calibration only. What ships is in kernels/ascend.

#ifndef SELECT_ATTN_OPS_TESTS_ASCEND_CALIBRATION_TILE_METADATA_H_
#define SELECT_ATTN_OPS_TESTS_ASCEND_CALIBRATION_TILE_METADATA_H_

#include <cstdint>

#include "kernel_operator.h"
#include "tile_selection.h"

namespace ascend_calibration {

struct TileMetadataArguments {
  half* keys;               // [tiles of all requests, kTileRows, num_kv_heads, kHeadDim]
  half* maxblocks;          // [metadata blocks, kTileRows, num_kv_heads, kHeadDim]
  half* minblocks;          // the same
  int32_t* table;           // [batch, num_tiles]
  int32_t* metadata_table;  // [batch], a metadata block per request
  int32_t batch;
  int32_t num_kv_heads;
  int32_t num_tiles;  // per request, all of them full: kTileRows, a row of the metadata for each
  int32_t num_cores;  // of the device: heads of a core are as many apart
};

class TileMetadataKernel {
 public:
  __aicore__ inline TileMetadataKernel(const TileMetadataArguments& arguments, AscendC::TPipe* pipe)
      : a_(arguments) {
    pipe->InitBuffer(tiles_, 2, kTileElements * sizeof(half));
    pipe->InitBuffer(work_, kTileElements * sizeof(half));
    pipe->InitBuffer(max_rows_, 1, kTileElements * sizeof(half));
    pipe->InitBuffer(min_rows_, 1, kTileElements * sizeof(half));
  }

  __aicore__ inline void Run() {
    for (auto head = static_cast<int32_t>(AscendC::GetBlockIdx());
         head < a_.batch * a_.num_kv_heads; head += a_.num_cores) {
      const int32_t b = head / a_.num_kv_heads;
      const int32_t n = head % a_.num_kv_heads;
      const AscendC::LocalTensor<half> highest = max_rows_.AllocTensor<half>();
      const AscendC::LocalTensor<half> lowest = min_rows_.AllocTensor<half>();
      for (int32_t tile = 0; tile < a_.num_tiles; ++tile) {
        Load(a_.table[b * a_.num_tiles + tile], n);
        const AscendC::LocalTensor<half> keys = tiles_.DeQue<half>();
        const auto row = static_cast<uint32_t>(tile * kHeadDim);
        Fold<true>(keys, highest[row]);
        Fold<false>(keys, lowest[row]);
        tiles_.FreeTensor(keys);
      }
      max_rows_.EnQue(highest);
      min_rows_.EnQue(lowest);
      Store(max_rows_, a_.maxblocks, a_.metadata_table[b], n);
      Store(min_rows_, a_.minblocks, a_.metadata_table[b], n);
    }
  }

 private:
  using Rows = AscendC::TQue<AscendC::TPosition::VECOUT, 1>;

  static constexpr uint16_t kRowBlocks = kHeadDim * sizeof(half) / 32;

  __aicore__ inline uint16_t Gap() const {
    return static_cast<uint16_t>((a_.num_kv_heads - 1) * kRowBlocks);
  }
  // Of a head's first row in a block of a pool.
  __aicore__ inline uint64_t Offset(int32_t block, int32_t n) const {
    return static_cast<uint64_t>(block) * kTileElements * static_cast<uint64_t>(a_.num_kv_heads) +
           static_cast<uint64_t>(n) * kHeadDim;
  }

  __aicore__ inline void Load(int32_t block, int32_t n) {
    AscendC::GlobalTensor<half> rows;
    rows.SetGlobalBuffer(a_.keys + Offset(block, n));
    const AscendC::LocalTensor<half> keys = tiles_.AllocTensor<half>();
    AscendC::DataCopy(keys, rows, AscendC::DataCopyParams(kTileRows, kRowBlocks, Gap(), 0));
    tiles_.EnQue(keys);
  }

  template <bool kMax>
  __aicore__ inline void Fold(const AscendC::LocalTensor<half>& keys,
                              const AscendC::LocalTensor<half>& result) {
    const AscendC::LocalTensor<half> work = work_.Get<half>();
    AscendC::DataCopy(work, keys, uint32_t{kTileElements});
    AscendC::PipeBarrier<PIPE_V>();
    for (int32_t count = kTileElements / 2; count >= kHeadDim; count /= 2) {
      const AscendC::LocalTensor<half> other = work[static_cast<uint32_t>(count)];
      if constexpr (kMax) {
        AscendC::Max(work, work, other, count);
      } else {
        AscendC::Min(work, work, other, count);
      }
      AscendC::PipeBarrier<PIPE_V>();
    }
    AscendC::DataCopy(result, work, uint32_t{kHeadDim});
    AscendC::PipeBarrier<PIPE_V>();
  }

  __aicore__ inline void Store(Rows& rows, half* pool, int32_t block, int32_t n) {
    AscendC::GlobalTensor<half> to;
    to.SetGlobalBuffer(pool + Offset(block, n));
    const AscendC::LocalTensor<half> from = rows.DeQue<half>();
    AscendC::DataCopy(to, from, AscendC::DataCopyParams(kTileRows, kRowBlocks, 0, Gap()));
    rows.FreeTensor(from);
  }

  const TileMetadataArguments& a_;
  AscendC::TQue<AscendC::TPosition::VECIN, 2> tiles_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> work_;
  Rows max_rows_;
  Rows min_rows_;
};

}  // namespace ascend_calibration

#endif  // SELECT_ATTN_OPS_TESTS_ASCEND_CALIBRATION_TILE_METADATA_H_
