// A = LayerNorm(conv(x) + bias) for grouped convolutions (groups of 8 or 16 channels), the first launch of the split path.
//
//   one block: some pixels, all channels; small, so that several share a multiprocessor and hide each other's latencies.
//
//        channels ->                                 16 pixels x 8 channels of one product (m16n8k16):
//        +------+------+------+------+                 group width 8:  k = 8 channels of one tap, then of the next
//   pix- | warp | warp | warp | warp |  m_tiles x      group width 16: k = 16 channels of one tap
//   els  |  0   |  1   |  2   |  3   |  16 pixels
//    v   +------+------+------+------+               The operand's rows are pixels: ldmatrix takes 16 bytes from any 16 places, so a tap
//          32 channels each                          is a table of addresses, and the padding a pixel of zeros.
//
//   what                        where                                          written by       released when
//   x with halo                 shared, [pixel][channels + 8]                  cp.async         all products done
//   addresses of every tap      shared, [tap][pixel]                           prologue         -
//   filter                      registers, from L1 and L2                      -                product done
//   sums                        16 registers an m-tile                         mma.sync         stored
//   moments of a pixel          shared, [32 channels][pixel], then summed      each warp        read
//   A, 16 bit                   shared, over x                                 each warp        stored, 16 bytes a thread
#pragma once

#include <type_traits>

#include "../common/grid_sm90.cuh"
#include "../common/ptx.cuh"
#include "../common/sm90.cuh"
#include "grouped_conv_norm_sm90.h"

namespace convfirst::block_fusion::sm90 {

template <DType kDType, int kKernel_, int kGroupWidth_, int kMTiles_>
struct GroupedTraits {
  using Element = std::conditional_t<kDType == DType::kHalf, __half, __nv_bfloat16>;
  static constexpr int kKernel = kKernel_, kGroupWidth = kGroupWidth_, kMTiles = kMTiles_;
  static constexpr int kTaps = kKernel * kKernel;
  static constexpr int kBlocks = kWarpChannels / 8;                               // of 8 output channels
  static constexpr int kSteps = kGroupWidth == 8 ? (kTaps + 1) / 2 : kTaps;       // of k = 16
  static constexpr int kUnroll = kSteps > 9 ? 1 : kMTiles == 4 ? kSteps : 2;  // more filters ahead of use take registers that there are not
  static constexpr int kTableTaps = kGroupWidth == 8 ? 2 * kSteps : kTaps;
};

// Where a block's tile lies.
struct GroupedOrigin {
  int image, y, x;  // of a rectangle
  int pixel;        // of the flat tile: its first, counted through all images

  __device__ __forceinline__ explicit GroupedOrigin(const GroupedPlan& plan) : image(0), y(0), x(0), pixel(0) {
    const GroupedTile& t = plan.tile;
    int tile = blockIdx.x;
    asm volatile("" : "+r"(tile));  // worked out again where it is needed: registers are short between
    if (t.columns == 0) {
      pixel = tile * t.pixels();
    } else {
      x = tile % plan.tiles_x * t.columns, y = tile / plan.tiles_x % plan.tiles_y * t.rows(), image = tile / plan.tiles_x / plan.tiles_y;
    }
  }
};

// The tile's pixel's number among all pixels, or -1 where there is none.
__device__ __forceinline__ int grouped_target(const GroupedParams& p, const GroupedOrigin& origin, int pixel) {
  const GroupedTile& t = p.plan.tile;
  if (t.columns == 0) return origin.pixel + pixel < p.batch * p.height * p.width ? origin.pixel + pixel : -1;
  const int y = origin.y + pixel / t.columns, x = origin.x + pixel % t.columns;
  return y < p.height && x < p.width ? (origin.image * p.height + y) * p.width + x : -1;
}

// A thread's share of copies between global and shared memory: one 16-byte piece of every few pixels.
struct GroupedPiece {
  int piece, first, step;  // its place within a pixel; pixels first, first + step, ...

