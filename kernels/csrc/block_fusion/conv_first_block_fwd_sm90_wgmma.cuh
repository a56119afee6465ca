// The conv-first block, forward, on Hopper: TMA loads, warp-group matrix products, one launch, the hidden tensor in registers.
//
//   one block = a producer warpgroup (warp 0: weights, warp 1: pixels) + kWarpgroups consumer warpgroups; a consumer owns a tile
//   of up to 64 output pixels from its convolution to its store, so that the consumers drift apart and one's convolution and
//   activation run under the others' matrix products.
//
//        x tile with halo (TMA, zero-filled edges)       W1 chunk [64 hidden x C]      W2 chunk [C x 64 hidden]
//        +--------------------+                                 |                             |
//        | . . . . . . . . . .|  convolution    A [64 x C]      v                             v
//        | . +------------+ . |  + LayerNorm  --------> S = A W1^T  -- act --> P  --> O += P W2^T   --> y = x + scale O
//        | . | 64 pixels  | . |                  (registers)         (registers)     (registers)
//        | . +------------+ . |
//        +--------------------+
//
//   what                         where                                          written by            released when
//   x tile with halo             shared, kPanel-channel panels, TMA swizzle     warp 1 (TMA)          tile stored
//   A (kARegisters)              registers, wgmma operand layout                consumer              first products of the tile done
//   A (otherwise)                shared, over the x tile                        consumer              tile stored
//   W1, W2 chunks                shared, two rings, or resident if all fit      warp 0 (TMA)          product done, per chunk
//   convolution weights          shared (B fragments) or global through L1      prologue              -
//   bias, norm, scale vectors    shared, float32                                prologue              -
//   convolution sums, then O     the same C/2 registers                         mma.sync, then wgmma  -
//   S, P                         32 and 2 x 16 registers                        wgmma, activation     -
//   y tile                       shared, over the x tile; 16-byte stores        consumer              -
#pragma once

#include "feed_forward_sm90.cuh"

