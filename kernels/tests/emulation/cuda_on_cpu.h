// The part of CUDA that the portable kernels use, on a CPU: a block is a set of fibers, one a thread. Shared memory is poisoned
// before every block and its bounds and alignment are checked; copies land either at once or only when they are waited for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __align__
#undef __restrict__
#undef __maxnreg__
#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n)
#define __restrict__
#define __maxnreg__(...)

// EMULATED: the folder of csrc whose kernels are compiled.
namespace convfirst::EMULATED::sm80 {
extern unsigned char smem[];  // what `extern __shared__ unsigned char smem[]` of a kernel names
}

namespace emulation {

using convfirst::EMULATED::sm80::smem;

struct Copy {
  uint32_t to;
  const void* from;
  int bytes;
  bool valid;
};

// What the lanes of a warp exchange, twice: a lane may be one collective operation ahead of another.
struct Warp {
  float a[2][16][16], b[2][16][8];
  uint32_t word[2][32];
  int arrived[2];
};

struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
  int collectives;
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

extern std::vector<Thread> threads;
extern std::vector<Warp> warps;
extern int current;          // the running thread
extern int shared_bytes;     // of the block
extern bool copies_at_once;  // else as late as the waits allow

void yield();
void run(int grid, int block, int shared_memory, std::function<void()> kernel);

inline Thread& thread() { return threads[current]; }
inline Warp& warp() { return warps[current / 32]; }

[[noreturn]] inline void fail(const char* what, uint32_t address) {
  std::fprintf(stderr, "emulation: %s at shared address %u of %d bytes\n", what, address, shared_bytes);
  std::abort();
}

inline void check_shared(uint32_t address, int bytes) {
  if (address + bytes > static_cast<uint32_t>(shared_bytes)) fail("out of bounds", address);
  if (address % bytes != 0) fail("misaligned", address);
}

inline void perform(const Copy& copy) {
  check_shared(copy.to, copy.bytes);
  if (copy.valid) {
    std::memcpy(smem + copy.to, copy.from, copy.bytes);
  } else {
    std::memset(smem + copy.to, 0, copy.bytes);
  }
}

// Gives this lane's part, waits for the warp, and returns which of the two exchanges holds the parts.
template <typename Give>
int collective(Give give) {
  Warp& w = warp();
  const int side = thread().collectives++ % 2;
  if (w.arrived[side] == 32) w.arrived[side] = 0;
  give(w, side);
  ++w.arrived[side];
  while (w.arrived[side] != 32) yield();
  return side;
}

struct ThreadIndex {
  struct {
    operator int() const { return current; }
  } x;
};
struct BlockIndex {
  int x;
};
extern ThreadIndex thread_index;
extern BlockIndex block_index;
struct ThreadCount {
  struct {
    operator int() const { return static_cast<int>(threads.size()); }
  } x;
};
inline ThreadCount thread_count;

void syncthreads();
inline void syncwarp() {
  collective([](Warp&, int) {});
}

inline float shfl_xor(unsigned, float value, int distance) {
  const int lane = current % 32;
  const int side = collective([&](Warp& w, int s) { std::memcpy(&w.word[s][lane], &value, 4); });
  float other;
  std::memcpy(&other, &warp().word[side][lane ^ distance], 4);
  return other;
}

inline bool all(unsigned, bool value) {
  const int side = collective([&](Warp& w, int s) { w.word[s][current % 32] = value; });
  return std::all_of(warp().word[side], warp().word[side] + 32, [](uint32_t v) { return v != 0; });
}

template <typename T>
T ldg(const T* pointer) {
  return *pointer;
}

inline float rsqrt(float x) { return 1.f / std::sqrt(x); }

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define blockDim emulation::thread_count
#define __syncthreads emulation::syncthreads
#define __syncwarp emulation::syncwarp
#define __shfl_xor_sync emulation::shfl_xor
#define __all_sync emulation::all
#define __ldg emulation::ldg
#define __uint_as_float emulation::as_float
#define rsqrtf emulation::rsqrt
using std::max;
using std::min;
