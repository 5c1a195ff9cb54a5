// Reductions within repeats, blocks and pairs. Sums add neighbours, then those sums, and so on, as
// documented; lanes that are masked out count as 0.

#ifndef SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_REDUCTIONS_H_
#define SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_REDUCTIONS_H_

#include <cstdint>
#include <type_traits>

#include "scalar_arithmetic.h"
#include "vector_engine.h"

namespace AscendC {

enum class ReduceOrder {
  ORDER_VALUE_INDEX = 0,
  ORDER_INDEX_VALUE,
  ORDER_ONLY_VALUE,
  ORDER_ONLY_INDEX
};

}  // namespace AscendC

namespace ascend_emulator {

template <typename T>
T TreeSum(const T* values, int count) {
  T sums[kMostLanes];
  std::copy_n(values, count, sums);
  for (; count > 1; count = (count + 1) / 2) {
    for (int i = 0; i < count / 2; ++i) sums[i] = Sum(sums[2 * i], sums[2 * i + 1]);
    if (count % 2 == 1) sums[count / 2] = sums[count - 1];
  }
  return sums[0];
}

// The lane of the first largest, or smallest, of lanes [begin, end); -1 if none is active.
template <typename T>
int Extreme(const Lanes& lanes, int64_t repeat, const T* values, int begin, int end, bool largest) {
  int best = -1;
  for (int i = begin; i < end; ++i) {
    if (!lanes.Has(repeat, i)) continue;
    if (best < 0 || (largest ? Less(values[best], values[i]) : Less(values[i], values[best]))) {
      best = i;
    }
  }
  return best;
}

template <typename T>
void CheckReduction(const VectorInstruction& instruction, const Operand<T>& dst,
                    const Operand<T>& src, uint32_t dst_alignment) {
  static_assert(kIsOneOf<T, half, float>, "reductions are of half and float");
  instruction.CheckOperand(dst, dst_alignment);
  instruction.CheckOperand(src, kBlockBytes);
}

// Calls function(instruction, repeat, values), inactive lanes zero.
template <typename T, typename Function>
void RunReduction(const char* name, const Lanes& lanes, const Operand<T>& dst,
                  const Operand<T>& src, uint32_t dst_alignment, const Function& function) {
  VectorInstruction instruction(name, lanes.repeats());
  CheckReduction(instruction, dst, src, dst_alignment);
  for (int64_t repeat = 0; repeat < lanes.repeats(); ++repeat) {
    T values[kMostLanes];
    std::fill_n(values, kMostLanes, T(0.0f));
    instruction.Load(src, lanes, repeat, values);
    function(instruction, repeat, values);
  }
}

template <typename T>
void PutAt(VectorInstruction& instruction, const Operand<T>& dst, uint64_t element, T value) {
  const T stored = Stored(value);
  std::memcpy(instruction.Write(dst, element * sizeof(T), sizeof(T)), &stored, sizeof(T));
}

// dst_stride counts results.
template <typename T>
void WholeSum(const char* name, const Lanes& lanes, const AscendC::LocalTensor<T>& dst_tensor,
              const AscendC::LocalTensor<T>& src_tensor, int32_t dst_stride, int32_t src_block,
              int32_t src_repeat) {
  const Operand<T> dst("dst", dst_tensor, 1, 0);
  const Operand<T> src("src", src_tensor, src_block, src_repeat);
  RunReduction(name, lanes, dst, src, sizeof(T),
               [&](VectorInstruction& instruction, int64_t repeat, const T* values) {
                 PutAt(instruction, dst, static_cast<uint64_t>(repeat * dst_stride),
                       TreeSum(values, lanes.lanes()));
               });
}

template <typename T>
void WholeExtreme(const char* name, bool largest, const Lanes& lanes,
                  const AscendC::LocalTensor<T>& dst_tensor,
                  const AscendC::LocalTensor<T>& src_tensor, int32_t dst_stride, int32_t src_block,
                  int32_t src_repeat, AscendC::ReduceOrder order) {
  using AscendC::ReduceOrder;
  using Index = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  const Operand<T> dst("dst", dst_tensor, 1, 0);
  const Operand<T> src("src", src_tensor, src_block, src_repeat);
  RunReduction(name, lanes, dst, src, sizeof(T),
               [&](VectorInstruction& instruction, int64_t repeat, const T* values) {
                 const int best = Extreme(lanes, repeat, values, 0, lanes.lanes(), largest);
                 if (best < 0) return;
                 const auto index = static_cast<Index>(best);
                 const auto place = static_cast<uint64_t>(repeat * dst_stride);
                 if (order == ReduceOrder::ORDER_ONLY_VALUE) {
                   PutAt(instruction, dst, place, values[best]);
                 } else if (order == ReduceOrder::ORDER_ONLY_INDEX) {
                   const auto wide = static_cast<uint32_t>(index);
                   std::memcpy(instruction.Write(dst, place * sizeof(wide), sizeof(wide)), &wide,
                               sizeof(wide));
                 } else {
                   const uint64_t value_first = order == ReduceOrder::ORDER_VALUE_INDEX ? 0 : 1;
                   PutAt(instruction, dst, 2 * place + value_first, values[best]);
                   PutAt(instruction, dst, 2 * place + 1 - value_first, BitCast<T>(index));
                 }
               });
}

enum class BlockReduction { kSum, kMax, kMin };

// A result per block of 32 bytes; dst_stride counts the 8 results of a repeat.
template <typename T>
void BlockReduce(const char* name, BlockReduction kind, const Lanes& lanes,
                 const AscendC::LocalTensor<T>& dst_tensor,
                 const AscendC::LocalTensor<T>& src_tensor, int32_t dst_stride, int32_t src_block,
                 int32_t src_repeat) {
  constexpr int kPerBlock = static_cast<int>(kBlockBytes / sizeof(T));
  const Operand<T> dst("dst", dst_tensor, 1, 0);
  const Operand<T> src("src", src_tensor, src_block, src_repeat);
  RunReduction(
      name, lanes, dst, src, 8 * sizeof(T),
      [&](VectorInstruction& instruction, int64_t repeat, const T* values) {
        for (int block = 0; block < 8; ++block) {
          const int begin = block * kPerBlock;
          const int best = Extreme(lanes, repeat, values, begin, begin + kPerBlock,
                                   kind != BlockReduction::kMin);
          if (best < 0) continue;
          const T result =
              kind == BlockReduction::kSum ? TreeSum(values + begin, kPerBlock) : values[best];
          PutAt(instruction, dst, static_cast<uint64_t>(repeat * dst_stride * 8 + block), result);
        }
      });
}

}  // namespace ascend_emulator

