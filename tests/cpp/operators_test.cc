// The operators end to end in C++, for the sanitizers: on every SIMD target, dtype and thread
// count, over random layouts with exactly sized buffers, with small integers, whose sums are exact,
// so that results must match to the bit, but for the means of an attention. Rounding, NaN and the
// rest are the Python tests' business.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#include "select_attn_ops/paged_select_attention.h"
#include "select_attn_ops/quest_block_select_paged.h"
#include "select_attn_ops/quest_prefill_metadata.h"
#include "select_attn_ops/runtime.h"
#include "select_attn_ops/selected_block_tables.h"
#include "test_tensor.h"

namespace select_attn {
namespace {

// A tensor of small integers in a layout of its own, and the same integers to compute with.
class Values {
 public:
  // `order` lists the dimensions from the outermost in memory to the innermost, the last one last;
  // `gap` elements lie between the rows.
  Values(DType dtype, std::vector<int64_t> shape, const std::vector<int>& order, int64_t gap)
      : shape_(std::move(shape)), tensor_(TypeOf(dtype), {Size(shape_, order, gap)}) {
    strides_.resize(shape_.size());
    int64_t stride = 1;
    for (size_t i = order.size(); i-- > 0;) {
      const auto dim = static_cast<size_t>(order[i]);
      strides_[dim] = stride;
      stride = stride * shape_[dim] + (i + 1 == order.size() ? gap : 0);
    }
    values_.resize(tensor_.bytes().size() / static_cast<size_t>(TypeOf(dtype).bits / 8));
  }

  void Fill(const std::function<float()>& value) {
    for (size_t i = 0; i < values_.size(); ++i) {
      values_[i] = value();
      tensor_.Set(static_cast<int64_t>(i), values_[i]);
    }
  }

  float At(const std::vector<int64_t>& index) const {
    return values_[static_cast<size_t>(
        std::inner_product(index.begin(), index.end(), strides_.begin(), int64_t{0}))];
  }
  void Expect(const std::vector<int64_t>& index, float value) {
    values_[static_cast<size_t>(
        std::inner_product(index.begin(), index.end(), strides_.begin(), int64_t{0}))] = value;
  }

  DLTensor View() {
    DLTensor view = tensor_.View();
    view.ndim = static_cast<int32_t>(shape_.size());
    view.shape = shape_.data();
    view.strides = strides_.data();
    return view;
  }

  // Whether memory holds the values, those between the rows included.
  bool HoldsValues(DType dtype) const {
    TestTensor expected(TypeOf(dtype), {static_cast<int64_t>(values_.size())});
    for (size_t i = 0; i < values_.size(); ++i) {
      expected.Set(static_cast<int64_t>(i), values_[i]);
    }
    return expected.bytes() == tensor_.bytes();
  }

 private:
  static int64_t Size(const std::vector<int64_t>& shape, const std::vector<int>& order,
                      int64_t gap) {
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < order.size(); ++i) rows *= shape[static_cast<size_t>(order[i])];
    return rows * (shape.back() + gap);
  }

  std::vector<int64_t> shape_;
  std::vector<int64_t> strides_;
  TestTensor tensor_;
  std::vector<float> values_;  // in memory order
};

class OperatorsTest : public testing::TestWithParam<std::tuple<std::string, DType>> {
 protected:
  void SetUp() override { SetSimdTarget(std::get<0>(GetParam())); }
  void TearDown() override { SetSimdTarget(""); }

  int64_t Random(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_);
  }

  // Non-zero, so that no sign of a zero is in doubt.
  float SmallInteger() {
    const auto value = static_cast<float>(Random(1, 9));
    return Random(0, 1) == 0 ? value : -value;
  }

