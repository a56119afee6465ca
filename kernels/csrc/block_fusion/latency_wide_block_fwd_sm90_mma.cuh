// The conv-first block of 512 channels, forward, for few pixels on Hopper: two launches, made for latency.
//
//   A tile of 64 pixels belongs to 16 clusters of 8 blocks, which share out the hidden units; weights are the left operands, straight from L2
//   to registers before the launch waits for the one before it.
//
//     x of own channels        convolution results        S [16 x 64] of      P [64 x 128] of        O [64 channels x 64],
//     +----------------+       of all channels            own hidden units    the cluster's units    over the cluster's units
//     | 64 pixels with |  -->  A [64 x 512]          -->  = W1c A^T      -->  act(S) of 8 blocks --> = W2c P^T  -->  partial sums
//     | neighbours     |  (1)  LayerNorm in place                        (2)                                         in device memory
//     +----------------+
//   (1): each block's results to every block of its cluster, one copy of 8 KB each by the asynchronous proxy; moments by st.async
//   (2): 16-byte pieces by st.async. A barrier of the receiver counts both.
//   Second launch: y = x + scale (sum of the 16 clusters' partial sums, in order, + bias).
//
//   what                              where                                             written by                    when
//   W1, W2 of own units and channels  registers, operand layout                         its thread                    before the wait
//   convolution's weights             registers, operand layout                         its thread                    before the wait
//   x, own channels                   shared (kX), kXPitch bytes a pixel                all (cp.async)                after the wait
//   own convolution results, moments  shared (kSent, kSentMoments)                      convolving warps
//   A, moments of each block          shared, operand_address                           all blocks (1); then the norm
//   sums of S over a quarter of depth shared (kSums, over x): [quarter][8 pixels][lane]  all warps
//   P                                 shared, operand_address (over the sent moments)   all blocks (2)
#pragma once

#include "latency_block_fwd_sm90_mma.cuh"
#include "latency_wide_sm90.h"

namespace convfirst::block_fusion::sm90 {

// Own shared memory to a block of the cluster; the bytes count at its barrier. Both are peer addresses.
__device__ __forceinline__ void copy_to_peer(uint32_t there, uint32_t from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(there), "r"(from),
               "r"(bytes), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void stmatrix_x2_transposed(uint32_t address, uint32_t r0, uint32_t r1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(r0), "r"(r1) : "memory");
}

template <class Traits>
struct LatencyWideBlock : LatencyTile<Traits> {
  using Base = LatencyTile<Traits>;
  using Element = ElementOf<Traits>;
  using Layout = LatencyLayout<Traits>;
  using Base::first, Base::lane, Base::p, Base::rank, Base::smem, Base::thread, Base::warp;
  int group;        // of hidden units: which cluster of the tile this is
  float* partials;  // [group][pixel][channel]

  __device__ LatencyWideBlock(const Base& base, int group, float* partials) : Base(base), group(group), partials(partials) {}

  // Own units and quarter of the depth; own channels and the cluster's units. Which half of the pixels a warp has, and what beside it:
  __device__ int half() const { return warp / 4; }
  __device__ int part() const { return warp % 4; }

  __device__ __forceinline__ void load_weights(uint4 (&w1)[Traits::kExpandSteps][2], uint4 (&w2)[Traits::kProjectSteps][2]) const {
    const int unit = group * Traits::kSlice + rank * Traits::kUnits + lane / 4, channel = rank * Traits::kOwned + part() * 16 + lane / 4;
    const char* from1 = static_cast<const char*>(p.expand_weight) + unit * Traits::kChannels * 2 + (part() * Traits::kExpandSteps * 4 + lane % 4) * 16;
    const char* from2 = static_cast<const char*>(p.project_weight) + channel * Traits::kHidden * 2 + (group * (Traits::kSlice / 8) + lane % 4) * 16;
#pragma unroll
    for (int i = 0; i < 2 * Traits::kExpandSteps; ++i) w1[i / 2][i % 2] = load_global_128(from1 + i % 2 * 8 * Traits::kChannels * 2 + i / 2 * 64);
#pragma unroll
    for (int i = 0; i < 2 * Traits::kProjectSteps; ++i) w2[i / 2][i % 2] = load_global_128(from2 + i % 2 * 8 * Traits::kHidden * 2 + i / 2 * 64);
  }

