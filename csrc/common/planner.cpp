#include "common/planner.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <utility>

#include "common/planner_held.h"
#include "common/planner_pool.h"
#include "common/planner_rows.h"
#include "common/planner_short.h"
#include "common/planner_swept.h"

namespace svel {
namespace {

// Tiles of the single-pass kernel, tried in order: the first that holds D and fits shared memory twice is
// taken. A block keeps tile_d elements of one row in registers (threads x vectors of 8) and stages tile_refs
// references at a time. About 64 KB a tile on Hopper: with three in flight that is several times what latency
// times bandwidth asks of one multiprocessor (about 32 KB), and one barrier per tile stays far below the
// tile's transfer time (about 2 us).
struct StreamTile {
  int refs_size;  // bytes per element; 0: any dtype and alignment, staged as float32
  int threads, vectors, tile_refs;
  const char* reason;
};

constexpr StreamTile STREAM_TILES[] = {
    {2, 128, 1, 8, "D <= 1,024: small blocks, several per multiprocessor"},
    {2, 256, 1, 8, "D <= 2,048: two blocks per multiprocessor"},
    {2, 512, 1, 8, "D <= 4,096: one block per multiprocessor, tiles of 8 references kept in registers"},
    {2, 512, 2, 4, "D <= 8,192: tiles of 4 references keep the 64 KB of a stage"},
    {2, 512, 4, 2, "D <= 16,384, or little shared memory: tiles of 2 references"},
    {4, 128, 1, 8, "D <= 1,024: small blocks, several per multiprocessor"},
    {4, 256, 1, 4, "D <= 2,048: tiles of 4 references, 32 KB"},
    {4, 512, 1, 4, "D <= 4,096: tiles of 4 references, 64 KB"},
    {4, 512, 2, 2, "D <= 8,192: tiles of 2 references, 64 KB"},
    {4, 512, 4, 1, "D <= 16,384, or little shared memory: one reference at a time"},
    {0, 128, 1, 8, "references not aligned to 16 bytes: plain loads"},
    {0, 512, 1, 4, "references not aligned to 16 bytes: plain loads"},
    {0, 512, 4, 1, "references not aligned to 16 bytes: plain loads"},
};
constexpr int64_t STREAM_FIXED_SMEM = 4096;  // scores, tile descriptors, reductions
constexpr int MAX_STAGES = 4;

// Tiles of the bulk kernels (Hopper), tried in order: the first that holds D is taken. Up to 8,192 elements
// a block holds a sample, `group` threads with `elements` each, in as many groups as its 512 threads make
// (bulk_groups.cuh); up to four rows of one class share a pass. Longer samples are cut into slices over a
// team of blocks (bulk_teams.cuh): a cluster of up to eight, else blocks all over the grid. Of 65,536
// elements a cluster of eight is not the best: 15 of them fit, rows are cut into parts, and their merge is
// the end of all. Measured on an H200, 8 x 16 x 256 x 65,536: 110 us, with 8 teams of 16 blocks over the
// grid 86. On the matrix units (bulk_products.cuh) a block has up to 4,096 elements, longer samples a
// cluster, two rows a pass; up to 1,024 elements two blocks of `group` threads share a multiprocessor, since
// a tile there waits for its scores, its weights and its sums in turn, not for memory (H100, 256 x 1,001 x
// 256 x 1,024 67.9 to 55.2 us).
struct BulkTile {
  int refs_size;
  int group, elements, tile_refs;
  int64_t most_d;
  const char* reason;

