// Larger small sets on Hopper's matrix units: a pool of float16 or bfloat16 references that shared memories
// do not hold, beside some rows. Scores, weights and near ties are those of held_cuda.cu, with slices of
// samples that no block keeps. One cooperative launch:
//
//  * y = x - alpha c, c the first reference, in parts of T, to memory
//  * when all have: scores. A unit is a tile of rows, one of references and a slice of samples: its shares of
//    y.r_j - alpha/2 |d_j|^2, d_j = r_j - c, to memory
//  * when all have: weights. Rows in which the rounding of shares would be seen name references of weight
//  * if there are any, when all have: these are scored in float64, four of a row at a time by a block;
//    when all have: the weights of their rows
//  * when all have: sums. A unit is a tile of rows and one of D, over all references: results
//
// Units are dealt out to the blocks in turn, those of the same references together, so that these come from
// memory once in each pass; sums begin with what scores ended with, which the L2 still has. Stages of a ring
// are filled two steps ahead by a thread of the first warp. A step is 64 elements of 256 references, or 64
// references of 256 elements, beside parts of all rows of the tile; each group of four warps has a quarter.
// FAST: a part of the weights less, so that a tile of sums has more rows, which the matrix units add up by
// themselves.
#include <algorithm>
#include <type_traits>

#include "common/cluster.cuh"
#include "common/planner_swept.h"
#include "common/tensor_map.cuh"
#include "common/wgmma.cuh"
#include "stable_target/held_weigh.cuh"
#include "stable_target/launch.cuh"

namespace svel::cuda {
namespace {

constexpr int STAGES = static_cast<int>(SWEPT_STAGES), AHEAD = 2;  // steps that are filled beside one
static_assert(AHEAD < STAGES);
constexpr int STEP = static_cast<int>(SWEPT_BOX), TILE = static_cast<int>(SWEPT_TILE);
constexpr int LINE_BYTES = 2 * STEP, BOX = STEP * LINE_BYTES, REFS = GROUPS * BOX;
static_assert(LINE_BYTES == 128 && TILE == GROUPS * STEP);
constexpr int REVIEWED = 4;  // references of a row that a block scores again at a time

struct Review {             // of a row
  double top, total, near;  // references above `near` are scored again, and the best
  float wrong;              // see Weigher; below zero: nothing is scored again
  int best;                 // reference
};
static_assert(sizeof(Review) == 32);
struct ReviewGroup {
  int row, refs[REVIEWED];  // -1: none
  int unused[3];
};
static_assert(sizeof(ReviewGroup) == 32);

struct SweptCut {
  int64_t chunks, slice, slices;
};

struct Swept {
  // As of Held. By emulation (8,192 elements in slices of 384, 1,024 and 2,048) scores are off by 5e-8 of the
  // largest terms, median of rows, whatever the slice; 1e-7 far from the origin.
  static constexpr float ROUNDING = 1.2e-7f;
  static constexpr int WEIGHTS = STEP;

  CUtensorMap refs;          // (m, d), boxes of STEP x STEP
  CUtensorMap y_parts;       // (parts n, elements), boxes of a tile's rows x STEP
  CUtensorMap weight_parts;  // (parts n, stride), boxes of SUM_BOX x STEP
  SweptCut cut;
  int64_t stride;       // references, padded
  int64_t elements;     // of y, padded
  int64_t rows_padded;  // of `unscales`
  int padded;
  void* queries;     // (parts, n, elements)
  float* unscales;   // (elements / STEP, rows_padded)
  float* scores;     // (n, slices, stride)
  double* exact;     // (n, stride) scores
  double* reviewed;  // (n, stride) |x - alpha r|^2
  ReviewGroup* groups;
  void* weights;          // (parts, n, stride)
  double2* ends;          // (n,) out = x sum w_j r_j + y x
  Review* reviews;        // (n,)
  float* scales;          // (n, chunks, slices) the largest terms of shares
  int* counter;           // of groups
  const double* centres;  // of rows of several classes, which there are none of
  float rounding;         // as of Held
};

struct Unit {
  int rows, tile, slice, steps;  // tiles of rows, of references or of D
};
struct Feed {  // what comes into the ring next
  int unit, step, at;
  Unit now;
};

struct SweptShared {
  Barrier full[STAGES], empty[STAGES];
  Feed feed;
  alignas(16) float unscale[STAGES][64];  // of a stage's rows
  alignas(16) uint16_t centre[STAGES][STEP];
  float norms[2][TILE];  // of a unit, of one after the other
  int list[GROUPS][LISTED];
  int class_counts[1], team_counts[SWEPT_MOST_REFS / SWEPT_TILE];
  double scratch[GROUPS][GROUP_WARPS];
  int counts[GROUPS][GROUP_WARPS];
  double squares[WARPS][REVIEWED];
  RowFacts facts[GROUPS];
  int place[GROUPS];
};
static_assert(sizeof(SweptShared) <= SWEPT_FIXED_SMEM);

// What blocks know of all rows of the pass; ends: of Swept, when all have been weighed.
struct SweptRows {
  double2* ends;
  float *high, *rest;  // alpha in float32, and what that drops
  float* half_alpha;   // with the sign of x, see Row

