// How a kernel gets onto a device: as many thread blocks as fit on it at a time, without a change
// of the thread's current device, and with failures as texts.

#ifndef SELECT_ATTN_OPS_CUDA_LAUNCH_H_
#define SELECT_ATTN_OPS_CUDA_LAUNCH_H_

#include <cuda_runtime.h>
#include <dlpack/dlpack.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <string>

#include "cuda/limits.h"
#include "select_attn_ops/common.h"

namespace select_attn::cuda {

// Null for success.
inline const char* FailureText(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // it is reported here, and shall not come up elsewhere
  return Keep(std::string(what) + ": " + cudaGetErrorString(error));
}

// Makes a device current, and on its way out the one that was.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ != cudaSuccess || before_ == device) return;
    error_ = cudaSetDevice(device);
    switched_ = error_ == cudaSuccess;
  }
  ~DeviceGuard() {
    if (switched_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool switched_ = false;
  cudaError_t error_;
};

// Lets the calling thread do for a while what a stream capture elsewhere forbids, such as loading a
// kernel's code: nothing of that is part of the capture.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Why no kernel can run on a device, or null. A device that is not there is left to the launch.
inline const char* UnsupportedDevice(DLDevice device) {
  constexpr int kOldest = 8;  // compute capability, major
  int major = 0;
  int minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.device_id) !=
          cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device.device_id) !=
          cudaSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  if (major >= kOldest) return nullptr;
  return Keep("the cuda backend needs a GPU of compute capability " + std::to_string(kOldest) +
              ".0 or later, got " + std::to_string(major) + "." + std::to_string(minor));
}

// Thread blocks of kKernel that the current device, number `device`, holds at a time. Asked once.
template <auto kKernel, int kThreads>
cudaError_t ResidentBlocks(int device, int64_t& blocks) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  const bool remembers = device >= 0 && device < kDevices;
  blocks = remembers ? known[device].load(std::memory_order_relaxed) : 0;
  if (blocks > 0) return cudaSuccess;
  const RelaxedCapture relaxed;  // the first question about a kernel loads it
  int per_processor = 0;
  int processors = 0;
  cudaError_t error =
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kKernel, kThreads, 0);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return error;
  blocks = std::max<int64_t>(int64_t{per_processor} * processors, 1);
  if (remembers) known[device].store(static_cast<int>(blocks), std::memory_order_relaxed);
  return cudaSuccess;
}

// Launches kKernel with kThreads threads per thread block and no more thread blocks than
// `most_blocks` or the device can hold. Nothing to do if that is 0. Returns null, or what went
// wrong.
template <auto kKernel, int kThreads, typename Params>
const char* Launch(const Params& params, int64_t most_blocks, DLDevice device, Stream stream) {
  if (most_blocks <= 0) return nullptr;
  const DeviceGuard guard(device.device_id);
  if (guard.error() != cudaSuccess) return FailureText("no such device", guard.error());
  int64_t resident = 0;
  const cudaError_t asked = ResidentBlocks<kKernel, kThreads>(device.device_id, resident);
  if (asked != cudaSuccess) return FailureText("the kernel does not load", asked);
  Params copy = params;
  void* arguments[] = {&copy};
  const auto blocks = static_cast<unsigned>(std::min(most_blocks, resident));
  return FailureText("the launch failed", cudaLaunchKernel(reinterpret_cast<const void*>(kKernel),
                                                           dim3(blocks), dim3(kThreads), arguments,
                                                           0, static_cast<cudaStream_t>(stream)));
}

}  // namespace select_attn::cuda

#endif  // SELECT_ATTN_OPS_CUDA_LAUNCH_H_
