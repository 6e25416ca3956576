// One pass over the references on Hopper for samples that no thread block holds: a team of blocks shares a
// sample, each with a slice of D. Exactness, parts and the list of units: as in bulk_groups.cuh; a unit has
// one row.
//
// In a block the announcer tells of the segments, and the producer brings tiles of a slice of a few
// references into a ring in shared memory by bulk copies. Sixteen warps score a tile, leave their partial
// sums for the mailers, and go on to the next one: LAG tiles later its scores have come back from the whole
// team, the tile is read again and added to the row, and its stage is free. So the way over the team costs no
// time. Two warps, the mailers, take tiles in turn: they add up the block's partial sums and send them to all
// blocks of the team, through distributed shared memory where the team is a cluster, else through letters in
// device memory, tagged with the number of their exchange, which they also await there.
#pragma once

#include "common/cluster.cuh"
#include "stable_target/bulk_settle.cuh"

namespace svel::cuda {

enum class Team : int { cluster, grid };

struct TeamsLayout {
  Team team;
  int slices;             // blocks per team
  int64_t slice;          // elements of D per block
  int stages, in_flight;  // tiles that there is room for; of these, on their way at once
  bool vectors;           // x, source and out allow 16-byte loads and stores
  bool own_list;          // each block builds the list of units in its shared memory
  bool merge_last;        // the last team to finish merges; else merge_kernel
};

constexpr int TEAMS_LAG = BULK_LAG;
// Exchanges that have memory of their own: that of exchange e is used again by e + 8. A block sends that only
// when its warps have had the answers to e + 8 - LAG - 1, to which all blocks' warps must have given their
// share, each after it had read the answers up to e + 8 - 2 LAG - 2.
constexpr int TEAMS_SLOTS = 8;
static_assert(TEAMS_SLOTS >= 2 * TEAMS_LAG + 2, "see above");
constexpr int TEAMS_MAILERS = 2;
constexpr int TEAMS_LETTERS = 2;  // of a block for an exchange: two float32, or the halves of a float64
constexpr int TEAMS_CONSUMER_REGISTERS = 112, TEAMS_OTHER_REGISTERS = 32;

enum class Mail : int { scores, square, done };

struct TeamsShared {
  static constexpr int WARPS = GROUPS_CONSUMERS / 32;
  Barrier full[BULK_MAX_STAGES], empty[BULK_MAX_STAGES];
  Barrier rows_known;                               // see `known`
  Barrier given[TEAMS_SLOTS], mailed[TEAMS_SLOTS];  // shares of the block's warps; of the team's blocks
  alignas(16) double shares[TEAMS_SLOTS][WARPS];    // or two float32
  alignas(16) double mail[TEAMS_SLOTS][BULK_MAX_CLUSTER];
  Mail kinds[TEAMS_SLOTS];
  Announcements<1> announced;
  RowState known[WARP_LIST_ROWS];  // of the rows, where the list is short
  double shift;                    // |y|^2 / (2 sigma^2) in units of log 2
  PartRow moved;                   // to memory already
  int last;
  int doubtful;  // the first of the rows to be settled
};

// T: of the references. Each of the consumers owns Q elements of the slice. TR: references per tile.
template <typename T, int Q, int TR>
struct Teams {
  static constexpr int THREADS = GROUPS_CONSUMERS, EV = 16 / static_cast<int>(sizeof(T)), SLOTS = Q / EV;
  static constexpr int WARPS = THREADS / 32, LAG = TEAMS_LAG, SEGMENT_TILES = SEGMENT_REFS / TR;
  static_assert(TR <= 2, "an exchange carries two scores");
  static constexpr int64_t FIXED_BYTES = (sizeof(TeamsShared) + 127) / 128 * 128;

  const Inputs& in;
  const UnitList& list;
  const BulkParts& parts;
  const TeamsLayout& layout;
  const int staging;  // where the ring begins in shared memory
  const int teams = gridDim.x / layout.slices, team = blockIdx.x / layout.slices;
  const int rank = blockIdx.x % layout.slices;
  const int64_t offset = rank * layout.slice;  // of this block's slice in D
  const int length = static_cast<int>(min(layout.slice, in.d - offset));

