#include "stable_target/bulk_launch.cuh"

namespace svel::cuda {

template <>
bool launch_bulk<__nv_bfloat16>(const BulkLaunch& launch) {
  const Launch at{launch};
  return at.run_if<__nv_bfloat16, 128, 8, 4, 1, 3>() || at.run_if<__nv_bfloat16, 128, 16, 4, 1, 2>() ||
         at.run_if<__nv_bfloat16, 128, 32, 2, 1, 2>() || at.run_if<__nv_bfloat16, 256, 32, 2, 1, 1>() ||
         at.run_if<__nv_bfloat16, 256, 32, 4, 1, 1, true>();
}

}  // namespace svel::cuda
