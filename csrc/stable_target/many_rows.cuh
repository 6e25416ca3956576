// One shared pool of references and many rows, on Hopper's matrix units: of 16 bits, or float32, see below.
// With c a centre of the references, d_j = r_j - c and y = x - alpha c, a row's scores are
//   s_j = y.d_j - alpha/2 (|d_j|^2 - norm0),
// its weights p = softmax_j(rate s_j), its mean c + sum_j p_j d_j.
// Rows go in passes, in the order of falling time; the references of a pass in rounds whose scores fit the
// workspace. One round:
//
//  * score: y_hi.d for all pairs; y_hi is y rounded to 11 bits, so that each score is known to a proven
//    bound. Rows expected to be dense ("early") get y_lo.d too, y = y_hi + y_lo to 22 bits
//  * select: rows where at most MANY_SURVIVORS references can still matter keep a list of those
//  * place: the other rows are dense, and rows of long lists where they fill the last tile up
//  * where dense rows were not expected: gather: they come together in the first places, where most of them
//    are already; score: adds y_lo.d
//  * weights, dense rows: p_j to 22 bits, as two halves, in those places
//  * sum, dense rows: sum_j p_j d_j
//  * merge: references of lists are scored and summed, while sums are under way where these leave
//    multiprocessors. Of dense rows whose scores are large for their digits, those of most weight make a list
//    too, of what they weigh beyond what they do in the sums. Dense rows add what the thread blocks of the
//    last step left; after the last round, writes the output
//
// Exact arithmetic: references are exact in halves, and so is d_j for a c of few digits wherever r_j is near
// c; where it is not, the remainder is multiplied too. The matrix units truncate what they add up, so at most
// 64 products are summed before they join ordinary float32 sums; y_lo.d, which is small, they add up to the
// end, as they do all sums where results need not be exact.
//
// Float32 references are not operands. Before a round those of the round become two halves each, of 22 bits,
// r_j - c = d_hi + d_lo, in the workspace: d_hi in the first d_stride elements of a row, d_lo in as many
// more. All products are the same kernels' as of float16 without a centre. Scores are of y_hi.d_hi, with a
// bound that has the largest share that d_hi leaves out of any; those of dense rows get y_lo.d_hi +
// y_hi.d_lo, one product of twice the length, for which y has both halves too, in the other order; sums are
// of twice as many elements, and are put together in merge. No row is expected to be dense. Lists are scored
// and summed from the references as stored.
//
// Halves of float32 and bfloat16 references reach from 2^-24 to 2^16, beside a scale and a centre from
// samples that are not much larger than the others. References that are too large or too small for that, the
// far ones, are summed as stored, too, by sum_far, as if they had come in a round before: what follows
// sees none of them.
//
// A bank of few classes is a pool of all their references, those that are not valid too, of which a row has a
// range, or all: scores of others are -INFINITY, so that they come in no list and weigh nothing. What holds
// references that are not valid, or not finite, may hold NaN: sums take zeros in their place (`operands`).
// More rows than a tile holds go to tiles in the order of their classes, where they are in that of their
// time; what no row of a tile has is not multiplied: no scores are stored there, and of a row's scores none
// are read but those of its range, in whole groups. The first rows of each tile are early, and dense ones
// come in the first places of their tile.
#pragma once

#include <climits>

#include "common/hopper.cuh"
#include "common/planner_rows.h"
#include "stable_target/launch.cuh"

