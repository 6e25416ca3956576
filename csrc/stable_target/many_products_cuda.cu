// The two matrix products of many_rows.cuh: scores (references x rows, summed over D) and weighted sums (D x
// rows, summed over references). 2 rows refs d operations each, per half of the second operand. A tile is 128
// x up to 256, by two warpgroups of 64 x 256. One warp brings stages of 64 deep tiles by tensor copies: 16 KB
// + 32 KB, four in flight. Two thread blocks make a cluster: their first operands differ, their second is the
// same, of which each brings half for both: otherwise the L2 would be as busy as the matrix units.
//
// The first operand is the references, as stored and from shared memory: 128 sums and 64 accumulators a
// thread, of sums that the matrix units only begin; where these finish them, 128. |r_j|^2 is known, or formed
// while products are under way. Where the references have a centre, or are bfloat16, the first operand passes
// through registers: there the centre is subtracted, and |d_j|^2 formed on the way.
#include <type_traits>

#include "common/cluster.cuh"
#include "common/tensor_map.cuh"
#include "common/wgmma.cuh"
#include "stable_target/many_rows.cuh"

namespace svel::cuda {
namespace {

[[maybe_unused]] constexpr int STAGES = MANY_STAGES;
[[maybe_unused]] constexpr int DEPTH = 64;  // halves of the summed dimension per stage
constexpr int ROW_BYTES = 128;
constexpr int BOX_BYTES = 64 * ROW_BYTES;
[[maybe_unused]] constexpr int A_BYTES =
    2 * BOX_BYTES;  // 128 references x 64 of D, or 32 or 64 references x 128 of D
[[maybe_unused]] constexpr int B_BYTES = 4 * BOX_BYTES;  // 256 rows
[[maybe_unused]] constexpr int STAGE_BYTES =
    static_cast<int>(MANY_STAGE_BYTES);  // c of this depth comes after them
// With room for both halves of some rows there are fewer stages.
[[maybe_unused]] constexpr int DEEP_STAGES = 3, DEEP_STAGE_BYTES = STAGE_BYTES + 2 * BOX_BYTES;
static_assert(DEEP_STAGES * DEEP_STAGE_BYTES <= STAGES * STAGE_BYTES);

struct ScoreArguments {
  CUtensorMap refs;     // (m, d), boxes of 128 x 64
  CUtensorMap queries;  // (rows, d) y_hi or y_lo, boxes of 64 x 64
  CUtensorMap lows;     // (rows, d) y_lo of early rows, likewise
};

struct SumArguments {
  CUtensorMap refs;     // (m, d), boxes of many_sum_refs(exact) x 64
  CUtensorMap weights;  // (rows, refs) halves, or (rows, 2 refs): of 32 references the upper parts, then the
                        // lower; boxes of 64 x 64
};

// y_hi.d to few digits; to float32's, with y_lo.d for early rows; and y_lo.d added to the latter
enum class Scores { FAST, EXACT, LOW };

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <auto VALUE>
using Constant = std::integral_constant<decltype(VALUE), VALUE>;

// visit(width, plain) with both as constants; width of 64, 128 and 256, and plain only as it MAY or MUST be.
template <bool MAY, bool MUST, typename Visit>
__device__ __forceinline__ void with_constants(int width, bool plain, const Visit& visit) {
  const auto by_width = [&](auto is_plain) {
    if (width == 256) {
      visit(Constant<256>{}, is_plain);
    } else if (width == 128) {
      visit(Constant<128>{}, is_plain);
    } else {
      visit(Constant<64>{}, is_plain);
    }
  };
  if constexpr (MAY == MUST) {
    by_width(Constant<MUST>{});
  } else if (plain) {
    by_width(Constant<true>{});
  } else {
    by_width(Constant<false>{});
  }
}

constexpr int TURN_BARRIER = 4;
constexpr uint16_t BOTH = 3;  // blocks of a cluster

struct Stage {
  uint32_t a, b;
  char *memory, *centre;
  Barrier *full, *empty;

