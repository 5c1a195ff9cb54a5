// Cast between types, in the pairs and rounding modes of the chip.

#ifndef SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_CASTS_H_
#define SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_CASTS_H_

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "elementwise.h"

namespace ascend_emulator {

inline double RoundedToInteger(double value, AscendC::RoundMode mode) {
  switch (mode) {
    case AscendC::RoundMode::CAST_FLOOR:
      return std::floor(value);
    case AscendC::RoundMode::CAST_CEIL:
      return std::ceil(value);
    case AscendC::RoundMode::CAST_ROUND:
      return std::round(value);
    case AscendC::RoundMode::CAST_TRUNC:
      return std::trunc(value);
    default:
      return std::nearbyint(value);
  }
}

// Saturates; NaN is 0.
template <typename D>
D ToInteger(double value, AscendC::RoundMode mode) {
  if (std::isnan(value)) return 0;
  const double rounded = RoundedToInteger(value, mode);
  if (rounded <= static_cast<double>(std::numeric_limits<D>::min())) {
    return std::numeric_limits<D>::min();
  }
  if (rounded >= static_cast<double>(std::numeric_limits<D>::max())) {
    return std::numeric_limits<D>::max();
  }
  return static_cast<D>(rounded);
}

template <typename D, typename S>
D Converted(S value, AscendC::RoundMode mode) {
  double wide;
  if constexpr (std::is_same_v<S, bfloat16_t>) {
    wide = AscendC::ToFloat(value);
  } else {
    wide = static_cast<double>(value);
  }
  if constexpr (std::is_same_v<D, half>) {
    half result;
    result.bits = FloatToHalfBits(static_cast<float>(wide), mode);
    return result;
  } else if constexpr (std::is_same_v<D, bfloat16_t>) {
    return {FloatToBFloat16Bits(static_cast<float>(wide), mode)};
  } else if constexpr (std::is_same_v<D, float>) {
    if constexpr (std::is_same_v<S, float>) {
      return static_cast<float>(RoundedToInteger(wide, mode));
    } else {
      return static_cast<float>(wide);
    }
  } else if constexpr (std::is_integral_v<S>) {
    return static_cast<D>(
        std::clamp<int64_t>(value, std::numeric_limits<D>::min(), std::numeric_limits<D>::max()));
  } else {
    return ToInteger<D>(wide, mode);
  }
}

// From S to D.
template <typename D, typename S>
constexpr bool kHasCast =
    (std::is_same_v<S, float> && kIsOneOf<D, half, bfloat16_t, float, int16_t, int32_t>) ||
    (std::is_same_v<S, half> && kIsOneOf<D, float, int16_t, int32_t, int8_t, uint8_t>) ||
    (std::is_same_v<S, bfloat16_t> && kIsOneOf<D, float, int32_t>) ||
    (std::is_same_v<S, int32_t> && kIsOneOf<D, float, int16_t>) ||
    (std::is_same_v<S, int16_t> && kIsOneOf<D, float, half>) ||
    (kIsOneOf<S, int8_t, uint8_t> && std::is_same_v<D, half>);

// Whether a cast may lose bits, and so needs a mode (from float to half it has a default).
template <typename D, typename S>
void CheckMode(AscendC::RoundMode mode) {
  using AscendC::RoundMode;
  constexpr bool kNeedsMode = (std::is_same_v<S, float> && !std::is_same_v<D, half>) ||
                              (std::is_same_v<S, bfloat16_t> && std::is_same_v<D, int32_t>) ||
                              (std::is_same_v<S, half> && kIsOneOf<D, int16_t, int32_t>);
  constexpr bool kIsExact = std::is_same_v<D, float> && kIsOneOf<S, half, bfloat16_t, int16_t>;
  if (kNeedsMode && mode == RoundMode::CAST_NONE) Fail("Cast: this pair needs a rounding mode");
  if (kIsExact && mode != RoundMode::CAST_NONE) {
    Fail("Cast: this pair is exact, the mode must be CAST_NONE");
  }
  if (mode == RoundMode::CAST_ODD && !(std::is_same_v<S, float> && std::is_same_v<D, half>)) {
    Fail("Cast: CAST_ODD is for float to half only");
  }
}

}  // namespace ascend_emulator

namespace AscendC {

template <typename T, typename U>
void Cast(const LocalTensor<T>& dst, const LocalTensor<U>& src, const RoundMode& mode,
          uint32_t count) {
  using namespace ascend_emulator;  // NOLINT
  static_assert(kHasCast<T, U>, "Cast: the chip has no such pair of types");
  CheckMode<T, U>(mode);
  constexpr int kLanes = kLanesOfBoth<T, U>;
  RunUnary("Cast", Lanes::First("Cast", kLanes, count),
           Operand("dst", dst, 1, kLanes * static_cast<int>(sizeof(T)) / 32),
           Operand("src", src, 1, kLanes * static_cast<int>(sizeof(U)) / 32),
           [&](U value) { return Converted<T>(value, mode); });
}

// A repeat has as many lanes as 256 bytes hold of the wider type.
template <typename T, typename U, bool isSetMask = true>
void Cast(const LocalTensor<T>& dst, const LocalTensor<U>& src, const RoundMode& mode,
          uint64_t mask, int32_t repeats, const UnaryRepeatParams& params) {
  using namespace ascend_emulator;  // NOLINT
  static_assert(kHasCast<T, U>, "Cast: the chip has no such pair of types");
  CheckMode<T, U>(mode);
  RunUnary("Cast",
           Lanes::Of<isSetMask>("Cast", kLanesOfBoth<T, U>, static_cast<int64_t>(mask), repeats),
           Operand("dst", dst, params.dstBlkStride, params.dstRepStride),
           Operand("src", src, params.srcBlkStride, params.srcRepStride),
           [&](U value) { return Converted<T>(value, mode); });
}

}  // namespace AscendC

#endif  // SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_CASTS_H_
