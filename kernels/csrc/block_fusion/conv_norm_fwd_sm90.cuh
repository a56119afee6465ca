// First launch of the split path on Hopper for depthwise 7x7 filters: A = LayerNorm(conv(x) + bias), in one pass over x, on tensor cores.
//
//   a cluster owns a tile of pixels, each of its blocks a slab of channels; blocks exchange only each pixel's moments.
//
//   x, 32 channels with halo                       convolution            staged [pixels x slab]     LayerNorm
//   +----------------------+   +-------------+      mma.sync, fp32         +------------------+     +----------+
//   | strips of 8 pixels,  |-->| a warp: two |--> sums of 8 rows x 8  --> | 16 bit, + bias   | --> | A, 16-byte
//   | up to 8 of them, and |   | channels    |     pixels x 8 strips in   |                  |     | stores   |
//   | 8 rows of each       |   |             |     16 registers           +------------------+     +----------+
//   +----------------------+   +-------------+                                     ^ next slice of 32 channels
//
//   x is laid out by channel. An mma multiplies 16 strips (8, and the same four rows on) of 16 inputs with a Toeplitz matrix
//     of one row of the filter, which gives 8 outputs of each: 7 of 16 inputs count (1 of 8 if pixels met a diagonal matrix of 8
//     channels). Narrow maps take 8 inputs of two rows instead. Input rows stay in registers for up to four output rows.
//   Zeros of these matrices meet neighbouring values of x: an infinity in x may spread a few pixels or channels further as NaN.
//
//   what                          where                                            written by          released when
//   x                             shared, [pixel][32 channels]                     TMA, one thread     rearranged
//   x by channel                  shared, [channel][row][8-pixel unit]             all, transposed     slice multiplied
//   filter                        shared, whole slab; a channel's in registers     prologue            -
//   sums                          16 registers                                     mma.sync            staged
//   convolution + bias, 16 bit    shared, staged pixels, odd number of chunks      multiply            stored
//   moments of a pixel            shared of every block of the cluster             measure, mma.sync   two tiles later
//   norm's vectors                shared, float32                                  prologue            -
#pragma once

#include <type_traits>

#include "../common/grid_sm90.cuh"
#include "../common/ptx.cuh"
#include "../common/sm90.cuh"
#include "conv_norm_sm90.h"

