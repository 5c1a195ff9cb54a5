// Devices by ACL, the runtime of CANN.

#include "ascend/device.h"

#include <acl/acl.h>

#include <atomic>
#include <string>

#include "ascend/limits.h"

namespace select_attn::ascend {
namespace {

constexpr int kMostDevices = 64;

const char* Failure(const char* call, aclError error) {
  const char* text = aclGetRecentErrMsg();
  return Keep(std::string(call) + " failed with error " + std::to_string(error) +
              (text == nullptr ? "" : std::string(": ") + text));
}

}  // namespace

int64_t NumVectorCores(DLDevice device) {
  // Asked once per device: every call of an operator needs it.
  static std::atomic<int64_t> known[kMostDevices];
  const bool can_keep = device.device_id >= 0 && device.device_id < kMostDevices;
  if (can_keep && known[device.device_id] > 0) return known[device.device_id];
  int64_t count = 0;
  const aclError error = aclGetDeviceCapability(static_cast<uint32_t>(device.device_id),
                                                ACL_DEVICE_INFO_VECTOR_CORE_NUM, &count);
  if (error != ACL_SUCCESS || count <= 0) return 0;
  if (can_keep) known[device.device_id] = count;
  return count;
}

const char* RunOn(DLDevice device, void (*launch)(const void* context), const void* context) {
  int32_t current = -1;
  // A thread that has used no device yet has no current one.
  const bool has_current = aclrtGetDevice(&current) == ACL_SUCCESS;
  if (!has_current || current != device.device_id) {
    const aclError error = aclrtSetDevice(device.device_id);
    if (error != ACL_SUCCESS) return Failure("aclrtSetDevice", error);
  }
  // What an earlier call left behind is not this launch's.
  aclrtGetLastError(ACL_RT_THREAD_LEVEL);
  launch(context);
  const aclError failed = aclrtGetLastError(ACL_RT_THREAD_LEVEL);
  if (has_current && current != device.device_id) {
    const aclError error = aclrtSetDevice(current);
    if (error != ACL_SUCCESS) return Failure("aclrtSetDevice", error);
  }
  return failed == ACL_SUCCESS ? nullptr : Failure("the launch", failed);
}

}  // namespace select_attn::ascend
