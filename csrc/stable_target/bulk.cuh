// One pass over the references on Hopper, bound by memory: per pair of unit and reference D * (bytes per
// element) from device memory through shared memory, and about (4 + 3 rows of the unit) D float32 operations.
//
// Tiles of references of all units form one list, cut into equal ranges, one per team of thread blocks (a
// team is one block, unless D is too long for one: then each block of the team takes a slice of D). In a
// block one warp, the producer, walks the range and brings tiles into a ring of stages by bulk copies. The
// other warps take a tile into registers, which frees its stage at once: so nearly all of the ring is always
// on its way, whatever they do meanwhile. They form the tile's scores, exchange partial sums (over the team's
// blocks too), run the online softmax, each warp for itself, and add the tile to the unit's rows.
//
// Exactness. Scores and sums are of d_j = r_j - c, with c the first reference a team has of the group:
//   s_j = rate (y.d_j - alpha/2 |d_j|^2),  y = x - alpha c,  so that
//   -|x - alpha r_j|^2 / (2 sigma^2) = s_j - |y|^2 / (2 sigma^2).
// Weights are 2^(s_j - top) with `top` an integer no smaller than all scores so far (in units of log 2): when
// it grows, sums are multiplied by a power of two, which rounds nothing. So their rounding errors can be kept
// beside them (Kahan), and the number of references does not matter. |y|^2 is in float64 and tells how parts
// of a unit with different c compare.
//
// A unit inside one team's range is finished at once. Of the others each team leaves a part, and the last to
// finish merges them, or merge_kernel where few units are cut into many parts.
#pragma once

#include "common/hopper.cuh"
#include "common/planner.h"
#include "stable_target/units.cuh"

namespace svel::cuda {

// 2^-50: a tile whose weights are all below that, beside the best so far, is not added. Of 2^24 such
// references all together are below float32's rounding.
constexpr float NO_WEIGHT = 8.8817841970012523e-16f;
constexpr double LOG2_E = 1.4426950408889634, LOG_2 = 0.6931471805599453;
constexpr int TEAM_SLOTS = 4;  // a block of the team may be one tile ahead of another that still reads

enum BulkTileFlags : int {
  PART_BEGIN = 1,   // first tile of this unit in this team
  GROUP_BEGIN = 2,  // and of this group in this unit: its first reference becomes the centre
  UNIT_BEGIN = 4,   // the unit begins here
  PART_END = 8,     // last tile of this unit in this team
  UNIT_END = 16,    // the unit ends here; sources, where there are any, come after its references
  LIST_DONE = 32,
};

struct BulkTile {
  int64_t reference;  // index of the first one among all k m
  int unit;
  int word;  // how many references, and BulkTileFlags << 8

  __device__ int count() const { return word & 0xff; }
  __device__ int flags() const { return word >> 8; }
};

// What the consumers need of a row. The sign of x: see Row.
struct BulkRow {
  int64_t index;
  double a, b;                                     // out = a x + b mean
  double alpha, rate;                              // rate: log2(e) alpha / sigma^2
  double per_square;                               // log2(e) / (2 sigma^2)
  float sign, half_alpha, high_alpha, rest_alpha;  // alpha in float32, and what that drops
};

template <int R>
struct UnitRows {
  int count;
  BulkRow rows[R];
};
constexpr int UNIT_SLOTS = 4;

enum class Team : int { block, cluster, grid };

struct BulkLayout {
  Team team;
  int slices;     // blocks per team
  int64_t slice;  // elements of D per block
  int stages;
  bool vectors;     // x, source and out allow 16-byte loads and stores
  bool own_list;    // each block builds the list of units in its shared memory
  bool merge_last;  // the last team to finish merges; else merge_kernel
};

// A team's share of a unit, for one row: weights are 2^log2_weight times what the sums hold.
struct PartRow {
  double log2_weight, total;  // sum of the weights
  int64_t centre;             // index of the reference, -1: the origin
};

// What teams leave of units that they share with others; slot 2b of block b for the unit that began earlier,
// 2b + 1 for the unit that goes on after it.
struct BulkParts {
  float* sums;    // (2 blocks, rows, slice) weighted sum of r_j - c
  PartRow* rows;  // (2 blocks, rows)
  int* arrived;   // (n, slices) teams that have left their part of a unit; zero at first
  uint2* mail;    // (teams, TEAM_SLOTS, slices, LETTERS) with their tile's number, for Team::grid
};

// The tiles are cut into ranges of equal length, the first few one longer. No range is empty unless the
// ranges before hold all tiles, so that a unit's teams follow one another.
struct Ranges {
  int64_t length, longer;

