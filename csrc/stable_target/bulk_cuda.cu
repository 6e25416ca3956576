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

constexpr int MERGE_THREADS = 128, MERGE_BLOCKS = 5;
constexpr int MERGE_SHARES = 4, MERGE_MANY_SHARES = 16;  // the latter for units of MERGE_MANY parts
constexpr int64_t MERGE_MANY = 64;
constexpr int MERGE_EARLY = 9;  // parts that a thread has on their way before it knows their weights
constexpr int merge_elements(int shares) {  // of D per block
  return 2 * MERGE_THREADS / shares;
}

struct MergeLayout {
  int slices, most_rows;
  int weights;  // that a block has room for: no fewer than teams, nor than it adds without asking
  int64_t slice;
  int guess;  // of MergedRow::count, of the only row; 0: none
  int64_t teams;
};

// Merges the parts of one row over a few elements of D, two to each thread; SHARES threads of the same two
// take turns at the parts. Grid: rows x parts of D and one more, which finishes the row. What a block reads
// of the parts does not depend on their weights: it is all on its way at once.
// LISTED: nobody has left rows, they are in the list.
template <int SHARES, bool LISTED>
__global__ void __launch_bounds__(MERGE_THREADS, MERGE_BLOCKS)
    merge_kernel(const __grid_constant__ Inputs in, const __grid_constant__ UnitList list,
                 const __grid_constant__ BulkParts parts, const __grid_constant__ MergeLayout layout) {
  extern __shared__ double weights[];  // (layout.weights,), of the parts
  constexpr int ELEMENTS = merge_elements(SHARES), PAIRS = ELEMENTS / 2, WARPS = MERGE_THREADS / 32;
  constexpr int EARLY = MERGE_EARLY;
  static_assert(PAIRS <= 32, "the shares of a pair in a warp are added by shuffles");
  __shared__ double tops[WARPS], totals[WARPS];
  __shared__ float leads[WARPS], scales[WARPS];
  __shared__ double2 sums[WARPS][PAIRS];
  allow_next_launch();
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const int share = tid / PAIRS, pair = tid % PAIRS;
  const int chunks = (static_cast<int>(in.d) + ELEMENTS - 1) / ELEMENTS + 1;
  const int index = static_cast<int>(blockIdx.x) / chunks, chunk = static_cast<int>(blockIdx.x) % chunks;
  const bool finishes = chunk == chunks - 1;
  const int e = chunk * ELEMENTS + 2 * pair;
  const bool within = !finishes && e < in.d;
  const int slice = static_cast<int>(layout.slice), rank = within ? e / slice : 0;
  if (in.mailboxes) wait_for_previous_launch();  // x may come by a launch that is not over yet
  const Array out = out_of(in, index);
  double x[2] = {0, 0};
  if (within && share == 0) {
    const Array from = x_of(in, index);
    x[0] = load_as<double>(from, index * in.d + e), x[1] = load_as<double>(from, index * in.d + e + 1);
  }
  // Of each team a unit has the first of its two parts, of the first one the second: see BulkParts.
  const int team = 2 * layout.slices * layout.most_rows, pairs = slice / 2;
  const double2* sums_from = reinterpret_cast<const double2*>(parts.sums) +
                             (share * team + 2 * rank * layout.most_rows) * pairs + (e - rank * slice) / 2;
  const PartRow* rows_from = parts.rows + tid * team;
  const int64_t step = SHARES * team * pairs;
  // Never. But what is not asked for here the compiler would find out behind the wait.
  if (!sums_from || !rows_from || step == 0) __trap();
  wait_for_previous_launch();

  // A guess that holds saves the way to memory and back that the answer takes.
  MergedRow row{0, 0, 0, layout.guess, 0};
  if constexpr (LISTED) {
    int place = 0;
    while (list.order[place] != index) ++place;
    row = merged_row(in, list, layout.teams, place);
    if (row.count == 1) return;
  }
  int count, mine;
  const double2 nothing = make_double2(0, 0);
  double2 near, next, early[EARLY];  // near, next: see PartRow
  float2 of_near, of_next;
  const double2* other_at;
#pragma unroll 1
  for (;;) {
    count = row.count;
    mine = within ? (count - share + SHARES - 1) / SHARES : 0;  // parts
    const int first = row.from * team + row.row, second = first + layout.most_rows;
    const PartRow* const near_at = rows_from + (tid == 0 ? second : first);
    const PartRow* const next_at = rows_from + (first + MERGE_THREADS * team);
    const double2* const first_at = sums_from + (share == 0 ? second : first) * pairs;
    other_at = sums_from + first * pairs;
    near = next = make_double2(-INFINITY, 0), of_near = of_next = make_float2(0, 0);
    if (tid < count) {
      near = __ldcg(reinterpret_cast<const double2*>(near_at));
      of_near = __ldcg(reinterpret_cast<const float2*>(&near_at->lead));
    }
    if (tid + MERGE_THREADS < count) {
      next = __ldcg(reinterpret_cast<const double2*>(next_at));
      of_next = __ldcg(reinterpret_cast<const float2*>(&next_at->lead));
    }
#pragma unroll
    for (int i = 0; i < EARLY; ++i, other_at += step) {
      early[i] = nothing;
      if (i < mine) early[i] = __ldcg(i == 0 ? first_at : other_at);
    }
    if constexpr (LISTED) break;
    const int from = row.from, place = row.row;
    row = parts.merged[index];
    if (row.from == from && row.count == count && row.row == place) break;
    if (row.count == 1) return;
  }
  const auto greater = [](double a, double b) { return a >= b || b != b ? a : b; };
  double top = greater(near.x, next.x);
#pragma unroll
  for (int hop = 16; hop > 0; hop /= 2) top = greater(top, __shfl_xor_sync(0xffffffffu, top, hop));
  if (lane == 0) tops[warp] = top;
  __syncthreads();
  top = tops[0];
#pragma unroll
  for (int w = 1; w < WARPS; ++w) top = greater(top, tops[w]);
  double total = 0;
  float lead = 0, scale = 0;
  const int weighed = max(count, EARLY * SHARES);  // beyond the last part they are zero
#pragma unroll 1
  for (int j = tid; j < weighed; j += MERGE_THREADS) {
    const double weight = exp2(near.x - top);
    weights[j] = weight;
    total = fma(weight, near.y, total);
    lead = fmaxf(lead, static_cast<float>(weight) * of_near.x), scale = fmaxf(scale, of_near.y);
    near = next, of_near = of_next;
  }
#pragma unroll
  for (int hop = 16; hop > 0; hop /= 2) total += __shfl_xor_sync(0xffffffffu, total, hop);
  if (lane == 0) totals[warp] = total;
  if (finishes) {
#pragma unroll 1
    for (int hop = 16; hop > 0; hop /= 2) {
      lead = fmaxf(lead, __shfl_xor_sync(0xffffffffu, lead, hop));
      scale = fmaxf(scale, __shfl_xor_sync(0xffffffffu, scale, hop));
    }
    if (lane == 0) leads[warp] = lead, scales[warp] = scale;
  }
  __syncthreads();
  total = totals[0];
#pragma unroll
  for (int w = 1; w < WARPS; ++w) total += totals[w];
  if (finishes) {
    for (int w = 0; w < WARPS; ++w) lead = fmaxf(lead, leads[w]), scale = fmaxf(scale, scales[w]);
    if (tid == 0) finish_row(in, parts, {}, index, {top, total, lead, scale}, nullptr);
    return;
  }
  double2 sum = nothing;
  const auto add = [&](int j, double2 part) {
    sum.x = fma(weights[j], part.x, sum.x), sum.y = fma(weights[j], part.y, sum.y);
  };
#pragma unroll
  for (int i = 0; i < EARLY; ++i) add(share + i * SHARES, early[i]);
#pragma unroll 1
  for (int i = EARLY; i < mine; ++i, other_at += step) add(share + i * SHARES, __ldcg(other_at));
#pragma unroll
  for (int hop = 16; hop >= PAIRS; hop /= 2) {
    sum.x += __shfl_xor_sync(0xffffffffu, sum.x, hop);
    sum.y += __shfl_xor_sync(0xffffffffu, sum.y, hop);
  }
  if (lane < PAIRS) sums[warp][lane] = sum;
  __syncthreads();
  if (tid < PAIRS && within) {
    const double by = row.b / total;
    sum = sums[0][tid];
#pragma unroll
    for (int w = 1; w < WARPS; ++w) sum.x += sums[w][tid].x, sum.y += sums[w][tid].y;
    store_as(out, int64_t{index} * in.d + e, fma(row.a, x[0], by * sum.x));
    store_as(out, int64_t{index} * in.d + e + 1, fma(row.a, x[1], by * sum.y));
  }
}

