// Host face of the Hopper downsampling layer as one matrix product: which layers it takes, tiles, plan. No CUDA types; sizes are
// written here and nowhere else.
#pragma once

#include "direct/implicit_gemm_sm90.h"

namespace convfirst::patch::sm90 {

constexpr int kTaps = 4;
constexpr int kTapVectors = 1 + kTaps;  // bias, sums of the taps' weights

// `warpgroups` x 64 pixels of y and `columns` of its channels. Two sets of sums, of the tap and of the tile, leave no room for more.
struct DownsampleGemmTile {
  int warpgroups, columns;

  constexpr int rows() const { return 64 * warpgroups; }
  constexpr int slot_bytes() const { return (rows() + columns) * direct::sm90::kDepth * 2; }
  constexpr int vector_bytes() const { return direct::sm90::kBiasBuffers * kTapVectors * columns * 4; }
  constexpr int slots() const {
    return std::min(direct::sm90::kMaxSlots, (direct::sm90::kSharedMemory - direct::sm90::kBarrierBytes - vector_bytes()) / slot_bytes());
  }
  constexpr int threads() const { return 128 * (1 + warpgroups); }
  constexpr int shared_bytes() const { return slots() * slot_bytes() + vector_bytes() + direct::sm90::kBarrierBytes; }
  // Clocks of a slice: of the tensor cores, and of shared memory, which the products read (W once a warpgroup), the moments and TMA's stores.
  constexpr double slice_clocks() const {
    const double products = rows() * columns * direct::sm90::kDepth / 2048.0;
    const double bytes = 2.0 * direct::sm90::kDepth * (2 * rows() + warpgroups * columns) + slot_bytes();
    return std::max(products, bytes / 128);
  }
};

constexpr DownsampleGemmTile kDownsampleGemmTiles[] = {{1, 128}, {2, 128}, {3, 128}, {2, 192}};
constexpr int kDownsampleGemmTileCount = sizeof(kDownsampleGemmTiles) / sizeof(kDownsampleGemmTiles[0]);

struct DownsampleGemmPlan {
  int tile;           // index into kDownsampleGemmTiles
  int steps;          // ring slots of a tile
  int grid;           // blocks, persistent
  int rounds;         // tiles of the busiest block
  int shared_memory;  // bytes
  double cost;        // estimated microseconds
};

inline bool downsample_gemm_supports(int64_t channels, int64_t columns) {
  return channels > 0 && columns > 0 && channels % direct::sm90::kDepth == 0 && columns % 128 == 0;
}

inline bool tile_supports(int columns, int tile) {
  return tile >= 0 && tile < kDownsampleGemmTileCount && columns % kDownsampleGemmTiles[tile].columns == 0;
}

inline DownsampleGemmPlan plan_downsample_gemm_tile(int64_t pixels, int channels, int columns, int multiprocessors, int tile) {
  constexpr double kClockMhz = 1700, kFixedMicroseconds = 2.5;
  const DownsampleGemmTile& t = kDownsampleGemmTiles[tile];
  const int64_t tiles = (pixels + t.rows() - 1) / t.rows() * (columns / t.columns);
  DownsampleGemmPlan plan{};
  plan.tile = tile;
  plan.steps = kTaps * channels / direct::sm90::kDepth;
  plan.grid = static_cast<int>(std::min<int64_t>(tiles, multiprocessors));
  plan.rounds = static_cast<int>((tiles + plan.grid - 1) / plan.grid);
  plan.shared_memory = t.shared_bytes();
  // After each tap 2.3 instructions a column, of each warpgroup's warp on a scheduler; a tile waits for its first slices, and for its stores.
  const double tap = 2.3 * t.columns * t.warpgroups, between = 2500;
  plan.cost = kFixedMicroseconds + (plan.rounds * (plan.steps * t.slice_clocks() + kTaps * tap / 2 + between) + 3000) / kClockMhz;
  return plan;
}

inline DownsampleGemmPlan plan_downsample_gemm(int64_t pixels, int channels, int columns, int multiprocessors) {
  DownsampleGemmPlan best{};
  for (int tile = 0; tile < kDownsampleGemmTileCount; ++tile) {
    if (!tile_supports(columns, tile)) continue;
    const DownsampleGemmPlan plan = plan_downsample_gemm_tile(pixels, channels, columns, multiprocessors, tile);
    if (best.grid == 0 || plan.cost < best.cost) best = plan;
  }
  return best;
}

// Compile-time description of one kernel; the names that direct::sm90::GemmConsumer reads are those of its GemmTraits.
template <direct::DType kDType_, int kTile_>
struct DownsampleGemmTraits {
  static constexpr direct::DType kDType = kDType_;
  static constexpr bool kTransposed = false;
  static constexpr DownsampleGemmTile kTile = kDownsampleGemmTiles[kTile_];
  static constexpr int kWarpgroups = kTile.warpgroups, kBands = 1, kColumns = kTile.columns, kRows = kTile.rows(), kBlocks = kColumns / 32;
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
