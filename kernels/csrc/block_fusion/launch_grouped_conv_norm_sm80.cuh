// Launch of grouped_conv_norm_fwd_sm80.
#pragma once

#include "../common/launch.cuh"
#include "first_sm80.h"
#include "grouped_conv_norm_fwd_sm80.cuh"

namespace convfirst::block_fusion::sm80 {

template <DType kType, int kKernel, int kGroupWidth, int kMTiles>
int GroupedConvNorm<kType, kKernel, kGroupWidth, kMTiles>::launch(const sm90::GroupedParams& p, cudaStream_t stream) {
  return start_kernel(grouped_conv_norm_fwd_sm80<sm90::GroupedTraits<kType, kKernel, kGroupWidth, kMTiles>>, p.plan.tiles, p.plan.threads,
                      p.plan.shared_memory, stream, p);
}

}  // namespace convfirst::block_fusion::sm80
