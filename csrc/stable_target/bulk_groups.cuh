// One pass over the references of class banks on Hopper, bound by memory: a class is read from device memory
// once for all rows of a unit, into a ring in shared memory, and about 8 D instructions per row of the unit
// and reference follow.
//
// A multiprocessor has one thread block: one warp, the producer, brings tiles of a few references into the
// ring by bulk copies, always as far ahead as the ring allows. The other sixteen warps form independent
// groups, each as wide as a sample: a group takes a tile, forms its scores, exchanges partial sums, runs the
// online softmax and adds the tile to its row. Latencies of one group hide behind the others' work. All
// groups share the row of a unit that has only one, tile by tile in turn; else each row has its own groups
// and a tile serves all rows. The list of units (units.cuh) is cut into ranges, one per block; producer and
// groups walk the range alike, so that nothing but barriers goes between them.
//
// Exactness. Scores and sums are of d_j = r_j - c, with c the first reference of the class:
//   s_j = rate (y.d_j - alpha/2 |d_j|^2),  y = x - alpha c,  so that
//   -|x - alpha r_j|^2 / (2 sigma^2) = s_j - |y|^2 / (2 sigma^2).
// Weights are 2^(s_j - top) with `top` an integer no smaller than all scores of the group so far (in units of
// log 2): when it grows, sums are multiplied by a power of two, which rounds nothing. Every 256 references of
// a group, and at the end of a class, the groups of a row add their sums in float64: so the number of
// references does not matter. |y|^2, in float64 too, tells how classes compare, for rows that take all of
// them and for lse.
//
// Where a unit lies in one block, that is the row's result. Else it is a part in memory, and the last block
// to finish merges the parts, always in their order: results do not depend on who comes last. merge_kernel
// does it where few units are cut into many parts.
#pragma once

#include "stable_target/bulk_parts.cuh"

namespace svel::cuda {

// Of a thread, when the consumers have what the producer's warpgroup does not need.
constexpr int GROUPS_CONSUMER_REGISTERS = 112, GROUPS_PRODUCER_REGISTERS = 64;

struct GroupsLayout {
  int stages;
  bool vectors;     // x, source and out allow 16-byte loads and stores
  bool own_list;    // each block builds the list of units in its shared memory
  bool merge_last;  // the last block to finish merges; else merge_kernel
};

// What a group keeps of its row beside registers. The sign of x: see Row.
struct GroupRow {
  int64_t index;
  double a, b;  // out = a x + b mean
  double alpha;
  double per_square;                               // log2(e) / (2 sigma^2)
  float sign, half_alpha, high_alpha, rest_alpha;  // alpha in float32, and what that drops
  float rate;                                      // log2(e) alpha / sigma^2
};

struct GroupState {
  double top, shift;  // weights are 2^(score - top); |y|^2 / (2 sigma^2) in units of log 2
  float total;
  int stage;  // that holds the group's sums
};

template <int G, int WARPS, int TR>
struct GroupsShared {
  Barrier full[GROUPS_MAX_STAGES], empty[GROUPS_MAX_STAGES], listed;
  // Two of each: a warp is at most one exchange ahead of another that still reads.
  alignas(16) float scores[2][G][TR][WARPS < 4 ? 4 : WARPS];
  double squares[G][WARPS];  // |y|^2
  GroupState states[G];
  PartRow moved[G];  // to memory already
  GroupRow rows[G];
  int last[G];
};

// T: of the references. A group of GT threads owns Q elements of D each. TR: references per tile, kept in
// registers where HELD, so that the stage is free at once; else read twice.
template <typename T, int GT, int Q, int TR, bool HELD>
struct Groups {
  static constexpr int EV = 16 / static_cast<int>(sizeof(T));
  static constexpr int SLOTS = Q / EV, WARPS = GT / 32, G = GROUPS_CONSUMERS / GT;
  static constexpr int ROWS = G < GROUPS_MOST_ROWS ? G : GROUPS_MOST_ROWS;  // of a unit
  static constexpr int SEGMENT_TILES = SEGMENT_REFS / TR;
  static_assert(TR * sizeof(T) >= sizeof(float), "a stage holds the sums of a group");
  using Shared = GroupsShared<G, WARPS, TR>;
  static constexpr int64_t FIXED_BYTES = (sizeof(Shared) + 127) / 128 * 128;

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
  __device__ __forceinline__ T* stage(int s) const {  // (TR, d)
    return reinterpret_cast<T*>(memory() + (staging + s * (TR * d * static_cast<int>(sizeof(T)))));
  }

