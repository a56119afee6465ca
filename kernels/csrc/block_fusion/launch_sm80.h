// Host face of the portable kernels: what an instantiation file defines and variants_sm80.cpp calls. No CUDA types.
#pragma once

#include "tile_sm80.h"

namespace convfirst::block_fusion::sm80 {

struct LinearParams {
  const void* a;       // [rows, depth]
  const void* weight;  // [columns, depth]
  const float* bias;   // [columns] or nullptr; of the expansion
  void* output;        // [rows, columns]
  int rows, columns, depth;
  int activation;      // of the expansion
  Tensors t;           // of the projection's epilogue
  int image_pixels;
  int grid = 0;        // blocks of the persistent kernel
};

// Tile shapes of the split path's linear layers.
struct LinearTile {
  int m, n, warps_m, warps_n, stages, min_blocks;
  static constexpr int depth = 64;

  CONVFIRST_HOST_DEVICE constexpr int threads() const { return 32 * warps_m * warps_n; }
  CONVFIRST_HOST_DEVICE constexpr int stage_bytes() const { return (m + n) * row_bytes(depth); }
  // The projection's vectors follow the ring, whose place the result takes.
  CONVFIRST_HOST_DEVICE constexpr int vectors_offset() const {
    const int ring = stages * stage_bytes(), result = warps_n * m * row_bytes(n / warps_n);
    return ring > result ? ring : result;
  }
  CONVFIRST_HOST_DEVICE constexpr int shared_bytes() const { return vectors_offset() + 8 * n; }
};

constexpr int kLinearTiles = 2;

CONVFIRST_HOST_DEVICE constexpr LinearTile linear_tile(int index) {
  switch (index) {
    case 0: return {128, 128, 2, 2, 3, 2};
    default: return {96, 128, 2, 2, 3, 2};  // fits the 99 KB of sm_86 and sm_89
  }
}

// A row of x of the projection's result, of n8 blocks: padded where a lane reads 16 bytes; where it reads 8 the four rows of half a warp lie in
// different banks as they are.
CONVFIRST_HOST_DEVICE constexpr int result_pitch(int column_blocks) {
  return column_blocks % 4 == 0 ? row_bytes(column_blocks * 8) : column_blocks * 16;
}

// Tile shapes of the persistent linear layers: one block a multiprocessor. By count (NOTES.md) warp tiles of 96 x 64 read shared
// memory for 40 clocks while mma.sync takes 75.
struct PersistentTile {
  int m, n, warps_m, warps_n;
  int warps_k;  // groups of warps that share a slice's k
  int stages;
  static constexpr int depth = 64;

  CONVFIRST_HOST_DEVICE constexpr int warps() const { return warps_m * warps_n * warps_k; }
  CONVFIRST_HOST_DEVICE constexpr int threads() const { return 32 * warps(); }
  CONVFIRST_HOST_DEVICE constexpr int warp_k(int warp) const { return warp / (warps_m * warps_n); }
  CONVFIRST_HOST_DEVICE constexpr int warp_m(int warp) const { return warp / warps_n % warps_m; }
  CONVFIRST_HOST_DEVICE constexpr int warp_n(int warp) const { return warp % warps_n; }
  CONVFIRST_HOST_DEVICE constexpr int row_blocks() const { return m / warps_m / 16; }    // m16, a warp
  CONVFIRST_HOST_DEVICE constexpr int column_blocks() const { return n / warps_n / 8; }  // n8, a warp
  CONVFIRST_HOST_DEVICE constexpr int stage_bytes() const { return (m + n) * depth * 2; }
  CONVFIRST_HOST_DEVICE constexpr int result_offset() const { return stages * stage_bytes(); }
  // Row blocks of x a warp has in shared memory, fetched ahead; the expansion's result goes from registers to device memory.
  static constexpr int x_slots = 3;
  CONVFIRST_HOST_DEVICE constexpr int vectors_offset(bool project) const {
    return result_offset() + (project ? warps() * x_slots : 0) * 16 * result_pitch(column_blocks());
  }
  CONVFIRST_HOST_DEVICE constexpr int shared_bytes(bool project) const { return vectors_offset(project) + 2 * (project ? 2 : 1) * n * 4; }
  // Which products have a kernel: the expansion's of 256 rows and the projection's of 192 x 256 would spill.
  CONVFIRST_HOST_DEVICE constexpr bool serves(bool project) const { return project ? n < 256 : m < 256; }
  // Whether the expansion has kernels whose activation begins under its last slice.
  CONVFIRST_HOST_DEVICE constexpr bool overlaps() const { return warps_k == 1; }
  // Whether a finished tile's activation runs under the next one's products: there are registers for both.
  CONVFIRST_HOST_DEVICE constexpr bool defers() const { return m == 128; }
};

constexpr int kPersistentTiles = 6;

CONVFIRST_HOST_DEVICE constexpr PersistentTile persistent_tile(int index) {
  switch (index) {
    case 0: return {192, 256, 2, 4, 1, 3};
    case 1: return {192, 192, 2, 4, 1, 3};
    case 2: return {192, 128, 2, 2, 2, 4};
    case 3: return {256, 192, 2, 4, 1, 3};
    case 4: return {128, 256, 2, 4, 1, 3};
    default: return {128, 256, 2, 4, 1, 4};
  }
}

// Each returns cudaError_t as int.
template <DType kType, int kWidth, bool kDepthwise>
struct Fused {
  static const void* kernel();
  static int launch(const BlockParams&, int grid, int shared_memory, cudaStream_t);
};

template <DType kType, bool kDepthwise>
struct ConvNorm {
  static const void* kernel();
  static int launch(const BlockParams&, void* output, int grid, int shared_memory, cudaStream_t);
};

template <DType kType, int kTile, bool kProject>
struct Linear {
  static int launch(const LinearParams&, cudaStream_t);
};

template <DType kType, int kTile, bool kProject>
struct PersistentLinear {
  static int launch(const LinearParams&, cudaStream_t);  // of params.grid blocks
};

}  // namespace convfirst::block_fusion::sm80
