// Direct convolution in float32 on Hopper's CUDA cores: an implicit matrix product whose operands TMA copies and one warpgroup transposes,
// so that next to nothing but FFMA is issued. A scheduler issues one instruction a clock, and FFMA can be every one of them.
//
//           depth = taps x channels             filters
//          +--------+                         +-----------+
//   pixels |   A    |   W [filters,           | 8 warps:  |   a warp has 64 x 64 sums: 8 x 4 lanes of 8 pixels x 16 filters,
//  (n,p,q) | slices |    taps, channels]      | 4x2, 8x1  |   in fours, pixels 32 apart and filters 16: six loads of 16 bytes
//          +--------+  --copy, transpose -->  | or 2x4    |   serve 128 FFMA
//                                             +-----------+
//
//   what                 where                                              written by       released when
//   A, W slices of 32    shared, one or two slots, rows of 128 bytes        producer (TMA)   transposed
//   transposed slices    shared, two slots, [depth][pixel or filter]        producer         read, per warp
//   fragments            registers: 8 pixels and 16 filters, twice          ld.shared        -
//   sums                 registers, 128 a thread                            FFMA             -
//   part of a tile       global, one a block, [16 bytes][thread]            a split tile     the block with the tile's first slice adds it
//   output               global, 16 bytes a thread                          consumer         -
//
//   Why transposed: registers lie in two banks, even and odd, that give one operand a clock each (measured: FFMA of three operands of one
//   bank take 3.0 clocks, of two 2.0). A product reads its sum and its filter's value, the pixel's comes from the reuse cache; so those two
//   must be of different banks. A load of 16 bytes fills four neighbours, as four of the sums lie because they are stored so: were the four
//   loaded of the depth, all would be of one bank; as filters in the sums' order, a sum and its filter's value would be. Therefore
//   the filters of a transposed slice lie in swapped pairs: 1 0 3 2.
//
//   What it can reach: a load of 16 bytes costs as much as 2.9 FFMA, so the 128 of a depth and their six loads take at least 147 clocks,
//   87 % (measured without anything else; 8 x 8 sums with twice the warps: 83 %). NOTES.md has the measurements.
//
//   All tiles' slices are shared out evenly (stream-K). Of a tile that several blocks have parts of, the one with the first slice adds
//   the others' in the order of the depth, so results repeat to the bit. It waits for blocks of lower index only, which the GPU starts
//   earlier, so it never waits for one that cannot start.
#pragma once

#include "common/sm90.cuh"
#include "float_gemm_sm90.h"

namespace convfirst::direct::sm90 {

using namespace convfirst::sm90;

// Position in its pair of a filter's value in a transposed slice, against the filter's own.
constexpr int kFilterSwap = 1;

struct FloatParams {
  float* y;
  const float* bias;
  int* flags;       // of each block: its part is there
  float4* partials;
  int units;        // slices of all tiles
  int pixels, filters;
  int steps, tiles_n;
  int out_w, out_hw, kernel_w;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int channels;
  Activation activation;
};

// A piece of a block's share: slices [first, first + count) of a tile.
struct FloatPiece {
  int tile, first, count;
};

// Walks over the pieces of a share.
struct FloatShare {
  int at, end;
  __device__ __forceinline__ FloatShare(const FloatParams& p, int logical)
      : at(float_share(p.units, gridDim.x, logical)), end(float_share(p.units, gridDim.x, logical + 1)) {}
  __device__ __forceinline__ FloatPiece piece(const FloatParams& p) const {
    const int tile = at / p.steps, first = at - tile * p.steps;
    return {tile, first, min(p.steps - first, end - at)};
  }
};

// ---------------------------------------------------------------------------------------------------------------------------
// Producer

struct FloatBarriers {
  TransactionBarrier* copied;  // of each slot of copies
  Barrier* full;               // of each transposed slot
  Barrier* empty;
};

template <int kTile>
struct FloatProducer {
  static constexpr FloatTile kShape = kFloatTiles[kTile];
  static constexpr int kABlocks = kShape.rows() / 64, kBlocks = (kShape.rows() + kShape.columns()) / 64;  // a thread
  const FloatParams& p;
  const CUtensorMap& x_map;
  const CUtensorMap& w_map;
  char* copies;
  uint32_t transposed;
  const FloatBarriers& bar;

