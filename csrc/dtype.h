// Storage types and their conversion to and from float32: out = float32(stored), stored = round(value).
//
// The conversions are integer arithmetic on the bits, so that one definition serves every CPU and CUDA and rounds to
// nearest even everywhere. A bfloat16 value survives the round trip bit for bit, NaN included.
// Assumes IEEE float32 with subnormals (no flushing to zero). Reads no memory; a few integer operations an element.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define PERTA_HD __host__ __device__ __forceinline__ static
#else
// `static` keeps a copy compiled for one instruction set from being linked into code for another.
#define PERTA_HD static inline
#endif

namespace perta {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

PERTA_HD size_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

PERTA_HD uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

PERTA_HD float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

PERTA_HD float bf16_to_float(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

// A NaN must be a result of arithmetic (so quiet, and told by its upper half) or a widened bfloat16.
PERTA_HD uint16_t float_to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t half_a_unit = value != value ? 0u : 0x7FFFu + ((bits >> 16) & 1u);  // a carry would break a NaN
  return static_cast<uint16_t>((bits + half_a_unit) >> 16);
}

PERTA_HD float f16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7FFFu) << 13;
  // The shifted bits read as a float32 are the value times 2^-112, subnormals included; the product is exact.
  const uint32_t finite = bits_of(float_of(magnitude) * 5192296858534827628530496329220096.0f);
  const bool special = (h & 0x7C00u) == 0x7C00u;
  return float_of(sign | (special ? (magnitude | 0x7F800000u) : finite));
}

PERTA_HD uint16_t float_to_f16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  // From 2^-14 up: drop 13 bits with a carry into the exponent, rebias by 112.
  const uint32_t normal = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Below it the spacing is 2^-24, which is float32's own spacing just above one half.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477FF000u ? 0x7C00u : half;
  half = magnitude > 0x7F800000u ? (0x7E00u | ((magnitude >> 13) & 0x1FFu)) : half;
  return static_cast<uint16_t>(((bits >> 16) & 0x8000u) | half);
}

}  // namespace perta
