// Launches of the pool kernel, 32 rows at a time, and of what is around it.
#include <algorithm>

#include "common/tensor_map.cuh"
#include "stable_target/launch.cuh"
#include "stable_target/pool_settle.cuh"

namespace svel::cuda {

void run_pool(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream) {
  const auto kernel = plan.fast ? pool_kernel<false> : pool_kernel<true>;
  const void* const entry = reinterpret_cast<const void*>(kernel);
  check_cuda(op, cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(plan.smem_bytes)));
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {POOL_CLUSTER, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(POOL_CLUSTER);
  config.blockDim = dim3(POOL_THREADS);
  config.dynamicSmemBytes = static_cast<size_t>(plan.smem_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 1;
  const int64_t clusters =
      std::min<int64_t>(resident_clusters(op, entry, config, POOL_CLUSTER), plan.blocks / POOL_CLUSTER);
  const PoolParts cut = pool_parts(in.m, clusters);
  config.gridDim = dim3(static_cast<unsigned>(cut.clusters * POOL_CLUSTER));
  config.numAttrs = 2;

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
  made.merged = carver.take<int>(POOL_ROWS);
  made.total = carver.take<double>(made.parts * POOL_ROWS);
  float* const centre = carver.take<float>(POOL_D);
  int64_t* const valid = carver.take<int64_t>(2);
  float* const mean_norm = carver.take<float>(1);
  uint64_t* const doubtful = carver.take<uint64_t>(1);
  double* const scratch = carver.take<double>(3 * POOL_CLUSTER);
  PoolArgs args{};
  args.upper = made.upper, args.lower = made.lower, args.factors = made.factors, args.mean_norm = mean_norm;
  args.centre = centre, args.valid = valid, args.total = made.total;
  args.best = carver.take<float>(made.parts * POOL_ROWS);
  args.moment = carver.take<double>(made.parts * POOL_ROWS);
  args.sums = carver.take<float>(made.parts * POOL_ROWS * in.d);
  args.d = static_cast<int>(in.d);
  args.segments = static_cast<int>(cut.segments);
  args.segment_tiles = static_cast<int>(cut.segment_tiles);

  const unsigned merge_blocks = static_cast<unsigned>(ceil_div(in.d, POOL_MERGE_THREADS));
  PoolSums* const left = carver.take<PoolSums>(POOL_ROWS * merge_blocks);
  PoolPart* const settled = carver.take<PoolPart>(config.gridDim.x);
  args.list = carver.take<PoolBest>(POOL_ROWS * most_steps);
  PoolAgain* const again = carver.take<PoolAgain>(POOL_ROWS);
  PoolStep* const steps = carver.take<PoolStep>(POOL_ROWS * most_steps);

  const CUtensorMap map = map_rows(op, in.refs.data, Dtype::f16, in.d, in.m, 2 * in.d, POOL_TILE);
  const PoolJudged judged{plan.fast ? nullptr : again, steps, most_steps, left, made.merged, doubtful};
  const int parts = static_cast<int>(made.parts);
  pool_centre_kernel<<<POOL_CLUSTER, POOL_SLICE, 0, stream>>>(in, centre, valid, mean_norm, doubtful,
                                                              scratch);
  check_launch(op);
  for (int64_t first = 0; first < in.n; first += POOL_ROWS) {
    args.rows = static_cast<int>(std::min<int64_t>(POOL_ROWS, in.n - first));
    launch_following(op, true, pool_prepare_kernel, dim3(POOL_ROWS + 1), POOL_PREPARE_THREADS, 0, stream, in,
                     centre, mean_norm, first, made);
    check_cuda(op, cudaLaunchKernelEx(&config, kernel, args, map));
    const unsigned rows = static_cast<unsigned>(args.rows);
    if (!plan.fast)
      launch_following(op, true, pool_again_kernel, dim3(POOL_AGAIN_BLOCKS, rows), 32 * POOL_AGAIN_WARPS, 0,
                       stream, in, args, made.rows, parts, static_cast<int>(cut.clusters), again, steps);
    launch_following(op, true, pool_merge_kernel, dim3(merge_blocks, rows), POOL_MERGE_THREADS, 0, stream, in,
                     args, made.rows, parts, judged);
  }
  if (plan.fast) return;
  // The sums of the last rows are merged: there is room for as many in float64 as it has blocks.
  static_assert(POOL_ROWS * sizeof(float) >= POOL_CLUSTER * sizeof(double));
  attributes[0].id = cudaLaunchAttributeCooperative;  // its blocks wait for one another
  attributes[0].val.cooperative = 1;
  config.blockDim = dim3(POOL_SETTLE_THREADS);
  config.dynamicSmemBytes = 0;
  config.numAttrs = 1;
  check_cuda(op, cudaLaunchKernelEx(&config, pool_settle_kernel, in, static_cast<const uint64_t*>(doubtful),
                                    settled, reinterpret_cast<double*>(args.sums)));
}

}  // namespace svel::cuda
