// One pass over the references on Hopper, bound by memory: per pair of unit and reference D * (bytes per
// element) from device memory through shared memory, and about 5 D + 2 D (rows of the unit) float32
// operations.
//
// Tiles of references of all units form one list, cut into equal ranges, one per team of thread blocks (a
// team is one block, unless D is too long for one: then each block of the team takes a slice of D). In a
// block
//   * one warp, the producer, walks the range and brings tiles into a ring of stages by bulk copies,
//   * half of the other warps, the scorers, form the parts of the tile's scores,
//   * one warp, the weigher, adds the parts up (over the team's blocks too) and runs the online softmax,
//   * the rest, the adders, keep the weighted sums of the unit's rows in registers and add the tile to them,
//     unless none of its weights matters,
// each at its own pace: a tile passes from one to the next while others follow. Scores as in stream.cuh:
// s_j = rate (y.d_j - alpha/2 |d_j|^2), d_j = r_j - c, with c the mean of the first references of the unit.
//
// A unit inside one team's range is finished at once. Of the others the teams leave (max, sum, vector), and
// the team that arrives last merges them, or merge_kernel where few units are cut into many parts.
#pragma once

#include "common/hopper.cuh"
#include "common/planner.h"
#include "stable_target/rows.cuh"

namespace svel::cuda {

constexpr int BULK_CENTRE_REFS = 2;  // references whose mean is the centre
// References summed in float32 before they join a float64 total in device memory: rounding grows with the
// root.
constexpr int BULK_FLUSH_REFS = 128;
// |c|^2 over the references' spread up to which scores from products are exact enough.
constexpr float BULK_COMMON = 16;
// 2^-50: a tile whose weights are all below that, beside the best so far, is not added. Of 2^24 such
// references all together are below float32's rounding.
constexpr float NO_WEIGHT = 8.8817841970012523e-16f;
constexpr int TEAM_SLOTS = 4;  // a block of the team may be one tile ahead of another that still reads

enum BulkTileFlags : int {
  UNIT_BEGIN = 1,    // first tile of this unit in this team: form c and y
  UNIT_CENTRE = 2,   // read for c alone; its references belong to another team
  UNIT_START = 4,    // the unit starts in this team
  UNIT_LEAVE = 8,    // last tile of this unit in this team
  UNIT_END = 16,     // the unit ends in this team
  UNIT_SOURCE = 32,  // no references: each row's own source
  LIST_DONE = 64,
};

struct BulkTile {
  int64_t reference;  // index of the first one among all k m
  int unit, count, flags;
  int slot;  // of the unit in BulkShared::units
};

// What the producer tells of a unit, when its first tile is on the way.
template <int R>
struct UnitRows {
  int first_row, count;
  Row rows[R];
};
constexpr int UNIT_SLOTS =
    2 * BULK_MAX_STAGES;  // the producer may be that many units of one tile ahead of adders that finish one

enum class Team : int { block, cluster, grid };

struct BulkLayout {
  Team team;
  int slices;     // blocks per team
  int64_t slice;  // elements of D per block
  int pitch;      // elements from one reference to the next in shared memory
  int stages;
  bool vectors;     // x, source and out allow 16-byte loads and stores
  bool merge_last;  // the last team to arrive merges; else merge_kernel
};

// What teams leave of units that they share with others; slot 2b of block b for the unit that began earlier,
// 2b + 1 for the unit that goes on after it.
struct BulkParts {
  float* sums;        // (2 blocks, rows, slice) sum of p_j (r_j - c)
  double* running;    // (blocks, rows, slice) what a block has flushed of its current unit
  float* centres;     // (blocks, slice), written by the block where the unit starts
  float* best;        // (2 blocks, rows) in units of s_j / rate
  double* total;      // (2 blocks, rows) sum of p_j
  double* y_squares;  // (n, slices) |y|^2 by row of the list, where lse is asked for
  uint2* mail;        // (teams, TEAM_SLOTS, slices, rows TR) scores and their tile's number, for Team::grid
};

// Work, tiles times their cost, is cut into ranges of equal length, the first few one longer; a tile belongs
// to the team in whose range it begins. No range is shorter than a tile, so that a unit's teams follow one
// another.
struct Ranges {
  int64_t teams, length, longer;

