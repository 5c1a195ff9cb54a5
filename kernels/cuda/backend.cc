// The CUDA backend as the core library sees it.

#include "cuda/backend.h"

#include <cuda_runtime.h>

#include <string>

#include "cuda/limits.h"

namespace select_attn::cuda {

namespace {

std::string VersionText(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// "NVIDIA H200 (sm_90), CUDA 13.0", several devices one after the other.
const char* Description() {
  int count = 0;
  cudaGetDeviceCount(&count);
  std::string text;
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) continue;
    text += std::string(properties.name) + " (sm_" + std::to_string(properties.major) +
            std::to_string(properties.minor) + "), ";
  }
  return Keep(text + "CUDA " + VersionText(CUDART_VERSION));
}

// Why nothing can run here; empty if something can.
std::string WhyNot() {
  int driver = 0;
  cudaDriverGetVersion(&driver);
  if (driver == 0) return "there is no CUDA driver";
  if (driver / 1000 < CUDART_VERSION / 1000) {
    return "the driver is for CUDA " + VersionText(driver) + ", older than the CUDA " +
           VersionText(CUDART_VERSION) + " that the backend was built with";
  }
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return cudaGetErrorString(error);
  }
  return count == 0 ? "there is no CUDA device" : "";
}

BackendTable MakeTable() {
  BackendTable table = {};
  table.version = BackendTable::kVersion;
  table.description = Description;
  table.quest_prefill_metadata = QuestPrefillMetadata();
  table.quest_block_select_paged = QuestBlockSelectPaged();
  table.selected_block_tables = SelectedBlockTables();
  table.paged_select_attention = PagedSelectAttention();
  table.read_device_memory = ReadDeviceMemory();
  return table;
}

}  // namespace
}  // namespace select_attn::cuda

extern "C" __attribute__((visibility("default"))) const select_attn::BackendTable*
select_attn_ops_backend(const char** why) {
  namespace cuda = select_attn::cuda;
  const std::string reason = cuda::WhyNot();
  if (!reason.empty()) {
    *why = cuda::Keep(reason);
    return nullptr;
  }
  static const select_attn::BackendTable table = cuda::MakeTable();
  return &table;
}
