// One pass over the references, for samples that fit one thread block (D <= 16,384). Per pair of row and
// reference: D * (bytes per element) through shared memory and 5 D float32 operations; at float16 and 4 TB/s
// that keeps a Hopper multiprocessor's float32 units about two thirds busy, so the kernel is bound by memory.
//
// The tiles of all rows form one list, cut into equal ranges, one per block. A block walks its range: it
// keeps y, c and the weighted sum of the current row in registers, streams tiles of references through shared
// memory several stages deep, and updates an online softmax once per tile. Each thread copies exactly the
// elements it reads, so the only barrier in the loop is the exchange of the tile's scores. A row that lies
// inside one block's range is written at once; the others leave (max, sum, vector) for combine_kernel. All
// blocks use the same centre c for a row (the mean of its first tile), so partial results merge exactly.
#pragma once

#include "stable_target/rows.cuh"

namespace svel::cuda {

constexpr int RING = 8;  // tile descriptors; more than the stages in flight
constexpr int MAX_TILE_REFS = 8;
constexpr int MAX_WARPS = 16;
constexpr int FLUSH_REFS =
    256;  // summed in float32 before they join a float64 total in device memory, so that
          // the error does not grow with M, even where the mean is much shorter than c

enum TileFlags : int {
  BEGIN = 1,        // first tile of this row in this block: form c and y
  CENTRE_ONLY = 2,  // read for c alone; its references belong to another block
  ROW_START = 4,    // the row starts in this block
  END = 8,          // last tile of this row in this block
  ROW_END = 16,     // the row ends in this block
  DONE = 32,
};

struct Tile {
  int64_t row;        // in the sorted list
  int64_t reference;  // index of the first one among all k m
  int count, flags;
};

// Where the block stands in the list of tiles. The tiles of one group of one row follow one another, and
// between their first and their last nothing is read from the list.
struct Cursor {
  int64_t tile, end, row;
  bool fresh;                                    // the row has no tile in the ring yet
  int64_t row_begin, row_end;                    // tiles of the row
  int64_t group, group_begin, group_end, count;  // the group, its tiles in the row, its valid references
};

// What a block leaves of rows that it shares with others: slot 2b of block b for the row that began earlier,
// 2b + 1 for the row that goes on after it.
struct Partials {
  float* sums;       // (2 blocks, d) sum of p_j (r_j - c)
  double* running;   // (blocks, d) what a block has flushed of its current row
  float* centres;    // (blocks, d), written by the block where the row starts
  float* max_score;  // (2 blocks,) in units of s_j / rate
  double* total;     // (2 blocks,) sum of p_j
  double* y_square;  // (blocks,) |y|^2, written by the block where the row starts
};

struct SharedState {
  Tile ring[RING];
  Cursor cursor;
  float scores[2][MAX_TILE_REFS][MAX_WARPS];
  double scratch[33];
};

// Ranges of equal length, the first `tiles % blocks` of them one longer; those of the last blocks may be
// empty.
__host__ __device__ inline int64_t range_begin(int64_t tiles, int64_t blocks, int64_t block) {
  const int64_t longer = tiles % blocks;
  return tiles / blocks * block + (block < longer ? block : longer);
}

// The block whose range holds `tile`. The ranges between those of two tiles are not empty.
__host__ __device__ inline int64_t range_of(int64_t tiles, int64_t blocks, int64_t tile) {
  const int64_t length = tiles / blocks, longer = tiles % blocks;
  if (tile < longer * (length + 1)) return tile / (length + 1);
  return longer + (tile - longer * (length + 1)) / length;
}

__device__ inline void start_row(const WorkList& work, Cursor& at, int64_t row) {
  at.row = row;
  at.fresh = true;
  at.row_begin = at.group_end = work.first_tile[row];
  at.row_end = work.first_tile[row + 1];
}

__device__ inline void start_group(const Inputs& in, const WorkList& work, Cursor& at) {
  const Row& row = work.rows[at.row];
  at.group = row.group, at.count = row.count;
  at.group_begin = at.row_begin, at.group_end = at.row_end;
  if (row.group >= 0) return;
  if (row.count == 0) {  // one tile without references, for the source alone
    at.group = 0;
    return;
  }
  at.group = find_prefix(work.group_tiles, 0, in.k, at.tile - at.row_begin);
  at.count = valid_count(in, at.group);
  at.group_begin = at.row_begin + work.group_tiles[at.group];
  at.group_end = at.row_begin + work.group_tiles[at.group + 1];
}

__device__ inline Tile next_tile(const Inputs& in, const WorkList& work, Cursor& at) {
  if (at.tile >= at.end) return {0, 0, 0, DONE};
  while (at.tile >= at.row_end) start_row(work, at, at.row + 1);
  const int begin = at.fresh ? BEGIN : 0;
  if (at.fresh && at.tile > at.row_begin) {
    at.fresh = false;
    const Span span = tile_span(in, work, work.rows[at.row], 0);
    return {at.row, span.group * in.m + span.first, span.count, begin | CENTRE_ONLY};
  }
  at.fresh = false;
  if (at.tile >= at.group_end) start_group(in, work, at);
  const int64_t first = (at.tile - at.group_begin) * work.tile_refs, left = at.count - first;
  Tile tile{at.row, at.group * in.m + first, static_cast<int>(left < work.tile_refs ? left : work.tile_refs),
            begin};
  if (at.tile == at.row_begin) tile.flags |= ROW_START;
  ++at.tile;
  if (at.tile == at.row_end) tile.flags |= END | ROW_END;
  if (at.tile == at.end) tile.flags |= END;
  return tile;
}

__device__ inline void copy_async(void* shared, const void* global,
                                  int bytes) {  // fewer than 16: the rest becomes zero
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes)
               : "memory");
}
__device__ inline void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
__device__ inline void wait_copies(int pending) {
  switch (pending) {
    case 0:
      asm volatile("cp.async.wait_group 0;" ::: "memory");
      break;
    case 1:
      asm volatile("cp.async.wait_group 1;" ::: "memory");
      break;
    default:
      asm volatile("cp.async.wait_group 2;" ::: "memory");
      break;
  }
}

