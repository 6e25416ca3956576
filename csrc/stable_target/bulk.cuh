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
// Exactness. Scores and sums are of d_j = r_j - c, with c the first reference of the group:
//   s_j = rate (y.d_j - alpha/2 |d_j|^2),  y = x - alpha c,  so that
//   -|x - alpha r_j|^2 / (2 sigma^2) = s_j - |y|^2 / (2 sigma^2).
// Weights are 2^(s_j - top) with `top` an integer no smaller than all scores so far (in units of log 2): when
// it grows, sums are multiplied by a power of two, which rounds nothing. Every 256 references or so, and at
// the end of a group, sums move to memory, where they are kept in float64: so the number of references does
// not matter. |y|^2, in float64 too, tells how groups compare, for rows that take all of them and for lse.
//
// What a team has of a unit is a part in memory. The last team of a unit to finish merges its parts, or
// merge_kernel where few units are cut into many parts.
#pragma once

#include "common/hopper.cuh"
#include "common/planner.h"
#include "stable_target/units.cuh"

namespace svel::cuda {

// 2^-50: a tile whose weights are all below that, beside the best so far, is not added. Of 2^24 such
// references all together are below float32's rounding.
constexpr float NO_WEIGHT = 8.8817841970012523e-16f;
constexpr int TEAM_SLOTS = 4;      // a block of the team may be one tile ahead of another that still reads
constexpr int SEGMENT_REFS = 256;  // summed in float32 before they move to float64

enum BulkTileFlags : int {
  PART_BEGIN = 1,   // first tile of this unit in this team
  GROUP_BEGIN = 2,  // and of this group in this unit: its first reference becomes the centre
  UNIT_BEGIN = 4,   // the unit begins here
  PART_END = 8,     // last tile of this unit in this team
  UNIT_END = 16,    // the unit ends here; sources, where there are any, come after its references
  LIST_DONE = 32,
};

struct BulkTile {
  int64_t centre;  // index of the group's first reference among all k m; -1: the origin
  int word;        // how many references, and BulkTileFlags << 8

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
  int64_t from, to;  // teams that have parts of the unit
  int number;        // of the unit
  int count;
  int squares;  // whether |y|^2 is wanted
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
};

// Parts of units; slot 2b of block b for a unit that began earlier, 2b + 1 for one that begins here.
struct BulkParts {
  double* sums;   // (2 blocks, rows, slice) weighted sums of the references
  PartRow* rows;  // (2 blocks, rows)
  int* arrived;   // (n, slices) teams that have finished their part of a unit; zero at first
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

struct PartState {
  double top;     // weights are 2^(score - top)
  double shift;   // |y|^2 / (2 sigma^2) in units of log 2
  PartRow moved;  // to memory already
};

template <int WARPS, int SCORES, int R>
struct BulkShared {
  static constexpr int PITCH =
      WARPS + 4;  // of a score's shares: sixteen bytes more spread them over the banks

  Barrier full[BULK_MAX_STAGES], empty[BULK_MAX_STAGES], mailed[TEAM_SLOTS];
  Barrier told[UNIT_SLOTS], done[UNIT_SLOTS];
  BulkTile ring[BULK_MAX_STAGES];
  UnitRows<R> units[UNIT_SLOTS];
  // Two of each that is exchanged: a warp is at most one exchange ahead of another that still reads.
  alignas(16) float scores[2][SCORES * PITCH];
  double squares[2][WARPS][R];  // |y|^2
  PartState states[WARPS][R];
  float mail[TEAM_SLOTS][BULK_MAX_CLUSTER][SCORES];
  double mail_squares[TEAM_SLOTS][BULK_MAX_CLUSTER][R];
  float team_scores[2][SCORES];
  double team_squares[2][R];
  int64_t scratch[32];
  int arrived;
};

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

// Thread and lane, read anew: cheaper than to keep what follows from them through a loop that needs all
// registers.
__device__ inline int fresh_thread() {
  int value;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(value));
  return value;
}

// The consumers get the registers that the producer's warpgroup does not need.
constexpr int PRODUCER_REGISTERS = 56;
constexpr int consumer_registers(int threads, int blocks) {
  const int all = threads + BULK_PRODUCERS, each = 65536 / (all * blocks) / 8 * 8;
  const int left = (each * all - PRODUCER_REGISTERS * BULK_PRODUCERS) / threads / 8 * 8;
  return left < 240 ? left : 240;
}

// T: of the references. THREADS consumers own Q elements of D each. TR: references per tile; R: most rows of
// a unit; BLOCKS: per multiprocessor.
template <typename T, int THREADS, int Q, int TR, int R, int BLOCKS, bool TEAMS>
struct Bulk {
  static constexpr int EV = 16 / static_cast<int>(sizeof(T));
  static constexpr int SLOTS = Q / EV, WARPS = THREADS / 32;
  static constexpr int SCORES = R * TR, LETTERS = SCORES + 2 * R;
  static constexpr int SEGMENT_TILES = SEGMENT_REFS / TR;
  using Shared = BulkShared<WARPS, SCORES, R>;
  static constexpr int PITCH = Shared::PITCH;
  static constexpr int64_t FIXED_BYTES = (sizeof(Shared) + 127) / 128 * 128;

