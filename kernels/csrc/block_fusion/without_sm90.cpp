// The empty table of a build without the sm_90 path, and its refusal of stages.
#include <torch/csrc/stable/library.h>

#include <string>

#include "block_fusion/params.h"

namespace convfirst::block_fusion {

const Variant* sm90_variants(int* count) {
  *count = 0;
  return nullptr;
}

namespace {

std::string stage_refusal(int64_t, int64_t, int64_t, int64_t, int64_t, const std::string&, const std::string&, int64_t) {
  return "this build has no kernels for compute capability 9.0";
}

}  // namespace
}  // namespace convfirst::block_fusion

STABLE_TORCH_LIBRARY_IMPL(convfirst, CompositeExplicitAutograd, m) {
  m.impl("conv_first_stage_refusal", TORCH_BOX(&convfirst::block_fusion::stage_refusal));
}
