// The step of arrays of one dtype whose addresses no 16-byte load may have: aligned words are loaded and
// shifted into place. For one row, or rows of whole packs; the output is aligned.
#pragma once

#include "common/kernel_launch.cuh"
#include "common/pack.cuh"
#include "stablevs_step/step.cuh"

namespace svel::cuda {

constexpr int SHIFTED_THREADS = 128;

// VALUES elements at any address: the aligned words that hold them, then the pack they make.
template <typename T, int VALUES>
struct Shifted {
  static constexpr int WORDS = Pack<T, VALUES>::WORDS;
  uint4 raw[WORDS + 1] = {};

  // Of elements before `end`. Words without any of them are not read; one that has some is in memory whole,
  // which is mapped in larger pieces.
  __device__ __forceinline__ void load(const T* from, const T* end) {
    const uintptr_t first = reinterpret_cast<uintptr_t>(from) & ~uintptr_t{15};
#pragma unroll
    for (int i = 0; i <= WORDS; ++i) {
      const uintptr_t word = first + 16 * i;
      if (word < reinterpret_cast<uintptr_t>(end) && word < reinterpret_cast<uintptr_t>(from + VALUES))
        raw[i] = __ldg(reinterpret_cast<const uint4*>(word));
    }
  }

  // `from`: the address they were loaded from, whose last bits are the same for all threads.
  __device__ __forceinline__ Pack<T, VALUES> pack(const T* from) const {
    const unsigned bytes = reinterpret_cast<uintptr_t>(from) & 15;
    uint32_t words[4 * WORDS + 4];
#pragma unroll
    for (int i = 0; i <= WORDS; ++i)
      words[4 * i] = raw[i].x, words[4 * i + 1] = raw[i].y, words[4 * i + 2] = raw[i].z,
                words[4 * i + 3] = raw[i].w;
    if (bytes & 8) {
#pragma unroll
      for (int i = 0; i < 4 * WORDS + 2; ++i) words[i] = words[i + 2];
    }
    if (bytes & 4) {
#pragma unroll
      for (int i = 0; i < 4 * WORDS + 1; ++i) words[i] = words[i + 1];
    }
#pragma unroll
    for (int i = 0; i < 4 * WORDS; ++i) words[i] = __funnelshift_r(words[i], words[i + 1], 8 * (bytes & 3));
    Pack<T, VALUES> out;
#pragma unroll
    for (int i = 0; i < WORDS; ++i)
      out.raw[i] = make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
    return out;
  }
};

// Grid: tiles of a row, rows.
template <typename T>
__global__ void __launch_bounds__(SHIFTED_THREADS) shifted_step_kernel(const __grid_constant__ Step step) {
  using W = Work<T>;
  constexpr int VALUES = 16 / sizeof(T);
  const int64_t row = step.first_row + blockIdx.y;
  const int64_t e = (static_cast<int64_t>(blockIdx.x) * SHIFTED_THREADS + threadIdx.x) * VALUES;
  const int64_t at = row * step.d + e, end = (row + 1) * step.d;
  const bool guided = step.uncond.data, noisy = step.noise.data;
  const RowScalars scalars = load_scalars(step, row);
  Shifted<T, VALUES> x_words, v_words, u_words, noise_words;
  const auto load = [&](Shifted<T, VALUES>& words, const Array& a) {
    const T* const data = static_cast<const T*>(a.data);
    if (e < step.d) words.load(data + at, data + end);
  };
  const auto pack = [&](const Shifted<T, VALUES>& words, const Array& a) {
    return words.pack(static_cast<const T*>(a.data) + at);
  };
  load(x_words, step.sample);
  load(v_words, step.velocity);
  if (guided) load(u_words, step.uncond);
  if (noisy) load(noise_words, step.noise);
  const RowCoefficients<W> c = row_coefficients<W>(step, scalars);
  if (e >= step.d) return;
  const W guidance = static_cast<W>(step.guidance);
  Pack<T, VALUES> x = pack(x_words, step.sample);
  const Pack<T, VALUES> v = pack(v_words, step.velocity);
  W out[VALUES];
#pragma unroll
  for (int k = 0; k < VALUES; ++k) out[k] = v.get(k);
  if (guided) {
    const Pack<T, VALUES> u = pack(u_words, step.uncond);
#pragma unroll
    for (int k = 0; k < VALUES; ++k) out[k] = guided_velocity(out[k], u.get(k), guidance);
  }
#pragma unroll
  for (int k = 0; k < VALUES; ++k) out[k] = stepped(c, x.get(k), out[k]);
  if (noisy) {
    const Pack<T, VALUES> noise = pack(noise_words, step.noise);
#pragma unroll
    for (int k = 0; k < VALUES; ++k) out[k] = with_noise(c, out[k], noise.get(k));
  }
  T* const to = static_cast<T*>(step.out.data) + at;
  if (e + VALUES <= step.d) {
    x.fill(out);
    x.store(to);
  } else {
#pragma unroll
    for (int k = 0; k < VALUES; ++k)
      if (e + k < step.d) store_as(step.out, at + k, out[k]);
  }
}

template <typename T>
void launch_shifted_step(const char* op, const Step& step, unsigned rows, int device, cudaStream_t stream) {
  constexpr int64_t TILE = SHIFTED_THREADS * (16 / sizeof(T));
  const dim3 grid(static_cast<unsigned>((step.d + TILE - 1) / TILE), rows);
  launch_kernel<shifted_step_kernel<T>>(op, grid, SHIFTED_THREADS, step, device, stream);
}

}  // namespace svel::cuda
