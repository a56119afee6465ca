// The weight gradient of first layers (RGB) on Hopper: dw[k, (r, s, c)] = sum over output pixels of dy[pixel, k] x[pixel's window, (r, s, c)].
//
//          64 pixels of an output row      rows of the filter x a chunk (two pixels of 4 values)
//        +--------+                       +-------------------+   warpgroup 0: chunks 0, 1, 2 of a window's row
//  dy^T  | 64     |   x, rearranged as    |  64 filters x     |
//        | filters|   the forward pass    |  12 rows x 8, six |   warpgroup 1: chunks 3, 4, 5
//        +--------+   does it  -------->  |  times            |
//                                         +-------------------+   (of the block's section of six)
//
//   The windows of neighbouring output pixels lie 16 bytes apart (first_layer_sm90_wgmma.cuh), so 8 pixels of a chunk are one 128-byte core
//   matrix; it is read with the pixels along the depth, the rows of x a stride apart along the columns. One block = a producer warp +
//   2 consumer warpgroups, with an even share of all output rows; its sums of 64 filters' values in six chunks stay in registers to the end.
//
//   what               where                                       written by              released when
//   x, rearranged      global, workspace                           the first launch        -
//   dy, x slices       shared, ring of slots of an output row      producer (TMA)          products done, per warp
//   sums               registers, 3 x 48 a thread                  wgmma                   -
//   partial sums       global, workspace, float32                  consumer                the third launch
//   dw                 global                                      the third launch        -
//
//   The third launch adds the blocks' sums in the order of the pixels, in eight pieces, so results repeat to the bit.
#pragma once

#include "common/launch.cuh"
#include "common/sm90_mn_major.cuh"
#include "first_layer_sm90_wgmma.cuh"
#include "first_layer_wgrad_sm90.h"
#include "tensor_map_sm90.h"

namespace convfirst::direct::sm90 {

struct FirstWgradParams {
  void* dw;
  const char* rearranged;
  float4* partials;
  FirstLayout layout;
  int filters, channels, kernel_h, kernel_w, stride_h, out_h, padded_rows;
  int strips, steps, sections, sharers, slots, slot_bytes;
};

template <DType kDType>
using FirstWgradElement = std::conditional_t<kDType == DType::kHalf, __half, __nv_bfloat16>;

// A step: 64 output pixels of a row, in the order of images, strips of columns, rows.
struct FirstWgradStep {
  int n, strip, row;
  __device__ __forceinline__ FirstWgradStep(const FirstWgradParams& p, int index) {
    const int image_strip = index / p.out_h;
    row = index - image_strip * p.out_h, n = image_strip / p.strips, strip = image_strip - n * p.strips;
  }
};

__device__ __forceinline__ void produce_first_wgrad(const FirstWgradParams& p, const CUtensorMap& y_map, char* slots, TransactionBarrier* full,
                                                    Barrier* empty, int first_filter, int begin, int end) {
  const int bytes = p.layout.buffer_bytes();
  int slot = 0;
  uint32_t phase = 1;  // the slots start empty
#pragma unroll 1
  for (int i = begin; i < end; ++i) {
    const FirstWgradStep step(p, i);
    const int64_t row = (static_cast<int64_t>(step.n) * p.strips + step.strip) * p.padded_rows + step.row * p.stride_h;
    char* to = slots + slot * p.slot_bytes;
    empty[slot].wait(phase);
    full[slot].arrive_and_expect_tx(kFirstWgradYBytes + bytes);
    cute::SM90_TMA_LOAD_3D::copy(&y_map, barrier_pointer(full + slot), kEvictNormal, to, first_filter, step.strip * 64,
                                 step.n * p.out_h + step.row);
    bulk_load(p.rearranged + row * p.layout.row_bytes(), full + slot, to + kFirstWgradYBytes, bytes);
    if (++slot == p.slots) slot = 0, phase ^= 1;
  }
}

template <DType kDType>
struct FirstWgradConsumer {
  using Element = FirstWgradElement<kDType>;
  using Sums = float[kFirstWgradPositions][kFirstWgradColumns / 2];
  const FirstWgradParams& p;
  uint32_t slots;
  TransactionBarrier* full;
  Barrier* empty;
  int first_chunk, thread;  // of the warpgroup, of the consumers
  int slot = 0, held = -1;
  uint32_t phase = 0;

  __device__ __forceinline__ void release_held() {
    if (held >= 0 && thread % 32 == 0) empty[held].arrive();
    held = -1;
  }

