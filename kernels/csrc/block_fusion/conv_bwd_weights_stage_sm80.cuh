// What both kernels of the convolution's weight gradient do alike: which tile comes when, and its copies into shared memory.
#pragma once

#include "../common/ptx.cuh"
#include "conv_bwd_weights.h"

namespace convfirst::block_fusion::sm80 {

// A tile's first image, row and column.
struct WeightGradientOrigin {
  int image, y, x;

  __device__ __forceinline__ WeightGradientOrigin(const WeightGradientPlan& plan, int tile) {
    x = tile % plan.tiles_x * plan.columns;
    y = tile / plan.tiles_x % plan.tiles_y * plan.rows;
    image = tile / (plan.tiles_x * plan.tiles_y) * plan.images;
  }
};

// Where a warp copies rows of pixels of a channel block from.
struct PixelRows {
  const WeightGradientParams& p;
  int first_channel;
  int chunk_shift;  // log2 of 16-byte pieces of a pixel
  int lane;

  // `count` pixels of a row from column `first`, a pixel each `pixel_pitch` bytes; zeros for what is outside.
  __device__ __forceinline__ void copy(uint32_t to, const void* from, int image, int y, int first, int count, int pixel_pitch) const {
    const bool inside = image < p.batch && y >= 0 && y < p.height;
    const int64_t row = inside ? (int64_t{image} * p.height + y) * p.width : 0;
    const unsigned char* source = static_cast<const unsigned char*>(from) + (row * p.channels + first_channel) * 2;
    const int chunk = lane & ((1 << chunk_shift) - 1), pixel_bytes = p.channels * 2;
    const bool exists = inside && first_channel + chunk * 8 < p.channels;
    to += chunk * 16;
    for (int column = lane >> chunk_shift; column < count; column += 32 >> chunk_shift) {
      const int at = first + column;
      const bool valid = exists && at >= 0 && at < p.width;
      ptx::cp_async16(to + column * pixel_pitch, valid ? source + int64_t{at} * pixel_bytes + chunk * 16 : from, valid);
    }
  }
};

}  // namespace convfirst::block_fusion::sm80
