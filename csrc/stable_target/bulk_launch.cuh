// Launches of the bulk kernel for one dtype of the references, each in a source of its own, since they take
// long to compile. The list of compiled tiles is that of the planner.
#pragma once

#include "stable_target/bulk_groups.cuh"
#include "stable_target/bulk_merge.cuh"
#include "stable_target/bulk_products.cuh"
#include "stable_target/bulk_teams.cuh"
#include "stable_target/launch.cuh"

namespace svel::cuda {

// Launches what fills the list of units and sets `arrived`, (counts,), to zero; or that alone. The next
// kernel on the stream may be launched to overlap with it and then waits for it itself (programmatic
// dependent launch).
void build_unit_list(const char* op, const Inputs& in, const UnitList& list, int* arrived, int64_t counts,
                     int tile_refs, int most_rows, cudaStream_t stream);
void zero_arrivals(const char* op, int* arrived, int64_t counts, cudaStream_t stream);

// From what products_kernel has left of the rows to their results.
void end_products(const char* op, const Inputs& in, const ProductsParts& parts, int64_t blocks,
                  int64_t multiprocessors, cudaStream_t stream);

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

struct Launch : BulkLaunch {
  // A sample in one block, with groups of warps, or on the matrix units.
  template <typename T, int GT, int Q, int TR>
  bool run_groups_if() const {
    using Kernel = Groups<T, GT, Q, TR>;
    static_assert(Kernel::FIXED_BYTES <= BULK_FIXED_SMEM, "the planner reserves less");
    if (in.refs.dtype != DtypeOf<T>::value || plan.slices > 1 || plan.group != GT || plan.tile_d != GT * Q ||
        plan.tile_refs != TR || plan.tile_rows != Kernel::ROWS)
      return false;
    GroupsLayout layout{};
    layout.stages = plan.stages;
    layout.in_flight = plan.in_flight;
    layout.vectors = vectors();
    layout.own_list = plan.own_list;
    layout.merge_last = merge_last(plan.blocks, plan.tile_rows);

    Carver carver(workspace);
    const UnitList list = carve_list(carver);
    BulkParts parts{};
    parts.sums = carver.take<double>(2 * plan.blocks * plan.tile_rows * in.d);
    parts.rows = carver.take<GroupsRow>(2 * plan.blocks * plan.tile_rows);
    parts.arrived = carver.take<int>(in.n);
    place_settling(carver, parts, plan.blocks, 1, in.d, layout.merge_last);
    carver.check(op, plan.workspace_bytes);
    if (!layout.own_list) {
      build_unit_list(op, in, list, parts.arrived, in.n, plan.tile_refs, plan.tile_rows, stream);
    } else if (layout.merge_last) {
      zero_arrivals(op, parts.arrived, in.n, stream);
    }
    constexpr bool DEALS = GT >= GROUPS_DEALT;
    const auto kernel =
        plan.costs.deal ? groups_kernel<T, GT, Q, TR, DEALS> : groups_kernel<T, GT, Q, TR, false>;
    run_in_blocks(kernel, !layout.own_list || layout.merge_last, list, parts, layout);
    if (!layout.merge_last) merge<T>(list, parts, plan.blocks);
    return true;
  }

