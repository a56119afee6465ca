// Host face of the Hopper weight gradient: sizes, shares, plan. No CUDA types beyond the stream.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "params.h"

namespace convfirst::direct::sm90 {

constexpr int kWgradPixels = 64;        // of a ring slot
constexpr int kWgradPanelBytes = 8192;  // 64 pixels x 64 filters or channels
constexpr int kWgradSharedMemory = 232448;
constexpr int kWgradBarrierBytes = 1024;
constexpr int kWgradMaxSlots = 8;

// `warpgroups` x `bands` x 64 filters by `columns` channels of taps. Measured shares of the tensor rate (NOTES.md): of tiles whose parts are
// made side by side, and of whole rounds of tiles, where smaller tiles wait for L2.
struct WgradTile {
  int warpgroups, bands, columns;
  double rate, round_rate;

  constexpr int rows() const { return 64 * warpgroups * bands; }
  constexpr int slot_bytes() const { return (rows() + columns) * kWgradPixels * 2; }
  constexpr int slots() const { return std::min(kWgradMaxSlots, (kWgradSharedMemory - kWgradBarrierBytes) / slot_bytes()); }
  constexpr int threads() const { return 128 * (1 + warpgroups); }
  constexpr int shared_bytes() const { return slots() * slot_bytes() + kWgradBarrierBytes; }
  constexpr int64_t partial_bytes() const { return int64_t{4} * rows() * columns; }
};

constexpr WgradTile kWgradTiles[] = {
    {2, 2, 192, 0.92, 0.89}, {3, 1, 192, 0.90, 0.80}, {3, 1, 128, 0.92, 0.70}, {2, 1, 256, 0.94, 0.85}, {2, 2, 128, 0.93, 0.82}};
constexpr int kWgradTileCount = sizeof(kWgradTiles) / sizeof(kWgradTiles[0]);

struct WgradPlan {
  int tile;
  int panel;         // channels that one copy brings: 64 or 32
  int panels_a_tap, tiles_m, tiles_n;
  int steps;         // slots of a tile: all pixels
  int grid;          // blocks, persistent
  int whole;         // tiles that one block makes alone, a multiple of the grid
  int64_t units;     // steps of all tiles but those
  int sharers;       // blocks that share these out evenly
  int splits;        // of each of those tiles where these are as many for all, else 0
  int64_t workspace;
  double cost;       // estimated microseconds
};

constexpr int64_t wgrad_share(int64_t units, int blocks, int64_t block) { return units * block / blocks; }

// Wide panels copy faster; narrow ones waste less where channels are no multiple of 64.
inline int wgrad_panel(int channels) { return (channels + 31) / 32 % 2 == 0 ? 64 : 32; }

inline WgradPlan plan_wgrad_tile(const Problem& q, const Device& device, int index) {
  constexpr double kClockMhz = 1600, kBytesAMicrosecond = 4e6;
  constexpr int64_t kLeastSteps = 4;
  const WgradTile& t = kWgradTiles[index];
  WgradPlan plan{};
  plan.tile = index;
  plan.panel = wgrad_panel(q.channels);
  plan.panels_a_tap = (q.channels + plan.panel - 1) / plan.panel;
  const int panels = t.columns / plan.panel;
  plan.tiles_m = (q.filters + t.rows() - 1) / t.rows();
  plan.tiles_n = (q.taps() * plan.panels_a_tap + panels - 1) / panels;
  plan.steps = static_cast<int>((q.out_pixels() + kWgradPixels - 1) / kWgradPixels);
  const int tiles = plan.tiles_m * plan.tiles_n;
  const auto blocks = [&](int64_t units, int most) { return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(most, units / kLeastSteps))); };
  plan.grid = blocks(int64_t{tiles} * plan.steps, device.multiprocessors);
  const int rounds = tiles / plan.grid, rest = tiles % plan.grid;
  plan.whole = rounds * plan.grid;
  plan.units = int64_t{rest} * plan.steps;
  plan.sharers = 1;
  const double step = t.rows() * t.columns * kWgradPixels / 2048.0 / kClockMhz;
  plan.cost = 4 + rounds * (plan.steps * step / t.round_rate + 2.5);
  if (rest == 0) return plan;
  // Either all share, of which many then add to two tiles, or a multiple of the tiles: fewer parts, and neighbours at the same pixels. The
  // former took 1.05 to 1.12 times as long a step where a dozen blocks happened to be at the same pixels, 1.2 to 1.5 times where fewer.
  const auto cost = [&](int count, int parts) { return plan.units / count * step / t.rate + 2.0 * parts * t.partial_bytes() / kBytesAMicrosecond; };
  const int most = blocks(plan.units, plan.grid), even = rest * std::max(1, most / rest);
  const double apart = std::gcd(most, rest) >= 8 ? 1.08 : 1.3;
  const double all = most == even ? cost(most, most) : apart * cost(most, most + rest), some = cost(even, even == rest ? 0 : even);
  plan.sharers = some <= all ? even : most;
  plan.splits = plan.sharers % rest == 0 ? plan.sharers / rest : 0;
  plan.cost += std::min(all, some);
  plan.workspace = 2 * t.partial_bytes() * plan.sharers;
  return plan;
}

inline bool wgrad_supports(const Problem& q) {
  const auto end = [](int size, int out, int stride, int pad) { return (out - 1) * stride - pad + 1 - size; };
  const auto corner = [](int v) { return v >= -128 && v <= 127; };
  return q.direction == Direction::kWgrad && q.dtype != DType::kFloat && q.out_pixels() > 0 && q.channels % 8 == 0 && q.filters % 8 == 0 &&
         q.stride_h <= 8 && q.stride_w <= 8 && corner(-q.pad_h) && corner(-q.pad_w) && corner(end(q.height, q.out_h(), q.stride_h, q.pad_h)) &&
         corner(end(q.width, q.out_w(), q.stride_w, q.pad_w)) && (q.kernel_h - 1) * q.dilation_h <= 255 && (q.kernel_w - 1) * q.dilation_w <= 255 &&
         q.out_pixels() < (int64_t{1} << 31) - 4096;
}

template <DType kDType_, int kTile_, int kPanel_>
struct WgradTraits {
  static constexpr DType kDType = kDType_;
  static constexpr int kPanel = kPanel_;
  static constexpr WgradTile kTile = kWgradTiles[kTile_];
  static constexpr int kWarpgroups = kTile.warpgroups, kBands = kTile.bands, kRows = kTile.rows(), kColumns = kTile.columns;
  static constexpr int kPanels = kColumns / kPanel, kConsumers = 128 * kWarpgroups;
  static constexpr int kSlots = kTile.slots(), kSlotBytes = kTile.slot_bytes(), kThreads = kTile.threads();
  static constexpr int kXOffset = kRows * kWgradPixels * 2, kXPanelBytes = kPanel * kWgradPixels * 2;
  static constexpr int kBarrierOffset = kSlots * kSlotBytes;
  static constexpr int kQuads = kBands * kColumns / 8;  // of sums, a thread
  // No more in all than the launch gave, or the consumers wait for registers for ever.
  static constexpr int kConsumerRegisters = kWarpgroups == 3 ? 152 : 224, kProducerRegisters = 56;
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static_assert(kWarpgroups * kConsumerRegisters + kProducerRegisters <= (kWarpgroups + 1) * kLaunchRegisters);
  static_assert(kPanel == 64 || kPanel == 32);
};

}  // namespace convfirst::direct::sm90
