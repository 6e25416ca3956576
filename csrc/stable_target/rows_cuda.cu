// Fills the work list (rows.cuh). Bytes: n labels, times and 80-byte rows, k counts: nothing beside the
// references. One block, since everything is a scan; sorting 4096 keys in shared memory takes a few
// microseconds.
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
  list_kernel<<<1, LIST_THREADS, 0, stream>>>(in, work);
  return work;
}

}  // namespace svel::cuda
