// Argument checks. Every message names the op, the argument, what was expected and what came, in the words of
// stablevelocity_kernels/_checks.py. They reach Python as RuntimeError.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace svel {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Dtypes = std::initializer_list<ScalarType>;

inline constexpr Dtypes FLOATS = {ScalarType::Half, ScalarType::BFloat16, ScalarType::Float,
                                  ScalarType::Double};

[[noreturn]] inline void fail(const std::string& op, const std::string& arg, const std::string& expected,
                              const std::string& got) {
  throw std::runtime_error("svel::" + op + ": " + arg + ": expected " + expected + ", got " + got);
}

// As Python writes a float: the shortest decimal that reads back as the same double.
inline std::string to_text(double value) {
  for (int digits = 1; digits < 17; ++digits) {
    std::ostringstream out;
    out.precision(digits);
    out << value;
    if (std::stod(out.str()) == value) {
      const bool whole = out.str().find_first_not_of("-0123456789") == std::string::npos;
      return whole ? out.str() + ".0" : out.str();
    }
  }
  std::ostringstream out;
  out.precision(17);
  out << value;
  return out.str();
}

// As Python writes a tuple: (), (3,), (3, 4).
inline std::string to_text(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

inline std::string to_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return torch::headeronly::toString(dtype);
  }
}

inline std::string to_text(const torch::stable::Device& device) {
  if (device.type() == torch::headeronly::DeviceType::CPU) return "cpu";
  const std::string type = device.type() == torch::headeronly::DeviceType::CUDA ? "cuda" : "another device";
  return device.has_index() ? type + ":" + std::to_string(device.index()) : type;
}

// T: Tensor, or Argument (common/argument.h).
template <typename T>
std::vector<int64_t> shape_of(const T& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

inline int64_t product(const std::vector<int64_t>& shape, size_t from = 0) {
  int64_t n = 1;
  for (size_t i = from; i < shape.size(); ++i) n *= shape[i];
  return n;
}

template <typename T>
void check_dtype(const char* op, const char* arg, const T& t, Dtypes dtypes) {
  const ScalarType dtype = t.scalar_type();
  if (std::find(dtypes.begin(), dtypes.end(), dtype) != dtypes.end()) return;
  std::string expected;
  for (ScalarType d : dtypes) expected += (expected.empty() ? "" : " or ") + to_text(d);
  fail(op, arg, expected, to_text(dtype));
}

// By the ABI's own numbers: making a Device or a ScalarType of them costs ten times as much.
inline bool same_device(const Tensor& a, const Tensor& b) {
  int32_t types[2], indices[2];
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(a.get(), &types[0]));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(b.get(), &types[1]));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(a.get(), &indices[0]));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(b.get(), &indices[1]));
  return types[0] == types[1] && indices[0] == indices[1];
}

template <typename T>
void check_device(const char* op, const char* arg, const T& t, const T& like) {
  if (!same_device(t, like)) fail(op, arg, "a tensor on " + to_text(like.device()), to_text(t.device()));
}

inline void check_shape(const char* op, const char* arg, const Tensor& t, const std::vector<int64_t>& shape,
                        const char* meaning) {
  const auto sizes = t.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end())) {
    fail(op, arg, std::string("shape ") + meaning + " = " + to_text(shape), to_text(shape_of(t)));
  }
}

// The same without a list of the expected sizes, for what is called at every step.
template <typename T>
void check_shape_like(const char* op, const char* arg, const T& t, const T& like, const char* meaning) {
  const auto sizes = t.sizes(), expected = like.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end())) {
    fail(op, arg, std::string("shape ") + meaning + " = " + to_text(shape_of(like)), to_text(shape_of(t)));
  }
}

inline void check_choice(const char* op, const char* arg, const std::string& value,
                         std::initializer_list<const char*> choices) {
  if (std::find(choices.begin(), choices.end(), value) != choices.end()) return;
  std::string expected;
  for (const char* choice : choices) expected += (expected.empty() ? "'" : ", '") + std::string(choice) + "'";
  fail(op, arg, "one of " + expected, "'" + value + "'");
}

