// The two products of a chunk of hidden units where a warp owns its rows: S = a W1^T + bias, O += act(S) W2^T, all in registers.
//
//      first product, k16 steps of C              second product, k16 steps of the chunk
//      | 0 | 1 | ... | last: words of step 0 |    | 0: words of 1 | 1: words of 2 | ... | last |
//
// A step of the second product needs 16 columns of S. They are activated, two channels (a word) at a time, between the products of the step
// before; the first ones between those of the first product's last step, whose first two n8 blocks are complete before the others.
#pragma once

#include "matmul_stage_sm80.cuh"
#include "word_sm80.cuh"

namespace convfirst::block_fusion::sm80 {

// A step's A operand: 16 columns of S, activated.
template <typename T, class Word, int kRows, int kColumns>
struct ActivatedStep {
  using Sums = float[kRows][kColumns][4];
  static constexpr int kWords = 4 * kRows, kLag = 2, kTurns = kWords + kLag;  // a word ends kLag turns after it began
  uint32_t a[kRows][4];
  Word words[kWords];

  // The part-th of `parts` shares of the work for `step`.
  __device__ __forceinline__ void share(const Sums& s, int step, int part, int parts) {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      if (turn * parts / kTurns != part) continue;  // bounds that are not constants would not be unrolled in time
      if (turn < kWords) {
        const float(&sums)[4] = s[turn / 4][2 * step + turn % 4 / 2];
        words[turn].template begin<T>(sums[turn % 2 * 2], sums[turn % 2 * 2 + 1]);
      }
      if (turn >= kLag) a[(turn - kLag) / 4][(turn - kLag) % 4] = words[turn - kLag].template value<T>();
    }
  }
};

// s += A B^T; `first` is complete on return. copies() issues copies under the products, all at once: ptxas sends three empty loads ahead of
// those that follow an ldmatrix.
template <typename T, int kSteps, class Word, int kRows, int kColumns, typename LoadA, typename Copies>
__device__ __forceinline__ void expand_chunk(float (&s)[kRows][kColumns][4], LoadA load_a, uint32_t b, int b_pitch,
                                             ActivatedStep<T, Word, kRows, kColumns>& first, Copies copies) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t fa[kRows][4];
    load_a(fa, step);
#pragma unroll
    for (int n = 0; n < kColumns / 2; ++n) {
      uint32_t fb[4];
      ptx::ldmatrix_x4(fb, b + n * 16 * b_pitch + step * 32);
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        ptx::mma_16816<T>(s[m][2 * n], fa[m], fb[0], fb[1]);
        ptx::mma_16816<T>(s[m][2 * n + 1], fa[m], fb[2], fb[3]);
      }
      if (step == kSteps - 1 && n > 0) first.share(s, 0, n - 1, kColumns / 2 - 1);
    }
    if (step == 1) copies();
  }
}

// out += act(s) B^T.
template <typename T, class Word, int kRows, int kHidden, int kColumns, typename Copies>
__device__ __forceinline__ void project_chunk(float (&out)[kRows][kColumns][4], const float (&s)[kRows][kHidden][4],
                                              ActivatedStep<T, Word, kRows, kHidden>& now, uint32_t b, int b_pitch, Copies copies) {
  constexpr int kSteps = kHidden / 2;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    ActivatedStep<T, Word, kRows, kHidden> next;
#pragma unroll
    for (int n = 0; n < kColumns / 2; ++n) {
      uint32_t fb[4];
      ptx::ldmatrix_x4(fb, b + n * 16 * b_pitch + step * 32);
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        ptx::mma_16816<T>(out[m][2 * n], now.a[m], fb[0], fb[1]);
        ptx::mma_16816<T>(out[m][2 * n + 1], now.a[m], fb[2], fb[3]);
      }
      if (step + 1 < kSteps) next.share(s, step + 1, n, kColumns / 2);
    }
    if (step == 1) copies();
    now = next;
  }
}

}  // namespace convfirst::block_fusion::sm80
