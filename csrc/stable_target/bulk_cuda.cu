// What launches of the bulk kernel for all dtypes share.
#include <map>
#include <mutex>
#include <type_traits>
#include <utility>

#include "common/gather.cuh"
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

// A list of up to SHORT_ROWS rows, by one block. With rows of other processes this begins the round: the
// block hears of them, while others bring the own rows x to where they are read.
constexpr int SHORT_ROWS = 2048, SHORT_THREADS = 1024;
using ShortList = ListRows<SHORT_ROWS>;

template <bool DEAL>
__global__ void __launch_bounds__(SHORT_THREADS)
    short_list_kernel(const __grid_constant__ Gather gather, const __grid_constant__ Inputs in,
                      const UnitList list, int* arrived, int64_t counts, int tile_refs, int most_rows) {
  extern __shared__ __align__(16) char memory[];
  ShortList& scratch = *reinterpret_cast<ShortList*>(memory);
  const Peers& peers = gather.peers;
  const int tid = static_cast<int>(threadIdx.x);
  const unsigned copies = gridDim.x - 1;
  Header* const own = peers.parts > 0 ? peers.header(peers.part) : nullptr;
  const unsigned round = own ? own->round + 1 : 0;
  allow_next_launch();
  if (blockIdx.x > 0) {
    __shared__ bool last;
    for (int i = 0; i < gather.tensors; ++i) {
      if (gather.given[i].stays)
        put(gather.given[i], peers, int64_t{blockIdx.x - 1} * SHORT_THREADS + tid,
            int64_t{copies} * SHORT_THREADS);
    }
    if (is_last_block(own, copies, &last) && tid < peers.parts)
      raise_flag(&peers.header(tid)->arrived[peers.part], round);
    return;
  }
  if (own) send_words(gather, round);
  for (int64_t i = tid; i < counts; i += SHORT_THREADS) arrived[i] = 0;
  read_groups(in, scratch);
  if (own) take_words(gather, round);
  __syncthreads();
  read_keys(in, scratch);
  __syncthreads();
  build_short_list<DEAL, SHORT_THREADS>(in, list, scratch, tile_refs, most_rows, tid,
                                        [] { __syncthreads(); });
  if (!own) return;
  if (copies > 0 && tid < peers.parts) await_flag(&own->arrived[tid], round, peers, tid);
  __syncthreads();
  if (tid == 0) own->round = round;
}

// Where each block builds the list, there is still this to do, beside the bulk kernel.
__global__ void zero_kernel(int* arrived, int64_t counts) {
  allow_next_launch();
  for (int64_t i = threadIdx.x; i < counts; i += blockDim.x) arrived[i] = 0;
}

// So few, of so many registers at most, that a block fits beside one of the bulk kernel's: it is there, and
// its code, when those are done.
constexpr int MERGE_THREADS = 64, MERGE_BLOCKS = 16;
constexpr int MERGE_SHARES = 4, MERGE_MANY_SHARES = 16;  // the latter for units of MERGE_MANY parts
constexpr int64_t MERGE_MANY = 64;
constexpr int merge_elements(int shares) {  // of D per block
  return 2 * MERGE_THREADS / shares;
}

