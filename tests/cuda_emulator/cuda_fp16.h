// What the CUDA backend uses of the header of the same name, bit by bit.

#ifndef SELECT_ATTN_OPS_TESTS_CUDA_EMULATOR_CUDA_FP16_H_
#define SELECT_ATTN_OPS_TESTS_CUDA_EMULATOR_CUDA_FP16_H_

#include <cmath>
#include <cstdint>

#include "cuda_runtime.h"

struct __half {
  uint16_t x;
};
struct __half2 {
  uint16_t x, y;
};

namespace cuda_emulator {

inline float HalfToFloat(uint16_t bits) {
  const int exponent = bits >> 10 & 0x1F;
  const int fraction = bits & 0x3FF;
  float magnitude = 0.0f;
  if (exponent == 0x1F) {
    magnitude = fraction == 0 ? HUGE_VALF : NAN;
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(fraction), -24);
  } else {
    magnitude = std::ldexp(static_cast<float>(fraction + 0x400), exponent - 25);
  }
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

// The nearest, of two as near the one with an even last bit.
inline uint16_t FloatToHalf(float value) {
  constexpr float kFirstThatOverflows = 65520.0f;
  if (std::isnan(value)) return 0x7FFF;
  const int sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (magnitude >= kFirstThatOverflows) return static_cast<uint16_t>(sign | 0x7C00);
  const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
  const auto units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  // A carry goes on into the exponent, which denormal numbers have none of.
  return static_cast<uint16_t>(sign | ((exponent + 14) * 0x400 + units));
}

// The larger of two 16-bit floats, given how to widen them; `nan` if either is NaN.
template <typename Widen>
uint16_t LargerOrNaN(uint16_t a, uint16_t b, uint16_t nan, Widen widen) {
  const float wide_a = widen(a);
  const float wide_b = widen(b);
  if (std::isnan(wide_a) || std::isnan(wide_b)) return nan;
  return wide_a > wide_b ? a : b;
}
template <typename Widen>
uint16_t SmallerOrNaN(uint16_t a, uint16_t b, uint16_t nan, Widen widen) {
  return LargerOrNaN(a, b, nan, [&](uint16_t bits) { return -widen(bits); });
}

}  // namespace cuda_emulator

inline __half2 __hmax2_nan(__half2 a, __half2 b) {
  using cuda_emulator::HalfToFloat;
  return {cuda_emulator::LargerOrNaN(a.x, b.x, 0x7FFF, HalfToFloat),
          cuda_emulator::LargerOrNaN(a.y, b.y, 0x7FFF, HalfToFloat)};
}
inline __half2 __hmin2_nan(__half2 a, __half2 b) {
  using cuda_emulator::HalfToFloat;
  return {cuda_emulator::SmallerOrNaN(a.x, b.x, 0x7FFF, HalfToFloat),
          cuda_emulator::SmallerOrNaN(a.y, b.y, 0x7FFF, HalfToFloat)};
}
inline __half __float2half_rn(float value) { return {cuda_emulator::FloatToHalf(value)}; }
inline float2 __half22float2(__half2 both) {
  return {cuda_emulator::HalfToFloat(both.x), cuda_emulator::HalfToFloat(both.y)};
}

#endif  // SELECT_ATTN_OPS_TESTS_CUDA_EMULATOR_CUDA_FP16_H_
