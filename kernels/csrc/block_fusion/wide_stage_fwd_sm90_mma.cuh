// A stage of wide conv-first blocks, forward, for few pixels on Hopper: one launch, 64 blocks a tile of 32 pixels in four groups.
//
//   A block's weights (4 MB at 512 channels) are more than a cluster can load while it works, so all multiprocessors share them, and exchange
//   through L2: words of data and flag (latency_stage_fwd_sm90_mma.cuh). No clusters: of 16 blocks only seven fit a device.
//
//     block (group g, rank r)
//     x of 8 own channels       A [32 x 512]             S of 32 units            P [32 x 128]            O of 128 channels, partial
//     +-------------------+     +-------------------+    +------------------+     +----------------+      +---------------------+
//     | 32 pixels and     | --> | of all 64 blocks, | -> | W1c A^T, norm,   | --> | words of the 4 | -->  | W2c P^T, to the 16  | --> own channels:
//     | those around      | (1) | moments           |    | act              | (2) | blocks, rank r |      | blocks of the group | (3) sums, y
//     +-------------------+     +-------------------+    +------------------+     +----------------+      +---------------------+
//
//   what                          where                                      written by                    when
//   W1 slice of the next block    registers, operand layout                  its thread                    before the second product
//   W2 slice of the next block    shared, one of two (StageWeightBoxes)      TMA                           before the first product
//   x of own pixels               shared (kX), in place                      finish                        every block
//   x of pixels around            shared (kX)                                receive                       every block
//   own results, own P            shared (kSent)                             a warp, for itself            before (1), (2)
//   A, moments of 64 channels     shared                                     gather_a                      (1)
//   quarters of S                 shared (kSums)                             four warps                    before act
//   P of 128 units                shared                                     gather_p                      (2)
//   sums over four sources of O   shared (kSums)                             gather_sums                   (3)
//
// One set of words serves each of (2), (3): a block sends its P and its partial sums after gathering all A of this block, before which every block of the
// tile finished the block before. A, the most that is read, travels without flags, 32 KB in place of 64: each block of the stage and tile has a place for
// it that is empty before the launch (StageWorkspace).
#pragma once

#include "latency_stage_fwd_sm90_mma.cuh"

namespace convfirst::block_fusion::sm90 {

// Two words at once, each whole.
__device__ __forceinline__ void store_words(void* address, uint32_t data0, uint32_t data1, uint32_t flag) {
  asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(data0), "r"(flag), "r"(data1), "r"(flag) : "memory");
}

// A word of A that is not there yet.
constexpr uint32_t kAbsent = ~0u;

__device__ __forceinline__ uint32_t load_relaxed_32(const void* address) {
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
  return v;
}

