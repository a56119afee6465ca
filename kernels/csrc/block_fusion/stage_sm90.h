// A stage of conv-first blocks in one launch on sm_90a: compile-time description, shared memory and arguments. Host and device both include it.
#pragma once

#include "latency_sm90.h"

namespace convfirst::block_fusion::sm90 {

// The blocks' weights one behind another, in the layouts of params.h; vectors float32, those marked may be nullptr.
struct StageTensors {
  const void* x;               // [pixels, channels]
  void* y;
  const void* conv_weight;     // [blocks, 9, channels, 8]
  const float* conv_bias;      // [blocks, channels] or nullptr
  const void* expand_weight;   // [blocks, hidden, channels]
  const float* expand_bias;    // [blocks, hidden] or nullptr
  const float* expand_sums;    // [blocks, hidden]: sums of expand_weight's rows
  const void* project_weight;  // [blocks, channels, hidden]
  const float* project_bias;   // [blocks, channels] or nullptr
  void* workspace;             // StageWorkspace::bytes, zero before the first launch that uses it
  float eps;
  int has_norm;
  int height, width;
  int pixels;  // of all images
  int blocks;
};

struct StageProblem {
  int64_t batch, height, width;
  int channels, blocks;
  DType dtype;
  Activation activation;
};

// What launches leave in the workspace: the epoch, from which flags count on so that no flag of an earlier launch is taken for one of this,
// and the blocks that ended; then the words that tiles exchange, [2][pixels][channels / 2].
struct StageWorkspace {
  static constexpr int kHeader = 256;
  static int64_t bytes(int64_t pixels, int channels) { return kHeader + 2 * pixels * channels * 4; }
};

template <class Traits>
struct StageKernel {
  static int launch(const StageTensors& t, cudaStream_t stream);
  static int resident(int width, int* clusters);  // how many clusters run at once; returns cudaError_t
};

// nullptr where it can run, else why not (static text).
const char* stage_refusal(const StageProblem& q, const Device& device);
int launch_stage(const StageProblem& q, const StageTensors& t, cudaStream_t stream);

}  // namespace convfirst::block_fusion::sm90
