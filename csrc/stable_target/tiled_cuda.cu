// One shared pool and many rows: matrix products in register tiles, the softmax between them. Operations: 4 n
// m d in float32 (67 TFLOP/s on Hopper), so bound by arithmetic from about 16 rows on; bytes: each round
// reads its references once per 64 rows, mostly from the L2. A round covers plan.rows_per_pass x
// plan.refs_per_pass scores; rounds over the references continue an online softmax. Sums run over at most
// FLUSH terms before they join a second register. Where scores may still be off by what shows, those of the
// largest weights are computed again in float64.
#include "stable_target/launch.cuh"

namespace svel::cuda {
namespace {

constexpr int TILE = 64;  // rows, references or elements of D per block side; a thread computes 4 x 4
constexpr int STEP = 16;  // depth of a shared-memory tile
constexpr int PAD = 4;
constexpr int THREADS = 256;
constexpr int FLUSH = 256;
constexpr int CENTRE_REFS = 64;  // references whose mean is the centre
constexpr int NEAR = 64;         // of so many weights that are nearly the largest, errors average out

struct Round {
  int64_t first_row, rows;  // of the work list; its order is that of x, since there are no labels
  int64_t first_ref, refs;  // refs: a multiple of TILE at most plan.refs_per_pass; may pass the valid ones
  int64_t score_stride;
  float* centre;   // (d,)
  float* norms;    // (refs,) |r_j - c|^2
  float* scores;   // (rows, score_stride): scores, then weights
  double* sums;    // (rows, d) sum of p_j (r_j - c)
  double* best;    // (rows,) largest score so far
  float* keep;     // (rows,) factor of the old sums in this round
  double* total;   // (rows,)
  float* squares;  // (rows,) |y|^2
};

__device__ bool has_tiles(const WorkList& work, int64_t i) {
  return work.first_tile[i] != work.first_tile[i + 1];
}

__global__ void centre_kernel(const Inputs in, float* centre) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (e >= in.d) return;
  const int64_t valid = valid_count(in, 0), count = valid < CENTRE_REFS ? valid : CENTRE_REFS;
  float mean = 0;
  for (int64_t j = 0; j < count; ++j) mean += load_as<float>(in.refs, j * in.d + e);
  centre[e] = count ? mean / count : 0.0f;
}

// One block per row: the state of a row that has seen its source, or nothing.
__global__ void __launch_bounds__(THREADS)
    start_kernel(const Inputs in, const WorkList work, const Round round) {
  __shared__ double scratch[33];
  const int64_t local = blockIdx.x;
  const Row row = work.rows[round.first_row + local];
  double score = 0, square = 0;
  for (int64_t e = threadIdx.x; e < in.d; e += THREADS) {
    const int64_t at = row.index * in.d + e;
    const double c = round.centre[e];
    const double own = in.source.data ? load_as<double>(in.source, at) - c : 0.0;
    const double y = row.sign * load_as<double>(in.x, at) - row.alpha * c;
    round.sums[local * in.d + e] = own;
    score += (y - 0.5 * row.alpha * own) * own;
    square += y * y;
  }
  if (in.source.data) score = block_sum<double>(score, scratch);
  square = block_sum<double>(square, scratch);
  if (threadIdx.x != 0) return;
  round.squares[local] = static_cast<float>(square);
  round.best[local] = in.source.data ? score : -INFINITY;
  round.total[local] = !in.source.data ? 0.0 : isfinite(score) ? 1.0 : NAN;
}

// One warp per reference.
__global__ void __launch_bounds__(THREADS) norm_kernel(const Inputs in, const Round round) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (j >= round.refs || round.first_ref + j >= valid_count(in, 0)) return;
  double norm = 0;
  for (int64_t base = 0; base < in.d; base += 32 * 8) {
    float part = 0;
    for (int k = 0; k < 8; ++k) {
      const int64_t e = base + k * 32 + lane;
      const float v =
          e < in.d ? load_as<float>(in.refs, (round.first_ref + j) * in.d + e) - round.centre[e] : 0.0f;
      part = fmaf(v, v, part);
    }
    norm += part;
  }
  for (int offset = 16; offset > 0; offset /= 2) norm += __shfl_xor_sync(0xffffffffu, norm, offset);
  if (lane == 0) round.norms[j] = static_cast<float>(norm);
}

