// The split path's linear layers in large tiles: one block a multiprocessor walks over its tiles, and the copies of the next
// tile's slices run under this one's epilogue.
//
//            K                          N
//        +--------+               +-----------+
//      M |  A     |  W [N x K]    |  8 warps  |   expand:  h = act(A W^T + bias)
//        | slices |  ---------->  |           |   project: y = x + scale (A W^T + bias)
//        +--------+               +-----------+
//
//   A and W slices of 64     shared, ring of stages    stages x (tile_m + tile_n) x 64, 16-byte chunks swizzled by row
//   x                        shared, a warp's own      slots x 16 x a warp's columns, of the projection
//   bias and scale           shared, of two tiles      2 x tile_n, twice for the projection
//   result                   registers, fp32           a warp's rows x columns
//   fragments                registers                 two m16 blocks of A, every column of W
//
// Results go from registers to device memory: W's rows lie permuted in a slice, so that a lane's columns are neighbours. In the expansion's tiles of
// 128 x 256 there are registers to hold a tile's rounded sums, whose activation (Word) and stores run under the next tile's products; where W's
// tile is the ring's whole W and the block's tiles lie below each other, it stays. Larger tiles read W and A less often: the sums begin with the
// bias, and the activation of the first rows runs under the last slice: it is multiplied two row blocks at a time, and what is finished is activated
// and stored between the next two's products.
//
// With warps_k = 2 two groups of warps each hold the whole tile and half of every slice's k: large warp tiles read shared
// memory less often, and a tile of 128 columns still has two warps a scheduler. Their sums meet in the ring.
#pragma once

#include <type_traits>

#include "../common/again.cuh"
#include "../common/ptx.cuh"
#include "launch_sm80.h"
#include "matmul_stage_sm80.cuh"
#include "word_sm80.cuh"

namespace convfirst::block_fusion::sm80 {

// n8 blocks of the expansion's result that a lane stores at once: 16 bytes, or 8 where a warp's columns are no multiple of 32.
constexpr int group_blocks(int column_blocks) { return column_blocks % 4 == 0 ? 4 : 2; }

// The column, within a group, that lies at a place of the product, so that a lane (2 columns of each n8 block) gets neighbours.
template <int kBlocks>
__device__ __forceinline__ int column_at(int place) {
  return place % 8 / 2 * (2 * kBlocks) + place / 8 * 2 + place % 2;
}

// Copies slices of A and W in the order in which the block multiplies them, tile after tile. Every thread keeps its place: a
// 16-byte column of the slice and every kDown-th row.
//
// kStays: W's tile is the ring's whole W, and stays there (load_w), since all the block's tiles lie below each other. Larger tiles
// have one kernel: W's copies are issued there, and not wanted.
template <typename T, int kTile, bool kProject, bool kStays>
struct SliceLoader {
  static constexpr PersistentTile kShape = persistent_tile(kTile);
  static constexpr int kGroup = group_blocks(kShape.column_blocks());
  static constexpr int kDown = kShape.threads() / 8;
  static constexpr int kRowsA = kShape.m / kDown, kRowsW = kShape.n / kDown;
  static constexpr int kCopies = kStays ? kRowsA : kRowsA + kRowsW;  // a thread and slice
  static_assert(kShape.m % kDown == 0 && kShape.n % kDown == 0 && kDown % 32 == 0, "threads tile the slice");

  const LinearParams& p;
  const char* a;
  const char* weight;
  int rows, columns;  // that exist from this thread's row on
  int tile, k;        // where the next slice begins
  bool fetches;       // W; not where the ring has held all of it since the block's first tile, and the others lie below that one
  uint32_t destination;

  __device__ __forceinline__ explicit SliceLoader(const LinearParams& params) : p(params), tile(blockIdx.x), k(0) {
    const int row = threadIdx.x / 8, chunk = threadIdx.x % 8;
    destination = row * 128 + (chunk ^ row % 8) * 16;
    seek();
  }

