// What launches of the bulk kernel for all dtypes share.
#include <map>
#include <mutex>
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
  build_short_list<SHORT_THREADS>(in, list, scratch, tile_refs, most_rows, tid, [] { __syncthreads(); });
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

// So few, of so many registers at most, that a block fits beside one of the bulk kernel's: it is there, and
// its code, when those are done.
constexpr int MERGE_THREADS = 64, MERGE_BLOCKS = 16;
constexpr int MERGE_SHARES = 4, MERGE_MANY_SHARES = 16;  // the latter for units of MERGE_MANY parts
constexpr int64_t MERGE_MANY = 64;
constexpr int merge_elements(int shares) {  // of D per block
  return 2 * MERGE_THREADS / shares;
}

// Merges the parts of one unit over a few elements of D, two to each thread; SHARES threads of the same two
// take turns at the parts. Grid: units (at most n) x parts of D.
template <int SHARES>
__global__ void __launch_bounds__(MERGE_THREADS, MERGE_BLOCKS)
    merge_kernel(const __grid_constant__ Inputs in, const UnitList list,
                 const __grid_constant__ BulkParts parts, const int slices, const int64_t slice,
                 const int rows, const int64_t teams) {
  extern __shared__ double weights[];  // (teams of the unit,)
  __shared__ double scratch[33];
  constexpr int ELEMENTS = merge_elements(SHARES), PAIRS = ELEMENTS / 2;
  __shared__ double2 sums[SHARES][PAIRS];
  const int tid = threadIdx.x, share = tid / PAIRS, pair = tid % PAIRS;
  const int chunks = static_cast<int>(ceil_div(in.d, ELEMENTS));
  const int u = static_cast<int>(blockIdx.x) / chunks, chunk = static_cast<int>(blockIdx.x) % chunks;
  const int64_t e = chunk * ELEMENTS + 2 * pair;
  const int rank = static_cast<int>(e / slice), local = static_cast<int>(e - rank * slice);
  allow_next_launch();
  wait_for_previous_launch();
  const Unit unit = list.units[u];
  if (u >= list.sizes[0]) return;
  const Ranges ranges(list, teams);
  const int64_t from = ranges.first_team(list, u);
  const int count = static_cast<int>(ranges.last_team(list, u) - from) + 1;
  if (count == 1) return;
  for (int r = 0; r < unit.rows; ++r) {
    const int64_t index = list.order[unit.first + r], at = index * in.d + e;
    const auto part_of = [&](int j, int rank) {
      return (2 * ((from + j) * slices + rank) + (j == 0 ? 1 : 0)) * rows + r;
    };
    double top = -INFINITY;
    for (int j = tid; j < count; j += MERGE_THREADS) {
      const double other = parts.rows[part_of(j, 0)].log2_weight;
      top = top >= other || other != other ? top : other;
    }
    double x[2] = {0, 0};
    if (e < in.d && share == 0)
      x[0] = load_as<double>(x_of(in, index), at), x[1] = load_as<double>(x_of(in, index), at + 1);
    const Row row = row_coefficients(in, index);
    const double best = block_max<double>(top, scratch);
    PartsSum together;
    for (int j = tid; j < count; j += MERGE_THREADS) {
      const PartRow part = parts.rows[part_of(j, 0)];
      weights[j] = exp2(part.log2_weight - best);
      together.add(part, weights[j]);
      for (int other = 1; other < slices && chunk == 0; ++other)
        together.norm =
            fmaf(static_cast<float>(weights[j]), parts.rows[part_of(j, other)].norm, together.norm);
    }
    together.total = block_sum<double>(together.total, scratch);
    if (chunk == 0) {  // what finish_row wants to know
      together.norm = static_cast<float>(block_sum<double>(together.norm, scratch));
      together.lead = static_cast<float>(block_max<double>(together.lead, scratch));
      together.centre = static_cast<float>(block_max<double>(together.centre, scratch));
      together.scale = static_cast<float>(block_max<double>(together.scale, scratch));
    }
    const PartRow all = together.all(best);
    double2 sum = make_double2(0, 0);
    if (e < in.d) {
#pragma unroll 9
      for (int j = share; j < count; j += SHARES) {
        const double2 part = *reinterpret_cast<const double2*>(parts.sums + part_of(j, rank) * slice + local);
        sum.x = fma(weights[j], part.x, sum.x), sum.y = fma(weights[j], part.y, sum.y);
      }
    }
    sums[share][pair] = sum;
    __syncthreads();
    if (share == 0 && e < in.d) {
      for (int other = 1; other < SHARES; ++other) sum.x += sums[other][pair].x, sum.y += sums[other][pair].y;
      const Array out = out_of(in, index);
      store_as(out, at, row.a * x[0] + row.b * (sum.x / all.total));
      store_as(out, at + 1, row.a * x[1] + row.b * (sum.y / all.total));
    }
    if (chunk == 0 && tid == 0) finish_row(in, parts, {}, index, all, nullptr);
    __syncthreads();  // weights and sums are read above and overwritten next
  }
}

