// torch.ops.convfirst.{hidden_backward_, column_sums, norm_backward_}: what the chunked backward of the feed-forward half does between its
// matrix products. Helpers of convfirst_kernels/feed_forward_backward.py, on CUDA only.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

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

ChunkRows check_chunk(const Checks& checks, const Tensor& rows, const MaybeTensor& sample_scale, int64_t image_pixels, int64_t first) {
  if (first < 0 || image_pixels < 1) checks.refuse("first_row is ", first, " and image_pixels ", image_pixels, "; expected at least 0 and 1");
  if (sample_scale) {
    checks.vector("sample_scale", sample_scale, rows, sample_scale->size(0), "[batch]");
    if (first + rows.size(0) > sample_scale->size(0) * image_pixels) {
      checks.refuse("rows end at ", first + rows.size(0), "; sample_scale has ", sample_scale->size(0), " images of ", image_pixels, " pixels");
    }
  }
  return {rows.size(0), first, image_pixels, static_cast<int>(rows.size(1)), pointer(sample_scale)};
}

Tensor sums_like(const Tensor& rows) {
  const int64_t sizes[] = {chunk_row_blocks(rows.size(0)), rows.size(1)};
  return torch::stable::empty({sizes, 2}, ScalarType::Float, std::nullopt, rows.device());
}

Tensor run_hidden_backward(Tensor before, Tensor grad, const MaybeTensor& sample_scale, int64_t image_pixels, int64_t first_row,
                           const std::string& activation) {
  constexpr Checks kChecks{"hidden_backward_"};
  const DType dtype = check_rows(kChecks, "before", before);
  kChecks.weight("grad", grad, before, {before.size(0), before.size(1)}, "before's shape");
  const ChunkRows chunk = check_chunk(kChecks, before, sample_scale, image_pixels, first_row);
  const Activation act = parse_activation(activation);
  const int index = before.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  make_current(index);
  Tensor sums = sums_like(before);
  if (chunk.rows > 0) {
    check_cuda(hidden_backward(dtype, act, chunk, before.mutable_data_ptr(), grad.mutable_data_ptr(),
                               static_cast<float*>(sums.mutable_data_ptr()), current_stream(index)),
               "hidden_backward_", "launch");
  }
  return sums;
}

Tensor run_column_sums(const Tensor& rows, const MaybeTensor& sample_scale, int64_t image_pixels) {
  constexpr Checks kChecks{"column_sums"};
  const DType dtype = check_rows(kChecks, "rows", rows);
  const ChunkRows chunk = check_chunk(kChecks, rows, sample_scale, image_pixels, 0);
  const int index = rows.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  make_current(index);
  Tensor sums = sums_like(rows);
  if (chunk.rows > 0) {
    check_cuda(column_sums(dtype, chunk, rows.const_data_ptr(), static_cast<float*>(sums.mutable_data_ptr()), current_stream(index)),
               "column_sums", "launch");
  }
  return sums;
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
  m.def("hidden_backward_(Tensor(a!) before, Tensor(b!) grad, Tensor? sample_scale, int image_pixels, int first_row, str activation) -> Tensor");
  m.def("column_sums(Tensor rows, Tensor? sample_scale, int image_pixels) -> Tensor");
  m.def("norm_backward_(Tensor(a!) da, Tensor a, Tensor? rstd, Tensor unit) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(convfirst, CUDA, m) {
  m.impl("hidden_backward_", TORCH_BOX(&convfirst::block_fusion::run_hidden_backward));
  m.impl("column_sums", TORCH_BOX(&convfirst::block_fusion::run_column_sums));
  m.impl("norm_backward_", TORCH_BOX(&convfirst::block_fusion::run_norm_backward));
}
