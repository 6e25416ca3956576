// One pass over the references of class banks on Hopper's matrix units, for references in float16 or
// bfloat16. A multiprocessor has one thread block: one warp, the producer, brings references into a ring in
// shared memory by bulk copies; sixteen warps share a sample, each with chunks of 32 of its elements (up to
// 1,024 elements two blocks with eight such warps each, so that one works while the other waits). A tile
// of eight references, or of eight times BLOCKS, is scored by all warps. One more warp adds up their shares
// of the scores, runs the online softmax and hands weights back, with which they add the tile to the rows, if
// there is anything to add; meanwhile they score the next tile. The list of units, the announcer and the
// ranges of the list that blocks have: as in bulk_groups.cuh.
//
// At the end of a segment a warp stores its sums as they are and goes on; the one that weighs leaves what
// they are relative to. Rows' parts are put together, and sources added, in a launch that follows (end_kernel
// in bulk_cuda.cu): nothing of that delays the reading. The mean of another process's row goes there at once,
// from the block where its unit begins, which ends that row: the blocks that follow have had their parts of
// it first. All means at the end would wait for the link.
//
// |r_j|^2 too is the product of a tile with itself: of sixty-four of them eight are wanted.
//
// Longer samples have a cluster of blocks (CLUSTERED), each with a slice of x, of the references and of the
// sums. All blocks walk the same range of the list. One more warp, the mailer, sends the block's
// share of a tile's scores to all blocks, and the one that weighs adds up what they have sent, in the same
// order everywhere: so all blocks have the same weights, to the last bit, and take the same decisions. Scores
// are a tile ahead of sums, which covers the way.
//
// Rounding. Scores are s_j = rate (x.r_j - alpha/2 |r_j|^2), so that
//   -|x - alpha r_j|^2 / (2 sigma^2) = s_j - |x|^2 / (2 sigma^2).
// References are exact in the matrix units; x is the sum of two values of float16 or of three of bfloat16,
// and so are weights. The sums of the matrix units, which round towards zero, are over 64 elements or 8
// references. Weights are relative to that of the best.
//
// Sums of shares are of their differences from those of the best reference so far, which are small where they
// matter. What is left has the digits of float32 for values as large as x and r_j, too few where references
// that share the weight are far apart beside the noise, as at small t. So a part lists the references whose
// weight may be wrong, by an estimate that another warp makes; where a row ends and finds that it would show,
// they are scored again, in float64 (`merge_aligned`). Most rows have one reference with all the weight, and
// need nothing.
#pragma once

#include <type_traits>

#include "common/cluster.cuh"
#include "common/peers.cuh"
#include "stable_target/bulk_parts.cuh"

namespace svel::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define SVEL_PRODUCT_ASM(...) asm(__VA_ARGS__)  // may be moved
#else
#define SVEL_PRODUCT_ASM(...)
#endif

// acc += a b, 16 x 8 over 16, or over 8, of T.
#define SVEL_MULTIPLY_16(acc, a, b, TYPE)                                                                 \
  SVEL_PRODUCT_ASM("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                 \
                   ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+f"(acc[0]), \
                   "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3]) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w),     \
                   "r"(b.x), "r"(b.y))
#define SVEL_MULTIPLY_8(acc, a0, a1, b, TYPE)                                                 \
  SVEL_PRODUCT_ASM("mma.sync.aligned.m16n8k8.row.col.f32." TYPE "." TYPE                      \
                   ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};" : "+f"(acc[0]), \
                   "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3]) : "r"(a0), "r"(a1), "r"(b))
template <typename T>
__device__ __forceinline__ void multiply_16(float (&acc)[4], const uint4& a, const uint2& b) {
  if constexpr (std::is_same_v<T, __half>) {
    SVEL_MULTIPLY_16(acc, a, b, "f16");
  } else {
    SVEL_MULTIPLY_16(acc, a, b, "bf16");
  }
}
template <typename T>
__device__ __forceinline__ void multiply_8(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  if constexpr (std::is_same_v<T, __half>) {
    SVEL_MULTIPLY_8(acc, a0, a1, b, "f16");
  } else {
    SVEL_MULTIPLY_8(acc, a0, a1, b, "bf16");
  }
}
// Four 8 x 8 matrices, transposed: each lane names a row of 16 bytes.
__device__ __forceinline__ uint4 load_transposed(uint32_t row) {
  uint4 v{0, 0, 0, 0};
  SVEL_HOPPER_ASM("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(v.x),
                  "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(row) : "memory");
  return v;
}

template <typename T>
__device__ __forceinline__ uint32_t pair_of(T a, T b) {
  static_assert(sizeof(T) == 2);
  return static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&a)) |
         static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&b)) << 16;
}

// A float32 as the sum of values of T: part `split`, where each is the nearest to what earlier ones have
// left. PARTS of them have its digits. Of float16 the second part of a weight is kept larger, since it has
// less range.
template <typename T>
struct Split;
template <>
struct Split<__half> {
  static constexpr int PARTS = 2;
  static constexpr float SCALE = 2048;  // of the second part of a weight
  __device__ __forceinline__ static __half nearest(float v) { return __float2half_rn(v); }
};
template <>
struct Split<__nv_bfloat16> {
  static constexpr int PARTS = 3;
  static constexpr float SCALE = 1;
  __device__ __forceinline__ static __nv_bfloat16 nearest(float v) { return __float2bfloat16_rn(v); }
};
template <typename T>
__device__ __forceinline__ float rest_of(float v) {
  return v - to_float(Split<T>::nearest(v));
}

// Of a thread: all together no more than at the launch, 96 for each, or 80 where two blocks share a
// multiprocessor.
constexpr int PRODUCTS_CONSUMER_REGISTERS = 104, PRODUCTS_PAIRED_REGISTERS = 88,
              PRODUCTS_PRODUCER_REGISTERS = 64;

// A reference among all k m, and the logarithm of the weight that it has been given; for `count` equal ones.
struct ProductsTie {
  double log2_weight;
  int reference, count;
};
static_assert(sizeof(ProductsTie) == PRODUCTS_TIE_BYTES);

// What the blocks, or clusters of them, leave of the rows. A row's sums are in `firsts` from the block where
// its unit begins, in `sums` from those that follow.
struct ProductsRow {
  PartRow own;   // of the first block
  double a, b;   // out = a x + b mean
  int from, to;  // blocks that have parts of the row; none where it has nothing to read: to < from
  int row;       // of the unit
  int next;      // that is sent late, see `send_late`
};
constexpr int ROW_HAS_ENDED = -2;  // to - from, where the result is there
struct ProductsParts {
  ProductsRow* rows;  // (n,)
  PartRow* others;    // (blocks, rows of a unit at most)
  float* firsts;      // (n, D); the result itself, where rows are of one process
  float* sums;        // (blocks, rows of a unit at most, D)
  // (n + blocks times rows of a unit, listed) what parts have listed, the first ones and others.
  ProductsTie* ties;
  // Of rows of several processes: (thread blocks,) zero at first, whether `others` and `sums` are there.
  int* ready;
  AtHome home;
  int unit_rows;  // of a unit at most
  int listed;     // references of a part at most
  bool ends;      // rows of which one block has all end there
};

struct ProductsLayout {
  bool own_list;  // each block builds the list of units in its shared memory
  int slices;     // blocks that share a sample, and
  int slice;      // elements of it for each
};

// Bytes of references that a block has on their way, in pieces, which are halves of a tile. That many keep
// memory busy; behind more, rows and sums would wait for longer than the ring lasts. Of two blocks that share
// a multiprocessor each has 24 KB: D 1,024 took 55.3 us on an H100 in an earlier form, with 32 KB 56.6, with
// 16 KB 56.2, with 48 58.7.
constexpr int PRODUCTS_IN_FLIGHT = 64 << 10, PRODUCTS_PAIRED_IN_FLIGHT = 24 << 10;
// Bytes of references that a block brings to the L2 while the list is made: M 64 took 59.1 us on an H100 with
// 128 KB, 58.0 with 256; two blocks of a multiprocessor 55.0 us (D 1,024) with 128 KB each, 56.4 with 64.
constexpr int PRODUCTS_EARLY_BYTES = 256 << 10, PRODUCTS_PAIRED_EARLY_BYTES = 128 << 10;

// By BULK_PRODUCERS threads, while others make the list: what the block will begin with if all `rows` have
// classes of their own, and what some block will read in any case. group_of(row): its class, or less than 0;
// count_of(group): valid references.
template <int EARLY_BYTES, typename GroupOf, typename CountOf>
__device__ __forceinline__ void prefetch_references(const Inputs& in, const RowPlace& place, int teams,
                                                    int team, int64_t rows, const GroupOf& group_of,
                                                    const CountOf& count_of, int tid) {
  const int64_t all = rows * in.m;
  const int each = size_of(in.refs.dtype), bytes = place.length * each;
  const int64_t begin = divide(all * team, teams), next = divide(all * (team + 1), teams);
  const int64_t end = min(next, begin + EARLY_BYTES / bytes);
#pragma unroll 1
  for (int64_t i = begin + tid; i < end; i += BULK_PRODUCERS) {
    const int64_t row = divide(i, in.m), j = i - row * in.m;
    const int64_t group = group_of(row);
    if (group >= 0 && group < in.k && j < count_of(group))
      prefetch_bulk(
          static_cast<const char*>(in.refs.data) + ((group * in.m + j) * in.d + place.offset) * each,
          static_cast<uint32_t>(bytes));
  }
}
// From what the list is made of or, for who comes late, from anything.
template <int EARLY_BYTES>
__device__ __forceinline__ void prefetch_references(const Inputs& in, const ListScratch& scratch,
                                                    const RowPlace& place, int teams, int team, int tid) {
  // Each once: by then it may be something else.
  const auto read = [](const int& from) { return static_cast<int>(load_shared(shared_address(&from))); };
  const auto group_of = [&](int64_t row) { return int64_t{read(scratch.keys[row])} - 1; };
  prefetch_references<EARLY_BYTES>(
      in, place, teams, team, in.n, group_of, [&](int64_t group) { return read(scratch.counts[group]); },
      tid);
}
// Where the list comes from another launch, which hears of the rows of other processes meanwhile.
template <int EARLY_BYTES>
__device__ __forceinline__ void prefetch_of_own_rows(const Inputs& in, const ProductsParts& parts,
                                                     const RowPlace& place, int teams, int team, int tid) {
  const auto group_of = [&](int64_t row) { return parts.home.labels[row]; };
  prefetch_references<EARLY_BYTES>(
      in, place, teams, team, in.rows_each, group_of, [&](int64_t group) { return valid_count(in, group); },
      tid);
}

// This block's share of x, to the L2 before references are in the way.
__device__ __forceinline__ void prefetch_share(const Inputs& in) {
  const int64_t all = in.n * in.d * int64_t{sizeof(float)};
  const int64_t each = ceil_div(all, 16 * int64_t{gridDim.x}) * 16, from = each * blockIdx.x;
  if (from < all)
    prefetch_bulk(static_cast<const char*>(in.x.data) + from, static_cast<uint32_t>(min(each, all - from)));
}

// 2^-40: eight references whose weights are all below that, beside the best so far, are not added.
constexpr float PRODUCTS_NO_WEIGHT = 9.0949470177292824e-13f;
constexpr int RAISED = 1 << 30;

// In PartRow here: `lead` is how often the best reference is there, each time with weight 1, and `scale` how
// large the error of a result would be, beside its size, if weights were wrong where they are shared evenly;
// infinite where that is in doubt however they are shared. Whether it shows in a row of parts whose weights
// are `total`, `count` of them that of the best. The limit is 2e-6; a thread may know of some parts only.
constexpr float PRODUCTS_MOST_ERROR = 1.2e-6f;
__device__ __forceinline__ bool is_doubtful(float scale, double total, int count) {
  const float all = static_cast<float>(total), wrong = scale * static_cast<float>(total - count);
  return scale == INFINITY || wrong * wrong * static_cast<float>(count) >
                                  PRODUCTS_MOST_ERROR * PRODUCTS_MOST_ERROR * all * all * all;
}
// How often the best reference is there, over several parts: repeated samples, which tie and may, as what
// they share has no error.
struct Equals {
  int count = 0, print = 0;

