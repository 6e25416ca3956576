// The launch planner of posterior_mean and stable_target on CUDA: from a problem to a kernel and its tiles.
// Host only, no torch or CUDA headers, so that Python can print and test the choice without a GPU.
#pragma once

#include <cstdint>
#include <string>

namespace svel {

struct Problem {
  int64_t n = 0, k = 1, m = 0, d = 0;  // rows, groups, references per group, elements of a sample
  bool has_labels = false;             // without labels all rows share the one group
  int x_size = 4, refs_size = 2;       // bytes per element; 8 for either means float64 arithmetic
  bool refs_bf16 = false;              // of the two types of two bytes
  bool aligned = true;                 // every reference starts at a multiple of 16 bytes
  bool has_source = false;
  bool vectors = true;       // x, source and out are float32, aligned to 16 bytes
  bool shared_rows = false;  // with other processes, to which results go
  int sm_count = 132;
  double bandwidth = 3.35e12;   // of the device's memory, bytes per second as specified
  int64_t smem_limit = 232448;  // bytes of shared memory that a block may ask for
  int cc = 90;                  // compute capability times ten
  bool has_sm90a = true;        // code for compute capability 9.0 with its own instructions was compiled
  std::string precision = "exact";

  int64_t groups() const { return has_labels ? k : 1; }
  int64_t references() const { return groups() * m; }  // of all groups
};

// What units of class banks cost: a tile with one row TILE_WEIGHT, with two rows and with more; the change to
// another unit, and for each of its rows. deal: units that share their class are dealt out (Ranges in
// ranges.h), where it is too long to stay in the L2 from one to the next.
constexpr int TILE_WEIGHT = 8;
struct UnitCosts {
  int two = 0, four = 0, row = 0, unit = 0;
  bool deal = false;
};

struct Plan {
  // "pool", "held", "swept", "many_rows", "short_rows", "bulk", "stream", "two_pass", "tiled" or "small"
  std::string kernel;
  int tile_rows = 1;  // per thread block: rows, references and elements of a sample held at a time
  int tile_refs = 1;
  int64_t tile_d = 0;
  int threads = 0;
  int stages = 1;         // tiles of references in flight
  bool aligned = true;    // 16-byte loads
  bool wide = false;      // float64 arithmetic
  bool fast = false;      // pool: weights of one half
  int64_t blocks = 0;     // thread blocks of the main launch
  int64_t slices = 1;     // pool, bulk: thread blocks that share a sample, and
  int64_t slice = 0;      // elements of it for each
  bool own_list = false;  // bulk: each block builds the list of units for itself
  int group = 0;          // bulk: threads that share a sample where one block holds it; the block has several
  int64_t splits = 1;  // pool, bulk, stream: most parts of a row's references; two_pass: parts of D; small:
                       // parts of the references
  int64_t rows_per_pass = 0;  // rows and references that one round of launches covers
  int64_t refs_per_pass = 0;
  int64_t smem_bytes = 0;
  int64_t workspace_bytes = 0;
  int64_t bytes = 0;  // that must move at least, if every row has a group of its own (up to k)
  int64_t flops = 0;  // 4 n m d: a product and a weighted sum
  std::string reason;
  bool early_merge = false;  // small, 9 <= D <= 16: the merge starts beside the kernel that it waits for
  bool products = false;     // bulk: on the matrix units, see bulk_products.cuh
  int in_flight = 0;         // bulk: tiles on their way at once
  int lag = 0;               // bulk: tiles that a team scores ahead of those that it adds
  UnitCosts costs;           // bulk
};

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
constexpr int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}
constexpr int64_t WORKSPACE_LIMIT = int64_t{256} << 20;
constexpr int TWO_PASS_TILE_REFS = 16;
// Bytes that a block of the bulk kernel keeps beside its stages: barriers, scores, rows of units; and where
// the list of units is short (up to OWN_LIST_ROWS rows and OWN_LIST_GROUPS groups), the list and what it is
// made of.
constexpr int64_t BULK_FIXED_SMEM = 8192;
constexpr int64_t OWN_LIST_ROWS = 256, OWN_LIST_GROUPS = 1024;
constexpr int64_t WARP_LIST_ROWS = 32;  // up to here a warp builds it, a row to a lane
constexpr int64_t UNIT_BYTES = 32;
constexpr int64_t unit_list_bytes(int64_t n, int64_t k) {
  return (n * UNIT_BYTES + 8 * (n + 1) + 8 * (k + 1) + 4 * n + 20 + 15) / 16 * 16;
}
constexpr int64_t bulk_list_smem(int64_t n, int64_t k) {
  return (unit_list_bytes(n, k) + 127) / 128 * 128;
}
constexpr int64_t LIST_SCRATCH_SMEM = 18432;  // where the stages are, before the first copies
constexpr int64_t SETTLE_SMEM = 29056;        // the same, after the last ones (bulk_settle.cuh)
// Where one block holds a sample: threads that compute, in groups; most rows of a unit; barriers.
constexpr int GROUPS_CONSUMERS = 512, GROUPS_MOST_ROWS = 4, GROUPS_MAX_STAGES = 64;
constexpr int PRODUCTS_ROWS = 2, PRODUCTS_MANY_ROWS = 4;    // of a unit
constexpr int PRODUCTS_MOST_BLOCKS = 8;                     // that share a sample
constexpr int PRODUCTS_TIES = 64, PRODUCTS_TIE_BYTES = 16;  // references that a part may list
constexpr int products_ties(int64_t rows) {  // there in memory, beside what rows themselves take
  return rows <= int64_t{1} << 15 ? PRODUCTS_TIES : 32;
}
// Blocks with so many threads that compute that share a multiprocessor.
constexpr int products_resident(int consumers) {
  return GROUPS_CONSUMERS / consumers;
}
// Tiles in the ring of such a block: 192 KB together, 80 where two blocks share a multiprocessor. elements:
// of a tile, for each thread.
constexpr int products_stages(int consumers, int elements) {
  return (products_resident(consumers) == 1 ? 192 : 160) / elements;
}
// Beside the stages of bulk_products.cuh: barriers, shares of scores.
constexpr int64_t products_smem(int tile_refs, int64_t slices, int rows) {
  return 512 + 2240 * rows + (152 * rows + 64) * tile_refs +
         (slices > 1 ? slices * (96 + 32 * tile_refs) + 64 : 0);
}
// Of a reference there: apart by 16 bytes more than a multiple of 128, so that eight of them meet all banks.
constexpr int products_ref_bytes(int64_t held) {
  return static_cast<int>(2 * held) + 16;
}
// UnitCosts. By groups on an H100, of 0 to 96 for a row: bfloat16 203 and 197 us, float32 289 and 280; there
// a change takes 9 us and 3 for each row, where a tile of 2 x 4,096 takes 1.2 (275 and 270 us). On the matrix
// units of an H200 a block of 256 x 4,096 needs 1.3 us for a tile and 3 to 4 for a change, be it of one row
// or two.
constexpr int GROUPS_ROW = 64, PRODUCTS_ROW = 4, PRODUCTS_UNIT = 18;
// Of groups of so many threads and more, which may also have units dealt out:
constexpr int GROUPS_DEALT = 256, GROUPS_LONG_ROW = 20, GROUPS_LONG_UNIT = 52;
constexpr int groups_sums_smem(int elements) {  // where groups leave their sums for one another
  return 4 * GROUPS_CONSUMERS * elements;
}
constexpr int BULK_PRODUCERS = 128;  // threads beside the consumers: registers are dealt to 128 at a time
constexpr int BULK_MAX_STAGES = 8;
// Tiles that a team of blocks scores ahead of those that it adds, at least and at most.
constexpr int BULK_LAG = 3, BULK_MOST_LAG = 4;
constexpr int BULK_MAX_CLUSTER = 8;  // above that a team of blocks spans the grid
constexpr int BULK_MOST_SLICES = 160;

// Of a block of `warps` of the kernel for 9 <= D <= 16, D rounded up to d: for each reference the parts of
// its factors and of its columns, and itself; for each row its sums.
constexpr int64_t small_smem(int64_t d, int64_t warps) {
  const int64_t steps = ceil_div(6 * (d + 1) + 2, 16), columns = ceil_div(d + 1, 8),
                pitch = d <= 12 ? 12 : 20;
  return 32 * warps * (32 * steps + 64 * columns + 4 * pitch + 8 * (d + 1)) + 4 * warps * (d + 1) + 1024;
}

// Throws std::invalid_argument for sizes below zero and for a precision that is not "exact" or "fast".
Plan make_plan(const Problem& problem);

}  // namespace svel
