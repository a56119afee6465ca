// Tensor maps (what TMA copies go by) of dense 16-bit tensors. Host code.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "params.h"

namespace convfirst::block_fusion::sm90 {

inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const PFN_cuTensorMapEncodeTiled_v12000 encoder = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found) != cudaSuccess ||
        found != cudaDriverEntryPointSuccess) {
      entry = nullptr;
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
  }();
  return encoder;
}

// A tensor of `rank` dimensions, innermost first and contiguous; strides in elements, of all dimensions but the innermost.
// Out-of-bounds elements read as zero.
template <int kRank>
bool encode_strided_map(CUtensorMap* map, DType dtype, const void* data, const int64_t (&sizes)[kRank],
                        const int64_t (&strides)[kRank - 1], const int (&box)[kRank], int row_bytes) {
  const auto encoder = tensor_map_encoder();
  if (encoder == nullptr) return false;
  cuuint64_t dims[kRank], bytes[kRank - 1];
  cuuint32_t boxes[kRank], steps[kRank];
  for (int i = 0; i < kRank; ++i) {
    dims[i] = sizes[i];
    boxes[i] = box[i];
    steps[i] = 1;
    if (i > 0) bytes[i - 1] = 2 * strides[i - 1];
  }
  const auto type = dtype == DType::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encoder(map, type, kRank, const_cast<void*>(data), dims, bytes, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                 row_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// The same of a dense row-major tensor.
template <int kRank>
bool encode_map(CUtensorMap* map, DType dtype, const void* data, const int64_t (&sizes)[kRank], const int (&box)[kRank], int row_bytes) {
  int64_t strides[kRank - 1], stride = 1;
  for (int i = 0; i + 1 < kRank; ++i) strides[i] = stride *= sizes[i];
  return encode_strided_map<kRank>(map, dtype, data, sizes, strides, box, row_bytes);
}

}  // namespace convfirst::block_fusion::sm90
