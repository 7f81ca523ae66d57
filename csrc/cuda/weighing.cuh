// w of one element, from two importances or their ratio, with the exponent known when the kernel runs; see rescale.h.
// Reads no memory. FLOPs: 3 and the powers.
#pragma once

#include "rescale.h"

namespace perta::cuda {

// general: p is none of 1, 2 and 1/2. The double-precision power has kernels of its own, as it needs more registers.
// Weighted by ratio, `retain` is the ratio and `forget` is not looked at.
template <Weighted weighted, bool general>
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
    if constexpr (weighted == Weighted::by_ratio) {
      return rescaling.masked ? weight_of_ratio<chosen, true>(retain, rescaling)
                              : weight_of_ratio<chosen, false>(retain, rescaling);
    }
    return rescaling.masked ? weight<chosen, true>(forget, retain, rescaling)
                            : weight<chosen, false>(forget, retain, rescaling);
  }
};

}  // namespace perta::cuda
