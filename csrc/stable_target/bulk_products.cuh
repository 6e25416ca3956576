// One pass over the references of class banks on Hopper's matrix units, for references in float16. A
// multiprocessor has one thread block, whose warps have parts of their own, so that none waits for the
// others' latencies but through the ring:
//   announcer  walks the block's range of the list of units and tells the others of each segment (one warp)
//   producer   brings references into a ring in shared memory by bulk copies (one warp)
//   scorers    eight warps, each with an eighth of the elements: their shares of a tile's scores
//   weigher    adds up the shares and runs the online softmax (one warp)
//   adders     eight warps, likewise: add the tile to the rows by its weights, free its place in the ring,
//   and
//              bring the rows' sums to where they belong while the scorers are in the next segment
//   clerk      counts parts of units, as in bulk_groups.cuh (one thread)
// A tile is eight references, or eight times BLOCKS: 64 KB. A unit has up to two rows.
//
// Exactness. Scores are relative to the first reference of the class, c:
//   s_j = rate (y.r_j - alpha/2 |r_j - c|^2),  y = x - alpha c,  so that
//   -|x - alpha r_j|^2 / (2 sigma^2) = s_j - (|x|^2 - alpha^2 |c|^2) / (2 sigma^2).
// Both terms are small where references lie close together. The first is of the matrix units, with y as the
// sum of two values of float16 and sums, which they round towards zero, over 32 elements; the second is in
// float32, six instructions for two elements, which all rows of a unit share. Weights are 2^(s_j - top)
// with an integer `top` that is no smaller than any score, as the sum of two values of float16, which is also
// what their total is of. What they weigh is r_j itself, eight references at a time.
//
// Code that no multiprocessor has run before takes long to come, about 1 us for sixty instructions: loops
// over registers move these instead of naming each, and scorers, weigher and adders run once over whatever is
// in shared memory while the list of units is being built.
#pragma once

#include "stable_target/bulk_parts.cuh"

namespace svel::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define SVEL_PRODUCT_ASM(...) asm(__VA_ARGS__)  // may be moved
#else
#define SVEL_PRODUCT_ASM(...)
#endif