namespace convfirst::block_fusion::sm90 {

struct KernelParams : WeightRings {
  const void* x;
  void* y;
  const void* conv_weight;
  const float* conv_bias;
  const float* norm_weight;
  const float* norm_bias;
  const float* expand_bias;
  const float* project_bias;
  const float* layer_scale;
  const float* sample_scale;
  float eps;
  int has_norm;
  int batch, height, width;
  int tile_images, tile_height, tile_width;  // tile_images * tile_height * tile_width <= 64
  int tiles_y, tiles_x, num_tiles;
  int x_slots;
  int x_panel_bytes, x_slot_bytes;
};

struct Barriers : WeightBarriers {
  TransactionBarrier *x_full, *conv_full;
  Barrier* x_empty;
  __device__ explicit Barriers(char* base) {
    w1_full = reinterpret_cast<TransactionBarrier*>(base);
    w2_full = w1_full + kMaxSlots;
    x_full = w2_full + kMaxSlots;
    w1_empty = reinterpret_cast<Barrier*>(x_full + kMaxSlots);
    w2_empty = w1_empty + kMaxSlots;
    x_empty = w2_empty + kMaxSlots;
    conv_full = reinterpret_cast<TransactionBarrier*>(x_empty + kMaxSlots);
  }
};

struct Tile {
  int image, y, x;
  __device__ Tile(const KernelParams& p, int index) {
    const int per_image = p.tiles_y * p.tiles_x;
    const int group = index / per_image;
    const int rest = index - group * per_image;
    const int row = rest / p.tiles_x;
    image = group * p.tile_images;
    y = row * p.tile_height;
    x = (rest - row * p.tiles_x) * p.tile_width;
  }
};

// Where pixel p of a tile lies: its row in the x tile's panels, and its offset in the image. packed = image | y | x, 8 bits each.
struct PixelMap {
  int x_row;   // -1: this tile shape has no such pixel
  int packed;
  __device__ PixelMap(const KernelParams& p, int pixel, int pad) {
    const int per_image = p.tile_height * p.tile_width;
    const int image = pixel / per_image;
    const int rest = pixel - image * per_image;
    const int y = rest / p.tile_width;
    const int x = rest - y * p.tile_width;
    const bool inside = image < p.tile_images;
    x_row = inside ? (image * (p.tile_height + 2 * pad) + y + pad) * (p.tile_width + 2 * pad) + x + pad : -1;
    packed = image << 16 | y << 8 | x;
  }
};

// ---------------------------------------------------------------------------------------------------------------------------
// Producer

// Channels [first, first + kConvPieceChannels) of the packed weights [tap][channel][group width], taps kept apart.
template <class Traits>
__device__ void load_conv_weights(const KernelParams& p, TransactionBarrier* barrier, char* to, int first) {
  constexpr int kBytes = Traits::kConvPieceChannels * Traits::kGroupWidth * 2;
  barrier->arrive_and_expect_tx(Traits::kTaps * kBytes);
  const char* from = static_cast<const char*>(p.conv_weight) + first * Traits::kGroupWidth * 2;
  for (int tap = 0; tap < Traits::kTaps; ++tap) {
    bulk_load(from + tap * Traits::kChannels * Traits::kGroupWidth * 2, barrier, to + tap * kBytes, kBytes);
  }
}

template <class Traits>
__device__ void produce_weights(const KernelParams& p, const CUtensorMap& w1_map, const CUtensorMap& w2_map, char* smem,
                                const SharedLayout& layout, Barriers& bar, int rounds) {
  const bool w1_resident = p.w1_slots == p.chunks, w2_resident = p.w2_slots == p.chunks;
  RingState w1, w2;
  w1.phase = w2.phase = 1;  // the slots start empty
  if (Traits::kConvWeightsStay) load_conv_weights<Traits>(p, bar.conv_full, smem + layout.conv_weight, 0);
  for (int round = 0; round < rounds; ++round) {
    if (!Traits::kConvWeightsStay) {
      for (int piece = 0; piece < Traits::kConvPieces; ++piece) {
        bar.w1_empty[w1.slot].wait(w1.phase);
        load_conv_weights<Traits>(p, bar.w1_full + w1.slot, smem + layout.w1 + w1.slot * Traits::kW1Bytes,
                                  piece * Traits::kConvPieceChannels);
        w1.advance(p.w1_slots, false);
      }
    }
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      if (!w1_resident || round == 0) {
        bar.w1_empty[w1.slot].wait(w1.phase);
        bar.w1_full[w1.slot].arrive_and_expect_tx(Traits::kW1Bytes);
        char* to = smem + layout.w1 + w1.slot * Traits::kW1Bytes;
#pragma unroll
        for (int panel = 0; panel < Traits::kPanels; ++panel) {
          tma_load_2d(&w1_map, bar.w1_full + w1.slot, to + panel * kHiddenChunk * Traits::kRowBytes, panel * Traits::kPanel,
                      chunk * kHiddenChunk);
        }
        w1.advance(p.w1_slots, false);
      }
      if (!w2_resident || round == 0) {
        bar.w2_empty[w2.slot].wait(w2.phase);
        bar.w2_full[w2.slot].arrive_and_expect_tx(Traits::kW2Bytes);
        tma_load_2d(&w2_map, bar.w2_full + w2.slot, smem + layout.w2 + w2.slot * Traits::kW2Bytes, chunk * kHiddenChunk, 0);
        w2.advance(p.w2_slots, false);
      }
    }
  }
}

