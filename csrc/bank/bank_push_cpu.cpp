// svel::bank_push_ on the CPU: slots are dealt in the order of the rows, then the rows are copied in
// parallel.
#include <vector>

#include "bank/push_rows.h"
#include "common/host_tensor.h"
#include "common/ops.h"
#include "common/parallel.h"

namespace svel::cpu {
namespace {

constexpr const char* OP = "bank_push_";

// The row of refs (K M, D) for each of the n labels, -1 where a later one takes the slot.
// Advances counts and heads (K,) as pushing one by one does.
template <typename Index>
std::vector<int64_t> deal_slots(const int64_t* labels, int64_t n, Index* counts, Index* heads, int64_t k,
                                int64_t m) {
  for (int64_t i = 0; i < n; ++i) {  // before anything is changed
    const int64_t head = heads[labels[i]];
    if (head < 0 || head >= m)
      fail(OP, "heads", "values in [0, " + std::to_string(m) + ")", std::to_string(head));
  }
  std::vector<int64_t> left(k, 0), slots(n);
  for (int64_t i = 0; i < n; ++i) ++left[labels[i]];
  for (int64_t i = 0; i < n; ++i) {
    const int64_t y = labels[i], slot = heads[y];
    slots[i] = left[y]-- > m ? -1 : y * m + slot;
    heads[y] = static_cast<Index>(slot + 1 == m ? 0 : slot + 1);
    if (counts[y] < m) ++counts[y];
  }
  return slots;
}

}  // namespace

void bank_push_(const Tensor& refs, const Tensor& counts, const Tensor& heads, const Tensor& values,
                const Tensor& labels, bool all_to_last) {
  check_bank_push(refs, counts, heads, values, labels, all_to_last);
  const Tensor v = packed(values), given = packed(labels);
  const int64_t n = given.size(0), k = refs.size(0), m = refs.size(1);
  const int64_t* const first = given.const_data_ptr<int64_t>();
  check_labels_in_range(OP, first, n, k - all_to_last, 0);
  if (n == 0 || m == 0) return;

  std::vector<int64_t> y(first, first + n);  // with all_to_last, twice as long: every value goes to two rings
  if (all_to_last) y.insert(y.end(), n, k - 1);
  const int64_t pushes = static_cast<int64_t>(y.size());
  const std::vector<int64_t> slots = counts.scalar_type() == ScalarType::Int
                                         ? deal_slots(y.data(), pushes, counts.mutable_data_ptr<int32_t>(),
                                                      heads.mutable_data_ptr<int32_t>(), k, m)
                                         : deal_slots(y.data(), pushes, counts.mutable_data_ptr<int64_t>(),
                                                      heads.mutable_data_ptr<int64_t>(), k, m);
  const PushProblem problem{values_of(v),  n,           refs.mutable_data_ptr(), storage_of(refs),
                            v.numel() / n, slots.data()};
  const auto kernel = pick_push_rows();
  parallel_for(pushes, problem.d, [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
}

}  // namespace svel::cpu
