#include "core/arguments.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <optional>

#include "core/device.h"

namespace select_attn {
namespace {

// As the contract spells them; in the order of Dim.
constexpr const char* kDimNames[] = {
    "",      "B",     "H",    "N", "D", "k", "block_size", "R", "num_kv_blocks", "num_meta_blocks",
    "MKBPR", "MMBPR", "bytes"};
static_assert(std::size(kDimNames) == static_cast<size_t>(Dim::kCount));

constexpr int64_t kUnbound = -1;

int Rank(const Argument& argument) {
  return static_cast<int>(std::find(argument.dims.begin(), argument.dims.end(), Dim::kNone) -
                          argument.dims.begin());
}

// "[1, 2, 3]" of the texts that element(0), element(1), ... return.
template <typename F>
std::string List(int count, F&& element) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) text += (i == 0 ? "" : ", ") + element(i);
  return text + "]";
}

std::string ShapeText(const DLTensor& tensor) {
  return List(tensor.ndim, [&](int i) { return std::to_string(tensor.shape[i]); });
}

std::string StridesText(const DLTensor& tensor) {
  return List(tensor.ndim, [&](int i) { return std::to_string(Stride(tensor, i)); });
}

std::string DTypeText(DLDataType type) {
  std::string text;
  switch (type.code) {
    case kDLInt:
      text = "int";
      break;
    case kDLUInt:
      text = "uint";
      break;
    case kDLFloat:
      text = "float";
      break;
    case kDLBfloat:
      text = "bfloat";
      break;
    case kDLComplex:
      text = "complex";
      break;
    default:
      // DLPack's code for booleans is newer than its oldest version that this compiles with.
      if (type.code == 6) return "bool";
      text = "type code " + std::to_string(type.code) + " of bits ";
  }
  text += std::to_string(type.bits);
  if (type.lanes != 1) text += "x" + std::to_string(type.lanes);
  return text;
}

const char* DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat32:
      return "float32";
  }
  return "unknown";
}

std::optional<DType> FloatType(DLDataType type) {
  if (type.lanes != 1) return std::nullopt;
  if (type.code == kDLFloat && type.bits == 16) return DType::kFloat16;
  if (type.code == kDLBfloat && type.bits == 16) return DType::kBFloat16;
  if (type.code == kDLFloat && type.bits == 32) return DType::kFloat32;
  return std::nullopt;
}

bool Is(DLDataType type, int code, int bits) {
  return type.code == code && type.bits == bits && type.lanes == 1;
}

bool IsEmpty(const DLTensor& tensor) {
  return std::find(tensor.shape, tensor.shape + tensor.ndim, 0) != tensor.shape + tensor.ndim;
}

// Whether two elements may share an address. Dimensions are nested if, by increasing stride, each
// steps over everything the smaller ones reach; every view that slicing, permuting and reshaping
// can make of memory without overlap is.
bool MayOverlapItself(const DLTensor& tensor) {
  for (int i = 0; i < tensor.ndim; ++i) {
    if (tensor.shape[i] == 1) continue;
    const int64_t stride = std::abs(Stride(tensor, i));
    int64_t reach = 0;  // largest offset of the dimensions with smaller strides
    for (int j = 0; j < tensor.ndim; ++j) {
      if (tensor.shape[j] == 1) continue;
      const int64_t other = std::abs(Stride(tensor, j));
      if (other < stride || (other == stride && j < i)) reach += other * (tensor.shape[j] - 1);
    }
    if (stride <= reach) return true;
  }
  return false;
}

[[noreturn]] void ThrowTypeError(const std::string& text) {
  throw Error(ErrorKind::kTypeError, text);
}

// A tensor with no more elements than this, none of them farther away than this, has sizes and
// offsets in bytes, and sums of a few of those, that fit into 64 bits.
constexpr int64_t kMaxElements = int64_t{1} << 56;

// Whether no dimension reaches farther than kMaxElements.
bool IsWithinReach(const DLTensor& tensor) {
  for (int i = 0; i < tensor.ndim; ++i) {
    const int64_t steps = tensor.shape[i] - 1;
    if (steps == 0) continue;
    const int64_t stride = Stride(tensor, i);
    if (stride > kMaxElements / steps || stride < -kMaxElements / steps) return false;
  }
  return true;
}

