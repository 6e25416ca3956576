// Small sets on Hopper's matrix units: float16 or bfloat16 references that the multiprocessors' shared
// memories hold all together, a pool or few classes, beside any number of rows. One cooperative launch:
//
//  * each block brings its slice of its chunk of references to shared memory, where it stays. Blocks of one
//    chunk, of all slices, are a team
//  * scores: of the rows that have its class, the block's share of y.r_j - alpha/2 |d_j|^2, to memory. c is
//    the class's first reference, d_j = r_j - c and y = x - alpha c
//  * when all have: weights. A row has a group of four warps somewhere, which adds up the shares in float64.
//    Where their rounding would be seen in the result, references of weight are scored again, in float64
//  * when all have: sums. Blocks add up their slice of their references, for the rows of their class, and
//    write results; of rows that have several chunks only parts of the sums, which are put together when all
//    have.
//
// Products. y and the weights are sums of values of T (Split), references exact as they are stored. The
// matrix units, which round towards zero, add up few products; what they give joins float32 sums. Of a slice
// y is scaled by a power of two.
//
// Score. -|x - alpha r_j|^2 / 2 is alpha (s_j + alpha/2 |c|^2) less |x|^2 / 2, s_j what shares add up to: for
// rows of one class c is the same, rows of all classes add its part.
#include <algorithm>

#include "common/planner_held.h"
#include "common/wgmma.cuh"
#include "stable_target/bulk_products.cuh"
#include "stable_target/launch.cuh"

namespace svel::cuda {
namespace {

constexpr int WARPS = HELD_THREADS / 32;
constexpr int GROUP_WARPS = 4, GROUP = 32 * GROUP_WARPS, GROUPS = HELD_THREADS / GROUP;
// Steps of 16 that the matrix units add up: of scores; of sums, which are small beside their terms where x
// and the mean cancel, one.
constexpr int SCORE_DEPTH = 4, SUM_DEPTH = 1;
constexpr float WEIGHT_SCALE = 1 << 14;  // of the best: a weight's second part of float16 keeps its digits
constexpr int TILES = 2;                 // of sixteen references, or elements, that a warp has at a time
constexpr int LISTED = 256;  // references of a group that are scored again at a time: two to a thread

// What a score may be off by, of the root of the sum over slices of the square of the largest term: almost
// twice what it is by emulation. What the share of the best is taken for at least.
constexpr float HELD_ROUNDING = 9e-8f, LEAST_SHARE = 0.25f;

struct Held {
  HeldCut cut;
  int64_t stride;   // references of all classes, in scores and weights
  int padded;       // of a class
  float* scores;    // (n, slices, stride)
  float* sums;      // (teams, n, d), of rows with several chunks
  double* exact;    // (n, stride) scores
  void* weights;    // (parts, n, stride)
  double2* ends;    // (n,) out = x sum w_j r_j + y x
  float* scales;    // (n, teams, slices) the largest terms of shares
  double* centres;  // (k, slices) |c|^2
  bool exact_weights;
};

// What calls know of a row. Not in line, here and below: code that has to come from memory first takes longer
// than a call, and most of it runs once.
struct RowFacts {
  Row row;
  int group;  // -1: all
  bool any;   // whether it may have anything to read
};
__device__ __noinline__ RowFacts know_row(const Inputs& in, int64_t index) {
  RowFacts facts;
  int64_t label;
  facts.any = row_reads(in, index, 1, label);
  facts.group = in.k == 1 ? 0 : static_cast<int>(label);
  facts.row = row_coefficients(in, index);
  return facts;
}

struct HeldShared {
  float norms[HELD_MOST_REFS], centre[HELD_MOST_SLICE];
  int of_warps[WARPS];
  int class_counts[HELD_MOST_TEAMS], team_counts[HELD_MOST_TEAMS];  // valid references
  // Of a batch, of one after the other.
  float unscale[2][HELD_BATCH], scales[3][HELD_BATCH];
  // Of groups.
  double scratch[GROUPS][GROUP_WARPS];
  int list[GROUPS][LISTED], counts[GROUPS][GROUP_WARPS];
  RowFacts facts[GROUPS];
};
static_assert(sizeof(HeldShared) <= HELD_FIXED_SMEM);

// What a block knows of the rows of its class, in their order; ends: of its own.
struct HeldRows {
  double2* ends;       // of Held
  int* index;          // in x
  int* place;          // of the class's first reference among the row's scores; PARTLY: it has several chunks
  float *high, *rest;  // alpha in float32, and what that drops
  float* half_alpha;   // with the sign of x, see Row

