// The block's linear layers, forward, on Hopper: TMA loads shared by a cluster, warp-group matrix products, fused epilogues.
//
//              K                            N
//          +--------+                +-------------+   warpgroup 0   expand:  h = act(A W^T + b)
//        M |   A    |   W [N x K]    |  64 rows    |   warpgroup 1   project: y = x + scale (A W^T + b)
//          | slices |  --------->    |  each       |   warpgroup 2
//          +--------+                +-------------+
//
//   one block = a producer warpgroup (one thread at work) + kWarpgroups consumer warpgroups, persistent over tiles. The two blocks
//   of a cluster take neighbouring columns of the same rows: each loads half of A's slice for both. A warpgroup owns 64 rows of
//   the tile from the first product to the store. In the expansion it has two sets of sums: the epilogue of a tile runs
//   between the first slices of the next tile, 32 columns each time, and the tensor cores' queue never drains.
//
//   what                     where                                       written by       released when
//   A, W slices of 64        shared, ring of slots, 128-byte swizzle     producer (TMA)   products done, per warp, in both blocks
//   sums, then the result    registers, (2 x) kColumns / 2 a thread      wgmma            -
//   x (projection)           shared, ring, after the tile's last slice   producer (TMA)   added, per warp
//   output                   global, 16 bytes a thread                   consumer         -
//   bias, layer scale        shared, of the last tiles, float32          producer         no warp can still be in that tile
//
//   W's rows are permuted on their way into shared memory (by the tensor map), so that the 16 sums that a thread has of 32
//   columns, (row, 8 j + 2 q + i) for j < 4, i < 2 and its q = lane % 4, are the 8 neighbouring columns 8 q + 2 j + i of two rows.
#pragma once

#include "activation_sm90.cuh"
#include "linear_sm90.h"

namespace convfirst::block_fusion::sm90 {

struct LinearParams {
  void* output;
  const float* bias;
  const float* layer_scale;
  const float* sample_scale;
  int rows, columns;
  int steps;         // slices of the depth
  int image_pixels;
  int groups_n;      // clusters along the columns
  int groups;        // clusters' tiles in all
};

struct LinearBarriers {
  TransactionBarrier* full;
  Barrier* empty;
  __device__ LinearBarriers(char* base, int slots)
      : full(reinterpret_cast<TransactionBarrier*>(base)), empty(reinterpret_cast<Barrier*>(full + slots)) {}
};

template <class Traits>
struct LinearTileOrigin {
  int row, column;
  __device__ __forceinline__ LinearTileOrigin(const LinearParams& p, int group, int rank) {
    const int group_row = group / p.groups_n;
    row = group_row * Traits::kRows;
    column = ((group - group_row * p.groups_n) * Traits::kCluster + rank) * Traits::kColumns;
  }
};

__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void allow_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// ---------------------------------------------------------------------------------------------------------------------------
// Producer

template <class Traits>
struct LinearProducer {
  const LinearParams& p;
  const CUtensorMap& a_map;
  const CUtensorMap& w_map;
  const CUtensorMap& x_map;
  char* smem;
  LinearBarriers& bar;
  int cluster, clusters, rank;

  // W's slice, and with a tile's first slice its vectors.
  __device__ __forceinline__ void load_weight(int slot, const LinearTileOrigin<Traits>& tile, int step, int buffer) const {
    TransactionBarrier* full = bar.full + slot;
    const int bytes = min(Traits::kColumns, p.columns - tile.column) * 4;
    const bool bias = step == 0 && bytes > 0 && p.bias != nullptr;
    const bool scale = step == 0 && bytes > 0 && Traits::kLayer == Layer::kProject && p.layer_scale != nullptr;
    full->arrive_and_expect_tx(Traits::kSlotBytes + (bias ? bytes : 0) + (scale ? bytes : 0));
    cute::SM90_TMA_LOAD_5D::copy(&w_map, barrier_pointer(full), kEvictLast, smem + slot * Traits::kSlotBytes + Traits::kABytes,
                                 step * kLinearDepth, 0, 0, 0, tile.column / 32);
    char* vectors = smem + Traits::kVectorOffset + buffer * Traits::kVectors * Traits::kColumns * 4;
    if (bias) bulk_load(p.bias + tile.column, full, vectors, bytes);
    if (scale) bulk_load(p.layer_scale + tile.column, full, vectors + Traits::kColumns * 4, bytes);
  }