namespace svel::cuda {

struct ManyFacts {
  float scale, inverse_scale;  // d is multiplied by scale, a power of two, before it becomes a half
  float mean_norm;             // norm0 scale^2: of those that the centre is from, or zero
  int centred;                 // c is not zero everywhere
  int plain;                   // references as stored are operands: float16 and not centred
  int max_norm;                // the bits of max_j |d_j|^2 scale^2, a float32
  int dense;                   // rows that are dense in this round,
  int late;                    // of which so many lack y_lo.d
  int early;  // rows of the pass until the last expected to be dense, see early_end; of classes: below
  int splits, narrow_splits;  // of the sums, see ManySums
  // Of float32 references: the bits of the most that first halves leave out of any, scale |d_j - d_hi|, so
  // far; of its share of the largest norm in the rows' bounds; blocks of halves_kernel that are through.
  int max_rest, known_rest, halved;
  int far;           // whether halves do not hold some references, so far, see holds
  float least_norm;  // of float32 references that halves hold
  float most_norm;   // of those that are scaled and uneven, see holds
};

// Whether halves hold references of this norm: others are far. 32 times what is usual, as a length, would
// leave all rows in doubt, of infinity there are no halves; and of elements of 2^-5, root of their mean
// square, the smallest half leaves out 5e-7. `least` is that, or zero where a centre hides it.
constexpr float FAR_FACTOR = 1024, LEAST_SQUARE = 1.0f / 1024;
__device__ inline bool holds(const ManyFacts& facts, float norm, float least, bool is_zero) {
  return norm <= fmaxf(FAR_FACTOR * facts.mean_norm, facts.most_norm) && (norm >= least || is_zero);
}
// `least` of references of d elements. Where the usual ones nearly vanish beside their largest elements it is
// a 64th of their norm: they have the digits that they have. mean_norm: zero where sizes differ.
__device__ inline float least_held(int64_t d, float mean_norm) {
  const float least = LEAST_SQUARE * static_cast<float>(d);
  return mean_norm > 0 ? fminf(least, mean_norm / 64) : least;
}

struct ManySlot {  // one row of a pass
  Row row;
  double y_square;
  double best;   // largest score so far: -INFINITY before any
  double total;  // sum of exp(rate (s_j - best)) so far; between list and sums of a dense row, of either sign
  float own;     // bound of |(y_hi - y).d_j| / |d_j|, with the rounding of the sums,
  float summed;  // and of this alone; of float32 references |y|
  float rate2;   // rate log2(e)
  float top;     // what weights are relative to: the largest score up to this round, as they have it
  int alive;
};

struct alignas(16) ManyFactor {  // s = unit acc - half_alpha (norm - mean_norm)
  float unit, half_alpha;
  float low_centre;  // unit y_lo.c 2^e
};

// Of the dense rows of a bank of classes in a round, by row tiles of the pass: how many there are, in the
// first places of the tile; the steps of the sums, [x, y), that they meet; parts of these, and of tiles
// before.
struct ManyClassSums {
  int dense[MANY_ROW_TILES];
  int2 steps[MANY_ROW_TILES];
  int splits[MANY_ROW_TILES], parts_before[MANY_ROW_TILES];
};
struct ManyClasses {
  int ends[MANY_CLASSES];  // of the valid references of each
  ManyClassSums sums;
  int early[MANY_ROW_TILES];  // by row tiles of the pass: rows until the last expected to be dense,
  int late[MANY_ROW_TILES];   // dense rows that lack y_lo.d
};
static_assert(sizeof(ManyClasses) == MANY_CLASSES_BYTES);

struct Many {
  int* order;           // (n,) rows by falling time, or by class; none: one pass has them all, by time
  float* centre;        // (2, d_stride) candidates, see centre_kernel
  float* centre_float;  // (d_stride,) c scale
  __half* centre_half;  // (d_stride,) c
  double* statistics;   // (d_tiles, 8)
  float* distances;     // (d_tiles, MANY_PAIRS) squared, of pairs of references; where exact
  ManyFacts* facts;     // one
  ManySlot* slots;      // (rows,)
  ManyFactor* factors;  // (rows,)
  __half *hi, *lo;      // (rows, d_stride) y 2^e; of float32 references one array, (rows, [lo, hi])
  float* norms;         // (m,) |d_j|^2 scale^2 - mean_norm; none: formed beside the scores
  float* scores;        // (rows, score_stride): scores, then weights; from gather on of dense rows, as below
  float* maxima;        // (rows, score_stride / MANY_GROUP), likewise
  int* dense_slots;     // (rows,) of the dense rows
  ManyFactor* dense_factors;
  __half* dense_lo;
  int* survivors;        // (rows, MANY_SURVIVORS)
  int* counts;           // (rows,) of them; more than the list holds: all that may matter
  int* fills;            // (rows,) the same, 0 for lists that must stay ones
  int* review_most;      // (rows,) references at most that the list of a dense row has; 0: it has no list
  int* listed;           // (rows,) whether a dense row's list is in its sums
  int* list_order;       // (rows,) slots in the order in which lists are merged: long ones first
  int* places;           // (rows,) among the dense rows; -1: not dense
  double* totals;        // (rows, WEIGHT_UNITS) of the weights of dense rows in this round
  float* sums;           // (rows, d_stride) sum of p_j d_j scale, where has_sums
  float* partial;        // (splits, row tiles, d tiles, MANY_ROWS, MANY_TILE)
  int64_t first_row;     // of the pass
  int64_t first_ref;     // of the round,
  int64_t map_ref;       // and in the map of tensor copies, which of float32 is of the round alone
  int64_t rows, padded;  // rows of the pass; rounded up to 64
  int64_t refs;          // of the round, valid or not
  int64_t score_stride, d_stride;
  int blocks;
  bool exact;  // else: y_hi and upper halves of the weights alone
  // Of a bank of more than one class, whose references are counted through all of them; else zero.
  int class_refs;        // references of a class, valid or not
  ManyClasses* classes;  // one
  int2* ranges;          // (rows,) [x, y) of which a row's references are the valid ones; also of one class
  uint16_t* operands;    // (refs / 16,) of the round: a bit for each that is valid, finite and not far
};

// The same bits; of a pool of bfloat16, where sums do not ask, from scores to sum_far.
template <bool CLASSES>
__device__ inline uint16_t* operand_bits(const Many& many) {
  return CLASSES ? many.operands : reinterpret_cast<uint16_t*>(many.partial);
}

// A bank of classes as one pool, for all that does not ask which rows have which references.
inline Inputs as_pool(const Inputs& in) {
  Inputs pool = in;
  if (in.k > 1) pool.m = in.k * in.m, pool.k = 1, pool.counts = nullptr;
  pool.labels = nullptr;
  return pool;
}

// Of the map of tensor copies.
inline int64_t many_map_rows(const Inputs& pool, const Many& many) {
  return pool.m - many.first_ref + many.map_ref;
}

__device__ inline int64_t many_valid(const Inputs& in, const Many& many) {  // references of the round
  const int64_t left = valid_count(in, 0) - many.first_ref;
  return left < 0 ? 0 : left > many.refs ? many.refs : left;
}

// References per step of the sums: with both halves of their weights they fill the 64 halves of a step.
__host__ __device__ constexpr int many_sum_refs(bool exact) {
  return exact ? 32 : 64;
}
__device__ inline int many_sum_steps(const Many& many, int64_t valid) {
  const int refs = many_sum_refs(many.exact);
  return static_cast<int>((valid + refs - 1) / refs);
}

// Of a row's references those of the round, [x, y): none if x >= y.
__device__ inline int2 range_in_round(const Many& many, int64_t at, int64_t valid) {
  const int2 range = many.ranges[at];
  const int first = static_cast<int>(many.first_ref);
  return {max(range.x - first, 0), min(range.y - first, static_cast<int>(valid))};
}

// Groups of references [first, end) of which a row may have some: its scores of others are not read.
struct RowGroups {
  int64_t first, end;
};
template <bool CLASSES>
__device__ inline RowGroups groups_of(const Many& many, int64_t at, int64_t valid) {
  if constexpr (CLASSES) {
    const int2 own = range_in_round(many, at, valid);
    if (own.x >= own.y) return {0, 0};
    return {own.x / static_cast<int>(MANY_GROUP), ceil_div(own.y, static_cast<int>(MANY_GROUP))};
  }
  return {0, (valid + MANY_GROUP - 1) / MANY_GROUP};
}

// The place of dense row `number`.
template <bool CLASSES>
__device__ inline int dense_place(const Many& many, int number) {
  if constexpr (CLASSES) {
    int place = 0;
#pragma unroll
    for (int tile = 0; tile < static_cast<int>(MANY_ROW_TILES); ++tile) {
      const int dense = many.classes->sums.dense[tile];
      if (number >= 0 && number < dense) place = tile * static_cast<int>(MANY_ROWS) + number;
      number -= dense;
    }
    return place;
  }
  return number;
}

// The first step of part `split` of `splits`. Scores of a round fit the workspace: no product comes near
// 2^31.
__device__ inline int many_part_begin(int steps, int split, int splits) {
  return steps * split / splits;
}

// How the sums of `tiles` tiles over `steps` steps each are cut, for `blocks` thread blocks: into as many
// parts as fill whole waves of them best, fewer where it makes no difference. By all lanes of a warp.
constexpr float PART_STEPS = 0.2f;  // what merging a part of a pair of tiles takes, in steps
__device__ inline int many_splits(int tiles, int steps, int blocks, int most) {
  const auto time_of = [&](int splits) {
    const int waves = (tiles * splits + blocks - 1) / blocks;
    return waves * ((steps + splits - 1) / splits + 4.0f) + PART_STEPS * tiles * splits;
  };
  const int end = min(most / tiles, (steps + 15) / 16), first = 1 + static_cast<int>(threadIdx.x) % 32;
  float least = INFINITY;
#pragma unroll 1
  for (int splits = first; splits <= end; splits += 32) least = fminf(least, time_of(splits));
  least = __uint_as_float(__reduce_min_sync(0xffffffffu, __float_as_uint(least)));
  int best = INT_MAX;
#pragma unroll 1
  for (int splits = first; splits <= end && best == INT_MAX; splits += 32)
    if (0.98f * time_of(splits) <= least) best = splits;
  best = __reduce_min_sync(0xffffffffu, best);
  return best == INT_MAX ? 1 : best;
}

// Rows of the tile that `left` rows need, of at most MANY_ROWS; and those of all tiles for `rows`.
__device__ inline int row_tile_width(int64_t left) {
  return left <= 64 ? 64 : left <= 128 ? 128 : 256;
}
__device__ inline int64_t row_tile_ends(int64_t rows) {
  const int64_t left = rows % MANY_ROWS;
  return rows - left + (left > 0 ? row_tile_width(left) : 0);
}

// Whether the tiles of rows are in the order of their classes; else all rows are one tile.
__device__ inline bool ordered_by_class(const Many& many) {
  return many.class_refs > 0 && many.order;
}

// Where the rows end whose scores have y_lo.d from the start: the first rows of a pass, those expected to be
// dense, as many as fill tiles. Where a pass has more than one tile and not all are expected, none: the dense
// rows of a mixture would nearly all pass through the product for late rows too, in whose tiles they are.
// CLASSES: the first rows of the tile of row `at`, since only tiles that have late rows have that product.
constexpr int EARLY_BESIDE = 128;  // so many at most have both halves in a tile of MANY_ROWS
template <bool CLASSES>
__device__ inline int early_end(const Many& many, const ManyFacts& facts, int64_t at) {
  const int tile = CLASSES ? static_cast<int>(at / MANY_ROWS) : 0, first = tile * static_cast<int>(MANY_ROWS);
  const int rows = CLASSES ? min(static_cast<int>(many.padded) - first, static_cast<int>(MANY_ROWS))
                           : static_cast<int>(many.padded),
            early = !many.exact ? 0
                    : CLASSES   ? many.classes->early[tile]
                                : facts.early;
  if (early == 0 || (!CLASSES && many.rows > MANY_ROWS && early < many.rows)) return first;
  if (facts.plain && rows > EARLY_BESIDE && early > 64 && early <= 96) return first + (early <= 80 ? 80 : 96);
  const int each = early > 64 || (rows > 64 && rows <= 128) ? 128 : 64;
  return first + min((early + each - 1) / each * each, rows);
}

// How many dense rows lack y_lo.d, of all or of the tile of this place. Where some do, the scores of those
// beside them have moved to their places too.
template <bool CLASSES>
__device__ inline int late_rows(const Many& many, int64_t place) {
  if constexpr (CLASSES) return many.classes->late[place / MANY_ROWS];
  return many.facts->late;
}

// Row tiles of the scores: where many rows are early, theirs have both halves of up to 128 rows; then those
// of MANY_ROWS, or nearly, and a narrow one where few rows are left.
struct ScoreTiles {
  int rows, early, both, full, narrow;

