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
#include "kernel_calls.h"

namespace select_attn::ascend {
namespace {

constexpr DLDevice kDevice = {kDLExtDev, 0};
constexpr int kRounds = 60;

class AscendKernelsTest : public testing::TestWithParam<DType>, protected RandomCalls {
 protected:
  Batch MakeBatch(int round) {
    emulated_device.num_cores = Sometimes() ? Random(7, 64) : Random(1, 6);
    emulated_device.seed = static_cast<uint64_t>(round);
    return RandomCalls::MakeBatch({16, 140, Random(20, 40)}, round % 2 == 1);
  }
  // More scores to a request than are sorted at once, of rows that tie.
  Batch MakeLongBatch(int round) {
    Batch c = MakeBatch(round);
    emulated_device.num_cores = Random(1, 64);
    c.batch = Random(1, 2);
    c.dim = 16;
    c.block_size = Random(1, 2);
    c.rows = Random(0, 2) == 0 ? 1 : Random(1, 300);
    c.kv_columns = Random(300, 1200);
    c.metadata_columns = (c.kv_columns - 1) / c.rows + 1;
    c.kv_blocks = c.batch * c.kv_columns;
    c.metadata_blocks = c.batch * c.metadata_columns;
    c.metadata_tables = Table(c.batch * c.metadata_columns, c.metadata_blocks, c.hostile);
    c.seq_lens.clear();
    c.known.clear();
    for (int64_t b = 0; b < c.batch; ++b) {
      c.seq_lens.push_back(static_cast<int32_t>(Random(0, c.kv_columns * c.block_size)));
      c.known.push_back(static_cast<int32_t>(Random(0, c.seq_lens.back())));
    }
    return c;
  }
  Pool MakePool(int64_t blocks, int64_t rows, int64_t heads, int64_t dim) {
    return RandomCalls::MakePool(GetParam(), 16, blocks, rows, heads, dim);
  }