  // Of a part that has one.
  __device__ __forceinline__ void add(float lead, int its) {
    if (count == 0) print = its;
    if (print == its) count += static_cast<int>(lead);
  }
};
// What cannot show, however weights are shared: other sqrt(lead) is 0.385 at most.
__device__ __forceinline__ bool is_beyond_doubt(float scale) {
  return scale <= 2 * PRODUCTS_MOST_ERROR;
}

// How a row leaves a segment: what the warps do with its sums.
struct ProductsEnd {
  double before, now;  // to multiply by: the part's sums so far, and those of the segment
  PartRow part;        // so far
  bool ends;           // the row, in this kernel
};

// What a block's elements of x and of the segment's first reference make together: |x|^2 with all its digits,
// where that is wanted, and see `what_is_wrong`.
struct ProductsFigures {
  double exact_square;
  float square, norm, x_square;
};
// What a segment's end needs of it, known from its first tile on. PartRow::scale is `wrong` times the root of
// the squared distance of references, `most_apart` at most, or that of the best one from x / alpha: `from_x`
// and `per_score` times its score.
struct ProductsKnown {
  double shift;  // |x|^2 / (2 sigma^2) in units of log 2, where it is wanted
  double rate;   // of scores
  float wrong;   // in a cluster for each bit that a score is wrong by
  float from_x, per_score, most_apart;
  float square;  // see `bits_of`
  float window;  // how far below the best one references are listed, in units of log 2
};

// What a block of a cluster tells the others. A letter has memory of its own until that of four tiles later:
// a block scores tile i + 4 when it has the weights of tile i + 2, to which all blocks have given their
// shares, each when it had weighed tile i. Figures are of a segment, until that of two segments later: a
// block begins segment s + 2 when it has weighed all of segment s + 1, to which all have given their shares,
// each when it had ended segment s.
constexpr int PRODUCTS_LETTERS = 4;
template <int BLOCKS>
struct ProductsLetters {
  alignas(16) float scores[PRODUCTS_LETTERS][BLOCKS][8 * PRODUCTS_ROWS];
  ProductsFigures figures[2][PRODUCTS_ROWS];
};
template <int BLOCKS>
struct ProductsMail {
  Barrier arrived[PRODUCTS_LETTERS];
  ProductsLetters<BLOCKS> from[PRODUCTS_MOST_BLOCKS];  // so many as the cluster has
};
struct ProductsNoMail {};

template <int THREADS, int TR, int STAGES, bool CLUSTERED, int ROWS>
struct ProductsShared {
  static constexpr int WARPS = THREADS / 32, PADDED = WARPS + 4;
  static constexpr int PIECES = 2;  // of a tile: each arrives for itself
  Barrier full[STAGES][PIECES], empty[STAGES];
  Announcements<ROWS> announced;
  // Of a tile; two of each, since a warp adds a tile before it scores the one after the next. All warps have
  // given their shares of the scores; weights are there.
  Barrier given[2], weighed[2];
  alignas(16) float scores[2][ROWS][TR][PADDED];
  uint32_t weights[2][TR / 8][32];  // as the products take them
  int used[2];                      // bit b: block b has weight; RAISED: `top` has grown
  float scales[2][ROWS];            // what it has done to the sums so far
  // Of a warp's elements, of two segments, since warps go on before the one that weighs has settled all:
  // |x|^2 and |r|^2 of the first reference, |x|^2 where all its digits are wanted.
  float x_squares[2][ROWS][WARPS], r_squares[2][WARPS];
  double exact_squares[2][ROWS][WARPS];
  // The shares of the best reference's score, of the warps, or of a cluster's blocks: what scores are
  // relative to.
  alignas(16) float base[ROWS][WARPS];
  ProductsTie ties[ROWS][PRODUCTS_TIES];  // of the part so far
  int earlier[ROWS];                      // those of segments that have ended
  PartRow moved[ROWS];                    // of the part, with the segments so far
  ProductsKnown known[ROWS];
  // Where there is no cluster, another warp finds that out: of the segment in this slot, and it is there.
  int asked_slot;
  Barrier asked, answered;
  bool is_last;  // of the blocks
  int late;      // the first of the rows that are sent late
  // The segment's ends are there. One for each slot: where segments have no references nothing keeps the warp
  // that weighs from going several ahead.
  Barrier settled[SEGMENT_SLOTS];
  ProductsEnd ends[SEGMENT_SLOTS][ROWS];
  std::conditional_t<CLUSTERED, ProductsMail<TR / 8>, ProductsNoMail> mail;  // the last: its end is cut off
};

__device__ __forceinline__ void raise_ready(int* ready) {
  __threadfence();
  asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(ready) : "memory");
}
__device__ __forceinline__ void await_ready(const int* ready) {
  int there = 0;
  while (there == 0)
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(there) : "l"(ready) : "memory");
}

// The score of a reference, in float64, in units of log 2: the share of one of `warps`.
template <typename T>
__device__ __forceinline__ double score_exactly(const Inputs& in, const RowState& row, int reference,
                                                int warp, int warps) {
  constexpr int EACH = 8;
  const T* const r = static_cast<const T*>(in.refs.data) + int64_t{reference} * in.d;
  const float* const x = static_cast<const float*>(row.x) + row.index * in.d;
  const int d = static_cast<int>(in.d);
  double score = 0;
#pragma unroll 2
  for (int e = EACH * (32 * warp + static_cast<int>(threadIdx.x % 32)); e < d; e += EACH * 32 * warps) {
    const uint4 raw = *reinterpret_cast<const uint4*>(r + e);
    const float4 low = *reinterpret_cast<const float4*>(x + e),
                 high = *reinterpret_cast<const float4*>(x + e + 4);
    float of_r[EACH];
    unpack<T, EACH>(raw, of_r);
    const float of_x[EACH] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const double v = of_r[k];
      score = fma(fma(-0.5 * row.alpha, v, static_cast<double>(row.sign * of_x[k])), v, score);
    }
  }
  return row.exact_rate() * warp_sum(score);
}

__device__ __forceinline__ PartRow load_part(const PartRow* from) {
  const double2 weights = __ldcg(reinterpret_cast<const double2*>(from));
  const int4 rest = __ldcg(reinterpret_cast<const int4*>(&from->lead));
  return {weights.x, weights.y, __int_as_float(rest.x), __int_as_float(rest.y), rest.z, rest.w};
}

// Parts of a row for `merge_aligned`; -1 is the first.
struct ProductsPieces {
  const Inputs& in;
  const ProductsParts& parts;
  const ProductsRow& left;
  const int64_t index;

  __device__ __forceinline__ int64_t place(int j) const {
    return int64_t{left.from + 1 + j} * parts.unit_rows + left.row;
  }
  __device__ __forceinline__ PartRow part(int j) const {
    return j < 0 ? left.own : load_part(parts.others + place(j));
  }
  __device__ __forceinline__ const float* sums(int j) const {
    return j < 0 ? parts.firsts + index * in.d : parts.sums + place(j) * in.d;
  }
  __device__ __forceinline__ const ProductsTie* ties(int j) const {
    return parts.ties + (j < 0 ? index : in.n + place(j)) * parts.listed;
  }
};

// A row from parts that are weighed by exact scores. risen: by how much the heaviest reference of its list is
// above the weight that the products gave it, in units of log 2.
struct AlignedRow {
  PartRow all;
  double risen;
};
template <int WARPS>
struct AlignedMemory {
  double exact[PRODUCTS_TIES], shares[PRODUCTS_TIES];  // scores, and what warps have of them
};

// The parts of a row together, each with the references that it has listed weighed by exact scores, and with
// them all the others in its place beside other parts. By all threads of a block: this one has the elements
// `at`, from `offset` on. memory: shared.
template <typename T, int WARPS, int VECTORS, typename Wait>
__device__ __forceinline__ AlignedRow merge_aligned(const Inputs& in, const RowState& row,
                                                    const ProductsParts& parts, const ProductsRow& left,
                                                    double shift, const Wait& wait,
                                                    AlignedMemory<WARPS>& memory, int offset,
                                                    const int (&at)[VECTORS], const bool (&within)[VECTORS],
                                                    double (&sum)[VECTORS][4]) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const ProductsPieces pieces{in, parts, left, row.index};
  const int count = left.to - left.from;
  double* const exact = memory.exact;
  double most = left.own.log2_weight;
#pragma unroll 1
  for (int j = 0; j < count; ++j) most = fmax(most, pieces.part(j).log2_weight);
  PartRow all{-INFINITY, 0, 0, 0, 0, 0};
  double risen = 0;
#pragma unroll 1
  for (int j = -1; j < count; ++j) {
    const PartRow part = pieces.part(j);
    if (part.total == 0 || part.log2_weight <= most - 80) continue;
    const ProductsTie* const ties = pieces.ties(j);
    int each = WARPS;  // warps for a reference
    while (each > 1 && each * part.ties > WARPS) each /= 2;
#pragma unroll 1
    for (int i = warp; i < part.ties * each; i += WARPS) {
      const double share = score_exactly<T>(in, row, ties[i / each].reference, i % each, each);
      if (lane == 0) memory.shares[i] = share;
    }
    wait();
    const int mine = static_cast<int>(threadIdx.x);
    if (mine < part.ties) {
      double score = -shift;
#pragma unroll 1
      for (int w = 0; w < each; ++w) score += memory.shares[mine * each + w];
      exact[mine] = score;
    }
    wait();
    double aligned = part.log2_weight, heaviest = -INFINITY, own[VECTORS][4];
#pragma unroll 1
    for (int i = 0; i < part.ties; ++i) {
      const double given = ties[i].log2_weight;
      if (given > heaviest) heaviest = given, aligned = part.log2_weight + (exact[i] - given);
    }
    if (part.log2_weight == most) risen = aligned - most;
    double total = part.total;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      float4 four = make_float4(0, 0, 0, 0);
      if (within[v]) four = __ldcg(reinterpret_cast<const float4*>(pieces.sums(j) + offset + at[v]));
      own[v][0] = four.x, own[v][1] = four.y, own[v][2] = four.z, own[v][3] = four.w;
    }
#pragma unroll 1
    for (int i = 0; i < part.ties; ++i) {
      const double more =
          ties[i].count * (power(exact[i] - aligned) - power(ties[i].log2_weight - part.log2_weight));
      const T* const r = static_cast<const T*>(in.refs.data) + ties[i].reference * in.d + offset;
      total += more;
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (within[v]) own[v][k] = fma(more, static_cast<double>(to_float(r[at[v] + k])), own[v][k]);
        }
      }
    }
    wait();  // the scores are read
    const Joined joined = join(all, {aligned, total, 0, 0, 0, 0});
    const bool alone = all.total == 0;
    all = alone ? PartRow{aligned, total, 0, 0, 0, 0} : joined.all;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        sum[v][k] = alone ? own[v][k] : fma(joined.by_first, sum[v][k], joined.by_second * own[v][k]);
    }
  }
  return {all, risen};
}

// A row of another process, of which this block has the first part.
struct ProductsSent {
  const float* first;     // its sums
  const PartRow* others;  // of the blocks that follow, PRODUCTS_ROWS apart, as their
  const float* sums;
  const int* ready;
  float* to;                  // the mean, with the process whose row it is
  double* lse;                // there too, or null
  double log2_weight, total;  // of the first part
  int d, length, count;       // count: other parts
  int slices, rank;
};

// Until the row's other parts are there, by whole warps. They come first in the ranges of their blocks; of
// the blocks that run at most the last waits for one that does not run yet.
__device__ __forceinline__ void await_parts(const int* ready, int count, int slices, int rank) {
#pragma unroll 1
  for (int j = static_cast<int>(threadIdx.x) % 32; j < count; j += 32) {
    await_ready(ready + j * slices + rank);
    if (rank > 0) await_ready(ready + j * slices);  // who has the weights
  }
  __syncwarp();
}

