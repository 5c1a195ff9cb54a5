// The kernels of the CUDA backend on the emulator, against what the contract says, with small
// integers, whose sums are exact: results must match whatever the order of additions. Lengths and
// table entries are hostile in half of the rounds.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
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
  template <typename Params>
  void SetWorkspace(const BackendOperator<Params>& op, Params& p) {
    const int64_t bytes = op.workspace_size(p, kDevice);
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
    SetWorkspace(QuestBlockSelectPaged(), p);
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
    SetWorkspace(QuestBlockSelectPaged(), p);
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
    SetWorkspace(QuestBlockSelectPaged(), p);
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
      SetWorkspace(QuestBlockSelectPaged(), p);
      ASSERT_STREQ(QuestBlockSelectPaged().run(p, kDevice, nullptr), nullptr);
      for (int64_t i = 0; i < k; ++i) {
        const int64_t listed = is_tied ? kRows + i : 2 * kRows - 1 - i;
        ASSERT_EQ(out[static_cast<size_t>(i)], i < kRows ? listed : -1) << i << " of " << k;
      }
    }
  }
}

// Attention in float64, in the words of the contract, and what a call of the kernel gave.
class CudaAttentionTest : public CudaKernelsTest {
 protected:
  // Of tokens that are selected: all others are NaN.
  static void SetSelected(Pool& pool, int64_t block, int64_t token, int64_t head, int64_t dim,
                          const std::function<float()>& draw) {
    if (!std::isnan(pool.At(block, token, head, 0))) return;
    for (int64_t d = 0; d < dim; ++d) pool.At(block, token, head, d) = draw();
  }

  // Selected tokens of row (b, n), as (physical block, token in it).
  static std::vector<std::pair<int64_t, int64_t>> Tokens(const Batch& c, int64_t k, int64_t b,
                                                         const int32_t* selected) {
    std::vector<std::pair<int64_t, int64_t>> tokens;
    for (int64_t i = 0; i < k; ++i) {
      const int64_t j = selected[i];
      if (j < 0 || j >= std::min(c.Blocks(c.SeqLen(b)), c.kv_columns)) continue;
      const int64_t block = c.KvBlock(b, j);
      if (block < 0 || block >= c.kv_blocks) continue;
      for (int64_t t = 0; t < std::min(c.SeqLen(b) - j * c.block_size, c.block_size); ++t) {
        tokens.emplace_back(block, t);
      }
    }
    return tokens;
  }

  // All but what says which blocks and tokens there are.
  PagedSelectAttentionParams Params(int64_t batch, int64_t kv_heads, int64_t group, int64_t dim,
                                    double scale, Pool& query, Pool& keys, Pool& values, Pool& out,
                                    std::vector<float>& lse) {
    PagedSelectAttentionParams p = {};
    p.batch = batch;
    p.num_heads = kv_heads * group;
    p.num_kv_heads = kv_heads;
    p.head_dim = dim;
    p.scale = scale;
    p.dtype = GetParam();
    p.query = query.data();
    p.query_strides[0] = query.strides[0];
    p.query_strides[1] = query.strides[2];
    p.k_cache = keys.data();
    std::copy_n(keys.strides, 3, p.k_cache_strides);
    p.v_cache = values.data();
    std::copy_n(values.strides, 3, p.v_cache_strides);
    p.out = out.data();
    p.out_strides[0] = out.strides[0];
    p.out_strides[1] = out.strides[2];
    lse.assign(static_cast<size_t>(batch * p.num_heads), kNaN);
    p.lse = lse.data();
    p.lse_stride = p.num_heads;
    return p;
  }

  // A call with one request of one block, whose `tokens` tokens are selected.
  void AttendToOneBlock(int64_t group, int64_t tokens, int64_t dim, double scale, Pool& query,
                        Pool& keys, Pool& values, Pool& out, std::vector<float>& lse) {
    for (Pool* pool : {&query, &keys, &values}) pool->Store();
    const int32_t first = 0;
    const auto seq_len = static_cast<int32_t>(tokens);
    PagedSelectAttentionParams p = Params(1, 1, group, dim, scale, query, keys, values, out, lse);
    p.num_kv_blocks = p.max_kv_blocks_per_request = p.k = 1;
    p.block_size = tokens;
    p.block_tables = p.selected_indices = &first;
    p.seq_lens = &seq_len;
    SetWorkspace(PagedSelectAttention(), p);
    ASSERT_STREQ(PagedSelectAttention().run(p, kDevice, nullptr), nullptr);
  }

