// Host face of the Hopper implicit matrix product whose depth is split over a cluster, for few pixels: what a tile takes, how it is
// configured, what it should cost. Problem and data as of implicit_gemm_sm90.h. No CUDA types beyond the stream.
#pragma once

#include "implicit_gemm_sm90.h"

namespace convfirst::direct::sm90 {

constexpr int kMaxSplit = 4;            // 16 clusters of 8 do not fit at once, and 8 of them exchange longer than they save
constexpr int kSplitWarpgroups = 2;     // consumers, 64 pixels each
constexpr int kPieceBytes = 128 * 8 * 4;  // of sums: one row's 8 neighbouring columns a thread of a warpgroup

// A tile of 128 pixels and `columns` filters. The sums of `pieces` (warpgroup, 32 columns, row of two) are shared out to the blocks of a cluster.
struct SplitTile {
  int columns;

  constexpr int rows() const { return 64 * kSplitWarpgroups; }
  constexpr int blocks() const { return columns / 32; }
  constexpr int pieces() const { return kSplitWarpgroups * blocks() * 2; }
  constexpr int slot_bytes() const { return (rows() + columns) * kDepth * 2; }
  constexpr int receive_bytes() const { return pieces() * kPieceBytes; }  // a block's share of the pieces, of every block of its cluster
  constexpr int bias_bytes() const { return columns * 4; }
  constexpr int slots() const { return std::min(kMaxSlots, (kSharedMemory - kBarrierBytes - bias_bytes() - receive_bytes()) / slot_bytes()); }
  constexpr int threads() const { return 128 * (1 + kSplitWarpgroups); }
  constexpr int shared_bytes() const { return slots() * slot_bytes() + receive_bytes() + bias_bytes() + kBarrierBytes; }
};

constexpr SplitTile kSplitTiles[] = {{128}, {64}};
constexpr int kSplitTileCount = sizeof(kSplitTiles) / sizeof(kSplitTiles[0]);

struct SplitPlan {
  int tile;   // index into kSplitTiles
  int split;  // blocks of a cluster: 2 or 4
  int panel, steps;
  int grid, shared_memory, threads;
  double cost;  // estimated microseconds
};

// Compile-time description of one kernel; the names are those of GemmTraits, whose producer and consumer it configures.
template <DType kDType_, int kTile_>
struct SplitTraits {
  static constexpr bool kTransposed = false;
  static constexpr DType kDType = kDType_;
  static constexpr SplitTile kTile = kSplitTiles[kTile_];
  static constexpr int kWarpgroups = kSplitWarpgroups, kBands = 1, kColumns = kTile.columns, kSets = 1;
  static constexpr int kRows = kTile.rows(), kBlocks = kTile.blocks(), kPieces = kTile.pieces();
  static constexpr int kABytes = kRows * kDepth * 2;
  static constexpr int kWPanels = 1, kWPanelBytes = 0;  // of transposed filters
  static constexpr int kSlots = kTile.slots(), kSlotBytes = kTile.slot_bytes();
  static constexpr int kReceiveOffset = kSlots * kSlotBytes, kBiasOffset = kReceiveOffset + kTile.receive_bytes();
  static constexpr int kBarrierOffset = kBiasOffset + kTile.bias_bytes();
  static constexpr int kThreads = kTile.threads();
  static_assert(kSlots >= 4 && 2 * kSlots * 8 <= kBarrierBytes && kPieces >= kMaxSplit);
};

// The compiled kernel; defined in launch_split_gemm_sm90.cuh, instantiated in instantiations_sm90/. Returns cudaError_t as int.
template <class Traits>
struct SplitKernel {
  static int launch(const GemmProblem&, const GemmTensors&, const SplitPlan&, cudaStream_t);
  static const void* kernel();
};

// Each block of a cluster has a step at least.
inline bool split_supports(const GemmProblem& q, int split) { return !q.transposed && gemm_steps(q) >= split; }

// Of four blocks, 28 clusters were seen at work together on 132 multiprocessors, and 32 were not: a cluster lies within a processing cluster.
inline int clusters_at_once(const Device& device, int split) {
  return std::max(1, split <= 2 ? device.multiprocessors / split : device.multiprocessors * 7 / 8 / split);
}

// Microseconds of `tiles` tiles of `steps` slices by clusters of `split` blocks: `fixed` of a launch, `slice` where a few blocks are at work;
// where many are, `bytes` of each slice have to come out of L2. Fitted to VGG-E's layers at N = 1 to 64 on an H100 (NOTES.md).
inline double split_microseconds(const Device& device, int64_t tiles, int split, int steps, double fixed, double slice, double bytes) {
  constexpr double kBytesAMicrosecond = 8.3e6, kBusy = 0.12;
  const int64_t at_once = clusters_at_once(device, split), rounds = (tiles + at_once - 1) / at_once;
  const double blocks = static_cast<double>(std::min(tiles, at_once) * split), busy = 1 + kBusy * blocks / device.multiprocessors;
  const int slices = (steps + split - 1) / split;
  return fixed + rounds * slices * busy * std::max(slice, bytes * blocks / kBytesAMicrosecond) + (rounds - 1) * (fixed - 0.8);
}

inline SplitPlan plan_split(const GemmProblem& q, const Device& device, int tile, int split) {
  const SplitTile& t = kSplitTiles[tile];
  const int64_t tiles = (q.pixels() + t.rows() - 1) / t.rows() * ((q.filters + t.columns - 1) / t.columns);
  SplitPlan plan{};
  plan.tile = tile, plan.split = split;
  plan.panel = choose_panel(q.channels), plan.steps = gemm_steps(q);
  plan.grid = static_cast<int>(std::min<int64_t>(tiles * split, int64_t{1} << 30));
  plan.shared_memory = t.shared_bytes(), plan.threads = t.threads();
  // Narrow panels take as many copies more, and then those bind.
  const double slice = std::max(t.columns == 128 ? 0.28 : 0.26, plan.panel == 64 ? 0 : 0.6 * 32 / plan.panel);
  plan.cost = split_microseconds(device, tiles, split, plan.steps, split == 2 ? 4.8 : 6.0, slice, t.slot_bytes());
  return plan;
}

}  // namespace convfirst::direct::sm90
