#include "common/planner_rows.h"

#include <algorithm>

namespace svel {
namespace {

constexpr int64_t MIN_ROWS = 27;                          // fewer: bound by memory, one pass is enough
constexpr int64_t MOST_REFS = (int64_t{1} << 31) - 1024;  // coordinates of tensor copies have 31 bits
constexpr int64_t MIN_REFS = 2048;                        // fewer: too few tiles for the device
constexpr int64_t MIN_D = 256;                            // shorter sums leave the softmax in charge,
constexpr int64_t MIN_D_FLOAT = 128;                      // and of float32 others take longer still
constexpr int64_t SCORES_LIMIT = int64_t{128} << 20;      // bytes of scores and their maxima

// Of many_rows_seconds, by 48 class banks on an H200 (64 to 4,096 rows, 2 to 100 classes of 256 to 5,000
// references of 256 to 8,192 elements) and 14 on an H100, there ten classes of 5,000 of 3,072 most of all:
// 256 rows 377 us, 300 rows 426, 512 rows 489, 1,024 rows 624, 4,096 rows 1,626; 256 of bfloat16 453. Half
// are within an eighth of it. What a pass takes, and one in the order of classes, which is a few waves of
// thread blocks, of which the last is seldom full: so much of one is lost; products, and a pair of a row and
// a reference. Few rows are bound by memory, from which the references come twice.
constexpr double PASS_SECONDS = 80e-6, ORDERED_PASS_SECONDS = 110e-6, LOST_WAVE = 0.3;
constexpr double PRODUCT_SECONDS = 6.3e-15,
                 PRODUCT_SECONDS_BF16 = 8.3e-15;  // a row, a reference, an element
constexpr double PAIR_SECONDS = 7e-12;
constexpr double READ_SHARE = 0.78;  // of the bandwidth
// Of float32, by the products of dense rows: 1 for all references, 2 more for the rest of scores, and 4 for
// the sums, where references of two bytes have 1, 1 and 2. A round has the launch that makes halves, too.
constexpr double FLOAT_PRODUCTS = 7.0 / 4, FLOAT_PASS_SECONDS = 16e-6;
constexpr double FLOAT_READ = 10;  // bytes of an element by products

// Whether rows meet references so often that their norms had better be formed once: T tiles of rows in the
// order of K classes meet K + T - 1 classes in all, and those of a pool T times the pool.
bool has_norms(int64_t n, int64_t classes) {
  const int64_t k = std::max<int64_t>(classes, 1);
  return (n / MANY_ROWS + k - 1) * MANY_ROWS >= MANY_NORMS_ROWS * k;
}

// Rounds over float32 references, at least so many as the workspace asks for: what takes least time, since a
// round is few waves of thread blocks.
int64_t best_rounds(const Problem& p, int64_t refs, int64_t rows, int64_t least) {
  const int64_t clusters = std::max<int64_t>(p.sm_count / 2, 1), row_tiles = ceil_div(rows, MANY_ROWS);
  constexpr double PRODUCTS = 3;  // of the scores
  const double wave = PRODUCTS * PRODUCT_SECONDS / 4 * clusters * 2 * MANY_TILE * MANY_ROWS * p.d;
  const auto time_of = [&](int64_t rounds) {
    const int64_t units = ceil_div(ceil_div(refs, rounds), 2 * MANY_TILE) * row_tiles;
    return static_cast<double>(rounds) *
           (PASS_SECONDS + FLOAT_PASS_SECONDS + static_cast<double>(ceil_div(units, clusters)) * wave);
  };
  int64_t best = least;
  for (int64_t rounds = least; rounds <= least + std::min<int64_t>(least / 2 + 1, 8); ++rounds)
    if (time_of(rounds) < time_of(best)) best = rounds;
  return best;
}

}  // namespace

ManyLayout many_layout(int64_t n, int64_t refs, int64_t d, int64_t classes, bool is_float,
                       int64_t rows_per_pass, int64_t refs_per_pass) {
  const int64_t d_padded = round_up(d, MANY_TILE), d_tiles = d_padded / MANY_TILE;
  const int64_t tiles = (is_float ? 2 : 1) * d_tiles * ceil_div(rows_per_pass, MANY_ROWS);
  ManyLayout layout;
  const bool ordered = n > rows_per_pass || (classes > 1 && n > MANY_ROWS);
  layout.order = ordered ? round_up(4 * std::min(n, MANY_LIST_ROWS), 256) : 0;
  layout.centre = round_up(16 * d_padded + (64 + 4 * MANY_PAIRS) * d_tiles + 256, 256);
  layout.norms = is_float                                           ? round_up(4 * refs_per_pass, 256)
                 : refs <= MANY_NORMS_REFS && has_norms(n, classes) ? round_up(4 * refs, 256)
                                                                    : 0;
  layout.classes =
      classes > 0 ? round_up(MANY_CLASSES_BYTES + 8 * rows_per_pass + refs_per_pass / 8 + 48, 256) : 0;
  layout.rows = round_up(rows_per_pass * MANY_ROW_BYTES + 256, 256);
  layout.queries = (is_float ? 8 : 6) * rows_per_pass * d_padded;
  layout.scores = 4 * rows_per_pass * refs_per_pass;
  layout.maxima = layout.scores / MANY_GROUP;
  layout.survivors = round_up(4 * rows_per_pass * MANY_SURVIVORS, 256);
  layout.sums = 4 * rows_per_pass * d_padded;
  layout.partial = std::max(tiles, MANY_SEGMENTS) * MANY_TILE * MANY_ROWS * 4;
  layout.halves = is_float ? 4 * refs_per_pass * d_padded : 0;
  return layout;
}

bool plan_many_rows(const Problem& p, Plan& plan) {
  const bool is_float = p.refs_size == 4;
  const int64_t d_tiles = (is_float ? 2 : 1) * ceil_div(p.d, MANY_TILE);  // of the sums
  if (p.cc != 90 || !p.has_sm90a || p.refs_size == 8 || p.x_size == 8 || !p.aligned) return false;
  if (is_float && p.d % 8 != 0) return false;
  if (p.has_source) return false;  // exact: 2.006e-6 seen at t = 0.2, M = 700
  if (p.has_labels && (p.k > MANY_CLASSES || p.shared_rows)) return false;
  const int64_t refs = p.references(), classes = p.has_labels ? p.k : 0;
  const int64_t smem = classes > 1 ? MANY_CLASSES_SMEM_BYTES : MANY_SMEM_BYTES;
  const int64_t min_d = is_float ? MIN_D_FLOAT : MIN_D;
  if (p.n < MIN_ROWS || refs < MIN_REFS || p.d < min_d || d_tiles > MANY_SEGMENTS) return false;
  if (refs > MOST_REFS || smem > p.smem_limit) return false;

  // As many rows as keep the tiles of the sums within their part of the workspace, then as many references;
  // one round of all references spares others their part.
  const int64_t row_tiles = std::clamp<int64_t>(MANY_SEGMENTS / d_tiles, 1, MANY_PASS_ROWS / MANY_ROWS);
  int64_t rows = p.n <= 64    ? 64
                 : p.n <= 128 ? 128
                              : std::min(round_up(p.n, MANY_ROWS), row_tiles * MANY_ROWS);
  const auto most_refs = [&](int64_t rows_per_pass) {
    const int64_t left = WORKSPACE_LIMIT - (1 << 20) -
                         many_layout(p.n, refs, p.d, classes, is_float, rows_per_pass, 0).total();
    const int64_t scores = rows_per_pass * 4 * (MANY_GROUP + 1) / MANY_GROUP;        // bytes of a reference,
    const int64_t all = scores + (is_float ? 4 * round_up(p.d, MANY_TILE) + 4 : 0);  // with its halves
    return std::min(SCORES_LIMIT / scores, left / all) / MANY_TILE * MANY_TILE;
  };
  if (rows > MANY_WHOLE_ROWS && most_refs(rows) < refs && most_refs(MANY_WHOLE_ROWS) >= refs)
    rows = MANY_WHOLE_ROWS;
  const int64_t most = most_refs(rows);
  if (most < MANY_TILE) return false;
  int64_t rounds = ceil_div(refs, most);
  if (is_float) rounds = best_rounds(p, refs, rows, rounds);
  plan.kernel = "many_rows";
  plan.threads = MANY_THREADS;
  plan.tile_rows = static_cast<int>(rows <= 64 ? 64 : rows <= 128 ? 128 : MANY_ROWS);
  plan.tile_refs = MANY_TILE;
  plan.tile_d = 64;
  plan.stages = MANY_STAGES;
  plan.rows_per_pass = rows;
  plan.refs_per_pass = round_up(ceil_div(refs, rounds), MANY_TILE);
  plan.fast =
      p.precision == "fast" && !is_float;  // upper halves alone leave float32 too few digits at small t
  plan.blocks = p.sm_count;
  plan.smem_bytes = smem;
  plan.workspace_bytes = many_layout(p.n, refs, p.d, classes, is_float, rows, plan.refs_per_pass).total();
  plan.reason =
      p.has_labels
          ? "few classes, many rows: seen as one pool, of which rows have parts; products on the matrix units"
      : is_float
          ? "one pool of float32 references: products of halves on the matrix units, exact work where it "
            "can matter"
          : "one pool of 16-bit references: products on the matrix units, exact work where it can matter";
  return true;
}

double many_rows_seconds(const Problem& p, const Plan& plan) {
  const double refs = static_cast<double>(p.references()), k = static_cast<double>(p.groups());
  const bool ordered = k > 1 && p.n > MANY_ROWS;
  const int64_t full = p.n / MANY_ROWS, left = p.n % MANY_ROWS;
  const int64_t width = left == 0 ? 0 : left <= 64 ? 64 : left <= 128 ? 128 : MANY_ROWS;
  const bool is_float = p.refs_size == 4;
  const double product = p.refs_bf16 ? PRODUCT_SECONDS_BF16
                         : is_float  ? PRODUCT_SECONDS * FLOAT_PRODUCTS
                                     : PRODUCT_SECONDS;
  const double pair = p.d * product + PAIR_SECONDS;
  const double bytes = is_float ? FLOAT_READ : 2 * p.refs_size;
  const double read = bytes * p.d / (READ_SHARE * p.bandwidth);  // for the products
  const auto of_tile = [&](int64_t rows) { return rows ? std::max(rows * pair, read) : 0; };
  const double tile_seconds = full * of_tile(MANY_ROWS) + of_tile(width);  // beside a reference
  const int64_t passes = ceil_div(p.n, plan.rows_per_pass);
  const int64_t rounds = passes * ceil_div(p.references(), plan.refs_per_pass);
  const double halves =  // made in every pass
      is_float ? rounds * FLOAT_PASS_SECONDS + passes * refs * p.d * 8 / (READ_SHARE * p.bandwidth) : 0;
  if (!ordered) return rounds * PASS_SECONDS + halves + refs * tile_seconds;
  // At each place where one tile ends and the next begins a class is met by both, and a tile meets parts of
  // two pairs of reference tiles. With labels drawn evenly, and no rows of all classes.
  const double tiles = ceil_div(p.n, MANY_ROWS),
               met = std::min(refs, refs / k * (k + tiles - 1) / tiles + 2 * MANY_TILE);
  const double wave = p.sm_count * MANY_TILE * MANY_ROWS * pair;
  return rounds * (ORDERED_PASS_SECONDS + LOST_WAVE * wave) + halves + met * tile_seconds;
}

}  // namespace svel
