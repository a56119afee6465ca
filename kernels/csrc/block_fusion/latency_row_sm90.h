// The latency path's rows of the planner's table: one launch, for few pixels.
#pragma once

#include <type_traits>

#include "latency_sm90.h"

namespace convfirst::block_fusion::sm90 {

template <int kWidth>
struct LatencyRow {
  using AnyTraits = LatencyTraits<DType::kHalf, kWidth, Activation::kSilu>;  // shapes do not depend on the rest

  template <class Body>
  static auto with_kernel(const Problem& q, Body&& body) {
    const auto with_activation = [&](auto dtype) {
      constexpr DType kDType = decltype(dtype)::value;
      if (q.activation == Activation::kRelu) return body(LatencyTraits<kDType, kWidth, Activation::kRelu>{});
      if (q.activation == Activation::kSilu) return body(LatencyTraits<kDType, kWidth, Activation::kSilu>{});
      return body(LatencyTraits<kDType, kWidth, Activation::kGelu>{});
    };
    if (q.dtype == DType::kHalf) return with_activation(std::integral_constant<DType, DType::kHalf>{});
    return with_activation(std::integral_constant<DType, DType::kBFloat16>{});
  }

  static int64_t tiles(const Problem& q) { return ceil_div(q.batch * q.height * q.width, AnyTraits::kPixels); }

  static bool supports(const Problem& q, const Device& device) {
    if (q.channels != kWidth || q.hidden != AnyTraits::kHidden || q.kernel_size != 3 || q.group_width != 8) return false;
    if (q.batch <= 0 || q.height <= 0 || q.width <= 0 || q.batch * q.height * q.width > (int64_t{1} << 31) / q.channels) return false;
    return device.max_shared_memory >= LatencyLayout<AnyTraits>::total(static_cast<int>(q.width)) && clusters(device) > 0;
  }

  // How many clusters run at once: two blocks a multiprocessor; a cluster lies within one group of (at least) 16 multiprocessors.
  static int64_t clusters(const Device& device) { return device.multiprocessors / 16 * (32 / AnyTraits::kCluster); }

  static Config configure(const Problem& q, const Device& device) {
    Config c{};
    c.tile_images = 0;
    c.tile_height = 1;
    c.tile_width = static_cast<int>(q.width);
    c.tile_pixels = AnyTraits::kPixels;
    c.hidden_chunk = AnyTraits::kSlice;
    c.stages = 1;
    c.threads = AnyTraits::kThreads;
    c.grid = static_cast<int>(tiles(q) * AnyTraits::kCluster);
    c.shared_memory = LatencyLayout<AnyTraits>::total(static_cast<int>(q.width));
    c.launches = 1;
    c.multiprocessors = device.multiprocessors;
    return c;
  }

  // Microseconds of a round, in a chain of launches, measured: of as many clusters as have a multiprocessor a block, and of twice as many.
  static constexpr double kAlone = kWidth == 256 ? 6.3 : 4.5, kShared = kWidth == 256 ? 10.2 : kWidth == 128 ? 6.8 : 6.5;

  static double cost(const Problem& q, const Device& device, const Config&) {
    const int64_t at_once = clusters(device);
    return 2 * tiles(q) <= at_once ? kAlone : kShared * ceil_div(tiles(q), at_once);
  }

  static int launch(const Problem& q, const Tensors& t, const Config&, void*, cudaStream_t stream) {
    return with_kernel(q, [&](auto traits) { return LatencyKernel<decltype(traits)>::launch(q, t, stream); });
  }

  static const void* kernel(const Problem& q) {
    return with_kernel(q, [&](auto traits) { return LatencyKernel<decltype(traits)>::pointer(); });
  }

  static constexpr Variant row(const char* name, bool tested = true) {
    return {name, 90, 90, supports, configure, cost, launch, kernel, tested};
  }
};

}  // namespace convfirst::block_fusion::sm90