  __device__ HeldRows(char* memory, int64_t n)
      : ends(reinterpret_cast<double2*>(memory)),
        index(reinterpret_cast<int*>(ends + n)),
        place(index + n),
        high(reinterpret_cast<float*>(place + n)),
        rest(high + n),
        half_alpha(rest + n) {}
};
static_assert(sizeof(double2) + 5 * sizeof(int) == HELD_ROW_SMEM);
constexpr int PARTLY = 1 << 30;

// Four 8 x 8 matrices: each lane names a row of 16 bytes.
__device__ __forceinline__ uint4 load_straight(uint32_t row) {
  uint32_t v[4];
  load_matrices(row, v);
  return make_uint4(v[0], v[1], v[2], v[3]);
}

// TILES times sixteen references, or elements of D, beside sixteen rows, or eight. load_a(step, tile): the
// left operand; lines: of the right one, PARTS of them, `part` bytes apart.
template <typename T, int DEPTH, typename LoadA>
__device__ __forceinline__ void multiply_lines(int steps, bool both, const LoadA& load_a, uint32_t lines,
                                               uint32_t part, float (&sums)[TILES][2][4]) {
  constexpr int PARTS = Split<T>::PARTS;
#pragma unroll 1
  for (int first = 0; first < steps; first += DEPTH) {
    float acc[TILES][2][4] = {};
#pragma unroll
    for (int s = 0; s < DEPTH; ++s) {
      if (first + s >= steps) break;
      uint4 a[TILES], b[PARTS];
#pragma unroll
      for (int k = 0; k < TILES; ++k) a[k] = load_a(first + s, k);
#pragma unroll
      for (int p = 0; p < PARTS; ++p) b[p] = load_straight(lines + p * part + 32 * (first + s));
#pragma unroll
      for (int p = PARTS - 1; p >= 0; --p)
#pragma unroll
        for (int k = 0; k < TILES; ++k) multiply_16<T>(acc[k][0], a[k], make_uint2(b[p].x, b[p].y));
      if (!both) continue;
#pragma unroll
      for (int p = PARTS - 1; p >= 0; --p)
#pragma unroll
        for (int k = 0; k < TILES; ++k) multiply_16<T>(acc[k][1], a[k], make_uint2(b[p].z, b[p].w));
    }
#pragma unroll
    for (int k = 0; k < TILES; ++k)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int q = 0; q < 4; ++q) sums[k][i][q] += acc[k][i][q];
  }
}

// A group's reductions; all its threads get the result.
struct HeldGroup {
  int number, tid;
  double* scratch;  // (GROUP_WARPS,)

  __device__ __forceinline__ void wait() const { named_barrier(1 + number, GROUP); }
  template <typename Add>
  __device__ __forceinline__ double over(double v, const Add& add) const {
#pragma unroll
    for (int hop = 16; hop > 0; hop /= 2) v = add(v, __shfl_xor_sync(0xffffffffu, v, hop));
    wait();
    if (tid % 32 == 0) scratch[tid / 32] = v;
    wait();
    double all = scratch[0];
#pragma unroll
    for (int w = 1; w < GROUP_WARPS; ++w) all = add(all, scratch[w]);
    return all;
  }
  __device__ __forceinline__ double sum(double v) const {
    return over(v, [](double a, double b) { return a + b; });
  }
  __device__ __forceinline__ double maximum(double v) const {  // a NaN counts as the lowest value
    return over(v, [](double a, double b) { return a >= b || b != b ? a : b; });
  }
};

// In units of log 2, by a warp: -|x - alpha r|^2 / (2 sigma^2).
template <typename T>
__device__ __noinline__ double exact_score(const Inputs& in, const Row& row, int64_t reference, int lane) {
  const T* const from = static_cast<const T*>(in.refs.data) + reference * in.d;
  const int64_t base = row.index * in.d;
  const bool aligned = is_aligned(in.x.data);
  double square = 0;
#pragma unroll 2
  for (int64_t e = 8 * lane; e < in.d; e += 8 * 32) {
    double x[8];
    if (aligned) {
      load8(in.x, base + e, x);
    } else {
      for (int q = 0; q < 8; ++q) x[q] = load_as<double>(in.x, base + e + q);
    }
    const uint4 raw = *reinterpret_cast<const uint4*>(from + e);
    const T* const r = reinterpret_cast<const T*>(&raw);
#pragma unroll
    for (int q = 0; q < 8; ++q) {
      const double gap = fma(-row.alpha, static_cast<double>(to_float(r[q])), row.sign * x[q]);
      square = fma(gap, gap, square);
    }
  }
  return -LOG2_E / (2 * row.sigma * row.sigma) * warp_sum(square);
}

// The weights of rows, by a group of warps each.
template <typename T>
struct Weigher {
  static constexpr int PARTS = Split<T>::PARTS;

  const Inputs& in;
  const Held& held;
  HeldShared& shared;
  const HeldGroup crew;
  const int thread = crew.tid;

  // visit(class, place, count) of each class that a row has.
  template <typename Visit>
  __device__ __forceinline__ void each_class(int group, const Visit& visit) const {
    const int begin = max(group, 0), end = group < 0 ? static_cast<int>(in.k) : group + 1;
#pragma unroll 1
    for (int g = begin; g < end; ++g) visit(g, group < 0 ? g * held.padded : 0, shared.class_counts[g]);
  }

  // The scores from their shares; this thread's best and where it is.
  struct Best {
    double score = -INFINITY;
    int64_t reference = -1;                     // among all
    double2 first = make_double2(INFINITY, 0);  // its first two scores; INFINITY: none
    __device__ __forceinline__ void note(double its, int64_t at) {
      if (its > score) score = its, reference = at;
    }
  };
  __device__ __forceinline__ Best add_shares(const RowFacts& facts) const {
    const int slices = static_cast<int>(held.cut.slices);
    const float* const shares = held.scores + facts.row.index * slices * held.stride;
    double* const exact = held.exact + facts.row.index * held.stride;
    Best best;
    each_class(facts.group, [&](int g, int place, int count) {
      double common = 0;
      if (facts.group < 0 && count > 0) {
#pragma unroll 1
        for (int s = 0; s < slices; ++s) common += __ldcg(held.centres + g * slices + s);
        common *= 0.5 * facts.row.alpha;
      }
#pragma unroll 1
      for (int j = 2 * thread; j < count; j += 2 * GROUP) {
        double2 sum = make_double2(common, common);
        const float* from = shares + place + j;
        constexpr int AHEAD = 8;
#pragma unroll 1
        for (int s = 0; s < slices; s += AHEAD, from += AHEAD * held.stride) {
          float2 v[AHEAD];
#pragma unroll
          for (int q = 0; q < AHEAD; ++q)
            v[q] = s + q < slices ? __ldcg(reinterpret_cast<const float2*>(from + q * held.stride))
                                  : make_float2(0, 0);
#pragma unroll
          for (int q = 0; q < AHEAD; ++q)
            sum.x += static_cast<double>(v[q].x), sum.y += static_cast<double>(v[q].y);
        }
        *reinterpret_cast<double2*>(exact + place + j) = sum;
        if (best.first.x == INFINITY) best.first = sum;
        best.note(sum.x, g * in.m + j);
        if (j + 1 < count) best.note(sum.y, g * in.m + j + 1);
      }
    });
    return best;
  }

