// Launches of the pool kernel: 32 rows at a time.
#include <algorithm>

#include "common/tensor_map.cuh"
#include "stable_target/launch.cuh"
#include "stable_target/pool_best.cuh"

namespace svel::cuda {

void run_pool(const char* op, const Inputs& in, const Plan& plan, void* workspace, double* doubtful,
              cudaStream_t stream) {
  const auto kernel = plan.fast ? pool_kernel<false> : pool_kernel<true>;
  const void* const entry = reinterpret_cast<const void*>(kernel);
  check_cuda(op, cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(plan.smem_bytes)));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {POOL_CLUSTER, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(POOL_CLUSTER);
  config.blockDim = dim3(POOL_THREADS);
  config.dynamicSmemBytes = static_cast<size_t>(plan.smem_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const int64_t clusters =
      std::min<int64_t>(resident_clusters(op, entry, config, POOL_CLUSTER), plan.blocks / POOL_CLUSTER);
  const PoolParts cut = pool_parts(in.m, clusters);
  config.gridDim = dim3(static_cast<unsigned>(cut.clusters * POOL_CLUSTER));

  Carver carver(workspace);
  PoolRows made{};
  made.parts = cut.clusters * cut.segments;
  if (made.parts > POOL_MOST_PARTS || cut.clusters > POOL_MOST_CLUSTERS)
    throw std::runtime_error(std::string("svel::") + op + ": more parts of the pool than one merge holds");
  const int most_steps = static_cast<int>(cut.clusters) * POOL_LISTED;
  made.upper = carver.take<__half>(POOL_ROWS * POOL_D);
  made.lower = carver.take<__half>(POOL_ROWS * POOL_D);
  made.factors = carver.take<float4>(POOL_ROWS);
  made.rows = carver.take<PoolRow>(POOL_ROWS);
  made.mean_norm = carver.take<float>(1);
  made.total = carver.take<double>(made.parts * POOL_ROWS);
  float* const centre = carver.take<float>(POOL_D);
  int64_t* const valid = carver.take<int64_t>(2);
  double* const scratch = carver.take<double>(2 * POOL_CLUSTER);
  PoolArgs args{};
  args.upper = made.upper, args.lower = made.lower, args.factors = made.factors,
  args.mean_norm = made.mean_norm;
  args.centre = centre, args.valid = valid, args.total = made.total;
  args.best = carver.take<float>(made.parts * POOL_ROWS);
  args.moment = carver.take<double>(made.parts * POOL_ROWS);
  args.sums = carver.take<float>(made.parts * POOL_ROWS * in.d);
  args.d = static_cast<int>(in.d);
  args.segments = static_cast<int>(cut.segments);
  args.segment_tiles = static_cast<int>(cut.segment_tiles);

  const unsigned merge_blocks = static_cast<unsigned>((in.d + 255) / 256);
  PoolSums* const left = carver.take<PoolSums>(POOL_ROWS * merge_blocks);
  args.list = carver.take<PoolBest>(POOL_ROWS * most_steps);
  PoolAgain* const again = carver.take<PoolAgain>(POOL_ROWS);
  PoolStep* const steps = carver.take<PoolStep>(POOL_ROWS * most_steps);

  const CUtensorMap map = map_rows(op, in.refs.data, Dtype::f16, in.d, in.m, 2 * in.d, POOL_TILE);
  pool_centre_kernel<<<POOL_CLUSTER, POOL_SLICE, 0, stream>>>(in, centre, valid, scratch);
  check_launch(op);
  for (int64_t first = 0; first < in.n; first += POOL_ROWS) {
    args.rows = static_cast<int>(std::min<int64_t>(POOL_ROWS, in.n - first));
    pool_prepare_kernel<<<POOL_ROWS + 1, POOL_PREPARE_THREADS, 0, stream>>>(in, centre, valid, first, made);
    check_launch(op);
    check_cuda(op, cudaLaunchKernelEx(&config, kernel, args, map));
    const int parts = static_cast<int>(made.parts);
    if (!plan.fast) {
      pool_again_kernel<<<dim3(POOL_AGAIN_BLOCKS, static_cast<unsigned>(args.rows)), 32 * POOL_AGAIN_WARPS, 0,
                          stream>>>(in, args, made.rows, parts, static_cast<int>(cut.clusters), again, steps);
      check_launch(op);
    }
    pool_merge_kernel<<<dim3(merge_blocks, static_cast<unsigned>(args.rows)), 256, 0, stream>>>(
        in, args, made.rows, parts, plan.fast ? nullptr : again, steps, most_steps, left);
    check_launch(op);
    if (plan.fast) continue;
    pool_judge_kernel<<<1, POOL_ROWS, 0, stream>>>(in, args, made.rows, again, left,
                                                   static_cast<int>(merge_blocks), doubtful);
    check_launch(op);
  }
}

void replace_doubtful(const char* op, const Inputs& in, const double* doubtful, const Array& exact,
                      const Array& lse, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((in.d + 255) / 256), static_cast<unsigned>(in.n));
  pool_replace_kernel<<<grid, 256, 0, stream>>>(in, doubtful, exact, lse);
  check_launch(op);
}

}  // namespace svel::cuda
