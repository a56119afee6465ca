// The conv-first block, forward, on Hopper: TMA loads, warp-group matrix products, one launch, the hidden tensor in registers.
//
//   one block = a producer warpgroup (warp 0: weights, warp 1: pixels) + kWarpgroups consumer warpgroups; a consumer owns a tile
//   of up to 64 output pixels from its convolution to its store. Where the weights stay (up to 96 channels) the consumers drift apart and
//   one's convolution and activation run under the others' matrix products; beyond, they take turns at the rings (kAlternates): a chunk
//   is one tile's, and a consumer stores, loads and convolves while the other multiplies.
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
//   convolution weights          shared, or registers (B fragments) two pairs   warp 0 (TMA), or      -
//                                of channel blocks ahead of their use           consumer, from L2
//     of the first tiles         shared, over the slots of W2 (kFirstStaged)    warp 0 (TMA)          both warpgroups' first tile convolved
//   bias, norm, scale vectors    shared, float32; at 256 channels L1, and from  prologue              -
//                                A on the last two behind A in the x tile       consumer              tile stored
//   expand biases                shared, float32; packed activation or 256 channels: 16 bit  prologue  -
//   turns at the rings           shared, a barrier a consumer and ring          the consumer before   turn taken
//   convolution sums, then O     the same C/2 registers, from the bias on        mma.sync, then wgmma  -
//   S, P                         32 and 2 x 16 registers                        wgmma, activation     -
//   x again, for the residual    shared, over A (kReloadsX)                     warp 2 (TMA)          y tile written over it
//   y tile                       shared, over the x tile; flat tiles by TMA, a  consumer              read by its store
//                                warp's 16 pixels each, else 16-byte stores
#pragma once

#include <cutlass/fast_math.h>

#include "feed_forward_sm90.cuh"