// From a row's parts to its mean, by THREADS threads from `first` on, whole warps, four times VECTORS
// elements each. Mostly there is one other part: what it weighs and all sums are on their way at once.
template <int THREADS, int VECTORS>
__device__ __noinline__ static void send_home(const ProductsSent sent, int first) {
  const int thread = static_cast<int>(threadIdx.x) - first, lane = thread % 32;
  const auto other = [&](int j) {
    return __ldcg(reinterpret_cast<const double2*>(sent.others + j * PRODUCTS_ROWS));
  };
  const auto greater = [](double a, double b) { return a >= b || b != b ? a : b; };
  await_parts(sent.ready, sent.count, sent.slices, sent.rank);
  const auto load = [&](float4(&to)[VECTORS], const float* from) {
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      const int e = 4 * (thread + i * THREADS);
      to[i] = e < sent.length ? __ldcg(reinterpret_cast<const float4*>(from + e)) : make_float4(0, 0, 0, 0);
    }
  };
  float4 own[VECTORS], next[VECTORS];
  load(own, sent.first);
  load(next, sent.sums);
  const double2 mine = lane < sent.count ? other(lane) : make_double2(-INFINITY, 0);
  double top = greater(mine.x, sent.log2_weight);
#pragma unroll 1
  for (int j = lane + 32; j < sent.count; j += 32) top = greater(other(j).x, top);
#pragma unroll 1
  for (int hop = 16; hop > 0; hop /= 2) top = greater(top, __shfl_xor_sync(0xffffffffu, top, hop));
  const double weight = power(mine.x - top);
  double total = lane < sent.count ? weight * mine.y : 0;
#pragma unroll 1
  for (int j = lane + 32; j < sent.count; j += 32) {
    const double2 its = other(j);
    total = fma(power(its.x - top), its.y, total);
  }
  const double by_first = power(sent.log2_weight - top);
  total = fma(by_first, sent.total, warp_sum(total));
  double sum[VECTORS][4] = {};
  const auto add = [&](const float4(&part)[VECTORS], double by) {
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      sum[i][0] = fma(by, static_cast<double>(part[i].x), sum[i][0]);
      sum[i][1] = fma(by, static_cast<double>(part[i].y), sum[i][1]);
      sum[i][2] = fma(by, static_cast<double>(part[i].z), sum[i][2]);
      sum[i][3] = fma(by, static_cast<double>(part[i].w), sum[i][3]);
    }
  };
  add(own, by_first / total);
#pragma unroll 1
  for (int j = 0; j < sent.count; ++j) {
    if (j > 0) load(next, sent.sums + int64_t{j} * PRODUCTS_ROWS * sent.d);
    const double near = __shfl_sync(0xffffffffu, weight, j & 31);
    add(next, (j < 32 ? near : power(other(j).x - top)) / total);
  }
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    const int e = 4 * (thread + i * THREADS);
    if (e < sent.length)
      *reinterpret_cast<float4*>(sent.to + e) =
          make_float4(static_cast<float>(sum[i][0]), static_cast<float>(sum[i][1]),
                      static_cast<float>(sum[i][2]), static_cast<float>(sum[i][3]));
  }
  if (sent.lse && thread == 0) *sent.lse = lse_of_row(sent.d, {top, total, 0, 0, 0, 0});
}

// Where the rows x of this process are there only now (AtHome::awaits_x): the others hear of it. By a warp.
__device__ __forceinline__ void announce_rows(const Inputs& in, const AtHome& home, int lane) {
  Header* const own = reinterpret_cast<Header*>(home.mailbox);
  if (blockIdx.x == 0 && lane < in.parts)
    raise_flag(&reinterpret_cast<Header*>(in.mailboxes[lane])->arrived[in.part], own->round);
}
// Until those of all are there. By a warp.
__device__ __noinline__ static void await_rows(const Inputs& in, const AtHome& home) {
  const int lane = threadIdx.x % 32;
  const Header* const own = reinterpret_cast<const Header*>(home.mailbox);
  if (lane < in.parts)
    await_flag(&own->arrived[lane], own->round, {{}, in.part, in.parts, home.patience}, lane);
  __syncwarp();
}

// CONSUMERS share a sample, with CHUNKS of 32 elements for each warp. A tile is BLOCKS of eight references of
// type T. PARTS: rows are of several processes. Up to ROWS of them share a pass.
template <typename T, int CONSUMERS, int CHUNKS, int BLOCKS, bool CLUSTERED, bool PARTS, int ROWS>
struct Products {
  static constexpr int THREADS = CONSUMERS, WARPS = THREADS / 32;
  static constexpr int TR = 8 * BLOCKS;
  static constexpr bool THIRD = Split<T>::PARTS == 3;
  // Rows fill the columns of the products of the sums, so that a product of the scores has one part of the
  // references for all of them, and there is one for each part.
  static constexpr bool FULL = ROWS == 4;
  static_assert(ROWS == PRODUCTS_ROWS || (FULL && !THIRD), "two columns for each row, of eight");
  static constexpr int RESIDENT = products_resident(THREADS);  // blocks of a multiprocessor
  static constexpr int STAGES = products_stages(THREADS, CHUNKS* TR);
  static constexpr int HELD = THREADS * CHUNKS;               // most elements of a block
  static constexpr int REF_BYTES = products_ref_bytes(HELD);  // in shared memory
  static constexpr int TILE_BYTES = TR * REF_BYTES;
  using Shared = ProductsShared<THREADS, TR, STAGES, CLUSTERED, ROWS>;
  static constexpr int PIECES = Shared::PIECES, PIECE_REFS = TR / PIECES;
  static constexpr int IN_FLIGHT = (RESIDENT == 1 ? PRODUCTS_IN_FLIGHT : PRODUCTS_PAIRED_IN_FLIGHT) /
                                   (PIECE_REFS * REF_BYTES / 1024 * 1024);
  static constexpr int EARLY_BYTES = RESIDENT == 1 ? PRODUCTS_EARLY_BYTES : PRODUCTS_PAIRED_EARLY_BYTES;
  static constexpr int SEGMENT_TILES = SEGMENT_REFS / TR;
  __host__ __device__ static constexpr int fixed_bytes(int slices) {
    const int absent = CLUSTERED ? PRODUCTS_MOST_BLOCKS - slices : 0;
    return (static_cast<int>(sizeof(Shared) - absent * sizeof(ProductsLetters<BLOCKS>)) + 127) / 128 * 128;
  }

  const Inputs& in;
  const UnitList& list;
  const ProductsParts& parts;
  const ProductsLayout& layout;
  const int staging;  // where the ring begins in shared memory
  const int slices = CLUSTERED ? layout.slices : 1;
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  const int team = CLUSTERED ? block / slices : block, teams = CLUSTERED ? blocks / slices : blocks;
  const int rank = CLUSTERED ? block % slices : 0;
  const int d = static_cast<int>(in.d);
  const int offset = CLUSTERED ? rank * layout.slice : 0;  // of this block's slice in D
  const int length = CLUSTERED ? min(layout.slice, d - offset) : d;

  __device__ __forceinline__ static char* memory() {
    extern __shared__ __align__(128) char all[];
    return all;
  }
  __device__ __forceinline__ static Shared& shared() { return *reinterpret_cast<Shared*>(memory()); }
  __device__ __forceinline__ char* stage(int s) const { return memory() + staging + s * TILE_BYTES; }
  __device__ __forceinline__ RowPlace place() const {
    return {slices, rank, ROWS, CLUSTERED ? layout.slice : in.d, offset, length, true};
  }
  __device__ __forceinline__ static void barrier() { named_barrier(1, THREADS); }

  // The producer, one warp: each lane copies one reference of a piece.
  __device__ __forceinline__ void produce(int lane) const {
    const int ref_bytes = length * static_cast<int>(sizeof(T));
    constexpr int RING = STAGES * PIECES;
    Barrier* const all = &shared().full[0][0];
    int s = 0, phase = 1, slot = 0, slot_phase = 0;
    int earlier = RING - IN_FLIGHT, earlier_phase = 1;  // a piece that has to be there first
    for (;;) {
      wait_barrier(&shared().announced.placed[slot], slot_phase);
      const Segment<ROWS>& segment = shared().announced.segments[slot];
      if (segment.flags & SEGMENT_LIST_DONE) return;
      const uint64_t policy = segment.alone ? read_once_policy() : usual_policy();
      const char* from =
          static_cast<const char*>(in.refs.data) + ((segment.first + lane) * in.d + offset) * sizeof(T);
      int left = segment.references;
      for (int pieces = segment.tiles * PIECES; pieces > 0; --pieces) {
        const int many = max(min(left, PIECE_REFS), 0);
        if (s % PIECES == 0) wait_barrier(&shared().empty[s / PIECES], phase);
        wait_barrier(&all[earlier], earlier_phase);
        if (++earlier == RING) earlier = 0, earlier_phase ^= 1;
        if (lane == 0) {
          if (many > 0) {
            arrive_expecting(&all[s], many * ref_bytes);
          } else {
            arrive(&all[s]);
          }
        }
        __syncwarp();
        if (lane < many)
          bulk_copy(stage(0) + (s * PIECE_REFS + lane) * REF_BYTES, from, ref_bytes, &all[s], policy);
        from += int64_t{PIECE_REFS} * d * static_cast<int>(sizeof(T)), left -= PIECE_REFS;
        if (++s == RING) s = 0, phase ^= 1;
      }
      __syncwarp();
      if (++slot == SEGMENT_SLOTS) slot = 0, slot_phase ^= 1;
    }
  }

  // The consumers. Lanes of a warp: 4 g + t. As in the matrix units: of references, lane (g, t) holds
  // elements 8 t to 8 t + 7 of a chunk of reference `logical` g; words 0 and 2 of these four are part 0 of
  // the elements, words 1 and 3 part 1, and a product multiplies both parts with columns of their own: column
  // = 4 part + 2 row + split; FULL: column = 2 row + split, in a product for each part.
  static constexpr int X_PARTS = FULL ? 2 : 1;
  struct Mine {
    float sum[CHUNKS][4];  // of the column's row, elements g, g + 8, g + 16, g + 24 of a chunk; t: see column
    uint2 x[CHUNKS][X_PARTS];  // of the column's row and part, or of both parts, split
    // Third parts: in columns of the first part those of the first of two chunks, else those of the second.
    uint2 third[THIRD ? CHUNKS / 2 : 1];
    // Of row t % ROWS: 1 / what x was multiplied by; alpha / 2, and what float32 drops of it: together that
    // is alike for references of one size, but not for what is scored in float64.
    float unscale, half_alpha, rest_alpha;
  };

  __device__ __forceinline__ static int thread() {
    unsigned tid;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(tid));
    return static_cast<int>(tid);
  }
  __device__ __forceinline__ static int lane() { return thread() & 31; }
  __device__ __forceinline__ static int warp() { return static_cast<unsigned>(thread()) / 32; }
  __device__ __forceinline__ static int chunk(int q) { return q * WARPS + warp(); }
  // Of eight references side by side in memory the one that is `logical` in the products: so that four lanes
  // of each of two references read from all banks at once.
  __device__ __forceinline__ static int stored(int logical) { return (logical & 1) << 2 | logical >> 1; }

  // x of the rows of the unit, split. rehearses: there is no segment yet, and none is looked at.
  __device__ __forceinline__ void begin_segment(Mine& mine, const Segment<ROWS>& segment, int slot,
                                                int slot_phase, bool rehearses) const {
    const int column = lane() >> 2, t = lane() & 3, part = FULL ? 0 : column >> 2;
    const int my_row = column / 2 % ROWS, split = column % 2;
    const bool present = !rehearses && my_row < segment.count;
    const int64_t index = rehearses ? 0 : segment.rows[present ? my_row : 0].index;
    const float* const from =
        static_cast<const float*>(x_of(in, index).data) + index * in.d + offset + 8 * t + 2 * part;
    float2 x[CHUNKS][X_PARTS][2];
#pragma unroll
    for (int q = 0; q < CHUNKS; ++q) {
      const int first = 32 * chunk(q);
      const bool within = present && first + 8 * t < length;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if constexpr (FULL) {
          const float4 both =
              within ? *reinterpret_cast<const float4*>(from + first + 4 * h) : make_float4(0, 0, 0, 0);
          x[q][0][h] = make_float2(both.x, both.y), x[q][1][h] = make_float2(both.z, both.w);
        } else {
          x[q][0][h] = within ? *reinterpret_cast<const float2*>(from + first + 4 * h) : make_float2(0, 0);
        }
      }
    }
    float largest = 0, square = 0;
