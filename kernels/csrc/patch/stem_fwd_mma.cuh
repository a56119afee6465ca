// ConvFirst's stem in one launch, for sm_80 and newer: cp.async, ldmatrix, mma.sync m16n8k16; on Hopper conv2 by wgmma.
//
//      x, 35 rows of 37 pixels          mid, 17 x 17 pixels             y, 8 x 8 pixels
//    +---------------------+  3x3 / 2  +------------------+  3x3 / 2  +-----------+
//    | . . . . . . . . . . |---------->| act(rms w1 + b1) |---------->| rms w2 +b2|----> NHWC
//    | . 3 channels        |   K = 32  | zero outside the |  K = 9 M  |           |
//    | . . . . . . . . . . |           | image: padding   |           |           |
//    +---------------------+           +------------------+           +-----------+
//
//   what                        where                               size
//   conv2's matrix, vectors     shared, for all tiles               dim x 9 M, 3 dim floats
//   where conv1's rows lie      shared, for all tiles               304 words
//   x                           shared of a team, two slots         35 rows x 224 bytes
//   mid                         shared of a team                    17 rows x 17 or 20 slots x M
//   conv1's matrix, w1, b1      registers                           M / 2 words, M / 2 floats a thread
//   sums of both products       registers, fp32                     16 or 32 x M a warp; 32 x M (wgmma: 16 x 2 M)
//   sums of squares of y        shared of a team                    64 pixels x 2 warps (wgmma: a warp has whole pixels)
//
// A team is four warps with tiles of its own; teams of a block share the weights and nothing else. Where tiles are no more than multiprocessors,
// a crew of teams shares the tile up to mid. conv1's operand comes straight
// from the image: of a filter row, 9 values in a row (3 pixels x 3 channels) begin at an odd element, so the one before them
// is taken along with weight 0 and five aligned words make the row; words 5 dy + j, the sixteenth is (1, 1) and meets the
// bias. What the zero weight meets must be finite: a NaN in x reaches one more pixel than it would.
#pragma once

#include "../block_fusion/matmul_stage_sm80.cuh"
#include "../common/activation.cuh"
#include "../common/ptx.cuh"
#include "fragments.cuh"
#include "sync.cuh"
#include "tile.h"
#include "wgmma_sm90.cuh"

namespace convfirst::patch {

constexpr int kCrewBarrier = 15;

struct StemParams {
  Stem s;
  int mid_height, mid_width, out_height, out_width;
  int tiles, tiles_x, tiles_image;
  int teams, stride;  // teams of a block, of the grid
  int crew;           // teams that load and compute conv1 of one tile, the first of which does the rest; of several, a block has one crew
  bool aligned;       // rows of x in 16-byte pieces
};

namespace sm80 {

extern __shared__ __align__(128) unsigned char smem[];

struct StemTile {
  int image, row, column;  // of y
};

__device__ __forceinline__ StemTile stem_tile(const StemParams& p, int tile) {
  const int image = tile / p.tiles_image, rest = tile % p.tiles_image;
  return {image, rest / p.tiles_x * kStemTile, rest % p.tiles_x * kStemTile};
}

// Rows 4 row - 3 ... of x, elements 12 column - 16 ... of each (pixel times 3 plus channel), zeros outside the image.
template <typename T>
__device__ __forceinline__ void load_input(const StemParams& p, const StemTile& tile, unsigned char* to) {
  const Image& x = p.s.x;
  const T* image = static_cast<const T*>(x.data) + tile.image * x.stride_n;
  const int thread = threadIdx.x % kTeamThreads;
  const int first_row = 4 * tile.row - 3, first = 12 * tile.column - 16, width = 3 * x.width;
  if (p.aligned) {
    const uint32_t base = ptx::smem_address(to);
    int row = first_row + thread / kInputPieces, piece = thread % kInputPieces;
#pragma unroll
    for (int i = 0; i < kInputRows * kInputPieces; i += kTeamThreads) {
      const int element = first + piece * 8;
      // Below zero is above every size.
      const bool valid = static_cast<uint32_t>(row) < static_cast<uint32_t>(x.height) && static_cast<uint32_t>(element) < static_cast<uint32_t>(width);
      if (i + thread < kInputRows * kInputPieces)
        ptx::cp_async16(base + (i + thread) * 16, image + (valid ? row * static_cast<int>(x.stride_h) + element : 0), valid);
      row += kTeamThreads / kInputPieces;
      piece += kTeamThreads % kInputPieces;
      if (piece >= kInputPieces) {
        piece -= kInputPieces;
        ++row;
      }
    }
  } else {
#pragma unroll 8
    for (int i = thread; i < kInputRows * kInputPieces * 8; i += kTeamThreads) {
      const int row = first_row + i / (kInputPieces * 8), element = first + i % (kInputPieces * 8);
      const bool valid = row >= 0 && row < x.height && element >= 0 && element < width;
      T value = T(0.f);
      if (valid) value = image[row * x.stride_h + element / 3 * x.stride_w + element % 3 * x.stride_c];
      reinterpret_cast<T*>(to)[i] = value;
    }
  }
}

// silu of twice the value: its argument comes halved.
__device__ __forceinline__ float silu_of_half(float half) { return fmaf(half, ptx::tanh_approx(half), half); }

// What a thread keeps of conv1: its part of the matrix, and the affine part of its channels.
template <typename T, int kMid, bool kHopper>
struct Conv1 {
  static constexpr int kBlocks = kMid / 8, kVector = vector_blocks(kBlocks);
  uint32_t weight[kBlocks][2][2];
  float scale[kBlocks][2], shift[kBlocks][2];
  int words[4];  // byte offsets of the A operand's words, by step and half

