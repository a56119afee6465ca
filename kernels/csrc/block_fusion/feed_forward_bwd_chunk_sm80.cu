// Kernels of feed_forward_bwd_chunk.h; each reads and writes everything once, norm_backward its rows a second time, from L1.
//
//   hidden_backward, scale_rows: a block owns 128 rows and 256 columns, a thread 8 columns of every eighth row
//
//             256 columns: lane l has 8l ... 8l + 7           | what           | where                               |
//           +------------------------------------+            | row's factor   | one load a row, from L1              |
//   row  0  | warp 0                              |            | S, D           | 16 bytes a thread, once each         |
//   row  1  | warp 1                              |            | column sums    | 8 registers a thread, then 8 KB of   |
//     ...   |  ...                                |            |                | shared memory: warps add in order    |
//   row  8  | warp 0                              |
//           +------------------------------------+
//
//   norm_backward: a warp a row.
#include "../common/activation.cuh"
#include "../common/launch.cuh"
#include "feed_forward_bwd_chunk.h"

namespace convfirst::block_fusion {
namespace sm80 {

constexpr int kChunkThreads = 256, kChunkWarps = kChunkThreads / 32;
constexpr int kChunkRows = 128, kChunkColumns = 256;
constexpr int kRowsInFlight = 4;  // of a warp

__device__ __forceinline__ float exp2_approx(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// h = act(s) and act'(s).
template <Activation kActivation>
__device__ __forceinline__ void activate_with_slope(float s, float& h, float& slope) {
  if constexpr (kActivation == Activation::kRelu) {
    h = relu(s), slope = s > 0.f ? 1.f : 0.f;
  } else if constexpr (kActivation == Activation::kSilu) {
    const float gate = fmaf(ptx::tanh_approx(0.5f * s), 0.5f, 0.5f);
    h = s * gate;
    slope = fmaf(h, 1.f - gate, gate);
  } else {
    const float gate = fmaf(ptx::tanh_approx(detail::half_logit(s)), 0.5f, 0.5f);
    h = s * gate;
    slope = fmaf(s * 0.398942280f, exp2_approx(s * s * -0.721347520f), gate);  // s times the normal density
  }
}

__device__ __forceinline__ float row_factor(const SampleFactors& f, int64_t row) {
  if (f.sample_scale == nullptr) return 1.f;
  return __ldg(f.sample_scale + static_cast<uint32_t>(row) / static_cast<uint32_t>(f.image_pixels));
}

// The warps' column sums, in order, to the block's row of `sums`.
__device__ __forceinline__ void add_warps(const float (&sum)[8], float* to, int columns) {
  __shared__ float4 parts[kChunkWarps][2][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  parts[warp][0][lane] = make_float4(sum[0], sum[1], sum[2], sum[3]);
  parts[warp][1][lane] = make_float4(sum[4], sum[5], sum[6], sum[7]);
  __syncthreads();
  const int column = blockIdx.x * kChunkColumns + threadIdx.x;
  if (column >= columns) return;
  const int owner = threadIdx.x / 8, part = threadIdx.x % 8;
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < kChunkWarps; ++w) total += reinterpret_cast<const float*>(&parts[w][part / 4][owner])[part % 4];
  to[static_cast<int64_t>(blockIdx.y) * columns + column] = total;
}

// S and D of one row and eight columns; adds dS to the column sums.
template <typename T, Activation kActivation>
__device__ __forceinline__ void backward_values(uint4& s, uint4& d, float (&sum)[8]) {
  uint32_t* const before = &s.x;
  uint32_t* const grad = &d.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 v = ptx::unpack2<T>(before[i]), g = ptx::unpack2<T>(grad[i]);
    float2 h, slope;
    activate_with_slope<kActivation>(v.x, h.x, slope.x);
    activate_with_slope<kActivation>(v.y, h.y, slope.y);
    const float2 ds = make_float2(g.x * slope.x, g.y * slope.y);
    before[i] = ptx::pack2<T>(h.x, h.y);
    grad[i] = ptx::pack2<T>(ds.x, ds.y);
    sum[2 * i] += ds.x, sum[2 * i + 1] += ds.y;
  }
}

template <typename T, Activation kActivation>
__global__ void __launch_bounds__(kChunkThreads) hidden_backward_sm80(ChunkRows c, uint4* before, uint4* grad, float* sums) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, vectors = c.columns / 8;
  const int vector = blockIdx.x * (kChunkColumns / 8) + lane;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kChunkRows;
  float sum[8] = {};
  if (vector < vectors) {
#pragma unroll 1
    for (int i = warp; i < kChunkRows; i += kChunkWarps * kRowsInFlight) {
      uint4 s[kRowsInFlight], d[kRowsInFlight];
#pragma unroll
      for (int j = 0; j < kRowsInFlight; ++j) {
        const int64_t row = first + i + j * kChunkWarps;
        if (row < c.rows) s[j] = before[row * vectors + vector], d[j] = grad[row * vectors + vector];
      }
#pragma unroll
      for (int j = 0; j < kRowsInFlight; ++j) {
        const int64_t row = first + i + j * kChunkWarps;
        if (row >= c.rows) continue;
        backward_values<T, kActivation>(s[j], d[j], sum);
        before[row * vectors + vector] = s[j], grad[row * vectors + vector] = d[j];
      }
    }
  }
  add_warps(sum, sums, c.columns);
}

template <typename T>
__global__ void __launch_bounds__(kChunkThreads) scale_rows_sm80(ChunkRows c, SampleFactors factors, const uint4* grad, uint4* scaled, float* sums) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, vectors = c.columns / 8;
  const int vector = blockIdx.x * (kChunkColumns / 8) + lane;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kChunkRows;
  float sum[8] = {};
  if (vector < vectors) {
#pragma unroll 4
    for (int i = warp; i < kChunkRows; i += kChunkWarps) {
      const int64_t row = first + i;
      if (row >= c.rows) continue;
      const uint4 d = __ldg(grad + row * vectors + vector);
      const float factor = row_factor(factors, row);
      uint32_t words[4] = {d.x, d.y, d.z, d.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float2 g = ptx::unpack2<T>(words[j]);
        words[j] = ptx::pack2<T>(factor * g.x, factor * g.y);
        g = ptx::unpack2<T>(words[j]);
        sum[2 * j] += g.x, sum[2 * j + 1] += g.y;
      }
      if (scaled != nullptr) scaled[row * vectors + vector] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
  add_warps(sum, sums, c.columns);
}

__device__ __forceinline__ float add_lanes(float v) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(0xffffffffu, v, distance);
  return v;
}

template <typename T>
__global__ void __launch_bounds__(kChunkThreads)
    norm_backward_sm80(int64_t rows, int columns, uint4* da, const uint4* a, const float* rstd, const float* unit) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, vectors = columns / 8;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kChunkWarps + warp;
  if (row >= rows) return;
  uint4* const gradients = da + row * vectors;
  const uint4* const values = a + row * vectors;
  const float factor = __ldg(unit) * (rstd != nullptr ? __ldg(rstd + row) : 1.f);
  float sum = 0.f, product = 0.f;
  if (rstd != nullptr) {
#pragma unroll 4
    for (int i = lane; i < vectors; i += 32) {
      const uint4 gradient = gradients[i], value = __ldg(values + i);
      const uint32_t g[4] = {gradient.x, gradient.y, gradient.z, gradient.w}, v[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 x = ptx::unpack2<T>(g[j]), y = ptx::unpack2<T>(v[j]);
        sum += x.x + x.y;
        product = fmaf(x.x, y.x, fmaf(x.y, y.y, product));
      }
    }
    sum = add_lanes(sum) / columns, product = add_lanes(product) / columns;
  }
#pragma unroll 4
  for (int i = lane; i < vectors; i += 32) {
    const uint4 gradient = gradients[i], value = rstd != nullptr ? __ldg(values + i) : make_uint4(0, 0, 0, 0);
    const uint32_t g[4] = {gradient.x, gradient.y, gradient.z, gradient.w}, v[4] = {value.x, value.y, value.z, value.w};
    uint32_t r[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 x = ptx::unpack2<T>(g[j]), y = ptx::unpack2<T>(v[j]);
      r[j] = ptx::pack2<T>(factor * (x.x - fmaf(y.x, product, sum)), factor * (x.y - fmaf(y.y, product, sum)));
    }
    gradients[i] = make_uint4(r[0], r[1], r[2], r[3]);
  }
}