template <class Traits>
__device__ void produce_pixels(const KernelParams& p, const CUtensorMap& x_map, char* smem, const SharedLayout& layout,
                               Barriers& bar, int tiles) {
  RingState ring;
  ring.phase = 1;
  const int rows = p.tile_images * (p.tile_height + 2 * Traits::kPad) * (p.tile_width + 2 * Traits::kPad);
  for (int i = 0; i < tiles; ++i) {
    const Tile tile(p, blockIdx.x + i * gridDim.x);
    bar.x_empty[ring.slot].wait(ring.phase);
    bar.x_full[ring.slot].arrive_and_expect_tx(rows * Traits::kRowBytes * Traits::kPanels);
    char* to = smem + layout.x + ring.slot * p.x_slot_bytes;
#pragma unroll
    for (int panel = 0; panel < Traits::kPanels; ++panel) {
      tma_load_4d(&x_map, bar.x_full + ring.slot, to + panel * p.x_panel_bytes, panel * Traits::kPanel, tile.x - Traits::kPad,
                  tile.y - Traits::kPad, tile.image);
    }
    ring.advance(p.x_slots, false);
  }
}

// ---------------------------------------------------------------------------------------------------------------------------
// Convolution on tensor cores: group width 8 (two taps make one k = 16) and 16

// The products of one 8-channel block, in order: taps (first, second) of a k = 16 product, or one tap.
//   general, group width 8:  taps (0, 1), (2, 3) ... and the last alone (k = 8)
//   group width 16:          one tap, its 16 channels
template <class Traits>
struct Products {
  static constexpr int kCount = Traits::kGroupWidth == 8 ? (Traits::kTaps + 1) / 2 : Traits::kTaps;
  static constexpr bool single(int product) { return Traits::kGroupWidth == 8 && product == kCount - 1; }
  static constexpr int first_tap(int product) { return Traits::kGroupWidth == 16 ? product : 2 * product; }
};

// Shared-memory rows that this lane hands to ldmatrix, one offset a load, already swizzled for chunk 0.
template <class Traits>
struct TapRows {
  static constexpr int kLoads = Products<Traits>::kCount;
  uint32_t offset[kLoads];
  __device__ __forceinline__ TapRows(const KernelParams& p, const int2* pixels, int warp, int lane) {
    const int width = p.tile_width + 2 * Traits::kPad;
    const int center = max(pixels[warp * 16 + (lane & 15)].x, Traits::kPad * width + Traits::kPad);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int tap = Traits::kGroupWidth == 8 ? min(2 * i + (lane >> 4), Traits::kTaps - 1) : i;
      const int row = center + (tap / Traits::kKernel - Traits::kPad) * width + tap % Traits::kKernel - Traits::kPad;
      offset[i] = swizzle<Traits::kRowBytes>(row * Traits::kRowBytes);
      if (Traits::kGroupWidth == 16) offset[i] ^= (lane >> 4) << 4;
    }
  }
};

// Operands of two neighbouring 8-output-channel blocks for one product.
template <class Traits>
struct ConvStep {
  static constexpr int kRow = Traits::kGroupWidth * 2;  // bytes of one output channel of one tap
  static constexpr int kTap = Traits::kConvPieceChannels * kRow;
  uint32_t w[4];     // B fragments of both blocks, from weights in the packed layout [tap][channel][group width]
  uint32_t a[2][4];  // pixels

  template <int kProduct>
  __device__ __forceinline__ void load_weights(uint32_t weights, int lane) {
    using P = Products<Traits>;
    const int half = lane >> 3 & 1;
    uint32_t address = weights + P::first_tap(kProduct) * kTap + ((lane >> 4) * 8 + lane % 8) * kRow;
    if (Traits::kGroupWidth == 16) address += half * 16;
    else if (!P::single(kProduct)) address += half * kTap;
    ldmatrix_x4(w, address);
  }

