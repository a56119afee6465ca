// Weight gradient of a depthwise convolution on CUDA cores, products and sums in fp32.
//
//   half a warp: 32 channels (a pair a lane), two rows of da, from left to right
//
//        x                  window of kKernel columns, in registers          each step: one column of x loaded (kKernel + 1 values a channel)
//   r-3  . [. . . . . . .] .                                                            one of da (two), then
//   ...  . [. . . . . . .] .  -> moves right                                  dW[dy][dx] += da[r] x[dy][dx] + da[r+1] x[dy+1][dx]
//   r+4  . [. . . . . . .] .                                                  for all taps: 98 FMA a channel at kernel size 7 for 10 loads
//
//   what                        where                                        written by           released when
//   x with halo, da of a tile   shared, [image][row][column][32], two tiles   cp.async, warp 7     the other warps are done with it
//   window of x                 registers, fp32, a column's place turns       ld.shared            it leaves on the left
//   sums                        registers, fp32, all tiles of the slice       FFMA                 the end
//   The seven computing warps leave one scheduler with half of the others' work: the copying warp shares that one.
#pragma once

#include "../common/launch.cuh"
#include "conv_bwd_weights_stage_sm80.cuh"

namespace convfirst::block_fusion::sm80 {

// A lane's copies of kRows rows of kCount pixels: the same columns of every row, so what they need is found once a tile. One warp copies for
// seven: with an address computed for each copy it took three times as long as they compute (measured, H100).
template <int kRows, int kCount>
struct RowCopies {
  static constexpr int kPieces = kDepthwiseChannels / 8, kColumns = 32 / kPieces, kSteps = (kCount + kColumns - 1) / kColumns;
  int64_t from;  // bytes to the lane's first piece in a row
  int to, step;  // bytes to it in shared memory; between its pieces
  bool valid[kSteps], last;  // whether they exist; whether the last step is a column of the row

  __device__ __forceinline__ RowCopies(const WeightGradientParams& p, int first_channel, int first, int lane) {
    const int piece = lane % kPieces, column = lane / kPieces, channel = first_channel + piece * 8;
    from = (int64_t{first + column} * p.channels + channel) * 2;
    step = kColumns * p.channels * 2, to = column * kDepthwiseChannels * 2 + piece * 16;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int at = first + column + i * kColumns;
      valid[i] = channel < p.channels && at >= 0 && at < p.width;
    }
    last = column + (kSteps - 1) * kColumns < kCount;
  }

  __device__ __forceinline__ void row(uint32_t shared, const unsigned char* source, bool inside) const {
#pragma unroll
    for (int i = 0; i < kSteps; ++i, source += step) {
      if (i + 1 < kSteps || last) ptx::cp_async16(shared + i * kColumns * kDepthwiseChannels * 2, source, inside && valid[i]);
    }
  }

  // From row `y` of an image on; zeros for rows and images that there are not.
  __device__ __forceinline__ void copy(const WeightGradientParams& p, const void* tensor, int image, int y, uint32_t shared, int pitch) const {
    const int64_t row_bytes = int64_t{p.width} * p.channels * 2;
    const unsigned char* source = static_cast<const unsigned char*>(tensor) + (int64_t{image} * p.height + y) * row_bytes + from;
    const int height = image < p.batch ? p.height : 0;
    shared += to;
#pragma unroll 2
    for (int i = 0; i < kRows; ++i, source += row_bytes, shared += pitch) {
      if (y + i >= 0 && y + i < height) {
        row(shared, source, true);
      } else {
        row(shared, source, false);
      }
    }
  }
};

// Geometry known to the compiler.
template <int kKernel, int kShape>
struct DepthwiseTile {
  static constexpr DepthwiseShape kOf = depthwise_shape(kKernel, kShape);
  static constexpr int kPixel = kDepthwiseChannels * 2, kColumns = kOf.unit_columns;
  static constexpr int kXPitch = kOf.x_pitch(kKernel), kDaPitch = kOf.da_pitch();
  static constexpr int kXImage = (kOf.rows() + kKernel - 1) * kXPitch, kDaImage = kOf.rows() * kDaPitch;
  static constexpr int kDa = kOf.images * kXImage, kBytes = kOf.stage_bytes(kKernel);
  static_assert(kColumns % kKernel == 0, "a column's place in the window returns after kKernel columns");
  static_assert(kOf.units() <= 14, "seven warps compute");

