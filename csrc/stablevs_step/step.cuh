// The arguments of a step and its coefficients, for both kernels. out = a x + b v + c noise with v guided.
#pragma once

#include "common/device.cuh"
#include "common/path.h"

namespace svel::cuda {

struct Scalars {
  const void* data;  // (N,), or one value for all rows
  bool wide, shared;

  // The bits at `row`. Converting a float is an instruction that waits for it, so `value` comes after all
  // loads.
  __device__ __forceinline__ uint2 load(int64_t row) const {
    const int64_t i = shared ? 0 : row;
    if (wide) return __ldg(static_cast<const uint2*>(data) + i);
    return {__ldg(static_cast<const unsigned*>(data) + i), 0u};
  }

  __device__ __forceinline__ double value(uint2 bits) const {
    return wide ? __hiloint2double(static_cast<int>(bits.y), static_cast<int>(bits.x))
                : static_cast<double>(__uint_as_float(bits.x));
  }
};

enum class Coefficients : int { given, linear, cosine };  // a, b, c themselves; or of a path from t and tau

struct Step {
  Array sample, velocity, uncond, noise, out;  // (rows, d); uncond and noise may be null
  Scalars first, second, third;                // a, b, c, or t, tau; third may be null
  Coefficients coefficients;
  NoiseSplit split;
  double guidance;
  int64_t rows, d, first_row;  // blockIdx.y counts rows from first_row
};

struct RowScalars {
  uint2 first, second, third;
};

__device__ __forceinline__ RowScalars load_scalars(const Step& step, int64_t row) {
  return {step.first.load(row), step.second.load(row), step.third.data ? step.third.load(row) : uint2{}};
}

template <typename W>
struct RowCoefficients {
  W a, b, c;
};

static __device__ __noinline__ StepCoefficients cosine_coefficients(double t, double tau, NoiseSplit split) {
  return stablevs_coefficients(Path::cosine, t, tau, split);
}

// From a, b, c or t, tau. Called by all threads of a block. A few operations for the linear path, so that
// every thread does them and none waits; sines in double are long on most GPUs, so one thread works them out.
template <typename W, Coefficients KIND>
__device__ __forceinline__ RowCoefficients<W> row_coefficients(double first, double second, double third,
                                                               NoiseSplit split) {
  StepCoefficients c{first, second, third};
  if constexpr (KIND == Coefficients::linear) {
    c = stablevs_coefficients(Path::linear, first, second, split);
  } else if constexpr (KIND == Coefficients::cosine) {
    __shared__ StepCoefficients shared;
    if (threadIdx.x == 0) shared = cosine_coefficients(first, second, split);
    __syncthreads();
    c = shared;
  }
  return {static_cast<W>(c.a), static_cast<W>(c.b), static_cast<W>(c.c)};
}

template <typename W>
__device__ __forceinline__ RowCoefficients<W> row_coefficients(const Step& step, const RowScalars& loaded) {
  const double first = step.first.value(loaded.first), second = step.second.value(loaded.second),
               third = step.third.value(loaded.third);
  switch (step.coefficients) {
    case Coefficients::linear:
      return row_coefficients<W, Coefficients::linear>(first, second, third, step.split);
    case Coefficients::cosine:
      return row_coefficients<W, Coefficients::cosine>(first, second, third, step.split);
    default:
      return row_coefficients<W, Coefficients::given>(first, second, third, step.split);
  }
}

// The arithmetic of an element, rounded alike in every kernel: left to the compiler, which product of a sum
// is fused differs between them, and a view at an odd address would not give what its copy gives.
template <typename W>
__device__ __forceinline__ W guided_velocity(W velocity, W uncond, W guidance) {
  return fma(guidance, velocity - uncond, uncond);
}
template <typename W>
__device__ __forceinline__ W stepped(const RowCoefficients<W>& c, W sample, W velocity) {
  return fma(c.b, velocity, c.a * sample);
}
template <typename W>
__device__ __forceinline__ W with_noise(const RowCoefficients<W>& c, W stepped, W noise) {
  return fma(c.c, noise, stepped);
}

}  // namespace svel::cuda