// A per-row scalar: (N,) float32, or float64 beside a float64 x.
inline void check_row_scalar(const char* op, const char* arg, const Tensor& t, const Tensor& x) {
  if (x.scalar_type() == ScalarType::Double) {
    check_dtype(op, arg, t, {ScalarType::Float, ScalarType::Double});
  } else {
    check_dtype(op, arg, t, {ScalarType::Float});
  }
  check_shape(op, arg, t, {x.size(0)}, "(N,)");
  check_device(op, arg, t, x);
}

// x (N, *S); refs (M, *S) or, with labels, (K, M, *S); labels (N,) int64; counts (1,) or (K,); source (N,
// *S).
inline void check_reference_set(const char* op, const Tensor& x, const Tensor& refs,
                                const MaybeTensor& labels, const MaybeTensor& counts,
                                const MaybeTensor& source, const std::string& precision) {
  if (x.dim() < 1) fail(op, "x", "shape (N, *S)", to_text(shape_of(x)));
  check_dtype(op, "x", x, FLOATS);
  check_dtype(op, "refs", refs, FLOATS);
  check_device(op, "refs", refs, x);
  const std::vector<int64_t> x_shape = shape_of(x), refs_shape = shape_of(refs);
  const size_t lead = labels ? 2 : 1;
  if (refs_shape.size() != x_shape.size() - 1 + lead ||
      !std::equal(x_shape.begin() + 1, x_shape.end(), refs_shape.begin() + static_cast<int64_t>(lead))) {
    const std::string form = labels ? "(K, M, *S) because labels are given" : "(M, *S)";
    fail(op, "refs",
         "shape " + form + " with S = " + to_text(std::vector<int64_t>(x_shape.begin() + 1, x_shape.end())),
         to_text(refs_shape));
  }
  if (labels) {
    check_dtype(op, "labels", *labels, {ScalarType::Long});
    check_shape(op, "labels", *labels, {x_shape[0]}, "(N,)");
    check_device(op, "labels", *labels, x);
  }
  if (counts) {
    check_dtype(op, "counts", *counts, {ScalarType::Int, ScalarType::Long});
    check_shape(op, "counts", *counts, {labels ? refs_shape[0] : 1}, labels ? "(K,)" : "(1,)");
    check_device(op, "counts", *counts, x);
  }
  if (source) {
    check_dtype(op, "source", *source, {x.scalar_type(), refs.scalar_type()});
    check_shape(op, "source", *source, x_shape, "of x, (N, *S)");
    check_device(op, "source", *source, x);
  }
  if (precision != "exact" && precision != "fast")
    fail(op, "precision", "'exact' or 'fast'", "'" + precision + "'");
}

// CPU only, where reading the labels costs no synchronisation: labels[0..n) all in [lowest, groups).
inline void check_labels_in_range(const char* op, const int64_t* labels, int64_t n, int64_t groups,
                                  int64_t lowest) {
  if (n == 0) return;
  const auto [low, high] = std::minmax_element(labels, labels + n);
  if (*low >= lowest && *high < groups) return;
  fail(op, "labels", "values in [" + std::to_string(lowest) + ", " + std::to_string(groups) + ")",
       "values in [" + std::to_string(*low) + ", " + std::to_string(*high) + "]");
}

inline void check_posterior_mean(const Tensor& x, const Tensor& refs, const Tensor& alpha,
                                 const Tensor& sigma, const MaybeTensor& labels, const MaybeTensor& counts,
                                 const MaybeTensor& source, const std::string& precision) {
  const char* op = "posterior_mean";
  check_reference_set(op, x, refs, labels, counts, source, precision);
  check_row_scalar(op, "alpha", alpha, x);
  check_row_scalar(op, "sigma", sigma, x);
}

