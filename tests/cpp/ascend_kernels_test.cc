// The kernels of the Ascend backend, as they ship, on the emulator of a vector core, against what
// the contract says. Data is of small integers, whose sums are exact: results must match whatever
// the order of additions. Lengths and table entries are hostile in half of the rounds.

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "ascend/backend.h"
#include "emulated_ascend.h"
#include "test_tensor.h"

namespace select_attn::ascend {
namespace {

constexpr DLDevice kDevice = {kDLExtDev, 0};
constexpr int kRounds = 60;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

int64_t ElementBytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Rows of head_dim elements, [blocks, rows, heads], in one of the layouts of paged caches.
struct Pool {
  Pool(DType dtype, int64_t num_blocks, int64_t num_rows, int64_t num_heads, int64_t head_dim,
       bool heads_outside = false, int64_t gap = 0, int64_t first = 0)
      : blocks(num_blocks),
        offset(first),
        element_bytes(ElementBytes(dtype)),
        tensor(TypeOf(dtype), {first + num_blocks * num_rows * num_heads * (head_dim + gap)}) {
    const int64_t row = head_dim + gap;
    strides[0] = num_rows * num_heads * row;
    strides[1] = heads_outside ? row : num_heads * row;
    strides[2] = heads_outside ? num_rows * row : row;
    values.resize(static_cast<size_t>(tensor.shape()[0]));
  }

  float& At(int64_t block, int64_t row, int64_t head, int64_t d) {
    return values[static_cast<size_t>(offset + block * strides[0] + row * strides[1] +
                                      head * strides[2] + d)];
  }
  // Copies the values into memory.
  void Store() {
    for (size_t i = 0; i < values.size(); ++i) tensor.Set(static_cast<int64_t>(i), values[i]);
  }
  void* data() { return tensor.data<char>() + offset * element_bytes; }

  int64_t blocks, offset, element_bytes;
  int64_t strides[3];
  TestTensor tensor;
  std::vector<float> values;
};

struct Batch {
  bool hostile;
  int64_t batch, heads, dim, block_size, rows;
  int64_t kv_columns, metadata_columns;
  int64_t kv_blocks, metadata_blocks;
  std::vector<int32_t> seq_lens, known;
  std::vector<int32_t> block_tables, metadata_tables;

