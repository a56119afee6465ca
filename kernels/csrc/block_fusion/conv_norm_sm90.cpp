// Picks the compiled kernel of a convolution and LayerNorm on Hopper and hands it its parameters.
#include "conv_norm_sm90.h"

namespace convfirst::block_fusion::sm90 {
namespace {

// Calls `body` with the problem's kernel.
template <class Body>
auto with_kernel(const Problem& q, Body&& body) {
  const bool narrow = q.width <= 8;
  if (q.dtype == DType::kHalf) return narrow ? body(ConvNormKernel<DType::kHalf, true>{}) : body(ConvNormKernel<DType::kHalf, false>{});
  return narrow ? body(ConvNormKernel<DType::kBFloat16, true>{}) : body(ConvNormKernel<DType::kBFloat16, false>{});
}

}  // namespace

int conv_norm_launch(const Problem& q, const Tensors& t, const ConvNormPlan& plan, void* a, bool dependent, cudaStream_t stream,
                     const ConvNormExtras& extras) {
  ConvNormParams p{};
  p.x = t.x, p.weight = t.conv_weight, p.bias = t.conv_bias, p.norm_weight = t.norm_weight, p.norm_bias = t.norm_bias, p.a = a;
  p.residual = extras.residual, p.rstd = extras.rstd;
  p.eps = t.eps, p.has_norm = q.has_norm;
  p.batch = static_cast<int>(q.batch), p.height = static_cast<int>(q.height), p.width = static_cast<int>(q.width);
  p.channels = q.channels;
  p.plan = plan;
  p.layout = conv_norm_layout(plan.tile, plan.slab, plan.cluster);
  return with_kernel(q, [&](auto kernel) { return kernel.launch(p, dependent, stream); });
}

const void* conv_norm_pointer(const Problem& q) {
  return with_kernel(q, [](auto kernel) { return kernel.pointer(); });
}

}  // namespace convfirst::block_fusion::sm90
