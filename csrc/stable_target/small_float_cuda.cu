// One shared pool and 9 <= D <= 16. A warp takes 32 rows and scores 16 references at a time; both the scores
// and the sums are products of small matrices, for the tensor cores, from float32 cut into parts that they
// take. What bounds the kernel is these products, then one exponential per pair; bytes hardly matter. The
// references are cut into plan.splits parts, merged in float64. Within a part float32 sums of a few hundred
// references join others in float64: where the answer is a small difference, as the velocity of Gaussian data
// at t = 0.5, longer sums lose what the contract asks for.
//
// A block scores its rows in one of two ways. As products, score = y.d - half |d|^2. Where these terms are
// large, at small t, their difference would lose its digits, and squared differences are summed, by ordinary
// float32.
#include "stable_target/launch.cuh"
#include "stable_target/scan.cuh"

namespace svel::cuda {
namespace {

constexpr int MERGE_ROWS = 32, MERGE_SHARES = 8;
constexpr int CENTRE_REFS = 128;  // whose mean is the centre
constexpr int SUM_REFS = 256;  // whose float32 sums, a quarter in each lane of a quad, join those in float64
constexpr float SLACK = 32;    // weights may reach 2^32 before the base of the exponents is raised
constexpr double LIMIT = 40;   // of the terms of a score as products: their errors are about 2^-24 of them

struct Round {  // rows [first_row, first_row + rows) against all references
  int64_t first_row, rows, split_refs;
  int splits;
  float* parts;   // (splits, D + 2, rows): sum of p (r - c), sum of p, logarithm of their unit to base 2;
                  // log2 p is -|x - alpha r|^2 / (2 sigma^2 ln 2)
  float* centre;  // (D,)
};

__device__ inline float exp2_approx(float v) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
  return out;
}

// The merge may start while the kernel before it runs, and waits for it where it needs what that wrote.
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void prefetch_reference(const Inputs& in, int64_t j, int64_t end) {
  if (j < end) prefetch(static_cast<const char*>(in.refs.data) + j * in.d * size_of(in.refs.dtype));
}

// Mean c of up to CENTRE_REFS references spread over all, the same in every block: D is small enough to find
// it again. Returns the largest |r - c|^2 of them.
template <int D, int WARPS>
__device__ inline float find_centre(const Inputs& in, float* centre) {
  __shared__ float of_warps[WARPS][D + 1];
  const int64_t valid = valid_count(in, 0);
  const int count = static_cast<int>(valid < CENTRE_REFS ? valid : CENTRE_REFS), i = threadIdx.x;
  const int64_t at = i < count ? i * (valid / count) * in.d : 0;
  float v[D];
#pragma unroll
  for (int e = 0; e < D; ++e) v[e] = i < count && e < in.d ? load_as<float>(in.refs, at + e) : 0.0f;
#pragma unroll
  for (int e = 0; e < D; ++e) {
    float all = v[e];
    for (int step = 16; step > 0; step /= 2) all += __shfl_xor_sync(0xffffffffu, all, step);
    if (i % 32 == 0) of_warps[i / 32][e] = all;
  }
  __syncthreads();
  if (i < D) {
    float all = 0;
    for (int w = 0; w < WARPS; ++w) all += of_warps[w][i];
    centre[i] = count ? all / count : 0.0f;
  }
  __syncthreads();
  float largest = 0;
#pragma unroll
  for (int e = 0; e < D; ++e) largest += (v[e] - centre[e]) * (v[e] - centre[e]);
  if (i >= count) largest = 0;
  for (int step = 16; step > 0; step /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  if (i % 32 == 0) of_warps[i / 32][D] = largest;
  __syncthreads();
  for (int w = 0; w < WARPS; ++w) largest = fmaxf(largest, of_warps[w][D]);
  // Few digits, lest c's last ones turn r - c the same way for most r: where the mean is small, that shows.
  const float coarse = 4096 * sqrtf(largest);
  if (i < D) centre[i] = (centre[i] + coarse) - coarse;
  __syncthreads();
  return largest;
}

// log2 p is -unit |x - alpha r|^2.
__device__ inline double unit(const Row& row) {
  return LOG2_E / (2 * row.sigma * row.sigma);
}

// sign x - alpha c at element e.
__device__ inline double centred(const Inputs& in, const Row& row, const float* centre, int64_t e) {
  return row.sign * load_as<double>(in.x, row.index * in.d + e) - row.alpha * centre[e];
}

// Scores as products: a row's factors (y, half) times a reference's (d, |d|^2), each cut into three bfloat16
// parts that hold all digits of a float32, less the products of parts below its last digit; and the base
// times one. The smallest are added first.
struct Slot {  // along the sum of the products: which factor, and which of its parts for the row and the
               // reference
  int factor, of_row, of_ref;
};
constexpr int BASE = -1, NOTHING = -2;

// Number `p` from the end, where the largest products are.
__host__ __device__ constexpr Slot slot(int p, int factors) {
  if (p < factors) return {p, 0, 0};
  if (p < factors + 2) return {BASE, p - factors, 0};
  const int term = (p - factors - 2) / factors, e = (p - factors - 2) % factors;
  return term == 0   ? Slot{e, 0, 1}
         : term == 1 ? Slot{e, 1, 0}
         : term == 2 ? Slot{e, 1, 1}
         : term == 3 ? Slot{e, 0, 2}
         : term == 4 ? Slot{e, 2, 0}
                     : Slot{NOTHING, 0, 0};
}

// Of the four slots of a lane (its place t in a quad) in step s of `steps`, number i.
__host__ __device__ constexpr int slot_place(int steps, int s, int t, int i) {
  return (steps - 1 - s) * 16 + 4 * t + i;
}

// Two bfloat16 in a word, and one of its halves as float32.
__device__ inline uint32_t bf16_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ inline float bf16_half(uint32_t pair, int half) {
  return __uint_as_float(half ? pair & 0xffff0000u : pair << 16);
}
// A half of `a` below a half of `b`.
__device__ inline uint32_t two_halves(uint32_t a, int half_a, uint32_t b, int half_b) {
  return __byte_perm(a, b, (half_a ? 0x32 : 0x10) | (half_b ? 0x7600 : 0x5400));
}

// To the nearest of tf32, whose bits end 13 earlier.
__device__ inline float to_tf32(float v) {
  return __uint_as_float((__float_as_uint(v) + 0x1000u) & 0xffffe000u);
}

// to += a b, a of 16 rows, b of 8 columns; 16 terms each of bfloat16, or 8 of tf32.
__device__ __forceinline__ void multiply(float (&to)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(to[0]), "+f"(to[1]), "+f"(to[2]), "+f"(to[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply_tf32(float (&to)[4], const float (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(to[0]), "+f"(to[1]), "+f"(to[2]), "+f"(to[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(b0), "r"(b1));
}

// WORDS for each lane of GROUPS, an even number, read 16 bytes at a time. They lie so that neither the lanes
// of a warp that read them nor eight references, each written by one lane, meet in a bank.
template <int GROUPS, int WORDS>
struct LaneWords {
  uint4 fours[GROUPS][WORDS / 4][32];
  uint2 twos[WORDS % 4 ? GROUPS : 1][32];

  static __device__ __forceinline__ int place(int lane) { return lane ^ lane / 8; }

  __device__ __forceinline__ void get(int group, int lane, uint32_t (&to)[WORDS]) const {
#pragma unroll
    for (int k = 0; k < WORDS / 4; ++k) {
      const uint4 four = fours[group][k][place(lane)];
      to[4 * k] = four.x, to[4 * k + 1] = four.y, to[4 * k + 2] = four.z, to[4 * k + 3] = four.w;
    }
    if constexpr (WORDS % 4 != 0) {
      const uint2 two = twos[group][place(lane)];
      to[WORDS - 2] = two.x, to[WORDS - 1] = two.y;
    }
  }
  __device__ __forceinline__ void put(int group, int lane, const uint32_t (&from)[WORDS]) {
#pragma unroll
    for (int k = 0; k < WORDS / 4; ++k)
      fours[group][k][place(lane)] =
          make_uint4(from[4 * k], from[4 * k + 1], from[4 * k + 2], from[4 * k + 3]);
    if constexpr (WORDS % 4 != 0) twos[group][place(lane)] = make_uint2(from[WORDS - 2], from[WORDS - 1]);
  }
  __device__ __forceinline__ void put_word(int group, int lane, int k, uint32_t word) {
    uint32_t* const at =
        k < WORDS / 4 * 4 ? &fours[group][k / 4][place(lane)].x + k % 4 : &twos[group][place(lane)].x + k % 4;
    *at = word;
  }
};

template <int D, int WARPS>
struct Tile {  // in shared memory
  static constexpr int FACTORS = D + 1, STEPS = (6 * FACTORS + 2 + 15) / 16;
  static constexpr int COLUMNS = (D + 1 + 7) / 8;  // of the sums, eights of them: D and one for the sum of p
  static constexpr int THREADS = 32 * WARPS, ROWS = THREADS, REFS = THREADS;
  static constexpr int PITCH = D <= 12 ? 12 : 20;  // four neighbouring pairs start in different banks
  LaneWords<REFS / 8, 2 * STEPS> factors;
  LaneWords<REFS / 8, 4 * COLUMNS> columns;  // d and one as tf32, and what that leaves of them
  float refs[REFS][PITCH];                   // d = r - c
  double sums[FACTORS][ROWS];                // of p d and of p
  float centre[D];

  // The factors of reference j; or of row j, which take their place before the first references come.
  template <bool OF_ROW>
  __device__ __forceinline__ void put_factors(int j, const float (&v)[FACTORS]) {
    uint32_t parts[3][(FACTORS + 1) / 2];
#pragma unroll
    for (int e = 0; e < FACTORS; e += 2) {
      float low = v[e], high = e + 1 < FACTORS ? v[e + 1 < FACTORS ? e + 1 : 0] : 0.0f;
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        parts[k][e / 2] = bf16_pair(low, high);
        low -= bf16_half(parts[k][e / 2], 0), high -= bf16_half(parts[k][e / 2], 1);
      }
    }
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      uint32_t words[2 * STEPS];
#pragma unroll
      for (int w = 0; w < 2 * STEPS; ++w) {
        uint32_t two[2];
        int half[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Slot at = slot(slot_place(STEPS, w / 2, t, w % 2 * 2 + i), FACTORS);
          const int e = at.factor < 0 ? 0 : at.factor;
          two[i] = at.factor == NOTHING ? 0u
                   : at.factor == BASE  ? (OF_ROW ? 0u : 0x3f80u)  // one
                                        : parts[OF_ROW ? at.of_row : at.of_ref][e / 2];
          half[i] = at.factor < 0 ? 0 : e % 2;
        }
        words[w] = two_halves(two[0], half[0], two[1], half[1]);
      }
      factors.put(j / 8, j % 8 * 4 + t, words);
    }
  }

  __device__ __forceinline__ void put_column(int j, int k, float v) {
    const float high = to_tf32(v);
    const int lane = k % 8 * 4 + j % 8 / 2, word = k / 8 * 2 + j % 2;
    columns.put_word(j / 8, lane, word, __float_as_uint(high));
    columns.put_word(j / 8, lane, 2 * COLUMNS + word, __float_as_uint(to_tf32(v - high)));
  }
  __device__ __forceinline__ void put_constant_columns(int j) {
#pragma unroll
    for (int k = D; k < 8 * COLUMNS; ++k) put_column(j, k, k == D ? 1.0f : 0.0f);
  }

  __device__ __forceinline__ void put_values(int j, const float (&v)[FACTORS]) {
#pragma unroll
    for (int e = 0; e < PITCH; e += 4) {
      float four[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) four[i] = e + i < D ? v[e + i < D ? e + i : 0] : 0.0f;
      *reinterpret_cast<float4*>(&refs[j][e]) = make_float4(four[0], four[1], four[2], four[3]);
    }
  }
  __device__ __forceinline__ void get_values(int j, float (&to)[PITCH]) const {
#pragma unroll
    for (int e = 0; e < D; e += 4) {
      const float4 four = *reinterpret_cast<const float4*>(&refs[j][e]);
      to[e] = four.x, to[e + 1] = four.y, to[e + 2] = four.z, to[e + 3] = four.w;
    }
  }

  __device__ __forceinline__ void fill(const Inputs& in, int64_t first, int64_t end) {
    const int j = threadIdx.x;
    const bool there = first + j < end;
    float v[FACTORS];
#pragma unroll
    for (int e = 0; e < D; ++e)
      v[e] = there && e < in.d ? load_as<float>(in.refs, (first + j) * in.d + e) : 0.0f;
    v[D] = 0;
    __syncthreads();
#pragma unroll
    for (int e = 0; e < D; ++e) {
      if (there) v[e] -= centre[e];
      v[D] = fmaf(v[e], v[e], v[D]);
    }
    put_values(j, v);
    put_factors<false>(j, v);
#pragma unroll
    for (int e = 0; e < D; ++e) put_column(j, e, v[e]);
    prefetch_reference(in, first + REFS + j, end);
    __syncthreads();
  }
};

// A warp's 32 rows. Lane 4 g + t scores rows g + 8 r, r < 4, against references 2 t, 2 t + 1 of each eight,
// and has columns 2 t, 2 t + 1 of each eight of the sums of these rows. As products, log2 p = base + y.d +
// half |d|^2; as differences, base + half |y - alpha d|^2.
template <int D, int WARPS, bool DIFFERENCES>
struct Held {
  using Shared = Tile<D, WARPS>;
  static constexpr int EIGHTS = DIFFERENCES ? 1 : 2;  // of references that the warp takes at a time
  static constexpr int STEPS = Shared::STEPS, FACTORS = Shared::FACTORS, COLUMNS = Shared::COLUMNS;
  Shared& tile;
  const int lane = threadIdx.x % 32, t = lane % 4, warp = threadIdx.x / 32;
  uint32_t factors[DIFFERENCES ? 1 : 2][DIFFERENCES ? 1 : STEPS][4];  // of the rows, as products
  float y[DIFFERENCES ? 4 : 1][D], alpha[4], half[4];                 // as differences
  float base[4];
  // Of p d and of p. As products: of the columns of a lane; as differences, of the lane's own references.
  static constexpr int HELD = DIFFERENCES ? FACTORS : 2 * COLUMNS;
  float sum[4][HELD];

  __device__ __forceinline__ Held(Shared& of_block, float own_alpha, float own_half) : tile(of_block) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      base[r] = 0;
      if constexpr (DIFFERENCES) {
        alpha[r] = __shfl_sync(0xffffffffu, own_alpha, lane / 4 * 4 + r);
        half[r] = __shfl_sync(0xffffffffu, own_half, lane / 4 * 4 + r);
        float v[Shared::PITCH];
        tile.get_values(row(r), v);
#pragma unroll
        for (int e = 0; e < D; ++e) y[r][e] = v[e];
      } else {
        uint32_t words[2 * STEPS];
        tile.factors.get(row(r) / 8, lane, words);
#pragma unroll
        for (int k = 0; k < 2 * STEPS; ++k) factors[r / 2][k / 2][k % 2 * 2 + r % 2] = words[k];
      }
    }
    clear();
  }

  __device__ __forceinline__ int row(int r) const { return 32 * warp + 8 * r + lane / 4; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int k = 0; k < 4 * HELD; ++k) sum[k % 4][k / 4] = 0;
  }

  // The base of row r as the sum of two bfloat16, which are its factors.
  __device__ __forceinline__ void set_base(int r, float to) {
    if constexpr (DIFFERENCES) {
      base[r] = to;
    } else {
      const float whole = bf16_half(bf16_pair(to, 0), 0);
      const uint32_t parts = bf16_pair(whole, to - whole);
      base[r] = bf16_half(parts, 0) + bf16_half(parts, 1);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int p = FACTORS + k, i = p % 4;
        uint32_t& word = factors[r / 2][STEPS - 1 - p / 16][i / 2 * 2 + r % 2];
        const uint32_t with = i % 2 ? two_halves(word, 0, parts, k) : two_halves(parts, k, word, 1);
        word = t == p % 16 / 4 ? with : word;
      }
    }
  }

  // Of the references from j on.
  __device__ __forceinline__ void score(int j, float (&now)[EIGHTS][2][4]) const {
#pragma unroll
    for (int n = 0; n < EIGHTS; ++n) {
      if constexpr (DIFFERENCES) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float v[Shared::PITCH], square[4] = {};
          tile.get_values(j + 8 * n + 2 * t + c, v);
#pragma unroll
          for (int e = 0; e < D; ++e) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
              const float gap = fmaf(-alpha[r], v[e], y[r][e]);
              square[r] = fmaf(gap, gap, square[r]);
            }
          }
#pragma unroll
          for (int r = 0; r < 4; ++r) now[n][r / 2][r % 2 * 2 + c] = fmaf(half[r], square[r], base[r]);
        }
      } else {
        uint32_t ref[2 * STEPS];
        tile.factors.get(j / 8 + n, lane, ref);
#pragma unroll
        for (int k = 0; k < 8; ++k) now[n][k / 4][k % 4] = 0;
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
#pragma unroll
          for (int m = 0; m < 2; ++m) multiply(now[n][m], factors[m][s], ref[2 * s], ref[2 * s + 1]);
        }
      }
    }
  }

  // Where a row's largest score is above `limit`, its base falls by a whole number, until none is above 0.
  __device__ __forceinline__ void raise(const float (&now)[EIGHTS][2][4], float limit) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float most = -INFINITY;
