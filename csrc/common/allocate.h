// New tensors, at the least cost to the host: new_empty takes the dispatcher's longer way.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <array>

#include "common/argument.h"

namespace svel {

// Contiguous and without values; dtype and device as the ABI numbers them.
inline OwnedHandle new_packed(IntHeaderOnlyArrayRef sizes, int32_t dtype, int32_t device_type,
                              int32_t device_index) {
  const size_t dims = sizes.size();
  std::array<int64_t, 8> few;
  std::vector<int64_t> many(dims > few.size() ? dims : 0);
  int64_t* const strides = many.empty() ? few.data() : many.data();
  int64_t stride = 1;
  for (size_t i = dims; i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  AtenTensorHandle out = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(dims), sizes.data(), strides,
                                                         dtype, device_type, device_index, &out));
  return OwnedHandle(out);
}

// Of the shape, dtype and device of t.
inline OwnedHandle packed_like(const Argument& t) {
  return new_packed(t.sizes(), t.shim_dtype(), t.device_type(), t.device_index());
}
inline Tensor packed_like(const Tensor& t) {
  int32_t dtype = 0, device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device_type));
  return Tensor(new_packed(t.sizes(), dtype, device_type, t.get_device_index()).release());
}

}  // namespace svel
