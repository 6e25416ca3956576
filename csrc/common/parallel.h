// Threads of the CPU kernels: torch's own pool, so torch.set_num_threads holds here too.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace svel {

constexpr int64_t GRAIN = 32768;  // elements per task below which waking a thread costs more than it saves

// f(begin, end) over [0, n) in parallel; `cost`: elements that one index stands for. f must not throw.
template <typename F>
void parallel_for(int64_t n, int64_t cost, const F& f) {
  const int64_t grain = cost >= GRAIN ? 1 : GRAIN / (cost > 0 ? cost : 1);
  if (n <= grain) {
    if (n > 0) f(int64_t{0}, n);
  } else {
    torch::stable::parallel_for(0, n, grain, f);
  }
}

}  // namespace svel
