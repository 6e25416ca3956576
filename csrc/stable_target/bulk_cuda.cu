// What launches of the bulk kernel for all dtypes share.
#include <map>
#include <mutex>
#include <type_traits>
#include <utility>

#include "common/gather.cuh"
#include "stable_target/bulk_launch.cuh"

namespace svel::cuda {
namespace {

__global__ void __launch_bounds__(LIST_THREADS)
    unit_kernel(Inputs in, UnitList list, int* arrived, int64_t counts, int tile_refs, int most_rows) {
  __shared__ uint64_t keys[CHUNK];
  __shared__ int64_t scratch[LIST_THREADS / 32];
  allow_next_launch();
  for (int64_t i = threadIdx.x; i < counts; i += blockDim.x) arrived[i] = 0;
  build_units(in, list, tile_refs, most_rows, keys, scratch);
}

// A list of up to SHORT_ROWS rows, by one block. With rows of other processes this begins the round: the
// block hears of them, while others bring the own rows x to where they are read.
constexpr int SHORT_ROWS = 2048, SHORT_THREADS = 1024;
using ShortList = ListRows<SHORT_ROWS>;

template <bool DEAL>
__global__ void __launch_bounds__(SHORT_THREADS)
    short_list_kernel(const __grid_constant__ Gather gather, const __grid_constant__ Inputs in,
                      const UnitList list, int* arrived, int64_t counts, int tile_refs, int most_rows) {
  extern __shared__ __align__(16) char memory[];
  ShortList& scratch = *reinterpret_cast<ShortList*>(memory);
  const Peers& peers = gather.peers;
  const int tid = static_cast<int>(threadIdx.x);
  const unsigned copies = gridDim.x - 1;
  Header* const own = peers.parts > 0 ? peers.header(peers.part) : nullptr;
  const unsigned round = own ? own->round + 1 : 0;
  allow_next_launch();
  if (blockIdx.x > 0) {
    __shared__ bool last;
    for (int i = 0; i < gather.tensors; ++i) {
      if (gather.given[i].stays)
        put(gather.given[i], peers, int64_t{blockIdx.x - 1} * SHORT_THREADS + tid,
            int64_t{copies} * SHORT_THREADS);
    }
    if (is_last_block(own, copies, &last) && tid < peers.parts)
      raise_flag(&peers.header(tid)->arrived[peers.part], round);
    return;
  }
  if (own) send_words(gather, round);
  for (int64_t i = tid; i < counts; i += SHORT_THREADS) arrived[i] = 0;
  read_groups(in, scratch);
  if (own) take_words(gather, round);
  __syncthreads();
  read_keys(in, scratch);
  __syncthreads();
  build_short_list<DEAL, SHORT_THREADS>(in, list, scratch, tile_refs, most_rows, tid,
                                        [] { __syncthreads(); });
  if (!own) return;
  if (copies > 0 && tid < peers.parts) await_flag(&own->arrived[tid], round, peers, tid);
  __syncthreads();
  if (tid == 0) own->round = round;
}

// Where each block builds the list, there is still this to do, beside the bulk kernel.
__global__ void zero_kernel(int* arrived, int64_t counts) {
  allow_next_launch();
  for (int64_t i = threadIdx.x; i < counts; i += blockDim.x) arrived[i] = 0;
}

// Blocks to a multiprocessor: of few rows, of many.
constexpr int END_THREADS = 128, END_FEW_BLOCKS = 4, END_BLOCKS = 1024 / END_THREADS;
constexpr unsigned WARP = 0xffffffffu;

// What a row's parts weigh beside the heaviest. Each warp finds that for itself, the first part and NEAR
// others by a lane for each; the weights of those beyond are in shared memory.
constexpr int NEAR = 31;
struct RowWeights {
  double top, total;    // log2_weight of the heaviest; sum over all that they hold
  double mine, source;  // of the lane's part; of the row's source
  float wrong;          // the largest PartRow::scale that the lane knows of
};

// The results of an own row over the elements `at`, from its mean over this part and those that the others
// have left in the mailbox, when these are there; false where it is in doubt: in_doubt(share of this part),
// see EndingRow. All threads.
template <int VECTORS, typename InDoubt>
__device__ __forceinline__ bool merge_at_home(const Inputs& in, const AtHome& home, int64_t row, double lse,
                                              const InDoubt& in_doubt, const int (&at)[VECTORS],
                                              const bool (&within)[VECTORS], const float4 (&x)[VECTORS],
                                              float4 (&mean)[VECTORS]) {
  const int q = static_cast<int>(threadIdx.x);
  const double t = clamp_time(load_as<double>(in.time_or_alpha, in.part * in.rows_each + row));
  const PredictionCoefficients at_time =
      prediction_coefficients(home.prediction, path_coefficients(in.path, t));
  char* const mailbox = home.mailbox;
  const Header* const own = reinterpret_cast<const Header*>(mailbox);
  if (q < in.parts && q != in.part)
    await_flag(&own->done[q], own->round, {{}, in.part, in.parts, home.patience}, q);
  __syncthreads();
  double top = lse, total = 1, share = 1;  // share: of this part
#pragma unroll 1
  for (int of = 0; of < in.parts; ++of) {
    if (of == in.part) continue;
    const int64_t index = of * in.rows_each + row;
    const double its = __ldcg(reinterpret_cast<const double*>(mailbox + in.lse_at) + index);
    float4 other[VECTORS];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      other[v] = make_float4(0, 0, 0, 0);
      if (within[v])
        other[v] = __ldcg(reinterpret_cast<const float4*>(
            reinterpret_cast<const float*>(mailbox + in.mean_at) + index * in.d + at[v]));
    }
    const double most = its >= top || its != its ? its : top;
    const double so_far = power(LOG2_E * (top - most)), weight = power(LOG2_E * (its - most));
    const float a = static_cast<float>(so_far), b = static_cast<float>(weight);
    total = fma(so_far, total, weight), share *= so_far, top = most;
    const auto add = [&](float& to, float value) {  // the mean over nothing is NaN
      to = (a > 0 ? a * to : a) + (b > 0 ? b * value : b);
    };
#pragma unroll
    for (int v = 0; v < VECTORS; ++v)
      add(mean[v].x, other[v].x), add(mean[v].y, other[v].y), add(mean[v].z, other[v].z),
          add(mean[v].w, other[v].w);
  }
  if (in_doubt(static_cast<float>(share / total))) return false;
  const double by = at_time.b / total;
  const auto result = [&](float x, float sum) {
    return static_cast<float>(fma(at_time.a, static_cast<double>(x), by * static_cast<double>(sum)));
  };
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    if (within[v])
      *reinterpret_cast<float4*>(home.merged + row * in.d + at[v]) =
          make_float4(result(x[v].x, mean[v].x), result(x[v].y, mean[v].y), result(x[v].z, mean[v].z),
                      result(x[v].w, mean[v].w));
  }
  return true;
}