namespace convfirst::block_fusion::sm90 {

struct KernelParams : Work {
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
  int tile_images, tile_height, tile_width;  // tile_images * tile_height * tile_width <= 64; tile_images == 0: flat (tile_sm90.h)
  int tiles_y, tiles_x;
  int pixels;  // of all images
  cutlass::FastDivmod by_width, by_height;
  int x_slots;
  int x_panel_bytes, x_slot_bytes;
};

// One after another: full W1, W2 and x slots, then empty ones in the same order, then the convolution's weights.
struct Barriers {
  uint32_t base;  // address in shared memory
  __device__ __forceinline__ uint32_t at(int group, int slot) const { return base + (group * kMaxSlots + slot) * 8; }
  __device__ __forceinline__ uint32_t w1_full(int slot) const { return at(0, slot); }
  __device__ __forceinline__ uint32_t w2_full(int slot) const { return at(1, slot); }
  __device__ __forceinline__ uint32_t x_full(int slot) const { return at(2, slot); }
  __device__ __forceinline__ uint32_t w1_empty(int slot) const { return at(3, slot); }
  __device__ __forceinline__ uint32_t w2_empty(int slot) const { return at(4, slot); }
  __device__ __forceinline__ uint32_t x_empty(int slot) const { return at(5, slot); }
  __device__ __forceinline__ uint32_t conv_full() const { return at(6, 0); }
  __device__ __forceinline__ uint32_t conv_empty() const { return at(6, 7); }  // W2's slots hold them no longer (kFirstStaged)
  // The warpgroup's turn at each of the weights has come (kAlternates).
  __device__ __forceinline__ uint32_t w1_turn(int warpgroup) const { return at(6, 1 + warpgroup); }
  __device__ __forceinline__ uint32_t w2_turn(int warpgroup) const { return at(6, 4 + warpgroup); }
  // The tile's products no longer read A; x has come in its place (kReloadsX). Behind the slots of x, of which there are at most three.
  __device__ __forceinline__ uint32_t a_empty(int warpgroup) const { return at(5, 4 + warpgroup); }
  __device__ __forceinline__ uint32_t residual_full(int warpgroup) const { return at(2, 4 + warpgroup); }
};

template <class Traits>
__device__ __forceinline__ bool is_flat(const KernelParams& p) {
  return Traits::kFlatTiles && p.tile_images == 0;
}

struct Tile {
  int image, y, x;
  int first;  // flat: its first pixel, counted through all images
  __device__ Tile(const KernelParams& p, int index) : image(0), y(0), x(0), first(index * kTilePixels) {
    if (p.tile_images == 0) return;
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
  int packed;  // not of a flat tile
  __device__ PixelMap(const KernelParams& p, int pixel, int pad) {
    if (p.tile_images == 0) {
      x_row = pixel + pad * (p.width + 1), packed = 0;
      return;
    }
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

// Tiles of this block. Its consumers have tiles 0, 1, 2 ... of it in turns; the i-th is tile blockIdx.x + i * gridDim.x of the problem.
__device__ __forceinline__ int tiles_of_block(const KernelParams& p) {
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  return (p.tiles - block + blocks - 1) / blocks;
}

template <class Traits>
__device__ void produce_weights(const KernelParams& p, const CUtensorMap& w1_map, const CUtensorMap& w2_map, char* smem,
                                const SharedLayout& layout, Barriers bar) {
  const bool w1_resident = !Traits::kAlternates && p.w1_slots == p.chunks, w2_resident = !Traits::kAlternates && p.w2_slots == p.chunks;
  const int tiles = tiles_of_block(p), passes = Traits::kAlternates ? tiles : (tiles + Traits::kWarpgroups - 1) / Traits::kWarpgroups;
  RingState<Traits::kFixedSlots> w1, w2;
  if (Traits::kConvWeightsStay || Traits::kFirstStaged) {
    TransactionBarrier* full = transaction_barrier(bar.conv_full());
    full->arrive_and_expect_tx(Traits::kConvWeightBytes);
    bulk_load(p.conv_weight, full, smem + (Traits::kFirstStaged ? layout.w2 : layout.conv_weight), Traits::kConvWeightBytes);
  }
  const auto load_w1 = [&](int chunk) {
    wait_barrier(bar.w1_empty(w1.slot()), w1.phase() ^ 1);  // the slots start empty
    TransactionBarrier* full = transaction_barrier(bar.w1_full(w1.slot()));
    full->arrive_and_expect_tx(Traits::kW1Bytes);
    char* to = smem + layout.w1 + w1.slot() * Traits::kW1Bytes;
#pragma unroll
    for (int panel = 0; panel < Traits::kPanels; ++panel) {
      tma_load_2d(&w1_map, full, to + panel * kHiddenChunk * Traits::kRowBytes, panel * Traits::kPanel, chunk * kHiddenChunk);
    }
    w1.advance(p.w1_slots, false);
  };
  // W1 runs as far ahead of W2 as S does of the projection: in step with it, a slot of W1 would wait for one of W2 that is released later.
  constexpr int kLead = Traits::kSchedule == Schedule::kTwoAhead ? 2 : 1;
  const int w1_chunks = (w1_resident ? 1 : passes) * p.chunks, w2_chunks = (w2_resident ? 1 : passes) * p.chunks;
  int first = 0, second = 0;  // chunks to load next
  for (int i = 0; i < max(w1_chunks, w2_chunks + kLead); ++i) {
    if (i < w1_chunks) {
      load_w1(first);
      if (++first == p.chunks) first = 0;
    }
    if (Traits::kFirstStaged && i == kLead) wait_barrier(bar.conv_empty(), 0);
    if (i >= kLead && i - kLead < w2_chunks) {
      wait_barrier(bar.w2_empty(w2.slot()), w2.phase() ^ 1);
      load_w2<Traits>(w2_map, transaction_barrier(bar.w2_full(w2.slot())), smem + layout.w2 + w2.slot() * Traits::kW2Bytes, second, false);
      w2.advance(p.w2_slots, false);
      if (++second == p.chunks) second = 0;
    }
  }
}

// A tile of x with its halo; beyond the images it reads as zeros. A flat tile gets its row of zeros from beyond the tensor's end.
template <class Traits>
__device__ void load_tile(const KernelParams& p, const CUtensorMap& x_map, const CUtensorMap& zeros_map, const Tile& tile, char* to,
                          TransactionBarrier* full) {
  constexpr int kPad = Traits::kPad;
  const int halo = kPad * (p.width + 1), flat_rows = kTilePixels + 2 * halo;
  const bool flat = is_flat<Traits>(p);
  const int rows = flat ? flat_rows + 1 : p.tile_images * (p.tile_height + 2 * kPad) * (p.tile_width + 2 * kPad);
  full->arrive_and_expect_tx(rows * Traits::kRowBytes * Traits::kPanels);
#pragma unroll
  for (int panel = 0; panel < Traits::kPanels; ++panel, to += p.x_panel_bytes) {
    if (flat) {
      tma_load_2d(&x_map, full, to, panel * Traits::kPanel, tile.first - halo, kEvictNormal);
      tma_load_2d(&zeros_map, full, to + flat_rows * Traits::kRowBytes, panel * Traits::kPanel, p.pixels, kEvictNormal);
    } else {
      tma_load_4d(&x_map, full, to, panel * Traits::kPanel, tile.x - kPad, tile.y - kPad, tile.image);
    }
  }
}

template <class Traits>
__device__ void produce_pixels(const KernelParams& p, const CUtensorMap& x_map, const CUtensorMap& zeros_map, char* smem,
                               const SharedLayout& layout, Barriers bar) {
  RingState<0> ring;
  for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    // The first tile's warpgroup is waited for by all others: nothing else shares its load and its convolution's beginning.
    if (Traits::kAlternates && index == blockIdx.x + gridDim.x) wait_barrier(bar.x_full(0), 0);
    wait_barrier(bar.x_empty(ring.slot()), ring.phase() ^ 1);  // the slots start empty
    load_tile<Traits>(p, x_map, zeros_map, Tile(p, index), smem + layout.x + ring.slot() * p.x_slot_bytes,
                      transaction_barrier(bar.x_full(ring.slot())));
    ring.advance(p.x_slots, false);
  }
}

// The pixels of each flat tile once more, without halo, over its A: they come from L2 under the tile's last products.
template <class Traits>
__device__ void produce_residuals(const KernelParams& p, const CUtensorMap& pixels_map, char* smem, const SharedLayout& layout, Barriers bar) {
  const int tiles = tiles_of_block(p);
#pragma unroll 1
  for (int i = 0; i < tiles; ++i) {
    const int warpgroup = i % Traits::kWarpgroups;
    wait_barrier(bar.a_empty(warpgroup), i / Traits::kWarpgroups & 1);
    TransactionBarrier* full = transaction_barrier(bar.residual_full(warpgroup));
    full->arrive_and_expect_tx(Traits::kABytes);
    const Tile tile(p, blockIdx.x + i * gridDim.x);
    char* to = smem + layout.x + i % p.x_slots * p.x_slot_bytes;
#pragma unroll
    for (int panel = 0; panel < Traits::kPanels; ++panel) {
      tma_load_2d(&pixels_map, full, to + panel * Traits::kAPanelBytes, panel * Traits::kPanel, tile.first, kEvictNormal);
    }
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

// Bits t of [0, kKernel) where at + t - kPad lies in [0, size).
template <class Traits>
__device__ __forceinline__ uint32_t taps_inside(int at, int size) {
  constexpr int kPad = Traits::kPad, kKernel = Traits::kKernel;
  return (1u << min(size - at + kPad, kKernel)) - 1u & ~0u << max(kPad - at, 0);
}

// Shared-memory rows that this lane hands to ldmatrix for a block of 16 pixels, one offset a load, already swizzled for chunk 0.
template <class Traits>
struct TapRows {
  static constexpr int kLoads = Products<Traits>::kCount, kPad = Traits::kPad, kKernel = Traits::kKernel;
  uint32_t offset[kLoads];
  __device__ __forceinline__ TapRows(const KernelParams& p, const int2* pixels, const Tile& tile, int block, int lane, uint32_t base) {
    const int pixel = block * 16 + (lane & 15);
    const bool flat = is_flat<Traits>(p);
    const int width = flat ? p.width : p.tile_width + 2 * kPad;
    int center;
    uint32_t exists = ~0u;  // a bit a tap: a rectangle's taps all exist
    if (flat) {
      int row, image, x, y;
      p.by_width.fast_divmod(row, x, tile.first + pixel);
      p.by_height.fast_divmod(image, y, row);
      center = pixel + kPad * (width + 1);
      const uint32_t columns = taps_inside<Traits>(x, p.width), rows = tile.first + pixel < p.pixels ? taps_inside<Traits>(y, p.height) : 0;
      exists = 0;
#pragma unroll
      for (int i = 0; i < kKernel; ++i) exists |= rows >> i & 1 ? columns << i * kKernel : 0;
    } else {
      center = max(pixels[pixel].x, kPad * width + kPad);
    }
    // Lanes 16 to 31 hand over the second tap's rows, or at group width 16 the second half of the channels.
    const int second = Traits::kGroupWidth == 8 ? lane >> 4 : 0;
    const auto shift = [&](int tap) { return (tap / kKernel - kPad) * width + tap % kKernel - kPad; };
    const uint32_t zeros = base + swizzle<Traits::kRowBytes>((kTilePixels + 2 * kPad * (p.width + 1)) * Traits::kRowBytes);
    const uint32_t mine = exists >> second;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const bool single = Products<Traits>::single(i);
      const int tap = Products<Traits>::first_tap(i);
      const int row = center + (second != 0 && !single ? shift(tap + 1) : shift(tap));
      const uint32_t bits = single ? exists : mine;
      offset[i] = bits >> tap & 1 ? base + swizzle<Traits::kRowBytes>(row * Traits::kRowBytes) : zeros;
      if (Traits::kGroupWidth == 16) offset[i] ^= (lane >> 4) << 4;
    }
  }
};

// Operands of two neighbouring 8-output-channel blocks for one product.
template <class Traits>
struct ConvStep {
  static constexpr int kRow = Traits::kGroupWidth * 2;  // bytes of one output channel of one tap
  static constexpr int kTap = Traits::kChannels * kRow;
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

  // weights: w, or where they did not come through shared memory the B fragments of this product.
  template <int kProduct>
  __device__ __forceinline__ void multiply(float* sums, const uint32_t (&weights)[4]) const {
    using Element = ElementOf<Traits>;
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      if (Products<Traits>::single(kProduct)) {
        mma_1688<Element>(sums + 4 * b, a[b], weights[2 * b]);
      } else {
        mma_16816<Element>(sums + 4 * b, a[Traits::kGroupWidth == 16 ? 0 : b], weights[2 * b], weights[2 * b + 1]);
      }
    }
  }
};

// A word of a tensor that no launch in flight writes; volatile, so that it stays as far ahead of its use as it is written.
__device__ __forceinline__ uint32_t load_constant(const uint32_t* from) {
  uint32_t v;
  asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(v) : "l"(from));
  return v;
}

// B fragments of two neighbouring 8-channel blocks, all products, from global memory (group width 8).
template <class Traits>
struct BlockWeights {
  uint32_t w[Products<Traits>::kCount][4];