  __device__ Ranges(const UnitList& list, int64_t most_teams, int most_rows) {
    const int64_t work = list.first_work[list.sizes[0]], most = work / unit_cost(most_rows);
    teams = most < 1 ? 1 : most < most_teams ? most : most_teams;
    length = work / teams;
    longer = work - length * teams;
  }
  __device__ int64_t begin(int64_t team) const {
    return team < teams ? length * team + (team < longer ? team : longer) : length * teams + longer;
  }
  __device__ int64_t team_of(int64_t position) const {
    if (position < longer * (length + 1)) return position / (length + 1);
    return longer + (position - longer * (length + 1)) / length;
  }
  __device__ int64_t first_team(const UnitList& list, int unit) const {
    return team_of(list.first_work[unit]);
  }
  __device__ int64_t last_team(const UnitList& list, int unit) const {
    return team_of(list.first_work[unit] + (list.units[unit].tiles - 1) * list.units[unit].cost);
  }
};

// Walks a team's tiles.
struct BulkCursor {
  int64_t end;              // of the team's work
  int number, units, slot;  // of the unit, of all; of those seen here
  Unit unit;
  int64_t work;                                  // where the unit's begins
  int64_t tile;                                  // the next one of the unit
  int64_t group, group_begin, group_end, count;  // the group, its tiles in the unit, its valid references
  bool entered;                                  // the unit has a tile in the ring
};

__device__ inline void enter_unit(const UnitList& list, BulkCursor& at, int number) {
  at.number = number;
  at.slot = (at.slot + 1) % UNIT_SLOTS;
  at.unit = list.units[number];
  at.work = list.first_work[number];
  at.tile = at.group_end = 0;
  at.entered = false;
}

__device__ inline void enter_group(const Inputs& in, const UnitList& list, BulkCursor& at, int64_t tile) {
  at.group = at.unit.group, at.count = at.unit.count;
  at.group_begin = 0, at.group_end = at.unit.tiles;
  if (at.unit.group >= 0) return;
  at.group = find_prefix(list.group_tiles, 0, in.k, tile);
  at.count = valid_count(in, at.group);
  at.group_begin = list.group_tiles[at.group], at.group_end = list.group_tiles[at.group + 1];
}

__device__ inline BulkTile next_bulk_tile(const Inputs& in, const UnitList& list, BulkCursor& at) {
  while (at.tile >= at.unit.tiles && at.number + 1 < at.units) enter_unit(list, at, at.number + 1);
  if (at.tile >= at.unit.tiles || at.work + at.tile * at.unit.cost >= at.end) return {0, 0, 0, LIST_DONE, 0};
  const int begin = at.entered ? 0 : UNIT_BEGIN;
  if (!at.entered && at.tile > 0 && at.unit.count > 0) {
    at.entered = true;
    enter_group(in, list, at, 0);
    at.group_end = 0;  // the tile at hand may belong to another group
    return {at.group * in.m, at.number,
            static_cast<int>(at.count < BULK_CENTRE_REFS ? at.count : BULK_CENTRE_REFS), begin | UNIT_CENTRE,
            at.slot};
  }
  at.entered = true;
  BulkTile tile{0, at.number, 1, begin, at.slot};
  if (in.source.data && at.tile == at.unit.tiles - 1) {
    tile.flags |= UNIT_SOURCE;
  } else {
    if (at.tile >= at.group_end) enter_group(in, list, at, at.tile);
    const int64_t first = (at.tile - at.group_begin) * list.tile_refs, left = at.count - first;
    tile.reference = at.group * in.m + first;
    tile.count = static_cast<int>(left < list.tile_refs ? left : list.tile_refs);
  }
  if (at.tile == 0) tile.flags |= UNIT_START;
  ++at.tile;
  if (at.tile == at.unit.tiles) tile.flags |= UNIT_LEAVE | UNIT_END;
  if (at.work + at.tile * at.unit.cost >= at.end) tile.flags |= UNIT_LEAVE;
  return tile;
}

template <int TR, int R>
struct TileWeights {
  float p[R][TR];
  float keep[R];    // what the sums so far are to be multiplied with
  float best[R];    // largest score so far, in units of s_j / rate
  double total[R];  // sum of p so far
  bool any;         // some p matters
};

template <int WARPS, int TR, int R>
struct BulkShared {
  Barrier full[BULK_MAX_STAGES], scored[BULK_MAX_STAGES], weighed[BULK_MAX_STAGES], empty[BULK_MAX_STAGES];
  Barrier mailed[TEAM_SLOTS];
  BulkTile ring[BULK_MAX_STAGES];
  float parts[BULK_MAX_STAGES][R][TR][WARPS];
  TileWeights<TR, R> weights[BULK_MAX_STAGES];
  UnitRows<R> units[UNIT_SLOTS];
  float mail[TEAM_SLOTS][BULK_MAX_CLUSTER][R][TR];  // parts of the blocks of a cluster
  double scratch[WARPS];
  float flushed_best[R];
  struct Merge {  // of a unit shared with the team before or after; number -1: none
    UnitRows<R> unit;
    int64_t from, to;
    int number;
  } merges[2];
};

// EV elements of T, 16 bytes of shared memory, as float32.
template <typename T, int EV>
__device__ inline void read_vector(const T* from, float (&out)[EV]) {
  const uint4 raw = *reinterpret_cast<const uint4*>(from);
  const T* values = reinterpret_cast<const T*>(&raw);
#pragma unroll
  for (int k = 0; k < EV; ++k) out[k] = to_float(values[k]);
}

template <typename T>
__device__ T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) {
  return v;
}
template <>
__device__ inline __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// Sums v[j] over the warp for all TR values at once; lane l gets the sum of value l / (32 / TR).
template <int TR>
__device__ inline float sum_over_warp(float (&v)[TR], int lane) {
  int offset = 16;
#pragma unroll
  for (int half = TR / 2; half > 0; half /= 2, offset /= 2) {
    const bool upper = lane & offset;
#pragma unroll
    for (int j = 0; j < half; ++j) {
      const float give = upper ? v[j] : v[j + half], keep = upper ? v[j + half] : v[j];
      v[j] = keep + __shfl_xor_sync(0xffffffffu, give, offset);
    }
  }
  for (; offset > 0; offset /= 2) v[0] += __shfl_xor_sync(0xffffffffu, v[0], offset);
  return v[0];
}

// T, EV: element and elements per 16 bytes. SIDE scorer threads, and as many adders, own Q elements of D
// each. TR: references per tile; R: most rows of a unit.
template <typename T, int SIDE, int Q, int TR, int R>
struct Bulk {
  static constexpr int EV = 16 / static_cast<int>(sizeof(T));
  static constexpr int SLOTS = Q / EV, WARPS = SIDE / 32, THREADS = 2 * SIDE + 64;
  static constexpr int LANES = 32 / TR;          // of the weigher, per reference
  static constexpr int GROUP = TR < 4 ? TR : 4;  // references whose loads are in flight at a time
  using Shared = BulkShared<WARPS, TR, R>;
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

  // References lie `pitch` elements apart, 128 / TR bytes more than a multiple of 128: what a warp reads at
  // once of several references lies in different banks.
  __device__ const T* stage(int s) const {
    return reinterpret_cast<const T*>(staging) + static_cast<int64_t>(s) * TR * layout.pitch;
  }

  // The producer.

  __device__ BulkCursor first_cursor(const Ranges& ranges, int lane) const {
    BulkCursor at{};
    at.units = list.sizes[0];
    const int64_t begin = ranges.begin(team);
    at.end = ranges.begin(team + 1);
    if (begin >= at.end) return at;
    int low = 0, high = at.units;  // first_work[low] <= begin < first_work[high]
    while (high - low > 1) {       // 32 probes at a time
      const int step = (high - low + 31) / 32, probe = low + lane * step;
      const bool before = probe < high && list.first_work[probe] <= begin;
      const int last = 31 - __clz(__ballot_sync(0xffffffffu, before));
      high = min(high, low + (last + 1) * step);
      low += last * step;
    }
    enter_unit(list, at, low);
    at.tile = (begin - at.work + at.unit.cost - 1) / at.unit.cost;
    return at;
  }

  // All lanes walk alike, and each issues the copy of one reference.
  __device__ void produce(int lane) const {
    const Ranges ranges(list, teams, R);
    BulkCursor at = first_cursor(ranges, lane);
    const auto cut = [&] { return at.tile > 0 && at.tile < at.unit.tiles ? at.number : -1; };
    const int first = cut();
    for (int s = 0, phase = 1;; s + 1 < layout.stages ? ++s : (s = 0, phase ^= 1)) {
      const BulkTile tile = next_bulk_tile(in, list, at);
      const bool copies = !(tile.flags & (LIST_DONE | UNIT_SOURCE));
      const uint32_t bytes = static_cast<uint32_t>(length * sizeof(T));
      wait_barrier(&shared.empty[s], phase);
      if (copies && lane < tile.count) {
        bulk_copy(const_cast<T*>(stage(s)) + lane * layout.pitch,
                  static_cast<const T*>(in.refs.data) + (tile.reference + lane) * in.d + offset, bytes,
                  &shared.full[s]);
      }
      if (tile.flags & UNIT_BEGIN) announce(at.unit, shared.units[tile.slot], lane);
      if (tile.flags & LIST_DONE && layout.merge_last) {
        prepare_merge(ranges, 0, first, lane);
        prepare_merge(ranges, 1, cut() == first ? -1 : cut(), lane);  // not twice, if it fills the range
      }
      if (lane == 0) shared.ring[s] = tile;
      __syncwarp();
      if (lane == 0) {
        if (copies) {
          arrive_expecting(&shared.full[s], tile.count * bytes);
        } else {
          arrive(&shared.full[s]);
        }
      }
      if (tile.flags & LIST_DONE) return;
    }
  }