constexpr int END_THREADS = 128;

// Rows of end_kernel whose scores leave in doubt what weighs how much: one block's elements of such a row.
// Code and memory of its own, out of the way of the others.
constexpr int END_REFS = 64;  // scored at a time
constexpr int64_t end_doubles(int64_t blocks) {
  return 2 * blocks + 1 + 2 * END_REFS;
}
struct DoubtfulRow {
  const Inputs& in;
  const ProductsParts& parts;
  const int64_t index, low, high;
  const double top, total, by_source;  // what all parts weigh together, and the source
  double* const weights;               // (parts,)
  double* const scores;                // (END_REFS,), and as much room for `listed`
  double* const scratch;
  const ProductsRow left = parts.rows[index];
  const int others = left.to - left.from;
  int* const listed = reinterpret_cast<int*>(scores + END_REFS);  // how many, and which
  const Row row = row_coefficients(in, index);
  const float* const x = static_cast<const float*>(x_of(in, index).data) + index * in.d;
  const float* const source =
      in.source.data ? static_cast<const float*>(in.source.data) + index * in.d : nullptr;
  static constexpr double NO_SHARE = 0x1p-20, MOST_ERROR = 1e-6;
  static constexpr int EACH = 2;  // times four elements for each thread at most

  __device__ int64_t place(int j) const { return (left.from + j) * PRODUCTS_ROWS + left.row; }
  __device__ const PartRow& part(int j) const { return j == 0 ? left.own : parts.others[place(j)]; }
  __device__ const float* sums(int j) const {
    return j == 0 ? parts.firsts + index * in.d : parts.sums + place(j) * in.d;
  }
  __device__ double share(int j) const { return weights[j] * part(j).total / total; }
  __device__ bool is_doubtful(int j) const { return part(j).scale > 0 && share(j) > NO_SHARE; }
  __device__ bool is_single(int j) const { return part(j).lead >= (1 - NO_SHARE) * part(j).total; }

