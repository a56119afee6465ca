// The conv-first block, forward, for few pixels on Hopper: one launch, a cluster of blocks a tile of 32 pixels, made for latency.
//
//   Weights are the left operands of both products (units as rows, pixels as columns: no row is wasted on a map of 49 pixels) and come
//   straight from L2 to where they are used, before this launch waits for the one before it: two blocks fit a multiprocessor, so that
//   the next launch loads its weights while this one runs.
//
//     x of own channels        convolution results         S [slice x 32]        O [C x 32], partial
//     +----------------+       of all channels             = W1c A^T             = W2c P^T
//     | 32 pixels with |  -->  A [32 x C]            -->   act          -->                       -->  own channels: sum of all blocks'
//     | neighbours     |  (1)  LayerNorm in place          P [32 x slice]                         (2)  partial sums, y = x + scale O
//     +----------------+
//   (1), (2): every block sends every other one its part through distributed shared memory (st.async, counted by a barrier there); a block
//   alone (64 channels) stores it.
//
//   what                              where                                             written by                    when
//   W1 slice                          registers, operand layout                         its thread                    before the wait
//   W2 slice                          shared, each thread its own 16-byte pieces        its thread (cp.async)         before the wait
//   convolution's weights             registers, operand layout                         its thread                    before the wait
//   x, own channels                   shared, kXPitch bytes a pixel                     all (cp.async)                after the wait
//   own convolution results, moments  shared (kSent, kSentMoments)                      convolving warps
//   A, moments of each block          shared, operand_address                           all blocks (1); then the norm
//   halves of S                       shared (kSums), where the depth is split          pairs of warps
//   P                                 shared, operand_address                           activation (stmatrix)
//   partial sums of O                 shared (kReduce): [source][16 channels][8 pixels]  all blocks (2)
//
// Sums over blocks are in the order of their ranks, so results do not differ from run to run.
#pragma once

#include "../common/grid_sm90.cuh"
#include "../common/ptx.cuh"
#include "activation_sm90.cuh"
#include "latency_sm90.h"

namespace convfirst::block_fusion::sm90 {

struct LatencyParams {
  const void* x;
  void* y;
  const void* conv_weight;
  const float* conv_bias;
  const float* norm_weight;
  const float* norm_bias;
  const void* expand_weight;
  const float* expand_bias;
  const void* project_weight;
  const float* project_bias;
  const float* layer_scale;
  const float* sample_scale;
  float eps;
  int has_norm;
  int height, width;
  int pixels;  // of all images
};

// ---------------------------------------------------------------------------------------------------------------------------
// Instructions

// Past L1: what an earlier launch wrote is seen there.
__device__ __forceinline__ uint4 load_global_128(const void* address) {
  uint4 v;
  asm volatile("ld.global.cg.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address) : "memory");
  return v;
}

__device__ __forceinline__ uint32_t load_global_32(const void* address) {
  uint32_t v;
  asm volatile("ld.global.cg.b32 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
  return v;
}

__device__ __forceinline__ void store_shared_128(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

__device__ __forceinline__ void store_shared_float2(uint32_t address, float2 v) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(v.x), "f"(v.y) : "memory");
}

__device__ __forceinline__ void stmatrix_x2(uint32_t address, uint32_t r0, uint32_t r1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(r0), "r"(r1) : "memory");
}

__device__ __forceinline__ void stmatrix_x2_transposed(uint32_t address, uint32_t r0, uint32_t r1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(r0), "r"(r1) : "memory");
}

