// The step of arrays of any dtypes, sizes and addresses.
#pragma once

#include "common/kernel_launch.cuh"
#include "common/pack.cuh"
#include "stablevs_step/step.cuh"

namespace svel::cuda {

constexpr int ANY_THREADS = 256, ANY_VALUES = 8;

// The bits of a thread's elements of one array, converted only when the loads of all arrays are on their way.
// VECTORS: elements next to each other in aligned 16-byte words; else every 256th, one load each.
template <typename W, bool VECTORS>
struct Elements {
  static constexpr int SLOTS = sizeof(W) / 4;  // 4-byte words to hold any element that W is computed from
  uint32_t words[ANY_VALUES * SLOTS] = {};

  // Elements from `begin` on of the row that starts at element `base` and has d.
  __device__ __forceinline__ void load(const Array& from, int64_t base, int64_t begin, int64_t d) {
    const int size = size_of(from.dtype);
    const char* at = static_cast<const char*>(from.data) + (base + begin) * size;
    if constexpr (VECTORS) {
      if (begin >= d) return;
#pragma unroll
      for (int i = 0; i < 2 * SLOTS; ++i) {
        if (2 * i >= size) break;
        const uint4 word = __ldg(reinterpret_cast<const uint4*>(at) + i);
        words[4 * i] = word.x, words[4 * i + 1] = word.y, words[4 * i + 2] = word.z,
                  words[4 * i + 3] = word.w;
      }
    } else {
#pragma unroll
      for (int k = 0; k < ANY_VALUES; ++k) {
        const int e = k * ANY_THREADS;
        if (begin + e >= d) break;
        if (size == 2) {
          words[k * SLOTS] = __ldg(reinterpret_cast<const unsigned short*>(at) + e);
        } else if (size == 4) {
          words[k * SLOTS] = __ldg(reinterpret_cast<const unsigned*>(at) + e);
        } else if constexpr (SLOTS == 2) {
          const uint2 pair = __ldg(reinterpret_cast<const uint2*>(at) + e);
          words[2 * k] = pair.x, words[2 * k + 1] = pair.y;
        }
      }
    }
  }

  __device__ __forceinline__ uint32_t word(int k) const { return words[VECTORS ? k : k * SLOTS]; }
  __device__ __forceinline__ unsigned short half(int k) const {
    return static_cast<unsigned short>(VECTORS ? words[k / 2] >> (16 * (k % 2)) : words[k * SLOTS]);
  }

  __device__ __forceinline__ void convert(Dtype dtype, W (&out)[ANY_VALUES]) const {
#pragma unroll
    for (int k = 0; k < ANY_VALUES; ++k) {
      if (dtype == Dtype::f32) {
        out[k] = __uint_as_float(word(k));
      } else if (dtype == Dtype::bf16) {
        out[k] = __uint_as_float(static_cast<uint32_t>(half(k)) << 16);
      } else if (dtype == Dtype::f16) {
        out[k] = __half2float(__ushort_as_half(half(k)));
      } else if constexpr (SLOTS == 2) {
        out[k] = __hiloint2double(static_cast<int>(words[2 * k + 1]), static_cast<int>(words[2 * k]));
      }
    }
  }
};

// Grid: tiles of a row, rows. W: double where an array is float64, else float.
template <typename W, bool VECTORS>
__global__ void __launch_bounds__(ANY_THREADS) any_step_kernel(const __grid_constant__ Step step) {
  const int64_t row = step.first_row + blockIdx.y, base = row * step.d;
  const bool guided = step.uncond.data, noisy = step.noise.data;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * (ANY_THREADS * ANY_VALUES) +
                        threadIdx.x * (VECTORS ? ANY_VALUES : 1);
  const RowScalars scalars = load_scalars(step, row);
  Elements<W, VECTORS> sample, velocity, uncond, fresh;
  sample.load(step.sample, base, begin, step.d);
  velocity.load(step.velocity, base, begin, step.d);
  if (guided) uncond.load(step.uncond, base, begin, step.d);
  if (noisy) fresh.load(step.noise, base, begin, step.d);
  const RowCoefficients<W> c = row_coefficients<W>(step, scalars);
  const W guidance = static_cast<W>(step.guidance);
  W x[ANY_VALUES], v[ANY_VALUES], other[ANY_VALUES];
  sample.convert(step.sample.dtype, x);
  velocity.convert(step.velocity.dtype, v);
  if (guided) {
    uncond.convert(step.uncond.dtype, other);
#pragma unroll
    for (int k = 0; k < ANY_VALUES; ++k) v[k] = guided_velocity(v[k], other[k], guidance);
  }
#pragma unroll
  for (int k = 0; k < ANY_VALUES; ++k) x[k] = stepped(c, x[k], v[k]);
  if (noisy) {
    fresh.convert(step.noise.dtype, other);
#pragma unroll
    for (int k = 0; k < ANY_VALUES; ++k) x[k] = with_noise(c, x[k], other[k]);
  }
  if constexpr (VECTORS) {
    if (begin < step.d) store8<W>(step.out, base + begin, x);
  } else {
#pragma unroll
    for (int k = 0; k < ANY_VALUES; ++k) {
      const int64_t e = begin + k * ANY_THREADS;
      if (e < step.d) store_as(step.out, base + e, x[k]);
    }
  }
}

inline void launch_any_step(const char* op, const Step& step, bool vectors, unsigned rows, int device,
                            cudaStream_t stream) {
  constexpr int64_t TILE = ANY_THREADS * ANY_VALUES;
  const dim3 grid(static_cast<unsigned>((step.d + TILE - 1) / TILE), rows);
  bool wide = false;
  for (const Array* a : {&step.sample, &step.velocity, &step.uncond, &step.noise})
    wide = wide || (a->data && a->dtype == Dtype::f64);
  const auto launch = [&](auto work, auto in_vectors) {
    launch_kernel<any_step_kernel<decltype(work), in_vectors.value>>(op, grid, ANY_THREADS, step, device,
                                                                     stream);
  };
  constexpr std::true_type yes;
  constexpr std::false_type no;
  if (wide) {
    vectors ? launch(double{}, yes) : launch(double{}, no);
  } else {
    vectors ? launch(float{}, yes) : launch(float{}, no);
  }
}

}  // namespace svel::cuda