struct Tiles {  // a[k][row], b[k][column] of one step
  float a[STEP][TILE + PAD], b[STEP][TILE + PAD];
};

__device__ void multiply(const Tiles& tiles, float (&acc)[4][4]) {
  const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
#pragma unroll
  for (int k = 0; k < STEP; ++k) {
    const float4 a = *reinterpret_cast<const float4*>(&tiles.a[k][row]);
    const float4 b = *reinterpret_cast<const float4*>(&tiles.b[k][column]);
    const float av[4] = {a.x, a.y, a.z, a.w}, bv[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) acc[i][j] = fmaf(av[i], bv[j], acc[i][j]);
    }
  }
}

__device__ void flush(float (&acc)[4][4], float (&sum)[4][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      sum[i][j] += acc[i][j];
      acc[i][j] = 0;
    }
  }
}

__device__ bool tile_is_idle(const WorkList& work, const Round& round, int64_t row0) {
  for (int64_t i = row0; i < row0 + TILE && i < round.rows; ++i) {
    if (has_tiles(work, round.first_row + i)) return false;
  }
  return true;
}

// scores = y (r - c)^T - alpha/2 |r - c|^2. Grid: (references / TILE, rows / TILE).
template <typename T>
__global__ void __launch_bounds__(THREADS)
    score_kernel(const Inputs in, const WorkList work, const Round round) {
  __shared__ __align__(16) Tiles tiles;
  const T* const refs = static_cast<const T*>(in.refs.data);
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * TILE,
                ref0 = static_cast<int64_t>(blockIdx.x) * TILE;
  const int64_t valid = valid_count(in, 0) - round.first_ref;
  if (ref0 >= valid || tile_is_idle(work, round, row0)) return;
  const int k_own = threadIdx.x % STEP, i_own = threadIdx.x / STEP;  // this thread's place in a 16 x 16 piece
  float acc[4][4] = {}, sum[4][4] = {};
  double alpha[4], sign[4];
  int64_t index[4];
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    const int64_t i = row0 + p * 16 + i_own;
    const Row row = work.rows[round.first_row + (i < round.rows ? i : row0)];
    alpha[p] = row.alpha, sign[p] = row.sign, index[p] = row.index;
  }
  for (int64_t e0 = 0; e0 < in.d; e0 += STEP) {
    const int64_t e = e0 + k_own;
    const float c = e < in.d ? round.centre[e] : 0.0f;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const int i = p * 16 + i_own;
      float y = 0, r = 0;
      if (e < in.d) {
        y = static_cast<float>(sign[p] * load_as<double>(in.x, index[p] * in.d + e) - alpha[p] * c);
        if (ref0 + i < valid) r = to_float(refs[(round.first_ref + ref0 + i) * in.d + e]) - c;
      }
      tiles.a[k_own][i] = y;
      tiles.b[k_own][i] = r;
    }
    __syncthreads();
    multiply(tiles, acc);
    if ((e0 + STEP) % FLUSH == 0) flush(acc, sum);
    __syncthreads();
  }
  flush(acc, sum);
  const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t local = row0 + row + i;
    if (local >= round.rows) continue;
    const float half_alpha = static_cast<float>(0.5 * work.rows[round.first_row + local].alpha);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t ref = ref0 + column + j;
      if (ref < valid)
        round.scores[local * round.score_stride + ref] = fmaf(-half_alpha, round.norms[ref], sum[i][j]);
    }
  }
}

