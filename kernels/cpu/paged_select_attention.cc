// CPU backend of paged_select_attention, compiled once per SIMD target by foreach_target.h.
//
// The selected blocks of every (request, KV head) are cut into chunks of about kChunkTokens tokens,
// which the threads take one after the other: one request keeps all of them busy. A chunk's keys
// and values are read once for all query heads that share them. Where a request and KV head has
// several chunks, the thread that finishes the last of them merges all, in their order. This file
// says what is done in which order; attention-inl.h has the arithmetic.

#include "select_attn_ops/paged_select_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#include "core/block_ranges.h"
#include "cpu/backend.h"
#include "cpu/parallel.h"
#include "cpu/prefetch.h"
#include "cpu/stopwatch.h"
#include "cpu/upcoming.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/paged_select_attention.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// After foreach_target.h
#include "cpu/attention-inl.h"
#include "hwy/aligned_allocator.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace select_attn::cpu {
namespace HWY_NAMESPACE {
namespace {

using FloatBuffer = hwy::AlignedFreeUniquePtr<float[]>;

FloatBuffer AllocateFloats(int64_t count) {
  // Highway refuses to allocate nothing.
  auto buffer = hwy::AllocateAligned<float>(static_cast<size_t>(std::max<int64_t>(count, 1)));
  if (buffer == nullptr) throw std::bad_alloc();
  return buffer;
}

template <typename T>
class Attention {
 public:
  explicit Attention(const PagedSelectAttentionParams& p)
      : p_(p),
        group_(p.num_heads / p.num_kv_heads),
        blocks_per_chunk_(std::max<int64_t>(kChunkTokens / p.block_size, 1)),
        chunks_per_block_((p.block_size + kChunkTokens - 1) / kChunkTokens) {
    for (int64_t row = 0; row < p.batch * p.num_kv_heads; ++row) AddChunks(row);
    states_ = AllocateFloats(num_states_ * StateSize());
  }

  void Run() {
    std::vector<std::atomic<int64_t>> chunks_left(rows_.size());
    for (size_t row = 0; row < rows_.size(); ++row) chunks_left[row] = rows_[row].num_chunks;
    const bool reads_only = ReadsOnly();
    ParallelTake(static_cast<int64_t>(chunks_.size()), 1, [&](RangeQueue& queue) {
      const FloatBuffer scratch = AllocateFloats(Softmax<T>::ScratchSize(group_, p_.head_dim));
      Softmax<T> softmax(group_, p_.head_dim, scratch.get());
      ChunkReader reader(*this, queue);
      Upcoming<Tile> upcoming(kTilesAhead);
      for (;; upcoming.Advance()) {
        while (upcoming.wants_more()) {
          Tile tile;
          if (reader.Next(tile)) {
            upcoming.Push(tile);
          } else {
            upcoming.End();
          }
        }
        if (upcoming.empty()) break;
        const Tile& tile = upcoming[0];
        if (tile.is_first) Start(*tile.chunk, softmax);
        if (HWY_UNLIKELY(reads_only)) {
          softmax.Read(tile.tokens, upcoming[1].tokens, upcoming[2].tokens);
        } else {
          softmax.Add(tile.tokens, upcoming[1].tokens, upcoming[2].tokens);
        }
        if (tile.is_last) Finish(*tile.chunk, softmax, chunks_left);
      }
    });
  }

 private:
  // Tokens of a chunk, about. Longer blocks are cut.
  static constexpr int64_t kChunkTokens = 1024;
  static constexpr int64_t kTilesAhead = 2;

  // A request and KV head.
  struct Row {
    int64_t num_chunks;
    int64_t first_state;  // of those that its chunks leave, if there are several
  };

  // Of the blocks in slots [first_slot, end_slot) of a row the tokens in [first_token, end_token).
  struct Chunk {
    int64_t row;
    int64_t first_slot;
    int64_t end_slot;
    int64_t first_token;
    int64_t end_token;
    int64_t number;  // of the row's
  };

  struct Tile {
    const Chunk* chunk;
    bool is_first;  // of the chunk
    bool is_last;
    TokenTile<T> tokens;
  };

  int64_t StateSize() const { return Softmax<T>::StateSize(group_, p_.head_dim); }

  const int32_t* Selected(int64_t row) const {
    return p_.selected_indices + row / p_.num_kv_heads * p_.selected_indices_strides[0] +
           row % p_.num_kv_heads * p_.selected_indices_strides[1];
  }

  // Whether a chunk has any tokens.
  bool HasTokens(const Chunk& chunk) const {
    const int32_t* selected = Selected(chunk.row);
    const int64_t b = chunk.row / p_.num_kv_heads;
    return std::any_of(selected + chunk.first_slot, selected + chunk.end_slot, [&](int32_t j) {
      return j >= 0 && NumTokens(p_, b, j) > chunk.first_token;
    });
  }