  __device__ SweptRows(char* memory, int64_t n)
      : ends(reinterpret_cast<double2*>(memory)),
        high(reinterpret_cast<float*>(memory)),
        rest(high + n),
        half_alpha(rest + n) {}
};
static_assert(sizeof(double2) == SWEPT_ROW_SMEM && sizeof(double2) >= 3 * sizeof(float));

// USUAL: x and out are float32, aligned to 16 bytes.
template <typename T, bool USUAL, bool FAST>
struct SweptKernel {
  static constexpr int PARTS = Split<T>::PARTS, ROWS = static_cast<int>(swept_rows(PARTS == 3));
  // Weights come in copies of SUM_BOX rows: one for each part or, of one part, one or two for a tile.
  static constexpr int OF_WEIGHT = WEIGHT_PARTS<T, FAST>;
  static constexpr int SUM_BOX = static_cast<int>(swept_sum_box(PARTS == 3, FAST));
  static constexpr int MOST_SUM_ROWS = PARTS * ROWS / OF_WEIGHT;
  static constexpr int SUMS = ROWS / 2, PAIRS = ROWS / 8;  // of a thread, see wgmma.cuh
  static constexpr int STAGE = REFS + PARTS * ROWS * LINE_BYTES;
  static_assert(STAGE == swept_stage(PARTS == 3));
  using Acc = float[PARTS * SUMS];

  const Inputs& in;
  const Swept& set;
  SweptShared& shared;
  const SweptRows rows;
  char* const ring;
  const int tid = threadIdx.x, lane = tid % 32, warp = __shfl_sync(0xffffffffu, tid / 32, 0);
  const int crew = warp / GROUP_WARPS;
  const int n = static_cast<int>(in.n), d = static_cast<int>(in.d),
            valid = static_cast<int>(valid_count(in, 0));
  const int slice = static_cast<int>(set.cut.slice), slices = static_cast<int>(set.cut.slices);
  const int row_tiles = (n + ROWS - 1) / ROWS, ref_tiles = (valid + TILE - 1) / TILE,
            d_tiles = (d + TILE - 1) / TILE;
  int at = 0;  // steps that this block has taken

  // ---- units and the ring

  // Rows of a tile; of sums half as many where there are blocks for all.
  template <bool SUM>
  __device__ __forceinline__ int tall() const {
    if (!SUM || !FAST) return ROWS;
    const bool halved =
        OF_WEIGHT == 1 && d_tiles * ((n + SUM_BOX - 1) / SUM_BOX) <= static_cast<int>(gridDim.x);
    return halved ? SUM_BOX : MOST_SUM_ROWS;
  }
  template <bool SUM>
  __device__ __forceinline__ int tiles_of() const {
    return SUM && FAST ? (n + tall<true>() - 1) / tall<true>() : row_tiles;
  }
  template <bool SUM>
  __device__ __forceinline__ int units() const {
    return valid == 0 ? 0 : tiles_of<SUM>() * (SUM ? d_tiles : ref_tiles * slices);
  }
  template <bool SUM>
  __device__ __forceinline__ Unit unit_of(int number) const {
    const int tiles = tiles_of<SUM>(), rest = number / tiles;
    Unit unit;
    unit.rows = number - rest * tiles;
    if (SUM) {
      unit.tile = d_tiles - 1 - rest, unit.slice = 0;
      unit.steps = (valid + STEP - 1) / STEP;
    } else {
      unit.slice = rest / ref_tiles, unit.tile = rest - unit.slice * ref_tiles;
      unit.steps = (min(slice, d - unit.slice * slice) + STEP - 1) / STEP;
    }
    return unit;
  }
  template <bool SUM>
  __device__ __forceinline__ void advance(Feed& feed) const {
    ++feed.at;
    if (++feed.step < feed.now.steps) return;
    feed.step = 0, feed.unit += static_cast<int>(gridDim.x);
    if (feed.unit < units<SUM>()) feed.now = unit_of<SUM>(feed.unit);
  }

  // Copies of weights of one part.
  __device__ __forceinline__ int copies_of(const Unit& unit) const {
    return (min(tall<true>(), n - unit.rows * tall<true>()) + SUM_BOX - 1) / SUM_BOX;
  }

  // References of a stage, when it is free, and of scores their centre; by one thread.
  template <bool SUM>
  __device__ __forceinline__ void load_refs(const Feed& feed) const {
    const int slot = feed.at % STAGES;
    Barrier* const full = &shared.full[slot];
    wait_barrier(&shared.empty[slot], (feed.at / STAGES & 1) ^ 1);
    const int first = feed.now.tile * TILE, column = SUM ? 0 : feed.now.slice * slice + feed.step * STEP;
    const int boxes = min(GROUPS, ((SUM ? d : valid) - first + STEP - 1) / STEP);
    const int of_centre = 2 * min(STEP, d - column);
    if constexpr (SUM && OF_WEIGHT == 1) {
      arrive_expecting(full, boxes * BOX + copies_of(feed.now) * SUM_BOX * LINE_BYTES);
    } else {
      arrive_expecting(full, boxes * BOX + PARTS * ROWS * LINE_BYTES + (SUM ? 0 : of_centre + 4 * ROWS));
    }
    const uint32_t to = shared_address(ring + slot * STAGE);
    for (int box = 0; box < boxes; ++box) {
      const int along = first + box * STEP;
      tensor_copy(to + box * BOX, set.refs, SUM ? along : column, SUM ? feed.step * STEP : along,
                  shared_address(full));
    }
    if (!SUM)
      bulk_copy(shared.centre[slot], static_cast<const T*>(in.refs.data) + column, of_centre, full,
                usual_policy());
  }
  // The rows' parts, and of scores what their y is to be multiplied with.
  template <bool SUM>
  __device__ __forceinline__ void load_rows(const Feed& feed) const {
    const int slot = feed.at % STAGES, first = feed.now.rows * ROWS;
    Barrier* const full = &shared.full[slot];
    const int column = SUM ? feed.step * STEP : feed.now.slice * slice + feed.step * STEP;
    const uint32_t to = shared_address(ring + slot * STAGE + REFS);
    if constexpr (SUM && FAST) {
      const int copies = OF_WEIGHT > 1 ? OF_WEIGHT : copies_of(feed.now);
      for (int i = 0; i < copies; ++i)
        tensor_copy(to + i * SUM_BOX * LINE_BYTES, set.weight_parts, column,
                    feed.now.rows * tall<true>() + i * (OF_WEIGHT > 1 ? n : SUM_BOX), shared_address(full));
    } else {
      for (int p = 0; p < PARTS; ++p)
        tensor_copy(to + p * ROWS * LINE_BYTES, SUM ? set.weight_parts : set.y_parts, column, p * n + first,
                    shared_address(full));
    }
    if (!SUM)
      bulk_copy(shared.unscale[slot], set.unscales + int64_t{column / STEP} * set.rows_padded + first,
                4 * ROWS, full, usual_policy());
  }