// EV elements of T, one slot of the staging buffer, as float32.
template <typename T, int EV>
__device__ inline void read_slot(const T* slot, float (&out)[EV]) {
  if constexpr (EV == 1) {
    out[0] = to_float(slot[0]);
  } else {
    const uint4 raw = *reinterpret_cast<const uint4*>(slot);
    const T* values = reinterpret_cast<const T*>(&raw);
#pragma unroll
    for (int k = 0; k < EV; ++k) out[k] = to_float(values[k]);
  }
}

// T, EV: element and elements per 16-byte slot; EV = 1: staged as float32 by plain loads, for any dtype and
// alignment. A thread owns Q elements of D: element(q) below. TR: references per tile.
template <typename T, int EV, int THREADS, int Q, int TR>
__global__ void __launch_bounds__(THREADS, 512 / THREADS)
    stream_kernel(const Inputs in, const WorkList work, const Partials parts, const int stages) {
  constexpr int SLOTS = Q / EV, WARPS = THREADS / 32, LANES = 32 / TR;
  constexpr bool KEEP = (TR + 3) * Q <= 96;  // a tile's differences stay in registers between score and sum
  extern __shared__ __align__(16) char memory[];
  SharedState& shared = *reinterpret_cast<SharedState*>(memory);
  T* const staging = reinterpret_cast<T*>(memory + (sizeof(SharedState) + 15) / 16 * 16);
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int d = static_cast<int>(in.d);
  const int64_t stage_size = static_cast<int64_t>(TR) * d;  // elements
  const auto slot_element = [&](int s) { return (s * THREADS + tid) * EV; };
  const auto element = [&](int q) { return slot_element(q / EV) + q % EV; };

  const auto load_tile = [&](const Tile& tile, int stage) {
    T* const to = staging + stage * stage_size;
#pragma unroll
    for (int j = 0; j < TR; ++j) {
      const int64_t from = (tile.reference + j) * in.d;
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        const int e = slot_element(s);
        if (e >= d) continue;
        if constexpr (EV > 1) {
          const T* base =
              static_cast<const T*>(in.refs.data);  // zero bytes are read past the valid references
          copy_async(to + j * d + e, j < tile.count ? base + from + e : base, j < tile.count ? 16 : 0);
        } else {
          to[j * d + e] = j < tile.count ? load_as<float>(in.refs, from + e) : 0.0f;
        }
      }
    }
  };

  const int64_t tiles = work.first_tile[in.n];
  if (tid == 0) {
    Cursor& at = shared.cursor;
    at.tile = range_begin(tiles, gridDim.x, blockIdx.x);
    at.end = range_begin(tiles, gridDim.x, blockIdx.x + 1);
    if (at.tile < at.end) start_row(work, at, find_prefix(work.first_tile, 0, in.n, at.tile));
    for (int i = 0; i < stages; ++i) shared.ring[i] = next_tile(in, work, at);
  }
  __syncthreads();
  for (int i = 0; i + 1 < stages; ++i) {
    if (!(shared.ring[i].flags & DONE)) load_tile(shared.ring[i], i);
    commit_copies();
  }

  float y[Q], c[Q], sum[Q];  // the row, its centre, sum of p_j (r_j - c)
  float best = -INFINITY;    // largest score so far, in units of s_j / rate
  double total = 0, y_square = 0;
  float half_alpha = 0, log2_rate = 0;
  Row row{};
  bool starts = false;
  int unflushed = 0;  // tiles in `sum` since the row began or was flushed
  bool flushed = false;
  float flushed_best = -INFINITY;  // the score that the running sums are relative to
