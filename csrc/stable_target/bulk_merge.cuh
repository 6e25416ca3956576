// From the parts of few rows that the blocks of bulk_groups.cuh and bulk_teams.cuh leave to results, where
// units are cut into many of them: a launch behind theirs, and the last. A row has clusters of blocks, each
// block a few elements. All of them weigh the row's parts alike, and so all know whether its scores are in
// doubt (doubt_of_row). If so, nobody stores what they gave: the row's first cluster has all of the row, its
// merge and what is to be said of the result (bulk_settle.cuh). Neither a launch nor a message is for that
// alone.
#pragma once

#include "stable_target/bulk_settle.cuh"

namespace svel::cuda {

constexpr int MERGE_THREADS = ClusterCrew::THREADS, MERGE_CLUSTER = ClusterCrew::BLOCKS;
constexpr int MERGE_BLOCKS = 2;                          // to a multiprocessor
constexpr int MERGE_SHARES = 4, MERGE_MANY_SHARES = 16;  // the latter for units of MERGE_MANY parts
constexpr int64_t MERGE_MANY = 64;
constexpr int MERGE_EARLY = 9;  // parts that a thread has on their way before it knows their weights
constexpr int merge_elements(int shares) {  // of D per block
  return 2 * MERGE_THREADS / shares;
}
// Of a row, whole clusters.
__host__ __device__ inline int merge_blocks(int64_t d, int shares) {
  const int most = merge_elements(shares) * MERGE_CLUSTER;
  return static_cast<int>((d + most - 1) / most) * MERGE_CLUSTER;
}

struct MergeLayout {
  int slices, most_rows;
  int64_t slice;
  int guess;  // of MergedRow::count, of the only row; 0: none
  int64_t teams;
};

// A row in doubt, by its first cluster. weights: of its parts, `by` for their sum; of a row of one part the
// result is in memory.
template <typename T>
__device__ __noinline__ void look_again(const Inputs& in, const BulkParts& parts, const MergeLayout& layout,
                                        int index, const MergedRow row, const Doubt doubt,
                                        const double* weights, double by, SettleInCluster& shared) {
  const ElementsOfBlock mine = elements_of_block(in.d);
  const int64_t team = 2 * layout.slices * layout.most_rows, pairs = layout.slice / 2;
  const Array x = x_of(in, index), out = out_of(in, index);
#pragma unroll 1
  for (int64_t e = mine.low + 2 * threadIdx.x; e < mine.high && row.count > 1; e += 2 * MERGE_THREADS) {
    const int64_t rank = e / layout.slice;
    const double2* from = reinterpret_cast<const double2*>(parts.sums) +
                          (row.from * team + 2 * rank * layout.most_rows + row.row) * pairs +
                          (e - rank * layout.slice) / 2;
    double2 part = __ldcg(from + layout.most_rows * pairs), sum = make_double2(0, 0);
#pragma unroll 8
    for (int j = 0; j < row.count; ++j) {
      if (j > 0) part = __ldcg(from + j * team * pairs);
      sum.x = fma(weights[j], part.x, sum.x), sum.y = fma(weights[j], part.y, sum.y);
    }
    const int64_t at = index * in.d + e;
    store_as(out, at, fma(row.a, load_as<double>(x, at), by * sum.x));
    store_as(out, at + 1, fma(row.a, load_as<double>(x, at + 1), by * sum.y));
  }
  __syncthreads();
  settle_in_cluster<T>(in, index, doubt, parts.settled + index * in.d, shared);
}

// Merges the parts of one row over a few elements of D, two to each thread; SHARES threads of the same two
// take turns at the parts, of which there is at most one to a thread of the block. Grid: rows x merge_blocks.
// What a block reads of the parts does not depend on their weights: it is all on its way at once.
// LISTED: nobody has left rows, they are in the list.
template <typename T, int SHARES, bool LISTED>
__global__ void __launch_bounds__(MERGE_THREADS, MERGE_BLOCKS) SVEL_CLUSTER(MERGE_CLUSTER)
    merge_kernel(const __grid_constant__ Inputs in, const __grid_constant__ UnitList list,
                 const __grid_constant__ BulkParts parts, const __grid_constant__ MergeLayout layout) {
  constexpr int ELEMENTS = merge_elements(SHARES), PAIRS = ELEMENTS / 2, WARPS = MERGE_THREADS / 32;
  constexpr int EARLY = MERGE_EARLY, SETS = PAIRS < 32 ? WARPS : SHARES;  // SETS: of sums of a pair
  static_assert(EARLY * SHARES <= MERGE_THREADS, "a thread has a weight for each");
  __shared__ SettleInCluster again;
  __shared__ double weights[MERGE_THREADS], tops[WARPS], totals[WARPS];  // weights: beyond the parts zero
  __shared__ float leads[WARPS], scales[WARPS];
  __shared__ int leading;  // of a row in doubt, the part of the reference of most weight
  __shared__ double2 sums[SETS][PAIRS];
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const int share = tid / PAIRS, pair = tid % PAIRS;
  const int blocks = merge_blocks(in.d, SHARES);
  const int index = static_cast<int>(blockIdx.x) / blocks, chunk = static_cast<int>(blockIdx.x) % blocks;
  const int e = chunk * ELEMENTS + 2 * pair;
  const bool within = e < in.d;
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
  const GroupsRow* rows_from = parts.rows + tid * team;
  const int64_t step = SHARES * team * pairs;
  // Never. But what is not asked for here the compiler would find out behind the wait.
  if (!sums_from || !rows_from || step == 0) __trap();
  if constexpr (LISTED) {
    wait_for_previous_launch();
  } else {  // until all blocks have left what they have, which is sooner: see leave_all
    while (tid < layout.teams && read_arrivals(parts.left + tid) == 0) continue;
    __syncthreads();
  }

  // A guess that holds saves the way to memory and back that the answer takes.
  MergedRow row{0, 0, 0, layout.guess, 0};
  if constexpr (LISTED) {
    int place = 0;
    while (list.order[place] != index) ++place;
    row = merged_row(in, list, layout.teams, place);
  }
  int count, mine;
  const double2 nothing = make_double2(0, 0);
  double2 near, early[EARLY];  // near: see PartRow
  float2 of_near;
  const double2* other_at;
#pragma unroll 1
  for (;;) {
    count = row.count;
    mine = within ? (count - share + SHARES - 1) / SHARES : 0;  // parts
    const int first = row.from * team + row.row, second = first + layout.most_rows;
    const GroupsRow* const near_at = rows_from + (tid == 0 ? second : first);
    const double2* const first_at = sums_from + (share == 0 ? second : first) * pairs;
    other_at = sums_from + first * pairs;
    near = make_double2(-INFINITY, 0), of_near = make_float2(0, 0);
    if (tid < count) {
      near = __ldcg(reinterpret_cast<const double2*>(near_at));
      of_near = __ldcg(reinterpret_cast<const float2*>(&near_at->lead));
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
    if (row.count == 1) break;
  }
  if (row.count == 1) {  // its only team has the result
    wait_for_previous_launch();
    const Doubt doubt = parts.doubts[index];
    if (doubt.error > 0 && chunk < MERGE_CLUSTER)
      look_again<T>(in, parts, layout, index, row, doubt, nullptr, 0, again);
    return;
  }
  const auto greater = [](double a, double b) { return a >= b || b != b ? a : b; };
  double top = near.x;
#pragma unroll
  for (int hop = 16; hop > 0; hop /= 2) top = greater(top, __shfl_xor_sync(0xffffffffu, top, hop));
  if (lane == 0) tops[warp] = top;
  __syncthreads();
  top = tops[0];
#pragma unroll
  for (int w = 1; w < WARPS; ++w) top = greater(top, tops[w]);
  const double weight = exp2(near.x - top);
  weights[tid] = weight;
  double total = weight * near.y;
  const float own = static_cast<float>(weight) * of_near.x;
  float lead = own, scale = of_near.y;
#pragma unroll
  for (int hop = 16; hop > 0; hop /= 2) {
    total += __shfl_xor_sync(0xffffffffu, total, hop);
    lead = fmaxf(lead, __shfl_xor_sync(0xffffffffu, lead, hop));
    scale = fmaxf(scale, __shfl_xor_sync(0xffffffffu, scale, hop));
  }
  if (lane == 0) totals[warp] = total, leads[warp] = lead, scales[warp] = scale;
  __syncthreads();
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
  if (PAIRS >= 32 || lane < PAIRS) sums[PAIRS < 32 ? warp : share][pair] = sum;
  total = totals[0], lead = leads[0], scale = scales[0];
#pragma unroll
  for (int w = 1; w < WARPS; ++w)
    total += totals[w], lead = fmaxf(lead, leads[w]), scale = fmaxf(scale, scales[w]);
  Doubt doubt = doubt_of_row(parts.rounding, row.b, {top, total, lead, scale, 0});
  __syncthreads();
  wait_for_previous_launch();  // what comes after this launch takes that one as done
  if (!(doubt.error > 0) && tid < PAIRS && within) {
    const double by = row.b / total;
    sum = sums[0][tid];
#pragma unroll
    for (int s = 1; s < SETS; ++s) sum.x += sums[s][tid].x, sum.y += sums[s][tid].y;
    store_as(out, int64_t{index} * in.d + e, fma(row.a, x[0], by * sum.x));
    store_as(out, int64_t{index} * in.d + e + 1, fma(row.a, x[1], by * sum.y));
  }
  if (in.lse.data && chunk == 0 && tid == 0) write_lse(in, index, {top, total, lead, scale});
  if (!(doubt.error > 0) || chunk >= MERGE_CLUSTER) return;
  if (tid == 0) leading = count;
  __syncthreads();
  if (own == lead) atomicMin(&leading, tid);
  __syncthreads();
  const int first = row.from * team + row.row;
  doubt.best = __ldcg(&parts.rows[first + (leading == 0 ? layout.most_rows : leading * team)].best);
  look_again<T>(in, parts, layout, index, row, doubt, weights, row.b / total, again);
}

}  // namespace svel::cuda
