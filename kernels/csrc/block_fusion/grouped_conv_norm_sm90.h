// Host face of grouped_conv_norm_fwd_sm90: A = LayerNorm(conv(x) + bias) for grouped convolutions, the first launch of the split path; a dense
// [batch * height * width, channels] matrix. The tile is chosen here, by pure functions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "conv_norm_extras.h"
#include "params.h"

#ifdef __CUDACC__
#define CONVFIRST_GROUPED_HD __host__ __device__ __forceinline__
#else
#define CONVFIRST_GROUPED_HD inline
#endif

namespace convfirst::block_fusion::sm90 {

constexpr int kWarpChannels = 32;  // output channels of a warp

// A block's pixels: `pixels` in a row through all images (columns == 0: the flat tile), or a rectangle of pixels / columns rows.
// x lies in shared memory with its halo, a pixel a row of `pitch` bytes: an odd number of 16-byte chunks, so no bank conflicts.
struct GroupedTile {
  int m_tiles;       // of 16 pixels, that a warp holds: 1 to 4
  int warps_pixels;  // warps side by side over pixels; those over channels are channels / 32
  int columns;
  int radius;        // kernel_size / 2
  int width;         // of the images

  CONVFIRST_GROUPED_HD int pixels() const { return 16 * m_tiles * warps_pixels; }
  CONVFIRST_GROUPED_HD int rows() const { return columns > 0 ? pixels() / columns : 1; }
  // Pixels from one row of the tile, or of the image, to the next.
  CONVFIRST_GROUPED_HD int row_stride() const { return columns > 0 ? columns + 2 * radius : width; }
  CONVFIRST_GROUPED_HD int staged() const {
    return columns > 0 ? (rows() + 2 * radius) * row_stride() : pixels() + 2 * radius * (width + 1);
  }
  // The staged pixel above and left of everything that the tile's pixel i reads.
  CONVFIRST_GROUPED_HD int corner(int i) const { return columns > 0 ? i / columns * row_stride() + i % columns : i; }
};

struct GroupedPlan {
  GroupedTile tile;
  int tiles_x, tiles_y, tiles;  // of the flat tile only `tiles` counts
  int threads;
  int resident;  // blocks of a multiprocessor
  int shared_memory;
};

// Byte offsets into dynamic shared memory.
struct GroupedLayout {
  int pitch, zero, table, moments, scales, total;
};

CONVFIRST_GROUPED_HD GroupedLayout grouped_layout(const GroupedTile& t, int channels, int kernel_size) {
  GroupedLayout s;
  s.pitch = channels * 2 + 16;
  s.zero = t.staged() * s.pitch;  // a pixel of zeros, for the padding
  s.table = s.zero + s.pitch;     // of every tap and pixel: where its input lies; one tap of zeros more
  s.moments = s.table + (kernel_size * kernel_size + 1) * t.pixels() * 4;
  s.scales = s.moments + channels / kWarpChannels * t.pixels() * 8;
  s.total = s.scales + t.pixels() * 8;
  return s;
}

struct GroupedParams {
  const void* x;
  const void* weight;
  const float* bias;
  const float* norm_weight;
  const float* norm_bias;
  const void* residual;  // added to the sums where there is no norm, or nullptr
  void* a;
  float* rstd;  // of each pixel, or nullptr
  float eps;
  int has_norm, batch, height, width, channels;
  GroupedPlan plan;
  GroupedLayout layout;
};

inline bool grouped_covers(const Problem& q) {
  if (q.batch <= 0 || q.height <= 0 || q.width <= 0) return false;
  if (q.batch * q.height * q.width > (int64_t{1} << 31) / std::max(q.channels, 1)) return false;
  return (q.kernel_size == 3 || q.kernel_size == 5) && (q.group_width == 8 || q.group_width == 16) && q.channels % kWarpChannels == 0 &&
         q.channels >= 32 && q.channels <= 1024;
}

// Threads that a block of this many m-tiles a warp may have, and registers of a thread.
constexpr int grouped_most_threads(int m_tiles) { return m_tiles == 1 ? 1024 : 512; }
constexpr int grouped_registers(int m_tiles) { return m_tiles == 1 ? 64 : m_tiles == 2 ? 80 : m_tiles == 3 ? 104 : 128; }

inline bool grouped_place(const Problem& q, const Device& device, GroupedPlan* plan) {
  const GroupedTile& t = plan->tile;
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  plan->threads = q.channels / kWarpChannels * t.warps_pixels * 32;
  if (plan->threads > grouped_most_threads(t.m_tiles)) return false;
  if (t.columns > 0 && t.pixels() % t.columns != 0) return false;
  const int64_t bytes = int64_t{t.staged()} * (q.channels * 2 + 16);
  if (bytes > device.max_shared_memory) return false;
  plan->shared_memory = grouped_layout(t, q.channels, q.kernel_size).total;
  if (plan->shared_memory > device.max_shared_memory) return false;
  const int64_t pixels = q.batch * q.height * q.width;
  plan->tiles_x = t.columns > 0 ? static_cast<int>(ceil_div(q.width, t.columns)) : 1;
  plan->tiles_y = t.columns > 0 ? static_cast<int>(ceil_div(q.height, t.rows())) : 1;
  plan->tiles = static_cast<int>(t.columns > 0 ? q.batch * plan->tiles_x * plan->tiles_y : ceil_div(pixels, t.pixels()));
  const int by_registers = 65536 / (plan->threads * grouped_registers(t.m_tiles));
  const int by_memory = (device.max_shared_memory + 1024) / (plan->shared_memory + 1024);
  plan->resident = std::max(1, std::min({by_registers, by_memory, 2048 / plan->threads, 16}));
  return true;
}

// Microseconds: rounds of blocks, each a chain of latencies and what its multiprocessor's schedulers issue. Fitted to a sweep of all
// tiles (NOTES.md), of which it picks one within 6 % of the best; a block alone on its multiprocessor hides nothing of its latencies.
inline double grouped_cost(const Problem& q, const Device& device, const GroupedPlan& plan) {
  const int64_t slots = int64_t{device.multiprocessors} * plan.resident;
  const double rounds = static_cast<double>((plan.tiles + slots - 1) / slots);
  const double resident = std::min<double>(plan.resident, std::max(1.0, plan.tiles / double(device.multiprocessors)));
  const int taps = q.kernel_size * q.kernel_size;
  const double products = q.group_width == 8 ? (taps + 1) / 2 * 8.0 : taps * 6.0;  // instructions for 16 pixels x 32 channels
  const double halo = plan.tile.staged() / double(plan.tile.pixels());
  const double issued = plan.threads / 128.0 * plan.tile.m_tiles * (1.2 * products + 70 + 25 * halo);
  const double alone = plan.resident == 1 ? 1.1 : 1.0, rectangle = plan.tile.columns > 0 ? 0.3 : 0.0;
  return 2 + rectangle + alone * rounds * (5500 + 4.2 * resident * issued) / 1700;
}

inline bool grouped_plan(const Problem& q, const Device& device, GroupedPlan* best) {
  if (!grouped_covers(q)) return false;
  double least = 1e30;
  for (int m_tiles = 1; m_tiles <= 4; ++m_tiles) {
    for (int warps = 1; warps <= 8; warps *= 2) {
      for (int columns = 0; columns <= 64; columns = columns == 0 ? 8 : columns * 2) {
        GroupedPlan plan{};
        plan.tile = {m_tiles, warps, columns, q.kernel_size / 2, static_cast<int>(std::min<int64_t>(q.width, 1 << 20))};
        if (!grouped_place(q, device, &plan)) continue;
        const double cost = grouped_cost(q, device, plan);
        if (cost < least) least = cost, *best = plan;
      }
    }
  }
  return least < 1e30;
}

// For tests and logs.
inline std::string grouped_describe(const GroupedPlan& plan) {
  const auto field = [](const char* name, int value) { return std::string(name) + " " + std::to_string(value); };
  return field("m_tiles", plan.tile.m_tiles) + field(", warps_pixels", plan.tile.warps_pixels) + field(", columns", plan.tile.columns) +
         field(", tiles", plan.tiles) + field(", threads", plan.threads) + field(", resident", plan.resident) +
         field(", shared_memory", plan.shared_memory);
}

// The compiled kernel; launch returns cudaError_t as int and never synchronises. dependent: start while the kernel before in the
// stream still runs (programmatic dependent launch); the kernel waits for its inputs itself.
template <DType kDType, int kKernel, int kGroupWidth, int kMTiles>
struct GroupedKernel {
  static int launch(const GroupedParams& params, bool dependent, cudaStream_t stream);
  static const void* pointer();
};

// a: [batch * height * width, channels] of the problem's dtype, 16-byte aligned. Reads x, conv_weight, conv_bias, norm_weight,
// norm_bias and eps of the tensors. extras: see conv_norm_extras.h.
int grouped_launch(const Problem& q, const Tensors& t, const GroupedPlan& plan, void* a, bool dependent, cudaStream_t stream,
                   const ConvNormExtras& extras = {});

const void* grouped_pointer(const Problem& q, const GroupedPlan& plan);

}  // namespace convfirst::block_fusion::sm90
