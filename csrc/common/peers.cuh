// Mailboxes of the processes of one host, in memory that each of their GPUs reads and writes (NVLink): how
// they tell one another how far they are. No process waits on the host.
//
// A mailbox serves one kind of exchange and begins with its Header, zero at first; what is exchanged follows.
// Every process makes the same calls on it in the same order. A round begins with the kernel in which they
// meet (`arrived`) and ends with another on the same stream (`done`). Flags hold the number of the last
// round, so nothing is reset, and a captured call can be replayed among others. Nobody's kernel passes a
// meeting before the others' kernels of all earlier calls are over: what those read can then be written
// again.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>

#include "common/addresses.cuh"
#include "common/ops.h"
#include "common/tensors.cuh"

namespace svel::cuda {

constexpr int64_t HEADER_BYTES = 512;

struct Header {
  unsigned arrived[MAX_PEERS];  // by process: what it sends is here
  unsigned done[MAX_PEERS];     // what it wrote since is there
  unsigned round;               // the last one that is over here, or has begun with a gather
  unsigned blocks;              // of a kernel that have come to its end
};
static_assert(sizeof(Header) <= HEADER_BYTES);

struct Peers {
  Addresses mailboxes;  // the own one among them
  int part, parts;
  uint64_t patience;  // nanoseconds; a process that waits longer ends the kernel with an error

  __device__ char* mailbox(int q) const { return mailboxes[q]; }
  __device__ Header* header(int q) const { return reinterpret_cast<Header*>(mailbox(q)); }
};

// Of a tensor (parts,) int64 on the CPU.
inline Addresses addresses_of(const char* op, const char* name, const Tensor& given) {
  if (given.is_cuda()) fail(op, name, "addresses on the CPU", "on a GPU");
  const int64_t parts = given.size(0);
  if (parts > MAX_PEERS) fail(op, name, "at most " + std::to_string(MAX_PEERS), std::to_string(parts));
  Addresses addresses{};
  std::copy_n(static_cast<const int64_t*>(given.const_data_ptr()), parts, addresses.at);
  return addresses;
}

inline Peers peers_of(const char* op, const Tensor& mailboxes, int64_t part, double seconds) {
  return {addresses_of(op, "mailboxes", mailboxes), static_cast<int>(part),
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

// A word that is itself the flag.
__device__ inline void store_word(uint64_t* to, uint64_t word) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
}
__device__ inline uint64_t load_word(const uint64_t* from) {
  uint64_t word;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
  return word;
}

// Until it is `there`, which process `of` sees to.
template <typename There>
__device__ inline void await(const There& there, const Peers& peers, int of) {
  const uint64_t begin = nanoseconds();
  while (!there()) {
    if (nanoseconds() - begin > peers.patience) {
      printf(
          "ShardedReferenceBank: expected all %d processes of the group to take part in a step; process %d "
          "waited for process %d, which has ended, or did not answer within the group's timeout\n",
          peers.parts, peers.part, of);
      __trap();
    }
  }
}
__device__ inline void await_flag(const unsigned* flag, unsigned round, const Peers& peers, int of) {
  const auto there = [&] {
    unsigned seen;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
    return static_cast<int>(seen - round) >= 0;
  };
  await(there, peers, of);
}

// Whether all others of so many blocks have come here, and what they wrote to other GPUs is there. The whole
// block, with `last` in shared memory.
__device__ inline bool is_last_block(Header* own, unsigned blocks, bool* last) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence_system();
    *last = atomicAdd(&own->blocks, 1) == blocks - 1;
    if (*last) own->blocks = 0;
    __threadfence();
  }
  __syncthreads();
  return *last;
}

// The last block of a round tells the others what is over here, waits for theirs where it `waits`, and moves
// the round on. All threads of the grid.
__device__ inline void end_round(const Peers& peers, bool* last, bool waits) {
  Header* const own = peers.header(peers.part);
  if (!is_last_block(own, gridDim.x, last)) return;
  const int q = static_cast<int>(threadIdx.x);
  const unsigned round = own->round + 1;
  if (q < peers.parts) {
    raise_flag(&peers.header(q)->done[peers.part], round);
    if (waits) await_flag(&own->done[q], round, peers, q);
  }
  __syncthreads();
  if (q == 0) own->round = round;
}

// Of a kernel all of whose blocks wait: up to 1,024 threads on a multiprocessor, which leaves room there for
// kernels of other streams, those that the processes which are waited for may themselves be waiting for.
inline int64_t most_waiting_blocks(const char* op, const Tensor& t) {
  return int64_t{4} * device_limits(op, t.get_device_index()).sm_count;
}

}  // namespace svel::cuda
