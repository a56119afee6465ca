// Generated: python kernels/convfirst_kernels/winograd/transforms.py. It tells where the matrices come from.
#pragma once

namespace convfirst::winograd {

// F(M, R): M outputs of a correlation with R taps g from kInputs inputs d, output [(filter g) * (input d)].
template <int M, int R>
struct Transform;

// Points 0, 1, -1 and infinity.
template <>
struct Transform<2, 3> {
  static constexpr int kInputs = 4;
  // A^T
  static constexpr float output(int row, int column) {
    constexpr float values[2][4] = {
        {1.0f, 1.0f, 1.0f, 0.0f},
        {0.0f, 1.0f, -1.0f, 1.0f}};
    return values[row][column];
  }
  // G
  static constexpr float filter(int row, int column) {
    constexpr float values[4][3] = {
        {1.0f, 0.0f, 0.0f},
        {0.5f, 0.5f, 0.5f},
        {0.5f, -0.5f, 0.5f},
        {0.0f, 0.0f, 1.0f}};
    return values[row][column];
  }
  // B^T
  static constexpr float input(int row, int column) {
    constexpr float values[4][4] = {
        {1.0f, 0.0f, -1.0f, 0.0f},
        {0.0f, 1.0f, 1.0f, 0.0f},
        {0.0f, -1.0f, 1.0f, 0.0f},
        {0.0f, -1.0f, 0.0f, 1.0f}};
    return values[row][column];
  }
};

// Points 0, 5/8, -5/8, 3/2, -3/2 and infinity.
template <>
struct Transform<4, 3> {
  static constexpr int kInputs = 6;
  // A^T
  static constexpr float output(int row, int column) {
    constexpr float values[4][6] = {
        {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 0.0f},
        {0.0f, 0.625f, -0.625f, 1.5f, -1.5f, 0.0f},
        {0.0f, 0.390625f, 0.390625f, 2.25f, 2.25f, 0.0f},
        {0.0f, 0.244140625f, -0.244140625f, 3.375f, -3.375f, 1.0f}};
    return values[row][column];
  }
  // G
  static constexpr float filter(int row, int column) {
    constexpr float values[6][3] = {
        {1.13777778f, 0.0f, 0.0f},
        {0.688403361f, 0.430252101f, 0.268907563f},
        {0.688403361f, -0.430252101f, 0.268907563f},
        {0.239028945f, 0.358543417f, 0.537815126f},
        {0.239028945f, -0.358543417f, 0.537815126f},
        {0.0f, 0.0f, 1.0f}};
    return values[row][column];
  }
  // B^T
  static constexpr float input(int row, int column) {
    constexpr float values[6][6] = {
        {0.87890625f, 0.0f, -2.640625f, 0.0f, 1.0f, 0.0f},
        {0.0f, 1.40625f, 2.25f, -0.625f, -1.0f, 0.0f},
        {0.0f, -1.40625f, 2.25f, 0.625f, -1.0f, 0.0f},
        {0.0f, -0.29296875f, -0.1953125f, 0.75f, 0.5f, 0.0f},
        {0.0f, 0.29296875f, -0.1953125f, -0.75f, 0.5f, 0.0f},
        {0.0f, 0.87890625f, 0.0f, -2.640625f, 0.0f, 1.0f}};
    return values[row][column];
  }
};

// Points 0, 1, -1 and infinity.
template <>
struct Transform<3, 2> {
  static constexpr int kInputs = 4;
  // A^T
  static constexpr float output(int row, int column) {
    constexpr float values[3][4] = {
        {1.0f, 1.0f, 1.0f, 0.0f},
        {0.0f, 1.0f, -1.0f, 0.0f},
        {0.0f, 1.0f, 1.0f, 1.0f}};
    return values[row][column];
  }
  // G
  static constexpr float filter(int row, int column) {
    constexpr float values[4][2] = {
        {1.0f, 0.0f},
        {0.5f, 0.5f},
        {0.5f, -0.5f},
        {0.0f, 1.0f}};
    return values[row][column];
  }
  // B^T
  static constexpr float input(int row, int column) {
    constexpr float values[4][4] = {
        {1.0f, 0.0f, -1.0f, 0.0f},
        {0.0f, 1.0f, 1.0f, 0.0f},
        {0.0f, -1.0f, 1.0f, 0.0f},
        {0.0f, -1.0f, 0.0f, 1.0f}};
    return values[row][column];
  }
};

}  // namespace convfirst::winograd