  const Inputs& in;
  const UnitList& list;
  const BulkParts& parts;
  const BulkLayout& layout;
  Shared& shared;
  char* const staging;
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

  // All lanes walk alike, and each issues the copy of one reference. `taken`: stages that the ring has seen.
  __device__ void produce(int taken, int lane) const {
    const Ranges ranges(list, teams);
    const uint32_t bytes = static_cast<uint32_t>(length * sizeof(T));
    const uint64_t once = read_once_policy(), usual = usual_policy();
    const char* const base = static_cast<const char*>(in.refs.data) + offset * sizeof(T);
    int s = taken, phase = 1;
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
        const int64_t centre = count > 0 ? group * in.m : -1, beyond = group * in.m + count;
        int64_t reference = group * in.m + (at - group_begin) * TR;
        const char* from = base + (reference + lane) * in.d * static_cast<int64_t>(sizeof(T));
        for (int tiles = static_cast<int>(pause - at); tiles > 0; --tiles) {
          const int many = beyond - reference < TR ? static_cast<int>(beyond - reference) : TR;
          wait_barrier(&shared.empty[s], phase);
          if (lane < many) bulk_copy(stage(s) + lane * layout.slice, from, bytes, &shared.full[s], policy);
          if (lane == 0) {
            shared.ring[s].centre = centre;
            shared.ring[s].word = many | (begins | (tiles == 1 ? ends : 0)) << 8;
          }
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
      shared.ring[s] = {0, LIST_DONE << 8};
      arrive(&shared.full[s]);
    }
  }

  // The announcer: tells the consumers of the rows of each unit, and brings near what will be read of x and
  // of the centre. `taken`: slots that have been used.
  __device__ void announce(int taken, int lane) const {
    const Ranges ranges(list, teams);
    const int64_t begin = ranges.begin(team), end = ranges.begin(team + 1);
    int slot = taken, phase = 1;
    for (int number = begin < end ? find_unit(begin, lane) : list.sizes[0];
         number < list.sizes[0] && list.first_tile[number] < end; ++number) {
      const Unit unit = list.units[number];
      wait_barrier(&shared.done[slot], phase);
      UnitRows<R>& here = shared.units[slot];
      if (lane == 0) {
        here.count = unit.rows, here.number = number;
        here.squares = in.lse.data || unit.group < 0;
        here.from = ranges.first_team(list, number), here.to = ranges.last_team(list, number);
      }
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
      } else if (lane == R && unit.group >= 0 && unit.count > 0) {
        prefetch_bulk(static_cast<const T*>(in.refs.data) + unit.group * in.m * in.d + offset,
                      static_cast<uint32_t>(length * sizeof(T)));
      }
      __syncwarp();
      if (lane == 0) arrive(&shared.told[slot]);
      if (++slot == UNIT_SLOTS) slot = 0, phase ^= 1;
    }
  }

