// The empty table of a build without the sm_80 path.
#include "block_fusion/conv_bwd_weights.h"
#include "block_fusion/params.h"

namespace convfirst::block_fusion {

const Variant* sm80_variants(int* count) {
  *count = 0;
  return nullptr;
}

int run_weight_gradient(const WeightGradientProblem&, const WeightGradientPlan&, const WeightGradientTensors&, void*, cudaStream_t) {
  return 209;  // cudaErrorNoKernelImageForDevice
}

}  // namespace convfirst::block_fusion