  // In the words of the contract, for a device, which clamps.
  int64_t SeqLen(int64_t b) const { return std::max<int64_t>(seq_lens[static_cast<size_t>(b)], 0); }
  int64_t Known(int64_t b) const {
    return std::clamp<int64_t>(known[static_cast<size_t>(b)], 0, SeqLen(b));
  }
  int64_t Blocks(int64_t tokens) const { return (tokens + block_size - 1) / block_size; }
  int64_t KvBlock(int64_t b, int64_t j) const {
    return block_tables[static_cast<size_t>(b * kv_columns + j)];
  }
  // Of row j; -1 where the entry is bad.
  int64_t MetadataBlock(int64_t b, int64_t j) const {
    const int64_t block = metadata_tables[static_cast<size_t>(b * metadata_columns + j / rows)];
    return block < metadata_blocks ? std::max<int64_t>(block, -1) : -1;
  }
};

// The lists of quest_block_select_paged, [batch, heads, k], in float64.
std::vector<int32_t> ExpectedSelection(const Batch& c, const QuestBlockSelectPagedParams& p,
                                       Pool& query, Pool& max, Pool& min) {
  const int64_t group = p.num_heads / p.num_kv_heads;
  const bool forces = p.metadata_seq_lens != nullptr || p.tokens_since_metadata_update >= 0;
  std::vector<int32_t> expected;
  for (int64_t b = 0; b < c.batch; ++b) {
    const int64_t num_blocks = c.Blocks(c.SeqLen(b));
    int64_t window = num_blocks;
    if (forces) {
      const int64_t known =
          p.metadata_seq_lens != nullptr
              ? c.Known(b)
              : std::max<int64_t>(c.SeqLen(b) - p.tokens_since_metadata_update, 0);
      window = std::min(known / c.block_size, num_blocks);
    }
    for (int64_t n = 0; n < c.heads; ++n) {
      std::vector<double> mean(static_cast<size_t>(c.dim), 0.0);
      for (int64_t d = 0; d < c.dim; ++d) {
        for (int64_t h = 0; h < group; ++h) {
          mean[static_cast<size_t>(d)] += query.At(b, 0, n * group + h, d);
        }
        mean[static_cast<size_t>(d)] /= static_cast<double>(group);
      }
      std::vector<std::tuple<int, double, int64_t>> ranked;  // class, score, minus the number
      // Hostile lengths make windows of 2^31 blocks, of which k are the most that count.
      for (int64_t j = std::max(window, num_blocks - p.k); j < num_blocks; ++j) {
        ranked.emplace_back(3, 0.0, j);
      }
      for (int64_t j = 0; j < window; ++j) {
        if (forces && j == 0) {
          ranked.emplace_back(2, 0.0, 0);
          continue;
        }
        if (j >= c.metadata_columns * c.rows) break;
        const int64_t block = c.MetadataBlock(b, j);
        if (block < 0) continue;
        double score = 0.0;
        for (int64_t d = 0; d < c.dim; ++d) {
          const double by_max = mean[static_cast<size_t>(d)] * max.At(block, j % c.rows, n, d);
          const double by_min = mean[static_cast<size_t>(d)] * min.At(block, j % c.rows, n, d);
          score +=
              std::isnan(by_max) || std::isnan(by_min) ? double{kNaN} : std::max(by_max, by_min);
        }
        const bool is_nan = std::isnan(score);
        ranked.emplace_back(is_nan ? 1 : 0, is_nan ? 0.0 : score, -j);
      }
      std::sort(ranked.rbegin(), ranked.rend());
      for (int64_t i = 0; i < p.k; ++i) {
        const bool exists = i < static_cast<int64_t>(ranked.size());
        expected.push_back(
            exists ? static_cast<int32_t>(std::abs(std::get<2>(ranked[static_cast<size_t>(i)])))
                   : -1);
      }
    }
  }
  return expected;
}

// Writes into the pools' values what quest_prefill_metadata should.
void ExpectMetadata(const Batch& c, bool update, Pool& keys, Pool& max, Pool& min) {
  for (int64_t b = 0; b < c.batch; ++b) {
    const int64_t begin = update ? c.Known(b) / c.block_size : 0;
    const int64_t end =
        std::min({c.Blocks(c.SeqLen(b)), c.kv_columns, c.metadata_columns * c.rows});
    for (int64_t j = begin; begin < end && (j < end || j % c.rows != 0); ++j) {
      // Behind the last block only rows of a metadata block whose row 0 was written.
      if (j >= end && j - j % c.rows < begin) continue;
      const int64_t row_block = c.MetadataBlock(b, j);
      if (row_block < 0) continue;
      const int64_t kv_block = j < end ? c.KvBlock(b, j) : -1;
      const bool has_keys = kv_block >= 0 && kv_block < c.kv_blocks;
      const int64_t tokens = std::min(c.SeqLen(b) - j * c.block_size, c.block_size);
      for (int64_t n = 0; n < c.heads; ++n) {
        for (int64_t d = 0; d < c.dim; ++d) {
          float highest = has_keys ? -kInfinity : 0.0f;
          float lowest = has_keys ? kInfinity : 0.0f;
          for (int64_t t = 0; has_keys && t < tokens; ++t) {
            const float key = keys.At(kv_block, t, n, d);
            if (std::isnan(key) || std::isnan(highest)) {
              highest = lowest = kNaN;
            } else {
              highest = std::max(highest, key);
              lowest = std::min(lowest, key);
            }
          }
          max.At(row_block, j % c.rows, n, d) = highest;
          min.At(row_block, j % c.rows, n, d) = lowest;
        }
      }
    }
  }
}

void ExpectStored(Pool& pool, const std::string& what) {
  for (size_t i = 0; i < pool.values.size(); ++i) {
    const float got = pool.tensor.Get(static_cast<int64_t>(i));
    const float expected = pool.values[i];
    ASSERT_TRUE(got == expected || (std::isnan(got) && std::isnan(expected)))
        << what << ", element " << i << ": " << got << " for " << expected;
  }
}

class AscendKernelsTest : public testing::TestWithParam<DType> {
 protected:
  int64_t Random(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_);
  }
  bool Sometimes() { return Random(0, 9) == 0; }

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
            aligned ? 16 * Random(0, 2) : Random(1, 9),
            aligned ? 0 : Random(0, 3)};
  }

  Batch MakeBatch(int round) {
    emulated_device.num_cores = Random(1, 6);
    emulated_device.seed = static_cast<uint64_t>(round);
    Batch c;
    c.hostile = round % 2 == 1;
    c.batch = Sometimes() ? Random(20, 40) : Random(1, 4);
    c.heads = Random(1, 3);
    c.dim = 16 * (Sometimes() ? Random(9, 16) : Random(1, 8));
    c.block_size = Random(0, 3) == 0 ? Random(20, 140) : Random(1, 9);
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

  // A workspace whose bytes mean nothing.
  void SetWorkspace(QuestBlockSelectPagedParams& p) {
    const int64_t bytes = QuestBlockSelectPaged().workspace_size(p, kDevice);
    workspace_.assign(static_cast<size_t>(bytes), 0xEE);
    p.workspace = workspace_.data();
    p.workspace_bytes = bytes;
  }

  QuestPrefillMetadataParams MetadataParams(const Batch& c, bool update, Pool& keys, Pool& max,
                                            Pool& min) {
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
    p.k_cache = keys.data();
    std::copy_n(keys.strides, 3, p.k_cache_strides);
    p.block_tables = c.block_tables.data();
    p.block_tables_stride = c.kv_columns;
    p.seq_lens = c.seq_lens.data();
    p.metadata_seq_lens = update ? c.known.data() : nullptr;
    p.metadata_block_tables = c.metadata_tables.data();
    p.metadata_block_tables_stride = c.metadata_columns;
    p.maxblocks = max.data();
    std::copy_n(max.strides, 3, p.maxblocks_strides);
    p.minblocks = min.data();
    std::copy_n(min.strides, 3, p.minblocks_strides);
    return p;
  }

  QuestBlockSelectPagedParams SelectParams(const Batch& c, int64_t group, int64_t k, Pool& query,
                                           Pool& max, Pool& min) {
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
    p.tokens_since_metadata_update = -1;
    p.dtype = GetParam();
    p.query = query.data();
    p.query_strides[0] = query.strides[0];
    p.query_strides[1] = query.strides[2];
    p.maxblocks = max.data();
    std::copy_n(max.strides, 3, p.maxblocks_strides);
    p.minblocks = min.data();
    std::copy_n(min.strides, 3, p.minblocks_strides);
    p.metadata_block_tables = c.metadata_tables.data();
    p.metadata_block_tables_stride = c.metadata_columns;
    p.seq_lens = c.seq_lens.data();
    out_.assign(static_cast<size_t>(c.batch * c.heads * k), -77);
    p.selected_indices = out_.data();
    p.selected_indices_strides[0] = c.heads * k;
    p.selected_indices_strides[1] = k;
    SetWorkspace(p);
    return p;
  }

  // A batch of one length, with heads side by side, in the layout of the original.
  Batch Uniform(int64_t batch, int64_t heads, int64_t num_blocks, int64_t rows) {
    Batch c;
    c.hostile = false;
    c.batch = batch;
    c.heads = heads;
    c.dim = 128;
    c.block_size = 128;
    c.rows = rows;
    c.kv_columns = num_blocks;
    c.metadata_columns = (num_blocks - 1) / rows + 1;
    c.kv_blocks = batch * num_blocks;
    c.metadata_blocks = batch * c.metadata_columns;
    c.seq_lens.assign(static_cast<size_t>(batch), static_cast<int32_t>(num_blocks * 128));
    c.known = c.seq_lens;
    c.block_tables = Table(batch * num_blocks, c.kv_blocks, false);
    c.metadata_tables = Table(batch * c.metadata_columns, c.metadata_blocks, false);
    return c;
  }

  std::mt19937 random_{11};
  std::vector<uint8_t> workspace_;
  std::vector<int32_t> out_;
};

