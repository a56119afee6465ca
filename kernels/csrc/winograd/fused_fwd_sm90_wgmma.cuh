// F(2x2, 3x3) in one kernel on Hopper's tensor cores, float16 and bfloat16: input transform, a product for each of 16 transform points, inverse
// transform, bias and activation. Beside x and y only the transformed filters touch device memory.
//
//   a tile of the block: 4 strips of 8 x 2 Winograd tiles (16 x 4 pixels of y), 32 filters, all 16 points (i, j)
//
//     x, 18 x 6 pixels a strip                                warpgroup 0: points (i, 0), (i, 1)     warpgroup 1: (i, 3), (i, 2)
//     +-----------------------+   columns of one parity
//     | 0 1 0 1 0 1 ..    0 1 |   lie together in shared      ldmatrix: columns 0 2 1 of a tile      columns 3 1 2     X Z Y
//     | ..                    |   memory, so that the 8            d B  : X - Z, Y + Z                    X - Z, Y - Z
//     |                       |   tiles of a row lie one         B^T d B: sums and differences of rows, in packed 16-bit pairs:
//     |                       |   beside another: no two                  these registers are the left operand of wgmma
//     +-----------------------+   in the same banks           sums     : 8 points x (64 tiles x 32 filters), 128 registers a thread
//
//     lane l / 4 has tile l / 4 of the strip's upper row (rows 0 to 7 of wgmma's 16) and the one below it (rows 8 to 15), which share two of
//     six rows of x; chunk l % 4 of 2 channels is as ldmatrix brings it.
//
//   end of a tile: A^T m in registers; each warp gives one of its two columns to the warp of the other warpgroup that has the same strip, and takes
//   one: warpgroup 0 has the even columns of y, m0 + m1 + m2, warpgroup 1 the odd ones, m3 - m2 + m1.
//
//   what                    where                                                    written by        released when
//   filters, 32 channels    shared, 4 slots [point][32][32], swizzled; for good      producer (TMA)    products done, per warp
//                           where these are all channels
//   x, 32 channels          shared, 3 slots [strip][parity][6][9][32], swizzled      producer (TMA)    in registers, per warp
//   B^T d B                 registers, two batches of 4 points                       consumer          products done
//   sums                    registers, float32                                       wgmma             -
//   exchanged sums          shared, [round % 2][warpgroup][thread][4]                consumer          the barrier after next of the two warps
//   output                  global, 16 bytes a thread                                consumer          -
//
// Why the left operand is in registers: 64 tiles x 32 filters x 32 channels take 512 clocks of the tensor cores, and shared memory, 128 bytes a clock,
// is busy 256 for filters, 576 for x by ldmatrix and 216 for its arrival: 1048, where V in shared memory would take 1800 (NOTES.md).
#pragma once

#include "common/activation.cuh"
#include "common/sm90.cuh"
#include "patch/sync.cuh"
#include "winograd/fused_sm90.h"
#include "winograd/pairs_sm90.cuh"

namespace convfirst::winograd::sm90 {

using namespace convfirst::sm90;

struct FusedParams {
  void* y;
  const float* bias;
  FusedPlan plan;
  int batch, out_height, out_width, outputs, padding;
  Activation activation;
};

struct FusedBarriers {
  TransactionBarrier *data, *filters;
  Barrier *data_free, *filters_free;
  __device__ FusedBarriers(char* base)
      : data(reinterpret_cast<TransactionBarrier*>(base)), filters(data + kDataSlots), data_free(reinterpret_cast<Barrier*>(filters + kFilterSlots)),
        filters_free(data_free + kDataSlots) {}
};

// A slot of a ring, and how often the ring has been round.
template <int kSlots>
struct Turn {
  int slot = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void next() {
    if (++slot == kSlots) slot = 0, phase ^= 1;
  }
};

// Where a strip's first pixel of y lies; image `batch`, of which TMA brings zeros, where there is no such strip.
struct Strip {
  int image, row, column;
  __device__ __forceinline__ Strip(const FusedParams& p, int index) {
    const int column_index = index / p.plan.strip_rows;
    row = (index - column_index * p.plan.strip_rows) * kStripRows;
    image = column_index / p.plan.strip_columns;
    column = (column_index - image * p.plan.strip_columns) * kStripColumns;
    if (index >= p.plan.strips) image = p.batch;
  }
};

// One warp: lane l loads strip l's pixels, lane 0 the filters.
struct FusedProducer {
  const FusedParams& p;
  const CUtensorMap &first_map, &second_map, &filter_map;  // of x's columns: those that a strip begins with, and those between
  char* smem;
  const FusedBarriers& bar;
  int lane;