  __device__ Ranges(const UnitList& list, int64_t teams) {
    const int64_t tiles = list.first_tile[list.sizes[0]];
    length = tiles / teams;
    longer = tiles - length * teams;
  }
  __device__ int64_t begin(int64_t team) const { return length * team + (team < longer ? team : longer); }
  __device__ int64_t team_of(int64_t tile) const {
    if (tile < longer * (length + 1)) return tile / (length + 1);
    return longer + (tile - longer * (length + 1)) / length;
  }
  __device__ int64_t first_team(const UnitList& list, int unit) const {
    return team_of(list.first_tile[unit]);
  }
  __device__ int64_t last_team(const UnitList& list, int unit) const {
    return team_of(list.first_tile[unit] + list.units[unit].tiles - 1);
  }
};

template <int WARPS, int SCORES, int R>
struct BulkShared {
  Barrier full[BULK_MAX_STAGES], empty[BULK_MAX_STAGES], mailed[TEAM_SLOTS];
  Barrier told[UNIT_SLOTS], done[UNIT_SLOTS];
  BulkTile ring[BULK_MAX_STAGES];
  UnitRows<R> units[UNIT_SLOTS];
  // Two of each that is exchanged: a warp is at most one exchange ahead of another that still reads.
  alignas(16) float scores[2][SCORES * WARPS];
  double squares[2][WARPS][R];  // |y|^2
  float mail[TEAM_SLOTS][BULK_MAX_CLUSTER][SCORES];
  double mail_squares[TEAM_SLOTS][BULK_MAX_CLUSTER][R];
  float team_scores[2][SCORES];
  double team_squares[2][R];
  int64_t scratch[32];
  int arrived;
};

// Four elements from i on, zero from `limit` on: for dtypes and alignments that are rare. Not in line, since
// code that runs once costs mostly its way from device memory.
static __device__ __noinline__ float4 load_four(const Array& a, int64_t i, int64_t limit) {
  float v[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) v[k] = i + k < limit ? load_as<float>(a, i + k) : 0.0f;
  return make_float4(v[0], v[1], v[2], v[3]);
}
static __device__ __noinline__ void store_four(const Array& a, int64_t i, int64_t limit, float4 v) {
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

// 2^exponent, in one place.
static __device__ __noinline__ double power(double exponent) {
  return exp2(exponent);
}

// Thread and lane, read anew: cheaper than to keep what follows from them through a loop that needs all
// registers.
__device__ inline int fresh_thread() {
  int value;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(value));
  return value;
}

// T: of the references. THREADS consumers own Q elements of D each. TR: references per tile; R: most rows of
// a unit.
template <typename T, int THREADS, int Q, int TR, int R, bool TEAMS>
struct Bulk {
  static constexpr int EV = 16 / static_cast<int>(sizeof(T));
  static constexpr int SLOTS = Q / EV, WARPS = THREADS / 32;
  static constexpr int SCORES = R * TR, LETTERS = SCORES + 2 * R;
  using Shared = BulkShared<WARPS, SCORES, R>;
  static constexpr int64_t FIXED_BYTES = (sizeof(Shared) + 127) / 128 * 128;

  const Inputs& in;
  const UnitList& list;
  const BulkParts& parts;
  const BulkLayout& layout;
  Shared& shared;
  char* const staging;
  const Ranges ranges;
  const int64_t teams = gridDim.x / layout.slices, team = blockIdx.x / layout.slices;
  const int rank = static_cast<int>(blockIdx.x % layout.slices);
  const int64_t offset = rank * layout.slice;  // of this block's slice in D
  const int length = static_cast<int>(layout.slice < in.d - offset ? layout.slice : in.d - offset);

  __device__ T* stage(int s) const {  // (TR, slice)
    return reinterpret_cast<T*>(staging) + static_cast<int64_t>(s) * TR * layout.slice;
  }

  // The producer.

  // The unit that tile `begin` belongs to.
  __device__ int find_unit(int64_t begin, int lane) const {
    int low = 0, high = list.sizes[0];  // first_tile[low] <= begin < first_tile[high]
    while (high - low > 1) {            // 32 probes at a time
      const int step = (high - low + 31) / 32, probe = low + lane * step;
      const bool before = probe < high && list.first_tile[probe] <= begin;
      const int last = 31 - __clz(__ballot_sync(0xffffffffu, before));
      high = min(high, low + (last + 1) * step);
      low += last * step;
    }
    return low;
  }

  // All lanes walk alike, and each issues the copy of one reference.
  __device__ void produce(int lane) const {
    const uint32_t bytes = static_cast<uint32_t>(length * sizeof(T));
    const uint64_t once = read_once_policy(), usual = usual_policy();
    const char* const base = static_cast<const char*>(in.refs.data) + offset * sizeof(T);
    int s = 0, phase = 1;
    const auto next_stage = [&] {
      if (++s == layout.stages) s = 0, phase ^= 1;
    };
    int64_t at = ranges.begin(team);
    const int64_t end = ranges.begin(team + 1);
    for (int number = at < end ? find_unit(at, lane) : 0; at < end; ++number) {
      const int64_t unit_begin = list.first_tile[number], unit_end = unit_begin + list.units[number].tiles;
      const int64_t stop = unit_end < end ? unit_end : end;
      const uint64_t policy = list.units[number].alone ? once : usual;
      int begins = GROUP_BEGIN | PART_BEGIN | (at == unit_begin ? UNIT_BEGIN : 0);
      while (at < stop) {
        int64_t group = list.units[number].group, count = list.units[number].count;
        int64_t group_begin = unit_begin, group_end = unit_end;
        if (group < 0 && count > 0) {
          group = find_prefix(list.group_tiles, 0, in.k, at - unit_begin);
          count = valid_count(in, group);
          group_begin = unit_begin + list.group_tiles[group];
          group_end = unit_begin + list.group_tiles[group + 1];
        }
        const int64_t pause = group_end < stop ? group_end : stop;
        const int ends = pause < stop ? 0 : PART_END | (stop == unit_end ? UNIT_END : 0);
        int64_t reference = group * in.m + (at - group_begin) * TR;
        const int64_t beyond = group * in.m + count;
        const char* from = base + (reference + lane) * in.d * static_cast<int64_t>(sizeof(T));
        for (int tiles = static_cast<int>(pause - at); tiles > 0; --tiles) {
          const int many = beyond - reference < TR ? static_cast<int>(beyond - reference) : TR;
          wait_barrier(&shared.empty[s], phase);
          if (lane < many) bulk_copy(stage(s) + lane * layout.slice, from, bytes, &shared.full[s], policy);
          if (lane == 0) shared.ring[s] = {reference, number, many | (begins | (tiles == 1 ? ends : 0)) << 8};
          __syncwarp();
          if (lane == 0) arrive_expecting(&shared.full[s], many * bytes);
          next_stage();
          begins = 0;
          reference += TR;
          from += TR * in.d * static_cast<int64_t>(sizeof(T));
        }
        at = pause;
        begins = GROUP_BEGIN;
      }
    }
    wait_barrier(&shared.empty[s], phase);
    if (lane == 0) {
      shared.ring[s] = {0, 0, LIST_DONE << 8};
      arrive(&shared.full[s]);
    }
  }