TEST_P(AscendKernelsTest, QuestPrefillMetadata) {
  for (int round = 0; round < kRounds; ++round) {
    const Batch c = MakeBatch(round);
    Pool keys = MakePool(c.kv_blocks, c.block_size, c.heads, c.dim);
    Pool max = MakePool(c.metadata_blocks, c.rows, c.heads, c.dim);
    Pool min = MakePool(c.metadata_blocks, c.rows, c.heads, c.dim);
    const float specials[] = {kNaN, -kNaN, kInfinity, -kInfinity, 0.0f, -0.0f};
    for (float& key : keys.values) {
      key = Random(0, 999) == 0 ? specials[Random(0, 5)] : SmallInteger();
    }
    std::fill(max.values.begin(), max.values.end(), 100.0f);
    std::fill(min.values.begin(), min.values.end(), -100.0f);
    for (Pool* pool : {&keys, &max, &min}) pool->Store();
    const bool update = round % 3 != 0;
    const QuestPrefillMetadataParams p = MetadataParams(c, update, keys, max, min);
    ASSERT_STREQ(QuestPrefillMetadata().run(p, kDevice, nullptr), nullptr);
    ExpectMetadata(c, update, keys, max, min);
    ASSERT_NO_FATAL_FAILURE(ExpectStored(max, "max, round " + std::to_string(round)));
    ASSERT_NO_FATAL_FAILURE(ExpectStored(min, "min, round " + std::to_string(round)));
  }
}