  // A unit of no rows and a tile of whatever the stage holds: the consumers go through it while the list is
  // built, so that their code is at hand when the first references come. By one thread, before the others
  // start.
  __device__ void announce_rehearsal() const {
    UnitRows<R>& unit = shared.units[0];
    unit = {};
    shared.ring[0] = {-1, TR | (PART_BEGIN | GROUP_BEGIN | UNIT_BEGIN | PART_END) << 8};
    arrive(&shared.told[0]);
    arrive(&shared.full[0]);
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
    float sum[ROWS][Q];  // weighted sum of r_j - c
    float half_alpha[ROWS];
    // Of the row of this lane's score, the same in all warps: the largest score, and the integer `top` as
    // base rate + rest; rate in units of log 2; the sum of this lane's own weights.
    float base, rest, rate, total;
    int tiles;
  };

  // What each warp knows of a row and seldom needs.
  template <int ROWS>
  __device__ PartState& state_of(int tid) const {
    return shared.states[tid / 32][tid % 32 / (TR * Part<ROWS>::LANES)];
  }

  template <int ROWS>
  __device__ static const BulkRow& row_of_lane(const UnitRows<R>& unit, int lane) {
    return unit.rows[ROWS == 1 ? 0 : lane / (Part<ROWS>::LANES * TR)];
  }

  // The centre, y = x - alpha c, and where it is wanted |y|^2.
  template <int ROWS>
  __device__ void begin_segment(Part<ROWS>& my, int64_t centre, const UnitRows<R>& unit, int parity,
                                int tid) const {
    my.rate = static_cast<float>(row_of_lane<ROWS>(unit, tid % 32).rate);
    my.base = -INFINITY, my.rest = 0, my.total = 0, my.tiles = 0;
    PartState& state = state_of<ROWS>(tid);
    state.top = -INFINITY, state.shift = 0;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) my.half_alpha[r] = r < unit.count ? unit.rows[r].half_alpha : 0.0f;
    const T* const from = static_cast<const T*>(in.refs.data) + centre * in.d + offset;
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      my.c[s] = uint4{0, 0, 0, 0};
      if (centre >= 0 && element(tid, s) < length)
        my.c[s] = *reinterpret_cast<const uint4*>(from + element(tid, s));
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int q = 0; q < Q; ++q) my.sum[r][q] = 0;
      if (r > 0 && r >= unit.count) continue;
      load_elements(in.x, unit.rows[r].index, tid, my.y[r]);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const BulkRow& row = unit.rows[r];
      const float sign = row.sign, high = row.high_alpha, rest = row.rest_alpha;
      double square = 0;
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        float c[EV];
        unpack<T, EV>(my.c[s], c);
        if (unit.squares) {
#pragma unroll
          for (int k = 0; k < EV; ++k) {
            const double exact =
                fma(-row.alpha, static_cast<double>(c[k]), static_cast<double>(sign * my.y[r][s * EV + k]));
            square = fma(exact, exact, square);
          }
        }