  // lane_weights: this lane's part of block 0, tap 0.
  __device__ __forceinline__ void load(const uint32_t* lane_weights, int block) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
#pragma unroll
      for (int tap = 0; tap < Traits::kTaps; ++tap) {
        w[tap / 2][2 * b + tap % 2] = load_constant(lane_weights + (tap * Traits::kChannels + (block + b) * 8) * 4);
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

// weight(j) and bias(j): the affine part's of this lane's two channels of 8-channel block j.
template <int kChannels, class LaneVector>
__device__ __forceinline__ void layer_norm(float (&v)[kChannels / 2], bool affine, float eps, const LaneVector& weight, const LaneVector& bias) {
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
    const float2 w = weight(j), b = bias(j);
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

// The same value, unknown to the compiler: what is derived from it is worked out where it is used. Else layouts stay in uniform
// registers from the kernel's start on and the epilogue's addresses in others throughout the tile, and spill.
__device__ __forceinline__ int opaque(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// Of a warpgroup, read again from the special register rather than kept.
__device__ __forceinline__ uint32_t thread_of_warpgroup() {
  uint32_t v;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(v));
  return v % 128;
}

template <class Traits>
struct Consumer {
  using Element = ElementOf<Traits>;
  static constexpr int kChannels = Traits::kChannels;
  const KernelParams& p;
  char* smem;
  SharedLayout layout;
  int warpgroup, warp, lane;

  // A vector as this lane takes it: channels 8 j + 2 (lane % 4) and the next. Where shared memory has no room for it, from L1.
  struct LaneVector {
    uint32_t shared;
    const float* global;  // opaque, so that j goes into the load as a constant
    float absent;
    __device__ __forceinline__ float2 operator()(int j) const {
      if (Traits::kVectorsInShared || shared != 0) return load_shared_float2(shared + j * 32);
      return global != nullptr ? make_float2(__ldg(global + 8 * j), __ldg(global + 8 * j + 1)) : make_float2(absent, absent);
    }
  };

  __device__ __forceinline__ LaneVector lane_vector(int index) const {
    const int first = 2 * (lane % 4);
    if constexpr (Traits::kVectorsInShared) return {smem_address(smem + layout.vectors) + (index * kChannels + first) * 4, nullptr, 0.f};
    const float* vectors[] = {p.conv_bias, p.norm_weight, p.norm_bias, p.project_bias, p.layer_scale};
    const float* v = vectors[index] != nullptr ? vectors[index] + first : nullptr;
    asm volatile("" : "+l"(v));
    return {0, v, index == 1 || index == 4 ? 1.f : 0.f};
  }

  // The projection's bias (vector 3) and the layer scale (4) behind A in the tile's slot, where no taps are read any more.
  __device__ __forceinline__ LaneVector lane_vector_behind_a(int index, uint32_t slot) const {
    if constexpr (Traits::kVectorsInShared) return lane_vector(index);
    return {slot + Traits::kABytes + ((index - 3) * kChannels + 2 * (lane % 4)) * 4, nullptr, 0.f};
  }

  // Every pixel's sums start from the bias.
  __device__ __forceinline__ void initialise_sums(float (&sums)[kChannels / 2], const LaneVector& start) const {
#pragma unroll
    for (int j = 0; j < kChannels / 8; ++j) {
      const float2 b = start(j);
      sums[4 * j] = sums[4 * j + 2] = b.x;
      sums[4 * j + 1] = sums[4 * j + 3] = b.y;
    }
  }

  // Where the convolution's weights come from: shared memory, or global memory some channel blocks ahead of their use.
  static constexpr int kWeightsAhead = 2, kStepsAhead = 2;  // pairs of channel blocks; products
  template <bool kShared>
  struct WeightSource {
    uint32_t shared;
    const uint32_t* global;
    BlockWeights<Traits> ahead[kShared ? 1 : kWeightsAhead + 1];
  };

  // The convolution of this warp's 16 pixels, all channels, in the wgmma accumulator layout: sums[4 j + i] is channel
  // 8 j + 2 (lane % 4) + i % 2 of pixel lane / 4 + 8 (i / 2). Two blocks a pass; each step's operands are loaded a step ahead.
  // Its first weights and the taps' places are asked for before the tile is waited for.
  template <bool kShared>
  __device__ __forceinline__ void convolve(float (&sums)[kChannels / 2], uint32_t slot, const Tile& tile, Barriers bar, uint32_t x_full,
                                           uint32_t phase) const {
    constexpr int kSteps = kChannels / 16 * Products<Traits>::kCount;
    WeightSource<kShared> weights{smem_address(smem + (Traits::kFirstStaged ? layout.w2 : layout.conv_weight)),
                                  static_cast<const uint32_t*>(p.conv_weight) + lane, {}};
    if constexpr (!kShared) {
#pragma unroll
      for (int i = 0; i < kWeightsAhead; ++i) weights.ahead[i].load(weights.global, 2 * i);
    }
    TapRows<Traits> rows(p, reinterpret_cast<const int2*>(smem + layout.pixels), tile, warp, lane, slot);
    if (kShared) wait_barrier(bar.conv_full(), 0);
    wait_barrier(x_full, phase);
    ConvStep<Traits> steps[kStepsAhead + 1];
    convolve_steps<kShared>(sums, rows, weights, steps, std::make_index_sequence<kSteps + kStepsAhead>{});
  }

  template <bool kShared, size_t... kStep>
  __device__ __forceinline__ void convolve_steps(float (&sums)[kChannels / 2], const TapRows<Traits>& rows, WeightSource<kShared>& weights,
                                                 ConvStep<Traits> (&steps)[kStepsAhead + 1], std::index_sequence<kStep...>) const {
    (convolve_step<kShared, kStep>(sums, rows, weights, steps), ...);
  }

  // Loads step kStep and multiplies step kStep - kStepsAhead.
  template <bool kShared, int kStep>
  __device__ __forceinline__ void convolve_step(float (&sums)[kChannels / 2], const TapRows<Traits>& rows, WeightSource<kShared>& weights,
                                                ConvStep<Traits> (&steps)[kStepsAhead + 1]) const {
    constexpr int kCount = Products<Traits>::kCount, kChunks = Traits::kPanel / 8, kSteps = kChannels / 16 * kCount;
    if constexpr (kStep < kSteps) {
      constexpr int kProduct = kStep % kCount, kBlock = kStep / kCount * 2;
      ConvStep<Traits>& step = steps[kStep % (kStepsAhead + 1)];
      if constexpr (kShared) {
        step.template load_weights<kProduct>(weights.shared + kBlock * 8 * ConvStep<Traits>::kRow, lane);
      } else if constexpr (kProduct == kStepsAhead && kBlock + 2 * kWeightsAhead < kChannels / 8) {  // into what was just used
        weights.ahead[(kBlock / 2 + kWeightsAhead) % (kWeightsAhead + 1)].load(weights.global, kBlock + 2 * kWeightsAhead);
      }
      step.template load_pixels<kProduct>(rows.offset[kProduct] + kBlock / kChunks * p.x_panel_bytes, kBlock % kChunks);
    }
    if constexpr (kStep >= kStepsAhead) {
      constexpr int kDone = kStep - kStepsAhead, kProduct = kDone % kCount, kBlock = kDone / kCount * 2;
      ConvStep<Traits>& step = steps[kDone % (kStepsAhead + 1)];
      if constexpr (kShared) {
        step.template multiply<kProduct>(sums + 4 * kBlock, step.w);
      } else {
        step.template multiply<kProduct>(sums + 4 * kBlock, weights.ahead[kBlock / 2 % (kWeightsAhead + 1)].w[kProduct]);
      }
    }
  }

  // Address that this lane hands to ldmatrix / stmatrix for the 16 pixels x 16 channels at 8-channel block j.
  __device__ __forceinline__ uint32_t matrix_address(uint32_t base, int panel_bytes, int row, int j) const {
    constexpr int kChunks = Traits::kPanel / 8;
    return base + j / kChunks * panel_bytes + (swizzle<Traits::kRowBytes>(row * Traits::kRowBytes) ^ ((j % kChunks + (lane >> 4)) << 4));
  }

  // Normalises the sums and makes them the first product's operand.
  __device__ __forceinline__ void to_operand(float (&sums)[kChannels / 2], OperandA<Traits>& a, uint32_t slot) const {
    // Each thread takes two channels of either vector, on their way from L2 under the norm: all 32 of its own would be 128 loads.
    float behind_a[4];
    if constexpr (!Traits::kVectorsInShared) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* from = i < 2 ? p.project_bias : p.layer_scale;
        behind_a[i] = from != nullptr ? __ldg(from + i % 2 * 128 + thread_of_warpgroup()) : i < 2 ? 0.f : 1.f;
      }
    }
    if (p.has_norm) layer_norm<kChannels>(sums, p.norm_weight != nullptr || p.norm_bias != nullptr, p.eps, lane_vector(1), lane_vector(2));
    if constexpr (Traits::kARegisters) {
#pragma unroll
      for (int i = 0; i < kChannels / 4; ++i) a.fragments[i] = pack2<Element>(sums[2 * i], sums[2 * i + 1]);
    } else {
      warpgroup_barrier(1 + warpgroup);  // every warp has read its taps
      store_pixels(sums, slot);
      if constexpr (!Traits::kVectorsInShared) {
        const uint32_t to = slot + Traits::kABytes + thread_of_warpgroup() * 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) store_shared_32(to + i * 512, __float_as_uint(behind_a[i]));
      }
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

  // O <- O * layer scale * sample scale.
  __device__ __forceinline__ void scale_output(float (&o)[kChannels / 2], const Tile& tile, uint32_t slot) const {
    if (p.layer_scale == nullptr && p.sample_scale == nullptr) return;
    const int2* pixels = reinterpret_cast<const int2*>(smem + layout.pixels);
    float sample[2] = {1.f, 1.f};
    if (p.sample_scale != nullptr) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int pixel = warp * 16 + lane / 4 + 8 * r;
        const int image = is_flat<Traits>(p) ? (tile.first + pixel) / (p.height * p.width) : tile.image + (pixels[pixel].y >> 16);
        if (image < p.batch) sample[r] = __ldg(p.sample_scale + image);
      }
    }
    const LaneVector scales = lane_vector_behind_a(4, slot);
#pragma unroll
    for (int j = 0; j < kChannels / 8; ++j) {
      const float2 scale = scales(j);
#pragma unroll
      for (int r = 0; r < 2; ++r) o[4 * j + 2 * r] *= scale.x * sample[r], o[4 * j + 2 * r + 1] *= scale.y * sample[r];
    }
  }