  __device__ __forceinline__ explicit Conv1(const Stem& s) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      const uint32_t* row = static_cast<const uint32_t*>(s.conv1_weight) + channel_of(n, g, kVector) * 16;
#pragma unroll
      for (int i = 0; i < 4; ++i) weight[n][i / 2][i % 2] = __ldg(row + i * 4 + t);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int channel = channel_of(n, 2 * t + i, kVector);
        const float factor = s.activation == Activation::kSilu ? 0.5f : 1.f;  // see silu_of_half
        scale[n][i] = factor * __ldg(s.norm1_weight + channel);
        shift[n][i] = factor * __ldg(s.norm1_bias + channel);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int word = i * 4 + t;
      words[i] = word < 15 ? word / 5 * kInputPitch + word % 5 * 4 : 0;
    }
  }

  // kRows m16 blocks of mid, `step` blocks apart.
  template <int kRows>
  __device__ __forceinline__ void operator()(const Stem& s, const uint32_t* table, int block, int step, const unsigned char* input,
                                             unsigned char* mid) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float acc[kRows][kBlocks][4];
    int to[kRows][2];
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      uint32_t a[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t entry = table[(block + m * step) * 16 + half * 8 + g];
        const unsigned char* from = input + (entry & 0xffffu);
        to[m][half] = static_cast<int>(entry >> 16) * 16;
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i / 2][i % 2 * 2 + half] = *reinterpret_cast<const uint32_t*>(from + words[i]);
        if (t == 3) a[1][2 + half] = ptx::pack2<T>(1.f, 1.f);
      }
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[m][n][i] = 0.f;
#pragma unroll
        for (int k = 0; k < 2; ++k) ptx::mma_16816<T>(acc[m][n], a[k], weight[n][k][0], weight[n][k][1]);
      }
    }
    float sums[kRows][2];
#pragma unroll
    for (int m = 0; m < kRows; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < kBlocks; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) sum = fmaf(acc[m][n][2 * half + i], acc[m][n][2 * half + i], sum);
        sums[m][half] = sum;
      }
#pragma unroll
    for (int m = 0; m < kRows; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = quad_sum(sums[m][half]);
        const float inverse = s.has_norm ? rsqrtf(sum * (1.f / kMid) + s.eps1) : 1.f;
#pragma unroll
        for (int n = 0; n < kBlocks; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            acc[m][n][2 * half + i] = fmaf(acc[m][n][2 * half + i], inverse * scale[n][i], shift[n][i]);
      }
    if (s.activation == Activation::kSilu) {
#pragma unroll
      for (int m = 0; m < kRows; ++m)
#pragma unroll
        for (int i = 0; i < 4 * kBlocks; ++i) acc[m][i / 4][i % 4] = silu_of_half(acc[m][i / 4][i % 4]);
    } else {
      block_fusion::sm80::activate(acc, static_cast<int>(s.activation));
    }
#pragma unroll
    for (int m = 0; m < kRows; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int n = 0; n < kBlocks; n += kVector) {
          uint32_t packed[kVector];
#pragma unroll
          for (int j = 0; j < kVector; ++j) packed[j] = ptx::pack2<T>(acc[m][n + j][2 * half], acc[m][n + j][2 * half + 1]);
          const int channel = n * 8 + t * 2 * kVector;
          store_words<kVector>(mid + to[m][half] + channel / 8 * mid_layout(kMid, kHopper).piece + channel % 8 * 2, packed);
        }
  }
};

