// Host face of the portable split path's first launch, A = LayerNorm(conv(x) + bias), a dense [batch * height * width, channels] matrix: which of
// its kernels a problem takes, and how. Pure functions of problem and device.
#pragma once

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <type_traits>

#include "conv_norm_sm90.h"
#include "diagonal_conv_norm_sm80.h"
#include "grouped_conv_norm_sm90.h"
#include "image_conv_norm_sm90.h"
#include "launch_sm80.h"

namespace convfirst::block_fusion::sm80 {

// Slices of channels on CUDA cores or, grouped, with a warp's filter in registers: fits every device. Tiles and images: depthwise, on tensor
// cores and an image a block. Grouped: a tile's channels at once. Diagonal: depthwise, on tensor cores, a tap a diagonal matrix.
enum class First { kSlices, kTiles, kImages, kGrouped, kDiagonal };

struct FirstPlan {
  First first;
  double cost;  // microseconds
  int shared_memory;
  Geometry slices;
  int buffers;
  sm90::ConvNormPlan tiles;
  sm90::ImagePlan images;
  sm90::GroupedPlan grouped;
  DiagonalPlan diagonal;
};

// Each returns cudaError_t as int.
template <DType kType, int kKernel, int kGroupWidth, int kMTiles>
struct GroupedConvNorm {
  static int launch(const sm90::GroupedParams&, cudaStream_t);
};

template <DType kType, int kWidth>
struct ImageConvNorm {
  static int launch(const sm90::ImageParams&, const sm90::ImagePlan&, cudaStream_t);
};

template <DType kType>
struct TilesConvNorm {
  static int launch(const sm90::ConvNormParams&, cudaStream_t);
};

template <DType kType>
struct DiagonalConvNorm {
  static int launch(const DiagonalParams&, cudaStream_t);
};

namespace first {

// Fitted to measured launches (NOTES.md): clocks of a tile of the older launch beyond its multiply-adds, and what cp.async in the place of TMA
// and bulk copies adds to the others.
constexpr double kGroupedSliceClocks = 9000, kDepthwiseSliceClocks = 3500;
constexpr double kTilesFactor = 1.1, kImagesAdd = 5;

// Maps wider than 8 pixels, one block a tile: the tile of the least estimated time.
inline bool tiles_plan(const Problem& q, const Device& device, sm90::ConvNormPlan* best) {
  if (!sm90::conv_norm_covers(q) || q.channels > sm90::kConvNormMostSlab || q.width <= 8) return false;
  double least = 1e30;
  sm90::ConvNormPlan plan{};
  plan.cluster = 1, plan.slab = q.channels;
  const int most_strips = static_cast<int>(std::min<int64_t>(sm90::kConvNormSlots, sm90::conv_norm::ceil_div(q.width, 8)));
  for (int strips = 1; strips <= most_strips; ++strips) {
    for (int rows = static_cast<int>(std::min<int64_t>(7, q.height)); rows <= std::min<int64_t>(8, q.height); ++rows) {
      const int most_groups =
          static_cast<int>(std::min<int64_t>(sm90::kConvNormSlots / strips, sm90::conv_norm::ceil_div(q.height, rows)));
      for (int groups = 1; groups <= most_groups; ++groups) {
        const bool whole = strips * 8 >= q.width && groups * rows >= q.height;
        const int most_images = whole ? static_cast<int>(std::min<int64_t>(q.batch, sm90::kConvNormSlots / (strips * groups))) : 1;
        for (int images = 1; images <= most_images; ++images) {
          plan.tile = sm90::conv_norm::laid_out(q, images, groups, rows, strips);
          if (!sm90::conv_norm::place(q, device, &plan)) continue;
          const double cost = sm90::conv_norm_cost(q, device, plan);
          if (cost < least) least = cost, *best = plan;
        }
      }
    }
  }
  return least < 1e30;
}

inline bool images_plan(const Problem& q, const Device& device, sm90::ImagePlan* plan) {
  return sm90::image_plan(q, {90, device.multiprocessors, device.max_shared_memory}, plan);  // what it wants Hopper for is left out here
}

// The older launch: one block a tile of a few pixels.
inline bool slices_plan(const Problem& q, const Device& device, FirstPlan* plan) {
  const bool depthwise = q.group_width == 1;
  const ConvTile tile = conv_tile(depthwise);
  if (q.channels > tile.max_channels) return false;
  plan->slices = choose_geometry(q, tile.pixels, depthwise);
  const int slice_bytes = plan->slices.halo_pixels * row_bytes(tile.slice), region = conv_layout(q.channels, depthwise).region;
  if (plan->slices.tiles == 0 || region + slice_bytes > device.max_shared_memory) return false;
  const int64_t slices = std::min<int64_t>(depthwise ? 1 : 4, (q.channels + tile.slice - 1) / tile.slice);
  plan->buffers = static_cast<int>(std::min<int64_t>(slices, (device.max_shared_memory - region) / slice_bytes));
  plan->shared_memory = region + plan->buffers * slice_bytes;
  const double rate = depthwise ? 28 : 256;  // multiply-adds a clock, grouped ones counted by taps
  const double clocks = tile.pixels * q.channels * q.kernel_size * q.kernel_size / rate + (depthwise ? kDepthwiseSliceClocks : kGroupedSliceClocks);
  plan->cost = 4 + static_cast<double>((plan->slices.tiles + device.multiprocessors - 1) / device.multiprocessors) * clocks / 1700;
  return true;
}

inline FirstPlan plan(const Problem& q, const Device& device) {
  FirstPlan best{};
  best.cost = 1e30;
  const auto take = [&](First first, double cost, int shared_memory) {
    if (cost < best.cost) best.first = first, best.cost = cost, best.shared_memory = shared_memory;
  };
  if (slices_plan(q, device, &best)) best.first = First::kSlices;
  if (q.group_width > 1) {
    if (sm90::grouped_plan(q, device, &best.grouped))
      take(First::kGrouped, sm90::grouped_cost(q, device, best.grouped), best.grouped.shared_memory);
    return best;
  }
  if (images_plan(q, device, &best.images))
    take(First::kImages, kImagesAdd + sm90::image_cost(q, device, best.images), best.images.shared_memory);
  if (tiles_plan(q, device, &best.tiles))
    take(First::kTiles, kTilesFactor * sm90::conv_norm_cost(q, device, best.tiles), best.tiles.shared_memory);
  if (diagonal_plan(q, device, &best.diagonal))
    take(First::kDiagonal, diagonal_cost(q, device, best.diagonal), best.diagonal.shared_memory);
  return best;
}

}  // namespace first

inline bool first_covered(const FirstPlan& plan) { return plan.cost < 1e30; }

// Searched for once a problem and device.
inline const FirstPlan& first_plan(const Problem& q, const Device& device) {
  static std::mutex mutex;
  static std::map<std::array<int64_t, 8>, FirstPlan> known;
  const std::array<int64_t, 8> key{q.batch, q.height, q.width, q.channels, q.kernel_size, q.group_width, device.multiprocessors,
                                   device.max_shared_memory};
  const std::lock_guard<std::mutex> lock(mutex);
  auto [entry, missing] = known.try_emplace(key);
  if (missing) entry->second = first::plan(q, device);
  return entry->second;
}

namespace first {

template <class Params>
Params params(const Problem& q, const Tensors& t, void* a) {
  Params p{};
  p.x = t.x, p.weight = t.conv_weight, p.bias = t.conv_bias, p.norm_weight = t.norm_weight, p.norm_bias = t.norm_bias, p.a = a;
  p.eps = t.eps, p.has_norm = q.has_norm;
  p.height = static_cast<int>(q.height), p.channels = q.channels;
  return p;
}

template <DType kType>
int launch_grouped(const Problem& q, const sm90::GroupedParams& p, cudaStream_t stream) {
  const auto filter = [&](auto m_tiles) {
    constexpr int kMTiles = decltype(m_tiles)::value;
    if (q.kernel_size == 3)
      return q.group_width == 8 ? GroupedConvNorm<kType, 3, 8, kMTiles>::launch(p, stream) : GroupedConvNorm<kType, 3, 16, kMTiles>::launch(p, stream);
    return q.group_width == 8 ? GroupedConvNorm<kType, 5, 8, kMTiles>::launch(p, stream) : GroupedConvNorm<kType, 5, 16, kMTiles>::launch(p, stream);
  };
  switch (p.plan.tile.m_tiles) {
    case 1: return filter(std::integral_constant<int, 1>{});
    case 2: return filter(std::integral_constant<int, 2>{});
    case 3: return filter(std::integral_constant<int, 3>{});
    default: return filter(std::integral_constant<int, 4>{});
  }
}

}  // namespace first

// Returns cudaError_t as int; never synchronises.
template <DType kType>
int launch_first(const Problem& q, const Tensors& t, const FirstPlan& plan, void* a, cudaStream_t stream) {
  if (plan.first == First::kSlices) {
    const BlockParams p = block_params(q, t, plan.slices, plan.buffers);
    return q.group_width == 1 ? ConvNorm<kType, true>::launch(p, a, plan.slices.tiles, plan.shared_memory, stream)
                              : ConvNorm<kType, false>::launch(p, a, plan.slices.tiles, plan.shared_memory, stream);
  }
  if (plan.first == First::kImages) {
    const auto p = first::params<sm90::ImageParams>(q, t, a);
    return q.width == 7 ? ImageConvNorm<kType, 7>::launch(p, plan.images, stream) : ImageConvNorm<kType, 14>::launch(p, plan.images, stream);
  }
  if (plan.first == First::kTiles) {
    auto p = first::params<sm90::ConvNormParams>(q, t, a);
    p.batch = static_cast<int>(q.batch), p.width = static_cast<int>(q.width);
    p.plan = plan.tiles, p.layout = sm90::conv_norm_layout(plan.tiles.tile, plan.tiles.slab, 1);
    return TilesConvNorm<kType>::launch(p, stream);
  }
  if (plan.first == First::kDiagonal) {
    auto p = first::params<DiagonalParams>(q, t, a);
    p.width = static_cast<int>(q.width), p.plan = plan.diagonal;
    return DiagonalConvNorm<kType>::launch(p, stream);
  }
  auto p = first::params<sm90::GroupedParams>(q, t, a);
  p.batch = static_cast<int>(q.batch), p.width = static_cast<int>(q.width);
  p.plan = plan.grouped, p.layout = sm90::grouped_layout(plan.grouped.tile, q.channels, q.kernel_size);
  return first::launch_grouped<kType>(q, p, stream);
}

}  // namespace convfirst::block_fusion::sm80
