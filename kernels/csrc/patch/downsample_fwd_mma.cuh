// LayerNorm and the 2x2 convolution of stride 2 after it in one launch, for narrow layers on sm_80 and newer: cp.async, ldmatrix,
// mma.sync m16n8k16. The matrix stays in shared memory; the four taps of a tile's pixels pass through a ring.
//
//      x, one tap of a tile's pixels         the same, normalised              y
//    +------------------------------+      +-------------------+  W[tap]  +----------+
//    | rows x C, as it lies in x    |----->| in place          |--------->| += , tap |----> + bias, NHWC
//    | (every other pixel)          | fp32 |                   |          | after tap|
//    +------------------------------+      +-------------------+          +----------+
//
//   what              where                          size
//   W, bias           shared, for all tiles          2C x 4C, 2C floats
//   x                 shared, ring of taps           5 x rows x C
//   sums              registers, fp32                32 x 2C / warps_n a warp
//
// The norm's affine part is folded into W and the bias. A step is a tap of a tile; loads run four steps ahead.
#pragma once

#include "../block_fusion/matmul_stage_sm80.cuh"
#include "../common/ptx.cuh"
#include "fragments.cuh"
#include "sync.cuh"
#include "tile.h"

namespace convfirst::patch {

struct DownsampleParams {
  Downsample d;
  int rows;  // pixels of y
  Divider by_image, by_row;
  int tiles, blocks;
  int teams;  // of a block, on Hopper
};

struct GatherParams {
  Gather s;
  int pixels;  // those of x that y sees
  Divider by_image, by_row;
};

namespace sm80 {

extern __shared__ __align__(128) unsigned char smem[];

// Subtracts the mean of `kLanes` lanes' values and divides by their standard deviation; kChunks x 8 values a lane.
template <typename T, int kChunks, int kLanes>
__device__ __forceinline__ void normalise(uint4 (&chunks)[kChunks], int channels, float eps) {
  float v[kChunks][8];
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const uint32_t words[4] = {chunks[i].x, chunks[i].y, chunks[i].z, chunks[i].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 pair = ptx::unpack2<T>(words[j]);
      v[i][2 * j] = pair.x;
      v[i][2 * j + 1] = pair.y;
      sum += pair.x + pair.y;
    }
  }
#pragma unroll
  for (int lane = 1; lane < kLanes; lane *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
  const float scale = 1.f / static_cast<float>(channels), mean = sum * scale;
  float squares = 0.f;
  const int mine = threadIdx.x % kLanes;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const bool there = (mine + i * kLanes) * 8 < channels;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      v[i][j] = there ? v[i][j] - mean : 0.f;
      squares = fmaf(v[i][j], v[i][j], squares);
    }
  }
#pragma unroll
  for (int lane = 1; lane < kLanes; lane *= 2) squares += __shfl_xor_sync(0xffffffffu, squares, lane);
  const float inverse = rsqrtf(squares * scale + eps);
#pragma unroll
  for (int i = 0; i < kChunks; ++i)
    chunks[i] = make_uint4(ptx::pack2<T>(v[i][0] * inverse, v[i][1] * inverse), ptx::pack2<T>(v[i][2] * inverse, v[i][3] * inverse),
                           ptx::pack2<T>(v[i][4] * inverse, v[i][5] * inverse), ptx::pack2<T>(v[i][6] * inverse, v[i][7] * inverse));
}