  __device__ __forceinline__ void load_a(int slot, const LinearTileOrigin<Traits>& tile, int step) const {
    TransactionBarrier* full = bar.full + slot;
    constexpr int kShare = Traits::kRows / Traits::kCluster;
    char* to = smem + slot * Traits::kSlotBytes + rank * kShare * kLinearDepth * 2;
    if constexpr (Traits::kCluster == 1) {
      cute::SM90_TMA_LOAD_2D::copy(&a_map, barrier_pointer(full), kEvictNormal, to, step * kLinearDepth, tile.row);
    } else {
      cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&a_map, barrier_pointer(full), (1 << Traits::kCluster) - 1, kEvictNormal, to,
                                             step * kLinearDepth, tile.row + rank * kShare);
    }
  }

  // x of the tile, panels of 64 columns.
  __device__ __forceinline__ void load_x(int slot, const LinearTileOrigin<Traits>& tile, int first_panel) const {
    TransactionBarrier* full = bar.full + slot;
    const int panels = min(Traits::kXPanelsASlot, Traits::kPanels - first_panel);
    full->arrive_and_expect_tx(panels * Traits::kXPanelBytes);
#pragma unroll 1
    for (int i = 0; i < panels; ++i) {
      cute::SM90_TMA_LOAD_2D::copy(&x_map, barrier_pointer(full), kEvictNormal, smem + slot * Traits::kSlotBytes + i * Traits::kXPanelBytes,
                                   tile.column + (first_panel + i) * 64, tile.row);
    }
  }

  // The first weights: the previous kernel does not write them, nor does the other block. No more of them: A's slice would wait behind.
  static constexpr int kFirst = 2;
  __device__ void prologue() const {
    const LinearTileOrigin<Traits> tile(p, cluster, rank);
    for (int step = 0; step < kFirst; ++step) load_weight(step, tile, step, 0);
  }

