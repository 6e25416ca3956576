// svel::va_repa_loss and its gradient on the CPU: rows in parallel, then a sum in a fixed order, so that the
// result does not depend on the number of threads.
#include <vector>

#include "common/host_tensor.h"
#include "common/ops.h"
#include "common/parallel.h"
#include "va_repa/cosine_rows.h"

namespace svel::cpu {
namespace {

constexpr double MIN_WEIGHT_SUM = 1e-8;

// Any strides over B and T are read in place; only values that do not lie next to each other are copied
// first.
Tensor with_unit_stride(const Tensor& t) {
  return t.size(2) <= 1 || t.stride(2) == 1 ? t : torch::stable::contiguous(t);
}

Rows rows_of(const Tensor& t) {
  return {values_of(t), t.stride(0), t.stride(1)};
}

CosineProblem problem_of(const Tensor& projected, const Tensor& teacher) {
  return {rows_of(projected), rows_of(teacher), projected.size(1), projected.size(2),
          projected.scalar_type() == ScalarType::Double};
}

double sum(const std::vector<double>& values) {
  double total = 0.0;
  for (double value : values) total += value;
  return total;
}

}  // namespace

Tensor va_repa_loss(const Tensor& projected, const Tensor& teacher, const Tensor& weight) {
  check_va_repa("va_repa_loss", projected, teacher, weight);
  const Tensor p = with_unit_stride(projected), z = with_unit_stride(teacher);
  const CosineProblem problem = problem_of(p, z);
  const int64_t b = p.size(0), t = p.size(1);
  std::vector<double> cosine(b * t);
  const auto kernel = pick_cosine_rows();
  parallel_for(b * t, problem.c,
               [&](int64_t begin, int64_t end) { kernel(problem, cosine.data(), begin, end); });

  const std::vector<double> w = scalars(weight, b);
  const double total = sum(w);
  double loss = 0.0;
  if (!(total < MIN_WEIGHT_SUM)) {
    for (int64_t i = 0; i < b; ++i) {
      double row = 0.0;
      for (int64_t j = 0; j < t; ++j) row += cosine[i * t + j];
      loss -= w[i] * (row / static_cast<double>(t));
    }
    loss /= total;
  }
  const ScalarType dtype = problem.wide ? ScalarType::Double : ScalarType::Float;
  Tensor out = torch::stable::new_empty(p, std::vector<int64_t>(), dtype);
  if (problem.wide) {
    *out.mutable_data_ptr<double>() = loss;
  } else {
    *out.mutable_data_ptr<float>() = static_cast<float>(loss);
  }
  return out;
}

Tensor va_repa_loss_backward(const Tensor& grad, const Tensor& projected, const Tensor& teacher,
                             const Tensor& weight) {
  const char* op = "va_repa_loss_backward";
  check_va_repa(op, projected, teacher, weight);
  check_dtype(op, "grad", grad, {ScalarType::Float, ScalarType::Double});
  check_shape(op, "grad", grad, {}, "()");
  check_device(op, "grad", grad, projected);
  const Tensor p = with_unit_stride(projected), z = with_unit_stride(teacher);
  const CosineProblem problem = problem_of(p, z);
  const int64_t b = p.size(0), t = p.size(1);
  Tensor out = torch::stable::new_empty(p, p.sizes());

  const std::vector<double> w = scalars(weight, b);
  const double total = sum(w), upstream = scalars(grad, 1)[0];
  std::vector<double> scale(b, 0.0);
  for (int64_t i = 0; i < b && !(total < MIN_WEIGHT_SUM); ++i) {
    scale[i] = -w[i] * upstream / (total * static_cast<double>(t));
  }
  void* data = out.mutable_data_ptr();
  const auto kernel = pick_cosine_gradient_rows();
  parallel_for(b * t, 2 * problem.c,
               [&](int64_t begin, int64_t end) { kernel(problem, scale.data(), data, begin, end); });
  return out;
}

}  // namespace svel::cpu
