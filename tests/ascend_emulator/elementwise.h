// Element-wise vector instructions.
//
// The macros define, for each instruction, the overloads of Ascend C: the first `count` elements,
// or repeats with a mask that counts lanes or has a bit for each.

#ifndef SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_ELEMENTWISE_H_
#define SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_ELEMENTWISE_H_

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "scalar_arithmetic.h"
#include "vector_engine.h"

namespace ascend_emulator {

template <typename T>
T Absolute(T value) {
  return T(std::fabs(static_cast<float>(value)));
}

template <typename T>
T ShiftedRight(T value, T by, bool rounds) {
  const int64_t wide = value;
  if (rounds && by > 0) return static_cast<T>((wide + (int64_t{1} << (by - 1))) >> by);
  return static_cast<T>(wide >> by);
}
template <typename T>
T ShiftedLeft(T value, T by) {
  return static_cast<T>(static_cast<std::make_unsigned_t<T>>(value) << by);
}

template <typename T>
void CheckShift(const char* name, T by) {
  if (static_cast<int64_t>(by) < 0 ||
      static_cast<int64_t>(by) > static_cast<int64_t>(8 * sizeof(T))) {
    Fail(std::string(name) + ": a shift by " + std::to_string(by));
  }
}

template <typename T>
T BitsAnd(T a, T b) {
  return static_cast<T>(a & b);
}
template <typename T>
T BitsOr(T a, T b) {
  return static_cast<T>(a | b);
}
template <typename T>
T BitsNot(T a) {
  return static_cast<T>(~a);
}
template <typename T>
T CheckedShiftLeft(T value, T by) {
  CheckShift("ShiftLeft", by);
  return ShiftedLeft(value, by);
}

template <typename T>
void Fill(const char* name, const Lanes& lanes, const Operand<T>& dst, T value) {
  VectorInstruction instruction(name, lanes.repeats());
  instruction.CheckOperand(dst, kBlockBytes);
  T out[kMostLanes];
  std::fill_n(out, kMostLanes, value);
  for (int64_t repeat = 0; repeat < lanes.repeats(); ++repeat) {
    instruction.Store(dst, lanes, repeat, out);
  }
}

template <typename T>
void Progression(const char* name, const AscendC::LocalTensor<T>& dst, T first, T step,
                 int32_t count) {
  const Lanes lanes = Lanes::First(name, kLanesOf<T>, count);
  VectorInstruction instruction(name, lanes.repeats());
  const Operand<T> to("dst", dst, 1, 8);
  instruction.CheckOperand(to, kBlockBytes);
  for (int64_t repeat = 0; repeat < lanes.repeats(); ++repeat) {
    T out[kMostLanes];
    for (int i = 0; i < lanes.lanes(); ++i) {
      const int64_t number = repeat * lanes.lanes() + i;
      if constexpr (std::is_integral_v<T>) {
        out[i] = static_cast<T>(first + number * step);
      } else {
        out[i] =
            T(static_cast<float>(first) + static_cast<float>(number) * static_cast<float>(step));
      }
    }
    instruction.Store(to, lanes, repeat, out);
  }
}

template <typename D, typename S>
constexpr int kLanesOfBoth = kLanesOf<std::conditional_t<(sizeof(D) > sizeof(S)), D, S>>;

// dst = function(src0, src1, dst), with operands of different types.
template <typename D, typename S, typename Function>
void RunAccumulate(const char* name, const Lanes& lanes, const Operand<D>& dst,
                   const Operand<S>& src0, const Operand<S>& src1, const Function& function) {
  VectorInstruction instruction(name, lanes.repeats());
  instruction.CheckOperand(dst, kBlockBytes);
  instruction.CheckOperand(src0, kBlockBytes);
  instruction.CheckOperand(src1, kBlockBytes);
  for (int64_t repeat = 0; repeat < lanes.repeats(); ++repeat) {
    S a[kMostLanes];
    S b[kMostLanes];
    D out[kMostLanes];
    instruction.Load(src0, lanes, repeat, a);
    instruction.Load(src1, lanes, repeat, b);
    instruction.Load(dst, lanes, repeat, out);
    for (int i = 0; i < lanes.lanes(); ++i) {
      if (lanes.Has(repeat, i)) out[i] = Stored(function(a[i], b[i], out[i]));
    }
    instruction.Store(dst, lanes, repeat, out);
  }
}

}  // namespace ascend_emulator

