// The feed-forward kernel of the Hopper split path: one compile-time description a variant, its shared memory and ring depths.
#pragma once

#include "tile_sm90.h"

namespace convfirst::block_fusion::sm90 {

// y = x + sample_scale * layer_scale * (act(a W1^T + b1) W2^T + b2) over `pixels` rows of `channels`.
struct FeedForwardProblem {
  int64_t pixels;
  int channels, hidden;
  DType dtype;
  Activation activation;
};

struct FeedForwardChoice {
  int warpgroups;
  bool a_registers;  // A is read from its slot once a tile, and the slot is free for the next; else it stays there as wgmma's operand
  bool x_shared;     // the residual comes through a slot too, and y leaves from there; else both pass A's slot and the registers
  Schedule schedule;
};

// What was measured best at each width (NOTES.md). bfloat16's activation is in float32, for which the deeper schedule leaves too
// few registers above 96 channels.
constexpr FeedForwardChoice feed_forward_choice(int width, DType dtype) {
  const Schedule schedule = width <= 96 || dtype == DType::kHalf ? Schedule::kOneAhead : Schedule::kDrain;
  if (width <= 64) return {3, true, true, schedule};
  if (width <= 128) return {3, false, true, schedule};
  if (width <= 192) return {2, true, true, schedule};
  return {2, false, false, Schedule::kDrain};
}

// kChannels: the width that tiles are padded to; TMA fills the rest with zeros and does not store it.
template <DType kDType_, int kChannels_, Activation kActivation_>
struct FeedForwardTraits {
  static constexpr FeedForwardChoice kChoice = feed_forward_choice(kChannels_, kDType_);
  static constexpr DType kDType = kDType_;
  static constexpr int kChannels = kChannels_;
  static constexpr Activation kActivation = kActivation_;
  static constexpr int kWarpgroups = kChoice.warpgroups;
  static constexpr bool kARegisters = kChoice.a_registers;
  static constexpr bool kXShared = kChoice.x_shared;
  static constexpr Schedule kSchedule = kChoice.schedule;
  static constexpr int kPanel = kChannels % 64 == 0 ? 64 : 32;
  static constexpr int kRowBytes = kPanel * 2;
  static constexpr int kPanels = kChannels / kPanel;
  static constexpr int kThreads = (kWarpgroups + 1) * 128;
  static constexpr int kConsumerRegisters = kWarpgroups == 3 ? 160 : 240;
  static constexpr int kProducerRegisters = kWarpgroups == 3 ? 32 : 24;
  static constexpr int kW1Bytes = kHiddenChunk * kChannels * 2;
  static constexpr int kW2Bytes = kChannels * kHiddenChunk * 2;
  static constexpr int kAPanelBytes = kTilePixels * kRowBytes;
  static constexpr int kSlotBytes = kTilePixels * kChannels * 2;
  static constexpr int kLeastSlots = kXShared ? 2 : 1;  // a warpgroup's slots of A and x
  static constexpr bool kAlternates = false;
  static constexpr bool kReloadsX = false;
  static constexpr bool kBiasFirst = false;
  static constexpr bool kSharesTail = kChannels == 256;  // two blocks may share the tiles of a last round
  static constexpr int kW2Parts = kSharesTail ? 2 : 1;
  static constexpr int kFixedSlots = kSharesTail ? 2 : 0;  // of both weights, where no more fit: spares the registers of counting them
  static_assert(!kSharesTail || (!kXShared && !kARegisters && kSlotBytes == kTilePixels * kChannels / 2 * 4));
  static constexpr int kBarriers = (5 + 2 * kWarpgroups) * kMaxSlots;  // weights' and tiles' slots, full and empty; a peer's
  static constexpr bool kHalfActivation = kDType == DType::kHalf;
  static constexpr bool kBFloat16Silu = false;  // not measured here
  static constexpr int kExpandBiasBytes = kHalfActivation ? 2 : 4;
};

struct FeedForwardLayout {
  int w1, w2, slots, vectors, barriers, expand_bias, total;
};

struct FeedForwardRings {
  int w1, w2, tile;  // slots; `tile` is a warpgroup's
};

template <class Traits>
CONVFIRST_HOST_DEVICE inline FeedForwardLayout feed_forward_layout(const FeedForwardRings& r, int chunks) {
  FeedForwardLayout s;
  s.w1 = 0;
  s.w2 = s.w1 + r.w1 * Traits::kW1Bytes;
  s.slots = s.w2 + r.w2 * Traits::kW2Bytes;
  s.vectors = s.slots + Traits::kWarpgroups * r.tile * Traits::kSlotBytes;  // project bias, layer scale
  s.barriers = s.vectors + 2 * Traits::kChannels * 4;
  s.expand_bias = s.barriers + Traits::kBarriers * 8;
  s.total = s.expand_bias + chunks * kHiddenChunk * Traits::kExpandBiasBytes;
  return s;
}

// All weights resident where they fit, else rings as deep as fit; false where not even the least does.
template <class Traits>
bool choose_rings(int hidden, int max_shared_memory, FeedForwardRings* rings) {
  const int chunks = static_cast<int>(ceil_div(hidden, kHiddenChunk));
  const auto fits = [&](const FeedForwardRings& r) {
    return std::max({r.w1, r.w2, r.tile}) <= kMaxSlots && feed_forward_layout<Traits>(r, chunks).total <= max_shared_memory;
  };
  if (Traits::kFixedSlots > 0) {
    *rings = {Traits::kFixedSlots, Traits::kFixedSlots, Traits::kLeastSlots};
    return fits(*rings);
  }
  *rings = {chunks, chunks, Traits::kLeastSlots};
  if (!fits(*rings)) {
    *rings = {2, 2, Traits::kLeastSlots};
    if (!fits(*rings)) return false;
    // A chunk of W2 is released a step later where the queue never drains: what room there is goes to its ring first.
    constexpr bool kDrains = Traits::kSchedule == Schedule::kDrain;
    int &first = kDrains ? rings->w1 : rings->w2, &second = kDrains ? rings->w2 : rings->w1;
    const auto grow = [&](int& slots) {
      ++slots;
      if (!fits(*rings)) --slots;
    };
    for (int before = 0; first != before && first < 4 && first < chunks;) {
      before = first;
      grow(first);
      if (first != before) grow(second);
    }
  }
  while (rings->tile < 2 * Traits::kLeastSlots && fits({rings->w1, rings->w2, rings->tile + 1})) ++rings->tile;
  return true;
}

// The compiled kernel of one variant; defined in launch_feed_forward_sm90.cuh, instantiated in instantiations_sm90/.
template <class Traits>
struct FeedForwardKernel {
  static int launch(const FeedForwardProblem& q, const Tensors& t, const void* a, int64_t image_pixels, int multiprocessors,
                    int max_shared_memory, cudaStream_t stream);
  static const void* pointer();
};

}  // namespace convfirst::block_fusion::sm90
