// What the kernels of bulk copies (bulk_groups.cuh, bulk_products.cuh, bulk_teams.cuh) share: who announces
// what a team of blocks has of the list of units (ranges.h), and the parts that teams leave in memory.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/hopper.cuh"
#include "common/planner.h"
#include "stable_target/units.cuh"

namespace svel::cuda {

// 2^-50: a tile whose weights are all below that, beside the best so far, is not added. Of 2^24 such
// references all together are below float32's rounding.
constexpr float NO_WEIGHT = 8.8817841970012523e-16f;
constexpr int SEGMENT_REFS = 256;  // summed in float32 before they move to float64

// A team's share of a unit, for one row: weights are 2^log2_weight times what the sums hold.
struct alignas(16) PartRow {
  double log2_weight, total;  // sum of the weights
  float lead;                 // the largest of them
  float scale;                // the largest score, either way, in units of log 2
  // Of bulk_products.cuh, where `lead` and `scale` are something else: references that it has listed, and
  // what tells the best one from others with the same score.
  int ties, print;
};

// The same of bulk_groups.cuh and bulk_teams.cuh, and where the reference of weight `lead` is.
struct alignas(16) GroupsRow {
  double log2_weight, total;
  float lead, scale;
  int64_t best;  // among all k m; OWN_SOURCE: it is the row's source
  __device__ __forceinline__ operator PartRow() const { return {log2_weight, total, lead, scale}; }
};
constexpr int64_t OWN_SOURCE = -1;

// What rounding may do to a finished row: see doubt_of_row.
struct alignas(16) Doubt {
  int64_t best;  // its reference of most weight
  float error;   // 0: none that would show
  float times;   // what all references weigh, beside the best
};

// What merge_kernel has to know of a row.
struct alignas(16) MergedRow {
  double a, b;      // out = a x + b mean
  int from, count;  // teams that have parts of its unit, one after the other; of one team it is no part
  int row;          // of the unit
};

// Parts of units; slot 2b of block b for a unit that began earlier, 2b + 1 for one that begins here.
struct BulkParts {
  double* sums;     // (2 blocks, rows, slice) weighted sums of the references
  GroupsRow* rows;  // (2 blocks, rows)
  int* arrived;     // zero at first. (n, slices) teams that have left their part of a row of `order`
  uint2* mail;  // (teams, TEAMS_SLOTS, slices, TEAMS_LETTERS) with the number of the exchange, for Team::grid
  // Of finished rows, which of them are to be looked at again (bulk_settle.cuh): where merge_kernel follows,
  // those that one team has; else each block has a list of those that it has found.
  Doubt* doubts;      // (slices, n)
  int* next;          // (slices, n) what follows a row in its block's list
  double* settled;    // room for sums: (blocks, slice) or (n, d)
  float rounding;     // of a score, see rounding_of_scores
  MergedRow* merged;  // (n,) where merge_kernel follows; of bulk_groups.cuh
  int* left;          // (blocks,) the same: whether a block has left all that it has to
};

// How far a score may be off, of the largest one: sums of 16 terms are rounded one by one, and then their
// sums. Of scores that are one third of their terms, those of a row between two references neither of which
// is the first of their class, it is half of the error for large D.
inline float rounding_of_scores(int64_t d) {
  return static_cast<float>(5e-8 * std::sqrt(std::max(1.2, 0.3 + 205.0 / static_cast<double>(d))));
}

// The unit in which cost `at` lies, by a whole warp.
__device__ inline int find_unit(const UnitList& list, int64_t at, int lane) {
  int low = 0, high = list.sizes[0];  // begins[low] <= at < begins[high]
  while (high - low > 1) {            // 32 probes at a time
    const int step = (high - low + 31) / 32, probe = low + lane * step;
    const bool before = probe < high && list.begins[probe] <= at;
    const int last = 31 - __clz(__ballot_sync(0xffffffffu, before));
    high = min(high, low + (last + 1) * step);
    low += last * step;
  }
  return low;
}

// EV elements of T, 16 bytes, as float32.
template <typename T, int EV>
__device__ inline void unpack(const uint4& raw, float (&out)[EV]) {
  const T* values = reinterpret_cast<const T*>(&raw);
#pragma unroll
  for (int k = 0; k < EV; ++k) out[k] = to_float(values[k]);
}

// 2^exponent; below the normal range of float32: 0.
__device__ inline float power_of_two(float exponent) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
  return power;
}
// For an integer of at most 0.
__device__ inline float power_of_two(double exponent) {
  return exponent < -126.0 ? 0.0f : __int_as_float((127 + static_cast<int>(exponent)) << 23);
}

// The tiles of one class, the one that has tile `from` of the unit.
struct ClassTiles {
  int64_t first;       // of its references, among all k m; -1: it has none
  int absent;          // references that its last tile lacks
  int begin = 0, end;  // among the unit's tiles
};
template <int TR>
__device__ __forceinline__ ClassTiles class_of(const Inputs& in, const UnitList& list, const Unit& unit,
                                               int from) {
  static_assert((TR & (TR - 1)) == 0, "a power of two");
  const auto absent = [](int64_t count) { return -static_cast<int>(count) & (TR - 1); };
  if (unit.count == 0) return {-1, TR, 0, unit.tiles};
  if (unit.group >= 0) return {unit.group * in.m, absent(unit.count), 0, unit.tiles};
  const int64_t group = find_prefix(list.group_tiles, 0, in.k, from);
  return {group * in.m, absent(valid_count(in, group)), static_cast<int>(list.group_tiles[group]),
          static_cast<int>(list.group_tiles[group + 1])};
}

