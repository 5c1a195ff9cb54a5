// The arithmetic of paged_select_attention: the softmax over tokens that come a tile at a time,
// with a running maximum, for all query heads that share a KV head. Included once per SIMD target,
// hence the toggle.

#if defined(SELECT_ATTN_OPS_CPU_ATTENTION_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SELECT_ATTN_OPS_CPU_ATTENTION_INL_H_
#undef SELECT_ATTN_OPS_CPU_ATTENTION_INL_H_
#else
#define SELECT_ATTN_OPS_CPU_ATTENTION_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "cpu/prefetch.h"
#include "cpu/row-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace select_attn::cpu {
namespace HWY_NAMESPACE {

// Tokens of a tile, at most: a multiple of the lanes of every target.
constexpr int64_t kTileTokens = 32;

// Query heads whose sums are kept in registers at a time.
#if HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM
constexpr int kHeadsAtOnce = 4;
#else
constexpr int kHeadsAtOnce = 2;
#endif
// Loads of a row whose sums are kept in registers at a time.
constexpr int kLoadsAtOnce = 2;

// 2 to the power of x <= 0; 0 below 2^-126, NaN of NaN. Off by less than 2 units in the last place.
HWY_INLINE VF Exp2(VF x) {
  const DF df;
  const hn::RebindToSigned<DF> di;
  const auto least = hn::Set(df, -127.0f);
  x = hn::IfThenElse(hn::Lt(x, least), least, x);  // no maximum: what that makes of NaN varies
  const auto whole = hn::NearestInt(x);
  const auto rest = hn::Sub(x, hn::ConvertTo(df, whole));
  // 2^rest = 1 + rest * ..., with the least relative error on [-0.5, 0.5].
  auto power = hn::Set(df, 0.000153533620f);
  power = hn::MulAdd(power, rest, hn::Set(df, 0.00133988750f));
  power = hn::MulAdd(power, rest, hn::Set(df, 0.00961843692f));
  power = hn::MulAdd(power, rest, hn::Set(df, 0.0555033237f));
  power = hn::MulAdd(power, rest, hn::Set(df, 0.240226477f));
  power = hn::MulAdd(power, rest, hn::Set(df, 0.693147182f));
  power = hn::MulAdd(power, rest, hn::Set(df, 1.0f));
  // The exponent's bits of 2^whole; none for -127, which makes 0.
  const auto scale = hn::ShiftLeft<23>(hn::Add(whole, hn::Set(di, 127)));
  return hn::Mul(power, hn::BitCast(df, scale));
}

// Calls fn(0), ..., fn(kCount - 1) with constants: GCC keeps an array of vectors in registers only
// if its indices are constants from the beginning.
template <typename F, int... kIndices>
HWY_INLINE void UnrollOver(F&& fn, std::integer_sequence<int, kIndices...> /*indices*/) {
  (fn(std::integral_constant<int, kIndices>()), ...);
}
template <int kCount, typename F>
HWY_INLINE void Unroll(F&& fn) {
  UnrollOver(fn, std::make_integer_sequence<int, kCount>());
}

// Where the keys and values of a tile's tokens lie. Behind the last of them its place is repeated.
template <typename T>
struct TokenTile {
  int64_t count;  // tokens
  const T* keys[kTileTokens];
  const T* values[kTileTokens];
};

// Rows that are asked for while others are worked on, token by token.
template <typename T>
struct ComingRows {
  const T* const* to_l1;
  const T* const* to_l2;

  // Asks for what belongs to the elements that one Load at d reads.
  HWY_INLINE void Prefetch(int64_t token, int64_t d) const {
    ForEachLine<T>(d, [&](int64_t line) HWY_ATTR {
      PrefetchToL1(to_l1[token] + line);
      PrefetchToL2(to_l2[token] + line);
    });
  }
};

// The running softmax of all query heads that share a KV head, logits in units of log2(e), so that
// powers of 2 do. A head's state is the largest logit so far, the sum of the weights 2^(logit -
// largest), and the sum of the values times these. Logits of -inf have no weight, those of NaN and
// +inf make all of it NaN.
template <typename T>
class Softmax {
 public:
  // Floats of a widened row: whole Loads.
  static int64_t PaddedDim(int64_t head_dim) {
    return (head_dim + LoadSize() - 1) / LoadSize() * LoadSize();
  }

