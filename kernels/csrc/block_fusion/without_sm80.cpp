// The empty table of a build without the sm_80 path.
#include "block_fusion/block_bwd_weights.h"
#include "block_fusion/conv_bwd_weights.h"
#include "block_fusion/feed_forward_bwd_chunk.h"
#include "block_fusion/params.h"

namespace convfirst::block_fusion {

const Variant* sm80_variants(int* count) {
  *count = 0;
  return nullptr;
}

namespace {

constexpr int kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice

}  // namespace

int run_weight_gradient(const WeightGradientProblem&, const WeightGradientPlan&, const WeightGradientTensors&, void*, cudaStream_t) {
  return kNoKernelImage;
}

int absorb_affine(DType, const AffineTensors&, void*, float*, cudaStream_t) { return kNoKernelImage; }

int64_t release_workspace(const AffineTensors&) { return 0; }

int release_affine(DType, const AffineTensors&, const ReleasedTensors&, void*, cudaStream_t) { return kNoKernelImage; }

int transpose_filter(const void*, void*, int, int, int, cudaStream_t) { return kNoKernelImage; }

int64_t chunk_row_blocks(int64_t) { return 0; }

int hidden_backward(DType, Activation, const ChunkRows&, void*, void*, float*, cudaStream_t) { return kNoKernelImage; }

int scale_rows(DType, const ChunkRows&, const SampleFactors&, const void*, void*, float*, cudaStream_t) { return kNoKernelImage; }

int norm_backward(DType, int64_t, int, void*, const void*, const float*, const float*, cudaStream_t) { return kNoKernelImage; }

}  // namespace convfirst::block_fusion
