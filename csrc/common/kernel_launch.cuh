// Launches: at the least cost to the host, for ops that a sampler calls at every step, and overlapping ones.
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
  const void* const symbol = reinterpret_cast<const void*>(kernel);
  static std::array<std::atomic<cudaFunction_t>, 16> known;
  if (device < static_cast<int>(known.size()) && driver_launch()) {
    cudaFunction_t function = known[device].load(std::memory_order_acquire);
    if (!function) {
      if (cudaGetFuncBySymbol(&function, symbol) != cudaSuccess) {
        function = nullptr;
        cudaGetLastError();  // forgets it
      }
      known[device].store(function, std::memory_order_release);
    }
    if (function && driver_launch()(function, grid.x, grid.y, grid.z, threads, 1, 1, 0, stream, args,
                                    nullptr) == CUDA_SUCCESS)
      return;
    // Otherwise the thread has no context yet, which the runtime mends, or the runtime has words for it.
  }
  check_cuda(op, cudaLaunchKernel(symbol, grid, dim3(threads), args, 0, stream));
}

// A launch that may overlap with that of the kernel before it on the stream, one of ours, for which it then
// waits itself (programmatic dependent launch); not so where `follows` is false.
template <typename... Params, typename... Args>
void launch_following(const char* op, bool follows, void (*kernel)(Params...), dim3 grid, int threads,
                      int64_t bytes, cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute overlaps{};
  overlaps.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlaps.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = &overlaps;
  config.numAttrs = follows ? 1 : 0;
  check_cuda(op, cudaLaunchKernelEx(&config, kernel, args...));
}

// A launch whose blocks wait for one another: all run at once, or it is an error.
template <typename... Params, typename... Args>
void launch_together(const char* op, void (*kernel)(Params...), int64_t blocks, int threads, int64_t bytes,
                     cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = &together;
  config.numAttrs = 1;
  check_cuda(op, cudaLaunchKernelEx(&config, kernel, args...));
}

}  // namespace svel::cuda
