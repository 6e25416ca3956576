// One pass over the references of class banks on Hopper, bound by memory: a class is read from device memory
// once for all rows of a unit, into a ring in shared memory, and about 8 D instructions per row of the unit
// and reference follow.
//
// A multiprocessor has one thread block: one warp, the producer, brings tiles of a few references into the
// ring by bulk copies, always as far ahead as the ring allows. The other sixteen warps form independent
// groups, each as wide as a sample: a group takes a tile, forms its scores, exchanges partial sums, runs the
// online softmax and adds the tile to its row. Latencies of one group hide behind the others' work. All
// groups share the row of a unit that has only one, tile by tile in turn; else each row has its own groups
// and a tile serves all rows. The list of units (units.cuh) is cut into ranges, one per block. One more warp,
// the announcer, walks the range and tells the others of each segment: at most 256 references per group, of
// one class.
//
// Instructions that no multiprocessor has run before take long to come, about 1 us for a hundred: the code
// before the first copies is short.
//
// Exactness. Scores and sums are of d_j = r_j - c, with c the first reference of the class:
//   s_j = rate (y.d_j - alpha/2 |d_j|^2),  y = x - alpha c,  so that
//   -|x - alpha r_j|^2 / (2 sigma^2) = s_j - |y|^2 / (2 sigma^2).
// Weights are 2^(s_j - top) with `top` an integer no smaller than all scores of the group so far (in units of
// log 2): when it grows, sums are multiplied by a power of two, which rounds nothing. At the end of a segment
// the groups of a row add their sums in float64: so the number of references does not matter. |y|^2, in
// float64 too, tells how classes compare, for rows that take all of them and for lse. Where the rounding of
// scores may show in a row, it is evaluated again (bulk_settle.cuh).
//
// Where a unit lies in one block, that is the row's result. Else it is a part in memory, and the last block
// to finish merges the parts, always in their order: results do not depend on who comes last. merge_kernel
// (bulk_merge.cuh) does it where few units are cut into many parts.
//
// While all multiprocessors read, whatever else is read from memory takes several microseconds. So a unit's
// end waits for nothing but its row of x: a part that is left for others is handed to the clerk, one more
// warp, which counts it. The ring covers the rest.
//
// Each tile is visited by one group of each row. A group knows that a stage's earlier tile has arrived, and
// so what the parity of its barrier means: within a segment because the number of stages is a multiple of
// that of the groups, so that all tiles of a stage are its own, and from the earlier segments because their
// rows' groups have met at the end. Groups beyond the unit's rows pass through its tiles for that reason.
#pragma once

#include "stable_target/bulk_settle.cuh"

