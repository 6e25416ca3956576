// The steps of many_rows.cuh around its matrix products: centre, rows, selection, weights, single references,
// merging. Bytes per round: scores written once and read twice at 4 bytes a pair, maxima at 1/16 of that; a
// listed reference is read twice, mostly from the L2 the second time.
#include <cfloat>

#include "stable_target/many_rows.cuh"

namespace svel::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int WEIGHT_THREADS = 512;
constexpr int CENTRE_LANES = 8;           // threads per element of D
constexpr float WEIGHT_SCALE = 32768.0f;  // weights are at most 1; as halves they keep 40 binary places
// References that together weigh less than this times the largest are left out.
constexpr double FORGOTTEN_LOG2_EXACT = 26, FORGOTTEN_LOG2_FAST = 16;
enum Statistic {
  SHIFT,
  SPREAD,
  LEFT_OUT,
  NORM_PLAIN,
  NORM_STRICT,
  NORM_ALL,
  MAX_PLAIN,
  MAX_CENTRED,
  STATISTICS
};

// c with four binary digits, so that differences of it and halves near it are exact; zero where it is too
// small or large for halves.
__device__ float coarse(double mean) {
  const float c = __uint_as_float((__float_as_uint(static_cast<float>(mean)) + 0x00080000u) & 0xfff00000u);
  return fabsf(c) >= 1.0f / 8192 && fabsf(c) <= 4096.0f ? c : 0.0f;
}

// Mean and variance of a sample of the references, per element; what follows from either choice of c, per
// tile. many.centre: first c = coarse mean wherever the mean is many deviations from zero, then c everywhere.
__global__ void __launch_bounds__(MANY_TILE* CENTRE_LANES) centre_kernel(const Inputs in, const Many many) {
  __shared__ double sums[CENTRE_LANES][MANY_TILE], squares[CENTRE_LANES][MANY_TILE];
  __shared__ float lowest[CENTRE_LANES][MANY_TILE], highest[CENTRE_LANES][MANY_TILE];
  __shared__ double of_warps[STATISTICS][MANY_TILE / 32];
  const int column = threadIdx.x % MANY_TILE, part = threadIdx.x / MANY_TILE;
  const int64_t e = static_cast<int64_t>(blockIdx.x) * MANY_TILE + column;
  const int64_t valid = valid_count(in, 0), samples = valid < MANY_SAMPLES ? valid : MANY_SAMPLES;
  double sum = 0, square = 0;
  float low = INFINITY, high = -INFINITY;
  float seen[MANY_SAMPLES / CENTRE_LANES];  // all are loaded before the first is looked at
#pragma unroll
  for (int i = 0; i < MANY_SAMPLES / CENTRE_LANES; ++i) {
    const int64_t s = part + i * CENTRE_LANES;
    seen[i] = e < in.d && s < samples ? load_as<float>(in.refs, valid * s / samples * in.d + e) : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < MANY_SAMPLES / CENTRE_LANES; ++i) {
    const float v = seen[i];
    if (e >= in.d || part + i * CENTRE_LANES >= samples) continue;
    sum += v, square += static_cast<double>(v) * v;
    low = fminf(low, v), high = fmaxf(high, v);
  }
  sums[part][column] = sum, squares[part][column] = square;
  lowest[part][column] = low, highest[part][column] = high;
  __syncthreads();
  double own[STATISTICS] = {};
  if (part == 0) {
    for (int other = 1; other < CENTRE_LANES; ++other) {
      sum += sums[other][column], square += squares[other][column];
      low = fminf(low, lowest[other][column]), high = fmaxf(high, highest[other][column]);
    }
    float all = 0, strict = 0;
    if (e < in.d && samples > 0) {
      const double mean = sum / samples, variance = fmax(square / samples - mean * mean, 0.0);
      all = coarse(mean);
      strict = mean * mean >= 64 * variance ? all : 0.0f;
      own[SHIFT] = mean * mean, own[SPREAD] = variance;
      own[LEFT_OUT] = strict == 0 ? mean * mean : 0;
      own[NORM_PLAIN] = square / samples;
      own[NORM_STRICT] = variance + (mean - strict) * (mean - strict);
      own[NORM_ALL] = variance + (mean - all) * (mean - all);
      own[MAX_PLAIN] = fmax(fabs(low), fabs(high));
      own[MAX_CENTRED] = fmax(own[MAX_PLAIN], fmax(fabs(low - all), fabs(high - all)));
    }
    many.centre[e] = strict;
    many.centre[many.d_stride + e] = all;
  }
  const auto joined = [](int k, double a, double b) { return k < MAX_PLAIN ? a + b : fmax(a, b); };
  if (part == 0) {
#pragma unroll
    for (int k = 0; k < STATISTICS; ++k) {
      double value = own[k];
      for (int offset = 16; offset > 0; offset /= 2)
        value = joined(k, value, __shfl_xor_sync(0xffffffffu, value, offset));
      if (column % 32 == 0) of_warps[k][column / 32] = value;
    }
  }
  __syncthreads();
  const int k = threadIdx.x;
  if (k >= STATISTICS) return;
  double value = of_warps[k][0];
  for (int warp = 1; warp < MANY_TILE / 32; ++warp) value = joined(k, value, of_warps[k][warp]);
  many.statistics[blockIdx.x * STATISTICS + k] = value;
}

