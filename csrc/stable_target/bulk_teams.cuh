// One pass over the references on Hopper for samples that no thread block holds: a team of blocks shares a
// sample, each with a slice of D. Exactness, parts and the list of units: as in bulk_groups.cuh; a unit has
// one row.
//
// In a block the announcer tells of the segments, and the producer brings tiles of a slice of a few
// references into a ring in shared memory by bulk copies. Sixteen warps score a tile, leave their partial
// sums for the mailers, and go on to the next one: LAG tiles later its scores have come back from the whole
// team, the tile is read again and added to the row, and its stage is free. So the way over the team costs no
// time. In a cluster two warps, the mailers, take tiles in turn: they add up the block's partial sums and
// send them to all blocks of the team, through distributed shared memory. Of a team all over the grid the
// announcer adds them up and posts them, as letters in device memory, tagged with the number of their
// exchange, which the mailers await.
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
  int lag;                // tiles that are scored ahead of those that are added
  bool vectors;           // x, source and out allow 16-byte loads and stores
  bool own_list;          // each block builds the list of units in its shared memory
  bool merge_last;        // the last team to finish merges; else merge_kernel
  int zeros;              // words from BulkParts::mail on that the kernel clears itself, of Team::grid
};

// Exchanges that have memory of their own: that of exchange e is used again by e + SLOTS. A block sends that
// only when its warps have had the answers to e + SLOTS - lag - 1, to which all blocks' warps must have given
// their share, each after it had read the answers up to e + SLOTS - 2 lag - 2.
constexpr int TEAMS_SLOTS = 10;
static_assert(TEAMS_SLOTS >= 2 * BULK_MOST_LAG + 2, "see above");
constexpr int TEAMS_MAILERS = 2;
constexpr int TEAMS_LETTERS = 2;  // for a word of an exchange
// The mailers of a team all over the grid want more than 32, to have all letters on their way at once; more
// than 16 elements leave them none.
constexpr int teams_consumer_registers(int elements) {
  return elements <= 16 ? 104 : 112;
}
constexpr int teams_other_registers(int elements) {
  return elements <= 16 ? 64 : 32;
}

enum class Mail : int { scores, square, done };

// WORDS of 8 bytes are exchanged at a time: two float32 each, or the first a float64.
template <int WORDS>
struct TeamsShared {
  static constexpr int WARPS = GROUPS_CONSUMERS / 32;
  Barrier full[BULK_MAX_STAGES], empty[BULK_MAX_STAGES];
  Barrier cleared;                                  // what is zero at first, in all blocks
  Barrier given[TEAMS_SLOTS], mailed[TEAMS_SLOTS];  // shares of the block's warps; of the team's blocks
  alignas(16) double shares[TEAMS_SLOTS][WARPS][WORDS];
  alignas(16) double mail[TEAMS_SLOTS][WORDS == 1 ? BULK_MAX_CLUSTER : 1][WORDS];
  Mail kinds[TEAMS_SLOTS];
  Announcements<1> announced;
  RowState known[WARP_LIST_ROWS];  // of the rows, where the list is short
  double shift;                    // |y|^2 / (2 sigma^2) in units of log 2
  GroupsRow moved;                 // to memory already
  int best[WARPS];  // in each warp: the reference of the largest score, counted from the segment's end
  int last;
  int early;     // tiles of the first segment that are on their way already
  int doubtful;  // the first of the rows to be settled
};

// T: of the references. Each of the consumers owns Q elements of the slice. TR: references per tile.
template <typename T, int Q, int TR>
struct Teams {
  static constexpr int THREADS = GROUPS_CONSUMERS, EV = 16 / static_cast<int>(sizeof(T)), SLOTS = Q / EV;
  static constexpr int WARPS = THREADS / 32, SEGMENT_TILES = SEGMENT_REFS / TR;
  static constexpr int WORDS = TR <= 2 ? 1 : TR / 2;
  // Teams may be clusters: not of samples as long as those that want 32 elements a thread.
  static constexpr bool CLUSTERS = WORDS == 1 && Q <= 16;
  using Shared = TeamsShared<WORDS>;
  static constexpr int READY = 2;  // the barrier of those that begin
  static constexpr int64_t FIXED_BYTES = (sizeof(Shared) + 127) / 128 * 128;

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
  __device__ __forceinline__ static Shared& shared() { return *reinterpret_cast<Shared*>(memory()); }
  __device__ __forceinline__ T* stage(int s) const {  // (TR, slice)
    const int bytes = TR * static_cast<int>(layout.slice * sizeof(T));
    return reinterpret_cast<T*>(memory() + (staging + s * bytes));
  }
  __device__ __forceinline__ RowPlace place() const {
    return {layout.slices, rank, 1, layout.slice, offset, length, layout.vectors};
  }

  // Up to WARP_LIST_ROWS rows all blocks know from the start.
  __device__ __forceinline__ bool knows_rows() const { return layout.own_list && in.n <= WARP_LIST_ROWS; }

