// A stage of conv-first blocks in one launch on sm_90a: compile-time description, shared memory and arguments. Host and device both include it.
#pragma once

#include "latency_sm90.h"

namespace convfirst::block_fusion::sm90 {

// The blocks' weights one behind another, in the layouts of params.h; vectors float32.
// Where down_weight is given, x is the stage before's, [images, down_height, down_width, channels / 2], and the blocks' input is the result of
// LayerNorm without an affine part over its channels and a 2x2 convolution of stride 2.
struct StageTensors {
  const void* x;               // [pixels, channels]
  void* y;
  const void* conv_weight;     // [blocks, 9, channels, 8]
  const float* conv_bias;      // [blocks, channels]
  const void* expand_weight;   // [blocks, hidden, channels]
  const float* expand_vectors;  // [blocks, hidden, 2]: bias, sum of expand_weight's row
  const void* project_weight;  // [blocks, channels, hidden]
  const float* project_vectors;  // [blocks, channels, 2]: bias, factor of the sum and the bias
  void* workspace;             // before the first launch that uses it its counters are zero, the rest ones
  float eps;
  int has_norm;
  int height, width;
  int pixels;  // of all images
  int blocks;
  int tile;  // pixels of every tile but the last; the launch sets it
  const void* down_weight;    // [channels, 4, channels / 2] or nullptr
  const float* down_vectors;  // [channels, 5]: bias, sums of the weights of each tap
  float down_eps;
  int down_norm;
  int down_height, down_width;
};

struct StageProblem {
  int device;
  int64_t batch, height, width;  // of the blocks
  int channels, blocks;
  DType dtype;
  Activation activation;
};

// What launches leave in the workspace: the epoch, from which flags count on so that no flag of an earlier launch is taken for one of this, the blocks
// that ended, and the parity of launches; two sets of A, of which each launch fills one and empties the other; then the words that tiles exchange,
// [2][pixels][channels / 2]; then, where a tile's blocks exchange words too, those of P and partial sums of each tile.
// A set holds A of every block and tile of a launch, 16 bytes a pixel and chunk of 8 channels, where ones in all 32 bits of a word mean that it is not
// there yet: conversions make no such number.
struct StageWorkspace {
  static constexpr int kCounters = 256, kSet = 1 << 19, kHeader = kCounters + 2 * kSet;
  CONVFIRST_HOST_DEVICE static int64_t words(int64_t pixels, int channels) { return 2 * pixels * channels * 4; }
};

// The latency path's description; partial sums travel in 16 bits.
template <DType kDType_, int kChannels_, Activation kActivation_>
struct StageTraits : LatencyTraits<kDType_, kChannels_, kActivation_> {
  using Base = LatencyTraits<kDType_, kChannels_, kActivation_>;
  static constexpr int kRows = kChannels_;  // that a block multiplies in the second product
  static constexpr int kReduceBytes = Base::kReduceBytes / 2;
};

// W2's slice of this block of the stage and of the next one, each in boxes of kRows x 32 hidden units: 64 bytes a row, so that the eight threads of a
// phase of a 16-byte load, which read two neighbouring rows, meet in no bank.
template <class Traits>
struct StageWeightBoxes {
  static constexpr int kDepth = 32, kBytes = Traits::kRows * kDepth * 2, kCount = Traits::kSlice / kDepth;
};

template <DType kDType, int kChannels, Activation kActivation>
struct LatencyLayout<StageTraits<kDType, kChannels, kActivation>> {
  using Traits = StageTraits<kDType, kChannels, kActivation>;
  static constexpr int kDownBytes = Traits::kThreads * Traits::kPixelTiles * 16;
  static constexpr int kW2 = 0, kW2Bytes = Traits::kChannels * Traits::kSlice * 2;
  static constexpr int kReduce = kW2 + 2 * kW2Bytes;
  static constexpr int kDownSums = kReduce;  // others send there only what follows this block's first results
  static constexpr int kA = kReduce + (Traits::kReduceBytes > kDownBytes ? Traits::kReduceBytes : kDownBytes);
  static constexpr int kP = kA + Traits::kPixels * Traits::kChannels * 2;
  static constexpr int kSums = kP + Traits::kPixels * Traits::kSlice * 2;  // of the first product, where its depth is split
  static constexpr int kSent = kSums + (Traits::kExpandSplit > 1 ? Traits::kThreads * Traits::kPixelTiles * 8 : 0);
  static constexpr int kSentMoments = kSent + Traits::kPixels * Traits::kOwned * 2;
  static constexpr int kMoments = kSentMoments + Traits::kConvBlocks * Traits::kPixels * 8;
  static constexpr int kBarriers = kMoments + Traits::kCluster * Traits::kPixels * 8;  // the latency path's two
  static constexpr int kWeightBarriers = kBarriers + 16;                               // of either slice of W2
  static constexpr int kX = kWeightBarriers + 16;
  static int total(int width) { return kX + (latency_rows<Traits>(width).count + 1) * Traits::kXPitch; }
};

// The description of stages whose weights take more than a cluster: a tile of 32 pixels has 64 blocks, no clusters, in four groups of 16 ranks. Block
// (group g, rank r) owns channels [128 g + 8 r, + 8): it convolves them and finishes them. It computes hidden units [128 r + 32 g, + 32), which
// the blocks of rank r exchange; with the 128 units of its rank it multiplies the rows of its group's 128 channels; the group adds up.
template <DType kDType_, int kChannels_, Activation kActivation_>
struct WideTraits {
  static constexpr DType kDType = kDType_;
  static constexpr int kChannels = kChannels_;
  static constexpr Activation kActivation = kActivation_;
  static constexpr int kHidden = 4 * kChannels;
  static constexpr int kPixels = 32, kPixelTiles = kPixels / 8;
  static constexpr int kTaps = 9;
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr int kCluster = 1, kRanks = 16, kGroups = 4, kTeam = kRanks * kGroups;
  static constexpr int kOwned = kChannels / kTeam;             // channels that a block convolves and finishes
  static constexpr int kUnits = kHidden / kTeam;               // hidden units that it computes
  static constexpr int kSlice = kUnits * kGroups;              // and that it multiplies in the second product,
  static constexpr int kRows = kChannels / kGroups;            // into so many channels
  static constexpr int kExpandRows = 1, kOutputs = 1;
  static constexpr int kExpandSplit = kWarps / (kUnits / 16);  // parts of the first product's depth
  static constexpr int kExpandSteps = kChannels / 32 / kExpandSplit, kProjectSteps = kSlice / 32;
  static constexpr int kConvBlocks = kOwned / 8, kConvTiles = 1;
  static constexpr int kXPieces = 1, kXPitch = 16;
  // 16 bytes that a thread gathers: of A, of P (two words' pairs each), of partial sums (a pair of words each).
  static constexpr int kGatheredA = kChannels / 8 * kPixels / kThreads, kGatheredP = kSlice / 8 * kPixels / kThreads;
  static constexpr int kSumWords = kOwned * kPixels / 2;  // of one source: two pixels in 16 bits each
  static constexpr int kGatheredSums = kRanks * kSumWords / 2 / kThreads;
  static constexpr int64_t kWordsOfA = kPixels * kChannels * 2, kWordsOfP = kPixels * kHidden * 4, kWordsOfSums = kTeam * kRanks * kSumWords * 8;
  static_assert(kChannels == 512 && kOwned == 8 && kUnits == 32 && kExpandSplit == 4 && kExpandSteps == 4 && kProjectSteps == 4);
  static_assert(kRows == 16 * kWarps && 3 * (kPixels + 2) * kConvBlocks <= kThreads);
};

template <DType kDType, int kChannels, Activation kActivation>
struct LatencyLayout<WideTraits<kDType, kChannels, kActivation>> {
  using Traits = WideTraits<kDType, kChannels, kActivation>;
  static constexpr int kW2 = 0, kW2Bytes = Traits::kRows * Traits::kSlice * 2;
  static constexpr int kA = kW2 + 2 * kW2Bytes;
  static constexpr int kP = kA + Traits::kPixels * Traits::kChannels * 2;
  static constexpr int kSums = kP + Traits::kPixels * Traits::kSlice * 2;  // of the first product, then of the second
  static constexpr int kDownSums = kSums;
  static constexpr int kSent = kSums + Traits::kThreads * Traits::kPixelTiles * 16;  // own results of the convolution, then own P
  static constexpr int kMoments = kSent + Traits::kPixels * Traits::kUnits * 2;
  static constexpr int kWeightBarriers = kMoments + Traits::kWarps * Traits::kPixels * 8;
  static constexpr int kX = kWeightBarriers + 16;
  static int total(int width) { return kX + (latency_rows<Traits>(width).count + 1) * Traits::kXPitch; }
};

template <class Traits>
struct StageKernel {
  static int launch(const StageTensors& t, cudaStream_t stream);
  static int resident(int width, int* clusters);  // how many clusters run at once; returns cudaError_t
};

// nullptr where it can run, else why not (static text). The problem's device is the current one.
const char* stage_refusal(const StageProblem& q, const Device& device);
int64_t stage_workspace(const StageProblem& q);  // bytes
int launch_stage(const StageProblem& q, const StageTensors& t, cudaStream_t stream);

}  // namespace convfirst::block_fusion::sm90