  // `count` blocks of a pool, in random order.
  std::vector<int32_t> Table(int64_t count, int64_t pool) {
    std::vector<int32_t> order(static_cast<size_t>(pool));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random_);
    order.resize(static_cast<size_t>(count));
    return order;
  }

  Values MakeCache(std::vector<int64_t> shape) {
    const bool heads_outside = Random(0, 1) == 1;
    return {std::get<1>(GetParam()), std::move(shape),
            heads_outside ? std::vector<int>{0, 2, 1, 3} : std::vector<int>{0, 1, 2, 3},
            Random(0, 1) * Random(1, 40)};
  }

  // The shapes of one paged batch and its tables.
  struct Batch {
    int64_t batch, group, num_kv_heads, head_dim, block_size, rows;
    int64_t kv_columns, metadata_columns;  // of the tables
    int64_t kv_blocks, metadata_blocks;    // in the pools
    std::vector<int32_t> seq_lens;
    std::vector<int32_t> block_tables, metadata_tables;
  };

  // Now and then of many short blocks, dense in the pool or far apart, or of a few long ones, which
  // are read in other ways.
  Batch MakeBatch(int round) {
    const bool many = round % 8 == 7;
    const bool long_ones = round % 8 == 3;
    Batch batch;
    batch.batch = Random(1, 4);
    batch.group = Random(1, 3);
    batch.num_kv_heads = Random(1, many ? 2 : 4);
    batch.head_dim = Random(0, 2) == 0 ? 32 * Random(1, many ? 2 : 4) : Random(1, many ? 40 : 100);
    batch.block_size = long_ones ? Random(30, 130) : Random(1, many ? 2 : 20);
    batch.rows = Random(0, 1) == 0 ? batch.block_size : Random(1, many ? 2 : 7);
    // At most, of a request.
    const int64_t blocks = many ? 2000 / batch.batch : long_ones ? 3 : 12;
    int64_t longest = 1;
    for (int64_t b = 0; b < batch.batch; ++b) {
      batch.seq_lens.push_back(
          static_cast<int32_t>(Random(many ? blocks / 2 : 0, blocks * batch.block_size)));
      longest = std::max<int64_t>(longest, batch.seq_lens.back());
    }
    const int64_t places_per_block = many && Random(0, 1) == 1 ? 6 : 1;
    batch.kv_columns = (longest - 1) / batch.block_size + 1 + Random(0, 2);
    batch.metadata_columns = (batch.kv_columns - 1) / batch.rows + 1;
    batch.kv_blocks = batch.batch * batch.kv_columns * places_per_block;
    batch.metadata_blocks = batch.batch * batch.metadata_columns * places_per_block;
    batch.block_tables = Table(batch.batch * batch.kv_columns, batch.kv_blocks);
    batch.metadata_tables = Table(batch.batch * batch.metadata_columns, batch.metadata_blocks);
    return batch;
  }

  std::mt19937 random_{7};
};

