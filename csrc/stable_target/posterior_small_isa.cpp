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
constexpr int64_t SLICE = 32;              // coordinates whose products are added up in a row
constexpr double FAR = 1.0;                // best logits below -FAR D - 16: rows far from all references
constexpr double DOUBT = 8.0, DOUBT_OF_PRODUCTS = 40.0;  // logits so large are off by 5e-7
constexpr int64_t MANY = 64;                             // so many weights of a block, all nearly the largest
constexpr int64_t EXACT_D = 8;  // up to here differences cost little, and targets can be nearly 0
constexpr float NOTHING =
    -std::numeric_limits<float>::infinity();  // the score of a place without a reference
static_assert(ROWS <= SMALL_ROWS && CHUNK <= SMALL_CHUNK);

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

// u (R, stride) = z.d - |d|^2 / 2 or, where `direct`, the sum over coordinates of expected - (z - d)^2, for
// the rows z = y / alpha, (R, D), whose low parts are z_low. The logit is u times a factor of the row, plus
// another. Taking off what a squared difference is expected to be keeps the sums small where weights are
// large. The largest u of each chunk, lane by lane, goes to tops (R, stride / VECS).
template <int R, bool direct>
void scores(const float* z, const float* z_low, const float* expected, const float* panel, const float* norms,
            int64_t d, int64_t count, int64_t stride, float* u, float* tops) {
  for (int64_t j = 0; j < count; j += CHUNK) {
    for (int64_t k0 = 0; k0 == 0 || k0 < d; k0 += SLICE) {  // once for D = 0
      const int64_t end = smaller(k0 + SLICE, d);
      Vec acc[R][VECS];
      for (int i = 0; i < R; ++i) {
        for (int v = 0; v < VECS; ++v) {
          if constexpr (direct) acc[i][v] = splat(expected[i] * static_cast<float>(end - k0));
          if constexpr (!direct) acc[i][v] = k0 ? Vec{} : -load_vec(norms + j + v * LANES);
        }
      }
      for (int64_t k = k0; k < end; ++k) {
        Vec r[VECS];
        for (int v = 0; v < VECS; ++v) r[v] = load_vec(panel + j * d + (v * d + k) * LANES);
        for (int i = 0; i < R; ++i) {
          const float high = z[i * d + k], low = z_low[i * d + k];
          for (int v = 0; v < VECS; ++v) {
            const Vec gap = (high - r[v]) + low;
            acc[i][v] = direct ? acc[i][v] - gap * gap : acc[i][v] + high * r[v];
          }
        }
      }
      for (int i = 0; i < R; ++i) {
        float* out = u + i * stride + j;
        for (int v = 0; v < VECS; ++v) {
          if (k0) acc[i][v] += load_vec(out + v * LANES);
          store_vec(out + v * LANES, acc[i][v]);
        }
        if (end < d) continue;
        if (j + CHUNK > count) {
          for (int64_t l = count - j; l < CHUNK; ++l) out[l] = NOTHING;
          for (int v = 0; v < VECS; ++v) acc[i][v] = load_vec(out + v * LANES);
        }
        store_vec(tops + (i * stride + j) / VECS, max(max(acc[i][0], acc[i][1]), max(acc[i][2], acc[i][3])));
      }
    }
  }
}

// u becomes w = exp((u - top) scale), 0 below `cut`; returns their sum. alive[c]: chunk c holds a weight.
double exponentials(float* u, const float* tops, int64_t chunks, float top, double scale, double cut,
                    bool* alive) {
  const float high = static_cast<float>(scale), low = static_cast<float>(scale - high),
              lowest = static_cast<float>(cut);
  Vec sum = {};
  for (int64_t c = 0; c < chunks; ++c) {
    float* w = u + c * CHUNK;
    const bool dead = (max_lane(load_vec(tops + c * LANES)) - top) * high < lowest;
    if (dead) {
      for (int v = 0; v < VECS; ++v) store_vec(w + v * LANES, Vec{});
      continue;
    }
    alive[c] = true;
    for (int v = 0; v < VECS; ++v) {
      const Vec value = load_vec(w + v * LANES), gap = value - top;
      const Vec e = value == NOTHING ? Vec{} : exp(gap * low + gap * high);
      store_vec(w + v * LANES, e);
      sum += e;
    }
  }
  return sum_lanes(sum);
}

// sums (R, D) = w (R, stride) . d or, where `direct`, w . (d - z), which is as small as the answer is close
// to z, over the chunks that are alive, K coordinates from k on.
template <int R, bool direct, int K>
void weighted_sums(const float* w, const float* origin, int64_t stride, const float* panel, int64_t d,
                   int64_t k, int64_t chunks, const bool* alive, float* sums) {
  Vec acc[R][K] = {};
  for (int64_t c = 0; c < chunks; ++c) {
    if (!alive[c]) continue;
    for (int64_t v = c * VECS; v < (c + 1) * VECS; ++v) {
      Vec p[K];
      for (int s = 0; s < K; ++s) p[s] = load_vec(panel + (v * d + k + s) * LANES);
      for (int i = 0; i < R; ++i) {
        const Vec weight = load_vec(w + i * stride + v * LANES);
        for (int s = 0; s < K; ++s) acc[i][s] += weight * (direct ? p[s] - origin[i * d + k + s] : p[s]);
      }
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int s = 0; s < K; ++s) sums[i * d + k + s] = sum_lanes(acc[i][s]);
  }
}

