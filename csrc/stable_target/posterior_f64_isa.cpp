// The posterior mean in float64, for float64 rows and for tiny samples, whose targets can be so close to 0
// that float32 weights would show: distances directly, then the weighted sum. See posterior.h.
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/convert.h"
#include "stable_target/posterior.h"

namespace svel::SVEL_ISA {
namespace {

constexpr int WIDTH = 8;        // independent partial sums, which also fill the vectors
constexpr int64_t TINY_D = 8;   // up to here lanes are references
constexpr int64_t CHUNK = 256;  // coordinates converted at once

inline double total_of(const double* sums) {
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// e^x for x <= 0 to about one unit in the last place; 0 below -708. Branch-free, so that loops over it
// vectorise.
inline double exp_of(double x) {
  const double shifted =
      x * 1.4426950408889634 + 0x1.8p52;  // rounds to an integer, which sits in the lowest bits
  const double n = shifted - 0x1.8p52;
  const double r = (x - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
  constexpr double terms[] = {
      1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
      1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
  double p = 1.0 / 6227020800.0;
  for (const double term : terms) p = p * r + term;
  uint64_t bits, power;
  std::memcpy(&bits, &p, sizeof bits);
  std::memcpy(&power, &shifted, sizeof power);
  bits += power << 52;
  std::memcpy(&p, &bits, sizeof p);
  return x < -708.0 ? 0.0 : p;
}

// |x - alpha r|^2 for any storage of r.
double squared_distance(const double* x, double alpha, const Values& refs, int64_t first, int64_t d) {
  double sums[WIDTH] = {}, buffer[CHUNK];
  for (int64_t k0 = 0; k0 < d; k0 += CHUNK) {
    const int64_t n = d - k0 < CHUNK ? d - k0 : CHUNK;
    const double* r = load(refs.storage, refs.data, first + k0, buffer, n);
    int64_t k = 0;
    for (; k + WIDTH <= n; k += WIDTH) {
      for (int l = 0; l < WIDTH; ++l) {
        const double gap = x[k0 + k + l] - alpha * r[k + l];
        sums[l] += gap * gap;
      }
    }
    for (; k < n; ++k) sums[0] += (x[k0 + k] - alpha * r[k]) * (x[k0 + k] - alpha * r[k]);
  }
  return total_of(sums);
}

// total (D,) += sum of w_j r_j.
void add_weighted(const Values& refs, int64_t count, int64_t d, const double* w, double* total) {
  double buffer[CHUNK];
  for (int64_t j = 0; j < count; ++j) {
    if (w[j] == 0.0) continue;
    for (int64_t k0 = 0; k0 < d; k0 += CHUNK) {
      const int64_t n = d - k0 < CHUNK ? d - k0 : CHUNK;
      const double* r = load(refs.storage, refs.data, j * d + k0, buffer, n);
      for (int64_t k = 0; k < n; ++k) total[k0 + k] += w[j] * r[k];
    }
  }
}

// Sums of the n values w_j, or w_j v_j; n a multiple of WIDTH.
double sum_of(const double* w, const double* v, int64_t n) {
  double sums[WIDTH] = {};
  for (int64_t j = 0; j < n; j += WIDTH) {
    for (int l = 0; l < WIDTH; ++l) sums[l] += v ? w[j + l] * v[j + l] : w[j + l];
  }
  return total_of(sums);
}

}  // namespace

void f64_block(const RowTile& rows, const Values& refs, int64_t count, double* scratch,
               const Running& running) {
  constexpr double nothing = -std::numeric_limits<double>::infinity();
  const int64_t d = rows.d, full = (count + WIDTH - 1) / WIDTH * WIDTH;
  const bool tiny = d <= TINY_D;
  double* logits = scratch;
  double* columns = scratch + F64_BLOCK;  // (D, F64_BLOCK) for tiny samples: references, transposed
  for (int64_t j = 0; tiny && j < full; ++j) {
    double buffer[TINY_D] = {};
    const double* r = j < count ? load(refs.storage, refs.data, j * d, buffer, d) : buffer;
    for (int64_t k = 0; k < d; ++k) columns[k * F64_BLOCK + j] = r[k];
  }
  for (int64_t i = 0; i < rows.n; ++i) {
    double x_buffer[TINY_D];  // other rows are float64 already
    const double* x = load(rows.x.storage, rows.x.data, rows.row[i] * d, x_buffer, d);
    double* total = running.total + i * d;
    const double a = rows.alpha[i], scale = 0.5 / (rows.sigma[i] * rows.sigma[i]);
    for (int64_t j = 0; j < full; ++j) logits[j] = 0.0;
    for (int64_t k = 0; tiny && k < d; ++k) {
      const double* r = columns + k * F64_BLOCK;
      for (int64_t j = 0; j < full; ++j) logits[j] += (x[k] - a * r[j]) * (x[k] - a * r[j]);
    }
    for (int64_t j = 0; !tiny && j < count; ++j) logits[j] = squared_distance(x, a, refs, j * d, d);
    for (int64_t j = 0; j < full; ++j) logits[j] = 0.5 * static_cast<double>(d) - logits[j] * scale;
    for (int64_t j = count; j < full; ++j) logits[j] = nothing;

    double tops[WIDTH];
    for (double& top : tops) top = running.top[i];
    for (int64_t j = 0; j < full; j += WIDTH) {
      for (int l = 0; l < WIDTH; ++l) tops[l] = logits[j + l] > tops[l] ? logits[j + l] : tops[l];
    }
    double top = tops[0];
    for (double other : tops) top = other > top ? other : top;
    const double keep = running.sum[i] == 0.0 ? 0.0 : std::exp(running.top[i] - top);
    for (int64_t j = 0; j < full; ++j) logits[j] = exp_of(logits[j] - top);
    running.sum[i] = running.sum[i] * keep + sum_of(logits, nullptr, full);
    running.top[i] = top;
    for (int64_t k = 0; k < d; ++k) {
      total[k] = (keep == 0.0 ? 0.0 : keep * total[k]) +
                 (tiny ? sum_of(logits, columns + k * F64_BLOCK, full) : 0.0);
    }
    if (!tiny) add_weighted(refs, count, d, logits, total);
  }
}

}  // namespace svel::SVEL_ISA
