// The work list of the bulk kernel (bulk_groups.cuh, bulk_teams.cuh): rows of one group side by side, cut
// into units of a few rows that share one pass over their references. Built by every thread block for itself
// in shared memory where the list is short, which saves a launch and its way through device memory, else by
// one block for all.
#pragma once

#include <climits>

#include "common/hopper.cuh"
#include "common/planner.h"
#include "stable_target/ranges.h"
#include "stable_target/scan.cuh"

namespace svel::cuda {

// The pieces of `memory`, unit_list_bytes, aligned to 16 bytes.
__host__ __device__ inline UnitList place_unit_list(void* memory, int64_t n, int64_t k,
                                                    const UnitCosts& costs) {
  UnitList list;
  list.costs = costs;
  list.units = static_cast<Unit*>(memory);
  list.begins = reinterpret_cast<int64_t*>(list.units + n);
  list.group_tiles = list.begins + n + 1;
  list.order = reinterpret_cast<int*>(list.group_tiles + k + 1);
  list.sizes = list.order + n;
  return list;
}

__device__ inline bool row_is_finite(const Inputs& in, int64_t index) {
  if (!isfinite(load_as<double>(in.time_or_alpha, index))) return false;
  if (in.from_time) return true;
  const double sigma = load_as<double>(in.sigma, index);
  return isfinite(sigma) && sigma != 0.0;
}

// Whether what a row asks for is there, or would be if there were references.
__device__ inline bool row_has_group(const Inputs& in, int64_t index) {
  const int64_t group = in.labels ? in.labels[index] : 0;
  return row_is_finite(in, index) && group >= -1 && group < in.k;
}

// Whether a row has anything to read.
__device__ inline bool row_reads(const Inputs& in, int64_t index, int64_t all_references, int64_t& group) {
  group = in.labels ? in.labels[index] : 0;
  if (!row_has_group(in, index)) return false;
  return in.source.data || (group < 0 ? all_references : valid_count(in, group)) > 0;
}

// Brings what row_reads wants near, all at once.
__device__ inline void prefetch_row(const Inputs& in, int64_t index) {
  prefetch(static_cast<const char*>(in.time_or_alpha.data) + index * size_of(in.time_or_alpha.dtype));
  if (!in.from_time) prefetch(static_cast<const char*>(in.sigma.data) + index * size_of(in.sigma.dtype));
  const int64_t group = in.labels ? in.labels[index] : 0;
  if (in.counts && group >= 0 && group < in.k)
    prefetch(static_cast<const char*>(in.counts) + group * (in.counts_are_long ? 8 : 4));
}

// By all threads of a block. keys: as many as rows, rounded up to a power of two, CHUNK at most.
__device__ inline void build_units(const Inputs& in, const UnitList& list, int tile_refs, int most_rows,
                                   uint64_t* keys, int64_t* scratch) {
  const int tid = threadIdx.x, threads = blockDim.x;
  int64_t all_tiles = 0, all_references = 0, cost = 0;
  bool scanned = false;
  int units = 0, alive = 0, heaviest = 0;
  int64_t dead = 0;
  for (int64_t base = 0; base < in.n; base += CHUNK) {
    const int rows = static_cast<int>(in.n - base < CHUNK ? in.n - base : CHUNK);
    int size = 4;
    while (size < rows) size *= 2;
    bool takes_all = false;
    for (int i = tid; i < rows; i += threads) {
      prefetch_row(in, base + i);
      takes_all = takes_all || (in.labels && in.labels[base + i] == -1);
    }
    if (__syncthreads_or(takes_all) && !scanned) {
      scan_groups(in, tile_refs, list.group_tiles, scratch, all_tiles, all_references);
      scanned = true;
    }
    int alive_here = 0;
    for (int start = 0; start < size; start += threads) {
      const int i = start + tid;
      bool reads = false;
      if (i < rows) {
        int64_t group;
        reads = row_reads(in, base + i, all_references, group);
        const uint64_t rank = static_cast<uint64_t>(reads ? group + 1 : in.k + 1);
        keys[i] = rank << CHUNK_BITS | static_cast<uint64_t>(i);
      } else if (i < size) {
        keys[i] = ~uint64_t{0};
      }
      alive_here += __syncthreads_count(reads);
    }
    if (in.labels || alive_here < rows) sort_keys(keys, size);
    for (int start = 0; start < rows; start += threads) {
      const int i = start + tid;
      const bool reads = i < alive_here;
      const uint64_t key = i < rows ? keys[i] : 0, rank = key >> CHUNK_BITS;
      const int index = static_cast<int>(base) + static_cast<int>(key & (CHUNK - 1));
      bool leads = false;
      Unit unit{};
      if (reads) {
        int low = -1, high = i;  // the first row of this group is in (low, high]
        while (high - low > 1) {
          const int middle = (low + high) / 2;
          (keys[middle] >> CHUNK_BITS < rank ? low : high) = middle;
        }
        const auto together = [&](int other) {
          return other < alive_here && keys[other] >> CHUNK_BITS == rank;
        };
        leads = (i - high) % most_rows == 0;
        unit.first = alive + i;
        unit.rows = 1;
        while (unit.rows < most_rows && together(i + unit.rows)) ++unit.rows;
        unit.alone = i == high && !together(i + most_rows);
        unit.group = static_cast<int64_t>(rank) - 1;
        unit.count = unit.group < 0 ? all_references : valid_count(in, unit.group);
        unit.tiles = static_cast<int>(unit.group < 0 ? all_tiles : ceil_div(unit.count, tile_refs));
        if (unit.tiles == 0) unit.tiles = 1;
        unit.weight = list.weight(unit.rows);
        list.order[alive + i] = index;
      } else if (i < rows) {
        list.order[in.n - 1 - (dead + i - alive_here)] = index;
      }
      // One scan for both sums: at most 1024 units lead here.
      int64_t here;
      const int64_t before =
          block_prefix(leads ? list.cost(unit.tiles, unit.rows) << 11 | 1 : 0, scratch, here);
      if (leads) {
        list.units[units + (before & 2047)] = unit;
        list.begins[units + (before & 2047)] = cost + (before >> 11);
      }
      for (int rows = most_rows; rows > 0; --rows) {
        if (__syncthreads_or(leads && unit.rows == rows)) heaviest = max(heaviest, list.weight(rows));
      }
      units += static_cast<int>(here & 2047);
      cost += here >> 11;
    }
    alive += alive_here;
    dead += rows - alive_here;
    __syncthreads();  // keys are read above and overwritten next
  }
  if (tid == 0) {
    list.begins[units] = cost;
    list.sizes[0] = units;
    list.sizes[1] = alive;
    list.sizes[2] = heaviest;
    list.sizes[3] = list.sizes[4] = 0;  // they are where their groups are
  }
  __syncthreads();
}

// What a short list is made of: up to ROWS rows, a multiple of 256, and OWN_LIST_GROUPS groups.
template <int ROWS>
struct ListRows {
  static constexpr int WARPS = ROWS / 32;
  int64_t sums[2][WARPS];       // over the rows of a warp: of groups with one unit, with several
  int dead[WARPS];              // rows of a warp with nothing to read
  int keys[ROWS];               // group + 1; -1: nothing to read
  int places[ROWS];             // among the rows of the group
  int alls[ROWS];               // rows of the group
  int counts[OWN_LIST_GROUPS];  // valid references
  int64_t begins[ROWS];         // sums before the row, within its 32 rows
  // How many rows of a group each 32 rows have, a byte for each; later the sums before the group.
  // An odd number of words, so that groups meet many banks.
  uint64_t seen[OWN_LIST_GROUPS + 1][ROWS / 256 | 1];
};
using ListScratch = ListRows<OWN_LIST_ROWS>;
static_assert(sizeof(ListScratch) <= LIST_SCRATCH_SMEM, "the planner reserves less");

// What is read for the list, all at once, by all threads of the block; synchronize them then.
template <int ROWS>
__device__ __forceinline__ void read_groups(const Inputs& in, ListRows<ROWS>& scratch) {
  const int words = static_cast<int>(in.n + 255) / 256;
#pragma unroll 1
  for (int g = threadIdx.x; g <= in.k; g += blockDim.x) {
    if (g < in.k) scratch.counts[g] = static_cast<int>(valid_count(in, g));
#pragma unroll 1
    for (int w = 0; w < words; ++w) scratch.seen[g][w] = 0;
  }
}
template <int ROWS>
__device__ __forceinline__ void read_keys(const Inputs& in, ListRows<ROWS>& scratch) {
#pragma unroll 1
  for (int i = threadIdx.x; i < in.n; i += blockDim.x) {
    const int64_t label = in.labels ? in.labels[i] : 0;
    const bool good = row_is_finite(in, i) && label >= -1 && label < in.k;
    scratch.keys[i] = good ? static_cast<int>(label) + 1 : -1;
  }
}
__device__ __forceinline__ void read_rows(const Inputs& in, ListScratch& scratch) {
  read_keys(in, scratch);
  read_groups(in, scratch);
}

// Inclusive, over the lanes of a warp. A loop: code that runs once takes longer to come than to run.
__device__ __forceinline__ int64_t prefix_sums(int64_t v, int lane) {
#pragma unroll 1
  for (int offset = 1; offset < 32; offset *= 2) {
    const int64_t other = __shfl_up_sync(0xffffffffu, v, offset);
    if (lane >= offset) v += other;
  }
  return v;
}

// The same of two values at once.
__device__ __forceinline__ void prefix_sums(int64_t& a, int64_t& b, int lane) {
#pragma unroll 1
  for (int offset = 1; offset < 32; offset *= 2) {
    const int64_t before_a = __shfl_up_sync(0xffffffffu, a, offset);
    const int64_t before_b = __shfl_up_sync(0xffffffffu, b, offset);
    if (lane >= offset) a += before_a, b += before_b;
  }
}

// By a warp: UnitList::group_tiles of all k groups; their tiles and references are added to what is given.
// Several warps may do it, who write the same.
template <typename Count, typename Tiles>
__device__ __forceinline__ void scan_groups_in_warp(const UnitList& list, int k, int lane,
                                                    const Count& count_of, const Tiles& tiles_of,
                                                    int64_t& all_tiles, int64_t& all_references) {
#pragma unroll 1
  for (int base = 0; base < k; base += 32) {
    const int group = base + lane;
    const int64_t here = group < k ? count_of(group) : 0;
    const int64_t up_to = prefix_sums(tiles_of(here), lane);
    if (group < k) list.group_tiles[group + 1] = all_tiles + up_to;
    all_tiles += __shfl_sync(0xffffffffu, up_to, 31);
    all_references += __shfl_sync(0xffffffffu, prefix_sums(here, lane), 31);
  }
  if (lane == 0) list.group_tiles[0] = 0;
}

// The same list by THREADS threads, `tid` among them, with a barrier of theirs. Nothing is sorted, and the
// code is short: nothing can be read before it is done.
template <bool DEAL, int THREADS, int ROWS, typename Barrier>
__device__ __forceinline__ void build_short_list(const Inputs& in, const UnitList& list,
                                                 ListRows<ROWS>& scratch, int tile_refs, int most_rows,
                                                 int tid, const Barrier& barrier) {
  constexpr unsigned ALL = 0xffffffffu;
  constexpr int BITS = ROWS < 1024 ? 10 : 12;  // of a number of rows
  static_assert(ROWS < 1 << BITS && ROWS % 256 == 0, "sums are three in one");
  const int n = static_cast<int>(in.n), k = static_cast<int>(in.k), lane = tid % 32;
  const unsigned earlier_lanes = (1u << lane) - 1;
  // All rows, 32 of them side by side in a warp.
  const auto rows = [&](const auto& visit) {
#pragma unroll 1
    for (int i = tid; i - lane < n; i += THREADS) visit(i, i / 32);
  };
  const auto tiles_of_references = [&](int64_t count) {  // fewer than 2^31: no division of 64 bits
    return static_cast<int>((static_cast<unsigned>(count) + tile_refs - 1) / tile_refs);
  };

  int64_t all_tiles = -1, all_references = 0;  // of all groups, where a row of this warp takes them
  rows([&](int i, int warp) {
    int key = i < n ? scratch.keys[i] : -1;
    if (__any_sync(ALL, key == 0) && all_tiles < 0) {
      all_tiles = 0;
      scan_groups_in_warp(
          list, k, lane, [&](int group) { return scratch.counts[group]; }, tiles_of_references, all_tiles,
          all_references);
    }
    if (key >= 0 && !in.source.data && (key == 0 ? all_references : scratch.counts[key - 1]) == 0) key = -1;
    if (i < n) scratch.keys[i] = key;
    const unsigned same = __match_any_sync(ALL, key), dead = __ballot_sync(ALL, i < n && key < 0);
    if (key >= 0 && !(same & earlier_lanes))
      reinterpret_cast<uint8_t*>(scratch.seen[key])[warp] = static_cast<uint8_t>(__popc(same));
    if (lane == 0) scratch.dead[warp] = __popc(dead);
    if (i < n) scratch.places[i] = __popc((key >= 0 ? same : dead) & earlier_lanes);
  });
  if (tid == 0) {
    list.sizes[2] = 0;
    if constexpr (DEAL) list.sizes[4] = 0;
  }
  barrier();

  const int warps = (n + 31) / 32;
  const auto tiles_of = [&](int key) {
    const int64_t tiles = key == 0 ? all_tiles : tiles_of_references(scratch.counts[key - 1]);
    return tiles > 0 ? tiles : 1;
  };
  // Sums over the groups in the order of their first rows, those with several units before the others where
  // they are to be dealt out: cost, units and rows, three in one.
  rows([&](int i, int warp) {
    const int key = i < n ? scratch.keys[i] : -1;
    int64_t sum = 0;
    bool several = false;
    if (key >= 0) {
      const uint32_t* const counts = reinterpret_cast<const uint32_t*>(scratch.seen[key]);
      unsigned place = scratch.places[i], all = 0;
#pragma unroll 1
      for (int w = 0; w < warps; w += 4) {  // four bytes at a time
        const uint32_t four = counts[w / 4];
        const int earlier = min(max(warp - w, 0), 4);
        all = __dp4a(four, 0x01010101u, all);
        place = __dp4a(four, static_cast<uint32_t>(uint64_t{0x01010101u} << 8 * earlier >> 32), place);
      }
      scratch.places[i] = place, scratch.alls[i] = all;
      several = static_cast<int>(all) > most_rows;
      if (place == 0) {
        const int whole = static_cast<int>(all) / most_rows, rest = static_cast<int>(all) % most_rows;
        const int64_t tiles = tiles_of(key);
        const int64_t cost = whole * list.cost(tiles, most_rows) + (rest > 0 ? list.cost(tiles, rest) : 0);
        sum = cost << 2 * BITS | (whole + (rest > 0)) << BITS | all;
      }
    }
    if constexpr (DEAL) {
      int64_t alone = several ? 0 : sum, together = several ? sum : 0;
      prefix_sums(alone, together, lane);
      if (i < n) scratch.begins[i] = (several ? together : alone) - sum;
      if (lane == 31) scratch.sums[0][warp] = alone, scratch.sums[1][warp] = together;
    } else {
      const int64_t up_to = prefix_sums(sum, lane);
      if (i < n) scratch.begins[i] = up_to - sum;
      if (lane == 31) scratch.sums[0][warp] = up_to;
    }
  });
  barrier();
  const auto sums_before = [&](int warp) {  // by whole warps
    int64_t sum = 0;
#pragma unroll 1
    for (int w = lane; w < warp; w += 32) sum += scratch.sums[0][w];
    return __shfl_sync(ALL, prefix_sums(sum, lane), 31);
  };
  // Of groups with one unit, all others among them, and of the others.
  const auto both_before = [&](int warp, int64_t& alone, int64_t& together) {
    alone = together = 0;
#pragma unroll 1
    for (int w = lane; w < warps; w += 32) {
      const int64_t several = scratch.sums[1][w];
      alone += several + (w < warp ? scratch.sums[0][w] : 0), together += w < warp ? several : 0;
    }
#pragma unroll 1
    for (int hop = 16; hop > 0; hop /= 2) {
      alone += __shfl_xor_sync(ALL, alone, hop);
      together += __shfl_xor_sync(ALL, together, hop);
    }
  };
  rows([&](int i, int warp) {
    int64_t before, together = 0;
    if constexpr (DEAL) {
      both_before(warp, before, together);
    } else {
      before = sums_before(warp);
    }
    if (i >= n || scratch.keys[i] < 0 || scratch.places[i] != 0) return;
    if (DEAL && scratch.alls[i] > most_rows) before = together;
    scratch.seen[scratch.keys[i]][0] = static_cast<uint64_t>(scratch.begins[i] + before);
  });
  barrier();
  constexpr int MASK = (1 << BITS) - 1;
  rows([&](int i, int warp) {
    if (i >= n) return;
    const int key = scratch.keys[i], place = scratch.places[i];
    if (key >= 0) {
      const int64_t begin = static_cast<int64_t>(scratch.seen[key][0]);
      const int first = static_cast<int>(begin & MASK) + place;
      list.order[first] = i;
      if (place % most_rows == 0) {
        const int number = static_cast<int>(begin >> BITS & MASK) + place / most_rows, all = scratch.alls[i];
        Unit& unit = list.units[number];
        const int64_t tiles = tiles_of(key);
        unit.group = key - 1, unit.count = key == 0 ? all_references : scratch.counts[key - 1];
        unit.tiles = static_cast<int>(tiles), unit.first = first;
        unit.rows = min(all - place, most_rows), unit.alone = all <= most_rows;
        const int weight = list.weight(unit.rows);
        unit.weight = weight;
        list.begins[number] = (begin >> 2 * BITS) + place / most_rows * list.cost(tiles, most_rows);
        atomicMax(list.sizes + 2, weight);
        if (DEAL && !unit.alone)
          atomicMax(list.sizes + 4, static_cast<int>(min(list.cost(tiles, unit.rows), int64_t{INT_MAX})));
      }
    } else {
      int dead = place;
#pragma unroll 1
      for (int w = 0; w < warp; ++w) dead += scratch.dead[w];
      list.order[n - 1 - dead] = i;
    }
  });
  if (tid < 32) {
    int64_t total, together = 0;
    if constexpr (DEAL) {
      both_before(warps, total, together);
    } else {
      total = sums_before(warps);
    }
    if (lane == 0) {
      const int units = static_cast<int>(total >> BITS & MASK);
      list.begins[units] = total >> 2 * BITS;
      list.sizes[0] = units;
      list.sizes[1] = static_cast<int>(total & MASK);
      if constexpr (DEAL) list.sizes[3] = static_cast<int>(together >> BITS & MASK);
    }
  }
}

// In each block for itself, by the BULK_PRODUCERS threads of one warpgroup.
template <int TILE_REFS, int MOST_ROWS, bool DEAL>
__device__ __forceinline__ void build_own_list(const Inputs& in, const UnitList& list, ListScratch& scratch,
                                               int tid) {
  const auto barrier = [] { named_barrier(15, BULK_PRODUCERS); };
  build_short_list<DEAL, BULK_PRODUCERS>(in, list, scratch, TILE_REFS, MOST_ROWS, tid, barrier);
  fence_async();  // copies will go to where the scratch is
  barrier();
}

// Of that list, what a lane knows: its row, where that leads a unit, and the cost of all.
struct LaneUnit {
  int64_t label, count, tiles, begin, cost;
  int first;
  bool leads, alone;
};

// The same list for WARP_LIST_ROWS rows at most, by one warp in its registers.
template <int TILE_REFS, int MOST_ROWS>
__device__ __forceinline__ LaneUnit build_list_in_warp(const Inputs& in, const UnitList& list, int lane) {
  constexpr unsigned ALL = 0xffffffffu;
  const int n = static_cast<int>(in.n), k = static_cast<int>(in.k);
  const unsigned earlier = (1u << lane) - 1;
  int64_t label = lane < n && in.labels ? in.labels[lane] : 0;
  bool reads = lane < n && row_is_finite(in, lane) && label >= -1 && label < k;
  int64_t all_tiles = 0, all_references = 0;
  if (__any_sync(ALL, reads && label < 0)) {
    scan_groups_in_warp(
        list, k, lane, [&](int group) { return valid_count(in, group); },
        [](int64_t count) { return ceil_div(count, TILE_REFS); }, all_tiles, all_references);
  }
  const int64_t count = !reads ? 0 : label < 0 ? all_references : valid_count(in, label);
  reads = reads && (in.source.data || count > 0);
  const int64_t tiles = max(label < 0 ? all_tiles : ceil_div(count, TILE_REFS), int64_t{1});

  const unsigned same = __match_any_sync(ALL, reads ? static_cast<int>(label) : -2);
  const int all = __popc(same), place = __popc(same & earlier), left = all - place;
  // Sums over the groups in the order of their first rows: cost, units and rows, three in one.
  int64_t sum = 0;
  if (reads && place == 0) {
    const int whole = all / MOST_ROWS, rest = all % MOST_ROWS;
    sum = (whole * list.cost(tiles, MOST_ROWS) + (rest > 0 ? list.cost(tiles, rest) : 0)) << 20 |
          (whole + (rest > 0)) << 10 | all;
  }
  const int64_t up_to = prefix_sums(sum, lane), total = __shfl_sync(ALL, up_to, 31);
  const int64_t begin = __shfl_sync(ALL, up_to - sum, __ffs(same) - 1);
  const bool leads = reads && place % MOST_ROWS == 0;
  const int rows = min(left, MOST_ROWS), first = static_cast<int>(begin & 1023) + place;
  const unsigned dead = __ballot_sync(ALL, lane < n && !reads);
  if (reads) {
    list.order[first] = lane;
  } else if (lane < n) {
    list.order[n - 1 - __popc(dead & earlier)] = lane;
  }
  if (leads) {
    const int number = static_cast<int>(begin >> 10 & 1023) + place / MOST_ROWS;
    list.units[number] = {label,
                          count,
                          static_cast<int>(tiles),
                          first,
                          static_cast<uint8_t>(rows),
                          all <= MOST_ROWS,
                          static_cast<uint16_t>(list.weight(rows))};
    list.begins[number] = (begin >> 20) + place / MOST_ROWS * list.cost(tiles, MOST_ROWS);
  }
  const int heaviest = __reduce_max_sync(ALL, leads ? list.weight(rows) : 0);
  if (lane == 0) {
    const int units = static_cast<int>(total >> 10 & 1023);
    list.begins[units] = total >> 20;
    list.sizes[0] = units, list.sizes[1] = static_cast<int>(total & 1023), list.sizes[2] = heaviest;
  }
  __syncwarp();
  return {label,       count, tiles, (begin >> 20) + place / MOST_ROWS * list.cost(tiles, MOST_ROWS),
          total >> 20, first, leads, all <= MOST_ROWS};
}

// Where merge_kernel follows, one block leaves its list in memory.
__device__ __forceinline__ void leave_list(const Inputs& in, const UnitList& list, const UnitList& to,
                                           int tid, int threads) {
  const uint4* const from = reinterpret_cast<const uint4*>(list.units);
  for (int i = tid; i < unit_list_bytes(in.n, in.k) / 16; i += threads)
    reinterpret_cast<uint4*>(to.units)[i] = from[i];
}

}  // namespace svel::cuda
