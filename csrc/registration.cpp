// Registers one device's ops with torch.ops.svel, whose schemas Python defines. Compiled into each library,
// with SVEL_DEVICE naming its namespace.
#include <torch/csrc/stable/library.h>

#include <type_traits>

#include "common/ops.h"

namespace svel {

// A string argument. Of a std::string argument the headers of torch (2.13 and before) allocate one for each
// call that nothing frees.
struct Name : std::string {};

// The op with Name in place of std::string, for TORCH_BOX.
template <auto op>
struct Boxed;
template <typename Result, typename... Args, Result (*op)(Args...)>
struct Boxed<op> {
  template <typename Arg>
  using Given = std::conditional_t<std::is_same_v<Arg, const std::string&>, const Name&, Arg>;

  static Result call(Given<Args>... args) { return op(args...); }
};

}  // namespace svel

HIDDEN_NAMESPACE_BEGIN(torch, stable, detail)

template <>
struct ToImpl<svel::Name> {
  static svel::Name call(StableIValue value, uint64_t /*build_version*/, bool /*is_internal*/) {
    const StringHandle handle = to<StringHandle>(value);
    const char* text = nullptr;
    size_t length = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    svel::Name name{std::string(text, length)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return name;
  }
};

template <>
struct ToImpl<svel::Argument> {
  static svel::Argument call(StableIValue value, uint64_t /*build_version*/, bool /*is_internal*/) {
    return svel::Argument(to<AtenTensorHandle>(value));
  }
};

template <>
struct ToImpl<svel::MaybeArgument> {
  static svel::MaybeArgument call(StableIValue value, uint64_t /*build_version*/, bool /*is_internal*/) {
    const auto handle = to<std::optional<AtenTensorHandle>>(value);
    return handle ? svel::MaybeArgument(*handle) : svel::MaybeArgument();
  }
};

HIDDEN_NAMESPACE_END(torch, stable, detail)

#define SVEL_IMPL(op) m.impl(#op, TORCH_BOX(&svel::Boxed<&op>::call))

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(svel, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(svel, CPU, m) {
#endif
  using namespace svel::SVEL_DEVICE;
  SVEL_IMPL(posterior_mean);
  SVEL_IMPL(posterior_part);
  SVEL_IMPL(stable_target);
  SVEL_IMPL(affine_step);
  SVEL_IMPL(stablevs_step);
  SVEL_IMPL(va_repa_loss);
  SVEL_IMPL(va_repa_loss_backward);
  SVEL_IMPL(bank_push_);
  SVEL_IMPL(bank_draw);
  SVEL_IMPL(conditional_target_);
#ifdef USE_CUDA
  SVEL_IMPL(part_goes_home);
  SVEL_IMPL(posterior_part_out);
  SVEL_IMPL(posterior_part_list);
  SVEL_IMPL(bank_push_parts_);
  SVEL_IMPL(bank_draw_parts);
  SVEL_IMPL(peers_gather_);
  SVEL_IMPL(peers_merge);
#endif
}
