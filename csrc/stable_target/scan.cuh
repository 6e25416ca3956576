// What builds lists of rows on the device shares: scans and a sort over one block, and the rows themselves.
#pragma once

#include "common/planner.h"
#include "stable_target/rows.cuh"

namespace svel::cuda {

constexpr int LIST_THREADS = 1024;
constexpr int CHUNK = 4096;  // rows that are sorted at a time
constexpr int CHUNK_BITS = 12;

// Exclusive scan of v over the block's threads in their order; `total` becomes the reduction of all.
template <typename Op>
__device__ inline int64_t block_scan(int64_t v, int64_t identity, Op op, int64_t* scratch, int64_t& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto warp_scan = [&](int64_t value) {
    for (int offset = 1; offset < 32; offset *= 2) {
      const int64_t other = __shfl_up_sync(0xffffffffu, value, offset);
      if (lane >= offset) value = op(value, other);
    }
    return value;
  };
  const int64_t mine = warp_scan(v);
  if (lane == 31) scratch[warp] = mine;
  __syncthreads();
  const int64_t warps = warp_scan(lane < static_cast<int>(blockDim.x) / 32 ? scratch[lane] : identity);
  total = __shfl_sync(0xffffffffu, warps, 31);
  const int64_t earlier = __shfl_sync(0xffffffffu, warps, warp == 0 ? 0 : warp - 1);
  const int64_t left = __shfl_up_sync(0xffffffffu, mine, 1);
  __syncthreads();
  return op(warp == 0 ? identity : earlier, lane == 0 ? identity : left);
}

__device__ inline int64_t block_prefix(int64_t v, int64_t* scratch, int64_t& total) {
  return block_scan(v, 0, [](int64_t a, int64_t b) { return a + b; }, scratch, total);
}

// Ascending bitonic sort of `size` keys, a power of two. A warp's 32 pairs lie in its own 64 keys while the
// step is at most 32: then only the warp waits.
__device__ inline void sort_keys(uint64_t* keys, int size) {
  for (int span = 2; span <= size; span *= 2) {
    for (int step = span / 2; step > 0; step /= 2) {
      for (int i = threadIdx.x; i < size / 2; i += blockDim.x) {
        const int low = 2 * i - (i & (step - 1)), high = low + step;
        const bool ascending = (low & span) == 0;
        const uint64_t a = keys[low], b = keys[high];
        if ((a > b) == ascending) {
          keys[low] = b;
          keys[high] = a;
        }
      }
      if (step > 32 || (step == 1 && span >= 64)) {
        __syncthreads();
      } else {
        __syncwarp();
      }
    }
  }
  __syncthreads();
}

// Without its group and references.
__device__ inline Row row_coefficients(const Inputs& in, int64_t index) {
  Row row{};
  row.index = index;
  row.sign = 1.0;
  const double given = load_as<double>(in.time_or_alpha, index);
  if (in.from_time) {
    const PathCoefficients at = path_coefficients(in.path, clamp_time(given));
    const PredictionCoefficients p = prediction_coefficients(in.prediction, at);
    row.alpha = at.alpha, row.sigma = at.sigma, row.a = p.a, row.b = p.b;
  } else {
    row.alpha = given, row.sigma = load_as<double>(in.sigma, index), row.a = 0.0, row.b = 1.0;
  }
  if (row.alpha < 0) row.alpha = -row.alpha, row.sign = -1.0;
  return row;
}

__device__ inline Row make_row(const Inputs& in, int64_t index, int64_t all_references, bool& alive) {
  Row row = row_coefficients(in, index);
  alive = isfinite(row.alpha) && isfinite(row.sigma) && row.sigma != 0.0;
  row.group = in.labels ? in.labels[index] : 0;
  alive = alive && row.group >= -1 && row.group < in.k;
  row.count = !alive ? 0 : row.group < 0 ? all_references : valid_count(in, row.group);
  return row;
}

// Prefix sums of the groups' tiles, and the numbers of all tiles and references.
__device__ inline void scan_groups(const Inputs& in, int tile_refs, int64_t* group_tiles, int64_t* scratch,
                                   int64_t& all_tiles, int64_t& all_references) {
  all_tiles = all_references = 0;
  for (int64_t base = 0; base < in.k; base += blockDim.x) {
    const int64_t group = base + threadIdx.x, count = group < in.k ? valid_count(in, group) : 0;
    int64_t tiles_here, references_here;
    const int64_t before = block_prefix(ceil_div(count, tile_refs), scratch, tiles_here);
    block_prefix(count, scratch, references_here);
    if (group < in.k) group_tiles[group] = all_tiles + before;
    all_tiles += tiles_here;
    all_references += references_here;
  }
  if (threadIdx.x == 0) group_tiles[in.k] = all_tiles;
}

}  // namespace svel::cuda
