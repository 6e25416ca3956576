// svel::conditional_target_ on the CPU.
#include <cmath>

#include "bank/mix_row.h"
#include "common/host_tensor.h"
#include "common/ops.h"
#include "common/parallel.h"
#include "common/path.h"

namespace svel::cpu {

void conditional_target_(const Tensor& target, const Tensor& x0, const Tensor& noise, const Tensor& t,
                         const Tensor& t_set, const std::string& path, const std::string& prediction) {
  check_conditional_target(target, x0, noise, t, t_set, path, prediction);
  const Tensor x = packed(x0), eps = packed(noise);
  const int64_t n = target.size(0), d = product(shape_of(target), 1);
  const std::vector<double> times = scalars(t, n), kept = scalars(t_set, n);
  const auto kernel = pick_mix_row();
  const int64_t bytes = d * bytes_of(storage_of(target));
  parallel_for(n, d, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!std::isnan(kept[i]) || std::isnan(times[i])) continue;
      const PathCoefficients at = path_coefficients(path_of(path), clamp_time(times[i]));
      const PredictionCoefficients c = conditional_coefficients(prediction_of(prediction), at);
      MixRow row{};
      row.x = row_of(values_of(x), i, d), row.noise = row_of(values_of(eps), i, d);
      row.out = storage_of(target);
      row.mixed = static_cast<char*>(target.mutable_data_ptr()) + i * bytes;
      row.d = d;
      row.a = c.a, row.b = c.b;
      kernel(row);
    }
  });
}

}  // namespace svel::cpu
