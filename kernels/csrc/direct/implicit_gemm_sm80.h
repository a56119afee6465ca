// Host face of the portable implicit matrix product: result[rows, columns] = sum over the depth of A[row, d] B[column, d].
// No CUDA types beyond the stream; sizes are written here and nowhere else.
#pragma once

#include <algorithm>
#include <cstdint>

#include "params.h"

namespace convfirst::direct::sm80 {

constexpr int kRows = 128, kColumns = 128;
constexpr int kDepthBytes = 64;                 // of a step: 16 floats or 32 halves
constexpr int kPitch = kDepthBytes + 16;        // bytes; eight rows lie in different banks
constexpr int kStageBytes = (kRows + kColumns) * kPitch;
constexpr int kStages = 3;
constexpr int kThreads = 256;
constexpr int kSums = kRows * kColumns / kThreads;  // a thread
constexpr int kSharedBytes = kStages * kStageBytes;
constexpr int kPartialBytes = kRows * kColumns * 4;

// Where the operands come from.
//   kPixels:  A[pixel, (r, s, c)] = source at row (oh mul + off + r step) / div, likewise for columns; zero outside or where the
//             division leaves a remainder. B[column, depth] lies dense. Forward and input gradient.
//   kFilters: A[k, pixel] = y[pixel, k], B[(r, s, c), pixel] = x at the pixel's window. Weight gradient.
enum class Operands : int { kPixels = 0, kFilters = 1 };

struct GemmParams {
  Operands operands;
  const void* source;  // [images, height, width, channels]
  const void* matrix;  // B of kPixels, y of kFilters
  const float* bias;   // [columns] or nullptr
  void* result;        // [rows, columns]
  float* partials;     // two tiles a block
  int64_t rows;
  int columns, depth;  // depth in elements; of kFilters the pixels
  int steps;           // of a tile
  int block_steps;     // of float32 that are summed in registers before they are added to the partial sums; 0: all
  int tiles_n;
  int64_t units;       // steps of all tiles
  int height, width, channels;
  int grid_h, grid_w;  // pixels that kPixels' rows or kFilters' depth run over
  int kernel_w;
  int mul_h, mul_w, off_h, off_w, step_h, step_w, div_h, div_w;
  Activation activation;
};

// Blocks take equal shares of all steps: a share may begin and end within a tile, and a second launch adds up what was split.
constexpr int64_t share_begin(int64_t units, int blocks, int64_t block) { return units * block / blocks; }

// Chunks of 16 bytes lie within a tap: kVector, and kVectorDivide where the source's positions have a divisor. Else kScalar.
enum class Copying : int { kVector = 0, kVectorDivide = 1, kScalar = 2 };

template <DType kDType, Copying kCopying>
struct Gemm {
  static int launch(const GemmParams&, int blocks, cudaStream_t);  // cudaError_t
  static const void* kernel();
};

// w[k, r, s, c] -> result[c, r, s, k]. Returns cudaError_t as int.
int transpose_all_filters(const Problem&, const void* w, void* result, cudaStream_t);

}  // namespace convfirst::direct::sm80
