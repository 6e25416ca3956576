#include <algorithm>

#include "common/convert.h"
#include "stablevs_step/step_rows.h"

namespace svel::SVEL_ISA {
namespace {

// Values converted at a time: of 128 to 2048 the quickest for samples beyond the last-level cache.
constexpr int64_t BLOCK = 256;

bool stored_as(Storage storage, const Values& values) {
  return !values.data || values.storage == storage;
}

template <bool UNCOND, bool NOISE, typename Work>
void row_part(const Work* x, const Work* v, const Work* u, const Work* noise, Work* out, int64_t n, Work a,
              Work b, Work c, Work g) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Work velocity = UNCOND ? u[i] + g * (v[i] - u[i]) : v[i];
    const Work value = a * x[i] + b * velocity;
    out[i] = NOISE ? value + c * noise[i] : value;
  }
}

template <bool UNCOND, bool NOISE, typename Work>
void step(const StepProblem& p, int64_t begin, int64_t end) {
  const Storage native = sizeof(Work) == 8 ? Storage::f64 : Storage::f32;
  alignas(64) Work x_buffer[BLOCK], v_buffer[BLOCK], u_buffer[BLOCK], noise_buffer[BLOCK], out_buffer[BLOCK];
  const Work g = static_cast<Work>(p.guidance);
  const bool convert = !(stored_as(native, p.sample) && stored_as(native, p.velocity) &&
                         stored_as(native, p.uncond) && stored_as(native, p.noise));
  const int64_t block = convert ? BLOCK : end - begin;
  for (int64_t first = begin; first < end; first += block) {
    const int64_t n = std::min(block, end - first);
    const Work* x = load(p.sample.storage, p.sample.data, first, x_buffer, n);
    const Work* v = load(p.velocity.storage, p.velocity.data, first, v_buffer, n);
    const Work* u = UNCOND ? load(p.uncond.storage, p.uncond.data, first, u_buffer, n) : nullptr;
    const Work* noise = NOISE ? load(p.noise.storage, p.noise.data, first, noise_buffer, n) : nullptr;
    const bool direct = p.sample.storage == native;
    Work* out = direct ? static_cast<Work*>(p.out) + first : out_buffer;
    for (int64_t i = 0; i < n;) {  // the rows, or parts of rows, inside this block
      const int64_t row = (first + i) / p.row_size;
      const int64_t stop = std::min(n, (row + 1) * p.row_size - first);
      const double* coef = p.coef + 3 * row;
      row_part<UNCOND, NOISE>(x + i, v + i, UNCOND ? u + i : nullptr, NOISE ? noise + i : nullptr, out + i,
                              stop - i, static_cast<Work>(coef[0]), static_cast<Work>(coef[1]),
                              static_cast<Work>(coef[2]), g);
      i = stop;
    }
    if (!direct) store(p.sample.storage, out, p.out, first, n);
  }
}

template <typename Work>
void step(const StepProblem& p, int64_t begin, int64_t end) {
  const bool uncond = p.uncond.data, noise = p.noise.data;
  auto* run = uncond ? (noise ? step<true, true, Work> : step<true, false, Work>)
                     : (noise ? step<false, true, Work> : step<false, false, Work>);
  run(p, begin, end);
}

}  // namespace

void step_elements(const StepProblem& problem, int64_t begin, int64_t end) {
  if (problem.sample.storage == Storage::f64) {
    step<double>(problem, begin, end);
  } else {
    step<float>(problem, begin, end);
  }
}

}  // namespace svel::SVEL_ISA
