// Selects blocks through the installed library, and gets one call wrong on purpose.

#include <select_attn_ops/error.h>
#include <select_attn_ops/quest_block_select_paged.h>
#include <select_attn_ops/runtime.h>

#include <cstdint>
#include <cstdio>
#include <vector>

namespace {

struct Tensor {
  std::vector<int64_t> shape;
  DLTensor view = {};

  Tensor(void* data, DLDataType type, std::vector<int64_t> extents) : shape(std::move(extents)) {
    view.data = data;
    view.device = {kDLCPU, 0};
    view.ndim = static_cast<int32_t>(shape.size());
    view.dtype = type;
    view.shape = shape.data();
  }
};

}  // namespace

int main() {
  constexpr DLDataType kFloat = {kDLFloat, 32, 1};
  constexpr DLDataType kInt = {kDLInt, 32, 1};
  std::vector<float> query = {1.0f, 1.0f};
  std::vector<float> metadata = {1, 1, 3, 3, 2, 2, 0, 0};  // four rows of two channels
  std::vector<int32_t> table = {0};
  std::vector<int32_t> seq_lens = {12};
  std::vector<int32_t> selected(4, 99);

  Tensor q(query.data(), kFloat, {1, 1, 2});
  Tensor blocks(metadata.data(), kFloat, {1, 4, 1, 2});
  Tensor tables(table.data(), kInt, {1, 1});
  Tensor lens(seq_lens.data(), kInt, {1});
  Tensor out(selected.data(), kInt, {1, 1, 4});
  select_attn::QuestBlockSelectPaged(q.view, blocks.view, blocks.view, tables.view, lens.view,
                                     out.view);
  std::printf("%s: %d %d %d %d\n", select_attn::Version(), selected[0], selected[1], selected[2],
              selected[3]);

  seq_lens[0] = 17;
  try {
    select_attn::QuestBlockSelectPaged(q.view, blocks.view, blocks.view, tables.view, lens.view,
                                       out.view);
  } catch (const select_attn::Error& error) {
    std::printf("%s: %s\n", error.KindName(), error.what());
  }
  return 0;
}
