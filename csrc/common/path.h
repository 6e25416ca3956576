// Interpolant paths x_t = alpha(t) x_0 + sigma(t) eps and what follows from them, in double, for host and
// device; the formulas of stablevelocity_kernels/paths.py. t = 0 is data, t = 1 is noise. No torch headers.
#pragma once

#include <cmath>
#include <string>

#if defined(__CUDACC__)
#define SVEL_HOST_DEVICE __host__ __device__
#else
#define SVEL_HOST_DEVICE
#endif

namespace svel {

enum class Path : int { linear, cosine };
enum class Prediction : int { velocity, x0, noise, score };

// For names that check_choice has accepted.
inline Path path_of(const std::string& name) {
  return name == "cosine" ? Path::cosine : Path::linear;
}

inline Prediction prediction_of(const std::string& name) {
  if (name == "x0") return Prediction::x0;
  if (name == "noise") return Prediction::noise;
  return name == "score" ? Prediction::score : Prediction::velocity;
}

constexpr double T_EPS = 1e-5;  // t is clamped to [T_EPS, 1 - T_EPS]

SVEL_HOST_DEVICE inline double clamp_to(double t, double low, double high) {
  return t < low ? low : (t > high ? high : t);  // NaN fails both comparisons and stays NaN
}

SVEL_HOST_DEVICE inline double clamp_time(double t) {
  return clamp_to(t, T_EPS, 1.0 - T_EPS);
}

struct PathCoefficients {
  double alpha, sigma, d_alpha, d_sigma;  // d_: derivatives with respect to t

  // v(x_t | x_0) = x_factor x_t + x0_factor x_0
  SVEL_HOST_DEVICE double x_factor() const { return d_sigma / sigma; }
  SVEL_HOST_DEVICE double x0_factor() const { return d_alpha - d_sigma * alpha / sigma; }
};

SVEL_HOST_DEVICE inline PathCoefficients path_coefficients(Path path, double t) {
  if (path == Path::linear) return {1.0 - t, t, -1.0, 1.0};
  const double half_pi = 1.5707963267948966;
  const double c = cos(half_pi * t), s = sin(half_pi * t);
  return {c, s, -half_pi * s, half_pi * c};
}

// prediction = a x + b m, m the posterior mean of x_0; or a x_0 + b noise
struct PredictionCoefficients {
  double a, b;
};

SVEL_HOST_DEVICE inline PredictionCoefficients prediction_coefficients(Prediction prediction,
                                                                       const PathCoefficients& c) {
  switch (prediction) {
    case Prediction::velocity:
      return {c.x_factor(), c.x0_factor()};
    case Prediction::noise:
      return {1.0 / c.sigma, -c.alpha / c.sigma};
    case Prediction::score:
      return {-1.0 / (c.sigma * c.sigma), c.alpha / (c.sigma * c.sigma)};
    default:
      return {0.0, 1.0};
  }
}

// prediction = a x_0 + b noise for the x_0 and noise that x_t was made of
SVEL_HOST_DEVICE inline PredictionCoefficients conditional_coefficients(Prediction prediction,
                                                                        const PathCoefficients& c) {
  switch (prediction) {
    case Prediction::velocity:
      return {c.d_alpha, c.d_sigma};
    case Prediction::noise:
      return {0.0, 1.0};
    case Prediction::score:
      return {0.0, -1.0 / c.sigma};
    default:
      return {1.0, 0.0};
  }
}

// a x + b v + c noise: the closed-form StableVS step from t (where `now` holds) to tau < t
struct StepCoefficients {
  double a, b, c;
};

SVEL_HOST_DEVICE inline StepCoefficients stablevs_coefficients(const PathCoefficients& now,
                                                               const PathCoefficients& next,
                                                               double noise_factor) {
  const double beta = noise_factor * next.sigma;
  const double s = next.sigma * sqrt(1.0 - noise_factor * noise_factor) / now.sigma;
  const double b = (next.alpha - s * now.alpha) / now.x0_factor();
  return {s - b * now.x_factor(), b, beta};
}

// The step of svel::stablevs_step: t clamped to [T_EPS, 1 - T_EPS], tau to [0, 1].
SVEL_HOST_DEVICE inline StepCoefficients stablevs_coefficients(Path path, double t, double tau,
                                                               double noise_factor) {
  return stablevs_coefficients(path_coefficients(path, clamp_time(t)),
                               path_coefficients(path, clamp_to(tau, 0.0, 1.0)), noise_factor);
}

}  // namespace svel
