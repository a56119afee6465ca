#include "block_fusion/conv_bwd_weights_depthwise_sm80.cuh"

namespace convfirst::block_fusion {

int depthwise_weight_gradient_bfloat16(const WeightGradientProblem& problem, const WeightGradientParams& params, cudaStream_t stream) {
  return sm80::depthwise_weight_gradient<__nv_bfloat16>(problem, params, stream);
}

}  // namespace convfirst::block_fusion
