// One shared pool and D <= 8 or 17 <= D <= 32: a thread holds a whole row, references are broadcast from
// shared memory (9 <= D <= 16: small_float_cuda.cu). Per pair: 2 D + 4 operations, in float64 up to D = 8,
// and one exponential; bytes hardly matter (every block reads its part of the pool, mostly from L2). The pool
// is cut into plan.splits parts, merged by merge_kernel.
#include "stable_target/launch.cuh"

namespace svel::cuda {
namespace {

constexpr int THREADS = 128;
constexpr int TILE = 64;         // references in shared memory
constexpr int FLUSH_TILES = 4;   // summed in float32 before they join a float64 total in device memory
constexpr int CENTRE_REFS = 64;  // references whose mean is the centre

struct Parts {  // rows [first_row, first_row + rows) of this pass
  int64_t first_row, rows, splits, split_refs;
  float* centre;  // (tile_d,)
  double* y;      // (rows, tile_d), zero from d on
  double* sums;   // (splits, rows, tile_d); before small_kernel, split 0 holds source - c
  double* best;   // (splits, rows)
  double* total;  // (splits, rows)
};

template <typename W>
struct alignas(16) Four {  // read from shared memory 16 bytes at a time
  W at[4];
};

__global__ void centre_kernel(const Inputs in, float* centre, int tile_d) {
  const int64_t valid = valid_count(in, 0), count = valid < CENTRE_REFS ? valid : CENTRE_REFS;
  const int e = threadIdx.x;
  if (e >= tile_d) return;
  float mean = 0;
  if (e < in.d) {
    for (int64_t j = 0; j < count; ++j) mean += load_as<float>(in.refs, j * in.d + e);
  }
  centre[e] = count ? mean / count : 0.0f;
}

__device__ float power_of_two(float v) {
  return exp2f(v);
}
__device__ double power_of_two(double v) {
  return exp2(v);
}

// y and source - c. One thread per row and element.
__global__ void prepare_kernel(const Inputs in, const WorkList work, const Parts parts, int tile_d) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (item >= parts.rows * tile_d) return;
  const int64_t e = item % tile_d;
  const Row& row = work.rows[parts.first_row + item / tile_d];
  const int64_t at = row.index * in.d + e;
  const bool inside = e < in.d;
  const float c = parts.centre[e];
  parts.y[item] = inside ? row.sign * load_as<double>(in.x, at) - row.alpha * c : 0.0;
  if (in.source.data) parts.sums[item] = inside ? load_as<float>(in.source, at) - c : 0.0f;
}

// W: arithmetic; D: in.d rounded up. Grid: (row blocks, splits).
template <typename W, int D>
__global__ void __launch_bounds__(THREADS, D == 4 ? 3 : 2)
    small_kernel(const Inputs in, const WorkList work, const Parts parts) {
  constexpr int BATCH = D <= 8 ? 8 : 4;      // references per step of the online softmax
  __shared__ __align__(16) W refs[TILE][D];  // r_j - c
  __shared__ __align__(16) W norms[TILE];
  const int64_t split = blockIdx.y, valid = valid_count(in, 0);
  const int64_t begin = split * parts.split_refs;
  const int64_t end = begin + parts.split_refs < valid ? begin + parts.split_refs : valid;

  const int64_t local = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  const int64_t safe = local < parts.rows ? local : 0;
  const Row& row = work.rows[parts.first_row + safe];
  const W half_alpha = static_cast<W>(0.5 * row.alpha);
  const W log2_rate = static_cast<W>(row.rate() * LOG2_E);
  W y[D], sum[D], best = -INFINITY;
  double total = 0;
  W flushed_best;  // the score that the flushed sums are relative to
  bool flushed = false;
  const bool with_source = in.source.data && split == 0;
  W score = 0;
#pragma unroll
  for (int e = 0; e < D; ++e) {
    y[e] = static_cast<W>(parts.y[safe * D + e]);
    sum[e] = with_source ? static_cast<W>(parts.sums[safe * D + e]) : W(0);
    score += (y[e] - half_alpha * sum[e]) * sum[e];
  }
  if (with_source) best = score, total = isfinite(score) ? 1.0 : NAN;

  const auto flush = [&] {
    if (local >= parts.rows) return;
    double* const sums = parts.sums + (split * parts.rows + local) * D;
    const double scale = flushed ? exp2(static_cast<double>(flushed_best - best) * log2_rate) : 0.0;
#pragma unroll
    for (int e = 0; e < D; ++e) {
      sums[e] = flushed ? fma(sums[e], scale, static_cast<double>(sum[e])) : sum[e];
      sum[e] = 0;
    }
    flushed_best = best;
    flushed = true;
  };

  for (int64_t base = begin; base < end; base += TILE) {
    const int count = static_cast<int>(end - base < TILE ? end - base : TILE);
    __syncthreads();
#pragma unroll 4  // a full unroll costs registers
    for (int i = threadIdx.x; i < TILE * D; i += THREADS) {
      const int j = i / D, e = i % D;
      const bool inside = j < count && e < in.d;
      refs[j][e] = inside ? load_as<W>(in.refs, (base + j) * in.d + e) - parts.centre[e] : W(0);
    }
    __syncthreads();
    if (threadIdx.x < TILE) {
      W norm = 0;
#pragma unroll
      for (int e = 0; e < D; ++e) norm += refs[threadIdx.x][e] * refs[threadIdx.x][e];
      norms[threadIdx.x] = norm;
    }
    __syncthreads();

    W tile_total = 0;
#pragma unroll 1
    for (int j0 = 0; j0 < count; j0 += BATCH) {
      W score[BATCH];
      W p[BATCH];
#pragma unroll
      for (int j = 0; j < BATCH; ++j) {
        asm volatile("" ::: "memory");  // one reference's loads at a time: more only cost registers
        W dot[2] = {};
#pragma unroll
        for (int e = 0; e < D; e += 4) {
          const Four<W> v = *reinterpret_cast<const Four<W>*>(&refs[j0 + j][e]);
#pragma unroll
          for (int k = 0; k < 4; ++k) dot[k % 2] += y[e + k] * v.at[k];
        }
        const W whole = dot[0] + dot[1] - half_alpha * norms[j0 + j];
        score[j] = j0 + j < count ? whole : W(-INFINITY);
      }
      W now = best;
#pragma unroll
      for (int j = 0; j < BATCH; ++j) now = score[j] > now ? score[j] : now;
      if (now > best) {
        const W keep = best == -INFINITY ? W(0) : power_of_two((best - now) * log2_rate);
        best = now;
        total *= keep;
        tile_total *= keep;
#pragma unroll
        for (int e = 0; e < D; ++e) sum[e] *= keep;
      }
      W batch_total = 0;
#pragma unroll
      for (int j = 0; j < BATCH; ++j) {
        p[j] = j0 + j < count ? power_of_two((score[j] - best) * log2_rate) : W(0);
        batch_total += p[j];
      }
      tile_total += batch_total;
      asm volatile("" ::: "memory");  // reads the batch again: in registers it would not fit
#pragma unroll
      for (int e = 0; e < D; e += 4) {
        W add[4] = {};
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
          const Four<W> v = *reinterpret_cast<const Four<W>*>(&refs[j0 + j][e]);
#pragma unroll
          for (int k = 0; k < 4; ++k) add[k] += p[j] * v.at[k];
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[e + k] += add[k];
      }
    }
    total += tile_total;
    const bool last = base + TILE >= end;
    if (last || (base - begin) / TILE % FLUSH_TILES == FLUSH_TILES - 1) flush();
  }
  if (begin >= end) flush();

  if (local >= parts.rows) return;
  parts.best[split * parts.rows + local] = best;
  parts.total[split * parts.rows + local] = total;
}

// One thread per element of the output.
__global__ void merge_kernel(const Inputs in, const WorkList work, const Parts parts, int tile_d) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (item >= parts.rows * in.d) return;
  const int64_t local = item / in.d, e = item % in.d, i = parts.first_row + local;
  const Row& row = work.rows[i];
  const int64_t at = row.index * in.d + e;
  if (work.first_tile[i] == work.first_tile[i + 1]) {
    store_as(in.out, at, NAN);
    if (in.lse.data && e == 0) store_as(in.lse, row.index, NAN);
    return;
  }
  const double rate = row.rate();
  double best = -INFINITY;
  for (int64_t s = 0; s < parts.splits; ++s) best = fmax(best, parts.best[s * parts.rows + local]);
  double total = isfinite(best) ? 0.0 : NAN, sum = 0;
  for (int64_t s = 0; s < parts.splits; ++s) {
    const int64_t slot = s * parts.rows + local;
    const double own = parts.best[slot];
    if (own == -INFINITY && parts.total[slot] == 0) continue;  // no reference in this part
    const double weight = exp(rate * (own - best));
    total += weight * parts.total[slot];
    sum += weight * parts.sums[slot * tile_d + e];
  }
  const double mean = parts.centre[e] + sum / total;
  store_as(in.out, at, row.a * load_as<double>(in.x, at) + row.b * mean);
  if (in.lse.data && e == 0) {
    double square = 0;
    for (int64_t k = 0; k < in.d; ++k) {
      const double y = row.sign * load_as<double>(in.x, at + k) - row.alpha * parts.centre[k];
      square = fma(y, y, square);
    }
    store_as(
        in.lse, row.index,
        log(total) + rate * best - square / (2 * row.sigma * row.sigma) + 0.5 * static_cast<double>(in.d));
  }
}

