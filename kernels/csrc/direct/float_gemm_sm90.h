// Host face of Hopper's float32 implicit matrix product on CUDA cores: what is asked for is GemmProblem (implicit_gemm_sm90.h) without
// transposed filters, how it is done is FloatPlan. No CUDA types beyond the stream; sizes are written here and nowhere else.
#pragma once

#include <algorithm>
#include <cstdint>

#include "implicit_gemm_sm90.h"

namespace convfirst::direct::sm90 {

constexpr int kFloatDepth = 32;      // channels of a slice: rows of 128 bytes, swizzled
constexpr int kFloatGroup = 16;      // of them in a round of the main loop; all 32 are 69 KB of instructions, which take 1.5 times as long
constexpr int kFloatConsumers = 256, kFloatThreads = kFloatConsumers + 128;
constexpr int kFloatSums = 128;      // a thread: 8 pixels x 16 filters
constexpr int kFloatTransposed = 2;  // slots of transposed slices
constexpr int kFloatAlign = 1024;    // what the swizzle needs of a slot's address

// With more than 208 registers ptxas moves sums from one depth to the next into registers of the wrong bank.
constexpr int kFloatConsumerRegisters = 208, kFloatProducerRegisters = 88;
static_assert(2 * kFloatConsumerRegisters + kFloatProducerRegisters <= 3 * (65536 / kFloatThreads / 8 * 8));

// Eight warps of 64 x 64 sums.
struct FloatTile {
  int warps_m, warps_n;
  constexpr int rows() const { return 64 * warps_m; }
  constexpr int columns() const { return 64 * warps_n; }
  constexpr int slot_bytes() const { return (rows() + columns()) * kFloatDepth * 4; }
  // A transposed slot has 16 bytes more after each four rows.
  constexpr int b_offset() const { return rows() * kFloatDepth * 4 + kFloatDepth / 4 * 16; }  // of the filters in it
  constexpr int transposed_bytes() const { return slot_bytes() + 2 * (kFloatDepth / 4 * 16); }
  constexpr int slots() const { return (kSharedMemory - kBarrierBytes - kFloatAlign - kFloatTransposed * transposed_bytes()) / slot_bytes(); }  // of copies
  constexpr int shared_bytes() const { return kFloatAlign + slots() * slot_bytes() + kFloatTransposed * transposed_bytes() + kBarrierBytes; }
};

constexpr FloatTile kFloatTiles[] = {{4, 2}, {8, 1}, {2, 4}};
constexpr int kFloatTileCount = sizeof(kFloatTiles) / sizeof(kFloatTiles[0]);
constexpr int kFloatPartialBytes = kFloatSums * kFloatConsumers * 4;

struct FloatPlan {
  int tile;           // index into kFloatTiles
  int steps;          // slices of a tile
  int64_t units;      // slices of all tiles
  int grid;           // blocks; they take equal shares of the units
  int shared_memory;  // bytes
  int64_t workspace;  // bytes: a flag and the sums of a part of a tile for each block
  double cost;        // estimated microseconds
};

constexpr int float_share(int units, int blocks, int block) { return static_cast<int>(int64_t{units} * block / blocks); }

// The flags come first and must be zero at the start.
constexpr int64_t float_flag_bytes(int grid) { return (int64_t{4} * grid + 255) / 256 * 256; }

struct FloatTensors {
  const float* x;     // [batch, height, width, channels]
  const float* w;     // [filters, kernel_h, kernel_w, channels]
  const float* bias;  // [filters] or nullptr
  float* y;           // [batch, out_h, out_w, filters], dense
  void* workspace;
};

template <int kTile>
struct FloatKernel {
  static int launch(const GemmProblem&, const FloatTensors&, const FloatPlan&, cudaStream_t);  // cudaError_t
  static const void* kernel();
};

inline FloatPlan plan_float_tile(const GemmProblem& q, const Device& device, int index) {
  constexpr int64_t kLeastSteps = 4;  // a smaller share costs more to add up than it saves
  // Measured on an H100 (NOTES.md): 5.3 to 5.4 us a slice, and 25 us for what is not in step with them; the code of an activation is fetched once.
  constexpr double kClockMhz = 1980, kSliceClocks[] = {10430, 10690, 10390};
  constexpr double kFixedMicroseconds = 25, kActivationMicroseconds[] = {0, 10, 25, 60};
  const FloatTile& t = kFloatTiles[index];
  const int64_t tiles = (q.pixels() + t.rows() - 1) / t.rows() * ((q.filters + t.columns() - 1) / t.columns());
  FloatPlan plan{};
  plan.tile = index;
  plan.steps = q.taps() * ((q.channels + kFloatDepth - 1) / kFloatDepth);
  plan.units = tiles * plan.steps;
  plan.grid = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(device.multiprocessors, plan.units / kLeastSteps)));
  plan.shared_memory = t.shared_bytes();
  plan.workspace = float_flag_bytes(plan.grid) + int64_t{plan.grid} * kFloatPartialBytes;
  plan.cost = kFixedMicroseconds + kActivationMicroseconds[static_cast<int>(q.activation)] +
              (plan.units + plan.grid - 1) / plan.grid * kSliceClocks[index] / kClockMhz;
  return plan;
}

// The tile of least cost.
inline FloatPlan plan_float(const GemmProblem& q, const Device& device) {
  FloatPlan best = plan_float_tile(q, device, 0);
  for (int i = 1; i < kFloatTileCount; ++i) {
    if (const FloatPlan plan = plan_float_tile(q, device, i); plan.cost < best.cost) best = plan;
  }
  return best;
}

// Rows of x and of the filters must be multiples of 16 bytes; slices are counted in an int.
inline bool float_supports(const GemmProblem& q, const Device& device, int index) {
  return im2col_supports(q) && q.channels % 4 == 0 && plan_float_tile(q, device, index).units < int64_t{1} << 31;
}

}  // namespace convfirst::direct::sm90
