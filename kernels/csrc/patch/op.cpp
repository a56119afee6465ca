#include "patch/op.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "common/runtime.h"
#include "patch/downsample_gemm_sm90.h"
#include "patch/params.h"
#include "patch/tile.h"

namespace convfirst::patch {
namespace {

using torch::headeronly::MemoryFormat;

constexpr int64_t kMaxElements = int64_t{1} << 31;
constexpr int kGatherWidest = 768;

// The path that runs on such a device, where the build has it; a restriction to one of the two is kept, and one that has not been
// tested on a GPU runs only by its name.
const Path* path_for(int capability) {
  const std::string forced = forced_path();
  for (const Path* path : {sm90_path(), sm80_path()}) {
    if (path == nullptr || capability < path->min_capability) continue;
    if (path->max_capability != 0 && capability > path->max_capability) continue;
    if ((forced == "sm80" || forced == "sm90") && forced != path->name) continue;
    if (!path->tested && forced != path->name) continue;
    return path;
  }
  return nullptr;
}

DType dtype_of(const Tensor& x) { return x.scalar_type() == ScalarType::Half ? DType::kHalf : DType::kBFloat16; }

const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

Activation parse_activation(const Checks& checks, const std::string& name) {
  if (name == "relu") return Activation::kRelu;
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  checks.refuse("activation is '", name, "'; supported are 'relu', 'silu' and 'gelu'");
}

// A batch of images of three channels, any strides.
void check_pixels(const Checks& checks, const Tensor& x, int64_t least) {
  if (x.dim() != 4 || x.size(1) != 3) {
    checks.refuse("x has shape ", show(x.sizes()), "; expected [batch, 3, height, width]");
  }
  if (x.scalar_type() != ScalarType::Half && x.scalar_type() != ScalarType::BFloat16) {
    checks.refuse("x is ", show(x.scalar_type()), "; supported are torch.float16 and torch.bfloat16");
  }
  if (x.size(2) < least || x.size(3) < least) {
    checks.refuse("x has shape ", show(x.sizes()), "; height and width must be at least ", least);
  }
  if (x.numel() >= kMaxElements) {
    checks.refuse("x has ", x.numel(), " elements; supported are fewer than 2^31 = ", kMaxElements, ": split the batch");
  }
}

void check_output(const Checks& checks, const Tensor& x, int64_t height, int64_t width, int64_t channels) {
  if (x.size(0) * height * width * channels >= kMaxElements) {
    checks.refuse("x of shape ", show(x.sizes()), " gives ", x.size(0) * height * width * channels,
                  " elements; supported are fewer than 2^31 = ", kMaxElements, ": split the batch");
  }
}

Image image(const Tensor& x) {
  return {x.const_data_ptr(), static_cast<int>(x.size(0)), static_cast<int>(x.size(2)), static_cast<int>(x.size(3)),
          x.stride(0),        x.stride(1),                 x.stride(2),                 x.stride(3)};
}

std::string describe(const char* op, const Tensor& x, int64_t columns) {
  std::ostringstream out;
  out << op << " C=" << x.size(1) << " to " << columns << " " << show(x.scalar_type()).substr(6) << ", " << x.size(0) << " x "
      << x.size(2) << " x " << x.size(3);
  return out.str();
}

Tensor empty_image(const Tensor& x, int64_t channels, int64_t height, int64_t width) {
  const int64_t sizes[4] = {x.size(0), channels, height, width};
  return torch::stable::empty({sizes, 4}, x.scalar_type(), std::nullopt, x.device(), std::nullopt, MemoryFormat::ChannelsLast);
}

// Runs `start(path, device, stream)` on x's device and stream.
template <typename Start>
void launch(const Checks& checks, const Tensor& x, int64_t columns, Start start) {
  const int index = x.get_device_index();
  make_current(index);
  const DeviceInfo info = device_info(index);
  const Path* path = path_for(info.capability);
  const int status = path == nullptr ? kNotCovered
                                     : start(*path, Device{info.multiprocessors, info.max_shared_memory}, current_stream(index));
  if (status == kNotCovered) {
    const std::string reason = refusal(checks.op, x.size(1), columns, info.capability, info.max_shared_memory);
    checks.refuse(describe(checks.op, x, columns), ": ", reason.empty() ? "no kernel on the forced path" : reason);
  }
  check_cuda(status, checks.op, path->name);
}

constexpr Checks kStem{"stem"}, kPatchStem{"patch_stem"}, kDownsample{"downsample"}, kHead{"head"}, kPatches{"normalised_patches"},
    kGemm{"downsample_gemm"};

struct StemArguments {
  const Tensor &x, &conv1_weight, &norm1_weight, &norm1_bias, &conv2_weight, &conv2_bias, &norm2_weight, &norm2_bias;
};

int64_t half_up(int64_t n) { return (n + 1) / 2; }

void check(const StemArguments& a) {
  check_pixels(kStem, a.x, 1);
  kStem.shape("conv2_weight", a.conv2_weight, {-1, 9, -1}, "[channels, 9 taps, channels / 2]");
  const int64_t dim = a.conv2_weight.size(0);
  kStem.weight("conv1_weight", a.conv1_weight, a.x, {dim / 2, 32}, "[channels / 2, 32]");
  kStem.weight("conv2_weight", a.conv2_weight, a.x, {dim, 9, dim / 2}, "[channels, 9 taps, channels / 2]");
  kStem.vector("norm1_weight", a.norm1_weight, a.x, dim / 2, "[channels / 2]");
  kStem.vector("norm1_bias", a.norm1_bias, a.x, dim / 2, "[channels / 2]");
  kStem.vector("conv2_bias", a.conv2_bias, a.x, dim, "[channels]");
  kStem.vector("norm2_weight", a.norm2_weight, a.x, dim, "[channels]");
  kStem.vector("norm2_bias", a.norm2_bias, a.x, dim, "[channels]");
  check_output(kStem, a.x, half_up(half_up(a.x.size(2))), half_up(half_up(a.x.size(3))), dim);
}

void check(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& norm_weight, const Tensor& norm_bias) {
  check_pixels(kPatchStem, x, 4);
  kPatchStem.shape("weight", weight, {-1, 48}, "[channels, 4 x 4 x 3]");
  const int64_t dim = weight.size(0);
  kPatchStem.weight("weight", weight, x, {dim, 48}, "[channels, 4 x 4 x 3]");
  kPatchStem.vector("bias", bias, x, dim, "[channels]");
  kPatchStem.vector("norm_weight", norm_weight, x, dim, "[channels]");
  kPatchStem.vector("norm_bias", norm_bias, x, dim, "[channels]");
  check_output(kPatchStem, x, x.size(2) / 4, x.size(3) / 4, dim);
}

void check_image(const Checks& checks, const Tensor& x) {
  checks.image("x", x);
  if (x.size(2) < 2 || x.size(3) < 2) {
    checks.refuse("x has shape ", show(x.sizes()), "; height and width must be at least 2");
  }
}

void check(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  check_image(kDownsample, x);
  kDownsample.shape("weight", weight, {-1, 4 * x.size(1)}, "[columns, 2 x 2 x channels]");
  kDownsample.weight("weight", weight, x, {weight.size(0), 4 * x.size(1)}, "[columns, 2 x 2 x channels]");
  kDownsample.vector("bias", bias, x, weight.size(0), "[columns]");
  check_output(kDownsample, x, x.size(2) / 2, x.size(3) / 2, weight.size(0));
}

void check_gemm(const Tensor& x, const Tensor& weight, const Tensor& vectors, int64_t tile) {
  check_image(kGemm, x);
  kGemm.shape("weight", weight, {-1, 4 * x.size(1)}, "[columns, 2 x 2 x channels]");
  kGemm.weight("weight", weight, x, {weight.size(0), 4 * x.size(1)}, "[columns, 2 x 2 x channels]");
  kGemm.vector("vectors", vectors, x, sm90::kTapVectors * weight.size(0), "[(1 + taps) x columns]");
  if (tile < 0 || tile > sm90::kDownsampleGemmTileCount) {
    kGemm.refuse("tile is ", tile, "; supported are 1 to ", sm90::kDownsampleGemmTileCount, ", and 0 for the planner's choice");
  }
  if (tile > 0 && !sm90::tile_supports(static_cast<int>(weight.size(0)), static_cast<int>(tile) - 1)) {
    kGemm.refuse("tile ", tile, " has ", sm90::kDownsampleGemmTiles[tile - 1].columns, " columns; weight has ", weight.size(0),
                 ", which is no multiple");
  }
  check_output(kGemm, x, x.size(2) / 2, x.size(3) / 2, weight.size(0));
}

}  // namespace

Tensor stem(const Tensor& x, const Tensor& conv1_weight, const Tensor& norm1_weight, const Tensor& norm1_bias,
            const Tensor& conv2_weight, const Tensor& conv2_bias, const Tensor& norm2_weight, const Tensor& norm2_bias,
            const std::string& activation, double eps1, double eps2, bool has_norm) {
  check(StemArguments{x, conv1_weight, norm1_weight, norm1_bias, conv2_weight, conv2_bias, norm2_weight, norm2_bias});
  const Activation act = parse_activation(kStem, activation);
  kStem.cuda("x", x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t dim = conv2_weight.size(0);
  const Tensor y = empty_image(x, dim, half_up(half_up(x.size(2))), half_up(half_up(x.size(3))));
  if (x.numel() == 0) return y;
  const Stem arguments{image(x), static_cast<int>(dim), dtype_of(x), act, has_norm, static_cast<float>(eps1),
                       static_cast<float>(eps2), conv1_weight.const_data_ptr(), floats(norm1_weight), floats(norm1_bias),
                       conv2_weight.const_data_ptr(), floats(conv2_bias), floats(norm2_weight), floats(norm2_bias),
                       y.mutable_data_ptr()};
  launch(kStem, x, dim, [&](const Path& path, const Device& device, cudaStream_t stream) {
    return path.stem(arguments, device, stream);
  });
  return y;
}

Tensor patch_stem(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& norm_weight, const Tensor& norm_bias,
                  double eps, bool has_norm) {
  check(x, weight, bias, norm_weight, norm_bias);
  kPatchStem.cuda("x", x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t dim = weight.size(0);
  const Tensor y = empty_image(x, dim, x.size(2) / 4, x.size(3) / 4);
  if (y.numel() == 0) return y;
  const PatchStem arguments{image(x), static_cast<int>(dim), dtype_of(x), has_norm, static_cast<float>(eps),
                            weight.const_data_ptr(), floats(bias), floats(norm_weight), floats(norm_bias), y.mutable_data_ptr()};
  launch(kPatchStem, x, dim, [&](const Path& path, const Device& device, cudaStream_t stream) {
    return path.patch_stem(arguments, device, stream);
  });
  return y;
}

Tensor downsample(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, bool has_norm) {
  check(x, weight, bias);
  kDownsample.cuda("x", x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t columns = weight.size(0);
  const Tensor y = empty_image(x, columns, x.size(2) / 2, x.size(3) / 2);
  if (y.numel() == 0) return y;
  const Downsample arguments{x.const_data_ptr(), static_cast<int>(x.size(0)), static_cast<int>(x.size(2)),
                             static_cast<int>(x.size(3)), static_cast<int>(x.size(1)), static_cast<int>(columns), dtype_of(x),
                             has_norm, static_cast<float>(eps), weight.const_data_ptr(), floats(bias), y.mutable_data_ptr()};
  launch(kDownsample, x, columns, [&](const Path& path, const Device& device, cudaStream_t stream) {
    return path.downsample(arguments, device, stream);
  });
  return y;
}

Tensor downsample_gemm(const Tensor& x, const Tensor& weight, const Tensor& vectors, double eps, bool has_norm, int64_t tile) {
  check_gemm(x, weight, vectors, tile);
  kGemm.cuda("x", x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t columns = weight.size(0);
  const Tensor y = empty_image(x, columns, x.size(2) / 2, x.size(3) / 2);
  if (y.numel() == 0) return y;
  const DownsampleGemm arguments{x.const_data_ptr(), static_cast<int>(x.size(0)), static_cast<int>(x.size(2)),
                                 static_cast<int>(x.size(3)), static_cast<int>(x.size(1)), static_cast<int>(columns), dtype_of(x),
                                 has_norm, static_cast<float>(eps), weight.const_data_ptr(), floats(vectors), y.mutable_data_ptr(),
                                 static_cast<int>(tile)};
  launch(kGemm, x, columns, [&](const Path& path, const Device& device, cudaStream_t stream) {
    return path.downsample_gemm == nullptr ? kNotCovered : path.downsample_gemm(arguments, device, stream);
  });
  return y;
}

Tensor normalised_patches(const Tensor& x, double eps, bool has_norm) {
  check_image(kPatches, x);
  kPatches.cuda("x", x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t sizes[2] = {x.size(0) * (x.size(2) / 2) * (x.size(3) / 2), 4 * x.size(1)};
  const Tensor patches = torch::stable::empty({sizes, 2}, x.scalar_type(), std::nullopt, x.device());
  if (patches.numel() == 0) return patches;
  const Gather arguments{x.const_data_ptr(), static_cast<int>(x.size(0)), static_cast<int>(x.size(2)),
                         static_cast<int>(x.size(3)), static_cast<int>(x.size(1)), dtype_of(x), has_norm, static_cast<float>(eps),
                         patches.mutable_data_ptr()};
  launch(kPatches, x, 4 * x.size(1), [&](const Path& path, const Device& device, cudaStream_t stream) {
    return path.gather(arguments, device, stream);
  });
  return patches;
}

Tensor head(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  kHead.image("x", x);
  kHead.shape("weight", weight, {-1, x.size(1)}, "[classes, channels]");
  kHead.weight("weight", weight, x, {weight.size(0), x.size(1)}, "[classes, channels]");
  kHead.vector("bias", bias, x, weight.size(0), "[classes]");
  kHead.cuda("x", x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t sizes[2] = {x.size(0), weight.size(0)};
  const Tensor y = torch::stable::empty({sizes, 2}, x.scalar_type(), std::nullopt, x.device());
  if (y.numel() == 0) return y;
  const Head arguments{x.const_data_ptr(), static_cast<int>(x.size(0)), static_cast<int>(x.size(2) * x.size(3)),
                       static_cast<int>(x.size(1)), static_cast<int>(weight.size(0)), dtype_of(x), static_cast<float>(eps),
                       weight.const_data_ptr(), floats(bias), y.mutable_data_ptr()};
  launch(kHead, x, weight.size(0), [&](const Path& path, const Device& device, cudaStream_t stream) {
    return path.head(arguments, device, stream);
  });
  return y;
}

std::string stem_check(const Tensor& x, const Tensor& conv1_weight, const Tensor& norm1_weight, const Tensor& norm1_bias,
                       const Tensor& conv2_weight, const Tensor& conv2_bias, const Tensor& norm2_weight, const Tensor& norm2_bias,
                       const std::string& activation, double, double, bool) {
  check(StemArguments{x, conv1_weight, norm1_weight, norm1_bias, conv2_weight, conv2_bias, norm2_weight, norm2_bias});
  parse_activation(kStem, activation);
  return describe("stem", x, conv2_weight.size(0));
}

std::string patch_stem_check(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& norm_weight,
                             const Tensor& norm_bias, double, bool) {
  check(x, weight, bias, norm_weight, norm_bias);
  return describe("patch_stem", x, weight.size(0));
}

std::string downsample_check(const Tensor& x, const Tensor& weight, const Tensor& bias, double, bool) {
  check(x, weight, bias);
  return describe("downsample", x, weight.size(0));
}

std::string downsample_gemm_check(const Tensor& x, const Tensor& weight, const Tensor& vectors, double, bool, int64_t tile) {
  check_gemm(x, weight, vectors, tile);
  return describe("downsample_gemm", x, weight.size(0));
}

std::string plan_downsample_gemm(int64_t pixels, int64_t channels, int64_t columns, int64_t multiprocessors) {
  if (pixels < 1 || multiprocessors < 1 || !sm90::downsample_gemm_supports(channels, columns)) return "";
  const sm90::DownsampleGemmPlan plan =
      sm90::plan_downsample_gemm(pixels, static_cast<int>(channels), static_cast<int>(columns), static_cast<int>(multiprocessors));
  std::ostringstream out;
  const sm90::DownsampleGemmTile& tile = sm90::kDownsampleGemmTiles[plan.tile];
  out << "{\"rows\": " << tile.rows() << ", \"columns\": " << tile.columns << ", \"steps\": " << plan.steps << ", \"grid\": " << plan.grid << ", \"rounds\": "
      << plan.rounds << ", \"shared_memory\": " << plan.shared_memory << ", \"cost_us\": " << plan.cost << "}";
  return out.str();
}

std::string refusal(const std::string& op, int64_t channels, int64_t columns, int64_t capability, int64_t max_shared_memory) {
  const Path* path = path_for(static_cast<int>(capability));
  if (path == nullptr) {
    const Path* portable = sm80_path();
    const bool gated = portable != nullptr && capability >= portable->min_capability && forced_path().empty();
    return gated ? "its kernels have not been tested on a GPU of compute capability " + std::to_string(capability) +
                       " yet; force_path('sm80') asks for them"
                 : "this build has no such kernels for compute capability " + std::to_string(capability);
  }
  const auto shared = [&](int64_t bytes) {
    return bytes <= max_shared_memory ? std::string()
                                      : "it needs " + std::to_string(bytes) + " bytes of shared memory, and the device gives " +
                                            std::to_string(max_shared_memory);
  };
  const bool hopper = path->max_capability == 90;
  if (op == "stem") {
    for (int dim : {32, 64, 96, 128}) {
      if (columns == dim) return shared(stem_layout(dim / 2, hopper).end(1));
    }
    return "its width is " + std::to_string(columns) + "; supported are 32, 64, 96 and 128";
  }
  if (op == "patch_stem") {
    for (int dim : {48, 64, 80, 96, 128}) {
      if (columns == dim) return "";
    }
    return "its width is " + std::to_string(columns) + "; supported are 48, 64, 80, 96 and 128";
  }
  if (op == "downsample") {
    for (int known : {32, 64, 96}) {
      if (known != channels || columns != 2 * channels || (known == 96 && !hopper)) continue;
      return shared(hopper ? hopper_downsample_layout(known).end(1, hopper_downsample_tile(known).slots) : downsample_layout(known).end);
    }
    return "it goes from " + std::to_string(channels) + " to " + std::to_string(columns) +
           " channels; supported are 32, 64 and, on compute capability 9.0, 96 to twice as many";
  }
  if (op == "downsample_gemm") {
    if (path->downsample_gemm == nullptr) return "this build has no such kernel for compute capability " + std::to_string(capability);
    if (!sm90::downsample_gemm_supports(channels, columns)) {
      return "it goes from " + std::to_string(channels) + " to " + std::to_string(columns) +
             " channels; supported are multiples of 64 to multiples of 128";
    }
    return shared(direct::sm90::kSharedMemory);
  }
  if (op == "head") {
    if (channels == 256 || channels == 512 || channels == 768 || channels == 1024) return "";
    return "it has " + std::to_string(channels) + " channels; supported are 256, 512, 768 and 1024";
  }
  if (op == "normalised_patches") {
    if (channels % 8 == 0 && channels >= 8 && channels <= kGatherWidest) return "";
    return "it has " + std::to_string(channels) + " channels; supported are multiples of 8 up to " + std::to_string(kGatherWidest);
  }
  throw std::runtime_error("refusal: op is '" + op + "'; known are 'stem', 'patch_stem', 'downsample', 'downsample_gemm', 'head' and "
                           "'normalised_patches'");
}

}  // namespace convfirst::patch
