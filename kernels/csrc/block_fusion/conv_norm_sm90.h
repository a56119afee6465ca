// Host face of conv_norm_fwd_sm90, the first launch of the split path on Hopper for depthwise filters: A = LayerNorm(conv(x) + bias), a dense
// [batch * height * width, channels] matrix. Tile, cluster and shared memory are chosen here, by pure functions.
//
//   conv_norm_plan(problem, device, &plan)    false: not covered
//   conv_norm_cost(problem, device, plan)     estimated microseconds
//   conv_norm_describe(plan)                  for tests and logs
//   conv_norm_launch(problem, tensors, plan, a, dependent, stream)
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "conv_norm_extras.h"
#include "params.h"

#ifdef __CUDACC__
#define CONVFIRST_CONV_NORM_HD __host__ __device__
#else
#define CONVFIRST_CONV_NORM_HD
#endif

namespace convfirst::block_fusion::sm90 {

constexpr int kConvNormThreads = 512;
constexpr int kConvNormKernel = 7;
constexpr int kConvNormSlots = 8;       // strips of 8 pixels x up to 8 rows that a tile holds
constexpr int kConvNormSlice = 32;      // channels of x in shared memory at a time
constexpr int kConvNormMostSlab = 512;  // channels of a block
constexpr int kConvNormMostCluster = 8; // what every Hopper device can place

// Units of a slice's plane that the 16 warps rearrange, 4 (narrow) or 7 each.
constexpr int conv_norm_most_units(bool narrow) { return narrow ? 64 : 112; }

// A tile: `images` images x `groups` groups of `rows` rows x `strips` strips of 8 pixels. A slot is one strip of one group. x lies in
// units of 8 pixels (of one channel: 16 bytes; of a slice: 512 bytes), rows with their halo one after another; whole
// images share the zero rows between them. narrow (width <= 8): a row is one unit, without halo columns.
struct ConvNormTile {
  int images, groups, rows, strips;
  bool narrow;
  int row_units;           // strips and halo
  int skew;                // extra units after each group's rows: the slots then fall into different banks
  int image_units;         // from one image to the next
  int plane_units;         // all
  int box_rows, box_cols;  // pixels that a TMA load brings, of each image; whole dimensions come without halo
  int pad_rows, pad_cols;  // halo that it leaves out: zeros

