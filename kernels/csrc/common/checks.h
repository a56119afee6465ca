// Checks that operators share. Each throws std::runtime_error: "<operator>: <argument> is <value>; <what is supported>".
// They read shapes, strides, dtypes, devices and addresses only, so they take tensors of any device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace convfirst {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

std::string show(ScalarType type);
std::string show(torch::headeronly::IntHeaderOnlyArrayRef values);
std::string show_device(const Tensor& tensor);

struct Checks {
  const char* op;  // begins every message

  template <typename... Parts>
  [[noreturn]] void refuse(const Parts&... parts) const {
    std::ostringstream message;
    message << op << ": ";
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }

  // Extents, -1 for any; `meaning` spells them out.
  void shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> expected, const char* meaning) const;

  // 16 bytes: what cp.async and TMA copy at once.
  void alignment(const char* name, const Tensor& tensor) const;

  void same_device(const char* name, const Tensor& tensor, const Tensor& x) const;

  // Dense [batch, height, width, channels]; extents of 1 carry any stride.
  void channels_last(const char* name, const Tensor& tensor) const;

  // A float16 or bfloat16 image batch [batch, channels, height, width]: channels a multiple of 8, fewer than 2^31 elements,
  // channels_last, aligned.
  void image(const char* name, const Tensor& x) const;

  // A contiguous, aligned weight of x's dtype on x's device.
  void weight(const char* name, const Tensor& tensor, const Tensor& x, std::initializer_list<int64_t> shape,
              const char* meaning) const;

  // The same in float32, of one dimension, or absent.
  void vector(const char* name, const MaybeTensor& tensor, const Tensor& x, int64_t length, const char* meaning) const;

  void cuda(const char* name, const Tensor& x) const;

  // Can receive a result like x, and shares no storage with any input.
  void output(const Tensor& out, const Tensor& x,
              std::initializer_list<std::pair<const char*, MaybeTensor>> inputs) const;
};

}  // namespace convfirst