TEST_P(AscendKernelsTest, QuestBlockSelectPaged) {
  for (int round = 0; round < kRounds; ++round) {
    const Batch c = MakeBatch(round);
    const int64_t group = Random(1, 3);
    const int64_t k = Random(1, 20);
    Pool query = MakePool(c.batch, 1, c.heads * group, c.dim);
    Pool max = MakePool(c.metadata_blocks, c.rows, c.heads, c.dim);
    Pool min = MakePool(c.metadata_blocks, c.rows, c.heads, c.dim);
    // Multiples of the group size have an exact mean, which is often zero for two heads or more.
    for (float& q : query.values) {
      q = static_cast<float>(group) * std::clamp(SmallInteger(), -3.0f, 2.0f);
    }
    // Zero and infinity times what is infinite or zero: which product is the larger is no matter of
    // the query's sign then.
    const bool special = round % 4 >= 2;
    const float specials[] = {kNaN, kInfinity, -kInfinity};
    const float special_queries[] = {0.0f, -0.0f, kInfinity, -kInfinity, kNaN};
    if (special && round % 8 >= 4) {
      for (float& q : query.values) {
        if (Random(0, 100) == 0) q = special_queries[Random(0, 4)];
      }
    }
    for (Pool* pool : {&max, &min}) {
      for (float& value : pool->values) {
        value = special && Sometimes() ? 0.0f : SmallInteger();
        if (special && Random(0, 300) == 0) value = specials[Random(0, 2)];
      }
    }
    for (Pool* pool : {&query, &max, &min}) pool->Store();
    QuestBlockSelectPagedParams p = SelectParams(c, group, k, query, max, min);
    if (round % 3 == 1) p.metadata_seq_lens = c.known.data();
    if (round % 3 == 2) p.tokens_since_metadata_update = Random(0, 2 * c.block_size);
    ASSERT_STREQ(QuestBlockSelectPaged().run(p, kDevice, nullptr), nullptr);
    ASSERT_EQ(out_, ExpectedSelection(c, p, query, max, min)) << "round " << round;
  }
}

