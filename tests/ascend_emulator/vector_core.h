// A vector core: what of it kernels see through the API.

#ifndef SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_VECTOR_CORE_H_
#define SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_VECTOR_CORE_H_

#include <cstdint>

#include "counters.h"
#include "failure.h"
#include "memory_races.h"
#include "ordering.h"
#include "unified_buffer.h"

namespace ascend_emulator {

// The mask register, for instructions that are told not to set it.
struct VectorMask {
  bool counter = false;  // it counts elements, in place of a bit for each lane
  uint64_t low = ~uint64_t{0};
  uint64_t high = ~uint64_t{0};
};

class VectorCore {
 public:
  VectorCore(int core_index, int cores, bool strict_vector_order)
      : index(core_index), num_cores(cores), ordering(strict_vector_order), buffer(ordering) {}

  void SetFlag(AscendC::HardEvent event, int id, Ordering::Setter setter) {
    ordering.SetFlag(event, id, setter);
    ++(setter == Ordering::Setter::kKernel ? counters.flags : counters.queue_flags);
    trace.push_back({Step::Kind::kSetFlag, SourcePipe(event), event, id, 0, {}});
  }
  void WaitFlag(AscendC::HardEvent event, int id) {
    ordering.WaitFlag(event, id);
    trace.push_back({Step::Kind::kWaitFlag, TargetPipe(event), event, id, 0, {}});
  }
  void Barrier(pipe_t pipe) {
    ordering.Barrier(pipe);
    ++counters.barriers;
    trace.push_back({Step::Kind::kBarrier, pipe, {}, 0, 0, {}});
  }

  Access BeginScalar(const char* name) { return {PIPE_S, ordering.Begin(PIPE_S), name}; }
  Access BeginVector(const char* name, int64_t repeats) {
    VectorCount& count = counters.vector[name];
    ++count.instructions;
    count.repeats += repeats;
    trace.push_back({Step::Kind::kVector, PIPE_V, {}, 0, repeats, name});
    return {PIPE_V, ordering.Begin(PIPE_V), name};
  }
  Access BeginCopy(const char* name, pipe_t pipe, int64_t bytes) {
    ++(pipe == PIPE_MTE2 ? counters.copies_in : counters.copies_out);
    (pipe == PIPE_MTE2 ? counters.bytes_read : counters.bytes_written) += bytes;
    trace.push_back({Step::Kind::kCopy, pipe, {}, 0, bytes, name});
    return {pipe, ordering.Begin(pipe), name};
  }

  const int index;
  const int num_cores;
  Ordering ordering;
  UnifiedBuffer buffer;
  Counters counters;
  Trace trace;
  GlobalAccesses global;
  VectorMask mask;
  // 16-bit results: infinities become the largest numbers, NaN 0. As a launch finds the core.
  bool saturates = true;
  // The scalar unit's cache may have what global memory held before the launch.
  bool data_cache_is_stale = true;
};

// The core that runs; set by Launch.
inline thread_local VectorCore* running_core = nullptr;

inline VectorCore& Core() {
  Check(running_core != nullptr, "Ascend C outside a kernel");
  return *running_core;
}

}  // namespace ascend_emulator

#endif  // SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_VECTOR_CORE_H_