  // The announcer: tells the consumers of the rows of each unit, and brings near what will be read of x.
  __device__ void announce(int lane) const {
    const int64_t begin = ranges.begin(team), end = ranges.begin(team + 1);
    int slot = 0, phase = 1;
    for (int number = begin < end ? find_unit(begin, lane) : list.sizes[0];
         number < list.sizes[0] && list.first_tile[number] < end; ++number) {
      const Unit unit = list.units[number];
      wait_barrier(&shared.done[slot], phase);
      UnitRows<R>& here = shared.units[slot];
      if (lane == 0) here.count = unit.rows;
      if (lane < unit.rows) {
        bool finite;
        const Row row = make_row(in, list.order[unit.first + lane], 0, finite);
        if (layout.vectors)
          prefetch_bulk(
              static_cast<const char*>(in.x.data) + (row.index * in.d + offset) * size_of(in.x.dtype),
              length * size_of(in.x.dtype));
        BulkRow& out = here.rows[lane];
        out.index = row.index, out.a = row.a, out.b = row.b, out.alpha = row.alpha;
        out.rate = LOG2_E * row.rate(), out.per_square = LOG2_E / (2 * row.sigma * row.sigma);
        out.sign = static_cast<float>(row.sign), out.half_alpha = static_cast<float>(0.5 * row.alpha);
        out.high_alpha = static_cast<float>(row.alpha);
        out.rest_alpha = static_cast<float>(row.alpha - out.high_alpha);
      }
      __syncwarp();
      if (lane == 0) arrive(&shared.told[slot]);
      if (++slot == UNIT_SLOTS) slot = 0, phase ^= 1;
    }
  }

  // The consumers.

  struct Place {  // in the ring, among the units, and the number of exchanges so far
    int stage = 0, phase = 0, unit = 0, unit_phase = 0, exchanges = 0;
  };

  // This warp has what it needs of the stage at hand.
  __device__ void give_back(Place& at, int tid) const {
    __syncwarp();
    if (tid % 32 == 0) arrive(&shared.empty[at.stage]);
    if (++at.stage == layout.stages) at.stage = 0, at.phase ^= 1;
  }

  __device__ static int element(int tid, int slot) { return (slot * THREADS + tid) * EV; }

  // This thread's elements of row `index` of x or source; zero beyond the end. One branch for all loads,
  // which are in flight together.
  __device__ void load_elements(const Array& a, int64_t index, int tid, float (&out)[Q]) const {
    const int64_t base = index * in.d + offset;
    const float* const from = static_cast<const float*>(a.data) + base;
    const bool fast = a.dtype == Dtype::f32 && layout.vectors;
#pragma unroll
    for (int q = 0; q < Q; q += 4) {
      const int e = element(tid, q / EV) + q % EV;
      float4 v = make_float4(0, 0, 0, 0);
      if (fast && e < length) v = *reinterpret_cast<const float4*>(from + e);
      out[q] = v.x, out[q + 1] = v.y, out[q + 2] = v.z, out[q + 3] = v.w;
    }
    if (fast) return;
#pragma unroll
    for (int q = 0; q < Q; q += 4) {
      const int e = element(tid, q / EV) + q % EV;
      const float4 v = load_four(a, base + e, base + length);
      out[q] = v.x, out[q + 1] = v.y, out[q + 2] = v.z, out[q + 3] = v.w;
    }
  }

  // A part of a unit of ROWS rows, or fewer.
  template <int ROWS>
  struct Part {
    static constexpr int COUNT = ROWS * TR, LANES = 32 / COUNT;  // scores of a tile; lanes for each

    uint4 c[SLOTS];  // the centre, as it is stored
    float y[ROWS][Q];
    float sum[ROWS][Q], excess[ROWS][Q];  // sum - excess is the weighted sum of r_j - c
    float half_alpha[ROWS];
    // Of the row of this lane's score, the same in all warps: the largest score, and the integer `top` as
    // base rate + rest; rate in units of log 2; the sum of this lane's own weights.
    float base, rest, rate;
    double top, total;
    double shift;    // |y|^2 / (2 sigma^2) in units of log 2
    int64_t centre;  // index of the reference, -1: the origin
  };

  template <int ROWS>
  __device__ static const BulkRow& row_of_lane(const UnitRows<R>& unit, int lane) {
    return unit.rows[ROWS == 1 ? 0 : lane / (Part<ROWS>::LANES * TR)];
  }

  template <int ROWS>
  __device__ void begin_part(Part<ROWS>& my, const UnitRows<R>& unit, int lane) const {
    my.rate = static_cast<float>(row_of_lane<ROWS>(unit, lane).rate);
    my.base = -INFINITY, my.rest = 0, my.top = -INFINITY, my.total = 0, my.shift = 0, my.centre = -1;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      my.half_alpha[r] = r < unit.count ? unit.rows[r].half_alpha : 0.0f;
#pragma unroll
      for (int q = 0; q < Q; ++q) my.sum[r][q] = my.excess[r][q] = 0;
    }
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) my.c[s] = uint4{0, 0, 0, 0};
  }

  template <int ROWS>
  __device__ static double total_of(const Part<ROWS>& my, int r) {
    double total = my.total;
    for (int hop = Part<ROWS>::LANES; hop < Part<ROWS>::LANES * TR; hop *= 2)
      total += __shfl_xor_sync(0xffffffffu, total, hop);
    return __shfl_sync(0xffffffffu, total, r * TR * Part<ROWS>::LANES);
  }

  // The first reference of the tile becomes the centre: c, y = x - alpha c and |y|^2 for each row.
  template <int ROWS>
  __device__ __noinline__ void take_centre(Part<ROWS>& my, int64_t centre, const UnitRows<R>& unit,
                                           const T* refs, int parity, int tid) const {
    my.centre = centre;
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      my.c[s] = uint4{0, 0, 0, 0};
      if (centre >= 0 && element(tid, s) < length)
        my.c[s] = *reinterpret_cast<const uint4*>(refs + element(tid, s));
    }