struct Choice {  // of the centre
  int which;     // 0 none, 1 strict, 2 all
  float scale, mean_norm;
};

// No centre while the common part of the references is no larger than what they differ by; one that leaves
// out elements of small mean where that leaves out little, because it is exact nearly everywhere; else all of
// it.
__device__ Choice choose_centre(const Inputs& in, const double (&statistics)[STATISTICS]) {
  Choice choice;
  choice.which = statistics[SHIFT] <= 6 * statistics[SPREAD]      ? 0
                 : statistics[LEFT_OUT] <= 6 * statistics[SPREAD] ? 1
                                                                  : 2;
  choice.scale = 1;
  if (in.refs.dtype == Dtype::bf16) {  // the largest difference to 2 .. 4
    const double largest = statistics[choice.which ? MAX_CENTRED : MAX_PLAIN];
    if (largest > 0 && isfinite(largest))
      choice.scale = static_cast<float>(ldexp(1.0, 1 - max(-60, min(60, ilogb(largest)))));
  }
  choice.mean_norm = static_cast<float>(statistics[NORM_PLAIN + choice.which] * choice.scale * choice.scale);
  return choice;
}

__device__ bool has_tiles(const WorkList& work, int64_t i) {
  return work.first_tile[i] != work.first_tile[i + 1];
}