// A per-row scalar (n,), float32 or float64.
inline void check_any_row_scalar(const char* op, const char* arg, const Tensor& t, int64_t n,
                                 const Tensor& like) {
  check_dtype(op, arg, t, {ScalarType::Float, ScalarType::Double});
  check_shape(op, arg, t, {n}, "(N,)");
  check_device(op, arg, t, like);
}

inline void check_posterior_part(const Tensor& x, const Tensor& refs, const Tensor& alpha,
                                 const Tensor& sigma, const MaybeTensor& labels, const MaybeTensor& counts,
                                 const std::string& precision) {
  const char* op = "posterior_part";
  check_reference_set(op, x, refs, labels, counts, std::nullopt, precision);
  check_any_row_scalar(op, "alpha", alpha, x.size(0), x);
  check_any_row_scalar(op, "sigma", sigma, x.size(0), x);
}

inline void check_path(const char* op, const std::string& path) {
  check_choice(op, "path", path, {"linear", "cosine"});
}

inline void check_prediction(const char* op, const std::string& prediction) {
  check_choice(op, "prediction", prediction, {"velocity", "x0", "noise", "score"});
}

inline void check_stable_target(const Tensor& x, const Tensor& refs, const Tensor& t,
                                const MaybeTensor& labels, const MaybeTensor& counts,
                                const MaybeTensor& source, const std::string& path,
                                const std::string& prediction, const std::string& precision) {
  const char* op = "stable_target";
  check_reference_set(op, x, refs, labels, counts, source, precision);
  check_row_scalar(op, "t", t, x);
  check_path(op, path);
  check_prediction(op, prediction);
}

// projected and teacher (B, T, C), weight (B,).
inline void check_va_repa(const char* op, const Tensor& projected, const Tensor& teacher,
                          const Tensor& weight) {
  check_dtype(op, "projected", projected, FLOATS);
  check_dtype(op, "teacher", teacher, FLOATS);
  if (projected.dim() != 3) fail(op, "projected", "shape (B, T, C)", to_text(shape_of(projected)));
  check_shape_like(op, "teacher", teacher, projected, "of projected, (B, T, C)");
  check_device(op, "teacher", teacher, projected);
  check_row_scalar(op, "weight", weight, projected);
}

inline void check_written_in_place(const char* op, const char* arg, const Tensor& t) {
  if (t.is_contiguous()) return;
  const auto strides = t.strides();
  fail(op, arg, "a contiguous tensor, because it is written in place",
       "strides " + to_text(std::vector<int64_t>(strides.begin(), strides.end())));
}

// refs (K, M, *S), counts and heads (K,), all written in place; values (N, *S), labels (N,).
inline void check_bank_push(const Tensor& refs, const Tensor& counts, const Tensor& heads,
                            const Tensor& values, const Tensor& labels, bool all_to_last) {
  const char* op = "bank_push_";
  const std::vector<int64_t> shape = shape_of(refs);
  if (shape.size() < 2) fail(op, "refs", "shape (K, M, *S)", to_text(shape));
  if (all_to_last && shape[0] == 0) fail(op, "all_to_last", "False because refs has no group", "True");
  check_written_in_place(op, "refs", refs);
  check_written_in_place(op, "counts", counts);
  check_written_in_place(op, "heads", heads);
  if (refs.scalar_type() == ScalarType::Long) {  // dataset indices
    check_dtype(op, "values", values, {ScalarType::Long});
  } else {
    check_dtype(
        op, "refs", refs,
        {ScalarType::Half, ScalarType::BFloat16, ScalarType::Float, ScalarType::Double, ScalarType::Long});
    check_dtype(op, "values", values, FLOATS);
  }
  for (const auto& [arg, value] : {std::pair{"counts", counts}, std::pair{"heads", heads}}) {
    check_dtype(op, arg, value, {ScalarType::Int, ScalarType::Long});
    check_shape(op, arg, value, {shape[0]}, "(K,)");
    check_device(op, arg, value, refs);
  }
  if (heads.scalar_type() != counts.scalar_type()) {
    fail(op, "heads", "the dtype of counts, torch." + to_text(counts.scalar_type()),
         "torch." + to_text(heads.scalar_type()));
  }
  check_dtype(op, "labels", labels, {ScalarType::Long});
  if (labels.dim() != 1) fail(op, "labels", "shape (N,)", to_text(shape_of(labels)));
  std::vector<int64_t> values_shape = {labels.size(0)};
  values_shape.insert(values_shape.end(), shape.begin() + 2, shape.end());
  check_shape(op, "values", values, values_shape, "(N, *S)");
  check_device(op, "values", values, refs);
  check_device(op, "labels", labels, refs);
}

