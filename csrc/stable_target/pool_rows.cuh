// Up to 32 rows against one pool of float16 references of up to 4,096 elements, each read once. A cluster of
// 8 blocks shares a sample: a block keeps its 512 elements of the rows and of their sums in registers, and
// tiles of 32 references pass through its shared memory. What a tile's weights need from all 8 blocks travels
// as mail. Roles, of warps:
//   scorers    4 warps: rows (upper and lower halves, 64) x references, products over the block's elements
//   adders     4 warps: rows (upper and lower halves of weights) x elements, the weighted sums
//   norms      4 warps: |r - c|^2 of the references, c a centre
//   weighers   2 warps: gather both from all blocks for 2 of the rows each, keep the running softmax, send
//              the weights to all adders
//   lister     keeps the best references of these 4 rows, for pool_best.cuh
//   producer   copies tiles, five in flight
// Rows come in the order of their noise, for where all weights have vanished, as most do in quiet rows, the
// adders leave a tile out.
//
// Rows are y = x - alpha c times a power of two and the row's rate, as the sum of two halves; products with
// references as stored are then exact to float32, and so are weights as two halves. The largest weight is 1,
// exactly, so a row with one neighbour gets that neighbour. Bytes: m d references.
//
// BANK: the pool is all that is valid in a class bank, for the rows of label -1 (PoolBank), and the grid's
// second dimension has passes of 32 rows each, as many as there may be.
#pragma once

#include <cuda_fp16.h>

#include <type_traits>

#include "common/cluster.cuh"
#include "common/planner_pool.h"
#include "common/wgmma.cuh"

namespace svel::cuda {

constexpr float POOL_NO_BEST = -3e38f;
constexpr float POOL_WEIGHT_SCALE = 32768.0f;  // weights are at most 1, and small ones keep their digits

struct PoolBest {  // a reference among the best of a row, and its logit as it was taken
  float logit;
  int reference;
};

// References first, ..., first + 31 of a class bank, one class behind the other: a bit for each that counts.
struct alignas(8) PoolTile {
  int first;
  uint32_t valid;
};

struct PoolBank {         // written by pool_null_kernel, but for `first`
  const PoolTile* tiles;  // those with a reference that counts, in their order
  const int* order;       // rows of label -1, in the order of their noise
  const int* sizes;       // two: rows, tiles
  int first;              // place in `order` from which on these are the rows
};
struct PoolNoBank {};
template <bool BANK>
using PoolBankIf = std::conditional_t<BANK, PoolBank, PoolNoBank>;

struct PoolArgs {
  const __half *upper, *lower;  // (POOL_ROWS, POOL_D) y, zeros beyond the rows and elements
  const float4* factors;        // (POOL_ROWS,) base-2 logit = x (dot - z) - y (norm - mean_norm), z = y.c
  const float* mean_norm;       // one: of some references
  const float* centre;          // (POOL_D,)
  const int64_t* valid;  // two: references that count (BANK: tiles), whether the centre is other than zero
  float* sums;           // (parts, POOL_ROWS, d) of scaled weights times references
  float* best;           // (parts, POOL_ROWS)
  double* total;         // (parts, POOL_ROWS) of scaled weights; zero before
  double* moment;        // (parts, POOL_ROWS) of scaled weights times (norm - mean_norm)
  PoolBest* list;        // (clusters, POOL_ROWS, POOL_LISTED), if exact: the best of a cluster's references
  int d, rows;
  int segments, segment_tiles;  // parts: clusters x segments