__device__ __forceinline__ void copy_async_16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void await_async_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

constexpr int END_THREADS = 128, END_FEW_BLOCKS = 4;  // END_FEW_BLOCKS: to a multiprocessor, of few rows

// The results of an own row over the elements `at`, from its mean over this part and those that the others
// have left in the mailbox, when these are there. All threads.
template <int VECTORS, typename Index>
__device__ __forceinline__ void merge_at_home(const Inputs& in, const AtHome& home, int64_t row, double lse,
                                              const Index (&at)[VECTORS], const bool (&within)[VECTORS],
                                              const float4 (&x)[VECTORS], float4 (&mean)[VECTORS]) {
  const int q = static_cast<int>(threadIdx.x);
  const double t = clamp_time(load_as<double>(in.time_or_alpha, in.part * in.rows_each + row));
  const PredictionCoefficients at_time =
      prediction_coefficients(home.prediction, path_coefficients(in.path, t));
  char* const mailbox = home.mailbox;
  const Header* const own = reinterpret_cast<const Header*>(mailbox);
  if (q < in.parts && q != in.part)
    await_flag(&own->done[q], own->round, {{}, in.part, in.parts, home.patience}, q);
  __syncthreads();
  double top = lse, total = 1;
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
    total = fma(so_far, total, weight), top = most;
    const auto add = [&](float& to, float value) {  // the mean over nothing is NaN
      to = (a > 0 ? a * to : a) + (b > 0 ? b * value : b);
    };
#pragma unroll
    for (int v = 0; v < VECTORS; ++v)
      add(mean[v].x, other[v].x), add(mean[v].y, other[v].y), add(mean[v].z, other[v].z),
          add(mean[v].w, other[v].w);
  }
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
}

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