  CONVFIRST_CONV_NORM_HD int slots() const { return images * groups * strips; }
  CONVFIRST_CONV_NORM_HD int row_unit(int row) const { return row * row_units + (skew != 0 ? row / rows * skew : 0); }
  // The slot's first unit.
  CONVFIRST_CONV_NORM_HD int slot_unit(int slot) const {
    const int group = slot / strips;
    return group / groups * image_units + row_unit(group % groups * rows) + slot % strips;
  }
  CONVFIRST_CONV_NORM_HD int box_bytes() const { return images * box_rows * box_cols * 64; }
};

struct ConvNormPlan {
  ConvNormTile tile;
  int tiles_y, tiles_x, tiles;
  int step_image, step_y, step_x;  // from a cluster's tile to its next, in tiles
  int slab;      // channels of one block
  int cluster;   // blocks that share a tile
  int clusters;  // launched
  int shared_memory;
  int grid() const { return clusters * cluster; }
};

// Byte offsets into dynamic shared memory.
struct ConvNormLayout {
  int buffer_bytes, plane_bytes, planes, pitch, staged_rows, staging, weights, vectors, slots, zero, barriers, moments, total;
};

// Staged pixels a row of the tile: those of even slots, then, an odd number on (so that a warp's stores hit all banks), of odd slots.
CONVFIRST_CONV_NORM_HD inline int conv_norm_odd_slots(const ConvNormTile& t) { return t.slots() > 4 ? 33 : t.slots() > 2 ? 17 : 9; }
CONVFIRST_CONV_NORM_HD inline int conv_norm_row_stride(const ConvNormTile& t) {
  return 2 * conv_norm_odd_slots(t) - (t.slots() == 7 ? 9 : 1);
}

CONVFIRST_CONV_NORM_HD inline ConvNormLayout conv_norm_layout(const ConvNormTile& t, int slab, int cluster) {
  ConvNormLayout s;
  const int chunks = (slab + 7) / 8;
  s.buffer_bytes = (t.box_bytes() + 1023) / 1024 * 1024;
  s.plane_bytes = t.plane_units * 16 + 16;  // 16 more than a multiple of 128: 8 channels of a pixel lie in different banks
  s.planes = s.buffer_bytes;
  s.pitch = (chunks % 2 == 0 ? chunks + 1 : chunks) * 16;  // an odd number of 16-byte chunks: no bank conflicts
  s.staged_rows = (t.rows == 8 ? 8 : 7) * conv_norm_row_stride(t);
  s.staging = s.planes + kConvNormSlice * s.plane_bytes;
  s.weights = s.staging + s.staged_rows * s.pitch;
  s.vectors = s.weights + slab * 56 * 4;
  s.slots = s.vectors + 3 * chunks * 8 * 4;
  s.zero = s.slots + kConvNormSlots * 8;
  s.barriers = s.zero + 16;
  s.moments = s.barriers + 4 * 8;
  s.total = s.moments + (cluster > 1 ? 2 : 1) * s.staged_rows * 8;
  return s;
}

// What the kernel receives.
struct ConvNormParams {
  const void* x;
  const void* weight;
  const float* bias;
  const float* norm_weight;
  const float* norm_bias;
  const void* residual;  // added to the convolution where there is no norm, or nullptr
  void* a;
  float* rstd;  // of each pixel, or nullptr
  float eps;
  int has_norm, batch, height, width, channels;
  ConvNormPlan plan;
  ConvNormLayout layout;
};

namespace conv_norm {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Every slot's first unit in a different bank (of 8 units)?
inline bool banks_differ(const ConvNormTile& t) {
  unsigned used = 0;
  for (int slot = 0; slot < t.slots(); ++slot) {
    const unsigned bit = 1u << t.slot_unit(slot) % 8;
    if (used & bit) return false;
    used |= bit;
  }
  return true;
}

// Sizes in shared memory and what to load, from the tile's shape.
inline ConvNormTile laid_out(const Problem& q, int images, int groups, int rows, int strips) {
  const int pad = q.kernel_size / 2, height = static_cast<int>(q.height), width = static_cast<int>(q.width);
  const int all_rows = groups * rows + q.kernel_size - 1;
  const bool whole_height = groups * rows >= height, whole_width = strips * 8 >= width;
  ConvNormTile t{};
  t.images = images, t.groups = groups, t.rows = rows, t.strips = strips;
  t.narrow = width <= 8;
  t.row_units = t.narrow ? 1 : strips + 1;
  t.box_rows = whole_height ? height : all_rows;
  t.box_cols = whole_width ? width : 8 * t.row_units;
  t.pad_rows = whole_height ? pad : 0;
  t.pad_cols = whole_width && !t.narrow ? pad : 0;
  const auto measure = [&](int skew, int gap) {
    t.skew = skew;
    t.image_units = t.row_unit(whole_height ? height + pad : all_rows) + gap;
    t.plane_units = static_cast<int>(ceil_div((images - 1) * t.image_units + t.row_unit(all_rows - 1) + t.row_units, 8) * 8);
  };
  ConvNormTile best{};  // the least of the layouts without bank conflicts
  for (int skew = 0; skew < (groups > 1 ? 8 : 1); ++skew)
    for (int gap = 0; gap < (images > 1 ? 8 : 1); ++gap) {
      measure(skew, gap);
      if (banks_differ(t) && (best.plane_units == 0 || t.plane_units < best.plane_units)) best = t;
    }
  if (best.plane_units != 0) return best;
  measure(0, 0);
  return t;
}

// Clocks of a block for one tile: what a warp issues, 16 warps at the 10 clocks an instruction of each that were measured, and the exchange
// within a cluster (NOTES.md).
inline double tile_clocks(const ConvNormPlan& plan) {
  const ConvNormTile& t = plan.tile;
  const int slices = static_cast<int>(ceil_div(plan.slab, kConvNormSlice));
  const double slice = 12.0 * ceil_div(t.images * t.box_rows * t.row_units, 16) + 300 + (t.narrow ? 38 : 67);
  const double norm = 150.0 + 55 * ceil_div(t.rows, 2) * slices + (10.0 * slices + 30) * ceil_div(t.rows * conv_norm_row_stride(t), 256);
  return 10 * (slices * slice + norm) + (plan.cluster > 1 ? 440 * plan.cluster : 0);
}

// Blocks of a cluster lie in one group of up to 18 multiprocessors; measured on an H200 (132), one block a multiprocessor.
inline int clusters_at_once(const Device& device, int cluster) {
  constexpr int kOf132[kConvNormMostCluster + 1] = {0, 132, 66, 39, 30, 22, 17, 15, 15};
  return std::max(1, kOf132[cluster] * device.multiprocessors / 132);
}

inline bool place(const Problem& q, const Device& device, ConvNormPlan* plan) {
  const ConvNormTile& t = plan->tile;
  if (t.images * t.box_rows * t.row_units > conv_norm_most_units(t.narrow)) return false;
  if (t.box_rows > 256 || t.box_cols > 256 || t.images > 256) return false;
  plan->shared_memory = conv_norm_layout(t, plan->slab, plan->cluster).total;
  if (plan->shared_memory > device.max_shared_memory) return false;
  plan->tiles_y = static_cast<int>(ceil_div(q.height, t.groups * t.rows));
  plan->tiles_x = static_cast<int>(ceil_div(q.width, t.strips * 8));
  const int64_t tiles = ceil_div(q.batch, t.images) * plan->tiles_y * plan->tiles_x;
  if (tiles > (int64_t{1} << 30)) return false;
  plan->tiles = static_cast<int>(tiles);
  const int at_once = clusters_at_once(device, plan->cluster);
  plan->clusters = static_cast<int>(std::min<int64_t>(tiles, at_once));
  plan->step_x = plan->clusters % plan->tiles_x;
  plan->step_y = plan->clusters / plan->tiles_x % plan->tiles_y;
  plan->step_image = plan->clusters / plan->tiles_x / plan->tiles_y;
  return true;
}

}  // namespace conv_norm

inline bool conv_norm_covers(const Problem& q) {
  if (q.batch <= 0 || q.height <= 0 || q.width <= 0) return false;
  if (q.batch * q.height * q.width >= (int64_t{1} << 31) / std::max(q.channels, 1) - q.width * 8) return false;
  return q.group_width == 1 && q.kernel_size == kConvNormKernel && q.channels % 8 == 0 && q.channels >= 8 && q.channels <= 1536;
}

// The tile and cluster of least estimated time; false where the kernel does not cover the problem.
inline bool conv_norm_plan(const Problem& q, const Device& device, ConvNormPlan* best) {
  if (device.capability != 90 || !conv_norm_covers(q)) return false;
  double best_cost = 1e30;
  for (int slab = 32; slab <= kConvNormMostSlab; slab += 32) {
    ConvNormPlan plan{};
    plan.cluster = static_cast<int>(conv_norm::ceil_div(q.channels, slab));
    plan.slab = plan.cluster == 1 ? q.channels : slab;
    if (plan.cluster > kConvNormMostCluster) continue;
    const int most_strips = static_cast<int>(std::min<int64_t>(kConvNormSlots, conv_norm::ceil_div(q.width, 8)));
    for (int strips = 1; strips <= most_strips; ++strips) {
      for (int rows = std::min<int>(7, static_cast<int>(q.height)); rows <= std::min<int64_t>(8, q.height); ++rows) {
        const int most_groups = static_cast<int>(std::min<int64_t>(kConvNormSlots / strips, conv_norm::ceil_div(q.height, rows)));
        for (int groups = 1; groups <= most_groups; ++groups) {
          const bool whole = strips * 8 >= q.width && groups * rows >= q.height;
          const int most_images = whole ? static_cast<int>(std::min<int64_t>(q.batch, kConvNormSlots / (strips * groups))) : 1;
          for (int images = 1; images <= most_images; ++images) {
            plan.tile = conv_norm::laid_out(q, images, groups, rows, strips);
            if (!conv_norm::place(q, device, &plan)) continue;
            const double rounds = static_cast<double>(conv_norm::ceil_div(plan.tiles, plan.clusters));
            const double cost = rounds * conv_norm::tile_clocks(plan) + 400 * plan.cluster;
            if (cost < best_cost) best_cost = cost, *best = plan;
          }
        }
      }
    }
  }
  return best_cost < 1e30;
}

inline double conv_norm_cost(const Problem& q, const Device&, const ConvNormPlan& plan) {
  const double rounds = static_cast<double>(conv_norm::ceil_div(plan.tiles, plan.clusters));
  const double memory = q.batch * q.height * q.width * q.channels * 4.0 / 3.5e6;
  return 3 + std::max(memory, rounds * conv_norm::tile_clocks(plan) / 1770);
}

// For tests and logs.
inline std::string conv_norm_describe(const ConvNormPlan& plan) {
  const ConvNormTile& t = plan.tile;
  const auto field = [](const char* name, int value) { return std::string(name) + " " + std::to_string(value); };
  return field("images", t.images) + field(", groups", t.groups) + field(", rows", t.rows) + field(", strips", t.strips) +
         field(", slab", plan.slab) + field(", cluster", plan.cluster) + field(", tiles", plan.tiles) +
         field(", clusters", plan.clusters) + field(", shared_memory", plan.shared_memory);
}

// The compiled kernel of one dtype, for maps wider than 8 pixels or not; defined in conv_norm_fwd_sm90.cuh, instantiated in
// instantiations_sm90/. launch returns cudaError_t as int. dependent: start while the kernel before in the stream still runs
// (programmatic dependent launch); the kernel waits for its inputs itself.
template <DType kDType, bool kNarrow>
struct ConvNormKernel {
  static int launch(const ConvNormParams& params, bool dependent, cudaStream_t stream);
  static const void* pointer();
};

// a: [batch * height * width, channels] of the problem's dtype, 16-byte aligned. Of the tensors only x, conv_weight, conv_bias,
// norm_weight, norm_bias and eps are read; with has_norm false the norm's vectors are ignored. Returns cudaError_t as int; never
// synchronises. dependent: see ConvNormKernel; extras: see conv_norm_extras.h.
int conv_norm_launch(const Problem& q, const Tensors& t, const ConvNormPlan& plan, void* a, bool dependent, cudaStream_t stream,
                     const ConvNormExtras& extras = {});

// The kernel's entry point, for cudaFuncGetAttributes.
const void* conv_norm_pointer(const Problem& q);

}  // namespace convfirst::block_fusion::sm90
