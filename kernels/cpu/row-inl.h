// How the CPU kernels read a row of float16, bfloat16 or float32 as float32, and write one, and
// what they do alike with the vectors between. Included once per SIMD target, hence the toggle.

#if defined(SELECT_ATTN_OPS_CPU_ROW_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SELECT_ATTN_OPS_CPU_ROW_INL_H_
#undef SELECT_ATTN_OPS_CPU_ROW_INL_H_
#else
#define SELECT_ATTN_OPS_CPU_ROW_INL_H_
#endif

#include <cstdint>
#include <cstring>

#include "cpu/prefetch.h"
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

// b if either is NaN.
HWY_INLINE VF MaxOrSecond(VF a, VF b) {
#if SELECT_ATTN_HAS_X86_VECTORS
  return hn::Max(a, b);
#else
  return hn::IfThenElse(hn::Gt(a, b), a, b);
#endif
}

HWY_INLINE VF LoadOnce(const float* HWY_RESTRICT from) {
  return KeepInRegister(hn::LoadU(DF(), from));
}

// Elements that one Load reads: two vectors of float32.
HWY_INLINE int64_t LoadSize() { return static_cast<int64_t>(2 * hn::Lanes(DF())); }

// Calls fn(i) with an element i of each cache line that what one Load at d reads covers or begins.
template <typename T, typename F>
HWY_INLINE void ForEachLine(int64_t d, F&& fn) {
  constexpr auto kLine = static_cast<int64_t>(kCacheLine / sizeof(T));
  const int64_t step = LoadSize();
  if (step < kLine && d % kLine != 0) return;
  // A count, because GCC does not see that a loop up to d + step makes one turn.
  const int64_t lines = step < kLine ? 1 : step / kLine;
  for (int64_t i = 0; i < lines; ++i) fn(d + i * kLine);
}

// What a diagnostic run does in place of a Load: reads the same bytes into `bits`, so that the
// compiler does not leave it out.
template <typename T>
HWY_INLINE void ReadOnly(const T* HWY_RESTRICT from, VF& bits) {
  const auto* floats = reinterpret_cast<const float*>(from);
  const size_t count = 2 * hn::Lanes(DF()) * sizeof(T) / sizeof(float);
  for (size_t i = 0; i < count; i += hn::Lanes(DF())) {
    bits = hn::Or(bits, hn::LoadU(DF(), floats + i));
  }
}

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

// Store(a, b, to) rounds what Load(from, a, b) widened to nearest, ties to even. NaN stays NaN.
template <typename T>
struct RowStorer;

template <>
struct RowStorer<float> {
  static HWY_INLINE void Store(VF a, VF b, float* HWY_RESTRICT to) {
    hn::StoreU(a, DF(), to);
    hn::StoreU(b, DF(), to + hn::Lanes(DF()));
  }
};

template <>
struct RowStorer<hwy::float16_t> {
  static HWY_INLINE void Store(VF a, VF b, hwy::float16_t* HWY_RESTRICT to) {
    Narrow(a, to);
    Narrow(b, to + hn::Lanes(DF()));
  }

 private:
  static HWY_INLINE void Narrow(VF wide, hwy::float16_t* HWY_RESTRICT to) {
    const DF df;
#if (HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2) || HWY_ARCH_ARM
    const hn::Rebind<hwy::float16_t, DF> df16;
    hn::StoreU(hn::DemoteTo(df16, wide), df16, to);
#else
    // Without an instruction for it, Highway truncates.
    const hn::RebindToUnsigned<DF> du32;
    const hn::RebindToSigned<DF> di32;
    const hn::Rebind<uint16_t, DF> du16;
    const auto bits = hn::BitCast(du32, wide);
    const auto magnitude = hn::And(bits, hn::Set(du32, 0x7FFFFFFFu));
    const auto sign = hn::ShiftRight<16>(hn::Xor(bits, magnitude));
    // Half a unit in the last place that stays, less one where that is even; a carry into the
    // exponent is right.
    const auto odd = hn::And(hn::ShiftRight<13>(magnitude), hn::Set(du32, 1u));
    const auto rounded = hn::Add(magnitude, hn::Add(hn::Set(du32, 0x0FFFu), odd));
    const auto normal = hn::ShiftRight<13>(hn::Sub(rounded, hn::Set(du32, 112u << 23)));
    // Adding 0.5 makes the last place of float32 that of the subnormals of float16.
    const auto half = hn::Set(df, 0.5f);
    const auto subnormal = hn::Sub(hn::BitCast(du32, hn::Add(hn::BitCast(df, magnitude), half)),
                                   hn::BitCast(du32, half));
    const auto signed_magnitude = hn::BitCast(di32, magnitude);
    const auto is_subnormal = hn::Lt(signed_magnitude, hn::Set(di32, 113 << 23));
    const auto is_large = hn::Gt(signed_magnitude, hn::Set(di32, (143 << 23) - 1));
    const auto is_nan = hn::Gt(signed_magnitude, hn::Set(di32, 0x7F800000));
    auto narrow =
        hn::IfThenElse(is_subnormal, hn::BitCast(di32, subnormal), hn::BitCast(di32, normal));
    narrow = hn::IfThenElse(is_large, hn::Set(di32, 0x7C00), narrow);
    narrow = hn::IfThenElse(is_nan, hn::Set(di32, 0x7E00), narrow);
    hn::StoreU(hn::DemoteTo(du16, hn::Or(narrow, hn::BitCast(di32, sign))), du16,
               reinterpret_cast<uint16_t*>(to));
#endif
  }
};