// One block per row of the pass: its slot, y in two halves, |y|^2, the part of its source.
__global__ void __launch_bounds__(THREADS) rows_kernel(const Inputs in, const Many many) {
  __shared__ double statistics[STATISTICS];
  __shared__ double scratch[33];
  __shared__ int int_scratch[33];
  const int tid = threadIdx.x;
  static_assert(THREADS / 32 == STATISTICS, "a warp to each");
  {
    const int k = tid / 32;
    const auto joined = [k](double a, double b) { return k < MAX_PLAIN ? a + b : fmax(a, b); };
    double value = 0;
    for (int64_t tile = tid % 32; tile < many.d_stride / MANY_TILE; tile += 32)
      value = joined(value, many.statistics[tile * STATISTICS + k]);
    for (int offset = 16; offset > 0; offset /= 2)
      value = joined(value, __shfl_xor_sync(0xffffffffu, value, offset));
    if (tid % 32 == 0) statistics[k] = value;
  }
  __syncthreads();
  const Choice choice = choose_centre(in, statistics);
  const float* const candidate = many.centre + (choice.which == 2 ? many.d_stride : 0);
  const auto centre = [&](int64_t e) { return choice.which ? candidate[e] : 0.0f; };
  if (blockIdx.x == 0 && many.first_row == 0) {
    for (int64_t e = tid; e < many.d_stride; e += THREADS) {
      many.centre_float[e] = centre(e) * choice.scale;
      many.centre_half[e] = __float2half(centre(e));
    }
    if (tid == 0) {
      many.facts->scale = choice.scale;
      many.facts->inverse_scale = 1.0f / choice.scale;
      many.facts->mean_norm = choice.mean_norm;
      many.facts->centred = choice.which != 0;
      many.facts->max_norm = 0;
    }
  }
  if (blockIdx.x == 0 && tid == 0) many.facts->dense = 0;

  const int64_t local = blockIdx.x;
  int64_t at = local;
  if (local >= many.rows) {
    for (int64_t e = tid; e < many.d_stride; e += THREADS)
      many.hi[at * many.d_stride + e] = many.lo[at * many.d_stride + e] = __float2half(0.0f);
    if (tid == 0) many.slots[at] = ManySlot{}, many.factors[at] = {0, 0, 0};
    return;
  }
  const int64_t i = many.first_row + local;
  const Row row = many.work.rows[i];
  const auto rate_of = [&](int64_t j) {
    return has_tiles(many.work, j) ? many.work.rows[j].rate() : INFINITY;
  };
  const double rate = rate_of(i);
  int before = 0;
  for (int64_t j = tid; j < many.rows; j += THREADS) {
    const double other = rate_of(many.first_row + j);
    before += other < rate || (other == rate && j < local);
  }
  at = block_sum<int>(before, int_scratch);

  const int64_t base = row.index * in.d;
  const auto y_of = [&](int64_t e) {
    return row.sign * load_as<double>(in.x, base + e) - row.alpha * centre(e);
  };
  bool alive = has_tiles(many.work, i);
  double square = 0, largest = 0, score = 0;
  if (alive) {
    for (int64_t e = tid; e < in.d; e += THREADS) {
      const double y = y_of(e);
      square = fma(y, y, square);
      largest = fmax(largest, fabs(y));
      if (in.source.data) {
        const double own = load_as<double>(in.source, base + e) - centre(e);
        many.sums[at * many.d_stride + e] = static_cast<float>(own * choice.scale);
        score += (y - 0.5 * row.alpha * own) * own;
      } else {
        many.sums[at * many.d_stride + e] = 0;
      }
    }
  }
  square = block_sum(square, scratch);
  largest = block_max(largest, scratch);
  score = block_sum(score, scratch);
  alive = alive && isfinite(square) && isfinite(score);
  int exponent = 0;
  if (alive && largest > 0) frexp(largest, &exponent), exponent = max(-100, min(100, 14 - exponent));
  double rest_square = 0, rest_centre = 0;
  const double power = ldexp(1.0, exponent);
  for (int64_t e = tid; e < many.d_stride; e += THREADS) {
    const double y = alive && e < in.d ? y_of(e) * power : 0.0;
    const __half hi = __float2half(static_cast<float>(y));
    const float rest = static_cast<float>(y - static_cast<double>(__half2float(hi)));
    rest_square += static_cast<double>(rest) * rest;
    many.hi[at * many.d_stride + e] = hi;
    const __half lo = __float2half(rest);
    many.lo[at * many.d_stride + e] = lo;
    rest_centre += static_cast<double>(__half2float(lo)) * centre(e);
  }
  rest_square = block_sum(rest_square, scratch);
  rest_centre = block_sum(rest_centre, scratch);
  if (tid != 0) return;
  const double inverse = 1.0 / choice.scale;
  // Sums: at most 64 truncated products, then float32 sums of one per 64 elements. Not exact: one truncated
  // sum of 16 products at a time.
  const double rounding = (80 + in.d / (many.exact ? 64 : 16)) * ldexp(1.0, -23);
  ManySlot slot{};
  slot.row = i;
  slot.alive = alive;
  slot.y_square = square;
  slot.best = -INFINITY;
  if (alive) {
    slot.own =
        static_cast<float>(1.001 * (sqrt(ldexp(rest_square, -2 * exponent)) + rounding * sqrt(square)));
    slot.rate2 = static_cast<float>(fmin(row.rate() * LOG2_E, 1e30));
    if (in.source.data) {
      slot.best = score + 0.5 * row.alpha * choice.mean_norm * inverse * inverse;
      slot.total = 1;
    }
    many.factors[at] = {static_cast<float>(ldexp(inverse, -exponent)),
                        static_cast<float>(0.5 * row.alpha * inverse * inverse),
                        static_cast<float>(ldexp(rest_centre, -exponent))};
  } else {
    many.factors[at] = {0, 0, 0};
  }
  many.slots[at] = slot;
}