  __device__ void run() const {
    int slot = 0, buffer = 0;
    uint32_t phase = 1;  // the slots start empty
    const auto advance = [&] {
      if (++slot == Traits::kSlots) slot = 0, phase ^= 1;
    };
    for (int group = cluster; group < p.groups; group += clusters) {
      const LinearTileOrigin<Traits> tile(p, group, rank);
#pragma unroll 1
      for (int step = 0; step < p.steps; ++step) {
        if (group != cluster || step >= kFirst) {
          bar.empty[slot].wait(phase);
          load_weight(slot, tile, step, buffer);
        }
        load_a(slot, tile, step);
        advance();
      }
      if constexpr (Traits::kLayer == Layer::kProject) {
#pragma unroll 1
        for (int panel = 0; panel < Traits::kPanels; panel += Traits::kXPanelsASlot) {
          bar.empty[slot].wait(phase);
          load_x(slot, tile, panel);
          advance();
        }
      }
      buffer = (buffer + 1) % kLinearVectorBuffers;
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------------
// Consumer

// A tile whose sums are complete or will be: where this thread's results go.
struct LinearResult {
  int64_t offset;               // bytes from the output's first element to this thread's first
  int rows_left, columns_left;  // from there on
  int buffer;                   // of the tile's vectors
};

template <class Traits>
struct LinearConsumer {
  using Element = ElementOf<Traits>;
  using Sums = float[Traits::kColumns / 2];
  const LinearParams& p;
  char* smem;
  LinearBarriers& bar;
  int warpgroup, warp, lane;
  int slot = 0, held = -1;  // next to wait for; read by the products in flight
  uint32_t phase = 0;
  bool ready = false;       // the next slot is known to be full

  __device__ __forceinline__ void release(int which) const {  // both blocks of the cluster write to the slot
    if constexpr (Traits::kCluster == 1) {
      if (lane == 0) bar.empty[which].arrive();
    } else {
      if (lane < Traits::kCluster) bar.empty[which].arrive(lane);
    }
  }
  __device__ __forceinline__ void release_held() {
    if (held >= 0) release(held);
    held = -1;
  }
  __device__ __forceinline__ void advance() {
    if (++slot == Traits::kSlots) slot = 0, phase ^= 1;
  }

  // Queues the next slice's products, waits until they are all that is in flight and releases the slice before.
  __device__ __forceinline__ void step(Sums& sums, bool accumulate) {
    if (!ready) bar.full[slot].wait(phase);
    const uint32_t address = smem_address(smem) + slot * Traits::kSlotBytes;
    const uint64_t a = matrix_descriptor<128>(address + warpgroup * 64 * kLinearDepth * 2);
    const uint64_t w = matrix_descriptor<128>(address + Traits::kABytes);
    cute::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < kLinearDepth / 16; ++k) wgmma_ss<Element, Traits::kColumns>(sums, a + 2 * k, w + 2 * k, accumulate || k > 0);
    cute::warpgroup_commit_batch();
    const int issued = slot;
    advance();
    cute::warpgroup_wait<1>();
    release_held();
    held = issued;
    ready = bar.full[slot].test_wait(phase);
  }

  __device__ __forceinline__ void multiply(Sums& sums, int first_step) {
#pragma unroll 1
    for (int i = first_step; i < p.steps; ++i) step(sums, i > 0);
  }

  // Eight neighbouring elements of vector `index` of a tile, this thread's of 32-column block `block`.
  __device__ __forceinline__ void load_vector(float (&v)[8], int buffer, int index, int block) const {
    const uint32_t address = smem_address(smem) + Traits::kVectorOffset +
                             ((buffer * Traits::kVectors + index) * Traits::kColumns + lane % 4 * 8 + 32 * block) * 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 loaded = load_shared_128(address + 16 * i);
      v[4 * i] = __uint_as_float(loaded.x), v[4 * i + 1] = __uint_as_float(loaded.y);
      v[4 * i + 2] = __uint_as_float(loaded.z), v[4 * i + 3] = __uint_as_float(loaded.w);
    }
  }

  __device__ __forceinline__ void store(const uint32_t (&v)[4], const LinearResult& result, int block, int r) const {
    if (8 * r >= result.rows_left || 32 * block >= result.columns_left) return;
    char* to = static_cast<char*>(p.output) + result.offset + r * 16 * p.columns + 64 * block;
    *reinterpret_cast<uint4*>(to) = make_uint4(v[0], v[1], v[2], v[3]);
  }

  // Of two neighbouring hidden units.
  static __device__ __forceinline__ uint32_t activate_pair(float s0, float s1, float b0, float b1) {
    constexpr auto kAct = Traits::kActivation;
    if constexpr (Traits::kHalfActivation) {
      const uint32_t packed = pack2<Element>(b0, b1);
      const __half2 bias = __hmul2(*reinterpret_cast<const __half2*>(&packed), __float2half2_rn(bias_scale<kAct>()));
      return activate_half<kAct>(s0, s1, *reinterpret_cast<const uint32_t*>(&bias));
    } else {
      b0 *= bias_scale<kAct>(), b1 *= bias_scale<kAct>();
      return pack2<Element>(activate_float<kAct>(s0, b0), activate_float<kAct>(s1, b1));
    }
  }

  // 32 columns. This thread has sums of 8 neighbouring columns 2 j + i of two rows r, at 4 j + 2 r + i.
  __device__ __forceinline__ void expand_block(const Sums& sums, const LinearResult& result, int block) const {
    const float* s = sums + 16 * block;
    float bias[8];
    load_vector(bias, result.buffer, 0, block);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = activate_pair(s[4 * j + 2 * r], s[4 * j + 2 * r + 1], bias[2 * j], bias[2 * j + 1]);
      store(v, result, block, r);
    }
  }

