// svel::affine_step and svel::stablevs_step on the CPU: coefficients per row in double, then one elementwise
// pass.
#include <vector>

#include "common/allocate.h"
#include "common/host_tensor.h"
#include "common/ops.h"
#include "common/parallel.h"
#include "common/path.h"
#include "stablevs_step/step_rows.h"

namespace svel::cpu {
namespace {

// coef: (rows, 3) with rows = N, or 1 for all rows alike.
Tensor run(const Tensor& sample, const Tensor& velocity, const MaybeTensor& velocity_uncond,
           const MaybeTensor& noise, const std::vector<double>& coef, double guidance_scale) {
  const Tensor x = packed(sample), v = packed(velocity);
  const MaybeTensor u = packed(velocity_uncond), eps = packed(noise);
  const Tensor out = packed_like(x);
  const int64_t total = x.numel(), rows = static_cast<int64_t>(coef.size()) / 3;
  if (total == 0) return out;
  const StepProblem problem{values_of(x),
                            values_of(v),
                            u ? values_of(*u) : Values{},
                            eps ? values_of(*eps) : Values{},
                            out.mutable_data_ptr(),
                            coef.data(),
                            total / rows,
                            guidance_scale};
  const auto kernel = pick_step_elements();
  parallel_for(total, 1, [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
  return out;
}

}  // namespace

Tensor affine_step(const Tensor& sample, const Tensor& velocity, const Tensor& a, const Tensor& b,
                   const MaybeTensor& c, const MaybeTensor& velocity_uncond, const MaybeTensor& noise,
                   double guidance_scale) {
  check_affine_step(sample, velocity, a, b, c, velocity_uncond, noise);
  const bool shared = a.dim() == 0 && b.dim() == 0 && (!c || c->dim() == 0);
  const int64_t rows = shared ? 1 : sample.size(0);
  const std::vector<double> as = scalars(a, rows), bs = scalars(b, rows);
  const std::vector<double> cs = c ? scalars(*c, rows) : std::vector<double>(rows, 0.0);
  std::vector<double> coef;
  coef.reserve(3 * rows);
  for (int64_t i = 0; i < rows; ++i) coef.insert(coef.end(), {as[i], bs[i], cs[i]});
  return run(sample, velocity, velocity_uncond, noise, coef, guidance_scale);
}

Tensor stablevs_step(const Tensor& sample, const Tensor& velocity, const Tensor& t, const Tensor& tau,
                     const MaybeTensor& velocity_uncond, const MaybeTensor& noise, double guidance_scale,
                     double noise_factor, const std::string& path) {
  check_stablevs_step(sample, velocity, t, tau, velocity_uncond, noise, noise_factor, path);
  const int64_t rows = t.dim() == 0 && tau.dim() == 0 ? 1 : sample.size(0);
  const std::vector<double> now = scalars(t, rows), next = scalars(tau, rows);
  const NoiseSplit split = split_noise(noise_factor);
  std::vector<double> coef;
  coef.reserve(3 * rows);
  for (int64_t i = 0; i < rows; ++i) {
    const StepCoefficients step = stablevs_coefficients(path_of(path), now[i], next[i], split);
    coef.insert(coef.end(), {step.a, step.b, step.c});
  }
  return run(sample, velocity, velocity_uncond, noise_factor > 0.0 ? noise : MaybeTensor(), coef,
             guidance_scale);
}

}  // namespace svel::cpu