template <typename T, int kC, bool kHopper>
__global__ void __launch_bounds__(downsample_tile(kC).threads(), 1) downsample_fwd(const __grid_constant__ DownsampleParams p) {
  constexpr DownsampleTile kTile = downsample_tile(kC);
  constexpr DownsampleLayout kLayout = downsample_layout(kC);
  constexpr int kThreads = kTile.threads(), kColumns = 2 * kC, kBlocks = kColumns / kTile.warps_n / 8, kVector = vector_blocks(kBlocks);
  constexpr int kPitch = row_bytes(kC), kWeightPitch = row_bytes(4 * kC), kPieces = kC / 8;
  constexpr int kLoads = kTile.rows * kPieces / kThreads;
  static_assert(kTile.rows == 32 * kTile.warps_m && kTile.rows * kPieces % kThreads == 0 && kC % 32 == 0);
  const Downsample& d = p.d;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
  const int warp_m = warp / kTile.warps_n, warp_n = warp % kTile.warps_n;
  float* bias = reinterpret_cast<float*>(smem + kLayout.bias);
  const uint32_t ring = ptx::smem_address(smem + kLayout.ring);
  const T* x = static_cast<const T*>(d.x);

  wait_for_inputs<kHopper>();
  launch_dependents<kHopper>();
  for (int i = threadIdx.x; i < kColumns * kPieces * 4; i += kThreads) {
    const int row = i / (kPieces * 4), piece = i % (kPieces * 4);
    constexpr int kPart = kBlocks * 8;
    const int column = row / kPart * kPart + channel_of(row % kPart / 8, row % 8, kVector);
    ptx::cp_async16(ptx::smem_address(smem + kLayout.weight + row * kWeightPitch + piece * 16),
                    static_cast<const T*>(d.weight) + static_cast<size_t>(column) * 4 * kC + piece * 8, true);
  }
  for (int i = threadIdx.x; i < kColumns; i += kThreads) bias[i] = d.bias[i];

  // The loads: of step `loading` next, tap after tap, tile after tile.
  int load_tile = blockIdx.x, load_tap = 0, load_slot = 0;
  int pixel[kLoads];  // of tap 0 in x, -1 beyond the last row
  auto load = [&] {
    if (load_tile >= p.tiles) return;
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int i = threadIdx.x + j * kThreads, row = i / kPieces, piece = i % kPieces;
      if (load_tap == 0) {
        const int m = load_tile * kTile.rows + row, n = p.by_image.quotient(m);
        const int rest = m - n * static_cast<int>(p.by_image.divisor), oy = p.by_row.quotient(rest);
        const int ox = rest - oy * static_cast<int>(p.by_row.divisor);
        pixel[j] = m < p.rows ? (n * d.height + 2 * oy) * d.width + 2 * ox : -1;
      }
      const bool valid = pixel[j] >= 0;
      const int from = pixel[j] + load_tap / 2 * d.width + load_tap % 2;
      ptx::cp_async16(ring + load_slot * kLayout.slot + row * kPitch + piece * 16,
                      valid ? x + static_cast<size_t>(from) * kC + piece * 8 : x, valid);
    }
    if (++load_slot == kTile.slots) load_slot = 0;
    if (++load_tap == 4) {
      load_tap = 0;
      load_tile += p.blocks;
    }
  };
