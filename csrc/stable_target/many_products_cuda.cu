// The two matrix products of many_rows.cuh: scores (references x rows, summed over D) and weighted sums (D x
// rows, summed over references). 2 rows refs d operations each, per half of the second operand. A tile is 128
// x up to 256, by two warpgroups of 64 x 256; of sums of at most 128 rows 256 x 128. One warp brings stages
// of 64 deep tiles by tensor copies: 16 KB
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
  CUtensorMap lows;     // (rows, d) y_lo of early rows, boxes of LOW_BOX x 64
};

constexpr int LOW_BOX = 16;

struct SumArguments {
  CUtensorMap refs;     // (m, d), boxes of many_sum_refs(exact) x 64
  CUtensorMap weights;  // (rows, 2 refs) halves: of 32 references the upper parts, then the
                        // lower; or (rows, 2 refs): of 64 references, then 64 that are left over. Boxes of
                        // 64 x 64
};

// y_hi.d to few digits; to float32's, with y_lo.d for early rows; and y_lo.d added to the latter
enum class Scores { FAST, EXACT, LOW };

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <auto VALUE>
using Constant = std::integral_constant<decltype(VALUE), VALUE>;

// visit(width, plain) with both as constants; width of 64, 128 and 256, and plain only as it MAY or MUST be.
// All of it in line: products under way do not survive a call.
template <bool PLAIN, typename Visit>
__device__ __forceinline__ void with_width(int width, const Visit& visit) {
  if (width == 256) {
    visit(Constant<256>{}, Constant<PLAIN>{});
  } else if (width == 128) {
    visit(Constant<128>{}, Constant<PLAIN>{});
  } else {
    visit(Constant<64>{}, Constant<PLAIN>{});
  }
}
template <bool MAY, bool MUST, typename Visit>
__device__ __forceinline__ void with_constants(int width, bool plain, const Visit& visit) {
  if constexpr (MAY == MUST) {
    with_width<MUST>(width, visit);
  } else if (plain) {
    with_width<true>(width, visit);
  } else {
    with_width<false>(width, visit);
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

// What a warpgroup stores scores by. Of a tile's sums each of its warps has 16 references and all rows; they
// are stored 32 rows at a time, through shared memory, so that 256 bytes of a row come together: the L2 takes
// many small writes slowly. So many floats apart, rows that lanes write at once lie in different banks.
struct Exchange {
  static constexpr int ROWS = 32, STRIDE = 68;
  float sums[ROWS * STRIDE];  // of 64 references
  float2 factors[MANY_ROWS];  // unit; half_alpha or low_centre
  float above[64];            // |d_j|^2 - mean_norm
};
static_assert(MANY_EXCHANGE_BYTES == 2 * sizeof(Exchange));
// Of classes: the rows' references, and where the classes of the tile's end. above: INFINITY where a
// reference is not valid, NaN where it is not finite.
struct ClassExchange : Exchange {
  int2 ranges[MANY_ROWS];
  int ends[128];  // of each thread its own
};
static_assert(MANY_CLASSES_SMEM_BYTES - MANY_SMEM_BYTES == 2 * (sizeof(ClassExchange) - sizeof(Exchange)));

struct Ring {
  char* memory;  // aligned to 1024 bytes
  Barrier* barriers;
  int stages = STAGES, stage_bytes = STAGE_BYTES, a_bytes = A_BYTES;
  int at = 0;
  uint32_t parity = 0;

  __device__ void deepen() { stages = DEEP_STAGES, stage_bytes = DEEP_STAGE_BYTES; }
  __device__ Stage stage() const {
    char* const base = memory + at * stage_bytes;
    return {shared_address(base), shared_address(base + a_bytes), base, base + stage_bytes - 1024,
            barriers + at,        barriers + STAGES + at};
  }
  __device__ void next() {
    if (++at == stages) at = 0, parity ^= 1;
  }
  // Of either warpgroup.
  template <typename T>
  __device__ T* exchange() const {
    return reinterpret_cast<T*>(memory + STAGES * STAGE_BYTES);
  }
};

// helpers: warps of a block beside those that multiply which release each stage too.
__device__ Ring make_ring(int helpers) {
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
  return {raw + (misaligned ? 1024 - misaligned : 0), barriers};
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
__device__ __forceinline__ void multiply_shared(const Stage& stage, uint32_t a_offset, bool first,
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

// All of `steps`, for OPERANDS first operands, a_stride bytes apart. ROUNDED: sums in float32 of what 64
// products come to. Else: as the matrix units add.
template <int WIDTH, int GROUPS, bool ROUNDED, int LOW, int OPERANDS, typename Beside>
__device__ __forceinline__ void multiply_steps(Ring& ring, uint32_t a_offset, uint32_t a_stride, int steps,
                                               float (&sums)[OPERANDS][WIDTH / 2], Beside& beside) {
  const auto enough = [steps](int step) { return step % 8 == 7 || step + 1 == steps; };
  const bool first_lane = threadIdx.x % 32 == 0;
  if constexpr (ROUNDED) {
    for (int step = 0; step < steps; ++step, ring.next()) {
      const Stage stage = ring.stage();
      wait_barrier(stage.full, ring.parity);
      beside.before(stage, step);
      // A warpgroup gets ahead of the other by at most the stages of the ring: by less than so many steps.
#pragma unroll
      for (int i = 0; i < OPERANDS; ++i)
        multiply_shared<WIDTH, GROUPS, LOW>(stage, a_offset + i * a_stride,
                                            i == 0 && step == 0 && steps >= STAGES, sums[i], beside);
      beside.after(enough(step));
      if (first_lane) stage.release();
    }
  } else {
    Stage before{};
    for (int step = 0; step < steps; ++step, ring.next()) {
      const Stage stage = ring.stage();
      wait_barrier(stage.full, ring.parity);
      beside.before(stage, step);
#pragma unroll
      for (int i = 0; i < OPERANDS; ++i)
        accumulate_shared<WIDTH, GROUPS>(stage.a + a_offset + i * a_stride, stage.b, sums[i]);
      wait_products<OPERANDS>();
      if (step > 0 && first_lane) before.release();
      before = stage;
      // After a stage has been given back, which loads wait for.
      beside.template during<0, 1>(stage);
      beside.after(enough(step));
    }
#pragma unroll
    for (int i = 0; i < OPERANDS; ++i) wait_products<0>(sums[i]);
    if (steps > 0 && first_lane) before.release();
  }
}

__device__ inline uint32_t bits(__half2 v) {
  return *reinterpret_cast<uint32_t*>(&v);
}
__device__ inline __half2 halves(uint32_t v) {
  return *reinterpret_cast<__half2*>(&v);
}

// Two halves. SATURATED: of what is too large for one, the largest.
template <bool SATURATED>
__device__ inline uint32_t to_halves(float low, float high) {
  if constexpr (SATURATED) {
    uint32_t pair;
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
  return bits(__floats2half2_rn(low, high));
}

struct Difference {
  uint32_t value;      // d, two halves
  uint32_t remainder;  // r - c - d, likewise; zero nearly always
  bool inexact;        // it is not
};

// Two references' elements (raw bits) minus the centre. float16: c of few digits, so that d + c != r wherever
// d was rounded. SATURATED: of far references, whose scores are none.
template <typename T, bool SATURATED>
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
    out.value = to_halves<SATURATED>(low, high);
    const float2 back = __half22float2(halves(out.value));
    out.inexact = back.x != low || back.y != high;
    if (remainder) out.remainder = to_halves<SATURATED>(low - back.x, high - back.y);
  }
  return out;
}

// ---- scores

// tensor_copy of what is read once: it leaves the L2 first.
__device__ inline void tensor_copy_once(uint32_t shared, const CUtensorMap& map, int column, int row,
                                        uint32_t barrier) {
  SVEL_HOPPER_ASM(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%2, %3}], [%4], %5;" ::"r"(shared),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(column), "r"(row), "r"(barrier),
      "l"(read_once_policy()) : "memory");
}

// CLASSES: row tiles come one after the other, and few of them want the same references.
template <typename T, bool CLASSES>
__device__ void copy_score_tile(const Many& many, const ScoreArguments& args, Ring& ring, int64_t row0,
                                int64_t ref0, int width, int low, int steps, bool plain, int rank) {
  constexpr int CENTRE = DtypeOf<T>::value == Dtype::f16 ? DEPTH * 2 : DEPTH * 4;
  const char* const centre = DtypeOf<T>::value == Dtype::f16
                                 ? reinterpret_cast<const char*>(many.centre_half)
                                 : reinterpret_cast<const char*>(many.centre_float);
  const bool alone = CLASSES || many.rows <= MANY_ROWS;  // else tiles of other rows want these references too
  for (int step = 0; step < steps; ++step, ring.next()) {
    const Stage stage = ring.stage();
    wait_barrier(stage.empty, ring.parity ^ 1);
    arrive_expecting(stage.full, A_BYTES + (width + low) * ROW_BYTES + (plain ? 0 : CENTRE));
    const int e = step * DEPTH;
    const int ref = static_cast<int>(many.map_ref + ref0);
    if (alone) {  // scores, which are read again, stay in the L2
      tensor_copy_once(stage.a, args.refs, e, ref, shared_address(stage.full));
    } else {
      tensor_copy(stage.a, args.refs, e, ref, shared_address(stage.full));
    }
    for (int row = 64 * rank; row < width; row += 128)
      tensor_copy_to_all(stage.b + row * ROW_BYTES, args.queries, e, static_cast<int>(row0) + row,
                         shared_address(stage.full), BOTH);
    for (int row = LOW_BOX * rank; row < low; row += 2 * LOW_BOX)
      tensor_copy_to_all(stage.b + (width + row) * ROW_BYTES, args.lows, e, static_cast<int>(row0) + row,
                         shared_address(stage.full), BOTH);
    if (!plain) bulk_copy(stage.centre, centre + step * CENTRE, CENTRE, stage.full, usual_policy());
  }
}

// y.d of 64 references and WIDTH rows for a warpgroup, d in registers; |d|^2 of references g and g + 8 of 16.
template <typename T, int WIDTH, Scores KIND, int EARLY>
__device__ __forceinline__ void multiply_differences(const Many& many, Ring& ring, int steps,
                                                     float (&sums)[WIDTH / 2], double (&norms)[2]) {
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
        const Difference d = subtract<T, LOW>(a[k][i], stage.centre, k * 8 + i / 2 * 4 + t, scale, false);
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
          const Difference d = subtract<T, LOW>(a[k][i], stage.centre, k * 8 + i / 2 * 4 + t, scale, true);
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

__device__ inline void copy_int_async(int* shared, const int* global) {
  copy_async(reinterpret_cast<float*>(shared), reinterpret_cast<const float*>(global));
}

// PLAIN: references as stored are the first operand. EARLY: rows with y_lo too. CLASSES: rows have ranges.
template <typename T, int WIDTH, Scores KIND, bool PLAIN, int EARLY, bool CLASSES>
__device__ __forceinline__ void score_tile(const Many& many, Ring& ring, int64_t row0, int64_t ref0,
                                           int64_t valid, int steps) {
  constexpr bool LOW = KIND == Scores::LOW;
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  float all_sums[1][WIDTH / 2], (&sums)[WIDTH / 2] = all_sums[0];
#pragma unroll
  for (int i = 0; i < WIDTH / 2; ++i) sums[i] = 0;
  auto& exchange = ring.exchange<std::conditional_t<CLASSES, ClassExchange, Exchange>>()[group];
  const auto meet = [group] { named_barrier(1 + group, 128); };
  meet();  // all are through with what was there for the tile before
  // Loads that wait behind stores take long: none are left for the end.
  for (int row = static_cast<int>(threadIdx.x) % 128; row < WIDTH; row += 128) {
    const ManyFactor* const from = (LOW ? many.dense_factors : many.factors) + row0 + row;
    copy_async(&exchange.factors[row].x, &from->unit);
    copy_async(&exchange.factors[row].y, LOW ? &from->low_centre : &from->half_alpha);
    if constexpr (CLASSES && !LOW) {
      copy_int_async(&exchange.ranges[row].x, &many.ranges[row0 + row].x);
      copy_int_async(&exchange.ranges[row].y, &many.ranges[row0 + row].y);
    }
  }
  const bool known = PLAIN && !LOW && many.norms;
  // norm_of: of a reference of the warp's 16; each is two lanes'.
  const int64_t own_ref = ref0 + group * 64 + warp * 16 + lane % 16;
  if constexpr (CLASSES && !LOW) {
    // No branch: what follows would not be uniform. Beyond the last reference none is valid by its class's
    // end.
    const int64_t of_class = many.first_ref + min(own_ref, valid - 1);
    copy_int_async(exchange.ends + threadIdx.x % 128,
                   many.classes->ends + static_cast<uint32_t>(of_class) / many.class_refs);
  }
  const auto keep_norms = [&](auto norm_of) {
    if (LOW) return;
    const double norm = known ? 0 : norm_of(lane % 16);
    // bfloat16: whether it is far, or not finite, which sum_far will see. One of zeros is held.
    bool is_held = true;
    if constexpr (DtypeOf<T>::value == Dtype::bf16) {
      const float least = many.facts->centred ? 0.0f : least_held(DEPTH * steps, many.facts->mean_norm);
      is_held = holds(*many.facts, static_cast<float>(norm), least, norm == 0);
    }
    if constexpr (CLASSES) {
      wait_copies();
      const bool is_valid = many.first_ref + own_ref < exchange.ends[threadIdx.x % 128];
      float above = static_cast<float>(norm - many.facts->mean_norm);
      if (known && is_valid) above = __ldg(many.norms + many.first_ref + own_ref);
      const bool is_finite = fabsf(above) < INFINITY && is_held;
      // Of what is not finite nothing is kept: its rows are NaN, and others do not see it.
      const int bits = is_valid && is_finite && !known ? __float_as_int(static_cast<float>(norm)) : 0;
      const int most = __reduce_max_sync(0xffffffffu, bits);
      const unsigned operands = __ballot_sync(0xffffffffu, is_valid && is_finite);
      if (ref0 < valid && lane == 0) {  // alike in all row tiles that meet these
        if (!known) atomicMax(&many.facts->max_norm, most);
        many.operands[(ref0 + group * 64) / 16 + warp] = static_cast<uint16_t>(operands);
      }
      if (is_valid && !is_held) many.facts->far = 1;
      exchange.above[warp * 16 + lane % 16] = !is_valid || !is_held ? INFINITY : is_finite ? above : NAN;
      return;
    }
    const bool is_valid = own_ref < valid;
    if constexpr (DtypeOf<T>::value == Dtype::bf16) {
      const unsigned operands = __ballot_sync(0xffffffffu, is_held);
      if (row0 == 0 && ref0 < valid && lane == 0)
        operand_bits<CLASSES>(many)[(ref0 + group * 64) / 16 + warp] = static_cast<uint16_t>(operands);
      if (row0 == 0 && is_valid && !is_held) many.facts->far = 1;
    }
    // NaN counts as more than anything.
    const int bits = is_valid && is_held ? __float_as_int(static_cast<float>(norm)) : 0;
    const int most = __reduce_max_sync(0xffffffffu, bits);
    if (!known && row0 == 0 && lane == 0) atomicMax(&many.facts->max_norm, most);
    exchange.above[warp * 16 + lane % 16] = !known     ? static_cast<float>(norm - many.facts->mean_norm)
                                            : is_valid ? __ldg(many.norms + many.first_ref + own_ref)
                                                       : 0.0f;
  };
  if constexpr (PLAIN && LOW) {
    Nothing nothing;
    multiply_steps<WIDTH, 0, false, 0>(ring, group * BOX_BYTES, 0, steps, all_sums, nothing);
  } else if constexpr (PLAIN) {
    OwnNorms own{!known};
    multiply_steps<WIDTH, 0, KIND == Scores::EXACT, EARLY>(ring, group * BOX_BYTES, 0, steps, all_sums, own);
    keep_norms([&](int reference) { return own.of(reference); });
  } else {
    double norms[2];
    multiply_differences<T, WIDTH, KIND, EARLY>(many, ring, steps, sums, norms);
    keep_norms([&](int reference) {
      const double low = __shfl_sync(0xffffffffu, norms[0], 4 * (reference % 8)),
                   high = __shfl_sync(0xffffffffu, norms[1], 4 * (reference % 8));
      return reference < 8 ? low : high;
    });
  }
  wait_copies();
  if (ref0 >= valid) return;  // the second tile of the last pair may have none
  meet();

  // Of 32 rows each warp stores eight, in pairs: this lane scores of references ref to ref + 3, of which so
  // many are valid.
  constexpr int PAIRS = Exchange::ROWS / 8, PARTS = WIDTH / Exchange::ROWS;
  const int quad = lane % 16, own_row = 8 * warp + lane / 16;
  const int64_t ref = ref0 + group * 64 + 4 * quad, maxima_stride = many.score_stride / MANY_GROUP;
  const int inside = static_cast<int>(min(valid - ref, int64_t{4}));
  float* const scores = many.scores + (row0 + own_row) * many.score_stride + ref;
  float* const maxima = many.maxima + (row0 + own_row) * maxima_stride + ref / MANY_GROUP;
  const float4 above = LOW ? float4{} : *reinterpret_cast<const float4*>(exchange.above + 4 * quad);
  const float norm[4] = {above.x, above.y, above.z, above.w};
  [[maybe_unused]] const int number = static_cast<int>(many.first_ref + ref);  // among all references
  constexpr int AHEAD = 2;
  static_assert(PARTS >= AHEAD);
  float4 old[AHEAD + 1][PAIRS];  // LOW: the scores so far, of this part and the next ones
  const auto load = [&](int part, float4(&to)[PAIRS]) {
#pragma unroll
    for (int i = 0; i < PAIRS; ++i)
      to[i] = *reinterpret_cast<const float4*>(scores + (Exchange::ROWS * part + 2 * i) * many.score_stride);
  };
  if constexpr (LOW) load(0, old[0]), load(1, old[1]);
#pragma unroll 1  // short code: it is fetched when it is first needed
  for (int part = 0; part < PARTS; ++part) {
#pragma unroll
    for (int own = 0; own < PARTS; ++own) {
      if (own != part) continue;
#pragma unroll
      for (int i = 0; i < Exchange::ROWS / 2; ++i)
        exchange.sums[(i / 4 * 8 + 2 * t + i % 2) * Exchange::STRIDE + 16 * warp + g + i / 2 % 2 * 8] =
            sums[Exchange::ROWS / 2 * own + i];
    }
    if (LOW && part + AHEAD < PARTS) load(part + AHEAD, old[AHEAD]);
    meet();
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
      const float4 sum =
          *reinterpret_cast<const float4*>(exchange.sums + (own_row + 2 * i) * Exchange::STRIDE + 4 * quad);
      const int row = Exchange::ROWS * part + 2 * i;
      const float2 factor = exchange.factors[row + own_row];
      int2 range{};
      if constexpr (CLASSES && !LOW) range = exchange.ranges[row + own_row];
      const float four[4] = {sum.x, sum.y, sum.z, sum.w},
                  before[4] = {old[0][i].x, old[0][i].y, old[0][i].z, old[0][i].w};
      float value[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float product = four[k] * factor.x;
        value[k] = !LOW    ? fmaf(-factor.y, norm[k], product)
                   : PLAIN ? before[k] + (product - factor.y)
                           : before[k] + product;
        if (value[k] != value[k]) value[k] = INFINITY;  // a reference that is not finite: seen by every row
        if constexpr (!CLASSES) {
          if (k >= inside) value[k] = -INFINITY;
        } else if constexpr (LOW) {
          if (before[k] == -INFINITY) value[k] = -INFINITY;  // as it was
        } else {
          const bool seen =
              static_cast<unsigned>(number - range.x + k) < static_cast<unsigned>(range.y - range.x);
          if (!seen || norm[k] == INFINITY) value[k] = -INFINITY;
        }
      }
      float best = fmaxf(fmaxf(value[0], value[1]), fmaxf(value[2], value[3]));
      best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 1));
      best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 2));
      *reinterpret_cast<float4*>(scores + row * many.score_stride) =
          make_float4(value[0], value[1], value[2], value[3]);
      if (quad % 4 == 0) maxima[row * maxima_stride] = best;
    }
    meet();  // all have read what comes next in its place
    if constexpr (LOW) {
#pragma unroll
      for (int i = 0; i < PAIRS; ++i) old[0][i] = old[1][i], old[1][i] = old[2][i];
    }
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

