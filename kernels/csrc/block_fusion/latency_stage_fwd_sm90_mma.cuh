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
//   downsampling's weights, x     registers, operand layout                  its thread            before and after the wait
//   products of each tap          shared (kDownSums), moments in kP          two warps a tap       before the first block
//   W1 slice of the next block    registers, operand layout                  its thread            while sums travel
//   W2 slice of the next block    shared, one of two (StageWeightBoxes)      TMA                   before the first product
//   x of own pixels               shared (kX), in place                      finish                every block
//   x of pixels around            shared (kX)                                receive               every block
//   words                         workspace [2][pixels][channels / 2]        finish                every block but the last
//   partial sums of O, 16 bits    shared (kReduce)                           all blocks            before finish
//   A, moments, P, halves of S    as in the latency path                     as there
//
// A stage may begin with its downsampling: a block computes its own channels of its tile from the pixels of the stage before, and sends them as words.
// The norm is not applied to A: S = r (W1 a) - r m (sum of W1's row) + b, with a pixel's mean m and inverse deviation r. All clusters of the grid run
// at once (stage_refusal sees to it). Why two sets of words do: a tile writes block b + 2's when it has the words of block b + 1 of every tile
// around it, and each of those sent them after reading block b's. Nothing is loaded between a product and an exchange: what a thread issues there, and
// what then comes in ahead of the exchange, an exchange waits for.
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

// Of all threads, last: the last block of the grid leaves the next launch's epoch and parity; every block has read this one's.
__device__ __forceinline__ void leave(char* workspace, uint32_t epoch) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  auto* header = reinterpret_cast<unsigned*>(workspace);
  if (atomicInc(header + 1, gridDim.x - 1) == gridDim.x - 1) header[0] = epoch, header[2] ^= 1;
}

// What the latency path's functions read that does not change from block to block.
__device__ __forceinline__ LatencyParams tile_params(const StageTensors& t) {
  LatencyParams p{};
  p.x = t.x, p.y = t.y, p.eps = t.eps, p.has_norm = t.has_norm, p.height = t.height, p.width = t.width, p.pixels = t.pixels;
  return p;
}

// Where a thread finds its share of a block's weights: it goes from block to block by adding, not by computing addresses anew.
template <class Traits>
struct StageWeights {
  const char *conv, *expand;
  const float* conv_bias;
  const float2 *expand_vectors, *project_vectors;

  __device__ __forceinline__ void advance() {
    constexpr int kC = Traits::kChannels, kHidden = Traits::kHidden;
    conv += Traits::kTaps * kC * 16, expand += kHidden * kC * 2;
    conv_bias += kC, project_vectors += kC, expand_vectors += kHidden;
  }
};

// What a thread holds of a stage from block to block.
template <class Traits>
struct StageHeld {
  StageWeights<Traits> from;
  uint4 w1[Traits::kExpandRows][Traits::kExpandSteps][2];
  float2 expand_vectors[Traits::kExpandRows][2];
  float2 project_vectors[Traits::kOutputs];
  ConvWeights conv_weights;
  float2 conv_bias;
  LatencyPlaces<Traits> places;
};

// Where a launch finds the words of pixels.
struct StageWords {
  char* workspace;
  char* pixels;   // two sets, a block's x in one, the next block's in the other
  int64_t bytes;  // of a set
  uint32_t epoch;
  __device__ __forceinline__ char* of_block(int b) const { return pixels + (b & 1) * bytes; }
  __device__ __forceinline__ uint32_t flag(int b) const { return epoch + b + 1; }
};

__device__ __forceinline__ float2 load_float2(const void* address) { return __ldg(static_cast<const float2*>(address)); }

