// Up to 32 rows against one pool of float16 references of up to 4,096 elements, each read once. A cluster of
// 8 blocks shares a sample: a block keeps its 512 elements of the rows and of their sums in registers, and
// tiles of 32 references pass through its shared memory. What a tile's weights need from all 8 blocks travels
// as mail. Roles, of warps:
//   producer   copies tiles, five in flight
//   scorers    4 warps: rows (upper and lower halves, 64) x references, products over the block's elements
//   norms      2 warps: |r - c|^2 of the references, c a centre
//   weigher    gathers both from all blocks for 4 of the rows, keeps the running softmax, sends the weights
//   to all adders     4 warps: elements x rows, the weighted sums
// Rows are y = x - alpha c times a power of two and the row's rate, as the sum of two halves; products with
// references as stored are then exact to float32, and so are weights as two halves. Bytes: m d references.
#pragma once

#include <cuda_fp16.h>

#include "common/cluster.cuh"
#include "common/planner_pool.h"
#include "common/wgmma.cuh"

namespace svel::cuda {

constexpr float POOL_NO_BEST = -3e38f;
constexpr float POOL_WEIGHT_SCALE = 32768.0f;  // weights are at most 1, and small ones keep their digits

struct PoolArgs {
  const __half *upper, *lower;  // (POOL_ROWS, POOL_D) y, zeros beyond the rows and elements
  const float4* factors;        // (POOL_ROWS,) base-2 logit = x (dot - z) - y (norm - mean_norm), z = y.c
  const float* mean_norm;       // one: of some references
  const float* centre;          // (POOL_D,)
  const int64_t* valid;         // one: references that count
  float* sums;                  // (parts, POOL_ROWS, d) of scaled weights times references
  float* best;                  // (parts, POOL_ROWS)
  double* total;                // (parts, POOL_ROWS) of scaled weights; zero before
  int d, rows;
  int segments, segment_tiles;  // parts: clusters x segments
};

// Shared memory of a block, in bytes from a multiple of 1024.
struct PoolLayout {
  static constexpr int BOXES = POOL_SLICE / 64, BOX = POOL_TILE * 128, STAGE = BOXES * BOX;
  static constexpr int OWN = POOL_ROWS / POOL_CLUSTER;  // rows that a block weighs
  static constexpr int MAIL =
      POOL_CLUSTER * (OWN + 1) * POOL_TILE * 4;        // by sender: OWN rows of dots, and norms
  static constexpr int WEIGHTS = POOL_STAGES * STAGE;  // per stage (POOL_ROWS, 32 upper and 32 lower halves)
  static constexpr int MAILS = WEIGHTS + POOL_STAGES * POOL_ROWS * 128;
  static constexpr int KEEP = MAILS + POOL_STAGES * MAIL;            // (POOL_STAGES, POOL_ROWS)
  static constexpr int CENTRE = KEEP + POOL_STAGES * POOL_ROWS * 4;  // (POOL_SLICE,)
  static constexpr int OWN_WEIGHTS = CENTRE + POOL_SLICE * 4;        // (OWN, 128)
  static constexpr int FULL = OWN_WEIGHTS + OWN * 128;               // barriers, one per stage each:
  static constexpr int EMPTY = FULL + 8 * POOL_STAGES;
  static constexpr int MAILED = EMPTY + 8 * POOL_STAGES;
  static constexpr int WEIGHED = MAILED + 8 * POOL_STAGES;
  static constexpr int BYTES = WEIGHED + 8 * POOL_STAGES;
};
static_assert(PoolLayout::BYTES + 1024 <= POOL_SMEM_BYTES, "the planner reserves less");

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ inline float exp2_approx(float v) {
  float out;
  asm("ex2.approx.f32 %0, %1;" : "=f"(out) : "f"(v));
  return out;
}

// EXACT: weights of two halves, 64 columns of one product; else of one.
template <bool EXACT>
struct PoolBlock {
  using L = PoolLayout;
  static constexpr int COLUMNS = EXACT ? 32 : 16;  // sums of a thread and box

  const PoolArgs& args;
  char* memory;
  uint32_t base;      // its shared address
  int64_t m;          // references that count
  int begin, count;   // tiles of this cluster
  int cluster, rank;  // of this block in the cluster