  // The rows of a unit whose first tile comes next; what they will read is brought near.
  __device__ void announce(const Unit& unit, UnitRows<R>& here, int lane) const {
    constexpr int WORDS = sizeof(Row) / 4;
    if (lane == 0) here.first_row = unit.first_row, here.count = unit.rows;
    for (int r = 0; r < unit.rows; ++r) {
      const Row* const row = list.rows + unit.first_row + r;
      if (lane < WORDS)
        reinterpret_cast<uint32_t*>(&here.rows[r])[lane] = reinterpret_cast<const uint32_t*>(row)[lane];
      if (lane == 31 && layout.vectors) {
        const int64_t at = row->index * in.d + offset;
        prefetch_bulk(static_cast<const char*>(in.x.data) + at * size_of(in.x.dtype),
                      length * size_of(in.x.dtype));
      }
    }
  }

  // A unit shared with the team before (side 0) or after, -1: none.
  __device__ void prepare_merge(const Ranges& ranges, int side, int unit, int lane) const {
    typename Shared::Merge& here = shared.merges[side];
    if (unit >= 0) {
      announce(list.units[unit], here.unit, lane);
      const int64_t from = ranges.first_team(list, unit), to = ranges.last_team(list, unit);
      if (lane == 0) here.from = from, here.to = to;
    }
    if (lane == 0) here.number = unit;
  }

  // The weigher.

  // This block's score of a reference, the same in all its lanes, to every block of the team.
  __device__ void send_to_team(float score, int row, int lane, int tile) const {
    const int reference = lane / LANES, slot = tile % TEAM_SLOTS;
    if (layout.team == Team::cluster) {
      for (int peer = lane % LANES; peer < layout.slices; peer += LANES)
        store_in_cluster(&shared.mail[slot][rank][row][reference], &shared.mailed[slot], peer, score);
    } else if (lane % LANES == 0) {
      post_letter(mailbox(slot) + (rank * R + row) * TR + reference,
                  make_uint2(__float_as_uint(score), static_cast<unsigned>(tile) + 1));
    }
  }

  __device__ uint2* mailbox(int slot) const {
    return parts.mail + (team * TEAM_SLOTS + slot) * layout.slices * R * TR;
  }

  // The sum of what the blocks sent, in the order of their ranks.
  __device__ float collect(int row, int lane, int tile) const {
    const int reference = lane / LANES, slot = tile % TEAM_SLOTS;
    float sum = 0;
    for (int peer = lane % LANES; peer < layout.slices; peer += LANES) {
      if (layout.team == Team::cluster) {
        sum += shared.mail[slot][peer][row][reference];
      } else {
        const uint2* const from = mailbox(slot) + (peer * R + row) * TR + reference;
        uint2 letter = read_letter(from);
        while (letter.y != static_cast<unsigned>(tile) + 1) letter = read_letter(from);
        sum += __uint_as_float(letter.x);
      }
    }
    return sum_over_lanes(sum);
  }

  // Over the weigher's lanes of one reference.
  __device__ static float sum_over_lanes(float v) {
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
    return v;
  }