  // To the first slice of `tile`; beyond the last tile nothing exists.
  __device__ __forceinline__ void seek() {
    const int row = threadIdx.x / 8;
    const int tiles_n = (p.columns + kShape.n - 1) / kShape.n;
    const int column = row / (8 * kGroup) * (8 * kGroup) + column_at<kGroup>(row % (8 * kGroup));
    const int first_row = tile / tiles_n * kShape.m + row, first_column = tile % tiles_n * kShape.n + column;
    rows = p.rows - first_row;
    columns = rows + row > 0 ? p.columns - first_column : 0;
    const bool whole = p.depth > (kShape.stages - 1) * kShape.depth && p.depth <= kShape.stages * kShape.depth;
    fetches = kProject || kShape.defers() || !whole || p.grid % tiles_n != 0 || tile == static_cast<int>(blockIdx.x);
    const int chunk = threadIdx.x % 8 * 16;
    a = static_cast<const char*>(p.a) + static_cast<size_t>(first_row) * p.depth * sizeof(T) + chunk;
    weight = static_cast<const char*>(p.weight) + static_cast<size_t>(first_column) * p.depth * sizeof(T) + chunk;
  }

  __device__ __forceinline__ bool inside() const { return k + static_cast<int>(threadIdx.x) % 8 * 8 < p.depth; }
  __device__ __forceinline__ int64_t step() const { return p.depth * kDown * static_cast<int>(sizeof(T)); }

  // The thread's i-th copy of the slice; i is a constant once loops are unrolled.
  __device__ __forceinline__ void copy(uint32_t stage, int i) const {
    if (i >= kRowsA) return copy_w(stage, i - kRowsA);
    ptx::cp_async16(stage + destination + i * kDown * 128, a + step() * i, inside() && i * kDown < rows);
  }

  __device__ __forceinline__ void copy_w(uint32_t stage, int i) const {
    const uint32_t to = stage + destination + (kShape.m + i * kDown) * 128;
    const bool valid = inside() && i * kDown < columns;
    if constexpr (kProject || kShape.defers()) {
      ptx::cp_async16(to, weight + step() * i, valid);
    } else {
      again::copy_async_128_if(to, weight + step() * i, valid, fetches);
    }
  }

  __device__ __forceinline__ void load_w(uint32_t stage) const {
#pragma unroll
    for (int i = 0; i < kRowsW; ++i) copy_w(stage, i);
  }

  __device__ __forceinline__ void advance() {
    k += kShape.depth;
    a += kShape.depth * sizeof(T);
    weight += kShape.depth * sizeof(T);
    if (k >= p.depth) {
      k = 0;
      tile += p.grid;
      seek();
    }
  }
};

// Stage after stage of the ring.
template <int kStages, int kBytes>
__device__ __forceinline__ uint32_t next_stage(uint32_t stage, uint32_t ring) {
  return stage == ring + (kStages - 1) * kBytes ? ring : stage + kBytes;
}

// A warp's operands: A's m16 blocks alternate between two places; W's columns are replaced one by one under the last block of
// a k16 step, each as soon as its last product is issued, so the next step finds them there.
template <typename T, int kTile>
struct WarpProduct {
  static constexpr PersistentTile kShape = persistent_tile(kTile);
  static constexpr int kRows = kShape.row_blocks(), kColumns = kShape.column_blocks();
  static constexpr int kSteps = kShape.depth / 16 / kShape.warps_k;
  static_assert(kRows % 2 == 0 && kColumns % 2 == 0, "two places for A, W in pairs");
  uint32_t a[2][4], w[kColumns / 2][4];
  uint32_t a_offset, w_offset;

  __device__ __forceinline__ WarpProduct() {
    constexpr PersistentTile shape = persistent_tile(kTile);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first_k = shape.warp_k(warp) * kSteps * 32;
    const int row = shape.warp_m(warp) * kRows * 16 + lane % 16;
    const int column = shape.warp_n(warp) * kColumns * 8 + lane % 8 + lane / 16 * 8;
    a_offset = (row * 128 + (lane / 16 ^ lane % 8) * 16) ^ first_k;
    w_offset = ((kShape.m + column) * 128 + (lane / 8 % 2 ^ lane % 8) * 16) ^ first_k;
  }

  // The 128-byte rows of a stage begin at multiples of 128, so a k16 step flips address bits 5 and 6 only.
  __device__ __forceinline__ void load_a(uint32_t stage, int step, int m) {
    ptx::ldmatrix_x4(a[m % 2], ((stage + a_offset) ^ (step * 32)) + m * 16 * 128);
  }

  __device__ __forceinline__ void load_w(uint32_t stage, int step, int n) {
    ptx::ldmatrix_x4(w[n], ((stage + w_offset) ^ (step * 32)) + n * 16 * 128);
  }

