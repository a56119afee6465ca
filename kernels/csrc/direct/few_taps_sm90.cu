// First layers whose filters have at most 32 values (3x3 of RGB: 27): one launch, no shared memory, bound by the stores of y.
//
//   x in memory, one row:  .. r g b r g b r g b ..          A fragment of mma.m16n8k16: 16 output pixels, depth (r, s, c) as in a filter
//                             |<- s, c of a tap row ->|     every thread loads its 16 values of two pixels from L1: a row of a filter is
//                                                           one piece of memory, whatever its channels, so value k lies at (k / row, k % row)
//
//   one warp = 16 output pixels x 64 filters at a time; the next pixels' values are on their way while these are multiplied.
//
//   what              where                                           written by        released when
//   filters           registers, both operands of 8 x 2 products      once              -
//   x                 registers, 16 values a thread, two sets         loads             packed
//   sums              registers, 32                                   mma               stored
//   output            global, 16 bytes a thread                       -                 -
//
//   Columns are permuted as in implicit_gemm_sm90_wgmma.cuh, so that a thread has 8 neighbouring filters of a pixel.
#include "common/activation.cuh"
#include "common/launch.cuh"
#include "common/sm90.cuh"
#include "few_taps_sm90.h"

namespace convfirst::direct::sm90 {

using namespace convfirst::sm90;

constexpr int kTiles = kFewColumns / 8, kSteps = kFewDepth / 16, kValues = 4 * kSteps;  // kValues: of a pixel in a thread

struct FewParams {
  const uint16_t* x;
  const uint16_t* weight;
  const float* bias;
  void* y;
  int pixels, out_w, out_hw;
  int height, row, filters;        // row: values of a row of x
  int kernel_h, filter_row, depth;  // filter_row: values of a row of a filter
  int stride_h, step_w, pad_h, pad_w;  // step_w, pad_w: in values
  Activation activation;
};

// The values of a filter's window that a thread multiplies: number v is value 8 (v / 2) + 2 (lane % 4) + v % 2.
struct Window {
  int offset[kValues];  // in x, from the window's first value; 0 beyond the filter's values
  __device__ __forceinline__ Window(const FewParams& p, int lane) {
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      const int k = value(v, lane), r = k / p.filter_row;
      offset[v] = k < p.depth ? r * p.row + k - r * p.filter_row : 0;
    }
  }
  static __device__ __forceinline__ int value(int v, int lane) { return v / 2 * 8 + lane % 4 * 2 + v % 2; }
};

struct Pixel {
  int64_t first;  // value of x that its window begins with
  int h, j;       // the window's row, and its first value within the row
  bool exists, inside;
  __device__ __forceinline__ Pixel(const FewParams& p, int index) : exists(index < p.pixels) {
    const int n = index / p.out_hw, pq = index - n * p.out_hw, out_p = pq / p.out_w;
    h = out_p * p.stride_h - p.pad_h, j = (pq - out_p * p.out_w) * p.step_w - p.pad_w;
    first = (static_cast<int64_t>(n) * p.height + h) * p.row + j;
    inside = exists && h >= 0 && h + p.kernel_h <= p.height && j >= 0 && j + p.filter_row <= p.row;
  }
};

// What lies beyond the image or the filter is zero.
__device__ __forceinline__ void load(uint16_t (&values)[kValues], const FewParams& p, const Window& window, const Pixel& pixel, int lane) {
  if (pixel.inside) {
    const uint16_t* x = p.x + pixel.first;
#pragma unroll
    for (int v = 0; v < kValues; ++v) values[v] = Window::value(v, lane) < p.depth ? __ldg(x + window.offset[v]) : uint16_t{0};
    return;
  }
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    const int k = Window::value(v, lane), r = k / p.filter_row, h = pixel.h + r, j = pixel.j + k - r * p.filter_row;
    const bool valid = pixel.exists && k < p.depth && h >= 0 && h < p.height && j >= 0 && j < p.row;
    values[v] = valid ? __ldg(p.x + pixel.first + window.offset[v]) : uint16_t{0};
  }
}

__device__ __forceinline__ float activate(float v, Activation activation) {
  if (activation == Activation::kNone) return v;
  if (activation == Activation::kRelu) return relu(v);
  return activation == Activation::kSilu ? silu(v) : gelu(v);
}

// Both operands' halves of all products: value k of a filter in the permuted column.
__device__ __forceinline__ void load_filters(uint32_t (&b)[kTiles][2 * kSteps], const FewParams& p, int first_filter, int lane) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int n = lane / 4, filter = first_filter + tile / 4 * 32 + n / 2 * 8 + tile % 4 * 2 + n % 2;
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) {
      const int k = i * 8 + lane % 4 * 2;
      const auto value = [&](int at) {
        return filter < p.filters && at < p.depth ? __ldg(p.weight + static_cast<int64_t>(filter) * p.depth + at) : uint16_t{0};
      };
      b[tile][i] = value(k) | static_cast<uint32_t>(value(k + 1)) << 16;
    }
  }
}