// What a score may be off by, beside its weight: float32 sums of up to FLUSH terms of y.d, which add up to a
// part of the whole and go their own ways by |y| |d|.
__device__ float score_error(const Row& row, float best, float norm, float square, int64_t d) {
  constexpr float UNIT = 6e-8f;
  const float of_norm = static_cast<float>(0.5 * row.alpha) * norm, product = best + of_norm,
              length = static_cast<float>(d < FLUSH ? d : FLUSH), all = static_cast<float>(d);
  const float errors = (0.053f * length * length * product * product + 0.16f * length * square * norm) / all +
                       0.3f * (best * best + of_norm * of_norm);
  return UNIT * static_cast<float>(row.rate()) * sqrtf(errors);
}

// Scores to weights, and the factor of what was summed before. One block per row.
__global__ void __launch_bounds__(THREADS)
    weight_kernel(const Inputs in, const WorkList work, const Round round) {
  __shared__ double scratch[33];
  const int64_t local = blockIdx.x, i = round.first_row + local;
  const int64_t left = valid_count(in, 0) - round.first_ref, valid = left < round.refs ? left : round.refs;
  if (valid <= 0) return;
  float* const scores = round.scores + local * round.score_stride;
  if (!has_tiles(work, i)) {
    for (int64_t j = threadIdx.x; j < round.refs; j += THREADS) scores[j] = 0;
    if (threadIdx.x == 0) round.keep[local] = 1;
    return;
  }
  __shared__ int near[NEAR], found;
  __shared__ double exact[NEAR], steps[NEAR];
  __shared__ float largest[33];
  const Row row = work.rows[i];
  const double rate = row.rate(), before = round.best[local];
  float first = -INFINITY, second = -INFINITY;  // the largest two of this thread
  int first_at = 0;
  for (int64_t j = threadIdx.x; j < valid; j += THREADS) {
    const float score = scores[j];
    second = fmaxf(second, fminf(first, score));
    if (score > first) first = score, first_at = static_cast<int>(j);
  }
  if (threadIdx.x == 0) found = 0;
  double best = fmax(before, static_cast<double>(block_max<float>(first, largest)));
  const float log2_rate = static_cast<float>(rate * LOG2_E);

  const double norm =
      block_sum<double>(round.norms[threadIdx.x < valid ? threadIdx.x : 0], scratch) / THREADS;
  const float ratio =
      score_error(row, static_cast<float>(best), static_cast<float>(norm), round.squares[local], in.d) /
      5e-7f;
  // Weights whose errors may show, and what eight standard deviations may hide.
  const float lowest = static_cast<float>(best) - (2 * log2f(ratio) + 6e-6f * ratio) / log2_rate;
  int count = 0;
  // The errors of smaller weights do not show, nor those of one that has no other beside it.
  const bool alone = round.first_ref == 0 && left <= round.refs && before == -INFINITY &&
                     __syncthreads_count(first >= lowest) + __syncthreads_count(second >= lowest) == 1;
  if (ratio > 1 && !alone) {
    const auto take = [&](int j) {
      const int at = atomicAdd(&found, 1);
      if (at < NEAR) near[at] = j;
    };
    if (second >= lowest) {
      for (int64_t j = threadIdx.x; j < valid; j += THREADS) {
        if (scores[j] >= lowest) take(static_cast<int>(j));
      }
    } else if (first >= lowest) {
      take(first_at);
    }
    __syncthreads();
    count = found <= NEAR ? found : 0;
    const int lane = threadIdx.x % 32;
    for (int k = threadIdx.x / 32; k < count; k += THREADS / 32) {
      const int64_t ref = (round.first_ref + near[k]) * in.d;
      double score = 0;
      for (int64_t e = lane; e < in.d; e += 32) {
        const double c = round.centre[e], d = load_as<double>(in.refs, ref + e) - c;
        const double y = row.sign * load_as<double>(in.x, row.index * in.d + e) - row.alpha * c;
        score = fma(fma(-0.5 * row.alpha, d, y), d, score);
      }
      score = warp_sum(score);
      if (lane == 0) exact[k] = score;
    }
    __syncthreads();
    if (count > 0) best = before;
    for (int k = 0; k < count; ++k) best = fmax(best, exact[k]);
  }
  const float now = static_cast<float>(best);
  double total = 0;
  for (int64_t j = threadIdx.x; j < round.refs; j += THREADS) {
    float logarithm = (scores[j] - now) * log2_rate;
    logarithm = logarithm > 64 ? 64 : logarithm;  // of those that are corrected below
    const float p = j < valid ? exp2f(logarithm) : 0.0f;
    scores[j] = p;
    total += p;
  }
  if (count > 0) {  // each as often, and in the same place, whatever its order in the list
    __syncthreads();
    for (int k = threadIdx.x; k < count; k += THREADS) {
      int before_it = 0;
      for (int other = 0; other < count; ++other) before_it += near[other] < near[k];
      const float p = exp2f(static_cast<float>(exact[k] - best) * log2_rate);
      steps[before_it] = static_cast<double>(p) - scores[near[k]];
      scores[near[k]] = p;
    }
    __syncthreads();
    if (threadIdx.x < count) total += steps[threadIdx.x];
  }
  total = block_sum<double>(total, scratch);
  if (threadIdx.x != 0) return;
  const float keep = before == -INFINITY ? 0.0f : exp2f(static_cast<float>((before - best) * rate * LOG2_E));
  round.keep[local] = keep;
  round.best[local] = best;
  round.total[local] = round.total[local] * keep + total;
}

