// Fills the work list (rows.cuh). Bytes: n labels, times and 80-byte rows, k counts: nothing beside the
// references. One block, since everything is a scan; sorting 4096 keys in shared memory takes a few
// microseconds.
#include "stable_target/rows.cuh"

namespace svel::cuda {
namespace {

constexpr int THREADS = 1024;
constexpr int CHUNK = 4096;
constexpr int CHUNK_BITS = 12;

__device__ int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Exclusive prefix of v over the block's threads; `total` becomes the sum.
__device__ int64_t block_prefix(int64_t v, int64_t* scratch, int64_t& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t sum = v;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int64_t other = __shfl_up_sync(0xffffffffu, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  int64_t before = 0;
  total = 0;
  for (int w = 0; w < THREADS / 32; ++w) {
    if (w < warp) before += scratch[w];
    total += scratch[w];
  }
  __syncthreads();
  return before + sum - v;
}

// Ascending bitonic sort of `size` keys, a power of two.
__device__ void sort_keys(uint64_t* keys, int size) {
  for (int span = 2; span <= size; span *= 2) {
    for (int step = span / 2; step > 0; step /= 2) {
      for (int i = threadIdx.x; i < size / 2; i += THREADS) {
        const int low = 2 * i - (i & (step - 1)), high = low + step;
        const bool ascending = (low & span) == 0;
        const uint64_t a = keys[low], b = keys[high];
        if ((a > b) == ascending) {
          keys[low] = b;
          keys[high] = a;
        }
      }
      __syncthreads();
    }
  }
}

__device__ Row make_row(const Inputs& in, int64_t index, int64_t all_references, bool& alive) {
  Row row{};
  row.index = index;
  row.sign = 1.0;
  const double given = load_as<double>(in.time_or_alpha, index);
  if (in.from_time) {
    const PathCoefficients at = path_coefficients(in.path, clamp_time(given));
    const PredictionCoefficients p = prediction_coefficients(in.prediction, at);
    row.alpha = at.alpha, row.sigma = at.sigma, row.a = p.a, row.b = p.b;
  } else {
    row.alpha = given, row.sigma = load_as<double>(in.sigma, index), row.a = 0.0, row.b = 1.0;
  }
  if (row.alpha < 0) row.alpha = -row.alpha, row.sign = -1.0;
  alive = isfinite(row.alpha) && isfinite(row.sigma) && row.sigma != 0.0;
  row.group = in.labels ? in.labels[index] : 0;
  alive = alive && row.group >= -1 && row.group < in.k;
  row.count = !alive ? 0 : row.group < 0 ? all_references : valid_count(in, row.group);
  return row;
}

__global__ void __launch_bounds__(THREADS) list_kernel(Inputs in, WorkList work) {
  __shared__ uint64_t keys[CHUNK];
  __shared__ int64_t scratch[THREADS / 32];
  const int tid = threadIdx.x;

  int64_t all_tiles = 0, all_references = 0;
  for (int64_t base = 0; base < in.k; base += THREADS) {
    const int64_t group = base + tid, count = group < in.k ? valid_count(in, group) : 0;
    int64_t tiles_here, references_here;
    const int64_t before = block_prefix(ceil_div(count, work.tile_refs), scratch, tiles_here);
    block_prefix(count, scratch, references_here);
    if (group < in.k) work.group_tiles[group] = all_tiles + before;
    all_tiles += tiles_here;
    all_references += references_here;
  }
  if (tid == 0) work.group_tiles[in.k] = all_tiles;

  int64_t tiles = 0;
  for (int64_t base = 0; base < in.n; base += CHUNK) {
    const int rows = static_cast<int>(in.n - base < CHUNK ? in.n - base : CHUNK);
    int size = 2;
    while (size < rows) size *= 2;
    for (int i = tid; i < size; i += THREADS) {
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
    for (int start = 0; start < rows; start += THREADS) {
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

}  // namespace

int64_t work_list_bytes(int64_t n, int64_t k) {
  return n * static_cast<int64_t>(sizeof(Row)) + 8 * (n + 1) + 8 * (k + 1);
}

WorkList build_work_list(const Inputs& in, int tile_refs, void* workspace, cudaStream_t stream) {
  WorkList work;
  work.rows = static_cast<Row*>(workspace);
  work.first_tile = reinterpret_cast<int64_t*>(work.rows + in.n);
  work.group_tiles = work.first_tile + in.n + 1;
  work.tile_refs = tile_refs;
  list_kernel<<<1, THREADS, 0, stream>>>(in, work);
  return work;
}

}  // namespace svel::cuda
