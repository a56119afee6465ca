// Stands in for csrc/common/again.cuh.
#pragma once

#include "ptx.cuh"

namespace convfirst::again {

inline uint16_t load_shared_16(uint32_t address) {
  emulation::check_shared(address, 2);
  uint16_t v;
  std::memcpy(&v, emulation::smem + address, 2);
  return v;
}

inline void store_shared_16(uint32_t address, uint32_t v) {
  emulation::check_shared(address, 2);
  const uint16_t low = static_cast<uint16_t>(v);
  std::memcpy(emulation::smem + address, &low, 2);
}

inline uint16_t load_16(const void* from) { return *static_cast<const uint16_t*>(from); }
inline uint32_t load_32(const void* from) { return *static_cast<const uint32_t*>(from); }
inline int value(int v) { return v; }
inline int thread_index() { return threadIdx.x; }

inline void store_128_if(void* to, const uint4& v, bool valid) {
  if (valid) *static_cast<uint4*>(to) = v;
}

inline void store_64_if(void* to, uint32_t low, uint32_t high, bool valid) {
  if (valid) static_cast<uint32_t*>(to)[0] = low, static_cast<uint32_t*>(to)[1] = high;
}

inline void store_32_if(void* to, uint32_t v, bool valid) {
  if (valid) *static_cast<uint32_t*>(to) = v;
}

inline void copy_async_128_if(uint32_t destination, const void* source, bool valid, bool wanted) {
  if (wanted) ptx::cp_async16(destination, source, valid);
}

inline void copy_async_32_if(uint32_t destination, const void* source, bool valid, bool wanted) {
  if (wanted) ptx::cp_async4(destination, source, valid);
}

inline void store_128_below(void* to, const uint4& v, int at, int end) { store_128_if(to, v, at < end); }

}  // namespace convfirst::again
