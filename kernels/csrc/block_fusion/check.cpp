#include "block_fusion/check.h"

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace convfirst::block_fusion {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kAlignment = 16;  // bytes: what cp.async and TMA copy at once
constexpr int64_t kMaxElements = int64_t{1} << 31;

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  message << "conv_first_block: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

std::string show(ScalarType type) {
  switch (type) {
    case ScalarType::Half: return "torch.float16";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Double: return "torch.float64";
    default: return torch::headeronly::toString(type);
  }
}

std::string show(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::ostringstream out;
  out << "[";
  for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "") << values[i];
  out << "]";
  return out.str();
}

std::string show_device(const Tensor& tensor) {
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return tensor.is_cpu() ? "cpu" : "a device that is neither CUDA nor CPU";
}

// Expected extents, -1: any.
void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> expected, const char* meaning) {
  bool matches = tensor.dim() == static_cast<int64_t>(expected.size());
  int64_t axis = 0;
  for (int64_t extent : expected) {
    if (matches && extent >= 0 && tensor.size(axis) != extent) matches = false;
    ++axis;
  }
  if (matches) return;
  std::ostringstream wanted;
  wanted << "[";
  axis = 0;
  for (int64_t extent : expected) {
    if (axis++) wanted << ", ";
    if (extent < 0) wanted << "*";
    else wanted << extent;
  }
  wanted << "]";
  refuse(name, " has shape ", show(tensor.sizes()), "; expected ", wanted.str(), " = ", meaning);
}

void check_alignment(const char* name, const Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  if (address % kAlignment != 0) {
    refuse(name, " starts at an address that is ", address % kAlignment, " bytes past a multiple of ", kAlignment,
           "; its storage must be 16-byte aligned (clone() a slice)");
  }
}

void check_same_device(const char* name, const Tensor& tensor, const Tensor& x) {
  const auto ours = tensor.device();
  const auto theirs = x.device();
  if (ours.type() != theirs.type() || ours.index() != theirs.index()) {
    refuse(name, " is on ", show_device(tensor), " and x on ", show_device(x), "; all tensors must be on one device");
  }
}

// Extents of 1 carry any stride. Everything else must lie as [batch, height, width, channels] without gaps.
void check_channels_last(const char* name, const Tensor& tensor) {
  const int64_t expected[4] = {tensor.size(1) * tensor.size(2) * tensor.size(3), 1, tensor.size(1) * tensor.size(3),
                               tensor.size(1)};
  for (int axis = 0; axis < 4; ++axis) {
    if (tensor.size(axis) != 1 && tensor.stride(axis) != expected[axis]) {
      refuse(name, " of shape ", show(tensor.sizes()), " has strides ", show(tensor.strides()), "; expected dense channels_last [",
             expected[0], ", 1, ", expected[2], ", ", expected[3],
             "]: use ", name, ".contiguous(memory_format=torch.channels_last)");
    }
  }
}

void check_matrix(const char* name, const Tensor& tensor, const Tensor& x, std::initializer_list<int64_t> shape,
                  const char* meaning) {
  check_same_device(name, tensor, x);
  if (tensor.scalar_type() != x.scalar_type()) {
    refuse(name, " is ", show(tensor.scalar_type()), "; expected x's dtype ", show(x.scalar_type()));
  }
  check_shape(name, tensor, shape, meaning);
  if (!tensor.is_contiguous()) {
    refuse(name, " of shape ", show(tensor.sizes()), " has strides ", show(tensor.strides()), "; it must be contiguous");
  }
  check_alignment(name, tensor);
}

void check_vector(const char* name, const MaybeTensor& tensor, const Tensor& x, int64_t length, const char* meaning) {
  if (!tensor) return;
  check_same_device(name, *tensor, x);
  if (tensor->scalar_type() != ScalarType::Float) {
    refuse(name, " is ", show(tensor->scalar_type()), "; expected torch.float32");
  }
  check_shape(name, *tensor, {length}, meaning);
  if (!tensor->is_contiguous()) refuse(name, " has strides ", show(tensor->strides()), "; it must be contiguous");
  check_alignment(name, *tensor);
}

void check_input(const Tensor& x) {
  if (x.dim() != 4) refuse("x has shape ", show(x.sizes()), "; expected 4 dimensions [batch, channels, height, width]");
  if (x.scalar_type() != ScalarType::Half && x.scalar_type() != ScalarType::BFloat16) {
    refuse("x is ", show(x.scalar_type()), "; supported are torch.float16 and torch.bfloat16");
  }
  if (x.size(1) < 8 || x.size(1) % 8 != 0) refuse("x has ", x.size(1), " channels; supported are multiples of 8");
  if (x.size(2) < 1 || x.size(3) < 1) refuse("x has shape ", show(x.sizes()), "; height and width must be at least 1");
  if (x.numel() >= kMaxElements) {
    refuse("x has shape ", show(x.sizes()), " = ", x.numel(), " elements; supported are fewer than 2^31 = ", kMaxElements,
           ": split the batch");
  }
  check_channels_last("x", x);
  check_alignment("x", x);
}

