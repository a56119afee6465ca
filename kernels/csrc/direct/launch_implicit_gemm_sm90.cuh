// Launch of the Hopper implicit matrix product: tensor maps and kernel parameters from a plan.
#pragma once

#include "common/launch.cuh"
#include "implicit_gemm_sm90_wgmma.cuh"
#include "tensor_map_sm90.h"

namespace convfirst::direct::sm90 {

inline GemmParams gemm_params(const GemmProblem& q, const GemmTensors& t, int panel, int steps, int rows, int columns) {
  GemmParams p{};
  p.y = t.y, p.bias = t.bias;
  p.pixels = static_cast<int>(q.pixels()), p.filters = q.filters;
  p.tiles_n = (q.filters + columns - 1) / columns;
  p.steps = steps, p.tiles = static_cast<int>((q.pixels() + rows - 1) / rows * p.tiles_n);
  p.out_w = q.out_w, p.out_hw = q.out_h * q.out_w, p.kernel_w = q.kernel_w, p.taps = q.taps();
  p.stride_h = q.stride_h, p.stride_w = q.stride_w, p.pad_h = q.pad_h, p.pad_w = q.pad_w;
  p.dilation_h = q.dilation_h, p.dilation_w = q.dilation_w;
  p.channels = q.channels, p.panel = panel, p.merged = merged_filters(q, panel);
  p.w_first = q.w_first, p.w_step_r = q.w_step_r, p.w_step_s = q.w_step_s;
  p.dense = q.y_stride_q == q.filters && q.y_stride_p == q.y_stride_q * q.out_w && q.y_stride_n == q.y_stride_p * q.out_h;
  p.y_stride_n = static_cast<int>(q.y_stride_n), p.y_stride_p = static_cast<int>(q.y_stride_p), p.y_stride_q = static_cast<int>(q.y_stride_q);
  p.activation = q.activation;
  return p;
}

template <class Traits>
int GemmKernel<Traits>::launch(const GemmProblem& q, const GemmTensors& t, const GemmPlan& plan, cudaStream_t stream) {
  CUtensorMap x_map, w_map;
  const auto encode_filters = [&] {
    if constexpr (!Traits::kTransposed) return encode_filter_map(&w_map, q, t.w, Traits::kColumns, plan.panel);
    const int64_t k = q.filters;
    return encode_tiled_map<3>(&w_map, q.dtype, t.w, {k, q.w_taps, q.channels}, {k, k * q.w_taps}, {64, 1, plan.panel}, CU_TENSOR_MAP_SWIZZLE_128B);
  };
  if (!encode_im2col_map(&x_map, q, t.x, Traits::kRows, plan.panel) || !encode_filters()) return cudaErrorInvalidValue;
  const GemmParams p = gemm_params(q, t, plan.panel, plan.steps, Traits::kRows, Traits::kColumns);
  return start_dependent_kernel(&implicit_gemm_sm90<Traits>, plan.grid, plan.threads, plan.shared_memory, stream, p, x_map, w_map);
}

template <class Traits>
const void* GemmKernel<Traits>::kernel() {
  return reinterpret_cast<const void*>(&implicit_gemm_sm90<Traits>);
}

}  // namespace convfirst::direct::sm90