  template <typename T, int CONSUMERS, int CHUNKS, int BLOCKS, bool CLUSTERED>
  bool run_products_if() const {
    using Kernel = Products<T, CONSUMERS, CHUNKS, BLOCKS, CLUSTERED, true, PRODUCTS_ROWS>;
    constexpr int LEAST = CLUSTERED ? 2 : 1;
    static_assert(Kernel::fixed_bytes(LEAST) <= products_smem(Kernel::TR, LEAST, PRODUCTS_ROWS),
                  "the planner reserves less");
    if (in.refs.dtype != DtypeOf<T>::value || !plan.products || plan.tile_d != Kernel::HELD ||
        plan.group != CONSUMERS || plan.tile_refs != Kernel::TR || (plan.slices > 1) != CLUSTERED)
      return false;
    auto kernel = in.mailboxes
                      ? products_kernel<T, CONSUMERS, CHUNKS, BLOCKS, CLUSTERED, true, false, PRODUCTS_ROWS>
                      : products_kernel<T, CONSUMERS, CHUNKS, BLOCKS, CLUSTERED, false, false, PRODUCTS_ROWS>;
    constexpr bool FOUR = !CLUSTERED && Split<T>::PARTS == 2;
    if constexpr (FOUR) {
      using Many = Products<T, CONSUMERS, CHUNKS, BLOCKS, CLUSTERED, false, PRODUCTS_MANY_ROWS>;
      static_assert(Many::fixed_bytes(LEAST) <= products_smem(Kernel::TR, LEAST, PRODUCTS_MANY_ROWS),
                    "the planner reserves less");
      if (plan.tile_rows == PRODUCTS_MANY_ROWS)
        kernel = products_kernel<T, CONSUMERS, CHUNKS, BLOCKS, CLUSTERED, false, true, PRODUCTS_MANY_ROWS>;
    }
    if constexpr (!FOUR || Kernel::HELD <= 1024) {  // others are dealt out four rows at a time
      if (plan.costs.deal && plan.tile_rows == PRODUCTS_ROWS)
        kernel = products_kernel<T, CONSUMERS, CHUNKS, BLOCKS, CLUSTERED, false, true, PRODUCTS_ROWS>;
    }
    int64_t teams = plan.blocks / plan.slices;
    if (CLUSTERED) teams = std::min<int64_t>(teams, resident_teams(kernel));
    Carver carver(workspace);
    const UnitList list = carve_list(carver);
    ProductsParts parts{};
    parts.rows = carver.take<ProductsRow>(in.n);
    parts.unit_rows = plan.tile_rows;
    parts.ends = plan.tile_rows > PRODUCTS_ROWS && !in.source.data && !in.lse.data;
    parts.others = carver.take<PartRow>(teams * plan.tile_rows);
    parts.sums = carver.take<float>(teams * plan.tile_rows * in.d);
    parts.listed = products_ties(in.n);
    parts.ties = carver.take<ProductsTie>((in.n + teams * plan.tile_rows) * parts.listed);
    parts.firsts = in.mailboxes ? carver.take<float>(in.n * in.d) : static_cast<float*>(in.out.data);
    const int64_t shared = in.mailboxes ? teams * plan.slices : 0;
    if (in.at_home) parts.home = *in.at_home;
    if (shared > 0) parts.ready = carver.take<int>(shared);
    carver.check(op, plan.workspace_bytes);
    if (!plan.own_list && in.stage != Stage::rest)
      build_unit_list(op, in, list, parts.ready, shared, plan.tile_refs, plan.tile_rows, stream);
    if (in.stage == Stage::list) return true;
    const ProductsLayout layout{plan.own_list, static_cast<int>(plan.slices), static_cast<int>(plan.slice)};
    if (CLUSTERED) {
      run_in_clusters(kernel, teams, !plan.own_list, list, parts, layout);
    } else {
      run_in_blocks(kernel, !plan.own_list, list, parts, layout);
    }
    end_products(op, in, parts, teams, teams / Kernel::RESIDENT, stream);
    return true;
  }

  template <typename Kernel>
  cudaLaunchConfig_t clusters(Kernel kernel, int64_t teams, cudaLaunchAttribute (&attributes)[2]) const {
    check_cuda(op, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(plan.smem_bytes)));
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {static_cast<unsigned>(plan.slices), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(teams * plan.slices));
    config.blockDim = dim3(GROUPS_CONSUMERS + BULK_PRODUCERS);
    config.dynamicSmemBytes = plan.smem_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 1;
    return config;
  }
  template <typename Kernel>
  int resident_teams(Kernel kernel) const {
    cudaLaunchAttribute attributes[2] = {};
    const cudaLaunchConfig_t config = clusters(kernel, 1, attributes);
    return resident_clusters(op, reinterpret_cast<const void*>(kernel), config,
                             static_cast<int>(plan.slices));
  }
  template <typename Parts, typename Layout>
  void run_in_clusters(void (*kernel)(Inputs, UnitList, Parts, Layout), int64_t teams, bool after_ours,
                       const UnitList& list, const Parts& parts, const Layout& layout) const {
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = clusters(kernel, teams, attributes);
    if (after_ours) {
      attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[1].val.programmaticStreamSerializationAllowed = 1;
      config.numAttrs = 2;
    }
    check_cuda(op, cudaLaunchKernelEx(&config, kernel, in, list, parts, layout));
  }