  template <int kProduct>
  __device__ __forceinline__ void load_pixels(uint32_t address, int chunk) {
    if constexpr (Traits::kGroupWidth == 16) {
      ldmatrix_x4(a[0], address ^ (chunk << 4));
    } else {
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        if (Products<Traits>::single(kProduct)) {
          ldmatrix_x2(*reinterpret_cast<uint32_t(*)[2]>(a[b]), address ^ ((chunk + b) << 4));
        } else {
          ldmatrix_x4(a[b], address ^ ((chunk + b) << 4));
        }
      }
    }
  }

  template <int kProduct>
  __device__ __forceinline__ void multiply(float* sums) const {
    using Element = ElementOf<Traits>;
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      if (Products<Traits>::single(kProduct)) {
        mma_1688<Element>(sums + 4 * b, a[b], w[2 * b]);
      } else {
        mma_16816<Element>(sums + 4 * b, a[Traits::kGroupWidth == 16 ? 0 : b], w[2 * b], w[2 * b + 1]);
      }
    }
  }

};

// ---------------------------------------------------------------------------------------------------------------------------
// LayerNorm over channels of sums in the accumulator layout: four neighbouring lanes share a pixel

__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

template <int kChannels>
__device__ __forceinline__ void layer_norm(float (&v)[kChannels / 2], bool affine, uint32_t weight, uint32_t bias, float eps, int lane) {
  // Plain moments in float32: they lose what 16-bit inputs do not have (a mean 2^11 times the spread), and one pass is enough.
  float sum[2][2] = {}, square[2][2] = {}, scale[2], shift[2];
#pragma unroll
  for (int i = 0; i < kChannels / 2; ++i) {
    const int r = i / 2 % 2;
    sum[r][i % 2] += v[i];
    square[r][i % 2] = fmaf(v[i], v[i], square[r][i % 2]);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float mean = quad_sum(sum[r][0] + sum[r][1]) * (1.f / kChannels);
    const float variance = fmaxf(quad_sum(square[r][0] + square[r][1]) * (1.f / kChannels) - mean * mean, 0.f);
    scale[r] = rsqrtf(variance + eps);
    shift[r] = -mean * scale[r];
  }
  if (!affine) {
#pragma unroll
    for (int i = 0; i < kChannels / 2; ++i) v[i] = fmaf(v[i], scale[i / 2 % 2], shift[i / 2 % 2]);
    return;
  }
#pragma unroll
  for (int j = 0; j < kChannels / 8; ++j) {
    const uint32_t offset = (8 * j + 2 * (lane % 4)) * 4;
    const float2 w = load_shared_float2(weight + offset), b = load_shared_float2(bias + offset);
    v[4 * j] = fmaf(fmaf(v[4 * j], scale[0], shift[0]), w.x, b.x);
    v[4 * j + 1] = fmaf(fmaf(v[4 * j + 1], scale[0], shift[0]), w.y, b.y);
    v[4 * j + 2] = fmaf(fmaf(v[4 * j + 2], scale[1], shift[1]), w.x, b.x);
    v[4 * j + 3] = fmaf(fmaf(v[4 * j + 3], scale[1], shift[1]), w.y, b.y);
  }
}

// ---------------------------------------------------------------------------------------------------------------------------
// Consumer

// How many of n steps have their loads in flight together: at most 8, and a divisor of n.
constexpr int batch_of(int n) {
  int batch = 8;
  while (n % batch != 0) --batch;
  return batch;
}

template <class Traits>
struct Consumer {
  using Element = ElementOf<Traits>;
  static constexpr int kChannels = Traits::kChannels;
  const KernelParams& p;
  char* smem;
  SharedLayout layout;
  int warpgroup, warp, lane;

  __device__ uint32_t vector(int index) const { return smem_address(smem + layout.vectors) + index * kChannels * 4; }

  __device__ __forceinline__ void initialise_sums(float (&sums)[kChannels / 2]) const {
#pragma unroll
    for (int j = 0; j < kChannels / 8; ++j) {
      const float2 b = load_shared_float2(vector(0) + (8 * j + 2 * (lane % 4)) * 4);
      sums[4 * j] = sums[4 * j + 2] = b.x;
      sums[4 * j + 1] = sums[4 * j + 3] = b.y;
    }
  }

