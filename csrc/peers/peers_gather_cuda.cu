// svel::peers_gather_: every process writes its rows into the mailboxes of all, in one launch, which is done
// when the rows of all are here. Bytes: the rows read once and written once to each process.
#include <vector>

#include "common/peers.cuh"

namespace svel::cuda {
namespace {

constexpr const char* OP = "peers_gather_";
constexpr int THREADS = 256;
constexpr int UNROLL = 4;
constexpr int MAX_TENSORS = 4;

struct Given {
  const char* from;  // rows of this process
  int64_t bytes;
  int64_t at;  // where they begin in a mailbox
  int unit;    // bytes that go at once: 16, 8, 4 or 2
  bool stays;  // they go to the own mailbox alone
};

struct Gather {
  Given given[MAX_TENSORS];
  int tensors;
  Peers peers;
};

template <typename Word>
__device__ void put(const Given& g, const Peers& peers, char* const* base) {
  const Word* const from = reinterpret_cast<const Word*>(g.from);
  const int64_t units = g.bytes / static_cast<int64_t>(sizeof(Word)),
                threads = static_cast<int64_t>(gridDim.x) * THREADS;
  const int first = g.stays ? peers.part : 0, end = g.stays ? peers.part + 1 : peers.parts;
  int64_t u = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  for (; u + (UNROLL - 1) * threads < units; u += UNROLL * threads) {  // several loads under way
    Word v[UNROLL];
#pragma unroll
    for (int k = 0; k < UNROLL; ++k) v[k] = from[u + k * threads];
    for (int q = first; q < end; ++q) {
#pragma unroll
      for (int k = 0; k < UNROLL; ++k) reinterpret_cast<Word*>(base[q] + g.at)[u + k * threads] = v[k];
    }
  }
  for (; u < units; u += threads) {
    const Word v = from[u];
    for (int q = first; q < end; ++q) reinterpret_cast<Word*>(base[q] + g.at)[u] = v;
  }
}

__global__ void __launch_bounds__(THREADS) gather_kernel(const __grid_constant__ Gather gather) {
  const Peers& peers = gather.peers;
  __shared__ char* base[MAX_PEERS];
  __shared__ bool last;
  Header* const own = peers.header(peers.part);
  const int q = static_cast<int>(threadIdx.x);
  const unsigned round = own->round + 1;  // the last block to end moves it on
  if (q < peers.parts) base[q] = peers.mailbox(q);
  __syncthreads();
  for (int i = 0; i < gather.tensors; ++i) {
    const Given& g = gather.given[i];
    if (g.unit == 16) {
      put<uint4>(g, peers, base);
    } else if (g.unit == 8) {
      put<uint64_t>(g, peers, base);
    } else if (g.unit == 4) {
      put<uint32_t>(g, peers, base);
    } else {
      put<uint16_t>(g, peers, base);
    }
  }
  if (!is_last_block(own, &last)) return;
  if (q < peers.parts) {
    raise_flag(&peers.header(q)->arrived[peers.part], round);
    await_flag(&own->arrived[q], round, peers, q);
  }
  __syncthreads();
  if (threadIdx.x == 0) own->round = round;
}

constexpr int WORD_THREADS = 1024;
constexpr int64_t MOST_WORDS = 16 * WORD_THREADS;  // of all processes: else they would take longer than flags

// One block: each 32 bits travel with the number of the round, and are then put where they belong. No fence,
// and no flag behind it.
__global__ void __launch_bounds__(WORD_THREADS)
    words_kernel(const __grid_constant__ Gather gather, int64_t words) {
  const Peers& peers = gather.peers;
  Header* const own = peers.header(peers.part);
  const unsigned round = own->round + 1;
  const auto area = [&](int q) { return reinterpret_cast<uint64_t*>(peers.mailbox(q) + words); };
  int64_t before = 0;
  for (int i = 0; i < gather.tensors; ++i) {
    const int64_t units = gather.given[i].bytes / 4;
    for (int64_t u = threadIdx.x; u < units; u += WORD_THREADS) {
      const uint64_t word =
          uint64_t{round} << 32 | reinterpret_cast<const uint32_t*>(gather.given[i].from)[u];
      for (int q = 0; q < peers.parts; ++q)
        store_word(area(q) + (before + u) * peers.parts + peers.part, word);
    }
    before += units;
  }
  before = 0;
  for (int i = 0; i < gather.tensors; ++i) {
    const Given& g = gather.given[i];
    const int64_t units = g.bytes / 4;
    auto* const to = reinterpret_cast<uint32_t*>(peers.mailbox(peers.part) + g.at - peers.part * g.bytes);
    for (int64_t v = threadIdx.x; v < units * peers.parts; v += WORD_THREADS) {
      const int q = static_cast<int>(v % peers.parts);
      uint64_t word;
      await(
          [&] {
            word = load_word(area(peers.part) + before * peers.parts + v);
            return static_cast<unsigned>(word >> 32) == round;
          },
          peers, q);
      to[q * units + v / peers.parts] = static_cast<uint32_t>(word);
    }
    before += units;
  }
  __syncthreads();
  if (threadIdx.x == 0) own->round = round;
}

}  // namespace

void peers_gather_(const Tensor& mailboxes, int64_t part, double seconds, const MaybeTensor& a,
                   const MaybeTensor& b, const MaybeTensor& c, const MaybeTensor& x, bool stays,
                   std::optional<int64_t> words) {
  const torch::stable::accelerator::DeviceGuard guard(mailboxes.get_device_index());
  Gather gather{};
  gather.peers = peers_of(OP, mailboxes, part, seconds);
  std::vector<Tensor> kept;
  int64_t at = HEADER_BYTES, most = 0, units = 0;
  bool whole = words.has_value();  // words
  for (const MaybeTensor* t : {&a, &b, &c, &x}) {
    if (!*t) continue;
    kept.push_back(packed(**t));
    const Tensor& rows = kept.back();
    const int size = rows.scalar_type() == ScalarType::Long ? 8 : size_of(array_of(rows).dtype);
    Given& g = gather.given[gather.tensors++];
    g.from = static_cast<const char*>(rows.const_data_ptr());
    g.bytes = product(shape_of(rows)) * size;
    g.at = at + part * g.bytes;
    g.unit = is_aligned(g.from) && g.bytes % 16 == 0 ? 16 : size;
    g.stays = t == &x && stays;
    most = std::max(most, g.bytes / g.unit);
    units += g.bytes / 4 * gather.peers.parts, whole = whole && g.bytes % 4 == 0 && g.unit >= 4;
    at += (g.bytes * gather.peers.parts + 255) / 256 * 256;
  }
  if (whole && units > 0 && units <= MOST_WORDS) {
    words_kernel<<<1, WORD_THREADS, 0, current_stream(mailboxes)>>>(gather, *words);
    return check_launch(OP);
  }
  const int64_t wanted = (most + THREADS * UNROLL - 1) / (THREADS * UNROLL);
  const int sms = device_limits(OP, mailboxes.get_device_index()).sm_count;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(std::max<int64_t>(wanted, 1), 2 * sms));
  gather_kernel<<<blocks, THREADS, 0, current_stream(mailboxes)>>>(gather);
  check_launch(OP);
}

}  // namespace svel::cuda
