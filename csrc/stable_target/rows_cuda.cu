// Fills the work list (rows.cuh). Bytes: n labels, times and 80-byte rows, k counts: nothing beside the
// references. One block, since everything is a scan; sorting 4096 keys in shared memory takes a few
// microseconds.
#include "common/hopper.cuh"
#include "stable_target/scan.cuh"

namespace svel::cuda {
namespace {

__global__ void __launch_bounds__(LIST_THREADS) list_kernel(Inputs in, WorkList work) {
  __shared__ uint64_t keys[CHUNK];
  __shared__ int64_t scratch[LIST_THREADS / 32];
  const int tid = threadIdx.x;

  int64_t all_tiles, all_references;
  scan_groups(in, work.tile_refs, work.group_tiles, scratch, all_tiles, all_references);
  int64_t tiles = 0;
  for (int64_t base = 0; base < in.n; base += CHUNK) {
    const int rows = static_cast<int>(in.n - base < CHUNK ? in.n - base : CHUNK);
    int size = 2;
    while (size < rows) size *= 2;
    for (int i = tid; i < size; i += LIST_THREADS) {
      uint64_t key = ~uint64_t{0};
      if (i < rows) {
        const int64_t label = in.labels ? in.labels[base + i] : 0;
        const uint64_t rank = label < -1 || label >= in.k ? in.k + 1 : label + 1;
        key = rank << CHUNK_BITS | static_cast<uint64_t>(i);
      }
      keys[i] = key;
    }
    __syncthreads();
    if (in.labels) sort_keys(keys, size);
    for (int start = 0; start < rows; start += LIST_THREADS) {
      const int i = start + tid;
      int64_t mine = 0, here;
      if (i < rows) {
        bool alive;
        const Row row =
            make_row(in, base + static_cast<int64_t>(keys[i] & (CHUNK - 1)), all_references, alive);
        mine = row.group < 0 && row.count > 0 ? all_tiles : ceil_div(row.count, work.tile_refs);
        if (alive && in.source.data && mine == 0)
          mine = 1;  // a tile without references, for the source alone
        work.rows[base + i] = row;
      }
      const int64_t before = block_prefix(mine, scratch, here);
      if (i < rows) work.first_tile[base + i] = tiles + before;
      tiles += here;
    }
    __syncthreads();  // keys are read above and overwritten next
  }
  if (tid == 0) work.first_tile[in.n] = tiles;
}

// Whether a row has anything to read, which takes less than make_row.
__device__ bool row_reads(const Inputs& in, int64_t index, int64_t all_references, int64_t& group) {
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

// Units of rows of one group. Rows with nothing to read come last in the sort and go to list.dead. As many
// threads as rows, at most 1024.
__global__ void __launch_bounds__(LIST_THREADS) unit_kernel(Inputs in, UnitList list, UnitShape shape) {
  __shared__ uint64_t keys[CHUNK];
  __shared__ int64_t scratch[LIST_THREADS / 32];
  const int tid = threadIdx.x, threads = blockDim.x;
  allow_next_launch();
  for (int64_t i = tid; i < in.n * shape.slices; i += threads) list.arrived[i] = 0;

  int64_t all_tiles = 0, all_references = 0, work = 0;
  bool scanned = false;
  int units = 0, alive = 0, dead = 0;
  const int shift = 31 - __clz(shape.tile_refs);
  const auto tiles_of = [&](const Row& row) {
    const int64_t tiles = row.group < 0 ? all_tiles : (row.count + shape.tile_refs - 1) >> shift;
    return tiles + (in.source.data ? 1 : 0);
  };
  for (int64_t base = 0; base < in.n; base += CHUNK) {
    const int rows = static_cast<int>(in.n - base < CHUNK ? in.n - base : CHUNK);
    int size = 2;
    while (size < rows) size *= 2;
    bool takes_all = false;
    for (int i = tid; i < rows; i += threads)
      takes_all = takes_all || (in.labels && in.labels[base + i] == -1);
    if (__syncthreads_or(takes_all) && !scanned) {
      scan_groups(in, shape.tile_refs, list.group_tiles, scratch, all_tiles, all_references);
      scanned = true;
    }
    int alive_here = 0;
    for (int start = 0; start < size; start += threads) {
      const int i = start + tid;
      bool reads = false;
      if (i < rows) {
        int64_t group;
        reads = row_reads(in, base + i, all_references, group);
        const uint64_t rank = reads ? group + 1 : in.k + 1;
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
      const int64_t index = base + static_cast<int64_t>(key & (CHUNK - 1));
      bool leads = false;
      int members = 1;
      Row row{};
      if (reads) {
        int low = -1, high = i;  // the first row of this group is in (low, high]
        while (high - low > 1) {
          const int middle = (low + high) / 2;
          (keys[middle] >> CHUNK_BITS < rank ? low : high) = middle;
        }
        leads = (i - high) % shape.rows == 0;
        while (members < shape.rows && i + members < alive_here && keys[i + members] >> CHUNK_BITS == rank)
          ++members;
        bool finite;
        row = make_row(in, index, all_references, finite);
        list.rows[alive + i] = row;
      } else if (i < rows) {
        list.dead[dead + i - alive_here] = static_cast<int>(index);
      }
      // One scan for both sums: at most 1024 units lead here.
      const Unit unit{row.group, row.count, leads ? tiles_of(row) : 0,
                      alive + i, members,   unit_cost(members)};
      int64_t here;
      const int64_t before = block_prefix(leads ? unit.tiles * unit.cost << 11 | 1 : 0, scratch, here);
      if (leads) {
        list.units[units + (before & 2047)] = unit;
        list.first_work[units + (before & 2047)] = work + (before >> 11);
      }
      units += static_cast<int>(here & 2047);
      work += here >> 11;
    }
    alive += alive_here;
    dead += rows - alive_here;
    __syncthreads();  // keys are read above and overwritten next
  }
  if (tid == 0) {
    list.first_work[units] = work;
    list.sizes[0] = units;
    list.sizes[1] = dead;
  }
}

}  // namespace

int64_t unit_list_bytes(int64_t n, int64_t k, int slices) {
  return n * static_cast<int64_t>(sizeof(Row) + sizeof(Unit)) + 8 * (n + 1) + 8 * (k + 1) + 4 * n * slices +
         4 * n + 8;
}

UnitList build_unit_list(const Inputs& in, const UnitShape& shape, void* workspace, cudaStream_t stream) {
  UnitList list;
  list.rows = static_cast<Row*>(workspace);
  list.units = reinterpret_cast<Unit*>(list.rows + in.n);
  list.first_work = reinterpret_cast<int64_t*>(list.units + in.n);
  list.group_tiles = list.first_work + in.n + 1;
  list.arrived = reinterpret_cast<int*>(list.group_tiles + in.k + 1);
  list.dead = list.arrived + in.n * shape.slices;
  list.sizes = list.dead + in.n;
  list.tile_refs = shape.tile_refs;
  int threads = 128;
  while (threads < LIST_THREADS && threads < in.n) threads *= 2;
  unit_kernel<<<1, threads, 0, stream>>>(in, list, shape);
  return list;
}

int64_t work_list_bytes(int64_t n, int64_t k) {
  return n * static_cast<int64_t>(sizeof(Row)) + 8 * (n + 1) + 8 * (k + 1);
}

WorkList build_work_list(const Inputs& in, int tile_refs, void* workspace, cudaStream_t stream) {
  WorkList work;
  work.rows = static_cast<Row*>(workspace);
  work.first_tile = reinterpret_cast<int64_t*>(work.rows + in.n);
  work.group_tiles = work.first_tile + in.n + 1;
  work.tile_refs = tile_refs;
  list_kernel<<<1, LIST_THREADS, 0, stream>>>(in, work);
  return work;
}

}  // namespace svel::cuda
