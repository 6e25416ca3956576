#include <algorithm>
#include <cmath>

#include "common/convert.h"
#include "va_repa/cosine_rows.h"

namespace svel::SVEL_ISA {
namespace {

constexpr int64_t BLOCK = 512;  // values converted at a time

struct Sums {
  double pp = 0.0, zz = 0.0, pz = 0.0;
};

// In double: the pass waits for memory anyway, and a cosine near zero is a sum that cancels.
template <typename Work>
void add_products(const Work* p, const Work* z, int64_t n, Sums& sums) {
  double pp = 0.0, zz = 0.0, pz = 0.0;
#pragma omp simd reduction(+ : pp, zz, pz)
  for (int64_t i = 0; i < n; ++i) {
    const double a = p[i], b = z[i];
    pp += a * a;
    zz += b * b;
    pz += a * b;
  }
  sums.pp += pp;
  sums.zz += zz;
  sums.pz += pz;
}

int64_t start_of(const Rows& rows, int64_t row, int64_t t) {
  return row / t * rows.stride_b + row % t * rows.stride_t;
}

template <typename Work>
Sums sums_of_row(const CosineProblem& problem, int64_t p_start, int64_t z_start) {
  alignas(64) Work p_buffer[BLOCK], z_buffer[BLOCK];
  Sums sums;
  for (int64_t first = 0; first < problem.c; first += BLOCK) {
    const int64_t n = std::min(BLOCK, problem.c - first);
    const Values &p = problem.projected.values, &z = problem.teacher.values;
    add_products(load(p.storage, p.data, p_start + first, p_buffer, n),
                 load(z.storage, z.data, z_start + first, z_buffer, n), n, sums);
  }
  return sums;
}

struct Norms {
  double p, z;  // clamped from below
  explicit Norms(const Sums& s) : p(clamp(std::sqrt(s.pp))), z(clamp(std::sqrt(s.zz))) {}
  static double clamp(double norm) { return norm < MIN_NORM ? MIN_NORM : norm; }  // NaN stays
};

template <typename Work>
void cosines(const CosineProblem& problem, double* cosine, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const Sums sums = sums_of_row<Work>(problem, start_of(problem.projected, row, problem.t),
                                        start_of(problem.teacher, row, problem.t));
    const Norms norms(sums);
    cosine[row] = sums.pz / (norms.p * norms.z);
  }
}

template <typename Work>
void combine(const Work* p, const Work* z, Work* out, int64_t n, Work on_p, Work on_z) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = on_z * z[i] + on_p * p[i];
}

template <typename Work>
void gradients(const CosineProblem& problem, const double* scale, void* out, int64_t begin, int64_t end) {
  const Storage native = sizeof(Work) == 8 ? Storage::f64 : Storage::f32;
  const Values &p = problem.projected.values, &z = problem.teacher.values;
  alignas(64) Work p_buffer[BLOCK], z_buffer[BLOCK], out_buffer[BLOCK];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t p_start = start_of(problem.projected, row, problem.t);
    const int64_t z_start = start_of(problem.teacher, row, problem.t);
    const Sums sums = sums_of_row<Work>(problem, p_start, z_start);
    const Norms norms(sums);
    // d cosine / d p = z / (|z| |p|) - cosine p / |p|^2; the second term is zero where |p| is clamped
    const double on_z = scale[row / problem.t] / (norms.p * norms.z);
    const double on_p = norms.p > MIN_NORM ? -on_z * sums.pz / (norms.p * norms.p) : 0.0 * norms.p;
    for (int64_t first = 0; first < problem.c; first += BLOCK) {  // the row is in the cache by now
      const int64_t n = std::min(BLOCK, problem.c - first), at = row * problem.c + first;
      const bool direct = p.storage == native;
      Work* to = direct ? static_cast<Work*>(out) + at : out_buffer;
      combine(load(p.storage, p.data, p_start + first, p_buffer, n),
              load(z.storage, z.data, z_start + first, z_buffer, n), to, n, static_cast<Work>(on_p),
              static_cast<Work>(on_z));
      if (!direct) store(p.storage, to, out, at, n);
    }
  }
}

}  // namespace

void cosine_rows(const CosineProblem& problem, double* cosine, int64_t begin, int64_t end) {
  (problem.wide ? cosines<double> : cosines<float>)(problem, cosine, begin, end);
}

void cosine_gradient_rows(const CosineProblem& problem, const double* scale, void* out, int64_t begin,
                          int64_t end) {
  (problem.wide ? gradients<double> : gradients<float>)(problem, scale, out, begin, end);
}

}  // namespace svel::SVEL_ISA
