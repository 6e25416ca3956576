#include "common/planner_short.h"

#include <algorithm>

namespace svel {
namespace {

constexpr int64_t MIN_D = 33;  // shorter: a thread holds whole rows
constexpr int64_t MIN_ROWS = 27, MIN_REFS = 64;
constexpr int64_t MIN_SCORES = 1 << 19;              // fewer: five launches take longer than another kernel
constexpr int64_t REFS_LIMIT = int64_t{96} << 20;    // bytes of the references' parts
constexpr int64_t PARTS_LIMIT = int64_t{128} << 20;  // bytes of what blocks leave of rows, and of rows
// A block's beginning and end, and its row's place in the merge, in tiles of references.
constexpr double PART_COST = 1.0;

}  // namespace

ShortLayout short_layout(int64_t d, int64_t rows_per_pass, int64_t refs_per_pass, int64_t splits) {
  const int64_t padded = round_up(d, SHORT_PANEL), rows = splits * rows_per_pass;
  ShortLayout layout;
  layout.facts = SHORT_FACTS_BYTES;
  layout.refs = 4 * padded * refs_per_pass;
  layout.norms = round_up(4 * refs_per_pass, 256);
  layout.rows = 4 * padded * rows_per_pass;
  layout.factors = 16 * rows_per_pass;
  layout.sums = 4 * padded * rows;
  layout.totals = 24 * rows;
  layout.doubts = 16 * (rows_per_pass + 1);
  layout.settling = SHORT_SETTLE_BLOCKS * (8 * SHORT_SETTLE_ROWS * (padded + 2) + 4);
  return layout;
}

bool plan_short_rows(const Problem& p, Plan& plan) {
  if (p.cc != 90 || !p.has_sm90a || p.has_labels || p.shared_rows || p.x_size == 8 || p.refs_size == 8)
    return false;
  const int64_t panels = ceil_div(p.d, SHORT_PANEL), tile_refs = short_tile_refs(panels);
  if (p.d < MIN_D || panels > SHORT_MOST_PANELS || p.n < MIN_ROWS || p.m < MIN_REFS) return false;
  if (p.m >= int64_t{1} << 31 || short_smem(panels) > p.smem_limit) return false;
  if (p.n < MIN_SCORES / p.m) return false;
  const int64_t of_ref = short_layout(p.d, 0, 256, 0).refs / 256 + 4;
  const int64_t rounds = ceil_div(p.m, REFS_LIMIT / of_ref / tile_refs * tile_refs);
  const int64_t refs = round_up(ceil_div(p.m, rounds), tile_refs), tiles = refs / tile_refs;

  // As many rows as have room with one part, then as many parts as make whole waves.
  const auto bytes = [&](int64_t rows, int64_t splits) {
    const ShortLayout layout = short_layout(p.d, rows, 0, splits);
    return layout.total() - layout.facts - layout.settling;
  };
  const int64_t most_rows = PARTS_LIMIT / bytes(SHORT_ROWS, 1) * SHORT_ROWS;
  const int64_t rows = std::min(round_up(p.n, SHORT_ROWS), most_rows), row_tiles = rows / SHORT_ROWS;
  double least = 0;
  for (int64_t splits = 1; splits <= std::min<int64_t>(tiles, 2 * p.sm_count); ++splits) {
    if (splits > 1 && bytes(rows, splits) > PARTS_LIMIT) break;
    const double waves = static_cast<double>(ceil_div(row_tiles * splits, p.sm_count));
    const double time = waves * (static_cast<double>(ceil_div(tiles, splits)) + PART_COST);
    if (splits == 1 || time < least) least = time, plan.splits = splits;
  }
  plan.kernel = "short_rows";
  plan.threads = SHORT_THREADS;
  plan.tile_rows = static_cast<int>(SHORT_ROWS);
  plan.tile_refs = static_cast<int>(tile_refs);
  plan.tile_d = panels * SHORT_PANEL;
  plan.stages = short_slots(panels);
  plan.rows_per_pass = rows;
  plan.refs_per_pass = refs;
  plan.blocks = row_tiles * plan.splits;
  plan.fast = p.precision == "fast";
  plan.smem_bytes = short_smem(panels);
  plan.workspace_bytes = short_layout(p.d, rows, refs, plan.splits).total();
  plan.reason =
      "one pool of short samples: scores, softmax and sums of a tile in registers, on the matrix units";
  return true;
}

}  // namespace svel
