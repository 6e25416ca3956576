// The steps of many_rows.cuh around its matrix products: centre, rows, norms, selection, weights, single
// references, merging. Bytes per round: scores written once and read twice at 4 bytes a pair, maxima at 1/16
// of that; a listed reference is read twice, mostly from the L2 the second time.
#include <cfloat>
#include <type_traits>

#include "stable_target/many_rows.cuh"
#include "stable_target/scan.cuh"

namespace svel::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int SELECT_THREADS = 512;
constexpr int WEIGHT_UNITS = 8;    // of a row
constexpr int RESIDENT = 4;        // blocks of weights_kernel to a multiprocessor
constexpr int MERGED_SPLITS = 12;  // parts of sums that are on their way at once
constexpr int ORDER_THREADS = 1024;
constexpr int64_t LISTED_D = 16 * THREADS;  // longer references do not fit the registers
constexpr int CENTRE_LANES = 8;             // threads per element of D
constexpr float WEIGHT_SCALE = 32768.0f;    // weights are at most 1; as halves they keep 40 binary places
// References that together weigh less than this times the largest are left out.
constexpr double FORGOTTEN_LOG2_EXACT = 24, FORGOTTEN_LOG2_FAST = 13;
enum Statistic {
  SHIFT,
  SPREAD,
  LEFT_OUT,
  NORM_PLAIN,
  NORM_STRICT,
  NORM_ALL,
  MAX_PLAIN,
  MAX_CENTRED,
  STATISTICS
};
constexpr int HELD_SAMPLES = static_cast<int>(MANY_SAMPLES) / CENTRE_LANES;  // of a thread of centre_kernel
static_assert(MANY_PAIRS == 2 * MANY_SAMPLES);
// The norm of float32 references that are far; others' are no less than -mean_norm.
constexpr float FAR_NORM = -FLT_MAX;

// Whether references are float32: halves of d_j are made, see halves_kernel.
template <typename T>
constexpr bool IS_FLOAT = DtypeOf<T>::value == Dtype::f32;
// Whether differences are times a scale: all but float16.
template <typename T>
constexpr bool IS_SCALED = DtypeOf<T>::value != Dtype::f16;

// Eight references' elements as stored, aligned to 16 bytes.
template <typename T>
struct Eight {
  static constexpr int VECTORS = sizeof(T) / 2;
  uint4 raw[VECTORS];

  __device__ __forceinline__ explicit Eight(const void* from) {
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) raw[i] = static_cast<const uint4*>(from)[i];
  }
  __device__ __forceinline__ float operator[](int k) const {
    return to_float(reinterpret_cast<const T*>(raw)[k]);
  }
};

// c with four binary digits, so that differences of it and halves near it are exact; zero where it is too
// small or large for halves.
__device__ float coarse(double mean) {
  const float c = __uint_as_float((__float_as_uint(static_cast<float>(mean)) + 0x00080000u) & 0xfff00000u);
  return fabsf(c) >= 1.0f / 8192 && fabsf(c) <= 4096.0f ? c : 0.0f;
}

// The place of the `number`-th valid reference of all classes. until: valid references of each class and
// those before, the same from the last class on.
__device__ int64_t find_reference(const int (&until)[MANY_CLASSES], int64_t class_refs, int number) {
  int own = 0;  // classes that end before it
#pragma unroll
  for (int step = static_cast<int>(MANY_CLASSES) / 2; step > 0; step /= 2)
    if (until[own + step - 1] <= number) own += step;
  return own * class_refs + number - (own > 0 ? until[own - 1] : 0);
}

// By a warp: that, and where classes end.
__device__ void count_classes(const Inputs& in, const Many& many, int (&until)[MANY_CLASSES]) {
  constexpr int EACH_LANE = static_cast<int>(MANY_CLASSES) / 32;
  const int first = EACH_LANE * static_cast<int>(threadIdx.x % 32);
  int own[EACH_LANE], sum = 0;
#pragma unroll
  for (int i = 0; i < EACH_LANE; ++i) {
    const int count = first + i < in.k ? static_cast<int>(valid_count(in, first + i)) : 0;
    if (blockIdx.x == 0 && first + i < in.k)
      many.classes->ends[first + i] = (first + i) * static_cast<int>(in.m) + count;
    own[i] = sum += count;
  }
  int before = sum;  // and this lane's
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, before, offset);
    if (threadIdx.x % 32 >= offset) before += other;
  }
#pragma unroll
  for (int i = 0; i < EACH_LANE; ++i) until[first + i] = before - sum + own[i];
}

// What is asked of samples, where the parts of sums come later. In a byte each the exponents of float32
// values, 0 of samples that are not there, else at least 1.
struct SampleSizes {
  // (d_tiles, 2, CENTRE_LANES, HELD_SAMPLES), as threads have them: of the largest element of each, and of
  // the largest difference from the middle one of three of the thread's.
  uint8_t* exponents;
  // (d_tiles, 2, MANY_SAMPLES), of those in question: the largest difference from the median of each element,
  // and the largest element. Values that are not finite are none.
  float* sizes;
  int* tiles;  // (3,) whose sizes have been begun, are there, or are known to all

  __device__ explicit SampleSizes(const Many& many) {
    const int64_t count = many.d_stride / MANY_TILE * 2 * MANY_SAMPLES;
    sizes = many.partial;
    tiles = reinterpret_cast<int*>(sizes + count);
    exponents = reinterpret_cast<uint8_t*>(tiles + 4);
  }
};

// Ascending values of a column, HELD_SAMPLES in each of its CENTRE_LANES threads; INFINITY for those that are
// none. By all threads of a block.
__device__ __forceinline__ void sort_column(float (&v)[HELD_SAMPLES]) {
  constexpr int EACH = HELD_SAMPLES;
  __shared__ float exchanged[CENTRE_LANES][2][MANY_TILE];
  const int column = threadIdx.x % MANY_TILE, part = threadIdx.x / MANY_TILE;
  const auto order = [](float& a, float& b) {
    const float low = fminf(a, b);
    b = fmaxf(a, b), a = low;
  };
  // The smaller or the larger ones of these and of another thread's, in their order or the opposite one.
  const auto exchange = [&](int other, bool opposite) {
#pragma unroll
    for (int i = 0; i < EACH / 2; ++i) {
      float* const pair[] = {&v[i], &v[EACH - 1 - i]};
      __syncthreads();
#pragma unroll
      for (int k = 0; k < 2; ++k) exchanged[part][k][column] = *pair[k];
      __syncthreads();
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float own = exchanged[other][opposite ? 1 - k : k][column];
        *pair[k] = part < other ? fminf(*pair[k], own) : fmaxf(*pair[k], own);
      }
    }
  };
#pragma unroll
  for (int round = 0; round < EACH; ++round)
#pragma unroll
    for (int k = round % 2; k + 1 < EACH; k += 2) order(v[k], v[k + 1]);
#pragma unroll 1
  for (int merged = 2; merged <= CENTRE_LANES; merged *= 2) {  // bitonic
    exchange(part ^ (merged - 1), true);
#pragma unroll 1
    for (int apart = merged / 4; apart > 0; apart /= 2) exchange(part ^ apart, false);
#pragma unroll
    for (int apart = EACH / 2; apart > 0; apart /= 2)
#pragma unroll
      for (int k = 0; k < EACH; ++k)
        if (!(k & apart)) order(v[k], v[k + apart]);
  }
}

// Element e of sample s; absent: where there is none.
template <typename T, bool CLASSES>
__device__ __forceinline__ float load_sample(const Inputs& in, const int* until, int64_t valid,
                                             int64_t samples, int64_t s, int64_t e, float absent) {
  if (e >= in.d || s >= samples) return absent;
  int64_t sample = valid < MANY_SAMPLES ? s : valid * s / MANY_SAMPLES;
  if constexpr (CLASSES)
    sample =
        find_reference(*reinterpret_cast<const int (*)[MANY_CLASSES]>(until), in.m, static_cast<int>(sample));
  return to_float(static_cast<const T*>(in.refs.data)[sample * in.d + e]);
}

// The sizes of samples in one tile of D. By all threads of a block; until: as find_reference has it.
template <typename T, bool CLASSES>
__device__ __forceinline__ void measure_samples(const Inputs& in, const Many& many, const int* until,
                                                int64_t valid, int tile) {
  __shared__ float medians[MANY_TILE];
  __shared__ int counts[MANY_TILE];
  __shared__ int sizes[2 * MANY_SAMPLES];  // bits
  const int column = threadIdx.x % MANY_TILE, part = threadIdx.x / MANY_TILE;
  const int64_t e = static_cast<int64_t>(tile) * MANY_TILE + column;
  if (threadIdx.x < 2 * MANY_SAMPLES) sizes[threadIdx.x] = 0;
  if (part == 0) counts[column] = 0;
  __syncthreads();
  const int64_t samples = valid < MANY_SAMPLES ? valid : MANY_SAMPLES;
  const auto number = [part](int i) { return CLASSES ? part * HELD_SAMPLES + i : part + i * CENTRE_LANES; };
  float seen[HELD_SAMPLES], sorted[HELD_SAMPLES];
#pragma unroll
  for (int i = 0; i < HELD_SAMPLES; ++i)
    seen[i] = load_sample<T, CLASSES>(in, until, valid, samples, number(i), e, INFINITY);
  int found = 0;
#pragma unroll
  for (int i = 0; i < HELD_SAMPLES; ++i) {
    if (!isfinite(seen[i])) seen[i] = INFINITY;
    sorted[i] = seen[i], found += seen[i] < INFINITY;
  }
  atomicAdd(&counts[column], found);
  sort_column(sorted);
  const int middle = max(counts[column] - 1, 0) / 2 - part * HELD_SAMPLES;
#pragma unroll
  for (int i = 0; i < HELD_SAMPLES; ++i)
    if (i == middle) medians[column] = sorted[i];
  __syncthreads();
  const float median = medians[column];
#pragma unroll
  for (int i = 0; i < HELD_SAMPLES; ++i) {
    const bool any = seen[i] < INFINITY;
    const float size = any ? fabsf(seen[i] - median) : 0.0f, plain = any ? fabsf(seen[i]) : 0.0f;
    const int most = __reduce_max_sync(0xffffffffu, __float_as_int(size)),
              most_plain = __reduce_max_sync(0xffffffffu, __float_as_int(plain));
    if (threadIdx.x % 32 == 0)
      atomicMax(&sizes[number(i)], most), atomicMax(&sizes[MANY_SAMPLES + number(i)], most_plain);
  }
  __syncthreads();
  if (threadIdx.x < 2 * MANY_SAMPLES)
    SampleSizes(many).sizes[tile * 2 * MANY_SAMPLES + threadIdx.x] = __int_as_float(sizes[threadIdx.x]);
}

// Which samples the centre and the scale are not from: those that are OUTLIER times as far from the others as
// the third of the farthest, or as half of them where halves do not reach both; copies of one reference do
// not count. Where nearly all are copies, the others have no say in the centre, and half of them in the
// scale.
constexpr float OUTLIER = 16, WIDE = 0x1p15f, NARROW = 0x1p-14f;
struct Samples {
  unsigned outliers[MANY_SAMPLES / 32];  // a bit each, of two times 32
  float size;                            // where nearly all are copies: of the others
  // The largest difference of the others comes to 2^(1 + room) or twice that: halves reach up to 2^16, and
  // small references have digits down to 2^-5. So the more room the smaller some are.
  int room;
  // Sizes differ so much that scores, which are as large as the norms above norm0, would hide small ones
  // unless that is zero.
  bool uneven;
  bool usual;  // none of this: centre and scale stay
};
constexpr int USUAL_SPREAD = 2, LEAST_ROOM = 4, MOST_ROOM = 10, UNEVEN = 6;  // powers of two
// By all threads of a block.
__device__ __forceinline__ void judge_samples(const Many& many, int64_t samples, Samples& judged) {
  constexpr int COUNT = static_cast<int>(MANY_SAMPLES), PARTS = MANY_TILE * CENTRE_LANES / (2 * COUNT);
  __shared__ float parts[PARTS][2 * COUNT], high, middle;
  __shared__ int low_bits, top_bits;  // the smallest and the largest
  __shared__ int any_least;           // whether some are smaller than halves reach
  const int tid = static_cast<int>(threadIdx.x);
  float size = 0;
#pragma unroll 4
  for (int64_t tile = tid / (2 * COUNT); tile < many.d_stride / MANY_TILE; tile += PARTS)
    size = fmaxf(size, __ldcg(SampleSizes(many).sizes + tile * 2 * COUNT + tid % (2 * COUNT)));
  parts[tid / (2 * COUNT)][tid % (2 * COUNT)] = size;
  if (tid == 0) high = middle = 0, low_bits = __float_as_int(INFINITY), top_bits = any_least = 0;
  __syncthreads();
  if (tid < 2 * COUNT) {
#pragma unroll
    for (int part = 1; part < PARTS; ++part) size = fmaxf(size, parts[part][tid]);
    parts[0][tid] = size;
  }
  if (tid >= COUNT) size = 0;
  const int apart = __syncthreads_count(size > 0);
  if (size > 0) {
    int rank = 0;
#pragma unroll 16
    for (int other = 0; other < COUNT; ++other) {
      const float of_other = parts[0][other];
      rank += of_other > 0 && (of_other < size || (of_other == size && other < tid));
    }
    if (rank == apart - 1 - (apart < 3 ? 0 : max(apart / 32, 1))) high = size;
    if (rank == (apart - 1) / 2) middle = size;
  }
  __syncthreads();
  const bool copies = apart <= samples / 8;
  const float usual = high > WIDE * middle ? middle : high;
  const bool is_outlier = size > (copies ? 0.0f : OUTLIER * usual);
  const unsigned outliers = __ballot_sync(0xffffffffu, is_outlier);
  if (tid < COUNT) {
    const float least = fminf(size, parts[0][COUNT + tid]);
    if (least > NARROW * usual) {
      atomicMin(&low_bits, __float_as_int(least));
    } else if (least > 0) {
      any_least = 1;
    }
    if (!is_outlier) atomicMax(&top_bits, __float_as_int(size));
    if (tid % 32 == 0) judged.outliers[tid / 32] = outliers;
  }
  __syncthreads();
  if (tid == 0) {
    judged.size = copies ? middle : 0.0f;
    const float low = __int_as_float(low_bits), top = fmaxf(__int_as_float(top_bits), judged.size);
    const int spread = low < top && top < INFINITY ? ilogbf(top) - ilogbf(low) : 0;
    judged.room = min(max(spread + 1, LEAST_ROOM), MOST_ROOM);
    judged.uneven = copies || spread >= UNEVEN || any_least;
    judged.usual = !judged.uneven && spread <= USUAL_SPREAD && !judged.outliers[0] && !judged.outliers[1];
  }
  __syncthreads();
}

// Of a warp's values the largest of each of the thread's eight, that of lane / 4.
__device__ __forceinline__ unsigned largest_pairs(unsigned (&v)[HELD_SAMPLES], int lane) {
  int offset = 16;
#pragma unroll
  for (int half = HELD_SAMPLES / 2; half > 0; half /= 2, offset /= 2) {
    const bool upper = lane & offset;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const unsigned give = upper ? v[i] : v[i + half], keep = upper ? v[i + half] : v[i];
      v[i] = __vmaxu2(keep, __shfl_xor_sync(0xffffffffu, give, offset));
    }
  }
  unsigned most = v[0];
  for (; offset > 0; offset /= 2) most = __vmaxu2(most, __shfl_xor_sync(0xffffffffu, most, offset));
  return most;
}

