// The copying part of bank_push_ on the CPU. No torch headers.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/storage.h"

namespace svel {

struct PushProblem {
  Values values;         // (N, D)
  void* refs;            // (K M, D)
  Storage refs_storage;  // i64 exactly when values are
  int64_t d;
  const int64_t* slots;  // (N,): row of refs that each value goes to; -1: overwritten later in the same call
};

// Rows [begin, end) of values.
SVEL_ISA_KERNEL(void, push_rows, (const PushProblem& problem, int64_t begin, int64_t end))

}  // namespace svel