  // A tile's products with the epilogue of the tile before, which is complete when the first slice is queued, a block a slice.
  __device__ __forceinline__ void multiply_under_epilogue(Sums& sums, Sums& done, const LinearResult& result) {
#pragma unroll
    for (int block = 0; block < Traits::kBlocks; ++block) {
      step(sums, block > 0);
      if (block == 0) fence_operands(done);
      expand_block(done, result, block);
    }
    multiply(sums, Traits::kBlocks);
  }

  __device__ __forceinline__ void complete(Sums& sums) {
    cute::warpgroup_wait<0>();
    fence_operands(sums);
    release_held();
  }

  __device__ __forceinline__ LinearResult result_of(const LinearTileOrigin<Traits>& tile, int index) const {
    const int row = tile.row + warpgroup * 64 + warp * 16 + lane / 4, column = tile.column + lane % 4 * 8;
    return {(static_cast<int64_t>(row) * p.columns + column) * 2, p.rows - row, p.columns - column, index % kLinearVectorBuffers};
  }

  __device__ __forceinline__ void expand(int cluster, int clusters, int rank) {
    const int tiles = (p.groups - cluster + clusters - 1) / clusters;
    Sums sums[2];
    LinearResult result = result_of({p, cluster, rank}, 0);
    multiply(sums[0], 0);
    const auto next = [&](Sums& current, Sums& done, int i) {
      multiply_under_epilogue(current, done, result);
      result = result_of({p, cluster + i * clusters, rank}, i);
    };
    const auto finish = [&](Sums& current) {
      complete(current);
#pragma unroll
      for (int block = 0; block < Traits::kBlocks; ++block) expand_block(current, result, block);
    };
    int i = 1;
#pragma unroll 1
    for (; i + 1 < tiles; i += 2) {
      next(sums[1], sums[0], i);
      next(sums[0], sums[1], i + 1);
    }
    if (i < tiles) {
      next(sums[1], sums[0], i);
      finish(sums[1]);
    } else {
      finish(sums[0]);
    }
  }

  // x of row r of 32 columns, in a panel of 64 columns.
  __device__ __forceinline__ uint4 load_x(uint32_t panel, int block, int r) const {
    const int row = warpgroup * 64 + warp * 16 + lane / 4 + 8 * r;
    return load_shared_128(panel + swizzle<128>(row * 128 + (block % 2 * 4 + lane % 4) * 16));
  }

