// Host face of the Hopper kernel for first layers of few products: filters of at most 32 values, as 3x3 of RGB. No CUDA types beyond the stream.
#pragma once

#include <algorithm>
#include <cstdint>

#include "params.h"

namespace convfirst::direct::sm90 {

constexpr int kFewDepth = 32;    // values of a filter, filled up with zeros
constexpr int kFewColumns = 64;  // filters of a block
constexpr int kFewThreads = 256;
constexpr int kFewBlocks = 2;    // of a multiprocessor

struct FewPlan {
  int grid_x, grid_y;
  double cost;  // estimated microseconds
};

inline bool few_supports(const Problem& q) {
  return q.direction == Direction::kForward && q.dtype != DType::kFloat && q.taps() * q.channels <= kFewDepth && q.dilation_w == 1 && q.dilation_h == 1 &&
         q.filters % 8 == 0 && q.out_pixels() > 0;
}

inline FewPlan plan_few(const Problem& q, const Device& device) {
  FewPlan plan{};
  const int64_t tiles = (q.out_pixels() + 15) / 16, warps = kFewThreads / 32;
  plan.grid_y = (q.filters + kFewColumns - 1) / kFewColumns;
  plan.grid_x = static_cast<int>(std::min<int64_t>((tiles + warps - 1) / warps, std::max(1, kFewBlocks * device.multiprocessors / plan.grid_y)));
  const double bytes = 2.0 * q.out_pixels() * q.filters;
  plan.cost = 7 + bytes / 1.94e6;  // measured on an H100 (NOTES.md)
  return plan;
}

// Each returns cudaError_t as int and never synchronises.
int launch_few(const Problem&, const Tensors&, const FewPlan&, cudaStream_t);
const void* few_kernel(DType dtype);

}  // namespace convfirst::direct::sm90
