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

constexpr double HALF_PI = 1.5707963267948966;
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
#if defined(__CUDA_ARCH__)
  double s, c;
  sincospi(0.5 * t, &s, &c);  // no reduction of large arguments, which takes stack memory
#else
  const double c = std::cos(HALF_PI * t), s = std::sin(HALF_PI * t);
#endif
  return {c, s, -HALF_PI * s, HALF_PI * c};
}

// alpha sigma' - sigma alpha', the same at every t
SVEL_HOST_DEVICE inline double path_determinant(Path path) {
  return path == Path::linear ? 1.0 : HALF_PI;
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

// How a step divides sigma_tau: kept^2 + fresh^2 = 1, fresh the noise factor
struct NoiseSplit {
  double kept, fresh;
};

inline NoiseSplit split_noise(double noise_factor) {
  return {std::sqrt(1.0 - noise_factor * noise_factor), noise_factor};
}

// a x + b v + c noise: the closed-form StableVS step
struct StepCoefficients {
  double a, b, c;
};

// The step of svel::stablevs_step from t, clamped to [T_EPS, 1 - T_EPS], to tau, clamped to [0, 1]. With
// x = alpha x_0 + sigma eps and v = alpha' x_0 + sigma' eps solved for x_0 and eps, it is
// alpha_tau x_0 + kept sigma_tau eps + fresh sigma_tau noise; nothing is divided by sigma.
SVEL_HOST_DEVICE inline StepCoefficients stablevs_coefficients(Path path, double t, double tau,
                                                               NoiseSplit split) {
  const PathCoefficients now = path_coefficients(path, clamp_time(t));
  const PathCoefficients next = path_coefficients(path, clamp_to(tau, 0.0, 1.0));
  const double kept = split.kept * next.sigma, scale = 1.0 / path_determinant(path);
  return {(next.alpha * now.d_sigma - kept * now.d_alpha) * scale,
          (kept * now.alpha - next.alpha * now.sigma) * scale, split.fresh * next.sigma};
}

}  // namespace svel
