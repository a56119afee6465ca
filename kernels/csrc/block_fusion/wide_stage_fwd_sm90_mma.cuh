// A stage of wide conv-first blocks, forward, for few pixels on Hopper: one launch, 64 blocks a tile of 32 pixels in four clusters.
//
//   A block's weights (4 MB at 512 channels) are more than a cluster can load while it works, so all multiprocessors share them, and exchange
//   through L2: words of data and flag (latency_stage_fwd_sm90_mma.cuh). No clusters: of 16 blocks only seven fit a device.
//
//     block (group g, rank r)
//     x of 8 own channels       A [32 x 512]             S of 32 units            P [32 x 128]            O of 128 channels, partial
//     +-------------------+     +-------------------+    +------------------+     +----------------+      +---------------------+
//     | 32 pixels and     | --> | words of all 64   | -> | W1c A^T, norm,   | --> | words of the 4 | -->  | W2c P^T, to the 16  | --> own channels:
//     | those around      | (1) | blocks, moments   |    | act              | (2) | blocks, rank r |      | blocks of the group | (3) sums, y
//     +-------------------+     +-------------------+    +------------------+     +----------------+      +---------------------+
//
//   what                          where                                      written by                    when
//   W1 slice of the next block    registers, operand layout                  its thread                    after the first product
//   W2 slice of the next block    shared, each thread its own pieces         its thread (cp.async)         after the second product
//   x of own pixels               shared (kX), in place                      finish                        every block
//   x of pixels around            shared (kX)                                receive                       every block
//   own results, own P            shared (kSent)                             a warp, for itself            before (1), (2)
//   A, moments of 64 channels     shared                                     gather_a                      (1)
//   quarters of S                 shared (kSums)                             four warps                    before act
//   P of 128 units                shared                                     gather_p                      (2)
//   sums over four sources of O   shared (kSums)                             gather_sums                   (3)
//
// One set of words serves each of (1), (2), (3): a block sends its A of the next block after finishing this one, for which every block of the tile had
// gathered A; its P and its partial sums after gathering all A of the next block, before which every block of the tile finished this one.
#pragma once

#include "latency_stage_fwd_sm90_mma.cuh"

namespace convfirst::block_fusion::sm90 {

// Two words at once, each whole.
__device__ __forceinline__ void store_words(void* address, uint32_t data0, uint32_t data1, uint32_t flag) {
  asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(data0), "r"(flag), "r"(data1), "r"(flag) : "memory");
}

template <class Traits>
struct WideStage : StageParts<Traits, LatencyTile<Traits>> {
  using Base = StageParts<Traits, LatencyTile<Traits>>;
  using Element = ElementOf<Traits>;
  using Layout = LatencyLayout<Traits>;
  using Base::first, Base::kPixelTiles, Base::lane, Base::p, Base::rank, Base::rows, Base::smem, Base::thread, Base::warp;

  using Weights = StageWeights<Traits>;
  __device__ int group() const { return rank / Traits::kRanks; }
  __device__ int peer() const { return rank % Traits::kRanks; }
  __device__ int expand_row() const { return warp % (Traits::kUnits / 16); }
  __device__ int expand_part() const { return warp / (Traits::kUnits / 16); }
  __device__ int first_unit() const { return peer() * Traits::kSlice + group() * Traits::kUnits; }

  __device__ __forceinline__ Weights locate(const StageTensors& t) const {
    Weights from;
    this->locate_conv(from, t);
    const int unit = first_unit() + expand_row() * 16 + lane / 4, row = group() * Traits::kRows + warp * 16 + lane / 4;
    from.expand = static_cast<const char*>(t.expand_weight) + unit * Traits::kChannels * 2 + (expand_part() * Traits::kExpandSteps * 4 + lane % 4) * 16;
    from.expand_vectors = reinterpret_cast<const float2*>(t.expand_vectors) + unit;
    from.project = static_cast<const char*>(t.project_weight) + row * Traits::kHidden * 2 + (peer() * (Traits::kSlice / 8) + lane % 4) * 16;
    from.project_bias = t.project_bias + rank * Traits::kOwned + output_channel();
    return from;
  }

  __device__ __forceinline__ void load_expand(uint4 (&w1)[Traits::kExpandSteps][2], float2 (&vectors)[2], const Weights& from) const {
#pragma unroll
    for (int i = 0; i < 2 * Traits::kExpandSteps; ++i) {
      w1[i / 2][i % 2] = load_global_128(from.expand + i % 2 * 8 * Traits::kChannels * 2 + i / 2 * 64);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) vectors[i] = load_float2(from.expand_vectors + i * 8);
  }

  __device__ uint32_t project_piece(int i) const { return smem + Layout::kW2 + (i * Traits::kThreads + thread) * 16; }