// More scores than are sorted at once, ties that cross every boundary, k up to the limit, on any
// number of cores.
TEST_P(AscendKernelsTest, SelectsFromLongRows) {
  for (const auto& [count, k, kinds] : std::vector<std::tuple<int64_t, int64_t, int64_t>>{
           {300, 300, 2}, {511, 512, 9}, {513, 16, 50}, {4096, 512, 1}, {3000, 512, 7}}) {
    emulated_device.num_cores = Random(1, 40);
    const bool one_row = kinds > 8;  // per metadata block
    Batch c = Uniform(1, 1, count, one_row ? 1 : count);
    c.dim = 16;
    std::iota(c.metadata_tables.begin(), c.metadata_tables.end(), 0);
    if (one_row) std::swap(c.metadata_tables[100], c.metadata_tables[200]);
    Pool rows(GetParam(), c.metadata_blocks, c.rows, 1, c.dim);
    Pool query(GetParam(), 1, 1, 1, c.dim);
    for (int64_t j = 0; j < count; ++j) {
      rows.At(j / c.rows, j % c.rows, 0, 0) = static_cast<float>(Random(1, kinds));
    }
    std::fill(query.values.begin(), query.values.end(), 1.0f);
    rows.Store();
    query.Store();
    const QuestBlockSelectPagedParams p = SelectParams(c, 1, k, query, rows, rows);
    ASSERT_STREQ(QuestBlockSelectPaged().run(p, kDevice, nullptr), nullptr);
    ASSERT_EQ(out_, ExpectedSelection(c, p, query, rows, rows)) << count << " rows";
  }
}

// NaN above +inf, -inf behind all numbers, a skipped table entry nowhere.
TEST_P(AscendKernelsTest, RanksSpecialScores) {
  Batch c = Uniform(1, 1, 600, 1);
  c.dim = 32;
  for (const int64_t bad : {0, 1, 77, 599}) c.metadata_tables[static_cast<size_t>(bad)] = -1;
  Pool rows(GetParam(), c.metadata_blocks, 1, 1, c.dim);
  Pool query(GetParam(), 1, 1, 1, c.dim);
  std::fill(query.values.begin(), query.values.end(), 1.0f);
  const float specials[] = {kNaN, -kNaN, kInfinity, -kInfinity, 0.0f, -0.0f, 1.0f};
  for (int64_t j = 0; j < 600; ++j) {
    const float value = specials[Random(0, 6)];
    // A sum of -0 needs all of its terms to be -0.
    for (int64_t d = 0; d < c.dim; ++d) {
      rows.At(j, 0, 0, d) = d == 0 || std::signbit(value) ? value : 0.0f;
    }
  }
  rows.Store();
  query.Store();
  for (const int64_t num_cores : {1, 2, 7}) {
    emulated_device.num_cores = num_cores;
    const QuestBlockSelectPagedParams p = SelectParams(c, 1, 512, query, rows, rows);
    ASSERT_STREQ(QuestBlockSelectPaged().run(p, kDevice, nullptr), nullptr);
    ASSERT_EQ(out_, ExpectedSelection(c, p, query, rows, rows));
  }
}

