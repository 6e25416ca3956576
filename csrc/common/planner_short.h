// The plan of the kernel for short samples (stable_target/short_rows_cuda.cu): many rows, one shared set of
// float16, bfloat16 or float32, 33 to 256 elements. Shapes that the planner and the kernel have to agree on.
#pragma once

#include "common/planner.h"

namespace svel {

constexpr int64_t SHORT_ROWS = 128;       // of a thread block: two warpgroups with 64 each
constexpr int SHORT_THREADS = 384;        // and one that copies
constexpr int SHORT_SETTLE_ROWS = 8;      // that are evaluated again side by side
constexpr int SHORT_SETTLE_BLOCKS = 264;  // two for each multiprocessor of an H100
constexpr int64_t SHORT_PANEL = 64;       // elements of 128 bytes, what a swizzled row of shared memory holds
constexpr int64_t SHORT_MOST_PANELS = 4;
constexpr int64_t SHORT_FACTS_BYTES = 1536;  // the centre and what is known of all references

// By the panels of a sample: references of a tile, and places for tiles of one part in shared memory.
constexpr int short_tile_refs(int64_t panels) {
  return panels <= 2 ? 128 : 64;
}
constexpr int short_slots(int64_t panels) {
  return panels == 1 ? 6 : panels == 4 ? 3 : 4;
}
constexpr int64_t short_tile_bytes(int64_t panels) {
  return panels * 128 * short_tile_refs(panels);
}
// Two parts of the rows, the tiles, their norms, the barriers; aligned to 1024 bytes.
constexpr int64_t short_smem(int64_t panels) {
  return 2 * panels * 128 * SHORT_ROWS +
         short_slots(panels) * (short_tile_bytes(panels) + 4 * short_tile_refs(panels)) + 256 + 1024;
}
static_assert(short_smem(SHORT_MOST_PANELS) <= 232448);

// The workspace of one call, in bytes, piece by piece; also its order in memory.
struct ShortLayout {
  int64_t facts, refs, norms, rows, factors, sums, totals, doubts, settling;
  int64_t total() const { return facts + refs + norms + rows + factors + sums + totals + doubts + settling; }
};
// splits: parts of a row's references.
ShortLayout short_layout(int64_t d, int64_t rows_per_pass, int64_t refs_per_pass, int64_t splits);

// False where this kernel cannot serve, or another serves better.
bool plan_short_rows(const Problem& problem, Plan& plan);

}  // namespace svel
