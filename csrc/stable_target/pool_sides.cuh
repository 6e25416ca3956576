// What comes before and after the pool kernel: the centre of the references, the rows as it takes them, the
// merge of its parts, and which rows it may have rounded too much. Each launch may begin while the one before
// it ends, and waits for it before it reads what that one writes. Bytes: those of 33 samples, of the rows,
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
constexpr double POOL_SPREAD_ERROR = 0x1p-20;  // of |r - c|^2: what is known of the spread, squared
constexpr double POOL_DOUBT = 1.5e-6;          // of a row's output
constexpr int POOL_PREPARE_THREADS = 512, POOL_PREPARE_EACH = POOL_D / POOL_PREPARE_THREADS;
constexpr int POOL_MERGE_THREADS = 256;
static_assert(POOL_D / POOL_MERGE_THREADS <= 32, "a warp adds up what the merge blocks of a row leave");
static_assert(POOL_MOST_ROWS <= 64, "rows in doubt are the bits of a word");

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
  bool alone;      // they have all the weight
  double error;    // of a logit, as one standard deviation
  double unsure;   // U
  double largest;  // weight of the others
};
constexpr int POOL_STAGED = 128;  // steps that a merge block has at once
struct PoolStep {                 // one of them
  double weight;  // what its scaled weight, in units of the largest, is to grow by; if alone: its logit above
                  // the largest
  int64_t reference;
};

// The pass of which a row is that comes at place `slot` of several passes; without BANK there is one.
template <bool BANK>
struct PoolPass {
  PoolArgs args;
  int row;        // of the pass
  bool is_empty;  // there is no such row

  __device__ PoolPass(const PoolArgs& all, const PoolBankIf<BANK>& bank, int slot, int clusters)
      : args(all), row(slot), is_empty(false) {
    if constexpr (BANK) {
      args = all.of_pass(slot / POOL_ROWS, clusters), row = slot % POOL_ROWS;
      is_empty = bank.first + slot >= *bank.sizes;
    }
  }
};

// centre (POOL_D,), rounded to float16; valid[0], and valid[1]: whether the centre is other than zero. It is
// zero where the common part of the references is no larger than what they differ by. mean_norm: of |r - c|^2
// over the references seen. doubtful: nobody so far. One cluster; scratch: three sums of each block.
template <bool BANK>
__global__ void SVEL_CLUSTER(POOL_CLUSTER) __launch_bounds__(POOL_SLICE)
    pool_centre_kernel(const Inputs in, float* centre, int64_t* valid, float* mean_norm, uint64_t* doubtful,
                       double* scratch, const PoolBankIf<BANK> bank) {
  allow_next_launch();
  __shared__ double sums[33];
  __shared__ int64_t places[POOL_SAMPLES];
  const int e = static_cast<int>(blockIdx.x * POOL_SLICE + threadIdx.x);
  int64_t count;
  int samples;
  if constexpr (BANK) {  // from tiles all over the bank, the same one more often where there are few
    if (bank.sizes[0] == 0) return;
    count = bank.sizes[1], samples = count > 0 ? POOL_SAMPLES : 0;
    if (threadIdx.x < samples) {
      const PoolTile tile = bank.tiles[count * threadIdx.x / samples];
      int skipped = static_cast<int>(threadIdx.x) % __popc(tile.valid);
      uint32_t valid = tile.valid;
      for (; skipped > 0; --skipped) valid &= valid - 1;
      places[threadIdx.x] = int64_t{tile.first + __ffs(static_cast<int>(valid)) - 1} * in.d;
    }
  } else {
    count = valid_count(in, 0);
    samples = count < POOL_SAMPLES ? static_cast<int>(count) : POOL_SAMPLES;
    if (threadIdx.x < samples) places[threadIdx.x] = count * threadIdx.x / samples * in.d;
  }
  const __half* const refs = static_cast<const __half*>(in.refs.data);
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
  float square_gap = 0;
#pragma unroll
  for (int j = 0; j < POOL_SAMPLES; ++j)
    if (j < samples) square_gap = fmaf(seen[j] - mean, seen[j] - mean, square_gap);
  const double apart = block_sum<double>(samples ? square_gap / samples : 0.0, sums);
  if (threadIdx.x == 0) {
    double* const own = scratch + 3 * blockIdx.x;
    own[0] = common, own[1] = all, own[2] = apart;
  }
  synchronize_cluster();
  double of_common = 0, of_all = 0, of_gaps = 0;
  for (int block = 0; block < POOL_CLUSTER; ++block) {
    of_common += scratch[3 * block], of_all += scratch[3 * block + 1];
    of_gaps += scratch[3 * block + 2];
  }
  const bool centred = !(2 * of_common <= of_all);  // NaN: either will do
  centre[e] = centred ? mean : 0.0f;
  if (e == 0) {
    valid[0] = count, valid[1] = centred;
    *mean_norm = static_cast<float>(centred ? of_gaps : of_all);
    if (!BANK) *doubtful = 0;
  }
}

