// The rows of label -1 of a class bank, by the pool kernel beside the bulk kernel. Host.
#pragma once

#include "common/planner_pool.h"
#include "stable_target/launch.cuh"

namespace svel::cuda {

// The whole call: run_bulk with `plan` for the rows of a class, then what serves the others. workspace: that
// of `plan`, and from pool_bank_offset(plan) on that of `bank`.
void run_pool_bank(const char* op, const Inputs& in, const Plan& plan, const PoolBankPlan& bank,
                   void* workspace, cudaStream_t stream);

}  // namespace svel::cuda