  // Of several passes what the kernel has written in `pass`.
  __device__ PoolArgs of_pass(int64_t pass, int64_t clusters) const {
    const int64_t before = pass * clusters * segments * POOL_ROWS;
    PoolArgs its = *this;
    its.sums += before * d, its.best += before, its.total += before, its.moment += before;
    its.list += pass * clusters * POOL_ROWS * POOL_LISTED;
    return its;
  }
};

// Shared memory of a block, in bytes from a multiple of 1024.
struct PoolLayout {
  static constexpr int BOXES = POOL_SLICE / 64, BOX = POOL_TILE * 128, STAGE = BOXES * BOX;
  static constexpr int OWN = POOL_ROWS / POOL_CLUSTER;  // rows that a block weighs
  static constexpr int MAIL =
      POOL_CLUSTER * (OWN + 1) * POOL_TILE * 4;        // by sender: OWN rows of dots, and norms
  static constexpr int WEIGHTS = POOL_STAGES * STAGE;  // per stage, see weight_place
  static constexpr int MAILS = WEIGHTS + POOL_STAGES * POOL_ROWS * 128;
  static constexpr int KEEP = MAILS + POOL_STAGES * MAIL;  // per stage and pair of rows: 2 factors, a flag,
                                                           // BANK: PoolTile::valid
  static constexpr int CENTRE = KEEP + POOL_STAGES * POOL_ROWS * 8;        // (POOL_SLICE,)
  static constexpr int OWN_WEIGHTS = CENTRE + POOL_SLICE * 4;              // (OWN, 128)
  static constexpr int LOGITS = OWN_WEIGHTS + OWN * 128;                   // per stage: (OWN, POOL_TILE)
  static constexpr int FULL = LOGITS + POOL_STAGES * OWN * POOL_TILE * 4;  // barriers, one per stage each:
  static constexpr int EMPTY = FULL + 8 * POOL_STAGES;
  static constexpr int MAILED = EMPTY + 8 * POOL_STAGES;
  static constexpr int WEIGHED = MAILED + 8 * POOL_STAGES;
  static constexpr int SCORED = WEIGHED + 8 * POOL_STAGES;
  static constexpr int COUNT = SCORED + 8 * POOL_STAGES;  // BANK: of the cluster's tiles
  static constexpr int BYTES = COUNT + 8;
};
static_assert(PoolLayout::BYTES + 1024 <= POOL_SMEM_BYTES, "the planner reserves less");

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Floats in their order as integers.
__device__ inline int ordered(float v) {
  const int bits = __float_as_int(v);
  return bits ^ (bits >> 31 & 0x7fffffff);
}
__device__ inline float from_ordered(int v) {
  return __int_as_float(v ^ (v >> 31 & 0x7fffffff));
}

// The best references that a warp has seen, one to a lane, in no order.
struct PoolList {
  PoolBest own;
  float least;  // the worst of them, the same in all lanes

  __device__ void clear() { own = {-INFINITY, 0}, least = -INFINITY; }
  // A tile's logits, reference `first` + lane. After the first tiles few of them are good enough.
  __device__ void take(float logit, int first, int lane, bool first_tile) {
    if (first_tile) {
      own = {logit, first + lane};
      least = from_ordered(__reduce_min_sync(0xffffffffu, ordered(logit)));
      return;
    }
    for (uint32_t better = __ballot_sync(0xffffffffu, logit > least); better; better &= better - 1) {
      const int from = __ffs(static_cast<int>(better)) - 1;
      const float candidate = __shfl_sync(0xffffffffu, logit, from);
      if (candidate <= least) continue;
      const uint32_t worst = __ballot_sync(0xffffffffu, own.logit == least);
      if (lane == __ffs(static_cast<int>(worst)) - 1) own = {candidate, first + from};
      least = from_ordered(__reduce_min_sync(0xffffffffu, ordered(own.logit)));
    }
  }
};

__device__ inline float exp2_approx(float v) {
  float out;
  asm("ex2.approx.f32 %0, %1;" : "=f"(out) : "f"(v));
  return out;
}

// EXACT: weights of two halves, twice as many columns of one product; else of one.
template <bool EXACT, bool BANK>
struct PoolBlock {
  using L = PoolLayout;

  const PoolArgs& args;
  char* memory;
  uint32_t base;             // its shared address
  int64_t m;                 // references that count, unless BANK
  int begin, count_for_all;  // tiles of this cluster
  int cluster, rank;         // of this block in the cluster
  const PoolBankIf<BANK>& bank;

