#include "stable_target/bulk_launch.cuh"

namespace svel::cuda {

template <>
bool launch_bulk<__nv_bfloat16>(const BulkLaunch& launch) {
  const Launch at{launch};
  return at.run_if<__nv_bfloat16, 128, 8, 4, 2, 3>() || at.run_if<__nv_bfloat16, 256, 8, 4, 2, 2>() ||
         at.run_if<__nv_bfloat16, 512, 8, 4, 2, 1>() || at.run_if<__nv_bfloat16, 512, 16, 2, 1, 1>() ||
         at.run_if<__nv_bfloat16, 512, 16, 4, 1, 1, true>();
}

}  // namespace svel::cuda