// Merges the parts of one unit over a few elements of D, two to each thread; SHARES threads of the same two
// take turns at the parts. Grid: units (at most n) x parts of D.
template <int SHARES, bool DEAL>
__global__ void __launch_bounds__(MERGE_THREADS, MERGE_BLOCKS)
    merge_kernel(const __grid_constant__ Inputs in, const UnitList list,
                 const __grid_constant__ BulkParts parts, const int slices, const int64_t slice,
                 const int rows, const int64_t teams) {
  extern __shared__ double weights[];  // (teams of the unit,)
  __shared__ double scratch[33];
  constexpr int ELEMENTS = merge_elements(SHARES), PAIRS = ELEMENTS / 2;
  __shared__ double2 sums[SHARES][PAIRS];
  const int tid = threadIdx.x, share = tid / PAIRS, pair = tid % PAIRS;
  const int chunks = static_cast<int>(ceil_div(in.d, ELEMENTS));
  const int u = static_cast<int>(blockIdx.x) / chunks, chunk = static_cast<int>(blockIdx.x) % chunks;
  const int64_t e = chunk * ELEMENTS + 2 * pair;
  const int rank = static_cast<int>(e / slice), local = static_cast<int>(e - rank * slice);
  allow_next_launch();
  wait_for_previous_launch();
  const Unit unit = list.units[u];
  if (u >= list.sizes[0]) return;
  const Ranges<DEAL> ranges(list, teams);
  if constexpr (DEAL) {
    if (u < ranges.whole) return;
  }
  int from, last;
  ranges.teams_of(list, u, from, last);
  const int count = last - from + 1;
  if (count == 1) return;
  for (int r = 0; r < unit.rows; ++r) {
    const int64_t index = list.order[unit.first + r], at = index * in.d + e;
    const auto part_of = [&](int j, int rank) {
      return (2 * ((int64_t{from} + j) * slices + rank) + (j == 0 ? 1 : 0)) * rows + r;
    };
    double top = -INFINITY;
    for (int j = tid; j < count; j += MERGE_THREADS) {
      const double other = parts.rows[part_of(j, 0)].log2_weight;
      top = top >= other || other != other ? top : other;
    }
    double x[2] = {0, 0};
    if (e < in.d && share == 0)
      x[0] = load_as<double>(x_of(in, index), at), x[1] = load_as<double>(x_of(in, index), at + 1);
    const Row row = row_coefficients(in, index);
    const double best = block_max<double>(top, scratch);
    double share_of_all = 0;
    float lead = 0, scale = 0;
    for (int j = tid; j < count; j += MERGE_THREADS) {
      const PartRow part = parts.rows[part_of(j, 0)];
      weights[j] = exp2(part.log2_weight - best);
      share_of_all += weights[j] * part.total;
      lead = fmaxf(lead, static_cast<float>(weights[j]) * part.lead), scale = fmaxf(scale, part.scale);
    }
    const PartRow all{best, block_sum<double>(share_of_all, scratch),
                      static_cast<float>(block_max<double>(lead, scratch)),
                      static_cast<float>(block_max<double>(scale, scratch))};
    double2 sum = make_double2(0, 0);
    if (e < in.d) {
#pragma unroll 9
      for (int j = share; j < count; j += SHARES) {
        const double2 part = *reinterpret_cast<const double2*>(parts.sums + part_of(j, rank) * slice + local);
        sum.x = fma(weights[j], part.x, sum.x), sum.y = fma(weights[j], part.y, sum.y);
      }
    }
    sums[share][pair] = sum;
    __syncthreads();
    if (share == 0 && e < in.d) {
      for (int other = 1; other < SHARES; ++other) sum.x += sums[other][pair].x, sum.y += sums[other][pair].y;
      const Array out = out_of(in, index);
      store_as(out, at, row.a * x[0] + row.b * (sum.x / all.total));
      store_as(out, at + 1, row.a * x[1] + row.b * (sum.y / all.total));
    }
    if (chunk == 0 && tid == 0) finish_row(in, parts, {}, index, all, nullptr);
    __syncthreads();  // weights and sums are read above and overwritten next
  }
}

constexpr int END_THREADS = 128, END_FEW_BLOCKS = 4;  // END_FEW_BLOCKS: to a multiprocessor, of few rows

