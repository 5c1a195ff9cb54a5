// The Ascend C kernels on the CPU, in place of the header of the same name: what a kernel for the
// vector cores of an Ascend 910B (dav-2201) may use of the API.
//
// Written after the public documentation of the Ascend C API, CANN 8.0 to 9.1. Instructions are
// carried out at once, in the order in which they are issued; what the chip would need in order to
// do the same - flags, queues, barriers, alignment, bounds, masks - is checked, and its lack is an
// error. Launches find the core in the state that kernels cannot rely on: 16-bit arithmetic
// saturates, the scalar unit's cache is stale. Not modelled: the cube unit, atomic writes, SyncAll
// and other talk between cores, order of one core's own accesses to global memory, conflicts of
// banks, approximate results of the chip's division.

#ifndef SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_KERNEL_OPERATOR_H_
#define SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_KERNEL_OPERATOR_H_

// IWYU pragma: begin_exports
#include "casts.h"
#include "compare_and_gather.h"
#include "copies.h"
#include "core_control.h"
#include "device_language.h"
#include "elementwise.h"
#include "float_types.h"
#include "pipe_and_queues.h"
#include "reductions.h"
#include "sort.h"
#include "tensors.h"
// IWYU pragma: end_exports

#endif  // SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_KERNEL_OPERATOR_H_