// A row that products_kernel has left in parts.
struct EndingRow {
  const ProductsParts& parts;
  const ProductsRow& left;
  const int others, d;  // others: parts beside the first; negative: nothing to read
  const int64_t to_next = int64_t{d} * parts.unit_rows;  // from a part's sums

  __device__ __forceinline__ int64_t place(int j) const {
    return int64_t{left.from + 1 + j} * parts.unit_rows + left.row;
  }
  __device__ __forceinline__ double2 weights(int j) const {  // log2_weight, total
    return __ldcg(reinterpret_cast<const double2*>(&parts.others[place(j)].log2_weight));
  }
  __device__ __forceinline__ float scale(int j) const { return __ldcg(&parts.others[place(j)].scale); }
  __device__ __forceinline__ const float* sums(int j) const { return parts.sums + place(j) * d; }

  // Whether it shows that the row's weights are wrong, in a result of which they are `share`. By whole warps.
  // far: weights beyond NEAR.
  __device__ __forceinline__ bool in_doubt(const RowWeights& its, const double* far, float share) const {
    const double all = its.total;  // mostly there is not much beside the best
    const float wrong = share * its.wrong;
    const bool clear = wrong * fmaxf(static_cast<float>(all - 1), 0) <=
                       PRODUCTS_MOST_ERROR * static_cast<float>(all);  // not of infinite errors
    if (__builtin_expect(__all_sync(WARP, clear), 1)) return false;
    Equals best;
#pragma unroll 1
    for (int j = static_cast<int>(threadIdx.x) % 32 - 1; j < others; j += 32) {
      if ((j < NEAR ? its.mine : far[j]) != 1) continue;
      const PartRow part = j < 0 ? left.own : load_part(parts.others + place(j));
      best.add(part.lead, part.print);
    }
    const unsigned those = __ballot_sync(WARP, best.count > 0);
    const int print = __shfl_sync(WARP, best.print, __ffs(those) - 1);
    int equals = __reduce_add_sync(WARP, best.print == print ? best.count : 0);
    if (its.source == 1) equals = max(equals, 1);
    return __any_sync(WARP, is_doubtful(wrong, all, equals));
  }
};

