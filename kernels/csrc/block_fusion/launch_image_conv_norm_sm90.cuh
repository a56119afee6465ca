// Launch of image_conv_norm_fwd_sm90.
#pragma once

#include <cuda_runtime.h>

#include "../common/launch.cuh"
#include "image_conv_norm_fwd_sm90.cuh"

namespace convfirst::block_fusion::sm90 {

template <DType kDType, int kWidth>
int ImageKernel<kDType, kWidth>::launch(const ImageParams& params, const ImagePlan& plan, bool dependent, cudaStream_t stream) {
  const auto kernel = &image_conv_norm_fwd_sm90<ImageTraits<kDType, kWidth>>;
  if (dependent) return start_dependent_kernel(kernel, plan.grid, plan.threads, plan.shared_memory, stream, params);
  return start_kernel(kernel, plan.grid, plan.threads, plan.shared_memory, stream, params);
}

template <DType kDType, int kWidth>
const void* ImageKernel<kDType, kWidth>::pointer() {
  return reinterpret_cast<const void*>(&image_conv_norm_fwd_sm90<ImageTraits<kDType, kWidth>>);
}

}  // namespace convfirst::block_fusion::sm90
