// What comes before and after the pool kernel: the centre of the references, the rows as it takes them, the
// merge of its parts, and which rows it may have rounded too much. Bytes: those of 33 samples, of the rows,
// and of the parts.
//
// A logit is off by about e = 2^-24 rate S. S is what sums of 128 products in float32 come to, their squares
// added up: those of a centre, which do not cancel, and of deviations from it; and a part of the norms. To
// that comes the rounding of the logit itself. Weights w_j with independent errors d_j move the mean by
// sum w_j d_j (r_j - m) and lse by sum w_j d_j. Where one reference has all the weight the first is nothing;
// where many share it, both average out: what matters are the few best. Those with w_j e > POOL_MATTERS,
// among the best that each cluster lists, are scored again in float64 (pool_best.cuh). Of the others, U = sum
// w_j^2 is known of those listed; those that are not, of the weight W together, are no better than the worst
// w that is listed, so add w W at most. This leaves
//
//     lse off by e sqrt(U), the mean by e sqrt(U) times the spread of the references under the weights
//
// as one standard deviation: of a normal error if one of them has most of U, next to certain if many share
// it. Parts of a set, with shares s and 1 - s of it, merge to a mean that an lse moves by s (1 - s) times its
// error and |mean_1 - mean_2|: by at most that error times sqrt(|r - c|^2 / 8), where the means of parts are
// no farther apart than two references.
#pragma once

#include "stable_target/pool_rows.cuh"
#include "stable_target/scan.cuh"

