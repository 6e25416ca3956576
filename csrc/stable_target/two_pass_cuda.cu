// Two passes over the references, for samples that no thread block holds (D > 16,384) and for float64:
// scores, softmax, weighted sum. Bytes: the references twice (the second time often from the L2), 16
// references' scores per tile and part of D. Operations per pair and element: 5. Rows go in passes of
// plan.rows_per_pass, which bounds the workspace.
//
// W: the type of all arithmetic, float or double. T, EV: element and elements per 16-byte load; EV = 1 with T
// = W: any dtype and alignment, by plain loads.
#include "stable_target/launch.cuh"

namespace svel::cuda {
namespace {

constexpr int TILE = TWO_PASS_TILE_REFS;
constexpr int SCORE_THREADS = 128;
constexpr int SCORE_STEP = 8 * SCORE_THREADS;  // elements of D per step of a block
constexpr int SOFTMAX_THREADS = 256;
constexpr int SUM_THREADS = 64;
constexpr int CENTRE_REFS = 4;  // references whose mean is the centre
constexpr int FLUSH_TILES =
    64;  // tiles summed before they join the total: float32 error does not grow with M

template <typename W>
struct Pass {  // sorted rows [first_row, first_row + rows)
  int64_t first_row, rows;
  int64_t part_length;  // elements of D per part, a multiple of SCORE_STEP
  int parts;
  W* centres;        // (rows, d)
  W* scores;         // (tiles, TILE, parts); after softmax_kernel part 0 holds the weights
  W* source_scores;  // (rows, parts), likewise
  double* y_square;  // (rows, parts)
  double* inverse;   // (rows,) 1 / sum of weights
};

// EV elements of reference `index` from element e on.
template <typename T, int EV, typename W>
__device__ void read_reference(const Inputs& in, int64_t index, int64_t e, W (&out)[EV]) {
  const int64_t at = index * in.d + e;
  if constexpr (EV == 1) {
    out[0] = load_as<W>(in.refs, at);
  } else {
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(in.refs.data) + at));
    const T* values = reinterpret_cast<const T*>(&raw);
#pragma unroll
    for (int k = 0; k < EV; ++k) out[k] = to_float(values[k]);
  }
}

template <typename W>
__global__ void centre_kernel(const Inputs in, const WorkList work, const Pass<W> pass) {
  const int64_t slices = (in.d + blockDim.x - 1) / blockDim.x;
  const int64_t local = blockIdx.x / slices, i = pass.first_row + local;
  const int64_t e = blockIdx.x % slices * blockDim.x + threadIdx.x;
  if (e >= in.d || work.first_tile[i] == work.first_tile[i + 1]) return;
  const Row& row = work.rows[i];
  const Span span = tile_span(in, work, row, 0);
  const int count = span.count < CENTRE_REFS ? span.count : CENTRE_REFS;
  W mean = 0;
  for (int j = 0; j < count; ++j)
    mean += load_as<W>(in.refs, (span.group * in.m + span.first + j) * in.d + e);
  pass.centres[local * in.d + e] = count ? mean / count : load_as<W>(in.source, row.index * in.d + e);
}