  template <typename Visit>
  __device__ void visit_elements(const Visit& visit) const {
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int64_t e = low + 4 * (threadIdx.x + i * END_THREADS);
      if (e < high) visit(i, e);
    }
  }
  __device__ static void load(const float* from, double (&v)[4]) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
  }
  __device__ void load_reference(int64_t reference, int64_t e, double (&v)[4]) const {
    const int64_t at = reference * in.d + e;
    const float4 four = in.refs.dtype == Dtype::f16
                            ? load_references(static_cast<const __half*>(in.refs.data) + at)
                            : load_references(static_cast<const __nv_bfloat16*>(in.refs.data) + at);
    v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
  }

  // The weighted sum of all at four elements.
  __device__ void add_up(int64_t e, double by_source, double (&v)[4]) const {
    for (double& one : v) one = 0;
    double four[4];
    if (source && by_source > 0) {
      load(source + e, four);
      for (int k = 0; k < 4; ++k) v[k] = by_source * four[k];
    }
#pragma unroll 2
    for (int j = 0; j <= others; ++j) {
      load(sums(j) + e, four);
      for (int k = 0; k < 4; ++k) v[k] = fma(weights[j], four[k], v[k]);
    }
  }

  __device__ void store(int64_t e, double by, const double (&sum)[4]) const {
    double of_x[4] = {};
    if (left.a != 0) load(x + e, of_x);
    float out[4];
    for (int k = 0; k < 4; ++k) out[k] = static_cast<float>(fma(left.a, of_x[k], by * sum[k]));
    *reinterpret_cast<float4*>(static_cast<float*>(out_of(in, index).data) + index * in.d + e) =
        make_float4(out[0], out[1], out[2], out[3]);
  }
  __device__ void finish(double best, double all) const {
    if (in.lse.data && low == 0 && threadIdx.x == 0) write_lse(in, index, {best, all});
  }

  // The references of weight, of parts in doubt, by one thread; false: they are not known.
  __device__ bool list_references() const {
    int count = 0;
#pragma unroll 1
    for (int j = 0; j <= others; ++j) {
      if (!is_doubtful(j)) continue;
      const int* const ties = parts.ties + (j == 0 ? index : in.n + place(j)) * PRODUCTS_TIES;
      const bool single = is_single(j);
      const int here = single ? 1 : ties[0];
      if (here < 1 || count + here > END_REFS) return false;
#pragma unroll 1
      for (int i = 0; i < here; ++i) listed[1 + count++] = single ? part(j).best : ties[1 + i];
    }
    listed[0] = count;
    return true;
  }

  // Exact scores for those, in the place of their parts. What parts are relative to: x.r - alpha/2 |r|^2, or
  // with |x|^2 too.
  template <typename T>
  __device__ void score_again() const {
    const int lane = threadIdx.x % 32, count = listed[0];
    const bool whole = in.lse.data || in.labels[index] < 0;
#pragma unroll 1
    for (int i = threadIdx.x / 32; i < count; i += END_THREADS / 32) {
      const T* const from = static_cast<const T*>(in.refs.data) + listed[1 + i] * in.d;
      double score = 0, square = 0;
#pragma unroll 4
      for (int64_t e = 4 * lane; e < in.d; e += 128) {
        double y[4];
        load(x + e, y);
        const float4 four = load_references(from + e);
        const double r[4] = {four.x, four.y, four.z, four.w};
        for (int k = 0; k < 4; ++k) {
          y[k] *= row.sign;
          score = fma(fma(-0.5 * row.alpha, r[k], y[k]), r[k], score), square = fma(y[k], y[k], square);
        }
      }
      score = row.rate() * warp_sum(score);
      if (whole) score -= 0.5 * warp_sum(square) / (row.sigma * row.sigma);
      if (lane == 0) scores[i] = LOG2_E * score - top;
    }
    // Parts' own weights: relative to `top`, of those that are as they were.
    for (int j = threadIdx.x; j <= others; j += END_THREADS) weights[j] = is_doubtful(j) ? 0 : weights[j];
    __syncthreads();
    double best = 0;
#pragma unroll 1
    for (int i = 0; i < count; ++i) best = fmax(best, scores[i]);
    const double by = power(-best), own = by * by_source;
    double all = own;
#pragma unroll 1
    for (int j = 0; j <= others; ++j) all = fma(by * weights[j], part(j).total, all);
#pragma unroll 1
    for (int i = 0; i < count; ++i) all += power(scores[i] - best);
    visit_elements([&](int, int64_t e) {
      double sum[4], r[4];
      add_up(e, by_source, sum);
      for (double& one : sum) one *= by;
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        load_reference(listed[1 + i], e, r);
        const double weight = power(scores[i] - best);
        for (int k = 0; k < 4; ++k) sum[k] = fma(weight, r[k], sum[k]);
      }
      store(e, left.b / all, sum);
    });
    finish(top + best, all);
  }

  // From all references, END_REFS of them at a time.
  template <typename T>
  __device__ void evaluate() const {
    constexpr int AT_ONCE = 4, WARPS = END_THREADS / 32;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Array of_row = x_of(in, index);
    const int64_t group = in.labels[index], first = group < 0 ? 0 : group * in.m,
                  all = group < 0 ? in.k * in.m : valid_count(in, group);
    double sums[EACH][4] = {}, best = -INFINITY, total = 0, own = 0;
    if (source) {
      double square = 0;
      for (int64_t e = threadIdx.x; e < in.d; e += END_THREADS) {
        const double gap = row.sign * x[e] - row.alpha * source[e];
        square = fma(gap, gap, square);
      }
      best = -LOG2_E / (2 * row.sigma * row.sigma) * block_sum<double>(square, scratch), total = own = 1;
    }
#pragma unroll 1
    for (int64_t begin = 0; begin < all; begin += END_REFS) {
#pragma unroll 1
      for (int j = AT_ONCE * warp; j < END_REFS; j += AT_ONCE * WARPS) {
        double these[AT_ONCE] = {};
        if (begin + j < all)
          score_references<T>(in, row, of_row, first + begin + j, first + all - 1, lane, these);
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
          const int64_t at = begin + j + i;
          const bool valid = at < all && (group >= 0 || at % in.m < valid_count(in, at / in.m));
          if (lane == 0) scores[j + i] = valid ? these[i] : -INFINITY;
        }
      }
      __syncthreads();
      double most = best;
#pragma unroll 1
      for (int j = 0; j < END_REFS; ++j) most = fmax(most, scores[j]);
      const double keep = best > -INFINITY ? power(best - most) : 0;
      best = most, own *= keep, total *= keep;
      for (auto& four : sums) {
        for (double& one : four) one *= keep;
      }
#pragma unroll 1
      for (int j = 0; j < END_REFS && best > -INFINITY; ++j) {
        if (scores[j] < best - 60) continue;
        const double weight = power(scores[j] - best);
        total += weight;
        visit_elements([&](int i, int64_t e) {
          double r[4];
          load_reference(first + begin + j, e, r);
          for (int k = 0; k < 4; ++k) sums[i][k] = fma(weight, r[k], sums[i][k]);
        });
      }
      __syncthreads();
    }
    visit_elements([&](int i, int64_t e) {
      if (source) {
        double of_source[4];
        load(source + e, of_source);
        for (int k = 0; k < 4; ++k) sums[i][k] = fma(own, of_source[k], sums[i][k]);
      }
      store(e, left.b / total, sums[i]);
    });
    finish(best, total);
  }

  template <typename T>
  __device__ void settle() const {
    if (__syncthreads_or(threadIdx.x == 0 && list_references())) {
      score_again<T>();
    } else {
      evaluate<T>();
    }
  }
};
__device__ __noinline__ void settle_at_end(const Inputs& in, const ProductsParts& parts, int64_t index,
                                           int64_t low, int64_t high, double top, double total,
                                           double by_source, double* weights, double* scores,
                                           double* scratch) {
  const DoubtfulRow row{in, parts, index, low, high, top, total, by_source, weights, scores, scratch};
  if (in.refs.dtype == Dtype::f16) {
    row.settle<__half>();
  } else {
    row.settle<__nv_bfloat16>();
  }
}

