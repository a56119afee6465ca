// Launch of the Hopper implicit matrix product with a split depth: tensor maps and kernel parameters from a plan.
#pragma once

#include "launch_implicit_gemm_sm90.cuh"
#include "split_gemm_sm90_wgmma.cuh"

namespace convfirst::direct::sm90 {

template <class Traits>
int SplitKernel<Traits>::launch(const GemmProblem& q, const GemmTensors& t, const SplitPlan& plan, cudaStream_t stream) {
  CUtensorMap x_map, w_map;
  if (!encode_im2col_map(&x_map, q, t.x, Traits::kRows, plan.panel) || !encode_filter_map(&w_map, q, t.w, Traits::kColumns, plan.panel)) {
    return cudaErrorInvalidValue;
  }
  SplitParams p{gemm_params(q, t, plan.panel, plan.steps, Traits::kRows, Traits::kColumns), plan.split, 0};
  while (plan.split << (p.share_shift + 1) <= Traits::kPieces) ++p.share_shift;
  return start_dependent_clusters(&split_gemm_sm90<Traits>, plan.split, plan.grid, plan.threads, plan.shared_memory, stream, p, x_map, w_map);
}

template <class Traits>
const void* SplitKernel<Traits>::kernel() {
  return reinterpret_cast<const void*>(&split_gemm_sm90<Traits>);
}

}  // namespace convfirst::direct::sm90
