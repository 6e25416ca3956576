// svel::va_repa_loss and its gradient on CUDA. Bytes: forward reads projected and teacher once, backward
// reads them once (twice through the L1) and writes the gradient; 6 operations per pair of elements, so bound
// by memory. One warp per token; sums over tokens in two stages in a fixed order, so a result does not change
// from run to run.
#include "common/ops.h"
#include "common/tensors.cuh"

namespace svel::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int64_t MAX_BLOCKS = 2048;
constexpr double MIN_NORM = 1e-8, MIN_WEIGHT_SUM = 1e-8;

struct Tokens {
  Array projected, teacher;  // (b, t, c)
  Array weight;              // (b,)
  int64_t b, t, c;
  bool vectors;  // 8 elements at a time are aligned
};

struct Cosine {
  double value, p_norm, z_norm;  // norms at least MIN_NORM
  bool p_clamped;
};

// f(element, count, p, z) over this lane's elements of the token, in groups of 8 or one by one.
template <typename W, typename F>
__device__ void for_token(const Tokens& in, int64_t token, int lane, const F& f) {
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

// The same in every lane of the warp.
template <typename W>
__device__ Cosine token_cosine(const Tokens& in, int64_t token, int lane) {
  W dot = 0, pp = 0, zz = 0;
  for_token<W>(in, token, lane, [&](int64_t, const auto& p, const auto& z) {
    constexpr int count = sizeof(p) / sizeof(W);
#pragma unroll
    for (int k = 0; k < count; ++k) {
      dot += p[k] * z[k];
      pp += p[k] * p[k];
      zz += z[k] * z[k];
    }
  });
  double sums[3] = {static_cast<double>(dot), static_cast<double>(pp), static_cast<double>(zz)};
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    for (int offset = 16; offset > 0; offset /= 2) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], offset);
  }
  const double p_norm = sqrt(sums[1]), z_norm = sqrt(sums[2]);
  Cosine cosine;
  cosine.p_clamped = p_norm <= MIN_NORM;
  cosine.p_norm = p_norm < MIN_NORM ? MIN_NORM : p_norm;
  cosine.z_norm = z_norm < MIN_NORM ? MIN_NORM : z_norm;
  cosine.value = sums[0] / (cosine.p_norm * cosine.z_norm);
  return cosine;
}

// partial[block] = sum of weight * cosine over the tokens of the block.
template <typename W>
__global__ void __launch_bounds__(THREADS) loss_kernel(const Tokens in, double* partial) {
  __shared__ double scratch[33];
  const int lane = threadIdx.x % 32;
  double sum = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * WARPS;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32; token < in.b * in.t;
       token += step) {
    const Cosine cosine = token_cosine<W>(in, token, lane);
    if (lane == 0) sum += load_as<double>(in.weight, token / in.t) * cosine.value;
  }
  sum = block_sum<double>(sum, scratch);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__device__ double weight_sum(const Tokens& in, double* scratch) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < in.b; i += THREADS) sum += load_as<double>(in.weight, i);
  return block_sum<double>(sum, scratch);
}

__global__ void __launch_bounds__(THREADS)
    reduce_kernel(const Tokens in, const double* partial, int64_t blocks, Array loss) {
  __shared__ double scratch[33];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += THREADS) sum += partial[i];
  sum = block_sum<double>(sum, scratch);
  const double total = weight_sum(in, scratch);
  if (threadIdx.x == 0) {
    store_as(loss, 0, total < MIN_WEIGHT_SUM ? 0.0 : -sum / (total * static_cast<double>(in.t)));
  }
}

