// The step of arrays of any dtypes, sizes and addresses.
#pragma once

#include "stablevs_step/step.cuh"

namespace svel::cuda {

constexpr int ANY_THREADS = 256, ANY_VALUES = 8;

// Grid: tiles of a row, rows. W: float, or double for a float64 sample. A thread has 8 elements next to each
// other where they can be loaded together, else every 256th.
template <typename W>
__global__ void __launch_bounds__(ANY_THREADS) any_step_kernel(const __grid_constant__ Step step) {
  const int64_t row = step.first_row + blockIdx.y, base = row * step.d;
  const double first = step.first.at(row), second = step.second.at(row), third = step.third.at(row);
  const bool guided = step.uncond.data, noisy = step.noise.data;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * (ANY_THREADS * ANY_VALUES) +
                        threadIdx.x * (step.vectors ? ANY_VALUES : 1);
  W x[ANY_VALUES] = {}, v[ANY_VALUES] = {}, u[ANY_VALUES] = {}, noise[ANY_VALUES] = {};
  const auto load = [&](const Array& from, W(&to)[ANY_VALUES]) {
    if (step.vectors) {
      if (begin < step.d) load8<W>(from, base + begin, to);
      return;
    }
#pragma unroll
    for (int k = 0; k < ANY_VALUES; ++k) {
      const int64_t e = begin + k * ANY_THREADS;
      if (e < step.d) to[k] = load_as<W>(from, base + e);
    }
  };
  load(step.sample, x);
  load(step.velocity, v);
  if (guided) load(step.uncond, u);
  if (noisy) load(step.noise, noise);
  const RowCoefficients<W> c = row_coefficients<W>(step, first, second, third);
  const W guidance = static_cast<W>(step.guidance);
#pragma unroll
  for (int k = 0; k < ANY_VALUES; ++k) {
    const W velocity = guided ? u[k] + guidance * (v[k] - u[k]) : v[k];
    const W mean = c.a * x[k] + c.b * velocity;
    x[k] = noisy ? mean + c.c * noise[k] : mean;
  }
  if (step.vectors) {
    if (begin < step.d) store8<W>(step.out, base + begin, x);
    return;
  }
#pragma unroll
  for (int k = 0; k < ANY_VALUES; ++k) {
    const int64_t e = begin + k * ANY_THREADS;
    if (e < step.d) store_as(step.out, base + e, x[k]);
  }
}

inline void launch_any_step(const Step& step, unsigned rows, cudaStream_t stream) {
  constexpr int64_t TILE = ANY_THREADS * ANY_VALUES;
  const dim3 grid(static_cast<unsigned>((step.d + TILE - 1) / TILE), rows);
  const auto kernel = step.sample.dtype == Dtype::f64 ? any_step_kernel<double> : any_step_kernel<float>;
  kernel<<<grid, ANY_THREADS, 0, stream>>>(step);
}

}  // namespace svel::cuda
