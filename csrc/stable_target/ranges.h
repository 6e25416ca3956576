// The list of units and the ranges of it that teams of blocks have, as data and arithmetic alone: the kernels
// (units.cuh, bulk_parts.cuh) walk it with warps, the tests of the planner on the host.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/planner.h"

#if defined(__CUDACC__)
#define SVEL_ON_DEVICE __device__
#define SVEL_ON_DEVICE_INLINE __device__ __forceinline__
#define SVEL_NO_UNROLL _Pragma("unroll 1")
#else
#define SVEL_ON_DEVICE
#define SVEL_ON_DEVICE_INLINE inline
#define SVEL_NO_UNROLL
#endif

namespace svel {

#if !defined(__CUDACC__)
using std::max;
using std::min;
#endif

struct Unit {
  int64_t group;  // -1: all groups
  int64_t count;  // valid references
  int tiles;      // of its references; at least one, which holds none where a row has only its own source
  int first;      // of its rows, in UnitList::order
  uint8_t rows;
  bool alone;       // no other unit has this group
  uint16_t weight;  // what a tile costs
};

struct UnitList {
  int* order;       // (n,) rows with something to read by group within 4096 rows, the others from the end
  Unit* units;      // (n,)
  int64_t* begins;  // (n + 1,) prefix sums over the units: what they cost
  int64_t* group_tiles;  // (k + 1,) prefix sums over the groups: tiles, where some row takes all of them
  // Units, rows with something to read, the largest weight of a unit; where units are dealt out, those that
  // come first, since others have the same group, and the most that one of them costs.
  int* sizes;
  UnitCosts costs;

