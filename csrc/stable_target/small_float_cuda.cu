// One shared pool and 9 <= D <= 16: a thread holds up to 4 rows, and a reference is read from shared memory
// once for both the scores and the sums of all of them. The references of a round are cut into plan.splits
// parts of at most about a thousand, merged in float64. Within a part float32 sums of a few dozen references
// join others in shared memory: where the answer is a small difference, as the velocity of Gaussian data at
// t = 0.5, longer sums lose what the contract asks for.
//
// A warp scores its rows in one of two ways. As products, score = y.d - half |d|^2: 2 D + 2 float32
// operations per pair and one exponential, which is what bounds the kernel; bytes hardly matter. Where these
// terms are large, at small t, their difference would lose its digits, and squared differences are summed: D
// more.
#include "stable_target/launch.cuh"
#include "stable_target/scan.cuh"

namespace svel::cuda {
namespace {

constexpr int THREADS = 128;
constexpr int TILE = 128;     // references in shared memory, one per thread
constexpr int SUM_REFS = 64;  // references of a float32 sum in registers
constexpr float SLACK = 32;   // weights may reach 2^32 before the base of the exponents is raised
constexpr double LIMIT = 40;  // of the terms of a score as products: their errors are about 2^-24 of them

struct Round {  // rows [first_row, first_row + rows) against references [first_ref, end_ref)
  int64_t first_row, rows;
  int64_t first_ref, end_ref, split_refs;
  int splits;
  float* parts;   // (splits, D + 2, rows): sum of p (r - c), sum of p, logarithm of their unit to base 2;
                  // log2 p is -|x - alpha r|^2 / (2 sigma^2 ln 2)
  double* state;  // (3, d, rows): the same of all earlier rounds, once for each element
};

__device__ inline float exp2_approx(float v) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
  return out;
}

// Mean c of up to THREADS references spread over all, the same in every block: D is small enough to find it
// again. Returns the largest |r - c|^2 of them.
template <int D>
__device__ inline float find_centre(const Inputs& in, float* centre) {
  constexpr int WARPS = THREADS / 32;
  __shared__ float of_warps[WARPS][D + 1];
  const int64_t valid = valid_count(in, 0);
  const int count = static_cast<int>(valid < THREADS ? valid : THREADS), i = threadIdx.x;
  const int64_t at = i < count ? i * (valid / count) * in.d : 0;
  float v[D];
#pragma unroll
  for (int e = 0; e < D; ++e) v[e] = i < count && e < in.d ? load_as<float>(in.refs, at + e) : 0.0f;
#pragma unroll
  for (int e = 0; e < D; ++e) {
    float all = v[e];
    for (int step = 16; step > 0; step /= 2) all += __shfl_xor_sync(0xffffffffu, all, step);
    if (i % 32 == 0) of_warps[i / 32][e] = all;
  }
  __syncthreads();
  if (i < D) {
    float all = 0;
    for (int w = 0; w < WARPS; ++w) all += of_warps[w][i];
    centre[i] = count ? all / count : 0.0f;
  }
  __syncthreads();
  float largest = 0;
#pragma unroll
  for (int e = 0; e < D; ++e) largest += (v[e] - centre[e]) * (v[e] - centre[e]);
  if (i >= count) largest = 0;
  for (int step = 16; step > 0; step /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  if (i % 32 == 0) of_warps[i / 32][D] = largest;
  __syncthreads();
  for (int w = 0; w < WARPS; ++w) largest = fmaxf(largest, of_warps[w][D]);
  // Few digits, lest c's last ones turn r - c the same way for most r: where the mean is small, that shows.
  const float coarse = 4096 * sqrtf(largest);
  if (i < D) centre[i] = (centre[i] + coarse) - coarse;
  __syncthreads();
  return largest;
}

// log2 p is -unit |x - alpha r|^2.
__device__ inline double unit(const Row& row) {
  return LOG2_E / (2 * row.sigma * row.sigma);
}

// sign x - alpha c at element e.
__device__ inline double centred(const Inputs& in, const Row& row, const float* centre, int64_t e) {
  return row.sign * load_as<double>(in.x, row.index * in.d + e) - row.alpha * centre[e];
}

// The rows of a thread, d = r - c. As products, log2 p = base + y.d + half |d|^2; as differences, base +
// half |y - alpha d|^2.
template <int D, int ROWS>
struct Held {
  static constexpr int PITCH = (D + 1 + 3) / 4 * 4;  // d and |d|^2
  float y[ROWS][D], alpha[ROWS], half[ROWS], base[ROWS];
  float sum[ROWS][D], total[ROWS];  // of p d and of p

  // As products: log2 p. As differences: |y - alpha d|^2, which the base joins last.
  template <bool DIFFERENCES>
  __device__ __forceinline__ void score(const float (&v)[PITCH], float (&to)[ROWS]) const {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) to[r] = DIFFERENCES ? 0.0f : fmaf(half[r], v[D], base[r]);
#pragma unroll
    for (int e = 0; e < D; ++e) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const float gap = fmaf(-alpha[r], v[e], y[r][e]);
        to[r] = DIFFERENCES ? fmaf(gap, gap, to[r]) : fmaf(y[r][e], v[e], to[r]);
      }
    }
  }

  static __device__ __forceinline__ void load(const float* ref, float (&v)[PITCH]) {
#pragma unroll
    for (int e = 0; e < PITCH; e += 4) {
      const float4 four = *reinterpret_cast<const float4*>(ref + e);
      v[e] = four.x, v[e + 1] = four.y, v[e + 2] = four.z, v[e + 3] = four.w;
    }
  }

  // The first score, as a whole number, is the first base: exact to change.
  template <bool DIFFERENCES>
  __device__ __forceinline__ void begin(const float* ref) {
    float v[PITCH], first[ROWS];
    load(ref, v);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) base[r] = 0;
    score<DIFFERENCES>(v, first);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) base[r] = -ceilf(DIFFERENCES ? half[r] * first[r] : first[r]);
  }

  template <bool DIFFERENCES>
  __device__ __forceinline__ void add(const float (*refs)[PITCH], int count) {
#pragma unroll 2
    for (int j = 0; j < count; ++j) {
      float v[PITCH], scored[ROWS], now[ROWS];
      load(refs[j], v);
      score<DIFFERENCES>(v, scored);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) now[r] = DIFFERENCES ? fmaf(half[r], scored[r], base[r]) : scored[r];
      float most = now[0];
#pragma unroll
      for (int r = 1; r < ROWS; ++r) most = fmaxf(most, now[r]);
      if (most > SLACK) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          const float shift = now[r] > SLACK ? ceilf(now[r]) : 0.0f, keep = exp2_approx(-shift);
          base[r] -= shift, total[r] *= keep;
          now[r] = DIFFERENCES ? fmaf(half[r], scored[r], base[r]) : now[r] - shift;
#pragma unroll
          for (int e = 0; e < D; ++e) sum[r][e] *= keep;
        }
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const float p = exp2_approx(now[r]);
        total[r] += p;