// Mean and variance of a sample of the references, per element of a tile; what follows from either choice of
// c, and squared distances of some pairs of them. many.centre: first c = coarse mean wherever the mean is
// many deviations from zero, then c everywhere. CLASSES: a thread's are neighbours, mostly of one class, so
// that distances are those within classes; values that are not finite are none. JUDGED: without those samples
// that are outliers; and the largest of the others is over two to `room`. Else, where differences are scaled,
// whether there may be any is asked as well: exponents. These are of differences from the middle one of three
// of the thread's.
template <typename T, bool CLASSES, bool JUDGED>
__device__ __forceinline__ void find_centre(const Inputs& in, const Many& many, unsigned tile,
                                            const Samples* judged) {
  __shared__ double sums[CENTRE_LANES][MANY_TILE], squares[CENTRE_LANES][MANY_TILE];
  __shared__ float lowest[CENTRE_LANES][MANY_TILE], highest[CENTRE_LANES][MANY_TILE];
  __shared__ double of_warps[STATISTICS][MANY_TILE / 32];
  constexpr int PAIRS = 2 * HELD_SAMPLES;  // of a thread
  __shared__ float distances[MANY_TILE / 32][CENTRE_LANES * PAIRS];
  const int column = threadIdx.x % MANY_TILE, part = threadIdx.x / MANY_TILE;
  const int64_t e = static_cast<int64_t>(tile) * MANY_TILE + column;
  __shared__ std::conditional_t<CLASSES, int[MANY_CLASSES], char> until;
  constexpr bool ASKED = IS_SCALED<T> && !JUDGED, COUNTED = CLASSES || JUDGED;  // not all come in the mean
  __shared__ std::conditional_t<COUNTED, int[CENTRE_LANES][MANY_TILE], char> finite;
  __shared__ std::conditional_t<ASKED, unsigned[MANY_TILE / 32][MANY_SAMPLES], char> exponents;
  if constexpr (CLASSES) {
    if (threadIdx.x < 32) count_classes(in, many, until);
    __syncthreads();
  }
  int64_t valid;
  if constexpr (CLASSES) {
    valid = until[MANY_CLASSES - 1];
  } else {
    valid = valid_count(in, 0);
  }
  const int64_t samples = valid < MANY_SAMPLES ? valid : MANY_SAMPLES;
  double sum = 0, square = 0;
  float low = INFINITY, high = -INFINITY;
  float seen[HELD_SAMPLES];  // all are loaded before the first is looked at
#pragma unroll
  for (int i = 0; i < HELD_SAMPLES; ++i) {
    const int64_t s = CLASSES ? part * HELD_SAMPLES + i : part + i * CENTRE_LANES;
    int64_t sample = valid < MANY_SAMPLES ? s : valid * s / MANY_SAMPLES;
    if constexpr (CLASSES) {
      if (s < samples) sample = find_reference(until, in.m, static_cast<int>(sample));
    }
    seen[i] =
        e < in.d && s < samples ? to_float(static_cast<const T*>(in.refs.data)[sample * in.d + e]) : 0.0f;
  }
  int found = 0;
#pragma unroll
  for (int i = 0; i < HELD_SAMPLES; ++i) {
    if (CLASSES && !isfinite(seen[i])) {
      seen[i] = 0;
      continue;
    }
    const float v = seen[i];
    if (e >= in.d || (CLASSES ? part * HELD_SAMPLES + i : part + i * CENTRE_LANES) >= samples) continue;
    if constexpr (JUDGED) {
      const int s = CLASSES ? part * HELD_SAMPLES + i : part + i * CENTRE_LANES;
      if (judged->outliers[s / 32] >> s % 32 & 1) continue;
    }
    ++found;
    sum += v, square += static_cast<double>(v) * v;
    low = fminf(low, v), high = fmaxf(high, v);
  }
  sums[part][column] = sum, squares[part][column] = square;
  lowest[part][column] = low, highest[part][column] = high;
  if constexpr (COUNTED) finite[part][column] = found;
  __syncthreads();
  double own[STATISTICS] = {};
  if (part == 0) {
    for (int other = 1; other < CENTRE_LANES; ++other) {
      sum += sums[other][column], square += squares[other][column];
      low = fminf(low, lowest[other][column]), high = fmaxf(high, highest[other][column]);
    }
    float all = 0, strict = 0;
    int64_t samples_here = samples;
    if constexpr (COUNTED) {
      for (int other = 1; other < CENTRE_LANES; ++other) found += finite[other][column];
      samples_here = found;
    }
    if (e < in.d && samples_here > 0) {
      const double mean = sum / samples_here, variance = fmax(square / samples_here - mean * mean, 0.0);
      all = IS_FLOAT<T> ? static_cast<float>(mean) : coarse(mean);
      strict = mean * mean >= 64 * variance ? all : 0.0f;
      own[SHIFT] = mean * mean, own[SPREAD] = variance;
      own[LEFT_OUT] = strict == 0 ? mean * mean : 0;
      own[NORM_PLAIN] = square / samples_here;
      own[NORM_STRICT] = variance + (mean - strict) * (mean - strict);
      own[NORM_ALL] = variance + (mean - all) * (mean - all);
      own[MAX_PLAIN] = fmax(fabs(low), fabs(high));
      own[MAX_CENTRED] = fmax(IS_FLOAT<T> ? 0.0 : own[MAX_PLAIN], fmax(fabs(low - all), fabs(high - all)));
    }
    many.centre[e] = strict;
    many.centre[many.d_stride + e] = all;
  }
  const auto joined = [](int k, double a, double b) { return k < MAX_PLAIN ? a + b : fmax(a, b); };
  if (part == 0) {
#pragma unroll
    for (int k = 0; k < STATISTICS; ++k) {
      double value = own[k];
      for (int offset = 16; offset > 0; offset /= 2)
        value = joined(k, value, __shfl_xor_sync(0xffffffffu, value, offset));
      if (column % 32 == 0) of_warps[k][column / 32] = value;
    }
  }
  if constexpr (ASKED) {
    const float a = seen[0], b = seen[HELD_SAMPLES / 2 - 1], c = seen[HELD_SAMPLES - 2];
    const float middle = fmaxf(fminf(a, b), fminf(fmaxf(a, b), c));
    unsigned pairs[HELD_SAMPLES];
#pragma unroll
    for (int i = 0; i < HELD_SAMPLES; ++i) {
      const int64_t s = CLASSES ? part * HELD_SAMPLES + i : part + i * CENTRE_LANES;
      const unsigned plain = __float_as_uint(seen[i]) << 1 >> 24,
                     apart = __float_as_uint(seen[i] - middle) << 1 >> 24;
      pairs[i] = s < samples ? __vmaxu2(plain << 16 | apart, 0x00010001u) : 0u;
    }
    const unsigned most = largest_pairs(pairs, column % 32);
    if (column % 4 == 0) {
      exponents[column / 32][part * HELD_SAMPLES + column % 32 / 4] = most;
    }
  }
  if (!JUDGED && many.exact) {  // most warps have nothing else to do by now
    float pairs[PAIRS];
#pragma unroll
    for (int k = 0; k < PAIRS; ++k) {
      const int next = k < HELD_SAMPLES ? 1 : 3;  // each with the next, around, and with the third from it
      const float apart = seen[k % HELD_SAMPLES] - seen[(k + next) % HELD_SAMPLES];
      pairs[k] = apart * apart;
    }
    const int lane = column % 32;
    const float of_warp = warp_sums<PAIRS>(pairs, lane);
    if (lane % (32 / PAIRS) == 0) distances[column / 32][part * PAIRS + lane / (32 / PAIRS)] = of_warp;
  }
  __syncthreads();
  const int k = threadIdx.x;
  if (!JUDGED && many.exact && k < MANY_PAIRS) {
    float of_tile = 0;
#pragma unroll
    for (int warp = 0; warp < MANY_TILE / 32; ++warp) of_tile += distances[warp][k];
    many.distances[tile * MANY_PAIRS + k] = of_tile;
  }
  if constexpr (ASKED) {
    if (k < static_cast<int>(MANY_SAMPLES)) {
      unsigned most = 0;
#pragma unroll
      for (int warp = 0; warp < MANY_TILE / 32; ++warp) most = __vmaxu2(most, exponents[warp][k]);
      const SampleSizes sizes(many);
      uint8_t* const to = sizes.exponents + tile * 2 * MANY_SAMPLES + k;
      to[0] = static_cast<uint8_t>(most >> 16), to[MANY_SAMPLES] = static_cast<uint8_t>(most);
      if (tile == 0 && k < 3) sizes.tiles[k] = 0;
    }
  }
  if (k >= STATISTICS) return;
  double value = of_warps[k][0];
  for (int warp = 1; warp < MANY_TILE / 32; ++warp) value = joined(k, value, of_warps[k][warp]);
  if constexpr (JUDGED) {
    if (k >= MAX_PLAIN) value = ldexp(fmax(value, static_cast<double>(judged->size)), -judged->room);
    if (k >= NORM_PLAIN && k < MAX_PLAIN && judged->uneven) value = 0;
    if (tile == 0 && k == 0 && judged->uneven)  // 16 times that of elements all as large as the largest
      many.facts->most_norm = static_cast<float>(in.d) * exp2f(8 + 2 * judged->room);
  } else if constexpr (ASKED) {
    if (tile == 0 && k == 0) many.facts->most_norm = 0;
    if (!IS_FLOAT<T> && tile == 0 && k == 0) many.facts->far = 0;
  }
  many.statistics[tile * STATISTICS + k] = value;
  if constexpr (JUDGED) return;
  if constexpr (CLASSES) {
    if (tile == 0 && k < static_cast<int>(MANY_ROW_TILES)) many.classes->early[k] = 0;
  } else if (tile == 0 && k == 0) {
    many.facts->early = 0;
  }
}

template <typename T, bool CLASSES>
__global__ void __launch_bounds__(MANY_TILE* CENTRE_LANES) centre_kernel(const Inputs in, const Many many) {
  allow_next_launch();
  find_centre<T, CLASSES, false>(in, many, blockIdx.x, nullptr);
}

// Whether exponents in so many tiles tell that all samples are much of a size, but not all the same, and that
// no one or two are far from the others: then the threads that have such are fewer than three, unless they
// are all. By all threads of a block.
constexpr int MANY_PARTS = 3;
__device__ __forceinline__ bool are_alike(const Many& many, int tiles) {
  constexpr int QUADS = 2 * static_cast<int>(MANY_SAMPLES) / 16, WARPS = MANY_TILE * CENTRE_LANES / 32;
  __shared__ uint4 of_warps[WARPS][QUADS];
  const int tid = threadIdx.x, lane = tid % 32, quads = tiles * QUADS;
  const uint4* const from = reinterpret_cast<const uint4*>(SampleSizes(many).exponents);
  const auto larger = [](uint4 a, uint4 b) {
    return make_uint4(__vmaxu4(a.x, b.x), __vmaxu4(a.y, b.y), __vmaxu4(a.z, b.z), __vmaxu4(a.w, b.w));
  };
  uint4 most{};
#pragma unroll 1
  for (int k = tid; k < quads; k += WARPS * 32) most = larger(most, from[k]);
#pragma unroll
  for (int offset = 16; offset >= QUADS; offset /= 2)
    most = larger(most, make_uint4(__shfl_xor_sync(0xffffffffu, most.x, offset),
                                   __shfl_xor_sync(0xffffffffu, most.y, offset),
                                   __shfl_xor_sync(0xffffffffu, most.z, offset),
                                   __shfl_xor_sync(0xffffffffu, most.w, offset)));
  if (lane < QUADS) of_warps[tid / 32][lane] = most;
  __syncthreads();
  bool alike = true;
  if (tid < 32) {  // four samples to a lane, half of the lanes to either size
    unsigned four = 0;
#pragma unroll 1
    for (int warp = 0; warp < min(WARPS, (quads + 31) / 32); ++warp)
      four = __vmaxu4(four, reinterpret_cast<const unsigned*>(of_warps[warp])[lane]);
    int low = 255, high = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int own = four >> 8 * i & 255;
      if (own > 0) low = min(low, own), high = max(high, own);
    }
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) {
      low = min(low, __shfl_xor_sync(0xffffffffu, low, offset));
      high = max(high, __shfl_xor_sync(0xffffffffu, high, offset));
    }
    // Two lanes to a thread's.
    const auto parts = [](bool any) {
      const unsigned lanes = __ballot_sync(0xffffffffu, any) >> 16;
      return __popc((lanes | lanes >> 1) & 0x5555u);
    };
    bool any_far = false;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      any_far = any_far || static_cast<int>(four >> 8 * i & 255) >= high - USUAL_SPREAD;
    const int present = parts(four != 0), far = parts(four != 0 && any_far);
    alike = (lane < 16 ? high - low <= USUAL_SPREAD : far >= min(MANY_PARTS, present)) && high != 1;
  }
  return __syncthreads_and(alike);
}

// Where samples are not alike: which are outliers, and what the centre and the scale are without these.
// Blocks take tiles of D as they come, so that they wait for no block that has not begun.
template <typename T, bool CLASSES>
__global__ void __launch_bounds__(MANY_TILE* CENTRE_LANES) judge_kernel(const Inputs in, const Many many) {
  allow_next_launch();
  const int all = static_cast<int>(many.d_stride / MANY_TILE);
  bool alike = true;
#pragma unroll 1
  for (int real = 0; real < 2; ++real) {  // first of no tiles, which brings the code
    if (real) wait_for_previous_launch();
    alike = are_alike(many, real ? all : 0);
  }
  if (alike) return;
  __shared__ std::conditional_t<CLASSES, int[MANY_CLASSES], int> until;
  __shared__ Samples judged;
  __shared__ int taken;
  int64_t valid;
  const int* ends = nullptr;
  if constexpr (CLASSES) {
    if (threadIdx.x < 32) count_classes(in, many, until);
    __syncthreads();
    valid = until[MANY_CLASSES - 1], ends = until;
  } else {
    valid = valid_count(in, 0);
  }
  int* const tiles = SampleSizes(many).tiles;
  const auto take = [&](int which) {
    __syncthreads();
    if (threadIdx.x == 0) taken = atomicAdd(tiles + which, 1);
    __syncthreads();
    return taken;
  };
#pragma unroll 1
  for (int tile = take(0); tile < all; tile = take(0)) {
    measure_samples<T, CLASSES>(in, many, ends, valid, tile);
    __syncthreads();
    if (threadIdx.x == 0) add_arrival(tiles + 1);
  }
  if (threadIdx.x == 0)
    while (read_arrivals(tiles + 1) < all) {
    }
  __syncthreads();
  judge_samples(many, valid < MANY_SAMPLES ? valid : MANY_SAMPLES, judged);
  if (judged.usual) return;
#pragma unroll 1
  for (int tile = take(2); tile < all; tile = take(2)) find_centre<T, CLASSES, true>(in, many, tile, &judged);
}

__device__ double two_to(int exponent) {  // for exponents of normal numbers
  return __hiloint2double((1023 + exponent) << 20, 0);
}

struct Choice {  // of the centre
  int which;     // 0 none, 1 strict, 2 all
  float scale, mean_norm;
};

// No centre while the common part of the references is no larger than what they differ by; one that leaves
// out elements of small mean where that leaves out little, because it is exact nearly everywhere; else all of
// it. FLOAT: of float32 references, whose differences are made anyhow, all of it sooner, but where sizes
// differ much: small ones would lose digits.
template <bool FLOAT>
__device__ Choice choose_centre(const Inputs& in, const Many& many, const double (&statistics)[STATISTICS]) {
  Choice choice;
  const auto least_shift = [&] { return many.facts->most_norm > 0 ? 6 : 0.25; };
  choice.which = FLOAT && statistics[SHIFT] > least_shift() * statistics[SPREAD] ? 2
                 : statistics[SHIFT] <= 6 * statistics[SPREAD]                   ? 0
                 : statistics[LEFT_OUT] <= 6 * statistics[SPREAD]                ? 1
                                                                                 : 2;
  choice.scale = 1;
  if (FLOAT || in.refs.dtype == Dtype::bf16) {  // the largest difference to 2 .. 4, see Samples
    double largest = statistics[choice.which ? MAX_CENTRED : MAX_PLAIN];
    if (FLOAT && largest == 0) largest = statistics[MAX_PLAIN];  // of copies, but others may differ
    if (largest > 0 && isfinite(largest))
      choice.scale = static_cast<float>(two_to(1 - max(-60, min(60, ilogb(largest)))));
  }
  choice.mean_norm = static_cast<float>(statistics[NORM_PLAIN + choice.which] * choice.scale * choice.scale);
  return choice;
}

// Valid references of all classes; by all threads of a block. scratch: 33 values.
__device__ int all_references(const Inputs& in, int* scratch) {
  int own = 0;
  for (int64_t k = threadIdx.x; k < in.k; k += blockDim.x) own += static_cast<int>(valid_count(in, k));
  return block_sum<int>(own, scratch);
}

// Row i, and whether it has any reference. all: of one that has those of all classes.
__device__ Row row_of(const Inputs& in, int64_t i, int64_t all, bool& alive) {
  const Row row = make_row(in, i, all, alive);
  alive = alive && (row.count > 0 || in.source.data);
  return row;
}

// Where its references are, if valid. A pool has labels too if its class is the only one.
__device__ int2 range_of(const Inputs& in, const Row& row, bool alive) {
  if (!alive) return {0, 0};
  if (row.group < 0) return {0, static_cast<int>(in.k * in.m)};
  const int first = static_cast<int>(row.group * in.m);
  return {first, first + static_cast<int>(row.count)};
}

// Rows are sorted by this: falling time, and those that have no references last. by_class: by class, rows of
// all classes after those.
template <bool LABELS>
using Order = std::conditional_t<LABELS, uint32_t, float>;
template <bool LABELS>
__device__ Order<LABELS> order_of(const Row& row, bool alive, bool by_class) {
  const double rate = row.rate();
  const float of_time = alive && rate >= 0 ? static_cast<float>(rate) : INFINITY;
  if constexpr (LABELS) {
    if (!alive) return UINT_MAX;
    if (by_class) return static_cast<uint32_t>(row.group < 0 ? MANY_CLASSES : row.group);
    return __float_as_uint(fabsf(of_time));
  }
  return of_time;
}

// A warp per row, every so many of them: its place. Memory: n floats. LABELS: rows have them. By class those
// of one are as they came, so that two tiles which share it both have rows of all times; rows_kernel puts the
// rows of a tile in the order of these.
template <bool LABELS>
__global__ void __launch_bounds__(ORDER_THREADS) order_kernel(const Inputs in, const Many many) {
  if constexpr (LABELS) {
    allow_next_launch();  // what is read was there before any launch
  } else {
    follow_previous();
  }
  extern __shared__ uint32_t order_memory[];
  auto* const orders = reinterpret_cast<Order<LABELS>*>(order_memory);
  const int64_t n = in.n;
  int64_t all = 0;
  if constexpr (LABELS) {
    __shared__ int scratch[33];
    all = all_references(in, scratch);
  }
  for (int64_t i = threadIdx.x; i < n; i += ORDER_THREADS) {
    bool alive;
    const Row row = row_of(in, i, all, alive);
    orders[i] = order_of<LABELS>(row, alive, LABELS && ordered_by_class(many));
  }
  __syncthreads();
  if constexpr (LABELS) wait_for_previous_launch();
  const int lane = threadIdx.x % 32, warps = gridDim.x * (ORDER_THREADS / 32);
  for (int64_t i = (blockIdx.x * ORDER_THREADS + threadIdx.x) / 32; i < n; i += warps) {
    const Order<LABELS> own = orders[i];
    int before = 0;
    for (int64_t j = lane; j < n; j += 32) before += orders[j] < own || (orders[j] == own && j < i);
    before = __reduce_add_sync(0xffffffffu, before);
    if (lane == 0) many.order[before] = static_cast<int>(i);
  }
}

// Squared distances of references: their mean, and the shape of the gamma distribution that is most likely
// (nearly: Minka, 2002). Where all directions are alike it comes to D / 2, of photographs to about one.
struct Distances {
  float mean, shape;
};
// By a warp. of_warps: sums over the tiles of D, in parts.
__device__ Distances distances_of(const float4 (&of_warps)[THREADS / 32][32]) {
  constexpr int EACH = 4;
  float pairs[EACH] = {}, sum = 0, logs = 0;
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; ++warp) {
    const float4 v = of_warps[warp][threadIdx.x % 32];
    pairs[0] += v.x, pairs[1] += v.y, pairs[2] += v.z, pairs[3] += v.w;
  }
#pragma unroll
  for (int i = 0; i < EACH; ++i) sum += pairs[i];
  const float mean = warp_sum(sum) / MANY_PAIRS;
#pragma unroll
  for (int i = 0; i < EACH; ++i) logs += __logf(fmaxf(pairs[i] / mean, 1e-6f));  // equal ones are alike too
  const float s = fmaxf(-warp_sum(logs) / MANY_PAIRS, 1e-5f);
  return {mean, (3 - s + sqrtf((s - 3) * (s - 3) + 24 * s)) / (12 * s)};
}