// Exclusive prefix of v over the block; total: their sum. scratch: THREADS / 32 + 1 values.
__device__ int block_prefix(int v, int* scratch, int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = v;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, sum, offset);
    if (lane >= offset) sum += other;
  }
  __syncthreads();
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  int before = 0;
  total = 0;
  for (int w = 0; w < THREADS / 32; ++w) {
    if (w < warp) before += scratch[w];
    total += scratch[w];
  }
  return before + sum - v;
}

__device__ float row_maximum(const Many& many, int64_t at, int64_t groups, float* scratch) {
  const float* const maxima = many.maxima + at * (many.score_stride / MANY_GROUP);
  float best = -INFINITY;
  for (int64_t k = threadIdx.x; k < groups; k += blockDim.x) best = fmaxf(best, maxima[k]);
  return block_max(best, scratch);
}

// One block per slot: lists the references whose weight can matter, or gives up at more than MANY_SURVIVORS.
__global__ void __launch_bounds__(THREADS) select_kernel(const Inputs in, const Many many) {
  __shared__ float scratch[33];
  __shared__ int int_scratch[33];
  const int64_t at = blockIdx.x, valid = many_valid(in, many);
  ManySlot& slot = many.slots[at];
  const bool alive = slot.alive;
  const int64_t groups = (valid + MANY_GROUP - 1) / MANY_GROUP;
  const float best = row_maximum(many, at, groups, scratch);
  if (!alive || valid == 0 || best == INFINITY) {
    __syncthreads();
    if (threadIdx.x == 0) {
      slot.count = 0;
      if (best == INFINITY) slot.alive = 0;
    }
    return;
  }
  const Row& row = many.work.rows[slot.row];
  const double norm = static_cast<double>(__int_as_float(many.facts->max_norm)) * many.facts->inverse_scale *
                      many.facts->inverse_scale;
  const double bound = slot.own * sqrt(norm) + row.alpha * norm * ldexp(1.0, -21);
  const double forgotten = (many.exact ? FORGOTTEN_LOG2_EXACT : FORGOTTEN_LOG2_FAST) / LOG2_E +
                           log(static_cast<double>(valid_count(in, 0)));
  const double top = fmax(static_cast<double>(best), slot.best);
  const float cut = fmaxf(static_cast<float>(top - 2 * bound - forgotten / row.rate()), -FLT_MAX);
  const float* const maxima = many.maxima + at * (many.score_stride / MANY_GROUP);
  const float* const scores = many.scores + at * many.score_stride;
  // Groups of references one of which matters; more of them than the list holds: it would be too short.
  int candidates = 0;
  for (int64_t k = threadIdx.x; k < groups; k += THREADS) candidates += maxima[k] >= cut;
  const int all = block_sum<int>(candidates, int_scratch);
  int found = all;
  if (all <= MANY_SURVIVORS) {
    const auto matters = [&](int64_t k) {
      unsigned bits = 0;
      if (maxima[k] < cut) return bits;
      const float4* const from = reinterpret_cast<const float4*>(scores + k * MANY_GROUP);
#pragma unroll
      for (int q = 0; q < MANY_GROUP / 4; ++q) {
        const float4 v = from[q];
        const float four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) bits |= static_cast<unsigned>(four[i] >= cut) << (4 * q + i);
      }
      return bits;
    };
    int own = 0;
    if (candidates)
      for (int64_t k = threadIdx.x; k < groups; k += THREADS) own += __popc(matters(k));
    int place = block_prefix(own, int_scratch, found);
    if (own)
      for (int64_t k = threadIdx.x; k < groups; k += THREADS)
        for (unsigned bits = matters(k); bits && place < MANY_SURVIVORS; bits &= bits - 1)
          many.survivors[at * MANY_SURVIVORS + place++] = static_cast<int>(k * MANY_GROUP + __ffs(bits) - 1);
  }
  if (threadIdx.x != 0) return;
  slot.count = found;
  if (found > MANY_SURVIVORS) atomicMax(&many.facts->dense, static_cast<int>(at) + 1);
}