// What a block keeps of a row in shared memory. The sign of x: see Row.
struct RowState {
  int64_t index;
  void *x, *out;  // see x_of, out_of
  double a, b;    // out = a x + b mean
  double alpha;
  double per_square;                               // log2(e) / (2 sigma^2)
  double shift;                                    // |y|^2 / (2 sigma^2) in units of log 2
  float sign, half_alpha, high_alpha, rest_alpha;  // alpha in float32, and what that drops
  float rate;                                      // log2(e) alpha / sigma^2

  __device__ double exact_rate() const { return 2 * alpha * per_square; }
};

// What others may read of a row before they are told of the rest, and the rest.
__device__ __forceinline__ void name_row(const Inputs& in, int64_t index, RowState& row) {
  row.index = index, row.x = x_of(in, index).data;
}
__device__ __forceinline__ void set_row(const Inputs& in, int64_t index, RowState& row) {
  const Row at = row_coefficients(in, index);
  row.a = at.a, row.b = at.b, row.alpha = at.alpha, row.out = out_of(in, index).data;
  row.per_square = LOG2_E / (2 * at.sigma * at.sigma);
  row.sign = static_cast<float>(at.sign), row.half_alpha = static_cast<float>(0.5 * at.alpha);
  row.high_alpha = static_cast<float>(at.alpha);
  row.rest_alpha = static_cast<float>(at.alpha - row.high_alpha);
  row.rate = static_cast<float>(LOG2_E * at.rate());
}

// Four elements of T side by side.
template <typename T>
__device__ __forceinline__ float4 load_four(const T* from) {
  struct alignas(4 * sizeof(T)) Four {
    T v[4];
  };
  const Four four = *reinterpret_cast<const Four*>(from);
  return make_float4(to_float(four.v[0]), to_float(four.v[1]), to_float(four.v[2]), to_float(four.v[3]));
}
// Four elements from i on, zero from `limit` on: for dtypes and alignments that are rare.
__device__ __noinline__ static float4 load_four(Array a, int64_t i, int64_t limit) {
  float v[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) v[k] = i + k < limit ? load_as<float>(a, i + k) : 0.0f;
  return make_float4(v[0], v[1], v[2], v[3]);
}
__device__ __noinline__ static void store_four(Array a, int64_t i, int64_t limit, float4 v) {
  if (i < limit) store_as(a, i, v.x);
  if (i + 1 < limit) store_as(a, i + 1, v.y);
  if (i + 2 < limit) store_as(a, i + 2, v.z);
  if (i + 3 < limit) store_as(a, i + 3, v.w);
}

// Q elements of x or source, EV of them side by side, from base + first, base + first + STRIDE and so on;
// zero from base + limit on. One branch for all loads, which are in flight together.
template <int EV, int STRIDE, int Q>
__device__ __forceinline__ void load_elements(const Array& a, int64_t base, int first, int limit,
                                              bool vectors, float (&out)[Q]) {
  const float* const from = static_cast<const float*>(a.data) + base;
  const bool fast = a.dtype == Dtype::f32 && vectors;
#pragma unroll
  for (int q = 0; q < Q; q += 4) {
    const int e = first + q / EV * STRIDE + q % EV;
    float4 v = make_float4(0, 0, 0, 0);
    if (fast && e < limit) v = *reinterpret_cast<const float4*>(from + e);
    out[q] = v.x, out[q + 1] = v.y, out[q + 2] = v.z, out[q + 3] = v.w;
  }
  if (fast) return;
#pragma unroll
  for (int q = 0; q < Q; q += 4) {
    const int e = first + q / EV * STRIDE + q % EV;
    const float4 v = load_four(a, base + e, base + limit);
    out[q] = v.x, out[q + 1] = v.y, out[q + 2] = v.z, out[q + 3] = v.w;
  }
}

// From x to y = x - alpha c. This thread's share of |y|^2 where it is wanted.
template <typename T, int Q, int SLOTS>
__device__ __forceinline__ double subtract_centre(const RowState& row, const uint4 (&packed)[SLOTS],
                                                  bool squares, float (&y)[Q]) {
  constexpr int EV = Q / SLOTS;
  const float sign = row.sign, high = row.high_alpha, rest = row.rest_alpha;
  double square = 0;
#pragma unroll
  for (int s = 0; s < SLOTS; ++s) {
    float c[EV];
    unpack<T, EV>(packed[s], c);
    if (squares) {
#pragma unroll
      for (int k = 0; k < EV; ++k) {
        const double exact =
            fma(-row.alpha, static_cast<double>(c[k]), static_cast<double>(sign * y[s * EV + k]));
        square = fma(exact, exact, square);
      }
    }
#pragma unroll
    for (int k = 0; k < EV; ++k) y[s * EV + k] = fmaf(-rest, c[k], fmaf(-high, c[k], sign * y[s * EV + k]));
  }
  return square;
}

// The latter alone, for who wants it rarely and keeps its code out of the way of the rest.
template <typename T, int Q, int SLOTS>
__device__ __forceinline__ double square_from_centre(const RowState& row, const uint4 (&packed)[SLOTS],
                                                     const float (&y)[Q]) {
  constexpr int EV = Q / SLOTS;
  double square = 0;
#pragma unroll
  for (int s = 0; s < SLOTS; ++s) {
    uint4 raw = packed[s];
    asm volatile("" : "+r"(raw.x), "+r"(raw.y), "+r"(raw.z), "+r"(raw.w));  // converted here, not before
    float c[EV];
    unpack<T, EV>(raw, c);
#pragma unroll
    for (int k = 0; k < EV; ++k) {
      const double exact =
          fma(-row.alpha, static_cast<double>(c[k]), static_cast<double>(row.sign * y[s * EV + k]));
      square = fma(exact, exact, square);
    }
  }
  return square;
}

// Where a block works: its slice of D, and its rows of a unit.
struct RowPlace {
  int64_t slices;
  int rank, rows;
  int64_t slice, offset;
  int length;
  bool vectors;

