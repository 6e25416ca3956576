#include "stable_target/bulk_launch.cuh"

namespace svel::cuda {

template <>
bool launch_bulk<__half>(const BulkLaunch& launch) {
  const Launch at{launch};
  return at.run_if<__half, 128, 8, 4, 2, 3>() || at.run_if<__half, 256, 8, 4, 2, 2>() ||
         at.run_if<__half, 512, 8, 4, 2, 1>() || at.run_if<__half, 512, 16, 2, 1, 1>() ||
         at.run_if<__half, 512, 16, 4, 1, 1, true>();
}

}  // namespace svel::cuda
