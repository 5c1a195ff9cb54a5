// Sorting. Pairs of a score and a 32-bit index take 8 bytes, whatever the score's type; they are in
// descending order of the score. Among equal scores the one that came first stays first, and of two
// lists that are merged the first one's: an assumption, as is where NaN goes. Nothing says whether
// -0 equals +0; here it comes behind, so that kernels cannot count on either.

#ifndef SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_SORT_H_
#define SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_SORT_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "scalar_arithmetic.h"
#include "vector_engine.h"

namespace AscendC {

struct MrgSort4Info {
  MrgSort4Info() = default;
  MrgSort4Info(const uint16_t lengths[4], bool suspends, uint16_t valid, uint16_t repeats)
      : ifExhaustedSuspension(suspends),
        validBit(valid),
        repeatTimes(static_cast<uint8_t>(repeats)) {
    std::copy_n(lengths, 4, elementLengths);
    ascend_emulator::Check(repeats <= 255, "MrgSort: more than 255 repeats");
  }

  uint16_t elementLengths[4] = {0, 0, 0, 0};
  bool ifExhaustedSuspension = false;
  uint16_t validBit = 0;
  uint8_t repeatTimes = 1;
};

template <typename T>
struct MrgSortSrcList {
  MrgSortSrcList() = default;
  MrgSortSrcList(const LocalTensor<T>& first, const LocalTensor<T>& second,
                 const LocalTensor<T>& third, const LocalTensor<T>& fourth)
      : src1(first), src2(second), src3(third), src4(fourth) {}

  LocalTensor<T> src1;
  LocalTensor<T> src2;
  LocalTensor<T> src3;
  LocalTensor<T> src4;
};

}  // namespace AscendC

