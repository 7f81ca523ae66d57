// Launches on a CUDA stream. All pointers are device pointers; nothing waits for the device.
#pragma once

#include "../cpu/block_kernels.h"

namespace perta::cuda {

// Each returns nullptr, or CUDA's description of what went wrong.
const char* rescaled_subtract(const RescaleArrays& arrays, const RescaleOptions& options, size_t n,
                              void* stream);
const char* fold(float* accumulator, const void* gradient, DType dtype, bool squared, size_t n, void* stream);

}  // namespace perta::cuda