  __device__ __forceinline__ void begin(uint32_t stage) {
    load_a(stage, 0, 0);
#pragma unroll
    for (int n = 0; n < kColumns / 2; ++n) load_w(stage, 0, n);
  }

  // acc += a slice's product. turn() ends the slice: on its return the next one, at the address it gives, may be read.
  // copies(i, of) runs the i-th of `of` shares of the copies, share(i) the i-th of kPairs of other work, after a pair of products.
  static constexpr int kPairs = kSteps * kRows * kColumns / 2;
  template <typename Copies, typename Turn, typename Share>
  __device__ __forceinline__ uint32_t slice(float (&acc)[kRows][kColumns][4], uint32_t stage, Copies copies, Turn turn, Share share) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        const bool last = m == kRows - 1;
        copies(step * kRows + m, kSteps * kRows);
        if (last && step == kSteps - 1) stage = turn();
        load_a(stage, last ? (step + 1) % kSteps : step, (m + 1) % kRows);
#pragma unroll
        for (int n = 0; n < kColumns / 2; ++n) {
          ptx::mma_16816<T>(acc[m][2 * n], a[m % 2], w[n][0], w[n][1]);
          ptx::mma_16816<T>(acc[m][2 * n + 1], a[m % 2], w[n][2], w[n][3]);
          if (last) load_w(stage, (step + 1) % kSteps, n);
          share((step * kRows + m) * (kColumns / 2) + n);
        }
      }
    return stage;
  }

  // The tile's last slice, two row blocks at a time, so that these are complete one after another: share(m, i) runs the i-th of kShares shares
  // of what is left to do with row block m, under the products of the next two, the last two's alone. W is read once more for every two row
  // blocks: shared memory is then as busy as the tensor cores.
  static constexpr int kShares = 2 * kColumns;
  template <typename Copies, typename Turn, typename Share>
  __device__ __forceinline__ uint32_t last_slice(float (&acc)[kRows][kColumns][4], uint32_t stage, Copies copies, Turn turn, Share share) {
    static_assert(kSteps * kColumns == 2 * kShares, "a share every two products");
#pragma unroll
    for (int rows = 0; rows < kRows / 2; ++rows) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int m = 2 * rows + half, next_step = (step + half) % kSteps;
          const bool turns = half == 1 && step == kSteps - 1, ends = turns && rows == kRows / 2 - 1;
          copies((rows * kSteps + step) * 2 + half, kSteps * kRows);
          if (ends) stage = turn();
          load_a(stage, next_step, ends ? 0 : turns ? m + 1 : 2 * rows + 1 - half);
#pragma unroll
          for (int n = 0; n < kColumns / 2; ++n) {
            ptx::mma_16816<T>(acc[m][2 * n], a[half], w[n][0], w[n][1]);
            ptx::mma_16816<T>(acc[m][2 * n + 1], a[half], w[n][2], w[n][3]);
            if (half == 1) load_w(stage, next_step, n);
            const int i = (step * 2 + half) * (kColumns / 2) + n;
            if (rows > 0) share(2 * (rows - 1) + i / kShares, i % kShares);
          }
        }
    }
#pragma unroll
    for (int i = 0; i < 2 * kShares; ++i) share(kRows - 2 + i / kShares, i % kShares);
    return stage;
  }
};

// The two halves of k: each warp keeps half of its row blocks, moved to the first places, and adds what its partner has of them.
template <int kThreads, int kRows, int kColumns>
__device__ __forceinline__ void sum_over_k(float (&acc)[kRows][kColumns][4], unsigned char* ring, int thread) {
  constexpr int kKeep = kRows / 2, kPartner = kThreads / 2;
  const bool half = thread >= kPartner;
  float4* box = reinterpret_cast<float4*>(ring);
  ptx::cp_async_wait<0>();
  __syncthreads();  // nothing reads the ring or is on its way to it
#pragma unroll
  for (int m = 0; m < kKeep; ++m)
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const float(&low)[4] = acc[m][n];
      const float(&high)[4] = acc[m + kKeep][n];
      box[(m * kColumns + n) * kThreads + thread] = half ? make_float4(low[0], low[1], low[2], low[3])
                                                              : make_float4(high[0], high[1], high[2], high[3]);
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][n][i] = half ? high[i] : low[i];
    }
  __syncthreads();
  const int partner = half ? thread - kPartner : thread + kPartner;