#pragma unroll
      for (int k = 0; k < 2 * EIGHTS; ++k) most = fmaxf(most, now[k / 2][r / 2][r % 2 * 2 + k % 2]);
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      const float before = base[r];
      if (most > limit) set_base(r, before - ceilf(most));
      const float shift = before - base[r], keep = shift > 0 ? exp2_approx(-shift) : 1.0f;
#pragma unroll
      for (int k = 0; k < HELD; ++k) sum[r][k] *= keep;
      if (keep != 1) {
        for (int e = t; e < FACTORS; e += 4) tile.sums[e][row(r)] *= static_cast<double>(keep);
      }
    }
  }

  // The tile's first `count` references. `limit`: of scores; before the first references any is above it.
  __device__ __forceinline__ void add(int count, float& limit) {
#pragma unroll 1
    for (int j = 0; j < count; j += 8 * EIGHTS) {
      float now[EIGHTS][2][4];
#pragma unroll 1
      for (int pass = 0; pass < 4; ++pass) {
        score(j, now);
        if (j + 8 * EIGHTS > count) {
#pragma unroll
          for (int k = 0; k < 8 * EIGHTS; ++k) {
            if (j + k / 8 * 8 + 2 * t + k % 2 >= count) now[k / 8][k / 4 % 2][k % 4] = -INFINITY;
          }
        }
        float most[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) most[k] = fmaxf(now[0][k / 4][k % 4], now[EIGHTS - 1][k / 4][k % 4]);
#pragma unroll
        for (int half_way = 4; half_way > 0; half_way /= 2) {
#pragma unroll
          for (int k = 0; k < half_way; ++k) most[k] = fmaxf(most[k], most[k + half_way]);
        }
        if (!__any_sync(0xffffffffu, most[0] > limit) || pass == 3) break;
        raise(now, limit);
        limit = SLACK;
      }
      if constexpr (DIFFERENCES) {
        add_exactly(j, now);
        if (j % SUM_REFS == SUM_REFS - 8) flush();
      } else {
        add_products(j, now);
      }
    }
    flush();
  }

  // p and d as sums of two tf32 each; the smaller products first, since a tensor core cuts off what its sums
  // lose.
  __device__ __forceinline__ void add_products(int j, const float (&now)[EIGHTS][2][4]) {
    uint32_t ref[2][4 * COLUMNS];
#pragma unroll
    for (int n = 0; n < 2; ++n) tile.columns.get(j / 8 + n, lane, ref[n]);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      float high[2][4], low[2][4], added[COLUMNS][4];
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        // Terms t and t + 4 of eight are references 2 t and 2 t + 1.
        const float p = exp2_approx(now[k / 4][m][k % 2 * 2 + k / 2 % 2]);
        high[k / 4][k % 4] = __uint_as_float(__float_as_uint(p) & 0xffffe000u);
        low[k / 4][k % 4] = p - high[k / 4][k % 4];
      }
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
#pragma unroll
        for (int k = 0; k < 4; ++k) added[c][k] = 0;
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) multiply_tf32(added[c], low[n], ref[n][2 * c], ref[n][2 * c + 1]);
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
          multiply_tf32(added[c], high[n], ref[n][2 * (COLUMNS + c)], ref[n][2 * (COLUMNS + c) + 1]);
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) multiply_tf32(added[c], high[n], ref[n][2 * c], ref[n][2 * c + 1]);
      }