dim3 chunk_grid(const ChunkRows& c) {
  return dim3((c.columns + kChunkColumns - 1) / kChunkColumns, static_cast<unsigned>(chunk_row_blocks(c.rows)));
}

template <typename T>
int start_hidden(Activation activation, const ChunkRows& c, void* before, void* grad, float* sums, cudaStream_t stream) {
  const auto start = [&](auto kernel) {
    kernel<<<chunk_grid(c), kChunkThreads, 0, stream>>>(c, static_cast<uint4*>(before), static_cast<uint4*>(grad), sums);
    return static_cast<int>(cudaGetLastError());
  };
  if (activation == Activation::kRelu) return start(hidden_backward_sm80<T, Activation::kRelu>);
  if (activation == Activation::kSilu) return start(hidden_backward_sm80<T, Activation::kSilu>);
  return start(hidden_backward_sm80<T, Activation::kGelu>);
}

template <typename T>
int start_scale(const ChunkRows& c, const SampleFactors& factors, const void* grad, void* scaled, float* sums, cudaStream_t stream) {
  scale_rows_sm80<T><<<chunk_grid(c), kChunkThreads, 0, stream>>>(c, factors, static_cast<const uint4*>(grad), static_cast<uint4*>(scaled), sums);
  return static_cast<int>(cudaGetLastError());
}

