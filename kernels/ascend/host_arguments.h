// Params of the core library in the form of kernels' arguments.

#ifndef SELECT_ATTN_OPS_ASCEND_HOST_ARGUMENTS_H_
#define SELECT_ATTN_OPS_ASCEND_HOST_ARGUMENTS_H_

#include <cstdint>

#include "ascend/arguments.h"

namespace select_attn::ascend {

inline uint64_t AddressOf(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

inline PoolArguments PoolOf(const void* data, const int64_t (&strides)[3]) {
  return {AddressOf(data), strides[0], strides[1], strides[2]};
}

inline TableArguments TableOf(const int32_t* table, int64_t stride, int64_t columns) {
  return {AddressOf(table), stride, columns};
}

}  // namespace select_attn::ascend

#endif  // SELECT_ATTN_OPS_ASCEND_HOST_ARGUMENTS_H_
