#include "select_attn_ops/error.h"

namespace select_attn {

const char* Error::KindName() const {
  switch (kind_) {
    case ErrorKind::kTypeError:
      return "TypeError";
    case ErrorKind::kValueError:
      return "ValueError";
    case ErrorKind::kNotImplementedError:
      return "NotImplementedError";
    case ErrorKind::kRuntimeError:
      return "RuntimeError";
  }
  return "RuntimeError";
}

}  // namespace select_attn
