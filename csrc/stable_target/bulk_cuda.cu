// Launches of the bulk kernel: the list of compiled tiles is that of the planner.
#include <map>
#include <mutex>
#include <utility>

#include "stable_target/bulk.cuh"
#include "stable_target/launch.cuh"

namespace svel::cuda {
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
  const Ranges ranges(list, teams, rows);
  const int64_t from = ranges.first_team(list, u), to = ranges.last_team(list, u);
  if (from == to) return;
  const Unit unit = list.units[u];
  const int count = static_cast<int>(to - from) + 1;
  for (int r = 0; r < unit.rows; ++r) {
    const Row row = list.rows[unit.first_row + r];
    const auto slot = [&](int j, int64_t rank) {
      return (2 * ((from + j) * layout.slices + rank) + (j == 0 ? 1 : 0)) * rows + r;
    };
    double top = -INFINITY;
    for (int j = threadIdx.x; j < count; j += MERGE_THREADS) {
      const double other = parts.best[slot(j, 0)];
      top = top >= other || other != other ? top : other;
    }
    const double best = block_max<double>(top, scratch);
    double share = 0;
    for (int j = threadIdx.x; j < count; j += MERGE_THREADS) {
      weights[j] = exp(row.rate() * (static_cast<double>(parts.best[slot(j, 0)]) - best));
      share += weights[j] * parts.total[slot(j, 0)];
    }
    const double total = block_sum<double>(share, scratch);
    const int64_t end = min((chunk + 1) * MERGE_ELEMENTS, in.d);
    for (int64_t e = chunk * MERGE_ELEMENTS + threadIdx.x; e < end; e += MERGE_THREADS) {
      const int64_t rank = e / layout.slice, local = e % layout.slice;
      double sum = 0;
#pragma unroll 8
      for (int j = 0; j < count; ++j) sum += weights[j] * parts.sums[slot(j, rank) * layout.slice + local];
      const double mean = parts.centres[(from * layout.slices + rank) * layout.slice + local] + sum / total;
      const int64_t at = row.index * in.d + e;
      store_as(in.out, at, row.a * load_as<double>(in.x, at) + row.b * mean);
    }
    if (in.lse.data && chunk == 0 && threadIdx.x == 0) {
      const double square = layout.slices == 1 ? parts.y_squares[unit.first_row + r] : 0;
      const double shift = row.rate() * best - square / (2 * row.sigma * row.sigma);
      store_as(in.lse, row.index, log(total) + shift + 0.5 * static_cast<double>(in.d));
    }
    __syncthreads();  // weights are read above and overwritten next
  }
}

// The part of lse that the blocks of a team hold separately.
__global__ void squares_kernel(const Inputs in, const UnitList list, const BulkParts parts,
                               const BulkLayout layout) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= in.n - list.sizes[1]) return;
  const Row row = list.rows[i];
  double square = 0;
  for (int rank = 0; rank < layout.slices; ++rank) square += parts.y_squares[i * layout.slices + rank];
  store_as(in.lse, row.index, load_as<double>(in.lse, row.index) - square / (2 * row.sigma * row.sigma));
}