template <typename W>
__global__ void __launch_bounds__(THREADS)
    gradient_kernel(const Tokens in, const Array grad, const Array out) {
  __shared__ double scratch[33];
  const int lane = threadIdx.x % 32;
  const double total = weight_sum(in, scratch);
  const double upstream = -load_as<double>(grad, 0) / (total * static_cast<double>(in.t));
  const int64_t step = static_cast<int64_t>(gridDim.x) * WARPS;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32; token < in.b * in.t;
       token += step) {
    const Cosine cosine = token_cosine<W>(in, token, lane);
    const double scale = total < MIN_WEIGHT_SUM ? 0.0 : upstream * load_as<double>(in.weight, token / in.t);
    // scale (z / |z| - cos p / |p|) / |p|; |p| is constant where it is clamped
    const W of_z = static_cast<W>(scale / (cosine.z_norm * cosine.p_norm));
    const W of_p =
        static_cast<W>(cosine.p_clamped ? 0.0 : scale * cosine.value / (cosine.p_norm * cosine.p_norm));
    for_token<W>(in, token, lane, [&](int64_t at, const auto& p, const auto& z) {
      if constexpr (sizeof(p) / sizeof(W) == 8) {
        W g[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) g[k] = of_z * z[k] - of_p * p[k];
        store8<W>(out, at, g);
      } else {
        store_as(out, at, of_z * z[0] - of_p * p[0]);
      }
    });
  }
}

Tokens tokens_of(const Tensor& projected, const Tensor& teacher, const Tensor& weight) {
  Tokens in{array_of(projected),
            array_of(teacher),
            array_of(weight),
            projected.size(0),
            projected.size(1),
            projected.size(2),
            false};
  in.vectors = in.c % 8 == 0 && is_aligned(in.projected.data) && is_aligned(in.teacher.data);
  return in;
}

int64_t blocks_of(const Tokens& in) {
  return std::clamp<int64_t>((in.b * in.t + WARPS - 1) / WARPS, 1, MAX_BLOCKS);
}

}  // namespace

Tensor va_repa_loss(const Tensor& projected, const Tensor& teacher, const Tensor& weight) {
  const char* const op = "va_repa_loss";
  check_va_repa(op, projected, teacher, weight);
  const torch::stable::accelerator::DeviceGuard guard(projected.get_device_index());
  const Tensor p = packed(projected), z = packed(teacher), w = packed(weight);
  const Tokens in = tokens_of(p, z, w);
  const bool wide = p.scalar_type() == ScalarType::Double;
  const int64_t blocks = blocks_of(in);
  const Tensor loss = torch::stable::new_empty(p, {}, wide ? ScalarType::Double : ScalarType::Float);
  const Tensor partial = torch::stable::new_empty(p, {blocks}, ScalarType::Double);
  double* const sums = static_cast<double*>(partial.mutable_data_ptr());
  const cudaStream_t stream = current_stream(p);
  const auto kernel = wide ? loss_kernel<double> : loss_kernel<float>;
  kernel<<<static_cast<unsigned>(blocks), THREADS, 0, stream>>>(in, sums);
  check_launch(op);
  reduce_kernel<<<1, THREADS, 0, stream>>>(in, sums, blocks, array_of(loss));
  check_launch(op);
  return loss;
}

Tensor va_repa_loss_backward(const Tensor& grad, const Tensor& projected, const Tensor& teacher,
                             const Tensor& weight) {
  const char* const op = "va_repa_loss_backward";
  check_va_repa(op, projected, teacher, weight);
  check_dtype(op, "grad", grad, {ScalarType::Float, ScalarType::Double});
  check_shape(op, "grad", grad, {}, "()");
  check_device(op, "grad", grad, projected);
  const torch::stable::accelerator::DeviceGuard guard(projected.get_device_index());
  const Tensor p = packed(projected), z = packed(teacher), w = packed(weight);
  const Tensor out = torch::stable::new_empty(p, shape_of(p));
  if (p.numel() == 0) return out;
  const Tokens in = tokens_of(p, z, w);
  const auto kernel =
      p.scalar_type() == ScalarType::Double ? gradient_kernel<double> : gradient_kernel<float>;
  kernel<<<static_cast<unsigned>(blocks_of(in)), THREADS, 0, current_stream(p)>>>(in, array_of(grad),
                                                                                  array_of(out));
  check_launch(op);
  return out;
}

}  // namespace svel::cuda