  __device__ uint32_t full(int s) const { return base + L::FULL + 8 * s; }
  __device__ uint32_t empty(int s) const { return base + L::EMPTY + 8 * s; }
  __device__ uint32_t mailed(int s) const { return base + L::MAILED + 8 * s; }
  __device__ uint32_t weighed(int s) const { return base + L::WEIGHED + 8 * s; }
  __device__ static void next(int& s, int& phase) {
    if (++s == POOL_STAGES) s = 0, phase ^= 1;
  }
  __device__ int64_t part(int segment) const {
    return static_cast<int64_t>(cluster) * args.segments + segment;
  }

  // One thread.
  __device__ void produce(const CUtensorMap& map) const {
    for (int i = 0, s = 0, phase = 1; i < count; ++i, next(s, phase)) {
      wait_for_cluster(empty(s), phase);
      arrive_expecting(full(s), L::STAGE);
#pragma unroll
      for (int b = 0; b < L::BOXES; ++b)
        tensor_copy(base + s * L::STAGE + b * L::BOX, map, rank * POOL_SLICE + 64 * b,
                    (begin + i) * POOL_TILE, full(s));
    }
  }

  // Two warps; warp 0 or 1, lane = 16 bytes of one of 4 references.
  __device__ void take_norms(int warp, int lane) const {
    const int chunk = lane % 8, r0 = 16 * warp + lane / 8;
    const float start = -*args.mean_norm / (POOL_CLUSTER * 8);
    const float4* const centre = reinterpret_cast<const float4*>(memory + L::CENTRE) + 2 * chunk;
    for (int i = 0, s = 0, phase = 0; i < count; ++i, next(s, phase)) {
      wait_for_cluster(full(s), phase);
      const char* const stage = memory + s * L::STAGE;
      float norm[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) norm[q] = start;
#pragma unroll 2
      for (int b = 0; b < L::BOXES; ++b) {
        const float4 low = centre[16 * b], high = centre[16 * b + 1];
        const float c[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const int r = r0 + 4 * q;
          const uint4 v =
              *reinterpret_cast<const uint4*>(stage + b * L::BOX + r * 128 + ((chunk ^ (r & 7)) << 4));
          const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[k]));
            const float first = pair.x - c[2 * k], second = pair.y - c[2 * k + 1];
            norm[q] = fmaf(first, first, norm[q]), norm[q] = fmaf(second, second, norm[q]);
          }
        }
      }
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        for (int offset = 1; offset < 8; offset *= 2)
          norm[q] += __shfl_xor_sync(0xffffffffu, norm[q], offset);
        const uint32_t to =
            base + L::MAILS + s * L::MAIL + ((rank * (L::OWN + 1) + L::OWN) * POOL_TILE + r0 + 4 * q) * 4;
        send(peer_address(to, chunk), peer_address(mailed(s), chunk), norm[q]);
      }
    }
  }

  // One warp; lane = reference.
  __device__ void weigh(int lane) const {
    constexpr int OWN = L::OWN;
    float best[OWN], total[OWN];
    float4 factor[OWN];
#pragma unroll
    for (int r = 0; r < OWN; ++r)
      best[r] = POOL_NO_BEST, total[r] = 0, factor[r] = args.factors[rank * OWN + r];
    int segment = 0, in_segment = 0;
    for (int i = 0, s = 0, phase = 0; i < count; ++i, next(s, phase)) {
      if (lane == 0) arrive_expecting(mailed(s), L::MAIL);
      __syncwarp();
      wait_for_cluster(mailed(s), phase);
      const float* const mail = reinterpret_cast<const float*>(memory + L::MAILS + s * L::MAIL);
      const bool valid = static_cast<int64_t>(begin + i) * POOL_TILE + lane < m;
      float norm = 0;
#pragma unroll
      for (int from = 0; from < POOL_CLUSTER; ++from)
        norm += mail[(from * (OWN + 1) + OWN) * POOL_TILE + lane];
      float keep[OWN];
#pragma unroll
      for (int r = 0; r < OWN; ++r) {
        float dot = -factor[r].z;
#pragma unroll
        for (int from = 0; from < POOL_CLUSTER; ++from)
          dot += mail[(from * (OWN + 1) + r) * POOL_TILE + lane];
        const float logit = valid ? fmaf(factor[r].x, dot, -factor[r].y * norm) : -INFINITY;
        // Floats in their order as integers.
        const int bits = __float_as_int(logit), ordered = bits ^ (bits >> 31 & 0x7fffffff);
        const int most = __reduce_max_sync(0xffffffffu, ordered);
        const float highest = __int_as_float(most ^ (most >> 31 & 0x7fffffff));
        // Whole numbers: what was added up is scaled by powers of two, without error.
        const float top = fmaxf(best[r], ceilf(highest));
        keep[r] = exp2_approx(best[r] - top);
        best[r] = top;
        const float scaled = exp2_approx(logit - top) * POOL_WEIGHT_SCALE;
        const __half upper = __float2half_rn(scaled);
        const __half lower = EXACT ? __float2half_rn(scaled - __half2float(upper)) : __float2half_rn(0.0f);
        // The weights as the adders see them, so that a common mean of the references stays exact.
        total[r] = fmaf(total[r], keep[r], __half2float(upper) + __half2float(lower));
        __half* const to = reinterpret_cast<__half*>(memory + L::OWN_WEIGHTS + r * 128);
        to[lane] = upper, to[POOL_TILE + lane] = lower;
      }
      __syncwarp();
      const uint32_t weights = base + L::WEIGHTS + s * POOL_ROWS * 128;
      static_assert(OWN == 4, "a lane sends 16 bytes of a row");
      const int r = lane / 8, chunk = lane % 8, row = rank * OWN + r;
      const uint4 v = *reinterpret_cast<const uint4*>(memory + L::OWN_WEIGHTS + r * 128 + chunk * 16);
      const int wide_row = row + chunk / 4 * POOL_ROWS;
      const uint32_t to = EXACT ? weights + wide_row * 64 + (((chunk ^ (wide_row / 2)) & 3) << 4)
                                : weights + row * 128 + ((chunk ^ (row & 7)) << 4);
#pragma unroll
      for (int peer = 0; peer < POOL_CLUSTER; ++peer)
        send(peer_address(to, peer), peer_address(weighed(s), peer), v);
      if (lane < POOL_CLUSTER) {
        const uint32_t keeps = base + L::KEEP + (s * POOL_ROWS + rank * OWN) * 4;
        send(peer_address(keeps, lane), peer_address(weighed(s), lane),
             make_uint4(__float_as_uint(keep[0]), __float_as_uint(keep[1]), __float_as_uint(keep[2]),
                        __float_as_uint(keep[3])));
      }
      __syncwarp();  // OWN_WEIGHTS is read above and overwritten next
      if (++in_segment == args.segment_tiles || i + 1 == count) {
#pragma unroll
        for (int own = 0; own < OWN; ++own) {
          double sum = total[own];
          for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
          if (lane == 0) {
            args.best[part(segment) * POOL_ROWS + rank * OWN + own] = best[own];
            args.total[part(segment) * POOL_ROWS + rank * OWN + own] = sum;
          }
          total[own] = 0;
        }
        ++segment, in_segment = 0;
      }
    }
  }

  // Four warps: a thread has the upper and lower halves of one row.
  __device__ void score(int warp, int lane) const {
    constexpr int OWN = L::OWN;
    const int g = lane / 4, t = lane % 4, row = 8 * warp + g;
    uint32_t y[POOL_SLICE / 16][4];
    const int64_t at = static_cast<int64_t>(row) * POOL_D + rank * POOL_SLICE + 2 * t;
#pragma unroll
    for (int k = 0; k < POOL_SLICE / 16; ++k) {
      y[k][0] = *reinterpret_cast<const uint32_t*>(args.upper + at + 16 * k);
      y[k][1] = *reinterpret_cast<const uint32_t*>(args.lower + at + 16 * k);
      y[k][2] = *reinterpret_cast<const uint32_t*>(args.upper + at + 16 * k + 8);
      y[k][3] = *reinterpret_cast<const uint32_t*>(args.lower + at + 16 * k + 8);
    }
    const uint32_t dots_to =
        peer_address(base + L::MAILS, row / OWN) + ((rank * (OWN + 1) + row % OWN) * POOL_TILE + 2 * t) * 4;
    const uint32_t dots_barrier = peer_address(base + L::MAILED, row / OWN);
    float acc0[16], acc1[16];
#pragma unroll
    for (int k = 0; k < 16; ++k) acc0[k] = acc1[k] = 0;
    for (int i = 0, s = 0, phase = 0; i < count; ++i, next(s, phase)) {
      wait_for_cluster(full(s), phase);
      const uint64_t b = rows_of_128_bytes(base + s * L::STAGE);
      float dots[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) dots[k] = 0;
      // A chain of 8 products, 128 of the slice: longer ones would lose digits (the units truncate).
      const auto chain = [&](float (&acc)[16], const int c) {
        start_products();
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const uint64_t box = b + (2 * c + k / 4) * (L::BOX >> 4) + 2 * (k % 4);
          if (k == 0) {
            product<0>(acc, y[8 * c + k], box);
          } else {
            product<1>(acc, y[8 * c + k], box);
          }
        }
        commit_products();
      };
      const auto gather = [&](const float (&acc)[16]) {  // upper and lower halves of y meet
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          dots[2 * k] += acc[4 * k] + acc[4 * k + 2];
          dots[2 * k + 1] += acc[4 * k + 1] + acc[4 * k + 3];
        }
      };
      chain(acc0, 0);
      chain(acc1, 1);
      wait_products<1>(acc0);
      gather(acc0);
      chain(acc0, 2);
      wait_products<1>(acc1);
      gather(acc1);
      chain(acc1, 3);
      wait_products<1>(acc0);
      gather(acc0);
      wait_products<0>(acc1);
      gather(acc1);
