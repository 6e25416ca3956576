// One pass over the references of class banks on Hopper's matrix units, for references in float16. A
// multiprocessor has one thread block: one warp, the producer, brings references into a ring in shared memory
// by bulk copies; sixteen warps share a sample, each with chunks of 32 of its elements. A tile of eight
// references, or of eight times BLOCKS, is scored by all warps. One more warp adds up their shares of the
// scores, runs the online softmax and hands weights back, with which they add the tile to the rows, if there
// is anything to add; meanwhile they score the next tile, where it is there. The list of units, the
// announcer, the clerk and the parts of units that several blocks share: as in bulk_groups.cuh.
//
// |r_j|^2 too is the product of a tile with itself: of sixty-four of them eight are wanted.
//
// Rounding. Scores are s_j = rate (x.r_j - alpha/2 |r_j|^2), so that
//   -|x - alpha r_j|^2 / (2 sigma^2) = s_j - |x|^2 / (2 sigma^2).
// References are exact in the matrix units, x is the sum of two values of float16, and so are weights.
// The sums of the matrix units, which round towards zero, are over 64 elements or 8 references. Weights are
// 2^(s_j - top) with an integer `top` that is no smaller than any score.
//
// That has the digits of float32 for values as large as x and r_j. Where that may show in a row, by an
// estimate at the end of a segment, the references that may have weight are evaluated again, in float64
// (`review`): one or a few, where references are far apart beside the noise, as they are at small t.
#pragma once

#include "stable_target/bulk_parts.cuh"

namespace svel::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define SVEL_PRODUCT_ASM(...) asm(__VA_ARGS__)  // may be moved
#else
#define SVEL_PRODUCT_ASM(...)
#endif

