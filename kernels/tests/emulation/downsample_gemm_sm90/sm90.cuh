// Stands in for csrc/common/sm90.cuh and sm90_mn_major.cuh, as far as a matrix product by TMA and wgmma needs them. Loads land at once;
// products happen when they are queued or as late as the waits allow.
#pragma once

#include <cuda.h>

#include <deque>
#include <map>

#include "ptx.cuh"

#define __builtin_assume(condition)
#define __CUDA_ARCH_FEAT_SM90_ALL

namespace emulation {

struct GridSize {
  int x;
};
inline GridSize grid_size;
inline bool waited;  // for the launch before, in this block

template <typename T>
T shfl(unsigned, T value, int from) {
  static_assert(sizeof(T) == 4);
  const int side = collective([&](Warp& w, int s) { std::memcpy(&w.word[s][current % 32], &value, 4); });
  std::memcpy(&value, &warp().word[side][from], 4);
  return value;
}

// What the fake encoders of emulate.cpp leave in place of a CUtensorMap's content. Elements of 16 bits, the first dimension dense.
struct TensorMap {
  int rank;
  const char* data;
  int64_t sizes[5], strides[5];  // bytes
  int box[5], row_bytes;         // tiled; rows that are swizzled as wholes
  int lower[2], upper[2], channels, pixels, steps[2];  // im2col: width, height
};

inline const TensorMap& map_of(const void* map) { return **static_cast<const TensorMap* const*>(map); }

inline uint32_t swizzled(uint32_t at, int row_bytes) { return at ^ (at >> 3 & (row_bytes == 128 ? 0x70 : 0x30)); }

// Rows of 128 or 64 bytes, swizzled.
inline void put(uint32_t start, uint32_t offset, const char* from, int row_bytes = 128) {
  const uint32_t at = swizzled(start + offset, row_bytes);
  check_shared(at, 2);
  std::memset(smem + at, 0, 2);
  if (from != nullptr) std::memcpy(smem + at, from, 2);
}

using Products = std::vector<std::function<void()>>;
struct Queue {
  Products open;
  std::deque<Products> groups;
};
inline std::map<int, Queue> queues;  // of threads

}  // namespace emulation

#define gridDim emulation::grid_size
#define __shfl_sync emulation::shfl

namespace convfirst::sm90 {

// Completes when its arrivals have come and the bytes that they announced too.
struct Barrier {
  uint16_t phases, expected, arrived, unused;
  static inline std::map<const void*, int64_t> bytes;  // announced and not there yet
  void init(int arrivals) { phases = 0, expected = static_cast<uint16_t>(arrivals), arrived = 0, bytes[this] = 0; }
  void complete() {
    if (arrived > expected) emulation::fail("too many arrivals", arrived);
    if (arrived == expected && bytes[this] == 0) arrived = 0, ++phases;
  }
  void arrive() { ++arrived, complete(); }
  bool test_wait(uint32_t phase) const { return (phases & 1u) != phase; }
  void wait(uint32_t phase) const {
    while (!test_wait(phase)) emulation::yield();
  }
};
struct TransactionBarrier : Barrier {
  void arrive_and_expect_tx(int count) { bytes[this] += count, arrive(); }
  void deliver(int count) { bytes[this] -= count, complete(); }
};
static_assert(sizeof(TransactionBarrier) == 8);

constexpr uint64_t kEvictLast = 0;
inline TransactionBarrier* barrier_pointer(TransactionBarrier* barrier) { return barrier; }
inline uint32_t smem_address(const void* pointer) { return ptx::smem_address(pointer); }
inline void allow_next_launch() {}
inline void wait_for_previous_launch() { emulation::waited = true; }

inline void bulk_load(const void* from, TransactionBarrier* barrier, void* to, uint32_t bytes) {
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) emulation::fail("broken bulk copy", bytes);
  emulation::check_shared(smem_address(to), 16);
  emulation::check_shared(smem_address(to) + bytes - 16, 16);
  std::memcpy(to, from, bytes);
  barrier->deliver(bytes);
}