  // The first steps' references, before rows are there, and these.
  template <bool SUM, typename Load>
  __device__ __forceinline__ Feed begin(const Load& load) const {
    Feed feed{static_cast<int>(blockIdx.x), 0, at, {}};
    if (feed.unit < units<SUM>()) feed.now = unit_of<SUM>(feed.unit);
#pragma unroll 1
    for (int i = 0; i < AHEAD && feed.unit < units<SUM>(); ++i) load(feed), advance<SUM>(feed);
    return feed;
  }
  template <bool SUM>
  __device__ __forceinline__ void begin_refs() const {
    if (tid == 0) shared.feed = begin<SUM>([&](const Feed& feed) { load_refs<SUM>(feed); });
  }
  template <bool SUM>
  __device__ __forceinline__ void begin_rows() const {
    if (tid == 0) begin<SUM>([&](const Feed& feed) { load_rows<SUM>(feed); });
  }
  // One step more; then until the present one is there.
  template <bool SUM>
  __device__ __forceinline__ void take_step() {
    if (tid == 0 && shared.feed.unit < units<SUM>()) {
      Feed& feed = shared.feed;
      load_refs<SUM>(feed), load_rows<SUM>(feed), advance<SUM>(feed);
    }
    wait_barrier(&shared.full[at % STAGES], at / STAGES & 1);
    __syncwarp();
  }
  __device__ __forceinline__ void leave_step() {
    __syncwarp();
    if (lane == 0) arrive(&shared.empty[at % STAGES]);
    ++at;
  }

  __device__ __forceinline__ void wait_for_crew() const { named_barrier(1 + crew, GROUP); }

  // acc = (ADDS ? acc : 0) + a b^T over COUNT steps of 16, a's given as columns or not and A_STEP apart;
  // under way, and until it has ended.
  template <int COUNT, int COLUMNS, int ADDS = 0, int A_STEP = 2, int SIZE>
  __device__ __forceinline__ static void begin_products(float (&acc)[SIZE], uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    const auto multiply = [&](auto adds, int k) {
      constexpr int ADD = decltype(adds)::value;
      if constexpr (PARTS == 2) {
        product_shared<ADD, COLUMNS>(acc, a + A_STEP * k, b + 2 * k);
      } else {
        product_shared_bf16<ADD, COLUMNS>(acc, a + A_STEP * k, b + 2 * k);
      }
    };
    start_products();
    multiply(std::integral_constant<int, ADDS>{}, 0);
#pragma unroll
    for (int k = 1; k < COUNT; ++k) multiply(std::integral_constant<int, 1>{}, k);
    commit_products();
#endif
  }
  template <int SIZE>
  __device__ __forceinline__ static void end_products(float (&acc)[SIZE]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    wait_products<0>(acc);
#endif
  }
  __device__ __forceinline__ static void end_products_before() {  // all but the last ones
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    wait_products<1>();
#endif
  }
  __device__ __forceinline__ static float of_parts(const Acc& acc, int i) {  // the smallest first
    float sum = acc[(PARTS - 1) * SUMS + i];
#pragma unroll
    for (int p = PARTS - 2; p >= 0; --p) sum += acc[p * SUMS + i];
    return sum;
  }

  // ---- y

  __device__ __forceinline__ void know_rows() {
#pragma unroll 1
    for (int index = tid; index < n; index += HELD_THREADS) {
      const RowFacts facts = know_row(in, index);
      // The first row that each group of warps is to weigh.
#pragma unroll
      for (int g = 0; g < GROUPS; ++g)
        if (index == static_cast<int>(blockIdx.x + gridDim.x * g)) shared.facts[g] = facts;
      const float high = static_cast<float>(facts.row.alpha);
      rows.high[index] = high, rows.rest[index] = static_cast<float>(facts.row.alpha - high);
      rows.half_alpha[index] = copysignf(0.5f * high, static_cast<float>(facts.row.sign));
    }
    if (tid < ref_tiles) shared.team_counts[tid] = min(TILE, valid - tid * TILE);
    if (tid >= ref_tiles && tid < set.cut.chunks) shared.team_counts[tid] = 0;
    if (tid == 0) shared.class_counts[0] = valid;
  }