  __device__ __forceinline__ void load_data(const Strip& strip, int slice, Turn<kDataSlots>& turn) const {
    TransactionBarrier* full = bar.data + turn.slot;
    bar.data_free[turn.slot].wait(turn.phase ^ 1);
    if (lane == 0) full->arrive_and_expect_tx(kStrips * 2 * kPatchBytes);
    __syncwarp();
    if (lane < kStrips) {
      char* to = smem + kDataOffset + turn.slot * kDataBytes + lane * kStripBytes;
      const int half = strip.column / 2, row = strip.row - p.padding;
      tma_load_4d(&first_map, full, to, slice * kDepth, half - (p.padding + 1) / 2, row, strip.image);
      tma_load_4d(&second_map, full, to + kParityBytes, slice * kDepth, half - p.padding / 2, row, strip.image);
    }
    turn.next();
  }

  __device__ __forceinline__ void load_filters(int filter, int slice, Turn<kFilterSlots>& turn) const {
    if (lane == 0) {
      TransactionBarrier* full = bar.filters + turn.slot;
      bar.filters_free[turn.slot].wait(turn.phase ^ 1);
      full->arrive_and_expect_tx(kFilterBytes);
      cute::SM90_TMA_LOAD_5D::copy(&filter_map, barrier_pointer(full), kEvictLast, smem + turn.slot * kFilterBytes, slice * kDepth, 0, filter / 8, 0, 0);
    }
    turn.next();
  }

  __device__ __forceinline__ void run(int filter, int first, int step) const {
    Turn<kDataSlots> data;
    Turn<kFilterSlots> filters;
#pragma unroll 1
    for (int block = first; block < p.plan.blocks; block += step) {
      const Strip strip(p, block * kStrips + lane % kStrips);
#pragma unroll 1
      for (int slice = 0; slice < p.plan.slices; ++slice) {
        if (!p.plan.resident() || block == first) load_filters(filter, slice, filters);
        load_data(strip, slice, data);
      }
    }
  }
};

template <class Element>
struct FusedConsumer {
  using Sums = float[2][4][kFilters / 2];     // [column of points][row of points]
  using Fragments = uint32_t[2][4][4];        // likewise; as wgmma takes its left operand
  using Columns = uint32_t[2][kPatchRows][2];  // d B: [column of points][row of x][8 channels]
  const FusedParams& p;
  const FusedBarriers& bar;
  char* smem;
  int warpgroup, warp, lane;
  uint32_t sign;           // of Z in the second column of points: 1 or -1, packed
  uint32_t offset[3][3];   // of this lane's row for ldmatrix in a slot of x: [X, Z, Y][rows 2 i and 2 i + 1]
  Turn<kDataSlots> data;
  Turn<kFilterSlots> filters;
  int held;                // slot of the filters of the slice before, whose products may be under way; -1: none

