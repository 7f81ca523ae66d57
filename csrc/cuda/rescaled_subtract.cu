// One thread an element, grid-stride. Moves each input byte once and each output byte once.
// Assumes that every array is aligned to its own element.

#include "launch.cuh"
#include "operations.h"
#include "rescale.h"

namespace perta::cuda {
namespace {

template <Power power, bool weighted>
__global__ void rescaled_subtract_kernel(RescaleArrays arrays, RescaleOptions options, size_t n) {
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride) {
    const float theta = load(arrays.theta, arrays.theta_dtype, i);
    const float task = load(arrays.tuned, arrays.tuned_dtype, i) - load(arrays.base, arrays.base_dtype, i);
    float step = options.lam * task;
    if (weighted) {
      const float forget = load(arrays.forget, arrays.forget_dtype, i);
      const float retain = load(arrays.retain, arrays.retain_dtype, i);
      const float w = options.masked ? weight<power, true>(forget, retain, options)
                                     : weight<power, false>(forget, retain, options);
      step = (options.lam * w) * task;
    }
    store(arrays.out, arrays.theta_dtype, i, subtract(theta, step));
  }
}

template <Power power, bool weighted>
void launch(const RescaleArrays& arrays, const RescaleOptions& options, size_t n, cudaStream_t stream) {
  rescaled_subtract_kernel<power, weighted>
      <<<blocks_for(n), threads_per_block, 0, stream>>>(arrays, options, n);
}

}  // namespace

const char* rescaled_subtract(const RescaleArrays& arrays, const RescaleOptions& options, size_t n,
                              void* stream_pointer) {
  if (n == 0) return nullptr;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  if (!options.weighted) {
    launch<Power::one, false>(arrays, options, n, stream);
  } else {
    switch (power_of(options.p)) {
      case Power::one: launch<Power::one, true>(arrays, options, n, stream); break;
      case Power::two: launch<Power::two, true>(arrays, options, n, stream); break;
      case Power::half: launch<Power::half, true>(arrays, options, n, stream); break;
      default: launch<Power::general, true>(arrays, options, n, stream);
    }
  }
  return last_error();
}

}  // namespace perta::cuda
