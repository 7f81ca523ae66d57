// accumulator += gradient or gradient^2, float32, grid-stride.

#include "launch.cuh"
#include "operations.h"

namespace perta::cuda {
namespace {

template <bool squared>
__global__ void fold_kernel(float* accumulator, const void* gradient, DType dtype, size_t n) {
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride) {
    const float g = load(gradient, dtype, i);
    accumulator[i] += squared ? g * g : g;
  }
}

}  // namespace

const char* fold(float* accumulator, const void* gradient, DType dtype, bool squared, size_t n,
                 void* stream_pointer) {
  if (n == 0) return nullptr;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  if (squared) {
    fold_kernel<true><<<blocks_for(n), threads_per_block, 0, stream>>>(accumulator, gradient, dtype, n);
  } else {
    fold_kernel<false><<<blocks_for(n), threads_per_block, 0, stream>>>(accumulator, gradient, dtype, n);
  }
  return last_error();
}

}  // namespace perta::cuda
