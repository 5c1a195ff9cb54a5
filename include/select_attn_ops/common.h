// Types that every operator of the library shares.

#ifndef SELECT_ATTN_OPS_COMMON_H_
#define SELECT_ATTN_OPS_COMMON_H_

#include <cstdint>

#define SELECT_ATTN_EXPORT __attribute__((visibility("default")))

namespace select_attn {

// Element type of queries, keys and metadata. Arithmetic is float32 for all of them.
enum class DType : int32_t { kFloat16, kBFloat16, kFloat32 };

// A device's stream (cudaStream_t, aclrtStream); null is the default stream. The CPU has none.
using Stream = void*;

}  // namespace select_attn

#endif  // SELECT_ATTN_OPS_COMMON_H_
