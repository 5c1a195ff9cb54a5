// A backend for the loader's test, built for another version of the library.

#include "core/backend.h"

extern "C" SELECT_ATTN_EXPORT const select_attn::BackendTable* select_attn_ops_backend(
    const char** /*why*/) {
  static select_attn::BackendTable table = {};
  table.version = select_attn::BackendTable::kVersion + 1;
  return &table;
}
