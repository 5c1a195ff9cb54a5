// What a lane computes. Sums and products of half are rounded to half, integers wrap around.

#ifndef SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_SCALAR_ARITHMETIC_H_
#define SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_SCALAR_ARITHMETIC_H_

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "float_types.h"

namespace ascend_emulator {

template <typename T>
bool IsNaN(T value) {
  if constexpr (std::is_integral_v<T>) {
    return false;
  } else {
    return std::isnan(static_cast<float>(value));
  }
}
template <typename T>
bool Less(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    return a < b;
  } else {
    return static_cast<float>(a) < static_cast<float>(b);
  }
}
template <typename T>
bool Equal(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    return a == b;
  } else {
    return static_cast<float>(a) == static_cast<float>(b);
  }
}

template <typename T>
T Sum(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
  } else {
    return T(static_cast<float>(a) + static_cast<float>(b));
  }
}
template <typename T>
T Difference(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(static_cast<uint64_t>(a) - static_cast<uint64_t>(b));
  } else {
    return T(static_cast<float>(a) - static_cast<float>(b));
  }
}
template <typename T>
T Product(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
  } else {
    return T(static_cast<float>(a) * static_cast<float>(b));
  }
}
template <typename T>
T Quotient(T a, T b) {
  return T(static_cast<float>(a) / static_cast<float>(b));
}

// NaN if either is: an assumption, the documentation is silent.
template <typename T>
T Larger(T a, T b) {
  if (IsNaN(a)) return a;
  if (IsNaN(b)) return b;
  return Less(a, b) ? b : a;
}
template <typename T>
T Smaller(T a, T b) {
  if (IsNaN(a)) return a;
  if (IsNaN(b)) return b;
  return Less(b, a) ? b : a;
}

}  // namespace ascend_emulator

#endif  // SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_SCALAR_ARITHMETIC_H_
