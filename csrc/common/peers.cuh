// Mailboxes of the processes of one host, in memory that each of their GPUs reads and writes (NVLink): how
// they tell one another how far they are. No process waits on the host.
//
// A mailbox serves one kind of exchange and begins with its Header, zero at first; what is exchanged follows.
// Every process makes the same calls on it in the same order, each gather or meeting being a round. Flags
// hold the number of the last round, so nothing is reset, and a captured call can be replayed among others.
#pragma once

#include <cstdint>
#include <cstdio>

#include "common/ops.h"
#include "common/tensors.cuh"

namespace svel::cuda {

constexpr int MAX_PEERS = 32;
constexpr int64_t HEADER_BYTES = 512;

struct Header {
  unsigned ready[MAX_PEERS];    // by process: it has read what the rounds before brought
  unsigned arrived[MAX_PEERS];  // its rows are here
  unsigned done[MAX_PEERS];     // its results can be read
  unsigned round;               // rounds that are over here
  unsigned blocks;              // of a kernel that are through with their part of a round
};
static_assert(sizeof(Header) <= HEADER_BYTES);

struct Peers {
  const int64_t* mailboxes;  // (parts,) addresses, the own one among them
  int part, parts;
  uint64_t patience;  // nanoseconds; a process that waits longer ends the kernel with an error

  __device__ char* mailbox(int q) const { return reinterpret_cast<char*>(mailboxes[q]); }
  __device__ Header* header(int q) const { return reinterpret_cast<Header*>(mailbox(q)); }
};

inline Peers peers_of(const Tensor& mailboxes, int64_t part, double seconds) {
  return {static_cast<const int64_t*>(mailboxes.const_data_ptr()), static_cast<int>(part),
          static_cast<int>(mailboxes.size(0)), static_cast<uint64_t>(seconds * 1e9)};
}

__device__ inline uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

// What this thread has seen written, by itself or others, is visible to the GPU that reads the flag.
__device__ inline void raise_flag(unsigned* flag, unsigned round) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(round) : "memory");
}

__device__ inline void await_flag(const unsigned* flag, unsigned round, const Peers& peers, int of) {
  const uint64_t begin = nanoseconds();
  while (true) {
    unsigned seen;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
    if (static_cast<int>(seen - round) >= 0) return;
    if (nanoseconds() - begin > peers.patience) {
      printf(
          "ShardedReferenceBank: expected all %d processes of the group to take part in a step; process %d "
          "waited for process %d, which has ended, or did not answer within the group's timeout\n",
          peers.parts, peers.part, of);
      __trap();
    }
  }
}

// Nobody goes on before all are here; the first block tells the others. Threads q < parts of every block.
__device__ inline void await_all_here(const Peers& peers, int q, unsigned round) {
  if (blockIdx.x == 0) raise_flag(&peers.header(q)->ready[peers.part], round);
  await_flag(&peers.header(peers.part)->ready[q], round, peers, q);
}

// Whether all other blocks have come here; the whole block, with `last` in shared memory. sent: what they
// wrote to other GPUs is there.
__device__ inline bool is_last_block(Header* own, bool sent, bool* last) {
  __syncthreads();
  if (threadIdx.x == 0) {
    if (sent) __threadfence_system();
    *last = atomicAdd(&own->blocks, 1) == gridDim.x - 1;
    if (*last) own->blocks = 0;
    __threadfence();
  }
  __syncthreads();
  return *last;
}

}  // namespace svel::cuda
