// The table-driven argument checks: order, texts, layouts. What each operator checks is tested from
// Python.

#include "core/arguments.h"

#include <gtest/gtest.h>

#include <functional>
#include <limits>

#include "test_tensor.h"

namespace select_attn {
namespace {

constexpr DLDataType kF32 = {kDLFloat, 32, 1};

class ArgumentsTest : public testing::Test {
 protected:
  // "TypeError: text", or "" where nothing is thrown.
  std::string Check() {
    DLTensor query = query_.View(device_);
    if (shares_memory_) query.data = blocks_.data<char>();
    DLTensor blocks = blocks_.View(blocks_device_);
    blocks.byte_offset = byte_offset_;
    blocks.dtype = blocks_type_;
    DLTensor table = table_.View(device_);
    table.dtype = table_type_;
    if (table_data_) table.data = table_data_();
    try {
      const ArgumentChecker checker({
          {"query", &query, ElementType::kFloat, {Dim::kBatch, Dim::kHeads, Dim::kHeadDim}},
          {"blocks",
           &blocks,
           ElementType::kFloat,
           {Dim::kMetadataBlocks, Dim::kRows, Dim::kKvHeads, Dim::kHeadDim},
           access_},
          {"table", &table, ElementType::kInt32, {Dim::kBatch, Dim::kMaxMetadataBlocks}},
          {"missing", nullptr, ElementType::kInt32, {Dim::kBatch}},
      });
      EXPECT_EQ(checker[Dim::kRows], blocks_.shape()[1]);
      EXPECT_EQ(checker.dtype(), DType::kFloat32);
      return "";
    } catch (const Error& error) {
      return std::string(error.KindName()) + ": " + error.what();
    }
  }

