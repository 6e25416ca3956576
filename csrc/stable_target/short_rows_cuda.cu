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
// What blocks have found of a row is merged in float64. Where scores are large for their digits, blocks list
// references near the best; the merge scores these again, in float64, and adds what their weights were off
// by.
//
// precision = "fast": one part of everything, no lists.
#include "common/planner_short.h"
#include "common/wgmma.cuh"
#include "stable_target/launch.cuh"
#include "stable_target/scan.cuh"

namespace svel::cuda {
namespace {

constexpr int CENTRE_THREADS = 1024, CENTRE_REFS = 256;  // of which the centre is the mean
constexpr int PREPARE_THREADS = 256;
constexpr int MERGE_THREADS = 128;
constexpr int MOST_LISTED = 256;  // of a row; of more the errors average out
constexpr int MOST_D = static_cast<int>(SHORT_MOST_PANELS * SHORT_PANEL);
constexpr int LARGEST = 14;        // largest values have this exponent, as float16
constexpr int MOST_SHIFT = 60;     // of the exponents of values
constexpr float WEIGHT_BITS = 14;  // the largest weight is 2^14: what is left of small ones is not subnormal

struct Facts {  // of all references
  float centre[MOST_D];
  int low;             // whether references have a second part
  float mean_norm;     // of |d|^2, about
  unsigned magnitude;  // the bits of the largest |d|, or what gives the same scale
};
static_assert(sizeof(Facts) <= SHORT_FACTS_BYTES);

// Of a row, for scores in units of 2^-shift: s = y.d - half norm, where norms are in units of the references'
// scale; log2 of a weight is rate s. Then what tells by how much s may be off, see error_of.
struct Factors {
  float rate, half, unit, of_norm, spread;
  int shift;
  int unused[2];
};
static_assert(sizeof(Factors) == 32);

struct Short {
  Facts* facts;
  char* tiles;    // tiles x parts x panels x references of a tile x 128 bytes, as they lie in shared memory
  float* norms;   // |d|^2
  char* queries;  // 64 rows: parts x panels x 64 x 128 bytes
  Factors* factors;  // (rows,)
  float* sums;       // (splits, rows, padded d)
  float2* totals;    // (splits, rows): sum of weights, and the score that they are relative to
  float2*
      headers;    // (splits, rows, SHORT_LANES): how many of, as an int, and above which score there are all
  float2* lists;  // (splits, rows, SHORT_LANES, SHORT_LISTED): a reference, as an int, and its score
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
  const int tile_refs = short_tile_refs(s.panels), parts = s.exact && s.facts->low ? 2 : 1;
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
  double square = 0;
  if (alive) {
    load_chunk(in.x, s.first_row + local, in.d, lanes.chunk, loads_vectors(in.x, in.d), v);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if (8 * lanes.chunk + k >= in.d) continue;
      const double y = row.sign * v[k] - row.alpha * facts.centre[8 * lanes.chunk + k];
      v[k] = static_cast<float>(y);
      square = fma(y, y, square);
      largest = fmaxf(largest, fabsf(v[k]));
    }
  }
  square = lanes.reduce(square, [](double a, double b) { return a + b; });
  largest = lanes.reduce(largest, [](float a, float b) { return fmaxf(a, b); });
  if (!lanes.active || local >= s.stride) return;
  const int own = shift_of(__float_as_uint(largest)), of_refs = shift_of(facts.magnitude),
            shift = own + of_refs;
  const int64_t part_bytes = static_cast<int64_t>(s.panels) * 64 * 128;
  char* const high = s.queries + local / 64 * (s.exact ? 2 : 1) * part_bytes +
                     place_of(lanes.chunk, static_cast<int>(local % 64), 64);
  store_parts(v, power(own), high, s.exact ? high + part_bytes : nullptr);
  if (lanes.chunk != 0) return;
  Factors to{};
  to.rate = 1e-36f;  // not zero: less than all scores of a row is -INFINITY
  if (alive) {
    const double rate = row.rate() * LOG2_E, unit = ldexp(1.0, shift);
    to.rate = fmaxf(static_cast<float>(rate / unit), to.rate);
    to.half = static_cast<float>(ldexp(0.5 * row.alpha, own - of_refs));
    to.of_norm = static_cast<float>(0.5 * row.alpha * facts.mean_norm * unit);
    to.spread = static_cast<float>(square * unit * facts.mean_norm * unit / 32);
    to.unit = static_cast<float>(row.rate() / unit * (6e-8 / 5e-7));
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

// What scores may be off by, over 5e-7 of a logit: a product of so many steps of 16, each cut to float32's
// digits, and the rounding of the score and the norm. best: in the row's units.
__device__ float error_of(const Factors& f, float best, int64_t d) {
  const float product = best + f.of_norm;
  return f.unit * sqrtf(static_cast<float>(d) / 64 * product * product + f.spread +
                        0.3f * (best * best + f.of_norm * f.of_norm));
}
// References with less than the best score by this need no better score.
__device__ float margin_of(float error, float rate) {
  return 2 * log2f(error) / rate;
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

template <int PANELS, bool EXACT>
struct Shape {
  static constexpr int REFS = short_tile_refs(PANELS), SLOTS = short_slots(PANELS);
  static constexpr int PANEL_BYTES = REFS * 128, TILE_BYTES = PANELS * PANEL_BYTES;
  static constexpr int ROW_PART_BYTES = PANELS * 64 * 128;  // of 64 rows
  static constexpr int ROW_BYTES = (EXACT ? 2 : 1) * ROW_PART_BYTES;
};

template <typename S>
__device__ void next(Ring& ring) {
  if (++ring.at == S::SLOTS) ring.at = 0, ring.parity ^= 1;
}

// One thread: the rows, then all tiles in turn, part by part.
template <int PANELS, bool EXACT>
__device__ void copy_tiles(const Short& s, Ring ring, char* rows, Barrier* rows_full, int64_t begin,
                           int64_t end, bool low) {
  using S = Shape<PANELS, EXACT>;
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

// A warpgroup's tiles. LOW: references have two parts. Of its 64 rows a thread has two, 8 apart: see
// product() in wgmma.cuh.
template <int PANELS, bool EXACT, bool LOW>
__device__ __forceinline__ void weigh_tiles(const Inputs& in, const Short& s, Ring ring, uint32_t rows,
                                            int begin, int end, int valid) {
  using S = Shape<PANELS, EXACT>;
  constexpr int REFS = S::REFS, HALVES = REFS / 64, PIECES = PANELS * HALVES;
  constexpr int BUFFERS = PANELS <= 2 ? 2 : 1;
  const int lane = threadIdx.x % 32, quad = lane % 4;
  const int64_t part = blockIdx.y;
  const int row0 = static_cast<int>(blockIdx.x * SHORT_ROWS + threadIdx.x / 32 * 16) + lane / 4;
  float rate[2], half[2], best[2], lowest[2], total[2] = {0, 0};
  int listed[2] = {0, 0};
  float floor[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const Factors& f = s.factors[row0 + 8 * h];
    rate[h] = f.rate, half[h] = f.half, best[h] = -INFINITY, lowest[h] = INFINITY;
  }
  float sums[PANELS * 32];
#pragma unroll
  for (int i = 0; i < PANELS * 32; ++i) sums[i] = 0;
  if (s.first_ref > 0) {  // goes on where the round before has ended
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t at = part * s.stride + row0 + 8 * h;
      const float2 before = s.totals[at];
      total[h] = quad == 0 ? before.x : 0.0f, best[h] = before.y;
      if constexpr (EXACT) {
        const float2 header = s.headers[at * SHORT_LANES + quad];
        listed[h] = __float_as_int(header.x), floor[h] = header.y;
        const float error = error_of(s.factors[row0 + 8 * h], best[h], in.d);
        if (error > 1) lowest[h] = fmaxf(best[h] - margin_of(error, rate[h]), floor[h]);
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
    uint32_t low = 0;
    Barrier* low_empty = nullptr;

    // The smallest products are added first.
    float scores[REFS / 2];
    start_products();
    if constexpr (EXACT) {
      add_scores<PANELS, REFS, true>(scores, rows + S::ROW_PART_BYTES, high);
      if constexpr (LOW) {
        low = shared_address(ring.slots + ring.at * S::TILE_BYTES);
        low_empty = ring.empty + ring.at;
        wait_barrier(ring.full + ring.at, ring.parity);
        next<S>(ring);
        add_scores<PANELS, REFS, false>(scores, rows, low);
      }
    }
    add_scores<PANELS, REFS, !EXACT>(scores, rows, high);
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
    bool near = false;
    float before[2], most[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      most[h] = -INFINITY;
#pragma unroll
      for (int i = 0; i < REFS / 8; ++i)
        most[h] = fmaxf(most[h], fmaxf(scores[4 * i + 2 * h], scores[4 * i + 2 * h + 1]));
      most[h] = fmaxf(most[h], __shfl_xor_sync(0xffffffffu, most[h], 1));
      most[h] = fmaxf(most[h], __shfl_xor_sync(0xffffffffu, most[h], 2));
      before[h] = best[h];
      best[h] = fmaxf(best[h], most[h]);
      keep[h] = exp2_approx((before[h] - best[h]) * rate[h]);
      near = near || most[h] > before[h] || most[h] >= lowest[h];
    }
    if (EXACT && __any_sync(0xffffffffu, near)) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (!(most[h] > before[h] || most[h] >= lowest[h])) continue;
        const float error = error_of(s.factors[row0 + 8 * h], best[h], in.d);
        lowest[h] = error > 1 ? fmaxf(best[h] - margin_of(error, rate[h]), floor[h]) : INFINITY;
        if (before[h] < lowest[h]) listed[h] = 0;  // all that are listed have less than these
        if (!(error > 1)) continue;
        float2* const list = s.lists + ((part * s.stride + row0 + 8 * h) * SHORT_LANES + quad) * SHORT_LISTED;
#pragma unroll
        for (int i = 0; i < REFS / 4; ++i) {
          const float score = scores[i / 2 * 4 + 2 * h + i % 2];
          if (score >= lowest[h]) {
            list[listed[h]++] = {
                __int_as_float(static_cast<int>(s.first_ref) + tile * REFS + i / 2 * 8 + 2 * quad + i % 2),
                score};
          }
        }
        while (listed[h] > SHORT_KEPT) {  // those nearer the best; of equal ones none
          floor[h] = lowest[h] = nextafterf(best[h] - 0.5f * (best[h] - lowest[h]), INFINITY);
          int kept = 0;
#pragma unroll 1
          for (int k = 0; k < listed[h]; ++k) {
            const float2 entry = list[k];
            if (entry.y >= lowest[h]) list[kept++] = entry;
          }
          listed[h] = kept;
        }
      }
    }

    uint32_t weights[REFS / 16][4], rests[REFS / 16][4];
    float added[2] = {0, 0};
#pragma unroll
    for (int k = 0; k < REFS / 16; ++k) {
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const int h = word % 2, at = 4 * (2 * k + word / 2) + 2 * h;
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
          added[h] += a + b;
        } else {
          added[h] += rounded.x + rounded.y;
        }
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) total[h] = fmaf(total[h], keep[h], added[h]);

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
          if constexpr (LOW) {
            const uint64_t of_low = rows_of_128_bytes(low + panel * S::PANEL_BYTES + refs0 * 128);
#pragma unroll
            for (int k = 0; k < 4; ++k) product<1, 1>(sum, weights[refs0 / 16 + k], of_low + k * (2048 >> 4));
          }
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (!EXACT && k == 0) {
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
    total[h] += __shfl_xor_sync(0xffffffffu, total[h], 1);
    total[h] += __shfl_xor_sync(0xffffffffu, total[h], 2);
    if (quad == 0) s.totals[at] = {total[h], best[h]};
    if (EXACT) s.headers[at * SHORT_LANES + quad] = {__int_as_float(listed[h]), floor[h]};
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
  using S = Shape<PANELS, EXACT>;
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
  const bool low = EXACT && s.facts->low;
  if (threadIdx.x >= 256) {
    give_up_registers<24>();
    if (threadIdx.x == 256) copy_tiles<PANELS, EXACT>(s, ring, rows, rows_full, begin, end, low);
  } else {
    take_registers<240>();
    const uint32_t own = shared_address(rows) + threadIdx.x / 128 * S::ROW_BYTES;
    wait_barrier(rows_full, 0);
    if (low) {
      if constexpr (EXACT) weigh_tiles<PANELS, EXACT, true>(in, s, ring, own, begin, end, valid);
    } else {
      weigh_tiles<PANELS, EXACT, false>(in, s, ring, own, begin, end, valid);
    }
  }
#endif
}

// ---- the end

struct Listed {
  int reference;
  float score, of_block;  // and what the block's weights are relative to
};
// What the products made of an element, in units of its scale.
__device__ float two_parts(float d, float scale) {
  const float v = d * scale, high = __half2float(__float2half(v));
  return high + __half2float(__float2half(v - high));
}
constexpr double NOTHING = 1.5e-7;  // of all weight, float32 cannot tell so much from none

// One block per row. What blocks have left of it together, with the exact weights of the references of most
// weight where that shows, and the source.
__global__ void __launch_bounds__(MERGE_THREADS) merge_kernel(const Inputs in, const Short s) {
  __shared__ double scratch[33];
  __shared__ double y[MOST_D], factors[MERGE_THREADS], exact[MOST_LISTED], used[MOST_LISTED];
  __shared__ Listed found[MOST_LISTED], sorted[MOST_LISTED];
  __shared__ int count;
  follow_previous();
  const int tid = threadIdx.x, lane = tid % 32;
  const int64_t local = blockIdx.x, index = s.first_row + local;
  bool alive;
  const Row row = make_row(in, index, 0, alive);
  const Factors f = s.factors[local];
  const Facts& facts = *s.facts;
  const double rate = row.rate() * LOG2_E;
  const bool has_references = alive && row.count > 0;

  double square = 0, of_source = 0;
  for (int64_t e = tid; e < in.d; e += MERGE_THREADS) {
    const double c = facts.centre[e];
    y[e] = row.sign * load_as<double>(in.x, index * in.d + e) - row.alpha * c;
    square = fma(y[e], y[e], square);
    if (!in.source.data) continue;
    const double own = load_as<double>(in.source, index * in.d + e) - c;
    of_source += (y[e] - 0.5 * row.alpha * own) * own;
  }
  if (in.lse.data) square = block_sum<double>(square, scratch);
  if (in.source.data) of_source = block_sum<double>(of_source, scratch);

  float most = -INFINITY;
  for (int p = tid; p < s.splits; p += MERGE_THREADS) most = fmaxf(most, s.totals[p * s.stride + local].y);
  const float best = block_max<float>(most, reinterpret_cast<float*>(scratch));
  const float error = s.exact && has_references ? error_of(f, best, in.d) : 0.0f;
  int listed = 0;
  if (error > 1) {
    // Above which score all are listed; and if these are too many, nearer the best.
    float lowest = best - margin_of(error, f.rate), floor = lowest;
    for (int i = tid; i < s.splits * SHORT_LANES; i += MERGE_THREADS) {
      const int64_t at = i / SHORT_LANES * s.stride + local;
      if (s.totals[at].y >= lowest) floor = fmaxf(floor, s.headers[at * SHORT_LANES + i % SHORT_LANES].y);
    }
    lowest = block_max<float>(floor, reinterpret_cast<float*>(scratch));
    for (listed = MOST_LISTED + 1; listed > MOST_LISTED && lowest <= best;) {
      if (tid == 0) count = 0;
      __syncthreads();
      for (int i = tid; i < s.splits * SHORT_LANES; i += MERGE_THREADS) {
        const int64_t at = i / SHORT_LANES * s.stride + local, list = at * SHORT_LANES + i % SHORT_LANES;
        const float of_block = s.totals[at].y;
        if (!(of_block >= lowest)) continue;
        const int own = __float_as_int(s.headers[list].x);
        for (int k = 0; k < own; ++k) {
          const float2 entry = s.lists[list * SHORT_LISTED + k];
          if (!(entry.y >= lowest)) continue;
          const int to = atomicAdd(&count, 1);
          if (to < MOST_LISTED) found[to] = {__float_as_int(entry.x), entry.y, of_block};
        }
      }
      __syncthreads();
      listed = count;
      lowest = nextafterf(best - 0.5f * (best - lowest), INFINITY);
      __syncthreads();
    }
    if (listed > MOST_LISTED) listed = 0;
  }
  for (int k = tid; k < listed; k += MERGE_THREADS) {  // in an order that does not change
    int place = 0;
    for (int other = 0; other < listed; ++other) place += found[other].reference < found[k].reference;
    sorted[place] = found[k];
  }
  __syncthreads();
  double level = ldexp(static_cast<double>(best), -f.shift),
         kept = 1;  // the score that weights are relative to
  if (listed > 0) {
    for (int k = tid / 32; k < listed; k += MERGE_THREADS / 32) {
      double score = 0;
      for (int64_t e = lane; e < in.d; e += 32) {
        const double d = load_as<double>(in.refs, sorted[k].reference * in.d + e) - facts.centre[e];
        score = fma(fma(-0.5 * row.alpha, d, y[e]), d, score);
      }
      score = warp_sum(score);
      if (lane == 0) exact[k] = score;
    }
    __syncthreads();
    for (int k = tid; k < listed; k += MERGE_THREADS) {
      const Listed& own = sorted[k];
      used[k] = weight_of(own.score, own.of_block, f.rate) *
                exp2((static_cast<double>(own.of_block) - best) * f.rate - WEIGHT_BITS);
    }
    __syncthreads();
    // Scores of the products are off by much the same for all, as their digits are cut and not rounded: by so
    // much as the listed ones are, together, are the others moved.
    double largest = exact[0], off = 0, weights = 0;
    for (int k = 0; k < listed; ++k) {
      largest = fmax(largest, exact[k]);
      off = fma(used[k], exact[k] - ldexp(static_cast<double>(sorted[k].score), -f.shift), off);
      weights += used[k];
    }
    kept = exp2(fmin(fmax((level + off / weights - largest) * rate, -1.0), 1.0));
    level = largest;
    __syncthreads();
    for (int k = tid; k < listed; k += MERGE_THREADS) {
      exact[k] = exp2((exact[k] - level) * rate);
      used[k] *= kept;
    }
  }
  double with_source = 0, of_references = has_references ? 1 : 0;
  if (in.source.data) {
    const double joined = has_references ? fmax(level, of_source) : of_source;
    with_source = exp2((of_source - joined) * rate);
    if (has_references) of_references = exp2((level - joined) * rate);
    level = joined;
  }

  double total = 0, sums[2] = {0, 0};
  const int64_t padded = s.panels * SHORT_PANEL;
  for (int first = 0; first < s.splits && has_references; first += MERGE_THREADS) {
    __syncthreads();
    const int parts = min(s.splits - first, MERGE_THREADS);
    if (tid < parts) {
      const float2 of_part = s.totals[(first + tid) * s.stride + local];
      const double weight = of_part.y == -INFINITY && !isnan(of_part.x)
                                ? 0.0
                                : kept * exp2((static_cast<double>(of_part.y) - best) * f.rate - WEIGHT_BITS);
      factors[tid] = weight;
      total += weight * of_part.x;
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
  total = block_sum<double>(total, scratch);
  double listed_exact = 0, listed_used = 0;
  for (int k = 0; k < listed; ++k) listed_exact += exact[k], listed_used += used[k];
  // Where the list has all the weight it alone counts: then the sums are right but for float32's digits.
  const double rest = total - listed_used;
  const bool alone = listed > 0 && rest < NOTHING * total;
  total = alone ? listed_exact : rest + listed_exact;
  total = total * of_references + with_source;
  const bool good = alive && (has_references || in.source.data) && total > 0;
  const double inverse = good ? 1 / total : NAN, unit = ldexp(1.0, -shift_of(facts.magnitude));
  const float scale = power(shift_of(facts.magnitude));
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t e = tid + i * MERGE_THREADS;
    if (e >= in.d) continue;
    const double c = facts.centre[e];
    double sum = alone ? 0.0 : sums[i] * unit;
    for (int k = 0; k < listed; ++k) {
      const double d = load_as<double>(in.refs, sorted[k].reference * in.d + e) - c;
      sum = fma(exact[k], d, sum);
      if (!alone) sum = fma(-used[k] * unit, two_parts(static_cast<float>(d), scale), sum);
    }
    sum *= of_references;
    const int64_t at = index * in.d + e;
    if (in.source.data) sum = fma(with_source, load_as<double>(in.source, at) - c, sum);
    store_as(in.out, at, row.a * load_as<double>(in.x, at) + row.b * (c + sum * inverse));
  }
  if (!in.lse.data || tid != 0) return;
  const double shift = row.rate() * level - square / (2 * row.sigma * row.sigma);
  store_as(in.lse, index, good ? log(total) + shift + 0.5 * static_cast<double>(in.d) : NAN);
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
  const ShortLayout layout = short_layout(in.d, plan.rows_per_pass, plan.refs_per_pass, s.splits, plan.fast);
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
  s.totals = reinterpret_cast<float2*>(take(layout.totals));
  s.headers = reinterpret_cast<float2*>(take(layout.headers));
  s.lists = reinterpret_cast<float2*>(take(layout.lists));

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
  }
}

}  // namespace svel::cuda
