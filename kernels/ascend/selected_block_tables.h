// Ascend kernel of selected_block_tables: a core per row of the result sorts its selection.
//
// The sort's keys are block numbers as float32, which is exact below kMostBlocksPerRequest.

#ifndef SELECT_ATTN_OPS_ASCEND_SELECTED_BLOCK_TABLES_H_
#define SELECT_ATTN_OPS_ASCEND_SELECTED_BLOCK_TABLES_H_

#include <cstdint>

#include "ascend/arguments.h"
#include "ascend/clamped_ranges.h"
#include "ascend/global_memory.h"
#include "ascend/top_k.h"
#include "kernel_operator.h"

namespace select_attn::ascend {

class SelectedBlockTablesKernel {
 public:
  __aicore__ inline SelectedBlockTablesKernel(const SelectedBlockTablesArguments& arguments,
                                              AscendC::TPipe* pipe)
      : a_(arguments) {
    pipe->InitBuffer(selected_buffer_, kMostK * sizeof(int32_t));
    pipe->InitBuffer(tables_buffer_, kMostK * sizeof(int32_t));
    sorter_.Init(pipe, static_cast<int32_t>(a_.k));
    // Last, as it would put those behind it out of the alignment that sorting needs.
    pipe->InitBuffer(lens_buffer_, kBlockBytes);
  }

  __aicore__ inline void Run() {
    const auto num_cores = static_cast<int64_t>(AscendC::GetBlockNum());
    const int64_t num_rows = a_.batch * a_.num_kv_heads;
    for (auto row = static_cast<int64_t>(AscendC::GetBlockIdx()); row < num_rows;
         row += num_cores) {
      WriteRow(row / a_.num_kv_heads, row % a_.num_kv_heads);
    }
  }

 private:
  static constexpr int64_t kBlockBytes = 32;

  __aicore__ inline int64_t TableEntry(int64_t b, int64_t j) const {
    return ReadInt32(a_.block_tables.address, b * a_.block_tables.stride + j);
  }

  __aicore__ inline void WriteRow(int64_t b, int64_t n) {
    const AscendC::LocalTensor<int32_t> selected = selected_buffer_.Get<int32_t>();
    const AscendC::LocalTensor<int32_t> tables = tables_buffer_.Get<int32_t>();
    const AscendC::LocalTensor<int32_t> lens = lens_buffer_.Get<int32_t>();
    LoadRows(selected, {a_.selected_indices,
                        b * a_.selected_request_stride + n * a_.selected_head_stride, 0, 1, a_.k});
    sorter_.Clear();
    const AscendC::LocalTensor<float> keys = sorter_.BeginChunk();
    AscendC::PipeBarrier<PIPE_ALL>();

    const int64_t seq_len = ClampedLength(a_.seq_lens, b);
    const int64_t end = Smaller(NumKvBlocks(seq_len, a_.block_size), a_.block_tables.columns);
    int64_t num_tokens = 0;
    int32_t num_blocks = 0;
    for (int64_t i = 0; i < a_.k; ++i) {
      const int64_t j = selected.GetValue(static_cast<uint32_t>(i));
      if (j < 0 || j >= end || TableEntry(b, j) < 0) continue;
      num_tokens += Smaller(seq_len - j * a_.block_size, a_.block_size);
      keys.SetValue(static_cast<uint32_t>(num_blocks++), -static_cast<float>(j));
    }
    AscendC::PipeBarrier<PIPE_ALL>();
    if (num_blocks > 0) sorter_.EndChunk(num_blocks, 0);
    AscendC::PipeBarrier<PIPE_ALL>();
    const AscendC::LocalTensor<float> sorted = sorter_.best();
    for (int64_t i = 0; i < a_.k; ++i) {
      int64_t entry = -1;
      if (i < num_blocks) {
        const float key = sorted.GetValue(static_cast<uint32_t>(TopK::kFloatsPerPair * i));
        entry = TableEntry(b, static_cast<int64_t>(static_cast<int32_t>(-key)));
      }
      tables.SetValue(static_cast<uint32_t>(i), static_cast<int32_t>(entry));
    }
    lens.SetValue(0, static_cast<int32_t>(num_tokens));
    AscendC::PipeBarrier<PIPE_ALL>();
    StoreRows({a_.tables, b * a_.tables_request_stride + n * a_.tables_head_stride, 0, 1, a_.k},
              tables);
    StoreRows({a_.lens, b * a_.lens_stride + n, 0, 1, 1}, lens);
    AscendC::PipeBarrier<PIPE_ALL>();
  }

  const SelectedBlockTablesArguments& a_;
  TopK sorter_;
  AscendC::TBuf<AscendC::TPosition::VECIN> selected_buffer_;
  AscendC::TBuf<AscendC::TPosition::VECOUT> tables_buffer_;
  AscendC::TBuf<AscendC::TPosition::VECOUT> lens_buffer_;
};

}  // namespace select_attn::ascend

#endif  // SELECT_ATTN_OPS_ASCEND_SELECTED_BLOCK_TABLES_H_
