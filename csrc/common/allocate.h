// New tensors, at the least cost to the host.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <array>

#include "common/checks.h"

namespace svel {

// Contiguous and without values, of the shape, dtype and device of t; new_empty takes the dispatcher's longer
// way.
inline Tensor packed_like(const Tensor& t) {
  std::array<int64_t, 16> strides;
  const auto sizes = t.sizes();
  const int64_t dims = static_cast<int64_t>(sizes.size());
  if (dims > static_cast<int64_t>(strides.size())) return torch::stable::new_empty(t, sizes);
  int64_t stride = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  int32_t dtype = 0, device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device_type));
  AtenTensorHandle out = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes.data(), strides.data(), dtype,
                                                         device_type, t.get_device_index(), &out));
  return Tensor(out);
}

}  // namespace svel