// The downsampling that begins a stage: two warps a tap, each half of the own channels or of the depth. Operands come straight from L2.
template <class Traits>
struct StageDown {
  static constexpr int kFrom = Traits::kChannels / 2;
  static constexpr int kRows = Traits::kOwned > 16 ? Traits::kOwned / 16 : 1;  // tiles of 16 channels
  static constexpr int kSplit = kRows > 1 ? 1 : 2;                             // parts of a tap's depth
  static constexpr int kSteps = kFrom / 32 / kSplit;                           // of depth 32
  uint4 weights[kSteps][2];
  float vectors[Traits::kOutputs][5];  // of the channels that a thread finishes: bias, sums of the taps' weights
  int pixels[Traits::kPixelTiles];     // elements from x to the pixels' tap
};

// What stages of every width share; Base is a LatencyTile or derives from one.
template <class Traits, class Base>
struct StageParts : Base {
  using Element = ElementOf<Traits>;
  using Layout = LatencyLayout<Traits>;
  using Weights = StageWeights<Traits>;
  using Base::first, Base::kAlone, Base::lane, Base::p, Base::rank, Base::rows, Base::smem, Base::thread;
  int end;  // the pixel after the tile's last

  __device__ __forceinline__ void locate_conv(Weights& from, const StageTensors& t) const {
    const int channel = rank * Traits::kOwned + this->conv_block() * 8;
    from.conv = static_cast<const char*>(t.conv_weight) + (channel + lane / 4) * 16 + lane % 4 * 4;
    from.conv_bias = t.conv_bias + channel + lane % 4 * 2;
  }

  __device__ __forceinline__ void load_conv(ConvWeights& w, float2& bias, const Weights& from) const {
#pragma unroll
    for (int tap = 0; tap < Traits::kTaps; ++tap) w.fragments[tap] = load_global_32(from.conv + tap * Traits::kChannels * 16);
    bias = load_float2(from.conv_bias);
  }

  // ---- W2 ----

  using Boxes = StageWeightBoxes<Traits>;
  __device__ uint32_t weight_barrier(int b) const { return smem + Layout::kWeightBarriers + (b & 1) * 8; }

  __device__ void initialise_weight_barriers() const {
    if (thread == 0) {
      for (int i = 0; i < 2; ++i) transaction_barrier(weight_barrier(i))->init(1);
      grid::fence_barrier_init();
    }
  }

  // Of one thread: the slice from `unit` and `row` on, of block b, to where that of block b - 2 was read by all.
  __device__ __forceinline__ void fetch_project(const CUtensorMap& map, int b, int unit, int row) const {
    TransactionBarrier* const barrier = transaction_barrier(weight_barrier(b));
    barrier->arrive_and_expect_tx(Layout::kW2Bytes);
#pragma unroll
    for (int i = 0; i < Boxes::kCount; ++i) {
      void* to = __cvta_shared_to_generic(smem + Layout::kW2 + (b & 1) * Layout::kW2Bytes + i * Boxes::kBytes);
      tma_load_2d(&map, barrier, to, unit + i * Boxes::kDepth, b * Traits::kChannels + row);
    }
  }

  __device__ __forceinline__ void wait_for_project(int b) const { wait_barrier(weight_barrier(b), b >> 1 & 1); }

  // 16 bytes of lane's row, the first of its tile of 16 rows or the eighth after it, in box `i`.
  __device__ __forceinline__ uint4 load_project(int b, int i, int row_tile, int half) const {
    const uint32_t from = smem + Layout::kW2 + (lane / 4) * 64 + ((lane % 4) ^ (lane / 8)) * 16;
    return load_shared_128(from + (b & 1) * Layout::kW2Bytes + i * Boxes::kBytes + (row_tile * 16 + half * 8) * 64);
  }

  // ---- downsampling ----

  using Down = StageDown<Traits>;
  __device__ int down_tap() const { return this->warp / 2; }
  __device__ int down_row() const { return Down::kRows > 1 ? this->warp % 2 : 0; }
  __device__ int down_part() const { return Down::kRows > 1 ? 0 : this->warp % 2; }
  // Shared memory that is used later: of others by none before they have this block's first results.
  __device__ uint32_t down_sums() const { return smem + Layout::kDownSums; }
  __device__ uint32_t down_moments() const { return smem + Layout::kP; }