  __device__ uint32_t full(int s) const { return base + L::FULL + 8 * s; }
  __device__ uint32_t empty(int s) const { return base + L::EMPTY + 8 * s; }
  __device__ uint32_t mailed(int s) const { return base + L::MAILED + 8 * s; }
  __device__ uint32_t weighed(int s) const { return base + L::WEIGHED + 8 * s; }
  __device__ uint32_t scored(int s) const { return base + L::SCORED + 8 * s; }
  __device__ static void next(int& s, int& phase) {
    if (++s == POOL_STAGES) s = 0, phase ^= 1;
  }
  // BANK: passes have what they read and write one behind the other. The last one is the first to get blocks.
  __device__ static int pass() { return static_cast<int>(gridDim.y - 1 - blockIdx.y); }
  __device__ static int row_of_pass() {
    static_assert(BANK, "there is one pass");
    return pass() * POOL_ROWS;
  }
  __device__ int place_of_cluster() const {
    if constexpr (BANK) return pass() * static_cast<int>(gridDim.x / POOL_CLUSTER) + cluster;
    return cluster;
  }
  __device__ int64_t part(int segment) const {
    if constexpr (BANK) return static_cast<int64_t>(place_of_cluster()) * args.segments + segment;
    return static_cast<int64_t>(cluster) * args.segments + segment;
  }

  // For a role to begin with: one register for all roles would be spilled by those that have the fewest.
  __device__ int own_count() const {
    return BANK ? static_cast<int>(load_shared(base + L::COUNT)) : count_for_all;
  }
  // BANK: tile i of this cluster. It is asked for a tile ahead, since it comes from memory.
  __device__ PoolTile tile_at(int i, int count) const {
    if constexpr (BANK) {
      if (i < count) {
        const int2 tile = __ldg(reinterpret_cast<const int2*>(bank.tiles + begin + i));
        return {tile.x, static_cast<uint32_t>(tile.y)};
      }
    }
    return {};
  }
  __device__ int first_of(const PoolTile& tile, int i) const {
    return BANK ? tile.first : (begin + i) * POOL_TILE;
  }

  // One thread.
  __device__ void produce(const CUtensorMap& map) const {
    const int count = own_count();
    PoolTile ahead = tile_at(0, count);
    for (int i = 0, s = 0, phase = 1; i < count; ++i, next(s, phase)) {
      const PoolTile tile = ahead;
      ahead = tile_at(i + 1, count);
      wait_barrier(empty(s), phase);
      arrive_expecting(full(s), L::STAGE);
#pragma unroll
      for (int b = 0; b < L::BOXES; ++b)
        tensor_copy(base + s * L::STAGE + b * L::BOX, map, rank * POOL_SLICE + 64 * b, first_of(tile, i),
                    full(s));
    }
  }