namespace AscendC {

template <typename T, bool isSetMask = true>
void WholeReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, int32_t mask,
                    int32_t repeats, int32_t dst_stride, int32_t src_block, int32_t src_repeat) {
  using namespace ascend_emulator;  // NOLINT
  WholeSum("WholeReduceSum",
           Lanes::Of<isSetMask>("WholeReduceSum", kLanesOf<T>, int64_t{mask}, repeats), dst, src,
           dst_stride, src_block, src_repeat);
}
template <typename T, bool isSetMask = true>
void WholeReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const uint64_t mask[],
                    int32_t repeats, int32_t dst_stride, int32_t src_block, int32_t src_repeat) {
  using namespace ascend_emulator;  // NOLINT
  WholeSum("WholeReduceSum", Lanes::Of<isSetMask>("WholeReduceSum", kLanesOf<T>, mask, repeats),
           dst, src, dst_stride, src_block, src_repeat);
}
template <typename T, bool isSetMask = true>
void RepeatReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, int32_t repeats,
                     int32_t mask, int32_t /*dst_block*/, int32_t src_block, int32_t dst_stride,
                     int32_t src_repeat) {
  using namespace ascend_emulator;  // NOLINT
  WholeSum("RepeatReduceSum",
           Lanes::Of<isSetMask>("RepeatReduceSum", kLanesOf<T>, int64_t{mask}, repeats), dst, src,
           dst_stride, src_block, src_repeat);
}

#define ASCEND_EMULATOR_WHOLE_EXTREME(Name, largest)                                               \
  template <typename T, bool isSetMask = true>                                                     \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, int32_t mask, int32_t repeats,   \
            int32_t dst_stride, int32_t src_block, int32_t src_repeat,                             \
            ReduceOrder order = ReduceOrder::ORDER_VALUE_INDEX) {                                  \
    using namespace ascend_emulator; /* NOLINT */                                                  \
    WholeExtreme(#Name, largest, Lanes::Of<isSetMask>(#Name, kLanesOf<T>, int64_t{mask}, repeats), \
                 dst, src, dst_stride, src_block, src_repeat, order);                              \
  }

