// Small sets on Hopper's matrix units: float16 or bfloat16 references that the multiprocessors' shared
// memories hold all together, a pool or few classes, beside any number of rows. One cooperative launch:
//
//  * each block brings its slice of its chunk of references to shared memory, where it stays. Blocks of one
//    chunk, of all slices, are a team
//  * scores: of the rows that have its class, the block's share of y.r_j - alpha/2 |d_j|^2, to memory. c is
//    the class's first reference, d_j = r_j - c and y = x - alpha c
//  * when all have: weights. A row has a group of four warps somewhere, which adds up the shares in float64.
//    Where their rounding would be seen in the result, references of weight are scored again, in float64
//  * when all have: sums. Blocks add up their slice of their references, for the rows of their class, and
//    write results; of rows that have several chunks only parts of the sums, which are put together when all
//    have.
//
// Products. y and the weights are sums of values of T (Split), references exact as they are stored. The
// matrix units, which round towards zero, add up few products; what they give joins float32 sums. Of a slice
// y is scaled by a power of two. FAST: a part of the weights less, and sums that the matrix units add up by
// themselves.
//
// Score. -|x - alpha r_j|^2 / 2 is alpha (s_j + alpha/2 |c|^2) less |x|^2 / 2, s_j what shares add up to: for
// rows of one class c is the same, rows of all classes add its part.
#include <algorithm>
#include <type_traits>

#include "common/cluster.cuh"
#include "common/tensor_map.cuh"
#include "common/wgmma.cuh"
#include "stable_target/held_weigh.cuh"
#include "stable_target/launch.cuh"

namespace svel::cuda {
namespace {

// Steps of 16 that the matrix units add up: of scores; of sums, which are small beside their terms where x
// and the mean cancel, one.
constexpr int SCORE_DEPTH = 4, SUM_DEPTH = 1;
constexpr int NORMS_AT_ONCE = 2 * HELD_THREADS / 8;  // references: eight threads form two norms

struct Held {
  // What a score may be off by, of the root of the sum over slices of the square of the largest term: almost
  // twice what it is by emulation.
  static constexpr float ROUNDING = 9e-8f;
  static constexpr int WEIGHTS = 8;  // are left for a multiple of so many references

  CUtensorMap refs;  // (k m, d), boxes of box_refs x HELD_LINE
  int box_refs;
  HeldCut cut;
  int64_t stride;   // references of all classes, in scores and weights
  int padded;       // of a class
  float* scores;    // (n, slices, stride)
  float* sums;      // (teams, n, d), of rows with several chunks
  double* exact;    // (n, stride) scores
  void* weights;    // (parts, n, stride)
  double2* ends;    // (n,) out = x sum w_j r_j + y x
  float* scales;    // (n, teams, slices) the largest terms of shares
  double* centres;  // (k, slices) |c|^2
  float rounding;   // ROUNDING, beside the error that is not seen
};

struct HeldShared {
  union {
    float norms[HELD_MOST_REFS];  // until all have scored
    int list[GROUPS][LISTED];
  };
  float centre[HELD_MOST_SLICE];
  Barrier come[HELD_MOST_REFS / NORMS_AT_ONCE];  // references
  int of_warps[WARPS];
  int class_counts[HELD_MOST_TEAMS], team_counts[HELD_MOST_TEAMS];  // valid references
  // Of a batch, of one after the other. places: where its scores begin, among all; -1: no row.
  int places[2][HELD_BATCH];
  float unscale[2][HELD_BATCH], half_alpha[2][HELD_BATCH], scales[3][HELD_BATCH];
  // Of groups.
  double scratch[GROUPS][GROUP_WARPS];
  int counts[GROUPS][GROUP_WARPS];
  RowFacts facts[GROUPS];
};
static_assert(sizeof(HeldShared) <= HELD_FIXED_SMEM);

// What a block knows of the rows of its class, in their order; ends: of its own.
struct HeldRows {
  double2* ends;       // of Held, when all have scored; until then what comes next
  float *high, *rest;  // alpha in float32, and what that drops
  float* half_alpha;   // with the sign of x, see Row
  int* index;          // in x
  int* place;          // of the class's first reference among the row's scores; PARTLY: it has several chunks