namespace ascend_emulator {

constexpr uint64_t kPairBytes = 8;
constexpr uint64_t kIndexOffset = 4;

template <typename T>
struct ScorePair {
  T score;
  uint32_t index;
};

template <typename T>
ScorePair<T> PairFrom(const uint8_t* bytes) {
  ScorePair<T> pair;
  std::memcpy(&pair.score, bytes, sizeof(T));
  std::memcpy(&pair.index, bytes + kIndexOffset, sizeof(pair.index));
  return pair;
}
template <typename T>
void PutPair(uint8_t* bytes, const ScorePair<T>& pair) {
  std::memset(bytes, 0, kPairBytes);
  std::memcpy(bytes, &pair.score, sizeof(T));
  std::memcpy(bytes + kIndexOffset, &pair.index, sizeof(pair.index));
}

template <typename T>
bool RanksBelow(T a, T b) {
  if (!Equal(a, b)) return Less(a, b);
  return std::signbit(static_cast<float>(a)) && !std::signbit(static_cast<float>(b));
}

inline void CheckSortRepeats(const char* name, int64_t repeats) {
  if (repeats < 0 || repeats > kMostRepeats) {
    Fail(std::string(name) + ": " + std::to_string(repeats) + " repeats, there may be 0 to 255");
  }
}

template <typename T>
void CheckApart(const char* name, const Operand<T>& dst, uint64_t dst_bytes, const Operand<T>& src,
                uint64_t src_bytes) {
  if (dst.address < src.address + src_bytes && src.address < dst.address + dst_bytes) {
    Fail(std::string(name) + ": dst and src overlap");
  }
}

// Merges lists of pairs; with suspension until one is exhausted. Adds to `taken` what of each list
// was used.
template <typename T>
std::vector<ScorePair<T>> MergedLists(const std::vector<std::vector<ScorePair<T>>>& lists,
                                      bool suspends, uint32_t taken[4]) {
  std::vector<size_t> next(lists.size(), 0);
  std::vector<ScorePair<T>> merged;
  const auto is_done = [&](size_t l) { return next[l] == lists[l].size(); };
  while (true) {
    size_t best = lists.size();
    bool exhausted = false;
    for (size_t l = 0; l < lists.size(); ++l) {
      if (is_done(l)) {
        exhausted = exhausted || !lists[l].empty();
      } else if (best == lists.size() ||
                 RanksBelow(lists[best][next[best]].score, lists[l][next[l]].score)) {
        best = l;
      }
    }
    if (best == lists.size() || (suspends && exhausted)) break;
    merged.push_back(lists[best][next[best]++]);
  }
  for (size_t l = 0; l < lists.size(); ++l) taken[l] += static_cast<uint32_t>(next[l]);
  return merged;
}

template <typename T>
void RunMergeSort(const char* name, const AscendC::LocalTensor<T>& dst_tensor,
                  const AscendC::MrgSortSrcList<T>& sources, const AscendC::MrgSort4Info& info,
                  uint32_t taken[4]) {
  static_assert(kIsOneOf<T, half, float>, "MrgSort: the chip has no such type");
  constexpr uint16_t kMostPairs = 4095;
  const std::string prefix = std::string(name) + ": ";
  size_t num_lists = 0;
  if (info.validBit == 0b11) num_lists = 2;
  if (info.validBit == 0b111) num_lists = 3;
  if (info.validBit == 0b1111) num_lists = 4;
  if (num_lists == 0) Fail(prefix + "validBit must be 3, 7 or 15");

  const AscendC::LocalTensor<T> tensors[4] = {sources.src1, sources.src2, sources.src3,
                                              sources.src4};
  uint64_t pairs = 0;
  for (size_t l = 0; l < num_lists; ++l) {
    if (info.elementLengths[l] > kMostPairs) Fail(prefix + "a list of more than 4095 pairs");
    pairs += info.elementLengths[l];
  }
  if (info.repeatTimes > 1) {
    if (num_lists != 4 || info.ifExhaustedSuspension) {
      Fail(prefix + "repeats need four lists and no suspension");
    }
    for (uint32_t l = 1; l < 4; ++l) {
      if (info.elementLengths[l] != info.elementLengths[0] ||
          tensors[l].address() != tensors[0].address() + l * info.elementLengths[0] * kPairBytes) {
        Fail(prefix + "repeats need four lists of one length, one behind the other");
      }
    }
  }

  const uint64_t bytes = pairs * info.repeatTimes * kPairBytes;
  VectorInstruction instruction(name,
                                static_cast<int64_t>((bytes + kRepeatBytes - 1) / kRepeatBytes));
  const Operand<T> dst("dst", dst_tensor, 1, 8);
  instruction.CheckOperand(dst, kBlockBytes);
  for (uint64_t repeat = 0; repeat < info.repeatTimes; ++repeat) {
    std::vector<std::vector<ScorePair<T>>> lists(num_lists);
    for (size_t l = 0; l < num_lists; ++l) {
      const Operand<T> src("src", tensors[l], 1, 8);
      instruction.CheckOperand(src, kPairBytes);
      const uint64_t length = info.elementLengths[l];
      if (length == 0) continue;
      CheckApart(name, dst, bytes, src, (repeat * pairs + length) * kPairBytes);
      const uint8_t* at = instruction.Read(src, repeat * pairs * kPairBytes, length * kPairBytes);
      for (uint64_t i = 0; i < length; ++i) lists[l].push_back(PairFrom<T>(at + i * kPairBytes));
    }
    const std::vector<ScorePair<T>> merged = MergedLists(lists, info.ifExhaustedSuspension, taken);
    if (merged.empty()) continue;
    uint8_t* to = instruction.Write(dst, repeat * pairs * kPairBytes, merged.size() * kPairBytes);
    for (size_t i = 0; i < merged.size(); ++i) PutPair(to + i * kPairBytes, merged[i]);
  }
}

}  // namespace ascend_emulator

