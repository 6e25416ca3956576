#include <algorithm>
#include <limits>

#include "bank/mix_row.h"
#include "common/convert.h"

namespace svel::SVEL_ISA {
namespace {

constexpr int64_t BLOCK = 1024;

template <typename Work>
void mix(const MixRow& r) {
  alignas(64) Work x_buffer[BLOCK], noise_buffer[BLOCK], out[BLOCK];
  const Work a = static_cast<Work>(r.a), b = static_cast<Work>(r.b);
  if (!r.x.data) std::fill_n(x_buffer, BLOCK, std::numeric_limits<Work>::quiet_NaN());
  for (int64_t first = 0; first < r.d; first += BLOCK) {
    const int64_t n = std::min(BLOCK, r.d - first);
    const Work* x = r.x.data ? load(r.x.storage, r.x.data, first, x_buffer, n) : x_buffer;
    if (r.kept) store(r.out, x, r.kept, first, n);
    if (!r.mixed) continue;
    const Work* noise = load(r.noise.storage, r.noise.data, first, noise_buffer, n);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = a * x[i] + b * noise[i];
    store(r.out, out, r.mixed, first, n);
  }
}

}  // namespace

void mix_row(const MixRow& row) {
  if (row.out == Storage::f64) {
    mix<double>(row);
  } else {
    mix<float>(row);
  }
}

}  // namespace svel::SVEL_ISA
