// The row kernels of va_repa_loss on the CPU. No torch headers.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/storage.h"

namespace svel {

// Rows (b, t) of C values next to each other; strides in values.
struct Rows {
  Values values;
  int64_t stride_b, stride_t;
};

struct CosineProblem {
  Rows projected, teacher;
  int64_t t, c;  // T and C
  bool wide;     // float64 arithmetic
};

constexpr double MIN_NORM = 1e-8;

// cosine[row] for rows [begin, end) of the B T rows.
SVEL_ISA_KERNEL(void, cosine_rows, (const CosineProblem& problem, double* cosine, int64_t begin, int64_t end))

// out (B, T, C), contiguous, storage of projected: scale[b] d cosine / d projected, for rows [begin, end).
SVEL_ISA_KERNEL(void, cosine_gradient_rows,
                (const CosineProblem& problem, const double* scale, void* out, int64_t begin, int64_t end))

}  // namespace svel
