#pragma once

namespace convfirst::block_fusion::sm90 {

// What training wants of convolution and norm besides.
struct ConvNormExtras {
  const void* residual = nullptr;  // [batch, height, width, channels], added to the convolution where there is no norm
  float* rstd = nullptr;           // [batch * height * width]: the norm's reciprocal standard deviations
};

}  // namespace convfirst::block_fusion::sm90