  // Before the wait: weights, and where the pixels are.
  __device__ __forceinline__ void prepare_down(Down& down, const StageTensors& t) const {
    const int row = rank * Traits::kOwned + down_row() * 16 + lane / 4;
    const char* from = static_cast<const char*>(t.down_weight) + ((row * 4 + down_tap()) * Down::kFrom + down_part() * Down::kSteps * 32) * 2 +
                       lane % 4 * 16;
#pragma unroll
    for (int step = 0; step < Down::kSteps; ++step) {
      down.weights[step][0] = load_global_128(from + step * 64);
      down.weights[step][1] = Traits::kOwned >= 16 ? load_global_128(from + step * 64 + 8 * 4 * Down::kFrom * 2) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < Traits::kPixelTiles; ++i) {
      const int number = first + 8 * i + lane / 4, pixel = number < p.pixels ? number : 0, line = pixel / p.width, image = line / p.height;
      const int y = 2 * (line - image * p.height) + down_tap() / 2, x = 2 * (pixel - line * p.width) + down_tap() % 2;
      down.pixels[i] = ((image * t.down_height + y) * t.down_width + x) * Down::kFrom + (down_part() * Down::kSteps * 4 + lane % 4) * 8;
    }
  }

  __device__ __forceinline__ void load_down_vectors(float (&vectors)[5], int channel, const StageTensors& t) const {
#pragma unroll
    for (int i = 0; i < 5; ++i) vectors[i] = __ldg(t.down_vectors + (rank * Traits::kOwned + channel) * 5 + i);
  }

  // Each warp's products of its tap and the tap's moments, into shared memory; the norm is applied to the products.
  __device__ __forceinline__ void multiply_down(const Down& down) const {
    uint4 b[Traits::kPixelTiles][Down::kSteps];
#pragma unroll
    for (int i = 0; i < Traits::kPixelTiles; ++i) {
#pragma unroll
      for (int step = 0; step < Down::kSteps; ++step) {
        b[i][step] = load_global_128(static_cast<const char*>(p.x) + int64_t{down.pixels[i]} * 2 + step * 64);
      }
    }
#pragma unroll
    for (int i = 0; i < Traits::kPixelTiles; ++i) {
      float s[4] = {};
      float2 m = make_float2(0.f, 0.f);
#pragma unroll
      for (int step = 0; step < Down::kSteps; ++step) {
        const uint4 low = down.weights[step][0], high = down.weights[step][1], v = b[i][step];
        const uint32_t a[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
        mma_16816<Element>(s, a[0], v.x, v.y);
        mma_16816<Element>(s, a[1], v.z, v.w);
        const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 f = unpack2<Element>(pairs[j]);
          m.x += f.x + f.y, m.y = fmaf(f.x, f.x, fmaf(f.y, f.y, m.y));
        }
      }
#pragma unroll
      for (int d = 1; d < 4; d *= 2) m.x += __shfl_xor_sync(~0u, m.x, d), m.y += __shfl_xor_sync(~0u, m.y, d);
      store_shared_128(down_sums() + (this->warp * Traits::kPixelTiles + i) * 512 + lane * 16,
                       make_uint4(__float_as_uint(s[0]), __float_as_uint(s[1]), __float_as_uint(s[2]), __float_as_uint(s[3])));
      if (lane % 4 == 0) store_shared_float2(down_moments() + (this->warp * Traits::kPixels + 8 * i + lane / 4) * 8, m);
    }
  }

  // {r, -r m} of a tap of a pixel.
  __device__ __forceinline__ float2 down_norm(int tap, int pixel, const StageTensors& t) const {
    if (!t.down_norm) return make_float2(1.f, 0.f);
    float2 sum = load_shared_float2(down_moments() + (tap * 2 * Traits::kPixels + pixel) * 8);
    if (Down::kSplit > 1) {
      const float2 part = load_shared_float2(down_moments() + ((tap * 2 + 1) * Traits::kPixels + pixel) * 8);
      sum.x += part.x, sum.y += part.y;
    }
    const float mean = sum.x * (1.f / Down::kFrom);
    const float scale = rsqrtf(fmaxf(sum.y * (1.f / Down::kFrom) - mean * mean, 0.f) + t.down_eps);
    return make_float2(scale, -mean * scale);
  }

