// Launches on a CUDA stream of the current device. All pointers are device pointers, each aligned to its element;
// nothing waits for the device. Tensors must not overlap, except that `out` may be `theta`.
#pragma once

#include <vector>

#include "../cpu/rescaled_subtract_block.h"

namespace perta::cuda {

struct RescaleTensor {
  RescaleArrays arrays;
  size_t n;
};

struct FoldTensor {
  float* accumulator;
  const void* gradient;
  DType gradient_dtype;
  size_t n;
};

// Tensors of the same storage types share a launch. Each returns nullptr, or CUDA's description of what went wrong.
const char* rescaled_subtract(const std::vector<RescaleTensor>& tensors, const RescaleOptions& options,
                              void* stream);
// One tensor, whose arrays have low_rank set.
const char* low_rank_subtract(const RescaleTensor& tensor, const RescaleOptions& options, void* stream);
const char* fold(const std::vector<FoldTensor>& tensors, bool squared, void* stream);

}  // namespace perta::cuda