  // Before the block's threads meet.

  // The consumers: barriers, and what is zero at first in this block's share of the device memory.
  __device__ __forceinline__ void prepare(int tid) const {
    Shared& s = shared();
    if (tid == 32 || tid == 64) {
#pragma unroll 1
      for (int i = 0; i < layout.stages; ++i)
        init_barrier((tid == 32 ? s.full : s.empty) + i, tid == 32 ? 1 : WARPS);
    } else if (tid == 96 || tid == 128) {
#pragma unroll 1
      for (int i = 0; i < TEAMS_SLOTS; ++i)
        init_barrier((tid == 96 ? s.given : s.mailed) + i, tid == 96 ? WARPS : 1);
    } else if (tid == 160) {
      init_barrier(&s.cleared, 1);
      s.announced.init(WARPS);
      s.doubtful = NO_ROW;
      if (!knows_rows()) s.early = 0;
    }
    if (tid % 32 == 0 && tid <= 160) publish_barriers();
    __syncwarp();
    if (knows_rows() && tid / 32 == 1) named_barrier_arrive(READY, 64);
    constexpr int CLEARING = THREADS / 2;
#pragma unroll 1
    for (int i = (tid - CLEARING) * gridDim.x + blockIdx.x; tid >= CLEARING && i < layout.zeros;
         i += CLEARING * gridDim.x)
      reinterpret_cast<int*>(parts.mail)[i] = 0;
  }

  // The announcer, where rows are few: the list, and the first copies, long before the rest can be known.
  // Whether the first segment is placed.
  __device__ __forceinline__ bool begin(int lane) const {
    const LaneUnit unit = build_list_in_warp<TR, 1>(in, list, lane);
    Segment<1>& first = shared().announced.segments[0];
    const bool placed = place_first<TR>(in, unit, teams, team, SEGMENT_TILES, 0, first, lane);
    named_barrier(READY, 64);
    const int tiles = placed ? copy_first(first, lane) : 0;
    if (lane == 0) shared().early = tiles;
    return placed;
  }
  // As many tiles as may be on their way.
  __device__ __forceinline__ int copy_first(const Segment<1>& segment, int lane) const {
    const int tiles = min(segment.tiles, layout.in_flight), tile = lane / TR;
    const uint32_t bytes = static_cast<uint32_t>(length * sizeof(T));
    if (lane < tiles)
      arrive_expecting(&shared().full[lane], max(min(segment.references - lane * TR, TR), 0) * bytes);
    __syncwarp();
    if (tile < tiles && lane < segment.references)
      bulk_copy(stage(tile) + lane % TR * layout.slice,
                static_cast<const T*>(in.refs.data) + (segment.first + lane) * in.d + offset, bytes,
                &shared().full[tile], segment.alone ? read_once_policy() : usual_policy());
    return tiles;
  }

  // The producer: each lane issues the copy of one reference.
  __device__ __forceinline__ void produce(int lane) const {
    const uint64_t once = read_once_policy(), usual = usual_policy();
    const uint32_t bytes = static_cast<uint32_t>(length * sizeof(T));
    int early = shared().early;
    int s = early, phase = 1, slot = 0, slot_phase = 0;
    // The tile that must have arrived before the next one is on its way.
    int behind = layout.stages - layout.in_flight + early, behind_phase = 1;
    if (behind >= layout.stages) behind -= layout.stages, behind_phase = 0;
    for (;;) {
      wait_barrier(&shared().announced.placed[slot], slot_phase);
      const Segment<1>& segment = shared().announced.segments[slot];
      if (segment.flags & SEGMENT_LIST_DONE) return;
      const uint64_t policy = segment.alone ? once : usual;
      const T* from =
          static_cast<const T*>(in.refs.data) + (segment.first + early * TR + lane) * in.d + offset;
      int left = segment.references - early * TR;
#pragma unroll 1
      for (int tiles = segment.tiles - early; tiles > 0; --tiles, left -= TR, from += TR * in.d) {
        const int many = max(min(left, TR), 0);
        wait_barrier(&shared().full[behind], behind_phase);
        if (++behind == layout.stages) behind = 0, behind_phase ^= 1;
        wait_barrier(&shared().empty[s], phase);
        if (lane == 0) arrive_expecting(&shared().full[s], many * bytes);
        __syncwarp();
        if (lane < many) bulk_copy(stage(s) + lane * layout.slice, from, bytes, &shared().full[s], policy);
        if (++s == layout.stages) s = 0, phase ^= 1;
      }
      early = 0;
      __syncwarp();  // all lanes have read the segment before the consumers can be done with it
      if (++slot == SEGMENT_SLOTS) slot = 0, slot_phase ^= 1;
    }
  }

