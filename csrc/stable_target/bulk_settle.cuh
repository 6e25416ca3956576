// What the float32 scores of bulk_groups.cuh and bulk_teams.cuh cannot tell. A score y.d - alpha/2 |d|^2 is
// off by the rounding of its sums, which is much where it is large: for rows at a small t. The usual row
// there has one reference with all the weight, and any score will do. But the weights of a row that lies
// between references are a guess. Whoever finishes a row knows what that may do to its result
// (doubt_of_row), and rows where it would show are evaluated again, in float64. Few calls have any, so
// this is made to cost nothing else: where a block has finished rows, it takes them when it has done all the
// rest, by code that is not in the way of the other; where merge_kernel (bulk_merge.cuh) follows, the first
// of a row's clusters of blocks does.
#pragma once

#include "common/cluster.cuh"
#include "stable_target/bulk_parts.cuh"

namespace svel::cuda {

constexpr double NO_WEIGHT_AT_ALL = 0x1p-60;  // beside the best so far; 2^31 of them come to 2e-9

// REFS: of each of so many blocks at a time.
template <int BLOCKS, int THREADS, int REFS>
struct SettleShared {
  double own[BLOCKS > 1 ? REFS : 1];  // scores of this block's references
  double weights[BLOCKS * REFS];      // of all of them: scores, then weights
  int heavy[BLOCKS * REFS], count;
  double scratch[32];
  double shares[THREADS][4];  // of sums, where there are more threads than elements

  __device__ __forceinline__ double* scores() { return BLOCKS > 1 ? own : weights; }
};

// References that a row takes: of those from `first` on, among all k m, the ones `from` there `to` there; of
// all groups (-1) those that are valid.
struct Taken {
  int64_t group, first, from, to;
};
struct Weighed {
  double best;   // logit, base 2
  double total;  // of weights, the best's 1
  double own;    // of the row's source, whose sums are not with the others'
};

// All consumers of a block of bulk_groups.cuh or bulk_teams.cuh, all threads of one of pool_settle.cuh.
struct BlockCrew {
  static constexpr int THREADS = GROUPS_CONSUMERS, BLOCKS = 1, REFS = 1024, rank = 0;
  int tid;
  __device__ __forceinline__ void wait() const { named_barrier(1, THREADS); }
  __device__ __forceinline__ void wait_for_all() const { wait(); }
  __device__ __forceinline__ double score(const double* scores, int j) const { return scores[j]; }
};

// A cluster of blocks.
struct ClusterCrew {
  static constexpr int THREADS = 256, BLOCKS = 8, REFS = 256;
  int tid, rank;
  __device__ __forceinline__ void wait() const { __syncthreads(); }
  __device__ __forceinline__ void wait_for_all() const { synchronize_cluster(); }
  __device__ __forceinline__ double score(const double* scores, int j) const {
    return load_from_peer(peer_address(shared_address(scores + j % REFS), j / REFS));
  }
};

using SettleInBlock = SettleShared<BlockCrew::BLOCKS, BlockCrew::THREADS, BlockCrew::REFS>;
using SettleInCluster = SettleShared<ClusterCrew::BLOCKS, ClusterCrew::THREADS, ClusterCrew::REFS>;
static_assert(sizeof(SettleInBlock) <= SETTLE_SMEM, "the planner reserves less");

template <typename T, typename Crew>
struct Settle {
  static constexpr int THREADS = Crew::THREADS, WARPS = THREADS / 32;
  static constexpr int OWN = Crew::REFS, REFS = Crew::BLOCKS * OWN;

  const Inputs& in;
  const Crew crew;
  SettleShared<Crew::BLOCKS, THREADS, OWN>& shared;
  double* const sums;       // (high - low,), where a thread does not hold its own
  const int64_t low, high;  // of the elements of the result, those that this block writes
  const int tid = crew.tid, lane = crew.tid % 32, warp = crew.tid / 32;
  const T* const refs = static_cast<const T*>(in.refs.data);

  template <typename Add>
  __device__ __forceinline__ double over_block(double v, const Add& add) const {
#pragma unroll 1
    for (int hop = 16; hop > 0; hop /= 2) v = add(v, __shfl_xor_sync(0xffffffffu, v, hop));
    crew.wait();
    if (lane == 0) shared.scratch[warp] = v;
    crew.wait();
    double all = shared.scratch[0];
#pragma unroll 1
    for (int w = 1; w < WARPS; ++w) all = add(all, shared.scratch[w]);
    return all;
  }
  __device__ __forceinline__ double sum_over_block(double v) const {
    return over_block(v, [](double a, double b) { return a + b; });
  }

