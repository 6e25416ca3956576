// stablevelocity_kernels._C: what was built, and the launch planner. Host only, no torch headers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "build_config.h"
#include "common/isa.h"
#include "common/planner.h"
#include "common/planner_pool.h"
#include "stable_target/ranges.h"

namespace py = pybind11;

namespace {

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> parts;
  std::stringstream in(list);
  for (std::string part; std::getline(in, part, ';');) parts.push_back(part);
  return parts;
}

std::string isa_name(svel::Isa isa) {
  return isa == svel::Isa::avx512 ? "avx512" : isa == svel::Isa::avx2 ? "avx2" : "base";
}

py::dict build_info() {
  const bool cuda = !std::string(SVEL_CUDA_VERSION).empty();
  py::dict info;
  info["version"] = SVEL_VERSION;
  info["compiler"] = SVEL_COMPILER;
  info["flags"] = SVEL_CXX_FLAGS;
  info["build_type"] = SVEL_BUILD_TYPE;
  info["torch_headers"] = SVEL_TORCH_VERSION;
  info["isa_variants"] = split(SVEL_ISAS);
  info["isa_in_use"] = isa_name(svel::isa());
  info["cuda"] = cuda ? py::object(py::str(SVEL_CUDA_VERSION)) : py::none();
  info["cuda_architectures"] = cuda ? py::cast(split(SVEL_CUDA_ARCHITECTURES)) : py::none();
  info["cuda_status"] = SVEL_CUDA_STATUS;
  return info;
}

py::dict plan(int64_t n, int64_t k, int64_t m, int64_t d, bool has_labels, bool has_source, int x_size,
              int refs_size, bool refs_bf16, bool aligned, bool null_rows, const std::string& precision,
              int sm_count, int64_t smem_limit, int cc, double bandwidth) {
  svel::Problem problem;
  problem.n = n;
  problem.k = k;
  problem.m = m;
  problem.d = d;
  problem.has_labels = has_labels;
  problem.has_source = has_source;
  problem.x_size = x_size;
  problem.refs_size = refs_size;
  problem.refs_bf16 = refs_bf16;
  problem.aligned = aligned;
  problem.precision = precision;
  problem.sm_count = sm_count;
  problem.smem_limit = smem_limit;
  problem.cc = cc;
  problem.bandwidth = bandwidth;
  svel::Plan made = svel::make_plan(problem);
  svel::PoolBankPlan bank{};
  if (null_rows && svel::plan_pool_bank(problem, made, bank))
    made.workspace_bytes = svel::pool_bank_offset(made) + bank.pool.workspace_bytes;
  py::dict result;
  result["kernel"] = made.kernel;
  result["tile_rows"] = made.tile_rows;
  result["tile_refs"] = made.tile_refs;
  result["tile_d"] = made.tile_d;
  result["threads"] = made.threads;
  result["stages"] = made.stages;
  result["aligned"] = made.aligned;
  result["wide"] = made.wide;
  result["fast"] = made.fast;
  result["blocks"] = made.blocks;
  result["slices"] = made.slices;
  result["slice"] = made.slice;
  result["group"] = made.group;
  result["products"] = made.products;
  result["in_flight"] = made.in_flight;
  result["tile_weights"] =
      py::make_tuple(svel::TILE_WEIGHT, made.costs.two, made.costs.four, made.costs.row, made.costs.unit);
  result["own_list"] = made.own_list;
  result["deal"] = made.costs.deal;
  result["splits"] = made.splits;
  result["rows_per_pass"] = made.rows_per_pass;
  result["refs_per_pass"] = made.refs_per_pass;
  result["smem_bytes"] = made.smem_bytes;
  result["workspace_bytes"] = made.workspace_bytes;
  result["null_passes"] = bank.passes;
  result["null_at_once"] = bank.at_once;
  result["bytes"] = made.bytes;
  result["flops"] = made.flops;
  result["reason"] = made.reason;
  return result;
}

// What the teams of a kernel read of a list of units, as Ranges has it: (team, unit, from, to, last) by
// tiles, and for the units that several have the first and the last team that they are told.
template <bool DEAL>
py::tuple share_units(const std::vector<int>& tiles, const std::vector<int>& rows, int together,
                      const svel::UnitCosts& costs, int teams) {
  const size_t n = tiles.size();
  std::vector<svel::Unit> units(n);
  std::vector<int64_t> begins(n + 1, 0);
  int sizes[5] = {static_cast<int>(n), 0, 0, together, 0};
  svel::UnitList list{nullptr, units.data(), begins.data(), nullptr, sizes, costs};
  for (size_t u = 0; u < n; ++u) {
    const int64_t cost = list.cost(tiles[u], rows[u]);
    units[u].tiles = tiles[u], units[u].weight = static_cast<uint16_t>(list.weight(rows[u]));
    begins[u + 1] = begins[u] + cost;
    sizes[2] = std::max(sizes[2], list.weight(rows[u]));
    if (static_cast<int>(u) < together) sizes[4] = std::max(sizes[4], static_cast<int>(cost));
  }
  py::list shares;
  std::vector<std::pair<int, int>> told(n, {-1, -1});
  const auto find = [&](int64_t at) {
    return static_cast<int>(std::upper_bound(begins.begin(), begins.end(), at) - begins.begin()) - 1;
  };
  for (int team = 0; team < teams; ++team) {
    svel::walk_units<DEAL>(list, teams, team, find, [&](const svel::UnitShare& share, const auto& ranges) {
      shares.append(py::make_tuple(team, share.number, share.from, share.to, share.last));
      if (share.to - share.from == tiles[share.number]) return;  // the kernels do not ask then
      ranges.teams_of(list, share.number, told[share.number].first, told[share.number].second);
    });
  }
  return py::make_tuple(shares, told);
}

py::tuple unit_shares(const std::vector<int>& tiles, const std::vector<int>& rows, int together, int two,
                      int four, int row, int unit, bool deal, int teams) {
  if (tiles.size() != rows.size()) throw py::value_error("unit_shares: expected as many rows as tiles");
  const svel::UnitCosts costs{two, four, row, unit, deal};
  return deal ? share_units<true>(tiles, rows, together, costs, teams)
              : share_units<false>(tiles, rows, together, costs, teams);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and the launch planner of stablevelocity_kernels.";
  m.def("build_info", &build_info, "What was compiled, with what, for what.");
  m.def(
      "plan", &plan, py::kw_only(), py::arg("n"), py::arg("k"), py::arg("m"), py::arg("d"),
      py::arg("has_labels"), py::arg("has_source"), py::arg("x_size"), py::arg("refs_size"),
      py::arg("refs_bf16"), py::arg("aligned"), py::arg("null_rows"), py::arg("precision"),
      py::arg("sm_count"), py::arg("smem_limit"), py::arg("cc"), py::arg("bandwidth"),
      "The CUDA launch of posterior_mean and stable_target for a problem, as a dict; see common/planner.h.");
  m.def("unit_shares", &unit_shares, py::kw_only(), py::arg("tiles"), py::arg("rows"), py::arg("together"),
        py::arg("two"), py::arg("four"), py::arg("row"), py::arg("unit"), py::arg("deal"), py::arg("teams"),
        "Which tiles of a list of units the teams of a CUDA kernel take; for tests, see "
        "stable_target/ranges.h.");
}
