// How vector instructions walk the unified buffer: repeats of 256 bytes, masks and strides.
//
// A repeat reads its operands before it writes. Repeats follow each other, but one must not read
// what an earlier one of its instruction wrote: the chip has them in flight together.

#ifndef SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_VECTOR_ENGINE_H_
#define SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_VECTOR_ENGINE_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "copies.h"
#include "tensors.h"

namespace AscendC {

// Strides count blocks of 32 bytes: from block to block of a repeat, from repeat to repeat.
struct UnaryRepeatParams {
  UnaryRepeatParams() = default;
  UnaryRepeatParams(uint16_t dst_block, uint16_t src_block, uint8_t dst_repeat, uint8_t src_repeat)
      : dstBlkStride(dst_block),
        srcBlkStride(src_block),
        dstRepStride(dst_repeat),
        srcRepStride(src_repeat) {}

  uint16_t dstBlkStride = 1;
  uint16_t srcBlkStride = 1;
  uint8_t dstRepStride = 8;
  uint8_t srcRepStride = 8;
};

struct BinaryRepeatParams {
  BinaryRepeatParams() = default;
  BinaryRepeatParams(uint8_t dst_block, uint8_t src0_block, uint8_t src1_block, uint8_t dst_repeat,
                     uint8_t src0_repeat, uint8_t src1_repeat)
      : dstBlkStride(dst_block),
        src0BlkStride(src0_block),
        src1BlkStride(src1_block),
        dstRepStride(dst_repeat),
        src0RepStride(src0_repeat),
        src1RepStride(src1_repeat) {}

  uint8_t dstBlkStride = 1;
  uint8_t src0BlkStride = 1;
  uint8_t src1BlkStride = 1;
  uint8_t dstRepStride = 8;
  uint8_t src0RepStride = 8;
  uint8_t src1RepStride = 8;
};

enum class MaskMode : uint8_t { NORMAL = 0, COUNTER };

constexpr uint64_t MASK_PLACEHOLDER = 0;

inline void SetMaskCount() { ascend_emulator::Core().mask.counter = true; }
inline void SetMaskNorm() { ascend_emulator::Core().mask.counter = false; }
inline void ResetMask() { ascend_emulator::Core().mask = {}; }

template <typename T, MaskMode mode = MaskMode::NORMAL>
void SetVectorMask(uint64_t high, uint64_t low) {
  ascend_emulator::VectorMask& mask = ascend_emulator::Core().mask;
  mask.high = high;
  mask.low = low;
}
template <typename T, MaskMode mode = MaskMode::NORMAL>
void SetVectorMask(int32_t length) {
  if (mode == MaskMode::COUNTER) {
    SetVectorMask<T, mode>(0, static_cast<uint64_t>(length));
    return;
  }
  const uint64_t all = ~uint64_t{0};
  const uint64_t low = length >= 64 ? all : (uint64_t{1} << length) - 1;
  const uint64_t high = length >= 128 ? all : length > 64 ? (uint64_t{1} << (length - 64)) - 1 : 0;
  SetVectorMask<T, mode>(high, low);
}

}  // namespace AscendC

