// Thread-block clusters and dependent launches of sm_90: the few instructions that kernels without TMA or wgmma need.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

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

// Of all threads of the cluster's blocks, in two halves: what was stored before the arrival is visible after the wait.
__device__ __forceinline__ void cluster_arrive() {
  __syncwarp();  // the instructions are of whole warps
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
  __syncwarp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_barrier() {
  cluster_arrive();
  cluster_wait();
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

// Four registers of one value, one after another, that the compiler takes for different ones: what sums start from.
__device__ __forceinline__ void fill_quad(float (&quad)[4], float v) {
#pragma unroll
  for (int i = 0; i < 4; ++i) asm volatile("mov.f32 %0, %1;" : "=f"(quad[i]) : "f"(v));
}

// d = start + a b, a 16 x 16, b 16 x 8: `start` serves many products, which moves into d would not.
template <typename T>
__device__ __forceinline__ void mma_16816_from(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&start)[4]);
template <>
__device__ __forceinline__ void mma_16816_from<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                                       const float (&start)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(start[0]), "f"(start[1]), "f"(start[2]), "f"(start[3]));
}
template <>
__device__ __forceinline__ void mma_16816_from<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                                              const float (&start)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(start[0]), "f"(start[1]), "f"(start[2]), "f"(start[3]));
}

}  // namespace convfirst::grid
