// CPU backend of selected_block_tables.

#include "select_attn_ops/selected_block_tables.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "core/block_ranges.h"
#include "cpu/backend.h"
#include "cpu/parallel.h"

namespace select_attn::cpu {
namespace {

// Sorts block numbers.
class BlockSorter {
 public:
  // The numbers [begin, end) are not negative.
  void Sort(int32_t* begin, int32_t* end) {
    if (begin == end) return;
    const int64_t num_words = *std::max_element(begin, end) / kBits + 1;
    if (!IsWorthMarking(end - begin, num_words) || !Mark(begin, end, num_words)) {
      std::sort(begin, end);
      return;
    }
    for (int64_t i = 0; i < num_words; ++i) {
      uint64_t& word = marks_[static_cast<size_t>(i)];
      for (; word != 0; word &= word - 1) {
        *begin++ = static_cast<int32_t>(i * kBits + __builtin_ctzll(word));
      }
    }
  }

 private:
  static constexpr int64_t kBits = 64;
  static constexpr int64_t kMostWords = 1024;

  // Whether looking through so many words is faster than comparing the numbers, which mispredicts
  // at every other comparison: measured to be so from 1 word per number for 16 of them to 4 or more
  // for 64.
  static bool IsWorthMarking(int64_t count, int64_t num_words) {
    return num_words <= std::min(count * count / 16, kMostWords);
  }

  // Marks every number in a row of bits. False, and nothing is marked, if there is one twice.
  bool Mark(const int32_t* begin, const int32_t* end, int64_t num_words) {
    bool twice = false;
    for (const int32_t* number = begin; number != end; ++number) {
      uint64_t& word = marks_[static_cast<size_t>(*number / kBits)];
      const uint64_t bit = uint64_t{1} << (*number % kBits);
      twice = twice || (word & bit) != 0;
      word |= bit;
    }
    if (twice) std::fill_n(marks_.begin(), num_words, 0);
    return !twice;
  }

  std::array<uint64_t, kMostWords> marks_ = {};
};

void WriteRow(const SelectedBlockTablesParams& p, int64_t b, int64_t n, BlockSorter& sorter) {
  const int32_t* selected =
      p.selected_indices + b * p.selected_indices_strides[0] + n * p.selected_indices_strides[1];
  const int32_t* table = p.block_tables + b * p.block_tables_stride;
  int32_t* out = p.tables + b * p.tables_strides[0] + n * p.tables_strides[1];

  int32_t* end = std::copy_if(selected, selected + p.k, out, [](int32_t j) { return j >= 0; });
  sorter.Sort(out, end);
  int64_t num_tokens = 0;
  for (int32_t* slot = out; slot != end; ++slot) {
    num_tokens += NumTokens(p, b, *slot);
    *slot = table[*slot];
  }
  std::fill(end, out + p.k, -1);
  p.lens[b * p.lens_stride + n] = static_cast<int32_t>(num_tokens);
}

}  // namespace

void SelectedBlockTables(const SelectedBlockTablesParams& p) {
  const int64_t rows_per_range = std::max<int64_t>(4096 / p.k, 1);
  ParallelFor(p.batch * p.num_kv_heads, rows_per_range, [&](int64_t begin, int64_t end) {
    BlockSorter sorter;
    for (int64_t row = begin; row < end; ++row) {
      WriteRow(p, row / p.num_kv_heads, row % p.num_kv_heads, sorter);
    }
  });
}

}  // namespace select_attn::cpu
