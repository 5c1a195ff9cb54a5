// A read of a device's memory and nothing else: the ceiling that the benchmark measures a device's
// kernels against. A diagnostic, no operator, and no part of the library's contract.

#ifndef SELECT_ATTN_OPS_CORE_READ_DEVICE_MEMORY_H_
#define SELECT_ATTN_OPS_CORE_READ_DEVICE_MEMORY_H_

#include <dlpack/dlpack.h>

#include <cstdint>
#include <vector>

#include "select_attn_ops/common.h"

namespace select_attn {

// One way to read. A backend says which it has; a ceiling is the best of many.
struct DeviceReadVariant {
  int64_t threads;       // of a thread block
  int64_t loads;         // that a thread has in flight; 0: an empty kernel, which reads nothing
  int64_t vector_bytes;  // of a load
  bool streaming;        // the loads say that nothing is needed again
};

struct ReadDeviceMemoryParams {
  static constexpr int kMostTensors = 3;

  DeviceReadVariant variant;
  const void* data[kMostTensors];  // [bytes[i]], at a multiple of variant.vector_bytes
  int64_t bytes[kMostTensors];     // 0 where there is no tensor
  int32_t* bits;                   // [most_blocks]
  int64_t most_blocks;             // thread blocks; fewer where the device holds fewer at a time
};

// Queues a read of every byte of `tensors`, up to three without gaps. Every thread block writes the
// OR of the 4-byte words that it read to its element of `bits`, [thread blocks], int32: that
// nothing is optimised away, and that a test can tell that nothing was left out. Elements without a
// thread block are not written. Throws Error.
SELECT_ATTN_EXPORT void ReadDeviceMemory(const std::vector<const DLTensor*>& tensors,
                                         const DeviceReadVariant& variant, const DLTensor& bits,
                                         Stream stream);

}  // namespace select_attn

#endif  // SELECT_ATTN_OPS_CORE_READ_DEVICE_MEMORY_H_