ASCEND_EMULATOR_WHOLE_EXTREME(WholeReduceMax, true)
ASCEND_EMULATOR_WHOLE_EXTREME(WholeReduceMin, false)
#undef ASCEND_EMULATOR_WHOLE_EXTREME

#define ASCEND_EMULATOR_BLOCK_REDUCTION(Name, kind)                                              \
  template <typename T, bool isSetMask = true>                                                   \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, int32_t repeats, int32_t mask, \
            int32_t dst_stride, int32_t src_block, int32_t src_repeat) {                         \
    using namespace ascend_emulator; /* NOLINT */                                                \
    BlockReduce(#Name, kind, Lanes::Of<isSetMask>(#Name, kLanesOf<T>, int64_t{mask}, repeats),   \
                dst, src, dst_stride, src_block, src_repeat);                                    \
  }

ASCEND_EMULATOR_BLOCK_REDUCTION(BlockReduceSum, BlockReduction::kSum)
ASCEND_EMULATOR_BLOCK_REDUCTION(BlockReduceMax, BlockReduction::kMax)
ASCEND_EMULATOR_BLOCK_REDUCTION(BlockReduceMin, BlockReduction::kMin)
#undef ASCEND_EMULATOR_BLOCK_REDUCTION

// Sums of pairs of neighbours; dst_stride counts the 128 bytes that a repeat leaves.
template <typename T, bool isSetMask = true>
void PairReduceSum(const LocalTensor<T>& dst_tensor, const LocalTensor<T>& src_tensor,
                   int32_t repeats, int32_t mask, int32_t dst_stride, int32_t src_block,
                   int32_t src_repeat) {
  using namespace ascend_emulator;  // NOLINT
  const Lanes lanes = Lanes::Of<isSetMask>("PairReduceSum", kLanesOf<T>, int64_t{mask}, repeats);
  const Operand<T> dst("dst", dst_tensor, 1, 0);
  const Operand<T> src("src", src_tensor, src_block, src_repeat);
  RunReduction("PairReduceSum", lanes, dst, src, kBlockBytes,
               [&](VectorInstruction& instruction, int64_t repeat, const T* values) {
                 for (int i = 0; i < lanes.lanes(); i += 2) {
                   if (!lanes.Has(repeat, i) && !lanes.Has(repeat, i + 1)) continue;
                   PutAt(instruction, dst,
                         static_cast<uint64_t>(repeat * dst_stride * lanes.lanes() / 2 + i / 2),
                         Sum(values[i], values[i + 1]));
                 }
               });
}

// The largest of `count`, and behind it its index if asked for. The real one is several
// instructions that use `work`; counted as one of as many repeats.
template <typename T>
void ReduceMax(const LocalTensor<T>& dst_tensor, const LocalTensor<T>& src_tensor,
               const LocalTensor<T>& work, int32_t count, bool with_index = false) {
  using namespace ascend_emulator;  // NOLINT
  using Index = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  Check(work.exists(), "ReduceMax: work is a tensor without memory");
  const Lanes lanes = Lanes::First("ReduceMax", kLanesOf<T>, count);
  const Operand<T> dst("dst", dst_tensor, 1, 0);
  const Operand<T> src("src", src_tensor, 1, 8);
  T best = T(0.0f);
  int64_t best_index = -1;
  VectorInstruction instruction("ReduceMax", lanes.repeats());
  CheckReduction(instruction, dst, src, sizeof(T));
  for (int64_t repeat = 0; repeat < lanes.repeats(); ++repeat) {
    T values[kMostLanes];
    instruction.Load(src, lanes, repeat, values);
    const int lane = Extreme(lanes, repeat, values, 0, lanes.lanes(), true);
    if (best_index < 0 || Less(best, values[lane])) {
      best = values[lane];
      best_index = repeat * lanes.lanes() + lane;
    }
  }
  PutAt(instruction, dst, 0, best);
  if (with_index) PutAt(instruction, dst, 1, BitCast<T>(static_cast<Index>(best_index)));
}

}  // namespace AscendC

#endif  // SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_REDUCTIONS_H_
