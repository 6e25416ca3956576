// Launches of the pool kernel, 32 rows at a time, and of what is around it.
#include <algorithm>

#include "common/tensor_map.cuh"
#include "stable_target/launch.cuh"
#include "stable_target/pool_bank.cuh"
#include "stable_target/pool_bank.h"
#include "stable_target/pool_settle.cuh"

namespace svel::cuda {
namespace {

// All rows of a pool; BANK: the rows of label -1, as many as there may be, `at_once` passes of 32 rows to a
// launch. doubtful: (words,).
template <bool BANK>
void run_passes(const char* op, const Inputs& in, const Plan& plan, int64_t at_once, PoolBankIf<BANK> bank,
                uint64_t* doubtful, int words, Carver& carver, int64_t room, cudaStream_t stream) {
  const auto kernel = plan.fast ? pool_kernel<false, BANK> : pool_kernel<true, BANK>;
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
  const int64_t references = in.k * in.m;
  const PoolParts cut = pool_parts(references, clusters);
  config.gridDim = dim3(static_cast<unsigned>(cut.clusters * POOL_CLUSTER));
  config.numAttrs = 2;

  const int64_t rows_at_once = at_once * POOL_ROWS;
  PoolRows made{};
  made.parts = cut.clusters * cut.segments;
  if (made.parts > POOL_MOST_PARTS || cut.clusters > POOL_MOST_CLUSTERS)
    throw std::runtime_error(std::string("svel::") + op + ": more parts of the pool than one merge holds");
  const int most_steps = static_cast<int>(cut.clusters) * POOL_LISTED;
  made.upper = carver.take<__half>(rows_at_once * POOL_D);
  made.lower = carver.take<__half>(rows_at_once * POOL_D);
  made.factors = carver.take<float4>(rows_at_once);
  made.rows = carver.take<PoolRow>(rows_at_once);
  made.merged = carver.take<int>(rows_at_once);
  made.total = carver.take<double>(made.parts * rows_at_once);
  float* const centre = carver.take<float>(POOL_D);
  int64_t* const valid = carver.take<int64_t>(2);
  float* const mean_norm = carver.take<float>(1);
  double* const scratch = carver.take<double>(3 * POOL_CLUSTER);
  PoolArgs args{};
  args.upper = made.upper, args.lower = made.lower, args.factors = made.factors, args.mean_norm = mean_norm;
  args.centre = centre, args.valid = valid, args.total = made.total;
  args.best = carver.take<float>(made.parts * rows_at_once);
  args.moment = carver.take<double>(made.parts * rows_at_once);
  args.sums = carver.take<float>(made.parts * rows_at_once * in.d);
  args.d = static_cast<int>(in.d);
  args.segments = static_cast<int>(cut.segments);
  args.segment_tiles = static_cast<int>(cut.segment_tiles);

  const unsigned merge_blocks = static_cast<unsigned>(ceil_div(in.d, POOL_MERGE_THREADS));
  PoolSums* const left = carver.take<PoolSums>(rows_at_once * merge_blocks);
  PoolPart* const settled = carver.take<PoolPart>(config.gridDim.x);
  args.list = carver.take<PoolBest>(rows_at_once * most_steps);
  PoolAgain* const again = carver.take<PoolAgain>(rows_at_once);
  PoolStep* const steps = carver.take<PoolStep>(rows_at_once * most_steps);
  carver.check(op, room);

  const CUtensorMap map = map_rows(op, in.refs.data, Dtype::f16, in.d, references, 2 * in.d, POOL_TILE);
  const PoolJudged judged{plan.fast ? nullptr : again, steps, most_steps, left, made.merged, doubtful};
  const int parts = static_cast<int>(made.parts), own_clusters = static_cast<int>(cut.clusters);
  pool_centre_kernel<BANK>
      <<<POOL_CLUSTER, POOL_SLICE, 0, stream>>>(in, centre, valid, mean_norm, doubtful, scratch, bank);
  check_launch(op);
  for (int64_t first = 0; first < in.n; first += rows_at_once) {
    const int64_t here = std::min(rows_at_once, in.n - first), passes = ceil_div(here, POOL_ROWS);
    if constexpr (BANK) bank.first = static_cast<int>(first);
    launch_following(op, true, pool_prepare_kernel<BANK>, dim3(POOL_ROWS + 1, static_cast<unsigned>(passes)),
                     POOL_PREPARE_THREADS, 0, stream, in, centre, mean_norm, first, made, bank);
    args.rows = static_cast<int>(std::min<int64_t>(POOL_ROWS, here));
    config.gridDim.y = static_cast<unsigned>(passes);
    check_cuda(op, cudaLaunchKernelEx(&config, kernel, args, map, bank));
    const unsigned rows = static_cast<unsigned>(here);
    if (!plan.fast)
      launch_following(op, true, pool_again_kernel<BANK>, dim3(POOL_AGAIN_BLOCKS, rows),
                       32 * POOL_AGAIN_WARPS, 0, stream, in, args, made.rows, parts, own_clusters, again,
                       steps, bank);
    launch_following(op, true, pool_merge_kernel<BANK>, dim3(merge_blocks, rows), POOL_MERGE_THREADS, 0,
                     stream, in, args, made.rows, parts, judged, own_clusters, bank);
  }
  if (plan.fast) return;
  // The sums of the last rows are merged: there is room for as many in float64 as it has blocks.
  static_assert(POOL_ROWS * sizeof(float) >= POOL_CLUSTER * sizeof(double));
  launch_together(op, pool_settle_kernel<BANK>, config.gridDim.x, POOL_SETTLE_THREADS, 0, stream, in,
                  static_cast<const uint64_t*>(doubtful), settled, reinterpret_cast<double*>(args.sums),
                  words, bank);
}

}  // namespace

void run_pool(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream) {
  Carver carver(workspace);
  uint64_t* const doubtful = carver.take<uint64_t>(1);
  run_passes<false>(op, in, plan, 1, {}, doubtful, 1, carver, plan.workspace_bytes, stream);
}

void run_pool_bank(const char* op, const Inputs& in, const Plan& plan, const PoolBankPlan& bank,
                   void* workspace, cudaStream_t stream) {
  Carver carver(static_cast<char*>(workspace) + pool_bank_offset(plan));
  PoolFound found{};
  found.labels = carver.take<int64_t>(in.n);
  found.order = carver.take<int>(in.n);
  found.sizes = carver.take<int>(2);
  found.tiles = carver.take<PoolTile>(ceil_div(in.k * in.m, POOL_TILE));
  found.words = static_cast<int>(ceil_div(in.n, 64));
  found.doubtful = carver.take<uint64_t>(found.words);
  pool_null_kernel<<<1, LIST_THREADS, 0, stream>>>(in, found);
  check_launch(op);
  Inputs of_classes = in;
  of_classes.labels = found.labels;
  run_bulk(op, of_classes, plan, workspace, stream);
  run_passes<true>(op, in, bank.pool, bank.at_once, {found.tiles, found.order, found.sizes, 0},
                   found.doubtful, found.words, carver, bank.pool.workspace_bytes, stream);
}

}  // namespace svel::cuda
