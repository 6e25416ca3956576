// Weights of small sets' rows from shares of their scores (held_cuda.cu, swept_cuda.cu): a row has a group of
// four warps, which adds its shares up in float64; where their rounding would be seen in the result,
// references of weight are scored again, in float64.
#pragma once

#include "common/planner_held.h"
#include "stable_target/bulk_products.cuh"

namespace svel::cuda {
namespace {

constexpr int WARPS = HELD_THREADS / 32;
constexpr int GROUP_WARPS = 4, GROUP = 32 * GROUP_WARPS, GROUPS = HELD_THREADS / GROUP;
constexpr float WEIGHT_SCALE = 1 << 14;  // of the best: a weight's second part of float16 keeps its digits
constexpr int LISTED = 256;  // references of a group that are scored again at a time: two to a thread
constexpr float LEAST_SHARE = 0.25f;                // what the share of the best is taken for at least
constexpr float MOST_ERROR_OF_FAST_SCORES = 5e-4f;  // MOST_ERROR_OF_SCORES of precision "fast"
// Of a weight. FAST: one less, which leaves all rows of a time together within 2e-4, also those between two
// far references; a single one 2e-3 at small t.
template <typename T, bool FAST>
constexpr int WEIGHT_PARTS = Split<T>::PARTS - FAST;

// What calls know of a row. Not in line, here and below: code that has to come from memory first takes longer
// than a call, and most of it runs once.
struct RowFacts {
  Row row;
  int group;  // -1: all
  bool any;   // whether it may have anything to read
};
__device__ __noinline__ inline RowFacts know_row(const Inputs& in, int64_t index) {
  RowFacts facts;
  int64_t label;
  facts.any = row_reads(in, index, 1, label);
  facts.group = in.k == 1 ? 0 : static_cast<int>(label);
  facts.row = row_coefficients(in, index);
  return facts;
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

// The weights of rows, by a group of warps each. Set: what is there of the rows, see Held; WEIGHTS.
// Shared: class_counts, team_counts, and of each group list, counts.
template <typename T, bool FAST, typename Set, typename Shared>
struct Weigher {
  static constexpr int PARTS = WEIGHT_PARTS<T, FAST>;

  const Inputs& in;
  const Set& held;
  Shared& shared;
  const HeldGroup crew;
  const int thread = crew.tid;

  // visit(class, place, count) of each class that a row has.
  template <typename Visit>
  __device__ __forceinline__ void each_class(int group, const Visit& visit) const {
    const int begin = max(group, 0), end = group < 0 ? static_cast<int>(in.k) : group + 1;
#pragma unroll 1
    for (int g = begin; g < end; ++g) visit(g, group < 0 ? g * held.padded : 0, shared.class_counts[g]);
  }

  // This thread's first scores, two at a time, which need not come from memory again.
  struct Kept {
    static constexpr int MOST = 2;
    double2 scores[MOST];
    int number = 0;
  };
  // The scores from their shares; this thread's best and where it is.
  struct Best {
    double score = -INFINITY;
    int64_t reference = -1;  // among all
    __device__ __forceinline__ void note(double its, int64_t at) {
      if (its > score) score = its, reference = at;
    }
  };
  __device__ __forceinline__ Best add_shares(const RowFacts& facts, Kept& kept) const {
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
        constexpr int AHEAD = 16;
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
#pragma unroll
        for (int q = 0; q < Kept::MOST; ++q)
          if (kept.number == q) kept.scores[q] = sum;
        ++kept.number;
        best.note(sum.x, g * in.m + j);
        if (j + 1 < count) best.note(sum.y, g * in.m + j + 1);
      }
    });
    return best;
  }

