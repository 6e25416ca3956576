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
// does it where few units are cut into many parts.
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
  int64_t best;       // see GroupsRow
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
  Barrier taken[G];       // the sums that the group left
  Barrier filed, closed;  // a part is in memory; the clerk is done
  int unmerged;           // rows that the clerk has found to be complete
  RowEnd rows_left[ROWS];
  int doubtful;  // the first of the rows to be settled
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
      named_barrier(G / groups + group() / groups, groups * GT);
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

  // The threads of a row's result.
  struct Crew {
    __device__ __forceinline__ static int thread() { return Groups::thread(); }
    __device__ __forceinline__ static void wait() { group_barrier(); }
    __device__ __forceinline__ static double sum(double share) { return sum_over_group(share); }
  };

  __device__ __forceinline__ static double sum_over_group(double share) {
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

  // Of this group's references.
  __device__ __forceinline__ static int64_t best_of(const Segment<ROWS>& segment) {
    return segment.first + segment.references - shared().best[group()][thread() / 32];
  }

  // A segment's sums, from the row's groups to its result or to its part in memory. The row's first group
  // does it; the others leave theirs.
  __device__ __forceinline__ void end_segment(Mine& mine, const Segment<ROWS>& segment, int& parity) const {
    const int groups = groups_of_a_row(segment.count), turn = group() % groups, my_row = group() / groups;
    const int used = min(segment.tiles, groups), lane = thread() % 32;  // used: groups that had a tile
    const int flags = segment.flags, others = segment.to - segment.from;
    const bool filed = is_filed(segment);
    mine.source = 0;
    if (mine.scores.is_near_the_first()) measure_terms(mine);
    if (in.source.data && turn == 0 && flags & SEGMENT_UNIT_END) weigh_own_source(mine, segment.rows[my_row]);
    const RowState& row = segment.rows[my_row];
    const RowPlace here = place();
    float4 x[Q / 4];
    if (turn > 0) {
      wait_barrier(&shared().taken[group()], parity >> 1);  // those of the segment before
      parity ^= 2;
      float* const to = sums_of(group());
#pragma unroll
      for (int q = 0; q < Q; q += 4)
        *reinterpret_cast<float4*>(to + element(q / EV) + q % EV) =
            make_float4(mine.sum[q], mine.sum[q + 1], mine.sum[q + 2], mine.sum[q + 3]);
      if (thread() == 0)
        shared().states[group()] = {mine.scores.top, mine.scores.total, mine.scores.lead(), mine.scores.worst,
                                    best_of(segment)};
    } else if (flags & SEGMENT_PART_END && others == 0) {  // on their way meanwhile
#pragma unroll
      for (int q = 0; q < Q; q += 4) {
        const int e = element(q / EV) + q % EV;
        if (e < d) x[q / 4] = load_x(in, here, row, e);
      }
    }
    row_barrier(groups);
    if (turn > 0) {
      if (filed) file(lane);
      return;
    }

    double best = mine.scores.top;
#pragma unroll 1
    for (int g = group() + 1; g < group() + used; ++g) {
      const double top = shared().states[g].top;
      best = best >= top || top != top ? best : top;
    }
    const float scale = power_of_two(mine.scores.top - best);
    double total = static_cast<double>(scale) * static_cast<double>(mine.scores.total);
    double source = static_cast<double>(scale) * static_cast<double>(mine.source);
    float lead = scale * fmaxf(mine.scores.lead(), mine.source), worst = mine.scores.worst;
    int64_t leading = mine.source > mine.scores.lead() ? OWN_SOURCE : best_of(segment);
#pragma unroll 1
    for (int g = group() + 1; g < group() + used; ++g) {
      const GroupState& other = shared().states[g];
      const float by = power_of_two(other.top - best);
      total = fma(static_cast<double>(by), static_cast<double>(other.total), total);
      if (by * other.lead > lead) leading = other.best;
      lead = fmaxf(lead, by * other.lead), worst = fmaxf(worst, other.worst);
    }
    const int64_t part = here.part_of(blockIdx.x, flags & SEGMENT_UNIT_BEGIN, my_row);
    double* const sums = parts.sums + part * d;
    RowEnd end{
        row.index,
        row.out,
        my_row,
        segment.from,
        segment.to,
        row.a,
        row.b,
        {{best - shared().shifts[group()][thread() / 32], total + source, lead, worst * mine.scores.rate},
         leading}};
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
      if (e >= d) continue;
      double w[4];
#pragma unroll
      for (int k = 0; k < 4; ++k)
        w[k] = fma(static_cast<double>(scale), static_cast<double>(mine.sum[q + k]),
                   total * static_cast<double>(mine.c[q + k]));
#pragma unroll 1
      for (int g = group() + 1; g < group() + used; ++g) {
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
    __syncwarp();
    if (lane == 0) {
      for (int g = group() + 1; g < group() + groups; ++g) arrive(&shared().taken[g]);
    }
    if (final)
      return finish_row<T, GT>(in, parts, here, end.index, end.a, end.b, end.own, &shared().doubtful, Crew{});
    if (!(flags & SEGMENT_PART_END)) return;
    if (thread() == 0) parts.rows[part] = end.own;
    if (filed) return file(lane);
    if (!layout.merge_last) return;
    group_barrier();
    if (thread() == 0) shared().final[group()] = count_part(parts, segment, my_row);
    group_barrier();
    final = shared().final[group()];
    if (final) merge(end);
  }

  __device__ __forceinline__ void file(int lane) const {
    __syncwarp();
    if (lane == 0) arrive(&shared().filed);
  }

  // The row's result from its parts, by one group.
  __device__ __forceinline__ void merge(const RowEnd& end) const {
    merge_row<T, GT>(in, parts, place(), end, &shared().doubtful, Crew{});
  }

  __device__ __forceinline__ void consume() const {
    Place at{0, 0};
    int slot = 0, slot_phase = 0;
    int parity = 2;  // of exchanges, and two times that of the sums left
    for (;;) {
      wait_barrier(&shared().announced.told[slot], slot_phase);
      const Segment<ROWS>& segment = shared().announced.segments[slot];
      if (segment.flags & SEGMENT_LIST_DONE) break;
      const int groups = groups_of_a_row(segment.count), turn = group() % groups;
      Place here = at;
      advance(here, turn);
      if (group() / groups < segment.count) {
        Mine mine;
        begin_segment(mine, segment, group() / groups);
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
        row_barrier(groups);
        if (is_filed(segment)) file(thread() % 32);
      }
      advance(at, segment.tiles % layout.stages);
      if (segment.tiles / layout.stages % 2) at.phase ^= 1;
      __syncwarp();
      if (thread() % 32 == 0) arrive(&shared().announced.done[slot]);
      if (++slot == SEGMENT_SLOTS) slot = 0, slot_phase ^= 1;
    }
    if (!layout.merge_last) return;  // where merge_kernel waits for the last of them
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
  if (!layout.merge_last) allow_next_launch();
  const bool short_list = !DEAL && layout.own_list && in.n <= WARP_LIST_ROWS;  // the announcer makes it
  if (layout.own_list && !short_list) read_rows(in, *scratch);
  if (tid == 0) {
#pragma unroll 1
    for (int s = 0; s < layout.stages; ++s) {
      init_barrier(&shared.full[s], 1);
      init_barrier(&shared.empty[s], Kernel::ALL_WARPS);
    }
    shared.announced.init(Kernel::ALL_WARPS + 1);
    init_barrier(&shared.filed, Kernel::ALL_WARPS);
    init_barrier(&shared.closed, 1);
    shared.unmerged = 0;
    shared.doubtful = NO_ROW;
#pragma unroll 1
    for (int g = 0; g < Kernel::G; ++g) init_barrier(&shared.taken[g], Kernel::WARPS);
    publish_barriers();
  }
  __syncthreads();
  if (tid < 0) {
    take_registers<GROUPS_CONSUMER_REGISTERS>();
    kernel.consume();
  } else {
    give_up_registers<GROUPS_PRODUCER_REGISTERS>();
    if (!layout.own_list) {
      wait_for_previous_launch();
    } else if (!short_list) {
      build_own_list<TR, Kernel::ROWS, DEAL>(in, list, *scratch, tid);
    }
    if (tid < 32) {
      if (short_list) build_list_in_warp<TR, Kernel::ROWS>(in, list, tid);
      const auto most_tiles = [](int rows) { return Kernel::SEGMENT_TILES * Kernel::groups_of_a_row(rows); };
      announce<TR, DEAL>(in, list, kernel.place(), gridDim.x, blockIdx.x, shared.announced, most_tiles, tid);
      if constexpr (!DEAL) {  // units are dealt out where rows are many
        if (!layout.merge_last) {
          if (blockIdx.x == 0) leave_rows(in, list, parts, gridDim.x, tid);
          write_dead_pieces(in, list, parts, gridDim.x, blockIdx.x, tid);
        }
      }
    } else if (tid == 32) {
      kernel.produce();
    } else if (tid == 96) {
      keep_files(parts, layout.merge_last, shared);
    }
  }
}

}  // namespace svel::cuda
