// svel::bank_push_ on CUDA: slots first, then the copy. Bytes: the values read and the slots written once;
// finding a row's rank reads the labels of its chunk once per row, from the cache. Pushes go in chunks,
// in order.
//
// svel::bank_push_parts_: the same for a bank in parts. Labels go to all processes, each finds the slots of
// all rows, and each row goes straight to where its slot is. All in one chunk: who pushed what is one order.
#include "common/ops.h"
#include "common/peers.cuh"
#include "common/tensors.cuh"

namespace svel::cuda {
namespace {

constexpr const char* OP = "bank_push_";
constexpr int64_t CHUNK = 4096;
constexpr int RANK_THREADS = 256;
constexpr int COPY_THREADS = 256;
constexpr int64_t COPY_ELEMENTS = int64_t{8} * COPY_THREADS;

// The pushes of one chunk. Push i takes value i to its label's ring; with all_to_last there are as many
// again, which take the same values to the last ring.
struct Push {
  Array refs, values;     // (k, m, d), (rows, d); unused when words are copied
  bool words;             // int64: copied as they are
  bool vectors;           // 8 elements at a time are aligned
  const int64_t* labels;  // (rows,) in [0, label_groups)
  void* counts;           // (k,)
  void* heads;            // (k,)
  bool wide;              // counts and heads are int64, else int32
  int64_t rows, label_groups, k, m, d;
  int64_t each, own;  // rows of this process; pushes of these in the chunk
  // In parts: slot s of ring y is with part (s + y) mod parts, as its slot s div parts.
  Peers peers;              // parts = 0: there are none, and refs holds everything
  const int64_t* parts_at;  // (parts,) where each keeps its (k, local, d)
  int64_t local;
  int32_t* local_counts;  // (k,) valid references of this part
  int64_t first, n;       // of the chunk
  int64_t* slots;         // (n,) slot y m + s of ring y, -1: not written
  int64_t* pushed;        // (n,) in the last push of each ring: pushes to that ring in the chunk, else 0
};

// In parts a label travels in one word with the round that it belongs to: it is here when its round is. Two
// areas of (rows,) words take turns, since others may still read what came before.
__device__ uint64_t* words_in(const Push& push, int part) {
  const unsigned round = push.peers.header(push.peers.part)->round + 1;
  return reinterpret_cast<uint64_t*>(push.peers.mailbox(part) + HEADER_BYTES) + round % 2 * push.rows;
}

// Of all rows, when they are here.
struct Labels {
  const int64_t* given;
  const uint64_t* words;  // in parts