#pragma unroll 1
    for (int r = 0; r < unit.count; ++r) {
      const BulkRow& row = unit.rows[r];
      const float sign = row.sign, high = row.high_alpha, rest = row.rest_alpha;
      const double alpha = row.alpha;
      double square = 0;
      float x[Q];
      load_elements(in.x, row.index, tid, x);
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        float c[EV];
        unpack<T, EV>(my.c[s], c);
#pragma unroll
        for (int k = 0; k < EV; ++k) {
          const int q = s * EV + k;
          x[q] *= sign;
          const double exact = fma(-alpha, static_cast<double>(c[k]), static_cast<double>(x[q]));
          square = fma(exact, exact, square);
          const float y = fmaf(-rest, c[k], fmaf(-high, c[k], x[q]));
          my.y[r][q] = y;
        }
      }
      square = sum_over_lanes(square, 32);
      if (tid % 32 == 0) shared.squares[parity][tid / 32][r] = square;
    }
  }

  // What is summed already, relative to the centre that the tile brings.
  template <int ROWS>
  __device__ __noinline__ void move_sums(Part<ROWS>& my, const T* refs, int tid) const {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const double total = total_of(my, r);
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        uint4 fresh = uint4{0, 0, 0, 0};
        if (element(tid, s) < length) fresh = *reinterpret_cast<const uint4*>(refs + element(tid, s));
        float before[EV], now[EV];
        unpack<T, EV>(my.c[s], before);
        unpack<T, EV>(fresh, now);
#pragma unroll
        for (int k = 0; k < EV; ++k) {
          const int q = s * EV + k;
          const double moved = static_cast<double>(my.sum[r][q]) - my.excess[r][q] +
                               total * (static_cast<double>(before[k]) - now[k]);
          my.sum[r][q] = static_cast<float>(moved);
          my.excess[r][q] = static_cast<float>(my.sum[r][q] - moved);
        }
      }
    }
  }

  // From this thread's shares of the scores of a tile to their sums over the team, each in its lanes; |y|^2
  // of the lane's row too where a group begins.
  template <int ROWS>
  __device__ float exchange(float (&shares)[ROWS * TR], int begins, double& square, Place& at,
                            int tid) const {
    constexpr int COUNT = Part<ROWS>::COUNT, LANES = Part<ROWS>::LANES;
    const int thread = fresh_thread();
    const int lane = thread % 32, warp = thread / 32, value = lane / LANES, row = value / TR;
    const int parity = at.exchanges & 1;
    const float share = sum_over_warp<COUNT>(shares, lane);
    if (lane % LANES == 0) shared.scores[parity][value * WARPS + warp] = share;
    named_barrier(1, THREADS);
    const float4* const from = reinterpret_cast<const float4*>(&shared.scores[parity][value * WARPS]);
    float score = 0;
#pragma unroll
    for (int w = 0; w < WARPS / 4; ++w) {
      const float4 four = from[w];
      score += (four.x + four.y) + (four.z + four.w);
    }
    if (begins) {
      square = 0;
      for (int w = 0; w < WARPS; ++w) square += shared.squares[parity][w][row];
    }
    if constexpr (TEAMS) {
      if (layout.team == Team::cluster) {
        exchange_in_cluster<ROWS>(score, begins, square, at.exchanges, tid);
      } else {
        exchange_in_grid<ROWS>(score, begins, square, at.exchanges, tid);
      }
    }
    ++at.exchanges;
    return score;
  }

  template <int ROWS>
  __device__ void exchange_in_cluster(float& score, bool begins, double& square, int number, int tid) const {
    constexpr int COUNT = Part<ROWS>::COUNT, LANES = Part<ROWS>::LANES;
    const int lane = tid % 32, value = lane / LANES, row = value / TR, slot = number % TEAM_SLOTS;
    Barrier* const mailed = &shared.mailed[slot];
    if (tid < 32) {
      for (int peer = lane % LANES; peer < layout.slices; peer += LANES) {
        store_in_cluster(&shared.mail[slot][rank][value], mailed, peer, score);
        if (begins && value % TR == 0)
          store_in_cluster(&shared.mail_squares[slot][rank][row], mailed, peer, square);
      }
      if (lane == 0) arrive_expecting(mailed, layout.slices * (4 * COUNT + (begins ? 8 * ROWS : 0)));
    }
    wait_barrier(mailed, number / TEAM_SLOTS & 1);
    score = 0;
    for (int peer = lane % LANES; peer < layout.slices; peer += LANES)
      score += shared.mail[slot][peer][value];
    score = sum_over_lanes(score, LANES);
    if (!begins) return;
    square = 0;
    for (int peer = 0; peer < layout.slices; ++peer) square += shared.mail_squares[slot][peer][row];
  }

  // The sum over the team of what each block has posted as its letter `which`, taken by LANES lanes.
  __device__ float collect(const uint2* box, int which, unsigned tag, int lane, int lanes) const {
    float sum = 0;
    for (int peer = lane % lanes; peer < layout.slices; peer += lanes)
      sum += __uint_as_float(await_letter(box + peer * LETTERS + which, tag));
    return sum_over_lanes(sum, lanes);
  }

  template <int ROWS>
  __device__ void exchange_in_grid(float& score, bool begins, double& square, int number, int tid) const {
    constexpr int LANES = Part<ROWS>::LANES;
    const int lane = tid % 32, value = lane / LANES, row = value / TR, parity = number & 1;
    if (tid < 32) {
      uint2* const box = parts.mail + (team * TEAM_SLOTS + number % TEAM_SLOTS) * layout.slices * LETTERS;
      uint2* const own = box + rank * LETTERS;
      const unsigned tag = static_cast<unsigned>(number) + 1;
      if (lane % LANES == 0) {
        post_letter(own + value, make_uint2(__float_as_uint(score), tag));
        if (begins && value % TR == 0) {
          post_letter(own + SCORES + 2 * row, make_uint2(__double2loint(square), tag));
          post_letter(own + SCORES + 2 * row + 1, make_uint2(__double2hiint(square), tag));
        }
      }
      score = collect(box, value, tag, lane, LANES);
      if (lane % LANES == 0) shared.team_scores[parity][value] = score;
      if (begins) {
        for (int r = 0; r < ROWS; ++r) {
          double all = 0;
          for (int peer = lane; peer < layout.slices; peer += 32) {
            const uint2* const letters = box + peer * LETTERS + SCORES + 2 * r;
            all += __hiloint2double(await_letter(letters + 1, tag), await_letter(letters, tag));
          }
          all = sum_over_lanes(all, 32);
          if (lane == 0) shared.team_squares[parity][r] = all;
        }
      }
    }
    named_barrier(1, THREADS);
    score = shared.team_scores[parity][value];
    if (begins) square = shared.team_squares[parity][row];
  }

  // What larger scores, or another centre, ask for: `top` and what follows from it. Returns the scale for
  // what is summed already.
  template <int ROWS>
  __device__ double raise(Part<ROWS>& my, float score, bool valid, int begins, double square,
                          const BulkRow& row) const {
    float best = valid ? score : -INFINITY;
#pragma unroll
    for (int hop = Part<ROWS>::LANES; hop < Part<ROWS>::LANES * TR; hop *= 2)
      best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, hop));
    double before = my.top;
    if (begins) {
      const double shift = row.per_square * square;
      before += shift - my.shift;
      my.shift = shift;
      my.base = -INFINITY;
    }
    if (!(best > my.base)) return 1;
    const double bound = best * row.rate;
    my.base = best;
    my.top = fmax(ceil(bound), ceil(before));
    my.rest = static_cast<float>(my.top - bound);
    return begins == GROUP_BEGIN ? power(before - my.top) : power_of_two(before - my.top);
  }

  // This lane's weight.
  template <int ROWS>
  __device__ static float weigh(Part<ROWS>& my, float score, bool valid) {
    const float p = valid ? exp2f(fmaf(score - my.base, my.rate, -my.rest)) : 0.0f;
    my.total += p;
    return p;
  }

  // To weights relative to a larger score.
  template <int ROWS>
  __device__ void rescale(Part<ROWS>& my, double scale) const {
    my.total *= scale;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float power = __shfl_sync(0xffffffffu, static_cast<float>(scale), r * TR * Part<ROWS>::LANES);
      if (power == 1.0f) continue;
#pragma unroll
      for (int q = 0; q < Q; ++q) my.sum[r][q] *= power, my.excess[r][q] *= power;
    }
  }

  // The same where a group begins within a part: no power of two.
  template <int ROWS>
  __device__ __noinline__ void rescale_exactly(Part<ROWS>& my, double scale) const {
    my.total *= scale;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const double by = __shfl_sync(0xffffffffu, scale, r * TR * Part<ROWS>::LANES);
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        const double scaled = by * (static_cast<double>(my.sum[r][q]) - my.excess[r][q]);
        my.sum[r][q] = static_cast<float>(scaled);
        my.excess[r][q] = static_cast<float>(my.sum[r][q] - scaled);
      }
    }
  }

  // Kahan's step.
  __device__ static void add(float& sum, float& excess, float value) {
    const float corrected = value - excess, next = sum + corrected;
    excess = (next - sum) - corrected;
    sum = next;
  }

  // A tile in registers: as differences d_j where there is room for them, else as it is stored.
  template <int ROWS>
  struct Held {
    static constexpr bool AS_DIFFERENCES = (3 * ROWS + TR) * Q <= 112;
    float differences[AS_DIFFERENCES ? TR : 1][AS_DIFFERENCES ? Q : 1];
    uint4 raw[AS_DIFFERENCES ? 1 : TR][AS_DIFFERENCES ? 1 : SLOTS];

    __device__ void get(int j, int s, const float (&c)[EV], float (&out)[EV]) const {
      if constexpr (AS_DIFFERENCES) {
#pragma unroll
        for (int k = 0; k < EV; ++k) out[k] = differences[j][s * EV + k];
      } else {
        unpack<T, EV>(raw[j][s], out);
#pragma unroll
        for (int k = 0; k < EV; ++k) out[k] -= c[k];
      }
    }
  };

  // Beyond the end of the tile, or of D: differences of zero.
  template <int ROWS>
  __device__ void take_tile(const Part<ROWS>& my, const T* refs, int count, int tid, Held<ROWS>& held) const {
    uint4 raw[TR][SLOTS];
    const T* const from = refs + element(tid, 0);
    if (count == TR && element(tid, SLOTS - 1) < length) {
#pragma unroll
      for (int j = 0; j < TR; ++j) {
#pragma unroll
        for (int s = 0; s < SLOTS; ++s)
          raw[j][s] = *reinterpret_cast<const uint4*>(from + j * layout.slice + s * THREADS * EV);
      }
    } else {
#pragma unroll
      for (int j = 0; j < TR; ++j) {
#pragma unroll
        for (int s = 0; s < SLOTS; ++s) {
          raw[j][s] = my.c[s];
          if (j < count && element(tid, s) < length)
            raw[j][s] = *reinterpret_cast<const uint4*>(from + j * layout.slice + s * THREADS * EV);
        }
      }
    }
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      float c[EV];
      if constexpr (Held<ROWS>::AS_DIFFERENCES) unpack<T, EV>(my.c[s], c);
#pragma unroll
      for (int j = 0; j < TR; ++j) {
        if constexpr (Held<ROWS>::AS_DIFFERENCES) {
          float v[EV];
          unpack<T, EV>(raw[j][s], v);
#pragma unroll
          for (int k = 0; k < EV; ++k) held.differences[j][s * EV + k] = v[k] - c[k];
        } else {
          held.raw[j][s] = raw[j][s];
        }
      }
    }
  }

  template <int ROWS>
  __device__ void add_tile(Part<ROWS>& my, const Held<ROWS>& held, float p) const {
    float weights[ROWS][TR];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int j = 0; j < TR; ++j)
        weights[r][j] = __shfl_sync(0xffffffffu, p, (r * TR + j) * Part<ROWS>::LANES);
    }
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      float c[EV], some[ROWS][EV] = {};
      if constexpr (!Held<ROWS>::AS_DIFFERENCES) unpack<T, EV>(my.c[s], c);
