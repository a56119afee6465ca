// torch.ops.convfirst.{hidden_backward_, scale_rows, norm_backward_}: what the chunked backward of the feed-forward half does between its
// matrix products. Helpers of convfirst_kernels/feed_forward_backward.py, on CUDA only.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "block_fusion/check.h"
#include "block_fusion/feed_forward_bwd_chunk.h"
#include "common/checks.h"
#include "common/runtime.h"

namespace convfirst::block_fusion {
namespace {

const float* pointer(const MaybeTensor& tensor) { return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr; }

// Contiguous 16-bit rows [rows, columns], fewer than 2^31 of them.
DType check_rows(const Checks& checks, const char* name, const Tensor& rows) {
  const ScalarType type = rows.scalar_type();
  if (type != ScalarType::Half && type != ScalarType::BFloat16) {
    checks.refuse(name, " is ", show(type), "; supported are torch.float16 and torch.bfloat16");
  }
  checks.shape(name, rows, {-1, -1}, "[rows, columns]");
  if (rows.size(0) >= int64_t{1} << 31) checks.refuse(name, " has ", rows.size(0), " rows; supported are fewer than 2^31");
  if (rows.size(1) % 8 != 0 || rows.size(1) < 8) checks.refuse(name, " has ", rows.size(1), " columns; supported are multiples of 8");
  checks.weight(name, rows, rows, {rows.size(0), rows.size(1)}, "[rows, columns]");
  checks.cuda(name, rows);
  return type == ScalarType::Half ? DType::kHalf : DType::kBFloat16;
}

Tensor sums_like(const Tensor& rows) {
  const int64_t sizes[] = {chunk_row_blocks(rows.size(0)), rows.size(1)};
  return torch::stable::empty({sizes, 2}, ScalarType::Float, std::nullopt, rows.device());
}

Tensor run_hidden_backward(Tensor before, Tensor grad, const std::string& activation) {
  constexpr Checks kChecks{"hidden_backward_"};
  const DType dtype = check_rows(kChecks, "before", before);
  kChecks.weight("grad", grad, before, {before.size(0), before.size(1)}, "before's shape");
  const Activation act = parse_activation(activation);
  const int index = before.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  make_current(index);
  Tensor sums = sums_like(before);
  const ChunkRows chunk{before.size(0), static_cast<int>(before.size(1))};
  if (chunk.rows > 0) {
    check_cuda(hidden_backward(dtype, act, chunk, before.mutable_data_ptr(), grad.mutable_data_ptr(),
                               static_cast<float*>(sums.mutable_data_ptr()), current_stream(index)),
               "hidden_backward_", "launch");
  }
  return sums;
}

// Without sample_scale the first result is empty.
std::tuple<Tensor, Tensor> run_scale_rows(const Tensor& rows, const MaybeTensor& sample_scale, int64_t image_pixels) {
  constexpr Checks kChecks{"scale_rows"};
  const DType dtype = check_rows(kChecks, "rows", rows);
  if (image_pixels < 1) kChecks.refuse("image_pixels is ", image_pixels, "; expected at least 1");
  if (sample_scale) {
    kChecks.vector("sample_scale", sample_scale, rows, sample_scale->size(0), "[batch]");
    if (rows.size(0) > sample_scale->size(0) * image_pixels) {
      kChecks.refuse("rows has ", rows.size(0), " rows; sample_scale has ", sample_scale->size(0), " images of ", image_pixels, " pixels");
    }
  }
  const int index = rows.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  make_current(index);
  const int64_t sizes[] = {sample_scale ? rows.size(0) : 0, rows.size(1)};
  Tensor scaled = torch::stable::empty({sizes, 2}, rows.scalar_type(), std::nullopt, rows.device());
  Tensor sums = sums_like(rows);
  const ChunkRows chunk{rows.size(0), static_cast<int>(rows.size(1))};
  if (chunk.rows > 0) {
    check_cuda(scale_rows(dtype, chunk, {pointer(sample_scale), image_pixels}, rows.const_data_ptr(),
                          sample_scale ? scaled.mutable_data_ptr() : nullptr, static_cast<float*>(sums.mutable_data_ptr()),
                          current_stream(index)),
               "scale_rows", "launch");
  }
  return {scaled, sums};
}

void run_norm_backward(Tensor da, const Tensor& a, const MaybeTensor& rstd, const Tensor& unit) {
  constexpr Checks kChecks{"norm_backward_"};
  const DType dtype = check_rows(kChecks, "da", da);
  kChecks.weight("a", a, da, {da.size(0), da.size(1)}, "da's shape");
  kChecks.vector("rstd", rstd, da, da.size(0), "[rows]");
  if (unit.scalar_type() != ScalarType::Float || unit.numel() != 1) kChecks.refuse("unit is ", show(unit.scalar_type()), "; expected one float32");
  kChecks.same_device("unit", unit, da);
  if (da.size(0) == 0) return;
  const int index = da.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  make_current(index);
  check_cuda(norm_backward(dtype, da.size(0), static_cast<int>(da.size(1)), da.mutable_data_ptr(), a.const_data_ptr(), pointer(rstd),
                           static_cast<const float*>(unit.const_data_ptr()), current_stream(index)),
             "norm_backward_", "launch");
}

}  // namespace
}  // namespace convfirst::block_fusion

STABLE_TORCH_LIBRARY_FRAGMENT(convfirst, m) {
  m.def("hidden_backward_(Tensor(a!) before, Tensor(b!) grad, str activation) -> Tensor");
  m.def("scale_rows(Tensor rows, Tensor? sample_scale, int image_pixels) -> (Tensor, Tensor)");
  m.def("norm_backward_(Tensor(a!) da, Tensor a, Tensor? rstd, Tensor unit) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(convfirst, CUDA, m) {
  m.impl("hidden_backward_", TORCH_BOX(&convfirst::block_fusion::run_hidden_backward));
  m.impl("scale_rows", TORCH_BOX(&convfirst::block_fusion::run_scale_rows));
  m.impl("norm_backward_", TORCH_BOX(&convfirst::block_fusion::run_norm_backward));
}