namespace AscendC {

#define ASCEND_EMULATOR_BINARY(Name, Function, may_chain, ...)                                 \
  template <typename T>                                                                        \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, \
            const int32_t& count) {                                                            \
    using namespace ascend_emulator; /* NOLINT */                                              \
    static_assert(kIsOneOf<T, __VA_ARGS__>, #Name ": the chip has no such type");              \
    RunBinary(#Name, Lanes::First(#Name, kLanesOf<T>, count), Operand("dst", dst, 1, 8),       \
              Operand("src0", src0, 1, 8), Operand("src1", src1, 1, 8), false, Function<T>);   \
  }                                                                                            \
  template <typename T, bool isSetMask = true>                                                 \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, \
            uint64_t mask, int32_t repeats, const BinaryRepeatParams& params) {                \
    using namespace ascend_emulator; /* NOLINT */                                              \
    static_assert(kIsOneOf<T, __VA_ARGS__>, #Name ": the chip has no such type");              \
    RunBinary(#Name,                                                                           \
              Lanes::Of<isSetMask>(#Name, kLanesOf<T>, static_cast<int64_t>(mask), repeats),   \
              Operand("dst", dst, params.dstBlkStride, params.dstRepStride),                   \
              Operand("src0", src0, params.src0BlkStride, params.src0RepStride),               \
              Operand("src1", src1, params.src1BlkStride, params.src1RepStride), may_chain,    \
              Function<T>);                                                                    \
  }                                                                                            \
  template <typename T, bool isSetMask = true>                                                 \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, \
            const uint64_t mask[], int32_t repeats, const BinaryRepeatParams& params) {        \
    using namespace ascend_emulator; /* NOLINT */                                              \
    static_assert(kIsOneOf<T, __VA_ARGS__>, #Name ": the chip has no such type");              \
    RunBinary(#Name, Lanes::Of<isSetMask>(#Name, kLanesOf<T>, mask, repeats),                  \
              Operand("dst", dst, params.dstBlkStride, params.dstRepStride),                   \
              Operand("src0", src0, params.src0BlkStride, params.src0RepStride),               \
              Operand("src1", src1, params.src1BlkStride, params.src1RepStride), may_chain,    \
              Function<T>);                                                                    \
  }

ASCEND_EMULATOR_BINARY(Add, Sum, true, half, float, int16_t, int32_t)
ASCEND_EMULATOR_BINARY(Sub, Difference, true, half, float, int16_t, int32_t)
ASCEND_EMULATOR_BINARY(Mul, Product, true, half, float, int16_t, int32_t)
ASCEND_EMULATOR_BINARY(Div, Quotient, false, half, float)
ASCEND_EMULATOR_BINARY(Max, Larger, true, half, float, int16_t, int32_t)
ASCEND_EMULATOR_BINARY(Min, Smaller, true, half, float, int16_t, int32_t)
ASCEND_EMULATOR_BINARY(And, BitsAnd, false, int16_t, uint16_t)
ASCEND_EMULATOR_BINARY(Or, BitsOr, false, int16_t, uint16_t)
#undef ASCEND_EMULATOR_BINARY

#define ASCEND_EMULATOR_SCALAR(Name, Function, ...)                                                \
  template <typename T, bool isSetMask = true>                                                     \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalar,                 \
            const int32_t& count) {                                                                \
    using namespace ascend_emulator; /* NOLINT */                                                  \
    static_assert(kIsOneOf<T, __VA_ARGS__>, #Name ": the chip has no such type");                  \
    RunUnary(#Name, Lanes::First(#Name, kLanesOf<T>, count), Operand("dst", dst, 1, 8),            \
             Operand("src", src, 1, 8), [&](T value) { return Function<T>(value, scalar); });      \
  }                                                                                                \
  template <typename T, bool isSetMask = true>                                                     \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalar, uint64_t mask,  \
            int32_t repeats, const UnaryRepeatParams& params) {                                    \
    using namespace ascend_emulator; /* NOLINT */                                                  \
    static_assert(kIsOneOf<T, __VA_ARGS__>, #Name ": the chip has no such type");                  \
    RunUnary(#Name, Lanes::Of<isSetMask>(#Name, kLanesOf<T>, static_cast<int64_t>(mask), repeats), \
             Operand("dst", dst, params.dstBlkStride, params.dstRepStride),                        \
             Operand("src", src, params.srcBlkStride, params.srcRepStride),                        \
             [&](T value) { return Function<T>(value, scalar); });                                 \
  }                                                                                                \
  template <typename T, bool isSetMask = true>                                                     \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalar,                 \
            const uint64_t mask[], int32_t repeats, const UnaryRepeatParams& params) {             \
    using namespace ascend_emulator; /* NOLINT */                                                  \
    static_assert(kIsOneOf<T, __VA_ARGS__>, #Name ": the chip has no such type");                  \
    RunUnary(#Name, Lanes::Of<isSetMask>(#Name, kLanesOf<T>, mask, repeats),                       \
             Operand("dst", dst, params.dstBlkStride, params.dstRepStride),                        \
             Operand("src", src, params.srcBlkStride, params.srcRepStride),                        \
             [&](T value) { return Function<T>(value, scalar); });                                 \
  }

ASCEND_EMULATOR_SCALAR(Adds, Sum, half, float, int16_t, int32_t)
ASCEND_EMULATOR_SCALAR(Muls, Product, half, float, int16_t, int32_t)
ASCEND_EMULATOR_SCALAR(Maxs, Larger, half, float, int16_t, int32_t)
ASCEND_EMULATOR_SCALAR(Mins, Smaller, half, float, int16_t, int32_t)
ASCEND_EMULATOR_SCALAR(ShiftLeft, CheckedShiftLeft, int16_t, uint16_t, int32_t, uint32_t)
#undef ASCEND_EMULATOR_SCALAR

#define ASCEND_EMULATOR_UNARY(Name, Function, ...)                                                 \
  template <typename T>                                                                            \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t& count) {          \
    using namespace ascend_emulator; /* NOLINT */                                                  \
    static_assert(kIsOneOf<T, __VA_ARGS__>, #Name ": the chip has no such type");                  \
    RunUnary(#Name, Lanes::First(#Name, kLanesOf<T>, count), Operand("dst", dst, 1, 8),            \
             Operand("src", src, 1, 8), Function<T>);                                              \
  }                                                                                                \
  template <typename T, bool isSetMask = true>                                                     \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint64_t mask, int32_t repeats,  \
            const UnaryRepeatParams& params) {                                                     \
    using namespace ascend_emulator; /* NOLINT */                                                  \
    static_assert(kIsOneOf<T, __VA_ARGS__>, #Name ": the chip has no such type");                  \
    RunUnary(#Name, Lanes::Of<isSetMask>(#Name, kLanesOf<T>, static_cast<int64_t>(mask), repeats), \
             Operand("dst", dst, params.dstBlkStride, params.dstRepStride),                        \
             Operand("src", src, params.srcBlkStride, params.srcRepStride), Function<T>);          \
  }

ASCEND_EMULATOR_UNARY(Abs, Absolute, half, float)
ASCEND_EMULATOR_UNARY(Not, BitsNot, int16_t, uint16_t)
#undef ASCEND_EMULATOR_UNARY

// Arithmetic for signed types, logical for unsigned ones.
template <typename T, bool isSetMask = true>
void ShiftRight(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& by,
                const int32_t& count, bool rounds = false) {
  using namespace ascend_emulator;  // NOLINT
  static_assert(kIsOneOf<T, int16_t, uint16_t, int32_t, uint32_t>,
                "ShiftRight: the chip has no such type");
  CheckShift("ShiftRight", by);
  RunUnary("ShiftRight", Lanes::First("ShiftRight", kLanesOf<T>, count), Operand("dst", dst, 1, 8),
           Operand("src", src, 1, 8), [&](T value) { return ShiftedRight(value, by, rounds); });
}
template <typename T, bool isSetMask = true>
void ShiftRight(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& by, uint64_t mask,
                int32_t repeats, const UnaryRepeatParams& params, bool rounds = false) {
  using namespace ascend_emulator;  // NOLINT
  static_assert(kIsOneOf<T, int16_t, uint16_t, int32_t, uint32_t>,
                "ShiftRight: the chip has no such type");
  CheckShift("ShiftRight", by);
  RunUnary("ShiftRight",
           Lanes::Of<isSetMask>("ShiftRight", kLanesOf<T>, static_cast<int64_t>(mask), repeats),
           Operand("dst", dst, params.dstBlkStride, params.dstRepStride),
           Operand("src", src, params.srcBlkStride, params.srcRepStride),
           [&](T value) { return ShiftedRight(value, by, rounds); });
}

// dst = src0 * src1 + dst. half may be added to float.
template <typename T, typename U>
void MulAddDst(const LocalTensor<T>& dst, const LocalTensor<U>& src0, const LocalTensor<U>& src1,
               const int32_t& count) {
  using namespace ascend_emulator;  // NOLINT
  constexpr int kLanes = kLanesOfBoth<T, U>;
  constexpr int kBlocks = static_cast<int>(kLanes * sizeof(U) / kBlockBytes);
  static_assert((kIsOneOf<T, half, float> && std::is_same_v<T, U>) ||
                    (std::is_same_v<T, float> && std::is_same_v<U, half>),
                "MulAddDst: the chip has no such types");
  RunAccumulate("MulAddDst", Lanes::First("MulAddDst", kLanes, count), Operand("dst", dst, 1, 8),
                Operand("src0", src0, 1, kBlocks), Operand("src1", src1, 1, kBlocks),
                [](U a, U b, T c) {
                  return T(static_cast<float>(a) * static_cast<float>(b) + static_cast<float>(c));
                });
}
template <typename T, typename U, bool isSetMask = true>
void MulAddDst(const LocalTensor<T>& dst, const LocalTensor<U>& src0, const LocalTensor<U>& src1,
               uint64_t mask, int32_t repeats, const BinaryRepeatParams& params) {
  using namespace ascend_emulator;  // NOLINT
  static_assert((kIsOneOf<T, half, float> && std::is_same_v<T, U>) ||
                    (std::is_same_v<T, float> && std::is_same_v<U, half>),
                "MulAddDst: the chip has no such types");
  RunAccumulate(
      "MulAddDst",
      Lanes::Of<isSetMask>("MulAddDst", kLanesOfBoth<T, U>, static_cast<int64_t>(mask), repeats),
      Operand("dst", dst, params.dstBlkStride, params.dstRepStride),
      Operand("src0", src0, params.src0BlkStride, params.src0RepStride),
      Operand("src1", src1, params.src1BlkStride, params.src1RepStride), [](U a, U b, T c) {
        return T(static_cast<float>(a) * static_cast<float>(b) + static_cast<float>(c));
      });
}

// dst = src * scalar + dst.
template <typename T, typename U>
void Axpy(const LocalTensor<T>& dst, const LocalTensor<U>& src, const U& scalar,
          const int32_t& count) {
  using namespace ascend_emulator;  // NOLINT
  constexpr int kLanes = kLanesOfBoth<T, U>;
  constexpr int kBlocks = static_cast<int>(kLanes * sizeof(U) / kBlockBytes);
  static_assert((kIsOneOf<T, half, float> && std::is_same_v<T, U>) ||
                    (std::is_same_v<T, float> && std::is_same_v<U, half>),
                "Axpy: the chip has no such types");
  const Operand<U> source("src", src, 1, kBlocks);
  RunAccumulate(
      "Axpy", Lanes::First("Axpy", kLanes, count), Operand("dst", dst, 1, 8), source, source,
      [&](U a, U, T c) {
        return T(static_cast<float>(a) * static_cast<float>(scalar) + static_cast<float>(c));
      });
}

template <typename T>
void Duplicate(const LocalTensor<T>& dst, const T& value, const int32_t& count) {
  using namespace ascend_emulator;  // NOLINT
  static_assert(kIsOneOf<T, half, bfloat16_t, float, int16_t, uint16_t, int32_t, uint32_t>,
                "Duplicate: the chip has no such type");
  Fill("Duplicate", Lanes::First("Duplicate", kLanesOf<T>, count), Operand("dst", dst, 1, 8),
       value);
}
template <typename T, bool isSetMask = true>
void Duplicate(const LocalTensor<T>& dst, const T& value, uint64_t mask, int32_t repeats,
               uint16_t block_stride, uint8_t repeat_stride) {
  using namespace ascend_emulator;  // NOLINT
  static_assert(kIsOneOf<T, half, bfloat16_t, float, int16_t, uint16_t, int32_t, uint32_t>,
                "Duplicate: the chip has no such type");
  Fill("Duplicate",
       Lanes::Of<isSetMask>("Duplicate", kLanesOf<T>, static_cast<int64_t>(mask), repeats),
       Operand("dst", dst, block_stride, repeat_stride), value);
}

// first, first + step, ... The real one is several instructions; counted as one of as many repeats.
template <typename T>
void ArithProgression(const LocalTensor<T>& dst, const T first, const T step, int32_t count) {
  using namespace ascend_emulator;  // NOLINT
  static_assert(kIsOneOf<T, half, float, int16_t, int32_t>,
                "ArithProgression: the chip has no such type");
  Progression("ArithProgression", dst, first, step, count);
}
template <typename T>
void CreateVecIndex(LocalTensor<T> dst, const T& first, uint32_t count) {
  using namespace ascend_emulator;  // NOLINT
  static_assert(kIsOneOf<T, half, float, int16_t, int32_t>,
                "CreateVecIndex: the chip has no such type");
  Progression("CreateVecIndex", dst, first, T(1), static_cast<int32_t>(count));
}

}  // namespace AscendC

#endif  // SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_ELEMENTWISE_H_
