// The portable path's rows of the MBConv planner's table: what each kernel takes, how it is configured, what it should cost.
#include <algorithm>
#include <iterator>

#include "launch_sm80.h"

namespace convfirst::mbconv {
namespace sm80 {
namespace {

using block_fusion::sm80::flat_geometry;
using block_fusion::sm80::rectangle_geometry;

// The cost model: block_fusion's measured rates (NOTES.md, "Portable path") and one special-function operation an activation.
constexpr double kClockMhz = 1700;
constexpr double kProductRate = 520;
constexpr double kGroupedRate = 512;
constexpr double kDepthwiseRate = 56;
constexpr double kActivationRate = 16;
constexpr double kStepClocks = 600;   // two barriers and the copies' latency
constexpr double kTileClocks = 3500;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <int kWidth, int kPixels, bool kDepthwise>
struct FusedRow {
  static constexpr Tile kTile = tile(kWidth, kPixels, kDepthwise);
  static_assert(kTile.pixels() == kPixels);

  static int shared_memory(const Problem& p, const Geometry& g) {
    return shared_layout(kWidth, kTile, p.group_width, halo_rows(g)).end;
  }

  // Fewest rows in both products among the geometries that fit. The depthwise stage needs rectangles of its own blocks.
  static Geometry choose_geometry(const Problem& p, const Device& d) {
    const block_fusion::Problem conv = convolution_of(p);
    Geometry best{};
    int64_t fewest = 0;
    auto consider = [&](const Geometry& g) {
      const int64_t rows = int64_t{g.tiles} * (halo_rows(g) + kPixels);
      if (shared_memory(p, g) > d.max_shared_memory || (best.tiles != 0 && rows >= fewest)) return;
      best = g;
      fewest = rows;
    };
    for (int tile_width : {8, 16, 4, 32}) {
      const int tile_height = kPixels / tile_width;
      if (!kDepthwise || tile_height % depthwise_rows(kTile) == 0) consider(rectangle_geometry(conv, kPixels, tile_width));
    }
    if (!kDepthwise && p.width <= kPixels) consider(flat_geometry(conv, kPixels));
    return best;
  }

  // Whatever the image's size, so that a model is covered or not: the squarest tile must fit.
  static bool supports(const Problem& p, const Device& d) {
    const bool conv = p.kernel_size == 3 && (kDepthwise ? p.group_width == 1 : p.group_width == 8 || p.group_width == 16);
    const bool sizes = p.channels > 0 && p.channels % 8 == 0 && p.channels <= kWidth && p.hidden > 0 && p.hidden % 16 == 0 &&
                       p.batch > 0 && p.height > 0 && p.width > 0;
    return conv && sizes && p.batch * p.height * p.width <= (int64_t{1} << 31) / p.channels &&
           shared_memory(p, rectangle_geometry(convolution_of(p), kPixels, 8)) <= d.max_shared_memory;
  }

  static Config configure(const Problem& p, const Device& d) {
    const Geometry g = choose_geometry(p, d);
    Config c{};
    c.tile_height = g.tile_height;
    c.tile_width = g.tile_width;
    c.tile_pixels = kPixels;
    c.hidden_chunk = kTile.hidden_chunk;
    c.stages = 2;
    c.threads = kTile.threads();
    c.grid = g.tiles;
    c.shared_memory = shared_memory(p, g);
    c.launches = 1;
    return c;
  }

  static Geometry geometry_of(const Problem& p, const Config& c) {
    const block_fusion::Problem conv = convolution_of(p);
    return c.tile_height == 1 ? flat_geometry(conv, kPixels) : rectangle_geometry(conv, kPixels, c.tile_width);
  }

  static double cost(const Problem& p, const Device& d, const Config& c) {
    const double halo = halo_rows(geometry_of(p, c)), chunk = kTile.hidden_chunk;
    const double products = (halo + kPixels) * kWidth * chunk / kProductRate;
    const double conv = kPixels * chunk * kTaps / (kDepthwise ? kDepthwiseRate : kGroupedRate);
    const double activations = (halo + kPixels) * chunk / kActivationRate;
    const int blocks = std::clamp((d.max_shared_memory + 1024) / (c.shared_memory + 1024), 1, kTile.min_blocks);
    const int64_t resident = std::min<int64_t>(blocks, ceil_div(c.grid, d.multiprocessors));
    const int64_t waves = ceil_div(c.grid, d.multiprocessors * resident);
    const double steps = static_cast<double>(ceil_div(p.hidden, kTile.hidden_chunk));
    // The blocks of a multiprocessor share its units and hide each other's waits.
    return 3 + waves * (resident * steps * (products + conv + activations) + steps * kStepClocks + kTileClocks) / kClockMhz;
  }

