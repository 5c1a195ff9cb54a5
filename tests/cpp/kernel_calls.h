// Calls of the device backends' kernels for their tests on emulators: paged pools, batches that may
// be hostile, and what the contract says a call must do with them.

#ifndef SELECT_ATTN_OPS_TESTS_KERNEL_CALLS_H_
#define SELECT_ATTN_OPS_TESTS_KERNEL_CALLS_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "select_attn_ops/quest_block_select_paged.h"
#include "select_attn_ops/quest_prefill_metadata.h"
#include "select_attn_ops/selected_block_tables.h"
#include "test_tensor.h"

namespace select_attn {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

inline int64_t ElementBytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline std::string DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return "Float16";
    case DType::kBFloat16:
      return "BFloat16";
    case DType::kFloat32:
      return "Float32";
  }
  return {};
}

// Rows of head_dim elements, [blocks, rows, heads], in one of the layouts of paged caches.
struct Pool {
  Pool(DType dtype, int64_t num_blocks, int64_t num_rows, int64_t num_heads, int64_t head_dim,
       bool heads_outside = false, int64_t gap = 0, int64_t first = 0)
      : offset(first),
        element_bytes(ElementBytes(dtype)),
        tensor(TypeOf(dtype), {first + num_blocks * num_rows * num_heads * (head_dim + gap)}) {
    const int64_t row = head_dim + gap;
    strides[0] = num_rows * num_heads * row;
    strides[1] = heads_outside ? row : num_heads * row;
    strides[2] = heads_outside ? num_rows * row : row;
    values.resize(static_cast<size_t>(tensor.shape()[0]));
  }

  // Of an element, in the order of the memory.
  int64_t Index(int64_t block, int64_t row, int64_t head, int64_t d) const {
    return offset + block * strides[0] + row * strides[1] + head * strides[2] + d;
  }
  float& At(int64_t block, int64_t row, int64_t head, int64_t d) {
    return values[static_cast<size_t>(Index(block, row, head, d))];
  }
  // Copies the values into memory.
  void Store() {
    for (size_t i = 0; i < values.size(); ++i) tensor.Set(static_cast<int64_t>(i), values[i]);
  }
  void* data() { return tensor.data<char>() + offset * element_bytes; }

