// Launch of Hopper's float32 implicit matrix product: tensor maps and kernel parameters from a plan.
#pragma once

#include "common/launch.cuh"
#include "float_gemm_sm90_ffma.cuh"
#include "tensor_map_sm90.h"

namespace convfirst::direct::sm90 {

template <int kTile>
int FloatKernel<kTile>::launch(const GemmProblem& q, const FloatTensors& t, const FloatPlan& plan, cudaStream_t stream) {
  constexpr FloatTile kShape = kFloatTiles[kTile];
  const int64_t c = q.channels;
  CUtensorMap x_map, w_map;
  if (!encode_im2col_map(&x_map, q, t.x, kShape.rows(), kFloatDepth) ||
      !encode_tiled_map<3>(&w_map, DType::kFloat, t.w, {c, q.taps(), q.filters}, {c, c * q.taps()}, {kFloatDepth, 1, kShape.columns()},
                           CU_TENSOR_MAP_SWIZZLE_128B)) {
    return cudaErrorInvalidValue;
  }
  FloatParams p{};
  p.y = t.y, p.bias = t.bias;
  p.flags = static_cast<int*>(t.workspace);
  p.partials = reinterpret_cast<float4*>(static_cast<char*>(t.workspace) + float_flag_bytes(plan.grid));
  p.units = static_cast<int>(plan.units), p.steps = plan.steps, p.tiles_n = (q.filters + kShape.columns() - 1) / kShape.columns();
  p.pixels = static_cast<int>(q.pixels()), p.filters = q.filters;
  p.out_w = q.out_w, p.out_hw = q.out_h * q.out_w, p.kernel_w = q.kernel_w;
  p.stride_h = q.stride_h, p.stride_w = q.stride_w, p.pad_h = q.pad_h, p.pad_w = q.pad_w;
  p.dilation_h = q.dilation_h, p.dilation_w = q.dilation_w, p.channels = q.channels, p.activation = q.activation;
  if (const cudaError_t error = cudaMemsetAsync(p.flags, 0, float_flag_bytes(plan.grid), stream); error != cudaSuccess) return error;
  return start_kernel(&float_gemm_sm90<kTile>, plan.grid, kFloatThreads, plan.shared_memory, stream, p, x_map, w_map);
}

template <int kTile>
const void* FloatKernel<kTile>::kernel() {
  return reinterpret_cast<const void*>(&float_gemm_sm90<kTile>);
}

}  // namespace convfirst::direct::sm90