#pragma unroll
      for (int j = 0; j < TR; ++j) {
        float d[EV];
        held.get(j, s, c, d);
#pragma unroll
        for (int k = 0; k < EV; ++k) {
#pragma unroll
          for (int r = 0; r < ROWS; ++r) some[r][k] = fmaf(weights[r][j], d[k], some[r][k]);
        }
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int k = 0; k < EV; ++k) add(my.sum[r][s * EV + k], my.excess[r][s * EV + k], some[r][k]);
      }
    }
  }

  template <int ROWS>
  __device__ void score_tile(const Part<ROWS>& my, const Held<ROWS>& held, float (&shares)[ROWS * TR]) const {
    float norm[TR] = {};
#pragma unroll
    for (int i = 0; i < ROWS * TR; ++i) shares[i] = 0;
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      float c[EV];
      if constexpr (!Held<ROWS>::AS_DIFFERENCES) unpack<T, EV>(my.c[s], c);
#pragma unroll
      for (int j = 0; j < TR; ++j) {
        float d[EV];
        held.get(j, s, c, d);
#pragma unroll
        for (int k = 0; k < EV; ++k) {
          norm[j] = fmaf(d[k], d[k], norm[j]);
#pragma unroll
          for (int r = 0; r < ROWS; ++r)
            shares[r * TR + j] = fmaf(my.y[r][s * EV + k], d[k], shares[r * TR + j]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int j = 0; j < TR; ++j) shares[r * TR + j] = fmaf(-my.half_alpha[r], norm[j], shares[r * TR + j]);
    }
  }

  // Each row's own source, as a tile of one reference per row.
  template <int ROWS>
  __device__ __noinline__ void take_sources(Part<ROWS>& my, const UnitRows<R>& unit, int begins, Place& at,
                                            int tid) const {
    const auto difference = [&](int r, float (&out)[Q]) {
      load_elements(in.source, unit.rows[r].index, tid, out);
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        float c[EV];
        unpack<T, EV>(my.c[s], c);
#pragma unroll
        for (int k = 0; k < EV; ++k) out[s * EV + k] -= c[k];
      }
    };
    float shares[ROWS * TR] = {};
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (r >= unit.count) continue;
      float d[Q], share = 0;
      difference(r, d);
#pragma unroll
      for (int q = 0; q < Q; ++q) share = fmaf(fmaf(-my.half_alpha[r], d[q], my.y[r][q]), d[q], share);
      shares[r * TR] = share;
    }
    double square = 0;
    const float score = exchange<ROWS>(shares, begins, square, at, tid);
    const int lane = tid % 32;
    const bool valid = lane / Part<ROWS>::LANES % TR < 1;
    const double scale = raise(my, score, valid, begins, square, row_of_lane<ROWS>(unit, lane));
    if (!begins) rescale(my, scale);
    const float p = weigh(my, score, valid);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float weight = __shfl_sync(0xffffffffu, p, r * TR * Part<ROWS>::LANES);
      if (r >= unit.count) continue;
      float d[Q];
      difference(r, d);