  __device__ int64_t part_of(int64_t team, bool begins, int row) const {
    return (2 * (team * slices + rank) + (begins ? 1 : 0)) * rows + row;
  }
};

enum SegmentFlags : int {
  SEGMENT_PART_BEGIN = 1,  // the first of this unit in this team
  SEGMENT_PART_END = 2,    // the last
  SEGMENT_UNIT_BEGIN = 4,  // the team has the unit's first tile
  SEGMENT_UNIT_END = 8,    // the unit ends here; sources, where there are any, come after its references
  SEGMENT_LAST = 16,       // of the team's range
  SEGMENT_LIST_DONE = 32,
};

// References of one class that follow one another, for the rows of a unit.
template <int ROWS>
struct Segment {
  int64_t centre;  // index of the class's first reference among all k m; -1: the origin
  int64_t first;   // of the segment's first reference
  int tiles, references;
  int flags, squares;  // squares: whether |y|^2 is wanted
  int alone;           // no other unit has the class
  int count, order;    // rows of the unit; the first one's place in UnitList::order
  int from, to;        // teams that have parts of the unit
  RowState rows[ROWS];
};

constexpr int SEGMENT_SLOTS = 4;

template <int ROWS>
struct Announcements {
  // Of a segment: where its references are and which its rows; what is to know of these; all consumers are
  // done with it.
  Barrier placed[SEGMENT_SLOTS], told[SEGMENT_SLOTS], done[SEGMENT_SLOTS];
  Segment<ROWS> segments[SEGMENT_SLOTS];

  __device__ void init(int warps) {
#pragma unroll 1
    for (int s = 0; s < SEGMENT_SLOTS; ++s) {
      init_barrier(&placed[s], 1);
      init_barrier(&told[s], 1);
      init_barrier(&done[s], warps);
    }
  }
};

// The first segment of a team, from what the lanes of a warp know of a list of units of one row that all cost
// the same for a tile: long before it can be found in the list. False where that is not so simple. end_cost:
// of a unit, beside its tiles.
template <int TR, int ROWS>
__device__ __forceinline__ bool place_first(const Inputs& in, const LaneUnit& unit, unsigned teams,
                                            unsigned team, int most_tiles, unsigned end_cost,
                                            Segment<ROWS>& segment, int lane) {
  constexpr unsigned ALL = 0xffffffffu;
  if (unit.cost >> 30 != 0) return false;
  const unsigned cost = static_cast<unsigned>(unit.cost), tiles = static_cast<unsigned>(unit.tiles);
  const unsigned number = max(min(teams, cost / TILE_WEIGHT), 1u);
  const unsigned length = cost / number, longer = cost - length * number;
  const auto begin_of = [&](unsigned at) {
    at = min(at, number);
    return length * at + min(at, longer);
  };
  const unsigned low = begin_of(team), high = begin_of(team + 1), begin = static_cast<unsigned>(unit.begin);
  const unsigned from = low > begin ? (low - begin + TILE_WEIGHT - 1) / TILE_WEIGHT : 0;
  const unsigned to = high > begin ? min((high - begin + TILE_WEIGHT - 1) / TILE_WEIGHT, tiles) : 0;
  const bool mine = unit.leads && from < to;
  const unsigned first = __reduce_min_sync(ALL, mine ? begin : ALL);
  const bool chosen = mine && begin == first, simple = chosen && unit.label >= 0 && unit.count > 0;
  if (simple) {
    const unsigned count = min(to - from, static_cast<unsigned>(most_tiles)), up_to = from + count;
    const int64_t before = static_cast<int64_t>(from) * TR;
    segment.centre = unit.label * in.m, segment.first = segment.centre + before;
    segment.tiles = static_cast<int>(count);
    segment.references = static_cast<int>(min(unit.count - before, static_cast<int64_t>(count) * TR));
    segment.flags = SEGMENT_PART_BEGIN | (from == 0 ? SEGMENT_UNIT_BEGIN : 0) |
                    (up_to == to ? SEGMENT_PART_END : 0) | (up_to == tiles ? SEGMENT_UNIT_END : 0) |
                    (begin + tiles * TILE_WEIGHT + end_cost >= high && up_to == to ? SEGMENT_LAST : 0);
    segment.squares = in.lse.data != nullptr;
    segment.alone = unit.alone, segment.count = 1, segment.order = unit.first;
    name_row(in, lane, segment.rows[0]);
  }
  return __any_sync(ALL, simple);
}

