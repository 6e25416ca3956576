// Instruction sets of the CPU kernels. A file csrc/<op>/*_isa.cpp is compiled once for each, with SVEL_ISA
// naming it; here the best one that the processor has is chosen, once, at run time. No torch headers.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#define SVEL_X86 1
#else
#define SVEL_X86 0
#endif

namespace svel {

enum class Isa { base, avx2, avx512 };

// The instruction set that serves this process. SVEL_ISA=base|avx2|avx512 in the environment lowers it, for
// tests.
inline Isa isa() {
  static const Isa chosen = [] {
#if SVEL_X86
    __builtin_cpu_init();
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    Isa best = avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::base;
    if (const char* wish = std::getenv("SVEL_ISA")) {
      if (!std::strcmp(wish, "base")) best = Isa::base;
      if (!std::strcmp(wish, "avx2") && best == Isa::avx512) best = Isa::avx2;
    }
    return best;
#else
    return Isa::base;
#endif
  }();
  return chosen;
}

}  // namespace svel

// SVEL_ISA_KERNEL(void, add, (const Args& args)): declares svel::base::add, svel::avx2::add and
// svel::avx512::add, each defined by one compilation of an _isa.cpp file inside `namespace svel::SVEL_ISA`,
// and svel::pick_add(), which returns the one for this processor. Use it inside namespace svel.
#if SVEL_X86
#define SVEL_ISA_KERNEL(result, name, args)                                                  \
  namespace base {                                                                           \
  result name args;                                                                          \
  }                                                                                          \
  namespace avx2 {                                                                           \
  result name args;                                                                          \
  }                                                                                          \
  namespace avx512 {                                                                         \
  result name args;                                                                          \
  }                                                                                          \
  [[maybe_unused]] static auto pick_##name() {                                               \
    const Isa best = ::svel::isa();                                                          \
    return best == Isa::avx512 ? avx512::name : best == Isa::avx2 ? avx2::name : base::name; \
  }
#else
#define SVEL_ISA_KERNEL(result, name, args)    \
  namespace base {                             \
  result name args;                            \
  }                                            \
  [[maybe_unused]] static auto pick_##name() { \
    return base::name;                         \
  }
#endif
