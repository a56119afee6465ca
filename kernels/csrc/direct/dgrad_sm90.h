// The input gradient on Hopper as implicit matrix products of the output's gradient with transposed filters: one for each phase of
// the stride, since the input pixels of a phase meet the same taps.
#pragma once

#include "implicit_gemm_sm90.h"

namespace convfirst::direct::sm90 {

// Of one dimension: input positions phase, phase + stride, ... meet taps first, first + stride, ...
struct Phase {
  int positions, taps, first, pad;  // pad: of the product over the output's gradient, whose taps run backwards

  static constexpr Phase of(int phase, int size, int kernel, int stride, int pad, int dilation) {
    if (stride == 1) return {size, kernel, 0, dilation * (kernel - 1) - pad};
    const int first = (phase + pad) % stride, taps = first < kernel ? (kernel - first + stride - 1) / stride : 0;
    return {(size - phase + stride - 1) / stride, taps, first, taps - 1 - (phase + pad - first) / stride};
  }
};

// Strided and dilated at once is left to the portable path.
inline bool dgrad_supports(const Problem& q) {
  return (q.stride_h == 1 || q.dilation_h == 1) && (q.stride_w == 1 || q.dilation_w == 1) && q.channels % 8 == 0 && q.filters % 8 == 0;
}

inline GemmProblem dgrad_problem(const Problem& q, int phase_h, int phase_w, const Phase& h, const Phase& w) {
  GemmProblem g{};
  g.batch = q.batch, g.height = q.out_h(), g.width = q.out_w(), g.channels = q.filters;
  g.out_h = h.positions, g.out_w = w.positions, g.filters = q.channels;
  g.kernel_h = h.taps, g.kernel_w = w.taps, g.stride_h = g.stride_w = 1, g.pad_h = h.pad, g.pad_w = w.pad;
  g.dilation_h = q.dilation_h, g.dilation_w = q.dilation_w;
  g.y_stride_q = int64_t{q.stride_w} * q.channels, g.y_stride_p = int64_t{q.stride_h} * q.width * q.channels;
  g.y_stride_n = int64_t{q.height} * q.width * q.channels;
  g.dtype = q.dtype, g.activation = Activation::kNone;
  (void)phase_h, (void)phase_w;
  return g;
}

// function(phase_h, phase_w, h, w) of every phase that has pixels.
template <class Function>
void for_each_phase(const Problem& q, Function function) {
  for (int a = 0; a < std::min(q.stride_h, q.height); ++a) {
    for (int b = 0; b < std::min(q.stride_w, q.width); ++b) {
      function(a, b, Phase::of(a, q.height, q.kernel_h, q.stride_h, q.pad_h, q.dilation_h),
               Phase::of(b, q.width, q.kernel_w, q.stride_w, q.pad_w, q.dilation_w));
    }
  }
}

}  // namespace convfirst::direct::sm90
