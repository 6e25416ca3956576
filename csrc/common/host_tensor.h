// Reading tensors that lie in host memory.
#pragma once

#include "common/argument.h"
#include "common/storage.h"

namespace svel {

// T: Tensor or Argument, of a dtype that the checks have accepted.
template <typename T>
Storage storage_of(const T& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half:
      return Storage::f16;
    case ScalarType::BFloat16:
      return Storage::bf16;
    case ScalarType::Double:
      return Storage::f64;
    case ScalarType::Long:
      return Storage::i64;
    default:
      return Storage::f32;
  }
}

template <typename T>
Values values_of(const T& t) {
  return {t.const_data_ptr(), storage_of(t)};
}
inline Values values_of(const MaybeArgument& t) {
  return t ? Values{t.const_data_ptr(), storage_of(t)} : Values{};
}

inline Tensor packed(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline MaybeTensor packed(const MaybeTensor& t) {
  return t ? MaybeTensor(packed(*t)) : t;
}

// The n values of a float32 or float64 tensor, (n,) or 0-d, as double.
template <typename T>
std::vector<double> scalars(const T& t, int64_t n) {
  std::vector<double> out(static_cast<size_t>(n));
  const int64_t stride = t.dim() ? t.stride(0) : 0;
  const void* data = t.const_data_ptr();
  const bool wide = t.scalar_type() == ScalarType::Double;
  for (int64_t i = 0; i < n; ++i) {
    out[i] =
        wide ? static_cast<const double*>(data)[i * stride] : static_cast<const float*>(data)[i * stride];
  }
  return out;
}

}  // namespace svel
