// What Hopper adds, each as a function of a line: barriers in shared memory that count bytes, bulk copies
// that arrive on them, dependent launches. On earlier architectures the bodies are empty; the planner sends
// nothing there. (PTX ISA: mbarrier, cp.async.bulk, griddepcontrol.)
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/device.cuh"

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

// Four 8 x 8 matrices of 16-bit elements from shared memory; lane l names row l % 8 of matrix l / 8.
__device__ inline void load_matrices(const void* row, uint32_t (&v)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += A B, 16 x 8 x 16.
template <typename T>
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (DtypeOf<T>::value == Dtype::f16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else if constexpr (DtypeOf<T>::value == Dtype::bf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// c += A B, 16 x 8 x 8.
template <typename T>
__device__ inline void multiply_add(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  if constexpr (DtypeOf<T>::value == Dtype::f16) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
  } else if constexpr (DtypeOf<T>::value == Dtype::bf16) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, "
        "%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
  }
}

// Eight bytes to and from another block of the grid, whole or not at all.
__device__ inline void post_letter(uint2* to, uint2 letter) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(letter.x), "r"(letter.y)
               : "memory");
}
__device__ inline uint2 read_letter(const uint2* from) {
  uint2 letter;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];"
               : "=r"(letter.x), "=r"(letter.y)
               : "l"(from)
               : "memory");
  return letter;
}

// Among `threads` threads of the block, a multiple of 32, that name the same barrier, 1 to 15.
__device__ inline void named_barrier(int name, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

}  // namespace svel