  // A warp takes 128 elements of eight rows; of 64 elements y is scaled by a power of two.
  __device__ __forceinline__ void prepare_rows() const {
    constexpr int EACH = 8;
    const int wide = (static_cast<int>(set.elements) + 127) / 128, tasks = wide * ((n + EACH - 1) / EACH);
#pragma unroll 1
    for (int task = static_cast<int>(blockIdx.x) * WARPS + warp; task < tasks;
         task += static_cast<int>(gridDim.x) * WARPS) {
      const int first = task / wide * EACH, e = (task - task / wide * wide) * 128 + 4 * lane;
      const int64_t base = int64_t{first} * d + e;
      float4 x[EACH];
#pragma unroll
      for (int k = 0; k < EACH; ++k) {
        x[k] = make_float4(0, 0, 0, 0);
        if (first + k >= n || e >= d) continue;
        const int64_t from = base + int64_t{k} * d;
        x[k] = USUAL ? *reinterpret_cast<const float4*>(static_cast<const float*>(in.x.data) + from)
                     : load_four(in.x, from, base + int64_t{k + 1} * d - e);
      }
      float c[4] = {};
      if (e < d) {
        const uint2 raw = *reinterpret_cast<const uint2*>(static_cast<const T*>(in.refs.data) + e);
        const T* const its = reinterpret_cast<const T*>(&raw);
#pragma unroll
        for (int q = 0; q < 4; ++q) c[q] = to_float(its[q]);
      }
#pragma unroll
      for (int k = 0; k < EACH; ++k) {
        const int row = first + k;
        if (row >= n) break;
        const float high = rows.high[row], rest = rows.rest[row], sign = copysignf(1, rows.half_alpha[row]);
        const float own[4] = {x[k].x, x[k].y, x[k].z, x[k].w};
        float y[4], most = 0, scale = 1;
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          y[q] = fmaf(-rest, c[q], fmaf(-high, c[q], sign * own[q]));
          most = fmaxf(most, fabsf(y[q]));
        }
#pragma unroll
        for (int hop = 8; hop > 0; hop /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, hop));
        if (most > 0 && most < 1e30f) {
          const int exponent = static_cast<int>(__float_as_uint(most) >> 23) - 127;  // of a normal number
          scale = __int_as_float((127 + min(12 - exponent, 120)) << 23);
        }
        if (e >= set.elements) continue;
        T* to = static_cast<T*>(set.queries) + row * set.elements + e;
#pragma unroll
        for (int q = 0; q < 4; ++q) y[q] *= scale;
#pragma unroll
        for (int p = 0; p < PARTS; ++p) {
          T part[4];
#pragma unroll
          for (int q = 0; q < 4; ++q) part[q] = Split<T>::nearest(y[q]), y[q] -= to_float(part[q]);
          *reinterpret_cast<uint2*>(to) = make_uint2(pair_of(part[0], part[1]), pair_of(part[2], part[3]));
          to += n * set.elements;
        }
        if (lane % 16 == 0) set.unscales[e / STEP * set.rows_padded + row] = 1 / scale;
      }
    }
    // The largest terms, to be found.
    const int64_t scales = int64_t{n} * set.cut.chunks * slices;
    for (int64_t i = int64_t{blockIdx.x} * HELD_THREADS + tid; i < scales;
         i += int64_t{gridDim.x} * HELD_THREADS)
      set.scales[i] = 0;
    if (blockIdx.x == 0 && tid == 0) *set.counter = 0;
  }

  // ---- scores

  // Of this thread's 16 bytes of every sixteenth reference of the group's.
  __device__ __forceinline__ void add_norms(const char* refs, int slot, int left, float (&squares)[4]) const {
    const int chunk = tid % 8, first = tid % GROUP / 8;
    if (8 * chunk >= left) return;  // beyond the sample, where copies bring no centre
    const uint4 raw = *reinterpret_cast<const uint4*>(shared.centre[slot] + 8 * chunk);
    const T* const own = reinterpret_cast<const T*>(&raw);
    float c[8];
#pragma unroll
    for (int q = 0; q < 8; ++q) c[q] = to_float(own[q]);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint4 its = *reinterpret_cast<const uint4*>(refs + chunk_address(0, first + 16 * k, chunk));
      const T* const r = reinterpret_cast<const T*>(&its);
      float eight = 0;
#pragma unroll
      for (int q = 0; q < 8; ++q) {
        const float apart = to_float(r[q]) - c[q];
        eight = fmaf(apart, apart, eight);
      }
      squares[k] += eight;
    }
  }

  __device__ __forceinline__ void score_rows() {
    const int mine = warp % GROUP_WARPS * 16 + lane / 4, pair = lane % 4 * 2;
    const uint64_t stages = rows_of_128_bytes(shared_address(ring));
    int turn = 0;
#pragma unroll 1
    for (int number = static_cast<int>(blockIdx.x); number < units<false>();
         number += static_cast<int>(gridDim.x), turn ^= 1) {
      const Unit unit = unit_of<false>(number);
      const int first = unit.tile * TILE + crew * STEP;
      const bool has_refs = first < valid;
      float sums[SUMS] = {}, squares[4] = {};
#pragma unroll 1
      for (int step = 0; step < unit.steps; ++step) {
        take_step<false>();
        const int slot = at % STAGES;
        if (has_refs) {
          const uint64_t a = stages + (slot * STAGE + crew * BOX >> 4),
                         b = stages + (slot * STAGE + REFS >> 4);
          Acc acc;
          begin_products<STEP / 16, 0>(acc, a, b);
          add_norms(ring + slot * STAGE + crew * BOX, slot, d - unit.slice * slice - step * STEP, squares);
          end_products(acc);
#pragma unroll
          for (int i = 0; i < PAIRS; ++i) {
            const float2 unscale = *reinterpret_cast<const float2*>(&shared.unscale[slot][8 * i + pair]);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              sums[4 * i + 2 * h] = fmaf(of_parts(acc, 4 * i + 2 * h), unscale.x, sums[4 * i + 2 * h]);
              sums[4 * i + 2 * h + 1] =
                  fmaf(of_parts(acc, 4 * i + 2 * h + 1), unscale.y, sums[4 * i + 2 * h + 1]);
            }
          }
        }
        leave_step();
      }
      if (!has_refs) continue;
      float* const norms = shared.norms[turn] + crew * STEP;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int hop = 4; hop > 0; hop /= 2) squares[k] += __shfl_xor_sync(0xffffffffu, squares[k], hop);
        if (tid % 8 == 0) norms[tid % GROUP / 8 + 16 * k] = squares[k];
      }
      wait_for_crew();
      float most[2 * PAIRS];
