// The input gradient on Hopper as implicit matrix products of the output's gradient with the filters, read transposed or, where that is slow,
// after a launch that transposes them: one for each phase of the stride, since the input pixels of a phase meet the same taps; one or two launches each, so that the last round of tiles is full.
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

// Rows of filters as they lie that begin between 128-byte lines are slow to copy: 191 us against 184 with a transposed copy of 96 channels.
inline bool reads_transposed(const Problem& q) { return q.channels % 64 == 0; }

inline GemmProblem dgrad_problem(const Problem& q, const Phase& h, const Phase& w) {
  GemmProblem g{};
  g.batch = q.batch, g.height = q.out_h(), g.width = q.out_w(), g.channels = q.filters;
  g.out_h = h.positions, g.out_w = w.positions, g.filters = q.channels;
  g.kernel_h = h.taps, g.kernel_w = w.taps, g.stride_h = g.stride_w = 1, g.pad_h = h.pad, g.pad_w = w.pad;
  g.dilation_h = q.dilation_h, g.dilation_w = q.dilation_w;
  g.y_stride_q = int64_t{q.stride_w} * q.channels, g.y_stride_p = int64_t{q.stride_h} * q.width * q.channels;
  g.y_stride_n = int64_t{q.height} * q.width * q.channels;
  g.dtype = q.dtype, g.activation = Activation::kNone;
  g.transposed = reads_transposed(q), g.w_taps = q.taps();
  const int step_h = q.stride_h, step_w = q.stride_w;  // of the taps that a phase meets; 1 where the stride is
  g.w_first = (h.first + (h.taps - 1) * step_h) * q.kernel_w + w.first + (w.taps - 1) * step_w;
  g.w_step_r = -step_h * q.kernel_w, g.w_step_s = -step_w;
  return g;
}

// The first images by one plan, the rest, if any, by another.
struct DgradPlan {
  GemmProblem first_problem, rest_problem;
  GemmPlan first, rest;
  double cost() const { return first.cost + (rest_problem.batch > 0 ? rest.cost : 0); }
};

// Images that full rounds of a tile hold go first where a smaller tile then wastes less on the others.
inline DgradPlan plan_dgrad(const GemmProblem& g, const Device& device) {
  constexpr double kLeastGain = 0.97;
  DgradPlan best{g, g, plan_gemm(g, device), {}};
  best.rest_problem.batch = 0;
  if (best.first.grid == 0) return best;
  const double whole = best.first.cost;
  for (int i = 0; i < kGemmTileCount; ++i) {
    if (!tile_supports(g, i)) continue;
    const GemmTile& t = kGemmTiles[i];
    const int64_t columns = (g.filters + t.columns - 1) / t.columns, pixels = int64_t{g.out_h} * g.out_w;
    for (int rounds = 1;; ++rounds) {
      const int64_t images = rounds * device.multiprocessors / columns * t.rows() / pixels;
      if (images >= g.batch || rounds > 16) break;
      if (images == 0) continue;
      DgradPlan plan{g, g, {}, {}};
      plan.first_problem.batch = images, plan.rest_problem.batch = g.batch - images;
      plan.first = plan_gemm_tile(plan.first_problem, device, i), plan.rest = plan_gemm(plan.rest_problem, device);
      if (plan.cost() < std::min(kLeastGain * whole, best.cost())) best = plan;
    }
  }
  return best;
}

// Of stride 1 in float32: one product with all filters transposed.
inline GemmProblem float_dgrad_problem(const Problem& q) {
  return dgrad_problem(q, Phase::of(0, q.height, q.kernel_h, 1, q.pad_h, q.dilation_h), Phase::of(0, q.width, q.kernel_w, 1, q.pad_w, q.dilation_w));
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
