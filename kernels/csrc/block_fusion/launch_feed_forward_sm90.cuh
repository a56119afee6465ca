// Launch of the feed-forward kernel: tensor maps and kernel parameters.
#pragma once

#include "../common/launch.cuh"
#include "feed_forward_fwd_sm90_wgmma.cuh"
#include "tensor_map_sm90.h"

namespace convfirst::block_fusion::sm90 {

template <class Traits>
int FeedForwardKernel<Traits>::launch(const FeedForwardProblem& q, const Tensors& t, const void* a, int64_t image_pixels,
                                      int multiprocessors, int max_shared_memory, cudaStream_t stream) {
  FeedForwardRings rings;
  if (!choose_rings<Traits>(q.hidden, max_shared_memory, &rings)) return cudaErrorInvalidValue;
  FeedForwardParams p{};
  p.chunks = static_cast<int>(ceil_div(q.hidden, kHiddenChunk)), p.w1_slots = rings.w1, p.w2_slots = rings.w2;
  p.x = t.x, p.y = t.y, p.expand_bias = t.expand_bias, p.project_bias = t.project_bias;
  p.layer_scale = t.layer_scale, p.sample_scale = t.sample_scale;
  p.pixels = static_cast<int>(q.pixels), p.image_pixels = static_cast<int>(image_pixels);
  p.channels = q.channels, p.hidden = q.hidden;
  p.tiles = static_cast<int>(ceil_div(q.pixels, kTilePixels)), p.tile_slots = rings.tile;
  CUtensorMap a_map, x_map, y_map, w1_map, w2_map;
  const auto encode_pixels = [&](CUtensorMap* map, const void* data) {
    return encode_map<2>(map, q.dtype, data, {q.channels, q.pixels}, {Traits::kPanel, kTilePixels}, Traits::kRowBytes);
  };
  const bool encoded =
      encode_pixels(&a_map, a) && encode_pixels(&x_map, t.x) && encode_pixels(&y_map, t.y) &&
      encode_map<2>(&w1_map, q.dtype, t.expand_weight, {q.channels, q.hidden}, {Traits::kPanel, kHiddenChunk}, Traits::kRowBytes) &&
      encode_map<2>(&w2_map, q.dtype, t.project_weight, {q.hidden, q.channels}, {kHiddenChunk, Traits::kChannels / Traits::kW2Parts}, 128);
  if (!encoded) return cudaErrorInvalidValue;
  const int grid = static_cast<int>(std::min<int64_t>(p.tiles, multiprocessors));
  const Rounds rounds = share_out<Traits>(p.tiles, p.chunks, grid);
  p.full_rounds = rounds.full, p.shared = rounds.shared;
  return start_dependent_clusters(feed_forward_fwd_sm90<Traits>, p.shared ? 2 : 1, grid, Traits::kThreads,
                                  feed_forward_layout<Traits>(rings, p.chunks).total, stream, p, a_map, x_map, y_map, w1_map, w2_map);
}

template <class Traits>
const void* FeedForwardKernel<Traits>::pointer() {
  return reinterpret_cast<const void*>(&feed_forward_fwd_sm90<Traits>);
}

}  // namespace convfirst::block_fusion::sm90