#pragma unroll
    for (int q = 0; q < CHUNKS; ++q) {
#pragma unroll
      for (int i = 0; i < 2 * X_PARTS; ++i) {
        const float2 two = x[q][i / 2][i % 2];
        largest = fmaxf(largest, fmaxf(fabsf(two.x), fabsf(two.y)));
        square = fmaf(two.x, two.x, fmaf(two.y, two.y, square));
      }
    }
    // Over the lanes with the row's other elements.
    const auto all_lanes = [](auto v, const auto& take) {
#pragma unroll
      for (int hop : {1, 2, 16}) {
        if (hop < 16 || !FULL) v = take(v, __shfl_xor_sync(0xffffffffu, v, hop));
      }
      return v;
    };
    const auto sum = [](auto a, auto b) { return a + b; };
    largest = all_lanes(largest, [](float a, float b) { return fmaxf(a, b); });
    square = all_lanes(square, sum);
    const bool leads = split == 0 && part == 0 && t == 0 && present;
    if (leads) shared().x_squares[slot & 1][my_row][warp()] = square;
    if (!rehearses && segment.squares) {
      double exact = 0;
#pragma unroll
      for (int q = 0; q < CHUNKS; ++q) {
#pragma unroll
        for (int i = 0; i < 2 * X_PARTS; ++i) {
          const double a = x[q][i / 2][i % 2].x, b = x[q][i / 2][i % 2].y;
          exact = fma(a, a, fma(b, b, exact));
        }
      }
      exact = all_lanes(exact, sum);
      if (leads) shared().exact_squares[slot & 1][my_row][warp()] = exact;
    }
    float scale = 1;  // the largest to below 2^15
    if constexpr (!THIRD) {
      const int exponent = largest > 0 && largest < INFINITY ? ilogbf(largest) : 0;
      scale = ldexpf(1.0f, min(max(14 - exponent, -100), 100));
    }