  // Of the ring: a stage and the parity of its phase.
  struct Place {
    int stage = 0, phase = 0;
  };
  __device__ __forceinline__ void advance(Place& at, int tiles) const {
    at.stage += tiles;
    while (at.stage >= layout.stages) at.stage -= layout.stages, at.phase ^= 1;
  }
  __device__ __forceinline__ void advance_far(Place& at, int64_t tiles) const {
    const int64_t to = at.stage + tiles, rounds = to / layout.stages;
    at.stage = static_cast<int>(to - rounds * layout.stages);
    at.phase ^= static_cast<int>(rounds & 1);
  }

  // The groups of each row.
  __device__ __forceinline__ static int groups_of_a_row(int rows) { return rows == 1 ? G : rows == 2 ? G / 2 : G / 4; }

  struct Share {  // of a unit, in this block: its tiles from `from` to `to`
    int number;
    int64_t from, to;
  };
  template <typename Visit>
  __device__ __forceinline__ void walk(int lane, const Visit& visit) const {
    const Ranges ranges(list, gridDim.x);
    const int64_t low = ranges.begin(blockIdx.x), high = ranges.begin(blockIdx.x + 1);
    if (low >= high) return;
    for (int number = find_unit(list, low, lane); number < list.sizes[0]; ++number) {
      const int64_t begin = list.begins[number], tiles = list.units[number].tiles;
      if (begin >= high) return;
      const int weight = list.units[number].weight;
      const int64_t from = low <= begin ? 0 : ceil_div(low - begin, weight);
      const int64_t to = ceil_div(high - begin, weight);
      if (from < tiles) visit(Share{number, from, to < tiles ? to : tiles});
    }
  }

  // The tiles of one class, from tile `from` of the unit on.
  struct ClassTiles {
    int64_t first;       // of its references, among all k m; -1: it has none
    int64_t count;       // valid references
    int64_t begin, end;  // among the unit's tiles
  };
  __device__ __forceinline__ ClassTiles class_of(const Unit& unit, int64_t from) const {
    if (unit.count == 0) return {-1, 0, 0, unit.tiles};
    if (unit.group >= 0) return {unit.group * in.m, unit.count, 0, unit.tiles};
    const int64_t group = find_prefix(list.group_tiles, 0, in.k, from);
    return {group * in.m, valid_count(in, group), list.group_tiles[group], list.group_tiles[group + 1]};
  }

  // The producer, one thread; the others of its warp help to find the first unit.
  __device__ __forceinline__ void produce(int lane) const {
    const uint64_t once = read_once_policy(), usual = usual_policy();
    Place at{0, 1};
    walk(lane, [&](const Share& share) {
      if (lane > 0) return;
      const Unit unit = list.units[share.number];
      const uint64_t policy = unit.alone ? once : usual;
      const int visits = unit.rows * WARPS, others = GROUPS_CONSUMERS / 32 - visits;
      int64_t tile = share.from;
      bool first = true;
      while (tile < share.to) {
        const ClassTiles tiles = class_of(unit, tile);
        const int64_t stop = tiles.end < share.to ? tiles.end : share.to;
        int64_t reference = (tile - tiles.begin) * TR;
        const T* from = static_cast<const T*>(in.refs.data) + (tiles.first + reference) * d;
        for (; tile < stop; ++tile, reference += TR, from += TR * d) {
          const int many = static_cast<int>(min(tiles.count - reference, int64_t{TR}));
          wait_barrier(&shared().empty[at.stage], at.phase);
          if (others > 0) arrive_for(&shared().empty[at.stage], others);
          const uint32_t bytes = many * d * static_cast<uint32_t>(sizeof(T));
          if (many > 0) {
            arrive_expecting(&shared().full[at.stage], bytes);
            bulk_copy(stage(at.stage), from, bytes, &shared().full[at.stage], policy);
          } else {
            arrive(&shared().full[at.stage]);
          }
          advance(at, 1);
          if (first) {  // what the groups need of x and of the centre, which other blocks may have read
            first = false;
            for (int r = 0; layout.vectors && r < unit.rows; ++r)
              prefetch_bulk(static_cast<const char*>(in.x.data) +
                                list.order[unit.first + r] * in.d * size_of(in.x.dtype),
                            d * size_of(in.x.dtype));
            if (tile > tiles.begin && tiles.first >= 0)
              prefetch_bulk(static_cast<const T*>(in.refs.data) + tiles.first * d,
                            d * static_cast<uint32_t>(sizeof(T)));
          }
        }
      }
    });
  }

  // The consumers.

  struct Mine {  // of a row, in this thread
    float y[Q], sum[Q];  // sum: weighted, of r_j - c
    // The centre; packed where registers are short.
    float c[HELD ? Q : 1];
    uint4 packed[HELD ? 1 : SLOTS];
    // The same in all threads of the group. The largest score, and the integer `top` as base rate + rest;
    // rate in units of log 2.
    float half_alpha, rate, base, rest, total;
    double top;
  };