namespace ascend_emulator {

constexpr int kMostLanes = 128;
constexpr int kMostRepeats = 255;

template <typename T, typename... Types>
constexpr bool kIsOneOf = (std::is_same_v<T, Types> || ...);

template <typename T>
constexpr int kLanesOf = static_cast<int>(kRepeatBytes / sizeof(T));

// On which lanes of which repeats an instruction works.
class Lanes {
 public:
  // The first `count` elements.
  static Lanes First(const char* name, int lanes, int64_t count) {
    if (count <= 0) Fail(std::string(name) + ": count is " + std::to_string(count));
    const int64_t repeats = (count + lanes - 1) / lanes;
    return Lanes(lanes, repeats, count, ~uint64_t{0}, ~uint64_t{0});
  }
  // The first `mask` lanes of every repeat.
  static Lanes Masked(const char* name, int lanes, int64_t mask, int64_t repeats) {
    if (mask < 1 || mask > lanes) {
      Fail(std::string(name) + ": mask is " + std::to_string(mask) + ", it must be 1 to " +
           std::to_string(lanes));
    }
    CheckRepeats(name, repeats);
    const uint64_t all = ~uint64_t{0};
    const uint64_t low = mask >= 64 ? all : (uint64_t{1} << mask) - 1;
    const uint64_t high = mask >= 128 ? all : mask > 64 ? (uint64_t{1} << (mask - 64)) - 1 : 0;
    return Lanes(lanes, repeats, repeats * lanes, low, high);
  }
  // Those whose bits are set.
  static Lanes Masked(const char* name, int lanes, const uint64_t mask[2], int64_t repeats) {
    CheckRepeats(name, repeats);
    const uint64_t high = lanes > 64 ? mask[1] : 0;
    if (lanes <= 64 && mask[1] != 0) Fail(std::string(name) + ": mask[1] must be 0 for this type");
    if ((mask[0] | high) == 0) Fail(std::string(name) + ": the mask has no lane");
    return Lanes(lanes, repeats, repeats * lanes, mask[0], high);
  }
  // By the mask register.
  static Lanes ByRegister(const char* name, int lanes, int64_t repeats) {
    const VectorMask& mask = Core().mask;
    if (mask.counter) return First(name, lanes, static_cast<int64_t>(mask.low));
    const uint64_t bits[2] = {mask.low, lanes > 64 ? mask.high : 0};
    return Masked(name, lanes, bits, repeats);
  }
  template <bool sets_mask, typename Mask>
  static Lanes Of(const char* name, int lanes, Mask mask, int64_t repeats) {
    if constexpr (sets_mask) return Masked(name, lanes, mask, repeats);
    return ByRegister(name, lanes, repeats);
  }

  int64_t repeats() const { return repeats_; }
  int lanes() const { return lanes_; }
  bool Has(int64_t repeat, int lane) const {
    if (repeat * lanes_ + lane >= count_) return false;
    return ((lane < 64 ? low_ >> lane : high_ >> (lane - 64)) & 1) != 0;
  }

 private:
  Lanes(int lanes, int64_t repeats, int64_t count, uint64_t low, uint64_t high)
      : lanes_(lanes), repeats_(repeats), count_(count), low_(low), high_(high) {}

  static void CheckRepeats(const char* name, int64_t repeats) {
    if (repeats < 0 || repeats > kMostRepeats) {
      Fail(std::string(name) + ": " + std::to_string(repeats) + " repeats, there may be 0 to 255");
    }
  }

  int lanes_;
  int64_t repeats_;
  int64_t count_;
  uint64_t low_;
  uint64_t high_;
};

template <typename T>
struct Operand {
  Operand(const char* what, const AscendC::LocalTensor<T>& tensor, int block, int repeat)
      : name(what),
        address(tensor.address()),
        bytes(uint64_t{tensor.size()} * sizeof(T)),
        block_stride(static_cast<uint32_t>(block)),
        repeat_stride(static_cast<uint32_t>(repeat)),
        exists(tensor.exists()) {}

  // From the start of the tensor.
  uint64_t Offset(int64_t repeat, int lane) const {
    constexpr auto kPerBlock = static_cast<uint64_t>(kBlockBytes / sizeof(T));
    const auto i = static_cast<uint64_t>(lane);
    return static_cast<uint64_t>(repeat) * repeat_stride * kBlockBytes +
           i / kPerBlock * block_stride * kBlockBytes + i % kPerBlock * sizeof(T);
  }