namespace svel::cuda {

// Of a thread, when the consumers have what the producer's warpgroup does not need: all together no more than
// at the launch, 96 for each.
constexpr int GROUPS_CONSUMER_REGISTERS = 112, GROUPS_PRODUCER_REGISTERS = 32;

struct GroupsLayout {
  int stages, in_flight;  // tiles that there is room for; of these, on their way at once
  bool vectors;           // x, source and out allow 16-byte loads and stores
  bool own_list;          // each block builds the list of units in its shared memory
  bool merge_last;        // the last block to finish merges; else merge_kernel
};

struct GroupState {
  double top;         // weights are 2^(score - top)
  float total;        // of the weights
  float lead, worst;  // the largest of them; the largest score, either way
  float source;       // the weight of the row's own source
  int best;           // see GroupsShared
};

template <int G, int WARPS, int TR, int ROWS>
struct GroupsShared {
  Barrier full[GROUPS_MAX_STAGES], empty[GROUPS_MAX_STAGES];
  Announcements<ROWS> announced;
  // Two of each: a warp is at most one exchange ahead of another that still reads.
  alignas(16) float scores[2][G][TR][WARPS < 4 ? 4 : WARPS];
  double squares[G][WARPS];  // shares of what is summed in float64
  GroupState states[G];
  double shifts[G][WARPS];    // |y|^2 / (2 sigma^2) in units of log 2; each warp has its own
  GroupsRow moved[G][WARPS];  // to memory already, too
  int best[G][WARPS];         // the reference of the largest score, counted from the segment's end
  int final[G];
  Barrier taken;          // what groups left for others at the end of a segment
  Barrier filed, closed;  // a part is in memory; the clerk is done
  Barrier left;           // where merge_kernel follows: all that it reads is in memory
  int unmerged;           // rows that the clerk has found to be complete
  RowEnd rows_left[ROWS];
  int doubtful;       // the first of the rows to be settled
  RowState only_row;  // where there is but one
};

// T: of the references. A group of GT threads owns Q elements of D each. TR: references per tile, which a
// thread takes into its registers, so that the stage is free at once.
template <typename T, int GT, int Q, int TR>
struct Groups {
  static constexpr int EV = 16 / static_cast<int>(sizeof(T));
  static constexpr int SLOTS = Q / EV, WARPS = GT / 32, G = GROUPS_CONSUMERS / GT;
  static constexpr int ALL_WARPS = GROUPS_CONSUMERS / 32;
  static constexpr int ROWS = G < GROUPS_MOST_ROWS ? G : GROUPS_MOST_ROWS;  // of a unit
  static constexpr int SEGMENT_TILES = SEGMENT_REFS / TR;
  using Shared = GroupsShared<G, WARPS, TR, ROWS>;
  static constexpr int FIXED_BYTES = (sizeof(Shared) + 127) / 128 * 128;
  static constexpr int SUMS_BYTES = groups_sums_smem(Q);

  const Inputs& in;
  const UnitList& list;
  const BulkParts& parts;
  const GroupsLayout& layout;
  const int staging;  // where the ring begins in shared memory
  const int d = static_cast<int>(in.d);

  __device__ __forceinline__ static char* memory() {
    extern __shared__ __align__(128) char all[];
    return all;
  }
  __device__ __forceinline__ static Shared& shared() { return *reinterpret_cast<Shared*>(memory()); }
  // Where a group leaves its sums for the others of the row. (GT Q,)
  __device__ __forceinline__ static float* sums_of(int group) {
    return reinterpret_cast<float*>(memory() + FIXED_BYTES) + group * (GT * Q);
  }
  __device__ __forceinline__ T* stage(int s) const {  // (TR, d)
    return reinterpret_cast<T*>(memory() + (staging + s * (TR * d * static_cast<int>(sizeof(T)))));
  }
  __device__ __forceinline__ RowPlace place() const { return {1, 0, ROWS, in.d, 0, d, layout.vectors}; }

  // Of the ring: a stage and the parity of its phase.
  struct Place {
    int stage, phase;
  };
  __device__ __forceinline__ void advance(Place& at, int tiles) const {
    at.stage += tiles;
    while (at.stage >= layout.stages) at.stage -= layout.stages, at.phase ^= 1;
  }

  // The groups of each row.
  __device__ __forceinline__ static int groups_of_a_row(int rows) {
    return rows == 1 ? G : rows == 2 ? G / 2 : G / 4;
  }

  // One warp, before the others have met: the list of few rows. Of an only row it places the first segment,
  // long before the rest can be known. Whether it did.
  __device__ __forceinline__ bool begin(int lane) const {
    const LaneUnit unit = build_list_in_warp<TR, ROWS>(in, list, lane);
    Segment<ROWS>& first = shared().announced.segments[0];
    const unsigned end_cost = static_cast<unsigned>(list.costs.row + list.costs.unit);
    const bool placed = in.n == 1 && place_first<TR>(in, unit, gridDim.x, blockIdx.x, SEGMENT_TILES * G,
                                                     end_cost, first, lane);
    if (placed && lane == 0) {  // what consumers will need, ahead of the copies
      if (layout.vectors && !in.mailboxes) prefetch_bulk(first.rows[0].x, d * size_of(in.x.dtype));
      prefetch_bulk(static_cast<const T*>(in.refs.data) + first.centre * in.d, d * sizeof(T));
    }
    return placed;
  }

