// The arguments of the alignment loss and what both kinds of kernel do with a token's sums.
#pragma once

#include "common/device.cuh"

namespace svel::cuda {

constexpr int LOSS_THREADS = 256, LOSS_WARPS = LOSS_THREADS / 32;
constexpr double MIN_NORM = 1e-8, MIN_WEIGHT_SUM = 1e-8;

struct Tokens {
  Array projected, teacher;  // (b, t, c)
  Array weight;              // (b,)
  int64_t b, t, c, count;    // count = b t
  bool vectors;              // 8 channels at a time are aligned
};

// dot = p . z and the squares of p and z over one token. R: what the norms and the cosine are computed in.
template <typename R>
struct TokenSums {
  R dot, pp, zz;

  // Over the warp, the same in every lane, in a fixed order.
  __device__ __forceinline__ void reduce() {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      dot += __shfl_xor_sync(0xffffffffu, dot, offset);
      pp += __shfl_xor_sync(0xffffffffu, pp, offset);
      zz += __shfl_xor_sync(0xffffffffu, zz, offset);
    }
  }
  __device__ __forceinline__ R p_norm() const { return floor_of(sqrt(pp)); }
  __device__ __forceinline__ R z_norm() const { return floor_of(sqrt(zz)); }
  __device__ __forceinline__ R cosine() const { return dot / (p_norm() * z_norm()); }

 private:
  // NaN stays NaN
  __device__ static R floor_of(R norm) { return norm < R(MIN_NORM) ? R(MIN_NORM) : norm; }
};

// gradient = of_z z - of_p p for scale d cosine / d p = scale (z / |z| - cosine p / |p|) / |p|; |p| is
// constant where it is clamped.
template <typename W>
struct GradientFactors {
  W of_z, of_p;

  template <typename R>
  __device__ __forceinline__ GradientFactors(const TokenSums<R>& sums, R scale) {
    const R inverse = R(1) / sums.p_norm();
    of_z = static_cast<W>(scale * inverse / sums.z_norm());
    const bool clamped = sqrt(sums.pp) <= R(MIN_NORM);
    of_p = static_cast<W>(clamped ? R(0) : scale * sums.cosine() * inverse * inverse);
  }
};

// This thread's part of the sum of the weights.
__device__ __forceinline__ double own_weight_sum(const Tokens& in) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < in.b; i += blockDim.x) sum += load_as<double>(in.weight, i);
  return sum;
}

// What a token of weight 1 multiplies its d cosine / d p with.
__device__ __forceinline__ double gradient_scale(const Tokens& in, const Array& grad, double* scratch) {
  const double upstream = load_as<double>(grad, 0), total = block_sum<double>(own_weight_sum(in), scratch);
  return total < MIN_WEIGHT_SUM ? 0.0 : -upstream / (total * static_cast<double>(in.t));
}

}  // namespace svel::cuda
