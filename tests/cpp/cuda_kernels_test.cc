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
#include "test_tensor.h"

namespace select_attn::cuda {
namespace {

constexpr DLDevice kDevice = {kDLCUDA, 0};
// The sanitizer makes the emulator several times slower.
#ifdef __SANITIZE_ADDRESS__
constexpr int kRounds = 16;
#else
constexpr int kRounds = 60;
#endif
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Rows of head_dim elements, [blocks, rows, heads], in one of the layouts of paged caches.
struct Pool {
  Pool(DType dtype, int64_t num_blocks, int64_t num_rows, int64_t num_heads, int64_t head_dim,
       bool heads_outside, int64_t gap, int64_t first)
      : blocks(num_blocks),
        rows(num_rows),
        heads(num_heads),
        dim(head_dim),
        offset(first),
        tensor(TypeOf(dtype), {first + num_blocks * num_rows * num_heads * (head_dim + gap)}) {
    const int64_t row = head_dim + gap;
    strides[0] = num_rows * num_heads * row;
    strides[1] = heads_outside ? row : num_heads * row;
    strides[2] = heads_outside ? num_rows * row : row;
    values.resize(static_cast<size_t>(tensor.shape()[0]));
  }

  size_t Index(int64_t block, int64_t row, int64_t head, int64_t d) const {
    return static_cast<size_t>(offset + block * strides[0] + row * strides[1] + head * strides[2] +
                               d);
  }
  float& At(int64_t block, int64_t row, int64_t head, int64_t d) {
    return values[Index(block, row, head, d)];
  }
  // Copies the values into memory.
  void Store() {
    for (size_t i = 0; i < values.size(); ++i) tensor.Set(static_cast<int64_t>(i), values[i]);
  }
  void* data(DType dtype) {
    return tensor.data<char>() + offset * (dtype == DType::kFloat32 ? 4 : 2);
  }

  int64_t blocks, rows, heads, dim, offset;
  int64_t strides[3];
  TestTensor tensor;
  std::vector<float> values;
};

class CudaKernelsTest : public testing::TestWithParam<DType> {
 protected:
  int64_t Random(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_);
  }
  bool Sometimes() { return Random(0, 9) == 0; }

  // Non-zero, so that no sign of a zero is in doubt.
  float SmallInteger() {
    const auto value = static_cast<float>(Random(1, 9));
    return Random(0, 1) == 0 ? value : -value;
  }

  // Unless hostile, entries are blocks of the pool, each at most once.
  std::vector<int32_t> Table(int64_t count, int64_t pool, bool hostile) {
    std::vector<int32_t> entries(static_cast<size_t>(std::max(count, pool)));
    std::iota(entries.begin(), entries.end(), 0);
    std::shuffle(entries.begin(), entries.begin() + pool, random_);
    entries.resize(static_cast<size_t>(count));
    if (hostile) {
      for (int32_t& entry : entries) {
        if (Sometimes()) entry = Random(0, 1) == 0 ? static_cast<int32_t>(pool) : HostileNumber();
      }
    }
    return entries;
  }
  int32_t HostileNumber() {
    const int32_t numbers[] = {-1, -7, INT32_MIN, INT32_MAX, 1 << 20};
    return numbers[Random(0, 4)];
  }

  Pool MakePool(int64_t blocks, int64_t rows, int64_t heads, int64_t dim) {
    const bool aligned = Random(0, 1) == 0;
    return {GetParam(),
            blocks,
            rows,
            heads,
            dim,
            Random(0, 1) == 1,
            aligned ? 8 * Random(0, 2) : Random(1, 9),
            aligned ? 0 : Random(0, 3)};
  }

  struct Batch {
    bool hostile;
    int64_t batch, heads, dim, block_size, rows;
    int64_t kv_columns, metadata_columns;
    int64_t kv_blocks, metadata_blocks;
    std::vector<int32_t> seq_lens, known;
    std::vector<int32_t> block_tables, metadata_tables;
  };