  // Cuts a row into chunks, and writes the result where there are none. The boundaries depend on
  // block_size alone, so that neither the batch nor the threads show in the result.
  void AddChunks(int64_t row) {
    int64_t num_chunks = 0;
    for (int64_t slot = 0; slot < p_.k; slot += blocks_per_chunk_) {
      for (int64_t part = 0; part < chunks_per_block_; ++part) {
        const int64_t first_token = chunks_per_block_ > 1 ? part * kChunkTokens : 0;
        const int64_t end_token =
            chunks_per_block_ > 1 ? first_token + kChunkTokens : p_.block_size;
        const Chunk chunk = {row,         slot,      std::min(slot + blocks_per_chunk_, p_.k),
                             first_token, end_token, num_chunks};
        // Behind a part without tokens, the block has no more.
        if (!HasTokens(chunk)) break;
        chunks_.push_back(chunk);
        ++num_chunks;
      }
    }
    rows_.push_back({num_chunks, num_states_});
    if (num_chunks > 1) num_states_ += num_chunks;
    if (num_chunks == 0) WriteNothingSelected(row);
  }

  T* Out(int64_t row) const {
    return static_cast<T*>(p_.out) + row / p_.num_kv_heads * p_.out_strides[0] +
           row % p_.num_kv_heads * group_ * p_.out_strides[1];
  }

  float* Lse(int64_t row) const {
    if (p_.lse == nullptr) return nullptr;
    return p_.lse + row / p_.num_kv_heads * p_.lse_stride + row % p_.num_kv_heads * group_;
  }

  void WriteNothingSelected(int64_t row) const {
    T* out = Out(row);
    for (int64_t g = 0; g < group_; ++g) {
      std::memset(static_cast<void*>(out + g * p_.out_strides[1]), 0,
                  static_cast<size_t>(p_.head_dim) * sizeof(T));
    }
    if (float* lse = Lse(row)) {
      std::fill_n(lse, group_, -std::numeric_limits<float>::infinity());
    }
  }

  // A walk through the tokens of a chunk.
  class TokenCursor {
   public:
    TokenCursor() = default;

    // At the first token of `chunk`, which has some.
    TokenCursor(const Attention& attention, const Chunk& chunk)
        : attention_(&attention), chunk_(&chunk), slot_(chunk.first_slot) {
      EnterBlock();
    }

    // Whether the end has been reached.
    bool done() const { return left_ == 0; }

    // Goes on by `count` tokens, which must not lead beyond the end.
    void Skip(int64_t count) {
      for (; count >= left_ && count > 0; EnterBlock()) count -= left_;
      if (count > 0) Advance(count);
    }

    // Goes on to the next block. Returns the tokens that were left of this one.
    int64_t SkipBlock() {
      const int64_t count = left_;
      EnterBlock();
      return count;
    }

    // Says where the token's key and value lie, and goes on to the next.
    HWY_INLINE void Take(const T*& key, const T*& value) {
      key = key_;
      value = value_;
      Advance(1);
      if (left_ == 0) EnterBlock();
    }

   private:
    HWY_INLINE void Advance(int64_t count) {
      key_ += count * attention_->p_.k_cache_strides[1];
      value_ += count * attention_->p_.v_cache_strides[1];
      left_ -= count;
    }

    // Turns to the next block of the chunk that has tokens, if there is one.
    HWY_NOINLINE void EnterBlock() {
      const PagedSelectAttentionParams& p = attention_->p_;
      const int64_t b = chunk_->row / p.num_kv_heads;
      const int64_t n = chunk_->row % p.num_kv_heads;
      const int32_t* selected = attention_->Selected(chunk_->row);
      left_ = 0;
      while (left_ == 0 && slot_ < chunk_->end_slot) {
        const int64_t j = selected[slot_++];
        if (j < 0) continue;
        const int64_t end = std::min(NumTokens(p, b, j), chunk_->end_token);
        if (end <= chunk_->first_token) continue;
        const int64_t block = p.block_tables[b * p.block_tables_stride + j];
        key_ = At(p.k_cache, p.k_cache_strides, block, n);
        value_ = At(p.v_cache, p.v_cache_strides, block, n);
        left_ = end - chunk_->first_token;
      }
    }

    // The chunk's first token of a block and KV head.
    const T* At(const void* cache, const int64_t* strides, int64_t block, int64_t n) const {
      return static_cast<const T*>(cache) + block * strides[0] + chunk_->first_token * strides[1] +
             n * strides[2];
    }

    const Attention* attention_ = nullptr;
    const Chunk* chunk_ = nullptr;
    int64_t slot_ = 0;        // the next one
    int64_t left_ = 0;        // tokens of the block that are still to come
    const T* key_ = nullptr;  // of the next token
    const T* value_ = nullptr;
  };