  // Columns: the rows of x, 8 values of a chunk each. Depth: 16 pixels, 16 bytes apart.
  __device__ __forceinline__ uint64_t descriptor(uint32_t address) const {
    return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | (uint64_t(128 >> 4) << 16) | (static_cast<uint64_t>(p.layout.row_bytes() >> 4) << 32);
  }

  __device__ __forceinline__ void step(Sums& sums, bool accumulate) {
    full[slot].wait(phase);
    const uint32_t address = slots + slot * p.slot_bytes;
    const uint64_t a = mn_descriptor<128>(address, 0), b = descriptor(address + kFirstWgradYBytes);
    cute::warpgroup_arrive();
#pragma unroll
    for (int i = 0; i < kFirstWgradPositions; ++i) {
      // Past the window's last chunk: whatever is there, in columns that nobody reads.
      const int chunk = min(first_chunk + i, p.layout.row_chunks - 1), place = chunk / p.layout.planes;
      const uint64_t b_chunk = b + (chunk - place * p.layout.planes) * p.layout.pitch + place;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        wgmma_ss_major<Element, kFirstWgradColumns, Major::MN, Major::MN>(sums[i], a + (k * 16 * 128 >> 4), b_chunk + (k * 16 * 16 >> 4),
                                                                         accumulate || k > 0);
      }
    }
    cute::warpgroup_commit_batch();
    const int issued = slot;
    if (++slot == p.slots) slot = 0, phase ^= 1;
    cute::warpgroup_wait<1>();
    release_held();
    held = issued;
  }

  __device__ __forceinline__ void run(int steps) {
    Sums sums;
#pragma unroll 1
    for (int i = 0; i < steps; ++i) step(sums, i > 0);
    cute::warpgroup_wait<0>();
#pragma unroll
    for (int i = 0; i < kFirstWgradPositions; ++i) fence_operands(sums[i]);
    float4* to = p.partials + static_cast<int64_t>(blockIdx.x) * (kFirstWgradPartialBytes / 16) + thread;
#pragma unroll
    for (int i = 0; i < kFirstWgradPositions; ++i) {
#pragma unroll
      for (int j = 0; j < kFirstWgradRows; ++j, to += 128 * kFirstWgradWarpgroups) {
        __stcg(to, make_float4(sums[i][4 * j], sums[i][4 * j + 1], sums[i][4 * j + 2], sums[i][4 * j + 3]));
      }
    }
  }
};

template <DType kDType>
__global__ void __launch_bounds__(kFirstWgradThreads, 1)
    first_layer_wgrad_sm90(const __grid_constant__ FirstWgradParams p, const __grid_constant__ CUtensorMap y_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char smem[];
  TransactionBarrier* full = reinterpret_cast<TransactionBarrier*>(smem);
  Barrier* empty = reinterpret_cast<Barrier*>(full + kFirstWgradMaxSlots);
  char* slots = smem + kWgradBarrierBytes;
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.slots; ++i) full[i].init(1), empty[i].init(4 * kFirstWgradWarpgroups);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  wait_for_previous_launch();
  allow_next_launch();
  const int group = blockIdx.x / p.sharers, sharer = blockIdx.x - group * p.sharers, section = group % p.sections;
  const int begin = static_cast<int>(wgrad_share(p.steps, p.sharers, sharer)), end = static_cast<int>(wgrad_share(p.steps, p.sharers, sharer + 1));
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<56>();
    if (threadIdx.x == 0) produce_first_wgrad(p, y_map, slots, full, empty, group / p.sections * kFirstWgradFilters, begin, end);
  } else {
    cutlass::arch::warpgroup_reg_alloc<224>();
    const int first_chunk = section * kFirstWgradSection + (warpgroup - 1) * kFirstWgradPositions;
    FirstWgradConsumer<kDType>{p, smem_address(slots), full, empty, first_chunk, static_cast<int>(threadIdx.x) - 128}.run(end - begin);
  }
#endif
}

