// Compiled once per SIMD target by foreach_target.h: how fast memory can be read depends on the
// width of the vectors.

#include "cpu/read_memory.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <string>

#include "core/arguments.h"
#include "cpu/memory_rows.h"
#include "cpu/parallel.h"
#include "cpu/prefetch.h"
#include "select_attn_ops/runtime.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/read_memory.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// After foreach_target.h
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace select_attn::cpu {
namespace HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

using DU8 = hn::ScalableTag<uint8_t>;
using VU8 = hn::Vec<DU8>;

HWY_INLINE int64_t VectorBytes() { return static_cast<int64_t>(hn::Lanes(DU8())); }

// Bytes from `at` to where a vector may be loaded.
HWY_INLINE int64_t BytesToAligned(const uint8_t* at) {
  return -static_cast<int64_t>(reinterpret_cast<uintptr_t>(at)) & (VectorBytes() - 1);
}

// Fewer bytes than a vector has, zeros behind them.
HWY_INLINE VU8 LoadPart(const uint8_t* from, int64_t count) {
  HWY_ALIGN uint8_t padded[hn::MaxLanes(DU8())] = {};
  std::memcpy(padded, from, static_cast<size_t>(count));
  return hn::Load(DU8(), padded);
}

// What no loop over whole vectors of all streams gets: heads, tails, rows of odd bytes.
HWY_INLINE void ReadRest(const uint8_t* from, int64_t count, VU8& bits) {
  const int64_t head = std::min(BytesToAligned(from), count);
  if (head > 0) bits = hn::Or(bits, LoadPart(from, head));
  int64_t i = head;
  for (; i + VectorBytes() <= count; i += VectorBytes()) {
    bits = hn::Or(bits, hn::Load(DU8(), from + i));
  }
  if (i < count) bits = hn::Or(bits, LoadPart(from + i, count - i));
}

enum class Prefetch { kNone, kNear, kNearAndFar };

// The longest part of the next `count` bytes of every stream that is whole groups of vectors, in
// turn a group of each. Returns its length.
template <int kStreams, Prefetch kPrefetch>
HWY_INLINE int64_t ReadVectors(const MemoryCursor* cursors, int64_t count, int64_t near,
                               int64_t far, VU8& bits) {
  const DU8 d;
  const int64_t vector = VectorBytes();
  const int64_t group = 4 * vector;
  const uint8_t* from[kStreams];
  for (int s = 0; s < kStreams; ++s) from[s] = cursors[s].at();
  auto a = hn::Zero(d);  // four sums, because one would wait on itself
  auto b = hn::Zero(d);
  auto c = hn::Zero(d);
  int64_t i = 0;
  for (; i + group <= count; i += group) {
    for (int s = 0; s < kStreams; ++s) {
      const uint8_t* at = from[s] + i;
      if (kPrefetch != Prefetch::kNone) {
        for (int64_t line = 0; line < group; line += kCacheLine) {
          PrefetchToL1(at + near + line);
          if (kPrefetch == Prefetch::kNearAndFar) PrefetchToL2(at + far + line);
        }
      }
      a = hn::Or(a, hn::Load(d, at));
      b = hn::Or(b, hn::Load(d, at + vector));
      c = hn::Or(c, hn::Load(d, at + 2 * vector));
      bits = hn::Or(bits, hn::Load(d, at + 3 * vector));
    }
  }
  bits = hn::Or(hn::Or(a, b), hn::Or(c, bits));
  return i;
}

template <int kStreams, Prefetch kPrefetch>
void ReadStreams(MemoryCursor* cursors, int64_t near, int64_t far, VU8& bits) {
  for (;;) {
    int64_t count = cursors[0].run();
    const int64_t to_aligned = BytesToAligned(cursors[0].at());
    bool alike = true;
    for (int s = 1; s < kStreams; ++s) {
      count = std::min(count, cursors[s].run());
      alike = alike && BytesToAligned(cursors[s].at()) == to_aligned;
    }
    if (count == 0) break;
    int64_t done = 0;
    if (alike && to_aligned == 0) {
      done = ReadVectors<kStreams, kPrefetch>(cursors, count, near, far, bits);
    }
    if (done == 0) {
      done = alike && to_aligned > 0 ? std::min(count, to_aligned) : count;
      for (int s = 0; s < kStreams; ++s) ReadRest(cursors[s].at(), done, bits);
    }
    for (int s = 0; s < kStreams; ++s) cursors[s].Advance(done);
  }
  // Streams are of about the same length only.
  for (int s = 0; s < kStreams; ++s) {
    for (MemoryCursor& cursor = cursors[s]; cursor.run() > 0; cursor.Advance(cursor.run())) {
      ReadRest(cursor.at(), cursor.run(), bits);
    }
  }
}

template <int kStreams>
VU8 ReadStreams(MemoryCursor* cursors, int64_t near, int64_t far) {
  auto bits = hn::Zero(DU8());
  if (near == 0) {
    ReadStreams<kStreams, Prefetch::kNone>(cursors, 0, 0, bits);
  } else if (far == 0) {
    ReadStreams<kStreams, Prefetch::kNear>(cursors, near, 0, bits);
  } else {
    ReadStreams<kStreams, Prefetch::kNearAndFar>(cursors, near, far, bits);
  }
  return bits;
}

uint8_t ReadCursors(MemoryCursor* cursors, int64_t num_streams, int64_t near, int64_t far) {
  auto bits = hn::Zero(DU8());
  switch (num_streams) {
    case 1:
      bits = ReadStreams<1>(cursors, near, far);
      break;
    case 2:
      bits = ReadStreams<2>(cursors, near, far);
      break;
    case 4:
      bits = ReadStreams<4>(cursors, near, far);
      break;
    case 8:
      bits = ReadStreams<8>(cursors, near, far);
      break;
  }
  HWY_ALIGN uint8_t lanes[hn::MaxLanes(DU8())];
  hn::Store(bits, DU8(), lanes);
  uint8_t all = 0;
  for (int64_t i = 0; i < VectorBytes(); ++i) all |= lanes[i];
  return all;
}

}  // namespace
// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace select_attn::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace select_attn {
namespace cpu {
namespace {

HWY_EXPORT(ReadCursors);

constexpr int64_t kMaxStreams = 8;

// Part i of n of [begin, end), which `rows` decides where to cut.
int64_t Cut(const MemoryRows& rows, int64_t begin, int64_t end, int64_t i, int64_t n) {
  if (i == n) return end;
  const int64_t size = end - begin;
  return std::max(rows.CutBefore(begin + size / n * i + size % n * i / n), begin);
}

class Reader {
 public:
  Reader(const std::vector<const DLTensor*>& tensors, const ReadVariant& variant)
      : variant_(variant) {
    for (const DLTensor* tensor : tensors) rows_.push_back(MemoryRows::Of(*tensor));
    CheckVariant();
  }

