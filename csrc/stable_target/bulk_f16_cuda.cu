#include "stable_target/bulk_launch.cuh"

namespace svel::cuda {

template <>
bool launch_bulk<__half>(const BulkLaunch& launch) {
  return launch_tiles<__half>(launch);
}

}  // namespace svel::cuda