  // One result: own channel, pixel; `word` is its sum's place among the 512 bytes of a pixel tile.
  __device__ __forceinline__ float down_result(int channel, int pixel, int word, const float (&vectors)[5], const StageTensors& t) const {
    float v = vectors[0];
#pragma unroll
    for (int tap = 0; tap < 4; ++tap) {
      const float2 norm = down_norm(tap, pixel, t);
      float sum = 0.f;
#pragma unroll
      for (int part = 0; part < Down::kSplit; ++part) {
        const int from = tap * 2 + (Down::kRows > 1 ? channel / 16 : part);
        sum += __uint_as_float(load_shared_32(down_sums() + (from * Traits::kPixelTiles + pixel / 8) * 512 + word * 4));
      }
      v = fmaf(norm.x, sum, fmaf(norm.y, vectors[1 + tap], v));
    }
    return v;
  }

  // Zeros for neighbours outside all images, which load_x would have written.
  __device__ __forceinline__ void clear_halo(const LatencyPlaces<Traits>& places) const {
    const uint32_t to = smem + Layout::kX + thread / Base::kPieces * Traits::kXPitch + thread % Base::kPieces * 16;
#pragma unroll
    for (int i = 0; i < Traits::kXPieces; ++i) {
      if (places.x[i] != Base::kZeros) continue;
      store_shared_128(to + i * (Traits::kThreads / Base::kPieces) * Traits::kXPitch, make_uint4(0, 0, 0, 0));
    }
  }

  // The results of two neighbouring channels of a pixel become x.
  __device__ __forceinline__ void begin_pair(int channel, int pixel, float2 v, char* words, uint32_t flag) const {
    if (first + pixel >= end) return;
    const uint32_t bits = pack2<Element>(v.x, v.y);
    store_word(words + (int64_t{first + pixel} * Traits::kChannels + rank * Traits::kOwned + channel) * 4, bits, flag);
    store_shared_32(smem + Layout::kX + (rows.step + pixel + 1) * Traits::kXPitch + channel * 2, bits);
  }

  // ---- between blocks ----

