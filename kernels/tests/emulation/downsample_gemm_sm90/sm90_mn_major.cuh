// Stands in for csrc/common/sm90_mn_major.cuh; sm90.cuh has its functions.
#include "sm90.cuh"
