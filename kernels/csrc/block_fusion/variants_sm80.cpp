// The portable path's rows of the planner's table: what each kernel takes, how it is configured and what it should cost.
#include <algorithm>
#include <iterator>
#include <type_traits>

#include "first_sm80.h"
#include "launch_sm80.h"

namespace convfirst::block_fusion {
namespace sm80 {
namespace {

// The cost model, fitted to the H200's measured times (NOTES.md, "Portable path"): multiply-adds a clock a multiprocessor sustains
// in each stage, and the clocks of a tile's fixed part. Grouped convolution is counted by taps, not by group width.
constexpr double kClockMhz = 1700;
constexpr double kFusedRate = 720;        // where a warp owns its rows
constexpr double kFusedSharedRate = 520;  // where warps share them
constexpr double kLinearRate = 650;
constexpr double kGroupedRate = 512;
constexpr double kDepthwiseRate = 56;
constexpr double kTileClocks = 3500;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool within_operator(const Problem& p, bool depthwise, int max_channels) {
  const bool conv = depthwise ? p.group_width == 1 && p.kernel_size == 7 && p.channels % 8 == 0
                              : (p.group_width == 8 || p.group_width == 16) && (p.kernel_size == 3 || p.kernel_size == 5) &&
                                    p.channels % 32 == 0;
  return conv && p.channels > 0 && p.channels <= max_channels && p.hidden > 0 && p.hidden % 8 == 0 && p.batch > 0 &&
         p.height > 0 && p.width > 0 && p.batch * p.height * p.width <= (int64_t{1} << 31) / p.channels;
}

// Slices of x in flight: as many as the bytes up to `shared_memory` hold, at least one, no more than there are.
int slice_buffers(const Problem& p, const Geometry& g, int slice, int region, int shared_memory) {
  const int slice_bytes = g.halo_pixels * row_bytes(slice);
  return static_cast<int>(std::clamp<int64_t>((shared_memory - region) / slice_bytes, 1,
                                              std::min<int64_t>(4, ceil_div(p.channels, slice))));
}

// ---- one launch ----

template <int kWidth, bool kDepthwise>
struct FusedRow {
  static constexpr FusedTile kTile = fused_tile(kWidth, kDepthwise);
  static constexpr FusedLayout kLayout = fused_layout(kWidth, kDepthwise);

  static int least_shared_memory(const Geometry& g) {
    return std::max(kLayout.end, kLayout.region + g.halo_pixels * row_bytes(kTile.slice));
  }

  static bool supports(const Problem& p, const Device& d) {
    if (!within_operator(p, kDepthwise, kWidth) || (!kDepthwise && p.channels != kWidth)) return false;
    const Geometry g = choose_geometry(p, kTile.pixels(), kDepthwise);
    return g.tiles > 0 && least_shared_memory(g) <= d.max_shared_memory;
  }

  static Config configure(const Problem& p, const Device& d) {
    const Geometry g = choose_geometry(p, kTile.pixels(), kDepthwise);
    const int least = least_shared_memory(g);
    // More slices in flight, as long as as many blocks as the registers allow still fit a multiprocessor.
    const int budget = (d.max_shared_memory + 1024) / kTile.min_blocks - 1024;
    const int buffers = slice_buffers(p, g, kTile.slice, kLayout.region, std::max(least, budget));
    Config c{};
    c.tile_height = g.tile_height;
    c.tile_width = g.tile_width;
    c.tile_pixels = kTile.pixels();
    c.hidden_chunk = kTile.hidden_chunk;
    c.stages = kTile.slots;
    c.threads = kTile.threads();
    c.grid = g.tiles;
    c.shared_memory = std::max(least, kLayout.region + buffers * g.halo_pixels * row_bytes(kTile.slice));
    c.launches = 1;
    return c;
  }

