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
  int alone;   // no other unit has this group
  int weight;  // what a tile costs
};

// What a tile costs with so many rows of the `most` that a unit may have. One row waits for memory alone; two
// keep a multiprocessor nearly as busy as memory does; more are bound by their arithmetic.
__device__ constexpr int tile_weight(int most, int rows) {
  return most == 1 ? 1 : rows == 1 ? 4 : rows == 2 ? 5 : 9;
}

struct UnitList {
  int* order;       // (n,) rows with something to read by group within 4096 rows, the others from the end
  Unit* units;      // (n,)
  int64_t* begins;  // (n + 1,) prefix sums over the units: tiles times their weight
  int64_t* group_tiles;  // (k + 1,) prefix sums over the groups: tiles, where some row takes all of them
  int* sizes;            // units, rows with something to read, the largest weight of a unit
};

static_assert(sizeof(Unit) == UNIT_BYTES, "the planner counts so many");

// The pieces of `memory`, unit_list_bytes, aligned to 16 bytes.
__host__ __device__ inline UnitList place_unit_list(void* memory, int64_t n, int64_t k) {
  UnitList list;
  list.units = static_cast<Unit*>(memory);
  list.begins = reinterpret_cast<int64_t*>(list.units + n);
  list.group_tiles = list.begins + n + 1;
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
        unit.tiles = unit.group < 0 ? all_tiles : ceil_div(unit.count, tile_refs);
        if (unit.tiles == 0) unit.tiles = 1;
        unit.weight = tile_weight(most_rows, unit.rows);
        list.order[alive + i] = index;
      } else if (i < rows) {
        list.order[in.n - 1 - (dead + i - alive_here)] = index;
      }
      // One scan for both sums: at most 1024 units lead here.
      int64_t here;
      const int64_t before = block_prefix(leads ? unit.tiles * unit.weight << 11 | 1 : 0, scratch, here);
      if (leads) {
        list.units[units + (before & 2047)] = unit;
        list.begins[units + (before & 2047)] = cost + (before >> 11);
      }
      for (int rows = most_rows; rows > 0; --rows) {
        if (__syncthreads_or(leads && unit.rows == rows))
          heaviest = max(heaviest, tile_weight(most_rows, rows));
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
  }
  __syncthreads();
}

