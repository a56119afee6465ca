// Host face of the Hopper weight gradient: sizes, shares, plan. No CUDA types beyond the stream.
#pragma once

#include <algorithm>
#include <cstdint>

#include "params.h"

namespace convfirst::direct::sm90 {

constexpr int kWgradPixels = 64;        // of a ring slot
constexpr int kWgradPanelBytes = 8192;  // 64 pixels x 64 filters or channels
constexpr int kWgradSharedMemory = 232448;
constexpr int kWgradBarrierBytes = 1024;
constexpr int kWgradMaxSlots = 8;

// 64 x `warpgroups` filters by `panels` panels of 64 channels of a tap.
struct WgradTile {
  int warpgroups, panels;

  constexpr int rows() const { return 64 * warpgroups; }
  constexpr int columns() const { return 64 * panels; }
  constexpr int slot_bytes() const { return (warpgroups + panels) * kWgradPanelBytes; }
  constexpr int slots() const { return std::min(kWgradMaxSlots, (kWgradSharedMemory - kWgradBarrierBytes) / slot_bytes()); }
  constexpr int threads() const { return 128 * (1 + warpgroups); }
  constexpr int shared_bytes() const { return slots() * slot_bytes() + kWgradBarrierBytes; }
  constexpr int64_t partial_bytes() const { return int64_t{4} * rows() * columns(); }
};

constexpr WgradTile kWgradTiles[] = {{2, 4}, {3, 2}};
constexpr int kWgradTileCount = sizeof(kWgradTiles) / sizeof(kWgradTiles[0]);

struct WgradPlan {
  int tile;
  int panels_a_tap, tiles_m, tiles_n;
  int steps;      // slots of a tile: all pixels
  int64_t units;  // steps of all tiles, of which each block has an equal share
  int grid;
  int64_t workspace;
  double cost;
};

constexpr int64_t wgrad_share(int64_t units, int blocks, int64_t block) { return units * block / blocks; }

inline WgradPlan plan_wgrad(const Problem& q, const Device& device) {
  constexpr double kClockMhz = 1600;
  constexpr int64_t kLeastSteps = 4;
  WgradPlan best{};
  for (int i = 0; i < kWgradTileCount; ++i) {
    const WgradTile& t = kWgradTiles[i];
    WgradPlan plan{};
    plan.tile = i;
    plan.panels_a_tap = (q.channels + 63) / 64;
    plan.tiles_m = (q.filters + t.rows() - 1) / t.rows();
    plan.tiles_n = (q.taps() * plan.panels_a_tap + t.panels - 1) / t.panels;
    plan.steps = static_cast<int>((q.out_pixels() + kWgradPixels - 1) / kWgradPixels);
    plan.units = int64_t{plan.tiles_m} * plan.tiles_n * plan.steps;
    plan.grid = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(device.multiprocessors, plan.units / kLeastSteps)));
    plan.workspace = 2 * t.partial_bytes() * plan.grid;
    const double clocks = static_cast<double>(plan.units) / plan.grid * t.rows() * t.columns() * kWgradPixels / 2048;
    plan.cost = 10 + (clocks + 6000) / kClockMhz;
    if (best.grid == 0 || plan.cost < best.cost) best = plan;
  }
  return best;
}

inline bool wgrad_supports(const Problem& q) {
  const auto end = [](int size, int out, int stride, int pad) { return (out - 1) * stride - pad + 1 - size; };
  const auto corner = [](int v) { return v >= -128 && v <= 127; };
  return q.direction == Direction::kWgrad && q.dtype != DType::kFloat && q.out_pixels() > 0 && q.channels % 8 == 0 && q.filters % 8 == 0 &&
         q.stride_h <= 8 && q.stride_w <= 8 && corner(-q.pad_h) && corner(-q.pad_w) && corner(end(q.height, q.out_h(), q.stride_h, q.pad_h)) &&
         corner(end(q.width, q.out_w(), q.stride_w, q.pad_w)) && (q.kernel_h - 1) * q.dilation_h <= 255 && (q.kernel_w - 1) * q.dilation_w <= 255 &&
         q.out_pixels() < (int64_t{1} << 31) - 4096;
}

// kAhead: the producer divides once a piece and not in every step.
template <DType kDType_, int kTile_, bool kAhead_ = false>
struct WgradTraits {
  static constexpr bool kAhead = kAhead_;
  static constexpr int kTileIndex = kTile_;
  static constexpr DType kDType = kDType_;
  static constexpr WgradTile kTile = kWgradTiles[kTile_];
  static constexpr int kWarpgroups = kTile.warpgroups, kPanels = kTile.panels, kRows = kTile.rows(), kColumns = kTile.columns();
  static constexpr int kSlots = kTile.slots(), kSlotBytes = kTile.slot_bytes(), kThreads = kTile.threads();
  static constexpr int kBarrierOffset = kSlots * kSlotBytes;
  static constexpr int kConsumerRegisters = kWarpgroups == 3 ? 160 : 232, kProducerRegisters = kWarpgroups == 3 ? 32 : 40;
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static_assert(kWarpgroups * kConsumerRegisters + kProducerRegisters <= (kWarpgroups + 1) * kLaunchRegisters);
};

}  // namespace convfirst::direct::sm90
