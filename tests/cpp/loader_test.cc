// Backends in shared objects of their own, with fakes beside this test.

#include <gtest/gtest.h>

#include "core/backend.h"
#include "select_attn_ops/runtime.h"
#include "test_tensor.h"

namespace select_attn {
namespace {

constexpr DLDevice kNpu = {kDLExtDev, 1};
constexpr DLDevice kGpu = {kDLCUDA, 0};
void* const kStream = reinterpret_cast<void*>(uintptr_t{42});

class LoaderTest : public testing::Test {
 protected:
  std::string Select(DLDevice device, int64_t k, int64_t head_dim, int64_t workspace_bytes) {
    TestTensor query(TypeOf(DType::kFloat16), {1, 2, head_dim});
    TestTensor blocks(TypeOf(DType::kFloat16), {1, 16, 1, head_dim});
    TestTensor table(kInt32, {1, 1}, 0xFF);  // a device's values are not looked at
    TestTensor seq_lens(kInt32, {1}, 0xFF);
    TestTensor out(kInt32, {1, 1, k});
    TestTensor workspace({kDLUInt, 8, 1}, {workspace_bytes});
    const DLTensor workspace_view = workspace.View(device);
    QuestBlockSelectPagedOptions options;
    options.workspace = &workspace_view;
    try {
      QuestBlockSelectPaged(query.View(device), blocks.View(device), blocks.View(device),
                            table.View(device), seq_lens.View(device), out.View(device), options,
                            kStream);
      return "";
    } catch (const Error& error) {
      return std::string(error.KindName()) + ": " + error.what();
    }
  }
};

TEST_F(LoaderTest, CallsTheBackend) { EXPECT_EQ(Select(kNpu, 2, 8, 100), ""); }

TEST_F(LoaderTest, ReportsItsLimits) {
  EXPECT_EQ(Select(kNpu, 2, 9, 100),
            "NotImplementedError: quest_block_select_paged: head_dim must be at most 8 on this "
            "device");
}

TEST_F(LoaderTest, ReportsItsFailure) {
  EXPECT_EQ(Select(kNpu, 3, 8, 100),
            "RuntimeError: quest_block_select_paged: error 507: the chip is on fire");
}

TEST_F(LoaderTest, WantsTheWorkspaceItNeeds) {
  EXPECT_EQ(Select(kNpu, 2, 8, 99), "ValueError: workspace must have at least 100 bytes, got 99");
}

TEST_F(LoaderTest, NamesOperatorAndDeviceWhereTheBackendLacksIt) {
  TestTensor lens(kInt32, {1});
  TestTensor tables(kInt32, {1, 1});
  TestTensor selected(kInt32, {1, 1, 1});
  TestTensor out(kInt32, {1, 1, 1});
  TestTensor lens_out(kInt32, {1, 1});
  try {
    SelectedBlockTables(selected.View(kNpu), tables.View(kNpu), lens.View(kNpu), 16, out.View(kNpu),
                        lens_out.View(kNpu));
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kNotImplementedError);
    EXPECT_STREQ(error.what(), "selected_block_tables is not implemented on npu:1");
  }
}

TEST_F(LoaderTest, HasAttentionOnTheCpuOnly) {
  TestTensor query({kDLFloat, 16, 1}, {1, 1, 1});
  TestTensor cache({kDLFloat, 16, 1}, {1, 1, 1, 1});
  TestTensor lens(kInt32, {1});
  TestTensor tables(kInt32, {1, 1});
  TestTensor selected(kInt32, {1, 1, 1});
  TestTensor out({kDLFloat, 16, 1}, {1, 1, 1});
  try {
    PagedSelectAttention(query.View(kNpu), cache.View(kNpu), cache.View(kNpu), tables.View(kNpu),
                         lens.View(kNpu), selected.View(kNpu), out.View(kNpu));
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kNotImplementedError);
    EXPECT_STREQ(error.what(), "paged_select_attention is not implemented on npu:1");
  }
}

TEST_F(LoaderTest, RefusesATableOfAnotherVersion) {
  const std::string text = Select(kGpu, 2, 8, 100);
  EXPECT_EQ(text.find("NotImplementedError: quest_block_select_paged is not available on cuda:0"),
            0u);
  EXPECT_NE(text.find("has version 4 of the backend table, not 3"), std::string::npos);
}

TEST_F(LoaderTest, KnowsNoOtherDevices) {
  EXPECT_EQ(
      Select({kDLMetal, 0}, 2, 8, 100),
      "NotImplementedError: quest_block_select_paged is not implemented on DLPack device type "
      "8:0");
}

TEST_F(LoaderTest, ListsBackends) {
  const std::vector<BackendInfo> backends = Backends();
  ASSERT_EQ(backends.size(), 3u);
  EXPECT_EQ(backends[0].name, "cpu");
  EXPECT_TRUE(backends[0].available);
  EXPECT_EQ(backends[1].name, "cuda");
  EXPECT_FALSE(backends[1].available);
  EXPECT_EQ(backends[2].name, "ascend");
  EXPECT_TRUE(backends[2].available);
  EXPECT_EQ(backends[2].description, "a fake");
}

}  // namespace
}  // namespace select_attn