  __device__ __forceinline__ static char* memory() {
    extern __shared__ __align__(128) char all[];
    return all;
  }
  __device__ __forceinline__ static TeamsShared& shared() {
    return *reinterpret_cast<TeamsShared*>(memory());
  }
  __device__ __forceinline__ T* stage(int s) const {  // (TR, slice)
    const int bytes = TR * static_cast<int>(layout.slice * sizeof(T));
    return reinterpret_cast<T*>(memory() + (staging + s * bytes));
  }
  __device__ __forceinline__ RowPlace place() const {
    return {layout.slices, rank, 1, layout.slice, offset, length, layout.vectors};
  }

  // The producer: each lane issues the copy of one reference.
  __device__ __forceinline__ void produce(int lane) const {
    const uint64_t once = read_once_policy(), usual = usual_policy();
    const uint32_t bytes = static_cast<uint32_t>(length * sizeof(T));
    int s = 0, phase = 1, slot = 0, slot_phase = 0;
    // The tile that must have arrived before the next one is on its way.
    int behind = layout.stages - layout.in_flight, behind_phase = 1;
    for (;;) {
      wait_barrier(&shared().announced.placed[slot], slot_phase);
      const Segment<1>& segment = shared().announced.segments[slot];
      if (segment.flags & SEGMENT_LIST_DONE) return;
      const uint64_t policy = segment.alone ? once : usual;
      const T* from = static_cast<const T*>(in.refs.data) + (segment.first + lane) * in.d + offset;
      int left = segment.references;
#pragma unroll 1
      for (int tiles = segment.tiles; tiles > 0; --tiles, left -= TR, from += TR * in.d) {
        const int many = max(min(left, TR), 0);
        wait_barrier(&shared().full[behind], behind_phase);
        if (++behind == layout.stages) behind = 0, behind_phase ^= 1;
        wait_barrier(&shared().empty[s], phase);
        if (lane == 0) arrive_expecting(&shared().full[s], many * bytes);
        __syncwarp();
        if (lane < many) bulk_copy(stage(s) + lane * layout.slice, from, bytes, &shared().full[s], policy);
        if (++s == layout.stages) s = 0, phase ^= 1;
      }
      __syncwarp();  // all lanes have read the segment before the consumers can be done with it
      if (++slot == SEGMENT_SLOTS) slot = 0, slot_phase ^= 1;
    }
  }

  // The mailers: exchanges `number`, number + TEAMS_MAILERS, ... until the consumers are done.
  __device__ __forceinline__ double share_of_block(int slot, Mail kind, int lane) const {
    return sum(lane < WARPS ? shared().shares[slot][lane] : 0.0, kind);
  }

  __device__ __forceinline__ void carry_mail_in_cluster(int number, int lane) const {
    for (;; number += TEAMS_MAILERS) {
      const int slot = number % TEAMS_SLOTS;
      wait_barrier(&shared().given[slot], number / TEAMS_SLOTS & 1);
      const Mail kind = shared().kinds[slot];
      if (kind == Mail::done) return;
      const double share = share_of_block(slot, kind, lane);
      if (lane < layout.slices)
        send(peer_address(shared_address(&shared().mail[slot][rank]), lane),
             peer_address(shared_address(&shared().mailed[slot]), lane), share);
      if (lane == 0) arrive_expecting(&shared().mailed[slot], 8 * layout.slices);
    }
  }

  // Posts as soon as there is something to post, and awaits the team's letters meanwhile.
  __device__ __forceinline__ void carry_mail_in_grid(int number, int lane) const {
    const auto box = [&](int slot) {
      return parts.mail + (int64_t{team} * TEAMS_SLOTS + slot) * layout.slices * TEAMS_LETTERS;
    };
    int posted = number;  // the next one to post
    for (bool done = false;;) {
      int slot = posted % TEAMS_SLOTS;
      if (!done && __any_sync(0xffffffffu, has_passed(&shared().given[slot], posted / TEAMS_SLOTS & 1))) {
        const Mail kind = shared().kinds[slot];
        done = kind == Mail::done;
        if (!done) {
          const double share = share_of_block(slot, kind, lane);
          if (lane < TEAMS_LETTERS)
            post_letter(box(slot) + rank * TEAMS_LETTERS + lane,
                        make_uint2(lane == 0 ? __double2loint(share) : __double2hiint(share), posted + 1));
          posted += TEAMS_MAILERS;
        }
      }
      if (number == posted) {
        if (done) return;
        continue;
      }
      slot = number % TEAMS_SLOTS;
      const Mail kind = shared().kinds[slot];
      const uint2* const letters_from = box(slot);
      const unsigned tag = static_cast<unsigned>(number) + 1;
      double all = 0;
      bool there = true;
#pragma unroll 4
      for (int peer = lane; peer < layout.slices; peer += 32) {
        const uint4 letters = read_letters(letters_from + peer * TEAMS_LETTERS);
        there = there && letters.y == tag && letters.w == tag;
        all = plus(all, __hiloint2double(static_cast<int>(letters.z), static_cast<int>(letters.x)), kind);
      }
      if (!__all_sync(0xffffffffu, there)) continue;
      all = sum(all, kind);
      if (lane == 0) {
        shared().mail[slot][0] = all;
        arrive(&shared().mailed[slot]);
      }
      number += TEAMS_MAILERS;
    }
  }