namespace convfirst::block_fusion::sm90 {

using convfirst::sm90::TransactionBarrier;

template <DType kDType, bool kNarrow_>
struct ConvNormTraits {
  using Element = std::conditional_t<kDType == DType::kHalf, __half, __nv_bfloat16>;
  static constexpr int kKernel = kConvNormKernel;
  static constexpr bool kNarrow = kNarrow_;
  static constexpr int kPad = kKernel / 2;
  static constexpr int kWarps = kConvNormThreads / 32;
  static constexpr int kRows = 8;                         // output rows that a warp sums at once
  static constexpr int kFilterWords = 56;                 // depthwise, a channel: of each row pairs (0, w0), (w0, w1) ... (w6, 0)
};

// Keeps what is computed from v inside the loop over tiles: hoisted, it would cost registers that the convolution needs.
__device__ __forceinline__ int in_place(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// Where a tile begins.
struct ConvNormOrigin {
  int image, y, x;
};

// The slices of this block's tiles in order; one goes ahead for the loads, one with the products.
struct SliceCursor {
  int tiles, slice;  // tiles left, this one included
  int image, y, x;   // of the tile, in tiles

  __device__ __forceinline__ explicit SliceCursor(const ConvNormPlan& plan) : slice(0) {
    const int first = static_cast<int>(blockIdx.x) / plan.cluster, row = first / plan.tiles_x;
    tiles = (plan.tiles - first + plan.clusters - 1) / plan.clusters;
    x = first % plan.tiles_x, y = row % plan.tiles_y, image = row / plan.tiles_y;
  }

  // True: a new tile begins.
  __device__ __forceinline__ bool advance(const ConvNormPlan& plan, int slices) {
    if (++slice < slices) return false;
    slice = 0;
    x += plan.step_x, y += plan.step_y, image += plan.step_image;
    if (x >= plan.tiles_x) x -= plan.tiles_x, ++y;
    if (y >= plan.tiles_y) y -= plan.tiles_y, ++image;
    return --tiles > 0;
  }

  __device__ __forceinline__ ConvNormOrigin origin(const ConvNormTile& t) const {
    return {image * t.images, y * t.groups * t.rows, x * t.strips * 8};
  }
};

// ---------------------------------------------------------------------------------------------------------------------------
// x: TMA loads into [row][pixel][32 channels], chunks of 8 channels permuted by pixel pair (64-byte swizzle)

struct ConvNormSlot {
  int unit;   // its first; slots beyond the tile's repeat slot 0
  int place;  // image << 16 | row << 8 | column of its first output pixel in the tile; -1: no such slot
};

__device__ __forceinline__ void fill_slots(const ConvNormTile& t, ConvNormSlot* slots) {
  if (threadIdx.x >= kConvNormSlots) return;
  const int slot = threadIdx.x, group = slot / t.strips;
  const int place = (group / t.groups) << 16 | (group % t.groups * t.rows) << 8 | (slot % t.strips * 8);
  slots[slot] = slot < t.slots() ? ConvNormSlot{t.slot_unit(slot), place} : ConvNormSlot{0, -1};
}

// One thread; `full` completes when the slice has arrived.
template <class Traits>
__device__ __forceinline__ void load_slice(const ConvNormParams& p, const CUtensorMap& x_map, unsigned char* buffer,
                                           TransactionBarrier* full, int slab_start, const SliceCursor& ahead) {
  const ConvNormTile& t = p.plan.tile;
  const ConvNormOrigin origin = ahead.origin(t);
  full->arrive_and_expect_tx(t.box_bytes());
  const int halo_x = Traits::kNarrow ? 0 : Traits::kPad - t.pad_cols;
  convfirst::sm90::tma_load_4d(&x_map, full, buffer, slab_start + ahead.slice * kConvNormSlice, origin.x - halo_x,
                               origin.y - (Traits::kPad - t.pad_rows), origin.image);
}

// Depthwise: turns [pixel][channel] into a plane a channel. A warp takes every 16th unit of the planes: ldmatrix transposes 8 pixels
// x 8 channels, four times. What lies beyond the box is read from a zero; the addresses are the same for every slice and tile.
template <class Traits>
struct PlaneWriter {
  static constexpr int kUnits = conv_norm_most_units(Traits::kNarrow) / Traits::kWarps;
  uint32_t from[kUnits];
  int to[kUnits];  // -1: none

  __device__ __forceinline__ PlaneWriter(const ConvNormParams& p, unsigned char* smem) {
    const ConvNormTile& t = p.plan.tile;
    const int lane = threadIdx.x % 32, chunk = lane / 8;
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int index = threadIdx.x / 32 + i * Traits::kWarps, row_index = index / t.row_units, unit = index % t.row_units;
      const int image = row_index / t.box_rows, row = row_index % t.box_rows, column = unit * 8 + lane % 8 - t.pad_cols;
      const int pixel = row_index * t.box_cols + column;
      const bool inside = column >= 0 && column < t.box_cols;
      from[i] = ptx::smem_address(smem) + (inside ? pixel * 64 + ((chunk ^ (pixel >> 1 & 3)) << 4) : p.layout.zero);
      const int place = (image * t.image_units + t.row_unit(row + t.pad_rows) + unit) * 16;
      to[i] = image < t.images ? place + lane / 4 * p.layout.plane_bytes + lane % 4 * 4 : -1;
    }
  }

  __device__ __forceinline__ void write(const ConvNormParams& p, unsigned char* smem) const {
    unsigned char* planes = smem + p.layout.planes;
    const int chunk_bytes = 8 * p.layout.plane_bytes;
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      if (to[i] < 0) continue;
      uint32_t pairs[4];
      grid::ldmatrix_x4_transposed(pairs, from[i]);
      unsigned char* at = planes + to[i];
#pragma unroll
      for (int c = 0; c < 4; ++c) *reinterpret_cast<uint32_t*>(at + c * chunk_bytes) = pairs[c];
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------------
// Convolution of a slice: x in shared memory -> staged rows. Staged row of (row, slot, pixel): row * stride + (slot % 2) * 32 +
// slot / 2 * 8 + pixel. Depthwise rotates the words of a 16-byte chunk by slot / 2, so that a warp's stores hit all banks.

// Toeplitz matrices of one channel's filter rows, as B operands of m16n8k16: 8 outputs from 16 inputs of one row (narrow: from 8
// inputs of each of two rows, filter rows dy and dy + 1).
template <class Traits>
struct ToeplitzFilter {
  static constexpr int kK = Traits::kKernel;
  uint32_t low[kK], high[Traits::kNarrow ? 1 : kK];

  // from: the channel's words in shared memory.
  __device__ __forceinline__ ToeplitzFilter(const uint32_t* from, int lane) {
    const int g = lane / 4, q = lane % 4;
    if constexpr (Traits::kNarrow) {  // output g takes tap k - g + 3 of input k; this lane holds k = 2q, 2q + 1
      const int tap = 2 * q - g + kK / 2;
      const bool exists = tap >= -1 && tap < kK;
      from += exists ? tap + 1 : 0;
#pragma unroll
      for (int dy = 0; dy < kK; ++dy) low[dy] = exists ? from[dy * 8] : 0u;
    } else {  // output g takes tap k - g of input k; this lane holds k = 2q, 2q + 1 and 8 more: one of the two pairs is zero
      const int tap = 2 * q - g;
      const bool is_low = tap >= -1;
      from += (is_low ? tap : tap + 8) + 1;
#pragma unroll
      for (int dy = 0; dy < kK; ++dy) {
        const uint32_t taps = from[dy * 8];
        low[dy] = is_low ? taps : 0u, high[dy] = is_low ? 0u : taps;
      }
    }
  }

  __device__ __forceinline__ uint32_t first(int dy) const { return dy >= 0 && dy < kK ? low[dy] : 0u; }
  __device__ __forceinline__ uint32_t second(int dy) const {
    if (Traits::kNarrow) return first(dy + 1);
    return dy >= 0 && dy < kK ? high[Traits::kNarrow ? 0 : dy] : 0u;
  }
};

// A warp owns two channels, one after the other. The 16 rows of a product are the 8 slots, and the 8 slots four rows on.
template <class Traits>
__device__ __forceinline__ void multiply(const ConvNormParams& p, unsigned char* smem, int slice) {
  using Element = typename Traits::Element;
  constexpr int kK = Traits::kKernel, kHalf = Traits::kRows / 2, kStep = Traits::kNarrow ? 2 : 1;  // input rows of a product
  const ConvNormTile& t = p.plan.tile;
  const int thread = in_place(threadIdx.x), lane = thread % 32, warp = thread / 32, g = lane / 4, q = lane % 4;
  const int pair = slice * (kConvNormSlice / 2) + warp;
  if (pair * 2 >= p.plan.slab) return;

  // ldmatrix: lane % 8: slot; lane / 8 % 2: four rows on; lane / 16: the second unit of 8 inputs (narrow: the next row).
  const int first_row = lane / 8 % 2 * kHalf + (Traits::kNarrow ? lane / 16 : 0);
  const int unit = reinterpret_cast<const ConvNormSlot*>(smem + p.layout.slots)[lane % 8].unit + (Traits::kNarrow ? 0 : lane / 16);
  const float* bias = reinterpret_cast<const float*>(smem + p.layout.vectors) + pair * 2;
  const int last_row = t.rows + kK - 2;
  const uint32_t plane = ptx::smem_address(smem + p.layout.planes) + warp * 2 * p.layout.plane_bytes + unit * 16;
  uint32_t at[(kHalf + kK - 1 + kStep - 1) / kStep];  // of each input row
#pragma unroll
  for (int step = 0; step < kHalf + kK - 1; step += kStep) {
    const int row = min(first_row + step, last_row);
    at[step / kStep] = plane + (row * t.row_units + (row >= t.rows ? t.skew : 0)) * 16;
  }
  uint32_t rounded[2][kHalf][2];  // of each channel and row (and four rows on): pixels 2q, 2q + 1
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const ToeplitzFilter<Traits> filter(reinterpret_cast<const uint32_t*>(smem + p.layout.weights) + (pair * 2 + c) * Traits::kFilterWords,
                                        lane);
    float start[4], sums[kHalf][4];
    grid::fill_quad(start, bias[c]);
#pragma unroll
    for (int step = 0; step < kHalf + kK - 1; step += kStep) {
      uint32_t x[4];
      ptx::ldmatrix_x4(x, at[step / kStep]);
      at[step / kStep] += p.layout.plane_bytes;
#pragma unroll
      for (int y = 0; y < kHalf; ++y) {
        const int dy = step - y;
        if (dy > -kStep && dy <= 0) {  // the row's first product
          grid::mma_16816_from<Element>(sums[y], x, filter.first(dy), filter.second(dy), start);
        } else if (dy > 0 && dy < kK) {
          ptx::mma_16816<Element>(sums[y], x, filter.first(dy), filter.second(dy));
        }
      }
    }
#pragma unroll
    for (int y = 0; y < kHalf; ++y) {
      rounded[c][y][0] = ptx::pack2<Element>(sums[y][0], sums[y][1]);
      rounded[c][y][1] = ptx::pack2<Element>(sums[y][2], sums[y][3]);
    }
  }

  if (g >= t.slots()) return;
  const int pitch = p.layout.pitch, row_bytes = conv_norm_row_stride(t) * pitch;
  unsigned char* to = smem + p.layout.staging + (g % 2 * conv_norm_odd_slots(t) + g / 2 * 8 + 2 * q) * pitch + pair / 4 * 16 +
                      (pair + g / 2) % 4 * 4;
#pragma unroll
  for (int y = 0; y < 2 * kHalf; ++y) {
    const uint32_t a = rounded[0][y % kHalf][y / kHalf], b = rounded[1][y % kHalf][y / kHalf];
    if (y < 7 || t.rows == 8) {
      *reinterpret_cast<uint32_t*>(to) = __byte_perm(a, b, 0x5410);
      *reinterpret_cast<uint32_t*>(to + pitch) = __byte_perm(a, b, 0x7632);
    }
    to += row_bytes;
  }
}

// ---------------------------------------------------------------------------------------------------------------------------
// LayerNorm and store

__device__ __forceinline__ float2 scale_and_shift(const ConvNormParams& p, float sum, float square) {
  const float mean = sum / p.channels, scale = rsqrtf(fmaxf(square / p.channels - mean * mean, 0.f) + p.eps);
  return make_float2(scale, -mean * scale);
}

// Each staged pixel's sum and sum of squares over the slab, on tensor cores: 16 pixels times a column of ones, and times themselves,
// of which the diagonal counts. Alone in its cluster a block writes the norm's scale and shift at once. Plain moments in float32:
// they lose what 16-bit numbers do not have (a mean 2^11 times the spread).
template <class Traits>
__device__ __forceinline__ void measure(const ConvNormParams& p, unsigned char* smem, float2* moments) {
  using Element = typename Traits::Element;
  const int thread = in_place(threadIdx.x), lane = thread % 32, g = lane / 4;
  const uint32_t one = ptx::pack2<Element>(1.f, 1.f);
  const int chunks = (p.plan.slab + 7) / 8, half = lane >> 4;
  for (int first = thread / 32 * 16; first < p.layout.staged_rows; first += kConvNormThreads / 2) {
    const int pixel = min(first + lane % 16, p.layout.staged_rows - 1);
    const uint32_t from = ptx::smem_address(smem + p.layout.staging) + pixel * p.layout.pitch + half * 16;
    float sum[4] = {}, low[4] = {}, high[4] = {};
#pragma unroll 2
    for (int chunk = 0; chunk < chunks; chunk += 2) {
      uint32_t x[4];
      ptx::ldmatrix_x4(x, chunk + half < chunks ? from + chunk * 16 : ptx::smem_address(smem + p.layout.zero));
      ptx::mma_16816<Element>(sum, x, one, one);
      ptx::mma_16816<Element>(low, x, x[0], x[2]);
      ptx::mma_16816<Element>(high, x, x[1], x[3]);
    }
    const bool complete = p.plan.cluster == 1;
    if (lane % 4 == g / 2) {  // on the diagonal
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float total = sum[2 * h], square = h ? (g % 2 ? high[3] : high[2]) : (g % 2 ? low[1] : low[0]);
        if (first + 8 * h + g < p.layout.staged_rows)
          moments[first + 8 * h + g] = complete ? scale_and_shift(p, total, square) : make_float2(total, square);
      }
    }
    __syncwarp();
  }
}

// Sums of the cluster's blocks: the four lanes of a pixel share the work.
__device__ __forceinline__ float2 gather(const ConvNormParams& p, uint32_t moments, int lane) {
  float sum = 0.f, square = 0.f;
  for (int rank = lane % 4; rank < p.plan.cluster; rank += 4) {
    const float2 v = grid::load_peer(moments, rank);
    sum += v.x, square += v.y;
  }
#pragma unroll
  for (int d = 1; d < 4; d *= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, d);
    square += __shfl_xor_sync(0xffffffffu, square, d);
  }
  return scale_and_shift(p, sum, square);
}

