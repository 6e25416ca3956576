// What Hopper adds, each as a function of a line: barriers in shared memory that count bytes, bulk copies
// that arrive on them, dependent launches. On earlier architectures the bodies are empty; the planner sends
// nothing there. (PTX ISA: mbarrier, cp.async.bulk, griddepcontrol.)
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace svel {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define SVEL_HOPPER_ASM(...) asm volatile(__VA_ARGS__)
#else
#define SVEL_HOPPER_ASM(...)
#endif

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The kernel launched next may start now; it waits for this one before it reads what this one writes.
__device__ inline void allow_next_launch() {
  SVEL_HOPPER_ASM("griddepcontrol.launch_dependents;" :: : "memory");
}
__device__ inline void wait_for_previous_launch() {
  SVEL_HOPPER_ASM("griddepcontrol.wait;" :: : "memory");
}

using Barrier = uint64_t;  // in shared memory

__device__ inline void init_barrier(Barrier* barrier, int arrivals) {
  SVEL_HOPPER_ASM("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                  "r"(arrivals) : "memory");
}
// After the inits: the copy engine and the other blocks of the cluster see them too.
__device__ inline void publish_barriers() {
  SVEL_HOPPER_ASM("fence.mbarrier_init.release.cluster;" :: : "memory");
}

__device__ inline void arrive(Barrier* barrier) {
  SVEL_HOPPER_ASM("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and the phase ends only after so many bytes more.
__device__ inline void arrive_expecting(Barrier* barrier, uint32_t bytes) {
  SVEL_HOPPER_ASM("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                  "r"(bytes) : "memory");
}
// Until the phase of this parity has ended; that before the first has parity 1.
__device__ inline void wait_barrier(Barrier* barrier, uint32_t parity) {
  SVEL_HOPPER_ASM(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity) : "memory");
}

// `bytes`, a multiple of 16, both ends aligned to 16 bytes; arrives on `barrier`.
__device__ inline void bulk_copy(void* shared, const void* global, uint32_t bytes, Barrier* barrier) {
  SVEL_HOPPER_ASM(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}

// Brings `bytes`, a multiple of 16 from an address aligned to 16 bytes, to the L2.
__device__ inline void prefetch_bulk(const void* global, uint32_t bytes) {
  SVEL_HOPPER_ASM("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}

// All threads of all blocks of the cluster.
__device__ inline void synchronize_cluster() {
  SVEL_HOPPER_ASM("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" :: : "memory");
}

// `value` to where block `peer` of the cluster has `shared`, arriving with 4 bytes on its `barrier`.
__device__ inline void store_in_cluster(float* shared, Barrier* barrier, int peer, float value) {
  SVEL_HOPPER_ASM(
      "{\n"
      ".reg .b32 to, at;\n"
      "mapa.shared::cluster.u32 to, %0, %2;\n"
      "mapa.shared::cluster.u32 at, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [to], %3, [at];\n"
      "}" ::"r"(shared_address(shared)),
      "r"(shared_address(barrier)), "r"(peer), "f"(value) : "memory");
}

// Among `threads` threads of the block, a multiple of 32, that name the same barrier, 1 to 15.
__device__ inline void named_barrier(int name, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

}  // namespace svel
