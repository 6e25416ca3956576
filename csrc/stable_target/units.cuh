// The work list of the bulk kernel (bulk.cuh): rows of one group side by side, cut into units of a few rows
// that share one pass over their references. Built by every thread block for itself in shared memory where
// the list is short, which saves a launch and its way through device memory, else by one block for all.
#pragma once

#include "common/planner.h"
#include "stable_target/scan.cuh"

namespace svel::cuda {

struct Unit {
  int64_t group;  // -1: all groups
  int64_t count;  // valid references
  int64_t tiles;  // of its references; at least one, which holds none where a row has only its own source
  int first;      // of its rows, in UnitList::order
  int rows;
  int alone;  // no other unit has this group
};

struct UnitList {
  int* order;           // (n,) rows with something to read by group within 4096 rows, the others from the end
  Unit* units;          // (n,)
  int64_t* first_tile;  // (n + 1,) prefix sums over the units
  int64_t* group_tiles;  // (k + 1,) prefix sums over the groups, where some row takes all of them
  int* sizes;            // units, rows with something to read
};

static_assert(sizeof(Unit) == UNIT_BYTES, "the planner counts so many");

// The pieces of `memory`, unit_list_bytes, aligned to 16 bytes.
__host__ __device__ inline UnitList place_unit_list(void* memory, int64_t n, int64_t k) {
  UnitList list;
  list.units = static_cast<Unit*>(memory);
  list.first_tile = reinterpret_cast<int64_t*>(list.units + n);
  list.group_tiles = list.first_tile + n + 1;
  list.order = reinterpret_cast<int*>(list.group_tiles + k + 1);
  list.sizes = list.order + n;
  return list;
}

// A few keys, all different, into `sorted`: each thread counts those before its own. Keys beyond `rows`, up
// to a multiple of 4, are the largest.
__device__ inline void sort_few_keys(const uint32_t* keys, uint32_t* sorted, int rows) {
  const uint4* const four = reinterpret_cast<const uint4*>(keys);
  for (int i = threadIdx.x; i < rows; i += blockDim.x) {
    const uint32_t mine = keys[i];
    int place = 0;
#pragma unroll 4
    for (int j = 0; j < (rows + 3) / 4; ++j) {
      const uint4 v = four[j];
      place += (v.x < mine) + (v.y < mine) + (v.z < mine) + (v.w < mine);
    }
    sorted[place] = mine;
  }
  __syncthreads();
}

// Whether a row has anything to read.
__device__ inline bool row_reads(const Inputs& in, int64_t index, int64_t all_references, int64_t& group) {
  const double given = load_as<double>(in.time_or_alpha, index);
  group = in.labels ? in.labels[index] : 0;
  bool finite = isfinite(given);
  if (!in.from_time) {
    const double sigma = load_as<double>(in.sigma, index);
    finite = finite && isfinite(sigma) && sigma != 0.0;
  }
  if (!finite || group < -1 || group >= in.k) return false;
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

// By all threads of a block. keys: uint64_t, as many as rows, rounded up to a power of two, CHUNK at most; or
// uint32_t for a list of the block's own, twice OWN_LIST_ROWS.
template <typename Key>
__device__ inline void build_units(const Inputs& in, const UnitList& list, int tile_refs, int most_rows,
                                   Key* keys, int64_t* scratch) {
  const int tid = threadIdx.x, threads = blockDim.x;
  int64_t all_tiles = 0, all_references = 0, tiles = 0;
  bool scanned = false;
  int units = 0, alive = 0;
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
        const Key rank = static_cast<Key>(reads ? group + 1 : in.k + 1);
        keys[i] = rank << CHUNK_BITS | static_cast<Key>(i);
      } else if (i < size) {
        keys[i] = ~Key{0};
      }
      alive_here += __syncthreads_count(reads);
    }
    if (in.labels || alive_here < rows) {
      if constexpr (sizeof(Key) == 4) {
        sort_few_keys(keys, keys + OWN_LIST_ROWS, rows);
        keys += OWN_LIST_ROWS;  // there is one chunk
      } else {
        sort_keys(keys, size);
      }
    }
    for (int start = 0; start < rows; start += threads) {
      const int i = start + tid;
      const bool reads = i < alive_here;
      const Key key = i < rows ? keys[i] : Key{0}, rank = key >> CHUNK_BITS;
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
        unit.tiles = unit.group < 0 ? all_tiles : ceil_div(unit.count, tile_refs);
        if (unit.tiles == 0) unit.tiles = 1;
        list.order[alive + i] = index;
      } else if (i < rows) {
        list.order[in.n - 1 - (dead + i - alive_here)] = index;
      }
      // One scan for both sums: at most 1024 units lead here.
      int64_t here;
      const int64_t before = block_prefix(leads ? unit.tiles << 11 | 1 : 0, scratch, here);
      if (leads) {
        list.units[units + (before & 2047)] = unit;
        list.first_tile[units + (before & 2047)] = tiles + (before >> 11);
      }
      units += static_cast<int>(here & 2047);
      tiles += here >> 11;
    }
    alive += alive_here;
    dead += rows - alive_here;
    __syncthreads();  // keys are read above and overwritten next
  }
  if (tid == 0) {
    list.first_tile[units] = tiles;
    list.sizes[0] = units;
    list.sizes[1] = alive;
  }
  __syncthreads();
}

}  // namespace svel::cuda
