// The posterior mean for D <= SMALL_D: lanes are references. A block of references is centred and transposed
// once for all rows of a tile; scores, exponentials and weighted sums of a few rows then stay in the caches.
// See posterior.h.
#include <cmath>
#include <limits>
#include <type_traits>

#include "stable_target/posterior.h"
#include "stable_target/simd.h"

namespace svel::SVEL_ISA {
namespace {

constexpr int VECS = 4;                    // vectors of references at a time
constexpr int ROWS = LANES == 16 ? 6 : 3;  // rows at a time: ROWS x VECS accumulators fit the registers
constexpr int CHUNK = VECS * LANES;        // references at a time
static_assert(ROWS <= SMALL_ROWS && CHUNK <= SMALL_CHUNK);

inline int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// panel (vectors of references, D, LANES) = d = r - c, zeros beyond count; norms = |d|^2 / 2.
template <typename T>
void transpose(const T* refs, int64_t count, int64_t d, const float* centre, float* panel, float* norms) {
  float row[padded(SMALL_D)];
  const int64_t full = (count + CHUNK - 1) / CHUNK * CHUNK;
  for (int64_t j = 0; j < full; ++j) {
    float* column = panel + j / LANES * d * LANES + j % LANES;
    Vec norm = {};
    for (int64_t k = 0; k < d; k += LANES) {
      const int64_t n = smaller(LANES, d - k);
      const T* ref = refs + j * d + k;
      const Vec r =
          j >= count ? Vec{} : (n == LANES ? load_vec(ref) : load_part(ref, n)) - load_vec(centre + k);
      store_vec(row + k, r);
      norm += r * r;
    }
    for (int64_t k = 0; k < d; ++k) column[k * LANES] = row[k];
    norms[j] = 0.5f * sum_lanes(norm);
  }
}

// u (R, stride) = alpha y.d - alpha^2 |d|^2 / 2, or, where `direct`, -|y - alpha d|^2 / 2, and the largest u
// of each chunk, lane by lane, in tops (R, stride / VECS). y (R, D) holds alpha y or, where direct, y.
template <int R, bool direct>
void scores(const float* y, const float* alpha, const float* panel, const float* norms, int64_t d,
            int64_t count, int64_t stride, float* u, float* tops) {
  for (int64_t j = 0; j < count; j += CHUNK) {
    Vec acc[R][VECS];
    for (int i = 0; i < R; ++i) {
      for (int v = 0; v < VECS; ++v) {
        acc[i][v] = direct ? Vec{} : load_vec(norms + j + v * LANES) * (-alpha[i] * alpha[i]);
      }
    }
    const float* p = panel + j * d;
    for (int64_t k = 0; k < d; ++k) {
      Vec r[VECS];
      for (int v = 0; v < VECS; ++v) r[v] = load_vec(p + (v * d + k) * LANES);
      for (int i = 0; i < R; ++i) {
        const float value = y[i * d + k];
        for (int v = 0; v < VECS; ++v) {
          if constexpr (direct) {
            const Vec gap = value - alpha[i] * r[v];
            acc[i][v] += gap * gap;
          } else {
            acc[i][v] += value * r[v];
          }
        }
      }
    }
    for (int i = 0; i < R; ++i) {
      float* out = u + i * stride + j;
      for (int v = 0; v < VECS; ++v) {
        if constexpr (direct) acc[i][v] *= -0.5f;
        store_vec(out + v * LANES, acc[i][v]);
      }
      if (j + CHUNK > count) {
        for (int64_t l = count - j; l < CHUNK; ++l) out[l] = -std::numeric_limits<float>::infinity();
        for (int v = 0; v < VECS; ++v) acc[i][v] = load_vec(out + v * LANES);
      }
      store_vec(tops + (i * stride + j) / VECS, max(max(acc[i][0], acc[i][1]), max(acc[i][2], acc[i][3])));
    }
  }
}

// u becomes w = exp((u - top) scale), 0 below `cut`; returns their sum. alive[c]: chunk c holds a weight.
double exponentials(float* u, const float* tops, int64_t chunks, float top, float scale, float cut,
                    bool* alive) {
  Vec sum = {};
  for (int64_t c = 0; c < chunks; ++c) {
    float* w = u + c * CHUNK;
    const bool dead = (max_lane(load_vec(tops + c * LANES)) - top) * scale < cut;
    alive[c] |= !dead;
    for (int v = 0; v < VECS; ++v) {
      const Vec e = dead ? Vec{} : exp((load_vec(w + v * LANES) - top) * scale);
      store_vec(w + v * LANES, e);
      sum += e;
    }
  }
  return sum_lanes(sum);
}

// sums (R, D) = w (R, stride) . d over the chunks that are alive, K coordinates from k on.
template <int R, int K>
void weighted_sums(const float* w, int64_t stride, const float* panel, int64_t d, int64_t k, int64_t chunks,
                   const bool* alive, float* sums) {
  Vec acc[R][K] = {};
  for (int64_t c = 0; c < chunks; ++c) {
    if (!alive[c]) continue;
    for (int64_t v = c * VECS; v < (c + 1) * VECS; ++v) {
      Vec p[K];
      for (int s = 0; s < K; ++s) p[s] = load_vec(panel + (v * d + k + s) * LANES);
      for (int i = 0; i < R; ++i) {
        const Vec weight = load_vec(w + i * stride + v * LANES);
        for (int s = 0; s < K; ++s) acc[i][s] += weight * p[s];
      }
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int s = 0; s < K; ++s) sums[i * d + k + s] = sum_lanes(acc[i][s]);
  }
}

// R rows of the tile from `first` on.
template <int R>
void few_rows(const RowTile& rows, const RefBlock& block, int64_t first, const float* y, const double* y_norm,
              double cut, const SmallScratch& scratch, const Running& running, double spread) {
  const int64_t d = rows.d, chunks = (block.count + CHUNK - 1) / CHUNK, stride = chunks * CHUNK;
  float alpha[R], scaled[R * SMALL_D], sums[R * SMALL_D];
  bool direct =
      false;  // whichever loses less: products of the size |y| |d|, or differences of the size sigma sqrt(D)
  for (int i = 0; i < R; ++i) {
    const double a = rows.alpha[first + i], s = rows.sigma[first + i], size = std::sqrt(y_norm[first + i]);
    alpha[i] = static_cast<float>(a);
    direct |= std::fabs(a) * size * spread / (s * s) > 0.5 * static_cast<double>(d) + size / std::fabs(s);
  }
  for (int i = 0; i < R; ++i) {
    const float factor = direct ? 1.0f : alpha[i];
    for (int64_t k = 0; k < d; ++k) scaled[i * d + k] = factor * y[(first + i) * d + k];
  }
  const auto kernel = direct ? scores<R, true> : scores<R, false>;
  kernel(scaled, alpha, scratch.panel, scratch.norms, d, block.count, stride, scratch.scores, scratch.tops);

  bool alive[SMALL_BLOCK / CHUNK] = {};
  double share[R], keep[R], added[R];
  for (int i = 0; i < R; ++i) {
    const int64_t row = first + i;
    const double scale = 1.0 / (rows.sigma[row] * rows.sigma[row]);
    const double offset = 0.5 * static_cast<double>(d) - (direct ? 0.0 : 0.5 * y_norm[row] * scale);
    const float* tops = scratch.tops + i * stride / VECS;
    Vec best = load_vec(tops);
    for (int64_t c = 1; c < chunks; ++c) best = max(best, load_vec(tops + c * LANES));
    const float block_top = max_lane(best);
    const double logit = block_top * scale + offset;
    const double top = logit > running.top[row] ? logit : running.top[row];
    const bool broken = !std::isfinite(logit) || !std::isfinite(y_norm[row]) || std::isnan(running.sum[row]);
    share[i] = broken ? std::numeric_limits<double>::quiet_NaN() : std::exp(logit - top);
    keep[i] = std::exp(running.top[row] - top);
    added[i] =
        share[i] * exponentials(scratch.scores + i * stride, tops, chunks, block_top,
                                static_cast<float>(scale), static_cast<float>(cut + top - logit), alive);
    running.sum[row] = running.sum[row] * keep[i] + added[i];
    if (!broken) running.top[row] = top;
  }
  int64_t k = 0;
  for (; k + VECS <= d; k += VECS) {
    weighted_sums<R, VECS>(scratch.scores, stride, scratch.panel, d, k, chunks, alive, sums);
  }
  if (k < d) {
    with_constant<VECS - 1>(d - k, [&](auto rest) {
      weighted_sums<R, rest>(scratch.scores, stride, scratch.panel, d, k, chunks, alive, sums);
    });
  }
  for (int i = 0; i < R; ++i) {
    double* total = running.total + (first + i) * d;
    for (int64_t c = 0; c < d; ++c) {
      const double old = keep[i] == 0.0 ? 0.0 : keep[i] * total[c];
      total[c] = old + (share[i] * sums[i * d + c] + added[i] * block.centre[c]);
    }
  }
}

}  // namespace

void small_block(const RowTile& rows, const RefBlock& block, const double* y_norm, double cut,
                 const SmallScratch& scratch, const Running& running) {
  const int64_t d = rows.d;
  with_storage(block.refs.storage, block.refs.data, [&](const auto* refs) {
    transpose(refs, block.count, d, block.centre, scratch.panel, scratch.norms);
  });
  double spread = 0.0;
  for (int64_t j = 0; j < block.count; ++j) spread += scratch.norms[j];
  spread = std::sqrt(2.0 * spread / static_cast<double>(block.count));

  float y[SMALL_ROWS * SMALL_D];
  double x_buffer[SMALL_D];
  for (int64_t first = 0; first < rows.n; first += ROWS) {
    for (int64_t i = first; i < smaller(first + ROWS, rows.n); ++i) {
      const double* x = load(rows.x.storage, rows.x.data, rows.row[i] * d, x_buffer, d);
      for (int64_t k = 0; k < d; ++k) {
        y[(i - first) * d + k] =
            static_cast<float>(x[k] - rows.alpha[i] * static_cast<double>(block.centre[k]));
      }
    }
    with_constant<ROWS>(rows.n - first, [&](auto r) {
      few_rows<r>(rows, block, first, y - first * d, y_norm, cut, scratch, running, spread);
    });
  }
}

}  // namespace svel::SVEL_ISA
