// The two matrix products of many_rows.cuh: scores (references x rows, summed over D) and weighted sums (D x
// rows, summed over references). 2 rows refs d operations each, per half of the second operand. Both keep the
// references as the first operand, which passes through registers: there the centre is subtracted, and
// |d_j|^2 formed on the way. A tile is 128 x up to 256, by two warpgroups of 64 x 256: 128 sums and twice 32
// accumulators a thread. One warp brings stages of 64 deep tiles by tensor copies: 16 KB + 32 KB, four in
// flight.
#include "common/cluster.cuh"
#include "common/tensor_map.cuh"
#include "common/wgmma.cuh"
#include "stable_target/many_rows.cuh"

namespace svel::cuda {
namespace {

constexpr int STAGES = MANY_STAGES;
[[maybe_unused]] constexpr int DEPTH = 64;  // halves of the summed dimension per stage
constexpr int ROW_BYTES = 128;
constexpr int BOX_BYTES = 64 * ROW_BYTES;
constexpr int A_BYTES = 2 * BOX_BYTES;  // 128 references x 64 of D, or 32 or 64 references x 128 of D
constexpr int B_BYTES = 4 * BOX_BYTES;  // 256 rows
constexpr int STAGE_BYTES = static_cast<int>(MANY_STAGE_BYTES);  // c of this depth comes after them

struct ScoreArguments {
  CUtensorMap refs;     // (m, d), boxes of 64 x 64
  CUtensorMap queries;  // (rows, d) y_hi or y_lo, boxes of 64 x 64
};

struct SumArguments {
  CUtensorMap refs;     // (m, d), boxes of many_sum_refs(exact) x 64
  CUtensorMap weights;  // (rows, refs) halves, or (rows, 2 refs): of eight references the upper parts, then
                        // the lower; boxes of 64 x 64
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct Stage {
  uint32_t a, b;
  char* centre;
  Barrier *full, *empty;
};

struct Ring {
  char* memory;  // aligned to 1024 bytes
  Barrier* barriers;
  int at = 0;
  uint32_t parity = 0;

