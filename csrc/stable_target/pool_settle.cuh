// Rows that are in doubt after all, evaluated once more in float64, one after the other, by the whole grid: a
// block has its share of the references, which it weighs as any row in doubt is (Settle); what they weigh and
// their sums it leaves as a part, and when all have, each block merges some elements. Hardly a call has such
// rows, so without them this is a launch and nothing else. Bytes of a row: m d references; twice those that
// have weight.
#pragma once

#include "stable_target/bulk_settle.cuh"
#include "stable_target/pool_best.cuh"

namespace svel::cuda {

constexpr int POOL_SETTLE_THREADS = BlockCrew::THREADS;
constexpr int POOL_MOST_BLOCKS = POOL_MOST_CLUSTERS * POOL_CLUSTER;
static_assert(POOL_MOST_BLOCKS <= POOL_SETTLE_THREADS, "a thread has a part");

struct PoolPart {  // of what one block has of a row
  double best;     // logit, base 2
  double total;    // of weights, the best's 1
};

// One cooperative grid. doubtful (words,), parts (blocks,), sums (blocks, d). BANK: bits are places in its
// order.
template <bool BANK>
__global__ void __launch_bounds__(POOL_SETTLE_THREADS)
    pool_settle_kernel(const Inputs in, const uint64_t* doubtful, PoolPart* parts, double* sums, int words,
                       const PoolBankIf<BANK> bank) {
  constexpr int THREADS = POOL_SETTLE_THREADS;
  __shared__ SettleInBlock shared;
  __shared__ double keeps[POOL_MOST_BLOCKS];
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, blocks = gridDim.x;
  const Settle<__half, BlockCrew> settle{in, {tid}, shared, sums + blockIdx.x * in.d, 0, in.d};
  const auto settle_row = [&](int64_t index) {
    const int64_t m = BANK ? in.k * in.m : valid_count(in, 0);
    const Row row = row_coefficients(in, index);
    const Weighed own = settle.weigh<false>(
        row, in.x, {BANK ? -1 : 0, 0, m * blockIdx.x / blocks, m * (blockIdx.x + 1) / blocks});
    if (tid == 0) parts[blockIdx.x] = {own.best, own.total};
    meet_grid();
    PoolPart part = {-INFINITY, 0};
    if (tid < blocks) part = {__ldcg(&parts[tid].best), __ldcg(&parts[tid].total)};
    const double top = settle.over_block(part.best, [](double a, double b) { return fmax(a, b); });
    const double keep = power(part.best - top), total = settle.sum_over_block(keep * part.total);
    if (tid < blocks) keeps[tid] = keep;
    __syncthreads();
    for (int64_t e = blockIdx.x + blocks * warp; e < in.d; e += blocks * (THREADS / 32)) {
      double merged = 0;
      for (int b = lane; b < blocks; b += 32)
        if (keeps[b] != 0)  // else there may be no sums
          merged = fma(keeps[b], __ldcg(sums + b * in.d + e), merged);
      const double mean = warp_sum(merged) / total;
      if (lane == 0) {
        const int64_t at = index * in.d + e;
        store_as(in.out, at, fma(row.a, load_as<double>(in.x, at), row.b * mean));
      }
    }
    if (in.lse.data && blockIdx.x == 0 && tid == 0) write_lse(in, index, {top, total, 0, 0});
    meet_grid();  // parts and sums are overwritten next
  };
  for (int word = 0; word < (BANK ? words : 1); ++word) {
    for (uint64_t left = doubtful[word]; left; left &= left - 1) {
      const int place = 64 * word + __ffsll(static_cast<long long>(left)) - 1;
      if constexpr (BANK) {
        settle_row(bank.order[place]);
      } else {
        settle_row(place);
      }
    }
  }
}

}  // namespace svel::cuda