#pragma unroll 1
  for (int i = 0; i < kTile.slots - 1; ++i) {
    load();
    ptx::cp_async_commit();  // the first group brings the weights too
  }

  const uint32_t a_base = ring + warp_m * 32 * kPitch + block_fusion::sm80::a_lane_offset(kPitch);
  const uint32_t b_base = ptx::smem_address(smem + kLayout.weight) + warp_n * kBlocks * 8 * kWeightPitch +
                          block_fusion::sm80::b_lane_offset(kWeightPitch);
  // Eight rows of a warp at once, four lanes each; rows of neighbouring quads are four apart, where their bank groups differ.
  const int quad_row = g % 2 * 4 + g / 2;
  int slot = 0;
  for (int tile = blockIdx.x; tile < p.tiles; tile += p.blocks) {
    float acc[2][kBlocks][4];
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < kBlocks; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[m][n][i] = 0.f;
#pragma unroll 1
    for (int tap = 0; tap < 4; ++tap) {
      ptx::cp_async_wait<kTile.slots - 2>();
      __syncthreads();  // the tap is there, and every warp is done with the slot that the next load takes
      load();
      ptx::cp_async_commit();
      if (d.has_norm) {
        constexpr int kWarps = kThreads / 32;
        unsigned char* rows = smem + kLayout.ring + slot * kLayout.slot;
#pragma unroll
        for (int row = 0; row < kTile.rows; row += 8 * kWarps) {
          unsigned char* here = rows + (row + warp * 8 + quad_row) * kPitch + t * 16;
          uint4 chunks[kC / 32];
#pragma unroll
          for (int i = 0; i < kC / 32; ++i) chunks[i] = *reinterpret_cast<const uint4*>(here + i * 64);
          normalise<T, kC / 32, 4>(chunks, kC, d.eps);
#pragma unroll
          for (int i = 0; i < kC / 32; ++i) *reinterpret_cast<uint4*>(here + i * 64) = chunks[i];
        }
        __syncthreads();
      }
#pragma unroll
      for (int k = 0; k < kC / 16; ++k) {
        uint32_t a[2][4];
#pragma unroll
        for (int m = 0; m < 2; ++m) ptx::ldmatrix_x4(a[m], a_base + slot * kLayout.slot + m * 16 * kPitch + k * 32);
#pragma unroll
        for (int n = 0; n < kBlocks / 2; ++n) {
          uint32_t b[4];
          ptx::ldmatrix_x4(b, b_base + n * 16 * kWeightPitch + (tap * kC + k * 16) * 2);
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            ptx::mma_16816<T>(acc[m][2 * n], a[m], b[0], b[1]);
            ptx::mma_16816<T>(acc[m][2 * n + 1], a[m], b[2], b[3]);
          }
        }
      }
      if (++slot == kTile.slots) slot = 0;
    }
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = tile * kTile.rows + warp_m * 32 + m * 16 + half * 8 + g;
        T* y = static_cast<T*>(d.y) + static_cast<size_t>(row) * kColumns;
#pragma unroll
        for (int n = 0; n < kBlocks; n += kVector) {
          const int column = warp_n * kBlocks * 8 + n * 8 + t * 2 * kVector;
          float b[2 * kVector];
          load_floats(b, bias + column);
          uint32_t packed[kVector];
#pragma unroll
          for (int j = 0; j < kVector; ++j)
            packed[j] = ptx::pack2<T>(acc[m][n + j][2 * half] + b[2 * j], acc[m][n + j][2 * half + 1] + b[2 * j + 1]);
          if (row < p.rows) store_words<kVector>(y + column, packed);
        }
      }
  }
}

// Rows of the left operand of the same convolution as a matrix product: eight lanes a pixel, kChunks x 64 channels at most.
constexpr int kGatherThreads = 256;

template <typename T, int kChunks, bool kHopper>
__global__ void __launch_bounds__(kGatherThreads) gather_fwd(const __grid_constant__ GatherParams p) {
  const Gather& s = p.s;
  const int pieces = s.channels / 8, lane = threadIdx.x % 8;
  const int index = blockIdx.x * (kGatherThreads / 8) + threadIdx.x / 8;
  const bool valid = index < p.pixels;
  const int m = (valid ? index : 0) / 4, tap = index % 4, n = p.by_image.quotient(m);
  const int rest = m - n * static_cast<int>(p.by_image.divisor), oy = p.by_row.quotient(rest);
  const int ox = rest - oy * static_cast<int>(p.by_row.divisor);
  const size_t pixel = (static_cast<size_t>(n) * s.height + 2 * oy + tap / 2) * s.width + 2 * ox + tap % 2;
  const uint4* from = static_cast<const uint4*>(s.x) + pixel * pieces;
  wait_for_inputs<kHopper>();
  launch_dependents<kHopper>();
  uint4 chunks[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i)
    chunks[i] = valid && lane + i * 8 < pieces ? __ldg(from + lane + i * 8) : make_uint4(0u, 0u, 0u, 0u);
  if (s.has_norm) normalise<T, kChunks, 8>(chunks, s.channels, s.eps);
  uint4* to = static_cast<uint4*>(s.patches) + static_cast<size_t>(index) * pieces;
#pragma unroll
  for (int i = 0; i < kChunks; ++i)
    if (valid && lane + i * 8 < pieces) to[lane + i * 8] = chunks[i];
}

}  // namespace sm80
}  // namespace convfirst::patch