  // The tokens of the chunks that a thread takes, tile after tile. A tile has tokens of all parts
  // of its chunk in turn. What a chunk has beyond whole tiles comes last.
  class ChunkReader {
   public:
    ChunkReader(const Attention& attention, RangeQueue& queue)
        : attention_(attention), queue_(queue) {}

    // False, and nothing written, where no chunk is left. Tiles end with their chunk.
    bool Next(Tile& tile) {
      tile.is_first = tokens_left_ == 0;
      if (tile.is_first && !NextChunk()) return false;
      tile.chunk = chunk_;
      TokenTile<T>& tokens = tile.tokens;
      if (tokens_left_ >= kTileTokens) {
        tokens.count = kTileTokens;
        for (int64_t t = 0; t < kTileTokens; t += kParts) {
          for (int64_t i = 0; i < kParts; ++i) {
            parts_[i].Take(tokens.keys[t + i], tokens.values[t + i]);
          }
        }
      } else {
        tokens.count = tokens_left_;
        for (int64_t t = 0; t < tokens.count; ++t) {
          parts_[kParts - 1].Take(tokens.keys[t], tokens.values[t]);
        }
      }
      tokens_left_ -= tokens.count;
      tile.is_last = tokens_left_ == 0;
      std::fill(tokens.keys + tokens.count, tokens.keys + kTileTokens,
                tokens.keys[tokens.count - 1]);
      std::fill(tokens.values + tokens.count, tokens.values + kTileTokens,
                tokens.values[tokens.count - 1]);
      return true;
    }

   private:
    static constexpr int64_t kParts = kPlacesInTurn;
    static_assert(kTileTokens % kParts == 0);

    bool NextChunk() {
      Range number;
      if (!queue_.Take(number)) return false;
      chunk_ = &attention_.chunks_[static_cast<size_t>(number.begin)];
      TokenCursor cursor(attention_, *chunk_);
      parts_[0] = cursor;
      while (!cursor.done()) tokens_left_ += cursor.SkipBlock();
      const int64_t part = tokens_left_ / kTileTokens * (kTileTokens / kParts);
      for (int64_t i = 1; i < kParts; ++i) {
        parts_[i] = parts_[i - 1];
        parts_[i].Skip(part);
      }
      return true;
    }

    const Attention& attention_;
    RangeQueue& queue_;
    const Chunk* chunk_ = nullptr;
    int64_t tokens_left_ = 0;    // of the chunk
    TokenCursor parts_[kParts];  // the last goes on beyond its part
  };

  void Start(const Chunk& chunk, Softmax<T>& softmax) const {
    const T* query = static_cast<const T*>(p_.query) +
                     chunk.row / p_.num_kv_heads * p_.query_strides[0] +
                     chunk.row % p_.num_kv_heads * group_ * p_.query_strides[1];
    constexpr double kLog2OfE = 1.44269504088896340736;
    softmax.Start(query, p_.query_strides[1], static_cast<float>(p_.scale * kLog2OfE));
  }

  void Finish(const Chunk& chunk, Softmax<T>& softmax,
              std::vector<std::atomic<int64_t>>& chunks_left) const {
    softmax.End();
    const auto index = static_cast<size_t>(chunk.row);
    const Row& row = rows_[index];
    if (row.num_chunks > 1) {
      float* states = states_.get() + row.first_state * StateSize();
      softmax.Save(states + chunk.number * StateSize());
      if (--chunks_left[index] > 0) return;
      softmax.Merge(states, row.num_chunks);
    }
    softmax.Finish(Out(chunk.row), p_.out_strides[1], Lse(chunk.row));
  }

  const PagedSelectAttentionParams& p_;
  const int64_t group_;  // query heads per KV head
  const int64_t blocks_per_chunk_;
  const int64_t chunks_per_block_;
  std::vector<Chunk> chunks_;  // row after row, those without tokens left out
  std::vector<Row> rows_;      // [batch * num_kv_heads]
  int64_t num_states_ = 0;
  FloatBuffer states_;  // [num_states, StateSize()]
};

void Run(const PagedSelectAttentionParams& p) {
  switch (p.dtype) {
    case DType::kFloat16:
      return Attention<hwy::float16_t>(p).Run();
    case DType::kBFloat16:
      return Attention<hwy::bfloat16_t>(p).Run();
    case DType::kFloat32:
      return Attention<float>(p).Run();
  }
}

}  // namespace
// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace select_attn::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace select_attn::cpu {

HWY_EXPORT(Run);

// Dispatches once per call, so the choice of target costs nothing inside the loops.
void PagedSelectAttention(const PagedSelectAttentionParams& p) { HWY_DYNAMIC_DISPATCH(Run)(p); }

}  // namespace select_attn::cpu
#endif  // HWY_ONCE
