// The products of the split path: for each transform point, out[tile][k] = sum over c of v[tile][c] u[k][c], in float32 on CUDA cores.
//
//            k: kColumns of a block                a warp: 32 tiles x 64 outputs, a lane 8 x 8:
//          +-----------+-----------+                  tiles   lane_m + 4 i            (4 lanes_m)
//   tiles: |  warp 0   |  warp 1   |                  outputs 4 lane_n + j % 4 + 32 (j / 4)   (8 lanes_n)
//   kRows  +-----------+-----------+
//          |  warp 2   |  warp 3   |               lane = lane_n bit 0, lane_m bit 0, lane_n bits 1-2, lane_m bit 1: so
//          +-----------+-----------+               neighbours share addresses and a 128-bit load takes two wavefronts.
//
// | what                        | where                                                                              |
// | --- | --- |
// | v, u                        | device memory [point][row][channel], channels contiguous, padded with zeros        |
// | a slice of 16 channels      | shared memory [row][16], kStages of them in flight by cp.async, 16-byte chunk c of  |
// |                             | row r at c ^ (r / 2 % 4); u's rows permuted so that lanes read neighbouring rows     |
// | factors, 4 channels at once | registers: 8 x 4 of v and those of the next 4 channels, 4 of u                         |
// | sums                        | registers, 64 a lane                                                               |
// | out                         | device memory [split][point][tile][output], 16 bytes a lane                         |
#pragma once

#include "winograd/transform_stage_sm80.cuh"

namespace convfirst::winograd::sm80 {

struct ProductParams {
  const float *v, *u;  // in 16 bits two channels a word
  float* out;
  int row_blocks, column_blocks, points;
  int steps, steps_of_split;  // slices of channels: in all, of a split
  int64_t v_point, u_point, out_point, out_split;  // strides, words of 4 bytes
  int pitch, out_pitch;                            // of a row of v and u, and of out
  // Slices summed in registers before they are added to out, less one: a power of two less one, since no register is left for a counter.
  // Sums in blocks have smaller errors.
  int block_mask;
};

template <int kBlockRows, int kBlockColumns, int kThreadsPerMultiprocessor>
struct ProductTile {
  static constexpr int kRows = kBlockRows, kColumns = kBlockColumns;
  static constexpr int kThreads = kRows * kColumns / 64;
  static constexpr int kStages = 4;
  static constexpr int kStageFloats = (kRows + kColumns) * kSlice;
  static constexpr int kSharedBytes = kStages * kStageFloats * 4;
  static constexpr int kBlocksPerMultiprocessor = kThreadsPerMultiprocessor / kThreads;
};

__device__ __forceinline__ int chunk_address(int row, int chunk) {
  return row * kSlice + (chunk ^ (row / 2 % 4)) * 4;
}

// The row of u that lies at `place`: lanes read neighbouring places.
__device__ __forceinline__ int row_at(int place) { return place / 32 * 32 + place % 8 * 4 + place % 32 / 8; }

// A slice of kCount rows to shared memory; `to` and `from` are the thread's own first chunk.
template <int kCount, int kThreads, bool kPermuted>
__device__ __forceinline__ void copy_slice(uint32_t to, const float* from, int pitch) {
  static_assert(kCount * 4 % kThreads == 0 && kThreads % 32 == 0);
#pragma unroll
  for (int i = 0; i < kCount * 4 / kThreads; ++i) {
    const int places = i * (kThreads / 4), rows = kPermuted ? places / 32 * 32 + places % 32 / 8 : places;
    ptx::cp_async16(to + places * kSlice * 4, from + rows * pitch, true);
  }
}

__device__ __forceinline__ float4 read4(const float* from) { return *reinterpret_cast<const float4*>(from); }

// Rows of v, four channels at once; row 4 i at `even` or `odd`, whose swizzles differ.
__device__ __forceinline__ void read_rows(float4 (&a)[8], const float* even, const float* odd) {
#pragma unroll
  for (int i = 0; i < 8; ++i) a[i] = read4((i % 2 == 0 ? even : odd) + 4 * i * kSlice);
}

// sums += a u^T over four channels.
__device__ __forceinline__ void multiply_chunk(float (&sums)[8][8], const float4 (&a)[8], const float* u) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float4 b = read4(u + 8 * j * kSlice);
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i][j] = fmaf(a[i].x, b.x, sums[i][j]);
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i][j] = fmaf(a[i].y, b.y, sums[i][j]);
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i][j] = fmaf(a[i].z, b.z, sums[i][j]);
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i][j] = fmaf(a[i].w, b.w, sums[i][j]);
  }
}

// Which products a block computes.
struct BlockPlace {
  int64_t row;
  int column, point, split;
  int first, steps;  // slices of the split
};

template <typename Tile>
__device__ __forceinline__ BlockPlace block_place(const ProductParams& p) {
  int block = blockIdx.x;
  asm volatile("" : "+r"(block));  // what follows is computed where it is asked for, not kept
  BlockPlace at;
  at.column = block % p.column_blocks * Tile::kColumns;
  block /= p.column_blocks;
  at.row = int64_t{block % p.row_blocks} * Tile::kRows;
  block /= p.row_blocks;
  at.point = block % p.points, at.split = block / p.points;
  at.first = at.split * p.steps_of_split, at.steps = min(p.steps_of_split, p.steps - at.first);
  return at;
}

