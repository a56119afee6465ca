// The downsampling layer of downsample_fwd_mma.cuh on Hopper, by wgmma with the left operand in registers: a warp loads its own rows,
// normalises them in registers and multiplies. The matrix stays in shared memory; nothing waits for another warp but wgmma itself.
//
//      x, one tap of 16 pixels            the same                        y, 16 pixels a warp
//    +-------------------------+      +-----------------+     W[tap]     +----------------+
//    | 16 x C, a ring a warp   |----->| registers,      |--------------->| += , tap       |----> + bias, NHWC
//    +-------------------------+      | normalised      |     wgmma      | after tap      |
//               ldmatrix              +-----------------+                +----------------+
//
//   what              where                          size
//   W, bias           shared, for all tiles          2C x 4C, 2C floats
//   x                 shared of a warp, ring         3 to 5 slots x 16 x C
//   the operand       registers, two sets            16 x C
//   sums              registers, fp32                16 x 2C a warp
//
// While the tensor cores work on a tap, the warp normalises the next. Nothing that wgmma reads is written by the kernel's own stores
// after the start: the fence that would need also waits for the loads under way (measured: three times slower).
#pragma once

#include "downsample_fwd_mma.cuh"
#include "wgmma_sm90.cuh"

namespace convfirst::patch::sm90 {

// The operand's 16 rows, less their means, over their standard deviations. Lane 4 g + t holds rows g and g + 8.
template <typename T, int kSteps>
__device__ __forceinline__ void normalise_rows(uint32_t (&a)[kSteps][4], float eps) {
  constexpr float kScale = 1.f / (16 * kSteps);
  float2 v[kSteps][4];
  float sum[2] = {};
#pragma unroll
  for (int k = 0; k < kSteps; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[k][i] = ptx::unpack2<T>(a[k][i]);
      sum[i % 2] += v[k][i].x + v[k][i].y;
    }
  const float mean[2] = {sm80::quad_sum(sum[0]) * kScale, sm80::quad_sum(sum[1]) * kScale};
  float squares[2] = {};
#pragma unroll
  for (int k = 0; k < kSteps; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[k][i].x -= mean[i % 2];
      v[k][i].y -= mean[i % 2];
      squares[i % 2] = fmaf(v[k][i].x, v[k][i].x, fmaf(v[k][i].y, v[k][i].y, squares[i % 2]));
    }
  const float inverse[2] = {rsqrtf(sm80::quad_sum(squares[0]) * kScale + eps), rsqrtf(sm80::quad_sum(squares[1]) * kScale + eps)};
#pragma unroll
  for (int k = 0; k < kSteps; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) a[k][i] = ptx::pack2<T>(v[k][i].x * inverse[i % 2], v[k][i].y * inverse[i % 2]);
}

template <typename T, int kC>
__global__ void __launch_bounds__(hopper_downsample_tile(kC).teams * kTeamThreads, 1)
    downsample_fwd_sm90(const __grid_constant__ DownsampleParams p) {
  constexpr HopperDownsampleTile kTile = hopper_downsample_tile(kC);
  constexpr HopperDownsampleLayout kLayout = hopper_downsample_layout(kC);
  constexpr int kColumns = 2 * kC, kBlocks = kColumns / 8, kVector = 4, kPieces = kC / 8, kSteps = kC / 16;
  constexpr int kLoads = 16 * kPieces / 32, kPitch = row_bytes(kC);
  extern __shared__ __align__(128) unsigned char smem[];
  const Downsample& d = p.d;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32, threads = p.teams * kTeamThreads;
  float* bias = reinterpret_cast<float*>(smem + kLayout.bias);
  const uint32_t ring = ptx::smem_address(smem + kLayout.ring) + warp * kTile.slots * kLayout.slot;
  const T* x = static_cast<const T*>(d.x);
  const int first_tile = blockIdx.x * p.teams + threadIdx.x / kTeamThreads, stride = p.blocks * p.teams;

  wait_for_inputs<true>();
  launch_dependents<true>();
  for (int i = threadIdx.x; i < kColumns * kPieces * 4; i += threads) {
    const int row = i / (kPieces * 4), piece = i % (kPieces * 4), column = channel_of(row / 8, row % 8, kVector);
    ptx::cp_async16(ptx::smem_address(smem + kLayout.weight + (piece * kColumns + row) * 16),
                    static_cast<const T*>(d.weight) + static_cast<size_t>(column) * 4 * kC + piece * 8, true);
  }
  for (int i = threadIdx.x; i < kColumns; i += threads) bias[i] = d.bias[i];
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  fence_for_wgmma();
  __syncthreads();  // the matrix is there

  // A warp's loads: tap after tap, tile after tile.
  int load_tile = first_tile, load_tap = 0, load_slot = 0;
  int pixel[kLoads];  // of tap 0 in x, -1 beyond the last row
  auto load = [&] {
    if (load_tile < p.tiles) {
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int i = lane + j * 32, row = i / kPieces, piece = i % kPieces;
        if (load_tap == 0) {
          const int m = load_tile * 64 + warp % 4 * 16 + row, n = p.by_image.quotient(m);
          const int rest = m - n * static_cast<int>(p.by_image.divisor), oy = p.by_row.quotient(rest);
          const int ox = rest - oy * static_cast<int>(p.by_row.divisor);
          pixel[j] = m < p.rows ? (n * d.height + 2 * oy) * d.width + 2 * ox : -1;
        }
        const bool valid = pixel[j] >= 0;
        const int from = pixel[j] + load_tap / 2 * d.width + load_tap % 2;
        ptx::cp_async16(ring + load_slot * kLayout.slot + row * kPitch + piece * 16,
                        valid ? x + static_cast<size_t>(from) * kC + piece * 8 : x, valid);
      }
    }
    ptx::cp_async_commit();
    if (++load_slot == kTile.slots) load_slot = 0;
    if (++load_tap == 4) {
      load_tap = 0;
      load_tile += stride;
    }
  };
#pragma unroll 1
  for (int i = 0; i < kTile.slots - 1; ++i) load();

