#include "common/planner_rows.h"

#include <algorithm>

namespace svel {
namespace {

constexpr int64_t MIN_ROWS = 27;                          // fewer: bound by memory, one pass is enough
constexpr int64_t MOST_REFS = (int64_t{1} << 31) - 1024;  // coordinates of tensor copies have 31 bits
constexpr int64_t MIN_REFS = 2048;                        // fewer: too few tiles for the device
constexpr int64_t MIN_D = 256;                            // shorter sums leave the softmax in charge
constexpr int64_t SCORES_LIMIT = int64_t{128} << 20;      // bytes of scores and their maxima

int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

}  // namespace

ManyLayout many_layout(int64_t n, int64_t m, int64_t d, int64_t rows_per_pass, int64_t refs_per_pass) {
  const int64_t d_padded = round_up(d, MANY_TILE), d_tiles = d_padded / MANY_TILE;
  const int64_t tiles = d_tiles * ceil_div(rows_per_pass, MANY_ROWS);
  ManyLayout layout;
  layout.order = n > rows_per_pass ? round_up(4 * std::min(n, MANY_LIST_ROWS), 256) : 0;
  layout.centre = round_up(16 * d_padded + (64 + 4 * MANY_PAIRS) * d_tiles + 256, 256);
  layout.norms = n >= MANY_NORMS_ROWS && m <= MANY_NORMS_REFS ? round_up(4 * m, 256) : 0;
  layout.rows = round_up(rows_per_pass * MANY_ROW_BYTES + 256, 256);
  layout.queries = 6 * rows_per_pass * d_padded;
  layout.scores = 4 * rows_per_pass * refs_per_pass;
  layout.maxima = layout.scores / MANY_GROUP;
  layout.survivors = round_up(4 * rows_per_pass * MANY_SURVIVORS, 256);
  layout.sums = 4 * rows_per_pass * d_padded;
  layout.partial = std::max(tiles, MANY_SEGMENTS) * MANY_TILE * MANY_ROWS * 4;
  return layout;
}

bool plan_many_rows(const Problem& p, Plan& plan) {
  const int64_t d_tiles = ceil_div(p.d, MANY_TILE);
  if (p.cc != 90 || !p.has_sm90a || p.has_labels || p.refs_size != 2 || p.x_size == 8 || !p.aligned)
    return false;
  if (p.has_source) return false;  // exact: 2.006e-6 seen at t = 0.2, M = 700
  if (p.n < MIN_ROWS || p.m < MIN_REFS || p.d < MIN_D || d_tiles > MANY_SEGMENTS) return false;
  if (p.m > MOST_REFS || MANY_SMEM_BYTES > p.smem_limit) return false;

  // As many rows as keep the tiles of the sums within their part of the workspace, then as many references;
  // one round of all references spares others their part.
  const int64_t row_tiles = std::clamp<int64_t>(MANY_SEGMENTS / d_tiles, 1, MANY_PASS_ROWS / MANY_ROWS);
  int64_t rows = p.n <= 64    ? 64
                 : p.n <= 128 ? 128
                              : std::min(round_up(p.n, MANY_ROWS), row_tiles * MANY_ROWS);
  const auto most_refs = [&](int64_t rows_per_pass) {
    const int64_t left = std::min(
        SCORES_LIMIT, WORKSPACE_LIMIT - (1 << 20) - many_layout(p.n, p.m, p.d, rows_per_pass, 0).total());
    return left / (rows_per_pass * 4 * (MANY_GROUP + 1) / MANY_GROUP) / MANY_TILE * MANY_TILE;
  };
  if (rows > MANY_WHOLE_ROWS && most_refs(rows) < p.m && most_refs(MANY_WHOLE_ROWS) >= p.m)
    rows = MANY_WHOLE_ROWS;
  const int64_t most = most_refs(rows);
  if (most < MANY_TILE) return false;
  const int64_t rounds = ceil_div(p.m, most);
  plan.kernel = "many_rows";
  plan.threads = MANY_THREADS;
  plan.tile_rows = static_cast<int>(rows <= 64 ? 64 : rows <= 128 ? 128 : MANY_ROWS);
  plan.tile_refs = MANY_TILE;
  plan.tile_d = 64;
  plan.stages = MANY_STAGES;
  plan.rows_per_pass = rows;
  plan.refs_per_pass = round_up(ceil_div(p.m, rounds), MANY_TILE);
  plan.fast = p.precision == "fast";
  plan.blocks = p.sm_count;
  plan.smem_bytes = MANY_SMEM_BYTES;
  plan.workspace_bytes = many_layout(p.n, p.m, p.d, rows, plan.refs_per_pass).total();
  plan.reason = "one pool of 16-bit references: products on the matrix units, exact work where it can matter";
  return true;
}

}  // namespace svel