  // A float64, or two float32 side by side.
  __device__ __forceinline__ static double plus(double a, double b, Mail kind) {
    if (kind == Mail::square) return a + b;
    return pair(low(a) + low(b), high(a) + high(b));
  }
  __device__ __forceinline__ static double sum(double v, Mail kind) {
    for (int hop = 16; hop > 0; hop /= 2) v = plus(v, __shfl_xor_sync(0xffffffffu, v, hop), kind);
    return v;
  }
  __device__ __forceinline__ static float low(double v) { return __int_as_float(__double2loint(v)); }
  __device__ __forceinline__ static float high(double v) { return __int_as_float(__double2hiint(v)); }
  __device__ __forceinline__ static double pair(float a, float b) {
    return __hiloint2double(__float_as_int(b), __float_as_int(a));
  }

  // The consumers.

  struct Mine {          // of the row, in this thread
    float y[Q], sum[Q];  // sum: weighted, of r_j - c
    uint4 c[SLOTS];      // the centre, as it is stored
    RowScores scores;
    float half_alpha;
    float source;  // the weight of the row's own source
  };

  __device__ __forceinline__ static int element(int tid, int slot) { return (slot * THREADS + tid) * EV; }

  // This warp's share of exchange `number`, the same in all lanes.
  __device__ __forceinline__ void give(int number, Mail kind, double share, int tid) const {
    const int slot = number % TEAMS_SLOTS;
    if (tid % 32 == 0) {
      shared().shares[slot][tid / 32] = share;
      if (tid == 0) shared().kinds[slot] = kind;
      arrive(&shared().given[slot]);
    }
  }
  // The team's answer.
  __device__ __forceinline__ double take(int number, Mail kind) const {
    const int slot = number % TEAMS_SLOTS;
    wait_barrier(&shared().mailed[slot], number / TEAMS_SLOTS & 1);
    if (layout.team == Team::grid) return shared().mail[slot][0];
    double all = shared().mail[slot][0], others[BULK_MAX_CLUSTER];
#pragma unroll
    for (int peer = 1; peer < BULK_MAX_CLUSTER; ++peer) others[peer] = shared().mail[slot][peer];
#pragma unroll
    for (int peer = 1; peer < BULK_MAX_CLUSTER; ++peer) {
      if (peer < layout.slices) all = plus(all, others[peer], kind);
    }
    return all;
  }

  __device__ __forceinline__ void load(const Array& a, int64_t index, int tid, float (&out)[Q]) const {
    load_elements<EV, THREADS * EV>(a, index * in.d + offset, element(tid, 0), length, layout.vectors, out);
  }

  // The centre, y = x - alpha c, and where it is wanted |y|^2. What is read is on its way while the announcer
  // works out what else there is to know of the row.
  __device__ __forceinline__ void begin_segment(Mine& mine, const Segment<1>& segment, Barrier* told,
                                                int phase, int& exchanges, int tid) const {
    const RowState& row = segment.rows[0];
    load({row.x, in.x.dtype}, row.index, tid, mine.y);
    const T* const from = static_cast<const T*>(in.refs.data) + segment.centre * in.d + offset;
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      mine.c[s] = uint4{0, 0, 0, 0};
      if (segment.centre >= 0 && element(tid, s) < length)
        mine.c[s] = *reinterpret_cast<const uint4*>(from + element(tid, s));
    }
    wait_barrier(told, phase);
    const double square = subtract_centre<T>(row, mine.c, segment.squares, mine.y);
    mine.half_alpha = row.half_alpha, mine.scores.rate = row.rate;
    mine.scores.reset(), mine.source = 0;
#pragma unroll
    for (int q = 0; q < Q; ++q) mine.sum[q] = 0;
    double shift = 0;
    if (segment.squares) {
      give(exchanges, Mail::square, warp_sum(square), tid);
      shift = row.per_square * take(exchanges, Mail::square);
      ++exchanges;
    }
    if (tid == 0) shared().shift = shift;
  }

