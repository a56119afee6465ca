// Registers every operator of the library with PyTorch through its stable ABI. What an operator does lies in its folder;
// fake implementations, autograd, autocast and the CPU path are registered from Python beside it.
#include <torch/csrc/stable/library.h>

#include "block_fusion/op.h"
#include "common/runtime.h"
#include "direct/op.h"
#include "mbconv/op.h"
#include "patch/op.h"

namespace convfirst {

// Restricts every later launch to a path or variant ("" lifts it) and returns the former restriction; starts as
// $CONVFIRST_KERNELS_PATH.
std::string force_path(const std::string& path) {
  direct::check_path(path);
  return exchange_forced_path(path);
}

}  // namespace convfirst

// clang-format off
#define CONV_FIRST_BLOCK_ARGUMENTS                                                                      \
  "Tensor x, Tensor conv_weight, Tensor? conv_bias, Tensor? norm_weight, Tensor? norm_bias, "           \
  "Tensor expand_weight, Tensor? expand_bias, Tensor project_weight, Tensor? project_bias, "            \
  "Tensor? layer_scale, Tensor? sample_scale, int group_width, str activation, float eps, bool has_norm"
#define MBCONV_BLOCK_ARGUMENTS                                                                          \
  "Tensor x, Tensor expand_weight, Tensor? expand_bias, Tensor conv_weight, Tensor? conv_bias, "        \
  "Tensor project_weight, Tensor? project_bias, Tensor? sample_scale, int group_width, str activation"
#define STEM_ARGUMENTS                                                                                  \
  "Tensor x, Tensor conv1_weight, Tensor norm1_weight, Tensor norm1_bias, Tensor conv2_weight, "        \
  "Tensor conv2_bias, Tensor norm2_weight, Tensor norm2_bias, str activation, float eps1, float eps2, bool has_norm"
#define PATCH_STEM_ARGUMENTS                                                                            \
  "Tensor x, Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, float eps, bool has_norm"
#define DOWNSAMPLE_ARGUMENTS "Tensor x, Tensor weight, Tensor bias, float eps, bool has_norm"
#define DOWNSAMPLE_GEMM_ARGUMENTS "Tensor x, Tensor weight, Tensor vectors, float eps, bool has_norm, int tile=0"
// clang-format on

STABLE_TORCH_LIBRARY(convfirst, m) {
  m.def("conv_first_block(" CONV_FIRST_BLOCK_ARGUMENTS ") -> Tensor");
  m.def("conv_first_block_out(" CONV_FIRST_BLOCK_ARGUMENTS ", *, Tensor(a!) out) -> ()");
  m.def("conv_first_block_check(" CONV_FIRST_BLOCK_ARGUMENTS ", *, Tensor? out=None) -> str");
  // Gradients of the eleven tensors in order; those not asked for by output_mask, or absent, are empty.
  m.def("conv_first_block_backward(Tensor grad, " CONV_FIRST_BLOCK_ARGUMENTS ", bool[11] output_mask) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("plan_conv_first_block(int batch, int height, int width, int channels, int hidden, int kernel_size, int group_width, "
        "str dtype, str activation, bool has_norm, int capability, int multiprocessors, int max_shared_memory, str path) -> str");
  m.def("mbconv_block(" MBCONV_BLOCK_ARGUMENTS ") -> Tensor");
  m.def("mbconv_block_check(" MBCONV_BLOCK_ARGUMENTS ") -> str");
  m.def("plan_mbconv_block(int batch, int height, int width, int channels, int hidden, int kernel_size, int group_width, "
        "str dtype, str activation, int capability, int multiprocessors, int max_shared_memory, str path) -> str");
  m.def("stem(" STEM_ARGUMENTS ") -> Tensor");
  m.def("stem_check(" STEM_ARGUMENTS ") -> str");
  m.def("patch_stem(" PATCH_STEM_ARGUMENTS ") -> Tensor");
  m.def("patch_stem_check(" PATCH_STEM_ARGUMENTS ") -> str");
  m.def("downsample(" DOWNSAMPLE_ARGUMENTS ") -> Tensor");
  m.def("downsample_check(" DOWNSAMPLE_ARGUMENTS ") -> str");
  m.def("downsample_gemm(" DOWNSAMPLE_GEMM_ARGUMENTS ") -> Tensor");
  m.def("downsample_gemm_check(" DOWNSAMPLE_GEMM_ARGUMENTS ") -> str");
  m.def("plan_downsample_gemm(int pixels, int channels, int columns, int multiprocessors) -> str");
  m.def("head(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor");
  m.def("normalised_patches(Tensor x, float eps, bool has_norm) -> Tensor");
  m.def("patch_refusal(str op, int channels, int columns, int capability, int max_shared_memory) -> str");
  m.def("force_path(str path) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(convfirst, CUDA, m) {
  m.impl("conv_first_block", TORCH_BOX(&convfirst::block_fusion::conv_first_block));
  m.impl("conv_first_block_out", TORCH_BOX(&convfirst::block_fusion::conv_first_block_out));
  m.impl("mbconv_block", TORCH_BOX(&convfirst::mbconv::mbconv_block));
  m.impl("stem", TORCH_BOX(&convfirst::patch::stem));
  m.impl("patch_stem", TORCH_BOX(&convfirst::patch::patch_stem));
  m.impl("downsample", TORCH_BOX(&convfirst::patch::downsample));
  m.impl("downsample_gemm", TORCH_BOX(&convfirst::patch::downsample_gemm));
  m.impl("head", TORCH_BOX(&convfirst::patch::head));
  m.impl("normalised_patches", TORCH_BOX(&convfirst::patch::normalised_patches));
}

STABLE_TORCH_LIBRARY_IMPL(convfirst, CompositeExplicitAutograd, m) {
  m.impl("conv_first_block_check", TORCH_BOX(&convfirst::block_fusion::conv_first_block_check));
  m.impl("plan_conv_first_block", TORCH_BOX(&convfirst::block_fusion::plan_conv_first_block));
  m.impl("mbconv_block_check", TORCH_BOX(&convfirst::mbconv::mbconv_block_check));
  m.impl("plan_mbconv_block", TORCH_BOX(&convfirst::mbconv::plan_mbconv_block));
  m.impl("stem_check", TORCH_BOX(&convfirst::patch::stem_check));
  m.impl("patch_stem_check", TORCH_BOX(&convfirst::patch::patch_stem_check));
  m.impl("downsample_check", TORCH_BOX(&convfirst::patch::downsample_check));
  m.impl("downsample_gemm_check", TORCH_BOX(&convfirst::patch::downsample_gemm_check));
  m.impl("plan_downsample_gemm", TORCH_BOX(&convfirst::patch::plan_downsample_gemm));
  m.impl("patch_refusal", TORCH_BOX(&convfirst::patch::refusal));
  m.impl("force_path", TORCH_BOX(&convfirst::force_path));
}
