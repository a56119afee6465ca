// Hopper building blocks of the warp-specialised kernels: barriers, TMA loads, wgmma with accumulators in arrays, ldmatrix.
// The instructions themselves come from CuTe's and CUTLASS's arch headers; this file gives them array operands.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

namespace convfirst::sm90 {

using Barrier = cutlass::arch::ClusterBarrier;
using TransactionBarrier = cutlass::arch::ClusterTransactionBarrier;

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ uint64_t* barrier_pointer(TransactionBarrier* barrier) {
  return reinterpret_cast<uint64_t*>(barrier);
}

// Weights stay in L2 while pixels stream through it (CUTLASS's TMA::CacheHintSm90 values).
constexpr uint64_t kEvictNormal = 0x1000000000000000ull;
constexpr uint64_t kEvictLast = 0x14F0000000000000ull;

__device__ __forceinline__ void tma_load_2d(const void* map, TransactionBarrier* barrier, void* smem, int c0, int c1,
                                            uint64_t hint = kEvictLast) {
  cute::SM90_TMA_LOAD_2D::copy(map, barrier_pointer(barrier), hint, smem, c0, c1);
}

__device__ __forceinline__ void tma_load_4d(const void* map, TransactionBarrier* barrier, void* smem, int c0, int c1, int c2,
                                            int c3) {
  cute::SM90_TMA_LOAD_4D::copy(map, barrier_pointer(barrier), kEvictNormal, smem, c0, c1, c2, c3);
}

// Until everything that earlier launches of the stream wrote is there, where this one was started before they ended.
__device__ __forceinline__ void wait_for_previous_launch() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The next launch of the stream may start as soon as every block has come here; it waits for the data itself.
__device__ __forceinline__ void allow_next_launch() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Orders this thread's ordinary shared-memory accesses before later ones of the asynchronous proxy (TMA, wgmma).
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void warpgroup_barrier(int id) { asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory"); }

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void stmatrix_x4(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

// One contiguous piece, no tensor map; bytes a multiple of 16.
__device__ __forceinline__ void bulk_load(const void* from, TransactionBarrier* barrier, void* smem, uint32_t bytes) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem_address(smem)),
               "l"(from), "r"(bytes), "r"(smem_address(barrier))
               : "memory");
}

// The same from shared memory, and the wait until all that this thread began have been read from there.
__device__ __forceinline__ void bulk_store(void* to, const void* smem, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(smem_address(smem)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void bulk_store_wait() {
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}

// A barrier in this block's shared memory, by address.
__device__ __forceinline__ void wait_barrier(uint32_t barrier, uint32_t phase) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "wait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait;\n}" ::"r"(barrier),
      "r"(phase)
      : "memory");
}

__device__ __forceinline__ TransactionBarrier* transaction_barrier(uint32_t address) {
  return static_cast<TransactionBarrier*>(__cvta_shared_to_generic(address));
}