  __device__ HeldRows(char* memory, int64_t n)
      : ends(reinterpret_cast<double2*>(memory)),
        high(reinterpret_cast<float*>(memory)),
        rest(high + n),
        half_alpha(rest + n),
        index(reinterpret_cast<int*>(ends + n)),
        place(index + n) {}
};
static_assert(sizeof(double2) + 2 * sizeof(int) == HELD_ROW_SMEM && sizeof(double2) >= 3 * sizeof(float));
constexpr int PARTLY = 1 << 30;

// Products of HELD_TILE references, or elements of a sum, beside a group of ROWS rows, by a group of warps.
// Shared memory has references and parts of rows in lines of HELD_LINE values, 128 bytes, of which 16 bytes
// lie as rows_of_128_bytes says. References: all of a block's lines for its first HELD_LINE elements, and so
// on. Rows: of a group a line of each for the first part, of each for the second: a box; a box for each
// HELD_LINE of y or weights; then the next group's. A batch's last group is of NARROW rows where no more are
// left.
constexpr int NARROW = static_cast<int>(HELD_NARROW);
constexpr int LINE_BYTES = 128, LINE_CHUNKS = 8, LINE_STEPS = 4;
static_assert(LINE_BYTES == 2 * HELD_LINE);
template <typename T>
struct Tile {
  static constexpr int PARTS = Split<T>::PARTS;
  static constexpr int ROWS = static_cast<int>(held_group(PARTS == 3));
  static constexpr int LINES = PARTS * ROWS, BOX_BYTES = LINES * LINE_BYTES;
};

// acc = a b^T over DEPTH steps of 16, a_step apart in the descriptor of a; under way. acc: what parts come
// to, one after the other; of a row a thread has half a sum, see wgmma.cuh.
template <typename T, int DEPTH, int COLUMNS, int A_STEP, int COUNT>
__device__ __forceinline__ void begin_lines(float (&acc)[COUNT], uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const auto multiply = [&](auto adds, int k) {
    constexpr int ADD = decltype(adds)::value;
    if constexpr (Tile<T>::PARTS == 2) {
      product_shared<ADD, COLUMNS>(acc, a + k * A_STEP, b + 2 * k);
    } else {
      product_shared_bf16<ADD, COLUMNS>(acc, a + k * A_STEP, b + 2 * k);
    }
  };
  start_products();
  multiply(std::integral_constant<int, 0>{}, 0);
#pragma unroll
  for (int k = 1; k < DEPTH; ++k) multiply(std::integral_constant<int, 1>{}, k);
  commit_products();
#endif
}

// sums += a b^T over STEPS steps, the matrix units adding up DEPTH of them.
template <typename T, int STEPS, int DEPTH, int COLUMNS, int A_STEP, int SUMS>
__device__ __forceinline__ void multiply_lines(uint64_t a, uint64_t b, float (&sums)[SUMS]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int PARTS = Tile<T>::PARTS, TURNS = STEPS / DEPTH;
  static_assert(STEPS % DEPTH == 0);
  float acc[TURNS > 1 ? 2 : 1][PARTS * SUMS];
#pragma unroll
  for (int turn = 0; turn <= TURNS; ++turn) {
    if (turn < TURNS)
      begin_lines<T, DEPTH, COLUMNS, A_STEP>(acc[turn % 2], a + turn * DEPTH * A_STEP, b + 2 * turn * DEPTH);
    if (turn == 0) continue;
    float (&made)[PARTS * SUMS] = acc[(turn - 1) % 2];
    if (turn < TURNS) {
      wait_products<1>(made);
    } else {
      wait_products<0>(made);
    }
#pragma unroll
    for (int i = 0; i < SUMS; ++i) {
      float of_parts = made[(PARTS - 1) * SUMS + i];
#pragma unroll
      for (int p = PARTS - 2; p >= 0; --p) of_parts += made[p * SUMS + i];
      sums[i] += of_parts;
    }
  }
#endif
}

// acc = a b^T over `steps` steps, all by the matrix units; b_of: where a step's b is.
template <typename T, int COUNT, typename Of>
__device__ __forceinline__ void multiply_all(uint64_t a, const Of& b_of, int steps, float (&acc)[COUNT]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int REFS_STEP = 16 * LINE_BYTES >> 4;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) acc[i] = 0;
  const auto multiply = [&](auto several, int at) {
    start_products();
#pragma unroll
    for (int k = 0; k < decltype(several)::value; ++k) {
      if constexpr (Tile<T>::PARTS == 2) {
        product_shared<1, 1>(acc, a + (at + k) * REFS_STEP, b_of(at) + 2 * k);
      } else {
        product_shared_bf16<1, 1>(acc, a + (at + k) * REFS_STEP, b_of(at) + 2 * k);
      }
    }
    commit_products();
  };
  int at = 0;
#pragma unroll 1
  for (; at + LINE_STEPS <= steps; at += LINE_STEPS) multiply(std::integral_constant<int, LINE_STEPS>{}, at);
#pragma unroll 1
  for (; at < steps; ++at) multiply(std::integral_constant<int, 1>{}, at);
  wait_products<0>(acc);
#endif
}

// USUAL: x and out are float32, aligned to 16 bytes.
template <typename T, bool USUAL, bool FAST>
struct HeldKernel {
  static constexpr int PARTS = Split<T>::PARTS;
  static constexpr int MOST = static_cast<int>(HELD_MOST_SLICE / 128);  // fours of a lane
  static constexpr int EACH = 2, AT_ONCE = EACH * WARPS;                // rows that are prepared at a time
  static constexpr int ROWS = Tile<T>::ROWS, BOX = Tile<T>::BOX_BYTES, ROW = BOX / ROWS;
  static constexpr int OF_WEIGHT = WEIGHT_PARTS<T, FAST>, SUM_ROWS = Tile<T>::LINES / OF_WEIGHT;
  static_assert(SUM_ROWS == held_sum_group(PARTS == 3, FAST));
  static constexpr int LINE = static_cast<int>(HELD_LINE), TILE = static_cast<int>(HELD_TILE);

  const Inputs& in;
  const Held& held;
  HeldShared& shared;
  const HeldRows list;
  char* const refs;  // (slice / LINE, chunk) lines
  // (buffers, batch / ROWS, boxes, PARTS, ROWS) lines: y; then weights, (groups, sum_boxes, OF_WEIGHT,
  // SUM_ROWS) of a buffer. The last group may be narrow.
  char* const lines;
  const int tid = threadIdx.x, lane = tid % 32, warp = __shfl_sync(0xffffffffu, tid / 32, 0);
  const int chunks = static_cast<int>(held.cut.chunks), slices = static_cast<int>(held.cut.slices);
  const int row_parts = static_cast<int>(held.cut.row_parts), classes = static_cast<int>(in.k);
  const int chunk = static_cast<int>(held.cut.chunk), slice = static_cast<int>(held.cut.slice);
  const int batch = static_cast<int>(held.cut.batch), buffers = static_cast<int>(held.cut.buffers);
  // The block's place.
  const int part = static_cast<int>(blockIdx.x) % row_parts;
  const int rank = static_cast<int>(blockIdx.x) / row_parts % slices;
  const int team = static_cast<int>(blockIdx.x) / (row_parts * slices), teams = classes * chunks;
  const int group = team / chunks, first_ref = team % chunks * chunk, offset = rank * slice;
  const int length = static_cast<int>(min(in.d - offset, int64_t{slice}));
  const int valid = count_of(group, team);
  const int used_boxes = (length + LINE - 1) / LINE, ref_box = chunk * LINE_BYTES;  // in bytes
  const int boxes = (max(slice, chunk) + LINE - 1) / LINE;                          // of a group of rows
  const int sum_boxes = (chunk + LINE - 1) / LINE;                                  // of a group of weights
  int rows = 0, first_row = 0;  // of the class's rows, those of this block,
  int step = 0, sum_step = 0;   // and of a batch: all have as many, or nearly
  bool several = false;         // whether any row has several chunks