  __device__ static __forceinline__ void copy(const WeightGradientParams& p, int first_channel, int tile, uint32_t to, int lane) {
    const WeightGradientOrigin origin(p.plan, tile);
    const RowCopies<kOf.rows() + kKernel - 1, kOf.columns() + kKernel - 1> of_x(p, first_channel, origin.x - kKernel / 2, lane);
    const RowCopies<kOf.rows(), kOf.columns()> of_da(p, first_channel, origin.x, lane);
#pragma unroll 1
    for (int i = 0; i < kOf.images; ++i) {
      of_x.copy(p, p.x, origin.image + i, origin.y - kKernel / 2, to + i * kXImage, kXPitch);
      of_da.copy(p, p.da, origin.image + i, origin.y, to + kDa + i * kDaImage, kDaPitch);
    }
  }
};

template <typename T, int kKernel, int kShape>
struct DepthwiseWeightWarp {
  using Tile = DepthwiseTile<kKernel, kShape>;
  static constexpr int kTaps = kKernel * kKernel, kRows = kKernel + 1;
  float2 sums[kTaps + 1];       // the last is db's
  float2 x[kRows][kKernel];     // column c of the row's pixels in place c % kKernel

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int i = 0; i <= kTaps; ++i) sums[i] = make_float2(0.f, 0.f);
  }

  __device__ __forceinline__ static uint32_t word(const unsigned char* from) { return *reinterpret_cast<const uint32_t*>(from); }

  // `from_x`, `from_da`: the lane's channels of the unit's first pixels.
  __device__ __forceinline__ void unit(const unsigned char* from_x, const unsigned char* from_da) {
#pragma unroll
    for (int c = 0; c < kKernel - 1; ++c) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) x[r][c] = ptx::unpack2<T>(word(from_x + r * Tile::kXPitch + c * Tile::kPixel));
    }
    from_x += (kKernel - 1) * Tile::kPixel;
#pragma unroll 1
    for (int block = 0; block < Tile::kColumns / kKernel; ++block) {
#pragma unroll
      for (int c = 0; c < kKernel; ++c) {
        const float2 d0 = ptx::unpack2<T>(word(from_da + c * Tile::kPixel));
        const float2 d1 = ptx::unpack2<T>(word(from_da + Tile::kDaPitch + c * Tile::kPixel));
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          x[r][(c + kKernel - 1) % kKernel] = ptx::unpack2<T>(word(from_x + r * Tile::kXPitch + c * Tile::kPixel));
        }
        step(d0, d1, c);
      }
      from_x += kKernel * Tile::kPixel, from_da += kKernel * Tile::kPixel;
    }
  }

  __device__ __forceinline__ void step(float2 d0, float2 d1, int c) {
#pragma unroll
    for (int dx = 0; dx < kKernel; ++dx) {  // the column just loaded last
#pragma unroll
      for (int dy = 0; dy < kKernel; ++dy) {
        const float2 above = x[dy][(c + dx) % kKernel], below = x[dy + 1][(c + dx) % kKernel];
        float2& sum = sums[dy * kKernel + dx];
        sum.x = fmaf(d1.x, below.x, fmaf(d0.x, above.x, sum.x));
        sum.y = fmaf(d1.y, below.y, fmaf(d0.y, above.y, sum.y));
      }
    }
    sums[kTaps].x += d0.x + d1.x;
    sums[kTaps].y += d0.y + d1.y;
  }

  // Adds the warp's other half and leaves [tap][channel] in shared memory.
  __device__ __forceinline__ void leave(float* to, int lane) {
#pragma unroll
    for (int i = 0; i <= kTaps; ++i) {
      sums[i].x += __shfl_xor_sync(0xffffffffu, sums[i].x, 16);
      sums[i].y += __shfl_xor_sync(0xffffffffu, sums[i].y, 16);
      if (lane < 16) reinterpret_cast<float2*>(to)[i * 16 + lane] = sums[i];
    }
  }
};

