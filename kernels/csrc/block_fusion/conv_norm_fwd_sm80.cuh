// First launch of the split path: convolution and LayerNorm of a tile of pixels, all channels, to device memory.
//
//        x, a slice of channels with halo            a [pixels x C]
//      +---------------------------+  convolution  +----------------+
//      |  . . . tile and halo . .  |  + bias       |                |  LayerNorm -> device memory [batch pixels x C]
//      |  . . . . . . . . . . . .  |  ---------->  |                |
//      +---------------------------+               +----------------+
//
//   x slices with halo    shared    buffers x halo pixels x slice channels
//   a                     shared    pixels x C
//   norm's row            registers, fp32
#pragma once

#include "conv_stage_sm80.cuh"

namespace convfirst::block_fusion::sm80 {

template <typename T, bool kDepthwise>
__global__ void __launch_bounds__(conv_tile(kDepthwise).threads)
    conv_norm_fwd_sm80(const __grid_constant__ BlockParams p, T* __restrict__ output) {
  constexpr ConvTile kTile = conv_tile(kDepthwise);
  constexpr int kLanes = 32, kChunks = kTile.max_channels / 8 / kLanes;
  extern __shared__ __align__(128) unsigned char smem[];
  const ConvLayout layout = conv_layout(p.channels, kDepthwise);
  const int pitch = row_bytes(p.channels);
  const TileRows<kTile.pixels> rows{reinterpret_cast<int*>(smem + layout.pixel), reinterpret_cast<uint32_t*>(smem + layout.taps),
                                    reinterpret_cast<int*>(smem + layout.window)};
  float* norm_weight = reinterpret_cast<float*>(smem + layout.norm);
  float* norm_bias = norm_weight + p.channels;
  const TileOrigin origin = tile_origin(p.geometry);
  for (int c = threadIdx.x; c < p.channels; c += kTile.threads) {
    norm_weight[c] = p.t.norm_weight ? p.t.norm_weight[c] : 1.f;
    norm_bias[c] = p.t.norm_bias ? p.t.norm_bias[c] : 0.f;
  }
  if (threadIdx.x < 4) reinterpret_cast<uint32_t*>(smem + layout.zero)[threadIdx.x] = 0u;

  conv_stage<T, kDepthwise, kTile.pixels, kTile.slice, kTile.threads>(p, origin, rows, smem + layout.region,
                                                                      ptx::smem_address(smem + layout.zero), smem, pitch, [] {});
  auto store = [&](int row, int chunk, uint4 value) {
    const int pixel = rows.pixel[row];
    if (pixel >= 0) *reinterpret_cast<uint4*>(output + static_cast<size_t>(pixel) * p.channels + chunk * 8) = value;
  };
  if (p.has_norm) {
    layer_norm_rows<T, kTile.pixels, kLanes, kChunks, 2, kTile.threads>(smem, pitch, p.channels, norm_weight, norm_bias, p.t.eps,
                                                                     store);
  } else {
    const int chunks = p.channels / 8;
    for (int i = threadIdx.x; i < kTile.pixels * chunks; i += kTile.threads)
      store(i / chunks, i % chunks, *reinterpret_cast<const uint4*>(smem + i / chunks * pitch + i % chunks * 16));
  }
}

}  // namespace convfirst::block_fusion::sm80
