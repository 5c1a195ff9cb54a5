// What the CUDA backend uses of the header of the same name, bit by bit.

#ifndef SELECT_ATTN_OPS_TESTS_CUDA_EMULATOR_CUDA_BF16_H_
#define SELECT_ATTN_OPS_TESTS_CUDA_EMULATOR_CUDA_BF16_H_

#include <cstdint>
#include <cstring>

#include "cuda_fp16.h"

struct __nv_bfloat16 {
  uint16_t x;
};
struct __nv_bfloat162 {
  uint16_t x, y;
};

namespace cuda_emulator {

inline float BFloat16ToFloat(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

}  // namespace cuda_emulator

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __hmax2_nan(__nv_bfloat162 a, __nv_bfloat162 b) {
  using cuda_emulator::BFloat16ToFloat;
  return {cuda_emulator::LargerOrNaN(a.x, b.x, 0x7FFF, BFloat16ToFloat),
          cuda_emulator::LargerOrNaN(a.y, b.y, 0x7FFF, BFloat16ToFloat)};
}
inline __nv_bfloat162 __hmin2_nan(__nv_bfloat162 a, __nv_bfloat162 b) {
  using cuda_emulator::BFloat16ToFloat;
  return {cuda_emulator::SmallerOrNaN(a.x, b.x, 0x7FFF, BFloat16ToFloat),
          cuda_emulator::SmallerOrNaN(a.y, b.y, 0x7FFF, BFloat16ToFloat)};
}

#endif  // SELECT_ATTN_OPS_TESTS_CUDA_EMULATOR_CUDA_BF16_H_
