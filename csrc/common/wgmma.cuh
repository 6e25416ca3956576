// Matrix products of a group of four warps (PTX ISA: wgmma), float16 with float32 sums. Only for code
// compiled for compute capability 9.0 with its own instructions (sm_90a).
#pragma once

#include "common/hopper.cuh"

namespace svel {

#define SVEL_4(OP, v) OP(v[0]), OP(v[1]), OP(v[2]), OP(v[3])
#define SVEL_8(OP, v) SVEL_4(OP, v), OP(v[4]), OP(v[5]), OP(v[6]), OP(v[7])
#define SVEL_16(OP, v)                                                                                \
  OP(v[0]), OP(v[1]), OP(v[2]), OP(v[3]), OP(v[4]), OP(v[5]), OP(v[6]), OP(v[7]), OP(v[8]), OP(v[9]), \
      OP(v[10]), OP(v[11]), OP(v[12]), OP(v[13]), OP(v[14]), OP(v[15])
#define SVEL_32(OP, v)                                                                                    \
  SVEL_16(OP, v), OP(v[16]), OP(v[17]), OP(v[18]), OP(v[19]), OP(v[20]), OP(v[21]), OP(v[22]), OP(v[23]), \
      OP(v[24]), OP(v[25]), OP(v[26]), OP(v[27]), OP(v[28]), OP(v[29]), OP(v[30]), OP(v[31])

// Around the products of one group: before the first, and after the last.
__device__ inline void start_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most PENDING groups are under way; acc, of one that has ended, can be read.
template <int PENDING>
__device__ inline void wait_products(float (&acc)[4]) {
  asm volatile("wgmma.wait_group.sync.aligned %4;" : SVEL_4("+f", acc) : "n"(PENDING) : "memory");
}
template <int PENDING>
__device__ inline void wait_products(float (&acc)[8]) {
  asm volatile("wgmma.wait_group.sync.aligned %8;" : SVEL_8("+f", acc) : "n"(PENDING) : "memory");
}
template <int PENDING>
__device__ inline void wait_products(float (&acc)[16]) {
  asm volatile("wgmma.wait_group.sync.aligned %16;" : SVEL_16("+f", acc) : "n"(PENDING) : "memory");
}
template <int PENDING>
__device__ inline void wait_products(float (&acc)[32]) {
  asm volatile("wgmma.wait_group.sync.aligned %32;" : SVEL_32("+f", acc) : "n"(PENDING) : "memory");
}

// acc (64 x 32) = (ADD ? acc : 0) + a (64 x 16, registers) b^T (32 x 16, shared memory).
template <int ADD>
__device__ inline void product(float (&acc)[16], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
      "%12, %13, %14, %15}, {%16, %17, %18, %19}, %20, add, 1, 1, 0;\n}"
      : SVEL_16("+f", acc)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ADD)
      : "memory");
}
// The same for b of 64 rows. Warp w of the group holds rows 16 w to 16 w + 15 of a and acc; with g = lane / 4
// and t = lane % 4: a[0] (g, 2 t and 2 t + 1), a[1] (g + 8, same), a[2] (g, 2 t + 8 and 2 t + 9), a[3] (g +
// 8, same); acc[4 i + 2 h + p] is element (g + 8 h, 8 i + 2 t + p).
template <int ADD>
__device__ inline void product(float (&acc)[32], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
      "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, add, 1, 1, 0;\n}"
      : SVEL_32("+f", acc)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ADD)
      : "memory");
}
// acc (64 x 32) = (ADD ? acc : 0) + a^T (16 x 64) b^T (32 x 16), both in shared memory.
template <int ADD>
__device__ inline void product_transposed(float (&acc)[16], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %18, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
      "%12, %13, %14, %15}, %16, %17, add, 1, 1, 1, 0;\n}"
      : SVEL_16("+f", acc)
      : "l"(a), "l"(b), "n"(ADD)
      : "memory");
}
// The same for b of 8, 16 and 64 rows.
template <int ADD>
__device__ inline void product_transposed(float (&acc)[4], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %6, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, add, 1, 1, 1, 0;\n}"
      : SVEL_4("+f", acc)
      : "l"(a), "l"(b), "n"(ADD)
      : "memory");
}
template <int ADD>
__device__ inline void product_transposed(float (&acc)[8], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %10, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, add, 1, "
      "1, 1, 0;\n}"
      : SVEL_8("+f", acc)
      : "l"(a), "l"(b), "n"(ADD)
      : "memory");
}
template <int ADD>
__device__ inline void product_transposed(float (&acc)[32], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
      "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, add, 1, 1, 1, 0;\n}"
      : SVEL_32("+f", acc)
      : "l"(a), "l"(b), "n"(ADD)
      : "memory");
}
#undef SVEL_32
#undef SVEL_16
#undef SVEL_8
#undef SVEL_4

// Rows of 128 bytes, 16-byte chunk c of row r at c ^ (r % 8); groups of 8 rows follow one another, in either
// direction of a matrix. A step of 32 bytes along the rows adds 2 to a descriptor.
__device__ inline uint64_t rows_of_128_bytes(uint32_t shared) {
  return static_cast<uint64_t>((shared & 0x3FFFF) >> 4) | uint64_t{1024 >> 4} << 16 |
         uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
// Where chunk `chunk` of row `row` lies, and four 8 x 8 matrices of halves from such rows: lane l names row
// l % 8 of matrix l / 8 and gets, of matrix m, elements (l / 4, 2 (l % 4)) and the next in out[m];
// transposed: (2 (l % 4), l / 4) and the one below.
__device__ inline uint32_t chunk_address(uint32_t tile, int row, int chunk) {
  return tile + row * 128 + ((chunk ^ (row & 7)) << 4);
}
__device__ inline void load_matrices(uint32_t shared, uint32_t (&out)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared)
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t shared, uint32_t (&out)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared)
               : "memory");
}
// Rows of 64 bytes, chunk c of row r at c ^ (r / 2 % 4).
__device__ inline uint64_t rows_of_64_bytes(uint32_t shared) {
  return static_cast<uint64_t>((shared & 0x3FFFF) >> 4) | uint64_t{1} << 16 | uint64_t{512 >> 4} << 32 |
         uint64_t{2} << 62;
}

}  // namespace svel
