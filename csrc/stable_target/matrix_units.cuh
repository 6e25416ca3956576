// Hopper's matrix units and tensor copies, each instruction as a function. Compiled for sm_90a only:
// elsewhere the bodies are empty and the planner sends nothing there. (PTX ISA: wgmma, ldmatrix,
// cp.async.bulk.tensor.)
//
// Tiles in shared memory are rows of 128 bytes (64 halves), in groups of 8 rows that start at multiples of
// 1024 bytes. The 16-byte chunk c of row r lies at chunk c ^ (r % 8) of the row: the 128-byte swizzle, which
// the tensor copies write and the matrix units read.
#pragma once

#include <cuda.h>
#include <cuda_fp16.h>

#include "common/hopper.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
#define SVEL_MATRIX_UNITS 1
#endif

namespace svel {

constexpr int TILE_ROW_BYTES = 128;

#if defined(SVEL_MATRIX_UNITS) && defined(__CUDA_ARCH__)
#define SVEL_MATRIX_ASM(...) asm volatile(__VA_ARGS__)
#else
#define SVEL_MATRIX_ASM(...)
#endif

// More or fewer registers per thread for this warpgroup from here on; all its threads call it.
template <int COUNT>
__device__ inline void raise_registers() {
  SVEL_MATRIX_ASM("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ inline void drop_registers() {
  SVEL_MATRIX_ASM("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// A box of `map` whose first element has these coordinates, innermost first; zeros where it passes the edge.
// Arrives on `barrier` with the bytes of the whole box.
__device__ inline void tensor_copy(uint32_t shared, const CUtensorMap& map, int column, int row,
                                   Barrier* barrier) {
  SVEL_MATRIX_ASM(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], "
      "[%4];" ::"r"(shared),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(column), "r"(row), "r"(shared_address(barrier)) : "memory");
}
__device__ inline void prefetch_map(const CUtensorMap& map) {
  SVEL_MATRIX_ASM("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}

// Four 8 x 8 matrices of halves; lane l gives the address of row l % 8 of matrix l / 8 and gets, of matrix m,
// elements (l / 4, 2 (l % 4)) and the next in out[m] -- transposed: (2 (l % 4), l / 4) and the one below.
__device__ inline void load_matrices(uint32_t address, uint32_t (&out)[4]) {
  SVEL_MATRIX_ASM("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(out[0]),
                  "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(address) : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t address, uint32_t (&out)[4]) {
  SVEL_MATRIX_ASM("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(out[0]),
                  "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(address) : "memory");
}

// Where chunk `chunk` (of 16 bytes) of row `row` of a tile lies.
__device__ inline uint32_t tile_chunk(uint32_t tile, int row, int chunk) {
  return tile + row * TILE_ROW_BYTES + ((chunk ^ (row & 7)) << 4);
}

// The second operand of a product, rows of a tile with the summed dimension along the row ("K-major"):
// bits 0-13 address / 16, 16-29 unused with a swizzle (1), 32-45 bytes between groups of 8 rows / 16,
// 62-63 1 for the 128-byte swizzle. Further along the row: + 2 per 16 halves; 64 rows further: + 512.
__device__ inline uint64_t tile_descriptor(uint32_t tile) {
  return static_cast<uint64_t>((tile & 0x3FFFF) >> 4) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}
constexpr uint64_t DESCRIPTOR_K16 = 2;
constexpr uint64_t DESCRIPTOR_ROWS64 = 64 * TILE_ROW_BYTES >> 4;

// Registers that a product reads or writes may be touched only between wait_products and start_products.
__device__ inline void start_products() {
  SVEL_MATRIX_ASM("wgmma.fence.sync.aligned;" :: : "memory");
}
__device__ inline void commit_products() {
  SVEL_MATRIX_ASM("wgmma.commit_group.sync.aligned;" :: : "memory");
}

#define SVEL_ACC32(OP, v)                                                                                \
  OP(v[0]), OP(v[1]), OP(v[2]), OP(v[3]), OP(v[4]), OP(v[5]), OP(v[6]), OP(v[7]), OP(v[8]), OP(v[9]),    \
      OP(v[10]), OP(v[11]), OP(v[12]), OP(v[13]), OP(v[14]), OP(v[15]), OP(v[16]), OP(v[17]), OP(v[18]), \
      OP(v[19]), OP(v[20]), OP(v[21]), OP(v[22]), OP(v[23]), OP(v[24]), OP(v[25]), OP(v[26]), OP(v[27]), \
      OP(v[28]), OP(v[29]), OP(v[30]), OP(v[31])

// Until all but the last PENDING groups are done; acc: those of the group that is waited for, so that the
// compiler reads them after this.
template <int PENDING>
__device__ inline void wait_products(float (&acc)[32]) {
  SVEL_MATRIX_ASM("wgmma.wait_group.sync.aligned %32;" : SVEL_ACC32("+f", acc) : "n"(PENDING) : "memory");
}

// acc (64 x 64) = (add ? acc : 0) + a (64 x 16) b (64 x 16)^T, by a warpgroup. Warp w of it holds rows 16 w
// to 16 w + 15. With g = lane / 4, t = lane % 4: a[0] (g, 2t and 2t + 1), a[1] (g + 8, same), a[2] (g, 2t + 8
// and 2t + 9), a[3] (g + 8, same); acc[4 i + 2 h + p] is element (g + 8 h, 8 i + 2 t + p).
__device__ inline void product_64x64x16(float (&acc)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
  SVEL_MATRIX_ASM(
      "{\n"
      ".reg .pred add;\n"
      "setp.ne.b32 add, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, add, 1, 1, 0;\n"
      "}" : SVEL_ACC32("+f", acc) : "r"(a[0]),
      "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)) : "memory");
}

}  // namespace svel
