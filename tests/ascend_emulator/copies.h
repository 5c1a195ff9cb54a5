// Copies between global memory and the unified buffer, and within that.

#ifndef SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_COPIES_H_
#define SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_COPIES_H_

#include <cstdint>
#include <cstring>
#include <string>

#include "tensors.h"

namespace AscendC {

// Lengths and strides count blocks of 32 bytes; strides are gaps.
struct DataCopyParams {
  DataCopyParams() = default;
  DataCopyParams(uint16_t count, uint16_t length, uint16_t source_gap, uint16_t target_gap)
      : blockCount(count), blockLen(length), srcStride(source_gap), dstStride(target_gap) {}

  uint16_t blockCount = 1;
  uint16_t blockLen = 0;
  uint16_t srcStride = 0;
  uint16_t dstStride = 0;
};

// Lengths and gaps in global memory count bytes, gaps in the unified buffer blocks of 32 bytes.
struct DataCopyExtParams {
  DataCopyExtParams() = default;
  DataCopyExtParams(uint16_t count, uint32_t length, uint32_t source_gap, uint32_t target_gap,
                    uint32_t reserved)
      : blockCount(count),
        blockLen(length),
        srcStride(source_gap),
        dstStride(target_gap),
        rsv(reserved) {}

  uint16_t blockCount = 1;
  uint32_t blockLen = 0;
  uint32_t srcStride = 0;
  uint32_t dstStride = 0;
  uint32_t rsv = 0;
};

// Paddings count elements.
template <typename T>
struct DataCopyPadExtParams {
  DataCopyPadExtParams() = default;
  DataCopyPadExtParams(bool pads, uint8_t left, uint8_t right, T value)
      : isPad(pads), leftPadding(left), rightPadding(right), paddingValue(value) {}
  // Of types without conversion from int.
  template <typename Bits>
  DataCopyPadExtParams(bool pads, uint8_t left, uint8_t right, Bits value)
      : isPad(pads), leftPadding(left), rightPadding(right), paddingValue() {
    if constexpr (std::is_same_v<T, bfloat16_t>) {
      paddingValue = ToBfloat16(static_cast<float>(value));
    } else {
      paddingValue = static_cast<T>(value);
    }
  }

  bool isPad = false;
  uint8_t leftPadding = 0;
  uint8_t rightPadding = 0;
  T paddingValue = T();
};

}  // namespace AscendC