  __device__ explicit ScoreTiles(int rows_, int early_) : rows(rows_), early(early_) {
    both = early > EARLY_BESIDE ? (early + 127) / 128 : 0;
    const int rest = max(rows - 128 * both, 0), left = rest % static_cast<int>(MANY_ROWS);
    full = rest / static_cast<int>(MANY_ROWS) + (left > MANY_ROWS / 2);
    narrow = left > 0 && left <= MANY_ROWS / 2;
  }
  __device__ int all() const { return both + full + narrow; }
  // Unit `unit` of all `each` units of every tile: those of the narrow one come last.
  __device__ int tile(int unit, int each) const {
    return unit < (both + full) * each ? unit % (both + full) : both + full;
  }
  __device__ int within(int unit, int each) const {
    return unit < (both + full) * each ? unit / (both + full) : unit - (both + full) * each;
  }
  __device__ int row0(int tile) const {
    return tile < both ? 128 * tile : 128 * both + static_cast<int>(MANY_ROWS) * (tile - both);
  }
  __device__ int width(int tile) const {
    const int most = row_tile_width(rows - row0(tile));
    return tile < both ? min(most, 128) : most;
  }
  __device__ int low(int tile) const {  // rows with y_lo too
    return tile < both ? width(tile) : both == 0 && tile == 0 ? early : 0;
  }
  // Whether a stage has to hold more than MANY_ROWS halves of rows.
  __device__ bool deep() const { return both == 0 && early > 0 && width(0) + early > MANY_ROWS; }
};

// Row tiles: those of MANY_ROWS, or nearly, and a narrow one where few rows are left.
struct ManyTiles {
  int full, narrow;