__device__ __forceinline__ void stmatrix_x4_transposed(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

// To a block of the cluster, counted in bytes by a barrier of the same block; both are peer addresses.
__device__ __forceinline__ void send_128(uint32_t there, uint4 v, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(there), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void send_float2(uint32_t there, float2 v, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(there), "f"(v.x), "f"(v.y),
               "r"(barrier)
               : "memory");
}

__device__ __forceinline__ float optional(const float* vector, int index, float absent) {
  return vector != nullptr ? __ldg(vector + index) : absent;
}

// ---------------------------------------------------------------------------------------------------------------------------

// A product's right operand: 8 channels (or hidden units) of a pixel are a chunk of 16 bytes; chunks' pixels lie one after another, permuted
// so that neither a column of pixels nor four neighbouring chunks meet in a bank.
template <class Traits>
__device__ __forceinline__ uint32_t operand_address(uint32_t base, int chunk, int pixel) {
  return base + (chunk * Traits::kPixels + (pixel ^ ((chunk & 3) << 1))) * 16;
}

// sums[row tile][pixel tile] += weights x operand, over kSteps chunks of depth 32 from `first` on. A thread's 16 bytes of a row are eight
// neighbours in depth on both sides: two products of depth 16 in an order of their own. weight(row tile, step, half of the 16 rows).
template <class Traits, int kRows, int kSteps, class Weight>
__device__ __forceinline__ void multiply(float (&sums)[kRows][Traits::kPixelTiles][4], uint32_t operand, int first, int lane,
                                         const Weight& weight) {
  using Element = ElementOf<Traits>;
  uint4 b[2][Traits::kPixelTiles];
  const auto load = [&](int step) {
#pragma unroll
    for (int i = 0; i < Traits::kPixelTiles; ++i) {
      b[step % 2][i] = load_shared_128(operand_address<Traits>(operand, (first + step) * 4 + lane % 4, 8 * i + lane / 4));
    }
  };
  load(0);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (step + 1 < kSteps) load(step + 1);
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const uint4 low = weight(j, step, 0), high = weight(j, step, 1);
      const uint32_t a[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
#pragma unroll
      for (int i = 0; i < Traits::kPixelTiles; ++i) mma_16816<Element>(sums[j][i], a[0], b[step % 2][i].x, b[step % 2][i].y);
#pragma unroll
      for (int i = 0; i < Traits::kPixelTiles; ++i) mma_16816<Element>(sums[j][i], a[1], b[step % 2][i].z, b[step % 2][i].w);
    }
  }
}

// The convolution's weights of 8 output channels: fragments of the taps' pairs, and of the last tap.
struct ConvWeights {
  uint32_t fragments[9];
  template <class Traits>
  __device__ __forceinline__ void load(const void* weight, int channel, int lane) {
    const char* from = static_cast<const char*>(weight) + (channel + lane / 4) * 16 + lane % 4 * 4;
#pragma unroll
    for (int tap = 0; tap < Traits::kTaps; ++tap) fragments[tap] = load_global_32(from + tap * Traits::kChannels * 16);
  }
};

// What depends on the shape alone.
template <class Traits>
struct LatencyPlaces {
  uint32_t taps[Traits::kConvTiles][5];
  int x[Traits::kXPieces];
  // The compiler would compute them where they are used.
  __device__ __forceinline__ void keep() {
#pragma unroll
    for (int i = 0; i < Traits::kConvTiles * 5; ++i) asm volatile("" : "+r"(taps[i / 5][i % 5]));
#pragma unroll
    for (int i = 0; i < Traits::kXPieces; ++i) asm volatile("" : "+r"(x[i]));
  }
};

// What every width shares: x, convolution, norm, exchange.
template <class Traits>
struct LatencyTile {
  using Element = ElementOf<Traits>;
  using Layout = LatencyLayout<Traits>;
  static constexpr int kPixelTiles = Traits::kPixelTiles;
  static constexpr int kPieces = Traits::kOwned / 8;  // of a pixel of x, 16 bytes each
  static constexpr int kZeros = -1, kNothing = -2;    // in the place of an offset into x
  const LatencyParams& p;
  uint32_t smem;
  int rank, first;  // in the cluster; first pixel of the tile
  int thread, warp, lane;
  LatencyRows rows;

  __device__ uint32_t received() const { return smem + Layout::kBarriers; }
  __device__ uint32_t reduced() const { return smem + Layout::kBarriers + 8; }