struct SumTile {  // a part of the references for a tile of rows x one or two of D
  int64_t row0, e0;
  int begin, end;  // steps of many_sum_refs(exact) references
  int d_tiles;     // so many: fewer where D ends
  int index;       // of the first in many.partial
};

// Tiles of D to a block, for a row tile of this width.
__host__ __device__ constexpr int sum_d_tiles(int width) {
  return width <= MANY_ROWS / 2 ? 2 : 1;
}

// The narrow row tile last.
struct SumGrid {
  int64_t rows;
  int steps;
  ManySums sums;

  __device__ SumGrid(const Many& many, int64_t valid)
      : rows(many.facts->dense), steps(many_sum_steps(many, valid)), sums(many) {}
  __device__ int full_units() const { return sums.splits * sums.rows.full * sums.pairs; }
  __device__ int units() const { return full_units() + sums.narrow_splits * sums.fours; }
  __device__ int width(const SumTile& tile) const { return row_tile_width(rows - tile.row0); }
  __device__ SumTile tile(int unit, int rank) const {
    const bool narrow = unit >= full_units();
    if (narrow) unit -= full_units();
    const int across = narrow ? sums.fours : sums.pairs, each = narrow ? 2 : 1;
    const int split = unit / across / (narrow ? 1 : sums.rows.full),
              row_tile = narrow ? sums.rows.full : unit / across % sums.rows.full;
    const int splits = sums.splits_of(row_tile), d_tile = (unit % across * 2 + rank) * each;
    SumTile tile;
    tile.row0 = row_tile * MANY_ROWS;
    tile.e0 = d_tile * MANY_TILE;
    tile.begin = many_part_begin(steps, split, splits);
    tile.end = many_part_begin(steps, split + 1, splits);
    tile.d_tiles = min(each, sums.d_tiles - d_tile);
    tile.index = sums.index(row_tile, split, d_tile);
    return tile;
  }
};

