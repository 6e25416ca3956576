// svel::bank_draw on the CPU: a slot for each row, then the rows in parallel.
#include <cmath>
#include <vector>

#include "bank/mix_row.h"
#include "common/host_tensor.h"
#include "common/ops.h"
#include "common/parallel.h"
#include "common/path.h"

namespace svel::cpu {
namespace {

constexpr const char* OP = "bank_draw";

// Which of `count` > 0 references the number u of [0, 1) means.
int64_t pick(double u, int64_t count) {
  const double number = u * static_cast<double>(count);
  if (!(number > 0.0)) return 0;
  return number >= static_cast<double>(count) ? count - 1 : static_cast<int64_t>(number);
}

// The valid references of the groups, numbered one group after the other: (K + 1,) where each group begins.
template <typename Index>
std::vector<int64_t> group_begins(const Index* counts, int64_t k, int64_t m) {
  std::vector<int64_t> begins(k + 1, 0);
  for (int64_t g = 0; g < k; ++g) {
    begins[g + 1] = begins[g] + std::clamp<int64_t>(counts[g], 0, m);
  }
  return begins;
}

// The row of refs (K M, D) for label y, -1 where the group is empty.
int64_t draw_slot(const std::vector<int64_t>& begins, int64_t m, int64_t y, double u) {
  if (y < 0) {
    if (begins.back() == 0) return -1;
    const int64_t number = pick(u, begins.back());
    const int64_t g = std::upper_bound(begins.begin(), begins.end(), number) - begins.begin() - 1;
    return g * m + number - begins[g];
  }
  const int64_t count = begins[y + 1] - begins[y];
  return count == 0 ? -1 : y * m + pick(u, count);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> bank_draw(const Tensor& refs, const Tensor& counts,
                                                     const Tensor& u, const MaybeTensor& labels,
                                                     const MaybeTensor& fallback, const MaybeTensor& noise,
                                                     const MaybeTensor& t, const std::string& path,
                                                     double t_min) {
  check_bank_draw(refs, counts, u, labels, fallback, noise, t, path);
  const Tensor r = packed(refs), c = packed(counts);
  const MaybeTensor y = packed(labels), own = packed(fallback), eps = packed(noise);
  const int64_t n = u.size(0), k = r.size(0), m = r.size(1);
  if (y) check_labels_in_range(OP, y->const_data_ptr<int64_t>(), n, k, -1);

  std::vector<int64_t> shape = shape_of(r);
  shape.erase(shape.begin());
  shape[0] = n;
  const int64_t d = product(shape, 1);
  const ScalarType work = r.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor x0 = torch::stable::new_empty(r, shape, work);
  const Tensor slot = torch::stable::new_empty(r, {n}, ScalarType::Long);
  const Tensor x_t = torch::stable::new_empty(r, t ? shape : std::vector<int64_t>{0}, work);
  const Tensor t_set =
      t ? torch::stable::new_empty(*t, {n}) : torch::stable::new_empty(r, {0}, ScalarType::Float);

  const std::vector<int64_t> begins = c.scalar_type() == ScalarType::Int
                                          ? group_begins(c.const_data_ptr<int32_t>(), k, m)
                                          : group_begins(c.const_data_ptr<int64_t>(), k, m);
  const std::vector<double> numbers = scalars(u, n);
  int64_t* const slots = slot.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i) {
    slots[i] = draw_slot(begins, m, y ? y->const_data_ptr<int64_t>()[i] : 0, numbers[i]);
  }
  const std::vector<double> times = t ? scalars(*t, n) : std::vector<double>();
  if (t) {
    const bool wide = t->scalar_type() == ScalarType::Double;
    const double least = wide ? t_min : static_cast<float>(t_min);
    for (int64_t i = 0; i < n; ++i) {
      const double kept = slots[i] >= 0 && !(times[i] < least) ? times[i] : std::nan("");
      if (wide) {
        t_set.mutable_data_ptr<double>()[i] = kept;
      } else {
        t_set.mutable_data_ptr<float>()[i] = static_cast<float>(kept);
      }
    }
  }

  const auto kernel = pick_mix_row();
  const int64_t bytes = d * bytes_of(storage_of(x0));
  parallel_for(n, d, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      MixRow row{};
      row.x = slots[i] >= 0 ? row_of(values_of(r), slots[i], d)
              : own         ? row_of(values_of(*own), i, d)
                            : Values{};
      row.out = storage_of(x0);
      row.kept = static_cast<char*>(x0.mutable_data_ptr()) + i * bytes;
      row.d = d;
      if (t) {
        const PathCoefficients at = path_coefficients(path_of(path), times[i]);
        row.noise = row_of(values_of(*eps), i, d);
        row.mixed = static_cast<char*>(x_t.mutable_data_ptr()) + i * bytes;
        row.a = at.alpha, row.b = at.sigma;
      }
      kernel(row);
    }
  });
  return {x0, slot, x_t, t_set};
}

}  // namespace svel::cpu
