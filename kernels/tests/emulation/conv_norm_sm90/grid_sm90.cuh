// Stands in for csrc/common/grid_sm90.cuh.
#pragma once

#include "ptx.cuh"

namespace emulation {

int cluster_rank();
void cluster_arrive();
void cluster_wait();
const unsigned char* memory_of(int rank);  // shared memory of a block of the running cluster

inline unsigned byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long both = a | static_cast<unsigned long long>(b) << 32;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(both >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return result;
}

}  // namespace emulation

#define __byte_perm emulation::byte_perm

namespace convfirst::grid {

inline void launch_dependents() {}
inline void wait_for_inputs() {}
inline void fence_barrier_init() {}
inline int cluster_rank() { return emulation::cluster_rank(); }
inline void cluster_arrive() { emulation::cluster_arrive(); }
inline void cluster_wait() { emulation::cluster_wait(); }
inline void cluster_barrier() {
  cluster_arrive();
  cluster_wait();
}

inline float2 load_peer(uint32_t address, int rank) {
  emulation::check_shared(address, 8);
  float2 v;
  std::memcpy(&v, emulation::memory_of(rank) + address, 8);
  return v;
}

inline void ldmatrix_x4_transposed(uint32_t (&r)[4], uint32_t address) {
  emulation::check_shared(address, 16);
  const int lane = emulation::current % 32;
  const int side = emulation::collective([&](emulation::Warp& w, int s) { w.word[s][lane] = address; });
  for (int m = 0; m < 4; ++m) {
    uint16_t halves[2];
    for (int i = 0; i < 2; ++i)
      std::memcpy(&halves[i], emulation::smem + emulation::warp().word[side][m * 8 + lane % 4 * 2 + i] + lane / 4 * 2, 2);
    r[m] = halves[0] | static_cast<uint32_t>(halves[1]) << 16;
  }
}

inline void fill_quad(float (&quad)[4], float v) {
  for (float& q : quad) q = v;
}

template <typename T>
void mma_16816_from(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&start)[4]) {
  std::copy(start, start + 4, d);
  ptx::mma_16816<T>(d, a, b0, b1);
}

}  // namespace convfirst::grid
