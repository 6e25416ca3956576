// svel::bank_push_ on CUDA: places first, then the copy. Bytes: the values read and the slots written once;
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
constexpr int COPY_EIGHTS = 2;  // of elements, in flight at once in a thread
constexpr unsigned COPY_ELEMENTS = COPY_EIGHTS * 8 * COPY_THREADS;
constexpr int PLACES_BLOCKS = 128, HELD_LABELS = 2048;  // in shared memory
constexpr int PART_COPIES = 2;                          // of values, in flight at once in a thread

// The pushes of one chunk. Push i takes value i to its label's ring; with all_to_last there are as many
// again, which take the same values to the last ring.
struct Push {
  Array refs, values;     // (k, m, d), (rows, d); unused when words are copied
  bool words;             // int64: copied as they are
  bool vectors;           // 8 elements at a time are aligned, and float32 serves
  const int64_t* labels;  // (rows,) in [0, label_groups)
  void* counts;           // (k,)
  void* heads;            // (k,)
  bool wide;              // counts and heads are int64, else int32
  int64_t rows, label_groups, k, m, d;
  int64_t each;  // rows of this process
  // In parts: slot s of ring y is with part (s + y) mod parts, as its slot s div parts.
  Peers peers;         // parts = 0: there are none, and refs holds everything
  Addresses parts_at;  // where each keeps its (k, local, d)
  int64_t local;
  int32_t* local_counts;  // (k,) valid references of this part
  // (k + 1,) by ring how many rows go there, and last the round; null: the push is over when all rows are
  // where they belong, else those who read a slot see to that.
  int64_t* fresh;
  int64_t first, n;  // of the chunk
  int64_t* places;   // (n,) address of where its value goes, 0: it is not written
  int64_t* pushed;   // (n,) in the last push of each ring: pushes to that ring in the chunk, else 0
};

// In parts a label travels in one word with the round that it belongs to: it is here when its round is. Two
// areas of (rows,) words take turns, since others may still read what came before.
__device__ uint64_t* words_in(const Push& push, int part, unsigned round) {
  return reinterpret_cast<uint64_t*>(push.peers.mailbox(part) + HEADER_BYTES) + round % 2 * push.rows;
}

// Of all rows, when they are here.
struct Labels {
  const int64_t* given;
  const uint64_t* words = nullptr;  // in parts, as they came
  const int32_t* held = nullptr;    // the same in shared memory, where there is room

  __device__ int64_t operator[](int64_t i) const {
    if (held) return held[i];
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

// Divisions of 64 bits are long code, which takes long to come the first time.
__device__ int64_t wrap(int64_t value, int64_t m) {  // value >= 0, hardly ever 2 m or more
  if (value >= m) value -= m;
  return value < m ? value : value % m;
}

// A head outside [0, m) wraps: nothing is ever written out of bounds.
__device__ int64_t read_head(const Push& push, int64_t label) {
  const int64_t head = read_index(push.heads, push.wide, label);
  if (head >= 0 && head < push.m) return head;
  return (head % push.m + push.m) % push.m;
}

// The address of slot s of a ring.
__device__ int64_t place_of(const Push& push, int64_t ring, int64_t s) {
  int64_t base = reinterpret_cast<int64_t>(push.refs.data), slot = ring * push.m + s;
  if (push.peers.parts > 0) {
    const auto parts = static_cast<unsigned>(push.peers.parts);
    const auto number = static_cast<unsigned>(s), owner = (number + static_cast<unsigned>(ring)) % parts;
    base = push.parts_at.at[owner], slot = ring * push.local + number / parts;
  }
  return base + slot * push.d * (push.words ? 8 : size_of(push.refs.dtype));
}

// Labels of this process to all; then those of all are here, for each block.
__device__ void exchange_labels(const Push& push, unsigned round, int32_t* held) {
  const Peers& peers = push.peers;
  if (blockIdx.x == 0) {
    for (int64_t i = threadIdx.x; i < push.each; i += blockDim.x) {
      const int64_t label = push.labels[i];
      const auto known = static_cast<uint32_t>(label >= 0 && label < push.label_groups ? label : -1);
      for (int to = 0; to < peers.parts; ++to)
        store_word(words_in(push, to, round) + peers.part * push.each + i, uint64_t{round} << 32 | known);
    }
  }
  const uint64_t* const words = words_in(push, peers.part, round);
  for (int64_t i = threadIdx.x; i < push.rows; i += blockDim.x) {
    uint64_t word;
    await(
        [&] {
          word = load_word(words + i);
          return static_cast<unsigned>(word >> 32) == round;
        },
        peers, static_cast<int>(static_cast<unsigned>(i) / static_cast<unsigned>(push.each)));
    if (i < HELD_LABELS) held[i] = static_cast<int32_t>(static_cast<uint32_t>(word));
  }
  __syncthreads();
}

// Of a push to a labelled ring among those of the chunk: how many to the same ring are before it, and how
// many follow it. By a warp.
struct Rank {
  int before, after;
};
__device__ Rank rank_of(const Push& push, const Labels& labels, int64_t labelled, int64_t i, int64_t ring,
                        int lane) {
  int before = 0, after = 0;
  for (int64_t j = lane; j < labelled; j += 32) {
    const bool same = labels[push.first + j] == ring;
    before += same && j < i;
    after += same && j > i;
  }
  return {__reduce_add_sync(0xffffffffu, before), __reduce_add_sync(0xffffffffu, after)};
}
// The address of where its value goes; 0: a later push of the chunk takes that slot again.
__device__ int64_t place_of(const Push& push, int64_t ring, const Rank& rank) {
  return rank.after < push.m ? place_of(push, ring, wrap(read_head(push, ring) + rank.before, push.m)) : 0;
}

// One warp per push: its rank among those to the same ring, and how many follow it.
__global__ void __launch_bounds__(RANK_THREADS) rank_kernel(const __grid_constant__ Push push) {
  const Labels labels{push.labels};
  const int lane = threadIdx.x % 32;
  const int64_t labelled =
      min(max(push.rows - push.first, int64_t{0}), push.n);  // the others go to the last ring
  const int64_t warps = static_cast<int64_t>(gridDim.x) * RANK_THREADS / 32;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * RANK_THREADS + threadIdx.x) / 32; i < push.n;
       i += warps) {
    const int64_t ring = labels.ring(push, push.first + i);
    const bool known = i >= labelled || (ring >= 0 && ring < push.label_groups);
    Rank rank{static_cast<int>(i - labelled), static_cast<int>(push.n - 1 - i)};
    if (i < labelled && known) rank = rank_of(push, labels, labelled, i, ring, lane);
    if (lane != 0) continue;
    push.places[i] = known ? place_of(push, ring, rank) : 0;
    push.pushed[i] = known && rank.after == 0 ? rank.before + 1 : 0;
  }
}

