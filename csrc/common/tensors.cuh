// Tensors as the CUDA kernels take them, the stream they go to, and the limits of the device.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <cstdint>
#include <mutex>

#include "common/argument.h"
#include "common/device.cuh"

namespace svel::cuda {

inline Tensor packed(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}
inline MaybeTensor packed(const MaybeTensor& t) {
  return t ? MaybeTensor(packed(*t)) : t;
}

// For a floating-point tensor (a Tensor or an Argument); a tensor without elements may have no memory.
template <typename T>
Array array_of(const T& t) {
  const ScalarType dtype = t.scalar_type();
  const Dtype known = dtype == ScalarType::Double     ? Dtype::f64
                      : dtype == ScalarType::Half     ? Dtype::f16
                      : dtype == ScalarType::BFloat16 ? Dtype::bf16
                                                      : Dtype::f32;
  return {const_cast<void*>(t.const_data_ptr()), known};
}

inline Array array_of(const MaybeTensor& t) {
  return t ? array_of(*t) : Array{};
}

inline Array array_of(const MaybeArgument& t) {
  return t ? array_of(static_cast<const Argument&>(t)) : Array{};
}

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}
inline cudaStream_t current_stream(const Tensor& t) {
  return current_stream(t.get_device_index());
}

struct DeviceLimits {
  int sm_count = 0, smem_limit = 0, cc = 0;
  double bandwidth = 0;  // of its memory, bytes per second as specified
};

// Read once per device; reading them does not wait for the device.
inline const DeviceLimits& device_limits(const char* op, int device) {
  static std::array<DeviceLimits, 64> known;
  static std::mutex mutex;
  if (device < 0 || device >= 64)
    throw std::runtime_error(std::string("svel::") + op + ": more than 64 devices");
  const std::lock_guard<std::mutex> lock(mutex);
  DeviceLimits& limits = known[device];
  if (limits.sm_count == 0) {
    const auto read = [&](cudaDeviceAttr attribute) {
      int value = 0;
      check_cuda(op, cudaDeviceGetAttribute(&value, attribute, device));
      return value;
    };
    limits.smem_limit = read(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    limits.cc = 10 * read(cudaDevAttrComputeCapabilityMajor) + read(cudaDevAttrComputeCapabilityMinor);
    limits.bandwidth = 2e3 * read(cudaDevAttrMemoryClockRate) * read(cudaDevAttrGlobalMemoryBusWidth) / 8;
    limits.sm_count = read(cudaDevAttrMultiProcessorCount);
  }
  return limits;
}

}  // namespace svel::cuda
