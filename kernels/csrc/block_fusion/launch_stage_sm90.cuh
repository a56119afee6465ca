// Launch of a stage on the latency path.
#pragma once

#include <cuda_runtime.h>

#include "../common/launch.cuh"
#include "tensor_map_sm90.h"
#include "wide_stage_fwd_sm90_mma.cuh"

namespace convfirst::block_fusion::sm90 {

template <class Traits>
constexpr auto stage_kernel() {
  if constexpr (Traits::kTeam > Traits::kCluster) {
    return &wide_stage_fwd_sm90<Traits>;
  } else {
    return &latency_stage_fwd_sm90<Traits>;
  }
}

// As many tiles as there must be, of as few pixels as then suffice: all of them exchange less. Where rows of pixels do not overlap in shared memory
// (latency_rows), a smaller tile would read tiles that do not read it, and two sets of words would not do.
inline int stage_tile(int pixels, int width, int most) {
  if (width >= most + 2) return most;
  return static_cast<int>(ceil_div(pixels, ceil_div(pixels, most)));
}

template <class Traits>
int StageKernel<Traits>::launch(const StageTensors& tensors, cudaStream_t stream) {
  StageTensors t = tensors;
  t.tile = stage_tile(t.pixels, t.width, Traits::kPixels);
  const auto kernel = stage_kernel<Traits>();
  if (Traits::kCluster > 8) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  CUtensorMap project;
  const int64_t sizes[2] = {Traits::kHidden, int64_t{t.blocks} * Traits::kChannels};
  if (!encode_map<2>(&project, Traits::kDType, t.project_weight, sizes, {StageWeightBoxes<Traits>::kDepth, Traits::kRows}, 64)) {
    return static_cast<int>(cudaErrorInvalidValue);
  }
  const int tiles = static_cast<int>(ceil_div(t.pixels, t.tile));
  return start_dependent_clusters(kernel, Traits::kCluster, tiles * Traits::kTeam, Traits::kThreads,
                                  LatencyLayout<Traits>::total(t.width), stream, t, project);
}

template <class Traits>
int StageKernel<Traits>::resident(int width, int* clusters) {
  const auto kernel = stage_kernel<Traits>();
  const int shared_memory = LatencyLayout<Traits>::total(width);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_memory);
  if (error == cudaSuccess && Traits::kCluster > 8) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return static_cast<int>(error);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = Traits::kCluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = Traits::kCluster, config.blockDim = Traits::kThreads, config.dynamicSmemBytes = shared_memory;
  config.attrs = &attribute, config.numAttrs = 1;
  return static_cast<int>(cudaOccupancyMaxActiveClusters(clusters, kernel, &config));
}

}  // namespace convfirst::block_fusion::sm90
