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

struct Waiting {
  int part, parts;
  uint64_t patience;  // nanoseconds; a process that waits longer ends the kernel with an error
};

struct Peers : Waiting {
  Addresses mailboxes;  // the own one among them

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
  return {{static_cast<int>(part), static_cast<int>(mailboxes.size(0)), static_cast<uint64_t>(seconds * 1e9)},
          addresses_of(op, "mailboxes", mailboxes)};
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
// The same behind a fence.
__device__ inline void store_flag(unsigned* flag, unsigned round) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(round) : "memory");
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
__device__ inline void await(const There& there, const Waiting& waiting, int of) {
  const uint64_t begin = nanoseconds();
  while (!there()) {
    if (nanoseconds() - begin > waiting.patience) {
      printf(
          "ShardedReferenceBank: expected all %d processes of the group to take part in a step; process %d "
          "waited for process %d, which has ended, or did not answer within the group's timeout\n",
          waiting.parts, waiting.part, of);
      __trap();
    }
  }
}
__device__ inline void await_flag(const unsigned* flag, unsigned round, const Waiting& waiting, int of) {
  const auto there = [&] {
    unsigned seen;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
    return static_cast<int>(seen - round) >= 0;
  };
  await(there, waiting, of);
}

// A piece of a row's result by one part, told to the process whose row it is when it is there: the row's
// log-sum-exp in two words, each with the number of the round. No other flag, so rows can be merged while
// others are under way. `at`: bytes into a mailbox, with room for ROW_PIECES of each of all processes' rows.
constexpr int ROW_PIECES = 4;
__device__ inline uint64_t* words_of_piece(char* mailbox, int64_t at, int64_t part, int64_t rows_each,
                                           int64_t row, int64_t piece) {
  return reinterpret_cast<uint64_t*>(mailbox + at) + 2 * ((part * rows_each + row) * ROW_PIECES + piece);
}
__device__ inline void tell(uint64_t* words, unsigned round, double lse) {
  const uint64_t by = uint64_t{round} << 32, bits = static_cast<uint64_t>(__double_as_longlong(lse));
  store_word(words, by | bits >> 32);
  store_word(words + 1, by | (bits & 0xffffffffu));
}
__device__ inline double hear(const uint64_t* words, unsigned round, const Waiting& waiting, int of) {
  uint64_t high, low;
  await(
      [&] {
        high = load_word(words), low = load_word(words + 1);
        return static_cast<unsigned>(high >> 32) == round && static_cast<unsigned>(low >> 32) == round;
      },
      waiting, of);
  return __longlong_as_double(static_cast<int64_t>(high << 32 | (low & 0xffffffffu)));
}

// Whether this is the last of so many blocks to come here; it tells all processes, by a flag of their
// headers, that what the blocks wrote is there. The whole block, with `last` in shared memory.
__device__ inline bool last_block_raises(unsigned (Header::*flags)[MAX_PEERS], unsigned round,
                                         const Peers& peers, unsigned blocks, bool* last) {
  __syncthreads();
  if (threadIdx.x == 0) {
    Header* const own = peers.header(peers.part);
    __threadfence_system();
    *last = atomicAdd(&own->blocks, 1) == blocks - 1;
    if (*last) {
      own->blocks = 0;
      __threadfence_system();
      for (int q = 0; q < peers.parts; ++q) store_flag((peers.header(q)->*flags) + peers.part, round);
    }
  }
  __syncthreads();
  return *last;
}

// Of a kernel all of whose blocks wait: up to 1,024 threads on a multiprocessor, which leaves room there for
// kernels of other streams, those that the processes which are waited for may themselves be waiting for.
inline int64_t most_waiting_blocks(const char* op, const Tensor& t) {
  return int64_t{4} * device_limits(op, t.get_device_index()).sm_count;
}

}  // namespace svel::cuda
