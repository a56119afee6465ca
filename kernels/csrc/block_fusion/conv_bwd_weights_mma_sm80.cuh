// Weight gradient of a grouped convolution (groups of 8 or 16 channels) on tensor cores, mma m16n8k16 with k = pixels.
//
//   a warp: 16 channels, strips of 8 pixels from the tile's top to its bottom, kTapColumns columns of taps
//
//        x, 8 + kTapColumns - 1 wide          k = 16: 8 pixels of row r, 8 of row r + 1         D of one product
//        +--------+                            A (16 x k): two taps x 8 input channels, or       +------------------+
//   r-1  |  .  .  | kept from the last step               16 input channels of one tap           | tap 0, 8 c_in    | x 8 c_out
//   r    |  .  .  | kept                       B (k x 8):  8 output channels of da                | tap 1, 8 c_in    |
//   r+1  |  .  .  | loaded                                                                       +------------------+
//   r+2  |  .  .  | loaded                     An operand's register holds 8 pixels of 8 channels, so a row loaded once serves the kernel_size
//        +--------+                            rows of da around it: per step 2 new rows of x, 2 of da, for all taps.
//
//   what                          where                                               written by          released when
//   x with halo, da of a tile     shared, [image][row][column][channels + 8], stages   cp.async            its products are done
//   rows of x in use              registers, [kernel_size + 1][kTapColumns][2]         ldmatrix.trans      two steps further
//   sums                          registers, fp32, all tiles of the slice              mma.sync            the end
//   db                            the same: a tap of its own whose x is 1
#pragma once

#include "../common/launch.cuh"
#include "conv_bwd_weights_stage_sm80.cuh"

namespace convfirst::block_fusion::sm80 {

template <typename T>
constexpr uint32_t kOnes = 0x3c003c00;
template <>
inline constexpr uint32_t kOnes<__nv_bfloat16> = 0x3f803f80;

// Extents of a staged tile, in pixels, and bytes of a pixel.
template <int kKernel>
struct GroupedStage {
  int x_rows, x_columns, da_columns, pixel, images, rows;

  __device__ __forceinline__ explicit GroupedStage(const WeightGradientPlan& plan)
      : x_rows(plan.rows + kKernel - 1),
        x_columns(plan.columns + grouped_tap_columns(kKernel) * grouped_splits(kKernel) - 1),
        da_columns(plan.columns),
        pixel(plan.channel_block * 2 + 16),  // an odd number of 16-byte pieces: eight pixels in different banks
        images(plan.images),
        rows(plan.rows) {}
  __device__ __forceinline__ int da() const { return images * x_rows * x_columns * pixel; }
  __device__ __forceinline__ int bytes() const { return da() + images * rows * da_columns * pixel; }

  // Each warp every kWarps-th row of pixels.
  __device__ __forceinline__ void copy(const WeightGradientParams& p, int first_channel, int tile, uint32_t to, int warp, int lane) const {
    const WeightGradientOrigin origin(p.plan, tile);
    const int chunk_shift = p.plan.channel_block == 64 ? 3 : 2;
    const LaneColumns of_x(p, first_channel, origin.x - kKernel / 2, x_columns, chunk_shift, pixel, lane);
    const LaneColumns of_da(p, first_channel, origin.x, da_columns, chunk_shift, pixel, lane);
    copy_rows(p, of_x, p.x, origin.image, origin.y - kKernel / 2, x_rows, to, x_columns * pixel, chunk_shift, warp);
    copy_rows(p, of_da, p.da, origin.image, origin.y, rows, to + da(), da_columns * pixel, chunk_shift, warp);
  }

  __device__ __forceinline__ void copy_rows(const WeightGradientParams& p, const LaneColumns& lane, const void* tensor, int first_image, int first_row,
                                            int count, uint32_t to, int pitch, int chunk_shift, int warp) const {
    constexpr int kWarps = kWeightGradientThreads / 32;
    const int columns = 32 >> chunk_shift;
    const int64_t row_bytes = int64_t{p.width} * p.channels * 2;
    int image = first_image, row = warp;
    for (int i = warp; i < images * count; i += kWarps, row += kWarps) {
      while (row >= count) row -= count, ++image;
      const int y = first_row + row;
      const bool inside = image < p.batch && y >= 0 && y < p.height;
      const unsigned char* source = static_cast<const unsigned char*>(tensor) + (int64_t{image} * p.height + y) * row_bytes;
      lane.copy(to + i * pitch, source, inside, columns * p.channels * 2, columns * pixel);
    }
  }
};

template <typename T, int kKernel, int kGroupWidth>
struct GroupedWeightWarp {
  static constexpr int kTapColumns = grouped_tap_columns(kKernel), kTaps = kKernel * kTapColumns;
  static constexpr int kSums = grouped_sums(kKernel, kGroupWidth), kOfOctet = kSums / 2;
  float sums[kSums][4];
  uint32_t x[kKernel + 1][kTapColumns][2];  // [row][column of taps][channel octet]: 8 pixels of 8 channels

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0.f;
  }

