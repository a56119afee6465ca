// The kernels of one dtype that split the depth over a cluster.
#pragma once

#include "launch_sm90.h"
#include "launch_split_gemm_sm90.cuh"

namespace convfirst::direct::sm90 {

template <DType kDType>
int SplitKernels<kDType>::launch(const GemmProblem& q, const GemmTensors& t, const SplitPlan& plan, cudaStream_t stream) {
  return plan.tile == 0 ? SplitKernel<SplitTraits<kDType, 0>>::launch(q, t, plan, stream) : SplitKernel<SplitTraits<kDType, 1>>::launch(q, t, plan, stream);
}

template <DType kDType>
const void* SplitKernels<kDType>::kernel(int tile) {
  return tile == 0 ? SplitKernel<SplitTraits<kDType, 0>>::kernel() : SplitKernel<SplitTraits<kDType, 1>>::kernel();
}

}  // namespace convfirst::direct::sm90