  __device__ __forceinline__ FusedConsumer(const FusedParams& p_, const FusedBarriers& bar_, char* smem_, int warp_, int lane_)
      : p(p_), bar(bar_), smem(smem_), warpgroup(warp_ / 4), warp(warp_ % 4), lane(lane_), held(-1) {
    sign = pack2<Element>(warpgroup == 0 ? 1.f : -1.f, warpgroup == 0 ? 1.f : -1.f);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      // Lanes 8 m to 8 m + 7 give the rows of matrix m: chunk m % 2 of row m / 2 of x.
      const int column = i == 0 ? 3 * warpgroup : i == 1 ? 2 - warpgroup : 1 + warpgroup;  // of a tile's four: X, Z, Y
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        const int pixel = (2 * j + lane / 16) * kPatchPitch + lane % 8 + column / 2;
        offset[i][j] = warp * kStripBytes + column % 2 * kParityBytes + swizzle<kPixelBytes>(pixel * kPixelBytes + lane / 8 % 2 * 16);
      }
    }
  }

  // 16 channels, the `half`th of the slice in the slot at `base`: columns transformed.
  __device__ __forceinline__ void read_columns(Columns& c, uint32_t base, int half) const {
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      uint32_t x[4], y[4], z[4];  // [row][8 channels]
      ldmatrix_x4(x, base + (offset[0][j] ^ half * 32));
      ldmatrix_x4(z, base + (offset[1][j] ^ half * 32));
      ldmatrix_x4(y, base + (offset[2][j] ^ half * 32));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        c[0][2 * j + i / 2][i % 2] = pair_subtract<Element>(x[i], z[i]);
        c[1][2 * j + i / 2][i % 2] = pair_fma<Element>(z[i], sign, y[i]);
      }
    }
  }

  // Rows transformed: the four points of a column, of a tile (rows 0 to 3 of x) and of the one below it (2 to 5).
  __device__ __forceinline__ void transform_rows(uint32_t (&v)[4][4], const uint32_t (&c)[kPatchRows][2]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int first = i % 2 * 2, chunk = i / 2;
      const uint32_t d0 = c[first][chunk], d1 = c[first + 1][chunk], d2 = c[first + 2][chunk], d3 = c[first + 3][chunk];
      v[0][i] = pair_subtract<Element>(d0, d2), v[1][i] = pair_add<Element>(d1, d2);
      v[2][i] = pair_subtract<Element>(d2, d1), v[3][i] = pair_subtract<Element>(d3, d1);
    }
  }

  // The point (i, column) of the columns of points that this warpgroup has.
  __device__ __forceinline__ int point(int i, int column) const { return 4 * i + (warpgroup == 0 ? column : 3 - column); }

  __device__ __forceinline__ void release_filters() {
    if (held >= 0 && lane == 0) bar.filters_free[held].arrive();
    held = -1;
  }

  // A slice; its products may be under way afterwards.
  __device__ __forceinline__ void multiply_slice(Sums& sums, Fragments& v, bool accumulate) {
    const uint32_t base = smem_address(smem) + kDataOffset + data.slot * kDataBytes;
    const uint64_t weights = matrix_descriptor<kPixelBytes>(smem_address(smem) + filters.slot * kFilterBytes);
    bar.data[data.slot].wait(data.phase);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Columns c;
      read_columns(c, base, half);
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        cute::warpgroup_wait<1>();  // the products that read these fragments before
        if (half == 0 && column == 1) release_filters();
        transform_rows(v[column], c[column]);
        if (half == 0 && column == 0) bar.filters[filters.slot].wait(filters.phase);
        fence_operands(v[column][0]), fence_operands(v[column][1]), fence_operands(v[column][2]), fence_operands(v[column][3]);
        cute::warpgroup_arrive();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          wgmma_rs<Element, kFilters>(sums[column][i], v[column][i], weights + point(i, column) * (kPointBytes >> 4) + half * 2, accumulate || half > 0);
        }
        cute::warpgroup_commit_batch();
      }
    }
    if (lane == 0) bar.data_free[data.slot].arrive();
    data.next();
    if (!p.plan.resident()) held = filters.slot;
    filters.next();
  }

  // Which activation is asked once for all of them.
  __device__ __forceinline__ void activate(float (&v)[2][8]) const {
    const auto each = [&](auto function) {
#pragma unroll
      for (int i = 0; i < 16; ++i) v[i / 8][i % 8] = function(v[i / 8][i % 8]);
    };
    if (p.activation == Activation::kRelu) each([](float x) { return relu(x); });
    if (p.activation == Activation::kSilu) each([](float x) { return silu(x); });
    if (p.activation == Activation::kGelu) each([](float x) { return gelu(x); });
  }

  // This thread has 8 neighbouring filters of a column of y in two tiles.
  __device__ __forceinline__ void store(const Sums& sums, const Strip& strip, int first_filter) const {
    const int filter = first_filter + lane % 4 * 8, w = strip.column + lane / 4 * 2 + warpgroup;
    const bool exists = strip.image < p.batch && w < p.out_width && filter < p.outputs;
    float bias[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) bias[i] = p.bias == nullptr || !exists ? 0.f : __ldg(p.bias + filter + i);
    const float factor = warpgroup == 0 ? 1.f : -1.f;
    float4* const exchange = reinterpret_cast<float4*>(smem + kExchangeOffset);
    float4* const mine = exchange + warpgroup * 128 + warp * 32 + lane;
    const float4* const theirs = exchange + (1 - warpgroup) * 128 + warp * 32 + lane;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float result[2][8];
#pragma unroll
      for (int block = 0; block < 4; ++block) {
        float kept[4], given[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const auto inverse = [&](int column) {
            const int at = 4 * block + i;
            const float m0 = sums[column][0][at], m1 = sums[column][1][at], m2 = sums[column][2][at], m3 = sums[column][3][at];
            return row == 0 ? m0 + m1 + m2 : m1 - m2 + m3;
          };
          given[i] = inverse(1), kept[i] = fmaf(factor, given[i], inverse(0));
        }
        const int round = block % 2 * 128 * kWarpgroups;
        mine[round] = make_float4(given[0], given[1], given[2], given[3]);
        patch::team_barrier(1 + warp, 64);
        const float4 taken = theirs[round];
        result[0][2 * block] = kept[0] + taken.x + bias[2 * block], result[0][2 * block + 1] = kept[1] + taken.y + bias[2 * block + 1];
        result[1][2 * block] = kept[2] + taken.z + bias[2 * block], result[1][2 * block + 1] = kept[3] + taken.w + bias[2 * block + 1];
      }
      activate(result);
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const int h = strip.row + 2 * tile + row;
        if (!exists || h >= p.out_height) continue;
        uint32_t v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = pack2<Element>(result[tile][2 * i], result[tile][2 * i + 1]);
        Element* const to = static_cast<Element*>(p.y) + ((strip.image * p.out_height + h) * p.out_width + w) * p.outputs + filter;
        *reinterpret_cast<uint4*>(to) = make_uint4(v[0], v[1], v[2], v[3]);
      }
    }
  }

  __device__ __forceinline__ void run(int first_filter, int first, int step) {
#pragma unroll 1
    for (int block = first; block < p.plan.blocks; block += step) {
      Sums sums;
      Fragments v;
      if (p.plan.resident()) filters = {};
#pragma unroll 1
      for (int slice = 0; slice < p.plan.slices; ++slice) multiply_slice(sums, v, slice > 0);
      cute::warpgroup_wait<0>();
#pragma unroll
      for (int i = 0; i < 8; ++i) fence_operands(sums[i / 4][i % 4]);
      release_filters();
      store(sums, Strip(p, block * kStrips + warp), first_filter);
    }
  }
};