#pragma unroll
    for (int q = 0; q < CHUNKS; ++q) {
#pragma unroll
      for (int p = 0; p < X_PARTS; ++p) {
        uint32_t words[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float a = x[q][p][h].x * scale, b = x[q][p][h].y * scale;
          if (split == 1) a = rest_of<T>(a), b = rest_of<T>(b);
          words[h] = pair_of(Split<T>::nearest(a), Split<T>::nearest(b));
        }
        mine.x[q][p] = make_uint2(words[0], words[1]);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) mine.sum[q][k] = 0;
    }
    if constexpr (THIRD) {
#pragma unroll
      for (int q = 0; q < CHUNKS; q += 2) {
        uint32_t words[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float2 v = split == 0 ? x[q][0][h] : x[q + 1][0][h];
          words[h] = pair_of(Split<T>::nearest(rest_of<T>(rest_of<T>(v.x))),
                             Split<T>::nearest(rest_of<T>(rest_of<T>(v.y))));
        }
        mine.third[q / 2] = make_uint2(words[0], words[1]);
      }
    }
    if (rehearses) return;
    wait_barrier(&shared().announced.told[slot], slot_phase);
    // Of the rows whose scores this lane will have.
    const int scored = lane() & (ROWS - 1);
    const RowState& row = segment.rows[min(scored, segment.count - 1)];
    mine.unscale = row.sign * __shfl_sync(0xffffffffu, 1 / scale, scored << 3);
    mine.half_alpha = row.half_alpha, mine.rest_alpha = 0.5f * row.rest_alpha;
  }

  // Shares of the scores of eight references, to shared memory.
  __device__ __forceinline__ void score_block(const Mine& mine, uint32_t refs, int block, int parity,
                                              bool first, int slot, int rows) const {
    const int g = lane() >> 2, t = lane() & 3;
    float norms[2] = {}, dots[4] = {},
          thirds[2][4] = {};  // thirds: of the first and the second of two chunks
    constexpr int CHAIN = CHUNKS < 4 ? CHUNKS : 4;
#pragma unroll
    for (int from = 0; from < CHUNKS; from += CHAIN) {
      float product[X_PARTS][4] = {}, first_part[4] = {}, second_part[4] = {};
#pragma unroll
      for (int q = from; q < from + CHAIN; ++q) {
        const uint4 raw = load_shared_16(refs + WARPS * 64 * q);
#pragma unroll
        for (int p = 0; p < X_PARTS; ++p) multiply_16<T>(product[p], raw, mine.x[q][p]);
        if constexpr (THIRD) multiply_16<T>(thirds[q % 2], raw, mine.third[q / 2]);
        multiply_16<T>(first_part, raw, make_uint2(raw.x, raw.z));
        multiply_16<T>(second_part, raw, make_uint2(raw.y, raw.w));
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) dots[k] += product[k / 2 % X_PARTS][k];
#pragma unroll
      for (int k = 0; k < 2; ++k) norms[k] += first_part[k] + second_part[2 + k];
    }
    // Of the products, lane (g, t) has columns 2 t and 2 t + 1 of reference g, of part 0 and of part 1: of x,
    // or of the references, where it wants that of reference g itself.
    const float norm = __shfl_sync(0xffffffffu, g & 1 ? norms[1] : norms[0], (lane() & ~3) | g >> 1);
    float dot;
    if constexpr (FULL) {
      dot = (dots[0] + dots[1]) + (dots[2] + dots[3]);
    } else {
      dot = t < 2 ? dots[0] + dots[1] : dots[2] + dots[3];
      if constexpr (THIRD) dot += t < 2 ? thirds[0][0] + thirds[1][1] : thirds[0][2] + thirds[1][3];
      dot += __shfl_xor_sync(0xffffffffu, dot, 2);
    }
    const float share = fmaf(-mine.half_alpha, norm, fmaf(dot, mine.unscale, -mine.rest_alpha * norm));
    if (first && block == 0 && lane() == 0) shared().r_squares[slot & 1][warp()] = norm;
    if (t < rows) shared().scores[parity][t][8 * block + g][warp()] = share;
  }

  // Of the warps' shares of a score a lane adds up so many: all, or half of them where rows are two.
  static constexpr int EACH = WARPS * ROWS / 4;

  // Lanes of the warps that mail and weigh: row lane / 8 and reference lane % 8 of eight; of two rows two
  // lanes for each. What is over the latter, and over all lanes of a row.
  static constexpr int ROW_LANES = 32 / ROWS;
  __device__ __forceinline__ static int lane_of_row(int lane) { return lane % 8 + lane / (8 * ROWS) * 8; }
  template <typename V>
  __device__ __forceinline__ static V over_lanes(V v) {
    return FULL ? v : v + __shfl_xor_sync(0xffffffffu, v, 8 * ROWS);
  }
  template <typename V>
  __device__ __forceinline__ static V over_row(V v) {
#pragma unroll
    for (int hop : {1, 2, 4}) v += __shfl_xor_sync(0xffffffffu, v, hop);
    return over_lanes(v);
  }

  // The scores of a tile, by one warp, from the shares of the block's warps; RELATIVE: to the best so far.
  template <bool RELATIVE>
  __device__ __forceinline__ void add_shares(int parity, int lane, float (&scores)[BLOCKS]) const {
    const int my_row = lane / 8 % ROWS, n = lane % 8, first = lane / 8 / ROWS * EACH;
    float4 base[EACH / 4] = {};
#pragma unroll
    for (int w = 0; RELATIVE && w < EACH; w += 4)
      base[w / 4] = *reinterpret_cast<const float4*>(&shared().base[my_row][first + w]);
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      const float* const from = &shared().scores[parity][my_row][8 * b + n][first];
      float sum = 0;
#pragma unroll
      for (int w = 0; w < EACH; w += 4) {
        const float4 four = *reinterpret_cast<const float4*>(from + w), less = base[w / 4];
        sum += ((four.x - less.x) + (four.y - less.y)) + ((four.z - less.z) + (four.w - less.w));
      }
      scores[b] = over_lanes(sum);
    }
  }

  // The mailer of a block of a cluster, one warp: sends the block's shares of the scores, and with the first
  // ones of a segment its figures, to all blocks.
  __device__ __forceinline__ void carry_mail(int lane) const {
    const int my_row = lane / 8 % ROWS;
    int slot = 0, slot_phase = 0, parity = 0, phases = 0, letter = 0, told = 0;
    for (;;) {
      wait_barrier(&shared().announced.told[slot], slot_phase);
      const Segment<ROWS>& segment = shared().announced.segments[slot];
      if (segment.flags & SEGMENT_LIST_DONE) return;
      const int references = segment.references;
#pragma unroll 1
      for (int left = references; left > 0; left -= TR) {
        wait_barrier(&shared().given[parity], phases >> parity & 1);
        phases ^= 1 << parity, parity ^= 1;
        float scores[BLOCKS];
        add_shares<false>(parity ^ 1, lane, scores);
        send_scores(scores, letter, lane);
        if (left == references) send_figures(segment, slot, my_row, letter, told, lane);
        letter = (letter + 1) % PRODUCTS_LETTERS;
      }
      if (references > 0) told ^= 1;
      __syncwarp();
      if (lane == 0) arrive(&shared().announced.done[slot]);
      if (++slot == SEGMENT_SLOTS) slot = 0, slot_phase ^= 1;
    }
  }
  // Lane 4 p + q sends four of them to block p.
  __device__ __forceinline__ void send_scores(const float (&scores)[BLOCKS], int letter, int lane) const {
    const int from = lane % 4 * 4;
    const uint32_t arrived = shared_address(&shared().mail.arrived[letter]);
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      uint4 four;
      four.x = __float_as_uint(__shfl_sync(0xffffffffu, scores[b], from));
      four.y = __float_as_uint(__shfl_sync(0xffffffffu, scores[b], from + 1));
      four.z = __float_as_uint(__shfl_sync(0xffffffffu, scores[b], from + 2));
      four.w = __float_as_uint(__shfl_sync(0xffffffffu, scores[b], from + 3));
      const uint32_t to = shared_address(&shared().mail.from[rank].scores[letter][b][from]);
#pragma unroll 1
      for (int peer = lane / 4; peer < slices; peer += 8)
        send(peer_address(to, peer), peer_address(arrived, peer), four);
    }
  }
  // The lanes of a row, each to a block.
  __device__ __forceinline__ void send_figures(const Segment<ROWS>& segment, int slot, int my_row, int letter,
                                               int told, int lane) const {
    const ProductsFigures own = figures_of_block(segment, slot, my_row, my_row < segment.count);
    const ProductsFigures& to = shared().mail.from[rank].figures[told][my_row];
    const uint32_t arrived = shared_address(&shared().mail.arrived[letter]);
#pragma unroll 1
    for (int peer = lane % 8 + lane / 16 * 8; peer < slices; peer += 16) {
      const uint32_t its = peer_address(arrived, peer);
      send(peer_address(shared_address(&to.exact_square), peer), its, own.exact_square);
      send(peer_address(shared_address(&to.square), peer), its, own.square, own.norm);
      send(peer_address(shared_address(&to.x_square), peer), its, own.x_square, 0.0f);
    }
  }
  __device__ __forceinline__ void await_letter(bool first, int letter, int phase, int lane) const {
    const int bytes = TR * ROWS * static_cast<int>(sizeof(float)) +
                      (first ? ROWS * static_cast<int>(sizeof(ProductsFigures)) : 0);
    if (lane == 0) arrive_expecting(&shared().mail.arrived[letter], slices * bytes);
    wait_barrier(&shared().mail.arrived[letter], phase);
  }

  // Of a row, in the warp that weighs. Scores are relative to the best so far, share by share: so those that
  // matter are small, and their sums in float32 lose nothing. Weights are relative to that of the best, too.
  struct Weighed {
    float rate;
    int best = 0;            // which of the segment that is, `logical`
    double level = 0;        // by how much scores have risen, in units of log 2
    float total = 0;         // of the weights
    int equals = 0;          // other references like the best in each share, of this lane
    float window = UNKNOWN;  // see ProductsKnown
    int listed = 0;          // of the part, the best of this segment not among them before it ends
  };
  // What is below has no weight that could show, or none at all. Until it is known, all that may be added are
  // within the window.
  static constexpr float MOST_WINDOW = 40, UNKNOWN = 41;

  // Share k of SHARES of a reference of the tile; at: its parity, or its letter.
  static constexpr int SHARES = CLUSTERED ? PRODUCTS_MOST_BLOCKS : WARPS;
  __device__ __forceinline__ float share_of(int at, int reference, int k, int my_row) const {
    if constexpr (CLUSTERED) {
      return k < slices ? shared().mail.from[k].scores[at][reference / 8][8 * my_row + reference % 8] : 0;
    } else {
      return shared().scores[at][my_row][reference][k];
    }
  }
  __device__ __forceinline__ void take_scores(int at, int lane, float (&scores)[BLOCKS]) const {
    if constexpr (CLUSTERED) {
      const int my_row = lane / 8 % ROWS;
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
        scores[b] = 0;
#pragma unroll
        for (int k = 0; k < SHARES; ++k)
          scores[b] += share_of(at, 8 * b + lane % 8, k, my_row) - shared().base[my_row][k];
      }
    } else {
      add_shares<true>(at, lane, scores);
    }
  }
  // Which row a lane has is found out again where that is rarely wanted: there are few registers.
  __device__ __forceinline__ static int row_of_lane() { return lane() / 8 % ROWS; }
  // To the rows' lists what lanes have that are `near`: a reference of the segment, that much below the best
  // so far, and its equals. Weights are relative to the level until the segment ends.
  __device__ __forceinline__ static void enlist(const Segment<ROWS>& segment, Weighed& my, bool near,
                                                float below, int reference, int count) {
    const int my_row = row_of_lane();
    const unsigned those = __ballot_sync(0xffffffffu, near) >> 8 * my_row & 0xffu;
    if (near && lane() < 8 * ROWS)
      shared().ties[my_row][my.listed + __popc(those & ((1u << lane() % 8) - 1))] = {
          my.level + below, static_cast<int>(segment.first) + (reference & ~7) + stored(reference & 7),
          count};
    my.listed += __popc(those);
  }
  // Like the best in each share, itself among them.
  __device__ __forceinline__ static int equals_of(const Weighed& my) {
    int others = my.equals;
#pragma unroll
    for (int hop : {1, 2, 4}) others += __shfl_xor_sync(0xffffffffu, others, hop);
    return 1 + others;
  }

  // Where `rises`, `best` of the tile's scores is better than all before; what the row's sums are to be
  // multiplied by. before: references of the segment before the tile. The best one so far is not in the list:
  // mostly there is no other with any weight, and none is listed. lists: set where one is.
  __device__ __forceinline__ float raise(const Segment<ROWS>& segment, Weighed& my, bool rises, float best,
                                         const float (&scores)[BLOCKS], int at, int before,
                                         bool& lists) const {
    const int my_row = row_of_lane();
    int reference = TR - 1;  // the first one that is so good
#pragma unroll
    for (int b = BLOCKS - 1; b >= 0; --b) {
      const unsigned those = __ballot_sync(0xffffffffu, scores[b] == best) >> 8 * my_row & 0xffu;
      if (those) reference = 8 * b + __ffs(those) - 1;
    }
    const float rise = best * my.rate;
    const bool near = rises && before > 0 && rise <= my.window;
    if (__builtin_expect(__any_sync(0xffffffffu, near), 0)) {
      enlist(segment, my, near && lane() % 8 == 0, 0, my.best, equals_of(my));
      lists = true;
    }
    __syncwarp();  // all have read what scores were relative to
    float scale = 1;
    if (rises) {
#pragma unroll
      for (int k = lane_of_row(lane()); k < SHARES; k += ROW_LANES)
        shared().base[my_row][k] = share_of(at, reference, k, my_row);
      if (!near) my.listed = shared().earlier[my_row];  // the segment's others are still further below
      scale = before == 0 ? 0.0f : power_of_two(-rise);
      my.best = before + reference, my.level += rise;
      my.total *= scale, my.equals = 0;
    }
    __syncwarp();
    return scale;
  }
  __device__ __forceinline__ bool is_like_base(int at, int reference) const {
    const int my_row = row_of_lane();
    bool like = true;
#pragma unroll 4
    for (int k = 0; k < SHARES; ++k)
      like = like && share_of(at, reference, k, my_row) == shared().base[my_row][k];
    return like;
  }
  // Of a row, what its lanes find of the base's shares k, added up.
  template <typename Of>
  __device__ __forceinline__ static auto over_base(const Of& of) {
    const int my_row = lane() / 8 % ROWS;
    decltype(of(0, 0.0f)) sum = 0;
#pragma unroll
    for (int k = lane_of_row(lane()); k < SHARES; k += ROW_LANES) sum += of(k, shared().base[my_row][k]);
    return over_row(sum);
  }

  // The softmax, one warp.
  __device__ __forceinline__ void weigh(int lane) const {
    const int my_row = lane / 8 % ROWS, n = lane % 8;
    unsigned tiles = 0, segments = 0, told = 0;  // so far; told: those that have references
    if (lane < ROWS) shared().earlier[lane] = 0;
    clear_base();
    for (;; ++segments) {
      const int slot = segments % SEGMENT_SLOTS;
      wait_barrier(&shared().announced.told[slot], segments / SEGMENT_SLOTS & 1);
      const Segment<ROWS>& segment = shared().announced.segments[slot];
      if (segment.flags & SEGMENT_LIST_DONE) break;
      const bool present = my_row < segment.count;
      Weighed my;
      my.rate = segment.rows[present ? my_row : 0].rate, my.listed = shared().earlier[row_of_lane()];
#pragma unroll 1
      for (int left = segment.references; left > 0; left -= TR, ++tiles) {
        const int parity = tiles & 1, at = CLUSTERED ? tiles % PRODUCTS_LETTERS : parity;
        const int before = segment.references - left;
        if constexpr (CLUSTERED) {
          await_letter(before == 0, at, tiles / PRODUCTS_LETTERS & 1, lane);
        } else {
          wait_barrier(&shared().given[parity], tiles >> 1 & 1);
          if (before == 0 && lane == 0) ask(slot);
        }
        float scores[BLOCKS];
        int used = 0, again = 0;
        bool lists = false, raises;
#pragma unroll 1
        do {
          take_scores(at, lane, scores);
#pragma unroll
          for (int b = 0; b < BLOCKS; ++b)
            scores[b] = present && 8 * b + stored(n) < left ? scores[b] : -INFINITY;
          raises = false;
          if (!again) {
            float best = -INFINITY;
#pragma unroll
            for (int b = 0; b < BLOCKS; ++b) best = fmaxf(best, scores[b]);
#pragma unroll
            for (int hop = 4; hop > 0; hop /= 2) best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, hop));
            const bool rises = best > (before == 0 ? -INFINITY : 0.0f);
            raises = __any_sync(0xffffffffu, rises);  // rarely, after the first tiles
            if (raises) {
              const float scale = raise(segment, my, rises, best, scores, at, before, lists);
              if (n == 0) shared().scales[parity][my_row] = scale;
              used = RAISED, again = 1;
            }
          }
          asm volatile("" : "+r"(again));  // scores are taken again by the same code, which is there by then
        } while (raises);
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
          const bool counts = present && 8 * b + stored(n) < left;
          const float exponent = scores[b] * my.rate;
          const float weight = counts ? power_of_two(exponent) : 0.0f;
          const bool adds = !(weight < PRODUCTS_NO_WEIGHT);
          if (!__any_sync(0xffffffffu, adds)) continue;
          used |= 1 << b;
          my.total += hand_out(weight, parity, b, lane);
          const int reference = before + 8 * b + n;
          const bool close = adds && reference != my.best && exponent >= fminf(-my.window, 0.0f);
          if (__builtin_expect(!__any_sync(0xffffffffu, close), 1)) continue;
          const bool like = close && scores[b] == 0 && is_like_base(at, 8 * b + n);
          my.equals += like;
          enlist(segment, my, close && !like && exponent >= -my.window, exponent, reference, 1);
          lists = true;
        }
        if (lane == 0) shared().used[parity] = used;
        __syncwarp();
        if (lane == 0) arrive(&shared().weighed[parity]);
        // What else there is to know of the segment, when its first tiles are on their way, or it is needed.
        if (lists || left <= TR || (CLUSTERED && before == 4 * TR)) {
          if (my.window == UNKNOWN) learn(segment, slot, present, my, told & 1);
          const int most = parts.listed - TR - 1;
          if (__builtin_expect(__any_sync(0xffffffffu, my.listed > most), 0))
            shorten(my, most, weight_of(row_of_lane(), score_of_base()));
        }
      }
      settle(segment, slot, my);
      if (segment.references > 0) ++told;
      __syncwarp();
      if (PARTS && lane == 0) arrive(&shared().settled[slot]);
      if (lane == 0) arrive(&shared().announced.done[slot]);
    }
    if (!CLUSTERED && lane == 0) ask(NO_SLOT);
  }
  static constexpr int NO_SLOT = -1;
  __device__ __forceinline__ static void ask(int slot) {
    shared().asked_slot = slot;
    arrive(&shared().asked);
  }
  // Where there is no cluster, a warp beside the one that weighs.
  __device__ __forceinline__ void answer(int lane) const {
    const int my_row = lane / 8 % ROWS;
    for (int phase = 0;; phase ^= 1) {
      wait_barrier(&shared().asked, phase);
      const int slot = shared().asked_slot;
      if (slot == NO_SLOT) return;
      const Segment<ROWS>& segment = shared().announced.segments[slot];
      const bool present = my_row < segment.count;
      know(segment, my_row, present, figures_of_block(segment, slot, my_row, present));
      __syncwarp();
      if (lane == 0) arrive(&shared().answered);
    }
  }
  __device__ __forceinline__ void learn(const Segment<ROWS>& segment, int slot, bool present, Weighed& my,
                                        int told) const {
    const int my_row = row_of_lane();
    if constexpr (CLUSTERED) {
      ProductsFigures all{};
#pragma unroll 1
      for (int p = 0; p < slices; ++p) {
        const ProductsFigures& one = shared().mail.from[p].figures[told][my_row];
        all.exact_square += one.exact_square, all.x_square += one.x_square;
        all.square += one.square, all.norm += one.norm;
      }
      know(segment, my_row, present, all);
      __syncwarp();
    } else {
      wait_barrier(&shared().answered, told);
    }
    my.window = shared().known[my_row].window;
    if (my.window < 0) my.listed = shared().earlier[my_row];
  }

  // Part `split` of a weight, as the products see it.
  __device__ __forceinline__ static T split_weight(float weight, int split) {
    if (split == 1) weight = rest_of<T>(weight) * Split<T>::SCALE;
    if (THIRD && split == 2) weight = rest_of<T>(rest_of<T>(weight));
    return Split<T>::nearest(weight);
  }

  // The weights of a block for the products; returns their sum over the row's eight references. Of the
  // products, lane t of four has two parts of a row, or if there are three, of two lanes the second has the
  // third.
  static constexpr int COLUMNS = THIRD ? 4 : 2;  // of a row
  __device__ __forceinline__ static int row_of_sums(int t) { return 2 * t / COLUMNS % ROWS; }
  __device__ __forceinline__ float hand_out(float weight, int parity, int block, int lane) const {
    const int g = lane / 4, t = lane % 4, row = g / COLUMNS % ROWS, split = g % COLUMNS;
    float seen =
        fmaf(to_float(split_weight(weight, 1)), 1 / Split<T>::SCALE, to_float(split_weight(weight, 0)));
    if constexpr (THIRD) seen += to_float(split_weight(weight, 2));
#pragma unroll
    for (int hop = 4; hop > 0; hop /= 2) seen += __shfl_xor_sync(0xffffffffu, seen, hop);
    const float a = __shfl_sync(0xffffffffu, weight, 8 * row + 2 * t);
    const float b = __shfl_sync(0xffffffffu, weight, 8 * row + 2 * t + 1);
    shared().weights[parity][block][lane] = g < ROWS * COLUMNS && split < Split<T>::PARTS
                                                ? pair_of(split_weight(a, split), split_weight(b, split))
                                                : 0;
    return seen;
  }

  __device__ __forceinline__ void add_block(Mine& mine, uint32_t refs, uint32_t weights) const {
#pragma unroll
    for (int q = 0; q < CHUNKS; ++q) {
      if (q % 2 == 0) __syncwarp();  // no more loads in flight than there are registers for
      const uint4 four = load_transposed(refs + WARPS * 64 * q);
      float low[4] = {}, high[4] = {};
      multiply_8<T>(low, four.x, four.y, weights);
      multiply_8<T>(high, four.z, four.w, weights);
      mine.sum[q][0] = fmaf(low[1], 1 / Split<T>::SCALE, mine.sum[q][0]) + low[0];
      mine.sum[q][1] = fmaf(low[3], 1 / Split<T>::SCALE, mine.sum[q][1]) + low[2];
      mine.sum[q][2] = fmaf(high[1], 1 / Split<T>::SCALE, mine.sum[q][2]) + high[0];
      mine.sum[q][3] = fmaf(high[3], 1 / Split<T>::SCALE, mine.sum[q][3]) + high[2];
    }
  }

  // A tile; refs: see `consume`.
  __device__ __forceinline__ void score_tile(Mine& mine, uint32_t refs, int rows, int parity, bool first,
                                             int slot) const {
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block)
      score_block(mine, refs + block * 8 * REF_BYTES, block, parity, first, slot, rows);
    __syncwarp();
  }
  // Of the tile `many` references count; what is beyond them has not come from memory.
  __device__ __forceinline__ void add_tile(Mine& mine, uint32_t refs, int many, int parity) const {
    const int used = shared().used[parity];
    if (used & RAISED) {
      const float scale = shared().scales[parity][row_of_sums(lane() & 3)];
#pragma unroll
      for (int q = 0; q < CHUNKS; ++q) {
#pragma unroll
        for (int k = 0; k < 4; ++k) mine.sum[q][k] *= scale;
      }
    }
    if (!(used & ~RAISED)) return;
#pragma unroll 1
    for (int block = 0; block < BLOCKS; ++block) {
      if (!(used >> block & 1)) continue;
      const int index = 8 * block + stored(lane() & 7);
      add_block(mine, refs + (index < many ? block * 8 * REF_BYTES : -stored(lane() & 7) * REF_BYTES),
                shared().weights[parity][block][lane()]);
    }
  }

  // Of a row, in all its lanes, which take the warps' shares.
  __device__ __forceinline__ ProductsFigures figures_of_block(const Segment<ROWS>& segment, int slot,
                                                              int my_row, bool present) const {
    static_assert(8 * ROWS <= 32 && (WARPS == 8 || WARPS == 16),
                  "eight lanes for each row, or two times eight");
    const int w = lane_of_row(lane());
    ProductsFigures own = figures_of_warp(segment, slot, my_row, present, w % WARPS);
    if (w >= WARPS) own = {};
    if constexpr (FULL && WARPS > 8) {
      const ProductsFigures second = figures_of_warp(segment, slot, my_row, present, w + 8);
      own.exact_square += second.exact_square, own.x_square += second.x_square;
      own.square += second.square, own.norm += second.norm;
    }
    own.exact_square = segment.squares ? over_row(own.exact_square) : 0;
    own.x_square = over_row(own.x_square), own.square = over_row(own.square), own.norm = over_row(own.norm);
    return own;
  }
  // The share of warp `w`.
  __device__ __forceinline__ ProductsFigures figures_of_warp(const Segment<ROWS>& segment, int slot,
                                                             int my_row, bool present, int w) const {
    const float x = shared().x_squares[slot & 1][my_row][w], r = shared().r_squares[slot & 1][w];
    const float half = segment.rows[present ? my_row : 0].half_alpha * r;
    ProductsFigures own;
    own.exact_square = segment.squares ? shared().exact_squares[slot & 1][my_row][w] : 0;
    own.x_square = x, own.norm = r, own.square = fmaf(half, half, x * r * (1.0f / (32 * CHUNKS)));
    return own;
  }

  // PartRow::scale. A score is wrong by SCORE_ERROR times what its sums go through, at random: alpha/2 |r|^2
  // of a warp and |x_i r_i| of an element, and a block's share of it in a cluster. That moves the mean by its
  // part of the distance between references that have weight. They are about as far from x / alpha as the
  // best one, and no further from one another than twice their size, of which the segment's first is an
  // example unless it is small. `square`: of the sums, together; `norm`: |r|^2.
  __device__ __forceinline__ void know(const Segment<ROWS>& segment, int my_row, bool present,
                                       const ProductsFigures& of) const {
    const RowState& row = segment.rows[present ? my_row : 0];
    const float a = static_cast<float>(row.a), b = static_cast<float>(row.b), alpha = 2 * row.half_alpha;
    const float variance = __fdividef(1, variances(row)), elements = static_cast<float>(d);
    const float of_data = fmaf(a, alpha, b);
    // |result|^2; as the mean may become any prediction where lse is wanted, the smallest of them
    const float size = in.lse.data ? fminf(of.norm, elements * variance)
                                   : fmaf(of_data * of_data, of.norm, a * a * elements * variance);
    const float per_bit = static_cast<float>(2 / LOG2_E) * fabsf(b) * square_root(__fdividef(1, size));
    const float bits = bits_of(row, CLUSTERED ? of.square + square_of_base() : of.square);
    ProductsKnown known;
    known.shift = row.per_square * of.exact_square, known.rate = row.exact_rate();
    known.wrong = CLUSTERED ? per_bit : bits * per_bit;
    known.from_x = __fdividef(of.x_square, alpha * alpha), known.per_score = __fdividef(-2, alpha);
    known.most_apart = fmaxf(of.norm, elements), known.square = of.square, known.window = -1;
    const float scale = bits * per_bit * square_root(known.most_apart);
    if (in.partial && part_in_doubt(row, CLUSTERED ? bits_of(row, of.square) : bits, per_bit)) {
      known.wrong = INFINITY, known.from_x = known.most_apart = 1, known.per_score = 0;
      known.window = MOST_WINDOW;
    } else if (is_merged_later(row)) {
      known.wrong = 0;
    } else if (!is_beyond_doubt(scale)) {
      known.window = window_of(scale);
    }
    if (!present) known.window = -1;
    if (leads_row()) shared().known[my_row] = known;
  }
  __device__ __forceinline__ static float variances(const RowState& row) {  // 1 / sigma^2
    return static_cast<float>(2 / LOG2_E) * static_cast<float>(row.per_square);
  }
  // By how many bits a score is wrong, times what little weight can become.
  __device__ __forceinline__ static float bits_of(const RowState& row, float square) {
    const float bits = SCORE_ERROR * square_root(square) * row.rate;
    return bits > 0.1f ? bits * power_of_two(fminf(2 * bits, 60.0f)) : bits;
  }
  __device__ __forceinline__ static float what_is_wrong(const RowState& row, const ProductsKnown& of,
                                                        float score, float of_cluster) {
    const float apart = fmaxf(fmaf(of.per_score, score, of.from_x), 1e-6f * of.from_x);
    const float wrong = of.wrong * square_root(fminf(apart, of.most_apart));
    return CLUSTERED && of.wrong < INFINITY ? bits_of(row, of.square + of_cluster) * wrong : wrong;
  }
  // A row that is merged with what others have of it, where nobody knows of doubt.
  __device__ __forceinline__ bool is_merged_later(const RowState& row) const {
    return in.partial && !(PARTS && parts.home.merged && !is_of_another(in, row.index));
  }
  // Of a row that has references elsewhere: those may be so much nearer that these have no weight, and often
  // two of these tie. So what counts is whether errors would show if references that have weight are about
  // sigma / alpha apart. All parts of a row answer alike, or nearly: what is scored exactly is not weighed
  // beside what is not: scores of the matrix units are all off to one side, alike for references of one size.
  __device__ __forceinline__ static bool part_in_doubt(const RowState& row, float bits, float per_bit) {
    constexpr float TIMES = 0.5f * (HELD <= 1024 ? 2.3f : 0.86f) * 0x1p-24f / SCORE_ERROR;
    return TIMES * bits * per_bit > 1e-6f * 2 * row.half_alpha * square_root(variances(row));
  }
  __device__ __forceinline__ static float square_root(float v) {
    float root;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(v));
    return root;
  }
  static constexpr float SCORE_ERROR = 3 * 0x1p-24f;  // nine of ten are less

  // Of the best. All lanes.
  __device__ __forceinline__ static double score_of_base() {
    return over_base([](int, float share) { return static_cast<double>(share); });
  }
  __device__ __forceinline__ static float square_of_base() {
    return over_base([](int, float share) { return share * share; });
  }
  // Before a segment begins.
  __device__ __forceinline__ static void clear_base() {
#pragma unroll
    for (int k = lane_of_row(lane()); k < SHARES; k += ROW_LANES) shared().base[row_of_lane()][k] = 0;
    __syncwarp();
  }
  // What its logarithm of a weight is.
  __device__ __forceinline__ static double weight_of(int my_row, double score) {
    return fma(shared().known[my_row].rate, score, -shared().known[my_row].shift);
  }
  // Of lists that are longer than `most` what has least weight, until they are not. All lanes.
  __device__ __forceinline__ void shorten(Weighed& my, int most, double best) const {
    const unsigned those = __ballot_sync(0xffffffffu, my.listed > most);
    __syncwarp();
#pragma unroll 1
    for (int r = 0; r < ROWS; ++r) {
      if (!(those >> 8 * r & 1)) continue;
      const auto of_row = [r](auto v) { return __shfl_sync(0xffffffffu, v, 8 * r); };
      ProductsTie* const ties = shared().ties[r];
      const double of_level = of_row(best - my.level);
      int listed = of_row(my.listed), earlier = shared().earlier[r];
      double floor = of_row(best);
      if (earlier > 0) floor = fmax(floor, shared().moved[r].log2_weight);
      floor -= of_row(my.window);
#pragma unroll 1
      for (; listed > most; floor += 0.5) {
        int count = 0, first_ones = 0;
#pragma unroll 1
        for (int first = 0; first < listed; first += 32) {  // in place
          const int i = first + lane();
          const ProductsTie tie = ties[min(i, listed - 1)];
          const double log2_weight = tie.log2_weight + (i < earlier ? 0 : of_level);
          const bool stays = i < listed && log2_weight >= floor;
          const unsigned all = __ballot_sync(0xffffffffu, stays), below = (1u << lane()) - 1;
          if (stays) ties[count + __popc(all & below)] = tie;
          first_ones += __popc(__ballot_sync(0xffffffffu, stays && i < earlier));
          count += __popc(all);
          __syncwarp();
        }
        listed = count, earlier = first_ones;
      }
      if (lane() == 0) shared().earlier[r] = earlier;
      if (lane() / 8 % ROWS == r) my.listed = listed;
    }
    __syncwarp();
  }

  __device__ __forceinline__ static float window_of(float scale) {
    float exponent;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(exponent) : "f"(scale));
    return fminf(fmaxf(exponent + 23, 0.0f), MOST_WINDOW);  // 2^-23
  }

  // One lane of each row.
  __device__ __forceinline__ static bool leads_row() { return (lane() & ~(8 * ROWS - 8)) == 0; }

  // A segment's end, by the warp that weighs.
  __device__ __forceinline__ void settle(const Segment<ROWS>& segment, int slot, Weighed& my) const {
    const int my_row = row_of_lane();
    const bool any = segment.references > 0, present = my_row < segment.count;
    const int equals = equals_of(my);
    const unsigned print =
        over_base([](int k, float share) { return __float_as_uint(share) * (0x9e3779b1u * (2 * k + 1)); });
    const double score = score_of_base();
    const float of_cluster = CLUSTERED ? square_of_base() : 0;
    PartRow own{-INFINITY, 0, 0, 0, 0, 0};
    if (any) {  // else nobody knows
      own.log2_weight = weight_of(my_row, score), own.total = my.total, own.lead = static_cast<float>(equals);
      own.scale = what_is_wrong(segment.rows[present ? my_row : 0], shared().known[my_row],
                                static_cast<float>(score), of_cluster);
      own.print = static_cast<int>(print);
    }
    enlist(segment, my, any && my.window >= 0 && lane() % 8 == 0, 0, my.best, equals);
    own.ties = my.listed;
    if (present && leads_row()) join(segment, slot, my_row, own);
    __syncwarp();                                                // the list is there
    if (!PARTS && lane() == 0) arrive(&shared().settled[slot]);  // else others wait for the list, too
    const bool part_ends = segment.flags & SEGMENT_PART_END;
    ProductsTie* const to = parts.ties + part_of(segment, min(my_row, segment.count - 1)) * parts.listed;
#pragma unroll 1
    for (int i = lane_of_row(lane()); i < my.listed; i += ROW_LANES) {
      ProductsTie tie = shared().ties[my_row][i];
      if (i >= shared().earlier[my_row]) tie.log2_weight += own.log2_weight - my.level;
      shared().ties[my_row][i] = tie;
      if (part_ends && rank == 0) to[i] = tie;
    }
    __syncwarp();
    if (leads_row()) shared().earlier[my_row] = part_ends ? 0 : my.listed;
    clear_base();
  }
  // Which part this is among all in memory.
  __device__ __forceinline__ int64_t part_of(const Segment<ROWS>& segment, int my_row) const {
    return segment.flags & SEGMENT_UNIT_BEGIN ? segment.rows[my_row].index : in.n + team * ROWS + my_row;
  }

  // Whether the unit's rows end with the segment, and with all that they have, if they are not in doubt.
  __device__ __forceinline__ bool ends_here(const Segment<ROWS>& segment) const {
    return FULL && parts.ends && is_whole(segment);
  }

  // What a row has at the end of a segment to what it has of its part so far, one thread: in shared memory,
  // or where the part ends in memory.
  __device__ __forceinline__ void join(const Segment<ROWS>& segment, int slot, int my_row,
                                       PartRow own) const {
    const RowState& row = segment.rows[my_row];
    ProductsEnd& end = shared().ends[slot][my_row];
    end.before = 0, end.now = 1;
    if (!(segment.flags & SEGMENT_PART_BEGIN)) {
      const PartRow& before = shared().moved[my_row];
      const Joined joined = svel::cuda::join(before, own);
      Equals equals;
      if (before.log2_weight == joined.all.log2_weight) equals.add(before.lead, before.print);
      if (own.log2_weight == joined.all.log2_weight) equals.add(own.lead, own.print);
      own = {joined.all.log2_weight,         joined.all.total, static_cast<float>(equals.count),
             fmaxf(before.scale, own.scale), own.ties,         equals.print};
      end.before = joined.by_first, end.now = joined.by_second;
    }
    if (PARTS || FULL) end.part = own;
    if (FULL) end.ends = ends_here(segment) && !is_doubtful(own.scale, own.total, static_cast<int>(own.lead));
    if (!(segment.flags & SEGMENT_PART_END)) {
      shared().moved[my_row] = own;
    } else if (rank > 0) {  // the first block of a cluster does it for all
    } else if (segment.flags & SEGMENT_UNIT_BEGIN) {
      const int others = FULL && end.ends ? ROW_HAS_ENDED : segment.to - segment.from;
      parts.rows[row.index] = {own, row.a, row.b, segment.from, segment.from + others, my_row};
    } else {
      parts.others[team * ROWS + my_row] = own;
    }
  }

  // Whether warps need what `settle` finds before they go on; figures have room for two segments, and those
  // in letters are read late.
  __device__ __forceinline__ bool waits_for_end(const Segment<ROWS>& segment) const {
    return CLUSTERED || !(segment.flags & SEGMENT_PART_BEGIN) || ends_here(segment) ||
           segment.references == 0 || (PARTS && segment.flags & SEGMENT_PART_END);
  }

  // A segment's sums from the warps' registers to memory, where they join those of the part so far: to the
  // row's result where the unit begins, which `end_kernel` completes, else to the block's place for others;
  // or to the process whose row it is, see goes_straight.
  __device__ __forceinline__ void end_segment(Mine& mine, const Segment<ROWS>& segment, int slot) const {
    const int g = lane() >> 2, my_row = THIRD ? (lane() & 3) >> 1 : lane() & 3;
    if constexpr (THIRD) {  // of two lanes each has parts of the weights
#pragma unroll
      for (int q = 0; q < CHUNKS; ++q) {
#pragma unroll
        for (int k = 0; k < 4; ++k) mine.sum[q][k] += __shfl_xor_sync(0xffffffffu, mine.sum[q][k], 1);
      }
    }
    if (my_row < segment.count && !(THIRD && lane() & 1)) store_sums(mine, segment, slot, my_row);
    if (PARTS && segment.flags & SEGMENT_PART_END) end_part(segment, slot);
  }

  __device__ __forceinline__ bool has_rows_of_another(const Segment<ROWS>& segment) const {
    bool has = false;
#pragma unroll 1
    for (int r = 0; r < segment.count; ++r) has = has || is_of_another(in, segment.rows[r].index);
    return has;
  }

  // Whether the block, or its cluster, has all that its unit's rows have.
  __device__ __forceinline__ static bool is_whole(const Segment<ROWS>& segment) {
    constexpr int WHOLE = SEGMENT_UNIT_BEGIN | SEGMENT_PART_END;
    return segment.from == segment.to && (segment.flags & WHOLE) == WHOLE;
  }
  // Whether a row's mean goes from the registers to the process whose row it is.
  __device__ __forceinline__ bool goes_straight(const Segment<ROWS>& segment, int slot, int my_row) const {
    return PARTS && is_whole(segment) && is_of_another(in, segment.rows[my_row].index) &&
           !(shared().ends[slot][my_row].part.scale > 0);
  }

  // Where rows are of several processes, a part's end: other blocks hear of it, or a row is sent that others
  // have parts of, and what goes with one that has been sent.
  __device__ __forceinline__ void end_part(const Segment<ROWS>& segment, int slot) const {
    const bool begins = segment.flags & SEGMENT_UNIT_BEGIN, whole = is_whole(segment);
    if (begins && !has_rows_of_another(segment)) return;
    if (!whole) barrier();  // the sums of all warps are there
    if (!begins) {
      if (thread() == 0) raise_ready(parts.ready + block);
      return;
    }
    if (thread() == 0) {
#pragma unroll 1
      for (int r = 0; r < segment.count; ++r) {
        const int64_t index = segment.rows[r].index;
        if (!is_of_another(in, index)) continue;
        const PartRow& all = shared().ends[slot][r].part;
        if (all.scale > 0) {
          parts.rows[index].next = shared().late, shared().late = index;
        } else if (whole && rank == 0) {
          store_as(lse_of(in, index), index, lse_of_row(in, all));
        }
      }
    }
    if (whole) return;
    static_assert(ROWS == PRODUCTS_ROWS || !PARTS, "half of the threads for each row");
    const int half = thread() / (THREADS / 2);
    const RowState& row = segment.rows[min(half, segment.count - 1)];
    const PartRow& part = shared().ends[slot][min(half, segment.count - 1)].part;
    if (half >= segment.count || !is_of_another(in, row.index) || part.scale > 0) return;
    constexpr int VECTORS = (HELD + 2 * THREADS - 1) / (2 * THREADS);
    send_home<THREADS / 2, VECTORS>(
        {parts.firsts + row.index * in.d + offset, parts.others + (team + 1) * ROWS + half,
         parts.sums + ((team + 1) * ROWS + half) * in.d + offset, parts.ready + (team + 1) * slices,
         static_cast<float*>(row.out) + row.index * in.d + offset,
         rank == 0 ? static_cast<double*>(lse_of(in, row.index).data) + row.index : nullptr, part.log2_weight,
         part.total, d, length, segment.to - segment.from, slices, rank},
        half * (THREADS / 2));
  }

  // The rows of another process whose weights may be wrong, when the block, or its cluster, has done all
  // else: a call where a row ends would have its caller keep in memory what a tile needs, and wait behind the
  // copies for it.
  __device__ __noinline__ static void send_late(const Inputs& in, const ProductsParts& parts,
                                                const ProductsLayout& layout) {
    barrier();
#pragma unroll 1
    for (int index = shared().late; index != NO_ROW; index = parts.rows[index].next)
      send_aligned(in, parts, layout, index);
  }
  // From the row's parts to its mean, see `merge_aligned`, by all consumers.
  __device__ __forceinline__ static void send_aligned(const Inputs& in, const ProductsParts& parts,
                                                      const ProductsLayout& layout, int64_t index) {
    constexpr int VECTORS = (HELD + 4 * THREADS - 1) / (4 * THREADS);  // of a slice
    auto& memory = reinterpret_cast<AlignedMemory<WARPS>&>(shared().scores);
    static_assert(sizeof(memory) <= sizeof(Shared::scores), "which nobody needs any more");
    const int slices = CLUSTERED ? layout.slices : 1, rank = static_cast<int>(blockIdx.x) % slices;
    const int offset = CLUSTERED ? rank * layout.slice : 0;
    const int length =
        CLUSTERED ? min(layout.slice, static_cast<int>(in.d) - offset) : static_cast<int>(in.d);
    const ProductsRow left = parts.rows[index];
    await_parts(parts.ready + (left.from + 1) * slices, left.to - left.from, slices, rank);
    RowState row;
    name_row(in, index, row);
    set_row(in, index, row);
    double square = 0;
    const float* const x = static_cast<const float*>(row.x) + index * in.d;
#pragma unroll 1
    for (int e = thread(); e < in.d; e += THREADS)
      square = fma(static_cast<double>(x[e]), static_cast<double>(x[e]), square);
    square = warp_sum(square);
    barrier();  // what was there before is read
    if (lane() == 0) memory.shares[warp()] = square;
    barrier();
    double shift = 0;
    for (int w = 0; w < WARPS; ++w) shift += memory.shares[w];
    barrier();
    int at[VECTORS];
    bool within[VECTORS];
    double sum[VECTORS][4] = {};
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) at[v] = 4 * (thread() + v * THREADS), within[v] = at[v] < length;
    const auto wait = [] { barrier(); };
    const PartRow all = merge_aligned<T, WARPS>(in, row, parts, left, shift * row.per_square, wait, memory,
                                                offset, at, within, sum)
                            .all;
    const double by = 1 / all.total;
    float* const to = static_cast<float*>(row.out) + index * in.d + offset;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      if (within[v])
        *reinterpret_cast<float4*>(to + at[v]) =
            make_float4(static_cast<float>(by * sum[v][0]), static_cast<float>(by * sum[v][1]),
                        static_cast<float>(by * sum[v][2]), static_cast<float>(by * sum[v][3]));
    }
    if (rank == 0 && thread() == 0) static_cast<double*>(lse_of(in, index).data)[index] = lse_of_row(in, all);
  }

  __device__ __forceinline__ void store_sums(Mine& mine, const Segment<ROWS>& segment, int slot,
                                             int my_row) const {
    const int g = lane() >> 2;
    float* const to = (segment.flags & SEGMENT_UNIT_BEGIN ? parts.firsts + segment.rows[my_row].index * in.d
                                                          : parts.sums + (team * ROWS + my_row) * in.d) +
                      offset + g;
    const bool joins = !(segment.flags & SEGMENT_PART_BEGIN);
    if (joins) {
      const float before = static_cast<float>(shared().ends[slot][my_row].before),
                  now = static_cast<float>(shared().ends[slot][my_row].now);
#pragma unroll
      for (int q = 0; q < CHUNKS; ++q) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int e = 32 * chunk(q) + 8 * k;
          if (e < length) mine.sum[q][k] = fmaf(before, __ldcg(to + e), now * mine.sum[q][k]);
        }
      }
    }
    if constexpr (FULL) {
      const ProductsEnd& end = shared().ends[slot][my_row];
      if (ends_here(segment) && end.ends) end_row(mine, segment.rows[my_row], end.part.total);
    }
    float* there = to;
    if (PARTS && goes_straight(segment, slot, my_row)) {
      const RowState& row = segment.rows[my_row];
      there = static_cast<float*>(row.out) + row.index * in.d + offset + g;
      const double exact = 1 / shared().ends[slot][my_row].part.total;
      const float by = static_cast<float>(exact), rest = static_cast<float>(exact - by);
#pragma unroll
      for (int q = 0; q < CHUNKS; ++q) {
#pragma unroll
        for (int k = 0; k < 4; ++k) mine.sum[q][k] = fmaf(by, mine.sum[q][k], rest * mine.sum[q][k]);
      }
    }