  // Weights, times WEIGHT_SCALE, beside that of score `top`, to memory; their sum, without.
  __device__ __forceinline__ double weigh(const RowFacts& facts, double rate2, double top,
                                          double2 first = make_double2(INFINITY, 0)) const {
    const double* const exact = held.exact + facts.row.index * held.stride;
    double total = 0;
    each_class(facts.group, [&](int, int place, int count) {
#pragma unroll 1
      for (int j = 2 * thread; j < (count + 7) / 8 * 8; j += 2 * GROUP) {
        float left[2] = {};
        const double2 its =
            first.x == INFINITY ? *reinterpret_cast<const double2*>(exact + place + j) : first;
        first.x = INFINITY;
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          const double score = q ? its.y : its.x;
          const float bits = static_cast<float>(rate2 * (score - top));
          // Of a reference that is not finite nothing is.
          if (j + q < count)
            left[q] = !(score > -INFINITY) ? NAN : bits > -150 ? exp2f(bits) * WEIGHT_SCALE : 0;
          total += static_cast<double>(left[q]);
        }
        T* to = static_cast<T*>(held.weights) + facts.row.index * held.stride + place + j;
#pragma unroll
        for (int p = 0; p < PARTS; ++p) {
          T own[2];
#pragma unroll
          for (int q = 0; q < 2; ++q) {
            own[q] = Split<T>::nearest(left[q]), left[q] -= to_float(own[q]);
          }
          *reinterpret_cast<uint32_t*>(to) = pair_of(own[0], own[1]);
          to += in.n * held.stride;
        }
      }
    });
    return crew.sum(total) / WEIGHT_SCALE;
  }

  __device__ __forceinline__ void leave(const RowFacts& facts, double total) const {
    if (thread == 0)
      held.ends[facts.row.index] = make_double2(facts.row.b / (total * WEIGHT_SCALE), facts.row.a);
  }

  // A row without references.
  __device__ __noinline__ static void leave_nothing(const Inputs& in, int64_t index, int thread) {
    for (int64_t e = thread; e < in.d; e += GROUP) store_as(in.out, index * in.d + e, NAN);
    if (thread == 0 && in.lse.data) store_as(in.lse, index, NAN);
  }

  // This thread's share of the sum over slices of the square of the largest term.
  __device__ __forceinline__ float square_of_scales(const RowFacts& facts) const {
    const int slices = static_cast<int>(held.cut.slices), chunks = static_cast<int>(held.cut.chunks);
    const int teams = static_cast<int>(in.k) * chunks;
    const int begin = facts.group < 0 ? 0 : facts.group * chunks,
              end = facts.group < 0 ? teams : begin + chunks;
    const float* const scales = held.scales + facts.row.index * teams * slices;
    float square = 0;
#pragma unroll 1
    for (int s = thread; s < slices; s += GROUP) {
      float most = 0;
#pragma unroll 4
      for (int k = begin; k < end; ++k)
        if (shared.team_counts[k] > 0) most = fmaxf(most, __ldcg(scales + k * slices + s));
      square = fmaf(most, most, square);
    }
    return square;
  }

  __device__ __forceinline__ void operator()(const RowFacts& facts) const {
    const float square = facts.any && held.exact_weights ? square_of_scales(facts) : 0;
    const Best best = facts.any ? add_shares(facts) : Best{};
    int number = 0;
    if (facts.any) each_class(facts.group, [&](int, int, int count) { number += count; });
    if (number == 0) return leave_nothing(in, facts.row.index, thread);
    const double rate2 = facts.row.rate() * LOG2_E, top = crew.maximum(best.score);
    const double total = weigh(facts, rate2, top, best.first);
    // Whether what scores may be off by is seen.
    float wrong = 0;  // beside the most that is not
    if (held.exact_weights) {
      const float share = static_cast<float>(1 / total), spread = static_cast<float>((total - 1) / total);
      const float by = fmaxf(0.5f * fabsf(static_cast<float>(facts.row.b)), 1);
      const float scale = static_cast<float>(rate2) * sqrtf(static_cast<float>(crew.sum(square)));
      const float error = HELD_ROUNDING / MOST_ERROR_OF_SCORES * scale * by;
      // Copies of a sample are off alike: many of them are no better than a few.
      if (error * sqrtf(fmaxf(share, LEAST_SHARE)) * spread > 1) wrong = error;
    }
    if (wrong > 0 || in.lse.data) return weigh_again(in, held, shared, crew, facts, best, top, total, wrong);
    leave(facts, total);
  }

