// accumulator += gradient, or += gradient^2, in float32, the square rounded before it is added.
//
// Assumes an accumulator aligned to its elements that shares no memory with the gradient, which may lie at any byte.
// Bytes: 8 an element of the accumulator, and the gradient's once. FLOPs: 1 an element, 2 with the square.
// Compiled once per instruction set, with `static` code only; see rescaled_subtract_block.cpp.

#include "instruction_sets.h"
#include "storage.h"

namespace perta::PERTA_ISA {

AccumulateBlock accumulate;

void accumulate(float* accumulator, const void* gradient, DType dtype, bool squared, size_t begin, size_t end) {
  alignas(64) float buffer[block];
  for (size_t i = begin; i < end; i += block) {
    const size_t n = end - i < block ? end - i : block;
    const auto* g = static_cast<const UnalignedFloat*>(stored_as(DType::f32, gradient, dtype, i, n, buffer));
    float* sum = accumulator + i;
    if (squared) {
#pragma GCC ivdep
      for (size_t k = 0; k < n; ++k) sum[k] += g[k] * g[k];
    } else {
#pragma GCC ivdep
      for (size_t k = 0; k < n; ++k) sum[k] += g[k];
    }
  }
}

}  // namespace perta::PERTA_ISA