// Whether a row is likely to be dense, so that its scores are better had in full at once. As if x were a
// noisy reference: with v = (alpha / sigma)^2 / 2 times the squared distance of another, the logit of that
// lies v below, give or take sqrt(2 v). It matters if that is less than `cut`. For distances of a gamma
// distribution a share of at most exp(-rarity) do, the largest over s of
//   rarity(s) = shape log(1 + (s - s^2) v / shape) - s cut, with the mean of v;
// the derivative is zero where (cut / shape) s^2 - (2 + cut / shape) s + 1 - cut / v is. Little but time
// depends on it. A product for rows that were not expected takes no less than reading the references; for
// the rows of one tile more than it would have beside the first: these are expected to be dense sooner, the
// more so where few rows have most of what matters, as those of smooth images. Passes of more have all rows
// early or none, see early_end, those of classes each tile its own. doubt: of scores of y_hi, in bits; among
// references nearer than they can tell apart all of them matter. Where it is large the halves' products are
// better had apart: y_lo.d is small, and so is what its sums drop, which in one sum with y_hi.d is twice as
// much.
constexpr float MOST_DOUBT_EARLY = 2;
__device__ bool expect_dense(const Row& row, float doubt, const Distances& distances, float references,
                             bool one_tile) {
  const float ratio = static_cast<float>(row.alpha / row.sigma), v = 0.5f * ratio * ratio * distances.mean;
  if (references <= static_cast<float>(MANY_SURVIVORS) || doubt > MOST_DOUBT_EARLY || !isfinite(v))
    return false;
  const float cut = 0.7f * (static_cast<float>(FORGOTTEN_LOG2_EXACT + 9) + doubt), shape = distances.shape;
  if (v <= cut) return true;
  const float above = 1 - cut / v, linear = 2 + cut / shape;
  const float s = 2 * above / (linear + sqrtf(linear * linear - 4 * cut / shape * above));
  const float rarity = shape * log1pf((s - s * s) * v / shape) - s * cut;
  const float few = one_tile ? 32 : static_cast<float>(MANY_SURVIVORS);
  const float odds = sqrtf(2 * logf(fmaxf(references / few, 2.0f))) + (one_tile ? 0.5f : -0.6f);
  return rarity < 0.25f * odds * odds + (one_tile ? 2 / (1 + shape / 16) : 0.0f);
}

// What the errors of a row's scores leave in doubt, in bits of weight: much where scores are large for their
// digits. norm: of d_j, the largest; own: bound of the error of y.d_j, over |d_j|.
__device__ inline double doubt_of(const ManySlot& slot, double norm, float own) {
  const double root = sqrtf(static_cast<float>(norm)) * 1.0001f, of_norms = slot.row.alpha * norm * 0x1p-21;
  const double bound = own * root + of_norms, rate2 = slot.rate2;
  return 2 * bound * rate2;
}

// x and out are float32 and aligned to 16 bytes, and there is no source.
__host__ __device__ inline bool are_usual(const Inputs& in) {
  return is_vector(in.x) && is_vector(in.out) && !in.source.data;
}

// Halves from one row's y to the next.
template <bool FLOAT>
__device__ inline int64_t y_stride(const Many& many) {
  return (FLOAT ? 2 : 1) * many.d_stride;
}

// y of a row in two halves, its slot and factors, the part of its source. Y: the type of y, in which it is
// exact. distances: where exact, of the first warp. LABELS: its range, too. FLOAT: of references; the lower
// halves come first, then the upper ones, and no rows are expected to be dense.
template <typename Y, bool USUAL, bool LABELS, bool FLOAT>
__device__ __forceinline__ void store_row(const Inputs& in, const Many& many, const Row& row, bool alive,
                                          int64_t at, const Choice& choice, const float* candidate,
                                          const Distances& distances) {
  __shared__ double scratch[33];
  const int tid = threadIdx.x;
  const int64_t base = row.index * in.d;
  // y and c of eight elements from e on; zeros beyond D, which is a multiple of 8 here.
  const auto load_eight = [&](int64_t e, Y(&y)[8], float (&c)[8]) {
#pragma unroll
    for (int k = 0; k < 8; ++k) y[k] = 0, c[k] = 0;
    if (e >= in.d) return;
    if (choice.which) load8<float>({const_cast<float*>(candidate), Dtype::f32}, e, c);
    if constexpr (USUAL) {
      const float4* const from =
          reinterpret_cast<const float4*>(static_cast<const float*>(in.x.data) + base + e);
      const float4 low = from[0], high = from[1];
      const float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int k = 0; k < 8; ++k) y[k] = x[k];
    } else {
#pragma unroll
      for (int k = 0; k < 8; ++k) y[k] = static_cast<Y>(load_as<double>(in.x, base + e + k));
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) y[k] = static_cast<Y>(row.sign) * y[k] - static_cast<Y>(row.alpha) * c[k];
  };
  double score = 0;
  int bits = 0;  // of the largest |y|; NaN counts as more than anything
  if (alive) {
#pragma unroll 1
    for (int64_t e = 8 * tid; e < in.d; e += 8 * THREADS) {
      Y y[8];
      float c[8];
      load_eight(e, y, c);
#pragma unroll
      for (int k = 0; k < 8; ++k) bits = max(bits, __float_as_int(fabsf(static_cast<float>(y[k]))));
      if (!USUAL && in.source.data) {
        float* const sums = many.sums + at * many.d_stride + e;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const double own = load_as<double>(in.source, base + e + k) - c[k];
          sums[k] = static_cast<float>(own * choice.scale);
          score += (y[k] - 0.5 * row.alpha * own) * own;
        }
      }
    }
  }
  if (!USUAL) score = block_sum(score, scratch);
  __shared__ int largest_of[THREADS / 32];
  bits = __reduce_max_sync(0xffffffffu, bits);
  if (tid % 32 == 0) largest_of[tid / 32] = bits;
  __syncthreads();
  bits = __reduce_max_sync(0xffffffffu, largest_of[tid % (THREADS / 32)]);
  alive = alive && bits < 0x7f800000 && isfinite(score);
  // Such that the largest of |y| comes to 2^13 .. 2^14.
  const int exponent = alive && bits > 0 ? max(-100, min(100, 140 - (bits >> 23))) : 0;
  double square = 0, rest_square = 0, rest_centre = 0;  // all but the last of y 2^e
  const Y power = static_cast<Y>(two_to(exponent));
  const int64_t stride = y_stride<FLOAT>(many);
#pragma unroll 1
  for (int64_t e = 8 * tid; e < many.d_stride; e += 8 * THREADS) {
    Y y[8], squares = 0, rest_squares = 0;
    float c[8];
    load_eight(e, y, c);
    __align__(16) __half hi[8], lo[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const Y scaled = alive ? y[k] * power : Y(0);
      squares += scaled * scaled;
      hi[k] = __float2half(static_cast<float>(scaled));
      const float rest = static_cast<float>(scaled - static_cast<Y>(__half2float(hi[k])));
      rest_squares += static_cast<Y>(rest) * rest;
      lo[k] = __float2half(rest);
      if (!FLOAT && choice.which) rest_centre += static_cast<double>(__half2float(lo[k])) * c[k];
    }
    square += squares, rest_square += rest_squares;
    *reinterpret_cast<uint4*>(many.hi + at * stride + e) = *reinterpret_cast<const uint4*>(hi);
    *reinterpret_cast<uint4*>(many.lo + at * stride + e) = *reinterpret_cast<const uint4*>(lo);
  }
  __shared__ double parts[THREADS / 32][3];
  square = warp_sum(square), rest_square = warp_sum(rest_square), rest_centre = warp_sum(rest_centre);
  if (tid % 32 == 0) {
    double* const to = parts[tid / 32];
    to[0] = square, to[1] = rest_square, to[2] = rest_centre;
  }
  __syncthreads();
  if (tid != 0) return;
  if constexpr (LABELS) many.ranges[at] = range_of(in, row, alive);
#pragma unroll 1
  for (int other = 1; other < THREADS / 32; ++other)
    square += parts[other][0], rest_square += parts[other][1], rest_centre += parts[other][2];
  const double inverse = 1.0f / choice.scale, unpower = two_to(-exponent);
  // Sums: at most 64 truncated products, then float32 sums of one per 64 elements. Not exact: one truncated
  // sum of 16 products at a time.
  const double rounding = static_cast<double>(80 + in.d / (many.exact ? 64 : 16)) * 0x1p-23;
  const double length = sqrtf(static_cast<float>(square)) * unpower;
  ManySlot slot{};
  slot.row = row;
  slot.alive = alive;
  slot.y_square = square * unpower * unpower;
  slot.best = -INFINITY;
  if (alive) {
    slot.own =
        static_cast<float>(1.001 * (sqrtf(static_cast<float>(rest_square)) * unpower + rounding * length));
    slot.summed =  // twice as many products
        static_cast<float>(FLOAT ? 1.001 * length : 1.001 * 2 * rounding * length);
    slot.rate2 = static_cast<float>(fmin(row.rate() * LOG2_E, 1e30));
    // The largest norm is taken for twice the mean.
    const float doubt =
        static_cast<float>(doubt_of(slot, 2 * choice.mean_norm * inverse * inverse, slot.own));
    const bool by_tile = LABELS && many.classes;
    if (!FLOAT && many.exact &&
        expect_dense(row, doubt, distances, static_cast<float>(row.count),
                     many.rows <= MANY_ROWS || by_tile)) {
      if (by_tile) {
        atomicMax(&many.classes->early[at / MANY_ROWS], static_cast<int>(at % MANY_ROWS) + 1);
      } else {
        atomicMax(&many.facts->early, static_cast<int>(at) + 1);
      }
    }
    if (in.source.data) {
      slot.best = score + 0.5 * row.alpha * choice.mean_norm * inverse * inverse;
      slot.total = 1;
    }
    many.factors[at] = {static_cast<float>(inverse * unpower),
                        static_cast<float>(0.5 * row.alpha * inverse * inverse),
                        static_cast<float>(rest_centre * unpower)};
  } else {
    many.factors[at] = {0, 0, 0};
  }
  many.slots[at] = slot;
}

// One block per row of the pass: its slot, y in two halves, |y|^2, the part of its source. USUAL: as above.
// Kernels of this file are short, so that much of their time is that of code that comes from memory: loops
// that need not be unrolled are not.
template <bool USUAL, bool LABELS, bool FLOAT>
__global__ void __launch_bounds__(THREADS) rows_kernel(const Inputs in, const Many many) {
  if (USUAL && !many.order && static_cast<int64_t>(blockIdx.x) < many.rows) {  // x itself waits for nothing
    const float* const x = static_cast<const float*>(in.x.data) + blockIdx.x * in.d;
    for (int64_t e = 32 * threadIdx.x; e < in.d; e += 32 * THREADS) prefetch(x + e);
  }
  allow_next_launch();
  if (many.order) wait_for_previous_launch();
  const int tid = threadIdx.x;
  const int64_t local = blockIdx.x;
  int64_t at = local;
  __shared__ int int_scratch[33];
  // Its row, and its place among those of the only pass, or of its tile, if it has not been found before.
  __shared__ Row row;
  __shared__ Order<LABELS> rates[MANY_PASS_ROWS], own_rate;
  __shared__ bool has_references;
  const bool by_class = LABELS && ordered_by_class(many);
  const auto is_placed = [&] { return many.order && !by_class; };
  const int64_t first = by_class ? local / MANY_ROWS * MANY_ROWS : 0;  // of those `listed`
  const auto left = [&] { return by_class ? min(many.rows - first, MANY_ROWS) : many.rows; };
  const int64_t listed = local >= many.rows ? 0 : is_placed() ? 1 : left();
  int64_t all = 0;
  if constexpr (LABELS) all = all_references(in, int_scratch);
#pragma unroll 1
  for (int64_t j = tid; j < listed; j += THREADS) {
    bool any;
    const Row of_j = row_of(
        in, many.order ? many.order[many.first_row + (by_class ? first + j : local)] : many.first_row + j,
        all, any);
    rates[j] = order_of<LABELS>(of_j, any, false);
    if (is_placed() || j == local - first) row = of_j, has_references = any, own_rate = rates[j];
  }
  __syncthreads();
  if (!is_placed() && local < many.rows) {
    int before = 0;
#pragma unroll 1
    for (int64_t j = tid; j < left(); j += THREADS)
      before += rates[j] < own_rate || (rates[j] == own_rate && j < local - first);
    at = block_sum<int>(before, int_scratch);
    if (by_class) at += first;
  }
  wait_for_previous_launch();
  __shared__ double statistics[STATISTICS];
  static_assert(THREADS / 32 == STATISTICS, "a warp to each");
  {
    const int k = tid / 32;
    const auto joined = [k](double a, double b) { return k < MAX_PLAIN ? a + b : fmax(a, b); };
    double value = 0;
#pragma unroll 1
    for (int64_t tile = tid % 32; tile < many.d_stride / MANY_TILE; tile += 32)
      value = joined(value, many.statistics[tile * STATISTICS + k]);
    for (int offset = 16; offset > 0; offset /= 2)
      value = joined(value, __shfl_xor_sync(0xffffffffu, value, offset));
    if (tid % 32 == 0) statistics[k] = value;
  }
  __shared__ float4 of_warps[THREADS / 32][32];
  static_assert(MANY_PAIRS == 4 * 32, "four to a lane");
  if (!FLOAT && many.exact) {
    const int tiles = static_cast<int>(many.d_stride / MANY_TILE);
    float4 sum{};
#pragma unroll 1
    for (int first = tid / 32; first < tiles; first += 4 * (THREADS / 32)) {
      float4 v[4];  // on their way at once
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int tile = first + i * (THREADS / 32);
        v[i] =
            tile < tiles ? reinterpret_cast<const float4*>(many.distances)[tile * 32 + tid % 32] : float4{};
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) sum.x += v[i].x, sum.y += v[i].y, sum.z += v[i].z, sum.w += v[i].w;
    }
    of_warps[tid / 32][tid % 32] = sum;
  }
  __syncthreads();
  const Distances distances = !FLOAT && many.exact && tid < 32 ? distances_of(of_warps) : Distances{};
  const Choice choice = choose_centre<FLOAT>(in, many, statistics);
  const float* const candidate = many.centre + (choice.which == 2 ? many.d_stride : 0);
  const auto centre = [&](int64_t e) { return choice.which ? candidate[e] : 0.0f; };
  if (blockIdx.x == 0 && many.first_row == 0) {
#pragma unroll 1
    for (int64_t e = tid; e < many.d_stride; e += THREADS) {
      many.centre_float[e] = centre(e) * choice.scale;
      many.centre_half[e] = __float2half(centre(e));
    }
    if (tid == 0) {
      many.facts->scale = choice.scale;
      many.facts->inverse_scale = 1.0f / choice.scale;
      many.facts->mean_norm = choice.mean_norm;
      many.facts->centred = !FLOAT && choice.which != 0;
      many.facts->plain = in.refs.dtype == Dtype::f16 && choice.which == 0;
      many.facts->max_norm = 0;
      if (FLOAT) {
        many.facts->max_rest = many.facts->far = 0;
        const float least = least_held(in.d, choice.mean_norm);
        const double centre2 = choice.which == 2   ? statistics[SHIFT]
                               : choice.which == 1 ? statistics[SHIFT] - statistics[LEFT_OUT]
                                                   : 0.0;
        many.facts->least_norm = centre2 * choice.scale * choice.scale < 4 * least ? least : 0.0f;
      }
    }
  }
  if (FLOAT && blockIdx.x == 0 && tid == 0) many.facts->known_rest = many.facts->halved = 0;

  if (local >= many.rows) {
#pragma unroll 1
    for (int64_t e = tid; e < many.d_stride; e += THREADS)
      many.hi[at * y_stride<FLOAT>(many) + e] = many.lo[at * y_stride<FLOAT>(many) + e] = __float2half(0.0f);
    if (tid == 0) many.slots[at] = ManySlot{}, many.factors[at] = {0, 0, 0};
    if (LABELS && tid == 0) many.ranges[at] = {0, 0};
    return;
  }
  // Without a centre y is x, which float32 holds: conversions to float64 would take most of the time.
  if (USUAL && !choice.which && !in.lse.data) {
    store_row<float, USUAL, LABELS, FLOAT>(in, many, row, has_references, at, choice, candidate, distances);
  } else {
    store_row<double, USUAL, LABELS, FLOAT>(in, many, row, has_references, at, choice, candidate, distances);
  }
}

// By a warp: whether a reference that halves do not hold is finite all the same. Then they become zeros.
__device__ __forceinline__ bool drop_far(const float* from, const float* centre, float scale, int64_t d,
                                         __half* to, int64_t d_stride) {
  bool is_finite = true;
#pragma unroll 1
  for (int64_t e = threadIdx.x % 32; e < d; e += 32)
    is_finite = is_finite && isfinite(fmaf(from[e], scale, -centre[e]));
  if (!__all_sync(0xffffffffu, is_finite)) return false;
  __syncwarp();  // other lanes have written what is overwritten here
#pragma unroll 1
  for (int64_t e = 8 * (threadIdx.x % 32); e < 2 * d_stride; e += 8 * 32)
    *reinterpret_cast<uint4*>(to + e) = uint4{};
  return true;
}

// A warp per float32 reference of the round: the halves of its d_j times the scale; and |d_j|^2 - mean_norm
// of what these come to, so that scores are those of a reference next to it. What the first halves leave out
// at most comes into the rows' bounds, as a share of the largest |d_j|, by the last block. Far references
// become zeros, which come in no bound. halves: of the first reference of the round.
template <bool CLASSES>
__global__ void __launch_bounds__(THREADS)
    halves_kernel(const Inputs in, const Many many, __half* const halves) {
  follow_previous();
  __shared__ int of_warps[THREADS / 32][2];
  __shared__ bool is_last;
  const int lane = threadIdx.x % 32;
  const int64_t place = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) / 32;
  const int64_t j = many.first_ref + place;
  bool is_valid = place < many_valid(in, many);
  if constexpr (CLASSES)
    is_valid = is_valid && j < many.classes->ends[static_cast<uint32_t>(j) / many.class_refs];
  float norm = 0, rest = 0;
  if (is_valid) {
    const float scale = many.facts->scale;
    const float* const from = static_cast<const float*>(in.refs.data) + j * in.d;
    __half* const to = halves + place * 2 * many.d_stride;
    double norms = 0;
    float rests = 0;
#pragma unroll 2
    for (int64_t e = 8 * lane; e < many.d_stride; e += 8 * 32) {
      __align__(16) __half first[8], second[8];
      float part = 0, d[8] = {};
      if (e < in.d) {
        const float4 low = __ldcs(reinterpret_cast<const float4*>(from + e)),
                     high = __ldcs(reinterpret_cast<const float4*>(from + e + 4));
        const float r[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        float c[8];
        load8<float>({many.centre_float, Dtype::f32}, e, c);
#pragma unroll
        for (int k = 0; k < 8; ++k) d[k] = fmaf(r[k], scale, -c[k]);
      }
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        first[k] = __float2half(d[k]);
        const float near = __half2float(first[k]), left = d[k] - near;
        second[k] = __float2half(left);
        const float value = near + __half2float(second[k]);
        part = fmaf(value, value, part), rests = fmaf(left, left, rests);
      }
      norms += part;
      *reinterpret_cast<uint4*>(to + e) = *reinterpret_cast<const uint4*>(first);
      *reinterpret_cast<uint4*>(to + many.d_stride + e) = *reinterpret_cast<const uint4*>(second);
    }
    norms = warp_sum(norms), rests = warp_sum(rests);
    norm = static_cast<float>(norms), rest = sqrtf(rests);
    float above = static_cast<float>(norms - many.facts->mean_norm);
    if (!holds(*many.facts, norm, many.facts->least_norm, norm == 0 && rests == 0) &&
        drop_far(from, many.centre_float, scale, in.d, to, many.d_stride)) {
      norm = rest = 0, above = FAR_NORM;
      if (lane == 0) many.facts->far = 1;
    }
    if (rest <= FLT_MAX) norm = fmaxf(norm, rest * rest);
    if (lane == 0) many.norms[j] = above;
    if (CLASSES && !isfinite(norm)) norm = 0;
    if (!isfinite(rest)) rest = 0;
  }
  if (lane == 0)
    of_warps[threadIdx.x / 32][0] = __float_as_int(norm),
                           of_warps[threadIdx.x / 32][1] = __float_as_int(rest);
  __syncthreads();
  // NaN counts as more than anything.
  if (threadIdx.x < 2) {
    int most = 0;
#pragma unroll
    for (int w = 0; w < THREADS / 32; ++w) most = max(most, of_warps[w][threadIdx.x]);
    atomicMax(threadIdx.x == 0 ? &many.facts->max_norm : &many.facts->max_rest, most);
    __threadfence();
  }
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(&many.facts->halved, 1) + 1 == static_cast<int>(gridDim.x);
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  const float most = __int_as_float(*static_cast<volatile int*>(&many.facts->max_norm));
  const float all =
      most > 0 ? __int_as_float(*static_cast<volatile int*>(&many.facts->max_rest)) / sqrtf(most) : 0.0f;
  const float more = all - __int_as_float(many.facts->known_rest);