template <class Element>
__device__ __forceinline__ void store(const float (&sums)[kTiles][4], const FewParams& p, int first_pixel, int first_filter, int lane) {
#pragma unroll
  for (int block = 0; block < kTiles / 4; ++block) {
    const int filter = first_filter + 32 * block + lane % 4 * 8;
    if (filter >= p.filters) continue;
    float bias[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) bias[i] = p.bias == nullptr ? 0.f : __ldg(p.bias + filter + i);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int pixel = first_pixel + lane / 4 + 8 * r;
      uint32_t v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* s = sums[4 * block + i] + 2 * r;
        v[i] = pack2<Element>(activate(s[0] + bias[2 * i], p.activation), activate(s[1] + bias[2 * i + 1], p.activation));
      }
      if (pixel < p.pixels) {
        *reinterpret_cast<uint4*>(static_cast<Element*>(p.y) + static_cast<int64_t>(pixel) * p.filters + filter) = make_uint4(v[0], v[1], v[2], v[3]);
      }
    }
  }
}

template <class Element>
__global__ void __launch_bounds__(kFewThreads, kFewBlocks) few_taps_sm90(const __grid_constant__ FewParams p) {
  const int lane = threadIdx.x % 32, first_filter = blockIdx.y * kFewColumns;
  const int step = gridDim.x * (kFewThreads / 32) * 16;
  const Window window(p, lane);
  wait_for_previous_launch();
  allow_next_launch();
  uint32_t filters[kTiles][2 * kSteps];
  int pixel = (blockIdx.x * (kFewThreads / 32) + threadIdx.x / 32) * 16;
  uint16_t values[2][kValues];
  const auto fetch = [&](int first) {
#pragma unroll
    for (int r = 0; r < 2; ++r) load(values[r], p, window, Pixel(p, first + lane / 4 + 8 * r), lane);
  };
  fetch(pixel);
  load_filters(filters, p, first_filter, lane);
#pragma unroll 1
  for (; pixel < p.pixels; pixel += step) {
    uint32_t a[kSteps][4];
#pragma unroll
    for (int i = 0; i < 4 * kSteps; ++i) {
      const int pair = i / 2;  // 16 step + 8 half
      a[pair / 2][pair % 2 * 2 + i % 2] = values[i % 2][2 * pair] | static_cast<uint32_t>(values[i % 2][2 * pair + 1]) << 16;
    }
    fetch(pixel + step < p.pixels ? pixel + step : p.pixels);
    float sums[kTiles][4];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[tile][i] = 0.f;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) mma_16816<Element>(sums[tile], a[s], filters[tile][2 * s], filters[tile][2 * s + 1]);
    }
    store<Element>(sums, p, pixel, first_filter, lane);
  }
}

namespace {

template <typename Kernel>
int start(Kernel kernel, const FewPlan& plan, cudaStream_t stream, const FewParams& p) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.grid_x, plan.grid_y), config.blockDim = kFewThreads, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = 1;
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, p));
}

}  // namespace

int launch_few(const Problem& q, const Tensors& t, const FewPlan& plan, cudaStream_t stream) {
  FewParams p{};
  p.x = static_cast<const uint16_t*>(t.x), p.weight = static_cast<const uint16_t*>(t.weight), p.bias = t.bias, p.y = t.result;
  p.pixels = static_cast<int>(q.out_pixels()), p.out_w = q.out_w(), p.out_hw = q.out_h() * q.out_w();
  p.height = q.height, p.row = q.width * q.channels, p.filters = q.filters;
  p.kernel_h = q.kernel_h, p.filter_row = q.kernel_w * q.channels, p.depth = q.taps() * q.channels;
  p.stride_h = q.stride_h, p.step_w = q.stride_w * q.channels, p.pad_h = q.pad_h, p.pad_w = q.pad_w * q.channels;
  p.activation = q.activation;
  return q.dtype == DType::kHalf ? start(&few_taps_sm90<__half>, plan, stream, p) : start(&few_taps_sm90<__nv_bfloat16>, plan, stream, p);
}

const void* few_kernel(DType dtype) {
  return dtype == DType::kHalf ? reinterpret_cast<const void*>(&few_taps_sm90<__half>) : reinterpret_cast<const void*>(&few_taps_sm90<__nv_bfloat16>);
}

}  // namespace convfirst::direct::sm90
