// svel::posterior_mean, svel::posterior_part and svel::stable_target on the CPU: checks, coefficients of each
// row in double, one solve.
#include <algorithm>
#include <vector>

#include "common/host_tensor.h"
#include "common/ops.h"
#include "common/path.h"
#include "stable_target/posterior_cpu.h"

namespace svel::cpu {
namespace {

// The arguments both ops share, contiguous; their tensors live as long as this does.
struct Arguments {
  Tensor x, refs;
  MaybeTensor labels, source;
  PosteriorProblem problem{};

  Arguments(const char* op, const Tensor& x_, const Tensor& refs_, const MaybeTensor& labels_,
            const MaybeTensor& counts, const MaybeTensor& source_)
      : x(packed(x_)), refs(packed(refs_)), labels(packed(labels_)), source(packed(source_)) {
    const std::vector<int64_t> x_shape = shape_of(x);
    problem.n = x_shape[0];
    problem.d = product(x_shape, 1);
    problem.groups = labels ? refs.size(0) : 1;
    problem.m = refs.size(labels ? 1 : 0);
    problem.x = values_of(x);
    problem.refs = values_of(refs);
    if (source) problem.source = values_of(*source);
    if (labels) {
      problem.labels = labels->const_data_ptr<int64_t>();
      check_labels_in_range(op, problem.labels, problem.n, problem.groups, -1);
    }
    problem.counts.assign(problem.groups, problem.m);
    if (counts) {
      const bool wide = counts->scalar_type() == ScalarType::Long;
      const void* data = counts->const_data_ptr();
      for (int64_t g = 0; g < problem.groups; ++g) {
        const int64_t at = g * counts->stride(0);
        const int64_t count =
            wide ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
        problem.counts[g] = std::clamp<int64_t>(count, 0, problem.m);
      }
    }
  }
};

ScalarType mean_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Mean and lse, the latter of type lse_dtype, for arguments that are already checked.
std::tuple<Tensor, Tensor> mean_and_lse(Arguments args, const Tensor& alpha, const Tensor& sigma,
                                        ScalarType lse_dtype) {
  PosteriorProblem& p = args.problem;
  Tensor mean = torch::stable::new_empty(args.x, args.x.sizes(), mean_dtype(args.x));
  Tensor lse = torch::stable::new_empty(args.x, std::vector<int64_t>{p.n}, lse_dtype);
  p.alpha = scalars(alpha, p.n);
  p.sigma = scalars(sigma, p.n);
  p.a.assign(p.n, 0.0);
  p.b.assign(p.n, 1.0);
  p.out = mean.mutable_data_ptr();
  p.out_storage = storage_of(mean);
  std::vector<double> rows_lse(p.n);
  p.lse = rows_lse.data();
  solve(p);
  if (lse_dtype == ScalarType::Double) {
    std::copy(rows_lse.begin(), rows_lse.end(), lse.mutable_data_ptr<double>());
  } else {
    std::copy(rows_lse.begin(), rows_lse.end(), lse.mutable_data_ptr<float>());
  }
  return {mean, lse};
}

}  // namespace

std::tuple<Tensor, Tensor> posterior_mean(const Tensor& x, const Tensor& refs, const Tensor& alpha,
                                          const Tensor& sigma, const MaybeTensor& labels,
                                          const MaybeTensor& counts, const MaybeTensor& source,
                                          const std::string& precision, bool /*null_rows*/) {
  check_posterior_mean(x, refs, alpha, sigma, labels, counts, source, precision);
  return mean_and_lse({"posterior_mean", x, refs, labels, counts, source}, alpha, sigma, mean_dtype(x));
}

std::tuple<Tensor, Tensor> posterior_part(const Tensor& x, const Tensor& refs, const Tensor& alpha,
                                          const Tensor& sigma, const MaybeTensor& labels,
                                          const MaybeTensor& counts, const std::string& precision) {
  check_posterior_part(x, refs, alpha, sigma, labels, counts, precision);
  return mean_and_lse({"posterior_part", x, refs, labels, counts, std::nullopt}, alpha, sigma,
                      ScalarType::Double);
}

Tensor stable_target(const Tensor& x, const Tensor& refs, const Tensor& t, const MaybeTensor& labels,
                     const MaybeTensor& counts, const MaybeTensor& source, const std::string& path,
                     const std::string& prediction, const std::string& precision, bool /*null_rows*/) {
  check_stable_target(x, refs, t, labels, counts, source, path, prediction, precision);
  Arguments args("stable_target", x, refs, labels, counts, source);
  PosteriorProblem& p = args.problem;
  Tensor out = torch::stable::new_empty(x, x.sizes());
  for (double time : scalars(t, p.n)) {
    const PathCoefficients now = path_coefficients(path_of(path), clamp_time(time));
    const PredictionCoefficients to = prediction_coefficients(prediction_of(prediction), now);
    p.alpha.push_back(now.alpha);
    p.sigma.push_back(now.sigma);
    p.a.push_back(to.a);
    p.b.push_back(to.b);
  }
  p.out = out.mutable_data_ptr();
  p.out_storage = storage_of(out);
  solve(p);
  return out;
}

}  // namespace svel::cpu
