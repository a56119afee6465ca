// All Hopper kernels of one dtype.
#pragma once

#include "launch_first_layer_sm90.cuh"
#include "launch_implicit_gemm_sm90.cuh"
#include "launch_sm90.h"

namespace convfirst::direct::sm90 {

template <DType kDType, int kTile = 0, class Function>
auto with_tile(int tile, Function function) {
  if constexpr (kTile + 1 == kGemmTileCount) {
    return function(GemmKernel<GemmTraits<kDType, kTile>>{});
  } else {
    return tile == kTile ? function(GemmKernel<GemmTraits<kDType, kTile>>{}) : with_tile<kDType, kTile + 1>(tile, function);
  }
}

template <DType kDType>
int Kernels<kDType>::gemm(const GemmProblem& q, const GemmTensors& t, const GemmPlan& plan, cudaStream_t stream) {
  return with_tile<kDType>(plan.tile, [&](auto kernel) { return kernel.launch(q, t, plan, stream); });
}

template <DType kDType>
const void* Kernels<kDType>::gemm_kernel(int tile) {
  return with_tile<kDType>(tile, [](auto kernel) { return kernel.kernel(); });
}

template <DType kDType>
int Kernels<kDType>::first(const Problem& q, const Tensors& t, const FirstPlan& plan, void* workspace, cudaStream_t stream) {
  return plan.columns == 64 ? FirstKernel<FirstTraits<kDType, 64>>::launch(q, t, plan, workspace, stream)
                            : FirstKernel<FirstTraits<kDType, 96>>::launch(q, t, plan, workspace, stream);
}

template <DType kDType>
const void* Kernels<kDType>::first_kernel(int columns) {
  return columns == 64 ? FirstKernel<FirstTraits<kDType, 64>>::kernel() : FirstKernel<FirstTraits<kDType, 96>>::kernel();
}

}  // namespace convfirst::direct::sm90
