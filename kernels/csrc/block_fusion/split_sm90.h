// The Hopper split path's rows of the planner's table: convolution and norm in one launch, then the feed-forward half in one or two.
#pragma once

#include <map>
#include <mutex>

#include "block_fusion/plan.h"
#include "conv_norm_sm90.h"
#include "feed_forward_tile_sm90.h"
#include "grouped_conv_norm_sm90.h"
#include "image_conv_norm_sm90.h"
#include "linear_sm90.h"

namespace convfirst::block_fusion::sm90 {

inline Device device_of(const Config& c) { return {90, c.multiprocessors, 232448}; }

// How the first launch is done: depthwise in tiles on tensor cores, depthwise an image a block, groups wider than a channel.
enum class First { kTiles, kImages, kGrouped };

struct FirstPlan {
  bool covered;
  First first;
  ConvNormPlan tiles;
  ImagePlan images;
  GroupedPlan grouped;
};

inline FirstPlan first_plan(const Problem& q, const Device& device) {
  FirstPlan plan{};
  if (q.group_width > 1) {
    plan.first = First::kGrouped;
    plan.covered = grouped_plan(q, device, &plan.grouped);
    return plan;
  }
  const bool tiles = conv_norm_plan(q, device, &plan.tiles), images = image_plan(q, device, &plan.images);
  plan.covered = tiles || images;
  const bool cheaper = images && (!tiles || image_cost(q, device, plan.images) < conv_norm_cost(q, device, plan.tiles));
  plan.first = cheaper ? First::kImages : First::kTiles;
  return plan;
}

// Searched for once a problem and device.
inline const FirstPlan& remembered_first_plan(const Problem& q, const Device& device) {
  static std::mutex mutex;
  static std::map<Fields, FirstPlan> known;
  Fields key = fields(q);
  key.push_back(device.capability);
  key.push_back(device.multiprocessors);
  const std::lock_guard<std::mutex> lock(mutex);
  auto [entry, missing] = known.try_emplace(key);
  if (missing) entry->second = first_plan(q, device);
  return entry->second;
}

inline double first_cost(const Problem& q, const Device& device) {
  const FirstPlan& plan = remembered_first_plan(q, device);
  if (plan.first == First::kTiles) return conv_norm_cost(q, device, plan.tiles);
  return plan.first == First::kImages ? image_cost(q, device, plan.images) : grouped_cost(q, device, plan.grouped);
}

inline int launch_first(const Problem& q, const Tensors& t, const Device& device, void* a, cudaStream_t stream,
                        const ConvNormExtras& extras = {}) {
  const FirstPlan& plan = remembered_first_plan(q, device);
  if (plan.first == First::kTiles) return conv_norm_launch(q, t, plan.tiles, a, true, stream, extras);
  if (plan.first == First::kImages) return image_launch(q, t, plan.images, a, true, stream, extras);
  return grouped_launch(q, t, plan.grouped, a, true, stream, extras);
}

inline const void* first_pointer(const Problem& q) {
  return q.group_width == 1 ? conv_norm_pointer(q) : grouped_pointer(q, GroupedPlan{{4}});
}

inline int64_t pixels_of(const Problem& q) { return q.batch * q.height * q.width; }

inline int64_t normalised_bytes(const Problem& q) { return ceil_div(pixels_of(q) * q.channels * 2, 256) * 256; }

inline bool split_covers(const Problem& q, const Device& device) {
  return device.max_shared_memory >= 232448 && pixels_of(q) <= (int64_t{1} << 31) / q.channels &&
         remembered_first_plan(q, device).covered;
}

// ---- feed-forward in one launch: the hidden tensor stays on the chip ----

template <int kWidth>
struct SplitRow {
  template <class Body>
  static auto with_kernel(const Problem& q, Body&& body) {
    const auto with_activation = [&](auto dtype) {
      constexpr DType kDType = decltype(dtype)::value;
      if (q.activation == Activation::kRelu) return body(FeedForwardTraits<kDType, kWidth, Activation::kRelu>{});
      if (q.activation == Activation::kSilu) return body(FeedForwardTraits<kDType, kWidth, Activation::kSilu>{});
      return body(FeedForwardTraits<kDType, kWidth, Activation::kGelu>{});
    };
    if (q.dtype == DType::kHalf) return with_activation(std::integral_constant<DType, DType::kHalf>{});
    return with_activation(std::integral_constant<DType, DType::kBFloat16>{});
  }

  static bool supports(const Problem& q, const Device& device) {
    // Half of the width at least: the rest of a tile is zeros that are multiplied all the same.
    if (q.channels > kWidth || 2 * q.channels < kWidth || q.channels % 8 != 0 || q.hidden % 8 != 0) return false;
    if (!split_covers(q, device)) return false;
    return with_kernel(q, [&](auto traits) {
      FeedForwardRings rings;
      return choose_rings<decltype(traits)>(q.hidden, device.max_shared_memory, &rings);
    });
  }

  static Config configure(const Problem& q, const Device& device) {
    return with_kernel(q, [&](auto traits) {
      using Traits = decltype(traits);
      FeedForwardRings rings;
      choose_rings<Traits>(q.hidden, device.max_shared_memory, &rings);
      const int chunks = static_cast<int>(ceil_div(q.hidden, kHiddenChunk));
      Config c{};
      c.tile_pixels = kTilePixels;
      c.hidden_chunk = kHiddenChunk;
      c.stages = rings.w1;
      c.threads = Traits::kThreads;
      c.grid = static_cast<int>(std::min<int64_t>(ceil_div(pixels_of(q), kTilePixels), device.multiprocessors));
      c.shared_memory = feed_forward_layout<Traits>(rings, chunks).total;
      c.launches = 2;
      c.workspace = normalised_bytes(q);
      c.multiprocessors = device.multiprocessors;
      return c;
    });
  }

