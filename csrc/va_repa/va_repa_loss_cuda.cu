// svel::va_repa_loss and its gradient on CUDA. Bytes: forward reads projected and teacher once, backward
// reads them once and writes the gradient; 6 operations per pair of elements, so bound by memory. One warp
// per token; sums over tokens in two stages in a fixed order, so a result does not change from run to run.
#include <type_traits>

#include "common/allocate.h"
#include "common/ops.h"
#include "common/tensors.cuh"
#include "va_repa/any_tokens.cuh"
#include "va_repa/held_tokens.cuh"

namespace svel::cuda {
namespace {

constexpr int REDUCE_THREADS = 1024;

__global__ void __launch_bounds__(REDUCE_THREADS)
    reduce_kernel(const Tokens in, const double* partial, int64_t blocks, Array loss) {
  __shared__ double scratch[33];
  double sum = 0, total = own_weight_sum(in);
  for (int64_t i = threadIdx.x; i < blocks; i += REDUCE_THREADS) sum += partial[i];
  sum = block_sum<double>(sum, scratch);
  total = block_sum<double>(total, scratch);
  if (threadIdx.x == 0) {
    store_as(loss, 0, total < MIN_WEIGHT_SUM ? 0.0 : -sum / (total * static_cast<double>(in.t)));
  }
}

Tokens tokens_of(const Tensor& projected, const Tensor& teacher, const Tensor& weight) {
  Tokens in{};
  in.projected = array_of(projected), in.teacher = array_of(teacher), in.weight = array_of(weight);
  in.b = projected.size(0), in.t = projected.size(1), in.c = projected.size(2);
  in.count = in.b * in.t;
  in.vectors = in.c % PACK == 0 && is_aligned(in.projected.data) && is_aligned(in.teacher.data);
  return in;
}

bool can_hold(const Tokens& in) {
  return in.vectors && in.c <= MAX_PACKS * CHANNELS_OF_A_PACK && in.projected.dtype == in.teacher.dtype &&
         in.projected.dtype != Dtype::f64;
}

// f(T{}, packs) with packs a constant, for tokens that can be held.
template <typename T, typename F>
void for_packs(const Tokens& in, const F& f) {
  const int64_t packs = (in.c + CHANNELS_OF_A_PACK - 1) / CHANNELS_OF_A_PACK;
  if (packs <= 1) return f(T{}, std::integral_constant<int, 1>{});
  if (packs == 2) return f(T{}, std::integral_constant<int, 2>{});
  if (packs == 3) return f(T{}, std::integral_constant<int, 3>{});
  return f(T{}, std::integral_constant<int, MAX_PACKS>{});
}

template <typename F>
void for_held(const Tokens& in, const F& f) {
  if (in.projected.dtype == Dtype::f32) return for_packs<float>(in, f);
  if (in.projected.dtype == Dtype::bf16) return for_packs<__nv_bfloat16>(in, f);
  return for_packs<__half>(in, f);
}

int64_t blocks_of(const Tokens& in, int64_t most) {
  return std::clamp<int64_t>((in.count + LOSS_WARPS - 1) / LOSS_WARPS, 1, most);
}

}  // namespace

Tensor va_repa_loss(const Tensor& projected, const Tensor& teacher, const Tensor& weight) {
  const char* const op = "va_repa_loss";
  check_va_repa(op, projected, teacher, weight);
  const torch::stable::accelerator::DeviceGuard guard(projected.get_device_index());
  const Tensor p = packed(projected), z = packed(teacher), w = packed(weight);
  const Tokens in = tokens_of(p, z, w);
  const bool wide = in.projected.dtype == Dtype::f64, held = can_hold(in);
  const int64_t blocks = blocks_of(in, held ? MAX_HELD_LOSS_BLOCKS : MAX_ANY_BLOCKS);
  const Tensor loss = torch::stable::new_empty(p, {}, wide ? ScalarType::Double : ScalarType::Float);
  const Tensor partial = torch::stable::new_empty(p, {blocks}, ScalarType::Double);
  double* const sums = static_cast<double*>(partial.mutable_data_ptr());
  const cudaStream_t stream = current_stream(p);
  const unsigned grid = static_cast<unsigned>(blocks);
  if (held) {
    for_held(in, [&](auto type, auto packs) {
      held_loss_kernel<decltype(type), packs><<<grid, LOSS_THREADS, 0, stream>>>(in, sums);
    });
  } else {
    const auto kernel = wide ? any_loss_kernel<double> : any_loss_kernel<float>;
    kernel<<<grid, LOSS_THREADS, 0, stream>>>(in, sums);
  }
  check_launch(op);
  reduce_kernel<<<1, REDUCE_THREADS, 0, stream>>>(in, sums, blocks, array_of(loss));
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
  const Tensor out = packed_like(p);
  if (p.numel() == 0) return out;
  const Tokens in = tokens_of(p, z, w);
  const cudaStream_t stream = current_stream(p);
  if (can_hold(in)) {
    // a warp for each token: 2^31 blocks are more than memory holds
    const unsigned grid = static_cast<unsigned>(blocks_of(in, INT32_MAX));
    for_held(in, [&](auto type, auto packs) {
      using T = decltype(type);
      T* const to = static_cast<T*>(out.mutable_data_ptr());
      held_gradient_kernel<T, packs><<<grid, LOSS_THREADS, 0, stream>>>(in, array_of(grad), to);
    });
  } else {
    const auto kernel =
        in.projected.dtype == Dtype::f64 ? any_gradient_kernel<double> : any_gradient_kernel<float>;
    const unsigned grid = static_cast<unsigned>(blocks_of(in, MAX_ANY_BLOCKS));
    kernel<<<grid, LOSS_THREADS, 0, stream>>>(in, array_of(grad), array_of(out));
  }
  check_launch(op);
  return out;
}

}  // namespace svel::cuda
