// What float32 scores of class banks cannot tell. A score y.d - alpha/2 |d|^2 is off by its float32 sums,
// which matters where scores are large beside the differences of those that have weight: for rows at a small
// t that lie between references. At the end of a segment a row's weights tell whether that may be
// (score_error): the usual row at a small t has one reference with all the weight, and any score will do.
// Else the tiles that had weight are taken once more, from memory and in float64 (review_segment).
//
// Where a unit has several segments, or parts in several blocks, most of them do not count in the end. So
// what a part depends on is noted (Single), and when all are together those that matter are settled: one
// reference by its score in float64, several by all of the part's references.
#pragma once

#include <cfloat>

#include "stable_target/bulk_parts.cuh"

namespace svel::cuda {

constexpr float LIMIT_OF_ERROR = 1.2e-6f;      // of a row, that float32 scores may cause
constexpr double SHARE_THAT_COUNTS = 0x1p-26;  // of a part among all

// The logarithm in float64 is for results of several devices to be merged by: its own error counts.
__device__ __forceinline__ bool wants_exact_lse(const Inputs& in) {
  return in.lse.data && in.lse.dtype == Dtype::f64;
}

// How far a row's result may be off, of its size, where half of its weight lies with other references: one
// standard deviation. best: the largest score, in units of log 2; norm: |d|^2 of the usual reference; square:
// |y|^2. A thread's 16 terms of y.d, which add up to a part of the whole and go their own ways by |y| |d|,
// are rounded one by one, those of |d|^2 too, then all sums of threads.
__device__ __forceinline__ float score_error(const RowState& row, double best, float norm, float square,
                                             int d) {
  constexpr float UNIT = 7e-8f;
  const float score = __fdividef(static_cast<float>(best), row.rate), of_norm = row.half_alpha * norm;
  const float product = score + of_norm;
  const float errors =  // squared, in units of float32
      __fdividef(1, static_cast<float>(d)) *
          (15 * product * product + 2.7f * square * norm + 17.6f * of_norm * of_norm) +
      0.3f * score * score;
  const float apart = fmaxf(square - 4 * row.half_alpha * score, 1e-6f * square);  // |y - alpha d|^2
  // From the mean to the result: 1 + alpha |d| / |y - alpha d|.
  const float root = errors * rsqrtf(fmaxf(errors, FLT_MIN)),
              ratio = norm * rsqrtf(fmaxf(norm * apart, FLT_MIN));
  return UNIT * row.rate * root * fmaf(2 * row.half_alpha, ratio, 1.0f);
}

// Of a segment: whether its scores may be off by what matters among themselves, and else the reference that
// its weight depends on.
struct Judgement {
  bool settles;
  Single single;
};
__device__ __forceinline__ Single no_single() {
  return {Single::NONE, 0, 0};
}
// error: see score_error; lead, source: the largest weight of a reference, `record`, and that of the source,
// of `total`.
__device__ __forceinline__ Judgement judge(const Inputs& in, float error, float lead, float source,
                                           double total, int64_t record) {
  if (!(0.5f * error > LIMIT_OF_ERROR)) return {false, no_single()};
  const float all = static_cast<float>(total),
              rest = static_cast<float>(total - static_cast<double>(fmaxf(lead, source)));
  const bool settles = error * fminf(rest, 0.5f * all) > LIMIT_OF_ERROR * all;
  return {settles, {source > lead ? Single::SOURCE : record, error, fmaxf(lead, source)}};
}
// What a part depends on with a segment more: `before` and `by` are what that of earlier segments, and that
// of the segment, are to be multiplied by; `older` and `newer` their weights then.
__device__ __forceinline__ Single join(double before, double older, double by, double newer, Single earlier,
                                       Single single) {
  const float error = fmaxf(single.error, earlier.error);  // 0 where there is none
  if (error * fmin(older, newer) > LIMIT_OF_ERROR * (older + newer)) return {Single::SEVERAL, error, 0};
  earlier.lead *= static_cast<float>(before), single.lead *= static_cast<float>(by);
  return older > newer ? earlier : single;
}
// Whether a unit's only part has to be settled.
__device__ __forceinline__ bool has_to_be_settled(const Inputs& in, const Single& single) {
  return single.reference == Single::SEVERAL || (single.reference != Single::NONE && wants_exact_lse(in));
}

// Threads of a block that work together, at a barrier of their own. scratch: two float64 for each warp.
struct GroupCrew {
  int tid, threads, barrier;
  double* scratch;