// The announcer, a warp: tells the producer and the consumers of each segment in the team's range.
// most_tiles(rows): of a segment. know_row(index, state) is called for each row before the segment is told;
// await(barrier, phase) until consumers have done with an earlier one. begun: place_first has placed the
// first one.
template <int TR, bool DEAL, int ROWS, typename MostTiles, typename KnowRow, typename Await>
__device__ __forceinline__ void announce(const Inputs& in, const UnitList& list, const RowPlace& place,
                                         int teams, int team, Announcements<ROWS>& announced,
                                         const MostTiles& most_tiles, const KnowRow& know_row,
                                         const Await& await, int lane, bool begun = false) {
  int slot = 0, phase = 1;
  const auto find = [&](int64_t at) { return find_unit(list, at, lane); };
  walk_units<DEAL>(list, teams, team, find, [&](const UnitShare& share, const Ranges<DEAL>& ranges) {
    const Unit& unit = list.units[share.number];
    const int rows = unit.rows;
    int tile = share.from;
    int begins = SEGMENT_PART_BEGIN;
    while (tile < share.to) {
      const ClassTiles tiles = class_of<TR>(in, list, unit, tile);
      const int stop = min(tiles.end, share.to);
      while (tile < stop) {
        const int count = min(stop - tile, most_tiles(rows));
        if (!begun) await(&announced.done[slot], phase);
        Segment<ROWS>& segment = announced.segments[slot];
        if (lane == 0 && !begun) {
          segment.centre = tiles.first, segment.first = tiles.first + int64_t{tile - tiles.begin} * TR;
          segment.tiles = count;
          segment.references = count * TR - (tile + count == tiles.end ? tiles.absent : 0);
          segment.flags = begins | (share.from == 0 ? SEGMENT_UNIT_BEGIN : 0) |
                          (tile + count == share.to ? SEGMENT_PART_END : 0) |
                          (tile + count == unit.tiles ? SEGMENT_UNIT_END : 0) |
                          (share.last && tile + count == share.to ? SEGMENT_LAST : 0);
          segment.squares = in.lse.data || unit.group < 0;
          segment.alone = unit.alone, segment.count = rows, segment.order = unit.first;
        }
        int64_t index = 0;
        if (lane < rows) {
          index = list.order[unit.first + lane];
          if (!begun) name_row(in, index, segment.rows[lane]);
        }
        __syncwarp();
        if (lane == 0) {
          if (!begun) arrive(&announced.placed[slot]);
          if (share.from == 0 && share.to == unit.tiles) {
            segment.from = segment.to = team;
          } else {
            ranges.teams_of(list, share.number, segment.from, segment.to);
          }
        }
        if (lane < rows) {
          const bool here = !in.mailboxes || owner_of(in, index) == in.part;
          if (place.vectors && here)  // what the consumers will need, brought near
            prefetch_bulk(
                static_cast<const char*>(in.x.data) + (index * in.d + place.offset) * size_of(in.x.dtype),
                place.length * size_of(in.x.dtype));
          know_row(index, segment.rows[lane]);
        }
        begun = false;
        __syncwarp();
        if (lane == 0) arrive(&announced.told[slot]);
        if (++slot == SEGMENT_SLOTS) slot = 0, phase ^= 1;
        tile += count;
        begins = 0;
      }
    }
  });
  await(&announced.done[slot], phase);
  if (lane == 0) {
    announced.segments[slot].flags = SEGMENT_LIST_DONE;
    arrive(&announced.placed[slot]);
    arrive(&announced.told[slot]);
  }
}

template <int TR, bool DEAL, int ROWS, typename MostTiles>
__device__ __forceinline__ void announce(const Inputs& in, const UnitList& list, const RowPlace& place,
                                         int teams, int team, Announcements<ROWS>& announced,
                                         const MostTiles& most_tiles, int lane) {
  const auto know_row = [&](int64_t index, RowState& row) { set_row(in, index, row); };
  const auto await = [](Barrier* barrier, int phase) { wait_barrier(barrier, phase); };
  announce<TR, DEAL>(in, list, place, teams, team, announced, most_tiles, know_row, await, lane);
}

// Of the online softmax, the same in all threads that share a row. The largest score, and the integer `top`
// as base rate + rest; rate in units of log 2; the sum of the weights 2^(score - top).
struct RowScores {
  static constexpr float NEAR = 24;  // in units of log 2: what is further below the best weighs nothing

  float rate, base, rest, total;
  float worst;  // the largest score, either way
  double top;

  __device__ __forceinline__ void reset() { base = top = -INFINITY, rest = total = worst = 0; }
  // The weight of the largest score.
  __device__ __forceinline__ float lead() const { return base > -INFINITY ? power_of_two(-rest) : 0.0f; }

  // Scores are differences of two terms, y.d and alpha/2 |d|^2, and their error goes with these. Mostly the
  // largest score tells how large they are. But a class's first reference has d = 0 and the score 0, and so
  // have, nearly, all that weigh as much as it does: rows between these may have no large score at all.
  __device__ __forceinline__ bool is_near_the_first() const { return fabsf(base) * rate < NEAR; }
  // There, y.d less the score is alpha/2 |d|^2 of those that are not the first; weighted: the sum of y.d over
  // all references.
  __device__ __forceinline__ void measure_terms(float weighted) {
    const float others = total - power_of_two(-top);  // beside the first, if that is among them
    float weight = total;
    if (base > 0) weight = fmaxf(others, lead());
    if (base == 0 && others > 1e-6f * total) weight = others;
    worst = fmaxf(worst, __fdividef(fabsf(weighted), weight) - fmaxf(base, 0));
  }
};

// From scores to weights, of which the first `many` count, and the sums relative to the same `top`. Whether
// there is anything to add. note(j): that score j is the largest so far.
template <int COUNT, int Q, typename Note>
__device__ __forceinline__ bool weigh_scores(RowScores& my, int many, float (&scores)[COUNT], float (&sum)[Q],
                                             const Note& note) {
  float best = -INFINITY;
#pragma unroll
  for (int j = 0; j < COUNT; ++j) {
    if (j < many) best = fmaxf(best, scores[j]), my.worst = fmaxf(my.worst, fabsf(scores[j]));
  }
  if (best > my.base) {  // rarely, after the first tiles
    const double bound = static_cast<double>(best) * my.rate, top = fmax(ceil(bound), my.top);
    const float scale = power_of_two(my.top - top);
    my.base = best;
    my.rest = static_cast<float>(top - bound);
    my.top = top;
    my.total *= scale;
#pragma unroll
    for (int q = 0; q < Q; ++q) sum[q] *= scale;
    int at = COUNT - 1;
#pragma unroll
    for (int j = COUNT - 2; j >= 0; --j) at = scores[j] == best ? j : at;
    note(at);
  }
  bool any = false;
#pragma unroll
  for (int j = 0; j < COUNT; ++j) {
    const float exponent = fmaf(scores[j] - my.base, my.rate, -my.rest);
    scores[j] = j < many ? power_of_two(exponent) : 0.0f;
    my.total += scores[j];
    any = any || !(scores[j] < NO_WEIGHT);
  }
  return any;
}