// The same elements by their parts' weights, (parts,), if errors cannot show in them: references of weight
// lie close together, those of a part, of which the mean and the best one are known, and those of several
// parts. Short: most of its time is that of its code, which comes from memory.
__device__ __noinline__ bool finish_if_close(const Inputs& in, const ProductsParts& parts, int64_t index,
                                             int64_t low, int64_t high, double top, double total,
                                             double by_source, const double* weights, double* scratch) {
  constexpr int EACH = DoubtfulRow::EACH;
  constexpr float MOST = static_cast<float>(DoubtfulRow::MOST_ERROR * DoubtfulRow::MOST_ERROR);
  const ProductsRow& left = parts.rows[index];
  const int others = left.to - left.from;
  const float a = static_cast<float>(left.a), b = static_cast<float>(left.b);
  const float* const x = static_cast<const float*>(x_of(in, index).data) + index * in.d;
  const float* const source = static_cast<const float*>(in.source.data) + index * in.d;
  const double by_all = 1 / total;
  double sums[EACH][4];
  float4 of_x[EACH];
  float wrong = 0, of_mean = 0,
        of_noise = 0;  // errors less what they may be, by the size of the result; others
  float alpha = 0, sigma = 0, sign = 1;
  if (in.lse.data) {
    const Row row = row_coefficients(in, index);
    alpha = static_cast<float>(row.alpha), sigma = static_cast<float>(row.sigma);
    sign = static_cast<float>(row.sign);
  }
#pragma unroll 1
  for (int i = 0; i < EACH; ++i) {
    const int64_t e = low + 4 * (threadIdx.x + i * END_THREADS);
    if (e >= high) break;
    of_x[i] = *reinterpret_cast<const float4*>(x + e);
    double sum[4] = {};
#pragma unroll 1
    for (int j = by_source > 0 ? -1 : 0; j <= others; ++j) {
      const int64_t place = (left.from + j) * PRODUCTS_ROWS + left.row;
      const float* const from = j < 0    ? source
                                : j == 0 ? parts.firsts + index * in.d
                                         : parts.sums + place * in.d;
      const double weight = j < 0 ? by_source : weights[j];
      const float4 four = *reinterpret_cast<const float4*>(from + e);
      sum[0] = fma(weight, four.x, sum[0]), sum[1] = fma(weight, four.y, sum[1]);
      sum[2] = fma(weight, four.z, sum[2]), sum[3] = fma(weight, four.w, sum[3]);
    }
    float m[4], error = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) m[k] = static_cast<float>(by_all * sum[k]), sums[i][k] = sum[k];
#pragma unroll 1
    for (int j = 0; j <= others; ++j) {
      const int64_t place = (left.from + j) * PRODUCTS_ROWS + left.row;
      const PartRow& part = j == 0 ? left.own : parts.others[place];
      const float of_part = __fdividef(1, static_cast<float>(part.total)),
                  share = static_cast<float>(weights[j] * by_all * part.total), by = share * part.scale;
      if (!(by > 0) || share < static_cast<float>(DoubtfulRow::NO_SHARE)) continue;
      const float4 own = *reinterpret_cast<const float4*>(
          (j == 0 ? parts.firsts + index * in.d : parts.sums + place * in.d) + e);
      const int64_t at = part.best * in.d + e;
      const float4 best = in.refs.dtype == Dtype::f16
                              ? load_references(static_cast<const __half*>(in.refs.data) + at)
                              : load_references(static_cast<const __nv_bfloat16*>(in.refs.data) + at);
      const auto add = [&](float own, float m, float best) {
        const float between = by * fmaf(of_part, own, -m), within = by * fmaf(of_part, own, -best);
        error = fmaf(between, between, fmaf(2 * within, within, error));
      };
      add(own.x, m[0], best.x), add(own.y, m[1], best.y), add(own.z, m[2], best.z), add(own.w, m[3], best.w);
    }
    const float x4[4] = {of_x[i].x, of_x[i].y, of_x[i].z, of_x[i].w};
    float size = 0, mean = 0, noise = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float out = fmaf(a, x4[k], b * m[k]), rest = fmaf(-alpha, m[k], sign * x4[k]);
      size = fmaf(out, out, size), mean = fmaf(m[k], m[k], mean), noise = fmaf(rest, rest, noise);
    }
    wrong += error - MOST * size;
    if (in.lse.data) {  // the mean may become any prediction
      of_noise += error - MOST * noise / (alpha * alpha);
      of_mean += error - MOST * fmaf(sigma * sigma, mean, noise);
    }
  }
  bool close = !(block_sum<float>(wrong, reinterpret_cast<float*>(scratch)) > 0);
  if (in.lse.data) {
    close = close && !(block_sum<float>(of_noise, reinterpret_cast<float*>(scratch)) > 0) &&
            !(block_sum<float>(of_mean, reinterpret_cast<float*>(scratch)) > 0);
  }
  if (!close) return false;
  const double by = left.b * by_all;
  float* const out = static_cast<float*>(out_of(in, index).data) + index * in.d;
