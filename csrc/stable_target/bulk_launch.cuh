// Launches of the bulk kernel for one dtype of the references, each in a source of its own, since they take
// long to compile. The list of compiled tiles is that of the planner.
#pragma once

#include "stable_target/bulk.cuh"
#include "stable_target/launch.cuh"

namespace svel::cuda {

// Launches what fills the list of units and sets `arrived`, (counts,), to zero; or that alone. The next
// kernel on the stream may be launched to overlap with it and then waits for it itself (programmatic
// dependent launch).
void build_unit_list(const char* op, const Inputs& in, const UnitList& list, int* arrived, int64_t counts,
                     int tile_refs, int most_rows, cudaStream_t stream);
void zero_arrivals(const char* op, int* arrived, int64_t counts, cudaStream_t stream);

// Teams that run at once; the answer for a kernel and a cluster size does not change.
int resident_clusters(const char* op, const void* kernel, const cudaLaunchConfig_t& config, int slices);

struct BulkLaunch {
  const char* op;
  const Inputs& in;
  const Plan& plan;
  void* workspace;
  cudaStream_t stream;
};

// False where no kernel is compiled for the planned tile.
template <typename T>
bool launch_bulk(const BulkLaunch& launch);

namespace {

constexpr int MERGE_THREADS = 128;
constexpr int64_t MERGE_ELEMENTS = 256;  // of D per block: few rows, so many blocks for each

// Merges the parts of one unit over MERGE_ELEMENTS of D. Grid: units (at most n) x parts of D.
__global__ void __launch_bounds__(MERGE_THREADS)
    merge_kernel(const Inputs in, const UnitList list, const BulkParts parts, const BulkLayout layout,
                 const int rows, const int64_t teams) {
  extern __shared__ double weights[];  // (teams of the unit,)
  __shared__ double scratch[33];
  const int64_t chunks = (in.d + MERGE_ELEMENTS - 1) / MERGE_ELEMENTS;
  const int u = static_cast<int>(blockIdx.x / chunks);
  const int64_t chunk = blockIdx.x % chunks;
  if (u >= list.sizes[0]) return;
  const Ranges ranges(list, teams);
  const int64_t from = ranges.first_team(list, u), to = ranges.last_team(list, u);
  if (from == to) return;
  const Unit unit = list.units[u];
  const int count = static_cast<int>(to - from) + 1;
  const int64_t begin = chunk * MERGE_ELEMENTS, end = min(begin + MERGE_ELEMENTS, in.d);
  for (int r = 0; r < unit.rows; ++r) {
    bool finite;
    const Row row = make_row(in, list.order[unit.first + r], 0, finite);
    const auto part_of = [&](int j, int64_t rank) {
      return (2 * ((from + j) * layout.slices + rank) + (j == 0 ? 1 : 0)) * rows + r;
    };
    double top = -INFINITY;
    for (int j = threadIdx.x; j < count; j += MERGE_THREADS) {
      const double other = parts.rows[part_of(j, 0)].log2_weight;
      top = top >= other || other != other ? top : other;
    }
    const double best = block_max<double>(top, scratch);
    double share = 0;
    for (int j = threadIdx.x; j < count; j += MERGE_THREADS) {
      const PartRow part = parts.rows[part_of(j, 0)];
      weights[j] = exp2(part.log2_weight - best);
      share += weights[j] * part.total;
    }
    const double total = block_sum<double>(share, scratch);
    for (int64_t e = begin + threadIdx.x; e < end; e += MERGE_THREADS) {
      const int64_t rank = e / layout.slice, local = e % layout.slice;
      double sum = 0;
#pragma unroll 8
      for (int j = 0; j < count; ++j)
        sum = fma(weights[j], parts.sums[part_of(j, rank) * layout.slice + local], sum);
      const int64_t at = row.index * in.d + e;
      store_as(in.out, at, row.a * load_as<double>(in.x, at) + row.b * (sum / total));
    }
    if (in.lse.data && chunk == 0 && threadIdx.x == 0)
      store_as(in.lse, row.index, log(total) + LOG_2 * best + 0.5 * static_cast<double>(in.d));
    __syncthreads();  // weights are read above and overwritten next
  }
}

struct Launch : BulkLaunch {
  template <typename T, int THREADS, int Q, int TR, int R, int BLOCKS, bool TEAMS = false>
  bool run_if() const {
    using Kernel = Bulk<T, THREADS, Q, TR, R, BLOCKS, TEAMS>;
    static_assert(Kernel::FIXED_BYTES <= BULK_FIXED_SMEM, "the planner reserves less");
    if (in.refs.dtype != DtypeOf<T>::value || plan.threads != THREADS + BULK_PRODUCERS ||
        plan.tile_d != THREADS * Q || plan.tile_refs != TR || plan.tile_rows != R ||
        (plan.slices > 1) != TEAMS)
      return false;
    const auto kernel = bulk_kernel<T, THREADS, Q, TR, R, BLOCKS, TEAMS>;
    const void* const entry = reinterpret_cast<const void*>(kernel);
    check_cuda(op, cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(plan.smem_bytes)));

