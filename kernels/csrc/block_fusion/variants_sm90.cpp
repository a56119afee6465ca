// The Hopper path's rows of the planner's table: one a width, whatever the dtype and the activation.
#include <iterator>

#include "latency_row_sm90.h"
#include "split_sm90.h"
#include "tile_sm90.h"

namespace convfirst::block_fusion {
namespace sm90 {
namespace {

template <int kChannels, DType kDType, class Body>
auto with_activation(const Problem& q, Body&& body) {
  if (q.activation == Activation::kRelu) return body(BlockTraits<kDType, kChannels, Activation::kRelu>{});
  if (q.activation == Activation::kSilu) return body(BlockTraits<kDType, kChannels, Activation::kSilu>{});
  return body(BlockTraits<kDType, kChannels, Activation::kGelu>{});
}

// Calls `body` with the traits of the problem's dtype and activation.
template <int kChannels, class Body>
auto with_traits(const Problem& q, Body&& body) {
  if (q.dtype == DType::kHalf) return with_activation<kChannels, DType::kHalf>(q, body);
  return with_activation<kChannels, DType::kBFloat16>(q, body);
}

template <int kChannels>
struct Row {
  static bool supports(const Problem& q, const Device& device) {
    if (q.channels != kChannels || q.kernel_size != 3 || q.group_width != 8) return false;
    if (q.hidden % kHiddenChunk != 0 || q.hidden < 2 * kHiddenChunk || q.hidden > 8 * kChannels) return false;
    if (q.batch <= 0 || q.height <= 0 || q.width <= 0 || q.batch * q.height * q.width > (int64_t{1} << 31) / kChannels) return false;
    return with_traits<kChannels>(q, [&](auto traits) {
      Plan plan;
      return make_plan<decltype(traits)>(q, device, &plan);
    });
  }

  static Config configure(const Problem& q, const Device& device) {
    return with_traits<kChannels>(q, [&](auto traits) {
      using Traits = decltype(traits);
      Plan plan;
      make_plan<Traits>(q, device, &plan);
      const Slots& slots = plan.slots;
      Config c{};
      c.tile_images = plan.tile.images;
      c.tile_height = plan.tile.height;
      c.tile_width = plan.tile.width;
      c.tile_pixels = kTilePixels;
      c.hidden_chunk = kHiddenChunk;
      c.stages = slots.w1;
      c.threads = Traits::kThreads;
      c.grid = plan.grid;
      c.shared_memory = shared_layout<Traits>(slots.w1, slots.w2, slots.x, x_slot_bytes<Traits>(plan.tile), q.hidden).total;
      c.launches = 1;
      return c;
    });
  }

  // Rounds of the warpgroups: clocks fitted to the measured times at 64, 128 and 256 channels (NOTES.md).
  static double cost(const Problem& q, const Device& device, const Config&) {
    return with_traits<kChannels>(q, [&](auto traits) {
      using Traits = decltype(traits);
      Plan plan;
      make_plan<Traits>(q, device, &plan);
      const int rounds = share_out<Traits>(tile_count(q, plan.tile), q.hidden / kHiddenChunk, plan.grid).full;
      const double products = kTilePixels * 2.0 * q.hidden * kChannels / 2048;  // of one tile
      if (Traits::kAlternates) return 7 + rounds * (1.5 * products + 2300) / 1600;
      return 2 + rounds * (1.63 * Traits::kWarpgroups * products + 4300) / 1600;
    });
  }

  static int launch(const Problem& q, const Tensors& t, const Config& c, void*, cudaStream_t stream) {
    return with_traits<kChannels>(q, [&](auto traits) {
      using Traits = decltype(traits);
      Plan plan;
      plan_of<Traits>(q, c, &plan);
      return Kernel<Traits>::launch(q, t, plan, c.shared_memory, stream);
    });
  }

  static const void* kernel(const Problem& q) {
    return with_traits<kChannels>(q, [&](auto traits) { return Kernel<decltype(traits)>::pointer(); });
  }

  static constexpr Variant row(const char* name) { return {name, 90, 90, supports, configure, cost, launch, kernel}; }
};

constexpr Variant kVariants[] = {
    Row<32>::row("sm90_conv_first_c32"),   Row<64>::row("sm90_conv_first_c64"),   Row<96>::row("sm90_conv_first_c96"),
    Row<128>::row("sm90_conv_first_c128"), Row<192>::row("sm90_conv_first_c192"), Row<256>::row("sm90_conv_first_c256"),
    SplitRow<64>::row("sm90_split_c64"),         SplitRow<96>::row("sm90_split_c96"),
    SplitRow<128>::row("sm90_split_c128"),
    SplitRow<192>::row("sm90_split_c192"),       SplitRow<256>::row("sm90_split_c256"),
    SplitLinearRow::row("sm90_split_linear"),
    LatencyRow<64>::row("sm90_latency_c64"),     LatencyRow<128>::row("sm90_latency_c128"),
    LatencyRow<256>::row("sm90_latency_c256"),
};

}  // namespace
}  // namespace sm90

const Variant* sm90_variants(int* count) {
  *count = static_cast<int>(std::size(sm90::kVariants));
  return sm90::kVariants;
}

}  // namespace convfirst::block_fusion