template <class Element>
__device__ __forceinline__ uint32_t add2(uint32_t a, uint32_t b) {
  const float2 u = ptx::unpack2<Element>(a), v = ptx::unpack2<Element>(b);
  return ptx::pack2<Element>(u.x + v.x, u.y + v.y);
}

// Normalises and stores. Four lanes share a pixel; a warp has eight pixels (lane / 8: slot / 2; lane / 4 % 2: four pixels on) of every
// second row.
template <class Traits>
__device__ __forceinline__ void write(const ConvNormParams& p, unsigned char* smem, int slab_start, const SliceCursor& tile,
                                      const float2* moments) {
  using Element = typename Traits::Element;
  constexpr int kRows = Traits::kRows / 2;
  const ConvNormTile& t = p.plan.tile;
  const int thread = in_place(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int first_row = warp / 8, parity = warp / 4 % 2, pixel = lane / 4 % 2 * 4 + warp % 4;
  const int place = reinterpret_cast<const ConvNormSlot*>(smem + p.layout.slots)[lane / 8 * 2 + parity].place;
  const ConvNormOrigin origin = tile.origin(t);
  const int image = origin.image + (place >> 16), y = origin.y + (place >> 8 & 255) + first_row, x = origin.x + (place & 255) + pixel;
  const bool exists = place >= 0 && image < p.batch && x < p.width;
  const int rows = exists ? min(t.rows - first_row, p.height - y) : 0;  // that this lane stores, every second
  const int staged = place >= 0 ? first_row * conv_norm_row_stride(t) + parity * conv_norm_odd_slots(t) + lane / 8 * 8 + pixel : 0;
  const int two_rows = place >= 0 ? 2 * conv_norm_row_stride(t) : 0, last = (t.rows - 1 - first_row) / 2;
  float2 norm[kRows];
  if (p.has_norm) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float2* own = moments + staged + min(r, max(last, 0)) * two_rows;
      norm[r] = p.plan.cluster > 1 ? gather(p, ptx::smem_address(own), lane) : *own;
      if (p.rstd != nullptr && slab_start == 0 && lane % 4 == 0 && 2 * r < rows)
        p.rstd[(image * p.height + y + 2 * r) * p.width + x] = norm[r].x;
    }
  }
  const int slab = min(p.plan.slab, p.channels - slab_start), channels = (p.plan.slab + 7) / 8 * 8;
  const unsigned char* from = smem + p.layout.staging + staged * p.layout.pitch;
  Element* out = static_cast<Element*>(p.a) + static_cast<int64_t>((image * p.height + y) * p.width + x) * p.channels + slab_start;
  const int64_t two_rows_out = 2 * static_cast<int64_t>(p.width) * p.channels, from_a = out - static_cast<Element*>(p.a);
  const int row_bytes = two_rows * p.layout.pitch;