#pragma unroll
  for (int q = 0; q < Q; ++q) y[q] = c[q] = sum[q] = 0;

  const auto running_at = [&](int e) -> double& { return parts.running[blockIdx.x * in.d + e]; };
  const auto running_scale = [&] { return exp2(static_cast<double>(flushed_best - best) * log2_rate); };

  for (int step = 0;; ++step) {
    const Tile tile = shared.ring[step % RING];
    if (tile.flags & DONE) break;
    wait_copies(stages - 2);
    const Tile ahead = shared.ring[(step + stages - 1) % RING];
    if (!(ahead.flags & DONE)) load_tile(ahead, (step + stages - 1) % stages);
    commit_copies();
    if (tid == 0) shared.ring[(step + stages) % RING] = next_tile(in, work, shared.cursor);
    const T* const refs = staging + (step % stages) * stage_size;

    if (tile.flags & BEGIN) {
      row = work.rows[tile.row];
      starts = tile.flags & ROW_START;
      half_alpha = static_cast<float>(0.5 * row.alpha);
      log2_rate = static_cast<float>(row.rate() * LOG2_E);
      best = -INFINITY, total = 0, y_square = 0, unflushed = 0, flushed = false;
      float source_score = 0;
      double square = 0;
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        const int e0 = slot_element(s);
        float mean[EV] = {};
        if (e0 < d) {
          for (int j = 0; j < tile.count; ++j) {
            float r[EV];
            read_slot<T, EV>(refs + j * d + e0, r);
#pragma unroll
            for (int k = 0; k < EV; ++k) mean[k] += r[k];
          }
        }
#pragma unroll
        for (int k = 0; k < EV; ++k) {
          const int q = s * EV + k;
          y[q] = c[q] = sum[q] = 0;
          if (e0 + k >= d) continue;
          const int64_t at = row.index * in.d + e0 + k;
          const float own = starts && in.source.data ? load_as<float>(in.source, at) : 0.0f;
          c[q] = tile.count ? mean[k] / tile.count : own;
          const double exact = row.sign * load_as<double>(in.x, at) - row.alpha * c[q];
          y[q] = static_cast<float>(exact);
          square = fma(exact, exact, square);
          if (starts && in.source.data) {
            sum[q] = own - c[q];
            source_score = fmaf(fmaf(-half_alpha, sum[q], y[q]), sum[q], source_score);
          }
        }
      }
      if (starts && in.lse.data) y_square = block_sum<double>(square, shared.scratch);
      if (starts && in.source.data) {
        best = static_cast<float>(block_sum<double>(source_score, shared.scratch));
        total = isfinite(best) ? 1.0 : NAN;
      }
    }
    if (tile.flags & CENTRE_ONLY) {
      __syncthreads();  // the ring has a new entry
      continue;
    }

    // Scores of the tile: (y - alpha/2 d_j) . d_j
    float score[TR];
    [[maybe_unused]] float kept[KEEP ? TR : 1][KEEP ? Q : 1];