  __device__ __forceinline__ explicit GroupedPiece(const GroupedParams& p) {
    const int pieces = p.channels / 8;  // divides the number of threads
    piece = threadIdx.x % pieces, first = threadIdx.x / pieces, step = blockDim.x / pieces;
  }
};

// x with its halo into shared memory; what lies outside becomes zeros.
__device__ __forceinline__ void grouped_load(const GroupedParams& p, const GroupedOrigin& origin, unsigned char* smem) {
  const GroupedTile& t = p.plan.tile;
  const GroupedPiece own(p);
  const int staged = t.staged(), pixel_bytes = p.channels * 2;
  const char* x = static_cast<const char*>(p.x) + own.piece * 16;
  uint32_t to = ptx::smem_address(smem) + own.first * p.layout.pitch + own.piece * 16;
  const uint32_t to_step = own.step * p.layout.pitch;
  if (t.columns == 0) {
    const int all = p.batch * p.height * p.width, before = origin.pixel - t.radius * (t.width + 1);
    const char* from = x + static_cast<int64_t>(before + own.first) * pixel_bytes;
    const int64_t from_step = static_cast<int64_t>(own.step) * pixel_bytes;
    for (int i = own.first; i < staged; i += own.step, to += to_step, from += from_step) {
      const bool inside = static_cast<unsigned>(before + i) < static_cast<unsigned>(all);
      ptx::cp_async16(to, inside ? from : x, inside);
    }
    return;
  }
  const int stride = t.row_stride(), down = own.step / stride, right = own.step % stride;
  int y = origin.y - t.radius + own.first / stride, column = own.first % stride;
  for (int i = own.first; i < staged; i += own.step, to += to_step) {
    const int at = origin.x - t.radius + column;
    const bool inside = static_cast<unsigned>(y) < static_cast<unsigned>(p.height) && static_cast<unsigned>(at) < static_cast<unsigned>(p.width);
    const int64_t source = static_cast<int64_t>((origin.image * p.height + y) * p.width + at);
    ptx::cp_async16(to, inside ? x + source * pixel_bytes : x, inside);
    y += down, column += right;
    if (column >= stride) column -= stride, ++y;
  }
}

// Byte offsets of each tap's input, for every pixel of the tile.
template <class Traits>
__device__ __forceinline__ void grouped_table(const GroupedParams& p, const GroupedOrigin& origin, unsigned char* smem) {
  const GroupedTile& t = p.plan.tile;
  constexpr int kK = Traits::kKernel, kRadius = kK / 2;
  const int pixels = t.pixels(), stride = t.row_stride() * p.layout.pitch;
  uint32_t* table = reinterpret_cast<uint32_t*>(smem + p.layout.table);
  for (int i = threadIdx.x; i < pixels; i += blockDim.x) {
    int y, x, limit = p.height;  // rows below the limit exist
    if (t.columns == 0) {
      const int pixel = origin.pixel + i, row = pixel / p.width;
      y = row % p.height, x = pixel - row * p.width;
      if (pixel >= p.batch * p.height * p.width) limit = -1;
    } else {
      y = origin.y + i / t.columns, x = origin.x + i % t.columns;
    }
    const int corner = t.corner(i) * p.layout.pitch;
#pragma unroll
    for (int dy = 0; dy < kK; ++dy) {
      const bool row_inside = y + dy - kRadius >= 0 && y + dy - kRadius < limit;
#pragma unroll
      for (int dx = 0; dx < kK; ++dx) {
        const bool inside = row_inside && x + dx - kRadius >= 0 && x + dx - kRadius < p.width;
        table[(dy * kK + dx) * pixels + i] = inside ? corner + dy * stride + dx * p.layout.pitch : p.layout.zero;
      }
    }
    if (Traits::kTableTaps > Traits::kTaps) table[Traits::kTaps * pixels + i] = p.layout.zero;
  }
}

template <class Traits>
struct GroupedWarp {
  using Element = typename Traits::Element;
  static constexpr int kMTiles = Traits::kMTiles, kBlocks = Traits::kBlocks;
  const GroupedParams& p;
  unsigned char* smem;
  int lane, g, q, channel, pixel;  // the warp's first
  float sums[kMTiles][kBlocks][4];