  // The convolution of this warp's 16 pixels, all channels, in the wgmma accumulator layout: sums[4 j + i] is channel
  // 8 j + 2 (lane % 4) + i % 2 of pixel lane / 4 + 8 (i / 2). Two blocks a pass; each step's operands are loaded a step ahead.
  __device__ __forceinline__ void convolve(float (&sums)[kChannels / 2], uint32_t slot, Barriers& bar, FeedForward<Traits>& ring) const {
    constexpr int kSteps = kChannels / 16 * Products<Traits>::kCount;
    TapRows<Traits> rows(p, reinterpret_cast<const int2*>(smem + layout.pixels), warp, lane);
#pragma unroll
    for (int i = 0; i < TapRows<Traits>::kLoads; ++i) rows.offset[i] += slot;
    uint32_t weights = smem_address(smem + layout.conv_weight);
    if (Traits::kConvWeightsStay) bar.conv_full->wait(0);
    ConvStep<Traits> steps[2];
    convolve_steps(sums, rows, weights, steps, ring, std::make_index_sequence<kSteps + 1>{});
  }

  template <size_t... kStep>
  __device__ __forceinline__ void convolve_steps(float (&sums)[kChannels / 2], const TapRows<Traits>& rows, uint32_t& weights,
                                                 ConvStep<Traits> (&steps)[2], FeedForward<Traits>& ring,
                                                 std::index_sequence<kStep...>) const {
    (convolve_step<kStep>(sums, rows, weights, steps, ring), ...);
  }

  // Loads step kStep and multiplies step kStep - 1.
  template <int kStep>
  __device__ __forceinline__ void convolve_step(float (&sums)[kChannels / 2], const TapRows<Traits>& rows, uint32_t& weights,
                                                ConvStep<Traits> (&steps)[2], FeedForward<Traits>& ring) const {
    constexpr int kCount = Products<Traits>::kCount, kChunks = Traits::kPanel / 8;
    constexpr int kPieceSteps = Traits::kConvPieceChannels / 16 * kCount;
    if constexpr (!Traits::kConvWeightsStay && kStep % kPieceSteps == 0) {
      if (kStep > 0) {
        __syncwarp();
        ring.release_w1();
      }
      if constexpr (kStep < kChannels / 16 * kCount) weights = ring.wait_w1();
    }
    if constexpr (kStep < kChannels / 16 * kCount) {
      constexpr int kProduct = kStep % kCount, kBlock = kStep / kCount * 2;
      ConvStep<Traits>& step = steps[kStep % 2];
      step.template load_weights<kProduct>(weights + kBlock * 8 % Traits::kConvPieceChannels * ConvStep<Traits>::kRow, lane);
      step.template load_pixels<kProduct>(rows.offset[kProduct] + kBlock / kChunks * p.x_panel_bytes, kBlock % kChunks);
    }
    if constexpr (kStep > 0) {
      constexpr int kProduct = (kStep - 1) % kCount, kBlock = (kStep - 1) / kCount * 2;
      ConvStep<Traits>& step = steps[(kStep - 1) % 2];
      step.template multiply<kProduct>(sums + 4 * kBlock);
    }
  }

  // Address that this lane hands to ldmatrix / stmatrix for the 16 pixels x 16 channels at 8-channel block j.
  __device__ __forceinline__ uint32_t matrix_address(uint32_t base, int panel_bytes, int row, int j) const {
    constexpr int kChunks = Traits::kPanel / 8;
    return base + j / kChunks * panel_bytes + (swizzle<Traits::kRowBytes>(row * Traits::kRowBytes) ^ ((j % kChunks + (lane >> 4)) << 4));
  }