  __device__ __forceinline__ void wait() const {
    if (threads == 32) {
      __syncwarp();
    } else {
      named_barrier(barrier, threads);
    }
  }
};

// A row, for scores as those of parts, in units of log 2.
struct ExactRow {
  Array x;
  int64_t index;
  double alpha, sign, per_square;
  int64_t centre;  // which scores are relative to; -1: none, they are -|x - alpha r|^2 / (2 sigma^2)
};

__device__ __forceinline__ ExactRow exact_row(const Inputs& in, const RowState& row, int64_t centre) {
  return {{row.x, in.x.dtype}, row.index, row.alpha, row.sign, row.per_square, centre};
}

// A share of the scores of COUNT vectors, from four elements on and every `step`: load(i, e) gives four.
template <int COUNT, typename LoadX, typename LoadCentre, typename Load>
__device__ __forceinline__ void score_exactly(const ExactRow& row, int from, int step, int d,
                                              const LoadX& load_x, const LoadCentre& load_centre,
                                              const Load& load, double (&scores)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) scores[i] = 0;
#pragma unroll 4
  for (int e = from; e < d; e += step) {
    const float4 x = load_x(e), c = row.centre >= 0 ? load_centre(e) : make_float4(0, 0, 0, 0);
    float4 r[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) r[i] = load(i, e);
    const auto add = [&](float x, float c, const auto& of) {
      const double signed_x = row.sign * static_cast<double>(x);
      const double y = fma(-row.alpha, static_cast<double>(c), signed_x),
                   level = row.centre >= 0 ? y * y : 0.0;
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const double gap = fma(-row.alpha, static_cast<double>(of(r[i])), signed_x);
        scores[i] += fma(-gap, gap, level);
      }
    };
    add(x.x, c.x, [](const float4& v) { return v.x; });
    add(x.y, c.y, [](const float4& v) { return v.y; });
    add(x.z, c.z, [](const float4& v) { return v.z; });
    add(x.w, c.w, [](const float4& v) { return v.w; });
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) scores[i] = row.per_square * warp_sum(scores[i]);
}

// Of a segment, what is to be reviewed.
struct Review {
  int64_t first;  // of its references, among all k m
  int references, tiles;
  const uint8_t* weighty;  // (tiles,) those that had weight, from the segment's last one on; null: all
  bool source;             // the row's own source too
  PartRow before;          // what `sums` hold already; nothing where log2_weight is -INFINITY
  double* sums;
};

// Four elements of a reference.
template <typename T>
__device__ __forceinline__ float4 load_reference(const T* from) {
  struct alignas(4 * sizeof(T)) Four {
    T v[4];
  };
  const Four four = *reinterpret_cast<const Four*>(from);
  return make_float4(to_float(four.v[0]), to_float(four.v[1]), to_float(four.v[2]), to_float(four.v[3]));
}

// Of the reference that a part names, by a warp. Given that, the logarithm of what the part's weights are
// multiplied by.
template <typename T>
__device__ __noinline__ double score_single(const Inputs& in, const ExactRow& row, int64_t single, int lane) {
  const int d = static_cast<int>(in.d);
  const auto load = [&](const Array& from, int64_t index, int e) {
    return load_four(from, index * in.d + e, index * in.d + in.d);
  };
  const T* const refs = static_cast<const T*>(in.refs.data);
  const float* const x = static_cast<const float*>(row.x.data) + row.index * in.d;
  const auto load_centre = [&](int e) { return load_reference(refs + row.centre * in.d + e); };
  double score[1];
  if (single == Single::SOURCE) {
    score_exactly<1>(
        row, 4 * lane, 128, d, [&](int e) { return load(row.x, row.index, e); }, load_centre,
        [&](int, int e) { return load(in.source, row.index, e); }, score);
  } else if (row.x.dtype == Dtype::f32 && (reinterpret_cast<uintptr_t>(x) & 15) == 0) {
    score_exactly<1>(
        row, 4 * lane, 128, d, [&](int e) { return *reinterpret_cast<const float4*>(x + e); }, load_centre,
        [&](int, int e) { return load_reference(refs + single * in.d + e); }, score);
  } else {
    score_exactly<1>(
        row, 4 * lane, 128, d, [&](int e) { return load(row.x, row.index, e); }, load_centre,
        [&](int, int e) { return load_reference(refs + single * in.d + e); }, score);
  }
  return score[0];
}
template <typename T>
__device__ __forceinline__ double log2_weight_of(const Inputs& in, const ExactRow& row, const Single& single,
                                                 int lane) {
  return score_single<T>(in, row, single.reference, lane) - log2(static_cast<double>(single.lead));
}

