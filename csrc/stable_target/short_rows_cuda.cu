// One shared pool of short samples, 33 <= D <= 256, and many rows: scores, softmax and weighted sums of a
// tile of references without a way to memory between them. The matrix units do the products, 2 n m d
// operations each for the scores and the sums, and for every pair of parts. Bytes hardly matter.
//
// References less their centre, d_j, are written once as two float16 parts of one scale for all of them
// (22 bits); one part where these are float16 or bfloat16 values without a centre. So are rows y, of a scale
// for each. A thread block takes 128 rows and a share of the tiles of references, which one warp brings to
// shared memory. A warpgroup forms 64 x 128 (or 64 x 64) scores y d^T, from shared memory; s_j is that less
// alpha/2 |d_j|^2. With the largest so far it makes weights of them, which stay where they are: the registers
// that held scores hold, as two float16 parts, the first operand of the sums. These are formed 64 elements at
// a time over 64 references, in registers of their own, and added to those so far in float32: the matrix
// units drop digits. Weights have 22 bits too, and their total is of these. While one warpgroup works out
// weights the other multiplies.
//
// What blocks have found of a row is merged in float64: also how far apart the references of weight are, and
// so by how much the row may be off. A row for which that shows is evaluated once more, in float64, with all
// of its references (settle_kernel).
//
// precision = "fast": one part of the weights, and fewer rows that are evaluated again.
#include <cstring>
#include <type_traits>

#include "common/planner_short.h"
#include "common/wgmma.cuh"
#include "stable_target/launch.cuh"
#include "stable_target/scan.cuh"

namespace svel::cuda {
namespace {

constexpr int CENTRE_THREADS = 1024, CENTRE_REFS = 256;  // of which the centre is the mean
constexpr int PREPARE_THREADS = 256;
constexpr int MERGE_THREADS = 128;
constexpr int MOST_D = static_cast<int>(SHORT_MOST_PANELS * SHORT_PANEL);
constexpr int LARGEST = 14;        // largest values have this exponent, as float16
constexpr int MOST_SHIFT = 60;     // of the exponents of values
constexpr float WEIGHT_BITS = 14;  // the largest weight is 2^14: what is left of small ones is not subnormal
constexpr int SETTLE_THREADS = 256;
static_assert(SETTLE_THREADS >= MOST_D);

struct Facts {  // of all references
  float centre[MOST_D];
  int low;             // whether references have a second part
  float mean_norm;     // of |d|^2, about
  unsigned magnitude;  // the bits of the largest |d|, or what gives the same scale
};
static_assert(sizeof(Facts) <= SHORT_FACTS_BYTES);

// Of a row, for scores in units of 2^-shift: s = y.d - half norm, where norms are in units of the references'
// scale; log2 of a weight is rate s.
struct Factors {
  float rate, half;
  int shift, unused;
};
static_assert(sizeof(Factors) == 16);

// What a block has of a row.
struct Total {
  float weights, best;   // their sum, and the score that they are relative to
  float squares, norms;  // sums of squared weights; of weighed |d|^2
  float copies;          // references with the best score
  int reference;         // one of them, or -1
};

struct Doubt {   // a row to be evaluated again
  int64_t row;   // of the pass
  double level;  // the exact score of the reference that was thought the best
};

// What blocks of settle_kernel leave to the last one of theirs.
struct Settling {
  int* arrived;    // (SHORT_SETTLE_BLOCKS,), zero when nobody works
  double* totals;  // (SHORT_SETTLE_BLOCKS, SHORT_SETTLE_ROWS)
  double* levels;  // the same: the scores that weights are relative to
  double* sums;    // (SHORT_SETTLE_BLOCKS, SHORT_SETTLE_ROWS, padded d)
};

struct Short {
  Facts* facts;
  char* tiles;    // tiles x parts x panels x references of a tile x 128 bytes, as they lie in shared memory
  float* norms;   // |d|^2
  char* queries;  // 64 rows: parts x panels x 64 x 128 bytes
  Factors* factors;  // (rows,)
  float* sums;       // (splits, rows, padded d)
  Total* totals;     // (splits, rows)
  int* doubts;       // how many
  Doubt* doubtful;   // (rows,)
  Settling settling;
  int64_t first_row, rows, stride;  // rows of this pass, and with those that fill the last block
  int64_t first_ref, refs;          // of this round; whole tiles
  int panels, splits;
  bool exact;
};

// Of values whose largest is given by its bits.
__device__ int shift_of(unsigned magnitude) {
  if (magnitude == 0) return 0;
  const int exponent = static_cast<int>(magnitude >> 23) - 127;
  return max(-MOST_SHIFT, min(MOST_SHIFT, LARGEST - exponent));
}
__device__ float power(int exponent) {  // of normal numbers
  return __int_as_float((exponent + 127) << 23);
}

// Whether 16-bit references are used as they are, however large: then nothing need be known of them.
__device__ bool is_plain_half(const Inputs& in, const Facts& facts) {
  return in.refs.dtype == Dtype::f16 && facts.low == 0;
}

__device__ int64_t valid_of_round(const Inputs& in, const Short& s) {
  const int64_t left = valid_count(in, 0) - s.first_ref;
  return left < 0 ? 0 : left < s.refs ? left : s.refs;
}

// Launches but the first overlap with the one before, on whose results all that they do depends.
__device__ void follow_previous() {
  wait_for_previous_launch();
  allow_next_launch();
}

// ---- what the products take

// One block. 16-bit references have no centre where it is small beside what they are apart.
__global__ void __launch_bounds__(CENTRE_THREADS) centre_kernel(const Inputs in, const Short s) {
  allow_next_launch();
  __shared__ double sums[CENTRE_THREADS], squares[CENTRE_THREADS];
  __shared__ double scratch[33];
  const int width = s.panels * static_cast<int>(SHORT_PANEL), parts = CENTRE_THREADS / width;
  const int tid = threadIdx.x, column = tid % width, part = tid / width, d = static_cast<int>(in.d);
  const int64_t valid = valid_count(in, 0);
  const int samples = static_cast<int>(valid < CENTRE_REFS ? valid : CENTRE_REFS);
  double sum = 0, square = 0;
  if (part < parts && column < d) {
#pragma unroll 8
    for (int i = part; i < samples; i += parts) {
      const double v = load_as<float>(in.refs, valid * i / samples * in.d + column);
      sum += v, square = fma(v, v, square);
    }
  }
  sums[tid] = sum, squares[tid] = square;
  __syncthreads();
  double mean = 0, variance = 0;
  if (tid < d && samples > 0) {
    for (int p = 1; p < parts; ++p) sum += sums[p * width + tid], square += squares[p * width + tid];
    mean = sum / samples;
    variance = fmax(square / samples - mean * mean, 0.0);
  }
  const double spread = block_sum<double>(variance, scratch),
               offset = block_sum<double>(mean * mean, scratch);
  const bool centred = in.refs.dtype == Dtype::f32 || offset > 0.25 * spread;
  if (tid < MOST_D) {
    // Few digits, lest c's last ones turn r - c the same way for most r.
    const float coarse = 4096 * sqrtf(static_cast<float>(spread / d)), c = static_cast<float>(mean);
    s.facts->centre[tid] = centred && isfinite(c) && isfinite(coarse) ? (c + coarse) - coarse : 0.0f;
  }
  if (tid == 0) {
    s.facts->low = centred;
    s.facts->mean_norm = static_cast<float>(spread + (centred ? 0.0 : offset));
    s.facts->magnitude = is_plain_half(in, *s.facts) ? __float_as_uint(power(LARGEST)) : 0;
  }
  for (int i = tid; i < SHORT_SETTLE_BLOCKS; i += CENTRE_THREADS) s.settling.arrived[i] = 0;
}

// Of a warp: as many samples side by side as it has lanes for eight elements of each.
struct Lanes {
  int chunks, each, item, chunk;
  bool active;
  __device__ explicit Lanes(int panels)
      : chunks(8 * panels),
        each(32 / chunks),
        item(threadIdx.x % 32 / chunks),
        chunk(threadIdx.x % 32 % chunks),
        active(item < each) {}
  // Over the lanes of a sample; of all where these are not a power of two, which have one.
  template <typename W, typename Op>
  __device__ W reduce(W v, const Op& op) const {
    for (int offset = (each == 1 ? 32 : chunks) / 2; offset > 0; offset /= 2)
      v = op(v, __shfl_xor_sync(0xffffffffu, v, offset));
    return v;
  }
};

__device__ void load_chunk(const Array& from, int64_t index, int64_t d, int chunk, bool vectors,
                           float (&v)[8]) {
  const int64_t at = index * d + 8 * chunk;
  if (vectors && 8 * chunk < d) return load8<float>(from, at, v);
#pragma unroll
  for (int k = 0; k < 8; ++k) v[k] = 8 * chunk + k < d ? load_as<float>(from, at + k) : 0.0f;
}

__device__ bool loads_vectors(const Array& a, int64_t d) {
  return d % 8 == 0 && is_aligned(a.data);
}

// The largest |d|.
__global__ void __launch_bounds__(PREPARE_THREADS) magnitude_kernel(const Inputs in, const Short s) {
  follow_previous();
  if (is_plain_half(in, *s.facts)) return;
  const Lanes lanes(s.panels);
  const int64_t valid = valid_count(in, 0), warps = static_cast<int64_t>(gridDim.x) * (PREPARE_THREADS / 32);
  const bool vectors = loads_vectors(in.refs, in.d);
  float centre[8], largest = 0;
#pragma unroll
  for (int k = 0; k < 8; ++k)
    centre[k] = 8 * lanes.chunk + k < in.d ? s.facts->centre[8 * lanes.chunk + k] : 0.0f;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * PREPARE_THREADS + threadIdx.x) / 32 * lanes.each;
#pragma unroll 4
  for (int64_t j = first + lanes.item; j < valid; j += warps * lanes.each) {
    if (!lanes.active) break;
    float v[8];
    load_chunk(in.refs, j, in.d, lanes.chunk, vectors, v);
#pragma unroll
    for (int k = 0; k < 8; ++k) largest = fmaxf(largest, fabsf(v[k] - centre[k]));
  }
  for (int offset = 16; offset > 0; offset /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
  unsigned* const magnitude = &s.facts->magnitude;
  if (threadIdx.x % 32 == 0 && __float_as_uint(largest) > *const_cast<volatile unsigned*>(magnitude))
    atomicMax(magnitude, __float_as_uint(largest));
}

// Eight values to two parts, each to its place; low: null where there is none.
__device__ void store_parts(const float (&v)[8], float scale, char* high, char* low) {
  uint4 of_high, of_low;
  __half2* const highs = reinterpret_cast<__half2*>(&of_high);
  __half2* const lows = reinterpret_cast<__half2*>(&of_low);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float a = v[2 * k] * scale, b = v[2 * k + 1] * scale;
    highs[k] = __floats2half2_rn(a, b);
    const float2 rounded = __half22float2(highs[k]);
    lows[k] = __floats2half2_rn(a - rounded.x, b - rounded.y);
  }
  *reinterpret_cast<uint4*>(high) = of_high;
  if (low) *reinterpret_cast<uint4*>(low) = of_low;
}

// Where a chunk of sample `row` of a tile of `rows` lies, of the first part; parts are `part_bytes` apart.
__device__ int64_t place_of(int chunk, int row, int rows) {
  return (static_cast<int64_t>(chunk / 8) * rows + row) * 128 + ((chunk % 8 ^ row % 8) << 4);
}

__device__ void prepare_reference(const Inputs& in, const Short& s, const Lanes& lanes, int64_t j) {
  const int tile_refs = short_tile_refs(s.panels), parts = s.facts->low ? 2 : 1;
  const int shift = shift_of(s.facts->magnitude);
  const bool valid = lanes.active && s.first_ref + j < valid_count(in, 0);
  float v[8] = {};
  double norm = 0;
  if (valid) {
    load_chunk(in.refs, s.first_ref + j, in.d, lanes.chunk, loads_vectors(in.refs, in.d), v);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if (8 * lanes.chunk + k < in.d) v[k] -= s.facts->centre[8 * lanes.chunk + k];
      norm = fma(static_cast<double>(v[k]), static_cast<double>(v[k]), norm);
    }
  }
  norm = lanes.reduce(norm, [](double a, double b) { return a + b; });
  if (!lanes.active || j >= s.refs) return;
  const int row = static_cast<int>(j % tile_refs);
  const int64_t part_bytes = static_cast<int64_t>(s.panels) * tile_refs * 128;
  char* const high = s.tiles + j / tile_refs * parts * part_bytes + place_of(lanes.chunk, row, tile_refs);
  store_parts(v, power(shift), high, parts == 2 ? high + part_bytes : nullptr);
  if (lanes.chunk == 0) s.norms[j] = static_cast<float>(ldexp(norm, 2 * shift));
}

