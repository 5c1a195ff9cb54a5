// A tensor that owns its memory, for tests.

#ifndef SELECT_ATTN_OPS_TESTS_TEST_TENSOR_H_
#define SELECT_ATTN_OPS_TESTS_TEST_TENSOR_H_

#include <dlpack/dlpack.h>

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "select_attn_ops/common.h"

namespace select_attn {

inline DLDataType TypeOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return {kDLFloat, 16, 1};
    case DType::kBFloat16:
      return {kDLBfloat, 16, 1};
    case DType::kFloat32:
      return {kDLFloat, 32, 1};
  }
  return {};
}

inline constexpr DLDataType kInt32 = {kDLInt, 32, 1};

class TestTensor {
 public:
  TestTensor(DLDataType type, std::vector<int64_t> shape, uint8_t fill = 0)
      : shape_(std::move(shape)), type_(type) {
    strides_.resize(shape_.size());
    int64_t size = 1;
    for (size_t i = shape_.size(); i-- > 0; size *= shape_[i]) strides_[i] = size;
    bytes_.assign(static_cast<size_t>(size * type.bits / 8), fill);
  }

  static TestTensor Int32(std::vector<int64_t> shape, const std::vector<int32_t>& values) {
    TestTensor tensor(kInt32, std::move(shape));
    std::memcpy(tensor.bytes_.data(), values.data(), tensor.bytes_.size());
    return tensor;
  }

  // Its fields may be changed to make a wrong tensor of it.
  DLTensor View(DLDevice device = {kDLCPU, 0}) {
    DLTensor tensor = {};
    tensor.data = bytes_.data();
    tensor.device = device;
    tensor.ndim = static_cast<int32_t>(shape_.size());
    tensor.dtype = type_;
    tensor.shape = shape_.data();
    tensor.strides = strides_.data();
    return tensor;
  }

  template <typename T>
  T* data() {
    return reinterpret_cast<T*>(bytes_.data());
  }

  std::vector<int64_t>& shape() { return shape_; }
  std::vector<int64_t>& strides() { return strides_; }
  const std::vector<uint8_t>& bytes() const { return bytes_; }

  // Element i in memory order.
  float Get(int64_t i) {
    if (type_.bits == 32) return data<float>()[i];
    const uint16_t bits = data<uint16_t>()[i];
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    if (type_.code == kDLFloat) wide = Wide(bits);
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }

  // Element i in memory order; small integers are exact in every dtype.
  void Set(int64_t i, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if (type_.bits == 32) {
      data<uint32_t>()[i] = bits;
    } else if (type_.code == kDLBfloat) {
      data<uint16_t>()[i] = static_cast<uint16_t>(bits >> 16);
    } else {
      data<uint16_t>()[i] = Half(bits);
    }
  }

 private:
  // For zero, infinity, NaN and numbers that float16 holds exactly as normal numbers.
  static uint16_t Half(uint32_t bits) {
    const uint32_t sign = bits >> 16 & 0x8000u;
    const uint32_t exponent = bits >> 23 & 0xFFu;
    const uint32_t fraction = bits >> 13 & 0x3FFu;
    if (exponent == 0) return static_cast<uint16_t>(sign);
    if (exponent == 0xFF) return static_cast<uint16_t>(sign | 0x7C00u | fraction);
    return static_cast<uint16_t>(sign | (exponent - 112) << 10 | fraction);
  }

  // The inverse.
  static uint32_t Wide(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t exponent = half >> 10 & 0x1Fu;
    const uint32_t fraction = static_cast<uint32_t>(half & 0x3FFu) << 13;
    if (exponent == 0) return sign;
    if (exponent == 0x1F) return sign | 0x7F800000u | fraction;
    return sign | (exponent + 112) << 23 | fraction;
  }

  std::vector<int64_t> shape_;
  std::vector<int64_t> strides_;
  DLDataType type_;
  std::vector<uint8_t> bytes_;
};

}  // namespace select_attn

#endif  // SELECT_ATTN_OPS_TESTS_TEST_TENSOR_H_