#pragma unroll
      for (int k = 0; k < 4 * COLUMNS; ++k) sum[2 * m + k % 4 / 2][k / 4 * 2 + k % 2] += added[k / 4][k % 4];
    }
  }

  // Where few references have all the weight, near them, the last digit of d counts.
  __device__ __forceinline__ void add_exactly(int j, const float (&now)[EIGHTS][2][4]) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float v[Shared::PITCH];
      tile.get_values(j + 2 * t + c, v);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float p = exp2_approx(now[0][r / 2][r % 2 * 2 + c]);
#pragma unroll
        for (int e = 0; e < D; ++e) sum[r][e] = fmaf(p, v[e], sum[r][e]);
        sum[r][D] += p;
      }
    }
  }

  __device__ __forceinline__ void flush() {
    __syncwarp();
#pragma unroll
    for (int k = 0; k < HELD; ++k) {
      if constexpr (DIFFERENCES) {  // of a quad's four sums for each row, the lane adds those of row t
        const bool upper = t & 2, odd = t & 1;
        float of_two[2];
#pragma unroll
        for (int r = 0; r < 2; ++r)
          of_two[r] = (upper ? sum[r + 2][k] : sum[r][k]) +
                      __shfl_xor_sync(0xffffffffu, upper ? sum[r][k] : sum[r + 2][k], 2);
        tile.sums[k][row(t)] +=
            (odd ? of_two[1] : of_two[0]) + __shfl_xor_sync(0xffffffffu, odd ? of_two[0] : of_two[1], 1);
      } else {
        const int e = k / 2 * 8 + 2 * t + k % 2;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          if (e < FACTORS) tile.sums[e][row(r)] += sum[r][k];
        }
      }
    }
    clear();
    __syncwarp();
  }

  __device__ __forceinline__ float own_base() const {
    return t == 0 ? base[0] : t == 1 ? base[1] : t == 2 ? base[2] : base[3];
  }
};