  // What thread 0 copies next.
  struct Cursor {
    FloatShare share;
    int left = 0, slot = 0, n, h, w, column, tap, c, r, s;
    __device__ __forceinline__ explicit Cursor(const FloatShare& all) : share(all) {}
  };

  __device__ __forceinline__ void copy_next(Cursor& at) const {
    if (at.left == 0) {
      if (at.share.at >= at.share.end) return;
      const FloatPiece piece = at.share.piece(p);
      at.share.at += piece.count, at.left = piece.count;
      const int tile_row = piece.tile / p.tiles_n, row = tile_row * kShape.rows(), slices = (p.channels + kFloatDepth - 1) / kFloatDepth;
      at.column = (piece.tile - tile_row * p.tiles_n) * kShape.columns();
      at.n = row / p.out_hw;
      const int pq = row - at.n * p.out_hw, out_p = pq / p.out_w, out_q = pq - out_p * p.out_w;
      at.h = out_p * p.stride_h - p.pad_h, at.w = out_q * p.stride_w - p.pad_w;
      at.tap = piece.first / slices, at.c = (piece.first - at.tap * slices) * kFloatDepth;
      at.r = at.tap / p.kernel_w, at.s = at.tap - at.r * p.kernel_w;
    }
    TransactionBarrier* copied = bar.copied + at.slot;
    char* to = copies + at.slot * kShape.slot_bytes();
    copied->arrive_and_expect_tx(kShape.slot_bytes());
    cute::SM90_TMA_LOAD_IM2COL_4D::copy(&x_map, barrier_pointer(copied), to, at.c, at.w, at.h, at.n, static_cast<uint16_t>(at.s * p.dilation_w),
                                        static_cast<uint16_t>(at.r * p.dilation_h));
    cute::SM90_TMA_LOAD_3D::copy(&w_map, barrier_pointer(copied), kEvictLast, to + kShape.rows() * kFloatDepth * 4, at.c, at.tap, at.column);
    if (++at.slot == kShape.slots()) at.slot = 0;
    --at.left;
    if ((at.c += kFloatDepth) < p.channels) return;
    at.c = 0, ++at.tap;
    if (++at.s == p.kernel_w) at.s = 0, ++at.r;
  }

