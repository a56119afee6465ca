#include "winograd/plan.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "winograd/fused_sm90.h"

namespace convfirst::winograd {
namespace {

// Larger chunks are faster as far as they were measured, also past the L2 cache: fewer launches, fewer ragged last rounds.
constexpr int64_t kWorkspaceBytes = int64_t{256} << 20;
constexpr int kMaxSplits = 4;  // as many as were measured

struct Tile {
  int rows, columns;
  double penalty;  // time of a warp against the best tile's

  constexpr int warps() const { return rows * columns / 2048; }
};
constexpr Tile kTiles[] = {{128, 128, 1.15}, {128, 64, 1.0}, {64, 64, 1.03}, {32, 64, 1.16}};

// Measured on an H200 in float32 (NOTES.md): clocks of a warp for a slice where three warps of a scheduler share it, and what
// fewer of them get done.
constexpr double kSliceClocks = 1480, kBlockClocks = 3000, kLaunchClocks = 4000, kSplitClocks = 4500;
constexpr double kBytesAClock = 13;  // of a multiprocessor, in the transforms
double efficiency(double warps) { return warps >= 3 ? 1 : warps >= 2 ? 0.8 + 0.2 * (warps - 2) : 0.5 + 0.3 * (warps - 1); }

int64_t bytes_of_tile(const Problem& p, int m, int splits) {
  return int64_t{(m + 2) * (m + 2)} * (p.channel_pitch() * bytes_of(p.dtype) + int64_t{splits} * p.output_pitch() * 4);
}

SplitPlan plan_split(const Problem& p, int m, int multiprocessors) {
  const int points = (m + 2) * (m + 2), slices = p.channel_pitch() * bytes_of(p.dtype) / 4 / kSlice;
  SplitPlan best{};
  double best_cost = 0;
  for (const Tile& tile : kTiles) {
    if (p.output_pitch() % tile.columns != 0) continue;
    for (int splits = 1; splits <= std::min(kMaxSplits, slices); splits *= 2) {
      const int64_t in_workspace = std::max<int64_t>(1, kWorkspaceBytes / bytes_of_tile(p, m, splits) / tile.rows) * tile.rows;
      const int64_t chunks = ceil_div(p.tiles(m), in_workspace), chunk = round_up(ceil_div(p.tiles(m), chunks), tile.rows);
      const int64_t blocks = ceil_div(chunk, tile.rows) * (p.output_pitch() / tile.columns) * points * splits;
      const double warps = double(ceil_div(blocks, multiprocessors)) * tile.warps() / 4;  // of a scheduler
      const double slice = kSliceClocks * tile.penalty / 3 * std::max(1.0, warps) / efficiency(std::max(1.0, warps));
      const double inverse = double(splits) * chunk * p.output_pitch() * points * 4 / multiprocessors / kBytesAClock;
      const double cost = chunks * (slice * ceil_div(slices, splits) + kBlockClocks + kLaunchClocks + (splits - 1) * kSplitClocks + inverse);
      if (best_cost == 0 || cost < best_cost) best = {tile.rows, tile.columns, splits, chunk}, best_cost = cost;
    }
  }
  return best;
}

// With few channels the split path's traffic is more than the products: there one kernel was measured to be faster.
bool prefers_fused(const Problem& p, int m, int multiprocessors, int max_shared_memory) {
  const int64_t blocks = ceil_div(p.tiles(m), 32) * ceil_div(p.outputs, m == 2 ? 64 : 32);
  return p.dtype == DType::kFloat && max_shared_memory >= fused_shared_bytes(m) && p.channels <= (m == 2 ? 64 : 16) && blocks >= multiprocessors;
}

}  // namespace

Plan make_plan(const Problem& p, int m, int multiprocessors, int max_shared_memory, bool hopper) {
  if (hopper && m == 2 && sm90::fused_supports(p) && max_shared_memory >= sm90::kSharedBytes) return {true, {}};
  if (prefers_fused(p, m, multiprocessors, max_shared_memory)) return {true, {}};
  return {false, plan_split(p, m, multiprocessors)};
}

int64_t workspace_bytes(const Problem& p, int m, const Plan& plan) {
  if (plan.fused) return 0;
  return round_up(std::min(plan.split.chunk, p.tiles(m)), plan.split.block_rows) * bytes_of_tile(p, m, plan.split.splits);
}

GradientPlan plan_weight_gradient(const Problem& p, int multiprocessors) {
  const int64_t outputs = p.output_pitch(), channels = GradientPlan{}.channels(p);
  const bool large = outputs % 128 == 0 && channels % 128 == 0;
  const int64_t blocks = 16 * outputs * channels / (large ? 128 * 128 : 64 * 64), resident = large ? 2 : 4;
  const int64_t tiles = p.tiles(2);
  // Enough splits to fill the device, but slices enough in each to pay for its epilogue.
  const int64_t wanted = ceil_div(multiprocessors * resident, blocks), longest = std::max<int64_t>(1, tiles / (8 * kSlice));
  const int splits = static_cast<int>(std::max<int64_t>(1, std::min(wanted, longest)));
  const int64_t grain = int64_t{kSlice} * splits, in_workspace = kWorkspaceBytes / (16 * 4 * (outputs + channels)) / grain * grain;
  return {std::min(round_up(tiles, grain), std::max(in_workspace, 8 * grain)), splits};
}

int64_t workspace_bytes(const Problem& p, const GradientPlan& plan) {
  const int64_t outputs = p.output_pitch(), channels = plan.channels(p);
  return 16 * 4 * (plan.chunk * (outputs + channels) + plan.splits * outputs * channels);
}

std::string describe(const Plan& plan) {
  if (plan.fused) return "fused";
  const SplitPlan& split = plan.split;
  std::ostringstream out;
  out << "split " << split.block_rows << " " << split.block_columns << " " << split.splits << " " << split.chunk;
  return out.str();
}

Plan parse_plan(const std::string& text) {
  if (text == "fused") return {true, {}};
  std::istringstream in(text);
  std::string path;
  SplitPlan plan{};
  in >> path >> plan.block_rows >> plan.block_columns >> plan.splits >> plan.chunk;
  bool known = false;
  for (const Tile& tile : kTiles) known = known || (tile.rows == plan.block_rows && tile.columns == plan.block_columns);
  if (!in || path != "split" || !known || plan.splits < 1 || plan.chunk < 1 || plan.chunk % plan.block_rows != 0) {
    throw std::runtime_error("winograd_conv2d: plan is '" + text +
                             "'; expected 'fused' or 'split <rows> <columns> <splits> <chunk>' with a tile of 128 128, 128 64, 64 64 or 32 64 and a "
                             "chunk that is a multiple of its rows");
  }
  return {false, plan};
}

}  // namespace convfirst::winograd
