// Tiles of the portable conv-first block: one constexpr table, read by the kernels and by the host's planner alike.
#pragma once

#include <algorithm>
#include <cstdint>

#include "params.h"

#if defined(__CUDACC__)
#define CONVFIRST_HOST_DEVICE __host__ __device__
#else
#define CONVFIRST_HOST_DEVICE
#endif

namespace convfirst::block_fusion::sm80 {

// How a fused kernel of a width class cuts its work. A warp owns 16 * row_blocks pixels; warps_n warps share them and split
// the columns of both products.
struct FusedTile {
  int row_blocks;    // m16 blocks a warp
  int warps_m;
  int warps_n;       // 1: the hidden chunk stays in registers between the products
  int hidden_chunk;
  int slots;         // ring of weight chunks, W1 and W2 alternating; 4: both at once where a warp owns its rows
  int min_blocks;    // blocks a multiprocessor holds at once; bounds the registers
  int slice;         // channels the convolution stage loads at once

  CONVFIRST_HOST_DEVICE constexpr int pixels() const { return 16 * row_blocks * warps_m; }
  CONVFIRST_HOST_DEVICE constexpr int threads() const { return 32 * warps_m * warps_n; }
};

// Measured choices are recorded in NOTES.md, "Portable path".
CONVFIRST_HOST_DEVICE constexpr FusedTile fused_tile(int width, bool depthwise) {
  switch (width) {
    case 32: return {2, 4, 1, 64, 3, 3, 32};
    case 48: return {2, 4, 1, 32, 4, 3, 32};
    case 64: return {2, 4, 1, 32, 4, 3, depthwise ? 32 : 64};
    case 96: return {2, 4, 1, 32, 4, 3, 32};
    case 128: return {2, 4, 1, 64, 3, 2, depthwise ? 32 : 64};
    case 192: return {2, 2, 2, 64, 2, 2, 64};
    case 256: return depthwise ? FusedTile{4, 2, 4, 64, 3, 1, 64} : FusedTile{2, 3, 4, 128, 2, 1, 64};
    default: return {2, 2, 4, 64, 2, 1, depthwise ? 128 : 64};
  }
}

// Rows that a thread of the fused LayerNorm holds at once: as many as fit 64 registers and divide its rows.
CONVFIRST_HOST_DEVICE constexpr int norm_batch(int width, int pixels, int threads) {
  const int rows = pixels / (threads / 8);
  int batch = 64 / ((width + 63) / 64 * 8);
  while (batch > 1 && (batch > rows || rows % batch != 0)) --batch;
  return batch < 1 ? 1 : batch;
}

// Rows of 16-bit elements in shared memory are padded by 16 bytes: for widths that are multiples of 16 eight consecutive
// rows then start in eight different 16-byte bank groups, so ldmatrix and the fragment stores are free of conflicts.
CONVFIRST_HOST_DEVICE constexpr int row_bytes(int elements) { return 2 * elements + 16; }

// Byte offsets in a block's shared memory; the region holds the convolution's input slices first, then P and the ring.
struct FusedLayout {
  int pixel, taps, window, norm, project, zero, region, hidden, slot, end;
};

CONVFIRST_HOST_DEVICE constexpr FusedLayout fused_layout(int width, bool depthwise) {
  const FusedTile t = fused_tile(width, depthwise);
  FusedLayout l{};
  l.pixel = t.pixels() * row_bytes(width);
  l.taps = l.pixel + 4 * t.pixels();
  l.window = l.taps + 4 * t.pixels();
  l.norm = l.window + 4 * t.pixels();
  l.project = l.norm + 8 * width;
  l.zero = l.project + 8 * width;
  l.region = (l.zero + 16 + 127) / 128 * 128;
  l.hidden = t.warps_n > 1 ? t.pixels() * row_bytes(t.hidden_chunk) : 0;
  const int first = t.hidden_chunk * (row_bytes(width) + 4);
  const int second = width * row_bytes(t.hidden_chunk);
  l.slot = ((first > second ? first : second) + 127) / 128 * 128;
  l.end = l.region + l.hidden + t.slots * l.slot;
  return l;
}

// The split path's convolution and LayerNorm.
struct ConvTile {
  int pixels, threads, slice, max_channels;
};

CONVFIRST_HOST_DEVICE constexpr ConvTile conv_tile(bool depthwise) {
  return depthwise ? ConvTile{16, 64, 128, 1536} : ConvTile{32, 256, 128, 1024};
}

struct ConvLayout {
  int pixel, taps, window, norm, zero, region;
};

CONVFIRST_HOST_DEVICE inline ConvLayout conv_layout(int channels, bool depthwise) {
  const int pixels = conv_tile(depthwise).pixels;
  ConvLayout l{};
  l.pixel = pixels * row_bytes(channels);
  l.taps = l.pixel + 4 * pixels;
  l.window = l.taps + 4 * pixels;
  l.norm = l.window + 4 * pixels;
  l.zero = (l.norm + 8 * channels + 15) / 16 * 16;
  l.region = (l.zero + 16 + 127) / 128 * 128;
  return l;
}

// Which pixels a block's rows are. Flat: `pixels` consecutive pixels of the batch. Rectangle: tile_height rows by tile_width
// columns, where rows run on through the images of the batch (row = image * height + y). Both are dense for every height.
struct Geometry {
  int tile_height;     // 1: flat
  int tile_width;
  int strips;          // tiles across the width
  int tiles;
  int pitch;           // halo pixels from one row to the next
  int halo_pixels;
  uint32_t inverse_pitch;  // ceil(2^16 / pitch): exact division for halo indices
};

constexpr int kMaxHaloPixels = 1300;  // beyond it the 16-bit division above would not be exact

inline Geometry flat_geometry(const Problem& p, int pixels) {
  const int pad = p.kernel_size / 2;
  const int64_t halo = pixels + 2 * pad * (p.width + 1);
  const int64_t tiles = (p.batch * p.height * p.width + pixels - 1) / pixels;
  return {1, pixels, 1, static_cast<int>(tiles), static_cast<int>(p.width), static_cast<int>(std::min<int64_t>(halo, 1 << 30)), 0};
}

inline Geometry rectangle_geometry(const Problem& p, int pixels, int tile_width) {
  const int pad = p.kernel_size / 2;
  Geometry g{};
  g.tile_width = tile_width;
  g.tile_height = pixels / tile_width;
  g.strips = static_cast<int>((p.width + tile_width - 1) / tile_width);
  g.tiles = static_cast<int>(g.strips * ((p.batch * p.height + g.tile_height - 1) / g.tile_height));
  g.pitch = tile_width + 2 * pad;
  g.halo_pixels = (g.tile_height + 2 * pad) * g.pitch;
  g.inverse_pitch = (65536 + g.pitch - 1) / g.pitch;
  return g;
}

// Fewest tiles, then smallest halo. The depthwise stage works on 4x4 pixels, so its rectangles are multiples of that.
inline Geometry choose_geometry(const Problem& p, int pixels, bool depthwise) {
  Geometry best{};
  auto consider = [&](const Geometry& g) {
    if (g.halo_pixels > kMaxHaloPixels) return;
    if (best.tiles == 0 || g.tiles < best.tiles || (g.tiles == best.tiles && g.halo_pixels < best.halo_pixels)) best = g;
  };
  for (int tile_width : {4, 8, 16, 32}) {
    const int tile_height = pixels / tile_width;
    if (tile_height < 2 || tile_height * tile_width != pixels || (depthwise && tile_height % 4 != 0)) continue;
    consider(rectangle_geometry(p, pixels, tile_width));
  }
  if (!depthwise) {
    const Geometry flat = flat_geometry(p, pixels);
    if (flat.halo_pixels <= 3 * pixels) consider(flat);
  }
  return best;
}

// The geometry that a Config names.
inline Geometry geometry_of(const Problem& p, const Config& c) {
  return c.tile_height == 1 ? flat_geometry(p, c.tile_pixels) : rectangle_geometry(p, c.tile_pixels, c.tile_width);
}

struct BlockParams {
  Tensors t;
  int rows;    // batch * height
  int height;
  int width;
  int pixels;  // batch * height * width
  int channels;
  int hidden;
  int kernel_size;
  int group_width;
  int activation;
  bool has_norm;
  int buffers;  // slices of x in flight
  Geometry geometry;
};

inline BlockParams block_params(const Problem& p, const Tensors& t, const Geometry& g, int buffers) {
  BlockParams b{};
  b.t = t;
  b.rows = static_cast<int>(p.batch * p.height);
  b.height = static_cast<int>(p.height);
  b.width = static_cast<int>(p.width);
  b.pixels = static_cast<int>(p.batch * p.height * p.width);
  b.channels = p.channels;
  b.hidden = p.hidden;
  b.kernel_size = p.kernel_size;
  b.group_width = p.group_width;
  b.activation = static_cast<int>(p.activation);
  b.has_norm = p.has_norm;
  b.buffers = buffers;
  b.geometry = g;
  return b;
}

}  // namespace convfirst::block_fusion::sm80