  // A block alone stores to its own shared memory and needs no more than a barrier of its threads: st.async is an illegal instruction in
  // a launch without clusters.
  static constexpr bool kAlone = Traits::kCluster == 1;

  __device__ __forceinline__ void send(uint32_t address, uint4 v, uint32_t barrier, int to) const {
    if constexpr (kAlone) {
      store_shared_128(address, v);
    } else {
      send_128(grid::peer_address(address, to), v, grid::peer_address(barrier, to));
    }
  }

  __device__ __forceinline__ void send(uint32_t address, float2 v, uint32_t barrier, int to) const {
    if constexpr (kAlone) {
      store_shared_float2(address, v);
    } else {
      send_float2(grid::peer_address(address, to), v, grid::peer_address(barrier, to));
    }
  }

  __device__ __forceinline__ void wait_for_all(uint32_t barrier) const {
    if constexpr (kAlone) {
      __syncthreads();
    } else {
      grid::wait_for_peer(barrier, 0);
    }
  }

  __device__ void initialise_barriers(char* barriers, int exchange_bytes = Traits::kExchangeBytes) const {
    if (!kAlone && thread == 0) {
      auto* barrier = reinterpret_cast<TransactionBarrier*>(barriers);
      barrier[0].init(1);
      barrier[1].init(1);
      grid::fence_barrier_init();
      barrier[0].arrive_and_expect_tx(exchange_bytes);
      barrier[1].arrive_and_expect_tx(Traits::kReduceBytes);
    }
  }

  // ---- before the wait: weights ----

  // The norm's affine part, and the pixel of zeros that stands for neighbours outside an image.
  __device__ void fill_shared() const {
    for (int i = thread; i < Traits::kChannels; i += Traits::kThreads) {
      store_shared_32(smem + Layout::kNorm + i * 4, __float_as_uint(optional(p.norm_weight, i, 1.f)));
      store_shared_32(smem + Layout::kNorm + (Traits::kChannels + i) * 4, __float_as_uint(optional(p.norm_bias, i, 0.f)));
    }
    fill_zeros();
  }

  __device__ void fill_zeros() const {
    if (thread < Traits::kXPitch / 4) store_shared_32(smem + Layout::kX + rows.count * Traits::kXPitch + thread * 4, 0);
  }

  // Which 8 own channels this warp convolves, and the first 16 pixels.
  __device__ int conv_block() const { return warp % Traits::kConvBlocks; }
  __device__ int conv_tile(int i) const { return warp / Traits::kConvBlocks + i * (Traits::kWarps / Traits::kConvBlocks); }