__device__ inline void copy_sum_tile(const Many& many, const SumArguments& args, Ring& ring,
                                     const SumTile& tile, int width, int rank) {
  const int refs = many_sum_refs(many.exact), boxes = 2 * sum_d_tiles(width);
  ring.a_bytes = boxes * refs * ROW_BYTES;
  for (int step = tile.begin; step < tile.end; ++step, ring.next()) {
    const Stage stage = ring.stage();
    wait_barrier(stage.empty, ring.parity ^ 1);
    arrive_expecting(stage.full, (boxes * refs + width) * ROW_BYTES);
    for (int box = 0; box < boxes; ++box)
      tensor_copy(stage.a + box * refs * ROW_BYTES, args.refs, static_cast<int>(tile.e0) + box * 64,
                  static_cast<int>(many.map_ref) + step * refs, shared_address(stage.full));
    for (int box = rank; box < width / 64; box += 2)
      tensor_copy_to_all(stage.b + box * BOX_BYTES, args.weights, 2 * refs * step,
                         static_cast<int>(tile.row0) + box * 64, shared_address(stage.full), BOTH);
  }
}

// Which references of a step are multiplied. Others have zeros in their place: what they hold may be NaN, and
// 0 NaN is no 0. keep: of halves of two of eight references, as load_differences has them, those that are
// multiplied.
template <int REFS>
struct LeadingOperands {  // of a pool: those before `valid`
  int64_t first, valid;

