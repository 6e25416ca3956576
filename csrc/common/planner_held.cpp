#include "common/planner_held.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace svel {
namespace {

constexpr int64_t MOST_REFS = 2560;                     // of all classes: more were not measured
constexpr int64_t LEAST_ROWS = 64;                      // of a pass, at most
constexpr int64_t LEAST_D = 256;                        // shorter sums leave the softmax in charge
constexpr int64_t HELD_WORKSPACE = int64_t{192} << 20;  // bytes

// Of held_seconds, by a fit of 26 pools and banks on an H100 (16 to 1,024 rows, 256 to 2,560 references of
// 256 to 4,096 elements, 27 to 314 us), which it meets within a fourteenth or, with 1,024 rows beside 1,024
// references or D of 256, a third: what every call takes, and several chunks; a multiprocessor's rate of
// products, a quarter of what it can do; and the rate of shares of scores, written and read, and of weights.
constexpr double CALL_SECONDS = 20.5e-6, CHUNKS_SECONDS = 9.4e-6, PRODUCT_RATE = 2.02e12,
                 SHARES_RATE = 3.4e12;
constexpr double READ_SHARE = 0.8;  // of the bandwidth
// Of classes of short samples, which were not fitted and have more rows in doubt.
constexpr int64_t SHORT_D = 1024;
constexpr double SHORT_SECONDS = 9e-6;

// Of a block of the fullest class, with labels drawn evenly.
double rows_of(const Problem& p, const HeldCut& cut) {
  const double k = static_cast<double>(p.groups()), n = static_cast<double>(p.n);
  const double of_class = n / k + (k > 1 ? 1.5 * std::sqrt(n / k) : 0);
  return std::ceil(of_class / static_cast<double>(cut.row_parts));
}

double seconds_of(const Problem& p, const HeldCut& cut) {
  const double k = static_cast<double>(p.groups()), n = static_cast<double>(p.n);
  const double m = static_cast<double>(p.m), d = static_cast<double>(p.d);
  const double rows = rows_of(p, cut);
  const double chunk = static_cast<double>(cut.chunk), slice = static_cast<double>(cut.slice);
  // Four groups of warps have a product each, of a group of rows; one alone takes more than a quarter of the
  // time of four.
  const double parts = static_cast<double>(held_parts(p.refs_bf16));
  const double group = static_cast<double>(held_group(p.refs_bf16)), tile = static_cast<double>(HELD_TILE);
  const auto tiles = [&](double length) {
    const double count = std::ceil(length / tile) * std::ceil(rows / group), left = std::fmod(count, 4);
    return count - left + (left > 0 ? std::max(left, 2.5) : 0);
  };
  const double products = 2 * parts * group * tile * (tiles(chunk) * slice + tiles(slice) * chunk);
  const double shares = (2 * 4 + 2 * parts) * n * m * static_cast<double>(cut.slices);  // bytes
  return CALL_SECONDS + 2 * k * m * d / (READ_SHARE * p.bandwidth) + products / PRODUCT_RATE +
         shares / SHARES_RATE + (cut.chunks > 1 ? CHUNKS_SECONDS : 0) +
         (k > 1 && p.d <= SHORT_D ? SHORT_SECONDS : 0);
}

}  // namespace

int64_t held_smem(const HeldCut& cut, int64_t n, bool bf16) {
  return HELD_ALIGNMENT + held_refs_smem(cut) + held_lines_smem(cut, bf16) + HELD_FIXED_SMEM +
         held_rows_smem(n);
}

HeldLayout held_layout(int64_t n, int64_t k, int64_t m, int64_t d, bool bf16, const HeldCut& cut) {
  const int64_t refs = k * held_padded(m), teams = k * cut.chunks;
  HeldLayout layout;
  layout.scores = round_up(4 * n * cut.slices * refs, 256);
  layout.sums = teams > 1 ? round_up(4 * teams * n * d, 256) : 0;
  layout.exact = round_up(8 * n * refs, 256);
  layout.weights = round_up(2 * held_parts(bf16) * n * refs, 256);
  layout.ends = round_up(16 * n, 256);
  layout.scales = round_up(4 * n * teams * cut.slices, 256);
  layout.centres = round_up(8 * k * cut.slices, 256);
  return layout;
}

HeldCut held_cut(const Plan& plan, int64_t k, int64_t m) {
  HeldCut cut;
  cut.chunk = plan.tile_refs, cut.chunks = ceil_div(m, cut.chunk);
  cut.slice = plan.slice, cut.slices = plan.slices;
  cut.row_parts = plan.blocks / (k * cut.chunks * cut.slices), cut.batch = plan.tile_rows;
  cut.buffers = plan.stages;
  return cut;
}

