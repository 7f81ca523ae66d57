// The block kernels: the work on one block of an operation, on one thread. They are compiled once per instruction set
// (PERTA_ISA is its name, and the namespace of what is compiled), and the processor decides which of them run.
#pragma once

#include "fisher_block.h"
#include "rescale.h"

namespace perta {

// Elements [begin, end) of out; statistics are added to, nullptr: do not count.
using RescaledSubtractBlock = void(const RescaleArrays&, const Rescaling&, size_t begin, size_t end,
                                   RescaleStatistics* statistics);
// Elements [begin, end) of accumulator.
using AccumulateBlock = void(float* accumulator, const void* gradient, DType dtype, bool squared, size_t begin,
                             size_t end);
// The BLAKE3 values, 32 bytes each, of `count` whole chunks, of which the first has the number `first` in its file.
using HashChunks = void(const unsigned char* data, size_t count, uint64_t first, unsigned char* values);
// Those of `count` parents, from the values of their children, two each; `values` may be `children`.
using HashParents = void(const unsigned char* children, size_t count, unsigned char* values);

struct BlockKernels {
  const char* name;
  RescaledSubtractBlock* rescaled_subtract;
  AccumulateBlock* accumulate;
  FisherBlock* fisher;
  HashChunks* hash_chunks;
  HashParents* hash_parents;
};

// The kernels of the widest instruction set that this processor runs.
const BlockKernels* best_kernels();

// Those of the set called name (portable, avx2, avx512); nullptr if this build or processor lacks it.
const BlockKernels* kernels_named(const char* name);

}  // namespace perta