  __device__ LeadingOperands(const Many&, const SumTile&, int64_t valid_) : first(0), valid(valid_) {}
  __device__ LeadingOperands begin(int step) const {
    LeadingOperands of_step = *this;
    of_step.first = static_cast<int64_t>(step) * REFS;
    return of_step;
  }
  __device__ uint32_t keep(uint32_t pair, int eight, int lane) const {
    if (first + REFS <= valid) return pair;
    const int64_t ref = first + 8 * eight + 2 * (lane % 4);
    return (ref < valid ? pair & 0xffffu : 0u) | (ref + 1 < valid ? pair & 0xffff0000u : 0u);
  }
};

// Of a bank of classes: a bit for each; those of the next step are on their way.
template <int REFS>
struct AnyOperands {
  static constexpr int WORDS = REFS / 32;
  const uint32_t* of_steps;
  int end;
  uint32_t now[WORDS] = {}, next[WORDS] = {};

  __device__ AnyOperands(const Many& many, const SumTile& at, int64_t)
      : of_steps(reinterpret_cast<const uint32_t*>(many.operands)), end(at.end) {
    fetch(at.begin);
  }
  __device__ void fetch(int step) {
#pragma unroll
    for (int w = 0; w < WORDS; ++w)
      if (step < end) next[w] = of_steps[step * WORDS + w];
  }
  __device__ const AnyOperands& begin(int step) {  // the next one
#pragma unroll
    for (int w = 0; w < WORDS; ++w) now[w] = next[w];
    fetch(step + 1);
    return *this;
  }
  __device__ bool all() const {
    uint32_t both = now[0];
    if (WORDS > 1) both &= now[WORDS - 1];
    return both == 0xffffffffu;
  }
  __device__ bool has(int reference) const {
    return (reference < 32 ? now[0] : now[WORDS - 1]) >> reference % 32 & 1;
  }
  __device__ uint32_t keep(uint32_t pair, int eight, int lane) const {
    if (all()) return pair;
    const int reference = 8 * eight + 2 * (lane % 4);
    return (has(reference) ? pair & 0xffffu : 0u) | (has(reference + 1) ? pair & 0xffff0000u : 0u);
  }
};

