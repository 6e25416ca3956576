// The copying part of bank_push_ on the CPU. No torch headers.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/storage.h"

namespace svel {

struct PushProblem {
  Values values;  // (N, D)
  int64_t n;
  void* refs;            // (K M, D)
  Storage refs_storage;  // i64 exactly when values are
  int64_t d;
  const int64_t*
      slots;  // row of refs that push i, of value i mod N, goes to; -1: overwritten later in the call
};

// Pushes [begin, end).
SVEL_ISA_KERNEL(void, push_rows, (const PushProblem& problem, int64_t begin, int64_t end))

}  // namespace svel