namespace svel::cuda {

constexpr int POOL_SAMPLES = 32;  // references whose mean is the centre
constexpr int POOL_MOST_PARTS = 512;

constexpr int POOL_CHAIN = 128;  // products added up in float32 at a time
constexpr double POOL_NORM_ERROR =
    0.15;  // of |r - c|^2, beside 2^-24 of its mean: of 4,096 additions in float32
constexpr double POOL_DOUBT = 1.5e-6;  // of a row's output
constexpr int POOL_PREPARE_THREADS = 512, POOL_PREPARE_EACH = POOL_D / POOL_PREPARE_THREADS;

struct PoolRow {
  int64_t index;
  double a, b;       // out = a x + b mean
  double norm_rate;  // base-2 logit = ... - norm_rate |r - c|^2
  double shift;      // of lse, beside what the kernel computes
  double logit_error;
  double alpha, sign;  // of x: y = sign x - alpha c
  double rate;         // base 2
  double centred;      // sign x.c - alpha |c|^2 / 2: what to take from sign x.r - alpha |r|^2 / 2, and
  double rounded;      // what to add to that times rate, for the logit as the kernel means it
  bool alive;
};

// What scoring again found, see pool_best.cuh.
struct PoolAgain {
  int count;       // references
  double error;    // of a logit, as one standard deviation
  double unsure;   // U
  double largest;  // weight of the others
};
constexpr int POOL_STAGED = 128;  // steps that a merge block has at once
struct PoolStep {                 // one of them
  double weight;                  // what its scaled weight, in units of the largest, is to grow by
  int64_t reference;
};

// centre (POOL_D,), rounded to float16; valid[0], and valid[1]: whether the centre is other than zero. It is
// zero where the common part of the references is no larger than what they differ by. One cluster; scratch:
// two sums of each block.
__global__ void SVEL_CLUSTER(POOL_CLUSTER) __launch_bounds__(POOL_SLICE)
    pool_centre_kernel(const Inputs in, float* centre, int64_t* valid, double* scratch) {
  __shared__ double sums[33];
  __shared__ int64_t places[POOL_SAMPLES];
  const int e = static_cast<int>(blockIdx.x * POOL_SLICE + threadIdx.x);
  const int64_t count = valid_count(in, 0);
  const int samples = count < POOL_SAMPLES ? static_cast<int>(count) : POOL_SAMPLES;
  const __half* const refs = static_cast<const __half*>(in.refs.data);
  if (threadIdx.x < samples) places[threadIdx.x] = count * threadIdx.x / samples * in.d;
  __syncthreads();
  float seen[POOL_SAMPLES];
#pragma unroll
  for (int j = 0; j < POOL_SAMPLES; ++j)
    seen[j] = e < in.d && j < samples ? __half2float(refs[places[j] + e]) : 0.0f;
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

// Elements first, first + step, ... of a row of x that begins at `from`, zeros beyond d; all on their way at
// once, which a switch for each of them would not allow.
template <int COUNT>
__device__ inline void pool_read_row(const Array& x, int64_t from, int first, int step, int d,
                                     float (&out)[COUNT]) {
  const auto read = [&](const auto* row) {
#pragma unroll
    for (int k = 0; k < COUNT; ++k)
      out[k] = first + k * step < d ? to_float(row[from + first + k * step]) : 0;
  };
  if (x.dtype == Dtype::f32) return read(static_cast<const float*>(x.data));
  if (x.dtype == Dtype::f16) return read(static_cast<const __half*>(x.data));
  read(static_cast<const __nv_bfloat16*>(x.data));
}

// This thread's share of the sum of |r - c|^2 over some references, one for each warp at a time.
__device__ inline float pool_norms(const Inputs& in, const float* centre, int64_t m, int samples) {
  const int d = static_cast<int>(in.d);
  const __half* const refs = static_cast<const __half*>(in.refs.data);
  float part = 0;
  for (int j = threadIdx.x / 32; j < samples; j += blockDim.x / 32) {
    const uint4* const from = reinterpret_cast<const uint4*>(refs + m * j / samples * d);
#pragma unroll 8
    for (int v = threadIdx.x % 32; v < d / 8; v += 32) {
      const uint4 raw = from[v];
      const float4 low = reinterpret_cast<const float4*>(centre)[2 * v],
                   high = reinterpret_cast<const float4*>(centre)[2 * v + 1];
      const float c[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      const __half* const halves = reinterpret_cast<const __half*>(&raw);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const float gap = __half2float(halves[k]) - c[k];
        part = fmaf(gap, gap, part);
      }
    }
  }
  return part;
}

// Sums over the block, the same in all threads.
template <int COUNT>
__device__ void pool_block_sums(double (&v)[COUNT], double (&scratch)[POOL_PREPARE_THREADS / 32][COUNT]) {
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    v[k] = warp_sum(v[k]);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32][k] = v[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    v[k] = 0;
    for (int w = 0; w < POOL_PREPARE_THREADS / 32; ++w) v[k] += scratch[w][k];
  }
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
// block. Block POOL_ROWS: the mean norm, and totals of zero. A thread has 8 elements, 16 of them a chain.
__global__ void __launch_bounds__(POOL_PREPARE_THREADS)
    pool_prepare_kernel(const Inputs in, const float* centre, const int64_t* valid, int64_t first,
                        const PoolRows made) {
  constexpr int EACH = POOL_PREPARE_EACH, WARPS = POOL_PREPARE_THREADS / 32;
  __shared__ double scratch[WARPS][5], of_dot[WARPS][1];
  __shared__ float tops[33];
  const int slot = blockIdx.x, d = static_cast<int>(in.d), e = EACH * static_cast<int>(threadIdx.x);
  const int64_t m = *valid;
  const int samples = m < POOL_SAMPLES ? static_cast<int>(m) : POOL_SAMPLES;
  const int64_t index = slot < POOL_ROWS ? pool_row_at(in, first + slot) : -1;
  Row row{};
  bool alive = false;
  if (index >= 0) row = make_row(in, index, 0, alive);
  float x[EACH] = {};
  if (alive) pool_read_row(in.x, index * d, e, 1, d, x);
  double y[EACH], c[EACH];
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    c[k] = centre[e + k];
    y[k] = alive ? row.sign * x[k] - row.alpha * c[k] : 0.0;
  }
  // Of each chain (y.c)^2 and the squares of y_e r_e; the chains' sums once more where they are added up.
  double of_chain = 0, sums[5] = {};
  float top = 0;
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    top = fmaxf(top, fabsf(static_cast<float>(y[k])));
    sums[0] += y[k] * y[k];
    sums[1] += c[k] * (y[k] + 0.5 * row.alpha * c[k]);
    sums[2] += y[k] * y[k] * c[k] * c[k];
    of_chain += y[k] * c[k];
  }
  for (int offset = POOL_CHAIN / EACH / 2; offset > 0; offset /= 2)
    of_chain += __shfl_xor_sync(0xffffffffu, of_chain, offset);
  if (e % POOL_CHAIN == 0) sums[3] = of_chain * of_chain;
  sums[4] = pool_norms(in, centre, m, samples);
  pool_block_sums(sums, scratch);
  const double square = sums[0], with_c = sums[1], chains = sums[3];
  const double mean_norm = samples ? sums[4] / samples : 0.0;
  const double products = sums[2] + square * mean_norm / d;
  if (slot == POOL_ROWS) {
    if (threadIdx.x == 0) *made.mean_norm = static_cast<float>(mean_norm);
    for (int64_t i = threadIdx.x; i < made.parts * POOL_ROWS; i += blockDim.x) made.total[i] = 0;
    return;
  }
  // Base-2 rate = mantissa 2^power: the power stays a factor of the dots, without error.
  int power = 0;
  const double rate = alive ? row.rate() * LOG2_E : 0.0, mantissa = frexp(rate, &power);
  const double most = block_max<float>(top, tops) * mantissa;
  const int wanted = most > 0 && isfinite(most) ? 13 - ilogb(most) : 0;
  const int exponent = wanted < -100 ? -100 : wanted > 100 ? 100 : wanted;
  const double scale = ldexp(mantissa, exponent);
  double dots[1] = {};
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    const float v = static_cast<float>(y[k] * scale);
    const __half upper = __float2half_rn(v), lower = __float2half_rn(v - __half2float(upper));
    made.upper[slot * POOL_D + e + k] = upper;
    made.lower[slot * POOL_D + e + k] = lower;
    dots[0] += (static_cast<double>(__half2float(upper)) + __half2float(lower)) * c[k];
  }
  pool_block_sums(dots, of_dot);
  const double dot = dots[0];
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
    const double rounded = norm_rate * static_cast<float>(mean_norm) - factor * (offset - dot);
    made.rows[slot] = {index,     row.a,    row.b, norm_rate, shift,   logit_error,
                       row.alpha, row.sign, rate,  with_c,    rounded, alive};
  }
}

