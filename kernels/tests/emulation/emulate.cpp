// Lets a test reach the portable path's rows through C.
#include "engine.h"
#include "mbconv/params.h"

using namespace convfirst::EMULATED;

extern "C" {

int emulate_rows() {
  int count;
  sm80_variants(&count);
  return count;
}

const char* emulate_name(int row) {
  int count;
  return sm80_variants(&count)[row].name;
}

// 0: done; -1: the row does not cover the problem on the device; else a CUDA error.
int emulate(int row, const Problem* problem, const Tensors* tensors, const Device* device, bool at_once, bool backwards) {
  int count;
  const Variant& variant = sm80_variants(&count)[row];
  if (!variant.supports(*problem, *device)) return -1;
  const Config config = variant.configure(*problem, *device);
  std::vector<unsigned char> workspace(config.workspace + 256, 0xff);
  const uintptr_t aligned = (reinterpret_cast<uintptr_t>(workspace.data()) + 255) / 256 * 256;
  emulation::copies_at_once = at_once;
  emulation::backwards = backwards;
  return variant.launch(*problem, *tensors, config, reinterpret_cast<void*>(aligned), nullptr);
}

}  // extern "C"
