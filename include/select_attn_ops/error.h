// The one exception that the library throws.

#ifndef SELECT_ATTN_OPS_ERROR_H_
#define SELECT_ATTN_OPS_ERROR_H_

#include <stdexcept>
#include <string>

#include "select_attn_ops/common.h"

namespace select_attn {

enum class ErrorKind {
  kTypeError,            // a dtype
  kValueError,           // a rank, shape, layout, device or value
  kNotImplementedError,  // what a backend does not have
  kRuntimeError,         // the device itself failed
};

// Thrown before anything is written, except for kRuntimeError. what() names the argument, what was
// expected and what came.
class SELECT_ATTN_EXPORT Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& what) : std::runtime_error(what), kind_(kind) {}

  ErrorKind kind() const { return kind_; }

  // The Python exception of this kind: "TypeError", "ValueError", ...
  const char* KindName() const;

 private:
  ErrorKind kind_;
};

}  // namespace select_attn

#endif  // SELECT_ATTN_OPS_ERROR_H_