  // Weights, times WEIGHT_SCALE, beside that of score `top`, to memory; their sum, without. FAST: as they are
  // there, so that what references have in common is not off.
  __device__ __forceinline__ double weigh(const RowFacts& facts, double rate2, double top,
                                          const Kept& kept) const {
    const double* const exact = held.exact + facts.row.index * held.stride;
    double total = 0;
    int turn = 0;
    each_class(facts.group, [&](int, int place, int count) {
#pragma unroll 1
      for (int j = 2 * thread; j < (count + Set::WEIGHTS - 1) / Set::WEIGHTS * Set::WEIGHTS; j += 2 * GROUP) {
        float left[2] = {};
        double2 its;
        if (j < count && turn < min(kept.number, Kept::MOST)) {
#pragma unroll
          for (int q = 0; q < Kept::MOST; ++q)
            if (turn == q) its = kept.scores[q];
        } else {
          its = *reinterpret_cast<const double2*>(exact + place + j);
        }
        if (j < count) ++turn;
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
        if (FAST) total -= static_cast<double>(left[0]) + static_cast<double>(left[1]);
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

  // The largest terms of the row's shares, of a slice one after the other; and the first of this thread's,
  // which is on its way while other things are done.
  __device__ __forceinline__ const float* scales_of(const RowFacts& facts) const {
    return held.scales + facts.row.index * in.k * held.cut.chunks * held.cut.slices;
  }
  __device__ __forceinline__ int first_team(const RowFacts& facts) const {
    return max(facts.group, 0) * static_cast<int>(held.cut.chunks);
  }
  __device__ __forceinline__ float first_scale(const RowFacts& facts) const {
    const int slices = static_cast<int>(held.cut.slices), begin = first_team(facts);
    if (thread >= slices || shared.team_counts[begin] == 0) return 0;
    return __ldcg(scales_of(facts) + begin * slices + thread);
  }

  // This thread's share of the sum over slices of the square of the largest term.
  __device__ __forceinline__ float square_of_scales(const RowFacts& facts, float first) const {
    const int slices = static_cast<int>(held.cut.slices), chunks = static_cast<int>(held.cut.chunks);
    const int begin = first_team(facts),
              end = facts.group < 0 ? static_cast<int>(in.k) * chunks : begin + chunks;
    const float* const scales = scales_of(facts);
    float square = 0;
#pragma unroll 1
    for (int s = thread; s < slices; s += GROUP) {
      float most = s == thread ? first : 0;
#pragma unroll 4
      for (int k = s == thread ? begin + 1 : begin; k < end; ++k)
        if (shared.team_counts[k] > 0) most = fmaxf(most, __ldcg(scales + k * slices + s));
      square = fmaf(most, most, square);
    }
    return square;
  }

  // Weights from shares alone, then next(best, top, total, wrong), wrong: what scores may be off by, beside
  // the most that is not seen; 0: it is not. A row without references is left.
  template <typename Next>
  __device__ __forceinline__ void weigh_shares(const RowFacts& facts, const Next& next) const {
    const float scale_of_first = facts.any ? first_scale(facts) : 0;
    Kept kept;
    const Best best = facts.any ? add_shares(facts, kept) : Best{};
    const float square = facts.any ? square_of_scales(facts, scale_of_first) : 0;
    int number = 0;
    if (facts.any) each_class(facts.group, [&](int, int, int count) { number += count; });
    if (number == 0) return leave_nothing(in, facts.row.index, thread);
    const double rate2 = facts.row.rate() * LOG2_E, top = crew.maximum(best.score);
    const double total = weigh(facts, rate2, top, kept);
    // Whether what scores may be off by is seen.
    const float share = static_cast<float>(1 / total), spread = static_cast<float>((total - 1) / total);
    const float by = fmaxf(0.5f * fabsf(static_cast<float>(facts.row.b)), 1);
    const float scale = static_cast<float>(rate2) * sqrtf(static_cast<float>(crew.sum(square)));
    const float error = held.rounding * scale * by;
    // Copies of a sample are off alike: many of them are no better than a few.
    const bool seen = error * sqrtf(fmaxf(share, LEAST_SHARE)) * spread > 1;
    next(best, top, total, seen ? error : 0);
  }

  __device__ __forceinline__ void operator()(const RowFacts& facts) const {
    weigh_shares(facts, [&](const Best& best, double top, double total, float wrong) {
      if (wrong > 0 || in.lse.data)
        return weigh_again(in, held, shared, crew, facts, best, top, total, wrong);
      leave(facts, total);
    });
  }

  // The same with exact scores of the references of weight, or of the best alone, for what is known of it.
  __device__ __noinline__ static void weigh_again(const Inputs& in, const Set& held, Shared& shared,
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
      total = own.weigh(facts, rate2, top, Kept{});
    }
    own.leave(facts, total);
    if (thread == 0 && in.lse.data) write_lse(in, row.index, PartRow{of_best, total, 0, 0, 0, 0});
  }
};

}  // namespace
}  // namespace svel::cuda
