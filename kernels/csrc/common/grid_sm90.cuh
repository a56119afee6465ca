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

// Another block's counterpart of a shared-memory address.
__device__ __forceinline__ uint32_t peer_address(uint32_t address, int rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

// Two floats at a shared-memory address of the block `rank` of this cluster.
__device__ __forceinline__ float2 load_peer(uint32_t address, int rank) {
  float2 v;
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(peer_address(address, rank)) : "memory");
  return v;
}

// 16 bytes; `there` is a peer_address.
__device__ __forceinline__ void store_peer(uint32_t there, const float* v) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(there), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
}

// At the counterpart of this block's barrier; what this thread stored before is visible to who waits for it.
__device__ __forceinline__ void arrive_at_peer(uint32_t barrier, int rank) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(peer_address(barrier, rank)) : "memory");
}

// At this block's barrier, where peers arrive.
__device__ __forceinline__ void wait_for_peer(uint32_t barrier, uint32_t phase) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "wait:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait;\n}" ::"r"(barrier),
      "r"(phase)
      : "memory");
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