// The same for a row's own source, which comes last and may be far from all references: its score is in
// float64, and it is added itself, not as a difference, when the segment ends. Returns its weight.
template <int Q>
__device__ __forceinline__ float weigh_source(RowScores& my, double score, double rate, float (&sum)[Q]) {
  const double bound = score * rate;
  if (bound > my.top) {
    const double top = ceil(bound);
    const float scale = power_of_two(my.top - top);
    my.rest += static_cast<float>(fmin(top - my.top, 1e6));
    my.top = top;
    my.total *= scale;
#pragma unroll
    for (int q = 0; q < Q; ++q) sum[q] *= scale;
  }
  return power_of_two(static_cast<float>(bound - my.top));
}

// This thread's share of the source's score; `difference`: of the source from the centre. What is not finite
// becomes NaN, in all of the row.
template <int Q>
__device__ __forceinline__ double score_source(const RowState& row, const float (&y)[Q],
                                               const float (&difference)[Q]) {
  double share = 0;
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    const double d = difference[q];
    share = fma(fma(-0.5 * row.alpha, d, static_cast<double>(y[q])), d, share);
  }
  return fma(share, 0.0, share);
}

// 2^exponent. Not in line: code that has to come from memory first costs more than the call.
__device__ __noinline__ static double power(double exponent) {
  return exp2(exponent);
}

// Two parts of a row, or of a team's share of it, together; what the sums of each are multiplied by.
struct Joined {
  PartRow all;
  double by_first, by_second;
};
__device__ __forceinline__ Joined join(const PartRow& first, const PartRow& second) {
  const double most = first.log2_weight >= second.log2_weight ? first.log2_weight : second.log2_weight;
  const double a = power(first.log2_weight - most), b = power(second.log2_weight - most);
  return {{most, fma(a, first.total, b * second.total),
           fmaxf(static_cast<float>(a) * first.lead, static_cast<float>(b) * second.lead),
           fmaxf(first.scale, second.scale)},
          a,
          b};
}

// `own` with what came before it.
__device__ __forceinline__ Joined join_to(const GroupsRow& before, GroupsRow& own) {
  const Joined joined = join(before, own);
  if (joined.all.lead > static_cast<float>(joined.by_second) * own.lead) own.best = before.best;
  own = {joined.all.log2_weight, joined.all.total, joined.all.lead, joined.all.scale, own.best};
  return joined;
}

struct RowEnd {
  int64_t index;  // of the row
  void* out;
  int row;           // of the unit
  int64_t from, to;  // teams that have parts of the unit
  double a, b;       // out = a x + b mean
  GroupsRow own;     // what this team has
};

__device__ __forceinline__ void store_sums(double* to, const double (&v)[4]) {
  __stcg(reinterpret_cast<double2*>(to), make_double2(v[0], v[1]));
  __stcg(reinterpret_cast<double2*>(to) + 1, make_double2(v[2], v[3]));
}
__device__ __forceinline__ void add_sums(const double* from, double weight, double (&v)[4]) {
  const double2 low = __ldcg(reinterpret_cast<const double2*>(from));
  const double2 high = __ldcg(reinterpret_cast<const double2*>(from) + 1);
  v[0] = fma(weight, low.x, v[0]), v[1] = fma(weight, low.y, v[1]);
  v[2] = fma(weight, high.x, v[2]), v[3] = fma(weight, high.y, v[3]);
}

// The row's parts together, always in the same order: who comes last makes no difference. By whole warps.
struct PartsTogether {
  GroupsRow all;
  double weight;  // of the part of team `from` + lane, relative to 2^log2_weight of all
};
__device__ __forceinline__ const GroupsRow* part_at(const BulkParts& parts, const RowPlace& place,
                                                    const RowEnd& end, int64_t team) {
  return parts.rows + place.part_of(team, team == end.from, end.row);
}
__device__ __forceinline__ PartRow part_row(const BulkParts& parts, const RowPlace& place, const RowEnd& end,
                                            int64_t team) {
  if (team > end.to) return {-INFINITY, 0, 0, 0};
  const GroupsRow* const row = part_at(parts, place, end, team);
  const double2 weights = __ldcg(reinterpret_cast<const double2*>(&row->log2_weight));
  const float2 others = __ldcg(reinterpret_cast<const float2*>(&row->lead));
  return {weights.x, weights.y, others.x, others.y};
}
__device__ __forceinline__ PartsTogether sum_of_parts(const BulkParts& parts, const RowPlace& place,
                                                      const RowEnd& end, int lane) {
  const PartRow mine = part_row(parts, place, end, end.from + lane);
  double best = mine.log2_weight;
  const auto greater = [](double a, double b) { return b > a || a != a ? b : a; };
#pragma unroll 1
  for (int64_t team = end.from + 32 + lane; team <= end.to; team += 32)
    best = greater(best, part_row(parts, place, end, team).log2_weight);
#pragma unroll 1
  for (int hop = 16; hop > 0; hop /= 2) best = greater(best, __shfl_xor_sync(0xffffffffu, best, hop));
  const double weight = power(mine.log2_weight - best);
  double total = weight * mine.total;
  float lead = static_cast<float>(weight) * mine.lead, scale = mine.scale;
  int64_t leading = end.from + lane;
#pragma unroll 1
  for (int64_t team = end.from + 32 + lane; team <= end.to; team += 32) {
    const PartRow other = part_row(parts, place, end, team);
    const double by = power(other.log2_weight - best);
    total = fma(by, other.total, total);
    if (static_cast<float>(by) * other.lead > lead)
      lead = static_cast<float>(by) * other.lead, leading = team;
    scale = fmaxf(scale, other.scale);
  }
  const float own = lead;
#pragma unroll 1
  for (int hop = 16; hop > 0; hop /= 2) {
    total += __shfl_xor_sync(0xffffffffu, total, hop);
    lead = fmaxf(lead, __shfl_xor_sync(0xffffffffu, lead, hop));
    scale = fmaxf(scale, __shfl_xor_sync(0xffffffffu, scale, hop));
  }
  const unsigned leaders = __ballot_sync(0xffffffffu, own == lead);  // none where the row is NaN
  leading = __shfl_sync(0xffffffffu, leading, leaders ? __ffs(leaders) - 1 : 0);
  return {{best, total, lead, scale, __ldcg(&part_at(parts, place, end, leading)->best)}, weight};
}

