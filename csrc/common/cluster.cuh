// What the blocks of a cluster do for one another on Hopper: barriers and mail by 32-bit shared addresses (a
// peer's are as good as one's own), copies of tensor tiles, registers that move between warps. (PTX ISA:
// mapa, st.async, cp.async.bulk.tensor, setmaxnreg.) Bodies are empty on earlier architectures, see
// hopper.cuh.
#pragma once

#include <cuda.h>

#include "common/hopper.cuh"

namespace svel {

__device__ inline void init_barrier(uint32_t barrier, int arrivals) {
  SVEL_HOPPER_ASM("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ inline void arrive(uint32_t barrier) {
  SVEL_HOPPER_ASM("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void arrive_expecting(uint32_t barrier, uint32_t bytes) {
  SVEL_HOPPER_ASM("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                  "r"(bytes) : "memory");
}
// For what peers sent as well: it arrives in shared memory, which nothing caches. To acquire at the scope of
// the cluster would empty the L1 too, and to release at that scope waits for all stores before, several
// hundred cycles each time.
__device__ inline void wait_barrier(uint32_t barrier, uint32_t parity) {
  SVEL_HOPPER_ASM(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity) : "memory");
}

// Where block `rank` of the cluster has what lies at `shared` here.
__device__ inline uint32_t peer_address(uint32_t shared, int rank) {
  uint32_t out = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(out) : "r"(shared), "r"(rank));
#endif
  return out;
}

// Between barriers of the cluster.
__device__ inline double load_from_peer(uint32_t from) {
  double v = 0;
  SVEL_HOPPER_ASM("ld.shared::cluster.f64 %0, [%1];" : "=d"(v) : "r"(from) : "memory");
  return v;
}

// Values to an address of the cluster; their bytes arrive on `barrier`, in the same block.
__device__ inline void send(uint32_t to, uint32_t barrier, float a) {
  SVEL_HOPPER_ASM("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to),
                  "f"(a), "r"(barrier) : "memory");
}
__device__ inline void send(uint32_t to, uint32_t barrier, double a) {
  SVEL_HOPPER_ASM("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f64 [%0], %1, [%2];" ::"r"(to),
                  "d"(a), "r"(barrier) : "memory");
}
__device__ inline void send(uint32_t to, uint32_t barrier, float a, float b) {
  SVEL_HOPPER_ASM(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to),
      "f"(a), "f"(b), "r"(barrier) : "memory");
}
__device__ inline void send(uint32_t to, uint32_t barrier, uint4 v) {
  SVEL_HOPPER_ASM(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
          to),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(barrier) : "memory");
}

// On a barrier of any block of the cluster, by its address there.
__device__ inline void arrive_in_cluster(uint32_t barrier) {
  SVEL_HOPPER_ASM("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The same, and what this thread has seen written so far is seen by whoever waits as below.
__device__ inline void arrive_released(uint32_t barrier) {
  SVEL_HOPPER_ASM("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void wait_barrier_acquired(uint32_t barrier, uint32_t parity) {
  SVEL_HOPPER_ASM(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity) : "memory");
}

// The map's box at (row, column) of a matrix; what lies outside becomes zero.
__device__ inline void tensor_copy(uint32_t shared, const CUtensorMap& map, int column, int row,
                                   uint32_t barrier) {
  SVEL_HOPPER_ASM(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], [%4];" ::"r"(shared),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(column), "r"(row), "r"(barrier) : "memory");
}

// The same to this place in every block of the cluster that `blocks` names by its bit; arrives on the barrier
// at this place of each.
__device__ inline void tensor_copy_to_all(uint32_t shared, const CUtensorMap& map, int column, int row,
                                          uint32_t barrier, uint16_t blocks) {
  SVEL_HOPPER_ASM(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(column), "r"(row), "r"(barrier), "h"(blocks) : "memory");
}

}  // namespace svel