  // The same with exact scores of the references of weight, or of the best alone, for what is known of it.
  __device__ __noinline__ static void weigh_again(const Inputs& in, const Held& held, HeldShared& shared,
                                                  const HeldGroup& group, const RowFacts& facts, Best best,
                                                  double top, double total, float wrong) {
    const Weigher own{in, held, shared, group};
    const HeldGroup& crew = own.crew;
    const Row& row = facts.row;
    const int thread = own.thread;
    const double rate2 = row.rate() * LOG2_E;
    double* const exact = held.exact + row.index * held.stride;
    // The best of all, the first of equal ones.
    const double first = crew.maximum(
        best.score == top && best.reference >= 0 ? -static_cast<double>(best.reference) : -INFINITY);
    double of_best = 0;  // in units of log 2
    if (thread < 32)
      of_best = exact_score<T>(in, row, first > -INFINITY ? static_cast<int64_t>(-first) : 0, thread);
    of_best = crew.sum(thread == 0 ? of_best : 0);
    if (wrong > 0) {
      // What shares of the weight below 2^-bits are off by, each by itself, is seen no more.
      const double bits = 2 + 2 * fmaxf(log2f(wrong), 0.0f);
      int* const list = shared.list[crew.number];
      int* const counts = shared.counts[crew.number];
      const double near = top - bits / rate2;
      Best now;
      own.each_class(facts.group, [&](int g, int place, int count) {
#pragma unroll 1
        for (int from = 0; from < count; from += 2 * GROUP) {
          const int j = from + 2 * thread;
          const bool one = j < count && exact[place + j] > near,
                     two = j + 1 < count && exact[place + j + 1] > near;
          const unsigned ones = __ballot_sync(0xffffffffu, one), twos = __ballot_sync(0xffffffffu, two);
          if (thread % 32 == 0) counts[thread / 32] = __popc(ones) + __popc(twos);
          crew.wait();
          int at = 0, all = 0;
#pragma unroll
          for (int w = 0; w < GROUP_WARPS; ++w) {
            if (w < thread / 32) at += counts[w];
            all += counts[w];
          }
          const unsigned before = (1u << thread % 32) - 1;
          at += __popc(ones & before) + __popc(twos & before);
          if (one) list[at++] = j;
          if (two) list[at] = j + 1;
          crew.wait();
#pragma unroll 1
          for (int i = thread / 32; i < all; i += GROUP_WARPS) {
            const double score = exact_score<T>(in, row, g * in.m + list[i], thread % 32);
            if (thread % 32 == 0) exact[place + list[i]] = top + (score - of_best) / rate2;
          }
          crew.wait();
          if (j < count) now.note(exact[place + j], j);
          if (j + 1 < count) now.note(exact[place + j + 1], j + 1);
        }
      });
      // The best may be another now.
      const double before = top;
      top = crew.maximum(now.score), of_best += rate2 * (top - before);
      total = own.weigh(facts, rate2, top);
    }
    own.leave(facts, total);
    if (thread == 0 && in.lse.data) write_lse(in, row.index, PartRow{of_best, total, 0, 0, 0, 0});
  }
};

// USUAL: x and out are float32, aligned to 16 bytes.
template <typename T, bool USUAL>
struct HeldKernel {
  static constexpr int PARTS = Split<T>::PARTS;
  static constexpr int MOST = static_cast<int>(HELD_MOST_SLICE / 128);  // fours of a lane
  static constexpr int EACH = static_cast<int>(HELD_BATCH) / WARPS;     // rows of a warp in a batch

  const Inputs& in;
  const Held& held;
  HeldShared& shared;
  const HeldRows list;
  T* const refs;   // (chunk, slice + HELD_PAD)
  T* const lines;  // (buffers, PARTS, batch, line): y, then weights
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int chunks = static_cast<int>(held.cut.chunks), slices = static_cast<int>(held.cut.slices);
  const int row_parts = static_cast<int>(held.cut.row_parts), classes = static_cast<int>(in.k);
  const int chunk = static_cast<int>(held.cut.chunk), slice = static_cast<int>(held.cut.slice);
  const int batch = static_cast<int>(held.cut.batch), buffers = static_cast<int>(held.cut.buffers);
  // The block's place.
  const int part = static_cast<int>(blockIdx.x) % row_parts;
  const int rank = static_cast<int>(blockIdx.x) / row_parts % slices;
  const int team = static_cast<int>(blockIdx.x) / (row_parts * slices), teams = classes * chunks;
  const int group = team / chunks, first_ref = team % chunks * chunk, offset = rank * slice;
  const int length = static_cast<int>(min(in.d - offset, int64_t{slice}));
  const int valid = count_of(group, team);
  const int pitch = slice + static_cast<int>(HELD_PAD);
  const int line = max(slice, chunk) + static_cast<int>(HELD_PAD);
  int rows = 0, first_row = 0;  // of the class's rows, those of this block,
  int step = 0;                 // and of a batch: all have as many, or nearly
  bool several = false;         // whether any row has several chunks

  __device__ __forceinline__ int count_of(int its_group, int of_team) const {
    const int count = static_cast<int>(valid_count(in, its_group)) - of_team % chunks * chunk;
    return max(0, min(count, chunk));
  }
  __device__ __forceinline__ bool has_several(int its_group) const { return chunks > 1 || its_group < 0; }
  __device__ __forceinline__ int index_of(int i) const { return list.index[first_row + i]; }

  __device__ __forceinline__ void begin_loading() const {
    const T* const from =
        static_cast<const T*>(in.refs.data) + (int64_t{group} * in.m + first_ref) * in.d + offset;
#pragma unroll 1
    for (int j = warp; j < chunk; j += WARPS) {
#pragma unroll 1
      for (int e = 8 * lane; e < slice; e += 8 * 32) {
        float4* const to = reinterpret_cast<float4*>(refs + j * pitch + e);
        if (j < valid && e < length) {
          copy_async(to, reinterpret_cast<const float*>(from + j * in.d + e));
        } else {
          *to = make_float4(0, 0, 0, 0);
        }
      }
    }
  }