__device__ void prepare_row(const Inputs& in, const Short& s, const Lanes& lanes, int64_t local) {
  const Facts& facts = *s.facts;
  bool alive = false;
  Row row{};
  if (lanes.active && local < s.rows) row = make_row(in, s.first_row + local, 0, alive);
  float v[8] = {}, largest = 0;
  if (alive) {
    load_chunk(in.x, s.first_row + local, in.d, lanes.chunk, loads_vectors(in.x, in.d), v);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if (8 * lanes.chunk + k >= in.d) continue;
      const double y = row.sign * v[k] - row.alpha * facts.centre[8 * lanes.chunk + k];
      v[k] = static_cast<float>(y);
      largest = fmaxf(largest, fabsf(v[k]));
    }
  }
  largest = lanes.reduce(largest, [](float a, float b) { return fmaxf(a, b); });
  if (!lanes.active || local >= s.stride) return;
  const int own = shift_of(__float_as_uint(largest)), of_refs = shift_of(facts.magnitude),
            shift = own + of_refs;
  const int64_t part_bytes = static_cast<int64_t>(s.panels) * 64 * 128;
  char* const high =
      s.queries + local / 64 * 2 * part_bytes + place_of(lanes.chunk, static_cast<int>(local % 64), 64);
  store_parts(v, power(own), high, high + part_bytes);
  if (lanes.chunk != 0) return;
  if (local == 0) *s.doubts = 0;
  Factors to{};
  to.rate = 1e-36f;  // not zero: less than all scores of a row is -INFINITY
  if (alive) {
    const double rate = row.rate() * LOG2_E, unit = ldexp(1.0, shift);
    to.rate = fmaxf(static_cast<float>(rate / unit), to.rate);
    to.half = static_cast<float>(ldexp(0.5 * row.alpha, own - of_refs));
  }
  to.shift = shift;
  s.factors[local] = to;
}

// Blocks of the references first, then of the rows.
__global__ void __launch_bounds__(PREPARE_THREADS)
    prepare_kernel(const Inputs in, const Short s, const unsigned ref_blocks) {
  follow_previous();
  const Lanes lanes(s.panels);
  const bool of_refs = blockIdx.x < ref_blocks;
  const int64_t block = of_refs ? blockIdx.x : blockIdx.x - ref_blocks;
  const int64_t item = (block * (PREPARE_THREADS / 32) + threadIdx.x / 32) * lanes.each + lanes.item;
  if (of_refs) {
    prepare_reference(in, s, lanes, item);
  } else {
    prepare_row(in, s, lanes, item);
  }
}

__device__ float exp2_approx(float v) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
  return out;
}
// A weight in 22 bits, which two parts hold.
__device__ float weight_of(float score, float best, float rate) {
  return __uint_as_float(__float_as_uint(exp2_approx(fmaf(score - best, rate, WEIGHT_BITS))) & ~3u);
}

// ---- the products

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ uint32_t bits(__half2 v) {
  return *reinterpret_cast<uint32_t*>(&v);
}

struct Ring {
  char *slots, *norms;  // norms: of those tiles that are first parts
  Barrier *full, *empty;
  int at = 0;
  uint32_t parity = 0;
};