  // The producer, one thread.
  __device__ __forceinline__ void produce() const {
    // `behind`: the tile that must have arrived before the next one is on its way. The first few are always
    // taken as arrived.
    Place at{0, 1}, behind{layout.stages - layout.in_flight, 1};
    const int tile_bytes = TR * d * static_cast<int>(sizeof(T));
    int slot = 0, slot_phase = 0;
    for (;;) {
      wait_barrier(&shared().announced.placed[slot], slot_phase);
      const Segment<ROWS>& segment = shared().announced.segments[slot];
      if (segment.flags & SEGMENT_LIST_DONE) return;
      const uint64_t policy = segment.alone ? read_once_policy() : usual_policy();
      const int others = ALL_WARPS - G / groups_of_a_row(segment.count) * WARPS;  // warps that pass a tile by
      const char* from = static_cast<const char*>(in.refs.data) + segment.first * in.d * sizeof(T);
      int bytes = segment.references * d * static_cast<int>(sizeof(T));
      for (int tiles = segment.tiles; tiles > 0; --tiles) {
        Barrier* const full = &shared().full[at.stage];
        wait_barrier(&shared().full[behind.stage], behind.phase);
        advance(behind, 1);
        wait_barrier(&shared().empty[at.stage], at.phase);
        if (others > 0) arrive_for(&shared().empty[at.stage], others);
        if (bytes > 0) {
          const int here = min(bytes, tile_bytes);
          arrive_expecting(full, here);
          bulk_copy(stage(at.stage), from, here, full, policy);
        } else {
          arrive(full);
        }
        from += tile_bytes, bytes -= tile_bytes;
        advance(at, 1);
      }
      if (++slot == SEGMENT_SLOTS) slot = 0, slot_phase ^= 1;
    }
  }

  // The announcer.
  template <bool DEAL>
  __device__ __forceinline__ void tell(bool begun, int lane) const {
    const auto most_tiles = [](int rows) { return SEGMENT_TILES * groups_of_a_row(rows); };
    const auto know_row = [&](int64_t index, RowState& row) {
      if (begun) {
        row = shared().only_row;
      } else {
        set_row(in, index, row);
      }
    };
    const auto await = [](Barrier* barrier, int phase) { wait_barrier(barrier, phase); };
    announce<TR, DEAL>(in, list, place(), gridDim.x, blockIdx.x, shared().announced, most_tiles, know_row,
                       await, lane, begun);
  }

  // The consumers.

  struct Mine {          // of a row, in this thread
    float y[Q], sum[Q];  // sum: weighted, of r_j - c
    float c[Q];          // the centre
    RowScores scores;
    float half_alpha;
    float source;  // the weight of the row's own source
  };

