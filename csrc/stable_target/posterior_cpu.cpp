// Runs a posterior-mean problem on the CPU: plans it, lets every thread take its blocks of references,
// merges, finishes.
#include "stable_target/posterior_cpu.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "stable_target/posterior.h"
#include "stable_target/posterior_plan.h"

namespace svel::cpu {
namespace {

constexpr double INF = std::numeric_limits<double>::infinity();
constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t STREAM_BYTES =
    1 << 19;  // references of a block that few rows read twice: they stay in the L2

template <typename T>
using Buffer = std::unique_ptr<T[]>;

template <typename T>
Buffer<T> uninitialised(int64_t n) {
  return Buffer<T>(new T[static_cast<size_t>(n)]);
}

// The running softmax that one thread has reached for a tile.
struct Part {
  std::vector<double> top, sum;
  Buffer<double> total;

  void start(int64_t n, int64_t d, bool with_total) {
    top.assign(n, -INF);
    sum.assign(n, 0.0);
    total = with_total ? uninitialised<double>(n * d) : nullptr;
  }
  Running running() { return {top.data(), sum.data(), total.get()}; }
};

// One thread with its scratch memory; or, when `ranges` > 1, all threads, each on a range of the coordinates.
class Worker {
 public:
  Worker(const PosteriorProblem& problem, const Plan& plan, int64_t ranges)
      : p_(problem), plan_(plan), ranges_(ranges), offset_(plan.most_rows), y_norm_(ranges * plan.most_rows) {
    const int64_t n = plan.most_rows, d = p_.d;
    if (in_float64(p_.x.storage, p_.d)) {
      scores_ = uninitialised<double>(f64_scratch_size(d));
      return;
    }
    centre_.assign(padded(d), 0.0f);
    if (d <= SMALL_D) {
      const int64_t block = small_block_size(d);
      floats_ = uninitialised<float>(block * (d + 1 + 2 * SMALL_ROWS));
      small_ = {floats_.get(), floats_.get() + block * d, floats_.get() + block * (d + 1),
                floats_.get() + block * (d + 1 + SMALL_ROWS)};
      return;
    }
    const int64_t each = wide_rows_size(n) + wide_panel_size() + n * WIDE_BLOCK;
    floats_ = uninitialised<float>(ranges * each + n * WIDE_BLOCK);
    picked_ = uninitialised<int32_t>(ranges * n * WIDE_BLOCK);
    scores_ = uninitialised<double>(ranges * (n + 1) * WIDE_BLOCK);
    keep_.resize(n);
    added_.resize(n);
    weights_ = {floats_.get() + ranges * each, keep_.data(), added_.data()};
    for (int64_t r = 0; r < ranges; ++r) {
      float* base = floats_.get() + r * each;
      wide_.push_back({base, base + wide_rows_size(n), base + wide_rows_size(n) + wide_panel_size(),
                       picked_.get() + r * n * WIDE_BLOCK});
    }
  }

  // A share of a tile; what it gives stays in `part` when the tile has other shares, else the rows are
  // finished.
  void run(const Share& share, Part* part) {
    const Tile& tile = plan_.tiles[share.tile];
    Part own;
    Part& here = part ? *part : own;
    if (in_float64(p_.x.storage, p_.d)) {
      run_f64(tile, share, here);
    } else if (p_.d <= SMALL_D) {
      run_small(tile, share, here);
    } else if (run_wide(tile, share, here, part == nullptr)) {
      return;
    }
    if (!part) finish(tile, here);
  }

  void finish(const Tile& tile, Part& part) {
    const FinishTerms terms = finish_terms(tile, part);
    each_range([&](int64_t, int64_t begin, int64_t end) {
      pick_finish_rows()(rows_of(tile), part.total.get(), terms.view(p_), 0, tile.rows(), begin, end);
    });
  }

