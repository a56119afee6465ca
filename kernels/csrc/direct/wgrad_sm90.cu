// The Hopper weight gradients' kernels.
#include "first_layer_wgrad_sm90_wgmma.cuh"
#include "launch_sm90.h"
#include "wgrad_sm90_wgmma.cuh"

namespace convfirst::direct::sm90 {
namespace {

// function(traits) of the kernel for a dtype, tile and panel.
template <DType kDType, int kTile, class Function>
auto with_wgrad_tile(int tile, int panel, Function function) {
  if constexpr (kTile + 1 < kWgradTileCount) {
    if (tile != kTile) return with_wgrad_tile<kDType, kTile + 1>(tile, panel, function);
  }
  return panel == 64 ? function(WgradTraits<kDType, kTile, 64>{}) : function(WgradTraits<kDType, kTile, 32>{});
}

template <class Function>
auto with_wgrad(DType dtype, int tile, int panel, Function function) {
  return dtype == DType::kHalf ? with_wgrad_tile<DType::kHalf, 0>(tile, panel, function) : with_wgrad_tile<DType::kBFloat16, 0>(tile, panel, function);
}

}  // namespace

int launch_wgrad(const Problem& q, const Tensors& t, const WgradPlan& plan, void* workspace, cudaStream_t stream) {
  return with_wgrad(q.dtype, plan.tile, plan.panel, [&](auto traits) { return launch_wgrad_tile<decltype(traits)>(q, t, plan, workspace, stream); });
}

const void* wgrad_kernel(DType dtype, int tile, int panel) {
  return with_wgrad(dtype, tile, panel, [](auto traits) { return reinterpret_cast<const void*>(&wgrad_sm90<decltype(traits)>); });
}

int launch_first_wgrad(const Problem& q, const Tensors& t, const FirstWgradPlan& plan, void* workspace, cudaStream_t stream) {
  return q.dtype == DType::kHalf ? launch_first_wgrad_dtype<DType::kHalf>(q, t, plan, workspace, stream)
                                 : launch_first_wgrad_dtype<DType::kBFloat16>(q, t, plan, workspace, stream);
}

const void* first_wgrad_kernel(DType dtype) {
  return dtype == DType::kHalf ? reinterpret_cast<const void*>(&first_layer_wgrad_sm90<DType::kHalf>)
                               : reinterpret_cast<const void*>(&first_layer_wgrad_sm90<DType::kBFloat16>);
}

}  // namespace convfirst::direct::sm90