  __device__ Stage stage() const {
    char* const base = memory + at * STAGE_BYTES;
    return {shared_address(base), shared_address(base + A_BYTES), base + A_BYTES + B_BYTES, barriers + at,
            barriers + STAGES + at};
  }
  __device__ void next() {
    if (++at == STAGES) at = 0, parity ^= 1;
  }
};

__device__ Ring make_ring() {
  extern __shared__ char raw[];
  __shared__ Barrier barriers[2 * STAGES];
  const uint32_t misaligned = shared_address(raw) % 1024;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      init_barrier(barriers + s, 1);
      init_barrier(barriers + STAGES + s, 8);  // the warps that multiply
    }
    publish_barriers();
  }
  __syncthreads();
  return {raw + (misaligned ? 1024 - misaligned : 0), barriers};
}

// Whether any thread of this warpgroup says so.
__device__ bool any_of_warpgroup(bool own) {
  return named_barrier_or<128>(1 + static_cast<int>(threadIdx.x) / 128, own);
}

// sums += a b^T for 64 halves of the summed dimension; 64 rows of b at a time, while those before are added.
template <int WIDTH>
__device__ inline void multiply(const uint32_t (&a)[4][4], uint32_t b, float (&sums)[WIDTH / 2]) {
  constexpr int PARTS = WIDTH / 64;
  float acc[2][32];
  const uint64_t descriptor = rows_of_128_bytes(b);
#pragma unroll
  for (int part = 0; part <= PARTS; ++part) {
    if (part < PARTS) {
      start_products();
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (k == 0) {
          product<0>(acc[part % 2], a[k], descriptor + part * (BOX_BYTES >> 4));
        } else {
          product<1>(acc[part % 2], a[k], descriptor + part * (BOX_BYTES >> 4) + 2 * k);
        }
      commit_products();
    }
    if (part == 0) continue;
    if (part < PARTS) {
      wait_products<1>(acc[(part - 1) % 2]);
    } else {
      wait_products<0>(acc[(part - 1) % 2]);
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) sums[(part - 1) * 32 + i] += acc[(part - 1) % 2][i];
  }
}

__device__ inline uint32_t bits(__half2 v) {
  return *reinterpret_cast<uint32_t*>(&v);
}
__device__ inline __half2 halves(uint32_t v) {
  return *reinterpret_cast<__half2*>(&v);
}

struct Difference {
  uint32_t value;      // d, two halves
  uint32_t remainder;  // r - c - d, likewise; zero nearly always
  bool inexact;        // it is not
};

// Two references' elements (raw bits) minus the centre. float16: c of few digits, so that d + c != r wherever
// d was rounded.
template <typename T>
__device__ inline Difference subtract(uint32_t raw, const char* centre, int pair, float scale,
                                      bool remainder) {
  Difference out{};
  if constexpr (sizeof(T) == 2 && DtypeOf<T>::value == Dtype::f16) {
    const __half2 r = halves(raw), c = reinterpret_cast<const __half2*>(centre)[pair];
    const __half2 d = __hsub2(r, c), again = __hadd2(d, c);
    out.value = bits(d);
    out.inexact = bits(again) != raw;
    if (remainder) {  // the rounding error of a difference, exactly (Knuth)
      const __half2 b = __hsub2(d, r);
      out.remainder = bits(__hsub2(__hsub2(r, __hsub2(d, b)), __hadd2(c, b)));
    }
  } else {
    const float2 c = reinterpret_cast<const float2*>(centre)[pair];
    const float low = fmaf(__uint_as_float(raw << 16), scale, -c.x);
    const float high = fmaf(__uint_as_float(raw & 0xffff0000u), scale, -c.y);
    const __half2 d = __floats2half2_rn(low, high);
    const float2 back = __half22float2(d);
    out.value = bits(d);
    out.inexact = back.x != low || back.y != high;
    if (remainder) out.remainder = bits(__floats2half2_rn(low - back.x, high - back.y));
  }
  return out;
}

// ---- scores

__device__ inline int row_tile_width(int64_t rows, int64_t row0) {
  const int64_t left = rows - row0;
  return left <= 64 ? 64 : left <= 128 ? 128 : 256;
}

template <typename T>
__device__ void copy_score_tile(const Many& many, const ScoreArguments& args, Ring& ring, int64_t row0,
                                int64_t ref0, int width, int steps) {
  constexpr int CENTRE = DtypeOf<T>::value == Dtype::f16 ? DEPTH * 2 : DEPTH * 4;
  const char* const centre = DtypeOf<T>::value == Dtype::f16
                                 ? reinterpret_cast<const char*>(many.centre_half)
                                 : reinterpret_cast<const char*>(many.centre_float);
  for (int step = 0; step < steps; ++step, ring.next()) {
    const Stage stage = ring.stage();
    wait_barrier(stage.empty, ring.parity ^ 1);
    arrive_expecting(stage.full, A_BYTES + width * ROW_BYTES + CENTRE);
    const int e = step * DEPTH;
    for (int box = 0; box < 2; ++box)
      tensor_copy(stage.a + box * BOX_BYTES, args.refs, e, static_cast<int>(many.first_ref + ref0) + box * 64,
                  shared_address(stage.full));
    for (int box = 0; box < width / 64; ++box)
      tensor_copy(stage.b + box * BOX_BYTES, args.queries, e, static_cast<int>(row0) + box * 64,
                  shared_address(stage.full));
    bulk_copy(stage.centre, centre + step * CENTRE, CENTRE, stage.full, usual_policy());
  }
}

// The maxima over the eight lanes of the same lane % 4, of their values v[2 b + p]: this lane gets those of
// COUNT / 16 blocks b, in v[0] on. Returns the first of the blocks.
template <int COUNT, int MASK = 16>
__device__ inline int maxima_over_lanes(float (&v)[COUNT], int lane) {
  if constexpr (MASK == 2) {
    return 0;
  } else {
    const bool upper = lane & MASK;
    float half[COUNT / 2];
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) {
      const float send = upper ? v[i] : v[i + COUNT / 2], kept = upper ? v[i + COUNT / 2] : v[i];
      half[i] = fmaxf(kept, __shfl_xor_sync(0xffffffffu, send, MASK));
    }
    const int first = maxima_over_lanes<COUNT / 2, MASK / 2>(half, lane);
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) v[i] = half[i];
    return first + (upper ? COUNT / 4 : 0);
  }
}