  // One lane of a warp that was given the stage: it can be filled again. What a block brings of the second
  // operand goes to both blocks of the cluster, so both are told, by every warp that waits for stages, and
  // the own one first: a stage that the peer may fill is one that this block may fill. Else the peer, where
  // it brings all of the second operand, would come round again while warps are at work here, and its warps'
  // arrivals would pass for theirs.
  __device__ void release() const {
    arrive(empty);
    arrive_in_cluster(peer_address(shared_address(empty), static_cast<int>(blockIdx.x % 2 ^ 1)));
  }
};

struct Ring {
  char* memory;  // aligned to 1024 bytes
  Barrier* barriers;
  int stages, stage_bytes;
  int at = 0;
  uint32_t parity = 0;

  __device__ Stage stage() const {
    char* const base = memory + at * stage_bytes;
    return {shared_address(base), shared_address(base + A_BYTES), base, base + stage_bytes - 1024,
            barriers + at,        barriers + STAGES + at};
  }
  __device__ void next() {
    if (++at == stages) at = 0, parity ^= 1;
  }
};

// helpers: warps of a block beside those that multiply which release each stage too.
__device__ Ring make_ring(int helpers, bool deep) {
  extern __shared__ char raw[];
  __shared__ Barrier barriers[2 * STAGES];
  const uint32_t misaligned = shared_address(raw) % 1024;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      init_barrier(barriers + s, 1);
      init_barrier(barriers + STAGES + s, 2 * (8 + helpers));  // of both blocks
    }
    publish_barriers();
  }
  __syncthreads();
  synchronize_cluster();
  return {raw + (misaligned ? 1024 - misaligned : 0), barriers, deep ? DEEP_STAGES : STAGES,
          deep ? DEEP_STAGE_BYTES : STAGE_BYTES};
}

// Whether any thread of this warpgroup says so.
__device__ bool any_of_warpgroup(bool own) {
  return named_barrier_or<128>(1 + static_cast<int>(threadIdx.x) / 128, own);
}

// sums += a b^T for 64 halves of the summed dimension; 64 rows of b at a time, while those before are added.
// LOW: of the first so many rows of b the lower halves follow it.
template <int WIDTH, int LOW>
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
      if (64 * part < LOW) {
#pragma unroll
        for (int k = 0; k < 4; ++k)
          product<1>(acc[part % 2], a[k], descriptor + (PARTS + part) * (BOX_BYTES >> 4) + 2 * k);
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

// One of the four products of a step, both operands from shared memory: the k-th 16 of its 64 halves. GROUPS:
// of 16 references, which the first operand has in its rows, as often as needed; 0: it has them in its
// columns.
template <int ADD, int GROUPS, int COUNT>
__device__ inline void product_of_step(float (&acc)[COUNT], uint64_t a, uint64_t b, int k) {
  if constexpr (GROUPS == 0) {
    product_shared<ADD, 0>(acc, a + 2 * k, b + 2 * k);
  } else {
    product_shared<ADD, 1>(acc, a + k % GROUPS * (2048 >> 4), b + 2 * k);
  }
}

// What a warp does while products are under way: nothing, or |r_j|^2 of its 16 references of a stage, which
// lie as they are in rows of it, in float32 over 512 elements. Lane: 16 bytes of every fourth reference.
struct Nothing {
  __device__ void before(const Stage&, int) {}
  template <int PART, int PARTS>
  __device__ void during(const Stage&) {}
  __device__ void after(bool) {}
};

struct OwnNorms {
  bool wanted;
  int lane = threadIdx.x % 32;
  float part[4] = {0, 0, 0, 0};
  double total = 0;  // of reference 4 i + lane / 8 in the lanes of lane % 8 == i

  __device__ void before(const Stage&, int) {}
  // Of the references of part PART of PARTS.
  template <int PART, int PARTS>
  __device__ void during(const Stage& stage) {
    if (!wanted) return;
    const int first = threadIdx.x / 32 * 16 + lane / 8, chunk = lane % 8;
#pragma unroll
    for (int i = 4 * PART / PARTS; i < 4 * (PART + 1) / PARTS; ++i) {
      const int row = first + 4 * i;
      const uint4 v =
          *reinterpret_cast<const uint4*>(stage.memory + row * ROW_BYTES + ((chunk ^ (row & 7)) << 4));
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(words + k));
        part[i] = fmaf(pair.x, pair.x, part[i]), part[i] = fmaf(pair.y, pair.y, part[i]);
      }
    }
  }
  __device__ void after(bool enough) {
    if (!wanted) return;
    __syncwarp();  // all have read what one of them gives back
    if (!enough) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      for (int offset = 1; offset < 8; offset *= 2) part[i] += __shfl_xor_sync(0xffffffffu, part[i], offset);
      if (lane % 8 == i) total += part[i];
      part[i] = 0;
    }
  }
  __device__ double of(int reference) const {  // of those 16
    return __shfl_sync(0xffffffffu, total, 8 * (reference % 4) + reference / 4);
  }
};

