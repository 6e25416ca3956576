// The step of aligned arrays of one dtype, D % 8 == 0: all loads of a thread are on their way before the
// first is used.
#pragma once

#include "common/kernel_launch.cuh"
#include "common/pack.cuh"
#include "stablevs_step/step.cuh"

namespace svel::cuda {

// Measured on an H100, bfloat16, guided: of 64 to 512 threads, 1 to 4 packs a thread and cached or streaming
// accesses, all are within 3 % at 1 x 16 x 128 x 128 (5.4 to 5.8 µs) and streaming ones lose 5 to 8 % at
// 64 x 16 x 21 x 90 x 160 (798 against 840 to 867 µs).
constexpr int FAST_THREADS = 128, FAST_BLOCKS_PER_SM = 8;

template <typename T>
constexpr int FAST_VALUES = sizeof(T) == 8 ? 4 : 8;  // of a thread

// A step as the kernel takes it, what the loads wait for first: a launch leaves its parameters in memory, and
// each 64 bytes of them that a multiprocessor asks for come from there.
template <typename W>
struct FastStep {
  const void *first, *second, *sample, *velocity, *uncond;
  void* out;
  uint32_t kinds;  // of first, second, third: bits 0 to 2 where wide, 4 to 6 where one value for all rows
  uint32_t first_row;
  int64_t d;
  W guidance;
  const void *noise, *third;
  NoiseSplit split;
};

template <typename W>
__device__ __forceinline__ uint2 load_scalar(const FastStep<W>& step, int which, const void* data,
                                             int64_t row) {
  const int64_t i = step.kinds >> (4 + which) & 1 ? 0 : row;
  if (step.kinds >> which & 1) return __ldg(static_cast<const uint2*>(data) + i);
  return {__ldg(static_cast<const unsigned*>(data) + i), 0u};
}

template <typename W>
__device__ __forceinline__ double scalar_value(const FastStep<W>& step, int which, uint2 bits) {
  return step.kinds >> which & 1 ? __hiloint2double(static_cast<int>(bits.y), static_cast<int>(bits.x))
                                 : static_cast<double>(__uint_as_float(bits.x));
}

// Grid: tiles of a row, rows. KIND in the type: the sines of one kind cost the others time, in code that is
// read from memory.
template <typename T, bool GUIDED, bool NOISY, Coefficients KIND>
__global__ void __launch_bounds__(FAST_THREADS, FAST_BLOCKS_PER_SM)
    fast_step_kernel(const __grid_constant__ FastStep<Work<T>> step) {
  using W = Work<T>;
  constexpr int VALUES = FAST_VALUES<T>;
  const int64_t row = step.first_row + blockIdx.y;
  const uint2 first = load_scalar(step, 0, step.first, row), second = load_scalar(step, 1, step.second, row);
  uint2 third{};
  if constexpr (NOISY && KIND == Coefficients::given) third = load_scalar(step, 2, step.third, row);
  const int64_t e = (static_cast<int64_t>(blockIdx.x) * FAST_THREADS + threadIdx.x) * VALUES;
  const int64_t at = row * step.d + e;
  const bool inside = e < step.d;
  Pack<T, VALUES> x, v, u, noise;
  if (inside) {
    x.load(static_cast<const T*>(step.sample) + at);
    v.load(static_cast<const T*>(step.velocity) + at);
    if constexpr (GUIDED) u.load(static_cast<const T*>(step.uncond) + at);
    if constexpr (NOISY) noise.load(static_cast<const T*>(step.noise) + at);
  }
  const RowCoefficients<W> c =
      row_coefficients<W, KIND>(scalar_value(step, 0, first), scalar_value(step, 1, second),
                                scalar_value(step, 2, third), NOISY ? step.split : NoiseSplit{1.0, 0.0});
  if (!inside) return;
  W out[VALUES];
#pragma unroll
  for (int k = 0; k < VALUES; ++k) {
    const W guided = GUIDED ? u.get(k) + step.guidance * (v.get(k) - u.get(k)) : v.get(k);
    out[k] = c.a * x.get(k) + c.b * guided;
    if constexpr (NOISY) out[k] += c.c * noise.get(k);
  }
  x.fill(out);
  x.store(static_cast<T*>(step.out) + at);
}

template <typename T, Coefficients KIND>
void launch_fast_step(const char* op, const Step& step, unsigned rows, int device, cudaStream_t stream) {
  using W = Work<T>;
  constexpr int64_t TILE = FAST_THREADS * FAST_VALUES<T>;
  const dim3 grid(static_cast<unsigned>((step.d + TILE - 1) / TILE), rows);
  uint32_t kinds = 0;
  const Scalars* const scalars[] = {&step.first, &step.second, &step.third};
  for (int i = 0; i < 3; ++i) kinds |= scalars[i]->wide << i | scalars[i]->shared << (4 + i);
  const FastStep<W> given{step.first.data,
                          step.second.data,
                          step.sample.data,
                          step.velocity.data,
                          step.uncond.data,
                          step.out.data,
                          kinds,
                          static_cast<uint32_t>(step.first_row),
                          step.d,
                          static_cast<W>(step.guidance),
                          step.noise.data,
                          step.third.data,
                          step.split};
  const auto launch = [&](auto guided, auto noisy) {
    launch_kernel<fast_step_kernel<T, guided.value, noisy.value, KIND>>(op, grid, FAST_THREADS, given, device,
                                                                        stream);
  };
  constexpr std::true_type yes;
  constexpr std::false_type no;
  if (step.uncond.data) {
    step.noise.data ? launch(yes, yes) : launch(yes, no);
  } else {
    step.noise.data ? launch(no, yes) : launch(no, no);
  }
}

}  // namespace svel::cuda