template <int PANELS>
struct Shape {
  static constexpr int REFS = short_tile_refs(PANELS), SLOTS = short_slots(PANELS);
  static constexpr int PANEL_BYTES = REFS * 128, TILE_BYTES = PANELS * PANEL_BYTES;
  static constexpr int ROW_PART_BYTES = PANELS * 64 * 128;  // of 64 rows
  static constexpr int ROW_BYTES = 2 * ROW_PART_BYTES;
};

template <typename S>
__device__ void next(Ring& ring) {
  if (++ring.at == S::SLOTS) ring.at = 0, ring.parity ^= 1;
}

// One thread: the rows, then all tiles in turn, part by part.
template <int PANELS>
__device__ void copy_tiles(const Short& s, Ring ring, char* rows, Barrier* rows_full, int64_t begin,
                           int64_t end, bool low) {
  using S = Shape<PANELS>;
  const uint64_t policy = usual_policy();
  const int parts = low ? 2 : 1;
  arrive_expecting(rows_full, 2 * S::ROW_BYTES);
  const char* const from = s.queries + static_cast<int64_t>(blockIdx.x) * 2 * S::ROW_BYTES;
  for (int at = 0; at < 2 * S::ROW_BYTES; at += S::ROW_PART_BYTES)
    bulk_copy(rows + at, from + at, S::ROW_PART_BYTES, rows_full, policy);
  for (int tile = begin; tile < end; ++tile) {
    for (int part = 0; part < parts; ++part, next<S>(ring)) {
      wait_barrier(ring.empty + ring.at, ring.parity ^ 1);
      Barrier* const full = ring.full + ring.at;
      arrive_expecting(full, S::TILE_BYTES + (part == 0 ? 4 * S::REFS : 0));
      bulk_copy(ring.slots + ring.at * S::TILE_BYTES,
                s.tiles + static_cast<int64_t>(tile * parts + part) * S::TILE_BYTES, S::TILE_BYTES, full,
                policy);
      if (part == 0)
        bulk_copy(ring.norms + ring.at * 4 * S::REFS, s.norms + static_cast<int64_t>(tile) * S::REFS,
                  4 * S::REFS, full, policy);
    }
  }
}

// scores += rows refs^T of one part of either, over all of D.
template <int PANELS, int REFS, bool FIRST>
__device__ __forceinline__ void add_scores(float (&scores)[REFS / 2], uint32_t rows, uint32_t refs) {
#pragma unroll
  for (int panel = 0; panel < PANELS; ++panel) {
    const uint64_t a = rows_of_128_bytes(rows + panel * 64 * 128),
                   b = rows_of_128_bytes(refs + panel * REFS * 128);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (FIRST && panel == 0 && k == 0) {
        product_shared<0, 0>(scores, a, b);
      } else {
        product_shared<1, 0>(scores, a + 2 * k, b + 2 * k);
      }
    }
  }
}

// From shared memory, rather than from registers that hold it since it was loaded before.
__device__ __forceinline__ float2 load_again(const float* from) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(shared_address(from)));
  return v;
}

// A warpgroup's tiles. LOW: references have two parts. Of its 64 rows a thread has two, 8 apart: see
// product() in wgmma.cuh.
template <int PANELS, bool EXACT, bool LOW>
__device__ __forceinline__ void weigh_tiles(const Short& s, Ring ring, uint32_t rows, int begin, int end,
                                            int valid) {
  using S = Shape<PANELS>;
  constexpr int REFS = S::REFS, HALVES = REFS / 64, PIECES = PANELS * HALVES;
  constexpr int BUFFERS = PANELS <= 2 ? 2 : 1;
  const int lane = threadIdx.x % 32, quad = lane % 4;
  const int64_t part = blockIdx.y;
  const int row0 = static_cast<int>(blockIdx.x * SHORT_ROWS + threadIdx.x / 32 * 16) + lane / 4;
  float rate[2], half[2], best[2], total[2] = {0, 0}, squares[2] = {0, 0}, of_norms[2] = {0, 0};
  float copies[2] = {0, 0};
  int reference[2] = {-1, -1};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const Factors& f = s.factors[row0 + 8 * h];
    rate[h] = f.rate, half[h] = f.half, best[h] = -INFINITY;
  }
  float sums[PANELS * 32];
#pragma unroll
  for (int i = 0; i < PANELS * 32; ++i) sums[i] = 0;
  if (s.first_ref > 0) {  // goes on where the round before has ended
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t at = part * s.stride + row0 + 8 * h;
      const Total before = s.totals[at];
      best[h] = before.best;
      if (quad == 0) {
        total[h] = before.weights, squares[h] = before.squares, of_norms[h] = before.norms;
        copies[h] = before.copies, reference[h] = before.reference;
      }
      const float2* const from = reinterpret_cast<const float2*>(s.sums + at * PANELS * SHORT_PANEL) + quad;
#pragma unroll
      for (int i = 0; i < PANELS * 8; ++i) {
        const float2 pair = from[4 * i];
        sums[4 * i + 2 * h] = pair.x, sums[4 * i + 2 * h + 1] = pair.y;
      }
    }
  }

  for (int tile = begin; tile < end; ++tile) {
    const uint32_t high = shared_address(ring.slots + ring.at * S::TILE_BYTES);
    const float* const norms = reinterpret_cast<const float*>(ring.norms + ring.at * 4 * REFS);
    Barrier* const high_empty = ring.empty + ring.at;
    wait_barrier(ring.full + ring.at, ring.parity);
    next<S>(ring);
    [[maybe_unused]] uint32_t low = 0;
    [[maybe_unused]] Barrier* low_empty = nullptr;

    uint32_t of_rows = rows;  // made again for each tile: descriptors of all panels have no room in registers
    if (PANELS == 4) asm volatile("" : "+r"(of_rows));
    // The smallest products are added first.
    float scores[REFS / 2];
    start_products();
    add_scores<PANELS, REFS, true>(scores, of_rows + S::ROW_PART_BYTES, high);
    if constexpr (LOW) {
      low = shared_address(ring.slots + ring.at * S::TILE_BYTES);
      low_empty = ring.empty + ring.at;
      wait_barrier(ring.full + ring.at, ring.parity);
      next<S>(ring);
      add_scores<PANELS, REFS, false>(scores, of_rows, low);
    }
    add_scores<PANELS, REFS, false>(scores, of_rows, high);
    commit_products();
    wait_products<0>(scores);

#pragma unroll
    for (int i = 0; i < REFS / 8; ++i) {
      const float2 norm = *reinterpret_cast<const float2*>(norms + 8 * i + 2 * quad);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        scores[4 * i + 2 * h] = fmaf(-half[h], norm.x, scores[4 * i + 2 * h]);
        scores[4 * i + 2 * h + 1] = fmaf(-half[h], norm.y, scores[4 * i + 2 * h + 1]);
      }
    }
    if ((tile + 1) * REFS > valid) {
      const int left = valid - tile * REFS;
#pragma unroll
      for (int i = 0; i < REFS / 2; ++i)
        if (i / 4 * 8 + 2 * quad + i % 2 >= left) scores[i] = -INFINITY;
    }
    float keep[2];
    bool has_best = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most = -INFINITY;
#pragma unroll
      for (int i = 0; i < REFS / 8; ++i)
        most = fmaxf(most, fmaxf(scores[4 * i + 2 * h], scores[4 * i + 2 * h + 1]));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      const float before = best[h];
      best[h] = fmaxf(before, most);
      if (most > before) copies[h] = 0, reference[h] = -1;
      keep[h] = exp2_approx((before - best[h]) * rate[h]);
      has_best = has_best || most == best[h];
    }
    if (__any_sync(0xffffffffu, has_best)) {
#pragma unroll
      for (int i = 0; i < REFS / 2; ++i) {
        const int h = i / 2 % 2;
        if (scores[i] != best[h]) continue;
        copies[h] += 1;
        reference[h] = static_cast<int>(s.first_ref) + tile * REFS + i / 4 * 8 + 2 * quad + i % 2;
      }
    }

    uint32_t weights[REFS / 16][4];
    [[maybe_unused]] uint32_t rests[REFS / 16][4];
    float added[2] = {0, 0}, squares_added[2] = {0, 0}, norms_added[2] = {0, 0};
