// What the chunked backward of the feed-forward half does between its matrix products (convfirst_kernels/feed_forward_backward.py).
#pragma once

#include <cstdint>

#include "params.h"

namespace convfirst::block_fusion {

// Rows of pixels, 16 bit.
struct ChunkRows {
  int64_t rows;
  int columns;  // a multiple of 8
};

// Blocks of rows, each with its own column sums.
int64_t chunk_row_blocks(int64_t rows);

// S and D, [rows, hidden], become h = act(S) and dS = act'(S) * D; sums, [row blocks, hidden], are dS's by block.
int hidden_backward(DType dtype, Activation activation, const ChunkRows& chunk, void* before, void* grad, float* sums, cudaStream_t stream);

// The factor of a row is that of its sample.
struct SampleFactors {
  const float* sample_scale;  // or nullptr: a factor of one
  int64_t image_pixels;
};

// scaled = factor * grad, rounded, not written without factors; its column sums by block, [row blocks, columns].
int scale_rows(DType dtype, const ChunkRows& chunk, const SampleFactors& factors, const void* grad, void* scaled, float* sums,
               cudaStream_t stream);

// da, [rows, columns], becomes unit * rstd * (da - mean(da) - a * mean(da * a)) over columns; without rstd, unit * da.
int norm_backward(DType dtype, int64_t rows, int columns, void* da, const void* a, const float* rstd, const float* unit, cudaStream_t stream);

}  // namespace convfirst::block_fusion
