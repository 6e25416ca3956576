// svel::bank_draw on CUDA, one launch. Bytes: the drawn references and the noise read once, x0 and x_t
// written once. Every block finds the slot of its row itself; only a row with label -1 reads all counts.
#include "common/hopper.cuh"
#include "common/kernel_launch.cuh"
#include "common/ops.h"
#include "common/path.h"
#include "common/peers.cuh"
#include "common/tensors.cuh"

namespace svel::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int64_t SLICE = int64_t{8} * THREADS;  // elements of a row that a block takes

struct Draw {
  Array refs;             // (k, m, d)
  Array fallback, noise;  // (n, d) or null
  Array u, t;             // (n,); t null without noise
  Array x0, x_t, t_set;   // (n, d), (n, d), (n,); x_t and t_set unused without noise
  const int64_t* labels;  // (n,) or null: all rows in group 0
  const void* counts;     // (k,)
  bool wide;              // counts are int64, else int32
  bool vectors;           // 8 elements at a time are aligned
  int64_t k, m, d, slices, items;
  // In parts, see bank_draw_parts: slot s of ring y is with part (s + y) mod parts, as its slot s div parts.
  Addresses parts_at;    // where each keeps its (k, local, d)
  int64_t parts, local;  // parts = 0: refs holds everything
  // Of a push whose rows may still be on their way (see bank_push_parts_), or null: its mailboxes, heads
  // behind it, and how many rows each ring got.
  const int64_t* fresh;
  const void* heads;
  Peers peers;
  Array also;    // (n, d) float32 that takes x_t too, or null
  bool between;  // it overlaps with the kernel before it, see bank_draw_parts
  Path path;
  double t_min;
  int64_t* slots;  // (n,)
};

__device__ int64_t valid_count(const Draw& draw, int64_t group) {
  const int64_t count = draw.wide ? static_cast<const int64_t*>(draw.counts)[group]
                                  : static_cast<const int32_t*>(draw.counts)[group];
  return count < 0 ? 0 : count > draw.m ? draw.m : count;
}

// Which of `count` > 0 references the number u of [0, 1) means.
__device__ int64_t pick(double u, int64_t count) {
  const double number = u * static_cast<double>(count);
  if (!(number > 0.0)) return 0;
  return number >= static_cast<double>(count) ? count - 1 : static_cast<int64_t>(number);
}

// The slot among the valid references of all groups, -1 if there is none; the whole block, the same in every
// thread. Each round cuts the groups that are left among the threads and keeps the part that holds the
// number.
__device__ int64_t slot_of_all(const Draw& draw, double u) {
  __shared__ int64_t sums[WARPS], found[3];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t low = 0, high = draw.k, before = 0, number = -1;  // before: references of the groups below low
  do {
    const int64_t part = (high - low + THREADS - 1) / THREADS;
    const int64_t begin = min(low + threadIdx.x * part, high), end = min(begin + part, high);
    int64_t own = 0;
    for (int64_t g = begin; g < end; ++g) own += valid_count(draw, g);
    int64_t upto = own;  // inclusive prefix sum over the block
    for (int offset = 1; offset < 32; offset *= 2) {
      const int64_t other = __shfl_up_sync(0xffffffffu, upto, offset);
      if (lane >= offset) upto += other;
    }
    __syncthreads();
    if (lane == 31) sums[warp] = upto;
    __syncthreads();
    int64_t total = 0;
    for (int w = 0; w < WARPS; ++w) {
      if (w < warp) upto += sums[w];
      total += sums[w];
    }
    if (number < 0) {
      if (total == 0) return -1;
      number = pick(u, total);
    }
    const int64_t first = before + upto - own;
    if (first <= number && number < before + upto) {  // one thread
      found[0] = begin, found[1] = end, found[2] = first;
    }
    __syncthreads();
    low = found[0], high = found[1], before = found[2];
  } while (high - low > 1);
  return low * draw.m + number - before;
}

// Until the rows that process q pushes are where they belong.
__device__ void await_rows_of(const Draw& draw, int q) {
  await_flag(&draw.peers.header(draw.peers.part)->done[q], static_cast<unsigned>(draw.fresh[draw.k]),
             draw.peers, q);
}

// The next kernel, which begins when all blocks have said that it may, leaves no room for those that bring
// rows to other processes, and draws there wait for these rows: not before they are where they belong.
__device__ void let_next_begin(const Draw& draw) {
  if (blockIdx.x == 0) {
    if (threadIdx.x > 0) return;
    if (draw.fresh) await_rows_of(draw, draw.peers.part);
  }
  allow_next_launch();
}