// First and last byte that a tensor's elements take.
struct Extent {
  explicit Extent(const DLTensor& tensor) : first(reinterpret_cast<intptr_t>(Data(tensor))) {
    const int64_t element = tensor.dtype.bits / 8;
    last = first + element - 1;
    for (int i = 0; i < tensor.ndim; ++i) {
      const int64_t reach = (tensor.shape[i] - 1) * Stride(tensor, i) * element;
      (reach < 0 ? first : last) += reach;
    }
  }

  intptr_t first;
  intptr_t last;
};

void CheckSeparate(const Argument& written, const Argument& other) {
  if (written.access == Access::kWriteAmongKeys && other.type == ElementType::kFloat) return;
  if (IsEmpty(*written.tensor) || IsEmpty(*other.tensor)) return;
  const Extent a(*written.tensor);
  const Extent b(*other.tensor);
  if (a.first > b.last || b.first > a.last) return;
  ThrowValueError(std::string(written.name) + " is written and must not share memory with " +
                  other.name + ", got overlapping addresses");
}

void CheckLayout(const Argument& argument) {
  const DLTensor& tensor = *argument.tensor;
  if (IsEmpty(tensor)) return;
  const int last = tensor.ndim - 1;
  if (tensor.shape[last] > 1 && Stride(tensor, last) != 1) {
    ThrowValueError(std::string(argument.name) +
                    " must be contiguous in its last dimension, got strides " +
                    StridesText(tensor));
  }
  if (!IsWithinReach(tensor)) {
    ThrowValueError(std::string(argument.name) + " must span at most 2^56 elements, got shape " +
                    ShapeText(tensor) + " with strides " + StridesText(tensor));
  }
  if (tensor.data == nullptr) {
    ThrowValueError(std::string(argument.name) +
                    " must have memory, got a null address for shape " + ShapeText(tensor));
  }
  const auto address = reinterpret_cast<uintptr_t>(Data(tensor));
  if (address % (tensor.dtype.bits / 8) != 0) {
    ThrowValueError(std::string(argument.name) + " must be aligned to its elements of " +
                    std::to_string(tensor.dtype.bits / 8) + " bytes, got an address that is " +
                    std::to_string(address % (tensor.dtype.bits / 8)) + " beyond");
  }
  if (argument.access != Access::kRead && MayOverlapItself(tensor)) {
    ThrowValueError(std::string(argument.name) +
                    " is written and must not overlap itself, got shape " + ShapeText(tensor) +
                    " with strides " + StridesText(tensor));
  }
}

}  // namespace

ArgumentChecker::ArgumentChecker(std::initializer_list<Argument> arguments) {
  extents_.fill(kUnbound);

  for (const Argument& argument : arguments) {
    if (argument.tensor == nullptr) continue;
    const int rank = Rank(argument);
    if (argument.tensor->ndim == rank) continue;
    const std::string expected = List(rank, [&](int i) -> std::string {
      return kDimNames[static_cast<size_t>(argument.dims[i])];
    });
    ThrowValueError(std::string(argument.name) + " must be " + expected + ", got " +
                    ShapeText(*argument.tensor));
  }

  const Argument* typed = nullptr;  // the argument that set dtype_
  for (const Argument& argument : arguments) {
    if (argument.tensor == nullptr) continue;
    const DLDataType type = argument.tensor->dtype;
    const auto expect = [&](bool fits, const std::string& expected) {
      if (fits) return;
      ThrowTypeError(std::string(argument.name) + " must be " + expected + ", got " +
                     DTypeText(type));
    };
    switch (argument.type) {
      case ElementType::kFloat: {
        const std::optional<DType> dtype = FloatType(type);
        if (typed == nullptr) {
          expect(dtype.has_value(), "float16, bfloat16 or float32");
          dtype_ = *dtype;
          typed = &argument;
        } else if (dtype != dtype_) {
          expect(false, std::string(DTypeName(dtype_)) + " like " + typed->name);
        }
        break;
      }
      case ElementType::kFloat32:
        expect(Is(type, kDLFloat, 32), "float32");
        break;
      case ElementType::kInt32:
        expect(Is(type, kDLInt, 32), "int32");
        break;
      case ElementType::kUInt8:
        expect(Is(type, kDLUInt, 8), "uint8");
        break;
    }
  }

  const Argument& first = *arguments.begin();
  for (const Argument& argument : arguments) {
    if (argument.tensor == nullptr || SameDevice(argument.tensor->device, first.tensor->device)) {
      continue;
    }
    ThrowValueError(std::string(argument.name) + " must be on " + DeviceText(first.tensor->device) +
                    " like " + first.name + ", got " + DeviceText(argument.tensor->device));
  }

  for (const Argument& argument : arguments) {
    if (argument.tensor != nullptr) CheckShape(argument);
  }
  for (const Argument& argument : arguments) {
    if (argument.tensor != nullptr) CheckLayout(argument);
  }
  for (const Argument& written : arguments) {
    if (written.tensor == nullptr || written.access == Access::kRead) continue;
    for (const Argument& other : arguments) {
      if (other.tensor != nullptr && &other != &written) CheckSeparate(written, other);
    }
  }
}

