// Launch of conv_norm_fwd_sm90: tensor map, cluster, dependent launch, shared memory.
#pragma once

#include <cuda_runtime.h>

#include "conv_norm_fwd_sm90.cuh"
#include "tensor_map_sm90.h"

namespace convfirst::block_fusion::sm90 {

template <DType kDType, bool kNarrow>
int ConvNormKernel<kDType, kNarrow>::launch(const ConvNormParams& params, bool dependent, cudaStream_t stream) {
  const auto kernel = &conv_norm_fwd_sm90<ConvNormTraits<kDType, kNarrow>>;
  const ConvNormTile& t = params.plan.tile;
  CUtensorMap x_map;
  const int64_t sizes[] = {params.channels, params.width, params.height, params.batch};
  const int box[] = {kConvNormSlice, t.box_cols, t.box_rows, t.images};
  if (!encode_map<4>(&x_map, kDType, params.x, sizes, box, kConvNormSlice * 2)) return cudaErrorInvalidValue;
  const int shared_memory = params.layout.total;
  if (cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_memory)) return e;
  if (params.plan.cluster > 8) {
    if (cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)) return e;
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(params.plan.grid());
  config.blockDim = dim3(kConvNormThreads);
  config.dynamicSmemBytes = shared_memory;
  config.stream = stream;
  config.attrs = attributes;
  if (params.plan.cluster > 1) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim.x = params.plan.cluster, a.val.clusterDim.y = a.val.clusterDim.z = 1;
  }
  if (dependent) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    a.val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, params, x_map);
}

template <DType kDType, bool kNarrow>
const void* ConvNormKernel<kDType, kNarrow>::pointer() {
  return reinterpret_cast<const void*>(&conv_norm_fwd_sm90<ConvNormTraits<kDType, kNarrow>>);
}

}  // namespace convfirst::block_fusion::sm90