template <typename T, int WIDTH, bool LOW>
__device__ inline void score_tile(const Many& many, Ring& ring, int64_t row0, int64_t ref0, int64_t valid,
                                  int steps) {
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  const bool centred = many.facts->centred && many.exact && !LOW;
  const float scale = many.facts->scale;
  float sums[WIDTH / 2];
#pragma unroll
  for (int i = 0; i < WIDTH / 2; ++i) sums[i] = 0;
  double norms[2] = {0, 0};

  for (int step = 0; step < steps; ++step, ring.next()) {
    const Stage stage = ring.stage();
    wait_barrier(stage.full, ring.parity);
    const uint32_t tile = stage.a + group * BOX_BYTES;
    const int row = warp * 16 + lane % 16;
    uint32_t a[4][4];
    bool inexact = false;
    float part[2] = {0, 0};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      load_matrices(chunk_address(tile, row, 2 * k + lane / 16), a[k]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Difference d = subtract<T>(a[k][i], stage.centre, k * 8 + i / 2 * 4 + t, scale, false);
        a[k][i] = d.value;
        inexact = inexact || d.inexact;
        if (!LOW) {
          const float2 v = __half22float2(halves(d.value));
          part[i % 2] = fmaf(v.x, v.x, fmaf(v.y, v.y, part[i % 2]));
        }
      }
    }
    multiply<WIDTH>(a, stage.b, sums);
    if (centred && any_of_warpgroup(inexact)) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        load_matrices(chunk_address(tile, row, 2 * k + lane / 16), a[k]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Difference d = subtract<T>(a[k][i], stage.centre, k * 8 + i / 2 * 4 + t, scale, true);
          a[k][i] = d.remainder;
          const float2 v = __half22float2(halves(d.value)), rest = __half22float2(halves(d.remainder));
          part[i % 2] = fmaf(rest.x, fmaf(2.0f, v.x, rest.x), part[i % 2]);
          part[i % 2] = fmaf(rest.y, fmaf(2.0f, v.y, rest.y), part[i % 2]);
        }
      }
      multiply<WIDTH>(a, stage.b, sums);
    }
    if (!LOW) norms[0] += part[0], norms[1] += part[1];
    __syncwarp();
    if (lane == 0) arrive(stage.empty);
  }

  // This thread's references are ref0 + 64 group + 16 warp + g and the eighth after it; its rows row0 + 8 b +
  // 2 t and the next.
  const int64_t ref = ref0 + group * 64 + warp * 16 + g;
  const bool inside[2] = {ref < valid, ref + 8 < valid};
  float above[2];
  if (!LOW) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      norms[h] += __shfl_xor_sync(0xffffffffu, norms[h], 1);
      norms[h] += __shfl_xor_sync(0xffffffffu, norms[h], 2);
      above[h] = static_cast<float>(norms[h] - many.facts->mean_norm);
      if (row0 == 0 && t == 0 && inside[h]) {
        atomicMax(&many.facts->max_norm, __float_as_int(static_cast<float>(norms[h])));
      }
    }
  }
  float best[WIDTH / 4];
  const ManyFactor* const factors = many.factors + row0;
#pragma unroll
  for (int b = 0; b < WIDTH / 8; ++b) {
    const float4 pair = *reinterpret_cast<const float4*>(factors + 8 * b + 2 * t);
    const float unit[2] = {pair.x, pair.z}, half_alpha[2] = {pair.y, pair.w};
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      float* const to = many.scores + (row0 + 8 * b + 2 * t + p) * many.score_stride + ref;
      float value[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float product = sums[4 * b + 2 * h + p] * unit[p];
        value[h] = LOW ? to[8 * h] + product : fmaf(-half_alpha[p], above[h], product);
        if (value[h] != value[h]) value[h] = INFINITY;  // a reference that is not finite: seen by every row
        if (!inside[h]) value[h] = -INFINITY;
        to[8 * h] = value[h];
      }
      best[2 * b + p] = fmaxf(value[0], value[1]);
    }
  }
  const int first = maxima_over_lanes<WIDTH / 4>(best, lane);
  const int64_t maxima_stride = many.score_stride / MANY_GROUP;
