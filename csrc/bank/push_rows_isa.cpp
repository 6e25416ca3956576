#include <algorithm>
#include <cstring>

#include "bank/push_rows.h"
#include "common/convert.h"

namespace svel::SVEL_ISA {
namespace {

constexpr int64_t BLOCK = 1024;

template <typename Work>
void convert_row(const PushProblem& p, int64_t from, int64_t to) {
  alignas(64) Work buffer[BLOCK];
  for (int64_t first = 0; first < p.d; first += BLOCK) {
    const int64_t n = std::min(BLOCK, p.d - first);
    store(p.refs_storage, load(p.values.storage, p.values.data, from + first, buffer, n), p.refs, to + first,
          n);
  }
}

}  // namespace

void push_rows(const PushProblem& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (p.slots[row] < 0) continue;
    const int64_t from = row % p.n * p.d, to = p.slots[row] * p.d;
    if (p.values.storage == p.refs_storage) {
      const int64_t bytes = bytes_of(p.refs_storage);
      std::memcpy(static_cast<char*>(p.refs) + to * bytes,
                  static_cast<const char*>(p.values.data) + from * bytes, p.d * bytes);
    } else if (p.refs_storage == Storage::f64) {
      convert_row<double>(p, from, to);
    } else {
      convert_row<float>(p, from, to);
    }
  }
}

}  // namespace svel::SVEL_ISA
