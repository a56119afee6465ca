// A stage of conv-first blocks, forward, for few pixels on Hopper: one launch, the latency path's clusters going from block to block.
//
//   Every cluster keeps its tile of 32 pixels through all blocks; x stays in shared memory. Between blocks a tile needs only the pixels
//   around it, and each of the cluster's blocks only its own channels of them: they travel through L2 as 8-byte words of two channels and a
//   flag, so that no fence, no launch and no barrier of the grid stands between blocks.
//
//     tile t - 1            tile t                tile t + 1
//     own channels          own channels          own channels
//     +----------+  words   +----------+  words   +----------+
//     | block b  | <------> | block b  | <------> | block b  |    within a block: as in latency_block_fwd_sm90_mma.cuh
//     +----------+          +----------+          +----------+
//          |                     |                     |
//     +----------+          +----------+          +----------+
//     | b + 1    | <------> | b + 1    | <------> | b + 1    |    its weights were loaded when block b's had been used
//     +----------+          +----------+          +----------+
//
//   what                          where                                      written by            when
//   W1 slice of the next block    registers, operand layout                  its thread            after the first product
//   W2 slice of the next block    shared, each thread its own pieces         its thread            after the second product
//   x of own pixels               shared (kX), in place                      finish                every block
//   x of pixels around            shared (kX)                                receive               every block
//   words                         workspace [2][pixels][channels / 2]        finish                every block but the last
//   A, moments, P, sums           as in the latency path                     as there
//
// The norm is not applied to A: S = r (W1 a) - r m (sum of W1's row) + b, with a pixel's mean m and inverse deviation r. All clusters of the grid run
// at once (stage_refusal sees to it). Why two sets of words do: a tile writes block b + 2's when it has the words of block b + 1 of every tile
// around it, and each of those sent them after reading block b's.
#pragma once

#include "latency_block_fwd_sm90_mma.cuh"
#include "stage_sm90.h"

namespace convfirst::block_fusion::sm90 {

// 16 bytes as two words of data and flag; each word is whole.
__device__ __forceinline__ uint4 load_words(const void* address) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address) : "memory");
  return v;
}

__device__ __forceinline__ void store_word(void* address, uint32_t data, uint32_t flag) {
  asm volatile("st.relaxed.gpu.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(data), "r"(flag) : "memory");
}

// Of all threads, last: the last block of the grid leaves the next launch's epoch; every block has read this one's.
__device__ __forceinline__ void leave(char* workspace, uint32_t epoch) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  auto* header = reinterpret_cast<unsigned*>(workspace);
  if (atomicInc(header + 1, gridDim.x - 1) == gridDim.x - 1) header[0] = epoch;
}

// What the latency path's functions read of block `b`.
template <class Traits>
__device__ __forceinline__ LatencyParams block_params(const StageTensors& t, int b) {
  constexpr int kC = Traits::kChannels, kHidden = Traits::kHidden;
  LatencyParams q{};
  q.x = t.x, q.y = t.y, q.eps = t.eps, q.has_norm = t.has_norm, q.height = t.height, q.width = t.width, q.pixels = t.pixels;
  const auto at = [&](const auto* base, int64_t elements) { return base == nullptr ? nullptr : base + b * elements; };
  q.conv_weight = at(static_cast<const uint16_t*>(t.conv_weight), Traits::kTaps * kC * 8);
  q.conv_bias = at(t.conv_bias, kC);
  q.expand_weight = at(static_cast<const uint16_t*>(t.expand_weight), kHidden * kC);
  q.expand_bias = at(t.expand_bias, kHidden);
  q.project_weight = at(static_cast<const uint16_t*>(t.project_weight), kC * kHidden);
  q.project_bias = at(t.project_bias, kC);
  return q;
}

// What stages of every width share; Base is a LatencyTile or derives from one.
template <class Traits, class Base>
struct StageParts : Base {
  using Element = ElementOf<Traits>;
  using Layout = LatencyLayout<Traits>;
  using Base::first, Base::kAlone, Base::lane, Base::p, Base::rank, Base::smem, Base::thread;

  __device__ int conv_channel() const { return rank * Traits::kOwned + this->conv_block() * 8; }

