#include "stable_target/bulk_launch.cuh"

namespace svel::cuda {

template <>
bool launch_bulk<float>(const BulkLaunch& launch) {
  const Launch at{launch};
  return at.run_if<float, 128, 8, 2, 2, 3>() || at.run_if<float, 256, 8, 2, 2, 2>() ||
         at.run_if<float, 512, 8, 2, 2, 1>() || at.run_if<float, 512, 16, 1, 1, 1>() ||
         at.run_if<float, 512, 16, 2, 1, 1, true>();
}

}  // namespace svel::cuda
