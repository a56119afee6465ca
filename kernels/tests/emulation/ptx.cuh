// Stands in for csrc/common/ptx.cuh.
#pragma once

#include "cuda_on_cpu.h"

namespace convfirst::ptx {

inline uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - emulation::smem);
}

inline void cp_async(const emulation::Copy& copy) {
  if (copy.valid && reinterpret_cast<uintptr_t>(copy.from) % copy.bytes != 0) emulation::fail("misaligned source", copy.to);
  if (emulation::copies_at_once) {
    emulation::perform(copy);
  } else {
    emulation::thread().open.push_back(copy);
  }
}
inline void cp_async16(uint32_t to, const void* from, bool valid) { cp_async({to, from, 16, valid}); }
inline void cp_async4(uint32_t to, const void* from, bool valid) { cp_async({to, from, 4, valid}); }

inline void cp_async_commit() {
  auto& t = emulation::thread();
  t.groups.push_back(t.open);
  t.open.clear();
}

inline void cp_async_wait(int pending) {
  auto& groups = emulation::thread().groups;
  while (groups.size() > static_cast<size_t>(pending)) {
    for (const auto& copy : groups.front()) emulation::perform(copy);
    groups.erase(groups.begin());
  }
}
template <int kPending>
void cp_async_wait() {
  cp_async_wait(kPending);
}

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  emulation::check_shared(address, 16);
  const int lane = emulation::current % 32;
  const int side = emulation::collective([&](emulation::Warp& w, int s) { w.word[s][lane] = address; });
  for (int m = 0; m < 4; ++m)
    std::memcpy(&r[m], emulation::smem + emulation::warp().word[side][m * 8 + lane / 4] + lane % 4 * 4, 4);
}

inline void ldmatrix_x4_transposed(uint32_t (&r)[4], uint32_t address) {
  emulation::check_shared(address, 16);
  const int lane = emulation::current % 32;
  const int side = emulation::collective([&](emulation::Warp& w, int s) { w.word[s][lane] = address; });
  for (int m = 0; m < 4; ++m)
    for (int i = 0; i < 2; ++i)
      std::memcpy(reinterpret_cast<unsigned char*>(&r[m]) + 2 * i,
                  emulation::smem + emulation::warp().word[side][m * 8 + lane % 4 * 2 + i] + lane / 4 * 2, 2);
}

template <typename T>
float2 unpack2(uint32_t v);
template <>
inline float2 unpack2<__half>(uint32_t v) {
  __half2 pair;
  std::memcpy(&pair, &v, 4);
  return __half22float2(pair);
}
template <>
inline float2 unpack2<__nv_bfloat16>(uint32_t v) {
  return make_float2(emulation::as_float(v << 16), emulation::as_float(v & 0xffff0000u));
}

template <typename Pair>
uint32_t bits_of(Pair pair) {
  uint32_t v;
  std::memcpy(&v, &pair, 4);
  return v;
}
template <typename T>
uint32_t pack2(float low, float high);
template <>
inline uint32_t pack2<__half>(float low, float high) {
  return bits_of(__floats2half2_rn(low, high));
}
template <>
inline uint32_t pack2<__nv_bfloat16>(float low, float high) {
  return bits_of(__floats2bfloat162_rn(low, high));
}

template <typename T>
void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int lane = emulation::current % 32, g = lane / 4, t = lane % 4;
  const int side = emulation::collective([&](emulation::Warp& w, int s) {
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack2<T>(a[i]);
      float* to = &w.a[s][g + i % 2 * 8][t * 2 + i / 2 * 8];
      to[0] = pair.x;
      to[1] = pair.y;
    }
    for (int i = 0; i < 2; ++i) {
      const float2 pair = unpack2<T>(i == 0 ? b0 : b1);
      w.b[s][t * 2 + i * 8][g] = pair.x;
      w.b[s][t * 2 + i * 8 + 1][g] = pair.y;
    }
  });
  const auto& w = emulation::warp();
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k) d[i] += w.a[side][g + i / 2 * 8][k] * w.b[side][k][t * 2 + i % 2];
}

inline float tanh_approx(float x) { return std::tanh(x); }

}  // namespace convfirst::ptx