  // Four warps; lane = 16 bytes of a reference and of the fourth after it.
  template <bool CENTRED>
  __device__ void take_norms(int warp, int lane) const {
    const int count = own_count();
    constexpr int EACH = POOL_TILE / 16;
    const int chunk = lane % 8, r0 = 4 * EACH * warp + lane / 8;
    const float start = -*args.mean_norm / (POOL_CLUSTER * 8 * 2);
    const float4* const centre = reinterpret_cast<const float4*>(memory + L::CENTRE) + 2 * chunk;
    for (int i = 0, s = 0, phase = 0; i < count; ++i, next(s, phase)) {
      wait_barrier(full(s), phase);
      const char* const stage = memory + s * L::STAGE;
      float norms[EACH][2];  // of even and odd elements
#pragma unroll
      for (int q = 0; q < 2 * EACH; ++q) norms[q / 2][q % 2] = start;
#pragma unroll 4
      for (int b = 0; b < L::BOXES; ++b) {
        float c[8] = {};
        if (CENTRED) {
          const float4 low = centre[16 * b], high = centre[16 * b + 1];
          c[0] = low.x, c[1] = low.y, c[2] = low.z, c[3] = low.w;
          c[4] = high.x, c[5] = high.y, c[6] = high.z, c[7] = high.w;
        }
#pragma unroll
        for (int q = 0; q < EACH; ++q) {
          const int r = r0 + 4 * q;
          const uint4 v =
              *reinterpret_cast<const uint4*>(stage + b * L::BOX + r * 128 + ((chunk ^ (r & 7)) << 4));
          const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[k]));
            const float first = CENTRED ? pair.x - c[2 * k] : pair.x,
                        second = CENTRED ? pair.y - c[2 * k + 1] : pair.y;
            norms[q][0] = fmaf(first, first, norms[q][0]), norms[q][1] = fmaf(second, second, norms[q][1]);
          }
        }
      }
      float norm[EACH];
#pragma unroll
      for (int q = 0; q < EACH; ++q) norm[q] = norms[q][0] + norms[q][1];
#pragma unroll
      for (int q = 0; q < EACH; ++q) {
        for (int offset = 1; offset < 8; offset *= 2)
          norm[q] += __shfl_xor_sync(0xffffffffu, norm[q], offset);
        const uint32_t to =
            base + L::MAILS + s * L::MAIL + ((rank * (L::OWN + 1) + L::OWN) * POOL_TILE + r0 + 4 * q) * 4;
        send(peer_address(to, chunk), peer_address(mailed(s), chunk), norm[q]);
      }
    }
  }

  // Where 16 bytes of the weights of a row lie, chunks 0 to 3 of the upper halves and 4 to 7 of the lower:
  // groups of 8 rows, their upper halves and then their lower ones, 64 bytes each.
  __device__ static int weight_place(int row, int chunk) {
    const int wide_row = row / 8 * 16 + chunk / 4 * 8 + row % 8;
    return wide_row * 64 + (((chunk ^ (wide_row / 2)) & 3) << 4);
  }

  // Two warps, each for half of the block's rows; lane = reference.
  __device__ void weigh(int half, int lane) const {
    const int count = own_count();
    constexpr int OWN = L::OWN, PAIR = OWN / 2;
    static_assert(PAIR == 2, "a lane sends 16 bytes of a row to half of the peers");
    const int own_row = PAIR * half, first_row = rank * OWN + own_row;  // in the mail, and of all
    float best[PAIR], total[PAIR], moment[PAIR];
    float4 factor[PAIR];
    const float4* factors = args.factors;
    if constexpr (BANK) factors += row_of_pass();
#pragma unroll
    for (int r = 0; r < PAIR; ++r)
      best[r] = POOL_NO_BEST, total[r] = 0, moment[r] = 0, factor[r] = factors[first_row + r];
    int segment = 0, in_segment = 0;
    PoolTile ahead = tile_at(0, count);
    for (int i = 0, s = 0, phase = 0; i < count; ++i, next(s, phase)) {
      const PoolTile tile = ahead;
      ahead = tile_at(i + 1, count);
      if (half == 0 && lane == 0) arrive_expecting(mailed(s), L::MAIL);
      __syncwarp();
      wait_barrier(mailed(s), phase);
      const float* const mail = reinterpret_cast<const float*>(memory + L::MAILS + s * L::MAIL);
      const bool valid =
          BANK ? tile.valid >> lane & 1 : static_cast<int64_t>(begin + i) * POOL_TILE + lane < m;
      float norm = 0;
#pragma unroll
      for (int from = 0; from < POOL_CLUSTER; ++from)
        norm += mail[(from * (OWN + 1) + OWN) * POOL_TILE + lane];
      float keep[PAIR];
      uint32_t bits = 0;
#pragma unroll
      for (int r = 0; r < PAIR; ++r) {
        float dot = -factor[r].z;
#pragma unroll
        for (int from = 0; from < POOL_CLUSTER; ++from)
          dot += mail[(from * (OWN + 1) + own_row + r) * POOL_TILE + lane];
        const float logit = valid ? fmaf(factor[r].x, dot, -factor[r].y * norm) : -INFINITY;
        const float top = fmaxf(best[r], from_ordered(__reduce_max_sync(0xffffffffu, ordered(logit))));
        if (EXACT)
          reinterpret_cast<float*>(memory + L::LOGITS)[(s * OWN + own_row + r) * POOL_TILE + lane] = logit;
        keep[r] = exp2_approx(best[r] - top);
        best[r] = top;
        const float scaled = exp2_approx(logit - top) * POOL_WEIGHT_SCALE;
        const __half upper = __float2half_rn(scaled);
        const __half lower = EXACT ? __float2half_rn(scaled - __half2float(upper)) : __float2half_rn(0.0f);
        // The weights as the adders see them, so that a common mean of the references stays exact.
        const float seen = __half2float(upper) + __half2float(lower);
        total[r] = fmaf(total[r], keep[r], seen);
        if (EXACT) moment[r] = fmaf(moment[r], keep[r], valid ? seen * norm : 0.0f);
        bits |= __half_as_ushort(upper) | __half_as_ushort(lower);
        __half* const to = reinterpret_cast<__half*>(memory + L::OWN_WEIGHTS + (own_row + r) * 128);
        to[lane] = upper, to[POOL_TILE + lane] = lower;
      }
      const bool matters = __any_sync(0xffffffffu, bits);
      __syncwarp();
      if (EXACT && lane == 0) arrive(scored(s));
      const int r = lane / 8 % PAIR, chunk = lane % 8;
      const uint4 v =
          *reinterpret_cast<const uint4*>(memory + L::OWN_WEIGHTS + (own_row + r) * 128 + chunk * 16);
      const uint32_t to = base + L::WEIGHTS + s * POOL_ROWS * 128 + weight_place(first_row + r, chunk);
      if (EXACT || chunk < 4) {
#pragma unroll
        for (int k = 0; k < POOL_CLUSTER / 2; ++k) {
          const int peer = 2 * k + lane / 16;
          send(peer_address(to, peer), peer_address(weighed(s), peer), v);
        }
      }
      if (lane < POOL_CLUSTER) {
        const uint32_t keeps = base + L::KEEP + (s * POOL_ROWS + first_row) * 8;
        send(peer_address(keeps, lane), peer_address(weighed(s), lane),
             make_uint4(__float_as_uint(keep[0]), __float_as_uint(keep[1]), matters, tile.valid));
      }
      __syncwarp();  // OWN_WEIGHTS is read above and overwritten next
      if (++in_segment == args.segment_tiles || i + 1 == count) {
#pragma unroll
        for (int own = 0; own < PAIR; ++own) {
          double sum = total[own], with_norm = moment[own];
          for (int offset = 16; offset > 0; offset /= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, offset);
            with_norm += __shfl_xor_sync(0xffffffffu, with_norm, offset);
          }
          if (lane == 0) {
            const int64_t at = part(segment) * POOL_ROWS + first_row + own;
            args.best[at] = best[own], args.total[at] = sum, args.moment[at] = with_norm;
          }
          total[own] = 0, moment[own] = 0;
        }
        ++segment, in_segment = 0;
      }
    }
  }

  // One warp. What it is slow to take holds up the stage and thereby, a ring later, the weighers.
  __device__ void list_best(int lane) const {
    const int count = own_count();
    constexpr int OWN = L::OWN;
    PoolList list[OWN];
#pragma unroll
    for (int r = 0; r < OWN; ++r) list[r].clear();
    PoolTile ahead = tile_at(0, count);
    for (int i = 0, s = 0, phase = 0; i < count; ++i, next(s, phase)) {
      const PoolTile tile = ahead;
      ahead = tile_at(i + 1, count);
      wait_barrier(scored(s), phase);
      float logits[OWN];
#pragma unroll
      for (int r = 0; r < OWN; ++r)
        logits[r] = reinterpret_cast<const float*>(memory + L::LOGITS)[(s * OWN + r) * POOL_TILE + lane];
      __syncwarp();
      if (lane == 0) arrive(empty(s));
#pragma unroll
      for (int r = 0; r < OWN; ++r) list[r].take(logits[r], first_of(tile, i), lane, i == 0);
    }
#pragma unroll
    for (int r = 0; r < OWN; ++r)
      args.list[(place_of_cluster() * POOL_ROWS + rank * OWN + r) * POOL_LISTED + lane] = list[r].own;
  }

  // Four warps: a thread has the upper and lower halves of one row.
  __device__ void score(int warp, int lane) const {
    const int count = own_count();
    constexpr int OWN = L::OWN;
    const int g = lane / 4, t = lane % 4, row = 8 * warp + g;
    uint32_t y[POOL_SLICE / 16][4];
    int64_t at = static_cast<int64_t>(row) * POOL_D + rank * POOL_SLICE + 2 * t;
    if constexpr (BANK) at += static_cast<int64_t>(row_of_pass()) * POOL_D;
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
      wait_barrier(full(s), phase);
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
  // The same of those whose bits are not set. What could be made ready ahead would take registers of the
  // sums.
  __device__ void clear_others(int s, uint32_t valid, int thread) const {
    static_assert(POOL_TILE == 32 && L::BOX == 2 * 128 * 16, "a thread clears 16 bytes of two references");
    int row = thread / 8;
    asm volatile("" : "+r"(row));
    uint4* const to = reinterpret_cast<uint4*>(memory + s * L::STAGE) + thread;
#pragma unroll
    for (int b = 0; b < L::BOXES; ++b) {
      if (!(valid >> row & 1)) to[256 * b] = make_uint4(0, 0, 0, 0);
      if (!(valid >> (row + 16) & 1)) to[256 * b + 128] = make_uint4(0, 0, 0, 0);
    }
    fence_async();
    named_barrier(2, 128);
  }

  // Four warps: a thread has 2 of 8 elements for one row.
  __device__ void add(int warp, int lane) const {
    const int count = own_count();
    const int g = lane / 4, t = lane % 4, row = 8 * warp + g;
    // Of the weights, as load_matrices wants them: halves of a row, chunks of 8 references.
    const int wide_row = 16 * warp + lane % 16;
    const uint32_t weights_of_lane = wide_row * 64 + (((lane / 16) ^ (wide_row / 2)) & 3) * 16;
    const uint32_t keep_of_lane = row / 2 * 16 + row % 2 * 4, flag_of_lane = lane % 16 * 16 + 8;
    const int tail = static_cast<int>(
        min(m - static_cast<int64_t>(begin) * POOL_TILE - static_cast<int64_t>(count - 1) * POOL_TILE,
            static_cast<int64_t>(POOL_TILE)));  // references of the last tile
    float sum[L::BOXES][16];
#pragma unroll
    for (int b = 0; b < L::BOXES; ++b)
#pragma unroll
      for (int k = 0; k < 16; ++k) sum[b][k] = 0;
    int segment = 0, in_segment = 0;
    for (int i = 0, s = 0, phase = 0; i < count; ++i, next(s, phase)) {
      if (warp == 0 && lane == 0) arrive_expecting(weighed(s), POOL_ROWS * ((EXACT ? 128 : 64) + 8));
      wait_barrier(full(s), phase);
      wait_barrier(weighed(s), phase);
      if (!BANK && tail < POOL_TILE && i + 1 == count) clear_invalid(s, tail, 32 * warp + lane);
      // Where no weight matters factors are 1. All four warps find the same.
      if (__any_sync(0xffffffffu, load_shared(base + L::KEEP + s * POOL_ROWS * 8 + flag_of_lane))) {
        if (BANK) {
          const uint32_t valid = load_shared(base + L::KEEP + s * POOL_ROWS * 8 + 12);
          if (valid != ~0u) clear_others(s, valid, 32 * warp + lane);
        }
        const float keep = __uint_as_float(load_shared(base + L::KEEP + s * POOL_ROWS * 8 + keep_of_lane));
        uint32_t weights[POOL_TILE / 16][4];
        const uint32_t from = base + L::WEIGHTS + s * POOL_ROWS * 128 + weights_of_lane;
#pragma unroll
        for (int k = 0; k < POOL_TILE / 16; ++k) load_matrices(from ^ (32 * k), weights[k]);
        const uint64_t tile = rows_of_128_bytes(base + s * L::STAGE);
        float acc[2][32];
        const auto multiply = [&](float (&made)[32], const int b) {
          const uint64_t box = tile + b * (L::BOX >> 4);
          start_products();
          product<0, 1>(made, weights[0], box);
          product<1, 1>(made, weights[1], box + (2048 >> 4));
          commit_products();
        };
        const auto gather = [&](const float (&made)[32], float (&to)[16]) {
#pragma unroll
          for (int k = 0; k < 8; ++k)
#pragma unroll
            for (int p = 0; p < 2; ++p) {
              const float some = EXACT ? made[4 * k + p] + made[4 * k + 2 + p] : made[4 * k + p];
              to[2 * k + p] = fmaf(to[2 * k + p], keep, some);
            }
        };
        multiply(acc[0], 0);
#pragma unroll
        for (int b = 0; b < L::BOXES; ++b) {
          if (b + 1 < L::BOXES) {
            multiply(acc[(b + 1) % 2], b + 1);
            wait_products<1>(acc[b % 2]);
          } else {
            wait_products<0>(acc[b % 2]);
          }
          gather(acc[b % 2], sum[b]);
        }
      }
      __syncwarp();
      if (lane == 0) arrive(empty(s));
      if (++in_segment == args.segment_tiles || i + 1 == count) {
        int rows = args.rows;
        if constexpr (BANK) rows = *bank.sizes - bank.first - row_of_pass();
        const int first = rank * POOL_SLICE + 2 * t, left = row < rows ? args.d - first : 0;
        float* const to = args.sums + (part(segment) * POOL_ROWS + row) * args.d + first;
#pragma unroll
        for (int b = 0; b < L::BOXES; ++b) {
#pragma unroll
          for (int k = 0; k < 8; ++k) {
            if (64 * b + 8 * k < left)
              *reinterpret_cast<float2*>(to + 64 * b + 8 * k) = make_float2(sum[b][2 * k], sum[b][2 * k + 1]);
            sum[b][2 * k] = sum[b][2 * k + 1] = 0;
          }
        }
        ++segment, in_segment = 0;
      }
    }
  }
};