  // Normalises the sums and makes them the first product's operand.
  __device__ __forceinline__ void to_operand(float (&sums)[kChannels / 2], OperandA<Traits>& a, uint32_t slot) const {
    if (p.has_norm) layer_norm<kChannels>(sums, p.norm_weight != nullptr || p.norm_bias != nullptr, vector(1), vector(2), p.eps, lane);
    if constexpr (Traits::kARegisters) {
#pragma unroll
      for (int i = 0; i < kChannels / 4; ++i) a.fragments[i] = pack2<Element>(sums[2 * i], sums[2 * i + 1]);
    } else {
      warpgroup_barrier(1 + warpgroup);  // every warp has read its taps
      store_pixels(sums, slot);
      fence_async_proxy();
      warpgroup_barrier(1 + warpgroup);
      a.descriptor = matrix_descriptor<Traits::kRowBytes>(slot);
    }
  }

  // The warp's 16 pixels as rows of a dense tile.
  __device__ __forceinline__ void store_pixels(const float (&v)[kChannels / 2], uint32_t slot) const {
#pragma unroll
    for (int j = 0; j < kChannels / 8; j += 2) {
      stmatrix_x4(matrix_address(slot, Traits::kAPanelBytes, warp * 16 + (lane & 15), j), pack2<Element>(v[4 * j], v[4 * j + 1]),
                  pack2<Element>(v[4 * j + 2], v[4 * j + 3]), pack2<Element>(v[4 * j + 4], v[4 * j + 5]),
                  pack2<Element>(v[4 * j + 6], v[4 * j + 7]));
    }
  }

