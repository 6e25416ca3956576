// svel::affine_step and svel::stablevs_step on CUDA, one launch: out = a x + b v + c noise with v guided.
// Bytes: every input read once, the output written once; 6 operations per element, so bound by memory (or by
// the launch, for small latents). Coefficients come from t and tau in double, in the same launch.
#include <optional>

#include "common/allocate.h"
#include "common/ops.h"
#include "common/tensors.cuh"
#include "stablevs_step/any_step.cuh"
#include "stablevs_step/fast_step.cuh"
#include "stablevs_step/shifted_step.cuh"
#include "stablevs_step/step_checks.h"

namespace svel::cuda {
namespace {

constexpr int64_t MAX_GRID_Y = 65535;

Scalars scalars_of(const Argument& t) {
  return {t.const_data_ptr(), t.scalar_type() == ScalarType::Double, t.dim() == 0};
}
constexpr Scalars NO_SCALARS{nullptr, false, true};

template <typename T>
void launch_of_dtype(const char* op, const Step& step, bool aligned, unsigned rows, int device,
                     cudaStream_t stream) {
  if (!aligned) return launch_shifted_step<T>(op, step, rows, device, stream);
  switch (step.coefficients) {
    case Coefficients::linear:
      return launch_fast_step<T, Coefficients::linear>(op, step, rows, device, stream);
    case Coefficients::cosine:
      return launch_fast_step<T, Coefficients::cosine>(op, step, rows, device, stream);
    default:
      return launch_fast_step<T, Coefficients::given>(op, step, rows, device, stream);
  }
}

void launch(const char* op, const Step& step, bool aligned, bool one_dtype, unsigned rows, int device,
            cudaStream_t stream) {
  const bool whole_packs = step.d % 8 == 0;
  if (!one_dtype || !(whole_packs || step.rows == 1))
    return launch_any_step(op, step, aligned && whole_packs, rows, device, stream);
  aligned = aligned && whole_packs && step.d <= MOST_FAST;
  switch (step.sample.dtype) {
    case Dtype::f32:
      return launch_of_dtype<float>(op, step, aligned, rows, device, stream);
    case Dtype::bf16:
      return launch_of_dtype<__nv_bfloat16>(op, step, aligned, rows, device, stream);
    case Dtype::f16:
      return launch_of_dtype<__half>(op, step, aligned, rows, device, stream);
    default:
      return launch_of_dtype<double>(op, step, aligned, rows, device, stream);
  }
}

// Makes the device of a tensor the current one. It mostly is, and asking costs less than torch's guard.
std::optional<torch::stable::accelerator::DeviceGuard> on_device_of(const char* op, const Argument& t) {
  int current = -1;
  check_cuda(op, cudaGetDevice(&current));
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (current != t.device_index()) guard.emplace(t.device_index());
  return guard;
}

// `step` holds the coefficients' arrays and what they mean; this adds the tensors and launches.
Returned run(const char* op, Step step, Argument& sample, Argument& velocity, MaybeArgument& uncond,
             MaybeArgument& noise) {
  sample.pack(), velocity.pack(), uncond.pack(), noise.pack();
  OwnedHandle out = packed_like(sample);
  const int64_t total = sample.numel();
  if (total == 0) return {out.release()};
  step.sample = array_of(sample), step.velocity = array_of(velocity), step.uncond = array_of(uncond),
  step.noise = array_of(noise), step.out = {data_of(out), step.sample.dtype};
  const bool one_row = step.first.shared && step.second.shared && step.third.shared;
  step.rows = one_row ? 1 : sample.size(0);
  step.d = total / step.rows;
  bool aligned = true, one_dtype = true;
  for (const Array& a : {step.sample, step.velocity, step.uncond, step.noise, step.out}) {
    aligned = aligned && is_aligned(a.data);
    one_dtype = one_dtype && (!a.data || a.dtype == step.sample.dtype);
  }
  const int device = sample.device_index();
  const cudaStream_t stream = current_stream(device);
  for (; step.first_row < step.rows; step.first_row += MAX_GRID_Y) {
    const int64_t rows = std::min(MAX_GRID_Y, step.rows - step.first_row);
    launch(op, step, aligned, one_dtype, static_cast<unsigned>(rows), device, stream);
  }
  return {out.release()};
}

}  // namespace

Returned affine_step(Argument& sample, Argument& velocity, Argument& a, Argument& b, MaybeArgument& c,
                     MaybeArgument& velocity_uncond, MaybeArgument& noise, double guidance_scale) {
  check_affine_step(sample, velocity, a, b, c, velocity_uncond, noise);
  const auto guard = on_device_of("affine_step", sample);
  a.pack(), b.pack(), c.pack();
  Step step{};
  step.first = scalars_of(a), step.second = scalars_of(b), step.third = c ? scalars_of(c) : NO_SCALARS;
  step.coefficients = Coefficients::given;
  step.guidance = guidance_scale;
  return run("affine_step", step, sample, velocity, velocity_uncond, noise);
}

Returned stablevs_step(Argument& sample, Argument& velocity, Argument& t, Argument& tau,
                       MaybeArgument& velocity_uncond, MaybeArgument& noise, double guidance_scale,
                       double noise_factor, const std::string& path) {
  check_stablevs_step(sample, velocity, t, tau, velocity_uncond, noise, noise_factor, path);
  if (noise_factor == 0.0) noise = MaybeArgument();
  const auto guard = on_device_of("stablevs_step", sample);
  t.pack(), tau.pack();
  Step step{};
  step.first = scalars_of(t), step.second = scalars_of(tau), step.third = NO_SCALARS;
  step.coefficients = path_of(path) == Path::cosine ? Coefficients::cosine : Coefficients::linear;
  step.split = split_noise(noise_factor);
  step.guidance = guidance_scale;
  return run("stablevs_step", step, sample, velocity, velocity_uncond, noise);
}

}  // namespace svel::cuda
