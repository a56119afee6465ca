// Stands in for csrc/common/mma_1688.cuh.
#pragma once

#include "ptx.cuh"

namespace convfirst::ptx {

template <typename T>
void mma_1688(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  mma_16816<T>(d, {a0, a1, 0, 0}, b, 0);
}

}  // namespace convfirst::ptx