#pragma unroll
    for (int k = 0; k < REFS / 16; ++k) {
      float2 norm;
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const int h = word % 2, at = 4 * (2 * k + word / 2) + 2 * h;
        if (h == 0) norm = load_again(norms + 8 * (2 * k + word / 2) + 2 * quad);
        float a, b;
        if constexpr (EXACT) {
          a = weight_of(scores[at], best[h], rate[h]), b = weight_of(scores[at + 1], best[h], rate[h]);
        } else {
          a = exp2_approx(fmaf(scores[at] - best[h], rate[h], WEIGHT_BITS));
          b = exp2_approx(fmaf(scores[at + 1] - best[h], rate[h], WEIGHT_BITS));
        }
        const __half2 upper = __floats2half2_rn(a, b);
        weights[k][word] = bits(upper);
        const float2 rounded = __half22float2(upper);
        if constexpr (EXACT) {
          rests[k][word] = bits(__floats2half2_rn(a - rounded.x, b - rounded.y));
        } else {
          a = rounded.x, b = rounded.y;
        }
        added[h] += a + b;
        squares_added[h] = fmaf(b, b, fmaf(a, a, squares_added[h]));
        norms_added[h] = fmaf(b, norm.y, fmaf(a, norm.x, norms_added[h]));
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      total[h] = fmaf(total[h], keep[h], added[h]);
      squares[h] = fmaf(squares[h], keep[h] * keep[h], squares_added[h]);
      of_norms[h] = fmaf(of_norms[h], keep[h], norms_added[h]);
    }

    // 64 elements of D and 64 references at a time.
    float parts[BUFFERS][32];
#pragma unroll
    for (int piece = 0; piece < PIECES + BUFFERS - 1; ++piece) {
      if (piece < PIECES) {
        const int refs0 = piece / PANELS * 64, panel = piece % PANELS;
        float (&sum)[32] = parts[piece % BUFFERS];
        const uint64_t of_high = rows_of_128_bytes(high + panel * S::PANEL_BYTES + refs0 * 128);
        start_products();
        if constexpr (EXACT) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            if (k == 0) {
              product<0, 1>(sum, rests[refs0 / 16], of_high);
            } else {
              product<1, 1>(sum, rests[refs0 / 16 + k], of_high + k * (2048 >> 4));
            }
          }
        }
        if constexpr (LOW) {
          const uint64_t of_low = rows_of_128_bytes(low + panel * S::PANEL_BYTES + refs0 * 128);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            if (!EXACT && k == 0) {
              product<0, 1>(sum, weights[refs0 / 16], of_low);
            } else {
              product<1, 1>(sum, weights[refs0 / 16 + k], of_low + k * (2048 >> 4));
            }
          }
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (!EXACT && !LOW && k == 0) {
            product<0, 1>(sum, weights[refs0 / 16], of_high);
          } else {
            product<1, 1>(sum, weights[refs0 / 16 + k], of_high + k * (2048 >> 4));
          }
        }
        commit_products();
      }
      const int done = piece - (BUFFERS - 1);
      if (done < 0) continue;
      float (&sum)[32] = parts[done % BUFFERS];
      if (BUFFERS == 2 && piece < PIECES) {
        wait_products<1>(sum);
      } else {
        wait_products<0>(sum);
      }
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        float& so_far = sums[done % PANELS * 32 + i];
        so_far = done < PANELS ? fmaf(so_far, keep[i / 2 % 2], sum[i]) : so_far + sum[i];
      }
    }
    if (lane == 0) {
      arrive(high_empty);
      if (LOW) arrive(low_empty);
    }
  }

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t at = part * s.stride + row0 + 8 * h;
#pragma unroll
    for (int lanes = 1; lanes <= 2; lanes *= 2) {
      total[h] += __shfl_xor_sync(0xffffffffu, total[h], lanes);
      squares[h] += __shfl_xor_sync(0xffffffffu, squares[h], lanes);
      of_norms[h] += __shfl_xor_sync(0xffffffffu, of_norms[h], lanes);
      copies[h] += __shfl_xor_sync(0xffffffffu, copies[h], lanes);
      reference[h] = max(reference[h], __shfl_xor_sync(0xffffffffu, reference[h], lanes));
    }
    if (quad == 0) s.totals[at] = {total[h], best[h], squares[h], of_norms[h], copies[h], reference[h]};
    float2* const to = reinterpret_cast<float2*>(s.sums + at * PANELS * SHORT_PANEL) + quad;
#pragma unroll
    for (int i = 0; i < PANELS * 8; ++i) to[4 * i] = {sums[4 * i + 2 * h], sums[4 * i + 2 * h + 1]};
  }
}

#endif

// Grid: (rows / SHORT_ROWS, splits).
template <int PANELS, bool EXACT>
__global__ void __launch_bounds__(SHORT_THREADS, 1)
    weigh_kernel(const __grid_constant__ Inputs in, const __grid_constant__ Short s) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = Shape<PANELS>;
  extern __shared__ char raw[];
  __shared__ Barrier barriers[2 * S::SLOTS + 1];
  const uint32_t misaligned = shared_address(raw) % 1024;
  char* const rows = raw + (misaligned ? 1024 - misaligned : 0);
  char* const slots = rows + 2 * S::ROW_BYTES;
  Ring ring{slots, slots + S::SLOTS * S::TILE_BYTES, barriers, barriers + S::SLOTS};
  Barrier* const rows_full = barriers + 2 * S::SLOTS;
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::SLOTS; ++i) init_barrier(ring.full + i, 1), init_barrier(ring.empty + i, 8);
    init_barrier(rows_full, 1);
    publish_barriers();
  }
  __syncthreads();
  follow_previous();
  const int valid = static_cast<int>(valid_of_round(in, s));
  const int64_t tiles = (valid + S::REFS - 1) / S::REFS;
  const int begin = static_cast<int>(tiles * blockIdx.y / s.splits),
            end = static_cast<int>(tiles * (blockIdx.y + 1) / s.splits);
  const bool low = s.facts->low;
  if (threadIdx.x >= 256) {
    give_up_registers<24>();
    if (threadIdx.x == 256) copy_tiles<PANELS>(s, ring, rows, rows_full, begin, end, low);
  } else {
    take_registers<240>();
    const uint32_t own = shared_address(rows) + threadIdx.x / 128 * S::ROW_BYTES;
    wait_barrier(rows_full, 0);
    if (low) {
      weigh_tiles<PANELS, EXACT, true>(s, ring, own, begin, end, valid);
    } else {
      weigh_tiles<PANELS, EXACT, false>(s, ring, own, begin, end, valid);
    }
  }
#endif
}

// ---- the end

// Rows whose mean may be off by so much, over what the output is relative to, are evaluated again. Scores are
// off by SCORE_ERROR of their terms, the standard deviation; beside a source, whose score is not, by their
// common part too, which is three times that.
constexpr double SCORE_ERROR = 6e-8, SOURCE_ERROR = 3, DOUBT_EXACT = 4.5e-7, DOUBT_FAST = 1.8e-4;
constexpr double MANY = 2;  // of the limit, where a row is between many: each of them is off by itself
// But for what they have in common: the matrix units cut each product towards zero, so references are off
// alike where they and the row are alike. This, times |mean|^2 over the mean |d|^2, of the error is in
// proportion to d.
constexpr double ALIKE = 0.5;
constexpr double SUM_ERROR = 1.0 / 12;  // "exact": float32 sums show where 1 / 12 of |mean| is more than that
constexpr double NO_SPREAD = 1e-6;      // what rounding leaves of the others' weight, and of |d|^2
constexpr double LARGEST_SCORE =
    1e15;  // in log2 of a weight: float64 has no digits for differences of larger ones