  __device__ __forceinline__ void project_block(const Sums& sums, const LinearResult& result, uint32_t panel, int block,
                                                const float (&sample)[2]) const {
    const float* s = sums + 16 * block;
    float bias[8], scale[8];
    load_vector(bias, result.buffer, 0, block);
    load_vector(scale, result.buffer, 1, block);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint4 x = load_x(panel, block, r);
      uint32_t v[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 residual = unpack2<Element>(v[j]);
        v[j] = pack2<Element>(fmaf(s[4 * j + 2 * r] + bias[2 * j], scale[2 * j] * sample[r], residual.x),
                              fmaf(s[4 * j + 2 * r + 1] + bias[2 * j + 1], scale[2 * j + 1] * sample[r], residual.y));
      }
      store(v, result, block, r);
    }
  }

  __device__ __forceinline__ void project(int cluster, int clusters, int rank) {
    int index = 0;
#pragma unroll 1
    for (int group = cluster; group < p.groups; group += clusters, ++index) {
      const LinearTileOrigin<Traits> tile(p, group, rank);
      Sums sums;
      multiply(sums, 0);
      const LinearResult result = result_of(tile, index);
      float sample[2] = {1.f, 1.f};
      if (p.sample_scale != nullptr) {
#pragma unroll
        for (int r = 0; r < 2; ++r) sample[r] = __ldg(p.sample_scale + (p.rows - max(result.rows_left - 8 * r, 1)) / p.image_pixels);
      }
      complete(sums);
#pragma unroll
      for (int panel = 0; panel < Traits::kPanels; ++panel) {
        const int place = panel % Traits::kXPanelsASlot;
        if (place == 0 && !ready) bar.full[slot].wait(phase);
        ready = false;
        const uint32_t x = smem_address(smem) + slot * Traits::kSlotBytes + place * Traits::kXPanelBytes;
#pragma unroll
        for (int block = 2 * panel; block < 2 * panel + 2; ++block) project_block(sums, result, x, block, sample);
        if (place + 1 == Traits::kXPanelsASlot || panel + 1 == Traits::kPanels) {
          __syncwarp();
          release(slot);
          advance();
        }
      }
    }
  }

  __device__ __forceinline__ void run(int cluster, int clusters, int rank) {
    if constexpr (Traits::kLayer == Layer::kExpand) {
      expand(cluster, clusters, rank);
    } else {
      project(cluster, clusters, rank);
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------------

// Vectors absent in the problem become zeros or ones.
template <class Traits>
__device__ void fill_absent_vectors(const LinearParams& p, char* smem) {
  float* vectors = reinterpret_cast<float*>(smem + Traits::kVectorOffset);
  const bool scales = Traits::kLayer == Layer::kProject;
  if (p.bias != nullptr && (!scales || p.layer_scale != nullptr)) return;
  for (int i = threadIdx.x; i < kLinearVectorBuffers * Traits::kVectors * Traits::kColumns; i += Traits::kThreads) {
    const bool scale = scales && i / Traits::kColumns % 2 == 1;
    if ((scale ? p.layer_scale : p.bias) == nullptr) vectors[i] = scale ? 1.f : 0.f;
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    linear_fwd_sm90(const __grid_constant__ LinearParams p, const __grid_constant__ CUtensorMap a_map,
                    const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap x_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char smem[];
  LinearBarriers bar(smem + Traits::kBarrierOffset, Traits::kSlots);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int rank = blockIdx.x % Traits::kCluster, cluster = blockIdx.x / Traits::kCluster, clusters = gridDim.x / Traits::kCluster;
  const LinearProducer<Traits> producer{p, a_map, w_map, x_map, smem, bar, cluster, clusters, rank};
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&w_map));
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&a_map));
    for (int i = 0; i < Traits::kSlots; ++i) bar.full[i].init(1), bar.empty[i].init(4 * Traits::kWarpgroups * Traits::kCluster);
    cutlass::arch::fence_barrier_init();
  }
  fill_absent_vectors<Traits>(p, smem);
  __syncthreads();
  if constexpr (Traits::kCluster == 1) {
    if (threadIdx.x == 0) producer.prologue();
  } else {
    cute::cluster_arrive();
    if (threadIdx.x == 0) producer.prologue();
    __syncwarp();
    cute::cluster_wait();
  }
  wait_for_previous_kernel();
  allow_next_kernel();  // not before: the next kernel's prologue may count on all that came before this one
  if (warp < 4) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (threadIdx.x == 0) producer.run();
    __syncwarp();
    if constexpr (Traits::kCluster > 1) cute::cluster_sync();  // the other block still writes and arrives here
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    LinearConsumer<Traits> consumer{p, smem, bar, warp / 4 - 1, warp % 4, lane};
    consumer.run(cluster, clusters, rank);
    if constexpr (Traits::kCluster > 1) cute::cluster_sync();
  }
#endif
}

}  // namespace convfirst::block_fusion::sm90
