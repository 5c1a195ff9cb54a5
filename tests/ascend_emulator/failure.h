// How the emulator rejects a kernel.

#ifndef SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_FAILURE_H_
#define SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_FAILURE_H_

#include <stdexcept>
#include <string>

namespace ascend_emulator {

// Ends the core that throws it; Launch reports it.
class KernelError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

[[noreturn]] inline void Fail(const std::string& message) { throw KernelError(message); }

// For messages that cost nothing to form.
inline void Check(bool ok, const char* message) {
  if (!ok) Fail(message);
}

}  // namespace ascend_emulator

#endif  // SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_FAILURE_H_