  // Floats that a state of `group` heads takes: what Save copies.
  static int64_t StateSize(int64_t group, int64_t head_dim) {
    return group * (PaddedDim(head_dim) + 2);
  }

  // Floats of scratch, aligned to vectors, for the lifetime of the object.
  static int64_t ScratchSize(int64_t group, int64_t head_dim) {
    return group * (PaddedDim(head_dim) + kTileTokens + Lanes() + 1) + StateSize(group, head_dim);
  }

  Softmax(int64_t group, int64_t head_dim, float* scratch)
      : group_(group),
        head_dim_(head_dim),
        padded_dim_(PaddedDim(head_dim)),
        query_(scratch),
        weights_(query_ + group * padded_dim_),
        totals_(weights_ + group * kTileTokens),
        sums_(totals_ + group * Lanes()),
        largest_(sums_ + group * padded_dim_),
        total_(largest_ + group),
        rescale_(total_ + group) {}

  // Begins with no tokens and the queries of `group` heads times `scale`.
  void Start(const T* query, int64_t head_stride, float scale) {
    const DF df;
    const auto vscale = hn::Set(df, scale);
    ForEachLoad([&](int64_t d, int64_t left) HWY_ATTR {
      for (int64_t g = 0; g < group_; ++g) {
        VF a;
        VF b;
        LoadUpTo(query + g * head_stride + d, left, a, b);
        StorePair(hn::Mul(a, vscale), hn::Mul(b, vscale), query_ + g * padded_dim_ + d);
        StorePair(hn::Zero(df), hn::Zero(df), sums_ + g * padded_dim_ + d);
      }
    });
    // Finite, so that the difference to a logit of -inf is -inf and not NaN.
    std::fill_n(largest_, group_, std::numeric_limits<float>::lowest());
    std::fill_n(totals_, group_ * Lanes(), 0.0f);
  }

  // Adds the tokens of `now`, and asks for those of the two tiles that come next.
  void Add(const TokenTile<T>& now, const TokenTile<T>& next, const TokenTile<T>& after_next) {
    // The first heads ask for the rows, those after them find them asked for.
    const ComingRows<T> values = {now.values, next.values};
    const ComingRows<T> keys = {next.keys, after_next.keys};
    ForEachHeads([&](auto heads, int64_t g) HWY_ATTR {
      return g == 0 ? Score<heads(), true>(now, values, g) : Score<heads(), false>(now, values, g);
    });
    for (int64_t g = 0; g < group_; ++g) Weigh(now.count, g);
    ForEachHeads([&](auto heads, int64_t g) HWY_ATTR {
      return g == 0 ? AddValues<heads(), true>(now, keys, g)
                    : AddValues<heads(), false>(now, keys, g);
    });
  }

  // What a diagnostic run does in place of Add: reads the same, but for what is left behind whole
  // Loads, and leaves a state that means nothing.
  void Read(const TokenTile<T>& now, const TokenTile<T>& next, const TokenTile<T>& after_next) {
    auto bits = hn::Zero(DF());
    const auto read = [&](const T* const* rows, ComingRows<T> coming) HWY_ATTR {
      for (int64_t t = 0; t < now.count; ++t) {
        for (int64_t d = 0; d + LoadSize() <= head_dim_; d += LoadSize()) {
          coming.Prefetch(t, d);
          ReadOnly(rows[t] + d, bits);
        }
      }
    };
    read(now.keys, {now.values, next.values});
    read(now.values, {next.keys, after_next.keys});
    sums_[0] = hn::GetLane(bits);
  }

  // To be called once all tokens are added.
  void End() {
    const DF df;
    for (int64_t g = 0; g < group_; ++g) {
      total_[g] = hn::GetLane(hn::SumOfLanes(df, hn::Load(df, totals_ + g * Lanes())));
    }
  }

  // Copies the state.
  void Save(float* state) const { std::copy_n(sums_, StateSize(group_, head_dim_), state); }

