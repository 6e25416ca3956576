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

constexpr int MERGE_THREADS = 128;
constexpr int64_t MERGE_ELEMENTS = 32;  // of D per block: few rows, so many blocks for each

// Merges the parts of one unit over MERGE_ELEMENTS of D, one to each lane; every warp takes a share of the
// parts. Grid: units (at most n) x parts of D.
__global__ void __launch_bounds__(MERGE_THREADS)
    merge_kernel(const Inputs in, const UnitList list, const BulkParts parts, const int64_t slices,
                 const int64_t slice, const int rows, const int64_t teams) {
  extern __shared__ double weights[];  // (teams of the unit,)
  __shared__ double scratch[33];
  __shared__ double sums[MERGE_THREADS / 32][MERGE_ELEMENTS];
  allow_next_launch();
  wait_for_previous_launch();
  const int64_t chunks = (in.d + MERGE_ELEMENTS - 1) / MERGE_ELEMENTS;
  const int u = static_cast<int>(blockIdx.x / chunks);
  const int64_t chunk = blockIdx.x % chunks;
  if (u >= list.sizes[0]) return;
  const Ranges ranges(list, teams);
  const int64_t from = ranges.first_team(list, u), to = ranges.last_team(list, u);
  if (from == to) return;
  const Unit unit = list.units[u];
  const int count = static_cast<int>(to - from) + 1;
  const int64_t begin = chunk * MERGE_ELEMENTS;
  for (int r = 0; r < unit.rows; ++r) {
    bool finite;
    const Row row = make_row(in, list.order[unit.first + r], 0, finite);
    const auto part_of = [&](int j, int64_t rank) {
      return (2 * ((from + j) * slices + rank) + (j == 0 ? 1 : 0)) * rows + r;
    };
    double top = -INFINITY;
    for (int j = threadIdx.x; j < count; j += MERGE_THREADS) {
      const double other = parts.rows[part_of(j, 0)].log2_weight;
      top = top >= other || other != other ? top : other;
    }
    const double best = block_max<double>(top, scratch);
    double share = 0;
    float lead = 0, scale = 0;
    for (int j = threadIdx.x; j < count; j += MERGE_THREADS) {
      const PartRow part = parts.rows[part_of(j, 0)];
      weights[j] = exp2(part.log2_weight - best);
      share += weights[j] * part.total;
      lead = fmaxf(lead, static_cast<float>(weights[j]) * part.lead), scale = fmaxf(scale, part.scale);
    }
    const PartRow all{best, block_sum<double>(share, scratch),
                      static_cast<float>(block_max<double>(lead, scratch)),
                      static_cast<float>(block_max<double>(scale, scratch))};
    constexpr int WARPS = MERGE_THREADS / 32;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, each = (count + WARPS - 1) / WARPS;
    const int64_t e = begin + lane;
    if (e < in.d) {
      const int64_t rank = e / slice, local = e % slice;
      double sum = 0;
#pragma unroll 8
      for (int j = warp * each; j < min(count, (warp + 1) * each); ++j)
        sum = fma(weights[j], parts.sums[part_of(j, rank) * slice + local], sum);
      sums[warp][lane] = sum;
    }
    __syncthreads();
    if (warp == 0 && e < in.d) {
      double sum = 0;
      for (int w = 0; w < WARPS; ++w) sum += sums[w][lane];
      const int64_t at = row.index * in.d + e;
      const double x = load_as<double>(x_of(in, row.index), at);
      store_as(out_of(in, row.index), at, row.a * x + row.b * (sum / all.total));
    }
    if (chunk == 0 && threadIdx.x == 0) finish_row(in, parts, {}, row.index, all, nullptr);
    __syncthreads();  // weights are read above and overwritten next
  }
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

void merge_parts(const char* op, const Inputs& in, const UnitList& list, const BulkParts& parts,
                 int64_t slices, int64_t slice, int rows, int64_t teams, cudaStream_t stream) {
  const int64_t chunks = (in.d + MERGE_ELEMENTS - 1) / MERGE_ELEMENTS;
  cudaLaunchAttribute overlaps{};
  overlaps.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlaps.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(in.n * chunks));
  config.blockDim = dim3(MERGE_THREADS);
  config.dynamicSmemBytes = teams * sizeof(double);
  config.stream = stream;
  config.attrs = &overlaps;
  config.numAttrs = 1;
  check_cuda(op, cudaLaunchKernelEx(&config, merge_kernel, in, list, parts, slices, slice, rows, teams));
}

int resident_clusters(const char* op, const void* kernel, const cudaLaunchConfig_t& config, int size) {
  static std::map<std::pair<const void*, int>, int> known;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  int& clusters = known[{kernel, size}];
  if (clusters == 0) check_cuda(op, cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
  if (clusters == 0)
    throw std::runtime_error(std::string("svel::") + op + ": the device has no room for a cluster of blocks");
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
