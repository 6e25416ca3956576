// Elements of one dtype held in registers as the 16-byte words they were loaded in. No torch headers.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/device.cuh"

namespace svel {

// What a dtype is computed in.
template <typename T>
using Work = std::conditional_t<std::is_same_v<T, double>, double, float>;

// VALUES elements of T at an address aligned to 16 bytes.
template <typename T, int VALUES>
struct Pack {
  static constexpr int WORDS = VALUES * sizeof(T) / 16;
  static_assert(WORDS * 16 == VALUES * sizeof(T), "whole words of 16 bytes");
  uint4 raw[WORDS];

  __device__ __forceinline__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) raw[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
  }

  // In PTX: the compiler splits an assignment into four words where it loses sight of the alignment.
  __device__ __forceinline__ void store(T* to) const {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(reinterpret_cast<uint4*>(to) + i),
                   "r"(raw[i].x), "r"(raw[i].y), "r"(raw[i].z), "r"(raw[i].w)
                   : "memory");
    }
  }

  __device__ __forceinline__ uint32_t word(int i) const {
    const uint4& v = raw[i / 4];
    return i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w;
  }

  // From the words: taken as 16-bit values, the compiler keeps a register for each.
  __device__ __forceinline__ Work<T> get(int k) const {
    if constexpr (std::is_same_v<T, double>) {
      return __hiloint2double(static_cast<int>(word(2 * k + 1)), static_cast<int>(word(2 * k)));
    } else if constexpr (std::is_same_v<T, float>) {
      return __uint_as_float(word(k));
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      const uint32_t pair = word(k / 2);
      return __uint_as_float(k % 2 ? pair & 0xffff0000u : pair << 16);
    } else {
      const uint32_t pair = word(k / 2);
      return __half2float(__ushort_as_half(static_cast<unsigned short>(k % 2 ? pair >> 16 : pair & 0xffffu)));
    }
  }

  __device__ __forceinline__ void fill(const Work<T> (&values)[VALUES]) {
    uint32_t words[4 * WORDS];
#pragma unroll
    for (int i = 0; i < 4 * WORDS; ++i) {
      if constexpr (std::is_same_v<T, double>) {
        const double v = values[i / 2];
        words[i] = static_cast<uint32_t>(i % 2 ? __double2hiint(v) : __double2loint(v));
      } else if constexpr (std::is_same_v<T, float>) {
        words[i] = __float_as_uint(values[i]);
      } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
        words[i] = *reinterpret_cast<const uint32_t*>(&pair);
      } else {
        const __half2 pair = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
        words[i] = *reinterpret_cast<const uint32_t*>(&pair);
      }
    }
#pragma unroll
    for (int i = 0; i < WORDS; ++i)
      raw[i] = make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
  }
};

}  // namespace svel