 private:
  struct FinishTerms {
    std::vector<double> a, p, q;
    Finish view(const PosteriorProblem& problem) const {
      return {a.data(), p.data(), q.data(), problem.source, problem.out, problem.out_storage};
    }
  };

  RowTile rows_of(const Tile& tile) const {
    return {p_.x,
            p_.d,
            tile.rows(),
            plan_.row.data() + tile.begin,
            plan_.alpha.data() + tile.begin,
            plan_.sigma.data() + tile.begin};
  }

  // f(index, begin, end) for every range of coordinates, in parallel when there are several.
  template <typename F>
  void each_range(const F& f) {
    if (ranges_ == 1) return f(int64_t{0}, int64_t{0}, p_.d);
    const int64_t step = (p_.d + 64 * ranges_ - 1) / (64 * ranges_) * 64;
    torch::stable::parallel_for(0, ranges_, 1, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) f(r, std::min(p_.d, r * step), std::min(p_.d, (r + 1) * step));
    });
  }

  // f(begin, end) over [0, n), in parallel when there are several ranges.
  template <typename F>
  void each_index(int64_t n, const F& f) {
    if (ranges_ == 1 || n < 2) return f(int64_t{0}, n);
    torch::stable::parallel_for(0, n, 1, f);
  }

  // f(references, count, whether they are the first of their group) for the blocks of a share.
  template <typename F>
  void each_block(const Tile& tile, const Share& share, int64_t size, const F& f) const {
    int64_t before = 0;  // references of the groups passed
    for (int64_t g = tile.first_group; g < tile.last_group && before < share.end; before += p_.counts[g++]) {
      const int64_t begin = std::max<int64_t>(0, share.begin - before);
      const int64_t end = std::min(p_.counts[g], share.end - before);
      for (int64_t j = begin; j < end; j += size) {
        const int64_t bytes = (g * p_.m + j) * p_.d * bytes_of(p_.refs.storage);
        f(Values{static_cast<const char*>(p_.refs.data) + bytes, p_.refs.storage}, std::min(size, end - j),
          j == begin, g);
      }
    }
  }

  // The centre of group g and what follows from it: |x - alpha c|^2 and the offset of each row.
  void centre_on(const Tile& tile, int64_t g) {
    const RowTile rows = rows_of(tile);
    const Values group = {
        static_cast<const char*>(p_.refs.data) + g * p_.m * p_.d * bytes_of(p_.refs.storage),
        p_.refs.storage};
    each_range([&](int64_t r, int64_t begin, int64_t end) {
      pick_find_centre()(group, p_.counts[g], p_.d, begin, end, centre_.data());
      pick_row_norms()(rows, {centre_.data(), Storage::f32}, false, begin, end, y_norm_.data() + r * rows.n);
    });
    for (int64_t i = 0; i < rows.n; ++i) {
      for (int64_t r = 1; r < ranges_; ++r) y_norm_[i] += y_norm_[r * rows.n + i];
      offset_[i] = 0.5 * static_cast<double>(p_.d) - 0.5 * y_norm_[i] / (rows.sigma[i] * rows.sigma[i]);
    }
  }

  void run_f64(const Tile& tile, const Share& share, Part& part) {
    part.start(tile.rows(), p_.d, true);
    each_block(tile, share, F64_BLOCK, [&](const Values& refs, int64_t count, bool, int64_t) {
      pick_f64_block()(rows_of(tile), refs, count, scores_.get(), part.running());
    });
  }

  void run_small(const Tile& tile, const Share& share, Part& part) {
    part.start(tile.rows(), p_.d, true);
    each_block(tile, share, small_block_size(p_.d),
               [&](const Values& refs, int64_t count, bool first, int64_t g) {
                 if (first) centre_on(tile, g);
                 pick_small_block()(rows_of(tile), {refs, count, centre_.data()}, y_norm_.data(), cut(tile),
                                    small_, part.running());
               });
  }