  void Run(const Batch& c, int64_t batch, int64_t group, int64_t k, double scale) {
    Pool query = MakePool(batch, 1, c.heads * group, c.dim);
    Pool keys = MakePool(c.kv_blocks, c.block_size, c.heads, c.dim);
    Pool values = MakePool(c.kv_blocks, c.block_size, c.heads, c.dim);
    Pool out = MakePool(batch, 1, c.heads * group, c.dim);
    std::vector<int32_t> selected(static_cast<size_t>(batch * c.heads * k));
    for (size_t i = 0; i < selected.size(); ++i) {
      const int64_t b = static_cast<int64_t>(i) / (c.heads * k);
      const int64_t blocks = std::min(c.Blocks(c.SeqLen(b)), c.kv_columns);
      selected[i] = static_cast<int32_t>(Random(-1, blocks));
      if (Sometimes()) selected[i] = HostileNumber();
    }
    for (float& q : query.values) q = SmallInteger();
    std::fill(keys.values.begin(), keys.values.end(), kNaN);
    std::fill(values.values.begin(), values.values.end(), kNaN);
    std::fill(out.values.begin(), out.values.end(), kNaN);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t n = 0; n < c.heads; ++n) {
        for (const auto& [block, t] : Tokens(c, k, b, &selected[At(b, c.heads, n, k)])) {
          SetSelected(keys, block, t, n, c.dim, [&] { return SmallInteger(); });
          SetSelected(values, block, t, n, c.dim, [&] { return SmallInteger(); });
        }
      }
    }
    for (Pool* pool : {&query, &keys, &values, &out}) pool->Store();

    std::vector<float> lse;
    PagedSelectAttentionParams p =
        Params(batch, c.heads, group, c.dim, scale, query, keys, values, out, lse);
    p.block_size = c.block_size;
    p.num_kv_blocks = c.kv_blocks;
    p.max_kv_blocks_per_request = c.kv_columns;
    p.k = k;
    p.block_tables = c.block_tables.data();
    p.block_tables_stride = c.kv_columns;
    p.seq_lens = c.seq_lens.data();
    p.selected_indices = selected.data();
    p.selected_indices_strides[0] = c.heads * k;
    p.selected_indices_strides[1] = k;
    SetWorkspace(PagedSelectAttention(), p);
    ASSERT_STREQ(PagedSelectAttention().run(p, kDevice, nullptr), nullptr);
    ASSERT_TRUE(WorkspaceIsReady());

    const double rounding = p.dtype == DType::kFloat32   ? 0x1p-20
                            : p.dtype == DType::kFloat16 ? 0x1p-11
                                                         : 0x1p-8;
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t h = 0; h < p.num_heads; ++h) {
        const int64_t n = h / group;
        const auto tokens = Tokens(c, k, b, &selected[At(b, c.heads, n, k)]);
        std::vector<double> logits;
        for (const auto& [block, t] : tokens) {
          double dot = 0.0;
          for (int64_t d = 0; d < c.dim; ++d) {
            dot += double{query.At(b, 0, h, d)} * double{keys.At(block, t, n, d)};
          }
          logits.push_back(scale * dot);
        }
        const double maximum =
            logits.empty() ? 0.0 : *std::max_element(logits.begin(), logits.end());
        double weights = 0.0;
        for (const double logit : logits) weights += std::exp(logit - maximum);
        const double expected_lse = std::log(weights) + maximum;
        const float got_lse = lse[static_cast<size_t>(b * p.num_heads + h)];
        if (logits.empty()) {
          ASSERT_EQ(got_lse, -kInfinity);
        } else {
          ASSERT_NEAR(got_lse, expected_lse, 1e-5 * std::max(1.0, std::abs(expected_lse)));
        }
        for (int64_t d = 0; d < c.dim; ++d) {
          double expected = 0.0;
          for (size_t i = 0; i < tokens.size(); ++i) {
            const double value = values.At(tokens[i].first, tokens[i].second, n, d);
            expected += std::exp(logits[i] - maximum) / weights * value;
          }
          const float got = out.tensor.Get(out.Index(b, 0, h, d));
          ASSERT_NEAR(got, expected, rounding * std::abs(expected) + 1e-4)
              << "request " << b << ", head " << h << ", channel " << d << ", tokens "
              << tokens.size();
        }
      }
    }
  }

 private:
  static size_t At(int64_t b, int64_t heads, int64_t n, int64_t k) {
    return static_cast<size_t>((b * heads + n) * k);
  }
};

TEST_P(CudaAttentionTest, PagedSelectAttention) {
  for (int round = 0; round < kRounds / 8; ++round) {  // its threads talk a lot
    SCOPED_TRACE(round);
    const Batch c = MakeBatch(round);
    const double scales[] = {0.001, 0.05, -0.02, 1.0, 0.0};
    Run(c, std::min<int64_t>(c.batch, 3), Sometimes() ? Random(9, 17) : Random(1, 8), Random(1, 20),
        scales[Random(0, 4)]);
    if (HasFatalFailure()) return;
  }
}

// More tokens than chunks of the smallest size.
TEST_P(CudaAttentionTest, AttendsToLongSelections) {
  Batch c = MakeBatch(0);
  c.heads = 1;
  c.dim = 8;
  c.block_size = 64;
  c.kv_columns = c.kv_blocks = 200;
  c.seq_lens.assign(1, 200 * 64 - 1);
  c.block_tables = Table(200, 200, false);
  Run(c, 1, 1, 131, 0.05);
}