  __device__ __forceinline__ int count_of(int its_group, int of_team) const {
    const int count = static_cast<int>(valid_count(in, its_group)) - of_team % chunks * chunk;
    return max(0, min(count, chunk));
  }
  __device__ __forceinline__ bool has_several(int its_group) const { return chunks > 1 || its_group < 0; }
  __device__ __forceinline__ int index_of(int i) const { return list.index[first_row + i]; }

  __device__ __forceinline__ int buffer_of(int turn) const { return turn & (buffers - 1); }  // of one or two
  // Where the lines of the group of row i of a batch begin; whether it is narrow, in a batch of `count` rows.
  __device__ __forceinline__ char* boxes_of(int turn, int i) const {
    return lines + (buffer_of(turn) * batch + i / ROWS * ROWS) * boxes * ROW;
  }
  __device__ __forceinline__ char* weights_of(int turn, int i) const {
    return lines + buffer_of(turn) * batch * boxes * ROW + i / SUM_ROWS * sum_boxes * BOX;
  }
  __device__ __forceinline__ static bool is_narrow(int count, int i) {
    return count - i / ROWS * ROWS <= NARROW;
  }

  // The references, by tensor copies, which leave the way of other loads free, in the order that norms are
  // formed in; by one warp.
  __device__ __forceinline__ void begin_loading() const {
    if (warp != 0) return;
    const int box_refs = held.box_refs, tall = (valid + box_refs - 1) / box_refs,
              bytes = used_boxes * LINE_BYTES;
    if (lane == 0) {
#pragma unroll 1
      for (int turn = 0; turn * NORMS_AT_ONCE < valid; ++turn) {
        init_barrier(&shared.come[turn], 1);
        publish_barriers();
        arrive_expecting(&shared.come[turn],
                         min(NORMS_AT_ONCE, tall * box_refs - turn * NORMS_AT_ONCE) * bytes);
      }
    }
    __syncwarp();
    const int first = static_cast<int>(group * in.m) + first_ref;
#pragma unroll 1
    for (int i = lane; i < tall * used_boxes; i += 32) {
      const int j = i / used_boxes * box_refs, box = i % used_boxes;
      tensor_copy(shared_address(refs) + box * ref_box + j * LINE_BYTES, held.refs, offset + box * LINE,
                  first + j, shared_address(&shared.come[j / NORMS_AT_ONCE]));
    }
  }

  // The rows of this class, in their order, what is to know of them, and which are this block's.
  // own_centre: this thread's element of the centre, for all.
  __device__ __forceinline__ void list_rows(float own_centre) {
#pragma unroll 1
    for (int i = tid; i < teams; i += HELD_THREADS) {
      shared.team_counts[i] = count_of(i / chunks, i);
      if (i < classes) shared.class_counts[i] = static_cast<int>(valid_count(in, i));
    }
    int count = 0;
    bool spread = false;
#pragma unroll 1
    for (int first = 0; first < in.n; first += HELD_THREADS) {
      const int index = first + tid;
      RowFacts facts{};
      if (index < in.n) {
        facts = know_row(in, index);
        // The first row that each group of warps is to weigh.
#pragma unroll
        for (int g = 0; g < GROUPS; ++g)
          if (index == static_cast<int>(blockIdx.x + gridDim.x * g)) shared.facts[g] = facts;
      }
      spread = spread || (facts.any && has_several(facts.group));
      const bool mine = facts.any && valid > 0 && (facts.group < 0 || facts.group == group);
      const unsigned all = __ballot_sync(0xffffffffu, mine);
      if (lane == 0) shared.of_warps[warp] = __popc(all);
      __syncthreads();
      const int of_warp = lane < WARPS ? shared.of_warps[lane] : 0;
      const int place = count + __popc(all & ((1u << lane) - 1)) +
                        __reduce_add_sync(0xffffffffu, lane < warp ? of_warp : 0);
      count += __reduce_add_sync(0xffffffffu, of_warp);
      if (mine) {
        const float high = static_cast<float>(facts.row.alpha);
        list.index[place] = index;
        list.place[place] =
            (facts.group < 0 ? group * held.padded : 0) | (has_several(facts.group) ? PARTLY : 0);
        list.high[place] = high, list.rest[place] = static_cast<float>(facts.row.alpha - high);
        list.half_alpha[place] = copysignf(0.5f * high, static_cast<float>(facts.row.sign));
      }
      if (first == 0 && tid < slice) shared.centre[tid] = own_centre;
      several = __syncthreads_or(spread);
    }
    const int each = ((count + row_parts - 1) / row_parts + 7) / 8 * 8;
    first_row = min(part * each, count), rows = min(each, count - first_row);
    const int turns = max((rows + batch - 1) / batch, 1);
    step = ((rows + turns - 1) / turns + 7) / 8 * 8;
    // As many weights as the lines of a batch of y have room for.
    const int room = batch * boxes / sum_boxes, left = !FAST && room % ROWS >= NARROW ? NARROW : 0;
    const int most = room / ROWS * SUM_ROWS + left, sum_turns = max((rows + most - 1) / most, 1);
    sum_step = ((rows + sum_turns - 1) / sum_turns + 7) / 8 * 8;
  }
  __device__ __forceinline__ int end_of(int first) const { return min(rows, first + step); }