namespace AscendC {

// Sorts 32 scores per repeat, each with its index.
template <typename T>
void Sort32(const LocalTensor<T>& dst_tensor, const LocalTensor<T>& score_tensor,
            const LocalTensor<uint32_t>& index_tensor, int32_t repeats) {
  using namespace ascend_emulator;  // NOLINT
  static_assert(kIsOneOf<T, half, float>, "Sort32: the chip has no such type");
  constexpr uint64_t kPairs = 32;
  CheckSortRepeats("Sort32", repeats);
  const Operand<T> dst("dst", dst_tensor, 1, 8);
  const Operand<T> scores("src0", score_tensor, 1, 8);
  const Operand<uint32_t> indices("src1", index_tensor, 1, 8);
  VectorInstruction instruction("Sort32", repeats);
  instruction.CheckOperand(dst, kPairs * kPairBytes);
  instruction.CheckOperand(scores, kPairs * sizeof(T));
  instruction.CheckOperand(indices, kPairs * sizeof(uint32_t));
  for (uint64_t repeat = 0; repeat < static_cast<uint64_t>(repeats); ++repeat) {
    const uint8_t* score =
        instruction.Read(scores, repeat * kPairs * sizeof(T), kPairs * sizeof(T));
    const uint8_t* index = instruction.Read(indices, repeat * kPairs * 4, kPairs * 4);
    ScorePair<T> pairs[kPairs];
    for (size_t i = 0; i < kPairs; ++i) {
      std::memcpy(&pairs[i].score, score + i * sizeof(T), sizeof(T));
      std::memcpy(&pairs[i].index, index + i * 4, 4);
    }
    std::stable_sort(pairs, pairs + kPairs, [](const ScorePair<T>& a, const ScorePair<T>& b) {
      return RanksBelow(b.score, a.score);
    });
    uint8_t* to = instruction.Write(dst, repeat * kPairs * kPairBytes, kPairs * kPairBytes);
    for (size_t i = 0; i < kPairs; ++i) PutPair(to + i * kPairBytes, pairs[i]);
  }
}

template <typename T>
void MrgSort(const LocalTensor<T>& dst, const MrgSortSrcList<T>& sources,
             const MrgSort4Info& info) {
  uint32_t taken[4] = {};
  ascend_emulator::RunMergeSort("MrgSort", dst, sources, info, taken);
}
// Also tells how many pairs of each list were used.
template <typename T, bool isExhaustedSuspension = false>
void MrgSort(const LocalTensor<T>& dst, const MrgSortSrcList<T>& sources, const uint16_t lengths[4],
             uint32_t sorted[4], uint16_t valid, int32_t repeats) {
  std::fill_n(sorted, 4, 0);
  ascend_emulator::RunMergeSort(
      "MrgSort", dst, sources,
      MrgSort4Info(lengths, isExhaustedSuspension, valid, static_cast<uint16_t>(repeats)), sorted);
}

// On this chip Sort takes the scores as they are.
template <typename T>
void Concat(LocalTensor<T>& concat, const LocalTensor<T>& src, const LocalTensor<T>& /*tmp*/,
            int32_t repeats) {
  ascend_emulator::CheckSortRepeats("Concat", repeats);
  concat = src;
}

// Groups of 32 scores, or all of them. Merges are counted as one instruction per level of four.
template <typename T, bool isFullSort>
void Sort(const LocalTensor<T>& dst, const LocalTensor<T>& concat,
          const LocalTensor<uint32_t>& index, const LocalTensor<T>& tmp, int32_t repeats) {
  using namespace ascend_emulator;  // NOLINT
  Sort32(dst, concat, index, repeats);
  if (!isFullSort || repeats <= 1) return;
  const uint64_t bytes = static_cast<uint64_t>(repeats) * 32 * kPairBytes;
  const Operand<T> target("dst", dst, 1, 8);
  const Operand<T> scratch("tmp", tmp, 1, 8);
  std::vector<ScorePair<T>> pairs;
  Core().ordering.Barrier(PIPE_V);  // the API puts its own barriers
  for (int64_t lists = repeats; lists > 1; lists = (lists + 3) / 4) {
    VectorInstruction instruction("Sort", repeats);
    instruction.CheckOperand(scratch, kBlockBytes);
    if (pairs.empty()) {
      const uint8_t* from = instruction.Read(target, 0, bytes);
      for (uint64_t i = 0; i < bytes; i += kPairBytes) pairs.push_back(PairFrom<T>(from + i));
      std::stable_sort(pairs.begin(), pairs.end(),
                       [](const ScorePair<T>& a, const ScorePair<T>& b) {
                         return RanksBelow(b.score, a.score);
                       });
    }
    instruction.Write(scratch, 0, bytes);
    uint8_t* to = instruction.Write(target, 0, bytes);
    for (size_t i = 0; i < pairs.size(); ++i) PutPair(to + i * kPairBytes, pairs[i]);
    Core().ordering.Barrier(PIPE_V);
  }
}

// Takes 32 pairs per repeat apart.
template <typename T>
void Extract(const LocalTensor<T>& value_tensor, const LocalTensor<uint32_t>& index_tensor,
             const LocalTensor<T>& sorted_tensor, int32_t repeats) {
  using namespace ascend_emulator;  // NOLINT
  static_assert(kIsOneOf<T, half, float>, "Extract: the chip has no such type");
  CheckSortRepeats("Extract", repeats);
  const Operand<T> values("dstValue", value_tensor, 1, 8);
  const Operand<uint32_t> indices("dstIndex", index_tensor, 1, 8);
  const Operand<T> sorted("sorted", sorted_tensor, 1, 8);
  VectorInstruction instruction("Extract", repeats);
  instruction.CheckOperand(values, kBlockBytes);
  instruction.CheckOperand(indices, kBlockBytes);
  instruction.CheckOperand(sorted, kBlockBytes);
  for (uint64_t i = 0; i < static_cast<uint64_t>(repeats) * 32; ++i) {
    instruction.Move(values, i * sizeof(T), sorted, i * kPairBytes, sizeof(T));
    instruction.Move(indices, i * sizeof(uint32_t), sorted, i * kPairBytes + kIndexOffset,
                     sizeof(uint32_t));
  }
}

}  // namespace AscendC

#endif  // SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_SORT_H_