#pragma unroll 1
  for (int64_t at = threadIdx.x; at < many.rows; at += THREADS)
    many.slots[at].own = fmaf(more, many.slots[at].summed, many.slots[at].own);
  __syncthreads();
  if (threadIdx.x == 0) many.facts->known_rest = __float_as_int(all), many.facts->halved = 0;
}

// A warp per reference: |r_j|^2 - mean_norm, where references are used as they are. CLASSES: the largest is
// of those that are finite.
template <bool CLASSES>
__global__ void __launch_bounds__(THREADS) norms_kernel(const Inputs in, const Many many) {
  follow_previous();
  __shared__ float scratch[33];
  if (many.facts->centred) return;
  const int lane = threadIdx.x % 32;
  const int64_t j = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) / 32;
  float norm = 0;
  bool is_valid = j < valid_count(in, 0);
  if constexpr (CLASSES)
    is_valid = is_valid && j < many.classes->ends[static_cast<uint32_t>(j) / many.class_refs];
  if (is_valid) {
    const uint4* const from = static_cast<const uint4*>(in.refs.data) + j * in.d / 8;
    double sum = 0;
#pragma unroll 4
    for (int64_t k = lane; k < in.d / 8; k += 32) {
      const uint4 v = from[k];
      const __half2* const pairs = reinterpret_cast<const __half2*>(&v);
      float part = 0;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const float2 pair = __half22float2(pairs[q]);
        part = fmaf(pair.x, pair.x, fmaf(pair.y, pair.y, part));
      }
      sum += part;
    }
    sum = warp_sum(sum);
    norm = static_cast<float>(sum);
    if (lane == 0) many.norms[j] = static_cast<float>(sum - many.facts->mean_norm);
    if (CLASSES && !isfinite(norm)) norm = 0;
  }
  // NaN counts as more than anything.
  const int bits = __float_as_int(norm);
  const int most = __reduce_max_sync(0xffffffffu, bits);
  if (lane == 0) scratch[threadIdx.x / 32] = __int_as_float(most);
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const int all = __reduce_max_sync(0xffffffffu, lane < THREADS / 32 ? __float_as_int(scratch[lane]) : 0);
  if (lane == 0) atomicMax(&many.facts->max_norm, all);
}

// Exclusive prefix of v over the block; total: their sum. scratch: a value per warp.
__device__ int block_prefix(int v, int* scratch, int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = static_cast<int>(blockDim.x) / 32;
  int sum = v;
#pragma unroll 1
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, sum, offset);
    if (lane >= offset) sum += other;
  }
  __syncthreads();
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  const int of_warp = lane < warps ? scratch[lane] : 0;
  total = __reduce_add_sync(0xffffffffu, of_warp);
  return __reduce_add_sync(0xffffffffu, lane < warp ? of_warp : 0) + sum - v;
}

// Maximum over the block, of values that are no NaN. scratch: a value per warp, not in use.
__device__ float block_maximum(float v, int* scratch) {
  const auto ordered = [](int bits) { return bits ^ (bits >> 31 & 0x7fffffff); };  // and back
  const int lane = threadIdx.x % 32;
  const int of_warp = __reduce_max_sync(0xffffffffu, ordered(__float_as_int(v)));
  if (lane == 0) scratch[threadIdx.x / 32] = of_warp;
  __syncthreads();
  const int all = lane < static_cast<int>(blockDim.x) / 32 ? scratch[lane] : INT_MIN;
  return __int_as_float(ordered(__reduce_max_sync(0xffffffffu, all)));
}

__device__ float row_maximum(const Many& many, int64_t at, const RowGroups& groups, int* scratch) {
  const float* const maxima = many.maxima + at * (many.score_stride / MANY_GROUP);
  float best = -INFINITY;
#pragma unroll 8
  for (int64_t k = groups.first + threadIdx.x; k < groups.end; k += blockDim.x) best = fmaxf(best, maxima[k]);
  return block_maximum(best, scratch);
}

// Whether a row has sums of what came before: else nothing has been stored.
__device__ inline bool has_sums(const ManySlot& slot) {
  return slot.best != -INFINITY;
}

// The largest score of what came before and of what has `top`.
__device__ inline double best_with(const ManySlot& slot, float top) {
  return fmax(static_cast<double>(top), slot.best);
}

constexpr int BINS = 64;
constexpr int GATHER_BLOCKS = 8;
constexpr int PLACE_THREADS = static_cast<int>(MANY_PASS_ROWS);
// What dense rows and lists take, as measured on an H100: operations and bytes per second of the products,
// bytes per second of lists, and seconds for a reference of a list, alone 0.15e-6, beside others up to twice
// that or more.
constexpr float PRODUCT_RATE = 600e12f, PRODUCT_BANDWIDTH = 2.6e12f, LIST_BANDWIDTH = 2.2e12f;
constexpr float LISTED_SECONDS = 0.3e-6f;
// No row of a shorter list becomes dense, since lists are more exact; nor one of more doubt, where scores are
// large for their digits. Exact: as a dense row it would have as long a list. Fast: for small t the few
// digits of weights show; up to there the worst such row is off by 4e-4 (photographs, by simulation).
constexpr int SHORTEST_LIST_EXACT = 64, SHORTEST_LIST_FAST = 16, LIMITS = 5;
constexpr double FILL_DOUBT_EXACT = 1, FILL_DOUBT_FAST = 512;
constexpr int LONG_LIST = 32;  // more references: its block is among the first
// From so much doubt on scores of y_hi and y_lo may be too far off as well. So the references of a dense row
// that have most of the weight are scored again, so many at most. Of more doubt most of 256 are none too
// many; up to one bit few are enough: the worst of 48 dense rows over 50,000 pieces of photographs, at doubt
// 0.95 (t = 0.68), is off by 1.9e-6 with 8, 1.8e-6 with 32, 1.3e-6 with 256; at 1.1 by 2.2e-6, 2.4e-6 and
// 1.5e-6, at 1.4 by 3.7e-6, 3.3e-6 and 1.9e-6.
constexpr double REVIEW_DOUBT = FILL_DOUBT_EXACT, REVIEW_SOME_DOUBT = 0.25, REVIEW_LITTLE_DOUBT = 0.03;
constexpr int REVIEW_SOME = 16, REVIEW_FEW = 8;
__device__ inline int most_reviewed(double doubt) {
  if (doubt > REVIEW_DOUBT) return static_cast<int>(MANY_SURVIVORS);
  if (doubt > REVIEW_SOME_DOUBT) return REVIEW_SOME;
  return doubt > REVIEW_LITTLE_DOUBT ? REVIEW_FEW : 0;
}

__device__ inline double largest_norm(const ManyFacts& facts) {  // |d_j|^2
  return static_cast<double>(__int_as_float(facts.max_norm)) * facts.inverse_scale * facts.inverse_scale;
}

// y.d - alpha/2 |d|^2 for d = r - from and y = x - alpha from, in float64; by a warp. from: times `scale`.
// largest: finite sums need |r| times this to be.
template <typename T, typename From>
__device__ double score_in_double(const Inputs& in, const Row& row, const T* r, const From* from,
                                  double scale, float largest) {
  double score = 0;
#pragma unroll 4
  for (int64_t e = threadIdx.x % 32; e < in.d; e += 32) {
    const float value = to_float(r[e]);
    const double c = to_float(from[e]) * scale, d = value - c,
                 x = load_as<double>(in.x, row.index * in.d + e);
    score = isfinite(value * largest) ? fma(fma(-row.alpha, c, row.sign * x) - 0.5 * row.alpha * d, d, score)
                                      : NAN;
  }
  return warp_sum(score);
}

// Of row `at` what it has of the round's far references, as stored and in float64, as if they had come
// before; its scores of them, which are of zeros or of anything, become those of none. However many there
// are, and slowly. Those of a turn are scored relative to the best of them, since scores are large for
// float64, too. bfloat16: what is not finite is among them, and makes the row NaN, see select_kernel. A call,
// with what it needs in memory of its own.
template <typename T, bool CLASSES>
__device__ __noinline__ void sum_far(const Inputs in, const Many many, int64_t at) {
  constexpr int GROUP = static_cast<int>(MANY_GROUP), WARPS = SELECT_THREADS / 32;
  static_assert(SELECT_THREADS % GROUP == 0);
  __shared__ int references[SELECT_THREADS], int_scratch[WARPS], best_of_turn;
  __shared__ double scores[SELECT_THREADS], scratch[33];
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int valid = static_cast<int>(many_valid(in, many));
  const float scale = many.facts->scale;
  const T* const refs = static_cast<const T*>(in.refs.data) + many.first_ref * in.d;
  ManySlot& slot = many.slots[at];
  int2 own{0, valid};
  if constexpr (CLASSES) own = range_in_round(many, at, valid);
  float* const row_scores = many.scores + at * many.score_stride;
  const double rate2 = slot.rate2;
  // What scores are above those of differences from the centre: these may be small beside it.
  const double above = static_cast<double>(many.factors[at].half_alpha) * many.facts->mean_norm;
  double best = slot.best - above, total = slot.total;
  bool found = false;
#pragma unroll 1
  for (int first = own.x / GROUP * GROUP; first < own.y; first += SELECT_THREADS) {
    const int j = first + tid;
    bool is_far = j >= own.x && j < own.y;
    if constexpr (CLASSES) {
      const uint32_t number = static_cast<uint32_t>(many.first_ref + j);
      is_far = is_far && static_cast<int>(number) < many.classes->ends[number / many.class_refs];
    }
    if constexpr (IS_FLOAT<T>) {
      is_far = is_far && many.norms[many.first_ref + j] == FAR_NORM;
    } else {
      is_far = is_far && !(operand_bits<CLASSES>(many)[j / GROUP] >> j % GROUP & 1);
    }
    int count;
    const int place = block_prefix(is_far, int_scratch, count);
    if (count == 0) continue;
    if (is_far) references[place] = j, row_scores[j] = -INFINITY;
    __syncthreads();
    if (is_far) {
      float most = -INFINITY;
#pragma unroll 1
      for (int k = 0; k < GROUP; ++k) most = fmaxf(most, row_scores[j / GROUP * GROUP + k]);
      many.maxima[at * (many.score_stride / GROUP) + j / GROUP] = most;
    }
    const Row row = slot.row;
#pragma unroll 1
    for (int k = warp; k < count; k += WARPS) {
      const double score =
          score_in_double(in, row, refs + references[k] * in.d, many.centre_float, 1.0f / scale, scale);
      if (lane == 0) scores[k] = score;
    }
    __syncthreads();
    if constexpr (!IS_FLOAT<T>) {
      const bool is_none = tid < count && !isfinite(scores[tid]);
      if (is_none) many.maxima[at * (many.score_stride / GROUP) + references[tid] / GROUP] = INFINITY;
      if (__syncthreads_or(is_none)) return;
    }
    double top = block_max<double>(tid < count ? scores[tid] : -INFINITY, scratch);
    if (tid == 0) best_of_turn = 0;
    __syncthreads();
    if (tid < count && scores[tid] == top) atomicMax(&best_of_turn, tid);
    __syncthreads();
    const T* const from = refs + references[best_of_turn] * in.d;
#pragma unroll 1
    for (int k = warp; k < count; k += WARPS) {
      const double score = score_in_double(in, row, refs + references[k] * in.d, from, 1, 1);
      if (lane == 0) scores[k] = score;
    }
    __syncthreads();
    const double relative = tid < count ? scores[tid] : -INFINITY, most = block_max(relative, scratch);
    top += most;
    const bool any = best != -INFINITY;
    const double now = fmax(top, best), of_turn = exp2(rate2 * (top - now)),
                 keep = any ? exp2(rate2 * (best - now)) : 0.0,
                 weight = tid < count ? exp2(rate2 * (relative - most)) * of_turn : 0.0;
    scores[tid] = weight;
    total = (any ? total * keep : 0.0) + block_sum(weight, scratch);
#pragma unroll 1
    for (int64_t e = tid; e < in.d; e += SELECT_THREADS) {
      float* const sums = many.sums + at * many.d_stride + e;
      const float c = many.centre_float[e];
      double sum = any ? keep * *sums : 0.0;
#pragma unroll 4
      for (int k = 0; k < count; ++k)
        sum += scores[k] * fmaf(to_float(refs[references[k] * in.d + e]), scale, -c);
      *sums = static_cast<float>(sum);
    }
    best = now, found = true;
    __syncthreads();  // all have read the references and their weights
  }
  if (tid == 0 && found) slot.best = best + above, slot.total = total;
  __syncthreads();
}

// One block per slot: lists the references whose weight can matter, or gives up at more than MANY_SURVIVORS.
// Where some are far what the row has of these is summed first, and all read again.
// A thread keeps HELD maxima of groups at hand, every SELECT_THREADS-th; those beyond are read again.
constexpr int HELD = 8;
constexpr int SELECT_RESIDENT = 3;  // blocks to a multiprocessor
template <typename T, bool CLASSES>
__global__ void __launch_bounds__(SELECT_THREADS, IS_SCALED<T> ? SELECT_RESIDENT : 0)
    select_kernel(const Inputs in, const Many many, int early_blocks) {
  allow_next_launch();
  __shared__ int of_warps[SELECT_THREADS / 32], int_scratch[SELECT_THREADS / 32];
  __shared__ int bins[BINS], first_left_out, list[MANY_SURVIVORS];
  // The first blocks, which have room while the last tiles are scored, run without any references before:
  // that brings the code, which takes longer than to run it.
#pragma unroll 1
  for (int real = static_cast<int>(blockIdx.x) < early_blocks ? 0 : 1, end = 2; real < end; ++real) {
    if (real) wait_for_previous_launch();
    const int64_t at = blockIdx.x, valid = real ? many_valid(in, many) : 0;
    const RowGroups own_groups = groups_of<CLASSES>(many, at, valid);
    const int groups = static_cast<int>(own_groups.end - own_groups.first);
    const int first_ref = static_cast<int>(own_groups.first * MANY_GROUP);  // what follows counts from there
    const float* const maxima = many.maxima + at * (many.score_stride / MANY_GROUP) + own_groups.first;
    // What is read here is on its way at once.
    const ManySlot slot = many.slots[at];
    const ManyFacts facts = *many.facts;
    float held[HELD];  // maxima, then bits
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int k = threadIdx.x + i * SELECT_THREADS;
      held[i] = k < groups ? maxima[k] : -INFINITY;
    }
    if constexpr (IS_SCALED<T>) {
      if (real == 1 && facts.far && slot.alive) {
        sum_far<T, CLASSES>(in, many, at);
        end = 3;
        continue;
      }
    }
    const int first_beyond = threadIdx.x + HELD * SELECT_THREADS;
    float best = -INFINITY;
#pragma unroll
    for (int i = 0; i < HELD; ++i) best = fmaxf(best, held[i]);
#pragma unroll 1
    for (int k = first_beyond; k < groups; k += SELECT_THREADS) best = fmaxf(best, maxima[k]);
    if (threadIdx.x < BINS) bins[threadIdx.x] = 0;
    best = block_maximum(best, of_warps);
    if (real && (!slot.alive || valid == 0 || best == INFINITY)) {
      if (threadIdx.x == 0) {
        many.counts[at] = many.fills[at] = 0;
        if (best == INFINITY) many.slots[at].alive = 0;
      }
      return;
    }
    const double norm = largest_norm(facts);
    const bool early = at < early_end<CLASSES>(many, facts, at);
    const double top = best_with(slot, best);
    // A reference whose score lies `bits` below the top weighs at most 2^(doubt - bits) of the largest.
    // Groups by the bits beyond doubt of their best; from which on do all references of such groups weigh
    // little enough together? Of those of other groups, so many that weigh so little are left out that it
    // comes to the same.
    const double rate2 = slot.rate2, doubt = doubt_of(slot, norm, early ? slot.summed : slot.own);
    const float forgotten =
        static_cast<float>(many.exact ? FORGOTTEN_LOG2_EXACT : FORGOTTEN_LOG2_FAST) +
        log2f(static_cast<float>(valid_count(in, 0)) / static_cast<float>(valid));  // in this round
    const auto bits_of = [&](float score) {
      return score == -INFINITY
                 ? static_cast<float>(BINS)
                 : fminf(static_cast<float>((top - static_cast<double>(score)) * rate2 - doubt), BINS - 1.0f);
    };
    const auto count_bits = [&](float bits) {
      if (bits >= 1 && bits < BINS - 1) atomicAdd(&bins[static_cast<int>(bits)], 1);
      if (bits == BINS - 1) bins[BINS - 1] = groups;  // they weigh less than any bound, however many
    };
#pragma unroll
    for (int i = 0; i < HELD; ++i) count_bits(held[i] = bits_of(held[i]));
#pragma unroll 1
    for (int k = first_beyond; k < groups; k += SELECT_THREADS) count_bits(bits_of(maxima[k]));
    __syncthreads();
    if (threadIdx.x < 32) {
      static_assert(BINS == 64, "two to a lane");
      const int bin = 2 * static_cast<int>(threadIdx.x);
      const float low = static_cast<float>(bins[bin]) * __int_as_float((127 - bin) << 23),
                  high = static_cast<float>(bins[bin + 1]) * __int_as_float((126 - bin) << 23);
      float later = low + high;  // of this lane's bins and all after them
      for (int offset = 1; offset < 32; offset *= 2) {
        const float other = __shfl_down_sync(0xffffffffu, later, offset);
        if (threadIdx.x + offset < 32) later += other;
      }
      const float enough = exp2f(-forgotten) / (2 * MANY_GROUP);
      const float after = __shfl_down_sync(0xffffffffu, later, 1), rest = threadIdx.x < 31 ? after : 0.0f;
      const int first = later <= enough && bin > 0 ? bin : high + rest <= enough ? bin + 1 : BINS;
      const int least = __reduce_min_sync(0xffffffffu, first);
      if (threadIdx.x == 0) first_left_out = least;
    }
    __syncthreads();
    const float group_cut = static_cast<float>(first_left_out);
    const float* const scores = many.scores + at * many.score_stride + first_ref;
    // Groups of references one of which matters; more of them than the list holds: it would be too short.
    const auto is_candidate = [&](int k) { return bits_of(maxima[k]) < group_cut; };
    int candidates = 0;
#pragma unroll
    for (int i = 0; i < HELD; ++i) candidates += held[i] < group_cut;
#pragma unroll 1
    for (int k = first_beyond; k < groups; k += SELECT_THREADS) candidates += is_candidate(k);
    int all;
    int place = block_prefix(candidates, int_scratch, all);
    int found = all;
    if (all <= MANY_SURVIVORS) {
#pragma unroll
      for (int i = 0; i < HELD; ++i)
        if (held[i] < group_cut)
          list[place++] = static_cast<int>(threadIdx.x) + i * SELECT_THREADS, --candidates;
#pragma unroll 1
      for (int k = first_beyond; candidates && k < groups; k += SELECT_THREADS)
        if (is_candidate(k)) list[place++] = k, --candidates;
      __syncthreads();
      // Two threads to a group, each its half, which are all on their way at once.
      static_assert(SELECT_THREADS == 2 * MANY_SURVIVORS && MANY_GROUP == 16);
      const double cut_bits = doubt + forgotten + log2f(2.0f * MANY_GROUP * static_cast<float>(max(all, 1)));
      const float cut = fmaxf(static_cast<float>(top - cut_bits / rate2), -FLT_MAX);
      int first = 0;
      unsigned matter = 0;  // bits of the eight
      if (static_cast<int>(threadIdx.x) < 2 * all) {
        first = static_cast<int>(list[threadIdx.x / 2] * MANY_GROUP + threadIdx.x % 2 * 8);
        const float4* const from = reinterpret_cast<const float4*>(scores + first);
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          const float4 v = from[q];
          matter |= (v.x >= cut ? 1u : 0u) << 4 * q | (v.y >= cut ? 2u : 0u) << 4 * q |
                    (v.z >= cut ? 4u : 0u) << 4 * q | (v.w >= cut ? 8u : 0u) << 4 * q;
        }
      }
      place = block_prefix(__popc(matter), int_scratch, found);
#pragma unroll 1
      for (; matter && place < MANY_SURVIVORS; matter &= matter - 1)
        many.survivors[at * MANY_SURVIVORS + place++] = first_ref + first + __ffs(matter) - 1;
    }
    if (!real || threadIdx.x != 0) continue;
    many.slots[at].top = static_cast<float>(top);
    many.counts[at] = found;
    const double doubt_of_hi = doubt_of(slot, norm, slot.own);  // of scores of y_hi alone
    const bool fills = doubt_of_hi <= (many.exact ? FILL_DOUBT_EXACT : FILL_DOUBT_FAST);
    many.fills[at] = fills || found > MANY_SURVIVORS ? found : 0;
    many.review_most[at] = many.exact ? most_reviewed(doubt_of_hi) : 0;
  }
}

