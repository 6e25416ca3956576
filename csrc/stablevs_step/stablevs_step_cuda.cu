// svel::affine_step and svel::stablevs_step on CUDA, one launch: out = a x + b v + c noise with v guided.
// Bytes: every input read once, the output written once; 6 operations per element, so bound by memory (or by
// the launch, for small latents). Coefficients come from t and tau in double, in the same launch.
#include <optional>

#include "common/allocate.h"
#include "common/ops.h"
#include "common/tensors.cuh"
#include "stablevs_step/any_step.cuh"
#include "stablevs_step/fast_step.cuh"

namespace svel::cuda {
namespace {

constexpr int64_t MAX_GRID_Y = 65535;

Scalars scalars_of(const Tensor& t) {
  return {t.const_data_ptr(), t.scalar_type() == ScalarType::Double, t.dim() == 0};
}

void launch(const Step& step, bool vectors, bool one_dtype, unsigned rows, cudaStream_t stream) {
  if (!vectors || !one_dtype) return launch_any_step(step, vectors, rows, stream);
  switch (step.sample.dtype) {
    case Dtype::f32:
      return launch_fast_step<float>(step, rows, stream);
    case Dtype::bf16:
      return launch_fast_step<__nv_bfloat16>(step, rows, stream);
    case Dtype::f16:
      return launch_fast_step<__half>(step, rows, stream);
    default:
      return launch_fast_step<double>(step, rows, stream);
  }
}

// Makes the device of a tensor the current one. It mostly is, and asking costs less than torch's guard.
std::optional<torch::stable::accelerator::DeviceGuard> on_device_of(const char* op, const Tensor& t) {
  int current = -1;
  check_cuda(op, cudaGetDevice(&current));
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (current != t.get_device_index()) guard.emplace(t.get_device_index());
  return guard;
}

// `step` holds the coefficients' arrays and what they mean; this adds the tensors and launches.
Tensor run(const char* op, Step step, const Tensor& sample, const Tensor& velocity, const MaybeTensor& uncond,
           const MaybeTensor& noise) {
  const Tensor x = packed(sample), v = packed(velocity);
  const MaybeTensor u = packed(uncond), eps = packed(noise);
  const Tensor out = packed_like(x);
  const int64_t total = x.numel();
  if (total == 0) return out;
  step.sample = array_of(x), step.velocity = array_of(v), step.uncond = array_of(u),
  step.noise = array_of(eps), step.out = array_of(out);
  const bool one_row = step.first.shared && step.second.shared && step.third.shared;
  step.rows = one_row ? 1 : x.size(0);
  step.d = total / step.rows;
  bool vectors = step.d % 8 == 0, one_dtype = true;
  for (const Array& a : {step.sample, step.velocity, step.uncond, step.noise, step.out}) {
    vectors = vectors && is_aligned(a.data);
    one_dtype = one_dtype && (!a.data || a.dtype == step.sample.dtype);
  }
  const cudaStream_t stream = current_stream(x);
  for (; step.first_row < step.rows; step.first_row += MAX_GRID_Y) {
    const int64_t rows = std::min(MAX_GRID_Y, step.rows - step.first_row);
    launch(step, vectors, one_dtype, static_cast<unsigned>(rows), stream);
    check_launch(op);
  }
  return out;
}

}  // namespace

Tensor affine_step(const Tensor& sample, const Tensor& velocity, const Tensor& a, const Tensor& b,
                   const MaybeTensor& c, const MaybeTensor& velocity_uncond, const MaybeTensor& noise,
                   double guidance_scale) {
  check_affine_step(sample, velocity, a, b, c, velocity_uncond, noise);
  const auto guard = on_device_of("affine_step", sample);
  const Tensor first = packed(a), second = packed(b);
  const MaybeTensor third = packed(c);
  Step step{};
  step.first = scalars_of(first), step.second = scalars_of(second);
  step.third = third ? scalars_of(*third) : Scalars{nullptr, false, true};
  step.coefficients = Coefficients::given;
  step.guidance = guidance_scale;
  return run("affine_step", step, sample, velocity, velocity_uncond, noise);
}

Tensor stablevs_step(const Tensor& sample, const Tensor& velocity, const Tensor& t, const Tensor& tau,
                     const MaybeTensor& velocity_uncond, const MaybeTensor& noise, double guidance_scale,
                     double noise_factor, const std::string& path) {
  check_stablevs_step(sample, velocity, t, tau, velocity_uncond, noise, noise_factor, path);
  const auto guard = on_device_of("stablevs_step", sample);
  const Tensor first = packed(t), second = packed(tau);
  Step step{};
  step.first = scalars_of(first), step.second = scalars_of(second), step.third = {nullptr, false, true};
  step.coefficients = path_of(path) == Path::cosine ? Coefficients::cosine : Coefficients::linear;
  step.split = split_noise(noise_factor);
  step.guidance = guidance_scale;
  return run("stablevs_step", step, sample, velocity, velocity_uncond,
             noise_factor > 0.0 ? noise : MaybeTensor());
}

}  // namespace svel::cuda