  // |d_j|^2 of the slice, eight threads to a reference, as references come, and |c|^2; the centre is in
  // shared memory. Steps of sums that no reference fills are made zero.
  __device__ __forceinline__ void form_norms() const {
    const int part8 = tid % LINE_CHUNKS;
#pragma unroll 1
    for (int turn = 0; turn * NORMS_AT_ONCE < valid; ++turn) {
      wait_barrier(&shared.come[turn], 0);
      const int first = turn * NORMS_AT_ONCE + tid / LINE_CHUNKS;
      float square[2] = {};
#pragma unroll 1
      for (int box = 0; box < used_boxes; ++box) {
        const float* const centre = shared.centre + box * LINE + 8 * part8;
        const float4 low = *reinterpret_cast<const float4*>(centre),
                     high = *reinterpret_cast<const float4*>(centre + 4);
        const float c[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int j = first + k * (NORMS_AT_ONCE / 2);
          uint4* const place = reinterpret_cast<uint4*>(refs + box * ref_box + chunk_address(0, j, part8));
          if (j >= valid) {
            if (j < (valid + 15) / 16 * 16) *place = make_uint4(0, 0, 0, 0);
            continue;
          }
          const uint4 raw = *place;
          const T* const r = reinterpret_cast<const T*>(&raw);
          float eight = 0;
#pragma unroll
          for (int q = 0; q < 8; ++q) {
            const float apart = to_float(r[q]) - c[q];
            eight = fmaf(apart, apart, eight);
          }
          square[k] += eight;
        }
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int hop = LINE_CHUNKS / 2; hop > 0; hop /= 2)
          square[k] += __shfl_xor_sync(0xffffffffu, square[k], hop);
        const int j = first + k * (NORMS_AT_ONCE / 2);
        if (part8 == 0 && j < valid) shared.norms[j] = square[k];
      }
    }
    if (warp == 0 && first_ref == 0 && part == 0) {
      double square = 0;
#pragma unroll 1
      for (int e = lane; e < slice; e += 32) {
        const double c = shared.centre[e];
        square = fma(c, c, square);
      }
      square = warp_sum(square);
      if (lane == 0) held.centres[group * slices + rank] = square;
    }
  }

  // x of a warp's rows of the batch that begins at `first`, AT_ONCE rows from `from` on.
  __device__ __forceinline__ void load_x(int first, int from, float4 (&x)[EACH][MOST]) const {
    const int end = end_of(first);
    // Those after them are asked for when these are prepared.
    const int next = first + from + AT_ONCE + warp + lane / 16 * WARPS;
    if (USUAL && next < end && lane % 16 * 32 < length)
      prefetch(static_cast<const float*>(in.x.data) + index_of(next) * in.d + offset + lane % 16 * 32);
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const int i = from + warp + k * WARPS;
      const bool is_row = i < batch && first + i < end;
      const int64_t base = is_row ? index_of(first + i) * in.d + offset : 0;
#pragma unroll
      for (int v = 0; v < MOST; ++v) {
        const int e = 128 * v + 4 * lane;
        x[k][v] = make_float4(0, 0, 0, 0);
        if (!is_row || e >= length) continue;
        x[k][v] = USUAL ? *reinterpret_cast<const float4*>(static_cast<const float*>(in.x.data) + base + e)
                        : load_four(in.x, base + e, base + length);
      }
    }
  }

  // Their y, in parts, and what is to know of them. Lines without a row are left as they are: what products
  // make of one line goes to no other.
  __device__ __forceinline__ void prepare(int first, int from, int turn,
                                          const float4 (&x)[EACH][MOST]) const {
    const int end = end_of(first);
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const int i = from + warp + k * WARPS;
      if (i >= batch) continue;
      if (first + i >= end) {
        if (lane == 0) shared.places[turn % 2][i] = -1, shared.scales[turn % 3][i] = 0;
        continue;
      }
      const int its = first_row + first + i;
      const float high = list.high[its], rest = list.rest[its], half_alpha = list.half_alpha[its];
      const float sign = copysignf(1, half_alpha);
      float y[MOST][4], most = 0, scale = 1;
#pragma unroll
      for (int v = 0; v < MOST; ++v) {
        const int e = 128 * v + 4 * lane;
        const float4 c =
            e < slice ? *reinterpret_cast<const float4*>(shared.centre + e) : make_float4(0, 0, 0, 0);
        const auto of = [&](float x, float c) { return fmaf(-rest, c, fmaf(-high, c, sign * x)); };
        y[v][0] = of(x[k][v].x, c.x), y[v][1] = of(x[k][v].y, c.y);
        y[v][2] = of(x[k][v].z, c.z), y[v][3] = of(x[k][v].w, c.w);
#pragma unroll
        for (int q = 0; q < 4; ++q) most = fmaxf(most, fabsf(y[v][q]));
      }
#pragma unroll
      for (int hop = 16; hop > 0; hop /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, hop));
      if (most > 0 && most < 1e30f) {
        const int exponent = static_cast<int>(__float_as_uint(most) >> 23) - 127;  // of a normal number
        scale = __int_as_float((127 + min(12 - exponent, 120)) << 23);
      }
      // A lane's four values are half of 16 bytes.
      const int wide = is_narrow(end - first, i) ? NARROW : ROWS;
      char* const to = boxes_of(turn, i) + lane / 16 * wide * ROW + lane % 2 * 8;