// The score of a row's source, in units of log 2, by all threads.
__device__ __forceinline__ double score_of_source(const Inputs& in, int64_t index, double* scratch) {
  const float* const x = static_cast<const float*>(in.x.data) + index * in.d;
  const float* const source = static_cast<const float*>(in.source.data) + index * in.d;
  const Row row = row_coefficients(in, index);
  double score = 0, square = 0;
  for (int64_t i = threadIdx.x; i < in.d; i += END_THREADS) {
    const double s = source[i], y = row.sign * x[i];
    score = fma(fma(-0.5 * row.alpha, s, y), s, score);
    square = fma(y, y, square);
  }
  score = row.rate() * fma(score, 0.0, score);  // what is not finite becomes NaN
  if (in.lse.data || in.labels[index] < 0) score -= 0.5 * square / (row.sigma * row.sigma);
  return LOG2_E * block_sum<double>(score, scratch);
}

template <bool SOURCE>
__device__ __forceinline__ RowWeights weigh_parts(const Inputs& in, int64_t index, const EndingRow& row,
                                                  double* far, double* scratch) {
  const PartRow& first = row.left.own;
  if (row.others < 0) return {first.log2_weight, NAN, 1, 0, 0};
  if (!SOURCE && row.others == 0) return {first.log2_weight, first.total, 1, 0, first.scale};
  const int part = static_cast<int>(threadIdx.x) % 32 - 1;
  double2 mine = make_double2(-INFINITY, 0);
  float wrong = 0;
  if (part < 0) {
    mine = make_double2(first.log2_weight, first.total), wrong = first.scale;
  } else if (part < row.others) {
    mine = row.weights(part), wrong = row.scale(part);
  }
  const auto greater = [](double a, double b) { return a >= b || b != b ? a : b; };
  double top = mine.x, source = 0;
  if constexpr (SOURCE) {  // a part like any other
    source = score_of_source(in, index, scratch);
    top = greater(top, source);
  }
#pragma unroll 1
  for (int j = NEAR + 1 + part; j < row.others; j += 32) top = greater(top, row.weights(j).x);
#pragma unroll 1
  for (int hop = 16; hop > 0; hop /= 2) top = greater(top, __shfl_xor_sync(WARP, top, hop));
  const double weight = power(mine.x - top);
  double total = weight * mine.y;
#pragma unroll 1
  for (int j = NEAR + 1 + part; j < row.others; j += 32) {
    const double2 its = row.weights(j);
    far[j] = power(its.x - top);
    total = fma(far[j], its.y, total), wrong = fmaxf(wrong, row.scale(j));
  }
#pragma unroll 1
  for (int hop = 16; hop > 0; hop /= 2) total += __shfl_xor_sync(WARP, total, hop);
  if constexpr (SOURCE) source = power(source - top), total += source;
  return {top, total, weight, source, wrong};
}

// Four elements of a row's sum over its parts.
template <typename Sum>
struct FourSums {
  Sum v[4] = {};

  __device__ __forceinline__ void add(Sum weight, float4 part) {
    v[0] = fma(weight, static_cast<Sum>(part.x), v[0]), v[1] = fma(weight, static_cast<Sum>(part.y), v[1]);
    v[2] = fma(weight, static_cast<Sum>(part.z), v[2]), v[3] = fma(weight, static_cast<Sum>(part.w), v[3]);
  }
  // a x + by sum; the sum by itself
  __device__ __forceinline__ float4 result(double a, float4 x, double by) const {
    return make_float4(static_cast<float>(fma(a, static_cast<double>(x.x), by * v[0])),
                       static_cast<float>(fma(a, static_cast<double>(x.y), by * v[1])),
                       static_cast<float>(fma(a, static_cast<double>(x.z), by * v[2])),
                       static_cast<float>(fma(a, static_cast<double>(x.w), by * v[3])));
  }
  __device__ __forceinline__ float4 mean(double by) const {
    return make_float4(static_cast<float>(by * v[0]), static_cast<float>(by * v[1]),
                       static_cast<float>(by * v[2]), static_cast<float>(by * v[3]));
  }
};

