// What the kernels of bulk copies (bulk_groups.cuh, bulk.cuh) share: the ranges that teams of blocks have of
// the list of units, and the parts that they leave in memory.
#pragma once

#include "common/hopper.cuh"
#include "common/planner.h"
#include "stable_target/units.cuh"

namespace svel::cuda {

// 2^-50: a tile whose weights are all below that, beside the best so far, is not added. Of 2^24 such
// references all together are below float32's rounding.
constexpr float NO_WEIGHT = 8.8817841970012523e-16f;
constexpr int SEGMENT_REFS = 256;  // summed in float32 before they move to float64

// A team's share of a unit, for one row: weights are 2^log2_weight times what the sums hold.
struct PartRow {
  double log2_weight, total;  // sum of the weights
};

// Parts of units; slot 2b of block b for a unit that began earlier, 2b + 1 for one that begins here.
struct BulkParts {
  double* sums;   // (2 blocks, rows, slice) weighted sums of the references
  PartRow* rows;  // (2 blocks, rows)
  int* arrived;   // zero at first. Groups: (n,) teams that have finished their part of a row of `order`; teams
                  // of blocks: (n, slices) of a unit
  uint2* mail;    // (teams, TEAM_SLOTS, slices, LETTERS) with their tile's number, for Team::grid
};

// The list is cut into ranges of equal cost, the first few one longer, each of a tile at least: so a unit's
// teams follow one another. Teams beyond the last range have nothing.
struct Ranges {
  int64_t length, longer, number;

  __device__ Ranges(const UnitList& list, int64_t teams) {
    const int64_t cost = list.begins[list.sizes[0]], most = cost / max(list.sizes[2], 1);
    number = most < 1 ? 1 : most < teams ? most : teams;
    length = cost / number;
    longer = cost - length * number;
  }
  __device__ int64_t begin(int64_t team) const {
    const int64_t at = team < number ? team : number;
    return length * at + (at < longer ? at : longer);
  }
  __device__ int64_t team_of(int64_t cost) const {
    if (cost < longer * (length + 1)) return cost / (length + 1);
    return longer + (cost - longer * (length + 1)) / length;
  }
  __device__ int64_t first_team(const UnitList& list, int unit) const { return team_of(list.begins[unit]); }
  __device__ int64_t last_team(const UnitList& list, int unit) const {
    return team_of(list.begins[unit] + (list.units[unit].tiles - 1) * list.units[unit].weight);
  }
};

// The unit in which cost `at` lies, by a whole warp.
__device__ inline int find_unit(const UnitList& list, int64_t at, int lane) {
  int low = 0, high = list.sizes[0];  // begins[low] <= at < begins[high]
  while (high - low > 1) {            // 32 probes at a time
    const int step = (high - low + 31) / 32, probe = low + lane * step;
    const bool before = probe < high && list.begins[probe] <= at;
    const int last = 31 - __clz(__ballot_sync(0xffffffffu, before));
    high = min(high, low + (last + 1) * step);
    low += last * step;
  }
  return low;
}

// Four elements from i on, zero from `limit` on: for dtypes and alignments that are rare.
__device__ inline float4 load_four(const Array& a, int64_t i, int64_t limit) {
  float v[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) v[k] = i + k < limit ? load_as<float>(a, i + k) : 0.0f;
  return make_float4(v[0], v[1], v[2], v[3]);
}
__device__ inline void store_four(const Array& a, int64_t i, int64_t limit, float4 v) {
  if (i < limit) store_as(a, i, v.x);
  if (i + 1 < limit) store_as(a, i + 1, v.y);
  if (i + 2 < limit) store_as(a, i + 2, v.z);
  if (i + 3 < limit) store_as(a, i + 3, v.w);
}

// EV elements of T, 16 bytes, as float32.
template <typename T, int EV>
__device__ inline void unpack(const uint4& raw, float (&out)[EV]) {
  const T* values = reinterpret_cast<const T*>(&raw);
#pragma unroll
  for (int k = 0; k < EV; ++k) out[k] = to_float(values[k]);
}

// Sums v[j] over the warp for all COUNT values at once; lane l gets the sum of value l / (32 / COUNT).
template <int COUNT>
__device__ inline float sum_over_warp(float (&v)[COUNT], int lane) {
  int offset = 16;
#pragma unroll
  for (int half = COUNT / 2; half > 0; half /= 2, offset /= 2) {
    const bool upper = lane & offset;
#pragma unroll
    for (int j = 0; j < half; ++j) {
      const float give = upper ? v[j] : v[j + half], keep = upper ? v[j + half] : v[j];
      v[j] = keep + __shfl_xor_sync(0xffffffffu, give, offset);
    }
  }
#pragma unroll
  for (; offset > 0; offset /= 2) v[0] += __shfl_xor_sync(0xffffffffu, v[0], offset);
  return v[0];
}

template <typename W>
__device__ inline W sum_over_lanes(W v, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// 2^exponent for an integer of at most 0; below float32's range: 0.
__device__ inline float power_of_two(double exponent) {
  return exponent < -126.0 ? 0.0f : __int_as_float((127 + static_cast<int>(exponent)) << 23);
}

}  // namespace svel::cuda