// Adds a segment of tiles of TR references to a part's sums. Returns what they hold. Each warp takes a tile;
// where blocks have slices of D, all warps together one after the other.
template <typename T, int TR, typename Crew>
__device__ __noinline__ PartRow review_segment(const Inputs& in, const ExactRow& row, const RowPlace& place,
                                               const Review& review, const Crew& crew) {
  const int lane = crew.tid % 32, warp = crew.tid / 32, warps = crew.threads / 32, d = static_cast<int>(in.d);
  const int split = place.slices > 1 ? warps : 1, most = warps / split;  // warps to a tile; tiles at once
  const T* const refs = static_cast<const T*>(in.refs.data) + review.first * in.d;
  PartRow all = review.before;
  bool written = all.log2_weight > -INFINITY;
  // Adds vectors, one to each of the first `count` lanes, at `at`: load(at, e) gives four of its elements in
  // the slice.
  const auto add = [&](int count, double score, int64_t at, const auto& load) {
    if (lane >= count) score = -INFINITY;
    double best = fmax(all.log2_weight, score);
    for (int hop = 16; hop > 0; hop /= 2) best = fmax(best, __shfl_xor_sync(0xffffffffu, best, hop));
    const double by = exp2(all.log2_weight - best), weight = exp2(score - best);
    const double added = warp_sum(weight);
    all = {best, fma(by, all.total, added)};
    if (by == 1 && added < 0x1p-60) return;
    const unsigned heavy = __ballot_sync(0xffffffffu, weight > 0x1p-70);
#pragma unroll 1
    for (int e = 4 * crew.tid; e - 4 * lane < place.length; e += 4 * crew.threads) {
      const bool within = e < place.length;
      double v[4] = {};
      if (written && within) add_sums(review.sums + e, by, v);
      for (unsigned left = heavy; left != 0;) {
        constexpr int AT_ONCE = 4;
        float4 r[AT_ONCE];
        double w[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
          const int from = left != 0 ? __ffs(static_cast<int>(left)) - 1 : 0;
          w[i] = __shfl_sync(0xffffffffu, weight, from);
          const int64_t of = __shfl_sync(0xffffffffu, at, from);
          r[i] = make_float4(0, 0, 0, 0);
          if (left != 0 && within) r[i] = load(of, e);
          left &= left - 1;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
          v[0] = fma(w[i], static_cast<double>(r[i].x), v[0]),
          v[1] = fma(w[i], static_cast<double>(r[i].y), v[1]);
          v[2] = fma(w[i], static_cast<double>(r[i].z), v[2]),
          v[3] = fma(w[i], static_cast<double>(r[i].w), v[3]);
        }
      }
      if (within) store_sums(review.sums + e, v);
    }
    written = true;
  };

  int scanned = 0;
  unsigned left = 0;  // tiles with weight among the last 32 that were scanned
  const auto next = [&] {
    while (left == 0 && scanned < review.tiles) {
      const int tile = scanned + lane;
      const bool weighs = tile < review.tiles && (!review.weighty || review.weighty[review.tiles - 1 - tile]);
      left = __ballot_sync(0xffffffffu, weighs);
      scanned += 32;
    }
    if (left == 0) return -1;
    const int tile = scanned - 32 + __ffs(static_cast<int>(left)) - 1;
    left &= left - 1;
    return tile;
  };
  const bool fast = row.x.dtype == Dtype::f32 && place.vectors;
  const float* const x = static_cast<const float*>(row.x.data) + row.index * in.d;
  const T* const centre = static_cast<const T*>(in.refs.data) + row.centre * in.d;
  crew.wait();  // others have written some of the sums
#pragma unroll 1
  for (;;) {
    int count = 0, mine = -1, tile_of_lane = 0;
#pragma unroll 1
    for (; count < most; ++count) {
      const int tile = next();
      if (tile < 0) break;
      if (count == warp / split) mine = tile;
      if (count == lane) tile_of_lane = tile;
    }
    if (count == 0) break;
    if (mine >= 0) {
      double scores[TR];
      const int many = review.references - mine * TR;
      const T* const tile = refs + int64_t{mine} * TR * in.d;
      const int from = 4 * (warp % split * 32 + lane), step = 128 * split;
      const auto load = [&](int i, int e) { return load_reference(tile + (i < many ? i : 0) * in.d + e); };
      const auto load_centre = [&](int e) { return load_reference(centre + e); };
      if (fast) {
        score_exactly<TR>(
            row, from, step, d, [&](int e) { return *reinterpret_cast<const float4*>(x + e); }, load_centre,
            load, scores);
      } else {
        score_exactly<TR>(
            row, from, step, d,
            [&](int e) { return load_four(row.x, row.index * in.d + e, row.index * in.d + in.d); },
            load_centre, load, scores);
      }
      if (lane == 0) {
#pragma unroll
        for (int i = 0; i < TR; ++i) crew.scratch[warp * TR + i] = i < many ? scores[i] : -INFINITY;
      }
    }
    crew.wait();
    double score = 0;
    for (int w = 0; w < split; ++w)
      score += crew.scratch[lane < count * TR ? (lane / TR * split + w) * TR + lane % TR : 0];
    const int tile = __shfl_sync(0xffffffffu, tile_of_lane, lane / TR);
    add(count * TR, score, (int64_t{tile} * TR + lane % TR) * in.d + place.offset,
        [&](int64_t of, int e) { return load_reference(refs + of + e); });
    crew.wait();
  }
  if (review.source) {
    const double score = score_single<T>(in, row, Single::SOURCE, lane);
    const int64_t base = row.index * in.d + place.offset;
    add(1, score, base, [&](int64_t of, int e) { return load_four(in.source, of + e, base + place.length); });
    crew.wait();
  }
  return all;
}