// One block per dense slot. exact: of 32 scores s_j, 128 bytes, become 32 weights' upper halves and 32 lower.
// Else the upper halves alone, side by side from the start of the row.
__global__ void __launch_bounds__(WEIGHT_THREADS) weights_kernel(const Inputs in, const Many many) {
  __shared__ float scratch[33];
  __shared__ double wide_scratch[33];
  const int64_t at = blockIdx.x, valid = many_valid(in, many);
  if (at >= many.facts->dense) return;
  ManySlot& slot = many.slots[at];
  const float here = row_maximum(many, at, (valid + MANY_GROUP - 1) / MANY_GROUP, scratch);
  const float best = static_cast<float>(fmax(static_cast<double>(here), slot.best));
  const float rate2 = slot.rate2;
  float* const row = many.scores + at * many.score_stride;
  double total = 0;
  const int64_t end = static_cast<int64_t>(many_sum_steps(many, valid)) * many_sum_refs(many.exact);
  float4 low{}, high{};  // of the references from j on
  const auto load = [&](int64_t j) {
    if (j >= valid) return;
    low = *reinterpret_cast<const float4*>(row + j), high = *reinterpret_cast<const float4*>(row + j + 4);
  };
  load(8 * threadIdx.x);
  for (int64_t j0 = 0; j0 < end; j0 += 8 * WEIGHT_THREADS) {
    const int64_t j = j0 + 8 * threadIdx.x;
    __align__(16) __half upper[8] = {}, lower[8] = {};
    const float scores[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    load(j + 8 * WEIGHT_THREADS);
    if (j < valid) {
      float sum = 0;
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const float p = scores[k] == -INFINITY ? 0.0f : exp2f((scores[k] - best) * rate2);
        const float scaled = p * WEIGHT_SCALE;
        sum += p;
        upper[k] = __float2half(scaled);
        lower[k] = __float2half(scaled - __half2float(upper[k]));
      }
      total += sum;
    }
    // What is written now was read by other threads; by those of this warp if exact.
    if (many.exact) {
      __syncwarp();
    } else {
      __syncthreads();
    }
    if (j >= end) continue;
    float* const to = many.exact ? row + j / 32 * 32 + j % 32 / 2 : row + j / 2;
    *reinterpret_cast<float4*>(to) = *reinterpret_cast<float4*>(upper);
    if (many.exact) *reinterpret_cast<float4*>(to + 16) = *reinterpret_cast<float4*>(lower);
  }
  total = block_sum(total, wide_scratch);
  if (threadIdx.x != 0) return;
  const double keep = slot.best == -INFINITY
                          ? 0.0
                          : exp2(static_cast<double>(rate2) * (slot.best - static_cast<double>(best)));
  slot.keep = static_cast<float>(keep);
  slot.total = slot.total * keep + total;
  slot.best = best;
}

struct Listed {
  double score[MANY_SURVIVORS];
  float weight[MANY_SURVIVORS];
  int64_t reference[MANY_SURVIVORS];
  double scratch[33];
  double keep, total, best;
};