// One block, a thread per slot: which rows are dense, and where. They stay where they are if that is one of
// the first places; the others take those of rows that are not dense. All with lists longer than a limit are,
// a limit that takes least time. CLASSES: the first places of their row tile, so that its references stay
// few.
struct ClassPlaces {
  static constexpr int TILES = static_cast<int>(MANY_ROW_TILES);
  int2 met[TILES], met_by_dense[TILES];  // references of the round that rows of a tile have, or dense rows
  int dense_of[LIMITS][TILES], late_of[LIMITS][TILES];  // for each limit
  ManyClassSums sums;

  // By whole warps, all of a tile's.
  static __device__ void widen(int2& met, int2 own) {
    const int low = __reduce_min_sync(0xffffffffu, own.x < own.y ? own.x : INT_MAX);
    const int high = __reduce_max_sync(0xffffffffu, own.x < own.y ? own.y : 0);
    if (threadIdx.x % 32 == 0 && high > 0) atomicMin(&met.x, low), atomicMax(&met.y, high);
  }
};
template <bool CLASSES>
__global__ void __launch_bounds__(PLACE_THREADS) place_kernel(const Inputs in, const Many many) {
  constexpr int WARPS = PLACE_THREADS / 32;
  constexpr int TILE_ROWS = CLASSES ? static_cast<int>(MANY_ROWS) : PLACE_THREADS,
                TILE_WARPS = TILE_ROWS / 32;
  __shared__ int of_warps[WARPS], movers[PLACE_THREADS];
  __shared__ std::conditional_t<CLASSES, int[MANY_ROW_TILES], int> before_last;
  __shared__ std::conditional_t<CLASSES, ClassPlaces, char> classes;
  // The parts of the sums, for any number of full row tiles and with a narrow one or without.
  constexpr int MOST_FULL = static_cast<int>(MANY_PASS_ROWS / MANY_ROWS);
  __shared__ int2 splits[2 * (MOST_FULL + 1)];
  if (!CLASSES && threadIdx.x / 32 < 2 * (MOST_FULL + 1)) {
    const int which = threadIdx.x / 32, steps = many_sum_steps(many, many_valid(in, many));
    splits[which] = ManySums::choose(many, which / 2, which % 2, steps);
  }
  // First without any rows, while they are being counted: see select_kernel.
#pragma unroll 1
  for (int real = 0; real < 2; ++real) {
    if (real) {
      wait_for_previous_launch();
      allow_next_launch();  // weights_kernel reads what select_kernel left before it waits
    }
    __syncthreads();
    const int slot = threadIdx.x, lane = slot % 32, warp = slot / 32;
    const int early = early_end<CLASSES>(many, *many.facts, slot);
    const bool is_row = real && slot < many.rows;
    const int count = is_row ? many.fills[slot] : 0, listed = is_row ? many.counts[slot] : 0;
    const int reviewed = is_row ? many.review_most[slot] : 0;
    std::conditional_t<CLASSES, float, const float> elements =
        static_cast<float>(many_valid(in, many)) * static_cast<float>(in.d);
    const auto product = [&](int products, int width) {  // so many with the same references
      return fmaxf(2.0f * products * width * elements / PRODUCT_RATE, 2.0f * elements / PRODUCT_BANDWIDTH);
    };
    // For each limit: rows that are dense, those of them that are late, listed references, most of one row.
    __shared__ int of_limit[LIMITS][4], best_limit;
    if (slot < 4 * LIMITS) of_limit[slot / 4][slot % 4] = 0;
    [[maybe_unused]] int2 own{};
    if constexpr (CLASSES) {
      if (is_row) own = range_in_round(many, slot, many_valid(in, many));
      if (slot < ClassPlaces::TILES) {
        classes.met[slot] = classes.met_by_dense[slot] = {INT_MAX, 0};
        for (int k = 0; k < LIMITS; ++k) classes.dense_of[k][slot] = classes.late_of[k][slot] = 0;
      }
    }
    __syncthreads();
    if constexpr (CLASSES) ClassPlaces::widen(classes.met[warp / TILE_WARPS], own);
#pragma unroll 1
    for (int k = 0; k < LIMITS; ++k) {
      const bool dense = count > (MANY_SURVIVORS >> k);
      const int left = dense ? 0 : listed;
      const int all = __popc(__ballot_sync(0xffffffffu, dense));
      const int late = __popc(__ballot_sync(0xffffffffu, dense && slot >= early));
      const int sum = __reduce_add_sync(0xffffffffu, left), most = __reduce_max_sync(0xffffffffu, left);
      if (lane != 0) continue;
      if (all) atomicAdd(&of_limit[k][0], all), atomicAdd(&of_limit[k][1], late);
      if constexpr (CLASSES) {
        if (all) atomicAdd(&classes.dense_of[k][warp / TILE_WARPS], all);
        if (late) atomicAdd(&classes.late_of[k][warp / TILE_WARPS], late);
      }
      if (sum) atomicAdd(&of_limit[k][2], sum), atomicMax(&of_limit[k][3], most);
    }
    __syncthreads();
    if (warp == 0) {
      const int k = min(lane, LIMITS - 1);
      float time = fmaxf(2.0f * of_limit[k][2] * in.d / LIST_BANDWIDTH,
                         of_limit[k][3] * LISTED_SECONDS * (in.d / 3072.0f));
      if constexpr (CLASSES) {
#pragma unroll 1
        for (int tile = 0; tile < ClassPlaces::TILES; ++tile) {
          const int2 met = classes.met[tile];
          const int rows = classes.dense_of[k][tile], width = row_tile_width(rows);
          if (rows == 0) continue;
          elements = static_cast<float>(max(met.y - met.x, 0)) * static_cast<float>(in.d);
          const bool late = many.exact && classes.late_of[k][tile] > 0;
          time += product(many.exact ? 2 : 1, width) + (late ? product(1, width) : 0);
        }
      } else {
#pragma unroll 1
        for (int left = of_limit[k][0]; left > 0; left -= static_cast<int>(MANY_ROWS)) {
          const int width = row_tile_width(left);
          time += product(many.exact ? 2 : 1, width) + (many.exact && of_limit[k][1] ? product(1, width) : 0);
        }
      }
      if ((MANY_SURVIVORS >> k) < (many.exact ? SHORTEST_LIST_EXACT : SHORTEST_LIST_FAST)) time = INFINITY;
      // Times are positive, so that their order is that of their bits; the longest of equal limits.
      const unsigned least = __reduce_min_sync(0xffffffffu, __float_as_uint(time));
      const unsigned which = __ballot_sync(0xffffffffu, __float_as_uint(time) == least);
      if (lane == 0) best_limit = static_cast<int>(MANY_SURVIVORS) >> (__ffs(which) - 1);
    }
    __syncthreads();
    const int limit = best_limit;
    const bool dense = count > limit;
    // Two counts in one: of dense rows, and of those of long lists above.
    constexpr int ABOVE = 1 << 16;
    const bool is_long = (dense ? reviewed : listed) > LONG_LIST;
    const unsigned in_warp = __ballot_sync(0xffffffffu, dense), longs = __ballot_sync(0xffffffffu, is_long);
    if (lane == 0) of_warps[warp] = __popc(in_warp) + ABOVE * __popc(longs);
    __syncthreads();
    const unsigned before = (1u << lane) - 1;
    int rank = __popc(in_warp & before) + ABOVE * __popc(longs & before), total = 0;
    int before_tile = 0, of_tile = 0;  // dense rows of tiles before, and of this one
    for (int other = 0; other < PLACE_THREADS / 32; ++other) {
      if (other < warp) rank += of_warps[other];
      total += of_warps[other];
      if (CLASSES && other / TILE_WARPS < warp / TILE_WARPS) before_tile += of_warps[other] % ABOVE;
      if (CLASSES && other / TILE_WARPS == warp / TILE_WARPS) of_tile += of_warps[other] % ABOVE;
    }
    const int long_rank = rank / ABOVE, all_long = total / ABOVE;
    rank %= ABOVE, total %= ABOVE;
    // Places from here on are those in the row's tile.
    const int tile = CLASSES ? slot / TILE_ROWS : 0, first = tile * TILE_ROWS, place = slot - first;
    const int places = CLASSES ? of_tile : total;
    if (CLASSES) rank -= before_tile;
    if (is_row) many.list_order[is_long ? long_rank : all_long + slot - long_rank] = slot;
    const auto last = [&]() -> int& {
      if constexpr (CLASSES) {
        return before_last[tile];
      } else {
        return before_last;
      }
    };
    if (place == places) last() = rank;  // dense rows that are in the first places
    __syncthreads();
    const int staying = places < TILE_ROWS ? last() : places;
    if (dense && place >= places) movers[first + rank - staying] = slot;
    if constexpr (CLASSES) {
      ClassPlaces::widen(classes.met_by_dense[tile], dense ? own : int2{});
      if (place == 0) classes.sums.dense[tile] = places;
    }
    __syncthreads();
    if constexpr (CLASSES) {
      if (warp == 0) {
        ManyClassSums& sums = classes.sums;
        const int refs = many_sum_refs(many.exact);
        if (lane < ClassPlaces::TILES) {
          const int2 met = classes.met_by_dense[lane];
          sums.steps[lane] = met.x < met.y ? int2{met.x / refs, (met.y + refs - 1) / refs} : int2{};
        }
        __syncwarp();
        choose_class_sums(many, sums);
        __syncwarp();
        if (real && lane == 0) many.classes->sums = sums;
        const int which = __ffs(static_cast<int>(MANY_SURVIVORS)) - __ffs(limit);
        if (real && lane < ClassPlaces::TILES)
          many.classes->late[lane] = many.exact ? classes.late_of[which][lane] : 0;
      }
    }
    const int full = ManyTiles(total).full, narrow = ManyTiles(total).narrow;
    const int late = __syncthreads_count(dense && slot >= early);
    if (is_row) many.places[slot] = -1, many.listed[slot] = 0;
    if (real && slot == 0) {
      many.facts->dense = total, many.facts->late = many.exact ? late : 0;
      if constexpr (!CLASSES) {
        many.facts->splits = splits[2 * full + narrow].x,
        many.facts->narrow_splits = splits[2 * full + narrow].y;
      }
    }
    __syncthreads();
    if (place >= places) continue;
    const int source = dense ? slot : movers[first + place - rank];
    many.dense_slots[slot] = source;
    many.places[source] = slot;
    ManyFactor factor = many.factors[source];
    if (source < early) factor.low_centre = 0;  // its y_lo is in the scores, and is zeros for what adds it
    many.dense_factors[slot] = factor;
  }
}

// Where late rows come: what the product for them needs. CLASSES: in tiles that have some; scores of the
// row's references alone, others that are there are not read.
template <bool CLASSES>
__global__ void __launch_bounds__(THREADS) gather_kernel(const Inputs in, const Many many) {
  follow_previous();
  if (many.facts->late == 0) return;
  const int of_pass = early_end<CLASSES>(many, *many.facts, 0), dense = many.facts->dense;
  const int64_t valid = many_valid(in, many), refs = ceil_div(valid, MANY_TILE) * MANY_TILE;
  for (int unit = blockIdx.x; unit < dense * GATHER_BLOCKS; unit += gridDim.x) {
    const int64_t to = dense_place<CLASSES>(many, unit / GATHER_BLOCKS), source = many.dense_slots[to];
    if constexpr (CLASSES) {
      if (late_rows<CLASSES>(many, to) == 0) continue;
    }
    const int early = CLASSES ? early_end<CLASSES>(many, *many.facts, to) : of_pass;
    const int thread = unit % GATHER_BLOCKS * THREADS + threadIdx.x;
    const float4* const lows = reinterpret_cast<const float4*>(many.lo + source * many.d_stride);
    float4* const dense_lows = reinterpret_cast<float4*>(many.dense_lo + to * many.d_stride);
    for (int64_t k = thread; k < many.d_stride / 8; k += GATHER_BLOCKS * THREADS)
      dense_lows[k] = source < early ? float4{} : lows[k];  // zeros for those that have them already
    if (source == to) continue;
    const float4* const __restrict__ old =
        reinterpret_cast<const float4*>(many.scores + source * many.score_stride);
    float4* const __restrict__ now = reinterpret_cast<float4*>(many.scores + to * many.score_stride);
    int64_t begin = 0, end = refs / 4;
    if constexpr (CLASSES) {
      const RowGroups own = groups_of<CLASSES>(many, source, valid);
      begin = own.first * (MANY_GROUP / 4), end = own.end * (MANY_GROUP / 4);
    }
#pragma unroll 4
    for (int64_t k = begin + thread; k < end; k += GATHER_BLOCKS * THREADS) now[k] = old[k];
  }
}

// 2^v as exp2f has it, but for results that are no normal numbers: they become zero.
__device__ inline float short_exp2(float v) {
  float p;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(p) : "f"(v));
  return p;
}

// Weights of scores: EACH times eight of a thread's, so far apart; of references from `least` on, where
// CLASSES, and before `valid`. visit(q, upper, lower), each eight halves, when the warp has read all; lower
// where exact. Returns their sum.
constexpr int EACH = 4, EIGHTS_APART = 8 * THREADS * WEIGHT_UNITS;
template <bool EXACT, bool CLASSES, typename Visit>
__device__ __forceinline__ double form_weights(const float* from, int first, int least, int valid, float best,
                                               float rate2, const Visit& visit) {
  float4 low[EACH], high[EACH];
#pragma unroll
  for (int q = 0; q < EACH; ++q) {
    const int j = first + q * EIGHTS_APART;
    low[q] = high[q] = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
    if (j >= valid || (CLASSES && j < least)) continue;
    low[q] = *reinterpret_cast<const float4*>(from + j);
    high[q] = *reinterpret_cast<const float4*>(from + j + 4);
  }
  __syncwarp();
  double total = 0;
#pragma unroll
  for (int q = 0; q < EACH; ++q) {
    const float scores[8] = {low[q].x,  low[q].y,  low[q].z,  low[q].w,
                             high[q].x, high[q].y, high[q].z, high[q].w};
    __align__(16) __half2 upper[4], lower[4];
    float sum = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float scaled[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float score = scores[2 * k + h];
        const float p = score == -INFINITY ? 0.0f : short_exp2((score - best) * rate2);
        sum += p;
        scaled[h] = p * WEIGHT_SCALE;
      }
      upper[k] = __floats2half2_rn(scaled[0], scaled[1]);
      if (!EXACT) continue;
      const float2 back = __half22float2(upper[k]);
      lower[k] = __floats2half2_rn(scaled[0] - back.x, scaled[1] - back.y);
    }
    total += sum;
    visit(q, *reinterpret_cast<const uint4*>(upper), *reinterpret_cast<const uint4*>(lower));
  }
  return total;
}

// Of as many scores as a step of the sums takes come, in place of the first of their bytes, the upper halves
// of weights, and if exact the lower halves after them, LOWER floats on. Where those of reference j are.
constexpr int LOWER = many_sum_refs(true) / 2;
template <bool EXACT, typename Float>
__device__ __forceinline__ Float* halves_of(Float* scores, int j) {
  constexpr int REFS = many_sum_refs(EXACT);
  return scores + j / REFS * REFS + j % REFS / 2;
}

// Eight from reference j on.
template <bool EXACT>
__device__ __forceinline__ void store_eight(float* scores, int j, uint4 upper, uint4 lower) {
  float* const halves = halves_of<EXACT>(scores, j);
  *reinterpret_cast<uint4*>(halves) = upper;
  if (EXACT) *reinterpret_cast<uint4*>(halves + LOWER) = lower;
}

