// Starts a kernel with dynamic shared memory beyond the default limit. Returns cudaError_t as int.
#pragma once

#include <cuda_runtime.h>

namespace convfirst {

template <typename Kernel, typename... Args>
int start_kernel(Kernel kernel, int grid, int threads, int shared_memory, cudaStream_t stream, Args... args) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_memory);
  if (error != cudaSuccess) return static_cast<int>(error);
  kernel<<<grid, threads, shared_memory, stream>>>(args...);
  return static_cast<int>(cudaGetLastError());
}

// The same, but the launch need not wait for the one before it to end: the kernel waits itself (griddepcontrol.wait). Blocks come in
// clusters of `cluster`.
template <typename... Params, typename... Args>
int start_dependent_clusters(void (*kernel)(Params...), int cluster, int grid, int threads, int shared_memory, cudaStream_t stream,
                             Args... args) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_memory);
  if (error != cudaSuccess) return static_cast<int>(error);
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster, attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = threads, config.dynamicSmemBytes = shared_memory, config.stream = stream;
  config.attrs = attributes, config.numAttrs = cluster > 1 ? 2 : 1;
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, Params(args)...));
}

template <typename... Params, typename... Args>
int start_dependent_kernel(void (*kernel)(Params...), int grid, int threads, int shared_memory, cudaStream_t stream, Args... args) {
  return start_dependent_clusters(kernel, 1, grid, threads, shared_memory, stream, args...);
}

}  // namespace convfirst
