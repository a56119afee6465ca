// From a plan of a linear layer to its compiled kernel.
#include "block_fusion/linear_sm90.h"

namespace convfirst::block_fusion::sm90 {
namespace {

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

template <DType kDType, Layer kLayer, Activation kActivation, int kTile>
int launch_from(const LinearProblem& q, const LinearTensors& t, const LinearPlan& plan, bool overlap_previous, cudaStream_t stream) {
  if constexpr (kTile == kLinearTileCount) {
    return kInvalidValue;
  } else {
    if (plan.tile != kTile) return launch_from<kDType, kLayer, kActivation, kTile + 1>(q, t, plan, overlap_previous, stream);
    if constexpr (kLinearTiles[kTile].serves(kLayer)) {
      return LinearKernel<LinearTraits<kDType, kLayer, kActivation, kTile>>::launch(q, t, plan, overlap_previous, stream);
    }
    return kInvalidValue;
  }
}

template <DType kDType>
int launch_dtype(const LinearProblem& q, const LinearTensors& t, const LinearPlan& plan, bool overlap_previous, cudaStream_t stream) {
  constexpr auto kExpand = Layer::kExpand;
  if (q.layer == Layer::kProject) return launch_from<kDType, Layer::kProject, Activation::kRelu, 0>(q, t, plan, overlap_previous, stream);
  if (q.activation == Activation::kRelu) return launch_from<kDType, kExpand, Activation::kRelu, 0>(q, t, plan, overlap_previous, stream);
  if (q.activation == Activation::kSilu) return launch_from<kDType, kExpand, Activation::kSilu, 0>(q, t, plan, overlap_previous, stream);
  return launch_from<kDType, kExpand, Activation::kGelu, 0>(q, t, plan, overlap_previous, stream);
}

}  // namespace

int launch_linear(const LinearProblem& q, const LinearTensors& t, const LinearPlan& plan, bool overlap_previous, cudaStream_t stream) {
  return q.dtype == DType::kHalf ? launch_dtype<DType::kHalf>(q, t, plan, overlap_previous, stream)
                                 : launch_dtype<DType::kBFloat16>(q, t, plan, overlap_previous, stream);
}

}  // namespace convfirst::block_fusion::sm90
