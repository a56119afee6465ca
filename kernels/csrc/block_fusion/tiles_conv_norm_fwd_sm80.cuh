// First launch of the portable split path for depthwise 7x7 filters on wide maps: A = LayerNorm(conv(x) + bias), in one pass over x, on
// tensor cores. conv_norm_fwd_sm90.cuh, which draws the tile, with cp.async in the place of TMA and a block a tile in that of clusters.
//
//   what                          where                                            written by          released when
//   x                             shared, [pixel][32 channels], chunks swizzled    cp.async, all       rearranged
//   x by channel                  shared, [channel][row][8-pixel unit]             all, transposed     slice multiplied
//   filter                        shared, all channels; a channel's in registers   prologue            -
//   sums                          16 registers                                     mma.sync            staged
//   convolution + bias, 16 bit    shared, staged pixels, odd number of chunks      multiply            stored
//   moments of a pixel            shared                                           measure, mma.sync   stored
//   norm's vectors                shared, float32                                  prologue            -
#pragma once

#include "conv_norm_fwd_sm90.cuh"

namespace convfirst::block_fusion::sm80 {

// What the compiler knows to have one block a cluster: for the exchange of more there are no instructions on sm_80.
__device__ __forceinline__ sm90::ConvNormParams without_cluster(const sm90::ConvNormParams& p) {
  sm90::ConvNormParams alone = p;
  alone.plan.cluster = 1;
  return alone;
}

// A slice of a tile, by their numbers: where the tile lies is worked out again where it is needed, registers are short between.
struct SliceOf {
  int tile, slice;

  __device__ __forceinline__ SliceOf next(const sm90::ConvNormPlan& plan, int slices) const {
    return slice + 1 < slices ? SliceOf{tile, slice + 1} : SliceOf{tile + plan.clusters, 0};
  }

  __device__ __forceinline__ sm90::SliceCursor cursor(const sm90::ConvNormPlan& plan) const {
    sm90::SliceCursor at(plan);
    const int number = sm90::in_place(tile), row = number / plan.tiles_x;
    at.slice = slice, at.x = number - row * plan.tiles_x, at.image = row / plan.tiles_y, at.y = row - at.image * plan.tiles_y;
    return at;
  }
};

// Issues a thread's copies of a slice: one 16-byte chunk of every 128th pixel of the box; the caller commits. What lies outside the map
// becomes zeros.
template <class Traits>
__device__ __forceinline__ void copy_box(const sm90::ConvNormParams& p, unsigned char* smem, const SliceOf& ahead) {
  constexpr int kStep = sm90::kConvNormThreads / 4;
  const sm90::ConvNormTile& t = p.plan.tile;
  const sm90::ConvNormOrigin origin = ahead.cursor(p.plan).origin(t);
  const int thread = sm90::in_place(threadIdx.x), chunk = thread % 4, channel = ahead.slice * sm90::kConvNormSlice + chunk * 8;
  const int first_x = origin.x - (Traits::kPad - t.pad_cols), first_y = origin.y - (Traits::kPad - t.pad_rows);
  const int images = channel < p.channels ? p.batch - origin.image : 0;
  const int down = kStep / t.box_cols, right = kStep - down * t.box_cols, pixels = t.images * t.box_rows * t.box_cols;
  const char* x = static_cast<const char*>(p.x);
  // Worked out for each slice, by a quotient that float32 gives right: three registers would be too many to keep it.
  const int rows = static_cast<int>((thread / 4 + 0.5f) / t.box_cols);
  int i = static_cast<int>((rows + 0.5f) / t.box_rows), r = rows - i * t.box_rows, c = thread / 4 - rows * t.box_cols;
#pragma unroll 1
  for (int pixel = thread / 4; pixel < pixels; pixel += kStep) {
    const bool inside = i < images && static_cast<unsigned>(first_y + r) < static_cast<unsigned>(p.height) &&
                        static_cast<unsigned>(first_x + c) < static_cast<unsigned>(p.width);
    const int64_t from = static_cast<int64_t>((origin.image + i) * p.height + first_y + r) * p.width + first_x + c;
    ptx::cp_async16(ptx::smem_address(smem) + pixel * 64 + ((chunk ^ (pixel >> 1 & 3)) << 4),
                    inside ? x + (from * p.channels + channel) * 2 : x, inside);
    c += right, r += down;
    if (c >= t.box_cols) c -= t.box_cols, ++r;
    while (r >= t.box_rows) r -= t.box_rows, ++i;
  }
}

// sm90::PlaneWriter, whose addresses (multiples of 16, and of 4) share a register: apart they spilled.
template <class Traits>
struct PackedPlanes {
  using Writer = sm90::PlaneWriter<Traits>;
  static constexpr uint32_t kNone = (1u << 18) - 1u;
  uint32_t packed[Writer::kUnits];

