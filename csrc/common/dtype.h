// From a dtype known at run time to a template argument, out of an explicit list; works in .cpp and in .cu.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/checks.h"

namespace svel {

using Half = torch::headeronly::Half;
using BFloat16 = torch::headeronly::BFloat16;

template <typename T>
struct Type {
  using type = T;
};

template <typename T>
constexpr ScalarType scalar_type_of = ScalarType::Undefined;
template <>
inline constexpr ScalarType scalar_type_of<Half> = ScalarType::Half;
template <>
inline constexpr ScalarType scalar_type_of<BFloat16> = ScalarType::BFloat16;
template <>
inline constexpr ScalarType scalar_type_of<float> = ScalarType::Float;
template <>
inline constexpr ScalarType scalar_type_of<double> = ScalarType::Double;
template <>
inline constexpr ScalarType scalar_type_of<int32_t> = ScalarType::Int;
template <>
inline constexpr ScalarType scalar_type_of<int64_t> = ScalarType::Long;

// with_dtype<Half, float>(dtype, op, arg, [&](auto tag) { using T = typename decltype(tag)::type; ... });
template <typename T, typename... Rest, typename F>
decltype(auto) with_dtype(ScalarType dtype, const char* op, const char* arg, F&& f) {
  if (dtype == scalar_type_of<T>) return f(Type<T>{});
  if constexpr (sizeof...(Rest) > 0) {
    return with_dtype<Rest...>(dtype, op, arg, std::forward<F>(f));
  } else {
    fail(op, arg, "a dtype that this kernel is compiled for", to_text(dtype));
  }
}

template <typename F>
decltype(auto) with_float_dtype(ScalarType dtype, const char* op, const char* arg, F&& f) {
  return with_dtype<float, BFloat16, Half, double>(dtype, op, arg, std::forward<F>(f));
}

}  // namespace svel