#pragma unroll
    for (int j = 0; j < TR; ++j) score[j] = 0;
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      const int e0 = slot_element(s);
      const bool mine = e0 < d;
#pragma unroll
      for (int j = 0; j < TR; ++j) {
        float r[EV] = {};
        if (mine) read_slot<T, EV>(refs + j * d + e0, r);
#pragma unroll
        for (int k = 0; k < EV; ++k) {
          const int q = s * EV + k;
          const float difference = r[k] - c[q];
          if constexpr (KEEP) kept[j][q] = difference;
          score[j] = fmaf(fmaf(-half_alpha, difference, y[q]), difference, score[j]);
        }
      }
    }
    const float warp_score = warp_sums<TR>(score, lane);
    float (&exchange)[MAX_TILE_REFS][MAX_WARPS] = shared.scores[step % 2];
    if (lane % LANES == 0) exchange[lane / LANES][warp] = warp_score;
    __syncthreads();

    // Every warp finishes the scores for itself: lane l holds reference l / LANES.
    float mine = 0;
    for (int w = lane % LANES; w < WARPS; w += LANES) mine += exchange[lane / LANES][w];
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) mine += __shfl_xor_sync(0xffffffffu, mine, offset);
    const bool valid = lane / LANES < tile.count;
    float top = valid ? mine : -INFINITY;
#pragma unroll
    for (int offset = 16; offset >= LANES; offset /= 2)
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
    const float now = fmaxf(best, top);
    const float keep = best == -INFINITY ? 0.0f : exp2f((best - now) * log2_rate);
    const float weight = valid ? exp2f((mine - now) * log2_rate) : 0.0f;
    float tile_total = weight;
#pragma unroll
    for (int offset = 16; offset >= LANES; offset /= 2)
      tile_total += __shfl_xor_sync(0xffffffffu, tile_total, offset);
    if (tile.count) {  // a tile without references stands for the source alone
      best = now;
      total = total * keep + tile_total;
      float p[TR];
#pragma unroll
      for (int j = 0; j < TR; ++j) p[j] = __shfl_sync(0xffffffffu, weight, j * LANES);
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        float add[EV] = {};
#pragma unroll
        for (int j = 0; j < TR; ++j) {
          float r[EV] = {};
          if constexpr (!KEEP) {
            if (slot_element(s) < d) read_slot<T, EV>(refs + j * d + slot_element(s), r);
          }
#pragma unroll
          for (int k = 0; k < EV; ++k) {
            const int q = s * EV + k;
            float difference;
            if constexpr (KEEP) {
              difference = kept[j][q];
            } else {
              difference = r[k] - c[q];
            }
            add[k] = fmaf(p[j], difference, add[k]);
          }
        }
#pragma unroll
        for (int k = 0; k < EV; ++k) sum[s * EV + k] = fmaf(sum[s * EV + k], keep, add[k]);
      }
    }

    if (!(tile.flags & END)) {
      if (++unflushed < FLUSH_REFS / TR) continue;
      const double scale = flushed ? running_scale() : 0.0;
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        if (element(q) >= d) continue;
        double& running = running_at(element(q));
        running = flushed ? fma(running, scale, static_cast<double>(sum[q])) : sum[q];
        sum[q] = 0;
      }
      unflushed = 0, flushed = true, flushed_best = best;
      continue;
    }
    const double scale = flushed ? running_scale() : 0.0;
    const auto whole_sum = [&](int q) {
      return flushed ? fma(running_at(element(q)), scale, static_cast<double>(sum[q])) : sum[q];
    };
    if (starts && (tile.flags & ROW_END)) {
      const double inverse = 1.0 / total;
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        if (element(q) >= d) continue;
        const int64_t at = row.index * in.d + element(q);
        const double mean = c[q] + whole_sum(q) * inverse;
        store_as(in.out, at, row.a * load_as<double>(in.x, at) + row.b * mean);
      }
      if (in.lse.data && tid == 0) {
        const double shift =
            row.rate() * best - y_square / (2 * row.sigma * row.sigma) + 0.5 * static_cast<double>(in.d);
        store_as(in.lse, row.index, log(total) + shift);
      }
    } else {
      const int64_t slot = 2 * static_cast<int64_t>(blockIdx.x) + (starts ? 1 : 0);
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        const int e = element(q);
        if (e >= d) continue;
        parts.sums[slot * in.d + e] = static_cast<float>(whole_sum(q));
        if (starts) parts.centres[blockIdx.x * in.d + e] = c[q];
      }
      if (tid == 0) {
        parts.max_score[slot] = best;
        parts.total[slot] = total;
        if (starts) parts.y_square[blockIdx.x] = y_square;
      }
    }
  }
}

