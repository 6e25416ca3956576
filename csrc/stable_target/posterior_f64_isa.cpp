// The posterior mean of float64 rows, all in float64: distances directly, then the weighted sum. See
// posterior.h.
#include <cmath>
#include <limits>
#include <type_traits>

#include "common/convert.h"
#include "stable_target/posterior.h"

namespace svel::SVEL_ISA {
namespace {

constexpr int64_t CHUNK = 256;

// |x - alpha r|^2, in eight partial sums.
double squared_distance(const double* x, double alpha, Values r, int64_t first, int64_t d) {
  double sums[8] = {}, buffer[CHUNK];
  for (int64_t k0 = 0; k0 < d; k0 += CHUNK) {
    const int64_t n = d - k0 < CHUNK ? d - k0 : CHUNK;
    const double* ref = load(r.storage, r.data, first + k0, buffer, n);
    int64_t k = 0;
    for (; k + 8 <= n; k += 8) {
      for (int l = 0; l < 8; ++l) {
        const double gap = x[k0 + k + l] - alpha * ref[k + l];
        sums[l] += gap * gap;
      }
    }
    for (; k < n; ++k) sums[0] += (x[k0 + k] - alpha * ref[k]) * (x[k0 + k] - alpha * ref[k]);
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

}  // namespace

void f64_block(const RowTile& rows, const Values& refs, int64_t count, double* logits,
               const Running& running) {
  const int64_t d = rows.d;
  double buffer[CHUNK];
  for (int64_t i = 0; i < rows.n; ++i) {
    const double* x = static_cast<const double*>(rows.x.data) + rows.row[i] * d;
    double* total = running.total + i * d;
    const double scale = 0.5 / (rows.sigma[i] * rows.sigma[i]);
    double top = running.top[i];
    for (int64_t j = 0; j < count; ++j) {
      logits[j] = 0.5 * static_cast<double>(d) - squared_distance(x, rows.alpha[i], refs, j * d, d) * scale;
      top = logits[j] > top ? logits[j] : top;
    }
    const double keep = running.top[i] == top ? 1.0 : std::exp(running.top[i] - top);
    const bool first = running.sum[i] == 0.0;
    for (int64_t k = 0; k < d; ++k) total[k] = first ? 0.0 : keep * total[k];
    running.sum[i] *= keep;
    running.top[i] = top;
    for (int64_t j = 0; j < count; ++j) {
      const double weight = std::exp(logits[j] - top);
      if (weight == 0.0) continue;
      running.sum[i] += weight;
      for (int64_t k0 = 0; k0 < d; k0 += CHUNK) {
        const int64_t n = d - k0 < CHUNK ? d - k0 : CHUNK;
        const double* ref = load(refs.storage, refs.data, j * d + k0, buffer, n);
        for (int64_t k = 0; k < n; ++k) total[k0 + k] += weight * ref[k];
      }
    }
  }
}

}  // namespace svel::SVEL_ISA
