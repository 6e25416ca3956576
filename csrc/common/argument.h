// Tensor arguments of the ops that a sampler calls at every step. torch::stable::Tensor allocates for each of
// them and asks the ABI at every question; an Argument asks once and allocates nothing.
#pragma once

#include <array>
#include <memory>

#include "common/checks.h"

namespace svel {

using torch::headeronly::IntHeaderOnlyArrayRef;

struct DeleteTensor {
  void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
};
using OwnedHandle = std::unique_ptr<AtenTensorOpaque, DeleteTensor>;

class Argument {
 public:
  explicit Argument(AtenTensorHandle handle) : handle_(handle) { read(); }

  AtenTensorHandle get() const { return handle_.get(); }
  int64_t dim() const { return dim_; }
  int64_t size(int64_t i) const { return sizes_[i]; }
  IntHeaderOnlyArrayRef sizes() const { return {sizes_, static_cast<size_t>(dim_)}; }
  int64_t stride(int64_t i) const {
    int64_t stride = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_stride(get(), i, &stride));
    return stride;
  }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t i = 0; i < dim_; ++i) n *= sizes_[i];
    return n;
  }
  const void* const_data_ptr() const {
    const void* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(get(), &data));
    return data;
  }
  int32_t shim_dtype() const { return dtype_; }
  int32_t device_type() const { return device_type_; }
  int32_t device_index() const { return device_index_; }

  ScalarType scalar_type() const {
    // Those that the ops take; torch's own conversion asks for the number of one dtype after another.
    static const std::array<std::pair<int32_t, ScalarType>, 4> floats = {
        {{aoti_torch_dtype_bfloat16(), ScalarType::BFloat16},
         {aoti_torch_dtype_float32(), ScalarType::Float},
         {aoti_torch_dtype_float16(), ScalarType::Half},
         {aoti_torch_dtype_float64(), ScalarType::Double}}};
    for (const auto& [number, dtype] : floats)
      if (number == dtype_) return dtype;
    return torch::stable::detail::to<ScalarType>(torch::stable::detail::from(dtype_));
  }

  torch::stable::Device device() const {
    using torch::headeronly::DeviceType;
    return {torch::stable::detail::to<DeviceType>(torch::stable::detail::from(device_type_)),
            static_cast<torch::stable::accelerator::DeviceIndex>(device_index_)};
  }

  // Makes it contiguous, in a copy of its own where it is not.
  void pack() {
    bool contiguous = true;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(get(), &contiguous));
    if (contiguous) return;
    const Tensor copy = torch::stable::contiguous(Tensor(handle_.release()));
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(copy.get(), &handle));
    handle_.reset(handle);
    read();
  }

 protected:
  Argument() = default;

 private:
  void read() {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(get(), &dim_));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(get(), &sizes_));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(get(), &dtype_));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(get(), &device_type_));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(get(), &device_index_));
  }

  OwnedHandle handle_;
  int64_t *sizes_ = nullptr, dim_ = 0;  // the tensor's own sizes
  int32_t dtype_ = 0, device_type_ = 0, device_index_ = 0;
};

// An argument that may be None.
class MaybeArgument : public Argument {
 public:
  MaybeArgument() = default;
  explicit MaybeArgument(AtenTensorHandle handle) : Argument(handle) {}

  explicit operator bool() const { return get() != nullptr; }
  void pack() {
    if (*this) Argument::pack();
  }
};

inline bool same_device(const Argument& a, const Argument& b) {
  return a.device_type() == b.device_type() && a.device_index() == b.device_index();
}

inline bool same_dtype(const Argument& a, const Argument& b) {
  return a.shim_dtype() == b.shim_dtype();
}

// A new tensor on its way to torch, which takes it as it is: of a torch::stable::Tensor torch's headers make
// a second handle and delete the first.
struct Returned {
  AtenTensorHandle handle;
};

inline void* data_of(const OwnedHandle& handle) {
  void* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle.get(), &data));
  return data;
}

}  // namespace svel