// mid is zero where its image has no pixel.
template <int kMid, bool kHopper>
__device__ __forceinline__ void clear_outside(const StemParams& p, const StemTile& tile, unsigned char* mid) {
  constexpr int kPieces = kMid / 8;
  for (int i = threadIdx.x % kTeamThreads; i < kMidPixels * kPieces; i += kTeamThreads) {
    const int pixel = i / kPieces, r = pixel / kMidSide, c = pixel % kMidSide;
    const int row = 2 * tile.row - 1 + r, column = 2 * tile.column - 1 + c;
    if (row >= 0 && row < p.mid_height && column >= 0 && column < p.mid_width) continue;
    constexpr MidLayout kMidLayout = mid_layout(kMid, kHopper);
    *reinterpret_cast<uint4*>(mid + kMidLayout.slot(r, c) * kMidLayout.pixel + i % kPieces * kMidLayout.piece) =
        make_uint4(0u, 0u, 0u, 0u);
  }
}

// conv2's matrix to shared memory, its columns permuted (see channel_of); the caller commits.
template <typename T, int kMid, bool kHopper>
__device__ __forceinline__ void load_weight(const Stem& s, unsigned char* to, int threads) {
  constexpr int kPieces = 9 * kMid / 8, kPart = kHopper ? 2 * kMid : kMid, kVector = vector_blocks(kPart / 8);
  for (int i = threadIdx.x; i < 2 * kMid * kPieces; i += threads) {
    const int row = i / kPieces, piece = i % kPieces;
    const int channel = row / kPart * kPart + channel_of(row % kPart / 8, row % 8, kVector);
    const int place = kHopper ? (piece * 2 * kMid + row) * 16 : row * row_bytes(9 * kMid) + piece * 16;
    ptx::cp_async16(ptx::smem_address(to + place), static_cast<const T*>(s.conv2_weight) + static_cast<size_t>(channel) * 9 * kMid + piece * 8,
                    true);
  }
}

// acc = the 3x3 convolution of stride 2 of mid: 32 pixels (four rows of the tile) and half of the channels a warp.
template <typename T, int kMid>
__device__ __forceinline__ void conv2_mma(float (&acc)[2][kMid / 8][4], uint32_t mid, uint32_t weight, int warp) {
  constexpr MidLayout kLayout = mid_layout(kMid, false);
  constexpr int kBlocks = kMid / 8, kPitch = kLayout.pixel, kRow = kLayout.row_slots * kPitch, kWeightPitch = row_bytes(9 * kMid);
  const int lane = threadIdx.x % 32;
  const uint32_t a_base = mid + warp % 2 * 8 * kRow + lane % 16 / 8 * 2 * kRow + lane % 8 * kPitch + lane / 16 * 16;
  const uint32_t b_base = weight + warp / 2 * kMid * kWeightPitch + block_fusion::sm80::b_lane_offset(kWeightPitch);
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][n][i] = 0.f;
#pragma unroll 1
  for (int dy = 0; dy < 3; ++dy)
#pragma unroll
    for (int dx = 0; dx < 3; ++dx)
#pragma unroll
      for (int k = 0; k < kMid / 16; ++k) {
        uint32_t a[2][4];
        const uint32_t from = a_base + dy * kRow + (dx == 1 ? kLayout.odd_slot : dx / 2) * kPitch + k * 32;
#pragma unroll
        for (int m = 0; m < 2; ++m) ptx::ldmatrix_x4(a[m], from + m * 4 * kRow);
#pragma unroll
        for (int n = 0; n < kBlocks / 2; ++n) {
          uint32_t b[4];
          ptx::ldmatrix_x4(b, b_base + n * 16 * kWeightPitch + ((dy * 3 + dx) * kMid + k * 16) * 2);
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            ptx::mma_16816<T>(acc[m][2 * n], a[m], b[0], b[1]);
            ptx::mma_16816<T>(acc[m][2 * n + 1], a[m], b[2], b[3]);
          }
        }
      }
}

