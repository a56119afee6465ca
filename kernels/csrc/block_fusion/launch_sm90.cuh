// Launch of the sm_90a path: tensor maps and kernel parameters from a plan.
#pragma once

#include <cuda_runtime.h>

#include "../common/launch.cuh"
#include "conv_first_block_fwd_sm90_wgmma.cuh"
#include "tensor_map_sm90.h"

namespace convfirst::block_fusion::sm90 {

template <class Traits>
KernelParams kernel_params(const Problem& q, const Tensors& t, const Plan& plan) {
  KernelParams p{};
  p.x = t.x, p.y = t.y, p.conv_weight = t.conv_weight, p.conv_bias = t.conv_bias;
  p.norm_weight = t.norm_weight, p.norm_bias = t.norm_bias, p.expand_bias = t.expand_bias, p.project_bias = t.project_bias;
  p.layer_scale = t.layer_scale, p.sample_scale = t.sample_scale, p.eps = t.eps, p.has_norm = q.has_norm;
  p.batch = static_cast<int>(q.batch), p.height = static_cast<int>(q.height), p.width = static_cast<int>(q.width);
  p.tile_images = plan.tile.images, p.tile_height = plan.tile.height, p.tile_width = plan.tile.width;
  p.tiles_y = static_cast<int>(ceil_div(q.height, plan.tile.height));
  p.tiles_x = static_cast<int>(ceil_div(q.width, plan.tile.width));
  p.pixels = static_cast<int>(q.batch * q.height * q.width);
  p.by_width = cutlass::FastDivmod(p.width), p.by_height = cutlass::FastDivmod(p.height);
  p.chunks = q.hidden / kHiddenChunk, p.tiles = static_cast<int>(tile_count(q, plan.tile));
  const Rounds rounds = share_out<Traits>(p.tiles, p.chunks, plan.grid);
  p.full_rounds = rounds.full, p.shared = rounds.shared;
  p.w1_slots = plan.slots.w1, p.w2_slots = plan.slots.w2, p.x_slots = plan.slots.x;
  p.x_panel_bytes = x_panel_bytes<Traits>(plan.tile), p.x_slot_bytes = x_slot_bytes<Traits>(plan.tile);
  return p;
}

template <class Traits>
int Kernel<Traits>::launch(const Problem& q, const Tensors& t, const Plan& plan, int shared_memory, cudaStream_t stream) {
  const TileShape& tile = plan.tile;
  constexpr int kPad = Traits::kPad;
  CUtensorMap x_map, zeros_map, w1_map, w2_map, pixels_map{}, y_map{};
  const int64_t pixels = q.batch * q.height * q.width;
  const int flat_rows = tile.flat() ? tile.staged(kPad) - 1 : 1;
  const bool encoded_x =
      tile.flat() ? encode_map<2>(&x_map, q.dtype, t.x, {q.channels, pixels}, {Traits::kPanel, flat_rows}, Traits::kRowBytes)
                  : encode_map<4>(&x_map, q.dtype, t.x, {q.channels, q.width, q.height, q.batch},
                                  {Traits::kPanel, tile.width + 2 * kPad, tile.height + 2 * kPad, tile.images}, Traits::kRowBytes);
  const bool encoded =
      encoded_x && encode_map<2>(&zeros_map, q.dtype, t.x, {q.channels, pixels}, {Traits::kPanel, 1}, Traits::kRowBytes) &&
      encode_map<2>(&w1_map, q.dtype, t.expand_weight, {q.channels, q.hidden}, {Traits::kPanel, kHiddenChunk}, Traits::kRowBytes) &&
      encode_map<2>(&w2_map, q.dtype, t.project_weight, {q.hidden, q.channels}, {kHiddenChunk, Traits::kChannels / Traits::kW2Parts}, 128);
  const bool encoded_y =
      !(Traits::kTmaStore && tile.flat()) ||
      (encode_map<2>(&pixels_map, q.dtype, t.x, {q.channels, pixels}, {Traits::kPanel, kTilePixels}, Traits::kRowBytes) &&
       encode_map<2>(&y_map, q.dtype, t.y, {q.channels, pixels}, {Traits::kPanel, kTilePixels / 4}, Traits::kRowBytes));
  if (!encoded || !encoded_y) return cudaErrorInvalidValue;
  const KernelParams params = kernel_params<Traits>(q, t, plan);
  return start_dependent_clusters(&conv_first_block_fwd_sm90<Traits>, params.shared ? 2 : 1, plan.grid, Traits::kThreads, shared_memory, stream,
                                  params, x_map, zeros_map, w1_map, w2_map, pixels_map, y_map);
}

template <class Traits>
const void* Kernel<Traits>::pointer() {
  return reinterpret_cast<const void*>(&conv_first_block_fwd_sm90<Traits>);
}

}  // namespace convfirst::block_fusion::sm90