#pragma unroll
  for (int i = 0; i < WIDTH / 32; ++i) {
    const int64_t row = row0 + 8 * (first + i / 2) + 2 * t + i % 2;
    many.maxima[row * maxima_stride + (ref0 + group * 64 + warp * 16) / MANY_GROUP] = best[i];
  }
}

// ---- weighted sums

struct SumTile {  // a part of the references for a tile of rows x D
  int64_t row0, e0;
  int begin, end;  // steps of many_sum_refs(exact) references
  int index;       // in many.partial
};

struct SumGrid {
  int row_tiles, d_tiles, steps, splits;
  int64_t rows;

  __device__ SumGrid(const Inputs& in, const Many& many, int64_t valid) {
    rows = many.facts->dense;
    row_tiles = static_cast<int>((rows + MANY_ROWS - 1) / MANY_ROWS);
    d_tiles = static_cast<int>((in.d + MANY_TILE - 1) / MANY_TILE);
    steps = many_sum_steps(many, valid);
    splits =
        row_tiles ? many_splits(row_tiles * d_tiles, steps, many.blocks, static_cast<int>(MANY_SEGMENTS)) : 0;
  }
  __device__ int tiles() const { return splits * row_tiles * d_tiles; }
  __device__ SumTile tile(int index) const {
    const int split = index / (row_tiles * d_tiles), row_tile = index / d_tiles % row_tiles;
    SumTile tile;
    tile.row0 = row_tile * MANY_ROWS;
    tile.e0 = index % d_tiles * MANY_TILE;
    tile.begin = static_cast<int>(static_cast<int64_t>(steps) * split / splits);
    tile.end = static_cast<int>(static_cast<int64_t>(steps) * (split + 1) / splits);
    tile.index = index;
    return tile;
  }
};

__device__ inline void copy_sum_tile(const Many& many, const SumArguments& args, Ring& ring,
                                     const SumTile& tile, int width) {
  const int refs = many_sum_refs(many.exact);
  for (int step = tile.begin; step < tile.end; ++step, ring.next()) {
    const Stage stage = ring.stage();
    wait_barrier(stage.empty, ring.parity ^ 1);
    arrive_expecting(stage.full, (2 * refs + width) * ROW_BYTES);
    for (int box = 0; box < 2; ++box)
      tensor_copy(stage.a + box * refs * ROW_BYTES, args.refs, static_cast<int>(tile.e0) + box * 64,
                  static_cast<int>(many.first_ref) + step * refs, shared_address(stage.full));
    for (int box = 0; box < width / 64; ++box)
      tensor_copy(stage.b + box * BOX_BYTES, args.weights, step * DEPTH,
                  static_cast<int>(tile.row0) + box * 64, shared_address(stage.full));
  }
}

// Zeros for the halves of references that are not valid: what they hold may be NaN, and 0 NaN is no 0.
__device__ inline uint32_t keep_valid(uint32_t pair, int64_t ref, int64_t valid) {
  return (ref < valid ? pair & 0xffffu : 0u) | (ref + 1 < valid ? pair & 0xffff0000u : 0u);
}