// sums = keep sums + weights (r - c). Grid: (d / TILE, rows / TILE).
template <typename T>
__global__ void __launch_bounds__(THREADS)
    sum_kernel(const Inputs in, const WorkList work, const Round round) {
  __shared__ __align__(16) Tiles tiles;
  const T* const refs = static_cast<const T*>(in.refs.data);
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * TILE, e0 = static_cast<int64_t>(blockIdx.x) * TILE;
  const int64_t left = valid_count(in, 0) - round.first_ref, valid = left < round.refs ? left : round.refs;
  if (valid <= 0 || tile_is_idle(work, round, row0)) return;
  const int k_own = threadIdx.x % STEP, i_own = threadIdx.x / STEP;         // of a piece of the weights
  const int column_own = threadIdx.x % TILE, k_first = threadIdx.x / TILE;  // of a piece of the references
  const int64_t e = e0 + column_own;
  const float c = e < in.d ? round.centre[e] : 0.0f;
  float acc[4][4] = {}, sum[4][4] = {};
  for (int64_t j0 = 0; j0 < valid; j0 += STEP) {
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const int i = p * 16 + i_own, k = p * 4 + k_first;
      const bool row_inside = row0 + i < round.rows && j0 + k_own < valid;
      tiles.a[k_own][i] = row_inside ? round.scores[(row0 + i) * round.score_stride + j0 + k_own] : 0.0f;
      const bool ref_inside = e < in.d && j0 + k < valid;
      tiles.b[k][column_own] = ref_inside ? to_float(refs[(round.first_ref + j0 + k) * in.d + e]) - c : 0.0f;
    }
    __syncthreads();
    multiply(tiles, acc);
    if ((j0 + STEP) % FLUSH == 0) flush(acc, sum);
    __syncthreads();
  }
  flush(acc, sum);
  const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t local = row0 + row + i;
    if (local >= round.rows) continue;
    const double keep = round.keep[local];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t at = local * in.d + e0 + column + j;
      if (e0 + column + j < in.d) round.sums[at] = fma(round.sums[at], keep, static_cast<double>(sum[i][j]));
    }
  }
}

