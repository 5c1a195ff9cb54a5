#include "cpu/read_memory.h"

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "select_attn_ops/error.h"
#include "select_attn_ops/runtime.h"

namespace select_attn {
namespace {

constexpr DLDataType kByte = {kDLUInt, 8, 1};

struct Bytes {
  DLTensor View() {
    DLTensor tensor = {};
    tensor.data = data;
    tensor.device = {kDLCPU, 0};
    tensor.ndim = static_cast<int32_t>(shape.size());
    tensor.dtype = kByte;
    tensor.shape = shape.data();
    tensor.strides = strides.data();
    return tensor;
  }

  uint8_t* data;
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
};

std::vector<ReadVariant> Variants() {
  std::vector<ReadVariant> variants;
  for (const int64_t streams : {1, 2, 4, 8}) {
    for (const int64_t chunk : {0, 64, 4096}) variants.push_back({streams, 0, 0, chunk, false});
    for (const int64_t far : {0, 768}) variants.push_back({streams, 256, far, 0, false});
  }
  return variants;
}

class ReadMemoryTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { SetSimdTarget(GetParam()); }
  void TearDown() override {
    SetSimdTarget("");
    SetNumThreads(1);
  }
};

INSTANTIATE_TEST_SUITE_P(Targets, ReadMemoryTest, testing::ValuesIn(SimdTargets()),
                         [](const auto& param) { return param.param; });

// In a block of its own, so that a sanitizer sees a read beyond either end.
TEST_P(ReadMemoryTest, EveryByteOfAnyPieceIsRead) {
  SetNumThreads(2);
  for (const int64_t size : {1, 63, 64, 65, 255, 257, 1000, 5000, 20000}) {
    for (const int64_t offset : {0, 1, 63}) {
      const auto block = std::make_unique<uint8_t[]>(static_cast<size_t>(size + offset));
      Bytes bytes{block.get() + offset, {size}, {1}};
      const DLTensor tensor = bytes.View();
      for (const ReadVariant& variant : Variants()) {
        EXPECT_EQ(ReadMemory({&tensor}, variant), 0);
        for (int64_t i = 0; i < size; i += size < 300 ? 1 : 397) {
          bytes.data[i] = 0x20;
          EXPECT_EQ(ReadMemory({&tensor}, variant), 0x20) << size << ", byte " << i;
          bytes.data[i] = 0;
        }
        bytes.data[size - 1] = 1;
        EXPECT_EQ(ReadMemory({&tensor}, variant), 1) << size;
        bytes.data[size - 1] = 0;
      }
    }
  }
}

TEST_P(ReadMemoryTest, RowsAreReadAndGapsDoNotCount) {
  for (const int64_t threads : {1, 3}) {
    SetNumThreads(threads);
    for (const int64_t row : {1, 33, 256, 300}) {
      // [3, 5] rows, each followed by 64 bytes, each group by 100 more.
      const int64_t stride = row + 64;
      const int64_t outer = 5 * stride + 100;
      std::vector<uint8_t> block(static_cast<size_t>(3 * outer), 0xFF);
      Bytes bytes{block.data(), {5, row, 3}, {stride, 1, outer}};
      const auto at = [&](int64_t group, int64_t r) {
        return block.data() + group * outer + r * stride;
      };
      for (int64_t group = 0; group < 3; ++group) {
        for (int64_t r = 0; r < 5; ++r) std::memset(at(group, r), 0, static_cast<size_t>(row));
      }
      const DLTensor tensor = bytes.View();
      for (const ReadVariant& variant : Variants()) {
        EXPECT_EQ(ReadMemory({&tensor}, variant), 0);
        for (int64_t group = 0; group < 3; ++group) {
          for (int64_t r = 0; r < 5; ++r) {
            uint8_t& last = at(group, r)[row - 1];
            last = 0x81;
            EXPECT_EQ(ReadMemory({&tensor}, variant), 0x81) << row << ": " << group << ", " << r;
            last = 0;
          }
        }
      }
    }
  }
}

TEST_P(ReadMemoryTest, TensorsSideBySide) {
  std::vector<uint8_t> block(27000, 0);
  Bytes first{block.data(), {9000}, {1}};
  Bytes second{block.data() + 9000, {9000}, {1}};
  const DLTensor a = first.View();
  const DLTensor b = second.View();
  for (const int64_t streams : {2, 4, 8}) {
    for (const bool side_by_side : {false, true}) {
      const ReadVariant variant{streams, 0, 0, 512, side_by_side};
      for (const size_t i : {0, 4500, 8999, 9000, 17999}) {
        block[i] = 4;
        EXPECT_EQ(ReadMemory({&a, &b}, variant), 4);
        block[i] = 0;
      }
      block[18000] = 4;
      EXPECT_EQ(ReadMemory({&a, &b}, variant), 0);
      block[18000] = 0;
    }
  }
}

TEST(ReadMemoryErrors, EmptyIsFine) {
  Bytes none{nullptr, {0, 4}, {4, 1}};
  const DLTensor tensor = none.View();
  EXPECT_EQ(ReadMemory({}, {1, 0, 0, 0, false}), 0);
  EXPECT_EQ(ReadMemory({&tensor}, {1, 0, 0, 64, false}), 0);
}

std::string Message(const std::vector<const DLTensor*>& tensors, const ReadVariant& variant) {
  try {
    ReadMemory(tensors, variant);
    return "no error";
  } catch (const Error& error) {
    return error.what();
  }
}

TEST(ReadMemoryErrors, Messages) {
  std::vector<uint8_t> block(1000, 0);
  Bytes bytes{block.data(), {2, 2, 2, 2}, {400, 100, 10, 1}};
  DLTensor tensor = bytes.View();
  EXPECT_EQ(Message({&tensor}, {1, 0, 0, 0, false}),
            "memory to be read must reduce to rows in at most 2 nested levels, got 3");
  bytes.strides = {4, 2, 1, 1};
  EXPECT_EQ(Message({&tensor}, {1, 0, 0, 0, false}),
            "memory to be read must have no elements that overlap");
  bytes.strides = {8, 4, 2, 1};
  EXPECT_EQ(Message({&tensor}, {3, 0, 0, 0, false}), "streams must be 1, 2, 4 or 8, got 3");
  EXPECT_EQ(Message({&tensor}, {1, -1, 0, 0, false}), "bytes must be at least 0, got -1");
  EXPECT_EQ(Message({&tensor, &tensor}, {1, 0, 0, 0, true}),
            "streams must be a multiple of the 2 tensors to be read side by side, got 1");
  Bytes other{block.data(), {15}, {1}};
  const DLTensor another = other.View();
  EXPECT_EQ(Message({&tensor, &another}, {2, 0, 0, 0, true}),
            "tensors to be read side by side must be alike in shape and strides");
  tensor.device = {kDLCUDA, 1};
  EXPECT_EQ(Message({&tensor}, {1, 0, 0, 0, false}),
            "memory to be read must be on the CPU, got cuda:1");
}

}  // namespace
}  // namespace select_attn