#pragma unroll 1
  for (int channel = lane % 4 * 8; channel < slab; channel += 32) {
    const float* vectors = reinterpret_cast<const float*>(smem + p.layout.vectors) + channels + channel;
    float weight[8], bias[8];
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      *reinterpret_cast<float4*>(weight + j) = *reinterpret_cast<const float4*>(vectors + j);
      *reinterpret_cast<float4*>(bias + j) = *reinterpret_cast<const float4*>(vectors + channels + j);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (2 * r >= rows) continue;
      const uint32_t* words = reinterpret_cast<const uint32_t*>(from + r * row_bytes + channel * 2);
      uint32_t w[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) w[j] = words[(j + lane / 8) % 4];
      if (p.has_norm) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 v = ptx::unpack2<Element>(w[j]);
          w[j] = ptx::pack2<Element>(fmaf(fmaf(v.x, norm[r].x, norm[r].y), weight[2 * j], bias[2 * j]),
                                     fmaf(fmaf(v.y, norm[r].x, norm[r].y), weight[2 * j + 1], bias[2 * j + 1]));
        }
      } else if (p.residual != nullptr) {
        const Element* residual = static_cast<const Element*>(p.residual) + from_a + r * two_rows_out + channel;
        const uint4 v = __ldg(reinterpret_cast<const uint4*>(residual));
        w[0] = add2<Element>(w[0], v.x), w[1] = add2<Element>(w[1], v.y), w[2] = add2<Element>(w[2], v.z), w[3] = add2<Element>(w[3], v.w);
      }
      *reinterpret_cast<uint4*>(out + r * two_rows_out + channel) = make_uint4(w[0], w[1], w[2], w[3]);
    }
  }
}

