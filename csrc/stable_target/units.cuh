// The work list of the bulk kernel (bulk.cuh): rows of one group side by side, cut into units of a few rows
// that share one pass over their references. Built by every thread block for itself in shared memory where
// the list is short, which saves a launch and its way through device memory, else by one block for all.
#pragma once

#include "common/hopper.cuh"
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

// By all threads of a block. keys: as many as rows, rounded up to a power of two, CHUNK at most.
__device__ inline void build_units(const Inputs& in, const UnitList& list, int tile_refs, int most_rows,
                                   uint64_t* keys, int64_t* scratch) {
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

// The same list for OWN_LIST_ROWS rows and OWN_LIST_GROUPS groups at most, by the BULK_PRODUCERS threads of
// one warpgroup, `tid` among them, while the other threads of the block do something else. Nothing is
// sorted: a row compares its key with all others, which tells its place among those of its group, and a scan
// over the first rows of the groups tells where the group's units begin. scratch: 8; begins: OWN_LIST_ROWS.
__device__ inline void build_few_units(const Inputs& in, const UnitList& list, int tile_refs, int most_rows,
                                       uint32_t* keys, int64_t* begins, int64_t* scratch, int tid) {
  constexpr int THREADS = BULK_PRODUCERS, EACH = OWN_LIST_ROWS / THREADS, NAME = 2;
  const int n = static_cast<int>(in.n), lane = tid % 32, warp = tid / 32;
  const auto warp_sums = [&](int64_t v) {  // inclusive
    for (int offset = 1; offset < 32; offset *= 2) {
      const int64_t other = __shfl_up_sync(0xffffffffu, v, offset);
      if (lane >= offset) v += other;
    }
    return v;
  };

  if (in.counts && tid * 128 < in.k * (in.counts_are_long ? 8 : 4))
    prefetch(static_cast<const char*>(in.counts) + tid * 128);
  bool takes_all = false;
  for (int i = tid; i < n; i += THREADS) {
    prefetch_row(in, i);
    takes_all = takes_all || (in.labels && in.labels[i] == -1);
  }
  int64_t all_tiles = 0, all_references = 0;
  if (named_barrier_or<THREADS>(NAME, takes_all)) {
    const int each = static_cast<int>((in.k + THREADS - 1) / THREADS);
    int64_t tiles = 0, references = 0;
    const auto groups = [&](const auto& visit) {
      for (int g = tid * each; g < (tid + 1) * each && g < in.k; ++g) visit(g, valid_count(in, g));
    };
    groups([&](int, int64_t count) { tiles += ceil_div(count, tile_refs), references += count; });
    const int64_t tiles_before = warp_sums(tiles) - tiles, references_here = warp_sums(references);
    if (lane == 31) scratch[warp] = tiles_before + tiles, scratch[4 + warp] = references_here;
    named_barrier(NAME, THREADS);
    int64_t before = tiles_before;
    for (int w = 0; w < 4; ++w) {
      if (w < warp) before += scratch[w];
      all_tiles += scratch[w], all_references += scratch[4 + w];
    }
    groups([&](int g, int64_t count) { list.group_tiles[g] = before, before += ceil_div(count, tile_refs); });
    if (tid == 0) list.group_tiles[in.k] = all_tiles;
  }

  const uint32_t nothing = static_cast<uint32_t>(in.k) + 1;
  for (int i = tid; i < OWN_LIST_ROWS; i += THREADS) {
    int64_t group = 0;
    const bool reads = i < n && row_reads(in, i, all_references, group);
    keys[i] = i >= n ? ~0u : reads ? static_cast<uint32_t>(group + 1) : nothing;
  }
  named_barrier(NAME, THREADS);

  struct Seen {
    int first, before, all;  // of the rows with this key: the first, those before this one, their number
  } seen[EACH];
  Unit units[EACH];
  int64_t sums[EACH];
#pragma unroll
  for (int u = 0; u < EACH; ++u) {
    const int i = tid + u * THREADS;
    const uint32_t mine = keys[i];
    Seen& s = seen[u];
    s = {i, 0, 0};
#pragma unroll 2
    for (int j = 0; j < n; j += 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(keys + j);
      const uint32_t four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const bool same = four[k] == mine;
        s.all += same;
        s.before += same && j + k < i;
        if (same && j + k < s.first) s.first = j + k;
      }
    }
    Unit& unit = units[u];
    unit = {};
    if (i < n && mine != nothing) {
      unit.group = static_cast<int64_t>(mine) - 1;
      unit.count = unit.group < 0 ? all_references : valid_count(in, unit.group);
      unit.tiles = unit.group < 0 ? all_tiles : ceil_div(unit.count, tile_refs);
      if (unit.tiles == 0) unit.tiles = 1;
    }
    // Three sums in one: tiles, units and rows of the groups whose first row this is.
    const int64_t here = (s.all + most_rows - 1) / most_rows;
    const bool leads = unit.tiles > 0 && s.before == 0;
    const int64_t sum = leads ? unit.tiles * here << 20 | here << 10 | s.all : 0;
    const int64_t up_to = warp_sums(sum);
    sums[u] = up_to - sum;
    if (lane == 31) scratch[u * 4 + warp] = up_to;
  }
  named_barrier(NAME, THREADS);
  int64_t total = 0;
#pragma unroll
  for (int w = 0; w < 4 * EACH; ++w) {
#pragma unroll
    for (int u = 0; u < EACH; ++u) {
      if (w < u * 4 + warp) sums[u] += scratch[w];
    }
    total += scratch[w];
  }
#pragma unroll
  for (int u = 0; u < EACH; ++u) begins[tid + u * THREADS] = sums[u];
  named_barrier(NAME, THREADS);
#pragma unroll
  for (int u = 0; u < EACH; ++u) {
    const int i = tid + u * THREADS;
    const Seen& s = seen[u];
    Unit& unit = units[u];
    if (unit.tiles > 0) {
      const int64_t begin = begins[s.first];
      unit.first = static_cast<int>(begin & 1023) + s.before;
      list.order[unit.first] = i;
      if (s.before % most_rows == 0) {
        const int number = static_cast<int>(begin >> 10 & 1023) + s.before / most_rows;
        unit.rows = s.all - s.before < most_rows ? s.all - s.before : most_rows;
        unit.alone = s.all <= most_rows;
        list.units[number] = unit;
        list.first_tile[number] = (begin >> 20) + s.before / most_rows * unit.tiles;
      }
    } else if (i < n) {
      list.order[n - 1 - s.before] = i;
    }
  }
  if (tid == 0) {
    const int units_in_all = static_cast<int>(total >> 10 & 1023);
    list.first_tile[units_in_all] = total >> 20;
    list.sizes[0] = units_in_all;
    list.sizes[1] = static_cast<int>(total & 1023);
  }
  named_barrier(NAME, THREADS);
}

}  // namespace svel::cuda