// References [begin, end); returns the base of the lane's own row.
template <int D, int WARPS, bool DIFFERENCES>
__device__ __forceinline__ float sum_references(const Inputs& in, Tile<D, WARPS>& tile, float alpha,
                                                float half, int64_t begin, int64_t end) {
  constexpr int REFS = Tile<D, WARPS>::REFS;
  Held<D, WARPS, DIFFERENCES> held(tile, alpha, half);
  float limit = -INFINITY;
  for (int64_t first = begin; first < end; first += REFS) {
    tile.fill(in, first, end);
    held.add(static_cast<int>(end - first < REFS ? end - first : REFS), limit);
  }
  __syncwarp();
  return held.own_base();
}

// D: in.d rounded up; BLOCKS: per multiprocessor. Grid: (row blocks, splits).
template <int D, int WARPS, int BLOCKS>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    score_and_sum_kernel(const Inputs in, const Round round) {
  using Shared = Tile<D, WARPS>;
  extern __shared__ __align__(16) char shared[];
  Shared& tile = *reinterpret_cast<Shared*>(shared);
  let_next_start();
  const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 32 + 8 * (lane % 4) + lane / 4;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * Shared::ROWS + own;
  const int64_t index = round.first_row + (place < round.rows ? place : 0);
  const int64_t valid = valid_count(in, 0), begin = blockIdx.y * round.split_refs;
  const int64_t end = begin + round.split_refs < valid ? begin + round.split_refs : valid;
  // What is read one after the other below, all on its way at once.
  prefetch(static_cast<const char*>(in.time_or_alpha.data) + index * size_of(in.time_or_alpha.dtype));
  prefetch(static_cast<const char*>(in.x.data) + index * in.d * size_of(in.x.dtype));
  prefetch_reference(in, begin + threadIdx.x, end);
  const double largest = find_centre<D, WARPS>(in, tile.centre);
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x < D)
    round.centre[threadIdx.x] = tile.centre[threadIdx.x];
  bool alive;
  const Row row = make_row(in, index, 0, alive);

  // What the terms of products add up to for references as far from c as `largest`; y.d is 2 sqrt(k n).
  double square = 0;