TEST_P(OperatorsTest, QuestPrefillMetadata) {
  const DType dtype = std::get<1>(GetParam());
  for (int round = 0; round < 40; ++round) {
    SetNumThreads(Random(1, 4));
    const Batch c = MakeBatch(round);
    Values keys = MakeCache({c.kv_blocks, c.block_size, c.num_kv_heads, c.head_dim});
    const std::vector<int64_t> metadata_shape = {c.metadata_blocks, c.rows, c.num_kv_heads,
                                                 c.head_dim};
    Values max = MakeCache(metadata_shape);
    Values min = MakeCache(metadata_shape);
    keys.Fill([&] { return SmallInteger(); });
    max.Fill([] { return 100.0f; });
    min.Fill([] { return -100.0f; });
    std::vector<int32_t> metadata_lens;
    for (const int32_t seq_len : c.seq_lens) {
      metadata_lens.push_back(round % 2 == 0 ? 0 : static_cast<int32_t>(Random(0, seq_len)));
    }

    TestTensor tables = TestTensor::Int32({c.batch, c.kv_columns}, c.block_tables);
    TestTensor metadata_tables =
        TestTensor::Int32({c.batch, c.metadata_columns}, c.metadata_tables);
    TestTensor seq_lens = TestTensor::Int32({c.batch}, c.seq_lens);
    TestTensor lens = TestTensor::Int32({c.batch}, metadata_lens);
    const DLTensor lens_view = lens.View();
    QuestPrefillMetadata(keys.View(), tables.View(), seq_lens.View(), metadata_tables.View(),
                         max.View(), min.View(), round % 4 == 0 ? nullptr : &lens_view);

    for (int64_t b = 0; b < c.batch; ++b) {
      const int64_t seq_len = c.seq_lens[static_cast<size_t>(b)];
      const int64_t begin = metadata_lens[static_cast<size_t>(b)] / c.block_size;
      const int64_t num_blocks = (seq_len + c.block_size - 1) / c.block_size;
      for (int64_t j = begin; j < num_blocks || (j > begin && j % c.rows != 0); ++j) {
        // Behind the last block only rows of a metadata block whose row 0 was written.
        if (j >= num_blocks && j - j % c.rows < begin) continue;
        const int64_t row_block =
            c.metadata_tables[static_cast<size_t>(b * c.metadata_columns + j / c.rows)];
        for (int64_t n = 0; n < c.num_kv_heads; ++n) {
          for (int64_t d = 0; d < c.head_dim; ++d) {
            float highest = j < num_blocks ? -1000.0f : 0.0f;
            float lowest = j < num_blocks ? 1000.0f : 0.0f;
            for (int64_t t = j * c.block_size; t < std::min((j + 1) * c.block_size, seq_len); ++t) {
              const int64_t kv_block = c.block_tables[static_cast<size_t>(b * c.kv_columns + j)];
              const float key = keys.At({kv_block, t % c.block_size, n, d});
              highest = std::max(highest, key);
              lowest = std::min(lowest, key);
            }
            max.Expect({row_block, j % c.rows, n, d}, highest);
            min.Expect({row_block, j % c.rows, n, d}, lowest);
          }
        }
      }
    }
    ASSERT_TRUE(max.HoldsValues(dtype)) << "round " << round;
    ASSERT_TRUE(min.HoldsValues(dtype)) << "round " << round;
  }
}

// A call that reads much stores its rows in another way than one that reads little: the bits must
// be the same, whether the rows are whole cache lines or not. The table names few blocks many
// times.
TEST_P(OperatorsTest, LargePassesStoreWhatSmallOnesDo) {
  const DType dtype = std::get<1>(GetParam());
  const int64_t item = TypeOf(dtype).bits / 8;
  const int64_t block_size = 256 / item;
  constexpr int64_t kPool = 10, kHeads = 2, kRows = 4;
  const std::vector<int64_t> num_blocks = {300, 201, 222};
  const int64_t columns = num_blocks[0], metadata_columns = columns / kRows;
  const auto batch = static_cast<int64_t>(num_blocks.size());
  SetNumThreads(3);
  for (const int64_t head_dim : {64, 48}) {
    for (const int64_t first : {0, 1}) {  // elements before the metadata
      TestTensor keys(TypeOf(dtype), {kPool, block_size, kHeads, head_dim});
      for (int64_t i = 0; i < kPool * block_size * kHeads * head_dim; ++i) {
        keys.Set(i, SmallInteger());
      }
      std::vector<int32_t> table;
      for (int64_t i = 0; i < batch * columns; ++i) {
        table.push_back(static_cast<int32_t>(Random(0, kPool - 1)));
      }
      std::vector<int32_t> lens;
      lens.reserve(num_blocks.size());
      for (const int64_t count : num_blocks) {
        lens.push_back(static_cast<int32_t>(count * block_size - Random(0, block_size - 1)));
      }
      TestTensor tables = TestTensor::Int32({batch, columns}, table);
      TestTensor metadata_tables = TestTensor::Int32(
          {batch, metadata_columns}, Table(batch * metadata_columns, batch * metadata_columns));
      TestTensor seq_lens = TestTensor::Int32({batch}, lens);

      // Requests [begin, end), into pools of their own.
      const auto update = [&](TestTensor& max, TestTensor& min, int64_t begin, int64_t end) {
        std::vector<DLTensor> views = {tables.View(), seq_lens.View(), metadata_tables.View()};
        std::vector<std::vector<int64_t>> shapes = {
            {end - begin, columns}, {end - begin}, {end - begin, metadata_columns}};
        for (size_t i = 0; i < views.size(); ++i) {
          views[i].shape = shapes[i].data();
          views[i].byte_offset = static_cast<uint64_t>(begin * views[i].strides[0] * 4);
        }
        std::vector<int64_t> shape = {batch * metadata_columns, kRows, kHeads, head_dim};
        DLTensor max_view = max.View();
        DLTensor min_view = min.View();
        for (DLTensor* view : {&max_view, &min_view}) {
          view->shape = shape.data();
          view->byte_offset = static_cast<uint64_t>(first * item);
        }
        QuestPrefillMetadata(keys.View(), views[0], views[1], views[2], max_view, min_view);
      };
      const std::vector<int64_t> pool = {batch * metadata_columns + 1, kRows, kHeads, head_dim};
      TestTensor max(TypeOf(dtype), pool, 0xAB), min(TypeOf(dtype), pool, 0xAB);
      TestTensor max_by_one(TypeOf(dtype), pool, 0xAB), min_by_one(TypeOf(dtype), pool, 0xAB);
      update(max, min, 0, batch);
      for (int64_t b = 0; b < batch; ++b) update(max_by_one, min_by_one, b, b + 1);
      EXPECT_EQ(max.bytes(), max_by_one.bytes()) << head_dim << " from " << first;
      EXPECT_EQ(min.bytes(), min_by_one.bytes()) << head_dim << " from " << first;
    }
  }
}

