// Maps of matrices for tensor copies (tensor_copy of cluster.cuh).
#pragma once

#include <cudaTypedefs.h>

#include "common/device.cuh"

namespace svel {

// cuTensorMapEncodeTiled without linking the driver.
inline PFN_cuTensorMapEncodeTiled_v12000 find_encode(const char* op) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  check_cuda(op, cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                  cudaEnableDefault, &found));
#else
  check_cuda(op, cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
  if (found != cudaDriverEntryPointSuccess)
    throw std::runtime_error(std::string("svel::") + op + ": the driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

// A matrix of 16-bit elements, `columns` contiguous ones to a row, rows `row_bytes` apart, in boxes of
// `box_rows` rows of 64 elements: in shared memory 128 bytes each, whose 16-byte chunk c lies at c ^ (row %
// 8).
inline CUtensorMap map_rows(const char* op, const void* data, Dtype dtype, int64_t columns, int64_t rows,
                            int64_t row_bytes, int box_rows) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = find_encode(op);
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)}, ones[2] = {1, 1};
  const CUresult result = encode(
      &map, dtype == Dtype::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
      const_cast<void*>(data), sizes, strides, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error(std::string("svel::") + op + ": cuTensorMapEncodeTiled: error " +
                             std::to_string(static_cast<int>(result)));
  return map;
}

}  // namespace svel