struct PoolRows {  // written by pool_prepare_kernel; see PoolArgs
  __half *upper, *lower;
  float4* factors;
  PoolRow* rows;  // (POOL_ROWS,)
  double* total;
  int* merged;  // (POOL_ROWS,) blocks of the merge that are done: none
  int64_t parts;

  __device__ PoolRows of_pass(int64_t pass) const {  // see PoolArgs
    PoolRows its = *this;
    its.upper += pass * POOL_ROWS * POOL_D, its.lower += pass * POOL_ROWS * POOL_D;
    its.factors += pass * POOL_ROWS, its.rows += pass * POOL_ROWS;
    its.total += pass * parts * POOL_ROWS, its.merged += pass * POOL_ROWS;
    return its;
  }
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
// block. Block POOL_ROWS: totals of zero. A thread has 8 elements, 16 of them a chain. BANK: grid.y passes.
template <bool BANK>
__global__ void __launch_bounds__(POOL_PREPARE_THREADS)
    pool_prepare_kernel(const Inputs in, const float* centre, const float* mean_of_norms, int64_t first,
                        const PoolRows all_made, const PoolBankIf<BANK> bank) {
  constexpr int EACH = POOL_PREPARE_EACH, WARPS = POOL_PREPARE_THREADS / 32;
  __shared__ double scratch[WARPS][4], of_dot[WARPS][1];
  __shared__ float tops[33];
  allow_next_launch();
  const int slot = blockIdx.x, d = static_cast<int>(in.d), e = EACH * static_cast<int>(threadIdx.x);
  PoolRows made = all_made;
  if constexpr (BANK) {
    first += static_cast<int64_t>(blockIdx.y) * POOL_ROWS;
    made = all_made.of_pass(blockIdx.y);
    if (first >= *bank.sizes) {
      if (blockIdx.y == 0) wait_for_previous_launch();  // see pool_kernel
      return;
    }
  }
  if (slot == POOL_ROWS) {
    wait_for_previous_launch();
    for (int64_t i = threadIdx.x; i < made.parts * POOL_ROWS; i += blockDim.x) made.total[i] = 0;
    if (threadIdx.x < POOL_ROWS) made.merged[threadIdx.x] = 0;
    return;
  }
  int64_t index = -1;
  if constexpr (BANK) {
    if (first + slot < *bank.sizes) index = bank.order[first + slot];
  } else {
    index = pool_row_at(in, first + slot);
  }
  Row row{};
  bool alive = false;
  if (index >= 0) row = make_row(in, index, 0, alive);
  float x[EACH] = {};
  if (alive) pool_read_row(in.x, index * d, e, 1, d, x);
  wait_for_previous_launch();
  double y[EACH], c[EACH];
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    c[k] = centre[e + k];
    y[k] = alive ? row.sign * x[k] - row.alpha * c[k] : 0.0;
  }
  // Of each chain (y.c)^2 and the squares of y_e r_e; the chains' sums once more where they are added up.
  double of_chain = 0, sums[4] = {};
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
  pool_block_sums(sums, scratch);
  const double square = sums[0], with_c = sums[1], chains = sums[3], mean_norm = *mean_of_norms;
  const double products = sums[2] + square * mean_norm / d;
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
    const double rounded = norm_rate * mean_norm - factor * (offset - dot);
    made.rows[slot] = {index,     row.a,    row.b, norm_rate, shift,   logit_error,
                       row.alpha, row.sign, rate,  with_c,    rounded, alive};
  }
}

// What the merge blocks of a row leave for the last of them.
struct PoolSums {
  double out, mean;  // squared norms of a x + b mean and of mean - c, over the block's elements
  double rest;       // of (sign x - alpha mean) / alpha
};

// By how much, beside its size, the output of a row may be off. moment: see PoolArgs, of the mean weight.
// With lse the output is a part's mean, from which any prediction may be made: its error counts beside what
// is smaller, the mean or x / alpha less the mean, and that of lse does too.
__device__ inline double pool_error(const PoolRow& row, const PoolAgain& again, const PoolSums& of,
                                    double moment, double mean_norm, bool with_lse) {
  const double square = moment + mean_norm;  // |r - c|^2 under the weights
  double spread = fmax(square - of.mean, 0.0) + POOL_SPREAD_ERROR * square, out = of.out;  // squared
  if (with_lse) {
    spread += mean_norm / 8;
    if (of.rest < out) out = of.rest;  // not where it is NaN: alpha is 0
  }
  // Five of an error's standard deviations if it is one reference's, little more than one if it is many's.
  const double deviations = 1 + 4 * fmin(1.0, again.largest / sqrt(again.unsure));
  return deviations * again.error * fabs(row.b) * sqrt(spread * again.unsure / out);
}

