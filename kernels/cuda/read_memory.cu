// A plain reduction of memory in many variants, and an empty kernel: what the benchmark measures
// the operators against.
//
// A tile is what a thread block has in flight, `loads` vectors per thread, each of which is
// adjacent to those of the thread's neighbours. Tiles go to the thread blocks in turn, over all
// tensors.

#include <cuda_runtime.h>

#include "core/read_device_memory.h"
#include "cuda/backend.h"
#include "cuda/elements.cuh"
#include "cuda/launch.h"
#include "cuda/limits.h"

namespace select_attn::cuda {
namespace {

constexpr int kWarpThreads = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

template <int kBytes>
struct VectorOf;
template <>
struct VectorOf<8> {
  using Type = uint64_t;
  __device__ static uint32_t Bits(uint64_t vector) {
    return static_cast<uint32_t>(vector) | static_cast<uint32_t>(vector >> 32);
  }
};
template <>
struct VectorOf<16> {
  using Type = uint4;
  __device__ static uint32_t Bits(uint4 vector) {
    return (vector.x | vector.y) | (vector.z | vector.w);
  }
};

// The bytes behind the last whole vector of a tensor, one by one, as the words they are in.
__device__ uint32_t Rest(const void* data, int64_t bytes, int64_t vector_bytes) {
  const int64_t at = bytes / vector_bytes * vector_bytes + static_cast<int64_t>(threadIdx.x);
  if (blockIdx.x != 0 || at >= bytes) return 0;
  return static_cast<uint32_t>(static_cast<const uint8_t*>(data)[at]) << at % 4 * 8;
}

template <int kVectorBytes, int kLoads, bool kStreaming, int kThreads>
__global__ void __launch_bounds__(kThreads) ReadTensors(const ReadDeviceMemoryParams p) {
  using Vector = typename VectorOf<kVectorBytes>::Type;
  constexpr int64_t kTile = int64_t{kThreads} * kLoads;
  __shared__ uint32_t of_warps[kThreads / kWarpThreads];
  const int thread = static_cast<int>(threadIdx.x);
  uint32_t bits = 0;
  int64_t tile = blockIdx.x;
  for (int t = 0; t < ReadDeviceMemoryParams::kMostTensors; ++t) {
    const auto* vectors = static_cast<const Vector*>(p.data[t]);
    const int64_t count = p.bytes[t] / kVectorBytes;
    const int64_t num_tiles = (count + kTile - 1) / kTile;
    for (; tile < num_tiles; tile += gridDim.x) {
      const int64_t first = tile * kTile + thread;
      Vector loaded[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        // Beyond the end the last vector once more: no branch, and hardly a byte.
        const int64_t at = first + int64_t{i} * kThreads;
        const Vector* from = vectors + (at < count ? at : count - 1);
        loaded[i] = kStreaming ? __ldcs(from) : *from;
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) bits |= VectorOf<kVectorBytes>::Bits(loaded[i]);
    }
    tile -= num_tiles;
    bits |= Rest(p.data[t], p.bytes[t], kVectorBytes);
  }
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
    bits |= __shfl_xor_sync(kAllLanes, bits, distance);
  }
  if (thread % kWarpThreads == 0) of_warps[thread / kWarpThreads] = bits;
  __syncthreads();
  if (thread > 0) return;
  for (const uint32_t of_warp : of_warps) bits |= of_warp;
  p.bits[blockIdx.x] = static_cast<int32_t>(bits);
}

__global__ void __launch_bounds__(kWarpThreads) DoNothing(const ReadDeviceMemoryParams /*p*/) {}

using LaunchFunction = const char* (*)(const ReadDeviceMemoryParams&, int64_t, DLDevice, Stream);

template <int kVectorBytes, int kLoads, int kThreads>
LaunchFunction LaunchOf(bool streaming) {
  using P = ReadDeviceMemoryParams;
  return streaming ? Launch<ReadTensors<kVectorBytes, kLoads, true, kThreads>, kThreads, P>
                   : Launch<ReadTensors<kVectorBytes, kLoads, false, kThreads>, kThreads, P>;
}

template <int kLoads, int kThreads>
LaunchFunction LaunchOf(const DeviceReadVariant& variant) {
  if (variant.vector_bytes == 8) return LaunchOf<8, kLoads, kThreads>(variant.streaming);
  if (variant.vector_bytes == 16) return LaunchOf<16, kLoads, kThreads>(variant.streaming);
  return nullptr;
}

template <int kThreads>
LaunchFunction LaunchOf(const DeviceReadVariant& variant) {
  if (variant.loads == 2) return LaunchOf<2, kThreads>(variant);
  if (variant.loads == 4) return LaunchOf<4, kThreads>(variant);
  if (variant.loads == 8) return LaunchOf<8, kThreads>(variant);
  return nullptr;
}

// Null where there is no such variant.
LaunchFunction LaunchFor(const DeviceReadVariant& variant) {
  if (variant.loads == 0) return Launch<DoNothing, kWarpThreads, ReadDeviceMemoryParams>;
  if (variant.threads == 256) return LaunchOf<256>(variant);
  if (variant.threads == 512) return LaunchOf<512>(variant);
  return nullptr;
}

const char* Unsupported(const ReadDeviceMemoryParams& p, DLDevice device) {
  if (LaunchFor(p.variant) != nullptr) return UnsupportedDevice(device);
  return "the cuda backend reads with 256 or 512 threads, 2, 4 or 8 loads of 8 or 16 bytes";
}

const char* Run(const ReadDeviceMemoryParams& p, DLDevice device, Stream stream) {
  return LaunchFor(p.variant)(p, p.most_blocks, device, stream);
}

}  // namespace

BackendOperator<ReadDeviceMemoryParams> ReadDeviceMemory() { return {Unsupported, nullptr, Run}; }

}  // namespace select_attn::cuda
