// svel::bank_push_ on CUDA: slots first, then the copy. Bytes: the values read and the slots written once;
// finding a row's rank reads the labels of its chunk once per row, from the cache. Pushes go in chunks,
// in order.
#include "common/ops.h"
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
  // A part of every ring, see bank_push_part_: slot s of ring y is with part (s + y) mod parts, as its slot
  // s div parts. refs is then (k, local, d), local = ceil(m / parts).
  int64_t part, parts, local;
  int32_t* local_counts;  // (k,) or null: valid references of this part
  int64_t first, n;       // of the chunk
  int64_t* slots;         // (n,) row of refs, -1: not written
  int64_t* pushed;        // (n,) in the last push of each ring: pushes to that ring in the chunk, else 0
};

__device__ int64_t ring_of(const Push& push, int64_t i) {
  return i < push.rows ? push.labels[i] : push.k - 1;
}

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

// One warp per push: its rank among those to the same ring, and how many follow it.
__global__ void __launch_bounds__(RANK_THREADS) rank_kernel(const Push push) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * RANK_THREADS + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (i >= push.n) return;
  const int64_t labelled =
      min(max(push.rows - push.first, int64_t{0}), push.n);  // the others go to the last ring
  const int64_t* const labels = push.labels + push.first;
  const int64_t ring = ring_of(push, push.first + i);
  const bool known = i >= labelled || (ring >= 0 && ring < push.label_groups);
  int before = 0, after = 0;
  if (i >= labelled) {
    before = static_cast<int>(i - labelled);
    after = static_cast<int>(push.n - 1 - i);
  } else if (known) {
    for (int64_t j = lane; j < labelled; j += 32) {
      const bool same = labels[j] == ring;
      before += same && j < i;
      after += same && j > i;
    }
    before = __reduce_add_sync(0xffffffffu, before);
    after = __reduce_add_sync(0xffffffffu, after);
  }
  if (lane != 0) return;
  // A slot that a later push of this chunk takes again is left to that one.
  const int64_t slot = known && after < push.m ? (read_head(push, ring) + before) % push.m : -1;
  const bool here = slot >= 0 && (slot + ring) % push.parts == push.part;
  push.slots[i] = here ? ring * push.local + slot / push.parts : -1;
  push.pushed[i] = known && after == 0 ? before + 1 : 0;
}

// Grid: slices of d for each push. Heads and counts advance here, after every slot is known.
__global__ void __launch_bounds__(COPY_THREADS) copy_kernel(const Push push) {
  const int64_t slices = (push.d + COPY_ELEMENTS - 1) / COPY_ELEMENTS;
  const int64_t i = slices ? blockIdx.x / slices : blockIdx.x, slice = slices ? blockIdx.x % slices : 0;
  const int64_t pushed = push.pushed[i], slot = push.slots[i];
  if (slice == 0 && threadIdx.x == 0 && pushed > 0) {
    const int64_t ring = ring_of(push, push.first + i);
    const int64_t count = read_index(push.counts, push.wide, ring) + pushed;
    write_index(push.heads, push.wide, ring, (read_head(push, ring) + pushed) % push.m);
    const int64_t valid = count < push.m ? count : push.m;
    write_index(push.counts, push.wide, ring, valid);
    if (push.local_counts) {
      const int64_t first = (push.part - ring % push.parts + push.parts) % push.parts;
      push.local_counts[ring] = static_cast<int32_t>((valid - first + push.parts - 1) / push.parts);
    }
  }
  if (slot < 0) return;
  const int64_t e = slice * COPY_ELEMENTS + static_cast<int64_t>(threadIdx.x) * 8;
  const int64_t from = (push.first + i) % push.rows * push.d + e, to = slot * push.d + e;
  if (push.vectors && e + 8 <= push.d) {
    double v[8];
    if (push.values.dtype == Dtype::f64) {
      load8<double>(push.values, from, v);
      store8<double>(push.refs, to, v);
    } else {
      float w[8];
      load8<float>(push.values, from, w);
      store8<float>(push.refs, to, w);
    }
    return;
  }
  for (int k = 0; k < 8 && e + k < push.d; ++k) {
    if (push.words) {
      static_cast<int64_t*>(push.refs.data)[to + k] = static_cast<const int64_t*>(push.values.data)[from + k];
    } else {
      store_as(push.refs, to + k, load_as<double>(push.values, from + k));
    }
  }
}

