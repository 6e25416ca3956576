// stablevelocity_kernels._C: what was built, and the launch planner. Host only, no torch headers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "build_config.h"
#include "common/isa.h"
#include "common/planner.h"

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
              int refs_size, bool refs_bf16, bool aligned, const std::string& precision, int sm_count,
              int64_t smem_limit, int cc, double bandwidth) {
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
  const svel::Plan made = svel::make_plan(problem);
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
  result["bytes"] = made.bytes;
  result["flops"] = made.flops;
  result["reason"] = made.reason;
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and the launch planner of stablevelocity_kernels.";
  m.def("build_info", &build_info, "What was compiled, with what, for what.");
  m.def(
      "plan", &plan, py::kw_only(), py::arg("n"), py::arg("k"), py::arg("m"), py::arg("d"),
      py::arg("has_labels"), py::arg("has_source"), py::arg("x_size"), py::arg("refs_size"),
      py::arg("refs_bf16"), py::arg("aligned"), py::arg("precision"), py::arg("sm_count"),
      py::arg("smem_limit"), py::arg("cc"), py::arg("bandwidth"),
      "The CUDA launch of posterior_mean and stable_target for a problem, as a dict; see common/planner.h.");
}
