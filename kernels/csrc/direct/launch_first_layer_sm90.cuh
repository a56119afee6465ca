// Launch of the first layers' kernel: parameters from a plan.
#pragma once

#include "common/launch.cuh"
#include "first_layer_sm90_wgmma.cuh"

namespace convfirst::direct::sm90 {

template <class Traits>
int FirstKernel<Traits>::launch(const Problem& q, const Tensors& t, const FirstPlan& plan, void* workspace, cudaStream_t stream) {
  FirstParams p{};
  p.x = static_cast<const uint16_t*>(t.x), p.weight = static_cast<const uint16_t*>(t.weight), p.bias = t.bias, p.y = t.result;
  p.layout = plan.layout;
  p.height = q.height, p.width = q.width, p.channels = q.channels, p.filters = q.filters;
  p.kernel_h = q.kernel_h, p.kernel_w = q.kernel_w, p.stride_h = q.stride_h, p.stride_w = q.stride_w;
  p.pad_h = q.pad_h, p.pad_w = q.pad_w, p.out_h = q.out_h(), p.out_w = q.out_w();
  p.tiles = plan.tiles, p.column_tiles = plan.column_tiles;
  p.tiles_p = (p.out_h + plan.layout.rows - 1) / plan.layout.rows, p.tiles_q = (p.out_w + 63) / 64;
  p.activation = q.activation;
  p.rearranged = static_cast<uint4*>(workspace), p.padded_rows = plan.padded_rows, p.chunks = plan.workspace / 16;
  const int blocks = static_cast<int>((p.chunks + 255) / 256);
  const auto rearrange = q.channels == 3 ? &rearrange_sm90<3> : &rearrange_sm90<0>;
  if (const int error = start_dependent_kernel(rearrange, blocks, 256, 0, stream, p)) return error;
  return start_dependent_kernel(&first_layer_sm90<Traits>, plan.grid, kFirstThreads, plan.shared_memory, stream, p);
}

template <class Traits>
const void* FirstKernel<Traits>::kernel() {
  return reinterpret_cast<const void*>(&first_layer_sm90<Traits>);
}

}  // namespace convfirst::direct::sm90