// refs (K, M, *S), counts (K,); u, labels, t (N,); fallback and noise (N, *S).
inline void check_bank_draw(const Tensor& refs, const Tensor& counts, const Tensor& u,
                            const MaybeTensor& labels, const MaybeTensor& fallback, const MaybeTensor& noise,
                            const MaybeTensor& t, const std::string& path) {
  const char* op = "bank_draw";
  const std::vector<int64_t> shape = shape_of(refs);
  if (shape.size() < 2) fail(op, "refs", "shape (K, M, *S)", to_text(shape));
  check_dtype(op, "refs", refs, FLOATS);
  check_dtype(op, "counts", counts, {ScalarType::Int, ScalarType::Long});
  check_shape(op, "counts", counts, {shape[0]}, "(K,)");
  check_device(op, "counts", counts, refs);
  check_dtype(op, "u", u, {ScalarType::Float, ScalarType::Double});
  if (u.dim() != 1) fail(op, "u", "shape (N,)", to_text(shape_of(u)));
  check_device(op, "u", u, refs);
  const int64_t n = u.size(0);
  if (labels) {
    check_dtype(op, "labels", *labels, {ScalarType::Long});
    check_shape(op, "labels", *labels, {n}, "(N,)");
    check_device(op, "labels", *labels, refs);
  } else if (shape[0] != 1) {
    fail(op, "labels", "a tensor because refs has " + std::to_string(shape[0]) + " groups", "None");
  }
  if (noise.has_value() != t.has_value()) {
    const std::string missing = noise ? "t" : "noise";
    fail(op, missing, "noise and t to be given together", missing + "=None");
  }
  std::vector<int64_t> rows = {n};
  rows.insert(rows.end(), shape.begin() + 2, shape.end());
  for (const auto& [arg, value] : {std::pair{"fallback", fallback}, std::pair{"noise", noise}}) {
    if (!value) continue;
    check_dtype(op, arg, *value, FLOATS);
    check_shape(op, arg, *value, rows, "(N, *S)");
    check_device(op, arg, *value, refs);
  }
  if (t) check_any_row_scalar(op, "t", *t, n, refs);
  check_path(op, path);
}

// target (N, *S), written in place; x0 and noise alike; t and t_set (N,).
inline void check_conditional_target(const Tensor& target, const Tensor& x0, const Tensor& noise,
                                     const Tensor& t, const Tensor& t_set, const std::string& path,
                                     const std::string& prediction) {
  const char* op = "conditional_target_";
  const std::vector<int64_t> shape = shape_of(target);
  if (shape.empty()) fail(op, "target", "shape (N, *S)", to_text(shape));
  check_dtype(op, "target", target, FLOATS);
  check_written_in_place(op, "target", target);
  for (const auto& [arg, value] : {std::pair{"x0", x0}, std::pair{"noise", noise}}) {
    check_dtype(op, arg, value, FLOATS);
    check_shape(op, arg, value, shape, "of target, (N, *S)");
    check_device(op, arg, value, target);
  }
  check_any_row_scalar(op, "t", t, shape[0], target);
  check_any_row_scalar(op, "t_set", t_set, shape[0], target);
  check_path(op, path);
  check_prediction(op, prediction);
}

}  // namespace svel
