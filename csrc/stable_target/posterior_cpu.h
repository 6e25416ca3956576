// One posterior-mean problem on the CPU, as both ops state it.
#pragma once

#include <cstdint>
#include <vector>

#include "common/storage.h"

namespace svel::cpu {

// out = a x + b mean and lse for every row; NaN for rows whose coefficients, values or sets make no sense.
struct PosteriorProblem {
  Values x, refs, source;                  // (N, D); (K, M, D) or (1, M, D); (N, D) or not given
  int64_t n, d, groups, m;                 // m: references of a group in memory
  const int64_t* labels;                   // (N,) in [-1, K); nullptr: group 0 for all
  std::vector<int64_t> counts;             // (K,) valid references, each in [0, M]
  std::vector<double> alpha, sigma, a, b;  // (N,)
  void* out;                               // (N, D)
  Storage out_storage;
  double* lse;  // (N,) or nullptr
};

void solve(const PosteriorProblem& problem);

}  // namespace svel::cpu
