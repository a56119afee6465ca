// Thread-block clusters and dependent launches of sm_90: the few instructions that kernels without TMA or wgmma need.
#pragma once

#include <cstdint>

namespace convfirst::grid {

// The next kernel in the stream may start now; it waits for this one's results itself.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Everything that earlier kernels in the stream wrote is visible from here on.
__device__ __forceinline__ void wait_for_inputs() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// Of all threads of the cluster's blocks.
__device__ __forceinline__ void cluster_barrier() {
  __syncwarp();  // the instructions are of whole warps
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Two floats at a shared-memory address of the block `rank` of this cluster.
__device__ __forceinline__ float2 load_peer(uint32_t address, int rank) {
  uint32_t there;
  float2 v;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(there) : "memory");
  return v;
}

// Barriers that one thread initialised are visible to the asynchronous proxy.
__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// ldmatrix that transposes each 8x8 matrix: lane l receives column l / 4, rows l % 4 * 2 and one on.
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

}  // namespace convfirst::grid
