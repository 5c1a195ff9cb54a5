// What a kernel sets on its core before it works: the arithmetic's mode, the scalar unit's cache.

#ifndef SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_CORE_CONTROL_H_
#define SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_CORE_CONTROL_H_

#include <cstdint>

#include "tensors.h"

namespace AscendC {

class AscendCUtils {
 public:
  // Bit 48 of the control register: 1 leaves infinities and NaN in 16-bit results.
  static void SetOverflow(uint64_t keeps_infinities) {
    ascend_emulator::Core().saturates = keeps_infinities != 1;
  }
};

enum class CacheLine : uint64_t { SINGLE_CACHE_LINE = 0, ENTIRE_DATA_CACHE };

enum class DcciDst : uint64_t { CACHELINE_ALL = 0, CACHELINE_UB, CACHELINE_OUT, CACHELINE_ATOMIC };

// Of the modes only the one for the whole cache, whose tensor does not matter.
template <typename T, CacheLine lines, DcciDst target>
void DataCacheCleanAndInvalid(const GlobalTensor<T>& /*tensor*/) {
  static_assert(lines == CacheLine::ENTIRE_DATA_CACHE, "single cache lines are not modelled");
  static_assert(target == DcciDst::CACHELINE_OUT || target == DcciDst::CACHELINE_ALL,
                "only the cache of global memory is modelled");
  ascend_emulator::Core().data_cache_is_stale = false;
}

}  // namespace AscendC

#endif  // SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_CORE_CONTROL_H_