// The results of an own row over the elements `at`, from its mean over this part and those that the others
// have left in the mailbox, when these are there. All threads.
template <int VECTORS>
__device__ __forceinline__ void merge_at_home(const Inputs& in, const AtHome& home, int64_t row, double lse,
                                              const int64_t (&at)[VECTORS], const bool (&within)[VECTORS],
                                              const float4 (&x)[VECTORS], float4 (&mean)[VECTORS]) {
  const int q = static_cast<int>(threadIdx.x);
  const double t = clamp_time(load_as<double>(in.time_or_alpha, in.part * in.rows_each + row));
  const PredictionCoefficients at_time =
      prediction_coefficients(home.prediction, path_coefficients(in.path, t));
  char* const mailbox = home.mailbox;
  const Header* const own = reinterpret_cast<const Header*>(mailbox);
  if (q < in.parts && q != in.part)
    await_flag(&own->done[q], own->round, {{}, in.part, in.parts, home.patience}, q);
  __syncthreads();
  double top = lse, total = 1;
#pragma unroll 1
  for (int of = 0; of < in.parts; ++of) {
    if (of == in.part) continue;
    const int64_t index = of * in.rows_each + row;
    const double its = __ldcg(reinterpret_cast<const double*>(mailbox + in.lse_at) + index);
    float4 other[VECTORS];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      other[v] = make_float4(0, 0, 0, 0);
      if (within[v])
        other[v] = __ldcg(reinterpret_cast<const float4*>(
            reinterpret_cast<const float*>(mailbox + in.mean_at) + index * in.d + at[v]));
    }
    const double most = its >= top || its != its ? its : top;
    const double so_far = power(LOG2_E * (top - most)), weight = power(LOG2_E * (its - most));
    const float a = static_cast<float>(so_far), b = static_cast<float>(weight);
    total = fma(so_far, total, weight), top = most;
    const auto add = [&](float& to, float value) {  // the mean over nothing is NaN
      to = (a > 0 ? a * to : a) + (b > 0 ? b * value : b);
    };
#pragma unroll
    for (int v = 0; v < VECTORS; ++v)
      add(mean[v].x, other[v].x), add(mean[v].y, other[v].y), add(mean[v].z, other[v].z),
          add(mean[v].w, other[v].w);
  }
  const double by = at_time.b / total;
  const auto result = [&](float x, float sum) {
    return static_cast<float>(fma(at_time.a, static_cast<double>(x), by * static_cast<double>(sum)));
  };
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    if (within[v])
      *reinterpret_cast<float4*>(home.merged + row * in.d + at[v]) =
          make_float4(result(x[v].x, mean[v].x), result(x[v].y, mean[v].y), result(x[v].z, mean[v].z),
                      result(x[v].w, mean[v].w));
  }
}