  // Four rows by four of the depth at a time: chunk c of row r was copied to c ^ r % 8 of its 128 bytes; rows 4 g to 4 g + 3 of depth
  // d go to chunk g of row d, and each four of the depth begin 16 bytes further on. Eight lanes have the eight chunks of a row, so neither
  // reads nor writes meet in a bank.
  __device__ __forceinline__ void transpose(uint32_t from, uint32_t to) const {
    const int c = threadIdx.x % 8, g = threadIdx.x / 8;
    from += g * 512 + ((c ^ (g % 2 * 4)) << 4), to += (g + c) * 16;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      float v[4][4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const uint4 loaded = load_shared_128((from ^ (e << 4)) + n * 8192 + e * 128);
        v[e][0] = __uint_as_float(loaded.x), v[e][1] = __uint_as_float(loaded.y), v[e][2] = __uint_as_float(loaded.z), v[e][3] = __uint_as_float(loaded.w);
      }
      const int pitch = n < kABlocks ? kShape.rows() * 4 : kShape.columns() * 4;
      const uint32_t there = to + (n < kABlocks ? n * 256 : kShape.b_offset() + (n - kABlocks) * 256) + 4 * c * pitch;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int swap = n < kABlocks ? 0 : kFilterSwap;
        asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(there + k * pitch), "f"(v[swap][k]), "f"(v[1 ^ swap][k]), "f"(v[2 ^ swap][k]),
                     "f"(v[3 ^ swap][k])
                     : "memory");
      }
    }
  }

  __device__ void run() const {
    const FloatShare share(p, gridDim.x - 1 - blockIdx.x);
    Cursor cursor(share);
    if (threadIdx.x == 0) {
#pragma unroll 1
      for (int i = 0; i < kShape.slots(); ++i) copy_next(cursor);
    }
    int slot = 0, to = 0;
    uint32_t copied_phase = 0, empty_phase = 1;  // transposed slots start empty
#pragma unroll 1
    for (int left = share.end - share.at; left > 0; --left) {
      bar.copied[slot].wait(copied_phase);
      bar.empty[to].wait(empty_phase);
      transpose(smem_address(copies) + slot * kShape.slot_bytes(), transposed + to * kShape.transposed_bytes());
      warpgroup_barrier(2);
      if (threadIdx.x == 0) {
        bar.full[to].arrive();
        copy_next(cursor);
      }
      __syncwarp();
      if (++slot == kShape.slots()) slot = 0, copied_phase ^= 1;
      if (++to == kFloatTransposed) to = 0, empty_phase ^= 1;
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------------
// Consumer

template <int kTile>
struct FloatConsumer {
  static constexpr FloatTile kShape = kFloatTiles[kTile];
  static constexpr int kAPitch = kShape.rows() * 4, kBPitch = kShape.columns() * 4;
  const FloatParams& p;
  const FloatBarriers& bar;
  uint32_t slots;               // address of the first
  int slot = 0;
  uint32_t phase = 0;

  using Sums = float[8][16];
  using A = float[8];
  using B = float[16];

  // A lane has pixels 4 lane_row + 32 i + e and filters 4 lane_column + 16 q + e of the warp's, e < 4: eight lanes of a half warp read different
  // pixels, the others the same, which one access of shared memory serves.
  __device__ __forceinline__ FloatConsumer(const FloatParams& params, const FloatBarriers& barriers, uint32_t s)
      : p(params), bar(barriers), slots(s) {}
  // Of the consumers; read where it is needed, since the products leave no register to keep it in.
  static __device__ __forceinline__ uint32_t thread() {
    uint32_t index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index - 128;
  }
  static __device__ __forceinline__ int lane_row(uint32_t index) { return index / 2 % 8; }
  static __device__ __forceinline__ int lane_column(uint32_t index) { return index % 2 + index / 16 % 2 * 2; }

  static __device__ __forceinline__ void load(float* v, uint32_t address) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]) : "r"(address));
  }

  // Addresses of a group of the depth; the next of a slot is kAGroup and kBGroup bytes further on.
  static constexpr int kGroups = kFloatDepth / kFloatGroup, kSkew = 16;  // bytes, after each four of the depth
  static constexpr int kAGroup = kFloatGroup * kAPitch + kFloatGroup / 4 * kSkew, kBGroup = kFloatGroup * kBPitch + kFloatGroup / 4 * kSkew;
  struct Position {
    uint32_t a, b;
    __device__ __forceinline__ Position(const FloatConsumer& self, int slot) {
      const uint32_t address = self.slots + slot * kShape.transposed_bytes(), index = thread(), warp = index / 32;
      a = address + (warp / kShape.warps_n * 16 + lane_row(index)) * 16;
      b = address + kShape.b_offset() + (warp % kShape.warps_n * 16 + lane_column(index)) * 16;
    }
  };
  static __device__ __forceinline__ void load_fragments(A& a, B& b, const Position& at, int k) {
    const int skew = k / 4 * kSkew;
    load(a, at.a + k * kAPitch + skew), load(a + 4, at.a + k * kAPitch + skew + 128);
#pragma unroll
    for (int q = 0; q < 4; ++q) load(b + 4 * q, at.b + k * kBPitch + skew + q * 64);
  }

  // Back and forth, so that a pixel's value, and at the turn a filter's, comes from the reuse cache and not from its bank.
  static __device__ __forceinline__ void multiply(Sums& sums, const A& a, const B& b) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const int jj = i & 1 ? 15 - j : j;
        sums[i][jj] = fmaf(a[i], b[jj ^ kFilterSwap], sums[i][jj]);
      }
    }
  }

  // A group of the depth; before the products of each, the loads of the next.
  __device__ __forceinline__ void multiply_group(Sums& sums, A (&a)[2], B (&b)[2], const Position& at, const Position& next) const {
#pragma unroll
    for (int k = 0; k < kFloatGroup; ++k) {
      load_fragments(a[(k + 1) % 2], b[(k + 1) % 2], k < kFloatGroup - 1 ? at : next, (k + 1) % kFloatGroup);
      multiply(sums, a[k % 2], b[k % 2]);
    }
  }

  // Addresses of a slot's barriers, which lie behind the slots.
  __device__ __forceinline__ uint32_t full(int s) const { return slots + kFloatTransposed * kShape.transposed_bytes() + (kShape.slots() + s) * 8; }
  __device__ __forceinline__ uint32_t empty(int s) const { return full(s) + kFloatTransposed * 8; }

  // Predicated, not branched around: see multiply_slices.
  static __device__ __forceinline__ void release(uint32_t barrier, bool now) {
    __syncwarp();
    asm volatile("{\n.reg .pred now;\nsetp.ne.u32 now, %1, 0;\n@now mbarrier.arrive.shared::cta.b64 _, [%0];\n}" ::"r"(barrier),
                 "r"(static_cast<uint32_t>(now && thread() % 32 == 0))
                 : "memory");
  }

  __device__ __forceinline__ void begin(A& a, B& b) {
    bar.full[slot].wait(phase);
    load_fragments(a, b, Position(*this, slot), 0);
  }

  // `count` slices; of the first the first fragments are in a[0] and b[0], and on return those of the slice after, where there is `more`.
  // A round's products are one basic block, because at the border of two ptxas moves sums from one register to another: so each round
  // waits for the slice that it loads from last, its own or the next, which the producer has had most of a slice's time for.
  __device__ __forceinline__ void multiply_slices(Sums& sums, A (&a)[2], B (&b)[2], int count, bool more) {
    constexpr int kSlot = kShape.transposed_bytes(), kRing = kFloatTransposed * kSlot;
    Position at(*this, slot);
#pragma unroll 1
    for (int groups = count * kGroups; groups > 0; --groups) {
      const bool last = groups % kGroups == 1, on = last && (groups > 1 || more), wraps = on && slot + 1 == kFloatTransposed;
      const uint32_t read = empty(slot);
      Position next = at;
      next.a += (last && !on ? 0 : kAGroup) + (on ? kSlot - kGroups * kAGroup : 0) - (wraps ? kRing : 0);
      next.b += (last && !on ? 0 : kBGroup) + (on ? kSlot - kGroups * kBGroup : 0) - (wraps ? kRing : 0);
      slot = wraps ? 0 : slot + on, phase ^= wraps;
      wait_barrier(full(slot), phase);
      multiply_group(sums, a, b, at, next);
      at = next;
      release(read, last);
    }
  }

  // e^v, v <= 0, to three units of the last place: with fast math expf loses as many bits as v has before its point.
  static __device__ __forceinline__ float exp_of(float v) {
    const float whole = rintf(fmaxf(v, -87.f) * 1.44269504f);
    return exp2f(fmaf(v, 1.44269504f, -whole) + v * 1.92596299e-8f) * exp2f(whole);
  }
  __device__ __forceinline__ float activate(float v) const {
    if (p.activation == Activation::kNone) return v;
    if (p.activation == Activation::kRelu) return v < 0.f ? 0.f : v;
    if (p.activation == Activation::kGelu) return 0.5f * v * (1.f + erff(v * 0.707106781f));
    const float e = exp_of(-fabsf(v));
    return v * __fdiv_rn(v < 0.f ? e : 1.f, 1.f + e);
  }

  __device__ __forceinline__ void finish(Sums& sums, int first_column) const {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = first_column + 16 * q + e;
        const float bias = p.bias != nullptr && column < p.filters ? __ldg(p.bias + column) : 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[i][4 * q + e] += bias;
      }
    }
    if (p.activation == Activation::kNone) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 16; ++j) sums[i][j] = activate(sums[i][j]);
    }
  }

  __device__ __forceinline__ void store(Sums& sums, int tile) const {
    const uint32_t index = thread(), warp = index / 32;
    const int tile_row = tile / p.tiles_n;
    const int first_row = tile_row * kShape.rows() + warp / kShape.warps_n * 64 + lane_row(index) * 4;
    const int first_column = (tile - tile_row * p.tiles_n) * kShape.columns() + warp % kShape.warps_n * 64 + lane_column(index) * 4;
    finish(sums, first_column);
    const bool whole = p.filters % 4 == 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = first_row + i / 4 * 32 + i % 4;
      if (row >= p.pixels) continue;
      float* to = p.y + static_cast<int64_t>(row) * p.filters + first_column;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int left = p.filters - first_column - 16 * q;
        const float* v = &sums[i][4 * q];
        if (whole && left > 0) *reinterpret_cast<float4*>(to + 16 * q) = make_float4(v[0], v[1], v[2], v[3]);
        if (whole) continue;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (e < left) to[16 * q + e] = v[e];
        }
      }
    }
  }

  __device__ __forceinline__ float4* partial_of(int logical) const {
    return p.partials + static_cast<int64_t>(logical) * (kFloatPartialBytes / 16) + thread();
  }

  __device__ __forceinline__ void store_partial(const Sums& sums, int logical) const {
    float4* to = partial_of(logical);
#pragma unroll
    for (int v = 0; v < 32; ++v) {
      const float* s = &sums[v / 4][v % 4 * 4];
      __stcg(to + v * kFloatConsumers, make_float4(s[0], s[1], s[2], s[3]));
    }
    __threadfence();
    asm volatile("bar.sync 1, 256;" ::: "memory");
    if (thread() == 0) asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(p.flags + logical) : "memory");
  }

  // Adds what the blocks after `logical` have of this tile.
  __device__ __forceinline__ void add_partials(Sums& sums, int logical, int tile) const {
    const int end = (tile + 1) * p.steps;
#pragma unroll 1
    for (int other = logical + 1; other < static_cast<int>(gridDim.x) && float_share(p.units, gridDim.x, other) < end; ++other) {
      if (thread() == 0) {
        int there = 0;
        while (there == 0) asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(there) : "l"(p.flags + other) : "memory");
      }
      asm volatile("bar.sync 1, 256;" ::: "memory");
      const float4* from = partial_of(other);
#pragma unroll
      for (int v = 0; v < 32; ++v) {
        const float4 part = __ldcg(from + v * kFloatConsumers);
        float* s = &sums[v / 4][v % 4 * 4];
        s[0] += part.x, s[1] += part.y, s[2] += part.z, s[3] += part.w;
      }
    }
  }

  static __device__ __forceinline__ int logical_block() { return gridDim.x - 1 - blockIdx.x; }

  __device__ __forceinline__ void finish_piece(Sums& sums, const FloatPiece& piece) const {
    if (piece.first > 0) return store_partial(sums, logical_block());
    if (piece.count < p.steps) add_partials(sums, logical_block(), piece.tile);
    store(sums, piece.tile);
  }

  __device__ void run() {
    FloatShare share(p, logical_block());
    A a[2];
    B b[2];
    begin(a[0], b[0]);
#pragma unroll 1
    while (share.at < share.end) {
      Sums sums = {};
      const int count = share.piece(p).count;
      multiply_slices(sums, a, b, count, share.at + count < share.end);
      asm volatile("" : "+r"(share.at));  // worked out again, not kept: the products leave no registers
      const FloatPiece piece = share.piece(p);
      finish_piece(sums, piece);
      share.at += piece.count;
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------------

template <int kTile>
__global__ void __launch_bounds__(kFloatThreads, 1)
    float_gemm_sm90(const __grid_constant__ FloatParams p, const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr FloatTile kShape = kFloatTiles[kTile];
  extern __shared__ char raw[];
  char* slots = raw + (kFloatAlign - smem_address(raw) % kFloatAlign) % kFloatAlign;
  char* barriers = slots + kShape.slots() * kShape.slot_bytes() + kFloatTransposed * kShape.transposed_bytes();
  FloatBarriers bar{reinterpret_cast<TransactionBarrier*>(barriers)};
  bar.full = reinterpret_cast<Barrier*>(bar.copied + kShape.slots()), bar.empty = bar.full + kFloatTransposed;
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&x_map));
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&w_map));
    for (int i = 0; i < kShape.slots(); ++i) bar.copied[i].init(1);
    for (int i = 0; i < kFloatTransposed; ++i) bar.full[i].init(1), bar.empty[i].init(kFloatConsumers / 32);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  const uint32_t transposed = smem_address(slots) + kShape.slots() * kShape.slot_bytes();
  if (threadIdx.x < 128) {
    cutlass::arch::warpgroup_reg_dealloc<kFloatProducerRegisters>();
    FloatProducer<kTile>{p, x_map, w_map, slots, transposed, bar}.run();
  } else {
    cutlass::arch::warpgroup_reg_alloc<kFloatConsumerRegisters>();
    FloatConsumer<kTile>(p, bar, transposed).run();
  }
#endif
}

}  // namespace convfirst::direct::sm90
