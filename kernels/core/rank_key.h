// The total order of scored blocks as one integer: a larger key ranks higher, and no two blocks of
// a request have the same key, so that every backend selects the same blocks in the same order.

#ifndef SELECT_ATTN_OPS_CORE_RANK_KEY_H_
#define SELECT_ATTN_OPS_CORE_RANK_KEY_H_

#include <cstdint>
#include <cstring>

#include "core/block_ranges.h"

namespace select_attn {

// Keeps the order of floats, with -0 equal to +0 and all NaN equal and above +inf. Never 0.
SELECT_ATTN_HOST_DEVICE inline uint32_t ScoreKey(float score) {
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return 0xFFFFFFFFu;  // NaN
  if (magnitude == 0) return 0x80000000u;
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

// The score first, then the smaller number. `block` is in [0, 2^32).
SELECT_ATTN_HOST_DEVICE inline uint64_t RankKey(uint32_t score_key, int64_t block) {
  return static_cast<uint64_t>(score_key) << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(block));
}

SELECT_ATTN_HOST_DEVICE inline int64_t BlockOfRankKey(uint64_t key) {
  return 0xFFFFFFFFu - static_cast<uint32_t>(key);
}

}  // namespace select_attn

#endif  // SELECT_ATTN_OPS_CORE_RANK_KEY_H_
