// Tensors of global memory and of the unified buffer.

#ifndef SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_TENSORS_H_
#define SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_TENSORS_H_

#include <cstdint>
#include <cstring>
#include <limits>
#include <string>

#include "float_types.h"
#include "vector_core.h"

namespace AscendC {

enum class TPosition : uint8_t { GM, VECIN, VECOUT, VECCALC };
using QuePosition = TPosition;

inline int64_t GetBlockIdx() { return ascend_emulator::Core().index; }
inline int64_t GetBlockNum() { return ascend_emulator::Core().num_cores; }

template <typename T>
class LocalTensor {
 public:
  using PrimType = T;

  LocalTensor() = default;
  // For TBuf and TQue. `buffer` is the queue's number of the buffer.
  LocalTensor(uint32_t address, uint32_t size, TPosition position, const void* queue = nullptr,
              int buffer = -1)
      : address_(address),
        size_(size),
        position_(position),
        exists_(true),
        queue_(queue),
        buffer_(buffer) {}

  uint32_t GetSize() const { return size_; }
  void SetSize(uint32_t size) {
    if (size > size_) Fail("SetSize", size);
    size_ = size;
  }

  LocalTensor operator[](uint32_t offset) const {
    if (offset > size_) Fail("operator[]", offset);
    LocalTensor result = *this;
    result.address_ += offset * static_cast<uint32_t>(sizeof(T));
    result.size_ -= offset;
    return result;
  }

  template <typename U>
  LocalTensor<U> ReinterpretCast() const {
    const uint64_t bytes = uint64_t{size_} * sizeof(T);
    LocalTensor<U> result(address_, static_cast<uint32_t>(bytes / sizeof(U)), position_, queue_,
                          buffer_);
    return exists_ ? result : LocalTensor<U>();
  }

  // By the scalar unit.
  T GetValue(uint32_t index) const {
    const uint32_t at = ScalarAddress("GetValue", index);
    ascend_emulator::VectorCore& core = ascend_emulator::Core();
    core.buffer.Read(core.BeginScalar("LocalTensor::GetValue"), at, sizeof(T));
    T value;
    std::memcpy(&value, core.buffer.data() + at, sizeof(T));
    return value;
  }
  void SetValue(uint32_t index, T value) const {
    const uint32_t at = ScalarAddress("SetValue", index);
    ascend_emulator::VectorCore& core = ascend_emulator::Core();
    core.buffer.Write(core.BeginScalar("LocalTensor::SetValue"), at, sizeof(T));
    std::memcpy(core.buffer.data() + at, &value, sizeof(T));
  }

  // Of the emulator only.
  uint32_t address() const { return address_; }
  uint32_t size() const { return size_; }
  TPosition position() const { return position_; }
  bool exists() const { return exists_; }
  const void* queue() const { return queue_; }
  int buffer() const { return buffer_; }

 private:
  [[noreturn]] void Fail(const char* what, uint32_t index) const {
    ascend_emulator::Fail(std::string("LocalTensor::") + what + ": " + std::to_string(index) +
                          " in a tensor of " + std::to_string(size_) + " elements");
  }
  uint32_t ScalarAddress(const char* what, uint32_t index) const {
    if (index >= size_) Fail(what, index);
    return address_ + index * static_cast<uint32_t>(sizeof(T));
  }

  uint32_t address_ = 0;  // in the unified buffer
  uint32_t size_ = 0;     // elements
  TPosition position_ = TPosition::VECCALC;
  bool exists_ = false;
  const void* queue_ = nullptr;
  int buffer_ = -1;
};

template <typename T>
class GlobalTensor {
 public:
  using PrimType = T;

  void SetGlobalBuffer(T* buffer) {
    data_ = buffer;
    size_ = kUnknownSize;
  }
  // `size` counts elements.
  void SetGlobalBuffer(T* buffer, uint64_t size) {
    data_ = buffer;
    size_ = size;
  }

  uint64_t GetSize() const { return size_; }
  const T* GetPhyAddr() const { return data_; }
  T* GetPhyAddr(uint64_t offset) const { return data_ + offset; }

  GlobalTensor operator[](uint64_t offset) const {
    if (size_ != kUnknownSize && offset > size_) FailAt("operator[]", offset);
    GlobalTensor result;
    result.data_ = data_ + offset;
    result.size_ = size_ == kUnknownSize ? kUnknownSize : size_ - offset;
    return result;
  }

  // By the scalar unit.
  T GetValue(uint64_t index) const {
    CheckElements("GlobalTensor::GetValue", index, 1);
    ascend_emulator::VectorCore& core = ascend_emulator::Core();
    ascend_emulator::Check(!core.data_cache_is_stale,
                           "GlobalTensor::GetValue: the data cache may have what the memory held "
                           "before the launch; DataCacheCleanAndInvalid first");
    ++core.counters.scalar_global_reads;
    core.global.Read(data_ + index, sizeof(T));
    return data_[index];
  }
  void SetValue(uint64_t index, T value) const {
    CheckElements("GlobalTensor::SetValue", index, 1);
    ascend_emulator::VectorCore& core = ascend_emulator::Core();
    ++core.counters.scalar_global_writes;
    core.global.Write(data_ + index, &value, sizeof(T));
    data_[index] = value;
  }

  // Of the emulator only: throw unless the tensor has these.
  void CheckElements(const char* name, uint64_t first, uint64_t count) const {
    CheckBytes(name, first * sizeof(T), count * sizeof(T));
  }
  void CheckBytes(const char* name, uint64_t first, uint64_t bytes) const {
    if (data_ == nullptr) ascend_emulator::Fail(std::string(name) + ": a tensor without memory");
    if (size_ == kUnknownSize) return;
    const uint64_t end = first + bytes;
    if (end > size_ * sizeof(T)) {
      ascend_emulator::Fail(std::string(name) + ": byte " + std::to_string(end - 1) +
                            " is past the end of a global tensor of " +
                            std::to_string(size_ * sizeof(T)) + " bytes");
    }
  }

 private:
  static constexpr uint64_t kUnknownSize = std::numeric_limits<uint64_t>::max();

  [[noreturn]] void FailAt(const char* what, uint64_t index) const {
    ascend_emulator::Fail(std::string("GlobalTensor::") + what + ": " + std::to_string(index) +
                          " in a tensor of " + std::to_string(size_) + " elements");
  }

  T* data_ = nullptr;
  uint64_t size_ = kUnknownSize;
};

}  // namespace AscendC

#endif  // SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_TENSORS_H_