  UnitList carve_list(Carver& carver) const {
    return place_unit_list(carver.take<char>(unit_list_bytes(in.n, in.k)), in.n, in.k, plan.costs);
  }

  // after_ours: what came before on the stream is a kernel of ours, with which this one may overlap.
  template <typename Parts, typename Layout>
  void run_in_blocks(void (*kernel)(Inputs, UnitList, Parts, Layout), bool after_ours, const UnitList& list,
                     const Parts& parts, const Layout& layout) const {
    check_cuda(op, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(plan.smem_bytes)));
    launch_following(op, after_ours, kernel, dim3(static_cast<unsigned>(plan.blocks)), plan.threads,
                     plan.smem_bytes, stream, in, list, parts, layout);
  }

  // What rows in doubt want.
  void place_settling(Carver& carver, BulkParts& parts, int64_t blocks, int64_t slices, int64_t slice,
                      bool merge_last) const {
    parts.rounding = rounding_of_scores(in.d);
    if (merge_last) {
      parts.next = carver.take<int>(slices * in.n);
    } else {
      parts.merged = carver.take<MergedRow>(in.n);
      parts.left = carver.take<int>(blocks);
    }
    parts.doubts = carver.take<Doubt>(slices * in.n);
    parts.settled = carver.take<double>(blocks * slice);
  }

  // The teams that have parts of the only row if its group is full: all, where the unit's end is in the last
  // one's range with tiles before it (Ranges). 0 where there are more rows, and for few references.
  int guess_parts(int64_t teams) const {
    const int64_t end = plan.costs.row + plan.costs.unit, tiles = in.m / plan.tile_refs;
    return in.n == 1 && tiles * TILE_WEIGHT > (end + 2 * TILE_WEIGHT) * teams ? static_cast<int>(teams) : 0;
  }

  // The parts of all units that several of the `teams` have shared, and rows in doubt, by a launch of its
  // own.
  template <typename T>
  void merge(const UnitList& list, const BulkParts& parts, int64_t teams) const {
    if (teams > MERGE_THREADS)
      throw std::runtime_error(std::string("svel::") + op + ": more parts of a row than a block merges");
    const bool many = teams >= MERGE_MANY * ceil_div(in.n, plan.tile_rows);
    const MergeLayout layout{static_cast<int>(plan.slices), plan.tile_rows, plan.slice, guess_parts(teams),
                             teams};
    const auto kernel =
        plan.slices > 1
            ? (many ? merge_kernel<T, MERGE_MANY_SHARES, true> : merge_kernel<T, MERGE_SHARES, true>)
            : (many ? merge_kernel<T, MERGE_MANY_SHARES, false> : merge_kernel<T, MERGE_SHARES, false>);
    const int64_t blocks = in.n * merge_blocks(in.d, many ? MERGE_MANY_SHARES : MERGE_SHARES);
    launch_following(op, true, kernel, dim3(static_cast<unsigned>(blocks)), MERGE_THREADS, 0, stream, in,
                     list, parts, layout);
  }

  bool vectors() const {
    return in.d % 8 == 0 && is_aligned(in.x.data) && is_aligned(in.source.data) && is_aligned(in.out.data);
  }

  // A unit of few rows is cut into many parts where there are few units: their merge wants a launch of its
  // own.
  bool merge_last(int64_t teams, int rows) const { return teams <= 8 * ((in.n + rows - 1) / rows); }

  // A sample over a team of blocks.
  template <typename T, int Q, int TR>
  bool run_teams_if() const {
    using Kernel = Teams<T, Q, TR>;
    static_assert(Kernel::FIXED_BYTES <= BULK_FIXED_SMEM, "the planner reserves less");
    if (in.refs.dtype != DtypeOf<T>::value || plan.slices == 1 || plan.tile_d != Kernel::THREADS * Q ||
        plan.tile_refs != TR || (plan.slices <= BULK_MAX_CLUSTER && !Kernel::CLUSTERS))
      return false;
    const auto kernel = teams_kernel<T, Q, TR>;
    const void* const entry = reinterpret_cast<const void*>(kernel);
    check_cuda(op, cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(plan.smem_bytes)));
    TeamsLayout layout{};
    layout.slices = static_cast<int>(plan.slices);
    layout.team = layout.slices <= BULK_MAX_CLUSTER ? Team::cluster : Team::grid;
    layout.slice = plan.slice;
    layout.stages = plan.stages;
    layout.in_flight = plan.in_flight;
    layout.lag = plan.lag;
    layout.vectors = vectors();
    layout.own_list = plan.own_list;

    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config{};
    config.blockDim = dim3(GROUPS_CONSUMERS + BULK_PRODUCERS);
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
    layout.merge_last = merge_last(teams, 1);
    if (layout.team == Team::grid) {  // its blocks wait for one another: all run at once or none
      attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
      attributes[config.numAttrs++].val.cooperative = 1;
    } else if (!layout.own_list || layout.merge_last) {  // what comes before is ours
      attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }

    const int64_t blocks = teams * layout.slices, counts = in.n * layout.slices;
    Carver carver(workspace);
    const UnitList list = carve_list(carver);
    BulkParts parts{};
    parts.sums = carver.take<double>(2 * blocks * layout.slice);
    parts.rows = carver.take<GroupsRow>(2 * blocks);
    const int64_t letters =
        layout.team == Team::grid ? blocks * TEAMS_SLOTS * TEAMS_LETTERS * Kernel::WORDS : 0;
    parts.mail = carver.take<uint2>(letters);
    parts.arrived = carver.take<int>(counts);
    int* const first = reinterpret_cast<int*>(parts.mail);  // of what is zero when the kernel begins
    const int64_t count = parts.arrived + counts - first;
    place_settling(carver, parts, blocks, layout.slices, layout.slice, layout.merge_last);
    carver.check(op, plan.workspace_bytes);
    if (!layout.own_list) {
      build_unit_list(op, in, list, first, count, TR, 1, stream);
    } else if (layout.team == Team::grid) {
      layout.zeros = static_cast<int>(count);
    } else if (layout.merge_last) {
      zero_arrivals(op, first, count, stream);
    }
    check_cuda(op, cudaLaunchKernelEx(&config, kernel, in, list, parts, layout));
    if (!layout.merge_last) merge<T>(list, parts, teams);
    return true;
  }
};

// The compiled tiles.
template <typename T>
bool launch_tiles(const BulkLaunch& launch) {
  const Launch at{launch};
  const bool launched = at.run_groups_if<T, 32, 16, 2>() || at.run_groups_if<T, 64, 16, 2>() ||
                        at.run_groups_if<T, 128, 16, 2>() || at.run_groups_if<T, 256, 16, 2>();
  if (launched) return true;
  if constexpr (sizeof(T) == 2) {
    if (at.run_products_if<T, 256, 2, 2, false>() || at.run_products_if<T, 256, 4, 1, false>() ||
        at.run_products_if<T, 512, 4, 2, false>() || at.run_products_if<T, 512, 8, 1, false>() ||
        at.run_products_if<T, 512, 8, 1, true>())
      return true;
    return at.run_groups_if<T, 512, 16, 2>() || at.run_teams_if<T, 8, 4>() || at.run_teams_if<T, 16, 2>() ||
           at.run_teams_if<T, 32, 1>();
  } else {
    return at.run_groups_if<T, 512, 16, 1>() || at.run_teams_if<T, 8, 2>() || at.run_teams_if<T, 16, 1>();
  }
}

}  // namespace
}  // namespace svel::cuda