__device__ __forceinline__ void store_relaxed(void* address, uint4 v) {
  asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
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

  // Where this block's slice of W2 begins.
  __device__ int project_unit() const { return peer() * Traits::kSlice; }
  __device__ int project_rows() const { return group() * Traits::kRows; }

  __device__ __forceinline__ Weights locate(const StageTensors& t) const {
    Weights from;
    this->locate_conv(from, t);
    const int unit = first_unit() + expand_row() * 16 + lane / 4;
    from.expand = static_cast<const char*>(t.expand_weight) + unit * Traits::kChannels * 2 + (expand_part() * Traits::kExpandSteps * 4 + lane % 4) * 16;
    from.expand_vectors = reinterpret_cast<const float2*>(t.expand_vectors) + unit;
    from.project_vectors = reinterpret_cast<const float2*>(t.project_vectors) + rank * Traits::kOwned + output_channel();
    return from;
  }

  __device__ __forceinline__ void load_expand(uint4 (&w1)[1][Traits::kExpandSteps][2], float2 (&vectors)[1][2], const Weights& from) const {
#pragma unroll
    for (int i = 0; i < 2 * Traits::kExpandSteps; ++i) {
      w1[0][i / 2][i % 2] = load_global_128(from.expand + i % 2 * 8 * Traits::kChannels * 2 + i / 2 * 64);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) vectors[0][i] = load_float2(from.expand_vectors + i * 8);
  }

  __device__ __forceinline__ void load_project_vectors(float2 (&vectors)[1], const Weights& from) const { vectors[0] = load_float2(from.project_vectors); }

  // 8 channels or units of 16 (or 8) pixels, that this warp stored at `from` behind one another, as words.
  template <int kPieces>
  __device__ __forceinline__ void publish(uint32_t from, char* words, uint32_t flag) const {
    __syncwarp();
    if (lane < 2 * kPieces) {
      const float2 v = load_shared_float2(from + lane * 8);
      store_words(words + lane * 16, __float_as_uint(v.x), __float_as_uint(v.y), flag);
    }
  }

  // Own channels' results to all blocks of the tile, whose A is at `a`.
  __device__ __forceinline__ void convolve(const LatencyPlaces<Traits>& places, const ConvWeights& w, float2 bias, char* a) const {
    if (warp >= Traits::kPixels / 16) return;
    float s[2][4];
    this->convolve_sums(s, places.taps[0], w, bias);
    const uint32_t to = smem + Layout::kSent + warp * 256;
    stmatrix_x2(to + lane % 16 * 16, pack2<Element>(s[0][0], s[0][1]), pack2<Element>(s[0][2], s[0][3]));
    __syncwarp();
    const int pixel = warp * 16 + lane;
    if (lane < 16 && first + pixel < this->end) store_relaxed(a + (rank * Traits::kPixels + pixel) * 16, load_shared_128(to + lane * 16));
  }

  // Until the word of each lane carries the flag: one small load a warp, where waiting on all words would take the bandwidth that they need.
  __device__ __forceinline__ void wait_for_words(const char* word, uint32_t flag) const {
    while (!__all_sync(~0u, load_relaxed_32(word + 4) == flag)) {
    }
  }

  // Loads again what does not carry the flag, all of it at once.
  template <int kPieces>
  __device__ __forceinline__ void gather(uint4 (&pieces)[kPieces], const char* words, uint32_t flag) const {
    const char* const from = words + thread * 32;
    const bool exists = first + lane < this->end;
    uint4 v[kPieces][2];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      v[i][0] = v[i][1] = make_uint4(0, flag, 0, flag);
      if (exists) v[i][0] = load_words(from + i * Traits::kThreads * 32), v[i][1] = load_words(from + i * Traits::kThreads * 32 + 16);
    }
    bool missing;
    do {
      missing = false;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        if (v[i][0].y != flag || v[i][0].w != flag || v[i][1].y != flag || v[i][1].w != flag) {
          v[i][0] = load_words(from + i * Traits::kThreads * 32), v[i][1] = load_words(from + i * Traits::kThreads * 32 + 16);
          missing = true;
        }
      }
    } while (missing);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) pieces[i] = make_uint4(v[i][0].x, v[i][0].z, v[i][1].x, v[i][1].z);
  }

  // A thread has pixel `lane` of every eighth chunk: its sum and sum of squares on the way.
  __device__ __forceinline__ void gather_a(const char* a) const {
    const int count = this->end - first, last = min(lane / Traits::kGatheredA % 2 * 16 + 15, count - 1);
    const char* const polled = a + ((warp + lane % Traits::kGatheredA * Traits::kWarps) * Traits::kPixels + last) * 16;
    while (!__all_sync(~0u, load_relaxed_32(polled + 12) != kAbsent)) {
    }
    const char* const from = a + thread * 16;
    uint4 pieces[Traits::kGatheredA];
#pragma unroll
    for (int i = 0; i < Traits::kGatheredA; ++i) {
      pieces[i] = make_uint4(0, 0, 0, 0);
      if (lane < count) pieces[i] = load_words(from + i * Traits::kThreads * 16);
    }
    bool missing;
    do {
      missing = false;
#pragma unroll
      for (int i = 0; i < Traits::kGatheredA; ++i) {
        const uint4 v = pieces[i];
        if (v.x == kAbsent || v.y == kAbsent || v.z == kAbsent || v.w == kAbsent) pieces[i] = load_words(from + i * Traits::kThreads * 16), missing = true;
      }
    } while (missing);
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
    wait_for_words(words + ((warp + lane % Traits::kGatheredP * Traits::kWarps) * Traits::kPixels + lane / 2 % 4 * 8 + 7) * 32 + 24, flag);
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
  __device__ __forceinline__ void expand(const uint4 (&w1)[1][Traits::kExpandSteps][2], const float2 (&vectors)[1][2], char* words, uint32_t flag) const {
    const float2 norm = moments();
    float s[1][kPixelTiles][4] = {};
    multiply<Traits, 1, Traits::kExpandSteps>(s, smem + Layout::kA, expand_part() * Traits::kExpandSteps, lane,
                                              [&](int j, int step, int half) { return w1[j][step][half]; });
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
      for (int i = 0; i < 2; ++i) v[i] = fmaf(kept[2 * half + i], scale[i], fmaf(shift[i], vectors[0][half].y, vectors[0][half].x));
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
  __device__ __forceinline__ void project(int b, char* words, uint32_t flag) const {
    float o[1][kPixelTiles][4] = {};
    multiply<Traits, 1, Traits::kProjectSteps>(o, smem + Layout::kP, 0, lane,
                                               [&](int, int step, int half) { return this->load_project(b, step, warp, half); });
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
    const bool exists = first + thread % 64 / 32 * 16 + thread % 4 * 2 < this->end;
    uint4 v[Traits::kGatheredSums];
#pragma unroll
    for (int i = 0; i < Traits::kGatheredSums; ++i) {
      v[i] = make_uint4(0, flag, 0, flag);
      if (exists) v[i] = load_words(from + i * Traits::kThreads * 16);
    }
    bool missing;
    do {
      missing = false;
#pragma unroll
      for (int i = 0; i < Traits::kGatheredSums; ++i) {
        if (v[i].y != flag || v[i].w != flag) v[i] = load_words(from + i * Traits::kThreads * 16), missing = true;
      }
    } while (missing);
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int i = 0; i < Traits::kGatheredSums; ++i) {
      const float2 a = unpack2<Element>(v[i].x), b = unpack2<Element>(v[i].z);
      sum.x += a.x, sum.y += a.y, sum.z += b.x, sum.w += b.y;
    }
    store_shared_128(smem + Layout::kSums + thread * 16,
                     make_uint4(__float_as_uint(sum.x), __float_as_uint(sum.y), __float_as_uint(sum.z), __float_as_uint(sum.w)));
  }

  __device__ int output_channel(int = 0) const { return thread / 16 % 8; }
  __device__ int output_pixel() const { return (thread / 128 * 2 + thread % 4 / 2) * 8 + thread / 4 % 4 * 2 + thread % 2; }

  __device__ __forceinline__ void finish_down(const StageDown<Traits>& down, char* words, uint32_t flag, const StageTensors& t) const {
    const float v = this->down_result(output_channel(), output_pixel(), thread / 4 % 32 * 4 + thread % 2, down.vectors[0], t);
    const float other = __shfl_xor_sync(~0u, v, 16);  // of the next channel
    if (output_channel() % 2 == 0) this->begin_pair(output_channel(), output_pixel(), make_float2(v, other), words, flag);
  }

  __device__ __forceinline__ void finish(float2 vectors, bool last, char* words, uint32_t flag) const {
    float v = vectors.x;
#pragma unroll
    for (int i = 0; i < 4; ++i) v += __uint_as_float(load_shared_32(smem + Layout::kSums + (i * Traits::kThreads + thread) * 4));
    v *= vectors.y;
    const float other = __shfl_xor_sync(~0u, v, 16);  // of the next channel
    if (output_channel() % 2 == 0) this->finish_pair(output_channel(), output_pixel(), make_float2(v, other), last, words, flag);
  }
};