// Parts of the scores (y - alpha/2 d_j) . d_j of one tile of references, and for the first tile of a row
// those of its source and of |y|^2. Work items: (tile, part of D).
template <typename T, int EV, typename W>
__global__ void __launch_bounds__(SCORE_THREADS)
    score_kernel(const Inputs in, const WorkList work, const Pass<W> pass) {
  __shared__ W exchange[SCORE_THREADS / 32][TILE];
  __shared__ W scratch[33];
  __shared__ double wide_scratch[33];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t begin = work.first_tile[pass.first_row], end = work.first_tile[pass.first_row + pass.rows];
  const int64_t items = (end - begin) * pass.parts;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t tile = begin + item / pass.parts;
    const int part = static_cast<int>(item % pass.parts);
    const int64_t i = find_prefix(work.first_tile, pass.first_row, pass.first_row + pass.rows, tile);
    const Row row = work.rows[i];
    const Span span = tile_span(in, work, row, tile - work.first_tile[i]);
    const int64_t first = span.group * in.m + span.first, local = i - pass.first_row;
    const bool starts = tile == work.first_tile[i];
    const W half_alpha = static_cast<W>(0.5 * row.alpha);

    W score[TILE] = {}, source_score = 0;
    double square = 0;
    const int64_t stop = (part + 1) * pass.part_length < in.d ? (part + 1) * pass.part_length : in.d;
    for (int64_t base = part * pass.part_length; base < stop; base += SCORE_THREADS * EV) {
      const int64_t e = base + threadIdx.x * EV;
      if (e >= stop) continue;
      W c[EV], y[EV];
#pragma unroll
      for (int k = 0; k < EV; ++k) {
        c[k] = pass.centres[local * in.d + e + k];
        const double exact = row.sign * load_as<double>(in.x, row.index * in.d + e + k) - row.alpha * c[k];
        y[k] = static_cast<W>(exact);
        if (starts) {
          square = fma(exact, exact, square);
          if (in.source.data) {
            const W difference = load_as<W>(in.source, row.index * in.d + e + k) - c[k];
            source_score += (y[k] - half_alpha * difference) * difference;
          }
        }
      }
      if (span.count == 0) continue;
#pragma unroll
      for (int j = 0; j < TILE;
           ++j) {  // past the last valid one that is read again, so that all loads are in flight
        W r[EV];
        read_reference<T, EV, W>(in, first + min(j, span.count - 1), e, r);
        W sum = 0;
#pragma unroll
        for (int k = 0; k < EV; ++k) {
          const W difference = r[k] - c[k];
          sum += (y[k] - half_alpha * difference) * difference;
        }
        score[j] += sum;
      }
    }

#pragma unroll
    for (int j = 0; j < TILE; ++j) {
      for (int offset = 16; offset > 0; offset /= 2)
        score[j] += __shfl_xor_sync(0xffffffffu, score[j], offset);
      if (lane == 0) exchange[warp][j] = score[j];
    }
    __syncthreads();
    if (threadIdx.x < TILE) {
      const int j = threadIdx.x;
      W sum = 0;
      for (int w = 0; w < SCORE_THREADS / 32; ++w) sum += exchange[w][j];
      const int64_t slot = (tile - begin) * TILE + j;
      pass.scores[slot * pass.parts + part] = j < span.count ? sum : static_cast<W>(-INFINITY);
    }
    __syncthreads();
    if (starts && in.source.data) {
      const W sum = block_sum<W>(source_score, scratch);
      if (threadIdx.x == 0) pass.source_scores[local * pass.parts + part] = sum;
    }
    if (starts && in.lse.data) {
      const double sum = block_sum<double>(square, wide_scratch);
      if (threadIdx.x == 0) pass.y_square[local * pass.parts + part] = sum;
    }
  }
}

// Scores to weights, one block per row.
template <typename W>
__global__ void __launch_bounds__(SOFTMAX_THREADS)
    softmax_kernel(const Inputs in, const WorkList work, const Pass<W> pass) {
  __shared__ double scratch[33];
  const int64_t local = blockIdx.x, i = pass.first_row + local;
  const Row row = work.rows[i];
  const int64_t begin = (work.first_tile[i] - work.first_tile[pass.first_row]) * TILE;
  const int64_t end = (work.first_tile[i + 1] - work.first_tile[pass.first_row]) * TILE;
  if (begin == end) {
    if (threadIdx.x == 0 && in.lse.data) store_as(in.lse, row.index, NAN);
    return;
  }
  const auto whole = [&](const W* parts) {
    double sum = 0;
    for (int part = 0; part < pass.parts; ++part) sum += parts[part];
    return sum;
  };
  W* const own = pass.source_scores + local * pass.parts;
  const bool with_source = in.source.data;
  double best = with_source ? whole(own) : -INFINITY;
  for (int64_t j = begin + threadIdx.x; j < end; j += SOFTMAX_THREADS) {
    const double score = whole(pass.scores + j * pass.parts);
    best = score > best || best != best ? score : best;
  }
  best = block_max<double>(best, scratch);
  const double rate = row.rate();
  const auto weight = [&](double score) { return score == -INFINITY ? 0.0 : exp(rate * (score - best)); };
  double total = 0;
  for (int64_t j = begin + threadIdx.x; j < end; j += SOFTMAX_THREADS) {
    W* const parts = pass.scores + j * pass.parts;
    const W p = static_cast<W>(weight(whole(parts)));
    parts[0] = p;
    total += p;
  }
  total = block_sum<double>(total, scratch);
  if (threadIdx.x != 0) return;
  if (with_source) {
    const double score = whole(own);
    own[0] = static_cast<W>(weight(score));
    total += isfinite(score) ? own[0] : NAN;
  }
  if (!isfinite(best)) total = NAN;
  pass.inverse[local] = 1.0 / total;
  if (in.lse.data) {
    double square = 0;
    for (int part = 0; part < pass.parts; ++part) square += pass.y_square[local * pass.parts + part];
    store_as(
        in.lse, row.index,
        log(total) + rate * best - square / (2 * row.sigma * row.sigma) + 0.5 * static_cast<double>(in.d));
  }
}

