// Values in memory as the CPU kernels see them: a pointer and how each value is stored. No torch headers.
#pragma once

#include <cstdint>

namespace svel {

enum class Storage : int { f16, bf16, f32, f64, i64 };

constexpr int64_t bytes_of(Storage storage) {
  return storage == Storage::f64 || storage == Storage::i64 ? 8 : storage == Storage::f32 ? 4 : 2;
}

struct Values {
  const void* data = nullptr;  // nullptr: not given
  Storage storage = Storage::f32;
};

}  // namespace svel