// The d of a step's references, transposed. ldmatrix gives, of references 16 k to 16 k + 15, elements g and g
// + 8 of 2 t and 2 t + 1, then of 2 t + 8 and 2 t + 9. EXACT: once for the upper parts of their weights and
// once for the lower.
template <typename T, bool EXACT, typename Operands>
__device__ inline bool load_differences(uint32_t tile, int warp, int lane, const char* centres, float scale,
                                        const Operands& operands, bool remainder, uint32_t (&a)[4][4]) {
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
      raw[i] = operands.keep(raw[i], eight, lane);
      const Difference d = subtract<T, true>(raw[i], centres, h, scale, remainder);
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
  int step, kept, refs, d_tiles;

  __device__ void before(const Stage& stage, int at) {
    if (at != step) return;
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
    for (int tile = 0; tile < d_tiles; ++tile) {
      char* const rows = stage.memory + (2 * tile + group) * refs * ROW_BYTES;
      for (int chunk = kept * (ROW_BYTES / 16) + thread; chunk < refs * (ROW_BYTES / 16); chunk += 128)
        *reinterpret_cast<uint4*>(rows + 16 * chunk) = uint4{};
    }
    fence_async();
    named_barrier(1 + group, 128);
  }
  template <int PART, int PARTS>
  __device__ void during(const Stage&) {}
  __device__ void after(bool) {}
};

// The same wherever they are.
template <int REFS>
struct ZeroHoles {
  AnyOperands<REFS> operands;
  int begin, d_tiles;

  __device__ void before(const Stage& stage, int at) {
    if (operands.begin(begin + at).all()) return;
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
    for (int tile = 0; tile < d_tiles; ++tile) {
      char* const rows = stage.memory + (2 * tile + group) * REFS * ROW_BYTES;
#pragma unroll 1
      for (int chunk = thread; chunk < REFS * (ROW_BYTES / 16); chunk += 128)
        if (!operands.has(chunk / (ROW_BYTES / 16))) *reinterpret_cast<uint4*>(rows + 16 * chunk) = uint4{};
    }
    fence_async();
    named_barrier(1 + group, 128);
  }
  template <int PART, int PARTS>
  __device__ void during(const Stage&) {}
  __device__ void after(bool) {}
};

// PLAIN: references as stored are the first operand. CLASSES: any may be no operand.
template <typename T, int WIDTH, bool EXACT, bool PLAIN, bool CLASSES>
__device__ __forceinline__ void sum_tile(const Many& many, Ring& ring, const SumTile& at, int64_t valid) {
  constexpr int REFS = many_sum_refs(EXACT), TILES = sum_d_tiles(WIDTH);
  constexpr uint32_t TILE_BYTES = 2 * REFS * ROW_BYTES;
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  const int64_t e = at.e0 + group * 64 + warp * 16 + g;  // and e + 8, and those of the next tile
  ring.a_bytes = TILES * TILE_BYTES;
  float sums[TILES][WIDTH / 2];
#pragma unroll
  for (int i = 0; i < TILES * WIDTH / 2; ++i) sums[i / (WIDTH / 2)][i % (WIDTH / 2)] = 0;

  if constexpr (PLAIN && CLASSES) {
    ZeroHoles<REFS> beside{{many, at, valid}, at.begin, TILES};
    multiply_steps<WIDTH, REFS / 16, EXACT, 0>(ring, group * REFS * ROW_BYTES, TILE_BYTES, at.end - at.begin,
                                               sums, beside);
  } else if constexpr (PLAIN) {
    ZeroInvalid beside{static_cast<int>(valid / REFS) - at.begin, static_cast<int>(valid % REFS), REFS,
                       TILES};
    multiply_steps<WIDTH, REFS / 16, EXACT, 0>(ring, group * REFS * ROW_BYTES, TILE_BYTES, at.end - at.begin,
                                               sums, beside);
  } else {
    const bool centred = EXACT && many.facts->centred;
    const float scale = many.facts->scale;
    float centres[TILES][4] = {};  // of e and e + 8, each for a pair of references, as subtract takes them
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      if (i >= at.d_tiles) continue;
      if constexpr (DtypeOf<T>::value == Dtype::f16) {
        reinterpret_cast<__half2*>(centres[i])[0] = __half2half2(many.centre_half[e + i * MANY_TILE]);
        reinterpret_cast<__half2*>(centres[i])[1] = __half2half2(many.centre_half[e + i * MANY_TILE + 8]);
      } else {
        centres[i][0] = centres[i][1] = many.centre_float[e + i * MANY_TILE];
        centres[i][2] = centres[i][3] = many.centre_float[e + i * MANY_TILE + 8];
      }
    }
    std::conditional_t<CLASSES, AnyOperands<REFS>, LeadingOperands<REFS>> of_steps(many, at, valid);
    for (int step = at.begin; step < at.end; ++step, ring.next()) {
      const Stage stage = ring.stage();
      wait_barrier(stage.full, ring.parity);
      const auto& operands = of_steps.begin(step);
#pragma unroll
      for (int i = 0; i < TILES; ++i) {
        const uint32_t tile = stage.a + group * REFS * ROW_BYTES + i * TILE_BYTES;
        const char* const from = reinterpret_cast<const char*>(centres[i]);
        uint32_t a[4][4];
        const bool inexact = load_differences<T, EXACT>(tile, warp, lane, from, scale, operands, false, a);
        multiply<WIDTH, 0>(a, stage.b, sums[i]);
        if (centred && any_of_warpgroup(inexact)) {
          load_differences<T, EXACT>(tile, warp, lane, from, scale, operands, true, a);
          multiply<WIDTH, 0>(a, stage.b, sums[i]);
        }
      }
      __syncwarp();
      if (lane == 0) stage.release();
    }
  }