#pragma unroll
        for (int k = 0; k < EV; ++k) {
          float& y = my.y[r][s * EV + k];
          y = r < unit.count ? fmaf(-rest, c[k], fmaf(-high, c[k], sign * y)) : 0.0f;
        }
      }
      if (unit.squares) {
        square = sum_over_lanes(square, 32);
        if (tid % 32 == 0) shared.squares[parity][tid / 32][r] = square;
      }
    }
  }

  // From this thread's shares of the scores of a tile to their sums over the team, each in its lanes. With
  // `squares`, where a group begins, |y|^2 of the lane's row too.
  template <int ROWS>
  __device__ float exchange(const UnitRows<R>& unit, float (&shares)[ROWS * TR], bool squares, Place& at,
                            int tid) const {
    constexpr int COUNT = Part<ROWS>::COUNT, LANES = Part<ROWS>::LANES;
    const int thread = fresh_thread();
    const int lane = thread % 32, warp = thread / 32, value = lane / LANES, row = value / TR;
    const int parity = at.exchanges & 1;
    const float share = sum_over_warp<COUNT>(shares, lane);
    if (lane % LANES == 0) shared.scores[parity][value * PITCH + warp] = share;
    named_barrier(1, THREADS);
    const float4* const from = reinterpret_cast<const float4*>(&shared.scores[parity][value * PITCH]);
    float score = 0;
#pragma unroll
    for (int w = 0; w < WARPS / 4; ++w) {
      const float4 four = from[w];
      score += (four.x + four.y) + (four.z + four.w);
    }
    double square = 0;
    if (squares) {
      for (int w = 0; w < WARPS; ++w) square += shared.squares[parity][w][row];
    }
    if constexpr (TEAMS) {
      if (layout.team == Team::cluster) {
        exchange_in_cluster<ROWS>(score, squares, square, at.exchanges, tid);
      } else {
        exchange_in_grid<ROWS>(score, squares, square, at.exchanges, tid);
      }
    }
    ++at.exchanges;
    if (squares) state_of<ROWS>(thread).shift = row_of_lane<ROWS>(unit, lane).per_square * square;
    return score;
  }

  template <int ROWS>
  __device__ void exchange_in_cluster(float& score, bool squares, double& square, int number, int tid) const {
    constexpr int COUNT = Part<ROWS>::COUNT, LANES = Part<ROWS>::LANES;
    const int lane = tid % 32, value = lane / LANES, row = value / TR, slot = number % TEAM_SLOTS;
    Barrier* const mailed = &shared.mailed[slot];
    if (tid < 32) {
      for (int peer = lane % LANES; peer < layout.slices; peer += LANES) {
        store_in_cluster(&shared.mail[slot][rank][value], mailed, peer, score);
        if (squares && value % TR == 0)
          store_in_cluster(&shared.mail_squares[slot][rank][row], mailed, peer, square);
      }
      if (lane == 0) arrive_expecting(mailed, layout.slices * (4 * COUNT + (squares ? 8 * ROWS : 0)));
    }
    wait_barrier(mailed, number / TEAM_SLOTS & 1);
    score = 0;
    for (int peer = lane % LANES; peer < layout.slices; peer += LANES)
      score += shared.mail[slot][peer][value];
    score = sum_over_lanes(score, LANES);
    if (!squares) return;
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
  __device__ void exchange_in_grid(float& score, bool squares, double& square, int number, int tid) const {
    constexpr int LANES = Part<ROWS>::LANES;
    const int lane = tid % 32, value = lane / LANES, row = value / TR, parity = number & 1;
    if (tid < 32) {
      uint2* const box = parts.mail + (team * TEAM_SLOTS + number % TEAM_SLOTS) * layout.slices * LETTERS;
      uint2* const own = box + rank * LETTERS;
      const unsigned tag = static_cast<unsigned>(number) + 1;
      if (lane % LANES == 0) {
        post_letter(own + value, make_uint2(__float_as_uint(score), tag));
        if (squares && value % TR == 0) {
          post_letter(own + SCORES + 2 * row, make_uint2(__double2loint(square), tag));
          post_letter(own + SCORES + 2 * row + 1, make_uint2(__double2hiint(square), tag));
        }
      }
      score = collect(box, value, tag, lane, LANES);
      if (lane % LANES == 0) shared.team_scores[parity][value] = score;
      if (squares) {
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
    if (squares) square = shared.team_squares[parity][row];
  }

  // What a larger score asks for: `top` and what follows from it. The scale for what is summed already.
  template <int ROWS>
  __device__ float raise(Part<ROWS>& my, float score, bool valid, int tid) const {
    float best = valid ? score : -INFINITY;
#pragma unroll
    for (int hop = Part<ROWS>::LANES; hop < Part<ROWS>::LANES * TR; hop *= 2)
      best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, hop));
    if (!(best > my.base)) return 1;
    PartState& state = state_of<ROWS>(tid);
    const double bound = static_cast<double>(best) * my.rate, before = state.top;
    const double top = fmax(ceil(bound), before);
    my.base = best;
    my.rest = static_cast<float>(top - bound);
    state.top = top;
    return power_of_two(before - top);
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
  __device__ void rescale(Part<ROWS>& my, float scale) const {
    my.total *= scale;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float power = __shfl_sync(0xffffffffu, scale, r * TR * Part<ROWS>::LANES);
#pragma unroll
      for (int q = 0; q < Q; ++q) my.sum[r][q] *= power;
    }
  }

  // From a tile's scores to its weights.
  template <int ROWS>
  __device__ float take_scores(Part<ROWS>& my, float score, int count, int tid) const {
    const bool valid = tid % 32 / Part<ROWS>::LANES % TR < count;
    if (__any_sync(0xffffffffu, valid && score > my.base)) rescale(my, raise(my, score, valid, tid));
    return weigh(my, score, valid);
  }

  // A tile as the consumers have it: differences d_j in registers where there is room for them, so that its
  // stage is free at once; else still in its stage. Beyond the end of the tile, or of D, they are zero.
  template <int ROWS>
  struct Tile {
    static constexpr bool HELD =
        (2 * ROWS + TR + 1) * Q + 4 * SLOTS <= consumer_registers(THREADS, BLOCKS) - 34;
    float differences[HELD ? TR : 1][HELD ? Q : 1];
    const T* refs;  // from this thread's first element on
    int count;
  };

  // The d_j of 16 bytes of each reference, one after the other: visit(j, d).
  template <int ROWS, typename Visit>
  __device__ void for_each(const Part<ROWS>& my, const Tile<ROWS>& tile, int s, int tid,
                           const Visit& visit) const {
    if constexpr (Tile<ROWS>::HELD) {
#pragma unroll
      for (int j = 0; j < TR; ++j) {
        float d[EV];
#pragma unroll
        for (int k = 0; k < EV; ++k) d[k] = tile.differences[j][s * EV + k];
        visit(j, d);
      }
    } else {
      read_tile(my, tile, s, tid, visit);
    }
  }

  template <int ROWS, typename Visit>
  __device__ void read_tile(const Part<ROWS>& my, const Tile<ROWS>& tile, int s, int tid,
                            const Visit& visit) const {
    const bool within = element(tid, s) < length;
    uint4 centre = my.c[s];
    // Not converted once and for all before the loop: two rows leave no registers for that.
    if constexpr (!Tile<ROWS>::HELD)
      asm volatile("" : "+r"(centre.x), "+r"(centre.y), "+r"(centre.z), "+r"(centre.w));
    float c[EV];
    unpack<T, EV>(centre, c);
#pragma unroll
    for (int j = 0; j < TR; ++j) {
      uint4 raw = my.c[s];
      if (within && j < tile.count)
        raw = *reinterpret_cast<const uint4*>(tile.refs + j * layout.slice + s * THREADS * EV);
      float d[EV];
      unpack<T, EV>(raw, d);
#pragma unroll
      for (int k = 0; k < EV; ++k) d[k] -= c[k];
      visit(j, d);
      if constexpr (!Tile<ROWS>::HELD) asm volatile("" ::: "memory");  // one after the other
    }
  }

  template <int ROWS>
  __device__ void take_tile(const Part<ROWS>& my, const T* refs, int count, int tid, Tile<ROWS>& tile) const {
    tile.refs = refs + element(tid, 0), tile.count = count;
    if constexpr (Tile<ROWS>::HELD) {
#pragma unroll
      for (int s = 0; s < SLOTS; ++s)
        read_tile(my, tile, s, tid, [&](int j, const float (&d)[EV]) {
#pragma unroll
          for (int k = 0; k < EV; ++k) tile.differences[j][s * EV + k] = d[k];
        });
    }
  }

  template <int ROWS>
  __device__ void score_tile(const Part<ROWS>& my, const Tile<ROWS>& tile, int tid,
                             float (&shares)[ROWS * TR]) const {
    float norm[TR] = {};
#pragma unroll
    for (int i = 0; i < ROWS * TR; ++i) shares[i] = 0;
#pragma unroll
    for (int s = 0; s < SLOTS; ++s)
      for_each(my, tile, s, tid, [&](int j, const float (&d)[EV]) {
#pragma unroll
        for (int k = 0; k < EV; ++k) {
          norm[j] = fmaf(d[k], d[k], norm[j]);
#pragma unroll
          for (int r = 0; r < ROWS; ++r)
            shares[r * TR + j] = fmaf(my.y[r][s * EV + k], d[k], shares[r * TR + j]);
        }
      });
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int j = 0; j < TR; ++j) shares[r * TR + j] = fmaf(-my.half_alpha[r], norm[j], shares[r * TR + j]);
    }
  }

  template <int ROWS>
  __device__ void add_tile(Part<ROWS>& my, const Tile<ROWS>& tile, int tid, float p) const {
    float weights[ROWS][TR];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int j = 0; j < TR; ++j)
        weights[r][j] = __shfl_sync(0xffffffffu, p, (r * TR + j) * Part<ROWS>::LANES);
    }