  // A tile's products at a rate of multiply-adds a clock, its convolution, and a fixed part; the blocks of a multiprocessor share it.
  static double cost(const Problem& p, const Device& d, const Config& c) {
    const double rate = kTile.warps_n == 1 ? kFusedRate : kFusedSharedRate;
    const double products = 2.0 * c.tile_pixels * kWidth * (ceil_div(p.hidden, kTile.hidden_chunk) * kTile.hidden_chunk) / rate;
    const double taps = p.kernel_size * p.kernel_size;
    const double conv = c.tile_pixels * kWidth * taps / (kDepthwise ? kDepthwiseRate : kGroupedRate);
    const int blocks = std::max(1, std::min(kTile.min_blocks, (d.max_shared_memory + 1024) / (c.shared_memory + 1024)));
    const int64_t resident = std::min<int64_t>(blocks, ceil_div(c.grid, d.multiprocessors));
    const int64_t waves = ceil_div(c.grid, d.multiprocessors * resident);
    return 3 + waves * resident * (products + conv + kTileClocks) / kClockMhz;
  }

  static int launch(const Problem& p, const Tensors& t, const Config& c, void*, cudaStream_t stream) {
    const Geometry g = geometry_of(p, c);
    const BlockParams params = block_params(p, t, g, slice_buffers(p, g, kTile.slice, kLayout.region, c.shared_memory));
    return p.dtype == DType::kHalf ? Fused<DType::kHalf, kWidth, kDepthwise>::launch(params, c.grid, c.shared_memory, stream)
                                   : Fused<DType::kBFloat16, kWidth, kDepthwise>::launch(params, c.grid, c.shared_memory, stream);
  }

  static const void* kernel(const Problem& p) {
    return p.dtype == DType::kHalf ? Fused<DType::kHalf, kWidth, kDepthwise>::kernel()
                                   : Fused<DType::kBFloat16, kWidth, kDepthwise>::kernel();
  }

  static constexpr Variant row(const char* name) { return {name, 80, 999, supports, configure, cost, launch, kernel}; }
};

// Below 512 channels the hidden tensor stays on the chip wherever a device's shared memory allows it.
bool one_launch_covers(const Problem& p, const Device& d) {
  return FusedRow<32, false>::supports(p, d) || FusedRow<64, false>::supports(p, d) || FusedRow<96, false>::supports(p, d) ||
         FusedRow<128, false>::supports(p, d) || FusedRow<192, false>::supports(p, d) || FusedRow<256, false>::supports(p, d) ||
         FusedRow<384, false>::supports(p, d) || FusedRow<128, true>::supports(p, d) || FusedRow<384, true>::supports(p, d);
}

// ---- convolution and LayerNorm, then two linear layers ----

// What a Config says of the device that it was made for is enough to plan the first launch again.
Device planned_device(const Config& c) { return {80, c.multiprocessors, c.shared_memory}; }

void describe_first(const Problem& p, const FirstPlan& plan, Config* c) {
  switch (plan.first) {
    case First::kSlices:
      c->tile_height = plan.slices.tile_height, c->tile_width = plan.slices.tile_width, c->grid = plan.slices.tiles;
      break;
    case First::kTiles: {
      const sm90::ConvNormTile& t = plan.tiles.tile;
      c->tile_images = t.images, c->tile_height = t.groups * t.rows, c->tile_width = t.strips * 8, c->grid = plan.tiles.grid();
      break;
    }
    case First::kImages:
      c->tile_images = 1, c->grid = plan.images.grid;
      c->tile_height = static_cast<int>(p.height), c->tile_width = static_cast<int>(p.width);
      break;
    case First::kDiagonal:
      c->tile_height = plan.diagonal.rows(), c->tile_width = plan.diagonal.columns, c->grid = plan.diagonal.grid;
      break;
    case First::kGrouped:
      c->tile_height = plan.grouped.tile.rows(), c->grid = plan.grouped.tiles;
      c->tile_width = plan.grouped.tile.columns > 0 ? plan.grouped.tile.columns : plan.grouped.tile.pixels();
  }
  c->tile_pixels = std::max(c->tile_images, 1) * c->tile_height * c->tile_width;
}

template <bool kDepthwise, int kExpandTile, int kProjectTile>
struct SplitRow {
  static int linear_shared_memory() {
    return std::max(linear_tile(kExpandTile).shared_bytes(), linear_tile(kProjectTile).shared_bytes());
  }