  // The rows of this class, in their order, what is to know of them, and which are this block's.
  __device__ __forceinline__ void list_rows() {
#pragma unroll 1
    for (int i = tid; i < teams; i += HELD_THREADS) {
      shared.team_counts[i] = count_of(i / chunks, i);
      if (i < classes) shared.class_counts[i] = static_cast<int>(valid_count(in, i));
    }
    int count = 0;
    bool spread = false;
#pragma unroll 1
    for (int first = 0; first < in.n; first += HELD_THREADS) {
      const int index = first + tid;
      RowFacts facts{};
      if (index < in.n) facts = know_row(in, index);
      spread = spread || (facts.any && has_several(facts.group));
      const bool mine = facts.any && valid > 0 && (facts.group < 0 || facts.group == group);
      const unsigned all = __ballot_sync(0xffffffffu, mine);
      if (lane == 0) shared.of_warps[warp] = __popc(all);
      __syncthreads();
      int place = count + __popc(all & ((1u << lane) - 1));
#pragma unroll 1
      for (int w = 0; w < WARPS; ++w) {
        if (w < warp) place += shared.of_warps[w];
        count += shared.of_warps[w];
      }
      if (mine) {
        const float high = static_cast<float>(facts.row.alpha);
        list.index[place] = index;
        list.place[place] =
            (facts.group < 0 ? group * held.padded : 0) | (has_several(facts.group) ? PARTLY : 0);
        list.high[place] = high, list.rest[place] = static_cast<float>(facts.row.alpha - high);
        list.half_alpha[place] = copysignf(0.5f * high, static_cast<float>(facts.row.sign));
      }
      several = __syncthreads_or(spread);
    }
    const int each = ((count + row_parts - 1) / row_parts + 7) / 8 * 8;
    first_row = min(part * each, count), rows = min(each, count - first_row);
    const int turns = max((rows + batch - 1) / batch, 1);
    step = ((rows + turns - 1) / turns + 7) / 8 * 8;
  }
  __device__ __forceinline__ int end_of(int first) const { return min(rows, first + step); }

  // |d_j|^2 of the slice, eight threads to a reference, and |c|^2; the centre is in shared memory.
  __device__ __forceinline__ void form_norms() const {
#pragma unroll 1
    for (int j = tid / 8; j < chunk; j += HELD_THREADS / 8) {
      float square = 0;
#pragma unroll 1
      for (int e = 8 * (tid % 8); e < slice; e += 8 * 8) {
        const uint4 raw = *reinterpret_cast<const uint4*>(refs + j * pitch + e);
        const T* const r = reinterpret_cast<const T*>(&raw);
        const float4 low = *reinterpret_cast<const float4*>(shared.centre + e),
                     high = *reinterpret_cast<const float4*>(shared.centre + e + 4);
        const float c[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        float eight = 0;
#pragma unroll
        for (int q = 0; q < 8; ++q) {
          const float apart = to_float(r[q]) - c[q];
          eight = fmaf(apart, apart, eight);
        }
        square += eight;
      }
#pragma unroll
      for (int hop = 4; hop > 0; hop /= 2) square += __shfl_xor_sync(0xffffffffu, square, hop);
      if (tid % 8 == 0) shared.norms[j] = square;
    }
    if (warp == 0 && first_ref == 0 && part == 0) {
      double square = 0;
#pragma unroll 1
      for (int e = lane; e < slice; e += 32) {
        const double c = shared.centre[e];
        square = fma(c, c, square);
      }
      square = warp_sum(square);
      if (lane == 0) held.centres[group * slices + rank] = square;
    }
  }

  // x of a warp's rows of the batch that begins at `first`.
  __device__ __forceinline__ void load_x(int first, float4 (&x)[EACH][MOST]) const {
    const int end = end_of(first);
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const int i = warp + k * WARPS;
      const bool is_row = i < batch && first + i < end;
      const int64_t base = is_row ? index_of(first + i) * in.d + offset : 0;
#pragma unroll
      for (int v = 0; v < MOST; ++v) {
        const int e = 128 * v + 4 * lane;
        x[k][v] = make_float4(0, 0, 0, 0);
        if (!is_row || e >= length) continue;
        x[k][v] = USUAL ? *reinterpret_cast<const float4*>(static_cast<const float*>(in.x.data) + base + e)
                        : load_four(in.x, base + e, base + length);
      }
    }
  }