#pragma unroll
  for (int e = 0; e < D; ++e) {
    const double y = e < in.d ? centred(in, row, tile.centre, e) : 0.0;
    square = fma(y, y, square);
  }
  const double k = unit(row) * square, n = unit(row) * row.alpha * row.alpha * largest;
  const bool differences = __syncthreads_or(n * fmax(n, k) > LIMIT * LIMIT);

  // As differences: y and alpha in proportion, whatever alpha is rounded to.
  const float alpha = static_cast<float>(row.alpha);
  const double rounded = alpha > 0 ? alpha / row.alpha : 1.0;
  const double scale = differences ? rounded : 2 * unit(row) * row.alpha;
  float v[D + 1];
  v[D] = static_cast<float>(-unit(row) * (differences ? 1 / (rounded * rounded) : row.alpha * row.alpha));
#pragma unroll
  for (int e = 0; e < D; ++e)
    v[e] = e < in.d ? static_cast<float>(scale * centred(in, row, tile.centre, e)) : 0.0f;
  if (differences) {
    tile.put_values(own, v);
  } else {
    tile.template put_factors<true>(own, v);
  }
  tile.put_constant_columns(threadIdx.x);
#pragma unroll
  for (int e = 0; e < D + 1; ++e) tile.sums[e][own] = 0;
  __syncwarp();

  float base = differences ? sum_references<D, WARPS, true>(in, tile, alpha, v[D], begin, end)
                           : sum_references<D, WARPS, false>(in, tile, alpha, v[D], begin, end);
  if (begin >= end) base = INFINITY;  // of a part without references
  if (place >= round.rows) return;
  float* const to = round.parts + static_cast<int64_t>(blockIdx.y) * (D + 2) * round.rows + place;
  // Less the offset: its whole part from the base, which stays exact, the rest from the sums.
  const double offset = differences ? 0.0 : k, whole = floor(offset);
  const double rest = exp2f(static_cast<float>(whole - offset));
