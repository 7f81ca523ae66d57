// One element: conversions of storage types, and the formula of rescale.h, on every edge.
#include <cmath>
#include <initializer_list>
#include <limits>

#include "check.h"
#include "rescale.h"

using namespace perta;

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float smallest = std::numeric_limits<float>::denorm_min();

bool is_nan(float value) { return value != value; }

// The nearest of all bfloat16 or float16 values, an even last bit on a tie, by trying the three around `bits`.
template <float widen(uint16_t)>
bool is_nearest(float value, uint16_t bits) {
  const double distance = std::fabs(static_cast<double>(widen(bits)) - value);
  for (int step : {-1, 1}) {
    const uint16_t other = static_cast<uint16_t>(bits + step);
    if ((other & 0x8000u) != (bits & 0x8000u) || is_nan(widen(other)) || std::isinf(widen(other))) continue;
    const double further = std::fabs(static_cast<double>(widen(other)) - value);
    if (further < distance || (further == distance && (bits & 1u) != 0)) return false;
  }
  return true;
}

template <float widen(uint16_t), uint16_t narrow(float)>
void every_stored_value_survives() {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const uint16_t stored = static_cast<uint16_t>(bits);
    const float value = widen(stored);
    if (is_nan(value)) {
      CHECK(is_nan(widen(narrow(value))));
    } else {
      CHECK(narrow(value) == stored);
    }
  }
}

template <float widen(uint16_t), uint16_t narrow(float)>
void rounding_is_to_nearest_even(float largest) {
  for (uint32_t bits = 0; bits < 0x7F800000u; bits += 40507u) {  // a prime: all exponents, many fractions
    for (uint32_t sign : {0u, 0x80000000u}) {
      const float value = float_of(bits | sign);
      if (std::fabs(value) <= largest) CHECK(is_nearest<widen>(value, narrow(value)));
    }
  }
}

void formula() {
  const Rescaling plain{0.5f, 1.0f, 1.0f, 0.0f, false};
  CHECK((weight<Power::one, false>(0.0f, 0.0f, plain)) == 0.0f);
  CHECK((weight<Power::one, false>(1.0f, 0.0f, plain)) == 1.0f);
  CHECK((weight<Power::one, false>(0.0f, 1.0f, plain)) == 0.0f);
  CHECK((weight<Power::one, false>(-3.0f, 1.0f, plain)) == 0.75f);  // a mean gradient has a sign
  CHECK((weight<Power::two, false>(3.0f, 1.0f, plain)) == 0.9f);
  CHECK((weight<Power::half, false>(9.0f, 1.0f, plain)) == 0.75f);
  CHECK((weight<Power::one, false>(smallest, smallest, plain)) == 0.5f);
  CHECK((weight<Power::two, false>(smallest, 1.0f, plain)) == 0.0f);  // its square is zero
  CHECK(is_nan(weight<Power::one, false>(infinity, 1.0f, plain)));
  const Rescaling cubed{1.0f, 3.0f, 2.0f, 0.0f, false};
  CHECK((weight<Power::general, false>(2.0f, 1.0f, cubed)) == 8.0f / 10.0f);
  const Rescaling masked{1.0f, 1.0f, 1.0f, 0.5f, true};
  CHECK((weight<Power::one, true>(1.0f, 1.0f, masked)) == 0.0f);  // w is not greater than the threshold
  CHECK((weight<Power::one, true>(1.1f, 1.0f, masked)) == 1.0f);
  CHECK((weight_of_ratio<Power::one, false>(0.0f, plain)) == 1.0f);
  CHECK((weight_of_ratio<Power::one, false>(3.0f, plain)) == 0.25f);
  CHECK((weight_of_ratio<Power::two, false>(3.0f, plain)) == 0.1f);
  CHECK((weight_of_ratio<Power::half, false>(9.0f, plain)) == 0.25f);
  CHECK((weight_of_ratio<Power::general, false>(2.0f, cubed)) == 1.0f / 17.0f);
  CHECK((weight_of_ratio<Power::one, false>(infinity, plain)) == 0.0f);
  CHECK((weight_of_ratio<Power::one, true>(0.5f, masked)) == 1.0f);
  CHECK((weight_of_ratio<Power::one, true>(1.0f, masked)) == 0.0f);  // w is not greater than the threshold
  const Rescaling without_retain{0.5f, 2.0f, 0.0f, 0.0f, false};
  CHECK((weight_of_ratio<Power::two, false>(3e38f, without_retain)) == 1.0f);  // its square is infinite
  CHECK((weight_of_ratio<Power::two, false>(infinity, without_retain)) == 0.0f);
  CHECK(is_nan(weight_of_ratio<Power::one, false>(std::numeric_limits<float>::quiet_NaN(), plain)));
  CHECK(power_of(1.0f) == Power::one && power_of(2.0f) == Power::two);
  CHECK(power_of(0.5f) == Power::half && power_of(1.5f) == Power::general);
  CHECK(bits_of(subtract(-0.0f, 0.0f)) == bits_of(-0.0f));  // theta keeps its bits
  CHECK(subtract(1.0f, 0.25f) == 0.75f);
  CHECK(is_finite(smallest) && is_finite(-1e38f) && !is_finite(infinity) && !is_finite(-infinity));
  CHECK(!is_finite(std::numeric_limits<float>::quiet_NaN()));
}

}  // namespace

int main() {
  every_stored_value_survives<bf16_to_float, float_to_bf16>();
  every_stored_value_survives<f16_to_float, float_to_f16>();
  rounding_is_to_nearest_even<bf16_to_float, float_to_bf16>(3e38f);
  rounding_is_to_nearest_even<f16_to_float, float_to_f16>(65504.0f);
  CHECK(float_to_f16(65520.0f) == 0x7C00u && float_to_f16(-infinity) == 0xFC00u);
  CHECK(float_to_bf16(infinity) == 0x7F80u && float_to_bf16(3.4e38f) == 0x7F80u);
  formula();
  return finish();
}