// acc += a b, 16 x 8 over 16, or over 8, of float16.
__device__ __forceinline__ void multiply_16(float (&acc)[4], const uint4& a, const uint2& b) {
  SVEL_PRODUCT_ASM(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};" : "+f"(acc[0]),
      "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3]) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}
__device__ __forceinline__ void multiply_8(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  SVEL_PRODUCT_ASM(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(acc[0]),
      "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3]) : "r"(a0), "r"(a1), "r"(b));
}
// Four 8 x 8 matrices, transposed: each lane names a row of 16 bytes.
__device__ __forceinline__ uint4 load_transposed(uint32_t row) {
  uint4 v{0, 0, 0, 0};
  SVEL_HOPPER_ASM("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(v.x),
                  "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(row) : "memory");
  return v;
}

__device__ __forceinline__ uint32_t pair_of(__half a, __half b) {
  return static_cast<uint32_t>(__half_as_ushort(a)) | static_cast<uint32_t>(__half_as_ushort(b)) << 16;
}

// Of the two values of a weight the second is kept larger by this.
constexpr float SPLIT_SCALE = 2048;

// Of a thread: all together no more than at the launch, 96 for each.
constexpr int PRODUCTS_CONSUMER_REGISTERS = 104, PRODUCTS_PRODUCER_REGISTERS = 64;

struct ProductsLayout {
  int stages;       // pieces of a tile that there is room for
  bool own_list;    // each block builds the list of units in its shared memory
  bool merge_last;  // the last block to finish merges; else merge_kernel
};

// 2^-40: eight references whose weights are all below that, beside the best so far, are not added.
constexpr float PRODUCTS_NO_WEIGHT = 9.0949470177292824e-13f;
constexpr int RAISED = 1 << 30;

struct ProductsState {
  double top;         // weights are 2^(score - top)
  float total, rest;  // of the weights; the best score is top - rest
};

template <int TR>
struct ProductsShared {
  static constexpr int ROWS = PRODUCTS_ROWS;
  static constexpr int WARPS = GROUPS_CONSUMERS / 32, PADDED = WARPS + 4;
  Barrier full[PRODUCTS_MAX_STAGES], empty[PRODUCTS_MAX_STAGES];
  Announcements<ROWS> announced;
  // Of a tile; two of each, since a warp adds a tile before it scores the one after the next. All warps have
  // given their shares of the scores; weights are there.
  Barrier given[2], weighed[2];
  alignas(16) float scores[2][ROWS][TR][PADDED];
  uint32_t weights[2][TR / 8][32];  // as the products take them
  int used[2];                      // bit b: block b has weight; RAISED: `top` has grown
  float scales[2][ROWS];            // what it has done to the sums so far
  ProductsState states[2][ROWS];    // after this tile
  float offsets[ROWS][WARPS];  // what scores are relative to: a warp's share of that of the first reference
  float x_squares[ROWS][WARPS],
      r_squares[WARPS];            // of a warp's elements: |x|^2, |r|^2 of the first reference
  double squares[WARPS];           // shares of what is summed in float64
  double shifts[ROWS][WARPS];      // |x|^2 / (2 sigma^2) in units of log 2, of a warp's elements
  float kept[ROWS][SEGMENT_REFS];  // scores of the segment, relative to the first reference's
  double reviewed[SEGMENT_REFS];   // of those that matter, and which these are
  short listed[SEGMENT_REFS];
  int listed_count;
  PartRow moved[ROWS];  // to memory already
  int final;
  Barrier filed, closed;  // a part is in memory; the clerk is done
  int unmerged;           // rows that the clerk has found to be complete
  RowEnd rows_left[ROWS];
};

// CHUNKS of 32 elements for each warp.
template <int CHUNKS>
struct Products {
  static constexpr int THREADS = GROUPS_CONSUMERS, WARPS = THREADS / 32;
  static constexpr int ROWS = PRODUCTS_ROWS;
  static constexpr int BLOCKS = 8 / CHUNKS,
                       TR = 8 * BLOCKS;  // of eight references: a tile has 32,768 elements
  static constexpr int PIECES = 2, PIECE_REFS = TR / PIECES;
  static constexpr int HELD = THREADS * CHUNKS;               // most elements of a sample
  static constexpr int REF_BYTES = products_ref_bytes(HELD);  // in shared memory
  static constexpr int SEGMENT_TILES = SEGMENT_REFS / TR;
  using Shared = ProductsShared<TR>;
  static constexpr int FIXED_BYTES = (sizeof(Shared) + 127) / 128 * 128;
  static constexpr int BEFORE_LIST = FIXED_BYTES + products_sums_smem(HELD);

  const Inputs& in;
  const UnitList& list;
  const BulkParts& parts;
  const ProductsLayout& layout;
  const int staging;  // where the ring begins in shared memory
  const int d = static_cast<int>(in.d);

  __device__ __forceinline__ static char* memory() {
    extern __shared__ __align__(128) char all[];
    return all;
  }
  __device__ __forceinline__ static Shared& shared() { return *reinterpret_cast<Shared*>(memory()); }
  // The sums of a row, all of it, on their way out. (D,)
  __device__ __forceinline__ static float* staged(int row) {
    return reinterpret_cast<float*>(memory() + FIXED_BYTES) + row * HELD;
  }
  // Before that, x as the products take it, of column g where t names the elements: each lane has its own,
  // which need not stay in registers. (CHUNKS, 32) of two words for each warp.
  __device__ __forceinline__ static uint32_t split_x() {
    return shared_address(memory()) + FIXED_BYTES + 8 * (warp() * (CHUNKS * 32) + lane());
  }
  __device__ __forceinline__ char* stage(int s) const {
    return memory() + staging + s * (PIECE_REFS * REF_BYTES);
  }
  __device__ __forceinline__ RowPlace place() const { return {1, 0, ROWS, in.d, 0, d, true}; }
  __device__ __forceinline__ static void barrier() { named_barrier(1, THREADS); }

  // The producer, one warp: each lane copies one reference of a piece.
  __device__ __forceinline__ void produce(int lane) const {
    const int ref_bytes = d * static_cast<int>(sizeof(__half));
    int s = 0, phase = 1, slot = 0, slot_phase = 0;
    for (;;) {
      wait_barrier(&shared().announced.placed[slot], slot_phase);
      const Segment<ROWS>& segment = shared().announced.segments[slot];
      if (segment.flags & SEGMENT_LIST_DONE) return;
      const uint64_t policy = segment.alone ? read_once_policy() : usual_policy();
      const char* from =
          static_cast<const char*>(in.refs.data) + (segment.first + lane) * in.d * sizeof(__half);
      int left = segment.references;
      for (int pieces = segment.tiles * PIECES; pieces > 0; --pieces) {
        Barrier* const full = &shared().full[s];
        const int many = max(min(left, PIECE_REFS), 0);
        wait_barrier(&shared().empty[s], phase);
        if (lane == 0) {
          if (many > 0) {
            arrive_expecting(full, many * ref_bytes);
          } else {
            arrive(full);
          }
        }
        __syncwarp();
        if (lane < many) bulk_copy(stage(s) + lane * REF_BYTES, from, ref_bytes, full, policy);
        from += static_cast<int64_t>(PIECE_REFS) * ref_bytes, left -= PIECE_REFS;
        if (++s == layout.stages) s = 0, phase ^= 1;
      }
      __syncwarp();
      if (++slot == SEGMENT_SLOTS) slot = 0, slot_phase ^= 1;
    }
  }

  // The consumers. Lanes of a warp: 4 g + t. As in the matrix units: of references, lane (g, t) holds
  // elements 8 t to 8 t + 7 of a chunk of reference `logical` g; words 0 and 2 of these four are part 0 of
  // the elements, words 1 and 3 part 1, and a product multiplies both parts with columns of their own: column
  // = 4 part + 2 row + split.
  struct Mine {
    float sum[CHUNKS][4];  // of the column's row, elements g, g + 8, g + 16, g + 24 of a chunk; t: see column
    float unscale, half_alpha, offset;  // of row t & 1: 1 / what x was multiplied by
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

  // Where a reference of the tile that begins at stage s is; those beyond the tile's `many` are the first.
  __device__ __forceinline__ uint32_t reference(int s, int index, int many) const {
    index = index < many ? index : 0;
    int at = s + static_cast<int>(static_cast<unsigned>(index) / PIECE_REFS);
    if (at >= layout.stages) at -= layout.stages;
    return shared_address(memory()) + staging + at * (PIECE_REFS * REF_BYTES) +
           (index & (PIECE_REFS - 1)) * REF_BYTES;
  }

  // x of the rows of the unit, split.
  __device__ __forceinline__ void begin_segment(Mine& mine, const Segment<ROWS>& segment) const {
    const int column = lane() >> 2, t = lane() & 3, part = column >> 2;
    const int my_row = column / 2 % 2, split = column % 2;
    const bool present = my_row < segment.count;
    const RowState& row = segment.rows[present ? my_row : 0];
    const float* const from = static_cast<const float*>(row.x) + row.index * in.d + 8 * t + 2 * part;
    float2 x[CHUNKS][2];
#pragma unroll
    for (int q = 0; q < CHUNKS; ++q) {
      const int first = 32 * chunk(q);
      const bool within = present && first + 8 * t < d;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        x[q][h] = within ? *reinterpret_cast<const float2*>(from + first + 4 * h) : make_float2(0, 0);
    }
    float largest = 0, square = 0;
#pragma unroll
    for (int q = 0; q < CHUNKS; ++q) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        largest = fmaxf(largest, fmaxf(fabsf(x[q][h].x), fabsf(x[q][h].y)));
        square = fmaf(x[q][h].x, x[q][h].x, fmaf(x[q][h].y, x[q][h].y, square));
      }
    }
#pragma unroll
    for (int hop : {1, 2, 16}) {  // lanes with the row's other elements
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, hop));
      square += __shfl_xor_sync(0xffffffffu, square, hop);
    }
    const bool leads = split == 0 && part == 0 && t == 0 && present;
    if (leads) shared().x_squares[my_row][warp()] = square;
    if (segment.squares) {
      double exact = 0;
#pragma unroll
      for (int q = 0; q < CHUNKS; ++q) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const double a = x[q][h].x, b = x[q][h].y;
          exact = fma(a, a, fma(b, b, exact));
        }
      }
#pragma unroll
      for (int hop : {1, 2, 16}) exact += __shfl_xor_sync(0xffffffffu, exact, hop);
      if (leads) shared().shifts[my_row][warp()] = row.per_square * exact;
    }
    // The largest to below 2^15.
    const int exponent = largest > 0 && largest < INFINITY ? ilogbf(largest) : 0;
    const float scale = row.sign * ldexpf(1.0f, min(max(14 - exponent, -100), 100));
