// Host face of the Hopper kernel for first layers: few channels (RGB), any filter, horizontal stride 1, 2, 4 or 8.
// No CUDA types beyond the stream; sizes are written here and nowhere else.
#pragma once

#include <algorithm>
#include <cstdint>

#include "params.h"

namespace convfirst::direct::sm90 {

constexpr int kFirstWarpgroups = 4;       // consumers; each computes one row of 64 output pixels at a time
constexpr int kFirstThreads = 128 * kFirstWarpgroups + 32;  // and a warp that copies
constexpr int kFirstSharedMemory = 232448;
constexpr int kFirstFixedBytes = 1024;    // barriers and biases

// How x lies in the workspace, [image][64 output columns][padded row][plane][place][8], and in shared memory, some rows of it. A chunk is 8 values: two pixels of 4 channels or one of 8. The chunks of a row that a step of the
// stride moves over are `planes`; chunk g of a row lies in plane g % planes at place g / planes. So the windows of neighbouring
// output pixels begin 16 bytes apart in every plane.
struct FirstLayout {
  int pixel_channels;  // 4 or 8, the rest zeros
  int planes;
  int row_chunks;      // of a window's row, even
  int pitch;           // places of a plane: 64 output pixels and the end of the last one's window
  int rows;            // output rows of a tile
  int input_rows;

  constexpr int row_bytes() const { return planes * pitch * 16; }
  constexpr int buffer_bytes() const { return input_rows * row_bytes(); }
};

constexpr FirstLayout first_layout(const Problem& q, int rows) {
  FirstLayout l{};
  l.pixel_channels = q.stride_w == 1 ? 8 : 4;
  l.planes = q.stride_w * l.pixel_channels / 8;
  l.row_chunks = ((q.kernel_w * l.pixel_channels + 7) / 8 + 1) / 2 * 2;
  l.pitch = 64 + (l.row_chunks - 1) / l.planes;
  l.rows = rows;
  l.input_rows = (rows - 1) * q.stride_h + q.kernel_h;
  return l;
}

struct FirstPlan {
  int columns;  // filters of a block: 64 or 96
  FirstLayout layout;
  int tiles;    // of one group of filters
  int column_tiles;
  int padded_rows;    // of an image in the workspace
  int64_t workspace;  // bytes
  int grid;
  int shared_memory;
  double cost;  // estimated microseconds
};

// Filters in shared memory: [chunk][filter][8 values]; the chunk's stride avoids bank conflicts of the stores.
constexpr int first_chunk_bytes(int columns) { return columns * 16 + 16; }
constexpr int first_weight_bytes(const Problem& q, const FirstLayout& l, int columns) {
  return q.kernel_h * l.row_chunks * first_chunk_bytes(columns);
}

inline FirstPlan plan_first(const Problem& q, const Device& device) {
  constexpr double kClockMhz = 1600;
  FirstPlan best{};
  for (int columns : {64, 96}) {
    for (int rows : {8, 4, 2, 1}) {
      const FirstLayout l = first_layout(q, rows);
      const int bytes = first_weight_bytes(q, l, columns) + 2 * l.buffer_bytes() + kFirstFixedBytes;
      if (bytes > kFirstSharedMemory || bytes > device.max_shared_memory) continue;
      FirstPlan plan{};
      plan.columns = columns;
      plan.layout = l;
      plan.tiles = static_cast<int>(q.batch * ((q.out_h() + rows - 1) / rows) * ((q.out_w() + 63) / 64));
      plan.column_tiles = (q.filters + columns - 1) / columns;
      plan.grid = static_cast<int>(std::min<int64_t>(int64_t{plan.tiles} * plan.column_tiles, device.multiprocessors / plan.column_tiles * plan.column_tiles));
      if (plan.grid == 0) continue;
      plan.shared_memory = bytes;
      // Rows that the last tile of an image reads, past the padding too.
      plan.padded_rows = ((q.out_h() + rows - 1) / rows * rows - 1) * q.stride_h + q.kernel_h;
      plan.workspace = q.batch * ((q.out_w() + 63) / 64) * plan.padded_rows * l.row_bytes();
      const int64_t per_column = plan.grid / plan.column_tiles, rounds = (plan.tiles + per_column - 1) / per_column;
      const double products = rows * q.kernel_h * l.row_chunks / 2 * columns / 2.0 / 0.8;
      plan.cost = 6 + (rounds * products + 3000) / kClockMhz + plan.workspace * 2 / 3e6;
      if (best.grid == 0 || plan.cost < best.cost) best = plan;
      break;
    }
  }
  return best;
}

inline bool first_supports(const Problem& q, const Device& device) {
  const bool stride = q.stride_w == 1 || q.stride_w == 2 || q.stride_w == 4 || q.stride_w == 8;
  return q.direction == Direction::kForward && q.dtype != DType::kFloat && stride && q.dilation_h == 1 && q.dilation_w == 1 &&
         q.channels >= 1 && q.channels <= (q.stride_w == 1 ? 8 : 4) && q.filters >= 8 && q.filters % 8 == 0 &&
         q.out_pixels() > 0 && plan_first(q, device).grid > 0;
}

template <DType kDType_, int kColumns_>
struct FirstTraits {
  static constexpr DType kDType = kDType_;
  static constexpr int kColumns = kColumns_;
};

// The compiled kernel; defined in launch_first_layer_sm90.cuh. Returns cudaError_t as int.
template <class Traits>
struct FirstKernel {
  static int launch(const Problem&, const Tensors&, const FirstPlan&, void* workspace, cudaStream_t);
  static const void* kernel();
};

}  // namespace convfirst::direct::sm90
