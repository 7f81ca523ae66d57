// Launches on a CUDA stream of the current device. All pointers are device pointers, each aligned to its element;
// nothing waits for the device. Tensors must not overlap, except that `out` may be `theta`.
#pragma once

#include <vector>

#include "rescale.h"

namespace perta::cuda {

struct RescaleTensor {
  RescaleArrays arrays;
  size_t n;
};

struct AccumulateTensor {
  float* accumulator;
  const void* gradient;
  DType gradient_dtype;
  size_t n;
};

// Each returns nullptr, or CUDA's description of what went wrong. Tensors of the same storage types share a launch.
const char* rescaled_subtract(const std::vector<RescaleTensor>& tensors, const Rescaling& rescaling, void* stream);
const char* accumulate(const std::vector<AccumulateTensor>& tensors, bool squared, void* stream);
// One tensor, whose arrays have low_rank set.
const char* low_rank_subtract(const RescaleTensor& tensor, const Rescaling& rescaling, void* stream);

}  // namespace perta::cuda