  // O + x over x in shared memory; row: that of this lane's pixel, warp * 16 + lane % 16.
  __device__ __forceinline__ void add_residual(const float (&o)[kChannels / 2], uint32_t slot, int panel_bytes, int row) const {
    constexpr int kBatch = batch_of(kChannels / 8);
    static_assert(kBatch % 2 == 0);
#pragma unroll
    for (int first = 0; first < kChannels / 8; first += kBatch) {
      uint32_t x[kBatch / 2][4];
#pragma unroll
      for (int i = 0; i < kBatch / 2; ++i) ldmatrix_x4(x[i], matrix_address(slot, panel_bytes, row, first + 2 * i));
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
        stmatrix_x4(matrix_address(slot, panel_bytes, row, first + 2 * i), x[i][0], x[i][1], x[i][2], x[i][3]);
      }
    }
  }

  // Writes O over the tile in shared memory, the residual added where the x tile is still there.
  __device__ __forceinline__ void stage_output(const float (&o)[kChannels / 2], uint32_t slot) const {
    if constexpr (!Traits::kKeepsX) {
      store_pixels(o, slot);
    } else {
      // Rows of pixels that the tile shape lacks go to row 0, a corner of the halo.
      add_residual(o, slot, p.x_panel_bytes, max(reinterpret_cast<const int2*>(smem + layout.pixels)[warp * 16 + (lane & 15)].x, 0));
    }
  }

