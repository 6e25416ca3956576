// What comes before and after the pool kernel: the centre of the references, the rows as it takes them, and
// the merge of its parts. Bytes: those of 33 samples, of the rows, and of the parts.
#pragma once

#include "stable_target/pool_rows.cuh"
#include "stable_target/scan.cuh"

namespace svel::cuda {

constexpr int POOL_SAMPLES = 32;  // references whose mean is the centre
constexpr int POOL_MOST_PARTS = 512;
constexpr double POOL_LOG_2 = 0.6931471805599453;

struct PoolRow {
  double a, b;       // out = a x + b mean
  double norm_rate;  // base-2 logit = ... - norm_rate |r - c|^2
  double shift;      // of lse, beside what the kernel computes
  bool alive;
};

// centre (POOL_D,), rounded to float16, and *valid. Grid: parts of POOL_D.
__global__ void pool_centre_kernel(const Inputs in, float* centre, int64_t* valid) {
  const int e = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int64_t count = valid_count(in, 0);
  if (e == 0) *valid = count;
  const int samples = count < POOL_SAMPLES ? static_cast<int>(count) : POOL_SAMPLES;
  const __half* const refs = static_cast<const __half*>(in.refs.data);
  float sum = 0;
#pragma unroll 8
  for (int j = 0; j < samples; ++j)
    if (e < in.d) sum += __half2float(refs[count * j / samples * in.d + e]);
  centre[e] = samples ? __half2float(__float2half_rn(sum / samples)) : 0.0f;
}

struct PoolRows {  // written by pool_prepare_kernel; see PoolArgs
  __half *upper, *lower;
  float4* factors;
  PoolRow* rows;  // (POOL_ROWS,)
  float* mean_norm;
  double* total;
  int64_t parts;
};

// Blocks 0 to POOL_ROWS - 1: y = (sign x - alpha c) rate 2^e as two halves, of row first + block. Block
// POOL_ROWS: the mean norm of some references, and totals of zero.
__global__ void __launch_bounds__(512)
    pool_prepare_kernel(const Inputs in, const float* centre, const int64_t* valid, int64_t first,
                        const PoolRows made) {
  __shared__ double sums[33];
  const int slot = blockIdx.x, d = static_cast<int>(in.d);
  if (slot == POOL_ROWS) {
    const int64_t m = *valid;
    const int samples = m < POOL_SAMPLES ? static_cast<int>(m) : POOL_SAMPLES;
    const __half* const refs = static_cast<const __half*>(in.refs.data);
    float part = 0;
    for (int j = threadIdx.x / 32; j < samples; j += blockDim.x / 32) {  // one for each warp
      const uint4* const from = reinterpret_cast<const uint4*>(refs + m * j / samples * d);
#pragma unroll 8
      for (int v = threadIdx.x % 32; v < d / 8; v += 32) {
        const uint4 raw = from[v];
        const __half* const halves = reinterpret_cast<const __half*>(&raw);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const float gap = __half2float(halves[k]) - centre[8 * v + k];
          part = fmaf(gap, gap, part);
        }
      }
    }
    const double sum = block_sum<double>(part, sums);
    if (threadIdx.x == 0) *made.mean_norm = samples ? static_cast<float>(sum / samples) : 0.0f;
    for (int64_t i = threadIdx.x; i < made.parts * POOL_ROWS; i += blockDim.x) made.total[i] = 0;
    return;
  }
  const int64_t index = first + slot;
  Row row{};
  bool alive = false;
  if (index < in.n) row = make_row(in, index, 0, alive);
  // Base-2 rate = mantissa 2^power: the power stays a factor of the dots, without error.
  int power = 0;
  const double rate = alive ? row.rate() * 1.4426950408889634 : 0.0, mantissa = frexp(rate, &power);
  const auto element = [&](int e) {
    return alive && e < d ? row.sign * load_as<double>(in.x, index * in.d + e) - row.alpha * centre[e] : 0.0;
  };
  double most = 0, square = 0, dot = 0;
  for (int e = threadIdx.x; e < d; e += blockDim.x) {
    const double v = element(e);
    most = fmax(most, fabs(v));
    square += v * v;
  }
  most = block_max<double>(most, sums) * mantissa;
  const int wanted = most > 0 && isfinite(most) ? 13 - ilogb(most) : 0;
  const int exponent = wanted < -100 ? -100 : wanted > 100 ? 100 : wanted;
  const double scale = ldexp(mantissa, exponent);
  for (int e = threadIdx.x; e < POOL_D; e += blockDim.x) {
    const float v = static_cast<float>(element(e) * scale);
    const __half upper = __float2half_rn(v), lower = __float2half_rn(v - __half2float(upper));
    made.upper[slot * POOL_D + e] = upper;
    made.lower[slot * POOL_D + e] = lower;
    dot += (static_cast<double>(__half2float(upper)) + __half2float(lower)) * centre[e];
  }
  square = block_sum<double>(square, sums);
  dot = block_sum<double>(dot, sums);
  if (threadIdx.x == 0) {
    const double factor = ldexp(1.0, power - exponent), norm_rate = 0.5 * rate * row.alpha;
    const float offset = static_cast<float>(dot);
    made.factors[slot] = make_float4(static_cast<float>(factor), static_cast<float>(norm_rate), offset, 0.0f);
    const double shift = POOL_LOG_2 * factor * (offset - dot) - square / (2 * row.sigma * row.sigma) +
                         0.5 * static_cast<double>(in.d);
    made.rows[slot] = {row.a, row.b, norm_rate, shift, alive};
  }
}

// Row first + blockIdx.y of out, and of lse, from the parts. Grid: parts of d x rows.
__global__ void __launch_bounds__(256)
    pool_merge_kernel(const Inputs in, const PoolArgs args, const PoolRow* rows, int parts, int64_t first) {
  __shared__ double keeps[POOL_MOST_PARTS], scratch[33];
  __shared__ float tops[33];
  const int slot = blockIdx.y, e = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  float top = POOL_NO_BEST;
  for (int p = threadIdx.x; p < parts; p += blockDim.x)
    if (args.total[p * POOL_ROWS + slot] != 0) top = fmaxf(top, args.best[p * POOL_ROWS + slot]);
  const float most = block_max<float>(top, tops);
  double share = 0;
  for (int p = threadIdx.x; p < parts; p += blockDim.x) {
    const double part = args.total[p * POOL_ROWS + slot];  // 0: written by nobody
    keeps[p] = part == 0 ? 0.0 : exp2(static_cast<double>(args.best[p * POOL_ROWS + slot]) - most);
    share += keeps[p] == 0 ? 0.0 : keeps[p] * part;
  }
  const double total = block_sum<double>(share, scratch);
  double sum = 0;
  if (e < in.d) {
#pragma unroll 8
    for (int p = 0; p < parts; ++p) {
      const int64_t at = (static_cast<int64_t>(p) * POOL_ROWS + slot) * in.d + e;
      if (keeps[p] != 0) sum += keeps[p] * args.sums[at];
    }
  }
  const PoolRow row = rows[slot];
  const bool good = row.alive && total != 0;
  if (e < in.d) {
    const int64_t at = (first + slot) * in.d + e;
    store_as(in.out, at, good ? row.a * load_as<double>(in.x, at) + row.b * (sum / total) : NAN);
  }
  if (in.lse.data && e == 0) {
    const double lse = POOL_LOG_2 * (most - row.norm_rate * *args.mean_norm) + log(total / POOL_WEIGHT_SCALE);
    store_as(in.lse, first + slot, good ? lse + row.shift : NAN);
  }
}

}  // namespace svel::cuda