// Until the value of slot s of ring y is there; the whole block.
__device__ void await_slot(const Draw& draw, int64_t y, int64_t s) {
  const int64_t head =
      draw.wide ? static_cast<const int64_t*>(draw.heads)[y] : static_cast<const int32_t*>(draw.heads)[y];
  const int64_t newer = head - 1 - s;  // slots of the ring that were written after it
  if ((newer < 0 ? newer + draw.m : newer) >= draw.fresh[y]) return;
  const int q = static_cast<int>(threadIdx.x);
  if (q < draw.peers.parts) await_rows_of(draw, q);
  __syncthreads();
}

// A slice of d of a row, by a block.
template <typename W>
__device__ __forceinline__ void draw_slice(const Draw& draw, int64_t row, int64_t slice,
                                           PathCoefficients& shared) {
  const int64_t e = slice * SLICE + static_cast<int64_t>(threadIdx.x) * 8, at = row * draw.d + e;
  const bool whole = draw.vectors && e + 8 <= draw.d, noisy = draw.t.data;  // also where d = 0
  W x[8], noise[8] = {};
  if (noisy && whole) load8<W>(draw.noise, at, noise);  // on its way while the slot is found

  const int64_t label = draw.labels ? draw.labels[row] : 0;
  const bool known = label >= -1 && label < draw.k;
  const double u = load_as<double>(draw.u, row);
  int64_t slot = -1;
  if (label == -1) {
    slot = slot_of_all(draw, u);
  } else if (known) {
    const int64_t count = valid_count(draw, label);
    if (count > 0) slot = label * draw.m + pick(u, count);
  }
  if (threadIdx.x == 0) {
    if (slice == 0) draw.slots[row] = slot;
    if (noisy) {
      const double t = load_as<double>(draw.t, row);
      const double least = draw.t.dtype == Dtype::f64 ? draw.t_min : static_cast<float>(draw.t_min);
      shared = path_coefficients(draw.path, t);
      if (slice == 0) store_as(draw.t_set, row, slot >= 0 && !(t < least) ? t : nan(""));
    }
  }
  if (noisy) __syncthreads();

  // A label out of range does not take the fallback: it is an error that shows as NaN.
  const bool own = slot < 0 && known && draw.fallback.data;
  Array from = own ? draw.fallback : draw.refs;
  int64_t first = own ? at : slot * draw.d + e;
  if (draw.parts > 0 && slot >= 0) {
    const int64_t y = slot / draw.m, s = slot % draw.m;
    from.data = draw.parts_at[(s + y) % draw.parts];
    first = (y * draw.local + s / draw.parts) * draw.d + e;
    if (draw.fresh) await_slot(draw, y, s);
  }
  const W alpha = noisy ? static_cast<W>(shared.alpha) : W(0),
          sigma = noisy ? static_cast<W>(shared.sigma) : W(0);
  if (whole) {
    if (slot >= 0 || own) {
      load8<W>(from, first, x);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) x[j] = static_cast<W>(nan(""));
    }
    store8<W>(draw.x0, at, x);
    if (!noisy) return;
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] = alpha * x[j] + sigma * noise[j];
    store8<W>(draw.x_t, at, x);
    if (draw.also.data) store8<W>(draw.also, at, x);
    return;
  }
  for (int j = 0; j < 8 && e + j < draw.d; ++j) {
    const W value = slot >= 0 || own ? load_as<W>(from, first + j) : static_cast<W>(nan(""));
    store_as(draw.x0, at + j, value);
    if (!noisy) continue;
    const W mixed = alpha * value + sigma * load_as<W>(draw.noise, at + j);
    store_as(draw.x_t, at + j, mixed);
    if (draw.also.data) store_as(draw.also, at + j, mixed);
  }
}

// Grid: slices of d for each row, or less. W: float, or double for float64 references. Five blocks: beside
// four that wait there is room for one of those that are waited for.
template <typename W>
__global__ void __launch_bounds__(THREADS, sizeof(W) == 4 ? 5 : 3)
    draw_kernel(const __grid_constant__ Draw draw) {
  __shared__ PathCoefficients shared;
  if (draw.between) let_next_begin(draw);
#pragma unroll 1
  for (int64_t item = blockIdx.x; item < draw.items; item += gridDim.x) {
    draw_slice<W>(draw, item / draw.slices, item % draw.slices, shared);
    if (item + gridDim.x < draw.items) __syncthreads();  // what is shared is read
  }
  if (draw.between) wait_for_previous_launch();  // who waits for this kernel waits for both
}