  // Addresses that this lane hands to ldmatrix for the taps of 16 pixels: a pair of taps each.
  __device__ __forceinline__ void tap_addresses(uint32_t (&address)[5], int tile) const {
    const int pixel = tile * 16 + lane % 16, number = first + pixel, line = number / p.width;
    const int y = number < p.pixels ? line % p.height : -2, x = number - line * p.width;
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      const int tap = min(2 * i + lane / 16, Traits::kTaps - 1), dy = tap / 3, dx = tap % 3;
      const bool exists = y + dy >= 1 && y + dy <= p.height && x + dx >= 1 && x + dx <= p.width;
      const int row = exists ? dy * rows.step + pixel + dx : rows.count;
      address[i] = smem + Layout::kX + row * Traits::kXPitch + conv_block() * 16;
    }
  }

  // Where a thread's 16-byte pieces of x come from: own channels of the tile's pixels and of their neighbours, in units of 16 bytes.
  __device__ __forceinline__ int x_offset(int i) const {
    const int row = i / kPieces, segment = min(row / rows.step, 2), pixel = first + (segment - 1) * p.width - 1 + row - segment * rows.step;
    if (row >= rows.count) return kNothing;
    return pixel >= 0 && pixel < p.pixels ? (pixel * Traits::kChannels + rank * Traits::kOwned) / 8 + i % kPieces : kZeros;
  }

  // All of these before the wait: their divisions took a fifth of the kernel's time after it.
  __device__ __forceinline__ void prepare(LatencyPlaces<Traits>& places) const {
#pragma unroll
    for (int i = 0; i < Traits::kConvTiles; ++i) tap_addresses(places.taps[i], conv_tile(i));
#pragma unroll
    for (int i = 0; i < Traits::kXPieces; ++i) places.x[i] = x_offset(i * Traits::kThreads + thread);
    places.keep();
  }

  // ---- after the wait ----

  __device__ __forceinline__ void load_x(const LatencyPlaces<Traits>& places) const {
    const uint32_t to = smem + Layout::kX + thread / kPieces * Traits::kXPitch + thread % kPieces * 16;
#pragma unroll
    for (int i = 0; i < Traits::kXPieces; ++i) {
      const int offset = places.x[i];
      if (offset == kNothing) continue;
      const char* from = static_cast<const char*>(p.x) + int64_t{max(offset, 0)} * 16;
      ptx::cp_async16(to + i * (Traits::kThreads / kPieces) * Traits::kXPitch, from, offset != kZeros);
    }
    ptx::cp_async_commit();
  }

  // 16 pixels of 8 channels.
  __device__ __forceinline__ void convolve_sums(float (&s)[2][4], const uint32_t (&address)[5], const ConvWeights& w, float2 bias) const {
    uint32_t a[5][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) ldmatrix_x4(a[i], address[i]);
    ldmatrix_x2(*reinterpret_cast<uint32_t(*)[2]>(a[4]), address[4]);
    s[0][0] = s[0][2] = bias.x, s[0][1] = s[0][3] = bias.y;  // two chains
#pragma unroll
    for (int i = 0; i < 4; ++i) s[1][i] = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) mma_16816<Element>(s[i % 2], a[i], w.fragments[2 * i], w.fragments[2 * i + 1]);
    mma_1688<Element>(s[0], a[4], w.fragments[8]);
