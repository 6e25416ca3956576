// The plan of the kernel for small sets (stable_target/held_cuda.cu): float16 or bfloat16 references that the
// multiprocessors' shared memories hold all together, a pool or few classes, on compute capability 9.0.
#pragma once

#include "common/planner.h"

namespace svel {

constexpr int HELD_THREADS = 512;
constexpr int64_t HELD_MOST_ROWS = 1024;   // of a pass
constexpr int64_t HELD_BATCH = 64;         // rows that a block prepares at a time, or fewer
constexpr int64_t HELD_MOST_REFS = 1024;   // of a chunk
constexpr int64_t HELD_MOST_SLICE = 384;   // elements of a slice
constexpr int64_t HELD_FIXED_SMEM = 9984;  // beside references, rows and weights
constexpr int64_t HELD_MOST_TEAMS = 160;   // of blocks with one chunk
constexpr int64_t HELD_ROW_SMEM = 24;      // of a row of the call
constexpr int64_t held_rows_smem(int64_t n) {
  return ceil_div(HELD_ROW_SMEM * n, 128) * 128;
}
constexpr int64_t HELD_LINE = 64;          // values of a line of shared memory
constexpr int64_t HELD_TILE = 64;          // references, or elements of a sum, of a product
constexpr int64_t HELD_ALIGNMENT = 1024;   // of lines, in bytes
constexpr int64_t held_group(bool bf16) {  // rows of a product
  return bf16 ? 16 : 32;
}
constexpr int64_t HELD_NARROW = 8;  // where a batch has no more left

// How a set is cut: each class into chunks of references, samples into slices; a block holds a slice of a
// chunk, and has one of `row_parts` parts of the rows that have the chunk's class.
struct HeldCut {
  int64_t chunk = 0, chunks = 0, slice = 0, slices = 0, row_parts = 0;
  int64_t batch = 0, buffers = 0;  // of rows, or of their weights, in shared memory
};

constexpr int64_t held_parts(bool bf16) {  // of a float32, see Split
  return bf16 ? 3 : 2;
}
constexpr int64_t held_sum_group(bool bf16, bool fast) {  // rows of a product of sums, of as many lines
  return held_group(bf16) * held_parts(bf16) / (held_parts(bf16) - fast);
}
constexpr int64_t held_padded(int64_t m) {  // references of a class, in scores and weights
  return ceil_div(m, 8) * 8;
}
constexpr int64_t held_refs_smem(const HeldCut& cut) {
  return 2 * cut.chunk * cut.slice;
}
constexpr int64_t held_lines_smem(const HeldCut& cut, bool bf16) {
  const int64_t longest = cut.slice > cut.chunk ? cut.slice : cut.chunk;
  return 2 * cut.buffers * cut.batch * held_parts(bf16) * ceil_div(longest, HELD_LINE) * HELD_LINE;
}
int64_t held_smem(const HeldCut& cut, int64_t n, bool bf16);

// The workspace, in bytes, piece by piece; also its order in memory.
struct HeldLayout {
  int64_t scores, sums, exact, weights, ends, scales, centres;
  int64_t total() const { return scores + sums + exact + weights + ends + scales + centres; }
};
HeldLayout held_layout(int64_t n, int64_t k, int64_t m, int64_t d, bool bf16, const HeldCut& cut);

// False where the kernel cannot serve.
bool plan_held(const Problem& problem, Plan& plan);

// The cut of that plan.
HeldCut held_cut(const Plan& plan, int64_t k, int64_t m);

// What it takes by that plan, about.
double held_seconds(const Problem& problem, const Plan& plan);

}  // namespace svel
