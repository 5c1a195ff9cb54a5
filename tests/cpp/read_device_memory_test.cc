// The plain reduction of the CUDA backend on the emulator: every variant reads every byte.

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "cuda/backend.h"
#include "cuda/launch.h"

namespace select_attn::cuda {
namespace {

constexpr DLDevice kDevice = {kDLCUDA, 0};

class ReadDeviceMemoryTest : public testing::Test {
 protected:
  // The OR of what the thread blocks found.
  int32_t Read(const DeviceReadVariant& variant) {
    ReadDeviceMemoryParams p = {};
    p.variant = variant;
    for (size_t t = 0; t < tensors_.size(); ++t) {
      p.data[t] = tensors_[t].data();
      p.bytes[t] = static_cast<int64_t>(tensors_[t].size());
    }
    std::vector<int32_t> bits(3, 0);
    p.bits = bits.data();
    p.most_blocks = static_cast<int64_t>(bits.size());
    const BackendOperator<ReadDeviceMemoryParams> op = ReadDeviceMemory();
    EXPECT_EQ(op.unsupported(p, kDevice), nullptr);
    EXPECT_EQ(op.run(p, kDevice, nullptr), nullptr);
    return bits[0] | bits[1] | bits[2];
  }

  // Gives 32 places a bit each that no other place has in the words they are in: the ends of all
  // tensors, and random ones.
  void Mark() {
    size_t used[4] = {};
    const auto mark = [&](std::vector<uint8_t>& tensor, size_t at) {
      if (used[at % 4] < 8) tensor[at] |= static_cast<uint8_t>(1u << used[at % 4]++);
    };
    for (std::vector<uint8_t>& tensor : tensors_) {
      std::fill(tensor.begin(), tensor.end(), 0);
      if (tensor.empty()) continue;
      mark(tensor, 0);
      mark(tensor, tensor.size() - 1);
    }
    while (used[0] + used[1] + used[2] + used[3] < 32) {
      mark(tensors_[0], random_() % tensors_[0].size());
    }
  }

  std::mt19937 random_{5};
  // One byte more than whole vectors; and nothing, as where there is no tensor.
  std::vector<std::vector<uint8_t>> tensors_ = {
      std::vector<uint8_t>(40001), {}, std::vector<uint8_t>(9)};
};

TEST_F(ReadDeviceMemoryTest, EveryVariantReadsEveryByte) {
  emulated_device = {2, 7};
  for (const int64_t threads : {256, 512}) {
    for (const int64_t loads : {2, 4, 8}) {
      for (const int64_t vector_bytes : {8, 16}) {
        for (const bool streaming : {false, true}) {
          Mark();
          EXPECT_EQ(Read({threads, loads, vector_bytes, streaming}), -1);
        }
      }
    }
  }
}

TEST_F(ReadDeviceMemoryTest, TheEmptyKernelReadsNothing) {
  tensors_[0][0] = 1;
  EXPECT_EQ(Read({32, 0, 1, false}), 0);
}

TEST_F(ReadDeviceMemoryTest, SaysWhichVariantsThereAre) {
  ReadDeviceMemoryParams p = {};
  const BackendOperator<ReadDeviceMemoryParams> op = ReadDeviceMemory();
  const DeviceReadVariant others[] = {
      {128, 2, 16, false}, {256, 3, 16, false}, {512, 4, 4, true}, {256, -1, 8, true}};
  for (const DeviceReadVariant& variant : others) {
    p.variant = variant;
    EXPECT_STREQ(op.unsupported(p, kDevice),
                 "the cuda backend reads with 256 or 512 threads, 2, 4 or 8 loads of 8 or 16 "
                 "bytes");
  }
}

}  // namespace
}  // namespace select_attn::cuda
