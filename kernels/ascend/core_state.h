// What a kernel may find on its core in any state, and sets before it works.

#ifndef SELECT_ATTN_OPS_ASCEND_CORE_STATE_H_
#define SELECT_ATTN_OPS_ASCEND_CORE_STATE_H_

#include <cstdint>

#include "ascend/global_memory.h"
#include "kernel_operator.h"

namespace select_attn::ascend {

// `address` is any of the call's in global memory.
__aicore__ inline void PrepareCore(uint64_t address) {
  // By default this chip saturates 16-bit arithmetic, which turns infinities into numbers and NaN
  // into zero. CANN 9.1 has SetSaturationFlag for it; this is in all.
  AscendC::AscendCUtils::SetOverflow(1);
  // Tables and lengths are read through the scalar unit's cache, which may have what was in their
  // place before: a replayed graph finds other values at the same addresses.
  AscendC::DataCacheCleanAndInvalid<int32_t, AscendC::CacheLine::ENTIRE_DATA_CACHE,
                                    AscendC::DcciDst::CACHELINE_OUT>(GlobalAt<int32_t>(address, 0));
}

}  // namespace select_attn::ascend

#endif  // SELECT_ATTN_OPS_ASCEND_CORE_STATE_H_