// The d of a step's references, transposed. ldmatrix gives, of references 16 k to 16 k + 15, elements g and g
// + 8 of 2 t and 2 t + 1, then of 2 t + 8 and 2 t + 9. EXACT: eight references fill a[k], once for the upper
// parts of their weights and once for the lower.
template <typename T, bool EXACT>
__device__ inline bool load_differences(uint32_t tile, int warp, int lane, const char* centres, float scale,
                                        int64_t first, int64_t valid, bool remainder, uint32_t (&a)[4][4]) {
  constexpr int REFS = many_sum_refs(EXACT);
  bool inexact = false;
#pragma unroll
  for (int k = 0; k < REFS / 16; ++k) {
    uint32_t raw[4];
    const int ref = 16 * k + lane / 16 * 8 + lane % 8;
    load_matrices_transposed(chunk_address(tile, ref, 2 * warp + lane / 8 % 2), raw);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int eight = 2 * k + i / 2, h = i % 2;
      if (first + REFS > valid) raw[i] = keep_valid(raw[i], first + 8 * eight + 2 * (lane % 4), valid);
      const Difference d = subtract<T>(raw[i], centres, h, scale, remainder);
      inexact = inexact || d.inexact;
      const uint32_t value = remainder ? d.remainder : d.value;
      if (EXACT) {
        a[eight][h] = a[eight][h + 2] = value;
      } else {
        a[k][i] = value;
      }
    }
  }
  return inexact;
}

template <typename T, int WIDTH, bool EXACT>
__device__ inline void sum_tile(const Inputs& in, const Many& many, Ring& ring, const SumTile& at,
                                int64_t valid) {
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  const int64_t e = at.e0 + group * 64 + warp * 16 + g;  // and e + 8
  const bool centred = EXACT && many.facts->centred;
  const float scale = many.facts->scale;
  float centres[4];  // of e and e + 8, each for a pair of references, in the form that subtract takes
  if constexpr (DtypeOf<T>::value == Dtype::f16) {
    reinterpret_cast<__half2*>(centres)[0] = __half2half2(many.centre_half[e]);
    reinterpret_cast<__half2*>(centres)[1] = __half2half2(many.centre_half[e + 8]);
    centres[2] = centres[3] = 0;
  } else {
    centres[0] = centres[1] = many.centre_float[e];
    centres[2] = centres[3] = many.centre_float[e + 8];
  }
  const char* const from = reinterpret_cast<const char*>(centres);
  float sums[WIDTH / 2];
#pragma unroll
  for (int i = 0; i < WIDTH / 2; ++i) sums[i] = 0;

  for (int step = at.begin; step < at.end; ++step, ring.next()) {
    const Stage stage = ring.stage();
    wait_barrier(stage.full, ring.parity);
    const uint32_t tile = stage.a + group * many_sum_refs(EXACT) * ROW_BYTES;
    const int64_t first = static_cast<int64_t>(step) * many_sum_refs(EXACT);
    uint32_t a[4][4];
    const bool inexact = load_differences<T, EXACT>(tile, warp, lane, from, scale, first, valid, false, a);
    multiply<WIDTH>(a, stage.b, sums);
    if (centred && any_of_warpgroup(inexact)) {
      load_differences<T, EXACT>(tile, warp, lane, from, scale, first, valid, true, a);
      multiply<WIDTH>(a, stage.b, sums);
    }
    __syncwarp();
    if (lane == 0) arrive(stage.empty);
  }

  float* const to = many.partial + static_cast<int64_t>(at.index) * (MANY_ROWS * MANY_TILE) + (e - at.e0);
#pragma unroll
  for (int i = 0; i < WIDTH / 2; ++i) {
    const int n = i / 4 * 8 + 2 * t + i % 2, h = i / 2 % 2;
    to[n * MANY_TILE + 8 * h] = sums[i];
  }
}

#endif

// ---- kernels

