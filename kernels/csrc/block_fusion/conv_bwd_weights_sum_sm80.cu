// Runs the convolution's weight gradient: a kernel that leaves each slice's sums in the workspace, and one that adds them in order.
#include "../common/launch.cuh"
#include "conv_bwd_weights.h"

namespace convfirst::block_fusion {
namespace sm80 {

constexpr int kSumColumns = 32, kSumRows = 8;  // results of a block; groups of slices, added one after another

__global__ void __launch_bounds__(kSumColumns* kSumRows)
    add_slices_sm80(const float* partial, float* d_weight, float* d_bias, int slices, int weights, int results) {
  extern __shared__ __align__(128) unsigned char smem[];
  float* const sums = reinterpret_cast<float*>(smem);
  const int column = threadIdx.x % kSumColumns, row = threadIdx.x / kSumColumns, i = blockIdx.x * kSumColumns + column;
  float sum = 0.f;
  if (i < results) {
#pragma unroll 8
    for (int slice = row; slice < slices; slice += kSumRows) sum += partial[static_cast<int64_t>(slice) * results + i];
  }
  sums[row * kSumColumns + column] = sum;
  __syncthreads();
  if (row > 0 || i >= results) return;
#pragma unroll
  for (int r = 1; r < kSumRows; ++r) sum += sums[r * kSumColumns + column];
  (i < weights ? d_weight[i] : d_bias[i - weights]) = sum;
}

}  // namespace sm80

int run_weight_gradient(const WeightGradientProblem& problem, const WeightGradientPlan& plan, const WeightGradientTensors& tensors,
                        void* workspace, cudaStream_t stream) {
  float* const partial = static_cast<float*>(workspace);
  const WeightGradientParams params{tensors.da, tensors.x, partial, problem.batch, problem.height, problem.width, problem.channels, plan};
  const bool half = problem.dtype == DType::kHalf;
  const auto kernel = problem.group_width == 1 ? half ? depthwise_weight_gradient_half : depthwise_weight_gradient_bfloat16
                                               : half ? grouped_weight_gradient_half : grouped_weight_gradient_bfloat16;
  const int error = kernel(problem, params, stream);
  if (error != 0) return error;
  return add_slices(partial, tensors.d_weight, tensors.d_bias, plan.slices, static_cast<int>(problem.weights()),
                    static_cast<int>(problem.results()), stream);
}

int add_slices(const float* partial, float* d_weight, float* d_bias, int slices, int weights, int results, cudaStream_t stream) {
  return start_kernel(sm80::add_slices_sm80, (results + sm80::kSumColumns - 1) / sm80::kSumColumns, sm80::kSumColumns * sm80::kSumRows,
                      sm80::kSumColumns * sm80::kSumRows * 4, stream, partial, d_weight, d_bias, slices, weights, results);
}

}  // namespace convfirst::block_fusion
