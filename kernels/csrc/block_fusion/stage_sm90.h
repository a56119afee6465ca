// A stage of conv-first blocks in one launch on sm_90a: compile-time description, shared memory and arguments. Host and device both include it.
#pragma once

#include "latency_sm90.h"

namespace convfirst::block_fusion::sm90 {

// The blocks' weights one behind another, in the layouts of params.h; vectors float32, those marked may be nullptr.
struct StageTensors {
  const void* x;               // [pixels, channels]
  void* y;
  const void* conv_weight;     // [blocks, 9, channels, 8]
  const float* conv_bias;      // [blocks, channels] or nullptr
  const void* expand_weight;   // [blocks, hidden, channels]
  const float* expand_bias;    // [blocks, hidden] or nullptr
  const float* expand_sums;    // [blocks, hidden]: sums of expand_weight's rows
  const void* project_weight;  // [blocks, channels, hidden]
  const float* project_bias;   // [blocks, channels] or nullptr
  void* workspace;             // StageWorkspace::bytes, zero before the first launch that uses it
  float eps;
  int has_norm;
  int height, width;
  int pixels;  // of all images
  int blocks;
};

struct StageProblem {
  int64_t batch, height, width;
  int channels, blocks;
  DType dtype;
  Activation activation;
};

// What launches leave in the workspace: the epoch, from which flags count on so that no flag of an earlier launch is taken for one of this,
// and the blocks that ended; then the words that tiles exchange, [2][pixels][channels / 2]; then, where a tile has several clusters, those of A
// and P, [tiles][channels / 8][32 pixels][4] and [tiles][hidden / 8][32 pixels][4].
struct StageWorkspace {
  static constexpr int kHeader = 256;
  CONVFIRST_HOST_DEVICE static int64_t words(int64_t pixels, int channels) { return 2 * pixels * channels * 4; }
};

// The description of stages whose weights take more than a cluster: a tile of 32 pixels has four clusters of 16 blocks. Block (cluster c, rank r)
// owns channels [128 c + 8 r, + 8): it convolves them and finishes them. It computes hidden units [128 r + 32 c, + 32), which the blocks of rank r
// exchange; with the 128 units of its rank it multiplies the rows of its cluster's 128 channels; the cluster adds up.
template <DType kDType_, int kChannels_, Activation kActivation_>
struct WideTraits {
  static constexpr DType kDType = kDType_;
  static constexpr int kChannels = kChannels_;
  static constexpr Activation kActivation = kActivation_;
  static constexpr int kHidden = 4 * kChannels;
  static constexpr int kPixels = 32, kPixelTiles = kPixels / 8;
  static constexpr int kTaps = 9;
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr int kCluster = 16, kClusters = 4, kTeam = kCluster * kClusters;
  static constexpr int kOwned = kChannels / kTeam;             // channels that a block convolves and finishes
  static constexpr int kUnits = kHidden / kTeam;               // hidden units that it computes
  static constexpr int kSlice = kUnits * kClusters;            // and that it multiplies in the second product,
  static constexpr int kRows = kChannels / kClusters;          // into so many channels
  static constexpr int kExpandSplit = kWarps / (kUnits / 16);  // parts of the first product's depth
  static constexpr int kExpandSteps = kChannels / 32 / kExpandSplit, kProjectSteps = kSlice / 32;
  static constexpr int kConvBlocks = kOwned / 8, kConvTiles = 1;
  static constexpr int kXPieces = 1, kXPitch = 16;
  static constexpr int kGathered = kChannels / 8 * kPixels / kThreads, kGatheredP = kSlice / 8 * kPixels / kThreads;  // pieces a thread
  static constexpr int kReduceBytes = kCluster * kOwned * kPixels * 4;
  static_assert(kChannels == 512 && kOwned == 8 && kUnits == 32 && kExpandSplit == 4 && kExpandSteps == 4 && kProjectSteps == 4);
  static_assert(kRows == 16 * kWarps && 3 * (kPixels + 2) * kConvBlocks <= kThreads);
};

template <DType kDType, int kChannels, Activation kActivation>
struct LatencyLayout<WideTraits<kDType, kChannels, kActivation>> {
  using Traits = WideTraits<kDType, kChannels, kActivation>;
  static constexpr int kW2 = 0;
  static constexpr int kReduce = kW2 + Traits::kRows * Traits::kSlice * 2;
  static constexpr int kA = kReduce + Traits::kReduceBytes;
  static constexpr int kP = kA + Traits::kPixels * Traits::kChannels * 2;
  static constexpr int kSums = kP + Traits::kPixels * Traits::kSlice * 2;
  static constexpr int kSent = kSums + Traits::kThreads * Traits::kPixelTiles * 16;  // own results of the convolution, then own P
  static constexpr int kMoments = kSent + Traits::kPixels * Traits::kUnits * 2;
  static constexpr int kBarriers = kMoments + Traits::kWarps * Traits::kPixels * 8;
  static constexpr int kX = kBarriers + 16;
  static int total(int width) { return kX + (latency_rows<Traits>(width).count + 1) * Traits::kXPitch; }
};

template <class Traits>
struct StageKernel {
  static int launch(const StageTensors& t, cudaStream_t stream);
  static int resident(int width, int* clusters);  // how many clusters run at once; returns cudaError_t
};

// nullptr where it can run, else why not (static text).
const char* stage_refusal(const StageProblem& q, const Device& device);
int64_t stage_workspace(const StageProblem& q);  // bytes
int launch_stage(const StageProblem& q, const StageTensors& t, cudaStream_t stream);

}  // namespace convfirst::block_fusion::sm90