  __device__ explicit Labels(const Push& push)
      : given(push.labels), words(push.peers.parts > 0 ? words_in(push, push.peers.part) : nullptr) {}
  __device__ int64_t operator[](int64_t i) const {
    return words ? static_cast<int32_t>(static_cast<uint32_t>(words[i])) : given[i];
  }
  __device__ int64_t ring(const Push& push, int64_t i) const {
    return i < push.rows ? (*this)[i] : push.k - 1;
  }
};

__device__ int64_t read_index(const void* data, bool wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
}

__device__ void write_index(void* data, bool wide, int64_t i, int64_t value) {
  if (wide) {
    static_cast<int64_t*>(data)[i] = value;
  } else {
    static_cast<int32_t*>(data)[i] = static_cast<int32_t>(value);
  }
}

// A head outside [0, m) wraps: nothing is ever written out of bounds.
__device__ int64_t read_head(const Push& push, int64_t label) {
  const int64_t head = read_index(push.heads, push.wide, label) % push.m;
  return head < 0 ? head + push.m : head;
}

// Labels of this process to all; then those of all are here, for each block.
__device__ void exchange_labels(const Push& push) {
  const Peers& peers = push.peers;
  const unsigned round = peers.header(peers.part)->round + 1;
  if (blockIdx.x == 0) {
    for (int64_t i = threadIdx.x; i < push.each; i += blockDim.x) {
      const int64_t label = push.labels[i];
      const auto known = static_cast<uint32_t>(label >= 0 && label < push.label_groups ? label : -1);
      for (int to = 0; to < peers.parts; ++to)
        store_word(words_in(push, to) + peers.part * push.each + i, uint64_t{round} << 32 | known);
    }
  }
  const uint64_t* const words = words_in(push, peers.part);
  for (int64_t i = threadIdx.x; i < push.rows; i += blockDim.x)
    await([&] { return static_cast<unsigned>(load_word(words + i) >> 32) == round; }, peers,
          static_cast<int>(i / push.each));
  __syncthreads();
}

// One warp per push: its rank among those to the same ring, and how many follow it.
__global__ void __launch_bounds__(RANK_THREADS) rank_kernel(const __grid_constant__ Push push) {
  if (push.peers.parts > 0) exchange_labels(push);
  const Labels labels(push);
  const int lane = threadIdx.x % 32;
  const int64_t labelled =
      min(max(push.rows - push.first, int64_t{0}), push.n);  // the others go to the last ring
  const int64_t warps = static_cast<int64_t>(gridDim.x) * RANK_THREADS / 32;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * RANK_THREADS + threadIdx.x) / 32; i < push.n;
       i += warps) {
    const int64_t ring = labels.ring(push, push.first + i);
    const bool known = i >= labelled || (ring >= 0 && ring < push.label_groups);
    int before = 0, after = 0;
    if (i >= labelled) {
      before = static_cast<int>(i - labelled);
      after = static_cast<int>(push.n - 1 - i);
    } else if (known) {
      for (int64_t j = lane; j < labelled; j += 32) {
        const bool same = labels[push.first + j] == ring;
        before += same && j < i;
        after += same && j > i;
      }
      before = __reduce_add_sync(0xffffffffu, before);
      after = __reduce_add_sync(0xffffffffu, after);
    }
    if (lane != 0) continue;
    // A slot that a later push of this chunk takes again is left to that one.
    push.slots[i] = known && after < push.m ? ring * push.m + (read_head(push, ring) + before) % push.m : -1;
    push.pushed[i] = known && after == 0 ? before + 1 : 0;
  }
}

// 8 elements of value `row` from e on to `to`, where the slot is.
__device__ void copy(const Push& push, Array to, int64_t slot, int64_t row, int64_t e) {
  const int64_t from = row * push.d + e, first = slot * push.d + e;
  if (push.vectors && e + 8 <= push.d) {
    if (push.values.dtype == Dtype::f64) {
      double v[8];
      load8<double>(push.values, from, v);
      store8<double>(to, first, v);
    } else {
      float v[8];
      load8<float>(push.values, from, v);
      store8<float>(to, first, v);
    }
    return;
  }
  for (int j = 0; j < 8 && e + j < push.d; ++j) {
    if (push.words) {
      static_cast<int64_t*>(to.data)[first + j] = static_cast<const int64_t*>(push.values.data)[from + j];
    } else {
      store_as(to, first + j, load_as<double>(push.values, from + j));
    }
  }
}

// Grid: slices of d for each push of this process. Heads and counts advance here, after every slot is known:
// for the pushes of all processes, of which each thread takes those of one.
__global__ void __launch_bounds__(COPY_THREADS) copy_kernel(const __grid_constant__ Push push) {
  const int64_t slices = max((push.d + COPY_ELEMENTS - 1) / COPY_ELEMENTS, int64_t{1});
  const int64_t own = blockIdx.x / slices, slice = blockIdx.x % slices;
  const int parts = push.peers.parts;
  const auto number = [&](int q) {  // in the chunk
    return parts == 0 ? own : own / push.each * push.rows + q * push.each + own % push.each;
  };
  const int q = static_cast<int>(threadIdx.x);
  if (slice == 0 && q < max(parts, 1)) {
    const int64_t i = number(q), pushed = push.pushed[i];
    if (pushed > 0) {
      const int64_t ring = Labels(push).ring(push, push.first + i);
      const int64_t count = min(read_index(push.counts, push.wide, ring) + pushed, push.m);
      write_index(push.heads, push.wide, ring, (read_head(push, ring) + pushed) % push.m);
      write_index(push.counts, push.wide, ring, count);
      if (parts > 0) {
        const int64_t first = (push.peers.part - ring % parts + parts) % parts;
        push.local_counts[ring] = static_cast<int32_t>((count - first + parts - 1) / parts);
      }
    }
  }
  const int64_t slot = push.slots[number(push.peers.part)];
  const int64_t e = slice * COPY_ELEMENTS + static_cast<int64_t>(threadIdx.x) * 8;
  if (parts == 0) {
    if (slot >= 0) copy(push, push.refs, slot, (push.first + own) % push.rows, e);
    return;
  }
  if (slot >= 0) {
    const int64_t ring = slot / push.m, s = slot % push.m;
    const Array to = {reinterpret_cast<void*>(push.parts_at[(s + ring) % parts]), push.refs.dtype};
    copy(push, to, ring * push.local + s / parts, own % push.each, e);
  }
  __shared__ bool last;
  end_round(push.peers, &last);
}