__device__ __forceinline__ void arrive_barrier(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ uint32_t load_shared_32(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ uint4 load_shared_128(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ float2 load_shared_float2(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ void store_shared_32(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

// Shared-memory matrix descriptor, K-major. Rows are `row_bytes` wide (128 or 64) and swizzled over that width.
template <int kRowBytes>
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address) {
  static_assert(kRowBytes == 128 || kRowBytes == 64);
  constexpr uint64_t kLayout = kRowBytes == 128 ? 1 : 2;
  constexpr uint64_t kStride = (kRowBytes * 8) >> 4;
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | (uint64_t(1) << 16) | (kStride << 32) | (kLayout << 62);
}

// The swizzle that TMA and wgmma apply to byte offsets within rows of kRowBytes.
template <int kRowBytes>
__host__ __device__ __forceinline__ constexpr uint32_t swizzle(uint32_t offset) {
  return offset ^ ((offset >> 3) & (kRowBytes == 128 ? 0x70u : 0x30u));
}

// ---------------------------------------------------------------------------------------------------------------------------
// Element types

template <class Element>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<__half>(float low, float high) {
  __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&v);
}
template <>
__device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float low, float high) {
  __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&v);
}

template <class Element>
__device__ __forceinline__ float2 unpack2(uint32_t v);
template <>
__device__ __forceinline__ float2 unpack2<__half>(uint32_t v) {
  return __half22float2(*reinterpret_cast<__half2*>(&v));
}
template <>
__device__ __forceinline__ float2 unpack2<__nv_bfloat16>(uint32_t v) {
  return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
}

// ---------------------------------------------------------------------------------------------------------------------------
// mma.sync: D[16 x 8] += A[16 x 16 or 8] B, B as one or two 8 x 8 blocks

template <class Element>
__device__ __forceinline__ void mma_16816(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<Element, __half>) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

template <class Element>
__device__ __forceinline__ void mma_1688(float* d, const uint32_t* a, uint32_t b0) {
  if constexpr (std::is_same_v<Element, __half>) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b0));
  } else {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b0));
  }
}

// ---------------------------------------------------------------------------------------------------------------------------
// wgmma: D[64 x N] = A[64 x 16] B[16 x N] (+ D), A from registers (RS) or shared memory (SS), B K-major in shared memory

template <class Element, int N>
struct Wgmma;

#define CONVFIRST_WGMMA(N)                                                                                             \
  template <>                                                                                                          \
  struct Wgmma<__half, N> {                                                                                            \
    using RS = cute::SM90::GMMA::MMA_64x##N##x16_F32F16F16_RS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>; \
    using SS = cute::SM90::GMMA::MMA_64x##N##x16_F32F16F16_SS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>; \
  };                                                                                                                   \
  template <>                                                                                                          \
  struct Wgmma<__nv_bfloat16, N> {                                                                                     \
    using RS =                                                                                                         \
        cute::SM90::GMMA::MMA_64x##N##x16_F32BF16BF16_RS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>;      \
    using SS =                                                                                                         \
        cute::SM90::GMMA::MMA_64x##N##x16_F32BF16BF16_SS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>;      \
  };
CONVFIRST_WGMMA(32)
CONVFIRST_WGMMA(64)
CONVFIRST_WGMMA(96)
CONVFIRST_WGMMA(128)
CONVFIRST_WGMMA(192)
CONVFIRST_WGMMA(256)
#undef CONVFIRST_WGMMA

template <class Element, int N, size_t... I>
__device__ __forceinline__ void wgmma_rs_unpacked(float (&d)[N / 2], const uint32_t* a, uint64_t b, bool accumulate,
                                                  std::index_sequence<I...>) {
  Wgmma<Element, N>::RS::fma(a[0], a[1], a[2], a[3], b, d[I]...,
                             accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
}

template <class Element, int N, size_t... I>
__device__ __forceinline__ void wgmma_ss_unpacked(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate,
                                                  std::index_sequence<I...>) {
  Wgmma<Element, N>::SS::fma(a, b, d[I]..., accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
}

template <class Element, int N>
__device__ __forceinline__ void wgmma_rs(float (&d)[N / 2], const uint32_t* a, uint64_t b, bool accumulate) {
  wgmma_rs_unpacked<Element, N>(d, a, b, accumulate, std::make_index_sequence<N / 2>{});
}

template <class Element, int N>
__device__ __forceinline__ void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  wgmma_ss_unpacked<Element, N>(d, a, b, accumulate, std::make_index_sequence<N / 2>{});
}

// Keeps the compiler from moving accesses of the accumulators across the asynchronous product.
template <class T, int N>
__device__ __forceinline__ void fence_operands(T (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      asm volatile("" : "+f"(r[i])::"memory");
    } else {
      asm volatile("" : "+r"(r[i])::"memory");
    }
  }
}

}  // namespace convfirst::sm90
