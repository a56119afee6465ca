// Launches of the latency path for 512 channels.
#pragma once

#include "latency_wide_block_fwd_sm90_mma.cuh"
#include "launch_latency_sm90.cuh"

namespace convfirst::block_fusion::sm90 {

template <class Traits>
int LatencyWideKernel<Traits>::launch(const Problem& q, const Tensors& t, void* workspace, cudaStream_t stream) {
  const LatencyParams p = latency_params(q, t);
  float* partials = static_cast<float*>(workspace);
  const int tiles = static_cast<int>(ceil_div(p.pixels, Traits::kPixels));
  const int error = start_dependent_clusters(&latency_wide_block_fwd_sm90<Traits>, Traits::kCluster, tiles * Traits::kGroups * Traits::kCluster,
                                             Traits::kThreads, LatencyLayout<Traits>::kTotal, stream, p, partials);
  if (error != 0) return error;
  return start_dependent_kernel(&latency_wide_finish_sm90<Traits>, p.pixels, Traits::kChannels / 4, 0, stream, p, partials);
}

template <class Traits>
const void* LatencyWideKernel<Traits>::pointer() {
  return reinterpret_cast<const void*>(&latency_wide_block_fwd_sm90<Traits>);
}

}  // namespace convfirst::block_fusion::sm90