#endif

template <bool EXACT, bool BANK>
__global__ void __launch_bounds__(POOL_THREADS, 1)
    pool_kernel(const PoolArgs args, const __grid_constant__ CUtensorMap map, const PoolBankIf<BANK> bank) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = PoolLayout;
  extern __shared__ char raw[];
  char* const memory = raw + ((1024 - (shared_address(raw) & 1023)) & 1023);
  const int cluster = static_cast<int>(blockIdx.x / POOL_CLUSTER);
  const int clusters = static_cast<int>(gridDim.x / POOL_CLUSTER);
  if constexpr (BANK) {
    // Passes without rows go before the others have begun. The first one waits even so, or what follows could
    // overtake what came before.
    const int pass = PoolBlock<EXACT, BANK>::pass();
    const bool is_empty = *bank.sizes <= bank.first + pass * POOL_ROWS;
    if (is_empty && pass > 0) return;
    wait_for_previous_launch();
    if (is_empty) return;
  } else {
    wait_for_previous_launch();
  }
  const int64_t m = *args.valid, tiles = BANK ? m : (m + POOL_TILE - 1) / POOL_TILE;
  const int begin = static_cast<int>(tiles * cluster / clusters);
  const int count = static_cast<int>(tiles * (cluster + 1) / clusters) - begin;
  const int rank = static_cast<int>(blockIdx.x % POOL_CLUSTER);
  const PoolBlock<EXACT, BANK> block{args, memory, shared_address(memory), m, begin, count, cluster,
                                     rank, bank};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    if (BANK) *reinterpret_cast<int*>(memory + L::COUNT) = count;
    for (int s = 0; s < POOL_STAGES; ++s) {
      init_barrier(block.full(s), 1);
      init_barrier(block.empty(s), EXACT ? 5 : 4);
      init_barrier(block.mailed(s), 1);
      init_barrier(block.weighed(s), 1);
      init_barrier(block.scored(s), 2);
    }
    publish_barriers();
  }
  for (int e = threadIdx.x; e < POOL_SLICE; e += POOL_THREADS)
    reinterpret_cast<float*>(memory + L::CENTRE)[e] = args.centre[rank * POOL_SLICE + e];
  // If not exact there are no lower halves of weights, ever.
  for (int at = threadIdx.x; at < POOL_STAGES * POOL_ROWS * 8; at += POOL_THREADS)
    reinterpret_cast<uint4*>(memory + L::WEIGHTS)[at] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  synchronize_cluster();

  if (warp < 4) {
    take_registers<192>();
    block.score(warp, lane);
  } else if (warp < 8) {
    take_registers<216>();
    block.add(warp - 4, lane);
  } else if (warp < 12) {
    give_up_registers<48>();
    if (args.valid[1]) {
      block.template take_norms<true>(warp - 8, lane);
    } else {
      block.template take_norms<false>(warp - 8, lane);
    }
  } else {
    give_up_registers<56>();
    if (warp < 14) {
      block.weigh(warp - 12, lane);
    } else if (warp == 14 && lane == 0) {
      block.produce(map);
    } else if (EXACT && warp == 15) {
      block.list_best(lane);
    }
    __syncwarp();
  }
  allow_next_launch();
  __syncthreads();
  synchronize_cluster();  // peers send to this block's memory until they are done
#endif
}

}  // namespace svel::cuda