// The threads of a block take LANES by LANES shares of the parts: to the first of them the sum over all.
template <int LANES, int VECTORS, typename Sum>
__device__ __forceinline__ void add_shares(FourSums<Sum> (&sum)[VECTORS]) {
  constexpr int SHARES = END_THREADS / LANES;
  __shared__ Sum sums[SHARES][VECTORS][LANES][4];
  const int lane = threadIdx.x % LANES, share = threadIdx.x / LANES;
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    for (int k = 0; k < 4; ++k) sums[share][v][lane][k] = sum[v].v[k];
  }
  __syncthreads();
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    for (int k = 0; k < 4; ++k) {
      for (int other = 1; other < SHARES; ++other) sum[v].v[k] += sums[other][v][lane][k];
    }
  }
}

template <int LANES, int VECTORS>
__host__ __device__ __forceinline__ unsigned chunks_of_row(const Inputs& in) {
  return ceil_div(static_cast<unsigned>(in.d), 4u * LANES * VECTORS);
}

// The same for a row whose weights would show that they are wrong: see merge_aligned. Each block that has
// some of the row's elements does that for itself; few rows are such, and of few references. wrong: see
// RowWeights; where it is finite, other processes have the row by inexact scores, and beside these it stays
// at their level.
template <int LANES, int VECTORS, bool MERGES>
__device__ __noinline__ void end_aligned(const Inputs& in, const ProductsParts& parts, unsigned number,
                                         unsigned chunk, float wrong, double* scratch) {
  constexpr int WARPS = END_THREADS / 32;
  __shared__ AlignedMemory<WARPS> memory;
  const int64_t index = number + in.part * in.rows_each;
  const ProductsRow left = parts.rows[index];
  RowState row;
  name_row(in, index, row);
  set_row(in, index, row);
  const float* const x = static_cast<const float*>(row.x) + index * in.d;
  double shift = 0;
  __syncthreads();  // what is shared is read
  if (in.lse.data || in.labels[index] < 0) {
    for (int64_t e = threadIdx.x; e < in.d; e += END_THREADS)
      shift = fma(static_cast<double>(x[e]), static_cast<double>(x[e]), shift);
    shift = row.per_square * block_sum<double>(shift, scratch);
  }
  int at[VECTORS];
  bool within[VECTORS];
  double sum[VECTORS][4] = {};
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    at[v] = static_cast<int>(4 * ((chunk * VECTORS + v) * LANES + threadIdx.x));
    within[v] = static_cast<int>(threadIdx.x) < LANES && at[v] < in.d;
  }
  const auto wait = [] { __syncthreads(); };
  const AlignedRow aligned =
      in.refs.dtype == Dtype::f16
          ? merge_aligned<__half, WARPS>(in, row, parts, left, shift, wait, memory, 0, at, within, sum)
          : merge_aligned<__nv_bfloat16, WARPS>(in, row, parts, left, shift, wait, memory, 0, at, within,
                                                sum);
  PartRow all = aligned.all;
  if (MERGES && !__syncthreads_or(wrong == INFINITY)) all.log2_weight -= aligned.risen;
  if (in.source.data) {
    const float* const source = static_cast<const float*>(in.source.data) + index * in.d;
    const Joined joined = join(all, {score_of_source(in, index, scratch), 1, 0, 0, 0, 0});
    all = joined.all;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      for (int k = 0; k < 4; ++k) {
        if (within[v]) sum[v][k] = fma(joined.by_first, sum[v][k], joined.by_second * source[at[v] + k]);
      }
    }
  }
  const double by = (MERGES ? 1 : left.b) / all.total;
  if constexpr (MERGES) {
    float4 mine[VECTORS], mean[VECTORS];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      mine[v] = make_float4(0, 0, 0, 0);
      if (within[v])
        mine[v] = *reinterpret_cast<const float4*>(parts.home.x + int64_t{number} * in.d + at[v]);
      mean[v] = make_float4(static_cast<float>(by * sum[v][0]), static_cast<float>(by * sum[v][1]),
                            static_cast<float>(by * sum[v][2]), static_cast<float>(by * sum[v][3]));
    }
    const auto no_doubt = [](float) { return false; };
    merge_at_home<VECTORS>(in, parts.home, number, lse_of_row(in, all), no_doubt, at, within, mine, mean);
  } else {
    float* const to = static_cast<float*>(out_of(in, index).data) + index * in.d;
    const double a = in.mailboxes ? 0 : left.a;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      for (int k = 0; k < 4; ++k) {
        if (within[v])
          to[at[v] + k] = static_cast<float>(fma(a, static_cast<double>(x[at[v] + k]), by * sum[v][k]));
      }
    }
    if (in.lse.data && chunk == 0 && threadIdx.x == 0) write_lse(in, index, all);
  }
}