  // A flat tile's pixels lie one after another in memory: each warp adds x to its own 16 and stores them by TMA, which leaves out
  // what lies beyond the images. Waits until they are read, so that the slot may be filled again.
  __device__ __forceinline__ void store_flat(const float (&o)[kChannels / 2], uint32_t slot, const Tile& tile, const CUtensorMap& y_map,
                                             uint32_t residual_full, uint32_t phase) const {
    const int first = Traits::kKeepsX ? Traits::kPad * (p.width + 1) : 0, panel_bytes = Traits::kKeepsX ? p.x_panel_bytes : Traits::kAPanelBytes;
    if constexpr (Traits::kKeepsX) {
      warpgroup_barrier(1 + warpgroup);  // every warp has read its taps
    } else {
      wait_barrier(residual_full, phase);  // all warps' A has been read before x comes
    }
    add_residual(o, slot, panel_bytes, first + warp * 16 + (lane & 15));
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) {
#pragma unroll
      for (int panel = 0; panel < Traits::kPanels; ++panel) {
        const uint32_t from = slot + panel * panel_bytes + (first + warp * 16) * Traits::kRowBytes;
        cute::SM90_TMA_STORE_2D::copy(&y_map, reinterpret_cast<void*>(__cvta_shared_to_generic(from)), panel * Traits::kPanel,
                                      tile.first + warp * 16);
      }
      bulk_store_wait();
    }
  }