// The moments of a tile in a cluster's blocks: two tiles' are kept, since the last one's may still be read by peers.
__device__ __forceinline__ float2* moments_of(const ConvNormParams& p, unsigned char* smem, const SliceCursor& tile) {
  return reinterpret_cast<float2*>(smem + p.layout.moments) + (p.plan.cluster > 1 ? tile.tiles % 2 * p.layout.staged_rows : 0);
}

// Normalises the staged tile and stores it. `next` rearranges what comes after it, while the moments are on their way.
template <class Traits, class Next>
__device__ __forceinline__ void normalise(const ConvNormParams& p, unsigned char* smem, int slab_start, const SliceCursor& tile, Next&& next) {
  float2* moments = moments_of(p, smem, tile);
  const bool exchanges = p.has_norm && p.plan.cluster > 1;
  if (p.has_norm) measure<Traits>(p, smem, moments);
  if (exchanges) grid::cluster_arrive();
  next();
  if (exchanges) {
    grid::cluster_wait();
  } else {
    __syncthreads();
  }
  write<Traits>(p, smem, slab_start, tile, moments);
}

// ---------------------------------------------------------------------------------------------------------------------------
// The kernel

// The slab's filter and vectors into shared memory; channels beyond the tensor get zeros.
template <class Traits>
__device__ __forceinline__ void load_parameters(const ConvNormParams& p, unsigned char* smem, int slab_start) {
  const int slab = p.plan.slab, channels = (slab + 7) / 8 * 8, thread = threadIdx.x;
  float* vectors = reinterpret_cast<float*>(smem + p.layout.vectors);
  if (thread < 4) reinterpret_cast<uint32_t*>(smem + p.layout.zero)[thread] = 0;
  for (int i = thread; i < channels; i += kConvNormThreads) {
    const int c = slab_start + i;
    const bool exists = c < p.channels;
    vectors[i] = exists && p.bias != nullptr ? __ldg(p.bias + c) : 0.f;
    vectors[channels + i] = exists && p.norm_weight != nullptr ? __ldg(p.norm_weight + c) : 1.f;
    vectors[2 * channels + i] = exists && p.norm_bias != nullptr ? __ldg(p.norm_bias + c) : 0.f;
  }
  // A thread has a row of the filter, of two channels: seven loads in flight together.
  constexpr int kK = Traits::kKernel;
  const int pairs = slab / 2;
  const uint16_t* taps = static_cast<const uint16_t*>(p.weight) + slab_start;
  for (int i = thread; i < kK * pairs; i += kConvNormThreads) {
    const int row = i / pairs, c = (i - row * pairs) * 2;
    uint32_t tap[kK];
#pragma unroll
    for (int column = 0; column < kK; ++column) {
      const uint16_t* at = taps + (row * kK + column) * p.channels + c;
      tap[column] = slab_start + c < p.channels ? __ldg(reinterpret_cast<const uint32_t*>(at)) : 0u;
    }
    uint32_t* to = reinterpret_cast<uint32_t*>(smem + p.layout.weights) + c * Traits::kFilterWords + row * 8;
#pragma unroll
    for (int channel = 0; channel < 2; ++channel) {
      uint32_t words[kK + 1];
#pragma unroll
      for (int column = 0; column <= kK; ++column) {
        const uint32_t first = column > 0 ? tap[column - 1] : 0u, second = column < kK ? tap[column] : 0u;
        words[column] = __byte_perm(first, second, channel == 0 ? 0x5410 : 0x7632);
      }
      uint4* at = reinterpret_cast<uint4*>(to + channel * Traits::kFilterWords);
      at[0] = make_uint4(words[0], words[1], words[2], words[3]), at[1] = make_uint4(words[4], words[5], words[6], words[7]);
    }
  }
}