  Access access_ = Access::kWriteAmongKeys;  // of blocks
  bool shares_memory_ = false;               // query with blocks
  TestTensor query_{kF32, {2, 4, 8}};
  TestTensor blocks_{kF32, {5, 3, 2, 8}};
  TestTensor table_{kInt32, {2, 6}};
  DLDataType blocks_type_ = kF32;
  DLDataType table_type_ = kInt32;
  DLDevice device_ = {kDLCPU, 0};
  DLDevice blocks_device_ = {kDLCPU, 0};
  uint64_t byte_offset_ = 0;
  std::function<char*()> table_data_;
};

TEST_F(ArgumentsTest, AcceptsWhatFits) { EXPECT_EQ(Check(), ""); }

TEST_F(ArgumentsTest, NamesExtentsThatAreFreeAndThoseThatAreNot) {
  blocks_.shape()[3] = 7;
  EXPECT_EQ(Check(), "ValueError: blocks must be [*, *, *, 8], got [5, 3, 2, 7]");
}

TEST_F(ArgumentsTest, ChecksRankBeforeTypeBeforeDeviceBeforeShapeBeforeLayout) {
  blocks_.strides()[3] = 2;
  EXPECT_EQ(Check(),
            "ValueError: blocks must be contiguous in its last dimension, got strides [48, 16, 8, "
            "2]");
  table_.shape()[0] = 3;  // a later argument's shape comes before an earlier one's layout
  EXPECT_EQ(Check(), "ValueError: table must be [2, *], got [3, 6]");
  blocks_device_ = {kDLCUDA, 1};
  EXPECT_EQ(Check(), "ValueError: blocks must be on cpu like query, got cuda:1");
  table_type_ = {kDLInt, 64, 1};
  EXPECT_EQ(Check(), "TypeError: table must be int32, got int64");
  table_.shape().push_back(1);
  table_.strides().push_back(1);
  EXPECT_EQ(Check(), "ValueError: table must be [B, MMBPR], got [3, 6, 1]");
}

TEST_F(ArgumentsTest, ChecksTypes) {
  blocks_type_ = {kDLBfloat, 16, 1};
  EXPECT_EQ(Check(), "TypeError: blocks must be float32 like query, got bfloat16");
  blocks_type_ = {kDLFloat, 32, 4};
  EXPECT_EQ(Check(), "TypeError: blocks must be float32 like query, got float32x4");
  blocks_type_ = {6, 8, 1};
  EXPECT_EQ(Check(), "TypeError: blocks must be float32 like query, got bool");
}

TEST_F(ArgumentsTest, PinnedMemoryIsTheCpus) {
  blocks_device_ = {kDLCUDAHost, 0};
  EXPECT_EQ(Check(), "");
}

TEST_F(ArgumentsTest, WantsExtentsOfAtLeastOneButAnyBatchAndPool) {
  blocks_.shape()[1] = 0;
  EXPECT_EQ(Check(), "ValueError: blocks must have R >= 1, got [5, 0, 2, 8]");
  blocks_.shape()[1] = 3;
  blocks_.shape()[0] = query_.shape()[0] = table_.shape()[0] = 0;
  EXPECT_EQ(Check(), "");
}

TEST_F(ArgumentsTest, ChecksAlignmentWithTheByteOffset) {
  byte_offset_ = 4;
  EXPECT_EQ(Check(), "");
  byte_offset_ = 6;
  EXPECT_EQ(Check(),
            "ValueError: blocks must be aligned to its elements of 4 bytes, got an address that is "
            "2 beyond");
}

TEST_F(ArgumentsTest, FindsOverlapOfOutputs) {
  for (const std::vector<int64_t>& fine : {std::vector<int64_t>{48, 16, 8, 1},
                                           {48, 8, 24, 1},   // heads outside rows
                                           {8, 80, 40, 1},   // blocks innermost
                                           {-48, 16, 8, 1},  // backwards
                                           {100, 32, 16, 1}}) {
    blocks_.strides() = fine;
    EXPECT_EQ(Check(), "");
  }
  for (const std::vector<int64_t>& wrong : {std::vector<int64_t>{0, 16, 8, 1},
                                            {47, 16, 8, 1},
                                            {48, 16, 7, 1},
                                            {48, 8, 8, 1},
                                            {-47, 16, 8, 1}}) {
    blocks_.strides() = wrong;
    EXPECT_NE(Check().find("ValueError: blocks is written and must not overlap itself"),
              std::string::npos);
  }
  blocks_.strides() = {0, 16, 8, 1};
  blocks_.shape()[0] = 1;  // the stride of an extent of 1 means nothing
  EXPECT_EQ(Check(), "");
}

TEST_F(ArgumentsTest, KeepsOnlyMetadataAmongKeys) {
  shares_memory_ = true;
  EXPECT_EQ(Check(), "");
  access_ = Access::kWrite;
  EXPECT_EQ(Check(),
            "ValueError: blocks is written and must not share memory with query, got overlapping "
            "addresses");
}

TEST_F(ArgumentsTest, KeepsWhatIsWrittenApartFromTables) {
  table_data_ = [this] { return blocks_.data<char>() + blocks_.bytes().size() - 4; };
  EXPECT_EQ(Check(),
            "ValueError: blocks is written and must not share memory with table, got overlapping "
            "addresses");
  table_data_ = [this] { return blocks_.data<char>() + blocks_.bytes().size(); };
  EXPECT_EQ(Check(), "");  // just behind
}

TEST_F(ArgumentsTest, WantsMemoryUnlessThereIsNothingInIt) {
  table_data_ = [] { return nullptr; };
  EXPECT_EQ(Check(), "ValueError: table must have memory, got a null address for shape [2, 6]");
  table_.shape()[1] = 0;
  EXPECT_EQ(Check(), "");
  table_.strides() = {0, 0};  // as NumPy has it
  EXPECT_EQ(Check(), "");
}

TEST_F(ArgumentsTest, RefusesSizesThatOverflow) {
  blocks_.shape() = {int64_t{1} << 31, int64_t{1} << 31, 2, 8};
  EXPECT_EQ(Check(),
            "ValueError: blocks must have at most 2^56 elements, got [2147483648, 2147483648, 2, "
            "8]");
}

TEST_F(ArgumentsTest, RefusesStridesThatOverflow) {
  constexpr int64_t kLowest = std::numeric_limits<int64_t>::min();
  table_.strides()[0] = kLowest;
  EXPECT_EQ(Check(),
            "ValueError: table must span at most 2^56 elements, got shape [2, 6] with strides "
            "[-9223372036854775808, 1]");
  for (const int sign : {1, -1}) {
    table_.strides()[0] = sign * ((int64_t{1} << 56) + 1);
    EXPECT_NE(Check().find("must span"), std::string::npos);
    table_.strides()[0] = sign * (int64_t{1} << 56);
    EXPECT_EQ(Check().find("must span"), std::string::npos);
  }
  query_.shape()[0] = 1;
  table_.shape()[0] = 1;  // then nobody takes a step
  table_.strides()[0] = kLowest;
  EXPECT_EQ(Check(), "");
}

TEST(StrideTest, TensorsWithoutStridesAreRowMajor) {
  TestTensor tensor(kF32, {2, 3, 4});
  DLTensor view = tensor.View();
  view.strides = nullptr;
  EXPECT_EQ(Stride(view, 0), 12);
  EXPECT_EQ(Stride(view, 1), 4);
  EXPECT_EQ(Stride(view, 2), 1);
}

TEST(SaturatingProductTest, StopsAtTheLargest) {
  EXPECT_EQ(SaturatingProduct(3, 5), 15);
  EXPECT_EQ(SaturatingProduct(int64_t{1} << 40, int64_t{1} << 40),
            std::numeric_limits<int64_t>::max());
}

}  // namespace
}  // namespace select_attn