// Eight differences r - c, times the scale.
template <typename T>
__device__ void load_differences(const Inputs& in, const Many& many, int64_t reference, int64_t e,
                                 float scale, float (&d)[8]) {
  const uint4 raw =
      *reinterpret_cast<const uint4*>(static_cast<const T*>(in.refs.data) + reference * in.d + e);
  const T* const values = reinterpret_cast<const T*>(&raw);
  const float4* const centre = reinterpret_cast<const float4*>(many.centre_float + e);
  const float4 low = centre[0], high = centre[1];
  const float c[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int k = 0; k < 8; ++k) d[k] = fmaf(to_float(values[k]), scale, -c[k]);
}

// Scores and weights of a row's listed references; updates best and total.
template <typename T>
__device__ void score_listed(const Inputs& in, const Many& many, int64_t at, int count, Listed& listed) {
  const ManySlot& slot = many.slots[at];
  const ManyFactor factor = many.factors[at];
  const float scale = many.facts->scale;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int k = warp; k < count; k += THREADS / 32) {
    const int64_t reference = many.first_ref + many.survivors[at * MANY_SURVIVORS + k];
    double score = 0;
    for (int64_t e = 8 * lane; e < in.d; e += 8 * 32) {
      float d[8];
      load_differences<T>(in, many, reference, e, scale, d);
      const uint4 raw_hi = *reinterpret_cast<const uint4*>(many.hi + at * many.d_stride + e);
      const uint4 raw_lo = *reinterpret_cast<const uint4*>(many.lo + at * many.d_stride + e);
      const __half* const hi = reinterpret_cast<const __half*>(&raw_hi);
      const __half* const lo = reinterpret_cast<const __half*>(&raw_lo);
      float part = 0;
#pragma unroll
      for (int q = 0; q < 8; ++q) {
        const float y = (__half2float(hi[q]) + __half2float(lo[q])) * factor.unit;
        part = fmaf(fmaf(-factor.half_alpha, d[q], y), d[q], part);
      }
      score += part;
    }
    for (int offset = 16; offset > 0; offset /= 2) score += __shfl_xor_sync(0xffffffffu, score, offset);
    if (lane == 0) {
      listed.score[k] = score + static_cast<double>(factor.half_alpha) * many.facts->mean_norm;
      listed.reference[k] = reference;
    }
  }
  __syncthreads();
  double best = slot.best;
  for (int k = threadIdx.x; k < count; k += THREADS) best = fmax(best, listed.score[k]);
  best = block_max(best, listed.scratch);
  const double rate2 = slot.rate2;
  double total = 0;
  for (int k = threadIdx.x; k < count; k += THREADS) {
    const double p = exp2(rate2 * (listed.score[k] - best));
    listed.weight[k] = static_cast<float>(p);
    total += p;
  }
  total = block_sum(total, listed.scratch);
  if (threadIdx.x == 0) {
    listed.keep = slot.best == -INFINITY ? 0.0 : exp2(rate2 * (slot.best - best));
    listed.total = slot.total * listed.keep + total;
    listed.best = best;
  }
  __syncthreads();
}