// What a thread takes of a value from e on, where float32 serves: eights of elements, COPY_THREADS of them
// apart.
struct Eights {
  float v[COPY_EIGHTS][8];
};
__device__ int64_t element(int64_t e, int k) {  // the first of eight
  return e + int64_t{8} * COPY_THREADS * k;
}
__device__ void load_eights(const Push& push, int64_t row, int64_t e, Eights& eights) {
#pragma unroll
  for (int k = 0; k < COPY_EIGHTS; ++k)
    if (element(e, k) < push.d) load8<float>(push.values, row * push.d + element(e, k), eights.v[k]);
}
__device__ void store_eights(const Push& push, int64_t place, int64_t e, const Eights& eights) {
#pragma unroll
  for (int k = 0; k < COPY_EIGHTS; ++k)
    if (element(e, k) < push.d)
      store8<float>({reinterpret_cast<void*>(place), push.refs.dtype}, element(e, k), eights.v[k]);
}

// One by one: words, float64, and what is not aligned.
__device__ __noinline__ void copy_singly(const Push& push, int64_t place, int64_t row, int64_t e) {
  const int64_t from = row * push.d;
  for (int k = 0; k < COPY_EIGHTS; ++k) {
    for (int64_t i = element(e, k); i < min(element(e, k) + 8, push.d); ++i) {
      if (push.words) {
        reinterpret_cast<int64_t*>(place)[i] = static_cast<const int64_t*>(push.values.data)[from + i];
      } else {
        store_as({reinterpret_cast<void*>(place), push.refs.dtype}, i,
                 load_as<double>(push.values, from + i));
      }
    }
  }
}

// Heads and counts of a ring that takes so many.
__device__ void advance(const Push& push, int64_t ring, int64_t pushed) {
  if (pushed == 0) return;
  const int64_t count = min(read_index(push.counts, push.wide, ring) + pushed, push.m);
  write_index(push.heads, push.wide, ring, wrap(read_head(push, ring) + pushed, push.m));
  write_index(push.counts, push.wide, ring, count);
  if (push.peers.parts > 0) {
    const auto parts = static_cast<unsigned>(push.peers.parts);
    const unsigned first = (push.peers.part + parts - static_cast<unsigned>(ring) % parts) % parts;
    push.local_counts[ring] =
        static_cast<int32_t>((static_cast<unsigned>(count) + parts - 1 - first) / parts);
  }
  if (push.fresh) push.fresh[ring] = pushed;
}

