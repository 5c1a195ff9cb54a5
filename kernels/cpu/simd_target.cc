// The SIMD target that the CPU kernels dispatch to: Highway's choice, or the user's.

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <string>
#include <vector>

#include "hwy/highway.h"
#include "select_attn_ops/error.h"
#include "select_attn_ops/runtime.h"

namespace select_attn {
namespace {

// As the machine has them, best first; what Highway lists once one is forced is only that one.
const std::vector<int64_t>& Targets() {
  static const std::vector<int64_t> targets = hwy::SupportedAndGeneratedTargets();
  return targets;
}

// What the kernels dispatch to. Highway knows as well, but asks the processor anew at every call,
// which takes microseconds on a virtual one.
std::atomic<int64_t> chosen_target{0};

// The empty name goes back to the best target. `what` names in the message what is being set.
void Force(const std::string& name, const char* what) {
  int64_t mask = 0;
  std::string names;
  for (const int64_t target : Targets()) {
    if (name == hwy::TargetName(target)) mask = target;
    names += (names.empty() ? "" : ", ") + std::string(hwy::TargetName(target));
  }
  if (mask == 0 && !name.empty()) {
    throw Error(ErrorKind::kValueError,
                std::string(what) + " must be one of " + names + ", got " + name);
  }
  hwy::SetSupportedTargetsForTest(mask);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  chosen_target = mask == 0 ? Targets().front() : mask;
}

// Before anything else looks at the targets.
void ForceFromEnvironment() {
  static std::once_flag done;  // not set by a call that throws, so that every call reports it
  std::call_once(done, [] {
    const char* name = std::getenv("SELECT_ATTN_SIMD_TARGET");
    Force(name == nullptr ? "" : name, "SELECT_ATTN_SIMD_TARGET");
  });
}

}  // namespace

std::vector<std::string> SimdTargets() {
  std::vector<std::string> names;
  for (const int64_t target : Targets()) names.emplace_back(hwy::TargetName(target));
  return names;
}

std::string SimdTarget() {
  ForceFromEnvironment();
  return hwy::TargetName(chosen_target);
}

void SetSimdTarget(const std::string& name) {
  ForceFromEnvironment();
  Force(name, "the SIMD target");
}

}  // namespace select_attn