namespace ascend_emulator {

// Of a copy: `count` pieces of `length` bytes, their starts `step` bytes apart.
struct Pieces {
  uint64_t count;
  uint64_t length;
  uint64_t global_step;
  uint64_t local_step;
};

constexpr uint64_t kMostPieces = 4095;

inline void CheckAligned(const char* name, const char* what, uint32_t address, uint32_t alignment) {
  if (address % alignment != 0) {
    Fail(std::string(name) + ": " + what + " is not aligned to " + std::to_string(alignment) +
         " bytes, its address is " + std::to_string(address));
  }
}

template <typename T>
void CheckLocal(const char* name, const AscendC::LocalTensor<T>& tensor, uint64_t bytes) {
  if (!tensor.exists()) Fail(std::string(name) + ": a tensor without memory");
  if (bytes > uint64_t{tensor.size()} * sizeof(T)) {
    Fail(std::string(name) + ": " + std::to_string(bytes) + " bytes in a tensor of " +
         std::to_string(uint64_t{tensor.size()} * sizeof(T)));
  }
}

// Documented of DataCopyPad on this chip.
template <typename T>
void CheckPosition(const char* name, const AscendC::LocalTensor<T>& tensor) {
  if (tensor.position() == AscendC::TPosition::VECCALC) {
    Fail(std::string(name) + ": a tensor of VECCALC, it must be of VECIN or VECOUT");
  }
}

inline void CheckPieces(const char* name, const Pieces& pieces) {
  if (pieces.count == 0 || pieces.count > kMostPieces) {
    Fail(std::string(name) + ": blockCount is " + std::to_string(pieces.count) +
         ", it must be 1 to 4095");
  }
  if (pieces.length == 0) Fail(std::string(name) + ": blockLen is 0");
}

inline uint64_t RoundUpToBlock(uint64_t bytes) {
  return (bytes + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
}

template <typename T>
void CopyIn(const char* name, const AscendC::LocalTensor<T>& to,
            const AscendC::GlobalTensor<T>& from, const Pieces& pieces,
            const AscendC::DataCopyPadExtParams<T>& padding) {
  CheckPieces(name, pieces);
  CheckAligned(name, "dst", to.address(), kBlockBytes);
  const uint64_t left = padding.isPad ? padding.leftPadding * sizeof(T) : 0;
  const uint64_t right = padding.isPad ? padding.rightPadding * sizeof(T) : 0;
  if (left > kBlockBytes || right > kBlockBytes)
    Fail(std::string(name) + ": more than 32 bytes of padding");
  const uint64_t filled = left + pieces.length + right;
  const uint64_t whole = RoundUpToBlock(filled);
  CheckLocal(name, to, (pieces.count - 1) * pieces.local_step + whole);
  from.CheckBytes(name, 0, (pieces.count - 1) * pieces.global_step + pieces.length);

  VectorCore& core = Core();
  const Access access =
      core.BeginCopy(name, PIPE_MTE2, static_cast<int64_t>(pieces.count * pieces.length));
  const auto* source = reinterpret_cast<const uint8_t*>(from.GetPhyAddr());
  for (uint64_t i = 0; i < pieces.count; ++i) {
    const auto address = to.address() + static_cast<uint32_t>(i * pieces.local_step);
    core.buffer.Write(access, address, static_cast<uint32_t>(whole));
    uint8_t* target = core.buffer.data() + address;
    for (uint64_t at = 0; at < left; at += sizeof(T)) {
      std::memcpy(target + at, &padding.paddingValue, sizeof(T));
    }
    core.global.Read(source + i * pieces.global_step, pieces.length);
    std::memcpy(target + left, source + i * pieces.global_step, pieces.length);
    for (uint64_t at = left + pieces.length; at < filled; at += sizeof(T)) {
      std::memcpy(target + at, &padding.paddingValue, sizeof(T));
    }
    // The chip writes whole blocks; what it puts here is not to be relied on.
    core.buffer.MakeUndefined(address + static_cast<uint32_t>(filled),
                              static_cast<uint32_t>(whole - filled));
  }
}

template <typename T>
void CopyOut(const char* name, const AscendC::GlobalTensor<T>& to,
             const AscendC::LocalTensor<T>& from, const Pieces& pieces) {
  CheckPieces(name, pieces);
  CheckAligned(name, "src", from.address(), kBlockBytes);
  CheckLocal(name, from, (pieces.count - 1) * pieces.local_step + pieces.length);
  to.CheckBytes(name, 0, (pieces.count - 1) * pieces.global_step + pieces.length);

  VectorCore& core = Core();
  const Access access =
      core.BeginCopy(name, PIPE_MTE3, static_cast<int64_t>(pieces.count * pieces.length));
  auto* target = reinterpret_cast<uint8_t*>(to.GetPhyAddr(0));
  for (uint64_t i = 0; i < pieces.count; ++i) {
    const auto address = from.address() + static_cast<uint32_t>(i * pieces.local_step);
    core.buffer.Read(access, address, static_cast<uint32_t>(pieces.length));
    const uint8_t* source = core.buffer.data() + address;
    core.global.Write(target + i * pieces.global_step, source, pieces.length);
    std::memcpy(target + i * pieces.global_step, source, pieces.length);
  }
}

// `count` pieces of `length` bytes. What is undefined stays so.
template <typename T>
void CopyWithin(const char* name, const AscendC::LocalTensor<T>& to,
                const AscendC::LocalTensor<T>& from, uint64_t count, uint64_t length,
                uint64_t from_step, uint64_t to_step) {
  CheckAligned(name, "dst", to.address(), kBlockBytes);
  CheckAligned(name, "src", from.address(), kBlockBytes);
  CheckLocal(name, to, (count - 1) * to_step + length);
  CheckLocal(name, from, (count - 1) * from_step + length);

  VectorCore& core = Core();
  const Access access = core.BeginVector(
      name, static_cast<int64_t>((count * length + kRepeatBytes - 1) / kRepeatBytes));
  for (uint64_t i = 0; i < count; ++i) {
    const auto source = from.address() + static_cast<uint32_t>(i * from_step);
    const auto target = to.address() + static_cast<uint32_t>(i * to_step);
    if (core.buffer.WroteAny(access, source, static_cast<uint32_t>(length))) {
      Fail(std::string(name) + ": src and dst overlap");
    }
    core.buffer.ReadAny(access, source, static_cast<uint32_t>(length));
    core.buffer.Write(access, target, static_cast<uint32_t>(length));
    core.buffer.CopyDefined(target, source, static_cast<uint32_t>(length));
    std::memmove(core.buffer.data() + target, core.buffer.data() + source, length);
  }
}

template <typename T>
uint64_t WholeBlocks(const char* name, uint64_t count) {
  const uint64_t bytes = count * sizeof(T);
  if (bytes == 0 || bytes % kBlockBytes != 0) {
    Fail(std::string(name) + ": " + std::to_string(bytes) +
         " bytes are not whole blocks of 32 bytes");
  }
  return bytes;
}

inline Pieces BlocksOf(const AscendC::DataCopyParams& params, bool into_buffer) {
  const uint64_t length = uint64_t{params.blockLen} * kBlockBytes;
  const uint64_t source_step = length + uint64_t{params.srcStride} * kBlockBytes;
  const uint64_t target_step = length + uint64_t{params.dstStride} * kBlockBytes;
  return into_buffer ? Pieces{params.blockCount, length, source_step, target_step}
                     : Pieces{params.blockCount, length, target_step, source_step};
}

}  // namespace ascend_emulator

namespace AscendC {

template <typename T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, uint32_t count) {
  const uint64_t bytes = ascend_emulator::WholeBlocks<T>("DataCopy", count);
  ascend_emulator::CopyIn("DataCopy", dst, src, {1, bytes, 0, 0}, DataCopyPadExtParams<T>());
}
template <typename T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyParams& params) {
  ascend_emulator::CopyIn("DataCopy", dst, src, ascend_emulator::BlocksOf(params, true),
                          DataCopyPadExtParams<T>());
}
template <typename T>
void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, uint32_t count) {
  const uint64_t bytes = ascend_emulator::WholeBlocks<T>("DataCopy", count);
  ascend_emulator::CopyOut("DataCopy", dst, src, {1, bytes, 0, 0});
}
template <typename T>
void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyParams& params) {
  ascend_emulator::CopyOut("DataCopy", dst, src, ascend_emulator::BlocksOf(params, false));
}
template <typename T>
void DataCopy(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint32_t count) {
  const uint64_t bytes = ascend_emulator::WholeBlocks<T>("DataCopy", count);
  ascend_emulator::CopyWithin("DataCopy", dst, src, 1, bytes, 0, 0);
}
template <typename T>
void DataCopy(const LocalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyParams& params) {
  const ascend_emulator::Pieces pieces = ascend_emulator::BlocksOf(params, true);
  ascend_emulator::CheckPieces("DataCopy", pieces);
  ascend_emulator::CopyWithin("DataCopy", dst, src, pieces.count, pieces.length, pieces.global_step,
                              pieces.local_step);
}

