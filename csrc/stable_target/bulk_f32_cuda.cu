#include "stable_target/bulk_launch.cuh"

namespace svel::cuda {

template <>
bool launch_bulk<float>(const BulkLaunch& launch) {
  const Launch at{launch};
  return at.run_if<float, 128, 8, 2, 1, 3>() || at.run_if<float, 128, 16, 2, 1, 2>() ||
         at.run_if<float, 128, 32, 1, 1, 2>() || at.run_if<float, 256, 32, 1, 1, 1>() ||
         at.run_if<float, 256, 32, 2, 1, 1, true>();
}

}  // namespace svel::cuda