#pragma unroll
      for (int i = 0; i < PAIRS; ++i) {
#pragma unroll
        for (int p = 0; p < 2; ++p) {
          const int row = unit.rows * ROWS + 8 * i + pair + p;
          const float half_alpha = row < n ? fabsf(rows.half_alpha[row]) : 0;
          float* const to = set.scores + (int64_t{row} * slices + unit.slice) * set.stride + first + mine;
          most[2 * i + p] = 0;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            if (row >= n || first + mine + 8 * h >= valid) continue;
            const float product = sums[4 * i + 2 * h + p], norm = half_alpha * norms[mine + 8 * h];
            to[8 * h] = product - norm;
            most[2 * i + p] = fmaxf(most[2 * i + p], fabsf(product) + norm);
          }
        }
      }
      // Of eight lanes that have the same rows each is left with one or two of these.
#pragma unroll
      for (int hop = 16, left = PAIRS; hop >= 4; hop /= 2, left /= 2) {
        const bool upper = lane & hop;
#pragma unroll
        for (int r = 0; r < left; ++r) {
          const float keep = upper ? most[left + r] : most[r], give = upper ? most[r] : most[left + r];
          most[r] = fmaxf(keep, __shfl_xor_sync(0xffffffffu, give, hop));
        }
      }
      constexpr int LEFT = 2 * PAIRS / 8;