template <typename T, bool LOW>
__global__ void __launch_bounds__(MANY_THREADS, 1)
    score_kernel(const __grid_constant__ Inputs in, const __grid_constant__ Many many,
                 const __grid_constant__ ScoreArguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const int64_t rows = LOW ? many.facts->dense : many.padded, valid = many_valid(in, many);
  const int64_t row_tiles = (rows + MANY_ROWS - 1) / MANY_ROWS,
                ref_tiles = (valid + MANY_TILE - 1) / MANY_TILE;
  const int64_t tiles = row_tiles * ref_tiles;
  const int steps = static_cast<int>((in.d + DEPTH - 1) / DEPTH);
  Ring ring = make_ring();
  if (threadIdx.x >= 256) {
    give_up_registers<24>();
    if (threadIdx.x != 256) return;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const int64_t row0 = tile % row_tiles * MANY_ROWS, ref0 = tile / row_tiles * MANY_TILE;
      copy_score_tile<T>(many, args, ring, row0, ref0, row_tile_width(rows, row0), steps);
    }
  } else {
    take_registers<240>();
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const int64_t row0 = tile % row_tiles * MANY_ROWS, ref0 = tile / row_tiles * MANY_TILE;
      const int width = row_tile_width(rows, row0);
      if (width == 256) {
        score_tile<T, 256, LOW>(many, ring, row0, ref0, valid, steps);
      } else if (width == 128) {
        score_tile<T, 128, LOW>(many, ring, row0, ref0, valid, steps);
      } else {
        score_tile<T, 64, LOW>(many, ring, row0, ref0, valid, steps);
      }
    }
  }
#endif
}

template <typename T, bool EXACT>
__global__ void __launch_bounds__(MANY_THREADS, 1)
    sum_kernel(const __grid_constant__ Inputs in, const __grid_constant__ Many many,
               const __grid_constant__ SumArguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const int64_t valid = many_valid(in, many);
  const SumGrid grid(in, many, valid);
  const int tiles = grid.tiles();
  Ring ring = make_ring();
  if (threadIdx.x >= 256) {
    give_up_registers<24>();
    if (threadIdx.x != 256) return;
    for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
      const SumTile tile = grid.tile(index);
      copy_sum_tile(many, args, ring, tile, row_tile_width(grid.rows, tile.row0));
    }
  } else {
    take_registers<240>();
    for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
      const SumTile tile = grid.tile(index);
      const int width = row_tile_width(grid.rows, tile.row0);
      if (width == 256) {
        sum_tile<T, 256, EXACT>(in, many, ring, tile, valid);
      } else if (width == 128) {
        sum_tile<T, 128, EXACT>(in, many, ring, tile, valid);
      } else {
        sum_tile<T, 64, EXACT>(in, many, ring, tile, valid);
      }
    }
  }
#endif
}

// ---- host

template <typename Kernel, typename Arguments>
void launch(const char* op, Kernel* kernel, const Inputs& in, const Many& many, const Arguments& args,
            cudaStream_t stream) {
  check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(MANY_SMEM_BYTES)));
  kernel<<<static_cast<unsigned>(many.blocks), MANY_THREADS, MANY_SMEM_BYTES, stream>>>(in, many, args);
  check_launch(op);
}

}  // namespace

void launch_many_score(const char* op, const Inputs& in, const Many& many, bool low, cudaStream_t stream) {
  ScoreArguments args;
  args.refs = map_rows(op, in.refs.data, in.refs.dtype, in.d, in.m, 2 * in.d, 64);
  args.queries = map_rows(op, low ? many.lo : many.hi, Dtype::f16, in.d, many.padded, 2 * many.d_stride, 64);
  const bool half = in.refs.dtype == Dtype::f16;
  launch(op,
         low ? (half ? score_kernel<__half, true> : score_kernel<__nv_bfloat16, true>)
             : (half ? score_kernel<__half, false> : score_kernel<__nv_bfloat16, false>),
         in, many, args, stream);
}

void launch_many_sum(const char* op, const Inputs& in, const Many& many, cudaStream_t stream) {
  SumArguments args;
  args.refs = map_rows(op, in.refs.data, in.refs.dtype, in.d, in.m, 2 * in.d, many_sum_refs(many.exact));
  args.weights = map_rows(op, many.scores, Dtype::f16, (many.exact ? 2 : 1) * many.score_stride, many.padded,
                          4 * many.score_stride, 64);
  const bool half = in.refs.dtype == Dtype::f16;
  launch(op,
         many.exact ? (half ? sum_kernel<__half, true> : sum_kernel<__nv_bfloat16, true>)
                    : (half ? sum_kernel<__half, false> : sum_kernel<__nv_bfloat16, false>),
         in, many, args, stream);
}

}  // namespace svel::cuda
