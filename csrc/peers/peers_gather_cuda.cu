// svel::peers_gather_: every process writes its rows into the mailboxes of all, in one launch. Bytes: the
// rows read once and written once to each process. Done when the rows of all are here.
#include <vector>

#include "common/peers.cuh"

namespace svel::cuda {
namespace {

constexpr const char* OP = "peers_gather_";
constexpr int THREADS = 256;
constexpr int UNROLL = 4;
constexpr int MAX_TENSORS = 4;

struct Given {
  Array from;        // rows of this process
  Dtype to;          // as they are stored
  int64_t elements;  // of this process
  int64_t at;        // where the rows of process 0 begin in a mailbox
  int64_t unit;      // elements that go at once
  bool same;         // no conversion: unit * size bytes are 16, or 2, 4 or 8
};

struct Gather {
  Given given[MAX_TENSORS];
  int tensors;
  bool ready;  // see the op's page
  Peers peers;
};

__device__ void put(const Given& g, int64_t u, const Peers& peers, char* const* base) {
  const int64_t e = u * g.unit;
  const int size = size_of(g.to);
  const int64_t to = g.at + (peers.part * g.elements + e) * size;
  if (g.same) {
    const char* from = static_cast<const char*>(g.from.data) + e * size;
    if (g.unit * size == 16) {
      const uint4 v = *reinterpret_cast<const uint4*>(from);
      for (int q = 0; q < peers.parts; ++q) *reinterpret_cast<uint4*>(base[q] + to) = v;
    } else if (size == 8) {
      const uint64_t v = *reinterpret_cast<const uint64_t*>(from);
      for (int q = 0; q < peers.parts; ++q) *reinterpret_cast<uint64_t*>(base[q] + to) = v;
    } else if (size == 4) {
      const uint32_t v = *reinterpret_cast<const uint32_t*>(from);
      for (int q = 0; q < peers.parts; ++q) *reinterpret_cast<uint32_t*>(base[q] + to) = v;
    } else {
      const uint16_t v = *reinterpret_cast<const uint16_t*>(from);
      for (int q = 0; q < peers.parts; ++q) *reinterpret_cast<uint16_t*>(base[q] + to) = v;
    }
  } else if (g.unit == 8) {
    float v[8];
    load8<float>(g.from, e, v);
    for (int q = 0; q < peers.parts; ++q) store8<float>({base[q] + to, g.to}, 0, v);
  } else {
    const double v = load_as<double>(g.from, e);
    for (int q = 0; q < peers.parts; ++q) store_as({base[q] + to, g.to}, 0, v);
  }
}

__global__ void __launch_bounds__(THREADS) gather_kernel(const Gather gather) {
  const Peers& peers = gather.peers;
  __shared__ char* base[MAX_PEERS];
  __shared__ bool last;
  Header* const own = peers.header(peers.part);
  const int q = static_cast<int>(threadIdx.x);
  const unsigned round = own->round + 1;  // the last block to end moves it on
  if (q < peers.parts) {
    base[q] = peers.mailbox(q);
    if (gather.ready) await_all_here(peers, q, round);
  }
  __syncthreads();
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x,
                threads = static_cast<int64_t>(gridDim.x) * THREADS;
  for (int i = 0; i < gather.tensors; ++i) {
    const Given& g = gather.given[i];
    const int64_t units = g.elements / g.unit;
    int64_t u = thread;
    if (g.same && g.unit * size_of(g.to) == 16) {  // several loads under way
      const uint4* const from = static_cast<const uint4*>(g.from.data);
      const int64_t to = g.at + peers.part * g.elements * size_of(g.to);
      for (; u + (UNROLL - 1) * threads < units; u += UNROLL * threads) {
        uint4 v[UNROLL];
#pragma unroll
        for (int k = 0; k < UNROLL; ++k) v[k] = from[u + k * threads];
        for (int p = 0; p < peers.parts; ++p) {
#pragma unroll
          for (int k = 0; k < UNROLL; ++k)
            *reinterpret_cast<uint4*>(base[p] + to + 16 * (u + k * threads)) = v[k];
        }
      }
    }
    for (; u < units; u += threads) put(g, u, peers, base);
  }
  if (!is_last_block(own, true, &last)) return;
  if (q < peers.parts) {
    raise_flag(&peers.header(q)->arrived[peers.part], round);
    await_flag(&own->arrived[q], round, peers, q);
  }
  __syncthreads();
  if (threadIdx.x == 0) own->round = round;
}

Dtype dtype_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::Long ? Dtype::f64 : array_of(t).dtype;  // moved as they are
}

}  // namespace

void peers_gather_(const Tensor& mailboxes, int64_t part, double seconds, bool ready, const Tensor& like,
                   const MaybeTensor& a, const MaybeTensor& b, const MaybeTensor& c, const MaybeTensor& d) {
  const torch::stable::accelerator::DeviceGuard guard(mailboxes.get_device_index());
  Gather gather{};
  gather.peers = peers_of(mailboxes, part, seconds);
  gather.ready = ready;
  if (gather.peers.parts > MAX_PEERS)
    fail(OP, "mailboxes", "at most " + std::to_string(MAX_PEERS), std::to_string(gather.peers.parts));
  std::vector<Tensor> kept;
  int64_t at = HEADER_BYTES, most = 0;
  const Dtype first = array_of(like).dtype;
  for (const MaybeTensor* t : {&a, &b, &c, &d}) {
    if (!*t) continue;
    kept.push_back(packed(**t));
    Given& g = gather.given[gather.tensors];
    g.from = {const_cast<void*>(kept.back().const_data_ptr()), dtype_of(kept.back())};
    g.to = gather.tensors == 0 ? first : g.from.dtype;
    g.elements = product(shape_of(kept.back()));
    g.at = at;
    g.same = g.from.dtype == g.to;
    const int vector = g.same ? 16 / size_of(g.to) : 8;
    const bool fits = is_aligned(g.from.data) && g.elements % vector == 0 &&
                      (g.same || (g.from.dtype != Dtype::f64 && g.to != Dtype::f64));
    g.unit = fits ? vector : 1;
    most = std::max(most, g.elements / g.unit);
    at += (g.elements * gather.peers.parts * size_of(g.to) + 255) / 256 * 256;
    ++gather.tensors;
  }
  const int64_t wanted = (most + THREADS * UNROLL - 1) / (THREADS * UNROLL);
  const int sms = device_limits(OP, mailboxes.get_device_index()).sm_count;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(std::max<int64_t>(wanted, 1), 2 * sms));
  gather_kernel<<<blocks, THREADS, 0, current_stream(mailboxes)>>>(gather);
  check_launch(OP);
}

}  // namespace svel::cuda
