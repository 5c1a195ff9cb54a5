// What the Ascend backend does not do, as texts for the caller; null where it does. A text is valid
// until the thread's next one.

#ifndef SELECT_ATTN_OPS_ASCEND_LIMITS_H_
#define SELECT_ATTN_OPS_ASCEND_LIMITS_H_

#include <cstdint>
#include <string>
#include <utility>

#include "ascend/arguments.h"

namespace select_attn::ascend {

inline const char* Keep(std::string text) {
  thread_local std::string kept;
  kept = std::move(text);
  return kept.c_str();
}

inline const char* UnsupportedHeadDim(int64_t head_dim) {
  if (head_dim % kHeadDimStep == 0 && head_dim <= kMostHeadDim) return nullptr;
  return Keep("the ascend backend needs a head dim that is a multiple of " +
              std::to_string(kHeadDimStep) + " and at most " + std::to_string(kMostHeadDim) +
              ", got " + std::to_string(head_dim));
}

inline const char* UnsupportedK(int64_t k) {
  if (k <= kMostK) return nullptr;
  return Keep("the ascend backend needs k to be at most " + std::to_string(kMostK) + ", got " +
              std::to_string(k));
}

inline const char* UnsupportedBlocks(int64_t blocks_per_request) {
  if (blocks_per_request <= kMostBlocksPerRequest) return nullptr;
  return Keep("the ascend backend needs block_tables to have at most " +
              std::to_string(kMostBlocksPerRequest) + " columns, got " +
              std::to_string(blocks_per_request));
}

}  // namespace select_attn::ascend

#endif  // SELECT_ATTN_OPS_ASCEND_LIMITS_H_
