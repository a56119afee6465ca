#include "common/launch.cuh"
#include "winograd/fused_fwd_sm80.cuh"

namespace convfirst::winograd {
namespace {

template <int M>
int launch(const Problem& p, const Tensors& t, cudaStream_t stream) {
  using Tile = sm80::FusedTile<M>;
  const int output_blocks = static_cast<int>(ceil_div(p.outputs, Tile::kOutputs));
  const int blocks = static_cast<int>(ceil_div(p.tiles(M), Tile::kTiles)) * output_blocks;
  return start_kernel(sm80::fused_fwd_sm80<M>, blocks, Tile::kThreads, Tile::kSharedBytes, stream, p, t, output_blocks);
}

}  // namespace

int run_fused(int m, const Problem& problem, const Tensors& tensors, cudaStream_t stream) {
  return (m == 2 ? launch<2> : launch<4>)(problem, tensors, stream);
}

}  // namespace convfirst::winograd
