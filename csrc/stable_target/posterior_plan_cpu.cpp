#include <algorithm>
#include <cmath>

#include "stable_target/posterior.h"
#include "stable_target/posterior_plan.h"

namespace svel::cpu {
namespace {

constexpr int64_t TEAM_D =
    1 << 15;  // from here on threads share the coordinates of a tile, not its references
constexpr int64_t TILE_VALUES = 1 << 20;  // rows times D of a tile, at most (but never less than four rows)
constexpr int64_t F64_ROWS = 16;
constexpr int64_t CUT = 64;          // shares end at multiples of this many references
constexpr double SERIAL = 1 << 17;   // rows times references times D below which waking threads costs more
constexpr double UNPACK_ROWS = 6.0;  // unpacking references costs about as much as this many rows
constexpr double TILE_REFS = 16.0;   // and a tile as much as this many references

int64_t most_rows(const PosteriorProblem& p) {
  const int64_t d = std::max<int64_t>(1, p.d);
  if (in_float64(p.x.storage, p.d)) return d <= F64_D ? 1024 : F64_ROWS;
  if (d <= SMALL_D) return std::clamp<int64_t>(32768 / d, 256, 1024);
  return std::min(WIDE_ROWS, std::max<int64_t>(4, TILE_VALUES / d));
}

void sort_rows(const PosteriorProblem& p, Plan& plan) {
  for (int64_t i = 0; i < p.n; ++i) {
    const bool usable = std::isfinite(p.a[i]) && std::isfinite(p.b[i]) && std::isfinite(p.alpha[i]) &&
                        std::isfinite(p.sigma[i]) && p.sigma[i] != 0.0;
    (usable ? plan.row : plan.unusable).push_back(i);
  }
  std::sort(plan.row.begin(), plan.row.end(), [&](int64_t i, int64_t j) {
    if (p.labels && p.labels[i] != p.labels[j]) return p.labels[i] < p.labels[j];
    const double s = std::fabs(p.sigma[i]), t = std::fabs(p.sigma[j]);
    return s != t ? s < t : i < j;
  });
  for (int64_t i : plan.row) {
    plan.alpha.push_back(p.alpha[i]);
    plan.sigma.push_back(p.sigma[i]);
  }
}

void make_tiles(const PosteriorProblem& p, Plan& plan) {
  const int64_t most = most_rows(p), used = static_cast<int64_t>(plan.row.size());
  const auto label = [&](int64_t i) { return p.labels ? p.labels[plan.row[i]] : 0; };
  for (int64_t begin = 0, end = 0; begin < used; begin = end) {
    const int64_t group = label(begin);
    while (end < used && label(end) == group) ++end;
    Tile tile = {0, 0, group < 0 ? 0 : group, group < 0 ? p.groups : group + 1, 0};
    for (int64_t g = tile.first_group; g < tile.last_group; ++g) tile.refs += p.counts[g];
    const int64_t rows = end - begin, pieces = (rows + most - 1) / most;
    for (int64_t k = 0; k < pieces; ++k) {
      tile.begin = begin + rows * k / pieces;
      tile.end = begin + rows * (k + 1) / pieces;
      plan.tiles.push_back(tile);
      plan.most_rows = std::max(plan.most_rows, tile.rows());
    }
  }
}

void deal(const PosteriorProblem& p, int64_t threads, Plan& plan) {
  double all = 0.0;
  for (const Tile& t : plan.tiles) all += (t.rows() + UNPACK_ROWS) * (t.refs + TILE_REFS);
  const int64_t workers = all * p.d < SERIAL ? 1 : threads;
  const double budget = all / workers;
  double left = budget;
  plan.worker_begin.push_back(0);
  const auto next_worker = [&] {
    plan.worker_begin.push_back(static_cast<int64_t>(plan.shares.size()));
    left += budget;
  };
  for (size_t t = 0; t < plan.tiles.size(); ++t) {
    const Tile& tile = plan.tiles[t];
    const double each = tile.rows() + UNPACK_ROWS;
    int64_t begin = 0;
    do {
      const bool last = plan.workers() + 1 == workers;
      const int64_t fitting = last ? tile.refs : static_cast<int64_t>(std::max(0.0, left) / each) / CUT * CUT;
      const int64_t end = begin + fitting + CUT >= tile.refs ? tile.refs : begin + fitting;
      if (end > begin || tile.refs == 0) plan.shares.push_back({static_cast<int64_t>(t), begin, end});
      left -= each * (end - begin);
      begin = end;
      if (!last && left < each * CUT) next_worker();
    } while (begin < tile.refs);
    left -= each * TILE_REFS;
  }
  while (plan.workers() < workers) next_worker();
}

}  // namespace

Plan make_plan(const PosteriorProblem& p, int64_t threads) {
  Plan plan;
  sort_rows(p, plan);
  make_tiles(p, plan);
  plan.team = !in_float64(p.x.storage, p.d) && p.d >= TEAM_D && threads > 1;
  deal(p, plan.team ? 1 : threads, plan);
  return plan;
}

}  // namespace svel::cpu
