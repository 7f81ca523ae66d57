// Elements as they are stored, read as float32: used by every block kernel on the CPU.
//
// Assumes nothing of addresses: an array may begin at any byte of a file in memory. Bytes: each of the source is read
// once; what must be converted goes through a buffer that stays in the first-level cache.
// All code is `static`, as the files that include this one are compiled once per instruction set.
#pragma once

#include "dtype.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace perta {

using UnalignedHalf = uint16_t __attribute__((aligned(1), may_alias));
using UnalignedWord = uint32_t __attribute__((aligned(1), may_alias));
using UnalignedFloat = float __attribute__((aligned(1), may_alias));

constexpr size_t block = 1024;  // elements; six float32 buffers of it stay in the first-level cache

static inline const unsigned char* at(const void* data, DType dtype, size_t index) {
  return static_cast<const unsigned char*>(data) + index * size_of(dtype);
}

static inline void widen_bf16(const void* source, float* out, size_t n) {
  const UnalignedHalf* halves = static_cast<const UnalignedHalf*>(source);
  for (size_t i = 0; i < n; ++i) out[i] = bf16_to_float(halves[i]);
}

static inline void widen_f16(const void* source, float* out, size_t n) {
  const UnalignedHalf* halves = static_cast<const UnalignedHalf*>(source);
  size_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(eight));
  }
#endif
  for (; i < n; ++i) out[i] = f16_to_float(halves[i]);
}

// One element as float32. These are functions because GCC drops aligned(1) from a type that is a template's argument.
static inline float read_f32(const void* data, size_t i) { return static_cast<const UnalignedFloat*>(data)[i]; }

static inline float read_bf16(const void* data, size_t i) {
  return bf16_to_float(static_cast<const UnalignedHalf*>(data)[i]);
}

static inline float read_f16(const void* data, size_t i) {
  return f16_to_float(static_cast<const UnalignedHalf*>(data)[i]);
}

// Two neighbouring elements of 16 bits.
static inline uint32_t read_word(const void* data, size_t pair) {
  return static_cast<const UnalignedWord*>(data)[pair];
}

// Elements [index, index + n) of `data` stored as `wanted`: where they lie, or else as float32 in `buffer`.
static inline const void* stored_as(DType wanted, const void* data, DType dtype, size_t index, size_t n,
                                    float* buffer) {
  const unsigned char* source = at(data, dtype, index);
  if (dtype == wanted) return source;
  if (dtype == DType::bf16) {
    widen_bf16(source, buffer, n);
  } else if (dtype == DType::f16) {
    widen_f16(source, buffer, n);
  } else {
    memcpy(buffer, source, n * sizeof(float));
  }
  return buffer;
}

}  // namespace perta