  __device__ __forceinline__ void load_project(const Weights& from) const {
#pragma unroll
    for (int i = 0; i < 2 * Traits::kProjectSteps; ++i) {
      ptx::cp_async16(project_piece(i), from.project + i % 2 * 8 * Traits::kHidden * 2 + i / 2 * 64, true);
    }
    ptx::cp_async_commit();
  }

  // 8 channels or units of 16 (or 8) pixels, that this warp stored at `from` behind one another, as words.
  template <int kPieces>
  __device__ __forceinline__ void publish(uint32_t from, char* words, uint32_t flag) const {
    __syncwarp();
    if (lane < 2 * kPieces) {
      const float2 v = load_shared_float2(from + lane * 8);
      store_words(words + lane * 16, __float_as_uint(v.x), __float_as_uint(v.y), flag);
    }
  }

  // Own channels' results to all blocks of the tile. `words` are the tile's.
  __device__ __forceinline__ void convolve(const LatencyPlaces<Traits>& places, const ConvWeights& w, float2 bias, char* words, uint32_t flag) const {
    if (warp >= Traits::kPixels / 16) return;
    float s[2][4];
    this->convolve_sums(s, places.taps[0], w, bias);
    const uint32_t to = smem + Layout::kSent + warp * 256;
    stmatrix_x2(to + lane % 16 * 16, pack2<Element>(s[0][0], s[0][1]), pack2<Element>(s[0][2], s[0][3]));
    publish<16>(to, words + (rank * Traits::kPixels + warp * 16) * 32, flag);
  }