  // Two rows of x from `row` of the registers on; `from` is the lane's address of the first.
  template <int kRow>
  __device__ __forceinline__ void load(uint32_t from, int pixel) {
#pragma unroll
    for (int dx = 0; dx < kTapColumns; ++dx) {
      uint32_t r[4];
      ptx::ldmatrix_x4_transposed(r, from + dx * pixel);
      x[kRow][dx][0] = r[0], x[kRow][dx][1] = r[1], x[kRow + 1][dx][0] = r[2], x[kRow + 1][dx][1] = r[3];
    }
  }

  // Operand register of a tap: pixels of row `more` of the step's two. The tap after the last is db's.
  __device__ __forceinline__ uint32_t operand(int tap, int more, int octet) const {
    return tap < kTaps ? x[tap / kTapColumns + more][tap % kTapColumns][octet] : kOnes<T>;
  }

  __device__ __forceinline__ void multiply(const uint32_t (&da)[4]) {
#pragma unroll
    for (int octet = 0; octet < 2; ++octet) {
#pragma unroll
      for (int i = 0; i < kOfOctet; ++i) {
        uint32_t a[4];
        if constexpr (kGroupWidth == 8) {
          a[0] = operand(2 * i, 0, octet), a[1] = operand(2 * i + 1, 0, octet);
          a[2] = operand(2 * i, 1, octet), a[3] = operand(2 * i + 1, 1, octet);
        } else {
          a[0] = operand(i, 0, 0), a[1] = operand(i, 0, 1), a[2] = operand(i, 1, 0), a[3] = operand(i, 1, 1);
        }
        ptx::mma_16816<T>(sums[octet * kOfOctet + i], a, da[octet], da[2 + octet]);
      }
    }
  }

  // One strip: the lane's addresses of its first pixels of x and da, bytes from a row to the next, rows of da.
  __device__ __forceinline__ void strip(uint32_t from_x, uint32_t from_da, int x_row, int da_row, int rows, int pixel) {
    load<0>(from_x, pixel);
    if constexpr (kKernel > 3) load<2>(from_x + 2 * x_row, pixel);
    if constexpr (kKernel > 5) load<4>(from_x + 4 * x_row, pixel);
    from_x += (kKernel - 1) * x_row;
    for (int row = 0; row < rows; row += 2, from_x += 2 * x_row, from_da += 2 * da_row) {
      uint32_t da[4];
      ptx::ldmatrix_x4_transposed(da, from_da);
      load<kKernel - 1>(from_x, pixel);
      multiply(da);
#pragma unroll
      for (int r = 0; r < kKernel - 1; ++r) {
#pragma unroll
        for (int dx = 0; dx < kTapColumns; ++dx) x[r][dx][0] = x[r + 2][dx][0], x[r][dx][1] = x[r + 2][dx][1];
      }
    }
  }

  // Calls store(tap row, tap column of the warp, output channel of 16, input channel of the group, sum); tap row kKernel is db.
  template <typename Store>
  __device__ __forceinline__ void each(int lane, Store store) const {
    const int g = lane / 4, q = lane % 4;
#pragma unroll
    for (int octet = 0; octet < 2; ++octet) {
#pragma unroll
      for (int i = 0; i < kOfOctet; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int tap = kGroupWidth == 8 ? 2 * i + r / 2 : i, c_in = kGroupWidth == 8 ? g : g + r / 2 * 8;
          if (tap <= kTaps) store(tap / kTapColumns, tap % kTapColumns, octet * 8 + 2 * q + r % 2, c_in, sums[octet * kOfOctet + i][r]);
        }
      }
    }
  }
};

// The sums of warps that share channels and taps, in order, into those of the first of them.
template <class Warp>
__device__ __forceinline__ void add_warps(Warp& warp, float* buffer, int combination, int combinations, int rank, int ranks, int lane) {
  constexpr int kOfWarp = Warp::kSums * 4 * 32;
  if (rank > 0) {
    float* to = buffer + ((rank - 1) * combinations + combination) * kOfWarp + lane;
#pragma unroll
    for (int i = 0; i < Warp::kSums * 4; ++i) to[i * 32] = warp.sums[i / 4][i % 4];
  }
  __syncthreads();
  if (rank > 0) return;
  for (int other = 1; other < ranks; ++other) {
    const float* from = buffer + ((other - 1) * combinations + combination) * kOfWarp + lane;
#pragma unroll
    for (int i = 0; i < Warp::kSums * 4; ++i) warp.sums[i / 4][i % 4] += from[i * 32];
  }
}

