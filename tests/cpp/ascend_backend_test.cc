// The host side of the Ascend backend, on a runtime that says what a test wants, and launches that
// only note what they are given.

#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "ascend/backend.h"
#include "ascend/device.h"
#include "ascend/launch.h"
#include "fake_acl.h"

extern "C" const select_attn::BackendTable* select_attn_ops_backend(const char** why);

namespace select_attn::ascend {
namespace {

struct Launched {
  std::string kernel;
  uint32_t num_cores;
  Stream stream;
};

std::vector<Launched> launched;
QuestBlockSelectPagedArguments select_arguments;

DLDevice Device(int32_t id) { return {kDLExtDev, id}; }

}  // namespace

void LaunchQuestPrefillMetadata(const QuestPrefillMetadataArguments& /*arguments*/, DType /*dtype*/,
                                uint32_t num_cores, Stream stream) {
  launched.push_back({"prefill", num_cores, stream});
}

void LaunchQuestBlockSelectPaged(const QuestBlockSelectPagedArguments& arguments, DType /*dtype*/,
                                 uint32_t num_cores, Stream stream) {
  select_arguments = arguments;
  launched.push_back({"select", num_cores, stream});
}

void LaunchQuestBlockSelectMerge(const QuestBlockSelectPagedArguments& /*arguments*/,
                                 uint32_t num_cores, Stream stream) {
  launched.push_back({"merge", num_cores, stream});
}

void LaunchSelectedBlockTables(const SelectedBlockTablesArguments& /*arguments*/,
                               uint32_t num_cores, Stream stream) {
  launched.push_back({"tables", num_cores, stream});
}

namespace {

// A device's number of cores is asked for once, so tests that want their own take their own device.
enum : int32_t { kUsual, kOther, kFailing, kSingleCore, kAskedTwice };

class AscendBackendTest : public testing::Test {
 protected:
  void SetUp() override {
    fake_acl = FakeAcl();
    launched.clear();
  }

  std::string WhyNot() {
    const char* why = nullptr;
    return select_attn_ops_backend(&why) == nullptr ? why : "";
  }

