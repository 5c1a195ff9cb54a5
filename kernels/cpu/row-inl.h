// How the CPU kernels read a row of float16, bfloat16 or float32 as float32. Included once per SIMD
// target, hence the toggle.

#if defined(SELECT_ATTN_OPS_CPU_ROW_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SELECT_ATTN_OPS_CPU_ROW_INL_H_
#undef SELECT_ATTN_OPS_CPU_ROW_INL_H_
#else
#define SELECT_ATTN_OPS_CPU_ROW_INL_H_
#endif

#include <cstdint>
#include <cstring>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace select_attn::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;

// Whether a vector is one of the processor's own.
#undef SELECT_ATTN_HAS_X86_VECTORS
#if HWY_ARCH_X86 && HWY_TARGET != HWY_SCALAR && HWY_TARGET != HWY_EMU128
#define SELECT_ATTN_HAS_X86_VECTORS 1
#else
#define SELECT_ATTN_HAS_X86_VECTORS 0
#endif

// GCC would load a vector anew for every use of it that can take its operand from memory, and loads
// are what the kernels are short of.
template <class V>
HWY_INLINE V KeepInRegister(V v) {
#if SELECT_ATTN_HAS_X86_VECTORS && HWY_COMPILER_GCC_ACTUAL
  asm("" : "+v"(v.raw));
#endif
  return v;
}

HWY_INLINE VF LoadOnce(const float* HWY_RESTRICT from) {
  return KeepInRegister(hn::LoadU(DF(), from));
}

// Elements that one Load reads: two vectors of float32.
HWY_INLINE int64_t LoadSize() { return static_cast<int64_t>(2 * hn::Lanes(DF())); }

// Load(from, a, b) widens LoadSize() elements into two vectors, in an order that is the loader's
// own but the same for every row: rows loaded alike can be combined lane by lane.
template <typename T>
struct RowLoader;

template <>
struct RowLoader<float> {
  static HWY_INLINE void Load(const float* HWY_RESTRICT from, VF& a, VF& b) {
    a = LoadOnce(from);
    b = LoadOnce(from + hn::Lanes(DF()));
  }
};

template <>
struct RowLoader<hwy::float16_t> {
  static HWY_INLINE void Load(const hwy::float16_t* HWY_RESTRICT from, VF& a, VF& b) {
    a = Widen(from);
    b = Widen(from + hn::Lanes(DF()));
  }

 private:
  static HWY_INLINE VF Widen(const hwy::float16_t* HWY_RESTRICT from) {
    const DF df;
    const auto wide = hn::PromoteTo(df, hn::LoadU(hn::Rebind<hwy::float16_t, DF>(), from));
#if (HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2) || HWY_ARCH_ARM
    return wide;
#else
    // Without an instruction for it, Highway takes infinities and NaN for numbers from 65536 up.
    const hn::RebindToUnsigned<DF> du32;
    const auto bits = hn::PromoteTo(
        du32, hn::LoadU(hn::Rebind<uint16_t, DF>(), reinterpret_cast<const uint16_t*>(from)));
    const auto exponent = hn::Set(du32, 0x7C00u);
    const auto is_special = hn::Eq(hn::And(bits, exponent), exponent);
    const auto sign = hn::ShiftLeft<16>(hn::And(bits, hn::Set(du32, 0x8000u)));
    const auto fraction = hn::ShiftLeft<13>(hn::And(bits, hn::Set(du32, 0x03FFu)));
    const auto special = hn::Or(hn::Or(sign, fraction), hn::Set(du32, 0x7F800000u));
    return hn::IfThenElse(hn::RebindMask(df, is_special), hn::BitCast(df, special), wide);
#endif
  }
};

// bfloat16 is the upper half of a float32: even and odd elements taken apart need no shuffle.
template <>
struct RowLoader<hwy::bfloat16_t> {
  static HWY_INLINE void Load(const hwy::bfloat16_t* HWY_RESTRICT from, VF& a, VF& b) {
    const DF df;
#if HWY_TARGET == HWY_SCALAR  // vectors of one lane, which hold no pairs
    a = hn::PromoteTo(df, hn::LoadU(hn::Rebind<hwy::bfloat16_t, DF>(), from));
    b = hn::PromoteTo(df, hn::LoadU(hn::Rebind<hwy::bfloat16_t, DF>(), from + 1));
#else
    const hn::RebindToUnsigned<DF> du32;
    const hn::Repartition<uint16_t, DF> du16;
    const auto pairs =
        KeepInRegister(hn::BitCast(du32, hn::LoadU(du16, reinterpret_cast<const uint16_t*>(from))));
    a = hn::BitCast(df, hn::ShiftLeft<16>(pairs));
    b = hn::BitCast(df, hn::And(pairs, hn::Set(du32, 0xFFFF0000u)));
#endif
  }
};

// As RowLoader<T>::Load for the last `count` < LoadSize() elements of a row; zeros behind them.
template <typename T>
HWY_INLINE void LoadTail(const T* HWY_RESTRICT from, int64_t count, VF& a, VF& b) {
  HWY_ALIGN T padded[2 * hn::MaxLanes(DF())];
  std::memset(padded, 0, sizeof(padded));
  std::memcpy(padded, from, static_cast<size_t>(count) * sizeof(T));
  RowLoader<T>::Load(padded, a, b);
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace select_attn::cpu
HWY_AFTER_NAMESPACE();

#endif  // SELECT_ATTN_OPS_CPU_ROW_INL_H_