inline uint32_t load_shared_32(uint32_t address) {
  emulation::check_shared(address, 4);
  uint32_t v;
  std::memcpy(&v, emulation::smem + address, 4);
  return v;
}
inline uint4 load_shared_128(uint32_t address) {
  emulation::check_shared(address, 16);
  uint4 v;
  std::memcpy(&v, emulation::smem + address, 16);
  return v;
}

using ptx::pack2, ptx::unpack2;

template <class T, int N>
void fence_operands(T (&)[N]) {}

enum class Major { K, MN };
template <int kRowBytes>
uint64_t mn_descriptor(uint32_t, uint32_t) {
  return 0;
}
template <class Element, int N, Major kA, Major kB>
void wgmma_ss_major(float (&)[N / 2], uint64_t, uint64_t, bool) {}

template <int kRowBytes>
constexpr uint32_t swizzle(uint32_t offset) {
  return offset ^ (offset >> 3 & (kRowBytes == 128 ? 0x70u : 0x30u));
}

template <int kRowBytes>
uint64_t matrix_descriptor(uint32_t address) {
  return (address & 0x3ffff) >> 4 | uint64_t(kRowBytes / 2) << 32 | uint64_t(kRowBytes == 128 ? 1 : 2) << 62;
}

// An element of a K-major operand of rows of 128 or 64 bytes, of which a descriptor names the first 16 bytes.
template <class Element>
float operand(uint64_t descriptor, int row, int k) {
  const int row_bytes = descriptor >> 62 == 1 ? 128 : 64;
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4, at = start + row * row_bytes + k * 2;
  if ((descriptor >> 62 != 1 && descriptor >> 62 != 2) || (descriptor >> 32 & 0x3fff) != row_bytes / 2) emulation::fail("descriptor of another layout", start);
  Element v;
  std::memcpy(&v, emulation::smem + emulation::swizzled(at, row_bytes), 2);
  return static_cast<float>(v);
}

template <class Element, int N>
void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  const int lane = emulation::current % 32, first = emulation::current / 32 % 4 * 16 + lane / 4;
  const auto multiply = [=, &d] {
    for (int i = 0; i < N / 2; ++i) {
      const int row = first + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float sum = accumulate ? d[i] : 0.f;
      for (int k = 0; k < 16; ++k) sum += operand<Element>(a, row, k) * operand<Element>(b, column, k);
      d[i] = sum;
    }
  };
  emulation::queues[emulation::current].open.push_back(multiply);
}

// The left operand as registers, 16 rows a warp.
template <class Element, int N>
void wgmma_rs(float (&d)[N / 2], const uint32_t* a, uint64_t b, bool accumulate) {
  const int lane = emulation::current % 32;
  std::vector<float> rows(2 * 16);
  for (int i = 0; i < 4; ++i) {
    const int side = emulation::collective([&](emulation::Warp& w, int s) { w.word[s][lane] = a[i]; });
    for (int j = 0; j < 4; ++j) {
      const float2 pair = unpack2<Element>(emulation::warp().word[side][lane / 4 * 4 + j]);
      float* to = &rows[i % 2 * 16 + i / 2 * 8 + 2 * j];
      to[0] = pair.x, to[1] = pair.y;
    }
  }
  const auto multiply = [=, &d] {
    for (int i = 0; i < N / 2; ++i) {
      const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float sum = accumulate ? d[i] : 0.f;
      for (int k = 0; k < 16; ++k) sum += rows[i / 2 % 2 * 16 + k] * operand<Element>(b, column, k);
      d[i] = sum;
    }
  };
  emulation::queues[emulation::current].open.push_back(multiply);
}

using ptx::ldmatrix_x4;

