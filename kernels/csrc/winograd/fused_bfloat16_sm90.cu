#include "winograd/launch_fused_sm90.cuh"

namespace convfirst::winograd::sm90 {

int launch_fused_bfloat16(const Problem& problem, const Tensors& tensors, const FusedPlan& plan, cudaStream_t stream) {
  return launch_fused<__nv_bfloat16>(problem, tensors, plan, stream);
}

}  // namespace convfirst::winograd::sm90