  Batch MakeBatch(int round) {
    emulated_device = {Random(1, 5), static_cast<unsigned>(round)};
    Batch c;
    c.hostile = round % 2 == 1;
    // A walk looks at 256 requests at once: none, one or two rounds before the last.
    c.batch = Sometimes() ? 256 * Random(1, 2) + Random(-3, 9) : Random(1, 4);
    c.heads = Random(1, 3);
    c.dim = 8 * (Sometimes() ? Random(17, 32) : Random(1, 16));
    c.block_size = Random(0, 3) == 0 ? Random(20, 80) : Random(1, 9);
    c.rows = Random(0, 1) == 0 ? c.block_size : Random(1, 7);
    const int64_t most_blocks = c.batch > 4 ? 2 : Random(1, 2000 / c.dim);
    for (int64_t b = 0; b < c.batch; ++b) {
      c.seq_lens.push_back(static_cast<int32_t>(Random(0, most_blocks * c.block_size)));
      c.known.push_back(static_cast<int32_t>(Random(0, c.seq_lens.back())));
      if (c.hostile && Sometimes()) c.seq_lens.back() = HostileNumber();
      if (c.hostile && Sometimes()) c.known.back() = HostileNumber();
    }
    c.kv_columns = most_blocks + Random(0, 2);
    c.metadata_columns = (most_blocks - 1) / c.rows + 1 + (c.hostile ? -Random(0, 1) : 0);
    c.kv_blocks = c.batch * c.kv_columns;
    c.metadata_blocks = c.batch * std::max<int64_t>(c.metadata_columns, 1);
    c.block_tables = Table(c.batch * c.kv_columns, c.kv_blocks, c.hostile);
    c.metadata_tables = Table(c.batch * c.metadata_columns, c.metadata_blocks, c.hostile);
    return c;
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

  // In the words of the contract, for a device, which clamps.
  static int64_t SeqLen(const Batch& c, int64_t b) {
    return std::max<int64_t>(c.seq_lens[static_cast<size_t>(b)], 0);
  }
  static int64_t Known(const Batch& c, int64_t b) {
    return std::clamp<int64_t>(c.known[static_cast<size_t>(b)], 0, SeqLen(c, b));
  }
  static int64_t Blocks(const Batch& c, int64_t tokens) {
    return (tokens + c.block_size - 1) / c.block_size;
  }

  std::mt19937 random_{11};
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

    QuestPrefillMetadataParams p = {};
    p.batch = c.batch;
    p.num_kv_heads = c.heads;
    p.head_dim = c.dim;
    p.block_size = c.block_size;
    p.rows_per_metadata_block = c.rows;
    p.num_kv_blocks = c.kv_blocks;
    p.num_metadata_blocks = c.metadata_blocks;
    p.max_kv_blocks_per_request = c.kv_columns;
    p.max_metadata_blocks_per_request = c.metadata_columns;
    p.dtype = GetParam();
    p.k_cache = keys.data(p.dtype);
    std::copy_n(keys.strides, 3, p.k_cache_strides);
    p.block_tables = c.block_tables.data();
    p.block_tables_stride = c.kv_columns;
    p.seq_lens = c.seq_lens.data();
    p.metadata_seq_lens = update ? c.known.data() : nullptr;
    p.metadata_block_tables = c.metadata_tables.data();
    p.metadata_block_tables_stride = c.metadata_columns;
    p.maxblocks = max.data(p.dtype);
    std::copy_n(max.strides, 3, p.maxblocks_strides);
    p.minblocks = min.data(p.dtype);
    std::copy_n(min.strides, 3, p.minblocks_strides);
    ASSERT_STREQ(QuestPrefillMetadata().run(p, kDevice, nullptr), nullptr);

    for (int64_t b = 0; b < c.batch; ++b) {
      const int64_t begin = update ? Known(c, b) / c.block_size : 0;
      const int64_t end =
          std::min({Blocks(c, SeqLen(c, b)), c.kv_columns, c.metadata_columns * c.rows});
      for (int64_t j = begin; begin < end && (j < end || j % c.rows != 0); ++j) {
        // Behind the last block only rows of a metadata block whose row 0 was written.
        if (j >= end && j - j % c.rows < begin) continue;
        const int64_t row_block =
            c.metadata_tables[static_cast<size_t>(b * c.metadata_columns + j / c.rows)];
        if (row_block < 0 || row_block >= c.metadata_blocks) continue;
        for (int64_t n = 0; n < c.heads; ++n) {
          for (int64_t d = 0; d < c.dim; ++d) {
            float highest = 0.0f;
            float lowest = 0.0f;
            const int64_t kv_block =
                j < end ? c.block_tables[static_cast<size_t>(b * c.kv_columns + j)] : -1;
            if (kv_block >= 0 && kv_block < c.kv_blocks) {
              highest = -kInfinity;
              lowest = kInfinity;
              const int64_t tokens = std::min(SeqLen(c, b) - j * c.block_size, c.block_size);
              for (int64_t t = 0; t < tokens; ++t) {
                const float key = keys.At(kv_block, t, n, d);
                if (std::isnan(key) || std::isnan(highest)) {
                  highest = lowest = kNaN;
                } else {
                  highest = std::max(highest, key);
                  lowest = std::min(lowest, key);
                }
              }
            }
            max.At(row_block, j % c.rows, n, d) = highest;
            min.At(row_block, j % c.rows, n, d) = lowest;
          }
        }
      }
    }
    for (Pool* pool : {&max, &min}) {
      for (size_t i = 0; i < pool->values.size(); ++i) {
        const float got = pool->tensor.Get(static_cast<int64_t>(i));
        const float expected = pool->values[i];
        ASSERT_TRUE(got == expected || (std::isnan(got) && std::isnan(expected)))
            << "round " << round << ", element " << i << ": " << got << " for " << expected;
      }
    }
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

    QuestBlockSelectPagedParams p = {};
    p.batch = c.batch;
    p.num_heads = c.heads * group;
    p.num_kv_heads = c.heads;
    p.head_dim = c.dim;
    p.block_size = c.block_size;
    p.rows_per_metadata_block = c.rows;
    p.num_metadata_blocks = c.metadata_blocks;
    p.max_metadata_blocks_per_request = c.metadata_columns;
    p.k = k;
    p.tokens_since_metadata_update = round % 3 == 0 ? -1 : Random(0, 2 * c.block_size);
    p.dtype = GetParam();
    p.query = query.data(p.dtype);
    p.query_strides[0] = query.strides[0];
    p.query_strides[1] = query.strides[2];
    p.maxblocks = max.data(p.dtype);
    std::copy_n(max.strides, 3, p.maxblocks_strides);
    p.minblocks = min.data(p.dtype);
    std::copy_n(min.strides, 3, p.minblocks_strides);
    p.metadata_block_tables = c.metadata_tables.data();
    p.metadata_block_tables_stride = c.metadata_columns;
    p.seq_lens = c.seq_lens.data();
    if (round % 3 == 1) {
      p.tokens_since_metadata_update = -1;
      p.metadata_seq_lens = c.known.data();
    }
    std::vector<int32_t> out(static_cast<size_t>(c.batch * c.heads * k), -77);
    p.selected_indices = out.data();
    p.selected_indices_strides[0] = c.heads * k;
    p.selected_indices_strides[1] = k;
    SetWorkspace(p);

    std::vector<int32_t> expected;
    for (int64_t b = 0; b < c.batch; ++b) {
      const int64_t num_blocks = Blocks(c, SeqLen(c, b));
      int64_t window = num_blocks;
      const bool forces = p.metadata_seq_lens != nullptr || p.tokens_since_metadata_update >= 0;
      if (p.metadata_seq_lens != nullptr) {
        window = std::min(Known(c, b) / c.block_size, num_blocks);
      } else if (forces) {
        window = std::min(
            std::max<int64_t>(SeqLen(c, b) - p.tokens_since_metadata_update, 0) / c.block_size,
            num_blocks);
      }
      for (int64_t n = 0; n < c.heads; ++n) {
        std::vector<std::tuple<int, float, int64_t>> ranked;  // class, score, minus the number
        // Hostile lengths make windows of 2^31 blocks, of which k are the most that count.
        for (int64_t j = std::max(window, num_blocks - k); j < num_blocks; ++j) {
          ranked.emplace_back(3, 0.0f, j);
        }
        for (int64_t j = 0; j < window; ++j) {
          if (forces && j == 0) {
            ranked.emplace_back(2, 0.0f, 0);
            continue;
          }
          if (j >= c.metadata_columns * c.rows) break;
          const int64_t row_block =
              c.metadata_tables[static_cast<size_t>(b * c.metadata_columns + j / c.rows)];
          if (row_block < 0 || row_block >= c.metadata_blocks) continue;
          float score = 0.0f;
          for (int64_t d = 0; d < c.dim; ++d) {
            float q = 0.0f;
            for (int64_t h = 0; h < group; ++h) q += query.At(b, 0, n * group + h, d);
            q /= static_cast<float>(group);
            const float by_max = q * max.At(row_block, j % c.rows, n, d);
            const float by_min = q * min.At(row_block, j % c.rows, n, d);
            score += std::isnan(by_max) || std::isnan(by_min) ? kNaN : std::max(by_max, by_min);
          }
          const bool is_nan = std::isnan(score);
          ranked.emplace_back(is_nan ? 1 : 0, is_nan ? 0.0f : score, -j);
        }
        std::sort(ranked.rbegin(), ranked.rend());
        for (int64_t i = 0; i < k; ++i) {
          if (i >= static_cast<int64_t>(ranked.size())) {
            expected.push_back(-1);
          } else {
            expected.push_back(
                static_cast<int32_t>(std::abs(std::get<2>(ranked[static_cast<size_t>(i)]))));
          }
        }
      }
    }
    ASSERT_STREQ(QuestBlockSelectPaged().run(p, kDevice, nullptr), nullptr);
    ASSERT_EQ(out, expected) << "round " << round;
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
    p.query = query.data(p.dtype);
    std::copy_n(query.strides, 2, p.query_strides);
    p.maxblocks = p.minblocks = rows.data(p.dtype);
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
    p.query = query.data(p.dtype);
    p.query_strides[0] = query.strides[0];
    p.query_strides[1] = query.strides[2];
    p.maxblocks = p.minblocks = rows.data(p.dtype);
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
      p.query = query.data(p.dtype);
      std::copy_n(query.strides, 2, p.query_strides);
      p.maxblocks = p.minblocks = rows.data(p.dtype);
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
                         [](const auto& info) {
                           return info.param == DType::kFloat16    ? "Float16"
                                  : info.param == DType::kBFloat16 ? "BFloat16"
                                                                   : "Float32";
                         });

TEST(CudaSelectedBlockTablesTest, LeavesOutWhatDoesNotExist) {
  std::mt19937 random(3);
  const auto number = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  for (int round = 0; round < kRounds; ++round) {
    emulated_device = {number(1, 5), static_cast<unsigned>(round)};
    const int64_t batch = number(1, 5), heads = number(1, 3), k = round == 7 ? 2048 : number(1, 70);
    const int64_t block_size = number(1, 9), columns = number(1, 60);
    std::vector<int32_t> selected, tables, seq_lens;
    for (int64_t i = 0; i < batch * heads * k; ++i) {
      selected.push_back(static_cast<int32_t>(number(-2, columns + 2)));
    }
    for (int64_t i = 0; i < batch * columns; ++i) {
      tables.push_back(static_cast<int32_t>(number(0, 4) == 0 ? number(-3, -1) : number(0, 900)));
    }
    for (int64_t b = 0; b < batch; ++b) {
      seq_lens.push_back(static_cast<int32_t>(number(-3, columns * block_size + 5)));
    }
    std::vector<int32_t> out(selected.size(), -77);
    std::vector<int32_t> lens(static_cast<size_t>(batch * heads), -77);
    SelectedBlockTablesParams p = {};
    p.batch = batch;
    p.num_kv_heads = heads;
    p.k = k;
    p.block_size = block_size;
    p.max_kv_blocks_per_request = columns;
    p.selected_indices = selected.data();
    p.selected_indices_strides[0] = p.tables_strides[0] = heads * k;
    p.selected_indices_strides[1] = p.tables_strides[1] = k;
    p.block_tables = tables.data();
    p.block_tables_stride = columns;
    p.seq_lens = seq_lens.data();
    p.tables = out.data();
    p.lens = lens.data();
    p.lens_stride = heads;
    ASSERT_STREQ(SelectedBlockTables().run(p, kDevice, nullptr), nullptr);
    for (int64_t row = 0; row < batch * heads; ++row) {
      const int64_t b = row / heads;
      const int64_t seq_len = std::max<int64_t>(seq_lens[static_cast<size_t>(b)], 0);
      const int64_t end = std::min((seq_len + block_size - 1) / block_size, columns);
      std::vector<int32_t> blocks;
      int64_t tokens = 0;
      for (int64_t i = 0; i < k; ++i) {
        const int64_t j = selected[static_cast<size_t>(row * k + i)];
        if (j < 0 || j >= end || tables[static_cast<size_t>(b * columns + j)] < 0) continue;
        blocks.push_back(static_cast<int32_t>(j));
        tokens += std::min(seq_len - j * block_size, block_size);
      }
      std::sort(blocks.begin(), blocks.end());
      for (int32_t& block : blocks) block = tables[static_cast<size_t>(b * columns + block)];
      blocks.resize(static_cast<size_t>(k), -1);
      ASSERT_EQ(std::vector<int32_t>(out.begin() + row * k, out.begin() + (row + 1) * k), blocks);
      ASSERT_EQ(lens[static_cast<size_t>(row)], tokens);
    }
  }
}

}  // namespace
}  // namespace select_attn::cuda