  // True when the rows are finished already, which saves the memory for their totals.
  bool run_wide(const Tile& tile, const Share& share, Part& part, bool whole) {
    const RowTile rows = rows_of(tile);
    int64_t size = WIDE_BLOCK;
    if (rows.n <= STREAM_ROWS && ranges_ == 1) {
      size = std::clamp<int64_t>(STREAM_BYTES / (p_.d * bytes_of(p_.refs.storage)) / 4 * 4, 16, WIDE_BLOCK);
    }
    int64_t blocks = 0;
    each_block(tile, share, size, [&](const Values&, int64_t, bool, int64_t) { ++blocks; });
    const bool at_once = whole && blocks == 1;
    part.start(rows.n, p_.d, !at_once);
    each_block(tile, share, size, [&](const Values& refs, int64_t count, bool first, int64_t g) {
      if (first) centre_on(tile, g);
      const RefBlock block = {refs, count, centre_.data()};
      const int64_t scores = rows.n * WIDE_BLOCK, each = scores + WIDE_BLOCK;
      each_range([&](int64_t r, int64_t begin, int64_t end) {
        double* dots = scores_.get() + r * each;
        pick_wide_scores()(rows, block, begin, end, wide_[r], dots, dots + scores);
      });
      for (int64_t r = 1; r < ranges_; ++r) {
        for (int64_t i = 0; i < each; ++i) scores_[i] += scores_[r * each + i];
      }
      const int64_t doubtful =
          pick_wide_logits()(rows, count, offset_.data(), y_norm_.data(), scores_.get(),
                             scores_.get() + scores, cut(tile), part.running(), picked_.get());
      each_index(doubtful, [&](int64_t begin, int64_t end) {
        pick_wide_rescore()(rows, block, picked_.get(), begin, end, scores_.get());
      });
      pick_wide_weights()(rows, count, offset_.data(), scores_.get(), cut(tile), part.running(), weights_);
      const FinishTerms terms = at_once ? finish_terms(tile, part) : FinishTerms{};
      each_range([&](int64_t r, int64_t begin, int64_t end) {
        pick_wide_sums()(rows, block, weights_, begin, end, wide_[r], part.running(), terms.view(p_));
      });
    });
    return at_once;
  }

  // Logits this far below the largest are left out: all of them together weigh less than 2^-26.
  static double cut(const Tile& tile) {
    return -26 * std::log(2.0) - std::log(static_cast<double>(tile.refs));
  }

  // Joins the source, writes lse, and turns a x + b mean into a x + p total + q source.
  FinishTerms finish_terms(const Tile& tile, const Part& part) {
    const RowTile rows = rows_of(tile);
    std::vector<double> distance(p_.source.data ? ranges_ * rows.n : 0);
    if (p_.source.data) {
      each_range([&](int64_t r, int64_t begin, int64_t end) {
        pick_row_norms()(rows, p_.source, true, begin, end, distance.data() + r * rows.n);
      });
    }
    FinishTerms terms = {std::vector<double>(rows.n, NOT_A_NUMBER), std::vector<double>(rows.n, 0.0),
                         std::vector<double>(rows.n, 0.0)};
    for (int64_t i = 0; i < rows.n; ++i) {
      const int64_t row = rows.row[i];
      double own = -INF;
      if (p_.source.data) {
        double d2 = 0.0;
        for (int64_t r = 0; r < ranges_; ++r) d2 += distance[r * rows.n + i];
        own = 0.5 * static_cast<double>(p_.d) - 0.5 * d2 / (rows.sigma[i] * rows.sigma[i]);
      }
      const double top = std::max(part.top[i], own);
      const double set_share = part.top[i] == -INF ? 0.0 : std::exp(part.top[i] - top);
      const double own_weight = own == -INF ? 0.0 : std::exp(own - top);
      const double all = part.sum[i] * set_share + own_weight, lse = top + std::log(all);
      // Not where the set is empty, or something in the row or its source is NaN or Inf.
      const bool good = std::isfinite(lse) && (!p_.source.data || std::isfinite(own));
      if (p_.lse) p_.lse[row] = good ? lse : NOT_A_NUMBER;
      if (!good) continue;
      terms.a[i] = p_.a[row];
      terms.p[i] = p_.b[row] * set_share / all;
      terms.q[i] = p_.b[row] * own_weight / all;
    }
    return terms;
  }

