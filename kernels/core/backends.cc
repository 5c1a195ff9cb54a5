// Finds the backend of a device: the CPU's in this library, any other in a shared object beside it,
// opened on first use.

#include <dlfcn.h>
#include <unistd.h>

#include <array>
#include <mutex>
#include <string>

#include "core/backend.h"
#include "cpu/backend.h"
#include "select_attn_ops/runtime.h"

namespace select_attn {
namespace {

// A backend in its own shared object, opened once, by whoever asks first.
class SharedBackend {
 public:
  SharedBackend(DLDeviceType device_type, const char* name)
      : device_type_(device_type), name_(name) {}

  DLDeviceType device_type() const { return device_type_; }
  const char* name() const { return name_; }

  // Null if it cannot be used; why() then says so.
  const BackendTable* table() {
    std::call_once(opened_, [this] { Open(); });
    return table_;
  }
  const std::string& why() const { return why_; }

 private:
  void Open() {
    const std::string path = LibraryFolder() + "/libselect_attn_ops_" + name_ + ".so";
    if (access(path.c_str(), F_OK) != 0) {
      why_ = "there is no " + path;
      return;
    }
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      why_ = dlerror();
      return;
    }
    const auto entry = reinterpret_cast<BackendEntry>(dlsym(library, kBackendSymbol));
    if (entry == nullptr) {
      why_ = path + " does not export " + kBackendSymbol;
      return;
    }
    const char* why = "it gave no reason";
    const BackendTable* table = entry(&why);
    if (table == nullptr) {
      why_ = why;
    } else if (table->version != BackendTable::kVersion) {
      why_ = path + " has version " + std::to_string(table->version) +
             " of the backend table, not " + std::to_string(BackendTable::kVersion);
    } else {
      table_ = table;
    }
  }

  static std::string LibraryFolder() {
    Dl_info info;
    if (dladdr(reinterpret_cast<const void*>(&BackendFor), &info) == 0) return ".";
    const std::string path = info.dli_fname;
    const size_t slash = path.rfind('/');
    return slash == std::string::npos ? "." : path.substr(0, slash);
  }

  const DLDeviceType device_type_;
  const char* const name_;
  std::once_flag opened_;
  const BackendTable* table_ = nullptr;
  std::string why_;
};

// Every backend but the CPU's. Never destroyed: calls may come until the process ends.
std::array<SharedBackend, 2>& SharedBackends() {
  static auto* backends = new std::array<SharedBackend, 2>{{
      {kDLCUDA, "cuda"},
      {kDLExtDev, "ascend"},
  }};
  return *backends;
}

}  // namespace

const BackendTable& BackendFor(DLDevice device, const char* op) {
  if (IsHost(device)) return cpu::Backend();
  for (SharedBackend& backend : SharedBackends()) {
    if (backend.device_type() != device.device_type) continue;
    if (const BackendTable* table = backend.table()) return *table;
    throw Error(ErrorKind::kNotImplementedError,
                std::string(op) + " is not available on " + DeviceText(device) +
                    ": this installation has no usable " + backend.name() + " backend (" +
                    backend.why() + ")");
  }
  ThrowNoOperator(device, op);
}

void ThrowNoOperator(DLDevice device, const char* op) {
  throw Error(ErrorKind::kNotImplementedError,
              std::string(op) + " is not implemented on " + DeviceText(device));
}

std::vector<BackendInfo> Backends() {
  std::vector<BackendInfo> backends = {{"cpu", true, cpu::Backend().description()}};
  for (SharedBackend& backend : SharedBackends()) {
    const BackendTable* table = backend.table();
    backends.push_back({backend.name(), table != nullptr,
                        table != nullptr ? table->description() : backend.why()});
  }
  return backends;
}

const char* Version() { return SELECT_ATTN_VERSION; }

}  // namespace select_attn