template <int COUNT>
__device__ void block_sums(double (&values)[COUNT], double* scratch) {  // COUNT for each warp
  const int warps = static_cast<int>(blockDim.x) / 32;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) values[i] = warp_sum(values[i]);
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) scratch[threadIdx.x / 32 * COUNT + i] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    values[i] = 0;
    for (int w = 0; w < warps; ++w) values[i] += scratch[w * COUNT + i];
  }
}

// A row's references and its source together: the score that weights are relative to, and the factors of
// both.
struct Joined {
  double level, of_references, with_source;
};
__device__ Joined join(const Inputs& in, double level, bool has_references, double of_source, double rate) {
  Joined joined = {level, has_references ? 1.0 : 0.0, 0};
  if (!in.source.data) return joined;
  joined.level = has_references ? fmax(level, of_source) : of_source;
  joined.with_source = exp2((of_source - joined.level) * rate);
  if (has_references) joined.of_references = exp2((level - joined.level) * rate);
  return joined;
}

// total: all weights, relative to level; square: |y|^2.
__device__ void write_row_lse(const Inputs& in, const Row& row, int64_t index, double total, double level,
                              double square) {
  const double shift = row.rate() * level - square / (2 * row.sigma * row.sigma);
  store_as(in.lse, index, total > 0 ? log(total) + shift + 0.5 * static_cast<double>(in.d) : NAN);
}

// One block per row. What blocks have left of it together, and the source; whether that is good enough.
__global__ void __launch_bounds__(MERGE_THREADS) merge_kernel(const Inputs in, const Short s) {
  constexpr int WARPS = MERGE_THREADS / 32;
  __shared__ double scratch[5 * WARPS], y[MOST_D], factors[MERGE_THREADS];
  follow_previous();
  const int tid = threadIdx.x;
  const int64_t local = blockIdx.x, index = s.first_row + local;
  bool alive;
  const Row row = make_row(in, index, 0, alive);
  const Factors f = s.factors[local];
  const Facts& facts = *s.facts;
  const double rate = row.rate() * LOG2_E;
  const bool has_references = alive && row.count > 0;

  double sources[3] = {0, 0, 0};  // |y|^2; score and |d|^2 of the source
  for (int64_t e = tid; e < in.d; e += MERGE_THREADS) {
    const double c = facts.centre[e];
    y[e] = row.sign * load_as<double>(in.x, index * in.d + e) - row.alpha * c;
    sources[0] = fma(y[e], y[e], sources[0]);
    if (!in.source.data) continue;
    const double own = load_as<double>(in.source, index * in.d + e) - c;
    sources[1] += (y[e] - 0.5 * row.alpha * own) * own;
    sources[2] = fma(own, own, sources[2]);
  }
  block_sums(sources, scratch);
  const double square = sources[0], of_source = sources[1], square_of_source = sources[2];

  float most = -INFINITY;
  for (int p = tid; p < s.splits; p += MERGE_THREADS) most = fmaxf(most, s.totals[p * s.stride + local].best);
  const float best = block_max<float>(most, reinterpret_cast<float*>(scratch));
  double level = ldexp(static_cast<double>(best), -f.shift);  // the score that weights are relative to

  // Of all parts: weights, their squares, weighed |d|^2, and how many references have the best score: copies
  // of one, or what its few digits cannot tell apart.
  double totals[4] = {0, 0, 0, 0}, sums[2] = {0, 0};
  int reference = -1;
  const int64_t padded = s.panels * SHORT_PANEL;
  for (int first = 0; first < s.splits && has_references; first += MERGE_THREADS) {
    __syncthreads();
    const int parts = min(s.splits - first, MERGE_THREADS);
    if (tid < parts) {
      const Total of_part = s.totals[(first + tid) * s.stride + local];
      const double weight = of_part.best == -INFINITY && !isnan(of_part.weights)
                                ? 0.0
                                : exp2((static_cast<double>(of_part.best) - best) * f.rate - WEIGHT_BITS);
      factors[tid] = weight;
      if (weight != 0) {
        totals[0] += weight * of_part.weights;
        totals[1] += weight * weight * of_part.squares;
        totals[2] += weight * of_part.norms;
      }
      if (of_part.best == best && best > -INFINITY)
        totals[3] += of_part.copies, reference = max(reference, of_part.reference);
    }
    __syncthreads();
    const float* from = s.sums + (first * s.stride + local) * padded + tid;
    for (int p = 0; p < parts; ++p, from += s.stride * padded) {
      const double weight = factors[p];
      if (tid < padded) sums[0] = fma(weight, static_cast<double>(from[0]), sums[0]);
      if (tid + MERGE_THREADS < padded)
        sums[1] = fma(weight, static_cast<double>(from[MERGE_THREADS]), sums[1]);
    }
  }
  block_sums(totals, scratch);
  reference = block_max<int>(reference, reinterpret_cast<int*>(scratch));
  const double unit = ldexp(1.0, -shift_of(facts.magnitude));
  const Joined joined = join(in, level, has_references, of_source, rate);
  const double total = totals[0] * joined.of_references + joined.with_source;
  const bool good = alive && (has_references || in.source.data) && total > 0;
  const double inverse = good ? 1 / total : NAN;

  // Squares: of the mean less the centre, the output, the noise, the best reference less the mean. Its score.
  double squares[5] = {0, 0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t e = tid + i * MERGE_THREADS;
    if (e >= in.d) continue;
    const double c = facts.centre[e];
    double sum = sums[i] * unit * joined.of_references;
    const int64_t at = index * in.d + e;
    if (in.source.data) sum = fma(joined.with_source, load_as<double>(in.source, at) - c, sum);
    const double mean = sum * inverse, out = row.a * load_as<double>(in.x, at) + row.b * (c + mean),
                 noise = y[e] - row.alpha * mean;
    store_as(in.out, at, out);
    squares[0] = fma(mean, mean, squares[0]);
    squares[1] = fma(out, out, squares[1]);
    squares[2] = fma(noise, noise, squares[2]);
    if (reference < 0 || !good) continue;
    const double d = load_as<double>(in.refs, reference * in.d + e) - c;
    squares[3] = fma(d - mean, d - mean, squares[3]);
    squares[4] = fma(fma(-0.5 * row.alpha, d, y[e]), d, squares[4]);
  }
  block_sums(squares, scratch);

  bool doubtful = false, moves = false;
  if (reference >= 0 && good) {
    // What scores are off by: 16 products at a time are cut to two bits more than float32 has, then with the
    // sum so far to float32's digits. Sums grow with D, and so do the cuts; then rounding.
    const double of_all =
                     totals[2] * joined.of_references * unit * unit + joined.with_source * square_of_source,
                 norm = of_all * inverse, half = 0.5 * row.alpha * norm, product = level + half;
    const double cuts = 0.3 + static_cast<double>(in.d * in.d) / (192 * 192);
    const double error =
        SCORE_ERROR * row.rate() *
        sqrt(cuts * product * product + square * norm / 32 + 0.3 * (level * level + half * half));
    // By how much that moves the mean: the best, with all that have its score; others, each for itself.
    const double own = totals[3] * joined.of_references * inverse,
                 spread = fmax(norm - squares[0] - NO_SPREAD * norm, 0.0);
    double moved, rest;
    bool few = true;
    if (in.source.data) {
      const double share = fmax(own, joined.with_source * inverse);
      rest = fmax(1 - share, 0.0);
      moved = 2 * SOURCE_ERROR * SOURCE_ERROR * fmin(share, rest) * spread;
    } else {
      rest = fmax(1 - own, 0.0);
      const double squared = totals[1] * inverse * inverse;
      const double of_others = sqrt(fmax(squared - own * inverse, 0.0)),
                   largest = fmin(fmin(inverse, rest), of_others);
      few = totals[3] > 1 || of_others > 0.7 * rest;
      moved = 2 * own * own * squares[3] + largest * fmax(spread - own * squares[3], 0.0);
    }
    const double alike = norm > 0 ? ALIKE * squares[0] / norm : 0;
    moved += alike * alike * spread;
    const double limit = (s.exact ? DOUBT_EXACT : DOUBT_FAST) * (few ? 1 : MANY);
    double scale = squares[1] / (row.b * row.b);
    if (in.lse.data && row.alpha > 0) scale = fmin(scale, squares[2] / (row.alpha * row.alpha));
    doubtful = (moved * error * error > limit * limit * scale ||
                (s.exact && rest > NO_SPREAD && squares[0] * SUM_ERROR * SUM_ERROR > scale)) &&
               (fabs(level) + fabs(half)) * rate < LARGEST_SCORE;
    // Of references elsewhere nothing is known; they may be as far away as those here are.
    moves = in.partial && error * error * facts.mean_norm / 4 > limit * limit * scale;
  }
  if (doubtful && tid == 0) s.doubtful[atomicAdd(s.doubts, 1)] = {local, squares[4]};
  if (!in.lse.data) return;
  level = joined.level;
  if (moves) level = squares[4];
  if (tid == 0) write_row_lse(in, row, index, good ? total : NAN, level, square);
}

