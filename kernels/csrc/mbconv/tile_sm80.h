// Tiles of the portable MBConv kernel: one constexpr table, read by the kernel and by the host's planner alike.
#pragma once

#include <algorithm>

#include "../block_fusion/tile_sm80.h"
#include "params.h"

namespace convfirst::mbconv::sm80 {

using block_fusion::sm80::BlockParams;
using block_fusion::sm80::Geometry;
using block_fusion::sm80::row_bytes;

constexpr int kTaps = 9;  // 3x3

// How a block of threads cuts its work: of the projection's result a warp owns 16 * row_blocks pixels and 1 / warps_n of the
// columns; the expansion's rows, pixels with halo, are dealt out to all warps.
struct Tile {
  int row_blocks;  // m16 blocks a warp
  int warps_m;
  int warps_n;
  int hidden_chunk;
  int min_blocks;  // blocks a multiprocessor holds at once; bounds the registers

  CONVFIRST_HOST_DEVICE constexpr int pixels() const { return 16 * row_blocks * warps_m; }
  CONVFIRST_HOST_DEVICE constexpr int threads() const { return 32 * warps_m * warps_n; }
};

// Few warps with large tiles spare shared memory, many hide latency: from 128 channels on the tile of 128 pixels is for the first,
// that of 64 for the second, with 16 warps a multiprocessor of compute capability 9.0.
// Depthwise, widths up to 96 fit 128 pixels into the 99 KB of sm_86 and sm_89, and 192 fits 64 pixels; 256 and 384 need more.
CONVFIRST_HOST_DEVICE constexpr Tile tile(int width, int pixels, bool depthwise) {
  switch (width) {
    case 32: return {2, 4, 1, 32, 4};
    case 64: return depthwise ? Tile{2, 4, 1, 32, 3} : Tile{2, 4, 2, 32, 2};
    case 96: return pixels == 128 ? Tile{2, 4, 2, 32, 2} : Tile{2, 2, 2, 32, 3};
    case 128: return pixels == 128 ? Tile{2, 4, 2, 32, 1} : Tile{2, 2, 4, 32, 2};
    case 192: return pixels == 128 ? Tile{2, 4, 2, 32, 1} : Tile{2, 2, 4, 16, 2};
    case 256: return pixels == 128 ? Tile{2, 4, 2, 32, 1} : Tile{2, 2, 4, 16, 2};
    default: return {2, 2, 4, 16, 1};
  }
}

// A thread of the depthwise stage owns two channels of so many rows and columns of pixels: the most that leave no thread idle.
CONVFIRST_HOST_DEVICE constexpr int depthwise_pixels(const Tile& t) { return t.pixels() * t.hidden_chunk / 2 / t.threads(); }
CONVFIRST_HOST_DEVICE constexpr int depthwise_rows(const Tile& t) {
  return depthwise_pixels(t) >= 16 ? 4 : depthwise_pixels(t) >= 8 ? 2 : 1;
}
CONVFIRST_HOST_DEVICE constexpr int depthwise_columns(const Tile& t) { return depthwise_pixels(t) >= 4 ? 4 : 2; }

CONVFIRST_HOST_DEVICE constexpr int round_up(int value, int to) { return (value + to - 1) / to * to; }

CONVFIRST_HOST_DEVICE constexpr int log2_of(int power) { return power <= 1 ? 0 : 1 + log2_of(power / 2); }

// Byte offsets in a block's shared memory. What depends on the problem comes last; `a` is the convolution's result. The
// depthwise stage asks for no row's taps and window, so they lie where hidden units will.
struct Layout {
  int a, pixel, taps, window, project, zero, expand, expand_slot, project_ring, project_slot, filter, filter_slot, halo_pixel,
      hidden, x, end;
};

CONVFIRST_HOST_DEVICE constexpr Layout shared_layout(int width, const Tile& t, int group_width, int halo_rows) {
  Layout l{};
  l.pixel = l.a + t.pixels() * row_bytes(t.hidden_chunk);
  l.taps = l.pixel + 4 * t.pixels();
  l.window = l.taps + 4 * t.pixels();
  l.project = group_width == 1 ? l.taps : l.window + 4 * t.pixels();
  l.zero = l.project + 8 * width;
  l.expand = l.zero + 16;
  l.expand_slot = t.hidden_chunk * (row_bytes(width) + 8);  // the two biases follow the weights
  l.project_ring = l.expand + 2 * l.expand_slot;
  l.project_slot = width * row_bytes(t.hidden_chunk);
  l.filter = l.project_ring + 2 * l.project_slot;
  l.filter_slot = kTaps * t.hidden_chunk * group_width * 2;
  l.halo_pixel = l.filter + 2 * l.filter_slot;
  l.hidden = l.halo_pixel + 4 * halo_rows;
  if (group_width == 1) {
    l.taps = l.hidden;
    l.window = l.taps + 4 * t.pixels();
  }
  l.x = l.hidden + halo_rows * row_bytes(t.hidden_chunk);
  l.end = l.x + halo_rows * row_bytes(width);
  return l;
}

// The expansion's rows: the tile's pixels with their halo, in whole m16 blocks.
CONVFIRST_HOST_DEVICE constexpr int halo_rows(const Geometry& g) { return round_up(g.halo_pixels, 16); }

// The convolution of the block, as block_fusion's geometry asks for it.
inline block_fusion::Problem convolution_of(const Problem& p) {
  return {p.batch, p.height, p.width, p.channels, p.hidden, p.kernel_size, p.group_width, p.dtype, p.activation, false};
}

}  // namespace convfirst::mbconv::sm80