// Blocks (32 quads, group): eight threads a quad, each with an eighth of the blocks.
template <DType kDType>
__global__ void __launch_bounds__(256) add_first_layer_wgrad_sm90(const __grid_constant__ FirstWgradParams p) {
  using Element = FirstWgradElement<kDType>;
  __shared__ float4 sums[8][32];
  allow_next_launch();
  wait_for_previous_launch();
  constexpr int kQuads = kFirstWgradPartialBytes / 16, kConsumers = 128 * kFirstWgradWarpgroups;
  const int lane = threadIdx.x % 32, eighth = threadIdx.x / 32, index = blockIdx.x * 32 + lane;
  const int begin = p.sharers * eighth / 8, end = p.sharers * (eighth + 1) / 8;
  const float4* parts = p.partials + static_cast<int64_t>(blockIdx.y) * p.sharers * kQuads + index;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
  for (int i = begin; i < end; ++i) {
    const float4 v = __ldcg(parts + static_cast<int64_t>(i) * kQuads);
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  sums[eighth][lane] = sum;
  __syncthreads();
  if (eighth > 0) return;
#pragma unroll
  for (int i = 1; i < 8; ++i) {
    const float4 v = sums[i][lane];
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  const int group = blockIdx.y / p.sections, section = blockIdx.y - group * p.sections, thread = index % kConsumers, quad = index / kConsumers;
  const int chunk = section * kFirstWgradSection + thread / 128 * kFirstWgradPositions + quad / kFirstWgradRows;
  const int r = quad % kFirstWgradRows, k = group * kFirstWgradFilters + thread % 128 / 32 * 16 + thread % 32 / 4;
  const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = chunk * 8 + thread % 4 * 2 + i % 2, s = at / p.layout.pixel_channels, c = at - s * p.layout.pixel_channels, filter = k + i / 2 * 8;
    if (r >= p.kernel_h || s >= p.kernel_w || c >= p.channels || filter >= p.filters || chunk >= p.layout.row_chunks) continue;
    static_cast<Element*>(p.dw)[((static_cast<int64_t>(filter) * p.kernel_h + r) * p.kernel_w + s) * p.channels + c] = static_cast<Element>(values[i]);
  }
}

template <DType kDType>
int launch_first_wgrad_dtype(const Problem& q, const Tensors& t, const FirstWgradPlan& plan, void* workspace, cudaStream_t stream) {
  FirstParams x{};
  x.x = static_cast<const uint16_t*>(t.x), x.layout = plan.layout;
  x.height = q.height, x.width = q.width, x.channels = q.channels, x.stride_w = q.stride_w, x.pad_h = q.pad_h, x.pad_w = q.pad_w;
  x.tiles_q = plan.strips, x.padded_rows = plan.padded_rows, x.rearranged = static_cast<uint4*>(workspace);
  x.chunks = q.batch * plan.strips * plan.padded_rows * (plan.layout.row_bytes() / 16);
  const auto rearrange = q.channels == 3 ? &rearrange_sm90<3> : &rearrange_sm90<0>;
  if (const int error = start_dependent_kernel(rearrange, static_cast<int>((x.chunks + 255) / 256), 256, 0, stream, x)) return error;
  CUtensorMap y_map;
  if (!encode_tiled_map<3>(&y_map, q.dtype, t.y, {q.filters, q.out_w(), q.batch * q.out_h()}, {q.filters, int64_t{q.filters} * q.out_w()},
                           {kFirstWgradFilters, 64, 1}, CU_TENSOR_MAP_SWIZZLE_128B)) {
    return cudaErrorInvalidValue;
  }
  FirstWgradParams p{};
  p.dw = t.result, p.rearranged = static_cast<const char*>(workspace);
  p.partials = reinterpret_cast<float4*>(static_cast<char*>(workspace) + plan.rearranged), p.layout = plan.layout;
  p.filters = q.filters, p.channels = q.channels, p.kernel_h = q.kernel_h, p.kernel_w = q.kernel_w, p.stride_h = q.stride_h, p.out_h = q.out_h();
  p.padded_rows = plan.padded_rows, p.strips = plan.strips, p.steps = plan.steps, p.sections = plan.sections, p.sharers = plan.sharers;
  p.slots = plan.slots, p.slot_bytes = plan.slot_bytes;
  if (const int error = start_dependent_kernel(&first_layer_wgrad_sm90<kDType>, plan.groups * plan.sharers, kFirstWgradThreads, plan.shared_memory,
                                               stream, p, y_map)) {
    return error;
  }
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kFirstWgradPartialBytes / 16 / 32, plan.groups), config.blockDim = 256;
  config.stream = stream, config.attrs = &overlap, config.numAttrs = 1;
  return static_cast<int>(cudaLaunchKernelEx(&config, &add_first_layer_wgrad_sm90<kDType>, p));
}

}  // namespace convfirst::direct::sm90
