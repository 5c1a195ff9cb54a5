#include "float_types.h"

#include <algorithm>

namespace ascend_emulator {
namespace {

using AscendC::RoundMode;

// value / 2^shift, rounded.
uint32_t RoundedShift(uint32_t value, int shift, bool negative, RoundMode mode) {
  const uint32_t kept = value >> shift;
  const uint32_t rest = value & ((1u << shift) - 1);
  const uint32_t middle = 1u << (shift - 1);
  bool up = false;
  switch (mode) {
    case RoundMode::CAST_NONE:
    case RoundMode::CAST_RINT:
      up = rest > middle || (rest == middle && kept % 2 == 1);
      break;
    case RoundMode::CAST_FLOOR:
      up = negative && rest != 0;
      break;
    case RoundMode::CAST_CEIL:
      up = !negative && rest != 0;
      break;
    case RoundMode::CAST_ROUND:
      up = rest >= middle;
      break;
    case RoundMode::CAST_TRUNC:
      break;
    case RoundMode::CAST_ODD:
      up = rest != 0 && kept % 2 == 0;
      break;
  }
  return kept + (up ? 1 : 0);
}

// A finite number beyond the largest one.
uint16_t Overflow(uint16_t infinity, bool negative, RoundMode mode) {
  const bool to_largest = mode == RoundMode::CAST_TRUNC ||
                          (mode == RoundMode::CAST_FLOOR && !negative) ||
                          (mode == RoundMode::CAST_CEIL && negative);
  return to_largest ? static_cast<uint16_t>(infinity - 1) : infinity;
}

}  // namespace

uint16_t FloatToHalfBits(float value, RoundMode mode) {
  const auto bits = BitCast<uint32_t>(value);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const bool negative = sign != 0;
  const auto exponent = static_cast<int>(bits >> 23 & 0xFF);
  uint32_t significand = bits & 0x7FFFFF;
  if (exponent == 0xFF) return sign | (significand == 0 ? 0x7C00 : 0x7E00);
  if (exponent != 0) significand |= 0x800000;
  // Exponents of half are 112 less. Below its smallest normal number more bits go.
  const int half_exponent = std::max(exponent - 112, 1);
  const int shift = std::min(13 + half_exponent - (std::max(exponent, 1) - 112), 31);
  // The significand's leading bit adds one to the exponent.
  const uint32_t result = RoundedShift(significand, shift, negative, mode) +
                          (static_cast<uint32_t>(half_exponent - 1) << 10);
  if (result >= 0x7C00) return sign | Overflow(0x7C00, negative, mode);
  return static_cast<uint16_t>(sign | result);
}

uint16_t FloatToBFloat16Bits(float value, RoundMode mode) {
  const auto bits = BitCast<uint32_t>(value);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return sign | 0x7FC0;
  if (magnitude == 0x7F800000) return sign | 0x7F80;
  const uint32_t result = RoundedShift(magnitude, 16, sign != 0, mode);
  if (result >= 0x7F80) return sign | Overflow(0x7F80, sign != 0, mode);
  return static_cast<uint16_t>(sign | result);
}

float HalfBitsToFloat(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t exponent = bits >> 10 & 0x1F;
  const uint32_t fraction = bits & 0x3FF;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  const uint32_t wide_exponent = exponent == 0x1F ? 0xFF : exponent + 112;
  return BitCast<float>(sign | wide_exponent << 23 | fraction << 13);
}

}  // namespace ascend_emulator