  // Becomes the state of the tokens of `count` states of Save, one after the other in memory.
  void Merge(const float* states, int64_t count) {
    const DF df;
    const int64_t size = StateSize(group_, head_dim_);
    const int64_t largest = group_ * padded_dim_;  // offset in a state
    for (int64_t g = 0; g < group_; ++g) {
      float best = std::numeric_limits<float>::lowest();
      for (int64_t i = 0; i < count; ++i) best = std::max(best, states[i * size + largest + g]);
      float* sums = sums_ + g * padded_dim_;
      std::fill_n(sums, padded_dim_, 0.0f);
      float total = 0;
      for (int64_t i = 0; i < count; ++i) {
        const float* state = states + i * size;
        const float factor = Exp2(state[largest + g] - best);
        const auto vfactor = hn::Set(df, factor);
        const float* from = state + g * padded_dim_;
        for (int64_t d = 0; d < padded_dim_; d += Lanes()) {
          const auto sum = hn::MulAdd(hn::LoadU(df, from + d), vfactor, hn::LoadU(df, sums + d));
          hn::StoreU(sum, df, sums + d);
        }
        total += state[largest + group_ + g] * factor;
      }
      largest_[g] = best;
      total_[g] = total;
    }
  }

  // Writes the weighted means and, unless lse is null, the logarithms of the sums of the weights.
  void Finish(T* out, int64_t head_stride, float* lse) const {
    const DF df;
    ForEachLoad([&](int64_t d, int64_t left) HWY_ATTR {
      for (int64_t g = 0; g < group_; ++g) {
        const auto total = hn::Set(df, total_[g]);
        const float* from = sums_ + g * padded_dim_ + d;
        const auto a = hn::Div(hn::LoadU(df, from), total);
        const auto b = hn::Div(hn::LoadU(df, from + LoadSize() / 2), total);
        T* to = out + g * head_stride + d;
        if (left >= LoadSize()) {
          RowStorer<T>::Store(a, b, to);
        } else {
          StoreTail(a, b, left, to);
        }
      }
    });
    if (lse == nullptr) return;
    constexpr double kLogOf2 = 0.693147180559945309417;
    for (int64_t g = 0; g < group_; ++g) {
      // The logarithm of no weight at all is -inf.
      lse[g] = static_cast<float>(kLogOf2 * (double{largest_[g]} + std::log2(double{total_[g]})));
    }
  }

 private:
  template <int kNumber>
  using Constant = std::integral_constant<int, kNumber>;

  static int64_t Lanes() { return static_cast<int64_t>(hn::Lanes(DF())); }

  static float Exp2(float x) { return hn::GetLane(HWY_NAMESPACE::Exp2(hn::Set(DF(), x))); }

  static HWY_INLINE void LoadUpTo(const T* HWY_RESTRICT from, int64_t left, VF& a, VF& b) {
    if (HWY_LIKELY(left >= LoadSize())) {
      RowLoader<T>::Load(from, a, b);
    } else {
      LoadTail(from, left, a, b);
    }
  }

  static HWY_INLINE void StorePair(VF a, VF b, float* HWY_RESTRICT to) {
    hn::StoreU(a, DF(), to);
    hn::StoreU(b, DF(), to + LoadSize() / 2);
  }

  // Calls fn(d, left) for every d of a row where a Load begins, with the elements that are left.
  template <typename F>
  HWY_INLINE void ForEachLoad(F&& fn) const {
    for (int64_t d = 0; d < head_dim_; d += LoadSize()) fn(d, head_dim_ - d);
  }

  // Calls fn(Constant<heads>, g) for heads [g, g + heads) so that these cover the group.
  template <typename F>
  HWY_INLINE void ForEachHeads(F&& fn) const {
    int64_t g = 0;
    for (; g + kHeadsAtOnce <= group_; g += kHeadsAtOnce) fn(Constant<kHeadsAtOnce>(), g);
    if constexpr (kHeadsAtOnce > 2) {
      if (group_ - g == 3) return fn(Constant<3>(), g);
      if (group_ - g == 2) return fn(Constant<2>(), g);
    }
    if (group_ - g == 1) fn(Constant<1>(), g);
  }

