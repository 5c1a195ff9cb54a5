// The kernels of the CUDA backend on the emulator, against what the contract says, with small
// integers, whose sums are exact: results must match whatever the order of additions. Lengths and
// table entries are hostile in half of the rounds.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <tuple>
#include <vector>

#include "cuda/backend.h"
#include "cuda/clamped_ranges.h"
#include "cuda/launch.h"
#include "kernel_calls.h"

namespace select_attn::cuda {
namespace {

constexpr DLDevice kDevice = {kDLCUDA, 0};
// The sanitizer makes the emulator several times slower.
#ifdef __SANITIZE_ADDRESS__
constexpr int kRounds = 16;
#else
constexpr int kRounds = 60;
#endif

class CudaKernelsTest : public testing::TestWithParam<DType>, protected RandomCalls {
 protected:
  Batch MakeBatch(int round) {
    emulated_device = {Random(1, 5), static_cast<unsigned>(round)};
    // A walk looks at 256 requests at once: none, one or two rounds before the last.
    const int64_t many_requests = 256 * Random(1, 2) + Random(-3, 9);
    return RandomCalls::MakeBatch({8, 80, many_requests}, round % 2 == 1);
  }
  Pool MakePool(int64_t blocks, int64_t rows, int64_t heads, int64_t dim) {
    return RandomCalls::MakePool(GetParam(), 8, blocks, rows, heads, dim);
  }

  // One workspace for all calls of a test, whatever their shapes: what one leaves behind meets the
  // counters of the next.
  void SetWorkspace(QuestBlockSelectPagedParams& p) {
    const int64_t bytes = QuestBlockSelectPaged().workspace_size(p, kDevice);
    workspace_.resize(std::max(workspace_.size(), static_cast<size_t>(bytes) / 4));
    p.workspace = workspace_.data();
    p.workspace_bytes = bytes;
  }
  bool WorkspaceIsReady() const {
    return std::all_of(workspace_.begin(), workspace_.end(),
                       [](uint32_t word) { return word == 0; });
  }

