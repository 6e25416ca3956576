// Rows that are in doubt after all, evaluated once more in float64, one after the other, by the whole grid: a
// block has its share of the references, whose weights and sums it leaves as a part; when all have, each
// block merges some elements. Hardly a call has such rows, so without them this is a launch and nothing else.
// Bytes of a row: m d references; twice those that have weight.
#pragma once

#include "stable_target/pool_best.cuh"

namespace svel::cuda {

constexpr int POOL_SETTLE_THREADS = 512;  // and as many references at a time
constexpr int POOL_SETTLE_EACH = POOL_D / POOL_SETTLE_THREADS;
constexpr int POOL_SETTLE_AT_ONCE = 4;       // references that a warp scores together
constexpr double POOL_NO_WEIGHT = 0x1p-100;  // beside the best so far
constexpr int POOL_MOST_BLOCKS = POOL_MOST_CLUSTERS * POOL_CLUSTER;
static_assert(POOL_SETTLE_EACH == 8, "a thread has 16 bytes of a reference");
static_assert(POOL_MOST_BLOCKS <= POOL_SETTLE_THREADS, "a thread has a part");

struct PoolPart {  // of what one block has of a row
  double best;     // logit, base 2
  double total;    // of weights, the best's 1
};

// Where element e of x lies in shared memory: what a warp's lanes read at a time, 8 apart, side by side.
__device__ inline int pool_place(int e) {
  return e / 256 * 256 + e % 8 * 32 + e / 8 % 32;
}

// All threads of all blocks.
__device__ inline void meet_grid() {
  __syncthreads();
  if (threadIdx.x == 0) wait_for_grid(arrive_in_grid());
  __syncthreads();
}

// Base-2 logits, -|x - alpha r|^2 / (2 sigma^2), of some references by a warp. x: in shared memory, times
// sign.
template <int COUNT>
__device__ inline void pool_score(const Row& row, const double* x, const __half* const (&from)[COUNT], int d,
                                  int lane, double (&logits)[COUNT]) {
  double squares[COUNT] = {};
#pragma unroll 2
  for (int e = 8 * lane; e < d; e += 256) {
    uint4 raw[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) raw[i] = *reinterpret_cast<const uint4*>(from[i] + e);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const double of_x = x[e - 8 * lane + 32 * k + lane];  // pool_place(e + k)
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const double r = __half2float(reinterpret_cast<const __half*>(&raw[i])[k]);
        const double gap = fma(-row.alpha, r, of_x);
        squares[i] = fma(gap, gap, squares[i]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) logits[i] = -LOG2_E / (2 * row.sigma * row.sigma) * warp_sum(squares[i]);
}

// One cooperative grid. parts (blocks,), sums (blocks, d).
__global__ void __launch_bounds__(POOL_SETTLE_THREADS)
    pool_settle_kernel(const Inputs in, const uint64_t* doubtful, PoolPart* parts, double* sums) {
  constexpr int THREADS = POOL_SETTLE_THREADS, EACH = POOL_SETTLE_EACH, AT_ONCE = POOL_SETTLE_AT_ONCE;
  __shared__ double x[POOL_D], weights[THREADS], keeps[POOL_MOST_BLOCKS], scratch[33];
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, blocks = gridDim.x;
  const int d = static_cast<int>(in.d), e0 = EACH * tid;
  for (uint64_t left = *doubtful; left; left &= left - 1) {
    const int64_t index = __ffsll(static_cast<long long>(left)) - 1;
    const Row row = row_coefficients(in, index);
    const int64_t m = valid_count(in, 0), last = m * (blockIdx.x + 1) / blocks;
    const __half* const refs = static_cast<const __half*>(in.refs.data);
    for (int e = tid; e < d; e += THREADS) x[pool_place(e)] = row.sign * load_as<double>(in.x, index * d + e);
    double best = -INFINITY, total = 0, sum[EACH] = {};
    __syncthreads();
    for (int64_t begin = m * blockIdx.x / blocks; begin < last; begin += THREADS) {
      for (int j = AT_ONCE * warp; j < THREADS; j += AT_ONCE * (THREADS / 32)) {
        const __half* from[AT_ONCE];
        double logits[AT_ONCE] = {};
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) from[i] = refs + min(begin + j + i, last - 1) * d;
        if (begin + j < last) pool_score(row, x, from, d, lane, logits);
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
          if (lane == i) weights[j + i] = begin + j + i < last ? logits[i] : -INFINITY;
      }
      __syncthreads();
      const double own = weights[tid], top = fmax(best, block_max<double>(own, scratch));
      const double keep = exp2(best - top), weight = exp2(own - top);
      best = top, total = fma(total, keep, block_sum<double>(weight, scratch));
      weights[tid] = weight;
#pragma unroll
      for (int k = 0; k < EACH; ++k) sum[k] *= keep;
      __syncthreads();
      for (int j = 0; j < THREADS; j += 32) {
        uint32_t heavy = __ballot_sync(0xffffffffu, weights[j + lane] >= POOL_NO_WEIGHT);
        for (; heavy; heavy &= heavy - 1) {
          const int at = j + __ffs(static_cast<int>(heavy)) - 1;
          if (e0 >= d) continue;
          const uint4 raw = *reinterpret_cast<const uint4*>(refs + (begin + at) * d + e0);
#pragma unroll
          for (int k = 0; k < EACH; ++k) {
            const double r = __half2float(reinterpret_cast<const __half*>(&raw)[k]);
            sum[k] = fma(weights[at], r, sum[k]);
          }
        }
      }
      __syncthreads();  // weights are overwritten next
    }
    if (tid == 0) parts[blockIdx.x] = {best, total};
    if (e0 < d) {
#pragma unroll
      for (int k = 0; k < EACH; ++k) __stcg(sums + int64_t{blockIdx.x} * d + e0 + k, sum[k]);
    }
    meet_grid();
    PoolPart part = {-INFINITY, 0};
    if (tid < blocks) part = {__ldcg(&parts[tid].best), __ldcg(&parts[tid].total)};
    const double top = block_max<double>(part.best, scratch), keep = exp2(part.best - top);
    const double all = block_sum<double>(keep * part.total, scratch);
    if (tid < blocks) keeps[tid] = keep;
    __syncthreads();
    for (int e = blockIdx.x + blocks * warp; e < d; e += blocks * (THREADS / 32)) {
      double merged = 0;
      for (int b = lane; b < blocks; b += 32)
        merged = fma(keeps[b], __ldcg(sums + int64_t{b} * d + e), merged);
      const double mean = warp_sum(merged) / all;
      if (lane == 0)
        store_as(in.out, index * d + e, row.a * load_as<double>(in.x, index * d + e) + row.b * mean);
    }
    if (in.lse.data && blockIdx.x == 0 && tid == 0)
      store_as(in.lse, index, LOG_2 * top + log(all) + 0.5 * static_cast<double>(d));
    meet_grid();  // parts and sums are overwritten next
  }
}

}  // namespace svel::cuda
