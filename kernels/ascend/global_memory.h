// Reads and writes of global memory: 64-bit addresses, any strides, rows of whole 32-byte blocks in
// the unified buffer.

#ifndef SELECT_ATTN_OPS_ASCEND_GLOBAL_MEMORY_H_
#define SELECT_ATTN_OPS_ASCEND_GLOBAL_MEMORY_H_

#include <cstdint>

#include "ascend/arguments.h"
#include "kernel_operator.h"

// The arithmetic that the host shares with kernels is compiled for the core.
#ifndef SELECT_ATTN_HOST_DEVICE
#define SELECT_ATTN_HOST_DEVICE __aicore__
#endif

namespace select_attn::ascend {

constexpr int64_t kMostStrideBytes = 0xFFFFFFFF;  // of one copy instruction

template <typename T>
__aicore__ inline AscendC::GlobalTensor<T> GlobalAt(uint64_t address, int64_t offset) {
  AscendC::GlobalTensor<T> tensor;
  tensor.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(address) + offset);
  return tensor;
}

// For tables and lengths, which kernels do not write.
__aicore__ inline int64_t ReadInt32(uint64_t address, int64_t offset) {
  return GlobalAt<int32_t>(address, offset).GetValue(0);
}

// Rows of `width` elements in global memory, `stride` apart.
struct Rows {
  uint64_t address;
  int64_t offset;  // of the first
  int64_t stride;
  int64_t count;  // at most 4095, what one copy takes: no tile has more
  int64_t width;
};

// Bytes between the end of a row and the next one, negative where one instruction cannot step so.
template <typename T>
__aicore__ inline int64_t GapBytes(const Rows& rows) {
  if (rows.count == 1) return 0;
  const int64_t gap = (rows.stride - rows.width) * static_cast<int64_t>(sizeof(T));
  return gap > kMostStrideBytes ? -1 : gap;
}

// To rows side by side in the unified buffer.
template <typename T>
__aicore__ inline void LoadRows(const AscendC::LocalTensor<T>& to, const Rows& rows) {
  const AscendC::DataCopyPadExtParams<T> no_padding(false, 0, 0, 0);
  const auto bytes = static_cast<uint32_t>(rows.width * static_cast<int64_t>(sizeof(T)));
  const int64_t gap = GapBytes<T>(rows);
  if (gap >= 0) {
    AscendC::DataCopyPad(to, GlobalAt<T>(rows.address, rows.offset),
                         AscendC::DataCopyExtParams(static_cast<uint16_t>(rows.count), bytes,
                                                    static_cast<uint32_t>(gap), 0, 0),
                         no_padding);
    return;
  }
  for (int64_t i = 0; i < rows.count; ++i) {
    AscendC::DataCopyPad(to[static_cast<uint32_t>(i * rows.width)],
                         GlobalAt<T>(rows.address, rows.offset + i * rows.stride),
                         AscendC::DataCopyExtParams(1, bytes, 0, 0, 0), no_padding);
  }
}

template <typename T>
__aicore__ inline void StoreRows(const Rows& rows, const AscendC::LocalTensor<T>& from) {
  const auto bytes = static_cast<uint32_t>(rows.width * static_cast<int64_t>(sizeof(T)));
  const int64_t gap = GapBytes<T>(rows);
  if (gap >= 0) {
    AscendC::DataCopyPad(GlobalAt<T>(rows.address, rows.offset), from,
                         AscendC::DataCopyExtParams(static_cast<uint16_t>(rows.count), bytes, 0,
                                                    static_cast<uint32_t>(gap), 0));
    return;
  }
  for (int64_t i = 0; i < rows.count; ++i) {
    AscendC::DataCopyPad(GlobalAt<T>(rows.address, rows.offset + i * rows.stride),
                         from[static_cast<uint32_t>(i * rows.width)],
                         AscendC::DataCopyExtParams(1, bytes, 0, 0, 0));
  }
}

}  // namespace select_attn::ascend

#endif  // SELECT_ATTN_OPS_ASCEND_GLOBAL_MEMORY_H_