// One block per slot: the sums after this round, or the output after the last.
template <typename T>
__global__ void __launch_bounds__(THREADS) merge_kernel(const Inputs in, const Many many, bool last) {
  __shared__ Listed listed;
  const int64_t at = blockIdx.x, valid = many_valid(in, many);
  ManySlot& slot = many.slots[at];
  const int64_t d_tiles = many.d_stride / MANY_TILE;
  const int dense = many.facts->dense, count = slot.count;
  const bool alive = slot.alive, is_dense = at < dense && valid > 0;
  const float scale = many.facts->scale;
  double keep = slot.keep, total = slot.total, best = slot.best;
  if (!is_dense) {
    keep = 1;
    if (alive && count > 0) {
      score_listed<T>(in, many, at, count, listed);
      keep = listed.keep, total = listed.total, best = listed.best;
    }
  }
  const int64_t row_tiles = (dense + MANY_ROWS - 1) / MANY_ROWS;
  const int splits = is_dense ? many_sum_splits(many, static_cast<int>(row_tiles), static_cast<int>(d_tiles),
                                                many_sum_steps(many, valid))
                              : 0;
  const Row& row = many.work.rows[slot.row];
  const double inverse = isfinite(best) && alive && total > 0 ? many.facts->inverse_scale / total : NAN;
  const double centre_scale = many.facts->inverse_scale;

  for (int64_t e = 8 * threadIdx.x; e < in.d; e += 8 * THREADS) {
    float* const sums = many.sums + at * many.d_stride + e;
    double sum[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) sum[k] = keep * sums[k];
    if (is_dense) {
      const int64_t tile = at / MANY_ROWS * d_tiles + e / MANY_TILE;
      const float* const from =
          many.partial + (tile * MANY_ROWS + at % MANY_ROWS) * MANY_TILE + e % MANY_TILE;
      double parts[8] = {};
#pragma unroll 4
      for (int split = 0; split < splits; ++split) {
        const float4* const eight =
            reinterpret_cast<const float4*>(from + split * row_tiles * d_tiles * (MANY_ROWS * MANY_TILE));
        const float4 low = eight[0], high = eight[1];
        parts[0] += low.x, parts[1] += low.y, parts[2] += low.z, parts[3] += low.w;
        parts[4] += high.x, parts[5] += high.y, parts[6] += high.z, parts[7] += high.w;
      }
#pragma unroll
      for (int k = 0; k < 8; ++k) sum[k] += parts[k] / WEIGHT_SCALE;
    } else if (alive) {
      for (int first = 0; first < count; first += 16) {
        float part[8] = {};
        for (int j = first; j < count && j < first + 16; ++j) {
          const float p = listed.weight[j];
          if (p == 0) continue;
          float d[8];
          load_differences<T>(in, many, listed.reference[j], e, scale, d);
#pragma unroll
          for (int k = 0; k < 8; ++k) part[k] = fmaf(p, d[k], part[k]);
        }
#pragma unroll
        for (int k = 0; k < 8; ++k) sum[k] += part[k];
      }
    }
    if (!last) {
#pragma unroll
      for (int k = 0; k < 8; ++k) sums[k] = static_cast<float>(sum[k]);
      continue;
    }
    double out[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const double mean = many.centre_float[e + k] * centre_scale + sum[k] * inverse;
      out[k] = row.a * load_as<double>(in.x, row.index * in.d + e + k) + row.b * mean;
    }
    store8<double>(in.out, row.index * in.d + e, out);
  }
  __syncthreads();  // all have read the slot
  if (threadIdx.x != 0) return;
  if (!last) {
    slot.total = total, slot.best = best;
  } else if (in.lse.data) {
    const double half_norm = 0.5 * row.alpha * many.facts->mean_norm * centre_scale * centre_scale;
    const double shift = row.rate() * (best - half_norm) - slot.y_square / (2 * row.sigma * row.sigma);
    const double lse = isfinite(inverse) ? log(total) + shift + 0.5 * static_cast<double>(in.d) : NAN;
    store_as(in.lse, row.index, lse);
  }
}

__global__ void reset_kernel(ManyFacts* facts) {
  facts->dense = 0;
}

// Rows from `first` on, at most `rows` of them.
Inputs slice_rows(const Inputs& in, int64_t first, int64_t rows) {
  const auto from = [first](Array a, int64_t width) {
    if (a.data) a.data = static_cast<char*>(a.data) + first * width * size_of(a.dtype);
    return a;
  };
  Inputs part = in;
  part.n = std::min(rows, in.n - first);
  part.x = from(in.x, in.d), part.source = from(in.source, in.d), part.out = from(in.out, in.d);
  part.time_or_alpha = from(in.time_or_alpha, 1), part.sigma = from(in.sigma, 1), part.lse = from(in.lse, 1);
  return part;
}

