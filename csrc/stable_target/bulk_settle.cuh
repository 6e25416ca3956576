// What the scores of bulk_groups.cuh and bulk_teams.cuh cannot tell. A score is off by the
// rounding of its sums, which is much where it is large: for rows at a small t. The usual row there has one
// reference with all the weight, and any score will do. But the weights of a row that lies between references
// are a guess. So rows of which more than one reference has weight are measured when they are finished (Gap):
// how far the references of weight are apart, which for repeated ones is not at all, and what their errors do
// to the result, beside its size (may_be_wrong). Rows where that would show are evaluated again, in float64.
//
// Few calls have any, so this is made to cost nothing else: where a block has finished rows, it takes them
// when it has done all the rest, by code that is not in the way of the other; where they were finished all
// over the grid, the last block to merge a row does, or a kernel behind that one, with a cluster of blocks
// for each, where scores are not kept.
#pragma once

#include "common/cluster.cuh"
#include "stable_target/bulk_parts.cuh"

namespace svel::cuda {

constexpr double NO_WEIGHT_AT_ALL = 0x1p-40;  // beside the best so far
// A reference is scored exactly that is so close to the best, in units of log 2, beside the errors: so many
// standard deviations of scores that were kept, or those of distances in float32, beside their size.
constexpr double ROUGH_MARGIN = 41, ROUGH_ERROR = 4e-6;
constexpr float KEPT_ERRORS = 8, MOST_KEPT_ERROR = 1;  // beyond that others may have had weight

// Whether the rounding of scores may show in a row's result: by one standard deviation, beside its size.
// Weights that are off at random, by `error` each, move the mean by that times the root of the sum of w^2
// |r - mean|^2. The score of the mean exceeds the mean of the scores by alpha^2 / (2 sigma^2) times the sum
// of w |r - mean|^2, the `apart`; which is exact but for the error of scores. `rounding` of a score is
// relative to what its terms add up to: as much as the largest score has, or a reference of weight.
__device__ inline bool may_be_wrong(const Inputs& in, const RowDoubt& doubt, const Gap& gap, bool absolute,
                                    float rounding, float& error) {
  const float of_result = static_cast<float>(doubt.b), log_2 = static_cast<float>(LOG_2);
  const float unit = static_cast<float>(doubt.per_square * doubt.alpha * doubt.alpha);
  const double above = doubt.per_square * ((absolute ? 0 : gap.of[1]) - gap.of[0]) - doubt.score;
  const float apart = fmaxf(static_cast<float>(above), 0), others = 1 - doubt.lead;
  const float from_centre = unit * static_cast<float>(gap.of[2]);
  const float scale = fmaxf(fmaxf(doubt.scale, from_centre), __fdividef(apart, others));
  error = rounding * scale;
  const float share = fminf(doubt.lead, others);
  const float spread = (apart + error) * share;
  const float moves = error * log_2 * error * log_2 * spread;  // times 1 / unit: the mean's, squared
  const float limit = most_error(in);
  if (!in.lse.data)
    return of_result * of_result * moves > limit * limit * unit * static_cast<float>(gap.of[4]);
  // The mean may become any prediction: itself, the noise, the velocity.
  const float mean = static_cast<float>(gap.of[3]), rest = static_cast<float>(gap.of[0]);
  const float alpha = static_cast<float>(doubt.alpha),
              variance = __fdividef(static_cast<float>(LOG2_E), 2 * static_cast<float>(doubt.per_square));
  const float size = fminf(mean, fminf(__fdividef(rest, alpha * alpha), fmaf(variance, mean, rest)));
  return moves > limit * limit * unit * size;
}

// REFS: of each of so many blocks at a time. SPLITS: several threads share the sums of a few elements.
template <int BLOCKS, int THREADS, int REFS, bool SPLITS>
struct SettleShared {
  double own[BLOCKS > 1 ? REFS : 1];  // scores of this block's references
  double weights[BLOCKS * REFS];      // of all of them: scores, then weights
  int heavy[BLOCKS * REFS], count;
  double scratch[Gap::SUMS][THREADS / 32];
  double shares[SPLITS ? THREADS : 1][4];  // of sums, where there are more threads than elements