  const PosteriorProblem& p_;
  const Plan& plan_;
  const int64_t ranges_;
  std::vector<float> centre_;
  std::vector<double> offset_, y_norm_, keep_, added_;
  Buffer<float> floats_;
  Buffer<int32_t> picked_;
  Buffer<double> scores_;
  std::vector<WideScratch> wide_;
  SmallScratch small_{};
  BlockWeights weights_{};
};

// The second part joins the first; references of the two are disjoint.
void merge(int64_t n, int64_t d, Part& into, const Part& part) {
  for (int64_t i = 0; i < n; ++i) {
    const double top = std::max(into.top[i], part.top[i]);
    const double keep = into.top[i] == -INF ? 0.0 : std::exp(into.top[i] - top);
    const double share = part.top[i] == -INF ? 0.0 : std::exp(part.top[i] - top);
    double* total = into.total.get() + i * d;
    const double* other = part.total.get() + i * d;
    if (share != 0.0) {
      for (int64_t k = 0; k < d; ++k) total[k] = (keep != 0.0 ? keep * total[k] : 0.0) + share * other[k];
    } else if (keep != 1.0) {
      for (int64_t k = 0; k < d; ++k) total[k] *= keep;
    }
    into.sum[i] = into.sum[i] * keep + part.sum[i] * share;
    into.top[i] = top;
    if (std::isnan(part.sum[i])) into.sum[i] = part.sum[i];
  }
}

void write_nan(const PosteriorProblem& p, const std::vector<int64_t>& rows) {
  const std::vector<double> nan(rows.size(), NOT_A_NUMBER), zero(rows.size(), 0.0);
  const int64_t n = static_cast<int64_t>(rows.size());
  pick_finish_rows()({p.x, p.d, n, rows.data(), nullptr, nullptr}, nullptr,
                     {nan.data(), zero.data(), zero.data(), {}, p.out, p.out_storage}, 0, n, 0, p.d);
  for (int64_t row : rows) {
    if (p.lse) p.lse[row] = NOT_A_NUMBER;
  }
}

}  // namespace

void solve(const PosteriorProblem& problem) {
  const int64_t threads = torch::stable::get_num_threads();
  const Plan plan = make_plan(problem, threads);
  write_nan(problem, plan.unusable);
  if (plan.team) {
    Worker team(problem, plan, threads);
    for (const Share& share : plan.shares) team.run(share, nullptr);
    return;
  }
  std::vector<Part> parts(plan.shares.size());  // filled for tiles that several threads share
  const auto work = [&](int64_t first, int64_t last) {
    Worker worker(problem, plan, 1);
    for (int64_t s = plan.worker_begin[first]; s < plan.worker_begin[last]; ++s) {
      worker.run(plan.shares[s], plan.shared(s) ? &parts[s] : nullptr);
    }
  };
  if (plan.workers() == 1) {
    work(0, 1);
  } else {
    torch::stable::parallel_for(0, plan.workers(), 1, work);
  }
  for (size_t s = 0; s < parts.size();) {
    const int64_t tile = plan.shares[s].tile;
    size_t last = s + 1;
    for (; last < parts.size() && plan.shares[last].tile == tile; ++last) {
      merge(plan.tiles[tile].rows(), problem.d, parts[s], parts[last]);
    }
    if (last > s + 1) Worker(problem, plan, 1).finish(plan.tiles[tile], parts[s]);
    s = last;
  }
}

}  // namespace svel::cpu