#pragma unroll
  for (int m = 0; m < kKeep; ++m)
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const float4 other = box[(m * kColumns + n) * kThreads + partner];
      acc[m][n][0] += other.x;
      acc[m][n][1] += other.y;
      acc[m][n][2] += other.z;
      acc[m][n][3] += other.w;
    }
}

// Neither: the whole epilogue after the last slice.
struct NoWord {};

// A lane's part of 16 rows of the expansion's result: words of two channels, kGroup of which are neighbours.
template <typename T, int kColumns>
struct ExpandedBlock {
  static constexpr int kGroup = group_blocks(kColumns), kWords = 2 * kColumns;
  T* output;
  int row, rows;  // the lane's first, and the tensor's
  int channel, channels;

  // The n8 block and the half of its rows that a word is of.
  static constexpr int block_of(int word) { return word / (2 * kGroup) * kGroup + word % kGroup; }
  static constexpr int half_of(int word) { return word / kGroup % 2; }

  // The words up to the `last`-th, which is the last one of its group.
  __device__ __forceinline__ void store(int last, const uint32_t (&words)[kGroup]) const {
    const int r = row + half_of(last) * 8, c = channel + last / (2 * kGroup) * 8 * kGroup;
    const bool exists = r < rows && c < channels;
    T* to = output + static_cast<size_t>(r) * channels + c;
    if constexpr (kGroup == 4) {
      again::store_128_if(to, make_uint4(words[0], words[1], words[2], words[3]), exists);
    } else {
      again::store_64_if(to, words[0], words[1], exists);
    }
  }

  template <typename Function>
  __device__ __forceinline__ void put(const float (&acc)[kColumns][4], Function function) const {
    uint32_t words[kGroup];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const float(&sums)[4] = acc[block_of(i)];
      words[i % kGroup] = function(ptx::pack2<T>(sums[2 * half_of(i)], sums[2 * half_of(i) + 1]));
      if (i % kGroup == kGroup - 1) store(i, words);
    }
  }

  __device__ __forceinline__ void put_activated(float (&acc)[kColumns][4], int activation) const {
    if (std::is_same_v<T, __half> && activation == static_cast<int>(Activation::kGelu)) {
      put(acc, [](uint32_t v) { return half2::gelu(v); });
    } else {
      activate(reinterpret_cast<float(&)[1][kColumns][4]>(acc), activation);
      put(acc, [](uint32_t v) { return v; });
    }
  }
};

// Halves of a tile's sums, rounded to 16 bits, whose activation and stores run under the next tile's products. A lane's words of an m16 block: those
// of its first row, of eight channels each four, then of the second.
template <typename T, typename Word, int kRows, int kColumns>
struct HeldTile {
  static constexpr int kGroup = 4, kGroups = kColumns / kGroup;
  static constexpr int kWords = kRows * 2 * kColumns;
  static constexpr int kLag = 2;  // words under way
  static_assert(group_blocks(kColumns) == kGroup, "16 bytes a store");
  uint32_t held[kWords] = {}, done[kGroup];
  Word word[kLag + 1];
  T* output;          // of the lane's next row
  int rows[kGroups];  // that exist from the lane's first one on, 0 where the channels don't or nothing is held

  __device__ __forceinline__ void forget() {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) rows[group] = 0;
  }

  // bias: of the lane's columns.
  __device__ __forceinline__ void take(const float (&acc)[kRows][kColumns][4], const float* bias, const ExpandedBlock<T, kColumns>& first) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const float2 b = *reinterpret_cast<const float2*>(bias + n / kGroup * 8 * kGroup + n % kGroup * 2);
      const float low = 0.5f * b.x, high = 0.5f * b.y;
#pragma unroll
      for (int m = 0; m < kRows; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          held[(m * 2 + half) * kColumns + n] = ptx::pack2<T>(fmaf(acc[m][n][2 * half], 0.5f, low), fmaf(acc[m][n][2 * half + 1], 0.5f, high));
    }
    output = first.output + static_cast<size_t>(first.row) * first.channels + first.channel;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) rows[group] = first.channel + group * 8 * kGroup < first.channels ? first.rows - first.row : 0;
  }

  __device__ __forceinline__ void finish(int i, int leading) {
    done[i % kGroup] = word[i % (kLag + 1)].template value<T>();
    if (i % kGroup < kGroup - 1) return;
    const int group = i % kColumns / kGroup;
    again::store_128_below(output + group * 8 * kGroup, make_uint4(done[0], done[1], done[2], done[3]), i / kColumns * 8, rows[group]);
    if (group == kGroups - 1) output += 8 * leading;
  }

  // The i-th word begins, the one kLag before it is finished; of a row of `leading` channels.
  __device__ __forceinline__ void step(int i, int leading) {
    if (i >= kLag) finish(i - kLag, leading);
    if (i < kWords) word[i % (kLag + 1)].template begin<T>(held[i]);
  }
};

