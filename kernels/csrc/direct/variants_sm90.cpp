// The Hopper path's rows of the planner's table: what each kernel takes, how it is configured, what it should cost.
#include <iterator>

#include "dgrad_sm90.h"
#include "few_taps_sm90.h"
#include "first_layer_sm90.h"
#include "first_layer_wgrad_sm90.h"
#include "float_gemm_sm90.h"
#include "launch_sm90.h"
#include "resident_halo_sm90.h"
#include "wgrad_sm90.h"

namespace convfirst::direct {
namespace sm90 {
namespace {

GemmProblem forward_problem(const Problem& q) {
  GemmProblem g{};
  g.batch = q.batch, g.height = q.height, g.width = q.width, g.channels = q.channels;
  g.out_h = q.out_h(), g.out_w = q.out_w(), g.filters = q.filters;
  g.kernel_h = q.kernel_h, g.kernel_w = q.kernel_w, g.stride_h = q.stride_h, g.stride_w = q.stride_w;
  g.pad_h = q.pad_h, g.pad_w = q.pad_w, g.dilation_h = q.dilation_h, g.dilation_w = q.dilation_w;
  g.y_stride_q = q.filters, g.y_stride_p = g.y_stride_q * g.out_w, g.y_stride_n = g.y_stride_p * g.out_h;
  g.dtype = q.dtype, g.activation = q.activation;
  return g;
}

Config config_of(const GemmPlan& plan) {
  Config c{};
  c.tile_pixels = kGemmTiles[plan.tile].rows(), c.hidden_chunk = kGemmTiles[plan.tile].columns, c.stages = kGemmTiles[plan.tile].slots();
  c.threads = plan.threads, c.grid = plan.grid, c.shared_memory = plan.shared_memory, c.launches = 1;
  return c;
}

Device device_of(const Config& c) { return {90, c.multiprocessors, kSharedMemory}; }

template <int kTile>
struct GemmRow {
  static bool supports(const Problem& q, const Device&) {
    const GemmProblem g = forward_problem(q);
    return q.direction == Direction::kForward && q.dtype != DType::kFloat && gemm_supports(g) && tile_supports(g, kTile);
  }
  static Config configure(const Problem& q, const Device& d) {
    Config c = config_of(plan_gemm_tile(forward_problem(q), d, kTile));
    c.multiprocessors = d.multiprocessors;
    return c;
  }
  static double cost(const Problem& q, const Device& d, const Config&) { return plan_gemm_tile(forward_problem(q), d, kTile).cost; }
  static int launch(const Problem& q, const Tensors& t, const Config& c, void*, cudaStream_t stream) {
    const GemmProblem g = forward_problem(q);
    return launch_gemm(g, {t.x, t.weight, t.bias, t.result}, plan_gemm_tile(g, device_of(c), kTile), stream);
  }
  static const void* kernel(const Problem& q) { return gemm_kernel(q.dtype, kTile, false); }
  static constexpr Variant row(const char* name) { return {name, 90, 90, supports, configure, cost, launch, kernel}; }
};

template <int kTile, int kSplit>
struct SplitRow {
  static bool supports(const Problem& q, const Device&) {
    const GemmProblem g = forward_problem(q);
    return q.direction == Direction::kForward && q.dtype != DType::kFloat && gemm_supports(g) && split_supports(g, kSplit);
  }
  static Config configure(const Problem& q, const Device& d) {
    const SplitPlan plan = plan_split(forward_problem(q), d, kTile, kSplit);
    const SplitTile& t = kSplitTiles[kTile];
    Config c{};
    c.tile_pixels = t.rows(), c.hidden_chunk = t.columns, c.stages = t.slots(), c.threads = plan.threads, c.grid = plan.grid;
    c.shared_memory = plan.shared_memory, c.launches = 1, c.multiprocessors = d.multiprocessors;
    return c;
  }
  static double cost(const Problem& q, const Device& d, const Config&) { return plan_split(forward_problem(q), d, kTile, kSplit).cost; }
  static int launch(const Problem& q, const Tensors& t, const Config& c, void*, cudaStream_t stream) {
    const GemmProblem g = forward_problem(q);
    return launch_split(g, {t.x, t.weight, t.bias, t.result}, plan_split(g, device_of(c), kTile, kSplit), stream);
  }
  static const void* kernel(const Problem& q) { return split_kernel(q.dtype, kTile); }
  static constexpr Variant row(const char* name) { return {name, 90, 90, supports, configure, cost, launch, kernel}; }
};

template <int kColumns, int kSplit>
struct HaloRow {
  static bool supports(const Problem& q, const Device&) {
    const GemmProblem g = forward_problem(q);
    return q.direction == Direction::kForward && q.dtype != DType::kFloat && gemm_supports(g) && halo_supports(g, kSplit);
  }
  static Config configure(const Problem& q, const Device& d) {
    const HaloPlan plan = plan_halo(forward_problem(q), d, kColumns, kSplit);
    Config c{};
    c.tile_height = 128 >> plan.pitch_shift, c.tile_width = (1 << plan.pitch_shift) - 2, c.tile_pixels = 128, c.hidden_chunk = kColumns;
    c.stages = HaloTraits<DType::kHalf, kColumns>::kSlots, c.threads = plan.threads, c.grid = plan.grid;
    c.shared_memory = plan.shared_memory, c.launches = 1, c.multiprocessors = d.multiprocessors;
    return c;
  }
  static double cost(const Problem& q, const Device& d, const Config&) { return plan_halo(forward_problem(q), d, kColumns, kSplit).cost; }
  static int launch(const Problem& q, const Tensors& t, const Config& c, void*, cudaStream_t stream) {
    const GemmProblem g = forward_problem(q);
    return launch_halo(g, {t.x, t.weight, t.bias, t.result}, plan_halo(g, device_of(c), kColumns, kSplit), stream);
  }
  static const void* kernel(const Problem& q) { return halo_kernel(q.dtype, kColumns); }
  static constexpr Variant row(const char* name) { return {name, 90, 90, supports, configure, cost, launch, kernel}; }
};

struct ResidentRow {
  static bool supports(const Problem& q, const Device&) {
    const GemmProblem g = forward_problem(q);
    return q.direction == Direction::kForward && q.dtype != DType::kFloat && gemm_supports(g) && resident_supports(g);
  }
  static Config configure(const Problem& q, const Device& d) {
    const ResidentPlan plan = plan_resident(forward_problem(q), d);
    Config c{};
    c.tile_height = kResidentHeight, c.tile_width = kResidentWidth, c.tile_pixels = 128, c.hidden_chunk = kResidentColumns;
    c.stages = ResidentTraits<DType::kHalf>::kSlots, c.threads = plan.threads, c.grid = plan.grid;
    c.shared_memory = plan.shared_memory, c.launches = 1, c.multiprocessors = d.multiprocessors;
    return c;
  }
  static double cost(const Problem& q, const Device& d, const Config&) { return plan_resident(forward_problem(q), d).cost; }
  static int launch(const Problem& q, const Tensors& t, const Config& c, void*, cudaStream_t stream) {
    const GemmProblem g = forward_problem(q);
    return launch_resident(g, {t.x, t.weight, t.bias, t.result}, plan_resident(g, device_of(c)), stream);
  }
  static const void* kernel(const Problem& q) { return resident_kernel(q.dtype); }
  static constexpr Variant row() { return {"sm90_resident_halo", 90, 90, supports, configure, cost, launch, kernel}; }
};

struct FewRow {
  static bool supports(const Problem& q, const Device&) { return few_supports(q); }
  static Config configure(const Problem& q, const Device& d) {
    const FewPlan plan = plan_few(q, d);
    Config c{};
    c.tile_pixels = 16, c.hidden_chunk = kFewColumns, c.threads = kFewThreads, c.grid = plan.grid_x * plan.grid_y, c.launches = 1;
    c.multiprocessors = d.multiprocessors;
    return c;
  }
  static double cost(const Problem& q, const Device& d, const Config&) { return plan_few(q, d).cost; }
  static int launch(const Problem& q, const Tensors& t, const Config& c, void*, cudaStream_t stream) {
    return launch_few(q, t, plan_few(q, device_of(c)), stream);
  }
  static const void* kernel(const Problem& q) { return few_kernel(q.dtype); }
  static constexpr Variant row() { return {"sm90_few_taps", 90, 90, supports, configure, cost, launch, kernel}; }
};

Config float_config(const FloatPlan& plan, const Device& d) {
  const FloatTile& t = kFloatTiles[plan.tile];
  Config c{};
  c.tile_pixels = t.rows(), c.hidden_chunk = t.columns(), c.stages = t.slots(), c.threads = kFloatThreads, c.grid = plan.grid;
  c.shared_memory = plan.shared_memory, c.launches = 2, c.workspace = plan.workspace, c.multiprocessors = d.multiprocessors;
  return c;
}

template <int kTile>
struct FloatRow {
  static bool supports(const Problem& q, const Device& d) {
    return q.direction == Direction::kForward && q.dtype == DType::kFloat && d.max_shared_memory >= kSharedMemory &&
           float_supports(forward_problem(q), d, kTile);
  }
  static Config configure(const Problem& q, const Device& d) {
    return float_config(plan_float_tile(forward_problem(q), d, kTile), d);
  }
  static double cost(const Problem& q, const Device& d, const Config&) { return plan_float_tile(forward_problem(q), d, kTile).cost; }
  static int launch(const Problem& q, const Tensors& t, const Config& c, void* workspace, cudaStream_t stream) {
    const auto floats = [](const void* data) { return static_cast<const float*>(data); };
    const FloatTensors tensors{floats(t.x), floats(t.weight), t.bias, static_cast<float*>(t.result), workspace};
    const GemmProblem g = forward_problem(q);
    return launch_float(g, tensors, plan_float_tile(g, device_of(c), kTile), stream);
  }
  static const void* kernel(const Problem&) { return float_kernel(kTile); }
  static constexpr Variant row(const char* name) { return {name, 90, 90, supports, configure, cost, launch, kernel}; }
};

// kRgb: three channels and the strides that were timed at their layers, 2, 4, and 1 where the filter is more than a few taps;
// else whatever more the kernel takes, by name alone.
template <bool kRgb>
struct FirstRow {
  static bool supports(const Problem& q, const Device& d) {
    const bool rgb = q.channels == 3 && (q.stride_w == 2 || q.stride_w == 4 || (q.stride_w == 1 && !few_supports(q)));
    return rgb == kRgb && first_supports(q, d);
  }
  static Config configure(const Problem& q, const Device& d) {
    const FirstPlan plan = plan_first(q, d);
    Config c{};
    c.tile_height = plan.layout.rows, c.tile_width = 64, c.tile_pixels = 64 * plan.layout.rows, c.hidden_chunk = plan.columns, c.stages = 2;
    c.threads = kFirstThreads, c.grid = plan.grid, c.shared_memory = plan.shared_memory, c.launches = 2, c.multiprocessors = d.multiprocessors;
    c.workspace = plan.workspace;
    return c;
  }
  static double cost(const Problem& q, const Device& d, const Config&) { return plan_first(q, d).cost; }
  static int launch(const Problem& q, const Tensors& t, const Config& c, void* workspace, cudaStream_t stream) {
    return launch_first(q, t, plan_first(q, device_of(c)), workspace, stream);
  }
  static const void* kernel(const Problem& q) { return first_kernel(q.dtype, 64); }
  static constexpr Variant row(const char* name) { return {name, 90, 90, supports, configure, cost, launch, kernel, kRgb}; }
};

struct DgradRow {
  static bool supports(const Problem& q, const Device& d) {
    if (q.direction != Direction::kDgrad || q.dtype == DType::kFloat || !dgrad_supports(q)) return false;
    bool all = true;
    for_each_phase(q, [&](int, int, const Phase& h, const Phase& w) {
      if (h.taps == 0 || w.taps == 0) return;
      const GemmProblem g = dgrad_problem(q, h, w);
      all = all && gemm_supports(g) && plan_gemm(g, d).grid > 0;
    });
    return all;
  }
  static Config configure(const Problem& q, const Device& d) {
    Config c{};
    int launches = 0;
    for_each_phase(q, [&](int, int, const Phase& h, const Phase& w) {
      if (h.taps == 0 || w.taps == 0) return;
      const DgradPlan plan = plan_dgrad(dgrad_problem(q, h, w), d);
      if (c.grid == 0) c = config_of(plan.first);
      launches += (plan.rest_problem.batch > 0 ? 2 : 1) + !reads_transposed(q);
    });
    c.launches = launches, c.multiprocessors = d.multiprocessors;
    if (!reads_transposed(q)) c.workspace = int64_t{2} * q.filters * q.taps() * q.channels;
    return c;
  }
  static double cost(const Problem& q, const Device& d, const Config&) {
    double sum = 0;
    for_each_phase(q, [&](int, int, const Phase& h, const Phase& w) {
      if (h.taps > 0 && w.taps > 0) sum += plan_dgrad(dgrad_problem(q, h, w), d).cost() + (reads_transposed(q) ? 0 : 5);
    });
    return sum;
  }
  static int launch(const Problem& q, const Tensors& t, const Config& c, void* workspace, cudaStream_t stream) {
    return launch_dgrad(q, t, device_of(c), workspace, stream);
  }
  static const void* kernel(const Problem& q) { return gemm_kernel(q.dtype, 0, reads_transposed(q)); }
  static constexpr Variant row() { return {"sm90_dgrad", 90, 90, supports, configure, cost, launch, kernel}; }
};

// Of stride 1, by the forward kernel.
struct FloatDgradRow {
  static bool supports(const Problem& q, const Device& d) {
    if (q.direction != Direction::kDgrad || q.dtype != DType::kFloat || q.stride_h != 1 || q.stride_w != 1) return false;
    const GemmProblem g = float_dgrad_problem(q);
    return q.out_pixels() > 0 && d.max_shared_memory >= kSharedMemory && float_supports(g, d, plan_float(g, d).tile);
  }
  static Config configure(const Problem& q, const Device& d) {
    Config c = float_config(plan_float(float_dgrad_problem(q), d), d);
    c.launches = 3, c.workspace += int64_t{4} * q.filters * q.taps() * q.channels;
    return c;
  }
  static double cost(const Problem& q, const Device& d, const Config&) { return plan_float(float_dgrad_problem(q), d).cost + 5; }
  static int launch(const Problem& q, const Tensors& t, const Config& c, void* workspace, cudaStream_t stream) {
    return launch_float_dgrad(q, t, plan_float(float_dgrad_problem(q), device_of(c)), workspace, stream);
  }
  static const void* kernel(const Problem&) { return float_kernel(0); }
  static constexpr Variant row() { return {"sm90_float_dgrad", 90, 90, supports, configure, cost, launch, kernel}; }
};

template <int kTile>
struct WgradRow {
  static bool supports(const Problem& q, const Device& d) { return wgrad_supports(q) && d.max_shared_memory >= kWgradSharedMemory; }
  static Config configure(const Problem& q, const Device& d) {
    const WgradPlan plan = plan_wgrad_tile(q, d, kTile);
    const WgradTile& t = kWgradTiles[kTile];
    Config c{};
    c.tile_pixels = kWgradPixels, c.hidden_chunk = t.columns, c.stages = t.slots(), c.threads = t.threads(), c.grid = plan.grid;
    c.shared_memory = t.shared_bytes(), c.launches = 1 + (plan.units > 0), c.workspace = plan.workspace, c.multiprocessors = d.multiprocessors;
    return c;
  }
  static double cost(const Problem& q, const Device& d, const Config&) { return plan_wgrad_tile(q, d, kTile).cost; }
  static int launch(const Problem& q, const Tensors& t, const Config& c, void* workspace, cudaStream_t stream) {
    return launch_wgrad(q, t, plan_wgrad_tile(q, device_of(c), kTile), workspace, stream);
  }
  static const void* kernel(const Problem& q) { return wgrad_kernel(q.dtype, kTile, wgrad_panel(q.channels)); }
  static constexpr Variant row(const char* name) { return {name, 90, 90, supports, configure, cost, launch, kernel}; }
};

struct FirstWgradRow {
  static bool supports(const Problem& q, const Device& d) { return first_wgrad_supports(q, d); }
  static Config configure(const Problem& q, const Device& d) {
    const FirstWgradPlan plan = plan_first_wgrad(q, d);
    Config c{};
    c.tile_pixels = 64, c.hidden_chunk = kFirstWgradColumns, c.stages = plan.slots, c.threads = kFirstWgradThreads, c.grid = plan.groups * plan.sharers;
    c.shared_memory = plan.shared_memory, c.launches = 3, c.workspace = plan.workspace, c.multiprocessors = d.multiprocessors;
    return c;
  }
  static double cost(const Problem& q, const Device& d, const Config&) { return plan_first_wgrad(q, d).cost; }
  static int launch(const Problem& q, const Tensors& t, const Config& c, void* workspace, cudaStream_t stream) {
    return launch_first_wgrad(q, t, plan_first_wgrad(q, device_of(c)), workspace, stream);
  }
  static const void* kernel(const Problem& q) { return first_wgrad_kernel(q.dtype); }
  static constexpr Variant row(const char* name) { return {name, 90, 90, supports, configure, cost, launch, kernel}; }
};

constexpr Variant kTable[] = {
    GemmRow<0>::row("sm90_gemm_192x128"), GemmRow<1>::row("sm90_gemm_128x128"), GemmRow<2>::row("sm90_gemm_192x192"),
    GemmRow<3>::row("sm90_gemm_256x128"), GemmRow<4>::row("sm90_gemm_128x256"), GemmRow<5>::row("sm90_gemm_192x64"),
    GemmRow<6>::row("sm90_gemm_192x96"),
    SplitRow<0, 2>::row("sm90_split_128x128x2"), SplitRow<0, 4>::row("sm90_split_128x128x4"), SplitRow<1, 2>::row("sm90_split_128x64x2"),
    SplitRow<1, 4>::row("sm90_split_128x64x4"),
    HaloRow<128, 1>::row("sm90_halo_128x128"), HaloRow<128, 2>::row("sm90_halo_128x128x2"), HaloRow<64, 1>::row("sm90_halo_128x64"),
    HaloRow<64, 2>::row("sm90_halo_128x64x2"), HaloRow<64, 4>::row("sm90_halo_128x64x4"),
    ResidentRow::row(), FewRow::row(),
    FloatRow<0>::row("sm90_float_256x128"), FloatRow<1>::row("sm90_float_512x64"), FloatRow<2>::row("sm90_float_128x256"),
    FirstRow<true>::row("sm90_first_layer"), FirstRow<false>::row("sm90_first_layer_any"), DgradRow::row(), FloatDgradRow::row(),
    WgradRow<0>::row("sm90_wgrad_256x192"), WgradRow<1>::row("sm90_wgrad_192x192"), WgradRow<2>::row("sm90_wgrad_192x128"),
    WgradRow<3>::row("sm90_wgrad_128x256"), WgradRow<4>::row("sm90_wgrad_256x128"),
    FirstWgradRow::row("sm90_first_layer_wgrad"),
};
static_assert(std::size(kTable) == kGemmTileCount + kFloatTileCount + kWgradTileCount + 16);

}  // namespace
}  // namespace sm90

const Variant* sm90_variants(int* count) {
  *count = static_cast<int>(std::size(sm90::kTable));
  return sm90::kTable;
}

}  // namespace convfirst::direct