// acc += a b, 16 x 8 over 16, of float16.
__device__ __forceinline__ void multiply_16(float (&acc)[4], const uint4& a, const uint2& b) {
  SVEL_PRODUCT_ASM(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};" : "+f"(acc[0]),
      "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3]) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}
// The first COUNT of the values to the end, the others forward: a loop over registers whose code is short.
template <int COUNT, int SIZE, typename T>
__device__ __forceinline__ void rotate(T (&values)[SIZE]) {
  if constexpr (COUNT < SIZE) {
    T first[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) first[i] = values[i];
#pragma unroll
    for (int i = 0; i + COUNT < SIZE; ++i) values[i] = values[i + COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) values[SIZE - COUNT + i] = first[i];
  }
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
constexpr int SCORERS_REGISTERS = 96, ADDERS_REGISTERS = 112, PRODUCTS_PRODUCER_REGISTERS = 64;

struct ProductsLayout {
  int stages, in_flight;  // pieces of a tile that there is room for; of these, on their way at once
  bool own_list;          // each block builds the list of units in its shared memory
  bool merge_last;        // the last block to finish merges; else merge_kernel
};

// 2^-40: eight references whose weights are all below that, beside the best so far, are not added.
constexpr float PRODUCTS_NO_WEIGHT = 9.0949470177292824e-13f;
constexpr int RAISED = 1 << 30;

struct ProductsState {
  double top;   // weights are 2^(score - top)
  float total;  // of the weights
};

// Tiles in turn have their own of what scorers, weigher and adders hand on. No barrier says that the tile
// before has left it: it has when its place in the ring is free, and the ring holds no more tiles.
constexpr int PRODUCTS_TURNS = 4;

template <int TR>
struct ProductsShared {
  static constexpr int ROWS = PRODUCTS_ROWS;
  static constexpr int WARPS = GROUPS_CONSUMERS / 64, PADDED = WARPS + 4;
  Barrier full[PRODUCTS_MAX_STAGES], empty[PRODUCTS_MAX_STAGES];
  Announcements<ROWS> announced;
  Barrier given[PRODUCTS_TURNS], weighed[PRODUCTS_TURNS];  // all shares of the scores are there; the weights
  alignas(16) float scores[PRODUCTS_TURNS][ROWS][TR][PADDED];
  uint32_t weights[PRODUCTS_TURNS][TR / 8][32];  // as the products take them
  int used[PRODUCTS_TURNS];                      // bit b: block b has weight; RAISED: `top` has grown
  float scales[PRODUCTS_TURNS][ROWS];            // what it has done to the sums so far
  ProductsState states[PRODUCTS_TURNS][ROWS];    // after this tile
  double shifts[SEGMENT_SLOTS][ROWS][WARPS];     // see above: what scores lack, in units of log 2, by warps
  double squares[WARPS];                         // shares of what is summed in float64
  PartRow moved[ROWS][WARPS];                    // to memory already; each warp has its own
  int final;
  Barrier filed, closed;  // a part is in memory; the clerk is done
  int unmerged;           // rows that the clerk has found to be complete
  RowEnd rows_left[ROWS];
};

// CHUNKS of 32 elements for each warp.
template <int CHUNKS>
struct Products {
  static constexpr int THREADS = GROUPS_CONSUMERS / 2, WARPS = THREADS / 32;  // that score, and that add
  static constexpr int ROWS = PRODUCTS_ROWS;
  static constexpr int BLOCKS = 16 / CHUNKS,
                       TR = 8 * BLOCKS;  // of eight references: a tile has 32,768 elements
  static constexpr int PIECES = PRODUCTS_PIECES, PIECE_REFS = TR / PIECES;
  static constexpr int HELD = THREADS * CHUNKS;               // most elements of a sample
  static constexpr int REF_BYTES = products_ref_bytes(HELD);  // in shared memory
  static constexpr int SEGMENT_TILES = SEGMENT_REFS / TR;
  using Shared = ProductsShared<TR>;
  static constexpr int FIXED_BYTES = (sizeof(Shared) + 127) / 128 * 128;
  static constexpr int BEFORE_LIST = FIXED_BYTES + 4 * HELD;
  static_assert(PRODUCTS_MAX_STAGES < PRODUCTS_TURNS * PIECES);

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
  // The centre of the scorers' segment in float32, a warp's elements side by side.
  __device__ __forceinline__ static uint32_t centre() {
    return shared_address(memory()) + FIXED_BYTES + warp() * (CHUNKS * 128);
  }
  __device__ __forceinline__ char* stage(int s) const {
    return memory() + staging + s * (PIECE_REFS * REF_BYTES);
  }
  __device__ __forceinline__ RowPlace place() const { return {1, 0, ROWS, in.d, 0, d, true}; }

  // Of those that have a part of the block in common, scorers or adders.
  __device__ __forceinline__ static int thread() {
    unsigned tid;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(tid));
    return static_cast<int>(tid % THREADS);
  }
  __device__ __forceinline__ static int lane() { return thread() & 31; }
  __device__ __forceinline__ static int warp() { return static_cast<unsigned>(thread()) / 32; }
  __device__ __forceinline__ static int chunk(int q) { return q * WARPS + warp(); }
  __device__ __forceinline__ static void barrier() { named_barrier(1, THREADS); }  // of the adders

  // The segments in turn, for one of the parts: visit(segment, slot, dry). `dry`: once before the first, with
  // whatever is in shared memory.
  template <typename Visit>
  __device__ __forceinline__ static void walk_segments(const Visit& visit) {
    int slot = 0, phase = 0;
    for (bool dry = true;; dry = false) {
      if (!dry) wait_barrier(&shared().announced.told[slot], phase);
      const Segment<ROWS>& segment = shared().announced.segments[slot];
      if (!dry && segment.flags & SEGMENT_LIST_DONE) return;
      visit(segment, slot, dry);
      if (dry) continue;
      __syncwarp();
      if (lane() == 0) arrive(&shared().announced.done[slot]);
      if (++slot == SEGMENT_SLOTS) slot = 0, phase ^= 1;
    }
  }

  // The producer, one warp: each lane copies one reference of a piece.
  __device__ __forceinline__ void produce(int lane) const {
    const int ref_bytes = d * static_cast<int>(sizeof(__half));
    // `behind`: the piece that must have arrived before the next one is on its way. The first few are always
    // taken as arrived.
    int s = 0, phase = 1, behind = layout.stages - layout.in_flight, behind_phase = 1, slot = 0,
        slot_phase = 0;
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
        wait_barrier(&shared().full[behind], behind_phase);
        if (++behind == layout.stages) behind = 0, behind_phase ^= 1;
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

  // Of the ring: the stage where a tile begins, and the parity of its phase.
  struct Place {
    int stage, phase;
  };
  __device__ __forceinline__ void advance(Place& at) const {
    at.stage += PIECES;
    if (at.stage >= layout.stages) at.stage -= layout.stages, at.phase ^= 1;
  }
  __device__ __forceinline__ void await(const Place& at) const {
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
      const int s = at.stage + piece;
      const bool wraps = s >= layout.stages;
      wait_barrier(&shared().full[wraps ? s - layout.stages : s], wraps ? at.phase ^ 1 : at.phase);
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

  // The scorers. Lanes of a warp: 4 g + t. As in the matrix units: of references, lane (g, t) holds elements
  // 8 t to 8 t + 7 of a chunk of reference `logical` g; words 0 and 2 of these four are part 0 of the
  // elements, words 1 and 3 part 1, and a product multiplies both parts with columns of their own: column = 4
  // part + 2 row + split.
  struct Scorer {
    uint2 y[CHUNKS];            // of column g, where t names the elements
    float unscale, half_alpha;  // of row t & 1; unscale: 1 / what y was multiplied by
  };
  static constexpr int AT_ONCE = 4;  // chunks that the loops over registers take

  // The centre of the warp's elements. Returns a bound of them.
  __device__ __forceinline__ float bring_centre(int64_t index) const {
    const __half* const from = static_cast<const __half*>(in.refs.data) + (index < 0 ? 0 : index) * in.d;
    uint32_t largest = 0;
#pragma unroll
    for (int i = lane(); i < 4 * CHUNKS; i += 32) {  // eight elements
      const int e = 32 * chunk(i / 4) + 8 * (i % 4);
      uint4 c{0, 0, 0, 0};
      if (index >= 0 && e < d) c = *reinterpret_cast<const uint4*>(from + e);
      float v[8];
      unpack<__half>(c, v);
#pragma unroll
      for (int k = 0; k < 8; ++k) largest = max(largest, __float_as_uint(v[k]) & 0x7fffffff);
      store_shared(centre() + 32 * i, *reinterpret_cast<const uint4*>(v));
      store_shared(centre() + 32 * i + 16, *reinterpret_cast<const uint4*>(v + 4));
    }
    __syncwarp();
    return __uint_as_float(__reduce_max_sync(0xffffffffu, largest));
  }

  __device__ __forceinline__ void begin_segment(Scorer& mine, const Segment<ROWS>& segment, int slot) const {
    const int column = lane() >> 2, t = lane() & 3, part = column >> 2;
    const int my_row = column / 2 % 2, split = column % 2;
    const bool present = my_row < segment.count;
    const RowState& row = segment.rows[present ? my_row : 0];
    // Beyond the sample, where references are zero, whatever is before its end.
    const int first = 32 * warp() + 8 * t + 2 * part, last = d - 8 + 2 * part - first;
    const float* const from = static_cast<const float*>(in.x.data) + row.index * in.d + first;
    float2 x[2 * CHUNKS];
    const auto read_x = [&](const auto& offset) {
#pragma unroll
      for (int q = 0; q < CHUNKS; ++q) {
        const float* const at = from + offset(32 * WARPS * q);
        x[2 * q] = *reinterpret_cast<const float2*>(at),
              x[2 * q + 1] = *reinterpret_cast<const float2*>(at + 4);
      }
    };
    if (d == HELD) {  // less code
      read_x([](int offset) { return offset; });
    } else {
      read_x([&](int offset) { return min(offset, last); });
    }
    float largest = bring_centre(segment.centre) * row.high_alpha;
    const auto centre_pair = [&](int q, int h) {
      const uint2 pair = load_shared_8(centre() + 128 * q + 32 * t + 8 * part + 16 * h);
      return make_float2(__uint_as_float(pair.x), __uint_as_float(pair.y));
    };
    if (with_squares(segment)) {
      double square = 0;
#pragma unroll 2
      for (int i = 0; i < 2 * CHUNKS; ++i) {
        const int offset = 32 * WARPS * (i / 2);
        const float2 c = centre_pair(i / 2, i % 2);
        const float2 v =
            offset > last ? make_float2(0, 0) : *reinterpret_cast<const float2*>(from + offset + 4 * (i % 2));
        const double a = fma(-row.alpha, static_cast<double>(c.x), static_cast<double>(row.sign * v.x));
        const double b = fma(-row.alpha, static_cast<double>(c.y), static_cast<double>(row.sign * v.y));
        square = fma(a, fma(2 * row.alpha, static_cast<double>(c.x), a), square);
        square = fma(b, fma(2 * row.alpha, static_cast<double>(c.y), b), square);
      }
#pragma unroll
      for (int hop : {1, 2, 16}) square += __shfl_xor_sync(0xffffffffu, square, hop);  // the row's others
      if (split == 0 && part == 0 && t == 0 && present)
        shared().shifts[slot][my_row][warp()] = row.per_square * square;
    }
    float most = 0;
#pragma unroll
    for (int i = 0; i < 2 * CHUNKS; ++i) most = fmaxf(most, fmaxf(fabsf(x[i].x), fabsf(x[i].y)));
#pragma unroll
    for (int hop : {1, 2, 16}) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, hop));
    largest += most;
    // To below 2^15.
    const bool usual = largest > 0 && largest < INFINITY;
    const int biased = usual ? min(max(268 - (__float_as_int(largest) >> 23), 27), 227) : 127;
    const float scale = __int_as_float(biased << 23);
    const float sign = row.sign * scale, high = row.high_alpha * scale,
                rest = row.rest_alpha * scale;  // y times scale
#pragma unroll 1
    for (int i = 0; i < CHUNKS; i += AT_ONCE) {
      float2 split_y[AT_ONCE];
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        uint32_t words[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float2 c = centre_pair(i + j, h), v = x[2 * j + h];
          const float a = fmaf(-rest, c.x, fmaf(-high, c.x, sign * v.x));
          const float b = fmaf(-rest, c.y, fmaf(-high, c.y, sign * v.y));
          const __half2 above = __floats2half2_rn(a, b);
          const float2 seen = __half22float2(above);
          const __half2 below = __floats2half2_rn(a - seen.x, b - seen.y), used = split == 0 ? above : below;
          words[h] = *reinterpret_cast<const uint32_t*>(&used);
        }
        split_y[j] = make_float2(__uint_as_float(words[0]), __uint_as_float(words[1]));
      }
      rotate<2 * AT_ONCE>(x);  // they take the places of half of what they are of
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) x[2 * (CHUNKS - AT_ONCE) + j] = split_y[j];
    }
#pragma unroll
    for (int q = 0; q < CHUNKS; ++q) {
      const float2 words = x[2 * (q / AT_ONCE * AT_ONCE) + q % AT_ONCE];
      mine.y[q] = make_uint2(__float_as_uint(words.x), __float_as_uint(words.y));
    }
    // Of the rows whose scores this lane will have.
    mine.unscale = __shfl_sync(0xffffffffu, __int_as_float((254 - biased) << 23), (lane() & 1) << 3);
    mine.half_alpha = segment.rows[min(lane() & 1, segment.count - 1)].half_alpha;
  }

  // Whether what scores lack is wanted: sources are scored by themselves.
  __device__ __forceinline__ bool with_squares(const Segment<ROWS>& segment) const {
    return segment.squares || in.source.data;
  }

  // Shares of the scores of eight references, to shared memory.
  __device__ __forceinline__ void score_block(const Scorer& mine, uint32_t refs, int block, int turn,
                                              int rows) const {
    const int g = lane() >> 2, t = lane() & 3;
    constexpr int CHAIN = 2;
    float dots[4] = {}, norm = 0;
    const uint32_t c_at = centre() + 32 * t;
#pragma unroll
    for (int from = 0; from < CHUNKS; from += CHAIN) {
      float product[4] = {}, squares[2] = {};
#pragma unroll
      for (int q = from; q < from + CHAIN; ++q) {
        const uint4 r = load_shared_16(refs + WARPS * 64 * q);
        multiply_16(product, r, mine.y[q]);
        float v[8];
        unpack<__half>(r, v);
#pragma unroll
        for (int k = 0; k < 8; k += 4) {
          const uint4 c = load_shared_16(c_at + 128 * q + 4 * k);
          const float d_0 = v[k] - __uint_as_float(c.x), d_1 = v[k + 1] - __uint_as_float(c.y);
          const float d_2 = v[k + 2] - __uint_as_float(c.z), d_3 = v[k + 3] - __uint_as_float(c.w);
          squares[0] = fmaf(d_0, d_0, squares[0]), squares[1] = fmaf(d_1, d_1, squares[1]);
          squares[0] = fmaf(d_2, d_2, squares[0]), squares[1] = fmaf(d_3, d_3, squares[1]);
        }
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) dots[k] += product[k];
      norm += squares[0] + squares[1];
    }
    // Of the products, lane (g, t) has columns 2 t and 2 t + 1 of reference g, of part 0 and of part 1.
    float dot = t < 2 ? dots[0] + dots[1] : dots[2] + dots[3];
    dot += __shfl_xor_sync(0xffffffffu, dot, 2);
    norm += __shfl_xor_sync(0xffffffffu, norm, 1);
    norm += __shfl_xor_sync(0xffffffffu, norm, 2);
    if (t < rows)
      shared().scores[turn][t][8 * block + g][warp()] = fmaf(dot, mine.unscale, -mine.half_alpha * norm);
  }

  __device__ __forceinline__ void score() const {
    Place at{0, 0};
    int turn = 0;
    walk_segments([&](const Segment<ROWS>& segment, int slot, bool dry) {
      Scorer mine;
      if (!dry) begin_segment(mine, segment, slot);
      const int g = lane() >> 2, t = lane() & 3, rows = segment.count;
      int left = dry ? TR : segment.references;
#pragma unroll 1
      for (int tiles = dry ? 1 : segment.tiles; tiles > 0; --tiles, left -= TR) {
        if (!dry) await(at);
#pragma unroll 1
        for (int block = 0; block < (left > 0 ? BLOCKS : 0); ++block)
          score_block(mine, reference(at.stage, 8 * block + stored(g), left) + 64 * warp() + 16 * t, block,
                      turn, rows);
        if (dry) break;
        __syncwarp();
        if (lane() == 0) arrive(&shared().given[turn]);
        advance(at);
        turn = (turn + 1) % PRODUCTS_TURNS;
      }
    });
  }

  // The weigher. Lanes: row lane / 8 and reference lane % 8 of a block, with two lanes for each, which add up
  // half of the warps' shares.
  __device__ __forceinline__ void weigh(int lane) const {
    constexpr int LANES = 4 / ROWS, EACH = WARPS / LANES;
    const int my_row = lane / 8 % ROWS, n = lane % 8, lanes_part = lane / 8 / ROWS;
    int turn = 0, phase = 0;
    walk_segments([&](const Segment<ROWS>& segment, int, bool dry) {
      const bool present = !dry && my_row < segment.count;
      RowScores my;
      my.rate = segment.rows[present ? my_row : 0].rate;
      my.reset();
      int left = dry ? TR : segment.references;
#pragma unroll 1
      for (int tiles = dry ? 1 : segment.tiles; tiles > 0; --tiles, left -= TR) {
        if (!dry) wait_barrier(&shared().given[turn], phase);
        float scores[BLOCKS], best = -INFINITY;
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
          const float* const from = &shared().scores[turn][my_row][8 * b + n][lanes_part * EACH];
          float sum = 0;
#pragma unroll
          for (int w = 0; w < EACH; w += 4) {
            const float4 four = *reinterpret_cast<const float4*>(from + w);
            sum += (four.x + four.y) + (four.z + four.w);
          }
#pragma unroll
          for (int hop = 8 * ROWS; hop < 32; hop *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, hop);
          scores[b] = present && 8 * b + stored(n) < left ? sum : -INFINITY;
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
          if (n == 0) shared().scales[turn][my_row] = scale;
        }
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
          const bool counts = present && 8 * b + stored(n) < left;
          const float weight = counts ? power_of_two(fmaf(scores[b] - my.base, my.rate, -my.rest)) : 0.0f;
          if (!dry && !__any_sync(0xffffffffu, !(weight < PRODUCTS_NO_WEIGHT))) continue;
          used |= 1 << b;
          my.total += hand_out(weight, turn, b, lane);
        }
        if (lane % 8 == 0 && lane < 8 * ROWS) shared().states[turn][my_row] = {my.top, my.total};
        if (lane == 0) shared().used[turn] = used;
        if (dry) break;
        __syncwarp();
        if (lane == 0) arrive(&shared().weighed[turn]);
        turn = (turn + 1) % PRODUCTS_TURNS, phase ^= turn == 0;
      }
    });
  }

  // A weight as the sum of two values of float16: what the products see. Value `split` of them.
  __device__ __forceinline__ static __half split_weight(float weight, int split) {
    const __half high = __float2half_rn(weight);
    return split == 0 ? high : __float2half_rn((weight - __half2float(high)) * SPLIT_SCALE);
  }

  // The weights of a block for the products; returns their sum over the row's eight references.
  __device__ __forceinline__ float hand_out(float weight, int turn, int block, int lane) const {
    const int g = lane / 4, t = lane % 4, row = g / 2 % 2, split = g % 2;
    float seen =
        fmaf(__half2float(split_weight(weight, 1)), 1 / SPLIT_SCALE, __half2float(split_weight(weight, 0)));
#pragma unroll
    for (int hop = 4; hop > 0; hop /= 2) seen += __shfl_xor_sync(0xffffffffu, seen, hop);
    const float a = __shfl_sync(0xffffffffu, weight, 8 * row + 2 * t);
    const float b = __shfl_sync(0xffffffffu, weight, 8 * row + 2 * t + 1);
    shared().weights[turn][block][lane] = pair_of(split_weight(a, split), split_weight(b, split));
    return seen;
  }

  // The adders. Lanes (g, t) as above. A product has elements 0 to 15 of a chunk, part 0, and 16 to 31, part
  // 1, of eight references each, and columns 4 part + 2 row + split. Of the sums lane (g, t) has those of row
  // t & 1 for elements g and g + 8 of part t / 2.
  using Sums = float[2 * CHUNKS];

  __device__ __forceinline__ void add_block(Sums& sum, uint32_t refs, uint32_t weights) const {
    const uint2 columns = lane() < 16 ? make_uint2(weights, 0) : make_uint2(0, weights);
#pragma unroll
    for (int q = 0; q < CHUNKS; ++q) {
      float product[4] = {};
      multiply_16(product, load_transposed(refs + WARPS * 64 * q), columns);
#pragma unroll
      for (int k = 0; k < 2; ++k)
        sum[2 * q + k] = fmaf(product[2 * k + 1], 1 / SPLIT_SCALE, sum[2 * q + k]) + product[2 * k];
    }
  }

  // A tile of `many` references that begins at stage s.
  __device__ __forceinline__ void add_tile(Sums& sum, int s, int many, int turn, int used) const {
    if (used & RAISED) {
      const float scale = shared().scales[turn][lane() & 1];
#pragma unroll
      for (int i = 0; i < 2 * CHUNKS; ++i) sum[i] *= scale;
    }
#pragma unroll 1
    for (int block = 0; block < BLOCKS; ++block) {
      if (used >> block & 1)
        add_block(sum, reference(s, 8 * block + stored(lane() & 7), many) + 64 * warp() + 16 * (lane() >> 3),
                  shared().weights[turn][block][lane()]);
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

  // 2^exponent with the digits of float32, for an exponent of at most 0. Without a call, which would cost the
  // sums their registers.
  __device__ __forceinline__ static double weight_of(double exponent) {
    if (!(exponent > -1000)) return exponent != exponent ? exponent : 0.0;
    const double whole = rint(exponent);
    return __hiloint2double((1023 + static_cast<int>(whole)) << 20, 0) *
           static_cast<double>(power_of_two(static_cast<float>(exponent - whole)));
  }

  // The weight of the row's own source, relative to `own.log2_weight`, which grows where it has to.
  __device__ __forceinline__ double weigh_own_source(const RowState& row, PartRow& own, double& scale) const {
    double share = 0;
#pragma unroll 4
    for (int e = thread(); e < d; e += THREADS) {
      const double source = static_cast<const float*>(in.source.data)[row.index * d + e];
      const double x = row.sign * static_cast<const float*>(in.x.data)[row.index * d + e];
      const double difference = fma(-row.alpha, source, x);
      share = fma(difference, difference, share);
    }
    share = fma(share, 0.0, share);  // what is not finite becomes NaN
    const double log2_weight = -row.per_square * sum_over_block(share);
    if (log2_weight > own.log2_weight) {
      scale = weight_of(own.log2_weight - log2_weight);
      own.log2_weight = log2_weight, own.total *= scale;
    }
    return weight_of(log2_weight - own.log2_weight);
  }

  // Whether this block's last segment is a part of a unit that has one more, in another block.
  __device__ __forceinline__ bool has_partner(const Segment<ROWS>& segment) const {
    return segment.flags & SEGMENT_PART_END && segment.to == segment.from + 1 && !is_filed(segment) &&
           layout.merge_last;
  }
  // Whether that part is there, of all rows; by one thread.
  __device__ __forceinline__ bool partner_is_there(const Segment<ROWS>& segment) const {
    wait_for_previous_launch();  // which sets the counts to zero
    bool there = true;
    for (int r = 0; r < segment.count; ++r) there = there && arrivals(parts.arrived + segment.order + r) == 1;
    return there;
  }

  // A segment's sums, `last` of the turn of its last tile, to the rows' results or to their parts in memory.
  // `dry`: as if a row's last part met the other one, but for what is written.
  __device__ __forceinline__ void end_segment(Sums& sum, const Segment<ROWS>& segment, int slot, int last,
                                              bool dry) const {
    const int flags = dry ? SEGMENT_PART_BEGIN | SEGMENT_PART_END : segment.flags;
    const int others = segment.to - segment.from, rows = dry ? 1 : segment.count, g = lane() >> 2,
              t = lane() & 3;
    const RowPlace here = place();
    const bool whole = !dry && flags & SEGMENT_PART_END && others == 0, first = flags & SEGMENT_PART_BEGIN;
    const int begin = 32 * warp() + 8 * t + g;
    bool joins = dry || has_partner(segment);
    if (joins && !dry) {
      if (thread() == 0 && !shared().final) shared().final = partner_is_there(segment);
      barrier();
      joins = shared().final;
    }
    const bool direct = whole || joins, leads = joins && blockIdx.x == segment.from;
    const int64_t partner = dry ? 0 : leads ? segment.to : segment.from;
#pragma unroll 1
    for (int r = 0; r < rows; ++r) {
      const RowState& row = segment.rows[r];
      const int64_t base = (dry ? 0 : row.index) * in.d + begin;
      float x[CHUNKS];  // on their way meanwhile
      double others_sums[AT_ONCE];
      const int64_t other_part = here.part_of(partner, !leads, r);
      const auto read_others = [&](int i) {  // of chunks i and on
        const double* const from = parts.sums + other_part * d + begin;
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j)
          others_sums[j] = __ldcg(from + min(32 * WARPS * (i + j), d - 1 - begin));
      };
      if (joins) read_others(0);
      if (direct) {
        const float* const from = static_cast<const float*>(in.x.data) + base;
        if (d == HELD) {  // less code
#pragma unroll
          for (int q = 0; q < CHUNKS; ++q) x[q] = from[32 * WARPS * q];
        } else {
#pragma unroll
          for (int q = 0; q < CHUNKS; ++q) x[q] = from[min(32 * WARPS * q, d - 1 - begin)];
        }
      }
      const ProductsState state = shared().states[last][r];
      PartRow own{state.top, state.total};
      double source = 0, scale = 1;
      if (!dry && with_squares(segment)) {
        double shift = shared().shifts[slot][r][lane() % WARPS];
#pragma unroll
        for (int hop = 1; hop < WARPS; hop *= 2) shift += __shfl_xor_sync(0xffffffffu, shift, hop);
        own.log2_weight -= shift;
      }
      if (flags & SEGMENT_UNIT_END && in.source.data) {
        source = weigh_own_source(row, own, scale);
        own.total += source;
      }
      double before = 0;
      if (!first) {
        const PartRow moved = shared().moved[r][warp()];
        const double now = own.log2_weight, most = moved.log2_weight >= now ? moved.log2_weight : now;
        const double by = weight_of(now - most);
        before = weight_of(moved.log2_weight - most);
        own = {most, fma(before, moved.total, by * own.total)};
        scale *= by, source *= by;
      }
      double own_weight = 1, other_weight = 0;
      if (joins) {  // to the last bit what merge_row makes of both
        const double2 theirs = __ldcg(reinterpret_cast<const double2*>(parts.rows + other_part));
        const double difference = own.log2_weight - theirs.x, weight = exp2(-fabs(difference));
        const bool less = !(difference >= 0);
        own_weight = less ? weight : 1, other_weight = less ? 1 : weight;
        own = {less ? theirs.x : own.log2_weight,
               __dadd_rn(__dmul_rn(own_weight, own.total), __dmul_rn(other_weight, theirs.y))};
      }
      const double mean_by = __dmul_rn(1 / own.total, row.b), of_x = row.a;
      const int64_t part = here.part_of(blockIdx.x, flags & SEGMENT_UNIT_BEGIN, r);
      double* to = parts.sums + part * d + begin;
      float* out = static_cast<float*>(row.out) + base;
      const float* from_source = static_cast<const float*>(in.source.data) + base;
      const int from_lane = (lane() & ~1) | r;  // which has this lane's part
#pragma unroll 1
      for (int i = 0; i < CHUNKS; i += AT_ONCE) {
        double v[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
          const float low = __shfl_sync(0xffffffffu, sum[2 * j], from_lane);
          const float high = __shfl_sync(0xffffffffu, sum[2 * j + 1], from_lane);
          v[j] = scale * (t & 1 ? high : low);
        }
        const int left = dry ? 0 : d - begin - 32 * WARPS * i;  // elements before the sample's end
        const auto within = [&](int j) { return 32 * WARPS * j < left; };
        if (source != 0) {
#pragma unroll
          for (int j = 0; j < AT_ONCE; ++j)
            v[j] = fma(source, static_cast<double>(within(j) ? from_source[32 * WARPS * j] : 0.0f), v[j]);
        }
        if (!first) {
#pragma unroll
          for (int j = 0; j < AT_ONCE; ++j)
            v[j] = fma(before, within(j) ? __ldcg(to + 32 * WARPS * j) : 0.0, v[j]);
        }
        if (joins) {
          double other[AT_ONCE];
#pragma unroll
          for (int j = 0; j < AT_ONCE; ++j) other[j] = others_sums[j];
          read_others(i + AT_ONCE);
#pragma unroll
          for (int j = 0; j < AT_ONCE; ++j)
            v[j] = leads ? fma(other_weight, other[j], __dmul_rn(own_weight, v[j]))
                         : fma(own_weight, v[j], __dmul_rn(other_weight, other[j]));
        }
        if (direct) {
#pragma unroll
          for (int j = 0; j < AT_ONCE; ++j) {
            const double mean = __dmul_rn(mean_by, v[j]);
            const double all = of_x != 0 ? fma(of_x, static_cast<double>(x[j]), mean) : mean;
            if (within(j)) out[32 * WARPS * j] = static_cast<float>(all);
          }
        } else {
#pragma unroll
          for (int j = 0; j < AT_ONCE; ++j) {
            if (within(j)) __stcg(to + 32 * WARPS * j, v[j]);
          }
        }
        rotate<2 * AT_ONCE>(sum), rotate<AT_ONCE>(x);
        to += 32 * WARPS * AT_ONCE, out += 32 * WARPS * AT_ONCE, from_source += 32 * WARPS * AT_ONCE;
      }
      __syncwarp();
      if (dry) return;
      if (lane() == 0) shared().moved[r][warp()] = own;
      if (thread() == 0 && flags & SEGMENT_PART_END && !direct) parts.rows[part] = own;
    }
    if (!(flags & SEGMENT_PART_END)) return;
    if (is_filed(segment)) {
      __syncwarp();
      if (lane() == 0) arrive(&shared().filed);
      return;
    }
    if (direct && in.lse.data && thread() == 0) {
#pragma unroll 1
      for (int r = 0; r < segment.count; ++r) write_lse(in, segment.rows[r].index, shared().moved[r][0]);
    }
    if (direct || !layout.merge_last) return;
#pragma unroll 1
    for (int r = 0; r < segment.count; ++r) {
      const RowState& row = segment.rows[r];
      barrier();
      if (thread() == 0) shared().final = count_part(parts, segment, r);
      barrier();
      if (shared().final) merge({row.index, row.out, r, segment.from, segment.to, row.a, row.b, {}});
    }
  }

  // The row's result from its parts.
  __device__ __forceinline__ void merge(const RowEnd& end) const {
    merge_row<THREADS>(in, parts, place(), end, [] { return thread(); });
  }

  __device__ __forceinline__ void add() const {
    Place at{0, 0};
    int turn = 0, phase = 0;
    walk_segments([&](const Segment<ROWS>& segment, int slot, bool dry) {
      Sums sum;
#pragma unroll
      for (int i = 0; i < 2 * CHUNKS; ++i) sum[i] = 0;
      // Early, since that takes a while; if it is not, once more at the end.
      if (!dry && thread() == 0 && has_partner(segment)) shared().final = partner_is_there(segment);
      int left = dry ? TR : segment.references;
#pragma unroll 1
      for (int tiles = dry ? 1 : segment.tiles; tiles > 0; --tiles, left -= TR) {
        if (!dry) {
          wait_barrier(&shared().weighed[turn], phase);
          await(at);  // long since, but that copies are seen by this warp too
        }
        add_tile(sum, at.stage, left, turn, dry ? RAISED | 1 : shared().used[turn]);
        if (dry) break;
        release(at.stage);
        advance(at);
        turn = (turn + 1) % PRODUCTS_TURNS, phase ^= turn == 0;
      }
      end_segment(sum, segment, slot, (turn + PRODUCTS_TURNS - 1) % PRODUCTS_TURNS, dry);
    });
    wait_barrier(&shared().closed, 0);
#pragma unroll 1
    for (int i = 0; i < shared().unmerged; ++i) merge(shared().rows_left[i]);
    write_dead_rows(in, list, place(), gridDim.x, blockIdx.x, thread(), THREADS);
  }
};

