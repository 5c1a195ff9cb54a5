#include "cpu/openmp.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>

#include "select_attn_ops/error.h"

namespace select_attn::cpu {
namespace {

// The entry points of an OpenMP runtime: GCC's, which LLVM's and Intel's have too.
struct OpenMp {
  void (*parallel)(void (*function)(void*), void* context, unsigned num_threads, unsigned flags);
  int (*max_threads)();
};

bool Wanted() {
  const char* text = std::getenv("SELECT_ATTN_PARALLEL");
  const std::string value = text == nullptr ? "" : text;
  if (value.empty() || value == "openmp") return true;
  if (value == "pool") return false;
  throw Error(ErrorKind::kValueError, "SELECT_ATTN_PARALLEL must be openmp or pool, got " + value);
}

std::string PathOfTorch() {
  std::string path;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* found) {
        const char* slash = std::strrchr(info->dlpi_name, '/');
        if (slash == nullptr || std::strcmp(slash + 1, "libtorch_cpu.so") != 0) return 0;
        *static_cast<std::string*>(found) = info->dlpi_name;
        return 1;
      },
      &path);
  return path;
}

// Set from the loading of the library on: torch may have had a team before our first call.
std::atomic<bool> g_is_forked_child{false};
[[maybe_unused]] const int g_fork_handler =
    pthread_atfork(nullptr, nullptr, [] { g_is_forked_child = true; });

// Whether the process was forked, with no exec since, before this library was loaded: its parent
// may have had a team by then. Linux keeps that as a flag of the process.
bool WasForked() {
  constexpr unsigned kForkedWithoutExec = 0x40;
  std::ifstream file("/proc/self/stat");
  std::string text;
  std::getline(file, text);
  // The name, in parentheses, may hold anything. Behind it: state ppid pgrp session tty tpgid
  // flags.
  const size_t name_end = text.rfind(')');
  if (name_end == std::string::npos) return false;
  std::istringstream fields(text.substr(name_end + 1));
  std::string skipped;
  for (int i = 0; i < 6; ++i) fields >> skipped;
  unsigned flags = 0;
  fields >> flags;
  return (flags & kForkedWithoutExec) != 0;
}

// Looked up and never linked: torch's wheel carries its runtime under a name of its own, and a
// process with two runtimes has twice the threads. A symbol found through torch's library is the
// one that torch itself calls.
OpenMp LookUp() {
  OpenMp openmp = {};
  if (!Wanted() || WasForked()) return openmp;
  const std::string path = PathOfTorch();
  if (path.empty()) return openmp;
  // The handle is kept: the runtime must not be unloaded.
  void* torch = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (torch == nullptr) return openmp;
  void* parallel = dlsym(torch, "GOMP_parallel");
  void* max_threads = dlsym(torch, "omp_get_max_threads");
  if (parallel == nullptr || max_threads == nullptr) return openmp;
  openmp.parallel = reinterpret_cast<decltype(openmp.parallel)>(parallel);
  openmp.max_threads = reinterpret_cast<decltype(openmp.max_threads)>(max_threads);
  return openmp;
}

}  // namespace

bool RunOnTorchTeam(int64_t num_threads, void (*function)(void*), void* context) {
  static const OpenMp openmp = LookUp();
  if (openmp.parallel == nullptr || g_is_forked_child.load(std::memory_order_relaxed) ||
      openmp.max_threads() != num_threads) {
    return false;
  }
  openmp.parallel(function, context, static_cast<unsigned>(num_threads), /*flags=*/0);
  return true;
}

void CheckParallelSetting() { Wanted(); }

}  // namespace select_attn::cpu