  // Leaves in `places` only what other tiles own and this one reads.
  __device__ __forceinline__ void keep_halo(LatencyPlaces<Traits>& places) const {
#pragma unroll
    for (int i = 0; i < Traits::kXPieces; ++i) {
      const int pixel = places.x[i] / (Traits::kChannels / 8);
      if (places.x[i] < 0 || (pixel >= first && pixel < end) || pixel > end + p.width) places.x[i] = Base::kNothing;
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
      wait_barrier(barrier, phase);
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

  // x + v of two neighbouring channels of a pixel: the next block's x, here and as a word for the tiles around; or y.
  __device__ __forceinline__ void finish_pair(int channel, int pixel, float2 v, bool last, char* words, uint32_t flag) const {
    if (first + pixel >= end) return;
    const uint32_t center = smem + Layout::kX + (rows.step + pixel + 1) * Traits::kXPitch + channel * 2;
    const float2 x = unpack2<Element>(load_shared_32(center));
    const uint32_t bits = pack2<Element>(x.x + v.x, x.y + v.y);
    const int64_t at = int64_t{first + pixel} * Traits::kChannels + rank * Traits::kOwned + channel;
    if (last) {
      *reinterpret_cast<uint32_t*>(static_cast<char*>(p.y) + at * 2) = bits;
    } else {
      store_word(words + at * 4, bits, flag);
      store_shared_32(center, bits);
    }
  }
};

template <class Traits>
struct LatencyStage : StageParts<Traits, LatencyBlock<Traits>> {
  using Base = StageParts<Traits, LatencyBlock<Traits>>;
  using Element = ElementOf<Traits>;
  using Layout = LatencyLayout<Traits>;
  using Weights = StageWeights<Traits>;
  using Base::activate, Base::first, Base::kPixelTiles, Base::lane, Base::p, Base::rank, Base::received, Base::reduced, Base::send, Base::smem,
      Base::thread;
  static constexpr int kWordsOfSource = Traits::kOwned * Traits::kPixels / 2;  // partial sums go in 16 bits, two pixels a word

  // What a block receives before the products.
  __device__ int exchange_bytes() const { return (this->end - first) * (Traits::kChannels * 2 + Traits::kCluster * 8); }

  // As in the latency path, without the pixels that the tile does not have.
  __device__ __forceinline__ void send_results() const {
    constexpr int kPieces = Traits::kConvBlocks * Traits::kPixels, kAtOnce = Traits::kThreads / kPieces;
    const int piece = thread % kPieces, chunk = rank * Traits::kConvBlocks + piece / Traits::kPixels;
    if (first + (piece % Traits::kPixels ^ ((chunk & 3) << 1)) < this->end) {
      const uint4 v = load_shared_128(smem + Layout::kSent + piece * 16);
      const uint32_t a = smem + Layout::kA + (rank * kPieces + piece) * 16;
#pragma unroll
      for (int to = 0; to < Traits::kCluster; to += kAtOnce) {
        if (Traits::kCluster % kAtOnce == 0 || to + thread / kPieces < Traits::kCluster) send(a, v, received(), to + thread / kPieces);
      }
    }
    if (first + lane >= this->end) return;
    float2 m = make_float2(0.f, 0.f);
    if (p.has_norm) {
#pragma unroll
      for (int block = 0; block < Traits::kConvBlocks; ++block) {
        const float2 part = load_shared_float2(smem + Layout::kSentMoments + (block * Traits::kPixels + lane) * 8);
        m.x += part.x, m.y += part.y;
      }
    }
    const uint32_t moments = smem + Layout::kMoments + (rank * Traits::kPixels + lane) * 8;
    for (int to = this->warp; to < Traits::kCluster; to += Traits::kWarps) send(moments, m, received(), to);
  }

  // Where this block's slice of W2 begins.
  __device__ int project_unit() const { return rank * Traits::kSlice; }
  __device__ int project_rows() const { return 0; }

  __device__ __forceinline__ Weights locate(const StageTensors& t) const {
    Weights from;
    this->locate_conv(from, t);
    const int unit = rank * Traits::kSlice + this->expand_row() * 16 + lane / 4;
    from.expand = static_cast<const char*>(t.expand_weight) + unit * Traits::kChannels * 2 +
                  (this->expand_part() * Traits::kExpandSteps * 4 + lane % 4) * 16;
    from.expand_vectors = reinterpret_cast<const float2*>(t.expand_vectors) + unit;
    from.project_vectors = reinterpret_cast<const float2*>(t.project_vectors) + rank * Traits::kOwned + output_channel(0);
    return from;
  }

  __device__ __forceinline__ void load_expand(uint4 (&w1)[Traits::kExpandRows][Traits::kExpandSteps][2],
                                              float2 (&vectors)[Traits::kExpandRows][2], const Weights& from) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int half = i % 2, step = i / 2 % Traits::kExpandSteps, j = i / 2 / Traits::kExpandSteps;
      w1[j][step][half] = load_global_128(from.expand + (j * 16 + half * 8) * Traits::kChannels * 2 + step * 64);
    }
#pragma unroll
    for (int i = 0; i < 2 * Traits::kExpandRows; ++i) vectors[i / 2][i % 2] = load_float2(from.expand_vectors + i * 8);
  }

