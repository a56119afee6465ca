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

}  // namespace convfirst
