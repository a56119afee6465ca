// Tensor maps and launches of the feed-forward half's backward.
#pragma once

#include "../common/launch.cuh"
#include "feed_forward_bwd_data_sm90_wgmma.cuh"
#include "feed_forward_bwd_weights_sm90_wgmma.cuh"
#include "tensor_map_sm90.h"

namespace convfirst::block_fusion::sm90 {

struct BackwardMaps {
  CUtensorMap a, dy, da, w1, w2;
};

template <class Traits>
bool encode_backward_maps(BackwardMaps* maps, const FeedForwardBackwardProblem& q, const FeedForwardBackwardTensors& t,
                          const FeedForwardBackwardPlan& plan, const char* workspace) {
  const auto encode_pixels = [&](CUtensorMap* map, const void* data) {
    return encode_map<2>(map, q.dtype, data, {q.channels, q.pixels}, {Traits::kPanel, kTilePixels}, Traits::kRowBytes);
  };
  const void* w2 = q.has_layer_scale ? workspace + plan.scaled_weight : t.project_weight;
  return encode_pixels(&maps->a, t.a) && encode_pixels(&maps->dy, t.dy) && encode_pixels(&maps->da, t.da) &&
         encode_map<2>(&maps->w1, q.dtype, t.expand_weight, {q.channels, q.hidden}, {Traits::kPanel, kHiddenChunk}, Traits::kRowBytes) &&
         encode_map<2>(&maps->w2, q.dtype, w2, {q.hidden, q.channels}, {kHiddenChunk, Traits::kChannels}, 128);
}

template <DType kDType, int kChannels, Activation kActivation>
int FeedForwardBackwardKernels<kDType, kChannels, kActivation>::launch_data(const FeedForwardBackwardProblem& q,
                                                                            const FeedForwardBackwardTensors& t,
                                                                            const FeedForwardBackwardPlan& plan, char* workspace,
                                                                            int multiprocessors, cudaStream_t stream) {
  using Traits = BackwardDataTraits<kDType, kChannels, kActivation>;
  BackwardMaps maps;
  if (!encode_backward_maps<Traits>(&maps, q, t, plan, workspace)) return cudaErrorInvalidValue;
  BackwardDataParams p{};
  p.bias = reinterpret_cast<const float*>(workspace + plan.bias);
  p.pixel_scale = q.has_sample_scale ? reinterpret_cast<const float*>(workspace + plan.pixel_scale) : nullptr;
  p.scalars = reinterpret_cast<const float*>(workspace + plan.scalars), p.rstd = t.rstd;
  p.pixels = static_cast<int>(q.pixels), p.channels = q.channels, p.chunks = q.hidden / kHiddenChunk, p.tiles = plan.tiles;
  return start_dependent_kernel(feed_forward_bwd_data_sm90<Traits>, std::min(plan.tiles, multiprocessors), Traits::kThreads,
                                Traits::kSharedMemory, stream, p, maps.a, maps.dy, maps.da, maps.w1, maps.w2);
}

template <DType kDType, int kChannels, Activation kActivation>
int FeedForwardBackwardKernels<kDType, kChannels, kActivation>::launch_weights(const FeedForwardBackwardProblem& q,
                                                                               const FeedForwardBackwardTensors& t,
                                                                               const FeedForwardBackwardPlan& plan, char* workspace,
                                                                               cudaStream_t stream) {
  using Traits = BackwardWeightsTraits<kDType, kChannels, kActivation>;
  static_assert(Traits::kHiddenGroups * 64 == backward_hidden_of_block(kChannels));
  BackwardMaps maps;
  if (!encode_backward_maps<Traits>(&maps, q, t, plan, workspace)) return cudaErrorInvalidValue;
  const auto at = [&](int64_t offset) { return reinterpret_cast<float*>(workspace + offset); };
  BackwardWeightsParams p{};
  p.bias = at(plan.bias), p.pixel_scale = q.has_sample_scale ? at(plan.pixel_scale) : nullptr;
  p.d_expand_weight = at(plan.d_expand_weight), p.d_project_weight = at(plan.d_project_weight);
  p.d_expand_bias = at(plan.d_expand_bias), p.d_project_bias = at(plan.d_project_bias);
  p.channels = q.channels, p.hidden = q.hidden, p.tiles = plan.tiles, p.groups = plan.groups, p.splits = plan.splits;
  return start_dependent_kernel(feed_forward_bwd_weights_sm90<Traits>, plan.groups * plan.splits, Traits::kThreads, Traits::kSharedMemory,
                                stream, p, maps.a, maps.dy, maps.w1, maps.w2);
}

}  // namespace convfirst::block_fusion::sm90