// In parts, when the labels of all are here: places of all rows. A block has rings of its own, whose heads
// and counts advance when it knows their places.
__global__ void __launch_bounds__(RANK_THREADS) places_kernel(const __grid_constant__ Push push) {
  __shared__ int32_t held[HELD_LABELS];
  const Peers& peers = push.peers;
  const unsigned round = peers.header(peers.part)->round + 1;
  const int lane = threadIdx.x % 32, block = static_cast<int>(blockIdx.x);
  const auto is_ours = [&](int64_t i) { return static_cast<int>(i % PLACES_BLOCKS) == block; };
  for (int64_t ring = block + int64_t{PLACES_BLOCKS} * threadIdx.x; ring < push.k;
       ring += PLACES_BLOCKS * RANK_THREADS) {
    const int64_t at = ring * (push.wide ? 8 : 4);
    prefetch(static_cast<const char*>(push.heads) + at), prefetch(static_cast<const char*>(push.counts) + at);
    if (push.fresh) push.fresh[ring] = 0;
  }
  if (push.fresh && block == 0 && threadIdx.x == 0) push.fresh[push.k] = round;
  exchange_labels(push, round, held);
  const Labels labels{nullptr, words_in(push, peers.part, round), push.rows <= HELD_LABELS ? held : nullptr};
#pragma unroll 1
  for (int64_t base = 0; base < push.rows; base += HELD_LABELS) {
    __shared__ int listed[HELD_LABELS], pushed[HELD_LABELS], count;
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    for (int64_t i = base + threadIdx.x; i < min(base + HELD_LABELS, push.rows); i += RANK_THREADS) {
      const int64_t ring = labels[i];
      if (ring >= 0 && is_ours(ring)) listed[atomicAdd(&count, 1)] = static_cast<int>(i);
      if (ring < 0 && is_ours(i)) push.places[i] = 0;
    }
    __syncthreads();
    for (int l = threadIdx.x / 32; l < count; l += RANK_THREADS / 32) {
      const int i = listed[l];
      const int64_t ring = labels[i];
      const Rank rank = rank_of(push, labels, push.rows, i, ring, lane);
      if (lane != 0) continue;
      push.places[i] = place_of(push, ring, rank);
      pushed[l] = rank.after == 0 ? rank.before + 1 : 0;
    }
    __syncthreads();
    // A ring advances with its last row: the places of all others are known by then.
    for (int l = threadIdx.x; l < count; l += RANK_THREADS) advance(push, labels[listed[l]], pushed[l]);
    __syncthreads();  // the list is read
  }
  const bool all_to_last = push.n > push.rows && is_ours(push.k - 1);
  const int64_t mine = peers.part * push.each;
  for (int64_t i = mine + threadIdx.x; all_to_last && i < mine + push.each; i += RANK_THREADS)
    push.places[push.rows + i] =
        place_of(push, push.k - 1, Rank{static_cast<int>(i), static_cast<int>(push.rows - 1 - i)});
  __syncthreads();
  if (all_to_last && threadIdx.x == 0) advance(push, push.k - 1, push.rows);
}

// Slices of d for each push. Heads and counts advance here, after every place is known.
__global__ void __launch_bounds__(COPY_THREADS, 5) copy_kernel(const __grid_constant__ Push push) {
  const auto slices = max(static_cast<unsigned>((push.d + COPY_ELEMENTS - 1) / COPY_ELEMENTS), 1u);
  const unsigned i = blockIdx.x / slices, slice = blockIdx.x % slices;  // i: in the chunk
  int64_t value = push.first + i;
  if (value >= push.rows) value -= push.rows;
  const int64_t e = int64_t{slice} * COPY_ELEMENTS + int64_t{8} * threadIdx.x;
  Eights eights;
  if (push.vectors) load_eights(push, value, e, eights);
  if (slice == 0 && threadIdx.x == 0)
    advance(push, Labels{push.labels}.ring(push, push.first + i), push.pushed[i]);
  const int64_t place = push.places[i];
  if (place == 0) return;
  if (push.vectors) {
    store_eights(push, place, e, eights);
  } else {
    copy_singly(push, place, value, e);
  }
}

