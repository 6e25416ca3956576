// The plan of the kernel for many rows (stable_target/many_rows.cuh): many rows, one shared set of float16,
// bfloat16 or float32 references, or few classes of them, on Hopper's matrix units.
#pragma once

#include "common/planner.h"

namespace svel {

constexpr int64_t MANY_TILE = 128;  // references or elements of D per tile
constexpr int64_t MANY_ROWS = 256;  // most rows per tile
constexpr int MANY_THREADS = 384;   // two warpgroups that multiply, one that copies
constexpr int MANY_STAGES = 4;      // steps of 64 deep tiles in flight,
constexpr int64_t MANY_STAGE_BYTES = (MANY_TILE + MANY_ROWS) * 128 + 1024;  // of which the last hold c
constexpr int64_t MANY_EXCHANGE_BYTES =
    2 * (32 * 68 * 4 + MANY_ROWS * 8 + 64 * 4);  // what two warpgroups store by
constexpr int64_t MANY_SMEM_BYTES = MANY_STAGES * MANY_STAGE_BYTES + MANY_EXCHANGE_BYTES + 1024;  // aligned
constexpr int64_t MANY_GROUP = 16;        // references that share one maximum
constexpr int64_t MANY_SURVIVORS = 256;   // references of a row that are scored one by one; more: all of them
constexpr int64_t MANY_SEGMENTS = 400;    // most tiles of partial sums
constexpr int64_t MANY_ROW_BYTES = 240;   // of a row of a pass: its slot, factors, places, totals
constexpr int64_t MANY_SAMPLES = 64;      // references that decide on the centre
constexpr int64_t MANY_PAIRS = 128;       // of them whose distances tell which rows will be dense
constexpr int64_t MANY_PASS_ROWS = 1024;  // most rows of a pass,
constexpr int64_t MANY_WHOLE_ROWS = 512;  // or so many, if it holds their scores of all references
constexpr int64_t MANY_LIST_ROWS = int64_t{1} << 14;  // most rows that are sorted together
// Classes at most that are seen as one pool, of which a row has a part.
constexpr int64_t MANY_CLASSES = 128;
constexpr int64_t MANY_ROW_TILES = MANY_PASS_ROWS / MANY_ROWS;  // of a pass, at most
constexpr int64_t MANY_CLASSES_BYTES = 4 * MANY_CLASSES + 28 * MANY_ROW_TILES;
// Of classes: the ranges of a tile's rows and the ends of its references' classes, for both warpgroups.
constexpr int64_t MANY_CLASSES_SMEM_BYTES = MANY_SMEM_BYTES + 2 * (MANY_ROWS * 8 + 128 * 4);
// From so many rows of a pool on, or as often as these meet a reference of classes, and up to so many
// references, |r_j|^2 are formed once, not in every pass over them.
constexpr int64_t MANY_NORMS_ROWS = 1024, MANY_NORMS_REFS = int64_t{1} << 22;

// The workspace of one call, in bytes, piece by piece; also its order in memory.
struct ManyLayout {
  int64_t order, centre, norms, classes, rows, queries, scores, maxima, survivors, sums, partial, halves;
  int64_t total() const {
    return order + centre + norms + classes + rows + queries + scores + maxima + survivors + sums + partial +
           halves;
  }
};
// refs: of all classes; classes: 0 without labels; is_float: float32, of which halves are made, two of an
// element.
ManyLayout many_layout(int64_t n, int64_t refs, int64_t d, int64_t classes, bool is_float,
                       int64_t rows_per_pass, int64_t refs_per_pass);

// False where this kernel cannot serve; and of a pool, where another serves better.
bool plan_many_rows(const Problem& problem, Plan& plan);

// What it takes by that plan, about: less than another kernel where it is to have a class bank.
double many_rows_seconds(const Problem& problem, const Plan& plan);

}  // namespace svel
