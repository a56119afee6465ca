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

// A lane's copies of rows of `count` pixels of a channel block: the same columns of every row, so what they need is found once a tile.
struct LaneColumns {
  int64_t from;     // bytes to the lane's first piece in a row
  int to;           // bytes to it in shared memory
  int steps;        // its pieces
  uint32_t valid;   // bit i: piece i exists

  // `first` is the first column, `chunk_shift` the logarithm of a pixel's 16-byte pieces.
  __device__ __forceinline__ LaneColumns(const WeightGradientParams& p, int first_channel, int first, int count, int chunk_shift, int pixel_pitch,
                                         int lane) {
    const int chunk = lane & ((1 << chunk_shift) - 1), column = lane >> chunk_shift, columns = 32 >> chunk_shift;
    const int channel = first_channel + chunk * 8;
    from = (int64_t{first + column} * p.channels + channel) * 2, to = column * pixel_pitch + chunk * 16;
    steps = (count - column + columns - 1) >> (5 - chunk_shift);
    valid = 0;
    for (int i = 0; i < steps; ++i) {
      const int at = first + column + i * columns;
      valid |= static_cast<uint32_t>(channel < p.channels && at >= 0 && at < p.width) << i;
    }
  }

  // `source` is the row's first byte; from a piece to the next: bytes in device and in shared memory.
  __device__ __forceinline__ void copy(uint32_t shared, const unsigned char* source, bool inside, int source_step, int shared_step) const {
    uint32_t exists = inside ? valid : 0u;
    source += from, shared += to;
    for (int i = 0; i < steps; ++i, exists >>= 1, source += source_step, shared += shared_step) {
      ptx::cp_async16(shared, source, (exists & 1u) != 0);
    }
  }
};

}  // namespace convfirst::block_fusion::sm80