#pragma unroll
    for (int q = 0; q < CHUNKS; ++q) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int e = 32 * chunk(q) + 8 * k;
        if (e < length) __stcg(there + e, mine.sum[q][k]);
      }
    }
  }

  // From a row's sums to its result a x + by sum; a and by are two values of float32 each.
  __device__ __forceinline__ void end_row(Mine& mine, const RowState& row, double total) const {
    const int g = lane() >> 2;
    const float* const from = static_cast<const float*>(row.x) + row.index * in.d + offset + g;
    const double exact = row.b / total;
    const float a = static_cast<float>(row.a), rest_of_a = static_cast<float>(row.a - a);
    const float by = static_cast<float>(exact), rest_of_by = static_cast<float>(exact - by);
#pragma unroll
    for (int q = 0; q < CHUNKS; ++q) {
      float x[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int e = 32 * chunk(q) + 8 * k;
        x[k] = e < length ? from[e] : 0;
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float sum = mine.sum[q][k], product = by * sum;
        const float rest = fmaf(rest_of_a, x[k], fmaf(rest_of_by, sum, fmaf(by, sum, -product)));
        mine.sum[q][k] = fmaf(a, x[k], product) + rest;
      }
    }
  }

  // Of the ring: a stage, where it is from the first, and the parity of its phase.
  struct Place {
    int stage = 0, offset = 0, phase = 0;

    __device__ __forceinline__ void advance() {
      ++stage, offset += TILE_BYTES;
      if (stage == STAGES) stage = offset = 0, phase ^= 1;
    }
  };

  __device__ __forceinline__ void await(const Place& at) const {
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) wait_barrier(&shared().full[at.stage][piece], at.phase);
  }

  __device__ __forceinline__ void consume() const {
    // Where this lane reads of a tile: for scores, 16 bytes of each chunk; for sums, see load_transposed.
    const uint32_t ring = shared_address(stage(0)) + 64 * warp();
    const uint32_t to_scores = ring + stored(lane() >> 2) * REF_BYTES + 16 * (lane() & 3);
    const uint32_t to_sums = ring + stored(lane() & 7) * REF_BYTES + 16 * (lane() >> 3);
    Place scored, added;
    int slot = 0, slot_phase = 0;
    int scores = 0, weights = 0;  // tiles so far, of which two are told apart
    bool awaits = PARTS && parts.home.awaits_x;
    if (PARTS && thread() == 0) shared().late = NO_ROW;
    // While there is no segment, the code of a segment's beginning runs once for nothing: it is long, and
    // where it has to come from memory, it would wait there behind the copies.
    int rehearses = 1;
    for (;;) {
      asm volatile("" : "+r"(rehearses));  // one code for both
      const Segment<ROWS>& segment = shared().announced.segments[slot];
      if (!rehearses) {
        wait_barrier(&shared().announced.placed[slot], slot_phase);
        if (segment.flags & SEGMENT_LIST_DONE) break;
      }
      if (PARTS && !rehearses && awaits && has_rows_of_another(segment))
        await_rows(in, parts.home), awaits = false;
      const int rows = segment.count, references = segment.references;
      Mine mine;
      begin_segment(mine, segment, slot, slot_phase, rehearses);
      if (rehearses) {
        rehearses = 0;
        continue;
      }
      int to_score = references, to_add = references;  // references left
#pragma unroll 1
      while (to_add > 0) {  // scores are a tile ahead
        const int ahead = to_add - to_score;
        if (to_score > 0 && (ahead == 0 || ahead == TR)) {
          await(scored);
          score_tile(mine, to_scores + scored.offset, rows, scores & 1, to_score == references, slot);
          if (lane() == 0) arrive(&shared().given[scores & 1]);
          scored.advance(), ++scores;
          to_score -= TR;
        } else {
          wait_barrier(&shared().weighed[weights & 1], weights >> 1 & 1);
          add_tile(mine, to_sums + added.offset, min(to_add, TR), weights & 1);
          __syncwarp();
          if (lane() == 0) arrive(&shared().empty[added.stage]);
          added.advance(), ++weights;
          to_add -= TR;
        }
      }
      if (references == 0) {  // a tile that holds none
        await(scored);
        __syncwarp();
        if (lane() == 0) arrive(&shared().empty[added.stage]);
        scored.advance(), added.advance();
      }
      if (waits_for_end(segment)) wait_barrier(&shared().settled[slot], slot_phase);
      end_segment(mine, segment, slot);
      __syncwarp();
      if (lane() == 0) arrive(&shared().announced.done[slot]);
      if (++slot == SEGMENT_SLOTS) slot = 0, slot_phase ^= 1;
    }
  }
};

