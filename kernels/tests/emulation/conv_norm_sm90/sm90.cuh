// Stands in for csrc/common/sm90.cuh: a barrier that one thread's loads complete, and TMA loads that happen at once.
#pragma once

#include <cuda.h>

#include <map>

#include "ptx.cuh"

namespace emulation {

struct TensorMap {  // in place of a CUtensorMap's content
  const char* data;
  int64_t sizes[4];
  int box[4];
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

}  // namespace emulation

namespace convfirst::sm90 {

// Completes when its arrivals have come and the bytes that they announced too.
struct TransactionBarrier {
  uint16_t phases, expected, arrived, unused;
  static inline std::map<const void*, int64_t> bytes;  // announced and not there yet
  void init(int arrivals) { phases = 0, expected = static_cast<uint16_t>(arrivals), arrived = 0, bytes[this] = 0; }
  void complete() {
    if (arrived == expected && bytes[this] == 0) arrived = 0, ++phases;
  }
  void arrive_and_expect_tx(int count) {
    bytes[this] += count;
    ++arrived;
    complete();
  }
  void deliver(int count) {
    bytes[this] -= count;
    complete();
  }
  void wait(uint32_t phase) const {
    while ((phases & 1u) == phase) emulation::yield();
  }
};
static_assert(sizeof(TransactionBarrier) == 8);

// Of a bulk copy: whole and aligned to 16 bytes.
inline void check_bulk(uint32_t start, uint32_t bytes) {
  if (bytes % 16 != 0) emulation::fail("bulk copy of a broken size", bytes);
  emulation::check_shared(start, 16);
  emulation::check_shared(start + bytes - 16, 16);
}

inline void bulk_load(const void* from, TransactionBarrier* barrier, void* to, uint32_t bytes) {
  const uint32_t start = ptx::smem_address(to);
  check_bulk(start, bytes);
  std::memcpy(to, from, bytes);
  barrier->deliver(bytes);
}

inline void bulk_store(void* to, const void* from, uint32_t bytes) {
  const uint32_t start = ptx::smem_address(from);
  check_bulk(start, bytes);
  std::memcpy(to, from, bytes);
}

inline void bulk_store_wait() {}
inline void fence_async_proxy() {}

// 64-byte rows of 16-bit elements, swizzled; zeros outside the tensor.
inline void tma_load_4d(const void* map, TransactionBarrier* barrier, unsigned char* to, int c0, int c1, int c2, int c3) {
  const auto& m = *static_cast<const emulation::TensorMap*>(map);
  const uint32_t start = ptx::smem_address(to);
  if (start % 512 != 0) emulation::fail("TMA destination misaligned", start);
  uint32_t row = 0;
  for (int n = c3; n < c3 + m.box[3]; ++n)
    for (int y = c2; y < c2 + m.box[2]; ++y)
      for (int x = c1; x < c1 + m.box[1]; ++x, ++row)
        for (int c = 0; c < m.box[0]; ++c) {
          const bool inside = c0 + c < m.sizes[0] && x >= 0 && x < m.sizes[1] && y >= 0 && y < m.sizes[2] && n < m.sizes[3];
          const uint32_t offset = row * 64 + c * 2, at = start + (offset ^ (offset >> 3 & 0x30));
          emulation::check_shared(at, 2);
          std::memset(emulation::smem + at, 0, 2);
          if (inside) {
            const int64_t element = ((n * m.sizes[2] + y) * m.sizes[1] + x) * m.sizes[0] + c0 + c;
            std::memcpy(emulation::smem + at, m.data + element * 2, 2);
          }
        }
  barrier->deliver(row * 64);
}

}  // namespace convfirst::sm90
