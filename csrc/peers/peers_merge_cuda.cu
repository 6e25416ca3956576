// svel::peers_merge: what the parts of all processes gave for the own rows, read from their mailboxes and
// weighted by their shares of the whole, in one launch. Bytes: a mean from each process, x, and the result.
#include "common/path.h"
#include "common/peers.cuh"

namespace svel::cuda {
namespace {

constexpr const char* OP = "peers_merge";
constexpr int THREADS = 256;
constexpr int HALVES = 2;  // of a slice, four elements of each to a thread
constexpr int64_t HALF = int64_t{4} * THREADS;
constexpr int64_t SLICE = HALVES * HALF;  // elements of a row that a block takes
constexpr int AHEAD = 2;                  // parts whose means are on their way at once

struct Merge {
  Peers peers;
  int64_t means, lses;  // where both begin in a mailbox: (parts n, d), (parts n,)
  bool home;            // in the own one by part, else in those of the parts by whose rows they are
  int64_t n, d, k, slices;
  const int32_t* counts;     // (k,) of the whole rings
  const int64_t* rings;      // (n,) or null: all rows over ring 0
  Array x, source, out;      // (n, d); x with a and b, source or null
  const double* source_lse;  // (n,) with source
  const double *a, *b;       // (n,): out = a x + b mean; null: the mean itself, or
  Array t;                   // (n,) times, from which a and b follow; or null
  Path path;
  Prediction prediction;
  bool vectors;
};

// That part q holds nothing of what the row asks for.
__device__ bool is_empty(const Merge& m, int q, int64_t ring) {
  const auto holds = [&](int64_t y) {
    const int64_t first = (q - y % m.peers.parts + m.peers.parts) % m.peers.parts;
    return m.counts[y] > first;
  };
  if (ring >= 0) return ring < m.k && !holds(ring);
  if (ring != -1) return false;
  for (int64_t y = 0; y < m.k; ++y)
    if (holds(y)) return false;
  return true;
}

template <typename T>
struct Four {
  T v[4];
};

template <typename T>
__device__ Four<T> read_four(const T* from, int64_t e, int64_t d, bool vectors) {
  Four<T> four{};
  if (vectors && e + 4 <= d) {
    if constexpr (sizeof(T) == 4) {
      const float4 v = *reinterpret_cast<const float4*>(from + e);
      return {{v.x, v.y, v.z, v.w}};
    } else {
      const double2 low = *reinterpret_cast<const double2*>(from + e),
                    high = *reinterpret_cast<const double2*>(from + e + 2);
      return {{low.x, low.y, high.x, high.y}};
    }
  }
  for (int j = 0; j < 4; ++j)
    if (e + j < d) four.v[j] = from[e + j];
  return four;
}

template <typename T>
__device__ Four<T> read_four(const Array& a, int64_t at, int64_t left, bool vectors) {
  if (a.dtype == DtypeOf<T>::value) return read_four(static_cast<const T*>(a.data) + at, 0, left, vectors);
  Four<T> four{};
  for (int j = 0; j < 4; ++j)
    if (j < left) four.v[j] = load_as<T>(a, at + j);
  return four;
}

// What a slice needs that is here before the parts are: read, and found, while others are waited for.
template <typename T>
struct Known {
  int64_t row, begin;  // this thread's first element
  int64_t ring;
  double a = 0, b = 1;  // out = a x + b mean
  Four<T> x[HALVES] = {};
};

template <typename T>
__device__ Known<T> read_known(const Merge& m, int64_t item) {
  Known<T> known;
  known.row = item / m.slices, known.begin = item % m.slices * SLICE + int64_t{threadIdx.x} * 4;
  known.ring = m.rings ? m.rings[known.row] : 0;
  if (!m.a && !m.t.data) return known;
#pragma unroll
  for (int h = 0; h < HALVES; ++h) {
    const int64_t e = known.begin + h * HALF;
    if (e < m.d) known.x[h] = read_four<T>(m.x, known.row * m.d + e, m.d - e, m.vectors);
  }
  if (m.a) {
    known.a = m.a[known.row], known.b = m.b[known.row];
  } else {
    const double t = clamp_time(load_as<double>(m.t, known.row));
    const PredictionCoefficients by = prediction_coefficients(m.prediction, path_coefficients(m.path, t));
    known.a = by.a, known.b = by.b;
  }
  return known;
}

__device__ float exponential(float v) {
  return expf(v);
}
__device__ double exponential(double v) {
  return exp(v);
}

// One slice of a row; all threads of the block.
template <typename T>
__device__ void merge_slice(const Merge& m, const Known<T>& known, double* lses, T* shares) {
  const Peers& peers = m.peers;
  const int q = static_cast<int>(threadIdx.x), parts = peers.parts;
  const int64_t row = known.row;
  const auto mailbox = [&](int of) { return peers.mailbox(m.home ? peers.part : of); };
  const auto place = [&](int of) { return (m.home ? of : peers.part) * m.n + row; };
  Four<T> ahead[AHEAD][HALVES];
  const auto load = [&](int first) {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      if (first + i >= parts) continue;
      const T* mean = reinterpret_cast<const T*>(mailbox(first + i) + m.means) + place(first + i) * m.d;
#pragma unroll
      for (int h = 0; h < HALVES; ++h) {
        const int64_t e = known.begin + h * HALF;
        if (e < m.d) ahead[i][h] = read_four(mean, e, m.d, m.vectors);
      }
    }
  };
  load(0);
  const int sets = parts + (m.source_lse != nullptr);
  double lse = -INFINITY;
  if (q < sets) {
    lse = q < parts ? reinterpret_cast<const double*>(mailbox(q) + m.lses)[place(q)] : m.source_lse[row];
    if (q < parts && isnan(lse) && is_empty(m, q, known.ring)) lse = -INFINITY;
    lses[q] = lse;
  }
  __syncthreads();
  double top = -INFINITY;
  for (int i = 0; i < sets; ++i) top = fmax(top, lses[i]);
  if (q < sets) shares[q] = exponential(static_cast<T>(lse - top));
  __syncthreads();
  T sum = 0;
  for (int i = 0; i < sets; ++i) sum += shares[i];
  Four<T> total[HALVES] = {};
  const auto add = [&](T share, const Four<T>& mean, Four<T>& to) {
    const T weight = share / sum;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      to.v[j] += weight > 0 ? weight * mean.v[j] : weight;  // an empty part's is NaN
  };
  for (int first = 0; first < parts; first += AHEAD) {
    if (first) load(first);
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      if (first + i >= parts) continue;
#pragma unroll
      for (int h = 0; h < HALVES; ++h) add(shares[first + i], ahead[i][h], total[h]);
    }
  }
#pragma unroll
  for (int h = 0; h < HALVES; ++h) {
    const int64_t e = known.begin + h * HALF, at = row * m.d + e;
    if (e >= m.d) continue;
    if (m.source_lse) add(shares[parts], read_four<T>(m.source, at, m.d - e, false), total[h]);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      total[h].v[j] = static_cast<T>(known.a * static_cast<double>(known.x[h].v[j]) +
                                     known.b * static_cast<double>(total[h].v[j]));
    if (m.vectors && m.out.dtype == Dtype::f32) {
      *reinterpret_cast<float4*>(static_cast<float*>(m.out.data) + at) =
          make_float4(total[h].v[0], total[h].v[1], total[h].v[2], total[h].v[3]);
    } else {
      for (int j = 0; j < 4 && e + j < m.d; ++j) store_as(m.out, at + j, total[h].v[j]);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 4) merge_kernel(const __grid_constant__ Merge m) {
  const Peers& peers = m.peers;
  __shared__ double lses[MAX_PEERS + 1];
  __shared__ T shares[MAX_PEERS + 1];
  Header* const own = peers.header(peers.part);
  const int q = static_cast<int>(threadIdx.x);
  const unsigned round = own->round;
  if (blockIdx.x == 0 && q < peers.parts) raise_flag(&peers.header(q)->done[peers.part], round);
  const int64_t items = m.n * m.slices;
  int64_t item = blockIdx.x;
  Known<T> known;
  if (item < items) known = read_known<T>(m, item);
  if (q < peers.parts) await_flag(&own->done[q], round, peers, q);
  __syncthreads();
#pragma unroll 1
  while (item < items) {
    merge_slice<T>(m, known, lses, shares);
    item += gridDim.x;
    if (item < items) known = read_known<T>(m, item);
    __syncthreads();  // what is shared is read
  }
}

}  // namespace

Tensor peers_merge(const Tensor& mailboxes, int64_t part, double seconds, int64_t means, int64_t lses,
                   bool home, const Tensor& x, const Tensor& counts, const MaybeTensor& rings,
                   const MaybeTensor& a, const MaybeTensor& b, const MaybeTensor& t, const std::string& path,
                   const std::string& prediction, const MaybeTensor& source, const MaybeTensor& source_lse) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor rows = packed(x);
  const MaybeTensor own = packed(source), own_lse = packed(source_lse), y = packed(rings), first = packed(a),
                    second = packed(b), times = packed(t);
  const bool wide = x.scalar_type() == ScalarType::Double;
  const Tensor out = torch::stable::new_empty(rows, shape_of(rows),
                                              a || t ? x.scalar_type()
                                              : wide ? ScalarType::Double
                                                     : ScalarType::Float);
  Merge m{};
  m.peers = peers_of(OP, mailboxes, part, seconds);
  m.means = means, m.lses = lses, m.home = home;
  m.n = rows.size(0), m.d = product(shape_of(rows), 1), m.k = counts.size(0);
  m.slices = std::max<int64_t>(1, (m.d + SLICE - 1) / SLICE);
  m.counts = static_cast<const int32_t*>(counts.const_data_ptr());
  if (y) m.rings = static_cast<const int64_t*>(y->const_data_ptr());
  m.x = array_of(rows), m.source = array_of(own), m.out = array_of(out);
  if (own_lse) m.source_lse = own_lse->const_data_ptr<double>();
  if (first) m.a = first->const_data_ptr<double>(), m.b = second->const_data_ptr<double>();
  m.t = array_of(times), m.path = path_of(path), m.prediction = prediction_of(prediction);
  m.vectors = m.d % 4 == 0 && is_aligned(m.x.data);
  const auto kernel = wide ? merge_kernel<double> : merge_kernel<float>;
  const int64_t most = most_waiting_blocks(OP, x);
  const auto blocks = static_cast<unsigned>(std::min(std::max<int64_t>(1, m.n * m.slices), most));
  kernel<<<blocks, THREADS, 0, current_stream(x)>>>(m);
  check_launch(OP);
  return out;
}

}  // namespace svel::cuda
