// Comparisons to bit masks, selection by them, broadcast of elements to blocks, and gather.

#ifndef SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_COMPARE_AND_GATHER_H_
#define SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_COMPARE_AND_GATHER_H_

#include <cstdint>

#include "scalar_arithmetic.h"
#include "vector_engine.h"

namespace AscendC {

enum class CMPMODE { LT = 0, GT, EQ, LE, GE, NE };

enum class SELMODE : uint8_t {
  VSEL_CMPMASK_SPR = 0,
  VSEL_TENSOR_SCALAR_MODE,
  VSEL_TENSOR_TENSOR_MODE
};

struct BrcbRepeatParams {
  BrcbRepeatParams() = default;
  BrcbRepeatParams(uint16_t block, uint16_t repeat) : dstBlkStride(block), dstRepStride(repeat) {}

  uint16_t dstBlkStride = 1;
  uint16_t dstRepStride = 8;
};

}  // namespace AscendC

namespace ascend_emulator {

template <typename T>
bool Compares(T a, T b, AscendC::CMPMODE mode) {
  switch (mode) {
    case AscendC::CMPMODE::LT:
      return Less(a, b);
    case AscendC::CMPMODE::GT:
      return Less(b, a);
    case AscendC::CMPMODE::EQ:
      return Equal(a, b);
    case AscendC::CMPMODE::LE:
      return Less(a, b) || Equal(a, b);
    case AscendC::CMPMODE::GE:
      return Less(b, a) || Equal(a, b);
    case AscendC::CMPMODE::NE:
      return !Equal(a, b);
  }
  Fail("Compare: no such mode");
}

// The count must be whole repeats, as documented: an instruction writes the bits of a repeat.
inline void CheckWholeRepeats(const char* name, int lanes, uint32_t count) {
  if (count % static_cast<uint32_t>(lanes) != 0) {
    Fail(std::string(name) + ": " + std::to_string(count) +
         " elements are not whole repeats of 256 bytes");
  }
}

template <typename T, typename Other>
void RunCompare(const char* name, const AscendC::LocalTensor<uint8_t>& dst_tensor,
                const AscendC::LocalTensor<T>& src, AscendC::CMPMODE mode, uint32_t count,
                const Other& other) {
  static_assert(kIsOneOf<T, half, float, int32_t>, "Compare: the chip has no such type");
  if (std::is_same_v<T, int32_t> && mode != AscendC::CMPMODE::EQ) {
    Fail(std::string(name) + ": int32_t compares for equality only");
  }
  constexpr int kLanes = kLanesOf<T>;
  CheckWholeRepeats(name, kLanes, count);
  const Lanes lanes = Lanes::First(name, kLanes, count);
  const Operand<uint8_t> dst("dst", dst_tensor, 1, 8);
  const Operand<T> src0("src0", src, 1, 8);
  VectorInstruction instruction(name, lanes.repeats());
  instruction.CheckOperand(dst, kBlockBytes);
  instruction.CheckOperand(src0, kBlockBytes);
  for (int64_t repeat = 0; repeat < lanes.repeats(); ++repeat) {
    T a[kMostLanes];
    T b[kMostLanes];
    instruction.Load(src0, lanes, repeat, a);
    other(instruction, lanes, repeat, b);
    uint8_t bits[kLanes / 8] = {};
    for (int i = 0; i < kLanes; ++i) {
      if (Compares(a[i], b[i], mode)) bits[i / 8] = static_cast<uint8_t>(bits[i / 8] | 1 << i % 8);
    }
    std::memcpy(instruction.Write(dst, static_cast<uint64_t>(repeat) * sizeof(bits), sizeof(bits)),
                bits, sizeof(bits));
  }
}

template <typename T, typename U, typename Other>
void RunSelect(const AscendC::LocalTensor<T>& dst_tensor,
               const AscendC::LocalTensor<U>& mask_tensor, const AscendC::LocalTensor<T>& src,
               uint32_t count, const Other& other) {
  static_assert(kIsOneOf<T, half, float>, "Select: the chip has no such type");
  const Lanes lanes = Lanes::First("Select", kLanesOf<T>, count);
  const Operand<T> dst("dst", dst_tensor, 1, 8);
  const Operand<U> mask("selMask", mask_tensor, 1, 8);
  const Operand<T> src0("src0", src, 1, 8);
  VectorInstruction instruction("Select", lanes.repeats());
  instruction.CheckOperand(dst, kBlockBytes);
  instruction.CheckOperand(mask, kBlockBytes);
  instruction.CheckOperand(src0, kBlockBytes);
  for (int64_t repeat = 0; repeat < lanes.repeats(); ++repeat) {
    T a[kMostLanes];
    T b[kMostLanes];
    T out[kMostLanes];
    instruction.Load(src0, lanes, repeat, a);
    other(instruction, lanes, repeat, b);
    constexpr uint64_t kBytes = kLanesOf<T> / 8;
    const uint8_t* bits = instruction.Read(mask, static_cast<uint64_t>(repeat) * kBytes, kBytes);
    for (int i = 0; i < lanes.lanes(); ++i) {
      if (lanes.Has(repeat, i)) out[i] = (bits[i / 8] >> i % 8 & 1) != 0 ? a[i] : b[i];
    }
    instruction.Store(dst, lanes, repeat, out);
  }
}

}  // namespace ascend_emulator