// Pools whose rows lie beyond 2^31 elements, in memory of which only what is touched exists.
TEST_P(AscendKernelsTest, OffsetsAreWide) {
  constexpr int64_t kFarBlock = 40000;  // of 64 Ki elements
  Batch c = Uniform(1, 4, 1, 128);
  c.kv_blocks = c.metadata_blocks = kFarBlock + 1;
  c.block_tables = {kFarBlock};
  c.metadata_tables = {kFarBlock};
  c.seq_lens = {100};
  emulated_device.num_cores = 2;
  const int64_t block = 128 * c.heads * c.dim;
  const auto bytes = static_cast<size_t>((kFarBlock + 1) * block * ElementBytes(GetParam()));
  std::vector<char*> pools;
  for (int i = 0; i < 3; ++i) {
    void* pool = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    ASSERT_NE(pool, MAP_FAILED);
    pools.push_back(static_cast<char*>(pool));
  }
  Pool keys(GetParam(), 1, 128, c.heads, c.dim);
  for (float& key : keys.values) key = SmallInteger();
  keys.Store();
  char* far = pools[0] + kFarBlock * block * ElementBytes(GetParam());
  std::memcpy(far, keys.data(), keys.tensor.bytes().size());

  Pool max(GetParam(), 1, 128, c.heads, c.dim);
  Pool min(GetParam(), 1, 128, c.heads, c.dim);
  QuestPrefillMetadataParams p = MetadataParams(c, false, keys, max, min);
  p.k_cache = pools[0];
  p.maxblocks = pools[1];
  p.minblocks = pools[2];
  ASSERT_STREQ(QuestPrefillMetadata().run(p, kDevice, nullptr), nullptr);
  Batch near = c;
  near.kv_blocks = near.metadata_blocks = 1;
  near.block_tables = near.metadata_tables = {0};
  ExpectMetadata(near, false, keys, max, min);
  for (int i = 1; i < 3; ++i) {
    Pool& pool = i == 1 ? max : min;
    std::memcpy(pool.data(), pools[static_cast<size_t>(i)] + (far - pools[0]),
                pool.tensor.bytes().size());
    ASSERT_NO_FATAL_FAILURE(ExpectStored(pool, "far rows"));
  }

  Pool query(GetParam(), 1, 1, c.heads, c.dim);
  std::fill(query.values.begin(), query.values.end(), 1.0f);
  query.Store();
  QuestBlockSelectPagedParams select = SelectParams(c, 1, 3, query, max, min);
  select.maxblocks = pools[1];
  select.minblocks = pools[2];
  ASSERT_STREQ(QuestBlockSelectPaged().run(select, kDevice, nullptr), nullptr);
  for (int64_t n = 0; n < c.heads; ++n) {
    EXPECT_EQ(out_[static_cast<size_t>(3 * n)], 0);
    EXPECT_EQ(out_[static_cast<size_t>(3 * n + 1)], -1);
  }
  for (char* pool : pools) munmap(pool, bytes);
}

// What the design promises, counted by the emulator.
TEST_P(AscendKernelsTest, MetadataIsCheap) {
  const Batch c = Uniform(2, 8, 40, 128);
  Pool keys(GetParam(), c.kv_blocks, c.block_size, c.heads, c.dim);
  Pool max(GetParam(), c.metadata_blocks, c.rows, c.heads, c.dim);
  Pool min(GetParam(), c.metadata_blocks, c.rows, c.heads, c.dim);
  for (float& key : keys.values) key = SmallInteger();
  keys.Store();
  emulated_device.num_cores = 10;
  const QuestPrefillMetadataParams p = MetadataParams(c, false, keys, max, min);
  ASSERT_STREQ(QuestPrefillMetadata().run(p, kDevice, nullptr), nullptr);
  const auto rows = static_cast<double>(c.kv_blocks * c.block_size * c.heads);
  const double row_bytes = static_cast<double>(c.dim * ElementBytes(GetParam()));
  const double least_read = rows * row_bytes;
  const double least_written =
      2.0 * row_bytes * static_cast<double>(c.metadata_blocks * c.rows * c.heads);
  const EmulatedCounts counts = emulated_device.counts;
  const double repeats = static_cast<double>(counts.vector_repeats) / rows;
  const double bytes =
      static_cast<double>(counts.bytes_read + counts.bytes_written) / (least_read + least_written);
  std::printf("metadata: %.3f repeats per key row, %.4f of the least bytes, %ld copies in flight\n",
              repeats, bytes, static_cast<long>(counts.copies_in_flight));
  // The original needs about 4 for float16.
  EXPECT_LE(repeats, GetParam() == DType::kFloat16 ? 0.6 * 4 : 5.5);
  EXPECT_LE(bytes, 1.02);
  EXPECT_GE(counts.copies_in_flight, 2);
}