// What it has stored, exact, of a group of references from j on: weights as the sums have them.
__device__ inline void load_group(const float* scores, int j, float (&weights)[MANY_GROUP]) {
  const float* const halves = halves_of<true>(scores, j);
#pragma unroll
  for (int eight = 0; eight < MANY_GROUP / 8; ++eight) {
    const uint4 upper = *reinterpret_cast<const uint4*>(halves + 4 * eight);
    const uint4 lower = *reinterpret_cast<const uint4*>(halves + LOWER + 4 * eight);
    const __half* const high = reinterpret_cast<const __half*>(&upper);
    const __half* const low = reinterpret_cast<const __half*>(&lower);
#pragma unroll
    for (int k = 0; k < 8; ++k)
      weights[8 * eight + k] = (__half2float(high[k]) + __half2float(low[k])) * (1 / WEIGHT_SCALE);
  }
}

// Unit `rank` of WEIGHT_UNITS of a dense row. What a warp writes it has read before, or lies in a row that is
// not dense.
template <bool EXACT, bool CLASSES>
__device__ __forceinline__ void store_weights(const Inputs& in, const Many& many, int64_t at, int rank) {
  __shared__ int scratch[THREADS / 32];
  __shared__ double wide_scratch[33];
  const int64_t valid = many_valid(in, many);
  const bool moved = EXACT && late_rows<CLASSES>(many, at) > 0;  // by gather_kernel, and have better scores
  const int64_t source = many.dense_slots[at];
  ManySlot& slot = many.slots[source];
  const float* const from = many.scores + (moved ? at : source) * many.score_stride;
  float* const to = many.scores + at * many.score_stride;
  const float here =
      moved ? row_maximum(many, at, groups_of<CLASSES>(many, source, valid), scratch) : slot.top;
  const float best = static_cast<float>(best_with(slot, here)), rate2 = slot.rate2;
  int begin = 0, end = many_sum_steps(many, valid) * many_sum_refs(EXACT);  // of what is summed
  int least = 0, until = static_cast<int>(valid);                           // of what is read
  if constexpr (CLASSES) {
    const RowGroups groups = groups_of<CLASSES>(many, source, valid);
    const int2 steps = many.classes->sums.steps[at / MANY_ROWS];
    begin = steps.x * many_sum_refs(EXACT), end = steps.y * many_sum_refs(EXACT);
    least = static_cast<int>(groups.first * MANY_GROUP), until = static_cast<int>(groups.end * MANY_GROUP);
  }
  const int own = 8 * (rank * THREADS + static_cast<int>(threadIdx.x));
  double total = 0;
#pragma unroll 1
  for (int first = begin + own; first - own < end; first += EACH * EIGHTS_APART)
    total += form_weights<EXACT, CLASSES>(from, first, least, until, best, rate2,
                                          [&](int q, uint4 upper, uint4 lower) {
                                            const int j = first + q * EIGHTS_APART;
                                            if (j < end) store_eight<EXACT>(to, j, upper, lower);
                                          });
  total = block_sum(total, wide_scratch);
  if (threadIdx.x != 0) return;
  many.totals[at * WEIGHT_UNITS + rank] = total;
  if (moved && rank == 0) slot.top = best;
}

// The weights of dense rows. Nearly always the dense rows are the first, and stay where they are: where
// weights follow the choice of rows at once, a block forms its first before that has been made. CLASSES: not
// so, since which references come in the sums depends on it.
template <bool EXACT, bool CLASSES>
__global__ void __launch_bounds__(THREADS, RESIDENT) weights_kernel(const Inputs in, const Many many) {
  allow_next_launch();
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  bool guessed = false;
  if constexpr (EXACT || CLASSES) {
    wait_for_previous_launch();
  } else {
    __shared__ double scratch[33];
    // place_kernel's block runs, or has: select_kernel is through.
    const int valid = static_cast<int>(many_valid(in, many)), at = block / WEIGHT_UNITS;
    const int first = 8 * (block % WEIGHT_UNITS * THREADS + static_cast<int>(threadIdx.x));
    const int end = many_sum_steps(many, valid) * many_sum_refs(EXACT);
    const bool guesses = at < many.rows && end <= EACH * EIGHTS_APART;
    float* const scores = many.scores + at * many.score_stride;
    uint4 ahead[EACH];
    double total = 0;
    if (guesses) {
      const ManySlot& slot = many.slots[at];
      total = form_weights<EXACT, CLASSES>(scores, first, 0, valid, slot.top, slot.rate2,
                                           [&](int q, uint4 upper, uint4) { ahead[q] = upper; });
      total = block_sum(total, scratch);
    }
    wait_for_previous_launch();
    guessed = guesses && at < many.facts->dense && many.dense_slots[at] == at;
    if (guessed) {
#pragma unroll
      for (int q = 0; q < EACH; ++q)
        if (first + q * EIGHTS_APART < end)
          store_eight<EXACT>(scores, first + q * EIGHTS_APART, ahead[q], {});
      if (threadIdx.x == 0) many.totals[block] = total;
    }
  }
  const int units = many.facts->dense * WEIGHT_UNITS;
#pragma unroll 1
  for (int unit = guessed ? block + blocks : block; unit < units; unit += blocks)
    store_weights<EXACT, CLASSES>(in, many, dense_place<CLASSES>(many, unit / WEIGHT_UNITS),
                                  unit % WEIGHT_UNITS);
}

// References that a block scores and sums at a time; so many times as many have room, for two blocks to a
// multiprocessor. Eight of up to EIGHT_LISTED_D elements, four of more.
__host__ __device__ constexpr int room_of(int listed, int size) {
  return listed == 8 || size == 4 ? 2 : 3;
}
constexpr int64_t EIGHT_LISTED_D = 3072;
constexpr int FLUSHED = 16;  // references that float32 sums are of, before they join others

// 2^v for v <= 0, to float32's digits, of which v may have more.
__device__ inline float power_of_two(double v) {
  if (!(v > -150)) return 0;
  const double whole = rint(v);
  return ldexpf(exp2f(static_cast<float>(v - whole)), static_cast<int>(whole));
}

// References of a row that are scored one by one. Those of a dense row are in its sums too, by scores that
// may be off: the list adds what they weigh beyond that.
struct List {
  int references[MANY_SURVIVORS];
  float weights[MANY_SURVIVORS];  // of a dense row, in its sums
};

// From which weight on, beside the largest, references of a dense row are worth another score. total: of all
// weights. By simulation log weights are off by 1e-6 where doubt is small, 1e-5 at doubt 0.5, 3e-5 at 0.85,
// 9e-5 at 1.4, 1e-3 at 8.5 and 3e-3 at 22, each by itself. Off by that, those with less than a share `p` of
// the weight move the mean by as much times the root of p, beside what references that weigh are apart: as
// far as any two, but little more than four times sigma / alpha, or the noise would tell them apart. The
// result is as large as a x, or as the part of the mean that differs from row to row. Up to one bit of doubt,
// that is; beyond, errors are not each by itself. Nothing is gained where so few as are wanted have next to
// nothing.
constexpr float REVIEW_OFF = 4e-5f, REVIEW_OFF_LEAST = 1e-6f, REVIEW_LIMIT = 0.8e-6f;
template <bool SCALED>
__device__ inline float least_reviewed(const Many& many, const ManySlot& slot, float total, int most) {
  if (static_cast<float>(most) < 0.25f * total) return INFINITY;
  const ManyFacts& facts = *many.facts;
  const float doubt = static_cast<float>(doubt_of(slot, largest_norm(facts), slot.own)), largest = 1 / total;
  const bool is_known = !SCALED || facts.mean_norm > 0;  // else references are uneven, see Samples
  const float unscale = facts.inverse_scale,
              norm2 =
                  (is_known ? facts.mean_norm : 0.25f * __int_as_float(facts.max_norm)) * unscale * unscale;
  const float of_x = static_cast<float>(slot.row.a / slot.row.b),
              told = static_cast<float>(slot.row.sigma / slot.row.alpha);
  const float apart2 = most > REVIEW_SOME ? norm2 : fminf(norm2, 20 * told * told);
  const float size2 =
      fmaxf(of_x * of_x * static_cast<float>(slot.y_square), largest * largest * norm2) / apart2;
  const float root = REVIEW_LIMIT / (REVIEW_OFF_LEAST + REVIEW_OFF * doubt * sqrtf(doubt));
  const float reach = most > REVIEW_SOME ? 0x1p-16f : most > REVIEW_FEW ? 0x1p-8f : 0x1p-2f;
  return fmaxf(root * root * size2 * total, reach);
}

// The list of a dense row, at `place` among these; returns its length. Where scores are large for their
// digits, as of smooth images near one another and far from the centre, even those of y_hi and y_lo may be
// off by a hundredth in log weight. So the references of most weight are listed, `most` at most. Where there
// are more, bins of the bits of their weights, 4, 8 or 32 to a factor of two: the first that hold no more
// than `most` are listed. Of the groups, too, the first bins that hold no more than there are threads are
// enough, by their best: weights, which are many more bytes, are read of these alone.
constexpr int REVIEW_BINS = 64;
constexpr int REVIEW_AHEAD = 8;  // maxima of a thread that are on their way at once
template <bool SCALED, bool CLASSES>
__device__ __forceinline__ int review(const Inputs& in, const Many& many, int64_t at, int place, int most,
                                      List& list) {
  __shared__ int bins[REVIEW_BINS], near[THREADS], scratch[THREADS / 32], kept;
  const ManySlot& slot = many.slots[at];
  double total = 0;
#pragma unroll
  for (int k = 0; k < WEIGHT_UNITS; ++k) total += many.totals[place * WEIGHT_UNITS + k];
  const float least = least_reviewed<SCALED>(many, slot, static_cast<float>(total), most);
  if (!(least <= 1)) return 0;
  const float* const maxima =  // of scores, which gather_kernel may have moved
      many.maxima + (late_rows<CLASSES>(many, place) > 0 ? place : at) * (many.score_stride / MANY_GROUP);
  const int groups = static_cast<int>(groups_of<CLASSES>(many, at, many_valid(in, many)).end);
  const int first_group =
      CLASSES ? static_cast<int>(groups_of<CLASSES>(many, at, many_valid(in, many)).first) : 0;
  const float rate2 = slot.rate2, top = slot.top, reach = 0x1p-8f - __log2f(least);
  const int shift = reach > 8.5f ? 21 : reach > 2.5f ? 20 : 18;
  const auto bin_of = [shift](float weight) {
    return min(max(__float_as_int(1.0f) - __float_as_int(weight), 0) >> shift, REVIEW_BINS - 1);
  };
  const auto clear = [&] {
    if (threadIdx.x < REVIEW_BINS) bins[threadIdx.x] = 0;
    __syncthreads();
  };
  // How many of the first bins hold no more than `limit` together.
  const auto whole_bins = [&](int limit) {
    __syncthreads();
    if (threadIdx.x < 32) {
      static_assert(REVIEW_BINS == 64, "two to a lane");
      const int lane = threadIdx.x, low = bins[2 * lane], both = low + bins[2 * lane + 1];
      int until = both;  // in this lane's bins and all before
#pragma unroll 1
      for (int offset = 1; offset < 32; offset *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, until, offset);
        if (lane >= offset) until += other;
      }
      const int all = __reduce_add_sync(0xffffffffu, (until - both + low <= limit) + (until <= limit));
      if (lane == 0) kept = all;
    }
    __syncthreads();
    return kept;
  };
  clear();
  // First groups are counted in bins, then those of the first bins, which then are noted.
  int kept_groups = REVIEW_BINS, candidates = 0, own = 0;
#pragma unroll 1
  for (int pass = 0; pass < 3; ++pass) {
#pragma unroll 1
    for (int first = first_group + static_cast<int>(threadIdx.x); first < groups;
         first += REVIEW_AHEAD * THREADS) {
      float best[REVIEW_AHEAD];
#pragma unroll
      for (int i = 0; i < REVIEW_AHEAD; ++i)
        best[i] = first + i * THREADS < groups ? maxima[first + i * THREADS] : -INFINITY;
#pragma unroll
      for (int i = 0; i < REVIEW_AHEAD; ++i) {
        const float apart = (best[i] - top) * rate2;
        if (!(-apart < reach)) continue;
        const int bin = bin_of(short_exp2(apart));
        if (pass == 0) {
          atomicAdd(&bins[bin], 1);
        } else if (bin < kept_groups) {
          if (pass == 2) near[own] = first + i * THREADS;
          ++own;
        }
      }
    }
    if (pass == 0) kept_groups = whole_bins(THREADS);
    if (pass == 1) own = block_prefix(own, scratch, candidates);
  }
  clear();
  const int j =
      static_cast<int>(threadIdx.x) < candidates ? near[threadIdx.x] * static_cast<int>(MANY_GROUP) : -1;
  float weights[MANY_GROUP];
  unsigned wanted = 0;
  if (j >= 0) {
    load_group(many.scores + place * many.score_stride, j, weights);  // weights by now
#pragma unroll
    for (int i = 0; i < MANY_GROUP; ++i) wanted |= (weights[i] >= least ? 1u : 0u) << i;
  }
  int count;
  own = block_prefix(__popc(wanted), scratch, count);
  if (count > most || kept_groups < REVIEW_BINS) {
#pragma unroll
    for (int i = 0; i < MANY_GROUP; ++i)
      if (wanted >> i & 1) atomicAdd(&bins[bin_of(weights[i])], 1);
    const int last = min(whole_bins(most), kept_groups);
#pragma unroll
    for (int i = 0; i < MANY_GROUP; ++i)
      if ((wanted >> i & 1) && bin_of(weights[i]) >= last) wanted &= ~(1u << i);
    own = block_prefix(__popc(wanted), scratch, count);
  }
#pragma unroll
  for (int i = 0; i < MANY_GROUP; ++i)
    if (wanted >> i & 1) list.references[own] = j + i, list.weights[own] = weights[i], ++own;
  return count;
}

struct Listed {
  double score[MANY_SURVIVORS];
  float weight[MANY_SURVIVORS];
  double scratch[33];
  double keep, total, best;
};

// Eight differences r - c, times the scale.
template <typename T>
__device__ void load_differences(const Inputs& in, const Many& many, int64_t reference, int64_t e,
                                 float scale, float (&d)[8]) {
  const Eight<T> values(static_cast<const T*>(in.refs.data) + reference * in.d + e);
  const float4* const centre = reinterpret_cast<const float4*>(many.centre_float + e);
  const float4 low = centre[0], high = centre[1];
  const float c[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int k = 0; k < 8; ++k) d[k] = fmaf(values[k], scale, -c[k]);
}

// Eight elements of y of a row, to 22 bits. T: of the references.
template <typename T>
__device__ __forceinline__ void load_y(const Many& many, int64_t at, int64_t e, float unit, float (&y)[8]) {
  const int64_t stride = y_stride<IS_FLOAT<T>>(many);
  const uint4 raw_hi = *reinterpret_cast<const uint4*>(many.hi + at * stride + e);
  const uint4 raw_lo = *reinterpret_cast<const uint4*>(many.lo + at * stride + e);
  const __half* const hi = reinterpret_cast<const __half*>(&raw_hi);
  const __half* const lo = reinterpret_cast<const __half*>(&raw_lo);
#pragma unroll
  for (int q = 0; q < 8; ++q) y[q] = (__half2float(hi[q]) + __half2float(lo[q])) * unit;
}

// Rows of much doubt have large scores, but references that matter are near one another. With d_0 the first
// that is listed and z = y - alpha d_0,
//   s_k = s_0 + (z - alpha/2 (d_k - d_0)).(d_k - d_0),
// where the differences are exact, and small. Of an element: y becomes z; returns its part of s_0.
__device__ __forceinline__ double make_relative(float half_alpha, float d_0, float& y) {
  const double part = (y - static_cast<double>(half_alpha) * d_0) * d_0;
  y = fmaf(-2 * half_alpha, d_0, y);
  return part;
}

// Scores in float64, of a list of so many references at most: where those that weigh are far apart beside the
// noise, they are few, and 22 bits of y leave 1e-3 of a log weight in doubt (Gaussian references at t =
// 0.05). By all threads, each with eight elements of all references at a time; a call, and with its own
// arguments, so that the caller need not keep those that it was launched with in memory.
constexpr int SHORT_LIST = 16;
struct ShortList {
  const int* references;
  int count;
  int64_t d, first_ref;
  const void* refs;
  const float* centre;
  float unscale;  // of the centre
  Array x;
  int64_t base;  // of the row
  double alpha, sign;
};
template <typename T, bool CLASSES>
__device__ __noinline__ void score_short_list(const ShortList of, double* scores) {
  constexpr int WARPS = THREADS / 32;
  __shared__ double parts[WARPS][SHORT_LIST];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const T* const refs = static_cast<const T*>(of.refs) + of.first_ref * of.d;
  const bool vectors = is_vector(of.x);
  double own[SHORT_LIST] = {};  // the first one's score, and by how much others are above it
#pragma unroll 1
  for (int64_t e = 8 * threadIdx.x; e < of.d; e += 8 * THREADS) {
    const Eight<T> of_first(refs + of.references[0] * of.d + e);
    float x[8];
    if (vectors) {
      load8<float>(of.x, of.base + e, x);
    } else {
#pragma unroll
      for (int q = 0; q < 8; ++q) x[q] = load_as<float>(of.x, of.base + e + q);
    }
    double z[8];  // x - alpha r_0
#pragma unroll
    for (int q = 0; q < 8; ++q) {
      const double r = of_first[q], c = of.centre[e + q] * of.unscale, own_x = of.sign * x[q];
      own[0] = fma(fma(-of.alpha, c, own_x) - 0.5 * of.alpha * (r - c), r - c, own[0]);
      z[q] = fma(-of.alpha, r, own_x);
    }
#pragma unroll
    for (int k = 1; k < SHORT_LIST; ++k) {
      if (k >= of.count) continue;
      const Eight<T> values(refs + of.references[k] * of.d + e);
#pragma unroll
      for (int q = 0; q < 8; ++q) {
        const double apart = static_cast<double>(values[q]) - static_cast<double>(of_first[q]);
        own[k] = fma(fma(-0.5 * of.alpha, apart, z[q]), apart, own[k]);
      }
    }
  }
  const double of_warp = warp_sums<SHORT_LIST>(own, lane);
  if (lane % (32 / SHORT_LIST) == 0) parts[warp][lane / (32 / SHORT_LIST)] = of_warp;
  __syncthreads();
  if (threadIdx.x < SHORT_LIST) {
    double score = 0;
    for (int w = 0; w < WARPS; ++w) score += parts[w][threadIdx.x];
    for (int w = 0; w < WARPS && threadIdx.x > 0; ++w) score += parts[w][0];
    scores[threadIdx.x] = score;
  }
  __syncthreads();
}

__device__ inline ShortList short_list(const Inputs& in, const Many& many, const Row& row, const List& list,
                                       int count) {
  return {list.references,
          count,
          in.d,
          many.first_ref,
          in.refs.data,
          many.centre_float,
          many.facts->inverse_scale,
          in.x,
          row.index * in.d,
          row.alpha,
          row.sign};
}

