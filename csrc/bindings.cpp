// stablevelocity_kernels._C: what was built, and the launch planner. Host only, no torch headers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "build_config.h"
#include "common/isa.h"

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and the launch planner of stablevelocity_kernels.";
  m.def("build_info", &build_info, "What was compiled, with what, for what.");
}
