#include "core/read_device_memory.h"

#include <string>

#include "core/arguments.h"
#include "core/backend.h"

namespace select_attn {
namespace {

constexpr char kName[] = "read_device_memory";

int64_t Bytes(const DLTensor& tensor) {
  int64_t bytes = tensor.dtype.bits / 8;
  for (int i = 0; i < tensor.ndim; ++i) bytes *= tensor.shape[i];
  return bytes;
}

// Row-major without gaps.
bool IsDense(const DLTensor& tensor) {
  int64_t expected = 1;
  for (int i = tensor.ndim; i-- > 0;) {
    if (tensor.shape[i] != 1 && Stride(tensor, i) != expected) return false;
    expected *= tensor.shape[i];
  }
  return true;
}

ReadDeviceMemoryParams Check(const std::vector<const DLTensor*>& tensors,
                             const DeviceReadVariant& variant, const DLTensor& bits) {
  if (bits.ndim != 1 || bits.dtype.code != kDLInt || bits.dtype.bits != 32 || !IsDense(bits)) {
    ThrowValueError("bits must be a dense int32 vector");
  }
  if (variant.vector_bytes < 1) {
    ThrowValueError("vector_bytes must be at least 1, got " + std::to_string(variant.vector_bytes));
  }
  if (tensors.size() > ReadDeviceMemoryParams::kMostTensors) {
    ThrowValueError("at most 3 tensors can be read, got " + std::to_string(tensors.size()));
  }
  ReadDeviceMemoryParams params = {};
  params.variant = variant;
  params.bits = static_cast<int32_t*>(Data(bits));
  params.most_blocks = bits.shape[0];
  for (size_t i = 0; i < tensors.size(); ++i) {
    const DLTensor& tensor = *tensors[i];
    const void* data = Data(tensor);
    if (!SameDevice(tensor.device, bits.device)) {
      ThrowValueError("all tensors must be on the device of bits, " + DeviceText(bits.device) +
                      ", got " + DeviceText(tensor.device));
    }
    if (!IsDense(tensor)) ThrowValueError("a tensor to be read must have no gaps");
    if (reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(variant.vector_bytes) != 0) {
      ThrowValueError("a tensor to be read must begin at a multiple of " +
                      std::to_string(variant.vector_bytes) + " bytes");
    }
    params.data[i] = data;
    params.bytes[i] = Bytes(tensor);
  }
  return params;
}

void CheckNoValues(const ReadDeviceMemoryParams& /*params*/) {}

}  // namespace

void ReadDeviceMemory(const std::vector<const DLTensor*>& tensors, const DeviceReadVariant& variant,
                      const DLTensor& bits, Stream stream) {
  const ReadDeviceMemoryParams params = Check(tensors, variant, bits);
  RunOperator(OperatorFor(bits.device, kName, &BackendTable::read_device_memory, params),
              bits.device, kName, params, stream, CheckNoValues);
}

}  // namespace select_attn