  struct Role {  // of this thread
    int group, thread, lane;
    int row, turn, groups;  // its row of the unit, its group's turn among those of the row
  };

  __device__ __forceinline__ static int element(const Role& my, int slot) { return (slot * GT + my.thread) * EV; }

  __device__ __forceinline__ static void group_barrier(const Role& my) {
    if constexpr (WARPS == 1) {
      __syncwarp();
    } else {
      named_barrier(G + my.group, GT);
    }
  }
  // Among the groups of the row. Barriers are named as the nodes of a tree over the groups are counted.
  __device__ __forceinline__ static void row_barrier(const Role& my) {
    if (my.groups == 1) {
      group_barrier(my);
    } else {
      named_barrier(G / my.groups + my.group / my.groups, my.groups * GT);
    }
  }

  __device__ __forceinline__ void load_elements(const Array& a, int64_t index, const Role& my, float (&out)[Q]) const {
    const int64_t base = index * in.d;
    const float* const from = static_cast<const float*>(a.data) + base;
    const bool fast = a.dtype == Dtype::f32 && layout.vectors;
#pragma unroll
    for (int q = 0; q < Q; q += 4) {
      const int e = element(my, q / EV) + q % EV;
      float4 v = make_float4(0, 0, 0, 0);
      if (fast && e < d) v = *reinterpret_cast<const float4*>(from + e);
      out[q] = v.x, out[q + 1] = v.y, out[q + 2] = v.z, out[q + 3] = v.w;
    }
    if (fast) return;
#pragma unroll
    for (int q = 0; q < Q; q += 4) {
      const int e = element(my, q / EV) + q % EV;
      const float4 v = load_four(a, base + e, base + d);
      out[q] = v.x, out[q + 1] = v.y, out[q + 2] = v.z, out[q + 3] = v.w;
    }
  }

  __device__ __forceinline__ static void centre_of(const Mine& my, int s, float (&out)[EV]) {
    if constexpr (HELD) {
#pragma unroll
      for (int k = 0; k < EV; ++k) out[k] = my.c[s * EV + k];
    } else {
      uint4 packed = my.packed[s];
      // Not converted once and for all before the loop, which would want the registers.
      asm volatile("" : "+r"(packed.x), "+r"(packed.y), "+r"(packed.z), "+r"(packed.w));
      unpack<T, EV>(packed, out);
    }
  }

