// Tensor maps of direct convolution: x as TMA's im2col mode reads it, filters in the order that the epilogue wants. Host code.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include "implicit_gemm_sm90.h"

namespace convfirst::direct::sm90 {

template <class Function>
Function driver_function(const char* name) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &found) != cudaSuccess ||
      found != cudaDriverEntryPointSuccess) {
    return nullptr;
  }
  return reinterpret_cast<Function>(entry);
}

inline CUtensorMapDataType map_type(DType dtype) {
  if (dtype == DType::kFloat) return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  return dtype == DType::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

constexpr int element_bytes(DType dtype) { return dtype == DType::kFloat ? 4 : 2; }

inline CUtensorMapSwizzle map_swizzle(int panel, DType dtype = DType::kHalf) {  // of rows of `panel` elements
  const int bytes = panel * element_bytes(dtype);
  return bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_32B;
}

// `rows` output pixels of one tap, `panel` channels of each. The box that the first tap walks over begins at the padding and ends
// so that it holds out_h x out_w positions.
inline bool encode_im2col_map(CUtensorMap* map, const GemmProblem& q, const void* x, int rows, int panel) {
  static const auto encode = driver_function<PFN_cuTensorMapEncodeIm2col_v12000>("cuTensorMapEncodeIm2col");
  if (encode == nullptr) return false;
  const cuuint64_t c = q.channels, w = q.width, h = q.height;
  const cuuint64_t dims[4] = {c, w, h, static_cast<cuuint64_t>(q.batch)};
  const cuuint64_t pixel = element_bytes(q.dtype) * c, strides[3] = {pixel, pixel * w, pixel * w * h};
  const cuuint32_t steps[4] = {1, static_cast<cuuint32_t>(q.stride_w), static_cast<cuuint32_t>(q.stride_h), 1};
  const int lower[2] = {-q.pad_w, -q.pad_h};
  const int upper[2] = {(q.out_w - 1) * q.stride_w - q.pad_w + 1 - q.width, (q.out_h - 1) * q.stride_h - q.pad_h + 1 - q.height};
  return encode(map, map_type(q.dtype), 4, const_cast<void*>(x), dims, strides, lower, upper, panel, rows, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, map_swizzle(panel, q.dtype), CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <int kRank>
bool encode_tiled_map(CUtensorMap* map, DType dtype, const void* data, const int64_t (&sizes)[kRank], const int64_t (&strides)[kRank - 1],
                      const int (&box)[kRank], CUtensorMapSwizzle swizzle) {
  static const auto encode = driver_function<PFN_cuTensorMapEncodeTiled_v12000>("cuTensorMapEncodeTiled");
  if (encode == nullptr) return false;
  cuuint64_t dims[kRank], bytes[kRank - 1];
  cuuint32_t boxes[kRank], steps[kRank];
  for (int i = 0; i < kRank; ++i) {
    dims[i] = sizes[i], boxes[i] = box[i], steps[i] = 1;
    if (i > 0) bytes[i - 1] = element_bytes(dtype) * strides[i - 1];
  }
  return encode(map, map_type(dtype), kRank, const_cast<void*>(data), dims, bytes, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Filters can be read with the depth as one dimension, 32 rows and more at once.
inline bool merged_filters(const GemmProblem& q, int panel) { return q.channels % panel == 0 && q.filters % 32 == 0; }

// W's rows in the order that implicit_gemm_sm90_wgmma.cuh describes: 32 b + 8 q + 2 j + i lies at 32 b + 8 j + 2 q + i.
inline bool encode_filter_map(CUtensorMap* map, const GemmProblem& q, const void* w, int columns, int panel) {
  const int64_t c = q.channels, depth = c * q.taps();
  if (merged_filters(q, panel)) {
    return encode_tiled_map<5>(map, q.dtype, w, {depth, 2, 4, 4, q.filters / 32}, {depth, 8 * depth, 2 * depth, 32 * depth},
                               {panel, 2, 4, 4, columns / 32}, map_swizzle(panel));
  }
  return encode_tiled_map<5>(map, q.dtype, w, {c, 2, q.filters / 8, 4, q.taps()}, {depth, 8 * depth, 2 * depth, c}, {panel, 2, 4, 4, 1},
                             map_swizzle(panel));
}

}  // namespace convfirst::direct::sm90
