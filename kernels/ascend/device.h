// Devices as the operators see them.

#ifndef SELECT_ATTN_OPS_ASCEND_DEVICE_H_
#define SELECT_ATTN_OPS_ASCEND_DEVICE_H_

#include <cstdint>

#include "core/device.h"

namespace select_attn::ascend {

// Vector cores of the device; 0 if it does not say.
int64_t NumVectorCores(DLDevice device);

// Calls `launch` with the device as the calling thread's current one, and makes that what it was.
// Null, or what went wrong.
const char* RunOn(DLDevice device, void (*launch)(const void* context), const void* context);

template <typename Launch>
const char* RunOn(DLDevice device, const Launch& launch) {
  return RunOn(
      device, [](const void* context) { (*static_cast<const Launch*>(context))(); }, &launch);
}

}  // namespace select_attn::ascend

#endif  // SELECT_ATTN_OPS_ASCEND_DEVICE_H_