#pragma unroll 1
  for (int i = 0; i < EACH; ++i) {
    const int64_t e = low + 4 * (threadIdx.x + i * END_THREADS);
    if (e >= high) break;
    float4 x4 = of_x[i];
    if (left.a == 0) x4 = make_float4(0, 0, 0, 0);
    *reinterpret_cast<float4*>(out + e) =
        make_float4(static_cast<float>(fma(left.a, static_cast<double>(x4.x), by * sums[i][0])),
                    static_cast<float>(fma(left.a, static_cast<double>(x4.y), by * sums[i][1])),
                    static_cast<float>(fma(left.a, static_cast<double>(x4.z), by * sums[i][2])),
                    static_cast<float>(fma(left.a, static_cast<double>(x4.w), by * sums[i][3])));
  }
  if (in.lse.data && low == 0 && threadIdx.x == 0) write_lse(in, index, {top, total});
  return true;
}

// Whether one reference has as much of the weight as no errors can change: `rest` of `total` are the others'.
__device__ __forceinline__ bool is_settled(float rest, float total, float beyond) {
  return rest <= static_cast<float>(DoubtfulRow::NO_SHARE) * total ||
         (beyond > 0 && 2 * rest < total && 2 * beyond * rest * rest <= total * total);
}

// A row's result over VECTORS times 4 LANES of D from what products_kernel has left. The threads of a block
// take LANES by LANES shares of the parts. Where two or more references have weight, of scores whose errors
// might show, the block looks at how far they are apart, in its own elements: what lies close together needs
// no exact weights. Grid: rows x chunks of D.
template <int LANES, int VECTORS>
__global__ void __launch_bounds__(END_THREADS, 1024 / END_THREADS)
    end_kernel(const __grid_constant__ Inputs in, const __grid_constant__ ProductsParts parts) {
  constexpr int SHARES = END_THREADS / LANES;
  extern __shared__ double weights[];  // (blocks,) of the row's other parts
  __shared__ double scratch[33], sums[SHARES][VECTORS][LANES][4];
  const int64_t chunks = ceil_div(in.d, 4 * LANES * VECTORS);
  const int64_t index = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const int lane = threadIdx.x % LANES, share = threadIdx.x / LANES;
  const float* const x = static_cast<const float*>(in.x.data) + index * in.d;  // parts give means: a = 0
  int64_t at[VECTORS];
  bool within[VECTORS];
  float4 mine[VECTORS], first[VECTORS];
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    at[v] = 4 * ((chunk * VECTORS + v) * LANES + lane), within[v] = at[v] < in.d;
    mine[v] = first[v] = make_float4(0, 0, 0, 0);
    if (within[v] && share == 0 && !in.mailboxes) mine[v] = *reinterpret_cast<const float4*>(x + at[v]);
  }
  wait_for_previous_launch();
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    if (within[v] && share == 0)
      first[v] = __ldcg(reinterpret_cast<const float4*>(parts.firsts + index * in.d + at[v]));
  }
  const ProductsRow left = parts.rows[index];
  const int others = left.to - left.from;  // negative: nothing to read
  const auto part_of = [&](int j) { return (left.from + 1 + j) * PRODUCTS_ROWS + left.row; };
  const auto load_other = [&](int j) {
    const PartRow* const from = parts.others + part_of(j);
    const double2 weights = __ldcg(reinterpret_cast<const double2*>(&from->log2_weight));
    const float4 rest = __ldcg(reinterpret_cast<const float4*>(&from->lead));
    return PartRow{weights.x, weights.y, rest.x, rest.y, rest.z, 0};
  };
  const auto load_sums = [&](int j, int v) {
    return __ldcg(reinterpret_cast<const float4*>(parts.sums + part_of(j) * in.d + at[v]));
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
  PartRow all = left.own;
  if (others < 0) all.total = NAN;
  double weight = 1, by_source = 0;
  bool doubtful = left.own.scale > 0, settled = is_settled(static_cast<float>(left.own.total) - left.own.lead,
                                                           static_cast<float>(left.own.total), left.own.norm);
  const float* source = nullptr;
  if (in.source.data && others >= 0) source = static_cast<const float*>(in.source.data) + index * in.d;
  if (others > 0 || source) {
    PartRow mine{-INFINITY, 0, 0, 0};
    if (part < 0) {
      mine = left.own;
    } else if (part < others) {
      mine = load_other(part);
    }
    const auto greater = [](double a, double b) { return a >= b || b != b ? a : b; };
    double top = mine.log2_weight;
    if (source) {  // a part like any other
      const Row row = row_coefficients(in, index);
      double score = 0, square = 0;
      for (int64_t i = threadIdx.x; i < in.d; i += END_THREADS) {
        const double s = source[i], y = row.sign * x[i];
        score = fma(fma(-0.5 * row.alpha, s, y), s, score);
        square = fma(y, y, square);
      }
      score = row.rate() * fma(score, 0.0, score);  // what is not finite becomes NaN
      if (in.lse.data || in.labels[index] < 0) score -= 0.5 * square / (row.sigma * row.sigma);
      by_source = LOG2_E * block_sum<double>(score, scratch);
      top = greater(top, by_source);
    }
#pragma unroll 1
    for (int j = NEAR + 1 + part; j < others; j += 32) top = greater(top, load_other(j).log2_weight);
#pragma unroll 1
    for (int hop = 16; hop > 0; hop /= 2) top = greater(top, __shfl_xor_sync(0xffffffffu, top, hop));
    weight = power(mine.log2_weight - top);
    double total = weight * mine.total, lead = weight * mine.lead;
    float scale = mine.scale, beyond = mine.norm;
#pragma unroll 1
    for (int j = NEAR + 1 + part; j < others; j += 32) {
      const PartRow far = load_other(j);
      weights[j] = power(far.log2_weight - top);
      total = fma(weights[j], far.total, total);
      scale = fmaxf(scale, far.scale);
      if (weights[j] * far.lead > lead) lead = weights[j] * far.lead, beyond = far.norm;
    }
#pragma unroll 1
    for (int hop = 16; hop > 0; hop /= 2) total += __shfl_xor_sync(0xffffffffu, total, hop);
    if (source) by_source = power(by_source - top);
    all.log2_weight = top, all.total = total + by_source;
    settled =
        __any_sync(0xffffffffu, is_settled(static_cast<float>(all.total - fmax(lead, by_source)),
                                           static_cast<float>(all.total), lead > by_source ? beyond : 0));
    doubtful = __any_sync(0xffffffffu, scale > 0);
  }
  if (doubtful && !settled) {
    constexpr int64_t ELEMENTS = 4 * LANES * VECTORS;
    const int64_t low = chunk * ELEMENTS;
    const int64_t high = min(low + ELEMENTS, in.d);
    double* const all_weights = weights + max(others, 0);
    if (part < others) all_weights[part + 1] = weight;
#pragma unroll 1
    for (int j = NEAR + 1 + part; j < others; j += 32) all_weights[j + 1] = weights[j];
    __syncthreads();
    if (!finish_if_close(in, parts, index, low, high, all.log2_weight, all.total, by_source, all_weights,
                         scratch))
      settle_at_end(in, parts, index, low, high, all.log2_weight, all.total, by_source, all_weights,
                    all_weights + others + 1, scratch);
    return;
  }
  const double by_first = __shfl_sync(0xffffffffu, weight, 0);
  if (others > NEAR) __syncthreads();
  const double by = left.b / all.total;
  const Array out = out_of(in, index);
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    double sum[4] = {by_first * first[v].x, by_first * first[v].y, by_first * first[v].z,
                     by_first * first[v].w};
    const auto add = [&](double weight, float4 four) {
      sum[0] = fma(weight, static_cast<double>(four.x), sum[0]);
      sum[1] = fma(weight, static_cast<double>(four.y), sum[1]);
      sum[2] = fma(weight, static_cast<double>(four.z), sum[2]);
      sum[3] = fma(weight, static_cast<double>(four.w), sum[3]);
    };
#pragma unroll 4
    for (int first = 0; first < others; first += SHARES) {
      const int j = first + share;
      const double near = __shfl_sync(0xffffffffu, weight, min(j, NEAR - 1) + 1);
      if (within[v] && j < others) add(j < NEAR ? near : weights[j], first == 0 ? early[v] : load_sums(j, v));
    }
    if (SHARES > 1) {
      for (int k = 0; k < 4; ++k) sums[share][v][lane][k] = sum[k];
      __syncthreads();
      for (int k = 0; k < 4; ++k) {
        for (int other = 1; other < SHARES; ++other) sum[k] += sums[other][v][lane][k];
      }
    }
    if (!within[v] || share > 0) continue;
    if (source) add(by_source, *reinterpret_cast<const float4*>(source + at[v]));
    *reinterpret_cast<float4*>(static_cast<float*>(out.data) + index * in.d + at[v]) =
        make_float4(static_cast<float>(fma(left.a, static_cast<double>(mine[v].x), by * sum[0])),
                    static_cast<float>(fma(left.a, static_cast<double>(mine[v].y), by * sum[1])),
                    static_cast<float>(fma(left.a, static_cast<double>(mine[v].z), by * sum[2])),
                    static_cast<float>(fma(left.a, static_cast<double>(mine[v].w), by * sum[3])));
  }
  if (in.lse.data && chunk == 0 && threadIdx.x == 0) write_lse(in, index, all);
}

