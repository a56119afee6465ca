// How the convolution's weight gradient is divided among blocks.
#include "conv_bwd_weights.h"

#include <algorithm>

namespace convfirst::block_fusion {
namespace {

constexpr int kReserved = 1024;                          // of a multiprocessor's shared memory, by the system, a block
constexpr int kWarps = kWeightGradientThreads / 32;

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

void cut(WeightGradientPlan& plan, const WeightGradientProblem& p) {
  plan.tiles_n = ceil_div(p.batch, plan.images), plan.tiles_y = ceil_div(p.height, plan.rows), plan.tiles_x = ceil_div(p.width, plan.columns);
}

void share(WeightGradientPlan& plan, const WeightGradientProblem& p, int blocks) {
  plan.channel_blocks = ceil_div(p.channels, plan.channel_block);
  plan.slices = std::max(1, std::min(plan.tiles(), blocks / plan.channel_blocks));
}

int64_t staged_pixels(const WeightGradientPlan& plan, int k) {
  const int x_columns = plan.columns + grouped_tap_columns(k) * grouped_splits(k) - 1;
  return int64_t{plan.images} * ((plan.rows + k - 1) * x_columns + plan.rows * plan.columns);
}

// Bytes of the exchange between warps at the end.
int exchange_bytes(const WeightGradientProblem& p, int combinations) {
  return (kWarps - combinations) * grouped_sums(p.kernel_size, p.group_width) * 4 * 32 * 4;
}

WeightGradientPlan plan_grouped(const WeightGradientProblem& p, const Device& device) {
  const int k = p.kernel_size, together = grouped_blocks(k, p.group_width);
  const int memory = std::min(device.max_shared_memory, (device.max_shared_memory + kReserved) / together - kReserved);
  WeightGradientPlan best{};
  best.channel_block = k < 7 && p.channels % 64 == 0 ? 64 : 32;
  const int combinations = best.channel_block / 16 * grouped_splits(k), ranks = kWarps / combinations;
  const int pixel = best.channel_block * 2 + 16, wanted = together == 2 ? 2 : 3;  // stages
  int64_t best_cost = 0;
  for (int images : {1, 2, 4, 8}) {
    for (int strips : {1, 2, 4}) {
      for (int rows = 2; rows <= 16; rows += 2) {
        WeightGradientPlan plan = best;
        plan.images = images, plan.rows = rows, plan.columns = 8 * strips;
        cut(plan, p);
        const int64_t stage = staged_pixels(plan, k) * pixel;
        const int stages = static_cast<int>(std::min<int64_t>(wanted, memory / stage));
        if (stages < 2) continue;
        // Pixels copied, and those multiplied by the warp that has most.
        const int64_t work = int64_t{ceil_div(images * strips, ranks)} * ranks * rows * 8;
        const int64_t cost = plan.tiles() * (staged_pixels(plan, k) + work + 16);
        if (best.stages != 0 && cost >= best_cost) continue;
        best = plan, best_cost = cost, best.stages = stages;
        best.shared_memory = std::max(static_cast<int>(stages * stage), exchange_bytes(p, combinations));
      }
    }
  }
  if (best.shared_memory > memory) best.stages = 0;
  share(best, p, together * device.multiprocessors);
  return best;
}

WeightGradientPlan plan_depthwise(const WeightGradientProblem& p, const Device& device) {
  WeightGradientPlan best{};
  best.channel_block = kDepthwiseChannels;
  int64_t best_cost = 0;
  for (int i = 0; i < kDepthwiseShapes; ++i) {
    const DepthwiseShape shape = depthwise_shape(p.kernel_size, i);
    WeightGradientPlan plan = best;
    plan.images = shape.images, plan.rows = shape.rows(), plan.columns = shape.columns(), plan.stages = 2;
    const int sums = (kWarps - 1) * (p.taps() + 1) * kDepthwiseChannels * 4;
    plan.shared_memory = std::max(2 * shape.stage_bytes(p.kernel_size), sums);
    cut(plan, p);
    const int64_t cost = int64_t{plan.tiles()} * (shape.unit_columns + 1);  // a unit's columns, and filling the window
    if (plan.shared_memory > device.max_shared_memory || (best.stages != 0 && cost >= best_cost)) continue;
    best = plan, best_cost = cost;
  }
  share(best, p, device.multiprocessors);
  return best;
}

}  // namespace

WeightGradientPlan plan_weight_gradient(const WeightGradientProblem& problem, const Device& device) {
  return problem.group_width == 1 ? plan_depthwise(problem, device) : plan_grouped(problem, device);
}

}  // namespace convfirst::block_fusion