#pragma unroll
        for (int e = 0; e < D; ++e) sum[r][e] = fmaf(p, v[e], sum[r][e]);
      }
    }
  }
};

// D: in.d rounded up; ROWS: rows per thread; BLOCKS: per multiprocessor. Grid: (row blocks, splits).
template <int D, int ROWS, int BLOCKS>
__global__ void __launch_bounds__(THREADS, BLOCKS) score_and_sum_kernel(const Inputs in, const Round round) {
  using Rows = Held<D, ROWS>;
  __shared__ __align__(16) float refs[TILE][Rows::PITCH];
  __shared__ float sums[ROWS][D + 2][THREADS];  // of p d, of p, and their base
  __shared__ double offsets[ROWS][THREADS];     // what scores are above those that parts are in
  __shared__ float centre[D];
  const double largest = find_centre<D>(in, centre);
  const auto place = [&](int r) {
    return (static_cast<int64_t>(blockIdx.x) * ROWS + r) * THREADS + threadIdx.x;
  };
  const auto row_at = [&](int r) {
    bool alive;
    return make_row(in, round.first_row + (place(r) < round.rows ? place(r) : 0), 0, alive);
  };

  // What the terms of products add up to for references as far from c as `largest`; y.d is 2 sqrt(k n).
  bool large = false;
#pragma unroll 1
  for (int r = 0; r < ROWS; ++r) {
    const Row row = row_at(r);
    double square = 0;
    for (int64_t e = 0; e < in.d; ++e) {
      const double y = centred(in, row, centre, e);
      square = fma(y, y, square);
    }
    const double k = unit(row) * square, n = unit(row) * row.alpha * row.alpha * largest;
    large = large || n * fmax(n, k) > LIMIT * LIMIT;
    offsets[r][threadIdx.x] = k;
  }
  const bool differences = __any_sync(0xffffffffu, large);

  Held<D, ROWS> held;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const Row row = row_at(r);
    held.alpha[r] = static_cast<float>(row.alpha);
    // As differences: y and alpha in proportion, whatever alpha is rounded to.
    const double rounded = held.alpha[r] > 0 ? held.alpha[r] / row.alpha : 1.0;
    const double scale = differences ? rounded : 2 * unit(row) * row.alpha;
    held.half[r] =
        static_cast<float>(-unit(row) * (differences ? 1 / (rounded * rounded) : row.alpha * row.alpha));
#pragma unroll
    for (int e = 0; e < D; ++e) {
      held.y[r][e] = e < in.d ? static_cast<float>(scale * centred(in, row, centre, e)) : 0.0f;
      held.sum[r][e] = 0, sums[r][e][threadIdx.x] = 0;
    }
    held.total[r] = 0, sums[r][D][threadIdx.x] = 0;
    held.base[r] = INFINITY;  // of a part without references
    if (differences) offsets[r][threadIdx.x] = 0;
  }
  const int64_t valid = valid_count(in, 0), last = round.end_ref < valid ? round.end_ref : valid;
  const int64_t begin = round.first_ref + blockIdx.y * round.split_refs;
  const int64_t end = begin + round.split_refs < last ? begin + round.split_refs : last;
  for (int64_t first = begin; first < end; first += TILE) {
    const int count = static_cast<int>(end - first < TILE ? end - first : TILE);
    __syncthreads();
#pragma unroll 4  // a full unroll costs registers
    for (int k = 0; k < D; ++k) {
      const int i = k * THREADS + threadIdx.x, j = i / D, e = i % D;
      const bool inside = j < count && e < in.d;
      refs[j][e] = inside ? load_as<float>(in.refs, (first + j) * in.d + e) - centre[e] : 0.0f;
    }
    __syncthreads();
    float norm = 0;
#pragma unroll
    for (int e = 0; e < D; ++e) norm = fmaf(refs[threadIdx.x][e], refs[threadIdx.x][e], norm);
    refs[threadIdx.x][D] = norm;
    __syncthreads();
    if (first == begin) {
      if (differences) {
        held.template begin<true>(refs[0]);
      } else {
        held.template begin<false>(refs[0]);
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) sums[r][D + 1][threadIdx.x] = held.base[r];
    }
#pragma unroll 1
    for (int j = 0; j < count; j += SUM_REFS) {
      const int chunk = count - j < SUM_REFS ? count - j : SUM_REFS;
      if (differences) {
        held.template add<true>(refs + j, chunk);
      } else {
        held.template add<false>(refs + j, chunk);
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const float keep = exp2_approx(held.base[r] - sums[r][D + 1][threadIdx.x]);
#pragma unroll
        for (int e = 0; e < D; ++e) {
          sums[r][e][threadIdx.x] = fmaf(sums[r][e][threadIdx.x], keep, held.sum[r][e]);
          held.sum[r][e] = 0;
        }
        sums[r][D][threadIdx.x] = fmaf(sums[r][D][threadIdx.x], keep, held.total[r]);
        held.total[r] = 0;
        sums[r][D + 1][threadIdx.x] = held.base[r];
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    if (place(r) >= round.rows) continue;
    float* const to = round.parts + static_cast<int64_t>(blockIdx.y) * (D + 2) * round.rows + place(r);
    // Less the offset: its whole part from the base, which stays exact, the rest from the sums.
    const double offset = offsets[r][threadIdx.x], whole = floor(offset);
    const float rest = exp2f(static_cast<float>(whole - offset));
#pragma unroll
    for (int e = 0; e < D + 1; ++e) to[e * round.rows] = rest * sums[r][e][threadIdx.x];
    to[(D + 1) * round.rows] = static_cast<float>(-held.base[r] - whole);
  }
}

// One thread per row and element. Grid: (row blocks, d). All units are powers of two, so changing them is
// exact.
template <int D>
__global__ void __launch_bounds__(THREADS) merge_kernel(const Inputs in, const Round round) {
  __shared__ float centre[D];
  find_centre<D>(in, centre);
  const int64_t local = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  const int e = blockIdx.y;
  if (local >= round.rows) return;
  bool alive;
  const Row row = make_row(in, round.first_row + local, 0, alive);
  double* const state = round.state + e * round.rows + local;
  const int64_t state_stride = in.d * round.rows;
  double sum = 0, total = 0, best = -INFINITY;
  if (round.first_ref > 0) {
    sum = state[0], total = state[state_stride], best = state[2 * state_stride];
  } else if (in.source.data) {
    double score = 0;
    for (int64_t k = 0; k < in.d; ++k) {
      const double own = load_as<double>(in.source, row.index * in.d + k) - centre[k];
      const double gap = centred(in, row, centre, k) - row.alpha * own;
      score = fma(gap, gap, score);
    }
    score *= -unit(row);
    best = ceil(score);
    total = isfinite(score) ? exp2(score - best) : NAN;
    sum = total * (load_as<double>(in.source, row.index * in.d + e) - centre[e]);
  }
  const float* const parts = round.parts + local;
  const int64_t stride = (D + 2) * round.rows;
  double most = best;
#pragma unroll 8
  for (int s = 0; s < round.splits; ++s)
    most = fmax(most, static_cast<double>(parts[s * stride + (D + 1) * round.rows]));
  if (best > -INFINITY) {
    const double keep = exp2(best - most);
    sum *= keep, total *= keep;
  }
#pragma unroll 8
  for (int s = 0; s < round.splits; ++s) {
    const float own = parts[s * stride + (D + 1) * round.rows];
    if (own == -INFINITY) continue;  // a part without references
    const double keep = exp2f(static_cast<float>(own - most));
    total += keep * parts[s * stride + D * round.rows];
    sum += keep * parts[s * stride + e * round.rows];
  }
  if (round.end_ref < in.m) {
    state[0] = sum, state[state_stride] = total, state[2 * state_stride] = most;
    return;
  }
  if (!alive) total = NAN;
  const int64_t at = row.index * in.d + e;
  store_as(in.out, at, row.a * load_as<double>(in.x, at) + row.b * (centre[e] + sum / total));
  if (in.lse.data && e == 0) {
    const double lse = log(total) + most / LOG2_E + 0.5 * static_cast<double>(in.d);
    store_as(in.lse, row.index, total > 0 ? lse : NAN);
  }
}

template <int D, int ROWS, int BLOCKS>
bool launch_if(const char* op, const Inputs& in, const Plan& plan, const Round& round, cudaStream_t stream) {
  if (plan.tile_d != D || plan.tile_rows != THREADS * ROWS) return false;
  const auto blocks = [&](int64_t each) { return static_cast<unsigned>((round.rows + each - 1) / each); };
  const dim3 grid(blocks(plan.tile_rows), static_cast<unsigned>(round.splits));
  score_and_sum_kernel<D, ROWS, BLOCKS><<<grid, THREADS, 0, stream>>>(in, round);
  check_launch(op);
  merge_kernel<D><<<dim3(blocks(THREADS), static_cast<unsigned>(in.d)), THREADS, 0, stream>>>(in, round);
  check_launch(op);
  return true;
}

}  // namespace