// More scores than one thread selects from at once, beside requests with few and with none.
TEST_P(OperatorsTest, SelectsFromLongRequests) {
  const DType dtype = std::get<1>(GetParam());
  constexpr int64_t kHeads = 4, kRows = 64, kDim = 8, kK = 20;
  const std::vector<int32_t> lens = {4097, 0, 3, 6000, 40};  // blocks of one token
  const auto batch = static_cast<int64_t>(lens.size());
  const int64_t columns = (6000 - 1) / kRows + 1;
  std::vector<int32_t> table(static_cast<size_t>(batch * columns));
  std::iota(table.begin(), table.end(), 0);
  Values query(dtype, {batch, kHeads, kDim}, {0, 1, 2}, 0);
  Values blocks(dtype, {batch * columns, kRows, kHeads, kDim}, {0, 1, 2, 3}, 0);
  query.Fill([] { return 1.0f; });
  blocks.Fill([&] { return SmallInteger(); });
  TestTensor tables = TestTensor::Int32({batch, columns}, table);
  TestTensor seq_lens = TestTensor::Int32({batch}, lens);
  QuestBlockSelectPagedOptions options;
  options.block_size = 1;
  for (const int64_t threads : {1, 3}) {
    SetNumThreads(threads);
    TestTensor out(kInt32, {batch, kHeads, kK}, 0xAB);
    QuestBlockSelectPaged(query.View(), blocks.View(), blocks.View(), tables.View(),
                          seq_lens.View(), out.View(), options);
    for (int64_t row = 0; row < batch * kHeads; ++row) {
      const int64_t b = row / kHeads;
      std::vector<std::pair<float, int32_t>> ranked;
      for (int32_t j = 0; j < lens[static_cast<size_t>(b)]; ++j) {
        float score = 0.0f;
        for (int64_t d = 0; d < kDim; ++d) {
          score += blocks.At({b * columns + j / kRows, j % kRows, row % kHeads, d});
        }
        ranked.emplace_back(-score, j);
      }
      std::sort(ranked.begin(), ranked.end());
      for (int64_t i = 0; i < kK; ++i) {
        const bool exists = i < static_cast<int64_t>(ranked.size());
        ASSERT_EQ(out.data<int32_t>()[row * kK + i],
                  exists ? ranked[static_cast<size_t>(i)].second : -1)
            << "row " << row << ", rank " << i << ", threads " << threads;
      }
    }
  }
}