  __device__ __forceinline__ float* kept_scores(const Segment<1>& segment) const {
    return parts.kept.at + segment.rows[0].index * parts.kept.row + segment.kept;
  }

  // The d_j of 16 bytes of each reference of a tile, one after the other: visit(s, j, d). Beyond D they are
  // zero, beyond the tile's `many` references those of the first.
  template <typename Visit>
  __device__ __forceinline__ void read_tile(const Mine& mine, int at, int many, int tid,
                                            const Visit& visit) const {
    const T* const refs = stage(at) + tid * EV;
    const T* const second = refs + (many > 1 ? static_cast<int>(layout.slice) : 0);
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      uint4 packed = mine.c[s];
      // Not converted once and for all before the loop, which would want the registers.
      asm volatile("" : "+r"(packed.x), "+r"(packed.y), "+r"(packed.z), "+r"(packed.w));
      float c[EV];
      unpack<T, EV>(packed, c);
      const bool within = element(tid, s) < length;
#pragma unroll
      for (int j = 0; j < TR; ++j) {
        uint4 raw{0, 0, 0, 0};
        if (within) raw = *reinterpret_cast<const uint4*>((j == 0 ? refs : second) + s * THREADS * EV);
        float difference[EV];
        unpack<T, EV>(raw, difference);
#pragma unroll
        for (int k = 0; k < EV; ++k) difference[k] -= c[k];
        visit(s, j, difference);
      }
    }
  }

  __device__ __forceinline__ void score_tile(const Mine& mine, int at, int many, int number, int tid) const {
    float norm[TR] = {}, scores[TR] = {};
    read_tile(mine, at, many, tid, [&](int s, int j, const float (&difference)[EV]) {
#pragma unroll
      for (int k = 0; k < EV; ++k) {
        norm[j] = fmaf(difference[k], difference[k], norm[j]);
        scores[j] = fmaf(mine.y[s * EV + k], difference[k], scores[j]);
      }
    });
#pragma unroll
    for (int j = 0; j < TR; ++j) {
      scores[j] = fmaf(-mine.half_alpha, norm[j], scores[j]);
      scores[j] = warp_sum(scores[j]);
    }
    give(number, Mail::scores, pair(scores[0], TR > 1 ? scores[TR - 1] : 0.0f), tid);
  }

  // The first of the `many` last references of the segment.
  __device__ __forceinline__ void add_tile(Mine& mine, const Segment<1>& segment, int at, int many,
                                           int number, int tid) const {
    const double answer = take(number, Mail::scores);
    float weights[TR], exponents[TR];
    weights[0] = low(answer);
    if constexpr (TR > 1) weights[1] = high(answer);
    if (!weigh_scores(mine.scores, many, weights, exponents, mine.sum)) return;
    if (tid == 0 && segment.kept >= 0 && rank == 0)
      keep_scores(kept_scores(segment) + (segment.references - many), mine.scores, shared().shift, many,
                  exponents);
    read_tile(mine, at, many, tid, [&](int s, int j, const float (&difference)[EV]) {
#pragma unroll
      for (int k = 0; k < EV; ++k)
        mine.sum[s * EV + k] = fmaf(weights[j], difference[k], mine.sum[s * EV + k]);
    });
  }

  // The row's own source, as one more reference.
  __device__ __forceinline__ void weigh_own_source(Mine& mine, const RowState& row, int& exchanges,
                                                   int tid) const {
    float difference[Q];
    load(in.source, row.index, tid, difference);
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      float c[EV];
      unpack<T, EV>(mine.c[s], c);
#pragma unroll
      for (int k = 0; k < EV; ++k) difference[s * EV + k] -= c[k];
    }
    give(exchanges, Mail::square, warp_sum(score_source(row, mine.y, difference)), tid);
    const double score = take(exchanges, Mail::square);
    ++exchanges;
    mine.source = weigh_source(mine.scores, score, row.exact_rate(), mine.sum);
  }

  // A segment's sums, to the row's result or to its part in memory.
  __device__ __forceinline__ void end_segment(Mine& mine, const Segment<1>& segment, int tid) const {
    const RowState& row = segment.rows[0];
    const int flags = segment.flags, others = segment.to - segment.from;
    const bool ends = flags & SEGMENT_PART_END, whole = ends && others == 0;
    RowEnd end{row.index, row.out, 0, segment.from, segment.to, row.coefficients(), {}};
    const RowPlace here = place();
    const int64_t part = here.part_of(team, flags & SEGMENT_UNIT_BEGIN, 0);
    named_barrier(1, THREADS);  // `shift` and `moved` are written
    double by = 1, before = 0;
    end.own = mine.scores.part(mine.source);
    end.own.log2_weight -= shared().shift, end.own.total += mine.source;
    if (!(flags & SEGMENT_PART_BEGIN)) {
      const Joined joined = join(shared().moved, end.own);
      end.own = joined.all, before = joined.by_first, by = joined.by_second;
    }
    const double weighted = by * mine.scores.total, source = by * mine.source, mean_by = 1 / end.own.total;
    double* const sums = parts.sums + part * layout.slice;
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      const int e = element(tid, s);
      float c[EV];
      unpack<T, EV>(mine.c[s], c);
#pragma unroll
      for (int k = 0; k < EV; k += 4) {
        if (e >= length) continue;
        double v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          v[i] = fma(by, static_cast<double>(mine.sum[s * EV + k + i]), weighted * c[k + i]);
        add_source(in, here, row.index, e + k, source, v);
        if (!(flags & SEGMENT_PART_BEGIN)) add_sums(sums + e + k, before, v);
        if (whole) {
          store_row(in, here, end, e + k, mean_by, load_x(in, here, row, e + k), v);
        } else {
          store_sums(sums + e + k, v);
        }
      }
    }
    if (ends && !whole && tid == 0) parts.rows[part] = end.own;
    named_barrier(1, THREADS);
    if (tid == 0) shared().moved = end.own;
    if (whole && tid == 0) finish_row(in, parts, here, end.index, end.of, end.own, &shared().doubtful);
    if (!ends || whole || !layout.merge_last) return;
    if (tid == 0) {
      wait_for_previous_launch();  // which sets the counts to zero
      shared().last =
          add_arrival(parts.arrived + static_cast<int64_t>(segment.order) * layout.slices + rank) == others;
    }
    named_barrier(1, THREADS);
    if (!shared().last) return;
    merge_row<THREADS>(in, parts, here, end, &shared().doubtful, [tid] { return tid; });
  }

  __device__ __forceinline__ void consume(int tid) const {
    int s = 0, phase = 0, behind = 0;  // the stages of the next tile to score and to add
    int slot = 0, slot_phase = 0, exchanges = 0;
    for (;;) {
      wait_barrier(&shared().announced.placed[slot], slot_phase);
      const Segment<1>& segment = shared().announced.segments[slot];
      if (segment.flags & SEGMENT_LIST_DONE) break;
      Mine mine;
      begin_segment(mine, segment, &shared().announced.told[slot], slot_phase, exchanges, tid);
      const int tiles = segment.tiles, references = segment.references;
#pragma unroll 1
      for (int i = 0; i < tiles + LAG; ++i) {
        if (i < tiles) {
          wait_barrier(&shared().full[s], phase);
          if (references > 0) score_tile(mine, s, references - i * TR, exchanges + i, tid);
          if (++s == layout.stages) s = 0, phase ^= 1;
        }
        if (i >= LAG) {
          if (references > 0)
            add_tile(mine, segment, behind, references - (i - LAG) * TR, exchanges + i - LAG, tid);
          __syncwarp();
          if (tid % 32 == 0) arrive(&shared().empty[behind]);
          if (++behind == layout.stages) behind = 0;
        }
      }
      if (references > 0) exchanges += tiles;
      if (in.source.data && segment.flags & SEGMENT_UNIT_END)
        weigh_own_source(mine, segment.rows[0], exchanges, tid);
      end_segment(mine, segment, tid);
      __syncwarp();
      if (tid % 32 == 0) arrive(&shared().announced.done[slot]);
      if (++slot == SEGMENT_SLOTS) slot = 0, slot_phase ^= 1;
    }
#pragma unroll 1
    for (int i = 0; i < TEAMS_MAILERS; ++i) give(exchanges + i, Mail::done, 0.0, tid);
    write_dead_rows(in, list, parts, place(), teams, team, tid, THREADS);
    named_barrier(1, THREADS);
    if (shared().doubtful != NO_ROW)
      settle_rows<T>(in, parts, place(), shared().doubtful, memory() + staging, tid);
  }
};

