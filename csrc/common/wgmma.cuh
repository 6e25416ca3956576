// Matrix products of a group of four warps (PTX ISA: wgmma), float16 with float32 sums. Only for code
// compiled for compute capability 9.0 with its own instructions (sm_90a).
#pragma once

#include "common/hopper.cuh"

namespace svel {

#define SVEL_8(OP, v) OP(v[0]), OP(v[1]), OP(v[2]), OP(v[3]), OP(v[4]), OP(v[5]), OP(v[6]), OP(v[7])
#define SVEL_12(OP, v) SVEL_8(OP, v), OP(v[8]), OP(v[9]), OP(v[10]), OP(v[11])
#define SVEL_16(OP, v)                                                                                \
  OP(v[0]), OP(v[1]), OP(v[2]), OP(v[3]), OP(v[4]), OP(v[5]), OP(v[6]), OP(v[7]), OP(v[8]), OP(v[9]), \
      OP(v[10]), OP(v[11]), OP(v[12]), OP(v[13]), OP(v[14]), OP(v[15])
#define SVEL_24(OP, v) \
  SVEL_16(OP, v), OP(v[16]), OP(v[17]), OP(v[18]), OP(v[19]), OP(v[20]), OP(v[21]), OP(v[22]), OP(v[23])
#define SVEL_32(OP, v)                                                                                    \
  SVEL_16(OP, v), OP(v[16]), OP(v[17]), OP(v[18]), OP(v[19]), OP(v[20]), OP(v[21]), OP(v[22]), OP(v[23]), \
      OP(v[24]), OP(v[25]), OP(v[26]), OP(v[27]), OP(v[28]), OP(v[29]), OP(v[30]), OP(v[31])

#define SVEL_64(OP, v)                                                                                    \
  SVEL_32(OP, v), OP(v[32]), OP(v[33]), OP(v[34]), OP(v[35]), OP(v[36]), OP(v[37]), OP(v[38]), OP(v[39]), \
      OP(v[40]), OP(v[41]), OP(v[42]), OP(v[43]), OP(v[44]), OP(v[45]), OP(v[46]), OP(v[47]), OP(v[48]),  \
      OP(v[49]), OP(v[50]), OP(v[51]), OP(v[52]), OP(v[53]), OP(v[54]), OP(v[55]), OP(v[56]), OP(v[57]),  \
      OP(v[58]), OP(v[59]), OP(v[60]), OP(v[61]), OP(v[62]), OP(v[63])
#define SVEL_128(OP, v)                                                                                   \
  SVEL_64(OP, v), OP(v[64]), OP(v[65]), OP(v[66]), OP(v[67]), OP(v[68]), OP(v[69]), OP(v[70]), OP(v[71]), \
      OP(v[72]), OP(v[73]), OP(v[74]), OP(v[75]), OP(v[76]), OP(v[77]), OP(v[78]), OP(v[79]), OP(v[80]),  \
      OP(v[81]), OP(v[82]), OP(v[83]), OP(v[84]), OP(v[85]), OP(v[86]), OP(v[87]), OP(v[88]), OP(v[89]),  \
      OP(v[90]), OP(v[91]), OP(v[92]), OP(v[93]), OP(v[94]), OP(v[95]), OP(v[96]), OP(v[97]), OP(v[98]),  \
      OP(v[99]), OP(v[100]), OP(v[101]), OP(v[102]), OP(v[103]), OP(v[104]), OP(v[105]), OP(v[106]),      \
      OP(v[107]), OP(v[108]), OP(v[109]), OP(v[110]), OP(v[111]), OP(v[112]), OP(v[113]), OP(v[114]),     \
      OP(v[115]), OP(v[116]), OP(v[117]), OP(v[118]), OP(v[119]), OP(v[120]), OP(v[121]), OP(v[122]),     \
      OP(v[123]), OP(v[124]), OP(v[125]), OP(v[126]), OP(v[127])
#define SVEL_40(OP, v) \
  SVEL_32(OP, v), OP(v[32]), OP(v[33]), OP(v[34]), OP(v[35]), OP(v[36]), OP(v[37]), OP(v[38]), OP(v[39])
#define SVEL_48(OP, v) \
  SVEL_40(OP, v), OP(v[40]), OP(v[41]), OP(v[42]), OP(v[43]), OP(v[44]), OP(v[45]), OP(v[46]), OP(v[47])

// And their names in a template.
#define SVEL_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define SVEL_NAMES_12 SVEL_NAMES_8 ", %8, %9, %10, %11"
#define SVEL_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define SVEL_NAMES_24 SVEL_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define SVEL_NAMES_32 \
  SVEL_NAMES_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SVEL_NAMES_40 SVEL_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define SVEL_NAMES_48 SVEL_NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define SVEL_NAMES_64                                                                \
  SVEL_NAMES_32                                                                      \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SVEL_NAMES_128                                                                   \
  SVEL_NAMES_64                                                                          \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"     \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"     \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109"     \
  ", %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123" \
  ", %124, %125, %126, %127"

// Around the products of one group: before the first, and after the last.
__device__ inline void start_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most PENDING groups are under way; acc, of one that has ended, can be read.
#define SVEL_WAIT(COUNT)                                      \
  template <int PENDING>                                      \
  __device__ inline void wait_products(float (&acc)[COUNT]) { \
    asm volatile("wgmma.wait_group.sync.aligned %" #COUNT ";" \
                 : SVEL_##COUNT("+f", acc)                    \
                 : "n"(PENDING)                               \
                 : "memory");                                 \
  }
SVEL_WAIT(8)
SVEL_WAIT(12)
SVEL_WAIT(16)
SVEL_WAIT(24)
SVEL_WAIT(32)
SVEL_WAIT(48)
SVEL_WAIT(64)
SVEL_WAIT(128)
#undef SVEL_WAIT
// The same where no result is read yet.
template <int PENDING>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// acc (64 x n) = (ADD ? acc : 0) + a (64 x 16, registers) b^T (n x 16, shared memory), for n of 32 and 64;
// COLUMNS: b is given as 16 x n. Warp w of the group holds rows 16 w to 16 w + 15 of a and acc; with g = lane
// / 4 and t = lane % 4: a[0] (g, 2 t and 2 t + 1), a[1] (g + 8, same), a[2] (g, 2 t + 8 and 2 t + 9), a[3] (g
// + 8, same); acc[4 i + 2 h + p] is element (g + 8 h, 8 i + 2 t + p). The last arguments: the names of what
// follows acc.
#define SVEL_PRODUCT(COUNT, N, A, B, ADDS, TRANSPOSES)                                         \
  template <int ADD, int COLUMNS = 0>                                                          \
  __device__ inline void product(float (&acc)[COUNT], const uint32_t (&a)[4], uint64_t b) {    \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADDS                                  \
                 ", 0;\n"                                                                      \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" SVEL_NAMES_##COUNT \
                 "}, {" A "}, " B ", add, 1, 1, " TRANSPOSES ";\n}"                            \
                 : SVEL_##COUNT("+f", acc)                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ADD), "n"(COLUMNS)  \
                 : "memory");                                                                  \
  }
