#include "common/planner_pool.h"

#include <algorithm>

namespace svel {
namespace {

constexpr int64_t MIN_ROWS = 16;                      // fewer: bound by memory, one pass is enough
constexpr int64_t MIN_REFS = 2048;                    // fewer: too few tiles for the device
constexpr int64_t MIN_D = 256;                        // shorter sums leave the softmax in charge
constexpr int64_t SCORES_LIMIT = int64_t{104} << 20;  // bytes of scores and their maxima
constexpr int64_t STAGES = 4;
constexpr int64_t STAGE_BYTES = (POOL_TILE + POOL_ROWS) * 128 + 1024;

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

}  // namespace

PoolLayout pool_layout(int64_t n, int64_t d, int64_t rows_per_pass, int64_t refs_per_pass) {
  const int64_t d_padded = round_up(d, POOL_TILE), d_tiles = d_padded / POOL_TILE;
  const int64_t tiles = d_tiles * ceil_div(rows_per_pass, POOL_ROWS);
  PoolLayout layout;
  layout.list = round_up(n * 96 + 4096, 256);
  layout.centre = round_up(16 * d_padded + 64 * d_tiles + 256, 256);
  layout.rows = round_up(rows_per_pass * 96 + 256, 256);
  layout.queries = 4 * rows_per_pass * d_padded;
  layout.scores = 4 * rows_per_pass * refs_per_pass;
  layout.maxima = layout.scores / POOL_GROUP;
  layout.survivors = round_up(4 * rows_per_pass * POOL_SURVIVORS, 256);
  layout.sums = 4 * rows_per_pass * d_padded;
  layout.partial = std::max(tiles, POOL_SEGMENTS) * POOL_TILE * POOL_ROWS * 4;
  return layout;
}

bool plan_pool(const Problem& p, Plan& plan) {
  const int64_t d_tiles = ceil_div(p.d, POOL_TILE);
  if (p.cc != 90 || p.has_labels || p.refs_size != 2 || p.x_size == 8 || !p.aligned) return false;
  if (p.n < MIN_ROWS || p.m < MIN_REFS || p.d < MIN_D || d_tiles > POOL_SEGMENTS) return false;
  if (p.m >= int64_t{1} << 31 || STAGES * STAGE_BYTES + 2048 > p.smem_limit) return false;

  // As many rows as keep the tiles of the sums within their part of the workspace, then as many references.
  const int64_t row_tiles = std::clamp<int64_t>(POOL_SEGMENTS / d_tiles, 1, POOL_PASS_ROWS / POOL_ROWS);
  const int64_t rows = p.n <= 64    ? 64
                       : p.n <= 128 ? 128
                                    : std::min(round_up(p.n, POOL_ROWS), row_tiles * POOL_ROWS);
  const int64_t most = SCORES_LIMIT / (rows * 4 * (POOL_GROUP + 1) / POOL_GROUP) / POOL_TILE * POOL_TILE;
  const int64_t rounds = ceil_div(p.m, most);
  plan.kernel = "pool";
  plan.threads = 384;
  plan.tile_rows = static_cast<int>(rows <= 64 ? 64 : rows <= 128 ? 128 : POOL_ROWS);
  plan.tile_refs = POOL_TILE;
  plan.tile_d = 64;
  plan.stages = STAGES;
  plan.rows_per_pass = rows;
  plan.refs_per_pass = round_up(ceil_div(p.m, rounds), POOL_TILE);
  plan.splits = p.precision == "exact" ? 2 : 1;  // halves that y and the weights are split into
  plan.blocks = p.sm_count;
  plan.smem_bytes = STAGES * STAGE_BYTES + 2048;
  plan.workspace_bytes = pool_layout(p.n, p.d, rows, plan.refs_per_pass).total();
  if (plan.workspace_bytes > WORKSPACE_LIMIT) return false;
  plan.reason = "one pool of 16-bit references: products on the matrix units, exact work where it can matter";
  return true;
}

}  // namespace svel