  __device__ void weigh(int lane) const {
    float best[R], log2_rate[R];
    double total[R];
    int rows = 0, scored = 0;
    for (int s = 0, phase = 0;; s + 1 < layout.stages ? ++s : (s = 0, phase ^= 1)) {
      wait_barrier(&shared.full[s], phase);
      const BulkTile tile = shared.ring[s];
      if (tile.flags & LIST_DONE) return;
      if (tile.flags & UNIT_BEGIN) {
        const UnitRows<R>& unit = shared.units[tile.slot];
        rows = unit.count;
#pragma unroll
        for (int r = 0; r < R; ++r) {
          best[r] = -INFINITY, total[r] = 0, log2_rate[r] = 0;
          if (r < rows) log2_rate[r] = static_cast<float>(unit.rows[r].rate() * 1.4426950408889634);
        }
      }
      if (tile.flags & UNIT_CENTRE) {  // nothing to weigh; each barrier still ends a phase for each tile
        __syncwarp();                  // all lanes have read the tile
        if (lane == 0) {
          arrive(&shared.weighed[s]);
          arrive(&shared.empty[s]);
        }
        continue;
      }
      wait_barrier(&shared.scored[s], phase);
      float score[R];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        score[r] = 0;
        if (r >= rows) continue;
        for (int w = lane % LANES; w < WARPS; w += LANES) score[r] += shared.parts[s][r][lane / LANES][w];
        score[r] = sum_over_lanes(score[r]);
        if (layout.team != Team::block) send_to_team(score[r], r, lane, scored);
      }
      if (layout.team != Team::block) {
        if (layout.team == Team::cluster) {
          Barrier* const mailed = &shared.mailed[scored % TEAM_SLOTS];
          if (lane == 0) arrive_expecting(mailed, layout.slices * rows * TR * sizeof(float));
          wait_barrier(mailed, scored / TEAM_SLOTS & 1);
        }
#pragma unroll
        for (int r = 0; r < R; ++r) {
          if (r < rows) score[r] = collect(r, lane, scored);
        }
      }

      TileWeights<TR, R>& weights = shared.weights[s];
      const bool valid = lane / LANES < tile.count;
      bool any = false;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (r >= rows) continue;
        float top = valid ? score[r] : -INFINITY;
#pragma unroll
        for (int offset = 16; offset >= LANES; offset /= 2)
          top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
        const float now = fmaxf(best[r], top);
        const float keep = best[r] == -INFINITY ? 0.0f : exp2f((best[r] - now) * log2_rate[r]);
        const float p = valid ? exp2f((score[r] - now) * log2_rate[r]) : 0.0f;
        any = any || !(p < NO_WEIGHT);
        float tile_total = p;
#pragma unroll
        for (int offset = 16; offset >= LANES; offset /= 2)
          tile_total += __shfl_xor_sync(0xffffffffu, tile_total, offset);
        best[r] = now;
        total[r] = total[r] * keep + tile_total;
        if (lane % LANES == 0) weights.p[r][lane / LANES] = p;
        if (lane == 0) weights.keep[r] = keep, weights.best[r] = now, weights.total[r] = total[r];
      }
      any = __any_sync(0xffffffffu, any);
      if (lane == 0) weights.any = any;
      __syncwarp();
      if (lane == 0) {
        arrive(&shared.weighed[s]);
        arrive(&shared.empty[s]);
      }
      ++scored;
    }
  }

  // The scorers and the adders.
  //
  // What runs for every tile must hold no more than registers: what spills comes back from the L2, since
  // shared memory leaves no L1 to speak of. Hence one small loop for each way of scoring, and everything else
  // outside it.

  static constexpr bool HAS_PRODUCTS = sizeof(T) == 2 && (TR == 8 || TR == 4);
  static constexpr int FLUSH_TILES = BULK_FLUSH_REFS / TR;

  struct Place {  // in the ring
    int stage = 0, phase = 0;
  };

  // This warp is done with the stage at hand.
  __device__ void give_back(Place& at, int tid) const {
    __syncwarp();
    if (tid % 32 == 0) arrive(&shared.empty[at.stage]);
    if (++at.stage == layout.stages) at.stage = 0, at.phase ^= 1;
  }
  // And its part of the scores is there.
  __device__ void hand_on(Place& at, int tid) const {
    __syncwarp();
    if (tid % 32 == 0) arrive(&shared.scored[at.stage]);
    give_back(at, tid);
  }

  __device__ int element(int tid, int slot) const { return (slot * SIDE + tid) * EV; }

  // This thread's elements of row `index` of x or source; zero beyond the end. One branch for all loads,
  // which are in flight together.
  __device__ void load_elements(const Array& a, int64_t index, int tid, float (&out)[Q]) const {
    const int64_t base = index * in.d + offset;
    if (a.dtype == Dtype::f32 && layout.vectors) {
      const float* const from = static_cast<const float*>(a.data) + base;
#pragma unroll
      for (int q = 0; q < Q; q += 4) {
        const int e = element(tid, q / EV) + q % EV;
        const float4 v = e < length ? *reinterpret_cast<const float4*>(from + e) : make_float4(0, 0, 0, 0);
        out[q] = v.x, out[q + 1] = v.y, out[q + 2] = v.z, out[q + 3] = v.w;
      }
    } else {
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        const int e = element(tid, q / EV) + q % EV;
        out[q] = e < length ? load_as<float>(a, base + e) : 0.0f;
      }
    }
  }

  __device__ static float sum_over_whole_warp(float v) {
    for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
    return v;
  }

  __device__ double sum_over_scorers(double v, int tid) const {
    for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
    named_barrier(1, SIDE);
    if (tid % 32 == 0) shared.scratch[tid / 32] = v;
    named_barrier(1, SIDE);
    double sum = 0;
    for (int w = 0; w < WARPS; ++w) sum += shared.scratch[w];
    return sum;
  }

  // v[r][q] without a run-time index into registers.
  __device__ static float get(const float (&v)[R][Q], int r, int q) {
    float value = v[0][q];
#pragma unroll
    for (int other = 1; other < R; ++other) value = r == other ? v[other][q] : value;
    return value;
  }

  // The centre: the mean of the first references. Returns whether scores from products are exact enough here.
  __device__ bool form_centre(float (&centre)[Q], const BulkTile& tile, const T* refs, int tid) const {
    const int few = tile.flags & UNIT_SOURCE ? 0 : min(tile.count, BULK_CENTRE_REFS);
    float common = 0, spread = 0;  // |c|^2 and the squared distance of two references
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      const int e = element(tid, s);
      float mean[EV] = {};
#pragma unroll 1
      for (int j = 0; j < few && e < length; ++j) {
        float v[EV];
        read_vector<T, EV>(refs + j * layout.pitch + e, v);
#pragma unroll
        for (int k = 0; k < EV; ++k) {
          const float difference = j ? v[k] - mean[k] : 0.0f;
          spread = fmaf(difference, difference, spread);
          mean[k] += v[k];
        }
      }
#pragma unroll
      for (int k = 0; k < EV; ++k) {
        const float c = few == 2 ? 0.5f * mean[k] : mean[k];
        common = fmaf(c, c, common);
        centre[s * EV + k] = c;
      }
    }
    if (!HAS_PRODUCTS || few < 2) return false;
    return 2.0f * sum_over_whole_warp(common) <= BULK_COMMON * sum_over_whole_warp(spread);
  }

  // x of row r of the unit at this thread's elements, its y = x - alpha c, and |y|^2 for lse.
  __device__ void load_row(const float (&c)[Q], const UnitRows<R>& unit, int r, bool starts, int tid,
                           float (&x)[Q], float (&y)[Q]) const {
    const Row& row = unit.rows[r];
    const float sign = static_cast<float>(row.sign), alpha = static_cast<float>(row.alpha);
    const float rest = static_cast<float>(row.alpha - alpha);  // alpha to twice the digits
    double square = 0;
    load_elements(in.x, row.index, tid, x);
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      x[q] *= sign;
      y[q] = element(tid, q / EV) < length ? fmaf(-rest, c[q], fmaf(-alpha, c[q], x[q])) : 0.0f;
    }
    if (in.lse.data) {  // exact: parts of a set with centres of their own are merged by it
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        const double exact = element(tid, q / EV) < length ? x[q] - row.alpha * c[q] : 0.0;
        square = fma(exact, exact, square);
      }
    }
    if (in.lse.data && starts) {
      square = sum_over_scorers(square, tid);
      if (tid == 0) parts.y_squares[(unit.first_row + r) * layout.slices + rank] = square;
    }
  }

  // Scores (y - alpha/2 d_j) . d_j, d_j = r_j - c, for ROWS rows. Few references at a time: see above.
  template <int ROWS>
  struct Direct {
    float y[ROWS][Q], half_alpha[ROWS];

    __device__ void prepare(const Bulk& kernel, const float (&c)[Q], const UnitRows<R>& unit, bool starts,
                            int tid) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        half_alpha[r] = 0;
#pragma unroll
        for (int q = 0; q < Q; ++q) y[r][q] = 0;
        if (r >= unit.count) continue;
        float x[Q];
        kernel.load_row(c, unit, r, starts, tid, x, y[r]);
        half_alpha[r] = static_cast<float>(0.5 * unit.rows[r].alpha);
      }
    }

    __device__ void score(const Bulk& kernel, const float (&c)[Q], const T* refs, int tid,
                          float (&parts_of)[R][TR][WARPS]) const {
      const int lane = tid % 32;
#pragma unroll 1
      for (int first = 0; first < TR; first += GROUP) {
        float score[ROWS][GROUP] = {}, norm[GROUP] = {};
#pragma unroll
        for (int s = 0; s < SLOTS; ++s) {
          const int e = kernel.element(tid, s);
          if (e >= kernel.length) continue;
#pragma unroll
          for (int j = 0; j < GROUP; ++j) {
            float v[EV];
            read_vector<T, EV>(refs + (first + j) * kernel.layout.pitch + e, v);
#pragma unroll
            for (int k = 0; k < EV; ++k) {
              const int q = s * EV + k;
              const float difference = v[k] - c[q];
              norm[j] = fmaf(difference, difference, norm[j]);
#pragma unroll
              for (int r = 0; r < ROWS; ++r) score[r][j] = fmaf(y[r][q], difference, score[r][j]);
            }
          }
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
          for (int j = 0; j < GROUP; ++j) score[r][j] = fmaf(-half_alpha[r], norm[j], score[r][j]);
          const float sum = sum_over_warp<GROUP>(score[r], lane);
          if (lane % (32 / GROUP) == 0) parts_of[r][first + lane / (32 / GROUP)][tid / 32] = sum;
        }
      }
    }
  };

  // Scores from products on the matrix units, of the references as they are stored, for a warp's 256 elements
  // of D: x.r - alpha/2 |r|^2, less the same of c so that they agree with those of Direct. Products are
  // exact, x being a sum of values of T, and float32 sums are short. Not for references far from the origin
  // beside their spread, whose differences would be lost.
  //
  // ldmatrix brings 16 rows of 16 elements, an A of m16n8k16: row i has reference i % TR on two octets of D,
  // those of range i / TR. The columns of B are for the ranges in turn: x on the same octets, as terms and
  // rows. So of A B only the blocks of a range with itself count. Products 16 x 8 x 8 of an octet with itself
  // have its part of |r|^2 on the diagonal.
  struct Products {
    static constexpr int TERMS =
        DtypeOf<T>::value == Dtype::bf16 ? 3 : 2;                     // x as a sum of so many values of T
    static constexpr int RANGES = 16 / TR;                            // of 16 elements, at a time
    static constexpr int COLUMNS = 8 / RANGES;                        // of B for each
    static constexpr int SETS = (R * TERMS + COLUMNS - 1) / COLUMNS;  // Bs that hold all rows and terms
    static constexpr int CHUNKS = 16 / RANGES;  // at a time, for the 256 elements of a warp's slot
    uint32_t b[SLOTS][CHUNKS][SETS][2];
    float half_alpha, shift, scale;  // of row t: score = scale x.r - alpha/2 |r|^2 - shift

    __device__ static float power_of_two(int exponent) { return __uint_as_float((127 + exponent) << 23); }
    __device__ static int octet(int range, int half) { return range + half * RANGES; }

    __device__ void prepare(const Bulk& kernel, const float (&c)[Q], const UnitRows<R>& unit, bool starts,
                            int tid) {
      const int lane = tid % 32, g = lane / 4, t = lane % 4;
      half_alpha = shift = scale = 0;
      float up = 1;  // for the row of this lane's columns
#pragma unroll 1
      for (int r = 0; r < unit.count; ++r) {
        float x[Q], y[Q];
        kernel.load_row(c, unit, r, starts, tid, x, y);
        const float half = static_cast<float>(0.5 * unit.rows[r].alpha);
        float of_c = 0, top = 0;
#pragma unroll
        for (int q = 0; q < Q; ++q) {
          of_c = fmaf(fmaf(half, c[q], y[q]), c[q], of_c);  // x.c - alpha/2 |c|^2
          top = fmaxf(top, fabsf(x[q]));
        }
        of_c = sum_over_whole_warp(of_c);
        for (int offset = 16; offset > 0; offset /= 2)
          top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
        // A power of two brings the largest |x| to [2^14, 2^15): nothing overflows, what matters is not lost.
        const int exponent =
            top > 1e-30f && top < INFINITY ? 14 + 127 - static_cast<int>(__float_as_uint(top) >> 23) : 0;
        if (t == r) half_alpha = half, shift = of_c, scale = power_of_two(-exponent);
        if (g % R == r) up = power_of_two(exponent);
      }
      // Column g of B: term (g % COLUMNS + set COLUMNS) / R of row g % R, on the octets of range g / COLUMNS.
      const bool present = g % R < unit.count;
      const Row& row = unit.rows[present ? g % R : 0];
      up = present ? up * static_cast<float>(row.sign) : 0.0f;
      const int64_t base = row.index * kernel.in.d + kernel.offset;
      const bool fast = kernel.in.x.dtype == Dtype::f32 && kernel.layout.vectors;
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        const auto place = [&](int i) {
          return (s * SIDE + tid / 32 * 32) * EV + 8 * (RANGES * i + g / COLUMNS) + 2 * t;
        };
        float2 pairs[2 * CHUNKS];
        if (fast) {
          const float* const from = static_cast<const float*>(kernel.in.x.data) + base;
#pragma unroll
          for (int i = 0; i < 2 * CHUNKS; ++i)
            pairs[i] =
                place(i) < kernel.length ? *reinterpret_cast<const float2*>(from + place(i)) : float2{0, 0};
        } else {
#pragma unroll
          for (int i = 0; i < 2 * CHUNKS; ++i) {
            pairs[i] = float2{0, 0};
            if (place(i) < kernel.length)
              pairs[i] = {load_as<float>(kernel.in.x, base + place(i)),
                          load_as<float>(kernel.in.x, base + place(i) + 1)};
          }
        }
#pragma unroll
        for (int i = 0; i < 2 * CHUNKS; ++i) {
          float rest[2] = {up * pairs[i].x, up * pairs[i].y};
          uint32_t words[SETS] = {};
#pragma unroll
          for (int term = 0; term < TERMS; ++term) {
            const T pair[2] = {from_float<T>(rest[0]), from_float<T>(rest[1])};
            rest[0] -= to_float(pair[0]), rest[1] -= to_float(pair[1]);
            const uint32_t word = *reinterpret_cast<const uint32_t*>(pair);
#pragma unroll
            for (int set = 0; set < SETS; ++set)
              words[set] = (g % COLUMNS + set * COLUMNS) / R == term ? word : words[set];
          }
#pragma unroll
          for (int set = 0; set < SETS; ++set) b[s][i / 2][set][i % 2] = words[set];
        }
      }
    }

    __device__ void score(const Bulk& kernel, const float (&)[Q], const T* refs, int tid,
                          float (&parts_of)[R][TR][WARPS]) const {
      const int lane = tid % 32, g = lane / 4, t = lane % 4;
      const int row = lane / 8 % 2 * 8 + lane % 8,
                own_octet = octet(row / TR, lane / 16);  // to read for ldmatrix
      const T* const own = refs + row % TR * kernel.layout.pitch + 8 * own_octet;
      float dots[SETS][4] = {}, even[4] = {}, odd[4] = {};
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        const int first = (s * SIDE + tid / 32 * 32) * EV;  // of D
        const auto multiply = [&](const uint32_t (&v)[4], int i) {
#pragma unroll
          for (int set = 0; set < SETS; ++set)
            multiply_add<T>(dots[set], v, b[s][i][set][0], b[s][i][set][1]);
          multiply_add<T>(even, v[0], v[1], v[0]);
          multiply_add<T>(odd, v[0], v[1], v[1]);
          multiply_add<T>(even, v[2], v[3], v[2]);
          multiply_add<T>(odd, v[2], v[3], v[3]);
        };
        if (first + 256 <= kernel.length) {
#pragma unroll
          for (int i = 0; i < CHUNKS; ++i) {
            uint32_t v[4];
            load_matrices(own + first + 16 * RANGES * i, v);
            multiply(v, i);
          }
        } else {
          // Octets beyond the end are made zero in the registers: lane (g, t) has row g of each matrix.
#pragma unroll
          for (int i = 0; i < CHUNKS; ++i) {
            const int begin = first + 16 * RANGES * i;  // the same in all lanes
            if (begin >= kernel.length) break;
            uint32_t v[4];
            load_matrices(own + begin, v);
#pragma unroll
            for (int m = 0; m < 4; ++m) {
              if (begin + 8 * octet((m % 2 * 8 + g) / TR, m / 2) >= kernel.length) v[m] = 0;
            }
            multiply(v, i);
          }
        }
      }
      // Lane (g, t) has rows g and g + 8, columns 2 t and 2 t + 1, of which the even ones are those of row 0.
      const bool low = 2 * t / COLUMNS == g / TR, high = 2 * t / COLUMNS == (g + 8) / TR;
      float sums[3] = {};