#pragma unroll
    for (int i = 0; i < 4; ++i) s[0][i] += s[1][i];
  }

  // The same, with their sums and sums of squares, into what is sent.
  __device__ __forceinline__ void convolve_tile(int tile, const uint32_t (&address)[5], const ConvWeights& w, float2 bias) const {
    float s[2][4];
    convolve_sums(s, address, w, bias);
    const int block = conv_block();
    stmatrix_x2(smem + Layout::kSent + sent_offset(block, tile * 16 + lane % 16),
                pack2<Element>(s[0][0], s[0][1]), pack2<Element>(s[0][2], s[0][3]));
    if (!p.has_norm) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float2 m = make_float2(s[0][2 * r] + s[0][2 * r + 1], s[0][2 * r] * s[0][2 * r] + s[0][2 * r + 1] * s[0][2 * r + 1]);
#pragma unroll
      for (int d = 1; d < 4; d *= 2) m.x += __shfl_xor_sync(~0u, m.x, d), m.y += __shfl_xor_sync(~0u, m.y, d);
      if (lane % 4 == 0) store_shared_float2(smem + Layout::kSentMoments + (block * Traits::kPixels + tile * 16 + 8 * r + lane / 4) * 8, m);
    }
  }

  // In A, own chunks begin at a multiple of two: the permutation of pixels goes by the chunk's number there.
  __device__ __forceinline__ int sent_offset(int block, int pixel) const {
    const int chunk = rank * Traits::kConvBlocks + block;
    return (block * Traits::kPixels + (pixel ^ ((chunk & 3) << 1))) * 16;
  }

  __device__ __forceinline__ void convolve(const LatencyPlaces<Traits>& places, const ConvWeights& w, float2 bias) const {
#pragma unroll
    for (int i = 0; i < Traits::kConvTiles; ++i) {
      if (conv_tile(i) < Traits::kPixels / 16) convolve_tile(conv_tile(i), places.taps[i], w, bias);
    }
  }

  // A <- norm(A): a lane has every 32nd pixel, a warp every eighth chunk.
  __device__ __forceinline__ void normalise() const {
#pragma unroll
    for (int pixel = lane; pixel < Traits::kPixels; pixel += 32) normalise_pixel(pixel);
  }

  __device__ __forceinline__ void normalise_pixel(int pixel) const {
    float2 sum = make_float2(0.f, 0.f);
#pragma unroll
    for (int r = 0; r < Traits::kCluster; ++r) {
      const float2 part = load_shared_float2(smem + Layout::kMoments + (r * Traits::kPixels + pixel) * 8);
      sum.x += part.x, sum.y += part.y;
    }
    const float mean = sum.x * (1.f / Traits::kChannels);
    const float scale = rsqrtf(fmaxf(sum.y * (1.f / Traits::kChannels) - mean * mean, 0.f) + p.eps), shift = -mean * scale;
    const bool affine = p.norm_weight != nullptr || p.norm_bias != nullptr;
#pragma unroll
    for (int i = 0; i < Traits::kChannels / 64; ++i) {
      const int chunk = warp + 8 * i;
      const uint32_t address = operand_address<Traits>(smem + Layout::kA, chunk, pixel);
      uint4 v = load_shared_128(address);
      uint32_t* pairs = reinterpret_cast<uint32_t*>(&v);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float2 f = unpack2<Element>(pairs[j]);
        f.x = fmaf(f.x, scale, shift), f.y = fmaf(f.y, scale, shift);
        if (affine) {
          const uint32_t at = smem + Layout::kNorm + (chunk * 8 + 2 * j) * 4;
          const float2 w = load_shared_float2(at), b = load_shared_float2(at + Traits::kChannels * 4);
          f.x = fmaf(f.x, w.x, b.x), f.y = fmaf(f.y, w.y, b.y);
        }
        pairs[j] = pack2<Element>(f.x, f.y);
      }
      store_shared_128(address, v);
    }
  }

  // Two pixels of one hidden unit.
  __device__ __forceinline__ uint32_t activate_pair(float s0, float s1, float bias) const {
    if constexpr (Traits::kDType == DType::kHalf) {
      return activate_half<Traits::kActivation>(s0, s1, pack2<__half>(bias, bias));
    } else {
      return pack2<Element>(activate_float<Traits::kActivation>(s0, bias), activate_float<Traits::kActivation>(s1, bias));
    }
  }
};

template <class Traits>
struct LatencyBlock : LatencyTile<Traits> {
  using Base = LatencyTile<Traits>;
  using Element = ElementOf<Traits>;
  using Layout = LatencyLayout<Traits>;
  using Base::kPixelTiles, Base::first, Base::lane, Base::p, Base::rank, Base::rows, Base::smem, Base::thread, Base::warp;
  using Base::activate_pair, Base::received, Base::reduced, Base::send;

  // Row tiles and part of the depth of this warp.
  __device__ int expand_row() const { return warp % (Traits::kWarps / Traits::kExpandSplit) * Traits::kExpandRows; }
  __device__ int expand_part() const { return warp / (Traits::kWarps / Traits::kExpandSplit); }
  __device__ int project_row() const { return warp % (Traits::kWarps / Traits::kProjectSplit) * Traits::kProjectRows; }
  __device__ int project_part() const { return warp / (Traits::kWarps / Traits::kProjectSplit); }

