// Host face of the Hopper path's linear layers: the expansion and the projection of a block whose output does not fit one block's
// registers. What is asked for (LinearProblem), its data (LinearTensors), how it is done (LinearPlan). No CUDA types beyond the
// stream; sizes are written here and nowhere else.
#pragma once

#include <algorithm>
#include <cstdint>

#include "params.h"

namespace convfirst::block_fusion::sm90 {

// expand:  output = act(a weight^T + bias)
// project: output = x + sample_scale[row / image_pixels] * layer_scale * (a weight^T + bias)
enum class Layer : int { kExpand = 0, kProject = 1 };

struct LinearProblem {
  Layer layer;
  int64_t rows;          // pixels of all images
  int columns;           // outputs, a multiple of 32
  int depth;             // inputs, a multiple of 8, at least 200: four slots
  DType dtype;
  Activation activation; // of the expansion
  int64_t image_pixels;  // of the projection: rows of one image
};

// Device pointers; 16-bit matrices are dense, row-major and 16-byte aligned; vectors are float32. nullptr: absent.
struct LinearTensors {
  const void* a;              // [rows, depth]
  const void* weight;         // [columns, depth]
  const float* bias;          // [columns] or nullptr
  void* output;               // [rows, columns]
  const void* x;              // [rows, columns], of the projection
  const float* layer_scale;   // [columns] or nullptr, of the projection
  const float* sample_scale;  // [images] or nullptr, of the projection
};

constexpr int kLinearDepth = 64;             // of a ring slot: one swizzled row of 128 bytes
constexpr int kMaxLinearSlots = 8;
// Bias and scale of this many tiles lie in shared memory: a tile's are overwritten when no warp can still be in its epilogue.
constexpr int kLinearVectorBuffers = 4;
constexpr int kLinearSharedMemory = 232448;  // that a block may have on compute capability 9.0
constexpr int kLinearBarrierBytes = 256;

// A tile of 64 * warpgroups rows x columns; `cluster` blocks (1 or 2) take neighbouring tiles of the same rows and share A's loads.
struct LinearTile {
  int warpgroups, columns, cluster;