  bool products() const { return tile_refs >= 8; }  // references apart
};

constexpr BulkTile BULK_TILES[] = {
    {0, 32, 16, 2, 32, "D <= 32: sixteen groups of one warp"},
    {2, 256, 2, 16, 512, "16 bits, D <= 512: matrix units, two blocks to a multiprocessor"},
    {0, 32, 16, 2, 512, "D <= 512: sixteen groups of one warp"},
    {2, 256, 4, 8, 1024, "16 bits, D <= 1,024: matrix units, two blocks to a multiprocessor"},
    {0, 64, 16, 2, 1024, "D <= 1,024: eight groups of two warps"},
    {2, 512, 4, 16, 2048, "16 bits, D <= 2,048: matrix units, tiles of sixteen references"},
    {2, 512, 8, 8, 4096, "16 bits, D <= 4,096: matrix units, tiles of eight references"},
    {2, 512, 8, 8, 32768,
     "16 bits, D <= 32,768: matrix units, clusters of blocks with up to 4,096 elements each"},
    {0, 128, 16, 2, 2048, "D <= 2,048: four groups of four warps"},
    {0, 256, 16, 2, 4096, "D <= 4,096: two groups of eight warps, tiles of two references in registers"},
    {2, 512, 16, 2, 8192, "D <= 8,192: one group of sixteen warps"},
    {4, 512, 16, 1, 8192, "D <= 8,192: one group of sixteen warps, one reference at a time"},
    {2, 512, 16, 2, 32768, "D <= 32,768: a cluster of up to four blocks, up to 8,192 elements each"},
    {2, 512, 8, 4, 65536, "D <= 65,536: a team of blocks all over the grid, up to 4,096 elements each"},
    {2, 512, 16, 2, 1 << 20, "D <= 1,048,576: a team of blocks, up to 8,192 elements each"},
    {2, 512, 32, 1, 1 << 21, "D <= 2,097,152: a team of blocks, up to 16,384 elements each"},
    {4, 512, 16, 1, 32768, "D <= 32,768: a cluster of up to four blocks, up to 8,192 elements each"},
    {4, 512, 8, 2, 65536, "D <= 65,536: a team of blocks all over the grid, up to 4,096 elements each"},
    {4, 512, 16, 1, 1 << 20, "D <= 1,048,576: a team of blocks, up to 8,192 elements each"},
};

constexpr int64_t SMALL_D = 32;       // up to here a thread holds whole rows in registers
constexpr int64_t EXACT_D = 8;        // up to here rounding does not average out: scores and sums in float64
constexpr int64_t SMALL_ROWS = 64;    // fewer rows leave its threads idle
constexpr int64_t TILED_ROWS = 64;    // from here register tiles of rows x references beat one pass per row,
constexpr int64_t TILED_BLOCKS = 96;  // given enough of them to fill the device,
constexpr int64_t TILED_D = int64_t{1} << 17;         // and room for the sums of a tile of rows
constexpr int64_t SCORES_LIMIT = int64_t{128} << 20;  // bytes of scores held at a time
constexpr int64_t VECTORS_LIMIT = int64_t{64} << 20;  // bytes of per-row vectors held at a time
constexpr int64_t ROW_BYTES = 96;                     // one row's entry in the work list

int64_t list_bytes(const Problem& p) {
  return p.n * ROW_BYTES + 8 * (p.groups() + 1) + 4096;
}

// Of a multiprocessor, for a row, a reference and an element. Measured on an H200: units of two rows take
// 0.88 us for a tile of two references of 4,096 elements.
constexpr double TILE_REFERENCE_SECONDS = 0.88e-6 / 2 / 2 / 4096;

// Bytes that a multiprocessor has on their way. More would only wait in the memory's queues, and whatever
// else is read behind them.
constexpr int64_t BULK_IN_FLIGHT = 65536;

// At least so many slices, a quarter more at most, so that whole teams leave the fewest multiprocessors idle.
int64_t best_slices(int64_t least, int64_t sm_count) {
  int64_t best = least;
  if (least <= BULK_MAX_CLUSTER) return best;
  for (int64_t slices = least; slices <= least + least / 4; ++slices) {
    if (sm_count / slices * slices > sm_count / best * best) best = slices;
  }
  return best;
}

// Blocks of a cluster on the matrix units: what was measured; three and five would leave fewer
// multiprocessors idle where they suffice.
int64_t products_slices(int64_t least) {
  int64_t slices = 1;
  while (slices < least) slices *= 2;
  return slices;
}

int64_t class_bytes(const Problem& p) {
  return p.m * p.d * p.refs_size;
}

// Bytes of a class from which on units that share it are dealt out, by groups of many warps, in clusters, and
// of bfloat16. On an H100, 256 rows of 301 classes of 256: float32 297 to 275 us, D 16,384 607 to 570, 8,192
// (of 501) 321 to 307; on an H200 bfloat16, 301 classes of 1,000 x 4,096, 451 to 431. The list takes 2 to 3
// us longer to make (256 x 1,001 x 256 x 4,096 float16 164 to 166, D 1,024 74 to 77), and a team of the grid
// begins 3 to 7 later, so not there; but on the matrix units always where a launch of its own makes the list
// (1,024 rows 561 to 512 us) or units have four rows.
constexpr int64_t DEALT_BYTES = int64_t{4} << 20;

bool deals_units(const Problem& p, const BulkTile& tile, int rows, bool own_list, int64_t slices,
                 int64_t teams) {
  if (!p.has_labels || p.shared_rows) return false;
  if (tile.products() && rows > PRODUCTS_ROWS) return true;
  if (p.n < teams) return false;  // no team could have a whole unit
  const bool large = class_bytes(p) >= DEALT_BYTES;
  if (tile.products()) return !own_list || (large && (slices > 1 || p.refs_bf16));
  return slices == 1 && tile.group >= GROUPS_DEALT && large;
}

// On the matrix units: four where one block holds them, of float16, and there are many. On an H100, 2,048 x
// 1,001 x 256 x 4,096: 880 us with two, 740 with four, 1,024 rows 516 and 493. On an H200 256 rows of 10 and
// of 100 classes 85 to 66 and 102 to 89; with D 1,024, one block to a multiprocessor, 47 to 42 and 52 to 55,
// 2,048 rows of 1,001 classes 250 to 209, 512 rows 92 to 97.
//
// Such units take 6 to 10 us more to begin and to end, and save reading a class again, which pays where rows
// have many bytes and few classes. On an H100, 256 rows, 4,096 elements: 301 classes of 256 154 to 147 us,
// 501 of 512 and of 1,000 305 to 294 and 589 to 557, 301 of 1,000 589 to 502, 64 rows of 65 classes of 4,096
// 605 to 529; but 501 of 256 155 to 159, 1,001 of 256 and of 512 165 to 171 and 314 to 319, 64 rows of 101
// classes 50 to 57, 16 rows 29 to 39.
constexpr int64_t MANY_ROWS_BYTES = 400'000'000, MANY_ROWS_CLASS_BYTES = 1'600'000;

int products_rows(const Problem& p, bool own_list, int64_t slices, int64_t teams) {
  if (p.refs_bf16 || slices > 1 || p.shared_rows) return PRODUCTS_ROWS;
  const int64_t each = p.n / p.groups();       // rows of a class
  const int64_t bytes = p.n * class_bytes(p);  // that rows would read one by one
  const bool heavy = p.d > 1024 && p.n > WARP_LIST_ROWS && bytes >= MANY_ROWS_BYTES &&
                     bytes >= MANY_ROWS_CLASS_BYTES * p.groups();
  const bool many = p.d > 1024 ? !own_list || each >= 2 : each >= (own_list ? 8 : 2);
  return heavy || (many && p.n >= std::min<int64_t>(teams, p.sm_count)) ? PRODUCTS_MANY_ROWS : PRODUCTS_ROWS;
}

// Measured on an H100, 256 rows x 1,001 classes x 256 x 4,096: 173 us, where groups of warps take 207, with
// one label for all rows 95 and 151, with a label for each 205 and 211; on an H200 with bfloat16 138 and 174,
// with D 1,024 57 and 84. In an earlier form one row beside a pool of 50,000 took 181 and 166. On an H200,
// with clusters: D 4,104 188 us by them, 317 by groups, 8,192 243 and 329, 16,384 448 and 616 (teams), 32,768
// 245 and 381; one row of 8,192 31 and 42, eight of 32,768 62 and 85. Of 65,536, in clusters of sixteen,
// eight rows took 107, by teams 86. Sums of other processes' rows have to have room.
bool serves_products(const Problem& p) {
  constexpr int64_t MOST_SUMS = WORKSPACE_LIMIT / 2;
  return p.has_labels && p.vectors && (!p.shared_rows || 4 * p.n * p.d <= MOST_SUMS);
}

bool plan_bulk(const Problem& p, Plan& plan) {
  if (p.cc < 90 || !p.aligned || p.refs_size == 8 || p.d == 0) return false;
  for (const BulkTile& tile : BULK_TILES) {
    if ((tile.refs_size != 0 && tile.refs_size != p.refs_size) || p.d > tile.most_d) continue;
    const int64_t held = int64_t{tile.group} * tile.elements;
    const bool products = tile.products();
    const int64_t least = ceil_div(p.d, held),
                  slices = products ? products_slices(least) : best_slices(least, p.sm_count),
                  slice = slices == 1 ? p.d : ceil_div(ceil_div(p.d, slices), 8) * 8;
    if (slices > std::min(p.sm_count, BULK_MOST_SLICES)) continue;
    if (slices <= BULK_MAX_CLUSTER && tile.elements > 16) continue;  // no clusters: of few multiprocessors
    if (p.groups() * ceil_div(p.m, tile.tile_refs) >= int64_t{1} << 31) continue;  // tiles of a unit are ints
    plan.own_list = p.n <= OWN_LIST_ROWS && p.groups() <= OWN_LIST_GROUPS && p.m < int64_t{1} << 31 &&
                    !(products && p.shared_rows);  // the launch that makes it hears of other processes' rows
    const int64_t stage =
        products ? tile.tile_refs * products_ref_bytes(held) : tile.tile_refs * slice * p.refs_size;
    const int64_t units = p.n * std::max<int64_t>(1, p.groups() * ceil_div(p.m, tile.tile_refs));
    const int64_t resident = products ? products_resident(tile.group) : 1;
    const int64_t teams = std::max<int64_t>(1, std::min(resident * p.sm_count / slices, units));
    int rows = products      ? products_rows(p, plan.own_list, slices, teams)
               : slices == 1 ? std::min(GROUPS_CONSUMERS / tile.group, GROUPS_MOST_ROWS)
                             : 1;
    const auto fixed_beside = [&](int rows) {
      const int64_t shared = products      ? products_smem(tile.tile_refs, slices, rows)
                             : slices == 1 ? BULK_FIXED_SMEM + groups_sums_smem(tile.elements)
                                           : BULK_FIXED_SMEM;
      return shared + (plan.own_list ? bulk_list_smem(p.n, p.groups()) : 0);
    };
    const int64_t most_stages = products      ? products_stages(tile.group, tile.tile_refs * tile.elements)
                                : slices == 1 ? GROUPS_MAX_STAGES
                                              : BULK_MAX_STAGES;
    const int64_t room = (p.smem_limit + 1024) / resident - 1024;  // the system has a KB of each block
    if (products && fixed_beside(rows) + most_stages * stage > room) rows = PRODUCTS_ROWS;
    const int64_t fixed = fixed_beside(rows);
    int64_t stages = std::min<int64_t>(most_stages, (room - fixed) / stage);
    if (products && (stages < most_stages || !serves_products(p))) continue;
    if (slices == 1 && !products) stages -= stages % (GROUPS_CONSUMERS / tile.group);  // see bulk_groups.cuh
    if (stages < (slices == 1 || products ? 3 : BULK_LAG + 2)) return false;
    plan.kernel = "bulk";
    plan.threads = (products ? tile.group : GROUPS_CONSUMERS) + BULK_PRODUCERS;
    plan.group = tile.group;
    plan.tile_rows = rows;
    plan.in_flight = static_cast<int>(std::clamp<int64_t>(BULK_IN_FLIGHT / stage, 2, stages));
    // One row waits for memory, more are bound by their arithmetic where that takes longer.
    const double memory = tile.tile_refs * p.refs_size * p.sm_count / (0.92 * p.bandwidth);
    const double arithmetic = TILE_REFERENCE_SECONDS * tile.tile_refs;
    plan.products = products;
    plan.costs.two = std::max(TILE_WEIGHT, static_cast<int>(TILE_WEIGHT * 2 * arithmetic / memory + 0.5));
    plan.costs.four = std::max(TILE_WEIGHT, static_cast<int>(TILE_WEIGHT * 4 * arithmetic / memory + 0.5));
    if (slices == 1) plan.costs.row = GROUPS_ROW;
    if (slices == 1 && tile.group >= GROUPS_DEALT)
      plan.costs.row = GROUPS_LONG_ROW, plan.costs.unit = GROUPS_LONG_UNIT;
    if (products) plan.costs = {TILE_WEIGHT, TILE_WEIGHT, PRODUCTS_ROW, PRODUCTS_UNIT};
    plan.costs.deal = deals_units(p, tile, rows, plan.own_list, slices, teams);
    plan.tile_refs = tile.tile_refs;
    plan.tile_d = held;
    plan.stages = static_cast<int>(stages);
    plan.lag = slices <= BULK_MAX_CLUSTER
                   ? BULK_LAG
                   : static_cast<int>(std::clamp<int64_t>(stages - 3, BULK_LAG, BULK_MOST_LAG));
    plan.slices = slices;
    plan.slice = slice;
    plan.blocks = teams * slices;
    plan.splits = teams;
    plan.rows_per_pass = p.n;
    plan.refs_per_pass = p.references();
    plan.smem_bytes = fixed + std::max({stages * stage, SETTLE_SMEM, plan.own_list ? LIST_SCRATCH_SMEM : 0});
    const int64_t of_ties = products ? int64_t{products_ties(p.n)} * PRODUCTS_TIE_BYTES : 0;
    const int64_t of_rows = products ? 64 + of_ties + (p.shared_rows ? 4 * p.d : 0) : 24 * slices;
    plan.workspace_bytes =
        unit_list_bytes(p.n, p.groups()) + of_rows * p.n + 4096 +
        plan.blocks * (plan.tile_rows * ((products ? 4 : 16) * slice + 512 + of_ties) + 8 * slice);
    plan.reason = tile.reason;
    return true;
  }
  return false;
}

// What a class bank takes by that plan, about, with labels drawn evenly. Units read their class, from the L2
// where that holds the bank. On an H100, beside 5,000 references of each class: 256 rows of ten classes of
// 3,072 843 us, 1,024 rows 3,089, 256 rows of one class of 4,096 789.
constexpr double BULK_SECONDS = 20e-6;
constexpr double BULK_UNIT_SHARE = 0.75, BULK_READ_SHARE = 0.84;  // of the bandwidth
constexpr double L2_BYTES = 45e6, L2_BANDWIDTH = 3.4e12;
constexpr double BULK_SHORT_D = 512;  // shorter samples take a unit no less time

double bulk_seconds(const Problem& p, const Plan& plan) {
  const double k = static_cast<double>(p.groups()), n = static_cast<double>(p.n), rows = plan.tile_rows;
  const double seen = k * (1 - std::exp(-n / k));  // classes
  // The last unit of a class has any number of rows.
  const double units = std::max(seen, n / rows + seen * (rows - 1) / (2 * rows));
  const double bytes = static_cast<double>(class_bytes(p)), unit_bandwidth = BULK_UNIT_SHARE * p.bandwidth;
  const double short_samples = std::max(1.0, BULK_SHORT_D / static_cast<double>(p.d));
  const double from_units = units * bytes * short_samples /
                            (k * bytes <= L2_BYTES ? std::max(L2_BANDWIDTH, unit_bandwidth) : unit_bandwidth);
  return BULK_SECONDS + std::max(from_units, seen * bytes / (BULK_READ_SHARE * p.bandwidth));
}

// Whether register tiles serve what is left.
bool is_tiled(const Problem& p) {
  return !p.has_labels && p.d > SMALL_D && p.d <= TILED_D && p.n >= TILED_ROWS &&
         ceil_div(p.n, 64) * ceil_div(p.d, 64) >= TILED_BLOCKS;
}

// Whether the kernel for many rows, by its plan, is to have a class bank.
bool has_few_classes(const Problem& p, const Plan& many) {
  Plan bulk;
  return !plan_bulk(p, bulk) || many_rows_seconds(p, many) < bulk_seconds(p, bulk);
}

// Whether it is to have a pool of float32, by its plan: what else may serve takes float32's operations.
// Register tiles: 4,096 rows beside 50,000 references of 128 11.7 ms on an H100.
constexpr double TILED_SECONDS = 30e-6, TILED_RATE = 9e12;  // operations per second

bool has_float_pool(const Problem& p, const Plan& many) {
  if (Plan fused; plan_short_rows(p, fused)) return false;
  const double seconds = many_rows_seconds(p, many);
  if (is_tiled(p)) return seconds < TILED_SECONDS + 4.0 * p.n * p.m * p.d / TILED_RATE;
  Plan bulk;
  return !plan_bulk(p, bulk) || seconds < bulk_seconds(p, bulk);
}

// Whether the kernel for small sets, by its plan, is to have one. Pools of fewer than 2,048 references took
// register tiles or groups of warps (H100, 4,096 elements): 256 rows beside 256, 512 and 1,024 references
// 810, 883 and 964 us, for 34, 49 and 81; 64 rows beside 256 and 1,024 67 and 152, for 27 and 43; 16 rows
// beside 256 40, for 27. Of more, the kernel for many rows takes what is below, about: 256 rows beside 2,048
// 148 us, for 139; beside 4,096 of 256 elements 77. Banks: ten classes of 256, 64, 256 and 512 rows 42, 69
// and 204 us, for 39, 54 and 72.
constexpr int64_t SMALL_SET_ROWS = 16;
constexpr double SMALL_MANY_SECONDS = 75e-6, SMALL_MANY_ELEMENT_SECONDS = 13.4e-9,
                 SMALL_MANY_PRODUCT_SECONDS = 8.4e-15;

double small_many_seconds(const Problem& p) {
  const double products = static_cast<double>(ceil_div(p.n, 64) * 64 * p.references() * p.d);
  return SMALL_MANY_SECONDS + SMALL_MANY_ELEMENT_SECONDS * static_cast<double>(p.d) +
         SMALL_MANY_PRODUCT_SECONDS * products;
}

bool is_small_set(const Problem& p, const Plan& held) {
  Plan other;
  const double seconds = held_seconds(p, held);
  if (plan_many_rows(p, other) && small_many_seconds(p) <= seconds) return false;
  if (!p.has_labels) return p.n >= SMALL_SET_ROWS;
  return !plan_bulk(p, other) || seconds < bulk_seconds(p, other);
}

// Whether the kernel for larger small sets, by its plan, is to have one: from so many references and values
// on. Its time is reckoned, within a seventh of what 64 rows beside 1,024 references of 65,536 take, so it
// has to be well below the kernel for many rows.
constexpr int64_t SWEPT_LEAST_REFS = 64, SWEPT_LEAST_VALUES = int64_t{1} << 22;
constexpr double SWEPT_SHARE = 0.6;

bool is_larger_set(const Problem& p, const Plan& swept) {
  if (p.n < SMALL_SET_ROWS || p.m < SWEPT_LEAST_REFS || p.m * p.d < SWEPT_LEAST_VALUES) return false;
  Plan other;
  const double seconds = swept_seconds(p, swept);
  if (plan_many_rows(p, other) && SWEPT_SHARE * small_many_seconds(p) <= seconds) return false;
  return p.n >= TILED_ROWS || !plan_bulk(p, other) || seconds < bulk_seconds(p, other);
}

bool plan_stream(const Problem& p, Plan& plan) {
  for (const StreamTile& tile : STREAM_TILES) {
    const bool plain = !p.aligned || p.refs_size == 8;
    if (tile.refs_size != (plain ? 0 : p.refs_size)) continue;
    const int64_t tile_d = int64_t{8} * tile.threads * tile.vectors;
    const int64_t stage = tile.tile_refs * p.d * (plain ? 4 : p.refs_size);
    if (p.d > tile_d || STREAM_FIXED_SMEM + 2 * stage > p.smem_limit) continue;
    const int64_t most = plain ? 2 : MAX_STAGES;
    plan.kernel = "stream";
    plan.threads = tile.threads;
    plan.tile_refs = tile.tile_refs;
    plan.tile_d = tile_d;
    plan.aligned = !plain;
    plan.stages =
        static_cast<int>(std::min(most, (p.smem_limit - STREAM_FIXED_SMEM) / std::max<int64_t>(stage, 1)));
    const int64_t third =
        STREAM_FIXED_SMEM + 3 * stage;  // a fourth stage only where it costs no resident block
    if (plan.stages > 3 && p.smem_limit / (third + stage) < p.smem_limit / third) plan.stages = 3;
    plan.smem_bytes = STREAM_FIXED_SMEM + plan.stages * stage;
    const int64_t resident =
        std::clamp<int64_t>(p.smem_limit / (plan.smem_bytes + 1024), 1, 512 / tile.threads);
    const int64_t units = p.n * std::max<int64_t>(1, p.groups() * ceil_div(p.m, tile.tile_refs));
    plan.blocks = std::max<int64_t>(1, std::min(resident * p.sm_count, units));
    plan.splits = plan.blocks;
    plan.rows_per_pass = p.n;
    plan.refs_per_pass = p.references();
    plan.workspace_bytes = list_bytes(p) + plan.blocks * (20 * p.d + 64);
    plan.reason = tile.reason;
    return true;
  }
  return false;
}

void plan_two_pass(const Problem& p, Plan& plan, const std::string& reason) {
  const int64_t work = p.x_size == 8 || p.refs_size == 8 || p.d <= EXACT_D ? 8 : 4;
  const int64_t tiles = std::max<int64_t>(1, p.groups() * ceil_div(p.m, TWO_PASS_TILE_REFS));
  plan.kernel = "two_pass";
  plan.aligned = p.aligned;
  plan.wide = p.x_size == 8 || p.refs_size == 8 || p.d <= EXACT_D;
  plan.threads = 128;
  plan.tile_refs = TWO_PASS_TILE_REFS;
  plan.tile_d = 8 * plan.threads;
  // Parts of D per score: enough blocks to fill the device, none shorter than one step of a block.
  const int64_t seen = std::max<int64_t>(1, p.n * ceil_div(p.m, TWO_PASS_TILE_REFS));
  const int64_t wanted = ceil_div(int64_t{8} * p.sm_count, seen);
  plan.splits =
      std::clamp<int64_t>(std::min<int64_t>(wanted, 64), 1, std::max<int64_t>(1, ceil_div(p.d, plan.tile_d)));
  const int64_t score_bytes = (tiles * TWO_PASS_TILE_REFS + 1) * plan.splits * work;
  const int64_t rows = std::min(SCORES_LIMIT / score_bytes, VECTORS_LIMIT / std::max<int64_t>(1, p.d * work));
  plan.rows_per_pass = std::clamp<int64_t>(rows, 1, std::max<int64_t>(1, p.n));
  plan.refs_per_pass = p.references();
  plan.blocks = int64_t{16} * p.sm_count;
  plan.workspace_bytes =
      list_bytes(p) + plan.rows_per_pass * (score_bytes + p.d * work + 8 * plan.splits + 64);
  plan.reason = reason;
}

void plan_tiled(const Problem& p, Plan& plan) {
  plan.kernel = "tiled";
  plan.threads = 256;
  plan.tile_rows = 64;
  plan.tile_refs = 64;
  plan.tile_d = 16;
  // Few rows: more references per round, so that the scores have blocks enough.
  const int64_t most = p.n <= 1024 ? 4096 : 2048;
  plan.refs_per_pass = std::min<int64_t>(most, ceil_div(std::max<int64_t>(p.m, 1), 64) * 64);
  const int64_t rows = std::min(VECTORS_LIMIT / (8 * p.d), SCORES_LIMIT / (4 * plan.refs_per_pass));
  plan.rows_per_pass = std::clamp<int64_t>(rows / 64 * 64, 64, ceil_div(p.n, 64) * 64);
  plan.splits = ceil_div(std::max<int64_t>(p.m, 1), plan.refs_per_pass);
  plan.blocks = (plan.rows_per_pass / 64) * ceil_div(plan.refs_per_pass, 64);
  plan.smem_bytes = 2 * 16 * (plan.tile_rows + 4) * 4;
  plan.workspace_bytes = list_bytes(p) + plan.rows_per_pass * (8 * p.d + 4 * plan.refs_per_pass + 64) +
                         4 * (p.d + plan.refs_per_pass);
  plan.reason =
      "one pool, many rows: register tiles of rows x references, scores of a few thousand references at a "
      "time";
}

// Forms of the kernel for 9 <= D <= 16: blocks of `warps`, each with 32 rows and as many references in shared
// memory as it has threads, `blocks` of them on a multiprocessor.
struct SmallTile {
  int d, warps, blocks;
};
constexpr SmallTile SMALL_TILES[] = {
    {10, 16, 1}, {10, 4, 3}, {12, 16, 1}, {12, 4, 3}, {14, 12, 1}, {14, 4, 2}, {16, 8, 1}, {16, 4, 2},
};
constexpr int64_t SMALLEST_SPLIT = 64;   // fewer cost more in the merge than they gain
constexpr int64_t SMALL_PASS = 1 << 16;  // rows of a round: more than fill any device
constexpr int64_t SMALL_WAVES = 16;
// What a part costs beside its references, and a tile of them beside its scores and sums, in references.
constexpr int64_t SMALL_PART_COST = 150, SMALL_TILE_COST = 48;

// As many parts as whole waves of blocks hold, in the form and the number of waves that take the least time.
// Measured on an H100: 10,000 x 100,000 x 10 with 16 warps 0.99 ms, 12 warps 1.05, 4 warps 1.16; 64 x 100,000
// x 10 with 4 warps 58 us, 16 warps 78.
void plan_small_float(const Problem& p, Plan& plan) {
  const int64_t d = p.d <= 10 ? 10 : ceil_div(p.d, 2) * 2;
  plan.kernel = "small";
  plan.tile_d = d;
  plan.early_merge = p.cc >= 90;
  plan.rows_per_pass = std::clamp<int64_t>(p.n, 1, SMALL_PASS);
  const int64_t partial = 4 * (d + 2) * plan.rows_per_pass;
  const int64_t most = std::max<int64_t>(1, SCORES_LIMIT / partial);
  double least = INFINITY;
  for (const SmallTile& tile : SMALL_TILES) {
    const int64_t smem = small_smem(d, tile.warps), at_once = tile.blocks * p.sm_count;
    if (tile.d != d || smem > p.smem_limit) continue;
    const int64_t rows = 32 * tile.warps, row_blocks = ceil_div(plan.rows_per_pass, rows);
    for (int64_t waves = 1; waves <= SMALL_WAVES; ++waves) {
      const int64_t parts = std::clamp<int64_t>(waves * at_once / row_blocks, 1, most);
      const int64_t refs = std::max(ceil_div(ceil_div(p.m, parts), 16) * 16, SMALLEST_SPLIT);
      const int64_t splits = std::max<int64_t>(1, ceil_div(p.m, refs)), blocks = row_blocks * splits;
      const int64_t each = std::min<int64_t>(tile.blocks, ceil_div(blocks, p.sm_count));
      const double time = static_cast<double>(ceil_div(blocks, at_once) * each * tile.warps) *
                          (refs + SMALL_PART_COST + static_cast<double>(refs) / rows * SMALL_TILE_COST);
      if (time >= least) continue;
      least = time;
      plan.threads = plan.tile_rows = plan.tile_refs = static_cast<int>(rows);
      plan.splits = splits, plan.refs_per_pass = splits * refs;
      plan.blocks = blocks;
      plan.smem_bytes = smem;
    }
  }
  plan.workspace_bytes = plan.splits * partial + 256;
  plan.reason = "one pool, 9 <= D <= 16: products of small matrices by tensor cores, from parts of a float32";
}

void plan_small(const Problem& p, Plan& plan) {
  if (p.d > EXACT_D && p.d <= 16) return plan_small_float(p, plan);
  plan.kernel = "small";
  plan.threads = 128;
  plan.wide = p.d <= EXACT_D;
  plan.tile_rows = 128;
  plan.tile_refs = 64;
  plan.tile_d = p.d <= 4 ? 4 : p.d <= 8 ? 8 : 32;
  const int64_t row_blocks = ceil_div(p.n, plan.tile_rows);
  const int64_t wanted = ceil_div(int64_t{8} * p.sm_count, row_blocks);
  const int64_t partial = 8 * (plan.tile_d + 2);
  const int64_t most = std::max<int64_t>(1, SCORES_LIMIT / (std::max<int64_t>(p.n, 1) * partial));
  plan.splits =
      std::clamp<int64_t>(std::min(wanted, most), 1, std::max<int64_t>(1, ceil_div(p.m, plan.tile_refs)));
  plan.blocks = row_blocks * plan.splits;
  plan.rows_per_pass =
      std::clamp<int64_t>(SCORES_LIMIT / (partial * plan.splits), 1, std::max<int64_t>(p.n, 1));
  plan.refs_per_pass = p.m;
  plan.smem_bytes = plan.tile_refs * (plan.tile_d + 1) * (plan.wide ? 8 : 4);
  plan.workspace_bytes =
      list_bytes(p) + plan.rows_per_pass * (plan.splits * partial + 8 * plan.tile_d) + 4 * plan.tile_d;
  plan.reason = "one pool, D <= 32: rows per thread, references broadcast from shared memory";
}

// The kernel that SVEL_KERNEL names, where it can serve: for tests, and to compare it with another.
bool plan_wanted(const Problem& p, Plan& plan) {
  const char* const name = std::getenv("SVEL_KERNEL");
  if (name == nullptr || *name == 0) return false;
  const std::pair<const char*, bool (*)(const Problem&, Plan&)> kernels[] = {
      {"held", plan_held},
      {"pool", plan_pool},
      {"swept", plan_swept},
      {"many_rows", plan_many_rows},
      {"short_rows", plan_short_rows},
      {"bulk", plan_bulk},
      {"stream", plan_stream},
  };
  std::string names;
  for (const auto& [kernel, plan_kernel] : kernels) {
    if (std::string(kernel) == name) return plan_kernel(p, plan);
    names += (names.empty() ? "" : ", ") + std::string(kernel);
  }
  throw std::invalid_argument("SVEL_KERNEL: expected one of " + names + ", got '" + name + "'");
}

}  // namespace

Plan make_plan(const Problem& p) {
  if (std::min({p.n, p.k, p.m, p.d}) < 0)
    throw std::invalid_argument("plan: expected sizes that are not negative");
  if (p.precision != "exact" && p.precision != "fast") {
    throw std::invalid_argument("plan: precision: expected 'exact' or 'fast', got '" + p.precision + "'");
  }
  Plan plan;
  if (p.d > 0 && (p.x_size == 8 || p.refs_size == 8)) {
    plan_two_pass(p, plan, "float64: scores, softmax and weighted sum in double");
  } else if (Plan wanted; plan_wanted(p, wanted)) {
    plan = wanted;
  } else if (Plan held; plan_held(p, held) && is_small_set(p, held)) {
    plan = held;
  } else if (plan_pool(p, plan)) {  // few rows beside a large pool: nothing else comes near
  } else if (Plan swept; plan_swept(p, swept) && is_larger_set(p, swept)) {
    plan = swept;
  } else if (Plan many; plan_many_rows(p, many) && (p.has_labels       ? has_few_classes(p, many)
                                                    : p.refs_size == 4 ? has_float_pool(p, many)
                                                                       : true)) {
    plan = many;
  } else if (plan_short_rows(p, plan)) {  // scores of short samples never reach memory
  } else if (!p.has_labels && p.d > 0 && p.d <= SMALL_D && (p.n >= SMALL_ROWS || p.d <= EXACT_D)) {
    plan_small(p, plan);
  } else if (is_tiled(p)) {
    plan_tiled(p, plan);
  } else if (p.d > 0 && p.d <= EXACT_D) {
    plan_two_pass(p, plan, "D <= 8: rounding does not average out, so all in float64");
  } else if (!plan_bulk(p, plan) && !plan_stream(p, plan)) {
    plan_two_pass(p, plan, "D above what one block holds: scores first, then the weighted sum");
  }
  const int64_t read = std::min(p.groups(), std::max<int64_t>(p.n, 1)) * p.m * p.d * p.refs_size;
  plan.bytes = read * (plan.kernel == "two_pass" ? 2 : 1) + p.n * p.d * p.x_size * (p.has_source ? 3 : 2);
  plan.flops = 4 * p.n * p.m * p.d;
  return plan;
}

}  // namespace svel