TEST_P(OperatorsTest, QuestBlockSelectPagedAndTables) {
  const DType dtype = std::get<1>(GetParam());
  for (int round = 0; round < 40; ++round) {
    SetNumThreads(Random(1, 4));
    const Batch c = MakeBatch(round);
    Values query(dtype, {c.batch, c.group * c.num_kv_heads, c.head_dim}, {0, 1, 2},
                 Random(0, 1) * 8);
    const std::vector<int64_t> metadata_shape = {c.metadata_blocks, c.rows, c.num_kv_heads,
                                                 c.head_dim};
    Values max = MakeCache(metadata_shape);
    Values min = MakeCache(metadata_shape);
    // Multiples of the group size have an exact mean.
    query.Fill([&] { return static_cast<float>(c.group) * std::min(SmallInteger(), 2.0f); });
    max.Fill([&] { return SmallInteger(); });
    min.Fill([&] { return SmallInteger(); });
    const int64_t k = Random(1, 15);
    const int64_t since = Random(-1, 3 * c.block_size);

    TestTensor metadata_tables =
        TestTensor::Int32({c.batch, c.metadata_columns}, c.metadata_tables);
    TestTensor seq_lens = TestTensor::Int32({c.batch}, c.seq_lens);
    TestTensor out(kInt32, {c.batch, c.num_kv_heads, k}, 0xAB);
    QuestBlockSelectPagedOptions options;
    options.tokens_since_metadata_update = since;
    options.block_size = c.block_size;
    QuestBlockSelectPaged(query.View(), max.View(), min.View(), metadata_tables.View(),
                          seq_lens.View(), out.View(), options);

    std::vector<int32_t> expected;
    for (int64_t b = 0; b < c.batch; ++b) {
      const int64_t seq_len = c.seq_lens[static_cast<size_t>(b)];
      const int64_t num_blocks = (seq_len + c.block_size - 1) / c.block_size;
      const int64_t window =
          since < 0 ? num_blocks : std::max<int64_t>(seq_len - since, 0) / c.block_size;
      for (int64_t n = 0; n < c.num_kv_heads; ++n) {
        // Rank by (class, score), a stable sort keeps equal ones in the order they came in.
        std::vector<std::tuple<int, float, int32_t>> ranked;
        for (int64_t j = num_blocks; j-- > window;) ranked.emplace_back(2, 0.0f, j);
        for (int64_t j = 0; j < window; ++j) {
          const int64_t row_block =
              c.metadata_tables[static_cast<size_t>(b * c.metadata_columns + j / c.rows)];
          float score = 0.0f;
          for (int64_t d = 0; d < c.head_dim; ++d) {
            float q = 0.0f;
            for (int64_t h = 0; h < c.group; ++h) q += query.At({b, n * c.group + h, d});
            q /= static_cast<float>(c.group);
            score += std::max(q * max.At({row_block, j % c.rows, n, d}),
                              q * min.At({row_block, j % c.rows, n, d}));
          }
          ranked.emplace_back(since >= 0 && j == 0 ? 1 : 0, score, j);
        }
        std::stable_sort(ranked.begin(), ranked.end(), [](const auto& x, const auto& y) {
          return std::tie(std::get<0>(x), std::get<1>(x)) >
                 std::tie(std::get<0>(y), std::get<1>(y));
        });
        for (int64_t i = 0; i < k; ++i) {
          const bool exists = i < static_cast<int64_t>(ranked.size());
          expected.push_back(exists ? std::get<2>(ranked[static_cast<size_t>(i)]) : -1);
        }
      }
    }
    ASSERT_EQ(std::vector<int32_t>(out.data<int32_t>(), out.data<int32_t>() + expected.size()),
              expected)
        << "round " << round;

    TestTensor block_tables = TestTensor::Int32({c.batch, c.kv_columns}, c.block_tables);
    TestTensor tables(kInt32, {c.batch, c.num_kv_heads, k}, 0xAB);
    TestTensor lens(kInt32, {c.batch, c.num_kv_heads}, 0xAB);
    SelectedBlockTables(out.View(), block_tables.View(), seq_lens.View(), c.block_size,
                        tables.View(), lens.View());
    for (int64_t row = 0; row < c.batch * c.num_kv_heads; ++row) {
      const int64_t b = row / c.num_kv_heads;
      std::vector<int32_t> blocks(expected.begin() + row * k, expected.begin() + (row + 1) * k);
      blocks.erase(std::remove(blocks.begin(), blocks.end(), -1), blocks.end());
      std::sort(blocks.begin(), blocks.end());
      int64_t num_tokens = 0;
      for (int32_t& block : blocks) {
        num_tokens +=
            std::min(c.block_size, c.seq_lens[static_cast<size_t>(b)] - block * c.block_size);
        block = c.block_tables[static_cast<size_t>(b * c.kv_columns + block)];
      }
      blocks.resize(static_cast<size_t>(k), -1);
      const int32_t* row_of_tables = tables.data<int32_t>() + row * k;
      EXPECT_EQ(std::vector<int32_t>(row_of_tables, row_of_tables + k), blocks);
      EXPECT_EQ(lens.data<int32_t>()[row], num_tokens);
    }
  }
}