  // Rounded once, as the sum in float32 would be.
  static __device__ __forceinline__ uint4 add(uint4 a, uint4 b) {
    using Pair = std::conditional_t<Traits::kDType == DType::kHalf, __half2, __nv_bfloat162>;
    Pair* u = reinterpret_cast<Pair*>(&a);
    const Pair* v = reinterpret_cast<const Pair*>(&b);
#pragma unroll
    for (int i = 0; i < 4; ++i) u[i] = __hadd2(u[i], v[i]);
    return a;
  }

  // The tile in memory, 16 bytes a thread, a pixel's channels side by side: kPieces a thread.
  static constexpr int kPieces = kTilePixels * kChannels / 8 / 128;

  // Of this thread's piece i: its place in x and y (-1: beyond the images) and in shared memory. Unsigned: quotients are shifts.
  template <bool kFlat>
  __device__ __forceinline__ void locate(int i, uint32_t thread, const Tile& tile, uint32_t slot, int& offset, uint32_t& staged) const {
    constexpr int kVectors = kChannels / 8, kChunks = Traits::kPanel / 8;
    const uint32_t index = i * 128 + thread, pixel = index / kVectors, j = index % kVectors;
    uint32_t row = pixel;
    if constexpr (kFlat) {
      offset = tile.first + static_cast<int>(pixel) < p.pixels ? static_cast<int>(tile.first * kVectors + index) : -1;
      if (Traits::kKeepsX) row = pixel + Traits::kPad * (p.width + 1);
    } else {
      const int2 map = reinterpret_cast<const int2*>(smem + layout.pixels)[pixel];
      const int image = tile.image + (map.y >> 16), y = tile.y + (map.y >> 8 & 255), x = tile.x + (map.y & 255);
      const bool inside = map.x >= 0 && image < p.batch && y < p.height && x < p.width;
      offset = inside ? ((image * p.height + y) * p.width + x) * kVectors + static_cast<int>(j) : -1;
      if (Traits::kKeepsX) row = static_cast<uint32_t>(max(map.x, 0));
    }
    staged = slot + j / kChunks * (Traits::kKeepsX ? p.x_panel_bytes : Traits::kAPanelBytes) +
             (swizzle<Traits::kRowBytes>(row * Traits::kRowBytes) ^ (j % kChunks << 4));
  }

