// Conversion of stored values to the dtype that arithmetic is in and back, a block at a time.
// For _isa.cpp files: static functions only, no torch headers.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/storage.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace svel::SVEL_ISA {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

static inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float to_float(f16 h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16, rest = h.bits & 0x7fff;
  const uint32_t finite =
      bits_of(float_from_bits(rest << 13) * 0x1p112f);  // moves the exponent's bias, subnormals too
  return float_from_bits(sign | (rest >= 0x7c00 ? 0x7f800000 | rest << 13 : finite));
}
static inline float to_float(bf16 b) {
  return float_from_bits(static_cast<uint32_t>(b.bits) << 16);
}
static inline float to_float(float f) {
  return f;
}
static inline float to_float(double d) {
  return static_cast<float>(d);
}

// Round to nearest, ties to even.
static inline void from_float(float value, f16& out) {
  uint32_t bits = bits_of(value);
  const uint32_t sign = bits & 0x80000000;
  bits ^= sign;
  const uint32_t special = bits > 0x7f800000 ? 0x7e00 : 0x7c00;                   // NaN, or 65536 and above
  const uint32_t subnormal = bits_of(float_from_bits(bits) + 0.5f) - 0x3f000000;  // the ulp of 0.5 is 2^-24
  const uint32_t normal = (bits + 0xc8000fff + ((bits >> 13) & 1)) >> 13;
  const uint32_t rounded = bits >= 0x47800000 ? special : bits < 0x38800000 ? subnormal : normal;
  out.bits = static_cast<uint16_t>(rounded | sign >> 16);
}
static inline void from_float(float value, bf16& out) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
static inline void from_float(float value, float& out) {
  out = value;
}
static inline void from_float(float value, double& out) {
  out = value;
}

template <typename T>
static inline void load(const T* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(in[i]);
}
template <typename T>
static inline void load(const T* in, double* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(in[i]);
}
static inline void load(const double* in, double* out, int64_t n) {
  std::memcpy(out, in, n * sizeof *in);
}

template <typename T>
static inline void store(const float* in, T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) from_float(in[i], out[i]);
}
template <typename T>
static inline void store(const double* in, T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) from_float(static_cast<float>(in[i]), out[i]);
}
static inline void store(const double* in, double* out, int64_t n) {
  std::memcpy(out, in, n * sizeof *in);
}

#if defined(__F16C__)
static inline void load(const f16* in, float* out, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i))));
  }
#endif
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  }
  for (; i < n; ++i) out[i] = to_float(in[i]);
}
static inline void store(const float* in, f16* out, int64_t n) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                        _mm512_cvtps_ph(_mm512_loadu_ps(in + i), nearest));
  }
#endif
  for (; i + 8 <= n; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), nearest));
  }
  for (; i < n; ++i) from_float(in[i], out[i]);
}
#endif

// f(pointer) with the type of the storage; `data` may be const or not.
template <typename F>
static inline void with_storage(Storage storage, const void* data, const F& f) {
  switch (storage) {
    case Storage::f16:
      return f(static_cast<const f16*>(data));
    case Storage::bf16:
      return f(static_cast<const bf16*>(data));
    case Storage::f32:
      return f(static_cast<const float*>(data));
    case Storage::f64:
      return f(static_cast<const double*>(data));
    case Storage::i64:
      return;  // dataset indices are copied, never converted
  }
}

// n values from `offset` on as Work (float or double): the stored ones where they have that type, else in
// `buffer`.
template <typename Work>
static inline const Work* load(Storage storage, const void* data, int64_t offset, Work* buffer, int64_t n) {
  if (storage == (sizeof(Work) == 8 ? Storage::f64 : Storage::f32))
    return static_cast<const Work*>(data) + offset;
  with_storage(storage, data, [&](auto* in) { load(in + offset, buffer, n); });
  return buffer;
}

template <typename Work>
static inline void store(Storage storage, const Work* in, void* data, int64_t offset, int64_t n) {
  with_storage(storage, data, [&](auto* typed) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    store(in, static_cast<T*>(data) + offset, n);
  });
}

}  // namespace svel::SVEL_ISA