  uint8_t Read() const {
    if (rows_.empty()) return 0;
    int64_t size = 0;
    for (const MemoryRows& rows : rows_) size += rows.size();
    const int64_t num_chunks =
        variant_.chunk_bytes == 0 ? NumThreads() : (size - 1) / variant_.chunk_bytes + 1;
    std::atomic<uint8_t> bits{0};
    ParallelFor(num_chunks, 1, [&](int64_t chunk, int64_t /*end*/) {
      bits.fetch_or(ReadChunk(chunk, num_chunks), std::memory_order_relaxed);
    });
    return bits.load(std::memory_order_relaxed);
  }

 private:
  void CheckVariant() const {
    const auto num_tensors = static_cast<int64_t>(rows_.size());
    const int64_t streams = variant_.streams;
    if (streams != 1 && streams != 2 && streams != 4 && streams != 8) {
      ThrowValueError("streams must be 1, 2, 4 or 8, got " + std::to_string(streams));
    }
    const int64_t least =
        std::min({variant_.prefetch_bytes, variant_.far_prefetch_bytes, variant_.chunk_bytes});
    if (least < 0) {
      ThrowValueError("bytes must be at least 0, got " + std::to_string(least));
    }
    if (!variant_.side_by_side || rows_.empty()) return;
    if (streams % num_tensors != 0) {
      ThrowValueError("streams must be a multiple of the " + std::to_string(num_tensors) +
                      " tensors to be read side by side, got " + std::to_string(streams));
    }
    for (const MemoryRows& rows : rows_) {
      if (!rows.IsLike(rows_.front())) {
        ThrowValueError("tensors to be read side by side must be alike in shape and strides");
      }
    }
  }

  uint8_t ReadChunk(int64_t chunk, int64_t num_chunks) const {
    std::array<MemoryCursor, kMaxStreams> cursors;
    const auto num_tensors = static_cast<int64_t>(rows_.size());
    const int64_t streams_each =
        variant_.side_by_side ? variant_.streams / num_tensors : variant_.streams;
    uint8_t bits = 0;
    int64_t next = 0;
    for (const MemoryRows& rows : rows_) {
      const int64_t begin = Cut(rows, 0, rows.size(), chunk, num_chunks);
      const int64_t end = Cut(rows, 0, rows.size(), chunk + 1, num_chunks);
      for (int64_t s = 0; s < streams_each; ++s) {
        cursors[static_cast<size_t>(next++)] =
            MemoryCursor(rows, Cut(rows, begin, end, s, streams_each),
                         Cut(rows, begin, end, s + 1, streams_each));
      }
      if (next == variant_.streams) {
        bits |= HWY_DYNAMIC_DISPATCH(ReadCursors)(cursors.data(), next, variant_.prefetch_bytes,
                                                  variant_.far_prefetch_bytes);
        next = 0;
      }
    }
    return bits;
  }

  ReadVariant variant_;
  std::vector<MemoryRows> rows_;
};

}  // namespace
}  // namespace cpu

uint8_t ReadMemory(const std::vector<const DLTensor*>& tensors, const ReadVariant& variant) {
  SimdTarget();  // heeds SELECT_ATTN_SIMD_TARGET even if this is the first call
  return cpu::Reader(tensors, variant).Read();
}

}  // namespace select_attn
#endif  // HWY_ONCE