  // Copies the staged tile to y, the residual added where the x tile is overwritten; loads in batches ahead of their use.
  template <bool kFlat>
  __device__ __forceinline__ void store_output(uint32_t slot, const Tile& tile) const {
    constexpr int kBatch = batch_of(kPieces);
    const uint32_t thread = thread_of_warpgroup();
#pragma unroll
    for (int first = 0; first < kPieces; first += kBatch) {
      uint4 v[kBatch], x[Traits::kKeepsX ? 1 : kBatch];
      int offset[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        uint32_t staged;
        locate<kFlat>(first + i, thread, tile, slot, offset[i], staged);
        if constexpr (!Traits::kKeepsX) {
          if (offset[i] >= 0) x[i] = __ldg(static_cast<const uint4*>(p.x) + offset[i]);
        }
        v[i] = load_shared_128(staged);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (offset[i] < 0) continue;
        if constexpr (!Traits::kKeepsX) v[i] = add(v[i], x[i]);
        static_cast<uint4*>(p.y)[offset[i]] = v[i];
      }
    }
  }

  __device__ __forceinline__ void finish_tile(float (&o)[kChannels / 2], uint32_t slot, const Tile& tile, const CUtensorMap& y_map,
                                              uint32_t residual_full, uint32_t phase) const {
    scale_output(o, tile, slot);
    if (Traits::kTmaStore && is_flat<Traits>(p)) {
      store_flat(o, slot, tile, y_map, residual_full, phase);
      return;
    }
    warpgroup_barrier(1 + warpgroup);  // every warp has read its taps and A
    stage_output(o, slot);
    warpgroup_barrier(1 + warpgroup);
    if (!Traits::kTmaStore && is_flat<Traits>(p)) {
      store_output<true>(slot, tile);
    } else {
      store_output<false>(slot, tile);
    }
  }

  __device__ __forceinline__ void release_first_weights(Barriers bar) const {
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) arrive_barrier(bar.conv_empty());
  }

  __device__ __forceinline__ void run(Barriers bar, const CUtensorMap& y_map) {
    constexpr int kTurns = Traits::kWarpgroups;
    FeedForward<Traits, Barriers> feed_forward{p, bar, smem_address(smem + layout.w1), smem_address(smem + layout.w2),
                                               smem_address(smem + layout.expand_bias), lane, 0, p.chunks, {}, {}, {}, {}};
    const int tiles = tiles_of_block(p);
    if constexpr (Traits::kAlternates) {
      const int next = (warpgroup + 1) % kTurns;
      feed_forward.turn_w1 = bar.w1_turn(warpgroup), feed_forward.turn_w2 = bar.w2_turn(warpgroup);
      feed_forward.next_w1 = bar.w1_turn(next), feed_forward.next_w2 = bar.w2_turn(next);
      feed_forward.jump(warpgroup * p.chunks);
      feed_forward.a_empty = bar.a_empty(warpgroup);
    }
    if (Traits::kFirstStaged && warpgroup >= tiles) release_first_weights(bar);
    for (int i = warpgroup; i < tiles; i += kTurns) {
      const int slot_index = i % p.x_slots;
      const uint32_t slot = smem_address(smem + layout.x + slot_index * p.x_slot_bytes);
      float sums[kChannels / 2];
      OperandA<Traits> a;
      initialise_sums(sums, lane_vector(0));
      const Tile tile(p, blockIdx.x + i * gridDim.x);
      if (Traits::kFirstStaged && i < kTurns) {
        convolve<true>(sums, slot, tile, bar, bar.x_full(slot_index), 0);
        release_first_weights(bar);
      } else {
        convolve<Traits::kConvWeightsStay>(sums, slot, tile, bar, bar.x_full(slot_index), i / p.x_slots & 1);
      }
      to_operand(sums, a, slot);
      if constexpr (Traits::kAlternates) feed_forward.turn = i == 0 ? -1 : (i - 1) / kTurns & 1;
      initialise_sums(sums, lane_vector_behind_a(3, slot));
      feed_forward.run(sums, a);
      if constexpr (Traits::kAlternates) feed_forward.jump((kTurns - 1) * p.chunks);
      finish_tile(sums, opaque(slot), Tile(p, blockIdx.x + opaque(i) * gridDim.x), y_map, bar.residual_full(warpgroup), opaque(i) / kTurns & 1);
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) arrive_barrier(bar.x_empty(slot_index));
    }
    // A warpgroup without a tile in the last round still turns the rings for the others.
    if (!Traits::kAlternates && tiles % kTurns > 0 && warpgroup >= tiles % kTurns) feed_forward.skip();
  }
};

