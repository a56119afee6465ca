// Picks the compiled kernel of a convolution and LayerNorm of narrow maps on Hopper and hands it its parameters.
#include "image_conv_norm_sm90.h"

namespace convfirst::block_fusion::sm90 {
namespace {

// Calls `body` with the problem's kernel.
template <class Body>
auto with_image_kernel(const Problem& q, Body&& body) {
  const bool seven = q.width == 7;
  if (q.dtype == DType::kHalf) return seven ? body(ImageKernel<DType::kHalf, 7>{}) : body(ImageKernel<DType::kHalf, 14>{});
  return seven ? body(ImageKernel<DType::kBFloat16, 7>{}) : body(ImageKernel<DType::kBFloat16, 14>{});
}

}  // namespace

int image_launch(const Problem& q, const Tensors& t, const ImagePlan& plan, void* a, bool dependent, cudaStream_t stream,
                 const ConvNormExtras& extras) {
  ImageParams p{};
  p.x = t.x, p.weight = t.conv_weight, p.bias = t.conv_bias, p.norm_weight = t.norm_weight, p.norm_bias = t.norm_bias, p.a = a;
  p.residual = extras.residual, p.rstd = extras.rstd;
  p.eps = t.eps, p.has_norm = q.has_norm;
  p.height = static_cast<int>(q.height), p.channels = q.channels;
  return with_image_kernel(q, [&](auto kernel) { return kernel.launch(p, plan, dependent, stream); });
}

const void* image_pointer(const Problem& q) {
  return with_image_kernel(q, [](auto kernel) { return kernel.pointer(); });
}

}  // namespace convfirst::block_fusion::sm90