void run_list(const char* op, const Inputs& in, const Plan& plan, Many many, void* list,
              cudaStream_t stream) {
  many.work = build_work_list(in, MANY_TILE, list, stream);
  check_launch(op);
  const auto merge = in.refs.dtype == Dtype::f16 ? merge_kernel<__half> : merge_kernel<__nv_bfloat16>;
  for (many.first_row = 0; many.first_row < in.n; many.first_row += plan.rows_per_pass) {
    many.rows = std::min(plan.rows_per_pass, in.n - many.first_row);
    many.padded = (many.rows + 63) / 64 * 64;
    const unsigned slots = static_cast<unsigned>(many.rows);
    rows_kernel<<<static_cast<unsigned>(many.padded), THREADS, 0, stream>>>(in, many);
    check_launch(op);
    for (many.first_ref = 0; many.first_ref < in.m; many.first_ref += plan.refs_per_pass) {
      many.refs = std::min(plan.refs_per_pass, in.m - many.first_ref);
      if (many.first_ref > 0) {
        reset_kernel<<<1, 1, 0, stream>>>(many.facts);
        check_launch(op);
      }
      launch_many_score(op, in, many, false, stream);
      select_kernel<<<slots, THREADS, 0, stream>>>(in, many);
      check_launch(op);
      if (many.exact) launch_many_score(op, in, many, true, stream);
      weights_kernel<<<slots, WEIGHT_THREADS, 0, stream>>>(in, many);
      check_launch(op);
      launch_many_sum(op, in, many, stream);
      merge<<<slots, THREADS, 0, stream>>>(in, many, many.first_ref + plan.refs_per_pass >= in.m);
      check_launch(op);
    }
  }
}

}  // namespace

void run_many_rows(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream) {
  const ManyLayout layout = many_layout(in.n, in.d, plan.rows_per_pass, plan.refs_per_pass);
  char* next = static_cast<char*>(workspace);
  const auto take = [&](int64_t bytes) {
    char* const piece = next;
    next += bytes;
    return piece;
  };
  Many many{};
  void* const list = take(layout.list);
  many.d_stride = (in.d + MANY_TILE - 1) / MANY_TILE * MANY_TILE;
  const int64_t d_tiles = many.d_stride / MANY_TILE;
  Carver centre(take(layout.centre));
  many.facts = centre.take<ManyFacts>(1);
  many.centre_half = centre.take<__half>(many.d_stride);
  many.centre_float = centre.take<float>(many.d_stride);
  many.centre = centre.take<float>(2 * many.d_stride);
  many.statistics = centre.take<double>(d_tiles * STATISTICS);
  Carver rows(take(layout.rows));
  many.factors = rows.take<ManyFactor>(plan.rows_per_pass);
  many.slots = rows.take<ManySlot>(plan.rows_per_pass);
  many.hi = reinterpret_cast<__half*>(take(layout.queries));
  many.lo = many.hi + plan.rows_per_pass * many.d_stride;
  many.scores = reinterpret_cast<float*>(take(layout.scores));
  many.maxima = reinterpret_cast<float*>(take(layout.maxima));
  many.survivors = reinterpret_cast<int*>(take(layout.survivors));
  many.sums = reinterpret_cast<float*>(take(layout.sums));
  many.partial = reinterpret_cast<float*>(take(layout.partial));
  many.score_stride = plan.refs_per_pass;
  many.blocks = static_cast<int>(plan.blocks);
  many.exact = !plan.fast;

  centre_kernel<<<static_cast<unsigned>(d_tiles), MANY_TILE * CENTRE_LANES, 0, stream>>>(in, many);
  check_launch(op);
  for (int64_t first = 0; first < in.n; first += MANY_LIST_ROWS)
    run_list(op, slice_rows(in, first, MANY_LIST_ROWS), plan, many, list, stream);
}

}  // namespace svel::cuda