template <typename T>
int start_norm(int64_t rows, int columns, void* da, const void* a, const float* rstd, const float* unit, cudaStream_t stream) {
  const int grid = static_cast<int>((rows + kChunkWarps - 1) / kChunkWarps);
  return start_kernel(norm_backward_sm80<T>, grid, kChunkThreads, 0, stream, rows, columns, static_cast<uint4*>(da),
                      static_cast<const uint4*>(a), rstd, unit);
}

}  // namespace sm80

int64_t chunk_row_blocks(int64_t rows) { return (rows + sm80::kChunkRows - 1) / sm80::kChunkRows; }

int hidden_backward(DType dtype, Activation activation, const ChunkRows& chunk, void* before, void* grad, float* sums, cudaStream_t stream) {
  return dtype == DType::kHalf ? sm80::start_hidden<__half>(activation, chunk, before, grad, sums, stream)
                               : sm80::start_hidden<__nv_bfloat16>(activation, chunk, before, grad, sums, stream);
}

int scale_rows(DType dtype, const ChunkRows& chunk, const SampleFactors& factors, const void* grad, void* scaled, float* sums,
               cudaStream_t stream) {
  return dtype == DType::kHalf ? sm80::start_scale<__half>(chunk, factors, grad, scaled, sums, stream)
                               : sm80::start_scale<__nv_bfloat16>(chunk, factors, grad, scaled, sums, stream);
}

int norm_backward(DType dtype, int64_t rows, int columns, void* da, const void* a, const float* rstd, const float* unit, cudaStream_t stream) {
  return dtype == DType::kHalf ? sm80::start_norm<__half>(rows, columns, da, a, rstd, unit, stream)
                               : sm80::start_norm<__nv_bfloat16>(rows, columns, da, a, rstd, unit, stream);
}

}  // namespace convfirst::block_fusion