  const char* name;
  uint32_t address;
  uint64_t bytes;
  uint32_t block_stride;
  uint32_t repeat_stride;
  bool exists;
};

// One vector instruction. Its constructor is its issue.
class VectorInstruction {
 public:
  VectorInstruction(const char* name, int64_t repeats)
      : core_(Core()), access_(core_.BeginVector(name, repeats)) {}

  // A source may be what an earlier repeat wrote, if the chip can do that.
  void AllowChain() { chains_ = true; }

  template <typename T>
  void CheckOperand(const Operand<T>& operand, uint32_t alignment) const {
    if (!operand.exists) Fail(std::string(access_.name) + ": a tensor without memory");
    CheckAligned(access_.name, operand.name, operand.address, alignment);
  }

  // The bytes [offset, offset + bytes) of an operand.
  template <typename T>
  const uint8_t* Read(const Operand<T>& operand, uint64_t offset, uint64_t bytes) {
    const uint32_t address = Checked(operand, offset, bytes);
    if (!chains_ && core_.buffer.WroteAny(access_, address, static_cast<uint32_t>(bytes))) {
      Fail(std::string(access_.name) + ": a repeat reads what an earlier one wrote, through " +
           operand.name);
    }
    core_.buffer.Read(access_, address, static_cast<uint32_t>(bytes));
    return core_.buffer.data() + address;
  }
  template <typename T>
  uint8_t* Write(const Operand<T>& operand, uint64_t offset, uint64_t bytes) {
    const uint32_t address = Checked(operand, offset, bytes);
    core_.buffer.Write(access_, address, static_cast<uint32_t>(bytes));
    return core_.buffer.data() + address;
  }
  // Bytes that are moved: what is undefined stays so.
  template <typename To, typename From>
  void Move(const Operand<To>& to, uint64_t to_offset, const Operand<From>& from,
            uint64_t from_offset, uint64_t bytes) {
    const uint32_t source = Checked(from, from_offset, bytes);
    const auto size = static_cast<uint32_t>(bytes);
    core_.buffer.ReadAny(access_, source, size);
    uint8_t* target = Write(to, to_offset, bytes);
    std::memmove(target, core_.buffer.data() + source, bytes);
    core_.buffer.CopyDefined(static_cast<uint32_t>(to.address + to_offset), source, size);
  }

  template <typename T>
  void Load(const Operand<T>& operand, const Lanes& lanes, int64_t repeat, T* values) {
    ForEachRun(operand, lanes, repeat, [&](int lane, uint64_t offset, uint64_t bytes) {
      std::memcpy(values + lane, Read(operand, offset, bytes), bytes);
    });
  }
  template <typename T>
  void Store(const Operand<T>& operand, const Lanes& lanes, int64_t repeat, const T* values) {
    ForEachRun(operand, lanes, repeat, [&](int lane, uint64_t offset, uint64_t bytes) {
      std::memcpy(Write(operand, offset, bytes), values + lane, bytes);
    });
  }

  const char* name() const { return access_.name; }

 private:
  template <typename T>
  uint32_t Checked(const Operand<T>& operand, uint64_t offset, uint64_t bytes) const {
    if (offset + bytes > operand.bytes) {
      Fail(std::string(access_.name) + ": " + operand.name + " reaches byte " +
           std::to_string(offset + bytes - 1) + " of a tensor of " + std::to_string(operand.bytes) +
           " bytes");
    }
    return static_cast<uint32_t>(operand.address + offset);
  }

  // Lanes side by side in memory at a time.
  template <typename T, typename Function>
  static void ForEachRun(const Operand<T>& operand, const Lanes& lanes, int64_t repeat,
                         const Function& function) {
    int lane = 0;
    while (lane < lanes.lanes()) {
      if (!lanes.Has(repeat, lane)) {
        ++lane;
        continue;
      }
      const int first = lane;
      const uint64_t offset = operand.Offset(repeat, first);
      uint64_t end = offset;
      while (lane < lanes.lanes() && lanes.Has(repeat, lane) &&
             operand.Offset(repeat, lane) == end) {
        end += sizeof(T);
        ++lane;
      }
      function(first, offset, end - offset);
    }
  }

