// A launch at the least cost to the host, for ops that a sampler calls at every step.
#pragma once

#include <cuda.h>

#include <array>
#include <atomic>

#include "common/device.cuh"

namespace svel::cuda {

using LaunchKernel = decltype(&cuLaunchKernel);

// The driver's own launch: the library does not link against the driver. Null where there is none.
inline LaunchKernel driver_launch() {
  static const LaunchKernel found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuLaunchKernel", &function, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuLaunchKernel", &function, cudaEnableDefault, &result);
#endif
    const bool there = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return there ? reinterpret_cast<LaunchKernel>(function) : nullptr;
  }();
  return found;
}

// Launches kernel(params) on `device`, which is the current one. The runtime's launch looks the kernel up at
// every call; here the driver's handle of it is kept for each device.
template <auto kernel, typename Params>
void launch_kernel(const char* op, dim3 grid, unsigned threads, const Params& params, int device,
                   cudaStream_t stream) {
  void* args[] = {const_cast<Params*>(&params)};
  static std::array<std::atomic<cudaFunction_t>, 16> known;
  if (device < static_cast<int>(known.size()) && driver_launch()) {
    std::atomic<cudaFunction_t>& function = known[device];
    if (!function) {
      cudaFunction_t found = nullptr;
      check_cuda(op, cudaGetFuncBySymbol(&found, reinterpret_cast<const void*>(kernel)));
      function = found;
    }
    const CUresult result = driver_launch()(function.load(std::memory_order_relaxed), grid.x, grid.y, grid.z,
                                            threads, 1, 1, 0, stream, args, nullptr);
    if (result == CUDA_SUCCESS) return;
    // Otherwise the thread has no context yet, which the runtime mends, or the runtime has words for it.
  }
  check_cuda(op,
             cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(threads), args, 0, stream));
}

}  // namespace svel::cuda