// What end_kernel does for a row whose weights would show that they are wrong: see merge_aligned. Each block
// does that for itself; few rows are such, and of few references.
template <int LANES, int VECTORS, bool MERGES>
__device__ __noinline__ void end_aligned(const Inputs& in, const ProductsParts& parts, double* scratch) {
  constexpr int WARPS = END_THREADS / 32;
  __shared__ AlignedMemory<WARPS> memory;
  const int64_t chunks = ceil_div(in.d, 4 * LANES * VECTORS);
  const int64_t number = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const int64_t index = number + in.part * in.rows_each;
  const ProductsRow left = parts.rows[index];
  const int64_t next = (left.from + 1) * PRODUCTS_ROWS + left.row;
  const ProductsPieces pieces{left.own,
                              parts.others + next,
                              parts.firsts + index * in.d,
                              parts.sums + next * in.d,
                              parts.ties + index * PRODUCTS_TIES,
                              parts.ties + (in.n + next) * PRODUCTS_TIES,
                              in.d};
  const int others = left.to - left.from;
  RowState row;
  set_row(in, index, row);
  const float* const x = static_cast<const float*>(row.x) + index * in.d;
  double shift = 0, most = left.own.log2_weight;
  if (in.lse.data || in.labels[index] < 0) {
    for (int64_t e = threadIdx.x; e < in.d; e += END_THREADS)
      shift = fma(static_cast<double>(x[e]), static_cast<double>(x[e]), shift);
    shift = row.per_square * block_sum<double>(shift, scratch);
  }
  for (int j = 0; j < others; ++j) most = fmax(most, pieces.part(j).log2_weight);
  int64_t at[VECTORS];
  bool within[VECTORS];
  double sum[VECTORS][4] = {};
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    at[v] = 4 * ((chunk * VECTORS + v) * LANES + threadIdx.x);
    within[v] = static_cast<int>(threadIdx.x) < LANES && at[v] < in.d;
  }
  const auto wait = [] { __syncthreads(); };
  PartRow all = in.refs.dtype == Dtype::f16
                    ? merge_aligned<__half, WARPS>(in, row, pieces, others, shift, most, wait, memory, 0, at,
                                                   within, sum)
                    : merge_aligned<__nv_bfloat16, WARPS>(in, row, pieces, others, shift, most, wait, memory,
                                                          0, at, within, sum);
  if (in.source.data) {
    const float* const source = static_cast<const float*>(in.source.data) + index * in.d;
    const Joined joined = join(all, {score_of_source(in, index, scratch), 1, 0, 0, 0});
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
      if (within[v]) mine[v] = *reinterpret_cast<const float4*>(parts.home.x + number * in.d + at[v]);
      mean[v] = make_float4(static_cast<float>(by * sum[v][0]), static_cast<float>(by * sum[v][1]),
                            static_cast<float>(by * sum[v][2]), static_cast<float>(by * sum[v][3]));
    }
    merge_at_home<VECTORS>(in, parts.home, number, lse_of_row(in, all), at, within, mine, mean);
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
// take LANES by LANES shares of the parts. MERGES: the result is over the parts of all processes. Grid: rows,
// those of this process, x chunks of D.
template <int LANES, int VECTORS, bool MERGES, bool SOURCE>
__global__ void __launch_bounds__(END_THREADS, LANES < END_THREADS ? END_FEW_BLOCKS : 1024 / END_THREADS)
    end_kernel(const __grid_constant__ Inputs in, const __grid_constant__ ProductsParts parts) {
  constexpr int SHARES = END_THREADS / LANES;
  static_assert(!MERGES || SHARES == 1, "a thread has all of its elements");
  constexpr unsigned WARP = 0xffffffffu;
  extern __shared__ double weights[];  // (blocks,) of the row's other parts
  __shared__ double scratch[33];
  __shared__ float sums[SHARES][VECTORS][LANES][4];
  const unsigned chunks = ceil_div(static_cast<unsigned>(in.d), 4u * LANES * VECTORS);
  const unsigned row = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const int64_t index = row + in.part * in.rows_each, from = index * in.d;
  const int d = static_cast<int>(in.d), lane = threadIdx.x % LANES, share = threadIdx.x / LANES;
  const float* const x = static_cast<const float*>(in.x.data) + from;  // parts give means: a = 0
  int at[VECTORS];
  bool within[VECTORS];
  // Of this thread: x, and the first part's sums. There are no registers to keep them in.
  __shared__ float4 mine[VECTORS][END_THREADS], first[VECTORS][END_THREADS];
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    at[v] = static_cast<int>(4 * ((chunk * VECTORS + v) * LANES + lane)), within[v] = at[v] < d;
    const float* const its = MERGES ? parts.home.x + row * in.d : in.mailboxes ? nullptr : x;
    if (within[v] && share == 0 && its) {
      copy_async_16(&mine[v][threadIdx.x], its + at[v]);
    } else {
      mine[v][threadIdx.x] = make_float4(0, 0, 0, 0);
    }
  }
  wait_for_previous_launch();
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    if (within[v] && share == 0) copy_async_16(&first[v][threadIdx.x], parts.firsts + from + at[v]);
  }
  const ProductsRow left = parts.rows[index];
  const int others = left.to - left.from;  // negative: nothing to read
  const auto part_of = [&](int j) { return (left.from + 1 + j) * PRODUCTS_ROWS + left.row; };
  const auto load_other = [&](int j) { return load_part(parts.others + part_of(j)); };
  const auto load_sums = [&](int j, int v) {
    return __ldcg(reinterpret_cast<const float4*>(parts.sums + int64_t{part_of(j)} * d + at[v]));
  };
  float4 early[VECTORS];  // of the first part that this thread adds: its weight takes a while
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    early[v] = make_float4(0, 0, 0, 0);
    if (within[v] && share < others) early[v] = load_sums(share, v);
  }
  // Each warp weighs the parts, the first and up to 31 others by a lane for each.
  const int part = threadIdx.x % 32 - 1;
  constexpr int NEAR = 31;
  double top = left.own.log2_weight, total = others < 0 ? NAN : left.own.total, weight = 1, by_source = 0;
  float wrong = left.own.scale;
  int equals = static_cast<int>(left.own.lead);
  const float* const source =
      SOURCE && others >= 0 ? static_cast<const float*>(in.source.data) + from : nullptr;
  if (others > 0 || source) {
    PartRow mine{-INFINITY, 0, 0, 0, 0, 0};
    if (part < 0) {
      mine = left.own;
    } else if (part < others) {
      mine = load_other(part);
    }
    const auto greater = [](double a, double b) { return a >= b || b != b ? a : b; };
    top = mine.log2_weight;
    if (source) {  // a part like any other
      by_source = score_of_source(in, index, scratch);
      top = greater(top, by_source);
    }
    constexpr int AT_ONCE = SHARES > 1 ? 4 : 1;  // loads in flight, of parts that are further on
#pragma unroll 1
    for (int next = NEAR + 1 + part; next < others; next += 32 * AT_ONCE) {
      double its[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i)
        its[i] = next + 32 * i < others ? load_other(next + 32 * i).log2_weight : -INFINITY;
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) top = greater(top, its[i]);
    }