  const uint64_t weight = plain_descriptor(ptx::smem_address(smem + kLayout.weight), kColumns * 16, 128);
  const uint32_t a_base = ring + block_fusion::sm80::a_lane_offset(kPitch);
  uint32_t a[2][kSteps][4];
  float acc[kBlocks][4];
  int slot = 0;
  auto step = [&](int tap, uint32_t (&rows)[kSteps][4]) {
    ptx::cp_async_wait<kTile.slots - 2>();
    __syncwarp();  // the tap is there, and every lane is done with the slot of the tap before
    load();
    wgmma_wait<1>();  // these registers are free
#pragma unroll
    for (int k = 0; k < kSteps; ++k) ptx::ldmatrix_x4(rows[k], a_base + slot * kLayout.slot + k * 32);
    if (d.has_norm) normalise_rows<T>(rows, d.eps);
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const uint64_t b = advanced(weight, (tap * kPieces + 2 * k) * kColumns * 16);
#pragma unroll
      for (int n = 0; n + 16 <= kBlocks; n += 16) wgmma<T, 16>(&acc[n], rows[k], advanced(b, n * 128), tap + k > 0);
      if constexpr (kBlocks % 16 != 0)
        wgmma<T, 8>(&acc[kBlocks / 16 * 16], rows[k], advanced(b, kBlocks / 16 * 2048), tap + k > 0);
    }
    wgmma_commit();
    if (++slot == kTile.slots) slot = 0;
  };
  for (int tile = first_tile; tile < p.tiles; tile += stride) {
#pragma unroll 1
    for (int tap = 0; tap < 4; tap += 2) {
      step(tap, a[0]);
      step(tap + 1, a[1]);
    }
    wgmma_wait<0>();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile * 64 + warp % 4 * 16 + half * 8 + g;
      T* y = static_cast<T*>(d.y) + static_cast<size_t>(row) * kColumns;
#pragma unroll
      for (int n = 0; n < kBlocks; n += kVector) {
        const int column = n * 8 + t * 2 * kVector;
        float b[2 * kVector];
        sm80::load_floats(b, bias + column);
        uint32_t packed[kVector];
#pragma unroll
        for (int j = 0; j < kVector; ++j)
          packed[j] = ptx::pack2<T>(acc[n + j][2 * half] + b[2 * j], acc[n + j][2 * half + 1] + b[2 * j + 1]);
        if (row < p.rows) sm80::store_words<kVector>(y + column, packed);
      }
    }
  }
}

}  // namespace convfirst::patch::sm90