// Logits so far apart that all but the tokens with the largest vanish: results are means of values.
TEST_P(OperatorsTest, PagedSelectAttention) {
  const DType dtype = std::get<1>(GetParam());
  const double tolerance = dtype == DType::kFloat32 ? 1e-5 : dtype == DType::kFloat16 ? 5e-3 : 4e-2;
  // That many units of log(2), so that logits in these are exact too.
  const double scale = 256 * std::log(2.0);
  for (int round = 0; round < 16; ++round) {
    Batch c = MakeBatch(round);
    if (round % 8 == 5) {  // blocks that are cut
      c.block_size = 1100;
      for (int32_t& seq_len : c.seq_lens) {
        seq_len = static_cast<int32_t>(Random(0, c.kv_columns * c.block_size));
      }
    }
    const int64_t heads = c.group * c.num_kv_heads;
    const int64_t k = Random(1, std::min<int64_t>(c.kv_columns + 3, 12));
    const std::vector<int64_t> cache = {c.kv_blocks, c.block_size, c.num_kv_heads, c.head_dim};
    Values query(dtype, {c.batch, heads, c.head_dim}, {0, 1, 2}, Random(0, 1) * Random(1, 9));
    Values keys = MakeCache(cache);
    Values values = MakeCache(cache);
    for (Values* filled : {&query, &keys, &values}) filled->Fill([&] { return SmallInteger(); });
    std::vector<int32_t> selected;
    for (int64_t row = 0; row < c.batch * c.num_kv_heads; ++row) {
      const int64_t seq_len = c.seq_lens[static_cast<size_t>(row / c.num_kv_heads)];
      for (int64_t i = 0; i < k; ++i) {
        const int64_t last = (seq_len + c.block_size - 1) / c.block_size - 1;
        selected.push_back(static_cast<int32_t>(Random(-1, last)));
      }
    }
    TestTensor tables = TestTensor::Int32({c.batch, c.kv_columns}, c.block_tables);
    TestTensor seq_lens = TestTensor::Int32({c.batch}, c.seq_lens);
    TestTensor indices = TestTensor::Int32({c.batch, c.num_kv_heads, k}, selected);
    PagedSelectAttentionOptions options;
    options.scale = scale;
    const auto attend = [&](TestTensor& out, TestTensor& lse) {
      const DLTensor lse_view = lse.View();
      options.lse = &lse_view;
      PagedSelectAttention(query.View(), keys.View(), values.View(), tables.View(), seq_lens.View(),
                           indices.View(), out.View(), options);
    };
    TestTensor out(TypeOf(dtype), {c.batch, heads, c.head_dim}, 0xAB);
    TestTensor lse(TypeOf(DType::kFloat32), {c.batch, heads}, 0xAB);
    SetNumThreads(1);
    attend(out, lse);
    TestTensor other_out(TypeOf(dtype), {c.batch, heads, c.head_dim}, 0xCD);
    TestTensor other_lse(TypeOf(DType::kFloat32), {c.batch, heads}, 0xCD);
    SetNumThreads(Random(2, 5));
    attend(other_out, other_lse);
    ASSERT_EQ(out.bytes(), other_out.bytes()) << "round " << round;
    ASSERT_EQ(lse.bytes(), other_lse.bytes()) << "round " << round;

    for (int64_t row = 0; row < c.batch * heads; ++row) {
      const int64_t b = row / heads;
      const int64_t n = row % heads / c.group;
      double best = 0;
      double count = 0;
      std::vector<double> sums(static_cast<size_t>(c.head_dim));
      for (int64_t i = 0; i < k; ++i) {
        const int64_t j = selected[static_cast<size_t>((b * c.num_kv_heads + n) * k + i)];
        const int64_t left = c.seq_lens[static_cast<size_t>(b)] - j * c.block_size;
        for (int64_t t = 0; j >= 0 && t < std::min(left, c.block_size); ++t) {
          const int64_t place = c.block_tables[static_cast<size_t>(b * c.kv_columns + j)];
          double logit = 0;
          for (int64_t d = 0; d < c.head_dim; ++d) {
            logit += double{query.At({b, row % heads, d})} * double{keys.At({place, t, n, d})};
          }
          if (count > 0 && logit < best) continue;
          if (count == 0 || logit > best) {
            best = logit;
            count = 0;
            std::fill(sums.begin(), sums.end(), 0.0);
          }
          ++count;
          for (int64_t d = 0; d < c.head_dim; ++d) {
            sums[static_cast<size_t>(d)] += double{values.At({place, t, n, d})};
          }
        }
      }
      for (int64_t d = 0; d < c.head_dim; ++d) {
        const double mean = count == 0 ? 0 : sums[static_cast<size_t>(d)] / count;
        ASSERT_NEAR(out.Get(row * c.head_dim + d), mean, tolerance) << "round " << round;
      }
      const double expected = scale * best + std::log(count);
      if (count == 0) {
        ASSERT_EQ(double{lse.Get(row)}, expected);
      } else {
        ASSERT_NEAR(lse.Get(row), expected, 1e-5 * (std::fabs(expected) + 1));
      }
    }
  }
}

