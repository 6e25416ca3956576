// The entry points of the ops, in the order of their schemas (stablevelocity_kernels/ops). Each library
// defines them in its own namespace: svel::cpu in csrc/<op>/*_cpu.cpp, svel::cuda in csrc/<op>/*_cuda.cu.
#pragma once

#include <string>
#include <tuple>

#include "common/argument.h"

namespace svel::SVEL_DEVICE {

std::tuple<Tensor, Tensor> posterior_mean(const Tensor& x, const Tensor& refs, const Tensor& alpha,
                                          const Tensor& sigma, const MaybeTensor& labels,
                                          const MaybeTensor& counts, const MaybeTensor& source,
                                          const std::string& precision, bool null_rows);

std::tuple<Tensor, Tensor> posterior_part(const Tensor& x, const Tensor& refs, const Tensor& alpha,
                                          const Tensor& sigma, const MaybeTensor& labels,
                                          const MaybeTensor& counts, const std::string& precision);

Tensor stable_target(const Tensor& x, const Tensor& refs, const Tensor& t, const MaybeTensor& labels,
                     const MaybeTensor& counts, const MaybeTensor& source, const std::string& path,
                     const std::string& prediction, const std::string& precision, bool null_rows);

Returned affine_step(Argument& sample, Argument& velocity, Argument& a, Argument& b, MaybeArgument& c,
                     MaybeArgument& velocity_uncond, MaybeArgument& noise, double guidance_scale);

Returned stablevs_step(Argument& sample, Argument& velocity, Argument& t, Argument& tau,
                       MaybeArgument& velocity_uncond, MaybeArgument& noise, double guidance_scale,
                       double noise_factor, const std::string& path);

Tensor va_repa_loss(const Tensor& projected, const Tensor& teacher, const Tensor& weight);

Tensor va_repa_loss_backward(const Tensor& grad, const Tensor& projected, const Tensor& teacher,
                             const Tensor& weight);

void bank_push_(const Tensor& refs, const Tensor& counts, const Tensor& heads, const Tensor& values,
                const Tensor& labels, bool all_to_last);

std::tuple<Tensor, Tensor, Tensor, Tensor> bank_draw(const Tensor& refs, const Tensor& counts,
                                                     const Tensor& u, const MaybeTensor& labels,
                                                     const MaybeTensor& fallback, const MaybeTensor& noise,
                                                     const MaybeTensor& t, const std::string& path,
                                                     double t_min);

void conditional_target_(const Tensor& target, const Tensor& x0, const Tensor& noise, const Tensor& t,
                         const Tensor& t_set, const std::string& path, const std::string& prediction);

#ifdef USE_CUDA
// Of a bank in parts whose processes reach one another's memory (stablevelocity_kernels/ops/peers.py).

int64_t part_goes_home(const Tensor& x, const Tensor& refs, const MaybeTensor& labels,
                       const std::string& precision);

void posterior_part_out(const Tensor& x, const Tensor& refs, const Tensor& time_or_alpha,
                        const MaybeTensor& sigma, const std::string& path, const MaybeTensor& labels,
                        const MaybeTensor& counts, const std::string& precision, const Tensor& mean,
                        const Tensor& lse, const MaybeTensor& mailboxes, int64_t part, int64_t xs,
                        int64_t means, int64_t lses, const MaybeTensor& own_a, const MaybeTensor& own_b,
                        const MaybeTensor& own_c, const MaybeTensor& own_x, int64_t words, double seconds,
                        const MaybeTensor& addresses, const MaybeTensor& merged, const MaybeTensor& merged_x,
                        const std::string& prediction, const MaybeTensor& list);

Tensor posterior_part_list(const Tensor& x, const Tensor& refs, const Tensor& t, const MaybeTensor& labels,
                           const MaybeTensor& counts, const std::string& precision, const Tensor& mailboxes,
                           int64_t part, const Tensor& own_t, const MaybeTensor& own_labels, double t_min,
                           int64_t words, double seconds, const Tensor& addresses);

void bank_push_parts_(const Tensor& refs, const Tensor& counts, const Tensor& heads,
                      const Tensor& local_counts, const Tensor& values, const Tensor& labels,
                      bool all_to_last, int64_t capacity, const Tensor& parts_at, const Tensor& mailboxes,
                      int64_t part, double seconds, const MaybeTensor& fresh, const MaybeTensor& places,
                      int64_t stage);

std::tuple<Tensor, Tensor, Tensor, Tensor> bank_draw_parts(
    const Tensor& parts_at, int64_t capacity, const Tensor& refs, const Tensor& counts, const Tensor& u,
    const MaybeTensor& labels, const MaybeTensor& fallback, const MaybeTensor& noise, const MaybeTensor& t,
    const std::string& path, double t_min, const MaybeTensor& also, const MaybeTensor& heads,
    const MaybeTensor& fresh, const MaybeTensor& mailboxes, int64_t part, double seconds, bool between);

void peers_gather_(const Tensor& own, const Tensor& mailboxes, int64_t part, double seconds,
                   const MaybeTensor& a, const MaybeTensor& b, const MaybeTensor& c, const MaybeTensor& x,
                   bool stays, std::optional<int64_t> words);

Tensor peers_merge(const Tensor& mailboxes, int64_t part, double seconds, int64_t means, int64_t lses,
                   bool home, const Tensor& x, const Tensor& counts, const MaybeTensor& rings,
                   const MaybeTensor& a, const MaybeTensor& b, const MaybeTensor& t, const std::string& path,
                   const std::string& prediction, const MaybeTensor& source, const MaybeTensor& source_lse);
#endif

}  // namespace svel::SVEL_DEVICE