  // Their y, in parts.
  __device__ __forceinline__ void prepare(int first, int turn, const float4 (&x)[EACH][MOST]) const {
    const int end = end_of(first);
    T* const to_batch = lines + turn % buffers * PARTS * batch * line;
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const int i = warp + k * WARPS;
      if (i >= batch) continue;
      const int its = first_row + first + i;
      const bool is_row = first + i < end;
      const float high = is_row ? list.high[its] : 0, rest = is_row ? list.rest[its] : 0;
      const float sign = is_row ? copysignf(1, list.half_alpha[its]) : 0;
      float y[MOST][4], most = 0, scale = 1;
#pragma unroll
      for (int v = 0; v < MOST; ++v) {
        const int e = 128 * v + 4 * lane;
        const float4 c =
            e < slice ? *reinterpret_cast<const float4*>(shared.centre + e) : make_float4(0, 0, 0, 0);
        const auto of = [&](float x, float c) { return fmaf(-rest, c, fmaf(-high, c, sign * x)); };
        y[v][0] = of(x[k][v].x, c.x), y[v][1] = of(x[k][v].y, c.y);
        y[v][2] = of(x[k][v].z, c.z), y[v][3] = of(x[k][v].w, c.w);
#pragma unroll
        for (int q = 0; q < 4; ++q) most = fmaxf(most, fabsf(y[v][q]));
      }
#pragma unroll
      for (int hop = 16; hop > 0; hop /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, hop));
      if (most > 0 && most < 1e30f) {
        const int exponent = static_cast<int>(__float_as_uint(most) >> 23) - 127;  // of a normal number
        scale = __int_as_float((127 + min(12 - exponent, 120)) << 23);
      }
      T* const to = to_batch + i * line;
#pragma unroll
      for (int v = 0; v < MOST; ++v) {
        const int e = 128 * v + 4 * lane;
        if (e >= slice) continue;
#pragma unroll
        for (int q = 0; q < 4; ++q) y[v][q] *= scale;
#pragma unroll
        for (int p = 0; p < PARTS; ++p) {
          T own[4];
#pragma unroll
          for (int q = 0; q < 4; ++q) own[q] = Split<T>::nearest(y[v][q]), y[v][q] -= to_float(own[q]);
          *reinterpret_cast<uint2*>(to + p * batch * line + e) =
              make_uint2(pair_of(own[0], own[1]), pair_of(own[2], own[3]));
        }
      }
      if (lane == 0) shared.unscale[turn % 2][i] = 1 / scale, shared.scales[turn % 3][i] = 0;
    }
  }

  // What a warp multiplies, one after the other: items of eight rows, which may come last, two to a warp.
  __device__ __forceinline__ int item_of(int turn) const {
    return turn * WARPS + (turn % 2 ? WARPS - 1 - warp : warp);
  }

  // The batch's shares of scores, to memory.
  __device__ __forceinline__ void score(int first, int turn) const {
    const int end = end_of(first);
    const int halves = batch / 16, steps = slice / 16, matrix = lane / 8, row8 = lane % 8;
    const int tiles = (valid + 16 * TILES - 1) / (16 * TILES);
    const int from = lane / 4, pair = lane % 4 * 2;
    const T* const of_batch = lines + turn % buffers * PARTS * batch * line;
#pragma unroll 1
    for (int turns = 0; turns * WARPS < tiles * halves; ++turns) {
      const int item = item_of(turns);
      if (item >= tiles * halves) continue;
      const int half = item >= tiles, j0 = (item - half * tiles) * 16 * TILES, i0 = 16 * half;
      if (first + i0 >= end) continue;
      const uint32_t a = shared_address(refs + (j0 + matrix % 2 * 8 + row8) * pitch + matrix / 2 * 8);
      const uint32_t b = shared_address(of_batch + (i0 + matrix / 2 * 8 + row8) * line + matrix % 2 * 8);
      const auto load_a = [&](int step, int tile) {
        return load_straight(a + 32 * step + 32 * tile * pitch);
      };
      float sums[TILES][2][4] = {};
      multiply_lines<T, SCORE_DEPTH>(steps, first + i0 + 8 < end, load_a, b, 2 * batch * line, sums);
      float norms[TILES][2];
#pragma unroll
      for (int k = 0; k < TILES; ++k)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          norms[k][h] = j0 + 16 * k + 8 * h + from < valid ? shared.norms[j0 + 16 * k + 8 * h + from] : -1;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int p = 0; p < 2; ++p) {
          const int at = i0 + 8 * i + pair + p;  // in the batch
          const bool is_row = first + at < end;
          const int its = first_row + (is_row ? first + at : 0);
          float* const to = held.scores + (int64_t{list.index[its]} * slices + rank) * held.stride +
                            (list.place[its] & ~PARTLY) + first_ref + j0 + from;
          const float unscale = shared.unscale[turn % 2][at], half_alpha = fabsf(list.half_alpha[its]);
          float most = 0;
#pragma unroll
          for (int k = 0; k < TILES; ++k) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              if (!is_row || norms[k][h] == -1) continue;
              const float product = sums[k][i][2 * h + p] * unscale, norm = half_alpha * norms[k][h];
              to[16 * k + 8 * h] = product - norm;
              most = fmaxf(most, fabsf(product) + norm);
            }
          }