namespace AscendC {

template <typename T, typename U>
void Compare(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,
             CMPMODE mode, uint32_t count) {
  using namespace ascend_emulator;  // NOLINT
  static_assert(std::is_same_v<U, uint8_t>, "Compare: dst is of uint8_t");
  const Operand<T> second("src1", src1, 1, 8);
  RunCompare("Compare", dst, src0, mode, count,
             [&](VectorInstruction& instruction, const Lanes& lanes, int64_t repeat, T* values) {
               instruction.CheckOperand(second, kBlockBytes);
               instruction.Load(second, lanes, repeat, values);
             });
}
template <typename T, typename U>
void CompareScalar(const LocalTensor<U>& dst, const LocalTensor<T>& src, const T scalar,
                   CMPMODE mode, uint32_t count) {
  using namespace ascend_emulator;  // NOLINT
  static_assert(std::is_same_v<U, uint8_t>, "CompareScalar: dst is of uint8_t");
  RunCompare("CompareScalar", dst, src, mode, count,
             [&](VectorInstruction&, const Lanes& lanes, int64_t, T* values) {
               std::fill_n(values, lanes.lanes(), scalar);
             });
}

template <typename T, typename U>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& mask, const LocalTensor<T>& src0,
            const LocalTensor<T>& src1, SELMODE mode, uint32_t count) {
  using namespace ascend_emulator;  // NOLINT
  Check(mode == SELMODE::VSEL_TENSOR_TENSOR_MODE,
        "Select: with two tensors the mode must be VSEL_TENSOR_TENSOR_MODE");
  const Operand<T> second("src1", src1, 1, 8);
  RunSelect(dst, mask, src0, count,
            [&](VectorInstruction& instruction, const Lanes& lanes, int64_t repeat, T* values) {
              instruction.CheckOperand(second, kBlockBytes);
              instruction.Load(second, lanes, repeat, values);
            });
}
template <typename T, typename U>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& mask, const LocalTensor<T>& src0,
            T src1, SELMODE mode, uint32_t count) {
  using namespace ascend_emulator;  // NOLINT
  Check(mode == SELMODE::VSEL_TENSOR_SCALAR_MODE,
        "Select: with a scalar the mode must be VSEL_TENSOR_SCALAR_MODE");
  RunSelect(dst, mask, src0, count,
            [&](VectorInstruction&, const Lanes& lanes, int64_t, T* values) {
              std::fill_n(values, lanes.lanes(), src1);
            });
}

// Each of 8 elements per repeat fills a block of 32 bytes.
template <typename T>
void Brcb(const LocalTensor<T>& dst_tensor, const LocalTensor<T>& src_tensor, int32_t repeats,
          const BrcbRepeatParams& params) {
  using namespace ascend_emulator;  // NOLINT
  static_assert(sizeof(T) == 2 || sizeof(T) == 4, "Brcb: the chip has no such type");
  if (repeats < 0 || repeats > kMostRepeats) {
    Fail("Brcb: " + std::to_string(repeats) + " repeats, there may be 0 to 255");
  }
  const Operand<T> dst("dst", dst_tensor, params.dstBlkStride, params.dstRepStride);
  const Operand<T> src("src0", src_tensor, 1, 1);
  VectorInstruction instruction("Brcb", repeats);
  instruction.CheckOperand(dst, kBlockBytes);
  instruction.CheckOperand(src, kBlockBytes);
  constexpr int kPerBlock = static_cast<int>(kBlockBytes / sizeof(T));
  for (int64_t repeat = 0; repeat < repeats; ++repeat) {
    T values[8];
    std::memcpy(
        values,
        instruction.Read(src, static_cast<uint64_t>(repeat) * sizeof(values), sizeof(values)),
        sizeof(values));
    for (int i = 0; i < 8; ++i) {
      T block[kPerBlock];
      std::fill_n(block, kPerBlock, values[i]);
      std::memcpy(instruction.Write(dst, dst.Offset(repeat, i * kPerBlock), kBlockBytes), block,
                  kBlockBytes);
    }
  }
}

// dst[i] is at `base` + offsets[i] bytes in src.
template <typename T>
void Gather(const LocalTensor<T>& dst_tensor, const LocalTensor<T>& src_tensor,
            const LocalTensor<uint32_t>& offset_tensor, uint32_t base, uint32_t count) {
  using namespace ascend_emulator;  // NOLINT
  static_assert(sizeof(T) == 2 || sizeof(T) == 4, "Gather: the chip has no such type");
  const Lanes lanes = Lanes::First("Gather", kLanesOf<T>, count);
  const Operand<T> dst("dst", dst_tensor, 1, 8);
  const Operand<T> src("src", src_tensor, 1, 8);
  const Operand<uint32_t> offsets("srcOffset", offset_tensor, 1, 8);
  VectorInstruction instruction("Gather", lanes.repeats());
  instruction.CheckOperand(dst, kBlockBytes);
  instruction.CheckOperand(src, kBlockBytes);
  instruction.CheckOperand(offsets, kBlockBytes);
  for (uint64_t i = 0; i < count; ++i) {
    uint32_t offset;
    std::memcpy(&offset, instruction.Read(offsets, i * sizeof(offset), sizeof(offset)),
                sizeof(offset));
    if (offset % sizeof(T) != 0) Fail("Gather: an offset is not aligned to the element");
    instruction.Move(dst, i * sizeof(T), src, uint64_t{base} + offset, sizeof(T));
  }
}

}  // namespace AscendC

#endif  // SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_COMPARE_AND_GATHER_H_