// In parts: slices of d of each row of this process, each read once for all the slots that it goes to. Blocks
// are few, one to two multiprocessors, since what follows runs beside them: the link is what bounds them. And
// small: beside four blocks of a draw that wait for them there is room for one.
__global__ void __launch_bounds__(COPY_THREADS, 4) copy_parts_kernel(const __grid_constant__ Push push) {
  const auto slices = max(static_cast<unsigned>((push.d + COPY_ELEMENTS - 1) / COPY_ELEMENTS), 1u);
  const auto items = static_cast<unsigned>(push.each) * slices;
  const int64_t mine = push.peers.part * push.each;
  const int pushes = push.n > push.rows ? 2 : 1;
#pragma unroll 1
  for (unsigned first = blockIdx.x; first < items; first += PART_COPIES * gridDim.x) {
    Eights eights[PART_COPIES];
    int64_t places[PART_COPIES][2];
    const auto row_of = [&](int c) { return static_cast<int64_t>((first + c * gridDim.x) / slices); };
    const auto element_of = [&](int c) {
      return int64_t{(first + c * gridDim.x) % slices} * COPY_ELEMENTS + int64_t{8} * threadIdx.x;
    };
#pragma unroll
    for (int c = 0; c < PART_COPIES; ++c) {
      const bool any = first + c * gridDim.x < items;
      if (any && push.vectors) load_eights(push, row_of(c), element_of(c), eights[c]);
#pragma unroll
      for (int p = 0; p < 2; ++p)
        places[c][p] = any && p < pushes ? push.places[p * push.rows + mine + row_of(c)] : 0;
    }
#pragma unroll
    for (int c = 0; c < PART_COPIES; ++c) {
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        if (places[c][p] == 0) continue;
        if (push.vectors) {
          store_eights(push, places[c][p], element_of(c), eights[c]);
        } else {
          copy_singly(push, places[c][p], row_of(c), element_of(c));
        }
      }
    }
  }
  __shared__ bool last;
  end_round(push.peers, &last, push.fresh == nullptr);
}

// What of a push in parts a call does: all of it, up to the places of all rows, or what is left.
enum Stage : int64_t { WHOLE, PLACES, COPY };

// push has what belongs to parts.
void launch(Push push, const Tensor& refs, const Tensor& counts, const Tensor& heads, const Tensor& values,
            const Tensor& labels, bool all_to_last, int64_t capacity, int64_t stage = WHOLE,
            const MaybeTensor& places = std::nullopt) {
  check_bank_push(refs, counts, heads, values, labels, all_to_last);
  const int device = refs.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
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
  push.vectors = !push.words && push.values.dtype != Dtype::f64 && push.d % 8 == 0 &&
                 is_aligned(push.refs.data) && is_aligned(push.values.data);
  push.labels = static_cast<const int64_t*>(y.const_data_ptr());
  push.counts = counts.mutable_data_ptr(), push.heads = heads.mutable_data_ptr();
  push.wide = counts.scalar_type() == ScalarType::Long;
  const Tensor workspace = places ? *places : torch::stable::new_empty(y, {2 * chunk}, ScalarType::Long);
  push.places = static_cast<int64_t*>(workspace.mutable_data_ptr());
  push.pushed = push.places + chunk;
  const int64_t slices = std::max<int64_t>(1, (push.d + COPY_ELEMENTS - 1) / COPY_ELEMENTS);
  const cudaStream_t stream = current_stream(refs);
  for (push.first = 0; push.first < n; push.first += chunk) {
    push.n = std::min(chunk, n - push.first);
    const bool in_parts = push.peers.parts > 0;
    if (in_parts && stage != COPY) places_kernel<<<PLACES_BLOCKS, RANK_THREADS, 0, stream>>>(push);
    if (!in_parts) {
      const int64_t rank_blocks = (push.n * 32 + RANK_THREADS - 1) / RANK_THREADS;
      rank_kernel<<<static_cast<unsigned>(rank_blocks), RANK_THREADS, 0, stream>>>(push);
    }
    check_launch(OP);
    if (stage == PLACES) continue;
    if (in_parts) {
      const int64_t blocks = std::min<int64_t>(push.each * slices, device_limits(OP, device).sm_count / 2);
      copy_parts_kernel<<<static_cast<unsigned>(blocks), COPY_THREADS, 0, stream>>>(push);
    } else {
      copy_kernel<<<static_cast<unsigned>(push.n * slices), COPY_THREADS, 0, stream>>>(push);
    }
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
                      int64_t part, double seconds, const MaybeTensor& fresh, const MaybeTensor& places,
                      int64_t stage) {
  Push push{};
  push.peers = peers_of("bank_push_parts_", mailboxes, part, seconds);
  push.parts_at = addresses_of("bank_push_parts_", "parts_at", parts_at);
  push.local_counts = static_cast<int32_t*>(local_counts.mutable_data_ptr());
  if (fresh) push.fresh = static_cast<int64_t*>(fresh->mutable_data_ptr());
  launch(push, refs, counts, heads, values, labels, all_to_last, capacity, stage, places);
}

}  // namespace svel::cuda