// Merges what several blocks left of a row, and writes NaN for rows without tiles. Grid: (slices of d, rows).
constexpr int COMBINE_THREADS = 256;

// Elements of a row per block: one a thread where rows are few, so that they still spread over the device.
__host__ __device__ inline int64_t combine_slice(int64_t n) {
  return (n < 64 ? 1 : 4) * COMBINE_THREADS;
}

// At least one, which sees to lse where d = 0.
__host__ __device__ inline int64_t combine_slices(int64_t n, int64_t d) {
  return d > combine_slice(n) ? (d + combine_slice(n) - 1) / combine_slice(n) : 1;
}

__global__ void __launch_bounds__(COMBINE_THREADS)
    combine_kernel(const Inputs in, const WorkList work, const Partials parts, const int64_t blocks) {
  extern __shared__ double weights[];  // (blocks of the row,)
  __shared__ double scratch[COMBINE_THREADS / 32];
  const int64_t slices = combine_slices(in.n, in.d), length = combine_slice(in.n);
  const int64_t i = blockIdx.x / slices, slice = blockIdx.x % slices;
  const int64_t begin = slice * length, end = begin + length < in.d ? begin + length : in.d;
  const int64_t tiles = work.first_tile[in.n], first = work.first_tile[i], last = work.first_tile[i + 1];
  if (first == last) {
    const int64_t index = work.rows[i].index;
    for (int64_t e = begin + threadIdx.x; e < end; e += COMBINE_THREADS)
      store_as(in.out, index * in.d + e, NAN);
    if (in.lse.data && slice == 0 && threadIdx.x == 0) store_as(in.lse, index, NAN);
    return;
  }
  const int64_t from = range_of(tiles, blocks, first), to = range_of(tiles, blocks, last - 1);
  if (from == to) return;
  const Row row = work.rows[i];
  const int count = static_cast<int>(to - from) + 1;
  const auto slot = [&](int j) { return 2 * (from + j) + (j == 0 ? 1 : 0); };
  float top = -INFINITY;
  for (int j = threadIdx.x; j < count; j += COMBINE_THREADS) top = fmaxf(top, parts.max_score[slot(j)]);
  const double best = block_max<double>(top, scratch);
  double share = 0;
  for (int j = threadIdx.x; j < count; j += COMBINE_THREADS) {
    weights[j] = exp(row.rate() * (static_cast<double>(parts.max_score[slot(j)]) - best));
    share += weights[j] * parts.total[slot(j)];
  }
  const double total = block_sum<double>(share, scratch);
  for (int64_t e = begin + threadIdx.x; e < end; e += COMBINE_THREADS) {
    double sum = 0;
#pragma unroll 8
    for (int j = 0; j < count; ++j) sum += weights[j] * parts.sums[slot(j) * in.d + e];
    const int64_t at = row.index * in.d + e;
    const double mean = parts.centres[from * in.d + e] + sum / total;
    store_as(in.out, at, row.a * load_as<double>(in.x, at) + row.b * mean);
  }
  if (in.lse.data && slice == 0 && threadIdx.x == 0) {
    const double shift = row.rate() * best - parts.y_square[from] / (2 * row.sigma * row.sigma);
    store_as(in.lse, row.index, log(total) + shift + 0.5 * static_cast<double>(in.d));
  }
}

}  // namespace svel::cuda
