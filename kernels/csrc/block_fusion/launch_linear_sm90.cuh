// Launch of the Hopper path's linear layers: tensor maps and kernel parameters from a plan.
#pragma once

#include <cuda_runtime.h>

#include "linear_fwd_sm90_wgmma.cuh"
#include "tensor_map_sm90.h"

namespace convfirst::block_fusion::sm90 {

template <class Traits>
int LinearKernel<Traits>::launch(const LinearProblem& q, const LinearTensors& t, const LinearPlan& plan, bool overlap_previous,
                                 cudaStream_t stream) {
  constexpr LinearTile kTile = Traits::kTile;
  CUtensorMap a_map, w_map, x_map{};
  const int64_t columns = q.columns, depth = q.depth;
  // W's rows in the order that linear_fwd_sm90_wgmma.cuh describes: 32 b + 8 q + 2 j + i lies at 32 b + 8 j + 2 q + i.
  const bool encoded = encode_map<2>(&a_map, q.dtype, t.a, {depth, q.rows}, {kLinearDepth, kTile.rows() / kTile.cluster}, 128) &&
                       encode_strided_map<5>(&w_map, q.dtype, t.weight, {depth, 2, 4, 4, columns / 32},
                                             {depth, 8 * depth, 2 * depth, 32 * depth}, {kLinearDepth, 2, 4, 4, kTile.columns / 32}, 128) &&
                       (q.layer == Layer::kExpand || encode_map<2>(&x_map, q.dtype, t.x, {columns, q.rows}, {64, kTile.rows()}, 128));
  if (!encoded) return cudaErrorInvalidValue;

  const int64_t column_tiles = (columns + kTile.columns - 1) / kTile.columns;
  LinearParams p{};
  p.output = t.output, p.bias = t.bias, p.layer_scale = t.layer_scale, p.sample_scale = t.sample_scale;
  p.rows = static_cast<int>(q.rows), p.columns = q.columns;
  p.steps = (q.depth + kLinearDepth - 1) / kLinearDepth;
  p.image_pixels = static_cast<int>(std::max<int64_t>(q.image_pixels, 1));
  p.groups_n = static_cast<int>((column_tiles + kTile.cluster - 1) / kTile.cluster);
  p.groups = static_cast<int>(linear_groups(q, kTile));

  const auto kernel = &linear_fwd_sm90<Traits>;
  if (cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_memory)) return e;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = kTile.cluster, attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = overlap_previous;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(plan.grid), config.blockDim = dim3(plan.threads);
  config.dynamicSmemBytes = plan.shared_memory, config.stream = stream;
  config.attrs = attributes, config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, p, a_map, w_map, x_map);
}

}  // namespace convfirst::block_fusion::sm90