  // Own results into every block's A, own sums of each pixel beside them.
  __device__ __forceinline__ void send_results() const {
    if (thread < Traits::kCluster) {
      copy_to_peer(grid::peer_address(smem + Layout::kA + rank * Traits::kSentBytes, thread), smem + Layout::kSent, Traits::kSentBytes,
                   grid::peer_address(this->received(), thread));
    }
    const int pixel = thread % Traits::kPixels;
    float2 m = make_float2(0.f, 0.f);
    if (p.has_norm) {
#pragma unroll
      for (int block = 0; block < Traits::kConvBlocks; ++block) {
        const float2 more = load_shared_float2(smem + Layout::kSentMoments + (block * Traits::kPixels + pixel) * 8);
        m.x += more.x, m.y += more.y;
      }
    }
    const uint32_t moments = smem + Layout::kMoments + (rank * Traits::kPixels + pixel) * 8;
    for (int to = thread / Traits::kPixels; to < Traits::kCluster; to += Traits::kThreads / Traits::kPixels) {
      this->send(moments, m, this->received(), to);
    }
  }

  // P = act(W1c A^T + bias), own units of it to every block of the cluster.
  __device__ __forceinline__ void expand(const uint4 (&w1)[Traits::kExpandSteps][2], float low, float high) const {
    float s[1][Traits::kPixelTiles][4] = {};
    multiply<Traits, 1, Traits::kExpandSteps>(s, smem + Layout::kA + half() * 512, part() * Traits::kExpandSteps, lane,
                                              [&](int, int step, int row) { return w1[step][row]; });
#pragma unroll
    for (int i = 0; i < Traits::kPixelTiles; ++i) {
      const float* v = s[0][i];
      store_shared_128(sums(part(), half() * Traits::kPixelTiles + i),
                       make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])));
    }
    __syncthreads();
    float t[4] = {};
#pragma unroll
    for (int i = 0; i < Traits::kExpandParts; ++i) {
      const uint4 v = load_shared_128(sums(i, warp));
      t[0] += __uint_as_float(v.x), t[1] += __uint_as_float(v.y), t[2] += __uint_as_float(v.z), t[3] += __uint_as_float(v.w);
    }
    send_activated(t, low, high);
  }

  // A lane's sums of 8 pixels.
  __device__ uint32_t sums(int quarter, int tile) const { return smem + Layout::kSums + ((quarter * Traits::kWarps + tile) * 32 + lane) * 16; }

  // This warp's 8 pixels of the 16 units, turned round in its own place among the sums: a lane sends 16 bytes to half of the blocks.
  __device__ __forceinline__ void send_activated(const float (&t)[4], float low, float high) const {
    const uint32_t place = smem + Layout::kSums + warp * 512;
    __syncwarp();
    stmatrix_x2_transposed(place + lane % 16 * 16, this->activate_pair(t[0], t[1], low), this->activate_pair(t[2], t[3], high));
    __syncwarp();
    const uint4 v = load_shared_128(place + lane % 16 * 16);
    const int chunk = rank * (Traits::kUnits / 8) + lane / 8 % 2, pixel = warp * 8 + lane % 8;
    const uint32_t to = operand_address<Traits>(smem + Layout::kP, chunk, pixel);
#pragma unroll
    for (int i = 0; i < Traits::kCluster / 2; ++i) this->send(to, v, this->reduced(), lane / 16 * (Traits::kCluster / 2) + i);
  }

  // Partial sums of own channels to device memory.
  __device__ __forceinline__ void project(const uint4 (&w2)[Traits::kProjectSteps][2]) const {
    float o[1][Traits::kPixelTiles][4] = {};
    multiply<Traits, 1, Traits::kProjectSteps>(o, smem + Layout::kP + half() * 512, 0, lane,
                                               [&](int, int step, int row) { return w2[step][row]; });
    const int channel = rank * Traits::kOwned + part() * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < 4 * Traits::kPixelTiles; ++i) {
      const int pixel = first + half() * 32 + i / 4 * 8 + lane % 4 * 2 + i % 2;
      if (pixel < p.pixels) {
        partials[(int64_t{group} * p.pixels + pixel) * Traits::kChannels + channel + i % 4 / 2 * 8] = o[0][i / 4][i % 4];
      }
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2) latency_wide_block_fwd_sm90(const __grid_constant__ LatencyParams p, float* partials) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(128) char latency_wide_smem[];
  using Layout = LatencyLayout<Traits>;
  const int thread = threadIdx.x, warp = __shfl_sync(~0u, thread / 32, 0), lane = thread % 32;
  const int rank = static_cast<int>(blockIdx.x) % Traits::kCluster, cluster = static_cast<int>(blockIdx.x) / Traits::kCluster;
  const LatencyWideBlock<Traits> block({p, smem_address(latency_wide_smem), rank, cluster / Traits::kGroups * Traits::kPixels, thread, warp,
                                        lane, latency_rows<Traits>(p.width)},
                                       cluster % Traits::kGroups, partials);
  if (thread == 0) {
    auto* barrier = reinterpret_cast<TransactionBarrier*>(latency_wide_smem + Layout::kBarriers);
    barrier[0].init(1);
    barrier[1].init(1);
    grid::fence_barrier_init();
    barrier[0].arrive_and_expect_tx(Traits::kExchangeBytes);
    barrier[1].arrive_and_expect_tx(Traits::kHiddenBytes);
  }
  uint4 w1[Traits::kExpandSteps][2], w2[Traits::kProjectSteps][2];
  ConvWeights conv_weights;
  const int conv_channel = rank * Traits::kOwned + block.conv_block() * 8;
  conv_weights.load<Traits>(p.conv_weight, conv_channel, lane);
  const float2 conv_bias = make_float2(optional(p.conv_bias, conv_channel + lane % 4 * 2, 0.f),
                                       optional(p.conv_bias, conv_channel + lane % 4 * 2 + 1, 0.f));
  block.load_weights(w1, w2);
  const int unit = block.group * Traits::kSlice + rank * Traits::kUnits + lane / 4;
  const float low = optional(p.expand_bias, unit, 0.f) * bias_scale<Traits::kActivation>();
  const float high = optional(p.expand_bias, unit + 8, 0.f) * bias_scale<Traits::kActivation>();
  block.fill_shared();
  LatencyPlaces<Traits> places;
  block.prepare(places);
  grid::cluster_barrier();  // every block of the cluster runs, its barriers exist

  wait_for_previous_launch();
  allow_next_launch();  // after the wait: the next launch may count on what came before this one
  block.load_x(places);
  ptx::cp_async_wait<0>();
  __syncthreads();
  block.convolve(places, conv_weights, conv_bias);
  asm volatile("fence.proxy.async;" ::: "memory");  // the copies read what these threads wrote
  __syncthreads();
  block.send_results();
  block.wait_for_all(block.received());
  if (p.has_norm) block.normalise();
  __syncthreads();
  block.expand(w1, low, high);
  block.wait_for_all(block.reduced());
  block.project(w2);