  // The row's coefficients and centre, y = x - alpha c, and where it is wanted |y|^2.
  __device__ __forceinline__ void begin_class(Mine& mine, const Role& my, const Unit& unit, int64_t first) const {
    GroupRow& row = shared().rows[my.group];
    const int64_t index = list.order[unit.first + my.row];
    load_elements(in.x, index, my, mine.y);
    const T* const from = static_cast<const T*>(in.refs.data) + first * in.d;
    uint4 packed[SLOTS];
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      packed[s] = uint4{0, 0, 0, 0};
      if (first >= 0 && element(my, s) < d)
        packed[s] = *reinterpret_cast<const uint4*>(from + element(my, s));
      if constexpr (!HELD) mine.packed[s] = packed[s];
    }
    if (my.thread < 32) {
      const Row at = row_coefficients(in, index);
      if (my.thread == 0) {
        row.index = index, row.a = at.a, row.b = at.b, row.alpha = at.alpha;
        row.per_square = LOG2_E / (2 * at.sigma * at.sigma);
        row.sign = static_cast<float>(at.sign), row.half_alpha = static_cast<float>(0.5 * at.alpha);
        row.high_alpha = static_cast<float>(at.alpha);
        row.rest_alpha = static_cast<float>(at.alpha - row.high_alpha);
        row.rate = static_cast<float>(LOG2_E * at.rate());
      }
    }
    group_barrier(my);
    mine.half_alpha = row.half_alpha, mine.rate = row.rate;
    const bool squares = in.lse.data || unit.group < 0;
    const float sign = row.sign, high = row.high_alpha, rest = row.rest_alpha;
    double square = 0;
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      float c[EV];
      unpack<T, EV>(packed[s], c);
      if (squares) {
#pragma unroll
        for (int k = 0; k < EV; ++k) {
          const double exact =
              fma(-row.alpha, static_cast<double>(c[k]), static_cast<double>(sign * mine.y[s * EV + k]));
          square = fma(exact, exact, square);
        }
      }
#pragma unroll
      for (int k = 0; k < EV; ++k) {
        float& y = mine.y[s * EV + k];
        y = fmaf(-rest, c[k], fmaf(-high, c[k], sign * y));
        if constexpr (HELD) mine.c[s * EV + k] = c[k];
      }
    }
    double shift = 0;
    if (squares) {
      square = sum_over_lanes(square, 32);
      if (my.lane == 0) shared().squares[my.group][my.thread / 32] = square;
      group_barrier(my);
      for (int w = 0; w < WARPS; ++w) shift += shared().squares[my.group][w];
      shift *= row.per_square;
    }
    if (my.thread == 0) shared().states[my.group].shift = shift;
  }

  // From this thread's shares of the scores of a tile to their sums over the group.
  template <int COUNT>
  __device__ __forceinline__ void exchange(const Role& my, int& parity, float (&shares)[COUNT]) const {
    if constexpr (WARPS == 1) {
#pragma unroll
      for (int j = 0; j < COUNT; ++j) shares[j] = sum_over_lanes(shares[j], 32);
    } else {
      constexpr int LANES = 32 / COUNT;
      const float sum = sum_over_warp<COUNT>(shares, my.lane);
      float(&scores)[TR][WARPS < 4 ? 4 : WARPS] = shared().scores[parity][my.group];
      if (my.lane % LANES == 0) scores[my.lane / LANES][my.thread / 32] = sum;
      group_barrier(my);
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

  // From scores to weights, of which the first `many` count. Whether there is anything to add.
  template <int COUNT>
  __device__ __forceinline__ bool weigh(Mine& mine, int many, float (&scores)[COUNT]) const {
    float best = -INFINITY;
#pragma unroll
    for (int j = 0; j < COUNT; ++j) {
      if (j < many) best = fmaxf(best, scores[j]);
    }
    if (best > mine.base) {  // rarely, after the first tiles
      const double bound = static_cast<double>(best) * mine.rate, top = fmax(ceil(bound), mine.top);
      const float scale = power_of_two(mine.top - top);
      mine.base = best;
      mine.rest = static_cast<float>(top - bound);
      mine.top = top;
      mine.total *= scale;
#pragma unroll
      for (int q = 0; q < Q; ++q) mine.sum[q] *= scale;
    }
    bool any = false;
#pragma unroll
    for (int j = 0; j < COUNT; ++j) {
      scores[j] = j < many ? exp2f(fmaf(scores[j] - mine.base, mine.rate, -mine.rest)) : 0.0f;
      mine.total += scores[j];
      any = any || !(scores[j] < NO_WEIGHT);
    }
    return any;
  }

  // The d_j of 16 bytes of each reference of a tile, one after the other: visit(s, j, d). Beyond D they are
  // zero, beyond the tile's `many` references those of the first.
  template <typename Visit>
  __device__ __forceinline__ void read_tile(const Mine& mine, const Role& my, const T* refs, int many, const Visit& visit) const {
    const auto read = [&](const auto& load) {
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        float c[EV];
        centre_of(mine, s, c);
#pragma unroll
        for (int j = 0; j < TR; ++j) {
          const uint4 raw = load(s, j);
          float difference[EV];
          unpack<T, EV>(raw, difference);
#pragma unroll
          for (int k = 0; k < EV; ++k) difference[k] -= c[k];
          visit(s, j, difference);
        }
      }
    };
    const T* from[TR];
#pragma unroll
    for (int j = 0; j < TR; ++j) from[j] = refs + (j < many ? j * d : 0) + my.thread * EV;
    if (d == GT * Q) {
      read([&](int s, int j) { return *reinterpret_cast<const uint4*>(from[j] + s * GT * EV); });
    } else {
      read([&](int s, int j) {
        uint4 raw{0, 0, 0, 0};
        if (element(my, s) < d) raw = *reinterpret_cast<const uint4*>(from[j] + s * GT * EV);
        return raw;
      });
    }
  }

  __device__ __forceinline__ void release(const Role& my, int s) const {
    __syncwarp();
    if (my.lane == 0) arrive(&shared().empty[s]);
  }

  // One tile of `many` references. The stage goes back unless `keep`.
  __device__ __forceinline__ void take_tile(Mine& mine, const Role& my, int s, int many, bool keep, int& parity) const {
    float norm[TR] = {}, scores[TR] = {};
    [[maybe_unused]] const auto score = [&](int slot, int j, const float(&difference)[EV]) {
#pragma unroll
      for (int k = 0; k < EV; ++k) {
        norm[j] = fmaf(difference[k], difference[k], norm[j]);
        scores[j] = fmaf(mine.y[slot * EV + k], difference[k], scores[j]);
      }
    };
    float held[HELD ? TR : 1][HELD ? Q : 1];
    if constexpr (HELD) {
      read_tile(mine, my, stage(s), many, [&](int slot, int j, const float(&difference)[EV]) {
#pragma unroll
        for (int k = 0; k < EV; ++k) held[j][slot * EV + k] = difference[k];
      });
      if (!keep) release(my, s);
#pragma unroll
      for (int q = 0; q < Q; ++q) {
#pragma unroll
        for (int j = 0; j < TR; ++j) {
          norm[j] = fmaf(held[j][q], held[j][q], norm[j]);
          scores[j] = fmaf(mine.y[q], held[j][q], scores[j]);
        }
      }
    } else {
      read_tile(mine, my, stage(s), many, score);
    }
#pragma unroll
    for (int j = 0; j < TR; ++j) scores[j] = fmaf(-mine.half_alpha, norm[j], scores[j]);
    exchange<TR>(my, parity, scores);
    if (weigh<TR>(mine, many, scores)) {
      if constexpr (HELD) {
#pragma unroll
        for (int q = 0; q < Q; ++q) {
#pragma unroll
          for (int j = 0; j < TR; ++j) mine.sum[q] = fmaf(scores[j], held[j][q], mine.sum[q]);
        }
      } else {
        read_tile(mine, my, stage(s), many, [&](int slot, int j, const float(&difference)[EV]) {
#pragma unroll
          for (int k = 0; k < EV; ++k)
            mine.sum[slot * EV + k] = fmaf(scores[j], difference[k], mine.sum[slot * EV + k]);
        });
      }
    }
    if constexpr (!HELD) {
      if (!keep) release(my, s);
    }
  }

  // The row's own source, as one more reference.
  __device__ __forceinline__ void add_source(Mine& mine, const Role& my, int& parity) const {
    float difference[Q], share[1] = {0};
    load_elements(in.source, shared().rows[my.group].index, my, difference);
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      float c[EV];
      centre_of(mine, s, c);
#pragma unroll
      for (int k = 0; k < EV; ++k) {
        float& v = difference[s * EV + k];
        v -= c[k];
        share[0] = fmaf(fmaf(-mine.half_alpha, v, mine.y[s * EV + k]), v, share[0]);
      }
    }
    share[0] = fmaf(share[0], 0.0f, share[0]);  // what is not finite becomes NaN, in all of the row
    exchange<1>(my, parity, share);
    if (!weigh<1>(mine, 1, share)) return;
#pragma unroll
    for (int q = 0; q < Q; ++q) mine.sum[q] = fmaf(share[0], difference[q], mine.sum[q]);
  }

  __device__ __forceinline__ int64_t part_of(int64_t block, bool begins, int row) const {
    return (2 * block + (begins ? 1 : 0)) * ROWS + row;
  }

  // What a row's threads do when a segment ends.
  struct Ending {
    int64_t index;            // of the row
    int64_t from, to;         // blocks that have parts of the unit
    int64_t part;             // this block's
    double by, before;        // scale of what is summed now, and in memory
    double share;             // sum of the weights now, scaled
    double log2_weight, total;  // of the part with both
    bool final;               // the row is finished here
    double a, b;
  };

  // out = a x + b mean over the parts of all blocks, always in their order; this block's own from memory, or
  // `own`: four elements from e on.
  __device__ __forceinline__ void write_row(const Ending& end, int row, int e, const double* own, double (&v)[4], double best,
                            double inverse) const {
    v[0] = v[1] = v[2] = v[3] = 0;
#pragma unroll 1
    for (int64_t block = end.from; block <= end.to; ++block) {
      const int64_t part = part_of(block, block == end.from, row);
      const bool mine = own && block == static_cast<int64_t>(blockIdx.x);
      const double weight = exp2((mine ? end.log2_weight : __ldcg(&parts.rows[part].log2_weight)) - best);
      if (mine) {
#pragma unroll
        for (int k = 0; k < 4; ++k) v[k] = fma(weight, own[k], v[k]);
      } else {
        const double2* const from = reinterpret_cast<const double2*>(parts.sums + part * d + e);
        const double2 low = __ldcg(from), high = __ldcg(from + 1);
        v[0] = fma(weight, low.x, v[0]), v[1] = fma(weight, low.y, v[1]);
        v[2] = fma(weight, high.x, v[2]), v[3] = fma(weight, high.y, v[3]);
      }
    }
    const int64_t base = end.index * in.d;
    float4 x;
    if (in.x.dtype == Dtype::f32 && layout.vectors) {
      x = *reinterpret_cast<const float4*>(static_cast<const float*>(in.x.data) + base + e);
    } else {
      x = load_four(in.x, base + e, base + d);
    }
    x.x = static_cast<float>(fma(end.a, static_cast<double>(x.x), inverse * v[0]));
    x.y = static_cast<float>(fma(end.a, static_cast<double>(x.y), inverse * v[1]));
    x.z = static_cast<float>(fma(end.a, static_cast<double>(x.z), inverse * v[2]));
    x.w = static_cast<float>(fma(end.a, static_cast<double>(x.w), inverse * v[3]));
    if (in.out.dtype == Dtype::f32 && layout.vectors) {
      *reinterpret_cast<float4*>(static_cast<float*>(in.out.data) + base + e) = x;
    } else {
      store_four(in.out, base + e, base + d, x);
    }
  }

  // The largest weight of a row's parts and what its sums are divided by. `own`: this block's is not in
  // memory.
  __device__ __forceinline__ void weigh_parts(const Ending& end, int row, bool own, double& best, double& total) const {
    const auto part = [&](int64_t block) {
      if (own && block == static_cast<int64_t>(blockIdx.x)) return PartRow{end.log2_weight, end.total};
      const PartRow* const at = parts.rows + part_of(block, block == end.from, row);
      return PartRow{__ldcg(&at->log2_weight), __ldcg(&at->total)};
    };
    best = -INFINITY, total = 0;
#pragma unroll 1
    for (int64_t block = end.from; block <= end.to; ++block) {
      const double other = part(block).log2_weight;
      best = best >= other || other != other ? best : other;
    }
#pragma unroll 1
    for (int64_t block = end.from; block <= end.to; ++block) {
      const PartRow at = part(block);
      total = fma(exp2(at.log2_weight - best), at.total, total);
    }
  }

  // Plus D/2, which depends on the row alone: typical values stay small, and float32 keeps their digits.
  __device__ __forceinline__ void write_lse(const Ending& end, double best, double total) const {
    store_as(in.lse, end.index, log(total) + LOG_2 * best + 0.5 * static_cast<double>(in.d));
  }

  __device__ __forceinline__ static void load_centre(const T* from, float (&out)[4]) {
    if constexpr (sizeof(T) == 4) {
      const float4 v = *reinterpret_cast<const float4*>(from);
      out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
    } else {
      const uint2 raw = *reinterpret_cast<const uint2*>(from);
      const T* const values = reinterpret_cast<const T*>(&raw);
#pragma unroll
      for (int k = 0; k < 4; ++k) out[k] = to_float(values[k]);
    }
  }

  // A segment's sums, from the groups of the row to the row's result or to its part in memory.
  // `keeps`: the stage, from the segment's first tile on, that holds this group's sums; -1: it had no tile.
  __device__ __forceinline__ void end_segment(Mine& mine, const Role& my, const Unit& unit, const Share& share,
                                           int64_t first, int used, int keeps, bool begins, bool ends) const {
    GroupState& state = shared().states[my.group];
    if (keeps >= 0) {
      float* const to = reinterpret_cast<float*>(stage(keeps));
#pragma unroll
      for (int q = 0; q < Q; q += 4) {
        const int e = element(my, q / EV) + q % EV;
        if (e < d)
          *reinterpret_cast<float4*>(to + e) =
              make_float4(mine.sum[q], mine.sum[q + 1], mine.sum[q + 2], mine.sum[q + 3]);
      }
    }
    if (my.thread == 0) state.top = mine.top, state.total = mine.total, state.stage = keeps;
    const int leader = my.group - my.turn;  // the row's first group
    const Ranges ranges(list, gridDim.x);
    Ending end;
    end.from = ranges.first_team(list, share.number), end.to = ranges.last_team(list, share.number);
    const int64_t others = end.to - end.from;
    if (ends && my.turn == 0 && my.thread == 0) {
      bool all = others == 0;
      if (!all && layout.merge_last) {
        wait_for_previous_launch();  // which sets the counts to zero
        all = *static_cast<volatile int*>(parts.arrived + unit.first + my.row) == others;
        __threadfence();
      }
      shared().last[leader] = all;
    }
    row_barrier(my);
    end.final = ends && shared().last[leader];
    end.part = part_of(blockIdx.x, share.from == 0, my.row);
    const GroupRow& row = shared().rows[my.group];
    end.index = row.index, end.a = row.a, end.b = row.b;

    double best = -INFINITY, scales[G];
    for (int g = 0; g < used; ++g) {
      const double top = shared().states[leader + g].top;
      best = best >= top || top != top ? best : top;
    }
    end.share = 0;
#pragma unroll
    for (int g = 0; g < G; ++g) {
      scales[g] = 0;
      if (g >= used) continue;
      scales[g] = power_of_two(shared().states[leader + g].top - best);
      end.share = fma(scales[g], static_cast<double>(shared().states[leader + g].total), end.share);
    }
    const double now = best - state.shift;
    end.log2_weight = now, end.total = end.share, end.by = 1, end.before = 0;
    if (!begins) {
      const PartRow moved = shared().moved[my.group];
      end.log2_weight = moved.log2_weight >= now ? moved.log2_weight : now;
      end.before = exp2(moved.log2_weight - end.log2_weight), end.by = exp2(now - end.log2_weight);
      end.share *= end.by;
      end.total = fma(end.before, moved.total, end.share);
    }
    double row_best = 0, inverse = 0;
    if (end.final) {
      double total;
      weigh_parts(end, my.row, true, row_best, total);
      inverse = end.b / total;
      if (in.lse.data && my.turn == 0 && my.thread == 0) write_lse(end, row_best, total);
    }
    // Four elements from e on, of which v are the scaled sums without the centre.
    const auto move = [&](int e, double (&v)[4]) {
      float c[4] = {};
      if (first >= 0) load_centre(static_cast<const T*>(in.refs.data) + first * in.d + e, c);
#pragma unroll
      for (int k = 0; k < 4; ++k) v[k] = fma(end.by, v[k], end.share * c[k]);
      double2* const to = reinterpret_cast<double2*>(parts.sums + end.part * d + e);
      if (!begins) {
        const double2 low = __ldcg(to), high = __ldcg(to + 1);
        v[0] = fma(end.before, low.x, v[0]), v[1] = fma(end.before, low.y, v[1]);
        v[2] = fma(end.before, high.x, v[2]), v[3] = fma(end.before, high.y, v[3]);
      }
      if (end.final) {
        double out[4];
        write_row(end, my.row, e, v, out, row_best, inverse);
      } else {
        __stcg(to, make_double2(v[0], v[1]));
        __stcg(to + 1, make_double2(v[2], v[3]));
      }
    };
#pragma unroll 1
    for (int e = 4 * (my.turn * GT + my.thread); e < d; e += 4 * my.groups * GT) {
      double v[4] = {};
#pragma unroll
      for (int g = 0; g < G; ++g) {
        if (g >= used) continue;
        const float4 sums =
            *reinterpret_cast<const float4*>(reinterpret_cast<const float*>(stage(shared().states[leader + g].stage)) + e);
        v[0] = fma(scales[g], static_cast<double>(sums.x), v[0]);
        v[1] = fma(scales[g], static_cast<double>(sums.y), v[1]);
        v[2] = fma(scales[g], static_cast<double>(sums.z), v[2]);
        v[3] = fma(scales[g], static_cast<double>(sums.w), v[3]);
      }
      move(e, v);
    }
    if (keeps >= 0) fence_async();
    if (ends && !end.final) {
      if (my.turn == 0 && my.thread == 0) parts.rows[end.part] = {end.log2_weight, end.total};
      __threadfence();
    }
    row_barrier(my);
    if (keeps >= 0 && my.lane == 0) arrive(&shared().empty[keeps]);
    if (my.thread == 0) shared().moved[my.group] = {end.log2_weight, end.total};
    if (!ends || end.final || !layout.merge_last) return;
    if (my.turn == 0 && my.thread == 0) {
      shared().last[leader] = atomicAdd(parts.arrived + unit.first + my.row, 1) == others;
      __threadfence();
    }
    row_barrier(my);
    const bool last = shared().last[leader];
    row_barrier(my);
    if (!last) return;
    double total;
    weigh_parts(end, my.row, false, row_best, total);
    inverse = end.b / total;
    if (in.lse.data && my.turn == 0 && my.thread == 0) write_lse(end, row_best, total);
#pragma unroll 1
    for (int e = 4 * (my.turn * GT + my.thread); e < d; e += 4 * my.groups * GT) {
      double out[4];
      write_row(end, my.row, e, nullptr, out, row_best, inverse);
    }
  }

  // This group's tiles of a unit.
  __device__ __forceinline__ void run_unit(const Share& share, Place at, Role& my, int& parity) const {
    const Unit& unit = list.units[share.number];
    const int rows = unit.rows;
    my.groups = groups_of_a_row(rows);
    my.row = my.group / my.groups, my.turn = my.group % my.groups;
    if (my.row >= rows) return;
    Mine mine;
    int64_t tile = share.from;
    while (tile < share.to) {
      const ClassTiles tiles = class_of(unit, tile);
      begin_class(mine, my, unit, tiles.first);
      const int64_t stop = tiles.end < share.to ? tiles.end : share.to;
      while (tile < stop) {
        const int count = static_cast<int>(min(stop - tile, int64_t{SEGMENT_TILES * my.groups}));
        mine.base = mine.top = -INFINITY, mine.rest = 0, mine.total = 0;
#pragma unroll
        for (int q = 0; q < Q; ++q) mine.sum[q] = 0;
        Place here = at;
        advance(here, my.turn);
        int left = static_cast<int>(min(tiles.count - (tile + my.turn - tiles.begin) * TR,
                                        int64_t{SEGMENT_REFS} * G * 2));
        int keeps = -1;
#pragma unroll 1
        for (int i = my.turn; i < count; i += my.groups) {
          wait_barrier(&shared().full[here.stage], here.phase);
          const bool keep = i + my.groups >= count;
          if (keep) keeps = here.stage;
          if (left > 0) {
            take_tile(mine, my, here.stage, left, keep, parity);
          } else if (!keep) {
            release(my, here.stage);
          }
          left -= my.groups * TR;
          advance(here, my.groups);
        }
        const bool ends = tile + count == share.to;
        if (ends && share.to == unit.tiles && my.turn == 0 && in.source.data) add_source(mine, my, parity);
        end_segment(mine, my, unit, share, tiles.first, min(count, my.groups), keeps, tile == share.from,
                    ends);
        advance_far(at, count);
        tile += count;
      }
    }
  }

  __device__ __forceinline__ void consume(int tid) const {
    Role my{};
    my.group = tid / GT, my.thread = tid % GT, my.lane = tid % 32;
    write_dead_rows(tid);
    Place at;
    int parity = 0;
    walk(my.lane, [&](const Share& share) {
      run_unit(share, at, my, parity);
      advance_far(at, share.to - share.from);
    });
  }

  __device__ __forceinline__ void write_dead_rows(int tid) const {
    for (int64_t i = list.sizes[1] + blockIdx.x; i < in.n; i += gridDim.x) {
      const int64_t index = list.order[i], base = index * in.d;
      for (int e = 4 * tid; e < d; e += 4 * GROUPS_CONSUMERS)
        store_four(in.out, base + e, base + d, make_float4(NAN, NAN, NAN, NAN));
      if (in.lse.data && tid == 0) store_as(in.lse, index, NAN);
    }
  }
};

