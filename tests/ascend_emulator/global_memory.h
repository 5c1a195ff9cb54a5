// Global memory for tests.

#ifndef SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_GLOBAL_MEMORY_H_
#define SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_GLOBAL_MEMORY_H_

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "device_language.h"

namespace ascend_emulator {

// `size` elements, zero at first, between pages that must not be touched; the end is up to 32 bytes
// before the second of those. Memory is taken when it is touched, so there may be more than the
// host has.
template <typename T>
class GlobalMemory {
 public:
  explicit GlobalMemory(size_t size) : size_(size) {
    constexpr size_t kAlignment = 32;
    const size_t bytes = (size * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    const size_t inner = (bytes + kPage - 1) / kPage * kPage;
    mapped_bytes_ = inner + 2 * kPage;
    mapped_ =
        mmap(nullptr, mapped_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped_ == MAP_FAILED) throw std::runtime_error("GlobalMemory: mmap failed");
    auto* first = static_cast<uint8_t*>(mapped_) + kPage;
    if (inner > 0 && mprotect(first, inner, PROT_READ | PROT_WRITE) != 0) {
      munmap(mapped_, mapped_bytes_);
      throw std::runtime_error("GlobalMemory: mprotect failed");
    }
    data_ = reinterpret_cast<T*>(first + inner - bytes);
  }
  ~GlobalMemory() { munmap(mapped_, mapped_bytes_); }

  GlobalMemory(const GlobalMemory&) = delete;
  GlobalMemory& operator=(const GlobalMemory&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  GM_ADDR address() { return reinterpret_cast<GM_ADDR>(data_); }

 private:
  static constexpr size_t kPage = 64 * 1024;

  size_t size_;
  size_t mapped_bytes_;
  void* mapped_;
  T* data_;
};

}  // namespace ascend_emulator

#endif  // SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_GLOBAL_MEMORY_H_