// While the list is not there yet, the memory may already bring what some block will read: a part of the
// class of each row, another one for each of its rows. By a few threads, each for a row.
__device__ __forceinline__ void prefetch_class(const Inputs& in, int tid) {
  constexpr int64_t BYTES = 65536;
  const int64_t row = blockIdx.x + int64_t{tid} * gridDim.x, all = in.m * in.d * sizeof(__half);
  if (tid < 0 || tid >= 2 || row >= in.n || all < BYTES) return;
  const int64_t label = in.labels ? in.labels[row] : 0;
  if (label < 0 || label >= in.k) return;
  const int64_t from = row % (all / BYTES) * BYTES;
  prefetch_bulk(static_cast<const char*>(in.refs.data) + label * all + from, BYTES);
}

template <int CHUNKS>
__global__ void __launch_bounds__(GROUPS_CONSUMERS + BULK_PRODUCERS, 1)
    products_kernel(const __grid_constant__ Inputs in, const __grid_constant__ UnitList shared_list,
                    const __grid_constant__ BulkParts parts, const __grid_constant__ ProductsLayout layout) {
  using Kernel = Products<CHUNKS>;
  typename Kernel::Shared& shared = Kernel::shared();
  UnitList list = shared_list;
  int staging = Kernel::BEFORE_LIST;
  if (layout.own_list) {
    list = place_unit_list(Kernel::memory() + staging, in.n, in.k, shared_list.two, shared_list.four);
    staging += static_cast<int>(bulk_list_smem(in.n, in.k));
  }
  const Kernel kernel{in, list, parts, layout, staging};
  const int tid = threadIdx.x - GROUPS_CONSUMERS, lane = threadIdx.x % 32;
  ListScratch* const scratch = reinterpret_cast<ListScratch*>(Kernel::memory() + staging);  // before copies
  if (!layout.merge_last) allow_next_launch();
  if (layout.own_list) {
    prefetch_class(in, tid - 64);
    read_rows(in, *scratch);
  }
  if (tid == 0) {
#pragma unroll 1
    for (int s = 0; s < layout.stages; ++s) {
      init_barrier(&shared.full[s], 1);
      init_barrier(&shared.empty[s], Kernel::WARPS);
    }
    shared.announced.init(2 * Kernel::WARPS + 2);
#pragma unroll 1
    for (int i = 0; i < PRODUCTS_TURNS; ++i) {
      init_barrier(&shared.given[i], Kernel::WARPS);
      init_barrier(&shared.weighed[i], 1);
    }
    init_barrier(&shared.filed, Kernel::WARPS);
    init_barrier(&shared.closed, 1);
    shared.unmerged = 0;
    publish_barriers();
  }
  __syncthreads();
  if (tid < -Kernel::THREADS) {
    take_registers<SCORERS_REGISTERS>();
    kernel.score();
  } else if (tid < 0) {
    take_registers<ADDERS_REGISTERS>();
    kernel.add();
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