#pragma unroll
      for (int q = 0; q < Q; ++q) add(my.sum[r][q], my.excess[r][q], weight * d[q]);
    }
  }

  // From the first tile of a part, which is in the ring, to its last. What is rare works on copies in memory,
  // so that the loop has its registers for itself: what spills there comes back from the L2, since shared
  // memory leaves no L1 to speak of.
  template <int ROWS>
  __device__ void run_part(const BulkTile& first, Place& at, int tid) const {
    Part<ROWS> my;
    const UnitRows<R>& unit = shared.units[at.unit];
    const int number = first.unit, starts = first.flags();
    begin_part(my, unit, tid % 32);
    const auto rarely = [&](const auto& work) {
      const Bulk kernel = *this;
      Part<ROWS> copy = my;
      work(kernel, copy);
      my = copy;
    };
    int flags = starts, count = first.count();
    for (;;) {
      int begins = flags & (GROUP_BEGIN | PART_BEGIN);
      const T* const refs = stage(at.stage);
      if (begins) {
        if (begins == GROUP_BEGIN)
          rarely([&](const Bulk& kernel, Part<ROWS>& copy) { kernel.move_sums(copy, refs, tid); });
        const int64_t centre = count > 0 ? shared.ring[at.stage].reference : -1;
        rarely([&](const Bulk& kernel, Part<ROWS>& copy) {
          kernel.take_centre(copy, centre, unit, refs, at.exchanges & 1, tid);
        });
      }
      Held<ROWS> held;
      take_tile(my, refs, count, tid, held);
      give_back(at, tid);
      if (count > 0) {
        float shares[ROWS * TR];
        score_tile(my, held, shares);
        double square = 0;
        const float score = exchange<ROWS>(shares, begins, square, at, tid);
        const int lane = fresh_thread() % 32;
        const bool valid = lane / Part<ROWS>::LANES % TR < count;
        if (__any_sync(0xffffffffu, valid && score > my.base) || begins) {
          const double scale = raise(my, score, valid, begins, square, row_of_lane<ROWS>(unit, lane));
          if (begins == GROUP_BEGIN) {
            rarely([&](const Bulk& kernel, Part<ROWS>& copy) { kernel.rescale_exactly(copy, scale); });
          } else if (!begins) {
            rescale(my, scale);
          }
        }
        const float p = weigh(my, score, valid);
        if (__any_sync(0xffffffffu, !(p < NO_WEIGHT))) add_tile(my, held, p);
        begins = 0;
      }
      if (flags & UNIT_END && in.source.data)
        rarely([&](const Bulk& kernel, Part<ROWS>& copy) {
          Place there = at;
          kernel.take_sources(copy, unit, begins, there, tid);
          at.exchanges = there.exchanges;
        });
      if (flags & PART_END) break;
      wait_barrier(&shared.full[at.stage], at.phase);
      const int word = shared.ring[at.stage].word;
      flags = word >> 8, count = word & 0xff;
    }
    rarely([&](const Bulk& kernel, Part<ROWS>& copy) {
      kernel.finish_part(copy, unit, number, starts & UNIT_BEGIN, starts & UNIT_BEGIN && flags & UNIT_END,
                         tid);
    });
  }

  __device__ void consume(int tid) const {
    write_dead_rows(tid);
    Place at;
    for (;;) {
      wait_barrier(&shared.full[at.stage], at.phase);
      const BulkTile tile = shared.ring[at.stage];
      if (tile.flags() & LIST_DONE) return;
      wait_barrier(&shared.told[at.unit], at.unit_phase);
      if (R > 1 && shared.units[at.unit].count > 1) {
        run_part<R>(tile, at, tid);
      } else {
        run_part<1>(tile, at, tid);
      }
      __syncwarp();
      if (tid % 32 == 0) arrive(&shared.done[at.unit]);
      if (++at.unit == UNIT_SLOTS) at.unit = 0, at.unit_phase ^= 1;
    }
  }

  // The unit leaves this team: its rows are written, or merged with what other teams left, or left to them.
  template <int ROWS>
  __device__ __noinline__ void finish_part(const Part<ROWS>& my, const UnitRows<R>& unit, int number,
                                           bool unit_begins, bool whole, int tid) const {
    bool merges = whole;
    int64_t from = team, to = team;
    if (!whole) {
      from = ranges.first_team(list, number), to = ranges.last_team(list, number);
      int* const arrived = parts.arrived + static_cast<int64_t>(number) * layout.slices + rank;
      const auto all_others = [&](int count) {  // asked by one thread, answered to all
        if (tid == 0) shared.arrived = count;
        named_barrier(1, THREADS);
        const bool answer = layout.merge_last && shared.arrived == to - from;
        named_barrier(1, THREADS);
        return answer;
      };
      if (tid == 0) wait_for_previous_launch();  // which sets the counts to zero
      merges = all_others(tid == 0 && layout.merge_last ? read_arrivals(arrived) : 0);
      if (!merges) {  // the last to come need not leave its part
        leave_part(my, unit, 2 * static_cast<int64_t>(blockIdx.x) + (unit_begins ? 1 : 0), tid);
        if (!layout.merge_last) return;
        __threadfence();
        named_barrier(1, THREADS);
        int before = 0;
        if (tid == 0) before = atomicAdd(arrived, 1), __threadfence();
        merges = all_others(before);
      }
    }
    if (!merges) return;
#pragma unroll 1
    for (int r = 0; r < unit.count; ++r) merge_row(my, r, unit.rows[r], from, to, whole, tid);
  }

  template <int ROWS>
  __device__ static double log2_weight_of(const Part<ROWS>& my, int r) {
    return __shfl_sync(0xffffffffu, my.top - my.shift, r * TR * Part<ROWS>::LANES);
  }

  template <int ROWS>
  __device__ void leave_part(const Part<ROWS>& my, const UnitRows<R>& unit, int64_t slot, int tid) const {
#pragma unroll 1
    for (int r = 0; r < unit.count; ++r) {
      const double total = total_of(my, r), log2_weight = log2_weight_of(my, r);
      if (tid == 0) parts.rows[slot * R + r] = {log2_weight, total, my.centre};
      float* const sums = parts.sums + (slot * R + r) * layout.slice;
#pragma unroll
      for (int q = 0; q < Q; q += 4) {
        const int e = element(tid, q / EV) + q % EV;
        const auto sum = [&](int k) { return my.sum[r][q + k] - my.excess[r][q + k]; };
        if (e < length) *reinterpret_cast<float4*>(sums + e) = make_float4(sum(0), sum(1), sum(2), sum(3));
      }
    }
  }

  // out = a x + b mean for row r of a unit, over its teams, always in their order: who comes last makes no
  // difference. lse where it is asked for.
  template <int ROWS>
  __device__ void merge_row(const Part<ROWS>& my, int r, const BulkRow& row, int64_t from, int64_t to,
                            bool whole, int tid) const {
    const double own_total = total_of(my, r), own_weight = log2_weight_of(my, r);
    const auto part_of = [&](int64_t t) {
      return (2 * (t * layout.slices + rank) + (t == from ? 1 : 0)) * R + r;
    };
    const auto weight_of = [&](int64_t t) {
      return t == team ? own_weight : __ldcg(&parts.rows[part_of(t)].log2_weight);
    };
    double best = own_weight;
#pragma unroll 1
    for (int64_t t = from; t <= to; ++t) {
      const double other = weight_of(t);
      best = best >= other || other != other ? best : other;
    }
    double sum[Q] = {}, all = 0;
#pragma unroll 1
    for (int64_t t = from; t <= to; ++t) {
      const bool own = t == team;
      const PartRow* const part = parts.rows + part_of(t);
      const double weight = power(weight_of(t) - best);
      const double share = weight * (own ? own_total : __ldcg(&part->total));
      const int64_t centre = own ? -1 : __ldcg(&part->centre);
      const float* const sums = parts.sums + part_of(t) * layout.slice;
      const T* const reference = static_cast<const T*>(in.refs.data) + centre * in.d + offset;
      all += share;
      uint4 raw[SLOTS];
      float4 others[Q / 4];
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        raw[s] = own ? my.c[s] : uint4{0, 0, 0, 0};
        if (centre >= 0 && element(tid, s) < length)
          raw[s] = *reinterpret_cast<const uint4*>(reference + element(tid, s));
      }
#pragma unroll
      for (int q = 0; q < Q; q += 4) {
        const int e = element(tid, q / EV) + q % EV;
        if (!own && e < length) others[q / 4] = __ldcg(reinterpret_cast<const float4*>(sums + e));
      }
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        float c[EV];
        unpack<T, EV>(raw[s], c);
#pragma unroll
        for (int k = 0; k < EV; ++k) {
          const int q = s * EV + k;
          const float4& four = others[q / 4];
          double value = q % 4 == 0 ? four.x : q % 4 == 1 ? four.y : q % 4 == 2 ? four.z : four.w;
          if (own) {
            const float high = my.sum[r][q] - my.excess[r][q];
            value = high;  // as it would be read by another team
            if (whole) value = static_cast<double>(my.sum[r][q]) - my.excess[r][q];
          }
          sum[q] = fma(share, static_cast<double>(c[k]), fma(weight, value, sum[q]));
        }
      }
    }
    const double inverse = row.b / all;
    const int64_t base = row.index * in.d + offset;
    const bool fast = in.out.dtype == Dtype::f32 && layout.vectors;
    float x[Q];
    load_elements(in.x, row.index, tid, x);