  __device__ __forceinline__ double* scores() { return BLOCKS > 1 ? own : weights; }
};

// All consumers of a block of bulk_groups.cuh or bulk_teams.cuh.
struct BlockCrew {
  static constexpr int THREADS = GROUPS_CONSUMERS, BLOCKS = 1, REFS = 1024, rank = 0;
  static constexpr bool SPLITS = true;
  int tid;
  __device__ __forceinline__ void wait() const { named_barrier(1, THREADS); }
  __device__ __forceinline__ void wait_for_all() const { wait(); }
  __device__ __forceinline__ double score(const double* scores, int j) const { return scores[j]; }
};

// A cluster of blocks.
struct ClusterCrew {
  static constexpr int THREADS = 256, BLOCKS = 8, REFS = 256;
  static constexpr bool SPLITS = true;
  int tid, rank;
  __device__ __forceinline__ void wait() const { __syncthreads(); }
  __device__ __forceinline__ void wait_for_all() const { synchronize_cluster(); }
  __device__ __forceinline__ double score(const double* scores, int j) const {
    return load_from_peer(peer_address(shared_address(scores + j % REFS), j / REFS));
  }
};

template <typename Crew>
using SettleSharedOf = SettleShared<Crew::BLOCKS, Crew::THREADS, Crew::REFS, Crew::SPLITS>;
using SettleInBlock = SettleSharedOf<BlockCrew>;
using SettleInCluster = SettleSharedOf<ClusterCrew>;
static_assert(sizeof(SettleInBlock) <= SETTLE_SMEM, "the planner reserves less");

template <typename T, typename Crew>
struct Settle {
  static constexpr int THREADS = Crew::THREADS, WARPS = THREADS / 32;
  static constexpr int OWN = Crew::REFS, REFS = Crew::BLOCKS * OWN;

  const Inputs& in;
  const Crew crew;
  SettleSharedOf<Crew>& shared;
  double* const sums;       // (high - low,), where a thread does not hold its own
  const int64_t low, high;  // of the elements of the result, those that this block writes
  const int tid = crew.tid, lane = crew.tid % 32, warp = crew.tid / 32;
  const T* const refs = static_cast<const T*>(in.refs.data);

  template <typename Add>
  __device__ __forceinline__ double over_block(double v, const Add& add) const {
#pragma unroll 1
    for (int hop = 16; hop > 0; hop /= 2) v = add(v, __shfl_xor_sync(0xffffffffu, v, hop));
    crew.wait();
    if (lane == 0) shared.scratch[0][warp] = v;
    crew.wait();
    double all = shared.scratch[0][0];
#pragma unroll 1
    for (int w = 1; w < WARPS; ++w) all = add(all, shared.scratch[0][w]);
    return all;
  }
  __device__ __forceinline__ void sum_over_block(Gap& gap) const {
    crew.wait();
#pragma unroll
    for (int k = 0; k < Gap::SUMS; ++k) {
      gap.of[k] = warp_sum(gap.of[k]);
      if (lane == 0) shared.scratch[k][warp] = gap.of[k];
    }
    crew.wait();
#pragma unroll
    for (int k = 0; k < Gap::SUMS; ++k) gap.of[k] = warp_sum(lane < WARPS ? shared.scratch[k][lane] : 0);
  }
  __device__ __forceinline__ double sum_over_block(double v) const {
    return over_block(v, [](double a, double b) { return a + b; });
  }

  // Four elements side by side.
  __device__ __forceinline__ static float4 load(const T* from) {
    struct alignas(4 * sizeof(T)) Four {
      T v[4];
    };
    const Four four = *reinterpret_cast<const Four*>(from);
    return make_float4(to_float(four.v[0]), to_float(four.v[1]), to_float(four.v[2]), to_float(four.v[3]));
  }