void run_small_float(const char* op, const Inputs& in, const Plan& plan, void* workspace,
                     cudaStream_t stream) {
  Carver carver(workspace);
  Round round;
  round.parts = carver.take<float>(plan.splits * (plan.tile_d + 2) * plan.rows_per_pass);
  round.state = carver.take<double>(3 * in.d * plan.rows_per_pass);
  round.split_refs = plan.refs_per_pass / plan.splits;
  for (round.first_row = 0; round.first_row < in.n; round.first_row += plan.rows_per_pass) {
    round.rows = std::min(plan.rows_per_pass, in.n - round.first_row);
    round.first_ref = 0;
    do {  // once even where there are no references: the source may be there
      round.end_ref = std::min(in.m, round.first_ref + plan.refs_per_pass);
      const int64_t refs = round.end_ref - round.first_ref;
      round.splits = static_cast<int>(std::max<int64_t>(1, (refs + round.split_refs - 1) / round.split_refs));
      const bool launched = launch_if<10, 4, 3>(op, in, plan, round, stream) ||
                            launch_if<10, 1, 6>(op, in, plan, round, stream) ||
                            launch_if<12, 4, 3>(op, in, plan, round, stream) ||
                            launch_if<12, 1, 6>(op, in, plan, round, stream) ||
                            launch_if<14, 3, 3>(op, in, plan, round, stream) ||
                            launch_if<14, 1, 6>(op, in, plan, round, stream) ||
                            launch_if<16, 3, 3>(op, in, plan, round, stream) ||
                            launch_if<16, 1, 6>(op, in, plan, round, stream);
      if (!launched)
        throw std::runtime_error(std::string("svel::") + op + ": no compiled kernel for the planned tile");
      round.first_ref = round.end_ref;
    } while (round.first_ref < in.m);
  }
}

}  // namespace svel::cuda