// sums += a b^T for a step, at most 128 rows of b at a time. While one of the two warpgroups adds the other
// multiplies.
template <int WIDTH, int GROUPS, int LOW, typename Beside>
__device__ inline void multiply_shared(const Stage& stage, uint32_t a_offset, bool first,
                                       float (&sums)[WIDTH / 2], Beside& beside) {
  constexpr int PART = WIDTH < 128 ? WIDTH : 128;
  static_assert(LOW <= PART, "of the first part alone");
  const uint64_t from = rows_of_128_bytes(stage.a + a_offset), with = rows_of_128_bytes(stage.b);
#pragma unroll
  for (int part = 0; part < WIDTH / PART; ++part) {
    float acc[PART / 2];
    const uint64_t rows = with + part * (PART * ROW_BYTES >> 4);
    // The second warpgroup starts when the first is through with its first products, and stays behind.
    if (part == 0 && first && threadIdx.x >= 128) named_barrier(TURN_BARRIER, 256);
    start_products();
    product_of_step<0, GROUPS>(acc, from, rows, 0);
    product_of_step<1, GROUPS>(acc, from, rows, 1);
    product_of_step<1, GROUPS>(acc, from, rows, 2);
    product_of_step<1, GROUPS>(acc, from, rows, 3);
    if constexpr (LOW > 0) {
      if (part == 0) {
        float (&low)[LOW / 2] = reinterpret_cast<float (&)[LOW / 2]>(acc);
#pragma unroll
        for (int k = 0; k < 4; ++k) product_of_step<1, GROUPS>(low, from, with + (WIDTH * ROW_BYTES >> 4), k);
      }
    }
    commit_products();
    if (part == 0) {
      beside.template during<0, WIDTH / PART>(stage);
    } else {
      beside.template during<WIDTH / PART - 1, WIDTH / PART>(stage);
    }
    wait_products<0>(acc);
    if (part == 0 && first && threadIdx.x < 128) named_barrier_arrive(TURN_BARRIER, 256);
#pragma unroll
    for (int i = 0; i < PART / 2; ++i) sums[part * (PART / 2) + i] += acc[i];
  }
}

// The same into sums of the matrix units, which truncate; the products may still be under way.
template <int WIDTH, int GROUPS>
__device__ inline void accumulate_shared(uint32_t a, uint32_t b, float (&sums)[WIDTH / 2]) {
  const uint64_t from = rows_of_128_bytes(a), rows = rows_of_128_bytes(b);
  start_products();
#pragma unroll
  for (int k = 0; k < 4; ++k) product_of_step<1, GROUPS>(sums, from, rows, k);
  commit_products();
}

