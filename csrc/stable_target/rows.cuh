// The work list of the reference-set kernels, made on the device by one small launch: rows in the order of
// their group, their coefficients, and prefix sums of their tiles of references. Nothing of it is ever read
// by the host.
#pragma once

#include "common/device.cuh"
#include "common/path.h"

namespace svel::cuda {

struct Gather;

// Where the launch that ends rows merges those of this process with what others leave in its mailbox.
struct AtHome {
  float* merged;          // (rows_each, d) float32: a x + b mean; null: another launch does it
  const float* x;         // (rows_each, d) float32
  char* mailbox;          // the own one
  uint64_t patience;      // of Peers
  const int64_t* labels;  // (rows_each,), there before those of all; or null
  Prediction prediction;  // of what is merged; parts give means
  bool awaits_x;          // x of another process is there when it says so, see Header::arrived
};

// What a launch on the rows of several processes does: all of it, or what makes the list of work alone, ahead
// of the kernel that writes x, or what is left behind that one.
enum class Stage { whole, list, rest };

struct Inputs {                     // all arrays contiguous on the device
  Array x;                          // (n, d)
  Array refs;                       // (k, m, d)
  Array source;                     // (n, d) or null
  const int64_t* labels = nullptr;  // (n,) or null: all rows in group 0
  const void* counts = nullptr;     // (k,) or null: all references are valid
  bool counts_are_long = false;
  Array time_or_alpha;  // (n,): t when from_time, else alpha
  Array sigma;          // (n,), unused when from_time
  bool from_time = false;
  Path path = Path::linear;
  Prediction prediction = Prediction::x0;
  int64_t n = 0, k = 1, m = 0, d = 0;
  Array out;  // (n, d): a x + b mean
  Array lse;  // (n,) or null
  // Rows of several processes, rows_each of each (csrc/peers): x is read where it is, in the mailbox of the
  // process whose row it is, and results go there, to the rows of this process. Null: they do not.
  const int64_t* mailboxes = nullptr;
  int64_t rows_each = 0, x_at = 0, mean_at = 0, lse_at = 0;  // bytes into each
  int part = 0, parts = 0;
  bool partial = false;  // rows have references elsewhere, with which results are merged
  // On the host: what begins the round, beside the list of units, and how it ends.
  const Gather* gather = nullptr;
  const AtHome* at_home = nullptr;
  Stage stage = Stage::whole;
};

__device__ inline int64_t owner_of(const Inputs& in, int64_t index) {
  return static_cast<uint32_t>(index) / static_cast<uint32_t>(in.rows_each);
}
__device__ inline bool is_of_another(const Inputs& in, int64_t index) {
  return in.mailboxes && owner_of(in, index) != in.part;
}
// x as it is for the row at `index`: elements are counted alike.
__device__ inline Array x_of(const Inputs& in, int64_t index) {
  if (!in.mailboxes) return in.x;
  return {reinterpret_cast<char*>(in.mailboxes[owner_of(in, index)]) + in.x_at, in.x.dtype};
}

// `to`, an array of one value or d of each row, likewise.
__device__ inline Array results_of(const Inputs& in, const Array& to, int64_t at, int64_t d, int64_t index) {
  if (!in.mailboxes) return to;
  const int64_t owner = owner_of(in, index), shift = (in.part - owner) * in.rows_each * d * size_of(to.dtype);
  return {reinterpret_cast<char*>(in.mailboxes[owner]) + at + shift, to.dtype};
}
__device__ inline Array out_of(const Inputs& in, int64_t index) {
  return results_of(in, in.out, in.mean_at, in.d, index);
}
__device__ inline Array lse_of(const Inputs& in, int64_t index) {
  return results_of(in, in.lse, in.lse_at, 1, index);
}

// The row of x at `index`. Both alpha and x change sign where alpha is negative, so alpha >= 0 here.
struct Row {
  int64_t index;
  int64_t group;  // -1: all groups
  int64_t count;  // valid references
  double alpha, sigma, sign;
  double a, b;  // out = a x + b mean
  // s_j = rate (y.d_j - alpha/2 |d_j|^2), d_j = r_j - c, y = sign x - alpha c; weights are softmax(s_j)
  __device__ double rate() const { return alpha / (sigma * sigma); }
};

struct WorkList {
  Row* rows;            // (n,) sorted by group within blocks of 4096 rows
  int64_t* first_tile;  // (n + 1,) prefix sums over the sorted rows; a row without tiles has no references or
                        // no finite coefficients, and becomes NaN
  int64_t* group_tiles;  // (k + 1,) prefix sums over the groups: the tiles of a row that takes all of them
  int tile_refs;
};

struct Span {  // the valid references of one tile: `count` from reference `first` of group `group`
  int64_t group, first;
  int count;
};

__device__ inline int64_t valid_count(const Inputs& in, int64_t group) {
  int64_t count = in.m;
  if (in.counts) {
    count = in.counts_are_long ? static_cast<const int64_t*>(in.counts)[group]
                               : static_cast<int64_t>(static_cast<const int32_t*>(in.counts)[group]);
  }
  return count < 0 ? 0 : count > in.m ? in.m : count;
}

// Largest i in [low, high) with prefix[i] <= value; prefix[low] <= value < prefix[high].
__device__ inline int64_t find_prefix(const int64_t* prefix, int64_t low, int64_t high, int64_t value) {
  while (high - low > 1) {
    const int64_t mid = low + (high - low) / 2;
    if (prefix[mid] <= value) {
      low = mid;
    } else {
      high = mid;
    }
  }
  return low;
}

// Tile number `tile` of a row's set.
__device__ inline Span tile_span(const Inputs& in, const WorkList& work, const Row& row, int64_t tile) {
  int64_t group = row.group, count = row.count;
  if (group < 0) {
    if (count == 0) return {0, 0, 0};
    group = find_prefix(work.group_tiles, 0, in.k, tile);
    tile -= work.group_tiles[group];
    count = valid_count(in, group);
  }
  const int64_t first = tile * work.tile_refs, left = count - first;
  return {group, first, static_cast<int>(left < 0 ? 0 : left > work.tile_refs ? work.tile_refs : left)};
}

// Bytes of workspace for the list.
int64_t work_list_bytes(int64_t n, int64_t k);

// Places the list in `workspace` (aligned to 16 bytes) and launches the kernel that fills it.
WorkList build_work_list(const Inputs& in, int tile_refs, void* workspace, cudaStream_t stream);

}  // namespace svel::cuda