// How the references of a list are scored.
enum class ListScores { FLOAT, RELATIVE, DOUBLE };

// Scores and weights of a row's listed references; best and total with those before. in_sums: what their
// weights in the sums are relative to; -INFINITY: they are in none.
template <typename T, bool CLASSES>
__device__ void score_listed(const Inputs& in, const Many& many, int64_t at, const List& list, int count,
                             float in_sums, ListScores how, Listed& listed) {
  const ManySlot& slot = many.slots[at];
  const ManyFactor factor = many.factors[at];
  const float scale = many.facts->scale;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first = many.first_ref + list.references[0];
  double above = static_cast<double>(factor.half_alpha) * many.facts->mean_norm;
  const bool is_short = how == ListScores::DOUBLE, relative = how == ListScores::RELATIVE;
  if (relative) {
    double score = 0;
    for (int64_t e = 8 * threadIdx.x; e < in.d; e += 8 * THREADS) {
      float d_0[8], y[8];
      load_differences<T>(in, many, first, e, scale, d_0);
      load_y<T>(many, at, e, factor.unit, y);
#pragma unroll
      for (int q = 0; q < 8; ++q) score += make_relative(factor.half_alpha, d_0[q], y[q]);
    }
    above += block_sum(score, listed.scratch);
  }
  __shared__ double exact[SHORT_LIST];
  if (is_short) score_short_list<T, CLASSES>(short_list(in, many, slot.row, list, count), exact);
  if (is_short && static_cast<int>(threadIdx.x) < count)
    listed.score[threadIdx.x] = exact[threadIdx.x] + above;
  for (int k = warp; k < count && !is_short; k += THREADS / 32) {
    const int64_t reference = many.first_ref + list.references[k];
    double score = 0;
    for (int64_t e = 8 * lane; e < in.d; e += 8 * 32) {
      float d[8], y[8];
      load_differences<T>(in, many, reference, e, scale, d);
      load_y<T>(many, at, e, factor.unit, y);
      if (relative) {
        float d_0[8];
        load_differences<T>(in, many, first, e, scale, d_0);
#pragma unroll
        for (int q = 0; q < 8; ++q) make_relative(factor.half_alpha, d_0[q], y[q]), d[q] -= d_0[q];
      }
      float part = 0;
#pragma unroll
      for (int q = 0; q < 8; ++q) part = fmaf(fmaf(-factor.half_alpha, d[q], y[q]), d[q], part);
      score += part;
    }
    for (int offset = 16; offset > 0; offset /= 2) score += __shfl_xor_sync(0xffffffffu, score, offset);
    if (lane == 0) listed.score[k] = score + above;
  }
  __syncthreads();
  double best = best_with(slot, in_sums);
  for (int k = threadIdx.x; k < count; k += THREADS) best = fmax(best, listed.score[k]);
  best = block_max(best, listed.scratch);
  const double rate2 = slot.rate2, of_sums = exp2(rate2 * (in_sums - best));
  double total = 0;
  for (int k = threadIdx.x; k < count; k += THREADS) {
    double p = exp2(rate2 * (listed.score[k] - best));
    if (of_sums > 0) p -= list.weights[k] * of_sums;
    listed.weight[k] = static_cast<float>(p);
    total += p;
  }
  total = block_sum(total, listed.scratch);
  if (threadIdx.x == 0) {
    listed.keep = has_sums(slot) ? exp2(rate2 * (slot.best - best)) : 0.0;
    listed.total = slot.total * listed.keep + total;
    listed.best = best;
  }
  __syncthreads();
}

// After the last round: eight elements of a row, and its lse. inverse: of the total, NaN where there is none.
__device__ double inverse_total(const Many& many, bool alive, double best, double total) {
  return isfinite(best) && alive && total > 0 ? many.facts->inverse_scale / total : NAN;
}
// Four elements that are not as are_usual has them: a x + mean. A call, since many places have it. Calls are
// of one form each: registers of a kernel depend on who else calls what it does.
template <bool CLASSES>
__device__ __noinline__ void store_unusual(Array x, Array out, int64_t at, double a, double m0, double m1,
                                           double m2, double m3) {
  const double means[4] = {m0, m1, m2, m3};
#pragma unroll
  for (int k = 0; k < 4; ++k) store_as(out, at + k, a * load_as<double>(x, at + k) + means[k]);
}
template <bool CLASSES>
__device__ __forceinline__ void store_four_means(const Inputs& in, const Many& many, const Row& row,
                                                 int64_t e, double inverse, const double (&sum)[4]) {
  const int64_t at = row.index * in.d + e;
  const double unscale = many.facts->inverse_scale;
  const float4 c = *reinterpret_cast<const float4*>(many.centre_float + e);
  const float centre[4] = {c.x, c.y, c.z, c.w};
  double mean[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) mean[k] = row.b * (centre[k] * unscale + sum[k] * inverse);
  if (!are_usual(in))
    return store_unusual<CLASSES>(in.x, in.out, at, row.a, mean[0], mean[1], mean[2], mean[3]);
  const float4 x = *reinterpret_cast<const float4*>(static_cast<const float*>(in.x.data) + at);
  *reinterpret_cast<float4*>(static_cast<float*>(in.out.data) + at) =
      make_float4(static_cast<float>(row.a * x.x + mean[0]), static_cast<float>(row.a * x.y + mean[1]),
                  static_cast<float>(row.a * x.z + mean[2]), static_cast<float>(row.a * x.w + mean[3]));
}
template <bool CLASSES>
__device__ inline void store_mean(const Inputs& in, const Many& many, const Row& row, int64_t e,
                                  double inverse, const double (&sum)[8]) {
  store_four_means<CLASSES>(in, many, row, e, inverse, {sum[0], sum[1], sum[2], sum[3]});
  store_four_means<CLASSES>(in, many, row, e + 4, inverse, {sum[4], sum[5], sum[6], sum[7]});
}

// The same of a row with one reference that matters, of all rounds, which is the mean.
template <typename T>
__device__ void store_reference(const Inputs& in, const Row& row, int64_t reference) {
  const T* const from = static_cast<const T*>(in.refs.data) + reference * in.d;
  const float* const x = static_cast<const float*>(in.x.data) + row.index * in.d;
  float* const out = static_cast<float*>(in.out.data) + row.index * in.d;
  const double a = row.a, b = row.b;
#pragma unroll 1
  for (int64_t e = 8 * threadIdx.x; e < in.d; e += 8 * THREADS) {
    const Eight<T> values(from + e);
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const float4 v = *reinterpret_cast<const float4*>(x + e + 4 * q);
      const auto value = [&](int k, float x_k) {
        return static_cast<float>(a * x_k + b * values[4 * q + k]);
      };
      *reinterpret_cast<float4*>(out + e + 4 * q) =
          make_float4(value(0, v.x), value(1, v.y), value(2, v.z), value(3, v.w));
    }
  }
}
__device__ void store_lse(const Inputs& in, const Many& many, const ManySlot& slot, const Row& row,
                          double best, double total, double inverse) {
  if (!in.lse.data) return;
  const double unscale = many.facts->inverse_scale;
  const double half_norm = 0.5 * row.alpha * many.facts->mean_norm * unscale * unscale;
  const double shift = row.rate() * (best - half_norm) - slot.y_square / (2 * row.sigma * row.sigma);
  const double lse = isfinite(inverse) ? log(total) + shift + 0.5 * static_cast<double>(in.d) : NAN;
  store_as(in.lse, row.index, lse);
}

// After a list: of a row that ends with it its lse; else what it has come to.
__device__ __forceinline__ void leave_list(const Inputs& in, const Many& many, ManySlot& slot, int64_t at,
                                           double best, double total, double inverse, bool ends) {
  __syncthreads();  // all have read the slot, and stored their sums
  if (threadIdx.x != 0) return;
  if (ends) return store_lse(in, many, slot, slot.row, best, total, inverse);
  slot.total = total, slot.best = best;
  add_arrival(many.listed + at);
}

// A row with a list: scores and sums its references, up to 2,048 VECTORS elements, from shared memory. Each
// is read once, LISTED at a time while others are on their way; sums are relative to the best score so
// far. A thread copies what it reads itself, so that threads meet once a turn, where they add scores up.
// in_sums: as above. PLAIN: as ManyFacts has it.
template <typename T, int VECTORS, int LISTED, bool PLAIN, bool CLASSES>
__device__ __forceinline__ void sum_listed(const Inputs& in, const Many& many, int64_t at, const List& list,
                                           int count, float in_sums, ListScores how, bool last) {
  extern __shared__ __align__(128) char memory[];  // LISTED references, LISTS times; the first
  constexpr int LISTS = room_of(LISTED, sizeof(T));
  __shared__ double parts[2][THREADS / 32][LISTED], scratch[33], exact[SHORT_LIST];
  static_assert(32 % LISTED == 0 && THREADS / 32 * LISTED % 32 == 0 && FLUSHED % LISTED == 0);
  const bool is_short = how == ListScores::DOUBLE, relative = how == ListScores::RELATIVE;
  ManySlot& slot = many.slots[at];
  double total = slot.total, best = slot.best;
  const int bytes = static_cast<int>(in.d * sizeof(T));
  constexpr int APART = 8 * THREADS * sizeof(T);  // a thread's vectors
  char* const own_memory = memory + 8 * sizeof(T) * threadIdx.x;
  const char* const own_refs =
      static_cast<const char*>(in.refs.data) + many.first_ref * bytes + 8 * sizeof(T) * threadIdx.x;
  const int left = static_cast<int>(in.d) - 8 * static_cast<int>(threadIdx.x);
  const auto has = [&](int v) { return v + 1 < VECTORS || left > 8 * v * THREADS; };
  // After the last comes the last again, so that turns are all alike.
  const auto fetch = [&](int first, int buffer) {
#pragma unroll
    for (int k = 0; k < LISTED && first < count; ++k) {
      const char* const from =
          own_refs + static_cast<int64_t>(list.references[min(first + k, count - 1)]) * bytes;
      char* const to = own_memory + (buffer * LISTED + k) * bytes;
#pragma unroll
      for (int v = 0; v < VECTORS; ++v)
        if (has(v)) {
#pragma unroll
          for (int i = 0; i < Eight<T>::VECTORS; ++i)
            copy_async(reinterpret_cast<float4*>(to + v * APART + 16 * i),
                       reinterpret_cast<const float*>(from + v * APART + 16 * i));
        }
    }
    end_copies();
  };
#pragma unroll 1
  for (int k = 0; k < LISTS; ++k) fetch(k * LISTED, k);

  if (is_short) score_short_list<T, CLASSES>(short_list(in, many, slot.row, list, count), exact);
  const ManyFactor factor = many.factors[at];
  const float scale = PLAIN ? 1 : many.facts->scale;
  const double rate2 = slot.rate2;
  double above = static_cast<double>(factor.half_alpha) * many.facts->mean_norm;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto element = [&](int v) { return 8 * (static_cast<int64_t>(v) * THREADS + threadIdx.x); };
  float y[VECTORS][8] = {}, centre[VECTORS][8] = {}, part[VECTORS][8] = {};
  double sums[VECTORS][8] = {};
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    if (!has(v)) continue;
    const int64_t e = element(v);
    load_y<T>(many, at, e, factor.unit, y[v]);
    if (!PLAIN) {
#pragma unroll
      for (int q = 0; q < 8; ++q) centre[v][q] = many.centre_float[e + q];
    }
    if (has_sums(slot)) {
#pragma unroll
      for (int q = 0; q < 8; ++q) sums[v][q] = many.sums[at * many.d_stride + e + q];
    }
  }
  // Eight elements in shared memory, times the scale; visit(q, element).
  const auto each = [&](const char* of, const auto& visit) {
    const Eight<T> values(of);
#pragma unroll
    for (int q = 0; q < 8; ++q) visit(q, PLAIN ? values[q] : values[q] * scale);
  };
  const auto flush = [&] {
#pragma unroll
    for (int v = 0; v < VECTORS; ++v)
#pragma unroll
      for (int q = 0; q < 8; ++q) sums[v][q] += part[v][q], part[v][q] = 0;
  };

  char* const kept = own_memory + LISTS * LISTED * bytes;  // the first
  if (relative) {
    wait_copies<LISTS - 1>();
    double score = 0;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      if (!has(v)) continue;
      const char* const from = own_memory + v * APART;
      each(from, [&](int q, float r) {
        score += make_relative(factor.half_alpha, PLAIN ? r : r - centre[v][q], y[v][q]);
      });
#pragma unroll
      for (int i = 0; i < Eight<T>::VECTORS; ++i)
        reinterpret_cast<uint4*>(kept + v * APART)[i] = reinterpret_cast<const uint4*>(from)[i];
    }
    above += block_sum(score, scratch);
  }
  double own_total = 0;  // of the references lane % LISTED
  float of_sums = 0;     // what their weights in the sums are to be multiplied by
  int buffer = 0;
#pragma unroll 1
  for (int first = 0; first < count; first += LISTED) {
    const int some = min(LISTED, count - first), turn = first / LISTED;
    char* const now = own_memory + buffer * LISTED * bytes;
    wait_copies<LISTS - 1>();
    // Lane: the reference lane % LISTED, in all warps alike.
    double score = 0;
    if (is_short) {
      if (lane % LISTED < some) score = exact[first + lane % LISTED];
    } else {
      double own[LISTED] = {};
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        if (!has(v)) continue;
        float from[8];  // what differences are from: the first or the centre
        if (relative) {
          each(kept + v * APART, [&](int q, float r) { from[q] = r; });
        } else {
#pragma unroll
          for (int q = 0; q < 8; ++q) from[q] = centre[v][q];
        }
#pragma unroll
        for (int k = 0; k < LISTED; ++k) {
          float eight = 0;
          each(now + k * bytes + v * APART, [&](int q, float r) {
            const float d = r - from[q];
            eight = fmaf(fmaf(-factor.half_alpha, d, y[v][q]), d, eight);
          });
          own[k] += eight;
        }
      }
      double (&of_turn)[THREADS / 32][LISTED] = parts[turn % 2];
      const double of_warp = warp_sums<LISTED>(own, lane);
      if (lane % (32 / LISTED) == 0) of_turn[warp][lane / (32 / LISTED)] = of_warp;
      __syncthreads();
#pragma unroll
      for (int w = lane / LISTED; w < THREADS / 32; w += 32 / LISTED) score += of_turn[w][lane % LISTED];
#pragma unroll
      for (int offset = 16; offset >= LISTED; offset /= 2)
        score += __shfl_xor_sync(0xffffffffu, score, offset);
    }
    score = lane % LISTED < some ? score + above : -INFINITY;
    if (first == 0 || __any_sync(0xffffffffu, score > best)) {
      double top = score;
#pragma unroll 1
      for (int offset = LISTED / 2; offset > 0; offset /= 2)
        top = fmax(top, __shfl_xor_sync(0xffffffffu, top, offset));
      top = fmax(top, fmax(best, static_cast<double>(in_sums)));
      const float keep = power_of_two(rate2 * (best - top));
      of_sums = power_of_two(rate2 * (in_sums - top));
      total *= keep, own_total *= keep, best = top;
      flush();
#pragma unroll
      for (int v = 0; v < VECTORS; ++v)
#pragma unroll
        for (int q = 0; q < 8; ++q) sums[v][q] *= keep;
    }
    const float bits = static_cast<float>(rate2 * (score - best));
    float weight = bits > -150 ? exp2f(bits) : 0.0f;
    if (of_sums > 0 && lane % LISTED < some) weight -= list.weights[first + lane % LISTED] * of_sums;
    own_total += weight;
    float of_all[LISTED];
#pragma unroll
    for (int k = 0; k < LISTED; ++k) of_all[k] = __shfl_sync(0xffffffffu, weight, k);
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      if (!has(v)) continue;
#pragma unroll
      for (int k = 0; k < LISTED; ++k)
        each(now + k * bytes + v * APART,
             [&](int q, float r) { part[v][q] = fmaf(of_all[k], PLAIN ? r : r - centre[v][q], part[v][q]); });
    }
    if ((turn + 1) % (FLUSHED / LISTED) == 0) flush();
    fetch(first + LISTS * LISTED, buffer);
    buffer = buffer + 1 < LISTS ? buffer + 1 : 0;
  }
  flush();
#pragma unroll
  for (int offset = LISTED / 2; offset > 0; offset /= 2)
    own_total += __shfl_xor_sync(0xffffffffu, own_total, offset);
  total += own_total;

  const Row& row = slot.row;
  const double inverse = inverse_total(many, true, best, total);
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t e = element(v);
    if (e >= in.d) continue;
    if (last) {
      store_mean<CLASSES>(in, many, row, e, inverse, sums[v]);
    } else {
#pragma unroll
      for (int q = 0; q < 8; ++q) many.sums[at * many.d_stride + e + q] = static_cast<float>(sums[v][q]);
    }
  }
  leave_list(in, many, slot, at, best, total, inverse, last);
}

// A slot with a list, or without anything: the output, or sums for merge_sums or the next round.
template <typename T, int VECTORS, int LISTED, bool CLASSES>
__device__ __forceinline__ void merge_list(const Inputs& in, const Many& many, int64_t at, bool last) {
  __shared__ std::conditional_t<VECTORS == 0, Listed, char> listed;
  __shared__ List list;
  ManySlot& slot = many.slots[at];
  const int place = many.places[at], of_select = many.counts[at], most = many.review_most[at];
  const bool alive = slot.alive, ends = last && place < 0;
  int count = alive ? of_select : 0;
  float in_sums = -INFINITY;
  if (place >= 0) {
    if (most == 0) return;
    count = review<IS_SCALED<T>, CLASSES>(in, many, at, place, most, list);
    if (count == 0 && threadIdx.x == 0) add_arrival(many.listed + at);
    if (count == 0) return;
    in_sums = slot.top;
  } else if (count == 0 && alive && !last) {
    return;
  } else if (count == 1 && ends && !has_sums(slot) && !in.lse.data && are_usual(in)) {
    return store_reference<T>(in, slot.row, many.first_ref + many.survivors[at * MANY_SURVIVORS]);
  } else if (static_cast<int>(threadIdx.x) < count) {
    list.references[threadIdx.x] = many.survivors[at * MANY_SURVIVORS + threadIdx.x];
  }
  __syncthreads();
  const bool doubtful = most > REVIEW_SOME, is_short = count <= SHORT_LIST && (doubtful || place < 0);
  const ListScores how = many.exact && is_short ? ListScores::DOUBLE
                         : doubtful             ? ListScores::RELATIVE
                                                : ListScores::FLOAT;
  if constexpr (VECTORS > 0) {
    if (count > 0 && DtypeOf<T>::value == Dtype::f16 && many.facts->plain)
      return sum_listed<T, VECTORS, LISTED, true, CLASSES>(in, many, at, list, count, in_sums, how, ends);
    if (count > 0)
      return sum_listed<T, VECTORS, LISTED, false, CLASSES>(in, many, at, list, count, in_sums, how, ends);
  }
  double keep = 1, total = slot.total, best = slot.best;
  if constexpr (VECTORS == 0) {
    if (count > 0) {
      score_listed<T, CLASSES>(in, many, at, list, count, in_sums, how, listed);
      total = listed.total, best = listed.best, keep = listed.keep;
    }
  }
  const Row& row = slot.row;
  const float scale = many.facts->scale;
  const double inverse = inverse_total(many, alive, best, total);
#pragma unroll 1
  for (int64_t e = 8 * threadIdx.x; e < in.d; e += 8 * THREADS) {
    float* const sums = many.sums + at * many.d_stride + e;
    double sum[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) sum[k] = has_sums(slot) ? keep * sums[k] : 0;
    if constexpr (VECTORS == 0) {
      for (int first = 0; first < count; first += 16) {
        float part[8] = {};
#pragma unroll 4
        for (int j = first; j < min(count, first + 16); ++j) {
          const float p = listed.weight[j];
          float d[8];
          load_differences<T>(in, many, many.first_ref + list.references[j], e, scale, d);
#pragma unroll
          for (int k = 0; k < 8; ++k) part[k] = fmaf(p, d[k], part[k]);
        }
#pragma unroll
        for (int k = 0; k < 8; ++k) sum[k] += part[k];
      }
    }
    if (ends) {
      store_mean<CLASSES>(in, many, row, e, inverse, sum);
    } else {
#pragma unroll
      for (int k = 0; k < 8; ++k) sums[k] = static_cast<float>(sum[k]);
    }
  }
  leave_list(in, many, slot, at, best, total, inverse, ends);
}

