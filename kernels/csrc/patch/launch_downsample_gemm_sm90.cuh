// Launch of the Hopper downsampling layer as one matrix product: tensor maps and kernel parameters from a plan. Each element type has a
// source file of its own, which instantiates it.
#pragma once

#include "direct/launch_implicit_gemm_sm90.cuh"
#include "downsample_gemm_fwd_sm90_wgmma.cuh"
#include "params.h"

namespace convfirst::patch::sm90 {

inline direct::sm90::GemmProblem downsample_problem(const DownsampleGemm& d, direct::DType dtype) {
  direct::sm90::GemmProblem q{};
  q.batch = d.batch, q.height = d.height, q.width = d.width, q.channels = d.channels;
  q.out_h = d.height / 2, q.out_w = d.width / 2, q.filters = d.columns;
  q.kernel_h = q.kernel_w = q.stride_h = q.stride_w = 2, q.dilation_h = q.dilation_w = 1;
  q.y_stride_q = d.columns, q.y_stride_p = q.y_stride_q * q.out_w, q.y_stride_n = q.y_stride_p * q.out_h;
  q.dtype = dtype, q.activation = direct::Activation::kNone;
  return q;
}

template <class Traits>
int launch_downsample_gemm(const DownsampleGemm& d, const DownsampleGemmPlan& plan, cudaStream_t stream) {
  const direct::sm90::GemmProblem q = downsample_problem(d, Traits::kDType);
  CUtensorMap x_map, w_map;
  if (!direct::sm90::encode_im2col_map(&x_map, q, d.x, Traits::kRows, kDepth) ||
      !direct::sm90::encode_filter_map(&w_map, q, d.weight, Traits::kColumns, kDepth)) {
    return cudaErrorInvalidValue;
  }
  DownsampleGemmParams p{};
  p.gemm = direct::sm90::gemm_params(q, {d.x, d.weight, nullptr, d.y}, kDepth, plan.steps, Traits::kRows, Traits::kColumns);
  p.vectors = d.vectors, p.slices = d.channels / kDepth, p.inverse_channels = 1.f / d.channels, p.eps = d.eps, p.has_norm = d.has_norm;
  return start_dependent_kernel(&downsample_gemm_sm90<Traits>, plan.grid, Traits::kThreads, plan.shared_memory, stream, p, x_map, w_map);
}

template <direct::DType kDType, int kTile = 0>
int launch_downsample_gemm_tile(const DownsampleGemm& d, const DownsampleGemmPlan& plan, cudaStream_t stream) {
  if constexpr (kTile < kDownsampleGemmTileCount) {
    if (plan.tile != kTile) return launch_downsample_gemm_tile<kDType, kTile + 1>(d, plan, stream);
    return launch_downsample_gemm<DownsampleGemmTraits<kDType, kTile>>(d, plan, stream);
  }
  return kNotCovered;
}

}  // namespace convfirst::patch::sm90
