// The plan of the kernel for larger small sets (stable_target/swept_cuda.cu): a pool of float16 or bfloat16
// references that shared memories do not hold, which comes from memory for scores and again for sums, on
// compute capability 9.0.
#pragma once

#include "common/planner_held.h"

namespace svel {

constexpr int64_t SWEPT_MOST_ROWS = 1024;   // of a pass
constexpr int64_t SWEPT_TILE = 256;         // references, or elements of sums, of a tile
constexpr int64_t SWEPT_BOX = 64;           // of a group of warps; and what a step goes along the other side
constexpr int64_t SWEPT_STAGES = 4;         // steps in shared memory
constexpr int64_t SWEPT_FIXED_SMEM = 9216;  // beside stages and rows
constexpr int64_t SWEPT_ROW_SMEM = 16;      // of a row of the pass
constexpr int64_t SWEPT_MOST_REFS = 8192;   // more were not thought of
constexpr int64_t swept_rows(bool bf16) {   // of a tile
  return bf16 ? 32 : 64;
}
constexpr int64_t swept_sum_box(bool bf16, bool fast) {  // rows of a copy of weights
  return bf16 && fast ? 48 : swept_rows(bf16);
}
constexpr int64_t swept_stage(bool bf16) {
  return (SWEPT_TILE + held_parts(bf16) * swept_rows(bf16)) * 2 * SWEPT_BOX;
}
constexpr int64_t swept_smem(int64_t n, bool bf16) {
  return HELD_ALIGNMENT + SWEPT_STAGES * swept_stage(bf16) + SWEPT_FIXED_SMEM +
         ceil_div(SWEPT_ROW_SMEM * n, 128) * 128;
}
constexpr int64_t swept_padded(int64_t size) {  // references in scores and weights, elements of y
  return ceil_div(size, SWEPT_BOX) * SWEPT_BOX;
}

// The workspace, in bytes, piece by piece; also its order in memory.
struct SweptLayout {
  int64_t queries, unscales, scores, exact, reviewed, groups, weights, ends, reviews, scales, counter;
  int64_t total() const {
    return queries + unscales + scores + exact + reviewed + groups + weights + ends + reviews + scales +
           counter;
  }
};
SweptLayout swept_layout(int64_t n, int64_t m, int64_t d, bool bf16, int64_t slices);

// False where the kernel cannot serve.
bool plan_swept(const Problem& problem, Plan& plan);

// What it takes by that plan, about.
double swept_seconds(const Problem& problem, const Plan& plan);

}  // namespace svel