template <class Traits>
__device__ __forceinline__ void run(const ConvNormParams& p, const CUtensorMap& x_map, unsigned char* smem,
                                              TransactionBarrier* full, int slab_start, int slices) {
  SliceCursor tile(p.plan), ahead = tile;
  if (threadIdx.x == 0) load_slice<Traits>(p, x_map, smem, full, slab_start, ahead);
  load_parameters<Traits>(p, smem, slab_start);  // under the first slice's way here
  const PlaneWriter<Traits> planes(p, smem);
  __syncthreads();
  uint32_t phase = 0;
  const auto rearrange = [&] {
    full->wait(phase);
    phase ^= 1;
    planes.write(p, smem);
  };
  rearrange();
#pragma unroll 1
  while (tile.tiles > 0) {
    __syncthreads();
    ahead.advance(p.plan, slices);
    const bool more = ahead.tiles > 0;
    if (threadIdx.x == 0 && more) load_slice<Traits>(p, x_map, smem, full, slab_start, ahead);  // under the products
    multiply<Traits>(p, smem, tile.slice);
    __syncthreads();
    const auto next = [&] {
      if (more) rearrange();
    };
    if (tile.slice + 1 == slices) {
      normalise<Traits>(p, smem, slab_start, tile, next);
    } else {
      next();
    }
    tile.advance(p.plan, slices);
  }
}

