// The posterior mean for D > SMALL_D: lanes are coordinates. Scores are dot products of a few rows with four
// references at a time; weighted sums touch only references whose weight counts. See posterior.h.
#include <cmath>
#include <limits>
#include <type_traits>

#include "stable_target/posterior.h"
#include "stable_target/simd.h"

namespace svel::SVEL_ISA {
namespace {

constexpr int REFS = 4;                    // references at a time
constexpr int ROWS = LANES == 16 ? 6 : 3;  // rows at a time: ROWS x REFS accumulators fit the registers
constexpr int64_t STRIP = REFS * LANES;    // coordinates at a time in weighted sums
constexpr int64_t CHAIN = 64;              // float32 terms in a row before a partial sum is put away
constexpr double DOUBT = 22.0;             // measured: errors of the result stay below 1e-6
constexpr int64_t MANY = 64;               // so many weights of a block, all nearly the largest
constexpr int64_t SCORE_STRIDE = SCORE_DEPTH + SKEW, SUM_STRIDE = SUM_DEPTH + SKEW;
static_assert(SUM_DEPTH % STRIP == 0 && padded(1) % STRIP == 0 && WIDE_BLOCK % REFS == 0);

// y = x - alpha c of row i of the tile over [begin, begin + n), zeros up to `full`. alpha in two floats, so
// that its rounding does not meet a large centre.
void centred_row(const RowTile& rows, int64_t i, const float* centre, int64_t begin, int64_t n, int64_t full,
                 float* y) {
  const float high = static_cast<float>(rows.alpha[i]);
  const float low = static_cast<float>(rows.alpha[i] - high);
  with_storage(rows.x.storage, rows.x.data, [&](const auto* x) {
    x += rows.row[i] * rows.d + begin;
    each_vec(n, [&](int64_t k, const auto& read) {
      const Vec c = load_vec(centre + begin + k);
      store_vec(y + k, read(x) - high * c - low * c);
    });
  });
  for (int64_t k = n; k < full; ++k) y[k] = 0.0f;
}

// d = r - c over [begin, begin + n), zeros up to `full`; returns |d|^2.
template <typename T>
float centred_ref(const T* ref, const float* centre, int64_t begin, int64_t n, int64_t full, float* out) {
  Vec norm[2] = {};
  ref += begin;
  each_vec(n, [&](int64_t k, const auto& read) {
    // centre is zero beyond D, and so is what read() gives there
    const Vec d = read(ref) - load_vec(centre + begin + k);
    store_vec(out + k, d);
    norm[k / LANES % 2] += d * d;
  });
  for (int64_t k = (n + LANES - 1) / LANES * LANES; k < full; ++k) out[k] = 0.0f;
  return sum_lanes(norm[0] + norm[1]);
}

// dots (R, REFS) += y (R, n) . panel (REFS, n), n a multiple of LANES.
template <int R>
void dot_tile(const float* y, const float* panel, int64_t n, double* dots) {
  Vec acc[R][REFS] = {};
  for (int64_t k = 0; k < n; k += LANES) {
    Vec d[REFS];
    for (int j = 0; j < REFS; ++j) d[j] = load_vec(panel + j * SCORE_STRIDE + k);
    for (int i = 0; i < R; ++i) {
      const Vec v = load_vec(y + i * SCORE_STRIDE + k);
      for (int j = 0; j < REFS; ++j) acc[i][j] += v * d[j];
    }
  }
  for (int i = 0; i < R; ++i) {
    const Vec4 sums = sum_lanes(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
    for (int j = 0; j < REFS; ++j) dots[i * WIDE_BLOCK + j] += sums[j];
  }
}

// Scores of many rows over one chunk of n coordinates: references are unpacked a panel at a time.
template <typename T>
void panel_scores(const RowTile& rows, const RefBlock& block, const T* refs, int64_t begin, int64_t n,
                  const WideScratch& scratch, double* dots, double* norms) {
  const int64_t full = (n + LANES - 1) / LANES * LANES;
  for (int64_t j0 = 0; j0 < block.count; j0 += SCORE_PANEL) {
    const int64_t count = smaller(SCORE_PANEL, block.count - j0);
    for (int64_t j = 0; j < count; ++j) {
      norms[j0 + j] += centred_ref(refs + (j0 + j) * rows.d, block.centre, begin, n, full,
                                   scratch.panel + j * SCORE_STRIDE);
    }
    for (int64_t j = count; j % REFS; ++j) {
      for (int64_t k = 0; k < full; ++k) scratch.panel[j * SCORE_STRIDE + k] = 0.0f;
    }
    for (int64_t i = 0; i < rows.n; i += ROWS) {
      with_constant<ROWS>(rows.n - i, [&](auto r) {
        for (int64_t j = 0; j < count; j += REFS) {
          dot_tile<r>(scratch.rows + i * SCORE_STRIDE, scratch.panel + j * SCORE_STRIDE, full,
                      dots + i * WIDE_BLOCK + j0 + j);
        }
      });
    }
  }
}

// Scores of R <= STREAM_ROWS rows over one chunk of n coordinates, straight from the references.
template <int R, typename T>
void stream_scores(const RowTile& rows, const RefBlock& block, const T* refs, int64_t begin, int64_t n,
                   const WideScratch& scratch, double* dots, double* norms) {
  for (int64_t j0 = 0; j0 < block.count; j0 += REFS) {
    const T* r[REFS];
    for (int j = 0; j < REFS; ++j) r[j] = refs + smaller(j0 + j, block.count - 1) * rows.d + begin;
    Vec acc[R][REFS] = {}, norm[REFS] = {};
    each_vec(n, [&](int64_t k, const auto& read) {
      const Vec c = load_vec(block.centre + begin + k);
      Vec d[REFS];
      for (int j = 0; j < REFS; ++j) {
        d[j] = read(r[j]) - c;
        norm[j] += d[j] * d[j];
      }
      for (int i = 0; i < R; ++i) {
        const Vec v = load_vec(scratch.rows + i * SCORE_STRIDE + k);
        for (int j = 0; j < REFS; ++j) acc[i][j] += v * d[j];
      }
    });
    const Vec4 norm_sums = sum_lanes(norm[0], norm[1], norm[2], norm[3]);
    for (int j = 0; j < REFS; ++j) norms[j0 + j] += norm_sums[j];
    for (int i = 0; i < R; ++i) {
      const Vec4 sums = sum_lanes(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
      for (int j = 0; j < REFS; ++j) dots[i * WIDE_BLOCK + j0 + j] += sums[j];
    }
  }
}

// For a group of r rows: which references have a weight in any of them, and those weights, (picked, r).
int64_t pick(const BlockWeights& weights, int64_t first, int r, int64_t count, int32_t* picked, float* list) {
  int64_t length = 0;
  for (int64_t j0 = 0; j0 < count; j0 += LANES) {
    const float* w = weights.weight + first * WIDE_BLOCK + j0;
    Vec most = {};
    for (int i = 0; i < r; ++i) most = max(load_vec(w + i * WIDE_BLOCK), most);
    if (max_lane(most) == 0.0f) continue;
    for (int64_t j = 0; j < smaller(LANES, count - j0); ++j) {
      if (most[j] == 0.0f) continue;
      for (int i = 0; i < r; ++i) list[length * r + i] = w[i * WIDE_BLOCK + j];
      picked[length++] = static_cast<int32_t>(j0 + j);
    }
  }
  return length;
}

// sums (R, SUM_STRIDE) = sum over the list of weight d, from a panel whose row for reference j is slot[j].
template <int R>
void panel_sums(const float* panel, const int32_t* slot, const int32_t* picked, const float* list,
                int64_t length, int64_t n, float* sums) {
  for (int64_t k = 0; k < n; k += STRIP) {
    for (int64_t first = 0; first < length; first += CHAIN) {
      Vec acc[R][REFS] = {};
      for (int64_t j = first; j < smaller(first + CHAIN, length); ++j) {
        const float* d = panel + slot[picked[j]] * SUM_STRIDE + k;
        Vec v[REFS];
        for (int s = 0; s < REFS; ++s) v[s] = load_vec(d + s * LANES);
        for (int i = 0; i < R; ++i) {
          for (int s = 0; s < REFS; ++s) acc[i][s] += list[j * R + i] * v[s];
        }
      }
      for (int i = 0; i < R; ++i) {
        for (int s = 0; s < REFS; ++s) {
          float* out = sums + i * SUM_STRIDE + k + s * LANES;
          store_vec(out, first ? load_vec(out) + acc[i][s] : acc[i][s]);
        }
      }
    }
  }
}

// The same straight from the references, four of them at a time.
template <int R, typename T>
void stream_sums(const T* refs, int64_t d, const float* centre, int64_t begin, int64_t n,
                 const int32_t* picked, const float* list, int64_t length, float* sums) {
  for (int64_t k = 0; k < R * SUM_STRIDE; ++k) sums[k] = 0.0f;
  for (int64_t j = 0; j < length; j += REFS) {
    const T* r[REFS];
    float w[R][REFS];
    for (int s = 0; s < REFS; ++s) {
      const bool there = j + s < length;
      r[s] = refs + picked[there ? j + s : j] * d + begin;
      for (int i = 0; i < R; ++i) w[i][s] = there ? list[(j + s) * R + i] : 0.0f;
    }
    each_vec(n, [&](int64_t k, const auto& read) {
      const Vec c = load_vec(centre + begin + k);
      Vec v[REFS];
      for (int s = 0; s < REFS; ++s) v[s] = read(r[s]) - c;
      for (int i = 0; i < R; ++i) {
        float* out = sums + i * SUM_STRIDE + k;
        store_vec(out,
                  load_vec(out) + ((w[i][0] * v[0] + w[i][1] * v[1]) + (w[i][2] * v[2] + w[i][3] * v[3])));
      }
    });
  }
}

// One row and chunk: its centred sums join running.total, or are finished at once.
void put(const RowTile& rows, int64_t i, int64_t begin, int64_t n, const float* centre, const float* sums,
         const BlockWeights& weights, const Running& running, const Finish& finish) {
  const double keep = weights.keep[i], added = weights.added[i];
  double once[SUM_DEPTH];
  double* total = running.total ? running.total + i * rows.d + begin : once;
  const float* c = centre + begin;
  if (!running.total || keep == 0.0) {
    for (int64_t k = 0; k < n; ++k) total[k] = sums[k] + added * c[k];
  } else {
    for (int64_t k = 0; k < n; ++k) total[k] = total[k] * keep + (sums[k] + added * c[k]);
  }
  if (!running.total) finish_rows(rows, once - i * rows.d - begin, finish, i, i + 1, begin, begin + n);
}

}  // namespace

void wide_scores(const RowTile& rows, const RefBlock& block, int64_t begin, int64_t end,
                 const WideScratch& scratch, double* dots, double* norms) {
  for (int64_t j = 0; j < WIDE_BLOCK; ++j) norms[j] = 0.0;
  for (int64_t i = 0; i < rows.n * WIDE_BLOCK; ++i) dots[i] = 0.0;
  with_storage(block.refs.storage, block.refs.data, [&](const auto* refs) {
    for (int64_t k = begin; k < end; k += SCORE_DEPTH) {
      const int64_t n = smaller(SCORE_DEPTH, end - k);
      for (int64_t i = 0; i < rows.n; ++i) {
        centred_row(rows, i, block.centre, k, n, (n + LANES - 1) / LANES * LANES,
                    scratch.rows + i * SCORE_STRIDE);
      }
      if (rows.n > STREAM_ROWS) {
        panel_scores(rows, block, refs, k, n, scratch, dots, norms);
      } else {
        with_constant<STREAM_ROWS>(
            rows.n, [&](auto r) { stream_scores<r>(rows, block, refs, k, n, scratch, dots, norms); });
      }
    }
  });
}

int64_t wide_logits(const RowTile& rows, int64_t count, const double* offset, const double* y_norm,
                    double* dots, const double* norms, double cut, const Running& running,
                    int32_t* doubtful) {
  double spread = 0.0;  // mean of |d|^2
  for (int64_t j = 0; j < count; ++j) spread += norms[j] / static_cast<double>(count);
  int64_t found = 0;
  const int64_t full = (count + LANES - 1) / LANES * LANES;
  for (int64_t i = 0; i < rows.n; ++i) {
    double* logit = dots + i * WIDE_BLOCK;
    const double a = rows.alpha[i], scale = 1.0 / (rows.sigma[i] * rows.sigma[i]);
    double top = running.top[i];
    for (int64_t j = 0; j < count; ++j)
      logit[j] = (a * logit[j] - 0.5 * a * a * norms[j]) * scale + offset[i];
    for (int64_t j = count; j < full; ++j) logit[j] = -std::numeric_limits<double>::infinity();
    // Products of this size lose digits that differences of the size sigma sqrt(D) keep.
    const double size = std::fabs(a) * scale * std::sqrt(y_norm[i] * spread);
    const double ratio = size / std::sqrt(static_cast<double>(rows.d));
    if (!(ratio > 1.0)) continue;
    for (int64_t j = 0; j < count; ++j) top = logit[j] > top ? logit[j] : top;
    // Else the logits' errors, about 1e-6 times the ratio, average out but for the largest weights.
    const bool all = ratio > DOUBT;
    const double near = top + (all ? cut - 1.0 - 0x1p-22 * size : -2.0 * std::log(ratio));
    const int64_t before = found;
    for (int64_t j = 0; j < count; ++j) {
      if (logit[j] > near) doubtful[found++] = static_cast<int32_t>(i * WIDE_BLOCK + j);
    }
    if (!all && found - before > MANY) found = before;
  }
  return found;
}

void wide_rescore(const RowTile& rows, const RefBlock& block, const int32_t* doubtful, int64_t first,
                  int64_t last, double* logits) {
  typedef double VecDouble __attribute__((vector_size(8 * LANES)));
  with_storage(rows.x.storage, rows.x.data, [&](const auto* all_x) {
    with_storage(block.refs.storage, block.refs.data, [&](const auto* all_refs) {
      for (int64_t s = first; s < last; ++s) {
        const int64_t i = doubtful[s] / WIDE_BLOCK, j = doubtful[s] % WIDE_BLOCK;
        const auto* x = all_x + rows.row[i] * rows.d;
        const auto* ref = all_refs + j * rows.d;
        VecDouble sum = {};
        each_vec(rows.d, [&](int64_t, const auto& read) {
          const VecDouble gap = __builtin_convertvector(read(x), VecDouble) -
                                rows.alpha[i] * __builtin_convertvector(read(ref), VecDouble);
          sum += gap * gap;
        });
        double distance = 0.0;
        for (int l = 0; l < LANES; ++l) distance += sum[l];
        logits[doubtful[s]] =
            0.5 * static_cast<double>(rows.d) - 0.5 * distance / (rows.sigma[i] * rows.sigma[i]);
      }
    });
  });
}

void wide_weights(const RowTile& rows, int64_t count, const double* offset, const double* logits, double cut,
                  const Running& running, const BlockWeights& out) {
  const int64_t full = (count + LANES - 1) / LANES * LANES;
  for (int64_t i = 0; i < rows.n; ++i) {
    const double* logit = logits + i * WIDE_BLOCK;
    float* weight = out.weight + i * WIDE_BLOCK;
    double tops[4];
    for (double& top : tops) top = running.top[i];
    for (int64_t j = 0; j < full; j += 4) {
      for (int l = 0; l < 4; ++l) tops[l] = logit[j + l] > tops[l] ? logit[j + l] : tops[l];
    }
    double top = tops[0];
    for (int l = 1; l < 4; ++l) top = tops[l] > top ? tops[l] : top;
    if (!std::isfinite(offset[i]) || !std::isfinite(top) || std::isnan(running.sum[i])) {
      // NaN from here on, without touching the other rows
      for (int64_t j = 0; j < full; ++j) weight[j] = 0.0f;
      out.keep[i] = 1.0;
      out.added[i] = 0.0;
      running.sum[i] = std::numeric_limits<double>::quiet_NaN();
      continue;
    }
    Vec sum = {};
    for (int64_t j = 0; j < full; j += LANES) {
      Vec below;
      for (int l = 0; l < LANES; ++l) below[l] = static_cast<float>(logit[j + l] - top);
      const Vec w = below < splat(static_cast<float>(cut)) ? Vec{} : exp(below);
      store_vec(weight + j, w);
      sum += w;
    }
    out.keep[i] = std::exp(running.top[i] - top);
    out.added[i] = sum_lanes(sum);
    running.sum[i] = running.sum[i] * out.keep[i] + out.added[i];
    running.top[i] = top;
  }
}

void wide_sums(const RowTile& rows, const RefBlock& block, const BlockWeights& weights, int64_t begin,
               int64_t end, const WideScratch& scratch, const Running& running, const Finish& finish) {
  const int64_t group = rows.n > STREAM_ROWS ? ROWS : STREAM_ROWS;
  int64_t length[(WIDE_ROWS + 2) / 3];
  int32_t slot[WIDE_BLOCK];  // of a reference in the panel
  for (int64_t j = 0; j < block.count; ++j) slot[j] = -1;
  for (int64_t i = 0; i < rows.n; i += group) {
    int32_t* picked = scratch.picked + i * WIDE_BLOCK;
    length[i / group] = pick(weights, i, static_cast<int>(smaller(group, rows.n - i)), block.count, picked,
                             scratch.weights + i * WIDE_BLOCK);
    for (int64_t j = 0; j < length[i / group]; ++j) slot[picked[j]] = 0;
  }
  int32_t used = 0;
  for (int64_t j = 0; j < block.count; ++j) slot[j] = slot[j] ? slot[j] : used++;

  float sums[STREAM_ROWS > ROWS ? STREAM_ROWS * SUM_STRIDE : ROWS * SUM_STRIDE] = {};
  with_storage(block.refs.storage, block.refs.data, [&](const auto* refs) {
    for (int64_t k = begin; k < end; k += SUM_DEPTH) {
      const int64_t n = smaller(SUM_DEPTH, end - k), full = (n + STRIP - 1) / STRIP * STRIP;
      if (rows.n > STREAM_ROWS) {
        for (int64_t j = 0; j < block.count; ++j) {
          if (slot[j] < 0) continue;
          centred_ref(refs + j * rows.d, block.centre, k, n, full, scratch.panel + slot[j] * SUM_STRIDE);
        }
      }
      for (int64_t i = 0; i < rows.n; i += group) {
        const int64_t some = length[i / group];
        if (!some && running.total) continue;
        const int32_t* picked = scratch.picked + i * WIDE_BLOCK;
        const float* list = scratch.weights + i * WIDE_BLOCK;
        if (rows.n > STREAM_ROWS) {
          with_constant<ROWS>(rows.n - i, [&](auto r) {
            panel_sums<r>(scratch.panel, slot, picked, list, some, full, sums);
          });
        } else {
          with_constant<STREAM_ROWS>(rows.n, [&](auto r) {
            stream_sums<r>(refs, rows.d, block.centre, k, n, picked, list, some, sums);
          });
        }
        for (int64_t row = i; row < smaller(i + group, rows.n); ++row) {
          if (running.total && weights.added[row] == 0.0 && weights.keep[row] == 1.0) continue;
          put(rows, row, k, n, block.centre, sums + (row - i) * SUM_STRIDE, weights, running, finish);
        }
      }
    }
  });
}

}  // namespace svel::SVEL_ISA
