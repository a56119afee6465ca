// Launch of tiles_conv_norm_fwd_sm80.
#pragma once

#include "../common/launch.cuh"
#include "first_sm80.h"
#include "tiles_conv_norm_fwd_sm80.cuh"

namespace convfirst::block_fusion::sm80 {

template <DType kType>
int TilesConvNorm<kType>::launch(const sm90::ConvNormParams& p, cudaStream_t stream) {
  return start_kernel(tiles_conv_norm_fwd_sm80<sm90::ConvNormTraits<kType, false>>, p.plan.grid(), sm90::kConvNormThreads,
                      p.plan.shared_memory, stream, p);
}

}  // namespace convfirst::block_fusion::sm80
