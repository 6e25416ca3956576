#include "stable_target/bulk_launch.cuh"

namespace svel::cuda {

template <>
bool launch_bulk<__nv_bfloat16>(const BulkLaunch& launch) {
  return launch_tiles<__nv_bfloat16>(launch);
}

}  // namespace svel::cuda