  static bool supports(const Problem& p, const Device& d) {
    return within_operator(p, kDepthwise, conv_tile(kDepthwise).max_channels) && !one_launch_covers(p, d) &&
           linear_shared_memory() <= d.max_shared_memory && first_covered(first_plan(p, d));
  }

  // The first launch is planned for the configuration's own shared memory again when it runs: what was best remains it.
  static Config configure(const Problem& p, const Device& d) {
    const FirstPlan& first = first_plan(p, d);
    Config c{};
    describe_first(p, first, &c);
    c.hidden_chunk = linear_tile(kExpandTile).n;
    c.stages = linear_tile(kExpandTile).stages;
    c.threads = linear_tile(kExpandTile).threads();
    c.shared_memory = std::max(linear_shared_memory(), first.shared_memory);
    c.launches = 3;
    c.workspace = normalised_bytes(p) + p.batch * p.height * p.width * p.hidden * 2;
    c.multiprocessors = d.multiprocessors;
    return c;
  }

  static int64_t normalised_bytes(const Problem& p) { return ceil_div(p.batch * p.height * p.width * p.channels * 2, 256) * 256; }

  static double linear_cost(const Device& d, const LinearTile& t, int64_t rows, int columns, int depth) {
    const int64_t tiles = ceil_div(rows, t.m) * ceil_div(columns, t.n);
    const int64_t resident = std::min<int64_t>(t.min_blocks, ceil_div(tiles, d.multiprocessors));
    const int64_t waves = ceil_div(tiles, d.multiprocessors * resident);
    return 2 + waves * resident * (static_cast<double>(t.m) * t.n * depth / kLinearRate + 2000) / kClockMhz;
  }

  static double cost(const Problem& p, const Device& d, const Config&) {
    const int64_t pixels = p.batch * p.height * p.width;
    return first_plan(p, d).cost + linear_cost(d, linear_tile(kExpandTile), pixels, p.hidden, p.channels) +
           linear_cost(d, linear_tile(kProjectTile), pixels, p.channels, p.hidden) + pixels * p.hidden * 4.0 / 3e6;
  }

  template <DType kType>
  static int launch_all(const Problem& p, const Tensors& t, const Config& c, void* workspace, cudaStream_t stream) {
    const int pixels = static_cast<int>(p.batch * p.height * p.width);
    void* hidden = static_cast<char*>(workspace) + normalised_bytes(p);
    int error = launch_first<kType>(p, t, first_plan(p, planned_device(c)), workspace, stream);
    if (error != 0) return error;
    LinearParams expand{workspace, t.expand_weight, t.expand_bias, hidden, pixels, p.hidden, p.channels,
                        static_cast<int>(p.activation), {}, 1};
    error = Linear<kType, kExpandTile, false>::launch(expand, stream);
    if (error != 0) return error;
    LinearParams project{hidden, t.project_weight, nullptr, t.y, pixels, p.channels, p.hidden, 0, t,
                         static_cast<int>(p.height * p.width)};
    return Linear<kType, kProjectTile, true>::launch(project, stream);
  }

  static int launch(const Problem& p, const Tensors& t, const Config& c, void* workspace, cudaStream_t stream) {
    return p.dtype == DType::kHalf ? launch_all<DType::kHalf>(p, t, c, workspace, stream)
                                   : launch_all<DType::kBFloat16>(p, t, c, workspace, stream);
  }

  static const void* kernel(const Problem& p) {
    return p.dtype == DType::kHalf ? ConvNorm<DType::kHalf, kDepthwise>::kernel() : ConvNorm<DType::kBFloat16, kDepthwise>::kernel();
  }

  static constexpr Variant row(const char* name) { return {name, 80, 999, supports, configure, cost, launch, kernel}; }
};

// ---- the same, with the persistent linear layers ----

// Fitted to measured launches (NOTES.md): multiply-adds a clock that the main loop sustains, of the 1350 of mma.sync, a tile's clocks
// outside it, microseconds of a launch, and bytes a microsecond of the device's memory.
constexpr double kPersistentRate = 1150;
constexpr double kPersistentTileClocks = 8000;
constexpr double kPersistentWordClocks = 6300;  // of an expansion whose activation is partly within it
constexpr double kHeldRate = 1000;              // with the last tile's activation in it,
constexpr double kHeldStaysRate = 1050;         // where W stays,
constexpr double kHeldClocks = 3000;            // and what is left outside
constexpr double kPersistentLaunch = 2.5;
constexpr double kPersistentBytes = 2.6e6;

// Each product takes the tile that should be fastest.
template <bool kDepthwise>
struct PersistentSplitRow {
  using Split = SplitRow<kDepthwise, 0, 0>;