template <typename T, int Q, int TR>
__global__ void __launch_bounds__(GROUPS_CONSUMERS + BULK_PRODUCERS, 1)
    teams_kernel(const __grid_constant__ Inputs in, const __grid_constant__ UnitList shared_list,
                 const __grid_constant__ BulkParts parts, const __grid_constant__ TeamsLayout layout) {
  using Kernel = Teams<T, Q, TR>;
  TeamsShared& shared = Kernel::shared();
  UnitList list = shared_list;
  int staging = static_cast<int>(Kernel::FIXED_BYTES);
  if (layout.own_list) {
    list = place_unit_list(Kernel::memory() + staging, in.n, in.k, shared_list.costs);
    staging += static_cast<int>(bulk_list_smem(in.n, in.k));
  }
  const Kernel kernel{in, list, parts, layout, staging};
  ListScratch* const scratch = reinterpret_cast<ListScratch*>(Kernel::memory() + staging);  // before copies
  const int tid = threadIdx.x, other = tid - GROUPS_CONSUMERS;
  if (!layout.merge_last) allow_next_launch();
  const bool short_list = layout.own_list && in.n <= WARP_LIST_ROWS;
  if (layout.own_list && !short_list) read_rows(in, *scratch);
  if (short_list && other >= 0 && other < 32) build_list_in_warp<TR, 1>(in, list, other);
  if (other == 32) {
#pragma unroll 1
    for (int s = 0; s < layout.stages; ++s) {
      init_barrier(&shared.full[s], 1);
      init_barrier(&shared.empty[s], Kernel::WARPS);
    }
#pragma unroll 1
    for (int slot = 0; slot < TEAMS_SLOTS; ++slot) {
      init_barrier(&shared.given[slot], Kernel::WARPS);
      init_barrier(&shared.mailed[slot], 1);
    }
    init_barrier(&shared.rows_known, 32);
    shared.announced.init(Kernel::WARPS);
    shared.doubtful = NO_ROW;
    publish_barriers();
  }
  __syncthreads();
  if (layout.team == Team::cluster) meet_cluster();
  if (!layout.own_list) wait_for_previous_launch();
  if (other >= 0) {
    give_up_registers<TEAMS_OTHER_REGISTERS>();
    if (layout.own_list && !short_list) build_own_list<TR, 1>(in, list, *scratch, other);
    if (other < 32) {
      const auto most_tiles = [](int) { return Kernel::SEGMENT_TILES; };
      const auto name_row = [&](int64_t index, RowState& row) {
        row.index = index, row.x = x_of(in, index).data;
      };
      const auto know_row = [&](int64_t index, RowState& row) {
        if (!short_list) return set_row(in, index, row);
        wait_barrier(&shared.rows_known, 0);
        row = shared.known[index];
      };
      announce<TR>(in, list, kernel.place(), kernel.teams, kernel.team, shared.announced, parts.kept,
                   most_tiles, name_row, know_row, other);
    } else if (other < 64) {
      kernel.produce(other - 32);
    } else {
      if (short_list && other < 96) {
        if (other - 64 < in.n) set_row(in, other - 64, shared.known[other - 64]);
        arrive(&shared.rows_known);
      }
      if (layout.own_list && !layout.merge_last && blockIdx.x == 0 && other >= 96)
        leave_list(in, list, shared_list, other - 96, 32);
      if (layout.team == Team::cluster) {
        kernel.carry_mail_in_cluster(other / 32 - 2, other % 32);
      } else {
        kernel.carry_mail_in_grid(other / 32 - 2, other % 32);
      }
    }
  } else {
    take_registers<TEAMS_CONSUMER_REGISTERS>();
    kernel.consume(tid);
  }
  if (layout.team == Team::cluster) {  // no block leaves while another may write to its shared memory
    __syncwarp();
    meet_cluster();
  }
}

}  // namespace svel::cuda