// One block per row.
__global__ void __launch_bounds__(THREADS)
    finish_kernel(const Inputs in, const WorkList work, const Round round) {
  __shared__ double scratch[33];
  const int64_t local = blockIdx.x, i = round.first_row + local;
  const Row row = work.rows[i];
  const double total = has_tiles(work, i) && isfinite(round.best[local]) ? round.total[local] : NAN;
  const double inverse = 1.0 / total;
  double square = 0;
  for (int64_t e = threadIdx.x; e < in.d; e += THREADS) {
    const int64_t at = row.index * in.d + e;
    const double x = load_as<double>(in.x, at), c = round.centre[e];
    const double y = row.sign * x - row.alpha * c;
    square = fma(y, y, square);
    const double mean = c + round.sums[local * in.d + e] * inverse;
    store_as(in.out, at, row.a * x + row.b * mean);
  }
  if (!in.lse.data) return;
  square = block_sum<double>(square, scratch);
  if (threadIdx.x != 0) return;
  const double shift = row.rate() * round.best[local] - square / (2 * row.sigma * row.sigma);
  store_as(in.lse, row.index, log(total) + shift + 0.5 * static_cast<double>(in.d));
}

template <typename T>
void run(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream) {
  Carver carver(workspace);
  const WorkList work = build_work_list(in, TILE, carver.take<char>(work_list_bytes(in.n, in.k)), stream);
  check_launch(op);
  Round round;
  round.score_stride = plan.refs_per_pass;
  round.centre = carver.take<float>(in.d);
  round.norms = carver.take<float>(plan.refs_per_pass);
  round.scores = carver.take<float>(plan.rows_per_pass * plan.refs_per_pass);
  round.sums = carver.take<double>(plan.rows_per_pass * in.d);
  round.best = carver.take<double>(plan.rows_per_pass);
  round.squares = carver.take<float>(plan.rows_per_pass);
  round.keep = carver.take<float>(plan.rows_per_pass);
  round.total = carver.take<double>(plan.rows_per_pass);
  const auto blocks = [](int64_t count, int64_t each) {
    return static_cast<unsigned>((count + each - 1) / each);
  };
  centre_kernel<<<blocks(in.d, 256), 256, 0, stream>>>(in, round.centre);
  check_launch(op);
  for (round.first_row = 0; round.first_row < in.n; round.first_row += plan.rows_per_pass) {
    round.rows = std::min(plan.rows_per_pass, in.n - round.first_row);
    const unsigned rows = static_cast<unsigned>(round.rows), row_tiles = blocks(round.rows, TILE);
    start_kernel<<<rows, THREADS, 0, stream>>>(in, work, round);
    check_launch(op);
    for (round.first_ref = 0; round.first_ref < in.m; round.first_ref += plan.refs_per_pass) {
      round.refs = std::min(plan.refs_per_pass, in.m - round.first_ref);
      norm_kernel<<<blocks(round.refs, THREADS / 32), THREADS, 0, stream>>>(in, round);
      check_launch(op);
      score_kernel<T><<<dim3(blocks(round.refs, TILE), row_tiles), THREADS, 0, stream>>>(in, work, round);
      check_launch(op);
      weight_kernel<<<rows, THREADS, 0, stream>>>(in, work, round);
      check_launch(op);
      sum_kernel<T><<<dim3(blocks(in.d, TILE), row_tiles), THREADS, 0, stream>>>(in, work, round);
      check_launch(op);
    }
    finish_kernel<<<rows, THREADS, 0, stream>>>(in, work, round);
    check_launch(op);
  }
}

}  // namespace

void run_tiled(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream) {
  if (in.refs.dtype == Dtype::f16) return run<__half>(op, in, plan, workspace, stream);
  if (in.refs.dtype == Dtype::bf16) return run<__nv_bfloat16>(op, in, plan, workspace, stream);
  run<float>(op, in, plan, workspace, stream);
}

}  // namespace svel::cuda