#pragma unroll
      for (int set = 0; set < SETS; ++set) {
#pragma unroll
        for (int k = 0; k < 2; ++k)
          sums[R == 1 ? 0 : k] += (low ? dots[set][k] : 0.0f) + (high ? dots[set][2 + k] : 0.0f);
      }
      if (t == g / 2) sums[2] = g % 2 ? even[1] + odd[3] : even[0] + odd[2];
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        if (R == 1 && k == 1) continue;
        sums[k] += __shfl_xor_sync(0xffffffffu, sums[k], 1);
        sums[k] += __shfl_xor_sync(0xffffffffu, sums[k], 2);
        if (TR == 4) sums[k] += __shfl_xor_sync(0xffffffffu, sums[k], 16);
      }
      if (t < R && g < TR)
        parts_of[t][g][tid / 32] = fmaf(-half_alpha, sums[2], scale * (t == 0 ? sums[0] : sums[1])) - shift;
    }
  };

  // The score of each row's own source, for which nothing is kept in registers.
  __device__ void score_sources(const float (&c)[Q], const UnitRows<R>& unit, int tid,
                                float (&parts_of)[R][TR][WARPS]) const {
#pragma unroll 1
    for (int r = 0; r < unit.count; ++r) {
      const Row& row = unit.rows[r];
      const float sign = static_cast<float>(row.sign), half_alpha = static_cast<float>(0.5 * row.alpha);
      float score = 0, own[Q], x[Q];
      load_elements(in.source, row.index, tid, own);
      load_elements(in.x, row.index, tid, x);
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        if (element(tid, q / EV) >= length) continue;
        const float difference = own[q] - c[q];
        const float y = static_cast<float>(static_cast<double>(sign * x[q]) - row.alpha * c[q]);
        score = fmaf(fmaf(-half_alpha, difference, y), difference, score);
      }
      score = sum_over_whole_warp(score);
      if (tid % 32 == 0) parts_of[r][0][tid / 32] = score;
    }
  }

  // A unit, from its first tile here, which is in the ring, to its last.
  template <typename Scores>
  __device__ void score_unit(const float (&c)[Q], Place& at, const BulkTile& first, int tid) const {
    Scores scores;
    scores.prepare(*this, c, shared.units[first.slot], first.flags & UNIT_START, tid);
    if (first.flags & UNIT_CENTRE) hand_on(at, tid);
    int flags = 0;
    do {
      wait_barrier(&shared.full[at.stage], at.phase);
      flags = shared.ring[at.stage].flags;
      if (flags & UNIT_SOURCE) break;
      scores.score(*this, c, stage(at.stage), tid, shared.parts[at.stage]);
      hand_on(at, tid);
    } while (!(flags & UNIT_LEAVE));
    if (!(flags & UNIT_SOURCE)) return;
    score_sources(c, shared.units[first.slot], tid, shared.parts[at.stage]);
    hand_on(at, tid);
  }

  __device__ void score_all(int tid) const {
    Place at;
    for (;;) {
      wait_barrier(&shared.full[at.stage], at.phase);
      const BulkTile tile = shared.ring[at.stage];
      if (tile.flags & LIST_DONE) return;
      float c[Q];
      const bool exact = form_centre(c, tile, stage(at.stage), tid);
      if constexpr (HAS_PRODUCTS) {
        if (exact) {
          score_unit<Products>(c, at, tile, tid);
          continue;
        }
      }
      if constexpr (R > 1) {
        if (shared.units[tile.slot].count > 1) {
          score_unit<Direct<R>>(c, at, tile, tid);
          continue;
        }
      }
      score_unit<Direct<1>>(c, at, tile, tid);
    }
  }

  struct Sums {  // what an adder keeps of a unit: sum of p_j (r_j - c) for each row
    float c[Q], sum[R][Q];
  };

  // Adds COUNT references from `first` on, weighted, to ROWS rows.
  template <int ROWS, int COUNT>
  __device__ void add_some(Sums& my, const T* refs, int first, int tid,
                           const TileWeights<TR, R>& weights) const {
    float p[ROWS][COUNT];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int j = 0; j < COUNT; ++j) p[r][j] = weights.p[r][first + j];
    }
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      const int e = element(tid, s);
      if (e >= length) continue;
      float some[ROWS][EV] = {};