template <typename W, int D>
bool launch_if(const Inputs& in, const WorkList& work, const Parts& parts, const Plan& plan,
               cudaStream_t stream) {
  if (plan.wide != (sizeof(W) == 8) || plan.tile_d != D) return false;
  const dim3 grid(static_cast<unsigned>((parts.rows + plan.tile_rows - 1) / plan.tile_rows),
                  static_cast<unsigned>(plan.splits));
  small_kernel<W, D><<<grid, THREADS, 0, stream>>>(in, work, parts);
  return true;
}

}  // namespace

void run_small(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream) {
  if (!plan.wide && plan.tile_d <= 16) return run_small_float(op, in, plan, workspace, stream);
  Carver carver(workspace);
  const WorkList work = build_work_list(in, TILE, carver.take<char>(work_list_bytes(in.n, in.k)), stream);
  check_launch(op);
  const int tile_d = static_cast<int>(plan.tile_d);
  Parts parts;
  parts.splits = plan.splits;
  const int64_t tiles = (in.m + TILE - 1) / TILE;
  parts.split_refs = (tiles + plan.splits - 1) / plan.splits * TILE;
  parts.centre = carver.take<float>(tile_d);
  parts.y = carver.take<double>(plan.rows_per_pass * tile_d);
  parts.sums = carver.take<double>(plan.splits * plan.rows_per_pass * tile_d);
  parts.best = carver.take<double>(plan.splits * plan.rows_per_pass);
  parts.total = carver.take<double>(plan.splits * plan.rows_per_pass);
  centre_kernel<<<1, 64, 0, stream>>>(in, parts.centre, tile_d);
  check_launch(op);
  for (parts.first_row = 0; parts.first_row < in.n; parts.first_row += plan.rows_per_pass) {
    parts.rows = std::min(plan.rows_per_pass, in.n - parts.first_row);
    const int64_t prepared = parts.rows * tile_d;
    prepare_kernel<<<static_cast<unsigned>((prepared + 255) / 256), 256, 0, stream>>>(in, work, parts,
                                                                                      tile_d);
    check_launch(op);
    const bool launched = launch_if<double, 4>(in, work, parts, plan, stream) ||
                          launch_if<double, 8>(in, work, parts, plan, stream) ||
                          launch_if<float, 32>(in, work, parts, plan, stream);
    if (!launched)
      throw std::runtime_error(std::string("svel::") + op + ": no compiled kernel for the planned tile");
    check_launch(op);
    const int64_t items = parts.rows * in.d;
    merge_kernel<<<static_cast<unsigned>((items + 255) / 256), 256, 0, stream>>>(in, work, parts, tile_d);
    check_launch(op);
  }
}

}  // namespace svel::cuda