  // kPieces times 16 bytes, a thread's 256 pieces apart, once their words carry the flag.
  template <int kPieces>
  __device__ __forceinline__ void gather(uint4 (&pieces)[kPieces], const char* words, uint32_t flag) const {
    uint4 v[kPieces][2];
    const char* const from = words + thread * 32;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      v[i][0] = load_words(from + i * Traits::kThreads * 32), v[i][1] = load_words(from + i * Traits::kThreads * 32 + 16);
    }
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      while (v[i][0].y != flag || v[i][0].w != flag || v[i][1].y != flag || v[i][1].w != flag) {
        v[i][0] = load_words(from + i * Traits::kThreads * 32), v[i][1] = load_words(from + i * Traits::kThreads * 32 + 16);
      }
      pieces[i] = make_uint4(v[i][0].x, v[i][0].z, v[i][1].x, v[i][1].z);
    }
  }

  // A thread has pixel `lane` of every eighth chunk: its sum and sum of squares on the way.
  __device__ __forceinline__ void gather_a(const char* words, uint32_t flag) const {
    uint4 pieces[Traits::kGatheredA];
    gather(pieces, words, flag);
    float2 sum = make_float2(0.f, 0.f);
#pragma unroll
    for (int i = 0; i < Traits::kGatheredA; ++i) {
      store_shared_128(operand_address<Traits>(smem + Layout::kA, warp + i * Traits::kWarps, lane), pieces[i]);
      const uint32_t pairs[4] = {pieces[i].x, pieces[i].y, pieces[i].z, pieces[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 f = unpack2<Element>(pairs[j]);
        sum.x += f.x + f.y, sum.y = fmaf(f.x, f.x, fmaf(f.y, f.y, sum.y));
      }
    }
    store_shared_float2(smem + Layout::kMoments + thread * 8, sum);
  }

  __device__ __forceinline__ void gather_p(const char* words, uint32_t flag) const {
    uint4 pieces[Traits::kGatheredP];
    gather(pieces, words, flag);
#pragma unroll
    for (int i = 0; i < Traits::kGatheredP; ++i) {
      store_shared_128(operand_address<Traits>(smem + Layout::kP, warp + i * Traits::kWarps, lane), pieces[i]);
    }
  }

  // {r, -r m} of pixel `lane`.
  __device__ __forceinline__ float2 moments() const {
    if (!p.has_norm) return make_float2(1.f, 0.f);
    float2 sum = make_float2(0.f, 0.f);
#pragma unroll
    for (int i = 0; i < Traits::kWarps; ++i) {
      const float2 part = load_shared_float2(smem + Layout::kMoments + (i * Traits::kPixels + lane) * 8);
      sum.x += part.x, sum.y += part.y;
    }
    const float mean = sum.x * (1.f / Traits::kChannels);
    const float scale = rsqrtf(fmaxf(sum.y * (1.f / Traits::kChannels) - mean * mean, 0.f) + p.eps);
    return make_float2(scale, -mean * scale);
  }

  // Four warps have a quarter of the depth each; each gets the sums of a quarter of the pixels.
  __device__ __forceinline__ void share_sums(const float (&s)[kPixelTiles][4], float (&kept)[4]) const {
    static_assert(kPixelTiles == Traits::kExpandSplit);
    const uint32_t at = smem + Layout::kSums + lane * 16;
#pragma unroll
    for (int i = 0; i < kPixelTiles; ++i) {
      store_shared_128(at + (warp * kPixelTiles + i) * 512, make_uint4(__float_as_uint(s[i][0]), __float_as_uint(s[i][1]),
                                                                       __float_as_uint(s[i][2]), __float_as_uint(s[i][3])));
    }
    asm volatile("bar.sync %0, 128;" ::"r"(1 + expand_row()) : "memory");
#pragma unroll
    for (int i = 0; i < 4; ++i) kept[i] = 0.f;
#pragma unroll
    for (int part = 0; part < Traits::kExpandSplit; ++part) {
      const uint4 v = load_shared_128(at + ((part * (Traits::kUnits / 16) + expand_row()) * kPixelTiles + expand_part()) * 512);
      kept[0] += __uint_as_float(v.x), kept[1] += __uint_as_float(v.y), kept[2] += __uint_as_float(v.z), kept[3] += __uint_as_float(v.w);
    }
  }

  // Own hidden units to the blocks of this rank. `words` are the tile's.
  __device__ __forceinline__ void expand(const uint4 (&w1)[Traits::kExpandSteps][2], const float2 (&vectors)[2], char* words, uint32_t flag) const {
    const float2 norm = moments();
    float s[1][kPixelTiles][4] = {};
    multiply<Traits, 1, Traits::kExpandSteps>(s, smem + Layout::kA, expand_part() * Traits::kExpandSteps, lane,
                                              [&](int, int step, int half) { return w1[step][half]; });
    float kept[4];
    share_sums(s[0], kept);
    float scale[2], shift[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int pixel = expand_part() * 8 + lane % 4 * 2 + i;
      scale[i] = __shfl_sync(~0u, norm.x, pixel), shift[i] = __shfl_sync(~0u, norm.y, pixel);
    }
    uint32_t packed[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float v[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) v[i] = fmaf(kept[2 * half + i], scale[i], fmaf(shift[i], vectors[half].y, vectors[half].x));
      packed[half] = this->activate(v[0], v[1]);
    }
    const uint32_t to = smem + Layout::kSent + warp * 256;  // [chunk of 8 units][8 pixels]
    stmatrix_x2_transposed(to + lane % 16 * 16, packed[0], packed[1]);
    const int chunk = (first_unit() + expand_row() * 16) / 8;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      publish<8>(to + i * 128, words + int64_t{(chunk + i) * Traits::kPixels + expand_part() * 8} * 32, flag);
    }
  }

  // Partial sums over this rank's hidden units, to the blocks of the group: [owner][source][pair of pixel tiles][lane][pixel tile], a word two pixels.
  __device__ __forceinline__ void project(char* words, uint32_t flag) const {
    float o[1][kPixelTiles][4] = {};
    multiply<Traits, 1, Traits::kProjectSteps>(o, smem + Layout::kP, 0, lane,
                                               [&](int, int step, int half) { return load_shared_128(project_piece(step * 2 + half)); });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int owner = group() * Traits::kRanks + 2 * warp + half;
      char* const to = words + ((owner * Traits::kRanks + peer()) * Traits::kSumWords + 2 * lane) * 8;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float *v = o[0][2 * i] + 2 * half, *w = o[0][2 * i + 1] + 2 * half;
        store_words(to + i * 512, pack2<Element>(v[0], v[1]), pack2<Element>(w[0], w[1]), flag);
      }
    }
  }

  // Sums over every fourth source, in order; `words` are the tile's.
  __device__ __forceinline__ void gather_sums(const char* words, uint32_t flag) const {
    const char* const from = words + (rank * Traits::kRanks * Traits::kSumWords + 2 * thread) * 8;
    uint4 v[Traits::kGatheredSums];
#pragma unroll
    for (int i = 0; i < Traits::kGatheredSums; ++i) v[i] = load_words(from + i * Traits::kThreads * 16);
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int i = 0; i < Traits::kGatheredSums; ++i) {
      while (v[i].y != flag || v[i].w != flag) v[i] = load_words(from + i * Traits::kThreads * 16);
      const float2 a = unpack2<Element>(v[i].x), b = unpack2<Element>(v[i].z);
      sum.x += a.x, sum.y += a.y, sum.z += b.x, sum.w += b.y;
    }
    store_shared_128(smem + Layout::kSums + thread * 16,
                     make_uint4(__float_as_uint(sum.x), __float_as_uint(sum.y), __float_as_uint(sum.z), __float_as_uint(sum.w)));
  }

  __device__ int output_channel() const { return thread / 16 % 8; }
  __device__ int output_pixel() const { return (thread / 128 * 2 + thread % 4 / 2) * 8 + thread / 4 % 4 * 2 + thread % 2; }

  __device__ __forceinline__ void finish_down(char* words, uint32_t flag, const StageTensors& t) const {
    const float v = this->down_result(output_channel(), output_pixel(), thread / 4 % 32 * 4 + thread % 2, t);
    const float other = __shfl_xor_sync(~0u, v, 16);  // of the next channel
    if (output_channel() % 2 == 0) this->begin_pair(output_channel(), output_pixel(), make_float2(v, other), words, flag);
  }

  __device__ __forceinline__ void finish(float bias, bool last, char* words, uint32_t flag) const {
    float v = bias;
#pragma unroll
    for (int i = 0; i < 4; ++i) v += __uint_as_float(load_shared_32(smem + Layout::kSums + (i * Traits::kThreads + thread) * 4));
    const float other = __shfl_xor_sync(~0u, v, 16);  // of the next channel
    if (output_channel() % 2 == 0) this->finish_pair(output_channel(), output_pixel(), make_float2(v, other), last, words, flag);
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) wide_stage_fwd_sm90(const __grid_constant__ StageTensors t) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(16) char latency_smem[];
  const int thread = threadIdx.x, warp = __shfl_sync(~0u, thread / 32, 0), lane = thread % 32;
  const int rank = static_cast<int>(blockIdx.x) % Traits::kTeam, tile = static_cast<int>(blockIdx.x) / Traits::kTeam;
  const LatencyParams p = tile_params(t);
  const WideStage<Traits> stage{
      {{p, smem_address(latency_smem), rank, tile * Traits::kPixels, thread, warp, lane, latency_rows<Traits>(p.width)}}};
  uint4 w1[Traits::kExpandSteps][2];
  float2 expand_vectors[2];
  ConvWeights conv_weights;
  float2 conv_bias;
  LatencyPlaces<Traits> places;
  StageWeights<Traits> from = stage.locate(t);
  stage.load_conv(conv_weights, conv_bias, from);
  stage.load_expand(w1, expand_vectors, from);
  stage.load_project(from);
  float project_bias = __ldg(from.project_bias);
  stage.fill_zeros();
  stage.prepare(places);
  [[maybe_unused]] StageDown<Traits> down;
  const bool begins = t.down_weight != nullptr;
  if constexpr (Traits::kChannels > 64) {
    if (begins) stage.prepare_down(down, t);
  }

  wait_for_previous_launch();
  allow_next_launch();  // after the wait: the next launch may count on what came before this one
  char* const workspace = static_cast<char*>(t.workspace);
  const uint32_t epoch = load_global_32(workspace);
  const int64_t words_bytes = int64_t{t.pixels} * Traits::kChannels * 4;
  char* const words = workspace + StageWorkspace::kHeader;
  if (!begins) stage.load_x(places);
  if constexpr (Traits::kChannels > 64) {
    if (begins) {
      stage.multiply_down(down);
      stage.clear_halo(places);
      __syncthreads();
      stage.finish_down(words, epoch + 1, t);
    }
  }
  stage.keep_halo(places);
  char* const words_a = words + 2 * words_bytes + tile * (Traits::kWordsOfA + Traits::kWordsOfP + Traits::kWordsOfSums);
  char* const words_p = words_a + Traits::kWordsOfA;
  char* const words_sums = words_p + Traits::kWordsOfP;