#pragma unroll
    for (int s = 0; s < SLOTS; ++s)
      for_each(my, tile, s, tid, [&](int j, const float (&d)[EV]) {
#pragma unroll
        for (int k = 0; k < EV; ++k) {
#pragma unroll
          for (int r = 0; r < ROWS; ++r) {
            float& sum = my.sum[r][s * EV + k];
            sum = fmaf(weights[r][j], d[k], sum);
          }
        }
      });
  }

  // Each row's own source, as a tile of one reference per row.
  template <int ROWS>
  __device__ void add_sources(Part<ROWS>& my, const UnitRows<R>& unit, bool squares, Place& at,
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
      shares[r * TR] = fmaf(share, 0.0f, share);  // what is not finite becomes NaN, in all of the row
    }
    const float score = exchange<ROWS>(unit, shares, squares, at, tid);
    const float p = take_scores(my, score, 1, tid);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float weight = __shfl_sync(0xffffffffu, p, r * TR * Part<ROWS>::LANES);
      if (r >= unit.count) continue;
      float d[Q];
      difference(r, d);
#pragma unroll
      for (int q = 0; q < Q; ++q) my.sum[r][q] = fmaf(weight, d[q], my.sum[r][q]);
    }
  }

  __device__ int64_t slot_of(int64_t at_team, bool begins, int64_t at_rank) const {
    return 2 * (at_team * layout.slices + at_rank) + (begins ? 1 : 0);
  }

  // What is summed since the last time moves to the part in memory, in float64.
  template <int ROWS>
  __device__ void flush(Part<ROWS>& my, const UnitRows<R>& unit, int64_t slot, int tid) const {
    double total = my.total;
    for (int hop = Part<ROWS>::LANES; hop < Part<ROWS>::LANES * TR; hop *= 2)
      total += __shfl_xor_sync(0xffffffffu, total, hop);
    PartState& state = state_of<ROWS>(tid);
    const PartRow moved = state.moved;
    const double now = state.top - state.shift, best = moved.log2_weight >= now ? moved.log2_weight : now;
    const double old_scale = exp2(moved.log2_weight - best), scale = exp2(now - best);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      constexpr int LANES_OF_ROW = TR * Part<ROWS>::LANES;
      const double by = __shfl_sync(0xffffffffu, scale, r * LANES_OF_ROW);
      const double share = by * __shfl_sync(0xffffffffu, total, r * LANES_OF_ROW);
      const double before = __shfl_sync(0xffffffffu, old_scale, r * LANES_OF_ROW);
      if (r >= unit.count) continue;
      double* const sums = parts.sums + (slot * R + r) * layout.slice;
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        const int e = element(tid, s);
        if (e >= length) continue;
        float c[EV];
        unpack<T, EV>(my.c[s], c);
#pragma unroll
        for (int k = 0; k < EV; k += 2) {
          double2* const to = reinterpret_cast<double2*>(sums + e + k);
          double2 v = make_double2(0, 0);
          if (before != 0) v = __ldcg(to);
          const float* const sum = &my.sum[r][s * EV + k];
          v.x = fma(before, v.x, fma(by, static_cast<double>(sum[0]), share * c[k]));
          v.y = fma(before, v.y, fma(by, static_cast<double>(sum[1]), share * c[k + 1]));
          __stcg(to, v);
        }
      }
    }
    __syncwarp();
    state.moved = {best, old_scale * moved.total + scale * total};
  }

  // From the first tile of a part, which is in the ring, to its last. In segments, after each of which sums
  // move to memory: then nothing but the segment's own tiles needs registers.
  template <int ROWS>
  __device__ void run_part(const BulkTile& first, Place& at, int tid) const {
    const UnitRows<R>& unit = shared.units[at.unit];
    const int64_t slot = slot_of(team, first.flags() & UNIT_BEGIN, rank);
    state_of<ROWS>(tid).moved = {-INFINITY, 0};
    int flags = first.flags(), count = first.count();
    bool ended = false;
    do {
      Part<ROWS> my;
      begin_segment(my, shared.ring[at.stage].centre, unit, at.exchanges & 1, tid);
      bool squares = unit.squares;
      for (;;) {
        Tile<ROWS> tile;
        take_tile(my, stage(at.stage), count, tid, tile);
        if (Tile<ROWS>::HELD) give_back(at, tid);
        if (count > 0) {
          float shares[ROWS * TR];
          score_tile(my, tile, tid, shares);
          const float score = exchange<ROWS>(unit, shares, squares, at, tid);
          const float p = take_scores(my, score, count, fresh_thread());
          if (__any_sync(0xffffffffu, !(p < NO_WEIGHT))) add_tile(my, tile, tid, p);
          squares = false;
        }
        if (!Tile<ROWS>::HELD) give_back(at, tid);
        ended = flags & PART_END;
        if (ended) break;
        wait_barrier(&shared.full[at.stage], at.phase);
        const int word = shared.ring[at.stage].word;
        flags = word >> 8, count = word & 0xff;
        if (++my.tiles == SEGMENT_TILES || flags & GROUP_BEGIN) break;
      }
      if (ended && flags & UNIT_END && in.source.data) add_sources(my, unit, squares, at, tid);
      flush(my, unit, slot, tid);
    } while (!ended);
    const int lane = tid % 32, row = lane / (TR * Part<ROWS>::LANES);
    if (tid < 32 && lane % (TR * Part<ROWS>::LANES) == 0 && row < unit.count)
      parts.rows[slot * R + row] = state_of<ROWS>(tid).moved;
    if (unit.count > 0) finish_unit(unit, tid);
  }

  __device__ void consume(int tid) const {
    Place at;
    for (;;) {
      wait_barrier(&shared.full[at.stage], at.phase);
      const BulkTile tile = shared.ring[at.stage];
      if (tile.flags() & LIST_DONE) break;
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
    write_dead_rows(tid);
  }

  // This team's part of the unit is in memory: who comes last merges all parts.
  __device__ __noinline__ void finish_unit(const UnitRows<R>& unit, int tid) const {
    bool last = true;
    if (unit.from == unit.to) {
      named_barrier(1, THREADS);
    } else {
      if (!layout.merge_last) return;
      __threadfence();
      named_barrier(1, THREADS);
      if (tid == 0) {
        wait_for_previous_launch();  // which sets the counts to zero
        int* const arrived = parts.arrived + static_cast<int64_t>(unit.number) * layout.slices + rank;
        shared.arrived = atomicAdd(arrived, 1);
        __threadfence();
      }
      named_barrier(1, THREADS);
      last = shared.arrived == unit.to - unit.from;
    }
    if (!last) return;
#pragma unroll 1
    for (int r = 0; r < unit.count; ++r) merge_row(r, unit, tid);
  }

  // out = a x + b mean for row r of a unit, over its teams, always in their order: who comes last makes no
  // difference. lse where it is asked for.
  __device__ void merge_row(int r, const UnitRows<R>& unit, int tid) const {
    const BulkRow& row = unit.rows[r];
    const auto part_of = [&](int64_t t) { return slot_of(t, t == unit.from, rank) * R + r; };
    double best = -INFINITY;
#pragma unroll 1
    for (int64_t t = unit.from; t <= unit.to; ++t) {
      const double other = __ldcg(&parts.rows[part_of(t)].log2_weight);
      best = best >= other || other != other ? best : other;
    }
    float x[Q];
    load_elements(in.x, row.index, tid, x);
    double sum[Q] = {}, all = 0;
#pragma unroll 1
    for (int64_t t = unit.from; t <= unit.to; ++t) {
      const PartRow* const part = parts.rows + part_of(t);
      const double weight = exp2(__ldcg(&part->log2_weight) - best);
      all = fma(weight, __ldcg(&part->total), all);
      const double* const sums = parts.sums + part_of(t) * layout.slice;
#pragma unroll
      for (int q = 0; q < Q; q += 2) {
        const int e = element(tid, q / EV) + q % EV;
        if (e >= length) continue;
        const double2 v = __ldcg(reinterpret_cast<const double2*>(sums + e));
        sum[q] = fma(weight, v.x, sum[q]), sum[q + 1] = fma(weight, v.y, sum[q + 1]);
      }
    }
    const double inverse = row.b / all;
    const int64_t base = row.index * in.d + offset;
    const Array out = out_of(in, row.index);
    const bool fast = out.dtype == Dtype::f32 && layout.vectors;
#pragma unroll
    for (int q = 0; q < Q; ++q)
      x[q] = static_cast<float>(fma(row.a, static_cast<double>(x[q]), inverse * sum[q]));
#pragma unroll
    for (int q = 0; q < Q; q += 4) {
      const int e = element(tid, q / EV) + q % EV;
      const float4 v = make_float4(x[q], x[q + 1], x[q + 2], x[q + 3]);
      if (fast) {
        if (e < length) *reinterpret_cast<float4*>(static_cast<float*>(out.data) + base + e) = v;
      } else {
        store_four(out, base + e, base + length, v);
      }
    }
    // Plus D/2, which depends on the row alone: typical values stay small, and float32 keeps their digits.
    if (in.lse.data && rank == 0 && tid == 0)
      store_as(lse_of(in, row.index), row.index, log(all) + LOG_2 * best + 0.5 * static_cast<double>(in.d));
  }

  __device__ __noinline__ void write_dead_rows(int tid) const {
    for (int64_t i = list.sizes[1] + team; i < in.n; i += teams) {
      const int64_t index = list.order[i];
      const int64_t base = index * in.d + offset;
      for (int e = 4 * tid; e < length; e += 4 * THREADS)
        store_four(out_of(in, index), base + e, base + length, make_float4(NAN, NAN, NAN, NAN));
      if (in.lse.data && rank == 0 && tid == 0) store_as(lse_of(in, index), index, NAN);
    }
  }
};

