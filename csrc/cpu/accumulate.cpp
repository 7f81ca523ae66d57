// accumulator += gradient, or += gradient^2, over threads. Formula, bytes and FLOPs: accumulate_block.cpp.

#include "operations.h"
#include "parallel.h"

namespace perta {

namespace {
constexpr size_t grain = 128 * 1024;  // elements a task: large beside the cost of handing it out
}

void accumulate(const BlockKernels& kernels, float* accumulator, const void* gradient, DType dtype, bool squared,
                size_t n, int threads) {
  parallel_for((n + grain - 1) / grain, threads, [&](size_t k) {
    const size_t end = (k + 1) * grain < n ? (k + 1) * grain : n;
    kernels.accumulate(accumulator, gradient, dtype, squared, k * grain, end);
  });
}

}  // namespace perta
