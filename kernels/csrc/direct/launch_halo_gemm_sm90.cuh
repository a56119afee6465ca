// Launch of the Hopper kernel whose tiles are loaded with their halo: tensor maps and kernel parameters from a plan.
#pragma once

#include "halo_gemm_sm90_wgmma.cuh"
#include "launch_implicit_gemm_sm90.cuh"

namespace convfirst::direct::sm90 {

template <class Traits>
int HaloKernel<Traits>::launch(const GemmProblem& q, const GemmTensors& t, const HaloPlan& plan, cudaStream_t stream) {
  CUtensorMap x_map, w_map;
  const int64_t c = q.channels, w = q.width, h = q.height;
  const bool encoded = encode_tiled_map<4>(&x_map, q.dtype, t.x, {c, w, h, q.batch}, {c, c * w, c * w * h},
                                           {64, 1 << plan.pitch_shift, (128 >> plan.pitch_shift) + 2, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
  if (!encoded || !encode_filter_map(&w_map, q, t.w, Traits::kColumns, 64)) return cudaErrorInvalidValue;
  HaloParams p{};
  p.gemm = gemm_params(q, t, 64, gemm_steps(q), Traits::kRows, Traits::kColumns);
  p.split = plan.split, p.slices = plan.slices, p.pitch_shift = plan.pitch_shift;
  p.tiles_p = plan.tiles_p, p.tiles_q = plan.tiles_q, p.out_h = q.out_h;
  while (plan.split << (p.share_shift + 1) <= Traits::kPieces) ++p.share_shift;
  return start_dependent_clusters(&halo_gemm_sm90<Traits>, plan.split, plan.grid, plan.threads, plan.shared_memory, stream, p, x_map, w_map);
}

template <class Traits>
const void* HaloKernel<Traits>::kernel() {
  return reinterpret_cast<const void*>(&halo_gemm_sm90<Traits>);
}

}  // namespace convfirst::direct::sm90
