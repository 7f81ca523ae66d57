// The operations on whole arrays in memory, spread over threads. Each file of the same name has its formula.
#pragma once

#include "instruction_sets.h"

namespace perta {

// statistics: where to leave the sums; nullptr, which is faster, where they are not wanted.
void rescaled_subtract(const BlockKernels& kernels, const RescaleArrays& arrays, const Rescaling& rescaling, size_t n,
                       int threads, RescaleStatistics* statistics);

void accumulate(const BlockKernels& kernels, float* accumulator, const void* gradient, DType dtype, bool squared,
                size_t n, int threads);

// False if there was no memory for the packed rows and columns: then only a part was accumulated.
bool fisher(const BlockKernels& kernels, const FisherArrays& arrays, int threads);

}  // namespace perta