#pragma unroll
      for (int q = 0; q < LEFT; ++q) {
        const int r = lane / 4 * LEFT + q, row = unit.rows * ROWS + 8 * (r / 2) + pair + r % 2;
        if (row >= n) continue;
        float* const to = set.scales + (int64_t{row} * set.cut.chunks + unit.tile) * slices + unit.slice;
        atomicMax(reinterpret_cast<int*>(to), __float_as_int(most[q]));
      }
    }
  }

  // ---- weights

  // visit(facts) of each row of a group of warps. known: shared memory has the first one's.
  template <typename Visit>
  __device__ __forceinline__ void each_row(bool known, const Visit& visit) const {
#pragma unroll 1
    for (int index = static_cast<int>(blockIdx.x + gridDim.x * crew); index < n;
         index += static_cast<int>(gridDim.x) * GROUPS, known = false) {
      if (!known) {
        wait_for_crew();  // all have done with the one before
        if (tid % GROUP == 0) shared.facts[crew] = know_row(in, index);
        wait_for_crew();
      }
      visit(shared.facts[crew]);
    }
  }

  using Weighs = Weigher<T, FAST, Swept, SweptShared>;
  using Best = typename Weighs::Best;

  __device__ __noinline__ static void list_for_review(const Inputs& in, const Swept& set, SweptShared& shared,
                                                      const HeldGroup& group, const RowFacts& facts,
                                                      Best found, Review its) {
    const int thread = group.tid, row = static_cast<int>(facts.row.index), count = shared.class_counts[0];
    const double* const exact = set.exact + row * set.stride;
    // The best of all, the first of equal ones.
    const double first = group.maximum(
        found.score == its.top && found.reference >= 0 ? -static_cast<double>(found.reference) : -INFINITY);
    const int best = its.best = first > -INFINITY ? static_cast<int>(-first) : 0;
    // What shares of the weight below 2^-bits are off by, each by itself, is seen no more.
    const float bits = 2 + 2 * fmaxf(log2f(fmaxf(its.wrong, 1)), 0);
    const double near = its.near = its.top - bits / (facts.row.rate() * LOG2_E);
    if (thread == 0) set.reviews[row] = its;
    if (its.wrong <= 0) {  // lse wants the best alone
      if (thread == 0) set.groups[atomicAdd(set.counter, 1)] = {row, {best, -1, -1, -1}, {}};
      return;
    }
    int* const list = shared.list[group.number];
    int* const counts = shared.counts[group.number];
#pragma unroll 1
    for (int from = 0; from < count; from += LISTED) {
      const int j = from + 2 * thread;
      const bool one = j < count && (exact[j] > near || j == best),
                 two = j + 1 < count && (exact[j + 1] > near || j + 1 == best);
      const unsigned ones = __ballot_sync(0xffffffffu, one), twos = __ballot_sync(0xffffffffu, two);
      if (thread % 32 == 0) counts[thread / 32] = __popc(ones) + __popc(twos);
      group.wait();
      int place = 0, all = 0;
#pragma unroll
      for (int w = 0; w < GROUP_WARPS; ++w) {
        if (w < thread / 32) place += counts[w];
        all += counts[w];
      }
      const unsigned before = (1u << thread % 32) - 1;
      place += __popc(ones & before) + __popc(twos & before);
      if (one) list[place++] = j;
      if (two) list[place] = j + 1;
      const int sets = (all + REVIEWED - 1) / REVIEWED;
      if (thread == 0 && sets > 0) shared.place[group.number] = atomicAdd(set.counter, sets);
      group.wait();
      if (thread < sets) {
        ReviewGroup own{row, {}, {}};
#pragma unroll
        for (int q = 0; q < REVIEWED; ++q)
          own.refs[q] = REVIEWED * thread + q < all ? list[REVIEWED * thread + q] : -1;
        set.groups[shared.place[group.number] + thread] = own;
      }
      group.wait();
    }
  }

  __device__ __forceinline__ void weigh_rows() const {
    const HeldGroup group{crew, tid % GROUP, shared.scratch[crew]};
    const Weighs weigh{in, set, shared, group};
    each_row(true, [&](const RowFacts& facts) {
      if (group.tid == 0) {  // what holds of a row without references
        set.reviews[facts.row.index].wrong = -1;
        set.ends[facts.row.index] = make_double2(NAN, NAN);
      }
      weigh.weigh_shares(facts, [&](const Best& best, double top, double total, float wrong) {
        weigh.leave(facts, total);
        if (wrong > 0 || in.lse.data)
          list_for_review(in, set, shared, group, facts, best, {top, total, 0, wrong, 0});
      });
    });
  }

  // |x - alpha r|^2 of the references that are to be scored again, and weights from these. Called with what
  // the kernel has by value, so that it need not lie in memory.
  __device__ __noinline__ static void review(SweptKernel own, int groups) { own.score_again(groups); }
  __device__ __noinline__ static void revise(SweptKernel own) { own.weigh_again(); }
  __device__ __forceinline__ void score_again(int groups) const {
    const bool aligned = is_aligned(in.x.data);
#pragma unroll 1
    for (int g = static_cast<int>(blockIdx.x); g < groups; g += static_cast<int>(gridDim.x)) {
      const int4 head = __ldcg(reinterpret_cast<const int4*>(set.groups + g));
      const int row = head.x, last = __ldcg(&set.groups[g].refs[REVIEWED - 1]);
      const int refs[REVIEWED] = {head.y, head.z, head.w, last};
      const double alpha = static_cast<double>(rows.high[row]) + static_cast<double>(rows.rest[row]);
      const double sign = copysignf(1, rows.half_alpha[row]);
      const int64_t base = int64_t{row} * d;
      double squares[REVIEWED] = {};
#pragma unroll 2
      for (int e = 8 * tid; e < d; e += 8 * HELD_THREADS) {
        uint4 raw[REVIEWED];
#pragma unroll
        for (int q = 0; q < REVIEWED; ++q)
          raw[q] = *reinterpret_cast<const uint4*>(static_cast<const T*>(in.refs.data) +
                                                   int64_t{max(refs[q], 0)} * d + e);
        double x[8];
        if (aligned) {
          load8(in.x, base + e, x);
        } else {
          for (int k = 0; k < 8; ++k) x[k] = load_as<double>(in.x, base + e + k);
        }
#pragma unroll
        for (int q = 0; q < REVIEWED; ++q) {
          const T* const r = reinterpret_cast<const T*>(&raw[q]);
#pragma unroll
          for (int k = 0; k < 8; ++k) {
            const double gap = fma(-alpha, static_cast<double>(to_float(r[k])), sign * x[k]);
            squares[q] = fma(gap, gap, squares[q]);
          }
        }
      }
#pragma unroll
      for (int q = 0; q < REVIEWED; ++q) {
        squares[q] = warp_sum(squares[q]);
        if (lane == 0) shared.squares[warp][q] = squares[q];
      }
      __syncthreads();
      if (tid < REVIEWED) {
        double all = 0;
        for (int w = 0; w < WARPS; ++w) all += shared.squares[w][tid];
        const int reference = __ldcg(&set.groups[g].refs[tid]);
        if (reference >= 0) set.reviewed[row * set.stride + reference] = all;
      }
      __syncthreads();
    }
  }

  __device__ __forceinline__ void weigh_again() const {
    const HeldGroup group{crew, tid % GROUP, shared.scratch[crew]};
    const Weighs weigh{in, set, shared, group};
    each_row(false, [&](const RowFacts& facts) {
      const Row& row = facts.row;
      const Review review = set.reviews[row.index];
      if (review.wrong < 0) return;
      const double rate2 = row.rate() * LOG2_E, times = -LOG2_E / (2 * row.sigma * row.sigma);
      const double* const reviewed = set.reviewed + row.index * set.stride;
      double* const exact = set.exact + row.index * set.stride;
      const double of_best = times * __ldcg(reviewed + review.best);
      double top = review.top, total = review.total;
      if (review.wrong > 0) {
        double now = -INFINITY;
#pragma unroll 1
        for (int j = 2 * group.tid; j < valid; j += 2 * GROUP) {
#pragma unroll
          for (int q = 0; q < 2; ++q) {
            if (j + q >= valid) continue;
            double score = exact[j + q];
            if (score > review.near || j + q == review.best)
              exact[j + q] = score = review.top + (times * __ldcg(reviewed + j + q) - of_best) / rate2;
            if (score > now) now = score;
          }
        }
        top = group.maximum(now);  // of another now, perhaps
        total = weigh.weigh(facts, rate2, top, typename Weighs::Kept{});
      }
      weigh.leave(facts, total);
      if (group.tid == 0 && in.lse.data)
        write_lse(in, row.index, PartRow{of_best + rate2 * (top - review.top), total, 0, 0, 0, 0});
    });
  }

  // ---- sums

  // Zeros in place of this group's lines of a stage from `first` on, up to a whole number of 16: what they
  // hold may be NaN.
  __device__ __forceinline__ void clear_lines(char* refs, int first) const {
    const int count = (first + 15) / 16 * 16 - first;
    if (count == 0) return;
    for (int i = tid % GROUP; i < count * 8; i += GROUP)
      *reinterpret_cast<uint4*>(refs + first * LINE_BYTES + 16 * i) = make_uint4(0, 0, 0, 0);
    fence_async();
    wait_for_crew();
  }

  // The sums of a unit, all by the matrix units. A step's place in the ring is left when the next one's
  // products are under way.
  template <int SIZE>
  __device__ __forceinline__ void add_all(const Unit& unit, bool has_elements, uint64_t stages,
                                          float (&sums)[SIZE]) {
    constexpr int REFS_STEP = 16 * LINE_BYTES >> 4;
    const auto leave = [&](int step) {
      __syncwarp();
      if (lane == 0) arrive(&shared.empty[step % STAGES]);
    };
#pragma unroll
    for (int i = 0; i < SIZE; ++i) sums[i] = 0;
#pragma unroll 1
    for (int step = 0; step < unit.steps; ++step, ++at) {
      take_step<true>();
      if (has_elements) {
        const int slot = at % STAGES, left = valid - step * STEP;
        if (left < STEP) clear_lines(ring + slot * STAGE + crew * BOX, left);
        const uint64_t a = stages + (slot * STAGE + crew * BOX >> 4), b = stages + (slot * STAGE + REFS >> 4);
        if (left > STEP - 16) {
          begin_products<STEP / 16, 1, 1, REFS_STEP>(sums, a, b);
        } else {
#pragma unroll 1
          for (int k = 0; k < (left + 15) / 16; ++k)
            begin_products<1, 1, 1>(sums, a + k * REFS_STEP, b + 2 * k);
        }
      }
      if (step == 0) continue;
      end_products_before();
      leave(at - 1);
    }
    end_products(sums);
    leave(at - 1);
  }

  __device__ __forceinline__ void sum_rows() {
    const int mine = warp % GROUP_WARPS * 16 + lane / 4, pair = lane % 4 * 2;
    const uint64_t stages = rows_of_128_bytes(shared_address(ring));
    constexpr int REFS_STEP = 16 * LINE_BYTES >> 4;
#pragma unroll 1
    for (int number = static_cast<int>(blockIdx.x); number < units<true>();
         number += static_cast<int>(gridDim.x)) {
      const Unit unit = unit_of<true>(number);
      const int first = unit.tile * TILE + crew * STEP;
      const bool has_elements = first < d;
      float sums[FAST ? OF_WEIGHT * MOST_SUM_ROWS / 2 : SUMS] = {};
      if constexpr (OF_WEIGHT == 1) {
        if (copies_of(unit) == 1) {
          add_all(unit, has_elements, stages, reinterpret_cast<float (&)[SUM_BOX / 2]>(sums));
        } else {
          add_all(unit, has_elements, stages, sums);
        }
      } else if constexpr (FAST) {
        add_all(unit, has_elements, stages, sums);
#pragma unroll
        for (int i = 0; i < MOST_SUM_ROWS / 2; ++i) sums[i] += sums[i + MOST_SUM_ROWS / 2];
      }
#pragma unroll 1
      for (int step = 0; !FAST && step < unit.steps; ++step) {
        take_step<true>();
        const int slot = at % STAGES, left = valid - step * STEP;
        if (has_elements) {
          if (left < STEP) clear_lines(ring + slot * STAGE + crew * BOX, left);
          const uint64_t a = stages + (slot * STAGE + crew * BOX >> 4),
                         b = stages + (slot * STAGE + REFS >> 4);
          const int sixteens = min(STEP / 16, (left + 15) / 16);
#pragma unroll 1
          for (int k = 0; k < sixteens; ++k) {
            Acc acc;
            begin_products<1, 1>(acc, a + k * REFS_STEP, b + 2 * k);
            end_products(acc);
#pragma unroll
            for (int i = 0; i < SUMS; ++i) sums[i] += of_parts(acc, i);
          }
        }
        leave_step();
      }
      if (!has_elements) continue;
      const int e0 = first + mine;
#pragma unroll
      for (int i = 0; i < MOST_SUM_ROWS / 8; ++i) {
        if (OF_WEIGHT == 1 && 8 * i >= tall<true>()) break;
        float x[2][2];
#pragma unroll
        for (int p = 0; p < 2; ++p) {
          const int row = unit.rows * (FAST ? tall<true>() : ROWS) + 8 * i + pair + p;
          const float* const of_row = static_cast<const float*>(in.x.data) + int64_t{row} * d + e0;
#pragma unroll
          for (int h = 0; h < 2; ++h) x[p][h] = USUAL && row < n && e0 + 8 * h < d ? of_row[8 * h] : 0;
        }
#pragma unroll
        for (int p = 0; p < 2; ++p) {
          const int row = unit.rows * (FAST ? tall<true>() : ROWS) + 8 * i + pair + p;
          if (row >= n) continue;
          const double2 by = rows.ends[row];
          const int64_t to = int64_t{row} * d + e0;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            if (e0 + 8 * h >= d) continue;
            const double mean = by.x * static_cast<double>(sums[4 * i + 2 * h + p]);
            if (USUAL) {
              static_cast<float*>(in.out.data)[to + 8 * h] =
                  static_cast<float>(fma(by.y, static_cast<double>(x[p][h]), mean));
            } else {
              store_as(in.out, to + 8 * h, fma(by.y, load_as<double>(in.x, to + 8 * h), mean));
            }
          }
        }
      }
    }
  }

  __device__ __forceinline__ void run() {
    if (tid == 0) {
      for (int slot = 0; slot < STAGES; ++slot) {
        init_barrier(&shared.full[slot], 1);
        init_barrier(&shared.empty[slot], WARPS);
      }
      publish_barriers();
    }
    __syncthreads();
    begin_refs<false>();
    know_rows();
    __syncthreads();
    prepare_rows();
    fence_async_all();
    meet_grid();
    fence_async_all();
    begin_rows<false>();
    score_rows();
    begin_refs<true>();
    meet_grid();
    weigh_rows();
    fence_async_all();
    meet_grid();
    if (const int groups = __ldcg(set.counter); groups > 0) {
      review(*this, groups);
      meet_grid();
      revise(*this);
      fence_async_all();
      meet_grid();
    }
    fence_async_all();
    begin_rows<true>();
    for (int row = tid; row < n; row += HELD_THREADS) rows.ends[row] = __ldcg(set.ends + row);
    __syncthreads();
    sum_rows();
  }
};

