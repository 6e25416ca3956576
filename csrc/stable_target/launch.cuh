// The kernels of posterior_mean and stable_target, one file each; the planner chooses. Every launch goes to
// `stream` and nothing waits: a call can be captured in a CUDA graph. `workspace`: plan.workspace_bytes,
// aligned to 256 bytes.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/kernel_launch.cuh"
#include "common/planner.h"
#include "stable_target/rows.cuh"

namespace svel::cuda {

void run_pool(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream);
void run_many_rows(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream);
void run_short_rows(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream);
void run_held(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream);
void run_swept(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream);
void run_bulk(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream);
void run_stream(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream);
void run_two_pass(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream);
void run_tiled(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream);
void run_small(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream);
void run_small_float(const char* op, const Inputs& in, const Plan& plan, void* workspace,
                     cudaStream_t stream);

// Whether the list of units of run_bulk is short: it may be made in the launch of a gather.
bool has_short_list(int64_t n, int64_t k, int64_t m);

// Clusters of `size` blocks that run at once; the answer for a kernel and a size does not change.
int resident_clusters(const char* op, const void* kernel, const cudaLaunchConfig_t& config, int size);

// Rows from `first` on, at most `rows` of them.
inline Inputs slice_rows(const Inputs& in, int64_t first, int64_t rows) {
  const auto from = [first](Array a, int64_t width) {
    if (a.data) a.data = static_cast<char*>(a.data) + first * width * size_of(a.dtype);
    return a;
  };
  Inputs part = in;
  part.n = std::min(rows, in.n - first);
  part.x = from(in.x, in.d), part.source = from(in.source, in.d), part.out = from(in.out, in.d);
  part.time_or_alpha = from(in.time_or_alpha, 1), part.sigma = from(in.sigma, 1), part.lse = from(in.lse, 1);
  if (in.labels) part.labels += first;
  return part;
}

// Hands out consecutive pieces of a workspace, each aligned to 16 bytes.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)), next_(base_) {}
  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return piece;
  }
  // The planner has to know of all that is taken.
  void check(const char* op, int64_t room) const {
    if (next_ - base_ > room)
      throw std::runtime_error(std::string("svel::") + op + ": " + std::to_string(next_ - base_) +
                               " bytes of workspace are needed, " + std::to_string(room) + " were planned");
  }

 private:
  char* base_;
  char* next_;
};

}  // namespace svel::cuda