// Whether a row's logits lose less as sums of differences, of which those with weight are about sigma^2 each,
// than as products.
double size_of_products(const RowTile& rows, int64_t i, double y_norm, double spread) {
  return std::fabs(rows.alpha[i]) * std::sqrt(y_norm) * spread / (rows.sigma[i] * rows.sigma[i]);
}
bool prefers_direct(const RowTile& rows, int64_t i, double y_norm, double spread) {
  const double limit = rows.d <= EXACT_D ? 0.0 : static_cast<double>(rows.d);
  return size_of_products(rows, i, y_norm, spread) > limit;
}

// Reference j's logit in float64, of which the squared distance times `scale` is a part.
double exact_logit(const float* z, const float* z_low, const float* panel, int64_t d, int64_t j,
                   double scale) {
  double distance = 0.0;
  for (int64_t k = 0; k < d; ++k) {
    const double gap =
        (static_cast<double>(z[k]) - panel[(j / LANES * d + k) * LANES + j % LANES]) + z_low[k];
    distance += gap * gap;
  }
  return 0.5 * static_cast<double>(d) - distance * scale;
}

// For a row far from all references, whose distances are large and alike: the scores that matter again in
// float64, as u = logit difference from the best / scale, so that the best is 0. Returns the best logit.
double rescore(const float* z, const float* z_low, const float* panel, int64_t d, int64_t chunks, float top,
               double scale, double cut, float* u, float* tops) {
  double logits[SMALL_BLOCK], best = -std::numeric_limits<double>::infinity();
  const float lowest = static_cast<float>(top + (cut - 1.0) / scale - 1e-5 * std::fabs(top));
  for (int64_t j = 0; j < chunks * CHUNK; ++j) {
    if (!(u[j] >= lowest)) continue;
    logits[j] = exact_logit(z, z_low, panel, d, j, scale);
    best = logits[j] > best ? logits[j] : best;
  }
  for (int64_t c = 0; c < chunks; ++c) {
    bool any = false;
    for (int64_t j = c * CHUNK; j < (c + 1) * CHUNK; ++j) {
      const bool matters = u[j] >= lowest;
      any |= matters;
      u[j] = matters ? static_cast<float>((logits[j] - best) / scale) : NOTHING;
    }
    store_vec(tops + c * LANES, splat(any ? 0.0f : NOTHING));
  }
  return best;
}

// For other rows only the scores from `lowest` on, unless there are many of them, whose errors average out.
// The rest move along, so that the best is 0. Whether it was done; `logit`: the best one.
template <bool direct>
bool rescore_near(const float* z, const float* z_low, const float* panel, int64_t d, int64_t chunks,
                  float top, float lowest, double scale, float* u, float* tops, double& logit) {
  int64_t near[MANY], count = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    if (!(max_lane(load_vec(tops + c * LANES)) >= lowest)) continue;
    for (int64_t j = c * CHUNK; j < (c + 1) * CHUNK; ++j) {
      if (!(u[j] >= lowest)) continue;
      if (count == MANY) return false;
      near[count++] = j;
    }
  }
  double logits[MANY], best = -std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < count; ++i) {
    logits[i] = exact_logit(z, z_low, panel, d, near[i], direct ? scale : 0.5 * scale);
    best = logits[i] > best ? logits[i] : best;
  }
  for (int64_t j = 0; j < chunks * CHUNK; j += LANES) store_vec(u + j, load_vec(u + j) - top);
  for (int64_t c = 0; c < chunks; ++c)
    store_vec(tops + c * LANES, -max(splat(top) - load_vec(tops + c * LANES), Vec{}));
  for (int64_t i = 0; i < count; ++i) {
    u[near[i]] = static_cast<float>((logits[i] - best) / scale);
    store_vec(tops + near[i] / CHUNK * LANES, Vec{});
  }
  logit = best;
  return true;
}