  static int64_t tiles(const PersistentTile& t, int64_t rows, int columns) { return ceil_div(rows, t.m) * ceil_div(columns, t.n); }

  static int64_t pixels(const Problem& p) { return p.batch * p.height * p.width; }

  // Whether the expansion's kernel has the activation under products.
  static bool words(const Problem& p, const PersistentTile& t) {
    if (p.activation == Activation::kSilu) return t.overlaps();
    return p.activation == Activation::kGelu && t.overlaps() && (t.defers() || p.dtype == DType::kHalf);
  }

  static double linear_cost(int multiprocessors, const PersistentTile& t, const Problem& p, bool project) {
    const int columns = project ? p.channels : p.hidden, depth = project ? p.hidden : p.channels;
    const int64_t slices = ceil_div(depth, t.depth), waves = ceil_div(tiles(t, pixels(p), columns), multiprocessors);
    double rate = kPersistentRate, outside = kPersistentTileClocks;
    if (!project && words(p, t)) {
      const bool stays = slices == t.stages && multiprocessors % ceil_div(columns, t.n) == 0;
      if (t.defers()) rate = stays ? kHeldStaysRate : kHeldRate;
      outside = t.defers() ? kHeldClocks : kPersistentWordClocks;
    }
    const double loop = static_cast<double>(t.m) * t.n * slices * t.depth / rate;
    return kPersistentLaunch + std::max(waves * (loop + outside) / kClockMhz, 2.0 * pixels(p) * (columns + depth) / kPersistentBytes);
  }

  static int best_tile(const Problem& p, int multiprocessors, bool project) {
    auto cost = [&](int i) { return linear_cost(multiprocessors, persistent_tile(i), p, project); };
    int best = -1;
    for (int i = 0; i < kPersistentTiles; ++i)
      if (persistent_tile(i).serves(project) && (best < 0 || cost(i) < cost(best))) best = i;
    return best;
  }

  static int expand_tile(const Problem& p, int multiprocessors) { return best_tile(p, multiprocessors, false); }
  static int project_tile(const Problem& p, int multiprocessors) { return best_tile(p, multiprocessors, true); }

  static int linear_shared_memory(const Problem& p, int multiprocessors) {
    const PersistentTile expand = persistent_tile(expand_tile(p, multiprocessors));
    return std::max(expand.shared_bytes(false), persistent_tile(project_tile(p, multiprocessors)).shared_bytes(true));
  }

  static bool supports(const Problem& p, const Device& d) {
    return within_operator(p, kDepthwise, conv_tile(kDepthwise).max_channels) && p.channels >= 128 &&
           linear_shared_memory(p, d.multiprocessors) <= d.max_shared_memory && first_covered(first_plan(p, d));
  }

  static Config configure(const Problem& p, const Device& d) {
    Config c = Split::configure(p, d);
    const PersistentTile expand = persistent_tile(expand_tile(p, d.multiprocessors));
    c.hidden_chunk = expand.n;
    c.stages = expand.stages;
    c.threads = expand.threads();
    c.shared_memory = std::max(linear_shared_memory(p, d.multiprocessors), first_plan(p, d).shared_memory);
    return c;
  }

  static double cost(const Problem& p, const Device& d, const Config&) {
    const int expand = expand_tile(p, d.multiprocessors), project = project_tile(p, d.multiprocessors);
    return first_plan(p, d).cost + linear_cost(d.multiprocessors, persistent_tile(expand), p, false) +
           linear_cost(d.multiprocessors, persistent_tile(project), p, true);
  }