#endif
}

// y of a pixel: four channels a thread.
template <class Traits>
__global__ void __launch_bounds__(Traits::kChannels / 4) latency_wide_finish_sm90(const __grid_constant__ LatencyParams p, const float* partials) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Element = ElementOf<Traits>;
  const int channel = static_cast<int>(threadIdx.x) * 4, pixel = static_cast<int>(blockIdx.x);
  float bias[4], scale[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) bias[i] = optional(p.project_bias, channel + i, 0.f), scale[i] = optional(p.layer_scale, channel + i, 1.f);
  allow_next_launch();  // the next block's weights load under the first launch, which has waited for what came before it
  wait_for_previous_launch();
  uint4 part[Traits::kGroups];
#pragma unroll
  for (int g = 0; g < Traits::kGroups; ++g) {
    part[g] = load_global_128(partials + (int64_t{g} * p.pixels + pixel) * Traits::kChannels + channel);
  }
  const int64_t at = (int64_t{pixel} * Traits::kChannels + channel) * 2;
  const uint32_t x[2] = {load_global_32(static_cast<const char*>(p.x) + at), load_global_32(static_cast<const char*>(p.x) + at + 4)};
  const float sample = p.sample_scale == nullptr ? 1.f : __uint_as_float(load_global_32(p.sample_scale + pixel / (p.height * p.width)));
  float v[4] = {};
#pragma unroll
  for (int g = 0; g < Traits::kGroups; ++g) {
    v[0] += __uint_as_float(part[g].x), v[1] += __uint_as_float(part[g].y);
    v[2] += __uint_as_float(part[g].z), v[3] += __uint_as_float(part[g].w);
  }
  uint2 y;
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = (v[i] + bias[i]) * scale[i] * sample;
  const float2 low = unpack2<Element>(x[0]), high = unpack2<Element>(x[1]);
  y.x = pack2<Element>(low.x + v[0], low.y + v[1]), y.y = pack2<Element>(high.x + v[2], high.y + v[3]);
  *reinterpret_cast<uint2*>(static_cast<char*>(p.y) + at) = y;
#endif
}

}  // namespace convfirst::block_fusion::sm90