template <typename T, int THREADS, int Q, int TR, int R, int BLOCKS, bool TEAMS>
__global__ void __launch_bounds__(THREADS + BULK_PRODUCERS, BLOCKS)
    bulk_kernel(const __grid_constant__ Inputs in, const __grid_constant__ UnitList shared_list,
                const __grid_constant__ BulkParts parts, const __grid_constant__ BulkLayout layout) {
  using Kernel = Bulk<T, THREADS, Q, TR, R, BLOCKS, TEAMS>;
  extern __shared__ __align__(128) char memory[];
  typename Kernel::Shared& shared = *reinterpret_cast<typename Kernel::Shared*>(memory);
  UnitList list = shared_list;
  char* staging = memory + Kernel::FIXED_BYTES;
  char* const list_memory = staging;
  if (layout.own_list) {
    // Where merge_kernel follows, one block leaves the list in memory for it.
    if (layout.merge_last || blockIdx.x > 0) list = place_unit_list(staging + 12 * OWN_LIST_ROWS, in.n, in.k);
    staging += bulk_list_smem(in.n, in.k);
  }
  const Kernel kernel{in, list, parts, layout, shared, staging};
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
    kernel.announce_rehearsal();
  }
  __syncthreads();
  if (TEAMS && layout.team == Team::cluster) synchronize_cluster();
  if (threadIdx.x < THREADS) {
    take_registers<consumer_registers(THREADS, BLOCKS)>();
    kernel.consume(threadIdx.x);
  } else {
    give_up_registers<PRODUCER_REGISTERS>();
    const int tid = threadIdx.x - THREADS;
    if (layout.own_list) {
      build_few_units(in, list, TR, R, reinterpret_cast<uint32_t*>(list_memory + 8 * OWN_LIST_ROWS),
                      reinterpret_cast<int64_t*>(list_memory), shared.scratch, tid);
    } else {
      wait_for_previous_launch();
    }
    if (tid < 32) {
      kernel.produce(1, tid);
    } else if (tid < 64) {
      kernel.announce(1, tid - 32);
    }
  }
  if (TEAMS &&
      layout.team == Team::cluster) {  // no block leaves while another may write to its shared memory
    __syncwarp();
    synchronize_cluster();
  }
}

}  // namespace svel::cuda