template <typename T>
void DataCopyPad(const LocalTensor<T>& dst, const GlobalTensor<T>& src,
                 const DataCopyExtParams& params, const DataCopyPadExtParams<T>& padding) {
  ascend_emulator::CheckPosition("DataCopyPad", dst);
  const uint64_t left = padding.isPad ? padding.leftPadding * sizeof(T) : 0;
  const uint64_t right = padding.isPad ? padding.rightPadding * sizeof(T) : 0;
  const uint64_t whole = ascend_emulator::RoundUpToBlock(left + params.blockLen + right);
  ascend_emulator::CopyIn(
      "DataCopyPad", dst, src,
      {params.blockCount, params.blockLen, uint64_t{params.blockLen} + params.srcStride,
       whole + uint64_t{params.dstStride} * ascend_emulator::kBlockBytes},
      padding);
}
template <typename T>
void DataCopyPad(const GlobalTensor<T>& dst, const LocalTensor<T>& src,
                 const DataCopyExtParams& params) {
  ascend_emulator::CheckPosition("DataCopyPad", src);
  const uint64_t whole = ascend_emulator::RoundUpToBlock(params.blockLen);
  ascend_emulator::CopyOut(
      "DataCopyPad", dst, src,
      {params.blockCount, params.blockLen, uint64_t{params.blockLen} + params.dstStride,
       whole + uint64_t{params.srcStride} * ascend_emulator::kBlockBytes});
}

}  // namespace AscendC

#endif  // SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_COPIES_H_
