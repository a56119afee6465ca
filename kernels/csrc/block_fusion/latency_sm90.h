// The latency path of the conv-first block on sm_90a: compile-time description and shared memory of one variant. Host and device both
// include it.
#pragma once

#include "tile_sm90.h"

namespace convfirst::block_fusion::sm90 {

// A cluster owns a tile of pixels; each of its blocks a slice of the hidden units and, of the channels, those it convolves and finishes.
// A slice's weights take 64 KB whatever the width, so that two launches' blocks fit one multiprocessor: the next launch loads its
// weights while this one runs.
template <DType kDType_, int kChannels_, Activation kActivation_>
struct LatencyTraits {
  static constexpr DType kDType = kDType_;
  static constexpr int kChannels = kChannels_;
  static constexpr Activation kActivation = kActivation_;
  static constexpr int kHidden = 4 * kChannels;
  static constexpr int kPixels = 32;  // of a tile, in a row through all images
  static constexpr int kTaps = 9;
  static constexpr int kSlice = 16384 / kChannels;        // hidden units of a block
  static constexpr int kCluster = kHidden / kSlice;       // blocks
  static constexpr int kTeam = kCluster;                  // blocks of a tile
  static constexpr int kOwned = kChannels / kCluster;     // channels of a block
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kPixelTiles = kPixels / 8;         // columns of the products, 8 pixels each
  static constexpr int kConvBlocks = kOwned / 8;          // 8 output channels each
  // Tiles of 16 rows a warp has in each product, and in how many parts the depth is split where there are fewer tiles than warps.
  static constexpr int kExpandTiles = kSlice / 16, kProjectTiles = kChannels / 16;
  static constexpr int kExpandRows = kExpandTiles > kWarps ? kExpandTiles / kWarps : 1;
  static constexpr int kProjectRows = kProjectTiles > kWarps ? kProjectTiles / kWarps : 1;
  static constexpr int kExpandSplit = kWarps * kExpandRows / kExpandTiles;
  static constexpr int kProjectSplit = kWarps * kProjectRows / kProjectTiles;
  static constexpr int kExpandSteps = kChannels / 32 / kExpandSplit;  // of depth 32
  static constexpr int kProjectSteps = kSlice / 32 / kProjectSplit;
  static constexpr int kSources = kCluster * kProjectSplit;           // partial sums of each output
  static constexpr int kOwnedTiles = kOwned / 16;
  static constexpr int kOutputs = kOwnedTiles * kPixelTiles * 64 / kThreads;  // pairs of pixels that a thread finishes
  static constexpr int kConvTiles = kPixels / 16 * kConvBlocks > kWarps ? kPixels / 16 * kConvBlocks / kWarps : 1;  // of 16 pixels, a warp
  static constexpr int kXPieces = (3 * (kPixels + 2) * kConvBlocks + kThreads - 1) / kThreads;  // of 16 bytes, at most, that a thread loads
  static constexpr int kXPitch = kOwned * 2 + 16;                     // bytes of a pixel of x in shared memory: no bank conflicts
  static constexpr int kExchangeBytes = kPixels * (kChannels * 2 + kCluster * 8);  // that a block receives before the products
  static constexpr int kReduceBytes = kSources * kOwned * kPixels * 4;             // and after them
  static_assert(kExpandRows * kExpandSteps == 4 && kProjectRows * kProjectSteps == 4, "a thread has eight 16-byte pieces of each weight");
  static_assert(kExpandSplit <= 2 && kOwned % 16 == 0 && kCluster <= 16);
};

// Rows of pixels in shared memory: three segments (above, beside, below), one behind another; narrow images' overlap.
struct LatencyRows {
  int step;   // from a pixel's row to that of its neighbour below
  int count;  // the row of zeros follows
};

template <class Traits>
CONVFIRST_HOST_DEVICE inline LatencyRows latency_rows(int width) {
  const int step = width < Traits::kPixels + 2 ? width : Traits::kPixels + 2;
  return {step, 2 * step + Traits::kPixels + 2};
}

// Byte offsets into dynamic shared memory.
template <class Traits>
struct LatencyLayout {
  static constexpr int kW2 = 0;
  static constexpr int kReduce = kW2 + Traits::kChannels * Traits::kSlice * 2;
  static constexpr int kDownSums = kReduce;  // of a downsampling before the first block (stage_sm90.h)
  static constexpr int kA = kReduce + Traits::kReduceBytes;
  static constexpr int kP = kA + Traits::kPixels * Traits::kChannels * 2;
  static constexpr int kSums = kP + Traits::kPixels * Traits::kSlice * 2;  // of the first product, where its depth is split
  static constexpr int kSent = kSums + (Traits::kExpandSplit > 1 ? Traits::kThreads * Traits::kPixelTiles * 8 : 0);
  static constexpr int kSentMoments = kSent + Traits::kPixels * Traits::kOwned * 2;
  static constexpr int kMoments = kSentMoments + Traits::kConvBlocks * Traits::kPixels * 8;
  static constexpr int kNorm = kMoments + Traits::kCluster * Traits::kPixels * 8;
  static constexpr int kBarriers = kNorm + 2 * Traits::kChannels * 4;
  static constexpr int kX = kBarriers + 16;
  static int total(int width) { return kX + (latency_rows<Traits>(width).count + 1) * Traits::kXPitch; }
};

// The compiled kernel of one variant; defined in launch_latency_sm90.cuh, instantiated in instantiations_sm90/.
template <class Traits>
struct LatencyKernel {
  static int launch(const Problem& q, const Tensors& t, cudaStream_t stream);
  static const void* pointer();
};

}  // namespace convfirst::block_fusion::sm90
