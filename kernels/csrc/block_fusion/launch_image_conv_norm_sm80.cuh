// Launch of image_conv_norm_fwd_sm80.
#pragma once

#include "../common/launch.cuh"
#include "first_sm80.h"
#include "image_conv_norm_fwd_sm80.cuh"

namespace convfirst::block_fusion::sm80 {

template <DType kType, int kWidth>
int ImageConvNorm<kType, kWidth>::launch(const sm90::ImageParams& p, const sm90::ImagePlan& plan, cudaStream_t stream) {
  return start_kernel(image_conv_norm_fwd_sm80<sm90::ImageTraits<kType, kWidth>>, plan.grid, plan.threads, plan.shared_memory, stream, p);
}

}  // namespace convfirst::block_fusion::sm80
