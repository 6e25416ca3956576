// What comes before and after the pool kernel: the centre of the references, the rows as it takes them, the
// merge of its parts, and which rows it may have rounded too much. Bytes: those of 33 samples, of the rows,
// and of the parts.
//
// A logit is off by about 2^-24 rate S. S is what sums of 128 products in float32 come to, their squares
// added up: those of a centre, which do not cancel, and of deviations from it; and a part of the norms. The
// mean is off by that times the spread of the references under the weights, times the root of how far they
// are from all on one and of how few they are on: weights w_j with independent errors d_j move the mean by
// sum w_j d_j (r_j - m).
#pragma once

#include "stable_target/pool_rows.cuh"
#include "stable_target/scan.cuh"

namespace svel::cuda {

constexpr int POOL_SAMPLES = 32;  // references whose mean is the centre
constexpr int POOL_MOST_PARTS = 512;

constexpr int POOL_CHAIN = 128;  // products added up in float32 at a time
constexpr double POOL_NORM_ERROR =
    0.15;                            // of |r - c|^2, beside 2^-24 of its mean: of 4,096 additions in float32
constexpr double POOL_DOUBT = 4e-7;  // of a row's output, as one standard deviation

struct PoolRow {
  int64_t index;
  double a, b;       // out = a x + b mean
  double norm_rate;  // base-2 logit = ... - norm_rate |r - c|^2
  double shift;      // of lse, beside what the kernel computes
  double logit_error;
  bool alive;
};

// centre (POOL_D,), rounded to float16; valid[0], and valid[1]: whether the centre is other than zero. It is
// zero where the common part of the references is no larger than what they differ by. One cluster; scratch:
// two sums of each block.
__global__ void SVEL_CLUSTER(POOL_CLUSTER) __launch_bounds__(POOL_SLICE)
    pool_centre_kernel(const Inputs in, float* centre, int64_t* valid, double* scratch) {
  __shared__ double sums[33];
  const int e = static_cast<int>(blockIdx.x * POOL_SLICE + threadIdx.x);
  const int64_t count = valid_count(in, 0);
  const int samples = count < POOL_SAMPLES ? static_cast<int>(count) : POOL_SAMPLES;
  const __half* const refs = static_cast<const __half*>(in.refs.data);
  float seen[POOL_SAMPLES];
#pragma unroll
  for (int j = 0; j < POOL_SAMPLES; ++j)
    seen[j] = e < in.d && j < samples ? __half2float(refs[count * j / samples * in.d + e]) : 0.0f;
  float sum = 0, square = 0;
#pragma unroll
  for (int j = 0; j < POOL_SAMPLES; ++j) sum += seen[j], square = fmaf(seen[j], seen[j], square);
  const float mean = samples ? __half2float(__float2half_rn(sum / samples)) : 0.0f;
  const double common = block_sum<double>(static_cast<double>(mean) * mean, sums);
  const double all = block_sum<double>(samples ? square / samples : 0.0, sums);
  if (threadIdx.x == 0) scratch[2 * blockIdx.x] = common, scratch[2 * blockIdx.x + 1] = all;
  synchronize_cluster();
  double of_common = 0, of_all = 0;
  for (int block = 0; block < POOL_CLUSTER; ++block)
    of_common += scratch[2 * block], of_all += scratch[2 * block + 1];
  const bool centred = !(2 * of_common <= of_all);  // NaN: either will do
  centre[e] = centred ? mean : 0.0f;
  if (e == 0) valid[0] = count, valid[1] = centred;
}

struct PoolRows {  // written by pool_prepare_kernel; see PoolArgs
  __half *upper, *lower;
  float4* factors;
  PoolRow* rows;  // (POOL_ROWS,)
  float* mean_norm;
  double* total;
  int64_t parts;
};

// The mean of |r - c|^2 of some references, the same in all threads.
__device__ inline double pool_mean_norm(const Inputs& in, const float* centre, int64_t m, double* scratch) {
  const int samples = m < POOL_SAMPLES ? static_cast<int>(m) : POOL_SAMPLES, d = static_cast<int>(in.d);
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
  const double sum = block_sum<double>(part, scratch);
  return samples ? sum / samples : 0.0;
}

// Which row comes `place`-th in the order of alpha / sigma^2, -1 if there are not so many; the same in all
// threads.
__device__ inline int pool_row_at(const Inputs& in, int64_t place) {
  __shared__ double rates[POOL_MOST_ROWS];
  __shared__ int found;
  const int i = threadIdx.x, n = static_cast<int>(in.n);
  if (i == 0) found = -1;
  if (i < n) {
    bool alive = false;
    const Row row = make_row(in, i, 0, alive);
    rates[i] = alive ? row.rate() : INFINITY;
  }
  __syncthreads();
  if (i < n) {
    int before = 0;
    for (int j = 0; j < n; ++j) before += rates[j] < rates[i] || (rates[j] == rates[i] && j < i);
    if (before == place) found = i;
  }
  __syncthreads();
  return found;
}

// Blocks 0 to POOL_ROWS - 1: y = (sign x - alpha c) rate 2^e as two halves, of the row at place first +
// block. Block POOL_ROWS: the mean norm, and totals of zero.
__global__ void __launch_bounds__(512)
    pool_prepare_kernel(const Inputs in, const float* centre, const int64_t* valid, int64_t first,
                        const PoolRows made) {
  __shared__ double sums[33];
  const int slot = blockIdx.x, d = static_cast<int>(in.d);
  const double mean_norm = pool_mean_norm(in, centre, *valid, sums);
  if (slot == POOL_ROWS) {
    if (threadIdx.x == 0) *made.mean_norm = static_cast<float>(mean_norm);
    for (int64_t i = threadIdx.x; i < made.parts * POOL_ROWS; i += blockDim.x) made.total[i] = 0;
    return;
  }
  const int64_t index = pool_row_at(in, first + slot);
  Row row{};
  bool alive = false;
  if (index >= 0) row = make_row(in, index, 0, alive);
  // Base-2 rate = mantissa 2^power: the power stays a factor of the dots, without error.
  int power = 0;
  const double rate = alive ? row.rate() * LOG2_E : 0.0, mantissa = frexp(rate, &power);
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
  // Of each chain (y.c)^2 and the squares of y_e r_e; the chains' sums once more where they are added up.
  double chains = 0, products = 0;
  const double variance = mean_norm / d;
  for (int chain = threadIdx.x / 32; chain < POOL_D / POOL_CHAIN; chain += blockDim.x / 32) {
    double of_c = 0;
    for (int k = threadIdx.x % 32; k < POOL_CHAIN; k += 32) {
      const int e = chain * POOL_CHAIN + k;
      const double y = element(e), c = centre[e];
      of_c += y * c;
      products += y * y * (c * c + variance);
    }
    for (int offset = 16; offset > 0; offset /= 2) of_c += __shfl_xor_sync(0xffffffffu, of_c, offset);
    if (threadIdx.x % 32 == 0) chains += of_c * of_c;
  }
  chains = block_sum<double>(chains, sums);
  products = block_sum<double>(products, sums);
  if (threadIdx.x == 0) {
    const double factor = ldexp(1.0, power - exponent), norm_rate = 0.5 * rate * row.alpha;
    const float offset = static_cast<float>(dot);
    // Rows that are not there get logits of -infinity, weights of zero.
    made.factors[slot] =
        alive ? make_float4(static_cast<float>(factor), static_cast<float>(norm_rate), offset, 0)
              : make_float4(1, 0, INFINITY, 0);
    const double shift = LOG_2 * factor * (offset - dot) - square / (2 * row.sigma * row.sigma) +
                         0.5 * static_cast<double>(in.d);
    const double of_norms = POOL_NORM_ERROR * 0.5 * row.alpha * mean_norm;
    const double logit_error = row.rate() * 0x1p-24 * sqrt(chains + 2 * products + of_norms * of_norms);
    made.rows[slot] = {index, row.a, row.b, norm_rate, shift, logit_error, alive};
  }
}

// What merge blocks leave for pool_judge_kernel.
struct PoolSums {
  double out, mean;      // squared norms of a x + b mean and of mean - c, over the block's elements
  double total, moment;  // see PoolArgs, in units of the largest weight
};

// Slot blockIdx.y of out, and of lse, from the parts. Grid: parts of d x rows.
__global__ void __launch_bounds__(256)
    pool_merge_kernel(const Inputs in, const PoolArgs args, const PoolRow* rows, int parts, PoolSums* left) {
  __shared__ double keeps[POOL_MOST_PARTS], scratch[33];
  __shared__ float tops[33];
  const int slot = blockIdx.y, e = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  float top = POOL_NO_BEST;
  for (int p = threadIdx.x; p < parts; p += blockDim.x)
    if (args.total[p * POOL_ROWS + slot] != 0) top = fmaxf(top, args.best[p * POOL_ROWS + slot]);
  const float most = block_max<float>(top, tops);
  double share = 0, with_norm = 0;
  for (int p = threadIdx.x; p < parts; p += blockDim.x) {
    const double part = args.total[p * POOL_ROWS + slot];  // 0: written by nobody
    keeps[p] = part == 0 ? 0.0 : exp2(static_cast<double>(args.best[p * POOL_ROWS + slot]) - most);
    if (keeps[p] == 0) continue;
    share += keeps[p] * part;
    with_norm += keeps[p] * args.moment[p * POOL_ROWS + slot];
  }
  const double total = block_sum<double>(share, scratch), moment = block_sum<double>(with_norm, scratch);
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
  double of_out = 0, of_mean = 0;
  if (e < in.d) {
    const int64_t at = row.index * in.d + e;
    const double mean = sum / total, value = row.a * load_as<double>(in.x, at) + row.b * mean;
    store_as(in.out, at, good ? value : NAN);
    of_out = value * value, of_mean = (mean - args.centre[e]) * (mean - args.centre[e]);
  }
  if (in.lse.data && e == 0) {
    const double lse = LOG_2 * (most - row.norm_rate * *args.mean_norm) + log(total / POOL_WEIGHT_SCALE);
    store_as(in.lse, row.index, good ? lse + row.shift : NAN);
  }
  of_out = block_sum<double>(of_out, scratch), of_mean = block_sum<double>(of_mean, scratch);
  if (threadIdx.x == 0)
    left[slot * gridDim.x + blockIdx.x] = {of_out, of_mean, total / POOL_WEIGHT_SCALE, moment / total};
}

// doubtful[row.index] = its time where its output may be off by more than POOL_DOUBT, else NaN. One thread to
// a slot.
__global__ void pool_judge_kernel(const Inputs in, const PoolArgs args, const PoolRow* rows,
                                  const PoolSums* left, int blocks, double* doubtful) {
  const int slot = threadIdx.x;
  if (slot >= args.rows) return;
  const PoolRow row = rows[slot];
  const PoolSums first = left[slot * blocks];
  double out = 0, mean = 0;
  for (int i = 0; i < blocks; ++i) out += left[slot * blocks + i].out, mean += left[slot * blocks + i].mean;
  const double spread = first.moment + *args.mean_norm - mean;  // of the references, squared
  const double unsure = fmin(1.0, first.total - 1) / first.total;
  const double error = row.logit_error * fabs(row.b) * sqrt(fmax(spread, 0.0) * fmax(unsure, 0.0) / out);
  doubtful[row.index] = row.alive && error > POOL_DOUBT ? load_as<double>(in.time_or_alpha, row.index) : NAN;
}

// out = exact where the row was doubtful. Grid: parts of d x rows.
__global__ void __launch_bounds__(256)
    pool_replace_kernel(const Inputs in, const double* doubtful, const Array exact) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, row = blockIdx.y;
  if (e < in.d && !isnan(doubtful[row]))
    store_as(in.out, row * in.d + e, load_as<double>(exact, row * in.d + e));
}

}  // namespace svel::cuda