template <>
struct RowStorer<hwy::bfloat16_t> {
  static HWY_INLINE void Store(VF a, VF b, hwy::bfloat16_t* HWY_RESTRICT to) {
#if HWY_TARGET == HWY_SCALAR
    const hn::Rebind<uint16_t, DF> du16;
    hn::StoreU(hn::TruncateTo(du16, hn::ShiftRight<16>(Rounded(a))), du16,
               reinterpret_cast<uint16_t*>(to));
    hn::StoreU(hn::TruncateTo(du16, hn::ShiftRight<16>(Rounded(b))), du16,
               reinterpret_cast<uint16_t*>(to + 1));
#else
    const hn::RebindToUnsigned<DF> du32;
    const hn::Repartition<uint16_t, DF> du16;
    const auto odd = hn::And(Rounded(b), hn::Set(du32, 0xFFFF0000u));
    const auto pairs = hn::Or(hn::ShiftRight<16>(Rounded(a)), odd);
    hn::StoreU(hn::BitCast(du16, pairs), du16, reinterpret_cast<uint16_t*>(to));
#endif
  }

 private:
  // The upper half is the bfloat16.
  static HWY_INLINE hn::Vec<hn::RebindToUnsigned<DF>> Rounded(VF wide) {
    const hn::RebindToUnsigned<DF> du32;
    const auto bits = hn::BitCast(du32, wide);
    // Half a unit in the last place that stays, less one where that is even; a carry into the
    // exponent is right.
    const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du32, 1u));
    const auto rounded = hn::Add(bits, hn::Add(hn::Set(du32, 0x7FFFu), odd));
    const auto is_nan = hn::RebindMask(du32, hn::IsNaN(wide));
    return hn::IfThenElse(is_nan, hn::Set(du32, 0x7FC00000u), rounded);
  }
};

// As RowStorer<T>::Store for the last `count` < LoadSize() elements of a row.
template <typename T>
HWY_INLINE void StoreTail(VF a, VF b, int64_t count, T* HWY_RESTRICT to) {
  HWY_ALIGN T padded[2 * hn::MaxLanes(DF())];
  RowStorer<T>::Store(a, b, padded);
  std::memcpy(to, padded, static_cast<size_t>(count) * sizeof(T));
}

constexpr int kRowsAtOnce = 4;

// The sums over the lanes of four vectors, in one. Summing them together takes a third of the
// instructions that four SumOfLanes do.
#if HWY_HAVE_SCALABLE || HWY_TARGET == HWY_SCALAR
HWY_INLINE void StoreSums(const VF* HWY_RESTRICT v, float* HWY_RESTRICT sums) {
  for (int i = 0; i < kRowsAtOnce; ++i) sums[i] = hn::GetLane(hn::SumOfLanes(DF(), v[i]));
}
#else
template <class D, class V>
HWY_INLINE hn::Vec<hn::Full128<float>> SumOfBlocks(D /*d*/, V v) {
  if constexpr (hn::MaxLanes(D()) == 4) {
    return v;
  } else {
    const hn::Half<D> half;
    return SumOfBlocks(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)));
  }
}

HWY_INLINE void StoreSums(const VF* HWY_RESTRICT v, float* HWY_RESTRICT sums) {
  const DF df;
  const hn::Repartition<double, DF> dd;
  const auto pair = [df](VF a, VF b) HWY_ATTR {
    return hn::Add(hn::InterleaveLower(df, a, b), hn::InterleaveUpper(df, a, b));
  };
  const auto low = hn::BitCast(dd, pair(v[0], v[1]));
  const auto high = hn::BitCast(dd, pair(v[2], v[3]));
  const auto blocks = hn::Add(hn::BitCast(df, hn::InterleaveLower(dd, low, high)),
                              hn::BitCast(df, hn::InterleaveUpper(dd, low, high)));
  hn::StoreU(SumOfBlocks(df, blocks), hn::Full128<float>(), sums);
}
#endif

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace select_attn::cpu
HWY_AFTER_NAMESPACE();

#endif  // SELECT_ATTN_OPS_CPU_ROW_INL_H_