#pragma unroll
      for (int v = 0; v < MOST; ++v) {
        const int e = 128 * v + 4 * lane;
        if (e >= slice) continue;
#pragma unroll
        for (int q = 0; q < 4; ++q) y[v][q] *= scale;
#pragma unroll
        for (int p = 0; p < PARTS; ++p) {
          T own[4];
#pragma unroll
          for (int q = 0; q < 4; ++q) own[q] = Split<T>::nearest(y[v][q]), y[v][q] -= to_float(own[q]);
          *reinterpret_cast<uint2*>(to + 2 * v * wide * ROW +
                                    chunk_address(0, p * wide + i % ROWS, lane % 16 / 2)) =
              make_uint2(pair_of(own[0], own[1]), pair_of(own[2], own[3]));
        }
      }
      if (lane == 0) {
        shared.places[turn % 2][i] =
            static_cast<int>((int64_t{list.index[its]} * slices + rank) * held.stride) +
            (list.place[its] & ~PARTLY) + first_ref;
        shared.unscale[turn % 2][i] = 1 / scale, shared.half_alpha[turn % 2][i] = fabsf(half_alpha);
        shared.scales[turn % 3][i] = 0;
      }
    }
  }

  // Shares of scores of a group of WIDE rows and a tile of references, to memory. A thread has references
  // `mine` and eight more of its warp's sixteen, and of each eight rows two.
  template <int WIDE>
  __device__ __forceinline__ void score_group(int turn, int of_rows, int j0) const {
    const int mine = warp % GROUP_WARPS * 16 + lane / 4, pair = lane % 4 * 2;
    uint64_t a = rows_of_128_bytes(shared_address(refs)) + j0 * (LINE_BYTES >> 4),
             b = rows_of_128_bytes(shared_address(boxes_of(turn, of_rows * ROWS)));
    float sums[WIDE / 2] = {};
#pragma unroll 1
    for (int e = 0; e < length; e += LINE, a += ref_box >> 4, b += WIDE * ROW >> 4)
      multiply_lines<T, LINE_STEPS, SCORE_DEPTH, 0, 2>(a, b, sums);
    float norms[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int j = j0 + mine + 8 * h;
      norms[h] = j < valid ? shared.norms[j] : -1;
    }
    constexpr int PAIRS = WIDE / 8;
    float most[2 * PAIRS];
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const int at = of_rows * ROWS + 8 * i + pair + p;  // in the batch
        const int place = shared.places[turn % 2][at];
        const float unscale = shared.unscale[turn % 2][at], half_alpha = shared.half_alpha[turn % 2][at];
        float* const to = held.scores + place + j0 + mine;
        most[2 * i + p] = 0;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if (place < 0 || norms[h] == -1) continue;
          const float product = sums[4 * i + 2 * h + p] * unscale, norm = half_alpha * norms[h];
          to[8 * h] = product - norm;
          most[2 * i + p] = fmaxf(most[2 * i + p], fabsf(product) + norm);
        }
      }
    }
    // Of eight lanes that have the same rows each is left with one of these, or every second.