// A row's result over VECTORS times 4 LANES of D from what products_kernel has left. The threads of a block
// take LANES by LANES shares of the parts. MERGES: the result is over the parts of all processes. Grid: rows,
// those of this process, x chunks of D.
template <int LANES, int VECTORS, bool MERGES>
__global__ void __launch_bounds__(END_THREADS, LANES < END_THREADS ? END_FEW_BLOCKS : 1024 / END_THREADS)
    end_kernel(const __grid_constant__ Inputs in, const __grid_constant__ ProductsParts parts) {
  constexpr int SHARES = END_THREADS / LANES;
  static_assert(!MERGES || SHARES == 1, "a thread has all of its elements");
  using Sum = std::conditional_t<(SHARES > 1), float, double>;  // few rows wait for its latency
  extern __shared__ double weights[];                           // (blocks,) of the row's other parts
  __shared__ double scratch[33];
  __shared__ Sum sums[SHARES][VECTORS][LANES][4];
  const int64_t chunks = ceil_div(in.d, 4 * LANES * VECTORS);
  const int64_t row = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const int64_t index = row + in.part * in.rows_each;
  const int lane = threadIdx.x % LANES, share = threadIdx.x / LANES;
  const float* const x = static_cast<const float*>(in.x.data) + index * in.d;  // parts give means: a = 0
  int64_t at[VECTORS];
  bool within[VECTORS];
  float4 mine[VECTORS], first[VECTORS];
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    at[v] = 4 * ((chunk * VECTORS + v) * LANES + lane), within[v] = at[v] < in.d;
    mine[v] = first[v] = make_float4(0, 0, 0, 0);
    if (MERGES && within[v]) mine[v] = *reinterpret_cast<const float4*>(parts.home.x + row * in.d + at[v]);
    if (within[v] && share == 0 && !in.mailboxes) mine[v] = *reinterpret_cast<const float4*>(x + at[v]);
  }
  wait_for_previous_launch();
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    if (within[v] && share == 0)
      first[v] = __ldcg(reinterpret_cast<const float4*>(parts.firsts + index * in.d + at[v]));
  }
  const ProductsRow left = parts.rows[index];
  const int others = left.to - left.from;  // negative: nothing to read
  const auto part_of = [&](int j) { return (left.from + 1 + j) * PRODUCTS_ROWS + left.row; };
  const auto load_other = [&](int j) {
    const PartRow* const from = parts.others + part_of(j);
    const double2 weights = __ldcg(reinterpret_cast<const double2*>(&from->log2_weight));
    return PartRow{weights.x, weights.y, 0, 0};
  };
  const auto load_sums = [&](int j, int v) {
    return __ldcg(reinterpret_cast<const float4*>(parts.sums + part_of(j) * in.d + at[v]));
  };
  float4 early[VECTORS];  // of the first part that this thread adds: its weight takes a while
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    early[v] = make_float4(0, 0, 0, 0);
    if (within[v] && share < others) early[v] = load_sums(share, v);
  }
  // Each warp weighs the parts, the first and up to 31 others by a lane for each.
  const int part = threadIdx.x % 32 - 1;
  constexpr int NEAR = 31;
  PartRow all = left.own;
  if (others < 0) all.total = NAN;
  double weight = 1, by_source = 0;
  const float* source = nullptr;
  if (in.source.data && others >= 0) source = static_cast<const float*>(in.source.data) + index * in.d;
  if (others > 0 || source) {
    PartRow mine{-INFINITY, 0, 0, 0};
    if (part < 0) {
      mine = left.own;
    } else if (part < others) {
      mine = load_other(part);
    }
    const auto greater = [](double a, double b) { return a >= b || b != b ? a : b; };
    double top = mine.log2_weight;
    if (source) {  // a part like any other
      const Row row = row_coefficients(in, index);
      double score = 0, square = 0;
      for (int64_t i = threadIdx.x; i < in.d; i += END_THREADS) {
        const double s = source[i], y = row.sign * x[i];
        score = fma(fma(-0.5 * row.alpha, s, y), s, score);
        square = fma(y, y, square);
      }
      score = row.rate() * fma(score, 0.0, score);  // what is not finite becomes NaN
      if (in.lse.data || in.labels[index] < 0) score -= 0.5 * square / (row.sigma * row.sigma);
      by_source = LOG2_E * block_sum<double>(score, scratch);
      top = greater(top, by_source);
    }
#pragma unroll 1
    for (int j = NEAR + 1 + part; j < others; j += 32) top = greater(top, load_other(j).log2_weight);
#pragma unroll 1
    for (int hop = 16; hop > 0; hop /= 2) top = greater(top, __shfl_xor_sync(0xffffffffu, top, hop));
    weight = power(mine.log2_weight - top);
    double total = weight * mine.total;
#pragma unroll 1
    for (int j = NEAR + 1 + part; j < others; j += 32) {
      const PartRow far = load_other(j);
      weights[j] = power(far.log2_weight - top);
      total = fma(weights[j], far.total, total);
    }
#pragma unroll 1
    for (int hop = 16; hop > 0; hop /= 2) total += __shfl_xor_sync(0xffffffffu, total, hop);
    if (source) by_source = power(by_source - top);
    all.log2_weight = top, all.total = total + by_source;
  }
  const Sum mine_by = static_cast<Sum>(weight), by_first = __shfl_sync(0xffffffffu, mine_by, 0);
  if (others > NEAR) __syncthreads();
  const double by = (MERGES ? 1 : left.b) / all.total;
  const Array out = out_of(in, index);
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    Sum sum[4] = {by_first * first[v].x, by_first * first[v].y, by_first * first[v].z, by_first * first[v].w};
    const auto add = [&](Sum weight, float4 four) {
      sum[0] = fma(weight, static_cast<Sum>(four.x), sum[0]);
      sum[1] = fma(weight, static_cast<Sum>(four.y), sum[1]);
      sum[2] = fma(weight, static_cast<Sum>(four.z), sum[2]);
      sum[3] = fma(weight, static_cast<Sum>(four.w), sum[3]);
    };
