#include "common/launch.cuh"
#include "winograd/weight_gradient_sm80.cuh"

namespace convfirst::winograd {
namespace {

using namespace sm80;

template <typename Tile>
int products(GradientParams params, int splits, cudaStream_t stream) {
  params.row_blocks = params.outputs / Tile::kRows, params.column_blocks = params.channels / Tile::kColumns;
  params.steps_of_split = static_cast<int>(ceil_div(params.steps, splits));
  return start_kernel(gradient_products_sm80<Tile>, params.row_blocks * params.column_blocks * 16 * splits, Tile::kThreads,
                      Tile::kSharedBytes, stream, params);
}

}  // namespace

int run_weight_gradient(const Problem& p, const GradientPlan& plan, const void* x, const void* grad, void* result, void* workspace,
                        cudaStream_t stream) {
  const int outputs = p.output_pitch(), channels = plan.channels(p);
  const int64_t chunk = plan.chunk;
  float* const g = static_cast<float*>(workspace);
  float* const v = g + 16 * chunk * outputs;
  float* const part = v + 16 * chunk * channels;
  for (int64_t first = 0; first < p.tiles(2); first += chunk) {
    const int64_t left = p.tiles(2) - first;
    const int tiles = static_cast<int>(left < chunk ? left : chunk), rows = static_cast<int>(round_up(tiles, kSlice * plan.splits));
    const auto transform = p.channels % 4 == 0 ? input_transform_sm80<2, float, 4> : input_transform_sm80<2, float, 1>;
    const auto transform_gradient = p.outputs % 4 == 0 ? gradient_transform_sm80<4> : gradient_transform_sm80<1>;
    int error = start_kernel(transform, transform_blocks(int64_t{rows} * channels / (p.channels % 4 == 0 ? 4 : 1)), kTransformThreads, 0,
                             stream, p, static_cast<const float*>(x), v, first, tiles, rows, channels, chunk * channels);
    if (error == 0) {
      error = start_kernel(transform_gradient, transform_blocks(int64_t{rows} * outputs / (p.outputs % 4 == 0 ? 4 : 1)),
                           kTransformThreads, 0, stream, p, static_cast<const float*>(grad), g, first, tiles, rows, chunk * outputs);
    }
    const GradientParams params{g, v, part, 0, 0, rows / kSlice, 0, chunk * outputs, chunk * channels, outputs, channels, first > 0};
    if (error == 0) {
      error = outputs % 128 == 0 && channels % 128 == 0 ? products<GradientTile<128, 128>>(params, plan.splits, stream)
                                                        : products<GradientTile<64, 64>>(params, plan.splits, stream);
    }
    if (error != 0) return error;
  }
  return start_kernel(gradient_inverse_sm80, transform_blocks(int64_t{p.outputs} * p.channels), kTransformThreads, 0, stream, p, part,
                      static_cast<float*>(result), plan.splits, outputs, channels);
}

}  // namespace convfirst::winograd