// A row's result over VECTORS times 4 LANES of D from what products_kernel has left. The threads of a block
// take LANES by LANES shares of the parts. MERGES: the result is over the parts of all processes. WAITED: for
// products_kernel, else that comes here, after what does not depend on it. What comes while the parts are
// weighed is parked in shared memory: there are no registers for it, and a spill would wait for each load.
// The code, too, comes from memory: rows of one part or two, most of them, run straight through little of it.
template <int LANES, int VECTORS, bool MERGES, bool SOURCE, bool WAITED>
__device__ __forceinline__ void end_row(const Inputs& in, const ProductsParts& parts, unsigned row,
                                        unsigned chunk) {
  constexpr int SHARES = END_THREADS / LANES;
  static_assert(!MERGES || SHARES == 1, "a thread has all of its elements");
  using Sum = std::conditional_t<(SHARES > 1), float, double>;  // few rows wait for its latency
  using Parked = float4[VECTORS][END_THREADS];                  // each thread its own
  extern __shared__ double weights[];                           // (blocks,) of the row's other parts
  __shared__ double scratch[33];
  __shared__ Parked x, first, early;  // early: of the first part that a thread adds
  __shared__ float4 of_row;           // ProductsRow::a, b
  const int64_t index = row + in.part * in.rows_each, from = index * in.d;
  const int d = static_cast<int>(in.d), tid = static_cast<int>(threadIdx.x);
  const int lane = SHARES > 1 ? tid % LANES : tid, share = SHARES > 1 ? tid / LANES : 0;
  int at[VECTORS];
  bool within[VECTORS];
#pragma unroll
  for (int v = 0; v < VECTORS; ++v)
    at[v] = static_cast<int>(4 * ((chunk * VECTORS + v) * LANES + lane)), within[v] = at[v] < d;
  const auto park = [&](Parked& to, const float* its) {
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      if (within[v]) copy_async(&to[v][tid], its + at[v]);
    }
  };
  if (MERGES) {
    park(x, parts.home.x + row * in.d);
  } else if (in.mailboxes) {  // a mean: a = 0
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) x[v][tid] = make_float4(0, 0, 0, 0);
  } else if (share == 0) {
    park(x, static_cast<const float*>(in.x.data) + from);
  }
  if (!WAITED) wait_for_previous_launch();
  if (share == 0) park(first, parts.firsts + from);
  if (!MERGES) copy_async(&of_row, reinterpret_cast<const float*>(&parts.rows[index].a));
  const ProductsRow left = parts.rows[index];
  const EndingRow ending{parts, left, left.to - left.from, d};
  const int others = ending.others;
  const float* part = ending.sums(share);  // of those that this thread adds, every SHARES-th
  if (share < others) park(early, part);
  const RowWeights its = weigh_parts<SOURCE>(in, index, ending, weights, scratch);
  const Sum mine = static_cast<Sum>(its.mine), by_first = __shfl_sync(WARP, mine, 0);
  const auto weight_of = [&](int j) {  // of no other part: any
    const Sum near = __shfl_sync(WARP, mine, min(j, NEAR - 1) + 1);
    return j < NEAR || j >= others ? near : static_cast<Sum>(weights[j]);
  };
  if (others > NEAR) __syncthreads();
  FourSums<Sum> sum[VECTORS];
  wait_copies();
  if (!MERGES && ending.in_doubt(its, weights, 1))
    return end_aligned<LANES, VECTORS, false>(in, parts, row, chunk, its.wrong, scratch);
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    if (within[v] && share == 0) sum[v].add(by_first, first[v][tid]);
  }
  if (others > 0) {
    const Sum by = weight_of(share);
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      if (within[v] && share < others) sum[v].add(by, early[v][tid]);
    }
  }
