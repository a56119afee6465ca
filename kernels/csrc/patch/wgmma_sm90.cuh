// wgmma of Hopper with both operands in shared memory, not swizzled: an operand is 8 x 8 blocks (8 rows of 16 bytes in a row, 128
// bytes), so that a block of rows may start at any 16 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace convfirst::patch {

// `deep` bytes from a block to the next along the sum, `wide` bytes along the rows.
__device__ __forceinline__ uint64_t plain_descriptor(uint32_t address, uint32_t deep, uint32_t wide) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(deep >> 4) << 16 | static_cast<uint64_t>(wide >> 4) << 32;
}

// A value that is the same in the whole warp, in a form that tells the compiler so: descriptors are then computed once a warp.
template <typename Value>
__device__ __forceinline__ Value warp_uniform(Value value) {
  return __shfl_sync(0xffffffffu, value, 0);
}

// The descriptor of an operand `bytes` further on.
__device__ __forceinline__ uint64_t advanced(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending committed groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// What this thread stored in shared memory is there for wgmma once a barrier has passed.
__device__ __forceinline__ void fence_for_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#define CONVFIRST_D4(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define CONVFIRST_WGMMA_N32(type)                                                                                              \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"                                                                    \
               "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type " "                                                 \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1, 0, "                \
               "0;\n}\n"                                                                                                       \
               : CONVFIRST_D4(d, 0), CONVFIRST_D4(d, 1), CONVFIRST_D4(d, 2), CONVFIRST_D4(d, 3)                                \
               : "l"(a), "l"(b), "r"(accumulate))
#define CONVFIRST_WGMMA_N64(type)                                                                                              \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                                                    \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " "                                                 \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "              \
               "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0;\n}\n"                         \
               : CONVFIRST_D4(d, 0), CONVFIRST_D4(d, 1), CONVFIRST_D4(d, 2), CONVFIRST_D4(d, 3),                               \
                 CONVFIRST_D4(d, 4), CONVFIRST_D4(d, 5), CONVFIRST_D4(d, 6), CONVFIRST_D4(d, 7)                                \
               : "l"(a), "l"(b), "r"(accumulate))
#define CONVFIRST_WGMMA_RS_N64(type)                                                                                           \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                                                    \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " "                                                 \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "              \
               "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, 1, 1, "                  \
               "0;\n}\n"                                                                                                       \
               : CONVFIRST_D4(d, 0), CONVFIRST_D4(d, 1), CONVFIRST_D4(d, 2), CONVFIRST_D4(d, 3),                               \
                 CONVFIRST_D4(d, 4), CONVFIRST_D4(d, 5), CONVFIRST_D4(d, 6), CONVFIRST_D4(d, 7)                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))
#define CONVFIRST_WGMMA_RS_N128(type)                                                                                          \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                                                                    \
               "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " "                                                \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "              \
               "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "               \
               "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "               \
               "%59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, p, 1, 1, 0;\n}\n"                                         \
               : CONVFIRST_D4(d, 0), CONVFIRST_D4(d, 1), CONVFIRST_D4(d, 2), CONVFIRST_D4(d, 3),                               \
                 CONVFIRST_D4(d, 4), CONVFIRST_D4(d, 5), CONVFIRST_D4(d, 6), CONVFIRST_D4(d, 7),                               \
                 CONVFIRST_D4(d, 8), CONVFIRST_D4(d, 9), CONVFIRST_D4(d, 10), CONVFIRST_D4(d, 11),                             \
                 CONVFIRST_D4(d, 12), CONVFIRST_D4(d, 13), CONVFIRST_D4(d, 14), CONVFIRST_D4(d, 15)                            \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))

// d[block of 8 columns][4] = or += the product of 64 rows and 8 kBlocks columns, 16 deep; the left operand in shared memory (kBlocks 4
// or 8) or registers (8 or 16).
template <typename T, int kBlocks>
__device__ __forceinline__ void wgmma(float (*d)[4], uint64_t a, uint64_t b, int accumulate) {
  static_assert(kBlocks == 4 || kBlocks == 8);
  if constexpr (kBlocks == 4 && std::is_same_v<T, __half>) {
    CONVFIRST_WGMMA_N32("f16");
  } else if constexpr (kBlocks == 4) {
    CONVFIRST_WGMMA_N32("bf16");
  } else if constexpr (std::is_same_v<T, __half>) {
    CONVFIRST_WGMMA_N64("f16");
  } else {
    CONVFIRST_WGMMA_N64("bf16");
  }
}

template <typename T, int kBlocks>
__device__ __forceinline__ void wgmma(float (*d)[4], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  static_assert(kBlocks == 8 || kBlocks == 16);
  if constexpr (kBlocks == 8 && std::is_same_v<T, __half>) {
    CONVFIRST_WGMMA_RS_N64("f16");
  } else if constexpr (kBlocks == 8) {
    CONVFIRST_WGMMA_RS_N64("bf16");
  } else if constexpr (std::is_same_v<T, __half>) {
    CONVFIRST_WGMMA_RS_N128("f16");
  } else {
    CONVFIRST_WGMMA_RS_N128("bf16");
  }
}
#undef CONVFIRST_D4
#undef CONVFIRST_WGMMA_N32
#undef CONVFIRST_WGMMA_N64
#undef CONVFIRST_WGMMA_RS_N64
#undef CONVFIRST_WGMMA_RS_N128

}  // namespace convfirst::patch
