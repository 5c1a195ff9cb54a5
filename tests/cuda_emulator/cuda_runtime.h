// The CUDA backend's kernels on the CPU, in place of the header of the same name: what they use of
// CUDA C++. A thread block is a thread of the host, and its threads are fibers of that.
//
// The thread blocks of a grid take turns, the threads of one run in random order, each until it
// meets a barrier or talks to its warp; which thread block goes on is random too. So a missing
// barrier shows as a wrong result, also where it is another thread block that must not see what is
// half done, and a barrier that not all threads reach as an error. What is not modelled: the order
// in which other processors see stores, sizes and speed.

#ifndef SELECT_ATTN_OPS_TESTS_CUDA_EMULATOR_CUDA_RUNTIME_H_
#define SELECT_ATTN_OPS_TESTS_CUDA_EMULATOR_CUDA_RUNTIME_H_

#include <cstdint>
#include <cstring>
#include <functional>

#define __host__
#define __device__
#define __global__
#define __shared__ static thread_local  // a thread block is a thread of the host
#define __launch_bounds__(...)

struct EmulatedIndex {
  unsigned x;
};

namespace cuda_emulator {

// Runs `blocks` thread blocks of `threads` threads, which all call `kernel`. Throws
// std::logic_error where the threads of a warp or of a thread block do not meet. The orders depend
// on `seed`.
void RunGrid(unsigned blocks, unsigned threads, unsigned seed, const std::function<void()>& kernel);

void Barrier();

// What lane `from` of this thread's warp gave; all lanes call it together.
uint64_t Exchange(uint64_t own, unsigned from);

// Of all lanes, what they gave: values[lane].
void Gather(uint64_t own, uint64_t (&values)[32]);

}  // namespace cuda_emulator

// Defined here: GCC's sanitizer takes variables of this kind that are defined elsewhere for null.
inline thread_local EmulatedIndex threadIdx = {0};
inline thread_local EmulatedIndex blockIdx = {0};
inline thread_local EmulatedIndex gridDim = {0};

inline void __syncthreads() { cuda_emulator::Barrier(); }
inline void __threadfence() {}

template <typename T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}

template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}

inline int __ffs(unsigned value) { return __builtin_ffs(static_cast<int>(value)); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }

namespace cuda_emulator {

template <typename T>
T ExchangeBits(T own, unsigned from) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &own, sizeof(own));
  bits = Exchange(bits, from);
  std::memcpy(&own, &bits, sizeof(own));
  return own;
}

}  // namespace cuda_emulator

template <typename T>
T __shfl_xor_sync(unsigned /*mask*/, T own, int lanes) {
  return cuda_emulator::ExchangeBits(own, threadIdx.x % 32 ^ static_cast<unsigned>(lanes));
}
template <typename T>
T __shfl_up_sync(unsigned /*mask*/, T own, int lanes) {
  const unsigned lane = threadIdx.x % 32;
  const auto up = static_cast<unsigned>(lanes);
  return cuda_emulator::ExchangeBits(own, lane < up ? lane : lane - up);
}
inline unsigned __match_any_sync(unsigned /*mask*/, unsigned own) {
  uint64_t values[32];
  cuda_emulator::Gather(own, values);
  unsigned same = 0;
  for (unsigned lane = 0; lane < 32; ++lane) same |= (values[lane] == own ? 1u : 0u) << lane;
  return same;
}

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};

#endif  // SELECT_ATTN_OPS_TESTS_CUDA_EMULATOR_CUDA_RUNTIME_H_