// ---------------------------------------------------------------------------------------------------------------------------

// Vectors absent in the problem become zeros or ones.
template <class Traits>
__device__ void load_vectors(const KernelParams& p, char* smem, const SharedLayout& layout) {
  constexpr int kChannels = Traits::kChannels;
  float* vectors = reinterpret_cast<float*>(smem + layout.vectors);
  for (int i = threadIdx.x; Traits::kVectorsInShared && i < kChannels; i += Traits::kThreads) {
    vectors[i] = p.conv_bias != nullptr ? p.conv_bias[i] : 0.f;
    vectors[kChannels + i] = p.norm_weight != nullptr ? p.norm_weight[i] : 1.f;
    vectors[2 * kChannels + i] = p.norm_bias != nullptr ? p.norm_bias[i] : 0.f;
    vectors[3 * kChannels + i] = p.project_bias != nullptr ? p.project_bias[i] : 0.f;
    vectors[4 * kChannels + i] = p.layer_scale != nullptr ? p.layer_scale[i] : 1.f;
  }
  for (int i = threadIdx.x; i < p.chunks * kHiddenChunk; i += Traits::kThreads) {
    const float b = (p.expand_bias != nullptr ? p.expand_bias[i] : 0.f) * bias_scale<Traits::kActivation>();
    if constexpr (Traits::kExpandBiasBytes == 2) {
      reinterpret_cast<ElementOf<Traits>*>(smem + layout.expand_bias)[i] = ElementOf<Traits>(b);
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
__device__ __forceinline__ SharedLayout layout_of(const KernelParams& p, int x_slots) {
  constexpr int kFixed = Traits::kFixedSlots;
  return shared_layout<Traits>(kFixed > 0 ? kFixed : p.w1_slots, kFixed > 0 ? kFixed : p.w2_slots, x_slots, p.x_slot_bytes,
                               p.chunks * kHiddenChunk);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    conv_first_block_fwd_sm90(const __grid_constant__ KernelParams p, const __grid_constant__ CUtensorMap x_map,
                              const __grid_constant__ CUtensorMap zeros_map, const __grid_constant__ CUtensorMap w1_map,
                              const __grid_constant__ CUtensorMap w2_map, const __grid_constant__ CUtensorMap pixels_map,
                              const __grid_constant__ CUtensorMap y_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char smem[];
  const SharedLayout layout = layout_of<Traits>(p, p.x_slots);
  const Barriers bar{smem_address(smem + layout.barriers)};
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 7 * kMaxSlots; ++i) {
      const int group = i / kMaxSlots;
      const bool weights_empty = group == 3 || group == 4;
      const bool of_all = (weights_empty && !Traits::kAlternates) || i == 6 * kMaxSlots + 7;  // warpgroups
      const int arrivals = group < 3 || i == 6 * kMaxSlots ? 1 : of_all ? 4 * Traits::kWarpgroups : 4;
      transaction_barrier(bar.at(group, i % kMaxSlots))->init(arrivals);
    }
    cutlass::arch::fence_barrier_init();
  }
  load_vectors<Traits>(p, smem, layout);
  __syncthreads();
  wait_for_previous_launch();
  allow_next_launch();  // after the wait: the next launch may count on what came before this one
  if (warp < 4) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (threadIdx.x % 32 == 0) {
      if (warp == 0) produce_weights<Traits>(p, w1_map, w2_map, smem, layout, bar);
      if (warp == 1) produce_pixels<Traits>(p, x_map, zeros_map, smem, layout, bar);
      if (Traits::kReloadsX && warp == 2 && is_flat<Traits>(p)) produce_residuals<Traits>(p, pixels_map, smem, layout, bar);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    Consumer<Traits> consumer{p, smem, layout_of<Traits>(p, opaque(p.x_slots)), warp / 4 - 1, warp % 4, static_cast<int>(threadIdx.x % 32)};
    consumer.run(bar, y_map);
  }
#endif
}

}  // namespace convfirst::block_fusion::sm90
