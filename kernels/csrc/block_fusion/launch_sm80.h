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

}  // namespace convfirst::block_fusion::sm80
