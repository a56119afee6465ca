// Host face of the Hopper kernel for 3x3 filters of stride 1 on 64 channels, whose filters stay in shared memory: what it takes, how it is
// configured, what it should cost. Problem and data as of implicit_gemm_sm90.h. No CUDA types beyond the stream.
#pragma once

#include "halo_gemm_sm90.h"

namespace convfirst::direct::sm90 {

constexpr int kResidentChannels = 64, kResidentTaps = 9;
constexpr int kResidentPitch = 16, kResidentHeight = 8, kResidentWidth = kResidentPitch - 2;  // of a tile: pixels of a row with halo, rows, pixels without
constexpr int kResidentTileBytes = 21 * 1024;  // 10 rows of 16 pixels, and what the last tap reads beyond

struct ResidentPlan {
  int columns;  // filters of a block: 64 or 128
  int tiles_p, tiles_q, tiles, groups;  // tiles: of all images; groups: of filters
  int grid, shared_memory, threads;
  double cost;  // estimated microseconds
};

// Compile-time description of one kernel. A warpgroup computes whole tiles, 128 rows.
template <DType kDType_, int kColumns_>
struct ResidentTraits {
  static constexpr DType kDType = kDType_;
  static constexpr int kColumns = kColumns_, kBlocks = kColumns / 32, kWarpgroups = kColumns == 64 ? 3 : 2;
  static constexpr int kThreads = 128 * kWarpgroups + 32;
  static constexpr int kTapBytes = kColumns * kResidentChannels * 2, kFilterBytes = kResidentTaps * kTapBytes;
  static constexpr int kSlots = std::min(6, (kSharedMemory - kBarrierBytes - kFilterBytes) / kResidentTileBytes);
  static constexpr int kBarrierOffset = kFilterBytes + kSlots * kResidentTileBytes, kSharedBytes = kBarrierOffset + kBarrierBytes;
  static_assert(kSlots > kWarpgroups && (2 * kSlots + kResidentTaps) * 8 <= kBarrierBytes);
};

// The compiled kernel; defined in launch_resident_halo_sm90.cuh, instantiated in instantiations_sm90/. Returns cudaError_t as int.
template <class Traits>
struct ResidentKernel {
  static int launch(const GemmProblem&, const GemmTensors&, const ResidentPlan&, cudaStream_t);
  static const void* kernel();
};

// Of one dtype, defined in instantiations_sm90/.
template <DType kDType>
struct ResidentKernels {
  static int launch(const GemmProblem&, const GemmTensors&, const ResidentPlan&, cudaStream_t);
  static const void* kernel(int columns);
};

// Returns cudaError_t as int and never synchronises.
int launch_resident(const GemmProblem&, const GemmTensors&, const ResidentPlan&, cudaStream_t);
const void* resident_kernel(DType dtype, int columns);

inline bool resident_supports(const GemmProblem& q) { return halo_supports(q, 1) && q.channels == kResidentChannels; }

inline ResidentPlan plan_resident(const GemmProblem& q, const Device& device, int columns) {
  constexpr double kClockMhz = 1600, kFixedMicroseconds = 5;
  ResidentPlan plan{};
  plan.columns = columns;
  plan.tiles_p = (q.out_h + kResidentHeight - 1) / kResidentHeight, plan.tiles_q = (q.out_w + kResidentWidth - 1) / kResidentWidth;
  plan.tiles = static_cast<int>(q.batch * plan.tiles_p * plan.tiles_q), plan.groups = (q.filters + columns - 1) / columns;
  const int streams = std::max(1, std::min(plan.tiles, device.multiprocessors / plan.groups));
  plan.grid = streams * plan.groups;
  plan.shared_memory = columns == 64 ? ResidentTraits<DType::kHalf, 64>::kSharedBytes : ResidentTraits<DType::kHalf, 128>::kSharedBytes;
  plan.threads = columns == 64 ? ResidentTraits<DType::kHalf, 64>::kThreads : ResidentTraits<DType::kHalf, 128>::kThreads;
  const double tile = kResidentTaps * 4 * 2 * columns / 2 / 0.85, rounds = (plan.tiles + streams - 1) / streams;
  const double bytes = 2.0 * q.pixels() * (q.channels + q.filters);
  plan.cost = kFixedMicroseconds + std::max(rounds * tile / kClockMhz, bytes / 2.6e6);
  return plan;
}

}  // namespace convfirst::direct::sm90