// 16 rows of a warp's part of the projection's result by 8 * kColumns channels, x's in shared memory of its own. `lane` is read where the block is
// used: kept across the main loop, the addresses made from it cost registers that the accumulators need.
template <typename T, int kColumns>
struct ResultBlock {
  static constexpr int kPitch = result_pitch(kColumns), kChunks = kColumns / 2;
  unsigned char* slot;
  int lane;
  int row, rows;  // its first, and the tensor's
  int channel, channels;

  // Starts copying x into the slot; the caller commits.
  __device__ __forceinline__ void load(const T* x) const {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int chunk = lane + i * 32, r = chunk / kColumns, c = chunk % kColumns * 8;
      const bool exists = row + r < rows && channel + c < channels;
      const T* from = x + static_cast<size_t>(row + r) * channels + channel + c;
      ptx::cp_async16(ptx::smem_address(slot + r * kPitch + c * 2), exists ? from : x, exists);
    }
  }

  // y = x + sample_scale * (scale * acc + shift), rounded once; see project_scale. A lane's channels are 2 * kGroup neighbours of kGroup n8 blocks.
  __device__ __forceinline__ void finish(T* y, const float (&acc)[kColumns][4], const float* scale, const float* shift, const float* sample_scale,
                                         int image_pixels) const {
    constexpr int kGroup = group_blocks(kColumns);
    using Words = std::conditional_t<kGroup == 4, uint4, uint2>;
    float sample[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pixel = row + half * 8 + lane / 4;
      sample[half] = sample_scale && pixel < rows ? sample_scale[pixel / image_pixels] : 1.f;
    }
#pragma unroll
    for (int group = 0; group < kColumns / kGroup; ++group) {
      const int c = (group * 4 + lane % 4) * 2 * kGroup;
      Words words[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) words[half] = *reinterpret_cast<const Words*>(slot + (half * 8 + lane / 4) * kPitch + c * 2);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const float2 s = *reinterpret_cast<const float2*>(scale + c + 2 * j), b = *reinterpret_cast<const float2*>(shift + c + 2 * j);
        const float(&sums)[4] = acc[group * kGroup + j];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t& word = reinterpret_cast<uint32_t*>(&words[half])[j];
          const float2 x = ptx::unpack2<T>(word);
          word = ptx::pack2<T>(fmaf(sample[half], fmaf(sums[2 * half], s.x, b.x), x.x), fmaf(sample[half], fmaf(sums[2 * half + 1], s.y, b.y), x.y));
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int pixel = row + half * 8 + lane / 4;
        T* const to = y + static_cast<size_t>(pixel) * channels + channel + c;
        const bool exists = pixel < rows && channel + c < channels;
        if constexpr (kGroup == 4) {
          again::store_128_if(to, words[half], exists);
        } else {
          again::store_64_if(to, words[half].x, words[half].y, exists);
        }
      }
    }
  }
};