#pragma unroll
    for (int q = 0; q < CHUNKS; ++q) {
      uint32_t words[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float a = x[q][h].x * scale, b = x[q][h].y * scale;
        if (split == 1) a -= __half2float(__float2half_rn(a)), b -= __half2float(__float2half_rn(b));
        words[h] = pair_of(__float2half_rn(a), __float2half_rn(b));
      }
      store_shared(split_x() + 256 * q, make_uint2(words[0], words[1]));
#pragma unroll
      for (int k = 0; k < 4; ++k) mine.sum[q][k] = 0;
    }
    // Of the rows whose scores this lane will have.
    mine.unscale = __shfl_sync(0xffffffffu, fabsf(1 / scale), (lane() & 1) << 3);
    mine.half_alpha = segment.rows[min(lane() & 1, segment.count - 1)].half_alpha;
  }

  // Shares of the scores of eight references, to shared memory.
  __device__ __forceinline__ void score_block(Mine& mine, uint32_t refs, int block, int parity, bool first,
                                              int rows) const {
    const int g = lane() >> 2, t = lane() & 3;
    float norms[2] = {}, dots[4] = {};
    constexpr int CHAIN = CHUNKS < 4 ? CHUNKS : 4;
#pragma unroll
    for (int from = 0; from < CHUNKS; from += CHAIN) {
      float product[4] = {}, first_part[4] = {}, second_part[4] = {};
#pragma unroll
      for (int q = from; q < from + CHAIN; ++q) {
        const uint4 raw = load_shared_16(refs + WARPS * 64 * q);
        multiply_16(product, raw, load_shared_8(split_x() + 256 * q));
        multiply_8(first_part, raw.x, raw.y, raw.x), multiply_8(second_part, raw.x, raw.y, raw.y);
        multiply_8(first_part, raw.z, raw.w, raw.z), multiply_8(second_part, raw.z, raw.w, raw.w);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) dots[k] += product[k];
#pragma unroll
      for (int k = 0; k < 2; ++k) norms[k] += first_part[k] + second_part[2 + k];
    }
    // Of the products, lane (g, t) has columns 2 t and 2 t + 1 of reference g, of part 0 and of part 1: of x,
    // or of the references, where it wants that of reference g itself.
    const float norm = __shfl_sync(0xffffffffu, g & 1 ? norms[1] : norms[0], (lane() & ~3) | g >> 1);
    float dot = t < 2 ? dots[0] + dots[1] : dots[2] + dots[3];
    dot += __shfl_xor_sync(0xffffffffu, dot, 2);
    const float share = fmaf(dot, mine.unscale, -mine.half_alpha * norm);
    if (first && block == 0) {
      mine.offset = __shfl_sync(0xffffffffu, share, t);
      if (lane() < rows) shared().offsets[t][warp()] = share;
      if (lane() == 3) shared().r_squares[warp()] = norm;
    }
    if (t < rows) shared().scores[parity][t][8 * block + g][warp()] = share - mine.offset;
  }

  // The softmax, one warp. Lanes: row lane / 8 and reference lane % 8 of a block, with several lanes for
  // each, which add up some warps' shares.
  __device__ __forceinline__ void weigh(int lane) const {
    constexpr int LANES = 4 / ROWS, EACH = WARPS / LANES;
    const int my_row = lane / 8 % ROWS, n = lane % 8, lanes_part = lane / 8 / ROWS;
    int slot = 0, slot_phase = 0, parity = 0, phases = 0;
    for (;;) {
      wait_barrier(&shared().announced.told[slot], slot_phase);
      const Segment<ROWS>& segment = shared().announced.segments[slot];
      if (segment.flags & SEGMENT_LIST_DONE) return;
      const bool present = my_row < segment.count;
      RowScores my;
      my.rate = segment.rows[present ? my_row : 0].rate;
      my.reset();
#pragma unroll 1
      for (int left = segment.references; left > 0; left -= TR) {
        wait_barrier(&shared().given[parity], phases >> parity & 1);
        phases ^= 1 << parity;
        float scores[BLOCKS], best = -INFINITY;
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
          const float* const from = &shared().scores[parity][my_row][8 * b + n][lanes_part * EACH];
          float sum = 0;
#pragma unroll
          for (int w = 0; w < EACH; w += 4) {
            const float4 four = *reinterpret_cast<const float4*>(from + w);
            sum += (four.x + four.y) + (four.z + four.w);
          }
#pragma unroll
          for (int hop = 8 * ROWS; hop < 32; hop *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, hop);
          scores[b] = present && 8 * b + stored(n) < left ? sum : -INFINITY;
          if (lane < 8 * ROWS && 8 * b + stored(n) < left)
            shared().kept[my_row][segment.references - left + 8 * b + stored(n)] = scores[b];
          best = fmaxf(best, scores[b]);
        }
#pragma unroll
        for (int hop = 4; hop > 0; hop /= 2) best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, hop));
        int used = 0;
        if (__any_sync(0xffffffffu, best > my.base)) {  // rarely, after the first tiles
          float scale = 1;
          if (best > my.base) {
            const double bound = static_cast<double>(best) * my.rate, top = fmax(ceil(bound), my.top);
            scale = power_of_two(my.top - top);
            my.base = best, my.rest = static_cast<float>(top - bound), my.top = top, my.total *= scale;
          }
          used = RAISED;
          if (n == 0) shared().scales[parity][my_row] = scale;
        }
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
          const bool counts = present && 8 * b + stored(n) < left;
          const float weight = counts ? power_of_two(fmaf(scores[b] - my.base, my.rate, -my.rest)) : 0.0f;
          if (!__any_sync(0xffffffffu, !(weight < PRODUCTS_NO_WEIGHT))) continue;
          used |= 1 << b;
          my.total += hand_out(weight, parity, b, lane);
        }
        if (lane % 8 == 0 && lane < 8 * ROWS) shared().states[parity][my_row] = {my.top, my.total, my.rest};
        if (lane == 0) shared().used[parity] = used;
        __syncwarp();
        if (lane == 0) arrive(&shared().weighed[parity]);
        parity ^= 1;
      }
      __syncwarp();
      if (lane == 0) arrive(&shared().announced.done[slot]);
      if (++slot == SEGMENT_SLOTS) slot = 0, slot_phase ^= 1;
    }
  }

  // A weight as the sum of two values of float16: what the products see. Value `split` of them.
  __device__ __forceinline__ static __half split_weight(float weight, int split) {
    const __half high = __float2half_rn(weight);
    return split == 0 ? high : __float2half_rn((weight - __half2float(high)) * SPLIT_SCALE);
  }

  // The weights of a block for the products; returns their sum over the row's eight references.
  __device__ __forceinline__ float hand_out(float weight, int parity, int block, int lane) const {
    const int g = lane / 4, t = lane % 4, row = g / 2 % 2, split = g % 2;
    float seen =
        fmaf(__half2float(split_weight(weight, 1)), 1 / SPLIT_SCALE, __half2float(split_weight(weight, 0)));
#pragma unroll
    for (int hop = 4; hop > 0; hop /= 2) seen += __shfl_xor_sync(0xffffffffu, seen, hop);
    const float a = __shfl_sync(0xffffffffu, weight, 8 * row + 2 * t);
    const float b = __shfl_sync(0xffffffffu, weight, 8 * row + 2 * t + 1);
    shared().weights[parity][block][lane] =
        g < 4 ? pair_of(split_weight(a, split), split_weight(b, split)) : 0;
    return seen;
  }

  __device__ __forceinline__ void add_block(Mine& mine, uint32_t refs, uint32_t weights) const {
#pragma unroll
    for (int q = 0; q < CHUNKS; ++q) {
      if (q % 2 == 0) __syncwarp();  // no more loads in flight than there are registers for
      const uint4 four = load_transposed(refs + WARPS * 64 * q);
      float low[4] = {}, high[4] = {};
      multiply_8(low, four.x, four.y, weights);
      multiply_8(high, four.z, four.w, weights);
      mine.sum[q][0] = fmaf(low[1], 1 / SPLIT_SCALE, mine.sum[q][0]) + low[0];
      mine.sum[q][1] = fmaf(low[3], 1 / SPLIT_SCALE, mine.sum[q][1]) + low[2];
      mine.sum[q][2] = fmaf(high[1], 1 / SPLIT_SCALE, mine.sum[q][2]) + high[0];
      mine.sum[q][3] = fmaf(high[3], 1 / SPLIT_SCALE, mine.sum[q][3]) + high[2];
    }
  }

  // A tile of `many` references that begins at stage s.
  __device__ __forceinline__ void score_tile(Mine& mine, int s, int many, int rows, int parity,
                                             bool first) const {
    const int g = lane() >> 2, t = lane() & 3;
#pragma unroll 1
    for (int block = 0; block < BLOCKS; ++block)
      score_block(mine, reference(s, 8 * block + stored(g), many) + 64 * warp() + 16 * t, block, parity,
                  first, rows);
    __syncwarp();
    if (lane() == 0) arrive(&shared().given[parity]);
  }
  __device__ __forceinline__ void add_tile(Mine& mine, int s, int many, int parity) const {
    const int used = shared().used[parity];
    if (used & RAISED) {
      const float scale = shared().scales[parity][lane() & 1];
#pragma unroll
      for (int q = 0; q < CHUNKS; ++q) {
#pragma unroll
        for (int k = 0; k < 4; ++k) mine.sum[q][k] *= scale;
      }
    }
    if (!(used & ~RAISED)) return;
#pragma unroll 1
    for (int block = 0; block < BLOCKS; ++block) {
      if (used >> block & 1)
        add_block(mine, reference(s, 8 * block + stored(lane() & 7), many) + 64 * warp() + 16 * (lane() >> 3),
                  shared().weights[parity][block][lane()]);
    }
  }

  __device__ __forceinline__ void release(int s) const {  // the pieces of a tile
    __syncwarp();
    if (lane() < PIECES) {
      int at = s + lane();
      if (at >= layout.stages) at -= layout.stages;
      arrive(&shared().empty[at]);
    }
  }

  __device__ __forceinline__ double sum_over_block(double share) const {
    share = warp_sum(share);
    barrier();  // what was there before is read
    if (lane() == 0) shared().squares[warp()] = share;
    barrier();
    double all = 0;
#pragma unroll 1
    for (int w = 0; w < WARPS; ++w) all += shared().squares[w];
    return all;
  }

  // What one row has at the end of a segment: weights are 2^(score - top); `staged` has the weighted sums of
  // the references, or where the row was reviewed of their differences from the segment's first.
  struct RowSums {
    double top, total;
    bool reviewed;
  };

  // How far below the best score, in units of log 2, references have to be evaluated again; negative: none
  // has. A score is wrong by 2^-22 |x_i r_i| for each element, at random, and by the rounding of a warp's
  // share of it. That matters where several references have weight, here or in other blocks, which are then
  // about sigma / alpha apart: what it makes of the mean, beside the result's size.
  __device__ __forceinline__ float doubt(const RowState& row, int my_row) const {
    const int w = lane() % WARPS;
    const float x = shared().x_squares[my_row][w], r = shared().r_squares[w],
                half = 0.25f * row.half_alpha * r;
    const float square = 0.5f * warp_sum(fmaf(half, half, x * r * (1.0f / (32 * CHUNKS))));
    const float norm = 0.5f * warp_sum(r);  // two lanes for each warp
    const float deviation = 0x1p-22f * sqrtf(square);
    const double sigma = sqrt(LOG2_E / (2 * row.per_square));
    const double of_noise = row.a * sigma, of_data = fma(row.a, row.alpha, row.b);
    double size = of_noise * of_noise * d + of_data * of_data * norm;
    if (in.lse.data)  // the mean may become any prediction: itself, the velocity, the noise
      size = fmin(norm, sigma * sigma * fmin(d + norm, d / (row.alpha * row.alpha)));
    const double error = fabs(row.b) * deviation / sigma;
    if (error <= MOST_ERROR * sqrt(size)) return -1;
    return 36 + 8 * deviation * row.rate;  // weights below 2^-36, and errors
  }
  static constexpr double MOST_ERROR = 1e-6;

  // Four elements of the segment's first reference from e on, in float32.
  __device__ __forceinline__ float4 load_first(const Segment<ROWS>& segment, int e) const {
    const __half* const from = static_cast<const __half*>(in.refs.data) + segment.first * in.d + e;
    return make_float4(__half2float(from[0]), __half2float(from[1]), __half2float(from[2]),
                       __half2float(from[3]));
  }

  // The row once more, from memory and with all digits: the references that may have weight.
  __device__ __forceinline__ RowSums review(const Segment<ROWS>& segment, int my_row, float margin) const {
    const RowState& row = segment.rows[my_row];
    const __half* const refs = static_cast<const __half*>(in.refs.data) + segment.first * in.d;
    double* const scores = shared().reviewed;
    const double rate = row.exact_rate();
    barrier();  // what is staged is overwritten
    if (warp() == 0) {
      const float* const kept = shared().kept[my_row];
      float best = -INFINITY;
#pragma unroll 1
      for (int j = lane(); j < segment.references; j += 32) best = fmaxf(best, kept[j]);
#pragma unroll
      for (int hop = 16; hop > 0; hop /= 2) best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, hop));
      int count = 0;
