// Host face of diagonal_conv_norm_fwd_sm80, the portable split path's first launch for depthwise 7x7 filters on tensor cores, each filter tap a
// diagonal matrix: A = LayerNorm(conv(x) + bias).
//
//   diagonal_plan(problem, device, &plan)    false: not covered
//   diagonal_cost(problem, device, plan)     estimated microseconds
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "params.h"

#if defined(__CUDACC__)
#define CONVFIRST_HOST_DEVICE __host__ __device__
#elif !defined(CONVFIRST_HOST_DEVICE)
#define CONVFIRST_HOST_DEVICE
#endif

namespace convfirst::block_fusion::sm80 {

constexpr int kDiagonalKernel = 7, kDiagonalPad = 3;
constexpr int kDiagonalRows = 7;       // output rows whose sums a warp holds: as many as the filter has, so that an input row serves them all
constexpr int kDiagonalColumns = 16;   // output columns a warp: the rows of an mma
constexpr int kDiagonalSlice = 32;     // channels of x in shared memory at once, 8 a warp
constexpr int kDiagonalParts = 2;      // warps that share 8 channels, with 7 x 16 outputs each
constexpr int kDiagonalThreads = 32 * kDiagonalSlice / 8 * kDiagonalParts;
constexpr int kDiagonalPixelBytes = 2 * kDiagonalSlice + 16;  // odd in 16-byte units: eight pixels' rows lie in different banks
constexpr int kDiagonalFilterBytes = kDiagonalKernel * kDiagonalKernel * 2 * kDiagonalSlice;
constexpr int kDiagonalOriginBytes = 16;
constexpr int kDiagonalMostBuffers = 3;

// What a block computes: parts below or beside each other.
struct DiagonalPlan {
  int parts_down;  // 1 or 2 of kDiagonalRows rows; the other parts lie across
  int columns;     // of the tile
  int tiles_x, tiles_y;
  int grid;
  int buffers;     // slices in shared memory
  int shared_memory;

  CONVFIRST_HOST_DEVICE constexpr int parts_across() const { return kDiagonalParts / parts_down; }
  CONVFIRST_HOST_DEVICE constexpr int rows() const { return parts_down * kDiagonalRows; }
  CONVFIRST_HOST_DEVICE constexpr int box_rows() const { return rows() + 2 * kDiagonalPad; }
  CONVFIRST_HOST_DEVICE constexpr int box_columns() const { return columns + 2 * kDiagonalPad; }
  // Of the filters within a slice. A tile narrower than an mma is multiplied beyond x's end, for nothing.
  CONVFIRST_HOST_DEVICE constexpr int filter_offset() const {
    const int beyond = kDiagonalColumns > columns ? kDiagonalColumns - columns : 0;
    return (box_rows() * box_columns() + beyond) * kDiagonalPixelBytes;
  }
  CONVFIRST_HOST_DEVICE constexpr int slice_bytes() const { return filter_offset() + kDiagonalFilterBytes; }
};

// What the kernel receives.
struct DiagonalParams {
  const void* x;
  const void* weight;
  const float* bias;
  const float* norm_weight;
  const float* norm_bias;
  void* a;
  float eps;
  int has_norm, height, channels, width;
  DiagonalPlan plan;
};

namespace diagonal {

// Up to these bytes two blocks share a multiprocessor: half of Hopper's. A constant, so that a plan does not depend on how much more shared
// memory than its own a device has; where a multiprocessor has less the blocks come one after another.
constexpr int kTwoBlocks = 115712;

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Blocks that a multiprocessor holds: registers allow two.
inline int resident(const DiagonalPlan& plan) { return plan.shared_memory <= kTwoBlocks ? 2 : 1; }

// The plan of one tile shape; false: its shared memory is not there. As many slices on their way as two blocks have room for.
inline bool laid_out(const Problem& q, const Device& device, int parts_down, int columns, DiagonalPlan* plan) {
  DiagonalPlan p{};
  p.parts_down = parts_down, p.columns = columns;
  p.tiles_x = ceil_div(q.width, columns), p.tiles_y = ceil_div(q.height, p.rows());
  p.grid = static_cast<int>(q.batch * p.tiles_x * p.tiles_y);
  const int bytes = p.slice_bytes(), slices = ceil_div(q.channels, kDiagonalSlice);
  const int room = (std::min(kTwoBlocks, device.max_shared_memory) - kDiagonalOriginBytes) / bytes;
  p.buffers = std::min({room, slices, kDiagonalMostBuffers});
  p.shared_memory = kDiagonalOriginBytes + p.buffers * bytes;
  *plan = p;
  return p.buffers > 0;
}

}  // namespace diagonal

// Clocks of a block: its slices and the norm of its pixels; two on a multiprocessor take 1.4 times one's. Fitted to measured times (NOTES.md).
inline double diagonal_cost(const Problem& q, const Device& device, const DiagonalPlan& plan) {
  const double block = diagonal::ceil_div(q.channels, kDiagonalSlice) * 7100.0 + plan.rows() * plan.columns * q.channels / 19.2;
  const int share = std::min(diagonal::resident(plan), diagonal::ceil_div(plan.grid, device.multiprocessors));
  const double rounds = diagonal::ceil_div(plan.grid, static_cast<int64_t>(device.multiprocessors) * share);
  return 5 + rounds * (share > 1 ? 1.4 : 1) * block / 1700;
}

inline bool diagonal_covers(const Problem& q) {
  return q.group_width == 1 && q.kernel_size == kDiagonalKernel && q.channels % 8 == 0 && q.channels >= 8 && q.batch > 0 && q.height > 0 &&
         q.width > 8 && q.batch * q.height * q.width < (int64_t{1} << 31) / 8;
}

inline bool diagonal_plan(const Problem& q, const Device& device, DiagonalPlan* best) {
  if (!diagonal_covers(q)) return false;
  double least = 1e30;
  for (int parts_down = 1; parts_down <= kDiagonalParts; ++parts_down) {
    const int most = kDiagonalColumns * kDiagonalParts / parts_down;
    const int columns = diagonal::ceil_div(q.width, diagonal::ceil_div(q.width, most));
    DiagonalPlan plan{};
    if (!diagonal::laid_out(q, device, parts_down, columns, &plan)) continue;
    const double cost = diagonal_cost(q, device, plan);
    if (cost < least) least = cost, *best = plan;
  }
  return least < 1e30;
}

}  // namespace convfirst::block_fusion::sm80