// The row's result from its sums.
__device__ __noinline__ static void store_reviewed(const Inputs& in, const RowPlace& place, const RowEnd& end,
                                                   const RowState& row, const double* sums, int tid,
                                                   int threads) {
#pragma unroll 1
  for (int e = 4 * tid; e < place.length; e += 4 * threads) {
    double v[4] = {};
    add_sums(sums + e, 1, v);
    store_row(in, place, end, e, 1 / end.own.total, load_x(in, place, row, e), v);
  }
}

// The tiles of a unit that a team has.
__device__ __forceinline__ void tiles_of_team(const UnitList& list, int number, int64_t teams, int64_t team,
                                              int64_t& from, int64_t& to) {
  const Ranges ranges(list, teams);
  const int64_t low = ranges.begin(team), high = ranges.begin(team + 1), begin = list.begins[number];
  const Unit& unit = list.units[number];
  from = low <= begin ? 0 : divide(low - begin + unit.weight - 1, unit.weight);
  to = min(divide(high - begin + unit.weight - 1, unit.weight), unit.tiles);
}

// A row's part afresh, all its references: tiles [from, to) of the unit, of tile_refs each.
template <typename T, typename Crew>
__device__ __noinline__ PartRow review_part(const Inputs& in, const UnitList& list, int number, int64_t from,
                                            int64_t to, int tile_refs, const ExactRow& row,
                                            const RowPlace& place, double* sums, const Crew& crew) {
  constexpr int TR = 2;  // of review_segment, whatever they are here
  const Unit& unit = list.units[number];
  PartRow all{-INFINITY, 0};
#pragma unroll 1
  while (from < to) {
    const ClassTiles tiles = class_of(in, list, unit, from);
    const int64_t stop = min(tiles.end, to), before = (from - tiles.begin) * tile_refs;
    const int references = static_cast<int>(min(tiles.count - before, (stop - from) * tile_refs));
    from = stop;
    const bool source = in.source.data && stop == unit.tiles;
    all = review_segment<T, TR>(
        in, row, place,
        {tiles.first + before, references, (max(references, 0) + TR - 1) / TR, nullptr, source, all, sums},
        crew);
  }
  return all;
}

