#include "common/checks.h"

namespace convfirst {
namespace {

constexpr int64_t kAlignment = 16;  // bytes
constexpr int64_t kMaxElements = int64_t{1} << 31;

uintptr_t address(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()); }

bool overlap(const Tensor& a, const Tensor& b) {
  return address(a) < address(b) + b.numel() * b.element_size() && address(b) < address(a) + a.numel() * a.element_size();
}

}  // namespace

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

void Checks::shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> expected,
                   const char* meaning) const {
  bool matches = tensor.dim() == static_cast<int64_t>(expected.size());
  std::ostringstream wanted;
  int64_t axis = 0;
  for (int64_t extent : expected) {
    if (matches && extent >= 0 && tensor.size(axis) != extent) matches = false;
    wanted << (axis++ ? ", " : "") << (extent < 0 ? "*" : std::to_string(extent));
  }
  if (!matches) refuse(name, " has shape ", show(tensor.sizes()), "; expected [", wanted.str(), "] = ", meaning);
}

void Checks::alignment(const char* name, const Tensor& tensor) const {
  const auto past = address(tensor) % kAlignment;
  if (past != 0) {
    refuse(name, " starts at an address that is ", past, " bytes past a multiple of ", kAlignment,
           "; its storage must be 16-byte aligned (clone() a slice)");
  }
}

void Checks::same_device(const char* name, const Tensor& tensor, const Tensor& x) const {
  const auto ours = tensor.device();
  const auto theirs = x.device();
  if (ours.type() != theirs.type() || ours.index() != theirs.index()) {
    refuse(name, " is on ", show_device(tensor), " and x on ", show_device(x), "; all tensors must be on one device");
  }
}

void Checks::channels_last(const char* name, const Tensor& tensor) const {
  const int64_t expected[4] = {tensor.size(1) * tensor.size(2) * tensor.size(3), 1, tensor.size(1) * tensor.size(3),
                               tensor.size(1)};
  for (int axis = 0; axis < 4; ++axis) {
    if (tensor.size(axis) != 1 && tensor.stride(axis) != expected[axis]) {
      refuse(name, " of shape ", show(tensor.sizes()), " has strides ", show(tensor.strides()),
             "; expected dense channels_last [", expected[0], ", 1, ", expected[2], ", ", expected[3], "]: use ", name,
             ".contiguous(memory_format=torch.channels_last)");
    }
  }
}

void Checks::image(const char* name, const Tensor& x) const {
  if (x.dim() != 4) {
    refuse(name, " has shape ", show(x.sizes()), "; expected 4 dimensions [batch, channels, height, width]");
  }
  if (x.scalar_type() != ScalarType::Half && x.scalar_type() != ScalarType::BFloat16) {
    refuse(name, " is ", show(x.scalar_type()), "; supported are torch.float16 and torch.bfloat16");
  }
  if (x.size(1) < 8 || x.size(1) % 8 != 0) refuse(name, " has ", x.size(1), " channels; supported are multiples of 8");
  if (x.size(2) < 1 || x.size(3) < 1) {
    refuse(name, " has shape ", show(x.sizes()), "; height and width must be at least 1");
  }
  if (x.numel() >= kMaxElements) {
    refuse(name, " has shape ", show(x.sizes()), " = ", x.numel(), " elements; supported are fewer than 2^31 = ",
           kMaxElements, ": split the batch");
  }
  channels_last(name, x);
  alignment(name, x);
}

void Checks::weight(const char* name, const Tensor& tensor, const Tensor& x, std::initializer_list<int64_t> extents,
                    const char* meaning) const {
  same_device(name, tensor, x);
  if (tensor.scalar_type() != x.scalar_type()) {
    refuse(name, " is ", show(tensor.scalar_type()), "; expected x's dtype ", show(x.scalar_type()));
  }
  shape(name, tensor, extents, meaning);
  if (!tensor.is_contiguous()) {
    refuse(name, " of shape ", show(tensor.sizes()), " has strides ", show(tensor.strides()), "; it must be contiguous");
  }
  alignment(name, tensor);
}

void Checks::vector(const char* name, const MaybeTensor& tensor, const Tensor& x, int64_t length,
                    const char* meaning) const {
  if (!tensor) return;
  same_device(name, *tensor, x);
  if (tensor->scalar_type() != ScalarType::Float) {
    refuse(name, " is ", show(tensor->scalar_type()), "; expected torch.float32");
  }
  shape(name, *tensor, {length}, meaning);
  if (!tensor->is_contiguous()) refuse(name, " has strides ", show(tensor->strides()), "; it must be contiguous");
  alignment(name, *tensor);
}

void Checks::cuda(const char* name, const Tensor& x) const {
  if (!x.is_cuda()) refuse(name, " is on ", show_device(x), "; the kernels run on CUDA devices");
}

void Checks::output(const Tensor& out, const Tensor& x,
                    std::initializer_list<std::pair<const char*, MaybeTensor>> inputs) const {
  same_device("out", out, x);
  if (out.scalar_type() != x.scalar_type()) {
    refuse("out is ", show(out.scalar_type()), "; expected x's dtype ", show(x.scalar_type()));
  }
  shape("out", out, {x.size(0), x.size(1), x.size(2), x.size(3)}, "x's shape");
  channels_last("out", out);
  alignment("out", out);
  for (const auto& [name, tensor] : inputs) {
    if (tensor && overlap(out, *tensor)) refuse("out shares storage with ", name, "; it must not overlap any input");
  }
}

}  // namespace convfirst
