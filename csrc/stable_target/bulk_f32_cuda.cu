#include "stable_target/bulk_launch.cuh"

namespace svel::cuda {

template <>
bool launch_bulk<float>(const BulkLaunch& launch) {
  return launch_tiles<float>(launch);
}

}  // namespace svel::cuda