  VectorCore& core_;
  Access access_;
  bool chains_ = false;
};

// What a computation stores.
template <typename T>
T Stored(T value) {
  if constexpr (kIsOneOf<T, half, bfloat16_t>) {
    constexpr uint16_t kInfinity = std::is_same_v<T, half> ? 0x7C00 : 0x7F80;
    constexpr uint16_t kSign = 0x8000;
    const auto magnitude = static_cast<uint16_t>(value.bits & ~kSign);
    if (!Core().saturates || magnitude < kInfinity) return value;
    value.bits = magnitude > kInfinity
                     ? uint16_t{0}
                     : static_cast<uint16_t>((value.bits & kSign) | (kInfinity - 1));
  }
  return value;
}

// Within a repeat, operands of one type coincide or lie apart.
template <typename D, typename S>
void CheckOverlap(const char* name, const Lanes& lanes, const Operand<D>& dst,
                  const Operand<S>& src) {
  if (sizeof(D) != sizeof(S) || dst.block_stride != 1 || src.block_stride != 1) return;
  int last = lanes.lanes() - 1;
  while (last > 0 && !lanes.Has(0, last)) --last;
  const auto bytes = static_cast<uint32_t>((last + 1) * static_cast<int>(sizeof(D)));
  const bool apart = dst.address + bytes <= src.address || src.address + bytes <= dst.address;
  if (!apart && dst.address != src.address) {
    Fail(std::string(name) + ": dst and " + src.name + " overlap in part");
  }
}

template <typename D, typename S, typename Function>
void RunUnary(const char* name, const Lanes& lanes, const Operand<D>& dst, const Operand<S>& src,
              const Function& function) {
  VectorInstruction instruction(name, lanes.repeats());
  instruction.CheckOperand(dst, kBlockBytes);
  instruction.CheckOperand(src, kBlockBytes);
  CheckOverlap(name, lanes, dst, src);
  for (int64_t repeat = 0; repeat < lanes.repeats(); ++repeat) {
    S in[kMostLanes];
    D out[kMostLanes];
    instruction.Load(src, lanes, repeat, in);
    for (int i = 0; i < lanes.lanes(); ++i) {
      if (lanes.Has(repeat, i)) out[i] = Stored(function(in[i]));
    }
    instruction.Store(dst, lanes, repeat, out);
  }
}

template <typename D, typename S, typename Function>
void RunBinary(const char* name, const Lanes& lanes, const Operand<D>& dst, const Operand<S>& src0,
               const Operand<S>& src1, bool may_chain, const Function& function) {
  VectorInstruction instruction(name, lanes.repeats());
  instruction.CheckOperand(dst, kBlockBytes);
  instruction.CheckOperand(src0, kBlockBytes);
  instruction.CheckOperand(src1, kBlockBytes);
  CheckOverlap(name, lanes, dst, src0);
  CheckOverlap(name, lanes, dst, src1);
  // Documented: with one of the strides 0 the second source may be an earlier repeat's result.
  if (may_chain && dst.address == src1.address &&
      (dst.repeat_stride == 0 || src1.repeat_stride == 0)) {
    instruction.AllowChain();
  }
  for (int64_t repeat = 0; repeat < lanes.repeats(); ++repeat) {
    S a[kMostLanes];
    S b[kMostLanes];
    D out[kMostLanes];
    instruction.Load(src0, lanes, repeat, a);
    instruction.Load(src1, lanes, repeat, b);
    for (int i = 0; i < lanes.lanes(); ++i) {
      if (lanes.Has(repeat, i)) out[i] = Stored(function(a[i], b[i]));
    }
    instruction.Store(dst, lanes, repeat, out);
  }
}

}  // namespace ascend_emulator

#endif  // SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_VECTOR_ENGINE_H_
