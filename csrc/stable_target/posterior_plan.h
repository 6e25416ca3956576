// How a posterior-mean problem is laid out over threads. Rows that share a set of references form tiles; the
// work of all tiles is dealt to the workers in equal, contiguous shares, so that one row or one group still
// uses every core.
#pragma once

#include <cstdint>
#include <vector>

#include "stable_target/posterior_cpu.h"

namespace svel::cpu {

// Rows [begin, end) of the plan's order over the groups [first_group, last_group), which hold `refs`
// references.
struct Tile {
  int64_t begin, end, first_group, last_group, refs;
  int64_t rows() const { return end - begin; }
};

// References [begin, end) of a tile, counted through its groups.
struct Share {
  int64_t tile, begin, end;
};

struct Plan {
  std::vector<int64_t> unusable;     // rows that are NaN whatever the references
  std::vector<int64_t> row;          // the others, sorted by group, and within it by noise level
  std::vector<double> alpha, sigma;  // of those
  std::vector<Tile> tiles;
  int64_t most_rows = 0;              // of any tile
  bool team = false;                  // tiles one after the other, all threads on ranges of the coordinates
  std::vector<Share> shares;          // in the order of tiles and references
  std::vector<int64_t> worker_begin;  // (workers + 1,): the shares of each worker

  int64_t workers() const { return static_cast<int64_t>(worker_begin.size()) - 1; }
  bool shared(int64_t s) const {  // whether other shares belong to the same tile
    const Tile& tile = tiles[shares[s].tile];
    return shares[s].begin != 0 || shares[s].end != tile.refs;
  }
};

Plan make_plan(const PosteriorProblem& problem, int64_t threads);

}  // namespace svel::cpu