#pragma unroll
    for (int q = 0; q < Q; ++q)
      x[q] = static_cast<float>(fma(row.a, static_cast<double>(x[q]), inverse * sum[q]));
#pragma unroll
    for (int q = 0; q < Q; q += 4) {
      const int e = element(tid, q / EV) + q % EV;
      const float4 v = make_float4(x[q], x[q + 1], x[q + 2], x[q + 3]);
      if (fast) {
        if (e < length) *reinterpret_cast<float4*>(static_cast<float*>(in.out.data) + base + e) = v;
      } else {
        store_four(in.out, base + e, base + length, v);
      }
    }
    // Plus D/2, which depends on the row alone: typical values stay small, and float32 keeps their digits.
    if (in.lse.data && rank == 0 && tid == 0)
      store_as(in.lse, row.index, log(all) + LOG_2 * best + 0.5 * static_cast<double>(in.d));
  }

  __device__ void write_dead_rows(int tid) const {
    for (int64_t i = list.sizes[1] + team; i < in.n; i += teams) {
      const int64_t index = list.order[i];
      const int64_t base = index * in.d + offset;
      for (int e = 4 * tid; e < length; e += 4 * THREADS)
        store_four(in.out, base + e, base + length, make_float4(NAN, NAN, NAN, NAN));
      if (in.lse.data && rank == 0 && tid == 0) store_as(in.lse, index, NAN);
    }
  }
};