// The same by the team together: 16 pixels (two rows) and all channels a warp.
template <typename T, int kMid>
__device__ __forceinline__ void conv2_wgmma(float (&acc)[1][kMid / 4][4], uint32_t mid, uint32_t weight) {
  constexpr MidLayout kLayout = mid_layout(kMid, true);
  constexpr int kBlocks = kMid / 4, kPiece = 2 * kMid * 16;
  const uint64_t a_base = plain_descriptor(warp_uniform(mid), kLayout.piece, 2 * kLayout.row_slots * 16);
  const uint64_t b_base = plain_descriptor(weight, kPiece, 128);
  wgmma_begin();
#pragma unroll
  for (int dy = 0; dy < 3; ++dy)
#pragma unroll
    for (int dx = 0; dx < 3; ++dx)
#pragma unroll
      for (int k = 0; k < kMid / 16; ++k) {
        const int slot = dy * kLayout.row_slots + (dx == 1 ? kLayout.odd_slot : dx / 2);
        const uint64_t a = advanced(a_base, slot * 16 + 2 * k * kLayout.piece);
        const uint64_t b = advanced(b_base, ((dy * 3 + dx) * kMid / 8 + 2 * k) * kPiece);
#pragma unroll
        for (int n = 0; n + 8 <= kBlocks; n += 8) wgmma<T, 8>(&acc[0][n], a, advanced(b, n * 128), dy + dx + k > 0);
        if constexpr (kBlocks % 8 != 0)
          wgmma<T, 4>(&acc[0][kBlocks / 8 * 8], a, advanced(b, kBlocks / 8 * 1024), dy + dx + k > 0);
      }
  wgmma_commit();
  wgmma_wait<0>();
}

