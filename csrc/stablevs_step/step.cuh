// The arguments of a step and its coefficients, for both kernels. out = a x + b v + c noise with v guided.
#pragma once

#include "common/device.cuh"
#include "common/path.h"

namespace svel::cuda {

struct Scalars {
  const void* data;  // (N,), or one value for all rows; null is 0
  bool wide, shared;

  __device__ double at(int64_t row) const {
    if (!data) return 0.0;
    const int64_t i = shared ? 0 : row;
    return wide ? static_cast<const double*>(data)[i]
                : static_cast<double>(static_cast<const float*>(data)[i]);
  }
};

enum class Coefficients : int { given, linear, cosine };  // a, b, c themselves; or of a path from t and tau

struct Step {
  Array sample, velocity, uncond, noise, out;  // (rows, d); uncond and noise may be null
  Scalars first, second, third;                // a, b, c; or t, tau
  Coefficients coefficients;
  NoiseSplit split;
  double guidance;
  int64_t rows, d, first_row;  // blockIdx.y counts rows from first_row
  bool vectors;                // 8 elements at a time are aligned in every array
};

template <typename W>
struct RowCoefficients {
  W a, b, c;
};

static __device__ __noinline__ StepCoefficients cosine_coefficients(double t, double tau, NoiseSplit split) {
  return stablevs_coefficients(Path::cosine, t, tau, split);
}

// Called by all threads of a block, with step.first.at(row) and so on, which a kernel loads before it waits
// for anything. A few operations for the linear path, so that every thread does them and none waits; sines in
// double are long on most GPUs, so one thread works them out.
template <typename W>
__device__ __forceinline__ RowCoefficients<W> row_coefficients(const Step& step, double first, double second,
                                                               double third) {
  StepCoefficients c{first, second, third};
  if (step.coefficients == Coefficients::linear) {
    c = stablevs_coefficients(Path::linear, first, second, step.split);
  } else if (step.coefficients == Coefficients::cosine) {
    __shared__ StepCoefficients shared;
    if (threadIdx.x == 0) shared = cosine_coefficients(first, second, step.split);
    __syncthreads();
    c = shared;
  }
  return {static_cast<W>(c.a), static_cast<W>(c.b), static_cast<W>(c.c)};
}

}  // namespace svel::cuda