#pragma unroll 4
    for (int first = 0; first < others; first += SHARES) {
      const int j = first + share;
      const Sum near = __shfl_sync(0xffffffffu, mine_by, min(j, NEAR - 1) + 1);
      if (within[v] && j < others)
        add(j < NEAR ? near : static_cast<Sum>(weights[j]), first == 0 ? early[v] : load_sums(j, v));
    }
    if (SHARES > 1) {
      for (int k = 0; k < 4; ++k) sums[share][v][lane][k] = sum[k];
      __syncthreads();
      for (int k = 0; k < 4; ++k) {
        for (int other = 1; other < SHARES; ++other) sum[k] += sums[other][v][lane][k];
      }
    }
    if (!within[v] || share > 0) continue;
    if (source) add(static_cast<Sum>(by_source), *reinterpret_cast<const float4*>(source + at[v]));
    if constexpr (MERGES) {
      early[v] = make_float4(static_cast<float>(by * sum[0]), static_cast<float>(by * sum[1]),
                             static_cast<float>(by * sum[2]), static_cast<float>(by * sum[3]));
      continue;
    }
    *reinterpret_cast<float4*>(static_cast<float*>(out.data) + index * in.d + at[v]) =
        make_float4(static_cast<float>(fma(left.a, static_cast<double>(mine[v].x), by * sum[0])),
                    static_cast<float>(fma(left.a, static_cast<double>(mine[v].y), by * sum[1])),
                    static_cast<float>(fma(left.a, static_cast<double>(mine[v].z), by * sum[2])),
                    static_cast<float>(fma(left.a, static_cast<double>(mine[v].w), by * sum[3])));
  }
  if constexpr (MERGES) {
    const double lse = others < 0 ? lse_of_nothing(in, index) : lse_of_row(in, all);
    merge_at_home<VECTORS>(in, parts.home, row, lse, at, within, mine, early);
  } else {
    if (in.lse.data && chunk == 0 && threadIdx.x == 0) write_lse(in, index, all);
  }
}

template <int LANES, int VECTORS>
bool launch_end_if(const char* op, const Inputs& in, const ProductsParts& parts, int64_t blocks,
                   int64_t multiprocessors, cudaStream_t stream) {
  const int64_t grid = (in.mailboxes ? in.rows_each : in.n) * ceil_div(in.d, 4 * LANES * VECTORS);
  if (LANES < END_THREADS && (grid > END_FEW_BLOCKS * multiprocessors || parts.home.merged)) return false;
  constexpr bool MERGES = LANES == END_THREADS;
  launch_following(
      op, true, parts.home.merged ? end_kernel<LANES, VECTORS, MERGES> : end_kernel<LANES, VECTORS, false>,
      dim3(static_cast<unsigned>(grid)), END_THREADS, blocks * sizeof(double), stream, in, parts);
  return true;
}

}  // namespace

bool has_short_list(int64_t n, int64_t k, int64_t m) {
  return n <= SHORT_ROWS && k <= OWN_LIST_GROUPS && m < int64_t{1} << 31;
}

// Few rows have many parts each.
void end_products(const char* op, const Inputs& in, const ProductsParts& parts, int64_t blocks,
                  int64_t multiprocessors, cudaStream_t stream) {
  launch_end_if<8, 1>(op, in, parts, blocks, multiprocessors, stream) ||
      launch_end_if<32, 1>(op, in, parts, blocks, multiprocessors, stream) ||
      launch_end_if<END_THREADS, 2>(op, in, parts, blocks, multiprocessors, stream);
}

void build_unit_list(const char* op, const Inputs& in, const UnitList& list, int* arrived, int64_t counts,
                     int tile_refs, int most_rows, cudaStream_t stream) {
  if (has_short_list(in.n, in.k, in.m)) {
    Gather gather{};
    int64_t copies = 0;
    if (in.gather) {
      gather = *in.gather;
      for (int i = 0; i < gather.tensors; ++i) {
        const Given& g = gather.given[i];
        if (g.stays) copies = std::clamp<int64_t>(g.bytes / g.unit / (GATHER_UNROLL * SHORT_THREADS), 1, 64);
      }
    }
    const auto kernel = list.costs.deal ? short_list_kernel<true> : short_list_kernel<false>;
    check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(sizeof(ShortList))));
    kernel<<<static_cast<unsigned>(1 + copies), SHORT_THREADS, sizeof(ShortList), stream>>>(
        gather, in, list, arrived, counts, tile_refs, most_rows);
    return check_launch(op);
  }
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
  const bool many = teams >= MERGE_MANY * ceil_div(in.n, rows);
  const int64_t chunks = ceil_div(in.d, merge_elements(many ? MERGE_MANY_SHARES : MERGE_SHARES));
  const auto kernel =
      list.costs.deal ? (many ? merge_kernel<MERGE_MANY_SHARES, true> : merge_kernel<MERGE_SHARES, true>)
                      : (many ? merge_kernel<MERGE_MANY_SHARES, false> : merge_kernel<MERGE_SHARES, false>);
  launch_following(op, true, kernel, dim3(static_cast<unsigned>(in.n * chunks)), MERGE_THREADS,
                   teams * sizeof(double), stream, in, list, parts, static_cast<int>(slices), slice, rows,
                   teams);
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