// The weighted sum over one slice of D of one row, and the output.
template <typename T, int EV, typename W>
__global__ void __launch_bounds__(SUM_THREADS)
    sum_kernel(const Inputs in, const WorkList work, const Pass<W> pass) {
  const int64_t slices = (in.d + SUM_THREADS * EV - 1) / (SUM_THREADS * EV);
  const int64_t local = blockIdx.x / slices, i = pass.first_row + local;
  const int64_t e = (blockIdx.x % slices * SUM_THREADS + threadIdx.x) * EV;
  if (e >= in.d) return;
  const Row row = work.rows[i];
  const int64_t begin = work.first_tile[i], end = work.first_tile[i + 1];
  const int64_t at = row.index * in.d + e;
  if (begin == end) {
    for (int k = 0; k < EV; ++k) store_as(in.out, at + k, NAN);
    return;
  }
  W c[EV], recent[EV] = {};
  double sum[EV] = {};
#pragma unroll
  for (int k = 0; k < EV; ++k) c[k] = pass.centres[local * in.d + e + k];
  for (int64_t tile = begin; tile < end; ++tile) {
    const Span span = tile_span(in, work, row, tile - begin);
    const int64_t first = span.group * in.m + span.first;
    const W* const weights = pass.scores + (tile - work.first_tile[pass.first_row]) * TILE * pass.parts;
    W p[TILE];
    bool any = false;
#pragma unroll
    for (int j = 0; j < TILE; ++j) {
      p[j] = weights[j * pass.parts];
      any = any || (p[j] != 0 && span.count > 0);
    }
    if (any) {
      W add[EV] = {};
#pragma unroll
      for (int j = 0; j < TILE; ++j) {
        W r[EV];
        read_reference<T, EV, W>(in, first + min(j, span.count - 1), e, r);
#pragma unroll
        for (int k = 0; k < EV; ++k) add[k] += p[j] * (r[k] - c[k]);
      }
#pragma unroll
      for (int k = 0; k < EV; ++k) recent[k] += add[k];
    }
    if ((tile - begin) % FLUSH_TILES == FLUSH_TILES - 1) {
#pragma unroll
      for (int k = 0; k < EV; ++k) {
        sum[k] += recent[k];
        recent[k] = 0;
      }
    }
  }
  const double inverse = pass.inverse[local];
  const W own = in.source.data ? pass.source_scores[local * pass.parts] : 0;
#pragma unroll
  for (int k = 0; k < EV; ++k) {
    sum[k] += recent[k];
    if (in.source.data) sum[k] += static_cast<double>(own) * (load_as<W>(in.source, at + k) - c[k]);
    const double mean = c[k] + sum[k] * inverse;
    store_as(in.out, at + k, row.a * load_as<double>(in.x, at + k) + row.b * mean);
  }
}

template <typename T, int EV, typename W>
void run(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream) {
  Carver carver(workspace);
  const WorkList work = build_work_list(in, TILE, carver.take<char>(work_list_bytes(in.n, in.k)), stream);
  check_launch(op);
  Pass<W> pass;
  const int64_t tiles = std::max<int64_t>(1, in.k * ((in.m + TILE - 1) / TILE));
  pass.parts = static_cast<int>(plan.splits);
  const int64_t steps = (in.d + SCORE_STEP - 1) / SCORE_STEP;
  pass.part_length = (steps + pass.parts - 1) / pass.parts * SCORE_STEP;
  pass.centres = carver.take<W>(plan.rows_per_pass * in.d);
  pass.scores = carver.take<W>(plan.rows_per_pass * tiles * TILE * pass.parts);
  pass.source_scores = carver.take<W>(plan.rows_per_pass * pass.parts);
  pass.y_square = carver.take<double>(plan.rows_per_pass * pass.parts);
  pass.inverse = carver.take<double>(plan.rows_per_pass);
  for (pass.first_row = 0; pass.first_row < in.n; pass.first_row += plan.rows_per_pass) {
    pass.rows = std::min(plan.rows_per_pass, in.n - pass.first_row);
    const auto grid = [&](int64_t step) {
      return static_cast<unsigned>(pass.rows * ((in.d + step - 1) / step));
    };
    centre_kernel<W><<<grid(256), 256, 0, stream>>>(in, work, pass);
    check_launch(op);
    score_kernel<T, EV, W><<<static_cast<unsigned>(plan.blocks), SCORE_THREADS, 0, stream>>>(in, work, pass);
    check_launch(op);
    softmax_kernel<W><<<static_cast<unsigned>(pass.rows), SOFTMAX_THREADS, 0, stream>>>(in, work, pass);
    check_launch(op);
    sum_kernel<T, EV, W><<<grid(SUM_THREADS * EV), SUM_THREADS, 0, stream>>>(in, work, pass);
    check_launch(op);
  }
}

}  // namespace

void run_two_pass(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream) {
  if (plan.wide) return run<double, 1, double>(op, in, plan, workspace, stream);
  if (!plan.aligned) return run<float, 1, float>(op, in, plan, workspace, stream);
  if (in.refs.dtype == Dtype::f16) return run<__half, 8, float>(op, in, plan, workspace, stream);
  if (in.refs.dtype == Dtype::bf16) return run<__nv_bfloat16, 8, float>(op, in, plan, workspace, stream);
  run<float, 4, float>(op, in, plan, workspace, stream);
}

}  // namespace svel::cuda
