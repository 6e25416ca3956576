#include "common/planner_pool.h"

#include <algorithm>

namespace svel {
namespace {

// Below, the few launches around the kernel and the filling of its pipeline are felt.
constexpr int64_t LEAST_ELEMENTS = int64_t{1} << 24;
// A tile takes the same time at every D, which 4,096 elements fill; the bulk kernel's time is that of the
// bytes of every two rows.
constexpr int64_t LEAST_SHARE = POOL_D;
constexpr int64_t LEAST_EXACT_D = 256;  // of D = 128 near a manifold an exact result was off by 4.4e-6
// One row in so many has label -1: a tenth is usual.
constexpr int64_t NULL_SHARE = 10;

// Whether the kernel can read so many references at all.
bool can_read(const Problem& p, int64_t m) {
  const bool half = p.refs_size == 2 && !p.refs_bf16;
  if (p.cc != 90 || !p.has_sm90a || p.smem_limit < POOL_SMEM_BYTES || p.sm_count < 8 * POOL_CLUSTER)
    return false;
  if (p.has_source || !half || !p.aligned || p.x_size == 8 || p.d % 8 != 0 || p.d > POOL_D) return false;
  if (m >= int64_t{1} << 31 || m * p.d < LEAST_ELEMENTS) return false;
  return p.precision != "exact" || p.d >= LEAST_EXACT_D;
}

// Of m references, whether all these clusters run at once or fewer do, who have more segments each.
int64_t most_parts(int64_t m, int64_t clusters) {
  int64_t most = 0;
  for (; clusters > 0; --clusters) {
    const PoolParts parts = pool_parts(m, clusters);
    most = std::max(most, parts.clusters * parts.segments);
  }
  return most;
}

// What a pass of 32 rows takes of the workspace.
int64_t pass_bytes(const Problem& p, int64_t m, const PoolParts& parts) {
  return POOL_ROWS * (4 * POOL_D + 128) + most_parts(m, parts.clusters) * POOL_ROWS * (4 * p.d + 20) +
         POOL_ROWS * 32 * ceil_div(p.d, 256) + POOL_ROWS * (256 + parts.clusters * POOL_LISTED * 24);
}
constexpr int64_t SHARED_BYTES = 4 * POOL_D + 4096;

void describe(const Problem& p, int64_t m, const PoolParts& parts, Plan& plan) {
  plan.kernel = "pool";
  plan.threads = POOL_THREADS;
  plan.tile_rows = POOL_ROWS;
  plan.tile_refs = POOL_TILE;
  plan.tile_d = POOL_D;
  plan.stages = POOL_STAGES;
  plan.fast = p.precision == "fast";
  plan.slices = POOL_CLUSTER;
  plan.slice = POOL_SLICE;
  plan.blocks = parts.clusters * POOL_CLUSTER;
  plan.splits = parts.clusters * parts.segments;
  plan.rows_per_pass = POOL_ROWS;
  plan.refs_per_pass = m;
  plan.smem_bytes = POOL_SMEM_BYTES;
  plan.workspace_bytes = pass_bytes(p, m, parts) + SHARED_BYTES;
}

}  // namespace

PoolParts pool_parts(int64_t m, int64_t clusters) {
  const int64_t tiles = std::max<int64_t>(1, ceil_div(m, POOL_TILE));
  PoolParts parts;
  parts.clusters = std::min(clusters, tiles);
  const int64_t most = ceil_div(tiles, parts.clusters);
  parts.segment_tiles = std::max<int64_t>(POOL_SEGMENT, ceil_div(most, POOL_SEGMENTS));
  parts.segments = ceil_div(most, parts.segment_tiles);
  return parts;
}

bool plan_pool(const Problem& p, Plan& plan) {
  if (p.has_labels || !can_read(p, p.m)) return false;
  if (p.n < 2 || p.n > POOL_MOST_ROWS || ceil_div(p.n, 2) * p.d < LEAST_SHARE) return false;
  describe(p, p.m, pool_parts(p.m, p.sm_count / POOL_CLUSTER), plan);
  plan.reason =
      "one pool of 2^24 elements or more, few rows: clusters of 8 blocks read it once for 32 rows, at a cost "
      "that one pass for every two rows exceeds; exact: the best references are scored again";
  return true;
}

bool plan_pool_bank(const Problem& p, const Plan& plan, PoolBankPlan& bank) {
  if (!p.has_labels || p.shared_rows || plan.kernel != "bulk" || p.n > POOL_BANK_ROWS) return false;
  const int64_t m = p.references();
  if (!can_read(p, m)) return false;
  // As above: for a single unit of rows the bulk kernel reads the bank once as well.
  if (ceil_div(p.n / NULL_SHARE, plan.tile_rows) * p.d <= LEAST_SHARE) return false;
  const PoolParts parts = pool_parts(m, p.sm_count / POOL_CLUSTER);
  describe(p, m, parts, bank.pool);
  bank.passes = ceil_div(p.n, POOL_ROWS);
  const int64_t each = pass_bytes(p, m, parts);
  bank.at_once = std::clamp<int64_t>((WORKSPACE_LIMIT / 2 - SHARED_BYTES) / each, 1, bank.passes);
  bank.pool.workspace_bytes =
      bank.at_once * each + SHARED_BYTES + 13 * p.n + 8 * ceil_div(m, POOL_TILE) + 256;
  bank.pool.reason = "rows of label -1: the bank as one pool";
  return true;
}

}  // namespace svel