#pragma unroll
  for (int i = 0; i < TILES; ++i) {
    if (i >= at.d_tiles) continue;
    float* const to =
        many.partial + (at.index + i) * static_cast<int64_t>(MANY_ROWS * MANY_TILE) + (e - at.e0);
#pragma unroll
    for (int k = 0; k < WIDTH / 2; ++k) {
      const int n = k / 4 * 8 + 2 * t + k % 2, h = k / 2 % 2;
      to[n * MANY_TILE + 8 * h] = sums[i][k];
    }
  }
}

#endif

// ---- classes

// The pairs of reference tiles that are multiplied with each row tile.
struct MetPairs {
  static constexpr int TILES = static_cast<int>(MANY_ROW_TILES);
  int until[TILES], units[TILES];  // units of the tiles until this one, and of it
  int begin[TILES];                // its first pair
  int width[TILES], early[TILES];
  int halves[TILES];  // 2: both halves of y of all rows, and two units for each pair, of 128 rows each
  int2 of_rows[MANY_PASS_ROWS / 64];
  int whole, cuts;  // units from `whole` on are cut into so many, each of a part of the rows
  int deep;         // as ScoreTiles has it
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Row tiles of the scores of a bank of classes, each with early rows of its own. LOW: tiles of dense rows, in
// their first places, where some are late. A last wave of units that is at most half full is cut into parts
// of the rows; parts narrower than 64 rows are none. Of `tile` here come the rows of a unit: the first, how
// many, and of how many y_lo.
template <bool LOW>
struct ClassTiles {
  static constexpr int TILES = MetPairs::TILES;
  int rows;
  const MetPairs* met;

  __device__ ClassTiles(int rows_, int) : rows(rows_) {}
  // Finds which are met, by all threads: what lies between the first and the last reference of its rows.
  // Returns the units of all tiles.
  __device__ int meet(const Many& many, MetPairs& shared, int64_t valid) {
    met = &shared;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if constexpr (!LOW) {
      for (int part = warp; part < rows / 64; part += MANY_THREADS / 32) {
        int low = INT_MAX, high = 0;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int2 own = range_in_round(many, 64 * part + 32 * h + lane, valid);
          if (own.x < own.y) low = min(low, own.x), high = max(high, own.y);
        }
        low = __reduce_min_sync(0xffffffffu, low), high = __reduce_max_sync(0xffffffffu, high);
        if (lane == 0) shared.of_rows[part] = {low, high};
      }
      __syncthreads();
    }
    if (warp == 0) {
      int2 own{INT_MAX, 0};
      int width = 0, early = 0;
      const int left = rows - static_cast<int>(MANY_ROWS) * lane;
      if (LOW && lane < TILES) {
        const int2 steps = many.classes->sums.steps[lane];
        width = row_tile_width(many.classes->sums.dense[lane]);
        if (many.classes->late[lane] > 0)
          own = {steps.x * many_sum_refs(true), steps.y * many_sum_refs(true)};
      } else if (lane < TILES && left > 0) {
        for (int part = 4 * lane; part < min(4 * lane + 4, rows / 64); ++part)
          own = {min(own.x, shared.of_rows[part].x), max(own.y, shared.of_rows[part].y)};
        width = row_tile_width(left);
        early = early_end<true>(many, *many.facts, MANY_ROWS * lane) - static_cast<int>(MANY_ROWS) * lane;
      }
      const int halves = early > EARLY_BESIDE ? 2 : 1;
      constexpr int PAIR = static_cast<int>(2 * MANY_TILE);
      const int begin = own.x / PAIR, pairs = own.x < own.y ? (own.y + PAIR - 1) / PAIR - begin : 0;
      const int units = halves * pairs;
      int until = units;
#pragma unroll
      for (int offset = 1; offset < TILES; offset *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, until, offset);
        if (lane >= offset) until += other;
      }
      if (lane < TILES) {
        shared.until[lane] = until, shared.units[lane] = units, shared.begin[lane] = begin;
        shared.width[lane] = width, shared.early[lane] = early, shared.halves[lane] = halves;
      }
      // Of the tiles of a last wave each part has y_lo of all its rows or of none.
      const int clusters = static_cast<int>(gridDim.x) / 2, all = __shfl_sync(0xffffffffu, until, TILES - 1);
      const int last = all % clusters;
      const bool is_cut = lane < TILES && units > 0 && until > all - last && halves == 1 && width > 128;
      const bool by_two = __all_sync(0xffffffffu, !is_cut || early % 128 == 0);
      const bool by_four = __all_sync(0xffffffffu, !is_cut || early % 64 == 0);
      const bool deep = halves == 1 && early > 0 && width + early > static_cast<int>(MANY_ROWS);
      const int any_deep = __any_sync(0xffffffffu, lane < TILES && deep);
      if (lane == 0) {
        const bool few = 4 * last <= clusters;
        shared.cuts = last == 0 || 2 * last > clusters ? 1 : by_two && !few ? 2 : by_four ? 4 : 1;
        shared.whole = all - last, shared.deep = any_deep;
      }
    }
    __syncthreads();
    return met->whole + (met->until[TILES - 1] - met->whole) * met->cuts;
  }
  __device__ bool deep() const { return !LOW && met->deep; }
  __device__ int uncut(int unit) const {  // the unit that it is a part of
    return unit < met->whole ? unit : met->whole + (unit - met->whole) / met->cuts;
  }
  __device__ int row_tile(int uncut_unit) const {
    int own = 0;
    while (uncut_unit >= met->until[own]) ++own;
    return own;
  }
  __device__ int number_in(int own, int uncut_unit) const {  // among the units of a tile
    return uncut_unit - (met->until[own] - met->units[own]);
  }
  __device__ int tile(int unit, int) const {
    const int all_rows = uncut(unit), own = row_tile(all_rows);
    int row = static_cast<int>(MANY_ROWS) * own, width = met->width[own], low = met->early[own];
    if (met->halves[own] > 1) {  // `low` is how many rows the tile has
      const int half = number_in(own, all_rows) % 2;
      row += 128 * half, width = low = half ? row_tile_width(low - 128) : 128;
    }
    if (unit >= met->whole && met->cuts > 1) {
      const int part = max(width / met->cuts, 64), first = (unit - met->whole) % met->cuts * part;
      width = first < width ? part : 0, row += first;
      low = min(max(low - first, 0), part);
    }
    return row / 64 | width / 64 << 8 | low / 16 << 16;
  }
  __device__ int within(int unit, int) const {
    const int all_rows = uncut(unit), own = row_tile(all_rows);
    return met->begin[own] + number_in(own, all_rows) / met->halves[own];
  }
  static __device__ int row0(int tile) { return (tile & 0xff) * 64; }
  static __device__ int width(int tile) { return (tile >> 8 & 0xff) * 64; }
  static __device__ int low(int tile) { return LOW ? 0 : (tile >> 16) * 16; }
};