  // The mailers: exchanges `number`, number + TEAMS_MAILERS, ... until the consumers are done. Lane l has
  // word l % WORDS.
  __device__ __forceinline__ double share_of_block(int slot, Mail kind, int lane) const {
    return sum<WARPS * WORDS>(lane < WARPS * WORDS ? shared().shares[slot][lane / WORDS][lane % WORDS] : 0.0,
                              kind);
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

  // The sum of the team's letters of an exchange, of those that fall to this lane, when they are there: all
  // on their way at once, and again those that were not there. Of single scores the first letter is all.
  template <int EACH>
  __device__ __forceinline__ double read_mail(const uint2* from, unsigned tag, Mail kind, int lane) const {
    const int words = layout.slices * WORDS;
    const uint2* const mine = from + letter_of(lane, 0);
    constexpr int STEP = TR == 1 ? 32 : 32 * TEAMS_LETTERS;
    if (TR == 1 && kind == Mail::scores) {
      uint2 letters[EACH];
#pragma unroll
      for (int i = 0; i < EACH; ++i) letters[i] = uint2{0, i * 32 + lane < words ? 0 : tag};
      bool there;
      do {
        there = true;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
          if (letters[i].y != tag) letters[i] = read_letter(mine + i * STEP);
        }
#pragma unroll
        for (int i = 0; i < EACH; ++i) there = there && letters[i].y == tag;
      } while (!__all_sync(0xffffffffu, there));
      float sum = 0;
#pragma unroll
      for (int i = 0; i < EACH; ++i) sum += __uint_as_float(letters[i].x);
      return pair(sum, 0);
    }
    constexpr int AT_ONCE = TR == 1 ? 1 : EACH;  // what is rare spills nothing of the rest
    double square = 0;
    float a = 0, b = 0;
#pragma unroll 1
    for (int first = 0; first < EACH; first += AT_ONCE) {
      uint4 letters[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const unsigned none = (first + i) * 32 + lane < words ? 0 : tag;
        letters[i] = uint4{0, none, 0, none};
      }
      bool there;
      do {
        there = true;
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
          if (letters[i].y == tag && letters[i].w == tag) continue;
          const uint2* const at = mine + (first + i) * STEP;
          if constexpr (TR == 1) {
            const uint2 low = read_letter(at), high = read_letter(at + layout.slices);
            letters[i] = uint4{low.x, low.y, high.x, high.y};
          } else {
            letters[i] = read_letters(at);
          }
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) there = there && letters[i].y == tag && letters[i].w == tag;
      } while (!__all_sync(0xffffffffu, there));
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        square += __hiloint2double(static_cast<int>(letters[i].z), static_cast<int>(letters[i].x));
        a += __uint_as_float(letters[i].x), b += __uint_as_float(letters[i].z);
      }
    }
    return kind == Mail::square ? square : pair(a, b);
  }

  // In the box of an exchange, a letter of a word of the team: those of single scores are side by side.
  __device__ __forceinline__ int letter_of(int word, int half) const {
    return TR == 1 ? half * layout.slices + word : word * TEAMS_LETTERS + half;
  }
  __device__ __forceinline__ uint2* box(int slot) const {
    return parts.mail + (int64_t{team} * TEAMS_SLOTS + slot) * layout.slices * (TEAMS_LETTERS * WORDS);
  }
  // Until all blocks' letters are empty.
  __device__ __forceinline__ void await_clearing(bool first) const {
    if (first) {
      wait_for_grid(arrive_in_grid());
      arrive(&shared().cleared);
    }
    __syncwarp();
    wait_barrier(&shared().cleared, 0);
  }

  // The announcer, between segments and after them: posts the block's share of the next exchange, if it is
  // there.
  struct Posts {
    int number = 0;
    bool done = false;
  };
  __device__ __forceinline__ Barrier* next_given(const Posts& posts) const {
    return &shared().given[posts.number % TEAMS_SLOTS];
  }
  __device__ __forceinline__ void post(Posts& posts, int lane) const {
    const int slot = posts.number % TEAMS_SLOTS, half = lane / WORDS;
    if (posts.done || !__any_sync(0xffffffffu, has_passed(next_given(posts), posts.number / TEAMS_SLOTS & 1)))
      return;
    const Mail kind = shared().kinds[slot];
    posts.done = kind == Mail::done;
    if (posts.done) return;
    const double share = share_of_block(slot, kind, lane);
    if (layout.zeros > 0 && posts.number == 0) wait_barrier(&shared().cleared, 0);
    __syncwarp();
    ++posts.number;
    if (half < TEAMS_LETTERS)
      post_letter(box(slot) + letter_of(rank * WORDS + lane % WORDS, half),
                  make_uint2(half == 0 ? __double2loint(share) : __double2hiint(share), posts.number));
  }
  __device__ __forceinline__ void tell(bool begun, int lane) const {
    const bool posting = layout.team == Team::grid;
    Posts posts;
    const auto most_tiles = [](int) { return SEGMENT_TILES; };
    const auto know_row = [&](int64_t index, RowState& row) {
      if (!knows_rows()) set_row(in, index, row);
    };
    const auto await = [&](Barrier* barrier, int phase) {
      while (!__any_sync(0xffffffffu, has_passed(barrier, phase))) {
        if (posting) post(posts, lane);
      }
    };
    announce<TR, false>(in, list, place(), teams, team, shared().announced, most_tiles, know_row, await, lane,
                        begun);
    while (posting && !posts.done) {
      wait_barrier(next_given(posts), posts.number / TEAMS_SLOTS & 1);
      post(posts, lane);
    }
  }

  // Awaits the team's letters.
  template <int EACH>
  __device__ __forceinline__ void carry_mail_in_grid(int number, int lane) const {
    for (;; number += TEAMS_MAILERS) {
      const int slot = number % TEAMS_SLOTS;
      wait_barrier(&shared().given[slot], number / TEAMS_SLOTS & 1);
      const Mail kind = shared().kinds[slot];
      if (kind == Mail::done) return;
      const double all = sum(read_mail<EACH>(box(slot), static_cast<unsigned>(number) + 1, kind, lane), kind);
      if (lane < WORDS) shared().mail[slot][0][lane] = all;
      __syncwarp();
      if (lane == 0) arrive(&shared().mailed[slot]);
    }
  }

  __device__ __forceinline__ void carry_mail(int number, int lane) const {
    if (CLUSTERS && layout.team == Team::cluster) {
      if constexpr (CLUSTERS) carry_mail_in_cluster(number, lane);
    } else if (layout.slices * WORDS <= 32) {
      carry_mail_in_grid<1>(number, lane);
    } else if (layout.slices * WORDS <= 64) {
      carry_mail_in_grid<2>(number, lane);
    } else {
      carry_mail_in_grid<5>(number, lane);
    }
  }

  // A float64, or two float32 side by side.
  __device__ __forceinline__ static double plus(double a, double b, Mail kind) {
    if (kind == Mail::square) return a + b;
    return pair(low(a) + low(b), high(a) + high(b));
  }
  // Over the lanes that have the same word, of LANES side by side.
  template <int LANES = 32>
  __device__ __forceinline__ static double sum(double v, Mail kind) {
    if (kind == Mail::square) {
#pragma unroll
      for (int hop = LANES / 2; hop >= WORDS; hop /= 2) v += __shfl_xor_sync(0xffffffffu, v, hop);
      return v;
    }
    float a = low(v), b = TR == 1 ? 0 : high(v);  // single scores have no other
#pragma unroll
    for (int hop = LANES / 2; hop >= WORDS; hop /= 2) {
      a += __shfl_xor_sync(0xffffffffu, a, hop);
      if constexpr (TR > 1) b += __shfl_xor_sync(0xffffffffu, b, hop);
    }
    return pair(a, b);
  }
  __device__ __forceinline__ static float low(double v) { return __int_as_float(__double2loint(v)); }
  __device__ __forceinline__ static float high(double v) { return __int_as_float(__double2hiint(v)); }
  __device__ __forceinline__ static double pair(float a, float b) {
    return __hiloint2double(__float_as_int(b), __float_as_int(a));
  }

  // The consumers.

  __device__ __forceinline__ const RowState& row_of(const Segment<1>& segment) const {
    return knows_rows() ? shared().known[segment.rows[0].index] : segment.rows[0];
  }

  struct Mine {          // of the row, in this thread
    float y[Q], sum[Q];  // sum: weighted, of r_j - c
    uint4 c[SLOTS];      // the centre, as it is stored
    RowScores scores;
    float half_alpha;
    float source;  // the weight of the row's own source
    int left;      // elements of the slice, from this thread's first one on
  };

  __device__ __forceinline__ static int element(int tid, int slot) { return (slot * THREADS + tid) * EV; }

  // The slots of the exchanges to which this warp gives its share next and whose answer it takes next.
  struct Exchanges {
    int given = 0, taken = 0;
    int phases = 0;  // that of the latter and, times 2, that of the next tile: one register for both

    __device__ __forceinline__ void give() { given = given == TEAMS_SLOTS - 1 ? 0 : given + 1; }
    __device__ __forceinline__ void take() {
      if (++taken == TEAMS_SLOTS) taken = 0, phases ^= 1;
    }
  };

  // This warp's share is written.
  __device__ __forceinline__ void give(Exchanges& exchanges, Mail kind, int tid) const {
    const int slot = exchanges.given;
    exchanges.give();
    __syncwarp();
    if (tid == 0) shared().kinds[slot] = kind;
    if (tid % 32 == 0) arrive(&shared().given[slot]);
  }
  __device__ __forceinline__ void give_square(Exchanges& exchanges, double share, int tid) const {
    double (&shares)[WORDS] = shared().shares[exchanges.given][tid / 32];
    share = warp_sum(share);
    if (tid % 32 < WORDS) shares[tid % 32] = tid % 32 == 0 ? share : 0.0;
    give(exchanges, Mail::square, tid);
  }
  __device__ __forceinline__ void give_scores(Exchanges& exchanges, float (&scores)[TR], int tid) const {
    const int lane = tid % 32;
    const float sum = warp_sums<TR>(scores, lane);
    double (&shares)[WORDS] = shared().shares[exchanges.given][tid / 32];
    if constexpr (TR == 1) {
      if (lane == 0) shares[0] = pair(sum, 0);
    } else if (lane % (32 / TR) == 0) {
      reinterpret_cast<float*>(shares)[lane / (32 / TR)] = sum;
    }
    give(exchanges, Mail::scores, tid);
  }
  // The team's answer, one word of it.
  __device__ __forceinline__ void await(const Exchanges& exchanges) const {
    wait_barrier(&shared().mailed[exchanges.taken], exchanges.phases & 1);
  }
  __device__ __forceinline__ double take(const Exchanges& exchanges, Mail kind, int word = 0) const {
    const auto& mail = shared().mail[exchanges.taken];
    double all = mail[0][word];
    if constexpr (CLUSTERS) {
      if (layout.team == Team::grid) return all;
      double others[BULK_MAX_CLUSTER];
#pragma unroll
      for (int peer = 1; peer < BULK_MAX_CLUSTER; ++peer) others[peer] = mail[peer][word];
#pragma unroll
      for (int peer = 1; peer < BULK_MAX_CLUSTER; ++peer) {
        if (peer < layout.slices) all = plus(all, others[peer], kind);
      }
    }
    return all;
  }
  __device__ __forceinline__ double take_square(Exchanges& exchanges) const {
    await(exchanges);
    const double all = take(exchanges, Mail::square);
    exchanges.take();
    return all;
  }

  // Whether x or source is read by 16 bytes. Others go through local memory: nothing is called here and where
  // segments end while the row is in registers, since what lives across a call is spilled on all ways.
  __device__ __forceinline__ bool loads_vectors(const Array& a) const {
    return a.dtype == Dtype::f32 && layout.vectors;
  }
  __device__ __forceinline__ void load_vectors(const Array& a, int64_t index, int tid, int slot,
                                               float* out) const {  // (EV,)
    const float* const from = static_cast<const float*>(a.data) + index * in.d + offset + element(tid, slot);
#pragma unroll
    for (int k = 0; k < EV; k += 4) {
      float4 v = make_float4(0, 0, 0, 0);
      if (element(tid, slot) < length) v = *reinterpret_cast<const float4*>(from + k);
      out[k] = v.x, out[k + 1] = v.y, out[k + 2] = v.z, out[k + 3] = v.w;
    }
  }
  struct alignas(16) InMemory {
    float v[Q];
  };
  __device__ __forceinline__ void load_others(const Array& a, int64_t index, int tid, InMemory& out) const {
#pragma unroll 1
    for (int q = 0; q < Q; ++q) {
      const int e = element(tid, q / EV) + q % EV;
      out.v[q] = e < length ? load_as<float>(a, index * in.d + offset + e) : 0.0f;
    }
  }

  // The centre, y = x - alpha c, and where it is wanted |y|^2. What is read is on its way while the announcer
  // works out what else there is to know of the row.
  __device__ __forceinline__ void begin_segment(Mine& mine, const Segment<1>& segment, Barrier* told,
                                                int phase, Exchanges& exchanges, int tid) const {
    const RowState& row = row_of(segment);
    const Array x{row.x, in.x.dtype};
    if (loads_vectors(x)) {
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) load_vectors(x, row.index, tid, s, mine.y + s * EV);
    } else {
      InMemory others;
      load_others(x, row.index, tid, others);
#pragma unroll
      for (int q = 0; q < Q; ++q) mine.y[q] = others.v[q];
    }
    const T* const from = static_cast<const T*>(in.refs.data) + segment.centre * in.d + offset;
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      mine.c[s] = uint4{0, 0, 0, 0};
      if (segment.centre >= 0 && element(tid, s) < length)
        mine.c[s] = *reinterpret_cast<const uint4*>(from + element(tid, s));
    }
    if (!knows_rows()) wait_barrier(told, phase);
    const double square = segment.squares ? square_from_centre<T>(row, mine.c, mine.y) : 0;
    subtract_centre<T>(row, mine.c, false, mine.y);
    mine.half_alpha = row.half_alpha, mine.scores.rate = row.rate;
    mine.scores.reset(), mine.source = 0, mine.left = length - element(tid, 0);
    asm volatile("" : "+r"(mine.left));  // kept, not worked out again in each tile