#pragma unroll
      for (int j = 0; j < COUNT; ++j) {
        float v[EV];
        read_vector<T, EV>(refs + (first + j) * layout.pitch + e, v);
#pragma unroll
        for (int k = 0; k < EV; ++k) {
          const float difference = v[k] - my.c[s * EV + k];
#pragma unroll
          for (int r = 0; r < ROWS; ++r) some[r][k] = fmaf(p[r][j], difference, some[r][k]);
        }
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int k = 0; k < EV; ++k) my.sum[r][s * EV + k] += some[r][k];
      }
    }
  }

  template <int ROWS>
  __device__ void add_tile(Sums& my, int s, int tid) const {
    const TileWeights<TR, R>& weights = shared.weights[s];
    const T* const refs = stage(s);
    const int count = shared.ring[s].count;
    int first = 0;
#pragma unroll 1
    for (; first + GROUP <= count; first += GROUP) add_some<ROWS, GROUP>(my, refs, first, tid, weights);
#pragma unroll 1
    for (; first < count; ++first)
      add_some<ROWS, 1>(my, refs, first, tid, weights);  // beyond: of another group
  }

  __device__ void add_sources(Sums& my, const UnitRows<R>& unit, int tid,
                              const TileWeights<TR, R>& weights) const {
#pragma unroll 1
    for (int r = 0; r < unit.count; ++r) {
      float own[Q];
      load_elements(in.source, unit.rows[r].index, tid, own);
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        const float share = weights.p[r][0] * (own[q] - my.c[q]);
#pragma unroll
        for (int other = 0; other < R; ++other) my.sum[other][q] += r == other ? share : 0.0f;
      }
    }
  }

  // To weights that are relative to a larger score than those before.
  __device__ void rescale(Sums& my, const TileWeights<TR, R>& weights) const {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const float keep = weights.keep[r];
      if (keep == 1.0f) continue;
#pragma unroll
      for (int q = 0; q < Q; ++q) my.sum[r][q] *= keep;
    }
  }

  __device__ double& running(int r, int e) const {
    return parts.running[(static_cast<int64_t>(blockIdx.x) * R + r) * layout.slice + e];
  }

  // What was flushed before is relative to flushed_best, the sums now to weights.best.
  __device__ double running_scale(const UnitRows<R>& unit, int r, float best) const {
    return exp(unit.rows[r].rate() * (static_cast<double>(shared.flushed_best[r]) - best));
  }

  __device__ void flush(Sums& my, const UnitRows<R>& unit, bool flushed, const TileWeights<TR, R>& weights,
                        int tid) const {
#pragma unroll 1
    for (int r = 0; r < unit.count; ++r) {
      const double scale = flushed ? running_scale(unit, r, weights.best[r]) : 0.0;
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        const int e = element(tid, q / EV) + q % EV;
        if (e >= length) continue;
        const double recent = get(my.sum, r, q);
        double& total = running(r, e);
        total = flushed ? fma(total, scale, recent) : recent;
      }
    }
    named_barrier(2, SIDE);  // flushed_best has been read
    if (tid < R) shared.flushed_best[tid] = weights.best[tid];
    named_barrier(2, SIDE);
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int q = 0; q < Q; ++q) my.sum[r][q] = 0;
    }
  }

  // A unit, from its first tile here, which is in the ring, to its last.
  __device__ void add_unit(Sums& my, Place& at, const BulkTile& first, int tid) const {
    const UnitRows<R>& unit = shared.units[first.slot];
    if (first.flags & UNIT_CENTRE) give_back(at, tid);
    bool flushed = false;
    for (int tiles = 1;; ++tiles) {
      wait_barrier(&shared.weighed[at.stage], at.phase);
      const TileWeights<TR, R>& weights = shared.weights[at.stage];
      const int flags = shared.ring[at.stage].flags;
      if (weights.any) {  // so it is where some score is larger than all before
        wait_barrier(&shared.full[at.stage], at.phase);  // has passed: what the copies wrote is seen here
        rescale(my, weights);
        if (flags & UNIT_SOURCE) {
          add_sources(my, unit, tid, weights);
        } else if (R > 1 && unit.count > 1) {
          add_tile<R>(my, at.stage, tid);
        } else {
          add_tile<1>(my, at.stage, tid);
        }
      }
      if (flags & UNIT_LEAVE) break;
      if (tiles % FLUSH_TILES == 0) {
        flush(my, unit, flushed, weights, tid);
        flushed = true;
      }
      give_back(at, tid);
    }
    finish(my, first, at.stage, flushed, tid);
    give_back(at, tid);
  }

  __device__ void add_all(int tid) const {
    write_dead_rows(tid);
    Place at;
    for (;;) {
      wait_barrier(&shared.full[at.stage], at.phase);
      const BulkTile tile = shared.ring[at.stage];
      if (tile.flags & LIST_DONE) break;
      Sums my;
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int q = 0; q < Q; ++q) my.sum[r][q] = 0;
      }
      form_centre(my.c, tile, stage(at.stage), tid);
      add_unit(my, at, tile, tid);
    }
    if (layout.merge_last) merge_what_is_left(tid);
  }

  // out = a x + b (c + sum / total) for one row of the unit; lse where asked for.
  __device__ void write_row(const float (&c)[Q], const Row& row, int64_t list_row, const float (&sum)[Q],
                            double best, double total, int tid) const {
    const double inverse = 1.0 / total;
    const int64_t base = row.index * in.d + offset;
    float x[Q];
    load_elements(in.x, row.index, tid, x);
    const auto value = [&](int q) { return row.a * x[q] + row.b * (c[q] + sum[q] * inverse); };
    if (in.out.dtype == Dtype::f32 && layout.vectors) {
      float* const to = static_cast<float*>(in.out.data) + base;
#pragma unroll
      for (int q = 0; q < Q; q += 4) {
        const int e = element(tid, q / EV) + q % EV;
        const float4 v = make_float4(value(q), value(q + 1), value(q + 2), value(q + 3));
        if (e < length) *reinterpret_cast<float4*>(to + e) = v;
      }
    } else {
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        const int e = element(tid, q / EV) + q % EV;
        if (e < length) store_as(in.out, base + e, value(q));
      }
    }
    if (in.lse.data && rank == 0 && tid == 0) {
      double square = 0;  // of a team of several blocks: added by squares_kernel
      if (layout.slices == 1) square = parts.y_squares[list_row];
      const double shift = row.rate() * best - square / (2 * row.sigma * row.sigma);
      store_as(in.lse, row.index, log(total) + shift + 0.5 * static_cast<double>(in.d));
    }
  }

  // The unit leaves this team: its rows are written, or left to be merged.
  __device__ void finish(Sums& my, const BulkTile& first, int last_stage, bool flushed, int tid) const {
    const UnitRows<R>& unit = shared.units[first.slot];
    const TileWeights<TR, R>& weights = shared.weights[last_stage];
    const bool starts = first.flags & UNIT_START, whole = starts && shared.ring[last_stage].flags & UNIT_END;
    const int64_t slot = 2 * static_cast<int64_t>(blockIdx.x) + (starts ? 1 : 0);
#pragma unroll 1
    for (int r = 0; r < unit.count; ++r) {
      float sum[Q];
#pragma unroll
      for (int q = 0; q < Q; ++q) sum[q] = get(my.sum, r, q);
      if (flushed) {
        const double scale = running_scale(unit, r, weights.best[r]);
#pragma unroll
        for (int q = 0; q < Q; ++q) {
          const int e = element(tid, q / EV) + q % EV;
          if (e < length) sum[q] = static_cast<float>(fma(running(r, e), scale, static_cast<double>(sum[q])));
        }
      }
      if (whole) {
        write_row(my.c, unit.rows[r], unit.first_row + r, sum, weights.best[r], weights.total[r], tid);
        continue;
      }
      float* const sums = parts.sums + (slot * R + r) * layout.slice;
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        const int e = element(tid, s);
        if (e >= length) continue;
#pragma unroll
        for (int k = 0; k < EV; k += 4) {
          const int q = s * EV + k;
          *reinterpret_cast<float4*>(sums + e + k) = make_float4(sum[q], sum[q + 1], sum[q + 2], sum[q + 3]);
        }
      }
      if (tid == 0) parts.best[slot * R + r] = weights.best[r], parts.total[slot * R + r] = weights.total[r];
    }
    if (whole) return;
    if (starts) {
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        const int e = element(tid, q / EV) + q % EV;
        if (e < length) parts.centres[static_cast<int64_t>(blockIdx.x) * layout.slice + e] = my.c[q];
      }
    }
  }

  // When all else is done: of the units that this team shares with others, two at most, those whose parts are
  // all there now.
  __device__ void merge_what_is_left(int tid) const {
    __threadfence();
    named_barrier(2, SIDE);
    if (tid < 2) {
      typename Shared::Merge& here = shared.merges[tid];
      if (here.number >= 0) {
        const int before =
            atomicAdd(&list.arrived[static_cast<int64_t>(here.number) * layout.slices + rank], 1);
        if (before != here.to - here.from) here.number = -1;
        __threadfence();
      }
    }
    named_barrier(2, SIDE);
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
      const typename Shared::Merge& here = shared.merges[side];
      if (here.number < 0) continue;
#pragma unroll 1
      for (int r = 0; r < here.unit.count; ++r)
        merge(r, here.unit.rows[r], here.unit.first_row + r, here.from, here.to, tid);
    }
  }

  // Merges row r of a unit over the teams from..to, into the row's output.
  __device__ void merge(int r, const Row& row, int64_t list_row, int64_t from, int64_t to, int tid) const {
    const int lane = tid % 32;
    const auto slot = [&](int64_t t) {
      return (2 * (t * layout.slices + rank) + (t == from ? 1 : 0)) * R + r;
    };
    float c[Q];
    load_part(parts.centres + (from * layout.slices + rank) * layout.slice, tid, c);
    double best = -INFINITY;
    for (int64_t t = from + lane; t <= to; t += 32) {
      const double other = __ldcg(parts.best + slot(t));
      best = best >= other || other != other ? best : other;
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      const double other = __shfl_xor_sync(0xffffffffu, best, offset);
      best = best >= other ? best : other;
    }
    float sum[Q] = {};
    double total = 0;
    for (int64_t first = from; first <= to; first += 32) {
      const int64_t t = first + lane;
      double weight = 0, share = 0;
      if (t <= to) {
        weight = exp(row.rate() * (static_cast<double>(__ldcg(parts.best + slot(t))) - best));
        share = weight * __ldcg(parts.total + slot(t));
      }
      for (int offset = 16; offset > 0; offset /= 2) share += __shfl_xor_sync(0xffffffffu, share, offset);
      total += share;
      const int many = static_cast<int>(to - first < 31 ? to - first + 1 : 32);
#pragma unroll 2
      for (int j = 0; j < many; ++j) {
        const float w = __shfl_sync(0xffffffffu, static_cast<float>(weight), j);
        float part[Q];
        load_part(parts.sums + slot(first + j) * layout.slice, tid, part);
#pragma unroll
        for (int q = 0; q < Q; ++q) sum[q] = fmaf(w, part[q], sum[q]);
      }
    }
    write_row(c, row, list_row, sum, best, total, tid);
  }

  // This thread's elements of a vector over the block's slice, written by another block.
  __device__ void load_part(const float* from, int tid, float (&out)[Q]) const {
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      const int e = element(tid, s);
#pragma unroll
      for (int k = 0; k < EV; k += 4) {
        const float4 v =
            e < length ? __ldcg(reinterpret_cast<const float4*>(from + e + k)) : make_float4(0, 0, 0, 0);
        const int q = s * EV + k;
        out[q] = v.x, out[q + 1] = v.y, out[q + 2] = v.z, out[q + 3] = v.w;
      }
    }
  }

  __device__ void write_dead_rows(int tid) const {
    for (int64_t i = team; i < list.sizes[1]; i += teams) {
      const int64_t index = list.dead[i];
      for (int e = tid; e < length; e += SIDE) store_as(in.out, index * in.d + offset + e, NAN);
      if (in.lse.data && rank == 0 && tid == 0) store_as(in.lse, index, NAN);
    }
  }
};