    BulkLayout layout{};
    layout.slices = static_cast<int>(plan.slices);
    layout.team = layout.slices == 1                  ? Team::block
                  : layout.slices <= BULK_MAX_CLUSTER ? Team::cluster
                                                      : Team::grid;
    layout.slice = plan.slice;
    layout.stages = plan.stages;
    layout.vectors = in.d % 8 == 0 && aligned(in.x) && aligned(in.source) && aligned(in.out);
    layout.own_list = plan.own_list;

    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config{};
    config.blockDim = dim3(THREADS + BULK_PRODUCERS);
    config.dynamicSmemBytes = plan.smem_bytes;
    config.stream = stream;
    config.attrs = attributes;
    int64_t teams = plan.blocks / layout.slices;
    if (layout.team == Team::cluster) {
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(layout.slices), 1, 1};
      config.gridDim = dim3(static_cast<unsigned>(layout.slices));
      teams = std::min<int64_t>(teams, resident_clusters(op, entry, config, layout.slices));
    }
    config.gridDim = dim3(static_cast<unsigned>(teams * layout.slices));
    if (layout.team == Team::grid) {  // its blocks wait for one another: all run at once or none
      attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
      attributes[config.numAttrs++].val.cooperative = 1;
    } else {
      attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }

    const int64_t blocks = teams * layout.slices;
    Carver carver(workspace);
    const UnitList list = place_unit_list(carver.take<char>(unit_list_bytes(in.n, in.k)), in.n, in.k);
    BulkParts parts{};
    parts.sums = carver.take<double>(2 * blocks * R * layout.slice);
    parts.rows = carver.take<PartRow>(2 * blocks * R);
    const int64_t counts = in.n * layout.slices;
    parts.arrived = carver.take<int>(counts);
    if (layout.team == Team::grid) {
      const int64_t letters = blocks * TEAM_SLOTS * Kernel::LETTERS;
      parts.mail = carver.take<uint2>(letters);
      check_cuda(op, cudaMemsetAsync(parts.mail, 0, letters * sizeof(uint2), stream));
    }
    // A unit of few rows is cut into many parts where there are few units: their merge wants a launch of its
    // own.
    layout.merge_last = teams <= 8 * ((in.n + R - 1) / R);

    if (!layout.own_list) {
      build_unit_list(op, in, list, parts.arrived, counts, TR, R, stream);
    } else if (layout.merge_last) {
      zero_arrivals(op, parts.arrived, counts, stream);
    }
    check_cuda(op, cudaLaunchKernelEx(&config, kernel, in, list, parts, layout));
    if (!layout.merge_last) {
      const int64_t chunks = (in.d + MERGE_ELEMENTS - 1) / MERGE_ELEMENTS;
      merge_kernel<<<static_cast<unsigned>(in.n * chunks), MERGE_THREADS, teams * sizeof(double), stream>>>(
          in, list, parts, layout, R, teams);
      check_launch(op);
    }
    return true;
  }

  static bool aligned(const Array& a) { return reinterpret_cast<uintptr_t>(a.data) % 16 == 0; }
};

}  // namespace
}  // namespace svel::cuda