  __device__ __forceinline__ GroupedWarp(const GroupedParams& params, unsigned char* memory) : p(params), smem(memory) {
    const int warp = threadIdx.x / 32, across = p.channels / kWarpChannels;
    lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    channel = warp % across * kWarpChannels, pixel = warp / across * kMTiles * 16;
  }

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const float2 bias = p.bias != nullptr ? make_float2(__ldg(p.bias + channel + 8 * b + 2 * q), __ldg(p.bias + channel + 8 * b + 2 * q + 1))
                                            : make_float2(0.f, 0.f);
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) sums[m][b][0] = sums[m][b][2] = bias.x, sums[m][b][1] = sums[m][b][3] = bias.y;
    }
  }

  __device__ __forceinline__ void multiply() {
    constexpr bool kWide = Traits::kGroupWidth == 16;
    const int half = lane / 16, pixels = p.plan.tile.pixels();
    const uint32_t* table = reinterpret_cast<const uint32_t*>(smem + p.layout.table) + pixel + lane % 16;
    const uint32_t base = ptx::smem_address(smem) + channel * 2 + (kWide ? half * 16 : 0);
    const int tap_words = p.channels * Traits::kGroupWidth / 2;
    const uint32_t* filter = static_cast<const uint32_t*>(p.weight) + (channel + g) * (Traits::kGroupWidth / 2) + q;
#pragma unroll(Traits::kUnroll)
    for (int step = 0; step < Traits::kSteps; ++step) {
      uint32_t b[kBlocks][2];
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        const uint32_t* word = filter + (kWide ? step : 2 * step) * tap_words + i * 4 * Traits::kGroupWidth;
        b[i][0] = __ldg(word);
        b[i][1] = kWide ? __ldg(word + 4) : 2 * step + 1 < Traits::kTaps ? __ldg(word + tap_words) : 0u;
      }
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        const uint32_t from = base + table[(kWide ? step : 2 * step + half) * pixels + m * 16];
#pragma unroll
        for (int i = 0; i < kBlocks; i += kWide ? 2 : 1) {
          uint32_t x[4];
          ptx::ldmatrix_x4(x, from + i * 16);
          ptx::mma_16816<Element>(sums[m][i], x, b[i][0], b[i][1]);
          if (kWide) ptx::mma_16816<Element>(sums[m][i + 1], x, b[i + 1][0], b[i + 1][1]);
        }
      }
    }
  }

  // Each pixel's sum and sum of squares over the warp's channels.
  __device__ __forceinline__ void measure() const {
    float2* moments = reinterpret_cast<float2*>(smem + p.layout.moments) + channel / kWarpChannels * p.plan.tile.pixels() + pixel;
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sum = 0.f, square = 0.f;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          const float u = sums[m][b][2 * h], v = sums[m][b][2 * h + 1];
          sum += u + v, square = fmaf(u, u, fmaf(v, v, square));
        }
#pragma unroll
        for (int d = 1; d < 4; d *= 2) {
          sum += __shfl_xor_sync(0xffffffffu, sum, d);
          square += __shfl_xor_sync(0xffffffffu, square, d);
        }
        if (q == 0) moments[m * 16 + h * 8 + g] = make_float2(sum, square);
      }
    }
  }

  // The residual's values of the warp's pixels.
  __device__ __forceinline__ void add_residual(const GroupedOrigin& origin) {
    const Element* residual = static_cast<const Element*>(p.residual) + channel + 2 * q;
#pragma unroll
    for (int r = 0; r < 2 * kMTiles; ++r) {
      const int from = grouped_target(p, origin, pixel + r * 8 + g);
      if (from < 0) continue;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const float2 v =
            ptx::unpack2<Element>(__ldg(reinterpret_cast<const uint32_t*>(residual + static_cast<int64_t>(from) * p.channels + 8 * b)));
        sums[r / 2][b][r % 2 * 2] += v.x, sums[r / 2][b][r % 2 * 2 + 1] += v.y;
      }
    }
  }

  // Normalised and rounded, over x.
  template <bool kAffine>
  __device__ __forceinline__ void stage() const {
    float2 scale[2 * kMTiles];
#pragma unroll
    for (int r = 0; r < 2 * kMTiles; ++r) {
      scale[r] = p.has_norm ? reinterpret_cast<const float2*>(smem + p.layout.scales)[pixel + r * 8 + g] : make_float2(1.f, 0.f);
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const int c = channel + 8 * b + 2 * q;
      float2 weight = make_float2(1.f, 1.f), bias = make_float2(0.f, 0.f);
      if (kAffine && p.norm_weight != nullptr) weight = make_float2(__ldg(p.norm_weight + c), __ldg(p.norm_weight + c + 1));
      if (kAffine && p.norm_bias != nullptr) bias = make_float2(__ldg(p.norm_bias + c), __ldg(p.norm_bias + c + 1));
#pragma unroll
      for (int r = 0; r < 2 * kMTiles; ++r) {
        float u = fmaf(sums[r / 2][b][r % 2 * 2], scale[r].x, scale[r].y), v = fmaf(sums[r / 2][b][r % 2 * 2 + 1], scale[r].x, scale[r].y);
        if (kAffine) u = fmaf(u, weight.x, bias.x), v = fmaf(v, weight.y, bias.y);
        *reinterpret_cast<uint32_t*>(smem + (pixel + r * 8 + g) * p.layout.pitch + c * 2) = ptx::pack2<Element>(u, v);
      }
    }
  }
};