#pragma unroll
  for (int e = 0; e < D + 1; ++e) to[e * round.rows] = static_cast<float>(rest * tile.sums[e][own]);
  to[(D + 1) * round.rows] = static_cast<float>(-base - whole);
}

// What sums of p d and of p are in units of 2^best.
struct Joined {
  double sum = 0, total = 0, best = -INFINITY;

  // All units are powers of two, so changing them is exact.
  __device__ void join(double of_sum, double of_total, double unit) {
    if (unit == -INFINITY) return;  // of a part without references
    const double most = fmax(best, unit);
    const float keep = exp2f(static_cast<float>(best - most)), take = exp2f(static_cast<float>(unit - most));
    sum = keep * sum + take * of_sum, total = keep * total + take * of_total;
    best = most;
  }
};

// Blocks of MERGE_ROWS rows by MERGE_SHARES shares of their parts. Grid: (row blocks, d): one element each.
template <int D>
__global__ void __launch_bounds__(MERGE_ROWS* MERGE_SHARES) merge_kernel(const Inputs in, const Round round) {
  __shared__ Joined shares[MERGE_SHARES][MERGE_ROWS];
  const int slot = threadIdx.x % MERGE_ROWS, share = threadIdx.x / MERGE_ROWS, e = blockIdx.y;
  const int64_t local = static_cast<int64_t>(blockIdx.x) * MERGE_ROWS + slot;
  const bool inside = local < round.rows;
  bool alive = false;
  Row row{};
  double x = 0;
  if (share == 0 && inside) {
    row = make_row(in, round.first_row + local, 0, alive);
    x = load_as<double>(in.x, row.index * in.d + e);
  }
  wait_for_previous();
  const float* const parts = round.parts + (inside ? local : 0);
  const int64_t stride = (D + 2) * round.rows;
  Joined own;
  constexpr int TOGETHER = 4;
  for (int first = share; first < round.splits; first += TOGETHER * MERGE_SHARES) {
    float sum[TOGETHER], total[TOGETHER], unit[TOGETHER];
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i) {
      const int s = first + i * MERGE_SHARES;
      const float* const from = parts + s * stride;
      const bool there = s < round.splits;
      sum[i] = there ? from[e * round.rows] : 0.0f, total[i] = there ? from[D * round.rows] : 0.0f;
      unit[i] = there ? from[(D + 1) * round.rows] : -INFINITY;
    }
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i) own.join(sum[i], total[i], unit[i]);
  }
  if (share > 0) shares[share][slot] = own;
  __syncthreads();
  if (share > 0 || !inside) return;