// As SumGrid.
struct ClassSumGrid {
  const ManyClassSums& sums;
  int d_tiles;

  // By all threads.
  __device__ ClassSumGrid(const Many& many, ManyClassSums& shared)
      : sums(shared), d_tiles(static_cast<int>(many.d_stride / MANY_TILE)) {
    constexpr int WORDS = sizeof(ManyClassSums) / sizeof(int);
    if (threadIdx.x < WORDS)
      reinterpret_cast<int*>(&shared)[threadIdx.x] =
          reinterpret_cast<const int*>(&many.classes->sums)[threadIdx.x];
    __syncthreads();
  }
  __device__ int each(int row_tile) const { return sum_d_tiles(row_tile_width(sums.dense[row_tile])); }
  __device__ int across(int row_tile) const {
    const int of_cluster = 2 * each(row_tile);
    return (d_tiles + of_cluster - 1) / of_cluster;
  }
  __device__ int units() const {
    int all = 0;
    for (int tile = 0; tile < static_cast<int>(MANY_ROW_TILES); ++tile)
      all += sums.splits[tile] * across(tile);
    return all;
  }
  __device__ int width(const SumTile& tile) const {
    return row_tile_width(sums.dense[tile.row0 / MANY_ROWS]);
  }
  __device__ SumTile tile(int unit, int rank) const {
    int row_tile = 0;
    while (unit >= sums.splits[row_tile] * across(row_tile))
      unit -= sums.splits[row_tile] * across(row_tile), ++row_tile;
    const int split = unit / across(row_tile), splits = sums.splits[row_tile];
    const int d_tile = (unit % across(row_tile) * 2 + rank) * each(row_tile);
    const int2 met = sums.steps[row_tile];
    SumTile tile;
    tile.row0 = row_tile * MANY_ROWS;
    tile.e0 = d_tile * MANY_TILE;
    tile.begin = met.x + many_part_begin(met.y - met.x, split, splits);
    tile.end = met.x + many_part_begin(met.y - met.x, split + 1, splits);
    tile.d_tiles = min(each(row_tile), d_tiles - d_tile);
    tile.index = (sums.parts_before[row_tile] + split) * d_tiles + d_tile;
    return tile;
  }
};

#endif

// ---- kernels

// Grid: clusters of two blocks, each a tile of references against the same rows.
template <typename T, Scores KIND, bool CLASSES>
__global__ void SVEL_CLUSTER(2) __launch_bounds__(MANY_THREADS, 1)
    score_kernel(const __grid_constant__ Inputs in, const __grid_constant__ Many many,
                 const __grid_constant__ ScoreArguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr bool LOW = KIND == Scores::LOW, HALF = DtypeOf<T>::value == Dtype::f16;
  Ring ring = make_ring(LOW ? 1 : 0);
  follow_previous();
  const int64_t rows = LOW ? many.facts->dense : many.padded, valid = many_valid(in, many);
  if (LOW && many.facts->late == 0) return;  // both blocks of the cluster
  std::conditional_t<CLASSES, ClassTiles<LOW>, ScoreTiles> tiles(
      static_cast<int>(rows),
      KIND == Scores::EXACT && !CLASSES ? early_end<CLASSES>(many, *many.facts, 0) : 0);
  const int pairs = static_cast<int>((valid + 2 * MANY_TILE - 1) / (2 * MANY_TILE));
  int units;
  if constexpr (CLASSES) {
    __shared__ MetPairs met;
    units = tiles.meet(many, met, valid);
  } else {
    units = tiles.all() * pairs;
  }
  const int steps = static_cast<int>((in.d + DEPTH - 1) / DEPTH);
  const int rank = blockIdx.x % 2;
  const bool plain = HALF && (LOW || !many.facts->centred);
  if (tiles.deep()) ring.deepen();
  const auto ref0_of = [&](int unit) { return (tiles.within(unit, pairs) * 2 + rank) * MANY_TILE; };
  if (threadIdx.x >= 256) {
    give_up_registers<40>();
    const int warp = static_cast<int>(threadIdx.x) / 32 - 8;
    if (threadIdx.x == 256) {
      for (int unit = blockIdx.x / 2; unit < units; unit += gridDim.x / 2) {
        const int tile = tiles.tile(unit, pairs);
        if (CLASSES && tiles.width(tile) == 0) continue;
        copy_score_tile<T, CLASSES>(many, args, ring, tiles.row0(tile), ref0_of(unit), tiles.width(tile),
                                    tiles.low(tile), steps, plain, rank);
      }
    } else if (LOW && warp == 1) {
      for (int unit = blockIdx.x / 2; unit < units; unit += gridDim.x / 2) {
        const int tile = tiles.tile(unit, pairs);
        if (CLASSES && tiles.width(tile) == 0) continue;
        fetch_scores(many, ring, tiles.row0(tile), ref0_of(unit), valid, tiles.width(tile), steps);
      }
    }
    __syncwarp();
  } else {
    take_registers<232>();
    for (int unit = blockIdx.x / 2; unit < units; unit += gridDim.x / 2) {
      const int64_t ref0 = ref0_of(unit);
      const int tile = tiles.tile(unit, pairs), row0 = tiles.row0(tile), low = tiles.low(tile);
      if (CLASSES && tiles.width(tile) == 0) continue;
      with_constants<HALF, HALF && LOW>(tiles.width(tile), plain, [&](auto wide, auto is_plain) {
        constexpr int WIDTH = decltype(wide)::value;
        constexpr bool PLAIN = decltype(is_plain)::value;
        const auto score = [&](auto early) {
          score_tile<T, WIDTH, KIND, PLAIN, decltype(early)::value, CLASSES>(many, ring, row0, ref0, valid,
                                                                             steps);
        };
        if constexpr (KIND == Scores::EXACT) {
          constexpr int MOST = WIDTH < 128 ? WIDTH : 128;
          if (low == MOST) return score(Constant<MOST>{});
          if (WIDTH == 256 && low == 64) return score(Constant<64>{});
          if constexpr (WIDTH == 256 && PLAIN) {
            if (low == 80) return score(Constant<80>{});
            if (low == 96) return score(Constant<96>{});
          }
        }
        score(Constant<0>{});
      });
    }
  }
  synchronize_cluster();  // the peer may still copy to this block's memory, or arrive on its barriers
#endif
}

