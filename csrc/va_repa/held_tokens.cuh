// The loss of aligned features of one dtype, float32 or 16 bits, of at most 1024 channels in whole packs of
// 8: a warp holds a token in registers, so that the gradient's two passes over its channels are one read.
// Measured on an H100 at 65,536 tokens: a warp for each token is as fast as 3 to 32 blocks per SM in a loop,
// or faster; loads ahead of their token, streaming hints and double sums cost 2 to 12 %.
#pragma once

#include "common/pack.cuh"
#include "va_repa/tokens.cuh"

namespace svel::cuda {

constexpr int PACK = 8, CHANNELS_OF_A_PACK = 32 * PACK, MAX_PACKS = 4;
constexpr int64_t MAX_HELD_LOSS_BLOCKS = 1 << 16;  // more tokens than these hold take turns

// Channels lane 8 + [0, 8), in steps of 256; zeros beyond C.
template <typename T, int PACKS>
struct HeldToken {
  Pack<T, PACK> p[PACKS], z[PACKS];

  __device__ __forceinline__ HeldToken(const Tokens& in, int64_t token, int lane) {
    const int64_t base = token * in.c;
#pragma unroll
    for (int j = 0; j < PACKS; ++j) {
      const int e = lane * PACK + j * CHANNELS_OF_A_PACK;
      if (e < in.c) {
        p[j].load(static_cast<const T*>(in.projected.data) + base + e);
        z[j].load(static_cast<const T*>(in.teacher.data) + base + e);
      } else {
        p[j] = {}, z[j] = {};
      }
    }
  }

  __device__ __forceinline__ TokenSums<float> sums() const {
    TokenSums<float> sums{};
#pragma unroll
    for (int j = 0; j < PACKS; ++j) {
#pragma unroll
      for (int k = 0; k < PACK; ++k) {
        const float a = p[j].get(k), b = z[j].get(k);
        sums.dot += a * b, sums.pp += a * a, sums.zz += b * b;
      }
    }
    sums.reduce();
    return sums;
  }
};

// partial[block] = sum of weight * cosine over the tokens of the block.
template <typename T, int PACKS>
__global__ void __launch_bounds__(LOSS_THREADS)
    held_loss_kernel(const __grid_constant__ Tokens in, double* partial) {
  __shared__ double scratch[33];
  const int lane = threadIdx.x % 32;
  const int64_t step = static_cast<int64_t>(gridDim.x) * LOSS_WARPS;
  double sum = 0;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * LOSS_WARPS + threadIdx.x / 32; token < in.count;
       token += step) {
    const HeldToken<T, PACKS> held(in, token, lane);
    const double weight = load_as<double>(in.weight, token / in.t);
    const float cosine = held.sums().cosine();
    if (lane == 0) sum += weight * static_cast<double>(cosine);
  }
  sum = block_sum<double>(sum, scratch);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// Last tokens first: they are what the forward pass has left in the L2.
template <typename T, int PACKS>
__global__ void __launch_bounds__(LOSS_THREADS)
    held_gradient_kernel(const __grid_constant__ Tokens in, const Array grad, T* out) {
  __shared__ double scratch[33];
  const int lane = threadIdx.x % 32;
  const int64_t token = in.count - 1 - (static_cast<int64_t>(blockIdx.x) * LOSS_WARPS + threadIdx.x / 32);
  const int64_t held_token = token < 0 ? 0 : token;
  const HeldToken<T, PACKS> held(in, held_token, lane);
  const double weight = load_as<double>(in.weight, held_token / in.t);
  const double scale = gradient_scale(in, grad, scratch);
  if (token < 0) return;
  const GradientFactors<float> factor(held.sums(), static_cast<float>(scale) * static_cast<float>(weight));
  T* const to = out + token * in.c + lane * PACK;
#pragma unroll
  for (int j = 0; j < PACKS; ++j) {
    if (lane * PACK + j * CHANNELS_OF_A_PACK >= in.c) break;
    float values[PACK];
#pragma unroll
    for (int k = 0; k < PACK; ++k) {
      values[k] = factor.of_z * held.z[j].get(k) - factor.of_p * held.p[j].get(k);
    }
    Pack<T, PACK> gradient;
    gradient.fill(values);
    gradient.store(to + j * CHANNELS_OF_A_PACK);
  }
}

}  // namespace svel::cuda