#pragma unroll
  for (int k = 1; k < MERGE_SHARES; ++k)
    own.join(shares[k][slot].sum, shares[k][slot].total, shares[k][slot].best);
  const float* const centre = round.centre;
  if (in.source.data) {
    double score = 0;
    for (int64_t k = 0; k < in.d; ++k) {
      const double gap = centred(in, row, centre, k) -
                         row.alpha * (load_as<double>(in.source, row.index * in.d + k) - centre[k]);
      score = fma(gap, gap, score);
    }
    score *= -unit(row);
    const bool finite = isfinite(score);
    const double whole = finite ? ceil(score) : 0.0, p = finite ? exp2(score - whole) : NAN;
    own.join(p * (load_as<double>(in.source, row.index * in.d + e) - centre[e]), p, whole);
  }
  if (!alive) own.total = NAN;
  const int64_t at = row.index * in.d + e;
  store_as(in.out, at, row.a * x + row.b * (centre[e] + own.sum / own.total));
  if (in.lse.data && e == 0) {
    const double lse = log(own.total) + own.best / LOG2_E + 0.5 * static_cast<double>(in.d);
    store_as(in.lse, row.index, own.total > 0 ? lse : NAN);
  }
}

template <int D, int WARPS, int BLOCKS>
bool launch_if(const char* op, const Inputs& in, const Plan& plan, const Round& round, cudaStream_t stream) {
  if (plan.tile_d != D || plan.threads != 32 * WARPS) return false;
  const auto blocks = [&](int64_t each) { return static_cast<unsigned>((round.rows + each - 1) / each); };
  const dim3 grid(blocks(plan.tile_rows), static_cast<unsigned>(round.splits));
  const auto kernel = score_and_sum_kernel<D, WARPS, BLOCKS>;
  constexpr int SMEM = sizeof(Tile<D, WARPS>);
  static_assert(SMEM + WARPS * (D + 1) * 4 <= small_smem(D, WARPS), "what the planner takes it for");
  check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM));
  kernel<<<grid, 32 * WARPS, SMEM, stream>>>(in, round);
  check_launch(op);
  launch_following(op, plan.early_merge, merge_kernel<D>,
                   dim3(blocks(MERGE_ROWS), static_cast<unsigned>(in.d)), MERGE_ROWS * MERGE_SHARES, 0,
                   stream, in, round);
  return true;
}

}  // namespace