template <typename T, bool EXACT, bool CLASSES>
__global__ void SVEL_CLUSTER(2) __launch_bounds__(MANY_THREADS, 1)
    sum_kernel(const __grid_constant__ Inputs in, const __grid_constant__ Many many,
               const __grid_constant__ SumArguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr bool HALF = DtypeOf<T>::value == Dtype::f16;
  Ring ring = make_ring(0);
  wait_for_previous_launch();
  allow_next_launch();  // merge_kernel reads all but the sums before it waits
  const int64_t valid = many_valid(in, many);
  const auto grid = [&] {
    if constexpr (CLASSES) {
      __shared__ ManyClassSums sums;
      return ClassSumGrid(many, sums);
    } else {
      return SumGrid(many, valid);
    }
  }();
  const int units = grid.units(), rank = blockIdx.x % 2;
  if (threadIdx.x >= 256) {
    give_up_registers<40>();
    if (threadIdx.x == 256) {
      for (int unit = blockIdx.x / 2; unit < units; unit += gridDim.x / 2) {
        const SumTile tile = grid.tile(unit, rank);
        copy_sum_tile(many, args, ring, tile, grid.width(tile), rank);
      }
    }
    __syncwarp();
  } else {
    take_registers<232>();
    const bool plain = HALF && !many.facts->centred;
    for (int unit = blockIdx.x / 2; unit < units; unit += gridDim.x / 2) {
      const SumTile at = grid.tile(unit, rank);
      const int width = grid.width(at);
      with_constants<HALF, false>(width, plain, [&](auto wide, auto is_plain) {
        sum_tile<T, decltype(wide)::value, EXACT, decltype(is_plain)::value, CLASSES>(many, ring, at, valid);
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
  const int64_t bytes = many.class_refs > 0 ? MANY_CLASSES_SMEM_BYTES : MANY_SMEM_BYTES;
  check_cuda(
      op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  launch_following(op, true, kernel, dim3(static_cast<unsigned>(many.blocks / 2 * 2)), MANY_THREADS, bytes,
                   stream, in, many, args);
}

template <typename T, bool CLASSES>
void launch_score(const char* op, const Inputs& in, const Many& many, bool low, const ScoreArguments& args,
                  cudaStream_t stream) {
  launch(op,
         low          ? score_kernel<T, Scores::LOW, CLASSES>
         : many.exact ? score_kernel<T, Scores::EXACT, CLASSES>
                      : score_kernel<T, Scores::FAST, CLASSES>,
         in, many, args, stream);
}

template <typename T, bool CLASSES>
void launch_sum(const char* op, const Inputs& in, const Many& many, const SumArguments& args,
                cudaStream_t stream) {
  launch(op, many.exact ? sum_kernel<T, true, CLASSES> : sum_kernel<T, false, CLASSES>, in, many, args,
         stream);
}

}  // namespace

void launch_many_score(const char* op, const Inputs& in, const Many& many, bool low, cudaStream_t stream,
                       int64_t ref_bytes, int64_t row_bytes) {
  if (ref_bytes == 0) ref_bytes = 2 * in.d;
  if (row_bytes == 0) row_bytes = 2 * many.d_stride;
  ScoreArguments args;
  args.refs = map_rows(op, in.refs.data, in.refs.dtype, in.d, many_map_rows(in, many), ref_bytes,
                       static_cast<int>(MANY_TILE));
  args.queries = map_rows(op, low ? many.dense_lo : many.hi, Dtype::f16, in.d, many.padded, row_bytes, 64);
  args.lows = map_rows(op, many.lo, Dtype::f16, in.d, many.padded, row_bytes, LOW_BOX);
  const bool half = in.refs.dtype == Dtype::f16;
  const auto run = many.class_refs > 0
                       ? (half ? launch_score<__half, true> : launch_score<__nv_bfloat16, true>)
                       : (half ? launch_score<__half, false> : launch_score<__nv_bfloat16, false>);
  run(op, in, many, low, args, stream);
}

void launch_many_sum(const char* op, const Inputs& in, const Many& many, cudaStream_t stream) {
  SumArguments args;
  args.refs = map_rows(op, in.refs.data, in.refs.dtype, in.d, many_map_rows(in, many), 2 * in.d,
                       many_sum_refs(many.exact));
  args.weights =
      map_rows(op, many.scores, Dtype::f16, 2 * many.score_stride, many.padded, 4 * many.score_stride, 64);
  const bool half = in.refs.dtype == Dtype::f16;
  const auto run = many.class_refs > 0
                       ? (half ? launch_sum<__half, true> : launch_sum<__nv_bfloat16, true>)
                       : (half ? launch_sum<__half, false> : launch_sum<__nv_bfloat16, false>);
  run(op, in, many, args, stream);
}

}  // namespace svel::cuda
