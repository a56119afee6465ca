// Lets a test reach the kernels between residual blocks through C.
#include "../engine.h"
#include "patch/params.h"

using namespace convfirst::patch;

extern "C" {

// 0: done; -1: not covered on the device; else a CUDA error.
#define EMULATE(name, Arguments)                                                                              \
  int emulate_##name(const Arguments* arguments, const Device* device, bool at_once, bool backwards) {        \
    emulation::copies_at_once = at_once;                                                                      \
    emulation::backwards = backwards;                                                                         \
    return sm80_path()->name(*arguments, *device, nullptr);                                                   \
  }
EMULATE(stem, Stem)
EMULATE(patch_stem, PatchStem)
EMULATE(downsample, Downsample)
EMULATE(gather, Gather)

}  // extern "C"