void run_small_float(const char* op, const Inputs& in, const Plan& plan, void* workspace,
                     cudaStream_t stream) {
  Carver carver(workspace);
  Round round;
  round.parts = carver.take<float>(plan.splits * (plan.tile_d + 2) * plan.rows_per_pass);
  round.centre = carver.take<float>(plan.tile_d);
  round.split_refs = plan.refs_per_pass / plan.splits;
  round.splits = static_cast<int>(plan.splits);
  for (round.first_row = 0; round.first_row < in.n; round.first_row += plan.rows_per_pass) {
    round.rows = std::min(plan.rows_per_pass, in.n - round.first_row);
    const bool launched = launch_if<10, 16, 1>(op, in, plan, round, stream) ||
                          launch_if<10, 4, 3>(op, in, plan, round, stream) ||
                          launch_if<12, 16, 1>(op, in, plan, round, stream) ||
                          launch_if<12, 4, 3>(op, in, plan, round, stream) ||
                          launch_if<14, 12, 1>(op, in, plan, round, stream) ||
                          launch_if<14, 4, 2>(op, in, plan, round, stream) ||
                          launch_if<16, 8, 1>(op, in, plan, round, stream) ||
                          launch_if<16, 4, 2>(op, in, plan, round, stream);
    if (!launched)
      throw std::runtime_error(std::string("svel::") + op + ": no compiled kernel for the planned tile");
  }
}

}  // namespace svel::cuda
