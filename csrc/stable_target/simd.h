// One float vector type as wide as the instruction set, on the compiler's vector extensions, and the few
// operations that the posterior kernels need beyond + - *. For _isa.cpp files: static functions only, no
// torch headers.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/convert.h"

namespace svel::SVEL_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t VecInt __attribute__((vector_size(4 * LANES)));
typedef uint32_t VecUint __attribute__((vector_size(4 * LANES)));
typedef uint16_t VecShort __attribute__((vector_size(2 * LANES)));
typedef float Vec4 __attribute__((vector_size(16)));

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <typename V, typename T>
inline V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec splat(float value) {
  return Vec{} + value;
}

inline Vec load_vec(const float* p) {
  return load_as<Vec>(p);
}

inline void store_vec(float* p, Vec v) {
  std::memcpy(p, &v, sizeof v);
}

inline Vec load_vec(const double* p) {
  Vec v;
  for (int i = 0; i < LANES; ++i) v[i] = static_cast<float>(p[i]);
  return v;
}

inline Vec load_vec(const bf16* p) {
  return bit_cast<Vec>(__builtin_convertvector(load_as<VecShort>(p), VecInt) << 16);
}

inline Vec load_vec(const f16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  const VecInt bits = __builtin_convertvector(load_as<VecShort>(p), VecInt);
  const VecInt rest = bits & 0x7fff;
  const VecInt finite = bit_cast<VecInt>(bit_cast<Vec>(rest << 13) * 0x1p112f);  // subnormals too
  const VecInt value = rest >= 0x7c00 ? (rest << 13) | 0x7f800000 : finite;
  return bit_cast<Vec>(((bits & 0x8000) << 16) | value);
#endif
}

// The first n < LANES values, then zeros.
template <typename T>
inline Vec load_part(const T* p, int64_t n) {
  T buffer[LANES] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load_vec(buffer);
}

inline Vec max(Vec a, Vec b) {
  return a > b ? a : b;
}

inline float max_lane(Vec v) {
  float top = v[0];
  for (int i = 1; i < LANES; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

// Lanes of v added up to four sums.
inline Vec4 fold(Vec v) {
#if defined(__AVX512F__)
  const auto half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  const Vec half = v;
#endif
#if defined(__AVX2__)
  return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
#else
  return half;
#endif
}

// The sums over the lanes of four vectors.
inline Vec4 sum_lanes(Vec a, Vec b, Vec c, Vec d) {
  const Vec4 p = fold(a), q = fold(b), r = fold(c), s = fold(d);
  const Vec4 pq = __builtin_shufflevector(p, q, 0, 4, 1, 5) + __builtin_shufflevector(p, q, 2, 6, 3, 7);
  const Vec4 rs = __builtin_shufflevector(r, s, 0, 4, 1, 5) + __builtin_shufflevector(r, s, 2, 6, 3, 7);
  return __builtin_shufflevector(pq, rs, 0, 1, 4, 5) + __builtin_shufflevector(pq, rs, 2, 3, 6, 7);
}

inline float sum_lanes(Vec v) {
  return sum_lanes(v, Vec{}, Vec{}, Vec{})[0];
}

// e^x for x <= 0 to about one unit in the last place; 0 below -87; NaN stays NaN.
inline Vec exp(Vec x) {
  const Vec shift = splat(0x1.8p23f);  // adding it rounds to an integer, which then sits in the lowest bits
  const Vec shifted = x * 1.44269504f + shift;
  const Vec n = shifted - shift;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n log 2; the first product is exact
  Vec p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Vec scaled = bit_cast<Vec>(bit_cast<VecUint>(p) + (bit_cast<VecUint>(shifted) << 23));
  return x < splat(-87.0f) ? Vec{} : scaled;
}

inline int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// f(i, read) for every vector of n values: read(q) gives the values at q + i, and zeros after the n-th.
template <typename F>
inline void each_vec(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) f(i, [i](const auto* q) { return load_vec(q + i); });
  if (i < n) f(i, [i, n](const auto* q) { return load_part(q + i, n - i); });
}

// f(std::integral_constant<int, n>) for 1 <= n <= Most.
template <int Most, typename F>
inline void with_constant(int64_t n, const F& f) {
  if constexpr (Most > 1) {
    if (n < Most) return with_constant<Most - 1>(n, f);
  }
  f(std::integral_constant<int, Most>{});
}

}  // namespace
}  // namespace svel::SVEL_ISA