// Returns how many bytes it brought.
inline int load_tiled(const void* map, uint32_t start, const int* from) {
  const emulation::TensorMap& m = emulation::map_of(map);
  if (start % (8 * m.row_bytes) != 0 || m.box[0] * 2 != m.row_bytes) emulation::fail("broken load", start);
  uint32_t count = 1;
  for (int j = 0; j < m.rank; ++j) count *= m.box[j];
  for (uint32_t i = 0; i < count; ++i) {
    const char* at = m.data;
    bool inside = true;
    uint32_t rest = i;
    for (int j = 0; j < m.rank; ++j) {
      const int64_t index = from[j] + rest % m.box[j];
      rest /= m.box[j];
      inside &= index >= 0 && index < m.sizes[j];
      at += index * m.strides[j];
    }
    emulation::put(start, i * 2, inside ? at : nullptr, m.row_bytes);
  }
  return count * 2;
}

inline void tma_load_4d(const void* map, TransactionBarrier* barrier, void* to, int c0, int c1, int c2, int c3) {
  const int from[4] = {c0, c1, c2, c3};
  if (!emulation::waited) emulation::fail("read before the launch before has ended", smem_address(to));
  if (emulation::map_of(map).rank != 4) emulation::fail("broken load", smem_address(to));
  barrier->deliver(load_tiled(map, smem_address(to), from));
}

}  // namespace convfirst::sm90

namespace cute {

struct TmaDescriptor;
inline void prefetch_tma_descriptor(const TmaDescriptor*) {}
inline void warpgroup_arrive() {}
template <int kPending>
void warpgroup_wait() {
  auto& groups = emulation::queues[emulation::current].groups;
  for (; groups.size() > kPending; groups.pop_front())
    for (const auto& multiply : groups.front()) multiply();
}
inline void warpgroup_commit_batch() {
  emulation::Queue& queue = emulation::queues[emulation::current];
  queue.groups.push_back(std::move(queue.open));
  queue.open.clear();
  if (emulation::copies_at_once) warpgroup_wait<0>();
}

struct SM90_TMA_LOAD_3D {
  template <typename... Coordinates>
  static void copy(Coordinates...) {
    emulation::fail("no such load", 0);
  }
};

struct SM90_TMA_LOAD_5D {
  static void copy(const void* map, convfirst::sm90::TransactionBarrier* barrier, uint64_t, void* to, int c0, int c1, int c2, int c3, int c4) {
    const int from[5] = {c0, c1, c2, c3, c4};
    if (emulation::map_of(map).rank != 5) emulation::fail("broken load", convfirst::sm90::smem_address(to));
    barrier->deliver(convfirst::sm90::load_tiled(map, convfirst::sm90::smem_address(to), from));
  }
};

struct SM90_TMA_LOAD_IM2COL_4D {
  static void copy(const void* map, convfirst::sm90::TransactionBarrier* barrier, void* to, int c, int w, int h, int n, uint16_t offset_w, uint16_t offset_h) {
    const emulation::TensorMap& m = emulation::map_of(map);
    const uint32_t start = convfirst::sm90::smem_address(to);
    if (!emulation::waited) emulation::fail("read before the launch before has ended", start);
    if (start % 1024 != 0 || m.rank != 4 || m.channels != 64) emulation::fail("broken load", start);
    for (int pixel = 0; pixel < m.pixels; ++pixel) {
      const int64_t x = w + offset_w, y = h + offset_h;
      for (int i = 0; i < m.channels; ++i) {
        const bool inside = c + i < m.sizes[0] && x >= 0 && x < m.sizes[1] && y >= 0 && y < m.sizes[2] && n < m.sizes[3];
        const char* at = m.data + (c + i) * m.strides[0] + x * m.strides[1] + y * m.strides[2] + n * m.strides[3];
        emulation::put(start, (pixel * m.channels + i) * 2, inside ? at : nullptr);
      }
      if ((w += m.steps[0]) < m.sizes[1] + m.upper[0]) continue;
      w = m.lower[0];
      if ((h += m.steps[1]) < m.sizes[2] + m.upper[1]) continue;
      h = m.lower[1], ++n;
    }
    barrier->deliver(m.pixels * m.channels * 2);
  }
};

}  // namespace cute

namespace cutlass::arch {

inline void fence_barrier_init() {}
template <int kRegisters>
void warpgroup_reg_alloc() {}
template <int kRegisters>
void warpgroup_reg_dealloc() {}

}  // namespace cutlass::arch
