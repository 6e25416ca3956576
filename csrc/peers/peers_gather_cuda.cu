// svel::peers_gather_: every process writes its rows into the mailboxes of all, in one launch, which is done
// when the rows of all are here. Bytes: the rows read once and written once to each process.
#include "common/gather.cuh"

namespace svel::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int WORD_THREADS = 1024;

__global__ void __launch_bounds__(THREADS) gather_kernel(const __grid_constant__ Gather gather) {
  const Peers& peers = gather.peers;
  __shared__ bool last;
  Header* const own = peers.header(peers.part);
  const int q = static_cast<int>(threadIdx.x);
  const unsigned round = own->round + 1;  // the last block to end moves it on
  for (int i = 0; i < gather.tensors; ++i)
    put(gather.given[i], peers, static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x,
        static_cast<int64_t>(gridDim.x) * THREADS);
  if (!is_last_block(own, gridDim.x, &last)) return;
  if (q < peers.parts) {
    raise_flag(&peers.header(q)->arrived[peers.part], round);
    await_flag(&own->arrived[q], round, peers, q);
  }
  __syncthreads();
  if (threadIdx.x == 0) own->round = round;
}

// One block.
__global__ void __launch_bounds__(WORD_THREADS) words_kernel(const __grid_constant__ Gather gather) {
  Header* const own = gather.peers.header(gather.peers.part);
  const unsigned round = own->round + 1;
  send_words(gather, round);
  take_words(gather, round);
  __syncthreads();
  if (threadIdx.x == 0) own->round = round;
}

}  // namespace

GatherRows::GatherRows(const Peers& peers, const MaybeTensor& a, const MaybeTensor& b, const MaybeTensor& c,
                       const MaybeTensor& x, bool stays, std::optional<int64_t> words) {
  gather.peers = peers;
  gather.by_words = words.has_value();
  gather.words = words.value_or(0);
  int64_t at = HEADER_BYTES, units = 0;
  for (const MaybeTensor* t : {&a, &b, &c, &x}) {
    if (!*t) continue;
    kept.push_back(packed(**t));
    const Tensor& rows = kept.back();
    const int size = rows.scalar_type() == ScalarType::Long ? 8 : size_of(array_of(rows).dtype);
    Given& g = gather.given[gather.tensors++];
    g.from = static_cast<const char*>(rows.const_data_ptr());
    g.bytes = product(shape_of(rows)) * size;
    g.at = at + peers.part * g.bytes;
    g.unit = is_aligned(g.from) && g.bytes % 16 == 0 ? 16 : size;
    g.stays = t == &x && stays;
    if (!g.stays) {
      units += g.bytes / 4 * peers.parts;
      gather.by_words = gather.by_words && g.bytes % 4 == 0 && g.unit >= 4;
    }
    at += (g.bytes * peers.parts + 255) / 256 * 256;
  }
  gather.by_words = gather.by_words && units > 0 && units <= Gather::MOST_WORDS;
}

void run_gather(const char* op, const Gather& gather, int device, cudaStream_t stream) {
  int64_t most = 0;
  bool stays = false;
  for (int i = 0; i < gather.tensors; ++i) {
    const Given& g = gather.given[i];
    most = std::max(most, g.bytes / g.unit);
    stays = stays || g.stays;
  }
  if (gather.by_words && !stays) {
    words_kernel<<<1, WORD_THREADS, 0, stream>>>(gather);
    return check_launch(op);
  }
  const int64_t wanted = (most + THREADS * GATHER_UNROLL - 1) / (THREADS * GATHER_UNROLL);
  const int sms = device_limits(op, device).sm_count;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(std::max<int64_t>(wanted, 1), 2 * sms));
  gather_kernel<<<blocks, THREADS, 0, stream>>>(gather);
  check_launch(op);
}

void peers_gather_(const Tensor& own, const Tensor& mailboxes, int64_t part, double seconds,
                   const MaybeTensor& a, const MaybeTensor& b, const MaybeTensor& c, const MaybeTensor& x,
                   bool stays, std::optional<int64_t> words) {
  const char* const op = "peers_gather_";
  const int device = own.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const GatherRows rows(peers_of(op, mailboxes, part, seconds), a, b, c, x, stays, words);
  run_gather(op, rows.gather, device, current_stream(own));
}

}  // namespace svel::cuda