// What merge blocks leave for pool_judge_kernel.
struct PoolSums {
  double out, mean;  // squared norms of a x + b mean and of mean - c, over the block's elements
  double rest;       // of (sign x - alpha mean) / alpha
  double moment;     // see PoolArgs, of the mean weight
};

// Slot blockIdx.y of out, and of lse, from the parts; again: and what was scored again, (rows,), steps
// (rows, most_steps). Grid: parts of d x rows.
__global__ void __launch_bounds__(256)
    pool_merge_kernel(const Inputs in, const PoolArgs args, const PoolRow* rows, int parts,
                      const PoolAgain* again, const PoolStep* steps, int most_steps, PoolSums* left) {
  __shared__ double keeps[POOL_MOST_PARTS], scratch[33];
  __shared__ PoolStep staged[POOL_STAGED];
  __shared__ float tops[33];
  const __half* const refs = static_cast<const __half*>(in.refs.data);
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
  const double before = block_sum<double>(share, scratch), moment = block_sum<double>(with_norm, scratch);
  double total = before, sum = 0;
  if (e < in.d) {
#pragma unroll 8
    for (int p = 0; p < parts; ++p) {
      const int64_t at = (static_cast<int64_t>(p) * POOL_ROWS + slot) * in.d + e;
      if (keeps[p] != 0) sum += keeps[p] * args.sums[at];
    }
  }
  const int scored_again = again ? again[slot].count : 0;
  for (int from = 0; from < scored_again; from += POOL_STAGED) {
    const int count = min(scored_again - from, POOL_STAGED);
    __syncthreads();
    if (threadIdx.x < count)
      staged[threadIdx.x] = steps[static_cast<int64_t>(slot) * most_steps + from + threadIdx.x];
    __syncthreads();
#pragma unroll 16
    for (int i = 0; i < count; ++i) {
      total += staged[i].weight;
      if (e < in.d) sum += staged[i].weight * __half2float(refs[staged[i].reference * in.d + e]);
    }
  }
  const PoolRow row = rows[slot];
  const bool good = row.alive && total != 0;
  double of_out = 0, of_mean = 0, of_rest = 0;
  if (e < in.d) {
    const int64_t at = row.index * in.d + e;
    const double x = load_as<double>(in.x, at), mean = sum / total, value = row.a * x + row.b * mean;
    store_as(in.out, at, good ? value : NAN);
    const double rest = row.sign * x / row.alpha - mean;
    of_out = value * value, of_mean = (mean - args.centre[e]) * (mean - args.centre[e]);
    of_rest = rest * rest;
  }
  if (in.lse.data && e == 0) {
    const double lse = LOG_2 * (most - row.norm_rate * *args.mean_norm) + log(total / POOL_WEIGHT_SCALE);
    store_as(in.lse, row.index, good ? lse + row.shift : NAN);
  }
  of_out = block_sum<double>(of_out, scratch), of_mean = block_sum<double>(of_mean, scratch);
  of_rest = block_sum<double>(of_rest, scratch);
  if (threadIdx.x == 0) left[slot * gridDim.x + blockIdx.x] = {of_out, of_mean, of_rest, moment / before};
}

