// What the chunked backward of the feed-forward half does between its matrix products (convfirst_kernels/feed_forward_backward.py).
#pragma once

#include <cstdint>

#include "params.h"

namespace convfirst::block_fusion {

// Rows of the images' pixels, 16 bit; a row's factor is that of its sample, sample_scale[(first + row) / image_pixels].
struct ChunkRows {
  int64_t rows, first, image_pixels;
  int columns;                // a multiple of 8
  const float* sample_scale;  // or nullptr: a factor of one
};

// Blocks of rows, each with its own column sums.
int64_t chunk_row_blocks(int64_t rows);

// S and D, [rows, hidden], become h = factor * act(S) and dS = factor * act'(S) * D; sums, [row blocks, hidden], are dS's by block.
int hidden_backward(DType dtype, Activation activation, const ChunkRows& chunk, void* before, void* grad, float* sums, cudaStream_t stream);

// Column sums of factor * grad by block, [row blocks, columns].
int column_sums(DType dtype, const ChunkRows& chunk, const void* grad, float* sums, cudaStream_t stream);

// da, [rows, columns], becomes unit * rstd * (da - mean(da) - a * mean(da * a)) over columns; without rstd, unit * da.
int norm_backward(DType dtype, int64_t rows, int columns, void* da, const void* a, const float* rstd, const float* unit, cudaStream_t stream);

}  // namespace convfirst::block_fusion