#pragma unroll 1
      for (int first = 0; first < segment.references; first += 32) {
        const int j = first + lane();
        const bool matters = j < segment.references && !((best - kept[j]) * row.rate > margin);  // NaN too
        const unsigned all = __ballot_sync(0xffffffffu, matters);
        if (matters) shared().listed[count + __popc(all & ((1u << lane()) - 1))] = static_cast<short>(j);
        count += __popc(all);
      }
      if (lane() == 0) shared().listed_count = count;
    }
    barrier();
    const int references = shared().listed_count;
#pragma unroll 1
    for (int i = warp(); i < references; i += WARPS) {
      const __half* const from = refs + int64_t{shared().listed[i]} * d;
      double share = 0;
#pragma unroll 4
      for (int e = 2 * lane(); e < d; e += 64) {
        const float2 x =
            *reinterpret_cast<const float2*>(static_cast<const float*>(row.x) + row.index * in.d + e);
        const double a = __half2float(from[e]), b = __half2float(from[e + 1]);
        share = fma(fma(-0.5 * row.alpha, a, static_cast<double>(row.sign * x.x)), a, share);
        share = fma(fma(-0.5 * row.alpha, b, static_cast<double>(row.sign * x.y)), b, share);
      }
      share = warp_sum(share);
      if (lane() == 0) scores[i] = share * rate;
    }
    barrier();
    double best = -INFINITY, total = 0;