  __device__ __forceinline__ void load_conv(ConvWeights& w, float2& bias) const {
    w.template load<Traits>(p.conv_weight, conv_channel(), lane);
    bias = make_float2(optional(p.conv_bias, conv_channel() + lane % 4 * 2, 0.f), optional(p.conv_bias, conv_channel() + lane % 4 * 2 + 1, 0.f));
  }

  // Leaves in `places` only what other tiles own.
  __device__ __forceinline__ void keep_halo(LatencyPlaces<Traits>& places) const {
#pragma unroll
    for (int i = 0; i < Traits::kXPieces; ++i) {
      const int pixel = places.x[i] / (Traits::kChannels / 8);
      if (places.x[i] < 0 || (pixel >= first && pixel < first + Traits::kPixels)) places.x[i] = Base::kNothing;
    }
  }

  // x around the tile, once all of its words carry the flag.
  __device__ __forceinline__ void receive(const LatencyPlaces<Traits>& places, const char* words, uint32_t flag) const {
    const uint32_t to = smem + Layout::kX + thread / Base::kPieces * Traits::kXPitch + thread % Base::kPieces * 16;
    uint4 v[Traits::kXPieces][2];
    bool missing;
    do {
      missing = false;
#pragma unroll
      for (int i = 0; i < Traits::kXPieces; ++i) {
        if (places.x[i] < 0) continue;
        const char* from = words + int64_t{places.x[i]} * 32;
        v[i][0] = load_words(from), v[i][1] = load_words(from + 16);
      }
#pragma unroll
      for (int i = 0; i < Traits::kXPieces; ++i) {
        if (places.x[i] < 0) continue;
        missing |= v[i][0].y != flag || v[i][0].w != flag || v[i][1].y != flag || v[i][1].w != flag;
      }
    } while (missing);
#pragma unroll
    for (int i = 0; i < Traits::kXPieces; ++i) {
      if (places.x[i] < 0) continue;
      store_shared_128(to + i * (Traits::kThreads / Base::kPieces) * Traits::kXPitch, make_uint4(v[i][0].x, v[i][0].z, v[i][1].x, v[i][1].z));
    }
  }

  __device__ __forceinline__ void wait_for_all(uint32_t barrier, uint32_t phase) const {
    if constexpr (kAlone) {
      __syncthreads();
    } else {
      grid::wait_for_peer(barrier, phase);
    }
  }

  // For the next block's bytes; before them or after, the phase ends with both.
  __device__ __forceinline__ void expect(uint32_t barrier, uint32_t bytes) const {
    if (!kAlone && thread == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    }
  }

  __device__ __forceinline__ uint32_t activate(float s0, float s1) const {
    if constexpr (Traits::kDType == DType::kHalf) {
      return activate_half<Traits::kActivation>(s0, s1, 0);
    } else {
      return pack2<Element>(activate_float<Traits::kActivation>(s0, 0.f), activate_float<Traits::kActivation>(s1, 0.f));
    }
  }
};

template <class Traits>
struct LatencyStage : StageParts<Traits, LatencyBlock<Traits>> {
  using Base = StageParts<Traits, LatencyBlock<Traits>>;
  using Element = ElementOf<Traits>;
  using Layout = LatencyLayout<Traits>;
  using Base::activate, Base::first, Base::kPixelTiles, Base::lane, Base::p, Base::rank, Base::rows, Base::smem, Base::thread;

  // Bias and row sum of this thread's hidden units.
  __device__ __forceinline__ void load_expand_vectors(float2 (&vectors)[Traits::kExpandRows][2], const float* sums) const {
#pragma unroll
    for (int i = 0; i < 2 * Traits::kExpandRows; ++i) {
      const int unit = rank * Traits::kSlice + (this->expand_row() + i / 2) * 16 + i % 2 * 8 + lane / 4;
      vectors[i / 2][i % 2] = make_float2(optional(p.expand_bias, unit, 0.f), __ldg(sums + unit));
    }
  }

