// The kernels of posterior_mean and stable_target, one file each; the planner chooses. Every launch goes to
// `stream` and nothing waits: a call can be captured in a CUDA graph. `workspace`: plan.workspace_bytes,
// aligned to 256 bytes.
#pragma once

#include "common/planner.h"
#include "stable_target/rows.cuh"

namespace svel::cuda {

// Exact: `doubtful` (n,) gets the times of the rows whose rounding errors may be too large, NaN for the
// others. Given those times another kernel's result, `exact` (n, d) and `lse` (n,), replaces theirs.
void run_pool(const char* op, const Inputs& in, const Plan& plan, void* workspace, double* doubtful,
              cudaStream_t stream);
void replace_doubtful(const char* op, const Inputs& in, const double* doubtful, const Array& exact,
                      const Array& lse, cudaStream_t stream);
void run_many_rows(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream);
void run_bulk(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream);
void run_stream(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream);
void run_two_pass(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream);
void run_tiled(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream);
void run_small(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream);
void run_small_float(const char* op, const Inputs& in, const Plan& plan, void* workspace,
                     cudaStream_t stream);

// Whether the list of units of run_bulk is short: it may be made in the launch of a gather.
bool has_short_list(int64_t n, int64_t k, int64_t m);

// A launch that may overlap with that of the kernel before it on the stream, one of ours, for which it then
// waits itself (programmatic dependent launch); not so where `follows` is false.
template <typename... Params, typename... Args>
void launch_following(const char* op, bool follows, void (*kernel)(Params...), dim3 grid, int threads,
                      int64_t bytes, cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute overlaps{};
  overlaps.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlaps.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = &overlaps;
  config.numAttrs = follows ? 1 : 0;
  check_cuda(op, cudaLaunchKernelEx(&config, kernel, args...));
}

// Clusters of `size` blocks that run at once; the answer for a kernel and a size does not change.
int resident_clusters(const char* op, const void* kernel, const cudaLaunchConfig_t& config, int size);

// Hands out consecutive pieces of a workspace, each aligned to 16 bytes.
class Carver {
 public:
  explicit Carver(void* base) : next_(static_cast<char*>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return piece;
  }

 private:
  char* next_;
};

}  // namespace svel::cuda
