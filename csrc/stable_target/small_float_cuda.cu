// One shared pool and 9 <= D <= 16: a thread holds up to 4 rows, and a reference is read from shared memory
// once for both the scores and the sums of all of them. Per pair: 2 D + 2 float32 operations and one
// exponential, which is what bounds it; bytes hardly matter. The references of a round are cut into
// plan.splits parts of at most about a thousand, as many as a float32 sum takes; parts and rounds are merged
// in float64.
#include "stable_target/launch.cuh"
#include "stable_target/scan.cuh"

namespace svel::cuda {
namespace {

constexpr int THREADS = 128;
constexpr int TILE = 128;        // references in shared memory, one per thread
constexpr int CENTRE_REFS = 16;  // references whose mean is the centre
constexpr float SLACK = 32;      // weights may reach 2^32 before the base of the exponents is raised
constexpr double LOG2_E = 1.4426950408889634;

struct Round {  // rows [first_row, first_row + rows) against references [first_ref, end_ref)
  int64_t first_row, rows;
  int64_t first_ref, end_ref, split_refs;
  int splits;
  float* parts;   // (splits, D + 2, rows): sum of p (r - c), sum of p, logarithm of their unit to base 2
  double* state;  // (3, d, rows): the same of all earlier rounds, once for each element
};

__device__ inline float exp2_approx(float v) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
  return out;
}

// Mean of the first references, the same in every block: D is small enough to find it again.
template <int D>
__device__ inline void find_centre(const Inputs& in, float* centre) {
  if (threadIdx.x < D) {
    const int64_t valid = valid_count(in, 0);
    const int count = static_cast<int>(valid < CENTRE_REFS ? valid : CENTRE_REFS);
    float mean = 0;
    if (threadIdx.x < in.d) {
#pragma unroll
      for (int j = 0; j < CENTRE_REFS; ++j)
        if (j < count) mean += load_as<float>(in.refs, j * in.d + threadIdx.x);
    }
    centre[threadIdx.x] = count ? mean / count : 0.0f;
  }
  __syncthreads();
}

// D: in.d rounded up; ROWS: rows per thread; BLOCKS: per multiprocessor. Grid: (row blocks, splits).
template <int D, int ROWS, int BLOCKS>
__global__ void __launch_bounds__(THREADS, BLOCKS) score_and_sum_kernel(const Inputs in, const Round round) {
  constexpr int PITCH = (D + 1 + 3) / 4 * 4;
  __shared__ __align__(16) float refs[TILE][PITCH];  // r - c, |r - c|^2
  __shared__ float centre[D];
  find_centre<D>(in, centre);
  // Logarithms to base 2: score = y.d - half |d|^2 with d = r - c, y = rate (sign x - alpha c).
  float y[ROWS][D], sum[ROWS][D] = {}, total[ROWS] = {}, half[ROWS], base[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int64_t local = (static_cast<int64_t>(blockIdx.x) * ROWS + r) * THREADS + threadIdx.x;
    bool alive;
    const Row row = make_row(in, round.first_row + (local < round.rows ? local : 0), 0, alive);
    const double rate2 = row.rate() * LOG2_E;
#pragma unroll
    for (int e = 0; e < D; ++e) {
      const double x = e < in.d ? load_as<double>(in.x, row.index * in.d + e) : 0.0;
      y[r][e] = e < in.d ? static_cast<float>(rate2 * (row.sign * x - row.alpha * centre[e])) : 0.0f;
    }
    half[r] = static_cast<float>(-0.5 * rate2 * row.alpha);
    base[r] = INFINITY;  // of a part without references
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
    if (first == begin) {  // the first score, as a whole number, is the first base: exact to change
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        float score = half[r] * refs[0][D];
#pragma unroll
        for (int e = 0; e < D; ++e) score = fmaf(y[r][e], refs[0][e], score);
        base[r] = -ceilf(score);
      }
    }
#pragma unroll 2
    for (int j = 0; j < count; ++j) {
      float v[PITCH];
#pragma unroll
      for (int e = 0; e < PITCH; e += 4) {
        const float4 four = *reinterpret_cast<const float4*>(&refs[j][e]);
        v[e] = four.x, v[e + 1] = four.y, v[e + 2] = four.z, v[e + 3] = four.w;
      }
      float score[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) score[r] = fmaf(half[r], v[D], base[r]);
#pragma unroll
      for (int e = 0; e < D; ++e)
#pragma unroll
        for (int r = 0; r < ROWS; ++r) score[r] = fmaf(y[r][e], v[e], score[r]);
      float most = score[0];
#pragma unroll
      for (int r = 1; r < ROWS; ++r) most = fmaxf(most, score[r]);
      if (most > SLACK) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          const float shift = score[r] > SLACK ? ceilf(score[r]) : 0.0f, keep = exp2_approx(-shift);
          base[r] -= shift, score[r] -= shift, total[r] *= keep;
#pragma unroll
          for (int e = 0; e < D; ++e) sum[r][e] *= keep;
        }
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const float p = exp2_approx(score[r]);
        total[r] += p;
#pragma unroll
        for (int e = 0; e < D; ++e) sum[r][e] = fmaf(p, v[e], sum[r][e]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int64_t local = (static_cast<int64_t>(blockIdx.x) * ROWS + r) * THREADS + threadIdx.x;
    if (local >= round.rows) continue;
    float* const to = round.parts + static_cast<int64_t>(blockIdx.y) * (D + 2) * round.rows + local;
#pragma unroll
    for (int e = 0; e < D; ++e) to[e * round.rows] = sum[r][e];
    to[D * round.rows] = total[r];
    to[(D + 1) * round.rows] = -base[r];
  }
}

// sign x - alpha c at element e.
__device__ inline double centred(const Inputs& in, const Row& row, const float* centre, int64_t e) {
  return row.sign * load_as<double>(in.x, row.index * in.d + e) - row.alpha * centre[e];
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
      score += (centred(in, row, centre, k) - 0.5 * row.alpha * own) * own;
    }
    score *= row.rate() * LOG2_E;
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
    const float unit = parts[s * stride + (D + 1) * round.rows];
    if (unit == -INFINITY) continue;  // a part without references
    const double keep = exp2f(static_cast<float>(unit - most));
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
    double square = 0;
    for (int64_t k = 0; k < in.d; ++k) {
      const double y = centred(in, row, centre, k);
      square = fma(y, y, square);
    }
    const double shift = most / LOG2_E - square / (2 * row.sigma * row.sigma);
    store_as(in.lse, row.index, total > 0 ? log(total) + shift + 0.5 * static_cast<double>(in.d) : NAN);
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
