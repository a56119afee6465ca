// The backward of the feed-forward half on Hopper: one compile-time description a kernel, shared memory, shares of the work, the workspace.
// Host and device both include it; sizes are written here and nowhere else.
#pragma once

#include "tile_sm90.h"

namespace convfirst::block_fusion::sm90 {

struct FeedForwardBackwardProblem {
  int64_t pixels, image_pixels;
  int channels, hidden;
  DType dtype;
  Activation activation;
  bool has_norm, has_layer_scale, has_sample_scale;
};

// Device pointers; 16-bit matrices are dense and row-major. nullptr: absent.
struct FeedForwardBackwardTensors {
  const void *a, *dy;             // [pixels, channels]
  const float* rstd;              // [pixels]
  const void* expand_weight;      // [hidden, channels]
  const float* expand_bias;       // [hidden]
  const void* project_weight;     // [channels, hidden]
  const float* project_bias;      // [channels]
  const float* layer_scale;       // [channels]
  const float* sample_scale;      // [images]
  void* da;                       // [pixels, channels]
  float *d_expand_weight, *d_expand_bias, *d_project_weight, *d_project_bias, *d_layer_scale;
};

constexpr int kBackwardSharedMemory = 232448;
constexpr int kBackwardBarrierBytes = 1024;
constexpr int kBackwardWidths[] = {32, 64, 96, 128, 192, 256};

// The compiled width that a problem's channels are padded to; 0: none.
constexpr int backward_width(int channels) {
  for (int width : kBackwardWidths) {
    if (channels <= width) return width;
  }
  return 0;
}

template <DType kDType_, int kChannels_, Activation kActivation_>
struct BackwardTraits {
  static constexpr DType kDType = kDType_;
  static constexpr int kChannels = kChannels_;
  static constexpr Activation kActivation = kActivation_;
  static constexpr int kPanel = kChannels % 64 == 0 ? 64 : 32;
  static constexpr int kRowBytes = kPanel * 2;
  static constexpr int kPanels = kChannels / kPanel;
  static constexpr int kPanelBytes = 64 * kRowBytes;         // 64 pixels or hidden units
  static constexpr int kTileBytes = 64 * kChannels * 2;      // of A, of dy, of a chunk of W1 or W2
};

// Gradient of A. kParts, here and below: of a chunk's activation; the first part's products run under the next one's (NOTES.md: what was
// measured best).
template <DType kDType_, int kChannels_, Activation kActivation_>
struct BackwardDataTraits : BackwardTraits<kDType_, kChannels_, kActivation_> {
  using Base = BackwardTraits<kDType_, kChannels_, kActivation_>;
  static constexpr int kWarpgroups = kChannels_ <= 96 ? 3 : 2;
  static constexpr int kParts = kChannels_ == 192 ? 1 : 2;
  static constexpr int kTileSlots = kChannels_ <= 128 ? 2 : 1;  // a warpgroup's, each of A and dy
  static constexpr int kSlotBytes = 2 * Base::kTileBytes;
  static constexpr int kTilesBytes = kWarpgroups * kTileSlots * kSlotBytes;
  static constexpr int kChunkSlots = std::min(kMaxSlots, (kBackwardSharedMemory - kBackwardBarrierBytes - kTilesBytes) / Base::kTileBytes);
  static constexpr int kTilesOffset = kChunkSlots * Base::kTileBytes;
  static constexpr int kBarrierOffset = kTilesOffset + kTilesBytes;
  static constexpr int kSharedMemory = kBarrierOffset + kBackwardBarrierBytes;
  static constexpr int kThreads = (kWarpgroups + 1) * 128;
  static constexpr int kConsumerRegisters = kWarpgroups == 3 ? 160 : 240;
  static constexpr int kProducerRegisters = kWarpgroups == 3 ? 32 : 24;
  static_assert(kChunkSlots >= 3);
};

// Gradients of W1 and W2. Up to 128 channels a warpgroup sums both for its own 64 hidden units; beyond, where the sums of both do not fit
// its registers, two warpgroups share 64 hidden units: one has W1's, the other W2's.
template <DType kDType_, int kChannels_, Activation kActivation_>
struct BackwardWeightsTraits : BackwardTraits<kDType_, kChannels_, kActivation_> {
  using Base = BackwardTraits<kDType_, kChannels_, kActivation_>;
  static constexpr bool kSplit = kChannels_ > 128;
  // The next tile's first products go before this tile's sums are done, where their registers allow.
  static constexpr bool ahead(bool expand, bool project) {
    return (expand + project) * (kChannels_ / 2 + 16) + (1 + expand) * 32 <= 200;
  }
  static constexpr int kParts = kSplit || (kChannels_ == 128 && kActivation_ == Activation::kGelu) ? 2 : 1;  // of GELU one would spill
  static constexpr bool kOperandRegisters = kChannels_ == 64;  // both chunks stay in registers, else wgmma reads them for every tile
  static constexpr int kWarpgroups = 2;
  static constexpr int kHiddenGroups = kSplit ? 1 : kWarpgroups;  // of 64 units, a block
  static constexpr int kWeightBytes = kHiddenGroups * 2 * Base::kTileBytes;
  static constexpr int kScaleBytes = 64 * 4;  // sample scale of a tile's pixels
  static constexpr int kStageBytes = 2 * Base::kTileBytes;
  static constexpr int kStages =
      std::min(6, (kBackwardSharedMemory - kBackwardBarrierBytes - kWeightBytes) / (kStageBytes + kScaleBytes));
  static constexpr int kStagesOffset = kWeightBytes;
  static constexpr int kScaleOffset = kStagesOffset + kStages * kStageBytes;
  static constexpr int kBarrierOffset = kScaleOffset + kStages * kScaleBytes;
  static constexpr int kSharedMemory = kBarrierOffset + kBackwardBarrierBytes;
  static constexpr int kThreads = (kWarpgroups + 1) * 128;
  static constexpr int kConsumerRegisters = kSplit ? 232 : 240, kProducerRegisters = kSplit ? 40 : 24;
  static_assert(kStages >= 2);
};

constexpr int backward_hidden_of_block(int width) { return width > 128 ? 64 : 128; }

// How the sums over pixels are shared out, and where partial sums and prepared operands lie in the workspace (offsets in bytes).
struct FeedForwardBackwardPlan {
  int width, tiles, groups, splits;
  int64_t scaled_weight, bias, pixel_scale, scalars, d_expand_weight, d_project_weight, d_expand_bias, d_project_bias, d_layer_scale, workspace;
};

inline FeedForwardBackwardPlan plan_feed_forward_backward(const FeedForwardBackwardProblem& q, int multiprocessors) {
  FeedForwardBackwardPlan plan{};
  plan.width = backward_width(q.channels);
  if (plan.width == 0) return plan;
  plan.tiles = static_cast<int>(ceil_div(q.pixels, kTilePixels));
  plan.groups = static_cast<int>(ceil_div(q.hidden, backward_hidden_of_block(plan.width)));
  plan.splits = std::max(1, std::min(plan.tiles, multiprocessors / plan.groups));
  int64_t end = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t start = end;
    end += ceil_div(bytes, 256) * 256;
    return start;
  };
  const int64_t matrix = int64_t{4} * plan.splits * q.hidden * q.channels;
  plan.scaled_weight = take(q.has_layer_scale ? int64_t{2} * q.hidden * q.channels : 0);
  plan.bias = take(int64_t{4} * q.hidden);
  plan.pixel_scale = take(q.has_sample_scale ? int64_t{4} * plan.tiles * kTilePixels : 0);
  plan.scalars = take(4);
  plan.d_expand_weight = take(matrix);
  plan.d_project_weight = take(matrix);
  plan.d_expand_bias = take(int64_t{4} * plan.splits * q.hidden);
  plan.d_project_bias = take(int64_t{4} * plan.splits * plan.groups * q.channels);
  plan.d_layer_scale = take(q.has_layer_scale ? int64_t{4} * (q.hidden / 8) * q.channels : 0);
  plan.workspace = end;
  return plan;
}

// The compiled kernels; defined in launch_feed_forward_bwd_sm90.cuh, instantiated in instantiations_sm90/. Return cudaError_t as int.
template <DType kDType, int kChannels, Activation kActivation>
struct FeedForwardBackwardKernels {
  static int launch_data(const FeedForwardBackwardProblem&, const FeedForwardBackwardTensors&, const FeedForwardBackwardPlan&, char* workspace,
                         int multiprocessors, cudaStream_t);
  static int launch_weights(const FeedForwardBackwardProblem&, const FeedForwardBackwardTensors&, const FeedForwardBackwardPlan&, char* workspace,
                            cudaStream_t);
};

// What comes before and after them: operands in the form that both want, partial sums to gradients.
int launch_backward_prepare(const FeedForwardBackwardProblem&, const FeedForwardBackwardTensors&, const FeedForwardBackwardPlan&, char* workspace,
                            cudaStream_t);
int launch_backward_reduce(const FeedForwardBackwardProblem&, const FeedForwardBackwardTensors&, const FeedForwardBackwardPlan&, char* workspace,
                           cudaStream_t);

}  // namespace convfirst::block_fusion::sm90