  QuestPrefillMetadataParams MetadataParams(const Batch& c, bool update, Pool& keys, Pool& max,
                                            Pool& min) {
    return select_attn::MetadataParams(c, GetParam(), update, keys, max, min);
  }
  QuestBlockSelectPagedParams SelectParams(const Batch& c, int64_t group, int64_t k, Pool& query,
                                           Pool& max, Pool& min) {
    QuestBlockSelectPagedParams p =
        select_attn::SelectParams(c, GetParam(), group, k, query, max, min, out_);
    SetWorkspace(p);
    return p;
  }
  // A workspace whose bytes mean nothing.
  void SetWorkspace(QuestBlockSelectPagedParams& p) {
    const int64_t bytes = QuestBlockSelectPaged().workspace_size(p, kDevice);
    workspace_.assign(static_cast<size_t>(bytes), 0xEE);
    p.workspace = workspace_.data();
    p.workspace_bytes = bytes;
  }

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
    const int64_t one_in = Sometimes() ? 6 : 1000;
    const bool all_negative = Sometimes();
    for (float& key : keys.values) {
      key = Random(1, one_in) == 1 ? specials[Random(0, 5)] : SmallInteger();
      if (all_negative) key = -std::fabs(key);
    }
    std::fill(max.values.begin(), max.values.end(), 100.0f);
    std::fill(min.values.begin(), min.values.end(), -100.0f);
    for (Pool* pool : {&keys, &max, &min}) pool->Store();
    const bool update = round % 3 != 0;
    QuestPrefillMetadataParams p = MetadataParams(c, update, keys, max, min);
    WideTable kv_table = Widen(c.block_tables, c.batch, c.kv_columns);
    WideTable metadata_table = Widen(c.metadata_tables, c.batch, c.metadata_columns);
    p.block_tables = kv_table.data();
    p.block_tables_stride = kv_table.stride;
    p.metadata_block_tables = metadata_table.data();
    p.metadata_block_tables_stride = metadata_table.stride;
    ASSERT_STREQ(QuestPrefillMetadata().run(p, kDevice, nullptr), nullptr);
    ExpectMetadata(c, update, keys, max, min);
    ASSERT_NO_FATAL_FAILURE(ExpectStored(max, "max, round " + std::to_string(round)));
    ASSERT_NO_FATAL_FAILURE(ExpectStored(min, "min, round " + std::to_string(round)));
  }
}

// Where metadata is by physical KV block, requests that share a prefix share its metadata.
TEST_P(AscendKernelsTest, RequestsShareTheMetadataOfAPrefix) {
  Batch c = Uniform(2, 2, 6, 1);
  c.dim = 32;
  c.block_size = 4;
  c.seq_lens = {22, 23};
  c.block_tables = {3, 1, 4, 0, 5, 9, 3, 1, 4, 2, 6, 8};
  c.metadata_tables = c.block_tables;
  for (int64_t num_cores = 1; num_cores <= 12; ++num_cores) {
    emulated_device.num_cores = num_cores;
    emulated_device.seed = static_cast<uint64_t>(num_cores);
    Pool keys(GetParam(), c.kv_blocks, c.block_size, c.heads, c.dim);
    Pool max(GetParam(), c.metadata_blocks, c.rows, c.heads, c.dim);
    Pool min(GetParam(), c.metadata_blocks, c.rows, c.heads, c.dim);
    for (float& key : keys.values) key = SmallInteger();
    for (Pool* pool : {&keys, &max, &min}) pool->Store();
    const QuestPrefillMetadataParams p = MetadataParams(c, false, keys, max, min);
    ASSERT_STREQ(QuestPrefillMetadata().run(p, kDevice, nullptr), nullptr);
    ExpectMetadata(c, false, keys, max, min);
    ASSERT_NO_FATAL_FAILURE(ExpectStored(max, "max"));
    ASSERT_NO_FATAL_FAILURE(ExpectStored(min, "min"));
  }
}

// Tokens that are one and the same, and tokens more than 4 GiB apart: steps that no copy of many
// rows can make.
TEST_P(AscendKernelsTest, TokensLieAnywhere) {
  const int64_t bytes = ElementBytes(GetParam());
  Batch c = Uniform(1, 1, 1, 1);
  c.dim = 32;
  c.block_size = 3;
  c.seq_lens = {3};
  emulated_device.num_cores = 1;
  for (const int64_t step : {int64_t{0}, int64_t{16}, ((int64_t{1} << 32) + 64) / bytes}) {
    const auto size = static_cast<size_t>((2 * step + c.dim) * bytes);
    void* cache = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    ASSERT_NE(cache, MAP_FAILED);
    Pool keys(GetParam(), 1, c.block_size, 1, c.dim);
    Pool max(GetParam(), 1, 1, 1, c.dim);
    Pool min(GetParam(), 1, 1, 1, c.dim);
    // By its place, so that elements which tokens share are the same in each.
    for (int64_t t = 0; t < c.block_size; ++t) {
      for (int64_t d = 0; d < c.dim; ++d) {
        keys.At(0, t, 0, d) = static_cast<float>((t * step + d) % 17 + 1);
      }
    }
    keys.Store();
    for (int64_t t = 0; t < c.block_size; ++t) {
      std::memcpy(static_cast<char*>(cache) + t * step * bytes,
                  keys.tensor.data<char>() + t * c.dim * bytes, static_cast<size_t>(c.dim * bytes));
    }
    QuestPrefillMetadataParams p = MetadataParams(c, false, keys, max, min);
    p.k_cache = cache;
    p.k_cache_strides[1] = step;
    ASSERT_STREQ(QuestPrefillMetadata().run(p, kDevice, nullptr), nullptr);
    munmap(cache, size);
    ExpectMetadata(c, false, keys, max, min);
    ASSERT_NO_FATAL_FAILURE(ExpectStored(max, "max, step " + std::to_string(step)));
    ASSERT_NO_FATAL_FAILURE(ExpectStored(min, "min, step " + std::to_string(step)));
  }
}

// Tables of more entries than there can be blocks; what a call needs of them is all there is.
TEST_P(AscendKernelsTest, TablesAreAsWideAsTheyLike) {
  Batch c = Uniform(1, 1, 4, 8);
  c.dim = 16;
  c.block_size = 2;
  c.seq_lens = {7};
  emulated_device.num_cores = 2;
  Pool keys(GetParam(), c.kv_blocks, c.block_size, 1, c.dim);
  Pool max(GetParam(), c.metadata_blocks, c.rows, 1, c.dim);
  Pool min(GetParam(), c.metadata_blocks, c.rows, 1, c.dim);
  for (float& key : keys.values) key = SmallInteger();
  keys.Store();
  QuestPrefillMetadataParams p = MetadataParams(c, false, keys, max, min);
  p.max_kv_blocks_per_request = p.max_metadata_blocks_per_request = int64_t{1} << 61;
  ASSERT_STREQ(QuestPrefillMetadata().run(p, kDevice, nullptr), nullptr);
  ExpectMetadata(c, false, keys, max, min);
  ASSERT_NO_FATAL_FAILURE(ExpectStored(max, "max"));
  ASSERT_NO_FATAL_FAILURE(ExpectStored(min, "min"));

  Pool query(GetParam(), 1, 1, 1, c.dim);
  std::fill(query.values.begin(), query.values.end(), 1.0f);
  query.Store();
  QuestBlockSelectPagedParams select = SelectParams(c, 1, 5, query, max, min);
  select.max_metadata_blocks_per_request = int64_t{1} << 61;
  ASSERT_STREQ(QuestBlockSelectPaged().run(select, kDevice, nullptr), nullptr);
  EXPECT_EQ(out_, ExpectedSelection(c, select, query, max, min));
}

TEST_P(AscendKernelsTest, QuestBlockSelectPaged) {
  for (int round = 0; round < kRounds; ++round) {
    const bool is_long = round % 4 == 3;
    const Batch c = is_long ? MakeLongBatch(round) : MakeBatch(round);
    const int64_t group = Sometimes() ? Random(4, 40) : Random(1, 3);
    const int64_t long_lists[] = {31, 32, 33, 127, 128, 129, 300, 511, 512};
    const int64_t k = is_long ? long_lists[Random(0, 8)] : Random(1, 20);
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
    WideTable table = Widen(c.metadata_tables, c.batch, c.metadata_columns);
    p.metadata_block_tables = table.data();
    p.metadata_block_tables_stride = table.stride;
    WideTable result = Widen(out_, c.batch * c.heads, k);
    p.selected_indices = result.data();
    p.selected_indices_strides[0] = c.heads * result.stride;
    p.selected_indices_strides[1] = result.stride;
    ASSERT_STREQ(QuestBlockSelectPaged().run(p, kDevice, nullptr), nullptr);
    ASSERT_EQ(result.Rows(), ExpectedSelection(c, p, query, max, min)) << "round " << round;
  }
}

// More query heads to a KV head than are copied at once; and heads that are one and the same.
TEST_P(AscendKernelsTest, AddsAllQueryHeads) {
  constexpr int64_t kGroup = 32;
  Batch c = Uniform(1, 2, 12, 1);
  c.dim = 256;
  emulated_device.num_cores = 2;
  Pool query(GetParam(), 1, 1, c.heads * kGroup, c.dim);
  Pool rows(GetParam(), c.metadata_blocks, 1, c.heads, c.dim);
  for (const bool one_head : {false, true}) {
    for (float& q : query.values) q = SmallInteger();
    for (float& value : rows.values) value = SmallInteger();
    for (int64_t h = 0; one_head && h < c.heads * kGroup; ++h) {
      for (int64_t d = 0; d < c.dim; ++d) query.At(0, 0, h, d) = query.At(0, 0, 0, d);
    }
    query.Store();
    rows.Store();
    QuestBlockSelectPagedParams p = SelectParams(c, kGroup, 12, query, rows, rows);
    if (one_head) p.query_strides[1] = 0;
    ASSERT_STREQ(QuestBlockSelectPaged().run(p, kDevice, nullptr), nullptr);
    ASSERT_EQ(out_, ExpectedSelection(c, p, query, rows, rows)) << one_head;
  }
}

// Entries that count up are one copy, of blocks of the pool only, and of them in the stride of
// blocks: that of rows, of which a block has one, may be anything.
TEST_P(AscendKernelsTest, CopiesRunsOfMetadataBlocks) {
  Batch c = Uniform(1, 2, 20, 1);
  c.dim = 32;
  std::iota(c.metadata_tables.begin(), c.metadata_tables.end(), 0);
  emulated_device.num_cores = 1;
  Pool query(GetParam(), 1, 1, c.heads, c.dim);
  Pool rows(GetParam(), c.metadata_blocks, 1, c.heads, c.dim);
  std::fill(query.values.begin(), query.values.end(), 1.0f);
  for (int64_t j = 0; j < 20; ++j) {
    for (int64_t n = 0; n < c.heads; ++n) rows.At(j, 0, n, 3) = static_cast<float>(j);
  }
  query.Store();
  rows.Store();
  // Those behind the pool have the highest scores.
  c.metadata_blocks = 13;
  QuestBlockSelectPagedParams p = SelectParams(c, 1, 20, query, rows, rows);
  p.maxblocks_strides[1] = 5;
  p.minblocks_strides[1] = INT64_MAX;
  ASSERT_STREQ(QuestBlockSelectPaged().run(p, kDevice, nullptr), nullptr);
  EXPECT_EQ(out_, ExpectedSelection(c, p, query, rows, rows));
  EXPECT_EQ(out_[0], 12);
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
  c.dim = 64;  // fewer would be added to zeros, which takes the sign from -0
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

// Bad entries here and there: what the scalar unit reads of the table does not grow with k.
TEST_P(AscendKernelsTest, BadEntriesCostLittle) {
  constexpr int64_t kRows = 600;
  Batch c = Uniform(1, 1, kRows, 1);
  c.dim = 16;
  emulated_device.num_cores = 1;
  Pool rows(GetParam(), c.metadata_blocks, 1, 1, c.dim);
  Pool query(GetParam(), 1, 1, 1, c.dim);
  std::fill(query.values.begin(), query.values.end(), 1.0f);
  for (float& value : rows.values) value = SmallInteger();
  rows.Store();
  query.Store();
  for (const int64_t every : {600, 100, 3, 1}) {
    for (int64_t j = 0; j < kRows; j += every) c.metadata_tables[static_cast<size_t>(j)] = -1;
    const QuestBlockSelectPagedParams p = SelectParams(c, 1, 512, query, rows, rows);
    ASSERT_STREQ(QuestBlockSelectPaged().run(p, kDevice, nullptr), nullptr);
    ASSERT_EQ(out_, ExpectedSelection(c, p, query, rows, rows)) << "every " << every;
    EXPECT_LE(emulated_device.launches[0].cores[0].scalar_global_reads, 4 * kRows);
  }
}

// Zero, infinity and NaN in the query, alone and in several of the chunks of 64 channels, the last
// of which may be narrow, under bounds of every kind.
TEST_P(AscendKernelsTest, QueriesOfIrregularChannels) {
  const float specials[] = {0.0f, -0.0f, kInfinity, -kInfinity, kNaN};
  const float bounds[] = {0.0f, -0.0f, kInfinity, -kInfinity, kNaN, 2.0f, -3.0f, 5.0f};
  for (const int64_t dim : {16, 64, 80, 128, 192, 208, 256}) {
    for (const std::vector<int64_t>& channels :
         {std::vector<int64_t>{3}, {dim - 1}, {0, dim / 2, dim - 1}, {5, 70, 130}}) {
      for (const float special : specials) {
        Batch c = Uniform(1, 1, 60, 60);
        c.dim = dim;
        emulated_device.num_cores = Random(1, 3);
        Pool query = MakePool(1, 1, 1, dim);
        Pool max = MakePool(c.metadata_blocks, c.rows, 1, dim);
        Pool min = MakePool(c.metadata_blocks, c.rows, 1, dim);
        for (Pool* pool : {&query, &max, &min}) {
          for (float& value : pool->values) value = SmallInteger();
        }
        for (const int64_t d : channels) {
          if (d >= dim) continue;
          query.At(0, 0, 0, d) = special;
          for (int64_t j = 0; j < 60; ++j) {
            if (Random(0, 2) == 0) max.At(0, j, 0, d) = bounds[Random(0, 7)];
            if (Random(0, 2) == 0) min.At(0, j, 0, d) = bounds[Random(0, 7)];
          }
        }
        for (Pool* pool : {&query, &max, &min}) pool->Store();
        const QuestBlockSelectPagedParams p = SelectParams(c, 1, 60, query, max, min);
        ASSERT_STREQ(QuestBlockSelectPaged().run(p, kDevice, nullptr), nullptr);
        ASSERT_EQ(out_, ExpectedSelection(c, p, query, max, min))
            << dim << " channels, " << special << " in channel " << channels[0];
      }
    }
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

INSTANTIATE_TEST_SUITE_P(DTypes, AscendKernelsTest,
                         testing::Values(DType::kFloat16, DType::kBFloat16, DType::kFloat32),
                         [](const auto& info) { return DTypeName(info.param); });

TEST(AscendSelectedBlockTablesTest, LeavesOutWhatDoesNotExist) {
  CheckSelectedBlockTables(kRounds, 512, [](const SelectedBlockTablesParams& p) {
    emulated_device.num_cores = emulated_device.num_cores % 5 + 1;
    return SelectedBlockTables().run(p, kDevice, nullptr);
  });
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