struct Settled {             // of a row that is evaluated again
  double level, rate, half;  // the score that weights are relative to; of scores, base 2; alpha / 2
  double square, of_source;  // |y|^2, the source's score
};

// 16-bit and float32 elements become float64 by moving their bits, times a power of two that is left to the
// instruction that takes the centre off: conversions are slow. Subnormal ones come out right; others are
// finite whatever they were, since rows beside references that are not have no mean to doubt.
template <typename T>
constexpr double WIDE_SCALE = std::is_same_v<T, __half> ? 0x1p1008 : 0x1p896;

template <typename T, int COUNT>
struct Words {  // so many elements as they lie in memory
  unsigned at[COUNT * sizeof(T) / 4];
};
// Elements e to e + COUNT - 1 of samples that begin at these offsets, zeros beyond the last element.
template <typename T, int COUNT>
__device__ void load_words(const T* from, const int (&offsets)[4], int e, int d, bool vectors,
                           Words<T, COUNT> (&words)[4]) {
  constexpr int BYTES = COUNT * sizeof(T);
  static_assert(BYTES == 8 || BYTES == 16);
  using Vector = std::conditional_t<BYTES == 16, uint4, uint2>;
  if (vectors) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Vector v = e < d ? *reinterpret_cast<const Vector*>(from + offsets[i] + e) : Vector{};
      memcpy(words[i].at, &v, sizeof(v));
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        const auto* const bits = reinterpret_cast<const unsigned*>(from + offsets[i]);
        words[i].at[k] = e + k < d ? bits[e + k] : 0;
      } else {
        const auto* const bits = reinterpret_cast<const unsigned short*>(from + offsets[i]);
        const unsigned upper = k % 2 ? words[i].at[k / 2] : 0;
        words[i].at[k / 2] = upper | (e + k < d ? static_cast<unsigned>(bits[e + k]) : 0) << 16 * (k % 2);
      }
    }
  }
}
// Element k less c.
template <typename T, int COUNT>
__device__ double difference(const Words<T, COUNT>& words, int k, double c) {
  unsigned high, low = 0;
  if constexpr (sizeof(T) == 4) {
    const unsigned w = words.at[k];
    high = (w & 0x80000000u) | (w & 0x7fffffffu) >> 3, low = w << 29;
  } else {
    const unsigned w = k % 2 ? words.at[k / 2] : words.at[k / 2] << 16;  // its bits are the upper ones
    constexpr int UNUSED = std::is_same_v<T, __half> ? 6 : 3;            // exponents of float64 have more
    high = (w & 0x80000000u) | (w & 0x7fff0000u) >> UNUSED;
  }
  return fma(__hiloint2double(static_cast<int>(high), static_cast<int>(low)), WIDE_SCALE<T>, -c);
}

// c += a b^T in float64: 16 x 16 by 8 x 16. Lane 4 g + t has rows g and g + 8 of a, alternating, at t, t + 4,
// t + 8 and t + 12; of b row g at these; of c rows g and g + 8 at 2 t and 2 t + 1.
__device__ void multiply_add(double (&c)[4], const double (&a)[8], double2 b01, double2 b23) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm("mma.sync.aligned.m16n8k16.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7, %8, %9, %10, "
      "%11}, "
      "{%12, %13, %14, %15}, {%0, %1, %2, %3};"
      : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
      : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(a[4]), "d"(a[5]), "d"(a[6]), "d"(a[7]), "d"(b01.x),
        "d"(b01.y), "d"(b23.x), "d"(b23.y));
#endif
}

constexpr double NO_WEIGHT = -64, MUCH_WEIGHT = 512;  // log2, beside the level

