// Tiles, shared memory and rings of the sm_90a path: one compile-time description a variant, and the host's choice of tile and
// ring depths. Host and device both include it; sizes are written here and nowhere else.
#pragma once

#include <algorithm>
#include <cstdint>

#include "block_fusion/params.h"

#ifdef __CUDACC__
#define CONVFIRST_HOST_DEVICE __host__ __device__
#else
#define CONVFIRST_HOST_DEVICE
#endif

namespace convfirst::block_fusion::sm90 {

constexpr int kTilePixels = 64;
constexpr int kHiddenChunk = 64;
constexpr int kMaxSlots = 8;

// How the two products of a chunk and its activation overlap within one warpgroup.
//   kDrain:    S(j+1), P(j) W2 issued together, both finished every step: weights are released soonest (shallow rings)
//   kOneAhead: S one chunk ahead, the queue never drains
//   kTwoAhead: S two chunks ahead in two sets of registers
enum class Schedule { kDrain, kOneAhead, kTwoAhead };

// What was measured best at each width (NOTES.md): with three consumer warpgroups a thread has 160 registers, with two 240.
struct WidthChoice {
  int warpgroups;
  bool a_registers;        // the first product's operand A stays in registers, else it lies in shared memory
  bool conv_weights_stay;  // in shared memory; else each warp reads them from global memory, two channel blocks ahead
  bool alternates;         // the warpgroups take turns at the weights, a tile each: one convolves while another multiplies
  Schedule schedule;
};

constexpr WidthChoice width_choice(int channels) {
  if (channels <= 64) return {3, true, true, false, Schedule::kOneAhead};
  if (channels <= 96) return {2, true, true, false, Schedule::kTwoAhead};
  if (channels <= 128) return {2, true, true, true, Schedule::kTwoAhead};
  if (channels <= 192) return {2, false, true, true, Schedule::kOneAhead};
  return {2, false, false, true, Schedule::kDrain};
}

// Compile-time description of one variant.
template <DType kDType_, int kChannels_, Activation kActivation_, int kKernel_ = 3, int kGroupWidth_ = 8>
struct BlockTraits {
  static constexpr WidthChoice kChoice = width_choice(kChannels_);
  static constexpr DType kDType = kDType_;
  static constexpr int kChannels = kChannels_;
  static constexpr int kKernel = kKernel_;
  static constexpr int kPad = kKernel / 2;
  static constexpr int kTaps = kKernel * kKernel;
  static constexpr int kGroupWidth = kGroupWidth_;
  static constexpr Activation kActivation = kActivation_;
  static constexpr int kWarpgroups = kChoice.warpgroups;
  static constexpr bool kARegisters = kChoice.a_registers;
  static constexpr bool kConvWeightsStay = kChoice.conv_weights_stay;
  static constexpr Schedule kSchedule = kChoice.schedule;
  static constexpr bool kAlternates = kChoice.alternates;
  static constexpr bool kFlatTiles = kChannels > 64;  // the checks of flat tiles cost 4 % at 64 channels, whose large maps take none
  static constexpr bool kSharesTail = false;
  static constexpr bool kBiasFirst = true;  // O starts from the projection's bias
  static constexpr int kW2Parts = 1;
  static constexpr int kFixedSlots = kChannels == 256 ? 2 : 0;  // of both weights, where no more fit: spares the registers of counting them
  static constexpr int kPanel = kChannels % 64 == 0 ? 64 : 32;  // channels of one swizzled panel
  static constexpr int kRowBytes = kPanel * 2;
  static constexpr int kPanels = kChannels / kPanel;
  static constexpr int kThreads = (kWarpgroups + 1) * 128;
  static constexpr int kConsumerRegisters = kWarpgroups == 3 ? 160 : 240;
  static constexpr int kProducerRegisters = kWarpgroups == 3 ? 32 : 24;
  // The x tile survives the convolution only where nothing is written over it before the epilogue.
  static constexpr bool kKeepsX = kARegisters;
  // Flat tiles are stored by TMA; where A lies over x, that comes again under the last products.
  static constexpr bool kTmaStore = kAlternates;
  static constexpr bool kReloadsX = kTmaStore && !kKeepsX;
  static constexpr int kW1Bytes = kHiddenChunk * kChannels * 2;
  static constexpr int kW2Bytes = kChannels * kHiddenChunk * 2;
  static constexpr int kABytes = kTilePixels * kChannels * 2;
  static constexpr int kAPanelBytes = kTilePixels * kRowBytes;
  static constexpr int kConvWeightBytes = kTaps * kChannels * kGroupWidth * 2;
  // A block's first two tiles have nothing to run under: their convolution takes its weights from W2's slots, which no product reads yet.
  static constexpr bool kFirstStaged = !kConvWeightsStay && kAlternates;
  static_assert(!kFirstStaged || kConvWeightBytes <= kFixedSlots * kW2Bytes);
  static constexpr int kVectors = 5;  // convolution bias, norm weight, norm bias, project bias, layer scale
  static constexpr bool kVectorsInShared = kChannels < 256;
  // Else the projection's bias and the layer scale lie behind A in the x tile's slot.
  static constexpr int kVectorBytesBehindA = kVectorsInShared ? 0 : 2 * kChannels * 4;
  static constexpr bool kHalfActivation = kDType == DType::kHalf;
  // SiLU in packed bfloat16: 104 instructions a chunk for 120 to 136 in float32, 3 to 9 % of the time (NOTES.md).
  static constexpr bool kBFloat16Silu = kDType == DType::kBFloat16 && kActivation == Activation::kSilu;
  // Of a bias in shared memory, float32 or the 16-bit type, which packed activations take and beside which two flat tiles of 256 channels fit.
  static constexpr int kExpandBiasBytes = kHalfActivation || kBFloat16Silu || kChannels == 256 ? 2 : 4;
  static_assert(kChannels % 32 == 0 && kChannels <= 256 && (kConvWeightsStay || kGroupWidth == 8));
};

// Byte offsets into dynamic shared memory; the same function serves the host's planning and the kernel.
struct SharedLayout {
  int w1, w2, x, conv_weight, vectors, expand_bias, pixels, barriers, total;
};

template <class Traits>
CONVFIRST_HOST_DEVICE inline SharedLayout shared_layout(int w1_slots, int w2_slots, int x_slots, int x_slot_bytes, int hidden) {
  SharedLayout s;
  s.w1 = 0;
  s.w2 = s.w1 + w1_slots * Traits::kW1Bytes;
  s.x = s.w2 + w2_slots * Traits::kW2Bytes;
  s.conv_weight = s.x + x_slots * x_slot_bytes;
  s.vectors = s.conv_weight + (Traits::kConvWeightsStay ? Traits::kConvWeightBytes : 0);
  s.expand_bias = s.vectors + (Traits::kVectorsInShared ? Traits::kVectors * Traits::kChannels * 4 : 0);
  s.pixels = s.expand_bias + hidden * Traits::kExpandBiasBytes;
  s.barriers = s.pixels + kTilePixels * 8;
  s.total = s.barriers + 7 * kMaxSlots * 8;
  return s;
}

// A rectangle of pixels of `images` images; or, with images == 0, a flat tile: 64 pixels in a row through all images, whose rows of
// `width` pixels (the image's) lie one after another, so that a tap is masked where it leaves its image.
struct TileShape {
  int images, height, width;

