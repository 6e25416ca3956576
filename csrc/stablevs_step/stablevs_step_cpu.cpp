// svel::affine_step and svel::stablevs_step on the CPU: coefficients per row in double, then one elementwise
// pass.
#include <vector>

#include "common/allocate.h"
#include "common/host_tensor.h"
#include "common/ops.h"
#include "common/parallel.h"
#include "common/path.h"
#include "stablevs_step/step_checks.h"
#include "stablevs_step/step_rows.h"

namespace svel::cpu {
namespace {

// coef: (rows, 3) with rows = N, or 1 for all rows alike.
Returned run(Argument& sample, Argument& velocity, MaybeArgument& uncond, MaybeArgument& noise,
             const std::vector<double>& coef, double guidance_scale) {
  sample.pack(), velocity.pack(), uncond.pack(), noise.pack();
  OwnedHandle out = packed_like(sample);
  const int64_t total = sample.numel(), rows = static_cast<int64_t>(coef.size()) / 3;
  if (total > 0) {
    const StepProblem problem{values_of(sample), values_of(velocity), values_of(uncond), values_of(noise),
                              data_of(out),      coef.data(),         total / rows,      guidance_scale};
    const auto kernel = pick_step_elements();
    parallel_for(total, 1, [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
  }
  return {out.release()};
}

}  // namespace

Returned affine_step(Argument& sample, Argument& velocity, Argument& a, Argument& b, MaybeArgument& c,
                     MaybeArgument& velocity_uncond, MaybeArgument& noise, double guidance_scale) {
  check_affine_step(sample, velocity, a, b, c, velocity_uncond, noise);
  const bool shared = a.dim() == 0 && b.dim() == 0 && (!c || c.dim() == 0);
  const int64_t rows = shared ? 1 : sample.size(0);
  const std::vector<double> as = scalars(a, rows), bs = scalars(b, rows);
  const std::vector<double> cs = c ? scalars(c, rows) : std::vector<double>(rows, 0.0);
  std::vector<double> coef;
  coef.reserve(3 * rows);
  for (int64_t i = 0; i < rows; ++i) coef.insert(coef.end(), {as[i], bs[i], cs[i]});
  return run(sample, velocity, velocity_uncond, noise, coef, guidance_scale);
}

Returned stablevs_step(Argument& sample, Argument& velocity, Argument& t, Argument& tau,
                       MaybeArgument& velocity_uncond, MaybeArgument& noise, double guidance_scale,
                       double noise_factor, const std::string& path) {
  check_stablevs_step(sample, velocity, t, tau, velocity_uncond, noise, noise_factor, path);
  if (noise_factor == 0.0) noise = MaybeArgument();
  const int64_t rows = t.dim() == 0 && tau.dim() == 0 ? 1 : sample.size(0);
  const std::vector<double> now = scalars(t, rows), next = scalars(tau, rows);
  const NoiseSplit split = split_noise(noise_factor);
  std::vector<double> coef;
  coef.reserve(3 * rows);
  for (int64_t i = 0; i < rows; ++i) {
    const StepCoefficients step = stablevs_coefficients(path_of(path), now[i], next[i], split);
    coef.insert(coef.end(), {step.a, step.b, step.c});
  }
  return run(sample, velocity, velocity_uncond, noise, coef, guidance_scale);
}

}  // namespace svel::cpu
