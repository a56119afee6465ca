// Host face of Hopper's fused F(2x2, 3x3) in 16 bits: what it takes, its tile and shared memory, how it is launched. Pure functions of the
// problem and the device; no CUDA types beyond the stream. fused_fwd_sm90_wgmma.cuh draws the kernel.
#pragma once

#include <algorithm>

#include "winograd/params.h"

namespace convfirst::winograd::sm90 {

constexpr int kPoints = 16, kFilters = 32, kDepth = 32;  // transform points; filters and channels of a slice
// A strip: one row of 8 pairs of tiles, a tile and the one below it, 16 x 4 pixels of y; one warp of each warpgroup has it.
constexpr int kStrips = 4, kStripColumns = 16, kStripRows = 4;
constexpr int kPatchRows = kStripRows + 2, kPatchPitch = kStripColumns / 2 + 1;  // of x, columns of one parity
constexpr int kPixelBytes = kDepth * 2;
constexpr int kParityBytes = 3584;  // kPatchRows x kPatchPitch pixels, up to the next repetition of the swizzle, 512 bytes
constexpr int kPatchBytes = kPatchRows * kPatchPitch * kPixelBytes;  // of them what a load brings
constexpr int kStripBytes = 2 * kParityBytes, kDataBytes = kStrips * kStripBytes;
constexpr int kPointBytes = kFilters * kPixelBytes, kFilterBytes = kPoints * kPointBytes;
constexpr int kDataSlots = 3, kFilterSlots = 4;
constexpr int kWarpgroups = 2, kThreads = 128 * (kWarpgroups + 1);  // and the producer's
constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;  // of the 168 each that the block is launched with
static_assert(kWarpgroups * kConsumerRegisters + kProducerRegisters <= 168 * (kWarpgroups + 1));
constexpr int kExchangeBytes = 2 * 128 * kWarpgroups * 16;  // two rounds of 16 bytes a thread
constexpr int kDataOffset = kFilterSlots * kFilterBytes, kExchangeOffset = kDataOffset + kDataSlots * kDataBytes;
constexpr int kBarrierOffset = kExchangeOffset + kExchangeBytes, kBarriers = 2 * (kDataSlots + kFilterSlots);
constexpr int kSharedBytes = kBarrierOffset + kBarriers * 8;
static_assert(kPatchBytes <= kParityBytes && kParityBytes % 512 == 0 && kFilterBytes % 1024 == 0);

struct FusedPlan {
  int slices;          // of kDepth channels
  int strip_columns, strip_rows;  // strips of an image
  int strips, blocks;  // of all images; kStrips of them are a block's tile
  int groups;          // of kFilters filters
  int grid;            // thread blocks: `groups` of them take the same tiles, one after another

  // The filters of all slices stay in shared memory.
  constexpr bool resident() const { return slices <= kFilterSlots; }
};

constexpr FusedPlan plan_fused(const Problem& p, int multiprocessors) {
  FusedPlan plan{};
  plan.slices = static_cast<int>(ceil_div(p.channels, kDepth));
  plan.strip_columns = static_cast<int>(ceil_div(p.out_width(), kStripColumns));
  plan.strip_rows = static_cast<int>(ceil_div(p.out_height(), kStripRows));
  plan.strips = p.batch * plan.strip_columns * plan.strip_rows;
  plan.blocks = static_cast<int>(ceil_div(plan.strips, kStrips));
  plan.groups = static_cast<int>(ceil_div(p.outputs, kFilters));
  plan.grid = plan.groups * std::max(1, std::min(plan.blocks, multiprocessors / plan.groups));
  return plan;
}

// TMA wants strides of 16 bytes, and columns of both parities.
constexpr bool fused_supports(const Problem& p) {
  return p.dtype != DType::kFloat && p.channels % 8 == 0 && p.outputs % 8 == 0 && p.width >= 2;
}

// Each returns cudaError_t as int and never synchronises; defined in fused_half_sm90.cu and fused_bfloat16_sm90.cu.
int launch_fused_half(const Problem& problem, const Tensors& tensors, const FusedPlan& plan, cudaStream_t stream);
int launch_fused_bfloat16(const Problem& problem, const Tensors& tensors, const FusedPlan& plan, cudaStream_t stream);

}  // namespace convfirst::winograd::sm90