  SVEL_ON_DEVICE int weight(int rows) const {
    return rows == 1 ? TILE_WEIGHT : rows == 2 ? costs.two : costs.four;
  }
  // Of a unit: its tiles, and after them its end.
  SVEL_ON_DEVICE int64_t cost(int64_t tiles, int rows) const {
    return tiles * weight(rows) + rows * costs.row + costs.unit;
  }
};

static_assert(sizeof(Unit) == UNIT_BYTES, "the planner counts so many");

SVEL_ON_DEVICE_INLINE int64_t divide(int64_t a, int64_t b) {  // neither is negative
  if ((a | b) >> 32 != 0) return a / b;
  return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

// A value that is used here and not before: what a compiler works out from it ahead of a loop takes registers
// that the loop lacks.
SVEL_ON_DEVICE_INLINE void keep_here(int64_t& value) {
#if defined(__CUDACC__)
  asm volatile("" : "+l"(value));
#else
  (void)value;
#endif
}

// The list is cut into ranges of equal cost, the first few one longer, each of a tile at least: so a unit's
// teams follow one another. Teams beyond the last range have nothing.
template <bool DEAL>
struct Ranges {
  int64_t length;
  int longer, number;

  SVEL_ON_DEVICE Ranges(const UnitList& list, int teams) {
    const int64_t cost = list.begins[list.sizes[0]], heaviest = max(list.sizes[2], 1);
    number = cost >= teams * heaviest ? teams
             : cost >= heaviest       ? static_cast<int>(divide(cost, heaviest))
                                      : 1;
    length = divide(cost, number);
    longer = static_cast<int>(cost - length * number);
  }
  SVEL_ON_DEVICE int64_t begin(int team) const {
    const int at = min(team, number);
    return length * at + min(at, longer);
  }
  SVEL_ON_DEVICE int64_t team_of(int64_t cost) const {
    int64_t length = this->length;
    keep_here(length);
    if (cost < longer * (length + 1)) return divide(cost, length + 1);
    return longer + divide(cost - longer * (length + 1), length);
  }
  SVEL_ON_DEVICE int64_t first_team(const UnitList& list, int unit) const {
    return team_of(list.begins[unit]);
  }
  SVEL_ON_DEVICE int64_t last_team(const UnitList& list, int unit) const {
    return team_of(list.begins[unit] + int64_t{list.units[unit].tiles - 1} * list.units[unit].weight);
  }
  SVEL_ON_DEVICE void teams_of(const UnitList& list, int unit, int& first, int& last) const {
    first = static_cast<int>(first_team(list, unit));
    last = static_cast<int>(last_team(list, unit));
  }
};

// The same, but units that share their group with others are dealt out whole, in rounds, to the first
// `together` teams, which have less of the rest: so a group is read for its units at the same time, and from
// memory once. Not to all teams, if it can be: the others keep memory busy meanwhile. Not in line with the
// above, whose code is shorter, and nothing can be read before.
template <>
struct Ranges<true> {
  int64_t length;
  int longer, number;
  const int64_t* begins;         // of the list
  int whole = 0, together = 0;   // units dealt out; teams
  int each = 0, rest = 0, most;  // units for each of them, and one more for the first few; cost of a unit

  SVEL_ON_DEVICE Ranges(const UnitList& list, int teams) : begins(list.begins), most(list.sizes[4]) {
    const int shared = list.sizes[3];
    const int64_t heaviest = max(list.sizes[2], 1);
    int64_t cost = begins[list.sizes[0]];
    SVEL_NO_UNROLL
    for (int some = (teams + 2) / 3; shared > 0 && some <= teams; some *= 3) {
      const int64_t level = cost - begins[shared] + int64_t{shared} * most;
      const int more = static_cast<int>(static_cast<unsigned>(shared) / static_cast<unsigned>(some)) + 1;
      if ((int64_t{more} * most + heaviest) * teams > level) continue;  // a tile is left for the range
      whole = shared, together = some, each = more - 1, rest = shared - each * some, cost = level;
      break;
    }
    number = cost >= teams * heaviest ? teams
             : cost >= heaviest       ? static_cast<int>(divide(cost, heaviest))
                                      : 1;
    length = divide(cost, number);
    longer = static_cast<int>(cost - length * number);
  }
  SVEL_ON_DEVICE int64_t begin(int team) const {
    const int at = min(team, number);
    const int64_t dealt = at < together ? each * at + min(at, rest) : whole;
    return begins[whole] + length * at + min(at, longer) - most * dealt;
  }
  SVEL_ON_DEVICE int64_t team_of(int64_t cost) const {
    int low = 0, high = together;
    if (whole > 0 && cost < begin(high)) {
      SVEL_NO_UNROLL
      while (high - low > 1) {
        const int middle = (low + high) / 2;
        (begin(middle) <= cost ? low : high) = middle;
      }
      return low;
    }
    cost += int64_t{most} * whole - begins[whole];
    int64_t length = this->length;
    keep_here(length);
    if (cost < longer * (length + 1)) return divide(cost, length + 1);
    return longer + divide(cost - longer * (length + 1), length);
  }
  // The first and the last team of a unit that is not dealt out.
  SVEL_ON_DEVICE void teams_of(const UnitList& list, int unit, int& first, int& last) const {
    const int64_t begin = list.begins[unit];
    const int64_t length = int64_t{list.units[unit].tiles - 1} * list.units[unit].weight;
    SVEL_NO_UNROLL
    for (int end = 0; end < 2; ++end)
      (end ? last : first) = static_cast<int>(team_of(begin + (end ? length : 0)));
  }
};

// Of a unit, in a team: its tiles from `from` to `to`.
struct UnitShare {
  int number, from, to;
  bool last;  // of the team's range, unless that has no tile
};

// Of a unit that begins at cost `begin`, the tiles that begin before cost `at`.
SVEL_ON_DEVICE_INLINE int tiles_before(const Unit& unit, int64_t begin, int64_t at) {
  const int64_t tiles = divide(max(at - begin, int64_t{0}) + unit.weight - 1, unit.weight);
  return static_cast<int>(min(tiles, int64_t{unit.tiles}));
}

// A team's shares of the units in its range: visit(share, ranges). find(at): the unit in which cost `at`
// lies.
template <bool DEAL, typename Find, typename Visit, std::enable_if_t<!DEAL, int> = 0>
SVEL_ON_DEVICE_INLINE void walk_units(const UnitList& list, int teams, int team, const Find& find,
                                      const Visit& visit) {
  const Ranges<false> ranges(list, teams);
  const int64_t low = ranges.begin(team), high = ranges.begin(team + 1);
  if (low >= high) return;
  int number = find(low);
  int from = tiles_before(list.units[number], list.begins[number], low);
  SVEL_NO_UNROLL
  for (; number < list.sizes[0] && list.begins[number] < high; ++number, from = 0) {
    const bool last = list.begins[number + 1] >= high;
    const Unit& unit = list.units[number];
    const int to = last ? tiles_before(unit, list.begins[number], high) : unit.tiles;
    if (from < unit.tiles) visit(UnitShare{number, from, to, last}, ranges);
  }
}

// Those dealt out first.
template <bool DEAL, typename Find, typename Visit, std::enable_if_t<DEAL, int> = 0>
SVEL_ON_DEVICE_INLINE void walk_units(const UnitList& list, int teams, int team, const Find& find,
                                      const Visit& visit) {
  const Ranges<true> ranges(list, teams);
  const int64_t low = ranges.begin(team), high = ranges.begin(team + 1);
  int number = -1, dealt = team < ranges.together ? team : ranges.whole;
  SVEL_NO_UNROLL
  for (bool found = false;;) {
    const bool whole = dealt < ranges.whole;
    if (whole) {
      number = dealt, dealt += ranges.together;
    } else if (found) {
      ++number;
    } else {
      if (low >= high) return;
      number = find(low), found = true;
    }
    if (number >= list.sizes[0]) return;
    const int64_t begin = list.begins[number];
    if (!whole && begin >= high) return;
    const Unit& unit = list.units[number];
    int from = 0, to = unit.tiles;
    bool last = dealt >= ranges.whole && low >= high;
    if (!whole) {
      last = list.begins[number + 1] >= high;
      from = tiles_before(unit, begin, low);
      if (last) to = tiles_before(unit, begin, high);
    }
    if (from < unit.tiles) visit(UnitShare{number, from, to, last}, ranges);
  }
}

}  // namespace svel