// draw has its capacity and, in parts, where they are.
std::tuple<Tensor, Tensor, Tensor, Tensor> launch(Draw draw, const Tensor& refs, const Tensor& counts,
                                                  const Tensor& u, const MaybeTensor& labels,
                                                  const MaybeTensor& fallback, const MaybeTensor& noise,
                                                  const MaybeTensor& t, const std::string& path,
                                                  double t_min) {
  check_bank_draw(refs, counts, u, labels, fallback, noise, t, path);
  const torch::stable::accelerator::DeviceGuard guard(refs.get_device_index());
  const Tensor r = packed(refs), c = packed(counts), numbers = packed(u);
  const MaybeTensor y = packed(labels), own = packed(fallback), eps = packed(noise), times = packed(t);
  const int64_t n = u.size(0);
  std::vector<int64_t> shape = shape_of(r);
  shape.erase(shape.begin());
  shape[0] = n;
  const ScalarType work = r.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor x0 = torch::stable::new_empty(r, shape, work);
  const Tensor slot = torch::stable::new_empty(r, {n}, ScalarType::Long);
  const Tensor x_t = torch::stable::new_empty(r, t ? shape : std::vector<int64_t>{0}, work);
  const Tensor t_set =
      t ? torch::stable::new_empty(*t, {n}) : torch::stable::new_empty(r, {0}, ScalarType::Float);
  if (n == 0) return {x0, slot, x_t, t_set};

  draw.refs = array_of(r), draw.u = array_of(numbers);
  draw.fallback = array_of(own), draw.noise = array_of(eps), draw.t = array_of(times);
  draw.x0 = array_of(x0), draw.x_t = array_of(x_t), draw.t_set = array_of(t_set);
  if (y) draw.labels = static_cast<const int64_t*>(y->const_data_ptr());
  draw.counts = c.const_data_ptr();
  draw.wide = c.scalar_type() == ScalarType::Long;
  draw.k = r.size(0), draw.local = r.size(1), draw.d = product(shape, 1);
  draw.slices = std::max<int64_t>(1, (draw.d + SLICE - 1) / SLICE);
  draw.vectors = draw.d % 8 == 0;
  for (const Array& a : {draw.refs, draw.fallback, draw.noise, draw.x0, draw.x_t, draw.also}) {
    draw.vectors = draw.vectors && is_aligned(a.data);
  }
  draw.path = path_of(path);
  draw.t_min = t_min;
  draw.slots = slot.mutable_data_ptr<int64_t>();
  const auto kernel = work == ScalarType::Double ? draw_kernel<double> : draw_kernel<float>;
  draw.items = n * draw.slices;
  const int64_t blocks = draw.fresh ? std::min(draw.items, most_waiting_blocks("bank_draw", r)) : draw.items;
  launch_following("bank_draw", draw.between, kernel, dim3(static_cast<unsigned>(blocks)), THREADS, 0,
                   current_stream(r), draw);
  return {x0, slot, x_t, t_set};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> bank_draw(const Tensor& refs, const Tensor& counts,
                                                     const Tensor& u, const MaybeTensor& labels,
                                                     const MaybeTensor& fallback, const MaybeTensor& noise,
                                                     const MaybeTensor& t, const std::string& path,
                                                     double t_min) {
  Draw draw{};
  draw.m = refs.dim() > 1 ? refs.size(1) : 0;
  return launch(draw, refs, counts, u, labels, fallback, noise, t, path, t_min);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bank_draw_parts(
    const Tensor& parts_at, int64_t capacity, const Tensor& refs, const Tensor& counts, const Tensor& u,
    const MaybeTensor& labels, const MaybeTensor& fallback, const MaybeTensor& noise, const MaybeTensor& t,
    const std::string& path, double t_min, const MaybeTensor& also, const MaybeTensor& heads,
    const MaybeTensor& fresh, const MaybeTensor& mailboxes, int64_t part, double seconds, bool between) {
  Draw draw{};
  draw.between = between;
  draw.m = capacity, draw.parts = parts_at.size(0);
  draw.parts_at = addresses_of("bank_draw_parts", "parts_at", parts_at);
  if (t) draw.also = array_of(also);
  if (fresh) {
    draw.fresh = fresh->const_data_ptr<int64_t>(), draw.heads = heads->const_data_ptr();
    draw.peers = peers_of("bank_draw_parts", *mailboxes, part, seconds);
  }
  return launch(draw, refs, counts, u, labels, fallback, noise, t, path, t_min);
}

}  // namespace svel::cuda
