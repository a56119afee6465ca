// Host face of the Hopper kernel for 3x3 filters of stride 1 on 64 channels, whose filters stay in shared memory: what it takes, how it is
// configured, what it should cost. Problem and data as of implicit_gemm_sm90.h. No CUDA types beyond the stream.
#pragma once

#include "halo_gemm_sm90.h"

namespace convfirst::direct::sm90 {

constexpr int kResidentChannels = 64, kResidentTaps = 9;
constexpr int kResidentPitch = 16, kResidentHeight = 8, kResidentWidth = kResidentPitch - 2;  // of a tile: pixels of a row with halo, rows, pixels without
constexpr int kResidentTileBytes = 21 * 1024;  // 10 rows of 16 pixels, and what the last tap reads beyond

constexpr int kResidentColumns = 64;  // filters of a block; 128 of them leave shared memory for three tiles, and were slower (NOTES.md)

struct ResidentPlan {
  int tiles_p, tiles_q, tiles, groups;  // tiles: of all images; groups: of filters
  int grid, shared_memory, threads;
  double cost;  // estimated microseconds
};

// Compile-time description of one kernel. A warpgroup computes whole tiles, 128 rows.
template <DType kDType_>
struct ResidentTraits {
  static constexpr DType kDType = kDType_;
  static constexpr int kColumns = kResidentColumns, kBlocks = kColumns / 32, kWarpgroups = 3;
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
  static const void* kernel();
};

// Returns cudaError_t as int and never synchronises.
int launch_resident(const GemmProblem&, const GemmTensors&, const ResidentPlan&, cudaStream_t);
const void* resident_kernel(DType dtype);

inline bool resident_supports(const GemmProblem& q) { return halo_supports(q, 1) && q.channels == kResidentChannels; }

inline ResidentPlan plan_resident(const GemmProblem& q, const Device& device) {
  using Traits = ResidentTraits<DType::kHalf>;
  constexpr double kFixed = 2.8, kTile = 2.0;  // microseconds, measured on an H100 (NOTES.md)
  ResidentPlan plan{};
  plan.tiles_p = (q.out_h + kResidentHeight - 1) / kResidentHeight, plan.tiles_q = (q.out_w + kResidentWidth - 1) / kResidentWidth;
  plan.tiles = static_cast<int>(q.batch * plan.tiles_p * plan.tiles_q), plan.groups = (q.filters + kResidentColumns - 1) / kResidentColumns;
  const int streams = std::max(1, std::min(plan.tiles, device.multiprocessors / plan.groups));
  plan.grid = streams * plan.groups, plan.shared_memory = Traits::kSharedBytes, plan.threads = Traits::kThreads;
  plan.cost = kFixed + kTile * ((plan.tiles + streams - 1) / streams);
  return plan;
}

}  // namespace convfirst::direct::sm90
