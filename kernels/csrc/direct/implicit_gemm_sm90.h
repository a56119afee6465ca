// Host face of the Hopper implicit matrix product: what is asked for (GemmProblem), its data (GemmTensors), how it is done
// (GemmPlan). No CUDA types beyond the stream; sizes are written here and nowhere else.
#pragma once

#include <algorithm>
#include <cstdint>

#include "params.h"

namespace convfirst::direct::sm90 {

// y[n, p, q, k] = act(sum over r, s, c of x[n, p stride_h - pad_h + r dilation_h, q ..., c] w[k, r, s, c] + bias[k]), x zero outside.
// The padding at the end of a row or column is whatever out_h and out_w need. y may be a strided view.
struct GemmProblem {
  int64_t batch;
  int height, width, channels;       // of x; channels a multiple of 8
  int out_h, out_w, filters;         // of y; filters a multiple of 8
  int kernel_h, kernel_w;
  int stride_h, stride_w;            // 1 to 8
  int pad_h, pad_w;                  // at the start; may be negative
  int dilation_h, dilation_w;
  int64_t y_stride_n, y_stride_p, y_stride_q;  // elements
  DType dtype;
  Activation activation;
  // Filters that lie transposed, w[channels, w_taps, filters]: tap (r, s) is w_first + r w_step_r + s w_step_s of them. No bias, no activation.
  bool transposed;
  int w_taps, w_first, w_step_r, w_step_s;

  constexpr int64_t pixels() const { return batch * out_h * out_w; }
  constexpr int taps() const { return kernel_h * kernel_w; }
};

struct GemmTensors {
  const void* x;      // [batch, height, width, channels]
  const void* w;      // [filters, kernel_h, kernel_w, channels], or transposed as GemmProblem says
  const float* bias;  // [filters] or nullptr
  void* y;
};

constexpr int kDepth = 64;          // of a ring slot, in elements
constexpr int kMaxSlots = 8;
constexpr int kBiasBuffers = 4;     // biases of this many tiles: one is overwritten when no warp can still be in its epilogue
constexpr int kSharedMemory = 232448;
constexpr int kBarrierBytes = 256;

// A tile of `warpgroups` x `bands` x 64 pixels and `columns` filters; `sets` of sums, two hide the epilogue under the next tile.
struct GemmTile {
  int warpgroups, bands, columns, sets;