// Where parts are merged.
__device__ __forceinline__ ExactRow row_of_parts(const Inputs& in, int64_t index) {
  const Row row = row_coefficients(in, index);
  const int64_t group = in.labels ? in.labels[index] : 0;
  return {x_of(in, index),
          index,
          row.alpha,
          row.sign,
          LOG2_E / (2 * row.sigma * row.sigma),
          in.lse.data || group < 0 ? -1 : group * in.m};
}

__device__ __forceinline__ Single load_single(const BulkParts& parts, int64_t part) {
  const int4 raw = __ldcg(reinterpret_cast<const int4*>(parts.singles + part));
  return {static_cast<int64_t>(static_cast<uint32_t>(raw.x)) | static_cast<int64_t>(raw.y) << 32,
          __int_as_float(raw.z), __int_as_float(raw.w)};
}

// Whether a part of that share of all has to be settled.
__device__ __forceinline__ bool has_to_be_settled(const Inputs& in, const BulkParts& parts, int64_t part,
                                                  double share, double total) {
  if (!parts.singles || !(share > SHARE_THAT_COUNTS * total)) return false;
  const Single single = load_single(parts, part);
  if (single.reference == Single::NONE) return false;
  const double counts = single.reference == Single::SEVERAL ? share : fmin(share, total - share);
  return wants_exact_lse(in) || single.error * counts > LIMIT_OF_ERROR * total;
}

// Before the parts of a row, all of them in memory, are merged: where some have to be settled, all that may
// count are, by the threads that merge them. Returns the parts together.
template <typename T>
__device__ __noinline__ void settle_row(const Inputs& in, const UnitList& list, const BulkParts& parts,
                                        const RowPlace& place, const RowEnd& end, int64_t teams,
                                        int tile_refs, double log2_weight, const GroupCrew& crew) {
  const int lane = crew.tid % 32;
  const ExactRow row = row_of_parts(in, end.index);
#pragma unroll 1
  for (int64_t team = end.from; team <= end.to; ++team) {
    const int64_t part = place.part_of(team, team == end.from, end.row);
    const Single single = load_single(parts, part);
    PartRow own = part_row(parts, place, end, team);
    const bool counts = single.reference != Single::NONE && own.log2_weight - log2_weight > -64;
    if (counts && single.reference == Single::SEVERAL) {
      int64_t from, to;
      tiles_of_team(list, end.unit, teams, team, from, to);
      own = review_part<T>(in, list, end.unit, from, to, tile_refs, row, place,
                           parts.sums + part * place.slice, crew);
    } else if (counts) {
      own.log2_weight = log2_weight_of<T>(in, row, single, lane);
    }
    crew.wait();  // all have read the part
    if (crew.tid == 0)
      __stcg(reinterpret_cast<double2*>(parts.rows + part), make_double2(own.log2_weight, own.total));
  }
  crew.wait();
}

template <typename T>
__device__ __forceinline__ void settle_parts(const Inputs& in, const UnitList& list, const BulkParts& parts,
                                             const RowPlace& place, const RowEnd& end, int64_t teams,
                                             int tile_refs, const GroupCrew& crew, PartsTogether& together) {
  const int lane = crew.tid % 32;
  bool unsure = false;
  if (end.from + lane <= end.to) {
    const int64_t team = end.from + lane;
    unsure = has_to_be_settled(in, parts, place.part_of(team, team == end.from, end.row), together.share,
                               together.all.total);
  }
#pragma unroll 1
  for (int64_t team = end.from + 32 + lane; team <= end.to; team += 32) {
    const PartRow row = part_row(parts, place, end, team);
    unsure = unsure || has_to_be_settled(in, parts, place.part_of(team, false, end.row),
                                         power(row.log2_weight - together.all.log2_weight) * row.total,
                                         together.all.total);
  }
  if (!__any_sync(0xffffffffu, unsure)) return;
  settle_row<T>(in, list, parts, place, end, teams, tile_refs, together.all.log2_weight, crew);
  together = sum_of_parts(parts, place, end, lane);
}

}  // namespace svel::cuda