// Rows in doubt once more, in float64: eight side by side, beside a share of all references, by the matrix
// units. A warp scores 32 references for all of them; then it adds up 32 elements of the references that have
// weight, of all of these or of a part. Weights are relative to a reference near the best, if not to a better
// one that is far above it. Who comes last has the shares of all.
template <typename T>
__global__ void __launch_bounds__(SETTLE_THREADS, 2) settle_kernel(const Inputs in, const Short s) {
  constexpr int ROWS = SHORT_SETTLE_ROWS, THREADS = SETTLE_THREADS, WARPS = THREADS / 32;
  static_assert(ROWS == WARPS && ROWS == 8, "a warp ends a row; they are the width of a product");
  constexpr int AT_ONCE = 16 / sizeof(T);  // elements that a lane loads: 16, or 32, by four lanes
  constexpr int UNIT = 32;                 // elements of a warp's sums
  // By steps of 16 elements, as lanes have them; by reference.
  __shared__ __align__(16) double y[MOST_D * ROWS], weights[THREADS * ROWS], centre[MOST_D];
  __shared__ double totals[WARPS][ROWS];
  __shared__ Settled settled[ROWS];
  __shared__ unsigned weighty[WARPS];  // bits: sixteen references of a warp
  __shared__ double tops[WARPS][ROWS];
  __shared__ bool last;
  follow_previous();
  const int count = *s.doubts;
  if (count == 0) return;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  const int padded = s.panels * static_cast<int>(SHORT_PANEL), d = static_cast<int>(in.d);
  const int64_t valid = valid_count(in, 0), tiles = (valid + THREADS - 1) / THREADS;
  const int groups = (count + ROWS - 1) / ROWS;
  const int64_t most =
      min(static_cast<int64_t>(gridDim.x) / groups, int64_t{THREADS});  // factors have room for
  const int shares = static_cast<int>(max(min(most, tiles), int64_t{1}));
  const bool vectors = loads_vectors(in.refs, in.d);
  const T* const refs = static_cast<const T*>(in.refs.data);
  if (tid < MOST_D) centre[tid] = tid < d ? s.facts->centre[tid] : 0.0;
  // What a warp adds up: elements first_element to first_element + 3 of a lane's, of one of `parts` of a
  // tile.
  const int units = padded / UNIT, parts = WARPS / units, part = warp / units,
            first_element = warp % units * UNIT + 4 * g;
  unsigned own_references = (1u << 2 * WARPS / parts) - 1;  // bits: sixteens of a tile
  own_references = part < parts ? own_references << 2 * WARPS / parts * part : 0;

  for (int64_t item = blockIdx.x; item < static_cast<int64_t>(groups) * shares; item += gridDim.x) {
    const int group = static_cast<int>(item / shares), share = static_cast<int>(item % shares);
    const Doubt* const doubtful = s.doubtful + static_cast<int64_t>(group) * ROWS;
    const int rows = min(count - group * ROWS, ROWS);
    __syncthreads();
    {  // a warp has a row
      Settled own{};
      const int64_t index = warp < rows ? s.first_row + doubtful[warp].row : 0;
      const Row row = row_coefficients(in, index);
      for (int e = lane; e < padded; e += 32) {
        double value = 0;
        if (warp < rows && e < d) {
          value = row.sign * load_as<double>(in.x, index * in.d + e) - row.alpha * centre[e];
          own.square = fma(value, value, own.square);
          if (in.source.data) {
            const double source = load_as<double>(in.source, index * in.d + e) - centre[e];
            own.of_source += (value - 0.5 * row.alpha * source) * source;
          }
        }
        const int step = e / (4 * AT_ONCE) * (AT_ONCE / 4) + e % AT_ONCE / 4, of_lane = e / AT_ONCE % 4,
                  i = e % 4;
        y[((2 * step + i / 2) * 32 + 4 * warp + of_lane) * 2 + i % 2] = value;
      }
      own.square = warp_sum(own.square), own.of_source = warp_sum(own.of_source);
      if (warp < rows)
        own.level = doubtful[warp].level, own.rate = row.rate() * LOG2_E, own.half = 0.5 * row.alpha;
      if (lane == 0) settled[warp] = own;
    }
    __syncthreads();

    double total[2] = {}, sums[2][4] = {};  // of rows 2 t and 2 t + 1
    const int64_t end = tiles * (share + 1) / shares;
    for (int64_t tile = tiles * share / shares; tile < end; ++tile) {
      const int64_t first = tile * THREADS, own_first = first + 32 * warp + g;
      double scores[2][4] = {}, norms[2][2] = {};
      const T* const from = refs + first * d;
      int offsets[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        offsets[i] = static_cast<int>(min(own_first + 8 * i, valid - 1) - first) * d;
      Words<T, AT_ONCE> next[4];
      load_words(from, offsets, AT_ONCE * t, d, vectors, next);
#pragma unroll 1
      for (int e = AT_ONCE * t, step = 0; e < padded; e += 4 * AT_ONCE) {
        Words<T, AT_ONCE> words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = next[i];
        load_words(from, offsets, e + 4 * AT_ONCE, d, vectors, next);
#pragma unroll
        for (int k = 0; k < AT_ONCE; k += 4, ++step) {
          const double2* const of_rows = reinterpret_cast<const double2*>(y) + 2 * step * 32 + lane;
          const double2* const of_centre = reinterpret_cast<const double2*>(centre + e + k);
          const double2 b01 = of_rows[0], b23 = of_rows[32], c01 = of_centre[0], c23 = of_centre[1];
          const double c[4] = {c01.x, c01.y, c23.x, c23.y};
#pragma unroll
          for (int a = 0; a < 2; ++a) {
            double own[8];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
              for (int b = 0; b < 2; ++b) {
                own[2 * i + b] = difference(words[2 * a + b], k + i, c[i]);
                norms[a][b] = fma(own[2 * i + b], own[2 * i + b], norms[a][b]);
              }
            }
            multiply_add(scores[a], own, b01, b23);
          }
        }
      }
      bool has_much = false;
#pragma unroll
      for (int a = 0; a < 2; ++a) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          double norm = norms[a][b];
          norm += __shfl_xor_sync(0xffffffffu, norm, 1), norm += __shfl_xor_sync(0xffffffffu, norm, 2);
#pragma unroll
          for (int q = 0; q < 2; ++q) {
            const Settled& own = settled[2 * t + q];
            double& exponent = scores[a][2 * b + q];
            exponent = own_first + 16 * a + 8 * b < valid && 2 * t + q < rows
                           ? (exponent - own.half * norm - own.level) * own.rate
                           : -INFINITY;
            has_much = has_much || exponent > MUCH_WEIGHT;
          }
        }
      }
      if (__syncthreads_or(has_much)) {  // the best of these is what weights are relative to from here on
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          double top = fmax(fmax(scores[0][q], scores[0][2 + q]), fmax(scores[1][q], scores[1][2 + q]));
          for (int hop = 16; hop > 2; hop /= 2) top = fmax(top, __shfl_xor_sync(0xffffffffu, top, hop));
          if (g == 0) tops[warp][2 * t + q] = top;
        }
        __syncthreads();
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          const int r = 2 * t + q;
          double more = 0;
          for (int w = 0; w < WARPS; ++w) more = fmax(more, tops[w][r]);
          if (!(more > MUCH_WEIGHT)) more = 0;  // what is beside a row, which changes, leaves it as it is
          const double keep = exp2(-more);
          total[q] *= keep;
#pragma unroll
          for (int a = 0; a < 2; ++a) {
            scores[a][q] -= more, scores[a][2 + q] -= more;
            sums[a][q] *= keep, sums[a][2 + q] *= keep;
          }
          if (tid < 4 && r < rows && more > 0) settled[r].level += more / settled[r].rate;
        }
      }
      unsigned bits = 0;
#pragma unroll
      for (int a = 0; a < 2; ++a) {
        bool has_weight = false;
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          double weight[2] = {};
#pragma unroll
          for (int q = 0; q < 2; ++q) {
            const double exponent = scores[a][2 * b + q];
            if (exponent > NO_WEIGHT) weight[q] = exp2(exponent), has_weight = true;
            total[q] += weight[q];
          }
          reinterpret_cast<double2*>(weights + (32 * warp + 16 * a + 8 * b + g) * ROWS)[t] = {weight[0],
                                                                                              weight[1]};
        }
        bits |= __any_sync(0xffffffffu, has_weight) ? 1u << a : 0;
      }
      if (lane == 0) weighty[warp] = bits;
      __syncthreads();
      unsigned left = 0;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) left |= weighty[w] << 2 * w;
      left &= own_references;
      if (left) {
        const double2* const of_centre = reinterpret_cast<const double2*>(centre + first_element);
        const double2 c01 = of_centre[0], c23 = of_centre[1];
        const double c[4] = {c01.x, c01.y, c23.x, c23.y};
        Words<T, 4> coming[4];
        const auto load = [&](int sixteen) {
          int of_sixteen[4];
#pragma unroll
          for (int i = 0; i < 4; ++i)
            of_sixteen[i] = static_cast<int>(min(first + 16 * sixteen + t + 4 * i, valid - 1) - first) * d;
          load_words(from, of_sixteen, first_element, d, vectors, coming);
        };
        int sixteen = __ffs(static_cast<int>(left)) - 1;
        load(sixteen);
#pragma unroll 1
        while (left) {
          left &= left - 1;
          Words<T, 4> words[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) words[i] = coming[i];
          const double* const of_rows = weights + (16 * sixteen + t) * ROWS + g;
          const double2 b01{of_rows[0], of_rows[4 * ROWS]}, b23{of_rows[8 * ROWS], of_rows[12 * ROWS]};
          sixteen = __ffs(static_cast<int>(left)) - 1;
          if (left) load(sixteen);
#pragma unroll
          for (int a = 0; a < 2; ++a) {
            double own[8];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
              for (int b = 0; b < 2; ++b) own[2 * i + b] = difference(words[i], 2 * a + b, c[2 * a + b]);
            }
            multiply_add(sums[a], own, b01, b23);
          }
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int r = 2 * t + q;
      for (int hop = 16; hop > 2; hop /= 2) total[q] += __shfl_xor_sync(0xffffffffu, total[q], hop);
      if (g == 0) totals[warp][r] = total[q];
      if (part >= parts) continue;
#pragma unroll
      for (int a = 0; a < 2; ++a) {
#pragma unroll
        for (int b = 0; b < 2; ++b)
          weights[(part * ROWS + r) * padded + first_element + 2 * a + b] = sums[a][2 * b + q];
      }
    }
    __syncthreads();

    // Row `warp`, from here on.
    const int64_t at = item * ROWS + warp;
    double all = 0;
    for (int w = 0; w < WARPS; ++w) all += totals[w][warp];
    const auto sum_of = [&](int e) {
      double sum = 0;
      for (int p = 0; p < parts; ++p) sum += weights[(p * ROWS + warp) * padded + e];
      return sum;
    };
    if (shares > 1) {
      if (lane == 0) s.settling.totals[at] = all, s.settling.levels[at] = settled[warp].level;
      if (all != 0)
        for (int e = lane; e < padded; e += 32) s.settling.sums[at * padded + e] = sum_of(e);
      __threadfence();
      __syncthreads();
      if (tid == 0) last = atomicAdd(s.settling.arrived + group, 1) == shares - 1;
      __syncthreads();
      if (!last) continue;
      __threadfence();
      if (tid == 0) s.settling.arrived[group] = 0;
    }
    if (warp >= rows) continue;
    const int64_t of_group = static_cast<int64_t>(group) * shares * ROWS + warp;
    const Settled& own = settled[warp];
    double level = own.level;
    double* const factors = weights + warp * THREADS;  // of shares, relative to the level of all
    if (shares > 1) {
      for (int p = lane; p < shares; p += 32)
        level = fmax(level, __ldcg(s.settling.levels + of_group + p * ROWS));
      for (int hop = 16; hop > 0; hop /= 2) level = fmax(level, __shfl_xor_sync(0xffffffffu, level, hop));
      all = 0;
      for (int p = lane; p < shares; p += 32) {
        const double of_share = __ldcg(s.settling.totals + of_group + p * ROWS);
        // Sums of a share without weight were not written.
        factors[p] =
            of_share != 0 ? exp2((__ldcg(s.settling.levels + of_group + p * ROWS) - level) * own.rate) : 0.0;
        all = fma(factors[p], of_share, all);
      }
      all = warp_sum(all);
      __syncwarp();
    }
    const int64_t index = s.first_row + doubtful[warp].row;
    const Row row = row_coefficients(in, index);
    const Joined joined = join(in, level, true, own.of_source, own.rate);
    all = all * joined.of_references + joined.with_source;
    constexpr int ELEMENTS = 4, SHARES = 8;  // elements of a lane, and shares, on their way from memory
    for (int first = lane; first < d; first += 32 * ELEMENTS) {
      double of_element[ELEMENTS] = {};
      if (shares > 1) {
        for (int p0 = 0; p0 < shares; p0 += SHARES) {
          double v[SHARES][ELEMENTS];
#pragma unroll
          for (int q = 0; q < SHARES; ++q) {
            const bool has = p0 + q < shares && factors[p0 + q] != 0;
            const double* const from = s.settling.sums + (of_group + (p0 + q) * ROWS) * padded + first;
#pragma unroll
            for (int i = 0; i < ELEMENTS; ++i)
              v[q][i] = has && first + 32 * i < d ? __ldcg(from + 32 * i) : 0.0;
          }
#pragma unroll
          for (int q = 0; q < SHARES; ++q) {
            const double factor = p0 + q < shares ? factors[p0 + q] : 0.0;
#pragma unroll
            for (int i = 0; i < ELEMENTS; ++i) of_element[i] = fma(factor, v[q][i], of_element[i]);
          }
        }
      } else {
        for (int i = 0; i < ELEMENTS; ++i)
          if (first + 32 * i < d) of_element[i] = sum_of(first + 32 * i);
      }
#pragma unroll
      for (int i = 0; i < ELEMENTS; ++i) {
        const int e = first + 32 * i;
        if (e >= d) continue;
        const double c = centre[e];
        double sum = of_element[i] * joined.of_references;
        if (in.source.data)
          sum = fma(joined.with_source, load_as<double>(in.source, index * in.d + e) - c, sum);
        store_as(in.out, index * in.d + e,
                 row.a * load_as<double>(in.x, index * in.d + e) + row.b * (c + sum / all));
      }
    }
    if (in.lse.data && lane == 0) write_row_lse(in, row, index, all, joined.level, own.square);
  }
}