// Rows that begin at any address are summed up in the order in which aligned ones are.
TEST_P(CudaAttentionTest, HasTheSameBitsWhateverTheAlignment) {
  constexpr int64_t kTokens = 300, kGroup = 3;
  for (const int64_t dim : {8, 72, 256}) {
    std::vector<float> numbers(static_cast<size_t>((kGroup + 2 * kTokens) * dim));
    for (float& number : numbers) number = SmallInteger();
    std::vector<std::vector<float>> results;
    for (const int64_t gap : {0, 1}) {
      Pool query(GetParam(), 1, 1, kGroup, dim, false, gap, gap);
      Pool keys(GetParam(), 1, kTokens, 1, dim, false, gap, gap);
      Pool values(GetParam(), 1, kTokens, 1, dim, false, gap, gap);
      size_t next = 0;
      for (int64_t d = 0; d < dim; ++d) {
        for (int64_t h = 0; h < kGroup; ++h) query.At(0, 0, h, d) = numbers[next++];
        for (int64_t t = 0; t < kTokens; ++t) {
          keys.At(0, t, 0, d) = numbers[next++];
          values.At(0, t, 0, d) = numbers[next++];
        }
      }
      Pool out(GetParam(), 1, 1, kGroup, dim);
      std::vector<float> result;
      AttendToOneBlock(kGroup, kTokens, dim, 0.001, query, keys, values, out, result);
      for (int64_t i = 0; i < kGroup * dim; ++i) result.push_back(out.tensor.Get(i));
      results.push_back(result);
    }
    ASSERT_EQ(results[0], results[1]) << dim;
  }
}

// The rules for logits that are no finite numbers, over one token or several chunks of them.
TEST_P(CudaAttentionTest, SpecialLogits) {
  for (const int64_t tokens : {1, 2, 300}) {
    for (const auto& [key, value, expected, expected_lse] :
         std::vector<std::tuple<float, float, float, float>>{
             {kNaN, 1.0f, kNaN, kNaN},
             {kInfinity, 1.0f, kNaN, kNaN},
             {-kInfinity, 1.0f, tokens == 1 ? kNaN : 2.0f, -kInfinity},
             {-kInfinity, kInfinity, kNaN, -kInfinity},
             {1.0f, kInfinity, kInfinity, 0.0f},
             {1.0f, kNaN, kNaN, 0.0f}}) {
      Pool query(GetParam(), 1, 1, 1, 8, false, 0, 0);
      Pool keys(GetParam(), 1, tokens, 1, 8, false, 0, 0);
      Pool values(GetParam(), 1, tokens, 1, 8, false, 0, 0);
      query.At(0, 0, 0, 0) = 1.0f;
      for (int64_t t = 0; t < tokens; ++t) values.At(0, t, 0, 0) = 2.0f;
      keys.At(0, tokens - 1, 0, 0) = key;
      values.At(0, tokens - 1, 0, 0) = value;
      Pool out(GetParam(), 1, 1, 1, 8);
      std::vector<float> lse;
      AttendToOneBlock(1, tokens, 8, 1.0, query, keys, values, out, lse);
      const float got = out.tensor.Get(0);
      ASSERT_TRUE(got == expected || (std::isnan(got) && std::isnan(expected)))
          << got << " for " << expected << ", key " << key << ", " << tokens << " tokens";
      ASSERT_EQ(std::isnan(lse[0]), std::isnan(expected_lse)) << lse[0];
      if (tokens == 1 && key == -kInfinity) {
        ASSERT_EQ(lse[0], -kInfinity);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, CudaAttentionTest,
                         testing::Values(DType::kFloat16, DType::kBFloat16, DType::kFloat32));

TEST(CudaLimitsTest, EveryOperatorAsksWhetherTheDeviceWillDo) {
  QuestPrefillMetadataParams prefill = {};
  QuestBlockSelectPagedParams select = {};
  SelectedBlockTablesParams tables = {};
  PagedSelectAttentionParams attend = {};
  prefill.head_dim = select.head_dim = attend.head_dim = 64;
  select.k = tables.k = attend.k = 1;
  emulated_device = {1, 0};
  EXPECT_EQ(QuestPrefillMetadata().unsupported(prefill, kDevice), nullptr);
  EXPECT_EQ(QuestBlockSelectPaged().unsupported(select, kDevice), nullptr);
  EXPECT_EQ(SelectedBlockTables().unsupported(tables, kDevice), nullptr);
  EXPECT_EQ(PagedSelectAttention().unsupported(attend, kDevice), nullptr);
  emulated_device = {1, 0, "too old"};
  EXPECT_STREQ(QuestPrefillMetadata().unsupported(prefill, kDevice), "too old");
  EXPECT_STREQ(QuestBlockSelectPaged().unsupported(select, kDevice), "too old");
  EXPECT_STREQ(SelectedBlockTables().unsupported(tables, kDevice), "too old");
  EXPECT_STREQ(PagedSelectAttention().unsupported(attend, kDevice), "too old");
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