  __device__ __forceinline__ void load_project_vectors(float2 (&vectors)[Traits::kOutputs], const Weights& from) const {
#pragma unroll
    for (int i = 0; i < Traits::kOutputs; ++i) vectors[i] = load_float2(from.project_vectors + i * 16);
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

  // Partial sums over this block's hidden units, to the blocks that own the channels. 16 bits: what carries them takes 16 KB in 1200 clocks.
  __device__ __forceinline__ void project(int b) const {
    float o[Traits::kProjectRows][kPixelTiles][4] = {};
    multiply<Traits, Traits::kProjectRows, Traits::kProjectSteps>(
        o, smem + Layout::kP, this->project_part() * Traits::kProjectSteps, lane,
        [&](int j, int step, int half) {
          return this->load_project(b, this->project_part() * Traits::kProjectSteps + step, this->project_row() + j, half);
        });
    const int source = rank * Traits::kProjectSplit + this->project_part();
#pragma unroll
    for (int j = 0; j < Traits::kProjectRows; ++j) {
      const int tile = this->project_row() + j, owner = tile / Traits::kOwnedTiles;
      const uint32_t to = smem + Layout::kReduce + (source * kWordsOfSource + tile % Traits::kOwnedTiles * 256) * 4 + lane * 16;
#pragma unroll
      for (int i = 0; i < kPixelTiles; i += 2) {
        const float *v = o[j][i], *w = o[j][i + 1];
        send(to + i * 256, make_uint4(pack2<Element>(v[0], v[1]), pack2<Element>(v[2], v[3]), pack2<Element>(w[0], w[1]), pack2<Element>(w[2], w[3])),
             reduced(), owner);
      }
    }
  }

  // Of this thread's word `i` of each source: own channel, first of the two pixels.
  __device__ int output_channel(int i) const { return i * 16 + thread % 2 * 8 + thread / 16 % 8; }
  __device__ int output_pixel() const { return (thread / 128 * 2 + thread / 2 % 2) * 8 + thread / 4 % 4 * 2; }

  __device__ __forceinline__ void finish_down(const StageDown<Traits>& down, char* words, uint32_t flag, const StageTensors& t) const {
#pragma unroll
    for (int i = 0; i < Traits::kOutputs; ++i) {
      const int channel = output_channel(i), pixel = output_pixel(), odd = channel & 1, word = thread / 4 % 32 * 4 + thread % 2 * 2;
      const float2 v = make_float2(this->down_result(channel, pixel, word, down.vectors[i], t),
                                   this->down_result(channel, pixel + 1, word + 1, down.vectors[i], t));
      const float other = __shfl_xor_sync(~0u, odd ? v.x : v.y, 16);
      this->begin_pair(channel - odd, pixel + odd, odd ? make_float2(other, v.y) : make_float2(v.x, other), words, flag);
    }
  }

  // Threads of neighbouring channels swap a pixel, so that each has a pair of channels.
  __device__ __forceinline__ void finish(const float2 (&vectors)[Traits::kOutputs], bool last, char* words, uint32_t flag) const {
#pragma unroll
    for (int i = 0; i < Traits::kOutputs; ++i) {
      float2 v = make_float2(vectors[i].x, vectors[i].x);
#pragma unroll
      for (int source = 0; source < Traits::kSources; ++source) {
        const float2 part = unpack2<Element>(load_shared_32(smem + Layout::kReduce + (source * kWordsOfSource + i * 256 + thread) * 4));
        v.x += part.x, v.y += part.y;
      }
      v.x *= vectors[i].y, v.y *= vectors[i].y;
      const int channel = output_channel(i), odd = channel & 1;
      const float other = __shfl_xor_sync(~0u, odd ? v.x : v.y, 16);
      this->finish_pair(channel - odd, output_pixel() + odd, odd ? make_float2(other, v.y) : make_float2(v.x, other), last, words, flag);
    }
  }
};

// Before the launch before this one has ended: the first block's weights, and what depends on the shape alone.
template <class Traits, class Stage>
__device__ __forceinline__ void prepare_stage(const Stage& stage, StageHeld<Traits>& held, StageDown<Traits>& down, const StageTensors& t,
                                              const CUtensorMap& project) {
  stage.initialise_weight_barriers();
  if (stage.thread == 0) stage.fetch_project(project, 0, stage.project_unit(), stage.project_rows());
  held.from = stage.locate(t);
  stage.load_conv(held.conv_weights, held.conv_bias, held.from);
  stage.load_expand(held.w1, held.expand_vectors, held.from);
  stage.load_project_vectors(held.project_vectors, held.from);
  stage.fill_zeros();
  stage.prepare(held.places);
  if constexpr (Traits::kChannels > 64) {
    if (t.down_weight == nullptr) return;
    stage.prepare_down(down, t);
#pragma unroll
    for (int i = 0; i < Traits::kOutputs; ++i) stage.load_down_vectors(down.vectors[i], stage.output_channel(i), t);
  }
}

// After it has: x of the first block, loaded or computed.
template <class Traits, class Stage>
__device__ __forceinline__ StageWords begin_stage(const Stage& stage, StageHeld<Traits>& held, const StageDown<Traits>& down, const StageTensors& t) {
  char* const workspace = static_cast<char*>(t.workspace);
  const StageWords words{workspace, workspace + StageWorkspace::kHeader, int64_t{t.pixels} * Traits::kChannels * 4, load_global_32(workspace)};
  const bool begins = t.down_weight != nullptr;
  if (!begins) stage.load_x(held.places);
  if constexpr (Traits::kChannels > 64) {
    if (begins) {
      stage.multiply_down(down);
      stage.clear_halo(held.places);
      __syncthreads();
      stage.finish_down(down, words.of_block(0), words.flag(0), t);
    }
  }
  stage.keep_halo(held.places);
  return words;
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) latency_stage_fwd_sm90(const __grid_constant__ StageTensors t,
                                                                              const __grid_constant__ CUtensorMap project) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char stage_smem[];
  using Layout = LatencyLayout<Traits>;
  const int thread = threadIdx.x, warp = __shfl_sync(~0u, thread / 32, 0), lane = thread % 32;
  const int rank = static_cast<int>(blockIdx.x) % Traits::kCluster, tile = static_cast<int>(blockIdx.x) / Traits::kCluster;
  const LatencyParams p = tile_params(t);
  const int first = tile * t.tile, end = min(first + t.tile, t.pixels);
  const LatencyStage<Traits> stage{{{{p, smem_address(stage_smem), rank, first, thread, warp, lane, latency_rows<Traits>(p.width)}}, end}};
  StageHeld<Traits> held;
  StageDown<Traits> down;
  stage.initialise_barriers(stage_smem + Layout::kBarriers, stage.exchange_bytes());
  prepare_stage(stage, held, down, t, project);
  if (Traits::kCluster > 1) grid::cluster_barrier();  // every block of the cluster runs, its barriers exist
  wait_for_previous_launch();
  allow_next_launch();  // after the wait: the next launch may count on what came before this one
  const StageWords words = begin_stage(stage, held, down, t);
#pragma unroll 1
  for (int b = 0; b < t.blocks; ++b) {
    const bool last = b + 1 == t.blocks;
    const uint32_t phase = b & 1;
    if (!last) held.from.advance();
    if (b > 0 || t.down_weight != nullptr) {
      stage.receive(held.places, words.of_block(b), words.flag(b));
    } else {
      ptx::cp_async_wait<0>();
    }
    __syncthreads();
    stage.convolve(held.places, held.conv_weights, held.conv_bias);
    __syncthreads();
    stage.send_results();
    stage.load_conv(held.conv_weights, held.conv_bias, held.from);
    stage.wait_for_all(stage.received(), phase);
    if (!last && thread == 0) {
      stage.expect(stage.received(), stage.exchange_bytes());
      stage.fetch_project(project, b + 1, stage.project_unit(), stage.project_rows());
    }
    stage.expand(held.w1, held.expand_vectors);
    stage.wait_for_project(b);
    __syncthreads();
    stage.project(b);
    stage.load_expand(held.w1, held.expand_vectors, held.from);
    stage.wait_for_all(stage.reduced(), phase);
    if (!last) stage.expect(stage.reduced(), Traits::kReduceBytes);
    stage.finish(held.project_vectors, last, words.of_block(b + 1), words.flag(b + 1));
    stage.load_project_vectors(held.project_vectors, held.from);
  }
  leave(words.workspace, words.flag(t.blocks - 1));
#endif
}

}  // namespace convfirst::block_fusion::sm90