  int64_t offset, element_bytes;
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

inline QuestPrefillMetadataParams MetadataParams(const Batch& c, DType dtype, bool update,
                                                 Pool& keys, Pool& max, Pool& min) {
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
  p.dtype = dtype;
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

// Without a workspace. `out` becomes the result's memory.
inline QuestBlockSelectPagedParams SelectParams(const Batch& c, DType dtype, int64_t group,
                                                int64_t k, Pool& query, Pool& max, Pool& min,
                                                std::vector<int32_t>& out) {
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
  p.dtype = dtype;
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
  out.assign(static_cast<size_t>(c.batch * c.heads * k), -77);
  p.selected_indices = out.data();
  p.selected_indices_strides[0] = c.heads * k;
  p.selected_indices_strides[1] = k;
  return p;
}

// The lists of quest_block_select_paged, [batch, heads, k], in float64.
inline std::vector<int32_t> ExpectedSelection(const Batch& c, const QuestBlockSelectPagedParams& p,
                                              Pool& query, Pool& max, Pool& min) {
  const int64_t group = p.num_heads / p.num_kv_heads;
  const bool forces = p.metadata_seq_lens != nullptr || p.tokens_since_metadata_update >= 0;
  std::vector<int32_t> expected;
  expected.reserve(static_cast<size_t>(c.batch * c.heads * p.k));
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
inline void ExpectMetadata(const Batch& c, bool update, Pool& keys, Pool& max, Pool& min) {
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

inline void ExpectStored(Pool& pool, const std::string& what) {
  for (size_t i = 0; i < pool.values.size(); ++i) {
    const float got = pool.tensor.Get(static_cast<int64_t>(i));
    const float expected = pool.values[i];
    ASSERT_TRUE(got == expected || (std::isnan(got) && std::isnan(expected)))
        << what << ", element " << i << ": " << got << " for " << expected;
  }
}

// Rows of int32 as a slice of wider rows, with a gap before the first and behind each.
class WideTable {
 public:
  static constexpr int32_t kUntouched = 123456789;

  WideTable(const std::vector<int32_t>& table, int64_t rows, int64_t columns, int64_t gap)
      : stride(columns + gap),
        rows_(rows),
        columns_(columns),
        memory_(static_cast<size_t>(1 + rows * stride), kUntouched) {
    for (int64_t i = 0; i < rows; ++i) {
      std::copy_n(table.begin() + i * columns, columns, memory_.begin() + 1 + i * stride);
    }
  }

  int32_t* data() { return memory_.data() + 1; }

  // The rows, one behind the other. Nothing may have written to the gaps.
  std::vector<int32_t> Rows() const {
    std::vector<int32_t> rows;
    rows.reserve(static_cast<size_t>(rows_ * columns_));
    for (int64_t at = -1; at < rows_ * stride; ++at) {
      const int32_t value = memory_[static_cast<size_t>(at + 1)];
      if (at >= 0 && at % stride < columns_) {
        rows.push_back(value);
      } else {
        EXPECT_EQ(value, kUntouched) << "in the gap at " << at;
      }
    }
    return rows;
  }

  const int64_t stride;

 private:
  int64_t rows_, columns_;
  std::vector<int32_t> memory_;
};

// What a batch may be, where backends differ.
struct BatchLimits {
  int64_t dim_step;
  int64_t most_block_size;
  int64_t many_requests;  // of a batch that is large
};

class RandomCalls {
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

  // In any layout; `step` elements keep rows aligned.
  Pool MakePool(DType dtype, int64_t step, int64_t blocks, int64_t rows, int64_t heads,
                int64_t dim) {
    const bool aligned = Random(0, 1) == 0;
    return {dtype,
            blocks,
            rows,
            heads,
            dim,
            Random(0, 1) == 1,
            aligned ? step * Random(0, 2) : Random(1, 9),
            aligned ? 0 : Random(0, 3)};
  }

  Batch MakeBatch(const BatchLimits& limits, bool hostile) {
    Batch c;
    c.hostile = hostile;
    const bool is_large = Sometimes();
    c.batch = is_large ? limits.many_requests : Random(1, 4);
    c.heads = Random(1, 3);
    const int64_t usual_steps = 128 / limits.dim_step;
    c.dim = limits.dim_step *
            (Sometimes() ? Random(usual_steps + 1, 2 * usual_steps) : Random(1, usual_steps));
    c.block_size = Random(0, 3) == 0 ? Random(20, limits.most_block_size) : Random(1, 9);
    c.rows = Random(0, 1) == 0 ? c.block_size : Random(1, 7);
    const int64_t most_blocks = is_large ? 2 : Random(1, 2000 / c.dim);
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

  // Inside a wider table, whose other entries no call may read.
  WideTable Widen(const std::vector<int32_t>& table, int64_t rows, int64_t columns) {
    return {table, rows, columns, Random(0, 3)};
  }

  std::mt19937 random_{11};
};

// Random calls of selected_block_tables, whose result is what exists of the selection, sorted.
inline void CheckSelectedBlockTables(
    int rounds, int64_t most_k,
    const std::function<const char*(const SelectedBlockTablesParams&)>& run) {
  std::mt19937 random(3);
  const auto number = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  for (int round = 0; round < rounds; ++round) {
    const int64_t batch = number(1, 5), heads = number(1, 3);
    const int64_t k = round == 7 ? most_k : number(1, 70);
    const int64_t block_size = number(1, 9), columns = number(1, 60);
    std::vector<int32_t> selected(static_cast<size_t>(batch * heads * k));
    for (int32_t& j : selected) j = static_cast<int32_t>(number(-2, columns + 2));
    std::vector<int32_t> tables(static_cast<size_t>(batch * columns));
    for (int32_t& entry : tables) {
      entry = static_cast<int32_t>(number(0, 4) == 0 ? number(-3, -1) : number(0, 900));
    }
    std::vector<int32_t> seq_lens(static_cast<size_t>(batch));
    for (int32_t& length : seq_lens) {
      length = static_cast<int32_t>(number(-3, columns * block_size + 5));
    }
    const int64_t num_rows = batch * heads;
    WideTable wide_selected(selected, num_rows, k, number(0, 3));
    WideTable wide_tables(tables, batch, columns, number(0, 3));
    WideTable wide_out(std::vector<int32_t>(selected.size(), -77), num_rows, k, number(0, 3));
    WideTable wide_lens(std::vector<int32_t>(static_cast<size_t>(num_rows), -77), batch, heads,
                        number(0, 3));
    SelectedBlockTablesParams p = {};
    p.batch = batch;
    p.num_kv_heads = heads;
    p.k = k;
    p.block_size = block_size;
    p.max_kv_blocks_per_request = columns;
    p.selected_indices = wide_selected.data();
    p.selected_indices_strides[0] = heads * wide_selected.stride;
    p.selected_indices_strides[1] = wide_selected.stride;
    p.block_tables = wide_tables.data();
    p.block_tables_stride = wide_tables.stride;
    p.seq_lens = seq_lens.data();
    p.tables = wide_out.data();
    p.tables_strides[0] = heads * wide_out.stride;
    p.tables_strides[1] = wide_out.stride;
    p.lens = wide_lens.data();
    p.lens_stride = wide_lens.stride;
    ASSERT_STREQ(run(p), nullptr);
    const std::vector<int32_t> out = wide_out.Rows();
    const std::vector<int32_t> lens = wide_lens.Rows();
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

}  // namespace select_attn

#endif  // SELECT_ATTN_OPS_TESTS_KERNEL_CALLS_H_