  // Four elements of a, x or result, from e on; D is a multiple of four.
  __device__ __forceinline__ float4 load_of(const Array& a, int64_t index, int64_t e) const {
    const int64_t at = index * in.d + e;
    if (is_vector(a)) return *reinterpret_cast<const float4*>(static_cast<const float*>(a.data) + at);
    return load_four(a, at, index * in.d + in.d);
  }

  // Over elements [from, to) of a row that is finished there. centre: of the scores, among all references;
  // -1: the origin. In all threads.
  __device__ __forceinline__ Gap gap(const RowDoubt& row, int64_t index, int64_t from, int64_t to,
                                     int64_t centre) const {
    const Array x = x_of(in, index), out = out_of(in, index);
    const double nearly = 1 / static_cast<float>(row.b), by = nearly * fma(-row.b, nearly, 2.0);
    GapSums sums;
#pragma unroll 1
    for (int64_t e = from + 4 * tid; e < to; e += 4 * THREADS) {
      const float4 of_x = load_of(x, index, e), result = load_of(out, index, e);
      const float4 of_c = centre >= 0 ? load(refs + centre * in.d + e) : make_float4(0, 0, 0, 0);
      const auto add = [&](double x, double result, float c) {
        sums.add(row, x, by * fma(-row.a, x, result), static_cast<float>(result), c);
      };
      add(of_x.x, result.x, of_c.x), add(of_x.y, result.y, of_c.y);
      add(of_x.z, result.z, of_c.z), add(of_x.w, result.w, of_c.w);
    }
    Gap gap = sums.gap();
    sum_over_block(gap);
    return gap;
  }

  // Whether this is the last of `slices` blocks to leave its part of a row's gap, which is then all of it.
  __device__ __forceinline__ bool is_last(Gap* gaps, int* measured, int64_t slice, int64_t slices,
                                          Gap& gap) const {
    if (slices == 1) return true;
    if (tid == 0) {
      gaps[slice] = gap;
      shared.count = add_arrival(measured) == slices - 1;
    }
    crew.wait();
    if (!shared.count) return false;
    gap = {};
    for (int64_t other = tid; other < slices; other += THREADS) {
#pragma unroll
      for (int k = 0; k < Gap::SUMS; ++k) gap.of[k] += __ldcg(&gaps[other].of[k]);
    }
    sum_over_block(gap);
    return true;
  }