  // The busiest multiprocessor's rounds of tiles at 75 % of the tensor cores' rate, each with a fixed part (NOTES.md); one that blocks share
  // takes somewhat more than half.
  static double cost(const Problem& q, const Device& device, const Config&) {
    return with_kernel(q, [&](auto traits) {
      using Traits = decltype(traits);
      const int chunks = static_cast<int>(ceil_div(q.hidden, kHiddenChunk));
      const int64_t tiles = ceil_div(pixels_of(q), kTilePixels), blocks = std::min<int64_t>(tiles, device.multiprocessors);
      // One tile alone leaves the tensor cores idle half of the time.
      const auto round = [&](int64_t at_once) {
        return std::max<int64_t>(at_once, 2) * kTilePixels * 2.0 * chunks * kHiddenChunk * kWidth / (2048 * 0.75) + 2000;
      };
      const Rounds share = share_out<Traits>(tiles, chunks, static_cast<int>(blocks));
      const int64_t most = ceil_div(tiles, blocks), rest = most % Traits::kWarpgroups;
      const double last = share.shared ? 0.6 * round(Traits::kWarpgroups) : rest > 0 ? round(rest) : 0;
      const double clocks = (share.shared ? share.full : most / Traits::kWarpgroups) * round(Traits::kWarpgroups) + last;
      return first_cost(q, device) + 2 + clocks / 1600;
    });
  }

  static int launch(const Problem& q, const Tensors& t, const Config& c, void* workspace, cudaStream_t stream) {
    const int error = launch_first(q, t, device_of(c), workspace, stream);
    return error != 0 ? error : launch_second(q, t, c, workspace, nullptr, stream);
  }

  // The feed-forward half of a, which is normalised.
  static int launch_second(const Problem& q, const Tensors& t, const Config& c, const void* a, void*, cudaStream_t stream) {
    const Device device = device_of(c);
    return with_kernel(q, [&](auto traits) {
      const FeedForwardProblem problem{pixels_of(q), q.channels, q.hidden, q.dtype, q.activation};
      return FeedForwardKernel<decltype(traits)>::launch(problem, t, a, q.height * q.width, device.multiprocessors,
                                                         device.max_shared_memory, stream);
    });
  }

  static const void* kernel(const Problem& q) {
    return with_kernel(q, [&](auto traits) { return FeedForwardKernel<decltype(traits)>::pointer(); });
  }

  static constexpr Variant row(const char* name, bool tested = true) {
    return {name, 90, 90, supports, configure, cost, launch, kernel, tested};
  }
};

// ---- feed-forward as two matrix products: the hidden tensor goes through memory ----

struct SplitLinearRow {
  static LinearProblem expansion(const Problem& q) {
    return {Layer::kExpand, pixels_of(q), q.hidden, q.channels, q.dtype, q.activation, q.height * q.width};
  }
  static LinearProblem projection(const Problem& q) {
    return {Layer::kProject, pixels_of(q), q.channels, q.hidden, q.dtype, q.activation, q.height * q.width};
  }

  static bool supports(const Problem& q, const Device& device) {
    return q.channels >= 192 && linear_supports(expansion(q)) && linear_supports(projection(q)) && split_covers(q, device);
  }

  static Config configure(const Problem& q, const Device& device) {
    const LinearPlan plan = plan_linear(expansion(q), device);
    const LinearTile& tile = kLinearTiles[plan.tile];
    Config c{};
    c.tile_pixels = tile.rows();
    c.hidden_chunk = tile.columns;
    c.stages = tile.slots(Layer::kExpand);
    c.threads = plan.threads;
    c.grid = plan.grid;
    c.shared_memory = plan.shared_memory;
    c.launches = 3;
    c.workspace = normalised_bytes(q) + pixels_of(q) * q.hidden * 2;
    c.multiprocessors = device.multiprocessors;
    return c;
  }

  static double cost(const Problem& q, const Device& device, const Config&) {
    return first_cost(q, device) + plan_linear(expansion(q), device).cost +
           plan_linear(projection(q), device).cost;
  }

  static int launch(const Problem& q, const Tensors& t, const Config& c, void* workspace, cudaStream_t stream) {
    const int error = launch_first(q, t, device_of(c), workspace, stream);
    return error != 0 ? error : launch_second(q, t, c, workspace, static_cast<char*>(workspace) + normalised_bytes(q), stream);
  }

  // The feed-forward half of a, which is normalised; `hidden` has room for all hidden units.
  static int launch_second(const Problem& q, const Tensors& t, const Config& c, const void* a, void* hidden, cudaStream_t stream) {
    const Device device = device_of(c);
    const LinearProblem expand = expansion(q), project = projection(q);
    const int error = launch_linear(expand, {a, t.expand_weight, t.expand_bias, hidden, nullptr, nullptr, nullptr},
                                    plan_linear(expand, device), true, stream);
    if (error != 0) return error;
    return launch_linear(project, {hidden, t.project_weight, t.project_bias, t.y, t.x, t.layer_scale, t.sample_scale},
                         plan_linear(project, device), true, stream);
  }

  static const void* kernel(const Problem& q) { return first_pointer(q); }

  static constexpr Variant row(const char* name) { return {name, 90, 90, supports, configure, cost, launch, kernel}; }
};

}  // namespace convfirst::block_fusion::sm90