// The moments of all warps -> the norm's scale and shift. Plain moments in float32.
__device__ __forceinline__ void grouped_scales(const GroupedParams& p, const GroupedOrigin& origin, unsigned char* smem) {
  const int pixels = p.plan.tile.pixels();
  const float2* moments = reinterpret_cast<const float2*>(smem + p.layout.moments);
  for (int i = threadIdx.x; i < pixels; i += blockDim.x) {
    float sum = 0.f, square = 0.f;
    for (int w = 0; w < p.channels / kWarpChannels; ++w) sum += moments[w * pixels + i].x, square += moments[w * pixels + i].y;
    const float mean = sum / p.channels, scale = rsqrtf(fmaxf(square / p.channels - mean * mean, 0.f) + p.eps);
    reinterpret_cast<float2*>(smem + p.layout.scales)[i] = make_float2(scale, -mean * scale);
    if (p.rstd != nullptr) {
      const int to = grouped_target(p, origin, i);
      if (to >= 0) p.rstd[to] = scale;
    }
  }
}

__device__ __forceinline__ void grouped_store(const GroupedParams& p, const GroupedOrigin& origin, const unsigned char* smem) {
  const GroupedPiece own(p);
  const int pixels = p.plan.tile.pixels();
  const unsigned char* from = smem + own.piece * 16;
  char* a = static_cast<char*>(p.a) + own.piece * 16;
  for (int pixel = own.first; pixel < pixels; pixel += own.step) {
    const int to = grouped_target(p, origin, pixel);
    const uint4 value = *reinterpret_cast<const uint4*>(from + pixel * p.layout.pitch);
    if (to >= 0) *reinterpret_cast<uint4*>(a + static_cast<int64_t>(to) * p.channels * 2) = value;
  }
}

template <class Traits>
__global__ void __maxnreg__(grouped_registers(Traits::kMTiles))
    grouped_conv_norm_fwd_sm90(const __grid_constant__ GroupedParams p) {
  extern __shared__ __align__(128) unsigned char smem[];
  for (int i = threadIdx.x; i < p.layout.pitch / 16; i += blockDim.x) {
    reinterpret_cast<uint4*>(smem + p.layout.zero)[i] = make_uint4(0, 0, 0, 0);
  }
  grid::wait_for_inputs();
  grid::launch_dependents();  // after the wait: the next launch may count on what came before this one
  {
    const GroupedOrigin origin(p.plan);
    grouped_load(p, origin, smem);
    ptx::cp_async_commit();
    grouped_table<Traits>(p, origin, smem);
  }
  GroupedWarp<Traits> warp(p, smem);
  warp.start();
  ptx::cp_async_wait<0>();
  __syncthreads();
  warp.multiply();
  if (p.residual != nullptr) warp.add_residual(GroupedOrigin(p.plan));
  if (p.has_norm) {
    warp.measure();
    __syncthreads();
    grouped_scales(p, GroupedOrigin(p.plan), smem);
  }
  __syncthreads();
  if (p.has_norm && (p.norm_weight != nullptr || p.norm_bias != nullptr)) {
    warp.template stage<true>();
  } else {
    warp.template stage<false>();
  }
  __syncthreads();
  grouped_store(p, GroupedOrigin(p.plan), smem);
}

}  // namespace convfirst::block_fusion::sm90
