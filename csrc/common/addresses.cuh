// Addresses of what each process of a host has, which a launch brings along: to read them from memory first
// would take as long as a way over the link.
#pragma once

#include <cstdint>

namespace svel::cuda {

constexpr int MAX_PEERS = 32;

struct Addresses {
  int64_t at[MAX_PEERS];

  __host__ __device__ char* operator[](int64_t q) const { return reinterpret_cast<char*>(at[q]); }
};

}  // namespace svel::cuda
