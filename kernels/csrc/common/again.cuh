// Accesses that stay where they are written in the program. The compiler moves loads that a loop repeats out of it, which costs a register
// each; a kernel whose registers are full reads again instead.
#pragma once

#include <cstdint>

namespace convfirst::again {

// 16 bits in shared memory, by address.
__device__ __forceinline__ uint16_t load_shared_16(uint32_t address) {
  uint16_t v;
  asm volatile("ld.shared.b16 %0, [%1];" : "=h"(v) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ void store_shared_16(uint32_t address, uint32_t v) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(static_cast<uint16_t>(v)) : "memory");
}

// Of what the kernel does not write: from L1 after the first time.
__device__ __forceinline__ uint16_t load_16(const void* from) {
  uint16_t v;
  asm volatile("ld.global.nc.b16 %0, [%1];" : "=h"(v) : "l"(from));
  return v;
}

__device__ __forceinline__ uint32_t load_32(const void* from) {
  uint32_t v;
  asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(v) : "l"(from));
  return v;
}

// 16 bytes to device memory where `valid`, without a branch, which products on either side of it could not cross.
__device__ __forceinline__ void store_128_if(void* to, const uint4& v, bool valid) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.b32 p, %5, 0;\n"
      "@p st.global.v4.b32 [%0], {%1, %2, %3, %4};\n}" ::"l"(to),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(static_cast<int>(valid))
      : "memory");
}

// The same where at < end.
__device__ __forceinline__ void store_128_below(void* to, const uint4& v, int at, int end) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.lt.s32 p, %5, %6;\n"
      "@p st.global.v4.b32 [%0], {%1, %2, %3, %4};\n}" ::"l"(to),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(at), "r"(end)
      : "memory");
}

// The same, 8 bytes.
__device__ __forceinline__ void store_64_if(void* to, uint32_t low, uint32_t high, bool valid) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.b32 p, %3, 0;\n"
      "@p st.global.v2.b32 [%0], {%1, %2};\n}" ::"l"(to),
      "r"(low), "r"(high), "r"(static_cast<int>(valid))
      : "memory");
}

// The same, 4 bytes.
__device__ __forceinline__ void store_32_if(void* to, uint32_t v, bool valid) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.b32 p, %2, 0;\n"
      "@p st.global.b32 [%0], %1;\n}" ::"l"(to),
      "r"(v), "r"(static_cast<int>(valid))
      : "memory");
}

// ptx::cp_async16 where `wanted`, without a branch: else what lies there remains.
__device__ __forceinline__ void copy_async_128_if(uint32_t destination, const void* source, bool valid, bool wanted) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.b32 p, %3, 0;\n"
      "@p cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n}" ::"r"(destination),
      "l"(source), "r"(valid ? 16 : 0), "r"(static_cast<int>(wanted)));
}

// ptx::cp_async4 where `wanted`, without a branch.
__device__ __forceinline__ void copy_async_32_if(uint32_t destination, const void* source, bool valid, bool wanted) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.b32 p, %3, 0;\n"
      "@p cp.async.ca.shared.global [%0], [%1], 4, %2;\n}" ::"r"(destination),
      "l"(source), "r"(valid ? 4 : 0), "r"(static_cast<int>(wanted)));
}

// v: what follows from it is worked out here, not kept from elsewhere.
__device__ __forceinline__ int value(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// threadIdx.x
__device__ __forceinline__ int thread_index() {
  int v;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(v));
  return v;
}

}  // namespace convfirst::again