  constexpr int rows() const { return 64 * warpgroups * bands; }
  constexpr int slot_bytes() const { return (rows() + columns) * kDepth * 2; }
  constexpr int blocks() const { return columns / 32; }
  constexpr int bias_bytes() const { return kBiasBuffers * columns * 4; }
  constexpr int slots() const { return std::min(kMaxSlots, (kSharedMemory - kBarrierBytes - bias_bytes()) / slot_bytes()); }
  constexpr int threads() const { return 128 * (1 + warpgroups); }
  constexpr int shared_bytes() const { return slots() * slot_bytes() + bias_bytes() + kBarrierBytes; }
};

constexpr GemmTile kGemmTiles[] = {{3, 1, 128, 2}, {2, 1, 128, 2}, {3, 1, 192, 1}, {2, 2, 128, 1}, {2, 1, 256, 1}, {3, 1, 64, 2}, {3, 1, 96, 2}};
constexpr int kGemmTileCount = sizeof(kGemmTiles) / sizeof(kGemmTiles[0]);
constexpr int kTransposedTileCount = kGemmTileCount - 1;  // transposed filters come in panels of 64 columns, which the last tile has no whole number of

struct GemmPlan {
  int tile;           // index into kGemmTiles
  int panel;          // channels that one copy brings: 64, 32 or 16
  int steps;          // ring slots of a tile
  int grid;           // blocks, persistent
  int rounds;         // tiles of the busiest block
  int shared_memory;  // bytes
  int threads;
  double cost;        // estimated microseconds
};

// Compile-time description of one kernel.
template <DType kDType_, int kTile_, bool kTransposed_ = false>
struct GemmTraits {
  static constexpr bool kTransposed = kTransposed_;
  static constexpr DType kDType = kDType_;
  static constexpr GemmTile kTile = kGemmTiles[kTile_];
  static constexpr int kWarpgroups = kTile.warpgroups, kBands = kTile.bands, kColumns = kTile.columns, kSets = kTile.sets;
  static constexpr int kRows = kTile.rows(), kBlocks = kTile.blocks();
  static constexpr int kABytes = kRows * kDepth * 2;
  static constexpr int kWPanels = kColumns / 64, kWPanelBytes = kDepth * 64 * 2;  // of transposed filters
  static constexpr int kSlots = kTile.slots(), kSlotBytes = kTile.slot_bytes();
  static_assert(!kTransposed || kColumns % 64 == 0);
  static constexpr int kBiasOffset = kSlots * kSlotBytes, kBarrierOffset = kBiasOffset + kTile.bias_bytes();
  static constexpr int kThreads = kTile.threads();
  // No more in all than the launch gave, or the consumers wait for registers for ever.
  static constexpr int kConsumerRegisters = kWarpgroups == 3 ? 160 : 232;
  static constexpr int kProducerRegisters = kWarpgroups == 3 ? 32 : 40;
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static_assert(kWarpgroups * kConsumerRegisters + kProducerRegisters <= (kWarpgroups + 1) * kLaunchRegisters);
  static_assert(kSlots >= 3 && 2 * kSlots * 8 <= kBarrierBytes && (kSets == 1 || kBands == 1));
};

// The compiled kernel; defined in launch_implicit_gemm_sm90.cuh, instantiated in instantiations_sm90/. Returns cudaError_t as int.
template <class Traits>
struct GemmKernel {
  static int launch(const GemmProblem&, const GemmTensors&, const GemmPlan&, cudaStream_t);
  static const void* kernel();
};

// ---------------------------------------------------------------------------------------------------------------------------
// Plan

// What TMA's im2col mode can address.
inline bool im2col_supports(const GemmProblem& q) {
  const auto end = [](int size, int out, int stride, int pad) { return (out - 1) * stride - pad + 1 - size; };  // upper corner
  const auto corner = [](int v) { return v >= -128 && v <= 127; };
  return q.batch > 0 && q.out_h > 0 && q.out_w > 0 && q.channels > 0 && q.filters > 0 && q.stride_h >= 1 && q.stride_h <= 8 && q.stride_w >= 1 && q.stride_w <= 8 && corner(-q.pad_h) && corner(-q.pad_w) &&
         corner(end(q.height, q.out_h, q.stride_h, q.pad_h)) && corner(end(q.width, q.out_w, q.stride_w, q.pad_w)) &&
         (q.kernel_h - 1) * q.dilation_h <= 255 && (q.kernel_w - 1) * q.dilation_w <= 255 &&
         q.pixels() < (int64_t{1} << 31) - 4096;
}

inline bool gemm_supports(const GemmProblem& q) { return im2col_supports(q) && q.channels % 8 == 0 && q.filters % 8 == 0; }

// Wide panels copy faster; narrow ones waste less where channels are no multiple of 64.
inline int choose_panel(int channels) {
  int best = 64;
  for (int panel : {32, 16}) {
    const auto padded = [&](int p) { return (channels + p - 1) / p * p; };
    if (padded(panel) < padded(best)) best = panel;
  }
  return best;
}

inline int64_t gemm_tiles(const GemmProblem& q, const GemmTile& t) {
  return (q.pixels() + t.rows() - 1) / t.rows() * ((q.filters + t.columns - 1) / t.columns);
}

inline int gemm_steps(const GemmProblem& q) {
  const int panel = choose_panel(q.channels), panels = q.taps() * ((q.channels + panel - 1) / panel), panels_a_slot = kDepth / panel;
  return (panels + panels_a_slot - 1) / panels_a_slot;
}

// The epilogue under the next tile takes a slice for each 32 filters.
inline bool tile_supports(const GemmProblem& q, int index) {
  return (!q.transposed || index < kTransposedTileCount) && (kGemmTiles[index].sets == 1 || gemm_steps(q) >= kGemmTiles[index].blocks());
}

inline GemmPlan plan_gemm_tile(const GemmProblem& q, const Device& device, int index) {
  constexpr double kClockMhz = 1500, kFixedMicroseconds = 2.5;
  const GemmTile& t = kGemmTiles[index];
  const int64_t tiles = gemm_tiles(q, t);
  GemmPlan plan{};
  plan.tile = index;
  plan.panel = choose_panel(q.channels);
  plan.grid = static_cast<int>(std::min<int64_t>(tiles, device.multiprocessors));
  plan.rounds = static_cast<int>((tiles + plan.grid - 1) / plan.grid);
  plan.steps = gemm_steps(q);
  plan.shared_memory = t.shared_bytes();
  plan.threads = t.threads();
  // Measured on an H200 (NOTES.md): large tiles ask less of shared memory and L2 and so leave the tensor cores a higher clock.
  const double area = t.rows() * t.columns, rate = t.columns == 192 ? 1.05 : area >= 256 * 128 ? 1.09 : area >= 128 * 128 ? 1.0 : 0.82;
  // Narrow panels take as many copies more, and then those bind.
  const double copies = plan.panel == 64 ? 0 : 900.0 * 32 / plan.panel;
  const double slice = std::max(area * kDepth / 2048.0 / rate, copies), epilogue = 2000.0 * t.columns / 128;
  // A tile's first slices are waited for, and with one set of sums its last ones too. Many rounds of 192 x 128 took less each (H100, VGG-E at N = 64).
  const double between = !q.transposed && index == 0 && plan.rounds >= 8 ? 2500 : 4000;
  const double tile_clocks = plan.steps * slice + (t.sets == 1 ? t.bands * epilogue + 1500 : between);
  const double clocks = plan.rounds * tile_clocks + epilogue + 3000;
  plan.cost = kFixedMicroseconds + clocks / kClockMhz;
  return plan;
}

inline GemmPlan plan_gemm(const GemmProblem& q, const Device& device) {
  GemmPlan best{};
  for (int i = 0; i < kGemmTileCount; ++i) {
    if (!tile_supports(q, i)) continue;
    const GemmPlan plan = plan_gemm_tile(q, device, i);
    if (best.grid == 0 || plan.cost < best.cost) best = plan;
  }
  return best;
}

}  // namespace convfirst::direct::sm90
