// The latency path's row of the planner's table for 512 channels: two launches, for few pixels.
#pragma once

#include <type_traits>

#include "latency_wide_sm90.h"

namespace convfirst::block_fusion::sm90 {

struct LatencyWideRow {
  using AnyTraits = LatencyWideTraits<DType::kHalf, Activation::kSilu>;  // shapes do not depend on either

  template <class Body>
  static auto with_kernel(const Problem& q, Body&& body) {
    const auto with_activation = [&](auto dtype) {
      constexpr DType kDType = decltype(dtype)::value;
      if (q.activation == Activation::kRelu) return body(LatencyWideTraits<kDType, Activation::kRelu>{});
      if (q.activation == Activation::kSilu) return body(LatencyWideTraits<kDType, Activation::kSilu>{});
      return body(LatencyWideTraits<kDType, Activation::kGelu>{});
    };
    if (q.dtype == DType::kHalf) return with_activation(std::integral_constant<DType, DType::kHalf>{});
    return with_activation(std::integral_constant<DType, DType::kBFloat16>{});
  }

  static int64_t pixels(const Problem& q) { return q.batch * q.height * q.width; }
  static int64_t tiles(const Problem& q) { return ceil_div(pixels(q), AnyTraits::kPixels); }

  static bool supports(const Problem& q, const Device& device) {
    if (q.channels != AnyTraits::kChannels || q.hidden != AnyTraits::kHidden || q.kernel_size != 3 || q.group_width != 8) return false;
    if (q.batch <= 0 || q.height <= 0 || q.width <= 0 || pixels(q) > kMaxPixels) return false;
    using Layout = LatencyLayout<AnyTraits>;
    return Layout::fits(static_cast<int>(q.width)) && device.max_shared_memory >= Layout::kTotal;
  }

  static Config configure(const Problem& q, const Device& device) {
    Config c{};
    c.tile_images = 0;
    c.tile_height = 1;
    c.tile_width = static_cast<int>(q.width);
    c.tile_pixels = AnyTraits::kPixels;
    c.hidden_chunk = AnyTraits::kSlice;
    c.stages = 1;
    c.threads = AnyTraits::kThreads;
    c.grid = static_cast<int>(tiles(q) * AnyTraits::kGroups * AnyTraits::kCluster);
    c.shared_memory = LatencyLayout<AnyTraits>::kTotal;
    c.launches = 2;
    c.multiprocessors = device.multiprocessors;
    c.workspace = AnyTraits::kGroups * pixels(q) * AnyTraits::kChannels * static_cast<int64_t>(sizeof(float));
    return c;
  }

  // Rounds of one block a multiprocessor.
  static double cost(const Problem& q, const Device& device, const Config& c) { return 9.0 * ceil_div(c.grid, device.multiprocessors); }

  static int launch(const Problem& q, const Tensors& t, const Config&, void* workspace, cudaStream_t stream) {
    return with_kernel(q, [&](auto traits) { return LatencyWideKernel<decltype(traits)>::launch(q, t, workspace, stream); });
  }

  static const void* kernel(const Problem& q) {
    return with_kernel(q, [&](auto traits) { return LatencyWideKernel<decltype(traits)>::pointer(); });
  }

  static constexpr Variant row(const char* name, bool tested = true) {
    return {name, 90, 90, supports, configure, cost, launch, kernel, tested};
  }

  static constexpr int64_t kMaxPixels = 4096;  // bounds the partial sums to 128 MiB; made for a hundred
};

}  // namespace convfirst::block_fusion::sm90