  // Leaves the logits of heads [g, g + kHeads) in weights_. Asks for the coming rows if kAsks.
  template <int kHeads, bool kAsks>
  HWY_NOINLINE void Score(const TokenTile<T>& tile, ComingRows<T> coming, int64_t g) {
    const DF df;
    const int64_t step = LoadSize();
    const float* HWY_RESTRICT query = query_ + g * padded_dim_;
    for (int64_t t = 0; t < tile.count; t += kRowsAtOnce) {
      VF sums[kHeads][kRowsAtOnce];
      Unroll<kHeads * kRowsAtOnce>(
          [&](auto i) HWY_ATTR { sums[i / kRowsAtOnce][i % kRowsAtOnce] = hn::Zero(df); });
      const T* rows[kRowsAtOnce];
      int64_t d = 0;
      for (; d + step <= head_dim_; d += step) {
        Unroll<kRowsAtOnce>([&](auto r) HWY_ATTR {
          if constexpr (kAsks) coming.Prefetch(t + r, d);
          rows[r] = tile.keys[t + r] + d;
        });
        AddProducts<kHeads>(query + d, rows, sums);
      }
      if (d < head_dim_) {
        HWY_ALIGN T tails[kRowsAtOnce][2 * hn::MaxLanes(DF())];
        CopyTails(tile.keys + t, d, tails);
        Unroll<kRowsAtOnce>([&](auto r) HWY_ATTR { rows[r] = tails[r]; });
        AddProducts<kHeads>(query + d, rows, sums);
      }
      Unroll<kHeads>([&](auto h)
                         HWY_ATTR { StoreSums(sums[h], weights_ + (g + h) * kTileTokens + t); });
    }
  }

  // Adds to sums[h][r] the products of head h of the query with what a Load at rows[r] reads.
  template <int kHeads>
  HWY_INLINE void AddProducts(const float* HWY_RESTRICT query, const T* const (&rows)[kRowsAtOnce],
                              VF (&sums)[kHeads][kRowsAtOnce]) const {
    VF qa[kHeads];
    VF qb[kHeads];
    Unroll<kHeads>([&](auto h) HWY_ATTR {
      qa[h] = LoadOnce(query + h * padded_dim_);
      qb[h] = LoadOnce(query + h * padded_dim_ + LoadSize() / 2);
    });
    Unroll<kRowsAtOnce>([&](auto r) HWY_ATTR {
      VF a;
      VF b;
      RowLoader<T>::Load(rows[r], a, b);
      Unroll<kHeads>([&](auto h) HWY_ATTR { sums[h][r] = hn::MulAdd(qa[h], a, sums[h][r]); });
      Unroll<kHeads>([&](auto h) HWY_ATTR { sums[h][r] = hn::MulAdd(qb[h], b, sums[h][r]); });
    });
  }

  // Copies what a row has from d on, with zeros behind. Not inlined, so that the sums in the loop
  // before stay in registers.
  HWY_NOINLINE void CopyTails(const T* const* keys, int64_t d,
                              T (*tails)[2 * hn::MaxLanes(DF())]) const {
    for (int r = 0; r < kRowsAtOnce; ++r) {
      std::memset(tails[r], 0, sizeof(tails[r]));
      std::memcpy(tails[r], keys[r] + d, static_cast<size_t>(head_dim_ - d) * sizeof(T));
    }
  }

  // Turns the logits of head g into weights, and says in rescale_ what those so far are to be
  // multiplied by.
  HWY_INLINE void Weigh(int64_t count, int64_t g) {
    const DF df;
    const int64_t lanes = Lanes();
    float* HWY_RESTRICT weights = weights_ + g * kTileTokens;
    std::fill(weights + count, weights + kTileTokens, -std::numeric_limits<float>::infinity());
    // With a logit of NaN among them this may be too small, and a weight anything: the sum of the
    // weights is NaN then, and so is the result.
    auto tile_largest = hn::Load(df, weights);
    for (int64_t t = lanes; t < kTileTokens; t += lanes) {
      tile_largest = hn::Max(tile_largest, hn::Load(df, weights + t));
    }
    auto vlargest = hn::Set(df, largest_[g]);
    auto vtotal = hn::Load(df, totals_ + g * lanes);
    rescale_[g] = 1.0f;
    if (HWY_UNLIKELY(!hn::AllFalse(df, hn::Gt(tile_largest, vlargest)))) {
      const auto vnew = hn::MaxOfLanes(df, hn::Max(tile_largest, vlargest));
      const auto vrescale = HWY_NAMESPACE::Exp2(hn::Sub(vlargest, vnew));
      vtotal = hn::Mul(vtotal, vrescale);
      vlargest = vnew;
      rescale_[g] = hn::GetLane(vrescale);
      largest_[g] = hn::GetLane(vnew);
    }
    for (int64_t t = 0; t < kTileTokens; t += lanes) {
      const auto weight = HWY_NAMESPACE::Exp2(hn::Sub(hn::Load(df, weights + t), vlargest));
      hn::Store(weight, df, weights + t);
      vtotal = hn::Add(vtotal, weight);
    }
    hn::Store(vtotal, df, totals_ + g * lanes);
  }