template <int LANES, int VECTORS>
bool launch_end_if(const char* op, const Inputs& in, const ProductsParts& parts, int64_t blocks,
                   cudaStream_t stream) {
  const int64_t grid = in.n * ceil_div(in.d, 4 * LANES * VECTORS);
  if (LANES < END_THREADS && grid > 4 * blocks) return false;
  launch_following(op, true, end_kernel<LANES, VECTORS>, dim3(static_cast<unsigned>(grid)), END_THREADS,
                   end_doubles(blocks) * sizeof(double), stream, in, parts);
  return true;
}

}  // namespace

bool has_short_list(int64_t n, int64_t k, int64_t m) {
  return n <= SHORT_ROWS && k <= OWN_LIST_GROUPS && m < int64_t{1} << 31;
}

// Few rows have many parts each.
void end_products(const char* op, const Inputs& in, const ProductsParts& parts, int64_t blocks,
                  cudaStream_t stream) {
  launch_end_if<8, 1>(op, in, parts, blocks, stream) || launch_end_if<32, 1>(op, in, parts, blocks, stream) ||
      launch_end_if<END_THREADS, 2>(op, in, parts, blocks, stream);
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
    check_cuda(op, cudaFuncSetAttribute(short_list_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(sizeof(ShortList))));
    short_list_kernel<<<static_cast<unsigned>(1 + copies), SHORT_THREADS, sizeof(ShortList), stream>>>(
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

void merge_parts(const char* op, const Inputs& in, const UnitList& list, const BulkParts& parts,
                 int64_t slices, int64_t slice, int rows, int64_t teams, cudaStream_t stream) {
  const bool many = teams >= MERGE_MANY * ceil_div(in.n, rows);
  const int64_t chunks = ceil_div(in.d, merge_elements(many ? MERGE_MANY_SHARES : MERGE_SHARES));
  const auto kernel = many ? merge_kernel<MERGE_MANY_SHARES> : merge_kernel<MERGE_SHARES>;
  launch_following(op, true, kernel, dim3(static_cast<unsigned>(in.n * chunks)), MERGE_THREADS,
                   teams * sizeof(double), stream, in, list, parts, static_cast<int>(slices), slice, rows,
                   teams);
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