int check_kernel_size(const Tensor& conv_weight) {
  if (conv_weight.dim() != 3) {
    refuse("conv_weight has shape ", show(conv_weight.sizes()),
           "; expected the packed [kernel_size * kernel_size, channels, group_width] (pack_conv_weight makes it)");
  }
  for (int size : {3, 5, 7}) {
    if (conv_weight.size(0) == size * size) return size;
  }
  refuse("conv_weight has ", conv_weight.size(0), " taps; supported are 9, 25 and 49 (kernel size 3, 5, 7)");
}

void check_group_width(int64_t group_width, int64_t channels) {
  if (group_width != 1 && group_width != 8 && group_width != 16) {
    refuse("group_width is ", group_width, "; supported are 1 (depthwise), 8 and 16");
  }
  if (channels % group_width != 0) refuse("group_width ", group_width, " does not divide the ", channels, " channels");
}

int64_t check_hidden(const Tensor& expand_weight, int64_t channels) {
  check_shape("expand_weight", expand_weight, {-1, channels}, "[hidden, channels]");
  const int64_t hidden = expand_weight.size(0);
  if (hidden < 16 || hidden % 16 != 0) refuse("expand_weight has ", hidden, " hidden units; supported are multiples of 16");
  return hidden;
}

struct Range {
  uintptr_t begin;
  uintptr_t end;
};

Range range_of(const Tensor& tensor) {
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return {begin, begin + tensor.numel() * tensor.element_size()};
}

}  // namespace

Activation parse_activation(const std::string& name) {
  if (name == "relu") return Activation::kRelu;
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  refuse("activation is '", name, "'; supported are 'relu', 'silu' and 'gelu'");
}

Problem check(const Arguments& a) {
  check_input(a.x);
  const int64_t batch = a.x.size(0), channels = a.x.size(1);
  const int kernel_size = check_kernel_size(a.conv_weight);
  check_group_width(a.group_width, channels);
  const int64_t hidden = check_hidden(a.expand_weight, channels);
  check_matrix("conv_weight", a.conv_weight, a.x, {kernel_size * kernel_size, channels, a.group_width},
               "[kernel_size * kernel_size, channels, group_width]");
  check_matrix("expand_weight", a.expand_weight, a.x, {hidden, channels}, "[hidden, channels]");
  check_matrix("project_weight", a.project_weight, a.x, {channels, hidden}, "[channels, hidden]");
  check_vector("conv_bias", a.conv_bias, a.x, channels, "[channels]");
  check_vector("norm_weight", a.norm_weight, a.x, channels, "[channels]");
  check_vector("norm_bias", a.norm_bias, a.x, channels, "[channels]");
  check_vector("expand_bias", a.expand_bias, a.x, hidden, "[hidden]");
  check_vector("project_bias", a.project_bias, a.x, channels, "[channels]");
  check_vector("layer_scale", a.layer_scale, a.x, channels, "[channels]");
  check_vector("sample_scale", a.sample_scale, a.x, batch, "[batch]");
  if (!a.has_norm && (a.norm_weight || a.norm_bias)) {
    refuse(a.norm_weight ? "norm_weight" : "norm_bias", " is given and has_norm is false; fold the norm or set has_norm");
  }
  if (a.has_norm && !(a.eps > 0)) refuse("eps is ", a.eps, "; it must be positive");
  return Problem{batch,
                 a.x.size(2),
                 a.x.size(3),
                 static_cast<int>(channels),
                 static_cast<int>(hidden),
                 kernel_size,
                 static_cast<int>(a.group_width),
                 a.x.scalar_type() == ScalarType::Half ? DType::kHalf : DType::kBFloat16,
                 parse_activation(a.activation),
                 a.has_norm};
}

void check_device(const Arguments& a) {
  if (!a.x.is_cuda()) refuse("x is on ", show_device(a.x), "; the kernels run on CUDA devices");
}

void check_output(const Arguments& a, const Tensor& y) {
  check_same_device("out", y, a.x);
  if (y.scalar_type() != a.x.scalar_type()) {
    refuse("out is ", show(y.scalar_type()), "; expected x's dtype ", show(a.x.scalar_type()));
  }
  check_shape("out", y, {a.x.size(0), a.x.size(1), a.x.size(2), a.x.size(3)}, "x's shape");
  check_channels_last("out", y);
  check_alignment("out", y);
  const Range out = range_of(y);
  const std::pair<const char*, MaybeTensor> inputs[] = {
      {"x", a.x}, {"conv_weight", a.conv_weight}, {"conv_bias", a.conv_bias}, {"norm_weight", a.norm_weight},
      {"norm_bias", a.norm_bias}, {"expand_weight", a.expand_weight}, {"expand_bias", a.expand_bias},
      {"project_weight", a.project_weight}, {"project_bias", a.project_bias}, {"layer_scale", a.layer_scale},
      {"sample_scale", a.sample_scale}};
  for (const auto& [name, tensor] : inputs) {
    if (!tensor) continue;
    const Range in = range_of(*tensor);
    if (in.begin < out.end && out.begin < in.end) {
      refuse("out shares storage with ", name, "; it must not overlap any input");
    }
  }
}

}  // namespace convfirst::block_fusion