// One request of blocks that differ in one channel only; q = 1 everywhere.
TEST_P(OperatorsTest, InfinitiesAndNaNRankWhereTheyBelong) {
  const DType dtype = std::get<1>(GetParam());
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  constexpr int64_t kHeadDim = 70;  // a whole number of vectors and a rest, on most targets
  const std::vector<float> first_channel = {0.0f, -inf, inf, nan, 1.0f, -nan, -1.0f};
  const auto num_blocks = static_cast<int64_t>(first_channel.size()) + 1;
  for (const int64_t channel : {int64_t{0}, kHeadDim - 1}) {
    TestTensor query(TypeOf(dtype), {1, 1, kHeadDim});
    TestTensor blocks(TypeOf(dtype), {1, num_blocks, 1, kHeadDim});
    for (int64_t d = 0; d < kHeadDim; ++d) {
      query.Set(d, 1.0f);
      blocks.Set(d, 32768.0f);  // block 0: large in every channel, the sum above what one can hold
    }
    for (int64_t j = 1; j < num_blocks; ++j) {
      blocks.Set(j * kHeadDim + channel, first_channel[static_cast<size_t>(j - 1)]);
    }
    TestTensor table = TestTensor::Int32({1, 1}, {0});
    TestTensor seq_lens = TestTensor::Int32({1}, {static_cast<int32_t>(num_blocks * num_blocks)});
    TestTensor out(kInt32, {1, 1, num_blocks});
    QuestBlockSelectPaged(query.View(), blocks.View(), blocks.View(), table.View(), seq_lens.View(),
                          out.View());
    EXPECT_EQ(std::vector<int32_t>(out.data<int32_t>(), out.data<int32_t>() + num_blocks),
              (std::vector<int32_t>{4, 6, 3, 0, 5, 1, 7, 2}));
  }
}

std::string TestName(const testing::TestParamInfo<OperatorsTest::ParamType>& info) {
  const auto& [target, dtype] = info.param;
  return target + (dtype == DType::kFloat16    ? "Float16"
                   : dtype == DType::kBFloat16 ? "BFloat16"
                                               : "Float32");
}

INSTANTIATE_TEST_SUITE_P(Targets, OperatorsTest,
                         testing::Combine(testing::ValuesIn(SimdTargets()),
                                          testing::Values(DType::kFloat16, DType::kBFloat16,
                                                          DType::kFloat32)),
                         TestName);

}  // namespace
}  // namespace select_attn