namespace {

// The quickest cut for so many rows of a pass, and what it takes; no cut: INFINITY. That of "exact" for
// "fast" too, whose sums take less in any cut.
double best_cut(const Problem& pass, HeldCut& best) {
  const int64_t k = pass.groups();
  double least = INFINITY;
  for (int64_t chunks = ceil_div(pass.m, HELD_MOST_REFS);
       k * chunks <= std::min<int64_t>(pass.sm_count, HELD_MOST_TEAMS); ++chunks) {
    HeldCut cut;
    cut.chunk = round_up(ceil_div(pass.m, chunks), 16), cut.chunks = ceil_div(pass.m, cut.chunk);
    if (cut.chunks == chunks) {
      const int64_t teams = k * chunks;
      for (cut.row_parts = 1; cut.row_parts <= 8; cut.row_parts *= 2) {
        const int64_t most = pass.sm_count / (teams * cut.row_parts);
        if (most < 1 || (cut.row_parts > 1 && pass.n < k * 16 * cut.row_parts)) break;
        cut.slice = round_up(ceil_div(pass.d, most), HELD_LINE), cut.slices = ceil_div(pass.d, cut.slice);
        if (cut.slice > HELD_MOST_SLICE) break;
        const int64_t group = held_group(pass.refs_bf16);
        // The next batch of rows is prepared beside the products of one, where there is room.
        for (const auto& [batch, buffers] : {std::pair{HELD_BATCH, 2},
                                             {HELD_BATCH, 1},
                                             {HELD_BATCH / 2 + HELD_NARROW, 1},
                                             {HELD_BATCH / 2, 1},
                                             {HELD_BATCH / 4 + HELD_NARROW, 1},
                                             {HELD_BATCH / 4, 1}}) {
          if (batch < group) break;
          // A narrow group takes more of a row's time: for what would be a batch more of a few.
          const auto rows = static_cast<int64_t>(rows_of(pass, cut));
          if (batch % group != 0 &&
              (rows > 2 * batch || ceil_div(rows, batch) == ceil_div(rows, batch - HELD_NARROW)))
            continue;
          cut.batch = batch, cut.buffers = buffers;
          if (held_smem(cut, pass.n, pass.refs_bf16) > pass.smem_limit) continue;
          const double time = seconds_of(pass, cut);
          if (time < least &&
              held_layout(pass.n, k, pass.m, pass.d, pass.refs_bf16, cut).total() <= HELD_WORKSPACE)
            least = time, best = cut;
          break;
        }
      }
    }
    if (cut.chunk <= 64) break;
  }
  return least;
}

}  // namespace

bool plan_held(const Problem& p, Plan& plan) {
  if (p.cc != 90 || !p.has_sm90a || p.refs_size != 2 || p.x_size == 8 || !p.aligned) return false;
  if (p.has_source || p.shared_rows || p.n < 1 || p.d < LEAST_D) return false;
  const int64_t k = p.groups(), each = p.smem_limit / 2;  // values of a block, at most
  if (p.m < 1 || k < 1 || k > p.sm_count || p.references() > MOST_REFS) return false;
  if (p.d > p.sm_count * HELD_MOST_SLICE || p.references() * p.d > p.sm_count * each) return false;
  Problem pass = p;
  HeldCut best;
  for (int64_t most = HELD_MOST_ROWS; most >= LEAST_ROWS; most /= 2) {
    pass.n = ceil_div(p.n, ceil_div(p.n, most));
    if (best_cut(pass, best) < INFINITY) break;
  }
  if (best.chunk == 0) return false;
  plan.kernel = "held";
  plan.threads = HELD_THREADS;
  plan.tile_rows = static_cast<int>(best.batch);
  plan.tile_refs = static_cast<int>(best.chunk);
  plan.tile_d = best.slice;
  plan.slices = best.slices;
  plan.slice = best.slice;
  plan.fast = p.precision == "fast";
  plan.blocks = k * best.chunks * best.slices * best.row_parts;
  plan.splits = best.chunks;
  plan.rows_per_pass = pass.n;
  plan.refs_per_pass = p.references();
  plan.stages = static_cast<int>(best.buffers);
  plan.smem_bytes = held_smem(best, pass.n, p.refs_bf16);
  plan.workspace_bytes = held_layout(pass.n, k, p.m, p.d, p.refs_bf16, best).total();
  plan.reason =
      "a set that the multiprocessors' shared memories hold: read once, scores and sums on the matrix units";
  return true;
}

double held_seconds(const Problem& p, const Plan& plan) {
  Problem pass = p;
  pass.n = plan.rows_per_pass;
  return static_cast<double>(ceil_div(p.n, pass.n)) * seconds_of(pass, held_cut(plan, p.groups(), p.m));
}

}  // namespace svel