// Their sums for four elements of the slice from e on, where e is `within`.
__device__ __forceinline__ void add_parts(const BulkParts& parts, const RowPlace& place, const RowEnd& end,
                                          const PartsTogether& together, int e, bool within, double (&v)[4]) {
  constexpr int AT_ONCE = 4;  // loads in flight
#pragma unroll 1
  for (int64_t first = end.from; first <= end.to; first += AT_ONCE) {
    double weights[AT_ONCE];
    double2 low[AT_ONCE], high[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int64_t team = first + i;
      const int at = static_cast<int>(team - end.from);
      weights[i] = __shfl_sync(0xffffffffu, together.weight, at & 31);
      low[i] = high[i] = make_double2(0, 0);
      if (team > end.to) {
        weights[i] = 0;
      } else if (within) {
        const double2* const from = reinterpret_cast<const double2*>(
            parts.sums + place.part_of(team, team == end.from, end.row) * place.slice + e);
        low[i] = __ldcg(from), high[i] = __ldcg(from + 1);
      }
      if (at >= 32 && team <= end.to)
        weights[i] = power(part_row(parts, place, end, team).log2_weight - together.all.log2_weight);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      v[0] = fma(weights[i], low[i].x, v[0]), v[1] = fma(weights[i], low[i].y, v[1]);
      v[2] = fma(weights[i], high[i].x, v[2]), v[3] = fma(weights[i], high[i].y, v[3]);
    }
  }
}

// Four elements of a, x or source.
__device__ __forceinline__ float4 load_four(const Inputs& in, const RowPlace& place, const Array& a,
                                            int64_t index, int e) {
  const int64_t base = index * in.d + place.offset;
  if (a.dtype == Dtype::f32 && place.vectors)
    return *reinterpret_cast<const float4*>(static_cast<const float*>(a.data) + base + e);
  return load_four(a, base + e, base + place.length);
}

// Four elements of x for out = a x + b mean.
__device__ __forceinline__ float4 load_x(const Inputs& in, const RowPlace& place, const RowState& row,
                                         int e) {
  if (row.a == 0) return make_float4(0, 0, 0, 0);
  return load_four(in, place, {row.x, in.x.dtype}, row.index, e);
}

// The source's share of the sums: weight times itself.
__device__ __forceinline__ void add_source(const Inputs& in, const RowPlace& place, int64_t index, int e,
                                           double weight, double (&v)[4]) {
  if (weight == 0) return;
  const float4 source = load_four(in, place, in.source, index, e);
  v[0] = fma(weight, static_cast<double>(source.x), v[0]);
  v[1] = fma(weight, static_cast<double>(source.y), v[1]);
  v[2] = fma(weight, static_cast<double>(source.z), v[2]);
  v[3] = fma(weight, static_cast<double>(source.w), v[3]);
}

// out = a x + b mean for four elements of the slice from e on, given x; the mean is by * v.
__device__ __forceinline__ void store_row(const Inputs& in, const RowPlace& place, const RowEnd& end, int e,
                                          double by, float4 x, const double (&v)[4]) {
  const int64_t base = end.index * in.d + place.offset;
  by *= end.b;
  x.x = static_cast<float>(fma(end.a, static_cast<double>(x.x), by * v[0]));
  x.y = static_cast<float>(fma(end.a, static_cast<double>(x.y), by * v[1]));
  x.z = static_cast<float>(fma(end.a, static_cast<double>(x.z), by * v[2]));
  x.w = static_cast<float>(fma(end.a, static_cast<double>(x.w), by * v[3]));
  const Array out = {end.out, in.out.dtype};
  if (out.dtype == Dtype::f32 && place.vectors) {
    *reinterpret_cast<float4*>(static_cast<float*>(out.data) + base + e) = x;
  } else {
    store_four(out, base + e, base + place.length, x);
  }
}

// Plus D/2, which depends on the row alone: typical values stay small, and float32 keeps their digits.
__device__ __forceinline__ double lse_of_row(int64_t d, const PartRow& all) {
  return log(all.total) + LOG_2 * all.log2_weight + 0.5 * static_cast<double>(d);
}
__device__ __forceinline__ double lse_of_row(const Inputs& in, const PartRow& all) {
  return lse_of_row(in.d, all);
}
__device__ __forceinline__ void write_lse(const Inputs& in, int64_t index, const PartRow& all) {
  store_as(lse_of(in, index), index, lse_of_row(in, all));
}

// That of a row with nothing to read.
__device__ __forceinline__ double lse_of_nothing(const Inputs& in, int64_t index) {
  return row_has_group(in, index) ? -INFINITY : NAN;
}