#pragma unroll 1
    for (int j = 0; j < references; ++j) best = scores[j] > best ? scores[j] : best;
    const double top = ceil(best);
    barrier();
#pragma unroll 1
    for (int j = thread(); j < references; j += THREADS) scores[j] = power(scores[j] - top);
    barrier();
#pragma unroll 1
    for (int j = 0; j < references; ++j) total += scores[j];
#pragma unroll 1
    for (int e = 4 * thread(); e < d; e += 4 * THREADS) {
      const float4 c = load_first(segment, e);
      const float centre[4] = {c.x, c.y, c.z, c.w};
      double sums[4] = {};
#pragma unroll 1
      for (int j = 0; j < references; ++j) {
        const __half* const from = refs + int64_t{shared().listed[j]} * d + e;
#pragma unroll
        for (int k = 0; k < 4; ++k)
          sums[k] = fma(scores[j], static_cast<double>(__half2float(from[k]) - centre[k]), sums[k]);
      }
      *reinterpret_cast<float4*>(staged(my_row) + e) =
          make_float4(static_cast<float>(sums[0]), static_cast<float>(sums[1]), static_cast<float>(sums[2]),
                      static_cast<float>(sums[3]));
    }
    return {top, total, true};
  }

  // The rows' sums from the warps' registers.
  __device__ __forceinline__ void stage_sums(const Mine& mine, int rows) const {
    const int g = lane() >> 2, t = lane() & 3;
#pragma unroll
    for (int q = 0; q < CHUNKS; ++q) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int e = 32 * chunk(q) + 8 * k + g;
        if (t < rows && e < d) staged(t)[e] = mine.sum[q][k];
      }
    }
  }

  // The weight of the row's own source, relative to `sums.top`, which grows where it has to.
  __device__ __forceinline__ double weigh_own_source(const RowState& row, RowSums& sums,
                                                     double& scale) const {
    double share = 0;
#pragma unroll 1
    for (int e = 4 * thread(); e < d; e += 4 * THREADS) {
      const float4 x = load_four(in, place(), in.x, row.index, e);
      const float4 source = load_four(in, place(), in.source, row.index, e);
      const float signed_x[4] = {row.sign * x.x, row.sign * x.y, row.sign * x.z, row.sign * x.w};
      const float values[4] = {source.x, source.y, source.z, source.w};
      share += score_source(row, signed_x, values);
    }
    const double bound = sum_over_block(share) * row.exact_rate();
    if (bound > sums.top) {
      scale = power(sums.top - bound);
      sums.top = bound, sums.total *= scale;
    }
    return power(bound - sums.top);
  }

  // A segment's sums, `last` of the parity of its last tile, to the rows' results or to their parts in
  // memory.
  __device__ __forceinline__ void end_segment(const Mine& mine, const Segment<ROWS>& segment,
                                              int last) const {
    const int flags = segment.flags, others = segment.to - segment.from;
    const RowPlace here = place();
    const bool whole = flags & SEGMENT_PART_END && others == 0;
    stage_sums(mine, segment.count);
#pragma unroll 1
    for (int r = 0; r < segment.count; ++r) {
      const RowState& row = segment.rows[r];
      float4 x[HELD / (4 * THREADS)];
      if (whole) {  // on their way meanwhile
#pragma unroll
        for (int i = 0; i < HELD / (4 * THREADS); ++i) {
          const int e = 4 * thread() + i * 4 * THREADS;
          if (e < d) x[i] = load_x(in, here, row, e);
        }
      }
      RowSums sums{-INFINITY, 0, false};
      if (segment.references > 0) {
        const ProductsState state = shared().states[last][r];
        const float margin = doubt(row, r);
        if (margin >= 0) {
          sums = review(segment, r, margin);
        } else {
          const double offset = 0.5 * warp_sum(static_cast<double>(shared().offsets[r][lane() % WARPS]));
          sums.top = fma(row.exact_rate(), offset, state.top), sums.total = state.total;
        }
      }
      double source = 0, shift = 0;
      double scale = 1;
      if (in.source.data && flags & SEGMENT_UNIT_END) source = weigh_own_source(row, sums, scale);
      if (segment.squares) shift = 0.5 * warp_sum(shared().shifts[r][lane() % WARPS]);
      const int64_t part = here.part_of(blockIdx.x, flags & SEGMENT_UNIT_BEGIN, r);
      double* const to = parts.sums + part * d;
      RowEnd end{row.index,  row.out, r,     segment.from,
                 segment.to, row.a,   row.b, {sums.top - shift, sums.total + source}};
      double by = 1, before = 0;
      if (!(flags & SEGMENT_PART_BEGIN)) {
        const PartRow moved = shared().moved[r];
        const double now = end.own.log2_weight, most = moved.log2_weight >= now ? moved.log2_weight : now;
        before = power(moved.log2_weight - most), by = power(now - most);
        end.own = {most, fma(before, moved.total, by * end.own.total)};
      }
      const double mean_by = 1 / end.own.total, centred = sums.reviewed ? by * sums.total : 0;
      const double scaled = by * scale;
      barrier();
#pragma unroll
      for (int i = 0; i < HELD / (4 * THREADS); ++i) {
        const int e = 4 * thread() + i * 4 * THREADS;
        if (e >= d) continue;
        const float4 sum = *reinterpret_cast<const float4*>(staged(r) + e);
        double v[4] = {scaled * sum.x, scaled * sum.y, scaled * sum.z, scaled * sum.w};
        if (sums.reviewed) {
          const float4 c = load_first(segment, e);
          v[0] = fma(centred, c.x, v[0]), v[1] = fma(centred, c.y, v[1]);
          v[2] = fma(centred, c.z, v[2]), v[3] = fma(centred, c.w, v[3]);
        }
        add_source(in, here, row.index, e, by * source, v);
        if (!(flags & SEGMENT_PART_BEGIN)) add_sums(to + e, before, v);
        if (whole) {
          store_row(in, here, end, e, mean_by, x[i], v);
        } else {
          store_sums(to + e, v);
        }
      }
      if (thread() == 0 && flags & SEGMENT_PART_END && !whole) parts.rows[part] = end.own;
      barrier();
      if (thread() == 0) shared().moved[r] = end.own;
      if (whole && in.lse.data && thread() == 0) write_lse(in, end.index, end.own);
      if (whole || !(flags & SEGMENT_PART_END) || is_filed(segment) || !layout.merge_last) continue;
      if (thread() == 0) shared().final = count_part(parts, segment, r);
      barrier();
      if (shared().final) merge(end);
    }
    if (is_filed(segment)) {
      __syncwarp();
      if (lane() == 0) arrive(&shared().filed);
    }
  }

  // The row's result from its parts.
  __device__ __forceinline__ void merge(const RowEnd& end) const {
    merge_row<THREADS>(in, parts, place(), end, nullptr, [] { return thread(); });
  }

  // Of the ring: the stage where a tile begins, and the parity of its phase.
  struct Place {
    int stage, phase;
  };
  __device__ __forceinline__ void advance(Place& at) const {
    at.stage += PIECES;
    if (at.stage >= layout.stages) at.stage -= layout.stages, at.phase ^= 1;
  }
  // Of the last piece of a tile; copies arrive in their order, or nearly.
  __device__ __forceinline__ bool is_there(const Place& at) const {
    const int s = at.stage + PIECES - 1;
    const bool wraps = s >= layout.stages;
    return has_passed(&shared().full[wraps ? s - layout.stages : s], wraps ? at.phase ^ 1 : at.phase);
  }
  __device__ __forceinline__ void await(const Place& at) const {
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
      const int s = at.stage + piece;
      const bool wraps = s >= layout.stages;
      wait_barrier(&shared().full[wraps ? s - layout.stages : s], wraps ? at.phase ^ 1 : at.phase);
    }
  }

  __device__ __forceinline__ void consume() const {
    Place scored{0, 0}, added{0, 0};
    int slot = 0, slot_phase = 0, parity = 0,
        phases = 0;  // parity: of the next tile to add; phases: a bit each
    for (;;) {
      wait_barrier(&shared().announced.told[slot], slot_phase);
      const Segment<ROWS>& segment = shared().announced.segments[slot];
      if (segment.flags & SEGMENT_LIST_DONE) break;
      const int rows = segment.count, references = segment.references;
      Mine mine;
      begin_segment(mine, segment);
      if (references > 0) {
        int to_score = references, to_add = references;  // references left
#pragma unroll 1
        while (to_add > 0) {
          const int ahead = to_add - to_score;  // at most two tiles
          bool score = to_score > 0 && ahead < 2 * TR;
          if (score && ahead > 0) score = __all_sync(0xffffffffu, is_there(scored));
          if (score) {
            await(scored);
            score_tile(mine, scored.stage, min(to_score, TR), rows, parity ^ (ahead > 0),
                       to_score == references);
            advance(scored);
            to_score -= TR;
          } else {
            wait_barrier(&shared().weighed[parity], phases >> parity & 1);
            phases ^= 1 << parity;
            add_tile(mine, added.stage, min(to_add, TR), parity);
            release(added.stage);
            advance(added);
            to_add -= TR;
            parity ^= 1;
          }
        }
      } else {  // a tile that holds none
        await(scored);
        release(scored.stage);
        advance(scored), advance(added);
      }
      end_segment(mine, segment, parity ^ 1);
      __syncwarp();
      if (lane() == 0) arrive(&shared().announced.done[slot]);
      if (++slot == SEGMENT_SLOTS) slot = 0, slot_phase ^= 1;
    }
    wait_barrier(&shared().closed, 0);
#pragma unroll 1
    for (int i = 0; i < shared().unmerged; ++i) merge(shared().rows_left[i]);
    write_dead_rows(in, list, parts, place(), gridDim.x, blockIdx.x, thread(), THREADS);
  }
};

