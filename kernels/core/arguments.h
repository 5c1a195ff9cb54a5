// Argument checks shared by all operators: an operator declares its arguments as a table, and one
// pass checks rank, dtype, device, shape and layout, in that order, over all of them.

#ifndef SELECT_ATTN_OPS_CORE_ARGUMENTS_H_
#define SELECT_ATTN_OPS_CORE_ARGUMENTS_H_

#include <dlpack/dlpack.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "select_attn_ops/common.h"
#include "select_attn_ops/error.h"

namespace select_attn {

// The extents that arguments share. An extent is bound by the first argument that has it and must
// be the same in all others.
enum class Dim : int8_t {
  kNone,
  kBatch,
  kHeads,
  kKvHeads,
  kHeadDim,
  kK,
  kBlockSize,
  kRows,
  kKvBlocks,
  kMetadataBlocks,
  kMaxKvBlocks,
  kMaxMetadataBlocks,
  kBytes,
  kCount,
};

enum class ElementType : int8_t {
  kFloat,  // float16, bfloat16 or float32, the same for all such arguments
  kFloat32,
  kInt32,
  kUInt8,
};

enum class Access : int8_t {
  kRead,
  kWrite,           // shares no memory with any other argument
  kWriteAmongKeys,  // the same, but may lie interleaved with others of kFloat, in one pool
};

inline constexpr int kMaxRank = 4;

struct Argument {
  const char* name;
  const DLTensor* tensor;  // null: an optional argument left out, which passes every check
  ElementType type;
  std::array<Dim, kMaxRank> dims;  // filled up with kNone
  Access access = Access::kRead;
};

// Checks arguments on construction, throwing Error, and answers questions about their extents.
class ArgumentChecker {
 public:
  // The first argument must not be left out: the device of all others is compared with its device.
  ArgumentChecker(std::initializer_list<Argument> arguments);

  // Extent of a dimension that some argument has.
  int64_t operator[](Dim dim) const { return extents_[static_cast<size_t>(dim)]; }

  // The type of the kFloat arguments.
  DType dtype() const { return dtype_; }

 private:
  std::string ExpectedShape(const Argument& argument) const;
  void CheckShape(const Argument& argument);

  std::array<int64_t, static_cast<size_t>(Dim::kCount)> extents_;
  DType dtype_ = DType::kFloat32;
};

// Address of the first element.
void* Data(const DLTensor& tensor);

template <typename T>
T* DataOr(const DLTensor* tensor, T* missing) {
  return tensor == nullptr ? missing : static_cast<T*>(Data(*tensor));
}

// Stride of dimension i in elements. A tensor without strides is row-major.
int64_t Stride(const DLTensor& tensor, int i);

// a * b of non-negative numbers, or the largest int64_t where that is less.
int64_t SaturatingProduct(int64_t a, int64_t b);

[[noreturn]] void ThrowValueError(const std::string& text);

// Throws a kValueError that reads "<name>[<i>] must be <expected>, got <got>", or with two indices
// if j >= 0.
[[noreturn]] void ThrowBadValue(const char* name, int64_t i, int64_t j, const std::string& expected,
                                int64_t got);

// Checks entries [begin, end) of row i of an int32 table against [0, limit).
void CheckTableEntries(const char* name, const int32_t* row, int64_t i, int64_t begin, int64_t end,
                       int64_t limit);

// Checks the row of selected_indices that belongs to request b and KV head n: `k` numbers, each -1
// or one of the request's num_blocks blocks.
void CheckSelectedIndices(const int32_t* row, int64_t b, int64_t n, int64_t k, int64_t num_blocks);

// Checks that the length of request i is in [0, limit]; `why` says in the message what sets the
// limit.
void CheckLength(const char* name, int64_t i, int64_t length, int64_t limit, const char* why);

}  // namespace select_attn

#endif  // SELECT_ATTN_OPS_CORE_ARGUMENTS_H_