// R rows of the tile from `first` on.
template <int R, bool direct>
void few_rows(const RowTile& rows, const RefBlock& block, int64_t first, const double* y_norm, double spread,
              double cut, const SmallScratch& scratch, const Running& running) {
  const int64_t d = rows.d, chunks = (block.count + CHUNK - 1) / CHUNK, stride = chunks * CHUNK;
  float high[R * SMALL_D], low[R * SMALL_D], origin[R * SMALL_D], expected[R], sums[R * SMALL_D];
  double scale[R], offset[R], x_buffer[SMALL_D];
  for (int i = 0; i < R; ++i) {
    const double a = rows.alpha[first + i], s = rows.sigma[first + i], inverse = a == 0.0 ? 0.0 : 1.0 / a;
    const double* x = load(rows.x.storage, rows.x.data, rows.row[first + i] * d, x_buffer, d);
    const double prior = spread * spread * a * a, near = prior / (prior + s * s * static_cast<double>(d));
    for (int64_t k = 0; k < d; ++k) {
      const double z = inverse * (x[k] - a * static_cast<double>(block.centre[k]));
      high[i * d + k] = static_cast<float>(z);
      low[i * d + k] = static_cast<float>(z - static_cast<double>(high[i * d + k]));
      origin[i * d + k] = static_cast<float>(near * z);  // the posterior mean, were the references normal
    }
    expected[i] = static_cast<float>(s * s * inverse * inverse);
    double taken_off = 0.0;
    for (int64_t k = 0; k < d; k += SLICE)
      taken_off += expected[i] * static_cast<float>(smaller(SLICE, d - k));
    scale[i] = (direct ? 0.5 : 1.0) * a * a / (s * s);
    offset[i] =
        0.5 * static_cast<double>(d) - (direct ? taken_off * scale[i] : 0.5 * y_norm[first + i] / (s * s));
  }
  scores<R, direct>(high, low, expected, scratch.panel, scratch.norms, d, block.count, stride, scratch.scores,
                    scratch.tops);

  bool alive[SMALL_BLOCK / CHUNK] = {};
  double share[R], keep[R], added[R];
  for (int i = 0; i < R; ++i) {
    const int64_t row = first + i;
    float* tops = scratch.tops + i * stride / VECS;
    Vec best = load_vec(tops);
    for (int64_t c = 1; c < chunks; ++c) best = max(best, load_vec(tops + c * LANES));
    float block_top = max_lane(best);
    double logit = block_top * scale[i] + offset[i];
    const bool far = logit < -FAR * static_cast<double>(d) - 16.0;
    if (direct && far && std::isfinite(logit) && logit > running.top[row] + cut) {
      logit = rescore(high + i * d, low + i * d, scratch.panel, d, chunks, block_top, scale[i], cut,
                      scratch.scores + i * stride, tops);
      block_top = 0.0f;
    } else {
      const double doubt = direct ? std::fabs(logit) / DOUBT
                                  : size_of_products(rows, row, y_norm[row], spread) / DOUBT_OF_PRODUCTS;
      const double weight = 1.0 / (doubt * doubt);  // errors of smaller ones do not show
      if (doubt > 1.0 && std::isfinite(logit) && logit > running.top[row] + std::log(weight) - 1.0) {
        const float lowest = static_cast<float>(block_top + std::log(weight) / scale[i]);
        if (rescore_near<direct>(high + i * d, low + i * d, scratch.panel, d, chunks, block_top, lowest,
                                 scale[i], scratch.scores + i * stride, tops, logit))
          block_top = 0.0f;
      }
    }
    const double top = logit > running.top[row] ? logit : running.top[row];
    const bool broken = !std::isfinite(logit) || !std::isfinite(y_norm[row]) || std::isnan(running.sum[row]);
    share[i] = broken ? std::numeric_limits<double>::quiet_NaN() : std::exp(logit - top);
    keep[i] = std::exp(running.top[row] - top);
    added[i] = share[i] * exponentials(scratch.scores + i * stride, tops, chunks, block_top, scale[i],
                                       cut + top - logit, alive);
    running.sum[row] = running.sum[row] * keep[i] + added[i];
    if (!broken) running.top[row] = top;
  }
  for (int64_t k = 0; k < d; k += VECS) {
    with_constant<VECS>(d - k, [&](auto some) {
      weighted_sums<R, direct, some>(scratch.scores, origin, stride, scratch.panel, d, k, chunks, alive,
                                     sums);
    });
  }
  for (int i = 0; i < R; ++i) {
    double* total = running.total + (first + i) * d;
    for (int64_t k = 0; k < d; ++k) {
      const double old = keep[i] == 0.0 ? 0.0 : keep[i] * total[k];
      const double at = static_cast<double>(block.centre[k]) + (direct ? origin[i * d + k] : 0.0f);
      total[k] = old + (share[i] * sums[i * d + k] + added[i] * at);
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

  for (int64_t first = 0, last = 0; first < rows.n; first = last) {
    const bool direct = prefers_direct(rows, first, y_norm[first], spread);
    last = first + 1;
    while (last < smaller(first + ROWS, rows.n) && prefers_direct(rows, last, y_norm[last], spread) == direct)
      ++last;
    with_constant<ROWS>(last - first, [&](auto r) {
      const auto kernel = direct ? few_rows<r, true> : few_rows<r, false>;
      kernel(rows, block, first, y_norm, spread, cut, scratch, running);
    });
  }
}

}  // namespace svel::SVEL_ISA
