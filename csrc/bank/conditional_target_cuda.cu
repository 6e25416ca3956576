// svel::conditional_target_ on CUDA, one launch. Bytes: x0, noise and target of the rows that are filled; a
// block of any other row reads two times and ends.
#include "common/ops.h"
#include "common/path.h"
#include "common/tensors.cuh"

namespace svel::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int64_t SLICE = int64_t{8} * THREADS;  // elements of a row that a block takes

struct Fill {
  Array target, x0, noise;  // (n, d)
  Array t, t_set;           // (n,)
  Path path;
  Prediction prediction;
  int64_t d, slices;
  bool vectors;  // 8 elements at a time are aligned
};

// Grid: slices of d for each row. W: float, or double for a float64 target.
template <typename W>
__global__ void __launch_bounds__(THREADS) fill_kernel(const Fill fill) {
  __shared__ PredictionCoefficients shared;
  const int64_t row = blockIdx.x / fill.slices;
  const int64_t e = blockIdx.x % fill.slices * SLICE + static_cast<int64_t>(threadIdx.x) * 8;
  const int64_t at = row * fill.d + e;
  const double t = load_as<double>(fill.t, row), t_set = load_as<double>(fill.t_set, row);
  if (!isnan(t_set) || isnan(t)) return;
  if (threadIdx.x == 0) {
    shared = conditional_coefficients(fill.prediction, path_coefficients(fill.path, clamp_time(t)));
  }
  __syncthreads();
  const W a = static_cast<W>(shared.a), b = static_cast<W>(shared.b);
  if (fill.vectors && e + 8 <= fill.d) {
    W x[8], noise[8];
    load8<W>(fill.x0, at, x);
    load8<W>(fill.noise, at, noise);
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] = a * x[j] + b * noise[j];
    store8<W>(fill.target, at, x);
    return;
  }
  for (int j = 0; j < 8 && e + j < fill.d; ++j) {
    store_as(fill.target, at + j, a * load_as<W>(fill.x0, at + j) + b * load_as<W>(fill.noise, at + j));
  }
}

}  // namespace

void conditional_target_(const Tensor& target, const Tensor& x0, const Tensor& noise, const Tensor& t,
                         const Tensor& t_set, const std::string& path, const std::string& prediction) {
  check_conditional_target(target, x0, noise, t, t_set, path, prediction);
  const torch::stable::accelerator::DeviceGuard guard(target.get_device_index());
  const Tensor x = packed(x0), eps = packed(noise), times = packed(t), kept = packed(t_set);
  if (target.numel() == 0) return;
  Fill fill{};
  fill.target = array_of(target), fill.x0 = array_of(x), fill.noise = array_of(eps);
  fill.t = array_of(times), fill.t_set = array_of(kept);
  fill.path = path_of(path);
  fill.prediction = prediction_of(prediction);
  fill.d = product(shape_of(target), 1);
  fill.slices = (fill.d + SLICE - 1) / SLICE;
  fill.vectors = fill.d % 8 == 0 && is_aligned(fill.target.data) && is_aligned(fill.x0.data) &&
                 is_aligned(fill.noise.data);
  const auto kernel = fill.target.dtype == Dtype::f64 ? fill_kernel<double> : fill_kernel<float>;
  kernel<<<static_cast<unsigned>(target.size(0) * fill.slices), THREADS, 0, current_stream(target)>>>(fill);
  check_launch("conditional_target_");
}

}  // namespace svel::cuda