template <typename T, int kKernel, int kGroupWidth>
__global__ void __launch_bounds__(kWeightGradientThreads, grouped_blocks(kKernel, kGroupWidth))
    grouped_conv_bwd_weights_sm80(const __grid_constant__ WeightGradientParams p) {
  extern __shared__ __align__(128) unsigned char smem[];
  constexpr int kSplits = grouped_splits(kKernel), kWarps = kWeightGradientThreads / 32;
  const WeightGradientPlan& plan = p.plan;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int block = blockIdx.x % plan.channel_blocks, slice = blockIdx.x / plan.channel_blocks;
  const int across = plan.channel_block / 16, combinations = across * kSplits, ranks = kWarps / combinations;
  const int combination = warp % combinations, rank = warp / combinations;
  const int split = combination / across, channel = combination % across * 16;
  const GroupedStage<kKernel> stage(plan);
  const int first_channel = block * plan.channel_block;
  const uint32_t base = ptx::smem_address(smem);
  const int x_row = stage.x_columns * stage.pixel, da_row = stage.da_columns * stage.pixel;
  // Lane l gives row l / 16 of two, channel octet l / 8 % 2, pixel l % 8.
  const int of_lane = lane % 8 * stage.pixel + (channel + lane / 8 % 2 * 8) * 2;
  const int strips = plan.columns / 8, items = strips * plan.images;

  GroupedWeightWarp<T, kKernel, kGroupWidth> sums;
  sums.start();
  int ahead = slice;  // the next tile to copy
  for (int i = 0; i + 1 < plan.stages; ++i, ahead += plan.slices) {
    if (ahead < plan.tiles()) stage.copy(p, first_channel, ahead, base + i * stage.bytes(), warp, lane);
    ptx::cp_async_commit();
  }
  int slot = 0;
  for (int tile = slice; tile < plan.tiles(); tile += plan.slices, ahead += plan.slices) {
    ptx::cp_async_wait(plan.stages - 2);
    __syncthreads();  // the tile is there, and the slot of the one before is free
    const int free_slot = slot == 0 ? plan.stages - 1 : slot - 1;
    if (ahead < plan.tiles()) stage.copy(p, first_channel, ahead, base + free_slot * stage.bytes(), warp, lane);
    ptx::cp_async_commit();
    const uint32_t tile_x = base + slot * stage.bytes() + of_lane + lane / 16 * x_row + split * sums.kTapColumns * stage.pixel;
    const uint32_t tile_da = base + slot * stage.bytes() + stage.da() + of_lane + lane / 16 * da_row;
    for (int item = rank; item < items; item += ranks) {
      const int image = item / strips, first = (item - image * strips) * 8 * stage.pixel;
      sums.strip(tile_x + image * stage.x_rows * x_row + first, tile_da + image * plan.rows * da_row + first, x_row, da_row, plan.rows,
                 stage.pixel);
    }
    slot = slot + 1 == plan.stages ? 0 : slot + 1;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  add_warps(sums, reinterpret_cast<float*>(smem), combination, combinations, rank, ranks, lane);
  if (rank > 0) return;
  const int first = first_channel + channel, weights = kKernel * kKernel * p.channels * kGroupWidth;
  float* to = p.partial + int64_t{slice} * (weights + p.channels);
  sums.each(lane, [&](int dy, int column, int c_out, int c_in, float sum) {
    const int dx = split * sums.kTapColumns + column, c = first + c_out;
    if (c >= p.channels) return;
    if (dy < kKernel) {
      if (dx < kKernel) to[((dy * kKernel + dx) * p.channels + c) * kGroupWidth + c_in] = sum;
    } else if (dx == 0 && c_in == 0) {
      to[weights + c] = sum;
    }
  });
}

template <typename T, int kKernel, int kGroupWidth>
int launch_grouped_weight_gradient(const WeightGradientParams& p, cudaStream_t stream) {
  return start_kernel(grouped_conv_bwd_weights_sm80<T, kKernel, kGroupWidth>, p.plan.slices * p.plan.channel_blocks, kWeightGradientThreads,
                      p.plan.shared_memory, stream, p);
}

template <typename T>
int grouped_weight_gradient(const WeightGradientProblem& problem, const WeightGradientParams& p, cudaStream_t stream) {
  const bool wide = problem.group_width == 16;
  switch (problem.kernel_size) {
    case 3: return wide ? launch_grouped_weight_gradient<T, 3, 16>(p, stream) : launch_grouped_weight_gradient<T, 3, 8>(p, stream);
    case 5: return wide ? launch_grouped_weight_gradient<T, 5, 16>(p, stream) : launch_grouped_weight_gradient<T, 5, 8>(p, stream);
    default: return wide ? launch_grouped_weight_gradient<T, 7, 16>(p, stream) : launch_grouped_weight_gradient<T, 7, 8>(p, stream);
  }
}

}  // namespace convfirst::block_fusion::sm80