  std::vector<uint32_t> workspace_;
};

TEST_P(CudaKernelsTest, QuestPrefillMetadata) {
  for (int round = 0; round < kRounds; ++round) {
    const Batch c = MakeBatch(round);
    Pool keys = MakePool(c.kv_blocks, c.block_size, c.heads, c.dim);
    Pool max = MakePool(c.metadata_blocks, c.rows, c.heads, c.dim);
    Pool min = MakePool(c.metadata_blocks, c.rows, c.heads, c.dim);
    for (float& key : keys.values) key = Random(0, 999) == 0 ? kNaN : SmallInteger();
    std::fill(max.values.begin(), max.values.end(), 100.0f);
    std::fill(min.values.begin(), min.values.end(), -100.0f);
    for (Pool* pool : {&keys, &max, &min}) pool->Store();
    const bool update = round % 3 != 0;

    const QuestPrefillMetadataParams p = MetadataParams(c, GetParam(), update, keys, max, min);
    ASSERT_STREQ(QuestPrefillMetadata().run(p, kDevice, nullptr), nullptr);
    ExpectMetadata(c, update, keys, max, min);
    ASSERT_NO_FATAL_FAILURE(ExpectStored(max, "max, round " + std::to_string(round)));
    ASSERT_NO_FATAL_FAILURE(ExpectStored(min, "min, round " + std::to_string(round)));
  }
}

TEST_P(CudaKernelsTest, QuestBlockSelectPaged) {
  for (int round = 0; round < kRounds; ++round) {
    const Batch c = MakeBatch(round);
    const int64_t group = Random(1, 3);
    const int64_t k = Random(1, 20);
    Pool query = MakePool(c.batch, 1, c.heads * group, c.dim);
    Pool max = MakePool(c.metadata_blocks, c.rows, c.heads, c.dim);
    Pool min = MakePool(c.metadata_blocks, c.rows, c.heads, c.dim);
    // Multiples of the group size have an exact mean.
    for (float& q : query.values) {
      q = static_cast<float>(group) * std::min(SmallInteger(), 2.0f);
    }
    const bool special = round % 4 >= 2;
    const float specials[] = {kNaN, kInfinity};
    for (Pool* pool : {&max, &min}) {
      for (float& value : pool->values) {
        value = SmallInteger();
        if (special && Random(0, 300) == 0) value = specials[Random(0, 1)];
      }
    }
    for (Pool* pool : {&query, &max, &min}) pool->Store();

    std::vector<int32_t> out;
    QuestBlockSelectPagedParams p = SelectParams(c, GetParam(), group, k, query, max, min, out);
    if (round % 3 == 1) p.metadata_seq_lens = c.known.data();
    if (round % 3 == 2) p.tokens_since_metadata_update = Random(0, 2 * c.block_size);
    SetWorkspace(p);
    ASSERT_STREQ(QuestBlockSelectPaged().run(p, kDevice, nullptr), nullptr);
    ASSERT_EQ(out, ExpectedSelection(c, p, query, max, min)) << "round " << round;
    ASSERT_TRUE(WorkspaceIsReady()) << "round " << round;
  }
}

// More scores than stay in shared memory, ties that cross every boundary, k up to the limit.
TEST_P(CudaKernelsTest, SelectsFromLongRows) {
  constexpr int64_t kDim = 8;
  for (const auto& [count, k, kinds] :
       std::vector<std::tuple<int64_t, int64_t, int64_t>>{{300, 300, 2},
                                                          {4096, 16, 50},
                                                          {4097, 2048, 1},
                                                          {4097, 2048, 7},
                                                          {9000, 2048, 7},
                                                          {9000, 64, 5000}}) {
    emulated_device = {Random(1, 40), static_cast<unsigned>(count)};
    Pool rows(GetParam(), 1, count, 1, kDim, false, 0, 0);
    Pool query(GetParam(), 1, 1, 1, kDim, false, 0, 0);
    std::vector<std::pair<float, int64_t>> ranked;
    for (int64_t j = 0; j < count; ++j) {
      // Two digits, each exact in every dtype.
      const auto kind = static_cast<float>(j == count - 1 ? kinds - 1 : Random(0, kinds - 1));
      rows.At(0, j, 0, 0) = std::floor(kind / 64.0f);
      rows.At(0, j, 0, 1) = std::fmod(kind, 64.0f);
      ranked.emplace_back(-kind, j);
    }
    query.At(0, 0, 0, 0) = 64.0f;
    query.At(0, 0, 0, 1) = 1.0f;
    rows.Store();
    query.Store();
    std::sort(ranked.begin(), ranked.end());

    QuestBlockSelectPagedParams p = {};
    const int32_t table = 0;
    const auto seq_len = static_cast<int32_t>(count);
    p.batch = p.num_heads = p.num_kv_heads = p.block_size = p.num_metadata_blocks = 1;
    p.head_dim = kDim;
    p.rows_per_metadata_block = count;
    p.max_metadata_blocks_per_request = 1;
    p.k = k;
    p.tokens_since_metadata_update = -1;
    p.dtype = GetParam();
    p.query = query.data();
    std::copy_n(query.strides, 2, p.query_strides);
    p.maxblocks = p.minblocks = rows.data();
    std::copy_n(rows.strides, 3, p.maxblocks_strides);
    std::copy_n(rows.strides, 3, p.minblocks_strides);
    p.metadata_block_tables = &table;
    p.seq_lens = &seq_len;
    std::vector<int32_t> out(static_cast<size_t>(k), -77);
    p.selected_indices = out.data();
    SetWorkspace(p);
    ASSERT_STREQ(QuestBlockSelectPaged().run(p, kDevice, nullptr), nullptr);
    ASSERT_TRUE(WorkspaceIsReady());
    for (int64_t i = 0; i < k; ++i) {
      ASSERT_EQ(out[static_cast<size_t>(i)], i < count ? ranked[static_cast<size_t>(i)].second : -1)
          << "rank " << i << " of " << count;
    }
  }
}

// Rows of three tiles, all of whose blocks are listed: a key that the thread block which selects
// does not see yet is a block that is missing.
TEST_P(CudaKernelsTest, SelectsWhatOtherThreadBlocksScored) {
  constexpr int64_t kBatch = 2, kHeads = 3, kCount = 300, kDim = 8;
  const unsigned first_seed = kRounds * static_cast<unsigned>(GetParam());
  for (unsigned seed = first_seed; seed < first_seed + kRounds / 6; ++seed) {
    emulated_device = {Random(2, 18), seed};
    Pool rows(GetParam(), 1, kCount, kHeads, kDim, false, 0, 0);
    Pool query(GetParam(), kBatch, 1, kHeads, kDim, false, 0, 0);
    std::fill(rows.values.begin(), rows.values.end(), 1.0f);
    rows.Store();
    query.Store();

    QuestBlockSelectPagedParams p = {};
    const std::vector<int32_t> tables(kBatch, 0);
    const std::vector<int32_t> seq_lens(kBatch, kCount);
    p.batch = kBatch;
    p.num_heads = p.num_kv_heads = kHeads;
    p.block_size = p.num_metadata_blocks = p.max_metadata_blocks_per_request = 1;
    p.head_dim = kDim;
    p.rows_per_metadata_block = p.k = kCount;
    p.tokens_since_metadata_update = -1;
    p.dtype = GetParam();
    p.query = query.data();
    p.query_strides[0] = query.strides[0];
    p.query_strides[1] = query.strides[2];
    p.maxblocks = p.minblocks = rows.data();
    std::copy_n(rows.strides, 3, p.maxblocks_strides);
    std::copy_n(rows.strides, 3, p.minblocks_strides);
    p.metadata_block_tables = tables.data();
    p.metadata_block_tables_stride = 1;
    p.seq_lens = seq_lens.data();
    std::vector<int32_t> out(static_cast<size_t>(kBatch * kHeads * kCount), -77);
    p.selected_indices = out.data();
    p.selected_indices_strides[0] = kHeads * kCount;
    p.selected_indices_strides[1] = kCount;
    SetWorkspace(p);
    ASSERT_STREQ(QuestBlockSelectPaged().run(p, kDevice, nullptr), nullptr);
    ASSERT_TRUE(WorkspaceIsReady());
    for (size_t i = 0; i < out.size(); ++i) {  // all scores are equal
      ASSERT_EQ(out[i], static_cast<int32_t>(i % kCount)) << "seed " << seed;
    }
  }
}

// The first half of the blocks have a bad entry, and the others fewer than are wanted.
TEST_P(CudaKernelsTest, ListsNoBlockWithoutAScore) {
  constexpr int64_t kRows = 50, kDim = 8;
  for (const int64_t k : {49, 50, 51, 60, 99, 100, 101, 130}) {
    for (const bool is_tied : {true, false}) {
      emulated_device = {Random(1, 4), static_cast<unsigned>(k)};
      Pool rows(GetParam(), 1, kRows, 1, kDim, false, 0, 0);
      Pool query(GetParam(), 1, 1, 1, kDim, false, 0, 0);
      std::fill(query.values.begin(), query.values.end(), 1.0f);
      for (int64_t j = 0; j < kRows; ++j) {  // the last block is the best
        rows.At(0, j, 0, 0) = is_tied ? -1.0f : static_cast<float>(j - kRows);
      }
      rows.Store();
      query.Store();
      const int32_t tables[] = {1, 0};
      const int32_t seq_len = 2 * kRows;
      QuestBlockSelectPagedParams p = {};
      p.batch = p.num_heads = p.num_kv_heads = p.block_size = p.num_metadata_blocks = 1;
      p.head_dim = kDim;
      p.rows_per_metadata_block = kRows;
      p.max_metadata_blocks_per_request = 2;
      p.k = k;
      p.tokens_since_metadata_update = -1;
      p.dtype = GetParam();
      p.query = query.data();
      std::copy_n(query.strides, 2, p.query_strides);
      p.maxblocks = p.minblocks = rows.data();
      std::copy_n(rows.strides, 3, p.maxblocks_strides);
      std::copy_n(rows.strides, 3, p.minblocks_strides);
      p.metadata_block_tables = tables;
      p.seq_lens = &seq_len;
      std::vector<int32_t> out(static_cast<size_t>(k), -77);
      p.selected_indices = out.data();
      SetWorkspace(p);
      ASSERT_STREQ(QuestBlockSelectPaged().run(p, kDevice, nullptr), nullptr);
      for (int64_t i = 0; i < k; ++i) {
        const int64_t listed = is_tied ? kRows + i : 2 * kRows - 1 - i;
        ASSERT_EQ(out[static_cast<size_t>(i)], i < kRows ? listed : -1) << i << " of " << k;
      }
    }
  }
}

TEST(CudaLimitsTest, EveryOperatorAsksWhetherTheDeviceWillDo) {
  QuestPrefillMetadataParams prefill = {};
  QuestBlockSelectPagedParams select = {};
  SelectedBlockTablesParams tables = {};
  prefill.head_dim = select.head_dim = 64;
  select.k = tables.k = 1;
  emulated_device = {1, 0};
  EXPECT_EQ(QuestPrefillMetadata().unsupported(prefill, kDevice), nullptr);
  EXPECT_EQ(QuestBlockSelectPaged().unsupported(select, kDevice), nullptr);
  EXPECT_EQ(SelectedBlockTables().unsupported(tables, kDevice), nullptr);
  emulated_device = {1, 0, "too old"};
  EXPECT_STREQ(QuestPrefillMetadata().unsupported(prefill, kDevice), "too old");
  EXPECT_STREQ(QuestBlockSelectPaged().unsupported(select, kDevice), "too old");
  EXPECT_STREQ(SelectedBlockTables().unsupported(tables, kDevice), "too old");
  emulated_device = {};
}

INSTANTIATE_TEST_SUITE_P(DTypes, CudaKernelsTest,
                         testing::Values(DType::kFloat16, DType::kBFloat16, DType::kFloat32),
                         [](const auto& info) { return DTypeName(info.param); });

TEST(CudaSelectedBlockTablesTest, LeavesOutWhatDoesNotExist) {
  unsigned seed = 0;
  CheckSelectedBlockTables(kRounds, 2048, [&](const SelectedBlockTablesParams& p) {
    ++seed;
    emulated_device = {1 + seed % 5, seed};
    return SelectedBlockTables().run(p, kDevice, nullptr);
  });
}

}  // namespace
}  // namespace select_attn::cuda