#pragma unroll 1
  for (int b = 0; b < t.blocks; ++b) {
    const bool last = b + 1 == t.blocks;
    const uint32_t flag = epoch + b + 1;
    if (!last) from.advance();
    if (b > 0 || begins) {
      stage.receive(places, words + (b & 1) * words_bytes, epoch + b + 1);
    } else {
      ptx::cp_async_wait<0>();
    }
    __syncthreads();
    stage.convolve(places, conv_weights, conv_bias, words_a, flag);
    stage.load_conv(conv_weights, conv_bias, from);
    stage.gather_a(words_a, flag);
    __syncthreads();
    stage.expand(w1, expand_vectors, words_p, flag);
    stage.load_expand(w1, expand_vectors, from);
    stage.gather_p(words_p + stage.peer() * (Traits::kSlice / 8 * Traits::kPixels * 32), flag);
    ptx::cp_async_wait<0>();  // own pieces of W2
    __syncthreads();
    stage.project(words_sums, flag);
    stage.load_project(from);
    stage.gather_sums(words_sums, flag);
    __syncthreads();
    stage.finish(project_bias, last, words + ((b & 1) ^ 1) * words_bytes, epoch + b + 2);
    project_bias = __ldg(from.project_bias);
  }
  ptx::cp_async_wait<0>();
  leave(workspace, epoch + t.blocks);
#endif
}

}  // namespace convfirst::block_fusion::sm90