#pragma unroll
    for (int hop = 16, left = PAIRS; hop >= 4; hop /= 2, left /= 2) {
      const bool upper = lane & hop;
#pragma unroll
      for (int r = 0; r < max(left, 1); ++r) {
        const float keep = left > 0 && upper ? most[left + r] : most[r],
                    give = left == 0 || upper ? most[r] : most[left + r];
        most[r] = fmaxf(keep, __shfl_xor_sync(0xffffffffu, give, hop));
      }
    }
    const int r = lane / 4 * 2 * PAIRS / 8;
    atomicMax(reinterpret_cast<int*>(&shared.scales[turn % 3][of_rows * ROWS + 8 * (r / 2) + pair + r % 2]),
              __float_as_int(most[0]));
  }
  __device__ __forceinline__ void score(int first, int turn) const {
    const int count = end_of(first) - first;
    const int tiles = (valid + TILE - 1) / TILE, groups = (count + ROWS - 1) / ROWS;
#pragma unroll 1
    for (int item = warp / GROUP_WARPS; item < tiles * groups; item += GROUPS) {
      __syncwarp();
      const int of_rows = item / tiles, j0 = (item - of_rows * tiles) * TILE;
      if (is_narrow(count, of_rows * ROWS)) {
        score_group<NARROW>(turn, of_rows, j0);
      } else {
        score_group<ROWS>(turn, of_rows, j0);
      }
    }
  }

  // x: of the first batch, or on its way.
  __device__ __forceinline__ void score_rows(float4 (&x)[EACH][MOST]) const {
    const auto leave_scales = [&](int turn) {  // when all have scored it
      const int i = turn * step + tid;
      if (tid < step && i >= 0 && i < rows)
        held.scales[(int64_t{index_of(i)} * teams + team) * slices + rank] = shared.scales[turn % 3][tid];
    };
    if (rows == 0) {  // copies must have ended before the block does
#pragma unroll 1
      for (int k = 0; k * NORMS_AT_ONCE < valid; ++k) wait_barrier(&shared.come[k], 0);
    }
    int turn = 0;
#pragma unroll 1
    for (; turn * step < rows; ++turn) {
      if (turn > 0 && buffers == 1) __syncthreads();  // all have scored the one before
      for (int from = 0;;) {
        prepare(turn * step, from, turn, x);
        from += AT_ONCE;
        if (from >= step) break;
        load_x(turn * step, from, x);
      }
      if (turn == 0) form_norms();
      fence_async();
      __syncthreads();
      leave_scales(turn - 1);
      load_x((turn + 1) * step, 0, x);
      score(turn * step, turn);
    }
    __syncthreads();
    leave_scales(turn - 1);
  }

  __device__ __forceinline__ void weigh_rows() const {
    const HeldGroup crew{warp / GROUP_WARPS, tid % GROUP, shared.scratch[warp / GROUP_WARPS]};
    const Weigher<T, FAST, Held, HeldShared> weigh{in, held, shared, crew};
    const RowFacts& facts = shared.facts[crew.number];
    int index = static_cast<int>(blockIdx.x + gridDim.x * crew.number);
    meet_grid();
#pragma unroll 1
    while (index < in.n) {
      weigh(facts);
      index += static_cast<int>(gridDim.x) * GROUPS;
      if (index >= in.n) break;
      crew.wait();  // all have done with the one before
      if (crew.tid == 0) shared.facts[crew.number] = know_row(in, index);
      crew.wait();
    }
  }

  // The weights of the batch that begins at `first`, on their way to shared memory: a warp to a row's part.
  __device__ __forceinline__ void fetch_weights(int first, int turn) const {
    const int count = min(rows, first + sum_step) - first, used = (valid + 15) / 16 * 16;
#pragma unroll 1
    for (int at = warp; at < OF_WEIGHT * count; at += WARPS) {
      const int p = at / count, i = at - p * count, its = first_row + first + i;
      const T* const from = static_cast<const T*>(held.weights) +
                            (int64_t{p} * in.n + list.index[its]) * held.stride + first_ref +
                            (list.place[its] & ~PARTLY);
      const int wide = !FAST && is_narrow(count, i) ? NARROW : SUM_ROWS;
      char* const to = weights_of(turn, i);
      const int line = p * wide + i % SUM_ROWS;
#pragma unroll 1
      for (int j = 8 * lane; j < used; j += 8 * 32) {
        float4* const there = reinterpret_cast<float4*>(to + j / LINE * wide * OF_WEIGHT * LINE_BYTES +
                                                        chunk_address(0, line, j / 8 % LINE_CHUNKS));
        if (j < valid) {
          copy_async(there, reinterpret_cast<const float*>(from + j));
        } else {
          *there = make_float4(0, 0, 0, 0);
        }
      }
    }
  }

  // Sums of a group of WIDE rows and a tile of elements.
  template <int WIDE>
  __device__ __forceinline__ void sum_group(int first, int end, int turn, int of_rows, int tile) const {
    const int steps = (valid + 15) / 16, begin = first + of_rows * SUM_ROWS + lane % 4 * 2;
    // Of a warp's sixteen elements; a whole number of eight. A pass has fewer than 2^31 in all.
    const int e0 = tile * TILE + warp % GROUP_WARPS * 16, left = length - e0, d = static_cast<int>(in.d);
    const int e = offset + e0 + lane / 4;
    constexpr int PAIRS = WIDE / 8, BOX_STEP = WIDE * OF_WEIGHT * LINE_BYTES >> 4;
    float x[PAIRS][2][2] = {};
    if (USUAL && chunks == 1) {
#pragma unroll
      for (int i = 0; i < PAIRS; ++i) {
#pragma unroll
        for (int p = 0; p < 2; ++p) {
          const int its = begin + 8 * i + p;
          const float* const of_row =
              static_cast<const float*>(in.x.data) + (index_of(min(its, end - 1)) * d + e);
#pragma unroll
          for (int h = 0; h < 2; ++h)
            if (its < end && 8 * h < left) x[i][p][h] = of_row[8 * h];
        }
      }
    }
    __syncwarp();
    const uint64_t a = rows_of_128_bytes(shared_address(refs)) + tile * (ref_box >> 4),
                   b = rows_of_128_bytes(shared_address(weights_of(turn, of_rows * SUM_ROWS)));
    const auto b_of = [&](int at) { return b + at / LINE_STEPS * BOX_STEP + at % LINE_STEPS * 2; };
    constexpr int OF_ROWS = WIDE / 2;  // sums of a thread
    float sums[FAST ? OF_WEIGHT * OF_ROWS : OF_ROWS] = {};
    if constexpr (FAST) {
      if constexpr (OF_WEIGHT == 1) {
        if (end - first - of_rows * SUM_ROWS <= SUM_ROWS / 2) {  // the other half of the lines has no rows
          multiply_all<T>(a, b_of, steps, reinterpret_cast<float (&)[OF_ROWS / 2]>(sums));
        } else {
          multiply_all<T>(a, b_of, steps, sums);
        }
      } else {
        multiply_all<T>(a, b_of, steps, sums);
#pragma unroll
        for (int i = 0; i < OF_ROWS; ++i) sums[i] += sums[i + OF_ROWS];
      }
    } else {
      constexpr int REFS_STEP = 16 * LINE_BYTES >> 4;
      int at = 0;
#pragma unroll 1
      for (; at + LINE_STEPS <= steps; at += LINE_STEPS)
        multiply_lines<T, LINE_STEPS, SUM_DEPTH, 1, REFS_STEP>(a + at * REFS_STEP, b_of(at), sums);
#pragma unroll 1
      for (; at < steps; ++at) multiply_lines<T, 1, 1, 1, REFS_STEP>(a + at * REFS_STEP, b_of(at), sums);
    }
    // All in a row, for rows that there are not too, so that one does not wait for another.
    float* const parts = held.sums + team * in.n * in.d;
    const auto each_row = [&](const auto& visit) {  // visit(index, its, is_row, i, p)
#pragma unroll
      for (int i = 0; i < PAIRS; ++i) {
#pragma unroll
        for (int p = 0; p < 2; ++p) {
          const int its = begin + 8 * i + p, known = min(its, end - 1);
          visit(index_of(known) * d + e, known, its < end, i, p);
        }
      }
    };
    if (chunks > 1) {
      each_row([&](int at, int, bool is_row, int i, int p) {
#pragma unroll
        for (int h = 0; h < 2; ++h)
          if (is_row && 8 * h < left) parts[at + 8 * h] = sums[4 * i + 2 * h + p];
      });
      return;
    }
    each_row([&](int at, int its, bool is_row, int i, int p) {
      const double2 by = list.ends[its];
      const bool partly = list.place[first_row + its] & PARTLY;
      float* const to = (partly ? parts : static_cast<float*>(in.out.data)) + at;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float sum = sums[4 * i + 2 * h + p];
        const double mean = by.x * static_cast<double>(sum);
        if (USUAL) {
          const float result = static_cast<float>(fma(by.y, static_cast<double>(x[i][p][h]), mean));
          if (is_row && 8 * h < left) to[8 * h] = partly ? sum : result;
        } else if (is_row && 8 * h < left) {
          if (partly) {
            to[8 * h] = sum;
          } else {
            store_as(in.out, at + 8 * h, fma(by.y, load_as<double>(in.x, at + 8 * h), mean));
          }
        }
      }
    });
  }
  __device__ __forceinline__ void sum(int first, int turn) const {
    const int end = min(rows, first + sum_step), count = end - first;
    const int tiles = (length + TILE - 1) / TILE, groups = (count + SUM_ROWS - 1) / SUM_ROWS;
    // To and fro: who has a wide group more than others has a narrow one less.
    int own = warp / GROUP_WARPS;
#pragma unroll 1
    for (int item = own; item < tiles * groups;
         item += GROUPS + GROUPS - 1 - 2 * own, own = GROUPS - 1 - own) {
      const int of_rows = item / tiles, tile = item - of_rows * tiles;
      if (!FAST && is_narrow(count, of_rows * ROWS)) {
        sum_group<FAST ? SUM_ROWS : NARROW>(first, end, turn, of_rows, tile);
      } else {
        sum_group<SUM_ROWS>(first, end, turn, of_rows, tile);
      }
    }
  }

  __device__ __forceinline__ void sum_rows() const {
    fetch_weights(0, 0);
#pragma unroll 1
    for (int i = tid; i < rows; i += HELD_THREADS)
      copy_async(reinterpret_cast<float4*>(list.ends + i),
                 reinterpret_cast<const float*>(held.ends + index_of(i)));
#pragma unroll 1
    for (int turn = 0; turn * sum_step < rows; ++turn) {
      wait_copies();
      fence_async();
      __syncthreads();
      if (buffers == 2) fetch_weights((turn + 1) * sum_step, turn + 1);
      sum(turn * sum_step, turn);
      if (buffers == 2 || (turn + 1) * sum_step >= rows) continue;
      __syncthreads();
      fetch_weights((turn + 1) * sum_step, turn + 1);
    }
    wait_copies();
  }

  // Of rows with several chunks: four elements at a time, in two places, where all that is read is asked for
  // before any of it is used.
  __device__ __forceinline__ void put_together() const {
    constexpr int PLACES = 2, AHEAD = 4;
    const int fours = static_cast<int>(in.d / 4), all = static_cast<int>(in.n) * fours;
    const int apart = static_cast<int>(gridDim.x) * HELD_THREADS;
#pragma unroll 1
    for (int i = static_cast<int>(blockIdx.x) * HELD_THREADS + tid; i < all; i += PLACES * apart) {
      int64_t to[PLACES], labels[PLACES];
      double2 by[PLACES];
      float4 x[PLACES], sums[PLACES];
      int index[PLACES], begin[PLACES], end[PLACES], most = 0;
      bool any[PLACES];
#pragma unroll
      for (int q = 0; q < PLACES; ++q) {
        const int at = min(i + q * apart, all - 1);
        index[q] = at / fours, to[q] = int64_t{index[q]} * in.d + 4 * (at - index[q] * fours);
        labels[q] = in.labels && classes > 1 ? in.labels[index[q]] : 0;
        by[q] = __ldcg(held.ends + index[q]);
        if (USUAL)
          x[q] = __ldcg(reinterpret_cast<const float4*>(static_cast<const float*>(in.x.data) + to[q]));
      }
#pragma unroll
      for (int q = 0; q < PLACES; ++q) {
        const bool served = i + q * apart < all && labels[q] >= -1 && labels[q] < classes &&
                            has_several(static_cast<int>(labels[q])) && row_is_finite(in, index[q]);
        begin[q] = served && labels[q] >= 0 ? static_cast<int>(labels[q]) * chunks : 0;
        end[q] = !served ? 0 : labels[q] < 0 ? teams : begin[q] + chunks;
        most = max(most, end[q] - begin[q]);
        sums[q] = make_float4(0, 0, 0, 0), any[q] = false;
      }
#pragma unroll 1
      for (int first = 0; first < most; first += AHEAD) {
        float4 v[PLACES][AHEAD];
#pragma unroll
        for (int q = 0; q < PLACES; ++q) {
#pragma unroll
          for (int s = 0; s < AHEAD; ++s) {
            const int k = begin[q] + first + s;
            const bool is_there = k < end[q] && shared.team_counts[min(k, teams - 1)] > 0;
            any[q] = any[q] || is_there;
            const float* const from = held.sums + int64_t{k} * in.n * in.d + to[q];
            v[q][s] = is_there ? __ldcg(reinterpret_cast<const float4*>(from)) : make_float4(0, 0, 0, 0);
          }
        }
#pragma unroll
        for (int q = 0; q < PLACES; ++q)
#pragma unroll
          for (int s = 0; s < AHEAD; ++s)
            sums[q].x += v[q][s].x, sums[q].y += v[q][s].y, sums[q].z += v[q][s].z, sums[q].w += v[q][s].w;
      }
#pragma unroll
      for (int q = 0; q < PLACES; ++q) {
        if (!any[q]) continue;  // not served, or NaN is there
        if (USUAL) {
          const auto result = [&](float x, float sum) {
            return static_cast<float>(
                fma(by[q].y, static_cast<double>(x), by[q].x * static_cast<double>(sum)));
          };
          *reinterpret_cast<float4*>(static_cast<float*>(in.out.data) + to[q]) =
              make_float4(result(x[q].x, sums[q].x), result(x[q].y, sums[q].y), result(x[q].z, sums[q].z),
                          result(x[q].w, sums[q].w));
        } else {
          const float own[4] = {sums[q].x, sums[q].y, sums[q].z, sums[q].w};
          for (int e = 0; e < 4; ++e)
            store_as(in.out, to[q] + e,
                     fma(by[q].y, load_as<double>(in.x, to[q] + e), by[q].x * static_cast<double>(own[e])));
        }
      }
    }
  }

  __device__ __forceinline__ void run() {
    // What rows need is asked for before copies are in its way.
    for (int64_t index = tid; index < in.n; index += HELD_THREADS) {
      if (in.labels) prefetch(in.labels + index);
      prefetch(static_cast<const char*>(in.time_or_alpha.data) + index * size_of(in.time_or_alpha.dtype));
    }
    const T* const centre = static_cast<const T*>(in.refs.data) + int64_t{group} * in.m * in.d + offset;
    float own_centre = 0;
    if (valid > 0 && tid < length) own_centre = to_float(centre[tid]);
    begin_loading();
    list_rows(own_centre);
    float4 x[EACH][MOST];
    load_x(0, 0, x);
    score_rows(x);
    weigh_rows();
    meet_grid();
    sum_rows();
    if (!several) return;
    meet_grid();
    put_together();
  }
};