  // This thread. Read anew where it is wanted: cheaper than to keep it through a loop that needs all
  // registers.
  __device__ __forceinline__ static int thread() {  // of the group
    unsigned tid;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(tid));
    return static_cast<int>(tid % GT);
  }
  __device__ __forceinline__ static int group() {
    unsigned tid;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(tid));
    return static_cast<int>(tid / GT);
  }
  // The row of the unit that it serves, and its turn there. groups: of a row, a power of two.
  __device__ __forceinline__ static int by_groups(int number, int groups) {
    return number >> (31 - __clz(groups));
  }
  __device__ __forceinline__ static int row_of_group(int groups) { return by_groups(group(), groups); }
  __device__ __forceinline__ static int turn_of_group(int groups) { return group() & (groups - 1); }
  __device__ __forceinline__ static int element(int slot) { return (slot * GT + thread()) * EV; }

  __device__ __forceinline__ static void group_barrier() {
    if constexpr (WARPS == 1) {
      __syncwarp();
    } else {
      named_barrier(G + group(), GT);
    }
  }
  // Among the groups of the row. Barriers are named as the nodes of a tree over the groups are counted.
  __device__ __forceinline__ static void row_barrier(int groups) {
    if (groups == 1) {
      group_barrier();
    } else {
      named_barrier(by_groups(G, groups) + row_of_group(groups), groups * GT);
    }
  }

  // The centre, y = x - alpha c, and where it is wanted |y|^2.
  __device__ __forceinline__ void begin_segment(Mine& mine, const Segment<ROWS>& segment, int my_row) const {
    const RowState& row = segment.rows[my_row];
    const int64_t centre = segment.centre;
    const int first = element(0);
    load_elements<EV, GT * EV>({row.x, in.x.dtype}, row.index * in.d, first, d, layout.vectors, mine.y);
    const T* const from = static_cast<const T*>(in.refs.data) + centre * in.d;
    uint4 packed[SLOTS];
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      packed[s] = uint4{0, 0, 0, 0};
      const int e = first + s * GT * EV;
      if (centre >= 0 && e < d) packed[s] = *reinterpret_cast<const uint4*>(from + e);
    }
    const bool squares = segment.squares;
    double square = subtract_centre<T>(row, packed, squares, mine.y);
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      float c[EV];
      unpack<T, EV>(packed[s], c);
#pragma unroll
      for (int k = 0; k < EV; ++k) mine.c[s * EV + k] = c[k];
    }
    mine.half_alpha = row.half_alpha, mine.scores.rate = row.rate;
    mine.scores.reset();