#pragma unroll
    for (int q = 0; q < Q; ++q) mine.sum[q] = 0;
    double shift = 0;
    if (segment.squares) {
      give_square(exchanges, square, tid);
      shift = row.per_square * take_square(exchanges);
    }
    if (tid == 0) shared().shift = shift;
  }

  // The d_j of 16 bytes of each reference of a tile, one after the other: visit(s, j, d). Beyond D they are
  // zero, beyond the tile's `many` references those of the first.
  template <typename Visit>
  __device__ __forceinline__ void read_tile(const Mine& mine, int at, int many, int tid,
                                            const Visit& visit) const {
    uint32_t from[TR];
#pragma unroll
    for (int j = 0; j < TR; ++j) {
      from[j] = shared_address(stage(at) + tid * EV + (j < many ? j * static_cast<int>(layout.slice) : 0));
      asm volatile("" : "+r"(from[j]));  // once, not for each slot
    }
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      uint4 packed = mine.c[s];
      // Not converted once and for all before the loop, which would want the registers.
      asm volatile("" : "+r"(packed.x), "+r"(packed.y), "+r"(packed.z), "+r"(packed.w));
      float c[EV];
      unpack<T, EV>(packed, c);
      const bool within = mine.left > s * THREADS * EV;
#pragma unroll
      for (int j = 0; j < TR; ++j) {
        uint4 raw{0, 0, 0, 0};
        if (within) raw = load_shared_16(from[j] + s * THREADS * 16);
        float difference[EV];
        unpack<T, EV>(raw, difference);
#pragma unroll
        for (int k = 0; k < EV; ++k) difference[k] -= c[k];
        visit(s, j, difference);
      }
    }
  }

  __device__ __forceinline__ void score_tile(const Mine& mine, int at, int many, Exchanges& exchanges,
                                             int tid) const {
    float norm[TR] = {}, scores[TR] = {};
    read_tile(mine, at, many, tid, [&](int s, int j, const float (&difference)[EV]) {
#pragma unroll
      for (int k = 0; k < EV; ++k) {
        norm[j] = fmaf(difference[k], difference[k], norm[j]);
        scores[j] = fmaf(mine.y[s * EV + k], difference[k], scores[j]);
      }
    });
#pragma unroll
    for (int j = 0; j < TR; ++j) scores[j] = fmaf(-mine.half_alpha, norm[j], scores[j]);
    give_scores(exchanges, scores, tid);
  }

  __device__ __forceinline__ void add_tile(Mine& mine, int at, int many, Exchanges& exchanges,
                                           int tid) const {
    await(exchanges);
    float weights[TR];
#pragma unroll
    for (int word = 0; word < WORDS; ++word) {
      const double answer = take(exchanges, Mail::scores, word);
      weights[2 * word] = low(answer);
      if constexpr (TR > 1) weights[2 * word + 1] = high(answer);
    }
    exchanges.take();
    const auto note = [&](int j) { shared().best[tid / 32] = many - j; };
    if (!weigh_scores(mine.scores, many, weights, mine.sum, note)) return;
    read_tile(mine, at, many, tid, [&](int s, int j, const float (&difference)[EV]) {
#pragma unroll
      for (int k = 0; k < EV; ++k)
        mine.sum[s * EV + k] = fmaf(weights[j], difference[k], mine.sum[s * EV + k]);
    });
  }

  // See RowScores. All blocks of the team do so or none.
  __device__ __forceinline__ void measure_terms(Mine& mine, Exchanges& exchanges, int tid) const {
    float share = 0;
#pragma unroll
    for (int q = 0; q < Q; ++q) share = fmaf(mine.y[q], mine.sum[q], share);
    give_square(exchanges, share, tid);
    mine.scores.measure_terms(static_cast<float>(take_square(exchanges)));
  }

  // What this block has of the row in the end.
  __device__ __forceinline__ GroupsRow own_row(const Mine& mine, const Segment<1>& segment, int tid) const {
    const int64_t best = segment.first + segment.references - shared().best[tid / 32];
    return {mine.scores.top - shared().shift,
            static_cast<double>(mine.scores.total) + static_cast<double>(mine.source),
            fmaxf(mine.scores.lead(), mine.source), mine.scores.worst * mine.scores.rate,
            mine.source > mine.scores.lead() ? OWN_SOURCE : best};
  }

  // The row's own source, as one more reference.
  __device__ __forceinline__ void weigh_own_source(Mine& mine, const RowState& row, Exchanges& exchanges,
                                                   int tid) const {
    const bool vectors = loads_vectors(in.source);
    InMemory others;
    if (!vectors) load_others(in.source, row.index, tid, others);
    double share = 0;
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      float source[EV], c[EV];
      if (vectors) {
        load_vectors(in.source, row.index, tid, s, source);
      } else {
#pragma unroll
        for (int k = 0; k < EV; ++k) source[k] = others.v[s * EV + k];
      }
      unpack<T, EV>(mine.c[s], c);
#pragma unroll
      for (int k = 0; k < EV; ++k) {
        const double d = source[k] - c[k];
        share = fma(fma(-0.5 * row.alpha, d, static_cast<double>(mine.y[s * EV + k])), d, share);
      }
    }
    give_square(exchanges, fma(share, 0.0, share), tid);  // what is not finite becomes NaN
    const double score = take_square(exchanges);
    mine.source = weigh_source(mine.scores, score, row.exact_rate(), mine.sum);
  }

  // The same for what most rows are: of one team and one segment, float32, without a source. In few
  // instructions, which come from memory for the first time when all else is done.
  __device__ __forceinline__ bool ends_at_once(const Mine& mine, const Segment<1>& segment) const {
    constexpr int ALL = SEGMENT_PART_BEGIN | SEGMENT_PART_END;
    return (segment.flags & ALL) == ALL && segment.from == segment.to && layout.vectors &&
           in.x.dtype == Dtype::f32 && in.out.dtype == Dtype::f32 && mine.source == 0;
  }
  __device__ __forceinline__ void end_at_once(Mine& mine, const Segment<1>& segment, int tid) const {
    const RowState& row = row_of(segment);
    const int64_t base = row.index * in.d + offset;
    const float* const x = static_cast<const float*>(row.x) + base;
    float* const out = static_cast<float*>(row.out) + base;
    const bool adds_x = row.a != 0;
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
#pragma unroll
      for (int k = 0; k < EV; k += 4) {
        float4 v = make_float4(0, 0, 0, 0);
        if (element(tid, s) < length && adds_x) v = *reinterpret_cast<const float4*>(x + element(tid, s) + k);
        float* const y = mine.y + s * EV + k;
        y[0] = v.x, y[1] = v.y, y[2] = v.z, y[3] = v.w;
      }
    }
    const GroupsRow own = own_row(mine, segment, tid);
    const double a = row.a, b = row.b, by_sum = b / own.total;
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      float c[EV];
      unpack<T, EV>(mine.c[s], c);
