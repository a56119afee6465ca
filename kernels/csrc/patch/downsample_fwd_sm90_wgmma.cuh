// The downsampling layer of downsample_fwd_mma.cuh on Hopper: wgmma with both operands in shared memory, and teams of four warps with
// tiles and rings of their own, which share the matrix and nothing else.
//
//      x, one tap of 64 pixels, by 8 channels     the same, normalised              y, 64 pixels
//    +------------------------------+           +-------------------+  W[tap]  +----------------+
//    | C / 8 planes x 64 x 16 bytes |---------->| in place          |--------->| += , tap       |----> + bias, NHWC
//    +------------------------------+   fp32    +-------------------+  wgmma   | after tap      |
//                                                                              +----------------+
//
//   what              where                          size
//   W, bias           shared, for all tiles          columns / split x 4C, as many floats
//   x                 shared of a team, ring         3 or 4 slots x 64 x C
//   sums              registers, fp32                16 x columns / split a warp
//
// While the tensor cores work on a tap, the warps normalise the next one. Where W does not fit, a block has half of its columns.
#pragma once

#include "downsample_fwd_mma.cuh"
#include "wgmma_sm90.cuh"

namespace convfirst::patch::sm90 {

template <typename T, int kC>
__global__ void __launch_bounds__(hopper_downsample_tile(kC).teams * kTeamThreads, 1)
    downsample_fwd_sm90(const __grid_constant__ DownsampleParams p) {
  constexpr HopperDownsampleTile kTile = hopper_downsample_tile(kC);
  constexpr HopperDownsampleLayout kLayout = hopper_downsample_layout(kC);
  constexpr int kColumns = 2 * kC / kTile.split, kBlocks = kColumns / 8, kVector = 4, kPieces = kC / 8;
  constexpr int kLoads = 64 * kPieces / kTeamThreads, kPlane = kLayout.plane;
  extern __shared__ __align__(128) unsigned char smem[];
  const Downsample& d = p.d;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, thread = threadIdx.x % kTeamThreads, warp = thread / 32;
  const int team = threadIdx.x / kTeamThreads, threads = p.teams * kTeamThreads;
  const int first_column = blockIdx.x % kTile.split * kColumns;
  const int first_tile = blockIdx.x / kTile.split * p.teams + team, stride = p.blocks / kTile.split * p.teams;
  float* bias = reinterpret_cast<float*>(smem + kLayout.bias);
  unsigned char* ring = smem + kLayout.teams + team * kTile.slots * kLayout.slot;
  const T* x = static_cast<const T*>(d.x);

  wait_for_inputs<true>();
  launch_dependents<true>();
  for (int i = threadIdx.x; i < kColumns * kPieces * 4; i += threads) {
    const int row = i / (kPieces * 4), piece = i % (kPieces * 4), column = first_column + channel_of(row / 8, row % 8, kVector);
    ptx::cp_async16(ptx::smem_address(smem + kLayout.weight + (piece * kColumns + row) * 16),
                    static_cast<const T*>(d.weight) + static_cast<size_t>(column) * 4 * kC + piece * 8, true);
  }
  for (int i = threadIdx.x; i < kColumns; i += threads) bias[i] = d.bias[first_column + i];
  ptx::cp_async_commit();

  // The loads: tap after tap, tile after tile.
  int load_tile = first_tile, load_tap = 0, load_slot = 0;
  int pixel[kLoads];  // of tap 0 in x, -1 beyond the last row
  auto load = [&] {
    if (load_tile < p.tiles) {
      const uint32_t to = ptx::smem_address(ring) + load_slot * kLayout.slot;
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int i = thread + j * kTeamThreads, row = i / kPieces, piece = i % kPieces;
        if (load_tap == 0) {
          const int m = load_tile * 64 + row, n = p.by_image.quotient(m);
          const int rest = m - n * static_cast<int>(p.by_image.divisor), oy = p.by_row.quotient(rest);
          const int ox = rest - oy * static_cast<int>(p.by_row.divisor);
          pixel[j] = m < p.rows ? (n * d.height + 2 * oy) * d.width + 2 * ox : -1;
        }
        const bool valid = pixel[j] >= 0;
        const int from = pixel[j] + load_tap / 2 * d.width + load_tap % 2;
        ptx::cp_async16(to + piece * kPlane + row * 16, valid ? x + static_cast<size_t>(from) * kC + piece * 8 : x, valid);
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
  ptx::cp_async_wait<kTile.slots - 1>();
  fence_for_wgmma();
  __syncthreads();  // the matrix is there

  const uint32_t weight = ptx::smem_address(smem + kLayout.weight);
  const int quad_row = g % 2 * 4 + g / 2;  // of eight: rows of neighbouring quads lie in different banks
  int slot = 0;
  for (int tile = first_tile; tile < p.tiles; tile += stride) {
    float acc[kBlocks][4];
#pragma unroll 1
    for (int tap = 0; tap < 4; ++tap) {
      ptx::cp_async_wait<kTile.slots - 2>();
      team_barrier(team + 1, kTeamThreads);  // the tap is there
      unsigned char* here = ring + slot * kLayout.slot;
      if (d.has_norm) {
#pragma unroll
        for (int row = 0; row < 64; row += 32) {
          unsigned char* mine = here + (row + warp * 8 + quad_row) * 16 + t * kPlane;
          uint4 chunks[kC / 32];
#pragma unroll
          for (int i = 0; i < kC / 32; ++i) chunks[i] = *reinterpret_cast<const uint4*>(mine + i * 4 * kPlane);
          sm80::normalise<T, kC / 32, 4>(chunks, kC, d.eps);
#pragma unroll
          for (int i = 0; i < kC / 32; ++i) *reinterpret_cast<uint4*>(mine + i * 4 * kPlane) = chunks[i];
        }
      }
      fence_for_wgmma();
      wgmma_wait();  // for the tap before
      team_barrier(team + 1, kTeamThreads);  // every warp's part is normalised, and the slot of the tap before is free
      wgmma_begin();
#pragma unroll
      for (int k = 0; k < kC / 16; ++k) {
        const uint64_t a = plain_descriptor(ptx::smem_address(here) + 2 * k * kPlane, kPlane, 128);
        const uint32_t b = weight + (tap * kPieces + 2 * k) * kColumns * 16;
#pragma unroll
        for (int n = 0; n + 16 <= kBlocks; n += 16)
          wgmma<T, 16>(&acc[n], a, plain_descriptor(b + n * 128, kColumns * 16, 128), tap + k > 0);
        if constexpr (kBlocks % 16 != 0)
          wgmma<T, 8>(&acc[kBlocks / 16 * 16], a, plain_descriptor(b + kBlocks / 16 * 2048, kColumns * 16, 128), tap + k > 0);
      }
      wgmma_commit();
      load();
      if (++slot == kTile.slots) slot = 0;
    }
    wgmma_wait();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile * 64 + warp * 16 + half * 8 + g;
      T* y = static_cast<T*>(d.y) + static_cast<size_t>(row) * d.columns + first_column;
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
