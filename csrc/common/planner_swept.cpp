#include "common/planner_swept.h"

#include <algorithm>
#include <cmath>

namespace svel {
namespace {

constexpr int64_t LEAST_ROWS = 32;                       // of a pass, at most
constexpr int64_t LEAST_D = 1024;                        // shorter samples have too few tiles of sums
constexpr int64_t SWEPT_WORKSPACE = int64_t{224} << 20;  // bytes
// Steps of a slice: the fewer, the more shares there are to add up; the more, the more float32 sums round.
constexpr int64_t LEAST_STEPS = 4, MOST_STEPS = 32;

// Of swept_seconds, reckoned, not measured. A step of all blocks brings 6 MB from the L2, at some 5 TB/s; the
// matrix units need half of that. What a tile takes beside its steps, and a call.
constexpr double STEP_SECONDS = 1.2e-6, TILE_SECONDS = 2.5e-6, CALL_SECONDS = 35e-6;
constexpr double READ_SHARE = 0.8;    // of the bandwidth
constexpr double SHARES_RATE = 2e12;  // bytes a second of shares that are added up

int64_t waves(const Problem& pass, int64_t tiles) {
  return ceil_div(tiles * ceil_div(pass.n, swept_rows(pass.refs_bf16)), pass.sm_count);
}

double score_seconds(const Problem& pass, int64_t slices) {
  const int64_t steps = ceil_div(ceil_div(pass.d, SWEPT_BOX), slices);
  return static_cast<double>(waves(pass, ceil_div(pass.m, SWEPT_TILE) * slices)) *
             (static_cast<double>(steps) * STEP_SECONDS + TILE_SECONDS) +
         4 * static_cast<double>(pass.n * slices * swept_padded(pass.m)) / SHARES_RATE;
}

// Slices that take the least time.
int64_t best_slices(const Problem& pass) {
  const int64_t all = ceil_div(pass.d, SWEPT_BOX);
  int64_t best = 0;
  double least = INFINITY;
  for (int64_t steps = MOST_STEPS; steps >= LEAST_STEPS; --steps) {
    const int64_t slices = ceil_div(all, steps);
    const double time = score_seconds(pass, slices);
    if (time < least) least = time, best = slices;
  }
  return best;
}

double pass_seconds(const Problem& pass, int64_t slices) {
  const double n = static_cast<double>(pass.n), d = static_cast<double>(pass.d);
  const double rate = READ_SHARE * pass.bandwidth, read = 2 * static_cast<double>(pass.m) * d / rate;
  const double sums = static_cast<double>(waves(pass, ceil_div(pass.d, SWEPT_TILE))) *
                      (static_cast<double>(ceil_div(pass.m, SWEPT_BOX)) * STEP_SECONDS + TILE_SECONDS);
  // x is read twice, y in parts and the result are written.
  const double rows = n * d * static_cast<double>(12 + 2 * held_parts(pass.refs_bf16)) / rate;
  return CALL_SECONDS + std::max(read, score_seconds(pass, slices)) + std::max(read, sums) + rows;
}

}  // namespace

SweptLayout swept_layout(int64_t n, int64_t m, int64_t d, bool bf16, int64_t slices) {
  const int64_t refs = swept_padded(m), elements = swept_padded(d);
  SweptLayout layout;
  layout.queries = round_up(2 * held_parts(bf16) * n * elements, 256);
  layout.unscales = round_up(4 * round_up(n, 64) * (elements / SWEPT_BOX), 256);
  layout.scores = round_up(4 * n * slices * refs, 256);
  layout.exact = round_up(8 * n * refs, 256);
  layout.reviewed = layout.exact;
  layout.groups = round_up(8 * n * refs, 256);
  layout.weights = round_up(2 * held_parts(bf16) * n * refs, 256);
  layout.ends = round_up(16 * n, 256);
  layout.reviews = round_up(32 * n, 256);
  layout.scales = round_up(4 * n * ceil_div(m, SWEPT_TILE) * slices, 256);
  layout.counter = 256;
  return layout;
}

bool plan_swept(const Problem& p, Plan& plan) {
  if (p.cc != 90 || !p.has_sm90a || p.refs_size != 2 || p.x_size == 8 || !p.aligned) return false;
  if (p.has_source || p.shared_rows || p.groups() != 1 || p.n < 1 || p.d < LEAST_D) return false;
  if (p.m < 1 || p.m > SWEPT_MOST_REFS || p.d > int64_t{1} << 24) return false;
  Problem pass = p;
  int64_t slices = 0, bytes = 0;
  for (int64_t most = SWEPT_MOST_ROWS; most >= LEAST_ROWS; most /= 2) {
    pass.n = ceil_div(p.n, ceil_div(p.n, most));
    slices = best_slices(pass);
    bytes = swept_layout(pass.n, p.m, p.d, p.refs_bf16, slices).total();
    if (bytes <= SWEPT_WORKSPACE) break;
  }
  if (bytes > SWEPT_WORKSPACE || swept_smem(pass.n, p.refs_bf16) > p.smem_limit) return false;
  plan.kernel = "swept";
  plan.threads = HELD_THREADS;
  plan.tile_rows = static_cast<int>(swept_rows(p.refs_bf16));
  plan.tile_refs = static_cast<int>(SWEPT_TILE);
  plan.tile_d = SWEPT_BOX;
  plan.slice = ceil_div(ceil_div(p.d, SWEPT_BOX), slices) * SWEPT_BOX;
  plan.slices = ceil_div(p.d, plan.slice);
  plan.fast = p.precision == "fast";
  plan.blocks = p.sm_count;
  plan.rows_per_pass = pass.n;
  plan.refs_per_pass = p.m;
  plan.stages = static_cast<int>(SWEPT_STAGES);
  plan.smem_bytes = swept_smem(pass.n, p.refs_bf16);
  plan.workspace_bytes = swept_layout(pass.n, p.m, p.d, p.refs_bf16, plan.slices).total();
  plan.reason =
      "a set too large for the multiprocessors' shared memories: read twice, scores and sums on the "
      "matrix units";
  return true;
}

double swept_seconds(const Problem& p, const Plan& plan) {
  Problem pass = p;
  pass.n = plan.rows_per_pass;
  return static_cast<double>(ceil_div(p.n, pass.n)) * pass_seconds(pass, plan.slices);
}

}  // namespace svel
