// How work is dealt to vector cores: a call's items in one row, cut into equal shares. A core finds
// its share from the lengths by itself.

#ifndef SELECT_ATTN_OPS_ASCEND_CORE_SHARE_H_
#define SELECT_ATTN_OPS_ASCEND_CORE_SHARE_H_

#include <cstdint>

#include "kernel_operator.h"

namespace select_attn::ascend {

struct Share {
  int64_t begin;
  int64_t end;

  __aicore__ inline bool empty() const { return begin >= end; }
};

// Of `total` items. Shares differ by one item at most. No product exceeds `total` or the square of
// the number of cores.
__aicore__ inline Share ShareOf(int64_t core, int64_t num_cores, int64_t total) {
  return {total / num_cores * core + total % num_cores * core / num_cores,
          total / num_cores * (core + 1) + total % num_cores * (core + 1) / num_cores};
}

}  // namespace select_attn::ascend

#endif  // SELECT_ATTN_OPS_ASCEND_CORE_SHARE_H_
