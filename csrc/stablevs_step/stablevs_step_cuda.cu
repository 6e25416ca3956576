// svel::affine_step and svel::stablevs_step on CUDA, one launch: out = a x + b v + c noise with v guided.
// Bytes: every input read once, the output written once; 6 operations per element, so bound by memory (or by
// the launch, for small latents). Coefficients come from t and tau in double, once per block.
#include "common/ops.h"
#include "common/path.h"
#include "common/tensors.cuh"

namespace svel::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int GROUP = 8 * THREADS;  // elements that a block takes at a time
constexpr int MANY_BLOCKS = 1024;   // from here on a block takes several groups

struct Step {
  Array sample, velocity, uncond, noise, out;  // (rows, d); uncond and noise may be null
  Array first, second, third;                  // t, tau or a, b, c: (rows,) or one value for all rows
  bool first_shared, second_shared, third_shared;
  bool from_time;
  Path path;
  NoiseSplit split;
  double guidance_scale;
  int64_t d, blocks_per_row;
  bool vectors;  // 8 elements at a time are aligned
};

__device__ StepCoefficients coefficients(const Step& step, int64_t row) {
  const double first = load_as<double>(step.first, step.first_shared ? 0 : row);
  const double second = load_as<double>(step.second, step.second_shared ? 0 : row);
  if (step.from_time) return stablevs_coefficients(step.path, first, second, step.split);
  return {first, second, step.third.data ? load_as<double>(step.third, step.third_shared ? 0 : row) : 0.0};
}

// Grid: blocks_per_row for each row. W: float, or double for a float64 sample. The first loads are on their
// way before the block waits for its coefficients.
template <typename W, int ROUNDS>
__global__ void __launch_bounds__(THREADS) step_kernel(const Step step) {
  __shared__ StepCoefficients shared;
  const int64_t row = blockIdx.x / step.blocks_per_row, base = row * step.d;
  const int64_t begin =
      blockIdx.x % step.blocks_per_row * GROUP * ROUNDS + static_cast<int64_t>(threadIdx.x) * 8;
  W x[8] = {}, v[8] = {}, u[8] = {}, noise[8] = {}, out[8];
  const auto load = [&](int64_t e) {
    if (step.vectors && e + 8 <= step.d) {
      load8<W>(step.sample, base + e, x);
      load8<W>(step.velocity, base + e, v);
      if (step.uncond.data) load8<W>(step.uncond, base + e, u);
      if (step.noise.data) load8<W>(step.noise, base + e, noise);
    } else {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        if (e + k >= step.d) break;
        x[k] = load_as<W>(step.sample, base + e + k);
        v[k] = load_as<W>(step.velocity, base + e + k);
        if (step.uncond.data) u[k] = load_as<W>(step.uncond, base + e + k);
        if (step.noise.data) noise[k] = load_as<W>(step.noise, base + e + k);
      }
    }
  };
  load(begin);
  if (threadIdx.x == 0) shared = coefficients(step, row);
  __syncthreads();
  const W a = static_cast<W>(shared.a), b = static_cast<W>(shared.b), c = static_cast<W>(shared.c);
  const W scale = static_cast<W>(step.guidance_scale);
  const bool guided = step.uncond.data, noisy = step.noise.data;
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const int64_t e = begin + round * GROUP;
    if (round > 0) load(e);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const W velocity = guided ? u[k] + scale * (v[k] - u[k]) : v[k];
      const W mean = a * x[k] + b * velocity;
      out[k] = noisy ? mean + c * noise[k] : mean;
    }
    if (step.vectors && e + 8 <= step.d) {
      store8<W>(step.out, base + e, out);
    } else {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        if (e + k < step.d) store_as(step.out, base + e + k, out[k]);
      }
    }
  }
}

// `step` holds the coefficients' arrays and what they mean; this adds the tensors and launches.
Tensor run(const char* op, Step step, const Tensor& sample, const Tensor& velocity, const MaybeTensor& uncond,
           const MaybeTensor& noise) {
  const torch::stable::accelerator::DeviceGuard guard(sample.get_device_index());
  const Tensor x = packed(sample), v = packed(velocity);
  const MaybeTensor u = packed(uncond), eps = packed(noise);
  const Tensor out = torch::stable::new_empty(x, shape_of(x));
  const int64_t total = x.numel();
  if (total == 0) return out;
  step.sample = array_of(x), step.velocity = array_of(v), step.uncond = array_of(u),
  step.noise = array_of(eps);
  step.out = array_of(out);
  const bool one_row = step.first_shared && step.second_shared && step.third_shared;
  const int64_t rows = one_row ? 1 : x.size(0);
  step.d = total / rows;
  const bool many = total / GROUP >= MANY_BLOCKS;
  const int64_t block = int64_t{GROUP} * (many ? 2 : 1);
  step.blocks_per_row = (step.d + block - 1) / block;
  step.vectors = rows == 1 || step.d % 8 == 0;
  for (const Array& a : {step.sample, step.velocity, step.uncond, step.noise, step.out}) {
    step.vectors = step.vectors && is_aligned(a.data);
  }
  const bool wide = step.sample.dtype == Dtype::f64;
  const auto kernel = wide ? (many ? step_kernel<double, 2> : step_kernel<double, 1>)
                           : (many ? step_kernel<float, 2> : step_kernel<float, 1>);
  kernel<<<static_cast<unsigned>(rows * step.blocks_per_row), THREADS, 0, current_stream(x)>>>(step);
  check_launch(op);
  return out;
}

}  // namespace

Tensor affine_step(const Tensor& sample, const Tensor& velocity, const Tensor& a, const Tensor& b,
                   const MaybeTensor& c, const MaybeTensor& velocity_uncond, const MaybeTensor& noise,
                   double guidance_scale) {
  check_affine_step(sample, velocity, a, b, c, velocity_uncond, noise);
  const Tensor first = packed(a), second = packed(b);
  const MaybeTensor third = packed(c);
  Step step{};
  step.first = array_of(first), step.second = array_of(second), step.third = array_of(third);
  step.first_shared = a.dim() == 0, step.second_shared = b.dim() == 0,
  step.third_shared = !c || c->dim() == 0;
  step.guidance_scale = guidance_scale;
  return run("affine_step", step, sample, velocity, velocity_uncond, noise);
}

Tensor stablevs_step(const Tensor& sample, const Tensor& velocity, const Tensor& t, const Tensor& tau,
                     const MaybeTensor& velocity_uncond, const MaybeTensor& noise, double guidance_scale,
                     double noise_factor, const std::string& path) {
  check_stablevs_step(sample, velocity, t, tau, velocity_uncond, noise, noise_factor, path);
  const Tensor first = packed(t), second = packed(tau);
  Step step{};
  step.first = array_of(first), step.second = array_of(second);
  step.first_shared = t.dim() == 0, step.second_shared = tau.dim() == 0, step.third_shared = true;
  step.from_time = true;
  step.path = path_of(path);
  step.split = split_noise(noise_factor);
  step.guidance_scale = guidance_scale;
  return run("stablevs_step", step, sample, velocity, velocity_uncond,
             noise_factor > 0.0 ? noise : MaybeTensor());
}

}  // namespace svel::cuda