  template <DType kType, bool kProject>
  static int launch_linear(int tile, LinearParams params, int multiprocessors, cudaStream_t stream) {
    const PersistentTile t = persistent_tile(tile);
    params.grid = static_cast<int>(tiles(t, params.rows, params.columns));
    if (t.warps_k == 1) params.grid = std::min(params.grid, multiprocessors);
    const auto start = [&](auto index) {
      constexpr int kTile = decltype(index)::value;
      if constexpr (persistent_tile(kTile).serves(kProject)) return PersistentLinear<kType, kTile, kProject>::launch(params, stream);
      return -1;  // best_tile left it out
    };
    switch (tile) {
      case 0: return start(std::integral_constant<int, 0>{});
      case 1: return start(std::integral_constant<int, 1>{});
      case 2: return start(std::integral_constant<int, 2>{});
      case 3: return start(std::integral_constant<int, 3>{});
      case 4: return start(std::integral_constant<int, 4>{});
      default: return start(std::integral_constant<int, 5>{});
    }
  }

  template <DType kType>
  static int launch_all(const Problem& p, const Tensors& t, const Config& c, void* workspace, cudaStream_t stream) {
    const int rows = static_cast<int>(pixels(p));
    void* hidden = static_cast<char*>(workspace) + Split::normalised_bytes(p);
    int error = launch_first<kType>(p, t, first_plan(p, planned_device(c)), workspace, stream);
    if (error != 0) return error;
    const LinearParams expand{workspace, t.expand_weight, t.expand_bias, hidden, rows, p.hidden, p.channels,
                              static_cast<int>(p.activation), {}, 1};
    error = launch_linear<kType, false>(expand_tile(p, c.multiprocessors), expand, c.multiprocessors, stream);
    if (error != 0) return error;
    const LinearParams project{hidden, t.project_weight, nullptr, t.y, rows, p.channels, p.hidden, 0, t,
                               static_cast<int>(p.height * p.width)};
    return launch_linear<kType, true>(project_tile(p, c.multiprocessors), project, c.multiprocessors, stream);
  }

  static int launch(const Problem& p, const Tensors& t, const Config& c, void* workspace, cudaStream_t stream) {
    return p.dtype == DType::kHalf ? launch_all<DType::kHalf>(p, t, c, workspace, stream)
                                   : launch_all<DType::kBFloat16>(p, t, c, workspace, stream);
  }

  static constexpr Variant row(const char* name) { return {name, 80, 999, supports, configure, cost, launch, Split::kernel}; }
};

constexpr Variant kRows[] = {
    FusedRow<32, false>::row("sm80_conv_first_c32"),
    FusedRow<64, false>::row("sm80_conv_first_c64"),
    FusedRow<96, false>::row("sm80_conv_first_c96"),
    FusedRow<128, false>::row("sm80_conv_first_c128"),
    FusedRow<192, false>::row("sm80_conv_first_c192"),
    FusedRow<256, false>::row("sm80_conv_first_c256"),
    FusedRow<384, false>::row("sm80_conv_first_c384"),
    FusedRow<48, true>::row("sm80_convnext_c48"),
    FusedRow<64, true>::row("sm80_convnext_c64"),
    FusedRow<96, true>::row("sm80_convnext_c96"),
    FusedRow<128, true>::row("sm80_convnext_c128"),
    FusedRow<192, true>::row("sm80_convnext_c192"),
    FusedRow<256, true>::row("sm80_convnext_c256"),
    FusedRow<384, true>::row("sm80_convnext_c384"),
    SplitRow<false, 0, 0>::row("sm80_conv_first_split_128x128"),
    SplitRow<false, 1, 1>::row("sm80_conv_first_split_96x128"),
    SplitRow<true, 0, 0>::row("sm80_convnext_split_128x128"),
    SplitRow<true, 1, 1>::row("sm80_convnext_split_96x128"),
    PersistentSplitRow<false>::row("sm80_conv_first_split_persistent"),
    PersistentSplitRow<true>::row("sm80_convnext_split_persistent"),
};

}  // namespace
}  // namespace sm80

const Variant* sm80_variants(int* count) {
  *count = static_cast<int>(std::size(sm80::kRows));
  return sm80::kRows;
}

}  // namespace convfirst::block_fusion