// All of `steps`. ROUNDED: sums in float32 of what 64 products come to. Else: as the matrix units add.
template <int WIDTH, int GROUPS, bool ROUNDED, int LOW, typename Beside>
__device__ inline void multiply_steps(Ring& ring, uint32_t a_offset, int steps, float (&sums)[WIDTH / 2],
                                      Beside& beside) {
  const auto enough = [steps](int step) { return step % 8 == 7 || step + 1 == steps; };
  const bool first_lane = threadIdx.x % 32 == 0;
  if constexpr (ROUNDED) {
    for (int step = 0; step < steps; ++step, ring.next()) {
      const Stage stage = ring.stage();
      wait_barrier(stage.full, ring.parity);
      beside.before(stage, step);
      // A warpgroup gets ahead of the other by at most the stages of the ring: by less than so many steps.
      multiply_shared<WIDTH, GROUPS, LOW>(stage, a_offset, step == 0 && steps >= STAGES, sums, beside);
      beside.after(enough(step));
      if (first_lane) stage.release();
    }
  } else {
    Stage before{};
    for (int step = 0; step < steps; ++step, ring.next()) {
      const Stage stage = ring.stage();
      wait_barrier(stage.full, ring.parity);
      beside.before(stage, step);
      accumulate_shared<WIDTH, GROUPS>(stage.a + a_offset, stage.b, sums);
      beside.template during<0, 1>(stage);
      beside.after(enough(step));
      wait_products<1>();
      if (step > 0 && first_lane) before.release();
      before = stage;
    }
    wait_products<0>(sums);
    if (steps > 0 && first_lane) before.release();
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

template <typename T>
__device__ void copy_score_tile(const Many& many, const ScoreArguments& args, Ring& ring, int64_t row0,
                                int64_t ref0, int width, int low, int steps, bool plain, int rank) {
  constexpr int CENTRE = DtypeOf<T>::value == Dtype::f16 ? DEPTH * 2 : DEPTH * 4;
  const char* const centre = DtypeOf<T>::value == Dtype::f16
                                 ? reinterpret_cast<const char*>(many.centre_half)
                                 : reinterpret_cast<const char*>(many.centre_float);
  for (int step = 0; step < steps; ++step, ring.next()) {
    const Stage stage = ring.stage();
    wait_barrier(stage.empty, ring.parity ^ 1);
    arrive_expecting(stage.full, A_BYTES + (width + low) * ROW_BYTES + (plain ? 0 : CENTRE));
    const int e = step * DEPTH;
    tensor_copy(stage.a, args.refs, e, static_cast<int>(many.first_ref + ref0), shared_address(stage.full));
    for (int box = rank; box < (width + low) / 64; box += 2) {
      const int rows = box * 64 - (box * 64 < width ? 0 : width);
      tensor_copy_to_all(stage.b + box * BOX_BYTES, box * 64 < width ? args.queries : args.lows, e,
                         static_cast<int>(row0) + rows, shared_address(stage.full), BOTH);
    }
    if (!plain) bulk_copy(stage.centre, centre + step * CENTRE, CENTRE, stage.full, usual_policy());
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

// y.d of 64 references and WIDTH rows for a warpgroup, d in registers; |d|^2 of references g and g + 8 of 16.
template <typename T, int WIDTH, Scores KIND, int EARLY>
__device__ inline void multiply_differences(const Many& many, Ring& ring, int steps, float (&sums)[WIDTH / 2],
                                            double (&norms)[2]) {
  constexpr bool LOW = KIND == Scores::LOW;
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int t = lane % 4;
  const bool centred = many.facts->centred && KIND == Scores::EXACT;
  const float scale = many.facts->scale;
  norms[0] = norms[1] = 0;

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
    multiply<WIDTH, EARLY>(a, stage.b, sums);
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
      multiply<WIDTH, EARLY>(a, stage.b, sums);
    }
    if (!LOW) norms[0] += part[0], norms[1] += part[1];
    __syncwarp();
    if (lane == 0) stage.release();
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    norms[h] += __shfl_xor_sync(0xffffffffu, norms[h], 1);
    norms[h] += __shfl_xor_sync(0xffffffffu, norms[h], 2);
  }
}

// PLAIN: references as stored are the first operand. EARLY: rows with y_lo too.
template <typename T, int WIDTH, Scores KIND, bool PLAIN, int EARLY>
__device__ inline void score_tile(const Many& many, Ring& ring, int64_t row0, int64_t ref0, int64_t valid,
                                  int steps) {
  constexpr bool LOW = KIND == Scores::LOW;
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  float sums[WIDTH / 2];
#pragma unroll
  for (int i = 0; i < WIDTH / 2; ++i) sums[i] = 0;
  double norms[2] = {0, 0};
  // This thread's references are ref0 + 64 group + 16 warp + g and the eighth after it; its rows row0 + 8 b +
  // 2 t and the next.
  const int64_t ref = ref0 + group * 64 + warp * 16 + g;
  const bool inside[2] = {ref < valid, ref + 8 < valid};
  const bool known = PLAIN && !LOW && many.norms;
  float above[2] = {0, 0};
  if (known) {
    for (int h = 0; h < 2; ++h)
      if (inside[h]) above[h] = __ldg(many.norms + many.first_ref + ref + 8 * h);
  }
  if constexpr (PLAIN) {
    if constexpr (LOW) {
      Nothing nothing;
      multiply_steps<WIDTH, 0, false, 0>(ring, group * BOX_BYTES, steps, sums, nothing);
    } else {
      OwnNorms own{!known};
      multiply_steps<WIDTH, 0, KIND == Scores::EXACT, EARLY>(ring, group * BOX_BYTES, steps, sums, own);
      norms[0] = own.of(g), norms[1] = own.of(g + 8);
    }
  } else {
    multiply_differences<T, WIDTH, KIND, EARLY>(many, ring, steps, sums, norms);
  }
  if (ref0 >= valid) return;  // the second tile of the last pair may have none

  if (!LOW && !known) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      above[h] = static_cast<float>(norms[h] - many.facts->mean_norm);
    }
    if (row0 == 0) {  // NaN counts as more than anything
      const int bits[2] = {__float_as_int(static_cast<float>(norms[0])),
                           __float_as_int(static_cast<float>(norms[1]))};
      const int most = __reduce_max_sync(0xffffffffu, max(inside[0] ? bits[0] : 0, inside[1] ? bits[1] : 0));
      if (lane == 0) atomicMax(&many.facts->max_norm, most);
    }
  }
  float best[WIDTH / 4];
  const float4* const factors =
      reinterpret_cast<const float4*>((LOW ? many.dense_factors : many.factors) + row0);
  float* const scores = many.scores + row0 * many.score_stride + ref;
  const auto place = [&](int b, int p) { return (8 * b + 2 * t + p) * many.score_stride; };
  constexpr int BATCH = LOW ? 8 : 2;  // of 4 scores each, which are loaded before any is stored
#pragma unroll
  for (int b0 = 0; b0 < WIDTH / 8; b0 += BATCH) {
    float old[BATCH][2][2];
    if (LOW) {
#pragma unroll
      for (int i = 0; i < 4 * BATCH; ++i)
        old[i / 4][i / 2 % 2][i % 2] = scores[place(b0 + i / 4, i / 2 % 2) + 8 * (i % 2)];
    }
#pragma unroll
    for (int i = 0; i < 2 * BATCH; ++i) {
      const int b = b0 + i / 2, p = i % 2;
      const float4 factor = __ldg(factors + 8 * b + 2 * t + p);  // unit, half_alpha, low_centre
      float value[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float product = sums[4 * b + 2 * h + p] * factor.x;
        value[h] = !LOW    ? fmaf(-factor.y, above[h], product)
                   : PLAIN ? old[i / 2][p][h] + (product - factor.z)
                           : old[i / 2][p][h] + product;
        if (value[h] != value[h]) value[h] = INFINITY;  // a reference that is not finite: seen by every row
        if (!inside[h]) value[h] = -INFINITY;
        scores[place(b, p) + 8 * h] = value[h];
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

// One warp: brings the scores that a tile is added to nearer, some in each step.
__device__ inline void fetch_scores(const Many& many, Ring& ring, int64_t row0, int64_t ref0, int64_t valid,
                                    int width, int steps) {
  const int lane = threadIdx.x % 32;
  for (int step = 0; step < steps; ++step, ring.next()) {
    const Stage stage = ring.stage();
    wait_barrier(stage.full, ring.parity);
    for (int row = width * step / steps + lane; row < width * (step + 1) / steps; row += 32)
      if (ref0 < valid)
        prefetch_bulk(many.scores + (row0 + row) * many.score_stride + ref0, MANY_TILE * sizeof(float));
    __syncwarp();
    if (lane == 0) stage.release();
  }
}

// ---- weighted sums

struct SumTile {  // a part of the references for a tile of rows x D
  int64_t row0, e0;
  int begin, end;  // steps of many_sum_refs(exact) references
  int index;       // in many.partial; -1: beyond D
};

// In pairs of tiles of D, one for each block of a cluster; the narrow row tile last.
struct SumGrid {
  int64_t rows;
  int steps;
  ManySums sums;

  __device__ SumGrid(const Many& many, int64_t valid)
      : rows(many.facts->dense), steps(many_sum_steps(many, valid)), sums(many, rows, steps) {}
  __device__ int full_units() const { return sums.splits * sums.rows.full * sums.pairs; }
  __device__ int units() const { return full_units() + sums.narrow_splits * sums.pairs; }
  __device__ SumTile tile(int unit, int rank) const {
    const bool narrow = unit >= full_units();
    if (narrow) unit -= full_units();
    const int in_split = (narrow ? 1 : sums.rows.full) * sums.pairs;
    const int split = unit / in_split,
              row_tile = narrow ? sums.rows.full : unit / sums.pairs % sums.rows.full;
    const int splits = sums.splits_of(row_tile), d_tile = unit % sums.pairs * 2 + rank;
    SumTile tile;
    tile.row0 = row_tile * MANY_ROWS;
    tile.e0 = d_tile * MANY_TILE;
    tile.begin = static_cast<int>(static_cast<int64_t>(steps) * split / splits);
    tile.end = static_cast<int>(static_cast<int64_t>(steps) * (split + 1) / splits);
    tile.index = d_tile < sums.d_tiles ? sums.index(row_tile, split, d_tile) : -1;
    return tile;
  }
};

__device__ inline void copy_sum_tile(const Many& many, const SumArguments& args, Ring& ring,
                                     const SumTile& tile, int width, int rank) {
  const int refs = many_sum_refs(many.exact);
  for (int step = tile.begin; step < tile.end; ++step, ring.next()) {
    const Stage stage = ring.stage();
    wait_barrier(stage.empty, ring.parity ^ 1);
    arrive_expecting(stage.full, (2 * refs + width) * ROW_BYTES);
    for (int box = 0; box < 2; ++box)
      tensor_copy(stage.a + box * refs * ROW_BYTES, args.refs, static_cast<int>(tile.e0) + box * 64,
                  static_cast<int>(many.first_ref) + step * refs, shared_address(stage.full));
    for (int box = rank; box < width / 64; box += 2)
      tensor_copy_to_all(stage.b + box * BOX_BYTES, args.weights, step * DEPTH,
                         static_cast<int>(tile.row0) + box * 64, shared_address(stage.full), BOTH);
  }
}

// Zeros for the halves of references that are not valid: what they hold may be NaN, and 0 NaN is no 0.
__device__ inline uint32_t keep_valid(uint32_t pair, int64_t ref, int64_t valid) {
  return (ref < valid ? pair & 0xffffu : 0u) | (ref + 1 < valid ? pair & 0xffff0000u : 0u);
}

// The d of a step's references, transposed. ldmatrix gives, of references 16 k to 16 k + 15, elements g and g
// + 8 of 2 t and 2 t + 1, then of 2 t + 8 and 2 t + 9. EXACT: once for the upper parts of their weights and
// once for the lower.
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
      a[k][i] = value;
      if (EXACT) a[k + 2][i] = value;
    }
  }
  return inexact;
}

// Zeros in place of the references from `kept` on of step `step`, before they are multiplied.
struct ZeroInvalid {
  int step, kept, refs;

  __device__ void before(const Stage& stage, int at) {
    if (at != step) return;
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
    char* const rows = stage.memory + group * refs * ROW_BYTES;
    for (int chunk = kept * (ROW_BYTES / 16) + thread; chunk < refs * (ROW_BYTES / 16); chunk += 128)
      *reinterpret_cast<uint4*>(rows + 16 * chunk) = uint4{};
    fence_async();
    named_barrier(1 + group, 128);
  }
  template <int PART, int PARTS>
  __device__ void during(const Stage&) {}
  __device__ void after(bool) {}
};

// PLAIN: references as stored are the first operand.
template <typename T, int WIDTH, bool EXACT, bool PLAIN>
__device__ inline void sum_tile(const Inputs& in, const Many& many, Ring& ring, const SumTile& at,
                                int64_t valid) {
  constexpr int REFS = many_sum_refs(EXACT);
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  const int64_t e = at.e0 + group * 64 + warp * 16 + g;  // and e + 8
  const bool centred = EXACT && !PLAIN && many.facts->centred;
  const float scale = many.facts->scale;
  float centres[4] = {0, 0, 0,
                      0};  // of e and e + 8, each for a pair of references, in the form that subtract takes
  if (PLAIN || at.index < 0) {
  } else if constexpr (DtypeOf<T>::value == Dtype::f16) {
    reinterpret_cast<__half2*>(centres)[0] = __half2half2(many.centre_half[e]);
    reinterpret_cast<__half2*>(centres)[1] = __half2half2(many.centre_half[e + 8]);
  } else {
    centres[0] = centres[1] = many.centre_float[e];
    centres[2] = centres[3] = many.centre_float[e + 8];
  }
  const char* const from = reinterpret_cast<const char*>(centres);
  float sums[WIDTH / 2];
#pragma unroll
  for (int i = 0; i < WIDTH / 2; ++i) sums[i] = 0;

  if constexpr (PLAIN) {
    ZeroInvalid beside{static_cast<int>(valid / REFS) - at.begin, static_cast<int>(valid % REFS), REFS};
    multiply_steps<WIDTH, REFS / 16, EXACT, 0>(ring, group * REFS * ROW_BYTES, at.end - at.begin, sums,
                                               beside);
  }
  for (int step = at.begin; !PLAIN && step < at.end; ++step, ring.next()) {
    const Stage stage = ring.stage();
    wait_barrier(stage.full, ring.parity);
    const uint32_t tile = stage.a + group * REFS * ROW_BYTES;
    const int64_t first = static_cast<int64_t>(step) * REFS;
    uint32_t a[4][4];
    const bool inexact = load_differences<T, EXACT>(tile, warp, lane, from, scale, first, valid, false, a);
    multiply<WIDTH, 0>(a, stage.b, sums);
    if (centred && any_of_warpgroup(inexact)) {
      load_differences<T, EXACT>(tile, warp, lane, from, scale, first, valid, true, a);
      multiply<WIDTH, 0>(a, stage.b, sums);
    }
    __syncwarp();
    if (lane == 0) stage.release();
  }

  if (at.index < 0) return;
  float* const to = many.partial + static_cast<int64_t>(at.index) * (MANY_ROWS * MANY_TILE) + (e - at.e0);
#pragma unroll
  for (int i = 0; i < WIDTH / 2; ++i) {
    const int n = i / 4 * 8 + 2 * t + i % 2, h = i / 2 % 2;
    to[n * MANY_TILE + 8 * h] = sums[i];
  }
}

#endif

// ---- kernels

// Grid: clusters of two blocks, each a tile of references against the same rows.
template <typename T, Scores KIND>
__global__ void SVEL_CLUSTER(2) __launch_bounds__(MANY_THREADS, 1)
    score_kernel(const __grid_constant__ Inputs in, const __grid_constant__ Many many,
                 const __grid_constant__ ScoreArguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  follow_previous();
  constexpr bool LOW = KIND == Scores::LOW, HALF = DtypeOf<T>::value == Dtype::f16;
  const int64_t rows = LOW ? many.facts->dense : many.padded, valid = many_valid(in, many);
  if (LOW && many.facts->late == 0) return;
  const ScoreTiles tiles(static_cast<int>(rows), KIND == Scores::EXACT ? early_rows(many) : 0);
  const int64_t pairs = (valid + 2 * MANY_TILE - 1) / (2 * MANY_TILE), units = tiles.all() * pairs;
  const int steps = static_cast<int>((in.d + DEPTH - 1) / DEPTH);
  const int rank = blockIdx.x % 2;
  const bool plain = HALF && (LOW || !many.facts->centred);
  Ring ring = make_ring(LOW ? 1 : 0, tiles.deep());
  const auto ref0_of = [&](int64_t unit) { return (tiles.within(unit, pairs) * 2 + rank) * MANY_TILE; };
  if (threadIdx.x >= 256) {
    give_up_registers<40>();
    const int warp = static_cast<int>(threadIdx.x) / 32 - 8;
    if (threadIdx.x == 256) {
      for (int64_t unit = blockIdx.x / 2; unit < units; unit += gridDim.x / 2) {
        const int tile = tiles.tile(unit, pairs);
        copy_score_tile<T>(many, args, ring, tiles.row0(tile), ref0_of(unit), tiles.width(tile),
                           tiles.low(tile), steps, plain, rank);
      }
    } else if (LOW && warp == 1) {
      for (int64_t unit = blockIdx.x / 2; unit < units; unit += gridDim.x / 2) {
        const int tile = tiles.tile(unit, pairs);
        fetch_scores(many, ring, tiles.row0(tile), ref0_of(unit), valid, tiles.width(tile), steps);
      }
    }
    __syncwarp();
  } else {
    take_registers<232>();
    for (int64_t unit = blockIdx.x / 2; unit < units; unit += gridDim.x / 2) {
      const int64_t ref0 = ref0_of(unit);
      const int tile = tiles.tile(unit, pairs), row0 = tiles.row0(tile), low = tiles.low(tile);
      with_constants<HALF, HALF && LOW>(tiles.width(tile), plain, [&](auto wide, auto is_plain) {
        constexpr int WIDTH = decltype(wide)::value;
        constexpr bool PLAIN = decltype(is_plain)::value;
        const auto score = [&](auto early) {
          score_tile<T, WIDTH, KIND, PLAIN, decltype(early)::value>(many, ring, row0, ref0, valid, steps);
        };
        if constexpr (KIND == Scores::EXACT) {
          constexpr int MOST = WIDTH < 128 ? WIDTH : 128;
          if (low == MOST) return score(Constant<MOST>{});
          if (WIDTH == 256 && low == 64) return score(Constant<64>{});
        }
        score(Constant<0>{});
      });
    }
  }
  synchronize_cluster();  // the peer may still copy to this block's memory, or arrive on its barriers
#endif
}

template <typename T, bool EXACT>
__global__ void SVEL_CLUSTER(2) __launch_bounds__(MANY_THREADS, 1)
    sum_kernel(const __grid_constant__ Inputs in, const __grid_constant__ Many many,
               const __grid_constant__ SumArguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  follow_previous();
  constexpr bool HALF = DtypeOf<T>::value == Dtype::f16;
  const int64_t valid = many_valid(in, many);
  const SumGrid grid(many, valid);
  const int units = grid.units(), rank = blockIdx.x % 2;
  Ring ring = make_ring(0, false);
  if (threadIdx.x >= 256) {
    give_up_registers<40>();
    if (threadIdx.x == 256) {
      for (int unit = blockIdx.x / 2; unit < units; unit += gridDim.x / 2) {
        const SumTile tile = grid.tile(unit, rank);
        copy_sum_tile(many, args, ring, tile, row_tile_width(grid.rows - tile.row0), rank);
      }
    }
    __syncwarp();
  } else {
    take_registers<232>();
    const bool plain = HALF && !many.facts->centred;
    for (int unit = blockIdx.x / 2; unit < units; unit += gridDim.x / 2) {
      const SumTile at = grid.tile(unit, rank);
      const int width = row_tile_width(grid.rows - at.row0);
      with_constants<HALF, false>(width, plain, [&](auto wide, auto is_plain) {
        sum_tile<T, decltype(wide)::value, EXACT, decltype(is_plain)::value>(in, many, ring, at, valid);
      });
    }
  }
  synchronize_cluster();  // the peer may still copy to this block's memory, or arrive on its barriers
#endif
}

// ---- host

template <typename Kernel, typename Arguments>
void launch(const char* op, Kernel* kernel, const Inputs& in, const Many& many, const Arguments& args,
            cudaStream_t stream) {
  check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(MANY_SMEM_BYTES)));
  launch_following(op, kernel, dim3(static_cast<unsigned>(many.blocks / 2 * 2)), MANY_THREADS,
                   MANY_SMEM_BYTES, stream, in, many, args);
}

}  // namespace

void launch_many_score(const char* op, const Inputs& in, const Many& many, bool low, cudaStream_t stream) {
  ScoreArguments args;
  args.refs = map_rows(op, in.refs.data, in.refs.dtype, in.d, in.m, 2 * in.d, static_cast<int>(MANY_TILE));
  args.queries =
      map_rows(op, low ? many.dense_lo : many.hi, Dtype::f16, in.d, many.padded, 2 * many.d_stride, 64);
  args.lows = map_rows(op, many.lo, Dtype::f16, in.d, many.padded, 2 * many.d_stride, 64);
  const bool half = in.refs.dtype == Dtype::f16;
  const auto start = [&](auto* kernel) { launch(op, kernel, in, many, args, stream); };
  if (low) {
    start(half ? score_kernel<__half, Scores::LOW> : score_kernel<__nv_bfloat16, Scores::LOW>);
  } else if (many.exact) {
    start(half ? score_kernel<__half, Scores::EXACT> : score_kernel<__nv_bfloat16, Scores::EXACT>);
  } else {
    start(half ? score_kernel<__half, Scores::FAST> : score_kernel<__nv_bfloat16, Scores::FAST>);
  }
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