  __device__ __forceinline__ void load_expand_weights(uint4 (&w1)[Traits::kExpandRows][Traits::kExpandSteps][2]) const {
    const int row = rank * Traits::kSlice + expand_row() * 16 + lane / 4;
    const char* from = static_cast<const char*>(p.expand_weight) + row * Traits::kChannels * 2 +
                       (expand_part() * Traits::kExpandSteps * 4 + lane % 4) * 16;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int half = i % 2, step = i / 2 % Traits::kExpandSteps, j = i / 2 / Traits::kExpandSteps;
      w1[j][step][half] = load_global_128(from + (j * 16 + half * 8) * Traits::kChannels * 2 + step * 64);
    }
  }

  __device__ uint32_t project_piece(int i) const { return smem + Layout::kW2 + (i * Traits::kThreads + thread) * 16; }

  __device__ __forceinline__ void load_project_weights() const {
    const int row = project_row() * 16 + lane / 4;
    const char* from = static_cast<const char*>(p.project_weight) + row * Traits::kHidden * 2 +
                       (rank * (Traits::kSlice / 8) + project_part() * Traits::kProjectSteps * 4 + lane % 4) * 16;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int half = i % 2, step = i / 2 % Traits::kProjectSteps, j = i / 2 / Traits::kProjectSteps;
      ptx::cp_async16(project_piece(i), from + (j * 16 + half * 8) * Traits::kHidden * 2 + step * 64, true);
    }
    ptx::cp_async_commit();
  }

  // Own results into every block's A, own sums of each pixel beside them.
  __device__ __forceinline__ void send_results() const {
    constexpr int kPieces = Traits::kConvBlocks * Traits::kPixels;
    constexpr int kAtOnce = Traits::kThreads / kPieces;
    const int piece = thread % kPieces;
    const uint4 v = load_shared_128(smem + Layout::kSent + piece * 16);
    const uint32_t a = smem + Layout::kA + (rank * kPieces + piece) * 16;
#pragma unroll
    for (int i = 0; i < (Traits::kCluster + kAtOnce - 1) / kAtOnce; ++i) {
      const int to = thread / kPieces + i * kAtOnce;
      if (Traits::kCluster % kAtOnce == 0 || to < Traits::kCluster) send(a, v, received(), to);
    }
    float2 m = make_float2(0.f, 0.f);
    if (p.has_norm) {
#pragma unroll
      for (int block = 0; block < Traits::kConvBlocks; ++block) {
        const float2 part = load_shared_float2(smem + Layout::kSentMoments + (block * Traits::kPixels + lane) * 8);
        m.x += part.x, m.y += part.y;
      }
    }
    const uint32_t moments = smem + Layout::kMoments + (rank * Traits::kPixels + lane) * 8;
    for (int to = warp; to < Traits::kCluster; to += Traits::kWarps) {
      send(moments, m, received(), to);
    }
  }

  // P = act(S + bias) of 16 hidden units and the 16 pixels from pixel tile `tile` on.
  __device__ __forceinline__ void store_activated(const float (&s)[2][4], int row_tile, int tile, float low, float high) const {
    const int chunk = row_tile * 2 + lane / 8 % 2, pixel = (tile + lane / 16) * 8 + lane % 8;
    stmatrix_x4_transposed(operand_address<Traits>(smem + Layout::kP, chunk, pixel), activate_pair(s[0][0], s[0][1], low),
                           activate_pair(s[0][2], s[0][3], high), activate_pair(s[1][0], s[1][1], low),
                           activate_pair(s[1][2], s[1][3], high));
  }

  // Each of two warps gives the other half of its sums, over half of the depth, and adds what it gets to the rest.
  __device__ __forceinline__ void share_sums(float (&s)[kPixelTiles][4], float (&kept)[2][4]) const {
    static_assert(kPixelTiles == 4);
    const bool upper = expand_part() != 0;
    const uint32_t at = smem + Layout::kSums + lane * 16;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      uint4 give;
      give.x = __float_as_uint(upper ? s[k][0] : s[2 + k][0]), give.y = __float_as_uint(upper ? s[k][1] : s[2 + k][1]);
      give.z = __float_as_uint(upper ? s[k][2] : s[2 + k][2]), give.w = __float_as_uint(upper ? s[k][3] : s[2 + k][3]);
      store_shared_128(at + (warp * 2 + k) * 512, give);
    }
    asm volatile("bar.sync %0, 64;" ::"r"(1 + warp % 4) : "memory");
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint4 got = load_shared_128(at + ((warp ^ 4) * 2 + k) * 512);
      const float f[4] = {__uint_as_float(got.x), __uint_as_float(got.y), __uint_as_float(got.z), __uint_as_float(got.w)};