template <typename T, int GT, int Q, int TR, bool HELD>
__global__ void __launch_bounds__(GROUPS_CONSUMERS + BULK_PRODUCERS, 1)
    groups_kernel(const __grid_constant__ Inputs in, const __grid_constant__ UnitList shared_list,
                  const __grid_constant__ BulkParts parts, const __grid_constant__ GroupsLayout layout) {
  using Kernel = Groups<T, GT, Q, TR, HELD>;
  char* const scratch = Kernel::memory() + Kernel::FIXED_BYTES;
  typename Kernel::Shared& shared = Kernel::shared();
  UnitList list = shared_list;
  int staging = static_cast<int>(Kernel::FIXED_BYTES);
  if (layout.own_list) {
    // Where merge_kernel follows, one block leaves the list in memory for it.
    if (layout.merge_last || blockIdx.x > 0)
      list = place_unit_list(scratch + bulk_list_scratch(in.k), in.n, in.k);
    staging += static_cast<int>(bulk_list_smem(in.n, in.k));
  }
  const Kernel kernel{in, list, parts, layout, staging};
  const int tid = threadIdx.x, producer = tid - GROUPS_CONSUMERS;
  int* const seen = reinterpret_cast<int*>(scratch + 8 * OWN_LIST_ROWS);
  if (layout.own_list && tid < GROUPS_CONSUMERS) {
    if (in.counts && tid * 128 < in.k * (in.counts_are_long ? 8 : 4))
      prefetch(static_cast<const char*>(in.counts) + tid * 128);
    for (int i = tid; i <= in.k; i += GROUPS_CONSUMERS) seen[i] = 0;
  }
  if (producer == 0) {
    for (int s = 0; s < layout.stages; ++s) {
      init_barrier(&shared.full[s], 1);
      init_barrier(&shared.empty[s], GROUPS_CONSUMERS / 32);
    }
    init_barrier(&shared.listed, 1);
    publish_barriers();
  }
  __syncthreads();
  if (producer >= 0) {
    give_up_registers<GROUPS_PRODUCER_REGISTERS>();
    if (producer >= 32) return;
    if (layout.own_list) {
      build_few_units(in, list, TR, Kernel::ROWS, seen, reinterpret_cast<int64_t*>(scratch),
                      producer);
      if (producer == 0) arrive(&shared.listed);
    } else {
      wait_for_previous_launch();
    }
    kernel.produce(producer);
  } else {
    take_registers<GROUPS_CONSUMER_REGISTERS>();
    if (layout.own_list) {
      wait_barrier(&shared.listed, 0);
    } else {
      wait_for_previous_launch();
    }
    kernel.consume(tid);
  }
}

}  // namespace svel::cuda
