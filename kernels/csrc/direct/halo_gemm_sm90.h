// Host face of the Hopper kernel for 3x3 filters of stride 1 whose tiles are loaded with their halo: what it takes, how it is configured, what
// it should cost. Problem and data as of implicit_gemm_sm90.h. No CUDA types beyond the stream.
#pragma once

#include "split_gemm_sm90.h"

namespace convfirst::direct::sm90 {

constexpr int kHaloSlots = 2;             // tiles of x in flight
constexpr int kHaloTileBytes = 33 * 1024;  // the largest, of 4 x 64 pixels and what the last taps read beyond

struct HaloPlan {
  int columns;      // filters of a tile: 128 or 64
  int pitch_shift;  // log2 of a tile's pixels of a row, two of them halo: 128 >> pitch_shift rows
  int split;        // blocks of a cluster: 1, 2 or 4
  int slices;       // of 64 channels
  int tiles_p, tiles_q, tiles_n;
  int grid, shared_memory, threads;
  double cost;  // estimated microseconds
};

// Compile-time description of one kernel; names as of GemmTraits and SplitTraits.
template <DType kDType_, int kColumns_>
struct HaloTraits {
  static constexpr bool kTransposed = false;
  static constexpr DType kDType = kDType_;
  static constexpr SplitTile kTile{kColumns_};
  static constexpr int kWarpgroups = kSplitWarpgroups, kBands = 1, kColumns = kColumns_, kSets = 1;
  static constexpr int kRows = kTile.rows(), kBlocks = kTile.blocks(), kPieces = kTile.pieces();
  static constexpr int kABytes = 0, kWPanels = 1, kWPanelBytes = 0;
  static constexpr int kSlotBytes = kColumns * kDepth * 2;  // of filters
  static constexpr int kFixedBytes = kHaloSlots * kHaloTileBytes + kTile.receive_bytes() + kTile.bias_bytes() + kBarrierBytes;
  static constexpr int kSlots = std::min(kMaxSlots, (kSharedMemory - kFixedBytes) / kSlotBytes);
  static constexpr int kFilterOffset = kHaloSlots * kHaloTileBytes, kReceiveOffset = kFilterOffset + kSlots * kSlotBytes;
  static constexpr int kBiasOffset = kReceiveOffset + kTile.receive_bytes(), kBarrierOffset = kBiasOffset + kTile.bias_bytes();
  static constexpr int kSharedBytes = kBarrierOffset + kBarrierBytes, kThreads = kTile.threads();
  static_assert(kSlots >= 4 && 2 * (kSlots + kHaloSlots) * 8 <= kBarrierBytes);
};

// The compiled kernel; defined in launch_halo_gemm_sm90.cuh, instantiated in instantiations_sm90/. Returns cudaError_t as int.
template <class Traits>
struct HaloKernel {
  static int launch(const GemmProblem&, const GemmTensors&, const HaloPlan&, cudaStream_t);
  static const void* kernel();
};

inline bool halo_supports(const GemmProblem& q, int split) {
  return !q.transposed && q.kernel_h == 3 && q.kernel_w == 3 && q.stride_h == 1 && q.stride_w == 1 && q.dilation_h == 1 && q.dilation_w == 1 &&
         q.channels % 64 == 0 && q.filters % 32 == 0 && q.channels / 64 >= split;
}

// The row length that wastes least.
inline int choose_pitch_shift(const GemmProblem& q) {
  int best = 4;
  int64_t least = 0;
  for (int shift = 4; shift <= 6; ++shift) {
    const int width = (1 << shift) - 2, height = 128 >> shift;
    const int64_t tiles = int64_t{(q.out_h + height - 1) / height} * ((q.out_w + width - 1) / width);
    if (least == 0 || tiles < least) best = shift, least = tiles;
  }
  return best;
}

inline HaloPlan plan_halo(const GemmProblem& q, const Device& device, int columns, int split) {
  HaloPlan plan{};
  plan.columns = columns;
  plan.pitch_shift = choose_pitch_shift(q), plan.split = split, plan.slices = q.channels / 64;
  const int width = (1 << plan.pitch_shift) - 2, height = 128 >> plan.pitch_shift;
  plan.tiles_p = (q.out_h + height - 1) / height, plan.tiles_q = (q.out_w + width - 1) / width;
  plan.tiles_n = (q.filters + columns - 1) / columns;
  const int64_t tiles = q.batch * plan.tiles_p * plan.tiles_q * plan.tiles_n;
  plan.grid = static_cast<int>(std::min<int64_t>(tiles * split, int64_t{1} << 30));
  plan.shared_memory = columns == 128 ? HaloTraits<DType::kHalf, 128>::kSharedBytes : HaloTraits<DType::kHalf, 64>::kSharedBytes;
  plan.threads = SplitTile{columns}.threads();
  const double pixels = (((128 >> plan.pitch_shift) + 2) << plan.pitch_shift) * 128.0 / 9;  // bytes of x a slice
  const double fixed = columns == 128 ? (split == 1 ? 4.3 : 4.6) : (split == 1 ? 3.0 : split == 2 ? 3.2 : 3.5);
  plan.cost = split_microseconds(device, tiles, split, plan.slices * 9, fixed, columns == 128 ? 0.277 : 0.197, columns * kDepth * 2 + pixels);
  return plan;
}

}  // namespace convfirst::direct::sm90