struct PoolJudged {        // if exact
  const PoolAgain* again;  // (POOL_ROWS,); null: not exact
  const PoolStep* steps;   // (POOL_ROWS, most_steps)
  int most_steps;
  PoolSums* left;      // (POOL_ROWS, blocks of a row)
  int* merged;         // see PoolRows
  uint64_t* doubtful;  // a bit for each row whose output may be off by more than POOL_DOUBT (BANK: its place)
};

// Slot blockIdx.y of out, and of lse, from the parts and what was scored again, for which it waits last.
// Grid: parts of d x rows. Behind pool_again_kernel, which has waited for the parts, or behind these.
template <bool BANK>
__global__ void __launch_bounds__(POOL_MERGE_THREADS)
    pool_merge_kernel(const Inputs in, const PoolArgs all_args, const PoolRow* rows, int parts,
                      const PoolJudged judged, int clusters, const PoolBankIf<BANK> bank) {
  __shared__ double keeps[POOL_MOST_PARTS], scratch[33];
  __shared__ PoolStep staged[POOL_STAGED];
  __shared__ float tops[33];
  __shared__ bool last;
  const int slot = blockIdx.y, e = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const PoolPass<BANK> pass(all_args, bank, slot, clusters);
  if (pass.is_empty) {
    if (slot == 0) wait_for_previous_launch();  // see pool_kernel
    return;
  }
  if (!judged.again) wait_for_previous_launch();
  const __half* const refs = static_cast<const __half*>(in.refs.data);
  const PoolArgs& args = pass.args;
  float top = POOL_NO_BEST;
  for (int p = threadIdx.x; p < parts; p += blockDim.x)
    if (args.total[p * POOL_ROWS + pass.row] != 0) top = fmaxf(top, args.best[p * POOL_ROWS + pass.row]);
  const float most = block_max<float>(top, tops);
  double share = 0, with_norm = 0;
  for (int p = threadIdx.x; p < parts; p += blockDim.x) {
    const double part = args.total[p * POOL_ROWS + pass.row];  // 0: written by nobody
    keeps[p] = part == 0 ? 0.0 : exp2(static_cast<double>(args.best[p * POOL_ROWS + pass.row]) - most);
    if (keeps[p] == 0) continue;
    share += keeps[p] * part;
    with_norm += keeps[p] * args.moment[p * POOL_ROWS + pass.row];
  }
  const double before = block_sum<double>(share, scratch), moment = block_sum<double>(with_norm, scratch);
  double total = before, sum = 0, above = 0;
  if (e < in.d) {
#pragma unroll 8
    for (int p = 0; p < parts; ++p) {
      const int64_t at = (static_cast<int64_t>(p) * POOL_ROWS + pass.row) * in.d + e;
      if (keeps[p] != 0) sum += keeps[p] * args.sums[at];
    }
  }
  PoolAgain again{};
  if (judged.again) {
    wait_for_previous_launch();
    again = judged.again[slot];
  }
  const PoolStep* const steps = judged.steps + static_cast<int64_t>(slot) * judged.most_steps;
  if (again.alone) {
    total = sum = 0, above = -INFINITY;
    for (int i = 0; i < again.count; ++i) above = fmax(above, steps[i].weight);
  }
  for (int from = 0; from < again.count; from += POOL_STAGED) {
    const int count = min(again.count - from, POOL_STAGED);
    __syncthreads();
    if (threadIdx.x < count) {
      PoolStep step = steps[from + threadIdx.x];
      if (again.alone) step.weight = POOL_WEIGHT_SCALE * exp2(step.weight - above);
      staged[threadIdx.x] = step;
    }
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
    const double lse =
        LOG_2 * (most + above - row.norm_rate * *args.mean_norm) + log(total / POOL_WEIGHT_SCALE);
    store_as(in.lse, row.index, good ? lse + row.shift : NAN);
  }
  if (!judged.again) return;
  of_out = block_sum<double>(of_out, scratch), of_mean = block_sum<double>(of_mean, scratch);
  of_rest = block_sum<double>(of_rest, scratch);
  PoolSums* const left = judged.left + slot * gridDim.x;
  if (threadIdx.x == 0) {
    left[blockIdx.x] = {of_out, of_mean, of_rest};
    last = add_arrival(judged.merged + slot) == static_cast<int>(gridDim.x) - 1;
  }
  __syncthreads();
  if (!last || threadIdx.x >= 32) return;
  const PoolSums of = threadIdx.x < gridDim.x ? left[threadIdx.x] : PoolSums{};
  const PoolSums all = {warp_sum(of.out), warp_sum(of.mean), warp_sum(of.rest)};
  const bool doubt = pool_error(row, again, all, moment / before, *args.mean_norm, in.lse.data) > POOL_DOUBT;
  if (threadIdx.x == 0 && row.alive && doubt) {
    unsigned long long* const words = reinterpret_cast<unsigned long long*>(judged.doubtful);
    if constexpr (BANK) {
      const int place = bank.first + slot;
      atomicOr(words + place / 64, 1ull << place % 64);
    } else {
      atomicOr(words, 1ull << row.index);
    }
  }
}

}  // namespace svel::cuda