#pragma unroll(SHARES > 1 ? 4 : 1)
  for (int so_far = SHARES; so_far < others; so_far += SHARES) {
    const int j = so_far + share;
    const Sum by = weight_of(j);
    part += ending.to_next * SHARES;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      if (within[v] && j < others) sum[v].add(by, __ldcg(reinterpret_cast<const float4*>(part + at[v])));
    }
  }
  if constexpr (SHARES > 1) add_shares<LANES>(sum);
  if constexpr (SOURCE) {
    const float* const source = static_cast<const float*>(in.source.data) + from;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      if (within[v] && share == 0 && others >= 0)
        sum[v].add(static_cast<Sum>(its.source), *reinterpret_cast<const float4*>(source + at[v]));
    }
  }
  const double2 out_by = reinterpret_cast<const double2&>(of_row);
  const double by = (MERGES ? 1 : out_by.y) / its.total;
  const PartRow all{its.top, its.total, 0, 0, 0, 0};
  if constexpr (MERGES) {
    const double lse = others < 0 ? lse_of_nothing(in, index) : lse_of_row(in, all);
    float4 own[VECTORS], mean[VECTORS];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) own[v] = x[v][tid], mean[v] = sum[v].mean(by);
    const auto in_doubt = [&](float share) { return ending.in_doubt(its, weights, share); };
    if (!merge_at_home<VECTORS>(in, parts.home, row, lse, in_doubt, at, within, own, mean))
      end_aligned<LANES, VECTORS, true>(in, parts, row, chunk, its.wrong, scratch);
  } else {
    float* const out = static_cast<float*>(out_of(in, index).data) + from;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      if (within[v] && share == 0)
        *reinterpret_cast<float4*>(out + at[v]) = sum[v].result(out_by.x, x[v][tid], by);
    }
    if (in.lse.data && chunk == 0 && tid == 0) write_lse(in, index, all);
  }
}

// Grid: rows, those of this process, x chunks of D.
template <int LANES, int VECTORS, bool MERGES, bool SOURCE>
__global__ void __launch_bounds__(END_THREADS, LANES < END_THREADS ? END_FEW_BLOCKS : END_BLOCKS)
    end_kernel(const __grid_constant__ Inputs in, const __grid_constant__ ProductsParts parts) {
  const unsigned chunks = chunks_of_row<LANES, VECTORS>(in);
  end_row<LANES, VECTORS, MERGES, SOURCE, false>(in, parts, blockIdx.x / chunks, blockIdx.x % chunks);
}

// Of many rows, most of which have ended. Grid: any.
template <int LANES, int VECTORS>
__global__ void __launch_bounds__(END_THREADS, END_BLOCKS)
    end_open_kernel(const __grid_constant__ Inputs in, const __grid_constant__ ProductsParts parts) {
  const unsigned chunks = chunks_of_row<LANES, VECTORS>(in), all = static_cast<unsigned>(in.n) * chunks;
  wait_for_previous_launch();
#pragma unroll 1
  for (unsigned first = blockIdx.x; first < all; first += 32 * gridDim.x) {
    const unsigned mine = first + threadIdx.x % 32 * gridDim.x;
    bool open = mine < all;
    if (open) open = parts.rows[mine / chunks].to - parts.rows[mine / chunks].from != ROW_HAS_ENDED;
#pragma unroll 1
    for (unsigned left = __ballot_sync(WARP, open); left != 0; left &= left - 1) {
      const unsigned one = first + (__ffs(left) - 1) * gridDim.x;
      end_row<LANES, VECTORS, false, false, true>(in, parts, one / chunks, one % chunks);
      __syncthreads();  // weights are read
    }
  }
}

