// w = I_f^p / (I_f^p + alpha I_r^p) of one element, with the exponent known when the kernel runs; see rescale.h.
// Reads no memory. FLOPs: 3 and the two powers.
#pragma once

#include "rescale.h"

namespace perta::cuda {

// general: p is none of 1, 2 and 1/2. The double-precision power has kernels of its own, as it needs more registers.
template <bool general>
struct Weighing {
  Rescaling rescaling;
  Power power;

  __device__ __forceinline__ float weigh(float forget, float retain) const {
    if constexpr (general) return weigh_with<Power::general>(forget, retain);
    if (power == Power::one) return weigh_with<Power::one>(forget, retain);
    if (power == Power::two) return weigh_with<Power::two>(forget, retain);
    return weigh_with<Power::half>(forget, retain);
  }

  template <Power chosen>
  __device__ __forceinline__ float weigh_with(float forget, float retain) const {
    return rescaling.masked ? weight<chosen, true>(forget, retain, rescaling)
                            : weight<chosen, false>(forget, retain, rescaling);
  }
};

}  // namespace perta::cuda