// doubtful[row.index] = its time where its output may be off by more than POOL_DOUBT, else NaN. With lse the
// output is a part's mean, from which any prediction may be made: its error counts beside what is smaller,
// the mean or x / alpha less the mean, and that of lse does too. One thread to a slot.
__global__ void pool_judge_kernel(const Inputs in, const PoolArgs args, const PoolRow* rows,
                                  const PoolAgain* again, const PoolSums* left, int blocks,
                                  double* doubtful) {
  const int slot = threadIdx.x;
  if (slot >= args.rows) return;
  const PoolRow row = rows[slot];
  double out = 0, mean = 0, rest = 0;
#pragma unroll 8
  for (int i = 0; i < blocks; ++i) {
    const PoolSums& of = left[slot * blocks + i];
    out += of.out, mean += of.mean, rest += of.rest;
  }
  double spread = fmax(left[slot * blocks].moment + *args.mean_norm - mean, 0.0);  // squared
  if (in.lse.data) {
    spread += *args.mean_norm / 8;
    if (rest < out) out = rest;  // not where it is NaN: alpha is 0
  }
  // Five of an error's standard deviations if it is one reference's, little more than one if it is many's.
  const PoolAgain of = again[slot];
  const double deviations = 1 + 4 * fmin(1.0, of.largest / sqrt(of.unsure));
  const double error = deviations * of.error * fabs(row.b) * sqrt(spread * of.unsure / out);
  doubtful[row.index] = row.alive && error > POOL_DOUBT ? load_as<double>(in.time_or_alpha, row.index) : NAN;
}

// out and lse = the exact ones where the row was doubtful. Grid: parts of d x rows.
__global__ void __launch_bounds__(256)
    pool_replace_kernel(const Inputs in, const double* doubtful, const Array exact, const Array lse) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, row = blockIdx.y;
  if (e >= in.d || isnan(doubtful[row])) return;
  store_as(in.out, row * in.d + e, load_as<double>(exact, row * in.d + e));
  if (e == 0 && in.lse.data) store_as(in.lse, row, load_as<double>(lse, row));
}

}  // namespace svel::cuda
