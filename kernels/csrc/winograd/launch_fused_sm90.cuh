// Launch of Hopper's fused F(2x2, 3x3): tensor maps and kernel parameters from a plan.
#pragma once

#include "common/launch.cuh"
#include "direct/tensor_map_sm90.h"
#include "winograd/fused_fwd_sm90_wgmma.cuh"

namespace convfirst::winograd::sm90 {

// Every second column of x from `parity` on: its own image of half the width. What lies outside comes as zeros.
inline bool encode_columns_map(CUtensorMap* map, direct::DType dtype, const Problem& p, const void* x, int parity) {
  const int64_t c = p.channels, w = p.width, h = p.height;
  const void* from = static_cast<const char*>(x) + parity * c * 2;
  return direct::sm90::encode_tiled_map<4>(map, dtype, from, {c, (w + 1 - parity) / 2, h, p.batch}, {2 * c, c * w, c * w * h},
                                           {kDepth, kPatchPitch, kPatchRows, 1}, CU_TENSOR_MAP_SWIZZLE_64B);
}

// Filter 8 q + 2 j + i of a group lies at row 8 j + 2 q + i of a point, so that a thread's sums are of 8 neighbouring filters.
inline bool encode_point_map(CUtensorMap* map, direct::DType dtype, const Problem& p, const void* filter) {
  const int64_t pitch = p.channel_pitch(), outputs = p.output_pitch();
  return direct::sm90::encode_tiled_map<5>(map, dtype, filter, {pitch, 2, outputs / 8, 4, kPoints}, {pitch, 8 * pitch, 2 * pitch, outputs * pitch},
                                           {kDepth, 2, 4, 4, kPoints}, CU_TENSOR_MAP_SWIZZLE_64B);
}

template <class Element>
int launch_fused(const Problem& q, const Tensors& t, const FusedPlan& plan, cudaStream_t stream) {
  const direct::DType dtype = q.dtype == DType::kHalf ? direct::DType::kHalf : direct::DType::kBFloat16;
  const int parity = q.padding % 2;
  CUtensorMap first_map, second_map, filter_map;
  if (!encode_columns_map(&first_map, dtype, q, t.x, parity) || !encode_columns_map(&second_map, dtype, q, t.x, 1 - parity) ||
      !encode_point_map(&filter_map, dtype, q, t.filter)) {
    return cudaErrorInvalidValue;
  }
  const FusedParams p{t.y, t.bias, plan, q.batch, q.out_height(), q.out_width(), q.outputs, q.padding, q.activation};
  return start_dependent_kernel(&fused_fwd_sm90<Element>, plan.grid, kThreads, kSharedBytes, stream, p, first_map, second_map, filter_map);
}

}  // namespace convfirst::winograd::sm90
