// Gradient of the weight and of the bias of a grouped or depthwise convolution (stride 1, padding kernel_size / 2), NHWC, 16 bit:
//   dW[tap, c_out, c_in of its group] = sum over pixels p of da[p, c_out] x[p + tap, c_in],  db[c] = sum over p of da[p, c].
// The problem, how it is divided, and what runs it. Host code only.
#pragma once

#include <cstdint>

#include "params.h"

namespace convfirst::block_fusion {

struct WeightGradientProblem {
  int batch, height, width, channels;
  int kernel_size;  // 3, 5 or 7
  int group_width;  // 1, 8 or 16
  DType dtype;

  int taps() const { return kernel_size * kernel_size; }
  int64_t weights() const { return int64_t{taps()} * channels * group_width; }
  int64_t results() const { return weights() + channels; }  // dW, then db
};

// A tile is `images` rectangles of rows x columns output pixels, of one channel block. Slice s sums the tiles s, s + slices, ... and leaves
// its sums in the workspace, [slice][results]; a second kernel adds the slices in order.
struct WeightGradientPlan {
  int images, rows, columns;
  int tiles_n, tiles_y, tiles_x;
  int channel_block, channel_blocks;
  int slices;
  int stages;         // tiles in shared memory
  int shared_memory;  // bytes

  constexpr int tiles() const { return tiles_n * tiles_y * tiles_x; }
  int64_t workspace(const WeightGradientProblem& p) const { return int64_t{slices} * p.results() * 4; }  // bytes
};

// Columns of taps that a warp of the grouped kernel has sums for: as many as its registers hold.
constexpr int grouped_tap_columns(int kernel_size) { return kernel_size == 7 ? 2 : 3; }
constexpr int grouped_splits(int kernel_size) { return (kernel_size + grouped_tap_columns(kernel_size) - 1) / grouped_tap_columns(kernel_size); }
constexpr int grouped_blocks(int kernel_size, int group_width) { return kernel_size == 3 && group_width == 8 ? 2 : 1; }  // that share a multiprocessor
constexpr int kWeightGradientThreads = 256;
constexpr int kDepthwiseChannels = 32;  // of a block of the depthwise kernel

// Sums of a warp of the grouped kernel, each four registers a lane: pairs of taps at group width 8, else taps; of two channel octets.
constexpr int grouped_sums(int kernel_size, int group_width) {
  const int taps = kernel_size * grouped_tap_columns(kernel_size);
  return group_width == 8 ? 2 * (taps / 2 + 1) : 2 * (taps + 1);
}

// Tiles of the depthwise kernel: a unit is two rows of unit_columns pixels, one for each half of a warp.
struct DepthwiseShape {
  int unit_columns, across, down, images;
  constexpr int rows() const { return 2 * down; }
  constexpr int columns() const { return across * unit_columns; }
  constexpr int units() const { return across * down * images; }
  constexpr int x_pitch(int k) const { return (columns() + k - 1) * kDepthwiseChannels * 2 + 32; }
  constexpr int da_pitch() const { return columns() * kDepthwiseChannels * 2 + 32; }
  constexpr int stage_bytes(int k) const { return images * ((rows() + k - 1) * x_pitch(k) + rows() * da_pitch()); }
};

// The shapes compiled for a filter size; unit_columns is a multiple of it. Seven warps of the eight compute, fourteen units.
constexpr int kDepthwiseShapes = 3;
constexpr DepthwiseShape depthwise_shape(int kernel_size, int index) {
  const int long_unit = kernel_size == 7 ? 14 : 15, short_unit = kernel_size == 7 ? 7 : kernel_size == 5 ? 10 : 9;
  return index == 0 ? DepthwiseShape{long_unit, 2, 7, 1} : index == 1 ? DepthwiseShape{long_unit, 1, 7, 2} : DepthwiseShape{short_unit, 1, 4, 3};
}

// A plan whose `stages` is 0 says that shared memory is too small.
WeightGradientPlan plan_weight_gradient(const WeightGradientProblem& problem, const Device& device);

// Device pointers, 16-byte aligned; the workspace has plan.workspace(problem) bytes. Returns cudaError_t as int.
struct WeightGradientTensors {
  const void* da;  // [batch, height, width, channels]
  const void* x;   // the same
  float* d_weight;  // [taps, channels, group_width]
  float* d_bias;    // [channels]
};
int run_weight_gradient(const WeightGradientProblem& problem, const WeightGradientPlan& plan, const WeightGradientTensors& tensors,
                        void* workspace, cudaStream_t stream);

// Adds [slices][results] in order: the first `weights` results into d_weight, the others into d_bias.
int add_slices(const float* partial, float* d_weight, float* d_bias, int slices, int weights, int results, cudaStream_t stream);

// What a kernel is given.
struct WeightGradientParams {
  const void* da;
  const void* x;
  float* partial;  // [slices][results]
  int batch, height, width, channels;
  WeightGradientPlan plan;
};

// One each dtype and kind, in files of their own.
int grouped_weight_gradient_half(const WeightGradientProblem&, const WeightGradientParams&, cudaStream_t);
int grouped_weight_gradient_bfloat16(const WeightGradientProblem&, const WeightGradientParams&, cudaStream_t);
int depthwise_weight_gradient_half(const WeightGradientProblem&, const WeightGradientParams&, cudaStream_t);
int depthwise_weight_gradient_bfloat16(const WeightGradientProblem&, const WeightGradientParams&, cudaStream_t);

}  // namespace convfirst::block_fusion