  // {r, -r m} of pixel `lane`.
  __device__ __forceinline__ float2 moments() const {
    if (!p.has_norm) return make_float2(1.f, 0.f);
    float2 sum = make_float2(0.f, 0.f);
#pragma unroll
    for (int r = 0; r < Traits::kCluster; ++r) {
      const float2 part = load_shared_float2(smem + Layout::kMoments + (r * Traits::kPixels + lane) * 8);
      sum.x += part.x, sum.y += part.y;
    }
    const float mean = sum.x * (1.f / Traits::kChannels);
    const float scale = rsqrtf(fmaxf(sum.y * (1.f / Traits::kChannels) - mean * mean, 0.f) + p.eps);
    return make_float2(scale, -mean * scale);
  }

  // P of 16 hidden units and the 16 pixels from pixel tile `tile` on; `norm` is moments().
  __device__ __forceinline__ void store_normalised(const float (&s)[2][4], int row_tile, int tile, const float2 (&vectors)[2], float2 norm) const {
    uint32_t packed[4];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int pixel = (tile + k) * 8 + lane % 4 * 2;
      float scale[2], shift[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        scale[i] = __shfl_sync(~0u, norm.x, pixel + i), shift[i] = __shfl_sync(~0u, norm.y, pixel + i);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float v[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) v[i] = fmaf(s[k][2 * half + i], scale[i], fmaf(shift[i], vectors[half].y, vectors[half].x));
        packed[2 * k + half] = activate(v[0], v[1]);
      }
    }
    const int chunk = row_tile * 2 + lane / 8 % 2, pixel = (tile + lane / 16) * 8 + lane % 8;
    stmatrix_x4_transposed(operand_address<Traits>(smem + Layout::kP, chunk, pixel), packed[0], packed[1], packed[2], packed[3]);
  }

  __device__ __forceinline__ void expand(const uint4 (&w1)[Traits::kExpandRows][Traits::kExpandSteps][2],
                                         const float2 (&vectors)[Traits::kExpandRows][2]) const {
    static_assert(Traits::kPixels == 32, "a lane has the moments of a pixel");
    const float2 norm = moments();
    float s[Traits::kExpandRows][kPixelTiles][4] = {};
    multiply<Traits, Traits::kExpandRows, Traits::kExpandSteps>(s, smem + Layout::kA, this->expand_part() * Traits::kExpandSteps, lane,
                                                                [&](int j, int step, int half) { return w1[j][step][half]; });
    if constexpr (Traits::kExpandSplit == 2) {
      float kept[2][4];
      this->share_sums(s[0], kept);
      store_normalised(kept, this->expand_row(), this->expand_part() * 2, vectors[0], norm);
    } else {
#pragma unroll
      for (int j = 0; j < Traits::kExpandRows; ++j) {
#pragma unroll
        for (int i = 0; i < kPixelTiles; i += 2) {
          store_normalised(*reinterpret_cast<const float(*)[2][4]>(&s[j][i]), this->expand_row() + j, i, vectors[j], norm);
        }
      }
    }
  }

  __device__ __forceinline__ void load_project_bias(float (&bias)[Traits::kOutputs]) const {
#pragma unroll
    for (int i = 0; i < Traits::kOutputs; ++i) {
      bias[i] = optional(p.project_bias, rank * Traits::kOwned + this->output_channel(i * Traits::kThreads + thread), 0.f);
    }
  }

  // x + sum of all partial sums + bias: the next block's x, here and as words for the tiles around; or y.
  __device__ __forceinline__ void finish(const float (&bias)[Traits::kOutputs], bool last, char* words, uint32_t flag) const {
#pragma unroll
    for (int i = 0; i < Traits::kOutputs; ++i) {
      const int item = i * Traits::kThreads + thread;
      float2 v = make_float2(bias[i], bias[i]);
#pragma unroll
      for (int source = 0; source < Traits::kSources; ++source) {
        const float2 part = load_shared_float2(smem + Layout::kReduce + source * (Traits::kOwned * Traits::kPixels * 4) + item * 8);
        v.x += part.x, v.y += part.y;
      }
      const int channel = this->output_channel(item), odd = channel & 1, pixel = this->output_pixel(item) + odd;
      const float other = __shfl_xor_sync(~0u, odd ? v.x : v.y, 8);
      const float2 pair = odd ? make_float2(other, v.y) : make_float2(v.x, other);
      if (first + pixel >= p.pixels) continue;
      const uint32_t center = smem + Layout::kX + (rows.step + pixel + 1) * Traits::kXPitch + (channel - odd) * 2;
      const float2 x = unpack2<Element>(load_shared_32(center));
      const uint32_t bits = pack2<Element>(x.x + pair.x, x.y + pair.y);
      const int64_t at = int64_t{first + pixel} * Traits::kChannels + rank * Traits::kOwned + channel - odd;
      if (last) {
        *reinterpret_cast<uint32_t*>(static_cast<char*>(p.y) + at * 2) = bits;
      } else {
        store_word(words + at * 4, bits, flag);
        store_shared_32(center, bits);
      }
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) latency_stage_fwd_sm90(const __grid_constant__ StageTensors t) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(16) char latency_smem[];
  using Layout = LatencyLayout<Traits>;
  using Stage = LatencyStage<Traits>;
  const int thread = threadIdx.x, warp = __shfl_sync(~0u, thread / 32, 0), lane = thread % 32;
  const int rank = static_cast<int>(blockIdx.x) % Traits::kCluster, tile = static_cast<int>(blockIdx.x) / Traits::kCluster;
  const auto with_block = [&](int b, auto&& body) {
    const LatencyParams p = block_params<Traits>(t, b);
    return body(Stage{{{{p, smem_address(latency_smem), rank, tile * Traits::kPixels, thread, warp, lane, latency_rows<Traits>(p.width)}}}});
  };
  uint4 w1[Traits::kExpandRows][Traits::kExpandSteps][2];
  float2 expand_vectors[Traits::kExpandRows][2];
  float project_bias[Traits::kOutputs];
  ConvWeights conv_weights;
  float2 conv_bias;
  LatencyPlaces<Traits> places;
  with_block(0, [&](const Stage& block) {
    block.initialise_barriers(latency_smem + Layout::kBarriers);
    block.load_conv(conv_weights, conv_bias);
    block.load_expand_weights(w1);
    block.load_project_weights();
    block.load_expand_vectors(expand_vectors, t.expand_sums);
    block.load_project_bias(project_bias);
    block.fill_shared();
    block.prepare(places);
    if (Traits::kCluster > 1) grid::cluster_barrier();  // every block of the cluster runs, its barriers exist
  });

  wait_for_previous_launch();
  allow_next_launch();  // after the wait: the next launch may count on what came before this one
  char* const workspace = static_cast<char*>(t.workspace);
  const uint32_t epoch = load_global_32(workspace);
  with_block(0, [&](const Stage& block) {
    block.load_x(places);
    block.keep_halo(places);
  });
  const int64_t words_bytes = int64_t{t.pixels} * Traits::kChannels * 4;
  char* const words = workspace + StageWorkspace::kHeader;
#pragma unroll 1
  for (int b = 0; b < t.blocks; ++b) {
    const bool last = b + 1 == t.blocks;
    const int next = last ? b : b + 1;
    const uint32_t phase = b & 1;
    with_block(next, [&](const Stage& block) {  // its weights are the next block's
      if (b > 0) block.receive(places, words + (b & 1) * words_bytes, epoch + b);
      if (b == 0) ptx::cp_async_wait<0>();
      __syncthreads();
      block.convolve(places, conv_weights, conv_bias);
      block.load_conv(conv_weights, conv_bias);
      __syncthreads();
      block.send_results();
      block.wait_for_all(block.received(), phase);
      if (!last) block.expect(block.received(), Traits::kExchangeBytes);
      block.expand(w1, expand_vectors);
      block.load_expand_weights(w1);
      block.load_expand_vectors(expand_vectors, t.expand_sums + int64_t{next} * Traits::kHidden);
      ptx::cp_async_wait<0>();  // own pieces of W2
      __syncthreads();
      block.project();
      block.load_project_weights();
      block.wait_for_all(block.reduced(), phase);
      if (!last) block.expect(block.reduced(), Traits::kReduceBytes);
      block.finish(project_bias, last, words + (next & 1) * words_bytes, epoch + next);
      block.load_project_bias(project_bias);
    });
  }
  ptx::cp_async_wait<0>();
  leave(workspace, epoch + t.blocks);
#endif
}

}  // namespace convfirst::block_fusion::sm90
