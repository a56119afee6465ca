// Launches of the split path and of the filter transform.
#pragma once

#include "common/launch.cuh"
#include "winograd/products_mma_fwd_sm80.cuh"
#include "winograd/transform_sm80.cuh"

namespace convfirst::winograd::sm80 {

template <int M, typename T>
int filter_transform(const FilterView& view, void* filter, cudaStream_t stream) {
  const int outputs = static_cast<int>(round_up(view.outputs, kOutputGrain));
  const int channels = static_cast<int>(round_up(view.channels, kSlice * 4 / sizeof(T)));
  return start_kernel(filter_transform_sm80<M, T>, transform_blocks(int64_t{outputs} * channels), kTransformThreads, 0, stream, view,
                      static_cast<T*>(filter), outputs, channels);
}

// A chunk of tiles, rounded up to whole blocks, and strides of the workspace that holds it.
struct Chunk {
  int64_t first;
  int tiles, rows;
  int64_t v_point, out_point, out_split;
};

template <int M, typename T, int kCount>
int input_transform(const Problem& p, const Tensors& t, T* v, const Chunk& chunk, cudaStream_t stream) {
  return start_kernel(input_transform_sm80<M, T, kCount>, transform_blocks(int64_t{chunk.rows} * (p.channel_pitch() / kCount)),
                      kTransformThreads, 0, stream, p, static_cast<const T*>(t.x), v, chunk.first, chunk.tiles, chunk.rows,
                      p.channel_pitch(), chunk.v_point);
}

template <int M, typename T, int kCount>
int output_transform(const Problem& p, const Tensors& t, const float* products, const Chunk& chunk, int splits, cudaStream_t stream) {
  return start_kernel(output_transform_sm80<M, T, kCount>, transform_blocks(int64_t{chunk.tiles} * (p.outputs / kCount)), kTransformThreads,
                      0, stream, p, products, t.bias, static_cast<T*>(t.y), chunk.first, chunk.tiles, splits, chunk.out_point,
                      chunk.out_split);
}

template <typename T, typename Tile>
int products(const Problem& p, const SplitPlan& plan, const T* v, const void* u, float* out, int points, const Chunk& chunk,
             cudaStream_t stream) {
  const int words = p.channel_pitch() * static_cast<int>(sizeof(T)) / 4, steps = words / kSlice;
  const int of_split = static_cast<int>(ceil_div(steps, plan.splits));
  const int row_blocks = chunk.rows / Tile::kRows, column_blocks = p.output_pitch() / Tile::kColumns;
  const ProductParams params{reinterpret_cast<const float*>(v), static_cast<const float*>(u), out, row_blocks, column_blocks, points, steps,
                             of_split, int64_t{chunk.rows} * words, int64_t{p.output_pitch()} * words, chunk.out_point, chunk.out_split,
                             words, p.output_pitch()};
  const int blocks = row_blocks * column_blocks * points * plan.splits;
  if constexpr (sizeof(T) == 4) {
    return start_kernel(products_fwd_sm80<Tile>, blocks, Tile::kThreads, Tile::kSharedBytes, stream, params);
  } else {
    return start_kernel(products_mma_fwd_sm80<Tile, T>, blocks, Tile::kThreads, Tile::kSharedBytes, stream, params);
  }
}

template <typename T>
int products(const Problem& p, const SplitPlan& plan, const T* v, const void* u, float* out, int points, const Chunk& chunk,
             cudaStream_t stream) {
  if (plan.block_columns == 128) return products<T, ProductTile<128, 128, sizeof(T) == 4 ? 256 : 512>>(p, plan, v, u, out, points, chunk, stream);
  if (plan.block_rows == 128) return products<T, ProductTile<128, 64, 384>>(p, plan, v, u, out, points, chunk, stream);
  if (plan.block_rows == 64) return products<T, ProductTile<64, 64, 384>>(p, plan, v, u, out, points, chunk, stream);
  return products<T, ProductTile<32, 64, 384>>(p, plan, v, u, out, points, chunk, stream);
}

template <int M, typename T>
int split(const Problem& p, const SplitPlan& plan, const Tensors& t, void* workspace, cudaStream_t stream) {
  constexpr int points = (M + 2) * (M + 2), kVector = 8 / M;
  T* const v = static_cast<T*>(workspace);
  for (int64_t first = 0; first < p.tiles(M); first += plan.chunk) {
    const int64_t left = p.tiles(M) - first;
    const int tiles = static_cast<int>(left < plan.chunk ? left : plan.chunk);
    const int rows = static_cast<int>(round_up(tiles, plan.block_rows));
    const Chunk chunk{first, tiles, rows, int64_t{rows} * p.channel_pitch(), int64_t{rows} * p.output_pitch(),
                      int64_t{points} * rows * p.output_pitch()};
    float* const out = reinterpret_cast<float*>(v + points * chunk.v_point);
    const auto transform = p.channels % kVector == 0 ? input_transform<M, T, kVector> : input_transform<M, T, 1>;
    const auto inverse = p.outputs % kVector == 0 ? output_transform<M, T, kVector> : output_transform<M, T, 1>;
    int error = transform(p, t, v, chunk, stream);
    if (error == 0) error = products<T>(p, plan, v, t.filter, out, points, chunk, stream);
    if (error == 0) error = inverse(p, t, out, chunk, plan.splits, stream);
    if (error != 0) return error;
  }
  return 0;
}

}  // namespace convfirst::winograd::sm80
