// All Hopper kernels of one dtype.
#pragma once

#include "launch_first_layer_sm90.cuh"
#include "launch_implicit_gemm_sm90.cuh"
#include "launch_sm90.h"

namespace convfirst::direct::sm90 {

template <DType kDType, bool kTransposed, int kTile = 0, class Function>
auto with_tile(int tile, Function function) {
  if constexpr (kTile + 1 == (kTransposed ? kTransposedTileCount : kGemmTileCount)) {
    return function(GemmKernel<GemmTraits<kDType, kTile, kTransposed>>{});
  } else {
    return tile == kTile ? function(GemmKernel<GemmTraits<kDType, kTile, kTransposed>>{}) : with_tile<kDType, kTransposed, kTile + 1>(tile, function);
  }
}

template <DType kDType>
int Kernels<kDType>::gemm(const GemmProblem& q, const GemmTensors& t, const GemmPlan& plan, cudaStream_t stream) {
  const auto launch = [&](auto kernel) { return kernel.launch(q, t, plan, stream); };
  return q.transposed ? with_tile<kDType, true>(plan.tile, launch) : with_tile<kDType, false>(plan.tile, launch);
}

template <DType kDType>
const void* Kernels<kDType>::gemm_kernel(int tile, bool transposed) {
  const auto address = [](auto kernel) { return kernel.kernel(); };
  return transposed ? with_tile<kDType, true>(tile, address) : with_tile<kDType, false>(tile, address);
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
