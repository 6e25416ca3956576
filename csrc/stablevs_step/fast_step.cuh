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

constexpr int64_t MOST_FAST = INT32_MAX;  // elements of a row, which are counted in 32 bits

// A step as the kernel takes it, in the order in which it is needed: a launch leaves its parameters in
// memory.
template <typename W>
struct FastStep {
  const void *sample, *velocity, *uncond, *first, *second;
  uint32_t d;      // below 2^31
  uint32_t kinds;  // a byte each of first, second, third: bytes to the next row (4, 8 or 0), plus 1 if wide
  uint32_t first_row;
  W guidance;
  void* out;
  const void *noise, *third;
  NoiseSplit split;
};

// The bits of first, second or third (0, 1, 2) at a row, and their value.
__device__ __forceinline__ uint2 load_scalar(const void* data, uint32_t kinds, int which, int64_t row) {
  const char* at = static_cast<const char*>(data) + row * (kinds >> 8 * which & 12);
  uint2 bits{__ldg(reinterpret_cast<const unsigned*>(at)), 0u};
  if (kinds >> 8 * which & 1) bits.y = __ldg(reinterpret_cast<const unsigned*>(at) + 1);
  return bits;
}
__device__ __forceinline__ double scalar_value(uint2 bits, uint32_t kinds, int which) {
  return kinds >> 8 * which & 1 ? __hiloint2double(static_cast<int>(bits.y), static_cast<int>(bits.x))
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
  const uint32_t e = (blockIdx.x * FAST_THREADS + threadIdx.x) * VALUES, kinds = step.kinds;
  // Threads beyond the row load its last pack again: no branch before the loads.
  const int64_t at = row * step.d + min(e, step.d - VALUES);
  Pack<T, VALUES> x, v, u, noise;
  x.load(static_cast<const T*>(step.sample) + at);
  v.load(static_cast<const T*>(step.velocity) + at);
  if constexpr (GUIDED) u.load(static_cast<const T*>(step.uncond) + at);
  if constexpr (NOISY) noise.load(static_cast<const T*>(step.noise) + at);
  const uint2 first = load_scalar(step.first, kinds, 0, row),
              second = load_scalar(step.second, kinds, 1, row);
  uint2 third{};
  if constexpr (NOISY && KIND == Coefficients::given) third = load_scalar(step.third, kinds, 2, row);
  const RowCoefficients<W> c =
      row_coefficients<W, KIND>(scalar_value(first, kinds, 0), scalar_value(second, kinds, 1),
                                scalar_value(third, kinds, 2), NOISY ? step.split : NoiseSplit{1.0, 0.0});
  if (e >= step.d) return;
  W out[VALUES];
#pragma unroll
  for (int k = 0; k < VALUES; ++k) {
    W velocity = v.get(k);
    if constexpr (GUIDED) velocity = guided_velocity(velocity, u.get(k), step.guidance);
    out[k] = stepped(c, x.get(k), velocity);
    if constexpr (NOISY) out[k] = with_noise(c, out[k], noise.get(k));
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
  for (int i = 0; i < 3; ++i) {
    const uint32_t stride = scalars[i]->shared ? 0 : scalars[i]->wide ? 8 : 4;
    kinds |= (stride | scalars[i]->wide) << 8 * i;
  }
  const FastStep<W> given{step.sample.data,
                          step.velocity.data,
                          step.uncond.data,
                          step.first.data,
                          step.second.data,
                          static_cast<uint32_t>(step.d),
                          kinds,
                          static_cast<uint32_t>(step.first_row),
                          static_cast<W>(step.guidance),
                          step.out.data,
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