template <typename T, bool USUAL, bool FAST = false>
__global__ void __launch_bounds__(HELD_THREADS, 1)
    held_kernel(const __grid_constant__ Inputs in, const __grid_constant__ Held held) {
  extern __shared__ __align__(1024) char memory[];
  char* const refs = memory + (HELD_ALIGNMENT - shared_address(memory) % HELD_ALIGNMENT) % HELD_ALIGNMENT;
  char* const lines = refs + held_refs_smem(held.cut);
  char* const rest = lines + held_lines_smem(held.cut, Split<T>::PARTS == 3);
  HeldShared& shared = *reinterpret_cast<HeldShared*>(rest);
  const HeldRows list(rest + HELD_FIXED_SMEM, in.n);
  HeldKernel<T, USUAL, FAST>{in, held, shared, list, refs, lines}.run();
}

}  // namespace

void run_held(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream) {
  const bool bf16 = in.refs.dtype == Dtype::bf16;
  Held held{};
  held.cut = held_cut(plan, in.k, in.m);
  held.padded = static_cast<int>(held_padded(in.m)), held.stride = in.k * held.padded;
  held.rounding = Held::ROUNDING / (plan.fast ? MOST_ERROR_OF_FAST_SCORES : MOST_ERROR_OF_SCORES);
  // Of a chunk a whole number.
  held.box_refs = static_cast<int>(std::min(held.cut.chunk & -held.cut.chunk, HELD_TILE));
  held.refs = map_rows(op, in.refs.data, in.refs.dtype, in.d, in.k * in.m, 2 * in.d, held.box_refs);
  const HeldLayout layout = held_layout(plan.rows_per_pass, in.k, in.m, in.d, bf16, held.cut);
  char* next = static_cast<char*>(workspace);
  const auto take = [&](int64_t bytes) {
    char* const piece = next;
    next += bytes;
    return static_cast<void*>(piece);
  };
  held.scores = static_cast<float*>(take(layout.scores));
  held.sums = static_cast<float*>(take(layout.sums));
  held.exact = static_cast<double*>(take(layout.exact));
  held.weights = take(layout.weights);
  held.ends = static_cast<double2*>(take(layout.ends));
  held.scales = static_cast<float*>(take(layout.scales));
  held.centres = static_cast<double*>(take(layout.centres));
  const bool usual = is_vector(in.x) && is_vector(in.out);
  const auto kernel_of = [&](auto value) {
    using T = decltype(value);
    if (!usual) return held_kernel<T, false>;
    // Where a block has no more rows than a product of "exact", that is the quicker: 256 x 256 x 4,096 33 us
    // for 36 (H200). Of classes nobody knows.
    const bool few = !in.labels && plan.rows_per_pass <= Tile<T>::ROWS * held.cut.row_parts;
    return plan.fast && !few ? held_kernel<T, true, true> : held_kernel<T, true>;
  };
  const auto kernel = bf16 ? kernel_of(__nv_bfloat16{}) : kernel_of(__half{});
  check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(plan.smem_bytes)));
  for (int64_t first = 0; first < in.n; first += plan.rows_per_pass)
    launch_together(op, kernel, plan.blocks, HELD_THREADS, plan.smem_bytes, stream,
                    slice_rows(in, first, plan.rows_per_pass), held);
}

}  // namespace svel::cuda