  static int launch(const Problem& p, const Tensors& t, const Config& c, void*, cudaStream_t stream) {
    block_fusion::Tensors tensors{};
    tensors.x = t.x;
    tensors.conv_weight = t.conv_weight;
    tensors.conv_bias = t.conv_bias;
    tensors.expand_weight = t.expand_weight;
    tensors.expand_bias = t.expand_bias;
    tensors.project_weight = t.project_weight;
    tensors.project_bias = t.project_bias;
    tensors.sample_scale = t.sample_scale;
    tensors.y = t.y;
    const BlockParams params = block_fusion::sm80::block_params(convolution_of(p), tensors, geometry_of(p, c), 0);
    return p.dtype == DType::kHalf
               ? Fused<DType::kHalf, kWidth, kPixels, kDepthwise>::launch(params, c.grid, c.shared_memory, stream)
               : Fused<DType::kBFloat16, kWidth, kPixels, kDepthwise>::launch(params, c.grid, c.shared_memory, stream);
  }

  static const void* kernel(const Problem& p) {
    return p.dtype == DType::kHalf ? Fused<DType::kHalf, kWidth, kPixels, kDepthwise>::kernel()
                                   : Fused<DType::kBFloat16, kWidth, kPixels, kDepthwise>::kernel();
  }

  static constexpr Variant row(const char* name) { return {name, 80, 999, supports, configure, cost, launch, kernel}; }
};

// As in instantiations_sm80/generate_sm80.py.
constexpr Variant kRows[] = {
    FusedRow<32, 128, true>::row("sm80_mbconv_depthwise_c32_p128"),
    FusedRow<64, 128, true>::row("sm80_mbconv_depthwise_c64_p128"),
    FusedRow<96, 128, true>::row("sm80_mbconv_depthwise_c96_p128"),
    FusedRow<96, 64, true>::row("sm80_mbconv_depthwise_c96_p64"),
    FusedRow<128, 128, true>::row("sm80_mbconv_depthwise_c128_p128"),
    FusedRow<128, 64, true>::row("sm80_mbconv_depthwise_c128_p64"),
    FusedRow<192, 128, true>::row("sm80_mbconv_depthwise_c192_p128"),
    FusedRow<192, 64, true>::row("sm80_mbconv_depthwise_c192_p64"),
    FusedRow<256, 128, true>::row("sm80_mbconv_depthwise_c256_p128"),
    FusedRow<256, 64, true>::row("sm80_mbconv_depthwise_c256_p64"),
    FusedRow<384, 64, true>::row("sm80_mbconv_depthwise_c384_p64"),
    FusedRow<32, 128, false>::row("sm80_mbconv_grouped_c32_p128"),
    FusedRow<64, 128, false>::row("sm80_mbconv_grouped_c64_p128"),
    FusedRow<96, 128, false>::row("sm80_mbconv_grouped_c96_p128"),
    FusedRow<96, 64, false>::row("sm80_mbconv_grouped_c96_p64"),
    FusedRow<128, 128, false>::row("sm80_mbconv_grouped_c128_p128"),
    FusedRow<128, 64, false>::row("sm80_mbconv_grouped_c128_p64"),
    FusedRow<192, 128, false>::row("sm80_mbconv_grouped_c192_p128"),
    FusedRow<192, 64, false>::row("sm80_mbconv_grouped_c192_p64"),
    FusedRow<256, 128, false>::row("sm80_mbconv_grouped_c256_p128"),
    FusedRow<256, 64, false>::row("sm80_mbconv_grouped_c256_p64"),
    FusedRow<384, 64, false>::row("sm80_mbconv_grouped_c384_p64"),
};

}  // namespace
}  // namespace sm80

const Variant* sm80_variants(int* count) {
  *count = static_cast<int>(std::size(sm80::kRows));
  return sm80::kRows;
}

}  // namespace convfirst::mbconv
