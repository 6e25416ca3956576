// The plan of the pool kernel (stable_target/pool_rows.cuh): few rows beside a large pool of float16
// references, on compute capability 9.0.
#pragma once

#include "common/planner.h"

namespace svel {

constexpr int POOL_ROWS = 32;       // of one pass over the references,
constexpr int POOL_MOST_ROWS = 64;  // and of two: more rows have register tiles of their own
constexpr int POOL_TILE = 32;       // references
constexpr int POOL_LISTED = 32;     // best references that a cluster keeps of a row, a warp's lanes
constexpr int POOL_CLUSTER = 8;     // thread blocks that share a sample,
constexpr int POOL_SLICE = 512;     // elements of it for each
constexpr int POOL_STAGES = 5;      // tiles in flight
constexpr int POOL_THREADS = 512;   // four groups of four warps
constexpr int POOL_SMEM_BYTES = 217856;
constexpr int POOL_SEGMENT = 1024;  // tiles that are added up in float32, at least,
constexpr int POOL_SEGMENTS = 16;   // and most segments of a cluster's references: bounds the workspace
constexpr int POOL_D = POOL_CLUSTER * POOL_SLICE;

struct PoolParts {
  int64_t clusters, segment_tiles, segments;  // parts: clusters x segments
};

// For m references and as many clusters as run at once.
PoolParts pool_parts(int64_t m, int64_t clusters);

// Whether the kernel serves the problem and pays.
bool plan_pool(const Problem& problem, Plan& plan);

// Rows of label -1 beside the bulk kernel, which reads the whole bank for every few of them (pool_bank.cuh).
// How many there are only the device knows: launches are for all rows of the call.
constexpr int POOL_BANK_ROWS = 4096;  // of a call, at most
struct PoolBankPlan {
  Plan pool;        // of the bank as one pool
  int64_t passes;   // that there may be; those without rows end at once
  int64_t at_once;  // of them, to a launch
};

// Whether a call of this plan that may have such rows is to be made ready for them.
bool plan_pool_bank(const Problem& problem, const Plan& plan, PoolBankPlan& bank);

// Where in the workspace what this takes begins, behind that of the plan itself.
constexpr int64_t pool_bank_offset(const Plan& plan) {
  return (plan.workspace_bytes + 255) / 256 * 256;
}

}  // namespace svel