// The same list for OWN_LIST_ROWS rows and OWN_LIST_GROUPS groups at most, by one warp. seen: (k + 1,), zero;
// before: (OWN_LIST_ROWS,).
__device__ inline void build_few_units(const Inputs& in, const UnitList& list, int tile_refs, int most_rows,
                                       int* seen, int64_t* before, int lane) {
  constexpr unsigned ALL = 0xffffffffu;
  constexpr int EACH = OWN_LIST_ROWS / 32;
  const int n = static_cast<int>(in.n), k = static_cast<int>(in.k);
  const auto warp_sums = [&](int64_t v) {  // inclusive
    for (int offset = 1; offset < 32; offset *= 2) {
      const int64_t other = __shfl_up_sync(ALL, v, offset);
      if (lane >= offset) v += other;
    }
    return v;
  };

  // All loads of a kind in flight together.
  int64_t labels[EACH];
  double given[EACH], deviations[EACH];
  int counts[EACH];
#pragma unroll
  for (int u = 0; u < EACH; ++u) labels[u] = in.labels && 32 * u + lane < n ? in.labels[32 * u + lane] : 0;
  const bool floats =
      in.time_or_alpha.dtype == Dtype::f32 && (in.from_time || in.sigma.dtype == Dtype::f32);
  if (floats) {
    float raw[EACH], raw_sigma[EACH];
    const float* const scalars = static_cast<const float*>(in.time_or_alpha.data);
    const float* const sigmas = in.from_time ? scalars : static_cast<const float*>(in.sigma.data);
#pragma unroll
    for (int u = 0; u < EACH; ++u) {
      raw[u] = 32 * u + lane < n ? scalars[32 * u + lane] : 0.0f;
      raw_sigma[u] = 32 * u + lane < n ? sigmas[32 * u + lane] : 0.0f;
    }
#pragma unroll
    for (int u = 0; u < EACH; ++u) given[u] = raw[u], deviations[u] = in.from_time ? 1.0 : raw_sigma[u];
  } else {
#pragma unroll
    for (int u = 0; u < EACH; ++u) {
      const int i = 32 * u + lane;
      given[u] = i < n ? load_as<double>(in.time_or_alpha, i) : 0.0;
      deviations[u] = i < n && !in.from_time ? load_as<double>(in.sigma, i) : 1.0;
    }
  }
  bool takes_all = false;
#pragma unroll
  for (int u = 0; u < EACH; ++u) {
    takes_all = takes_all || labels[u] == -1;
    counts[u] = labels[u] >= 0 && labels[u] < k ? static_cast<int>(valid_count(in, labels[u])) : 0;
  }
  int64_t all_tiles = 0, all_references = 0;
  if (__any_sync(ALL, takes_all)) {
    for (int base = 0; base < k; base += 32) {
      const int64_t count = base + lane < k ? valid_count(in, base + lane) : 0;
      const int64_t tiles = warp_sums(ceil_div(count, tile_refs));
      if (base + lane < k) list.group_tiles[base + lane + 1] = all_tiles + tiles;
      all_tiles += __shfl_sync(ALL, tiles, 31);
      all_references += __shfl_sync(ALL, warp_sums(count), 31);
    }
    if (lane == 0) list.group_tiles[0] = 0;
  }

  // The place of a row among those of its group, -1 without one; rows without follow from the end.
  int place[EACH];
  int dead = 0;
#pragma unroll
  for (int u = 0; u < EACH; ++u) {
    const int i = 32 * u + lane, group = labels[u] < -1 || labels[u] >= k ? k : static_cast<int>(labels[u]);
    const bool finite = isfinite(given[u]) && isfinite(deviations[u]) && deviations[u] != 0.0;
    const bool reads = i < n && finite && group < k &&
                       (in.source.data || (group < 0 ? all_references : counts[u]) > 0);
    const unsigned without = __ballot_sync(ALL, i < n && !reads);
    if (i < n && !reads) list.order[n - 1 - (dead + __popc(without & ((1u << lane) - 1)))] = i;
    dead += __popc(without);
    const int key = reads ? group + 1 : -1;
    const unsigned same = __match_any_sync(ALL, key);
    const int leader = __ffs(same) - 1;
    int earlier = 0;
    if (lane == leader && reads) {
      earlier = seen[key];
      seen[key] = earlier + __popc(same);
    }
    __syncwarp();
    earlier = __shfl_sync(ALL, earlier, leader);
    place[u] = reads ? earlier + __popc(same & ((1u << lane) - 1)) : -1;
  }

  // Sums over the groups in the order of their first rows: cost, units and rows, three in one.
  int all[EACH];
  int64_t tiles[EACH], sums[EACH];
#pragma unroll
  for (int u = 0; u < EACH; ++u) {
    all[u] = place[u] < 0 ? 0 : seen[labels[u] + 1];
    tiles[u] = max(ceil_div(labels[u] < 0 ? all_references : int64_t{counts[u]}, tile_refs), int64_t{1});
    if (labels[u] < 0) tiles[u] = max(all_tiles, int64_t{1});
    const int whole = all[u] / most_rows, rest = all[u] % most_rows;
    const int64_t cost = tiles[u] * (whole * tile_weight(most_rows, most_rows) +
                                     (rest > 0 ? tile_weight(most_rows, rest) : 0));
    sums[u] = place[u] == 0 ? cost << 20 | (whole + (rest > 0)) << 10 | all[u] : 0;
  }
  __syncwarp();
  int64_t sum = 0;
#pragma unroll
  for (int u = 0; u < EACH; ++u) {
    const int64_t up_to = warp_sums(sums[u]);
    before[32 * u + lane] = sum + up_to - sums[u];
    if (place[u] == 0) seen[labels[u] + 1] = 32 * u + lane;  // from here on: the first row
    sum += __shfl_sync(ALL, up_to, 31);
  }
  __syncwarp();
  int heaviest = 0;
#pragma unroll
  for (int u = 0; u < EACH; ++u) {
    if (place[u] < 0) continue;
    const int64_t begin = before[seen[labels[u] + 1]];
    Unit unit;
    unit.first = static_cast<int>(begin & 1023) + place[u];
    list.order[unit.first] = 32 * u + lane;
    if (place[u] % most_rows != 0) continue;
    const int number = static_cast<int>(begin >> 10 & 1023) + place[u] / most_rows;
    unit.group = labels[u], unit.count = labels[u] < 0 ? all_references : counts[u], unit.tiles = tiles[u];
    unit.rows = min(all[u] - place[u], most_rows);
    unit.alone = all[u] <= most_rows;
    unit.weight = tile_weight(most_rows, unit.rows);
    list.units[number] = unit;
    list.begins[number] =
        (begin >> 20) + place[u] / most_rows * unit.tiles * tile_weight(most_rows, most_rows);
    heaviest = max(heaviest, unit.weight);
  }
  heaviest = __reduce_max_sync(ALL, heaviest);
  if (lane == 0) {
    const int units = static_cast<int>(sum >> 10 & 1023);
    list.begins[units] = sum >> 20;
    list.sizes[0] = units;
    list.sizes[1] = n - dead;
    list.sizes[2] = heaviest;
  }
  __syncwarp();
}

}  // namespace svel::cuda