TEST_P(AscendKernelsTest, SelectionIsCheapAndKeepsAllCoresBusy) {
  // 98,304 tokens, 8 (request, KV head), a 910B4. A zero in every query takes the longer way.
  const Batch c = Uniform(2, 4, 768, 128);
  for (const bool has_zero : {false, true}) {
    Pool query(GetParam(), c.batch, 1, c.heads, c.dim);
    Pool max(GetParam(), c.metadata_blocks, c.rows, c.heads, c.dim);
    Pool min(GetParam(), c.metadata_blocks, c.rows, c.heads, c.dim);
    for (Pool* pool : {&query, &max, &min}) {
      for (float& value : pool->values) value = SmallInteger();
    }
    for (int64_t b = 0; has_zero && b < c.batch; ++b) {
      for (int64_t n = 0; n < c.heads; ++n) query.At(b, 0, n, 5) = 0.0f;
    }
    for (Pool* pool : {&query, &max, &min}) pool->Store();
    emulated_device.num_cores = 40;
    const QuestBlockSelectPagedParams p = SelectParams(c, 1, 64, query, max, min);
    ASSERT_STREQ(QuestBlockSelectPaged().run(p, kDevice, nullptr), nullptr);
    ASSERT_EQ(out_, ExpectedSelection(c, p, query, max, min));
    const auto rows = static_cast<double>(c.batch * c.heads * 768);
    const double least = 2.0 * rows * static_cast<double>(c.dim * ElementBytes(GetParam()));
    const EmulatedCounts counts = emulated_device.counts;
    const double repeats = static_cast<double>(counts.vector_repeats) / rows;
    const double bytes = static_cast<double>(counts.bytes_read + counts.bytes_written) / least;
    std::printf(
        "selection%s: %.3f repeats per row, %.4f of the least bytes, %ld copies in flight, "
        "%ld cores busy\n",
        has_zero ? ", zero in the query" : "", repeats, bytes,
        static_cast<long>(counts.copies_in_flight), static_cast<long>(counts.cores_busy));
    EXPECT_LE(repeats, has_zero ? 13.0 : 12.0);
    EXPECT_LE(bytes, 1.02);
    EXPECT_GE(counts.copies_in_flight, 2);
    EXPECT_EQ(counts.cores_busy, 40);
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, AscendKernelsTest,
                         testing::Values(DType::kFloat16, DType::kBFloat16, DType::kFloat32),
                         [](const auto& info) {
                           return info.param == DType::kFloat16    ? "Float16"
                                  : info.param == DType::kBFloat16 ? "BFloat16"
                                                                   : "Float32";
                         });

TEST(AscendSelectedBlockTablesTest, LeavesOutWhatDoesNotExist) {
  std::mt19937 random(3);
  const auto number = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  for (int round = 0; round < kRounds; ++round) {
    emulated_device.num_cores = number(1, 5);
    const int64_t batch = number(1, 5), heads = number(1, 3), k = round == 7 ? 512 : number(1, 70);
    const int64_t block_size = number(1, 9), columns = number(1, 60);
    std::vector<int32_t> selected, tables, seq_lens;
    for (int64_t i = 0; i < batch * heads * k; ++i) {
      selected.push_back(static_cast<int32_t>(number(-2, columns + 2)));
    }
    for (int64_t i = 0; i < batch * columns; ++i) {
      tables.push_back(static_cast<int32_t>(number(-1, 900)));
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

TEST(AscendLimitsTest, AreNamed) {
  QuestBlockSelectPagedParams p = {};
  p.head_dim = 128;
  p.k = 512;
  EXPECT_EQ(QuestBlockSelectPaged().unsupported(p, kDevice), nullptr);
  p.k = 513;
  EXPECT_STREQ(QuestBlockSelectPaged().unsupported(p, kDevice),
               "the ascend backend needs k to be at most 512, got 513");
  p.head_dim = 264;
  EXPECT_STREQ(QuestBlockSelectPaged().unsupported(p, kDevice),
               "the ascend backend needs a head dim that is a multiple of 16 and at most 256, got "
               "264");
  QuestPrefillMetadataParams metadata = {};
  metadata.head_dim = 100;
  EXPECT_STREQ(QuestPrefillMetadata().unsupported(metadata, kDevice),
               "the ascend backend needs a head dim that is a multiple of 16 and at most 256, got "
               "100");
  SelectedBlockTablesParams tables = {};
  tables.k = 5;
  tables.max_kv_blocks_per_request = (int64_t{1} << 24) + 1;
  EXPECT_STREQ(SelectedBlockTables().unsupported(tables, kDevice),
               "the ascend backend needs block_tables to have at most 16777216 columns, got "
               "16777217");
}

}  // namespace
}  // namespace select_attn::ascend
