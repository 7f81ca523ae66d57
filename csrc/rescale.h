// The formula of one element, and what every backend in C++ takes for it; shared by the CPU and CUDA.
//
//   w    = I_f^p / (I_f^p + alpha I_r^p), 0 where both are 0; with a threshold, w = 1 where w > threshold, else 0
//   or, from the ratio rho = I_r / I_f alone, w = 1 / (1 + alpha rho^p), 0 where rho is infinite
//   step = (lam w) (theta_f - theta_0)
//   out  = theta where step is 0, else round(theta - step)
//
// Assumes float32 throughout, in this order, and no contraction (-ffp-contract=off, --fmad=false): every backend then
// gives the same bits. Importances are taken by magnitude, because a mean gradient is stored with its sign.
// FLOPs: 3 an element with w = 1; 7 with weights and p = 1, one a division, by a ratio or by two importances.
#pragma once

#include <cmath>

#include "dtype.h"

namespace perta {

// Everything in the formula but the arrays, as perta_fast.rules.Rescaling.
struct Rescaling {
  float lam;
  float p;
  float alpha;
  float threshold;
  bool masked;  // there is a threshold
};

// A task vector of which only factors are stored: scale * left * right, as of a LoRA adapter.
struct LowRank {
  const float* left;   // (rows, rank)
  const float* right;  // (rank, columns)
  size_t rank;
  size_t columns;
  float scale;
  size_t first;  // element of the matrix, row by row, at which the other arrays begin
};

// One tensor's arrays, all equally long.
struct RescaleArrays {
  void* out;  // may be theta itself, else overlaps nothing
  const void* theta;
  const void* tuned;
  const void* base;
  const void* forget;  // nullptr: I_f = 1, so that `retain` is the ratio I_r / I_f
  const void* retain;  // nullptr as well: w = 1, the plain task vector
  DType theta_dtype;   // also that of out
  DType tuned_dtype;
  DType base_dtype;
  DType forget_dtype;
  DType retain_dtype;
  const LowRank* low_rank = nullptr;  // the task vector, if tuned and base are not read for it
};

struct RescaleStatistics {
  double sum_weight = 0;          // of w
  double sum_squared_theta = 0;   // of theta^2, before
  double sum_squared_change = 0;  // of (out - theta)^2, after rounding
  int64_t changed = 0;            // elements whose value differs after rounding
  int64_t nonfinite_out = 0;      // NaN or Inf in out
  int64_t nonfinite_forget = 0;   // NaN or Inf in I_f
  int64_t nonfinite_retain = 0;   // NaN or Inf in I_r
  int64_t invalid_ratio = 0;      // NaN or less than 0 in the ratio, which may be infinite
  bool nonzero_task = false;      // some element has theta_f != theta_0
};

// What gives w.
enum class Weighted : int { no = 0, by_pair = 1, by_ratio = 2 };

PERTA_HD Weighted weighted_by(const RescaleArrays& arrays) {
  if (arrays.retain == nullptr) return Weighted::no;
  return arrays.forget == nullptr ? Weighted::by_ratio : Weighted::by_pair;
}

enum class Power : int { one = 0, two = 1, half = 2, general = 3 };

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
PERTA_HD float weight(float forget, float retain, Rescaling rescaling) {
  const float numerator = raise<power>(forget, rescaling.p);
  const float denominator = numerator + rescaling.alpha * raise<power>(retain, rescaling.p);
  // A zero denominator has a zero numerator: dividing by one instead gives the wanted 0 without a branch.
  const float w = numerator / (denominator == 0.0f ? 1.0f : denominator);
  return masked ? (w > rescaling.threshold ? 1.0f : 0.0f) : w;
}

constexpr float largest_float = 3.40282346638528859812e+38f;

template <Power power, bool masked>
PERTA_HD float weight_of_ratio(float ratio, Rescaling rescaling) {
  const float raised = raise<power>(ratio, rescaling.p);
  // A power that overflows is cut to the largest number: times an alpha of 0 it gives 0, and not NaN.
  const float denominator = 1.0f + rescaling.alpha * (raised > largest_float ? largest_float : raised);
  const float w = fabsf(ratio) > largest_float ? 0.0f : 1.0f / denominator;
  return masked ? (w > rescaling.threshold ? 1.0f : 0.0f) : w;
}

PERTA_HD float subtract(float theta, float step) { return step == 0.0f ? theta : theta - step; }

PERTA_HD bool is_finite(float value) { return (bits_of(value) & 0x7F800000u) != 0x7F800000u; }

}  // namespace perta
