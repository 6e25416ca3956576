// The posterior mean on the CPU, in pieces that one thread runs: what the kernels of posterior_*_isa.cpp take
// and give, and the order in which posterior_cpu.cpp calls them. No torch headers.
//
// For a row x at (alpha, sigma), references r_j, a centre c near them, y = x - alpha c and d_j = r_j - c, the
// logit is
//   -|x - alpha r_j|^2 / (2 sigma^2) + D/2 = offset + (alpha y.d_j - alpha^2 |d_j|^2 / 2) / sigma^2,
// with offset = D/2 - |y|^2 / (2 sigma^2) common to the row and the centre. Everything is centred, so float32
// products lose nothing to a large common mean. A set is taken in blocks of references with a running
// softmax: `top` is the largest logit so far, `sum` = sum_j exp(logit_j - top) and `total` (D values) = sum_j
// exp(logit_j - top) r_j.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/storage.h"

namespace svel {

// Rows that share one set of references: n row numbers into x (N, D), and their coefficients in the same
// order.
struct RowTile {
  Values x;
  int64_t d = 0, n = 0;
  const int64_t* row = nullptr;   // (n,)
  const double* alpha = nullptr;  // (n,)
  const double* sigma = nullptr;  // (n,)
};

// Consecutive references of one group, (count, D), with the group's centre: D floats, then zeros up to
// padded(D).
struct RefBlock {
  Values refs;
  int64_t count = 0;
  const float* centre = nullptr;
};

// The running softmax of each row of a tile.
struct Running {
  double* top;    // (n,), -inf before the first block
  double* sum;    // (n,), 0 before the first block
  double* total;  // (n, D), not read before the first block; nullptr when the only block is finished at once
};

// out = a x + p total + q source, where not NaN.
struct Finish {
  const double *a, *p, *q;  // (n,)
  Values source;
  void* out;  // (N, D)
  Storage out_storage;
};

// Which kernels serve a problem. posterior_f64: float64 rows, and samples of so few numbers that a target can
// be 0 but for its last digits. posterior_small: lanes are references. posterior_wide: lanes are coordinates.
constexpr int64_t F64_D = 2, SMALL_D = 128;
constexpr bool in_float64(Storage x, int64_t d) {
  return x == Storage::f64 || d <= F64_D;
}

constexpr int64_t F64_BLOCK = 1024;  // references at a time
constexpr int64_t f64_scratch_size(int64_t d) {
  return F64_BLOCK * (1 + (d < 8 ? d : 8));
}

// Wide kernels. Tile shapes: measured on Zen 5 (48 KiB L1d, 1 MiB L2 a core); working sets stay within the
// L2.
constexpr int64_t WIDE_ROWS = 126;     // rows of a tile
constexpr int64_t WIDE_BLOCK = 512;    // references whose scores are held at once
constexpr int64_t STREAM_ROWS = 4;     // up to here references are used as read, above unpacked once
constexpr int64_t SCORE_DEPTH = 1024;  // coordinates unpacked at once for scores
constexpr int64_t SCORE_PANEL = 64;    // references unpacked at once for scores
constexpr int64_t SUM_DEPTH = 256;     // coordinates unpacked at once for weighted sums
constexpr int64_t SKEW = 16;           // more floats to a row of scratch: rows fall on different cache sets

constexpr int64_t padded(int64_t d) {
  return (d + 63) / 64 * 64;
}

// Scratch floats of one thread for n rows: y of a chunk, an unpacked panel, and per-group lists of weights.
constexpr int64_t wide_rows_size(int64_t n) {
  return n * (SCORE_DEPTH + SKEW);
}
constexpr int64_t wide_panel_size() {
  return WIDE_BLOCK * (SUM_DEPTH + SKEW);
}
static_assert(SCORE_PANEL * (SCORE_DEPTH + SKEW) <= wide_panel_size());

struct WideScratch {
  float* rows;      // wide_rows_size(n)
  float* panel;     // wide_panel_size()
  float* weights;   // (n, WIDE_BLOCK)
  int32_t* picked;  // (n, WIDE_BLOCK)
};

// Small kernels. A transposed block of up to SMALL_PANEL floats and SMALL_BLOCK references serves all rows of
// a tile.
constexpr int64_t SMALL_ROWS = 6, SMALL_CHUNK = 64;  // the largest over the instruction sets
constexpr int64_t SMALL_BLOCK = 2048, SMALL_PANEL = 1 << 17;

constexpr int64_t small_block_size(int64_t d) {
  const int64_t fitting = SMALL_PANEL / (d > 0 ? d : 1) / SMALL_CHUNK * SMALL_CHUNK;
  return fitting < SMALL_BLOCK ? fitting : SMALL_BLOCK;
}

struct SmallScratch {  // for `block` references, a multiple of SMALL_CHUNK
  float* panel;        // (block, D), transposed
  float* norms;        // (block,)
  float* scores;       // (SMALL_ROWS, block)
  float* tops;         // (SMALL_ROWS, block / 4)
};

// What one block adds, per row.
struct BlockWeights {
  float* weight;  // (n, WIDE_BLOCK): exp(logit_j - top), 0 where negligible
  double* keep;   // (n,): exp(old top - top)
  double* added;  // (n,): sum of weights
};

// Coordinates [begin, end) of the centre: the mean of some of the references.
SVEL_ISA_KERNEL(void, find_centre,
                (const Values& refs, int64_t count, int64_t d, int64_t begin, int64_t end, float* centre))
// |x - alpha c|^2 of each row over coordinates [begin, end), (n,).
SVEL_ISA_KERNEL(void, row_norms,
                (const RowTile& rows, const Values& centre, bool centre_per_row, int64_t begin, int64_t end,
                 double* norms))
// y.d_j, (n, WIDE_BLOCK), and |d_j|^2, (WIDE_BLOCK,), over coordinates [begin, end).
SVEL_ISA_KERNEL(void, wide_scores,
                (const RowTile& rows, const RefBlock& block, int64_t begin, int64_t end,
                 const WideScratch& scratch, double* dots, double* norms))
// From scores to logits, in place. Returns how many logits of weight are in doubt because their float32
// products are large, and lists them in `doubtful` as i WIDE_BLOCK + j.
SVEL_ISA_KERNEL(int64_t, wide_logits,
                (const RowTile& rows, int64_t count, const double* offset, const double* y_norm, double* dots,
                 const double* norms, double cut, const Running& running, int32_t* doubtful))
// Computes doubtful[first, last) again, from distances in float64.
SVEL_ISA_KERNEL(void, wide_rescore,
                (const RowTile& rows, const RefBlock& block, const int32_t* doubtful, int64_t first,
                 int64_t last, double* logits))
// From logits to weights; updates top and sum. Weights below exp(cut) of the largest so far become 0.
SVEL_ISA_KERNEL(void, wide_weights,
                (const RowTile& rows, int64_t count, const double* offset, const double* logits, double cut,
                 const Running& running, const BlockWeights& out))
// Adds a block to running.total over coordinates [begin, end), or finishes it where there is no
// running.total.
SVEL_ISA_KERNEL(void, wide_sums,
                (const RowTile& rows, const RefBlock& block, const BlockWeights& weights, int64_t begin,
                 int64_t end, const WideScratch& scratch, const Running& running, const Finish& finish))
// A block for D <= SMALL_D, from scores to running.total, which must be there. y_norm: |x - alpha c|^2, (n,).
SVEL_ISA_KERNEL(void, small_block,
                (const RowTile& rows, const RefBlock& block, const double* y_norm, double cut,
                 const SmallScratch& scratch, const Running& running))
// A block, all in float64, of at most F64_BLOCK references. scratch: f64_scratch_size(D).
SVEL_ISA_KERNEL(void, f64_block,
                (const RowTile& rows, const Values& refs, int64_t count, double* scratch,
                 const Running& running))
// The end of a row: out from running.total, over coordinates [begin, end) of tile rows [first, last).
SVEL_ISA_KERNEL(void, finish_rows,
                (const RowTile& rows, const double* total, const Finish& finish, int64_t first, int64_t last,
                 int64_t begin, int64_t end))

}  // namespace svel
