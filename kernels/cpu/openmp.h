// The OpenMP team that torch keeps in the process, if it is there.

#ifndef SELECT_ATTN_OPS_CPU_OPENMP_H_
#define SELECT_ATTN_OPS_CPU_OPENMP_H_

#include <cstdint>

namespace select_attn::cpu {

// Calls function(context) once on each of num_threads threads, the calling one among them, by
// torch's team, and returns true when all calls have. False, with nothing called, where that team
// is not to be had: torch is not loaded, the process is a forked child (a team does not survive
// that, and a new one would wait for it forever), SELECT_ATTN_PARALLEL=pool, or torch uses another
// number of threads (a team of another size would be torn down by torch's next operator).
// `function` must not throw.
//
// After an operator of torch, its idle threads spin for a while in wait for the next one. Threads
// of our own would have to share the processors with them; the team starts at once.
bool RunOnTorchTeam(int64_t num_threads, void (*function)(void*), void* context);

// Throws Error (kValueError) if SELECT_ATTN_PARALLEL is neither openmp, pool nor empty.
void CheckParallelSetting();

}  // namespace select_attn::cpu

#endif  // SELECT_ATTN_OPS_CPU_OPENMP_H_
