// Launch of grouped_conv_norm_fwd_sm90: shared memory and dependent launch.
#pragma once

#include "../common/launch.cuh"
#include "grouped_conv_norm_fwd_sm90.cuh"

namespace convfirst::block_fusion::sm90 {

template <DType kDType, int kKernel, int kGroupWidth, int kMTiles>
int GroupedKernel<kDType, kKernel, kGroupWidth, kMTiles>::launch(const GroupedParams& params, bool dependent, cudaStream_t stream) {
  const auto kernel = &grouped_conv_norm_fwd_sm90<GroupedTraits<kDType, kKernel, kGroupWidth, kMTiles>>;
  const GroupedPlan& plan = params.plan;
  if (dependent) return start_dependent_kernel(kernel, plan.tiles, plan.threads, plan.shared_memory, stream, params);
  return start_kernel(kernel, plan.tiles, plan.threads, plan.shared_memory, stream, params);
}

template <DType kDType, int kKernel, int kGroupWidth, int kMTiles>
const void* GroupedKernel<kDType, kKernel, kGroupWidth, kMTiles>::pointer() {
  return reinterpret_cast<const void*>(&grouped_conv_norm_fwd_sm90<GroupedTraits<kDType, kKernel, kGroupWidth, kMTiles>>);
}

}  // namespace convfirst::block_fusion::sm90
