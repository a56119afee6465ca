// First launch of the portable split path for grouped filters: A = LayerNorm(conv(x) + bias), a tile of pixels a block, all channels.
// grouped_conv_norm_fwd_sm90.cuh, which draws the tile, with its cp.async, ldmatrix and mma.sync and without dependent launches.
//
//   what                        where                                          written by       released when
//   x with halo                 shared, [pixel][channels + 8]                  cp.async         all products done
//   addresses of every tap      shared, [tap][pixel]                           prologue         -
//   filter                      registers, from L1 and L2                      -                product done
//   sums                        16 registers an m-tile                         mma.sync         stored
//   moments of a pixel          shared, [32 channels][pixel], then summed      each warp        read
//   A, 16 bit                   shared, over x                                 each warp        stored, 16 bytes a thread
#pragma once

#include "grouped_conv_norm_fwd_sm90.cuh"

namespace convfirst::block_fusion::sm80 {

template <class Traits>
__global__ void __maxnreg__(sm90::grouped_registers(Traits::kMTiles))
    grouped_conv_norm_fwd_sm80(const __grid_constant__ sm90::GroupedParams p) {
  extern __shared__ __align__(128) unsigned char smem[];
  for (int i = threadIdx.x; i < p.layout.pitch / 16; i += blockDim.x) {
    reinterpret_cast<uint4*>(smem + p.layout.zero)[i] = make_uint4(0, 0, 0, 0);
  }
  {
    const sm90::GroupedOrigin origin(p.plan);
    sm90::grouped_load(p, origin, smem);
    ptx::cp_async_commit();
    sm90::grouped_table<Traits>(p, origin, smem);
  }
  sm90::GroupedWarp<Traits> warp(p, smem);
  warp.start();
  ptx::cp_async_wait<0>();
  __syncthreads();
  warp.multiply();
  if (p.has_norm) {
    warp.measure();
    __syncthreads();
    sm90::grouped_scales(p, sm90::GroupedOrigin(p.plan), smem);
  }
  __syncthreads();
  if (p.has_norm && (p.norm_weight != nullptr || p.norm_bias != nullptr)) {
    warp.template stage<true>();
  } else {
    warp.template stage<false>();
  }
  __syncthreads();
  sm90::grouped_store(p, sm90::GroupedOrigin(p.plan), smem);
}

}  // namespace convfirst::block_fusion::sm80