// A dense row: part `part` of `parts` of its elements. What came before, of its list too, and what the thread
// blocks of the sums left. FLOAT: of either half of the references.
template <bool FLOAT, bool CLASSES>
__device__ __forceinline__ void merge_sums(const Inputs& in, const Many& many, int place, int part, int parts,
                                           bool last) {
  const int64_t at = many.dense_slots[place];
  if (many.review_most[at] > 0) {  // its list's block, one of the first, is there
    if (threadIdx.x == 0)
      while (read_arrivals(many.listed + at) == 0) {
      }
    __syncthreads();
  }
  const ManySlot slot = many.slots[at];
  const std::conditional_t<CLASSES, ManyClassParts, ManySums> grid(many, FLOAT ? 2 : 1);
  const int row_tile = place / static_cast<int>(MANY_ROWS), splits = grid.splits_of(row_tile);
  const int64_t stride = static_cast<int64_t>(grid.split_stride(row_tile)) * (MANY_ROWS * MANY_TILE);
  const float* const partial =
      many.partial +
      (static_cast<int64_t>(grid.index(row_tile, 0, 0)) * MANY_ROWS + place % MANY_ROWS) * MANY_TILE;
  const double best = best_with(slot, slot.top), rate2 = slot.rate2;
  const double keep = has_sums(slot) ? exp2(rate2 * (slot.best - best)) : 0.0,
               keep_own = exp2(rate2 * (slot.top - best)), unit = keep_own / WEIGHT_SCALE;
  double total = 0;
  for (int k = 0; k < WEIGHT_UNITS; ++k) total += many.totals[place * WEIGHT_UNITS + k];
  total = slot.total * keep + total * keep_own;
  const double inverse = inverse_total(many, true, best, total);
  // Where parts are; FLOAT: of second halves after those of first ones.
  const auto at_split = [&](int split) {
    if constexpr (FLOAT) {
      if (split >= splits) return (split - splits) * stride + many.d_stride * MANY_ROWS;
    }
    return split * stride;
  };
  wait_for_previous_launch();
  for (int64_t e = 4 * (static_cast<int64_t>(part) * THREADS + threadIdx.x); e < in.d;
       e += 4 * THREADS * parts) {
    const float* const from = partial + e / MANY_TILE * (MANY_ROWS * MANY_TILE) + e % MANY_TILE;
    float4 own{};
#pragma unroll 1
    for (int split = 0; split < (FLOAT ? 2 : 1) * splits; split += MERGED_SPLITS) {
      float4 v[MERGED_SPLITS];
#pragma unroll
      for (int i = 0; i < MERGED_SPLITS; ++i)
        v[i] = split + i < (FLOAT ? 2 : 1) * splits
                   ? *reinterpret_cast<const float4*>(from + at_split(split + i))
                   : float4{};
#pragma unroll
      for (int i = 0; i < MERGED_SPLITS; ++i)
        own.x += v[i].x, own.y += v[i].y, own.z += v[i].z, own.w += v[i].w;
    }
    float4* const sums = reinterpret_cast<float4*>(many.sums + at * many.d_stride + e);
    const float4 old = has_sums(slot) ? *sums : float4{};
    const double sum[4] = {keep * old.x + unit * own.x, keep * old.y + unit * own.y,
                           keep * old.z + unit * own.z, keep * old.w + unit * own.w};
    if (last) {
      store_four_means<CLASSES>(in, many, slot.row, e, inverse, sum);
    } else {
      *sums = make_float4(static_cast<float>(sum[0]), static_cast<float>(sum[1]), static_cast<float>(sum[2]),
                          static_cast<float>(sum[3]));
    }
  }
  __syncthreads();  // all have read the slot
  if (threadIdx.x != 0 || part > 0) return;
  if (last) {
    store_lse(in, many, slot, slot.row, best, total, inverse);
  } else {
    many.slots[at].total = total, many.slots[at].best = best;
  }
}

// The sums after this round, or the output after the last: first a block per slot for the lists, on what
// multiprocessors sum_kernel leaves; then blocks for dense rows, several to a row where there are few, one
// before the last round. VECTORS, LISTED: as above; 0: any number of elements. sum_kernel's blocks, which all
// have begun, have waited for those before: all but the sums is there.
template <typename T, int VECTORS, int LISTED, bool CLASSES>
__global__ void __launch_bounds__(THREADS, 2) merge_kernel(const Inputs in, const Many many, bool last) {
  allow_next_launch();
  const int rows = static_cast<int>(many.rows), block = static_cast<int>(blockIdx.x) - rows;
  if (block < 0) {
    merge_list<T, VECTORS, LISTED, CLASSES>(in, many, many.list_order[blockIdx.x], last);
    if (blockIdx.x > 0) return;
    wait_for_previous_launch();  // launches end in their order
    if constexpr (CLASSES) {     // of the next pass
      if (last && threadIdx.x < MANY_ROW_TILES) many.classes->early[threadIdx.x] = 0;
    } else {
      if (last && threadIdx.x == 0) many.facts->early = 0;
    }
    return;
  }
  const int dense = many.facts->dense, blocks = static_cast<int>(gridDim.x) - rows;
  const int most = static_cast<int>((in.d + 4 * THREADS - 1) / (4 * THREADS));
  const int parts = last ? max(1, min(most, blocks / max(dense, 1))) : 1;
#pragma unroll 1
  for (int unit = block; unit < dense * parts; unit += blocks)
    merge_sums<IS_FLOAT<T>, CLASSES>(in, many, dense_place<CLASSES>(many, unit % dense), unit / dense, parts,
                                     last);
}

template <typename T, bool CLASSES>
auto merge_kernel_for(int64_t d) {
  if (d > LISTED_D) return merge_kernel<T, 0, 0, CLASSES>;
  if constexpr (IS_FLOAT<T>) {
    return d > LISTED_D / 2 ? merge_kernel<T, 2, 4, CLASSES> : merge_kernel<T, 1, 4, CLASSES>;
  } else {
    if (d > EIGHT_LISTED_D) return merge_kernel<T, 2, 4, CLASSES>;
    return d > LISTED_D / 2 ? merge_kernel<T, 2, 8, CLASSES> : merge_kernel<T, 1, 8, CLASSES>;
  }
}

// Blocks of select_kernel that have room before all tiles are scored, about: of clusters without a last one.
// Of more than one tile of rows: any.
int early_blocks(const Many& many) {
  if (many.rows > MANY_ROWS) return static_cast<int>(many.rows);
  const int64_t tiles = ceil_div(many.refs, 2 * MANY_TILE) * ceil_div(many.rows, MANY_ROWS);
  const int64_t clusters = many.blocks / 2, idle = (clusters - tiles % clusters) % clusters;
  return static_cast<int>(2 * idle * SELECT_RESIDENT);
}

template <typename T>
auto merge_kernel_for(int64_t d, bool classes) {
  return classes ? merge_kernel_for<T, true>(d) : merge_kernel_for<T, false>(d);
}

template <typename T>
auto select_kernel_for(bool classes) {
  return classes ? select_kernel<T, true> : select_kernel<T, false>;
}

template <bool FLOAT>
auto rows_kernel_for(bool usual, bool labels) {
  return usual ? (labels ? rows_kernel<true, true, FLOAT> : rows_kernel<true, false, FLOAT>)
               : (labels ? rows_kernel<false, true, FLOAT> : rows_kernel<false, false, FLOAT>);
}

// halves, norms: of the references of a round, where these are float32.
void run_rows(const char* op, const Inputs& in, const Plan& plan, Many many, __half* halves, float* norms,
              cudaStream_t stream) {
  const bool half = in.refs.dtype == Dtype::f16, labels = in.labels != nullptr, classes = in.k > 1,
             is_float = in.refs.dtype == Dtype::f32;
  const Inputs pool = as_pool(in);
  const auto merge = half       ? merge_kernel_for<__half>(in.d, classes)
                     : is_float ? merge_kernel_for<float>(in.d, classes)
                                : merge_kernel_for<__nv_bfloat16>(in.d, classes);
  const auto select = half       ? select_kernel_for<__half>(classes)
                      : is_float ? select_kernel_for<float>(classes)
                                 : select_kernel_for<__nv_bfloat16>(classes);
  const int listed = in.d > EIGHT_LISTED_D || is_float ? 4 : 8, size = size_of(in.refs.dtype);
  const int merge_bytes =
      in.d > LISTED_D ? 0 : static_cast<int>((room_of(listed, size) * listed + 1) * size * in.d);
  check_cuda(op, cudaFuncSetAttribute(merge, cudaFuncAttributeMaxDynamicSharedMemorySize, merge_bytes));
  const auto launch = [&](auto* kernel, dim3 grid, int threads, int64_t bytes, const auto&... more) {
    launch_following(op, true, kernel, grid, threads, bytes, stream, more...);
  };
  if (many.order) {
    const int bytes = static_cast<int>(in.n * sizeof(float));
    const auto order = labels ? order_kernel<true> : order_kernel<false>;
    check_cuda(op, cudaFuncSetAttribute(order, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    launch(order, static_cast<unsigned>(many.blocks), ORDER_THREADS, bytes, in, many);
  }
  for (many.first_row = 0; many.first_row < in.n; many.first_row += plan.rows_per_pass) {
    many.rows = std::min(plan.rows_per_pass, in.n - many.first_row);
    many.padded = (many.rows + 63) / 64 * 64;
    const unsigned slots = static_cast<unsigned>(many.rows);
    const auto rows = is_float ? rows_kernel_for<true>(are_usual(in), labels)
                               : rows_kernel_for<false>(are_usual(in), labels);
    launch(rows, static_cast<unsigned>(many.padded), THREADS, 0, in, many);
    const int64_t warps = THREADS / 32;
    if (many.norms && many.first_row == 0 && !is_float) {
      launch(classes ? norms_kernel<true> : norms_kernel<false>,
             static_cast<unsigned>(ceil_div(pool.m, warps)), THREADS, 0, pool, many);
    }
    for (many.first_ref = 0; many.first_ref < pool.m; many.first_ref += plan.refs_per_pass) {
      many.refs = std::min(plan.refs_per_pass, pool.m - many.first_ref);
      // What products are of. Float32: halves, and but for the first scores twice as many elements.
      if (is_float) many.norms = norms - many.first_ref;
      many.map_ref = is_float ? 0 : many.first_ref;
      Inputs operands = pool;
      Many product = many;
      if (is_float) {
        const int64_t row_bytes = 4 * many.d_stride;
        launch(classes ? halves_kernel<true> : halves_kernel<false>,
               static_cast<unsigned>(ceil_div(many.refs, warps)), THREADS, 0, pool, many, halves);
        operands.refs = {halves, Dtype::f16};  // none beyond the round are there
        operands.m = many.first_ref + many.refs;
        launch_many_score(op, operands, many, false, stream, row_bytes, row_bytes);
        operands.d = product.d_stride = 2 * many.d_stride;
      } else {
        launch_many_score(op, pool, many, false, stream);
      }
      launch(select, slots, SELECT_THREADS, 0, pool, many, early_blocks(many));
      launch(classes ? place_kernel<true> : place_kernel<false>, 1, PLACE_THREADS, 0, operands, product);
      if (many.exact) {
        launch(classes ? gather_kernel<true> : gather_kernel<false>, 4 * static_cast<unsigned>(many.blocks),
               THREADS, 0, operands, product);
        launch_many_score(op, operands, product, true, stream);
      }
      const unsigned blocks = static_cast<unsigned>(many.blocks);
      const auto weights = classes
                               ? (many.exact ? weights_kernel<true, true> : weights_kernel<false, true>)
                               : (many.exact ? weights_kernel<true, false> : weights_kernel<false, false>);
      launch(weights, std::min(slots * WEIGHT_UNITS, RESIDENT * blocks), THREADS, 0, pool, many);
      launch_many_sum(op, operands, product, stream);
      const bool last = many.first_ref + plan.refs_per_pass >= pool.m;
      launch(merge, slots + 2 * blocks, THREADS, merge_bytes, pool, many, last);
    }
  }
}

}  // namespace

void run_many_rows(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream) {
  const int64_t refs = in.k * in.m, labelled = in.labels ? in.k : 0;
  const bool is_float = in.refs.dtype == Dtype::f32;
  const ManyLayout layout =
      many_layout(in.n, refs, in.d, labelled, is_float, plan.rows_per_pass, plan.refs_per_pass);
  char* next = static_cast<char*>(workspace);
  const auto take = [&](int64_t bytes) {
    char* const piece = next;
    next += bytes;
    return piece;
  };
  Many many{};
  int* const order = reinterpret_cast<int*>(take(layout.order));
  many.order = layout.order > 0 ? order : nullptr;
  many.d_stride = (in.d + MANY_TILE - 1) / MANY_TILE * MANY_TILE;
  const int64_t d_tiles = many.d_stride / MANY_TILE;
  Carver centre(take(layout.centre));
  many.facts = centre.take<ManyFacts>(1);
  many.centre_half = centre.take<__half>(many.d_stride);
  many.centre_float = centre.take<float>(many.d_stride);
  many.centre = centre.take<float>(2 * many.d_stride);
  many.statistics = centre.take<double>(d_tiles * STATISTICS);
  many.distances = centre.take<float>(d_tiles * MANY_PAIRS);
  float* const norms = reinterpret_cast<float*>(take(layout.norms));
  many.norms = layout.norms > 0 && in.refs.dtype == Dtype::f16 ? norms : nullptr;
  Carver classes(take(layout.classes));
  if (in.labels) many.ranges = classes.take<int2>(plan.rows_per_pass);
  if (in.k > 1) {
    many.class_refs = static_cast<int>(in.m);
    many.operands = classes.take<uint16_t>(plan.refs_per_pass / 16);
    many.classes = classes.take<ManyClasses>(1);
  }
  Carver rows(take(layout.rows));
  many.factors = rows.take<ManyFactor>(plan.rows_per_pass);
  many.dense_factors = rows.take<ManyFactor>(plan.rows_per_pass);
  many.slots = rows.take<ManySlot>(plan.rows_per_pass);
  many.dense_slots = rows.take<int>(plan.rows_per_pass);
  many.counts = rows.take<int>(plan.rows_per_pass);
  many.places = rows.take<int>(plan.rows_per_pass);
  many.fills = rows.take<int>(plan.rows_per_pass);
  many.review_most = rows.take<int>(plan.rows_per_pass);
  many.listed = rows.take<int>(plan.rows_per_pass);
  many.list_order = rows.take<int>(plan.rows_per_pass);
  many.totals = rows.take<double>(plan.rows_per_pass * WEIGHT_UNITS);
  static_assert(2 * sizeof(ManyFactor) + sizeof(ManySlot) + 7 * sizeof(int) + WEIGHT_UNITS * sizeof(double) <=
                MANY_ROW_BYTES);
  many.hi = reinterpret_cast<__half*>(take(layout.queries));
  if (is_float) {  // y_lo and y_hi of one row after those of another, of dense rows too
    many.lo = many.hi, many.hi = many.lo + many.d_stride;
    many.dense_lo = many.lo + 2 * plan.rows_per_pass * many.d_stride;
  } else {
    many.lo = many.hi + plan.rows_per_pass * many.d_stride;
    many.dense_lo = many.lo + plan.rows_per_pass * many.d_stride;
  }
  many.scores = reinterpret_cast<float*>(take(layout.scores));
  many.maxima = reinterpret_cast<float*>(take(layout.maxima));
  many.survivors = reinterpret_cast<int*>(take(layout.survivors));
  many.sums = reinterpret_cast<float*>(take(layout.sums));
  many.partial = reinterpret_cast<float*>(take(layout.partial));
  __half* const halves = reinterpret_cast<__half*>(take(layout.halves));
  many.score_stride = plan.refs_per_pass;
  many.blocks = static_cast<int>(plan.blocks);
  many.exact = !plan.fast;

  const bool of_classes = in.k > 1;
  const auto centre_of =
      is_float ? (of_classes ? centre_kernel<float, true> : centre_kernel<float, false>)
      : in.refs.dtype == Dtype::f16
          ? (of_classes ? centre_kernel<__half, true> : centre_kernel<__half, false>)
          : (of_classes ? centre_kernel<__nv_bfloat16, true> : centre_kernel<__nv_bfloat16, false>);
  const unsigned tiles = static_cast<unsigned>(d_tiles);
  centre_of<<<tiles, MANY_TILE * CENTRE_LANES, 0, stream>>>(in, many);
  check_launch(op);
  if (in.refs.dtype != Dtype::f16) {
    const auto judge =
        is_float ? (of_classes ? judge_kernel<float, true> : judge_kernel<float, false>)
                 : (of_classes ? judge_kernel<__nv_bfloat16, true> : judge_kernel<__nv_bfloat16, false>);
    launch_following(op, true, judge, std::min(tiles, static_cast<unsigned>(many.blocks)),
                     MANY_TILE * CENTRE_LANES, 0, stream, in, many);
  }
  for (int64_t first = 0; first < in.n; first += MANY_LIST_ROWS)
    run_rows(op, slice_rows(in, first, MANY_LIST_ROWS), plan, many, halves, norms, stream);
}

}  // namespace svel::cuda
