// Runs the kernels of the convolution's weight gradient, and those of block_bwd_weights.h, on a CPU.
#include "engine.h"

#include "block_fusion/block_bwd_weights_sm80.cu"
#include "block_fusion/conv_bwd_weights.cpp"
#include "block_fusion/conv_bwd_weights_depthwise_bfloat16_sm80.cu"
#include "block_fusion/conv_bwd_weights_depthwise_half_sm80.cu"
#include "block_fusion/conv_bwd_weights_grouped_bfloat16_sm80.cu"
#include "block_fusion/conv_bwd_weights_grouped_half_sm80.cu"
#include "block_fusion/conv_bwd_weights_sum_sm80.cu"

using namespace convfirst::block_fusion;

extern "C" {

void plan(const WeightGradientProblem* problem, const Device* device, WeightGradientPlan* result) {
  *result = plan_weight_gradient(*problem, *device);
}

// d_bias follows d_weight in `results`; the workspace is poisoned. Returns a CUDA error.
int run(const WeightGradientProblem* problem, const WeightGradientPlan* plan, const void* da, const void* x, float* results, bool at_once,
        bool backwards) {
  std::vector<unsigned char> workspace(plan->workspace(*problem), 0xff);
  emulation::copies_at_once = at_once;
  emulation::backwards = backwards;
  return run_weight_gradient(*problem, *plan, {da, x, results, results + problem->weights()}, workspace.data(), nullptr);
}

int absorb(int dtype, const AffineTensors* from, void* matrix, float* bias) {
  return absorb_affine(static_cast<DType>(dtype), *from, matrix, bias, nullptr);
}

int release(int dtype, const AffineTensors* of, const ReleasedTensors* to) {
  std::vector<unsigned char> workspace(release_workspace(*of), 0xff);
  return release_affine(static_cast<DType>(dtype), *of, *to, workspace.data(), nullptr);
}

int transpose(const void* filter, void* result, int taps, int channels, int group_width) {
  return transpose_filter(filter, result, taps, channels, group_width, nullptr);
}

}  // extern "C"
