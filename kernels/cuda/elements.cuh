// Elements of the operators' tensors as the kernels handle them: 16 bytes at a time, in four words.

#ifndef SELECT_ATTN_OPS_CUDA_ELEMENTS_CUH_
#define SELECT_ATTN_OPS_CUDA_ELEMENTS_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "select_attn_ops/common.h"

namespace select_attn::cuda {

constexpr int kVectorBytes = 16;
constexpr int kWordsPerVector = 4;

// A vector of elements, whatever they are.
struct alignas(kVectorBytes) Words {
  uint32_t word[kWordsPerVector];
};

// The larger or smaller of two; NaN if either is. fmaxf and fminf would drop the NaN.
__host__ __device__ inline float MaxOrNaN(float a, float b) {
#ifdef __CUDA_ARCH__
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
#else
  return a > b || a != a ? a : b;
#endif
}
__host__ __device__ inline float MinOrNaN(float a, float b) {
#ifdef __CUDA_ARCH__
  float smaller;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(smaller) : "f"(a), "f"(b));
  return smaller;
#else
  return a < b || a != a ? a : b;
#endif
}

template <typename To, typename From>
__host__ __device__ To BitCast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// What the kernels do with a word of elements: Max and Min element by element, and Widen, exactly,
// into kPerWord floats. Narrow makes an element of a float, the nearest there is.
struct Float16 {
  using Bits = uint16_t;
  static constexpr int kPerWord = 2;

  __device__ static uint32_t Max(uint32_t a, uint32_t b) {
    return BitCast<uint32_t>(__hmax2_nan(BitCast<__half2>(a), BitCast<__half2>(b)));
  }
  __device__ static uint32_t Min(uint32_t a, uint32_t b) {
    return BitCast<uint32_t>(__hmin2_nan(BitCast<__half2>(a), BitCast<__half2>(b)));
  }
  __device__ static void Widen(uint32_t word, float* floats) {
    const float2 both = __half22float2(BitCast<__half2>(word));
    floats[0] = both.x;
    floats[1] = both.y;
  }
  __device__ static Bits Narrow(float value) { return BitCast<Bits>(__float2half_rn(value)); }
};

struct BFloat16 {
  using Bits = uint16_t;
  static constexpr int kPerWord = 2;

  __device__ static uint32_t Max(uint32_t a, uint32_t b) {
    return BitCast<uint32_t>(__hmax2_nan(BitCast<__nv_bfloat162>(a), BitCast<__nv_bfloat162>(b)));
  }
  __device__ static uint32_t Min(uint32_t a, uint32_t b) {
    return BitCast<uint32_t>(__hmin2_nan(BitCast<__nv_bfloat162>(a), BitCast<__nv_bfloat162>(b)));
  }
  __device__ static void Widen(uint32_t word, float* floats) {
    floats[0] = BitCast<float>(word << 16);
    floats[1] = BitCast<float>(word & 0xFFFF0000u);
  }
  __device__ static Bits Narrow(float value) { return BitCast<Bits>(__float2bfloat16_rn(value)); }
};

struct Float32 {
  using Bits = uint32_t;
  static constexpr int kPerWord = 1;

  __device__ static uint32_t Max(uint32_t a, uint32_t b) {
    return BitCast<uint32_t>(MaxOrNaN(BitCast<float>(a), BitCast<float>(b)));
  }
  __device__ static uint32_t Min(uint32_t a, uint32_t b) {
    return BitCast<uint32_t>(MinOrNaN(BitCast<float>(a), BitCast<float>(b)));
  }
  __device__ static void Widen(uint32_t word, float* floats) { floats[0] = BitCast<float>(word); }
  __device__ static Bits Narrow(float value) { return BitCast<Bits>(value); }
};

// Calls `run` with the element that a dtype names.
template <class Run>
const char* ForElement(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat16:
      return run(Float16());
    case DType::kBFloat16:
      return run(BFloat16());
    case DType::kFloat32:
      return run(Float32());
  }
  return "unknown dtype";
}

template <class Element>
constexpr int kPerVector = kWordsPerVector * Element::kPerWord;

// Loads a vector that is read once. Where rows are not 16-byte aligned, element by element.
template <class Element, bool kAligned>
__device__ Words LoadVector(const typename Element::Bits* from) {
  Words words;
  if constexpr (kAligned) {
    words = BitCast<Words>(__ldcs(reinterpret_cast<const uint4*>(from)));
  } else if constexpr (Element::kPerWord == 1) {
    for (int i = 0; i < kWordsPerVector; ++i) words.word[i] = __ldcs(from + i);
  } else {
    for (int i = 0; i < kWordsPerVector; ++i) {
      words.word[i] = static_cast<uint32_t>(__ldcs(from + 2 * i)) |
                      static_cast<uint32_t>(__ldcs(from + 2 * i + 1)) << 16;
    }
  }
  return words;
}

// Stores a word of a row; rows that are kAligned to 16 bytes are so to words.
template <class Element, bool kAligned>
__device__ void StoreWord(typename Element::Bits* to, uint32_t word) {
  if constexpr (kAligned || Element::kPerWord == 1) {
    *reinterpret_cast<uint32_t*>(to) = word;
  } else {
    to[0] = static_cast<uint16_t>(word);
    to[1] = static_cast<uint16_t>(word >> 16);
  }
}

// Whether rows at `data` with these strides, in elements, all begin at a multiple of 16 bytes. A
// dimension of one element is never stepped along: frameworks give it any stride.
template <class Element, size_t kDims>
bool RowsAreAligned(const void* data, const int64_t (&extents)[kDims],
                    const int64_t (&strides)[kDims]) {
  bool aligned = reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0;
  for (size_t i = 0; i < kDims; ++i) {
    aligned = aligned && (extents[i] == 1 || strides[i] % kPerVector<Element> == 0);
  }
  return aligned;
}

}  // namespace select_attn::cuda

#endif  // SELECT_ATTN_OPS_CUDA_ELEMENTS_CUH_