#pragma unroll
      for (int i = 0; i < 4; ++i) kept[k][i] = (upper ? s[2 + k][i] : s[k][i]) + f[i];
    }
  }

  __device__ __forceinline__ void expand(const uint4 (&w1)[Traits::kExpandRows][Traits::kExpandSteps][2],
                                         const float (&bias)[Traits::kExpandRows][2]) const {
    float s[Traits::kExpandRows][kPixelTiles][4] = {};
    multiply<Traits, Traits::kExpandRows, Traits::kExpandSteps>(s, smem + Layout::kA, expand_part() * Traits::kExpandSteps, lane,
                                                                [&](int j, int step, int half) { return w1[j][step][half]; });
    if constexpr (Traits::kExpandSplit == 2) {
      float kept[2][4];
      share_sums(s[0], kept);
      store_activated(kept, expand_row(), expand_part() * 2, bias[0][0], bias[0][1]);
    } else {
#pragma unroll
      for (int j = 0; j < Traits::kExpandRows; ++j) {
#pragma unroll
        for (int i = 0; i < kPixelTiles; i += 2) {
          store_activated(*reinterpret_cast<const float(*)[2][4]>(&s[j][i]), expand_row() + j, i, bias[j][0], bias[j][1]);
        }
      }
    }
  }

  // Partial sums over this block's hidden units, to the blocks that own the channels.
  __device__ __forceinline__ void project() const {
    float o[Traits::kProjectRows][kPixelTiles][4] = {};
    multiply<Traits, Traits::kProjectRows, Traits::kProjectSteps>(
        o, smem + Layout::kP, project_part() * Traits::kProjectSteps, lane,
        [&](int j, int step, int half) { return load_shared_128(project_piece((j * Traits::kProjectSteps + step) * 2 + half)); });
    const int source = rank * Traits::kProjectSplit + project_part();
#pragma unroll
    for (int j = 0; j < Traits::kProjectRows; ++j) {
      const int tile = project_row() + j, owner = tile / Traits::kOwnedTiles;
      const uint32_t to = smem + Layout::kReduce + (source * Traits::kOwnedTiles + tile % Traits::kOwnedTiles) * kPixelTiles * 512 + lane * 16;
#pragma unroll
      for (int i = 0; i < kPixelTiles; ++i) {
        const float* v = o[j][i];
        const uint4 part = make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
        send(to + i * 512, part, reduced(), owner);
      }
    }
  }

  // Of the pair of outputs `item` of this thread: own channel, first of the two pixels.
  __device__ int output_channel(int item) const { return item / (kPixelTiles * 64) * 16 + item % 2 * 8 + item / 8 % 8; }
  __device__ int output_pixel(int item) const { return item / 64 % kPixelTiles * 8 + item / 2 % 4 * 2; }

  // Bias and layer scale of this thread's outputs.
  __device__ __forceinline__ void load_output_vectors(float2 (&vectors)[Traits::kOutputs]) const {
#pragma unroll
    for (int i = 0; i < Traits::kOutputs; ++i) {
      const int channel = rank * Traits::kOwned + output_channel(i * Traits::kThreads + thread);
      vectors[i] = make_float2(optional(p.project_bias, channel, 0.f), optional(p.layer_scale, channel, 1.f));
    }
  }

  // y = x + (sum of all partial sums + bias) * scale. Threads of neighbouring channels swap a pixel, so that each stores a pair of channels.
  __device__ __forceinline__ void finish(const float2 (&vectors)[Traits::kOutputs]) const {
#pragma unroll
    for (int i = 0; i < Traits::kOutputs; ++i) {
      const int item = i * Traits::kThreads + thread;
      float2 v = make_float2(0.f, 0.f);
#pragma unroll
      for (int source = 0; source < Traits::kSources; ++source) {
        const float2 part = load_shared_float2(smem + Layout::kReduce + source * (Traits::kOwned * Traits::kPixels * 4) + item * 8);
        v.x += part.x, v.y += part.y;
      }
      v.x = (v.x + vectors[i].x) * vectors[i].y, v.y = (v.y + vectors[i].x) * vectors[i].y;
      const int channel = output_channel(item), odd = channel & 1, pixel = output_pixel(item) + odd;
      const float other = __shfl_xor_sync(~0u, odd ? v.x : v.y, 8);
      float2 pair = odd ? make_float2(other, v.y) : make_float2(v.x, other);
      if (first + pixel >= p.pixels) continue;
      if (p.sample_scale != nullptr) {
        const float scale = __uint_as_float(load_global_32(p.sample_scale + (first + pixel) / (p.height * p.width)));
        pair.x *= scale, pair.y *= scale;
      }
      const uint32_t center = smem + Layout::kX + (rows.step + pixel + 1) * Traits::kXPitch;
      const float2 x = unpack2<Element>(load_shared_32(center + (channel - odd) * 2));
      char* to = static_cast<char*>(p.y) + (int64_t{first + pixel} * Traits::kChannels + rank * Traits::kOwned + channel - odd) * 2;
      *reinterpret_cast<uint32_t*>(to) = pack2<Element>(x.x + pair.x, x.y + pair.y);
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2) latency_block_fwd_sm90(const __grid_constant__ LatencyParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(16) char latency_smem[];
  using Layout = LatencyLayout<Traits>;
  const int thread = threadIdx.x, warp = __shfl_sync(~0u, thread / 32, 0), lane = thread % 32;
  const int rank = static_cast<int>(blockIdx.x) % Traits::kCluster, tile = static_cast<int>(blockIdx.x) / Traits::kCluster;
  const LatencyBlock<Traits> block{{p, smem_address(latency_smem), rank, tile * Traits::kPixels, thread, warp, lane,
                                    latency_rows<Traits>(p.width)}};
  block.initialise_barriers(latency_smem + Layout::kBarriers);

  uint4 w1[Traits::kExpandRows][Traits::kExpandSteps][2];
  float expand_bias[Traits::kExpandRows][2];
  float2 output_vectors[Traits::kOutputs];
  ConvWeights conv_weights;
  const int conv_channel = rank * Traits::kOwned + block.conv_block() * 8;
  conv_weights.load<Traits>(p.conv_weight, conv_channel, lane);
  const float2 conv_bias = make_float2(optional(p.conv_bias, conv_channel + lane % 4 * 2, 0.f),
                                       optional(p.conv_bias, conv_channel + lane % 4 * 2 + 1, 0.f));
  block.load_expand_weights(w1);
  block.load_project_weights();
#pragma unroll
  for (int i = 0; i < 2 * Traits::kExpandRows; ++i) {
    const int unit = rank * Traits::kSlice + (block.expand_row() + i / 2) * 16 + i % 2 * 8 + lane / 4;
    expand_bias[i / 2][i % 2] = optional(p.expand_bias, unit, 0.f) * bias_scale<Traits::kActivation>();
  }
  block.load_output_vectors(output_vectors);
  block.fill_shared();
  LatencyPlaces<Traits> places;
  block.prepare(places);
  if (Traits::kCluster > 1) grid::cluster_barrier();  // every block of the cluster runs, its barriers exist

  wait_for_previous_launch();
  allow_next_launch();  // after the wait: the next launch may count on what came before this one
  block.load_x(places);
  ptx::cp_async_wait<0>();
  __syncthreads();
  block.convolve(places, conv_weights, conv_bias);
  __syncthreads();
  block.send_results();
  block.wait_for_all(block.received());
  if (p.has_norm) {
    block.normalise();
    __syncthreads();
  }
  block.expand(w1, expand_bias);
  __syncthreads();
  block.project();
  block.wait_for_all(block.reduced());
  block.finish(output_vectors);
#endif
}

}  // namespace convfirst::block_fusion::sm90