// Teams that run at once; the answer for a kernel and a cluster size does not change.
int resident_clusters(const char* op, const void* kernel, const cudaLaunchConfig_t& config, int slices) {
  static std::map<std::pair<const void*, int>, int> known;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  int& clusters = known[{kernel, slices}];
  if (clusters == 0) check_cuda(op, cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
  return clusters;
}

struct Launch {
  const char* op;
  const Inputs& in;
  const Plan& plan;
  void* workspace;
  cudaStream_t stream;

  template <typename T, int SIDE, int Q, int TR, int R, int BLOCKS>
  bool run_if() const {
    using Kernel = Bulk<T, SIDE, Q, TR, R>;
    static_assert(Kernel::FIXED_BYTES + 64 <= bulk_fixed_smem(SIDE), "the planner reserves less");
    if (in.refs.dtype != DtypeOf<T>::value || plan.threads != Kernel::THREADS || plan.tile_d != SIDE * Q ||
        plan.tile_refs != TR || plan.tile_rows != R)
      return false;
    const auto kernel = bulk_kernel<T, SIDE, Q, TR, R, BLOCKS>;
    const void* const entry = reinterpret_cast<const void*>(kernel);
    check_cuda(op, cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(plan.smem_bytes)));

    BulkLayout layout{};
    layout.slices = static_cast<int>(plan.slices);
    layout.team = layout.slices == 1                  ? Team::block
                  : layout.slices <= BULK_MAX_CLUSTER ? Team::cluster
                                                      : Team::grid;
    layout.slice = plan.slice;
    layout.pitch = static_cast<int>(plan.pitch);
    layout.stages = plan.stages;
    layout.vectors = in.d % 8 == 0 && aligned(in.x) && aligned(in.source) && aligned(in.out);

    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config{};
    config.blockDim = dim3(Kernel::THREADS);
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
    void* const list_memory = carver.take<char>(unit_list_bytes(in.n, in.k, layout.slices));
    BulkParts parts{};
    parts.sums = carver.take<float>(2 * blocks * R * layout.slice);
    parts.running = carver.take<double>(blocks * R * layout.slice);
    parts.centres = carver.take<float>(blocks * layout.slice);
    parts.best = carver.take<float>(2 * blocks * R);
    parts.total = carver.take<double>(2 * blocks * R);
    parts.y_squares = carver.take<double>(in.n * layout.slices);
    if (layout.team == Team::grid) {
      const int64_t letters = blocks * TEAM_SLOTS * R * TR;
      parts.mail = carver.take<uint2>(letters);
      check_cuda(op, cudaMemsetAsync(parts.mail, 0, letters * sizeof(uint2), stream));
    }
    // A unit of few rows is cut into many parts where there are few units: their merge wants a launch of its
    // own.
    layout.merge_last = teams <= 8 * ((in.n + R - 1) / R);

    const UnitList list = build_unit_list(in, {TR, R, layout.slices}, list_memory, stream);
    check_launch(op);
    check_cuda(op, cudaLaunchKernelEx(&config, kernel, in, list, parts, layout));
    if (!layout.merge_last) {
      const int64_t chunks = (in.d + MERGE_ELEMENTS - 1) / MERGE_ELEMENTS;
      merge_kernel<<<static_cast<unsigned>(in.n * chunks), MERGE_THREADS, teams * sizeof(double), stream>>>(
          in, list, parts, layout, R, teams);
      check_launch(op);
    }
    if (in.lse.data && layout.slices > 1) {
      squares_kernel<<<static_cast<unsigned>((in.n + 127) / 128), 128, 0, stream>>>(in, list, parts, layout);
      check_launch(op);
    }
    return true;
  }

  static bool aligned(const Array& a) { return reinterpret_cast<uintptr_t>(a.data) % 16 == 0; }

  template <typename T, int ROWS>
  bool run_half() const {
    return run_if<T, 64, 16, 8, ROWS, 3>() || run_if<T, 128, 16, 8, ROWS, 2>() ||
           run_if<T, 256, 16, 8, ROWS, 1>() || run_if<T, 256, 32, 4, 1, 1>();
  }

  bool run_float() const {
    return run_if<float, 64, 16, 4, 2, 3>() || run_if<float, 128, 16, 4, 2, 2>() ||
           run_if<float, 256, 16, 4, 2, 1>() || run_if<float, 256, 32, 2, 1, 1>();
  }
};

}  // namespace

void run_bulk(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream) {
  const Launch launch{op, in, plan, workspace, stream};
  const bool launched = in.refs.dtype == Dtype::f16    ? launch.run_half<__half, 2>()
                        : in.refs.dtype == Dtype::bf16 ? launch.run_half<__nv_bfloat16, 1>()
                                                       : launch.run_float();
  if (!launched)
    throw std::runtime_error(std::string("svel::") + op + ": no compiled kernel for the planned tile");
}

}  // namespace svel::cuda