  __device__ explicit ManyTiles(int64_t rows) {
    const int left = static_cast<int>(rows % MANY_ROWS);
    full = static_cast<int>(rows / MANY_ROWS) + (left > MANY_ROWS / 2);
    narrow = left > 0 && left <= MANY_ROWS / 2;
  }
};

// The sums of the dense rows, by clusters of two blocks: of a full row tile each block has one tile of D, of
// the narrow one two, so that more comes from each reference at a time. Units of a cluster's tiles of D,
// `splits` parts of the references for each of a full row tile, `narrow_splits` for the narrow one. Parts of
// sums: by split, row tile, tile of D.
struct ManySums {
  ManyTiles rows;
  int d_tiles, pairs, fours, splits, narrow_splits;

  // parts: of D, one after the other, each as long as d_stride.
  __device__ explicit ManySums(const Many& many, int parts = 1)
      : rows(many.facts->dense),
        d_tiles(static_cast<int>(parts * many.d_stride / MANY_TILE)),
        pairs((d_tiles + 1) / 2),
        fours((d_tiles + 3) / 4),
        splits(many.facts->splits),
        narrow_splits(many.facts->narrow_splits) {}
  // `splits` and `narrow_splits` for so many row tiles, by all lanes of a warp. A narrow one alone leaves a
  // few multiprocessors to merge_kernel's lists: it is bound by memory.
  static constexpr int LEFT = 2;  // clusters
  __device__ static int2 choose(const Many& many, int full, int narrow, int steps) {
    const int clusters = many.blocks / 2 - (full ? 0 : LEFT);
    const int d_tiles = static_cast<int>(many.d_stride / MANY_TILE), fours = (d_tiles + 3) / 4;
    int splits[2], left = static_cast<int>(MANY_SEGMENTS);  // tiles
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int units = k ? narrow * fours : full * ((d_tiles + 1) / 2), each = k ? 4 : 2;
      const int most = (left - (k ? 0 : 4 * narrow * fours)) / each;
      splits[k] = units ? many_splits(units, steps, clusters, most) : 0;
      left -= splits[k] * units * each;
    }
    return {splits[0], splits[1]};
  }
  __device__ int splits_of(int row_tile) const { return row_tile < rows.full ? splits : narrow_splits; }
  __device__ int index(int row_tile, int split, int d_tile) const {
    const int row = row_tile < rows.full ? split * rows.full + row_tile : splits * rows.full + split;
    return row * d_tiles + d_tile;
  }
  __device__ int split_stride(int row_tile) const { return (row_tile < rows.full ? rows.full : 1) * d_tiles; }
};

