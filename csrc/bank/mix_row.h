// One row of bank_draw and of conditional_target_ on the CPU. No torch headers.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/storage.h"

namespace svel {

struct MixRow {
  Values x;      // (D,); without data: NaN
  Values noise;  // (D,), where `mixed` is wanted
  Storage out;   // of kept and mixed
  void* kept;    // (D,) x, or nullptr
  void* mixed;   // (D,) a x + b noise, or nullptr
  int64_t d;
  double a, b;
};

SVEL_ISA_KERNEL(void, mix_row, (const MixRow& row))

// Row i of an array of rows of d values.
inline Values row_of(Values array, int64_t i, int64_t d) {
  return {static_cast<const char*>(array.data) + i * d * bytes_of(array.storage), array.storage};
}

}  // namespace svel