template <typename T, bool USUAL, bool FAST = false>
__global__ void __launch_bounds__(HELD_THREADS, 1)
    swept_kernel(const __grid_constant__ Inputs in, const __grid_constant__ Swept set) {
  extern __shared__ __align__(1024) char memory[];
  char* const ring = memory + (HELD_ALIGNMENT - shared_address(memory) % HELD_ALIGNMENT) % HELD_ALIGNMENT;
  using Kernel = SweptKernel<T, USUAL, FAST>;
  char* const rest = ring + STAGES * Kernel::STAGE;
  SweptShared& shared = *reinterpret_cast<SweptShared*>(rest);
  const SweptRows rows(rest + SWEPT_FIXED_SMEM, in.n);
  Kernel{in, set, shared, rows, ring}.run();
}

}  // namespace

void run_swept(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream) {
  const bool bf16 = in.refs.dtype == Dtype::bf16;
  const int64_t parts = held_parts(bf16);
  Swept set{};
  set.cut.chunks = ceil_div(in.m, SWEPT_TILE), set.cut.slice = plan.slice, set.cut.slices = plan.slices;
  set.stride = swept_padded(in.m), set.padded = static_cast<int>(set.stride);
  set.elements = swept_padded(in.d), set.rows_padded = round_up(plan.rows_per_pass, 64);
  set.rounding = Swept::ROUNDING / (plan.fast ? MOST_ERROR_OF_FAST_SCORES : MOST_ERROR_OF_SCORES);
  set.refs = map_rows(op, in.refs.data, in.refs.dtype, in.d, in.m, 2 * in.d, static_cast<int>(SWEPT_BOX));
  const SweptLayout layout = swept_layout(plan.rows_per_pass, in.m, in.d, bf16, set.cut.slices);
  char* next = static_cast<char*>(workspace);
  const auto take = [&](int64_t bytes) {
    char* const piece = next;
    next += bytes;
    return static_cast<void*>(piece);
  };
  set.queries = take(layout.queries);
  set.unscales = static_cast<float*>(take(layout.unscales));
  set.scores = static_cast<float*>(take(layout.scores));
  set.exact = static_cast<double*>(take(layout.exact));
  set.reviewed = static_cast<double*>(take(layout.reviewed));
  set.groups = static_cast<ReviewGroup*>(take(layout.groups));
  set.weights = take(layout.weights);
  set.ends = static_cast<double2*>(take(layout.ends));
  set.reviews = static_cast<Review*>(take(layout.reviews));
  set.scales = static_cast<float*>(take(layout.scales));
  set.counter = static_cast<int*>(take(layout.counter));
  const bool usual = is_vector(in.x) && is_vector(in.out);
  const bool fast = plan.fast && usual;
  const auto kernel_of = [&](auto value) {
    using T = decltype(value);
    if (!usual) return swept_kernel<T, false>;
    return fast ? swept_kernel<T, true, true> : swept_kernel<T, true>;
  };
  const auto kernel = bf16 ? kernel_of(__nv_bfloat16{}) : kernel_of(__half{});
  check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(plan.smem_bytes)));
  for (int64_t first = 0; first < in.n; first += plan.rows_per_pass) {
    const Inputs pass = slice_rows(in, first, plan.rows_per_pass);
    const int tile = static_cast<int>(swept_rows(bf16)),
              sum_box = static_cast<int>(swept_sum_box(bf16, fast));
    set.y_parts =
        map_rows(op, set.queries, in.refs.dtype, set.elements, parts * pass.n, 2 * set.elements, tile);
    set.weight_parts = map_rows(op, set.weights, in.refs.dtype, set.stride, (parts - fast) * pass.n,
                                2 * set.stride, sum_box);
    launch_together(op, kernel, plan.blocks, HELD_THREADS, plan.smem_bytes, stream, pass, set);
  }
}

}  // namespace svel::cuda