#pragma unroll
      for (int k = 0; k < 4; ++k)
        send(dots_to + s * L::MAIL + 32 * k, dots_barrier + 8 * s, dots[2 * k], dots[2 * k + 1]);
    }
  }

  // References of a stage that do not count may be NaN: their weights are 0, and 0 NaN is not. 128 threads.
  __device__ void clear_invalid(int s, int left, int thread) const {
    const int rows = POOL_TILE - left;
    for (int at = thread; at < L::BOXES * rows * 8; at += 128)
      *reinterpret_cast<uint4*>(memory + s * L::STAGE + at / (rows * 8) * L::BOX + left * 128 +
                                at % (rows * 8) * 16) = make_uint4(0, 0, 0, 0);
    fence_async();
    named_barrier(2, 128);
  }

  // Four warps: a thread has 2 elements of each box for 8 rows.
  __device__ void add(int warp, int lane) const {
    const int g = lane / 4, t = lane % 4;
    float sum[L::BOXES][16];
#pragma unroll
    for (int b = 0; b < L::BOXES; ++b)
#pragma unroll
      for (int k = 0; k < 16; ++k) sum[b][k] = 0;
    float acc0[COLUMNS], acc1[COLUMNS];
#pragma unroll
    for (int k = 0; k < COLUMNS; ++k) acc0[k] = acc1[k] = 0;
    int segment = 0, in_segment = 0;
    for (int i = 0, s = 0, phase = 0; i < count; ++i, next(s, phase)) {
      if (warp == 0 && lane == 0) arrive_expecting(weighed(s), POOL_ROWS * (128 + 4));
      wait_for_cluster(full(s), phase);
      wait_for_cluster(weighed(s), phase);
      const int64_t left = m - static_cast<int64_t>(begin + i) * POOL_TILE;
      if (left < POOL_TILE) clear_invalid(s, static_cast<int>(left), 32 * warp + lane);
      fence_async();
      const float* const keeps = reinterpret_cast<const float*>(memory + L::KEEP) + s * POOL_ROWS + 2 * t;
      float keep[8];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float2 pair = *reinterpret_cast<const float2*>(keeps + 8 * k);
        keep[2 * k] = pair.x, keep[2 * k + 1] = pair.y;
      }
      const uint32_t weights = base + L::WEIGHTS + s * POOL_ROWS * 128;
      const uint64_t a = rows_of_128_bytes(base + s * L::STAGE);
      const uint64_t w = EXACT ? rows_of_64_bytes(weights) : rows_of_128_bytes(weights);
      const auto multiply = [&](float (&acc)[COLUMNS], const int b) {
        const uint64_t box = a + b * (L::BOX >> 4);
        start_products();
        product_transposed<0>(acc, box, w);
        product_transposed<1>(acc, box + (2048 >> 4), w + 2);
        commit_products();
      };
      const auto join = [&](const float (&acc)[COLUMNS], float (&to)[16]) {
#pragma unroll
        for (int k = 0; k < 16; ++k)
          to[k] = fmaf(to[k], keep[k / 4 * 2 + k % 2], EXACT ? acc[k] + acc[COLUMNS - 16 + k] : acc[k]);
      };
      multiply(acc0, 0);
#pragma unroll
      for (int b = 0; b < L::BOXES; b += 2) {
        multiply(acc1, b + 1);
        wait_products<1>(acc0);
        join(acc0, sum[b]);
        if (b + 2 < L::BOXES) {
          multiply(acc0, b + 2);
          wait_products<1>(acc1);
        } else {
          wait_products<0>(acc1);
          if (lane == 0) arrive(empty(s));
        }
        join(acc1, sum[b + 1]);
      }
      if (++in_segment == args.segment_tiles || i + 1 == count) {
#pragma unroll
        for (int b = 0; b < L::BOXES; ++b) {
#pragma unroll
          for (int k = 0; k < 16; ++k) {
            const int row = k / 4 * 8 + 2 * t + k % 2;
            const int e = rank * POOL_SLICE + 64 * b + 16 * warp + g + k / 2 % 2 * 8;
            if (row < args.rows && e < args.d)
              args.sums[(part(segment) * POOL_ROWS + row) * args.d + e] = sum[b][k];
            sum[b][k] = 0;
          }
        }
        ++segment, in_segment = 0;
      }
    }
  }
};