template <typename T, int SIDE, int Q, int TR, int R, int BLOCKS>
__global__ void __launch_bounds__(2 * SIDE + 64, BLOCKS)
    bulk_kernel(const __grid_constant__ Inputs in, const __grid_constant__ UnitList list,
                const __grid_constant__ BulkParts parts, const __grid_constant__ BulkLayout layout) {
  using Kernel = Bulk<T, SIDE, Q, TR, R>;
  extern __shared__ __align__(128) char memory[];
  typename Kernel::Shared& shared = *reinterpret_cast<typename Kernel::Shared*>(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < layout.stages; ++s) {
      init_barrier(&shared.full[s], 1);
      init_barrier(&shared.scored[s], Kernel::WARPS);
      init_barrier(&shared.weighed[s], 1);
      init_barrier(&shared.empty[s], 2 * Kernel::WARPS + 1);
    }
    for (int slot = 0; slot < TEAM_SLOTS; ++slot) init_barrier(&shared.mailed[slot], 1);
    publish_barriers();
  }
  __syncthreads();
  if (layout.team == Team::cluster) synchronize_cluster();
  wait_for_previous_launch();
  const Kernel kernel{in, list, parts, layout, shared, memory + Kernel::FIXED_BYTES};
  if (warp < Kernel::WARPS) {
    kernel.score_all(threadIdx.x);
  } else if (warp < 2 * Kernel::WARPS) {
    kernel.add_all(threadIdx.x - SIDE);
  } else if (warp == 2 * Kernel::WARPS) {
    kernel.produce(lane);
  } else {
    kernel.weigh(lane);
  }
  if (layout.team == Team::cluster) {  // no block leaves while another may write to its shared memory
    __syncwarp();
    synchronize_cluster();
  }
}

}  // namespace svel::cuda