// As ManySums, of a bank of classes.
struct ManyClassParts {
  const ManyClassSums& sums;
  int d_tiles;

  __device__ explicit ManyClassParts(const Many& many, int parts = 1)
      : sums(many.classes->sums), d_tiles(static_cast<int>(parts * many.d_stride / MANY_TILE)) {}
  __device__ int splits_of(int row_tile) const { return sums.splits[row_tile]; }
  __device__ int index(int row_tile, int split, int d_tile) const {
    return (sums.parts_before[row_tile] + split) * d_tiles + d_tile;
  }
  __device__ int split_stride(int) const { return d_tiles; }
};

// The same by row tiles of classes: parts of as many steps. By all lanes of a warp.
__device__ inline void choose_class_sums(const Many& many, ManyClassSums& sums) {
  constexpr int TILES = static_cast<int>(MANY_ROW_TILES);
  const int d_tiles = static_cast<int>(many.d_stride / MANY_TILE);
  int steps[TILES], across[TILES], most_steps = 0, full = 0;
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    const int dense = sums.dense[tile];
    const bool is_full = dense > static_cast<int>(MANY_ROWS) / 2;
    steps[tile] = dense ? sums.steps[tile].y - sums.steps[tile].x : 0;
    across[tile] = is_full ? (d_tiles + 1) / 2 : (d_tiles + 3) / 4;
    most_steps = max(most_steps, steps[tile]), full += is_full;
  }
  const int clusters = many.blocks / 2 - (full ? 0 : ManySums::LEFT);
  const auto length = [&](int cuts) { return max(1, (most_steps + cuts - 1) / cuts); };
  const auto time_of = [&](int cuts) {
    const int each = length(cuts);
    int units = 0, parts = 0;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      const int own = (steps[tile] + each - 1) / each;
      units += own * across[tile], parts += own;
    }
    if (cuts > 1 && parts * d_tiles > static_cast<int>(MANY_SEGMENTS)) return INFINITY;
    const int waves = (units + clusters - 1) / clusters;
    return waves * (each + 4.0f) + PART_STEPS * units;
  };
  const int end = max(1, (most_steps + 15) / 16), first = 1 + static_cast<int>(threadIdx.x) % 32;
  float least = INFINITY;
