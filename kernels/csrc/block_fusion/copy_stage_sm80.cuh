// Copies of a block of a matrix, kRows rows of 8 * kChunks elements, from device to shared memory.
#pragma once

#include "../common/ptx.cuh"
#include "tile_sm80.h"

namespace convfirst::block_fusion::sm80 {

// Where a product's column lies among 32, so that a lane, which has two columns of each n8 block, gets eight neighbours.
__device__ __forceinline__ constexpr int place_of(int column) {
  return column / 32 * 32 + column % 8 / 2 * 8 + column % 32 / 8 * 2 + column % 2;
}

// Every thread keeps its place (a column of chunks, every kDown-th row), so a copy costs an addition and a comparison: at two
// warps a scheduler the address arithmetic of a general loop took as long as the products it fed.
//
// kPermuted: a row lies at its place_of.
template <typename T, int kRows, int kChunks, int kThreads, int kPitch, bool kPermuted = false>
struct BlockCopy {
  static constexpr int kPower = kChunks & -kChunks;  // largest power of two that divides kChunks
  static constexpr int kAcross = kPower < 32 ? kPower : 32;
  static constexpr int kDown = kThreads / kAcross;
  static_assert(kThreads % kAcross == 0, "threads tile the block");
  static_assert(!kPermuted || (kRows % 32 == 0 && kDown % 16 == 0), "rows of 32 are permuted");

  const T* source;  // this thread's first element of the first block
  size_t row_step;  // bytes from one of its rows to the next
  uint32_t destination;
  int row, column;  // of that element

  // `leading`: elements from one row of the matrix to the next; (first_row, 0) is the block's corner.
  __device__ __forceinline__ BlockCopy(const void* matrix, int first_row, int leading, int thread = threadIdx.x) {
    row = thread / kAcross;
    column = thread % kAcross * 8;
    source = static_cast<const T*>(matrix) + static_cast<size_t>(first_row + row) * leading + column;
    row_step = static_cast<size_t>(leading) * kDown * sizeof(T);
    destination = (kPermuted ? place_of(row) : row) * kPitch + column * 2;
  }

  // Copies the block `offset` elements on, of which `rows` rows and `columns` columns exist; the rest becomes zero.
  __device__ __forceinline__ void operator()(uint32_t to, size_t offset, int rows, int columns) const {
    const char* from = reinterpret_cast<const char*>(source + offset);
#pragma unroll
    for (int r = 0; r < (kRows + kDown - 1) / kDown; ++r) {
      if (kRows % kDown != 0 && row + r * kDown >= kRows) break;
      const int down = kPermuted && kDown == 16 ? place_of(r % 2 * 16) + r / 2 * 32 : r * kDown;
#pragma unroll
      for (int c = 0; c < kChunks / kAcross; ++c)
        ptx::cp_async16(to + destination + down * kPitch + c * kAcross * 16, from + c * kAcross * 16,
                        row + r * kDown < rows && column + c * kAcross * 8 < columns);
      from += row_step;
    }
  }
};

}  // namespace convfirst::block_fusion::sm80
