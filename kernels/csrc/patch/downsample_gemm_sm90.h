// Host face of the Hopper downsampling layer as one matrix product: which layers it takes, tiles, plan. No CUDA types; sizes are
// written here and nowhere else.
#pragma once

#include "direct/implicit_gemm_sm90.h"

namespace convfirst::patch::sm90 {

constexpr const char* kDownsampleGemm = "sm90_downsample_gemm";
constexpr bool kDownsampleGemmTested = false;  // on a GPU; where not, only force_path(kDownsampleGemm) asks for it

constexpr int kTaps = 4;
constexpr int kTapVectors = 1 + kTaps;  // bias, sums of the taps' weights

// `warpgroups` x 64 pixels of y and 128 columns. Two sets of sums, of the tap and of the tile, leave no room for more columns.
struct DownsampleGemmTile {
  int warpgroups;

  static constexpr int kColumns = 128;
  constexpr int rows() const { return 64 * warpgroups; }
  constexpr int slot_bytes() const { return (rows() + kColumns) * direct::sm90::kDepth * 2; }
  constexpr int vector_bytes() const { return direct::sm90::kBiasBuffers * kTapVectors * kColumns * 4; }
  constexpr int slots() const {
    return std::min(direct::sm90::kMaxSlots, (direct::sm90::kSharedMemory - direct::sm90::kBarrierBytes - vector_bytes()) / slot_bytes());
  }
  constexpr int threads() const { return 128 * (1 + warpgroups); }
  constexpr int shared_bytes() const { return slots() * slot_bytes() + vector_bytes() + direct::sm90::kBarrierBytes; }
};

struct DownsampleGemmPlan {
  int warpgroups;     // of the tile
  int steps;          // ring slots of a tile
  int grid;           // blocks, persistent
  int rounds;         // tiles of the busiest block
  int shared_memory;  // bytes
  double cost;        // estimated microseconds
};

inline bool downsample_gemm_supports(int64_t channels, int64_t columns) {
  return channels > 0 && columns > 0 && channels % direct::sm90::kDepth == 0 && columns % DownsampleGemmTile::kColumns == 0;
}

inline DownsampleGemmPlan plan_downsample_gemm_tile(int64_t pixels, int channels, int columns, int multiprocessors, int warpgroups) {
  constexpr double kClockMhz = 1500, kFixedMicroseconds = 2.5;
  const DownsampleGemmTile t{warpgroups};
  const int64_t tiles = (pixels + t.rows() - 1) / t.rows() * (columns / t.kColumns);
  DownsampleGemmPlan plan{};
  plan.warpgroups = warpgroups;
  plan.steps = kTaps * channels / direct::sm90::kDepth;
  plan.grid = static_cast<int>(std::min<int64_t>(tiles, multiprocessors));
  plan.rounds = static_cast<int>((tiles + plan.grid - 1) / plan.grid);
  plan.shared_memory = t.shared_bytes();
  // As direct/implicit_gemm_sm90.h: what tensor cores take of a slice, and what a tile waits for at its ends. Then 300 instructions of
  // three warps a scheduler after each tap.
  const double slice = t.rows() * t.kColumns * direct::sm90::kDepth / 2048.0, tap = 300.0 * warpgroups, between = 4000;
  plan.cost = kFixedMicroseconds + (plan.rounds * (plan.steps * slice + kTaps * tap + between) + 3000) / kClockMhz;
  return plan;
}

inline DownsampleGemmPlan plan_downsample_gemm(int64_t pixels, int channels, int columns, int multiprocessors) {
  DownsampleGemmPlan best{};
  for (int warpgroups : {3, 2, 1}) {
    const DownsampleGemmPlan plan = plan_downsample_gemm_tile(pixels, channels, columns, multiprocessors, warpgroups);
    if (best.grid == 0 || plan.cost < best.cost) best = plan;
  }
  return best;
}

// Compile-time description of one kernel; the names that direct::sm90::GemmConsumer reads are those of its GemmTraits.
template <direct::DType kDType_, int kWarpgroups_>
struct DownsampleGemmTraits {
  static constexpr direct::DType kDType = kDType_;
  static constexpr bool kTransposed = false;
  static constexpr DownsampleGemmTile kTile{kWarpgroups_};
  static constexpr int kWarpgroups = kWarpgroups_, kBands = 1, kColumns = kTile.kColumns, kRows = kTile.rows(), kBlocks = kColumns / 32;
  static constexpr int kABytes = kRows * direct::sm90::kDepth * 2, kWPanelBytes = direct::sm90::kDepth * 64 * 2;
  static constexpr int kSlots = kTile.slots(), kSlotBytes = kTile.slot_bytes();
  static constexpr int kBiasOffset = kSlots * kSlotBytes, kBarrierOffset = kBiasOffset + kTile.vector_bytes();
  static constexpr int kThreads = kTile.threads();
  static constexpr int kConsumerRegisters = kWarpgroups == 3 ? 160 : 232;
  static constexpr int kProducerRegisters = kWarpgroups == 3 ? 32 : 24;
  static_assert(kSlots >= 3 && 2 * kSlots * 8 <= direct::sm90::kBarrierBytes);
  // A tile's vectors lie in one of kBiasBuffers places; the producer is at most kSlots slices ahead, and a tile has four at least.
  static_assert(kSlots <= kTaps * (direct::sm90::kBiasBuffers - 2));
};

}  // namespace convfirst::patch::sm90
