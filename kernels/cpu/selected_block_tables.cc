// CPU backend of selected_block_tables.

#include "select_attn_ops/selected_block_tables.h"

#include <algorithm>

#include "core/block_ranges.h"
#include "cpu/backend.h"
#include "cpu/parallel.h"

namespace select_attn::cpu {
namespace {

void WriteRow(const SelectedBlockTablesParams& p, int64_t b, int64_t n) {
  const int32_t* selected =
      p.selected_indices + b * p.selected_indices_strides[0] + n * p.selected_indices_strides[1];
  const int32_t* table = p.block_tables + b * p.block_tables_stride;
  int32_t* out = p.tables + b * p.tables_strides[0] + n * p.tables_strides[1];

  int32_t* end = std::copy_if(selected, selected + p.k, out, [](int32_t j) { return j >= 0; });
  std::sort(out, end);
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
    for (int64_t row = begin; row < end; ++row) {
      WriteRow(p, row / p.num_kv_heads, row % p.num_kv_heads);
    }
  });
}

}  // namespace select_attn::cpu