  QuestBlockSelectPagedParams SelectParams(int64_t batch) {
    QuestBlockSelectPagedParams p = {};
    p.batch = batch;
    p.num_heads = p.num_kv_heads = 2;
    p.head_dim = 64;
    p.block_size = p.rows_per_metadata_block = 16;
    p.k = 3;
    p.dtype = DType::kFloat16;
    return p;
  }
};

TEST_F(AscendBackendTest, SaysWhatItIs) {
  const char* why = nullptr;
  const BackendTable* table = select_attn_ops_backend(&why);
  ASSERT_NE(table, nullptr) << why;
  EXPECT_EQ(table->version, BackendTable::kVersion);
  EXPECT_STREQ(table->description(), "Ascend910B4 (40 vector cores), 2 devices");
  fake_acl.num_devices = 1;
  EXPECT_STREQ(table->description(), "Ascend910B4 (40 vector cores), 1 device");
}

TEST_F(AscendBackendTest, TakesARuntimeThatSomebodyInitialised) {
  fake_acl.init_error = ACL_ERROR_REPEAT_INITIALIZE;
  EXPECT_EQ(WhyNot(), "");
}

TEST_F(AscendBackendTest, SaysWhyNot) {
  fake_acl.init_error = 500000;
  EXPECT_EQ(WhyNot(),
            "aclInit failed with error 500000; is there an NPU driver, and is CANN's set_env.sh "
            "sourced?");
  fake_acl = FakeAcl();
  fake_acl.count_error = 507033;
  EXPECT_EQ(WhyNot(), "aclrtGetDeviceCount failed with error 507033");
  fake_acl = FakeAcl();
  fake_acl.num_devices = 0;
  EXPECT_EQ(WhyNot(), "there is no NPU");
  fake_acl = FakeAcl();
  fake_acl.soc = "Ascend310P3";
  EXPECT_EQ(WhyNot(), "the kernels are for Ascend910B1 to Ascend910B4, and this is Ascend310P3");
  fake_acl.soc = nullptr;
  EXPECT_EQ(WhyNot(),
            "the kernels are for Ascend910B1 to Ascend910B4, and this is an unknown chip");
}

TEST_F(AscendBackendTest, AsksForTheCoresOfADeviceOnce) {
  EXPECT_EQ(NumVectorCores(Device(kAskedTwice)), 40);
  EXPECT_EQ(NumVectorCores(Device(kAskedTwice)), 40);
  EXPECT_EQ(fake_acl.num_capability_calls, 1);
  fake_acl.capability_error = 1;
  EXPECT_EQ(NumVectorCores(Device(kFailing)), 0);
  fake_acl = FakeAcl();
  fake_acl.vector_cores = -1;
  EXPECT_EQ(NumVectorCores(Device(kFailing)), 0);
  // More devices than are remembered.
  fake_acl.vector_cores = 48;
  EXPECT_EQ(NumVectorCores(Device(1000)), 48);
}

TEST_F(AscendBackendTest, LeavesTheCurrentDeviceAsItWas) {
  int32_t during = -1;
  const auto launch = [&] { during = fake_acl.current; };
  fake_acl.current = kUsual;
  EXPECT_EQ(RunOn(Device(kOther), launch), nullptr);
  EXPECT_EQ(during, kOther);
  EXPECT_EQ(fake_acl.current, kUsual);
  EXPECT_EQ(fake_acl.set_devices, (std::vector<int32_t>{kOther, kUsual}));

  fake_acl = FakeAcl();
  fake_acl.current = kOther;
  EXPECT_EQ(RunOn(Device(kOther), launch), nullptr);
  EXPECT_TRUE(fake_acl.set_devices.empty());

  // A thread that has used none keeps the one that the call needs.
  fake_acl = FakeAcl();
  EXPECT_EQ(RunOn(Device(kOther), launch), nullptr);
  EXPECT_EQ(fake_acl.set_devices, std::vector<int32_t>{kOther});
}

TEST_F(AscendBackendTest, ReportsWhatFails) {
  fake_acl.message = "the chip is on fire";
  EXPECT_STREQ(RunOn(Device(kUsual), [] { fake_acl.last_error = 507015; }),
               "the launch failed with error 507015: the chip is on fire");
  fake_acl.message = nullptr;
  EXPECT_STREQ(RunOn(Device(kUsual), [] { fake_acl.last_error = 507015; }),
               "the launch failed with error 507015");
  bool ran = false;
  fake_acl.set_device_error = 107001;
  EXPECT_STREQ(RunOn(Device(kOther), [&] { ran = true; }),
               "aclrtSetDevice failed with error 107001");
  EXPECT_FALSE(ran);
}

TEST_F(AscendBackendTest, ReportsNoErrorOfAnEarlierCall) {
  fake_acl.last_error = 507015;
  EXPECT_EQ(RunOn(Device(kUsual), [] {}), nullptr);
}

TEST_F(AscendBackendTest, SelectsInTwoLaunchesOnTheStream) {
  QuestBlockSelectPagedParams p = SelectParams(1);
  int stream = 0;
  ASSERT_EQ(QuestBlockSelectPaged().run(p, Device(kUsual), &stream), nullptr);
  ASSERT_EQ(launched.size(), 2u);
  EXPECT_EQ(launched[0].kernel, "select");
  EXPECT_EQ(launched[1].kernel, "merge");
  for (const Launched& launch : launched) {
    EXPECT_EQ(launch.num_cores, 40u);
    EXPECT_EQ(launch.stream, &stream);
  }
  // One core cuts nothing.
  launched.clear();
  fake_acl.vector_cores = 1;
  ASSERT_EQ(QuestBlockSelectPaged().run(p, Device(kSingleCore), &stream), nullptr);
  EXPECT_EQ(launched.size(), 1u);
}

TEST_F(AscendBackendTest, AlignsTheWorkspaceInsideIt) {
  QuestBlockSelectPagedParams p = SelectParams(1);
  const int64_t bytes = QuestBlockSelectPaged().workspace_size(p, Device(kUsual));
  std::vector<uint8_t> memory(static_cast<size_t>(bytes) + 32);
  for (size_t offset = 0; offset < 32; ++offset) {
    p.workspace = memory.data() + offset;
    p.workspace_bytes = bytes;
    ASSERT_EQ(QuestBlockSelectPaged().run(p, Device(kUsual), nullptr), nullptr);
    const auto begin = reinterpret_cast<uintptr_t>(p.workspace);
    EXPECT_EQ(select_arguments.workspace % 32, 0u);
    EXPECT_EQ(select_arguments.partial_list_bytes % 32, 0);
    EXPECT_GE(select_arguments.workspace, begin);
    EXPECT_LE(select_arguments.workspace +
                  static_cast<uint64_t>(40 * kPartialLists * select_arguments.partial_list_bytes),
              begin + static_cast<uint64_t>(bytes));
  }
}

TEST_F(AscendBackendTest, EmptyBatchesLaunchNothing) {
  EXPECT_EQ(QuestPrefillMetadata().run({}, Device(kUsual), nullptr), nullptr);
  EXPECT_EQ(QuestBlockSelectPaged().run(SelectParams(0), Device(kUsual), nullptr), nullptr);
  EXPECT_EQ(SelectedBlockTables().run({}, Device(kUsual), nullptr), nullptr);
  EXPECT_TRUE(launched.empty());
}

TEST_F(AscendBackendTest, NeedsTheNumberOfCores) {
  fake_acl.vector_cores = 0;
  constexpr const char* kText = "the device does not say how many vector cores it has";
  EXPECT_STREQ(QuestBlockSelectPaged().run(SelectParams(1), Device(kFailing), nullptr), kText);
  QuestPrefillMetadataParams metadata = {};
  metadata.batch = 1;
  EXPECT_STREQ(QuestPrefillMetadata().run(metadata, Device(kFailing), nullptr), kText);
  SelectedBlockTablesParams tables = {};
  tables.batch = 1;
  EXPECT_STREQ(SelectedBlockTables().run(tables, Device(kFailing), nullptr), kText);
  EXPECT_TRUE(launched.empty());
}

}  // namespace
}  // namespace select_attn::ascend
