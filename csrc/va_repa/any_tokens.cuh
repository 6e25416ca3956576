// The loss of features of any dtypes, sizes and addresses: a warp reads a token's channels, in the gradient
// twice (the second time from the L1).
#pragma once

#include "va_repa/tokens.cuh"

namespace svel::cuda {

constexpr int64_t MAX_ANY_BLOCKS = 2048;

// f(element, p, z) over this lane's elements of the token, in groups of 8 or one by one.
template <typename W, typename F>
__device__ __forceinline__ void for_token(const Tokens& in, int64_t token, int lane, const F& f) {
  const int64_t base = token * in.c;
  if (in.vectors) {
    for (int64_t e = lane * 8; e < in.c; e += 32 * 8) {
      W p[8], z[8];
      load8<W>(in.projected, base + e, p);
      load8<W>(in.teacher, base + e, z);
      f(base + e, p, z);
    }
  } else {
    for (int64_t e = lane; e < in.c; e += 32) {
      W p[1] = {load_as<W>(in.projected, base + e)}, z[1] = {load_as<W>(in.teacher, base + e)};
      f(base + e, p, z);
    }
  }
}

template <typename W>
__device__ __forceinline__ TokenSums<double> any_token_sums(const Tokens& in, int64_t token, int lane) {
  TokenSums<W> own{};
  for_token<W>(in, token, lane, [&](int64_t, const auto& p, const auto& z) {
    constexpr int COUNT = sizeof(p) / sizeof(W);
#pragma unroll
    for (int k = 0; k < COUNT; ++k) own.dot += p[k] * z[k], own.pp += p[k] * p[k], own.zz += z[k] * z[k];
  });
  TokenSums<double> sums{own.dot, own.pp, own.zz};
  sums.reduce();
  return sums;
}

// partial[block] = sum of weight * cosine over the tokens of the block. W: float, or double for float64
// features.
template <typename W>
__global__ void __launch_bounds__(LOSS_THREADS) any_loss_kernel(const Tokens in, double* partial) {
  __shared__ double scratch[33];
  const int lane = threadIdx.x % 32;
  const int64_t step = static_cast<int64_t>(gridDim.x) * LOSS_WARPS;
  double sum = 0;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * LOSS_WARPS + threadIdx.x / 32; token < in.count;
       token += step) {
    const double cosine = any_token_sums<W>(in, token, lane).cosine();
    if (lane == 0) sum += load_as<double>(in.weight, token / in.t) * cosine;
  }
  sum = block_sum<double>(sum, scratch);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

template <typename W>
__global__ void __launch_bounds__(LOSS_THREADS)
    any_gradient_kernel(const Tokens in, const Array grad, const Array out) {
  __shared__ double scratch[33];
  const int lane = threadIdx.x % 32;
  const double scale = gradient_scale(in, grad, scratch);
  const int64_t step = static_cast<int64_t>(gridDim.x) * LOSS_WARPS;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * LOSS_WARPS + threadIdx.x / 32; token < in.count;
       token += step) {
    const double weight = load_as<double>(in.weight, token / in.t);
    const GradientFactors<W> factor(any_token_sums<W>(in, token, lane), scale * weight);
    for_token<W>(in, token, lane, [&](int64_t at, const auto& p, const auto& z) {
      constexpr int COUNT = sizeof(p) / sizeof(W);
      W g[COUNT];
#pragma unroll
      for (int k = 0; k < COUNT; ++k) g[k] = factor.of_z * z[k] - factor.of_p * p[k];
      if constexpr (COUNT == 8) {
        store8<W>(out, at, g);
      } else {
        store_as(out, at, g[0]);
      }
    });
  }
}

}  // namespace svel::cuda
