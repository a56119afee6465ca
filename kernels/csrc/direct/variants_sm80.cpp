// The portable path's rows of the planner's table: one kernel, with the operands of each direction.
#include <iterator>

#include "implicit_gemm_sm80.h"

namespace convfirst::direct {
namespace sm80 {
namespace {

constexpr int64_t kMaxElements = int64_t{1} << 31;
constexpr int kMaxSide = 1 << 13;  // rows and columns, padding included, are packed into 16 bits

int element_bytes(const Problem& q) { return q.dtype == DType::kFloat ? 4 : 2; }

Copying copying(const Problem& q) {
  const int chunk = 16 / element_bytes(q);
  if (q.direction == Direction::kWgrad || (q.direction == Direction::kDgrad ? q.filters : q.channels) % chunk != 0) return Copying::kScalar;
  return q.direction == Direction::kDgrad && (q.stride_h > 1 || q.stride_w > 1) ? Copying::kVectorDivide : Copying::kVector;
}

GemmParams params_of(const Problem& q) {
  GemmParams p{};
  const bool dgrad = q.direction == Direction::kDgrad;
  p.operands = q.direction == Direction::kWgrad ? Operands::kFilters : Operands::kPixels;
  p.height = dgrad ? q.out_h() : q.height, p.width = dgrad ? q.out_w() : q.width, p.channels = dgrad ? q.filters : q.channels;
  p.grid_h = dgrad ? q.height : q.out_h(), p.grid_w = dgrad ? q.width : q.out_w();
  p.kernel_w = q.kernel_w;
  if (dgrad) {  // of input row h meets tap r output row (h + pad - r dilation) / stride
    p.mul_h = p.mul_w = 1, p.off_h = q.pad_h, p.off_w = q.pad_w;
    p.step_h = -q.dilation_h, p.step_w = -q.dilation_w, p.div_h = q.stride_h, p.div_w = q.stride_w;
  } else {
    p.mul_h = q.stride_h, p.mul_w = q.stride_w, p.off_h = -q.pad_h, p.off_w = -q.pad_w;
    p.step_h = q.dilation_h, p.step_w = q.dilation_w, p.div_h = p.div_w = 1;
  }
  const int64_t pixels = q.batch * p.grid_h * p.grid_w;
  if (p.operands == Operands::kPixels) {
    p.rows = pixels, p.columns = dgrad ? q.channels : q.filters, p.depth = q.taps() * p.channels;
  } else {
    p.rows = q.filters, p.columns = q.taps() * q.channels, p.depth = static_cast<int>(pixels);
  }
  const int step = kDepthBytes / element_bytes(q);
  p.steps = (p.depth + step - 1) / step;
  p.tiles_n = (p.columns + kColumns - 1) / kColumns;
  p.units = (p.rows + kRows - 1) / kRows * p.tiles_n * p.steps;
  p.activation = q.direction == Direction::kForward ? q.activation : Activation::kNone;
  return p;
}

int blocks_of(const GemmParams& p, const Device& d) {
  constexpr int64_t kLeastSteps = 4;  // a smaller share costs more to add up than it saves
  const int resident = d.max_shared_memory + 1024 >= 2 * (kSharedBytes + 1024) ? 2 : 1;
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(d.multiprocessors * resident, p.units / kLeastSteps)));
}

int64_t align(int64_t bytes) { return (bytes + 255) / 256 * 256; }

int64_t partial_bytes(int blocks) { return blocks > 1 ? align(int64_t{2} * blocks * kPartialBytes) : 0; }

int64_t filter_bytes(const Problem& q) { return q.direction == Direction::kDgrad ? align(int64_t{element_bytes(q)} * q.filters * q.taps() * q.channels) : 0; }

template <DType kDType>
int launch_dtype(const Problem& q, const GemmParams& p, int blocks, cudaStream_t stream) {
  switch (copying(q)) {
    case Copying::kVector: return Gemm<kDType, Copying::kVector>::launch(p, blocks, stream);
    case Copying::kVectorDivide: return Gemm<kDType, Copying::kVectorDivide>::launch(p, blocks, stream);
    default: return Gemm<kDType, Copying::kScalar>::launch(p, blocks, stream);
  }
}

template <DType kDType>
const void* kernel_dtype(const Problem& q) {
  switch (copying(q)) {
    case Copying::kVector: return Gemm<kDType, Copying::kVector>::kernel();
    case Copying::kVectorDivide: return Gemm<kDType, Copying::kVectorDivide>::kernel();
    default: return Gemm<kDType, Copying::kScalar>::kernel();
  }
}

template <Direction kDirection>
struct Row {
  static bool supports(const Problem& q, const Device& d) {
    const auto fits = [](int size, int pad) { return size + 2 * pad <= kMaxSide; };
    return q.direction == kDirection && q.out_pixels() > 0 && kSharedBytes <= d.max_shared_memory &&
           q.batch * q.height * q.width * q.channels < kMaxElements && q.out_pixels() * q.filters < kMaxElements &&
           int64_t{q.filters} * q.taps() * q.channels < kMaxElements && fits(q.height, q.pad_h) && fits(q.width, q.pad_w) &&
           (q.kernel_h - 1) * q.dilation_h < kMaxSide && (q.kernel_w - 1) * q.dilation_w < kMaxSide;
  }
  static Config configure(const Problem& q, const Device& d) {
    const GemmParams p = params_of(q);
    Config c{};
    c.tile_pixels = kRows, c.hidden_chunk = kColumns, c.stages = kStages, c.threads = kThreads, c.grid = blocks_of(p, d);
    c.shared_memory = kSharedBytes, c.launches = 1 + (c.grid > 1) + (kDirection == Direction::kDgrad);
    c.workspace = partial_bytes(c.grid) + filter_bytes(q);
    return c;
  }
  static double cost(const Problem& q, const Device& d, const Config&) {
    const GemmParams p = params_of(q);
    // Measured: 34 TFLOP/s in float32, where sums fill tiles.
    const double clocks_a_step = q.dtype == DType::kFloat ? 3250 : 600, slow = copying(q) == Copying::kScalar ? 8 : 1;
    return 25 + slow * p.units * clocks_a_step / (d.multiprocessors * 1600.0);
  }
  static int launch(const Problem& q, const Tensors& t, const Config& c, void* workspace, cudaStream_t stream) {
    GemmParams p = params_of(q);
    p.source = t.x, p.matrix = t.weight, p.bias = t.bias, p.result = t.result;
    p.partials = static_cast<float*>(workspace);
    if (kDirection == Direction::kWgrad) p.matrix = t.y;
    if (kDirection == Direction::kDgrad) {
      char* filters = static_cast<char*>(workspace) + partial_bytes(c.grid);
      if (const int error = transpose_all_filters(q, t.weight, filters, stream)) return error;
      p.source = t.y, p.matrix = filters;
    }
    if (q.dtype == DType::kFloat) return launch_dtype<DType::kFloat>(q, p, c.grid, stream);
    return q.dtype == DType::kHalf ? launch_dtype<DType::kHalf>(q, p, c.grid, stream) : launch_dtype<DType::kBFloat16>(q, p, c.grid, stream);
  }
  static const void* kernel(const Problem& q) {
    if (q.dtype == DType::kFloat) return kernel_dtype<DType::kFloat>(q);
    return q.dtype == DType::kHalf ? kernel_dtype<DType::kHalf>(q) : kernel_dtype<DType::kBFloat16>(q);
  }
  static constexpr Variant row(const char* name) { return {name, 80, 999, supports, configure, cost, launch, kernel}; }
};

constexpr Variant kTable[] = {Row<Direction::kForward>::row("sm80_forward"), Row<Direction::kDgrad>::row("sm80_dgrad"),
                              Row<Direction::kWgrad>::row("sm80_wgrad")};

}  // namespace
}  // namespace sm80

const Variant* sm80_variants(int* count) {
  *count = static_cast<int>(std::size(sm80::kTable));
  return sm80::kTable;
}

}  // namespace convfirst::direct