  // Scores of COUNT references from `at` on, of which none is beyond `last`, by a warp, in units of log 2:
  // -|x - alpha r|^2 / (2 sigma^2). W: float32, which knows so many digits of distances, or float64.
  template <typename W, int COUNT>
  __device__ __forceinline__ void score(const Row& row, const Array& x, int64_t at, int64_t last,
                                        double (&scores)[COUNT]) const {
    const W sign = static_cast<W>(row.sign), high = static_cast<W>(row.alpha),
            rest = static_cast<W>(row.alpha - high);
    W sums[COUNT] = {};
    const T* from[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) from[i] = refs + min(at + i, last) * in.d;
#pragma unroll 2
    for (int64_t e = 4 * lane; e < in.d; e += 128) {
      const float4 of_x = load_of(x, row.index, e);
      float4 r[COUNT];
#pragma unroll
      for (int i = 0; i < COUNT; ++i) r[i] = load(from[i] + e);
      const auto add = [&](W x, W r, W& sum) {
        W gap = fma(-high, r, sign * x);
        if (sizeof(W) == sizeof(float)) gap = fma(-rest, r, gap);
        sum = fma(gap, gap, sum);
      };
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        add(of_x.x, r[i].x, sums[i]), add(of_x.y, r[i].y, sums[i]);
        add(of_x.z, r[i].z, sums[i]), add(of_x.w, r[i].w, sums[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      scores[i] = -LOG2_E / (2 * row.sigma * row.sigma) * warp_sum(static_cast<double>(sums[i]));
  }

  // That of the row's own source, in all blocks.
  __device__ __forceinline__ double score_of_source(const Row& row, const Array& x) const {
    double square = 0;
#pragma unroll 1
    for (int64_t e = tid; e < in.d; e += THREADS) {
      const double gap = row.sign * load_as<double>(x, row.index * in.d + e) -
                         row.alpha * load_as<double>(in.source, row.index * in.d + e);
      square = fma(gap, gap, square);
    }
    return -LOG2_E / (2 * row.sigma * row.sigma) * sum_over_block(square);
  }

  // A row once more. kept: of its scores, off by `error`; null: none are.
  __device__ void operator()(int64_t index, const KeptScores& of_rows, float error) const {
    const Row row = row_coefficients(in, index);
    const Array x = x_of(in, index), out = out_of(in, index);
    const int64_t group = in.labels ? in.labels[index] : 0;
    const int64_t first = group < 0 ? 0 : group * in.m,
                  all = group < 0 ? in.k * in.m : valid_count(in, group);
    const float* const kept_scores = error <= MOST_KEPT_ERROR ? of_rows.of(index, group) : nullptr;
    const auto is_valid = [&](int64_t at) {
      return at < all && (group >= 0 || at % in.m < valid_count(in, at / in.m));
    };
    const auto kept_score = [&](int64_t at) {
      return static_cast<double>(kept_scores[group < 0 ? at / in.m * of_rows.of_class + at % in.m : at]);
    };
    // Where elements are few, several threads take the same ones of other references.
    const int lanes = static_cast<int>(min(max((high - low + 3) / 4, int64_t{1}), int64_t{THREADS}));
    const int shares = Crew::SPLITS ? THREADS / lanes : 1, share = tid / lanes;
    double best = -INFINITY, total = 0, own = 0;  // own: the weight of the source
    bool kept = false;                            // there are sums
    if (in.source.data) best = score_of_source(row, x), total = own = 1;
    double best_kept = -INFINITY;
    if (kept_scores) {
#pragma unroll 4
      for (int64_t at = tid; at < all; at += THREADS)
        if (is_valid(at)) best_kept = fmax(best_kept, kept_score(at));
      best_kept = over_block(best_kept, [](double a, double b) { return fmax(a, b); });
      best_kept -= ROUGH_MARGIN + KEPT_ERRORS * error;
    }
#pragma unroll 1
    for (int64_t begin = 0; begin < all; begin += REFS) {
      const int64_t mine = begin + crew.rank * OWN;
      constexpr int AT_ONCE = 4;
      double* const scores = shared.scores();
      double rough = kept_scores ? best_kept : best;
#pragma unroll 1
      for (int j = tid; kept_scores && j < OWN; j += THREADS)
        scores[j] = is_valid(mine + j) ? kept_score(mine + j) : -INFINITY;
      if (kept_scores) crew.wait();
#pragma unroll 1
      for (int j = AT_ONCE * warp; !kept_scores && j < OWN; j += AT_ONCE * WARPS) {
        double some[AT_ONCE] = {};
        if (mine + j < all) score<float>(row, x, first + mine + j, first + all - 1, some);
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
          if (!is_valid(mine + j + i)) some[i] = -INFINITY;
          rough = fmax(rough, some[i]);
          if (lane == 0) scores[j + i] = some[i];
        }
      }
      if (!kept_scores) {
        rough = over_block(rough, [](double a, double b) { return fmax(a, b); });
        rough = fma(1 + ROUGH_ERROR, rough, -ROUGH_MARGIN);  // no score is positive
      }
#pragma unroll 1
      for (int j = warp; j < OWN; j += WARPS) {
        double exact[1] = {-INFINITY};
        if (scores[j] > -INFINITY && !(scores[j] < rough))  // NaN too
          score<double>(row, x, first + mine + j, first + mine + j, exact);
        __syncwarp();
        if (lane == 0) scores[j] = exact[0];
      }
      crew.wait_for_all();
      double most = -INFINITY, added = 0;
#pragma unroll 1
      for (int j = tid; j < REFS; j += THREADS) {
        shared.weights[j] = crew.score(shared.scores(), j);
        most = fmax(most, shared.weights[j]);
      }
      most = over_block(most, [](double a, double b) { return fmax(a, b); });
      if (most == -INFINITY) {  // none that matters
        crew.wait_for_all();
        continue;
      }
      most = fmax(most, best);
#pragma unroll 1
      for (int j = tid; j < REFS; j += THREADS) {
        shared.weights[j] = power(shared.weights[j] - most);
        added += shared.weights[j];
      }
      const double keep = power(best - most);
      added = sum_over_block(added);
      best = most, own *= keep, total = fma(keep, total, added);
      if (warp == 0) {
        int count = 0;
#pragma unroll 1
        for (int j = lane; j < REFS; j += 32) {
          const bool weighs = !(shared.weights[j] < NO_WEIGHT_AT_ALL);  // NaN too
          const unsigned all = __ballot_sync(0xffffffffu, weighs);
          if (weighs) shared.heavy[count + __popc(all & ((1u << lane) - 1))] = j;
          count += __popc(all);
        }
        if (lane == 0) shared.count = count;
      }
      crew.wait();
#pragma unroll 1
      for (int64_t e = low + 4 * (tid % lanes); e < high; e += 4 * lanes) {
        if (share >= shares) break;  // threads beyond the last share
        double v[4] = {};
        if (kept && shares == 1) add_sums(sums + (e - low), keep, v);
#pragma unroll 4
        for (int h = share; h < shared.count; h += shares) {
          const int j = shared.heavy[h];
          const double weight = shared.weights[j];
          const float4 r = load(refs + (first + begin + j) * in.d + e);
          v[0] = fma(weight, static_cast<double>(r.x), v[0]),
          v[1] = fma(weight, static_cast<double>(r.y), v[1]);
          v[2] = fma(weight, static_cast<double>(r.z), v[2]),
          v[3] = fma(weight, static_cast<double>(r.w), v[3]);
        }
        if (shares == 1) {
          store_sums(sums + (e - low), v);
        } else {  // once
#pragma unroll
          for (int k = 0; k < 4; ++k) shared.shares[Crew::SPLITS ? tid : 0][k] = v[k];
        }
      }
      if (shares > 1) {
        crew.wait();
#pragma unroll 1
        for (int i = tid; i < 4 * lanes && low + i < high; i += THREADS) {
          double sum = 0;
#pragma unroll 4
          for (int s = 0; s < shares; ++s) sum += shared.shares[s * lanes + i / 4][i % 4];
          if (kept) sum = fma(keep, __ldcg(sums + i), sum);
          __stcg(sums + i, sum);
        }
      }
      kept = true;
      crew.wait_for_all();  // all have read the scores
    }
#pragma unroll 1
    for (int64_t e = low + 4 * tid; e < high; e += 4 * THREADS) {
      double v[4] = {};
      if (kept) add_sums(sums + (e - low), 1, v);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int64_t at = index * in.d + e + k;
        if (own != 0) v[k] = fma(own, load_as<double>(in.source, at), v[k]);
        store_as(out, at, fma(row.a, load_as<double>(x, at), row.b / total * v[k]));
      }
    }
    if (in.lse.data && low == 0 && tid == 0) write_lse(in, index, {best, total});
  }
};

// The class's first reference, which the scores are relative to; of those of several classes each to its own.
__device__ __forceinline__ int64_t centre_of(const Inputs& in, int64_t index) {
  const int64_t group = in.labels ? in.labels[index] : 0;
  return group < 0 ? -1 : group * in.m;
}

// The rows of a block's list, by all its consumers. memory: of the ring, to which nothing is on its way any
// more.
template <typename T>
__device__ __noinline__ void settle_rows(const Inputs& in, const BulkParts& parts, const RowPlace& place,
                                         int first, char* memory, int tid) {
  const bool sliced = place.slices > 1;
  if (sliced) wait_for_previous_launch();  // which sets counts to zero
  for (int index = first; index != NO_ROW; index = parts.next[place.rank * in.n + index]) {
    const Settle<T, BlockCrew> settle{in,
                                      {tid},
                                      *reinterpret_cast<SettleInBlock*>(memory),
                                      parts.settled + (sliced ? int64_t{index} : int64_t{blockIdx.x}) * in.d,
                                      0,
                                      in.d};
    const RowDoubt doubt = parts.doubts[index];
    const int64_t centre = centre_of(in, index);
    Gap gap = settle.gap(doubt, index, place.offset, place.offset + place.length, centre);
    if (!settle.is_last(parts.gaps + index * place.slices, parts.measured + index, place.rank, place.slices,
                        gap))
      continue;
    float error;
    if (may_be_wrong(in, doubt, gap, in.lse.data || centre < 0, parts.rounding, error))
      settle(index, parts.kept, error);
  }
}

// Behind the others: rows whose weights are spread, one after the other by every so many clusters.
template <typename T>
__global__ void __launch_bounds__(ClusterCrew::THREADS) SVEL_CLUSTER(ClusterCrew::BLOCKS)
    settle_kernel(const __grid_constant__ Inputs in, const __grid_constant__ BulkParts parts) {
  __shared__ SettleInCluster shared;
  __shared__ bool noted[ClusterCrew::THREADS];
  __shared__ double sums_of_gap[Gap::SUMS];
  constexpr int THREADS = ClusterCrew::THREADS, BLOCKS = ClusterCrew::BLOCKS;
  const int64_t clusters = gridDim.x / BLOCKS, cluster = blockIdx.x / BLOCKS;
  const int tid = threadIdx.x;
  const int rank = blockIdx.x % BLOCKS;
  const int64_t slice = ((in.d + BLOCKS - 1) / BLOCKS + 3) / 4 * 4, low = min(rank * slice, in.d);
  const Settle<T, ClusterCrew> settle{
      in, {tid, rank}, shared, parts.settled + cluster * in.d + low, low, min(low + slice, in.d)};
  wait_for_previous_launch();
  for (int64_t begin = cluster; begin < in.n; begin += clusters * THREADS) {
    const int64_t mine = begin + clusters * tid;
    const bool doubtful = mine < in.n && is_doubtful(in, parts, parts.doubts[mine]);
    if (!__syncthreads_or(doubtful)) continue;  // the same in all blocks
    noted[tid] = doubtful;
    __syncthreads();
    for (int i = 0; i < THREADS && begin + clusters * i < in.n; ++i) {
      if (!noted[i]) continue;
      const int64_t index = begin + clusters * i;
      const RowDoubt doubt = parts.doubts[index];
      const int64_t centre = centre_of(in, index);
      Gap gap = settle.gap(doubt, index, settle.low, settle.high, centre);
      if (tid == 0) {
        for (int k = 0; k < Gap::SUMS; ++k) sums_of_gap[k] = gap.of[k];
      }
      synchronize_cluster();
      gap = {};
      for (int k = 0; k < Gap::SUMS; ++k) {
        for (int other = 0; other < BLOCKS; ++other)
          gap.of[k] += load_from_peer(peer_address(shared_address(&sums_of_gap[k]), other));
      }
      synchronize_cluster();
      float error;
      if (may_be_wrong(in, doubt, gap, in.lse.data || centre < 0, parts.rounding, error))
        settle(index, parts.kept, error);
    }
    __syncthreads();
  }
}

}  // namespace svel::cuda
