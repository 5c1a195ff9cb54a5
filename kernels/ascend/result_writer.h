// A row of the result of a selection: forced blocks, scored ones, -1.

#ifndef SELECT_ATTN_OPS_ASCEND_RESULT_WRITER_H_
#define SELECT_ATTN_OPS_ASCEND_RESULT_WRITER_H_

#include <cstdint>

#include "ascend/arguments.h"
#include "ascend/clamped_ranges.h"
#include "ascend/global_memory.h"
#include "ascend/top_k.h"
#include "kernel_operator.h"

namespace select_attn::ascend {

// Writes rows of the result.
class ResultWriter {
 public:
  __aicore__ inline ResultWriter() {}

  __aicore__ inline void Init(AscendC::TPipe* pipe) {
    pipe->InitBuffer(scores_buffer_, kMostK * sizeof(float));
    pipe->InitBuffer(blocks_buffer_, kMostK * sizeof(int32_t));
    pipe->InitBuffer(forced_buffer_, kMostK * sizeof(int32_t));
  }

  // Of KV head n of request b: the forced blocks, the best scored ones, -1 behind.
  __aicore__ inline void Write(const QuestBlockSelectPagedArguments& a, const Ranking& ranking,
                               int64_t b, int64_t n, TopK& top_k) {
    const AscendC::LocalTensor<int32_t> forced = forced_buffer_.Get<int32_t>();
    const AscendC::LocalTensor<int32_t> blocks = blocks_buffer_.Get<int32_t>();
    AscendC::PipeBarrier<PIPE_ALL>();
    const int64_t num_forced = Smaller(ranking.blocks.num_forced(), a.k);
    const int64_t num_slots = a.k - num_forced;
    const int64_t num_best = Smaller(top_k.num_best(), num_slots);
    if (num_best > 0) {
      AscendC::Extract(scores_buffer_.Get<float>(), blocks_buffer_.Get<uint32_t>(), top_k.best(),
                       static_cast<int32_t>((num_best + 31) / 32));
      AscendC::PipeBarrier<PIPE_ALL>();
    }
    for (int64_t i = 0; i < num_forced; ++i) {
      forced.SetValue(static_cast<uint32_t>(i), static_cast<int32_t>(ranking.blocks.Forced(i)));
    }
    for (int64_t i = num_best; i < num_slots; ++i) blocks.SetValue(static_cast<uint32_t>(i), -1);
    AscendC::PipeBarrier<PIPE_ALL>();
    const int64_t row = b * a.selected_request_stride + n * a.selected_head_stride;
    if (num_forced > 0) StoreRows({a.selected_indices, row, 0, 1, num_forced}, forced);
    if (num_slots > 0) StoreRows({a.selected_indices, row + num_forced, 0, 1, num_slots}, blocks);
    AscendC::PipeBarrier<PIPE_ALL>();
  }

 private:
  AscendC::TBuf<AscendC::TPosition::VECCALC> scores_buffer_;
  AscendC::TBuf<AscendC::TPosition::VECOUT> blocks_buffer_;
  AscendC::TBuf<AscendC::TPosition::VECOUT> forced_buffer_;
};

}  // namespace select_attn::ascend

#endif  // SELECT_ATTN_OPS_ASCEND_RESULT_WRITER_H_