template <class Element>
__global__ void __launch_bounds__(kThreads, 1)
    fused_fwd_sm90(const __grid_constant__ FusedParams p, const __grid_constant__ CUtensorMap first_map, const __grid_constant__ CUtensorMap second_map,
                   const __grid_constant__ CUtensorMap filter_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char smem[];
  char* const base = reinterpret_cast<char*>(smem);
  const FusedBarriers bar(base + kBarrierOffset);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int filter = blockIdx.x % p.plan.groups * kFilters, first = blockIdx.x / p.plan.groups, step = gridDim.x / p.plan.groups;
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&first_map, &second_map, &filter_map}) {
      cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(map));
    }
    for (int i = 0; i < kDataSlots; ++i) bar.data[i].init(1), bar.data_free[i].init(4 * kWarpgroups);
    for (int i = 0; i < kFilterSlots; ++i) bar.filters[i].init(1), bar.filters_free[i].init(4 * kWarpgroups);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  wait_for_previous_launch();
  allow_next_launch();
  if (warp >= 4 * kWarpgroups) {
    cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
    if (warp == 4 * kWarpgroups) FusedProducer{p, first_map, second_map, filter_map, base, bar, lane}.run(filter, first, step);
  } else {
    cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
    FusedConsumer<Element>(p, bar, base, warp, lane).run(filter, first, step);
  }
#endif
}

}  // namespace convfirst::winograd::sm90