// Word: how the expansion's activation runs under products: the next tile's, or its last slice's but for the last rows'; NoWord: it doesn't.
// kStays: of SliceLoader.
template <typename T, int kTile, bool kProject, typename Word, bool kStays>
__global__ void __launch_bounds__(persistent_tile(kTile).threads(), 1)
    linear_persistent_fwd_sm80(const __grid_constant__ LinearParams p) {
  constexpr PersistentTile kShape = persistent_tile(kTile);
  constexpr int kRows = kShape.row_blocks(), kColumns = kShape.column_blocks(), kThreads = kShape.threads();
  constexpr int kFinished = kRows / kShape.warps_k;  // row blocks whose result this warp stores
  constexpr int kSlots = kShape.x_slots;
  constexpr bool kDefers = !std::is_same_v<Word, NoWord> && kShape.defers();
  constexpr bool kOverlaps = !std::is_same_v<Word, NoWord> && !kDefers;
  using Result = ResultBlock<T, kColumns>;
  using Expanded = ExpandedBlock<T, kColumns>;
  extern __shared__ __align__(128) unsigned char smem[];
  const int tiles_n = (p.columns + kShape.n - 1) / kShape.n, tiles = (p.rows + kShape.m - 1) / kShape.m * tiles_n;
  const int slices = (p.depth + kShape.depth - 1) / kShape.depth;
  const uint32_t ring = ptx::smem_address(smem);
  const auto vectors_of = [&](int side) {
    return reinterpret_cast<float*>(smem + kShape.vectors_offset(kProject)) + side * kShape.n * (kProject ? 2 : 1);
  };
  auto load_bias = [&](int tile, float* to) {
    for (int c = threadIdx.x; c < kShape.n; c += kThreads) {
      const int column = tile % tiles_n * kShape.n + c;
      const bool inside = p.bias != nullptr && column < p.columns;
      ptx::cp_async4(ptx::smem_address(to + c), inside ? static_cast<const void*>(p.bias + column) : p.a, inside);
    }
  };
  if constexpr (!kProject) load_bias(blockIdx.x, vectors_of(0));  // and from then on a tile ahead

  SliceLoader<T, kTile, kProject, kStays> loader(p);
  uint32_t write = ring, read = ring;
#pragma unroll
  for (int s = 0; s < kShape.stages - 1; ++s) {
#pragma unroll
    for (int i = 0; i < loader.kCopies; ++i) loader.copy(write, i);
    if constexpr (kStays) loader.load_w(write);
    if (!kStays || s < kShape.stages - 2) ptx::cp_async_commit();
    loader.advance();
    write = next_stage<kShape.stages, kShape.stage_bytes()>(write, ring);
  }
  if constexpr (kStays) {
    loader.load_w(write);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<kShape.stages - 2>();
  __syncthreads();
  WarpProduct<T, kTile> product;
  product.begin(read);

  auto copies = [&](int i, int of) {
#pragma unroll
    for (int c = 0; c < loader.kCopies; ++c)
      if (c * of / loader.kCopies == i) loader.copy(write, c);
  };
  // Every warp has read this slice and the next one is there; this one's place is written during the next.
  auto turn = [&] {
    ptx::cp_async_commit();
    loader.advance();
    ptx::cp_async_wait<kShape.stages - 2>();
    __syncthreads();
    write = next_stage<kShape.stages, kShape.stage_bytes()>(write, ring);
    return next_stage<kShape.stages, kShape.stage_bytes()>(read, ring);
  };
  auto first_row = [&](int tile, int m, int warp) {
    return tile / tiles_n * kShape.m + (kShape.warp_m(warp) * kRows + kShape.warp_k(warp) * kFinished + m) * 16;
  };
  auto expanded = [&](int tile, int m) {
    const int thread = again::thread_index(), warp = thread / 32;
    const int channel = tile % tiles_n * kShape.n + kShape.warp_n(warp) * kColumns * 8 + thread % 4 * 2 * Expanded::kGroup;
    return Expanded{static_cast<T*>(p.output), first_row(tile, m, warp) + thread % 32 / 4, p.rows, channel, p.columns};
  };
  auto result = [&](int tile, int m) {
    const int thread = again::thread_index(), warp = thread / 32;
    const int row = first_row(tile, m, warp);
    return Result{smem + kShape.result_offset() + (warp * kSlots + m % kSlots) * 16 * Result::kPitch, thread % 32, row, p.rows,
                  tile % tiles_n * kShape.n + kShape.warp_n(warp) * kColumns * 8, p.columns};
  };

  std::conditional_t<kDefers, HeldTile<T, Word, kRows, kColumns>, NoWord> before;
  const auto nothing = [](int) {};
  if constexpr (kDefers) before.forget();

  int side = 0;  // of the vectors: a fast warp fills the next tile's while a slow one reads this one's
  for (int tile = blockIdx.x; tile < tiles; tile += p.grid, side ^= 1) {
    float* vectors = vectors_of(side);
    if constexpr (kProject) {
      project_scale<kThreads>(p.t, tile % tiles_n * kShape.n, kShape.n, p.columns, vectors, vectors + kShape.n);
#pragma unroll
      for (int m = 0; m < kSlots && m < kFinished; ++m) result(tile, m).load(static_cast<const T*>(p.t.x));
    } else {
      if constexpr (!kDefers) load_bias(tile + p.grid, vectors_of(side ^ 1));
    }

    float acc[kRows][kColumns][4];
    const int at = again::thread_index();
    const float* bias = vectors + kShape.warp_n(at / 32) * kColumns * 8 + at % 4 * 2 * Expanded::kGroup;
    const bool begins = !kProject && !kDefers && kShape.warp_k(at / 32) == 0;  // one of the groups that share k
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      constexpr int kGroup = Expanded::kGroup;
      const float* pair = bias + n / kGroup * 8 * kGroup + n % kGroup * 2;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float start = begins ? pair[i % 2] : 0.f;
#pragma unroll
        for (int m = 0; m < kRows; ++m) acc[m][n][i] = start;
      }
    }
    if constexpr (kDefers) {  // half of the words in each of the first two slices
      constexpr int kPairs = WarpProduct<T, kTile>::kPairs;
      static_assert(kPairs == before.kWords, "a word every two pairs of products");
      read = product.slice(acc, read, copies, turn, [&](int i) {
        if (i % 2 == 1) before.step(i / 2, p.columns);
      });
      load_bias(tile + p.grid, vectors_of(side ^ 1));  // every warp has taken the tile before, which read what lies there
      read = product.slice(acc, read, copies, turn, [&](int i) {
        if (i % 2 == 1) before.step((kPairs + i) / 2, p.columns);
      });
#pragma unroll
      for (int i = 0; i < before.kLag; ++i) before.step(before.kWords + i, p.columns);
#pragma unroll 1
      for (int s = 2; s < slices; ++s) read = product.slice(acc, read, copies, turn, nothing);
      before.take(acc, bias, expanded(tile, 0));
      continue;
    } else {
#pragma unroll 1
      for (int s = kOverlaps ? 1 : 0; s < slices; ++s) read = product.slice(acc, read, copies, turn, nothing);
    }

    if (slices < kShape.stages - 1) {  // what the tile began with came with its first slice's copies, which may not be there yet
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      __syncthreads();
    }
    if constexpr (kOverlaps) {
      constexpr int kLag = 2, kLast = Expanded::kWords - 1;  // words under way
      static_assert(WarpProduct<T, kTile>::kShares == Expanded::kWords, "a word a share");
      Word word[kLag + 1];
      uint32_t words[Expanded::kGroup];
      auto finish = [&](int m, int i) {
        words[i % Expanded::kGroup] = word[i % (kLag + 1)].template value<T>();
        if (i % Expanded::kGroup == Expanded::kGroup - 1) expanded(tile, m).store(i, words);
      };
      // The i-th of a row block's words begins, the one kLag before it is finished.
      auto share = [&](int m, int i) {
        if (i >= kLag) finish(m, i - kLag);
        const float(&sums)[4] = acc[m][Expanded::block_of(i)];
        word[i % (kLag + 1)].template begin<T>(Word::template halves<T>(sums[2 * Expanded::half_of(i)], sums[2 * Expanded::half_of(i) + 1]));
        if (i < kLast) return;
#pragma unroll
        for (int rest = kLast - kLag + 1; rest <= kLast; ++rest) finish(m, rest);
      };
      read = product.last_slice(acc, read, copies, turn, share);
      continue;
    }
    const int thread = again::thread_index();
    if constexpr (kShape.warps_k == 2) sum_over_k<kThreads>(acc, smem, thread);
    const float* scale = vectors + kShape.warp_n(thread / 32) * kColumns * 8;
#pragma unroll
    for (int m = 0; m < kFinished; ++m) {
      if constexpr (!kProject) {
        expanded(tile, m).put_activated(acc[m], p.activation);
        continue;
      }
      const Result block = result(tile, m);
      if (m >= kSlots) {
        ptx::cp_async_wait<kSlots - 1>();
        __syncwarp();
      }
      block.finish(static_cast<T*>(p.output), acc[m], scale, scale + kShape.n, p.t.sample_scale, p.image_pixels);
      __syncwarp();  // before the slot is filled again
      if (m + kSlots < kFinished) result(tile, m + kSlots).load(static_cast<const T*>(p.t.x));
      ptx::cp_async_commit();
    }
  }
  ptx::cp_async_wait<0>();
  if constexpr (kDefers) {
#pragma unroll
    for (int i = 0; i < before.kWords + before.kLag; ++i) before.step(i, p.columns);
  }
}

}  // namespace convfirst::block_fusion::sm80
