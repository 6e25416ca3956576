// What the CUDA kernels share: dtypes known at run time, reductions over a block, launch checks. No torch
// headers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace svel {

constexpr double LOG2_E = 1.4426950408889634, LOG_2 = 0.6931471805599453;

enum class Dtype : int { f32, bf16, f16, f64 };

struct Array {  // a contiguous device array whose dtype is known at run time
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
};

__host__ __device__ inline bool is_aligned(const void* pointer) {  // to 16 bytes
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}
__host__ __device__ inline bool is_vector(const Array& a) {  // float32, four at a time
  return a.dtype == Dtype::f32 && is_aligned(a.data);
}

__host__ __device__ inline int size_of(Dtype dtype) {
  return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
}

template <typename T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr Dtype value = Dtype::f32;
};
template <>
struct DtypeOf<double> {
  static constexpr Dtype value = Dtype::f64;
};
template <>
struct DtypeOf<__half> {
  static constexpr Dtype value = Dtype::f16;
};
template <>
struct DtypeOf<__nv_bfloat16> {
  static constexpr Dtype value = Dtype::bf16;
};

__device__ inline float to_float(float v) {
  return v;
}
__device__ inline float to_float(double v) {
  return static_cast<float>(v);
}
__device__ inline float to_float(__half v) {
  return __half2float(v);
}
__device__ inline float to_float(__nv_bfloat16 v) {
  return __bfloat162float(v);
}

// Element i of a, as W (float or double).
template <typename W>
__device__ inline W load_as(Array a, int64_t i) {
  switch (a.dtype) {
    case Dtype::f32:
      return static_cast<W>(static_cast<const float*>(a.data)[i]);
    case Dtype::bf16:
      return static_cast<W>(__bfloat162float(static_cast<const __nv_bfloat16*>(a.data)[i]));
    case Dtype::f16:
      return static_cast<W>(__half2float(static_cast<const __half*>(a.data)[i]));
    default:
      return static_cast<W>(static_cast<const double*>(a.data)[i]);
  }
}

__device__ inline void store_as(Array a, int64_t i, double v) {
  switch (a.dtype) {
    case Dtype::f32:
      static_cast<float*>(a.data)[i] = static_cast<float>(v);
      break;
    case Dtype::bf16:
      static_cast<__nv_bfloat16*>(a.data)[i] = __float2bfloat16(static_cast<float>(v));
      break;
    case Dtype::f16:
      static_cast<__half*>(a.data)[i] = __float2half(static_cast<float>(v));
      break;
    default:
      static_cast<double*>(a.data)[i] = v;
  }
}

// Eight elements from i on; a.data + i aligned to 16 bytes.
template <typename W>
__device__ inline void load8(Array a, int64_t i, W (&out)[8]) {
  if (a.dtype == Dtype::f32) {
    const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(a.data) + i);
    const float4 low = from[0], high = from[1];
    const float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int k = 0; k < 8; ++k) out[k] = values[k];
  } else if (a.dtype == Dtype::f64) {
    const double2* from = reinterpret_cast<const double2*>(static_cast<const double*>(a.data) + i);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const double2 pair = from[k];
      out[2 * k] = static_cast<W>(pair.x);
      out[2 * k + 1] = static_cast<W>(pair.y);
    }
  } else {
    const uint4 raw = *reinterpret_cast<const uint4*>(static_cast<const __half*>(a.data) + i);
    const __half* halves = reinterpret_cast<const __half*>(&raw);
    const __nv_bfloat16* brains = reinterpret_cast<const __nv_bfloat16*>(&raw);
    const bool half = a.dtype == Dtype::f16;
#pragma unroll
    for (int k = 0; k < 8; ++k) out[k] = half ? __half2float(halves[k]) : __bfloat162float(brains[k]);
  }
}

template <typename W>
__device__ inline void store8(Array a, int64_t i, const W (&values)[8]) {
  if (a.dtype == Dtype::f32) {
    float v[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) v[k] = static_cast<float>(values[k]);
    float4* to = reinterpret_cast<float4*>(static_cast<float*>(a.data) + i);
    to[0] = make_float4(v[0], v[1], v[2], v[3]);
    to[1] = make_float4(v[4], v[5], v[6], v[7]);
  } else if (a.dtype == Dtype::f64) {
    double2* to = reinterpret_cast<double2*>(static_cast<double*>(a.data) + i);
#pragma unroll
    for (int k = 0; k < 4; ++k) to[k] = make_double2(values[2 * k], values[2 * k + 1]);
  } else {
    uint4 raw;
    __half* halves = reinterpret_cast<__half*>(&raw);
    __nv_bfloat16* brains = reinterpret_cast<__nv_bfloat16*>(&raw);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const float v = static_cast<float>(values[k]);
      if (a.dtype == Dtype::f16) {
        halves[k] = __float2half(v);
      } else {
        brains[k] = __float2bfloat16(v);
      }
    }
    *reinterpret_cast<uint4*>(static_cast<__half*>(a.data) + i) = raw;
  }
}

__device__ inline void prefetch(const void* global) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(global));
}

// Sum over the warp, the same in every lane.
template <typename W>
__device__ inline W warp_sum(W v) {
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// Of all COUNT values at once; lane l gets the sum of v[l / (32 / COUNT)].
template <int COUNT, typename W>
__device__ inline W warp_sums(W (&v)[COUNT], int lane) {
  int offset = 16;
#pragma unroll
  for (int half = COUNT / 2; half > 0; half /= 2, offset /= 2) {
    const bool upper = lane & offset;
#pragma unroll
    for (int j = 0; j < half; ++j) {
      const W give = upper ? v[j] : v[j + half], keep = upper ? v[j + half] : v[j];
      v[j] = keep + __shfl_xor_sync(0xffffffffu, give, offset);
    }
  }
#pragma unroll
  for (; offset > 0; offset /= 2) v[0] += __shfl_xor_sync(0xffffffffu, v[0], offset);
  return v[0];
}

// Sum over the block, the same in every thread, in a fixed order. scratch: 33 values of shared memory; starts
// and ends with a barrier, so scratch can be used again at once.
template <typename W>
__device__ inline W block_sum(W v, W* scratch) {
  v = warp_sum(v);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  W sum = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) sum += scratch[w];
  __syncthreads();
  return sum;
}

// Maximum over the block; a NaN counts as the lowest value.
template <typename W>
__device__ inline W block_max(W v, W* scratch) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const W other = __shfl_xor_sync(0xffffffffu, v, offset);
    v = v >= other || other != other ? v : other;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  W best = scratch[0];
  for (int w = 1; w < static_cast<int>(blockDim.x) / 32; ++w) {
    const W other = scratch[w];
    best = best >= other || other != other ? best : other;
  }
  __syncthreads();
  return best;
}

// After each launch: a failed launch is an exception that names the op.
inline void check_cuda(const char* op, cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("svel::") + op + ": CUDA: " + cudaGetErrorString(error));
}
inline void check_launch(const char* op) {
  check_cuda(op, cudaGetLastError());
}

}  // namespace svel