// A thread's part of the copies of a block's slices, in order.
template <typename Tile, bool kPermuted = false>
struct SliceCopy {
  const float *v, *u;
  uint32_t to;
  int pitch, steps;

  __device__ __forceinline__ SliceCopy(const ProductParams& p, const BlockPlace& at, uint32_t stages) : pitch(p.pitch), steps(at.steps) {
    const int place = threadIdx.x / 4, chunk = threadIdx.x % 4;
    v = p.v + at.point * p.v_point + (at.row + place) * pitch + at.first * kSlice + chunk * 4;
    u = p.u + at.point * p.u_point + int64_t{at.column + (kPermuted ? row_at(place) : place)} * pitch + at.first * kSlice + chunk * 4;
    to = stages + chunk_address(place, chunk) * 4;
  }

  // Slice `step` to its slot, as a group of its own; past the last one an empty group.
  __device__ __forceinline__ void start(int step) {
    if (step < steps) {
      const uint32_t slot = to + step % Tile::kStages * Tile::kStageFloats * 4;
      copy_slice<Tile::kRows, Tile::kThreads, false>(slot, v, pitch);
      copy_slice<Tile::kColumns, Tile::kThreads, kPermuted>(slot + Tile::kRows * kSlice * 4, u, pitch);
      v += kSlice, u += kSlice;
    }
    ptx::cp_async_commit();
  }
};

// A lane's first element of out. Computed anew, so that the loop over channels has nothing of it in registers.
template <typename Tile>
__device__ __forceinline__ float* out_of_lane(const ProductParams& p) {
  int thread = threadIdx.x;
  asm volatile("" : "+r"(thread));
  const BlockPlace at = block_place<Tile>(p);
  const int warp = thread / 32, lane = thread % 32, lane_n = lane % 2 + lane / 4 % 4 * 2, lane_m = lane / 2 % 2 + lane / 16 * 2;
  const int row = warp / (Tile::kColumns / 64) * 32 + lane_m, column = warp % (Tile::kColumns / 64) * 64 + 4 * lane_n;
  return p.out + at.split * p.out_split + at.point * p.out_point + (at.row + row) * p.out_pitch + at.column + column;
}

// A lane's sums to its part of out, added to what earlier blocks of channels left there.
__device__ __forceinline__ void add_to_out(float (&sums)[8][8], float* out, int pitch, bool first) {
#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float4* const to = reinterpret_cast<float4*>(out + int64_t{4 * i} * pitch + 32 * h);
      float4 sum = make_float4(sums[i][4 * h], sums[i][4 * h + 1], sums[i][4 * h + 2], sums[i][4 * h + 3]);
      if (!first) {
        const float4 before = *to;
        sum.x += before.x, sum.y += before.y, sum.z += before.z, sum.w += before.w;
      }
      *to = sum;
    }
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerMultiprocessor) products_fwd_sm80(const ProductParams p) {
  extern __shared__ __align__(128) unsigned char smem[];
  const float* const stages = reinterpret_cast<const float*>(smem);
  const BlockPlace at = block_place<Tile>(p);
  SliceCopy<Tile, true> copy(p, at, ptx::smem_address(smem));
#pragma unroll
  for (int step = 0; step < Tile::kStages - 1; ++step) copy.start(step);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int lane_n = lane % 2 + lane / 4 % 4 * 2, lane_m = lane / 2 % 2 + lane / 16 * 2;
  const int warp_column = warp % (Tile::kColumns / 64) * 64, warp_row = warp / (Tile::kColumns / 64) * 32;
  int v_place[kSlice / 4], u_place[kSlice / 4];  // of this lane's first rows, by chunk
#pragma unroll
  for (int chunk = 0; chunk < kSlice / 4; ++chunk) {
    v_place[chunk] = chunk_address(warp_row + lane_m, chunk);
    u_place[chunk] = chunk_address(Tile::kRows + warp_column + lane_n, chunk);
  }
  float sums[8][8] = {};
  float4 a[2][8];
  ptx::cp_async_wait<Tile::kStages - 2>();
  __syncthreads();
  read_rows(a[0], stages + v_place[0], stages + v_place[2]);
  for (int step = 0; step < at.steps; ++step) {
    const float* stage = stages + step % Tile::kStages * Tile::kStageFloats;
#pragma unroll
    for (int chunk = 0; chunk < kSlice / 4; ++chunk) {
      if (chunk + 1 < kSlice / 4) {
        read_rows(a[(chunk + 1) % 2], stage + v_place[chunk + 1], stage + v_place[(chunk + 1) ^ 2]);
      } else {
        ptx::cp_async_wait<Tile::kStages - 3>();
        __syncthreads();  // the next slice is there, and everyone has left the one before this, whose slot is filled now
        copy.start(step + Tile::kStages - 1);
        const float* next = stages + (step + 1) % Tile::kStages * Tile::kStageFloats;
        read_rows(a[0], next + v_place[0], next + v_place[2]);
      }
      multiply_chunk(sums, a[chunk % 2], stage + u_place[chunk]);
    }
    if (((step + 1) & p.block_mask) == 0 && step + 1 < at.steps) {
      add_to_out(sums, out_of_lane<Tile>(p), p.out_pitch, step == p.block_mask);
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[i][j] = 0.f;
    }
  }
  add_to_out(sums, out_of_lane<Tile>(p), p.out_pitch, at.steps - 1 <= p.block_mask);
}

}  // namespace convfirst::winograd::sm80