// push has what belongs to parts.
void launch(Push push, const Tensor& refs, const Tensor& counts, const Tensor& heads, const Tensor& values,
            const Tensor& labels, bool all_to_last, int64_t capacity) {
  check_bank_push(refs, counts, heads, values, labels, all_to_last);
  const torch::stable::accelerator::DeviceGuard guard(refs.get_device_index());
  const Tensor v = packed(values), y = packed(labels);
  const int64_t parts = std::max(push.peers.parts, 1), pushes = all_to_last ? 2 : 1;
  push.each = y.size(0), push.rows = parts * push.each;
  push.label_groups = refs.size(0) - all_to_last;
  const int64_t n = pushes * push.rows, chunk = push.peers.parts > 0 ? n : std::min(n, CHUNK);
  push.k = refs.size(0), push.m = capacity, push.local = refs.size(1), push.d = product(shape_of(refs), 2);
  if (n == 0 || push.k == 0 || push.m == 0) return;
  push.refs = array_of(refs), push.values = array_of(v);
  push.refs.data = refs.mutable_data_ptr();
  push.words = refs.scalar_type() == ScalarType::Long;
  push.vectors = !push.words && push.d % 8 == 0 && is_aligned(push.refs.data) && is_aligned(push.values.data);
  push.labels = static_cast<const int64_t*>(y.const_data_ptr());
  push.counts = counts.mutable_data_ptr(), push.heads = heads.mutable_data_ptr();
  push.wide = counts.scalar_type() == ScalarType::Long;
  const Tensor workspace = torch::stable::new_empty(y, {2 * chunk}, ScalarType::Long);
  push.slots = static_cast<int64_t*>(workspace.mutable_data_ptr());
  push.pushed = push.slots + chunk;
  const int64_t slices = std::max<int64_t>(1, (push.d + COPY_ELEMENTS - 1) / COPY_ELEMENTS);
  const cudaStream_t stream = current_stream(refs);
  for (push.first = 0; push.first < n; push.first += chunk) {
    push.n = std::min(chunk, n - push.first);
    push.own = push.peers.parts > 0 ? pushes * push.each : push.n;
    int64_t rank_blocks = (push.n * 32 + RANK_THREADS - 1) / RANK_THREADS;
    if (push.peers.parts > 0) rank_blocks = std::min(rank_blocks, most_waiting_blocks(OP, refs));
    rank_kernel<<<static_cast<unsigned>(rank_blocks), RANK_THREADS, 0, stream>>>(push);
    check_launch(OP);
    copy_kernel<<<static_cast<unsigned>(push.own * slices), COPY_THREADS, 0, stream>>>(push);
    check_launch(OP);
  }
}

}  // namespace

void bank_push_(const Tensor& refs, const Tensor& counts, const Tensor& heads, const Tensor& values,
                const Tensor& labels, bool all_to_last) {
  launch(Push{}, refs, counts, heads, values, labels, all_to_last, refs.dim() > 1 ? refs.size(1) : 0);
}

void bank_push_parts_(const Tensor& refs, const Tensor& counts, const Tensor& heads,
                      const Tensor& local_counts, const Tensor& values, const Tensor& labels,
                      bool all_to_last, int64_t capacity, const Tensor& parts_at, const Tensor& mailboxes,
                      int64_t part, double seconds) {
  Push push{};
  push.peers = peers_of("bank_push_parts_", mailboxes, part, seconds);
  push.parts_at = static_cast<const int64_t*>(parts_at.const_data_ptr());
  push.local_counts = static_cast<int32_t*>(local_counts.mutable_data_ptr());
  launch(push, refs, counts, heads, values, labels, all_to_last, capacity);
}

}  // namespace svel::cuda
