// What the library says and asks about a DLPack device.

#ifndef SELECT_ATTN_OPS_CORE_DEVICE_H_
#define SELECT_ATTN_OPS_CORE_DEVICE_H_

#include <dlpack/dlpack.h>

#include <string>

namespace select_attn {

// Whether the host can read the memory; page-locked memory counts as the CPU's.
inline bool IsHost(DLDevice device) {
  return device.device_type == kDLCPU || device.device_type == kDLCUDAHost;
}

inline bool SameDevice(DLDevice a, DLDevice b) {
  if (IsHost(a) && IsHost(b)) return true;
  return a.device_type == b.device_type && a.device_id == b.device_id;
}

// As frameworks spell it: "cpu", "cuda:0", "npu:1". torch-npu tensors arrive as kDLExtDev.
inline std::string DeviceText(DLDevice device) {
  if (IsHost(device)) return "cpu";
  std::string type;
  switch (device.device_type) {
    case kDLCUDA:
      type = "cuda";
      break;
    case kDLExtDev:
      type = "npu";
      break;
    default:
      type = "DLPack device type " + std::to_string(device.device_type);
  }
  return type + ":" + std::to_string(device.device_id);
}

}  // namespace select_attn

#endif  // SELECT_ATTN_OPS_CORE_DEVICE_H_