SVEL_PRODUCT(16, 32, "%16, %17, %18, %19", "%20", "%21", "%22")
SVEL_PRODUCT(32, 64, "%32, %33, %34, %35", "%36", "%37", "%38")
#undef SVEL_PRODUCT

// acc (64 x n) = (ADD ? acc : 0) + a (64 x 16) b^T (n x 16), both in shared memory, for n of 16 to 256;
// COLUMNS: a is given as 16 x 64.
#define SVEL_PRODUCT(COUNT, N, A, B, ADDS, TRANSPOSES)                                         \
  template <int ADD, int COLUMNS>                                                              \
  __device__ inline void product_shared(float (&acc)[COUNT], uint64_t a, uint64_t b) {         \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADDS                                  \
                 ", 0;\n"                                                                      \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" SVEL_NAMES_##COUNT \
                 "}, " A ", " B ", add, 1, 1, " TRANSPOSES ", 0;\n}"                           \
                 : SVEL_##COUNT("+f", acc)                                                     \
                 : "l"(a), "l"(b), "n"(ADD), "n"(COLUMNS)                                      \
                 : "memory");                                                                  \
  }
SVEL_PRODUCT(8, 16, "%8", "%9", "%10", "%11")
SVEL_PRODUCT(16, 32, "%16", "%17", "%18", "%19")
SVEL_PRODUCT(32, 64, "%32", "%33", "%34", "%35")
SVEL_PRODUCT(40, 80, "%40", "%41", "%42", "%43")
SVEL_PRODUCT(48, 96, "%48", "%49", "%50", "%51")
SVEL_PRODUCT(64, 128, "%64", "%65", "%66", "%67")
SVEL_PRODUCT(128, 256, "%128", "%129", "%130", "%131")
#undef SVEL_PRODUCT

// The same of bfloat16, for n of 24, 48 and 96.
#define SVEL_PRODUCT(COUNT, N, A, B, ADDS, TRANSPOSES)                                           \
  template <int ADD, int COLUMNS>                                                                \
  __device__ inline void product_shared_bf16(float (&acc)[COUNT], uint64_t a, uint64_t b) {      \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADDS                                    \
                 ", 0;\n"                                                                        \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" SVEL_NAMES_##COUNT \
                 "}, " A ", " B ", add, 1, 1, " TRANSPOSES ", 0;\n}"                             \
                 : SVEL_##COUNT("+f", acc)                                                       \
                 : "l"(a), "l"(b), "n"(ADD), "n"(COLUMNS)                                        \
                 : "memory");                                                                    \
  }
SVEL_PRODUCT(12, 24, "%12", "%13", "%14", "%15")
SVEL_PRODUCT(24, 48, "%24", "%25", "%26", "%27")
SVEL_PRODUCT(48, 96, "%48", "%49", "%50", "%51")
#undef SVEL_PRODUCT
#undef SVEL_NAMES_128
#undef SVEL_NAMES_64
#undef SVEL_NAMES_48
#undef SVEL_NAMES_40
#undef SVEL_NAMES_32
#undef SVEL_NAMES_24
#undef SVEL_NAMES_16
#undef SVEL_NAMES_12
#undef SVEL_NAMES_8
#undef SVEL_128
#undef SVEL_64
#undef SVEL_48
#undef SVEL_40
#undef SVEL_32
#undef SVEL_24
#undef SVEL_16
#undef SVEL_12
#undef SVEL_8

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

}  // namespace svel
