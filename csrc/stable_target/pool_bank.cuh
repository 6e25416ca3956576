// What begins a call on a class bank some of whose rows may have label -1, all references of all classes,
// where the pool kernel serves these: which rows they are, and which tiles of the bank, seen as one pool,
// have a reference that counts. The bulk kernel gets labels in which such rows have no class: it leaves them
// NaN, and they are written behind it. Nothing of this is read by the host: without such rows the launches of
// the pool kernel and of what is around it end at once.
#pragma once

#include "stable_target/pool_rows.cuh"
#include "stable_target/units.cuh"

namespace svel::cuda {

static_assert(POOL_BANK_ROWS <= CHUNK, "rows are sorted all at once");

struct PoolFound {  // written by pool_null_kernel
  int64_t* labels;  // (n,) those of the bulk kernel
  int* order;       // see PoolBank
  int* sizes;
  PoolTile* tiles;
  uint64_t* doubtful;  // (words,) no row so far
  int words;
};

// Which references of a tile count.
__device__ inline uint32_t valid_in_tile(const Inputs& in, unsigned tile) {
  const unsigned m = static_cast<unsigned>(in.m), first = tile * POOL_TILE, k = static_cast<unsigned>(in.k);
  unsigned group = first / m, at = first - group * m;
  uint32_t valid = 0;
#pragma unroll 1
  for (unsigned bit = 0; bit < POOL_TILE && group < k; ++group, at = 0) {
    const unsigned count = static_cast<unsigned>(valid_count(in, group)), here = min(POOL_TILE - bit, m - at);
    const unsigned good = count > at ? min(count - at, here) : 0;
    valid |= static_cast<uint32_t>((uint64_t{1} << good) - 1) << bit;
    bit += here;
  }
  return valid;
}

// One block.
__global__ void __launch_bounds__(LIST_THREADS) pool_null_kernel(const Inputs in, const PoolFound found) {
  __shared__ uint64_t keys[CHUNK];
  __shared__ int64_t scratch[LIST_THREADS / 32];
  const int tid = static_cast<int>(threadIdx.x), n = static_cast<int>(in.n);
  for (int i = tid; i < found.words; i += LIST_THREADS) found.doubtful[i] = 0;
  int size = 4, rows = 0;
  while (size < n) size *= 2;
  for (int start = 0; start < size; start += LIST_THREADS) {
    const int i = start + tid;
    bool takes_all = false;
    if (i < n) {
      const int64_t label = in.labels[i];
      takes_all = label == -1 && row_is_finite(in, i);
      found.labels[i] = takes_all ? in.k : label;
    }
    if (i < size) {
      keys[i] = ~uint64_t{0};
      if (takes_all) {
        const float rate = static_cast<float>(row_coefficients(in, i).rate());  // not negative
        keys[i] = uint64_t{__float_as_uint(rate)} << 32 | static_cast<unsigned>(i);
      }
    }
    rows += __syncthreads_count(takes_all);
  }
  int64_t tiles = 0;
  if (rows > 0) {
    sort_keys(keys, size);
    for (int i = tid; i < rows; i += LIST_THREADS) found.order[i] = static_cast<int>(keys[i] & 0xffffffffu);
    const int all = static_cast<int>((in.k * in.m + POOL_TILE - 1) / POOL_TILE);
    const int each = (all + LIST_THREADS - 1) / LIST_THREADS, begin = min(tid * each, all);
    const int end = min(begin + each, all);
    int64_t own = 0;
    for (int tile = begin; tile < end; ++tile) own += valid_in_tile(in, tile) != 0;
    int64_t at = block_prefix(own, scratch, tiles);
    for (int tile = begin; tile < end; ++tile) {
      const uint32_t valid = valid_in_tile(in, tile);
      if (valid) found.tiles[at++] = {tile * POOL_TILE, valid};
    }
  }
  if (tid == 0) found.sizes[0] = rows, found.sizes[1] = static_cast<int>(tiles);
}

}  // namespace svel::cuda