  bool flat() const { return images == 0; }
  // Pixels of x in shared memory; of the flat tile one more, of zeros.
  int staged(int pad) const {
    return flat() ? kTilePixels + 2 * pad * (width + 1) + 1 : images * (height + 2 * pad) * (width + 2 * pad);
  }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Traits>
int x_panel_bytes(const TileShape& t) {
  return static_cast<int>(ceil_div(t.staged(Traits::kPad) * Traits::kRowBytes, 1024) * 1024);
}

// The x tile, or what is written over it: A, vectors behind it, and the staged output.
template <class Traits>
int x_slot_bytes(const TileShape& t) {
  const int x = Traits::kPanels * x_panel_bytes<Traits>(t);
  return Traits::kKeepsX ? x : std::max(x, Traits::kABytes + Traits::kVectorBytesBehindA);
}

inline int64_t tile_count(const Problem& q, const TileShape& t) {
  if (t.flat()) return ceil_div(q.batch * q.height * q.width, kTilePixels);
  return ceil_div(q.batch, t.images) * ceil_div(q.height, t.height) * ceil_div(q.width, t.width);
}

// How the warpgroups of `blocks` blocks share the tiles out: rounds of a tile each, then perhaps one of tiles that two blocks share.
// Where warpgroups alternate, a round is one tile a block.
struct Rounds {
  int full;
  bool shared;
};

template <class Traits>
Rounds share_out(int64_t tiles, int chunks, int blocks) {
  const int64_t workers = int64_t{blocks} * (Traits::kAlternates ? 1 : Traits::kWarpgroups), rest = tiles % workers;
  const bool shared = Traits::kSharesTail && rest > 0 && rest <= workers / 2 && tiles > workers / 2 && chunks % 2 == 0 && blocks % 2 == 0;
  return {static_cast<int>(tiles / workers) + (rest > 0 && !shared ? 1 : 0), shared};
}

// Slots of the three rings that fit beside everything else; false if not even the least does.
struct Slots {
  int w1, w2, x;
};

template <class Traits>
bool choose_slots(const Problem& q, const Device& device, const TileShape& t, Slots* slots) {
  const int chunks = q.hidden / kHiddenChunk;
  const int x_bytes = x_slot_bytes<Traits>(t);
  const auto fits = [&](int w1, int w2, int x) {
    return std::max({w1, w2, x}) <= kMaxSlots &&
           shared_layout<Traits>(w1, w2, x, x_bytes, q.hidden).total <= device.max_shared_memory;
  };
  const int least_x = Traits::kWarpgroups;
  if (Traits::kFixedSlots > 0) {
    *slots = {Traits::kFixedSlots, Traits::kFixedSlots, least_x};
    if (!fits(slots->w1, slots->w2, least_x)) return false;
    if (fits(slots->w1, slots->w2, least_x + 1)) slots->x = least_x + 1;  // a spare x tile: the next load runs under this tile's work
    return true;
  }
  if (!Traits::kAlternates && chunks <= kMaxSlots && fits(chunks, chunks, least_x)) {  // all weights stay
    *slots = {chunks, chunks, least_x};
    while (slots->x < 2 * Traits::kWarpgroups && fits(chunks, chunks, slots->x + 1)) ++slots->x;
    return true;
  }
  if (!fits(2, 2, least_x)) return false;
  *slots = {2, 2, least_x};
  // A spare x tile first (the next load runs under this tile's work), then deeper weight rings (the warpgroups may drift apart).
  if (fits(2, 2, least_x + 1)) slots->x = least_x + 1;
  while (slots->w1 < 4 && fits(slots->w1 + 1, slots->w2, slots->x)) {
    ++slots->w1;
    if (fits(slots->w1, slots->w2 + 1, slots->x)) ++slots->w2;
  }
  return true;
}

// Rounds of a tile with its halo; a last round that blocks share takes somewhat more than half.
template <class Traits>
double tile_cost(const Problem& q, const Device& device, const TileShape& t) {
  const int64_t tiles = tile_count(q, t), workers = static_cast<int64_t>(device.multiprocessors) * (Traits::kAlternates ? 1 : Traits::kWarpgroups);
  const Rounds share = share_out<Traits>(tiles, q.hidden / kHiddenChunk, device.multiprocessors);
  const double rounds = tiles <= 4 * workers ? share.full + (share.shared ? 0.7 : 0) : static_cast<double>(tiles) / workers;
  const double halo = static_cast<double>(x_panel_bytes<Traits>(t)) / (kTilePixels * Traits::kRowBytes);
  return rounds * (8.0 + halo) - 1e-3 * (t.flat() ? 0 : t.width);  // long rows: fewer bank conflicts
}

// The tile of at most 64 pixels that covers the map in the fewest rounds, then with the least halo.
template <class Traits>
bool choose_tile(const Problem& q, const Device& device, TileShape* best, Slots* best_slots) {
  double best_cost = 1e30;
  const auto consider = [&](const TileShape& t) {
    Slots slots;
    if (t.staged(Traits::kPad) * Traits::kRowBytes > device.max_shared_memory || !choose_slots<Traits>(q, device, t, &slots)) return;
    const double cost = tile_cost<Traits>(q, device, t);
    if (cost < best_cost) best_cost = cost, *best = t, *best_slots = slots;
  };
  const int most_images = static_cast<int>(std::min<int64_t>(q.batch, kTilePixels));
  for (int height = 1; height <= std::min<int64_t>(q.height, kTilePixels); ++height) {
    for (int width = 1; width <= std::min<int64_t>(q.width, kTilePixels / height); ++width) {
      const bool whole = height == q.height && width == q.width;  // several images a tile only if each is whole
      for (int images = 1; images <= (whole ? std::min(most_images, kTilePixels / (height * width)) : 1); ++images) {
        consider({images, height, width});
      }
    }
  }
  // TMA boxes have at most 256 rows.
  if (Traits::kFlatTiles && kTilePixels + 2 * Traits::kPad * (q.width + 1) <= 256) consider({0, 1, static_cast<int>(q.width)});
  return best_cost < 1e30;
}

struct Plan {
  TileShape tile;
  Slots slots;
  int grid;
};

template <class Traits>
bool make_plan(const Problem& q, const Device& device, Plan* plan) {
  if (!choose_tile<Traits>(q, device, &plan->tile, &plan->slots)) return false;
  plan->grid = static_cast<int>(std::min<int64_t>(tile_count(q, plan->tile), device.multiprocessors));
  return true;
}

// The plan that a Config came from: ring depths are chosen again within the shared memory that they took.
template <class Traits>
void plan_of(const Problem& q, const Config& c, Plan* plan) {
  plan->tile = {c.tile_images, c.tile_height, c.tile_width};
  plan->grid = c.grid;
  choose_slots<Traits>(q, Device{90, c.grid, c.shared_memory}, plan->tile, &plan->slots);
}

// The compiled kernel of one variant; defined in launch_sm90.cuh, instantiated in instantiations_sm90/.
template <class Traits>
struct Kernel {
  static int launch(const Problem& q, const Tensors& t, const Plan& plan, int shared_memory, cudaStream_t stream);
  static const void* pointer();
};

}  // namespace convfirst::block_fusion::sm90