// ---- host

template <int PANELS>
void launch_weigh(const char* op, const Inputs& in, const Short& s, const Plan& plan, cudaStream_t stream) {
  const auto kernel = s.exact ? weigh_kernel<PANELS, true> : weigh_kernel<PANELS, false>;
  check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(plan.smem_bytes)));
  const dim3 grid(static_cast<unsigned>((s.rows + SHORT_ROWS - 1) / SHORT_ROWS),
                  static_cast<unsigned>(s.splits));
  launch_following(op, true, kernel, grid, SHORT_THREADS, plan.smem_bytes, stream, in, s);
}

}  // namespace

void run_short_rows(const char* op, const Inputs& in, const Plan& plan, void* workspace,
                    cudaStream_t stream) {
  const int64_t rounds = ceil_div(in.m, plan.refs_per_pass);
  Short s;
  s.panels = static_cast<int>(plan.tile_d / SHORT_PANEL), s.splits = static_cast<int>(plan.splits);
  s.exact = !plan.fast, s.stride = plan.rows_per_pass;
  const ShortLayout layout = short_layout(in.d, plan.rows_per_pass, plan.refs_per_pass, s.splits);
  char* at = static_cast<char*>(workspace);
  const auto take = [&at](int64_t bytes) {
    char* const piece = at;
    at += bytes;
    return piece;
  };
  s.facts = reinterpret_cast<Facts*>(take(layout.facts));
  s.tiles = take(layout.refs);
  s.norms = reinterpret_cast<float*>(take(layout.norms));
  s.queries = take(layout.rows);
  s.factors = reinterpret_cast<Factors*>(take(layout.factors));
  s.sums = reinterpret_cast<float*>(take(layout.sums));
  s.totals = reinterpret_cast<Total*>(take(layout.totals));
  char* const doubts = take(layout.doubts);
  s.doubts = reinterpret_cast<int*>(doubts), s.doubtful = reinterpret_cast<Doubt*>(doubts + sizeof(Doubt));
  constexpr int64_t SETTLED = SHORT_SETTLE_BLOCKS * SHORT_SETTLE_ROWS;
  s.settling.totals = reinterpret_cast<double*>(take(8 * SETTLED));
  s.settling.levels = reinterpret_cast<double*>(take(8 * SETTLED));
  s.settling.sums = reinterpret_cast<double*>(take(8 * SETTLED * plan.tile_d));
  s.settling.arrived = reinterpret_cast<int*>(take(4 * SHORT_SETTLE_BLOCKS));

  centre_kernel<<<1, CENTRE_THREADS, 0, stream>>>(in, s);
  check_launch(op);
  const int64_t each = PREPARE_THREADS / 32 * (s.panels <= 2 ? 4 / s.panels : 1);  // samples of a block
  const auto blocks = [each](int64_t samples) { return static_cast<unsigned>(ceil_div(samples, each)); };
  const unsigned most = static_cast<unsigned>(std::clamp<int64_t>(ceil_div(in.m, 4 * each), 1, 1024));
  launch_following(op, true, magnitude_kernel, dim3(most), PREPARE_THREADS, 0, stream, in, s);
  for (s.first_row = 0; s.first_row < in.n; s.first_row += plan.rows_per_pass) {
    s.rows = std::min(plan.rows_per_pass, in.n - s.first_row);
    for (int64_t round = 0; round < rounds; ++round) {
      s.first_ref = round * plan.refs_per_pass, s.refs = plan.refs_per_pass;
      const unsigned of_refs = rounds > 1 || s.first_row == 0 ? blocks(s.refs) : 0,
                     of_rows = round == 0 ? blocks(plan.rows_per_pass) : 0;
      if (of_refs + of_rows > 0) {
        launch_following(op, true, prepare_kernel, dim3(of_refs + of_rows), PREPARE_THREADS, 0, stream, in, s,
                         of_refs);
      }
      const auto weigh = s.panels == 1   ? launch_weigh<1>
                         : s.panels == 2 ? launch_weigh<2>
                         : s.panels == 3 ? launch_weigh<3>
                                         : launch_weigh<4>;
      weigh(op, in, s, plan, stream);
    }
    launch_following(op, true, merge_kernel, dim3(static_cast<unsigned>(s.rows)), MERGE_THREADS, 0, stream,
                     in, s);
    const auto settle = in.refs.dtype == Dtype::f16    ? settle_kernel<__half>
                        : in.refs.dtype == Dtype::bf16 ? settle_kernel<__nv_bfloat16>
                                                       : settle_kernel<float>;
    launch_following(op, true, settle, dim3(SHORT_SETTLE_BLOCKS), SETTLE_THREADS, 0, stream, in, s);
  }
}

}  // namespace svel::cuda