#pragma unroll
          for (int hop = 4; hop <= 16; hop *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, hop));
          if (from == 0 && is_row)
            atomicMax(reinterpret_cast<int*>(&shared.scales[turn % 3][at]), __float_as_int(most));
        }
      }
    }
  }

  // x: of the first batch, or on its way.
  __device__ __forceinline__ void score_rows(float4 (&x)[EACH][MOST]) const {
    const auto leave_scales = [&](int turn) {  // when all have scored it
      const int i = turn * step + tid;
      if (tid < step && i >= 0 && i < rows)
        held.scales[(int64_t{index_of(i)} * teams + team) * slices + rank] = shared.scales[turn % 3][tid];
    };
    int turn = 0;
#pragma unroll 1
    for (; turn * step < rows; ++turn) {
      if (turn > 0 && buffers == 1) __syncthreads();  // all have scored the one before
      prepare(turn * step, turn, x);
      __syncthreads();
      leave_scales(turn - 1);
      load_x((turn + 1) * step, x);
      score(turn * step, turn);
    }
    __syncthreads();
    leave_scales(turn - 1);
  }

  __device__ __forceinline__ void weigh_rows() const {
    const HeldGroup crew{warp / GROUP_WARPS, tid % GROUP, shared.scratch[warp / GROUP_WARPS]};
    const Weigher<T> weigh{in, held, shared, crew};
    const RowFacts& facts = shared.facts[crew.number];
    int index = static_cast<int>(blockIdx.x + gridDim.x * crew.number);
    meet_grid();
#pragma unroll 1
    while (index < in.n) {
      weigh(facts);
      index += static_cast<int>(gridDim.x) * GROUPS;
      if (index >= in.n) break;
      crew.wait();  // all have done with the one before
      if (crew.tid == 0) shared.facts[crew.number] = know_row(in, index);
      crew.wait();
    }
  }

  // The weights of the batch that begins at `first`, on their way to shared memory: a warp to a row's part.
  __device__ __forceinline__ void fetch_weights(int first, int turn) const {
    const int end = end_of(first);
    T* const to = lines + turn % buffers * PARTS * batch * line;
#pragma unroll 1
    for (int at = warp; at < PARTS * batch; at += WARPS) {
      const int p = at / batch, its = first + at - p * batch;
      const bool is_row = its < end;
      const T* const from = static_cast<const T*>(held.weights) +
                            (int64_t{p} * in.n + (is_row ? index_of(its) : 0)) * held.stride + first_ref +
                            (is_row ? list.place[first_row + its] & ~PARTLY : 0);
#pragma unroll 1
      for (int j = 8 * lane; j < chunk; j += 8 * 32) {
        float4* const there = reinterpret_cast<float4*>(to + at * line + j);
        if (is_row && j < valid) {
          copy_async(there, reinterpret_cast<const float*>(from + j));
        } else {
          *there = make_float4(0, 0, 0, 0);
        }
      }
    }
  }

  __device__ __forceinline__ void sum(int first, int turn) const {
    const int end = end_of(first);
    const int halves = batch / 16, steps = (valid + 15) / 16, matrix = lane / 8, row8 = lane % 8;
    const int tiles = (length + 16 * TILES - 1) / (16 * TILES);
    const int from = lane / 4, pair = lane % 4 * 2;
    const T* const of_batch = lines + turn % buffers * PARTS * batch * line;
#pragma unroll 1
    for (int turns = 0; turns * WARPS < tiles * halves; ++turns) {
      const int item = item_of(turns);
      if (item >= tiles * halves) continue;
      const int half = item >= tiles, e0 = (item - half * tiles) * 16 * TILES, i0 = 16 * half;
      if (first + i0 >= end) continue;
      const uint32_t a = shared_address(refs + (matrix / 2 * 8 + row8) * pitch + e0 + matrix % 2 * 8);
      const uint32_t b = shared_address(of_batch + (i0 + matrix / 2 * 8 + row8) * line + matrix % 2 * 8);
      const auto load_a = [&](int step, int tile) {
        return load_transposed(a + 32 * step * pitch + 32 * tile);
      };
      float x[2][2][TILES][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int p = 0; p < 2; ++p) {
          const int its = first + i0 + 8 * i + pair + p;
          const bool whole = USUAL && its < end && !(list.place[first_row + its] & PARTLY);
          const int left = whole ? length - e0 - from : 0;
          const float* const of_row =
              static_cast<const float*>(in.x.data) + (whole ? index_of(its) * in.d + offset + e0 + from : 0);
#pragma unroll
          for (int k = 0; k < TILES; ++k)
#pragma unroll
            for (int h = 0; h < 2; ++h) x[i][p][k][h] = 16 * k + 8 * h < left ? of_row[16 * k + 8 * h] : 0;
        }
      }
      float sums[TILES][2][4] = {};
      multiply_lines<T, SUM_DEPTH>(steps, first + i0 + 8 < end, load_a, b, 2 * batch * line, sums);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int p = 0; p < 2; ++p) {
          const int its = first + i0 + 8 * i + pair + p;
          const int left = its < end ? length - e0 - from : 0;  // elements
          const int64_t at = index_of(its) * in.d + offset + e0 + from;
          const double2 by = list.ends[its];
          const bool partly = list.place[first_row + its] & PARTLY;
          float* const to =
              partly ? held.sums + team * in.n * in.d + at : static_cast<float*>(in.out.data) + at;
#pragma unroll
          for (int k = 0; k < TILES; ++k) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const int e = 16 * k + 8 * h;
              if (e >= left) continue;
              const float sum = sums[k][i][2 * h + p];
              const double mean = by.x * static_cast<double>(sum);
              if (USUAL || partly) {
                to[e] =
                    partly ? sum : static_cast<float>(fma(by.y, static_cast<double>(x[i][p][k][h]), mean));
              } else {
                store_as(in.out, at + e, fma(by.y, load_as<double>(in.x, at + e), mean));
              }
            }
          }
        }
      }
    }
  }

  __device__ __forceinline__ void sum_rows() const {
#pragma unroll 1
    for (int i = tid; i < rows; i += HELD_THREADS) list.ends[i] = __ldcg(held.ends + index_of(i));
    fetch_weights(0, 0);
#pragma unroll 1
    for (int turn = 0; turn * step < rows; ++turn) {
      wait_copies();
      __syncthreads();
      if (buffers == 1) {
        sum(turn * step, turn);
        __syncthreads();
      }
      fetch_weights((turn + 1) * step, turn + 1);
      if (buffers == 2) sum(turn * step, turn);
    }
    wait_copies();
  }

  // Of rows with several chunks: four elements at a time.
  __device__ __forceinline__ void put_together() const {
    const int fours = static_cast<int>(in.d / 4);
#pragma unroll 1
    for (int i = static_cast<int>(blockIdx.x) * HELD_THREADS + tid; i < static_cast<int>(in.n) * fours;
         i += static_cast<int>(gridDim.x) * HELD_THREADS) {
      const int index = i / fours, e = 4 * (i - index * fours);
      const int64_t label = in.labels && classes > 1 ? in.labels[index] : 0;
      if (label < -1 || label >= classes || !has_several(static_cast<int>(label))) continue;
      if (!row_is_finite(in, index)) continue;
      const int begin = label < 0 ? 0 : static_cast<int>(label) * chunks,
                end = label < 0 ? teams : begin + chunks;
      float4 sum = make_float4(0, 0, 0, 0);
      bool any = false;
#pragma unroll 4
      for (int k = begin; k < end; ++k) {
        if (shared.team_counts[k] == 0) continue;
        any = true;
        const float4 v =
            __ldcg(reinterpret_cast<const float4*>(held.sums + (int64_t{k} * in.n + index) * in.d + e));
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
      }
      if (!any) continue;  // NaN is there
      const double2 by = __ldcg(held.ends + index);
      const int64_t to = int64_t{index} * in.d + e;
      if (USUAL) {
        const float4 x = *reinterpret_cast<const float4*>(static_cast<const float*>(in.x.data) + to);
        const auto end = [&](float x, float sum) {
          return static_cast<float>(fma(by.y, static_cast<double>(x), by.x * static_cast<double>(sum)));
        };
        *reinterpret_cast<float4*>(static_cast<float*>(in.out.data) + to) =
            make_float4(end(x.x, sum.x), end(x.y, sum.y), end(x.z, sum.z), end(x.w, sum.w));
      } else {
        const float sums[4] = {sum.x, sum.y, sum.z, sum.w};
        for (int q = 0; q < 4; ++q)
          store_as(in.out, to + q,
                   fma(by.y, load_as<double>(in.x, to + q), by.x * static_cast<double>(sums[q])));
      }
    }
  }

  __device__ __forceinline__ void run() {
    // What rows need is asked for before copies are in its way.
    for (int64_t index = tid; index < in.n; index += HELD_THREADS) {
      if (in.labels) prefetch(in.labels + index);
      prefetch(static_cast<const char*>(in.time_or_alpha.data) + index * size_of(in.time_or_alpha.dtype));
    }
    const T* const centre = static_cast<const T*>(in.refs.data) + int64_t{group} * in.m * in.d + offset;
    float own_centre = 0;
    if (valid > 0 && tid < length) own_centre = to_float(centre[tid]);
    begin_loading();
    list_rows();
    if (tid < slice) shared.centre[tid] = own_centre;
    float4 x[EACH][MOST];
    load_x(0, x);
    // The first row that each group of warps is to weigh.
    const int64_t own = blockIdx.x + int64_t{gridDim.x} * (warp / GROUP_WARPS);
    if (tid % GROUP == 0 && own < in.n) shared.facts[warp / GROUP_WARPS] = know_row(in, own);
    wait_copies();
    __syncthreads();
    form_norms();
    score_rows(x);
    weigh_rows();
    meet_grid();
    sum_rows();
    if (!several) return;
    meet_grid();
    put_together();
  }
};