template <int LANES, int VECTORS>
bool launch_end_if(const char* op, const Inputs& in, const ProductsParts& parts, int64_t blocks,
                   int64_t multiprocessors, cudaStream_t stream) {
  const int64_t grid = (in.mailboxes ? in.rows_each : in.n) * chunks_of_row<LANES, VECTORS>(in);
  if (LANES < END_THREADS && (grid > END_FEW_BLOCKS * multiprocessors || parts.home.merged)) return false;
  constexpr bool MERGES = LANES == END_THREADS;
  const auto kernel = parts.home.merged ? end_kernel<LANES, VECTORS, MERGES, false>  // have no source
                      : in.source.data  ? end_kernel<LANES, VECTORS, false, true>
                                        : end_kernel<LANES, VECTORS, false, false>;
  launch_following(op, true, kernel, dim3(static_cast<unsigned>(grid)), END_THREADS, blocks * sizeof(double),
                   stream, in, parts);
  return true;
}

}  // namespace

bool has_short_list(int64_t n, int64_t k, int64_t m) {
  return n <= SHORT_ROWS && k <= OWN_LIST_GROUPS && m < int64_t{1} << 31;
}

// Few rows have many parts each.
void end_products(const char* op, const Inputs& in, const ProductsParts& parts, int64_t blocks,
                  int64_t multiprocessors, cudaStream_t stream) {
  if (parts.ends) {
    launch_following(op, true, end_open_kernel<END_THREADS, 2>,
                     dim3(static_cast<unsigned>(END_BLOCKS * multiprocessors)), END_THREADS,
                     blocks * sizeof(double), stream, in, parts);
    return;
  }
  launch_end_if<8, 1>(op, in, parts, blocks, multiprocessors, stream) ||
      launch_end_if<32, 1>(op, in, parts, blocks, multiprocessors, stream) ||
      launch_end_if<END_THREADS, 2>(op, in, parts, blocks, multiprocessors, stream);
}

void build_unit_list(const char* op, const Inputs& in, const UnitList& list, int* arrived, int64_t counts,
                     int tile_refs, int most_rows, cudaStream_t stream) {
  if (has_short_list(in.n, in.k, in.m)) {
    Gather gather{};
    int64_t copies = 0;
    if (in.gather) {
      gather = *in.gather;
      for (int i = 0; i < gather.tensors; ++i) {
        const Given& g = gather.given[i];
        if (g.stays) copies = std::clamp<int64_t>(g.bytes / g.unit / (GATHER_UNROLL * SHORT_THREADS), 1, 64);
      }
    }
    const auto kernel = list.costs.deal ? short_list_kernel<true> : short_list_kernel<false>;
    check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(sizeof(ShortList))));
    kernel<<<static_cast<unsigned>(1 + copies), SHORT_THREADS, sizeof(ShortList), stream>>>(
        gather, in, list, arrived, counts, tile_refs, most_rows);
    return check_launch(op);
  }
  int threads = 128;
  while (threads < LIST_THREADS && threads < in.n) threads *= 2;
  unit_kernel<<<1, threads, 0, stream>>>(in, list, arrived, counts, tile_refs, most_rows);
  check_launch(op);
}

void zero_arrivals(const char* op, int* arrived, int64_t counts, cudaStream_t stream) {
  zero_kernel<<<1, 256, 0, stream>>>(arrived, counts);
  check_launch(op);
}

int resident_clusters(const char* op, const void* kernel, const cudaLaunchConfig_t& config, int size) {
  static std::map<std::pair<const void*, int>, int> known;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  int& clusters = known[{kernel, size}];
  if (clusters == 0) check_cuda(op, cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
  if (clusters == 0)
    throw std::runtime_error(std::string("svel::") + op + ": the device has no room for a cluster of blocks");
  return clusters;
}

void run_bulk(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream) {
  const BulkLaunch launch{op, in, plan, workspace, stream};
  const bool launched = in.refs.dtype == Dtype::f16    ? launch_bulk<__half>(launch)
                        : in.refs.dtype == Dtype::bf16 ? launch_bulk<__nv_bfloat16>(launch)
                                                       : launch_bulk<float>(launch);
  if (!launched)
    throw std::runtime_error(std::string("svel::") + op + ": no compiled kernel for the planned tile");
}

}  // namespace svel::cuda