#pragma unroll 1
    for (int hop = 16; hop > 0; hop /= 2) top = greater(top, __shfl_xor_sync(WARP, top, hop));
    weight = power(mine.log2_weight - top);
    total = weight * mine.total;
    wrong = mine.scale;
    Equals best;
    best.add(mine, top);
#pragma unroll 1
    for (int next = NEAR + 1 + part; next < others; next += 32 * AT_ONCE) {
      PartRow far[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) far[i] = load_other(min(next + 32 * i, others - 1));
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        if (next + 32 * i >= others) break;
        const double by = power(far[i].log2_weight - top);
        weights[next + 32 * i] = by, total = fma(by, far[i].total, total);
        wrong = fmaxf(wrong, far[i].scale), best.add(far[i], top);
      }
    }
#pragma unroll 1
    for (int hop = 16; hop > 0; hop /= 2) total += __shfl_xor_sync(WARP, total, hop);
    const unsigned those = __ballot_sync(WARP, best.count > 0);
    const int print = __shfl_sync(WARP, best.print, __ffs(those) - 1);
    equals = __reduce_add_sync(WARP, best.print == print ? best.count : 0);
    if (source) {
      if (by_source >= top) equals = max(equals, 1);
      by_source = power(by_source - top), total += by_source;
    }
  }
  if (__any_sync(WARP, is_doubtful(wrong, total, equals))) {
    __syncthreads();  // what others weigh by is there, or not yet needed
    return end_aligned<LANES, VECTORS, MERGES>(in, parts, scratch);
  }
  const float mine_by = static_cast<float>(weight), by_first = __shfl_sync(WARP, mine_by, 0);
  if (others > NEAR) __syncthreads();
  float sum[VECTORS][4] = {};
  const auto add = [&](int v, float weight, float4 four) {
    sum[v][0] = fmaf(weight, four.x, sum[v][0]), sum[v][1] = fmaf(weight, four.y, sum[v][1]);
    sum[v][2] = fmaf(weight, four.z, sum[v][2]), sum[v][3] = fmaf(weight, four.w, sum[v][3]);
  };
  const auto weight_of = [&](int j) {
    const float near = __shfl_sync(WARP, mine_by, min(j, NEAR - 1) + 1);
    return j < NEAR || j >= others ? near : static_cast<float>(weights[j]);
  };
  await_async_copies();
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    if (share == 0) add(v, by_first, first[v][threadIdx.x]);
  }
  if (others > 0) {
    const float by_early = weight_of(share);
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) add(v, by_early, early[v]);
  }