// Bound extents as numbers, free ones as *.
std::string ArgumentChecker::ExpectedShape(const Argument& argument) const {
  return List(Rank(argument), [&](int i) -> std::string {
    const int64_t extent = (*this)[argument.dims[i]];
    return extent == kUnbound ? "*" : std::to_string(extent);
  });
}

void ArgumentChecker::CheckShape(const Argument& argument) {
  const DLTensor& tensor = *argument.tensor;
  for (int i = 0; i < tensor.ndim; ++i) {
    const int64_t extent = (*this)[argument.dims[i]];
    if (extent != kUnbound && extent != tensor.shape[i]) {
      ThrowValueError(std::string(argument.name) + " must be " + ExpectedShape(argument) +
                      ", got " + ShapeText(tensor));
    }
  }
  for (int i = 0; i < tensor.ndim; ++i) {
    const Dim dim = argument.dims[i];
    switch (dim) {
      case Dim::kHeads:
      case Dim::kKvHeads:
      case Dim::kHeadDim:
      case Dim::kK:
      case Dim::kBlockSize:
      case Dim::kRows:
        if (tensor.shape[i] < 1) {
          ThrowValueError(std::string(argument.name) + " must have " +
                          kDimNames[static_cast<size_t>(dim)] + " >= 1, got " + ShapeText(tensor));
        }
        break;
      default:
        break;
    }
    extents_[static_cast<size_t>(dim)] = tensor.shape[i];
  }
  int64_t elements = 1;
  for (int i = 0; i < tensor.ndim; ++i) {
    elements = SaturatingProduct(elements, std::max<int64_t>(tensor.shape[i], 1));
  }
  if (elements > kMaxElements) {
    ThrowValueError(std::string(argument.name) + " must have at most 2^56 elements, got " +
                    ShapeText(tensor));
  }
}

void* Data(const DLTensor& tensor) { return static_cast<char*>(tensor.data) + tensor.byte_offset; }

int64_t Stride(const DLTensor& tensor, int i) {
  if (tensor.strides != nullptr) return tensor.strides[i];
  int64_t stride = 1;
  for (int j = i + 1; j < tensor.ndim; ++j) stride *= tensor.shape[j];
  return stride;
}

int64_t SaturatingProduct(int64_t a, int64_t b) {
  int64_t product;
  return __builtin_mul_overflow(a, b, &product) ? std::numeric_limits<int64_t>::max() : product;
}

void ThrowValueError(const std::string& text) { throw Error(ErrorKind::kValueError, text); }

void ThrowBadValue(const char* name, int64_t i, int64_t j, const std::string& expected,
                   int64_t got) {
  std::string text = std::string(name) + "[" + std::to_string(i);
  if (j >= 0) text += ", " + std::to_string(j);
  ThrowValueError(text + "] must be " + expected + ", got " + std::to_string(got));
}

void CheckTableEntries(const char* name, const int32_t* row, int64_t i, int64_t begin, int64_t end,
                       int64_t limit) {
  for (int64_t j = begin; j < end; ++j) {
    if (row[j] < 0 || row[j] >= limit) {
      ThrowBadValue(name, i, j, "in [0, " + std::to_string(limit) + ")", row[j]);
    }
  }
}

void CheckSelectedIndices(const int32_t* row, int64_t b, int64_t n, int64_t k, int64_t num_blocks) {
  for (int64_t i = 0; i < k; ++i) {
    if (row[i] >= -1 && row[i] < num_blocks) continue;
    ThrowValueError("selected_indices[" + std::to_string(b) + ", " + std::to_string(n) + ", " +
                    std::to_string(i) + "] must be -1 or in [0, " + std::to_string(num_blocks) +
                    "), the request's blocks, got " + std::to_string(row[i]));
  }
}

void CheckLength(const char* name, int64_t i, int64_t length, int64_t limit, const char* why) {
  if (length < 0 || length > limit) {
    ThrowBadValue(name, i, -1, "in [0, " + std::to_string(limit) + "]" + why, length);
  }
}

}  // namespace select_attn
