// The elementwise kernel of affine_step and stablevs_step on the CPU. No torch headers.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/storage.h"

namespace svel {

// out = a sample + b v + c noise with v = uncond + guidance (velocity - uncond), over (N, D) contiguous
// values
struct StepProblem {
  Values sample, velocity, uncond, noise;
  void* out;           // storage of sample
  const double* coef;  // (N, 3): a, b, c of each row, or (1, 3) with row_size at least N D
  int64_t row_size;    // D
  double guidance;
};

// Elements [begin, end) of the flattened (N, D).
SVEL_ISA_KERNEL(void, step_elements, (const StepProblem& problem, int64_t begin, int64_t end))

}  // namespace svel