template <typename T, int kMid, bool kHopper>
__global__ void __launch_bounds__(max_teams(kMid, kHopper) * kTeamThreads, 1) stem_fwd(const __grid_constant__ StemParams p) {
  constexpr StemLayout kLayout = stem_layout(kMid, kHopper);
  constexpr MidLayout kMidLayout = mid_layout(kMid, kHopper);
  // A warp has 16 kRows pixels and 8 kBlocks channels of y.
  constexpr int kDim = 2 * kMid, kRows = kHopper ? 1 : 2, kBlocks = kHopper ? kMid / 4 : kMid / 8, kVector = vector_blocks(kBlocks);
  constexpr int kPairs = kMid <= 32 ? 2 : 1;
  const Stem& s = p.s;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int part = threadIdx.x / kTeamThreads, warp = threadIdx.x % kTeamThreads / 32, threads = p.teams * p.crew * kTeamThreads;
  const int team = p.crew > 1 ? 0 : part, helper = p.crew > 1 ? part : 0;
  const int barrier = p.crew > 1 ? kCrewBarrier : team + 1, members = p.crew * kTeamThreads;
  uint32_t* table = reinterpret_cast<uint32_t*>(smem + kLayout.table);
  float* vectors = reinterpret_cast<float*>(smem + kLayout.vectors);
  unsigned char* mine = smem + kLayout.teams + team * kLayout.team_bytes;
  unsigned char* mid = mine + kLayout.mid;
  float* moments = reinterpret_cast<float*>(mine + kLayout.moments);

  for (int i = threadIdx.x; i < 16 * kMidBlocks; i += threads) {
    const int r = i / kMidSide, c = i % kMidSide;
    const int from = i < kMidPixels ? 2 * r * kInputPitch + (3 + 3 * c) * 4 : 0;
    const int slot = i < kMidPixels ? kMidLayout.slot(r, c) : kMidLayout.spare_slot;
    table[i] = static_cast<uint32_t>(from) | static_cast<uint32_t>(slot * kMidLayout.pixel / 16) << 16;
  }
  wait_for_inputs<kHopper>();
  launch_dependents<kHopper>();
  int tile = blockIdx.x * p.teams + team, slot = 0;
  StemTile at = stem_tile(p, tile);
  if (tile < p.tiles && helper == 0) load_input<T>(p, at, mine + kLayout.input);
  load_weight<T, kMid, kHopper>(s, smem + kLayout.weight, threads);
  for (int i = threadIdx.x; i < kDim; i += threads) {
    vectors[i] = s.conv2_bias[i];
    vectors[kDim + i] = s.norm2_weight[i];
    vectors[2 * kDim + i] = s.norm2_bias[i];
  }
  const Conv1<T, kMid, kHopper> conv1(s);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  if constexpr (kHopper) fence_for_wgmma();
  __syncthreads();  // the weights are there

  const int warp_m = kHopper ? warp : warp % 2, warp_n = kHopper ? 0 : warp / 2;
  for (; tile < p.tiles; tile += p.stride, slot ^= 1) {
    ptx::cp_async_wait<0>();
    team_barrier(barrier, members);  // x is there, and every warp is done with mid and with the other slot
    const StemTile next = stem_tile(p, tile + p.stride);
    if (tile + p.stride < p.tiles && helper == 0) load_input<T>(p, next, mine + kLayout.input + (slot ^ 1) * kLayout.input_slot);
    ptx::cp_async_commit();

    const unsigned char* input = mine + kLayout.input + slot * kLayout.input_slot;
    const int warps = 4 * p.crew;
    for (int b = (warp + team) % 4 + 4 * helper; b < kMidBlocks; b += warps * kPairs) {
      if (kPairs == 2 && b + warps < kMidBlocks) {
        conv1.template operator()<kPairs>(s, table, b, warps, input, mid);
      } else {
        conv1.template operator()<1>(s, table, b, warps, input, mid);
      }
    }
    if constexpr (kHopper) fence_for_wgmma();
    team_barrier(barrier, members);  // mid is there
    if (helper > 0) {
      at = next;
      continue;
    }
    if (at.row == 0 || at.column == 0 || 2 * (at.row + kStemTile) > p.mid_height || 2 * (at.column + kStemTile) > p.mid_width) {
      clear_outside<kMid, kHopper>(p, at, mid);
      if constexpr (kHopper) fence_for_wgmma();
      team_barrier(team + 1, kTeamThreads);
    }

    float acc[kRows][kBlocks][4];
    if constexpr (kHopper) {
      conv2_wgmma<T, kMid>(acc, ptx::smem_address(mid), ptx::smem_address(smem + kLayout.weight));
    } else {
      conv2_mma<T, kMid>(acc, ptx::smem_address(mid), ptx::smem_address(smem + kLayout.weight), warp);
    }

    // Channels of a thread: groups of 2 kVector in a row, from here on.
    const float* mine_of = vectors + warp_n * kMid + t * 2 * kVector;
    float squares[kRows][2] = {};
#pragma unroll
    for (int n = 0; n < kBlocks; n += kVector) {
      float bias[2 * kVector];
      load_floats(bias, mine_of + n * 8);
#pragma unroll
      for (int j = 0; j < 2 * kVector; ++j)
#pragma unroll
        for (int m = 0; m < kRows; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& v = acc[m][n + j / 2][2 * half + j % 2];
            v += bias[j];
            squares[m][half] = fmaf(v, v, squares[m][half]);
          }
    }
    float inverse[kRows][2];
    if (s.has_norm && !kHopper) {
#pragma unroll
      for (int i = 0; i < 2 * kRows; ++i) {
        squares[i / 2][i % 2] = quad_sum(squares[i / 2][i % 2]);
        if (t == 0) moments[warp_n * 64 + warp_m * 32 + i * 8 + g] = squares[i / 2][i % 2];
      }
      team_barrier(team + 1, kTeamThreads);
    }
#pragma unroll
    for (int i = 0; i < 2 * kRows; ++i) {
      float sum = kHopper ? quad_sum(squares[i / 2][i % 2]) : squares[i / 2][i % 2];
      if (s.has_norm && !kHopper) sum += moments[(warp_n ^ 1) * 64 + warp_m * 32 + i * 8 + g];
      inverse[i / 2][i % 2] = s.has_norm ? rsqrtf(sum * (1.f / kDim) + s.eps2) : 1.f;
    }
    const int row = at.row + warp_m * 2 * kRows, column = at.column + g;
    T* y = static_cast<T*>(s.y) + ((static_cast<size_t>(at.image) * p.out_height + row) * p.out_width + column) * kDim +
           warp_n * kMid + t * 2 * kVector;
#pragma unroll
    for (int n = 0; n < kBlocks; n += kVector) {
      float scale[2 * kVector], shift[2 * kVector];
      load_floats(scale, mine_of + kDim + n * 8);
      load_floats(shift, mine_of + 2 * kDim + n * 8);
#pragma unroll
      for (int i = 0; i < 2 * kRows; ++i) {
        uint32_t packed[kVector];
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          const float* v = &acc[i / 2][n + j][i % 2 * 2];
          packed[j] = ptx::pack2<T>(fmaf(v[0] * inverse[i / 2][i % 2], scale[2 * j], shift[2 * j]),
                                    fmaf(v[1] * inverse[i / 2][i % 2], scale[2 * j + 1], shift[2 * j + 1]));
        }
        if (row + i < p.out_height && column < p.out_width)
          store_words<kVector>(y + static_cast<size_t>(i) * p.out_width * kDim + n * 8, packed);
      }
    }
    at = next;
  }
}

}  // namespace sm80
}  // namespace convfirst::patch
