// What all float32 kernels share: the centre of a group, norms of rows about it, and the end of a row. See
// posterior.h.
#include <type_traits>

#include "stable_target/posterior.h"
#include "stable_target/simd.h"

namespace svel::SVEL_ISA {

void find_centre(const Values& refs, int64_t count, int64_t d, int64_t begin, int64_t end, float* centre) {
  // A few from the start of a small set, where the caches find them again; 256 spread over a large one.
  const int64_t used = count >= 4096 ? 256 : smaller(count, 16), step = count >= 4096 ? count / used : 1;
  with_storage(refs.storage, refs.data, [&](const auto* r) {
    each_vec(end - begin, [&](int64_t k, const auto& read) {
      Vec sum = {}, low = read(r + begin), high = low;
      for (int64_t j = 0; j < used; ++j) {
        const Vec v = read(r + j * step * d + begin);
        sum += v;
        low = v < low ? v : low;
        high = max(v, high);
      }
      // Eight bits of the mean, and none where it does not stand out from the spread: then r - c is mostly
      // exact.
      const Vec mean =
          bit_cast<Vec>(bit_cast<VecInt>(sum / static_cast<float>(used)) & static_cast<int32_t>(0xffff0000));
      store_vec(centre + begin + k, max(mean, -mean) > 0.5f * (high - low) ? mean : Vec{});
    });
  });
}

void row_norms(const RowTile& rows, const Values& centre, bool centre_per_row, int64_t begin, int64_t end,
               double* norms) {
  constexpr int64_t CHUNK = 256;
  double x_buffer[CHUNK], c_buffer[CHUNK];
  for (int64_t i = 0; i < rows.n; ++i) {
    const int64_t x_row = rows.row[i] * rows.d, c_row = centre_per_row ? x_row : 0;
    double sums[8] = {};
    for (int64_t k0 = begin; k0 < end; k0 += CHUNK) {
      const int64_t n = smaller(CHUNK, end - k0);
      const double* x = load(rows.x.storage, rows.x.data, x_row + k0, x_buffer, n);
      const double* c = load(centre.storage, centre.data, c_row + k0, c_buffer, n);
      int64_t k = 0;
      for (; k + 8 <= n; k += 8) {
        for (int l = 0; l < 8; ++l) {
          const double y = x[k + l] - rows.alpha[i] * c[k + l];
          sums[l] += y * y;
        }
      }
      for (; k < n; ++k) sums[0] += (x[k] - rows.alpha[i] * c[k]) * (x[k] - rows.alpha[i] * c[k]);
    }
    norms[i] = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  }
}

void finish_rows(const RowTile& rows, const double* total, const Finish& finish, int64_t first, int64_t last,
                 int64_t begin, int64_t end) {
  constexpr int64_t CHUNK = 256;
  double x_buffer[CHUNK], source_buffer[CHUNK], out[CHUNK];
  for (int64_t i = first; i < last; ++i) {
    const double a = finish.a[i], p = finish.p[i], q = finish.q[i];
    const int64_t row = rows.row[i] * rows.d;
    for (int64_t k0 = begin; k0 < end; k0 += CHUNK) {
      const int64_t n = smaller(CHUNK, end - k0);
      const double* x = load(rows.x.storage, rows.x.data, row + k0, x_buffer, n);
      for (int64_t k = 0; k < n; ++k) out[k] = a * x[k];
      if (p != 0.0) {
        for (int64_t k = 0; k < n; ++k) out[k] += p * total[i * rows.d + k0 + k];
      }
      if (q != 0.0) {
        const double* s = load(finish.source.storage, finish.source.data, row + k0, source_buffer, n);
        for (int64_t k = 0; k < n; ++k) out[k] += q * s[k];
      }
      store(finish.out_storage, out, finish.out, row + k0, n);
    }
  }
}

}  // namespace svel::SVEL_ISA