  constexpr int rows() const { return 64 * warpgroups; }
  constexpr int slot_bytes() const { return (rows() + columns) * kLinearDepth * 2; }
  constexpr int blocks() const { return columns / 32; }
  constexpr int vector_bytes(Layer layer) const { return kLinearVectorBuffers * columns * 4 * (layer == Layer::kProject ? 2 : 1); }
  constexpr int x_panels_a_slot() const { return slot_bytes() / (rows() * kLinearDepth * 2); }
  // What was measured best (NOTES.md): sharing A's loads helps the projection, and couples the expansion's blocks for nothing.
  constexpr bool serves(Layer layer) const { return warpgroups == 1 || (cluster == 2) == (layer == Layer::kProject); }
  constexpr int slots(Layer layer = Layer::kExpand) const {
    return std::min(kMaxLinearSlots, (kLinearSharedMemory - kLinearBarrierBytes - vector_bytes(layer)) / slot_bytes());
  }
  constexpr int threads() const { return 128 * (1 + warpgroups); }
  constexpr int shared_bytes(Layer layer) const { return slots(layer) * slot_bytes() + vector_bytes(layer) + kLinearBarrierBytes; }
};

// The compiled tiles, by index; instantiations_sm90/generate_sm90.py has the same table.
constexpr LinearTile kLinearTiles[] = {{3, 192, 2}, {3, 128, 2}, {3, 128, 1}, {1, 64, 1}};
constexpr int kLinearTileCount = sizeof(kLinearTiles) / sizeof(kLinearTiles[0]);

struct LinearPlan {
  int tile;           // index into kLinearTiles
  int grid;           // blocks, persistent: a multiple of the tile's cluster
  int rounds;         // tiles that the busiest block computes
  int shared_memory;  // bytes
  int threads;
  double cost;        // estimated microseconds
};

// Compile-time description of one kernel.
template <DType kDType_, Layer kLayer_, Activation kActivation_, int kTile_>
struct LinearTraits {
  static constexpr DType kDType = kDType_;
  static constexpr Layer kLayer = kLayer_;
  static constexpr Activation kActivation = kActivation_;
  static constexpr LinearTile kTile = kLinearTiles[kTile_];
  static constexpr bool kHalfActivation = kDType == DType::kHalf;
  static constexpr int kWarpgroups = kTile.warpgroups, kColumns = kTile.columns, kCluster = kTile.cluster, kRows = kTile.rows();
  static constexpr int kBlocks = kTile.blocks();
  static constexpr int kSlots = kTile.slots(kLayer), kSlotBytes = kTile.slot_bytes(), kABytes = kRows * kLinearDepth * 2;
  static constexpr int kVectors = kLayer == Layer::kProject ? 2 : 1;
  static constexpr int kVectorOffset = kSlots * kSlotBytes, kBarrierOffset = kVectorOffset + kTile.vector_bytes(kLayer);
  static constexpr int kPanels = kColumns / 64, kXPanelBytes = kRows * kLinearDepth * 2, kXPanelsASlot = kTile.x_panels_a_slot();
  static constexpr int kThreads = kTile.threads();
  static constexpr int kConsumerRegisters = kWarpgroups == 3 ? 160 : 240;
  static constexpr int kProducerRegisters = kWarpgroups == 3 ? 32 : 40;
  static_assert(kTile.serves(kLayer) && kColumns % 64 == 0 && kColumns <= 192 && kSlots >= 2 && 2 * kSlots * 8 <= kLinearBarrierBytes);
};

// The compiled kernel; defined in launch_linear_sm90.cuh, instantiated in instantiations_sm90/. Returns cudaError_t as int.
template <class Traits>
struct LinearKernel {
  static int launch(const LinearProblem&, const LinearTensors&, const LinearPlan&, bool overlap_previous, cudaStream_t);
};

// ---------------------------------------------------------------------------------------------------------------------------
// Choice of tile

inline int64_t linear_groups(const LinearProblem& q, const LinearTile& t) {  // clusters' worth of tiles
  const int64_t column_tiles = (q.columns + t.columns - 1) / t.columns;
  return (q.rows + t.rows() - 1) / t.rows() * ((column_tiles + t.cluster - 1) / t.cluster);
}

inline int linear_steps(const LinearProblem& q) { return (q.depth + kLinearDepth - 1) / kLinearDepth; }

// Rounds of the busiest block at what a tile takes, and a fixed part; fitted to the H200's measured times (NOTES.md).
inline LinearPlan plan_linear_tile(const LinearProblem& q, const Device& device, int index) {
  constexpr double kClockMhz = 1550, kFixedMicroseconds = 1.5, kFixedClocks = 2500, kBlockClocks = 1000;
  const LinearTile& t = kLinearTiles[index];
  const int64_t groups = linear_groups(q, t), clusters = std::min<int64_t>(groups, device.multiprocessors / t.cluster);
  const int64_t rounds = (groups + clusters - 1) / clusters;
  // One warpgroup alone leaves gaps between its products; on every multiprocessor at once its small tiles also ask much of L2.
  const double rate = t.warpgroups > 1 ? 0.9 : rounds == 1 ? 0.6 : 0.42;
  const double slice = t.rows() * t.columns * kLinearDepth / 2048.0 / rate;
  const double epilogue = t.rows() * t.columns / 16.0;
  // A block of the expansion's epilogue takes longer than the slice that it runs under.
  const double exposed = q.layer == Layer::kExpand ? t.blocks() * std::max(0.0, kBlockClocks - slice) : 0;
  const double clocks =
      rounds * (linear_steps(q) * slice + 0.2 * epilogue) + (rounds - 1) * exposed + 0.8 * epilogue + kFixedClocks;
  LinearPlan plan{};
  plan.tile = index;
  plan.grid = static_cast<int>(clusters * t.cluster);
  plan.rounds = static_cast<int>(rounds);
  plan.shared_memory = t.shared_bytes(q.layer);
  plan.threads = t.threads();
  plan.cost = kFixedMicroseconds + clocks / kClockMhz;
  return plan;
}

// The tile of least estimated time.
inline LinearPlan plan_linear(const LinearProblem& q, const Device& device) {
  LinearPlan best{};
  for (int i = 0; i < kLinearTileCount; ++i) {
    if (!kLinearTiles[i].serves(q.layer)) continue;
    const LinearPlan plan = plan_linear_tile(q, device, i);
    if (best.grid == 0 || plan.cost < best.cost) best = plan;
  }
  return best;
}

inline bool linear_supports(const LinearProblem& q) {
  return q.rows > 0 && q.columns > 0 && q.depth > 192 && q.columns % 32 == 0 && q.depth % 8 == 0 &&
         q.rows * std::max(q.columns, q.depth) <= (int64_t{1} << 40) && q.rows < (int64_t{1} << 31) - 4096;
}

// Launches the planned kernel. `overlap_previous`: by programmatic dependent launch its prologue, which loads weights and vectors,
// runs under the stream's previous kernel; that one must not write them. Returns cudaError_t as int; never synchronises.
int launch_linear(const LinearProblem&, const LinearTensors&, const LinearPlan&, bool overlap_previous, cudaStream_t);

}  // namespace convfirst::block_fusion::sm90