#endif

template <bool EXACT>
__global__ void __launch_bounds__(POOL_THREADS, 1)
    pool_kernel(const PoolArgs args, const __grid_constant__ CUtensorMap map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = PoolLayout;
  extern __shared__ char raw[];
  char* const memory = raw + ((1024 - (shared_address(raw) & 1023)) & 1023);
  const int cluster = static_cast<int>(blockIdx.x / POOL_CLUSTER);
  const int clusters = static_cast<int>(gridDim.x / POOL_CLUSTER);
  const int64_t m = *args.valid, tiles = (m + POOL_TILE - 1) / POOL_TILE;
  const int begin = static_cast<int>(tiles * cluster / clusters);
  const int count = static_cast<int>(tiles * (cluster + 1) / clusters) - begin;
  const int rank = static_cast<int>(blockIdx.x % POOL_CLUSTER);
  const PoolBlock<EXACT> block{args, memory, shared_address(memory), m, begin, count, cluster, rank};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < POOL_STAGES; ++s) {
      init_barrier(block.full(s), 1);
      init_barrier(block.empty(s), 4);
      init_barrier(block.mailed(s), 1);
      init_barrier(block.weighed(s), 1);
    }
    publish_barriers();
  }
  for (int e = threadIdx.x; e < POOL_SLICE; e += POOL_THREADS)
    reinterpret_cast<float*>(memory + L::CENTRE)[e] = args.centre[rank * POOL_SLICE + e];
  __syncthreads();
  synchronize_cluster();

  if (warp < 4) {
    raise_registers<EXACT ? 208 : 216>();
    block.score(warp, lane);
  } else if (warp < 8) {
    raise_registers<EXACT ? 224 : 216>();
    block.add(warp - 4, lane);
  } else {
    drop_registers<72>();
    if (warp == 8) {
      if (lane == 0) block.produce(map);
    } else if (warp == 9) {
      block.weigh(lane);
    } else {
      block.take_norms(warp - 10, lane);
    }
    __syncwarp();
  }
  __syncthreads();
  synchronize_cluster();  // peers send to this block's memory until they are done
#endif
}

}  // namespace svel::cuda