// Of values (rows, *S) and labels (rows,), which are packed; push has capacity, part, parts and local_counts.
void launch(Push push, const Tensor& refs, const Tensor& counts, const Tensor& heads, const Tensor& values,
            const Tensor& labels, bool all_to_last) {
  push.rows = labels.size(0);
  push.label_groups = refs.size(0) - all_to_last;
  const int64_t n = all_to_last ? 2 * push.rows : push.rows;
  push.k = refs.size(0), push.local = refs.size(1), push.d = product(shape_of(refs), 2);
  if (n == 0 || push.k == 0 || push.m == 0) return;
  push.refs = array_of(refs), push.values = array_of(values);
  push.refs.data = refs.mutable_data_ptr();
  push.words = refs.scalar_type() == ScalarType::Long;
  push.vectors = !push.words && push.d % 8 == 0 && is_aligned(push.refs.data) && is_aligned(push.values.data);
  push.labels = static_cast<const int64_t*>(labels.const_data_ptr());
  push.counts = counts.mutable_data_ptr(), push.heads = heads.mutable_data_ptr();
  push.wide = counts.scalar_type() == ScalarType::Long;
  const Tensor workspace = torch::stable::new_empty(labels, {2 * std::min(n, CHUNK)}, ScalarType::Long);
  push.slots = static_cast<int64_t*>(workspace.mutable_data_ptr());
  push.pushed = push.slots + std::min(n, CHUNK);
  const int64_t slices = std::max<int64_t>(1, (push.d + COPY_ELEMENTS - 1) / COPY_ELEMENTS);
  const cudaStream_t stream = current_stream(refs);
  for (push.first = 0; push.first < n; push.first += CHUNK) {
    push.n = std::min(CHUNK, n - push.first);
    const int64_t rank_blocks = (push.n * 32 + RANK_THREADS - 1) / RANK_THREADS;
    rank_kernel<<<static_cast<unsigned>(rank_blocks), RANK_THREADS, 0, stream>>>(push);
    check_launch(OP);
    copy_kernel<<<static_cast<unsigned>(push.n * slices), COPY_THREADS, 0, stream>>>(push);
    check_launch(OP);
  }
}

}  // namespace

void bank_push_(const Tensor& refs, const Tensor& counts, const Tensor& heads, const Tensor& values,
                const Tensor& labels, bool all_to_last) {
  check_bank_push(refs, counts, heads, values, labels, all_to_last);
  const torch::stable::accelerator::DeviceGuard guard(refs.get_device_index());
  Push push{};
  push.m = refs.size(1), push.parts = 1;
  launch(push, refs, counts, heads, packed(values), packed(labels), all_to_last);
}

void bank_push_part_(const Tensor& refs, const Tensor& counts, const Tensor& heads,
                     const Tensor& local_counts, const Tensor& values, const Tensor& labels, bool all_to_last,
                     int64_t capacity, int64_t part, int64_t parts) {
  check_bank_push(refs, counts, heads, values, labels, all_to_last);
  const torch::stable::accelerator::DeviceGuard guard(refs.get_device_index());
  Push push{};
  push.m = capacity, push.part = part, push.parts = parts;
  push.local_counts = static_cast<int32_t*>(local_counts.mutable_data_ptr());
  launch(push, refs, counts, heads, packed(values), packed(labels), all_to_last);
}

}  // namespace svel::cuda