// For the launch after this one; all threads of the grid.
__device__ __forceinline__ void empty_set(char* set) {
  for (int i = (blockIdx.x * blockDim.x + threadIdx.x) * 16; i < StageWorkspace::kSet; i += gridDim.x * blockDim.x * 16) {
    store_relaxed(set + i, make_uint4(kAbsent, kAbsent, kAbsent, kAbsent));
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) wide_stage_fwd_sm90(const __grid_constant__ StageTensors t,
                                                                           const __grid_constant__ CUtensorMap project) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char stage_smem[];
  const int thread = threadIdx.x, warp = __shfl_sync(~0u, thread / 32, 0), lane = thread % 32;
  const int rank = static_cast<int>(blockIdx.x) % Traits::kTeam, tile = static_cast<int>(blockIdx.x) / Traits::kTeam;
  const LatencyParams p = tile_params(t);
  const int first = tile * t.tile, end = min(first + t.tile, t.pixels);
  const WideStage<Traits> stage{{{p, smem_address(stage_smem), rank, first, thread, warp, lane, latency_rows<Traits>(p.width)}, end}};
  StageHeld<Traits> held;
  StageDown<Traits> down;
  prepare_stage(stage, held, down, t, project);
  wait_for_previous_launch();
  allow_next_launch();  // after the wait: the next launch may count on what came before this one
  const StageWords words = begin_stage(stage, held, down, t);
  const uint32_t set = load_global_32(words.workspace + 8);
  char* const sets = words.workspace + StageWorkspace::kCounters;
  empty_set(sets + (set ^ 1) * StageWorkspace::kSet);
  const int64_t a_step = static_cast<int>(gridDim.x) / Traits::kTeam * Traits::kWordsOfA;  // from a block to the next
  char* a = sets + set * StageWorkspace::kSet + tile * Traits::kWordsOfA;
  char* const words_p = words.pixels + 2 * words.bytes + tile * (Traits::kWordsOfP + Traits::kWordsOfSums);
  char* const words_sums = words_p + Traits::kWordsOfP;
#pragma unroll 1
  for (int b = 0; b < t.blocks; ++b, a += a_step) {
    const bool last = b + 1 == t.blocks;
    const uint32_t flag = words.flag(b);
    if (!last) held.from.advance();
    if (b > 0 || t.down_weight != nullptr) {
      stage.receive(held.places, words.of_block(b), flag);
    } else {
      ptx::cp_async_wait<0>();
    }
    __syncthreads();
    stage.convolve(held.places, held.conv_weights, held.conv_bias, a);
    stage.gather_a(a);
    __syncthreads();
    if (!last && thread == 0) stage.fetch_project(project, b + 1, stage.project_unit(), stage.project_rows());
    stage.expand(held.w1, held.expand_vectors, words_p, flag);
    stage.gather_p(words_p + stage.peer() * (Traits::kSlice / 8 * Traits::kPixels * 32), flag);
    stage.load_expand(held.w1, held.expand_vectors, held.from);
    stage.load_conv(held.conv_weights, held.conv_bias, held.from);
    stage.wait_for_project(b);
    __syncthreads();
    stage.project(b, words_sums, flag);
    stage.gather_sums(words_sums, flag);
    __syncthreads();
    stage.finish(held.project_vectors[0], last, words.of_block(b + 1), words.flag(b + 1));
    stage.load_project_vectors(held.project_vectors, held.from);
  }
  leave(words.workspace, words.flag(t.blocks - 1));
#endif
}

}  // namespace convfirst::block_fusion::sm90