#pragma unroll
      for (int k = 0; k < EV; k += 4) {
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int q = s * EV + k + i;
          v[i] = static_cast<float>(
              fma(by_sum, static_cast<double>(mine.sum[q]),
                  fma(b, static_cast<double>(c[k + i]), a * static_cast<double>(mine.y[q]))));
        }
        if (element(tid, s) < length)
          *reinterpret_cast<float4*>(out + element(tid, s) + k) = make_float4(v[0], v[1], v[2], v[3]);
      }
    }
    if (tid == 0) finish_row(in, parts, place(), row.index, row.b, own, &shared().doubtful);
  }

  // A segment's sums, to the row's result or to its part in memory.
  __device__ __forceinline__ void end_segment(const Mine& mine, const Segment<1>& segment, int tid) const {
    struct {
      alignas(16) T c[Q];
      float sum[Q];
    } kept;  // in local memory, see loads_vectors
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) *reinterpret_cast<uint4*>(kept.c + s * EV) = mine.c[s];
#pragma unroll
    for (int q = 0; q < Q; ++q) kept.sum[q] = mine.sum[q];
    const RowState& row = row_of(segment);
    const int flags = segment.flags, others = segment.to - segment.from;
    const bool ends = flags & SEGMENT_PART_END, whole = ends && others == 0;
    RowEnd end{row.index, row.out, 0, segment.from, segment.to, row.a, row.b, {}};
    const RowPlace here = place();
    const int64_t part = here.part_of(team, flags & SEGMENT_UNIT_BEGIN, 0);
    named_barrier(1, THREADS);  // `shift` and `moved` are written
    double by = 1, before = 0;
    end.own = own_row(mine, segment, tid);
    if (!(flags & SEGMENT_PART_BEGIN)) {
      const Joined joined = join_to(shared().moved, end.own);
      before = joined.by_first, by = joined.by_second;
    }
    const double weighted = by * mine.scores.total, source = by * mine.source, mean_by = 1 / end.own.total;
    double* const sums = parts.sums + part * layout.slice;
