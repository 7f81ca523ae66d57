// The formula of one element, shared by every CPU instruction set and by CUDA.
//
//   w    = I_f^p / (I_f^p + alpha I_r^p), 0 where both are 0; with a hard mask, w = 1 where w > threshold, else 0
//   step = (lam w) (theta_f - theta_0)
//   out  = theta where step is 0, else round(theta - step)
//
// float32 throughout, in this order, no contraction (build with -ffp-contract=off, --fmad=false): every backend
// then gives the same bits. Importances are taken by magnitude, because a mean gradient is stored with its sign.
#pragma once

#include <cmath>

#include "dtype.h"

namespace perta {

enum class Power : int { one = 0, two = 1, half = 2, general = 3 };

struct RescaleOptions {
  float lam;
  float alpha;
  float p;
  float threshold;
  bool weighted;  // false: w = 1, the plain task vector
  bool masked;    // w is made 1 above the threshold, else 0
};

PERTA_HD Power power_of(float p) {
  return p == 1.0f ? Power::one : p == 2.0f ? Power::two : p == 0.5f ? Power::half : Power::general;
}

template <Power power>
PERTA_HD float raise(float importance, float p) {
  const float magnitude = fabsf(importance);
  if (power == Power::one) return magnitude;
  if (power == Power::two) return magnitude * magnitude;
  if (power == Power::half) return sqrtf(magnitude);
  // In double, then rounded: within one unit in the last place of any other good pow.
  return static_cast<float>(pow(static_cast<double>(magnitude), static_cast<double>(p)));
}

template <Power power, bool masked>
PERTA_HD float weight(float forget, float retain, RescaleOptions options) {
  const float numerator = raise<power>(forget, options.p);
  const float denominator = numerator + options.alpha * raise<power>(retain, options.p);
  // A zero denominator has a zero numerator: dividing by one instead gives the wanted 0 without a branch.
  const float w = numerator / (denominator == 0.0f ? 1.0f : denominator);
  return masked ? (w > options.threshold ? 1.0f : 0.0f) : w;
}

PERTA_HD float subtract(float theta, float step) { return step == 0.0f ? theta : theta - step; }

PERTA_HD bool is_finite(float value) { return (bits_of(value) & 0x7F800000u) != 0x7F800000u; }

}  // namespace perta