#pragma unroll
    for (int q = 0; q < Q; ++q) mine.sum[q] = 0;
    if (squares) square = row.per_square * sum_over_group(square);
    if (thread() % 32 == 0) shared().shifts[group()][thread() / 32] = square;
  }

  __device__ __forceinline__ double sum_over_group(double share) const {
    share = warp_sum(share);
    group_barrier();  // what was there before is read
    if (thread() % 32 == 0) shared().squares[group()][thread() / 32] = share;
    group_barrier();
    double all = 0;
#pragma unroll 1
    for (int w = 0; w < WARPS; ++w) all += shared().squares[group()][w];
    return all;
  }

  // From this thread's shares of the scores of a tile to their sums over the group.
  template <int COUNT>
  __device__ __forceinline__ void exchange(int& parity, float (&shares)[COUNT]) const {
    if constexpr (WARPS == 1) {
#pragma unroll
      for (int j = 0; j < COUNT; ++j) shares[j] = warp_sum(shares[j]);
    } else {
      constexpr int LANES = 32 / COUNT;
      const int lane = thread() % 32;
      const float sum = warp_sums<COUNT>(shares, lane);
      float (&scores)[TR][WARPS < 4 ? 4 : WARPS] = shared().scores[parity & 1][group()];
      if (lane % LANES == 0) scores[lane / LANES][thread() / 32] = sum;
      group_barrier();
#pragma unroll
      for (int j = 0; j < COUNT; ++j) {
        if constexpr (WARPS == 2) {
          shares[j] = scores[j][0] + scores[j][1];
        } else {
          shares[j] = 0;
#pragma unroll
          for (int w = 0; w < WARPS; w += 4) {
            const float4 four = *reinterpret_cast<const float4*>(&scores[j][w]);
            shares[j] += (four.x + four.y) + (four.z + four.w);
          }
        }
      }
      parity ^= 1;
    }
  }

  // The d_j of a tile, in this thread. Beyond D they are zero, beyond the tile's `many` references those of
  // the first.
  __device__ __forceinline__ void read_tile(const Mine& mine, int at, int many, float (&out)[TR][Q]) const {
    const int first = element(0);
    const T* from[TR];
#pragma unroll
    for (int j = 0; j < TR; ++j) from[j] = stage(at) + (j < many ? j * d : 0) + first;
    const auto read = [&](const auto& load) {
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
#pragma unroll
        for (int j = 0; j < TR; ++j) {
          float r[EV];
          unpack<T, EV>(load(s, j), r);
#pragma unroll
          for (int k = 0; k < EV; ++k) out[j][s * EV + k] = r[k] - mine.c[s * EV + k];
        }
      }
    };
    if (d == GT * Q) {
      read([&](int s, int j) { return *reinterpret_cast<const uint4*>(from[j] + s * GT * EV); });
    } else {
      read([&](int s, int j) {
        uint4 raw{0, 0, 0, 0};
        if (first + s * GT * EV < d) raw = *reinterpret_cast<const uint4*>(from[j] + s * GT * EV);
        return raw;
      });
    }
  }

  __device__ __forceinline__ void release(int s) const {
    __syncwarp();
    if (thread() % 32 == 0) arrive(&shared().empty[s]);
  }

  // One tile of `many` references, at stage s.
  __device__ __forceinline__ void take_tile(Mine& mine, int s, int many, int& parity) const {
    float norm[TR] = {}, scores[TR] = {}, difference[TR][Q];
    read_tile(mine, s, many, difference);
    release(s);
#pragma unroll
    for (int q = 0; q < Q; ++q) {
#pragma unroll
      for (int j = 0; j < TR; ++j) {
        norm[j] = fmaf(difference[j][q], difference[j][q], norm[j]);
        scores[j] = fmaf(mine.y[q], difference[j][q], scores[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < TR; ++j) scores[j] = fmaf(-mine.half_alpha, norm[j], scores[j]);
    exchange<TR>(parity, scores);
    const auto note = [&](int j) { shared().best[group()][thread() / 32] = many - j; };
    if (!weigh_scores(mine.scores, many, scores, mine.sum, note)) return;
#pragma unroll
    for (int q = 0; q < Q; ++q) {
#pragma unroll
      for (int j = 0; j < TR; ++j) mine.sum[q] = fmaf(scores[j], difference[j][q], mine.sum[q]);
    }
  }

  // See RowScores.
  __device__ __forceinline__ void measure_terms(Mine& mine) const {
    float share = 0;
#pragma unroll
    for (int q = 0; q < Q; ++q) share = fmaf(mine.y[q], mine.sum[q], share);
    mine.scores.measure_terms(static_cast<float>(sum_over_group(share)));
  }

  // The row's own source, as one more reference.
  __device__ __forceinline__ void weigh_own_source(Mine& mine, const RowState& row) const {
    float difference[Q];
    load_elements<EV, GT * EV>(in.source, row.index * in.d, element(0), d, layout.vectors, difference);
#pragma unroll
    for (int q = 0; q < Q; ++q) difference[q] -= mine.c[q];
    const double score = sum_over_group(score_source(row, mine.y, difference));
    mine.source = weigh_source(mine.scores, score, row.exact_rate(), mine.sum);
  }

  // A segment's sums, from the row's groups to its result or to its part in memory. Up to four groups share
  // the row's elements for that: to each the others leave what they have of its own.
  __device__ __forceinline__ void end_segment(Mine& mine, const Segment<ROWS>& segment, int& parity) const {
    const int groups = groups_of_a_row(segment.count), turn = turn_of_group(groups),
              my_row = row_of_group(groups);
    const int used = min(segment.tiles, groups), lane = thread() % 32;  // used: groups that had a tile
    const int leader = group() - turn, takers = min(groups, Q / 4);
    const auto takes = [&](int q) { return (q / 4 & (takers - 1)) == turn; };  // groups are a power of two
    const int flags = segment.flags, others = segment.to - segment.from;
    const bool filed = is_filed(segment);
    mine.source = 0;
    if (mine.scores.is_near_the_first()) measure_terms(mine);
    if (in.source.data && turn == 0 && flags & SEGMENT_UNIT_END) weigh_own_source(mine, segment.rows[my_row]);
    const RowState& row = segment.rows[my_row];
    const RowPlace here = place();
    float4 x[Q / 4];
    await_taken(parity);
#pragma unroll
    for (int q = 0; q < Q; q += 4) {
      if (!takes(q))
        *reinterpret_cast<float4*>(sums_of(group()) + element(q / EV) + q % EV) =
            make_float4(mine.sum[q], mine.sum[q + 1], mine.sum[q + 2], mine.sum[q + 3]);
    }
    if (thread() == 0)
      shared().states[group()] = {mine.scores.top,    mine.scores.total,
                                  mine.scores.lead(), mine.scores.worst,
                                  mine.source,        shared().best[group()][thread() / 32]};
    if (flags & SEGMENT_PART_END && others == 0) {  // on their way meanwhile
#pragma unroll
      for (int q = 0; q < Q; q += 4) {
        const int e = element(q / EV) + q % EV;
        if (takes(q) && e < d) x[q / 4] = load_x(in, here, row, e);
      }
    }
    row_barrier(groups);

    double best = shared().states[leader].top;
#pragma unroll 1
    for (int g = leader + 1; g < leader + used; ++g) {
      const double top = shared().states[g].top;
      best = best >= top || top != top ? best : top;
    }
    double total = 0;
    float lead = 0, worst = 0;
    int64_t leading = OWN_SOURCE;
#pragma unroll 1
    for (int g = leader; g < leader + used; ++g) {
      const GroupState& one = shared().states[g];
      const float by = power_of_two(one.top - best), its = by * fmaxf(one.lead, one.source);
      total = fma(static_cast<double>(by), static_cast<double>(one.total), total);
      if (its > lead)
        lead = its,
        leading = one.source > one.lead ? OWN_SOURCE : segment.first + segment.references - one.best;
      worst = fmaxf(worst, one.worst);
    }
    const float scale = power_of_two(mine.scores.top - best);
    const double source = static_cast<double>(power_of_two(shared().states[leader].top - best)) *
                          static_cast<double>(shared().states[leader].source);
    const int64_t part = here.part_of(blockIdx.x, flags & SEGMENT_UNIT_BEGIN, my_row);
    double* const sums = parts.sums + part * d;
    RowEnd end{row.index,
               row.out,
               my_row,
               segment.from,
               segment.to,
               row.a,
               row.b,
               {best - shared().shifts[group()][thread() / 32], total + source, lead,
                worst * mine.scores.rate, leading}};
    double by = 1, before = 0;
    if (!(flags & SEGMENT_PART_BEGIN)) {
      const Joined joined = join_to(shared().moved[group()][thread() / 32], end.own);
      before = joined.by_first, by = joined.by_second;
    }
    __syncwarp();
    if (lane == 0) shared().moved[group()][thread() / 32] = end.own;
    bool final = flags & SEGMENT_PART_END && others == 0;
#pragma unroll
    for (int q = 0; q < Q; q += 4) {
      const int e = element(q / EV) + q % EV;
      if (!takes(q) || e >= d) continue;
      double w[4];
#pragma unroll
      for (int k = 0; k < 4; ++k)
        w[k] = fma(static_cast<double>(scale), static_cast<double>(mine.sum[q + k]),
                   total * static_cast<double>(mine.c[q + k]));
#pragma unroll 1
      for (int g = leader; g < leader + used; ++g) {
        if (g == group()) continue;
        const double other = power_of_two(shared().states[g].top - best);
        const float4 theirs = *reinterpret_cast<const float4*>(sums_of(g) + e);
        w[0] = fma(other, static_cast<double>(theirs.x), w[0]);
        w[1] = fma(other, static_cast<double>(theirs.y), w[1]);
        w[2] = fma(other, static_cast<double>(theirs.z), w[2]);
        w[3] = fma(other, static_cast<double>(theirs.w), w[3]);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) w[k] *= by;
      add_source(in, here, row.index, e, by * source, w);
      if (!(flags & SEGMENT_PART_BEGIN)) add_sums(sums + e, before, w);
      if (final) {
        store_row(in, here, end, e, 1 / end.own.total, x[q / 4], w);
      } else {
        store_sums(sums + e, w);
      }
    }
    leave_taken();
    if (final) {
      if (turn == 0 && thread() == 0)
        finish_row(in, parts, here, end.index, end.b, end.own, &shared().doubtful);
      return;
    }
    if (!(flags & SEGMENT_PART_END)) return;
    if (turn == 0 && thread() == 0) parts.rows[part] = end.own;
    if (filed) return file(lane);
    if (!layout.merge_last) return;
    row_barrier(groups);
    if (turn > 0) return;
    if (thread() == 0) shared().final[group()] = count_part(parts, segment, my_row);
    group_barrier();
    final = shared().final[group()];
    if (final) merge(end);
  }

  // What was left at the end of the segment before is read; and what this warp reads of this one.
  __device__ __forceinline__ void await_taken(int& parity) const {
    wait_barrier(&shared().taken, parity >> 1);
    parity ^= 2;
  }
  __device__ __forceinline__ void leave_taken() const {
    __syncwarp();
    if (thread() % 32 == 0) arrive(&shared().taken);
  }

  __device__ __forceinline__ void file(int lane) const {
    __syncwarp();
    if (lane == 0) arrive(&shared().filed);
  }

  // The row's result from its parts, by one group.
  __device__ __forceinline__ void merge(const RowEnd& end) const {
    merge_row<GT>(in, parts, place(), end, &shared().doubtful, [] { return thread(); });
  }

  __device__ __forceinline__ void consume() const {
    Place at{0, 0};
    int slot = 0, slot_phase = 0;
    int parity = 2;  // of exchanges, and two times that of what groups left
    for (;;) {
      wait_barrier(&shared().announced.told[slot], slot_phase);
      const Segment<ROWS>& segment = shared().announced.segments[slot];
      if (segment.flags & SEGMENT_LIST_DONE) break;
      const int groups = groups_of_a_row(segment.count), turn = turn_of_group(groups);
      Place here = at;
      advance(here, turn);
      if (row_of_group(groups) < segment.count) {
        Mine mine;
        begin_segment(mine, segment, row_of_group(groups));
        int left = segment.references - turn * TR;
#pragma unroll 1
        for (int tiles = segment.tiles - turn; tiles > 0; tiles -= groups) {
          wait_barrier(&shared().full[here.stage], here.phase);
          if (left > 0) {
            take_tile(mine, here.stage, left, parity);
          } else {
            release(here.stage);
          }
          left -= groups * TR;
          advance(here, groups);
        }
        end_segment(mine, segment, parity);
      } else {
#pragma unroll 1
        for (int tiles = segment.tiles - turn; tiles > 0; tiles -= groups) {
          wait_barrier(&shared().full[here.stage], here.phase);
          release(here.stage);
          advance(here, groups);
        }
        await_taken(parity);
        row_barrier(groups);
        leave_taken();
        if (is_filed(segment)) file(thread() % 32);
      }
      advance(at, segment.tiles % layout.stages);
      if (segment.tiles / layout.stages % 2) at.phase ^= 1;
      __syncwarp();
      if (thread() % 32 == 0) arrive(&shared().announced.done[slot]);
      if (++slot == SEGMENT_SLOTS) slot = 0, slot_phase ^= 1;
    }
    if (!layout.merge_last) {
      __syncwarp();
      if (thread() % 32 == 0) arrive(&shared().left);
      return;
    }
    wait_barrier(&shared().closed, 0);
#pragma unroll 1
    for (int i = 0; i < shared().unmerged; ++i) {
      if (group() == 0) merge(shared().rows_left[i]);
    }
    const int tid = group() * GT + thread();
    write_dead_rows(in, list, parts, place(), gridDim.x, blockIdx.x, tid, GROUPS_CONSUMERS);
    named_barrier(1, GROUPS_CONSUMERS);
    if (shared().doubtful != NO_ROW)
      settle_rows<T>(in, parts, place(), shared().doubtful, memory() + staging, tid);
  }
};

// DEAL: see Ranges.
template <typename T, int GT, int Q, int TR, bool DEAL>
__global__ void __launch_bounds__(GROUPS_CONSUMERS + BULK_PRODUCERS, 1)
    groups_kernel(const __grid_constant__ Inputs in, const __grid_constant__ UnitList shared_list,
                  const __grid_constant__ BulkParts parts, const __grid_constant__ GroupsLayout layout) {
  using Kernel = Groups<T, GT, Q, TR>;
  typename Kernel::Shared& shared = Kernel::shared();
  UnitList list = shared_list;
  int staging = Kernel::FIXED_BYTES + Kernel::SUMS_BYTES;
  if (layout.own_list) {
    list = place_unit_list(Kernel::memory() + staging, in.n, in.k, shared_list.costs);
    staging += static_cast<int>(bulk_list_smem(in.n, in.k));
  }
  const Kernel kernel{in, list, parts, layout, staging};
  const int tid = threadIdx.x - GROUPS_CONSUMERS;
  ListScratch* const scratch = reinterpret_cast<ListScratch*>(Kernel::memory() + staging);  // before copies
  const bool short_list = !DEAL && layout.own_list && in.n <= WARP_LIST_ROWS;  // the announcer makes it
  if (layout.own_list && !short_list) read_rows(in, *scratch);
  bool begun = false;
  if (tid == -GROUPS_CONSUMERS) {
#pragma unroll 1
    for (int s = 0; s < layout.stages; ++s) {
      init_barrier(&shared.full[s], 1);
      init_barrier(&shared.empty[s], Kernel::ALL_WARPS);
    }
    shared.announced.init(Kernel::ALL_WARPS + 1);
    init_barrier(&shared.filed, Kernel::ALL_WARPS);
    init_barrier(&shared.closed, 1);
    init_barrier(&shared.left, Kernel::ALL_WARPS + 1);
    shared.unmerged = 0;
    shared.doubtful = NO_ROW;
    init_barrier(&shared.taken, Kernel::ALL_WARPS);
    publish_barriers();
  } else if (short_list && tid >= 0 && tid < 32) {
    begun = kernel.begin(tid);
  } else if (short_list && tid == 64 && in.n == 1) {
    name_row(in, 0, shared.only_row);
    set_row(in, 0, shared.only_row);
  }
  __syncthreads();
  if (tid < 0) {
    take_registers<GROUPS_CONSUMER_REGISTERS>();
    kernel.consume();
  } else {
    if (begun && tid == 0) arrive(&shared.announced.placed[0]);
    give_up_registers<GROUPS_PRODUCER_REGISTERS>();
    if (!layout.own_list) {
      wait_for_previous_launch();
    } else if (!short_list) {
      build_own_list<TR, Kernel::ROWS, DEAL>(in, list, *scratch, tid);
    }
    if (tid < 32) {
      kernel.template tell<DEAL>(begun, tid);
      if constexpr (!DEAL) {  // units are dealt out where rows are many
        if (!layout.merge_last) {
          if (blockIdx.x == 0) leave_rows(in, list, parts, gridDim.x, tid);
          write_dead_pieces(in, list, parts, gridDim.x, blockIdx.x, tid);
        }
      }
      __syncwarp();
      if (tid == 0) arrive(&shared.left);
    } else if (tid == 32) {
      kernel.produce();
    } else if (tid == 96) {
      int* const left = layout.merge_last ? nullptr : parts.left + blockIdx.x;
      if (left) begin_leaving(left);
      keep_files(parts, layout.merge_last, shared);
      if (left) leave_all(left, &shared.left);
    }
  }
}

}  // namespace svel::cuda