template <int CHUNKS>
__global__ void __launch_bounds__(GROUPS_CONSUMERS + BULK_PRODUCERS, 1)
    products_kernel(const __grid_constant__ Inputs in, const __grid_constant__ UnitList shared_list,
                    const __grid_constant__ BulkParts parts, const __grid_constant__ ProductsLayout layout) {
  using Kernel = Products<CHUNKS>;
  typename Kernel::Shared& shared = Kernel::shared();
  UnitList list = shared_list;
  int staging = Kernel::BEFORE_LIST;
  if (layout.own_list) {
    list = place_unit_list(Kernel::memory() + staging, in.n, in.k, shared_list.costs);
    staging += static_cast<int>(bulk_list_smem(in.n, in.k));
  }
  const Kernel kernel{in, list, parts, layout, staging};
  const int tid = threadIdx.x - GROUPS_CONSUMERS, lane = threadIdx.x % 32;
  ListScratch* const scratch = reinterpret_cast<ListScratch*>(Kernel::memory() + staging);  // before copies
  if (!layout.merge_last) allow_next_launch();
  if (layout.own_list) read_rows(in, *scratch);
  if (tid == 0) {
#pragma unroll 1
    for (int s = 0; s < layout.stages; ++s) {
      init_barrier(&shared.full[s], 1);
      init_barrier(&shared.empty[s], Kernel::WARPS);
    }
    shared.announced.init(Kernel::WARPS + 2);
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      init_barrier(&shared.given[i], Kernel::WARPS);
      init_barrier(&shared.weighed[i], 1);
    }
    init_barrier(&shared.filed, Kernel::WARPS);
    init_barrier(&shared.closed, 1);
    shared.unmerged = 0;
    publish_barriers();
  }
  __syncthreads();
  if (tid < 0) {
    take_registers<PRODUCTS_CONSUMER_REGISTERS>();
    kernel.consume();
  } else {
    give_up_registers<PRODUCTS_PRODUCER_REGISTERS>();
    if (layout.own_list) {
      build_own_list<Kernel::TR, Kernel::ROWS>(in, list, *scratch, tid);
    } else {
      wait_for_previous_launch();
    }
    const int ref_bytes = kernel.d * static_cast<int>(sizeof(__half));
    if (kernel.d < Kernel::HELD) {  // elements beyond the sample, which no copy writes
#pragma unroll 1
      for (int i = tid; i < layout.stages * Kernel::PIECE_REFS; i += BULK_PRODUCERS) {
        char* const row = kernel.stage(0) + i * Kernel::REF_BYTES;
        for (int b = ref_bytes; b < Kernel::HELD * static_cast<int>(sizeof(__half)); b += 16)
          *reinterpret_cast<uint4*>(row + b) = uint4{0, 0, 0, 0};
      }
      named_barrier(15, BULK_PRODUCERS);
    }
    if (tid < 32) {
      const auto most_tiles = [](int) { return Kernel::SEGMENT_TILES; };
      announce<Kernel::TR>(in, list, kernel.place(), gridDim.x, blockIdx.x, shared.announced, most_tiles,
                           lane);
    } else if (tid < 64) {
      kernel.produce(lane);
    } else if (tid < 96) {
      kernel.weigh(lane);
    } else {
      if (layout.own_list && !layout.merge_last && blockIdx.x == 0)
        leave_list(in, list, shared_list, lane, 32);
      if (tid == 96) keep_files(parts, layout.merge_last, shared);
    }
  }
}

}  // namespace svel::cuda
