// Argument checks of svel::affine_step and svel::stablevs_step, for CPU and CUDA.
#pragma once

#include "common/argument.h"

namespace svel {

// sample (N, *S) floating point; velocity, velocity_uncond, noise alike.
inline void check_step(const char* op, const Argument& sample, const Argument& velocity,
                       const MaybeArgument& velocity_uncond, const MaybeArgument& noise) {
  if (sample.dim() < 1) fail(op, "sample", "shape (N, *S)", to_text(shape_of(sample)));
  check_dtype(op, "sample", sample, FLOATS);
  const auto check = [&](const char* arg, const Argument& value) {
    if (!same_dtype(value, sample)) check_dtype(op, arg, value, FLOATS);
    check_shape_like(op, arg, value, sample, "of sample, (N, *S)");
    check_device(op, arg, value, sample);
  };
  check("velocity", velocity);
  if (velocity_uncond) check("velocity_uncond", velocity_uncond);
  if (noise) check("noise", noise);
}

// A coefficient or time: (N,) or 0-d, float32 or float64.
inline void check_step_scalar(const char* op, const char* arg, const Argument& value,
                              const Argument& sample) {
  check_dtype(op, arg, value, {ScalarType::Float, ScalarType::Double});
  if (value.dim() > 1 || (value.dim() == 1 && value.size(0) != sample.size(0))) {
    fail(op, arg, "shape (N,) = (" + std::to_string(sample.size(0)) + ",) or 0-d", to_text(shape_of(value)));
  }
  check_device(op, arg, value, sample);
}

inline void check_affine_step(const Argument& sample, const Argument& velocity, const Argument& a,
                              const Argument& b, const MaybeArgument& c, const MaybeArgument& velocity_uncond,
                              const MaybeArgument& noise) {
  const char* op = "affine_step";
  check_step(op, sample, velocity, velocity_uncond, noise);
  check_step_scalar(op, "a", a, sample);
  check_step_scalar(op, "b", b, sample);
  if (c) check_step_scalar(op, "c", c, sample);
  if (!c != !noise) {
    const std::string missing = c ? "noise" : "c";
    fail(op, missing, "c and noise to be given together", missing + "=None");
  }
}

inline void check_stablevs_step(const Argument& sample, const Argument& velocity, const Argument& t,
                                const Argument& tau, const MaybeArgument& velocity_uncond,
                                const MaybeArgument& noise, double noise_factor, const std::string& path) {
  const char* op = "stablevs_step";
  check_step(op, sample, velocity, velocity_uncond, noise);
  check_step_scalar(op, "t", t, sample);
  check_step_scalar(op, "tau", tau, sample);
  check_path(op, path);
  if (!(0.0 <= noise_factor && noise_factor <= 1.0))
    fail(op, "noise_factor", "a number in [0, 1]", to_text(noise_factor));
  if (noise_factor > 0.0 && !noise) {
    fail(op, "noise", "a tensor because noise_factor = " + to_text(noise_factor), "None");
  }
}

}  // namespace svel