  // Adds the weighted values for heads [g, g + kHeads). Asks for the coming rows if kAsks.
  template <int kHeads, bool kAsks>
  HWY_INLINE void AddValues(const TokenTile<T>& tile, ComingRows<T> coming, int64_t g) {
    const int64_t step = LoadSize();
    int64_t d = 0;
    for (; d + kLoadsAtOnce * step <= head_dim_; d += kLoadsAtOnce * step) {
      AddPart<kHeads, kLoadsAtOnce, kAsks>(tile, coming, g, d);
    }
    for (; d < head_dim_; d += step) AddPart<kHeads, 1, kAsks>(tile, coming, g, d);
  }

  // The same for the elements of kLoads Loads from d on; the last of them may be a tail.
  template <int kHeads, int kLoads, bool kAsks>
  HWY_NOINLINE void AddPart(const TokenTile<T>& tile, ComingRows<T> coming, int64_t g, int64_t d) {
    const DF df;
    const int64_t step = LoadSize();
    const float* HWY_RESTRICT weights = weights_ + g * kTileTokens;
    VF sums[kHeads][2 * kLoads];
    Unroll<kHeads * 2 * kLoads>(
        [&](auto i) HWY_ATTR { sums[i / (2 * kLoads)][i % (2 * kLoads)] = hn::Zero(df); });
    if (kLoads > 1 || d + step <= head_dim_) {
      for (int64_t t = 0; t < tile.count; ++t) {
        if constexpr (kAsks) {
          Unroll<kLoads>([&](auto i) HWY_ATTR { coming.Prefetch(t, d + i * step); });
        }
        AddWeighted<kHeads, kLoads>(weights + t, tile.values[t] + d, sums);
      }
    } else {
      HWY_ALIGN T tail[2 * hn::MaxLanes(DF())];
      std::memset(static_cast<void*>(tail), 0, sizeof(tail));
      for (int64_t t = 0; t < tile.count; ++t) {
        std::memcpy(static_cast<void*>(tail), tile.values[t] + d,
                    static_cast<size_t>(head_dim_ - d) * sizeof(T));
        AddWeighted<kHeads, kLoads>(weights + t, tail, sums);
      }
    }
    Unroll<kHeads>([&](auto h) HWY_ATTR {
      const auto rescale = hn::Set(df, rescale_[g + h]);
      float* HWY_RESTRICT to = sums_ + (g + h) * padded_dim_ + d;
      Unroll<2 * kLoads>([&](auto i) HWY_ATTR {
        const auto sum = hn::MulAdd(hn::LoadU(df, to + i * (step / 2)), rescale, sums[h][i]);
        hn::StoreU(sum, df, to + i * (step / 2));
      });
    });
  }

  // Adds to sums[h] what kLoads Loads of `value` read, times weights[h * kTileTokens].
  template <int kHeads, int kLoads>
  static HWY_INLINE void AddWeighted(const float* HWY_RESTRICT weights, const T* HWY_RESTRICT value,
                                     VF (&sums)[kHeads][2 * kLoads]) {
    VF weight[kHeads];
    Unroll<kHeads>([&](auto h) HWY_ATTR { weight[h] = hn::Set(DF(), weights[h * kTileTokens]); });
    Unroll<kLoads>([&](auto i) HWY_ATTR {
      VF a;
      VF b;
      RowLoader<T>::Load(value + i * LoadSize(), a, b);
      Unroll<kHeads>([&](auto h) HWY_ATTR {
        sums[h][2 * i] = hn::MulAdd(weight[h], a, sums[h][2 * i]);
        sums[h][2 * i + 1] = hn::MulAdd(weight[h], b, sums[h][2 * i + 1]);
      });
    });
  }

  const int64_t group_;  // heads
  const int64_t head_dim_;
  const int64_t padded_dim_;
  float* const query_;    // [group, padded_dim], in the order of RowLoader<T>
  float* const weights_;  // [group, kTileTokens]
  float* const totals_;   // [group, Lanes()], what total_ is the sum of
  // The state, as Save copies it.
  float* const sums_;     // [group, padded_dim], in the order of RowLoader<T>
  float* const largest_;  // [group]
  float* const total_;    // [group]
  float* const rescale_;  // [group]
};

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace select_attn::cpu
HWY_AFTER_NAMESPACE();

#endif  // SELECT_ATTN_OPS_CPU_ATTENTION_INL_H_
