// Launch of the Hopper kernel with resident filters: tensor maps and kernel parameters from a plan.
#pragma once

#include "common/launch.cuh"
#include "resident_halo_sm90_wgmma.cuh"
#include "tensor_map_sm90.h"

namespace convfirst::direct::sm90 {

template <class Traits>
int ResidentKernel<Traits>::launch(const GemmProblem& q, const GemmTensors& t, const ResidentPlan& plan, cudaStream_t stream) {
  CUtensorMap x_map, w_map;
  const int64_t c = q.channels, w = q.width, h = q.height;
  const bool encoded = encode_tiled_map<4>(&x_map, q.dtype, t.x, {c, w, h, q.batch}, {c, c * w, c * w * h},
                                           {kResidentChannels, kResidentPitch, kResidentHeight + 2, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
  if (!encoded || !encode_filter_map(&w_map, q, t.w, Traits::kColumns, kResidentChannels)) return cudaErrorInvalidValue;
  ResidentParams p{};
  p.y = t.y, p.bias = t.bias, p.filters = q.filters, p.groups = plan.groups;
  p.tiles = plan.tiles, p.tiles_p = plan.tiles_p, p.tiles_q = plan.tiles_q;
  p.out_h = q.out_h, p.out_w = q.out_w, p.pad_h = q.pad_h, p.pad_w = q.pad_w;
  p.y_stride_n = static_cast<int>(q.y_stride_n), p.y_stride_p = static_cast<int>(q.y_stride_p), p.y_stride_q = static_cast<int>(q.y_stride_q);
  p.activation = q.activation;
  return start_dependent_kernel(&resident_halo_sm90<Traits>, plan.grid, plan.threads, plan.shared_memory, stream, p, x_map, w_map);
}

template <class Traits>
const void* ResidentKernel<Traits>::kernel() {
  return reinterpret_cast<const void*>(&resident_halo_sm90<Traits>);
}

template <DType kDType>
int ResidentKernels<kDType>::launch(const GemmProblem& q, const GemmTensors& t, const ResidentPlan& plan, cudaStream_t stream) {
  return ResidentKernel<ResidentTraits<kDType>>::launch(q, t, plan, stream);
}

template <DType kDType>
const void* ResidentKernels<kDType>::kernel() {
  return ResidentKernel<ResidentTraits<kDType>>::kernel();
}

}  // namespace convfirst::direct::sm90
