// What the processes of one host tell one another when a round begins (see peers.cuh): rows of each, written
// into the mailboxes of all.
#pragma once

#include <vector>

#include "common/peers.cuh"

namespace svel::cuda {

struct Given {
  const char* from;  // rows of this process
  int64_t bytes;
  int64_t at;  // where they begin in a mailbox
  int unit;    // bytes that go at once: 16, 8, 4 or 2
  bool stays;  // they go to the own mailbox alone
};

struct Gather {
  static constexpr int MOST = 4;
  static constexpr int64_t MOST_WORDS = 16384;  // of all processes: more would take longer than flags

  Given given[MOST];
  int tensors;
  Peers peers;
  // Where in a mailbox little goes by: each 32 bits travel with the number of the round, and are then put
  // where they belong. No fence, and no flag behind it.
  int64_t words;
  bool by_words;  // all that does not stay
  // The first tensor is float32, and of it NaN goes in place of what is below `least`.
  bool has_least;
  float least;

  __device__ uint64_t* words_of(int q) const { return reinterpret_cast<uint64_t*>(peers.mailbox(q) + words); }
};

// A gather whose rows this keeps; the last tensor, x, may stay. words: see Gather, if there is room for it.
struct GatherRows {
  std::vector<Tensor> kept;
  Gather gather{};

  GatherRows(const Peers& peers, const MaybeTensor& a, const MaybeTensor& b, const MaybeTensor& c,
             const MaybeTensor& x, bool stays, std::optional<int64_t> words);
};

// In a launch of its own, which is over when the rows of all are here.
void run_gather(const char* op, const Gather& gather, int device, cudaStream_t stream);

// Of a thread in a tensor before which there are so many: threads go on where those of the last tensor ended.
__device__ inline int first_unit(int before) {
  const int at = static_cast<int>(threadIdx.x) - before % static_cast<int>(blockDim.x);
  return at < 0 ? at + static_cast<int>(blockDim.x) : at;
}

constexpr uint32_t NAN_BITS = 0x7fffffffu;  // of float32

// The own words to all, and those of all to where they belong; by all threads of one block. Synchronize them
// then.
__device__ inline void send_words(const Gather& gather, unsigned round) {
  const Peers& peers = gather.peers;
  int before = 0;
#pragma unroll 1
  for (int i = 0; i < gather.tensors; ++i) {
    const Given& g = gather.given[i];
    if (g.stays) continue;
    const int units = static_cast<int>(g.bytes / 4);
    // Each thread takes what comes next of all tensors: their ways from memory are not one after the other.
#pragma unroll 1
    for (int u = first_unit(before); u < units; u += blockDim.x) {
      uint32_t value = reinterpret_cast<const uint32_t*>(g.from)[u];
      if (i == 0 && gather.has_least && __uint_as_float(value) < gather.least) value = NAN_BITS;
      const uint64_t word = uint64_t{round} << 32 | value;
#pragma unroll 1
      for (int q = 0; q < peers.parts; ++q)
        store_word(gather.words_of(q) + (before + u) * peers.parts + peers.part, word);
    }
    before += units;
  }
}
__device__ inline void take_words(const Gather& gather, unsigned round) {
  const Peers& peers = gather.peers;
  char* const own = peers.mailbox(peers.part);
  const unsigned parts = peers.parts;
  const uint64_t* from = gather.words_of(peers.part);
  int before = 0;
#pragma unroll 1
  for (int i = 0; i < gather.tensors; ++i) {
    const Given& g = gather.given[i];
    if (g.stays) continue;
    const unsigned units = static_cast<unsigned>(g.bytes / 4);
    auto* const to = reinterpret_cast<uint32_t*>(own + g.at - peers.part * g.bytes);
#pragma unroll 1
    for (unsigned v = first_unit(before); v < units * parts; v += blockDim.x) {
      const unsigned u = v / parts, q = v - u * parts;
      uint64_t word;
      await(
          [&] {
            word = load_word(from + v);
            return static_cast<unsigned>(word >> 32) == round;
          },
          peers, static_cast<int>(q));
      to[q * units + u] = static_cast<uint32_t>(word);
    }
    from += units * parts, before += units * parts;
  }
}

// One tensor to the mailboxes, by blocks of blockDim threads that are together `threads`; `thread` is this
// one's number among them.
constexpr int GATHER_UNROLL = 4;
template <typename Word>
__device__ void put_as(const Given& g, const Peers& peers, int64_t thread, int64_t threads) {
  const Word* const from = reinterpret_cast<const Word*>(g.from);
  const int64_t units = g.bytes / static_cast<int64_t>(sizeof(Word));
  const int first = g.stays ? peers.part : 0, end = g.stays ? peers.part + 1 : peers.parts;
  int64_t u = thread;
  for (; u + (GATHER_UNROLL - 1) * threads < units;
       u += GATHER_UNROLL * threads) {  // several loads under way
    Word v[GATHER_UNROLL];
#pragma unroll
    for (int k = 0; k < GATHER_UNROLL; ++k) v[k] = from[u + k * threads];
    for (int q = first; q < end; ++q) {
      Word* const to = reinterpret_cast<Word*>(peers.mailbox(q) + g.at);
#pragma unroll
      for (int k = 0; k < GATHER_UNROLL; ++k) to[u + k * threads] = v[k];
    }
  }
  for (; u < units; u += threads) {
    const Word v = from[u];
    for (int q = first; q < end; ++q) reinterpret_cast<Word*>(peers.mailbox(q) + g.at)[u] = v;
  }
}
__device__ inline void put(const Given& g, const Peers& peers, int64_t thread, int64_t threads) {
  if (g.unit == 16) {
    put_as<uint4>(g, peers, thread, threads);
  } else if (g.unit == 8) {
    put_as<uint64_t>(g, peers, thread, threads);
  } else if (g.unit == 4) {
    put_as<uint32_t>(g, peers, thread, threads);
  } else {
    put_as<uint16_t>(g, peers, thread, threads);
  }
}

}  // namespace svel::cuda
