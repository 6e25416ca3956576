// The step of aligned arrays of one dtype, D % 8 == 0: all loads of a thread are on their way before the
// first is used.
#pragma once

#include "common/pack.cuh"
#include "stablevs_step/step.cuh"

namespace svel::cuda {

// Measured on an H100, bfloat16, guided: of 64 to 512 threads, 1 to 4 packs a thread and cached or streaming
// accesses, all are within 3 % at 1 x 16 x 128 x 128 (5.4 to 5.8 µs) and streaming ones lose 5 to 8 % at
// 64 x 16 x 21 x 90 x 160 (798 against 840 to 867 µs).
constexpr int FAST_THREADS = 128, FAST_BLOCKS_PER_SM = 8;

template <typename T>
constexpr int FAST_VALUES = sizeof(T) == 8 ? 4 : 8;  // of a thread

// Grid: tiles of a row, rows.
template <typename T, bool GUIDED, bool NOISY>
__global__ void __launch_bounds__(FAST_THREADS, FAST_BLOCKS_PER_SM)
    fast_step_kernel(const __grid_constant__ Step step) {
  using W = Work<T>;
  constexpr int VALUES = FAST_VALUES<T>;
  const int64_t row = step.first_row + blockIdx.y;
  const int64_t e = (static_cast<int64_t>(blockIdx.x) * FAST_THREADS + threadIdx.x) * VALUES;
  const int64_t at = row * step.d + e;
  const bool inside = e < step.d;
  const RowScalars scalars = load_scalars(step, row);
  Pack<T, VALUES> x, v, u, noise;
  if (inside) {
    x.load(static_cast<const T*>(step.sample.data) + at);
    v.load(static_cast<const T*>(step.velocity.data) + at);
    if constexpr (GUIDED) u.load(static_cast<const T*>(step.uncond.data) + at);
    if constexpr (NOISY) noise.load(static_cast<const T*>(step.noise.data) + at);
  }
  const RowCoefficients<W> c = row_coefficients<W>(step, scalars);
  if (!inside) return;
  const W guidance = static_cast<W>(step.guidance);
  W out[VALUES];
#pragma unroll
  for (int k = 0; k < VALUES; ++k) {
    const W guided = GUIDED ? u.get(k) + guidance * (v.get(k) - u.get(k)) : v.get(k);
    out[k] = c.a * x.get(k) + c.b * guided;
    if constexpr (NOISY) out[k] += c.c * noise.get(k);
  }
  x.fill(out);
  x.store(static_cast<T*>(step.out.data) + at);
}

template <typename T>
void launch_fast_step(const Step& step, unsigned rows, cudaStream_t stream) {
  constexpr int64_t TILE = FAST_THREADS * FAST_VALUES<T>;
  const dim3 grid(static_cast<unsigned>((step.d + TILE - 1) / TILE), rows);
  const bool guided = step.uncond.data, noisy = step.noise.data;
  const auto kernel = guided ? (noisy ? fast_step_kernel<T, true, true> : fast_step_kernel<T, true, false>)
                             : (noisy ? fast_step_kernel<T, false, true> : fast_step_kernel<T, false, false>);
  kernel<<<grid, FAST_THREADS, 0, stream>>>(step);
}

}  // namespace svel::cuda
