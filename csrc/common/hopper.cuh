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

// Of a kernel: so many blocks to a cluster.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define SVEL_CLUSTER(blocks) __cluster_dims__(blocks)
#else
#define SVEL_CLUSTER(blocks)
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

// From here on the threads of this warpgroup (128 threads) have COUNT registers, a multiple of 8. Waits until
// others have given up enough. Needs sm_90a: the generic target keeps what it has.
template <int COUNT>
__device__ inline void take_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}
template <int COUNT>
__device__ inline void give_up_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

__device__ inline uint32_t load_shared(uint32_t shared) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(shared) : "memory");
  return value;
}

__device__ inline uint4 load_shared_16(uint32_t shared) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(shared)
               : "memory");
  return v;
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
__device__ inline void arrive_for(Barrier* barrier, int arrivals) {
  SVEL_HOPPER_ASM("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                  "r"(arrivals) : "memory");
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

// Whether it has ended, without waiting.
__device__ inline bool has_passed(Barrier* barrier, uint32_t parity) {
  int passed = 0;
  SVEL_HOPPER_ASM(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.b32 %0, 1, 0, done;\n"
      "}" : "=r"(passed) : "r"(shared_address(barrier)),
      "r"(parity) : "memory");
  return passed;
}

// For what is read once: it leaves the L2 first, and what others read again stays.
__device__ inline uint64_t read_once_policy() {
  uint64_t policy = 0;
  SVEL_HOPPER_ASM("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ inline uint64_t usual_policy() {
  uint64_t policy = 0;
  SVEL_HOPPER_ASM("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// `bytes`, a multiple of 16, both ends aligned to 16 bytes; arrives on `barrier`.
__device__ inline void bulk_copy(void* shared, const void* global, uint32_t bytes, Barrier* barrier,
                                 uint64_t policy) {
  SVEL_HOPPER_ASM(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
      "[%3], %4;" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier)), "l"(policy) : "memory");
}

// Four bytes to shared memory, or sixteen, aligned to that, without waiting; and until all that this thread
// has begun are there.
__device__ inline void copy_async(float* shared, const float* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(shared)), "l"(global)
               : "memory");
}
__device__ inline void copy_async(float4* shared, const float* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global)
               : "memory");
}
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// Or by groups: what this thread has begun since the last; until all are there but the last PENDING.
__device__ inline void end_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int PENDING>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Brings `bytes`, a multiple of 16 from an address aligned to 16 bytes, to the L2.
__device__ inline void prefetch_bulk(const void* global, uint32_t bytes) {
  SVEL_HOPPER_ASM("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}

// Writes to shared memory so far are seen by copies and products that start afterwards.
__device__ inline void fence_async() {
  SVEL_HOPPER_ASM("fence.proxy.async.shared::cta;" :: : "memory");
}

// Writes to any memory so far, and what others wrote before a barrier, likewise.
__device__ inline void fence_async_all() {
  SVEL_HOPPER_ASM("fence.proxy.async;" :: : "memory");
}

// All threads of all blocks of the cluster.
__device__ inline void synchronize_cluster() {
  SVEL_HOPPER_ASM("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" :: : "memory");
}

// The same, where they only wait for one another: nothing that was written before need be seen after.
__device__ inline void meet_cluster() {
  SVEL_HOPPER_ASM("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" :: : "memory");
}

// The barrier of a cooperative launch, as cooperative_groups has it, in two steps, each by one thread of
// every block: what the blocks' threads wrote before a barrier in their block is there for whoever has
// waited, and for the threads that a barrier joins him with.
__device__ inline unsigned* grid_barrier() {
  unsigned high, low;
  asm("mov.u32 %0, %%envreg1;" : "=r"(high));
  asm("mov.u32 %0, %%envreg2;" : "=r"(low));
  return reinterpret_cast<unsigned*>(uint64_t{high} << 32 | low) + 1;
}
__device__ inline unsigned arrive_in_grid() {
  const unsigned arrivals = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1;  // all: the highest bit
  unsigned before = 0;
  SVEL_HOPPER_ASM("atom.add.release.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(grid_barrier()),
                  "r"(arrivals) : "memory");
  return before;
}
__device__ inline void wait_for_grid(unsigned before) {
  unsigned now = 0x80000000u ^ before;
  do {
    SVEL_HOPPER_ASM("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(grid_barrier()) : "memory");
  } while (((before ^ now) & 0x80000000u) == 0);
}

// Both, by all threads of all blocks.
__device__ inline void meet_grid() {
  __syncthreads();
  if (threadIdx.x == 0) wait_for_grid(arrive_in_grid());
  __syncthreads();
}

// To a counter of arrivals in device memory: what the block's threads wrote before a barrier is there for
// whoever finds a higher number, and for the threads that a barrier joins him with. Returns the number so
// far.
__device__ inline int add_arrival(int* counter) {
  int before = 0;
  SVEL_HOPPER_ASM("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// How many have come, with what they wrote before.
__device__ inline int read_arrivals(const int* counter) {
  int arrivals = 1;
  SVEL_HOPPER_ASM("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(arrivals) : "l"(counter) : "memory");
  return arrivals;
}

// A word of its own instead of a counter: the same holds for whoever reads it with read_arrivals.
__device__ inline void set_arrivals(int* word, int arrivals) {
  SVEL_HOPPER_ASM("st.release.gpu.global.s32 [%0], %1;" ::"l"(word), "r"(arrivals) : "memory");
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
// Two letters side by side.
__device__ inline uint4 read_letters(const uint2* from) {
  uint4 letters;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(letters.x), "=r"(letters.y), "=r"(letters.z), "=r"(letters.w)
               : "l"(from)
               : "memory");
  return letters;
}

// Among `threads` threads of the block, a multiple of 32, that name the same barrier, 1 to 15.
__device__ inline void named_barrier(int name, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}
// The same for those that need not wait.
__device__ inline void named_barrier_arrive(int name, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}
// And whether the answer of any of them is yes.
template <int THREADS>
__device__ inline bool named_barrier_or(int name, bool answer) {
  int any = 0;
  SVEL_HOPPER_ASM(
      "{\n"
      ".reg .pred own, any;\n"
      "setp.ne.s32 own, %1, 0;\n"
      "barrier.cta.red.or.pred any, %2, %3, own;\n"
      "selp.b32 %0, 1, 0, any;\n"
      "}" : "=r"(any) : "r"(static_cast<int>(answer)),
      "r"(name), "n"(THREADS) : "memory");
  return any;
}

}  // namespace svel