  // O <- (O + bias) * layer scale * sample scale.
  __device__ __forceinline__ void scale_output(float (&o)[kChannels / 2], const Tile& tile) const {
    const int2* pixels = reinterpret_cast<const int2*>(smem + layout.pixels);
    float sample[2] = {1.f, 1.f};
    if (p.sample_scale != nullptr) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int image = tile.image + (pixels[warp * 16 + lane / 4 + 8 * r].y >> 16);
        if (image < p.batch) sample[r] = __ldg(p.sample_scale + image);
      }
    }
    if (p.layer_scale == nullptr && p.sample_scale == nullptr) {
#pragma unroll
      for (int j = 0; j < kChannels / 8; ++j) {
        const float2 b = load_shared_float2(vector(3) + (8 * j + 2 * (lane % 4)) * 4);
        o[4 * j] += b.x, o[4 * j + 1] += b.y, o[4 * j + 2] += b.x, o[4 * j + 3] += b.y;
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < kChannels / 8; ++j) {
      const uint32_t offset = (8 * j + 2 * (lane % 4)) * 4;
      const float2 b = load_shared_float2(vector(3) + offset), s = load_shared_float2(vector(4) + offset);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        o[4 * j + 2 * r] = (o[4 * j + 2 * r] + b.x) * (s.x * sample[r]);
        o[4 * j + 2 * r + 1] = (o[4 * j + 2 * r + 1] + b.y) * (s.y * sample[r]);
      }
    }
  }

  // Writes O over the tile in shared memory, the residual added where the x tile is still there.
  __device__ __forceinline__ void stage_output(const float (&o)[kChannels / 2], uint32_t slot) const {
    if constexpr (!Traits::kKeepsX) {
      store_pixels(o, slot);
    } else {
      // Rows of pixels that the tile shape lacks go to row 0, a corner of the halo.
      const int row = max(reinterpret_cast<const int2*>(smem + layout.pixels)[warp * 16 + (lane & 15)].x, 0);
      constexpr int kBatch = batch_of(kChannels / 8);
      static_assert(kBatch % 2 == 0);
#pragma unroll
      for (int first = 0; first < kChannels / 8; first += kBatch) {
        uint32_t x[kBatch / 2][4];
#pragma unroll
        for (int i = 0; i < kBatch / 2; ++i) ldmatrix_x4(x[i], matrix_address(slot, p.x_panel_bytes, row, first + 2 * i));
#pragma unroll
        for (int i = 0; i < kBatch / 2; ++i) {
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const float2 v = unpack2<Element>(x[i][r]);
            const int k = 4 * (first + 2 * i) + 2 * r;
            x[i][r] = pack2<Element>(o[k] + v.x, o[k + 1] + v.y);
          }
        }
        __syncwarp();  // lanes of the dummy row read before any writes
#pragma unroll
        for (int i = 0; i < kBatch / 2; ++i) {
          stmatrix_x4(matrix_address(slot, p.x_panel_bytes, row, first + 2 * i), x[i][0], x[i][1], x[i][2], x[i][3]);
        }
      }
    }
  }

  static __device__ __forceinline__ uint4 add(uint4 a, uint4 b) {
    uint32_t* u = reinterpret_cast<uint32_t*>(&a);
    const uint32_t* v = reinterpret_cast<const uint32_t*>(&b);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 s = unpack2<Element>(u[i]), t = unpack2<Element>(v[i]);
      u[i] = pack2<Element>(s.x + t.x, s.y + t.y);
    }
    return a;
  }

  // Copies the staged tile to y, 16 bytes a thread, a pixel's channels side by side; loads in batches ahead of their use.
  __device__ __forceinline__ void store_output(uint32_t slot, const Tile& tile) const {
    constexpr int kVectors = kChannels / 8, kChunks = Traits::kPanel / 8, kIterations = kTilePixels * kVectors / 128;
    constexpr int kBatch = batch_of(kIterations);
    const int2* pixels = reinterpret_cast<const int2*>(smem + layout.pixels);
#pragma unroll
    for (int first = 0; first < kIterations; first += kBatch) {
      uint4 v[kBatch], x[Traits::kKeepsX ? 1 : kBatch];
      int offset[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int index = (first + i) * 128 + warp * 32 + lane, pixel = index / kVectors, j = index % kVectors;
        const int2 map = pixels[pixel];
        const int image = tile.image + (map.y >> 16), y = tile.y + (map.y >> 8 & 255), x_ = tile.x + (map.y & 255);
        const bool inside = map.x >= 0 && image < p.batch && y < p.height && x_ < p.width;
        offset[i] = inside ? ((image * p.height + y) * p.width + x_) * kVectors + j : -1;
        const int row = Traits::kKeepsX ? max(map.x, 0) : pixel;
        v[i] = load_shared_128(slot + j / kChunks * (Traits::kKeepsX ? p.x_panel_bytes : Traits::kAPanelBytes) +
                               (swizzle<Traits::kRowBytes>(row * Traits::kRowBytes) ^ (j % kChunks << 4)));
        if constexpr (!Traits::kKeepsX) {
          if (inside) x[i] = __ldg(static_cast<const uint4*>(p.x) + offset[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (offset[i] < 0) continue;
        if constexpr (!Traits::kKeepsX) v[i] = add(v[i], x[i]);
        static_cast<uint4*>(p.y)[offset[i]] = v[i];
      }
    }
  }

  __device__ void run(Barriers& bar, int tiles) {
    FeedForward<Traits> feed_forward{p, bar, smem_address(smem + layout.w1), smem_address(smem + layout.w2),
                                     smem_address(smem + layout.expand_bias), lane, {}, {}, {}, {}};
    const int rounds = (tiles + Traits::kWarpgroups - 1) / Traits::kWarpgroups;
    for (int round = 0; round < rounds; ++round) {
      const int i = round * Traits::kWarpgroups + warpgroup;
      if (i >= tiles) {
        feed_forward.skip(Traits::kConvWeightsStay ? 0 : Traits::kConvPieces);
        break;
      }
      const Tile tile(p, blockIdx.x + i * gridDim.x);
      const int slot_index = i % p.x_slots;
      const uint32_t slot = smem_address(smem + layout.x + slot_index * p.x_slot_bytes);
      float sums[kChannels / 2];
      OperandA<Traits> a;
      initialise_sums(sums);
      bar.x_full[slot_index].wait(i / p.x_slots & 1);
      convolve(sums, slot, bar, feed_forward);
      to_operand(sums, a, slot);
      feed_forward.run(sums, a);
      scale_output(sums, tile);
      warpgroup_barrier(1 + warpgroup);  // every warp has read its taps and A
      stage_output(sums, slot);
      warpgroup_barrier(1 + warpgroup);
      store_output(slot, tile);
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) bar.x_empty[slot_index].arrive();
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------------

// Vectors absent in the problem become zeros or ones.
template <class Traits>
__device__ void load_vectors(const KernelParams& p, char* smem, const SharedLayout& layout) {
  constexpr int kChannels = Traits::kChannels;
  float* vectors = reinterpret_cast<float*>(smem + layout.vectors);
  for (int i = threadIdx.x; i < kChannels; i += Traits::kThreads) {
    vectors[i] = p.conv_bias != nullptr ? p.conv_bias[i] : 0.f;
    vectors[kChannels + i] = p.norm_weight != nullptr ? p.norm_weight[i] : 1.f;
    vectors[2 * kChannels + i] = p.norm_bias != nullptr ? p.norm_bias[i] : 0.f;
    vectors[3 * kChannels + i] = p.project_bias != nullptr ? p.project_bias[i] : 0.f;
    vectors[4 * kChannels + i] = p.layer_scale != nullptr ? p.layer_scale[i] : 1.f;
  }
  for (int i = threadIdx.x; i < p.chunks * kHiddenChunk; i += Traits::kThreads) {
    const float b = (p.expand_bias != nullptr ? p.expand_bias[i] : 0.f) * bias_scale<Traits::kActivation>();
    if constexpr (Traits::kHalfActivation) {
      reinterpret_cast<__half*>(smem + layout.expand_bias)[i] = __float2half_rn(b);
    } else {
      reinterpret_cast<float*>(smem + layout.expand_bias)[i] = b;
    }
  }
  if (threadIdx.x < kTilePixels) {
    const PixelMap map(p, threadIdx.x, Traits::kPad);
    reinterpret_cast<int2*>(smem + layout.pixels)[threadIdx.x] = make_int2(map.x_row, map.packed);
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    conv_first_block_fwd_sm90(const __grid_constant__ KernelParams p, const __grid_constant__ CUtensorMap x_map,
                              const __grid_constant__ CUtensorMap w1_map, const __grid_constant__ CUtensorMap w2_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char smem[];
  const SharedLayout layout =
      shared_layout<Traits>(p.w1_slots, p.w2_slots, p.x_slots, p.x_slot_bytes, p.chunks * kHiddenChunk);
  Barriers bar(smem + layout.barriers);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const int tiles = (p.num_tiles - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);
  const int rounds = (tiles + Traits::kWarpgroups - 1) / Traits::kWarpgroups;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kMaxSlots; ++i) {
      bar.w1_full[i].init(1), bar.w2_full[i].init(1), bar.x_full[i].init(1);
      bar.w1_empty[i].init(4 * Traits::kWarpgroups), bar.w2_empty[i].init(4 * Traits::kWarpgroups), bar.x_empty[i].init(4);
    }
    bar.conv_full->init(1);
    cutlass::arch::fence_barrier_init();
  }
  load_vectors<Traits>(p, smem, layout);
  __syncthreads();
  if (warp < 4) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (threadIdx.x % 32 == 0) {
      if (warp == 0) produce_weights<Traits>(p, w1_map, w2_map, smem, layout, bar, rounds);
      if (warp == 1) produce_pixels<Traits>(p, x_map, smem, layout, bar, tiles);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    Consumer<Traits> consumer{p, smem, layout, warp / 4 - 1, warp % 4, static_cast<int>(threadIdx.x % 32)};
    consumer.run(bar, tiles);
  }
#endif
}

}  // namespace convfirst::block_fusion::sm90
