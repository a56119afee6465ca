// The kernels of one dtype that may share their depth out to a cluster.
#pragma once

#include "launch_halo_gemm_sm90.cuh"
#include "launch_sm90.h"
#include "launch_split_gemm_sm90.cuh"

namespace convfirst::direct::sm90 {

template <DType kDType>
int SplitKernels<kDType>::split(const GemmProblem& q, const GemmTensors& t, const SplitPlan& plan, cudaStream_t stream) {
  return plan.tile == 0 ? SplitKernel<SplitTraits<kDType, 0>>::launch(q, t, plan, stream) : SplitKernel<SplitTraits<kDType, 1>>::launch(q, t, plan, stream);
}

template <DType kDType>
int SplitKernels<kDType>::halo(const GemmProblem& q, const GemmTensors& t, const HaloPlan& plan, cudaStream_t stream) {
  return plan.columns == 128 ? HaloKernel<HaloTraits<kDType, 128>>::launch(q, t, plan, stream)
                             : HaloKernel<HaloTraits<kDType, 64>>::launch(q, t, plan, stream);
}

template <DType kDType>
const void* SplitKernels<kDType>::split_kernel(int tile) {
  return tile == 0 ? SplitKernel<SplitTraits<kDType, 0>>::kernel() : SplitKernel<SplitTraits<kDType, 1>>::kernel();
}

template <DType kDType>
const void* SplitKernels<kDType>::halo_kernel(int columns) {
  return columns == 128 ? HaloKernel<HaloTraits<kDType, 128>>::kernel() : HaloKernel<HaloTraits<kDType, 64>>::kernel();
}

}  // namespace convfirst::direct::sm90
