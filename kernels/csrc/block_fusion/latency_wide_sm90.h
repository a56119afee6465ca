// The latency path for 512 channels on sm_90a: compile-time description and shared memory. Host and device both include it.
#pragma once

#include "latency_sm90.h"

namespace convfirst::block_fusion::sm90 {

// A tile is 64 pixels and belongs to 16 clusters of 8 blocks. Each cluster convolves it anew and has 128 of the hidden units: 16 a block in
// the first product; in the second each block has 64 channels over all 128, whose partial sums a second launch adds up.
template <DType kDType_, Activation kActivation_>
struct LatencyWideTraits {
  static constexpr DType kDType = kDType_;
  static constexpr Activation kActivation = kActivation_;
  static constexpr int kChannels = 512;
  static constexpr int kHidden = 4 * kChannels;
  static constexpr int kPixels = 64;
  static constexpr int kTaps = 9;
  static constexpr int kCluster = 8;
  static constexpr int kGroups = 16;                       // clusters of a tile
  static constexpr int kSlice = kHidden / kGroups;         // hidden units of a cluster
  static constexpr int kUnits = kSlice / kCluster;         // of a block in the first product
  static constexpr int kOwned = kChannels / kCluster;      // channels of a block
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kConvBlocks = kOwned / 8;
  static constexpr int kPixelTiles = 4;                    // of 8 pixels that a warp multiplies: half of the tile
  static constexpr int kExpandParts = 4;                   // of the first product's depth
  static constexpr int kExpandSteps = kChannels / 32 / kExpandParts;
  static constexpr int kProjectSteps = kSlice / 32;
  static constexpr int kXPitch = kOwned * 2 + 16;
  static constexpr int kConvTiles = kPixels / 16;
  static constexpr int kXPieces = 4;  // of 16 bytes, at most, that a thread loads
  static constexpr int kSentBytes = kPixels * kOwned * 2;
  static constexpr int kExchangeBytes = kCluster * (kSentBytes + kPixels * 8);  // that a block receives before the first product
  static constexpr int kHiddenBytes = kPixels * kSlice * 2;                     // and between the products
  static_assert(kUnits == 16 && kConvBlocks == kWarps && kOwned / 16 * 2 == kWarps && kExpandParts * 2 == kWarps);
};

template <DType kDType, Activation kActivation>
struct LatencyLayout<LatencyWideTraits<kDType, kActivation>> {
  using Traits = LatencyWideTraits<kDType, kActivation>;
  static constexpr int kA = 0;
  static constexpr int kP = kA + Traits::kPixels * Traits::kChannels * 2;
  static constexpr int kSentMoments = kP;  // a peer sends its part of P after it has these
  static constexpr int kSent = kP + Traits::kHiddenBytes;
  static constexpr int kMoments = kSent + Traits::kSentBytes;
  static constexpr int kNorm = kMoments + Traits::kCluster * Traits::kPixels * 8;
  static constexpr int kBarriers = kNorm + 2 * Traits::kChannels * 4;
  static constexpr int kX = kBarriers + 16;
  static constexpr int kSums = kX;  // the first product's, once x is no longer read
  static constexpr int kSumsBytes = Traits::kExpandParts * Traits::kUnits * Traits::kPixels * 4;
  static constexpr int kTotal = kX + kSumsBytes;
  static bool fits(int width) { return (latency_rows<Traits>(width).count + 1) * Traits::kXPitch <= kSumsBytes; }
};

// The compiled kernels of one variant; defined in launch_latency_wide_sm90.cuh, instantiated in instantiations_sm90/.
template <class Traits>
struct LatencyWideKernel {
  static int launch(const Problem& q, const Tensors& t, void* workspace, cudaStream_t stream);
  static const void* pointer();
};

}  // namespace convfirst::block_fusion::sm90