// DEAL: see Ranges.
template <typename T, int CONSUMERS, int CHUNKS, int BLOCKS, bool CLUSTERED, bool PARTS, bool DEAL, int ROWS>
__global__ void __launch_bounds__(CONSUMERS + BULK_PRODUCERS, products_resident(CONSUMERS))
    products_kernel(const __grid_constant__ Inputs in, const __grid_constant__ UnitList shared_list,
                    const __grid_constant__ ProductsParts parts,
                    const __grid_constant__ ProductsLayout layout) {
  using Kernel = Products<T, CONSUMERS, CHUNKS, BLOCKS, CLUSTERED, PARTS, ROWS>;
  typename Kernel::Shared& shared = Kernel::shared();
  UnitList list = shared_list;
  int staging = Kernel::fixed_bytes(layout.slices);
  if (layout.own_list) {
    list = place_unit_list(Kernel::memory() + staging, in.n, in.k, shared_list.costs);
    staging += static_cast<int>(bulk_list_smem(in.n, in.k));
  }
  const Kernel kernel{in, list, parts, layout, staging};
  const int tid = threadIdx.x - CONSUMERS, lane = threadIdx.x % 32;
  ListScratch* const scratch = reinterpret_cast<ListScratch*>(Kernel::memory() + staging);  // before copies
  if (!PARTS) allow_next_launch();
  if (layout.own_list) read_rows(in, *scratch);
  if (layout.own_list && !PARTS && tid == 96) prefetch_share(in);
  if (tid == 0) {
#pragma unroll 1
    for (int s = 0; s < Kernel::STAGES; ++s) {
#pragma unroll
      for (int piece = 0; piece < Kernel::PIECES; ++piece) init_barrier(&shared.full[s][piece], 1);
      init_barrier(&shared.empty[s], Kernel::WARPS);
    }
    shared.announced.init(Kernel::WARPS + (CLUSTERED ? 2 : 1));
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      init_barrier(&shared.given[i], Kernel::WARPS);
      init_barrier(&shared.weighed[i], 1);
    }
    init_barrier(&shared.asked, 1);
    init_barrier(&shared.answered, 1);
#pragma unroll 1
    for (int s = 0; s < SEGMENT_SLOTS; ++s) init_barrier(&shared.settled[s], 1);
    if constexpr (CLUSTERED) {
#pragma unroll 1
      for (int i = 0; i < PRODUCTS_LETTERS; ++i) init_barrier(&shared.mail.arrived[i], 1);
    }
    publish_barriers();
  }
  __syncthreads();
  if constexpr (CLUSTERED) meet_cluster();
  if (tid < 0) {
    take_registers<Kernel::RESIDENT == 1 ? PRODUCTS_CONSUMER_REGISTERS : PRODUCTS_PAIRED_REGISTERS>();
    if (layout.own_list && threadIdx.x < BULK_PRODUCERS)
      prefetch_references<Kernel::EARLY_BYTES>(in, *scratch, kernel.place(), kernel.teams, kernel.team,
                                               threadIdx.x);
    kernel.consume();
    if constexpr (PARTS && !CLUSTERED) Kernel::send_late(in, parts, layout);
  } else {
    give_up_registers<PRODUCTS_PRODUCER_REGISTERS>();
    if (layout.own_list) {
      build_own_list<Kernel::TR, ROWS, DEAL>(in, list, *scratch, tid);
    } else {
      if (PARTS && parts.home.labels)
        prefetch_of_own_rows<Kernel::EARLY_BYTES>(in, parts, kernel.place(), kernel.teams, kernel.team, tid);
      wait_for_previous_launch();
      if (PARTS && parts.home.awaits_x && tid < 32) announce_rows(in, parts.home, lane);
      // Not before: end_kernel reads the own rows x when it begins, and the kernel that writes them may go on
      // beside all blocks of this one.
      if (PARTS) allow_next_launch();
    }
    const int ref_bytes = kernel.length * static_cast<int>(sizeof(T));
    if (kernel.length < Kernel::HELD) {  // elements beyond the sample, which no copy writes
#pragma unroll 1
      for (int i = tid; i < Kernel::STAGES * Kernel::TR; i += BULK_PRODUCERS) {
        char* const row = kernel.stage(0) + i * Kernel::REF_BYTES;
        for (int b = ref_bytes; b < Kernel::HELD * static_cast<int>(sizeof(T)); b += 16)
          *reinterpret_cast<uint4*>(row + b) = uint4{0, 0, 0, 0};
      }
      named_barrier(15, BULK_PRODUCERS);
    }
    if (tid < 32) {
      const auto most_tiles = [](int) { return Kernel::SEGMENT_TILES; };
      announce<Kernel::TR, DEAL>(in, list, kernel.place(), kernel.teams, kernel.team, shared.announced,
                                 most_tiles, lane);
    } else if (tid < 64) {
      kernel.produce(lane);
    } else if (tid < 96) {
      kernel.weigh(lane);
    } else {
      const int64_t lanes = 32 * gridDim.x;
      for (int64_t i = list.sizes[1] + 32 * blockIdx.x + lane; i < in.n; i += lanes) {
        const int64_t index = list.order[i];
        parts.rows[index] = {{}, 0, 0, 0, -1, 0};  // nothing to read
        if (PARTS && is_of_another(in, index)) store_as(lse_of(in, index), index, lse_of_nothing(in, index));
      }
      if constexpr (CLUSTERED) {
        kernel.carry_mail(lane);
      } else {
        kernel.answer(lane);
      }
    }
  }
  if constexpr (CLUSTERED) {  // no block leaves while another may write to its shared memory
    __syncwarp();
    meet_cluster();
  }
  if (PARTS && CLUSTERED && Kernel::thread() < CONSUMERS) Kernel::send_late(in, parts, layout);
  if (!PARTS || !parts.home.merged) return;
  Header* const own = reinterpret_cast<Header*>(parts.home.mailbox);
  if (is_last_block(own, gridDim.x, &shared.is_last) && threadIdx.x < in.parts)
    raise_flag(&reinterpret_cast<Header*>(in.mailboxes[threadIdx.x])->done[in.part], own->round);
}

}  // namespace svel::cuda
