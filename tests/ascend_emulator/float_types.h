// The 16-bit floats of kernels, and rounding to them.

#ifndef SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_FLOAT_TYPES_H_
#define SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_FLOAT_TYPES_H_

#include <cstdint>
#include <cstring>

namespace AscendC {

enum class RoundMode {
  CAST_NONE = 0,  // to nearest even where the cast loses bits
  CAST_RINT,      // to nearest even
  CAST_FLOOR,
  CAST_CEIL,
  CAST_ROUND,  // to nearest, ties away from zero
  CAST_TRUNC,
  CAST_ODD  // to the odd neighbour
};

}  // namespace AscendC

namespace ascend_emulator {

template <typename To, typename From>
To BitCast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

uint16_t FloatToHalfBits(float value, AscendC::RoundMode mode);
uint16_t FloatToBFloat16Bits(float value, AscendC::RoundMode mode);
float HalfBitsToFloat(uint16_t bits);

inline float BFloat16BitsToFloat(uint16_t bits) {
  return BitCast<float>(static_cast<uint32_t>(bits) << 16);
}

}  // namespace ascend_emulator

struct half {
  half() = default;
  explicit half(float value)
      : bits(ascend_emulator::FloatToHalfBits(value, AscendC::RoundMode::CAST_RINT)) {}
  explicit half(double value) : half(static_cast<float>(value)) {}
  explicit half(int value) : half(static_cast<float>(value)) {}
  operator float() const { return ascend_emulator::HalfBitsToFloat(bits); }  // NOLINT

  uint16_t bits;
};

// Neither scalar nor vector unit computes with it: see ToFloat and ToBfloat16.
struct bfloat16_t {
  uint16_t bits;
};

namespace AscendC {

inline float ToFloat(const bfloat16_t& value) {
  return ascend_emulator::BFloat16BitsToFloat(value.bits);
}
inline bfloat16_t ToBfloat16(const float& value) {
  return {ascend_emulator::FloatToBFloat16Bits(value, RoundMode::CAST_RINT)};
}

}  // namespace AscendC

#endif  // SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_FLOAT_TYPES_H_