#pragma unroll 1
    for (int q = 0; q < Q; q += 4) {
      const int e = element(tid, q / EV) + q % EV;
      if (e >= length) break;
      double v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        v[i] = fma(by, static_cast<double>(kept.sum[q + i]), weighted * to_float(kept.c[q + i]));
      add_source(in, here, row.index, e, source, v);
      if (!(flags & SEGMENT_PART_BEGIN)) add_sums(sums + e, before, v);
      if (whole) {
        store_row(in, here, end, e, mean_by, load_x(in, here, row, e), v);
      } else {
        store_sums(sums + e, v);
      }
    }
    if (ends && !whole && tid == 0) parts.rows[part] = end.own;
    named_barrier(1, THREADS);
    if (tid == 0) shared().moved = end.own;
    if (whole && tid == 0) finish_row(in, parts, here, end.index, end.b, end.own, &shared().doubtful);
    if (!ends || whole || !layout.merge_last) return;
    if (tid == 0) {
      wait_for_previous_launch();  // which sets the counts to zero
      if (layout.zeros > 0) wait_barrier(&shared().cleared, 0);
      shared().last =
          add_arrival(parts.arrived + static_cast<int64_t>(segment.order) * layout.slices + rank) == others;
    }
    named_barrier(1, THREADS);
    if (!shared().last) return;
    merge_row<THREADS>(in, parts, here, end, &shared().doubtful, [tid] { return tid; });
  }

  __device__ __forceinline__ void consume(int tid) const {
    // Kept, where the compiler would read the special register again in each tile.
    if constexpr (Q > 16) tid = __shfl_sync(0xffffffffu, tid, tid % 32);
    int s = 0, behind = 0;  // the stages of the next tile to score and to add
    int slot = 0, slot_phase = 0;
    Exchanges exchanges;
    for (;;) {
      wait_barrier(&shared().announced.placed[slot], slot_phase);
      const Segment<1>& segment = shared().announced.segments[slot];
      if (segment.flags & SEGMENT_LIST_DONE) break;
      Mine mine;
      begin_segment(mine, segment, &shared().announced.told[slot], slot_phase, exchanges, tid);
      // A tile of one reference is there or, in a segment of none, not.
      const bool some = segment.references > 0;
      const int tiles = segment.tiles, references = TR == 1 ? tiles : segment.references;
      int i = 0;  // a loop that may not run at all has copies of the sums where it ends
#pragma unroll 1
      do {
        if (i < tiles) {
          wait_barrier(&shared().full[s], exchanges.phases >> 1);
          score_tile(mine, s, references - i * TR, exchanges, tid);
          if (++s == layout.stages) s = 0, exchanges.phases ^= 2;
        }
        if (const int added = i - layout.lag; added >= 0) {
          add_tile(mine, behind, TR > 1 || some ? references - added * TR : 0, exchanges, tid);
          __syncwarp();
          if (tid % 32 == 0) arrive(&shared().empty[behind]);
          if (++behind == layout.stages) behind = 0;
        }
      } while (++i < tiles + layout.lag);
      // What is worked out from it above would else be kept for what comes below.
      if constexpr (Q > 16) asm volatile("" : "+r"(tid));
      if (mine.scores.is_near_the_first()) measure_terms(mine, exchanges, tid);
      if (in.source.data && segment.flags & SEGMENT_UNIT_END)
        weigh_own_source(mine, row_of(segment), exchanges, tid);
      wait_barrier(&shared().announced.told[slot], slot_phase);
      if (ends_at_once(mine, segment)) {
        end_at_once(mine, segment, tid);
      } else {
        end_segment(mine, segment, tid);
      }
      __syncwarp();
      if (tid % 32 == 0) arrive(&shared().announced.done[slot]);
      if (++slot == SEGMENT_SLOTS) slot = 0, slot_phase ^= 1;
    }
#pragma unroll 1
    for (int i = 0; i < TEAMS_MAILERS; ++i) give(exchanges, Mail::done, tid);
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
  typename Kernel::Shared& shared = Kernel::shared();
  UnitList list = shared_list;
  int staging = static_cast<int>(Kernel::FIXED_BYTES);
  if (layout.own_list) {
    list = place_unit_list(Kernel::memory() + staging, in.n, in.k, shared_list.costs);
    staging += static_cast<int>(bulk_list_smem(in.n, in.k));
  }
  const Kernel kernel{in, list, parts, layout, staging};
  ListScratch* const scratch = reinterpret_cast<ListScratch*>(Kernel::memory() + staging);  // before copies
  const int tid = threadIdx.x, other = tid - GROUPS_CONSUMERS, lane = tid % 32;
  if (!layout.merge_last) allow_next_launch();
  const bool short_list = kernel.knows_rows();
  if (layout.own_list && !short_list) read_rows(in, *scratch);
  bool begun = false;
  if (other < 0) {
    kernel.prepare(tid);
  } else if (short_list && other < 32) {
    begun = kernel.begin(lane);
  } else if (short_list && other >= 64 && other < 64 + in.n) {
    name_row(in, other - 64, shared.known[other - 64]);
    set_row(in, other - 64, shared.known[other - 64]);
  }
  __syncthreads();
  if (layout.team == Team::cluster) meet_cluster();
  if (!layout.own_list) wait_for_previous_launch();
  if (other < 0) {
    take_registers<teams_consumer_registers(Q)>();
    kernel.consume(tid);
  } else {
    if (begun && other == 0) arrive(&shared.announced.placed[0]);
    give_up_registers<teams_other_registers(Q)>();
    if (layout.own_list && !short_list) build_own_list<TR, 1, false>(in, list, *scratch, other);
    if (other < 32) {
      kernel.tell(begun, lane);
    } else if (other < 64) {
      kernel.produce(lane);
    } else {
      if (layout.zeros > 0) kernel.await_clearing(other == 64);
      if (layout.own_list && !layout.merge_last && blockIdx.x == 0 && other >= 96)
        leave_list(in, list, shared_list, lane, 32);
      kernel.carry_mail(other / 32 - 2, lane);
    }
  }
  if (layout.team == Team::cluster) {  // no block leaves while another may write to its shared memory
    __syncwarp();
    meet_cluster();
  }
}

}  // namespace svel::cuda
