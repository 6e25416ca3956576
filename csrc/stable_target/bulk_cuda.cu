// What launches of the bulk kernel for all dtypes share.
#include <map>
#include <mutex>
#include <utility>

#include "stable_target/bulk_launch.cuh"

namespace svel::cuda {
namespace {

__global__ void __launch_bounds__(LIST_THREADS)
    unit_kernel(Inputs in, UnitList list, int* arrived, int64_t counts, int tile_refs, int most_rows) {
  __shared__ uint64_t keys[CHUNK];
  __shared__ int64_t scratch[LIST_THREADS / 32];
  allow_next_launch();
  for (int64_t i = threadIdx.x; i < counts; i += blockDim.x) arrived[i] = 0;
  build_units(in, list, tile_refs, most_rows, keys, scratch);
}

// Where each block builds the list, there is still this to do, beside the bulk kernel.
__global__ void zero_kernel(int* arrived, int64_t counts) {
  allow_next_launch();
  for (int64_t i = threadIdx.x; i < counts; i += blockDim.x) arrived[i] = 0;
}

}  // namespace

void build_unit_list(const char* op, const Inputs& in, const UnitList& list, int* arrived, int64_t counts,
                     int tile_refs, int most_rows, cudaStream_t stream) {
  int threads = 128;
  while (threads < LIST_THREADS && threads < in.n) threads *= 2;
  unit_kernel<<<1, threads, 0, stream>>>(in, list, arrived, counts, tile_refs, most_rows);
  check_launch(op);
}

void zero_arrivals(const char* op, int* arrived, int64_t counts, cudaStream_t stream) {
  zero_kernel<<<1, 256, 0, stream>>>(arrived, counts);
  check_launch(op);
}

int resident_clusters(const char* op, const void* kernel, const cudaLaunchConfig_t& config, int slices) {
  static std::map<std::pair<const void*, int>, int> known;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  int& clusters = known[{kernel, slices}];
  if (clusters == 0) check_cuda(op, cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
  return clusters;
}

void run_bulk(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream) {
  const BulkLaunch launch{op, in, plan, workspace, stream};
  const bool launched = in.refs.dtype == Dtype::f16    ? launch_bulk<__half>(launch)
                        : in.refs.dtype == Dtype::bf16 ? launch_bulk<__nv_bfloat16>(launch)
                                                       : launch_bulk<float>(launch);
  if (!launched)
    throw std::runtime_error(std::string("svel::") + op + ": no compiled kernel for the planned tile");
}

}  // namespace svel::cuda
