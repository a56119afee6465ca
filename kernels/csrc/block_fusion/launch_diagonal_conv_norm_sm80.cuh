// Launch of diagonal_conv_norm_fwd_sm80.
#pragma once

#include "../common/launch.cuh"
#include "diagonal_conv_norm_fwd_sm80.cuh"
#include "first_sm80.h"

namespace convfirst::block_fusion::sm80 {

template <DType kType>
int DiagonalConvNorm<kType>::launch(const DiagonalParams& p, cudaStream_t stream) {
  return start_kernel(diagonal_conv_norm_fwd_sm80<kType>, p.plan.grid, kDiagonalThreads, p.plan.shared_memory, stream, p);
}

}  // namespace convfirst::block_fusion::sm80
