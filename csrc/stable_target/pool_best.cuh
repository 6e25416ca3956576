// The best references of a row, as the clusters of the pool kernel list them, scored again in float64: those
// whose weight times the error of a logit is more than POOL_MATTERS. See pool_sides.cuh for what is left of
// the error. Where logits are off by more than POOL_TOO_FAR, for t near 0, the kernel's weights are no good,
// but tell which references may have weight: where all of those are listed, they make the row alone. Bytes:
// those of the references, at most POOL_LISTED of each cluster and row, usually a few.
#pragma once

#include "stable_target/pool_sides.cuh"

namespace svel::cuda {

constexpr double POOL_MATTERS = 3e-9;
constexpr double POOL_TOO_FAR = 0.5;
// There, what is so many bits below the best has no weight, however many there are, plus so many for an error
// of one, 7 standard deviations, since the logits are that far off.
constexpr double POOL_REACH = 60, POOL_REACH_ERRORS = 10;
constexpr int POOL_AGAIN_WARPS = 16, POOL_AGAIN_BLOCKS = 4;  // of a row
constexpr int POOL_AGAIN_ROUNDS = 2, POOL_MOST_CLUSTERS = POOL_AGAIN_ROUNDS * POOL_AGAIN_WARPS;

// Grid: (POOL_AGAIN_BLOCKS, rows); steps (rows, clusters x POOL_LISTED). A warp has a cluster's list.
template <bool BANK>
__global__ void __launch_bounds__(32 * POOL_AGAIN_WARPS)
    pool_again_kernel(const Inputs in, const PoolArgs all_args, const PoolRow* rows, int parts, int clusters,
                      PoolAgain* again, PoolStep* steps, const PoolBankIf<BANK> bank) {
  constexpr int ROUNDS = POOL_AGAIN_ROUNDS, EACH = POOL_D / (32 * POOL_AGAIN_WARPS);
  __shared__ float4 shared_x[POOL_D / 4];
  __shared__ PoolBest taken[POOL_MOST_CLUSTERS * POOL_LISTED];
  __shared__ int counts[POOL_MOST_CLUSTERS];
  __shared__ float worst[POOL_MOST_CLUSTERS], tops[33];
  __shared__ double scratch[33];
  float* const x = reinterpret_cast<float*>(shared_x);  // exact: it has at most 32 bits
  if constexpr (BANK) {
    const int slot = blockIdx.y;
    if (slot > 0 && bank.first + slot >= *bank.sizes) return;  // see pool_kernel
  }
  wait_for_previous_launch();
  allow_next_launch();  // the merge begins with the parts, which are there
  const int slot = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const PoolPass<BANK> pass(all_args, bank, slot, clusters);
  if (pass.is_empty) return;
  const PoolArgs& args = pass.args;
  const int d = static_cast<int>(in.d);
  PoolBest best[ROUNDS];
#pragma unroll
  for (int k = 0; k < ROUNDS; ++k) {
    const int c = warp + k * POOL_AGAIN_WARPS;
    best[k] = {-INFINITY, 0};
    if (c < clusters) best[k] = args.list[(c * POOL_ROWS + pass.row) * POOL_LISTED + lane];
  }
  const PoolRow row = rows[slot];
  float own_x[EACH] = {};
  if (row.alive)
    pool_read_row(in.x, row.index * d, static_cast<int>(threadIdx.x), 32 * POOL_AGAIN_WARPS, d, own_x);
  float top = POOL_NO_BEST;
  double weight = 0;
  for (int p = threadIdx.x; p < parts; p += blockDim.x) {
    const double part = args.total[p * POOL_ROWS + pass.row];
    const float its = args.best[p * POOL_ROWS + pass.row];
    if (part == 0) continue;  // written by nobody
    const float higher = fmaxf(top, its);
    weight =
        weight * exp2(static_cast<double>(top) - higher) + part * exp2(static_cast<double>(its) - higher);
    top = higher;
  }
  const float most = block_max<float>(top, tops);
  const double total = block_sum<double>(weight * exp2(static_cast<double>(top) - most), scratch);
#pragma unroll
  for (int k = 0; k < EACH; ++k)
    x[threadIdx.x + k * 32 * POOL_AGAIN_WARPS] = static_cast<float>(row.sign) * own_x[k];

  // The logit is rounded where the kernel makes it, too.
  const double rounding = LOG_2 * 0x1p-24 * most;
  const double error = sqrt(row.logit_error * row.logit_error + rounding * rounding);
  const bool far = error > POOL_TOO_FAR;
  const double nearest = most - POOL_REACH - POOL_REACH_ERRORS * error;  // of those without weight if far
  const auto share = [&](float logit) {
    return POOL_WEIGHT_SCALE * exp2(static_cast<double>(logit) - most) / total;
  };
  double shares[ROUNDS];
  uint32_t all[ROUNDS];
#pragma unroll
  for (int k = 0; k < ROUNDS; ++k) {
    shares[k] = share(best[k].logit);
    const bool matters = far ? best[k].logit > nearest : shares[k] * error > POOL_MATTERS;
    all[k] = __ballot_sync(0xffffffffu, row.alive && matters);  // none if NaN
    float least = best[k].logit;
    for (int offset = 16; offset > 0; offset /= 2)
      least = fminf(least, __shfl_xor_sync(0xffffffffu, least, offset));
    if (lane == 0)
      counts[warp + k * POOL_AGAIN_WARPS] = __popc(all[k]), worst[warp + k * POOL_AGAIN_WARPS] = least;
  }
  __syncthreads();
  int count = 0;
#pragma unroll
  for (int k = 0; k < ROUNDS; ++k) {
    int at = 0;
    count = 0;
    for (int c = 0; c < clusters; ++c) {
      if (c < warp + k * POOL_AGAIN_WARPS) at += counts[c];
      count += counts[c];
    }
    if (all[k] >> lane & 1) taken[at + __popc(all[k] & ((1u << lane) - 1))] = best[k];
  }
  float least = -INFINITY;  // of a cluster's worst, the best: none that is not listed is better
  for (int c = 0; c < clusters; ++c) least = fmaxf(least, worst[c]);
  const bool alone = far && least <= nearest;
  if (far && !alone) count = 0;
  __syncthreads();

  if (blockIdx.x == 0) {
    double listed = 0, squares = 0;
    float largest = 0;
#pragma unroll
    for (int k = 0; k < ROUNDS; ++k) {
      listed += shares[k];
      if (all[k] >> lane & 1) continue;
      squares += shares[k] * shares[k];
      largest = fmaxf(largest, static_cast<float>(shares[k]));
    }
    listed = block_sum<double>(listed, scratch), squares = block_sum<double>(squares, scratch);
    largest = block_max<float>(largest, tops);
    // Shares are only known to so many digits.
    const double unlisted = fmax(0.0, 1 - listed) + 1e-6;
    double unsure = squares + share(least) * unlisted;
    if (far) {  // else the best is the best if others have no weight, and lse is rounded
      const double first = POOL_WEIGHT_SCALE / total;
      unsure = alone ? 0 : in.lse.data ? 1 : fmin(first, 1 - first);
    }
    if (threadIdx.x == 0)
      again[slot] = {count, alone, error, unsure, fmax(static_cast<double>(largest), share(least))};
  }

  const __half* const refs = static_cast<const __half*>(in.refs.data);
  for (int k = blockIdx.x * POOL_AGAIN_WARPS + warp; k < count; k += gridDim.x * POOL_AGAIN_WARPS) {
    const PoolBest best = taken[k];
    const uint4* const from = reinterpret_cast<const uint4*>(refs + int64_t{best.reference} * d);
    double dot = 0, norm = 0;
#pragma unroll 4
    for (int v = lane; v < d / 8; v += 32) {
      const uint4 raw = from[v];
      const __half* const halves = reinterpret_cast<const __half*>(&raw);
      const float4 low = shared_x[2 * v], high = shared_x[2 * v + 1];
      const float of_x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const double r = __half2float(halves[i]);
        dot = fma(static_cast<double>(of_x[i]), r, dot), norm = fma(r, r, norm);
      }
    }
    const double score = warp_sum(dot - 0.5 * row.alpha * norm);
    const double logit = row.rate * (score - row.centred) + row.rounded;
    const double grown = POOL_WEIGHT_SCALE * exp2(static_cast<double>(best.logit) - most) *
                         expm1(LOG_2 * (logit - best.logit));
    if (lane == 0)
      steps[static_cast<int64_t>(slot) * clusters * POOL_LISTED + k] = {alone ? logit - most : grown,
                                                                        best.reference};
  }
}

}  // namespace svel::cuda