// What the rounding of its scores may do to a row, by one standard deviation: weights that are off at random,
// each by the same share of itself, move the mean by that, times the root of the sum of their squares, as far
// as references are apart; and these are about as far apart as results are large. Where that would be seen:
// how far it moves, beside the distance of the mean from its reference of most weight. Else 0, and where the
// row is NaN. rounding: BulkParts::rounding; b: of out = a x + b mean, in which x may take away most of the
// mean.
constexpr float MOST_ERROR_OF_SCORES = 1.2e-6f;  // beside the row's size
__device__ __forceinline__ Doubt doubt_of_row(float rounding, double b, const GroupsRow& all) {
  const float lead = __fdividef(all.lead, static_cast<float>(all.total)),
              spread = __fdividef(static_cast<float>(all.total - all.lead), static_cast<float>(all.total));
  const float error = rounding * all.scale * sqrtf(lead);
  const float by = fmaxf(0.5f * fabsf(static_cast<float>(b)), 1);
  return {all.best, error * spread * by > MOST_ERROR_OF_SCORES ? error : 0, __fdividef(1, lead)};
}
constexpr int NO_ROW = -1;

struct RowInDoubt {
  int64_t index;
  Doubt doubt;
  double a, b;        // out = a x + b mean
  int64_t low, high;  // of the elements that count

  // x and the reference of most weight, by THREADS threads: visit(at, limit, x, r), four elements from `at`
  // on. By calls, as are loads of dtypes that are rare: more code here makes the loops of those who call it
  // spill.
  template <int THREADS, typename Visit>
  __device__ __forceinline__ void visit(const Inputs& in, int thread, const Visit& visit) const {
    const int64_t base = index * in.d, limit = base + high;
    const bool is_source = doubt.best == OWN_SOURCE;
    const Array best = is_source ? in.source : in.refs;
    const int64_t from = is_source ? base : doubt.best * in.d;
#pragma unroll 1
    for (int64_t e = low + 4 * thread; e < high; e += 4 * THREADS)
      visit(base + e, limit, load_four(x_of(in, index), base + e, limit),
            load_four(best, from + e, from + high));
  }
};

// Whether it is seen in the row's result, which is in memory: where the mean is its reference of most weight,
// any weights are right. So it is where all that weigh are copies of one sample, as at an epoch's end. Shares
// of two sums: is x above zero, it is seen; is y, more shows between the mean and that reference than the
// rounding of float32 sums of copies.
template <int THREADS>
__device__ __forceinline__ double2 distance_shares(const Inputs& in, const RowInDoubt& row, int thread) {
  constexpr double OF_F16 = 0x1p-11, OF_BF16 = 0x1p-8;  // of a result in fewer bits
  const Array out = out_of(in, row.index);
  const double less = out.dtype == Dtype::f16 ? OF_F16 : out.dtype == Dtype::bf16 ? OF_BF16 : 0;
  const double most = MOST_ERROR_OF_SCORES / static_cast<double>(row.doubt.error) + less;
  const double of_sums = 0x1p-24 * static_cast<double>(row.doubt.times);
  double2 shares = make_double2(0, 0);
  row.visit<THREADS>(in, thread, [&](int64_t at, int64_t limit, float4 x, float4 r) {
    const float4 result = load_four(out, at, limit);
    const auto add = [&](double its, double x, double r) {
      const double mean = row.b * r, gap = its - fma(row.a, x, mean), square = gap * gap;
      shares.x += fma(-most * its, most * its, square);
      shares.y += fma(-of_sums * mean, of_sums * mean, fma(-less * its, less * its, square));
    };
    add(result.x, x.x, r.x), add(result.y, x.y, r.y), add(result.z, x.z, r.z), add(result.w, x.w, r.w);
  });
  return shares;
}

// The row's result from that reference.
template <int THREADS>
__device__ __forceinline__ void store_best(const Inputs& in, const RowInDoubt& row, int thread) {
  const Array out = out_of(in, row.index);
  const auto combine = [&](float x, float r) {
    return static_cast<float>(fma(row.a, static_cast<double>(x), row.b * static_cast<double>(r)));
  };
  row.visit<THREADS>(in, thread, [&](int64_t at, int64_t limit, float4 x, float4 r) {
    store_four(out, at, limit,
               make_float4(combine(x.x, r.x), combine(x.y, r.y), combine(x.z, r.z), combine(x.w, r.w)));
  });
}

// Whether a row in doubt is to be evaluated again. The float32 sums of many copies are off, too, but the mean
// of copies is known: from so many on it is written. sum(share): over all who do so.
template <int THREADS, typename Sum>
__device__ __forceinline__ bool stays_in_doubt(const Inputs& in, const RowInDoubt& row, int thread,
                                               const Sum& sum) {
  constexpr float MANY = 3.5f;
  const double2 shares = distance_shares<THREADS>(in, row, thread);
  if (!(sum(shares.x) <= 0)) return true;  // where the result overflows, too
  if (row.doubt.times < MANY) return false;
  if (!(sum(shares.y) <= 0)) return true;
  store_best<THREADS>(in, row, thread);
  return false;
}

// What one thread does about a finished row. `doubtful`: the first of the block's list.
__device__ __forceinline__ void finish_row(const Inputs& in, const BulkParts& parts, const RowPlace& place,
                                           int64_t index, double b, const GroupsRow& all, int* doubtful) {
  if (in.lse.data && place.rank == 0) write_lse(in, index, all);
  const Doubt doubt = doubt_of_row(parts.rounding, b, all);
  const int64_t at = place.rank * in.n + index;
  if (parts.next) {
    if (!(doubt.error > 0)) return;
    parts.doubts[at] = doubt;
    parts.next[at] = atomicExch(doubtful, static_cast<int>(index));
  } else if (place.rank == 0) {
    parts.doubts[index] = doubt;
  }
}

// Whether it was the last of the row's parts.
template <int ROWS>
__device__ __forceinline__ bool count_part(const BulkParts& parts, const Segment<ROWS>& segment, int my_row) {
  wait_for_previous_launch();  // which sets the counts to zero
  return add_arrival(parts.arrived + segment.order + my_row) == segment.to - segment.from;
}
// A part that is left to others, in all but the block's last segment.
template <int ROWS>
__device__ __forceinline__ bool is_filed(const Segment<ROWS>& segment) {
  return segment.flags & SEGMENT_PART_END && !(segment.flags & SEGMENT_LAST) && segment.to > segment.from;
}