  // Scores of COUNT references from `at` on, of which none is beyond `last`, by a warp, in units of log 2:
  // -|x - alpha r|^2 / (2 sigma^2).
  template <int COUNT>
  __device__ __forceinline__ void score(const Row& row, const Array& of_row, int64_t at, int64_t last,
                                        double (&scores)[COUNT]) const {
    const bool vectors = is_vector(of_row) && in.d % 4 == 0;
    const int64_t base = row.index * in.d;
    const T* from[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) scores[i] = 0, from[i] = refs + min(at + i, last) * in.d;
#pragma unroll 2
    for (int64_t e = 4 * lane; e < in.d; e += 128) {
      const float4 x =
          vectors ? *reinterpret_cast<const float4*>(static_cast<const float*>(of_row.data) + base + e)
                  : load_four(of_row, base + e, base + in.d);
      float4 r[COUNT];
#pragma unroll
      for (int i = 0; i < COUNT; ++i) r[i] = load_four(from[i] + e);
      const auto add = [&](float x, float r, double& score) {
        const double gap = fma(-row.alpha, static_cast<double>(r), row.sign * static_cast<double>(x));
        score = fma(gap, gap, score);
      };
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        add(x.x, r[i].x, scores[i]), add(x.y, r[i].y, scores[i]);
        add(x.z, r[i].z, scores[i]), add(x.w, r[i].w, scores[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) scores[i] = -LOG2_E / (2 * row.sigma * row.sigma) * warp_sum(scores[i]);
  }

  // Whether a row in doubt is to be evaluated again, the same in all blocks.
  __device__ __forceinline__ bool stays_in_doubt(int64_t index, const Doubt& doubt) const {
    const Row row = row_coefficients(in, index);
    const RowInDoubt its{index, doubt, row.a, row.b, low, high};
    const auto sum = [&](double share) {
      share = sum_over_block(share);
      if constexpr (Crew::BLOCKS == 1) return share;
      if (tid == 0) shared.own[0] = share;
      crew.wait_for_all();
      double all = 0;
#pragma unroll 1
      for (int block = 0; block < Crew::BLOCKS; ++block) all += crew.score(shared.own, block * OWN);
      crew.wait_for_all();  // all have read it
      return all;
    };
    return svel::cuda::stays_in_doubt<THREADS>(in, its, tid, sum);
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

  // What these references of a row weigh, and its source if it has one (SOURCE: if it may). The sums of the
  // references, where there are any, are left in `sums`.
  template <bool SOURCE>
  __device__ __forceinline__ Weighed weigh(const Row& row, const Array& x, const Taken& taken) const {
    const auto [group, first, from, to] = taken;
    // Where elements are few, several threads take the same ones of other references.
    const int lanes = static_cast<int>(min(max((high - low + 3) / 4, int64_t{1}), int64_t{THREADS}));
    const int shares = THREADS / lanes, share = tid / lanes;  // threads beyond the last share are idle
    double own = 0, best = -INFINITY, total = 0;
    if (SOURCE && in.source.data) best = score_of_source(row, x), total = own = 1;
#pragma unroll 1
    for (int64_t begin = from; begin < to; begin += REFS) {
      const int64_t mine = begin + crew.rank * OWN;
      constexpr int AT_ONCE = 4;
#pragma unroll 1
      for (int j = AT_ONCE * warp; j < OWN; j += AT_ONCE * WARPS) {
        double scores[AT_ONCE] = {};
        if (mine + j < to) score(row, x, first + mine + j, first + to - 1, scores);
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
          const int64_t at = mine + j + i;
          const bool valid = at < to && (group >= 0 || at % in.m < valid_count(in, at / in.m));
          if (lane == 0) shared.scores()[j + i] = valid ? scores[i] : -INFINITY;
        }
      }
      crew.wait_for_all();
      double most = best, added = 0;
#pragma unroll 1
      for (int j = tid; j < REFS; j += THREADS) {
        shared.weights[j] = crew.score(shared.scores(), j);
        most = fmax(most, shared.weights[j]);
      }
      most = over_block(most, [](double a, double b) { return fmax(a, b); });
      const double finite = most > -INFINITY ? most : 0;  // no references so far
#pragma unroll 1
      for (int j = tid; j < REFS; j += THREADS) {
        shared.weights[j] = power(shared.weights[j] - finite);
        added += shared.weights[j];
      }
      const double keep = power(best - finite);
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
      for (int64_t e = low + 4 * (tid % lanes); e < high && share < shares; e += 4 * lanes) {
        double v[4] = {};
        if (begin > from && share == 0) add_sums(sums + (e - low), keep, v);
#pragma unroll 4
        for (int h = share; h < shared.count; h += shares) {
          const int j = shared.heavy[h];
          const double weight = shared.weights[j];
          const float4 r = load_four(refs + (first + begin + j) * in.d + e);
          v[0] = fma(weight, static_cast<double>(r.x), v[0]),
          v[1] = fma(weight, static_cast<double>(r.y), v[1]);
          v[2] = fma(weight, static_cast<double>(r.z), v[2]),
          v[3] = fma(weight, static_cast<double>(r.w), v[3]);
        }
        if (shares == 1) {
          store_sums(sums + (e - low), v);
        } else {  // once
#pragma unroll
          for (int k = 0; k < 4; ++k) shared.shares[tid][k] = v[k];
        }
      }
      if (shares > 1) {
        crew.wait();
#pragma unroll 1
        for (int i = tid; i < 4 * lanes && low + i < high; i += THREADS) {
          double sum = 0;
#pragma unroll 4
          for (int s = 0; s < shares; ++s) sum += shared.shares[s * lanes + i / 4][i % 4];
          __stcg(sums + i, sum);
        }
      }
      crew.wait_for_all();  // all have read the scores
    }
    return {best, total, own};
  }

  // A row once more.
  __device__ void operator()(int64_t index) const {
    const Row row = row_coefficients(in, index);
    const Array x = x_of(in, index), out = out_of(in, index);
    const int64_t group = in.labels ? in.labels[index] : 0;
    const int64_t first = group < 0 ? 0 : group * in.m,
                  all = group < 0 ? in.k * in.m : valid_count(in, group);
    const auto [best, total, own] = weigh<true>(row, x, {group, first, 0, all});
#pragma unroll 1
    for (int64_t e = low + 4 * tid; e < high; e += 4 * THREADS) {
      double v[4] = {};
      if (all > 0) add_sums(sums + (e - low), 1, v);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int64_t at = index * in.d + e + k;
        if (own != 0) v[k] = fma(own, load_as<double>(in.source, at), v[k]);
        store_as(out, at, fma(row.a, load_as<double>(x, at), row.b / total * v[k]));
      }
    }
    if (in.lse.data && low == 0 && tid == 0) write_lse(in, index, {best, total, 0, 0});
  }
};

// The rows of a block's list, by all its consumers; of the elements those of its slice. memory: of the ring,
// to which nothing is on its way any more.
template <typename T>
__device__ __noinline__ void settle_rows(const Inputs& in, const BulkParts& parts, const RowPlace& place,
                                         int first, char* memory, int tid) {
  const Settle<T, BlockCrew> settle{in,
                                    {tid},
                                    *reinterpret_cast<SettleInBlock*>(memory),
                                    parts.settled + blockIdx.x * place.slice,
                                    place.offset,
                                    place.offset + place.length};
  for (int index = first; index != NO_ROW; index = parts.next[place.rank * in.n + index]) {
    if (settle.stays_in_doubt(index, parts.doubts[place.rank * in.n + index])) settle(index);
  }
}

// The elements of a row that fall to a block of a cluster.
struct ElementsOfBlock {
  int rank;
  int64_t low, high;
};
__device__ __forceinline__ ElementsOfBlock elements_of_block(int64_t d) {
  constexpr int BLOCKS = ClusterCrew::BLOCKS;
  const int rank = static_cast<int>(blockIdx.x) % BLOCKS;
  const int64_t slice = ((d + BLOCKS - 1) / BLOCKS + 3) / 4 * 4, low = min(rank * slice, d);
  return {rank, low, min(low + slice, d)};
}

// A row in doubt, whose result is in memory (what a block writes here it has written), by a cluster of
// blocks, all threads: see stays_in_doubt. sums: (d,).
template <typename T>
__device__ __forceinline__ void settle_in_cluster(const Inputs& in, int64_t index, const Doubt& doubt,
                                                  double* sums, SettleInCluster& shared) {
  const ElementsOfBlock mine = elements_of_block(in.d);
  const Settle<T, ClusterCrew> settle{
      in, {static_cast<int>(threadIdx.x), mine.rank}, shared, sums + mine.low, mine.low, mine.high};
  if (settle.stays_in_doubt(index, doubt)) settle(index);
}

}  // namespace svel::cuda