template <class Traits>
__global__ void __launch_bounds__(kConvNormThreads, 1)
    conv_norm_fwd_sm90(const __grid_constant__ ConvNormParams p, const __grid_constant__ CUtensorMap x_map) {
  extern __shared__ __align__(1024) unsigned char smem[];
  TransactionBarrier* full = reinterpret_cast<TransactionBarrier*>(smem + p.layout.barriers);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 4; ++i) full[i].init(1);
    grid::fence_barrier_init();
  }
  // Halo that is never loaded must read as zero, staged pixels of channels that don't exist as finite.
  for (int i = p.layout.planes / 16 + threadIdx.x; i < p.layout.weights / 16; i += kConvNormThreads)
    reinterpret_cast<uint4*>(smem)[i] = make_uint4(0, 0, 0, 0);
  const int slab_start = (p.plan.cluster > 1 ? grid::cluster_rank() : 0) * p.plan.slab;
  const int slices = (p.plan.slab + kConvNormSlice - 1) / kConvNormSlice;
  fill_slots(p.plan.tile, reinterpret_cast<ConvNormSlot*>(smem + p.layout.slots));
  grid::wait_for_inputs();
  grid::launch_dependents();  // after the wait: the next launch may count on what came before this one
  run<Traits>(p, x_map, smem, full, slab_start, slices);
  if (p.plan.cluster > 1) grid::cluster_barrier();  // peers may still read this block's moments
}

}  // namespace convfirst::block_fusion::sm90