#pragma unroll(SHARES > 1 ? 4 : 1)
  for (int so_far = SHARES; so_far < others; so_far += SHARES) {
    const int j = so_far + share;
    const float by = weight_of(j);
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      if (within[v] && j < others) add(v, by, load_sums(j, v));
    }
  }
  if constexpr (SHARES > 1) {
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      for (int k = 0; k < 4; ++k) sums[share][v][lane][k] = sum[v][k];
    }
    __syncthreads();
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      for (int k = 0; k < 4; ++k) {
        for (int other = 1; other < SHARES; ++other) sum[v][k] += sums[other][v][lane][k];
      }
    }
  }
  const double by = (MERGES ? 1 : left.b) / total;
  const PartRow all{top, total, 0, 0, 0, 0};
  const Array out = out_of(in, index);
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    if (!within[v] || share > 0) continue;
    if (source) add(v, static_cast<float>(by_source), *reinterpret_cast<const float4*>(source + at[v]));
    if constexpr (MERGES) {
      early[v] = make_float4(static_cast<float>(by * sum[v][0]), static_cast<float>(by * sum[v][1]),
                             static_cast<float>(by * sum[v][2]), static_cast<float>(by * sum[v][3]));
      continue;
    }
    const float4 own = mine[v][threadIdx.x];
    *reinterpret_cast<float4*>(static_cast<float*>(out.data) + from + at[v]) =
        make_float4(static_cast<float>(fma(left.a, static_cast<double>(own.x), by * sum[v][0])),
                    static_cast<float>(fma(left.a, static_cast<double>(own.y), by * sum[v][1])),
                    static_cast<float>(fma(left.a, static_cast<double>(own.z), by * sum[v][2])),
                    static_cast<float>(fma(left.a, static_cast<double>(own.w), by * sum[v][3])));
  }
  if constexpr (MERGES) {
    const double lse = others < 0 ? lse_of_nothing(in, index) : lse_of_row(in, all);
    float4 own[VECTORS];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) own[v] = mine[v][threadIdx.x];
    merge_at_home<VECTORS>(in, parts.home, row, lse, at, within, own, early);
  } else {
    if (in.lse.data && chunk == 0 && threadIdx.x == 0) write_lse(in, index, all);
  }
}

