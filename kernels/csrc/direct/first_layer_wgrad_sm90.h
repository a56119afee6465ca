// Host face of the Hopper weight gradient of first layers: few channels (RGB), filters of up to 12 rows. No CUDA types beyond the stream.
#pragma once

#include "first_layer_sm90.h"
#include "wgrad_sm90.h"

namespace convfirst::direct::sm90 {

constexpr int kFirstWgradRows = 12;      // of a filter
constexpr int kFirstWgradColumns = 8 * kFirstWgradRows;
constexpr int kFirstWgradPositions = 3;  // chunks of a window's row that one warpgroup makes
constexpr int kFirstWgradWarpgroups = 2;
constexpr int kFirstWgradSection = kFirstWgradPositions * kFirstWgradWarpgroups;  // chunks of a block
constexpr int kFirstWgradThreads = 128 * (1 + kFirstWgradWarpgroups);
constexpr int kFirstWgradFilters = 64;   // of a block
constexpr int kFirstWgradYBytes = 64 * kFirstWgradFilters * 2;
constexpr int kFirstWgradQuads = kFirstWgradPositions * kFirstWgradColumns / 8;  // of sums, a thread
constexpr int64_t kFirstWgradPartialBytes = int64_t{16} * kFirstWgradQuads * 128 * kFirstWgradWarpgroups;
constexpr int kFirstWgradMaxSlots = 8;

struct FirstWgradPlan {
  FirstLayout layout;
  int sections;         // of a window's row, kFirstWgradSection chunks each
  int groups;           // of 64 filters and a section
  int strips;           // of 64 output columns
  int steps;            // rows of 64 output pixels
  int sharers;          // blocks of a group, an even share of the steps each
  int padded_rows;      // of an image in the workspace
  int slots, slot_bytes, shared_memory;
  int64_t rearranged;   // bytes, the start of the workspace
  int64_t workspace;
  double cost;          // estimated microseconds
};

inline FirstWgradPlan plan_first_wgrad(const Problem& q, const Device& device) {
  FirstWgradPlan plan{};
  plan.layout = first_layout(q, 1);
  plan.sections = (plan.layout.row_chunks + kFirstWgradSection - 1) / kFirstWgradSection;
  plan.groups = (q.filters + kFirstWgradFilters - 1) / kFirstWgradFilters * plan.sections;
  plan.strips = (q.out_w() + 63) / 64;
  plan.steps = static_cast<int>(q.batch * plan.strips * q.out_h());
  plan.sharers = std::max(1, std::min(device.multiprocessors / plan.groups, plan.steps / 4));
  plan.padded_rows = (q.out_h() - 1) * q.stride_h + q.kernel_h;
  plan.slot_bytes = kFirstWgradYBytes + (plan.layout.buffer_bytes() + 1023) / 1024 * 1024;
  // A filter of fewer rows than 12 reads on past its slot, into what it leaves out.
  const int beyond = (kFirstWgradRows - q.kernel_h) * plan.layout.row_bytes();
  plan.slots = std::min(kFirstWgradMaxSlots, (kWgradSharedMemory - kWgradBarrierBytes - beyond) / plan.slot_bytes);
  plan.shared_memory = plan.slots * plan.slot_bytes + beyond + kWgradBarrierBytes;
  plan.rearranged = (q.batch * plan.strips * plan.padded_rows * plan.layout.row_bytes() + 255) / 256 * 256;
  plan.workspace = plan.rearranged + plan.groups * plan.sharers * kFirstWgradPartialBytes;
  const double rows = static_cast<double>(plan.steps) / plan.sharers;
  plan.cost = 12 + rows * 2000 / 1600 + plan.rearranged * 2 / 3e6 + plan.groups * plan.sharers * kFirstWgradPartialBytes / 2e6;
  return plan;
}

inline bool first_wgrad_supports(const Problem& q, const Device& device) {
  const bool stride = q.stride_w == 1 || q.stride_w == 2 || q.stride_w == 4 || q.stride_w == 8;
  if (q.direction != Direction::kWgrad || q.dtype == DType::kFloat || !stride || q.dilation_h != 1 || q.dilation_w != 1 || q.channels < 1 ||
      q.channels > (q.stride_w == 1 ? 8 : 4) || q.filters % 8 != 0 || q.kernel_h > kFirstWgradRows || q.out_pixels() <= 0 ||
      device.max_shared_memory < kWgradSharedMemory) {
    return false;
  }
  const FirstWgradPlan plan = plan_first_wgrad(q, device);
  return plan.groups <= device.multiprocessors && plan.slots >= 2;
}

}  // namespace convfirst::direct::sm90