// The row's result from its parts, all of them in memory, by THREADS threads, thread() of them.
template <int THREADS, typename Thread>
__device__ __forceinline__ void merge_row(const Inputs& in, const BulkParts& parts, const RowPlace& place,
                                          const RowEnd& end, int* doubtful, const Thread& thread) {
  const int lane = thread() % 32;
  const PartsTogether together = sum_of_parts(parts, place, end, lane);
  const double mean_by = 1 / together.all.total;
#pragma unroll 1
  for (int e = 4 * thread(); e - 4 * lane < place.length; e += 4 * THREADS) {
    double v[4] = {};
    float4 x = make_float4(0, 0, 0, 0);
    if (e < place.length && end.a != 0) x = load_four(in, place, x_of(in, end.index), end.index, e);
    add_parts(parts, place, end, together, e, e < place.length, v);
    if (e < place.length) store_row(in, place, end, e, mean_by, x, v);
  }
  if (thread() == 0) finish_row(in, parts, place, end.index, end.b, together.all, doubtful);
}

// The clerk of a block that holds whole samples, one thread: counts the part of a unit that began in an
// earlier block. In the rare case that all others are there the consumers merge them when they have done the
// rest.
template <typename Shared>
__device__ __forceinline__ void keep_files(const BulkParts& parts, bool merge_last, Shared& shared) {
  int slot = 0, slot_phase = 0;
  for (;;) {
    wait_barrier(&shared.announced.told[slot], slot_phase);
    const auto& segment = shared.announced.segments[slot];
    if (segment.flags & SEGMENT_LIST_DONE) break;
    if (is_filed(segment)) {
      wait_barrier(&shared.filed, 0);
#pragma unroll 1
      for (int r = 0; merge_last && r < segment.count; ++r) {
        if (!count_part(parts, segment, r)) continue;
        const RowState& row = segment.rows[r];
        shared.rows_left[shared.unmerged++] = {row.index,  row.out, r,     segment.from,
                                               segment.to, row.a,   row.b, {}};
      }
    }
    arrive(&shared.announced.done[slot]);
    if (++slot == SEGMENT_SLOTS) slot = 0, slot_phase ^= 1;
  }
  arrive(&shared.closed);
}

// Where merge_kernel follows, the clerk tells it when the block has left all: sooner than the launch behind
// hears that this one is done. That may begin when all blocks have allowed it, and so finds no word of an
// earlier call; and since all of them run by then, it may wait for them in place.
__device__ __forceinline__ void begin_leaving(int* left) {
  set_arrivals(left, 0);
  __threadfence();
  allow_next_launch();
}
__device__ __forceinline__ void leave_all(int* left, Barrier* all) {
  wait_barrier(all, 0);
  set_arrivals(left, 1);
}

// Of the row at `place` of UnitList::order.
__device__ __forceinline__ MergedRow merged_row(const Inputs& in, const UnitList& list, int64_t teams,
                                                int place) {
  if (place >= list.sizes[1]) return {0, 0, 0, 1, 0};
  int unit = 0, from, last;
#pragma unroll 1
  while (unit + 1 < list.sizes[0] && list.units[unit + 1].first <= place) ++unit;
  Ranges<false>(list, teams).teams_of(list, unit, from, last);
  const Row row = row_coefficients(in, list.order[place]);
  return {row.a, row.b, from, last - from + 1, place - list.units[unit].first};
}

// Where merge_kernel follows, one warp leaves it what it would else have to find out when all wait for it.
__device__ __forceinline__ void leave_rows(const Inputs& in, const UnitList& list, const BulkParts& parts,
                                           int64_t teams, int lane) {
#pragma unroll 1
  for (int i = lane; i < in.n; i += 32) parts.merged[list.order[i]] = merged_row(in, list, teams, i);
}

// Rows with nothing to read become NaN; by a warp of each block, which share pieces of the rows: they may be
// all that there is to do.
__device__ __forceinline__ void write_dead_pieces(const Inputs& in, const UnitList& list,
                                                  const BulkParts& parts, int blocks, int block, int lane) {
  constexpr int PIECE = 4 * 128;
  const int d = static_cast<int>(in.d), pieces = (d + PIECE - 1) / PIECE, dead = list.sizes[1];
#pragma unroll 1
  for (int item = block; item < (static_cast<int>(in.n) - dead) * pieces; item += blocks) {
    const int64_t index = list.order[dead + item / pieces];
    const int begin = item % pieces * PIECE, end = min(begin + PIECE, d);
    for (int e = begin + 4 * lane; e < end; e += 4 * 32)
      store_four(out_of(in, index), index * d + e, index * d + d, make_float4(NAN, NAN, NAN, NAN));
    if (begin > 0 || lane > 0) continue;
    if (in.lse.data) store_as(lse_of(in, index), index, NAN);
    if (!parts.next) parts.doubts[index] = {};
  }
}

// The same by `threads` threads of each block.
__device__ __forceinline__ void write_dead_rows(const Inputs& in, const UnitList& list,
                                                const BulkParts& parts, const RowPlace& place, int64_t teams,
                                                int64_t team, int tid, int threads) {
  for (int64_t i = list.sizes[1] + team; i < in.n; i += teams) {
    const int64_t index = list.order[i], base = index * in.d + place.offset;
    for (int e = 4 * tid; e < place.length; e += 4 * threads)
      store_four(out_of(in, index), base + e, base + place.length, make_float4(NAN, NAN, NAN, NAN));
    if (place.rank > 0 || tid > 0) continue;
    if (in.lse.data) store_as(lse_of(in, index), index, NAN);
    if (!parts.next) parts.doubts[index] = {};
  }
}

}  // namespace svel::cuda