  __device__ __forceinline__ PackedPlanes(const sm90::ConvNormParams& p, unsigned char* smem) {
    const Writer writer(p, smem);
#pragma unroll
    for (int i = 0; i < Writer::kUnits; ++i)
      packed[i] = writer.from[i] / 16 | (writer.to[i] < 0 ? kNone : static_cast<uint32_t>(writer.to[i]) / 4) << 14;
  }

  __device__ __forceinline__ void write(const sm90::ConvNormParams& p, unsigned char* smem) const {
    unsigned char* planes = smem + p.layout.planes;
#pragma unroll
    for (int i = 0; i < Writer::kUnits; ++i) {
      const uint32_t word = static_cast<uint32_t>(sm90::in_place(static_cast<int>(packed[i])));
      if (word >> 14 == kNone) continue;
      uint32_t pairs[4];
      ptx::ldmatrix_x4_transposed(pairs, word % (1u << 14) * 16);
      unsigned char* at = planes + (word >> 14) * 4;
#pragma unroll
      for (int c = 0; c < 4; ++c) *reinterpret_cast<uint32_t*>(at + c * 8 * p.layout.plane_bytes) = pairs[c];
    }
  }
};

template <class Traits>
__device__ __forceinline__ void run_tiles(const sm90::ConvNormParams& p, unsigned char* smem) {
  const int slices = (p.plan.slab + sm90::kConvNormSlice - 1) / sm90::kConvNormSlice;
  SliceOf now{static_cast<int>(blockIdx.x), 0};
  copy_box<Traits>(p, smem, now);
  ptx::cp_async_commit();
  sm90::load_parameters<Traits>(p, smem, 0);  // under the first slice's way here
  const PackedPlanes<Traits> planes(p, smem);
  ptx::cp_async_wait<0>();
  __syncthreads();
  planes.write(p, smem);
#pragma unroll 1
  while (now.tile < p.plan.tiles) {
    __syncthreads();
    if (now.next(p.plan, slices).tile < p.plan.tiles) copy_box<Traits>(p, smem, now.next(p.plan, slices));  // under the products
    ptx::cp_async_commit();
    sm90::multiply<Traits>(p, smem, now.slice);
    ptx::cp_async_wait<0>();
    __syncthreads();
    now.slice = sm90::in_place(now.slice);  // what follows from it is not kept during the products
    const SliceOf ahead = now.next(p.plan, slices);
    const bool more = ahead.tile < p.plan.tiles, last = ahead.tile != now.tile;
    float2* moments = reinterpret_cast<float2*>(smem + p.layout.moments);
    if (last && p.has_norm) sm90::measure<Traits>(p, smem, moments);
    if (more) planes.write(p, smem);
    if (last) {
      __syncthreads();
      sm90::write<Traits>(p, smem, 0, now.cursor(p.plan), moments);
    }
    now = ahead;
  }
}

template <class Traits>
__global__ void __launch_bounds__(sm90::kConvNormThreads, 1) tiles_conv_norm_fwd_sm80(const __grid_constant__ sm90::ConvNormParams params) {
  extern __shared__ __align__(1024) unsigned char smem[];
  const sm90::ConvNormParams p = without_cluster(params);
  // Halo that is never loaded must read as zero, staged pixels of channels that don't exist as finite.
  for (int i = p.layout.planes / 16 + threadIdx.x; i < p.layout.weights / 16; i += sm90::kConvNormThreads)
    reinterpret_cast<uint4*>(smem)[i] = make_uint4(0, 0, 0, 0);
  sm90::fill_slots(p.plan.tile, reinterpret_cast<sm90::ConvNormSlot*>(smem + p.layout.slots));
  run_tiles<Traits>(p, smem);
}

}  // namespace convfirst::block_fusion::sm80
