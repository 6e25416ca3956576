// Entry points of svel::posterior_mean, svel::posterior_part and svel::stable_target on CUDA: checks, plan,
// workspace, launch.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "common/gather.cuh"
#include "common/ops.h"
#include "common/tensors.cuh"
#include "stable_target/launch.cuh"
#include "stable_target/pool_bank.h"

namespace svel::cuda {
namespace {

struct Arguments {
  const Tensor& x;
  const Tensor& refs;
  const MaybeTensor& labels;
  const MaybeTensor& counts;
  const MaybeTensor& source;
  const std::string& precision;
  bool null_rows = false;
};

void launch(const char* op, const Inputs& in, const Plan& plan, void* workspace, cudaStream_t stream) {
  const auto run = plan.kernel == "pool"         ? run_pool
                   : plan.kernel == "many_rows"  ? run_many_rows
                   : plan.kernel == "short_rows" ? run_short_rows
                   : plan.kernel == "held"       ? run_held
                   : plan.kernel == "swept"      ? run_swept
                   : plan.kernel == "bulk"       ? run_bulk
                   : plan.kernel == "stream"     ? run_stream
                   : plan.kernel == "tiled"      ? run_tiled
                   : plan.kernel == "small"      ? run_small
                                                 : run_two_pass;
  run(op, in, plan, workspace, stream);
}

Problem problem_of(const char* op, const Tensor& x, const Tensor& refs, bool labels, bool source,
                   const std::string& precision) {
  Problem problem;
  problem.n = x.size(0), problem.d = product(shape_of(x), 1);
  problem.k = labels ? refs.size(0) : 1, problem.m = refs.size(labels ? 1 : 0);
  problem.has_labels = labels, problem.has_source = source;
  const Array stored = array_of(refs);
  problem.x_size = size_of(array_of(x).dtype), problem.refs_size = size_of(stored.dtype);
  problem.aligned = is_aligned(stored.data) && problem.d * problem.refs_size % 16 == 0;
  problem.refs_bf16 = stored.dtype == Dtype::bf16;
  problem.precision = precision;
  const DeviceLimits& limits = device_limits(op, x.get_device_index());
  problem.sm_count = limits.sm_count, problem.smem_limit = limits.smem_limit, problem.cc = limits.cc;
  if (limits.bandwidth > 0) problem.bandwidth = limits.bandwidth;
#if !defined(SVEL_HAS_SM90A)
  problem.has_sm90a = false;
#endif
  return problem;
}

// Fills `out` (N, *S) and, where given, `lse` (N,). time_or_alpha, sigma: contiguous, see Inputs. list: the
// workspace, which is made where the list of work alone is, and given for the rest.
void run(const char* op, const Arguments& given, Inputs in, const Tensor& time_or_alpha,
         const MaybeTensor& sigma, const Tensor& out, const MaybeTensor& lse, MaybeTensor* list = nullptr) {
  const Tensor x = packed(given.x), refs = packed(given.refs), scalars = packed(time_or_alpha);
  const MaybeTensor labels = packed(given.labels), counts = packed(given.counts),
                    source = packed(given.source);
  const MaybeTensor deviations = packed(sigma);
  in.n = x.size(0);
  in.d = product(shape_of(x), 1);
  in.k = labels ? refs.size(0) : 1;
  in.m = refs.size(labels ? 1 : 0);
  const cudaStream_t stream = current_stream(x);
  if (in.n == 0) {
    if (in.gather) run_gather(op, *in.gather, x.get_device_index(), stream);
    return;
  }
  in.x = array_of(x), in.refs = array_of(refs), in.time_or_alpha = array_of(scalars), in.out = array_of(out);
  if (source) in.source = array_of(*source);
  if (deviations) in.sigma = array_of(*deviations);
  if (lse) in.lse = array_of(*lse);
  if (labels) in.labels = static_cast<const int64_t*>(labels->const_data_ptr());
  if (counts) {
    in.counts = counts->const_data_ptr();
    in.counts_are_long = counts->scalar_type() == ScalarType::Long;
  }

  Problem problem = problem_of(op, x, refs, labels.has_value(), source.has_value(), given.precision);
  problem.vectors = is_vector(in.x) && is_vector(in.out) && (!source || is_vector(in.source));
  problem.shared_rows = in.mailboxes != nullptr;
  const Plan plan = make_plan(problem);
  if (in.at_home && in.at_home->merged && !plan.products)
    fail(op, "merged", "None for rows of another kernel", "a tensor");
  const bool beside_a_list = plan.kernel == "bulk" && !plan.own_list && has_short_list(in.n, in.k, in.m);
  if (in.stage != Stage::whole && !(plan.products && beside_a_list && in.gather->by_words))
    fail(op, "list", "rows that part_goes_home answers with 3", "others");
  if (in.gather && in.stage != Stage::rest && !(beside_a_list && in.gather->by_words)) {
    run_gather(op, *in.gather, x.get_device_index(), stream);
    in.gather = nullptr;
  }
  PoolBankPlan bank;
  const bool has_bank = given.null_rows && plan_pool_bank(problem, plan, bank);
  const int64_t bytes = has_bank ? pool_bank_offset(plan) + bank.pool.workspace_bytes : plan.workspace_bytes;
  const Tensor workspace =
      in.stage == Stage::rest ? **list : torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
  if (in.stage == Stage::list) *list = workspace;
  if (has_bank) return run_pool_bank(op, in, plan, bank, workspace.mutable_data_ptr(), stream);
  launch(op, in, plan, workspace.mutable_data_ptr(), stream);
}

// Rows of as many processes as there are mailboxes.
void place_rows(Inputs& in, const Tensor& x, const Tensor& mailboxes, int64_t part) {
  in.mailboxes = static_cast<const int64_t*>(mailboxes.const_data_ptr());
  in.part = static_cast<int>(part), in.parts = static_cast<int>(mailboxes.size(0));
  in.rows_each = x.size(0) / in.parts;
}

ScalarType mean_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor> mean_and_lse(const char* op, const Arguments& given, const Tensor& alpha,
                                        const Tensor& sigma, ScalarType lse_dtype, bool partial) {
  const Tensor& x = given.x;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor mean = torch::stable::new_empty(x, shape_of(x), mean_dtype(x));
  const Tensor lse = torch::stable::new_empty(x, {x.size(0)}, lse_dtype);
  Inputs in;
  in.partial = partial;
  run(op, given, in, alpha, sigma, mean, lse);
  return {mean, lse};
}

}  // namespace

std::tuple<Tensor, Tensor> posterior_mean(const Tensor& x, const Tensor& refs, const Tensor& alpha,
                                          const Tensor& sigma, const MaybeTensor& labels,
                                          const MaybeTensor& counts, const MaybeTensor& source,
                                          const std::string& precision, bool null_rows) {
  check_posterior_mean(x, refs, alpha, sigma, labels, counts, source, precision);
  return mean_and_lse("posterior_mean", {x, refs, labels, counts, source, precision, null_rows}, alpha, sigma,
                      mean_dtype(x), false);
}

std::tuple<Tensor, Tensor> posterior_part(const Tensor& x, const Tensor& refs, const Tensor& alpha,
                                          const Tensor& sigma, const MaybeTensor& labels,
                                          const MaybeTensor& counts, const std::string& precision) {
  check_posterior_part(x, refs, alpha, sigma, labels, counts, precision);
  const MaybeTensor no_source;
  return mean_and_lse("posterior_part", {x, refs, labels, counts, no_source, precision}, alpha, sigma,
                      ScalarType::Double, true);
}

int64_t part_goes_home(const Tensor& x, const Tensor& refs, const MaybeTensor& labels,
                       const std::string& precision) {
  Problem problem = problem_of("posterior_part", x, refs, labels.has_value(), false, precision);
  problem.vectors = is_vector(array_of(x)), problem.shared_rows = true;  // results are where x is
  const Plan plan = make_plan(problem);
  if (plan.kernel != "bulk") return 0;
  if (!plan.products) return 1;
  return has_short_list(problem.n, problem.k, problem.m) ? 3 : 2;
}

Tensor posterior_part_list(const Tensor& x, const Tensor& refs, const Tensor& t, const MaybeTensor& labels,
                           const MaybeTensor& counts, const std::string& precision, const Tensor& mailboxes,
                           int64_t part, const Tensor& own_t, const MaybeTensor& own_labels, double t_min,
                           int64_t words, double seconds, const Tensor& addresses) {
  const char* const op = "posterior_part";
  check_posterior_part(x, refs, t, t, labels, counts, precision);
  if (own_t.scalar_type() != ScalarType::Float) fail(op, "own_t", "float32", "another dtype");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const MaybeTensor no_tensor;
  Inputs in;
  in.from_time = in.partial = true, in.stage = Stage::list;
  place_rows(in, x, mailboxes, part);
  GatherRows rows(peers_of(op, addresses, part, seconds), own_t, own_labels, no_tensor, no_tensor, true,
                  words);
  rows.gather.has_least = true, rows.gather.least = static_cast<float>(t_min);
  in.gather = &rows.gather;
  MaybeTensor list;
  run(op, {x, refs, labels, counts, no_tensor, precision}, in, t, std::nullopt, x, std::nullopt, &list);
  return *list;
}

void posterior_part_out(const Tensor& x, const Tensor& refs, const Tensor& time_or_alpha,
                        const MaybeTensor& sigma, const std::string& path, const MaybeTensor& labels,
                        const MaybeTensor& counts, const std::string& precision, const Tensor& mean,
                        const Tensor& lse, const MaybeTensor& mailboxes, int64_t part, int64_t xs,
                        int64_t means, int64_t lses, const MaybeTensor& own_a, const MaybeTensor& own_b,
                        const MaybeTensor& own_c, const MaybeTensor& own_x, int64_t words, double seconds,
                        const MaybeTensor& addresses, const MaybeTensor& merged, const MaybeTensor& merged_x,
                        const std::string& prediction, const MaybeTensor& list) {
  const char* const op = "posterior_part";
  check_posterior_part(x, refs, time_or_alpha, sigma ? *sigma : time_or_alpha, labels, counts, precision);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const MaybeTensor no_source;
  Inputs in;
  in.from_time = !sigma, in.partial = true;
  if (in.from_time) in.path = path_of(path);
  AtHome home{};
  if (mailboxes) {
    place_rows(in, x, *mailboxes, part);
    in.x_at = xs, in.mean_at = means, in.lse_at = lses;
  }
  std::optional<GatherRows> rows;
  if (own_a) {
    rows.emplace(peers_of(op, *addresses, part, seconds), own_a, own_b, own_c, own_x, true, words);
    in.gather = &rows->gather, in.at_home = &home;
    const Peers& peers = rows->gather.peers;
    home.mailbox = peers.mailboxes[part], home.patience = peers.patience;
    if (labels) home.labels = static_cast<const int64_t*>(rows->kept[sigma ? 2 : 1].const_data_ptr());
  }
  if (merged) {
    home.merged = static_cast<float*>(merged->mutable_data_ptr());
    home.x = static_cast<const float*>(merged_x->const_data_ptr());
    home.prediction = prediction_of(prediction);
  }
  MaybeTensor made = list;
  if (made) in.stage = Stage::rest, home.awaits_x = true;
  run(op, {x, refs, labels, counts, no_source, precision}, in, time_or_alpha, sigma, mean, lse, &made);
}

Tensor stable_target(const Tensor& x, const Tensor& refs, const Tensor& t, const MaybeTensor& labels,
                     const MaybeTensor& counts, const MaybeTensor& source, const std::string& path,
                     const std::string& prediction, const std::string& precision, bool null_rows) {
  const char* const op = "stable_target";
  check_stable_target(x, refs, t, labels, counts, source, path, prediction, precision);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor out = torch::stable::new_empty(x, shape_of(x));
  Inputs in;
  in.from_time = true;
  in.path = path_of(path);
  in.prediction = prediction_of(prediction);
  run(op, {x, refs, labels, counts, source, precision, null_rows}, in, t, std::nullopt, out, std::nullopt);
  return out;
}

}  // namespace svel::cuda