template <typename T, int kKernel, int kShape>
__global__ void __launch_bounds__(kWeightGradientThreads, 1)
    depthwise_conv_bwd_weights_sm80(const __grid_constant__ WeightGradientParams p) {
  extern __shared__ __align__(128) unsigned char smem[];
  using Tile = DepthwiseTile<kKernel, kShape>;
  constexpr int kComputing = kWeightGradientThreads / 32 - 1, kResults = (kKernel * kKernel + 1) * kDepthwiseChannels;
  const WeightGradientPlan& plan = p.plan;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int block = blockIdx.x % plan.channel_blocks, slice = blockIdx.x / plan.channel_blocks;
  const int first = block * kDepthwiseChannels;
  const uint32_t base = ptx::smem_address(smem);
  const int unit = warp * 2 + lane / 16;
  const int down = unit % Tile::kOf.down, across = unit / Tile::kOf.down % Tile::kOf.across, image = unit / Tile::kOf.down / Tile::kOf.across;
  const int unit_x = image * Tile::kXImage + 2 * down * Tile::kXPitch + across * Tile::kColumns * Tile::kPixel + lane % 16 * 4;
  const int unit_da = Tile::kDa + image * Tile::kDaImage + 2 * down * Tile::kDaPitch + across * Tile::kColumns * Tile::kPixel + lane % 16 * 4;

  DepthwiseWeightWarp<T, kKernel, kShape> sums;
  sums.start();
  if (warp == kComputing && slice < plan.tiles()) Tile::copy(p, first, slice, base, lane);
  int slot = 0;
  for (int tile = slice; tile < plan.tiles(); tile += plan.slices, slot ^= 1) {
    if (warp == kComputing) {
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
    }
    __syncthreads();  // the tile is there, and the other slot is free
    if (warp == kComputing) {
      if (tile + plan.slices < plan.tiles()) Tile::copy(p, first, tile + plan.slices, base + (slot ^ 1) * Tile::kBytes, lane);
    } else if (unit < Tile::kOf.units()) {
      sums.unit(smem + slot * Tile::kBytes + unit_x, smem + slot * Tile::kBytes + unit_da);
    }
  }
  __syncthreads();
  float* const left = reinterpret_cast<float*>(smem);
  if (warp < kComputing) sums.leave(left + warp * kResults, lane);
  __syncthreads();
  float* to = p.partial + int64_t{slice} * (kKernel * kKernel + 1) * p.channels;  // db lies where a further tap would
  for (int i = threadIdx.x; i < kResults; i += kWeightGradientThreads) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kComputing; ++w) sum += left[w * kResults + i];
    const int c = first + i % kDepthwiseChannels;
    if (c < p.channels) to[i / kDepthwiseChannels * p.channels + c] = sum;
  }
}

template <typename T, int kKernel, int kShape>
int launch_depthwise_weight_gradient(const WeightGradientParams& p, cudaStream_t stream) {
  return start_kernel(depthwise_conv_bwd_weights_sm80<T, kKernel, kShape>, p.plan.slices * p.plan.channel_blocks, kWeightGradientThreads,
                      p.plan.shared_memory, stream, p);
}

template <typename T, int kKernel>
int depthwise_of_shape(const WeightGradientParams& p, cudaStream_t stream) {
  const WeightGradientPlan& plan = p.plan;
  if (plan.columns == depthwise_shape(kKernel, 0).columns()) return launch_depthwise_weight_gradient<T, kKernel, 0>(p, stream);
  if (plan.columns == depthwise_shape(kKernel, 1).columns()) return launch_depthwise_weight_gradient<T, kKernel, 1>(p, stream);
  return launch_depthwise_weight_gradient<T, kKernel, 2>(p, stream);
}

template <typename T>
int depthwise_weight_gradient(const WeightGradientProblem& problem, const WeightGradientParams& p, cudaStream_t stream) {
  switch (problem.kernel_size) {
    case 3: return depthwise_of_shape<T, 3>(p, stream);
    case 5: return depthwise_of_shape<T, 5>(p, stream);
    default: return depthwise_of_shape<T, 7>(p, stream);
  }
}

}  // namespace convfirst::block_fusion::sm80