// The consumers get the registers that the producer's warpgroup does not need.
constexpr int PRODUCER_REGISTERS = 56;
constexpr int consumer_registers(int threads, int blocks) {
  const int all = threads + BULK_PRODUCERS, each = 65536 / (all * blocks) / 8 * 8;
  const int left = (each * all - PRODUCER_REGISTERS * BULK_PRODUCERS) / threads / 8 * 8;
  return left < 240 ? left : 240;
}

template <typename T, int THREADS, int Q, int TR, int R, int BLOCKS, bool TEAMS>
__global__ void __launch_bounds__(THREADS + BULK_PRODUCERS, BLOCKS)
    bulk_kernel(const __grid_constant__ Inputs in, const __grid_constant__ UnitList shared_list,
                const __grid_constant__ BulkParts parts, const __grid_constant__ BulkLayout layout) {
  using Kernel = Bulk<T, THREADS, Q, TR, R, TEAMS>;
  extern __shared__ __align__(128) char memory[];
  typename Kernel::Shared& shared = *reinterpret_cast<typename Kernel::Shared*>(memory);
  if (threadIdx.x == 0) {
    for (int s = 0; s < layout.stages; ++s) {
      init_barrier(&shared.full[s], 1);
      init_barrier(&shared.empty[s], Kernel::WARPS);
    }
    for (int slot = 0; slot < TEAM_SLOTS; ++slot) init_barrier(&shared.mailed[slot], 1);
    for (int slot = 0; slot < UNIT_SLOTS; ++slot) {
      init_barrier(&shared.told[slot], 1);
      init_barrier(&shared.done[slot], Kernel::WARPS);
    }
    publish_barriers();
  }
  UnitList list = shared_list;
  char* staging = memory + Kernel::FIXED_BYTES;
  if (layout.own_list) {
    char* const keys = staging;
    const bool for_merge_kernel = !layout.merge_last && blockIdx.x == 0;
    if (!for_merge_kernel) list = place_unit_list(staging + 8 * OWN_LIST_ROWS, in.n, in.k);
    staging += bulk_list_smem(in.n, in.k);
    build_units<uint32_t>(in, list, TR, R, reinterpret_cast<uint32_t*>(keys), shared.scratch);
  } else {
    __syncthreads();
    wait_for_previous_launch();
  }
  if (TEAMS && layout.team == Team::cluster) synchronize_cluster();
  const Kernel kernel{in, list, parts, layout, shared, staging, Ranges(list, gridDim.x / layout.slices)};
  if (threadIdx.x < THREADS) {
    take_registers<consumer_registers(THREADS, BLOCKS)>();
    kernel.consume(threadIdx.x);
  } else {
    give_up_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x < THREADS + 32) {
      kernel.produce(threadIdx.x % 32);
    } else if (threadIdx.x < THREADS + 64) {
      kernel.announce(threadIdx.x % 32);
    }
  }
  if (TEAMS &&
      layout.team == Team::cluster) {  // no block leaves while another may write to its shared memory
    __syncwarp();
    synchronize_cluster();
  }
}

}  // namespace svel::cuda