#pragma unroll 1
  for (int cuts = first; cuts <= end; cuts += 32) least = fminf(least, time_of(cuts));
  least = __uint_as_float(__reduce_min_sync(0xffffffffu, __float_as_uint(least)));
  int best = INT_MAX;
#pragma unroll 1
  for (int cuts = first; cuts <= end && best == INT_MAX; cuts += 32)
    if (0.98f * time_of(cuts) <= least) best = cuts;
  const int each = length(__reduce_min_sync(0xffffffffu, best));
  int before = 0;
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    const int own = (steps[tile] + each - 1) / each;
    if (first == 1) sums.splits[tile] = own, sums.parts_before[tile] = before;
    before += own;
  }
}

// At the start of every kernel of a call but the first, which all begin while those before run, where there
// is room, and end in their order. Those that the next launch reads something of before it waits, or
// something that was there before them, let it begin only when they have waited themselves.
__device__ inline void follow_previous() {
  allow_next_launch();
  wait_for_previous_launch();
}

// ref_bytes, row_bytes: from one reference, or y, to the next; 0: they follow one another.
void launch_many_score(const char* op, const Inputs& in, const Many& many, bool low, cudaStream_t stream,
                       int64_t ref_bytes = 0, int64_t row_bytes = 0);
void launch_many_sum(const char* op, const Inputs& in, const Many& many, cudaStream_t stream);

}  // namespace svel::cuda