template <typename T, bool USUAL>
__global__ void __launch_bounds__(HELD_THREADS, 1)
    held_kernel(const __grid_constant__ Inputs in, const __grid_constant__ Held held) {
  extern __shared__ __align__(128) char memory[];
  HeldShared& shared = *reinterpret_cast<HeldShared*>(memory);
  const HeldRows list(memory + HELD_FIXED_SMEM, in.n);
  T* const refs = reinterpret_cast<T*>(memory + HELD_FIXED_SMEM + held_rows_smem(in.n));
  T* const lines = refs + held.cut.chunk * (held.cut.slice + HELD_PAD);
  HeldKernel<T, USUAL>{in, held, shared, list, refs, lines}.run();
}

}  // namespace

void run_held(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream) {
  const bool bf16 = in.refs.dtype == Dtype::bf16;
  Held held{};
  held.cut = held_cut(plan, in.k, in.m);
  held.padded = static_cast<int>(held_padded(in.m)), held.stride = in.k * held.padded;
  held.exact_weights = !plan.fast;
  const HeldLayout layout = held_layout(plan.rows_per_pass, in.k, in.m, in.d, bf16, held.cut);
  char* next = static_cast<char*>(workspace);
  const auto take = [&](int64_t bytes) {
    char* const piece = next;
    next += bytes;
    return static_cast<void*>(piece);
  };
  held.scores = static_cast<float*>(take(layout.scores));
  held.sums = static_cast<float*>(take(layout.sums));
  held.exact = static_cast<double*>(take(layout.exact));
  held.weights = take(layout.weights);
  held.ends = static_cast<double2*>(take(layout.ends));
  held.scales = static_cast<float*>(take(layout.scales));
  held.centres = static_cast<double*>(take(layout.centres));
  const bool usual = is_vector(in.x) && is_vector(in.out);
  const auto kernel = bf16 ? (usual ? held_kernel<__nv_bfloat16, true> : held_kernel<__nv_bfloat16, false>)
                           : (usual ? held_kernel<__half, true> : held_kernel<__half, false>);
  check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(plan.smem_bytes)));
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;  // blocks wait for one another
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
  config.blockDim = dim3(HELD_THREADS);
  config.dynamicSmemBytes = static_cast<size_t>(plan.smem_bytes);
  config.stream = stream;
  config.attrs = &together;
  config.numAttrs = 1;
  for (int64_t first = 0; first < in.n; first += plan.rows_per_pass)
    check_cuda(op, cudaLaunchKernelEx(&config, kernel, slice_rows(in, first, plan.rows_per_pass), held));
}

}  // namespace svel::cuda
