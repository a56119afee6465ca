// Launch of the latency path.
#pragma once

#include <cuda_runtime.h>

#include "../common/launch.cuh"
#include "latency_block_fwd_sm90_mma.cuh"

namespace convfirst::block_fusion::sm90 {

inline LatencyParams latency_params(const Problem& q, const Tensors& t) {
  LatencyParams p{};
  p.x = t.x, p.y = t.y, p.conv_weight = t.conv_weight, p.conv_bias = t.conv_bias;
  p.norm_weight = t.norm_weight, p.norm_bias = t.norm_bias, p.expand_weight = t.expand_weight, p.expand_bias = t.expand_bias;
  p.project_weight = t.project_weight, p.project_bias = t.project_bias, p.layer_scale = t.layer_scale;
  p.sample_scale = t.sample_scale, p.eps = t.eps, p.has_norm = q.has_norm;
  p.height = static_cast<int>(q.height), p.width = static_cast<int>(q.width);
  p.pixels = static_cast<int>(q.batch * q.height * q.width);
  return p;
}

template <class Traits>
int LatencyKernel<Traits>::launch(const Problem& q, const Tensors& t, cudaStream_t stream) {
  const LatencyParams p = latency_params(q, t);
  const auto kernel = &latency_block_fwd_sm90<Traits>;
  if (Traits::kCluster > 8) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  const int tiles = static_cast<int>(ceil_div(p.pixels, Traits::kPixels));
  return start_dependent_clusters(kernel, Traits::kCluster, tiles * Traits::kCluster, Traits::kThreads,
                                  LatencyLayout<Traits>::total(p.width), stream, p);
}

template <class Traits>
const void* LatencyKernel<Traits>::pointer() {
  return reinterpret_cast<const void*>(&latency_block_fwd_sm90<Traits>);
}

}  // namespace convfirst::block_fusion::sm90
