#include "block_fusion/conv_bwd_weights_mma_sm80.cuh"

namespace convfirst::block_fusion {

int grouped_weight_gradient_half(const WeightGradientProblem& problem, const WeightGradientParams& params, cudaStream_t stream) {
  return sm80::grouped_weight_gradient<__half>(problem, params, stream);
}

}  // namespace convfirst::block_fusion
