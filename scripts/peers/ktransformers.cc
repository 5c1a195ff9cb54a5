// C functions around the block selection of ktransformers, for the benchmark (bench/peers.py).
//
// What ktransformers offers as a function goes on with attention over its own cache, and what is
// wanted here is the selection alone. So this calls the parts of `KVCache` that select, which are
// private: it is compiled with -fno-access-control.

#include <cstdint>
#include <memory>

#include "cpu_backend/backend.h"
#include "operators/kvcache/kvcache.h"

// ggml's, which widens float16 by table; the rest of ggml is not linked.
extern "C" float ggml_table_f32_f16[1 << 16];
float ggml_table_f32_f16[1 << 16];

namespace {

struct Selector {
  Selector(const KVCacheConfig& config, int num_threads) : cache(config), threads(num_threads) {
    for (int bits = 0; bits < 1 << 16; ++bits) {
      ggml_table_f32_f16[bits] = GGML_COMPUTE_FP16_TO_FP32(static_cast<ggml_fp16_t>(bits));
    }
  }

  KVCache cache;
  int threads;
};

}  // namespace

extern "C" {

// A cache of `num_blocks` blocks whose summaries, "anchors", are a maximum and a minimum per head,
// for requests of up to `width` blocks. Its blocks have one token each, and there are no more
// tokens than `width`: the selection reads none, and depends on neither.
void* ktransformers_create(int batch, int width, int num_heads, int head_dim, int num_blocks,
                           int num_threads) {
  KVCacheConfig config;
  config.layer_num = 1;
  config.kv_head_num = num_heads;
  config.q_head_num = num_heads;
  config.head_dim = head_dim;
  config.block_len = 1;
  config.anchor_num = 2;
  config.kv_type = GGML_TYPE_F16;
  config.max_block_num = width;
  config.max_batch_size = batch;
  config.max_thread_num = num_threads;
  config.anchor_type = QUEST;
  config.retrieval_type = KVHEAD;
  config.layer_step = 1;
  config.token_step = 1;
  config.layer_offset = 0;
  auto selector = std::make_unique<Selector>(config, num_threads);
  selector->cache.anchor_.resize(static_cast<size_t>(num_blocks) * config.anchor_num * num_heads *
                                 head_dim);
  return selector.release();
}

void ktransformers_destroy(void* selector) { delete static_cast<Selector*>(selector); }

// [num_blocks, 2, num_heads, head_dim], float16, to be filled: maxima and minima.
uint16_t* ktransformers_anchors(void* selector) {
  return static_cast<Selector*>(selector)->cache.anchor_.data();
}

// Selects of the first `lens[b]` blocks of each row of `tables` [batch, width] the first
// `num_first`, the last `num_last`, and the `k` best of the others; `query` is
// [batch, num_heads, head_dim], float16. Writes blocks of the cache,
// [batch, num_heads, num_first + k + num_last].
void ktransformers_select(void* selector, const uint16_t* query, int* tables, int* lens, int batch,
                          int width, int num_first, int num_last, int k, int* out) {
  auto& [cache, threads] = *static_cast<Selector*>(selector);
  // Threads of this call alone: they keep turning for 50 ms after their work, which would be other
  // contenders' time.
  Backend backend(threads);
  cache.attn_initialize_kvhead_(batch, 0, tables, width, lens);
  cache.retrieval_kvcache_kvhead_(query, num_first, num_last, k, /*q_len=*/1,
                                  /*generate_token_idx=*/0, batch, /*layer_idx=*/0, lens, width,
                                  &backend);
  for (int b = 0; b < batch; ++b) {
    for (int head = 0; head < cache.config_.kv_head_num; ++head) {
      for (int i = 0; i < num_first + k + num_last; ++i) {
        *out++ = cache.block_table_after_retrieval_kvhead_[b][i][head];
      }
    }
  }
}
}