template <int LANES, int VECTORS, bool SOURCE>
bool launch_end_if(const char* op, const Inputs& in, const ProductsParts& parts, int64_t blocks,
                   cudaStream_t stream) {
  const int64_t grid = (in.mailboxes ? in.rows_each : in.n) * ceil_div(in.d, 4 * LANES * VECTORS);
  if (LANES < END_THREADS && (grid > END_FEW_BLOCKS * blocks || parts.home.merged)) return false;
  constexpr bool MERGES = LANES == END_THREADS;
  launch_following(op, true,
                   parts.home.merged ? end_kernel<LANES, VECTORS, MERGES, SOURCE>
                                     : end_kernel<LANES, VECTORS, false, SOURCE>,
                   dim3(static_cast<unsigned>(grid)), END_THREADS, blocks * sizeof(double), stream, in,
                   parts);
  return true;
}
// Few rows have many parts each.
template <bool SOURCE>
void launch_end(const char* op, const Inputs& in, const ProductsParts& parts, int64_t blocks,
                cudaStream_t stream) {
  launch_end_if<8, 1, SOURCE>(op, in, parts, blocks, stream) ||
      launch_end_if<32, 1, SOURCE>(op, in, parts, blocks, stream) ||
      launch_end_if<END_THREADS, 2, SOURCE>(op, in, parts, blocks, stream);
}

}  // namespace

bool has_short_list(int64_t n, int64_t k, int64_t m) {
  return n <= SHORT_ROWS && k <= OWN_LIST_GROUPS && m < int64_t{1} << 31;
}

void end_products(const char* op, const Inputs& in, const ProductsParts& parts, int64_t blocks,
                  cudaStream_t stream) {
  in.source.data ? launch_end<true>(op, in, parts, blocks, stream)
                 : launch_end<false>(op, in, parts, blocks, stream);
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

// The teams that have parts of the only row if its group is full: all, where the unit's end is in the last
// one's range with tiles before it (Ranges). 0 where there are more rows, and for few references.
static int guess_parts(const Inputs& in, const Plan& plan, int64_t teams) {
  const int64_t end = plan.costs.row + plan.costs.unit, tiles = in.m / plan.tile_refs;
  return in.n == 1 && tiles * TILE_WEIGHT > (end + 2 * TILE_WEIGHT) * teams ? static_cast<int>(teams) : 0;
}

void merge_parts(const char* op, const Inputs& in, const UnitList& list, const BulkParts& parts,
                 const Plan& plan, int64_t teams, cudaStream_t stream) {
  if (teams > 2 * MERGE_THREADS)
    throw std::runtime_error(std::string("svel::") + op + ": more parts of a row than a block merges");
  const bool many = teams >= MERGE_MANY * ceil_div(in.n, plan.tile_rows);
  const int shares = many ? MERGE_MANY_SHARES : MERGE_SHARES;
  const int64_t chunks = ceil_div(in.d, merge_elements(shares)) + 1;
  const int weights = std::max(static_cast<int>(teams), MERGE_EARLY * shares);
  const MergeLayout layout{static_cast<int>(plan.slices), plan.tile_rows, weights, plan.slice,
                           guess_parts(in, plan, teams),  teams};
  const auto kernel =
      plan.slices > 1 ? (many ? merge_kernel<MERGE_MANY_SHARES, true> : merge_kernel<MERGE_SHARES, true>)
                      : (many ? merge_kernel<MERGE_MANY_SHARES, false> : merge_kernel<MERGE_SHARES, false>);
  launch_following(op, true, kernel, dim3(static_cast<unsigned>(in.n * chunks)), MERGE_THREADS,
                   weights * sizeof(double), stream, in, list, parts, layout);
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
