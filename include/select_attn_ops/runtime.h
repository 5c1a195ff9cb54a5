// What the library is and has: version, backends, SIMD target, threads.

#ifndef SELECT_ATTN_OPS_RUNTIME_H_
#define SELECT_ATTN_OPS_RUNTIME_H_

#include <string>
#include <vector>

#include "select_attn_ops/common.h"

namespace select_attn {

// "major.minor.patch".
SELECT_ATTN_EXPORT const char* Version();

struct BackendInfo {
  std::string name;         // "cpu", "cuda", "ascend"
  bool available;           // whether its operators can be called
  std::string description;  // what it runs on, or why it is not available
};

// Every backend the library knows, the CPU first. Opens the shared objects that are present.
// Throws Error (kValueError) if an environment variable of the CPU backend makes no sense.
SELECT_ATTN_EXPORT std::vector<BackendInfo> Backends();

// Threads that a call on the CPU may use, the caller included. By default SELECT_ATTN_NUM_THREADS
// or else the number of processors that the first caller may run on; the other threads then stay on
// those. Of several calls at the same time one gets the other threads. The result of an operator
// depends on none of this. Throws Error (kValueError) for a count that is not in [1, 65536], in the
// call or in SELECT_ATTN_NUM_THREADS.
SELECT_ATTN_EXPORT int64_t NumThreads();
SELECT_ATTN_EXPORT void SetNumThreads(int64_t count);

// SIMD targets of the CPU kernels that this machine can run, best first, by their Highway names
// ("AVX3", "AVX2", "SSE4", ...).
SELECT_ATTN_EXPORT std::vector<std::string> SimdTargets();

// The target in use: the best one, or the one that SELECT_ATTN_SIMD_TARGET or SetSimdTarget names.
// A name that is not in SimdTargets() is a kValueError; the empty name goes back to the best.
// Setting it is for tests and bug reports: not while another thread is inside a call.
SELECT_ATTN_EXPORT std::string SimdTarget();
SELECT_ATTN_EXPORT void SetSimdTarget(const std::string& name);

}  // namespace select_attn

#endif  // SELECT_ATTN_OPS_RUNTIME_H_
