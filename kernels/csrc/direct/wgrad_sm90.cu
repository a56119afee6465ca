// The Hopper weight gradient's kernels.
#include "launch_sm90.h"
#include "wgrad_sm90_wgmma.cuh"

namespace convfirst::direct::sm90 {

int launch_wgrad(const Problem& q, const Tensors& t, const Device& device, bool ahead, void* workspace, cudaStream_t stream) {
  const WgradPlan plan = plan_wgrad(q, device);
  const bool half = q.dtype == DType::kHalf;
  const auto launch = half ? (ahead ? &launch_wgrad_dtype<DType::kHalf, true> : &launch_wgrad_dtype<DType::kHalf, false>)
                           : (ahead ? &launch_wgrad_dtype<DType::kBFloat16, true> : &launch_wgrad_dtype<DType::kBFloat16, false>);
  return launch(q, t, plan, workspace, stream);
}

const void* wgrad_kernel(const Problem& q, const Device& device, bool ahead) {
  const int tile = plan_wgrad(q, device).tile;
  if (q.dtype == DType::kHalf) return ahead ? wgrad_kernel_dtype<DType::kHalf, true>(tile) : wgrad_kernel_dtype<DType::kHalf, false>(tile);
  return ahead ? wgrad_kernel_dtype<DType::kBFloat16, true>(tile) : wgrad_kernel_dtype<DType::kBFloat16, false>(tile);
}

}  // namespace convfirst::direct::sm90
